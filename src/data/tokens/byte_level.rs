//! `vocab.json` and `merges.txt` → the tokenizer.json that transformers' GPT2TokenizerFast and RobertaTokenizerFast make
//! of them, but for the special tokens.

use std::collections::HashSet;
use std::path::Path;

use serde_json::json;

use super::settings;
use crate::{Result, bail_unusable, unusable};

/// GPT-2's end of a text: in its vocabulary, and never made of smaller parts.
pub(super) const END: &str = "<|endoftext|>";

pub(super) fn tokenizer_json(dir: &Path) -> Result<String> {
    let vocab = settings(&dir.join("vocab.json"))?;
    let path = dir.join("merges.txt");
    let text = std::fs::read_to_string(&path)
        .map_err(|error| unusable!("{} can't be read: {error}", path.display()))?;
    let text = text.replace("\r\n", "\n").replace('\r', "\n");
    // As transformers: the first line is taken for a comment with a version, whatever it is, and what stands behind the
    // last line's end is no line.
    let lines: Vec<&str> = text.split('\n').collect();
    let lines = lines.get(1..lines.len() - 1).unwrap_or_default();
    let (mut merges, mut seen) = (Vec::with_capacity(lines.len()), HashSet::new());
    for (i, line) in lines.iter().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let mut parts = line.split_whitespace();
        let (Some(left), Some(right), None) = (parts.next(), parts.next(), parts.next()) else {
            bail_unusable!("{}:{}: {line:?} is no merge: expected two tokens", path.display(), i + 2);
        };
        if seen.insert((left, right)) {
            merges.push([left, right]);
        }
    }
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let mut decoder = byte_level.clone();
    decoder["add_prefix_space"] = true.into();
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": false,
            "vocab": vocab,
            "merges": merges,
        },
    });
    Ok(tokenizer.to_string())
}
