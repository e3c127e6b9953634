//! What training finds on evaluation data, through the real binary: thresholds of several labels and a temperature of one
//! are kept in config.json and used wherever the model answers or is measured.

mod common;

use std::path::{Path, PathBuf};

use assert_cmd::assert::Assert;
use common::{copy_dir, models, records_file, tk};
use serde_json::{Value, json};

fn train(dir: &Path, model: &str, more: &[&str]) -> Assert {
    copy_dir(&models(model), &dir.join("model"));
    records_file(model, 2, &dir.join("records.jsonl"));
    let mut run = tk();
    run.args(["train", "--task", "text-classification", "--max-length", "48", "--max-steps", "8", "--json"]);
    run.args(["--batch-size", "4", "--eval-every", "4", "--learning-rate", "1e-3"]);
    for (flag, name) in [("--model", "model"), ("--train", "records.jsonl"), ("--output", "out")] {
        run.arg(flag).arg(dir.join(name));
    }
    run.args(more).assert()
}

fn with_eval(dir: &Path, model: &str, flag: &str) -> (Value, String) {
    let eval = dir.join("records.jsonl");
    let done = train(dir, model, &[flag, "--eval", eval.to_str().unwrap()]).success();
    (serde_json::from_slice(&done.get_output().stdout).unwrap(), stderr(&done))
}

fn stderr(assert: &Assert) -> String {
    String::from_utf8_lossy(&assert.get_output().stderr).into_owned()
}

fn eval(dir: &Path, runtime: &str) -> Value {
    let done = tk()
        .args(["eval", "--json", "--max-length", "48", "--runtime", runtime, "--input"])
        .arg(dir.join("records.jsonl"))
        .arg(dir.join("out"))
        .assert()
        .success();
    serde_json::from_slice::<Value>(&done.get_output().stdout).unwrap()["metrics"].clone()
}

fn answers(dir: &Path) -> Vec<Value> {
    let done = tk()
        .args(["serve-batch", "--quiet", "--logits", "--output", "-", "--input"])
        .arg(dir.join("records.jsonl"))
        .arg(dir.join("out"))
        .assert()
        .success();
    let text = String::from_utf8(done.get_output().stdout.clone()).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .filter(|line: &Value| line.get("error").is_none())
        .collect()
}

fn config(dir: &Path) -> PathBuf {
    dir.join("out/config.json")
}

fn same(found: &Value, wanted: &Value) {
    for (name, wanted) in wanted.as_object().unwrap() {
        let (found, wanted) = (found[name].as_f64().unwrap(), wanted.as_f64().unwrap());
        assert!((found - wanted).abs() < 1e-4, "{name}: {found}, wanted {wanted}");
    }
}

#[test]
fn thresholds_are_kept_and_decide_what_is_said_and_measured() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let (result, said) = with_eval(dir, "tiny-bert-multi", "--tune-thresholds");
    assert!(said.contains("a label is said above: food"), "{said}");
    let saved = common::json(config(dir));
    let thresholds = saved["thresholds"].as_object().unwrap().clone();
    assert_eq!(thresholds.len(), 4);
    assert!(thresholds.values().any(|p| p.as_f64().unwrap() != 0.5), "{thresholds:?}");
    tk().args(["export", "--quiet"]).arg(dir.join("out")).assert().success();
    for runtime in ["eager", "onnx"] {
        same(&eval(dir, runtime), &result["eval"]);
    }
    let holds = |thresholds: &serde_json::Map<String, Value>| {
        let mut labels = 0;
        for answer in answers(dir) {
            let scores = answer["scores"].as_object().unwrap();
            let said: Vec<&String> = scores
                .iter()
                .filter(|(name, score)| score.as_f64() > thresholds[*name].as_f64())
                .map(|(name, _)| name)
                .collect();
            assert_eq!(answer["labels"], json!(said), "{answer}");
            labels += said.len();
        }
        labels
    };
    let some = holds(&thresholds);
    assert!(some > 0);

    // other thresholds say other labels, and the metrics follow
    let mut other = saved.clone();
    for (_, threshold) in other["thresholds"].as_object_mut().unwrap() {
        *threshold = json!(0.999_999);
    }
    std::fs::write(config(dir), other.to_string()).unwrap();
    assert_eq!(holds(other["thresholds"].as_object().unwrap()), 0);
    for runtime in ["eager", "onnx"] {
        assert_eq!(eval(dir, runtime)["f1_micro"], 0.0);
    }
    other["thresholds"]["foood"] = json!(0.5);
    std::fs::write(config(dir), other.to_string()).unwrap();
    let said = stderr(
        &tk().args(["eval", "--input"]).arg(dir.join("records.jsonl")).arg(dir.join("out")).assert().code(2),
    );
    assert!(said.contains("foood") && said.contains("did you mean \"food\"?"), "{said}");
}

#[test]
fn a_temperature_is_kept_and_changes_scores_alone() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let (result, said) = with_eval(dir, "tiny-bert-single", "--calibrate");
    assert!(said.contains("the expected calibration error is"), "{said}");
    let saved = common::json(config(dir));
    let temperature = saved["calibration_temperature"].as_f64().unwrap();
    assert!((temperature - 1.0).abs() > 1e-3, "{temperature}");
    let log = std::fs::read_to_string(dir.join("out/training/log.jsonl")).unwrap();
    assert!(log.contains("eval_ece_before") && log.contains("eval_calibration_temperature"));
    tk().args(["export", "--quiet"]).arg(dir.join("out")).assert().success();
    for runtime in ["eager", "onnx"] {
        same(&eval(dir, runtime), &result["eval"]);
    }
    let check = |temperature: f64| {
        let answers = answers(dir);
        assert!(!answers.is_empty());
        for answer in &answers {
            let logits = answer["logits"].as_array().unwrap();
            let parts: Vec<f64> = logits.iter().map(|x| (x.as_f64().unwrap() / temperature).exp()).collect();
            let sum: f64 = parts.iter().sum();
            for (score, part) in answer["scores"].as_object().unwrap().values().zip(&parts) {
                assert!((score.as_f64().unwrap() - part / sum).abs() < 1e-5, "{answer} at {temperature}");
            }
        }
        answers
            .into_iter()
            .map(|answer| (answer["label"].clone(), answer["logits"].clone()))
            .collect::<Vec<_>>()
    };
    let with = check(temperature);
    let (loss, ece) = (eval(dir, "eager")["loss"].clone(), eval(dir, "eager")["ece"].clone());
    let mut plain = saved;
    plain.as_object_mut().unwrap().remove("calibration_temperature");
    std::fs::write(config(dir), plain.to_string()).unwrap();
    assert_eq!(check(1.0), with, "labels and logits stay");
    assert!(eval(dir, "eager")["loss"] == loss && eval(dir, "eager")["ece"] != ece);
}

#[test]
fn what_finds_nothing_is_refused() {
    for (model, flag, says) in [
        ("tiny-bert-multi", "--calibrate", "--calibrate is for one label a text"),
        ("tiny-bert-single", "--tune-thresholds", "--tune-thresholds is for several labels a text"),
        ("tiny-bert-regression", "--calibrate", "the training data has numbers"),
        ("tiny-bert-single", "--calibrate", "give --eval"),
        ("tiny-bert-multi", "--tune-thresholds", "give --eval"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let measured: &[&str] = if says == "give --eval" { &[] } else { &["--validation-split", "0.3"] };
        let said = stderr(&train(dir.path(), model, &[&[flag], measured].concat()).code(2));
        assert!(said.contains(says), "{said}");
        assert!(!dir.path().join("out").exists());
    }
}
