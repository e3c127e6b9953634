//! Truth from outside: logits, loss, every gradient and ten optimizer steps of `transformers` and PyTorch, stored by
//! `scripts/reference`, against the eager interpreter with both forms of its kernels.

mod common;

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use common::{
    ANSWERERS, CLASSIFIERS, EMBEDDER, FOLLOWER, LANGUAGE_MODEL, MASKERS, PRE_TRAINED, TAGGERS, floats,
    gradient, max_abs, models, relative,
};
use serde_json::{Value, json};
use tk::checkpoint::Weights;
use tk::data::batch::{Encoding, PackedBatch};
use tk::data::tokens::Tokenizer;
use tk::device::TrainingPrecision;
use tk::eager::{Eager, Forward, Init, Kernels, Mode, Params, X, tensors};

use tk::model::ModelConfig;
use tk::model::ops::At;
use tk::task::causal_lm::NextTokens;
use tk::task::embedding::Related;
use tk::task::masked_lm::Masked;
use tk::task::next_sentence::Follows;
use tk::task::pre_training::Pretrained;
use tk::task::question_answering::squad::{Judged, Match, Threshold, best_threshold};
use tk::task::text_classification::Window;
use tk::task::token_classification::Tags;
use tk::task::{CausalLm, Encoder, Example, RecordFlags, Target, Task};
use tk::train::plan::Plan;
use tk::train::{Settings, Trainer};

fn all() -> impl Iterator<Item = &'static str> {
    let others = [FOLLOWER, PRE_TRAINED, EMBEDDER, LANGUAGE_MODEL];
    CLASSIFIERS.into_iter().chain(TAGGERS).chain(ANSWERERS).chain(MASKERS).chain(others)
}

/// Whether a gradient is rounding alone, beside the largest: softmax cancels what a bias adds to every key, or to the score
/// of every token.
fn is_nothing(gradient: &[f32], largest: f64) -> bool {
    norm(gradient) <= 1e-12 * largest
}

/// The norm of the largest gradient.
fn largest(gradients: &safetensors::SafeTensors) -> f64 {
    gradients.names().iter().map(|name| norm(&floats(gradients, name))).fold(0.0, f64::max)
}

struct Reference {
    config: ModelConfig,
    task: Task,
    params: Params,
    examples: Vec<Example>,
    json: Value,
    name: &'static str,
}

impl Reference {
    fn forward(&self) -> Forward<'_> {
        let (Self { params, config, task, .. }, world) = (self, &tk::world::Alone);
        Forward { params, family: &config.family, task, device: &Device::Cpu, world, stopped: None }
    }

    fn load(name: &'static str) -> Self {
        let dir = models(name);
        let mut config = ModelConfig::read(&dir).unwrap();
        config.set_dropout(0.0).unwrap();
        let task = Task::open(&dir, &config).unwrap();
        let weights = Weights::open(&dir, config.family.names()).unwrap();
        let manifest = task.params(&config.family).unwrap();
        let (params, fit) =
            Params::load(&manifest, &weights, Init { seed: 0, std: 0.0 }, &Device::Cpu).unwrap();
        assert!(fit.new.is_empty() && fit.unused.is_empty(), "{name}: {fit:?}");
        let json = common::json(dir.join("reference.json"));
        let ids = |key: &str, i: usize| serde_json::from_value::<Vec<u32>>(json[key][i].clone()).unwrap();
        let texts =
            |key: &str, i: usize| serde_json::from_value::<Vec<Vec<u32>>>(json[key][i].clone()).unwrap();
        let examples = json["records"]
            .as_array()
            .unwrap()
            .iter()
            .enumerate()
            .map(|(i, record)| {
                if let Task::Embedding(_) = &task {
                    return related(texts("ids", i), texts("type_ids", i));
                }
                let encoding =
                    Encoding { ids: ids("ids", i), type_ids: ids("type_ids", i), truncated: false };
                let target = match &task {
                    Task::TextClassification(task) => {
                        Target::TextClassification(Window::whole(i, task.target(&record["label"]).unwrap()))
                    }
                    Task::CausalLm(_) => {
                        let predicted = (0..ids("ids", i).len()).map(|at| at > 0).collect();
                        Target::CausalLm(NextTokens { predicted, bytes: 0 })
                    }
                    Task::TokenClassification(_) => Target::TokenClassification(tags(&json["targets"][i])),
                    Task::MaskedLm(_) => Target::MaskedLm(masked(&json["targets"][i])),
                    Task::NextSentence(_) => {
                        Target::NextSentence(Follows { chunk: None, follows: follows(record) })
                    }
                    Task::PreTraining(_) => Target::PreTraining(Pretrained {
                        chunk: None,
                        follows: follows(record),
                        masked: masked(&json["targets"][i]),
                    }),
                    Task::Embedding(_) => unreachable!("more texts than one"),
                    Task::QuestionAnswering(_) => {
                        let found = answered(&task, name, record, 64, 0).remove(0);
                        assert_eq!(found.encoding.ids, ids("ids", i), "{name}, record {i}");
                        assert_eq!(wanted(&found), json["targets"][i], "{name}, record {i}");
                        found.target
                    }
                };
                Example { encoding, target }
            })
            .collect();
        Self { config, task, params, examples, json, name }
    }

    fn file(&self, name: &str) -> Vec<u8> {
        std::fs::read(models(self.name).join(name)).unwrap()
    }
}

/// transformers' ids of what is to be learnt: -100 is none.
fn ids(targets: &Value) -> Vec<Option<u32>> {
    let targets: Vec<i64> = serde_json::from_value(targets.clone()).unwrap();
    targets.into_iter().map(|id| u32::try_from(id).ok()).collect()
}

/// What is learnt of a sentence.
fn tags(targets: &Value) -> Tags {
    Tags { sentence: 0, gold: Arc::new([]), wanted: ids(targets), words: Vec::new(), taught: None }
}

/// What is to be found in a text.
fn masked(targets: &Value) -> Masked {
    Masked { words: Arc::new([]), wanted: ids(targets) }
}

/// A text, and those that stand beside it.
fn related(ids: Vec<Vec<u32>>, type_ids: Vec<Vec<u32>>) -> Example {
    let encoding = |(ids, type_ids)| Encoding { ids, type_ids, truncated: false };
    let mut texts = ids.into_iter().zip(type_ids).map(encoding);
    let first = texts.next().unwrap();
    Example { encoding: first, target: Target::Embedding(Related { others: texts.collect(), score: None }) }
}

fn follows(record: &Value) -> bool {
    record["follows"].as_bool().unwrap()
}

/// The windows of a question, with what they ought to give.
fn answered(task: &Task, name: &str, record: &Value, max_length: usize, stride: usize) -> Vec<Example> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("records.jsonl");
    std::fs::write(&file, format!("{record}\n")).unwrap();
    let mut records = RecordFlags::default();
    records.question_answering.questions.doc_stride = Some(stride);
    let tokenizer = Tokenizer::open(&models(name)).unwrap();
    let encoder =
        Encoder { records: &records, training: &Default::default(), tokenizer: &tokenizer, max_length };
    task.examples(&(&file).into(), &encoder).unwrap()
}

/// The tokens that an answer begins and ends with.
fn wanted(example: &Example) -> Value {
    let Target::QuestionAnswering(wanted) = &example.target else { panic!("another task") };
    json!([wanted.tokens.0, wanted.tokens.1])
}

fn numbers(value: &Value) -> Vec<f32> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn logits_are_those_of_transformers() {
    for name in CLASSIFIERS.into_iter().chain([FOLLOWER]) {
        let r = Reference::load(name);
        let encodings: Vec<Encoding> = r.examples.iter().map(|e| e.encoding.clone()).collect();
        for (i, outputs) in r.forward().outputs(&encodings).unwrap().iter().enumerate() {
            let row: Vec<f32> = outputs[0].iter().copied().collect();
            let (worst, _) = max_abs(&row, &numbers(&r.json["logits"][i]));
            assert!(worst <= 1e-5, "{name}, record {i}: {worst:e}");
        }
    }
}

#[test]
fn embeddings_are_those_of_transformers() {
    let r = Reference::load(EMBEDDER);
    let texts: Vec<Encoding> = r.examples.iter().flat_map(Example::encodings).cloned().collect();
    for (i, outputs) in r.forward().outputs(&texts).unwrap().iter().enumerate() {
        let row: Vec<f32> = outputs[1].iter().copied().collect();
        let (worst, _) = max_abs(&row, &numbers(&r.json["embeddings"][i]));
        assert!(worst <= 1e-6, "text {i}: {worst:e}");
    }
}

#[test]
fn loss_and_every_gradient_are_those_of_transformers() {
    for name in all() {
        for kernels in [Kernels::Fused, Kernels::Composite] {
            let r = Reference::load(name);
            let examples: Vec<&Example> = r.examples.iter().collect();
            let batch = Task::packed(&examples);
            let eager =
                Eager::new(&r.params, &batch, &Device::Cpu, Mode::Training { key: 0 }).with_kernels(kernels);
            let outputs = r.task.define(&eager, &r.config.family).unwrap();
            let loss = loss(&r, &eager, outputs, &examples, 0.0);
            let value = loss.to_scalar::<f32>().unwrap();
            let expected = r.json["loss"].as_f64().unwrap() as f32;
            assert!(
                (value - expected).abs() <= 1e-5 * expected.abs().max(1.0),
                "{name}: loss {value}, {expected}"
            );

            let store = loss.backward().unwrap();
            let bytes = r.file("gradients.safetensors");
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            assert_eq!(file.len(), r.params.len());
            let largest = largest(&file);
            for (param, _) in r.params.iter() {
                let gradient = gradient(&r.params, &param.name, &store, kernels);
                let expected = floats(&file, &param.name);
                if is_nothing(&expected, largest) {
                    assert!(norm(&gradient) <= 1e-5 * largest, "{name}: {}", param.name);
                } else {
                    let error = relative(&gradient, &expected);
                    assert!(error <= 1e-4, "{name}, {kernels:?}: {} {error:e}", param.name);
                }
            }
        }
    }
}

#[test]
fn what_is_frozen_has_no_gradient_and_the_others_have_those_of_transformers() {
    type Which = fn(usize, usize, &str) -> bool;
    let choices: [(&str, Which); 6] = [
        ("the lower half", |i, all, _| i < all / 2),
        ("the upper half", |i, all, _| i >= all / 2),
        ("every second", |i, _, _| i % 2 == 0),
        ("every other second", |i, _, _| i % 2 == 1),
        ("matrices and tables", |_, _, name| !name.ends_with("bias")),
        ("all but maps to values", |_, _, name| !name.contains("value") && !name.contains("c_attn")),
    ];
    for name in all() {
        for (what, is_frozen) in choices {
            for kernels in [Kernels::Fused, Kernels::Composite] {
                let mut r = Reference::load(name);
                let names: Vec<String> = r.params.iter().map(|(param, _)| param.name.clone()).collect();
                let place = |name: &str| names.iter().position(|own| own == name).unwrap();
                r.params.freeze(|param| is_frozen(place(&param.name), names.len(), &param.name));
                if r.params.trainable().next().is_none() {
                    continue; // this family has no parameter of that kind
                }
                let examples: Vec<&Example> = r.examples.iter().collect();
                let batch = Task::packed(&examples);
                let eager = Eager::new(&r.params, &batch, &Device::Cpu, Mode::Training { key: 0 })
                    .with_kernels(kernels);
                let outputs = r.task.define(&eager, &r.config.family).unwrap();
                let store = loss(&r, &eager, outputs, &examples, 0.0).backward().unwrap();
                let bytes = r.file("gradients.safetensors");
                let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
                let largest = largest(&file);
                for (i, (param, var)) in r.params.iter().enumerate() {
                    if r.params.is_frozen(&param.name) {
                        let slot = r.params.gradients()[i].lock().dense();
                        assert!(
                            slot.is_none() && store.get(var.as_tensor()).is_none(),
                            "{name}: {}",
                            param.name
                        );
                        continue;
                    }
                    let expected = floats(&file, &param.name);
                    if !is_nothing(&expected, largest) {
                        let error = relative(&gradient(&r.params, &param.name, &store, kernels), &expected);
                        assert!(
                            error <= 1e-4,
                            "{name}, {what} frozen, {kernels:?}: {} {error:e}",
                            param.name
                        );
                    }
                }
            }
        }
    }
}

/// The sum of the task's losses, each a mean.
fn loss(r: &Reference, eager: &Eager, outputs: Vec<X>, examples: &[&Example], smoothing: f64) -> Tensor {
    let weights: Vec<Vec<f64>> = examples.iter().map(|example| r.task.weights(&example.target)).collect();
    let weights: Vec<f64> =
        (0..r.task.loss_names().len()).map(|i| weights.iter().map(|own| own[i]).sum()).collect();
    let losses = r.task.loss(eager, outputs, examples, smoothing, &weights).unwrap();
    losses.into_iter().reduce(|a, b| (a + b).unwrap()).unwrap()
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt()
}

/// The scores of a batch's tokens, (T, C).
fn scores<'a>(r: &'a Reference, batch: &'a PackedBatch, kernels: Kernels) -> (Eager<'a>, Vec<X>) {
    let eager = Eager::new(&r.params, batch, &Device::Cpu, Mode::Evaluation).with_kernels(kernels);
    let scores = r.task.define(&eager, &r.config.family).unwrap();
    (eager, scores)
}

#[test]
fn a_row_of_scores_a_token_is_that_of_transformers() {
    let of_tokens = TAGGERS.into_iter().chain(ANSWERERS).map(|name| (name, 1e-5));
    for (name, allowed) in of_tokens.chain([(LANGUAGE_MODEL, 2e-5)]) {
        let r = Reference::load(name);
        let bytes = r.file("logits.safetensors");
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.len(), r.examples.len());
        for kernels in [Kernels::Fused, Kernels::Composite] {
            for i in 0..r.examples.len() {
                let batch = PackedBatch::new([&r.examples[i].encoding]);
                let (_, scores) = scores(&r, &batch, kernels);
                let scores = Tensor::cat(&tensors(scores).unwrap(), 1).unwrap();
                let found: Vec<f32> = scores.flatten_all().unwrap().to_vec1().unwrap();
                let (worst, at) = max_abs(&found, &floats(&file, &i.to_string()));
                assert!(worst <= allowed, "{name}, {kernels:?}, record {i}: {worst:e} at {at}");
            }
        }
    }
}

#[test]
fn scores_of_masked_places_are_those_of_transformers_asked_for_or_not() {
    for name in MASKERS.into_iter().chain([PRE_TRAINED]) {
        let r = Reference::load(name);
        let bytes = r.file("logits.safetensors");
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let examples: Vec<&Example> = r.examples.iter().collect();
        let (all, asked) =
            (PackedBatch::new(r.examples.iter().map(|e| &e.encoding)), Task::packed(&examples));
        for (batch, kernels) in [
            (&all, Kernels::Fused),
            (&all, Kernels::Composite),
            (&asked, Kernels::Fused),
            (&asked, Kernels::Composite),
        ] {
            let (_, scores) = scores(&r, batch, kernels);
            let scores = tensors(scores).unwrap();
            for (i, example) in r.examples.iter().enumerate() {
                let places = example.target.asked().unwrap();
                assert_eq!(places[0], ids(&r.json["targets"][i]).iter().position(Option::is_some).unwrap());
                let rows: Vec<u32> = match &batch.asked {
                    None => places.iter().map(|at| (batch.spans.get(i).start + at) as u32).collect(),
                    // behind that of the first token
                    Some(asked) => asked.spans.get(i).skip(1).map(|row| row as u32).collect(),
                };
                let rows = Tensor::from_slice(&rows, rows.len(), &Device::Cpu).unwrap();
                let found = scores[0].index_select(&rows, 0).unwrap();
                let (worst, at) =
                    max_abs(&found.flatten_all().unwrap().to_vec1().unwrap(), &floats(&file, &i.to_string()));
                assert!(worst <= 1e-5, "{name}, {kernels:?}, record {i}: {worst:e} at {at}");
            }
            if name == PRE_TRAINED {
                let found = scores[1].flatten_all().unwrap().to_vec1().unwrap();
                let (worst, at) = max_abs(&found, &floats(&file, "seq_relationship"));
                assert!(worst <= 1e-5, "{name}, {kernels:?}: {worst:e} at {at}");
            }
        }
    }
}

#[test]
fn both_losses_of_pre_training_are_those_of_transformers() {
    let r = Reference::load(PRE_TRAINED);
    let settings = Settings { dropout: Some(0.0), ..Settings::default() };
    let mut trainer =
        Trainer::new(&settings, &r.config.family, &r.task, &r.params, &Device::Cpu, 10).unwrap();
    let (first, rest) = r.examples.split_at(2);
    let did = trainer.step(&[first.iter().collect(), rest.iter().collect()]).unwrap();
    assert_eq!(r.task.loss_names(), ["masked_lm_loss", "next_sentence_loss"]);
    for (name, found) in r.task.loss_names().iter().zip(did.losses) {
        let expected = r.json[*name].as_f64().unwrap();
        assert!((found - expected).abs() <= 1e-5 * expected, "{name}: {found}, {expected}");
    }
}

#[test]
fn losses_of_texts_and_of_completions_are_those_of_transformers() {
    let r = Reference::load(LANGUAGE_MODEL);
    let expected = numbers(&r.json["losses"]);
    let loss = |i: usize, first: usize, kernels| -> f32 {
        let predicted = (0..r.examples[i].encoding.len()).map(|at| at >= first).collect();
        let target = NextTokens { predicted, bytes: 0 };
        let batch = PackedBatch::new([&r.examples[i].encoding]);
        let (eager, scores) = scores(&r, &batch, kernels);
        eager
            .losses(&scores[0], &CausalLm::targets(&[(&r.examples[i].encoding, &target)]))
            .unwrap()
            .iter()
            .sum()
    };
    for kernels in [Kernels::Fused, Kernels::Composite] {
        for (i, expected) in expected.iter().enumerate() {
            let found = loss(i, 1, kernels);
            assert!((found / expected - 1.0).abs() <= 1e-5, "{kernels:?}, record {i}: {found}, {expected}");
        }
        for completion in r.json["completions"].as_array().unwrap() {
            let number = |key: &str| completion[key].as_u64().unwrap() as usize;
            let found = loss(number("record"), number("prompt_tokens"), kernels);
            let expected = completion["loss"].as_f64().unwrap() as f32;
            assert!((found / expected - 1.0).abs() <= 1e-5, "{kernels:?}, {completion}: {found}");
        }
    }
}

#[test]
fn label_smoothing_is_pytorchs() {
    let r = Reference::load("tiny-bert-single");
    let batch = PackedBatch::new(r.examples.iter().map(|e| &e.encoding));
    let examples: Vec<&Example> = r.examples.iter().collect();
    let eager = Eager::new(&r.params, &batch, &Device::Cpu, Mode::Evaluation);
    let outputs = r.task.define(&eager, &r.config.family).unwrap();
    let loss = loss(&r, &eager, outputs, &examples, 0.1);
    let loss = loss.to_scalar::<f32>().unwrap();
    let expected = r.json["loss_smoothed"].as_f64().unwrap() as f32;
    assert!((loss - expected).abs() <= 1e-5, "{loss}, {expected}");
}

/// One more witness: candle-transformers' BERT, which can't be trained but computes the same.
#[test]
fn hidden_states_are_those_of_candle_transformers() {
    for name in all().filter(|name| name.starts_with("tiny-bert")) {
        let r = Reference::load(name);
        let text = std::fs::read_to_string(models(name).join("config.json")).unwrap();
        let text = text.replace("gelu_new", "geluapproximate"); // candle-transformers' own name for it
        let config: candle_transformers::models::bert::Config = serde_json::from_str(&text).unwrap();
        let bytes = r.file("model.safetensors");
        let vb = candle_nn::VarBuilder::from_buffered_safetensors(bytes, DType::F32, &Device::Cpu).unwrap();
        let of_bert = if name == EMBEDDER { vb } else { vb.pp("bert") };
        let theirs = candle_transformers::models::bert::BertModel::load(of_bert, &config).unwrap();
        for (i, example) in r.examples.iter().enumerate() {
            let row = |ids: &[u32]| Tensor::from_slice(ids, (1, ids.len()), &Device::Cpu).unwrap();
            let (ids, types) = (row(&example.encoding.ids), row(&example.encoding.type_ids));
            let hidden =
                theirs.forward(&ids, &types, None).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            let batch = PackedBatch::new([&example.encoding]);
            let eager = Eager::new(&r.params, &batch, &Device::Cpu, Mode::Evaluation).with_taps();
            r.task.define(&eager, &r.config.family).unwrap();
            let taps = eager.into_taps();
            let (_, last) = taps.iter().find(|(tap, _)| tap == "bert.encoder.layer.1").unwrap();
            // for one label a text, the last layer computes its first token alone
            let hidden = &hidden[..last.elem_count()];
            let (worst, _) = max_abs(&last.flatten_all().unwrap().to_vec1().unwrap(), hidden);
            assert!(worst <= 1e-5, "{name}, record {i}: {worst:e}");
        }
    }
}

/// The same for its other encoders, whose last hidden states are those of the body of a head for every token.
#[test]
fn hidden_states_of_other_families_are_those_of_candle_transformers() {
    use candle_transformers::models::{debertav2, distilbert, modernbert, xlm_roberta};
    let config = |name: &str| std::fs::read_to_string(models(name).join("config.json")).unwrap();
    let vb = |name: &str, prefix: &str| {
        let bytes = std::fs::read(models(name).join("model.safetensors")).unwrap();
        candle_nn::VarBuilder::from_buffered_safetensors(bytes, DType::F32, &Device::Cpu).unwrap().pp(prefix)
    };
    let compare = |name: &'static str, tap: &str, theirs: &dyn Fn(&Tensor) -> Tensor| {
        let mut r = Reference::load(name);
        if name.contains("distilbert") {
            r.config.set([("activation", "gelu_new".into())]).unwrap(); // what theirs computes for "gelu"
        }
        for (i, Example { encoding, .. }) in r.examples.iter().enumerate() {
            let ids = Tensor::from_slice(&encoding.ids, (1, encoding.len()), &Device::Cpu).unwrap();
            let hidden = theirs(&ids).flatten_all().unwrap().to_vec1().unwrap();
            let batch = PackedBatch::new([encoding]);
            let eager = Eager::new(&r.params, &batch, &Device::Cpu, Mode::Evaluation).with_taps();
            r.task.define(&eager, &r.config.family).unwrap();
            let taps = eager.into_taps();
            let (_, last) = taps.iter().find(|(name, _)| name == tap).unwrap();
            let (worst, _) = max_abs(&last.flatten_all().unwrap().to_vec1().unwrap(), &hidden);
            assert!(worst <= 1e-5, "{name}, record {i}: {worst:e}");
        }
    };

    let name = "tiny-distilbert-tokens";
    let their_config: distilbert::Config = serde_json::from_str(&config(name)).unwrap();
    let theirs = distilbert::DistilBertModel::load(vb(name, "distilbert"), &their_config).unwrap();
    compare(name, "distilbert.transformer.layer.1", &|ids| {
        let length = ids.dim(1).unwrap();
        let mask = Tensor::zeros((length, length), DType::U8, &Device::Cpu).unwrap();
        theirs.forward(ids, &mask).unwrap()
    });

    let name = "tiny-xlm-roberta-tokens";
    let their_config: xlm_roberta::Config = serde_json::from_str(&config(name)).unwrap();
    let theirs = xlm_roberta::XLMRobertaModel::new(&their_config, vb(name, "roberta")).unwrap();
    compare(name, "roberta.encoder.layer.1", &|ids| {
        let (mask, types) = (ids.ones_like().unwrap(), ids.zeros_like().unwrap());
        theirs.forward(ids, &mask, &types, None, None, None).unwrap()
    });

    let name = "tiny-modernbert-answers";
    let text = config(name).replace("\"norm_eps\"", "\"layer_norm_eps\"");
    let their_config: modernbert::Config = serde_json::from_str(&text).unwrap();
    let bytes = std::fs::read(models(name).join("model.safetensors")).unwrap();
    let whole = candle_nn::VarBuilder::from_buffered_safetensors(bytes, DType::F32, &Device::Cpu).unwrap();
    let theirs = modernbert::ModernBert::load(whole, &their_config).unwrap();
    compare(name, "model.final_norm", &|ids| theirs.forward(ids, &ids.ones_like().unwrap()).unwrap());

    for name in ["tiny-deberta-v2-answers", "tiny-deberta-v2-masked"] {
        let their_config: debertav2::Config = serde_json::from_str(&config(name)).unwrap();
        let theirs = debertav2::DebertaV2Model::load(vb(name, "deberta"), &their_config).unwrap();
        compare(name, "deberta.encoder.layer.1", &|ids| theirs.forward(ids, None, None).unwrap());
    }
}

#[test]
fn exact_match_and_f1_of_awkward_answers_are_those_of_squads_script() {
    let reference = common::json(models("squad.json"));
    let mut judged = [Vec::new(), Vec::new()];
    for question in reference["questions"].as_array().unwrap() {
        let answer = question["answer"].as_str().unwrap();
        let right: Vec<String> = serde_json::from_value(question["right"].clone()).unwrap();
        let found = Match::of(answer, &right);
        assert!((found.exact - question["exact"].as_f64().unwrap()).abs() < 1e-8, "{question}: {found:?}");
        assert!((found.f1 - question["f1"].as_f64().unwrap()).abs() < 1e-8, "{question}: {found:?}");
        for (judged, score) in judged.iter_mut().zip([found.exact, found.f1]) {
            let null = question["null"].as_f64().unwrap();
            let (answerable, answered) = (!right.is_empty(), !answer.is_empty());
            judged.push(Judged { null, answerable, answered, score });
        }
    }
    for (judged, key) in judged.iter().zip(["exact", "f1"]) {
        let Threshold { score, at, between } = best_threshold(judged);
        assert!(between > at, "{key}: {between}, {at}");
        let expected = numbers(&reference[key]);
        assert!((100.0 * score - f64::from(expected[0])).abs() < 1e-4, "{key}: {score}, {expected:?}");
        assert!((at - f64::from(expected[1])).abs() < 1e-6, "{key}: {at}, {expected:?}");
    }
}

/// A text that is longer than a window is cut as transformers' tokenizers cut the second of a pair.
#[test]
fn the_windows_of_a_long_text_and_the_places_of_its_answer_are_those_of_transformers() {
    for name in ANSWERERS {
        let Reference { task, json, .. } = Reference::load(name);
        let number = |key: &str| json["long"][key].as_u64().unwrap() as usize;
        let found = answered(&task, name, &json["long"]["record"], number("max_length"), number("stride"));
        let found: Vec<Value> = found
            .iter()
            .map(|example| json!({"ids": example.encoding.ids, "tokens": wanted(example)}))
            .collect();
        assert!(found.len() > 3, "{name}");
        assert_eq!(json!(found), json["long"]["windows"], "{name}");
    }
}

/// A word that is cut into pieces, all of them labelled, as transformers' `run_ner.py` does it.
#[test]
fn the_labels_of_all_pieces_and_their_loss_are_those_of_transformers() {
    for name in TAGGERS {
        let mut r = Reference::load(name);
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("records.jsonl");
        common::records_file(name, 1, &file);
        let mut records = RecordFlags::default();
        records.token_classification.label_all_pieces = true;
        let tokenizer = Tokenizer::open(&models(name)).unwrap().for_words().unwrap();
        let max_length = r.json["max_length"].as_u64().unwrap() as usize;
        let encoder =
            Encoder { records: &records, training: &Default::default(), tokenizer: &tokenizer, max_length };
        let ours = r.task.examples(&(&file).into(), &encoder).unwrap();
        let mut compared = 0;
        for (i, example) in r.examples.iter_mut().enumerate() {
            let all_pieces = tags(&r.json["targets_of_all_pieces"][i]);
            // transformers cuts what is longer, tk makes windows of it
            if example.encoding.len() < max_length {
                let same = ours.iter().find(|ours| ours.encoding.ids == example.encoding.ids);
                let same = same.unwrap_or_else(|| panic!("{name}, record {i}: other tokens"));
                let Target::TokenClassification(tags) = &same.target else { panic!("another task") };
                assert_eq!(tags.wanted, all_pieces.wanted, "{name}, record {i}");
                compared += 1;
            }
            example.target = Target::TokenClassification(all_pieces);
        }
        assert!(compared >= 5, "{name}: {compared}");

        let batch = PackedBatch::new(r.examples.iter().map(|e| &e.encoding));
        let examples: Vec<&Example> = r.examples.iter().collect();
        let eager = Eager::new(&r.params, &batch, &Device::Cpu, Mode::Evaluation);
        let outputs = r.task.define(&eager, &r.config.family).unwrap();
        let loss = loss(&r, &eager, outputs, &examples, 0.0);
        let (loss, expected) = (loss.to_scalar::<f32>().unwrap(), &r.json["loss_of_all_pieces"]);
        assert!((loss - expected.as_f64().unwrap() as f32).abs() <= 1e-5, "{name}: {loss}, {expected}");
    }
}

#[test]
fn a_parameter_that_no_gradient_reaches_ends_training_at_the_first_step() {
    let r = Reference::load("tiny-bert-single");
    let mut manifest = r.task.params(&r.config.family).unwrap();
    manifest.push(At::head("forgotten").linear(4, 4).weight);
    let weights = Weights::open(&models(r.name), r.config.family.names()).unwrap();
    let (params, _) = Params::load(&manifest, &weights, Init { seed: 1, std: 0.02 }, &Device::Cpu).unwrap();
    let before = params.values().unwrap();
    let settings = Settings::default();
    let mut trainer = Trainer::new(&settings, &r.config.family, &r.task, &params, &Device::Cpu, 10).unwrap();
    let error = trainer.step(&[vec![&r.examples[0], &r.examples[1]]]).unwrap_err().to_string();
    assert!(error.contains("no gradient reaches 1 of") && error.contains("forgotten.weight"), "{error}");
    assert_eq!(params.values().unwrap(), before);
}

/// So processes that share micro-batches out come to the gradient of one that takes them one by one.
#[test]
fn each_micro_batch_is_added_up_by_itself() {
    for name in CLASSIFIERS.into_iter().chain(ANSWERERS) {
        let r = Reference::load(name);
        // twice the same number of losses, so that a half's gradient is exactly twice its share of the whole
        let half = r.examples.len() / 2;
        let halves =
            [&r.examples[..half], &r.examples[half..2 * half]].map(|half| half.iter().collect::<Vec<_>>());
        let settings = Settings {
            learning_rate: 0.0,
            adam_beta1: 0.0, // the mean of the gradient is then the gradient itself
            max_grad_norm: 0.0,
            dropout: Some(0.0),
            ..Settings::default()
        };
        let gradients = |micro_batches: &[Vec<&Example>]| -> Vec<Vec<f32>> {
            let trainer = Trainer::new(&settings, &r.config.family, &r.task, &r.params, &Device::Cpu, 10);
            let mut trainer = trainer.unwrap();
            trainer.step(micro_batches).unwrap();
            trainer.optimizer.state().unwrap().into_iter().map(|(gradient, _)| gradient).collect()
        };
        let [first, second] = halves.clone().map(|half| gradients(&[half]));
        let whole = gradients(&halves);
        for (((param, _), whole), (first, second)) in
            r.params.iter().zip(&whole).zip(first.iter().zip(&second))
        {
            let sum: Vec<f32> = first.iter().zip(second).map(|(a, b)| 0.5 * a + 0.5 * b).collect();
            // what is used more than once a pass adds more than once: MPNet's table, and DeBERTa's maps, of positions, too
            let is_shared = param.name.contains("relative_attention_bias") || name.contains("deberta");
            assert!(*whole == sum || is_shared, "{name}: {}", param.name);
        }
    }
}

/// The padded formulation is transformers' batch of all records; here they stand back to back, cut by tokens.
#[test]
fn a_step_over_micro_batches_of_any_size_has_the_loss_and_gradients_of_the_padded_batch() {
    for name in all() {
        for kernels in [Kernels::Fused, Kernels::Composite] {
            for tokens in [1, 24, 40, 10_000] {
                if name == EMBEDDER && tokens < 10_000 {
                    continue; // what is learnt of a batch of texts is more than what is learnt of its parts
                }
                let r = Reference::load(name);
                // the mean of the gradient is then the gradient itself
                let settings = Settings {
                    batch_size: None,
                    batch_tokens: Some(tokens),
                    adam_beta1: 0.0,
                    max_grad_norm: 0.0,
                    dropout: Some(0.0),
                    gradient_accumulation: r.examples.len(),
                    ..Settings::default()
                };
                let lengths = r.examples.iter().map(|example| example.encoding.len()).collect();
                let mut plan = Plan::new(&settings, lengths);
                let micro_batches: Vec<Vec<&Example>> = plan
                    .step(0)
                    .unwrap()
                    .iter()
                    .map(|batch| batch.iter().map(|&i| &r.examples[i]).collect())
                    .collect();
                let sizes: Vec<usize> = micro_batches.iter().map(Vec::len).collect();
                let place = format!("{name}, {kernels:?}, micro-batches of {sizes:?}");
                let mut trainer =
                    Trainer::new(&settings, &r.config.family, &r.task, &r.params, &Device::Cpu, 10)
                        .and_then(|trainer| trainer.with_kernels(kernels))
                        .unwrap();
                let did = trainer.step(&micro_batches).unwrap();
                let expected = r.json["loss"].as_f64().unwrap();
                assert!(
                    (did.loss - expected).abs() <= 1e-5 * expected.max(1.0),
                    "{place}: {} {expected}",
                    did.loss
                );
                let bytes = r.file("gradients.safetensors");
                let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
                let largest = largest(&file);
                for ((param, _), (gradient, _)) in r.params.iter().zip(trainer.optimizer.state().unwrap()) {
                    let expected = floats(&file, &param.name);
                    if !is_nothing(&expected, largest) {
                        let error = relative(&gradient, &expected);
                        assert!(error <= 1e-4, "{place}: {} {error:e}", param.name);
                    }
                }
            }
        }
    }
}

/// The regime that the ten reference steps were taken with.
fn settings(steps: &Value) -> Settings {
    let number = |key: &str| steps[key].as_f64().unwrap_or_else(|| panic!("{key}"));
    Settings {
        learning_rate: number("learning_rate"),
        warmup_ratio: number("warmup_ratio"),
        weight_decay: number("weight_decay"),
        adam_epsilon: number("eps"),
        max_grad_norm: number("max_grad_norm"),
        dropout: Some(0.0),
        ..Settings::default()
    }
}

#[test]
fn ten_steps_are_those_of_pytorch_with_and_without_accumulation() {
    for name in all() {
        for (micro_batch, kernels) in [
            (4, Kernels::Fused),
            (1, Kernels::Fused),
            (3, Kernels::Fused),
            (4, Kernels::Composite),
            (3, Kernels::Composite),
        ] {
            let mut r = Reference::load(name);
            let mut size = micro_batch;
            if let Task::Embedding(task) = &mut r.task {
                // a batch of texts is one, whatever is held of it at a time
                (task.chunk, size) = (Some(micro_batch), 4);
            }
            let steps = &r.json["steps"];
            let settings = settings(steps);
            let (losses, rates) = (numbers(&steps["losses"]), numbers(&steps["learning_rates"]));
            let norms = numbers(&steps["gradient_norms"]);
            let mut trainer =
                Trainer::new(&settings, &r.config.family, &r.task, &r.params, &Device::Cpu, losses.len())
                    .and_then(|trainer| trainer.with_kernels(kernels))
                    .unwrap();
            for step in 0..losses.len() {
                let batch: Vec<&Example> =
                    (0..4).map(|j| &r.examples[(4 * step + j) % r.examples.len()]).collect();
                let micro_batches: Vec<Vec<&Example>> = batch.chunks(size).map(<[_]>::to_vec).collect();
                let did = trainer.step(&micro_batches).unwrap();
                let place = format!("{name}, {kernels:?}, micro-batches of {micro_batch}, step {step}");
                assert!(
                    (did.loss as f32 - losses[step]).abs() <= 1e-4,
                    "{place}: {} {}",
                    did.loss,
                    losses[step]
                );
                assert!((did.learning_rate as f32 - rates[step]).abs() <= 1e-9, "{place}");
                assert!(
                    (did.grad_norm as f32 / norms[step] - 1.0).abs() <= 1e-4,
                    "{place}: {}",
                    did.grad_norm
                );
            }
            let bytes = r.file("weights_after_steps.safetensors");
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            for weight in file.names() {
                let now: Vec<f32> = r.params.get(weight).unwrap().flatten_all().unwrap().to_vec1().unwrap();
                let (worst, _) = max_abs(&now, &floats(&file, weight));
                assert!(
                    worst <= 1e-5,
                    "{name}, {kernels:?}, micro-batches of {micro_batch}: {weight} {worst:e}"
                );
            }
        }
    }
}

/// In bf16 a product is off by up to 2⁻⁸ of its size, and what is a difference of such by more.
#[test]
fn ten_steps_in_bf16_stay_near_those_of_pytorch_in_fp32() {
    for name in all() {
        let r = Reference::load(name);
        let steps = &r.json["steps"];
        let settings = Settings { precision: TrainingPrecision::Bf16, ..settings(steps) };
        let (losses, norms) = (numbers(&steps["losses"]), numbers(&steps["gradient_norms"]));
        let mut trainer =
            Trainer::new(&settings, &r.config.family, &r.task, &r.params, &Device::Cpu, losses.len())
                .and_then(|trainer| trainer.with_kernels(Kernels::Fused))
                .unwrap();
        let mut worst = [0.0f32; 2];
        for step in 0..losses.len() {
            let batch: Vec<&Example> =
                (0..4).map(|j| &r.examples[(4 * step + j) % r.examples.len()]).collect();
            let did = trainer.step(&[batch]).unwrap();
            let off = (did.loss as f32 - losses[step]).abs() / losses[step].max(1.0);
            let off_norm = (did.grad_norm as f32 / norms[step] - 1.0).abs();
            worst = [worst[0].max(off), worst[1].max(off_norm)];
        }
        // the worst are ModernBERT's losses by 0.015 and ELECTRA's norms by 0.022
        assert!(worst[0] <= 0.03 && worst[1] <= 0.04, "{name}: {worst:?}");
        assert!(worst[0] > 1e-6, "{name}: nothing was computed in bf16");
    }
}
