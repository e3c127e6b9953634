//! `tk train --class-weights` and `--focal-gamma`, the real binary on the tiny models: a step is the same however it is cut
//! into micro-batches, what is learnt is told, and what says nothing is refused.

mod common;

use assert_cmd::assert::Assert;
use common::tk;
use common::training::Bench;
use serde_json::Value;

impl Bench {
    fn train(&self, output: &str, more: &[&str]) -> Assert {
        let mut run = tk();
        run.args(["train", "--max-length", "48", "--dropout", "0", "--task", self.task]);
        for (flag, name) in [("--model", "model"), ("--train", "train.jsonl"), ("--output", output)] {
            run.arg(flag).arg(self.path(name));
        }
        run.args(more).assert()
    }

    /// Losses and gradients' norms of the steps.
    fn log(&self, output: &str) -> Vec<[f64; 2]> {
        let text = std::fs::read_to_string(self.path(output).join("training/log.jsonl")).unwrap();
        let numbers = |line: &str| {
            let line: Value = serde_json::from_str(line).unwrap();
            ["loss", "grad_norm"].map(|name| line[name].as_f64().unwrap())
        };
        text.lines().map(numbers).collect()
    }
}

fn stderr(assert: &Assert) -> String {
    String::from_utf8_lossy(&assert.get_output().stderr).into_owned()
}

const CASES: [(&str, &str); 3] = [
    ("text-classification", "tiny-bert-single"),
    ("text-classification", "tiny-bert-multi"),
    ("token-classification", "tiny-bert-tokens"),
];

#[test]
fn micro_batches_are_one_batch_and_weights_change_the_loss() {
    for (task, model) in CASES {
        let bench = Bench::new(task, model);
        let weighted =
            ["--class-weights", "balanced", "--focal-gamma", "1.5", "--max-steps", "3", "--no-shuffle"];
        bench.train("whole", &[&weighted[..], &["--batch-size", "12"]].concat()).success();
        let parts = ["--batch-size", "4", "--gradient-accumulation", "3"];
        bench.train("parts", &[&weighted[..], &parts].concat()).success();
        bench.train("plain", &[&weighted[4..], &["--batch-size", "12"]].concat()).success();
        bench.train("weights", &[&weighted[..2], &weighted[4..], &["--batch-size", "12"]].concat()).success();
        let [whole, parts, plain, weights] =
            ["whole", "parts", "plain", "weights"].map(|name| bench.log(name));
        for (a, b) in whole.iter().flatten().zip(parts.iter().flatten()) {
            assert!((a - b).abs() <= 1e-4 * a.abs(), "{model}: {whole:?} and {parts:?}");
        }
        let differ = |a: &[[f64; 2]], b: &[[f64; 2]]| (a[0][0] - b[0][0]).abs() > 1e-3;
        assert!(differ(&whole, &plain) && differ(&weights, &plain) && differ(&whole, &weights), "{model}");
    }
}

/// A mean is divided by the weights of the whole step: their size says nothing, but for several labels.
#[test]
fn weights_that_are_all_the_same_are_the_plain_loss() {
    for (task, model) in CASES {
        let bench = Bench::new(task, model);
        let config = common::json(bench.path("model/config.json"));
        let labels = config["id2label"].as_object().unwrap().values();
        let weight = if model.ends_with("multi") { 1.0 } else { 3.0 };
        let weights: serde_json::Map<String, Value> =
            labels.map(|name| (name.as_str().unwrap().to_owned(), weight.into())).collect();
        let file = bench.path("weights.json");
        std::fs::write(&file, serde_json::to_string(&weights).unwrap()).unwrap();
        bench.train("plain", &["--max-steps", "2"]).success();
        bench.train("weighted", &["--max-steps", "2", "--class-weights", file.to_str().unwrap()]).success();
        let [plain, weighted] = ["plain", "weighted"].map(|name| bench.log(name));
        for (a, b) in plain.iter().flatten().zip(weighted.iter().flatten()) {
            assert!((a - b).abs() <= 1e-4 * a.abs(), "{model}: {plain:?} and {weighted:?}");
        }
    }
}

#[test]
fn weights_are_told_and_a_resumed_run_asks_for_the_same() {
    let bench = Bench::new("text-classification", "tiny-bert-single");
    let file = bench.path("weights.toml");
    std::fs::write(&file, "positive = 2.5\nneutral = 0.25\n").unwrap();
    let weights = ["--class-weights", file.to_str().unwrap(), "--max-steps", "4"];
    let said = stderr(&bench.train("out", &[&weights[..], &["--stop-at", "2"]].concat()).success());
    assert!(said.contains("class weights: negative 1.0000, neutral 0.2500, positive 2.5000"), "{said}");
    let dry = ["--class-weights", "balanced", "--dry-run"];
    let told = bench.train("dry", &[&dry[..], &["--json"]].concat()).success();
    let told: Value = serde_json::from_slice(&told.get_output().stdout).unwrap();
    let found: Vec<(String, f64)> = serde_json::from_value(told["plan"]["class_weights"].clone()).unwrap();
    // 13 / (3 · count) of 4, 5 and 4 records
    for ((_, found), count) in found.iter().zip([4.0, 5.0, 4.0]) {
        assert!((found - 13.0 / (3.0 * count)).abs() < 1e-6, "{told}");
    }
    let told = bench.train("dry", &dry).success();
    assert!(String::from_utf8_lossy(&told.get_output().stdout).contains("class weights: negative 1.08"));

    std::fs::write(&file, "positive = 2.5\nneutral = 0.5\n").unwrap();
    let said = stderr(&bench.train("out", &["--resume"]).code(2));
    assert!(said.contains("inputs have changed") && said.contains("class-weights"), "{said}");
    std::fs::write(&file, "positive = 2.5\nneutral = 0.25\n").unwrap();
    bench.train("out", &["--resume"]).success();
    let config = common::json(bench.path("out/config.json"));
    assert!(config.get("class_weights").is_none());
}

#[test]
fn what_says_nothing_is_refused_by_name() {
    let refused = |task, model: &str, more: &[&str], says: &str| {
        let said = stderr(&Bench::new(task, model).train("out", more).code(2));
        assert!(said.contains(says), "{said}");
    };
    let text = "text-classification";
    refused(text, "tiny-bert-regression", &["--class-weights", "balanced"], "--class-weights is for labels");
    refused(text, "tiny-bert-regression", &["--focal-gamma", "2"], "--focal-gamma is for labels");
    refused(text, "tiny-bert-single", &["--focal-gamma=-1"], "--focal-gamma is -1");
    refused(text, "tiny-bert-single", &["--focal-gamma", "NaN"], "--focal-gamma is NaN");
    let both = ["--focal-gamma", "2", "--label-smoothing", "0.1"];
    refused(text, "tiny-bert-single", &both, "exclude each other");
    refused(text, "tiny-bert-single", &["--class-weights", "balaned"], "--class-weights balaned");
    let wanted = "is for text-classification and token-classification, and this is masked-lm";
    refused("masked-lm", "tiny-bert-masked", &["--class-weights", "balanced"], wanted);
}
