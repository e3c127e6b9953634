//! `tk train --teacher`: losses, gradients and steps against PyTorch's (`scripts/reference-distillation`), and the real binary
//! on the tiny models: what a teacher says is learnt, asked once, and refused where it says nothing.

mod common;

use std::path::{Path, PathBuf};

use assert_cmd::assert::Assert;
use candle_core::Device;
use common::training::Bench;
use common::{copy_dir, floats, gradient, json, max_abs, models, relative, tk};
use serde_json::{Value, json};
use tk::checkpoint::{Weights, write_safetensors};
use tk::data::records::Files;
use tk::eager::{Eager, Kernels, Mode};
use tk::say::Say;
use tk::task::{Example, RecordFlags, Target, Task, TrainingFlags};
use tk::train::prepare::{Job, Prepared};
use tk::train::{Settings, Trainer};

/// A run that PyTorch has made, as far as its first step.
struct Reference {
    numbers: Value,
    settings: Settings,
    prepared: Prepared,
}

impl Reference {
    fn load(name: &str) -> Self {
        let numbers = json(models("distillation.json"))[name].take();
        let text = |key: &str| numbers[key].as_str().unwrap().to_owned();
        let (student, teacher) = (models(&text("student")), models(&text("teacher")));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("records.jsonl");
        let all = json(student.join("reference.json"))["records"].take();
        let chosen: Vec<usize> = serde_json::from_value(numbers["records"].clone()).unwrap();
        let lines: String = chosen.iter().map(|&i| format!("{}\n", all[i])).collect();
        std::fs::write(&path, lines).unwrap();
        let mut training = TrainingFlags::default();
        training.shared.teacher = Some(teacher);
        training.shared.distillation_temperature = numbers["temperature"].as_f64();
        training.shared.distillation_weight = numbers["weight"].as_f64();
        let steps = &numbers["steps"];
        let settings = Settings {
            dropout: Some(0.0),
            max_length: 48,
            learning_rate: steps["learning_rate"].as_f64().unwrap(),
            warmup_ratio: steps["warmup_ratio"].as_f64().unwrap(),
            weight_decay: steps["weight_decay"].as_f64().unwrap(),
            max_grad_norm: steps["max_grad_norm"].as_f64().unwrap(),
            ..Settings::default()
        };
        let task = if name == "text" { "text-classification" } else { "token-classification" };
        let job = Job {
            task,
            model: student.to_str().unwrap(),
            train: &Files::from(&path),
            eval: None,
            from_scratch: false,
            records: &RecordFlags::default(),
            training: &training,
            settings: &settings,
            cache: None,
        };
        job.check().unwrap();
        let say = Say { quiet: true, ..Say::default() };
        let mut prepared = Prepared::new(&job, &Device::Cpu, &say).unwrap();
        prepared.be_taught(&Device::Cpu, None, &say).unwrap();
        assert_eq!(prepared.learning.examples.len(), chosen.len());
        Self { numbers, settings, prepared }
    }

    fn number(&self, key: &str) -> f64 {
        self.numbers[key].as_f64().unwrap()
    }
}

/// What was said of a record, by word.
fn taught(example: &Example) -> Vec<(usize, Vec<f32>)> {
    match &example.target {
        Target::TextClassification(window) => vec![(0, window.taught.as_deref().unwrap().to_vec())],
        Target::TokenClassification(tags) => {
            let word = |token: usize| tags.words.iter().find(|(own, _)| *own == token).unwrap().1;
            let taught = tags.taught.as_ref().unwrap().iter();
            taught.map(|(token, logits)| (word(*token), logits.to_vec())).collect()
        }
        _ => panic!("another task"),
    }
}

const CASES: [&str; 2] = ["text", "tokens"];

#[test]
fn what_the_teacher_says_is_what_transformers_computes() {
    for name in CASES {
        let r = Reference::load(name);
        let mut count = 0;
        for row in r.numbers["teacher_logits"].as_array().unwrap() {
            let row: Vec<f64> = serde_json::from_value(row.clone()).unwrap();
            let (record, word) = (row[0] as usize, row[1] as usize);
            let found = taught(&r.prepared.learning.examples[record]);
            let Some((_, found)) = found.into_iter().find(|(own, _)| *own == word) else { continue };
            let wanted: Vec<f32> = row[2..].iter().map(|&x| x as f32).collect();
            let worst = max_abs(&found, &wanted).0;
            assert!(worst <= 1e-5, "{name}, record {record}, word {word}: {worst:e}");
            count += 1;
        }
        let all: usize = r.prepared.learning.examples.iter().map(|example| taught(example).len()).sum();
        assert_eq!(count, all, "{name}");
    }
}

#[test]
fn both_terms_and_every_gradient_are_pytorchs() {
    let bytes = std::fs::read(models("distillation.safetensors")).unwrap();
    let kept = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    for name in CASES {
        for kernels in [Kernels::Fused, Kernels::Composite] {
            let r = Reference::load(name);
            let Prepared { learning, params, config, .. } = &r.prepared;
            let task = &learning.task;
            let examples: Vec<&Example> = learning.examples.iter().collect();
            let batch = Task::packed(&examples);
            let eager =
                Eager::new(params, &batch, &Device::Cpu, Mode::Training { key: 0 }).with_kernels(kernels);
            let outputs = task.define(&eager, &config.family).unwrap();
            let weights: Vec<Vec<f64>> =
                examples.iter().map(|example| task.weights(&example.target)).collect();
            let of: Vec<f64> = (0..2).map(|i| weights.iter().map(|own| own[i]).sum()).collect();
            let losses = task.loss(&eager, outputs, &examples, 0.0, &of).unwrap();
            assert_eq!(task.loss_names(), ["label_loss", "teacher_loss"]);
            for (key, found) in task.loss_names().iter().zip(&losses) {
                let (found, wanted) = (f64::from(found.to_scalar::<f32>().unwrap()), r.number(key));
                assert!((found - wanted).abs() <= 1e-5, "{name}, {kernels:?}, {key}: {found}, {wanted}");
            }
            let store = (&losses[0] + &losses[1]).unwrap().backward().unwrap();
            let norms = r.numbers["gradient_norms"].as_object().unwrap();
            assert_eq!(norms.len(), params.len());
            let largest = norms.values().filter_map(Value::as_f64).fold(0.0, f64::max);
            for (param, _) in params.iter() {
                let found = gradient(params, &param.name, &store, kernels);
                let norm = found.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
                let wanted = norms[&param.name].as_f64().unwrap();
                let allowed = 1e-4 * wanted + 1e-6 * largest;
                assert!(
                    (norm - wanted).abs() <= allowed,
                    "{name}, {kernels:?}, {}: {norm}, {wanted}",
                    param.name
                );
                if let Ok(wanted) = kept.tensor(&format!("{name}/gradient/{}", param.name)) {
                    assert_eq!(wanted.shape(), param.shape);
                    let error = relative(&found, &floats(&kept, &format!("{name}/gradient/{}", param.name)));
                    assert!(error <= 1e-4, "{name}, {kernels:?}, {}: {error:e}", param.name);
                }
            }
        }
    }
}

#[test]
fn ten_steps_are_pytorchs_however_they_are_cut() {
    let bytes = std::fs::read(models("distillation.safetensors")).unwrap();
    let kept = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    for (name, kernels, micro_batch) in [
        ("text", Kernels::Fused, 4),
        ("text", Kernels::Fused, 1),
        ("text", Kernels::Composite, 4),
        ("tokens", Kernels::Fused, 4),
        ("tokens", Kernels::Fused, 1),
        ("tokens", Kernels::Composite, 4),
    ] {
        let r = Reference::load(name);
        let Prepared { learning, params, config, .. } = &r.prepared;
        let mut trainer =
            Trainer::new(&r.settings, &config.family, &learning.task, params, &Device::Cpu, 10).unwrap();
        trainer = trainer.with_kernels(kernels).unwrap();
        let numbers =
            |key: &str| -> Vec<f64> { serde_json::from_value(r.numbers["steps"][key].clone()).unwrap() };
        for (step, (loss, norm)) in numbers("losses").into_iter().zip(numbers("gradient_norms")).enumerate() {
            let count = learning.examples.len();
            let batch: Vec<&Example> = (0..4).map(|j| &learning.examples[(4 * step + j) % count]).collect();
            let parts: Vec<Vec<&Example>> = batch.chunks(micro_batch).map(<[_]>::to_vec).collect();
            let did = trainer.step(&parts).unwrap();
            assert!((did.loss - loss).abs() <= 1e-4, "{name}, step {step}: {}, {loss}", did.loss);
            assert!((did.grad_norm - norm).abs() <= 1e-3 * norm, "{name}, step {step}: {}", did.grad_norm);
        }
        let mut count = 0;
        for own in params.trainable() {
            let key = format!("{name}/after/{}", own.param.name);
            if kept.tensor(&key).is_ok() {
                let now: Vec<f32> = own.var.flatten_all().unwrap().to_vec1().unwrap();
                let worst = max_abs(&now, &floats(&kept, &key)).0;
                assert!(worst <= 2e-5, "{name}: {key} {worst:e}");
                count += 1;
            }
        }
        assert!(count >= 3, "{name}");
    }
}

const TEXT: &str = "text-classification";
const TOKENS: &str = "token-classification";

/// A bench with a teacher beside the student.
fn bench(task: &'static str, student: &str, teacher: &str) -> Bench {
    let bench = Bench::new(task, student);
    copy_dir(&models(teacher), &bench.path("teacher"));
    bench
}

trait Trains {
    fn train(&self, output: &str, more: &[&str]) -> Assert;
    fn log(&self, output: &str) -> Vec<Value>;
    fn weights(&self, output: &str) -> Vec<u8>;
    fn cached(&self) -> Vec<PathBuf>;
}

impl Trains for Bench {
    fn train(&self, output: &str, more: &[&str]) -> Assert {
        let mut run = tk();
        run.env("TK_CACHE", self.path("cache")).args(["train", "--max-length", "48", "--task", self.task]);
        for (flag, name) in
            [("--model", "model"), ("--teacher", "teacher"), ("--train", "train.jsonl"), ("--output", output)]
        {
            if !more.contains(&flag) {
                run.arg(flag).arg(self.path(name));
            }
        }
        run.args(more).assert()
    }

    /// The steps of a run.
    fn log(&self, output: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path(output).join("training/log.jsonl")).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
        lines.filter(|line: &Value| line.get("loss").is_some()).collect()
    }

    fn weights(&self, output: &str) -> Vec<u8> {
        std::fs::read(self.path(output).join("model.safetensors")).unwrap()
    }

    fn cached(&self) -> Vec<PathBuf> {
        let entries = self.path("cache").read_dir().into_iter().flatten();
        entries.map(|entry| entry.unwrap().path()).collect()
    }
}

fn stderr(assert: &Assert) -> String {
    String::from_utf8_lossy(&assert.get_output().stderr).into_owned()
}

fn stdout(assert: &Assert) -> Value {
    serde_json::from_slice(&assert.get_output().stdout).unwrap()
}

fn number(line: &Value, key: &str) -> f64 {
    line[key].as_f64().unwrap_or_else(|| panic!("{key}: {line}"))
}

/// The records of a model with other labels, four times over.
fn relabelled(model: &str, path: &Path, label: impl Fn(usize, &Value) -> Value) {
    let records = json(models(model).join("reference.json"))["records"].take();
    let line = |(i, record): (usize, &Value)| {
        let mut record = record.clone();
        record["label"] = label(i, &record["label"]);
        format!("{record}\n")
    };
    let lines: String = records.as_array().unwrap().iter().enumerate().map(line).collect();
    std::fs::write(path, lines.repeat(4)).unwrap();
}

const NAMES: [&str; 3] = ["negative", "neutral", "positive"];

#[test]
fn a_teacher_is_learnt_though_the_labels_lie_and_they_count_nothing() {
    let bench = bench(TEXT, "tiny-bert-single", "tiny-distilbert-single");
    let logits = json(models("tiny-distilbert-single").join("reference.json"))["logits"].take();
    let likeliest = |i: usize| {
        let row: Vec<f64> = serde_json::from_value(logits[i].clone()).unwrap();
        (0..3).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap()
    };
    let model = "tiny-bert-single";
    relabelled(model, &bench.path("says.jsonl"), |i, _| NAMES[likeliest(i)].into());
    let says = bench.path("says.jsonl").display().to_string();
    let all = ["--distillation-weight", "1", "--max-steps", "52", "--epochs", "4", "--eval-every", "52"];
    let all = [&all[..], &["--batch-size", "4", "--learning-rate", "3e-3", "--dropout", "0"]].concat();
    let all = [&all[..], &["--json", "--eval", &says]].concat();
    for (output, shift) in [("one", 1), ("two", 2)] {
        relabelled(model, &bench.path("train.jsonl"), |i, _| NAMES[(likeliest(i) + shift) % 3].into());
        let done = bench.train(output, &all).success();
        let accuracy = number(&stdout(&done)["eval"], "accuracy");
        assert!(accuracy > 0.8, "{accuracy}");
        let log = bench.log(output);
        assert!(log.iter().all(|line| number(line, "label_loss") == 0.0));
        assert!(number(&log[log.len() - 1], "teacher_loss") < 0.5 * number(&log[0], "teacher_loss"));
        // what is measured is the loss of the labels
        let found = tk()
            .args(["eval", "--json", "--max-length", "48", "--input", &says])
            .arg(bench.path(output))
            .assert()
            .success();
        let (eval, trained) = (stdout(&found)["metrics"].take(), stdout(&done)["eval"].take());
        assert!((number(&eval, "loss") - number(&trained, "loss")).abs() < 1e-5);
    }
    assert!(bench.weights("one") == bench.weights("two"), "labels count nothing");
}

/// Of a student that is its own teacher the second term is 0, and the first is its share of the plain loss.
#[test]
fn every_kind_of_label_has_a_teacher() {
    for (task, model) in [
        (TEXT, "tiny-bert-single"),
        (TEXT, "tiny-bert-multi"),
        (TEXT, "tiny-bert-regression"),
        (TOKENS, "tiny-bert-tokens"),
    ] {
        let bench = bench(task, model, model);
        let same = ["--max-steps", "2", "--batch-size", "8", "--dropout", "0", "--warmup-ratio", "0"];
        bench.train("taught", &[&same[..], &["--distillation-weight", "0.25"]].concat()).success();
        let mut plain = tk();
        plain.args(["train", "--max-length", "48", "--task", task]).args(same);
        for (flag, name) in [("--model", "model"), ("--train", "train.jsonl"), ("--output", "plain")] {
            plain.arg(flag).arg(bench.path(name));
        }
        plain.assert().success();
        let (taught, plain) = (&bench.log("taught")[0], &bench.log("plain")[0]);
        assert!(number(taught, "teacher_loss").abs() < 1e-5, "{model}: {taught}");
        let wanted = 0.75 * number(plain, "loss");
        assert!((number(taught, "label_loss") - wanted).abs() < 1e-5 * wanted, "{model}: {taught}, {plain}");
        assert!((number(taught, "loss") - number(taught, "label_loss")).abs() < 1e-5, "{model}: {taught}");
        assert!(plain.get("label_loss").is_none());
        // of the second step it no longer is
        assert!(number(&bench.log("taught")[1], "teacher_loss") > 0.0, "{model}");
    }
}

#[test]
fn micro_batches_are_one_batch_with_weights_and_smoothing_in_the_labels_part() {
    for (task, student, teacher, more) in [
        (TEXT, "tiny-bert-single", "tiny-electra-single", ["--label-smoothing", "0.1"]),
        (TEXT, "tiny-bert-multi", "tiny-bert-multi", ["--focal-gamma", "1.5"]),
        (TOKENS, "tiny-bert-tokens", "tiny-roberta-tokens", ["--label-smoothing", "0.1"]),
    ] {
        let bench = bench(task, student, teacher);
        let same = ["--max-steps", "3", "--no-shuffle", "--dropout", "0", "--class-weights", "balanced"];
        let same = [&same[..], &more].concat();
        bench.train("whole", &[&same[..], &["--batch-size", "12"]].concat()).success();
        let parts = ["--batch-size", "4", "--gradient-accumulation", "3"];
        bench.train("parts", &[&same[..], &parts].concat()).success();
        for (a, b) in bench.log("whole").iter().zip(bench.log("parts")) {
            for key in ["loss", "grad_norm", "label_loss", "teacher_loss"] {
                let (a, b) = (number(a, key), number(&b, key));
                assert!((a - b).abs() <= 1e-4 * a.abs() + 1e-6, "{student}, {key}: {a} and {b}");
            }
        }
    }
}

#[test]
fn logits_are_asked_for_once_and_a_damaged_file_is_made_anew() {
    let bench = bench(TEXT, "tiny-bert-single", "tiny-roberta-single");
    let run = |output: &str, more: &[&str]| {
        stderr(&bench.train(output, &[&["-v", "--max-steps", "4"], more].concat()).success())
    };
    let (asked, read) = ("the teacher has read 52 examples", "the teacher's logits were in");
    let said = run("none", &["--no-cache"]);
    assert!(said.contains(asked) && bench.cached().is_empty(), "{said}");
    let said = run("first", &[]);
    assert!(said.contains(asked) && bench.cached().len() == 1, "{said}");
    let said = run("second", &[]);
    assert!(said.contains(read) && !said.contains(asked), "{said}");
    // a temperature is none of the teacher's, a length is
    assert!(run("warmer", &["--distillation-temperature", "4"]).contains(read));
    assert!(run("shorter", &["--max-length", "16"]).contains(asked) && bench.cached().len() == 2);
    let path = bench.cached();
    for path in &path {
        let mut bytes = std::fs::read(path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 4;
        std::fs::write(path, bytes).unwrap();
    }
    let said = run("damaged", &[]);
    assert!(said.contains("it is damaged: it is made anew") && said.contains(asked), "{said}");
    // another's whole file under its name
    let other =
        path.iter().find(|path| !said.contains(&*path.file_name().unwrap().to_string_lossy())).unwrap();
    let own = path.iter().find(|path| *path != other).unwrap();
    run("shorter", &["--max-length", "16", "--overwrite"]);
    std::fs::copy(other, own).unwrap();
    let said = run("foreign", &[]);
    assert!(said.contains("it holds something else") && said.contains(asked), "{said}");
    for output in ["first", "second", "damaged", "foreign"] {
        assert!(bench.weights(output) == bench.weights("none"), "{output}");
    }
    assert!(bench.weights("shorter") != bench.weights("none"));
}

/// A teacher whose labels stand in another order says the same of each.
#[test]
fn labels_are_matched_by_name() {
    let bench = bench(TEXT, "tiny-bert-single", "tiny-distilbert-single");
    bench.train("same", &["--max-steps", "3", "--distillation-weight", "1"]).success();
    let file = bench.path("teacher/model.safetensors");
    let weights = Weights::open_file(&file).unwrap();
    let turned: Vec<(String, Vec<usize>, Vec<f32>)> = weights
        .names()
        .map(|name| {
            let (shape, mut values) =
                (weights.shape(name).unwrap().to_vec(), weights.f32(name).unwrap().into_owned());
            if name.starts_with("classifier.") {
                let third = values.len() / 3;
                values.rotate_left(third);
            }
            (name.to_owned(), shape, values)
        })
        .collect();
    let views = turned.iter().map(|(name, shape, values)| (name.as_str(), &shape[..], &values[..]));
    write_safetensors(&bench.path("turned"), views).unwrap();
    drop(weights);
    std::fs::rename(bench.path("turned"), file).unwrap();
    let path = bench.path("teacher/config.json");
    let mut config = json(path.clone());
    config["id2label"] = json!({"0": "neutral", "1": "positive", "2": "negative"});
    config["label2id"] = json!({"neutral": 0, "positive": 1, "negative": 2});
    std::fs::write(&path, config.to_string()).unwrap();
    bench.train("turned-out", &["--max-steps", "3", "--distillation-weight", "1"]).success();
    for (a, b) in bench.log("same").iter().zip(bench.log("turned-out")) {
        assert!((number(a, "loss") - number(&b, "loss")).abs() < 1e-5, "{a} and {b}");
    }
    // by place it would be another teacher
    config["id2label"] = json!({"0": "negative", "1": "neutral", "2": "positive"});
    config["label2id"] = json!({"negative": 0, "neutral": 1, "positive": 2});
    std::fs::write(&path, config.to_string()).unwrap();
    bench.train("other", &["--max-steps", "3", "--distillation-weight", "1"]).success();
    assert!((number(&bench.log("same")[0], "loss") - number(&bench.log("other")[0], "loss")).abs() > 1e-3);
}

#[test]
fn an_adapter_teaches_as_the_model_that_it_makes() {
    let bench = Bench::new(TEXT, "tiny-distilbert-single");
    let adapter = models("lora-bert").display().to_string();
    let merged = bench.path("merged");
    tk().arg("export").arg(&adapter).arg("--merged").arg(&merged).assert().success();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(models("tiny-bert-single").join(name), merged.join(name)).unwrap();
    }
    for (output, teacher) in [("apart", &*adapter), ("whole", merged.to_str().unwrap())] {
        bench.train(output, &["--max-steps", "3", "--teacher", teacher]).success();
    }
    for (a, b) in bench.log("apart").iter().zip(bench.log("whole")) {
        assert!((number(a, "loss") - number(&b, "loss")).abs() < 1e-5, "{a} and {b}");
    }
}

#[test]
fn a_run_resumes_to_the_same_bits_and_to_no_other_teacher() {
    let bench = bench(TOKENS, "tiny-bert-tokens", "tiny-roberta-tokens");
    let said = bench.train("proof", &["--verify-resume", "4", "--ema", "0.9", "--json"]).success();
    assert_eq!(stdout(&said)["steps"], 4);
    let all = ["--max-steps", "4", "--freeze", "embeddings"];
    bench.train("whole", &all).success();
    bench.train("parts", &[&all[..], &["--stop-at", "2"]].concat()).success();
    let resume = |more: &[&str]| {
        let mut run = tk();
        run.env("TK_CACHE", bench.path("cache")).args(["train", "--resume", "--output"]);
        run.arg(bench.path("parts")).args(more).assert()
    };
    copy_dir(&models("tiny-electra-tokens"), &bench.path("other"));
    let said = stderr(&resume(&["--teacher", bench.path("other").to_str().unwrap()]).code(2));
    assert!(said.contains("these differ: teacher"), "{said}");
    let config = bench.path("teacher/config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let mut changed = json(config.clone());
    changed["hidden_act"] = "relu".into();
    std::fs::write(&config, changed.to_string()).unwrap();
    let said = stderr(&resume(&[]).code(2));
    assert!(said.contains("inputs have changed") && said.contains("(teacher)"), "{said}");
    std::fs::write(&config, text).unwrap();
    resume(&[]).success();
    assert!(bench.weights("parts") == bench.weights("whole"));
}

#[test]
fn what_a_teacher_can_not_read_is_told() {
    // BERT's tokenizer drops what is no letter at all
    let words = bench(TOKENS, "tiny-roberta-tokens", "tiny-bert-tokens");
    let line = json!({"tokens": ["good", "\u{1}", "film"], "tags": ["O", "O", "B-PER"]});
    let text = std::fs::read_to_string(words.path("train.jsonl")).unwrap();
    std::fs::write(words.path("train.jsonl"), format!("{text}{line}\n")).unwrap();
    let said = stderr(&words.train("out", &["--max-steps", "2"]).success());
    assert!(said.contains("the teacher has no token for 1 of "), "{said}");
    assert!(said.contains("they are learnt from their labels alone"), "{said}");
    let said = stderr(&words.train("all", &["--max-steps", "2", "--distillation-weight", "1"]).success());
    assert!(said.contains("nothing is learnt of them"), "{said}");

    let texts = bench(TEXT, "tiny-bert-single", "tiny-distilbert-single");
    let path = texts.path("teacher/tokenizer_config.json");
    let mut config = json(path.clone());
    config["model_max_length"] = 9.into();
    std::fs::write(&path, config.to_string()).unwrap();
    let said = stderr(&texts.train("out", &["--max-steps", "2"]).success());
    assert!(said.contains("52 examples are longer than the 9 tokens that the teacher reads"), "{said}");

    // GPT-2 has no token for an empty text
    let empty = bench(TEXT, "tiny-bert-single", "tiny-gpt2-single");
    let said = stderr(&empty.train("out", &["--max-steps", "2"]).code(2));
    assert!(said.contains("--teacher ") && said.contains("train.jsonl:2: the text is empty"), "{said}");

    let broken = bench(TEXT, "tiny-bert-single", "tiny-distilbert-single");
    let file = broken.path("teacher/model.safetensors");
    let weights = Weights::open_file(&file).unwrap();
    let tensors: Vec<(&str, &[usize], Vec<f32>)> = weights
        .names()
        .map(|name| {
            let values = weights.f32(name).unwrap().into_owned();
            let broken = if name == "classifier.bias" { vec![f32::NAN; values.len()] } else { values };
            (name, weights.shape(name).unwrap(), broken)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, values)| (*name, *shape, &values[..]));
    write_safetensors(&broken.path("broken"), views).unwrap();
    std::fs::rename(broken.path("broken"), &file).unwrap();
    let said = stderr(&broken.train("out", &["--max-steps", "2"]).code(2));
    assert!(said.contains("a logit of example 1 is NaN"), "{said}");
}

#[test]
fn a_dry_run_shows_the_teacher_and_writes_nothing() {
    let bench = bench(TEXT, "tiny-bert-single", "tiny-roberta-single");
    let dry = ["--dry-run", "--distillation-weight", "1"];
    let found = stdout(&bench.train("out", &[&dry[..], &["--json"]].concat()).success());
    let teacher = &found["teacher"];
    assert_eq!((&teacher["family"], &teacher["max_length"]), (&json!("roberta"), &json!(48)));
    assert_eq!((&teacher["temperature"], &teacher["weight"]), (&json!(2.0), &json!(1.0)));
    let told = bench.train("out", &dry).success();
    let told = String::from_utf8_lossy(&told.get_output().stdout).into_owned();
    assert!(told.contains("teacher     ") && told.contains("a roberta of "), "{told}");
    assert!(told.contains("evaluations and the teacher included"), "{told}");
    assert!(bench.cached().is_empty() && !bench.path("out").exists());
}

#[test]
fn what_teaches_nothing_is_refused_by_name_by_a_run_and_by_a_dry_run() {
    let refused = |task, student: &str, teacher: &str, more: &[&str], says: &[&str]| {
        let bench = bench(task, student, teacher);
        for more in [more.to_vec(), [more, &["--dry-run"]].concat()] {
            let said = stderr(&bench.train("out", &more).code(2));
            assert!(says.iter().all(|says| said.contains(says)), "{said}");
            assert!(!bench.path("out").exists() && bench.cached().is_empty());
        }
    };
    let other = bench(TEXT, "tiny-bert-single", "tiny-distilbert-single");
    let path = other.path("teacher/config.json");
    let mut config = json(path.clone());
    config["id2label"]["2"] = "good".into();
    std::fs::write(&path, config.to_string()).unwrap();
    let said = stderr(&other.train("out", &[]).code(2));
    let lists = ["--teacher", "the labels negative, neutral, good", "learnt are negative, neutral, positive"];
    assert!(lists.iter().all(|says| said.contains(says)), "{said}");

    let (single, tokens) = ("tiny-bert-single", "tiny-bert-tokens");
    refused(
        TEXT,
        single,
        tokens,
        &[],
        &["it is a token-classification model, and this is text-classification"],
    );
    refused(TEXT, single, "tiny-bert-multi", &[], &["its problem_type is multi_label_classification"]);
    refused(TEXT, single, "tiny-bert-masked", &[], &["it is a masked-lm model"]);
    refused(TEXT, single, single, &["--teacher", "nowhere"], &["--teacher nowhere", "no directory"]);
    let alone = |flag: &str, value: &str| {
        let bench = Bench::new(TEXT, single);
        let mut run = tk();
        run.args(["train", "--task", TEXT, flag, value]);
        for (flag, name) in [("--model", "model"), ("--train", "train.jsonl"), ("--output", "out")] {
            run.arg(flag).arg(bench.path(name));
        }
        let said = stderr(&run.assert().code(2));
        assert!(said.contains(flag) && said.contains("give --teacher"), "{said}");
    };
    alone("--distillation-temperature", "2");
    alone("--distillation-weight", "0.5");
    for (flag, value) in [
        ("--distillation-weight", "0"),
        ("--distillation-weight", "1.5"),
        ("--distillation-weight", "NaN"),
        ("--distillation-temperature", "0"),
        ("--distillation-temperature", "inf"),
    ] {
        refused(TEXT, single, single, &[flag, value], &[&format!("{flag} is {value}, expected")]);
    }
    for more in [["--class-weights", "balanced"], ["--label-smoothing", "0.1"], ["--focal-gamma", "2"]] {
        let all = [&more[..], &["--distillation-weight", "1"]].concat();
        refused(TEXT, single, single, &all, &[more[0], "which count nothing with --distillation-weight 1"]);
    }
    let says = ["--teacher is asked for all records before the first step, and --shuffle-buffer"];
    refused(TEXT, single, single, &["--shuffle-buffer", "16", "--max-steps", "2"], &says);
    let number = "tiny-bert-regression";
    let says = ["--distillation-temperature is for labels"];
    refused(TEXT, number, number, &["--distillation-temperature", "2"], &says);
    refused(TOKENS, tokens, tokens, &["--label-all-pieces"], &["--label-all-pieces and --teacher exclude"]);
    let says = ["--teacher is for text-classification and token-classification, and this is masked-lm"];
    refused("masked-lm", "tiny-bert-masked", single, &[], &says);
}

/// Every window of a long text learns what is said of all of it; and the teacher reads windows, too.
#[test]
fn windows_of_a_text_learn_what_is_said_of_all_of_it() {
    let bench = bench(TEXT, "tiny-bert-single", "tiny-distilbert-single");
    let text = std::fs::read_to_string(bench.path("train.jsonl")).unwrap();
    let lines = text.lines().take(13).filter(|line| !line.contains("text_pair"));
    std::fs::write(bench.path("train.jsonl"), lines.map(|line| format!("{line}\n")).collect::<String>())
        .unwrap();
    let windows = ["--window-aggregation", "mean", "--max-length", "12", "--max-steps", "2"];
    let said = stderr(&bench.train("out", &windows).success());
    let (_, read) = said.split_once("the teacher has read ").unwrap_or_else(|| panic!("{said}"));
    let read: usize = read.split_once(' ').unwrap().0.parse().unwrap();
    assert!(read > 13, "{said}");
}
