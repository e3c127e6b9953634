//! The interpreter that computes nothing: a definition → the list of its parameters.

use std::cell::RefCell;
use std::collections::HashMap;

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

/// Collects what the verbs name.
#[derive(Default)]
pub struct Manifest {
    params: RefCell<Vec<Param>>,
    /// Where each name stands in the list.
    places: RefCell<HashMap<String, usize>>,
}

impl Manifest {
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

    fn embed(&self, table: Table, _: Ids) -> Result<()> {
        self.note([table.weight])
    }

    fn whole(&self, table: Table) -> Result<()> {
        self.note([table.weight])
    }

    fn linear(&self, map: Linear, _: &()) -> Result<()> {
        self.note([map.weight].into_iter().chain(map.bias))
    }

    fn split(&self, _: &(), parts: usize) -> Result<Vec<()>> {
        Ok(vec![(); parts])
    }

    fn layer_norm(&self, norm: Norm, _: &()) -> Result<()> {
        self.note([norm.weight].into_iter().chain(norm.bias))
    }

    fn attention_by_distance(
        &self,
        _: &(),
        _: &(),
        _: &(),
        _: Attend,
        distances: Distances<()>,
    ) -> Result<()> {
        match distances {
            Distances::Bias { table, .. } => self.note([table.weight]),
            _ => Ok(()),
        }
    }

    fn gated(&self, _: &(), _: Activation) -> Result<()> {
        Ok(())
    }

    fn activate(&self, _: &(), _: Activation) -> Result<()> {
        Ok(())
    }

    fn add(&self, _: &(), _: &()) -> Result<()> {
        Ok(())
    }

    fn dropout(&self, _: &(), _: f32) -> Result<()> {
        Ok(())
    }

    fn pick(&self, _: &(), _: Pick) -> Result<()> {
        Ok(())
    }

    fn pool(&self, _: &(), _: Pooling) -> Result<()> {
        Ok(())
    }

    fn normalize(&self, _: &()) -> Result<()> {
        Ok(())
    }

    fn tap(&self, _: &str, _: ()) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ops::At;

    #[test]
    fn a_name_used_twice_is_one_parameter() {
        let params = manifest(|o| {
            o.embed(At::body("x").table(3, 2), Ids::Tokens)?;
            o.embed(At::body("x").table(3, 2), Ids::Tokens)
        });
        assert_eq!(params.unwrap().len(), 1);
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
