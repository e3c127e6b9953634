//! `config.json` in Hugging Face's layout → a checked configuration. Unknown keys are kept, so that
//! what is saved says all that was loaded.

use std::path::Path;

use anyhow::Context;
use serde::Deserialize;
use serde::de::DeserializeOwned;
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
    Gpt2(Gpt2Config),
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

/// What [`crate::model::gpt2`] needs. Field names and defaults are `transformers.GPT2Config`'s.
#[derive(Clone, Debug, Deserialize)]
pub struct Gpt2Config {
    pub vocab_size: usize,
    pub n_positions: usize,
    pub n_embd: usize,
    pub n_layer: usize,
    pub n_head: usize,
    /// The width inside a feed-forward layer; four times `n_embd` where it is absent.
    #[serde(default)]
    pub n_inner: Option<usize>,
    #[serde(default = "gelu_new", deserialize_with = "activation_function")]
    pub activation_function: Activation,
    #[serde(default = "tenth")]
    pub resid_pdrop: f32,
    #[serde(default = "tenth")]
    pub embd_pdrop: f32,
    #[serde(default = "tenth")]
    pub attn_pdrop: f32,
    #[serde(default = "gpt2_eps")]
    pub layer_norm_epsilon: f64,
    #[serde(default = "fiftieth")]
    pub initializer_range: f64,
}

fn gelu_new() -> Activation {
    Activation::GeluTanh
}
fn gpt2_eps() -> f64 {
    1e-5
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
    activation_of("hidden_act", deserializer)
}

fn activation_function<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Activation, D::Error> {
    activation_of("activation_function", deserializer)
}

fn activation_of<'de, D: serde::Deserializer<'de>>(
    field: &str,
    deserializer: D,
) -> Result<Activation, D::Error> {
    let name = String::deserialize(deserializer)?;
    ACTIVATIONS.iter().find(|(known, _)| *known == name).map(|&(_, is)| is).ok_or_else(|| {
        let known: Vec<&str> = ACTIVATIONS.iter().map(|&(known, _)| known).collect();
        serde::de::Error::custom(format!(
            "{field} is \"{name}\", which tk does not know; it knows {}",
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
            Some("bert") => Family::Bert(checked(&raw, BertConfig::wrong)?),
            Some("gpt2") => Family::Gpt2(checked(&raw, Gpt2Config::wrong)?),
            Some(other) => bail_unusable!("model_type is \"{other}\"; tk runs bert and gpt2"),
            None => bail_unusable!("model_type is missing; tk runs bert and gpt2"),
        };
        Ok(Self { family, raw })
    }

    /// Sets every dropout probability of the model, in the architecture and in what is saved.
    pub fn set_dropout(&mut self, p: f32) {
        let keys = match &mut self.family {
            Family::Bert(c) => {
                (c.hidden_dropout_prob, c.attention_probs_dropout_prob, c.classifier_dropout) =
                    (p, p, Some(p));
                ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"]
            }
            Family::Gpt2(c) => {
                (c.resid_pdrop, c.embd_pdrop, c.attn_pdrop) = (p, p, p);
                ["resid_pdrop", "embd_pdrop", "attn_pdrop"]
            }
        };
        for key in keys {
            self.raw.insert(key.to_owned(), p.into());
        }
    }

    /// Takes a vocabulary of another size, whose texts begin and end with the token `end`, which pads too. Other tokens
    /// of the old vocabulary are none of this one.
    pub fn set_vocabulary(&mut self, size: usize, end: u32) {
        match &mut self.family {
            Family::Bert(c) => c.vocab_size = size,
            Family::Gpt2(c) => c.vocab_size = size,
        }
        self.raw.insert("vocab_size".to_owned(), size.into());
        self.raw.retain(|key, _| !key.ends_with("_token_id"));
        for key in ["bos_token_id", "eos_token_id", "pad_token_id"] {
            self.raw.insert(key.to_owned(), end.into());
        }
    }

    /// The number of rows of the position table: no sequence may be longer.
    pub fn max_positions(&self) -> usize {
        match &self.family {
            Family::Bert(c) => c.max_position_embeddings,
            Family::Gpt2(c) => c.n_positions,
        }
    }

    /// The number of rows of the token table: every token id must be smaller.
    pub fn vocab_size(&self) -> usize {
        match &self.family {
            Family::Bert(c) => c.vocab_size,
            Family::Gpt2(c) => c.vocab_size,
        }
    }

    /// How many kinds of token types there are: a pair of texts needs two. None where the model reads no types.
    pub fn token_types(&self) -> Option<usize> {
        match &self.family {
            Family::Bert(c) => Some(c.type_vocab_size),
            Family::Gpt2(_) => None,
        }
    }

    /// The standard deviation that new weights are drawn with.
    pub fn initializer_range(&self) -> f64 {
        match &self.family {
            Family::Bert(c) => c.initializer_range,
            Family::Gpt2(c) => c.initializer_range,
        }
    }
}

/// Reads a family's fields and says all that is wrong with them at once.
fn checked<C: DeserializeOwned>(
    raw: &Map<String, Value>,
    wrong: impl Fn(&C, &Map<String, Value>) -> Vec<String>,
) -> Result<C> {
    let config = serde_json::from_value(Value::Object(raw.clone())).map_err(|e| unusable!("{e}"))?;
    let wrong = wrong(&config, raw);
    if !wrong.is_empty() {
        bail_unusable!("{}", wrong.join("; "));
    }
    Ok(config)
}

impl BertConfig {
    /// What tk can't run of it.
    fn wrong(&self, raw: &Map<String, Value>) -> Vec<String> {
        let mut wrong = Vec::new();
        check_sizes(
            &mut wrong,
            &[
                ("hidden_size", self.hidden_size),
                ("num_attention_heads", self.num_attention_heads),
                ("vocab_size", self.vocab_size),
                ("intermediate_size", self.intermediate_size),
                ("max_position_embeddings", self.max_position_embeddings),
                ("type_vocab_size", self.type_vocab_size),
            ],
        );
        check_probabilities(
            &mut wrong,
            &[
                ("hidden_dropout_prob", self.hidden_dropout_prob),
                ("attention_probs_dropout_prob", self.attention_probs_dropout_prob),
                ("classifier_dropout", self.classifier_dropout.unwrap_or(0.0)),
            ],
        );
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
        wrong
    }
}

impl Gpt2Config {
    /// The width inside a feed-forward layer.
    pub fn inner(&self) -> usize {
        self.n_inner.unwrap_or(4 * self.n_embd)
    }

    /// What tk can't run of it.
    fn wrong(&self, raw: &Map<String, Value>) -> Vec<String> {
        let mut wrong = Vec::new();
        check_sizes(
            &mut wrong,
            &[
                ("n_embd", self.n_embd),
                ("n_head", self.n_head),
                ("vocab_size", self.vocab_size),
                ("n_inner", self.inner()),
                ("n_positions", self.n_positions),
            ],
        );
        check_probabilities(
            &mut wrong,
            &[
                ("resid_pdrop", self.resid_pdrop),
                ("embd_pdrop", self.embd_pdrop),
                ("attn_pdrop", self.attn_pdrop),
            ],
        );
        for (field, is, why) in [
            ("scale_attn_weights", false, "tk scales attention scores by the root of a head's width"),
            ("scale_attn_by_inverse_layer_idx", true, "tk scales the attention of every layer alike"),
            ("add_cross_attention", true, "tk runs GPT-2 as a decoder alone"),
        ] {
            if raw.get(field).and_then(Value::as_bool) == Some(is) {
                wrong.push(format!("{field} is {is}; {why}"));
            }
        }
        wrong
    }
}

/// Notes sizes that are zero. The first two are the model's width and its number of heads.
fn check_sizes(wrong: &mut Vec<String>, sizes: &[(&str, usize)]) {
    wrong.extend(sizes.iter().filter(|(_, size)| *size == 0).map(|(field, _)| format!("{field} is 0")));
    if let [(width_field, width), (heads_field, heads), ..] = sizes
        && *heads != 0
        && !width.is_multiple_of(*heads)
    {
        wrong.push(format!("{width_field} {width} is not a multiple of {heads_field} {heads}"));
    }
}

/// Notes what is no probability of a dropout.
fn check_probabilities(wrong: &mut Vec<String>, probabilities: &[(&str, f32)]) {
    for (field, p) in probabilities {
        if !(0.0..1.0).contains(p) {
            wrong.push(format!("{field} is {p}, expected a probability in [0, 1)"));
        }
    }
}
