//! A question and a text that is longer than the model: windows of the text, each behind the whole question, as
//! transformers' tokenizers cut the second of a pair (`truncation="only_second"`, `return_overflowing_tokens=True`).

use std::ops::Range;

use serde::{Deserialize, Serialize};

use anyhow::{Context, anyhow};
use tokenizers::utils::truncation::{TruncationParams, TruncationStrategy, truncate_encodings};
use tokenizers::{PostProcessor, Token};

use super::{Pieces, Tokenizer};
use crate::data::batch::Encoding;
use crate::{Result, bail_unusable};

/// How many times the tokens of a text its windows may have together.
const MOST_TIMES: usize = 64;

/// A part of the second text, behind the first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PairWindow {
    pub encoding: Encoding,
    pub second: SecondText,
}

/// What a window has of the second text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecondText {
    /// Where its tokens stand.
    pub tokens: Range<usize>,
    /// For each of them the bytes of the text that it stands for, whole characters.
    pub spans: Vec<Range<usize>>,
    /// Whether a token of neither text begins the window: what is said of it is said of no text.
    pub behind_special: bool,
}

impl Tokenizer {
    /// The windows of a pair, in order; one, where all of it fits. Neighbours share `stride` tokens of the second text, or
    /// half of its room, where that is less.
    ///
    /// # Errors
    /// Unusable: the first text leaves no room for the second, the model tells no pairs apart, or a text holds a token that
    /// the model has no row for.
    pub fn pair_windows(
        &self,
        first: &str,
        second: &str,
        max_length: usize,
        stride: usize,
    ) -> Result<Vec<PairWindow>> {
        self.check_pairs()?;
        let asked =
            self.inner.encode_fast(first, false).map_err(|error| anyhow!(error)).context("tokenizing")?;
        let text = self.pieces(second)?;
        // a token's place says which it is: the post-processor would trim the offsets of the text a second time
        let numbered = |ids: &[u32], kind| {
            let tokens = ids.iter().enumerate().map(|(i, &id)| Token::new(id, String::new(), (i, i + 1)));
            tokenizers::Encoding::from_tokens(tokens.collect(), kind)
        };
        let asked = numbered(asked.get_ids(), 0);
        let specials = self.inner.get_post_processor().map_or(0, |p| p.added_tokens(true));
        let room = max_length.saturating_sub(specials + asked.len());
        if room == 0 {
            bail_unusable!(
                "the first text has {} tokens: with {specials} special ones it leaves no room for the second in {max_length}",
                asked.len()
            );
        }
        let stride = if stride < room { stride } else { room / 2 };
        let windows = 1 + text.ids.len().saturating_sub(room).div_ceil(room - stride);
        if windows.saturating_mul(max_length) > MOST_TIMES * text.ids.len() + max_length {
            bail_unusable!(
                "the first text has {} tokens and leaves room for {room} of the second's {}: {windows} windows of \
                 {max_length} tokens are too many",
                asked.len(),
                text.ids.len()
            );
        }
        let params = TruncationParams {
            max_length: asked.len() + room,
            strategy: TruncationStrategy::OnlySecond,
            stride,
            direction: self.direction,
        };
        let whole = truncate_encodings(asked, Some(numbered(&text.ids, 1)), &params)
            .and_then(|(asked, text)| self.inner.post_process(asked, text, true));
        let mut whole = whole.map_err(|error| anyhow!(error)).context("tokenizing")?;
        let others = whole.take_overflowing();
        std::iter::once(whole).chain(others).map(|window| self.pair_window(&window, &text)).collect()
    }

    fn pair_window(&self, window: &tokenizers::Encoding, text: &Pieces) -> Result<PairWindow> {
        self.check_rows(window.get_ids())?;
        let of = window.get_sequence_ids();
        let first = of.iter().position(|&of| of == Some(1)).unwrap_or(of.len());
        let count = of[first..].iter().take_while(|&&of| of == Some(1)).count();
        let tokens = first..first + count;
        let places = &window.get_offsets()[tokens.clone()];
        let spans = places.iter().map(|&(place, _)| text.spans.get(place).cloned());
        let spans = spans.collect::<Option<Vec<_>>>().context("a post-processor moves a text's tokens")?;
        Ok(PairWindow {
            encoding: Encoding {
                ids: window.get_ids().to_vec(),
                type_ids: window.get_type_ids().to_vec(),
                truncated: false,
            },
            second: SecondText { tokens, spans, behind_special: of.first().is_some_and(Option::is_none) },
        })
    }
}
