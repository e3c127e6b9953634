//! What a task puts on top of a family, written in the same vocabulary.

use crate::model::bert::{bert, pooler};
use crate::model::config::Family;
use crate::model::gpt2::{gpt2, words};
use crate::model::ops::{At, Ops, Pick};
use crate::{Result, bail_unusable};

/// One row of scores a sequence, (B, labels): `transformers`' `…ForSequenceClassification`.
pub fn sequence_classification<O: Ops>(o: &O, family: &Family, labels: usize) -> Result<O::X> {
    match family {
        Family::Bert(c) => {
            let x = bert(o, &At::body("bert"), c, Some(Pick::First))?;
            let x = pooler(o, &x, c)?;
            let x = o.dropout(&x, c.classifier_dropout.unwrap_or(c.hidden_dropout_prob))?;
            o.linear(At::head("classifier").linear(c.hidden_size, labels), &x)
        }
        Family::Gpt2(c) => {
            let x = gpt2(o, &At::body("transformer"), c, Some(Pick::Last))?;
            o.linear(At::head("score").linear(c.n_embd, labels).without_bias(), &x)
        }
    }
}

/// A row of scores of the next token for every token, (T, V), or for one token of every sequence alone: `transformers`'
/// `…LMHeadModel`. The head is the table of words.
///
/// # Errors
/// The family predicts no next token.
pub fn causal_lm<O: Ops>(o: &O, family: &Family, wanted: Option<Pick>) -> Result<O::X> {
    match family {
        Family::Gpt2(c) => {
            let at = At::body("transformer");
            let x = gpt2(o, &at, c, wanted)?;
            o.linear(words(&at, c).tied(), &x)
        }
        Family::Bert(_) => bail_unusable!(
            "causal-lm needs a model that predicts the next token (model_type gpt2); a bert sees every token at once"
        ),
    }
}
