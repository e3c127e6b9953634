//! MPNet (Song et al. 2020, arXiv:2004.09297): BERT's layers, whose attention adds one bias of distances in all of them,
//! under RoBERTa's positions and heads, over the vocabulary.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::Result;
use crate::data::tokens::Vocabulary;
use crate::model::bert::Bert;
use crate::model::config::{checked, default};
use crate::model::family::{Architecture, Head, Limits, Names};
use crate::model::ops::{Activation, At, Attend, Buckets, Distances, Ids, Ops, Pick, Sees, Table};

/// The configuration. Field names and defaults are `transformers.MPNetConfig`'s: BERT's without token types, and the
/// rows of the bias.
#[derive(Clone, Debug, Deserialize)]
pub struct MpNet {
    #[serde(flatten)]
    pub bert: Bert,
    #[serde(default = "default::thirty_two")]
    pub relative_attention_num_buckets: usize,
}

/// The token of padding, which `transformers` has fixed in the code: its row of the position table is padding's, and the
/// first token's is the one behind it.
const PADDING: u32 = 1;

/// The rows of the bias that there are distances for.
const BUCKETS: usize = 32;

impl Architecture for MpNet {
    const MODEL_TYPES: &'static [&'static str] = &["mpnet"];
    const LORA_TARGETS: &'static [&'static str] = &["attn.q", "attn.v"];
    const DROPOUTS: &'static [&'static str] = &["hidden_dropout_prob", "attention_probs_dropout_prob"];
    const VOCABULARY: Vocabulary = Vocabulary::Roberta;

    fn read(raw: &Map<String, Value>) -> Result<Self> {
        Bert::read(raw)?;
        checked(raw, |c: &Self, found| {
            found.rows("relative_attention_num_buckets", c.relative_attention_num_buckets);
            if c.relative_attention_num_buckets < BUCKETS {
                found.say(format!(
                    "relative_attention_num_buckets is {}; distances are in {BUCKETS} buckets",
                    c.relative_attention_num_buckets
                ));
            }
            if c.bert.max_position_embeddings <= PADDING as usize + 1 {
                found.say(format!(
                    "max_position_embeddings is {}, and the tokens' positions begin at {}",
                    c.bert.max_position_embeddings,
                    PADDING + 1
                ));
            }
        })
    }

    fn names(&self) -> Names {
        Names { prefix: "mpnet.", ..self.bert.names() }
    }

    fn limits(&self) -> Limits {
        Limits {
            channels: self.bert.hidden_size,
            vocabulary: self.bert.vocab_size,
            positions: self.bert.max_position_embeddings - PADDING as usize - 1,
            token_types: None,
            pairs: true,
        }
    }

    fn initializer_range(&self) -> f64 {
        self.bert.initializer_range
    }

    fn class(_: &str, head: Head) -> Option<String> {
        match head {
            Head::CausalLm { .. } | Head::NextSentence | Head::PreTraining => None,
            _ => Some(format!("MPNet{}", head.suffix())),
        }
    }

    fn define<O: Ops>(&self, o: &O, head: Head) -> Result<Vec<O::X>> {
        let (width, p) = (self.bert.hidden_size, self.bert.hidden_dropout_prob);
        let scores = match head {
            Head::SequenceClassification { labels } => {
                let at = At::head("classifier");
                let x = o.dropout(&body(o, self, Some(Pick::First))?, p)?;
                let x = o.linear(at.to("dense").linear(width, width), &x)?;
                let x = o.dropout(&o.activate(&x, Activation::Tanh)?, p)?;
                o.linear(At::labels("classifier.out_proj").linear(width, labels), &x)?
            }
            Head::TokenClassification { labels } => {
                let x = o.dropout(&body(o, self, None)?, p)?;
                o.linear(At::labels("classifier").linear(width, labels), &x)?
            }
            Head::QuestionAnswering => {
                o.linear(At::labels("qa_outputs").linear(width, 2), &body(o, self, None)?)?
            }
            Head::MaskedLm => {
                let at = At::head("lm_head");
                let x = o.pick(&body(o, self, None)?, Pick::Asked)?;
                let x = o.activate(&o.linear(at.to("dense").linear(width, width), &x)?, Activation::Gelu)?;
                let x = o.layer_norm(at.to("layer_norm").norm(width, self.bert.layer_norm_eps), &x)?;
                o.linear(words(self).tied().with_bias(at.bias(self.bert.vocab_size)), &x)?
            }
            Head::Embedding { wanted } => body(o, self, wanted)?,
            Head::CausalLm { .. } | Head::NextSentence | Head::PreTraining => {
                return Err(head.refused("mpnet"));
            }
        };
        Ok(vec![scores])
    }
}

/// The table of tokens, whose weight the head of masked words shares.
fn words(c: &MpNet) -> Table {
    At::body("mpnet").to("embeddings.word_embeddings").table(c.bert.vocab_size, c.bert.hidden_size)
}

/// Token ids → hidden states, one (C) a token, or of one token of every sequence alone.
fn body<O: Ops>(o: &O, c: &MpNet, wanted: Option<Pick>) -> Result<O::X> {
    let at = At::body("mpnet");
    let mut x = embeddings(o, &at.to("embeddings"), c)?;
    let layers = c.bert.num_hidden_layers;
    for i in 0..layers {
        let wanted = wanted.filter(|_| i + 1 == layers);
        x = layer(o, &at.to("encoder"), &at.to("encoder.layer").item(i), c, &x, wanted)?;
    }
    match wanted {
        Some(which) if layers == 0 => o.pick(&x, which),
        _ => Ok(x),
    }
}

fn embeddings<O: Ops>(o: &O, at: &At, c: &MpNet) -> Result<O::X> {
    let (width, bert) = (c.bert.hidden_size, &c.bert);
    let words = o.embed(words(c), Ids::Tokens)?;
    let positions = Ids::PositionsBehind { padding: PADDING };
    let places =
        o.embed(at.to("position_embeddings").table(bert.max_position_embeddings, width), positions)?;
    let x = o.layer_norm(at.to("LayerNorm").norm(width, bert.layer_norm_eps), &o.add(&words, &places)?)?;
    let x = o.dropout(&x, bert.hidden_dropout_prob)?;
    o.tap(at.path(), x)
}

fn layer<O: Ops>(o: &O, encoder: &At, at: &At, c: &MpNet, x: &O::X, wanted: Option<Pick>) -> Result<O::X> {
    let (width, inner, bert) = (c.bert.hidden_size, c.bert.intermediate_size, &c.bert);
    let x = attention(o, encoder, &at.to("attention"), c, x, wanted)?;
    let h = o.linear(at.to("intermediate.dense").linear(width, inner), &x)?;
    let h = o.activate(&h, bert.hidden_act)?;
    let h = o.linear(at.to("output.dense").linear(inner, width), &h)?;
    let h = o.dropout(&h, bert.hidden_dropout_prob)?;
    let x = o.layer_norm(at.to("output.LayerNorm").norm(width, bert.layer_norm_eps), &o.add(&h, &x)?)?;
    o.tap(at.path(), x)
}

fn attention<O: Ops>(
    o: &O,
    encoder: &At,
    at: &At,
    c: &MpNet,
    x: &O::X,
    wanted: Option<Pick>,
) -> Result<O::X> {
    let (width, heads) = (c.bert.hidden_size, c.bert.num_attention_heads);
    let asking = match wanted {
        Some(which) => &o.pick(x, which)?,
        None => x,
    };
    let q = o.linear(at.to("attn.q").linear(width, width), asking)?;
    let k = o.linear(at.to("attn.k").linear(width, width), x)?;
    let v = o.linear(at.to("attn.v").linear(width, width), x)?;
    let how =
        Attend { heads, sees: Sees::All, queries: wanted, dropout: c.bert.attention_probs_dropout_prob };
    // one table for all layers
    let distances = Distances::Bias {
        table: encoder.to("relative_attention_bias").table(c.relative_attention_num_buckets, heads),
        buckets: Buckets::T5,
        longest: c.limits().positions,
    };
    let h = o.attention_by_distance(&q, &k, &v, how, distances)?;
    let h = o.linear(at.to("attn.o").linear(width, width), &h)?;
    let h = o.dropout(&h, c.bert.hidden_dropout_prob)?;
    let x = o.layer_norm(at.to("LayerNorm").norm(width, c.bert.layer_norm_eps), &o.add(&h, asking)?)?;
    o.tap(at.path(), x)
}
