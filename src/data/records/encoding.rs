//! Bytes in an encoding that the user names → UTF-8.

use std::io::{BufRead, Read};
use std::str::FromStr;

use encoding_rs::{Decoder, DecoderResult, Encoding, REPLACEMENT};
use serde::{Deserialize, Serialize};

use super::Input;
use crate::{Result, unusable};

/// How characters are written as bytes: one of the Encoding Standard's, by any of its labels (`utf-16`, `latin1`,
/// `windows-1252`, `shift_jis` …). As there, `iso-8859-1` is read as `windows-1252`, and a byte order mark wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TextEncoding(&'static Encoding);

impl FromStr for TextEncoding {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        // Python's spellings
        let dashed = name.to_lowercase().replace('_', "-");
        let label = match dashed.as_str() {
            "latin-1" => "latin1",
            "latin9" | "latin-9" => "iso-8859-15",
            "utf-8-sig" => "utf-8",
            "utf-16-le" => "utf-16le",
            "utf-16-be" => "utf-16be",
            "cp932" => "shift_jis",
            "cp936" => "gbk",
            "cp949" => "euc-kr",
            "mac-roman" => "macintosh",
            _ => name,
        };
        let encoding =
            Encoding::for_label(label.as_bytes()).or_else(|| Encoding::for_label(dashed.as_bytes()));
        match encoding.filter(|encoding| *encoding != REPLACEMENT) {
            Some(encoding) => Ok(Self(encoding)),
            None => Err(unusable!(
                "{name:?} is no encoding of the Encoding Standard, such as utf-8, utf-16, windows-1252, shift_jis or gb18030"
            )),
        }
    }
}

impl TryFrom<String> for TextEncoding {
    type Error = anyhow::Error;

    fn try_from(name: String) -> Result<Self> {
        name.parse()
    }
}

impl From<TextEncoding> for String {
    fn from(encoding: TextEncoding) -> Self {
        encoding.0.name().to_owned()
    }
}

impl std::fmt::Display for TextEncoding {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(self.0.name())
    }
}

impl TextEncoding {
    /// A whole text; none where a byte can't be decoded.
    pub(super) fn decode(self, bytes: &[u8]) -> Option<String> {
        let mut decoder = self.0.new_decoder();
        let mut text =
            String::with_capacity(decoder.max_utf8_buffer_length_without_replacement(bytes.len())?);
        match decoder.decode_to_string_without_replacement(bytes, &mut text, true) {
            (DecoderResult::InputEmpty, _) => Some(text),
            _ => None,
        }
    }

    /// The input as UTF-8. Where bytes can't be decoded, [`UNDECODED`] stands, which is no UTF-8: so the record
    /// that they stand in is refused, and those behind it are read.
    pub(super) fn decoded(self, input: Input) -> Input {
        let buffer = vec![0; 1 << 16];
        Box::new(Decoded { input, decoder: self.0.new_decoder(), buffer, at: 0, end: 0, is_over: false })
    }
}

/// Stands for bytes that can't be decoded.
const UNDECODED: u8 = 0xff;

struct Decoded {
    input: Input,
    decoder: Decoder,
    /// What was decoded and not yet read: `buffer[at..end]`.
    buffer: Vec<u8>,
    at: usize,
    end: usize,
    is_over: bool,
}

impl BufRead for Decoded {
    fn fill_buf(&mut self) -> std::io::Result<&[u8]> {
        while self.at == self.end && !self.is_over {
            let bytes = self.input.fill_buf()?;
            let last = bytes.is_empty();
            let room = self.buffer.len() - 1; // for the mark
            let (result, read, written) =
                self.decoder.decode_to_utf8_without_replacement(bytes, &mut self.buffer[..room], last);
            self.input.consume(read);
            (self.at, self.end) = (0, written);
            match result {
                DecoderResult::InputEmpty => self.is_over = last,
                DecoderResult::OutputFull => {}
                DecoderResult::Malformed(..) => {
                    self.buffer[self.end] = UNDECODED;
                    self.end += 1;
                }
            }
        }
        Ok(&self.buffer[self.at..self.end])
    }

    fn consume(&mut self, count: usize) {
        self.at += count;
    }
}

impl Read for Decoded {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let text = self.fill_buf()?;
        let count = text.len().min(out.len());
        out[..count].copy_from_slice(&text[..count]);
        self.consume(count);
        Ok(count)
    }
}
