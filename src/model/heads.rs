//! What a task puts on top of a family, written in the same vocabulary.

use crate::Result;
use crate::model::bert::{bert, pooler};
use crate::model::config::Family;
use crate::model::ops::{At, Ops, Pick};

/// One row of scores a sequence, (B, labels): `transformers`' `…ForSequenceClassification`.
pub fn sequence_classification<O: Ops>(o: &O, family: &Family, labels: usize) -> Result<O::X> {
    match family {
        Family::Bert(c) => {
            let x = bert(o, &At::body("bert"), c, Some(Pick::First))?;
            let x = pooler(o, &x, c)?;
            let x = o.dropout(&x, c.classifier_dropout.unwrap_or(c.hidden_dropout_prob))?;
            o.linear(At::head("classifier").linear(c.hidden_size, labels), &x)
        }
    }
}
