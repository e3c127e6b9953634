//! BERT (Devlin et al. 2018, arXiv:1810.04805), post-norm encoder, over the vocabulary.

use crate::Result;
use crate::model::config::BertConfig;
use crate::model::ops::{Activation, At, Attend, Ids, Ops, Pick, Sees};

/// Token ids → hidden states, one (C) a token, or of one token of every sequence alone: then the last layer computes
/// nothing for the others but their keys and values.
pub fn bert<O: Ops>(o: &O, at: &At, c: &BertConfig, wanted: Option<Pick>) -> Result<O::X> {
    let mut x = embeddings(o, &at.to("embeddings"), c)?;
    for i in 0..c.num_hidden_layers {
        let is_last = i + 1 == c.num_hidden_layers;
        x = layer(o, &at.to("encoder.layer").item(i), c, &x, wanted.filter(|_| is_last))?;
    }
    match wanted {
        Some(which) if c.num_hidden_layers == 0 => o.pick(&x, which),
        _ => Ok(x),
    }
}

fn embeddings<O: Ops>(o: &O, at: &At, c: &BertConfig) -> Result<O::X> {
    let width = c.hidden_size;
    let words = o.embed(at.to("word_embeddings").table(c.vocab_size, width), Ids::Tokens)?;
    let types = o.embed(at.to("token_type_embeddings").table(c.type_vocab_size, width), Ids::TokenTypes)?;
    let places =
        o.embed(at.to("position_embeddings").table(c.max_position_embeddings, width), Ids::Positions)?;
    let x = o.add(&o.add(&words, &types)?, &places)?;
    let x = o.layer_norm(at.to("LayerNorm").norm(width, c.layer_norm_eps), &x)?;
    let x = o.dropout(&x, c.hidden_dropout_prob)?;
    o.tap(at.path(), x)
}

fn layer<O: Ops>(o: &O, at: &At, c: &BertConfig, x: &O::X, wanted: Option<Pick>) -> Result<O::X> {
    let x = attention(o, &at.to("attention"), c, x, wanted)?;
    let (width, inner) = (c.hidden_size, c.intermediate_size);
    let h = o.linear(at.to("intermediate.dense").linear(width, inner), &x)?;
    let h = o.activate(&h, c.hidden_act)?;
    let h = o.linear(at.to("output.dense").linear(inner, width), &h)?;
    let h = o.dropout(&h, c.hidden_dropout_prob)?;
    let x = o.layer_norm(at.to("output.LayerNorm").norm(width, c.layer_norm_eps), &o.add(&h, &x)?)?;
    o.tap(at.path(), x)
}

fn attention<O: Ops>(o: &O, at: &At, c: &BertConfig, x: &O::X, wanted: Option<Pick>) -> Result<O::X> {
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
pub fn pooler<O: Ops>(o: &O, x: &O::X, c: &BertConfig) -> Result<O::X> {
    let x = o.linear(At::head("bert").to("pooler.dense").linear(c.hidden_size, c.hidden_size), x)?;
    let x = o.activate(&x, Activation::Tanh)?;
    o.tap("bert.pooler", x)
}
