//! A step whose loss or gradients are no numbers: what of it is not, where it was first met, and of which examples.

use candle_core::Tensor;
use serde::Serialize;
use serde_json::{Value, json};

use crate::Result;
use crate::data::tokens::Tokenizer;
use crate::task::{Beside, Example, Task};

/// How many names or examples an error lists.
const LISTED: usize = 5;

/// Characters of an example that an error shows.
const SHOWN: usize = 80;

/// Why a step was not taken; nothing has been changed.
#[derive(Clone, Debug, thiserror::Error)]
#[error("step {step}: the loss is {loss} and the gradients' norm {grad_norm}; first not finite: {first}")]
pub struct NotFinite {
    /// Counted from 1.
    pub step: usize,
    pub loss: f64,
    pub grad_norm: f64,
    pub first: Tensors,
    /// The examples that were learnt from, of each micro-batch, each with its loss alone.
    pub micro_batches: Vec<Vec<Alone>>,
}

/// An example computed alone.
#[derive(Clone, Debug)]
pub struct Alone {
    pub example: Example,
    /// Its own loss, at the weights and with the dropout of the step; not a number where its gradients are none.
    pub loss: f64,
}

/// What was met first that is not finite, in the order of the computation.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "snake_case", tag = "kind", content = "names")]
pub enum Tensors {
    Weights(Vec<String>),
    Activation(String),
    Loss,
    Gradients(Vec<String>),
    /// Each gradient is, their squares' sum is not.
    Norm,
}

impl std::fmt::Display for Tensors {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let listed = |names: &[String]| crate::say::listed(names.iter().map(String::as_str), LISTED);
        match self {
            Self::Weights(names) => write!(f, "the weights {}", listed(names)),
            Self::Activation(name) => write!(f, "the activations {name}"),
            Self::Loss => f.write_str("the loss"),
            Self::Gradients(names) => write!(f, "the gradients of {}", listed(names)),
            Self::Norm => f.write_str("the norm of all gradients"),
        }
    }
}

/// What tokens say.
fn text(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    tokenizer.inner().decode(ids, true).unwrap_or_default()
}

fn shortened(text: &str) -> String {
    let short: String = text.chars().take(SHOWN).collect();
    if short.len() < text.len() { short + " …" } else { short }
}

/// Whether all numbers of a tensor are finite.
pub fn is_finite(tensor: &Tensor) -> Result<bool> {
    let numbers: Vec<f32> = tensor.to_dtype(candle_core::DType::F32)?.flatten_all()?.to_vec1()?;
    Ok(numbers.iter().all(|number| number.is_finite()))
}

impl NotFinite {
    /// The examples that alone are no better.
    fn guilty(&self) -> impl Iterator<Item = &Alone> {
        self.micro_batches.iter().flatten().filter(|alone| !alone.loss.is_finite())
    }

    /// What to do about it, with the first of the examples that alone are no better.
    pub fn advice(&self, tokenizer: &Tokenizer) -> String {
        let guilty: Vec<String> = self
            .guilty()
            .map(|alone| format!("{:?}", shortened(&text(tokenizer, &alone.example.encoding.ids))))
            .collect();
        let all: usize = self.micro_batches.iter().map(Vec::len).sum();
        match guilty.len() {
            0 => "no example alone is at fault; a lower --learning-rate or a longer --warmup-ratio may help"
                .to_owned(),
            n if n == all => {
                "so is every example alone: the weights are at fault; a lower --learning-rate or a longer \
                              --warmup-ratio may help"
                    .to_owned()
            }
            n => format!(
                "{n} of its {all} examples are no better alone: {}",
                crate::say::listed(guilty.iter().map(String::as_str), LISTED)
            ),
        }
    }

    /// Everything, for a file: with the weights of the newest checkpoint and the seed of the settings it can be computed
    /// again.
    pub fn told(&self, task: &Task, tokenizer: &Tokenizer) -> Value {
        let number = |x: f64| if x.is_finite() { json!(x) } else { json!(x.to_string()) };
        let example = |alone: &Alone| {
            let encodings: Vec<Value> = alone
                .example
                .encodings()
                .map(|encoding| {
                    json!({"ids": encoding.ids, "type_ids": encoding.type_ids, "text": text(tokenizer, &encoding.ids)})
                })
                .collect();
            let label = match task.beside(&alone.example.target, tokenizer) {
                Beside::Example(label) => json!(label),
                Beside::Tokens(labels) => json!(labels),
            };
            json!({"loss_alone": number(alone.loss), "sequences": encodings, "label": label})
        };
        let batches: Vec<Vec<Value>> =
            self.micro_batches.iter().map(|batch| batch.iter().map(example).collect()).collect();
        json!({
            "step": self.step,
            "loss": number(self.loss),
            "grad_norm": number(self.grad_norm),
            "first": self.first,
            "micro_batches": batches,
        })
    }
}
