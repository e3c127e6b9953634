//! Question answering end to end: questions and texts in, answers out, by the real binary.

mod common;

use std::path::{Path, PathBuf};

use common::{ANSWERERS, copy_dir, models, records_file, tk};
use serde_json::{Value, json};

fn stdout(assert: &assert_cmd::assert::Assert) -> String {
    String::from_utf8(assert.get_output().stdout.clone()).unwrap()
}

fn stderr(assert: &assert_cmd::assert::Assert) -> String {
    String::from_utf8(assert.get_output().stderr.clone()).unwrap()
}

/// Trains a reference model on a file of questions, and measures it there.
fn trained(model: &str, records: &Path, out: &Path, more: &[&str]) -> assert_cmd::assert::Assert {
    tk().args(["train", "--task", "question-answering", "--model"])
        .arg(models(model))
        .args(["--epochs", "30", "--batch-size", "4", "--learning-rate", "1e-2", "--max-length", "48"])
        .arg("--train")
        .arg(records)
        .arg("--eval")
        .arg(records)
        .arg("--output")
        .arg(out)
        .args(more)
        .assert()
}

fn measured(dir: &Path, records: &Path, runtime: &str) -> Value {
    let mut command = tk();
    command.arg("eval").arg(dir).args(["--json", "--runtime", runtime, "--input"]).arg(records);
    serde_json::from_str(&stdout(&command.assert().success())).unwrap()
}

fn served(model: &Path, lines: &[Value], flags: &[&str]) -> Vec<Value> {
    let input: String = lines.iter().map(|line| format!("{line}\n")).collect();
    let assert =
        tk().arg("serve-batch").arg(model).args(["--input", "-"]).args(flags).write_stdin(input).assert();
    stdout(&assert.success()).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn exported(model: &str, dir: &Path) -> PathBuf {
    let copy = dir.join(model);
    copy_dir(&models(model), &copy);
    tk().arg("export").arg(&copy).assert().success();
    copy
}

#[test]
fn every_family_learns_answers_and_that_there_are_none() {
    for model in ANSWERERS {
        let dir = tempfile::tempdir().unwrap();
        let (records, out) = (dir.path().join("records.jsonl"), dir.path().join("out"));
        records_file(model, 1, &records);
        let said = stderr(&trained(model, &records, &out, &[]).success());
        assert!(said.contains("some questions have no answer"), "{said}");
        assert!(!said.contains("starts anew"), "the head is kept: {said}");
        let config = common::json(out.join("config.json"));
        assert!(config["null_score_diff_threshold"].is_number() && config["id2label"].is_null(), "{config}");

        tk().arg("export").arg(&out).assert().success();
        let (eager, onnx) = (measured(&out, &records, "eager"), measured(&out, &records, "onnx"));
        for metric in ["exact_match", "f1", "loss"] {
            let of = |measured: &Value| measured["metrics"][metric].as_f64().unwrap();
            assert!((of(&eager) - of(&onnx)).abs() < 1e-4, "{model}, {metric}: {eager} {onnx}");
        }
        assert!(eager["metrics"]["f1"].as_f64().unwrap() > 80.0, "{model}: {eager}");
        assert_eq!(eager["metrics"]["questions"], 6);
        assert!(eager["metrics"]["NoAns_exact"].is_number(), "{eager}");
        tk().arg("parity").arg(&out).assert().success();
    }
}

#[test]
fn squads_files_are_read_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let question = |question: &str, text: &str, start: usize| json!({"id": question, "question": question, "answers": [{"text": text, "answer_start": start}]});
    let file = json!({"version": "1.1", "data": [
        {"title": "a", "paragraphs": [
            {"context": "Bob and Ana", "qas": [question("who", "Bob", 0), question("and who", "Ana", 8)]},
            {"context": "never", "qas": [question("when", "never", 0)]},
        ]},
        {"title": "b", "paragraphs": [{"context": "at home", "qas": [question("where", "home", 3)]}]},
    ]});
    let (records, out) = (dir.path().join("train.json"), dir.path().join("out"));
    std::fs::write(&records, file.to_string()).unwrap();
    let said = stderr(&trained("tiny-bert-answers", &records, &out, &[]).success());
    assert!(said.contains("4 training examples"), "{said}");
    assert!(common::json(out.join("config.json"))["null_score_diff_threshold"].is_null());
    assert_eq!(measured(&out, &records, "eager")["metrics"]["exact_match"], 100.0);
}

#[test]
fn answers_are_slices_of_the_text_with_offsets_in_the_unit_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    for model in ANSWERERS {
        let copy = exported(model, dir.path());
        let context = "😀 we watched it at home in Ångström, 中文字 tomorrow; ".repeat(9);
        let lines = [
            json!({"question": "where?", "context": context, "id": 7}),
            json!({"question": "where?", "context": ""}),
            json!({"question": "where?"}),
            json!({"question": "where? ".repeat(80), "context": "here"}),
        ];
        for (unit, place) in [
            ("char", (|text: &str| text.chars().count()) as fn(&str) -> usize),
            ("byte", str::len),
            ("utf16", |text| text.encode_utf16().count()),
        ] {
            let flags = ["--offset-unit", unit, "--top-k", "5", "--doc-stride", "8", "--max-length", "40"];
            let answers = served(&copy, &lines, &flags);
            let best = &answers[0];
            assert_eq!((&best["id"], best["answers"].as_array().unwrap().len()), (&json!(7), 5), "{best}");
            assert_eq!(best["answers"][0]["answer"], best["answer"]);
            let scores: Vec<f64> =
                best["answers"].as_array().unwrap().iter().map(|a| a["score"].as_f64().unwrap()).collect();
            assert!(scores.is_sorted_by(|a, b| a >= b), "{scores:?}");
            for answer in best["answers"].as_array().unwrap() {
                let text = answer["answer"].as_str().unwrap();
                let stands = context.match_indices(text).any(|(at, _)| {
                    answer["start"] == place(&context[..at])
                        && answer["end"] == place(&context[..at + text.len()])
                });
                assert!(stands && !text.is_empty(), "{model}, {unit}: {answer}");
            }
            for (answer, said) in answers[1..].iter().zip(["no words", "context", "leaves no room"]) {
                assert!(answer["error"].as_str().unwrap().contains(said), "{model}: {answer}");
            }
        }
    }
}

#[test]
fn what_is_no_question_or_no_answer_is_refused_with_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |record: Value, said: &str| {
        let records = dir.path().join("records.jsonl");
        let good =
            json!({"question": "q", "context": "a b", "answers": {"text": ["b"], "answer_start": [2]}});
        std::fs::write(&records, format!("{good}\n{record}\n")).unwrap();
        let assert = trained("tiny-bert-answers", &records, &dir.path().join("out"), &[]).code(2);
        let text = stderr(&assert);
        assert!(text.contains(said) && text.contains("records.jsonl:2"), "{said}: {text}");
    };
    let with = |answers: Value| json!({"question": "q", "context": "é a b", "answers": answers});
    refused(with(json!({"text": ["b"], "answer_start": [2]})), "\"a\" stands");
    refused(with(json!({"text": ["b"], "answer_start": [99]})), "does not stand at character 99");
    refused(with(json!({"text": ["b"], "answer_start": [-1]})), "no place");
    refused(with(json!({"text": ["b"], "answer_start": [1, 2]})), "1 texts and 2 places");
    refused(with(json!({"text": ["b"]})), "needs its answer_start");
    refused(with(json!({"text": [3], "answer_start": [4]})), "no text");
    refused(with(json!("b")), "is neither");
    refused(json!({"question": "q", "context": "a"}), "answers");
    refused(json!({"question": "q ".repeat(90), "context": "a", "answers": []}), "leaves no room");
    refused(json!({"question": 3, "context": "a", "answers": []}), "a string was expected");
}
