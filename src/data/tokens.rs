//! Texts → token ids, by the tokenizer that stands in the model's directory.

mod byte_level;
mod trained;
mod wordpiece;

use std::path::Path;

use anyhow::{Context, anyhow};
use rayon::prelude::*;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tokenizers::utils::truncation::{TruncationDirection, TruncationParams, truncate_encodings};
use tokenizers::{PostProcessor, Token};

use crate::data::batch::Encoding;
use crate::{Result, bail_unusable, files, unusable};

/// The files that a tokenizer may consist of.
pub const FILES: [&str; 8] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
];

/// A model's tokenizer. Padding and truncation that its file asks for are not applied: padding is
/// the batch's, and the length is an argument.
#[derive(Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The contents of tokenizer.json where the directory has none, and the file that it was built from.
    built: Option<(String, &'static str)>,
    hash: String,
    pad_id: u32,
    vocab_size: usize,
    direction: TruncationDirection,
}

impl Tokenizer {
    /// Reads `tokenizer.json`, or builds BERT's pipeline from `vocab.txt`, or GPT-2's from `vocab.json` and
    /// `merges.txt`, as transformers does.
    ///
    /// # Errors
    /// Unusable: neither file is there, or one can't be read as a tokenizer.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let config = settings(&dir.join("tokenizer_config.json"))?;
        let specials = settings(&dir.join("special_tokens_map.json"))?;
        let special = |key: &str| content(config.get(key)).or_else(|| content(specials.get(key)));

        let (json, built) = if path.exists() {
            (std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?, None)
        } else if dir.join("vocab.txt").exists() {
            let json = wordpiece::tokenizer_json(dir, &config, special)?;
            (json.clone().into_bytes(), Some((json, "vocab.txt")))
        } else if dir.join("vocab.json").exists() && dir.join("merges.txt").exists() {
            let json = byte_level::tokenizer_json(dir, &config, special)?;
            (json.clone().into_bytes(), Some((json, "vocab.json")))
        } else {
            bail_unusable!(
                "{} has no tokenizer: neither tokenizer.json nor vocab.txt nor vocab.json with merges.txt is there",
                dir.display()
            );
        };
        let side = config.get("truncation_side").and_then(Value::as_str);
        let tokenizer = Self::of(&json, special("pad_token"), side, built);
        tokenizer.map_err(|error| unusable!("{} can't be read as a tokenizer: {error:#}", path.display()))
    }

    /// Whether a directory holds the files of a tokenizer.
    pub fn is_in(dir: &Path) -> bool {
        ["tokenizer.json", "vocab.txt", "vocab.json"].iter().any(|name| dir.join(name).exists())
    }

    /// Trains a byte-level BPE, as GPT-2's, of at most `vocab_size` tokens.
    ///
    /// # Errors
    /// Unusable: a vocabulary that has no room for the 256 bytes and the end of a text.
    pub fn train<S: AsRef<str> + Send + Sync>(texts: &[S], vocab_size: usize) -> Result<Self> {
        if vocab_size < 257 {
            bail_unusable!(
                "vocab_size {vocab_size} has no room for the 256 bytes and the end of a text: 257 at least"
            );
        }
        let json = trained::tokenizer_json(texts, vocab_size)?;
        Self::of(json.clone().as_bytes(), None, None, Some((json, "the trained tokenizer")))
    }

    /// The token that ends a text in GPT-2's vocabulary.
    pub fn end(&self) -> Option<u32> {
        self.inner.token_to_id(byte_level::END)
    }

    fn of(
        json: &[u8],
        pad: Option<String>,
        truncation_side: Option<&str>,
        built: Option<(String, &'static str)>,
    ) -> Result<Self> {
        let mut inner = parsed(json)?;
        let padding = inner.get_padding().map(|padding| padding.pad_id);
        // all-MiniLM-L6-v2's file pads every text to 128 and cuts it there
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| anyhow!(error))?;

        let pad = pad.and_then(|token| inner.token_to_id(&token)).or(padding);
        let pad_id = pad.or_else(|| inner.token_to_id("[PAD]")).or_else(|| inner.token_to_id("<pad>"));
        let vocab_size = inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        let direction = match truncation_side {
            Some("left") => TruncationDirection::Left,
            _ => TruncationDirection::Right,
        };
        let hash = Sha256::digest(json).iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { inner, built, hash, pad_id: pad_id.unwrap_or(0), vocab_size, direction })
    }

    /// Encodes a text, or a pair, with special tokens, in at most `max_length` tokens: as transformers
    /// does with `truncation=True`, the longer of a pair is cut first. An empty second text is none,
    /// as in transformers when it is given one text at a time.
    ///
    /// # Errors
    /// Unusable: a `max_length` below the number of special tokens.
    pub fn encode(&self, text: &str, pair: Option<&str>, max_length: usize) -> Result<Encoding> {
        let pair = pair.filter(|pair| !pair.is_empty());
        let specials = self.inner.get_post_processor().map_or(0, |p| p.added_tokens(pair.is_some()));
        let Some(room) = max_length.checked_sub(specials) else {
            bail_unusable!(
                "a maximum length of {max_length} has no room for the {specials} special tokens of a text"
            );
        };
        let tokens = |text: &str| self.inner.encode_fast(text, false);
        let cut = || {
            let (text, pair) = (tokens(text)?, pair.map(tokens).transpose()?);
            let length = text.len() + pair.as_ref().map_or(0, |pair| pair.len());
            // The library's own truncation stops tokenizing at the maximum length. It would then not
            // know that something was cut, nor which of two long texts is the longer.
            let params =
                TruncationParams { max_length: room, direction: self.direction, ..Default::default() };
            let (mut text, mut pair) = truncate_encodings(text, pair, &params)?;
            // what was cut off would be given special tokens too
            text.take_overflowing();
            pair.as_mut().map(|pair| pair.take_overflowing());
            Ok((self.inner.post_process(text, pair, true)?, length > room))
        };
        let (encoding, truncated) =
            cut().map_err(|error: tokenizers::Error| anyhow!(error)).context("tokenizing")?;
        Ok(Encoding {
            ids: encoding.get_ids().to_vec(),
            type_ids: encoding.get_type_ids().to_vec(),
            truncated,
        })
    }

    /// [`Tokenizer::encode`] for many texts, in parallel. The order is kept.
    pub fn encode_all<S: AsRef<str> + Sync>(
        &self,
        texts: &[(S, Option<S>)],
        max_length: usize,
    ) -> Result<Vec<Encoding>> {
        let encode = |(text, pair): &(S, Option<S>)| {
            self.encode(text.as_ref(), pair.as_ref().map(|pair| pair.as_ref()), max_length)
        };
        texts.par_iter().map(encode).collect()
    }

    /// How many bytes of text a token of a byte-level vocabulary stands for: one a character of its name. A special
    /// token stands for none.
    pub fn bytes(&self, id: u32) -> usize {
        if self.inner.get_added_tokens_decoder().contains_key(&id) {
            return 0;
        }
        self.inner.id_to_token(id).map_or(0, |token| token.chars().count())
    }

    /// The id that fills a batch's shorter rows; 0 where the tokenizer has no padding token.
    pub fn pad_id(&self) -> u32 {
        self.pad_id
    }

    /// The highest id, added tokens included, plus one.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Holds the ids against the model's embeddings. `token_types` is `None` for a model that reads none.
    ///
    /// # Errors
    /// Unusable: an id or a token type that the model has no row for.
    pub fn check_fits(&self, vocab_rows: usize, token_types: Option<usize>) -> Result<()> {
        let (mut ids, mut types) = (self.vocab_size, 0);
        for pair in [false, true] {
            let token =
                |kind| tokenizers::Encoding::from_tokens(vec![Token::new(0, String::new(), (0, 0))], kind);
            let encoding = self.inner.post_process(token(0), pair.then(|| token(1)), true);
            let encoding = encoding.map_err(|error| anyhow!(error)).context("adding special tokens")?;
            ids = encoding.get_ids().iter().map(|&id| id as usize + 1).fold(ids, usize::max);
            types = encoding.get_type_ids().iter().map(|&kind| kind as usize + 1).fold(types, usize::max);
        }
        if ids > vocab_rows {
            bail_unusable!(
                "{} has ids up to {}, the model's word embeddings have {vocab_rows} rows: \
                 the tokenizer is another model's, or tokens were added to it and not to the model",
                self.name(),
                ids - 1
            );
        }
        match token_types {
            Some(rows) if types > rows => bail_unusable!(
                "{} gives token types up to {}, the model's token type embeddings have {rows} rows: \
                 the tokenizer is another model's",
                self.name(),
                types - 1
            ),
            _ => Ok(()),
        }
    }

    /// The sha256, in hex, of tokenizer.json: as it was read, or as [`Tokenizer::save`] writes it.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// Copies the tokenizer's files from the directory it was opened in, and writes tokenizer.json
    /// where that had none.
    pub fn save(&self, from: &Path, to: &Path) -> Result<()> {
        for name in FILES.iter().filter(|name| from.join(name).exists()) {
            let bytes =
                std::fs::read(from.join(name)).with_context(|| format!("reading {}", from.display()))?;
            files::write(&to.join(name), bytes)?;
        }
        self.built.as_ref().map_or(Ok(()), |(json, _)| files::write(&to.join("tokenizer.json"), json))
    }

    /// The library's tokenizer, without padding and truncation: for offsets and for decoding.
    pub fn inner(&self) -> &tokenizers::Tokenizer {
        &self.inner
    }

    fn name(&self) -> &'static str {
        self.built.as_ref().map_or("tokenizer.json", |(_, from)| from)
    }
}

/// The tokenizer of a `tokenizer.json`. The library takes for granted that its parts are JSON, and that some of them can
/// be used: it panics where they are not.
fn parsed(json: &[u8]) -> Result<tokenizers::Tokenizer> {
    serde_json::from_slice::<Value>(json)?;
    match std::panic::catch_unwind(|| tokenizers::Tokenizer::from_bytes(json)) {
        Ok(parsed) => parsed.map_err(|error| anyhow!(error)),
        Err(_) => Err(anyhow!("one of its parts is not what the tokenizers library expects")),
    }
}

/// A JSON object in a file; an empty one where there is no file.
fn settings(path: &Path) -> Result<Map<String, Value>> {
    if !path.exists() {
        return Ok(Map::new());
    }
    let bytes = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    serde_json::from_slice(&bytes)
        .map_err(|error| unusable!("{} is not a JSON object: {error}", path.display()))
}

/// A special token as transformers writes it: a string, or an object with `content`.
fn content(value: Option<&Value>) -> Option<String> {
    let value = value?;
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

#[cfg(test)]
mod tests;
