//! That the fused operations are what models are trained with: no test of numbers would notice where they are not.

use std::path::Path;

use candle_core::Device;

use super::{Eager, Init, Mode, Params, X};
use crate::checkpoint::Weights;
use crate::data::batch::{Encoding, PackedBatch};
use crate::model::ModelConfig;
use crate::task::Task;

/// The operations on the tape after a pass through a reference checkpoint of so many layers, in training.
fn operations(model: &str, layers: usize) -> usize {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("models").join(model);
    let mut config = ModelConfig::read(&dir).unwrap();
    config.set(["num_hidden_layers", "n_layers", "n_layer"].map(|key| (key, layers.into()))).unwrap();
    config.set_dropout(0.1).unwrap();
    let task = Task::from_config(&config).unwrap();
    let weights = Weights::open(&dir, config.family.names()).unwrap();
    let manifest = task.params(&config.family).unwrap();
    let (params, _) = Params::load(&manifest, &weights, Init { seed: 0, std: 0.0 }, &Device::Cpu).unwrap();
    let encodings = [3, 5].map(|n| Encoding { ids: vec![7; n], type_ids: vec![0; n], truncated: false });
    let batch = PackedBatch::new(&encodings);
    let eager = Eager::new(&params, &batch, &Device::Cpu, Mode::Training { key: 1 });
    for output in task.define(&eager, &config.family).unwrap() {
        let X::Fused(output) = output else { panic!("{model} is composed of candle's operations") };
        output.value().unwrap();
    }
    eager.tape.operations()
}

/// Self-attention from its maps; the attention's map, the residual sum and its norm; the same of both feed-forward maps.
/// A sum and its norm are two values.
#[test]
fn a_layer_is_as_few_operations_in_every_family() {
    for (model, due) in [
        ("tiny-bert-single", 5),
        ("tiny-bert-tokens", 5),
        ("tiny-distilbert-single", 5),
        ("tiny-distilbert-tokens", 5),
        ("tiny-roberta-single", 5),
        ("tiny-roberta-tokens", 5),
        ("tiny-xlm-roberta-tokens", 5),
        ("tiny-electra-single", 5),
        ("tiny-electra-tokens", 5),
        ("tiny-mpnet-single", 5),
        ("tiny-mpnet-tokens", 5),
        ("tiny-deberta-v2-single", 8), // dropout of the table of distances, and its two maps
        ("tiny-deberta-v2-tokens", 8),
        ("tiny-modernbert-single", 7), // dropout inside the feed-forward network, which its checkpoints leave out
        ("tiny-modernbert-answers", 7),
        ("tiny-gpt2-lm", 5), // queries, keys and values are parts of one map's result
    ] {
        assert_eq!(operations(model, 2) - operations(model, 1), due, "{model}");
    }
}
