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
    let (tokenizer, again) = (
        Tokenizer::train(Vocabulary::Gpt2, &texts, 300).unwrap(),
        Tokenizer::train(Vocabulary::Gpt2, &texts, 300).unwrap(),
    );
    assert_eq!(tokenizer.hash(), again.hash());
    assert!((258..=300).contains(&tokenizer.vocab_size()));
    let ids = tokenizer.encode("the same words", None, 99).unwrap().ids;
    assert!(ids.len() <= 5, "merges were learnt: {ids:?}");
    for text in ["the same words", "never seen: 你好👋🏽\r\n\t", "naïve"] {
        let ids = tokenizer.encode(text, None, 999).unwrap().ids;
        assert_eq!(tokenizer.inner().decode(&ids, false).unwrap(), text);
        let body = tokenizer.body(text).unwrap();
        assert_eq!((body.ids, body.bytes.iter().sum()), (ids, text.len()));
    }
    let end = tokenizer.inner().token_to_id("<|endoftext|>").unwrap();
    assert_eq!(tokenizer.encode("a<|endoftext|>", None, 9).unwrap().ids.last(), Some(&end));
    assert!(Tokenizer::train(Vocabulary::Gpt2, &texts, 200).is_err());
}

#[test]
fn a_vocabulary_is_the_same_in_every_run() {
    // many pairs of letters that are as frequent, so that which come first decides
    let word = |i: usize| -> String {
        (0..5).map(|at| char::from(b'a' + ((i * 7 + at * i + at) % 26) as u8)).collect()
    };
    let texts: Vec<String> = (0..200).map(|i| format!("{} {}", word(i), word(i))).collect();
    for kind in [Vocabulary::Gpt2, Vocabulary::Roberta, Vocabulary::WordPiece] {
        let train = || kind.tokenizer_json(&texts, 400).unwrap();
        let first = train();
        assert!((0..5).all(|_| train() == first), "{kind:?}");
    }
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
    let mut tokenizer = Tokenizer::open(&model("tiny-bert-single")).unwrap();
    tokenizer.check_fits(392, Some(2)).unwrap();
    tokenizer.check_fits(400, None).unwrap();
    let message = tokenizer.check_fits(391, Some(2)).unwrap_err().to_string();
    assert!(
        message.starts_with("tokenizer.json has ids up to 391, the model's word embeddings have 391 rows: ")
    );
    let message = tokenizer.check_fits(392, Some(0)).unwrap_err().to_string();
    assert!(
        message.starts_with(
            "tokenizer.json gives token types up to 0, the model's token type embeddings have 0"
        )
    );
}

#[test]
fn a_model_with_one_token_type_reads_single_texts_and_refuses_pairs() {
    let mut tokenizer = Tokenizer::open(&model("tiny-bert-single")).unwrap();
    assert!(tokenizer.takes_pairs());
    tokenizer.check_fits(392, Some(1)).unwrap();
    assert!(!tokenizer.takes_pairs());
    assert_eq!(tokenizer.encode("a b", Some(""), 9).unwrap().type_ids, [0; 4]);
    let error = tokenizer.encode("a b", Some("c"), 9).unwrap_err();
    assert_eq!(crate::error::exit_code(&error), 2);
    assert_eq!(
        error.to_string(),
        "the model's token type embeddings have 1 rows, too few for the second text of a pair"
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
    assert!(error(&["vocab.txt"], &config).contains("tk does not know what a BertweetTokenizer does"));
    let added = [("added_tokens.json", r#"{"<x>": 400}"#)];
    let message = r#"DIR: added_tokens.json gives the added token "<x>" the id 400, and 392 is its place behind vocab.txt"#;
    assert_eq!(error(&["vocab.txt"], &added), message);
    let message = error(&["vocab.txt"], &[("tokenizer_config.json", "[]")]);
    assert!(message.starts_with("DIR/tokenizer_config.json is not a JSON object: "));
}

/// A directory with files of a model; `tokenizer_config.json` and others changed by JSON merge patches, where a text is
/// the whole file.
fn patched(name: &str, copied: &[&str], patches: &[(&str, Value)]) -> tempfile::TempDir {
    fn merge(into: &mut Value, patch: &Value) {
        match (into, patch) {
            (Value::Object(into), Value::Object(patch)) => {
                for (key, value) in patch {
                    match value.as_str() {
                        Some("absent") => drop(into.remove(key)),
                        _ => merge(into.entry(key.clone()).or_insert(Value::Null), value),
                    }
                }
            }
            (into, patch) => *into = patch.clone(),
        }
    }
    let dir = tempfile::tempdir().unwrap();
    for file in copied {
        std::fs::copy(model(name).join(file), dir.path().join(file)).unwrap();
    }
    for (file, patch) in patches {
        let path = dir.path().join(file);
        if let Some(text) = patch.as_str() {
            std::fs::write(path, text).unwrap();
            continue;
        }
        let mut value = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap(),
            Err(_) => json!({}),
        };
        merge(&mut value, patch);
        std::fs::write(path, value.to_string()).unwrap();
    }
    dir
}

/// Holds the ids of texts, cut at twelve tokens, against those of transformers 4.57.6; those of the saved directory
/// too.
#[track_caller]
fn assert_ids(dir: &tempfile::TempDir, expected: &[(&str, &[u32])]) {
    let to = tempfile::tempdir().unwrap();
    let tokenizer = Tokenizer::open(dir.path()).unwrap();
    tokenizer.save(dir.path(), to.path()).unwrap();
    if dir.path().join("config.json").exists() {
        std::fs::copy(dir.path().join("config.json"), to.path().join("config.json")).unwrap();
    }
    let saved = Tokenizer::open(to.path()).unwrap();
    assert_eq!(saved.hash(), tokenizer.hash());
    for (text, ids) in expected {
        assert_eq!(tokenizer.encode(text, None, 12).unwrap().ids, *ids, "{text:?}");
        assert_eq!(saved.encode(text, None, 12).unwrap().ids, *ids, "{text:?}, saved");
    }
}

// by transformers 4.57.6
const BERT_CASED: &[(&str, &[u32])] = &[
    ("Good Film is café not BAD", &[2, 1, 1, 301, 1, 297, 1, 3]),
    ("é à good", &[2, 1, 1, 319, 3]),
    ("你好世界 the 今日は", &[2, 1, 252, 1, 1, 293, 1, 258, 1, 3]),
];
const BERT_ACCENTS: &[(&str, &[u32])] = &[
    ("Good Film is café not BAD", &[2, 319, 337, 301, 1, 297, 320, 3]),
    ("é à good", &[2, 1, 1, 319, 3]),
    ("你好世界 the 今日は", &[2, 1, 293, 1, 3]),
];
const BERT_SILENT: &[(&str, &[u32])] = &[
    ("Good Film is café not BAD", &[2, 319, 337, 301, 49, 83, 88, 87, 297, 320, 3]),
    ("é à good", &[2, 51, 47, 319, 3]),
    ("你好世界 the 今日は", &[2, 1, 252, 1, 1, 293, 1, 258, 1, 3]),
];
const BERT_PLAIN: &[(&str, &[u32])] = &[
    ("Good Film is café not BAD", &[2, 319, 337, 301, 49, 83, 88, 87, 297, 320, 3]),
    ("é à good", &[2, 51, 47, 319, 3]),
    ("你好世界 the 今日は", &[2, 1, 252, 1, 1, 293, 1, 258, 1, 3]),
];
const BERT_DECODER: &[(&str, &[u32])] =
    &[("a <X> b<X>c FOO foo Foo <l> z", &[2, 47, 392, 48, 392, 49, 393, 393, 393, 394, 72, 3])];
const BERT_LEGACY: &[(&str, &[u32])] = &[("<w> bar Bar BAR<w>", &[2, 392, 393, 393, 393, 392, 3])];
const BERT_MAP: &[(&str, &[u32])] = &[
    ("<u>the good thegood <v> w <v>", &[2, 392, 293, 319, 293, 89, 97, 97, 86, 393, 69, 3]),
    ("a [MASK] b", &[2, 47, 4, 48, 3]),
];
const BERT_SPLIT: &[(&str, &[u32])] =
    &[("the cat [MASK] sat  [MASK]. <mask> x <mask>y", &[2, 293, 49, 83, 102, 27, 59, 83, 101, 93, 29, 3])];
const GPT2_DECODER: &[(&str, &[u32])] = &[(
    "<|user|>the cat kilowatt<|bot|> <|r|> the",
    &[407, 317, 220, 66, 268, 220, 408, 349, 65, 281, 372, 409],
)];
const GPT2_LEGACY: &[(&str, &[u32])] =
    &[("<|user|>the cat kilowatt<|bot|> the", &[407, 317, 220, 66, 268, 220, 408, 349, 65, 281, 372, 267])];
const GPT2_PREFIX: &[(&str, &[u32])] = &[
    ("Good Film is café not BAD", &[220, 38, 334, 220, 37, 310, 76, 320, 220, 307, 69, 127]),
    (" leading", &[270, 68, 306, 319]),
];
const GPT2_NO_PREFIX: &[(&str, &[u32])] = &[
    ("Good Film is café not BAD", &[38, 334, 220, 37, 310, 76, 320, 220, 307, 69, 127, 102]),
    (" leading", &[270, 68, 306, 319]),
];
const NEOX_ENDS: &[(&str, &[u32])] = &[
    ("Good Film is café not BAD", &[406, 38, 334, 220, 37, 310, 76, 320, 220, 307, 69, 406]),
    ("", &[406, 406]),
];
const GPT2_BOS: &[(&str, &[u32])] =
    &[("Good Film is café not BAD", &[406, 38, 334, 220, 37, 310, 76, 320, 220, 307, 69, 127]), ("", &[406])];
const ROBERTA: &[(&str, &[u32])] = &[
    ("Good Film is café not BAD", &[0, 42, 338, 224, 41, 314, 80, 324, 224, 311, 73, 2]),
    ("the cat [MASK] sat  [MASK]. <mask> x <mask>y", &[0, 321, 224, 70, 272, 224, 62, 48, 36, 54, 46, 2]),
];
const ROBERTA_PREFIX: &[(&str, &[u32])] = &[
    ("Good Film is café not BAD", &[0, 224, 42, 338, 224, 41, 314, 80, 324, 224, 311, 2]),
    ("<e1>x <s>NOTUSED", &[0, 412, 224, 91, 224, 0, 224, 49, 50, 55, 56, 2]),
];
const BERT_VOCAB: &[(&str, &[u32])] = &[
    ("Good Film is café not BAD", &[2, 319, 337, 301, 49, 83, 88, 87, 297, 320, 3]),
    ("你好世界 the 今日は", &[2, 1, 252, 1, 1, 293, 1, 258, 1, 3]),
];
const CUT_LEFT: &[u32] = &[2, 89, 90, 102, 60, 91, 96, 87, 66, 87, 96, 3];
const CUT_RIGHT: &[u32] = &[2, 293, 312, 87, 66, 105, 97, 66, 90, 384, 87, 3];
const ROBERTA_PAIR: [u32; 12] = [0, 406, 284, 90, 82, 2, 2, 295, 275, 81, 224, 2];

const BERT: [&str; 3] = ["tokenizer.json", "tokenizer_config.json", "config.json"];
const CONFIG: &str = "tokenizer_config.json";

/// Types as transformers 4.57.6 gives them, for "a b" and "c d e". A template sets them itself, and others leave them.
#[test]
fn the_second_text_of_a_pair_has_a_type_of_its_own_whatever_puts_tokens_around_it() {
    let bert = json!({"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]});
    for (processor, types) in [(bert, &[0, 0, 0, 0, 1, 1, 1, 1][..]), (Value::Null, &[0, 0, 1, 1, 1])] {
        let files = ["tokenizer.json", "tokenizer_config.json"];
        let dir = dir(&files, &[]);
        let path = dir.path().join("tokenizer.json");
        let mut whole: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        whole["post_processor"] = processor;
        std::fs::write(&path, whole.to_string()).unwrap();
        let tokenizer = Tokenizer::open(dir.path()).unwrap();
        assert_eq!(tokenizer.encode("a b", Some("c d e"), 20).unwrap().type_ids, types);
        let single = tokenizer.encode("a b", None, 20).unwrap().type_ids;
        assert!(single.iter().all(|&kind| kind == 0), "{single:?}");
    }
}

#[test]
fn what_tokenizer_config_says_of_berts_normalizer_holds() {
    let bert = |patches: &[(&str, Value)]| patched("tiny-bert-single", &BERT, patches);
    let cased = json!({"do_lower_case": false});
    assert_ids(&bert(&[(CONFIG, cased.clone())]), BERT_CASED);
    let accents = json!({"strip_accents": false, "tokenize_chinese_chars": false});
    assert_ids(&bert(&[(CONFIG, accents)]), BERT_ACCENTS);
    // the other way round; where nothing is said, the class's own settings hold
    let normalizer = json!({"normalizer": {"lowercase": false, "strip_accents": false}});
    let silent = json!({"do_lower_case": "absent", "strip_accents": "absent"});
    assert_ids(&bert(&[("tokenizer.json", normalizer.clone()), (CONFIG, silent)]), BERT_SILENT);
    // a class that leaves tokenizer.json as it is, wherever it is named
    let plain = json!({"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": false});
    assert_ids(&bert(&[(CONFIG, plain)]), BERT_PLAIN);
    let (none, class) =
        (json!({"tokenizer_class": "absent", "do_lower_case": false}), "PreTrainedTokenizerFast");
    assert_ids(&bert(&[(CONFIG, none), ("config.json", json!({"tokenizer_class": class}))]), BERT_PLAIN);
    // another normalizer than BERT's has no such settings
    let chain = json!({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}});
    let dir = bert(&[("tokenizer.json", chain), (CONFIG, cased)]);
    assert_eq!(Tokenizer::open(dir.path()).unwrap().built, None);
}
#[test]
fn the_side_that_tokenizer_json_cuts_is_kept_unless_tokenizer_config_names_one() {
    let left = json!({"truncation":
        {"direction": "Left", "max_length": 64, "strategy": "LongestFirst", "stride": 0}});
    let left = [("tokenizer.json", left)];
    let text = "the one two three four five six seven eight nine ten";
    assert_ids(&patched("tiny-bert-single", &BERT, &left), &[(text, CUT_LEFT)]);
    let [left] = left;
    let right = (CONFIG, json!({"truncation_side": "right", "do_lower_case": false}));
    assert_ids(&patched("tiny-bert-single", &BERT, &[left, right]), &[(text, CUT_RIGHT)]);
    let dir = patched("tiny-bert-single", &BERT, &[(CONFIG, json!({"truncation_side": "up"}))]);
    let error = Tokenizer::open(dir.path()).err().unwrap();
    assert!(error.to_string().ends_with(r#"truncation_side is "up", expected "left" or "right""#));
}

#[test]
fn added_tokens_are_read_from_every_file_with_their_flags() {
    let token = |content: &str, strip: bool, normalized: bool, special: bool| {
        json!({"content": content, "lstrip": strip, "rstrip": strip, "single_word": false,
            "normalized": normalized, "special": special})
    };
    let decoder = json!({"added_tokens_decoder": {"392": token("<X>", false, false, false),
        "393": token("Foo", false, true, false), "394": token("<l>", true, false, true)}});
    for copied in [&BERT[..], &["vocab.txt", CONFIG, "config.json"]] {
        assert_ids(&patched("tiny-bert-single", copied, &[(CONFIG, decoder.clone())]), BERT_DECODER);
        let no_decoder = (CONFIG, json!({"added_tokens_decoder": "absent"}));
        let added = ("added_tokens.json", json!({"<w>": 392, "Bar": 393}));
        assert_ids(&patched("tiny-bert-single", copied, &[no_decoder, added]), BERT_LEGACY);
    }
    let map = json!({"additional_special_tokens": ["<u>", token("<v>", false, false, false)],
        "mask_token": token("[MASK]", false, false, false)});
    let no_decoder = (CONFIG, json!({"added_tokens_decoder": "absent"}));
    assert_ids(
        &patched("tiny-bert-single", &BERT, &[no_decoder, ("special_tokens_map.json", map)]),
        BERT_MAP,
    );
    let split = (CONFIG, json!({"split_special_tokens": true}));
    assert_ids(&patched("tiny-bert-single", &BERT, &[split]), BERT_SPLIT);

    let files = ["vocab.json", "merges.txt", CONFIG, "config.json"];
    let decoder = json!({"added_tokens_decoder": {"407": token("<|user|>", false, false, true),
        "408": token("kilowatt", false, true, false), "409": token("<|r|>", true, false, false)}});
    assert_ids(&patched("tiny-gpt2-single", &files, &[(CONFIG, decoder)]), GPT2_DECODER);
    let added = ("added_tokens.json", json!({"<|user|>": 407, "kilowatt": 408}));
    let no_decoder = (CONFIG, json!({"added_tokens_decoder": "absent"}));
    assert_ids(&patched("tiny-gpt2-single", &files, &[no_decoder, added]), GPT2_LEGACY);
}

#[test]
fn a_space_in_front_follows_tokenizer_config() {
    let files = ["tokenizer.json", CONFIG, "config.json"];
    let own = |prefix: bool| ("tokenizer.json", json!({"pre_tokenizer": {"add_prefix_space": prefix}}));
    let said =
        |prefix: Value, class: &str| (CONFIG, json!({"add_prefix_space": prefix, "tokenizer_class": class}));
    for class in ["GPT2Tokenizer", "PreTrainedTokenizerFast", "GPTNeoXTokenizerFast"] {
        let dir = |own, said| patched("tiny-gpt2-single", &files, &[own, said]);
        assert_ids(&dir(own(false), said(json!(true), class)), GPT2_PREFIX);
        assert_ids(&dir(own(true), said(json!("absent"), class)), GPT2_NO_PREFIX);
    }
    let ends =
        json!({"tokenizer_class": "GPTNeoXTokenizerFast", "add_bos_token": true, "add_eos_token": true});
    assert_ids(&patched("tiny-gpt2-single", &files, &[(CONFIG, ends)]), NEOX_ENDS);
    let built = ["vocab.json", "merges.txt", CONFIG, "config.json"];
    assert_ids(&patched("tiny-gpt2-single", &built, &[(CONFIG, json!({"add_bos_token": true}))]), GPT2_BOS);
}

#[test]
fn a_roberta_tokenizer_is_built_from_vocab_json_and_merges() {
    let gpt2 = settings(&model("tiny-gpt2-single").join("vocab.json")).unwrap();
    let mut vocab = json!({"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": gpt2.len() + 4});
    for (token, id) in gpt2 {
        vocab[token] = (id.as_u64().unwrap() + 4).into();
    }
    let dir = |config: Value, model: Value| {
        patched(
            "tiny-gpt2-single",
            &["merges.txt"],
            &[("vocab.json", vocab.clone()), (CONFIG, config), ("config.json", model)],
        )
    };
    let plain = dir(json!({}), json!({"model_type": "roberta"}));
    assert_ids(&plain, ROBERTA);
    let tokenizer = Tokenizer::open(plain.path()).unwrap();
    let pair = tokenizer
        .encode("one two three four five six", Some("seven eight nine ten eleven twelve"), 12)
        .unwrap();
    assert_eq!(pair.ids, ROBERTA_PAIR);
    assert_eq!((pair.type_ids, tokenizer.pad_id()), (vec![0; 12], 1));
    let prefix = json!({"tokenizer_class": "RobertaTokenizer", "add_prefix_space": true,
        "additional_special_tokens": ["<e1>"]});
    assert_ids(&dir(prefix, json!({})), ROBERTA_PREFIX);
}

#[test]
fn empty_lines_of_vocab_txt_ask_for_no_row() {
    let text = std::fs::read_to_string(model("tiny-bert-single").join("vocab.txt")).unwrap();
    for text in [format!("{text}\n\n\n"), text.replace('\n', "\r\n")] {
        let dir = patched("tiny-bert-single", &["config.json"], &[("vocab.txt", text.into())]);
        let mut tokenizer = Tokenizer::open(dir.path()).unwrap();
        tokenizer.check_fits(392, Some(2)).unwrap();
        assert_ids(&dir, BERT_VOCAB);
    }
}

#[test]
fn a_special_token_without_a_row_is_refused_where_a_text_holds_it() {
    let files = ["tokenizer.json", CONFIG, "config.json"];
    let dir = patched("tiny-gpt2-single", &files, &[(CONFIG, json!({"pad_token": "[PAD]"}))]);
    let mut tokenizer = Tokenizer::open(dir.path()).unwrap();
    tokenizer.check_fits(407, None).unwrap();
    assert_eq!(tokenizer.pad_id(), 0);
    tokenizer.encode("the cat", None, 12).unwrap();
    let error = tokenizer.encode("the [PAD] cat", None, 12).unwrap_err();
    assert_eq!(crate::error::exit_code(&error), 2);
    assert_eq!(
        error.to_string(),
        r#"the text holds "[PAD]", id 407 of tokenizer.json, and the model's word embeddings have 407 rows"#
    );
}

#[test]
fn files_that_can_not_be_a_tokenizer_are_errors() {
    let error = |name: &str, copied: &[&str], patches: &[(&str, Value)]| {
        let dir = patched(name, copied, patches);
        let error = Tokenizer::open(dir.path()).err().expect("a refusal");
        assert_eq!(crate::error::exit_code(&error), 2, "{error:#}");
        format!("{error:#}").replace(&dir.path().display().to_string(), "DIR")
    };
    let bert = |file: &str, patch: Value| error("tiny-bert-single", &BERT, &[(file, patch)]);
    assert_eq!(
        bert(CONFIG, json!({"do_lower_case": 1})),
        "DIR/tokenizer_config.json: do_lower_case is 1, expected true or false"
    );
    assert!(bert(CONFIG, json!({"do_lower_case": null})).contains("do_lower_case is null"));
    let other = json!({"normalizer": null});
    let message = error(
        "tiny-bert-single",
        &BERT,
        &[("tokenizer.json", other), (CONFIG, json!({"do_lower_case": true}))],
    );
    assert!(
        message.contains("tokenizer_config.json") && message.contains("tokenizer.json has no normalizer"),
        "{message}"
    );
    for value in [
        json!({"-1": {"content": "x"}}),
        json!({"1e3": {"content": "x"}}),
        json!({"392": "x"}),
        json!([]),
        json!({"392": {"content": 7}}),
        json!({"392": {"content": "x", "lstrip": 1}}),
        json!({"18446744073709551615": {"content": "<x>"}}),
    ] {
        bert(CONFIG, json!({"added_tokens_decoder": value}));
    }
    let legacy = (CONFIG, json!({"added_tokens_decoder": "absent"}));
    for value in [json!({"x": -1}), json!({"x": "392"}), json!({"x": 1e300}), json!("[]")] {
        error("tiny-bert-single", &BERT, &[legacy.clone(), ("added_tokens.json", value)]);
    }
    for deep in ["[".repeat(100_000), "{\"a\":".repeat(100_000)] {
        for file in ["tokenizer.json", CONFIG, "config.json"] {
            bert(file, deep.clone().into());
        }
    }
    let template = json!({"post_processor": {"single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}]}});
    assert!(bert("tokenizer.json", template).contains(r#"names "[X]", which its special_tokens lack"#));
    let files = ["vocab.json", "merges.txt", "config.json"];
    for id in [json!(u32::MAX), json!(-1), json!("1"), json!(1u64 << 40), json!(1.5)] {
        error("tiny-gpt2-single", &files, &[("vocab.json", json!({"a": id}))]);
    }
    let prefix = json!({"model": {"continuing_subword_prefix": "a long prefix"}});
    error("tiny-gpt2-single", &["tokenizer.json", "config.json"], &[("tokenizer.json", prefix)]);
    let merges = ("merges.txt", json!("#version: 0.2\na b\na b c\n"));
    let message = error("tiny-gpt2-single", &files, &[merges]);
    assert_eq!(message, r#"DIR/merges.txt:3: "a b c" is no merge: expected two tokens"#);
}

#[test]
fn a_class_whose_files_tk_can_not_read_is_refused() {
    let error = |copied: &[&str], patches: &[(&str, Value)]| {
        let dir = patched("tiny-bert-single", copied, patches);
        format!("{:#}", Tokenizer::open(dir.path()).err().expect("a refusal"))
    };
    let class = json!({"tokenizer_class": "BertJapaneseTokenizer"});
    for file in [CONFIG, "config.json"] {
        let copied = ["vocab.txt", "config.json"];
        let message = error(&copied, &[(file, class.clone())]);
        assert!(message.contains(file) && message.contains("BertJapaneseTokenizer does"), "{message}");
    }
    let message = error(&["vocab.txt"], &[("config.json", json!({"model_type": "roberta"}))]);
    assert!(message.contains("can't be built from vocab.txt"), "{message}");
    let message = error(&["config.json"], &[("sentencepiece.bpe.model", json!("x"))]);
    assert!(message.contains("(sentencepiece.bpe.model), which tk does not read"), "{message}");
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

#[test]
fn the_bytes_of_tokens_are_those_of_the_text_whatever_the_tokenizer_makes_of_it() {
    let bert = Tokenizer::open(&model("tiny-bert-single")).unwrap();
    let trained = Tokenizer::train(Vocabulary::Gpt2, &["the cat 東京"], 300).unwrap();
    for text in ["", " ", "The Cat\u{0} sat  ", "東京 café e\u{301}", "[MASK] [CLS]", "👋🏽 x\u{ad}\u{200b}"]
    {
        for tokenizer in [&bert, &trained] {
            let body = tokenizer.body(text).unwrap();
            assert_eq!(body.ids.len(), body.bytes.len());
            let expected = if body.ids.is_empty() { 0 } else { text.len() };
            assert_eq!(body.bytes.iter().sum::<usize>(), expected, "{text:?}");
        }
    }
    // spaces count, and the name of a token does not
    assert_eq!(bert.body("the the").unwrap().bytes, [3, 4]);
    // bytes that make a character together
    let plain = Tokenizer::train(Vocabulary::Gpt2, &["x"], 257).unwrap();
    assert_eq!(plain.body("東a").unwrap().bytes, [1, 1, 1, 1]);
}

#[test]
fn what_a_tokenizer_puts_around_a_text_is_known_and_can_be_put_there() {
    let bert = Tokenizer::open(&model("tiny-bert-single")).unwrap();
    assert_eq!(bert.around().unwrap(), (vec![2], vec![3]));
    assert_eq!(bert.body("[CLS] a").unwrap().ids[0], 2, "a text's own are its own");
    let trained = Tokenizer::train(Vocabulary::Gpt2, &["the cat"], 300).unwrap();
    assert_eq!(trained.around().unwrap(), (vec![], vec![]));
    let end = trained.inner().token_to_id("<|endoftext|>").unwrap();
    let begun = trained.starting_with(end).unwrap();
    assert_eq!(begun.around().unwrap(), (vec![end], vec![]));
    let ids = trained.encode("the cat", None, 99).unwrap().ids;
    assert_eq!(begun.encode("the cat", None, 99).unwrap().ids, [&[end], &ids[..]].concat());
    assert_eq!(begun.body("the cat").unwrap().ids, ids);
    let dir = tempfile::tempdir().unwrap();
    begun.save(dir.path(), dir.path()).unwrap();
    let saved = Tokenizer::open(dir.path()).unwrap();
    assert_eq!((saved.around().unwrap(), saved.hash()), (begun.around().unwrap(), begun.hash()));
    assert!(trained.starting_with(99_999).is_err());
}

const TOKENS: [&str; 3] = ["tiny-bert-tokens", "tiny-roberta-tokens", "tiny-xlm-roberta-tokens"];

#[test]
fn tokens_of_given_words_are_those_of_transformers() {
    for name in TOKENS {
        let tokenizer = Tokenizer::open(&model(name)).unwrap();
        let reference: Value =
            serde_json::from_slice(&std::fs::read(model(name).join("reference.json")).unwrap()).unwrap();
        let most = reference["max_length"].as_u64().unwrap() as usize;
        let (before, behind) = tokenizer.frame().unwrap();
        let mut cut = 0;
        for (record, ids) in
            reference["records"].as_array().unwrap().iter().zip(reference["ids"].as_array().unwrap())
        {
            let given: Vec<String> = serde_json::from_value(record["tokens"].clone()).unwrap();
            let words: Vec<Option<usize>> = serde_json::from_value(record["words"].clone()).unwrap();
            let ids: Vec<u32> = serde_json::from_value(ids.clone()).unwrap();
            let pieces = tokenizer.pieces_of_words(&given).unwrap();
            let room = pieces.ids.len().min(most - before - behind);
            cut += usize::from(room < pieces.ids.len());
            let framed = tokenizer.framed(&pieces.ids[..room]).unwrap();
            assert_eq!((&framed.ids, framed.truncated), (&ids, false), "{name}, {given:?}");
            assert_eq!(framed.type_ids, vec![0; ids.len()]);
            let own: Vec<Option<usize>> = pieces.words[..room].iter().map(|&word| Some(word)).collect();
            assert_eq!(own, words[before..words.len() - behind], "{name}, {given:?}");
            for (i, &word) in pieces.words.iter().enumerate() {
                assert_eq!(pieces.continues[i], i > 0 && pieces.words[i - 1] == word);
            }
            let text = given.join(" ");
            for (span, &word) in pieces.spans.iter().zip(&pieces.words) {
                assert!(given[word].contains(&text[span.clone()]), "{name}: {span:?} of {text:?}");
            }
        }
        assert!(cut > 0, "{name}: no text was too long");
    }
}

/// The slices of a text that its tokens are, one that goes on with a word behind a `+`.
fn slices(text: &str, pieces: &Pieces) -> Vec<String> {
    let marked = pieces.spans.iter().zip(&pieces.continues);
    marked.map(|(span, on)| format!("{}{}", if *on { "+" } else { "" }, &text[span.clone()])).collect()
}

#[test]
fn tokens_stand_where_they_say() {
    let of = |name: &str, text: &str| {
        let pieces = Tokenizer::open(&model(name)).unwrap().pieces(text).unwrap();
        (slices(text, &pieces), pieces.words)
    };
    let text = "é love!  I 東";
    let words = |list: &[&str]| list.iter().map(|slice| (*slice).to_owned()).collect::<Vec<_>>();
    assert_eq!(of("tiny-bert-tokens", text), (words(&["é", "love", "!", "I", "東"]), vec![0, 1, 2, 3, 4]));
    // what is put in front of a word stands where the word begins, and behind a space no token goes on
    let (found, own) = of("tiny-xlm-roberta-tokens", "love  I");
    assert_eq!((&*found[0], found.last().unwrap().as_str(), own[0], own[own.len() - 1]), ("lo", "I", 0, 1));
    let (found, own) = of("tiny-roberta-tokens", "I東");
    // a character of several tokens is each one's
    assert_eq!((found.last().unwrap().as_str(), own[own.len() - 1]), ("+東", 0));
}

#[test]
fn words_are_given_spans_in_the_text_that_they_are_joined_to() {
    let tokenizer = Tokenizer::open(&model("tiny-bert-tokens")).unwrap();
    let given = ["", "é", "\u{200b}", "love I", "[MASK]"].map(str::to_owned);
    let pieces = tokenizer.pieces_of_words(&given).unwrap();
    let text = given.join(" ");
    assert_eq!(slices(&text, &pieces), ["é", "love", "+I", "[MASK]"]);
    assert_eq!(pieces.words, [1, 3, 3, 4]);
    assert_eq!(tokenizer.pieces_of_words(&[]).unwrap(), Pieces::default());
    assert_eq!(tokenizer.pieces("").unwrap(), Pieces::default());
    assert_eq!(tokenizer.framed(&[]).unwrap().ids, [2, 3]);
}

#[test]
fn a_token_without_a_row_is_refused_in_words_and_windows_too() {
    let mut tokenizer = Tokenizer::open(&model("tiny-bert-tokens")).unwrap();
    let id = tokenizer.pieces("love").unwrap().ids[0];
    tokenizer.rows = id as usize;
    for found in [
        tokenizer.pieces("love").map(drop),
        tokenizer.pieces_of_words(&["love".to_owned()]).map(drop),
        tokenizer.framed(&[id]).map(drop),
    ] {
        let message = found.unwrap_err().to_string();
        assert!(message.contains(&format!("\"love\", id {id}")), "{message}");
    }
}

#[test]
fn every_given_word_has_a_space_in_front_where_the_vocabulary_is_gpt2s() {
    let without = json!({"add_prefix_space": false});
    for (name, config) in [
        ("tiny-gpt2-single", &without),
        ("tiny-gpt2-single", &Value::Null),
        ("tiny-roberta-single", &without),
    ] {
        let mut patches = vec![(CONFIG, config.clone())];
        patches.retain(|(_, patch)| !patch.is_null());
        let files = ["tokenizer.json", CONFIG, "special_tokens_map.json", "config.json"];
        let copied: Vec<_> =
            files.into_iter().filter(|file| *file != CONFIG || !patches.is_empty()).collect();
        let from = patched(name, &copied, &patches);
        let plain = Tokenizer::open(from.path()).unwrap();
        let words = ["the", "the", "Bob"].map(str::to_owned);
        let before = plain.pieces_of_words(&words).unwrap().ids;
        let tokenizer = plain.clone().for_words().unwrap();
        let pieces = tokenizer.pieces_of_words(&words).unwrap();
        assert_ne!(pieces.ids, before, "{name}");
        assert_eq!(pieces.ids, plain.pieces(" the the Bob").unwrap().ids, "{name}");
        assert_eq!(tokenizer.encode("the", None, 9).unwrap(), plain.encode(" the", None, 9).unwrap());
        let to = tempfile::tempdir().unwrap();
        tokenizer.save(from.path(), to.path()).unwrap();
        let saved = Tokenizer::open(to.path()).unwrap();
        assert_eq!(saved.pieces_of_words(&words).unwrap(), pieces, "{name}");
        assert_eq!(saved.hash(), tokenizer.hash(), "{name}");
        assert_eq!(saved.clone().for_words().unwrap().hash(), saved.hash());
        let says = settings(&to.path().join(CONFIG)).unwrap();
        assert_eq!(says["add_prefix_space"], true, "{name}");
        assert!(saved.built.is_none(), "{name}: tokenizer.json is as it is meant");
    }
    for name in TOKENS {
        let tokenizer = Tokenizer::open(&model(name)).unwrap();
        let hash = tokenizer.hash().to_owned();
        let same = tokenizer.for_words().unwrap();
        assert!(same.hash() == hash && same.built.is_none(), "{name}");
    }
}
