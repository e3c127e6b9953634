//! That the fused operations are what models are trained with, and that the composite ones are few: no test of numbers
//! would notice where they are not.

use std::collections::HashSet;
use std::path::Path;

use candle_core::{Device, Storage, Tensor};

use super::{Eager, Init, Kernels, Mode, Params, X};
use crate::data::batch::{Encoding, PackedBatch};
use crate::model::ModelConfig;
use crate::task::Task;

/// A model like a reference checkpoint, of so many layers, over sequences of these lengths, in training.
fn pass<T>(
    model: &str,
    layers: usize,
    lengths: &[usize],
    kernels: Kernels,
    look: impl Fn(&Eager, Vec<X>) -> T,
) -> T {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("models").join(model);
    let mut config = ModelConfig::read(&dir).unwrap();
    config.set(["num_hidden_layers", "n_layers", "n_layer"].map(|key| (key, layers.into()))).unwrap();
    config.set_dropout(0.1).unwrap();
    let task = Task::from_config(&config).unwrap();
    let manifest = task.params(&config.family).unwrap();
    let params = Params::from_scratch(&manifest, Init { seed: 0, std: 0.02 }, &Device::Cpu).unwrap();
    let encoding = |&n: &usize| Encoding { ids: vec![7; n], type_ids: vec![0; n], truncated: false };
    let encodings: Vec<Encoding> = lengths.iter().map(encoding).collect();
    let batch = PackedBatch::new(&encodings);
    let eager = Eager::new(&params, &batch, &Device::Cpu, Mode::Training { key: 1 }).with_kernels(kernels);
    let outputs = task.define(&eager, &config.family).unwrap();
    look(&eager, outputs)
}

/// The operations on the tape after such a pass.
fn operations(model: &str, layers: usize) -> usize {
    pass(model, layers, &[3, 5], Kernels::Fused, |eager, outputs| {
        for output in outputs {
            let X::Fused(output) = output else { panic!("{model} is composed of candle's operations") };
            output.value().unwrap();
        }
        eager.tape.operations()
    })
}

/// candle's operations between the parameters and the outputs of such a pass: what is computed, as each has a storage of
/// its own. A view, as of a transposed matrix, has that of what it is a view of.
fn composite_operations(model: &str, layers: usize, lengths: &[usize]) -> usize {
    pass(model, layers, lengths, Kernels::Composite, |_, outputs| {
        let place = |x: &Tensor| std::ptr::from_ref::<Storage>(&x.storage_and_layout().0).addr();
        let outputs: Vec<Tensor> = outputs.iter().map(|output| output.tensor().unwrap()).collect();
        let nodes: Vec<&Tensor> = outputs.iter().flat_map(Tensor::sorted_nodes).collect();
        let of = |are_variables: bool| -> HashSet<usize> {
            nodes.iter().filter(|x| x.is_variable() == are_variables).map(|x| place(x)).collect()
        };
        of(false).difference(&of(true)).count()
    })
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

/// Maps to queries, keys and values with their biases (6); heads put side by side (3), scores, their factor and what is not
/// seen (3), softmax, dropout, the values' sums, heads put back (4); the attention's map, dropout and residual sum (4) and
/// norm (1); both feed-forward maps, the non-linearity between them, dropout and sum (7) and norm (1).
#[test]
fn a_layer_is_as_few_operations_of_candles_for_many_sequences_as_for_one() {
    let ragged: Vec<usize> = (0..32).map(|i| 5 + 7 * i % 12).collect();
    for (model, due) in [
        ("tiny-bert-single", 29),
        ("tiny-bert-tokens", 29),
        ("tiny-distilbert-single", 28),
        ("tiny-roberta-single", 29),
        ("tiny-electra-tokens", 29),
        ("tiny-mpnet-single", 29), // what distances add to scores is computed once a pass
        ("tiny-deberta-v2-single", 42), // 13 more of products with the table of distances
        ("tiny-modernbert-single", 27),
        ("tiny-gpt2-lm", 28),
    ] {
        for sequences in [1, 4, 32] {
            let of = |layers| composite_operations(model, layers, &ragged[..sequences]);
            assert_eq!(of(3) - of(2), due, "{model}, {sequences} sequences");
        }
    }
}
