//! `config.json` in Hugging Face's layout → a checked configuration. Unknown keys are kept, so that
//! what is saved says all that was loaded. What the fields mean is the family's to say.

use std::path::Path;

use anyhow::Context;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::model::family::{Family, Head};
use crate::model::ops::Activation;
use crate::{Result, bail_unusable, unusable};

/// A model's configuration: the architecture, checked, beside the whole of `config.json`.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    pub family: Family,
    /// `config.json` as it was read; a task writes its labels into it.
    pub raw: Map<String, Value>,
}

impl ModelConfig {
    /// Reads `config.json` of a model directory.
    ///
    /// # Errors
    /// Names the file, the field, what was found and what tk can run.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|e| {
            unusable!(
                "{}: {e}; a model is a directory in Hugging Face's layout with a config.json",
                path.display()
            )
        })?;
        Self::parse(&text).with_context(|| path.display().to_string())
    }

    /// Reads the text of a `config.json`.
    pub fn parse(text: &str) -> Result<Self> {
        let raw: Map<String, Value> =
            serde_json::from_str(text).map_err(|e| unusable!("not a JSON object: {e}"))?;
        Ok(Self { family: Family::read(&raw)?, raw })
    }

    /// Changes what is saved, and the architecture with it.
    ///
    /// # Errors
    /// The family refuses a value.
    pub fn set(&mut self, values: impl IntoIterator<Item = (&'static str, Value)>) -> Result<()> {
        self.raw.extend(values.into_iter().map(|(key, value)| (key.to_owned(), value)));
        self.family = Family::read(&self.raw)?;
        Ok(())
    }

    /// Sets every dropout probability of the model.
    ///
    /// # Errors
    /// It is no probability.
    pub fn set_dropout(&mut self, p: f32) -> Result<()> {
        self.set(self.family.dropouts().iter().map(|&key| (key, p.into())))
    }

    /// Takes a vocabulary of another size, with the ids of its special tokens. Other tokens of the old vocabulary are none
    /// of this one.
    ///
    /// # Errors
    /// The family refuses the size.
    pub fn set_vocabulary(&mut self, size: usize, special: &[(&'static str, u32)]) -> Result<()> {
        self.raw.retain(|key, _| !key.ends_with("_token_id"));
        let special = special.iter().map(|&(key, id)| (key, id.into()));
        self.set([("vocab_size", size.into())].into_iter().chain(special))
    }

    /// The class in `transformers` that the directory was saved from, the first of `architectures`.
    pub fn architecture(&self) -> Option<&str> {
        self.raw.get("architectures")?.get(0)?.as_str()
    }

    /// Whether the directory was saved with this head.
    pub fn has(&self, head: Head) -> bool {
        self.family.class(head).is_some_and(|class| self.architecture() == Some(&class))
    }

    /// The tokens of the longest sequence.
    pub fn max_positions(&self) -> usize {
        self.family.limits().positions
    }

    /// The number of rows of the token table: every token id must be smaller.
    pub fn vocab_size(&self) -> usize {
        self.family.limits().vocabulary
    }

    /// How many kinds of token types there are: a pair of texts needs two. None where the model reads no types.
    pub fn token_types(&self) -> Option<usize> {
        self.family.limits().token_types
    }

    /// The standard deviation that new weights are drawn with.
    pub fn initializer_range(&self) -> f64 {
        self.family.initializer_range()
    }
}

/// Reads a family's fields and says all that is wrong with them at once.
///
/// # Errors
/// Unusable: a field of another kind, or what `check` finds.
pub(super) fn checked<C: DeserializeOwned>(
    raw: &Map<String, Value>,
    check: impl Fn(&C, &mut Findings),
) -> Result<C> {
    let config = serde_path_to_error::deserialize(Value::Object(raw.clone())).map_err(|e| {
        let field = e.path().to_string();
        if field == "." { unusable!("{}", e.inner()) } else { unusable!("{field}: {}", e.inner()) }
    })?;
    let mut findings = Findings { raw, wrong: Vec::new() };
    check(&config, &mut findings);
    if !findings.wrong.is_empty() {
        bail_unusable!("{}", findings.wrong.join("; "));
    }
    Ok(config)
}

/// The most layers of a model: far above what there is, and few enough to list.
const MOST_LAYERS: usize = 4096;

/// The most channels of a model, inside a layer too: two of them multiplied are far from overflowing.
const MOST_CHANNELS: usize = 1 << 20;

/// The most rows of a table.
const MOST_ROWS: usize = 1 << 28;

/// What is found to be wrong with a configuration.
pub(super) struct Findings<'a> {
    raw: &'a Map<String, Value>,
    wrong: Vec<String>,
}

impl Findings<'_> {
    fn size(&mut self, field: &str, size: usize, most: usize) {
        if size == 0 {
            self.wrong.push(format!("{field} is 0"));
        } else if size > most {
            self.wrong.push(format!("{field} is {size}, above the {most} that tk takes"));
        }
    }

    /// The number of layers, which may be none.
    pub fn layers(&mut self, field: &str, layers: usize) {
        if layers > 0 {
            self.size(field, layers, MOST_LAYERS);
        }
    }

    /// The model's width and the number of heads that it is cut into.
    pub fn heads(&mut self, (field, width): (&str, usize), (heads_field, heads): (&str, usize)) {
        self.channels(field, width);
        self.channels(heads_field, heads);
        if heads != 0 && !width.is_multiple_of(heads) {
            self.wrong.push(format!("{field} {width} is not a multiple of {heads_field} {heads}"));
        }
    }

    /// A number of channels.
    pub fn channels(&mut self, field: &str, channels: usize) {
        self.size(field, channels, MOST_CHANNELS);
    }

    /// The rows of a table.
    pub fn rows(&mut self, field: &str, rows: usize) {
        self.size(field, rows, MOST_ROWS);
    }

    /// The probability of a dropout.
    pub fn probability(&mut self, field: &str, p: f32) {
        if !(0.0..1.0).contains(&p) {
            self.wrong.push(format!("{field} is {p}, expected a probability in [0, 1)"));
        }
    }

    /// What a layer norm adds to the variance, and the standard deviation of new weights.
    pub fn small(&mut self, field: &str, value: f64) {
        if !(0.0..=1.0).contains(&value) {
            self.wrong.push(format!("{field} is {value}, expected a number from 0 to 1"));
        }
    }

    /// A flag that tk runs with one value alone.
    pub fn never(&mut self, field: &str, is: bool, why: &str) {
        if self.raw.get(field).and_then(Value::as_bool) == Some(is) {
            self.wrong.push(format!("{field} is {is}; {why}"));
        }
    }

    /// A name that tk runs with one value alone, which is the default.
    pub fn only(&mut self, field: &str, runs: &str) {
        if let Some(found) = self.raw.get(field).filter(|value| !value.is_null())
            && found.as_str() != Some(runs)
        {
            self.wrong.push(format!("{field} is {found}; tk runs \"{runs}\""));
        }
    }

    /// Anything else.
    pub fn say(&mut self, wrong: String) {
        self.wrong.push(wrong);
    }
}

/// The activations that tk knows, under transformers' names.
const ACTIVATIONS: [(&str, Activation); 8] = [
    ("gelu", Activation::Gelu),
    ("gelu_python", Activation::Gelu),
    ("gelu_new", Activation::GeluTanh),
    ("gelu_pytorch_tanh", Activation::GeluTanh),
    ("relu", Activation::Relu),
    ("silu", Activation::Silu),
    ("swish", Activation::Silu),
    ("tanh", Activation::Tanh),
];

/// Reads the name of an activation.
pub(super) fn activation<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Activation, D::Error> {
    let name = String::deserialize(deserializer)?;
    ACTIVATIONS.iter().find(|(known, _)| *known == name).map(|&(_, is)| is).ok_or_else(|| {
        let known: Vec<&str> = ACTIVATIONS.iter().map(|&(known, _)| known).collect();
        serde::de::Error::custom(format!(
            "\"{name}\" is no activation that tk knows; it knows {}",
            known.join(", ")
        ))
    })
}

/// Defaults of `transformers`' configurations, for serde.
pub(super) mod default {
    use crate::model::ops::Activation;

    pub fn two() -> usize {
        2
    }
    pub fn thirty_two() -> usize {
        32
    }
    pub fn tenth() -> f32 {
        0.1
    }
    pub fn fifth() -> f32 {
        0.2
    }
    /// A standard deviation of new weights.
    pub fn fiftieth() -> f64 {
        0.02
    }
    pub fn eps_1e_12() -> f64 {
        1e-12
    }
    pub fn eps_1e_5() -> f64 {
        1e-5
    }
    pub fn gelu() -> Activation {
        Activation::Gelu
    }
    pub fn gelu_new() -> Activation {
        Activation::GeluTanh
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(more: Value) -> Result<ModelConfig> {
        let mut raw = json!({
            "model_type": "bert", "vocab_size": 9, "hidden_size": 4, "num_hidden_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 16,
        });
        raw.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        ModelConfig::parse(&raw.to_string())
    }

    #[test]
    fn every_finding_is_named_at_once() {
        let found = parse(json!({
            "vocab_size": 0, "num_hidden_layers": 1_000_000_000_000_000_000_u64, "num_attention_heads": 3,
            "intermediate_size": 1_u64 << 40, "layer_norm_eps": -1.0, "hidden_dropout_prob": 1.5,
            "position_embedding_type": "relative_key", "is_decoder": true, "initializer_range": 1e300,
        }));
        let found = found.unwrap_err().to_string();
        for part in [
            "vocab_size is 0",
            "num_hidden_layers is 1000000000000000000, above the 4096",
            "hidden_size 4 is not a multiple of num_attention_heads 3",
            "intermediate_size is 1099511627776, above",
            "layer_norm_eps is -1, expected a number from 0 to 1",
            "hidden_dropout_prob is 1.5",
            "position_embedding_type is \"relative_key\"",
            "is_decoder is true",
            "initializer_range is ",
        ] {
            assert!(found.contains(part), "{part}: {found}");
        }
    }

    #[test]
    fn a_model_type_that_tk_does_not_run_is_refused_by_name() {
        for (value, said) in [
            (json!("t5"), "model_type is \"t5\"; tk runs bert, distilbert"),
            (json!(null), "model_type is null"),
            (json!(["bert"]), "model_type is [\"bert\"]"),
        ] {
            let error = parse(json!({"model_type": value})).unwrap_err();
            assert!(error.to_string().starts_with(said), "{error}");
            assert_eq!(crate::error::exit_code(&error), 2);
        }
    }

    #[test]
    fn what_is_set_is_saved_and_computed_with() {
        let mut config = parse(json!({})).unwrap();
        config.set_dropout(0.25).unwrap();
        config.set_vocabulary(50, &[("eos_token_id", 7)]).unwrap();
        assert_eq!((config.vocab_size(), &config.raw["eos_token_id"]), (50, &json!(7)));
        assert!(format!("{:?}", config.family).contains("hidden_dropout_prob: 0.25"));
        assert_eq!(config.raw["classifier_dropout"], json!(0.25));
        assert!(config.set_dropout(1.0).is_err());
    }
}
