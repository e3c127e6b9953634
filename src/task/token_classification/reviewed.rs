//! Sentences' predicted tags beside the wanted ones → what people look at.

use std::collections::BTreeMap;

use anyhow::Context;

use super::entities::{self, Entity};
use super::scheme::Scheme;
use super::{Predicted, Sentence, TokenClassification, read};
use crate::Result;
use crate::task::review::{Review, Row, Source, Wrong};

impl TokenClassification {
    /// What there is to see of the predictions.
    ///
    /// # Errors
    /// The records are others than those that were predicted.
    pub(super) fn reviewed(&self, sentences: &BTreeMap<usize, Predicted>, of: Source) -> Result<Review> {
        let records = read(of.files, of.records)?;
        let mut counts: BTreeMap<String, [usize; 3]> = BTreeMap::new();
        let mut wrong = Vec::new();
        for (&at, predicted) in sentences {
            let (gold, found) = self.tags(predicted);
            let record = records.get(at).filter(|record| record.tokens.len() == gold.len());
            let record = record.context("the records have changed")?;
            let (gold, found) = (self.marked(&gold), self.marked(&found));
            for part in &found {
                let [right, all, _] = counts.entry(part.kind.clone()).or_default();
                *all += 1;
                *right += usize::from(gold.contains(part));
            }
            for part in &gold {
                counts.entry(part.kind.clone()).or_default()[2] += 1;
            }
            let (gold, found) = match self.scheme {
                Scheme::None => (without(&gold, &found), without(&found, &gold)), // the others are right
                _ => (gold, found),
            };
            if gold != found {
                wrong.push(Wrong {
                    line: record.place.line,
                    text: record.tokens.join(" "),
                    wanted: shown(&gold, record),
                    found: shown(&found, record),
                    loss: predicted.loss,
                    ..Wrong::default()
                });
            }
        }
        let row = |(kind, [right, predicted, support]): (&String, &[usize; 3])| {
            Row::new(kind, *right, *predicted, *support)
        };
        let rows_of = if self.scheme == Scheme::None { "tag" } else { "type" };
        Ok(Review { rows: counts.iter().map(row).collect(), rows_of, ..Review::default() }.with_wrong(wrong))
    }

    /// The entities of a sentence, or each word by its tag where tags mark none.
    fn marked(&self, tags: &[&str]) -> Vec<Entity> {
        match self.scheme {
            Scheme::None => (0..)
                .zip(tags)
                .map(|(at, tag)| Entity { kind: (*tag).to_owned(), start: at, end: at + 1 })
                .collect(),
            _ => entities::lenient(tags),
        }
    }
}

/// Entities that are not among others.
fn without(entities: &[Entity], others: &[Entity]) -> Vec<Entity> {
    entities.iter().filter(|entity| !others.contains(entity)).cloned().collect()
}

/// Entities as they are read: their types and words.
fn shown(entities: &[Entity], of: &Sentence) -> String {
    let one = |entity: &Entity| format!("{}: {}", entity.kind, of.tokens[entity.start..entity.end].join(" "));
    if entities.is_empty() {
        "none".to_owned()
    } else {
        entities.iter().map(one).collect::<Vec<_>>().join("; ")
    }
}
