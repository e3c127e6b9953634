//! GPT-2 (Radford et al. 2019), pre-norm causal decoder, over the vocabulary.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::Result;
use crate::data::tokens::Vocabulary;
use crate::model::config::{activation, checked, default};
use crate::model::family::{Architecture, Head, Limits, Names};
use crate::model::ops::{Activation, At, Attend, Ids, Ops, Pick, Sees, Table};

/// The configuration. Field names and defaults are `transformers.GPT2Config`'s.
#[derive(Clone, Debug, Deserialize)]
pub struct Gpt2 {
    pub vocab_size: usize,
    pub n_positions: usize,
    pub n_embd: usize,
    pub n_layer: usize,
    pub n_head: usize,
    /// The width inside a feed-forward layer; four times `n_embd` where it is absent.
    #[serde(default)]
    pub n_inner: Option<usize>,
    #[serde(default = "default::gelu_new", deserialize_with = "activation")]
    pub activation_function: Activation,
    #[serde(default = "default::tenth")]
    pub resid_pdrop: f32,
    #[serde(default = "default::tenth")]
    pub embd_pdrop: f32,
    #[serde(default = "default::tenth")]
    pub attn_pdrop: f32,
    /// Dropout in front of the scores of tokens; where it is absent `hidden_dropout`, or a tenth.
    #[serde(default)]
    pub classifier_dropout: Option<f32>,
    #[serde(default)]
    pub hidden_dropout: Option<f32>,
    #[serde(default = "default::eps_1e_5")]
    pub layer_norm_epsilon: f64,
    #[serde(default = "default::fiftieth")]
    pub initializer_range: f64,
}

impl Architecture for Gpt2 {
    const MODEL_TYPES: &'static [&'static str] = &["gpt2"];
    const LORA_TARGETS: &'static [&'static str] = &["c_attn"];
    const DROPOUTS: &'static [&'static str] =
        &["resid_pdrop", "embd_pdrop", "attn_pdrop", "classifier_dropout"];
    const VOCABULARY: Vocabulary = Vocabulary::Gpt2;

    fn read(raw: &Map<String, Value>) -> Result<Self> {
        checked(raw, |c: &Self, found| {
            found.rows("vocab_size", c.vocab_size);
            found.heads(("n_embd", c.n_embd), ("n_head", c.n_head));
            found.layers("n_layer", c.n_layer);
            found.channels("n_inner", c.inner());
            found.rows("n_positions", c.n_positions);
            found.probability("resid_pdrop", c.resid_pdrop);
            found.probability("embd_pdrop", c.embd_pdrop);
            found.probability("attn_pdrop", c.attn_pdrop);
            found.probability("classifier_dropout", c.before_classifier());
            found.small("layer_norm_epsilon", c.layer_norm_epsilon);
            found.small("initializer_range", c.initializer_range);
            found.never(
                "scale_attn_weights",
                false,
                "tk scales attention scores by the root of a head's width",
            );
            found.never(
                "scale_attn_by_inverse_layer_idx",
                true,
                "tk scales the attention of every layer alike",
            );
            found.never("add_cross_attention", true, "tk runs GPT-2 as a decoder alone");
        })
    }

    fn names(&self) -> Names {
        Names {
            prefix: "transformer.",
            parts: &["wte.", "wpe.", "h.", "ln_f."],
            buffers: &[".attn.bias", ".attn.masked_bias"], // causal masks
        }
    }

    fn limits(&self) -> Limits {
        Limits {
            channels: self.n_embd,
            vocabulary: self.vocab_size,
            positions: self.n_positions,
            token_types: None,
            pairs: false,
        }
    }

    fn initializer_range(&self) -> f64 {
        self.initializer_range
    }

    fn class(_: &str, head: Head) -> Option<String> {
        match head {
            Head::MaskedLm | Head::NextSentence | Head::PreTraining => None,
            _ => Some(format!("GPT2{}", head.suffix())),
        }
    }

    fn define<O: Ops>(&self, o: &O, head: Head) -> Result<Vec<O::X>> {
        let at = At::body("transformer");
        let scores = match head {
            Head::SequenceClassification { labels } => {
                let x = body(o, &at, self, Some(Pick::Last))?;
                o.linear(At::labels("score").linear(self.n_embd, labels).without_bias(), &x)?
            }
            Head::CausalLm { wanted } => {
                // the head is the table of words
                let x = body(o, &at, self, wanted)?;
                o.linear(words(&at, self).tied(), &x)?
            }
            Head::QuestionAnswering => {
                o.linear(At::labels("qa_outputs").linear(self.n_embd, 2), &body(o, &at, self, None)?)?
            }
            Head::Embedding { wanted } => body(o, &at, self, wanted)?,
            Head::TokenClassification { labels } => {
                let x = o.dropout(&body(o, &at, self, None)?, self.before_classifier())?;
                o.linear(At::labels("classifier").linear(self.n_embd, labels), &x)?
            }
            Head::MaskedLm | Head::NextSentence | Head::PreTraining => {
                return Err(head.refused("gpt2"));
            }
        };
        Ok(vec![scores])
    }

    fn pads_with_the_end(&self) -> bool {
        true
    }
}

impl Gpt2 {
    /// The probability of dropout in front of the scores of tokens.
    fn before_classifier(&self) -> f32 {
        self.classifier_dropout.or(self.hidden_dropout).unwrap_or_else(default::tenth)
    }

    /// The width inside a feed-forward layer.
    fn inner(&self) -> usize {
        self.n_inner.unwrap_or(self.n_embd.saturating_mul(4))
    }
}

/// Token ids → hidden states behind the last layer norm, one (C) a token, or of one token of every sequence alone:
/// then the last layer computes nothing for the others but their keys and values.
fn body<O: Ops>(o: &O, at: &At, c: &Gpt2, wanted: Option<Pick>) -> Result<O::X> {
    let words = o.embed(words(at, c), Ids::Tokens)?;
    let places = o.embed(at.to("wpe").table(c.n_positions, c.n_embd), Ids::Positions)?;
    let x = o.dropout(&o.add(&words, &places)?, c.embd_pdrop)?;
    let mut x = o.tap(at.to("drop").path(), x)?;
    for i in 0..c.n_layer {
        let is_last = i + 1 == c.n_layer;
        x = block(o, &at.to("h").item(i), c, &x, wanted.filter(|_| is_last))?;
    }
    if let (Some(which), 0) = (wanted, c.n_layer) {
        x = o.pick(&x, which)?;
    }
    let at = at.to("ln_f");
    let x = o.layer_norm(at.norm(c.n_embd, c.layer_norm_epsilon), &x)?;
    o.tap(at.path(), x)
}

/// The table of tokens, whose weight the language model's head shares.
fn words(at: &At, c: &Gpt2) -> Table {
    at.to("wte").table(c.vocab_size, c.n_embd)
}

fn block<O: Ops>(o: &O, at: &At, c: &Gpt2, x: &O::X, wanted: Option<Pick>) -> Result<O::X> {
    let (width, inner, summands) = (c.n_embd, c.inner(), 2 * c.n_layer);
    let h = attention(o, at, c, x, wanted)?;
    let x = match wanted {
        Some(which) => &o.pick(x, which)?,
        None => x,
    };
    let x = o.add(&h, x)?;
    let h = o.layer_norm(at.to("ln_2").norm(width, c.layer_norm_epsilon), &x)?;
    let h = o.linear(at.to("mlp.c_fc").conv1d(width, inner), &h)?;
    let h = o.activate(&h, c.activation_function)?;
    let h = o.linear(at.to("mlp.c_proj").conv1d(inner, width).one_of(summands), &h)?;
    let h = o.dropout(&h, c.resid_pdrop)?;
    o.tap(at.path(), o.add(&h, &x)?)
}

/// What attention adds to the residual stream.
fn attention<O: Ops>(o: &O, at: &At, c: &Gpt2, x: &O::X, wanted: Option<Pick>) -> Result<O::X> {
    let width = c.n_embd;
    let h = o.layer_norm(at.to("ln_1").norm(width, c.layer_norm_epsilon), x)?;
    let at = at.to("attn");
    let h = o.split(&o.linear(at.to("c_attn").conv1d(width, 3 * width), &h)?, 3)?;
    let asking = match wanted {
        Some(which) => &o.pick(&h[0], which)?,
        None => &h[0],
    };
    let how = Attend { heads: c.n_head, sees: Sees::Causal, queries: wanted, dropout: c.attn_pdrop };
    let h = o.attention(asking, &h[1], &h[2], how)?;
    let h = o.linear(at.to("c_proj").conv1d(width, width).one_of(2 * c.n_layer), &h)?;
    o.dropout(&h, c.resid_pdrop)
}
