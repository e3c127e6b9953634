//! Training and evaluation data, the real binary: several names, folders and patterns, what is told of them, what a resumed
//! run finds changed, and parts that are drawn.

mod common;

use std::path::PathBuf;
use std::process::Command;

use common::training::started_until;
use common::{Bench, json, models, tk};
use serde_json::{Value, json};
use tk::data::cache::Cache;
use tk::data::records::Files;
use tk::model::ModelConfig;
use tk::task::{Encoder, Start, Task};

impl Bench {
    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        std::fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        std::fs::write(self.path(name), bytes).unwrap();
    }

    fn tk(&self, args: &[&str]) -> assert_cmd::assert::Assert {
        tk().current_dir(self.0.path()).args(args).assert()
    }

    fn train(&self, task: &str, output: &str, args: &[&str]) -> assert_cmd::assert::Assert {
        let fixed = ["train", "--task", task, "--model", "model", "--output", output, "--max-length", "32"];
        self.tk(&[&fixed, args].concat())
    }

    /// The weights that two steps of training give.
    fn weights(&self, task: &str, output: &str, args: &[&str]) -> Vec<u8> {
        self.train(task, output, &[&["--max-steps", "2"], args].concat()).success();
        std::fs::read(self.path(output).join("model.safetensors")).unwrap()
    }

    /// What a dry run finds.
    fn dry_run(&self, task: &str, args: &[&str]) -> Value {
        let assert = self.train(task, "none", &[&["--dry-run", "--json"], args].concat()).success();
        serde_json::from_slice(&assert.get_output().stdout).unwrap()
    }

    fn metrics(&self, args: &[&str]) -> Value {
        let assert = self.tk(&[&["eval", "model", "--json"], args].concat()).success();
        serde_json::from_slice(&assert.get_output().stdout).unwrap()
    }
}

fn stderr(assert: &assert_cmd::assert::Assert) -> String {
    String::from_utf8_lossy(&assert.get_output().stderr).into_owned()
}

/// Records of a tiny classifier, some of each label.
fn records(from: usize, to: usize) -> Vec<(String, &'static str)> {
    let texts = ["good film", "bad film", "the film"];
    (from..to)
        .map(|i| (format!("{} {i}", texts[i % 3]), ["positive", "negative", "neutral"][i % 3]))
        .collect()
}

fn jsonl(records: &[(String, &str)]) -> String {
    records.iter().map(|(text, label)| json!({"text": text, "label": label}).to_string() + "\n").collect()
}

fn csv(records: &[(String, &str)]) -> String {
    "text,label\r\n".to_owned()
        + &records.iter().map(|(text, label)| format!("\"{text}\",{label}\r\n")).collect::<String>()
}

/// Twelve records in one file, and in three of `data/` among what is none.
fn classifier() -> Bench {
    let bench = Bench::with("tiny-bert-single");
    bench.write("all.jsonl", jsonl(&records(0, 12)));
    bench.write("data/a.jsonl", jsonl(&records(0, 5)));
    bench.write("data/b/part.csv.zst", zstd::encode_all(csv(&records(5, 9)).as_bytes(), 1).unwrap());
    bench.write("data/c.jsonl", jsonl(&records(9, 12)));
    bench.write("data/README.md", "# Not records");
    bench.write("data/_notes.jsonl", "no records");
    bench
}

#[test]
fn several_files_are_learnt_and_measured_as_one() {
    let bench = classifier();
    let task = "text-classification";
    let one = bench.weights(task, "one", &["--train", "all.jsonl", "--eval", "all.jsonl"]);
    let names = ["data/a.jsonl", "data/b/part.csv.zst", "data/c.jsonl"];
    let ways = [
        &["--train", names[0], names[1], names[2], "--eval", "data"][..],
        &["--train", names[0], "--train", names[1], "--train", names[2], "--eval", "all.json*"],
        &["--train", "data", "--eval", "all.jsonl"],
        &[
            "--train",
            "data/a.jsonl",
            "--train",
            "data/b",
            "--train",
            "data/c*",
            "--eval",
            "data/**/[a-z]*.*[lt]",
        ],
    ];
    for (i, args) in ways.into_iter().enumerate() {
        assert!(bench.weights(task, &format!("out{i}"), args) == one, "{args:?}");
    }
    let metrics = |args: &[&str]| bench.metrics(args)["metrics"].clone();
    let wanted = metrics(&["--input", "all.jsonl"]);
    assert_eq!(metrics(&["--input", "data"]), wanted);
    assert_eq!(metrics(&["--input", names[0], "--input", "data/b/*", "--input", names[2]]), wanted);
    bench.tk(&["parity", "model", "--input", "data", "--runtimes", "eager,candle-onnx"]).success();
}

#[test]
fn what_is_wrong_is_told_with_its_file_and_line() {
    let bench = classifier();
    let refused = |args: &[&str]| stderr(&bench.train("text-classification", "out", args).code(2));
    bench.write("data/d.jsonl", "{\"text\": \"a\", \"label\": \"positive\"}\n{\"text\": 1}\n");
    let said = refused(&["--train", "data"]);
    assert!(said.contains("data/a.jsonl and 3 other files: 1 of 14 records can't be used:"), "{said}");
    assert!(said.contains("\n  data/d.jsonl:2: field \"text\" is a number (1)"), "{said}");
    bench.write("data/d.jsonl", "{\"text\": \"a\", \"label\": 0.5}\n");
    let said = refused(&["--train", "data"]);
    assert!(said.contains("\n  data/d.jsonl:1: label is 0.5"), "{said}");
    bench.write("data/d.jsonl", "{\"text\": \"a\", \"label\": \"furious\"}\n");
    let said = refused(&["--train", "data/a.jsonl", "--eval", "data"]);
    assert!(said.contains("\n  data/d.jsonl:1: label \"furious\" is not one of"), "{said}");
    for (args, said) in [
        (&["--train", "none/*.jsonl"][..], "none/*.jsonl matches no file"),
        (&["--train", "model/none.jsonl"], "model/none.jsonl can't be opened"),
        (&["--train", "data/c.jsonl", "data"], "data/c.jsonl is named twice"),
        (&["--train", "data/README.md"], "data/README.md: the format is not known: \"md\" is none of jsonl"),
        (&["--train", "data/a.jsonl", "--eval", "none*"], "none* matches no file"),
        (&["--train", "all.jsonl", "--text-unit", "file"], "--text-unit is for "),
    ] {
        let found = refused(args);
        assert!(found.contains(said), "{found}");
    }
    assert!(!bench.path("out").exists());
}

#[test]
fn an_empty_file_among_others_changes_nothing() {
    let bench = classifier();
    let task = "text-classification";
    let one = bench.weights(task, "one", &["--train", "all.jsonl"]);
    bench.write("data/aa.jsonl", "");
    bench.write("data/bb.csv", "text,label\n");
    assert!(bench.weights(task, "out", &["--train", "data"]) == one);
}

#[test]
fn a_resumed_run_notices_files_that_came_or_went() {
    let bench = classifier();
    let train = |args: &[&str]| bench.train("text-classification", "out", args);
    train(&["--train", "data", "--epochs", "1"]).success();
    let settings = std::fs::read_to_string(bench.path("out/training/settings.toml")).unwrap();
    assert!(settings.contains("train = \"data\""), "{settings}");
    let inputs = json(bench.path("out/training/inputs.json"));
    let names: Vec<&str> =
        inputs["inputs"].as_array().unwrap().iter().map(|input| input[0].as_str().unwrap()).collect();
    assert_eq!(names[..3], ["train data/a.jsonl", "train data/b/part.csv.zst", "train data/c.jsonl"]);
    let resume = || bench.tk(&["train", "--resume", "--output", "out"]);
    resume().success();
    bench.write("data/d.jsonl", jsonl(&records(12, 15)));
    let said = stderr(&resume().code(2));
    assert!(said.contains("its inputs have changed since it was started (train data/d.jsonl)"), "{said}");
    std::fs::remove_file(bench.path("data/d.jsonl")).unwrap();
    resume().success();
    std::fs::rename(bench.path("data/c.jsonl"), bench.path("c.jsonl")).unwrap();
    let said = stderr(&resume().code(2));
    assert!(said.contains("(train data/c.jsonl)"), "{said}");
    std::fs::rename(bench.path("c.jsonl"), bench.path("data/c.jsonl")).unwrap();
    let said = stderr(&bench.tk(&["train", "--resume", "--output", "out", "--train", "all.jsonl"]).code(2));
    assert!(said.contains("train (\"all.jsonl\", was \"data\")"), "{said}");
}

#[test]
fn a_file_of_settings_takes_a_name_or_a_list_of_names() {
    let bench = classifier();
    let task = "text-classification";
    let one = bench.weights(task, "one", &["--train", "all.jsonl"]);
    bench.write("list.toml", "train = [\"data/a.jsonl\", \"data/b\", \"data/c.jsonl\"]\nmax-steps = 2\n");
    bench.write("one.toml", "train = \"data\"\nmax-steps = 2\n");
    for config in ["list.toml", "one.toml"] {
        let output = format!("out-{config}");
        assert!(bench.weights(task, &output, &["--config", config]) == one, "{config}");
        bench.tk(&["train", "--resume", "--output", &output]).success();
    }
    let settings = std::fs::read_to_string(bench.path("out-list.toml/training/settings.toml")).unwrap();
    assert!(settings.contains("train = [\"data/a.jsonl\", \"data/b\", \"data/c.jsonl\"]"), "{settings}");
    // the command line wins, and a comma is a letter of a name
    bench.write("a,b.jsonl", jsonl(&records(0, 12)));
    let args = ["--config", "list.toml", "--train", "a,b.jsonl"];
    assert!(bench.weights(task, "comma", &args) == one);
    bench.write("comma.toml", "train = [\"a,b.jsonl\"]\nmax-steps = 2\n");
    assert!(bench.weights(task, "listed", &["--config", "comma.toml"]) == one);
}

#[test]
fn a_dry_run_tells_the_files_and_where_twins_stand() {
    let bench = classifier();
    bench.write("data/b/twin.jsonl", jsonl(&records(1, 2)));
    bench.write("data/e.jsonl", jsonl(&records(20, 21)));
    bench.write("eval.jsonl", jsonl(&records(20, 24)));
    let args = ["--train", "data", "--eval", "eval.jsonl", "--dry-run"];
    let told = bench.train("text-classification", "out", &args).success();
    let told = String::from_utf8_lossy(&told.get_output().stdout).into_owned();
    for part in [
        "training    5 files (data/a.jsonl, data/b/part.csv.zst, data/b/twin.jsonl, data/c.jsonl",
        "evaluation  eval.jsonl: 4 records",
        "(line 1 of data/b/twin.jsonl as line 2 of data/a.jsonl)",
        "(line 1 in training line 1 of data/e.jsonl)",
    ] {
        assert!(told.contains(part), "{part:?} is not in:\n{told}");
    }
    let told = bench.train("text-classification", "out", &[&args[..], &["--json"]].concat()).success();
    let told: Value = serde_json::from_slice(&told.get_output().stdout).unwrap();
    assert_eq!(told["train"]["files"].as_array().unwrap().len(), 5);
    assert_eq!(told["train"]["files"][1], "data/b/part.csv.zst");
    assert_eq!(told["train"]["duplicates"]["first"], json!([1, 2]));
}

#[test]
fn sentences_of_several_files_are_those_of_one() {
    let bench = Bench::with("tiny-bert-tokens");
    let (first, second) = ("good\tB-PER\nfilm\tI-PER\n\nbad\tO\n", "the\tO\nfilm\tB-LOC\n");
    bench.write("all.conll", format!("{first}\n{second}"));
    bench.write("data/1.conll", first);
    bench.write("data/2.conll", second);
    let weights =
        |output: &str, train: &str| bench.weights("token-classification", output, &["--train", train]);
    assert!(weights("one", "all.conll") == weights("two", "data"));
    bench.write("data/3.conll", "the\tO\nfilm\tNOUN\n");
    let said = stderr(&bench.train("token-classification", "out", &["--train", "data"]).code(2));
    assert!(said.contains("\"NOUN\" (line 2 of data/3.conll)"), "{said}");
    assert!(said.contains("\"B-PER\" (line 1 of data/1.conll)"), "{said}");
}

#[test]
fn a_document_ends_with_its_file() {
    let bench = Bench::with("tiny-bert-pairs");
    let document = |words: [&str; 2]| format!("{}. {}.\nThe {}.\n", words[0], words[1], words[0]);
    let (first, second) = (document(["Good film", "Bad"]), document(["Bad film", "Good"]));
    bench.write("all.txt", format!("{first}\n{second}"));
    bench.write("data/1.txt", &first);
    bench.write("data/2.txt", &second);
    let weights = |task: &str, output: &str, args: &[&str]| bench.weights(task, output, args);
    assert!(
        weights("next-sentence", "one", &["--train", "all.txt"])
            == weights("next-sentence", "two", &["--train", "data"])
    );

    let bench = Bench::with("tiny-gpt2-lm");
    let verse = "the cat sat\non the mat\n";
    bench.write("data/1.txt", verse);
    bench.write("data/2.txt", "the dog ran\n\nhome\n");
    let records = |unit| bench.metrics(&["--input", "data", "--text-unit", unit])["records"].clone();
    assert_eq!((records("file"), records("document"), records("line")), (json!(2), json!(3), json!(4)));
}

#[test]
fn questions_of_several_files_are_those_of_one() {
    let bench = Bench::with("tiny-bert-answers");
    let paragraph = |context: &str, question: &str, start: usize| {
        let answer = &context[start..start + 4];
        json!({"context": context, "qas": [{"id": question, "question": question, "answers": [{"text": answer, "answer_start": start}]}]})
    };
    let (first, second) = (paragraph("the good film", "what", 4), paragraph("a bad film", "which", 6));
    let file = |paragraphs: &[&Value]| {
        json!({"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}).to_string()
    };
    bench.write("all.json", file(&[&first, &second]));
    bench.write("data/1.json", file(&[&first]));
    bench.write("data/2.json", file(&[&second]));
    let weights =
        |output: &str, train: &str| bench.weights("question-answering", output, &["--train", train]);
    assert!(weights("one", "all.json") == weights("two", "data"));
}

/// How many records of each label a part has.
fn labels(split: &Value) -> Vec<(String, u64)> {
    let count = |pair: &Value| (pair[0].as_str().unwrap().to_owned(), pair[1].as_u64().unwrap());
    let mut labels: Vec<_> = split["labels"].as_array().unwrap().iter().map(count).collect();
    labels.sort();
    labels
}

/// Records of three labels: 29, 13 and 1.
fn uneven() -> Bench {
    let bench = Bench::with("tiny-bert-single");
    let label = |i| {
        if i == 20 {
            "neutral"
        } else if i % 7 < 2 {
            "negative"
        } else {
            "positive"
        }
    };
    let records: Vec<(String, &str)> = (0..43).map(|i| (format!("good film {i}"), label(i))).collect();
    bench.write("all.jsonl", jsonl(&records));
    bench.write("data/a.jsonl", jsonl(&records[..11]));
    bench.write("data/b.csv", csv(&records[11..30]));
    bench.write("data/c.jsonl", jsonl(&records[30..]));
    bench
}

#[test]
fn a_part_that_is_drawn_keeps_the_labels_shares() {
    let bench = uneven();
    let task = "text-classification";
    let found = bench.dry_run(task, &["--train", "all.jsonl", "--validation-split", "0.25"]);
    let of = |label: &str, count| (label.to_owned(), count);
    assert_eq!(labels(&found["eval"]), [of("negative", 4), of("positive", 7)]);
    assert_eq!(labels(&found["train"]), [of("negative", 9), of("neutral", 1), of("positive", 22)]);
    assert_eq!((&found["train"]["records"], &found["train"]["drawn_from"]), (&json!(32), &json!(43)));
    assert_eq!(found["shared"]["exact"], 0, "a record is learnt from and measured on");
    let more = ["--train", "all.jsonl", "--validation-split", "0.25", "--train-fraction", "0.5"];
    let found = bench.dry_run(task, &more);
    assert_eq!(labels(&found["eval"]), [of("negative", 4), of("positive", 7)]);
    let learnt = labels(&found["train"]);
    assert!(learnt[0].1 == 4 || learnt[0].1 == 5, "{learnt:?}");
    assert_eq!((learnt[1].1, learnt[2].1), (1, 11));
    let told = bench.train(task, "none", &[&more[..], &["--dry-run"]].concat()).success();
    let said = stderr(&told);
    for part in [
        "labels with a single record, which stays in training: neutral",
        "--validation-split 0.25: 11 of 43 records are measured on",
        "--train-fraction 0.5: 16 of 32 records are learnt from",
    ] {
        assert!(said.contains(part), "{part:?} is not in:\n{said}");
    }
    let told = String::from_utf8_lossy(&told.get_output().stdout).into_owned();
    assert!(told.contains("training    all.jsonl: 16 records, of 43"), "{told}");
    assert!(told.contains("evaluation  all.jsonl: 11 records, of 43"), "{told}");
}

#[test]
fn what_is_drawn_depends_on_the_seed_and_the_records_alone() {
    let bench = uneven();
    let task = "text-classification";
    let split = ["--validation-split", "0.2", "--train-fraction", "0.6"];
    let train = |output: &str, args: &[&str]| {
        bench.train(task, output, &[&split[..], args].concat()).success();
        let log = std::fs::read_to_string(bench.path(output).join("training/log.jsonl")).unwrap();
        let lines = log.lines().map(|line| {
            let mut line: Value = serde_json::from_str(line).unwrap();
            line.as_object_mut().unwrap().remove("tokens_per_second");
            line
        });
        lines.collect::<Vec<_>>()
    };
    let one = train("one", &["--train", "all.jsonl"]);
    assert!(one.iter().any(|line| line["eval_accuracy"].is_number()), "nothing was measured");
    assert_eq!(train("again", &["--train", "all.jsonl"]), one);
    assert_eq!(train("files", &["--train", "data"]), one, "cut into files");
    // the same records as files of their own
    let measured = bench.dry_run(task, &[&split[..], &["--train", "all.jsonl"]].concat());
    assert_eq!((&measured["eval"]["records"], &measured["train"]["records"]), (&json!(9), &json!(20)));
    assert_ne!(train("other", &["--train", "all.jsonl", "--seed", "7"]), one);
}

#[test]
#[cfg(unix)]
fn a_resumed_run_draws_the_same() {
    let bench = uneven();
    let args = ["--train", "data", "--validation-split", "0.2", "--epochs", "12", "--batch-size", "2"];
    let fixed = ["train", "--task", "text-classification", "--model", "model", "--max-length", "32"];
    bench.train("text-classification", "whole", &args).success();
    let mut run = Command::new(assert_cmd::cargo::cargo_bin!("tk"));
    run.current_dir(bench.0.path()).args([&fixed[..], &["--output", "killed"], &args].concat());
    let (mut run, _lines) = started_until("step 55/", &mut run);
    run.kill().unwrap();
    run.wait().unwrap();
    assert!(!bench.path("killed/model.safetensors").exists());
    bench.tk(&["train", "--resume", "--output", "killed"]).success();
    let weights = |output: &str| std::fs::read(bench.path(output).join("model.safetensors")).unwrap();
    assert!(weights("killed") == weights("whole"));
}

#[test]
fn a_group_stays_together() {
    let bench = Bench::with("tiny-bert-single");
    // eight writers, who say the same every time
    let texts = ["good", "bad", "the film", "good film", "bad film", "the", "film", "good bad"];
    let record = |i: usize| {
        let writer = i % 8;
        let name = if writer == 3 { json!(writer) } else { json!(writer.to_string()) };
        json!({"text": texts[writer], "label": (["a", "b"][writer % 2]), "writer": name}).to_string() + "\n"
    };
    bench.write("data/a.jsonl", (0..31).map(record).collect::<String>());
    bench.write("data/b.jsonl", (31..64).map(record).collect::<String>());
    let split = ["--train", "data", "--validation-split", "0.3"];
    let found = bench.dry_run("text-classification", &split);
    assert!(found["shared"]["exact"].as_u64().unwrap() > 0);
    let grouped = [&split[..], &["--group-column", "writer"]].concat();
    let found = bench.dry_run("text-classification", &grouped);
    assert_eq!(found["shared"]["exact"], 0);
    assert_eq!((&found["eval"]["records"], &found["train"]["records"]), (&json!(16), &json!(48)));
    let both = [&grouped[..], &["--train-fraction", "0.5"]].concat();
    let found = bench.dry_run("text-classification", &both);
    assert_eq!((&found["eval"]["records"], &found["train"]["records"]), (&json!(16), &json!(24)));

    let refused = |args: &[&str]| stderr(&bench.train("text-classification", "out", args).code(2));
    let said = refused(&["--train", "data", "--validation-split", "0.1", "--group-column", "writer"]);
    assert!(
        said.contains(
            "a part of 6 records is to be drawn, and the smallest of the 8 groups of \"writer\" has 8"
        ),
        "{said}"
    );
    bench.write("data/c.jsonl", "{\"text\": \"a\", \"label\": \"a\"}\n");
    let said = refused(&grouped);
    assert!(
        said.contains("data/c.jsonl:1: no field \"writer\"") && said.contains("--group-column"),
        "{said}"
    );
}

#[test]
fn shares_that_are_none_are_refused() {
    let bench = uneven();
    let refused = |args: &[&str]| {
        let args = [&["--train", "all.jsonl"], args].concat();
        stderr(&bench.train("text-classification", "out", &args).code(2))
    };
    for (args, part) in [
        (&["--validation-split", "0"][..], "--validation-split 0: expected a share between 0 and 1"),
        (&["--validation-split", "10"], "--validation-split 10: expected a share"),
        (&["--validation-split", "NaN"], "--validation-split NaN: expected a share"),
        (&["--train-fraction", "1.5"], "--train-fraction 1.5: expected a share above 0 and up to 1"),
        (&["--validation-split", "0.001"], "--validation-split 0.001 parts 43 records into 0 and 43"),
        (&["--group-column", "text"], "--group-column is for --validation-split and --train-fraction"),
        (&["--validation-split", "0.1", "--eval", "all.jsonl"], "cannot be used with"),
    ] {
        let said = refused(args);
        assert!(said.contains(part), "{said}");
    }
    // a record that can't be used is told, wherever it would have been drawn to
    let text = std::fs::read_to_string(bench.path("all.jsonl")).unwrap();
    bench.write("all.jsonl", text + "[]\n\n{\"text\": \"a\", \"label\": \"positive\"}\n");
    let said = refused(&["--validation-split", "0.5", "--train-fraction", "0.1"]);
    assert!(said.contains("all.jsonl:44: a list") && said.contains("all.jsonl:45: empty line"), "{said}");
    assert!(!bench.path("out").exists());
}

#[test]
fn every_task_takes_a_split() {
    let bench = Bench::with("tiny-bert-tokens");
    let sentences: String = (0..10).map(|_| "good\tB-PER\nfilm\tI-PER\n\nbad\tO\nfilm\tB-LOC\n\n").collect();
    bench.write("all.conll", sentences);
    let found = bench.dry_run("token-classification", &["--train", "all.conll", "--validation-split", "0.3"]);
    assert_eq!((&found["train"]["records"], &found["eval"]["records"]), (&json!(14), &json!(6)));
    let bench = Bench::with("tiny-gpt2-lm");
    bench.write("all.txt", (0..20).map(|i| format!("the cat {i}\nsat\n\n")).collect::<String>());
    let documents = ["--train", "all.txt", "--validation-split", "0.1", "--text-unit", "document"];
    let found = bench.dry_run("causal-lm", &documents);
    assert_eq!((&found["train"]["records"], &found["eval"]["records"]), (&json!(18), &json!(2)));
    // numbers are no classes
    let bench = Bench::with("tiny-bert-regression");
    bench.write(
        "all.csv",
        "text,label\n".to_owned() + &(0..20).map(|i| format!("film,{i}.5\n")).collect::<String>(),
    );
    let found = bench.dry_run("text-classification", &["--train", "all.csv", "--validation-split", "0.25"]);
    assert_eq!((&found["train"]["records"], &found["eval"]["records"]), (&json!(15), &json!(5)));
}

/// What each task learns from a file, in as many threads.
fn examples(task: &str, model: &str, text: &str, threads: usize, cache: Option<&Cache>) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("records.jsonl");
    std::fs::write(&path, text).unwrap();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let learn = || {
        let mut start = Start {
            model: &models(model),
            config: ModelConfig::read(&models(model)).unwrap(),
            from_scratch: false,
            train: &Files::from(&path),
            records: &Default::default(),
            training: &Default::default(),
            max_length: 16,
            cache,
            say: &Default::default(),
        };
        let learning = Task::learn(task, &mut start).unwrap();
        let encoder = Encoder {
            records: &Default::default(),
            training: &Default::default(),
            tokenizer: &learning.tokenizer,
            max_length: 16,
        };
        let measured = learning.task.examples(&Files::from(&path), &encoder).unwrap();
        assert!(learning.examples.len() > 4100 && measured.len() > 4100, "{task}: more than a block");
        format!("{:?}\n{measured:?}", learning.examples)
    };
    pool.install(learn)
}

#[test]
fn examples_are_the_same_whatever_the_number_of_threads_and_out_of_the_cache() {
    let words = |i: usize| format!("{} film {}", ["good", "bad", "the"][i % 3], "good ".repeat(i % 7));
    let lines = |line: fn(usize, String) -> Value| -> String {
        (0..4_200).map(|i| line(i, words(i)).to_string() + "\n").collect()
    };
    let labelled = lines(|i, text| json!({"text": text, "label": (["positive", "negative"][i % 2])}));
    let texts = lines(|_, text| json!({"text": text}));
    let tagged = lines(|i, text| {
        let tokens: Vec<&str> = text.split(' ').filter(|word| !word.is_empty()).collect();
        let tags = vec![["O", "B-PER"][i % 2]; tokens.len()];
        json!({"tokens": tokens, "tags": tags})
    });
    let asked = lines(
        |_, text| json!({"question": "what", "context": text, "answers": {"text": [text[..3]], "answer_start": [0]}}),
    );
    let related = lines(|_, text| json!({"anchor": text, "positive": "good film"}));
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::in_folder(folder.path().to_owned(), 1, Default::default());
    let kept = || folder.path().read_dir().unwrap().count();
    for (i, (task, model, text)) in [
        ("text-classification", "tiny-bert-single", &labelled),
        ("token-classification", "tiny-bert-tokens", &tagged),
        ("question-answering", "tiny-bert-answers", &asked),
        ("masked-lm", "tiny-bert-masked", &texts),
        ("masked-lm", "tiny-roberta-masked", &texts),
        ("causal-lm", "tiny-gpt2-lm", &texts),
        ("embedding", "tiny-bert-embedding", &related),
    ]
    .into_iter()
    .enumerate()
    {
        let one = examples(task, model, text, 1, None);
        assert!(examples(task, model, text, 3, None) == one, "{task}");
        assert!(examples(task, model, text, 3, Some(&cache)) == one, "{task}: kept");
        // of what is learnt and what is measured alike
        assert_eq!(kept(), i + 1, "{task}");
        assert!(examples(task, model, text, 2, Some(&cache)) == one, "{task}: of the cache");
        assert_eq!(kept(), i + 1, "{task}");
    }
}

#[test]
fn tokens_of_large_data_are_kept_and_change_no_bit() {
    let bench = Bench::with("tiny-bert-single");
    let text = |i: usize| format!("{} {}", ["good", "bad"][i % 2], "the film ".repeat(10_000));
    let records: Vec<(String, &str)> = (0..13).map(|i| (text(i), ["positive", "negative"][i % 2])).collect();
    bench.write("all.jsonl", jsonl(&records));
    let train = |output: &str, variable: &str, folder: &str, args: &[&str]| {
        let mut tk = tk();
        tk.current_dir(bench.0.path()).env_remove("TK_CACHE").env_remove("XDG_CACHE_HOME");
        tk.env(variable, bench.path(folder));
        tk.args(["train", "-v", "--task", "text-classification", "--model", "model", "--max-length", "16"]);
        tk.args(["--train", "all.jsonl", "--max-steps", "2", "--output", output]).args(args);
        stderr(&tk.assert().success())
    };
    let weights = |output: &str| std::fs::read(bench.path(output).join("model.safetensors")).unwrap();
    let files = |folder: &str| -> Vec<PathBuf> {
        let entries = bench.path(folder).read_dir().into_iter().flatten();
        entries.map(|entry| entry.unwrap().path()).collect()
    };
    let hit = "13 of 13 records' tokens were in";
    assert!(!train("none", "TK_CACHE", "tokens", &["--no-cache"]).contains(hit));
    assert!(!train("dry", "TK_CACHE", "tokens", &["--dry-run"]).contains(hit));
    assert!(!bench.path("tokens").exists() && !bench.path("dry").exists());
    assert!(!train("kept", "TK_CACHE", "tokens", &[]).contains(hit));
    assert_eq!(files("tokens").len(), 1);
    assert!(train("read", "TK_CACHE", "tokens", &[]).contains(hit));
    assert!(!train("shorter", "TK_CACHE", "tokens", &["--max-length", "8"]).contains(hit));
    assert!(weights("none") == weights("kept") && weights("kept") == weights("read"));
    for file in files("tokens") {
        let bytes = std::fs::read(&file).unwrap();
        std::fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
    }
    let said = train("damaged", "TK_CACHE", "tokens", &[]);
    assert!(said.contains("it is damaged: it is made anew"), "{said}");
    assert!(weights("damaged") == weights("kept"));
    train("elsewhere", "XDG_CACHE_HOME", "xdg", &[]);
    assert_eq!(files("xdg/tk").len(), 1);
    // a folder that can't be written is told, and no more
    let said = train("file", "TK_CACHE", "all.jsonl", &[]);
    assert!(said.contains("tokens can't be kept in"), "{said}");
    assert!(weights("file") == weights("kept"));
}
