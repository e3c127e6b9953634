//! Every fused kernel against its composite of candle's primitives: results and all gradients, over random shapes.

mod common;

use std::sync::Arc;

use candle_core::{Device, Result, Tensor, Var};
use common::relative;
use proptest::prelude::*;
use tk::data::batch::Spans;
use tk::eager::kernels::activation::activate;
use tk::eager::kernels::attention::attention;
use tk::eager::kernels::dropout::{Mask, dropout};
use tk::eager::kernels::embedding::embedding;
use tk::eager::kernels::layer_norm::layer_norm;
use tk::eager::kernels::linear::linear;
use tk::eager::{Init, Kernels, Params};
use tk::model::ops::{Activation, At};
use tk::train::optimizer::{AdamW, Constants};

/// Both forms round differently; candle's own GELU gradients use six-digit constants.
const TOLERANCE: f64 = 5e-6;

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

/// Runs both forms and compares the result and the gradient of each variable under a random cotangent.
fn compare(variables: &[Var], run: impl Fn(Kernels, &[Tensor]) -> Result<Tensor>) {
    let tensors: Vec<Tensor> = variables.iter().map(|v| v.as_tensor().clone()).collect();
    let form = |kernels| {
        let y = run(kernels, &tensors).unwrap();
        let cotangent = random(99, y.dims());
        let gradients = (&y * cotangent.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
        let of = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let mut all = vec![of(&y)];
        all.extend(variables.iter().map(|v| of(gradients.get(v.as_tensor()).expect("a gradient"))));
        all
    };
    for (i, (fused, composite)) in form(Kernels::Fused).iter().zip(&form(Kernels::Composite)).enumerate() {
        let error = relative(fused, composite);
        assert!(error <= TOLERANCE, "{} is {error:e} off", if i == 0 { "result" } else { "gradient" });
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn linear_is_its_composite(rows in 1usize..300, input in 1usize..90, output in 1usize..200, seed: u64) {
        let variables = [random(seed, &[rows, input]), random(seed ^ 1, &[output, input]), random(seed ^ 2, &[output])];
        compare(&variables, |kernels, t| linear(kernels, &t[0], &t[1], &t[2]));
    }

    #[test]
    fn layer_norm_is_its_composite(rows in 1usize..100, width in 2usize..150, seed: u64) {
        let variables = [random(seed, &[rows, width]), random(seed ^ 1, &[width]), random(seed ^ 2, &[width])];
        compare(&variables, |kernels, t| layer_norm(kernels, &t[0], &t[1], &t[2], 1e-5));
    }

    #[test]
    fn activations_are_their_composites(n in 1usize..40_000, seed: u64) {
        let variables = [random(seed, &[n])];
        for how in [Activation::Gelu, Activation::GeluTanh] {
            compare(&variables, |kernels, t| activate(kernels, &(&t[0] * 3.0)?, how));
        }
    }

    #[test]
    fn dropout_is_its_composite(n in 1usize..5_000, key: u64, p in 0.0f32..0.9) {
        compare(&[random(key, &[n])], |kernels, t| dropout(kernels, &t[0], Mask::new(key, p)));
    }

    #[test]
    fn embedding_is_its_composite(rows in 1usize..700, width in 1usize..40, ids in prop::collection::vec(0u32..700, 1..200)) {
        let ids: Arc<[u32]> = ids.into_iter().map(|id| id % rows as u32).collect();
        compare(&[random(7, &[rows, width])], |kernels, t| embedding(kernels, &t[0], &ids));
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
        let shape = [spans.tokens(), heads * d];
        let variables = [random(seed, &shape), random(seed ^ 1, &shape), random(seed ^ 2, &shape)];
        let mask = p.map(|p| Mask::new(seed, p));
        compare(&variables, |kernels, t| attention(kernels, &t[0], &t[1], &t[2], &spans, heads, mask));
    }
}

#[test]
fn tensors_that_are_not_contiguous_are_taken_as_they_are_meant() {
    let variables = [random(1, &[40, 30]), random(2, &[20, 40]), random(3, &[20])];
    compare(&variables, |kernels, t| linear(kernels, &t[0].t()?, &t[1], &t[2]));
    compare(&variables[..1], |kernels, t| activate(kernels, &t[0].narrow(1, 3, 20)?, Activation::Gelu));
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let spans = Arc::new(Spans::of_lengths([70, 3, 129]));
    let work = || {
        let x = random(1, &[202, 48]);
        let (w, b) = (random(2, &[48, 48]), random(3, &[48]));
        let h = linear(Kernels::Fused, x.as_tensor(), w.as_tensor(), b.as_tensor()).unwrap();
        let h = attention(Kernels::Fused, &h, &h, &h, &spans, 4, Some(Mask::new(5, 0.1))).unwrap();
        let h = layer_norm(Kernels::Fused, &h, b.as_tensor(), b.as_tensor(), 1e-12).unwrap();
        let store = h.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let bits = |v: &Var| -> Vec<u32> {
            let gradient = store.get(v.as_tensor()).unwrap().flatten_all().unwrap();
            gradient.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
        };
        (bits(&x), bits(&w), bits(&b))
    };
    let with = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work);
    assert_eq!(with(1), with(3));
}

#[test]
fn the_fused_adamw_is_its_composite_over_many_steps() {
    let manifest = tk::model::manifest::manifest(|o| {
        use tk::model::ops::Ops;
        o.linear(At::body("f").linear(50, 70), &())
    })
    .unwrap();
    let constants = Constants { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 };
    let run = |kernels| {
        let params = Params::from_scratch(&manifest, Init { seed: 3, std: 0.5 }, &Device::Cpu).unwrap();
        let mut optimizer = AdamW::with_kernels(constants, &params, kernels).unwrap();
        for step in 0..5 {
            let gradients: Vec<Tensor> =
                params.iter().map(|(p, _)| random(step, &p.shape).as_tensor().clone()).collect();
            optimizer.step(&params, &gradients, 1e-2, 0.7).unwrap();
        }
        params.values().unwrap().concat()
    };
    assert!(relative(&run(Kernels::Fused), &run(Kernels::Composite)) < 1e-6);
}
