//! DistilBERT (Sanh et al. 2019, arXiv:1910.01108), BERT's encoder with half of its layers, without token types and
//! pooler, over the vocabulary.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::Result;
use crate::data::tokens::Vocabulary;
use crate::model::config::{activation, checked, default};
use crate::model::family::{Architecture, Head, Limits, Names};
use crate::model::ops::{Activation, At, Attend, Ids, Ops, Pick, Sees, Table};

/// The configuration. Field names and defaults are `transformers.DistilBertConfig`'s.
#[derive(Clone, Debug, Deserialize)]
pub struct DistilBert {
    pub vocab_size: usize,
    /// The width.
    pub dim: usize,
    pub n_layers: usize,
    pub n_heads: usize,
    /// The width inside a feed-forward layer.
    pub hidden_dim: usize,
    pub max_position_embeddings: usize,
    #[serde(default = "default::gelu", deserialize_with = "activation")]
    pub activation: Activation,
    #[serde(default = "default::tenth")]
    pub dropout: f32,
    #[serde(default = "default::tenth")]
    pub attention_dropout: f32,
    /// Dropout in front of a sequence classifier.
    #[serde(default = "default::fifth")]
    pub seq_classif_dropout: f32,
    /// Dropout in front of the scores of answers.
    #[serde(default = "default::tenth")]
    pub qa_dropout: f32,
    #[serde(default = "default::fiftieth")]
    pub initializer_range: f64,
}

/// Written in the code of `transformers`, not in the configuration.
const EPS: f64 = 1e-12;

impl Architecture for DistilBert {
    const MODEL_TYPES: &'static [&'static str] = &["distilbert"];
    const LORA_TARGETS: &'static [&'static str] = &["q_lin", "v_lin"];
    const DROPOUTS: &'static [&'static str] =
        &["dropout", "attention_dropout", "seq_classif_dropout", "qa_dropout"];
    const VOCABULARY: Vocabulary = Vocabulary::WordPiece;

    fn read(raw: &Map<String, Value>) -> Result<Self> {
        checked(raw, |c: &Self, found| {
            found.rows("vocab_size", c.vocab_size);
            found.heads(("dim", c.dim), ("n_heads", c.n_heads));
            found.layers("n_layers", c.n_layers);
            found.channels("hidden_dim", c.hidden_dim);
            found.rows("max_position_embeddings", c.max_position_embeddings);
            found.probability("dropout", c.dropout);
            found.probability("attention_dropout", c.attention_dropout);
            found.probability("seq_classif_dropout", c.seq_classif_dropout);
            found.probability("qa_dropout", c.qa_dropout);
            found.small("initializer_range", c.initializer_range);
        })
    }

    fn names(&self) -> Names {
        Names {
            prefix: "distilbert.",
            parts: &["embeddings.", "transformer."],
            buffers: &["embeddings.position_ids"],
        }
    }

    fn limits(&self) -> Limits {
        Limits {
            channels: self.dim,
            vocabulary: self.vocab_size,
            positions: self.max_position_embeddings,
            token_types: None,
            pairs: true,
        }
    }

    fn initializer_range(&self) -> f64 {
        self.initializer_range
    }

    fn class(_: &str, head: Head) -> Option<String> {
        match head {
            Head::CausalLm { .. } | Head::NextSentence | Head::PreTraining => None,
            _ => Some(format!("DistilBert{}", head.suffix())),
        }
    }

    fn define<O: Ops>(&self, o: &O, head: Head) -> Result<Vec<O::X>> {
        let scores = match head {
            Head::SequenceClassification { labels } => {
                let x = body(o, self, Some(Pick::First))?;
                let x = o.linear(At::head("pre_classifier").linear(self.dim, self.dim), &x)?;
                let x = o.dropout(&o.activate(&x, Activation::Relu)?, self.seq_classif_dropout)?;
                o.linear(At::labels("classifier").linear(self.dim, labels), &x)?
            }
            Head::TokenClassification { labels } => {
                let x = o.dropout(&body(o, self, None)?, self.dropout)?;
                o.linear(At::labels("classifier").linear(self.dim, labels), &x)?
            }
            Head::QuestionAnswering => {
                let x = o.dropout(&body(o, self, None)?, self.qa_dropout)?;
                o.linear(At::labels("qa_outputs").linear(self.dim, 2), &x)?
            }
            Head::MaskedLm => {
                let x = body(o, self, Some(Pick::Asked))?;
                let x = o.linear(At::head("vocab_transform").linear(self.dim, self.dim), &x)?;
                let x = o.activate(&x, self.activation)?;
                let x = o.layer_norm(At::head("vocab_layer_norm").norm(self.dim, EPS), &x)?;
                let bias = At::head("vocab_projector").bias(self.vocab_size);
                o.linear(words(self).tied().with_bias(bias), &x)?
            }
            Head::Embedding { wanted } => body(o, self, wanted)?,
            Head::CausalLm { .. } | Head::NextSentence | Head::PreTraining => {
                return Err(head.refused("distilbert"));
            }
        };
        Ok(vec![scores])
    }
}

/// The table of tokens, whose weight the head of masked words shares.
fn words(c: &DistilBert) -> Table {
    At::body("distilbert").to("embeddings.word_embeddings").table(c.vocab_size, c.dim)
}

/// Token ids → hidden states, one (C) a token, or of one token of every sequence alone: then the last layer computes
/// nothing for the others but their keys and values.
fn body<O: Ops>(o: &O, c: &DistilBert, wanted: Option<Pick>) -> Result<O::X> {
    let at = At::body("distilbert");
    let mut x = embeddings(o, &at.to("embeddings"), c)?;
    for i in 0..c.n_layers {
        let is_last = i + 1 == c.n_layers;
        x = layer(o, &at.to("transformer.layer").item(i), c, &x, wanted.filter(|_| is_last))?;
    }
    match wanted {
        Some(which) if c.n_layers == 0 => o.pick(&x, which),
        _ => Ok(x),
    }
}

fn embeddings<O: Ops>(o: &O, at: &At, c: &DistilBert) -> Result<O::X> {
    let words = o.embed(words(c), Ids::Tokens)?;
    let rows = c.max_position_embeddings;
    let places = o.embed(at.to("position_embeddings").table(rows, c.dim), Ids::Positions)?;
    let x = o.layer_norm(at.to("LayerNorm").norm(c.dim, EPS), &o.add(&words, &places)?)?;
    let x = o.dropout(&x, c.dropout)?;
    o.tap(at.path(), x)
}

fn layer<O: Ops>(o: &O, at: &At, c: &DistilBert, x: &O::X, wanted: Option<Pick>) -> Result<O::X> {
    let h = attention(o, &at.to("attention"), c, x, wanted)?;
    let asking = match wanted {
        Some(which) => &o.pick(x, which)?,
        None => x,
    };
    let x = o.layer_norm(at.to("sa_layer_norm").norm(c.dim, EPS), &o.add(&h, asking)?)?;
    let h = o.linear(at.to("ffn.lin1").linear(c.dim, c.hidden_dim), &x)?;
    let h = o.activate(&h, c.activation)?;
    let h = o.linear(at.to("ffn.lin2").linear(c.hidden_dim, c.dim), &h)?;
    let h = o.dropout(&h, c.dropout)?;
    let x = o.layer_norm(at.to("output_layer_norm").norm(c.dim, EPS), &o.add(&h, &x)?)?;
    o.tap(at.path(), x)
}

/// What attention adds to the residual stream; no dropout follows its last map.
fn attention<O: Ops>(o: &O, at: &At, c: &DistilBert, x: &O::X, wanted: Option<Pick>) -> Result<O::X> {
    let asking = match wanted {
        Some(which) => &o.pick(x, which)?,
        None => x,
    };
    let q = o.linear(at.to("q_lin").linear(c.dim, c.dim), asking)?;
    let k = o.linear(at.to("k_lin").linear(c.dim, c.dim), x)?;
    let v = o.linear(at.to("v_lin").linear(c.dim, c.dim), x)?;
    let how = Attend { heads: c.n_heads, sees: Sees::All, queries: wanted, dropout: c.attention_dropout };
    let h = o.attention(&q, &k, &v, how)?;
    o.linear(at.to("out_lin").linear(c.dim, c.dim), &h)
}
