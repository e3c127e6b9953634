//! Texts that are longer than the model: what is read of them, and what is said of them by what is said of their windows.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Wanted;
use crate::Result;
use crate::data::batch::Encoding;
use crate::data::tokens::Tokenizer;

/// What is said of a text that is longer than the model, by what is said of its windows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Aggregation {
    /// What its beginning says: the rest is cut off.
    #[default]
    First,
    /// The mean of the windows' logits.
    Mean,
    /// The largest of each label's.
    Max,
}

/// What becomes of long texts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
#[group(skip)]
#[serde(rename_all = "kebab-case", default)]
pub struct WindowFlags {
    /// For text-classification, what a text that is longer than --max-length is labelled by: its first tokens, or windows of
    /// all of it, by the mean of their logits or by the largest for each label [default: as it was trained; in training:
    /// first].
    #[arg(long, value_enum, value_name = "HOW", help_heading = "Windows")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window_aggregation: Option<Aggregation>,
}

/// A text, or a window of one.
#[derive(Clone, Debug, PartialEq)]
pub struct Window {
    pub wanted: Wanted,
    /// Which of the file's texts it is of; those of one text stand one behind the other.
    pub text: usize,
    pub aggregation: Aggregation,
    /// A teacher's logits of the whole text, in the order of the labels, where it has said something.
    pub taught: Option<Arc<[f32]>>,
}

impl Window {
    /// A text that stands by itself.
    pub fn whole(text: usize, wanted: Wanted) -> Self {
        Self { wanted, text, aggregation: Aggregation::First, taught: None }
    }
}

impl Aggregation {
    /// The windows that are read of a text.
    ///
    /// # Errors
    /// As of [`Tokenizer::windows`].
    pub fn windows(
        self,
        tokenizer: &Tokenizer,
        text: &str,
        pair: Option<&str>,
        max_length: usize,
    ) -> Result<Vec<Encoding>> {
        match self {
            Self::First => Ok(vec![tokenizer.encode(text, pair, max_length)?]),
            Self::Mean | Self::Max => tokenizer.windows(text, pair, max_length),
        }
    }

    /// A text's logits, a number a label, from those of its windows.
    pub fn of(self, windows: &[Vec<f32>]) -> Vec<f32> {
        let [first, rest @ ..] = windows else { return Vec::new() };
        let mut logits = first.clone();
        for row in rest {
            for (x, &y) in logits.iter_mut().zip(row) {
                *x = match self {
                    Self::First => *x,
                    Self::Mean => *x + y,
                    Self::Max => x.max(y),
                };
            }
        }
        if self == Self::Mean {
            logits.iter_mut().for_each(|x| *x /= windows.len() as f32);
        }
        logits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_aggregated_label_by_label() {
        let windows = [vec![1.0, -2.0], vec![3.0, -4.0], vec![2.0, 0.0]];
        assert_eq!(Aggregation::First.of(&windows), [1.0, -2.0]);
        assert_eq!(Aggregation::Mean.of(&windows), [2.0, -2.0]);
        assert_eq!(Aggregation::Max.of(&windows), [3.0, 0.0]);
        assert_eq!(Aggregation::Mean.of(&windows[..1]), windows[0]);
    }
}
