//! `vocab.txt` and `tokenizer_config.json` → the tokenizer.json that transformers' BertTokenizerFast writes.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::settings;
use crate::{Result, bail_unusable, unusable};

/// The classes whose pipeline is BERT's. Others have a vocab.txt too, and cut words differently.
const CLASSES: [&str; 4] = ["Bert", "DistilBert", "Electra", "MobileBert"];

/// `special` gives the special tokens by the keys that transformers' files have.
pub(super) fn tokenizer_json(
    dir: &Path,
    config: &Map<String, Value>,
    special: impl Fn(&str) -> Option<String>,
) -> Result<String> {
    let path = dir.join("vocab.txt");
    if let Some(class) = config.get("tokenizer_class").and_then(Value::as_str) {
        let family = class.trim_end_matches("Fast").trim_end_matches("Tokenizer");
        if !CLASSES.contains(&family) {
            bail_unusable!(
                "{}: a {class} can't be built from vocab.txt, and tokenizer.json is not there; \
                 AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) of transformers writes it",
                dir.display()
            );
        }
    }
    let text =
        std::fs::read(&path).map_err(|error| unusable!("{} can't be read: {error}", path.display()))?;
    let text = String::from_utf8(text).map_err(|error| unusable!("{}: {error}", path.display()))?;
    // a token that stands twice has its last line's id, as in transformers
    let vocab: Map<_, _> =
        text.lines().enumerate().map(|(id, token)| (token.to_owned(), id.into())).collect();

    let token =
        |key: &str| special(&format!("{key}_token")).unwrap_or_else(|| format!("[{}]", key.to_uppercase()));
    let id = |token: &str| {
        vocab.get(token).ok_or_else(|| unusable!("{} lacks the special token {token:?}", path.display()))
    };
    let (unk, cls, sep) = (token("unk"), token("cls"), token("sep"));
    id(&unk)?;
    let added = added_tokens(dir, config, &vocab, token)?;

    let flag = |key: &str, default: bool| config.get(key).and_then(Value::as_bool).unwrap_or(default);
    let part = |token: &str, kind: u32| json!({"SpecialToken": {"id": token, "type_id": kind}});
    let text = |name: &str, kind: u32| json!({"Sequence": {"id": name, "type_id": kind}});
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": true,
            "handle_chinese_chars": flag("tokenize_chinese_chars", true),
            "strip_accents": config.get("strip_accents").and_then(Value::as_bool),
            "lowercase": flag("do_lower_case", true),
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [part(&cls, 0), text("A", 0), part(&sep, 0)],
            "pair": [part(&cls, 0), text("A", 0), part(&sep, 0), text("B", 1), part(&sep, 1)],
            "special_tokens": {
                &cls: {"id": cls, "ids": [id(&cls)?], "tokens": [cls]},
                &sep: {"id": sep, "ids": [id(&sep)?], "tokens": [sep]},
            },
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {
            "type": "WordPiece",
            "unk_token": unk,
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocab,
        },
    });
    Ok(serde_json::to_string_pretty(&tokenizer)?)
}

/// The special tokens, then those that were added to the vocabulary, by id.
fn added_tokens(
    dir: &Path,
    config: &Map<String, Value>,
    vocab: &Map<String, Value>,
    special: impl Fn(&str) -> String,
) -> Result<Vec<Value>> {
    let entry = |id: &Value, content: &str, special: bool| {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": !special, "special": special,
        })
    };
    let mut added = BTreeMap::new();
    for token in ["pad", "unk", "cls", "sep", "mask"].map(special) {
        if let Some(id) = vocab.get(&token) {
            added.insert(id.as_u64(), entry(id, &token, true));
        }
    }
    for (token, id) in settings(&dir.join("added_tokens.json"))? {
        added.entry(id.as_u64()).or_insert_with(|| entry(&id, &token, false));
    }
    // newer than added_tokens.json, and it knows each token's flags
    for (id, token) in config.get("added_tokens_decoder").and_then(Value::as_object).into_iter().flatten() {
        let id = id.parse::<u64>().ok();
        let mut fields = Map::from_iter([("id".to_owned(), json!(id))]);
        fields.extend(token.as_object().cloned().unwrap_or_default());
        added.insert(id, Value::Object(fields));
    }
    // the library gives tokens that are not in vocab.txt the ids that follow it, whatever is asked for
    let mut next = vocab.len() as u64;
    for (id, token) in &added {
        let content = token["content"].as_str().unwrap_or_default();
        let expected = vocab.get(content).map_or(Some(next), Value::as_u64);
        if *id != expected {
            let expected = expected.unwrap_or_default();
            bail_unusable!(
                "{}: the added token {content:?} has id {}, and {expected} is its place behind vocab.txt",
                dir.display(),
                token["id"]
            );
        }
        next += u64::from(!vocab.contains_key(content));
    }
    Ok(added.into_values().collect())
}
