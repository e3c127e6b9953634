//! Gold and predicted tags → metrics, defined as seqeval defines them.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::entities::{self, Entity};
use super::scheme::Scheme;

/// How well some entities, or words of one class, were found. 0 where nothing could be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Scores {
    pub precision: f64,
    pub recall: f64,
    pub f1: f64,
}

/// [`Scores`] of one type, and how many of it there are in the gold tags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Row {
    #[serde(flatten)]
    pub scores: Scores,
    pub support: usize,
}

/// What `tk eval` says of token classification.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct EntityMetrics {
    /// Of entities, all types together: seqeval's `precision_score`, `recall_score` and `f1_score`. Plain classes
    /// have none.
    #[serde(flatten)]
    pub entities: Option<Scores>,
    /// The part of words with the right tag.
    pub accuracy: f64,
    /// A row a type; of plain classes, a row a tag.
    pub per_type: BTreeMap<String, Row>,
    /// As `entities`, with seqeval's `mode="strict"`: only entities that keep to the scheme count.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub strict: Option<Scores>,
}

/// Scores predictions against the tags of all words. What was not predicted is given as
/// [`OUTSIDE`](super::scheme::OUTSIDE): an entity there is missed.
///
/// # Panics
/// Sentences, or words of a sentence, that are not as many on both sides.
pub fn score(gold: &[Vec<&str>], predicted: &[Vec<&str>], scheme: Scheme) -> EntityMetrics {
    assert_eq!(gold.len(), predicted.len(), "sentences");
    for (gold, predicted) in gold.iter().zip(predicted) {
        assert_eq!(gold.len(), predicted.len(), "words of a sentence");
    }
    let words = || gold.iter().flatten().zip(predicted.iter().flatten());
    let right = words().filter(|(gold, predicted)| gold == predicted).count();
    let accuracy = ratio(right, words().count());
    if scheme == Scheme::None {
        let per_type = Counts::by_class(words().map(|(gold, predicted)| (*gold, *predicted)));
        return EntityMetrics { accuracy, per_type: rows(per_type), ..EntityMetrics::default() };
    }
    let counts = Counts::by_type(&entities::of_all(gold), &entities::of_all(predicted));
    let strict = |tags: &[Vec<&str>]| -> BTreeSet<Entity> {
        let mut offset = 0;
        let mut found = BTreeSet::new();
        for sentence in tags {
            let here = entities::strict(sentence, scheme).into_iter();
            found.extend(here.map(|e| Entity { start: e.start + offset, end: e.end + offset, ..e }));
            offset += sentence.len() + 1;
        }
        found
    };
    EntityMetrics {
        entities: Some(Counts::sum(&counts).scores()),
        accuracy,
        per_type: rows(counts),
        strict: Some(Counts::sum(&Counts::by_type(&strict(gold), &strict(predicted))).scores()),
    }
}

/// Right ones, all that were predicted, all that are gold.
#[derive(Clone, Copy, Default)]
struct Counts {
    right: usize,
    predicted: usize,
    gold: usize,
}

impl Counts {
    fn by_type(gold: &BTreeSet<Entity>, predicted: &BTreeSet<Entity>) -> BTreeMap<String, Self> {
        let mut counts: BTreeMap<String, Self> = BTreeMap::new();
        for entity in gold {
            let count = counts.entry(entity.kind.clone()).or_default();
            count.gold += 1;
            count.right += usize::from(predicted.contains(entity));
        }
        for entity in predicted {
            counts.entry(entity.kind.clone()).or_default().predicted += 1;
        }
        counts
    }

    fn by_class<'a>(words: impl Iterator<Item = (&'a str, &'a str)>) -> BTreeMap<String, Self> {
        let mut counts: BTreeMap<&str, Self> = BTreeMap::new();
        for (gold, predicted) in words {
            counts.entry(predicted).or_default().predicted += 1;
            let count = counts.entry(gold).or_default();
            count.gold += 1;
            count.right += usize::from(gold == predicted);
        }
        counts.into_iter().map(|(tag, count)| (tag.to_owned(), count)).collect()
    }

    fn sum(counts: &BTreeMap<String, Self>) -> Self {
        counts.values().fold(Self::default(), |a, b| Self {
            right: a.right + b.right,
            predicted: a.predicted + b.predicted,
            gold: a.gold + b.gold,
        })
    }

    fn scores(self) -> Scores {
        let (precision, recall) = (ratio(self.right, self.predicted), ratio(self.right, self.gold));
        let sum = precision + recall;
        Scores { precision, recall, f1: if sum == 0.0 { 0.0 } else { 2.0 * precision * recall / sum } }
    }
}

fn rows(counts: BTreeMap<String, Counts>) -> BTreeMap<String, Row> {
    counts
        .into_iter()
        .map(|(kind, count)| (kind, Row { scores: count.scores(), support: count.gold }))
        .collect()
}

fn ratio(part: usize, whole: usize) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Case = (
        Scheme,
        &'static str,
        &'static str,
        [f64; 3],
        f64,
        [f64; 3],
        &'static [(&'static str, f64, f64, f64, usize)],
    );

    /// Gold, predicted, seqeval's precision, recall and F1, accuracy, the same with `mode="strict"`, and the rows of
    /// its `classification_report`.
    const SEQEVAL: &[Case] = &[
        (
            Scheme::Iob2,
            "O O O B-MISC I-MISC I-MISC O|B-PER I-PER O",
            "O O B-MISC I-MISC I-MISC I-MISC O|B-PER I-PER O",
            [0.5, 0.5, 0.5],
            0.8,
            [0.5, 0.5, 0.5],
            &[("MISC", 0.0, 0.0, 0.0, 1), ("PER", 1.0, 1.0, 1.0, 1)],
        ),
        (
            Scheme::Iob2,
            "B-PER I-PER O B-LOC|B-ORG B-ORG",
            "I-PER I-PER O B-LOC|B-ORG I-ORG",
            [0.6666666666666666, 0.5, 0.5714285714285715],
            0.6666666666666666,
            [0.5, 0.25, 0.3333333333333333],
            &[("LOC", 1.0, 1.0, 1.0, 1), ("ORG", 0.0, 0.0, 0.0, 2), ("PER", 1.0, 1.0, 1.0, 1)],
        ),
        (
            Scheme::Iob1,
            "I-PER I-PER B-PER O I-LOC",
            "I-PER B-PER I-PER O B-LOC",
            [0.3333333333333333, 0.3333333333333333, 0.3333333333333333],
            0.4,
            [0.0, 0.0, 0.0],
            &[("LOC", 1.0, 1.0, 1.0, 1), ("PER", 0.0, 0.0, 0.0, 2)],
        ),
        (
            Scheme::Io,
            "I-PER I-PER I-LOC O|I-PER",
            "I-PER O I-LOC O|I-PER",
            [0.6666666666666666, 0.6666666666666666, 0.6666666666666666],
            0.8,
            [0.6666666666666666, 0.6666666666666666, 0.6666666666666666],
            &[("LOC", 1.0, 1.0, 1.0, 1), ("PER", 0.5, 0.5, 0.5, 2)],
        ),
        (
            Scheme::Bioes,
            "B-PER I-PER E-PER S-LOC O S-LOC",
            "B-PER I-PER I-PER S-LOC O E-LOC",
            [1.0, 1.0, 1.0],
            0.6666666666666666,
            [1.0, 0.3333333333333333, 0.5],
            &[("LOC", 1.0, 1.0, 1.0, 2), ("PER", 1.0, 1.0, 1.0, 1)],
        ),
        (
            Scheme::Bioes,
            "U-PER U-PER O B-LOC L-LOC",
            "U-PER O O B-LOC I-LOC",
            [0.5, 0.5, 0.5],
            0.6,
            [1.0, 0.3333333333333333, 0.5],
            &[("LOC", 1.0, 1.0, 1.0, 1), ("PER", 0.0, 0.0, 0.0, 1)],
        ),
        (Scheme::Iob2, "O O", "O O", [0.0, 0.0, 0.0], 1.0, [0.0, 0.0, 0.0], &[]),
        (
            Scheme::Iob2,
            "O B-A-B",
            "B-X B-A-B",
            [0.5, 1.0, 0.6666666666666666],
            0.5,
            [0.5, 1.0, 0.6666666666666666],
            &[("A-B", 1.0, 1.0, 1.0, 1), ("X", 0.0, 0.0, 0.0, 0)],
        ),
    ];

    fn sentences(text: &str) -> Vec<Vec<&str>> {
        text.split('|').map(|tags| tags.split(' ').collect()).collect()
    }

    #[test]
    fn scores_are_seqevals_to_the_last_bit() {
        let of = |[precision, recall, f1]: [f64; 3]| Some(Scores { precision, recall, f1 });
        for (scheme, gold, predicted, entities, accuracy, strict, rows) in SEQEVAL.iter().copied() {
            let row = |&(kind, precision, recall, f1, support): &(&str, _, _, _, _)| {
                (kind.to_owned(), Row { scores: Scores { precision, recall, f1 }, support })
            };
            let per_type = rows.iter().map(row).collect();
            let expected = EntityMetrics { entities: of(entities), accuracy, per_type, strict: of(strict) };
            assert_eq!(score(&sentences(gold), &sentences(predicted), scheme), expected, "{gold}");
        }
    }

    #[test]
    fn entities_without_a_prediction_are_missed() {
        let metrics = score(&sentences("B-PER I-PER O B-LOC"), &sentences("B-PER I-PER O O"), Scheme::Iob2);
        assert_eq!(metrics.entities.map(|scores| (scores.precision, scores.recall)), Some((1.0, 0.5)));
        assert_eq!(metrics.per_type["LOC"], Row { support: 1, ..Row::default() });
    }

    #[test]
    fn plain_classes_have_accuracy_and_a_row_a_tag() {
        let metrics = score(&sentences("NOUN VERB|NOUN DET"), &sentences("NOUN NOUN|NOUN ADV"), Scheme::None);
        let json = serde_json::to_string(&metrics).unwrap();
        assert_eq!(
            json,
            concat!(
                r#"{"accuracy":0.5,"per_type":{"ADV":{"precision":0.0,"recall":0.0,"f1":0.0,"support":0},"#,
                r#""DET":{"precision":0.0,"recall":0.0,"f1":0.0,"support":1},"#,
                r#""NOUN":{"precision":0.6666666666666666,"recall":1.0,"f1":0.8,"support":2},"#,
                r#""VERB":{"precision":0.0,"recall":0.0,"f1":0.0,"support":1}}}"#
            )
        );
    }

    #[test]
    fn the_keys_are_precision_recall_f1_accuracy_per_type_strict() {
        let json = serde_json::to_value(score(&sentences("B-A"), &sentences("B-A"), Scheme::Iob2)).unwrap();
        let keys: Vec<_> = json.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, ["precision", "recall", "f1", "accuracy", "per_type", "strict"]);
    }
}
