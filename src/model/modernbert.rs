//! ModernBERT (Warner et al. 2024, arXiv:2412.13663), pre-norm encoder with rotary positions, windows in most layers and
//! gated feed-forward networks, over the vocabulary.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::Result;
use crate::data::tokens::Vocabulary;
use crate::model::config::{Findings, activation, checked, default};
use crate::model::family::{Architecture, Head, Limits, Names};
use crate::model::ops::{
    Activation, At, Attend, Distances, Ids, Linear, Norm, Ops, Pick, Pooling, Sees, Table,
};

/// The configuration. Field names and defaults are `transformers.ModernBertConfig`'s; what version 5 writes of layers and
/// rotary positions is read too.
#[derive(Clone, Debug, Deserialize)]
pub struct ModernBert {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub intermediate_size: usize,
    pub max_position_embeddings: usize,
    #[serde(default = "default::gelu", deserialize_with = "activation")]
    pub hidden_activation: Activation,
    #[serde(default = "default::fiftieth")]
    pub initializer_range: f64,
    #[serde(default = "default::eps_1e_5")]
    pub norm_eps: f64,
    #[serde(default)]
    pub norm_bias: bool,
    #[serde(default)]
    pub attention_bias: bool,
    #[serde(default)]
    pub mlp_bias: bool,
    #[serde(default)]
    pub classifier_bias: bool,
    #[serde(default = "yes")]
    pub decoder_bias: bool,
    #[serde(default)]
    pub embedding_dropout: f32,
    #[serde(default)]
    pub attention_dropout: f32,
    #[serde(default)]
    pub mlp_dropout: f32,
    #[serde(default)]
    pub classifier_dropout: f32,
    #[serde(default = "default::gelu", deserialize_with = "activation")]
    pub classifier_activation: Activation,
    /// What of a text its label is found in.
    #[serde(default)]
    pub classifier_pooling: Pooled,
    /// How far apart the first and the last token are that a token sees in a layer with a window.
    #[serde(default = "window")]
    pub local_attention: usize,
    #[serde(default = "three")]
    global_attn_every_n_layers: usize,
    /// The layers' kinds, where version 5 has written them.
    #[serde(default)]
    layer_types: Option<Vec<LayerKind>>,
    #[serde(default = "far")]
    global_rope_theta: f64,
    /// `global_rope_theta` where it is null.
    #[serde(default = "near")]
    local_rope_theta: Option<f64>,
    /// The same by the layers' kinds, where version 5 has written them.
    #[serde(default)]
    rope_parameters: Option<RopeOfKinds>,
}

/// What of a text its label is found in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pooled {
    /// Its first token.
    #[default]
    Cls,
    /// The mean of all its tokens.
    Mean,
}

/// What a layer's tokens see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
enum LayerKind {
    #[serde(rename = "full_attention")]
    Full,
    #[serde(rename = "sliding_attention")]
    Sliding,
}

/// Rotary positions as version 5 writes them.
#[derive(Clone, Debug, Deserialize)]
struct RopeOfKinds {
    full_attention: Rope,
    sliding_attention: Rope,
}

#[derive(Clone, Debug, Deserialize)]
struct Rope {
    rope_theta: f64,
    #[serde(default, alias = "type")]
    rope_type: Option<String>,
}

fn yes() -> bool {
    true
}

fn three() -> usize {
    3
}

fn window() -> usize {
    128
}

fn far() -> f64 {
    160_000.0
}

fn near() -> Option<f64> {
    Some(10_000.0)
}

impl Architecture for ModernBert {
    const MODEL_TYPES: &'static [&'static str] = &["modernbert"];
    const LORA_TARGETS: &'static [&'static str] = &["Wqkv"];
    const DROPOUTS: &'static [&'static str] =
        &["embedding_dropout", "attention_dropout", "mlp_dropout", "classifier_dropout"];
    const VOCABULARY: Vocabulary = Vocabulary::Roberta;

    fn read(raw: &Map<String, Value>) -> Result<Self> {
        checked(raw, |c: &Self, found| {
            found.rows("vocab_size", c.vocab_size);
            found.heads(("hidden_size", c.hidden_size), ("num_attention_heads", c.num_attention_heads));
            found.layers("num_hidden_layers", c.num_hidden_layers);
            found.channels("intermediate_size", c.intermediate_size);
            found.rows("max_position_embeddings", c.max_position_embeddings);
            found.small("initializer_range", c.initializer_range);
            found.small("norm_eps", c.norm_eps);
            let dropouts = [c.embedding_dropout, c.attention_dropout, c.mlp_dropout, c.classifier_dropout];
            Self::DROPOUTS.iter().zip(dropouts).for_each(|(field, p)| found.probability(field, p));
            c.check_layers(found);
            c.check_rope(raw, found);
        })
    }

    fn names(&self) -> Names {
        Names { prefix: "model.", parts: &["embeddings.", "layers.", "final_norm."], buffers: &["inv_freq"] }
    }

    fn limits(&self) -> Limits {
        Limits {
            channels: self.hidden_size,
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
            _ => Some(format!("ModernBert{}", head.suffix())),
        }
    }

    fn define<O: Ops>(&self, o: &O, head: Head) -> Result<Vec<O::X>> {
        let scores = match head {
            Head::SequenceClassification { labels } => {
                let x = match self.classifier_pooling {
                    Pooled::Cls => body(o, self, Some(Pick::First))?,
                    Pooled::Mean => o.pool(&body(o, self, None)?, Pooling::Mean)?,
                };
                labelled(o, self, &x, labels)?
            }
            Head::TokenClassification { labels } => labelled(o, self, &body(o, self, None)?, labels)?,
            Head::QuestionAnswering => labelled(o, self, &body(o, self, None)?, 2)?,
            Head::MaskedLm => {
                let x = predicted(o, self, &o.pick(&body(o, self, None)?, Pick::Asked)?)?;
                let map = words(self).tied();
                let bias = self.decoder_bias.then(|| At::head("decoder").bias(self.vocab_size));
                o.linear(Linear { bias, ..map }, &x)?
            }
            Head::Embedding { wanted } => body(o, self, wanted)?,
            Head::CausalLm { .. } | Head::NextSentence | Head::PreTraining => {
                return Err(head.refused("modernbert"));
            }
        };
        Ok(vec![scores])
    }
}

impl ModernBert {
    fn check_layers(&self, found: &mut Findings) {
        if self.global_attn_every_n_layers == 0 {
            found.say("global_attn_every_n_layers is 0".to_owned());
        }
        if let Some(kinds) = &self.layer_types
            && kinds.len() != self.num_hidden_layers
        {
            found.say(format!(
                "layer_types has {} layers, num_hidden_layers is {}",
                kinds.len(),
                self.num_hidden_layers
            ));
        }
    }

    fn check_rope(&self, raw: &Map<String, Value>, found: &mut Findings) {
        for (kind, field) in
            [(LayerKind::Full, "global_rope_theta"), (LayerKind::Sliding, "local_rope_theta")]
        {
            let theta = self.theta(kind);
            if !(theta.is_finite() && theta >= 1.0) {
                found.say(format!("{field} (or rope_theta) is {theta}, expected a number of at least 1"));
            }
        }
        let d = self.hidden_size.checked_div(self.num_attention_heads).unwrap_or(0);
        if !d.is_multiple_of(2) {
            found.say(format!("a head has {d} channels, which are turned by two: expected an even number"));
        }
        let kinds =
            self.rope_parameters.iter().flat_map(|kinds| [&kinds.full_attention, &kinds.sliding_attention]);
        let mut scaled: Vec<String> = kinds.filter_map(|rope| rope.rope_type.clone()).collect();
        if let Some(scaling) = raw.get("rope_scaling").filter(|scaling| !scaling.is_null()) {
            let named = scaling.get("rope_type").or_else(|| scaling.get("type")).and_then(Value::as_str);
            scaled.push(named.map_or_else(|| scaling.to_string(), str::to_owned));
        }
        scaled.retain(|kind| kind != "default");
        scaled.dedup();
        for kind in scaled {
            found.say(format!("the rotary positions' type is {kind}; tk runs \"default\""));
        }
    }

    /// What the `index`-th layer's tokens see.
    fn kind(&self, index: usize) -> LayerKind {
        match &self.layer_types {
            Some(kinds) => kinds[index],
            None if index.is_multiple_of(self.global_attn_every_n_layers) => LayerKind::Full,
            None => LayerKind::Sliding,
        }
    }

    fn theta(&self, kind: LayerKind) -> f64 {
        match (&self.rope_parameters, kind) {
            (Some(kinds), LayerKind::Full) => kinds.full_attention.rope_theta,
            (Some(kinds), LayerKind::Sliding) => kinds.sliding_attention.rope_theta,
            (None, LayerKind::Full) => self.global_rope_theta,
            (None, LayerKind::Sliding) => self.local_rope_theta.unwrap_or(self.global_rope_theta),
        }
    }

    fn norm(&self, at: &At) -> Norm {
        at.norm(self.hidden_size, self.norm_eps).biased(self.norm_bias)
    }
}

/// The table of tokens, whose weight the head of masked words shares.
fn words(c: &ModernBert) -> Table {
    At::body("model").to("embeddings.tok_embeddings").table(c.vocab_size, c.hidden_size)
}

/// Hidden states → what every head begins with.
fn predicted<O: Ops>(o: &O, c: &ModernBert, x: &O::X) -> Result<O::X> {
    let (at, width) = (At::head("head"), c.hidden_size);
    let dense = at.to("dense").linear(width, width).biased(c.classifier_bias).one_of(2 * c.num_hidden_layers);
    let x = o.activate(&o.linear(dense, x)?, c.classifier_activation)?;
    o.layer_norm(c.norm(&at.to("norm")), &x)
}

/// Hidden states → scores of labels.
fn labelled<O: Ops>(o: &O, c: &ModernBert, x: &O::X, labels: usize) -> Result<O::X> {
    let x = o.dropout(&predicted(o, c, x)?, c.classifier_dropout)?;
    o.linear(At::labels("classifier").linear(c.hidden_size, labels), &x)
}

/// Token ids → hidden states behind the last norm, one (C) a token, or of one token of every sequence alone: then the
/// last layer computes nothing for the others but their keys and values.
fn body<O: Ops>(o: &O, c: &ModernBert, wanted: Option<Pick>) -> Result<O::X> {
    let at = At::body("model");
    let x = o.layer_norm(c.norm(&at.to("embeddings.norm")), &o.embed(words(c), Ids::Tokens)?)?;
    let mut x = o.tap("model.embeddings", o.dropout(&x, c.embedding_dropout)?)?;
    for i in 0..c.num_hidden_layers {
        let is_last = i + 1 == c.num_hidden_layers;
        x = layer(o, &at.to("layers").item(i), c, i, &x, wanted.filter(|_| is_last))?;
    }
    if let (Some(which), 0) = (wanted, c.num_hidden_layers) {
        x = o.pick(&x, which)?;
    }
    let at = at.to("final_norm");
    let x = o.layer_norm(c.norm(&at), &x)?;
    o.tap(at.path(), x)
}

fn layer<O: Ops>(
    o: &O,
    at: &At,
    c: &ModernBert,
    index: usize,
    x: &O::X,
    wanted: Option<Pick>,
) -> Result<O::X> {
    let (width, inner, summands) = (c.hidden_size, c.intermediate_size, 2 * c.num_hidden_layers);
    let h = attention(o, at, c, index, x, wanted)?;
    let x = match wanted {
        Some(which) => &o.pick(x, which)?,
        None => x,
    };
    let x = o.add(&h, x)?;
    let h = o.layer_norm(c.norm(&at.to("mlp_norm")), &x)?;
    let h = o.linear(at.to("mlp.Wi").linear(width, 2 * inner).biased(c.mlp_bias), &h)?;
    let h = o.dropout(&o.gated(&h, c.hidden_activation)?, c.mlp_dropout)?;
    let h = o.linear(at.to("mlp.Wo").linear(inner, width).biased(c.mlp_bias).one_of(summands), &h)?;
    o.tap(at.path(), o.add(&h, &x)?)
}

/// What attention adds to the residual stream.
fn attention<O: Ops>(
    o: &O,
    at: &At,
    c: &ModernBert,
    index: usize,
    x: &O::X,
    wanted: Option<Pick>,
) -> Result<O::X> {
    let width = c.hidden_size;
    // the embeddings have a norm of their own
    let h = if index == 0 { x.clone() } else { o.layer_norm(c.norm(&at.to("attn_norm")), x)? };
    let at = at.to("attn");
    let h = o.linear(at.to("Wqkv").linear(width, 3 * width).biased(c.attention_bias), &h)?;
    let h = o.split(&h, 3)?;
    let asking = match wanted {
        Some(which) => &o.pick(&h[0], which)?,
        None => &h[0],
    };
    let kind = c.kind(index);
    let sees = match kind {
        LayerKind::Full => Sees::All,
        LayerKind::Sliding => Sees::Near { reach: c.local_attention / 2 },
    };
    let how = Attend { heads: c.num_attention_heads, sees, queries: wanted, dropout: c.attention_dropout };
    let distances = Distances::Rotary { theta: c.theta(kind) };
    let h = o.attention_by_distance(asking, &h[1], &h[2], how, distances)?;
    let h = o.linear(
        at.to("Wo").linear(width, width).biased(c.attention_bias).one_of(2 * c.num_hidden_layers),
        &h,
    )?;
    o.dropout(&h, c.attention_dropout)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(more: Value) -> Result<ModernBert> {
        let mut raw = json!({
            "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2,
            "intermediate_size": 8, "max_position_embeddings": 16,
        });
        raw.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        ModernBert::read(raw.as_object().unwrap())
    }

    fn layers(c: &ModernBert) -> Vec<(bool, f64)> {
        (0..c.num_hidden_layers).map(|i| (c.kind(i) == LayerKind::Full, c.theta(c.kind(i)))).collect()
    }

    #[test]
    fn layers_are_those_that_transformers_4_and_5_write() {
        let four =
            json!({"global_rope_theta": 500.0, "local_rope_theta": 20.0, "global_attn_every_n_layers": 2});
        let expected = [(true, 500.0), (false, 20.0), (true, 500.0), (false, 20.0)];
        assert_eq!(layers(&read(four).unwrap()), expected);
        let kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"];
        let five = json!({"layer_types": kinds, "rope_parameters": {
            "full_attention": {"rope_theta": 500.0, "rope_type": "default"},
            "sliding_attention": {"rope_theta": 20.0, "rope_type": "default"}}});
        assert_eq!(layers(&read(five).unwrap()), expected);
        let defaults = layers(&read(json!({"local_rope_theta": null})).unwrap());
        assert_eq!(defaults, [(true, 160_000.0), (false, 160_000.0), (false, 160_000.0), (true, 160_000.0)]);
    }

    #[test]
    fn what_tk_does_not_run_is_named() {
        for (more, said) in [
            (json!({"rope_scaling": {"type": "yarn"}}), "the rotary positions' type is yarn"),
            (json!({"layer_types": ["full_attention"]}), "layer_types has 1 layers, num_hidden_layers is 4"),
            (json!({"layer_types": ["causal"]}), "layer_types[0]: unknown variant `causal`"),
            (json!({"global_attn_every_n_layers": 0}), "global_attn_every_n_layers is 0"),
            (json!({"num_attention_heads": 8}), "a head has 1 channels"),
            (json!({"num_attention_heads": 0}), "num_attention_heads is 0"),
            (json!({"global_rope_theta": 0.0}), "global_rope_theta (or rope_theta) is 0"),
            (json!({"classifier_pooling": "max"}), "classifier_pooling: unknown variant `max`"),
            (
                json!({"rope_parameters": {"rope_theta": 1e4}}),
                "rope_parameters: missing field `full_attention`",
            ),
        ] {
            let error = read(more).unwrap_err().to_string();
            assert!(error.contains(said), "{said}: {error}");
        }
    }
}
