use std::path::PathBuf;

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models").join(name)
}

/// A directory with the given files, beside copies of a model's.
fn dir(copied: &[&str], written: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in copied {
        std::fs::copy(model("tiny-bert-single").join(name), dir.path().join(name)).unwrap();
    }
    for (name, text) in written {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    dir
}

type Texts = Vec<(String, Option<String>)>;
type Rows = Vec<(Vec<u32>, Vec<u32>)>;

/// The texts that transformers encoded, and the maximum length, ids and type ids that it wrote.
fn reference(name: &str) -> (Texts, usize, Rows) {
    let reference: Value =
        serde_json::from_slice(&std::fs::read(model(name).join("reference.json")).unwrap()).unwrap();
    let text = |record: &Value, key: &str| record.get(key).map(|text| text.as_str().unwrap().to_owned());
    let records = reference["records"].as_array().unwrap().iter();
    let texts = records.map(|record| (text(record, "text").unwrap(), text(record, "text_pair"))).collect();
    let numbers = |key: &str| -> Vec<Vec<u32>> { serde_json::from_value(reference[key].clone()).unwrap() };
    let encodings = numbers("ids").into_iter().zip(numbers("type_ids")).collect();
    (texts, reference["max_length"].as_u64().unwrap() as usize, encodings)
}

fn assert_encodes_as_transformers(tokenizer: &Tokenizer, name: &str) {
    let (texts, max_length, expected) = reference(name);
    let whole = tokenizer.encode_all(&texts, usize::MAX).unwrap();
    let encodings = tokenizer.encode_all(&texts, max_length).unwrap();
    assert_eq!(encodings.len(), expected.len());
    for (i, encoding) in encodings.into_iter().enumerate() {
        assert_eq!(encoding.truncated, whole[i].len() > max_length, "{name}, {:?}", texts[i]);
        assert_eq!((encoding.ids, encoding.type_ids), expected[i], "{name}, {:?}", texts[i]);
    }
}

const MODELS: [&str; 3] = ["tiny-bert-single", "tiny-bert-multi", "tiny-bert-regression"];

#[test]
fn ids_are_those_of_transformers() {
    for name in MODELS {
        let tokenizer = Tokenizer::open(&model(name)).unwrap();
        assert_encodes_as_transformers(&tokenizer, name);
        assert_eq!((tokenizer.pad_id(), tokenizer.vocab_size()), (0, 392));
    }
}

#[test]
fn a_tokenizer_built_from_vocab_txt_is_the_one_transformers_saves() {
    let built = dir(&["vocab.txt", "tokenizer_config.json", "special_tokens_map.json"], &[]);
    let tokenizer = Tokenizer::open(built.path()).unwrap();
    let saved: Value =
        serde_json::from_slice(&std::fs::read(model("tiny-bert-single").join("tokenizer.json")).unwrap())
            .unwrap();
    assert_eq!(serde_json::from_str::<Value>(&tokenizer.built.as_ref().unwrap().0).unwrap(), saved);
    for name in MODELS {
        assert_encodes_as_transformers(&tokenizer, name);
    }
}

#[test]
fn a_tokenizer_built_from_vocab_json_is_the_one_transformers_saves() {
    let name = "tiny-gpt2-single";
    let saved = Tokenizer::open(&model(name)).unwrap();
    assert_encodes_as_transformers(&saved, name);
    let files = ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"];
    let dir = tempfile::tempdir().unwrap();
    for file in files {
        std::fs::copy(model(name).join(file), dir.path().join(file)).unwrap();
    }
    let built = Tokenizer::open(dir.path()).unwrap();
    assert_encodes_as_transformers(&built, name);
    assert_eq!(saved.pad_id(), built.pad_id());
    let texts = ["a\u{303}<|endoftext|> 你好👋🏽\n\n  x", "", " ", "don't 12345"];
    for text in texts {
        let ids = |tokenizer: &Tokenizer| tokenizer.encode(text, None, 999).unwrap().ids;
        assert_eq!(ids(&built), ids(&saved));
        assert_eq!(built.inner().decode(&ids(&built), false).unwrap(), text);
    }
}

#[test]
fn a_trained_tokenizer_gives_every_text_back_and_is_the_same_every_time() {
    let texts: Vec<String> =
        (0..200).map(|i| format!("the same words again and again, text {}", i % 7)).collect();
    let (tokenizer, again) = (Tokenizer::train(&texts, 300).unwrap(), Tokenizer::train(&texts, 300).unwrap());
    assert_eq!(tokenizer.hash(), again.hash());
    assert!((258..=300).contains(&tokenizer.vocab_size()));
    let ids = tokenizer.encode("the same words", None, 99).unwrap().ids;
    assert!(ids.len() <= 5, "merges were learnt: {ids:?}");
    for text in ["the same words", "never seen: 你好👋🏽\r\n\t", "naïve"] {
        let ids = tokenizer.encode(text, None, 999).unwrap().ids;
        assert_eq!(tokenizer.inner().decode(&ids, false).unwrap(), text);
        assert_eq!(ids.iter().map(|&id| tokenizer.bytes(id)).sum::<usize>(), text.len());
    }
    let end = tokenizer.end().unwrap();
    assert_eq!(tokenizer.encode("a<|endoftext|>", None, 9).unwrap().ids.last(), Some(&end));
    assert_eq!(tokenizer.bytes(end), 0);
    assert!(Tokenizer::train(&texts, 200).is_err());
}

#[test]
fn a_built_tokenizer_obeys_its_config() {
    let ids = |config: Value, text: &str| {
        let files = [
            ("vocab.txt", "[CLS]\n[SEP]\r\n?\na\nA\nA中\na中\né\ne\n"),
            ("tokenizer_config.json", &*config.to_string()),
        ];
        let tokenizer = Tokenizer::open(dir(&[], &files).path()).unwrap();
        let ids = tokenizer.encode(text, None, 99).unwrap().ids;
        ids[1..ids.len() - 1].to_vec()
    };
    let unk = json!({"content": "?"});
    assert_eq!(ids(json!({"unk_token": unk}), "A A中 É"), [3, 3, 2, 8]);
    assert_eq!(ids(json!({"unk_token": unk, "do_lower_case": false}), "A A中 é"), [4, 4, 2, 7]);
    assert_eq!(ids(json!({"unk_token": unk, "tokenize_chinese_chars": false}), "A A中"), [3, 6]);
    assert_eq!(ids(json!({"unk_token": unk, "strip_accents": false}), "É"), [7]);
    let added = json!({
        "content": "<x>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": true,
        "special": false,
    });
    assert_eq!(ids(json!({"unk_token": unk, "added_tokens_decoder": {"9": added}}), "a<x>a"), [3, 9, 3]);
}

#[test]
fn padding_and_truncation_of_the_file_are_not_applied() {
    let path = model("tiny-bert-single").join("tokenizer.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    json["padding"] = json!({
        "strategy": {"Fixed": 128}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 3,
        "pad_type_id": 0, "pad_token": "[SEP]",
    });
    json["truncation"] =
        json!({"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"});
    let tokenizer = Tokenizer::open(dir(&[], &[("tokenizer.json", &json.to_string())]).path()).unwrap();
    let encoding = tokenizer.encode("a b c d e f", None, 20).unwrap();
    assert_eq!((encoding.len(), encoding.truncated), (8, false));
    // where no other file names the padding token, the stored one is what transformers would pad with
    assert_eq!(tokenizer.pad_id(), 3);
}

#[test]
fn a_length_without_room_for_special_tokens_is_refused() {
    let tokenizer = Tokenizer::open(&model("tiny-bert-single")).unwrap();
    assert_eq!(tokenizer.encode("a b", None, 2).unwrap().ids, [2, 3]);
    let error = tokenizer.encode("a b", Some("c"), 2).unwrap_err();
    assert_eq!(error.to_string(), "a maximum length of 2 has no room for the 3 special tokens of a text");
}

#[test]
fn truncation_may_be_asked_for_on_the_left() {
    let mut config: Value = serde_json::from_slice(
        &std::fs::read(model("tiny-bert-single").join("tokenizer_config.json")).unwrap(),
    )
    .unwrap();
    config["truncation_side"] = "left".into();
    let files = [("tokenizer_config.json", &*config.to_string())];
    let left = Tokenizer::open(dir(&["tokenizer.json"], &files).path()).unwrap();
    let right = Tokenizer::open(&model("tiny-bert-single")).unwrap();
    let whole = right.encode("a b c d", None, 9).unwrap().ids;
    assert_eq!(left.encode("a b c d", None, 4).unwrap().ids, [whole[0], whole[3], whole[4], whole[5]]);
    assert_eq!(right.encode("a b c d", None, 4).unwrap().ids, [whole[0], whole[1], whole[2], whole[5]]);
}

#[test]
fn a_model_with_too_few_rows_is_refused() {
    let tokenizer = Tokenizer::open(&model("tiny-bert-single")).unwrap();
    tokenizer.check_fits(392, Some(2)).unwrap();
    tokenizer.check_fits(400, None).unwrap();
    let message = tokenizer.check_fits(391, Some(2)).unwrap_err().to_string();
    assert!(
        message.starts_with("tokenizer.json has ids up to 391, the model's word embeddings have 391 rows: ")
    );
    let message = tokenizer.check_fits(392, Some(1)).unwrap_err().to_string();
    assert!(
        message.starts_with(
            "tokenizer.json gives token types up to 1, the model's token type embeddings have 1"
        )
    );
}

#[test]
fn a_saved_tokenizer_has_the_same_files_and_hash() {
    let from = model("tiny-bert-single");
    let tokenizer = Tokenizer::open(&from).unwrap();
    let to = tempfile::tempdir().unwrap();
    tokenizer.save(&from, to.path()).unwrap();
    tokenizer.save(to.path(), to.path()).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"] {
        assert_eq!(std::fs::read(to.path().join(name)).unwrap(), std::fs::read(from.join(name)).unwrap());
    }
    assert_eq!(Tokenizer::open(to.path()).unwrap().hash(), tokenizer.hash());

    let from = dir(&["vocab.txt"], &[]);
    let tokenizer = Tokenizer::open(from.path()).unwrap();
    let to = tempfile::tempdir().unwrap();
    tokenizer.save(from.path(), to.path()).unwrap();
    assert_eq!(Tokenizer::open(to.path()).unwrap().hash(), tokenizer.hash());
    assert_eq!(tokenizer.hash().len(), 64);
}

#[test]
fn what_is_missing_or_broken_is_named() {
    let error = |copied: &[&str], written: &[(&str, &str)]| {
        let dir = dir(copied, written);
        let error = Tokenizer::open(dir.path()).err().unwrap();
        assert_eq!(crate::error::exit_code(&error), 2, "{error:#}");
        format!("{error:#}").replace(&dir.path().display().to_string(), "DIR")
    };
    assert_eq!(
        error(&[], &[]),
        "DIR has no tokenizer: neither tokenizer.json nor vocab.txt nor vocab.json with merges.txt is there"
    );
    assert!(
        error(&[], &[("tokenizer.json", "{}")])
            .starts_with("DIR/tokenizer.json can't be read as a tokenizer: ")
    );
    assert_eq!(error(&[], &[("vocab.txt", "a\n[UNK]\n")]), "DIR/vocab.txt lacks the special token \"[CLS]\"");
    let config = [("tokenizer_config.json", r#"{"tokenizer_class": "BertweetTokenizer"}"#)];
    assert!(error(&["vocab.txt"], &config).contains("a BertweetTokenizer can't be built from vocab.txt"));
    let added = [("added_tokens.json", r#"{"<x>": 400}"#)];
    let message = r#"DIR: the added token "<x>" has id 400, and 392 is its place behind vocab.txt"#;
    assert_eq!(error(&["vocab.txt"], &added), message);
    let message = error(&["vocab.txt"], &[("tokenizer_config.json", "[]")]);
    assert!(message.starts_with("DIR/tokenizer_config.json is not a JSON object: "));
}

proptest! {
    #[test]
    fn the_longer_text_is_cut_first(first in 0..40_usize, second in 1..40_usize, max_length in 3..30_usize) {
        let tokenizer = Tokenizer::open(&model("tiny-bert-single")).unwrap();
        let (text, pair) = ("a ".repeat(first), "b ".repeat(second));
        let encoding = tokenizer.encode(&text, Some(&pair), max_length).unwrap();
        let room = max_length - 3;
        let kept = match (first + second > room, first > second) {
            (false, _) => first,
            (true, false) => first.min(room / 2),
            (true, true) => room - second.min(room / 2),
        };
        prop_assert_eq!(encoding.type_ids.iter().filter(|&&kind| kind == 0).count(), kept + 2);
        prop_assert_eq!(encoding.len(), (first + second).min(room) + 3);
        prop_assert_eq!(encoding.truncated, first + second > room);
    }

    #[test]
    fn any_text_is_encoded_within_the_length(text in any::<String>(), pair in any::<Option<String>>()) {
        let tokenizer = Tokenizer::open(&model("tiny-bert-single")).unwrap();
        let encoding = tokenizer.encode(&text, pair.as_deref(), 7).unwrap();
        prop_assert!(encoding.len() <= 7 && encoding.ids.iter().all(|&id| id < 392));
    }
}
