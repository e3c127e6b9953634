//! `tk train`, the real binary on the tiny models: it repeats, resumes to the same bits, keeps the best, and says what
//! it can't use.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::training::started_until;
use common::{copy_dir, models, records_file, tk};
use serde_json::Value;

/// A directory with a model and data, and room for outputs.
struct Bench {
    dir: tempfile::TempDir,
    /// What a forward pass holds.
    budget: [&'static str; 2],
}

impl Bench {
    fn new(model: &str) -> Self {
        let bench = Self { dir: tempfile::tempdir().unwrap(), budget: ["--batch-size", "4"] };
        copy_dir(&models(model), &bench.path("model"));
        records_file(model, 4, &bench.path("train.jsonl"));
        records_file(model, 1, &bench.path("eval.jsonl"));
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The arguments of a short run that writes `output`.
    fn args(&self, output: &str) -> Vec<String> {
        let path = |name| self.path(name).display().to_string();
        let args = [
            ["--task", "text-classification"],
            ["--model", &path("model")],
            ["--train", &path("train.jsonl")],
            ["--eval", &path("eval.jsonl")],
            ["--output", &path(output)],
            self.budget,
            ["--max-length", "48"],
            ["--learning-rate", "1e-3"],
        ];
        std::iter::once("train").chain(args.into_iter().flatten()).map(str::to_owned).collect()
    }

    fn train(&self, output: &str, more: &[&str]) -> assert_cmd::assert::Assert {
        tk().args(self.args(output)).args(more).assert()
    }

    fn weights(&self, output: &str) -> Vec<u8> {
        std::fs::read(self.path(output).join("model.safetensors")).unwrap()
    }

    /// The log without what a clock decides.
    fn log(&self, output: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path(output).join("training/log.jsonl")).unwrap();
        text.lines()
            .map(|line| {
                let mut line: Value = serde_json::from_str(line).unwrap();
                line.as_object_mut().unwrap().remove("tokens_per_second");
                line
            })
            .collect()
    }

    /// Starts a run and ends it by `signal` once it has told of step `step`.
    fn interrupt(&self, output: &str, more: &[&str], step: &str, signal: i32) -> std::process::ExitStatus {
        let mut run = Command::new(assert_cmd::cargo::cargo_bin!("tk"));
        let (mut run, lines) = started_until(step, run.args(self.args(output)).args(more));
        // SAFETY: the child is ours and has not been waited for, so the number is its own.
        unsafe { libc::kill(run.id() as i32, signal) };
        lines.for_each(drop);
        run.wait().unwrap()
    }
}

fn stderr(assert: &assert_cmd::assert::Assert) -> String {
    String::from_utf8_lossy(&assert.get_output().stderr).into_owned()
}

#[test]
fn a_run_repeats_bit_for_bit_and_another_seed_does_not() {
    let bench = Bench::new("tiny-bert-single");
    for (output, seed) in [("a", "1"), ("b", "1"), ("c", "2")] {
        bench.train(output, &["--max-steps", "12", "--seed", seed]).success();
    }
    assert_eq!(bench.weights("a"), bench.weights("b"));
    assert_eq!(bench.log("a"), bench.log("b"));
    assert_ne!(bench.weights("a"), bench.weights("c"));
}

/// Dropout's masks and every sum are the same when the forward pass is computed twice.
#[test]
fn activations_that_are_computed_again_change_no_bit() {
    let bench = Bench::new("tiny-bert-single");
    bench.train("kept", &["--epochs", "2"]).success();
    bench.train("again", &["--epochs", "2", "--checkpoint-activations"]).success();
    assert!(bench.weights("kept") == bench.weights("again"));
    assert_eq!(bench.log("kept"), bench.log("again"));
}

#[test]
fn a_run_that_was_killed_or_interrupted_resumes_to_the_same_bits() {
    let bench = Bench::new("tiny-bert-single");
    resumes_to_the_same_bits(&bench);
}

#[test]
fn so_does_one_whose_batches_are_cut_by_tokens() {
    let bench = Bench { budget: ["--batch-tokens", "96"], ..Bench::new("tiny-bert-single") };
    resumes_to_the_same_bits(&bench);
    let log = bench.log("whole");
    let tokens: Vec<u64> = log.iter().filter_map(|line| line["tokens"].as_u64()).collect();
    assert!(tokens.iter().all(|&tokens| tokens <= 96), "{tokens:?}");
    let mean = tokens.iter().sum::<u64>() / tokens.len() as u64;
    assert!(mean > 60, "batches of {mean} tokens, of 96");
    assert_eq!(log[log.len() - 1]["epoch"], 6.0);
}

/// Runs to the end, and again with a kill and an interruption on the way.
fn resumes_to_the_same_bits(bench: &Bench) {
    let more = ["--epochs", "6", "--save-every", "7", "--eval-every", "5"];
    bench.train("whole", &more).success();
    for (output, signal, code) in [
        ("killed", libc::SIGKILL, None),
        ("stopped", libc::SIGINT, Some(1)),
        ("terminated", libc::SIGTERM, Some(143)),
    ] {
        let status = bench.interrupt(output, &more, "step 20/", signal);
        assert_eq!(status.code(), code);
        assert!(!bench.path(output).join("model.safetensors").exists(), "an unfinished run leaves no model");
        tk().args(["train", "--resume", "--output"]).arg(bench.path(output)).assert().success();
        assert_eq!(bench.weights(output), bench.weights("whole"), "{output}");
        assert_eq!(bench.log(output), bench.log("whole"), "{output}");
        assert_eq!(shown_by_tensorboard(bench, output), shown_by_tensorboard(bench, "whole"), "{output}");
    }
}

#[test]
fn a_signal_ends_a_long_evaluation_and_a_resumed_run_makes_it_first() {
    let bench = Bench::new("tiny-bert-single");
    records_file("tiny-bert-single", 80, &bench.path("eval.jsonl"));
    let more = ["--max-steps", "6", "--eval-every", "3"];
    bench.train("whole", &more).success();
    let status = bench.interrupt("out", &more, "step 3/", libc::SIGTERM);
    assert_eq!(status.code(), Some(143));
    let checkpoint = bench.path("out/training/checkpoints/step-00000003/progress.json");
    let progress: Value = serde_json::from_slice(&std::fs::read(checkpoint).unwrap()).unwrap();
    assert_eq!(progress["unmeasured"], true);
    tk().args(["train", "--resume", "--output"]).arg(bench.path("out")).assert().success();
    assert_eq!(bench.weights("out"), bench.weights("whole"));
    assert_eq!(bench.log("out"), bench.log("whole"));
}

/// What TensorBoard shows of a run, which is what stands in its log; without what a clock decides.
fn shown_by_tensorboard(bench: &Bench, output: &str) -> BTreeMap<(u64, String), f32> {
    let shown = common::events::scalars(&bench.path(output).join("training"));
    let speeds = shown.keys().filter(|(_, tag)| tag == "train/tokens_per_second").count();
    let mut logged = BTreeMap::new();
    for line in bench.log(output) {
        for (name, value) in line.as_object().unwrap() {
            let tag = match name.strip_prefix("eval_") {
                Some(metric) => format!("eval/{metric}"),
                None if ["step", "epoch", "tokens"].contains(&name.as_str()) => continue,
                None => format!("train/{name}"),
            };
            logged.insert((line["step"].as_u64().unwrap(), tag), value.as_f64().unwrap() as f32);
        }
    }
    assert_eq!(speeds, logged.keys().filter(|(_, tag)| tag == "train/loss").count(), "{output}");
    let shown: BTreeMap<_, _> =
        shown.into_iter().filter(|((_, tag), _)| tag != "train/tokens_per_second").collect();
    assert_eq!(shown, logged, "{output}");
    shown
}

#[test]
fn a_budget_of_examples_and_one_of_tokens_exclude_each_other() {
    let both = ["--batch-size", "--batch-tokens"];
    refused(|_| (), &["--batch-tokens", "64"], &both);
    refused(|_| (), &["--batch-tokens", "0"], &both);
    let bench = Bench { budget: ["--batch-tokens", "0"], ..Bench::new("tiny-bert-single") };
    let said = stderr(&bench.train("out", &[]).code(2));
    assert!(said.contains("--batch-tokens is 0, expected at least 1"), "{said}");

    // the command line's wins over a file's, whichever it is
    let config = bench.path("run.toml").display().to_string();
    for (budget, file, kept, left) in [
        (["--batch-tokens", "64"], "batch-size = 8\n", "batch-tokens = 64", "batch-size"),
        (["--batch-size", "4"], "batch-tokens = 64\n", "batch-size = 4", "batch-tokens"),
        (["--per-device-train-batch-size", "4"], "batch-tokens = 64\n", "batch-size = 4", "batch-tokens"),
    ] {
        let bench = Bench { budget, ..Bench::new("tiny-bert-single") };
        std::fs::write(&config, file).unwrap();
        bench.train("out", &["--config", &config, "--max-steps", "1"]).success();
        let settings = std::fs::read_to_string(bench.path("out/training/settings.toml")).unwrap();
        assert!(settings.contains(kept) && !settings.contains(left), "{settings}");
    }
    let bench = Bench { budget: ["--seed", "1"], ..Bench::new("tiny-bert-single") };
    std::fs::write(&config, "batch-size = 8\nbatch-tokens = 64\n").unwrap();
    let said = stderr(&bench.train("out", &["--config", &config]).code(2));
    assert!(both.iter().all(|option| said.contains(option)), "{said}");

    // and a resumed run keeps its own
    let bench = Bench::new("tiny-bert-single");
    bench.train("out", &["--max-steps", "1"]).success();
    let resumed = tk()
        .args(["train", "--resume", "--batch-tokens", "64", "--output"])
        .arg(bench.path("out"))
        .assert()
        .code(2);
    let said = stderr(&resumed);
    assert!(said.contains("batch-size (not set, was 4), batch-tokens (64, was not set)"), "{said}");
}

#[test]
fn the_end_of_a_run_tells_the_peak_memory() {
    let bench = Bench::new("tiny-bert-single");
    let output = bench.train("out", &["--max-steps", "1"]).success();
    let said = String::from_utf8_lossy(&output.get_output().stdout).into_owned();
    let (_, behind) = said.split_once("peak memory ").unwrap_or_else(|| panic!("{said}"));
    let gigabytes: f64 = behind.split_once(" GB").unwrap().0.parse().unwrap();
    assert!((0.001..16.0).contains(&gigabytes), "{said}");
}

#[test]
fn a_resumed_run_refuses_other_settings_and_other_data() {
    let bench = Bench::new("tiny-bert-single");
    bench.train("out", &["--max-steps", "5"]).success();
    let resume = |more: &[&str]| {
        tk().args(["train", "--resume", "--output"]).arg(bench.path("out")).args(more).assert().code(2)
    };
    let said = stderr(&resume(&["--learning-rate", "3e-5"]));
    assert!(said.contains("learning-rate (0.00003, was 0.001)"), "{said}");
    // a flag that is off is one that an older tk did not know
    let settings = bench.path("out/training/settings.toml");
    let text = std::fs::read_to_string(&settings).unwrap();
    assert!(text.contains("rslora = false\n"), "{text}");
    std::fs::write(&settings, text.replace("rslora = false\n", "")).unwrap();
    tk().args(["train", "--resume", "--output"]).arg(bench.path("out")).assert().success();
    records_file("tiny-bert-single", 5, &bench.path("train.jsonl"));
    let said = stderr(&resume(&[]));
    assert!(said.contains("inputs have changed") && said.contains("train"), "{said}");
}

#[test]
fn the_best_evaluation_is_what_is_saved() {
    let bench = Bench::new("tiny-bert-single");
    // the longer it learns one label, the worse it gets on all of them
    std::fs::write(bench.path("train.jsonl"), "{\"text\": \"a\", \"label\": \"negative\"}\n".repeat(8))
        .unwrap();
    let output = bench.train("out", &["--epochs", "4", "--best-metric", "loss", "--json"]).success();
    let result: Value = serde_json::from_slice(&output.get_output().stdout).unwrap();
    let log = bench.log("out");
    let losses: Vec<f64> = log.iter().filter_map(|line| line["eval_loss"].as_f64()).collect();
    let best = losses.iter().copied().fold(f64::INFINITY, f64::min);
    assert_eq!(losses.len(), 4);
    assert!(losses[3] > best, "the test needs a run that gets worse: {losses:?}");
    assert_eq!(result["eval"]["loss"].as_f64(), Some(best));
    let eval = tk()
        .arg("eval")
        .arg(bench.path("out"))
        .arg("--input")
        .arg(bench.path("eval.jsonl"))
        .arg("--json")
        .assert()
        .success();
    let measured: Value = serde_json::from_slice(&eval.get_output().stdout).unwrap();
    assert!((measured["metrics"]["loss"].as_f64().unwrap() - best).abs() < 1e-6);
}

#[test]
fn patience_ends_a_run_that_no_longer_gains() {
    let bench = Bench::new("tiny-bert-single");
    bench
        .train("out", &["--epochs", "9", "--learning-rate", "0", "--early-stopping-patience", "2"])
        .success();
    let evaluations = bench.log("out").iter().filter(|line| line.get("eval_loss").is_some()).count();
    assert_eq!(evaluations, 3);
}

#[test]
fn what_is_saved_says_its_labels_and_its_length() {
    let bench = Bench::new("tiny-bert-multi");
    bench.train("out", &["--max-steps", "2"]).success();
    let read = |name: &str| common::json(bench.path("out").join(name));
    let config = read("config.json");
    assert_eq!(config["architectures"][0], "BertForSequenceClassification");
    assert_eq!(config["problem_type"], "multi_label_classification");
    assert_eq!(config["id2label"], common::json(models("tiny-bert-multi").join("config.json"))["id2label"]);
    assert_eq!(read("tokenizer_config.json")["model_max_length"], 48);
    assert!(bench.path("out/tokenizer.json").is_file());
    let settings = std::fs::read_to_string(bench.path("out/training/settings.toml")).unwrap();
    assert!(settings.contains("learning-rate = 0.001"), "{settings}");
}

#[test]
fn a_head_for_other_labels_starts_anew_and_learns() {
    let bench = Bench::new("tiny-bert-single");
    let lines =
        "{\"text\": \"good day\", \"label\": \"up\"}\n{\"text\": \"bad rain\", \"label\": \"down\"}\n"
            .repeat(20);
    std::fs::write(bench.path("train.jsonl"), &lines).unwrap();
    std::fs::write(bench.path("eval.jsonl"), &lines).unwrap();
    let output = bench.train("out", &["--epochs", "6", "--json"]).success();
    let result: Value = serde_json::from_slice(&output.get_output().stdout).unwrap();
    assert_eq!((&result["eval"]["accuracy"], &result["epochs"]), (&1.0.into(), &6.0.into()));
    // ten batches are an epoch
    let short = bench.train("short", &["--max-steps", "4", "--json"]).success();
    let short: Value = serde_json::from_slice(&short.get_output().stdout).unwrap();
    assert_eq!(short["epochs"], 0.4);
    assert!(
        stderr(&output).contains("classifier.weight was trained for other labels"),
        "{}",
        stderr(&output)
    );
    assert_eq!(
        common::json(bench.path("out/config.json"))["label2id"],
        serde_json::json!({"down": 0, "up": 1})
    );
}

#[test]
fn numbers_and_pairs_are_learnt() {
    let bench = Bench::new("tiny-bert-regression");
    let output = bench.train("out", &["--epochs", "20", "--dropout", "0", "--json"]).success();
    let result: Value = serde_json::from_slice(&output.get_output().stdout).unwrap();
    let log = bench.log("out");
    let first = log.iter().find_map(|line| line["eval_mse"].as_f64()).unwrap();
    assert!(result["eval"]["mse"].as_f64().unwrap() < first / 2.0, "{result} after {first}");
}

#[test]
fn from_scratch_takes_no_weights() {
    let bench = Bench::new("tiny-bert-single");
    std::fs::remove_file(bench.path("model/model.safetensors")).unwrap();
    bench.train("out", &["--from-scratch", "--max-steps", "3"]).success();
    bench.train("without", &["--max-steps", "3"]).code(2);
}

#[test]
fn options_stand_in_a_file_and_the_command_line_wins() {
    let bench = Bench::new("tiny-bert-single");
    let file = bench.path("run.toml");
    std::fs::write(&file, "max-steps = 3\nlearning_rate = 2e-3\nno-shuffle = true\n").unwrap();
    let config = file.display().to_string();
    let mut args = bench.args("out");
    args.truncate(args.len() - 2); // without --learning-rate
    tk().args(&args).args(["--config", &config, "--max-steps", "2"]).assert().success();
    let settings = std::fs::read_to_string(bench.path("out/training/settings.toml")).unwrap();
    for line in ["learning-rate = 0.002", "max-steps = 2", "no-shuffle = true"] {
        assert!(settings.contains(line), "{settings}");
    }
    std::fs::write(&file, "learning-rat = 2e-3\n").unwrap();
    let refused = tk().args(bench.args("out2")).args(["--config", &config]).assert().code(2);
    assert!(stderr(&refused).contains("no option \"learning-rat\""), "{}", stderr(&refused));
}

#[test]
fn weights_that_are_not_numbers_end_the_run_at_the_first_step() {
    let bench = Bench::new("tiny-bert-single");
    replace_weight(&bench, "bert.encoder.layer.1.output.dense.bias", |values| values[3] = f32::NAN);
    let failed = bench.train("out", &[]).code(1);
    assert!(stderr(&failed).contains("step 1: the loss is NaN"), "{}", stderr(&failed));
    assert!(!bench.path("out/model.safetensors").exists());
}

fn replace_weight(bench: &Bench, name: &str, change: impl Fn(&mut Vec<f32>)) {
    edit_weights(&bench.path("model"), |tensors| {
        change(&mut tensors.iter_mut().find(|(known, ..)| known == name).unwrap().2);
    });
}

type Tensors = Vec<(String, Vec<usize>, Vec<f32>)>;

fn edit_weights(dir: &Path, edit: impl Fn(&mut Tensors)) {
    let names = tk::model::ModelConfig::read(dir).unwrap().family.names();
    let weights = tk::checkpoint::Weights::open(dir, names).unwrap();
    let mut tensors: Tensors = weights
        .names()
        .map(|name| {
            (name.to_owned(), weights.shape(name).unwrap().to_vec(), weights.f32(name).unwrap().into_owned())
        })
        .collect();
    edit(&mut tensors);
    let named = tensors.iter().map(|(n, s, v)| (n.as_str(), s.as_slice(), v.as_slice()));
    tk::checkpoint::write_safetensors(&dir.join("model.safetensors"), named).unwrap();
}

/// Changes `config.json` of the bench's model.
fn edit_config(bench: &Bench, key: &str, value: Value) {
    let path = bench.path("model/config.json");
    let mut config = common::json(path.clone());
    config[key] = value;
    std::fs::write(path, config.to_string()).unwrap();
}

/// Expects exit code 2, all of `said` on stderr, and an output directory that was never made.
fn refused(spoil: impl Fn(&Bench), more: &[&str], said: &[&str]) {
    let bench = Bench::new("tiny-bert-single");
    spoil(&bench);
    let text = stderr(&bench.train("out", more).code(2));
    for part in said {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
    assert!(!bench.path("out").exists(), "something was written: {text}");
}

#[test]
fn bad_records_are_refused_with_their_places() {
    let write = |name: &'static str, text: &'static str| {
        move |bench: &Bench| {
            std::fs::write(bench.path(name), text).unwrap();
        }
    };
    let one = "{\"text\": \"a\", \"label\": \"x\"}\n";
    refused(
        write("train.jsonl", "{\"sentence\": \"a\", \"label\": \"x\"}\n"),
        &[],
        &["train.jsonl:1", "no field \"text\"", "--text-column"],
    );
    refused(write("train.jsonl", ""), &[], &["train.jsonl", "no records"]);
    refused(write("train.jsonl", "{\"text\": \"a\"}\n"), &[], &["train.jsonl:1", "label"]);
    refused(write("train.jsonl", one), &[], &["train.jsonl", "{\"x\"}", "at least 2 different"]);
    refused(
        write("eval.jsonl", "{\"text\": \"a\", \"label\": \"furious\"}\n"),
        &[],
        &["eval.jsonl:1", "furious", "negative, neutral, positive"],
    );
    refused(write("eval.jsonl", "{\"text\": \n"), &[], &["eval.jsonl:1"]);
    refused(|_| (), &["--train", "/no/such/file.jsonl"], &["/no/such/file.jsonl"]);
    refused(|_| (), &["--train", "/dev/null"], &["/dev/null"]);
}

#[test]
fn bad_models_are_refused_with_what_was_found_and_expected() {
    let weights = |bench: &Bench| bench.path("model/model.safetensors");
    let cut = |share: usize| {
        move |bench: &Bench| {
            let bytes = std::fs::read(weights(bench)).unwrap();
            std::fs::write(weights(bench), &bytes[..bytes.len() * share / 100]).unwrap();
        }
    };
    for share in [0, 1, 50, 99] {
        refused(cut(share), &[], &["model.safetensors", "not a whole safetensors file"]);
    }
    refused(
        |bench| std::fs::write(weights(bench), vec![b'x'; 5000]).unwrap(),
        &[],
        &["not a whole safetensors file"],
    );
    refused(|bench| std::fs::remove_file(weights(bench)).unwrap(), &[], &["holds no model.safetensors"]);
    refused(
        |bench| {
            edit_weights(&bench.path("model"), |tensors| {
                let query = tensors
                    .iter_mut()
                    .find(|(name, ..)| name.ends_with("layer.0.attention.self.query.weight"))
                    .unwrap();
                (query.1, query.2) = (vec![2, 3], vec![0.0; 6]);
            })
        },
        &[],
        &["bert.encoder.layer.0.attention.self.query.weight has shape [2, 3], config.json asks for [32, 32]"],
    );
    refused(
        |bench| {
            edit_weights(&bench.path("model"), |tensors| {
                tensors.retain(|(name, ..)| !name.contains("layer.1.output.dense"))
            })
        },
        &[],
        &[
            "bert.encoder.layer.1.output.dense.weight is missing",
            "bert.encoder.layer.1.output.dense.bias is missing",
        ],
    );
    refused(|bench| edit_config(bench, "model_type", "mamba".into()), &[], &["config.json", "mamba"]);
    refused(
        |bench| edit_config(bench, "hidden_act", "snake".into()),
        &[],
        &["hidden_act", "snake", "gelu_new"],
    );
    refused(
        |bench| edit_config(bench, "num_attention_heads", 5.into()),
        &[],
        &["not a multiple of num_attention_heads 5"],
    );
    refused(
        |bench| edit_config(bench, "vocab_size", 100.into()),
        &[],
        &["tokenizer.json has ids up to", "100 rows"],
    );
    refused(|_| (), &["--max-length", "65"], &["--max-length 65", "64 tokens"]);
    refused(|_| (), &["--model", "/no/such/model"], &["/no/such/model"]);
}

#[test]
fn wrong_settings_are_all_named_at_once() {
    refused(|_| (), &["--epochs", "0", "--warmup-ratio", "2"], &["--epochs is 0", "--warmup-ratio is 2"]);
    refused(|_| (), &["--best-metric", "beauty"], &["beauty", "accuracy, f1_macro"]);
    refused(|_| (), &["--device", "gpu"], &["--device gpu", "cpu, cuda or cuda:N"]);
    refused(|_| (), &["--problem-type", "regression"], &["train.jsonl:1", "expected a number"]);
}

#[test]
#[cfg(not(feature = "cuda"))]
fn a_device_that_was_not_built_in_is_refused_with_how_to_build_it() {
    for device in ["cuda", "cuda:1"] {
        let said = [format!("--device {device}: this tk was built without CUDA")];
        refused(|_| (), &["--device", device], &[&said[0], "cargo build --release --features cuda", "nvcc"]);
    }
    let bench = Bench::new("tiny-bert-single");
    let eval = tk()
        .arg("eval")
        .arg(bench.path("model"))
        .args(["--device", "cuda", "--input"])
        .arg(bench.path("eval.jsonl"))
        .assert()
        .code(2);
    assert!(stderr(&eval).contains("cargo build --release --features cuda"), "{}", stderr(&eval));
}

#[test]
fn an_output_that_is_not_ours_stays_as_it_is() {
    let bench = Bench::new("tiny-bert-single");
    std::fs::create_dir(bench.path("mine")).unwrap();
    std::fs::write(bench.path("mine/thesis.txt"), "years").unwrap();
    for flag in [&[][..], &["--overwrite"]] {
        let text = stderr(&bench.train("mine", flag).code(2));
        assert!(text.contains("did not write"), "{text}");
    }
    assert_eq!(std::fs::read_dir(bench.path("mine")).unwrap().count(), 1);

    let text = stderr(&bench.train("train.jsonl", &[]).code(2));
    assert!(text.contains("is a file"), "{text}");
    let text = stderr(&bench.train("train.jsonl/out", &[]).code(2));
    assert!(text.contains("can't be written"), "{text}");

    bench.train("out", &["--max-steps", "1"]).success();
    let text = stderr(&bench.train("out", &[]).code(2));
    assert!(text.contains("--resume") && text.contains("--overwrite"), "{text}");
    bench.train("out", &["--max-steps", "1", "--overwrite"]).success();
}

#[test]
fn where_the_best_metric_is_never_a_number_the_last_weights_are_kept_and_the_run_resumes() {
    let bench = Bench::new("tiny-bert-regression");
    let record =
        std::fs::read_to_string(bench.path("eval.jsonl")).unwrap().lines().next().unwrap().to_owned();
    std::fs::write(bench.path("eval.jsonl"), format!("{record}\n{record}\n")).unwrap();
    let more = ["--epochs", "6", "--eval-every", "5", "--save-every", "7"];
    let pearson = [&more[..], &["--best-metric", "pearson"]].concat();
    let run = bench.train("whole", &pearson).success();
    assert!(stderr(&run).contains("pearson was not a number in any evaluation"), "{}", stderr(&run));
    assert!(!stderr(&run).contains("the best so far"), "{}", stderr(&run));
    assert!(bench.log("whole").iter().any(|line| line.get("eval_pearson").is_some_and(Value::is_null)));

    let path = |name: &str| bench.path(name).display().to_string();
    let mut without: Vec<String> = bench.args("without");
    let at = without.iter().position(|arg| *arg == path("eval.jsonl")).unwrap();
    without.drain(at - 1..=at);
    tk().args(&without).args(["--epochs", "6"]).assert().success();
    assert!(bench.weights("whole") == bench.weights("without"), "the last weights");

    let status = bench.interrupt("stopped", &pearson, "step 20/", libc::SIGKILL);
    assert!(!status.success());
    tk().args(["train", "--resume", "--output"]).arg(bench.path("stopped")).assert().success();
    assert!(bench.weights("stopped") == bench.weights("whole"));
}

#[test]
fn a_resumed_run_refuses_other_shards_of_its_weights() {
    let bench = Bench::new("tiny-bert-single");
    let (whole, shard) = (bench.path("model/model.safetensors"), "model-00001-of-00001.safetensors");
    let names: Vec<String> =
        tk::checkpoint::Weights::open_file(&whole).unwrap().names().map(str::to_owned).collect();
    std::fs::rename(&whole, bench.path("model").join(shard)).unwrap();
    let map: serde_json::Map<String, Value> = names.into_iter().map(|name| (name, shard.into())).collect();
    let index = bench.path("model/model.safetensors.index.json");
    std::fs::write(&index, serde_json::json!({"weight_map": map}).to_string()).unwrap();
    bench.train("out", &["--max-steps", "1"]).success();

    for file in [bench.path("model").join(shard), index] {
        let before = std::fs::read(&file).unwrap();
        let mut bytes = before.clone();
        if file.extension().is_some_and(|extension| extension == "json") {
            bytes.push(b'\n');
        } else {
            *bytes.last_mut().unwrap() ^= 1;
        }
        std::fs::write(&file, &bytes).unwrap();
        let resumed = tk().args(["train", "--resume", "--output"]).arg(bench.path("out")).assert().code(2);
        let name = file.file_name().unwrap().to_str().unwrap();
        assert!(stderr(&resumed).contains(name), "{}", stderr(&resumed));
        std::fs::write(&file, &before).unwrap();
    }
    tk().args(["train", "--resume", "--output"]).arg(bench.path("out")).assert().success();
}

#[test]
#[cfg(unix)]
fn two_runs_do_not_train_in_one_directory() {
    let bench = Bench::new("tiny-bert-single");
    bench.train("out", &["--max-steps", "1"]).success();
    let folder = std::fs::File::open(bench.path("out/training")).unwrap();
    folder.lock().unwrap();
    let before = bench.log("out");
    for more in ["--resume", "--overwrite"] {
        let refused = bench.train("out", &["--max-steps", "1", more]).code(2);
        assert!(stderr(&refused).contains("another run"), "{}", stderr(&refused));
    }
    assert_eq!(bench.log("out"), before);
    drop(folder);
    let left = bench.path("out/.tk-killed.tmp"); // of a process that was killed
    std::fs::write(&left, "half").unwrap();
    bench.train("out", &["--max-steps", "1", "--overwrite"]).success();
    assert!(!left.exists());
}

#[test]
#[cfg(unix)]
fn a_run_that_is_begun_anew_keeps_links_and_what_it_did_not_write() {
    use std::os::unix::fs::symlink;
    let bench = Bench::new("tiny-bert-single");
    symlink("elsewhere", bench.path("out")).unwrap(); // which is not there yet
    bench.train("out", &["--max-steps", "1"]).success();
    assert!(bench.path("out").is_symlink() && bench.path("elsewhere/model.safetensors").is_file());
    std::fs::rename(bench.path("out/training"), bench.path("far")).unwrap();
    symlink(bench.path("far"), bench.path("out/training")).unwrap();
    std::fs::create_dir(bench.path("graphs")).unwrap();
    symlink(bench.path("graphs"), bench.path("out/onnx")).unwrap();
    for file in ["far/thesis.txt", "graphs/notes.txt", "graphs/model.onnx", "graphs/model.onnx_data"] {
        std::fs::write(bench.path(file), "x").unwrap();
    }
    bench.train("out", &["--max-steps", "2", "--overwrite"]).success();
    let steps: Vec<u64> =
        common::events::scalars(&bench.path("far")).into_keys().map(|(step, _)| step).collect();
    assert!(steps.contains(&2) && files_of(&bench.path("far"), "tfevents") == 1, "{steps:?}");
    assert!(bench.path("out/training").is_symlink() && bench.path("out/onnx").is_symlink());
    assert!(bench.path("far/thesis.txt").is_file() && bench.path("graphs/notes.txt").is_file());
    assert_eq!(std::fs::read_dir(bench.path("graphs")).unwrap().count(), 1);
    assert_eq!(bench.log("out").iter().filter(|line| line.get("loss").is_some()).count(), 2);
}

/// How many files of a folder have this in their names.
fn files_of(folder: &Path, part: &str) -> usize {
    let names = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
    names.filter(|name| name.to_string_lossy().contains(part)).count()
}

#[test]
fn a_run_whose_messages_nobody_reads_trains_on() {
    let bench = Bench::new("tiny-bert-single");
    let mut run = Command::new(assert_cmd::cargo::cargo_bin!("tk"))
        .args(bench.args("out"))
        .args(["--max-steps", "12"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop((run.stdout.take(), run.stderr.take()));
    assert!(run.wait().unwrap().success());
    bench.train("heard", &["--max-steps", "12"]).success();
    assert!(bench.weights("out") == bench.weights("heard"));
}
