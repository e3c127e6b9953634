//! `vocab.json` and `merges.txt` → the tokenizer.json that transformers' GPT2TokenizerFast writes.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::settings;
use crate::{Result, unusable};

/// GPT-2's end of a text: in its vocabulary, and never made of smaller parts.
pub(super) const END: &str = "<|endoftext|>";

/// `special` gives the special tokens by the keys that transformers' files have.
pub(super) fn tokenizer_json(
    dir: &Path,
    config: &Map<String, Value>,
    special: impl Fn(&str) -> Option<String>,
) -> Result<String> {
    let vocab = settings(&dir.join("vocab.json"))?;
    let path = dir.join("merges.txt");
    let merges = std::fs::read_to_string(&path)
        .map_err(|error| unusable!("{} can't be read: {error}", path.display()))?;
    // the first line may be a comment with a version
    let merges: Vec<&str> =
        merges.lines().filter(|line| !line.is_empty() && !line.starts_with("#version")).collect();

    let mut names = ["bos_token", "eos_token", "unk_token", "pad_token"]
        .map(|key| special(key).unwrap_or_else(|| END.to_owned()))
        .to_vec();
    names.sort();
    names.dedup();
    let mut added: Vec<(u64, String)> =
        names.into_iter().filter_map(|name| Some((vocab.get(&name)?.as_u64()?, name))).collect();
    added.sort();
    let added: Vec<Value> = added
        .into_iter()
        .map(|(id, content)| {
            json!({
                "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": true, "special": true,
            })
        })
        .collect();
    let prefix = config.get("add_prefix_space").and_then(Value::as_bool).unwrap_or(false);
    let byte_level = |prefix: bool, trim: bool| {
        let kind = "ByteLevel";
        json!({"type": kind, "add_prefix_space": prefix, "trim_offsets": trim, "use_regex": true})
    };
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": byte_level(prefix, true),
        "post_processor": byte_level(true, false),
        "decoder": byte_level(true, true),
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
    Ok(serde_json::to_string_pretty(&tokenizer)?)
}
