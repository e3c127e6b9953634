//! The emitted graphs: as text, as bytes, and as ONNX Runtime computes them, against transformers' numbers.

mod common;

use std::path::Path;

use common::{
    CLASSIFIERS, EMBEDDER, FOLLOWER, LANGUAGE_MODEL, MASKERS, PRE_TRAINED, TAGGERS, floats, json, models,
    predictors,
};
use prost::Message;
use serde_json::Value;
use tk::checkpoint::Weights;
use tk::data::batch::{Encoding, PaddedBatch};
use tk::model::ModelConfig;
use tk::onnx::{GraphKind, OPSETS, Precision, dump, model, proto::ModelProto, write};
use tk::runtime::{Model, OrtSession, Provider, Providers, Threads};
use tk::say::Say;
use tk::task::Task;

fn exported(name: &str, opset: i64) -> ModelProto {
    built(name, |task| GraphKind::fp32(task.form(), opset))
}

fn built(name: &str, kind: impl Fn(&Task) -> GraphKind) -> ModelProto {
    let dir = models(name);
    let config = ModelConfig::read(&dir).unwrap();
    let task = Task::open(&dir, &config).unwrap();
    model::build(&config, &task, &weights(&dir), "tokenizer", kind(&task)).unwrap()
}

fn weights(dir: &Path) -> Weights {
    Weights::open(dir, ModelConfig::read(dir).unwrap().family.names()).unwrap()
}

fn open(model: Model) -> OrtSession {
    OrtSession::open(model, &Providers::only(Provider::Cpu), Threads::Together(1), Say::default()).unwrap()
}

fn session(model: &ModelProto) -> OrtSession {
    open(Model::Bytes(&model.encode_to_vec()))
}

fn logits(session: &OrtSession, batch: &PaddedBatch) -> Vec<Vec<f32>> {
    let outputs = session.run(batch).unwrap();
    assert_eq!(outputs[0].array.shape()[0], batch.rows);
    outputs[0].array.outer_iter().map(|row| row.iter().copied().collect()).collect()
}

/// What transformers tokenized, and the logits it gave: a row a record, or all rows of its tokens.
fn reference(name: &str) -> (Vec<Encoding>, Vec<Vec<f32>>) {
    let reference = json(models(name).join("reference.json"));
    let list = |key: &str| -> Vec<Vec<u32>> { serde_json::from_value(reference[key].clone()).unwrap() };
    let encodings = list("ids")
        .into_iter()
        .zip(list("type_ids"))
        .map(|(ids, type_ids)| Encoding { ids, type_ids, truncated: false })
        .collect::<Vec<_>>();
    let Value::Null = reference["logits"] else {
        return (encodings, serde_json::from_value(reference["logits"].clone()).unwrap());
    };
    let bytes = std::fs::read(models(name).join("logits.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let logits = (0..encodings.len()).map(|i| floats(&file, &i.to_string())).collect();
    (encodings, logits)
}

fn distance(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    assert_eq!(a.len(), b.len());
    let pairs = a.iter().flatten().zip(b.iter().flatten());
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, |max, d| if d > max || d.is_nan() { d } else { max })
}

#[test]
fn graphs_stay_as_they_are() {
    let both = CLASSIFIERS.into_iter().chain([LANGUAGE_MODEL]).flat_map(|name| [(name, 14), (name, 18)]);
    for (name, opset) in both.chain(
        TAGGERS.into_iter().chain(MASKERS).chain([FOLLOWER, PRE_TRAINED, EMBEDDER]).map(|name| (name, 18)),
    ) {
        insta::assert_snapshot!(format!("{name}-{opset}"), dump::dump(&exported(name, opset)));
    }
    // attention as one operator: plain, with a bias, turned and near, causal
    for name in ["tiny-bert-single", "tiny-mpnet-single", "tiny-modernbert-single", "tiny-gpt2-single"] {
        insta::assert_snapshot!(format!("{name}-23"), dump::dump(&exported(name, 23)));
    }
    for precision in [Precision::Fp32, Precision::Q4] {
        let graph = built(LANGUAGE_MODEL, |_| GraphKind::in_place(precision));
        insta::assert_snapshot!(format!("tiny-gpt2-lm-in-place-{precision}"), dump::dump(&graph));
    }
}

#[test]
fn the_same_weights_give_the_same_bytes() {
    assert_eq!(
        exported("tiny-bert-single", 18).encode_to_vec(),
        exported("tiny-bert-single", 18).encode_to_vec()
    );
}

#[test]
fn initializers_are_the_checkpoints_numbers_and_matrices_stand_as_matmul_takes_them() {
    for name in predictors().chain([LANGUAGE_MODEL]) {
        let weights = weights(&models(name));
        let model = exported(name, 18);
        let initializers = &model.graph.as_ref().unwrap().initializer;
        for weight in weights.names() {
            let (shape, values) = (weights.shape(weight).unwrap(), weights.f32(weight).unwrap());
            let found = initializers.iter().find_map(|t| Some((t, t.name.strip_prefix(weight)?)));
            let (tensor, behind) = found.filter(|(_, behind)| ["", ".T"].contains(behind)).unwrap();
            let dims: Vec<usize> = tensor.dims.iter().map(|&n| n as usize).collect();
            if behind.is_empty() {
                assert_eq!(shape, dims);
                assert_eq!(tk::checkpoint::f32_bytes(&values).as_ref(), tensor.raw_data);
                continue;
            }
            let [rows, columns] = *shape else { panic!("{weight} is no matrix") };
            assert_eq!([columns, rows], dims[..]);
            let columns = |column| (0..rows).map(move |row| row * columns + column);
            let wanted: Vec<f32> = (0..dims[0]).flat_map(columns).map(|at| values[at]).collect();
            assert_eq!(tk::checkpoint::f32_bytes(&wanted).as_ref(), tensor.raw_data);
        }
    }
}

#[test]
fn every_opset_gives_transformers_logits() {
    for name in CLASSIFIERS.into_iter().chain(TAGGERS).chain([FOLLOWER]) {
        let (encodings, wanted) = reference(name);
        let batch = PaddedBatch::new(&encodings.iter().collect::<Vec<_>>(), 0);
        for opset in OPSETS {
            let mut found = logits(&session(&exported(name, opset)), &batch);
            for (found, wanted) in found.iter_mut().zip(&wanted) {
                found.truncate(wanted.len()); // a row a token: none of the padding's
            }
            assert!(distance(&found, &wanted) < 1e-5, "{name} {opset}: {}", distance(&found, &wanted));
        }
    }
}

#[test]
fn an_opset_that_tk_does_not_write_is_refused_by_name() {
    let dir = models("tiny-bert-single");
    let config = ModelConfig::read(&dir).unwrap();
    let task = Task::open(&dir, &config).unwrap();
    let error =
        model::build(&config, &task, &weights(&dir), "", GraphKind::fp32(task.form(), 25)).unwrap_err();
    assert_eq!(error.to_string(), "opset 25: tk writes the opsets 13 to 24 (default 18)");
    assert_eq!(tk::error::exit_code(&error), 2);
}

#[test]
fn a_record_gives_the_same_logits_in_any_batch() {
    let (encodings, wanted) = reference("tiny-bert-single");
    for opset in [14, 18] {
        let session = session(&exported("tiny-bert-single", opset));
        for size in [1, 2, 3, 5] {
            let found: Vec<Vec<f32>> = encodings
                .chunks(size)
                .flat_map(|part| logits(&session, &PaddedBatch::new(&part.iter().collect::<Vec<_>>(), 0)))
                .collect();
            assert!(distance(&found, &wanted) < 1e-5, "batches of {size}");
        }
    }
}

#[test]
fn any_number_of_sequences_of_any_length_runs() {
    let session = session(&exported("tiny-bert-single", 18));
    for rows in [1, 2, 7] {
        for width in [1, 2, 17, 64] {
            let encoding = Encoding { ids: vec![5; width], type_ids: vec![0; width], truncated: false };
            let found = logits(&session, &PaddedBatch::new(&vec![&encoding; rows], 0));
            assert_eq!((found.len(), found[0].len()), (rows, 3));
            assert!(distance(&found[..1], &found[rows - 1..]) < 1e-6);
        }
    }
}

#[test]
fn a_fully_masked_row_is_finite_and_leaves_the_others_alone() {
    let (encodings, wanted) = reference("tiny-bert-single");
    for opset in [14, 18, 21] {
        let session = session(&exported("tiny-bert-single", opset));
        let mut batch = PaddedBatch::new(&encodings.iter().collect::<Vec<_>>(), 0);
        batch.mask[..batch.width].fill(0);
        let found = logits(&session, &batch);
        assert!(found[0].iter().all(|x| x.is_finite()), "{:?}", found[0]);
        assert!(distance(&found[1..], &wanted[1..]) < 1e-5);
    }
}

#[test]
fn external_weights_give_the_same_logits_and_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.onnx");
    let model = exported("tiny-bert-single", 18);
    assert!(write::save(model.clone(), &path, true).unwrap());
    let data = std::fs::metadata(dir.path().join("model.onnx_data")).unwrap().len();
    assert!(data > 100_000 && std::fs::metadata(&path).unwrap().len() < 40_000);
    assert_eq!(write::load(&path).unwrap(), model);

    let (encodings, wanted) = reference("tiny-bert-single");
    let batch = PaddedBatch::new(&encodings.iter().collect::<Vec<_>>(), 0);
    assert!(distance(&logits(&open(Model::File(&path)), &batch), &wanted) < 1e-5);

    std::fs::File::options().write(true).open(write::data_path(&path)).unwrap().set_len(data / 2).unwrap();
    let error = format!("{:#}", write::load(&path).unwrap_err());
    assert!(error.contains("model.onnx_data has") && error.contains("are asked for"), "{error}");
}

#[test]
fn taps_can_be_asked_for() {
    let taps = ["bert.embeddings", "bert.encoder.layer.0.attention", "bert.encoder.layer.1", "bert.pooler"];
    let taps: Vec<String> = taps.iter().map(|&tap| tap.to_owned()).collect();
    let session = session(&model::with_outputs(exported("tiny-bert-single", 18), &taps));
    let (encodings, _) = reference("tiny-bert-single");
    let outputs = session.run(&PaddedBatch::new(&[&encodings[0]], 0)).unwrap();
    assert_eq!(outputs[1].name, "bert.embeddings");
    assert_eq!(outputs[1].array.shape(), [1, encodings[0].len(), 32]);
    assert_eq!(outputs[4].array.shape(), [1, 32]);
}

#[test]
fn metadata_says_what_a_server_must_know() {
    let model = exported("tiny-bert-single", 18);
    let keys: Vec<&str> = model.metadata_props.iter().map(|entry| entry.key.as_str()).collect();
    assert!(keys.is_sorted(), "{keys:?}");
    assert_eq!(model::metadata(&model, "labels"), Some(r#"["negative","neutral","positive"]"#));
    assert_eq!(model::metadata(&model, "problem_type"), Some("single_label_classification"));
    let session = session(&model);
    assert_eq!(session.metadata("task").as_deref(), Some("text-classification"));
    assert_eq!(session.metadata("max_positions").as_deref(), Some("64"));
    assert_eq!(session.metadata("absent"), None);
}

#[test]
fn weights_that_diverged_are_not_exported() {
    let dir = tempfile::tempdir().unwrap();
    let source = models("tiny-bert-single");
    std::fs::copy(source.join("config.json"), dir.path().join("config.json")).unwrap();
    let weights = weights(&source);
    let mut tensors: Vec<(String, Vec<usize>, Vec<f32>)> = weights
        .names()
        .map(|name| {
            (name.to_owned(), weights.shape(name).unwrap().to_vec(), weights.f32(name).unwrap().to_vec())
        })
        .collect();
    tensors.iter_mut().find(|(name, ..)| name == "classifier.bias").unwrap().2[1] = f32::NAN;
    let views =
        tensors.iter().map(|(name, shape, values)| (name.as_str(), shape.as_slice(), values.as_slice()));
    tk::checkpoint::write_safetensors(&dir.path().join("model.safetensors"), views).unwrap();

    let config = ModelConfig::read(dir.path()).unwrap();
    let task = Task::open(dir.path(), &config).unwrap();
    let diverged = Weights::open(dir.path(), config.family.names()).unwrap();
    let error = model::build(&config, &task, &diverged, "", GraphKind::fp32(task.form(), 18)).unwrap_err();
    assert!(error.to_string().contains("classifier.bias"), "{error}");
    assert_eq!(tk::error::exit_code(&error), 2);
}

#[test]
fn threads_that_run_one_session_at_once_give_what_one_gives() {
    let (encodings, _) = reference("tiny-bert-single");
    let session = session(&exported("tiny-bert-single", 18));
    let batches: Vec<PaddedBatch> = (1..=encodings.len())
        .flat_map(|size| {
            encodings.chunks(size).map(|part| PaddedBatch::new(&part.iter().collect::<Vec<_>>(), 0))
        })
        .collect();
    let wanted: Vec<Vec<Vec<f32>>> = batches.iter().map(|batch| logits(&session, batch)).collect();
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let (session, batches, wanted) = (&session, &batches, &wanted);
            scope.spawn(move || {
                for i in 0..200 {
                    let at = (i * 7 + thread) % batches.len();
                    assert_eq!(logits(session, &batches[at]), wanted[at], "thread {thread}, batch {at}");
                }
            });
        }
    });
}

#[test]
fn the_graph_that_cuda_runs_gives_transformers_logits() {
    for name in CLASSIFIERS.into_iter().chain(TAGGERS).chain([FOLLOWER]) {
        let (encodings, wanted) = reference(name);
        let batch = PaddedBatch::new(&encodings.iter().collect::<Vec<_>>(), 0);
        let model = built(name, |_| GraphKind::fused());
        let own = model
            .graph
            .iter()
            .flat_map(|graph| &graph.node)
            .filter(|node| node.domain == "com.microsoft")
            .count();
        assert_eq!(own == 0, name.contains("deberta"), "{name}: {own} operators of ONNX Runtime's");
        let mut found = logits(&session(&model), &batch);
        for (found, wanted) in found.iter_mut().zip(&wanted) {
            found.truncate(wanted.len());
        }
        assert!(distance(&found, &wanted) < 1e-5, "{name}: {}", distance(&found, &wanted));
    }
}
