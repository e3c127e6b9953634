//! Texts → token ids, by the tokenizer that stands in the model's directory.

mod added;
mod byte_level;
mod cached;
mod class;
mod language;
mod pairs;
mod trained;
mod wordpiece;
mod words;

use std::collections::HashSet;
use std::path::Path;

use anyhow::{Context, anyhow};
use rayon::prelude::*;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tokenizers::utils::truncation::{TruncationDirection, TruncationParams, truncate_encodings};
use tokenizers::{Model, PostProcessor, Token};

use self::added::Added;
use self::class::{Class, Files, Kind};
use crate::data::batch::Encoding;
use crate::data::cache::Cache;
use crate::{Result, bail_unusable, files, unusable};
pub use language::Body;
pub use pairs::{PairWindow, SecondText};
pub use trained::Vocabulary;
pub use words::Pieces;

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

/// SentencePiece's files, which hold a tokenizer too.
const SENTENCEPIECE: [&str; 4] = ["sentencepiece.bpe.model", "spiece.model", "spm.model", "tokenizer.model"];

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
    /// What stands for a piece of text that the vocabulary lacks.
    unknown: Option<u32>,
    mask: Option<u32>,
    /// What tokenizer_config.json is to say, whatever it says.
    says: Map<String, Value>,
    /// Of the model that it was held against: rows of the word embeddings, and of the token types'.
    rows: usize,
    token_types: usize,
    /// The token types that a pair is given.
    pair_types: usize,
    /// Where what is made of its tokens is kept.
    cache: Option<Cache>,
}

impl Tokenizer {
    /// Reads a directory's tokenizer as transformers' AutoTokenizer does: `tokenizer.json`, or BERT's pipeline from
    /// `vocab.txt`, or GPT-2's or RoBERTa's from `vocab.json` and `merges.txt`; then what `tokenizer_config.json` and
    /// its tokenizer class say otherwise, and the tokens that the files add.
    ///
    /// # Errors
    /// Unusable: no such file is there, one can't be read, or they ask for what can't be done.
    pub fn open(dir: &Path) -> Result<Self> {
        let config = settings(&dir.join("tokenizer_config.json"))?;
        let files = Files { dir, config: &config };
        let class = Class::of(&files)?;
        let has = |name: &str| dir.join(name).exists();
        let unusable = |error: tokenizers::Error| unusable!("{}: {error}", dir.display());

        let (mut inner, added, bytes, built, changed);
        if has("tokenizer.json") {
            let path = dir.join("tokenizer.json");
            let json = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
            inner = parsed(&json)
                .map_err(|error| unusable!("{} can't be read as a tokenizer: {error:#}", path.display()))?;
            added = Added::read(&files, class.as_ref(), Some(&inner))?;
            let new = added.add_to(&mut inner, &files, "tokenizer.json", false)?;
            let other = match &class {
                Some(class) => class.apply(&mut inner, &files, |key| added.role(key))?,
                None => false,
            };
            (bytes, built, changed) = (json, "tokenizer.json", new || other);
        } else {
            let of = |kind| class.unwrap_or(Class::default_of(kind));
            let (json, class);
            (json, class, built, added) = if has("vocab.txt") {
                let class = of(Kind::Bert);
                class.buildable(&[Kind::Bert], dir, "vocab.txt")?;
                let added = Added::read(&files, Some(&class), None)?;
                let unk = added.role("unk_token").unwrap_or_default();
                (wordpiece::tokenizer_json(dir, &unk)?, class, "vocab.txt", added)
            } else if has("vocab.json") && has("merges.txt") {
                let class = of(Kind::Gpt2);
                class.buildable(&[Kind::Gpt2, Kind::Roberta, Kind::Bart], dir, "vocab.json")?;
                let added = Added::read(&files, Some(&class), None)?;
                (byte_level::tokenizer_json(dir)?, class, "vocab.json", added)
            } else if let Some(name) = SENTENCEPIECE.into_iter().find(|name| has(name)) {
                bail_unusable!(
                    "{} has a tokenizer in SentencePiece's form alone ({name}), which tk does not read; \
                     AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) of transformers writes tokenizer.json",
                    dir.display()
                );
            } else {
                bail_unusable!(
                    "{} has no tokenizer: neither tokenizer.json nor vocab.txt nor vocab.json with merges.txt is there",
                    dir.display()
                );
            };
            let path = dir.join(built);
            inner = parsed(json.as_bytes())
                .map_err(|error| unusable!("{} can't be read as a tokenizer: {error:#}", path.display()))?;
            if class.kind == Kind::Bert {
                // where no file gives them an id, they are another vocabulary's
                let ends = ["cls_token", "sep_token"].map(|key| added.role(key).unwrap_or_default());
                for token in ends.iter().filter(|token| !added.has_id(token)) {
                    if inner.token_to_id(token).is_none() {
                        bail_unusable!("{} lacks the special token {token:?}", path.display());
                    }
                }
            }
            added.add_to(&mut inner, &files, built, true)?;
            class.set_template(&mut inner, &files, |key| added.role(key))?;
            class.apply(&mut inner, &files, |key| added.role(key))?;
            (bytes, changed) = (Vec::new(), true);
        }
        let json = if changed { inner.to_string(true).map_err(unusable)?.into_bytes() } else { bytes };
        // not a part of tokenizer.json
        inner.set_encode_special_tokens(files.flag("split_special_tokens")?.unwrap_or(false));
        let direction = match config.get("truncation_side") {
            None | Some(Value::Null) => None,
            Some(Value::String(side)) if side == "left" => Some(TruncationDirection::Left),
            Some(Value::String(side)) if side == "right" => Some(TruncationDirection::Right),
            Some(side) => bail_unusable!(
                "{}: truncation_side is {side}, expected \"left\" or \"right\"",
                dir.join("tokenizer_config.json").display()
            ),
        };
        let built = changed.then(|| (String::from_utf8_lossy(&json).into_owned(), built));
        Self::of(inner, &json, Some(&added), direction, built)
            .map_err(|error| unusable!("{}: {error:#}", dir.display()))
    }

    /// Whether a directory holds the files of a tokenizer.
    pub fn is_in(dir: &Path) -> bool {
        let names = ["tokenizer.json", "vocab.txt", "vocab.json"].into_iter().chain(SENTENCEPIECE);
        names.into_iter().any(|name| dir.join(name).exists())
    }

    /// Learns a vocabulary of at most `vocab_size` tokens from texts.
    ///
    /// # Errors
    /// Unusable: a size that has no room for what stands in every vocabulary of the kind.
    pub fn train<S: AsRef<str> + Send + Sync>(
        kind: Vocabulary,
        texts: &[S],
        vocab_size: usize,
    ) -> Result<Self> {
        let json = kind.tokenizer_json(texts, vocab_size)?;
        let new = Self::of(
            parsed(json.as_bytes())?,
            json.clone().as_bytes(),
            None,
            None,
            Some((json, "the trained tokenizer")),
        )?;
        Ok(Self { says: kind.settings(), ..new })
    }

    /// The token that stands for one that is to be found, where the tokenizer has one.
    pub fn mask(&self) -> Option<u32> {
        self.mask
    }

    /// `json` is the tokenizer.json that `inner` is.
    fn of(
        mut inner: tokenizers::Tokenizer,
        json: &[u8],
        added: Option<&Added>,
        direction: Option<TruncationDirection>,
        built: Option<(String, &'static str)>,
    ) -> Result<Self> {
        let padding = inner.get_padding().map(|padding| padding.pad_id);
        let own_direction = inner.get_truncation().map(|truncation| truncation.direction);
        let direction = direction.or(own_direction).unwrap_or(TruncationDirection::Right);
        // all-MiniLM-L6-v2's file pads every text to 128 and cuts it there
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| anyhow!(error))?;

        let pad = added.and_then(|added| inner.token_to_id(&added.role("pad_token")?)).or(padding);
        let pad_id = pad.or_else(|| inner.token_to_id("[PAD]")).or_else(|| inner.token_to_id("<pad>"));
        // Many a model has a [PAD] or a [MASK] that its vocabulary and its embeddings lack: such a token asks for no row
        // before a text holds it. Nor does an empty line of vocab.txt: no text has an empty token.
        let optional: HashSet<&str> = added.map(|added| added.roles().collect()).unwrap_or_default();
        let beyond = |token: &str| optional.contains(token) && inner.get_model().token_to_id(token).is_none();
        let ids = inner.get_vocab(true).into_iter().filter(|(token, _)| !token.is_empty() && !beyond(token));
        let vocab_size = ids.map(|(_, id)| id as usize + 1).max().unwrap_or(0);
        let unknown = added.and_then(|added| inner.token_to_id(&added.role("unk_token")?));
        let mask = added.and_then(|added| inner.token_to_id(&added.role("mask_token")?));
        let mask = mask.or_else(|| inner.token_to_id("[MASK]")).or_else(|| inner.token_to_id("<mask>"));
        let hash = crate::checkpoint::hex(&Sha256::digest(json));
        Ok(Self {
            inner,
            built,
            hash,
            pad_id: pad_id.unwrap_or(0),
            vocab_size,
            direction,
            unknown,
            mask,
            says: Map::new(),
            rows: usize::MAX,
            token_types: usize::MAX,
            pair_types: 0,
            cache: None,
        })
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
        let tokens = |text: &str, kind| {
            let mut tokens = self.inner.encode_fast(text, false)?;
            tokens.set_type_ids(vec![kind; tokens.len()]); // not every post-processor sets them
            Ok::<_, tokenizers::Error>(tokens)
        };
        let cut = || {
            let (text, pair) = (tokens(text, 0)?, pair.map(|pair| tokens(pair, 1)).transpose()?);
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
        self.check_rows(encoding.get_ids())?;
        if pair.is_some() {
            self.check_pairs()?;
        }
        Ok(Encoding {
            ids: encoding.get_ids().to_vec(),
            type_ids: encoding.get_type_ids().to_vec(),
            truncated,
        })
    }

    /// Whether the model that the tokenizer was held against has a token type for each of two texts.
    pub fn takes_pairs(&self) -> bool {
        self.token_types >= self.pair_types
    }

    /// Refuses a pair where the model can't tell its texts apart.
    fn check_pairs(&self) -> Result<()> {
        if !self.takes_pairs() {
            bail_unusable!(
                "the model's token type embeddings have {} rows, too few for the second text of a pair",
                self.token_types
            );
        }
        Ok(())
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

    /// The id that fills a batch's shorter rows; 0 where the tokenizer has no padding token.
    pub fn pad_id(&self) -> u32 {
        self.pad_id
    }

    /// The highest id, added tokens included, plus one.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Holds a text's ids against the model's word embeddings.
    fn check_rows(&self, ids: &[u32]) -> Result<()> {
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= self.rows) {
            bail_unusable!(
                "the text holds {:?}, id {id} of {}, and the model's word embeddings have {} rows",
                self.inner.id_to_token(id).unwrap_or_default(),
                self.name(),
                self.rows
            );
        }
        Ok(())
    }

    /// Holds the ids against the model's embeddings, and remembers their rows: [`Tokenizer::encode`] then refuses what
    /// has none. `token_types` is `None` for a model that reads none.
    ///
    /// # Errors
    /// Unusable: an id of the vocabulary, or a single text's token type, that the model has no row for.
    pub fn check_fits(&mut self, vocab_rows: usize, token_types: Option<usize>) -> Result<()> {
        let mut ids = self.vocab_size;
        let mut types = [0, 0];
        for (pair, types) in [false, true].into_iter().zip(&mut types) {
            let token =
                |kind| tokenizers::Encoding::from_tokens(vec![Token::new(0, String::new(), (0, 0))], kind);
            let encoding = self.inner.post_process(token(0), pair.then(|| token(1)), true);
            let encoding = encoding.map_err(|error| anyhow!(error)).context("adding special tokens")?;
            ids = encoding.get_ids().iter().map(|&id| id as usize + 1).fold(ids, usize::max);
            *types = encoding.get_type_ids().iter().map(|&kind| kind as usize + 1).fold(0, usize::max);
        }
        if ids > vocab_rows {
            bail_unusable!(
                "{} has ids up to {}, the model's word embeddings have {vocab_rows} rows: \
                 the tokenizer is another model's, or tokens were added to it and not to the model",
                self.name(),
                ids - 1
            );
        }
        let [types, pair_types] = types;
        match token_types {
            Some(rows) if types > rows => bail_unusable!(
                "{} gives token types up to {}, the model's token type embeddings have {rows} rows: \
                 the tokenizer is another model's",
                self.name(),
                types - 1
            ),
            _ => {}
        }
        (self.rows, self.pair_types) = (vocab_rows, pair_types);
        self.token_types = token_types.unwrap_or(usize::MAX);
        if self.pad_id as usize >= vocab_rows {
            self.pad_id = 0; // what pads is masked
        }
        Ok(())
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
        if !self.says.is_empty() {
            let path = to.join("tokenizer_config.json");
            let mut config = settings(&path)?;
            config.extend(self.says.clone());
            files::write(&path, serde_json::to_string_pretty(&config)? + "\n")?;
        }
        self.built.as_ref().map_or(Ok(()), |(json, _)| files::write(&to.join("tokenizer.json"), json))
    }

    /// The library's tokenizer, without padding and truncation: for offsets and for decoding.
    pub fn inner(&self) -> &tokenizers::Tokenizer {
        &self.inner
    }

    /// What tokenizer.json says of it.
    fn as_json(&self) -> Result<Value> {
        let json = self.inner.to_string(false).map_err(|error| anyhow!(error))?;
        serde_json::from_str(&json).context("a tokenizer as JSON")
    }

    /// The tokenizer that a changed tokenizer.json of this one's says, for the same model.
    fn rebuilt(&self, whole: &Value) -> Result<Self> {
        let json = serde_json::to_string_pretty(whole)?;
        let mut inner = parsed(json.as_bytes())?;
        inner.set_encode_special_tokens(self.inner.get_encode_special_tokens());
        let (bytes, direction) = (json.clone().into_bytes(), Some(self.direction));
        let new = Self::of(inner, &bytes, None, direction, Some((json, self.name())))?;
        Ok(Self { inner: new.inner, built: new.built, hash: new.hash, ..self.clone() })
    }

    fn name(&self) -> &'static str {
        self.built.as_ref().map_or("tokenizer.json", |(_, from)| from)
    }
}

/// No vocabulary has as many tokens; the library counts up to the highest id when it writes one.
const MOST_IDS: u32 = 1 << 24;

/// Reads a tokenizer.json, and refuses what the library would panic at.
fn parsed(json: &[u8]) -> Result<tokenizers::Tokenizer> {
    serde_json::from_slice::<Value>(json)?; // the library takes for granted that all of it is JSON
    // and it cuts the prefix off merges' tokens, however short they are
    let read = std::panic::catch_unwind(|| tokenizers::Tokenizer::from_bytes(json));
    let tokenizer = match read {
        Ok(read) => read.map_err(|error| anyhow!(error))?,
        Err(_) => bail_unusable!("one of its parts is not what the tokenizers library expects"),
    };
    if let Some((token, id)) = tokenizer.get_vocab(false).into_iter().find(|(_, id)| *id >= MOST_IDS) {
        bail_unusable!("the token {token:?} has the id {id}, which no vocabulary reaches");
    }
    if let Some(token) = template_lacks(&serde_json::to_value(tokenizer.get_post_processor())?) {
        bail_unusable!("the template of its post_processor names {token:?}, which its special_tokens lack");
    }
    Ok(tokenizer)
}

/// A special token in a post-processor's template that is not among its own special tokens, with as many ids as names.
fn template_lacks(processor: &Value) -> Option<String> {
    let lists = ["single", "pair"].into_iter().filter_map(|key| processor.get(key)?.as_array()).flatten();
    let mut named = lists.filter_map(|piece| piece.get("SpecialToken")?.get("id")?.as_str());
    let own = |token: &str| {
        let token = processor.get("special_tokens")?.get(token)?;
        (token.get("ids")?.as_array()?.len() == token.get("tokens")?.as_array()?.len()).then_some(())
    };
    let inner = processor.get("processors").and_then(Value::as_array).into_iter().flatten();
    named
        .find(|token| own(token).is_none())
        .map(str::to_owned)
        .or_else(|| inner.into_iter().find_map(template_lacks))
}

/// A JSON object in a file; an empty one where there is no file.
pub(crate) fn settings(path: &Path) -> Result<Map<String, Value>> {
    if !path.exists() {
        return Ok(Map::new());
    }
    let bytes = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    serde_json::from_slice(&bytes)
        .map_err(|error| unusable!("{} is not a JSON object: {error}", path.display()))
}

#[cfg(test)]
mod tests;
