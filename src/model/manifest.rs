//! The interpreter that computes nothing: a definition → the list of its parameters, and of its verbs.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt::Write;

use anyhow::Context;

use crate::Result;
use crate::model::ops::{Activation, Attend, Distances, Ids, Linear, Norm, Ops, Param, Pick, Pooling, Table};

/// Every parameter of a definition once, in the order of first use.
///
/// # Errors
/// A name that is used twice with different shapes.
pub fn manifest(define: impl FnOnce(&Manifest) -> Result<()>) -> Result<Vec<Param>> {
    let list = Manifest::default();
    define(&list)?;
    Ok(list.params.into_inner())
}

/// A definition's verbs in their order with all that decides what they compute, a line each. What only training does,
/// as dropout, is left out.
///
/// # Errors
/// As [`manifest`].
pub fn verbs(define: impl FnOnce(&Manifest) -> Result<()>) -> Result<String> {
    let list = Manifest::default();
    define(&list)?;
    Ok(list.verbs.into_inner())
}

/// The linear maps of a definition, in the order of first use.
///
/// # Errors
/// As [`manifest`].
pub fn maps(define: impl FnOnce(&Manifest) -> Result<()>) -> Result<Vec<Linear>> {
    let list = Manifest::default();
    define(&list)?;
    let mut maps: Vec<Linear> = Vec::new();
    for map in list.maps.into_inner() {
        if maps.iter().all(|known| known.weight.name != map.weight.name) {
            maps.push(map);
        }
    }
    Ok(maps)
}

/// Collects what the verbs name.
#[derive(Default)]
pub struct Manifest {
    params: RefCell<Vec<Param>>,
    maps: RefCell<Vec<Linear>>,
    /// Where each name stands in the list.
    places: RefCell<HashMap<String, usize>>,
    verbs: RefCell<String>,
}

impl Manifest {
    /// Writes a verb down.
    fn verb(&self, verb: std::fmt::Arguments) -> Result<()> {
        writeln!(self.verbs.borrow_mut(), "{verb}").context("a verb can't be written")
    }

    fn note(&self, params: impl IntoIterator<Item = Param>) -> Result<()> {
        let (mut list, mut places) = (self.params.borrow_mut(), self.places.borrow_mut());
        for param in params {
            match places.get(&param.name).map(|&place| &list[place]) {
                None => {
                    places.insert(param.name.clone(), list.len());
                    list.push(param);
                }
                Some(known) if known.shape == param.shape => {} // a tied weight
                Some(known) => anyhow::bail!(
                    "{} is used with shape {:?} and with shape {:?}",
                    param.name,
                    known.shape,
                    param.shape
                ),
            }
        }
        Ok(())
    }
}

impl Ops for Manifest {
    type X = ();

    fn embed(&self, table: Table, ids: Ids) -> Result<()> {
        self.verb(format_args!("embed {table:?} {ids:?}"))?;
        self.note([table.weight])
    }

    fn whole(&self, table: Table) -> Result<()> {
        self.verb(format_args!("whole {table:?}"))?;
        self.note([table.weight])
    }

    fn linear(&self, map: Linear, _: &()) -> Result<()> {
        self.verb(format_args!("linear {map:?}"))?;
        self.maps.borrow_mut().push(map.clone());
        self.note([map.weight].into_iter().chain(map.bias))
    }

    fn split(&self, _: &(), parts: usize) -> Result<Vec<()>> {
        self.verb(format_args!("split {parts}"))?;
        Ok(vec![(); parts])
    }

    fn layer_norm(&self, norm: Norm, _: &()) -> Result<()> {
        self.verb(format_args!("layer_norm {norm:?}"))?;
        self.note([norm.weight].into_iter().chain(norm.bias))
    }

    fn attention_by_distance(
        &self,
        _: &(),
        _: &(),
        _: &(),
        how: Attend,
        distances: Distances<()>,
    ) -> Result<()> {
        self.verb(format_args!("attention {:?} {distances:?}", Attend { dropout: 0.0, ..how }))?;
        match distances {
            Distances::Bias { table, .. } => self.note([table.weight]),
            _ => Ok(()),
        }
    }

    fn gated(&self, _: &(), how: Activation) -> Result<()> {
        self.verb(format_args!("gated {how:?}"))
    }

    fn activate(&self, _: &(), how: Activation) -> Result<()> {
        self.verb(format_args!("activate {how:?}"))
    }

    fn add(&self, _: &(), _: &()) -> Result<()> {
        self.verb(format_args!("add"))
    }

    fn scale(&self, _: &(), factor: f64) -> Result<()> {
        self.verb(format_args!("scale {factor}"))
    }

    fn dropout(&self, _: &(), _: f32) -> Result<()> {
        Ok(())
    }

    fn pick(&self, _: &(), which: Pick) -> Result<()> {
        self.verb(format_args!("pick {which:?}"))
    }

    fn pool(&self, _: &(), how: Pooling) -> Result<()> {
        self.verb(format_args!("pool {how:?}"))
    }

    fn normalize(&self, _: &()) -> Result<()> {
        self.verb(format_args!("normalize"))
    }

    fn tap(&self, _: &str, _: ()) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ops::{At, Sees};

    #[test]
    fn a_name_used_twice_is_one_parameter() {
        let params = manifest(|o| {
            o.embed(At::body("x").table(3, 2), Ids::Tokens)?;
            o.embed(At::body("x").table(3, 2), Ids::Tokens)
        });
        assert_eq!(params.unwrap().len(), 1);
    }

    #[test]
    fn verbs_tell_what_is_computed() {
        let of = |heads, dropout, how| {
            let attend = Attend { heads, sees: Sees::All, queries: None, dropout };
            verbs(|o| {
                o.attention(&(), &(), &(), attend)?;
                o.dropout(&(), dropout)?;
                o.pool(&(), how)
            })
            .unwrap()
        };
        let one = of(2, 0.1, Pooling::Mean);
        assert_eq!(one, of(2, 0.0, Pooling::Mean));
        assert!(one != of(4, 0.1, Pooling::Mean) && one != of(2, 0.1, Pooling::Max));
    }

    #[test]
    fn a_name_with_two_shapes_is_an_error_that_names_both() {
        let error = manifest(|o| {
            o.embed(At::body("x").table(3, 2), Ids::Tokens)?;
            o.embed(At::body("x").table(4, 2), Ids::Tokens)
        })
        .unwrap_err();
        assert_eq!(error.to_string(), "x.weight is used with shape [3, 2] and with shape [4, 2]");
    }
}
