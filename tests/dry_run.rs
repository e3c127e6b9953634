//! `tk train --dry-run`, the real binary: it finds what looks like a mistake and nothing else, for every task, and leaves
//! nothing behind.

mod common;

use std::path::PathBuf;

use common::{models, tk};
use serde_json::{Value, json};

const WORDS: [&str; 8] = ["good", "bad", "long", "short", "old", "new", "loud", "calm"];

/// A folder with records to learn from and to measure on.
struct Bench {
    dir: tempfile::TempDir,
    train: Vec<Value>,
    eval: Vec<Value>,
}

fn record(i: usize) -> Value {
    let text = format!("a {} film, the {} of {i} years", WORDS[i % 8], WORDS[i / 8 % 8]);
    json!({"text": text, "label": if i.is_multiple_of(2) { "yes" } else { "no" }})
}

impl Bench {
    /// Records without fault.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { dir, train: (0..100).map(record).collect(), eval: (100..140).map(record).collect() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn dry_run(&self, task: &str, model: &str, more: &[&str]) -> std::process::Output {
        for (name, records) in [("train.jsonl", &self.train), ("eval.jsonl", &self.eval)] {
            std::fs::write(self.path(name), records.iter().map(|r| format!("{r}\n")).collect::<String>())
                .unwrap();
        }
        let mut command = tk();
        command.args([
            "train",
            "--dry-run",
            "--json",
            "--task",
            task,
            "--max-length",
            "24",
            "--batch-size",
            "4",
        ]);
        command.arg("--model").arg(models(model)).arg("--output").arg(self.path("out"));
        command.arg("--train").arg(self.path("train.jsonl"));
        if !self.eval.is_empty() {
            command.arg("--eval").arg(self.path("eval.jsonl"));
        }
        command.args(more).output().unwrap()
    }

    /// What is found; nothing is left behind.
    fn found(&self, more: &[&str]) -> Value {
        self.found_for("text-classification", "tiny-bert-single", more)
    }

    fn found_for(&self, task: &str, model: &str, more: &[&str]) -> Value {
        let output = self.dry_run(task, model, more);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{said}");
        assert!(!self.path("out").exists());
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn kinds(&self, more: &[&str]) -> Vec<(String, u64)> {
        kinds(&self.found(more))
    }
}

fn kinds(found: &Value) -> Vec<(String, u64)> {
    let kind =
        |warning: &Value| (warning["kind"].as_str().unwrap().to_owned(), warning["count"].as_u64().unwrap());
    found["warnings"].as_array().unwrap().iter().map(kind).collect()
}

fn one(kind: &str, count: u64) -> Vec<(String, u64)> {
    vec![(kind.to_owned(), count)]
}

#[test]
fn of_clean_records_all_is_told_and_nothing_warned_of() {
    let found = Bench::new().found(&["--strict", "--gradient-accumulation", "2", "--epochs", "2"]);
    assert_eq!(kinds(&found), []);
    let train = &found["train"];
    assert_eq!((train["records"].as_u64(), found["eval"]["records"].as_u64()), (Some(100), Some(40)));
    assert_eq!(train["columns"], json!([["text", "text"], ["label", "label"]]));
    assert_eq!(train["labels"], json!([["no", 50], ["yes", 50]]));
    assert_eq!((&train["lengths"]["of"], &train["cut"]), (&json!(100), &json!(0)));
    let lengths = ["p50", "p90", "p99", "longest"].map(|name| train["lengths"][name].as_u64().unwrap());
    assert!(lengths.is_sorted() && lengths[0] > 2 && lengths[3] <= 24, "{lengths:?}");
    let plan = &found["plan"];
    // 25 micro-batches of four, two a step, twice
    assert_eq!((&plan["steps"], &plan["warmup_steps"]), (&json!(26), &json!(3)));
    assert_eq!(plan["groups"].as_array().unwrap().len(), 2);
    let numbers: u64 =
        plan["groups"].as_array().unwrap().iter().map(|g| g["numbers"].as_u64().unwrap()).sum();
    assert_eq!(found["model"]["trained"], json!(numbers));
    let shown = found["examples"].as_array().unwrap();
    assert_eq!(shown.len(), 3);
    assert_eq!((&shown[0]["tokens"][0], &shown[0]["label"]), (&json!("[CLS]"), &json!("yes")));
    assert!(found["estimate"]["seconds"].as_f64().unwrap() > 0.0);
}

#[test]
fn each_planted_mistake_is_found_and_nothing_else() {
    let planted = |plant: &dyn Fn(&mut Bench), more: &[&str]| {
        let mut bench = Bench::new();
        plant(&mut bench);
        bench.kinds(more)
    };
    let leak = |bench: &mut Bench| bench.eval.extend_from_slice(&bench.train[..5]);
    assert_eq!(planted(&leak, &[]), one("leak", 5));
    let twice = |bench: &mut Bench| {
        bench.train.push(json!({"text": "A good film; the GOOD of 0 years", "label": "no"}))
    };
    assert_eq!(planted(&twice, &[]), one("duplicates", 1));
    let cased = |bench: &mut Bench| {
        for (i, label) in ["Yes", "YES", "yes "].into_iter().enumerate() {
            bench.train[2 * i]["label"] = label.into();
        }
    };
    assert_eq!(planted(&cased, &[]), one("similar_labels", 4));
    let long = |bench: &mut Bench| {
        bench
            .train
            .iter_mut()
            .take(12)
            .enumerate()
            .for_each(|(i, r)| r["text"] = format!("{i} {}", "long ".repeat(30)).into());
    };
    assert_eq!(planted(&long, &[]), one("truncation", 12));
    let mostly = |bench: &mut Bench| bench.train.iter_mut().skip(5).for_each(|r| r["label"] = "yes".into());
    assert_eq!(planted(&mostly, &[]), one("imbalance", 98));
    let all = |bench: &mut Bench| bench.eval.iter_mut().for_each(|r| r["label"] = "no".into());
    assert_eq!(planted(&all, &[]), one("single_class", 40));
    let short = |bench: &mut Bench| (0..2).for_each(|i| bench.eval[i]["text"] = ["", "ok"][i].into());
    assert_eq!(planted(&short, &[]), one("short_texts", 2));
    let swapped = planted(&|bench| bench.eval.clear(), &["--text-column", "label", "--label-column", "text"]);
    assert!(swapped.contains(&("many_labels".to_owned(), 100)), "{swapped:?}");
}

#[test]
fn what_a_run_refuses_is_refused_and_warnings_are_where_they_are_asked_to_be() {
    let refused = |bench: &Bench, more: &[&str], what: &str| {
        let output = bench.dry_run("text-classification", "tiny-bert-single", more);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(what), "{said}");
    };
    let mut bench = Bench::new();
    refused(&bench, &["--lerning-rate", "1e-3"], "--learning-rate");
    let config = bench.path("run.toml");
    std::fs::write(&config, "lerning-rate = 1e-3\n").unwrap();
    refused(&bench, &["--config", config.to_str().unwrap()], "lerning-rate");
    refused(&bench, &["--max-length", "100000"], "--max-length");
    refused(&bench, &["--text-column", "label", "--label-column", "text"], "and 80 more");
    bench.eval[3]["label"] = "maybe".into();
    refused(&bench, &[], "eval.jsonl:4");
    bench.eval[3]["label"] = "no".into();
    bench.eval.push(bench.train[0].clone());
    assert_eq!(bench.kinds(&[]), one("leak", 1));
    refused(&bench, &["--strict"], "--strict: 1 warning");
    std::fs::create_dir(bench.path("out")).unwrap();
    std::fs::write(bench.path("out/mine"), "").unwrap();
    refused(&bench, &[], "files that tk train did not write");
}

#[test]
fn every_task_shows_its_tokens_with_what_they_ought_to_give() {
    let texts = |range: std::ops::Range<usize>| -> Vec<Value> {
        range.map(|i| json!({"text": format!("the {} film is {}. it was a {} year.", WORDS[i % 8], WORDS[i / 8 % 8], i)})).collect()
    };
    let tagged = |range: std::ops::Range<usize>| -> Vec<Value> {
        range.map(|i| json!({"tokens": ["the", WORDS[i % 8], "film", i.to_string()], "tags": ["O", "B-A", "I-A", "O"]})).collect()
    };
    let asked = |range: std::ops::Range<usize>| -> Vec<Value> {
        let answers = json!({"text": ["film"], "answer_start": [4]});
        range.map(|i| json!({"question": format!("what is {i}?"), "context": "the film is old", "answers": answers})).collect()
    };
    let near = |range: std::ops::Range<usize>| -> Vec<Value> {
        range.map(|i| json!({"anchor": format!("film {i}"), "positive": format!("the {} film {i}", WORDS[i % 8])})).collect()
    };
    type Records<'a> = &'a dyn Fn(std::ops::Range<usize>) -> Vec<Value>;
    let cases: [(&str, &str, Records); 6] = [
        ("token-classification", "tiny-bert-tokens", &tagged),
        ("question-answering", "tiny-bert-answers", &asked),
        ("masked-lm", "tiny-bert-masked", &texts),
        ("masked-lm,next-sentence", "tiny-bert-pretraining", &texts),
        ("causal-lm", "tiny-gpt2-lm", &texts),
        ("embedding", "tiny-bert-embedding", &near),
    ];
    for (task, model, records) in cases {
        let mut bench = Bench::new();
        (bench.train, bench.eval) = (records(0..24), records(24..32));
        let found = bench.found_for(task, model, &[]);
        let kinds = kinds(&found);
        assert_eq!(kinds, [], "{task}: {kinds:?}");
        assert_eq!(found["train"]["records"], json!(24), "{task}");
        for shown in found["examples"].as_array().unwrap() {
            let tokens = shown["tokens"].as_array().unwrap();
            assert!(!tokens.is_empty(), "{task}");
            match shown["labels"].as_array() {
                Some(labels) => {
                    assert_eq!(labels.len(), tokens.len(), "{task}");
                    assert!(labels.iter().any(|label| !label.is_null()), "{task}: {shown}");
                }
                None => assert!(!shown["label"].as_str().unwrap().is_empty(), "{task}"),
            }
        }
    }
}
