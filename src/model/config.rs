//! `config.json` in Hugging Face's layout → a checked configuration. Unknown keys are kept, so that
//! what is saved says all that was loaded.

use std::path::Path;

use anyhow::Context;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::model::ops::Activation;
use crate::{Result, bail_unusable, unusable};

/// A model's configuration: the architecture, checked, beside the whole of `config.json`.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    pub family: Family,
    /// `config.json` as it was read; a task writes its labels into it.
    pub raw: Map<String, Value>,
}

/// The architectures that tk defines, each with its dimensions.
#[derive(Clone, Debug)]
pub enum Family {
    Bert(BertConfig),
}

/// What [`crate::model::bert`] needs. Field names and defaults are `transformers.BertConfig`'s.
#[derive(Clone, Debug, Deserialize)]
pub struct BertConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub intermediate_size: usize,
    pub max_position_embeddings: usize,
    #[serde(default = "two")]
    pub type_vocab_size: usize,
    #[serde(default = "gelu", deserialize_with = "activation")]
    pub hidden_act: Activation,
    #[serde(default = "tenth")]
    pub hidden_dropout_prob: f32,
    #[serde(default = "tenth")]
    pub attention_probs_dropout_prob: f32,
    /// Dropout in front of a classifier; `hidden_dropout_prob` where it is absent.
    #[serde(default)]
    pub classifier_dropout: Option<f32>,
    #[serde(default = "bert_eps")]
    pub layer_norm_eps: f64,
    #[serde(default = "fiftieth")]
    pub initializer_range: f64,
}

fn two() -> usize {
    2
}
fn tenth() -> f32 {
    0.1
}
fn fiftieth() -> f64 {
    0.02
}
fn bert_eps() -> f64 {
    1e-12
}
fn gelu() -> Activation {
    Activation::Gelu
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

fn activation<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Activation, D::Error> {
    let name = String::deserialize(deserializer)?;
    ACTIVATIONS.iter().find(|(known, _)| *known == name).map(|&(_, is)| is).ok_or_else(|| {
        let known: Vec<&str> = ACTIVATIONS.iter().map(|&(known, _)| known).collect();
        serde::de::Error::custom(format!(
            "hidden_act is \"{name}\", which tk does not know; it knows {}",
            known.join(", ")
        ))
    })
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
        let family = match raw.get("model_type").and_then(Value::as_str) {
            Some("bert") => Family::Bert(BertConfig::checked(&raw)?),
            Some(other) => bail_unusable!("model_type is \"{other}\"; tk runs bert"),
            None => bail_unusable!("model_type is missing; tk runs bert"),
        };
        Ok(Self { family, raw })
    }

    /// Sets every dropout probability of the model, in the architecture and in what is saved.
    pub fn set_dropout(&mut self, p: f32) {
        let Family::Bert(c) = &mut self.family;
        (c.hidden_dropout_prob, c.attention_probs_dropout_prob, c.classifier_dropout) = (p, p, Some(p));
        for key in ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"] {
            self.raw.insert(key.to_owned(), p.into());
        }
    }

    /// The number of rows of the position table: no sequence may be longer.
    pub fn max_positions(&self) -> usize {
        let Family::Bert(c) = &self.family;
        c.max_position_embeddings
    }

    /// The number of rows of the token table: every token id must be smaller.
    pub fn vocab_size(&self) -> usize {
        let Family::Bert(c) = &self.family;
        c.vocab_size
    }

    /// How many kinds of token types there are: a pair of texts needs two.
    pub fn token_types(&self) -> usize {
        let Family::Bert(c) = &self.family;
        c.type_vocab_size
    }

    /// The standard deviation that new weights are drawn with.
    pub fn initializer_range(&self) -> f64 {
        let Family::Bert(c) = &self.family;
        c.initializer_range
    }
}

impl BertConfig {
    fn checked(raw: &Map<String, Value>) -> Result<Self> {
        let config: Self =
            serde_json::from_value(Value::Object(raw.clone())).map_err(|e| unusable!("{e}"))?;
        let mut wrong = Vec::new();
        for (field, value) in [
            ("vocab_size", config.vocab_size),
            ("hidden_size", config.hidden_size),
            ("num_attention_heads", config.num_attention_heads),
            ("intermediate_size", config.intermediate_size),
            ("max_position_embeddings", config.max_position_embeddings),
            ("type_vocab_size", config.type_vocab_size),
        ] {
            if value == 0 {
                wrong.push(format!("{field} is 0"));
            }
        }
        if config.num_attention_heads != 0 && !config.hidden_size.is_multiple_of(config.num_attention_heads) {
            wrong.push(format!(
                "hidden_size {} is not a multiple of num_attention_heads {}",
                config.hidden_size, config.num_attention_heads
            ));
        }
        for (field, p) in [
            ("hidden_dropout_prob", config.hidden_dropout_prob),
            ("attention_probs_dropout_prob", config.attention_probs_dropout_prob),
            ("classifier_dropout", config.classifier_dropout.unwrap_or(0.0)),
        ] {
            if !(0.0..1.0).contains(&p) {
                wrong.push(format!("{field} is {p}, expected a probability in [0, 1)"));
            }
        }
        if let Some(kind) = raw.get("position_embedding_type").and_then(Value::as_str)
            && kind != "absolute"
        {
            wrong.push(format!("position_embedding_type is \"{kind}\"; tk runs \"absolute\""));
        }
        for field in ["is_decoder", "add_cross_attention"] {
            if raw.get(field).and_then(Value::as_bool) == Some(true) {
                wrong.push(format!("{field} is true; tk runs BERT as an encoder"));
            }
        }
        if !wrong.is_empty() {
            bail_unusable!("{}", wrong.join("; "));
        }
        Ok(config)
    }
}
