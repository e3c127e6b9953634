//! `tk train`, the real binary on the tiny models: what it proves, what it shows of its steps, and how it stops.

mod common;

use std::collections::BTreeSet;
use std::path::PathBuf;

use assert_cmd::assert::Assert;
use common::training::Bench;
use common::{change_weights, models, tk};
use serde_json::{Value, json};
use tk::checkpoint::{Weights, write_safetensors};

impl Bench {
    fn classifier() -> Self {
        Self::new("text-classification", "tiny-bert-single")
    }

    fn train(&self, output: &str, more: &[&str]) -> Assert {
        let mut run = tk();
        run.args([
            "train",
            "--task",
            self.task,
            "--batch-size",
            "4",
            "--max-length",
            "48",
            "--learning-rate",
            "1e-3",
        ]);
        for (flag, name) in [("--model", "model"), ("--train", "train.jsonl"), ("--output", output)] {
            run.arg(flag).arg(self.path(name));
        }
        run.args(more).assert()
    }

    fn lines(&self, path: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path(path)).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

fn stderr(assert: &Assert) -> String {
    String::from_utf8_lossy(&assert.get_output().stderr).into_owned()
}

fn tensors(path: PathBuf) -> Vec<(String, Vec<f32>)> {
    let weights = Weights::open_file(&path).unwrap();
    weights.names().map(|name| (name.to_owned(), weights.f32(name).unwrap().into_owned())).collect()
}

#[test]
fn what_is_frozen_stays_as_it_was_and_is_in_no_checkpoint() {
    let bench = Bench::classifier();
    let freeze = ["--freeze", r"embeddings,layer\.0\.", "--max-steps", "6"];
    let said = stderr(&bench.train("out", &freeze).success());
    assert!(said.contains("of them are frozen"), "{said}");
    let is_frozen = |name: &str| name.contains("embeddings") || name.contains("layer.0.");
    let (before, after) =
        (tensors(bench.path("model/model.safetensors")), tensors(bench.path("out/model.safetensors")));
    let mut moved = 0;
    for ((name, before), (same, after)) in before.iter().zip(&after) {
        assert_eq!(name, same);
        assert_eq!(before == after, is_frozen(name), "{name}");
        moved += usize::from(before != after);
    }
    let checkpoint = bench.path("out/training/checkpoints/step-00000006");
    let trained: BTreeSet<String> =
        tensors(checkpoint.join("model.safetensors")).into_iter().map(|(name, _)| name).collect();
    assert!(trained.len() == moved && !trained.iter().any(|name| is_frozen(name)), "{trained:?}");
    assert_eq!(tensors(checkpoint.join("optimizer.safetensors")).len(), 2 * moved);

    let dry = bench.train("dry", &["--freeze", r"embeddings,layer\.0\.", "--dry-run", "--json"]).success();
    let told: Value = serde_json::from_slice(&dry.get_output().stdout).unwrap();
    let numbers = |all: &[(String, Vec<f32>)], frozen: bool| -> usize {
        all.iter().filter(|(name, _)| is_frozen(name) == frozen).map(|(_, values)| values.len()).sum()
    };
    assert_eq!(told["model"]["frozen"], numbers(&after, true));
    assert_eq!(told["model"]["trained"], numbers(&after, false));
}

#[test]
fn groups_of_parameters_have_their_own_rates() {
    let bench = Bench::classifier();
    let rates = ["--layer-decay", "0.5", "--head-learning-rate", "0.01", "--dry-run", "--json"];
    let told: Value =
        serde_json::from_slice(&bench.train("out", &rates).success().get_output().stdout).unwrap();
    let groups = told["plan"]["groups"].as_array().unwrap();
    let rate = |what: &str| {
        groups.iter().find(|group| group["what"] == what).unwrap_or_else(|| panic!("{what}: {groups:?}"))
            ["learning_rate"]
            .as_f64()
            .unwrap()
    };
    assert_eq!(rate("head: biases and norms"), 0.01);
    let last =
        groups.iter().filter_map(|group| group["what"].as_str()?.strip_prefix("layer ")).max().unwrap();
    let last: i32 = last.split(':').next().unwrap().parse().unwrap();
    assert_eq!(rate(&format!("layer {last}: matrices and tables")), 1e-3);
    assert_eq!(rate("layer 0: matrices and tables"), 1e-3 * 0.5f64.powi(last));
    assert_eq!(rate("embeddings: matrices and tables"), 1e-3 * 0.5f64.powi(last + 1));

    // at a rate of 0 nothing moves but the head
    bench
        .train("head", &["--learning-rate", "0", "--head-learning-rate", "0.01", "--max-steps", "3"])
        .success();
    let before = tensors(bench.path("model/model.safetensors"));
    for ((name, before), (_, after)) in before.iter().zip(tensors(bench.path("head/model.safetensors"))) {
        assert_eq!(*before != after, name.starts_with("classifier") || name.contains("pooler"), "{name}");
    }
}

#[test]
fn a_resumed_run_is_proved_to_be_the_one_without_a_break_for_every_task() {
    for (task, model, more) in [
        ("text-classification", "tiny-bert-single", &["--gradient-accumulation", "2"][..]),
        ("text-classification", "tiny-gpt2-single", &["--freeze", r"h\.0\.,wte", "--layer-decay", "0.9"]),
        ("text-classification", "tiny-bert-single", &["--ema", "0.9", "--freeze", "token_type"]),
        ("token-classification", "tiny-bert-tokens", &["--no-shuffle", "--class-weights", "balanced"]),
        ("question-answering", "tiny-bert-answers", &[]),
        ("masked-lm", "tiny-bert-masked", &["--gradient-accumulation", "3"]),
        ("next-sentence", "tiny-bert-pairs", &[]),
        ("masked-lm,next-sentence", "tiny-bert-pretraining", &[]),
        ("embedding", "tiny-bert-embedding", &[]),
        ("causal-lm", "tiny-gpt2-lm", &[]),
    ] {
        let bench = Bench::new(task, model);
        if task.contains("masked-lm") || task.contains("next-sentence") {
            let text = |i: usize| format!("It was good. It was number {i}. We love it! So it was.");
            let lines: String = (0..40).map(|i| format!("{}\n", json!({"text": text(i)}))).collect();
            std::fs::write(bench.path("train.jsonl"), lines).unwrap();
        }
        let said =
            bench.train("out", &[&["--verify-resume", "4", "--epochs", "40", "--json"], more].concat());
        let said = said.success();
        let told: Value = serde_json::from_slice(&said.get_output().stdout).unwrap();
        assert_eq!(told["steps"], 4, "{task}");
        assert!(told["tensors"].as_u64().unwrap() > 3, "{task}: {told}");
        assert!(!bench.path("out").exists(), "nothing is written");
    }
}

#[test]
fn a_proof_needs_an_even_number_of_steps_that_the_run_has() {
    let bench = Bench::classifier();
    for steps in ["3", "0"] {
        assert!(stderr(&bench.train("out", &["--verify-resume", steps]).code(2)).contains("even number"));
    }
    let said = stderr(&bench.train("out", &["--verify-resume", "8", "--max-steps", "4"]).code(2));
    assert!(said.contains("the whole run has 4 steps"), "{said}");
    let said = stderr(&bench.train("out", &["--verify-resume", "4", "--best-metric", "nothing"]).code(2));
    assert!(said.contains("nothing"), "a run's own refusals: {said}");
}

/// One token's embedding is not a number: the records that have it are at fault, and no other.
#[test]
fn a_step_that_is_not_finite_names_tensor_step_and_examples_and_keeps_them() {
    let bench = Bench::classifier();
    let path = bench.path("model/model.safetensors");
    let mut weights = tensors(path.clone());
    let reference = common::json(models("tiny-bert-single").join("reference.json"));
    let ids: Vec<Vec<usize>> = serde_json::from_value(reference["ids"].clone()).unwrap();
    let has = |id: &usize| ids.iter().filter(|own| own.contains(id)).count();
    let rare = *ids[0].iter().find(|id| (1..ids.len() / 2).contains(&has(id))).unwrap();
    let shape = |name: &str| Weights::open_file(&path).unwrap().shape(name).unwrap().to_vec();
    let shapes: Vec<Vec<usize>> = weights.iter().map(|(name, _)| shape(name)).collect();
    for ((name, values), shape) in weights.iter_mut().zip(&shapes) {
        if name.ends_with("word_embeddings.weight") {
            values[rare * shape[1] + 1] = f32::INFINITY;
        }
    }
    let views = weights
        .iter()
        .zip(&shapes)
        .map(|((name, values), shape)| (name.as_str(), shape.as_slice(), &values[..]));
    write_safetensors(&bench.path("broken.safetensors"), views).unwrap();
    std::fs::rename(bench.path("broken.safetensors"), &path).unwrap();
    let said = stderr(&bench.train("out", &["--max-steps", "9"]).code(1));
    assert!(said.contains("the weights") && said.contains("word_embeddings.weight"), "{said}");
    assert!(said.contains("examples are no better alone"), "{said}");
    let kept = common::json(bench.path("out/training/not_finite.json"));
    let examples: Vec<&Value> =
        kept["micro_batches"].as_array().unwrap().iter().flat_map(|b| b.as_array().unwrap()).collect();
    for example in &examples {
        let ids: Vec<usize> = serde_json::from_value(example["sequences"][0]["ids"].clone()).unwrap();
        assert_eq!(example["loss_alone"].is_string(), ids.contains(&rare), "{example}");
        assert!(example["label"].is_string() && example["sequences"][0]["text"].is_string(), "{example}");
    }
    assert!(!bench.path("out/model.safetensors").exists());
}

/// All weights are finite, but what is computed of them is not.
#[test]
fn activations_that_are_not_finite_are_named() {
    let bench = Bench::classifier();
    let is_broken = |name: &str| name.ends_with("layer.1.intermediate.dense.weight");
    change_weights(&bench.path("model"), is_broken, |value| 3e38 * value.signum());
    let said = stderr(&bench.train("out", &["--max-steps", "9"]).code(1));
    assert!(
        said.contains("step 1") && said.contains("the activations") && said.contains("layer.1"),
        "{said}"
    );
    assert!(said.contains("so is every example alone"), "{said}");
}

#[test]
fn an_audit_has_a_row_a_parameter_and_step_and_changes_nothing() {
    let bench = Bench::classifier();
    bench.train("plain", &["--max-steps", "7"]).success();
    let said = stderr(
        &bench.train("out", &["--max-steps", "7", "--audit", "3", "--freeze", "token_type"]).success(),
    );
    assert!(said.contains("audit of step 7"), "{said}");
    let rows = bench.lines("out/training/audit.jsonl");
    let steps: Vec<&Value> = rows.iter().map(|row| &row["step"]).collect();
    assert_eq!(steps, [1, 3, 6, 7]);
    let trained = tensors(bench.path("out/training/checkpoints/step-00000007/model.safetensors"));
    for row in &rows {
        let parameters = row["parameters"].as_array().unwrap();
        let names: BTreeSet<&str> = parameters.iter().map(|row| row["name"].as_str().unwrap()).collect();
        assert_eq!(names, trained.iter().map(|(name, _)| name.as_str()).collect());
    }
    // the last step's norms are those of what was saved; the rows of words that no record has got no gradient
    for parameter in rows[3]["parameters"].as_array().unwrap() {
        let (_, values) =
            trained.iter().find(|(name, _)| name == parameter["name"].as_str().unwrap()).unwrap();
        let norm = values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        assert!((parameter["weight_norm"].as_f64().unwrap() - norm).abs() <= 1e-9 * norm.max(1.0));
        let is_table = parameter["name"].as_str().unwrap().ends_with("word_embeddings.weight");
        assert_eq!(parameter["zeros"].as_f64().unwrap() > 0.4, is_table, "{parameter}");
        assert!(
            parameter["update_norm"].as_f64().unwrap() < 0.1
                && parameter["grad_norm"].as_f64().unwrap() > 0.0
        );
    }
    bench.train("audited", &["--max-steps", "7", "--audit"]).success();
    assert!(
        std::fs::read(bench.path("plain/model.safetensors")).unwrap()
            == std::fs::read(bench.path("audited/model.safetensors")).unwrap()
    );
    assert_eq!(bench.lines("audited/training/audit.jsonl").len(), 2, "the first and the last");
}

#[test]
fn averages_of_the_weights_are_what_is_measured_and_saved() {
    let bench = Bench::classifier();
    let steps = ["--max-steps", "6", "--eval-every", "3", "--ema", "0.8"];
    bench.train("plain", &steps[..4]).success();
    bench.train("out", &steps).success();
    let checkpoint = |run: &str, file: &str| {
        tensors(bench.path(run).join("training/checkpoints/step-00000006").join(file))
    };
    let (weights, averages) = (checkpoint("out", "model.safetensors"), checkpoint("out", "ema.safetensors"));
    assert!(
        weights == checkpoint("plain", "model.safetensors"),
        "training goes on with the weights themselves"
    );
    assert!(!bench.path("plain/training/checkpoints/step-00000006/ema.safetensors").exists());
    assert!(averages == tensors(bench.path("out/model.safetensors")) && averages != weights);

    let eval = bench.path("train.jsonl");
    let measured = ["--save-every", "3", "--keep-checkpoints", "2", "--eval", eval.to_str().unwrap()];
    bench.train("measured", &[&steps[..], &measured].concat()).success();
    let logged = bench.lines("measured/training/log.jsonl");
    let loss_at = |step: usize| {
        let of_step = |line: &&Value| line["step"] == step && line.get("eval_loss").is_some();
        logged.iter().find(of_step).unwrap()["eval_loss"].as_f64().unwrap()
    };
    let best = |step: &usize| bench.path(&format!("measured/training/best-{step:08}.safetensors")).exists();
    let step = [3, 6].into_iter().find(best).unwrap();
    let averages = format!("measured/training/checkpoints/step-{step:08}/ema.safetensors");
    let saved = tensors(bench.path("measured/model.safetensors"));
    assert!(saved == tensors(bench.path(&averages)), "the best evaluation's averages");
    let eval =
        tk().args(["eval", "--json", "--input"]).arg(&eval).arg(bench.path("measured")).assert().success();
    let told: Value = serde_json::from_slice(&eval.get_output().stdout).unwrap();
    let loss = told["metrics"]["loss"].as_f64().unwrap();
    assert!((loss_at(step) - loss).abs() < 1e-6, "{loss}, in the log {}", loss_at(step));
}
