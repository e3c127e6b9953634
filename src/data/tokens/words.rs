//! Texts whose every token is answered for: where each stands, which word it is of; and windows of them.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use anyhow::{Context, anyhow};
use tokenizers::{ModelWrapper, PostProcessor, Token};

use super::Tokenizer;
use crate::data::batch::Encoding;
use crate::data::offsets::joined;
use crate::data::windows::{SHARED, windows};
use crate::task::token_classification::decode;
use crate::{Result, bail_unusable};

/// A text's own tokens with their places, without those that the tokenizer puts around it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pieces {
    /// (T)
    pub ids: Vec<u32>,
    /// (T): the bytes of the text that each stands for, whole characters.
    pub spans: Vec<Range<usize>>,
    /// (T): the word that each is of, ascending.
    pub words: Vec<usize>,
    /// (T): whether it goes on with the word of the token before, as [`decode::continues`] says it; of given words,
    /// whether it is not its word's first.
    pub continues: Vec<bool>,
}

impl Tokenizer {
    /// The tokens of a text. Its words are those that the tokenizer splits it into.
    ///
    /// # Errors
    /// The tokenizer fails. Unusable: the text holds a token that the model has no row for.
    pub fn pieces(&self, text: &str) -> Result<Pieces> {
        let encoding = self.inner.encode_char_offsets(text, false);
        let encoding = encoding.map_err(|error| anyhow!(error)).context("tokenizing")?;
        let ids = encoding.get_ids().to_vec();
        self.check_rows(&ids)?;
        let starts = char_starts(text);
        let spans: Vec<_> = encoding.get_offsets().iter().map(|&place| bytes(&starts, place)).collect();
        let marks = self.marks_continuations();
        let continues = ids.iter().zip(&spans).map(|(&id, span)| {
            let token = self.inner.id_to_token(id).unwrap_or_default();
            decode::continues(text, span, &token, marks, self.unknown == Some(id))
        });
        let mut word = 0;
        let words = encoding.get_word_ids().iter().map(|own| {
            word = own.map_or(word, |own| own as usize);
            word
        });
        Ok(Pieces { continues: continues.collect(), words: words.collect(), ids, spans })
    }

    /// The tokens of words that are given as such, each tokenized by itself. The text is theirs with one space between
    /// each two. A word may have no token.
    ///
    /// # Errors
    /// As of [`Tokenizer::pieces`].
    pub fn pieces_of_words(&self, words: &[String]) -> Result<Pieces> {
        let encoding = self.inner.encode_char_offsets(words, false);
        let encoding = encoding.map_err(|error| anyhow!(error)).context("tokenizing")?;
        self.check_rows(encoding.get_ids())?;
        let (_, places) = joined(words);
        let mut pieces = Pieces { ids: encoding.get_ids().to_vec(), ..Pieces::default() };
        let mut starts = Vec::new();
        for (&word, &place) in encoding.get_word_ids().iter().zip(encoding.get_offsets()) {
            let word = word.context("the tokenizer does not say of which word a token is")? as usize;
            let goes_on = pieces.words.last() == Some(&word);
            if !goes_on {
                starts = char_starts(&words[word]);
            }
            let span = bytes(&starts, place);
            pieces.spans.push(places[word].start + span.start..places[word].start + span.end);
            pieces.words.push(word);
            pieces.continues.push(goes_on);
        }
        Ok(pieces)
    }

    /// Some tokens of a text, a window's, between those that the tokenizer puts around a single text.
    ///
    /// # Errors
    /// Unusable: a tokenizer that does not keep a text's tokens together, or a token that the model has no row for.
    pub fn framed(&self, ids: &[u32]) -> Result<Encoding> {
        let tokens = ids.iter().map(|&id| Token::new(id, String::new(), (0, 0))).collect();
        let text = tokenizers::Encoding::from_tokens(tokens, 0);
        let found = self.inner.post_process(text, None, true);
        let found = found.map_err(|error| anyhow!(error)).context("adding special tokens")?;
        let (before, behind) = self.frame()?;
        let own = before..found.len().saturating_sub(behind);
        if found.get_ids().get(own) != Some(ids) {
            bail_unusable!(
                "the post-processor of {} does not put a text's tokens into one row, once, as they are",
                self.name()
            );
        }
        self.check_rows(found.get_ids())?;
        Ok(Encoding {
            ids: found.get_ids().to_vec(),
            type_ids: found.get_type_ids().to_vec(),
            truncated: false,
        })
    }

    /// All of a text, or of a pair, in windows of at most `max_length` tokens with the special ones: one where it fits.
    /// Neighbours share up to a quarter of a window, and part words only that are longer than one; of a pair the second
    /// text is cut, behind the whole first.
    ///
    /// # Errors
    /// As of [`Tokenizer::encode`]. Unusable: a first text that leaves no room for the second.
    pub fn windows(&self, text: &str, pair: Option<&str>, max_length: usize) -> Result<Vec<Encoding>> {
        let whole = self.encode(text, pair, max_length)?;
        if !whole.truncated {
            return Ok(vec![whole]);
        }
        if let Some(pair) = pair.filter(|pair| !pair.is_empty()) {
            let windows = self.pair_windows(text, pair, max_length, max_length / SHARED)?;
            return Ok(windows.into_iter().map(|window| window.encoding).collect());
        }
        let pieces = self.pieces(text)?;
        let (before, behind) = self.frame()?;
        let room = max_length.saturating_sub(before + behind);
        let words: Vec<usize> = pieces.words.chunk_by(|a, b| a == b).map(<[usize]>::len).collect();
        let windows = windows(&words, room, room / SHARED)?;
        windows.into_iter().map(|window| self.framed(&pieces.ids[window.tokens])).collect()
    }

    /// Some tokens of two texts between those that the tokenizer puts around a pair, and which text each token is of.
    ///
    /// # Errors
    /// As of [`Tokenizer::framed`]. Unusable: the model tells no pairs apart.
    pub fn framed_pair(&self, first: &[u32], second: &[u32]) -> Result<(Encoding, Vec<Option<usize>>)> {
        self.check_pairs()?;
        let text = |ids: &[u32], kind| {
            let tokens = ids.iter().map(|&id| Token::new(id, String::new(), (0, 0))).collect();
            tokenizers::Encoding::from_tokens(tokens, kind)
        };
        let found = self.inner.post_process(text(first, 0), Some(text(second, 1)), true);
        let found = found.map_err(|error| anyhow!(error)).context("adding special tokens")?;
        let texts = found.get_sequence_ids();
        let of = |text| {
            let own = found.get_ids().iter().zip(&texts).filter(move |(_, own)| **own == Some(text));
            own.map(|(&id, _)| id).collect::<Vec<u32>>()
        };
        if of(0) != first || of(1) != second {
            bail_unusable!(
                "the post-processor of {} does not put a pair's tokens into one row, once, as they are",
                self.name()
            );
        }
        self.check_rows(found.get_ids())?;
        let (ids, type_ids) = (found.get_ids().to_vec(), found.get_type_ids().to_vec());
        Ok((Encoding { ids, type_ids, truncated: false }, texts))
    }

    /// How many tokens the tokenizer puts around a pair of texts.
    pub fn frame_of_pair(&self) -> usize {
        self.inner.get_post_processor().map_or(0, |processor| processor.added_tokens(true))
    }

    /// How many tokens the tokenizer puts in front of a text, and how many behind it.
    ///
    /// # Errors
    /// The tokenizer's post-processor fails.
    pub fn frame(&self) -> Result<(usize, usize)> {
        let (before, behind) = self.around()?;
        Ok((before.len(), behind.len()))
    }

    /// This tokenizer for words that are given as such. In a vocabulary of GPT-2's kind a word has a space in front, but
    /// for a text's first: with `add_prefix_space` every one has, as transformers demands it of such words. What is
    /// saved says so. Other tokenizers stay as they are.
    ///
    /// # Errors
    /// The tokenizer can't be written as JSON, or not be read again.
    pub fn for_words(self) -> Result<Self> {
        let mut whole = self.as_json()?;
        let splits = &mut whole["pre_tokenizer"];
        if splits["type"] != "ByteLevel" || splits["add_prefix_space"] != false {
            return Ok(self);
        }
        splits["add_prefix_space"] = true.into();
        // RoBERTa's class has the same switch in both
        let puts = &mut whole["post_processor"];
        if puts["type"] == "RobertaProcessing" {
            puts["add_prefix_space"] = true.into();
        }
        let mut new = self.rebuilt(&whole)?;
        new.says.insert("add_prefix_space".to_owned(), true.into());
        Ok(new)
    }

    /// Whether the vocabulary marks the tokens that go on with a word, as WordPiece's `##` does.
    fn marks_continuations(&self) -> bool {
        match self.inner.get_model() {
            ModelWrapper::WordPiece(model) => !model.continuing_subword_prefix.is_empty(),
            ModelWrapper::BPE(model) => {
                model.continuing_subword_prefix.as_ref().is_some_and(|prefix| !prefix.is_empty())
            }
            _ => false,
        }
    }
}

/// Where each character begins, and the text's end.
fn char_starts(text: &str) -> Vec<usize> {
    text.char_indices().map(|(at, _)| at).chain([text.len()]).collect()
}

/// Characters → bytes. The library counts bytes where a token stands behind the text's last character, hence the bounds.
fn bytes(starts: &[usize], (start, end): (usize, usize)) -> Range<usize> {
    let last = starts.len() - 1;
    let start = starts[start.min(last)];
    start..starts[end.min(last)].max(start)
}
