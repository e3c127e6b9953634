//! `--precision` of a server: which of its exported graphs each model runs.

use std::str::FromStr;

use clap::ValueEnum;

use crate::onnx::Precision;
use crate::{Result, bail_unusable, unusable};

/// A precision that is asked for: of one model, or of all that nothing is asked of by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AskedPrecision {
    model: Option<String>,
    precision: Precision,
}

impl FromStr for AskedPrecision {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (model, name) = match text.split_once('=') {
            Some((model, name)) => (Some(model.to_owned()), name),
            None => (None, text),
        };
        let precision = Precision::from_str(name, false).map_err(|_| {
            let known: Vec<&str> = Precision::value_variants().iter().map(|known| known.name()).collect();
            unusable!("{name:?} is no precision, expected {}, or NAME= and one of them", known.join(", "))
        })?;
        Ok(Self { model, precision })
    }
}

/// The precision of each model, in their order: what is asked of it by name, or of all, or fp32. Of two for the same the
/// later one holds, so that the command line wins over a `--config` file.
///
/// # Errors
/// Unusable: a model is named that there is not.
pub fn of_models(asked: &[AskedPrecision], names: &[&str]) -> Result<Vec<Precision>> {
    let unknown = |asked: &&AskedPrecision| asked.model.as_deref().is_some_and(|name| !names.contains(&name));
    if let Some(AskedPrecision { model: Some(name), precision }) = asked.iter().find(unknown) {
        bail_unusable!(
            "--precision {name}={precision}: there is no model {name}; there is {}",
            names.join(", ")
        );
    }
    let last = |model: Option<&str>| asked.iter().rfind(|asked| asked.model.as_deref() == model);
    let of = |name: &&str| last(Some(name)).or_else(|| last(None)).map(|asked| asked.precision);
    Ok(names.iter().map(|name| of(name).unwrap_or_default()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_has_what_is_asked_of_it_by_name_or_else_of_all_or_else_fp32() {
        use Precision::{Fp32, Int8, Q4};
        let of = |asked: &[&str]| {
            let asked: Vec<AskedPrecision> = asked.iter().map(|text| text.parse().unwrap()).collect();
            of_models(&asked, &["a", "b"])
        };
        assert_eq!(of(&[]).unwrap(), [Fp32, Fp32]);
        assert_eq!(of(&["int8"]).unwrap(), [Int8, Int8]);
        assert_eq!(of(&["b=int8"]).unwrap(), [Fp32, Int8]);
        assert_eq!(of(&["b=q4", "int8"]).unwrap(), [Int8, Q4]);
        assert_eq!(of(&["b=q4", "int8", "b=fp32"]).unwrap(), [Int8, Fp32]);
        let error = of(&["c=q4"]).unwrap_err().to_string();
        assert!(error.contains("there is no model c; there is a, b"), "{error}");
        for wrong in ["", "int9", "INT8", "a=", "a=b=int8", "=", "a:int8"] {
            assert!(wrong.parse::<AskedPrecision>().is_err(), "{wrong}");
        }
    }
}
