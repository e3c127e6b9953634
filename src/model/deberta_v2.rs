//! DeBERTa of versions 2 and 3 (He et al. 2021, arXiv:2111.09543): BERT's layers, whose attention multiplies queries and
//! keys with tables of distances, over the vocabulary.

use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use crate::data::tokens::Vocabulary;
use crate::model::config::{Findings, activation, checked, default};
use crate::model::family::{Architecture, Head, Limits, Names};
use crate::model::ops::{Activation, At, Attend, Buckets, Distances, Ids, Ops, Pick, Sees, Table};
use crate::{Result, bail_unusable};

/// The configuration. Field names and defaults are `transformers.DebertaV2Config`'s.
#[derive(Clone, Debug, Deserialize)]
pub struct DebertaV2 {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub intermediate_size: usize,
    pub max_position_embeddings: usize,
    #[serde(default)]
    pub type_vocab_size: usize,
    /// The embeddings' width; the layers' where it is absent.
    #[serde(default)]
    embedding_size: Option<usize>,
    #[serde(default = "default::gelu", deserialize_with = "activation")]
    pub hidden_act: Activation,
    #[serde(default = "default::tenth")]
    pub hidden_dropout_prob: f32,
    #[serde(default = "default::tenth")]
    pub attention_probs_dropout_prob: f32,
    #[serde(default)]
    pub pooler_dropout: f32,
    #[serde(default = "default::gelu", deserialize_with = "activation")]
    pub pooler_hidden_act: Activation,
    /// Dropout in front of a text's classifier; `hidden_dropout_prob` where it is absent.
    #[serde(default)]
    pub cls_dropout: Option<f32>,
    #[serde(default = "eps_1e_7")]
    pub layer_norm_eps: f64,
    #[serde(default = "default::fiftieth")]
    pub initializer_range: f64,
    /// Whether attention counts distances.
    #[serde(default)]
    pub relative_attention: bool,
    /// Whether the embeddings know positions.
    #[serde(default = "yes")]
    pub position_biased_input: bool,
    /// What of the distances is multiplied: queries with a table (`c2p`), keys with another (`p2c`).
    #[serde(default, deserialize_with = "kinds")]
    pos_att_type: Vec<String>,
    /// Whether the tables go through the layers' own maps of queries and keys.
    #[serde(default)]
    pub share_att_key: bool,
    /// Distances that have a row of their own, or share one, on either side; each has its own where it is not positive.
    #[serde(default = "none")]
    position_buckets: i64,
    /// The longest distance; `max_position_embeddings` where it is not positive.
    #[serde(default = "none")]
    max_relative_positions: i64,
    /// Whether the table of distances has a norm: `layer_norm`, among words between bars.
    #[serde(default)]
    norm_rel_ebd: Option<String>,
    /// Whether the head of masked words is named as BERT's.
    #[serde(default = "yes")]
    pub legacy: bool,
}

fn yes() -> bool {
    true
}

fn none() -> i64 {
    -1
}

fn eps_1e_7() -> f64 {
    1e-7
}

/// `"p2c|c2p"`, a list of such words, or null.
fn kinds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Kinds {
        Words(String),
        List(Vec<String>),
    }
    Ok(match Option::deserialize(deserializer)? {
        None => Vec::new(),
        Some(Kinds::List(kinds)) => kinds,
        Some(Kinds::Words(words)) => {
            words.to_lowercase().split('|').map(|kind| kind.trim().to_owned()).collect()
        }
    })
}

impl Architecture for DebertaV2 {
    const MODEL_TYPES: &'static [&'static str] = &["deberta-v2"];
    const LORA_TARGETS: &'static [&'static str] = &["query_proj", "value_proj"];
    const DROPOUTS: &'static [&'static str] =
        &["hidden_dropout_prob", "attention_probs_dropout_prob", "pooler_dropout", "cls_dropout"];
    const VOCABULARY: Vocabulary = Vocabulary::WordPiece;

    fn read(raw: &Map<String, Value>) -> Result<Self> {
        checked(raw, |c: &Self, found| {
            found.rows("vocab_size", c.vocab_size);
            found.heads(("hidden_size", c.hidden_size), ("num_attention_heads", c.num_attention_heads));
            found.layers("num_hidden_layers", c.num_hidden_layers);
            found.channels("intermediate_size", c.intermediate_size);
            found.channels("embedding_size", c.embedding_size());
            found.rows("max_position_embeddings", c.max_position_embeddings);
            found.rows("type_vocab_size", c.type_vocab_size.max(1));
            found.probability("hidden_dropout_prob", c.hidden_dropout_prob);
            found.probability("attention_probs_dropout_prob", c.attention_probs_dropout_prob);
            found.probability("pooler_dropout", c.pooler_dropout);
            found.probability("cls_dropout", c.cls_dropout.unwrap_or(0.0));
            found.small("layer_norm_eps", c.layer_norm_eps);
            found.small("initializer_range", c.initializer_range);
            c.check_distances(found);
            let number = |field: &str| raw.get(field).filter(|value| !value.is_null());
            if let Some(size) =
                number("conv_kernel_size").filter(|size| size.as_i64().is_none_or(|size| size > 0))
            {
                found.say(format!(
                    "conv_kernel_size is {size}; tk runs no convolution behind the first layer"
                ));
            }
            for (field, expected) in [
                ("pooler_hidden_size", c.hidden_size),
                ("attention_head_size", c.hidden_size.checked_div(c.num_attention_heads).unwrap_or(0)),
            ] {
                if let Some(size) = number(field).filter(|size| size.as_u64() != Some(expected as u64)) {
                    found.say(format!("{field} is {size}; tk runs {expected} beside the other sizes"));
                }
            }
        })
    }

    fn names(&self) -> Names {
        Names {
            prefix: "deberta.",
            parts: &["embeddings.", "encoder."],
            buffers: &["embeddings.position_ids"],
        }
    }

    fn limits(&self) -> Limits {
        Limits {
            channels: self.hidden_size,
            vocabulary: self.vocab_size,
            positions: self.max_position_embeddings,
            token_types: (self.type_vocab_size > 0).then_some(self.type_vocab_size),
            pairs: true,
        }
    }

    fn initializer_range(&self) -> f64 {
        self.initializer_range
    }

    fn class(_: &str, head: Head) -> Option<String> {
        match head {
            Head::CausalLm { .. } | Head::NextSentence | Head::PreTraining => None,
            _ => Some(format!("DebertaV2{}", head.suffix())),
        }
    }

    fn define<O: Ops>(&self, o: &O, head: Head) -> Result<Vec<O::X>> {
        let (width, p) = (self.hidden_size, self.hidden_dropout_prob);
        let scores = match head {
            Head::SequenceClassification { labels } => {
                let x = o.dropout(&body(o, self, Some(Pick::First))?, self.pooler_dropout)?;
                let x = o.linear(At::head("pooler.dense").linear(width, width), &x)?;
                let x = o.activate(&x, self.pooler_hidden_act)?;
                let x = o.dropout(&x, self.cls_dropout.unwrap_or(p))?;
                o.linear(At::labels("classifier").linear(width, labels), &x)?
            }
            Head::TokenClassification { labels } => {
                let x = o.dropout(&body(o, self, None)?, p)?;
                o.linear(At::labels("classifier").linear(width, labels), &x)?
            }
            Head::QuestionAnswering => {
                o.linear(At::labels("qa_outputs").linear(width, 2), &body(o, self, None)?)?
            }
            Head::MaskedLm => predictions(o, self, &body(o, self, None)?)?,
            Head::Embedding { wanted } => body(o, self, wanted)?,
            Head::CausalLm { .. } | Head::NextSentence | Head::PreTraining => {
                return Err(head.refused("deberta-v2"));
            }
        };
        Ok(vec![scores])
    }
}

impl DebertaV2 {
    fn check_distances(&self, found: &mut Findings) {
        if !self.relative_attention {
            if !self.pos_att_type.is_empty() {
                found.say(
                    "pos_att_type says what of distances counts, and relative_attention is false".to_owned(),
                );
            }
            return;
        }
        if !self.multiplies("c2p") && !self.multiplies("p2c") {
            found.say("relative_attention is true, and pos_att_type has neither c2p nor p2c".to_owned());
        }
        found.rows(
            if self.position_buckets > 0 { "position_buckets" } else { "max_relative_positions" },
            self.span().saturating_mul(2),
        );
        let (middle, longest) = (self.span() / 2, self.longest());
        if self.position_buckets > 0 && (middle == 0 || longest <= middle + 1) {
            found.say(format!(
                "position_buckets is {}, and the longest distance {longest}: expected at least 2 buckets, and a distance \
                 beyond half of them",
                self.position_buckets
            ));
        }
    }

    fn embedding_size(&self) -> usize {
        self.embedding_size.unwrap_or(self.hidden_size)
    }

    fn multiplies(&self, kind: &str) -> bool {
        self.pos_att_type.iter().any(|known| known == kind)
    }

    /// The longest distance.
    fn longest(&self) -> usize {
        match usize::try_from(self.max_relative_positions) {
            Ok(longest) if longest > 0 => longest,
            _ => self.max_position_embeddings,
        }
    }

    /// The rows of the table of distances for either side.
    fn span(&self) -> usize {
        match usize::try_from(self.position_buckets) {
            Ok(buckets) if buckets > 0 => buckets,
            _ => self.longest(),
        }
    }

    fn buckets(&self) -> Buckets {
        Buckets::Signed { span: self.span(), most: (self.position_buckets > 0).then(|| self.longest()) }
    }

    /// Whether the table of distances has a norm.
    fn norms_distances(&self) -> bool {
        let words = self.norm_rel_ebd.as_deref().unwrap_or("none").to_lowercase();
        words.split('|').any(|word| word.trim() == "layer_norm")
    }
}

/// The table of tokens, whose weight the head of masked words shares.
fn words(c: &DebertaV2) -> Table {
    At::body("deberta").to("embeddings.word_embeddings").table(c.vocab_size, c.embedding_size())
}

/// Hidden states → the scores of the tokens that stand at the places asked for.
fn predictions<O: Ops>(o: &O, c: &DebertaV2, x: &O::X) -> Result<O::X> {
    let (width, inner, x) = (c.hidden_size, c.embedding_size(), o.pick(x, Pick::Asked)?);
    let (at, transform) = if c.legacy {
        let at = At::head("cls.predictions");
        (at.clone(), at.to("transform"))
    } else {
        let at = At::head("lm_predictions.lm_head");
        (at.clone(), at)
    };
    if !c.legacy && inner != width {
        bail_unusable!(
            "embedding_size is {inner}, hidden_size {width}: the head of masked words multiplies both"
        );
    }
    let x = o.activate(&o.linear(transform.to("dense").linear(width, inner), &x)?, c.hidden_act)?;
    let x = o.layer_norm(transform.to("LayerNorm").norm(inner, c.layer_norm_eps), &x)?;
    o.linear(words(c).tied().with_bias(at.bias(c.vocab_size)), &x)
}

/// Token ids → hidden states, one (C) a token, or of one token of every sequence alone.
fn body<O: Ops>(o: &O, c: &DebertaV2, wanted: Option<Pick>) -> Result<O::X> {
    let at = At::body("deberta");
    let mut x = embeddings(o, &at.to("embeddings"), c)?;
    let at = at.to("encoder");
    let distances = if c.relative_attention { Some(distances(o, &at, c)?) } else { None };
    for i in 0..c.num_hidden_layers {
        let is_last = i + 1 == c.num_hidden_layers;
        x = layer(o, &at.to("layer").item(i), c, &x, distances.as_ref(), wanted.filter(|_| is_last))?;
    }
    match wanted {
        Some(which) if c.num_hidden_layers == 0 => o.pick(&x, which),
        _ => Ok(x),
    }
}

/// `transformers` sets the embeddings of padding to 0, which no other token notices.
fn embeddings<O: Ops>(o: &O, at: &At, c: &DebertaV2) -> Result<O::X> {
    let (width, inner) = (c.hidden_size, c.embedding_size());
    let mut x = o.embed(words(c), Ids::Tokens)?;
    if c.position_biased_input {
        let table = at.to("position_embeddings").table(c.max_position_embeddings, inner);
        x = o.add(&x, &o.embed(table, Ids::Positions)?)?;
    }
    if c.type_vocab_size > 0 {
        let table = at.to("token_type_embeddings").table(c.type_vocab_size, inner);
        x = o.add(&x, &o.embed(table, Ids::TokenTypes)?)?;
    }
    if inner != width {
        x = o.linear(at.to("embed_proj").linear(inner, width).without_bias(), &x)?;
    }
    let x = o.layer_norm(at.to("LayerNorm").norm(width, c.layer_norm_eps), &x)?;
    let x = o.dropout(&x, c.hidden_dropout_prob)?;
    o.tap(at.path(), x)
}

/// The table of distances that all layers share, (R, C).
fn distances<O: Ops>(o: &O, at: &At, c: &DebertaV2) -> Result<O::X> {
    let table = o.whole(at.to("rel_embeddings").table(2 * c.span(), c.hidden_size))?;
    match c.norms_distances() {
        true => o.layer_norm(at.to("LayerNorm").norm(c.hidden_size, c.layer_norm_eps), &table),
        false => Ok(table),
    }
}

fn layer<O: Ops>(
    o: &O,
    at: &At,
    c: &DebertaV2,
    x: &O::X,
    distances: Option<&O::X>,
    wanted: Option<Pick>,
) -> Result<O::X> {
    let x = attention(o, &at.to("attention"), c, x, distances, wanted)?;
    let (width, inner) = (c.hidden_size, c.intermediate_size);
    let h = o.linear(at.to("intermediate.dense").linear(width, inner), &x)?;
    let h = o.activate(&h, c.hidden_act)?;
    let h = o.linear(at.to("output.dense").linear(inner, width), &h)?;
    let h = o.dropout(&h, c.hidden_dropout_prob)?;
    let x = o.layer_norm(at.to("output.LayerNorm").norm(width, c.layer_norm_eps), &o.add(&h, &x)?)?;
    o.tap(at.path(), x)
}

fn attention<O: Ops>(
    o: &O,
    at: &At,
    c: &DebertaV2,
    x: &O::X,
    distances: Option<&O::X>,
    wanted: Option<Pick>,
) -> Result<O::X> {
    let width = c.hidden_size;
    let map = |name: &str| at.to("self").to(name).linear(width, width);
    let asking = match wanted {
        Some(which) => &o.pick(x, which)?,
        None => x,
    };
    let q = o.linear(map("query_proj"), asking)?;
    let k = o.linear(map("key_proj"), x)?;
    let v = o.linear(map("value_proj"), x)?;
    let how = Attend {
        heads: c.num_attention_heads,
        sees: Sees::All,
        queries: wanted,
        dropout: c.attention_probs_dropout_prob,
    };
    let distances = match distances {
        None => Distances::Nothing,
        Some(table) => {
            let table = o.dropout(table, c.hidden_dropout_prob)?;
            let [for_queries, for_keys] =
                if c.share_att_key { ["key_proj", "query_proj"] } else { ["pos_key_proj", "pos_query_proj"] };
            let mapped =
                |kind: &str, name: &str| c.multiplies(kind).then(|| o.linear(map(name), &table)).transpose();
            Distances::Products {
                keys: mapped("c2p", for_queries)?,
                queries: mapped("p2c", for_keys)?,
                buckets: c.buckets(),
                longest: c.max_position_embeddings,
            }
        }
    };
    let h = o.attention_by_distance(&q, &k, &v, how, distances)?;
    let h = o.linear(at.to("output.dense").linear(width, width), &h)?;
    let h = o.dropout(&h, c.hidden_dropout_prob)?;
    let x = o.layer_norm(at.to("output.LayerNorm").norm(width, c.layer_norm_eps), &o.add(&h, asking)?)?;
    o.tap(at.path(), x)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(more: Value) -> Result<DebertaV2> {
        let mut raw = json!({
            "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 8, "max_position_embeddings": 512, "relative_attention": true,
            "pos_att_type": "p2c|C2P", "position_buckets": 256,
        });
        raw.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        DebertaV2::read(raw.as_object().unwrap())
    }

    #[test]
    fn distances_are_those_that_the_fields_say() {
        let c = read(json!({"norm_rel_ebd": "x | layer_norm"})).unwrap();
        assert_eq!(
            (c.buckets(), c.norms_distances()),
            (Buckets::Signed { span: 256, most: Some(512) }, true)
        );
        assert!(c.multiplies("p2c") && c.multiplies("c2p"));
        let c = read(json!({"position_buckets": -1, "max_relative_positions": 40, "pos_att_type": ["c2p"]}))
            .unwrap();
        assert_eq!((c.buckets(), c.norms_distances()), (Buckets::Signed { span: 40, most: None }, false));
        assert!(!c.multiplies("p2c"));
    }

    #[test]
    fn what_tk_does_not_run_is_named() {
        for (more, said) in [
            (json!({"conv_kernel_size": 3}), "conv_kernel_size is 3; tk runs no convolution"),
            (json!({"pooler_hidden_size": 4}), "pooler_hidden_size is 4; tk runs 8"),
            (json!({"attention_head_size": 8}), "attention_head_size is 8; tk runs 4"),
            (json!({"relative_attention": false}), "pos_att_type says what of distances counts"),
            (json!({"pos_att_type": null}), "pos_att_type has neither c2p nor p2c"),
            (json!({"pos_att_type": 3}), "pos_att_type: "),
            (json!({"position_buckets": 1}), "position_buckets is 1"),
            (json!({"max_relative_positions": 128}), "the longest distance 128"),
            (json!({"position_buckets": i64::MAX}), "position_buckets is 18446744073709551614, above"),
            (json!({"hidden_act": "mish"}), "\"mish\" is no activation"),
        ] {
            let error = read(more).unwrap_err().to_string();
            assert!(error.contains(said), "{said}: {error}");
        }
    }
}
