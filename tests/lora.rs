//! Low-rank adapters: what PEFT has trained and computed (`scripts/reference-lora`) against tk, apart from the base and
//! merged into it; and `tk train --lora-rank` by the real binary.

mod common;

use std::path::{Path, PathBuf};

use candle_core::Device;
use common::{floats, gradient, json, max_abs, models, records_file, relative, tk};
use serde_json::Value;
use tk::checkpoint::Weights;
use tk::checkpoint::adapter::{self, Adapter};
use tk::data::batch::Encoding;
use tk::eager::{Eager, Evaluator, Forward, Init, Kernels, Mode, Params};
use tk::model::ModelConfig;
use tk::model::ops::Part;
use tk::parity::TOLERANCE;
use tk::saved::Saved;
use tk::task::text_classification::Window;
use tk::task::token_classification::Tags;
use tk::task::{Encoder, Example, RecordFlags, Target, Task, TrainingFlags};
use tk::train::{Settings, Trainer};

/// The adapters that PEFT has made.
const ADAPTERS: [&str; 5] =
    ["lora-bert", "lora-gpt2", "lora-roberta-tokens", "lora-deberta-answers", "lora-modernbert"];

/// Softmax cancels what it adds to the score of every token: its gradient is rounding alone.
const NOTHING: &str = "qa_outputs.bias";

struct Reference {
    config: ModelConfig,
    task: Task,
    params: Params,
    examples: Vec<Example>,
    numbers: Value,
    dir: PathBuf,
}

impl Reference {
    fn load(name: &str) -> Self {
        let dir = models(name);
        let numbers = json(dir.join("reference.json"));
        let base = models(numbers["base"].as_str().unwrap());
        let mut config = ModelConfig::read(&base).unwrap();
        config.set_dropout(0.0).unwrap();
        let task = Task::open(&base, &config).unwrap();
        let adapter = Adapter::open(&dir, config.family.names()).unwrap();
        config.family = config.family.adapted(Some(adapter.lora().unwrap()));
        let weights = adapter.apart(config.family.names()).unwrap();
        let manifest = task.params(&config.family).unwrap();
        let (mut params, fit) =
            Params::load(&manifest, &weights, Init { seed: 0, std: 0.0 }, &Device::Cpu).unwrap();
        assert!(fit.new.is_empty() && fit.unused.is_empty(), "{name}: {fit:?}");
        let head: Vec<&str> = adapter.head().collect();
        params.freeze(|param| param.part != Part::Adapter && !head.contains(&param.name.as_str()));
        let examples = examples(&base, &task);
        Self { config, task, params, examples, numbers, dir }
    }

    fn file(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.dir.join(name)).unwrap()
    }
}

/// The records of a base, as its own reference has them.
fn examples(base: &Path, task: &Task) -> Vec<Example> {
    let reference = json(base.join("reference.json"));
    if let Task::QuestionAnswering(_) = task {
        let file = tempfile::NamedTempFile::with_suffix(".jsonl").unwrap();
        records_file(base.file_name().unwrap().to_str().unwrap(), 1, file.path());
        let (records, training) = (RecordFlags::default(), TrainingFlags::default());
        let tokenizer = tk::data::tokens::Tokenizer::open(base).unwrap();
        let encoder =
            Encoder { records: &records, training: &training, tokenizer: &tokenizer, max_length: 64 };
        return task.examples(&(&file.path().to_path_buf()).into(), &encoder).unwrap();
    }
    let of = |key: &str, i: usize| serde_json::from_value::<Vec<u32>>(reference[key][i].clone()).unwrap();
    let example = |(i, record): (usize, &Value)| {
        let encoding = Encoding { ids: of("ids", i), type_ids: of("type_ids", i), truncated: false };
        let target = match task {
            Task::TextClassification(task) => {
                Target::TextClassification(Window::whole(i, task.target(&record["label"]).unwrap()))
            }
            _ => {
                let wanted: Vec<i64> = serde_json::from_value(reference["targets"][i].clone()).unwrap();
                let wanted = wanted.into_iter().map(|id| u32::try_from(id).ok()).collect();
                Target::TokenClassification(Tags {
                    sentence: 0,
                    gold: [].into(),
                    wanted,
                    words: Vec::new(),
                    taught: None,
                })
            }
        };
        Example { encoding, target }
    };
    reference["records"].as_array().unwrap().iter().enumerate().map(example).collect()
}

#[test]
fn outputs_of_an_adapter_are_those_of_peft_apart_and_merged() {
    for name in ADAPTERS {
        let r = Reference::load(name);
        let Reference { config, task, params, .. } = &r;
        let encodings: Vec<Encoding> = r.examples.iter().map(|example| example.encoding.clone()).collect();
        let forward = |family, params| {
            Forward { params, family, task, device: &Device::Cpu, world: &tk::world::Alone, stopped: None }
                .outputs(&encodings)
                .unwrap()
                .concat()
        };
        let apart = forward(&config.family, params);
        let plain = config.family.clone().adapted(None);
        let weights = Weights::open(&r.dir, plain.names()).unwrap();
        let manifest = task.params(&plain).unwrap();
        let (merged, fit) =
            Params::load(&manifest, &weights, Init { seed: 0, std: 0.0 }, &Device::Cpu).unwrap();
        assert!(fit.new.is_empty() && fit.unused.is_empty(), "{name}: {fit:?}");
        let merged = forward(&plain, &merged);
        for (i, (a, b)) in apart.iter().zip(&merged).enumerate() {
            let (a, b): (Vec<f32>, Vec<f32>) = (a.iter().copied().collect(), b.iter().copied().collect());
            let largest = a.iter().fold(1.0, |largest: f32, x| largest.max(x.abs()));
            let worst = max_abs(&a, &b).0;
            assert!(
                worst <= TOLERANCE * largest,
                "{name}, record {i}: {worst:e}, of numbers up to {largest}"
            );
            if let Some(logits) = r.numbers.get("logits") {
                let wanted: Vec<f32> = serde_json::from_value(logits[i].clone()).unwrap();
                let worst = max_abs(&a, &wanted).0.max(max_abs(&b, &wanted).0);
                assert!(worst <= 1e-5, "{name}, record {i}: {worst:e}");
            }
        }
        // and the adapter does something
        let base = models(r.numbers["base"].as_str().unwrap());
        let base = Weights::open(&base, plain.names()).unwrap();
        let (base, _) = Params::load(&manifest, &base, Init { seed: 0, std: 0.0 }, &Device::Cpu).unwrap();
        let base = forward(&plain, &base);
        assert!(apart.iter().zip(&base).any(|(a, b)| (a - b).iter().any(|x| x.abs() > 0.1)), "{name}");
    }
}

#[test]
fn loss_and_gradients_of_an_adapter_are_those_of_peft_and_the_base_has_none() {
    for name in ADAPTERS {
        for kernels in [Kernels::Fused, Kernels::Composite] {
            let r = Reference::load(name);
            let examples: Vec<&Example> = r.examples.iter().collect();
            let batch = Task::packed(&examples);
            let eager =
                Eager::new(&r.params, &batch, &Device::Cpu, Mode::Training { key: 0 }).with_kernels(kernels);
            let outputs = r.task.define(&eager, &r.config.family).unwrap();
            let count = examples.iter().map(|example| example.target.losses()[0] as f64).sum();
            let loss = r.task.loss(&eager, outputs, &examples, 0.0, &[count]).unwrap().remove(0);
            let (value, wanted) =
                (loss.to_scalar::<f32>().unwrap(), r.numbers["loss"].as_f64().unwrap() as f32);
            assert!((value - wanted).abs() <= 1e-5 * wanted.abs().max(1.0), "{name}: {value} {wanted}");
            let store = loss.backward().unwrap();
            let bytes = r.file("gradients.safetensors");
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            assert_eq!(file.len(), r.params.trainable().count(), "{name}");
            for own in r.params.trainable().filter(|own| own.param.name != NOTHING) {
                let name_of = &own.param.name;
                let error = relative(&gradient(&r.params, name_of, &store, kernels), &floats(&file, name_of));
                assert!(error <= 2e-4, "{name}, {kernels:?}: {name_of} {error:e}");
            }
            for (i, (param, var)) in r.params.iter().enumerate() {
                let slot = r.params.gradients()[i].lock().dense();
                let found = slot.is_some() || store.get(var.as_tensor()).is_some();
                assert!(!(r.params.is_frozen(&param.name) && found), "{name}: {}", param.name);
            }
        }
    }
}

#[test]
fn ten_steps_of_an_adapter_are_those_of_peft() {
    for name in ADAPTERS {
        for micro_batch in [4, 3] {
            let r = Reference::load(name);
            let steps = &r.numbers["steps"];
            let number = |key: &str| steps[key].as_f64().unwrap();
            let settings = Settings {
                learning_rate: number("learning_rate"),
                warmup_ratio: number("warmup_ratio"),
                weight_decay: number("weight_decay"),
                adam_epsilon: number("eps"),
                max_grad_norm: number("max_grad_norm"),
                ..Settings::default()
            };
            let losses: Vec<f64> = serde_json::from_value(steps["losses"].clone()).unwrap();
            let mut trainer =
                Trainer::new(&settings, &r.config.family, &r.task, &r.params, &Device::Cpu, losses.len())
                    .unwrap();
            for (step, wanted) in losses.iter().enumerate() {
                let batch: Vec<&Example> =
                    (0..4).map(|j| &r.examples[(4 * step + j) % r.examples.len()]).collect();
                let parts: Vec<Vec<&Example>> = batch.chunks(micro_batch).map(<[_]>::to_vec).collect();
                let did = trainer.step(&parts).unwrap();
                assert!((did.loss - wanted).abs() <= 1e-4, "{name}, step {step}: {} {wanted}", did.loss);
            }
            let bytes = r.file("weights_after_steps.safetensors");
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            for own in r.params.trainable().filter(|own| own.param.name != NOTHING) {
                let now: Vec<f32> = own.var.flatten_all().unwrap().to_vec1().unwrap();
                let (worst, _) = max_abs(&now, &floats(&file, &own.param.name));
                assert!(worst <= 2e-5, "{name}: {} {worst:e}", own.param.name);
            }
        }
    }
}

/// The real binary trains one, PEFT's files and all, and every command takes the folder for the merged model.
#[test]
fn a_trained_adapter_is_evaluated_exported_and_served_as_the_model_that_it_makes() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    records_file("tiny-bert-single", 4, &path("train.jsonl"));
    common::copy_dir(&models("tiny-bert-single"), &path("base"));
    let train = |output: &str, more: &[&str]| {
        let mut run = tk();
        run.args(["train", "--task", "text-classification", "--max-length", "48", "--batch-size", "8"]);
        run.args(["--learning-rate", "5e-3", "--epochs", "8", "--lora-rank", "4"]);
        run.arg("--model").arg(path("base")).arg("--train").arg(path("train.jsonl"));
        run.arg("--eval").arg(path("train.jsonl")).arg("--output").arg(path(output)).args(more).assert()
    };
    let done = train("out", &["--json"]).success();
    let trained: Value = serde_json::from_slice(&done.get_output().stdout).unwrap();
    assert!(!path("out/model.safetensors").exists());
    let config = json(path("out/adapter_config.json"));
    assert_eq!(config["target_modules"], serde_json::json!(["query", "value"]));
    assert_eq!(config["modules_to_save"], serde_json::json!(["classifier", "score"]));
    assert_eq!((&config["r"], &config["lora_alpha"]), (&serde_json::json!(4), &serde_json::json!(8.0)));
    let weights = Weights::open_file(&path("out/adapter_model.safetensors")).unwrap();
    assert!(weights.names().all(|name| name.starts_with("base_model.model.")));
    assert_eq!(weights.shape("base_model.model.classifier.weight").unwrap()[0], 3);

    let eval = |more: &[&str]| -> Value {
        let mut run = tk();
        run.arg("eval").arg(path("out")).arg("--input").arg(path("train.jsonl"));
        let done = run.args(["--max-length", "48", "--json"]).args(more).assert().success();
        serde_json::from_slice::<Value>(&done.get_output().stdout).unwrap()["metrics"].take()
    };
    let same =
        |a: &Value, b: &Value| (a["loss"].as_f64().unwrap() - b["loss"].as_f64().unwrap()).abs() < 1e-5;
    assert!(same(&eval(&[]), &trained["eval"]) && trained["eval"]["accuracy"].as_f64().unwrap() > 0.6);
    tk().arg("export").arg(path("out")).assert().success();
    assert!(same(&eval(&["--runtime", "onnx"]), &trained["eval"]));
    let manifest = json(path("out/onnx/manifest.json"));
    assert!(manifest["lora_max_abs"].as_f64().unwrap() < 1e-4, "{manifest}");

    // merged for those who know no adapters
    tk().arg("export").arg(path("out")).arg("--merged").arg(path("merged")).assert().success();
    let merged = Saved::open(&path("merged")).unwrap();
    let saved = Saved::open(&path("out")).unwrap();
    for own in saved.task.params(&saved.config.family).unwrap() {
        assert_eq!(merged.weights.f32(&own.name).unwrap(), saved.weights.f32(&own.name).unwrap());
    }
    assert!(Evaluator::open(&merged, &Device::Cpu).is_ok());
    // what a folder of PEFT's own lacks is its base's
    tk().arg("export").arg(models("lora-bert")).arg("--merged").arg(path("of-peft")).assert().success();
    let of_peft = Saved::open(&path("of-peft")).unwrap();
    assert_eq!(of_peft.tokenizer.hash(), Saved::open(&models("lora-bert")).unwrap().tokenizer.hash());
    let said = tk().arg("export").arg(path("merged")).arg("--merged").arg(path("again")).assert().code(2);
    assert!(String::from_utf8_lossy(&said.get_output().stderr).contains("no adapter"));

    // the base is another one now
    let mut run = tk();
    run.args(["train", "--task", "text-classification", "--max-length", "48", "--max-steps", "2"]);
    run.arg("--model").arg(path("base")).arg("--train").arg(path("train.jsonl"));
    run.arg("--output").arg(path("other")).assert().success();
    std::fs::copy(path("other/model.safetensors"), path("base/model.safetensors")).unwrap();
    let said = tk().arg("eval").arg(path("out")).arg("--input").arg(path("train.jsonl")).assert().code(2);
    assert!(String::from_utf8_lossy(&said.get_output().stderr).contains("other weights"));
    std::fs::remove_dir_all(path("base")).unwrap();
    let said = tk().arg("eval").arg(path("out")).arg("--input").arg(path("train.jsonl")).assert().code(2);
    assert!(String::from_utf8_lossy(&said.get_output().stderr).contains("base_model_name_or_path"));
}

/// PEFT's own folders have no `config.json` and no tokenizer: these are the base's.
#[test]
fn a_folder_of_pefts_is_opened_as_it_is() {
    for name in ADAPTERS {
        let (r, saved) = (Reference::load(name), Saved::open(&models(name)).unwrap());
        assert_eq!((saved.task.name(), saved.task.head()), (r.task.name(), r.task.head()), "{name}");
        let encodings: Vec<Encoding> = r.examples.iter().map(|example| example.encoding.clone()).collect();
        let outputs = Evaluator::open(&saved, &Device::Cpu).unwrap().outputs(&encodings).unwrap();
        for (i, logits) in r.numbers["logits"].as_array().into_iter().flatten().enumerate() {
            let wanted: Vec<f32> = serde_json::from_value(logits.clone()).unwrap();
            let found: Vec<f32> = outputs[i][0].iter().copied().collect();
            assert!(max_abs(&found, &wanted).0 <= 1e-5, "{name}, record {i}");
        }
    }
    // a head of other labels than the base's
    let dir = tempfile::tempdir().unwrap();
    let mut config = json(models("lora-bert").join("adapter_config.json"));
    config["base_model_name_or_path"] = models("tiny-bert-single").display().to_string().into();
    std::fs::write(dir.path().join("adapter_config.json"), config.to_string()).unwrap();
    let weights = Weights::open_file(&models("lora-bert").join(adapter::WEIGHTS)).unwrap();
    let more = |name: &str, shape: &[usize]| match name.contains("classifier") {
        true => (name.to_owned(), [&[5], &shape[1..]].concat(), 5 * shape[1..].iter().product::<usize>()),
        false => (name.to_owned(), shape.to_vec(), shape.iter().product()),
    };
    let tensors: Vec<(String, Vec<usize>, Vec<f32>)> = weights
        .names()
        .map(|name| more(name, weights.shape(name).unwrap()))
        .map(|(name, shape, count)| (name, shape, vec![0.5; count]))
        .collect();
    let views = tensors.iter().map(|(name, shape, values)| (name.as_str(), &shape[..], &values[..]));
    tk::checkpoint::write_safetensors(&dir.path().join(adapter::WEIGHTS), views).unwrap();
    let saved = Saved::open(dir.path()).unwrap();
    let Task::TextClassification(task) = &saved.task else { panic!("another task") };
    assert_eq!(task.labels, ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3", "LABEL_4"]);
}

#[test]
fn what_of_an_adapter_is_not_computed_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let with = |change: &dyn Fn(&mut Value)| {
        let mut config = json(models("lora-bert").join("adapter_config.json"));
        config["base_model_name_or_path"] = models("tiny-bert-single").display().to_string().into();
        change(&mut config);
        std::fs::write(dir.path().join("adapter_config.json"), config.to_string()).unwrap();
        std::fs::copy(
            models("lora-bert").join("adapter_model.safetensors"),
            dir.path().join(adapter::WEIGHTS),
        )
        .unwrap();
        let names = ModelConfig::read(&models("tiny-bert-single")).unwrap().family.names();
        Adapter::open(dir.path(), names).and_then(|adapter| adapter.merged(names)).map(drop)
    };
    with(&|_| {}).unwrap();
    for (key, value) in [
        ("use_dora", serde_json::json!(true)),
        ("bias", serde_json::json!("all")),
        ("init_lora_weights", serde_json::json!("pissa")),
        ("some_new_way", serde_json::json!({"on": true})),
        ("layer_replication", serde_json::json!([[0, 1]])),
        ("peft_type", serde_json::json!("IA3")),
        ("lora_alpha", serde_json::json!("much")),
        ("base_model_name_or_path", serde_json::json!(null)),
        ("base_model_name_or_path", serde_json::json!("/nowhere/at/all")),
        ("alpha_pattern", serde_json::json!({"(": 1.0})),
        ("fan_in_fan_out", serde_json::json!("yes")),
    ] {
        let error = with(&|config| config[key] = value.clone()).expect_err(key);
        assert_eq!(tk::error::exit_code(&error), 2, "{key}");
        let said = format!("{error:#}");
        assert!(said.contains(key) || key == "lora_alpha" || key == "fan_in_fan_out", "{said}");
    }
    // another model's
    let said = with(&|config| {
        config["base_model_name_or_path"] = models("tiny-gpt2-single").display().to_string().into()
    });
    assert!(said.unwrap_err().to_string().contains("adapts a matrix of the shape"));
}

/// Every family and head has maps to adapt, and a step moves what stands beside them and nothing else of the body.
#[test]
fn every_family_can_be_adapted() {
    use std::collections::BTreeSet;
    for name in common::predictors().chain(common::ANSWERERS).chain([common::LANGUAGE_MODEL]) {
        let config = ModelConfig::read(&models(name)).unwrap();
        let task = Task::open(&models(name), &config).unwrap();
        for targets in [vec![], vec!["all-linear".to_owned()]] {
            let flags = tk::train::lora::LoraFlags {
                lora_rank: Some(2),
                lora_targets: targets,
                ..Default::default()
            };
            let lora = flags.chosen(&config.family, task.head()).unwrap().unwrap();
            let plain = task.params(&config.family).unwrap();
            let adapted = task.params(&config.family.clone().adapted(Some(lora.clone()))).unwrap();
            assert_eq!(adapted.len(), plain.len() + 2 * lora.maps.len(), "{name}");
            let names: BTreeSet<&str> = adapted.iter().map(|param| param.name.as_str()).collect();
            assert!(plain.iter().all(|param| names.contains(param.name.as_str())), "{name}");
        }
    }
}
