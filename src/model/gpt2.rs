//! GPT-2 (Radford et al. 2019), pre-norm causal decoder, over the vocabulary.

use crate::Result;
use crate::model::config::Gpt2Config;
use crate::model::ops::{At, Attend, Ids, Ops, Pick, Sees, Table};

/// Token ids → hidden states behind the last layer norm, one (C) a token, or of one token of every sequence alone:
/// then the last layer computes nothing for the others but their keys and values.
pub fn gpt2<O: Ops>(o: &O, at: &At, c: &Gpt2Config, wanted: Option<Pick>) -> Result<O::X> {
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
pub fn words(at: &At, c: &Gpt2Config) -> Table {
    at.to("wte").table(c.vocab_size, c.n_embd)
}

fn block<O: Ops>(o: &O, at: &At, c: &Gpt2Config, x: &O::X, wanted: Option<Pick>) -> Result<O::X> {
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
fn attention<O: Ops>(o: &O, at: &At, c: &Gpt2Config, x: &O::X, wanted: Option<Pick>) -> Result<O::X> {
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
