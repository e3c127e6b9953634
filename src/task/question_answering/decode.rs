//! Scores of where an answer begins and ends → answers, as `transformers`' question-answering pipeline finds them
//! (4.57, with `align_to_words=False`).

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::Range;

/// The scores of one window.
pub struct Scored<'a> {
    /// (T): of each token, that the answer begins there.
    pub start: Vec<f32>,
    /// (T): that it ends there.
    pub end: Vec<f32>,
    /// The tokens of the text, and the bytes of it that each stands for.
    pub text: Range<usize>,
    pub spans: &'a [Range<usize>],
    /// Whether the first token stands for no answer.
    pub null: bool,
}

/// How answers are looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Tokens of an answer.
    pub max_answer_length: usize,
    /// Answers of a window that are gone on with.
    pub n_best: usize,
}

/// A part of the text.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// In bytes.
    pub span: Range<usize>,
    /// The probability of its beginning times that of its end, summed over its places in all windows, so that it may be
    /// above 1.
    pub score: f64,
}

/// Answers from the likeliest, and the least probability over the windows that there is none.
#[derive(Clone, Debug, PartialEq)]
pub struct Answers {
    pub found: Vec<Found>,
    pub null: f64,
}

/// The answers of a text by all of its windows. Parts that read the same, small and capital letters aside, are one answer.
pub fn answers(text: &str, windows: &[Scored], limits: Limits) -> Answers {
    let mut found: Vec<Found> = Vec::new();
    let mut known: HashMap<String, usize> = HashMap::new();
    let mut null = f64::INFINITY;
    for window in windows {
        let (start, end) = (probabilities(&window.start, window), probabilities(&window.end, window));
        null = null.min(if window.null { start.0 * end.0 } else { 0.0 });
        for (span, score) in spans(window, &start.1, &end.1, limits) {
            let Some(part) = text.get(span.clone()).filter(|part| !part.is_empty()) else { continue };
            match known.entry(part.to_lowercase()) {
                Entry::Occupied(at) => found[*at.get()].score += score,
                Entry::Vacant(new) => {
                    new.insert(found.len());
                    found.push(Found { span, score });
                }
            }
        }
    }
    found.sort_by(|a, b| b.score.total_cmp(&a.score)); // is stable
    Answers { found, null: if null.is_finite() { null } else { 0.0 } }
}

/// The softmax over the tokens of the text, and the first token where it stands for no answer: its share, and theirs.
fn probabilities(scores: &[f32], window: &Scored) -> (f64, Vec<f64>) {
    let null = window.null.then(|| scores.first().copied().unwrap_or(f32::NEG_INFINITY));
    let own = &scores[window.text.clone()];
    let max = own.iter().copied().chain(null).fold(f32::NEG_INFINITY, f32::max);
    let exp = |x: f32| f64::from(x - max).exp();
    let null = null.map_or(0.0, exp);
    let sum = null + own.iter().copied().map(exp).sum::<f64>();
    (null / sum, own.iter().map(|&x| exp(x) / sum).collect())
}

/// The likeliest parts of a window's text, from the likeliest, by their bytes.
fn spans(window: &Scored, start: &[f64], end: &[f64], limits: Limits) -> Vec<(Range<usize>, f64)> {
    let mut best: Vec<(usize, usize, f64)> = Vec::new();
    for (first, &begins) in start.iter().enumerate() {
        let last = (first + limits.max_answer_length).min(end.len());
        for (at, &ends) in end.iter().enumerate().take(last).skip(first) {
            let score = begins * ends;
            // the first of equals stays in front
            if best.len() == limits.n_best && best.last().is_some_and(|worst| worst.2 >= score) {
                continue;
            }
            let place = best.partition_point(|better| better.2 >= score);
            best.insert(place, (first, at, score));
            best.truncate(limits.n_best);
        }
    }
    let bytes = |(first, last, score): (usize, usize, f64)| {
        (window.spans[first].start..window.spans[last].end.max(window.spans[first].start), score)
    };
    best.into_iter().map(bytes).collect()
}
