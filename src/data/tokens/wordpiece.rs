//! `vocab.txt` → the tokenizer.json that transformers' BertTokenizerFast makes of it, but for the special tokens.

use std::path::Path;

use serde_json::{Map, json};

use crate::{Result, unusable};

/// `unk` stands for words that the vocabulary has no parts for.
pub(super) fn tokenizer_json(dir: &Path, unk: &str) -> Result<String> {
    let path = dir.join("vocab.txt");
    let text =
        std::fs::read(&path).map_err(|error| unusable!("{} can't be read: {error}", path.display()))?;
    let text = String::from_utf8(text).map_err(|error| unusable!("{}: {error}", path.display()))?;
    // Python's idea of a line
    let text = text.replace("\r\n", "\n").replace('\r', "\n");
    // a token that stands twice has its last line's id, as in transformers
    let vocab: Map<_, _> =
        text.lines().enumerate().map(|(id, token)| (token.to_owned(), id.into())).collect();
    if !vocab.contains_key(unk) {
        return Err(unusable!("{} lacks the special token {unk:?}", path.display()));
    }
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": true,
            "handle_chinese_chars": true,
            "strip_accents": null,
            "lowercase": true,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": null,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {
            "type": "WordPiece",
            "unk_token": unk,
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocab,
        },
    });
    Ok(tokenizer.to_string())
}
