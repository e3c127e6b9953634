//! What several test files need: the stored references, and how far two lists of numbers are apart.
#![allow(dead_code)] // each test file uses its own part

pub mod events;
pub mod schema;
pub mod server;
pub mod training;

use std::path::PathBuf;

use tk::checkpoint::Weights;
use tk::model::ops::Param;

/// The reference checkpoints that give a row of scores a sequence.
pub const CLASSIFIERS: [&str; 12] = [
    "tiny-bert-single",
    "tiny-bert-multi",
    "tiny-bert-regression",
    "tiny-distilbert-single",
    "tiny-roberta-single",
    "tiny-xlm-roberta-single",
    "tiny-electra-single",
    "tiny-mpnet-single",
    "tiny-modernbert-single",
    "tiny-modernbert-mean",
    "tiny-deberta-v2-single",
    "tiny-gpt2-single",
];
/// Those that give a row a token, of five labels.
pub const TAGGERS: [&str; 9] = [
    "tiny-bert-tokens",
    "tiny-distilbert-tokens",
    "tiny-roberta-tokens",
    "tiny-xlm-roberta-tokens",
    "tiny-electra-tokens",
    "tiny-mpnet-tokens",
    "tiny-modernbert-tokens",
    "tiny-deberta-v2-tokens",
    "tiny-gpt2-tokens",
];
/// Those that give two numbers a token: where an answer begins, and where it ends.
pub const ANSWERERS: [&str; 8] = [
    "tiny-bert-answers",
    "tiny-distilbert-answers",
    "tiny-roberta-answers",
    "tiny-electra-answers",
    "tiny-mpnet-answers",
    "tiny-modernbert-answers",
    "tiny-deberta-v2-answers",
    "tiny-gpt2-answers",
];
/// Those that find masked words.
pub const MASKERS: [&str; 7] = [
    "tiny-bert-masked",
    "tiny-distilbert-masked",
    "tiny-roberta-masked",
    "tiny-electra-masked",
    "tiny-mpnet-masked",
    "tiny-modernbert-masked",
    "tiny-deberta-v2-masked",
];
/// The one that tells whether a text follows another.
pub const FOLLOWER: &str = "tiny-bert-pairs";
/// The one that does both.
pub const PRE_TRAINED: &str = "tiny-bert-pretraining";
/// The one that makes a row of numbers of a text, learnt among the texts of a batch.
pub const EMBEDDER: &str = "tiny-bert-embedding";
pub const LANGUAGE_MODEL: &str = "tiny-gpt2-lm";

/// All that answer without generating, but for those that answer questions.
pub fn predictors() -> impl Iterator<Item = &'static str> {
    CLASSIFIERS.into_iter().chain(TAGGERS).chain(MASKERS).chain([FOLLOWER, PRE_TRAINED, EMBEDDER])
}

/// Changes every number of some of a model's weights.
pub fn change_weights(dir: &std::path::Path, is_changed: impl Fn(&str) -> bool, change: impl Fn(f32) -> f32) {
    let path = dir.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&bytes[8..start]).unwrap();
    let mut changed = 0;
    for (_, about) in header.iter().filter(|(name, _)| *name != "__metadata__" && is_changed(name)) {
        let place = |i: usize| start + about["data_offsets"][i].as_u64().unwrap() as usize;
        for number in bytes[place(0)..place(1)].as_chunks_mut().0 {
            *number = change(f32::from_le_bytes(*number)).to_le_bytes();
        }
        changed += 1;
    }
    assert!(changed > 0, "no weight is to be changed");
    std::fs::write(path, bytes).unwrap();
}

/// A directory under `models/`.
pub fn models(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("models").join(name)
}

/// A JSON file.
pub fn json(path: PathBuf) -> serde_json::Value {
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap()
}

/// The largest difference, and at which place.
pub fn max_abs(a: &[f32], b: &[f32]) -> (f32, usize) {
    assert_eq!(a.len(), b.len(), "different lengths");
    let mut worst = (0.0, 0);
    for (i, (x, y)) in a.iter().zip(b).enumerate() {
        let d = (x - y).abs();
        if d > worst.0 || d.is_nan() {
            worst = (d, i);
        }
    }
    worst
}

/// The Euclidean norm of the difference over that of the reference.
pub fn relative(a: &[f32], reference: &[f32]) -> f64 {
    assert_eq!(a.len(), reference.len(), "different lengths");
    let norm =
        |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(reference).map(|(x, y)| x - y)) / norm(&mut reference.iter().copied()).max(1e-12)
}

/// Stored i64 values, such as token ids.
pub fn integers(file: &safetensors::SafeTensors, name: &str) -> Vec<u32> {
    let view = file.tensor(name).unwrap();
    view.data().as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b) as u32).collect()
}

/// Stored f32 values.
pub fn floats(file: &safetensors::SafeTensors, name: &str) -> Vec<f32> {
    let view = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
    view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// Writes weights as a checkpoint and maps it.
pub fn weights(tensors: &[(Param, Vec<f32>)]) -> (tempfile::TempDir, Weights) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("model.safetensors");
    let named = tensors.iter().map(|(p, v)| (p.name.as_str(), p.shape.as_slice(), v.as_slice()));
    tk::checkpoint::write_safetensors(&file, named).unwrap();
    let weights = Weights::open_file(&file).unwrap();
    (dir, weights)
}

/// The `tk` binary.
pub fn tk() -> assert_cmd::Command {
    assert_cmd::Command::new(assert_cmd::cargo::cargo_bin!("tk"))
}

/// Exports the language model of a directory; its tokenizer.
pub fn exported(dir: &std::path::Path) -> tk::data::tokens::Tokenizer {
    tk().args(["export", "--quiet"]).arg(dir).assert().success();
    tk::data::tokens::Tokenizer::open(dir).unwrap()
}

/// The slots of an exported language model, on one thread.
pub fn slots(dir: &std::path::Path) -> tk::runtime::Slots {
    slots_in(dir, tk::onnx::Precision::Fp32)
}

/// The same of the graph in a precision.
pub fn slots_in(dir: &std::path::Path, precision: tk::onnx::Precision) -> tk::runtime::Slots {
    let graph = tk::predict::graphs::generating(dir, precision);
    let providers = tk::runtime::Providers::only(tk::runtime::Provider::Cpu);
    tk::runtime::Slots::open(&graph, &providers, 1, tk::say::Say::default()).unwrap()
}

/// The labelled records of a reference model, `times` over, as a JSON Lines file.
pub fn records_file(model: &str, times: usize, path: &std::path::Path) {
    let reference = json(models(model).join("reference.json"));
    let lines: String =
        reference["records"].as_array().unwrap().iter().map(|record| format!("{record}\n")).collect();
    std::fs::write(path, lines.repeat(times)).unwrap();
}

/// Copies a directory's files.
pub fn copy_dir(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    }
}

/// A directory under `models/`, to be changed.
pub fn copy(model: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model");
    copy_dir(&models(model), &path);
    (dir, path)
}

/// A parameter's gradient after a backward pass: from its slot, or from candle's tape.
pub fn gradient(
    params: &tk::eager::Params,
    name: &str,
    store: &candle_core::backprop::GradStore,
    kernels: tk::eager::Kernels,
) -> Vec<f32> {
    let found = match kernels {
        tk::eager::Kernels::Fused => {
            let index = params.iter().position(|(param, _)| param.name == name).unwrap();
            params.gradients()[index].lock().dense()
        }
        tk::eager::Kernels::Composite => store
            .get(params.get(name).unwrap().as_tensor())
            .map(|g| g.flatten_all().unwrap().to_vec1().unwrap()),
    };
    found.unwrap_or_else(|| panic!("no gradient reaches {name}"))
}

/// A model in a folder with room for inputs and outputs.
pub struct Bench(pub tempfile::TempDir);

impl Bench {
    pub fn with(model: &str) -> Self {
        let bench = Self(tempfile::tempdir().unwrap());
        copy_dir(&models(model), &bench.path("model"));
        bench
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}
