//! Verb × runtime: each verb of the vocabulary alone, on every interpreter and kernel, against the numbers that
//! `scripts/reference` took from PyTorch.

mod common;

use std::path::PathBuf;

use candle_core::{Device, Tensor};
use common::{floats, gradient, integers, max_abs, relative};
use tk::Result;
use tk::checkpoint::Weights;
use tk::data::batch::{Encoding, PackedBatch, PaddedBatch};
use tk::eager::{Eager, Init, Kernels, Mode, Params};
use tk::model::lora::{Adapted, Lora, LowRank};
use tk::model::manifest::manifest;
use tk::model::ops::{Activation, At, Attend, Buckets, Distances, Ids, Ops, Param, Pick, Pooling, Sees};
use tk::onnx::proto::ModelProto;
use tk::onnx::{CANDLE_OPSET, GraphKind, OPSETS, Precision, emit};
use tk::runtime::decoder::Tokens;
use tk::runtime::providers::{Provider, Providers};
use tk::runtime::session::{Model, OrtSession, Threads};
use tk::runtime::slots::SlotRead;
use tk::runtime::{Decoder, Slots};
use tk::say::Say;
use tk::task::{Dim, Form, Output};

/// Outputs in f32 against references that were computed in f64.
const TOLERANCE: f32 = 3e-6;
/// The same for gradients, relative to the gradient's norm.
const GRADIENT_TOLERANCE: f64 = 3e-6;

const CASES: [&str; 44] = [
    "embed_tokens",
    "embed_types",
    "embed_positions",
    "linear",
    "layer_norm",
    "attention",
    "attention_causal",
    "gelu",
    "gelu_tanh",
    "relu",
    "silu",
    "tanh",
    "add",
    "dropout_off",
    "pick_first",
    "pick_last",
    "attention_of_first",
    "attention_causal_of_last",
    "linear_in_out",
    "linear_without_bias",
    "split",
    "tied",
    "embed_positions_behind",
    "embed_zero",
    "layer_norm_without_bias",
    "gated",
    "attention_near",
    "attention_near_of_first",
    "attention_bias",
    "attention_bias_of_first",
    "attention_rotary",
    "attention_rotary_of_first",
    "attention_rotary_near",
    "attention_rotary_near_of_first",
    "attention_products",
    "attention_products_of_first",
    "pool_mean",
    "pool_mean_sqrt_length",
    "pool_weighted_mean",
    "pool_max",
    "normalize",
    "pool_mean_normalize",
    "scale",
    "low_rank",
];

/// A case's definition: `x` is looked up in a table of its own, so that its gradient is the table's.
fn define<O: Ops>(o: &O, case: &Case) -> Result<O::X> {
    let table = |name: &str| {
        let at = At::body(name);
        let shape = case.shape(&format!("{name}.weight"));
        at.table(shape[0], shape[1])
    };
    let x = || o.embed(table("x"), Ids::Tokens);
    match case.name {
        "embed_tokens" => x(),
        "embed_types" => o.embed(table("types"), Ids::TokenTypes),
        "embed_positions" => o.embed(table("positions"), Ids::Positions),
        // added to something, as every family has it: a graph may give one row for all tokens
        "embed_positions_behind" => {
            o.add(&x()?, &o.embed(table("positions"), Ids::PositionsBehind { padding: 5 })?)
        }
        "embed_zero" => o.add(&x()?, &o.embed(table("types"), Ids::Zero)?),
        "linear" => {
            let shape = case.shape("f.weight");
            o.linear(At::body("f").linear(shape[1], shape[0]), &x()?)
        }
        "linear_in_out" => {
            let shape = case.shape("f.weight");
            o.linear(At::body("f").conv1d(shape[0], shape[1]), &x()?)
        }
        "linear_without_bias" => {
            let shape = case.shape("f.weight");
            o.linear(At::body("f").linear(shape[1], shape[0]).without_bias(), &x()?)
        }
        "split" => {
            let parts = o.split(&x()?, 3)?;
            o.add(&o.add(&parts[1], &parts[2])?, &parts[2])
        }
        "tied" => o.linear(table("x").tied(), &x()?),
        "layer_norm_without_bias" => {
            o.layer_norm(At::body("f").norm(case.shape("f.weight")[0], 1e-12).biased(false), &x()?)
        }
        "gated" => o.gated(&x()?, Activation::Gelu),
        "layer_norm" => o.layer_norm(At::body("f").norm(case.shape("f.weight")[0], 1e-12), &x()?),
        name if name.starts_with("attention") => {
            let of = |name| o.embed(table(name), Ids::Tokens);
            let sees = match name {
                _ if name.contains("causal") => Sees::Causal,
                _ if name.contains("rotary_near") => Sees::Near { reach: 5 },
                _ if name.contains("near") => Sees::Near { reach: 3 },
                _ => Sees::All,
            };
            let longest = 24;
            let distances = match name {
                _ if name.contains("bias") => {
                    Distances::Bias { table: table("bias"), buckets: Buckets::T5, longest }
                }
                _ if name.contains("rotary") => Distances::Rotary { theta: 50.0 },
                _ if name.contains("products") => {
                    let buckets = Buckets::Signed { span: 4, most: Some(12) };
                    let (keys, queries) = (Some(o.whole(table("keys"))?), Some(o.whole(table("queries"))?));
                    Distances::Products { keys, queries, buckets, longest }
                }
                _ => Distances::Nothing,
            };
            let queries = case.picked();
            let q = match queries {
                Some(which) => o.pick(&of("q")?, which)?,
                None => of("q")?,
            };
            let how = Attend { heads: 4, sees, queries, dropout: 0.0 };
            o.attention_by_distance(&q, &of("k")?, &of("v")?, how, distances)
        }
        "gelu" => o.activate(&x()?, Activation::Gelu),
        "gelu_tanh" => o.activate(&x()?, Activation::GeluTanh),
        "relu" => o.activate(&x()?, Activation::Relu),
        "silu" => o.activate(&x()?, Activation::Silu),
        "tanh" => o.activate(&x()?, Activation::Tanh),
        "add" => o.add(&o.embed(table("a"), Ids::Tokens)?, &o.embed(table("b"), Ids::Tokens)?),
        "dropout_off" => o.dropout(&x()?, 0.0),
        "pick_first" => o.pick(&x()?, Pick::First),
        "pick_last" => o.pick(&x()?, Pick::Last),
        "pool_mean" => o.pool(&x()?, Pooling::Mean),
        "pool_mean_sqrt_length" => o.pool(&x()?, Pooling::MeanSqrtLength),
        "pool_weighted_mean" => o.pool(&x()?, Pooling::WeightedMean),
        "pool_max" => o.pool(&x()?, Pooling::Max),
        "normalize" => o.normalize(&x()?),
        "scale" => o.scale(&x()?, 2.5),
        "low_rank" => {
            let shape = case.shape("f.weight");
            let rank = case.shape("f.lora_A.weight")[0];
            let lora = Lora { maps: [("f".to_owned(), LowRank { rank, scale: 2.5 })].into(), dropout: 0.0 };
            Adapted { inner: o, lora: &lora }.linear(At::body("f").linear(shape[1], shape[0]), &x()?)
        }
        "pool_mean_normalize" => o.normalize(&o.pool(&x()?, Pooling::Mean)?),
        other => anyhow::bail!("no case {other}"),
    }
}

struct Case {
    name: &'static str,
    batch: Vec<Encoding>,
    tensors: Vec<(String, Vec<usize>, Vec<f32>)>,
    y: Vec<f32>,
    gy: Vec<f32>,
    gradients: Vec<(String, Vec<f32>)>,
}

impl Case {
    fn load(file: &safetensors::SafeTensors, name: &'static str) -> Self {
        let ids = integers(file, &format!("{name}/ids"));
        let type_ids = integers(file, &format!("{name}/type_ids"));
        let mut start = 0;
        let batch = integers(file, &format!("{name}/lengths"))
            .into_iter()
            .map(|length| {
                let range = start..start + length as usize;
                start = range.end;
                Encoding {
                    ids: ids[range.clone()].to_vec(),
                    type_ids: type_ids[range].to_vec(),
                    truncated: false,
                }
            })
            .collect();
        let under = |prefix: String| -> Vec<String> {
            let mut names: Vec<String> = file
                .names()
                .iter()
                .filter_map(|full| full.strip_prefix(&prefix))
                .map(str::to_owned)
                .collect();
            names.sort();
            names
        };
        let tensors = under(format!("{name}/param/"))
            .into_iter()
            .map(|param| {
                let full = format!("{name}/param/{param}");
                (param, file.tensor(&full).unwrap().shape().to_vec(), floats(file, &full))
            })
            .collect();
        let gradients = under(format!("{name}/grad/"))
            .into_iter()
            .map(|param| (param.clone(), floats(file, &format!("{name}/grad/{param}"))))
            .collect();
        Self {
            name,
            batch,
            tensors,
            y: floats(file, &format!("{name}/y")),
            gy: floats(file, &format!("{name}/gy")),
            gradients,
        }
    }

    /// Which token of every sequence the result is of, where it is not of all.
    fn picked(&self) -> Option<Pick> {
        match self.name.rsplit('_').next() {
            Some("first") => Some(Pick::First),
            Some("last") => Some(Pick::Last),
            _ => None,
        }
    }

    /// Whether the result has a row a sequence.
    fn is_of_sequences(&self) -> bool {
        self.picked().is_some() || self.name.starts_with("pool_")
    }

    fn shape(&self, name: &str) -> &[usize] {
        &self
            .tensors
            .iter()
            .find(|(known, ..)| known == name)
            .unwrap_or_else(|| panic!("{}: {name}", self.name))
            .1
    }

    fn params(&self) -> Vec<Param> {
        manifest(|o| define(o, self)).unwrap()
    }

    fn weights(&self) -> (tempfile::TempDir, Weights) {
        let values =
            |param: &Param| self.tensors.iter().find(|(name, ..)| *name == param.name).unwrap().2.clone();
        let tensors: Vec<_> =
            self.params().into_iter().map(|param| (param.clone(), values(&param))).collect();
        common::weights(&tensors)
    }
}

fn each_case(check: impl Fn(&Case)) {
    let bytes = std::fs::read(common::models("verbs.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let stored: std::collections::BTreeSet<&str> =
        file.names().iter().filter_map(|name| name.split('/').next()).collect();
    assert_eq!(stored, CASES.into_iter().collect(), "the stored cases are those that are run");
    for name in CASES {
        check(&Case::load(&file, name));
    }
}

fn eager(case: &Case, kernels: Kernels, mode: Mode) -> (Params, Tensor) {
    let (_dir, weights) = case.weights();
    let init = Init { seed: 0, std: 0.0 };
    let (params, _) = Params::load(&case.params(), &weights, init, &Device::Cpu).unwrap();
    let packed = PackedBatch::new(&case.batch);
    let interpreter = Eager::new(&params, &packed, &Device::Cpu, mode).with_kernels(kernels);
    let y = define(&interpreter, case).unwrap().tensor().unwrap();
    (params, y)
}

fn assert_output(case: &Case, runtime: &str, y: &[f32]) {
    let (worst, at) = max_abs(y, &case.y);
    assert!(worst <= TOLERANCE, "{} on {runtime}: {worst:e} at element {at}", case.name);
}

#[test]
fn every_verb_gives_the_reference_in_evaluation() {
    each_case(|case| {
        for kernels in [Kernels::Fused, Kernels::Composite] {
            let (_, y) = eager(case, kernels, Mode::Evaluation);
            assert_output(case, &format!("eager {kernels:?}"), &y.flatten_all().unwrap().to_vec1().unwrap());
        }
    });
}

#[test]
fn every_verb_gives_the_reference_and_its_gradients_in_training() {
    each_case(|case| {
        for kernels in [Kernels::Fused, Kernels::Composite] {
            let (params, y) = eager(case, kernels, Mode::Training { key: 1 });
            let runtime = format!("eager {kernels:?} in training");
            assert_output(case, &runtime, &y.flatten_all().unwrap().to_vec1().unwrap());
            let gy = Tensor::from_slice(&case.gy, y.shape(), &Device::Cpu).unwrap();
            let store = (y * gy).unwrap().sum_all().unwrap().backward().unwrap();
            for (name, expected) in &case.gradients {
                let error = relative(&gradient(&params, name, &store, kernels), expected);
                assert!(error <= GRADIENT_TOLERANCE, "{} on {runtime}: {name} {error:e}", case.name);
            }
        }
    });
}

fn tokens(case: &Case) -> usize {
    case.batch.iter().map(Encoding::len).sum()
}

/// A case as an ONNX graph of one verb.
fn graph(case: &Case, opset: i64) -> ModelProto {
    let dims = match case.is_of_sequences() {
        true => vec![Dim::Batch, Dim::Of(case.y.len() / case.batch.len())],
        false => vec![Dim::Batch, Dim::Sequence, Dim::Of(case.y.len() / tokens(case))],
    };
    graph_of(case, Output { name: "y", dims }, GraphKind::fp32(Form::Whole, opset))
}

fn graph_of(case: &Case, output: Output, kind: GraphKind) -> ModelProto {
    let (_dir, weights) = case.weights();
    let define = |o: &emit::Emit| Ok(vec![define(o, case)?]);
    let weight = |param: &Param| Ok(weights.f32(&param.name)?.into_owned().into());
    emit::graph(define, &[output], kind, weight).unwrap()
}

/// A case's graph of a form that goes on from tokens which it has read before, as a file.
fn going_on(case: &Case, kind: GraphKind) -> (tempfile::TempDir, PathBuf) {
    let (width, tokens) = match case.picked() {
        Some(_) => (case.y.len() / case.batch.len(), Dim::Asked),
        None => (case.y.len() / tokens(case), Dim::Sequence),
    };
    let output = Output { name: "logits", dims: vec![Dim::Batch, tokens, Dim::Of(width)] };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("verb.onnx");
    std::fs::write(&path, prost::Message::encode_to_vec(&graph_of(case, output, kind))).unwrap();
    (dir, path)
}

/// Leaves the padding out of a graph's result, which is packed then.
fn kept(case: &Case, padded: &PaddedBatch, y: &[f32]) -> Vec<f32> {
    if case.is_of_sequences() {
        let rows = y.chunks(y.len() / padded.rows).zip(padded.mask.chunks(padded.width));
        return rows.filter(|(_, mask)| mask.contains(&1)).flat_map(|(row, _)| row.to_vec()).collect();
    }
    let width = y.len() / (padded.rows * padded.width);
    let rows = y.chunks(width).zip(&padded.mask);
    rows.filter(|(_, mask)| **mask == 1).flat_map(|(row, _)| row.to_vec()).collect()
}

fn padded(case: &Case) -> PaddedBatch {
    PaddedBatch::new(&case.batch.iter().collect::<Vec<_>>(), 0)
}

fn in_onnx_runtime(model: &ModelProto, batch: &PaddedBatch) -> Vec<f32> {
    let bytes = prost::Message::encode_to_vec(model);
    let providers = Providers::only(Provider::Cpu);
    let say = Say { quiet: true, ..Say::default() };
    let session = OrtSession::open(Model::Bytes(&bytes), &providers, Threads::Together(1), say).unwrap();
    session.run(batch).unwrap().remove(0).array.into_iter().collect()
}

fn in_candle_onnx(model: &ModelProto, batch: &PaddedBatch) -> Vec<f32> {
    let tensor =
        |values: &[i64]| Tensor::from_slice(values, (batch.rows, batch.width), &Device::Cpu).unwrap();
    let given =
        [("input_ids", &batch.ids), ("attention_mask", &batch.mask), ("token_type_ids", &batch.type_ids)];
    let inputs = given.map(|(name, values)| (name.to_owned(), tensor(values)));
    let y = candle_onnx::simple_eval(model, inputs.into_iter().collect()).unwrap().remove("y").unwrap();
    y.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn every_verb_gives_the_reference_in_onnx_runtime_at_every_opset() {
    each_case(|case| {
        for opset in OPSETS {
            let batch = padded(case);
            let y = in_onnx_runtime(&graph(case, opset), &batch);
            assert_output(case, &format!("ONNX Runtime, opset {opset}"), &kept(case, &batch, &y));
        }
    });
}

#[test]
fn every_verb_gives_the_reference_in_candle_onnx() {
    each_case(|case| {
        let batch = padded(case);
        let y = in_candle_onnx(&graph(case, CANDLE_OPSET), &batch);
        assert_output(case, "candle-onnx", &kept(case, &batch, &y));
    });
}

/// What a graph that generates is never asked for: types of tokens, tokens that see those behind them, the first token
/// of a sequence, positions that are counted in all of its tokens, attention that depends on distances, and one row of all
/// tokens.
const NOT_IN_PLACE: [&str; 20] = [
    "embed_types",
    "attention",
    "attention_of_first",
    "pick_first",
    "embed_positions_behind",
    "attention_near",
    "attention_near_of_first",
    "attention_bias",
    "attention_bias_of_first",
    "attention_rotary",
    "attention_rotary_of_first",
    "attention_rotary_near",
    "attention_rotary_near_of_first",
    "attention_products",
    "attention_products_of_first",
    "pool_mean",
    "pool_mean_sqrt_length",
    "pool_weighted_mean",
    "pool_max",
    "pool_mean_normalize",
];

/// Each sequence in a slot of its own, its first half and then the other, all sequences' halves one after another.
#[test]
fn every_verb_gives_the_reference_in_place() {
    each_case(|case| {
        if NOT_IN_PLACE.contains(&case.name) {
            return;
        }
        let (_dir, path) = going_on(case, GraphKind::in_place(Precision::Fp32));
        let mut slots =
            Slots::open(&path, &Providers::only(Provider::Cpu), 1, Say { quiet: true, ..Say::default() })
                .unwrap();
        slots.resize(case.batch.len(), 32).unwrap();
        let mut found = vec![Vec::new(); case.batch.len()];
        for half in 0..2 {
            for (slot, encoding) in case.batch.iter().enumerate() {
                let (start, end) = [(0, encoding.len() / 2), (encoding.len() / 2, encoding.len())][half];
                let ids: Vec<i64> = encoding.ids[start..end].iter().map(|&id| i64::from(id)).collect();
                let asked: Vec<i64> = match case.picked() {
                    Some(_) if half == 0 => vec![0],
                    Some(_) => vec![ids.len() as i64 - 1],
                    None => (0..ids.len() as i64).collect(),
                };
                if ids.is_empty() {
                    continue;
                }
                let reading =
                    SlotRead { slots: &(slot..slot + 1), ids: &ids, lengths: &[start], asked: &asked };
                let y = slots.read(reading).unwrap();
                if case.picked().is_none() || half == 1 {
                    found[slot].extend_from_slice(y);
                }
            }
        }
        assert_output(case, "ONNX Runtime, in place", &found.concat());
    });
}

#[test]
fn attention_gives_the_reference_behind_a_past() {
    each_case(|case| {
        if case.name != "attention_causal" {
            return;
        }
        for opset in OPSETS {
            let (_dir, path) = going_on(case, GraphKind::fp32(Form::Cached, opset));
            let mut decoder =
                Decoder::open(&path, &Providers::only(Provider::Cpu), 1, Say::default()).unwrap();
            let mut found = Vec::new();
            for encoding in &case.batch {
                decoder.forget();
                let ids: Vec<i64> = encoding.ids.iter().map(|&id| i64::from(id)).collect();
                let (all, mask) = (ids.len(), vec![1; ids.len()]);
                for part in [0..all / 2, all / 2..all] {
                    let read = Tokens {
                        rows: 1,
                        ids: &ids[part.clone()],
                        mask: &mask[..part.end],
                        positions: &vec![0; part.len()], // nothing asks for them
                    };
                    found.extend(decoder.read(read).unwrap().array);
                }
            }
            assert_output(case, &format!("ONNX Runtime behind a past, opset {opset}"), &found);
        }
    });
}

/// The graphs that read the mask, of some cases, at every opset and in candle-onnx, on a batch that somebody has
/// changed.
fn assert_masked(
    is_meant: impl Fn(&Case) -> bool,
    change: impl Fn(&mut PaddedBatch),
    expected: impl Fn(&Case) -> &[f32],
) {
    each_case(|case| {
        let reads =
            case.name.starts_with("attention") || case.name.starts_with("pool_") || case.name == "pick_last";
        if !reads || !is_meant(case) {
            return;
        }
        let mut batch = padded(case);
        change(&mut batch);
        let check = |runtime: &str, y: &[f32]| {
            assert!(y.iter().all(|x| x.is_finite()), "{} on {runtime}", case.name);
            let (worst, at) = max_abs(&kept(case, &batch, y), expected(case));
            assert!(worst <= TOLERANCE, "{} on {runtime}: {worst:e} at element {at}", case.name);
        };
        for opset in OPSETS {
            check(&format!("ONNX Runtime, opset {opset}"), &in_onnx_runtime(&graph(case, opset), &batch));
        }
        check("candle-onnx", &in_candle_onnx(&graph(case, CANDLE_OPSET), &batch));
    });
}

#[test]
fn a_sequence_of_padding_alone_is_finite_and_leaves_the_others_alone() {
    assert_masked(
        |_| true,
        |batch| batch.mask[..batch.width].fill(0),
        |case| {
            let (rows, hidden) = match case.is_of_sequences() {
                true => (case.batch.len(), 1),
                false => (tokens(case), case.batch[0].len()),
            };
            &case.y[hidden * case.y.len() / rows..]
        },
    );
}

/// Padding behind is behind every query of a causal graph too, so only this asks it for the mask.
#[test]
fn padding_in_front_is_left_out() {
    assert_masked(
        |case| case.picked() != Some(Pick::First), // it would be padding
        |batch| {
            let width = batch.width;
            for row in 0..batch.rows {
                let of_row = row * width..(row + 1) * width;
                let length = batch.mask[of_row.clone()].iter().sum::<i64>() as usize;
                for values in [&mut batch.ids, &mut batch.mask, &mut batch.type_ids] {
                    values[of_row.clone()].rotate_right(width - length);
                }
            }
        },
        |case| &case.y,
    );
}
