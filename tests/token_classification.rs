//! Token classification end to end: words and tags in, entities out, by the real binary.

mod common;

use std::path::{Path, PathBuf};

use common::{TAGGERS, copy_dir, json, models, tk};
use serde_json::{Value, json};

fn stdout(assert: &assert_cmd::assert::Assert) -> String {
    String::from_utf8(assert.get_output().stdout.clone()).unwrap()
}

fn stderr(assert: &assert_cmd::assert::Assert) -> String {
    String::from_utf8(assert.get_output().stderr.clone()).unwrap()
}

/// The reference's sentences as a CoNLL file.
fn conll(model: &str, dir: &Path) -> PathBuf {
    let reference = json(models(model).join("reference.json"));
    let list = |value: &Value| -> Vec<String> { serde_json::from_value(value.clone()).unwrap() };
    let sentence = |record: &Value| -> String {
        let lines = list(&record["tokens"]).into_iter().zip(list(&record["tags"]));
        lines.map(|(token, tag)| format!("{token}\t{tag}\n")).collect::<String>() + "\n"
    };
    let path = dir.join("records.conll");
    let text: String = reference["records"].as_array().unwrap().iter().map(sentence).collect();
    std::fs::write(&path, text).unwrap();
    path
}

/// An exported copy of a reference model.
fn exported(model: &str, dir: &Path) -> PathBuf {
    let copy = dir.join(model);
    copy_dir(&models(model), &copy);
    tk().arg("export").arg(&copy).assert().success();
    copy
}

fn served(model: &Path, lines: &[Value], flags: &[&str]) -> Vec<Value> {
    let input: String = lines.iter().map(|line| format!("{line}\n")).collect();
    let assert =
        tk().arg("serve-batch").arg(model).args(["--input", "-"]).args(flags).write_stdin(input).assert();
    stdout(&assert.success()).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn every_family_learns_tags_and_is_measured_alike_by_both_runtimes() {
    for family in TAGGERS {
        let dir = tempfile::tempdir().unwrap();
        let (records, out) = (conll(family, dir.path()), dir.path().join("out"));
        let trained = tk()
            .args(["train", "--task", "token-classification", "--model"])
            .arg(models(family))
            .args(["--epochs", "4", "--batch-size", "4", "--learning-rate", "1e-2", "--max-length", "24"])
            .arg("--train")
            .arg(&records)
            .arg("--eval")
            .arg(&records)
            .arg("--output")
            .arg(&out)
            .assert()
            .success();
        assert!(
            stderr(&trained).contains("tags (iob2): O, B-PER, I-PER, B-LOC, I-LOC"),
            "{}",
            stderr(&trained)
        );
        tk().arg("export").arg(&out).assert().success();
        let measure = |runtime: &str| -> Value {
            let mut command = tk();
            command.arg("eval").arg(&out).args(["--json", "--runtime", runtime, "--input"]).arg(&records);
            serde_json::from_str(&stdout(&command.assert().success())).unwrap()
        };
        let (eager, onnx) = (measure("eager"), measure("onnx"));
        for metric in ["precision", "recall", "f1", "accuracy", "loss"] {
            let of = |measured: &Value| measured["metrics"][metric].as_f64().unwrap();
            assert!((of(&eager) - of(&onnx)).abs() < 1e-5, "{family}, {metric}: {eager} {onnx}");
        }
        assert!(eager["metrics"]["accuracy"].as_f64().unwrap() > 0.7, "{family}: {eager}");
        assert_eq!(eager["metrics"]["per_type"]["PER"]["support"], 8, "{eager}");
        assert!(eager["metrics"]["strict"]["f1"].is_number(), "{eager}");
    }
}

#[test]
fn entities_are_slices_of_the_text_with_offsets_in_the_unit_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let model = exported("tiny-bert-tokens", dir.path());
    let text = "I love New York, Ångström 👍🏽 café";
    for (unit, place) in [
        ("char", (|text: &str| text.chars().count()) as fn(&str) -> usize),
        ("byte", str::len),
        ("utf16", |text| text.encode_utf16().count()),
    ] {
        let answers =
            served(&model, &[json!({"text": text, "id": 7}), json!({"text": ""})], &["--offset-unit", unit]);
        assert_eq!((&answers[0]["id"], &answers[1]), (&json!(7), &json!({"index": 1, "entities": []})));
        let entities = answers[0]["entities"].as_array().unwrap();
        assert!(entities.len() > 2, "{entities:?}");
        for entity in entities {
            let start = text.find(entity["text"].as_str().unwrap()).unwrap();
            let end = start + entity["text"].as_str().unwrap().len();
            assert_eq!(entity["start"], place(&text[..start]), "{unit}: {entity}");
            assert_eq!(entity["end"], place(&text[..end]), "{unit}: {entity}");
        }
    }
}

#[test]
fn of_a_long_text_every_word_is_answered() {
    let dir = tempfile::tempdir().unwrap();
    for family in TAGGERS {
        let model = exported(family, dir.path());
        let words: Vec<String> = (0..500).map(|i| format!("w{i}")).collect();
        let answers = served(
            &model,
            &[json!({"tokens": words}), json!({"text": words.join(" ")}), json!({"text": "x".repeat(3000)})],
            &["--tags"],
        );
        assert_eq!(answers[0]["tags"].as_array().unwrap().len(), 500, "{family}");
        assert!(answers.iter().all(|answer| answer["entities"].is_array()), "{family}");
    }
}

#[test]
fn what_is_no_tag_or_no_sentence_is_refused_with_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |name: &str, text: &str, more: &[&str], said: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        let assert = tk()
            .args(["train", "--task", "token-classification", "--model"])
            .arg(models("tiny-bert-tokens"))
            .args(["--max-length", "24", "--output"])
            .arg(dir.path().join("out"))
            .arg("--train")
            .arg(&path)
            .args(more)
            .assert()
            .code(2);
        assert!(stderr(&assert).contains(said), "{said}: {}", stderr(&assert));
    };
    refused("a.jsonl", "{\"tokens\": [\"a\", \"b\"], \"tags\": [\"O\"]}\n", &[], "2 words and 1 tags");
    refused("b.jsonl", "{\"tokens\": \"a b\", \"tags\": [\"O\"]}\n", &[], "a list of strings was expected");
    refused("c.jsonl", "{\"tokens\": [], \"tags\": []}\n", &[], "the sentence has no words");
    refused(
        "d.jsonl",
        "{\"tokens\": [\"a\"], \"tags\": [\"O\"]}\n",
        &["--problem-type", "regression"],
        "--problem-type",
    );
    refused("e.conll", "a\tS-PER\n\nb\tU-PER\n", &[], "e.conll");
    refused("f.conll", "a\tO\nb\tB-PER\n\nc\tO\nd\tX-PER\n", &[], "the tag \"X-PER\" (line 5)");
    let measured = dir.path().join("eval.conll");
    std::fs::write(&measured, "a\tO\nb\tB-PER\n\nc\tO\nd\tB-ORG\n").unwrap();
    let eval = ["--eval", measured.to_str().unwrap()];
    refused("g.conll", "a\tO\nb\tB-PER\n", &eval, "eval.conll:5: tag \"B-ORG\" is not one of the model's");
    let model = models("tiny-bert-single");
    let entities = tk().arg("serve-batch").arg(&model).args(["--input", "-", "--tags"]).assert().code(2);
    assert!(stderr(&entities).contains("--tags is for token-classification"), "{}", stderr(&entities));
}
