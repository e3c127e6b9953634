//! BERT (Devlin et al. 2018, arXiv:1810.04805), post-norm encoder, over the vocabulary.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::Result;
use crate::data::tokens::Vocabulary;
use crate::model::config::{activation, checked, default};
use crate::model::family::{Architecture, Head, Limits, Names};
use crate::model::ops::{Activation, At, Attend, Ids, Ops, Pick, Sees, Table};

/// The configuration. Field names and defaults are `transformers.BertConfig`'s.
#[derive(Clone, Debug, Deserialize)]
pub struct Bert {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub intermediate_size: usize,
    pub max_position_embeddings: usize,
    #[serde(default = "default::two")]
    pub type_vocab_size: usize,
    #[serde(default = "default::gelu", deserialize_with = "activation")]
    pub hidden_act: Activation,
    #[serde(default = "default::tenth")]
    pub hidden_dropout_prob: f32,
    #[serde(default = "default::tenth")]
    pub attention_probs_dropout_prob: f32,
    /// Dropout in front of a classifier; `hidden_dropout_prob` where it is absent.
    #[serde(default)]
    pub classifier_dropout: Option<f32>,
    #[serde(default = "default::eps_1e_12")]
    pub layer_norm_eps: f64,
    #[serde(default = "default::fiftieth")]
    pub initializer_range: f64,
}

impl Architecture for Bert {
    const MODEL_TYPES: &'static [&'static str] = &["bert"];
    const LORA_TARGETS: &'static [&'static str] = &["query", "value"];
    const DROPOUTS: &'static [&'static str] =
        &["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"];
    const VOCABULARY: Vocabulary = Vocabulary::WordPiece;

    fn read(raw: &Map<String, Value>) -> Result<Self> {
        checked(raw, |c: &Self, found| {
            found.rows("vocab_size", c.vocab_size);
            found.heads(("hidden_size", c.hidden_size), ("num_attention_heads", c.num_attention_heads));
            found.layers("num_hidden_layers", c.num_hidden_layers);
            found.channels("intermediate_size", c.intermediate_size);
            found.rows("max_position_embeddings", c.max_position_embeddings);
            found.rows("type_vocab_size", c.type_vocab_size);
            found.probability("hidden_dropout_prob", c.hidden_dropout_prob);
            found.probability("attention_probs_dropout_prob", c.attention_probs_dropout_prob);
            found.probability("classifier_dropout", c.classifier_dropout.unwrap_or(0.0));
            found.small("layer_norm_eps", c.layer_norm_eps);
            found.small("initializer_range", c.initializer_range);
            found.only("position_embedding_type", "absolute");
            found.never("is_decoder", true, "tk runs it as an encoder");
            found.never("add_cross_attention", true, "tk runs it as an encoder");
        })
    }

    fn names(&self) -> Names {
        Names {
            prefix: "bert.",
            parts: &["embeddings.", "encoder.", "pooler."],
            buffers: &["embeddings.position_ids", "embeddings.token_type_ids"],
        }
    }

    fn limits(&self) -> Limits {
        Limits {
            channels: self.hidden_size,
            vocabulary: self.vocab_size,
            positions: self.max_position_embeddings,
            token_types: Some(self.type_vocab_size),
            pairs: self.type_vocab_size > 1,
        }
    }

    fn initializer_range(&self) -> f64 {
        self.initializer_range
    }

    fn class(_: &str, head: Head) -> Option<String> {
        (!matches!(head, Head::CausalLm { .. })).then(|| format!("Bert{}", head.suffix()))
    }

    fn define<O: Ops>(&self, o: &O, head: Head) -> Result<Vec<O::X>> {
        let scores = match head {
            Head::SequenceClassification { labels } => {
                let x = pooler(o, &body(o, self, Some(Pick::First))?, self)?;
                let x = o.dropout(&x, self.before_classifier())?;
                o.linear(At::labels("classifier").linear(self.hidden_size, labels), &x)?
            }
            Head::TokenClassification { labels } => {
                let x = o.dropout(&body(o, self, None)?, self.before_classifier())?;
                o.linear(At::labels("classifier").linear(self.hidden_size, labels), &x)?
            }
            Head::QuestionAnswering => {
                o.linear(At::labels("qa_outputs").linear(self.hidden_size, 2), &body(o, self, None)?)?
            }
            Head::MaskedLm => predictions(o, self, &body(o, self, Some(Pick::Asked))?)?,
            Head::NextSentence => follows(o, self, &body(o, self, Some(Pick::First))?)?,
            Head::PreTraining => {
                let x = body(o, self, Some(Pick::Asked))?;
                return Ok(vec![predictions(o, self, &x)?, follows(o, self, &o.pick(&x, Pick::First)?)?]);
            }
            Head::Embedding { wanted } => body(o, self, wanted)?,
            Head::CausalLm { .. } => return Err(head.refused("bert")),
        };
        Ok(vec![scores])
    }
}

impl Bert {
    /// The probability of dropout in front of a classifier.
    pub(super) fn before_classifier(&self) -> f32 {
        self.classifier_dropout.unwrap_or(self.hidden_dropout_prob)
    }
}

/// Token ids → hidden states, one (C) a token, or of one token of every sequence alone.
fn body<O: Ops>(o: &O, c: &Bert, wanted: Option<Pick>) -> Result<O::X> {
    let at = At::body("bert");
    let x = embeddings(o, &at.to("embeddings"), c)?;
    encoder(o, &at.to("encoder"), c, x, wanted)
}

/// The layers. Where one token of every sequence alone is wanted, the last of them computes nothing for the others but
/// their keys and values.
pub(super) fn encoder<O: Ops>(o: &O, at: &At, c: &Bert, mut x: O::X, wanted: Option<Pick>) -> Result<O::X> {
    for i in 0..c.num_hidden_layers {
        let is_last = i + 1 == c.num_hidden_layers;
        x = layer(o, &at.to("layer").item(i), c, &x, wanted.filter(|_| is_last))?;
    }
    match wanted {
        Some(which) if c.num_hidden_layers == 0 => o.pick(&x, which),
        _ => Ok(x),
    }
}

/// The table of tokens, whose weight the head of masked words shares.
fn words(c: &Bert) -> Table {
    At::body("bert").to("embeddings.word_embeddings").table(c.vocab_size, c.hidden_size)
}

/// Hidden states → the scores of the tokens that stand at the places asked for.
fn predictions<O: Ops>(o: &O, c: &Bert, x: &O::X) -> Result<O::X> {
    let at = At::head("cls.predictions");
    let width = c.hidden_size;
    let x = o.linear(at.to("transform.dense").linear(width, width), x)?;
    let x = o.activate(&x, c.hidden_act)?;
    let x = o.layer_norm(at.to("transform.LayerNorm").norm(width, c.layer_norm_eps), &x)?;
    o.linear(words(c).tied().with_bias(at.bias(c.vocab_size)), &x)
}

/// The first tokens' hidden states → the scores that the second text follows the first, and that it does not.
fn follows<O: Ops>(o: &O, c: &Bert, x: &O::X) -> Result<O::X> {
    o.linear(At::head("cls.seq_relationship").linear(c.hidden_size, 2), &pooler(o, x, c)?)
}

fn embeddings<O: Ops>(o: &O, at: &At, c: &Bert) -> Result<O::X> {
    let width = c.hidden_size;
    let words = o.embed(words(c), Ids::Tokens)?;
    let types = o.embed(at.to("token_type_embeddings").table(c.type_vocab_size, width), Ids::TokenTypes)?;
    let places =
        o.embed(at.to("position_embeddings").table(c.max_position_embeddings, width), Ids::Positions)?;
    let x = o.add(&o.add(&words, &types)?, &places)?;
    let x = o.layer_norm(at.to("LayerNorm").norm(width, c.layer_norm_eps), &x)?;
    let x = o.dropout(&x, c.hidden_dropout_prob)?;
    o.tap(at.path(), x)
}

fn layer<O: Ops>(o: &O, at: &At, c: &Bert, x: &O::X, wanted: Option<Pick>) -> Result<O::X> {
    let x = attention(o, &at.to("attention"), c, x, wanted)?;
    let (width, inner) = (c.hidden_size, c.intermediate_size);
    let h = o.linear(at.to("intermediate.dense").linear(width, inner), &x)?;
    let h = o.activate(&h, c.hidden_act)?;
    let h = o.linear(at.to("output.dense").linear(inner, width), &h)?;
    let h = o.dropout(&h, c.hidden_dropout_prob)?;
    let x = o.layer_norm(at.to("output.LayerNorm").norm(width, c.layer_norm_eps), &o.add(&h, &x)?)?;
    o.tap(at.path(), x)
}

fn attention<O: Ops>(o: &O, at: &At, c: &Bert, x: &O::X, wanted: Option<Pick>) -> Result<O::X> {
    let width = c.hidden_size;
    let asking = match wanted {
        Some(which) => &o.pick(x, which)?,
        None => x,
    };
    let q = o.linear(at.to("self.query").linear(width, width), asking)?;
    let k = o.linear(at.to("self.key").linear(width, width), x)?;
    let v = o.linear(at.to("self.value").linear(width, width), x)?;
    let how = Attend {
        heads: c.num_attention_heads,
        sees: Sees::All,
        queries: wanted,
        dropout: c.attention_probs_dropout_prob,
    };
    let h = o.attention(&q, &k, &v, how)?;
    let h = o.linear(at.to("output.dense").linear(width, width), &h)?;
    let h = o.dropout(&h, c.hidden_dropout_prob)?;
    let x = o.layer_norm(at.to("output.LayerNorm").norm(width, c.layer_norm_eps), &o.add(&h, asking)?)?;
    o.tap(at.path(), x)
}

/// The first tokens' hidden states, (B, C), through a linear map and tanh.
///
/// A checkpoint that was pre-trained without next-sentence prediction has no pooler, so it counts
/// as a part of the head.
fn pooler<O: Ops>(o: &O, x: &O::X, c: &Bert) -> Result<O::X> {
    let x = o.linear(At::head("bert").to("pooler.dense").linear(c.hidden_size, c.hidden_size), x)?;
    let x = o.activate(&x, Activation::Tanh)?;
    o.tap("bert.pooler", x)
}
