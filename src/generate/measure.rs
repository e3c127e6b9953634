//! How well a graph that generates predicts texts.

use crate::Result;
use crate::runtime::Slots;
use crate::task::{CausalLm, Example, Metrics, Target};

/// A few pages of English, out of books whose authors are long dead: what a model is measured on where nothing else is
/// given.
pub fn english() -> impl Iterator<Item = &'static str> {
    include_str!("english.txt").split("\n\n").map(str::trim)
}

/// The metrics of a language model on examples, each read alone: loss, perplexity, bits a byte.
///
/// # Errors
/// As [`Slots::read`].
pub fn measure(slots: &mut Slots, examples: &[Example]) -> Result<Metrics> {
    let width = slots.vocabulary();
    let mut losses = 0.0;
    for Example { encoding, target } in examples {
        let Target::Next(next) = target else { continue };
        slots.read_whole(&encoding.ids, |start, scores| {
            for (row, at) in scores.chunks_exact(width).zip(start + 1..) {
                if next.predicted.get(at).is_some_and(|&predicted| predicted) {
                    losses += surprise(row, encoding.ids[at] as usize);
                }
            }
            Ok(())
        })?;
    }
    let targets: Vec<&Target> = examples.iter().map(|example| &example.target).collect();
    Ok(CausalLm::measured(losses, &targets))
}

/// −ln p of a token, by its row of scores.
fn surprise(scores: &[f32], id: usize) -> f64 {
    let largest = scores.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    let sum: f64 = scores.iter().map(|&x| f64::from(x - largest).exp()).sum();
    sum.ln() - f64::from(scores[id] - largest)
}
