//! Tokens → text as they arrive: whole characters only, and nothing that may yet begin a stop text.

use tokenizers::{DecoderWrapper, Model, Tokenizer};

use crate::{Result, bail_unusable};

/// The text of one sequence.
///
/// It is the text that `decode` with special tokens left out gives for all tokens at once. The library's own
/// `DecodeStream` gives that too, but it has no end, and while bytes that are no UTF-8 go on it gives nothing
/// and decodes all of them again at every token.
pub struct TextStream<'t> {
    tokenizer: &'t Tokenizer,
    stop: Vec<String>,
    /// The beginning of a character: at most three bytes.
    bytes: Vec<u8>,
    /// All whole characters, up to a stop text.
    text: String,
    /// The bytes of `text` that were given.
    given: usize,
    stopped: bool,
}

/// What a token adds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TextPiece {
    /// Text that is safe to show; often none.
    pub text: String,
    /// A stop text is complete. It is not given, nor is what is behind it.
    pub stopped: bool,
}

impl<'t> TextStream<'t> {
    /// A stream that ends at the first of the stop texts.
    ///
    /// # Errors
    /// Unusable: the tokens of the tokenizer are no bytes.
    pub fn new(tokenizer: &'t Tokenizer, stop: &[String]) -> Result<Self> {
        if !matches!(tokenizer.get_decoder(), Some(DecoderWrapper::ByteLevel(_))) {
            bail_unusable!("the tokenizer's decoder is not ByteLevel, expected a byte-level BPE, as GPT-2's");
        }
        let (bytes, text) = (Vec::new(), String::new());
        Ok(Self { tokenizer, stop: stop.to_vec(), bytes, text, given: 0, stopped: false })
    }

    /// Takes a token; the text that it makes safe to show. Behind a stop text there is none.
    pub fn push(&mut self, id: u32) -> TextPiece {
        if !self.stopped {
            bytes(self.tokenizer, id, &mut self.bytes);
            self.characters();
            self.cut();
        }
        let text = &self.text[self.given..];
        let held = if self.stopped { 0 } else { held_back(text, &self.stop) };
        let text = text[..text.len() - held].to_owned();
        self.given += text.len();
        TextPiece { text, stopped: self.stopped }
    }

    /// The text that was held back: no stop text came of it. The beginning of a character is U+FFFD.
    pub fn finish(mut self) -> String {
        if !self.stopped && !self.bytes.is_empty() {
            self.text.push(char::REPLACEMENT_CHARACTER);
            self.cut();
        }
        self.text.split_off(self.given)
    }

    /// All text that was given so far.
    pub fn text(&self) -> &str {
        &self.text[..self.given]
    }

    /// Moves whole characters to the text, and U+FFFD for bytes that can't become one.
    fn characters(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        let mut chunks = bytes.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            self.text.push_str(chunk.valid());
            let rest = chunk.invalid();
            let begins = || std::str::from_utf8(rest).is_err_and(|error| error.error_len().is_none());
            if chunks.peek().is_none() && begins() {
                self.bytes = rest.to_vec();
            } else if !rest.is_empty() {
                self.text.push(char::REPLACEMENT_CHARACTER);
            }
        }
    }

    /// Ends the text before the stop text that is complete first, of several that end there before the
    /// longest.
    fn cut(&mut self) {
        // nothing that was given is part of one
        let text = &self.text[self.given..];
        let found = self.stop.iter().filter_map(|stop| Some((text.find(stop)?, stop.len())));
        if let Some((start, _)) = found.min_by_key(|&(start, len)| (start + len, start)) {
            self.text.truncate(self.given + start);
            self.stopped = true;
        }
    }
}

/// Adds the bytes that a token stands for; none for a special token.
fn bytes(tokenizer: &Tokenizer, id: u32, to: &mut Vec<u8>) {
    let added = tokenizer.get_added_vocabulary();
    let token = added.simple_id_to_token(id).or_else(|| tokenizer.get_model().id_to_token(id));
    let Some(token) = token.filter(|token| !added.is_special_token(token)) else { return };
    match token.chars().map(byte).collect::<Option<Vec<u8>>>() {
        Some(bytes) => to.extend(bytes),
        None => to.extend(token.as_bytes()),
    }
}

/// The byte that a character of a token's name stands for: printable ones for themselves, and those from
/// U+0100 on for the others, in order (`bytes_to_unicode` of GPT-2's encoder.py).
fn byte(name: char) -> Option<u8> {
    Some(match u32::from(name) {
        c @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => c as u8,
        c @ 0x100..=0x120 => (c - 0x100) as u8,
        c @ 0x121..=0x142 => (c - 0x121 + 0x7f) as u8,
        0x143 => 0xad,
        _ => return None,
    })
}

/// The length of the longest end of a text that a stop text begins with.
fn held_back(text: &str, stop: &[String]) -> usize {
    let begins = |(at, _): (usize, char)| {
        let end = &text[at..];
        stop.iter().any(|stop| stop.starts_with(end)).then_some(end.len())
    };
    let longest = stop.iter().map(String::len).max().unwrap_or(0);
    // no end that is longer than the longest stop text
    let from = text.floor_char_boundary(text.len().saturating_sub(longest));
    text[from..].char_indices().find_map(|(at, c)| begins((from + at, c))).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::data::tokens;

    /// All bytes, the end of a text, and merges, also across characters.
    fn tokenizer() -> tokens::Tokenizer {
        tokens::Tokenizer::train(
            tokens::Vocabulary::Gpt2,
            &["ab ab abc äöü äöü öü \u{3042}\u{3044}\u{3042}\u{3044} \u{1f980}\u{1f980}"],
            300,
        )
        .unwrap()
    }

    /// The ids of bytes, each a token.
    fn ids(tokenizer: &Tokenizer, bytes: &[u8]) -> Vec<u32> {
        let names: Vec<char> = (0..0x144).filter_map(char::from_u32).collect();
        let name = |&wanted: &u8| names.iter().find(|&&name| byte(name) == Some(wanted)).unwrap();
        bytes.iter().map(|byte| tokenizer.token_to_id(&name(byte).to_string()).unwrap()).collect()
    }

    /// The pieces, what is left at the end, and whether it stopped.
    fn stream(tokenizer: &Tokenizer, ids: &[u32], stop: &[&str]) -> (Vec<String>, String, bool) {
        let stop: Vec<String> = stop.iter().map(|&text| text.to_owned()).collect();
        let mut stream = TextStream::new(tokenizer, &stop).unwrap();
        let (mut pieces, mut stopped) = (Vec::new(), false);
        for &id in ids {
            let piece = stream.push(id);
            assert!(piece.stopped || !stopped);
            pieces.push(piece.text);
            stopped = piece.stopped;
            assert_eq!(stream.text(), pieces.concat());
        }
        (pieces, stream.finish(), stopped)
    }

    proptest! {
        #[test]
        fn any_tokens_become_the_text_that_decoding_them_at_once_gives(
            ids in proptest::collection::vec(0u32..310, 0..60)
        ) {
            let tokenizer = tokenizer();
            let (pieces, rest, _) = stream(tokenizer.inner(), &ids, &[]);
            prop_assert_eq!(pieces.concat() + &rest, tokenizer.inner().decode(&ids, true).unwrap());
            prop_assert!(rest.is_empty() || rest == "\u{fffd}", "no more than a character is held back");
        }

        #[test]
        fn any_bytes_become_the_text_that_they_are(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
            let tokenizer = tokenizer();
            let (pieces, rest, _) = stream(tokenizer.inner(), &ids(tokenizer.inner(), &bytes), &[]);
            prop_assert_eq!(pieces.concat() + &rest, String::from_utf8_lossy(&bytes));
        }

        /// Against a search at every character, whatever the borders of the tokens.
        #[test]
        fn text_ends_before_the_stop_text_that_is_complete_first(
            text in "[abä]{0,12}",
            stop in proptest::collection::vec("[abä]{1,4}", 0..4),
        ) {
            let tokenizer = tokenizer();
            let stop: Vec<&str> = stop.iter().map(String::as_str).collect();
            let ends = text.char_indices().map(|(at, c)| &text[..at + c.len_utf8()]);
            let cut = ends.filter_map(|end| {
                stop.iter().filter(|stop| end.ends_with(**stop)).map(|stop| end.len() - stop.len()).min()
            });
            let expected = cut.clone().next().map_or(&text[..], |cut| &text[..cut]);
            let bytes = ids(tokenizer.inner(), text.as_bytes());
            for ids in [&bytes[..], tokenizer.inner().encode(&text[..], false).unwrap().get_ids()] {
                let (pieces, rest, stopped) = stream(tokenizer.inner(), ids, &stop);
                prop_assert_eq!(pieces.concat() + &rest, expected);
                prop_assert_eq!(stopped, expected.len() < text.len());
            }
        }
    }

    #[test]
    fn nothing_is_shown_that_may_yet_change_and_everything_else_is() {
        let tokenizer = tokenizer();
        let shown = |text: &str, stop: &[&str]| {
            let (pieces, rest, stopped) =
                stream(tokenizer.inner(), &ids(tokenizer.inner(), text.as_bytes()), stop);
            (pieces.join("|"), rest, stopped)
        };
        assert_eq!(shown("aöb", &[]), ("a||ö|b".into(), String::new(), false));
        assert_eq!(shown("xaab", &["aac"]), ("x|||aab".into(), String::new(), false));
        assert_eq!(shown("xaaab", &["aab"]), ("x|||a|".into(), String::new(), true));
        assert_eq!(shown("xaa", &["aab", "y"]), ("x||".into(), "aa".into(), false));
        assert_eq!(shown("axb", &["x"]), ("a||".into(), String::new(), true), "nothing comes behind it");
        assert_eq!(shown("ab", &["abc", "b"]), ("|a".into(), String::new(), true));
    }

    #[test]
    fn special_tokens_are_no_text_and_a_stop_text_goes_across_them() {
        let tokenizer = tokenizer();
        let inner = tokenizer.inner();
        let (a, b, end) = (
            inner.token_to_id("a").unwrap(),
            inner.token_to_id("b").unwrap(),
            tokenizer.inner().token_to_id("<|endoftext|>").unwrap(),
        );
        assert_eq!(stream(inner, &[a, end, b, u32::MAX], &[]).0, ["a", "", "b", ""]);
        assert_eq!(
            stream(inner, &[b, a, end, b], &["ab"]),
            (["b", "", "", ""].map(str::to_owned).into(), String::new(), true)
        );
        let cut = ids(inner, &"ö".as_bytes()[..1]);
        assert_eq!(
            stream(inner, &cut, &["\u{fffd}"]).1,
            "",
            "the end of the text can make a stop text whole"
        );
    }

    #[test]
    fn a_tokenizer_of_words_is_refused() {
        let mut words = (*tokenizer().inner()).clone();
        words.with_decoder(None::<tokenizers::decoders::wordpiece::WordPiece>);
        let error = TextStream::new(&words, &[]).err().unwrap();
        assert_eq!(crate::error::exit_code(&error), 2);
    }
}
