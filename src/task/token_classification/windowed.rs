//! Tokens of a text → the windows that a model reads of it.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::data::batch::Encoding;
use crate::data::tokens::{Pieces, Tokenizer};
use crate::data::windows::{SHARED, windows};

/// A window of a text, between the tokens that the tokenizer puts around it.
#[derive(Serialize, Deserialize)]
pub(super) struct Windowed {
    pub encoding: Encoding,
    /// The first of the text's tokens in it, and the tokens in front of that.
    first: usize,
    before: usize,
    predicted: Range<usize>,
}

impl Windowed {
    /// The windows of a text; `word` tells what tokens belong together, by their places.
    pub fn of(
        pieces: &Pieces,
        word: impl Fn(usize) -> usize,
        tokenizer: &Tokenizer,
        max_length: usize,
    ) -> Result<Vec<Self>> {
        let (before, behind) = tokenizer.frame()?;
        let room = max_length.saturating_sub(before + behind);
        let mut lengths: Vec<usize> = Vec::new();
        for at in 0..pieces.ids.len() {
            match lengths.last_mut() {
                Some(length) if word(at) == word(at - 1) => *length += 1,
                _ => lengths.push(1),
            }
        }
        let framed = |tokens: Range<usize>, predicted| {
            Ok(Self {
                encoding: tokenizer.framed(&pieces.ids[tokens.clone()])?,
                first: tokens.start,
                before,
                predicted,
            })
        };
        if lengths.is_empty() {
            return Ok(vec![framed(0..0, 0..0)?]);
        }
        let windows = windows(&lengths, room, room / SHARED)?;
        windows.into_iter().map(|window| framed(window.tokens, window.predicts)).collect()
    }

    /// The tokens that this window predicts: where each stands in it, and in the text.
    pub fn predicts(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.predicted.clone().map(|at| (at - self.first + self.before, at))
    }
}
