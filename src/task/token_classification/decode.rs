//! Predictions of tokens → entities, as transformers' `TokenClassificationPipeline` makes them.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::scheme::{OUTSIDE, Scheme, split};
use crate::data::offsets::OffsetUnit;
use crate::task::scores::{serialize_short, softmax};

/// `--aggregation`: how tokens become entities. The names and their meaning are transformers'.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Aggregation {
    /// Every token outside O is an answer, under its whole label.
    None,
    /// Neighbours of one type are an entity; B- begins another.
    Simple,
    /// As `simple`, but of words: each has the label of its first token.
    #[default]
    First,
    /// As `first`, with the label that is the likeliest in the mean of the word's tokens.
    Average,
    /// As `first`, with the label of the word's surest token.
    Max,
}

/// A token of a text and what the model says of it. Special tokens are none.
#[derive(Clone, Debug)]
pub struct Piece<'a> {
    /// Its bytes of the text.
    pub span: Range<usize>,
    /// Whether it goes on with the word of the token before: see [`continues`] for texts; for words given as such,
    /// whether it is of the same one.
    pub continues: bool,
    /// Which word of the record it is of, where `tags` are asked for.
    pub word: Option<usize>,
    /// A number a label.
    pub logits: &'a [f32],
}

/// Whether a token goes on with a word, as transformers' pipeline decides it. With a vocabulary that marks such
/// tokens (`##` in WordPiece's, the tokenizer's `continuing_subword_prefix`), where the token is not as long as what
/// it stands for; otherwise where no space stands before it. An unknown token begins a word.
pub fn continues(text: &str, span: &Range<usize>, token: &str, marks: bool, unknown: bool) -> bool {
    if unknown {
        return false;
    }
    let span = widened(text, span);
    if marks {
        return token.chars().count() != text[span].chars().count();
    }
    let before = text[..span.start].chars().next_back();
    let first = text[span.start..].chars().next();
    before.is_some_and(|before| before != ' ' && first != Some(' '))
}

/// An entity in a text, or where nothing is aggregated a token.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = Entity)]
pub struct Found {
    /// The type, or a token's label.
    pub entity: String,
    /// What stands there, letter by letter.
    pub text: String,
    /// Where it begins, in characters.
    pub start: usize,
    /// Behind its last character.
    pub end: usize,
    /// The mean probability of its tokens, or words.
    #[serde(serialize_with = "serialize_short")]
    pub score: f32,
}

/// The entities of a text, in order. `labels` are the model's, by id; every piece has a finite logit for each.
/// Where the `scheme` is BIOES, its prefixes begin and end entities; in all else, B- and I- do, as in transformers.
pub fn entities(
    text: &str,
    pieces: &[Piece],
    labels: &[String],
    scheme: Scheme,
    aggregation: Aggregation,
    unit: OffsetUnit,
) -> Vec<Found> {
    let words = words(pieces, aggregation);
    let mut found: Vec<Found> = match aggregation {
        Aggregation::None => {
            words.iter().map(|word| (labels[word.label].as_str(), word.span.clone(), word.score)).collect()
        }
        _ => grouped(&words, labels, scheme),
    }
    .into_iter()
    .filter(|(entity, ..)| *entity != OUTSIDE)
    .map(|(entity, span, score)| {
        let span = widened(text, &span);
        Found {
            entity: entity.to_owned(),
            text: text[span.clone()].to_owned(),
            start: span.start,
            end: span.end,
            score,
        }
    })
    .collect();
    let mut places: Vec<&mut usize> =
        found.iter_mut().flat_map(|one| [&mut one.start, &mut one.end]).collect();
    unit.convert(text, &mut places);
    found
}

/// The label id of each of `count` words: of its first token, or by [`Aggregation::Average`] or [`Aggregation::Max`]
/// of all its tokens. `None` for a word without a token.
pub fn tags(pieces: &[Piece], count: usize, aggregation: Aggregation) -> Vec<Option<usize>> {
    let mut tags = vec![None; count];
    for tokens in pieces.chunk_by(|a, b| a.word == b.word) {
        if let Some(tag @ None) = tokens[0].word.and_then(|word| tags.get_mut(word)) {
            *tag = Some(word(tokens, aggregation).label);
        }
    }
    tags
}

/// What one answer or part of one is made of: a token, or a word.
struct Word {
    span: Range<usize>,
    label: usize,
    score: f32,
}

fn words(pieces: &[Piece], aggregation: Aggregation) -> Vec<Word> {
    let apart = matches!(aggregation, Aggregation::None | Aggregation::Simple);
    pieces.chunk_by(|_, next| !apart && next.continues).map(|tokens| word(tokens, aggregation)).collect()
}

/// A word of its tokens; there is at least one.
fn word(tokens: &[Piece], aggregation: Aggregation) -> Word {
    let (label, score) = match aggregation {
        Aggregation::None | Aggregation::Simple | Aggregation::First => best(&softmax(tokens[0].logits)),
        Aggregation::Max => {
            let mut tokens = tokens.iter().map(|token| best(&softmax(token.logits)));
            let first = tokens.next().unwrap_or_default();
            tokens.fold(first, |surest, next| if next.1 > surest.1 { next } else { surest })
        }
        Aggregation::Average => {
            let mut sums = vec![0.0; tokens[0].logits.len()];
            for token in tokens {
                softmax(token.logits).iter().zip(&mut sums).for_each(|(score, sum)| *sum += score);
            }
            sums.iter_mut().for_each(|sum| *sum /= tokens.len() as f32);
            best(&sums)
        }
    };
    Word { span: tokens[0].span.start..tokens[tokens.len() - 1].span.end, label, score }
}

/// Neighbours of one type together: the type, the place, the mean score.
fn grouped<'a>(words: &[Word], labels: &'a [String], scheme: Scheme) -> Vec<(&'a str, Range<usize>, f32)> {
    let parts: Vec<Part> = labels.iter().map(|label| Part::of(label, scheme)).collect();
    let groups = words.chunk_by(|last, word| {
        let (last, word) = (&parts[last.label], &parts[word.label]);
        last.kind == word.kind && !word.begins && !last.ends
    });
    groups
        .map(|group| {
            let score = group.iter().map(|word| word.score).sum::<f32>() / group.len() as f32;
            let span = group[0].span.start..group[group.len() - 1].span.end;
            (parts[group[0].label].name, span, score)
        })
        .collect()
}

/// What a label says of its entity.
struct Part<'a> {
    begins: bool,
    ends: bool,
    /// What neighbours must have in common.
    kind: &'a str,
    /// What the entity is called.
    name: &'a str,
}

impl<'a> Part<'a> {
    fn of(label: &'a str, scheme: Scheme) -> Self {
        if let (Scheme::Bioes, Some((prefix, kind))) = (scheme, split(label)) {
            let name = if kind.is_empty() { label } else { kind };
            return Self { begins: "BSU".contains(prefix), ends: "ELSU".contains(prefix), kind, name };
        }
        let begins = label.starts_with("B-");
        let kind = label.strip_prefix("B-").or_else(|| label.strip_prefix("I-")).unwrap_or(label);
        Self { begins, ends: false, kind, name: label.split_once('-').map_or(label, |(_, name)| name) }
    }
}

/// The likeliest label, the first of equals, and its probability.
fn best(scores: &[f32]) -> (usize, f32) {
    let scores = scores.iter().copied().enumerate();
    scores.fold(
        (0, f32::NEG_INFINITY),
        |best, (label, score)| if score > best.1 { (label, score) } else { best },
    )
}

/// A span that begins and ends between characters of the text.
fn widened(text: &str, span: &Range<usize>) -> Range<usize> {
    let start = text.floor_char_boundary(span.start);
    start..text.ceil_char_boundary(span.end).max(start)
}

#[cfg(test)]
mod tests;
