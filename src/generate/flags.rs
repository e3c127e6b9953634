//! The flags of commands that generate.

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{Generated, GenerationConfig, Limits};
use crate::onnx::Precision;
use crate::runtime::{EpFlags, Order, Provider, Providers};
use crate::say::Say;
use crate::{Result, bail_unusable};

/// How texts are generated; a record's fields of these names go before. Without any of temperature, top-k, top-p and
/// min-p the most likely token is taken.
#[derive(Clone, Debug, Default, PartialEq, clap::Args, Serialize)]
#[group(skip)]
pub struct Flags {
    /// New tokens of a text at most [default: 128].
    #[arg(long, value_name = "N", help_heading = "Generation")]
    max_new_tokens: Option<usize>,
    /// Below 1 likely tokens become likelier; 0 takes the most likely one.
    #[arg(long, value_name = "X", help_heading = "Generation", value_parser = finite)]
    temperature: Option<f32>,
    /// Draw from the most likely tokens that together have this probability.
    #[arg(long, value_name = "P", help_heading = "Generation", value_parser = finite)]
    top_p: Option<f32>,
    /// Draw from tokens of this share of the most likely one's probability.
    #[arg(long, value_name = "P", help_heading = "Generation", value_parser = finite)]
    min_p: Option<f32>,
    /// Above 1 tokens that stand there already become less likely.
    #[arg(long, value_name = "X", help_heading = "Generation", value_parser = finite)]
    repetition_penalty: Option<f32>,
    /// Beams of a beam search.
    #[arg(long, value_name = "N", help_heading = "Generation")]
    num_beams: Option<usize>,
    /// Above 0 a beam search favours long texts, below 0 short ones [default: 1].
    #[arg(long, value_name = "X", help_heading = "Generation", value_parser = finite)]
    length_penalty: Option<f32>,
    /// Texts for a prompt, by sampling or beams.
    #[arg(long, value_name = "N", help_heading = "Generation")]
    num_return_sequences: Option<usize>,
    /// A text ends before this; may be given several times.
    #[arg(long, value_name = "TEXT", help_heading = "Generation")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    stop: Vec<String>,
    /// The same seed draws the same tokens for the same record [default: 42].
    #[arg(long, value_name = "N", help_heading = "Generation")]
    seed: Option<u64>,
    /// Cut the front of a prompt so that max-new-tokens fit behind it; one that leaves no room at all is an error otherwise.
    #[arg(long, help_heading = "Generation")]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    truncate_prompt: bool,
    /// Texts that are generated side by side [default: 48].
    #[arg(long, value_name = "N", help_heading = "Generation", value_parser = clap::value_parser!(u32).range(1..))]
    slots: Option<u32>,
    /// Megabytes that the keys and values of these texts may take [default: 2048].
    #[arg(long, value_name = "MB", help_heading = "Generation", value_parser = clap::value_parser!(u32).range(1..))]
    cache_mb: Option<u32>,
}

/// A number of a flag. JSON, in which flags go on to [`GenerationConfig`], has no others.
fn finite(text: &str) -> std::result::Result<f32, String> {
    match text.parse() {
        Ok(number) if f32::is_finite(number) => Ok(number),
        _ => Err("expected a finite number of 32 bits".to_owned()),
    }
}

/// A text as a record.
pub fn fields(generated: &Generated) -> Map<String, Value> {
    Map::from_iter([
        ("text".to_owned(), json!(generated.text)),
        ("tokens".to_owned(), json!(generated.ids.len())),
        ("finish_reason".to_owned(), json!(generated.finish.name())),
    ])
}

/// What texts may be generated on, with a graph in this precision: the CPU, and CUDA in fp16. Says why it is the CPU where
/// nobody asked for one. Chooses the build of ONNX Runtime: nothing may have loaded it before.
///
/// # Errors
/// Unusable: a provider is asked for that has no kernel for it; as [`EpFlags::providers`].
pub fn providers(flags: &EpFlags, precision: Precision, say: Say) -> Result<Providers> {
    let asked = flags.providers(precision)?;
    let fp16 = precision == Precision::Fp16;
    let Order::Listed(list) = &asked.order else {
        if fp16 {
            return Ok(asked);
        }
        if Provider::Cuda.compiled_in()? {
            say.line(format!(
                "provider: cpu, because GroupQueryAttention has no fp32 kernel for CUDA, which --precision {precision} asks \
                 for; fp16 has one"
            ));
        }
        return Ok(Providers::only(Provider::Cpu));
    };
    for provider in list {
        match provider {
            Provider::Cpu => {}
            Provider::Cuda if fp16 => {}
            Provider::Cuda => bail_unusable!(
                "--ep cuda: ONNX Runtime's GroupQueryAttention has no fp32 kernel for CUDA, which --precision {precision} \
                 asks for: run `tk export DIR --precision fp16` and give --precision fp16, or leave --ep out"
            ),
            Provider::OpenVino | Provider::TensorRt => bail_unusable!(
                "--ep {}: texts are generated on cpu, and with --precision fp16 on cuda; name these alone, or leave --ep \
                 out",
                provider.name()
            ),
        }
    }
    Ok(asked)
}

impl Flags {
    /// What was given, by the names of [`GenerationConfig`]. `top_k` is a flag of other tasks too, and stands apart.
    pub fn given(&self, top_k: Option<usize>) -> Result<Map<String, Value>> {
        let Value::Object(mut given) = serde_json::to_value(self)? else {
            anyhow::bail!("flags are an object")
        };
        given.insert("top_k".to_owned(), json!(top_k));
        given.retain(|_, value| !value.is_null());
        Ok(given)
    }

    /// How texts are generated where a record says nothing.
    ///
    /// # Errors
    /// As [`GenerationConfig::with`].
    pub fn settings(&self, top_k: Option<usize>) -> Result<GenerationConfig> {
        GenerationConfig::default().with(&self.given(top_k)?)
    }

    /// What an engine may use.
    pub fn limits(&self) -> Result<Limits> {
        Limits::of(self.slots, self.cache_mb)
    }

    /// Whether the front of a long prompt is cut.
    pub fn truncates(&self) -> bool {
        self.truncate_prompt
    }
}
