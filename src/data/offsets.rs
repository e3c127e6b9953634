//! Places in a text, counted in bytes → counted as the client counts.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// `--offset-unit`: what `start` and `end` count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OffsetUnit {
    /// Unicode scalar values, as Python's strings.
    #[default]
    Char,
    /// Bytes of UTF-8, as Rust's and Go's strings.
    Byte,
    /// Units of UTF-16, as JavaScript's and Java's strings.
    Utf16,
}

impl OffsetUnit {
    /// Converts places of `text`, counted in bytes, in one pass. They may come in any order; one inside a character
    /// counts as its beginning, one behind the text as its end.
    pub fn convert(self, text: &str, places: &mut [&mut usize]) {
        for place in places.iter_mut() {
            **place = text.floor_char_boundary(**place);
        }
        if self == Self::Byte || text.is_ascii() {
            return;
        }
        places.sort_unstable_by_key(|place| **place);
        let (mut bytes, mut units) = (0, 0);
        for place in places {
            units += match (self, &text[bytes..**place]) {
                (Self::Utf16, part) => part.chars().map(char::len_utf16).sum(),
                (_, part) => part.chars().count(),
            };
            bytes = std::mem::replace(*place, units);
        }
    }
}

/// The text of words that were given as such, one space between each two, and the bytes of each word.
pub fn joined<S: AsRef<str>>(words: &[S]) -> (String, Vec<Range<usize>>) {
    let mut text = String::new();
    let mut spans = Vec::with_capacity(words.len());
    for (i, word) in words.iter().enumerate() {
        if i > 0 {
            text.push(' ');
        }
        let start = text.len();
        text.push_str(word.as_ref());
        spans.push(start..text.len());
    }
    (text, spans)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_unit_counts_its_own() {
        let text = "a\u{e9}\u{1f600}e\u{301}z"; // 1, 2, 4, 1, 2, 1 bytes
        let all = |unit: OffsetUnit| {
            let mut places = [11, 7, 3, 3, 0, 10, 5, 99];
            unit.convert(text, &mut places.each_mut());
            places
        };
        assert_eq!(all(OffsetUnit::Byte), [11, 7, 3, 3, 0, 10, 3, 11]);
        assert_eq!(all(OffsetUnit::Char), [6, 3, 2, 2, 0, 5, 2, 6]);
        assert_eq!(all(OffsetUnit::Utf16), [7, 4, 2, 2, 0, 6, 2, 7]);
    }

    #[test]
    fn words_are_joined_by_one_space() {
        assert_eq!(joined(&["é", "", "b"]), ("é  b".to_owned(), vec![0..2, 3..3, 4..5]));
        assert_eq!(joined::<&str>(&[]), (String::new(), Vec::new()));
    }
}
