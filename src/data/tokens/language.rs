//! Texts as a language model reads them: their own tokens, apart from those that the tokenizer adds around them.

use anyhow::{Context, anyhow};
use serde_json::{Value, json};
use tokenizers::{Encoding, Token};

use super::Tokenizer;
use crate::{Result, bail_unusable};

/// A text's own tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Body {
    /// (T)
    pub ids: Vec<u32>,
    /// (T): the bytes of the text, in UTF-8, that each token stands for. Together those of the text, whatever the
    /// tokenizer leaves out or replaces.
    pub bytes: Vec<usize>,
}

impl Tokenizer {
    /// The tokens that the tokenizer itself puts in front of a text, and those that it puts behind it.
    ///
    /// # Errors
    /// The tokenizer's post-processor fails.
    pub fn around(&self) -> Result<(Vec<u32>, Vec<u32>)> {
        let text = Encoding::from_tokens(vec![Token::new(0, String::new(), (0, 0))], 0);
        let found = self.inner.post_process(text, None, true);
        let found = found.map_err(|error| anyhow!(error)).context("adding special tokens")?;
        let ids = found.get_ids();
        let text = found.get_special_tokens_mask().iter().position(|&special| special == 0);
        Ok(match text {
            Some(at) => (ids[..at].to_vec(), ids[at + 1..].to_vec()),
            None => Default::default(),
        })
    }

    /// The tokens of a text, without special tokens of the tokenizer's own.
    ///
    /// # Errors
    /// The tokenizer fails. Unusable: the text holds a token that the model has no row for.
    pub fn body(&self, text: &str) -> Result<Body> {
        let encoding = self.inner.encode(text, false);
        let encoding = encoding.map_err(|error| anyhow!(error)).context("tokenizing")?;
        self.check_rows(encoding.get_ids())?;
        let bytes = bytes(text.len(), encoding.get_offsets(), encoding.get_tokens());
        Ok(Body { ids: encoding.get_ids().to_vec(), bytes })
    }

    /// This tokenizer with a token in front of every text.
    ///
    /// # Errors
    /// Unusable: the tokenizer has no such token.
    pub fn starting_with(&self, id: u32) -> Result<Self> {
        let Some(token) = self.inner.id_to_token(id) else {
            bail_unusable!(
                "the token {id} is to stand in front of every text, and {} has none of this number: \
                 eos_token_id of config.json is to be the token that ends a text",
                self.name()
            );
        };
        let mut whole = self.as_json()?;
        let start = json!({"SpecialToken": {"id": token, "type_id": 0}});
        let text = |name: &str, kind: u32| json!({"Sequence": {"id": name, "type_id": kind}});
        let template = json!({
            "type": "TemplateProcessing",
            "single": [start, text("A", 0)],
            "pair": [start, text("A", 0), text("B", 1)],
            "special_tokens": {&token: {"id": token, "ids": [id], "tokens": [token]}},
        });
        whole["post_processor"] = match whole["post_processor"].take() {
            Value::Null => template,
            first => json!({"type": "Sequence", "processors": [first, template]}),
        };
        self.rebuilt(&whole)
    }
}

/// The bytes of each token of a text of so many: from the end of the token before to its own end, the rest to the last.
/// Where several tokens share a character, each stands for as many bytes as its name has characters, if that comes out.
fn bytes(length: usize, offsets: &[(usize, usize)], names: &[String]) -> Vec<usize> {
    let (mut bytes, mut before, mut first) = (Vec::with_capacity(offsets.len()), 0, 0);
    while first < offsets.len() {
        let (mut end, mut next) = (offsets[first].1, first + 1);
        while next < offsets.len() && offsets[next].0 < end {
            end = end.max(offsets[next].1);
            next += 1;
        }
        let end = if next == offsets.len() { length } else { end.clamp(before, length) };
        let own: Vec<usize> = names[first..next].iter().map(|name| name.chars().count()).collect();
        if next - first > 1 && own.iter().sum::<usize>() == end - before {
            bytes.extend(own);
        } else {
            bytes.push(end - before);
            bytes.extend((first + 1..next).map(|_| 0));
        }
        (before, first) = (end, next);
    }
    bytes
}
