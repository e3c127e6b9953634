//! `tk train --shuffle-buffer`: data of which a part is held at a time.

mod common;

use assert_cmd::assert::Assert;
use common::tk;
use common::training::Bench;
use serde_json::{Value, json};

impl Bench {
    fn train(&self, output: &str, more: &[&str]) -> Assert {
        let mut run = tk();
        run.args(["train", "--task", self.task, "--batch-size", "4", "--max-length", "48"]);
        run.args(["--learning-rate", "1e-3"]);
        if !more.contains(&"--max-steps") {
            run.args(["--max-steps", "40"]);
        }
        for (flag, name) in [("--model", "model"), ("--output", output)] {
            run.arg(flag).arg(self.path(name));
        }
        run.args(more);
        if !more.contains(&"--train") {
            run.arg("--train").arg(self.path("train.jsonl"));
        }
        run.assert()
    }

    fn weights(&self, output: &str) -> Vec<u8> {
        std::fs::read(self.path(output).join("model.safetensors")).unwrap()
    }
}

fn stderr(assert: &Assert) -> String {
    String::from_utf8_lossy(&assert.get_output().stderr).into_owned()
}

#[test]
fn a_buffer_that_holds_all_is_training_as_ever() {
    let bench = Bench::new("text-classification", "tiny-bert-single");
    let records = std::fs::read_to_string(bench.path("train.jsonl")).unwrap().lines().count();
    bench.train("whole", &["--max-steps", "20"]).success();
    for (output, buffer) in [("same", records.to_string()), ("more", "1000000000".to_owned())] {
        bench.train(output, &["--max-steps", "20", "--shuffle-buffer", &buffer]).success();
        assert!(bench.weights("whole") == bench.weights(output), "{buffer}");
    }
    bench.train("parts", &["--max-steps", "20", "--shuffle-buffer", "5"]).success();
    assert!(bench.weights("whole") != bench.weights("parts"));
}

#[test]
fn parts_come_one_after_the_other_and_epochs_are_counted_by_records() {
    let bench = Bench::new("text-classification", "tiny-bert-single");
    let line = |i: usize| format!("{}\n", json!({"text": format!("number {i}"), "label": "good"}));
    let other = |i: usize| line(i).replace("good", "bad");
    for (name, range) in [("a.jsonl", 0..7), ("b.jsonl", 7..10)] {
        let lines: String = range.map(|i| if i % 2 == 0 { line(i) } else { other(i) }).collect();
        std::fs::write(bench.path(name), lines).unwrap();
    }
    let (a, b) = (bench.path("a.jsonl"), bench.path("b.jsonl"));
    let files = ["--train", a.to_str().unwrap(), b.to_str().unwrap()];
    // 4 of 10 records at a time, a step each: the fifth step ends the second pass
    let stream = ["--shuffle-buffer", "4", "--no-shuffle", "--max-steps", "5"];
    let said = stderr(&bench.train("out", &[&stream[..], &files].concat()).success());
    assert!(said.contains("4 of 10 records are held at a time"), "{said}");
    let log = std::fs::read_to_string(bench.path("out/training/log.jsonl")).unwrap();
    let epochs: Vec<f64> = log
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["epoch"].as_f64().unwrap())
        .collect();
    assert_eq!(epochs, [0.4, 0.8, 1.2, 1.6, 2.0]);

    // the same records in the same order from one file that has them twice
    let twice = std::fs::read_to_string(&a).unwrap() + &std::fs::read_to_string(&b).unwrap();
    std::fs::write(bench.path("train.jsonl"), twice.repeat(2)).unwrap();
    bench.train("plain", &["--no-shuffle", "--max-steps", "5"]).success();
    assert!(bench.weights("out") == bench.weights("plain"));
}

#[test]
fn a_resumed_run_keeps_its_place_for_every_task() {
    for (task, model, more) in [
        (
            "text-classification",
            "tiny-bert-single",
            &["--gradient-accumulation", "2", "--shuffle-buffer", "9"][..],
        ),
        ("token-classification", "tiny-bert-tokens", &["--shuffle-buffer", "5"]),
        ("question-answering", "tiny-bert-answers", &["--shuffle-buffer", "5"]),
        ("masked-lm", "tiny-bert-masked", &["--shuffle-buffer", "5"]),
        ("masked-lm,next-sentence", "tiny-bert-pretraining", &["--shuffle-buffer", "6"]),
        ("next-sentence", "tiny-bert-pairs", &["--shuffle-buffer", "6"]),
        ("embedding", "tiny-bert-embedding", &["--shuffle-buffer", "5"]),
        ("causal-lm", "tiny-gpt2-lm", &["--shuffle-buffer", "5", "--lora-rank", "2"]),
    ] {
        let bench = Bench::new(task, model);
        if task.contains("masked-lm") || task.contains("next-sentence") {
            let text = |i: usize| format!("It was good. It was number {i}. We love it! So it was.");
            let lines: String = (0..20).map(|i| format!("{}\n", json!({"text": text(i)}))).collect();
            std::fs::write(bench.path("train.jsonl"), lines).unwrap();
        }
        // a break within a buffer that is not the first
        bench.train("out", &[&["--verify-resume", "6"], more].concat()).success();
    }
}

#[test]
fn what_no_part_may_have_is_found_before_the_first_step() {
    let bench = Bench::new("text-classification", "tiny-bert-single");
    let lines = |count: usize, label: &str| -> String {
        (0..count).map(|i| format!("{}\n", json!({"text": format!("number {i}"), "label": label}))).collect()
    };
    std::fs::write(bench.path("train.jsonl"), lines(6, "good") + &lines(6, "bad") + &lines(1, "so-so"))
        .unwrap();
    let said = stderr(&bench.train("out", &["--shuffle-buffer", "12"]).code(2));
    assert!(
        said.contains("train.jsonl:13") && said.contains("so-so") && said.contains("first 12 records"),
        "{said}"
    );
    std::fs::write(bench.path("train.jsonl"), lines(6, "good") + &lines(6, "bad") + "{\n").unwrap();
    let said = stderr(&bench.train("out", &["--shuffle-buffer", "12"]).code(2));
    assert!(said.contains("train.jsonl:13"), "{said}");
    assert!(!bench.path("out").exists());

    let bench = Bench::new("question-answering", "tiny-bert-answers");
    let record = |answers: Value| {
        format!("{}\n", json!({"question": "who?", "context": "it was us", "answers": answers}))
    };
    let found = record(json!({"text": ["us"], "answer_start": [7]}));
    std::fs::write(
        bench.path("train.jsonl"),
        found.repeat(5) + &record(json!({"text": [], "answer_start": []})),
    )
    .unwrap();
    let said = stderr(&bench.train("out", &["--shuffle-buffer", "4"]).code(2));
    assert!(said.contains("train.jsonl:6") && said.contains("without an answer"), "{said}");
}

#[test]
fn flags_that_do_not_go_together_are_refused() {
    let bench = Bench::new("text-classification", "tiny-bert-single");
    for (flags, why) in [
        (&["--shuffle-buffer", "3"][..], "at least the 4 examples of a step"),
        (&["--shuffle-buffer", "8", "--class-weights", "balanced"], "counts the labels of all records"),
    ] {
        let said = stderr(&bench.train("out", flags).code(2));
        assert!(said.contains(why), "{said}");
    }
    let mut run = tk();
    run.args(["train", "--task", "text-classification", "--shuffle-buffer", "100", "--output", "out"]);
    run.arg("--model").arg(bench.path("model")).arg("--train").arg(bench.path("train.jsonl"));
    assert!(stderr(&run.assert().code(2)).contains("--shuffle-buffer needs --max-steps"));
}
