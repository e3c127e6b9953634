//! Every fused kernel against its composite of candle's primitives: results and all gradients, over random shapes.

mod common;

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, Var};
use common::relative;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use tk::data::batch::Spans;
use tk::eager::kernels::attention::{Attention, ByDistance, Queries, Relative};
use tk::eager::kernels::buffer::Buffer;
use tk::eager::kernels::cross_entropy::{self, composite_losses, linear_cross_entropy, linear_losses};
use tk::eager::kernels::dropout::Mask;
use tk::eager::kernels::gemm::Factors;
use tk::eager::kernels::gradient::Gradient;
use tk::eager::kernels::layer_norm::NormWeights;
use tk::eager::kernels::linear::LinearMap;
use tk::eager::kernels::residual::{self, Branch, residual_norm};
use tk::eager::kernels::{activation, attention, dropout, embedding, layer_norm, linear, pooling, split};
use tk::eager::tape::{Tape, TapeValue};
use tk::eager::{Init, Kernels, Params, Weight};
use tk::model::ops::{Activation, At, Buckets, Ids, Layout, Ops, Pooling, Sees};
use tk::train::gradients::Gradients;
use tk::train::optimizer::{AdamW, Constants};

/// Both forms round differently; candle's own GELU gradients use six-digit constants.
const TOLERANCE: f64 = 5e-6;
/// The gradient of what a query or a key is made of is a difference of nearly equal sums.
const QUERY_TOLERANCE: f64 = 2e-5;

/// Sequences of more blocks than one, and more of them than tables have groups.
#[test]
fn attention_with_tables_over_long_sequences_is_its_composite() {
    let spans = Arc::new(Spans::of_lengths([290, 3, 40, 7, 5, 270, 6]));
    let rows = || Arc::new(ByDistance::new(Buckets::Signed { span: 16, most: Some(100) }, 290));
    let how = Attention {
        spans: spans.clone(),
        heads: 2,
        sees: Sees::All,
        queries: Queries::All,
        mask: None,
        factors: Factors::F32,
    };
    let x = |i: u64, rows: usize| random(i, &[rows, 12]);
    let inputs = [x(1, spans.tokens()), x(2, spans.tokens()), x(3, spans.tokens()), x(4, 32), x(5, 32)];
    compare_within(
        QUERY_TOLERANCE,
        &inputs,
        &[],
        |t, _| {
            let (keys, queries) = (Some(t[3].clone()), Some(t[4].clone()));
            attention::composite(
                &t[0],
                &t[1],
                &t[2],
                &how,
                &Relative::Products { keys, queries, rows: rows() },
            )
        },
        |tape, t, _| {
            let (keys, queries) = (Some(t[3].clone()), Some(t[4].clone()));
            let relative = Relative::Products { keys, queries, rows: rows() };
            attention::attention(tape, &t[0], &t[1], &t[2], &how, &relative)
        },
    );
}

/// Numbers between −2 and 2 that a seed and a place decide.
fn random(seed: u64, shape: &[usize]) -> Var {
    let n = shape.iter().product::<usize>();
    let values: Vec<f32> = (0..n as u64)
        .map(|i| {
            let bits = tk::eager::kernels::dropout::mix(seed.wrapping_mul(1_000_003).wrapping_add(i));
            (bits >> 40) as f32 / (1u64 << 22) as f32 - 2.0
        })
        .collect();
    Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu).unwrap()).unwrap()
}

/// Runs both forms and compares the result and every gradient under a random cotangent: of the activations, and of
/// the parameters.
fn compare(
    activations: &[Var],
    parameters: &[Var],
    composite: impl Fn(&[Tensor], &[Weight]) -> Result<Tensor>,
    fused: impl Fn(&Tape, &[Arc<TapeValue>], &[Weight]) -> Result<Arc<TapeValue>>,
) {
    compare_within(TOLERANCE, activations, parameters, composite, fused);
}

fn compare_within(
    tolerance: f64,
    activations: &[Var],
    parameters: &[Var],
    composite: impl Fn(&[Tensor], &[Weight]) -> Result<Tensor>,
    fused: impl Fn(&Tape, &[Arc<TapeValue>], &[Weight]) -> Result<Arc<TapeValue>>,
) {
    let tensors: Vec<Tensor> = activations.iter().map(|v| v.as_tensor().clone()).collect();
    let weights: Vec<Weight> =
        parameters.iter().map(|v| Weight { values: v.as_tensor().clone(), gradient: None }).collect();
    let y = composite(&tensors, &weights).unwrap();
    let cotangent = random(99, y.dims());
    let store = (&y * cotangent.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
    let mut expected = vec![numbers(&y)];
    let all = activations.iter().chain(parameters);
    expected.extend(all.map(|v| numbers(store.get(v.as_tensor()).expect("a gradient"))));

    let found = on_tape(activations, parameters, &numbers(cotangent.as_tensor()), fused);
    assert_eq!(found.len(), expected.len());
    for (i, (fused, composite)) in found.iter().zip(&expected).enumerate() {
        let error = relative(fused, composite);
        assert!(error <= tolerance, "{} {i} is {error:e} off", if i == 0 { "result" } else { "gradient" });
    }
}

/// A fused operation's result and, from its gradient, those of the activations and of the parameters.
fn on_tape(
    activations: &[Var],
    parameters: &[Var],
    cotangent: &[f32],
    run: impl Fn(&Tape, &[Arc<TapeValue>], &[Weight]) -> Result<Arc<TapeValue>>,
) -> Vec<Vec<f32>> {
    let tape = Tape::new(true);
    let leaf = |v: &Var| tape.leaf(Buffer::of(&numbers(v.as_tensor())), *v.dims().last().unwrap());
    let values: Vec<Arc<TapeValue>> = activations.iter().map(leaf).collect();
    let weights: Vec<Weight> = parameters.iter().map(with_slot).collect();
    let y = run(&tape, &values, &weights).unwrap();
    let mut all = vec![y.numbers.to_vec()];
    let flow = tape.backward(vec![(y, Buffer::of(cotangent))]).unwrap();
    all.extend(values.iter().map(|value| flow.of(value).expect("a gradient").to_vec()));
    all.extend(
        weights.iter().map(|w| w.gradient.as_ref().and_then(|g| g.lock().dense()).expect("a gradient")),
    );
    all
}

fn with_slot(var: &Var) -> Weight {
    Weight { values: var.as_detached_tensor(), gradient: Some(Arc::new(Gradient::new(var.dims()))) }
}

fn map(weight: &Weight, bias: &Weight) -> LinearMap {
    LinearMap::new(weight, Some(bias), Layout::OutIn, Factors::F32).unwrap()
}

/// What [`map`] computes, in candle's operations.
fn mapped(x: &Tensor, weight: &Weight, bias: &Weight) -> Result<Tensor> {
    linear::composite(x, weight, Some(bias), Layout::OutIn)
}

fn norm(weight: &Weight, bias: &Weight) -> NormWeights {
    NormWeights { weight: weight.clone(), bias: Some(bias.clone()), eps: 1e-5 }
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

proptest! {
    // the same shapes at every run: whether a gradient cancels to rounding is not for chance to find in CI
    #![proptest_config(ProptestConfig {
        cases: 24,
        rng_seed: RngSeed::Fixed(1),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn linear_is_its_composite(rows in 1usize..300, input in 1usize..90, output in 1usize..200, seed: u64) {
        for (layout, shape) in [(Layout::OutIn, [output, input]), (Layout::InOut, [input, output])] {
            for parameters in [vec![random(seed ^ 1, &shape), random(seed ^ 2, &[output])], vec![random(seed ^ 1, &shape)]] {
                compare(
                    &[random(seed, &[rows, input])],
                    &parameters,
                    |t, p| linear::composite(&t[0], &p[0], p.get(1), layout),
                    |tape, t, p| linear::linear(tape, &t[0], &LinearMap::new(&p[0], p.get(1), layout, Factors::F32)?),
                );
            }
        }
    }

    #[test]
    // of two channels both gradients cancel to rounding, so there is nothing to compare
    fn layer_norm_is_its_composite(rows in 1usize..100, width in 8usize..150, seed: u64) {
        let (x, w, b) = (random(seed, &[rows, width]), random(seed ^ 1, &[width]), random(seed ^ 2, &[width]));
        compare(
            &[x],
            &[w, b],
            |t, p| layer_norm::composite(&t[0], &p[0], Some(&p[1]), 1e-5),
            |tape, t, p| layer_norm::layer_norm(tape, &t[0], &norm(&p[0], &p[1])),
        );
    }

    #[test]
    fn pooling_and_the_norm_behind_it_are_their_composites(
        lengths in prop::collection::vec(1usize..40, 1..9),
        width in 1usize..150,
        seed: u64,
    ) {
        let spans = Arc::new(Spans::of_lengths(lengths));
        let x = random(seed, &[spans.tokens(), width]);
        for how in [Pooling::Mean, Pooling::MeanSqrtLength, Pooling::WeightedMean, Pooling::Max] {
            compare(
                std::slice::from_ref(&x),
                &[],
                |t, _| pooling::composite(&t[0], &spans, how),
                |tape, t, _| pooling::pool(tape, &t[0], &spans, how),
            );
        }
        if width >= 8 { // of few channels the gradient cancels to rounding
            compare(
                std::slice::from_ref(&x),
                &[],
                |t, _| pooling::normalize_composite(&t[0]),
                |tape, t, _| Ok(pooling::normalize(tape, &t[0])),
            );
        }
    }

    #[test]
    fn a_non_linearity_behind_a_linear_map_is_its_composite(
        rows in 1usize..300,
        input in 1usize..90,
        output in 1usize..200,
        seed: u64,
    ) {
        let (x, w, b) = (random(seed, &[rows, input]), random(seed ^ 1, &[output, input]), random(seed ^ 2, &[output]));
        for how in [Activation::Gelu, Activation::GeluTanh, Activation::Tanh] {
            compare(
                std::slice::from_ref(&x),
                &[w.clone(), b.clone()],
                |t, p| activation::composite(&mapped(&t[0], &p[0], &p[1])?, how),
                |tape, t, p| linear::linear_activation(tape, &t[0], &map(&p[0], &p[1]), how),
            );
        }
    }

    #[test]
    fn the_norm_of_a_residual_sum_is_its_composite(
        rows in 1usize..300,
        width in 8usize..150,
        inner in 1usize..90,
        p in prop::option::of(0.05f32..0.6),
        seed: u64,
    ) {
        let r = |i: u64, shape: &[usize]| random(seed ^ i, shape);
        let mask = p.map(|p| Mask::new(seed, p));
        // a branch that was computed before
        compare(
            &[r(1, &[rows, width]), r(2, &[rows, width])],
            &[r(3, &[width]), r(4, &[width])],
            |t, p| residual::composite(&t[0], mask, &t[1], &p[0], Some(&p[1]), 1e-5),
            |tape, t, p| {
                let branch = Branch::Ready(t[0].clone());
                Ok(residual_norm(tape, &branch, mask, &t[1], &norm(&p[0], &p[1]))?.1)
            },
        );
        // a linear map
        compare(
            &[r(1, &[rows, inner]), r(2, &[rows, width])],
            &[r(3, &[width]), r(4, &[width]), r(5, &[width, inner]), r(6, &[width])],
            |t, p| {
                let branch = mapped(&t[0], &p[2], &p[3])?;
                residual::composite(&branch, mask, &t[1], &p[0], Some(&p[1]), 1e-5)
            },
            |tape, t, p| {
                let branch = Branch::Linear { x: t[0].clone(), map: map(&p[2], &p[3]) };
                Ok(residual_norm(tape, &branch, mask, &t[1], &norm(&p[0], &p[1]))?.1)
            },
        );
        // a feed-forward network of the stream itself, and the sum used again, as before a later norm
        compare(
            &[r(2, &[rows, width])],
            &[
                r(3, &[width]), r(4, &[width]), r(5, &[inner, width]), r(6, &[inner]), r(7, &[width, inner]),
                r(8, &[width]),
            ],
            |t, p| {
                let inner = activation::composite(&mapped(&t[0], &p[2], &p[3])?, Activation::Gelu)?;
                let branch = mapped(&inner, &p[4], &p[5])?;
                let dropped = mask.map(|mask| dropout::composite(&branch, mask)).unwrap_or(Ok(branch))?;
                let sum = (dropped + &t[0])?;
                residual::composite(&sum, None, &layer_norm::composite(&sum, &p[0], Some(&p[1]), 1e-5)?, &p[0], Some(&p[1]), 1e-5)
            },
            |tape, t, p| {
                let (first, second) = (map(&p[2], &p[3]), map(&p[4], &p[5]));
                let branch = Branch::FeedForward { x: t[0].clone(), first, how: Activation::Gelu, gated: false, second };
                let (sum, normed) = residual_norm(tape, &branch, mask, &t[0], &norm(&p[0], &p[1]))?;
                Ok(residual_norm(tape, &Branch::Ready(sum), None, &normed, &norm(&p[0], &p[1]))?.1)
            },
        );
    }

    #[test]
    fn self_attention_is_its_composite(
        // a token alone is attended to whatever its query says, whose gradient would be rounding
        lengths in prop::collection::vec(2usize..150, 1..5),
        heads in 1usize..4,
        d in 4usize..20,
        input in 4usize..40,
        p in prop::option::of(0.05f32..0.6),
        seed: u64,
    ) {
        let (spans, width) = (Arc::new(Spans::of_lengths(lengths)), heads * d);
        let x = random(seed, &[spans.tokens(), input]);
        // small maps, so that no weight is all but one: what is left of the others would be rounding
        let small = |i: u64| Var::from_tensor(&(random(seed ^ i, &[width, input]).as_tensor() * 0.1).unwrap()).unwrap();
        let bias = |i: u64| random(seed ^ i, &[width]);
        let mask = p.map(|p| Mask::new(seed, p));
        // the keys' bias has a gradient of rounding alone, so it has no gradient here
        let key_bias = bias(5);
        let parameters = [small(1), bias(2), small(3), small(4), bias(6)];
        let key_bias = Weight { values: key_bias.as_detached_tensor(), gradient: None };
        for sees in [Sees::All, Sees::Causal] {
            let how = Attention { spans: spans.clone(), heads, sees, queries: Queries::All, mask, factors: Factors::F32 };
            compare_within(
                QUERY_TOLERANCE,
                std::slice::from_ref(&x),
                &parameters,
                |t, p| {
                    let of = |w: &Weight, b: &Weight| mapped(&t[0], w, b);
                    let (q, k, v) = (of(&p[0], &p[1])?, of(&p[2], &key_bias)?, of(&p[3], &p[4])?);
                    attention::composite(&q, &k, &v, &how, &Relative::Nothing)
                },
                |tape, t, p| {
                    let maps = [map(&p[0], &p[1]), map(&p[2], &key_bias), map(&p[3], &p[4])];
                    attention::self_attention(tape, &t[0], maps.each_ref(), &how, &Relative::Nothing)
                },
            );
        }
    }

    #[test]
    fn activations_are_their_composites(n in 1usize..40_000, seed: u64) {
        let x = Var::from_tensor(&(random(seed, &[n]).as_tensor() * 3.0).unwrap()).unwrap();
        for how in [Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::Silu, Activation::Tanh] {
            compare(
                std::slice::from_ref(&x),
                &[],
                |t, _| activation::composite(&t[0], how),
                |tape, t, _| Ok(activation::activate(tape, &t[0], how)),
            );
        }
    }

    #[test]
    fn dropout_is_its_composite(n in 1usize..5_000, key: u64, p in 0.0f32..0.9) {
        let mask = Mask::new(key, p);
        compare(
            &[random(key, &[n])],
            &[],
            |t, _| dropout::composite(&t[0], mask),
            |tape, t, _| Ok(dropout::dropout(tape, &t[0], mask)),
        );
    }

    #[test]
    fn rows_by_id_are_their_composites(
        rows in 1usize..700,
        width in 1usize..40,
        ids in prop::collection::vec(0u32..700, 1..200),
    ) {
        let ids: Arc<[u32]> = ids.into_iter().map(|id| id % rows as u32).collect();
        compare(
            &[],
            &[random(7, &[rows, width])],
            |_, p| embedding::composite(&p[0].values, &ids),
            |tape, _, p| embedding::embedding(tape, &p[0], &ids),
        );
        compare(
            &[random(7, &[rows, width])],
            &[],
            |t, _| embedding::composite(&t[0], &ids),
            |tape, t, _| embedding::pick(tape, &t[0], &ids),
        );
    }

    #[test]
    fn attention_is_its_composite(
        lengths in prop::collection::vec(1usize..150, 1..6),
        heads in 1usize..5,
        d in 1usize..20,
        p in prop::option::of(0.05f32..0.6),
        seed: u64,
    ) {
        let spans = Arc::new(Spans::of_lengths(lengths));
        let mask = p.map(|p| Mask::new(seed, p));
        let some = Spans::of_lengths(spans.iter().enumerate().map(|(b, span)| 7 * b % span.len() + 1));
        for (sees, queries, asking) in [
            (Sees::All, Queries::All, spans.tokens()),
            (Sees::Causal, Queries::All, spans.tokens()),
            (Sees::All, Queries::First, spans.len()),
            (Sees::Causal, Queries::Last, spans.len()),
            (Sees::All, Queries::Asked(Arc::new(some.clone())), some.tokens()),
        ] {
            let shapes = [[asking, heads * d], [spans.tokens(), heads * d]];
            let variables =
                [random(seed, &shapes[0]), random(seed ^ 1, &shapes[1]), random(seed ^ 2, &shapes[1])];
            let how = Attention { spans: spans.clone(), heads, sees, queries, mask, factors: Factors::F32 };
            compare(
                &variables,
                &[],
                |t, _| attention::composite(&t[0], &t[1], &t[2], &how, &Relative::Nothing),
                |tape, t, _| attention::attention(tape, &t[0], &t[1], &t[2], &how, &Relative::Nothing),
            );
        }
    }

    #[test]
    fn attention_that_counts_distances_is_its_composite(
        lengths in prop::collection::vec(2usize..150, 1..6),
        heads in 1usize..4,
        half in 1usize..8,
        reach in 0usize..90,
        span in 4usize..40,
        p in prop::option::of(0.05f32..0.6),
        seed: u64,
    ) {
        let spans = Arc::new(Spans::of_lengths(lengths));
        let (longest, width) = (spans.iter().map(|span| span.len()).max().unwrap(), heads * 2 * half);
        let mask = p.map(|p| Mask::new(seed, p));
        let rows = |buckets| Arc::new(ByDistance::new(buckets, longest));
        for (sees, queries) in [
            (Sees::All, Queries::All),
            (Sees::Near { reach }, Queries::All),
            (Sees::All, Queries::First),
            (Sees::Near { reach }, Queries::First),
            (Sees::Near { reach }, Queries::Last),
        ] {
            let asking = if matches!(queries, Queries::All) { spans.tokens() } else { spans.len() };
            let how = Attention { spans: spans.clone(), heads, sees, queries, mask, factors: Factors::F32 };
            let x = |i: u64, rows: usize| random(seed ^ i, &[rows, width]);
            let inputs = [x(0, asking), x(1, spans.tokens()), x(2, spans.tokens())];
            compare_within(
                QUERY_TOLERANCE,
                &inputs,
                &[random(seed ^ 3, &[32, heads])],
                |t, p| {
                    let relative = Relative::Bias { table: p[0].clone(), rows: rows(Buckets::T5) };
                    attention::composite(&t[0], &t[1], &t[2], &how, &relative)
                },
                |tape, t, p| {
                    let relative = Relative::Bias { table: p[0].clone(), rows: rows(Buckets::T5) };
                    attention::attention(tape, &t[0], &t[1], &t[2], &how, &relative)
                },
            );
            compare_within(
                QUERY_TOLERANCE,
                &inputs,
                &[],
                |t, _| attention::composite(&t[0], &t[1], &t[2], &how, &Relative::Rotary { theta: 50.0 }),
                |tape, t, _| {
                    attention::attention(tape, &t[0], &t[1], &t[2], &how, &Relative::Rotary { theta: 50.0 })
                },
            );
            let buckets = Buckets::Signed { span, most: Some(100) };
            let tables = [x(4, 2 * span), x(5, 2 * span)];
            for used in [[true, true], [true, false], [false, true]] {
                let tables: Vec<Var> =
                    tables.iter().zip(used).filter(|(_, used)| *used).map(|(table, _)| table.clone()).collect();
                let activations = [&inputs[..], &tables].concat();
                compare_within(
                    QUERY_TOLERANCE,
                    &activations,
                    &[],
                    |t, _| {
                        let (keys, queries) = (used[0].then(|| t[3].clone()), used[1].then(|| t[t.len() - 1].clone()));
                        let relative = Relative::Products { keys, queries, rows: rows(buckets) };
                        attention::composite(&t[0], &t[1], &t[2], &how, &relative)
                    },
                    |tape, t, _| {
                        let (keys, queries) = (used[0].then(|| t[3].clone()), used[1].then(|| t[t.len() - 1].clone()));
                        let relative = Relative::Products { keys, queries, rows: rows(buckets) };
                        attention::attention(tape, &t[0], &t[1], &t[2], &how, &relative)
                    },
                );
            }
        }
    }

    #[test]
    fn self_attention_that_counts_distances_is_its_composite(
        lengths in prop::collection::vec(2usize..100, 1..5),
        heads in 1usize..4,
        half in 2usize..10,
        input in 4usize..40,
        reach in 0usize..50,
        p in prop::option::of(0.05f32..0.6),
        seed: u64,
    ) {
        let (spans, width) = (Arc::new(Spans::of_lengths(lengths)), heads * 2 * half);
        let x = random(seed, &[spans.tokens(), input]);
        let small = |i: u64, rows: usize| {
            Var::from_tensor(&(random(seed ^ i, &[rows, input]).as_tensor() * 0.1).unwrap()).unwrap()
        };
        let how = Attention {
            spans: spans.clone(),
            heads,
            sees: Sees::Near { reach },
            queries: Queries::All,
            mask: p.map(|p| Mask::new(seed, p)),
            factors: Factors::F32,
        };
        let theta = 100.0;
        compare_within(
            QUERY_TOLERANCE,
            std::slice::from_ref(&x),
            &[small(1, width), small(2, width), small(3, width)],
            |t, p| {
                let of = |w: &Weight| linear::composite(&t[0], w, None, Layout::OutIn);
                attention::composite(&of(&p[0])?, &of(&p[1])?, &of(&p[2])?, &how, &Relative::Rotary { theta })
            },
            |tape, t, p| {
                let maps = [&p[0], &p[1], &p[2]].map(|w| LinearMap::new(w, None, Layout::OutIn, Factors::F32).unwrap());
                attention::self_attention(tape, &t[0], maps.each_ref(), &how, &Relative::Rotary { theta })
            },
        );
        let parts = |x: &Tensor| -> Result<Vec<Tensor>> {
            (0..3).map(|i| split::composite(x, i, 3)).collect()
        };
        for relative in [Relative::Rotary { theta }, Relative::Nothing] {
            let of_tensors = match relative {
                Relative::Rotary { theta } => Relative::Rotary { theta },
                _ => Relative::Nothing,
            };
            compare_within(
                QUERY_TOLERANCE,
                std::slice::from_ref(&x),
                &[small(4, 3 * width)],
                |t, p| {
                    let parts = parts(&linear::composite(&t[0], &p[0], None, Layout::OutIn)?)?;
                    attention::composite(&parts[0], &parts[1], &parts[2], &how, &of_tensors)
                },
                |tape, t, p| {
                    let map = LinearMap::new(&p[0], None, Layout::OutIn, Factors::F32)?;
                    attention::self_attention_of_parts(tape, &t[0], &map, &how, &relative)
                },
            );
            compare_within(
                QUERY_TOLERANCE,
                &[random(seed ^ 5, &[spans.tokens(), 3 * width])],
                &[],
                |t, _| {
                    let parts = parts(&t[0])?;
                    attention::composite(&parts[0], &parts[1], &parts[2], &how, &of_tensors)
                },
                |tape, t, _| attention::attention_of_parts(tape, &t[0], &how, &relative),
            );
        }
    }

    #[test]
    fn a_gated_non_linearity_is_its_composite(
        rows in 1usize..300,
        input in 1usize..90,
        inner in 1usize..100,
        width in 8usize..100,
        seed: u64,
    ) {
        let r = |i: u64, shape: &[usize]| random(seed ^ i, shape);
        for how in [Activation::Gelu, Activation::Silu] {
            compare(
                &[r(1, &[rows, 2 * inner])],
                &[],
                |t, _| activation::gated_composite(&t[0], how),
                |tape, t, _| activation::gated(tape, &t[0], how),
            );
            compare(
                &[r(1, &[rows, input])],
                &[r(2, &[2 * inner, input]), r(3, &[2 * inner])],
                |t, p| activation::gated_composite(&mapped(&t[0], &p[0], &p[1])?, how),
                |tape, t, p| linear::linear_gated(tape, &t[0], &map(&p[0], &p[1]), how),
            );
            // a whole feed-forward network with the norm behind it, which has no bias
            compare(
                &[r(1, &[rows, width])],
                &[r(2, &[2 * inner, width]), r(3, &[width, inner]), r(4, &[width])],
                |t, p| {
                    let inner = linear::composite(&t[0], &p[0], None, Layout::OutIn)?;
                    let inner = activation::gated_composite(&inner, how)?;
                    let branch = linear::composite(&inner, &p[1], None, Layout::OutIn)?;
                    residual::composite(&branch, None, &t[0], &p[2], None, 1e-5)
                },
                |tape, t, p| {
                    let of = |w: &Weight| LinearMap::new(w, None, Layout::OutIn, Factors::F32);
                    let (first, second) = (of(&p[0])?, of(&p[1])?);
                    let branch = Branch::FeedForward { x: t[0].clone(), first, how, gated: true, second };
                    let norm = NormWeights { weight: p[2].clone(), bias: None, eps: 1e-5 };
                    Ok(residual_norm(tape, &branch, None, &t[0], &norm)?.1)
                },
            );
        }
    }

    #[test]
    fn attention_over_the_parts_of_one_value_is_its_composite(
        lengths in prop::collection::vec(2usize..150, 1..4),
        heads in 1usize..4,
        d in 1usize..20,
        p in prop::option::of(0.05f32..0.6),
        seed: u64,
    ) {
        let spans = Arc::new(Spans::of_lengths(lengths));
        let x = random(seed, &[spans.tokens(), 3 * heads * d]);
        let mask = p.map(|p| Mask::new(seed, p));
        for sees in [Sees::All, Sees::Causal] {
            let how = Attention { spans: spans.clone(), heads, sees, queries: Queries::All, mask, factors: Factors::F32 };
            compare(
                std::slice::from_ref(&x),
                &[],
                |t, _| {
                    let part = |i| split::composite(&t[0], i, 3);
                    attention::composite(&part(0)?, &part(1)?, &part(2)?, &how, &Relative::Nothing)
                },
                |tape, t, _| attention::attention_of_parts(tape, &t[0], &how, &Relative::Nothing),
            );
        }
    }

    #[test]
    fn a_part_of_the_channels_is_its_composite(rows in 1usize..50, width in 1usize..20, parts in 1usize..5, seed: u64) {
        for index in 0..parts {
            compare(
                &[random(seed, &[rows, parts * width])],
                &[],
                |t, _| split::composite(&t[0], index, parts),
                |tape, t, _| split::split(tape, &t[0], index, parts),
            );
        }
    }

    #[test]
    fn cross_entropy_over_a_vocabulary_is_its_composite(
        rows in prop::collection::vec(prop::option::of(0u32..1_000_000), 1..200),
        input in 1usize..90,
        // of a vocabulary of one every gradient would be rounding
        vocabulary in 2usize..2500,
        smoothing in prop::option::of(0.0f32..0.5),
        with_bias: bool,
        all_ignored in prop::bool::weighted(0.1),
        seed: u64,
    ) {
        let (n, smoothing) = (rows.len(), smoothing.unwrap_or(0.0));
        let targets: Vec<Option<u32>> =
            rows.into_iter().map(|id| id.filter(|_| !all_ignored).map(|id| id % vocabulary as u32)).collect();
        let kept = targets.iter().flatten().count();
        let scale = 1.0 / kept.max(1) as f32;
        let x = random(seed, &[n, input]);
        // a small map, so that no probability is all but one: its gradient would be rounding
        let small = |v: Var| Var::from_tensor(&(v.as_tensor() * 0.1).unwrap()).unwrap();
        let mut parameters = vec![small(random(seed ^ 1, &[vocabulary, input]))];
        parameters.extend(with_bias.then(|| random(seed ^ 2, &[vocabulary])));

        let tracked: Vec<Weight> =
            parameters.iter().map(|v| Weight { values: v.as_tensor().clone(), gradient: None }).collect();
        let losses =
            cross_entropy::composite(x.as_tensor(), &tracked[0], tracked.get(1), &targets, smoothing).unwrap();
        let store = (losses.sum_all().unwrap() * f64::from(scale)).unwrap().backward().unwrap();
        let mut composite = vec![numbers(&losses), numbers(store.get(x.as_tensor()).expect("a gradient"))];
        composite.extend(parameters.iter().map(|v| numbers(store.get(v.as_tensor()).expect("a gradient"))));

        let slots: Vec<Weight> = parameters.iter().map(with_slot).collect();
        let xs = numbers(x.as_tensor());
        let (total, dx) =
            linear_cross_entropy(&xs, &slots[0], slots.get(1), &targets, smoothing, scale, Factors::F32).unwrap();
        let losses = linear_losses(&xs, &slots[0], slots.get(1), &targets, smoothing, Factors::F32).unwrap();
        prop_assert_eq!(total, losses.iter().copied().map(f64::from).sum::<f64>());
        let mut fused = vec![losses, dx];
        fused.extend(slots.iter().map(|w| w.gradient.as_ref().unwrap().lock().dense().expect("a gradient")));
        for (what, (fused, composite)) in ["losses", "dx", "dW", "db"].iter().zip(fused.iter().zip(&composite)) {
            let error = relative(fused, composite);
            prop_assert!(error <= TOLERANCE, "{} off by {:e}", what, error);
            prop_assert!(kept > 0 || fused.iter().all(|&x| x == 0.0));
        }
    }

    #[test]
    fn cross_entropy_of_logits_is_its_composite(
        rows in prop::collection::vec(prop::option::of(0u32..1_000_000), 1..200),
        vocabulary in 2usize..100,
        smoothing in prop::option::of(0.0f32..0.5),
        seed: u64,
    ) {
        let smoothing = smoothing.unwrap_or(0.0);
        let targets: Vec<Option<u32>> = rows.into_iter().map(|id| id.map(|id| id % vocabulary as u32)).collect();
        let logits = random(seed, &[targets.len(), vocabulary]);
        let losses = composite_losses(logits.as_tensor(), &targets, smoothing).unwrap();
        let store = (losses.sum_all().unwrap() * 0.25).unwrap().backward().unwrap();
        let mut fused = numbers(logits.as_tensor());
        let total = cross_entropy::cross_entropy(&mut fused, vocabulary, &targets, smoothing, 0.25).unwrap();
        prop_assert!(relative(&[total as f32], &[numbers(&losses).iter().sum()]) <= TOLERANCE);
        prop_assert!(relative(&fused, &numbers(store.get(logits.as_tensor()).expect("a gradient"))) <= TOLERANCE);
    }
}

/// The second of three sequences changes behind its token 80, in the middle of a block of queries.
#[test]
fn a_later_token_changes_no_earlier_output_and_receives_no_gradient_from_it() {
    let spans = Arc::new(Spans::of_lengths([5, 150, 70]));
    let how = Attention {
        spans,
        heads: 2,
        sees: Sees::Causal,
        queries: Queries::All,
        mask: Some(Mask::new(3, 0.2)),
        factors: Factors::F32,
    };
    const WIDTH: usize = 12;
    let later = (5 + 80) * WIDTH..(5 + 150) * WIDTH;
    let is_later = |i: usize| later.contains(&i);
    let inputs = |changed: bool| -> Vec<Var> {
        let one = |seed: u64| {
            let mut values = numbers(random(seed, &[225, WIDTH]).as_tensor());
            let others = numbers(random(seed + 10, &[225, WIDTH]).as_tensor());
            if changed {
                values[later.clone()].copy_from_slice(&others[later.clone()]);
            }
            Var::from_tensor(&Tensor::from_vec(values, (225, WIDTH), &Device::Cpu).unwrap()).unwrap()
        };
        (1..=3).map(one).collect()
    };
    let mut cotangent = numbers(random(4, &[225, WIDTH]).as_tensor());
    cotangent[later.clone()].fill(0.0);

    // y, dq, dk, dv
    let fused = |changed| {
        on_tape(&inputs(changed), &[], &cotangent, |tape, t, _| {
            attention::attention(tape, &t[0], &t[1], &t[2], &how, &Relative::Nothing)
        })
    };
    let composite = |dtype: DType, changed| {
        let inputs = inputs(changed);
        let t: Vec<Tensor> = inputs.iter().map(|x| x.as_tensor().to_dtype(dtype).unwrap()).collect();
        let y = attention::composite(&t[0], &t[1], &t[2], &how, &Relative::Nothing).unwrap();
        assert_eq!(y.dtype(), dtype);
        let y = y.to_dtype(DType::F32).unwrap();
        let weight = Tensor::from_slice(&cotangent, (225, WIDTH), &Device::Cpu).unwrap();
        let store = (&y * weight).unwrap().sum_all().unwrap().backward().unwrap();
        let gradients = inputs.iter().map(|x| numbers(store.get(x.as_tensor()).expect("a gradient")));
        std::iter::once(numbers(&y)).chain(gradients).collect::<Vec<_>>()
    };
    let exact = composite(DType::F32, false);
    type Form<'a> = &'a dyn Fn(bool) -> Vec<Vec<f32>>;
    let forms: [(&str, Form, f64); 3] = [
        ("fused", &fused, TOLERANCE),
        ("composite", &|changed| composite(DType::F32, changed), TOLERANCE),
        ("composite in bf16", &|changed| composite(DType::BF16, changed), 2e-2),
    ];
    for (form, run, tolerance) in forms {
        let (before, after) = (run(false), run(true));
        for (what, values) in before.iter().enumerate() {
            let error = relative(values, &exact[what]);
            assert!(error <= tolerance, "{form}: result or gradient {what} is {error:e} off");
        }
        for (what, (before, after)) in before.iter().zip(&after).enumerate() {
            for (i, (x, y)) in before.iter().zip(after).enumerate().filter(|(i, _)| !is_later(*i)) {
                assert!(x.is_finite() && x == y, "{form}: result or gradient {what}, number {i}: {x}, {y}");
            }
            let gradient = &before[later.clone()];
            assert!(
                what == 0 || gradient.iter().all(|&x| x == 0.0),
                "{form}: gradient {what} of a later token"
            );
        }
        assert!(later.clone().any(|i| before[0][i] != after[0][i]), "{form}: nothing changed at all");
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    for sees in [Sees::All, Sees::Causal] {
        assert_independent_of_threads(sees);
    }
}

fn assert_independent_of_threads(sees: Sees) {
    let spans = Arc::new(Spans::of_lengths([70, 3, 129]));
    let how = Attention {
        spans,
        heads: 4,
        sees,
        queries: Queries::All,
        mask: Some(Mask::new(5, 0.1)),
        factors: Factors::F32,
    };
    let work = || {
        let shapes: [&[usize]; 8] =
            [&[48, 48], &[48], &[48, 48], &[48], &[300, 48], &[300], &[48, 300], &[48]];
        let parameters: Vec<Var> = (2..).zip(shapes).map(|(seed, shape)| random(seed, shape)).collect();
        let cotangent = numbers(random(1, &[202, 48]).as_tensor());
        on_tape(&[random(1, &[202, 48])], &parameters, &cotangent, |tape, t, p| {
            let x = linear::linear(tape, &t[0], &map(&p[0], &p[1]))?;
            let x = attention::attention(tape, &x, &x, &x, &how, &Relative::Nothing)?;
            let branch = Branch::Linear { x: x.clone(), map: map(&p[2], &p[3]) };
            let (_, x) = residual_norm(tape, &branch, how.mask, &x, &norm(&p[1], &p[3]))?;
            let (first, second) = (map(&p[4], &p[5]), map(&p[6], &p[7]));
            let branch =
                Branch::FeedForward { x: x.clone(), first, how: Activation::Gelu, gated: false, second };
            residual::residual(tape, &branch, how.mask, &x)
        })
        .into_iter()
        .map(|values| values.into_iter().map(f32::to_bits).collect::<Vec<_>>())
        .collect::<Vec<_>>()
    };
    let with = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work);
    let one = with(1);
    for threads in [2, 3, 8] {
        assert_eq!(one, with(threads), "{threads} threads, {sees:?}");
    }
}

#[test]
fn attention_that_counts_distances_does_not_depend_on_the_number_of_threads() {
    let spans = Arc::new(Spans::of_lengths([70, 3, 129]));
    let rows = |buckets| Arc::new(ByDistance::new(buckets, 129));
    let inputs: Vec<Var> = (1..=3).map(|seed| random(seed, &[202, 48])).collect();
    let tables: Vec<Var> = (4..=5).map(|seed| random(seed, &[24, 48])).collect();
    let bias = [random(6, &[32, 4])];
    let cotangent = numbers(random(7, &[202, 48]).as_tensor());
    let products = Buckets::Signed { span: 12, most: Some(100) };
    type Form<'f> = &'f (dyn Fn(&[Arc<TapeValue>], &[Weight]) -> Relative<Arc<TapeValue>> + Sync);
    let forms: [(&[Var], &[Var], Sees, Form); 3] = [
        (&[], &[], Sees::Near { reach: 40 }, &|_, _| Relative::Rotary { theta: 50.0 }),
        (&[], &bias, Sees::All, &|_, p| Relative::Bias { table: p[0].clone(), rows: rows(Buckets::T5) }),
        (&tables, &[], Sees::All, &|t, _| Relative::Products {
            keys: Some(t[3].clone()),
            queries: Some(t[4].clone()),
            rows: rows(products),
        }),
    ];
    for (i, (tables, parameters, sees, relative)) in forms.into_iter().enumerate() {
        let mask = Some(Mask::new(5, 0.1));
        let how = Attention {
            spans: spans.clone(),
            heads: 4,
            sees,
            queries: Queries::All,
            mask,
            factors: Factors::F32,
        };
        let activations = [&inputs[..], tables].concat();
        let work = || -> Vec<Vec<u32>> {
            let found = on_tape(&activations, parameters, &cotangent, |tape, t, p| {
                attention::attention(tape, &t[0], &t[1], &t[2], &how, &relative(t, p))
            });
            found.into_iter().map(|values| values.into_iter().map(f32::to_bits).collect()).collect()
        };
        let with =
            |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work);
        let one = with(1);
        for threads in [2, 3, 8] {
            assert!(one == with(threads), "form {i}, {threads} threads");
        }
    }
}

#[test]
fn the_fused_adamw_is_its_composite_over_many_steps() {
    let manifest = tk::model::manifest::manifest(|o| o.linear(At::body("f").linear(50, 70), &())).unwrap();
    let constants = Constants { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 };
    let run = |kernels| {
        let params = Params::from_scratch(&manifest, Init { seed: 3, std: 0.5 }, &Device::Cpu).unwrap();
        let mut optimizer = AdamW::new(constants, &params, kernels).unwrap();
        for step in 0..5 {
            let mut gradients = Gradients::Slots;
            let given = params
                .iter()
                .zip(1..)
                .map(|((p, _), place)| random(place + 2 * step, &p.shape).as_tensor().clone());
            match kernels {
                Kernels::Composite => {
                    gradients = Gradients::flat(&params, &given.collect::<Vec<_>>()).unwrap()
                }
                Kernels::Fused => given.zip(params.gradients()).for_each(|(given, slot)| {
                    slot.add_values(&given.flatten_all().unwrap().to_vec1::<f32>().unwrap());
                }),
            }
            optimizer.step(&params, &gradients, |_| 1e-2, 0.7).unwrap();
        }
        params.values().unwrap().concat()
    };
    assert!(relative(&run(Kernels::Fused), &run(Kernels::Composite)) < 1e-6);
}

/// Rows of a table that were not looked up are decayed and moved by their running means, as PyTorch's dense AdamW does.
#[test]
fn adamw_on_some_rows_is_adamw_with_zeros_in_the_others() {
    let manifest =
        tk::model::manifest::manifest(|o| o.embed(At::body("x").table(50, 8), Ids::Tokens)).unwrap();
    let constants = Constants { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 };
    let run = |sparse: bool| {
        let params = Params::from_scratch(&manifest, Init { seed: 3, std: 0.5 }, &Device::Cpu).unwrap();
        let mut optimizer = AdamW::new(constants, &params, Kernels::Fused).unwrap();
        for step in 0..6u32 {
            let (ids, slot) = ([step, 7, 49 - step], &params.gradients()[0]);
            let dy: Vec<f32> = random(u64::from(step), &[3, 8]).flatten_all().unwrap().to_vec1().unwrap();
            slot.add_rows(&ids, &dy);
            if !sparse {
                slot.add_values(&[0.0; 400]);
            }
            optimizer.step(&params, &Gradients::Slots, |_| 1e-2, 1.0).unwrap();
        }
        params.values().unwrap()
    };
    assert_eq!(run(true), run(false));
}
