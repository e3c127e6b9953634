//! Each fused operation beside its composite of candle's primitives, and beside what this machine allows.
//!
//!     cargo bench --bench kernels -- [--tokens N] [--width C] [--repeat N] [--bf16]
//!
//! The limit of a pass is the longer of two times. One is that of its FLOPs at the speed of a large product: two for
//! every multiply-add of a matrix product, twice as many backward as forward. What stands between products is not
//! counted, nor is a product that a backward pass computes again.
//!
//! The other is that of copying as many bytes on all threads, where a copied byte counts twice, as read and as
//! written. Operands are read and the result is written once; backward, the result's gradient is read, the operands
//! are read again, and their gradients are written. What an operation keeps between both passes is not counted.
//! Dropout and embedding need no operand for their gradient. Of an embedding the rows count that are looked up; of
//! AdamW the parameter, its gradient and two means that are read, and the three of them that are written. It can be
//! faster than a copy, which also fetches what it overwrites.
//!
//! The first line holds large products against the peak of the unit that computes them. With `--bf16` it is that of bf16's
//! products, which the fused operations have then; the composites stay in fp32.
//!
//! Medians; `gain` is composite over fused. Composites run as they do in training on the CPU: products on all
//! threads, all else in one.

#[path = "common/peak.rs"]
mod peak;

use std::sync::Arc;
use std::time::Instant;

use candle_core::{Device, Tensor, Var};
use rayon::prelude::*;
use tk::Result;
use tk::data::batch::Spans;
use tk::device::TrainingPrecision;
use tk::eager::kernels::attention::{self, Attention, Queries, Relative};
use tk::eager::kernels::buffer::Buffer;
use tk::eager::kernels::cross_entropy::{self, linear_cross_entropy, linear_losses};
use tk::eager::kernels::dropout::{self, Mask, mix};
use tk::eager::kernels::gemm::{Factors, Matrix, MatrixMut, Write, parallel_product};
use tk::eager::kernels::gradient::Gradient;
use tk::eager::kernels::layer_norm::{self, NormWeights};
use tk::eager::kernels::linear::{self, LinearMap};
use tk::eager::kernels::residual::{self, Branch, residual_norm};
use tk::eager::kernels::{activation, embedding};
use tk::eager::tape::{Tape, TapeValue};
use tk::eager::{Init, Kernels, Params, Weight};
use tk::model::manifest::manifest;
use tk::model::ops::{Activation, At, Ids, Layout, Ops, Sees};
use tk::train::gradients::Gradients;
use tk::train::optimizer::{AdamW, Constants};

const HEADS: usize = 12;
const SPAN: usize = 128;
const VOCABULARY: usize = 30_522;
const EPS: f32 = 1e-12;
/// Runs of a composite, which is slow.
const FEW: usize = 3;

fn main() -> Result<()> {
    // SAFETY: no other thread runs yet.
    unsafe { tk::process::prepare() };
    let (mut tokens, mut width, mut repeat, mut factors) = (4096, 384, 10, Factors::F32);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let option = match argument.as_str() {
            "--bench" => continue, // cargo's own
            "--tokens" => &mut tokens,
            "--width" => &mut width,
            "--repeat" => &mut repeat,
            "--bf16" => {
                TrainingPrecision::Bf16.check(&Device::Cpu)?;
                factors = Factors::Bf16;
                continue;
            }
            other => anyhow::bail!("{other}: expected --tokens, --width, --repeat or --bf16"),
        };
        *option = arguments.next().unwrap_or_default().parse()?;
    }
    anyhow::ensure!(tokens > 0 && repeat > 0, "--tokens and --repeat are at least 1");
    anyhow::ensure!(width > 0 && width % HEADS == 0, "--width is a multiple of {HEADS}, the heads");
    // the thread that waits for the pool would take a core of it
    rayon::scope(|_| {
        let bench = Bench { tokens, width, repeat, factors, speed: speed_of_products(factors) };
        bench.head();
        bench.all()
    })
}

struct Bench {
    tokens: usize,
    width: usize,
    repeat: usize,
    /// Of the fused operations' products; composites are in fp32.
    factors: Factors,
    /// FLOPs in a second.
    speed: f64,
}

/// An operation on a tape.
struct Operation {
    name: &'static str,
    /// Of the forward pass.
    flops: usize,
    /// Numbers that are read and written, forward and backward, where that is not what all operands make.
    moved: Option<[usize; 2]>,
    inputs: Vec<Var>,
    parameters: Vec<Var>,
}

/// Seconds of both forms, and what cannot be done without.
struct Measured {
    fused: f64,
    composite: f64,
    limit: f64,
}

impl Bench {
    fn map(&self, weight: &Weight, bias: &Weight) -> candle_core::Result<LinearMap> {
        LinearMap::new(weight, Some(bias), Layout::OutIn, self.factors)
    }

    fn all(&self) -> Result<()> {
        let (t, c, f) = (self.tokens, self.width, 4 * self.width);
        let mask = Mask::new(1, 0.1);

        let operation = |name| Operation::new(name, 2 * t * c * f, &[&[t, c]], &[&[f, c], &[f]]);
        self.compare(
            operation("linear")?,
            |x, p| mapped(&x[0], &p[0], &p[1]),
            |tape, x, p| linear::linear(tape, &x[0], &self.map(&p[0], &p[1])?),
        )?;
        self.compare(
            operation("linear, GELU")?,
            |x, p| activation::composite(&mapped(&x[0], &p[0], &p[1])?, Activation::Gelu),
            |tape, x, p| linear::linear_activation(tape, &x[0], &self.map(&p[0], &p[1])?, Activation::Gelu),
        )?;

        let lengths = (0..t).step_by(SPAN).map(|start| SPAN.min(t - start));
        let pairs: usize = lengths.clone().map(|n| n * n).sum();
        let how = Attention {
            spans: Arc::new(Spans::of_lengths(lengths)),
            heads: HEADS,
            sees: Sees::All,
            queries: Queries::All,
            mask: Some(mask),
            factors: self.factors,
        };
        let (matrix, bias): (&[usize], &[usize]) = (&[c, c], &[c]);
        self.compare(
            // three maps, queries by keys, weights by values
            Operation::new(
                "self-attention",
                6 * t * c * c + 4 * pairs * c,
                &[&[t, c]],
                &[matrix, bias, matrix, bias, matrix, bias],
            )?,
            |x, p| {
                let of = |i: usize| mapped(&x[0], &p[2 * i], &p[2 * i + 1]);
                attention::composite(&of(0)?, &of(1)?, &of(2)?, &how, &Relative::Nothing)
            },
            |tape, x, p| {
                let maps = [self.map(&p[0], &p[1])?, self.map(&p[2], &p[3])?, self.map(&p[4], &p[5])?];
                attention::self_attention(tape, &x[0], maps.each_ref(), &how, &Relative::Nothing)
            },
        )?;

        self.compare(
            Operation::new(
                "linear, residual norm",
                2 * t * c * c,
                &[&[t, c], &[t, c]],
                &[matrix, bias, bias, bias],
            )?,
            |x, p| {
                let branch = mapped(&x[0], &p[0], &p[1])?;
                residual::composite(&branch, Some(mask), &x[1], &p[2], Some(&p[3]), EPS.into())
            },
            |tape, x, p| {
                let branch = Branch::Linear { x: x[0].clone(), map: self.map(&p[0], &p[1])? };
                Ok(residual_norm(tape, &branch, Some(mask), &x[1], &norm(&p[2], &p[3]))?.1)
            },
        )?;
        self.compare(
            Operation::new(
                "feed-forward, norm",
                4 * t * c * f,
                &[&[t, c]],
                &[&[f, c], &[f], &[c, f], bias, bias, bias],
            )?,
            |x, p| {
                let inner = activation::composite(&mapped(&x[0], &p[0], &p[1])?, Activation::Gelu)?;
                let branch = mapped(&inner, &p[2], &p[3])?;
                residual::composite(&branch, Some(mask), &x[0], &p[4], Some(&p[5]), EPS.into())
            },
            |tape, x, p| {
                let (first, second) = (self.map(&p[0], &p[1])?, self.map(&p[2], &p[3])?);
                let branch = Branch::FeedForward {
                    x: x[0].clone(),
                    first,
                    how: Activation::Gelu,
                    gated: false,
                    second,
                };
                Ok(residual_norm(tape, &branch, Some(mask), &x[0], &norm(&p[4], &p[5]))?.1)
            },
        )?;

        self.compare(
            Operation::new("layer norm", 0, &[&[t, c]], &[bias, bias])?,
            |x, p| layer_norm::composite(&x[0], &p[0], Some(&p[1]), EPS.into()),
            |tape, x, p| layer_norm::layer_norm(tape, &x[0], &norm(&p[0], &p[1])),
        )?;
        self.compare(
            Operation::new("GELU", 0, &[&[t, f]], &[])?,
            |x, _| activation::composite(&x[0], Activation::Gelu),
            |tape, x, _| Ok(activation::activate(tape, &x[0], Activation::Gelu)),
        )?;
        self.compare(
            Operation::new("dropout", 0, &[&[t, c]], &[])?.moves([2 * t * c; 2]),
            |x, _| dropout::composite(&x[0], mask),
            |tape, x, _| Ok(dropout::dropout(tape, &x[0], mask)),
        )?;
        // no id twice in as many tokens as there are rows
        let ids: Arc<[u32]> = (0..t).map(|i| (i * 7919 % VOCABULARY) as u32).collect();
        self.compare(
            Operation::new("embedding", 0, &[], &[&[VOCABULARY, c]])?.moves([2 * t * c; 2]),
            |_, p| embedding::composite(&p[0].values, &ids),
            |tape, _, p| embedding::embedding(tape, &p[0], &ids),
        )?;
        self.cross_entropy()?;
        self.adamw()
    }

    /// Measures both forms of an operation, the passes apart.
    fn compare(
        &self,
        operation: Operation,
        composite: impl Fn(&[Tensor], &[Weight]) -> candle_core::Result<Tensor>,
        fused: impl Fn(&Tape, &[Arc<TapeValue>], &[Weight]) -> candle_core::Result<Arc<TapeValue>>,
    ) -> Result<()> {
        let Operation { name, flops, moved, inputs, parameters } = operation;
        let values: Vec<Vec<f32>> =
            inputs.iter().map(|x| x.flatten_all()?.to_vec1()).collect::<candle_core::Result<_>>()?;
        let weights: Vec<Weight> = parameters.iter().map(with_slot).collect();
        let mut result = 0;
        let of_fused = passes(self.repeat, || {
            let tape = Tape::new(true);
            let leaf = |(x, var): (&Vec<f32>, &Var)| tape.leaf(Buffer::of(x), var.dims()[1]);
            let leaves: Vec<Arc<TapeValue>> = values.iter().zip(&inputs).map(leaf).collect();
            let (y, forward) = timed(|| fused(&tape, &leaves, &weights));
            let y = y?;
            result = y.numbers.len();
            let mut dy = Buffer::any(result);
            dy.fill(1.0);
            let (flow, backward) = timed(|| tape.backward(vec![(y, dy)]));
            flow?;
            weights.iter().for_each(forget);
            Ok([forward, backward])
        })?;

        let tensors: Vec<Tensor> = inputs.iter().map(|v| v.as_tensor().clone()).collect();
        let weights: Vec<Weight> = parameters.iter().map(tracked).collect();
        let of_composite = passes(FEW, || {
            let (y, forward) = timed(|| composite(&tensors, &weights));
            let y = y?;
            let (store, backward) = timed(|| y.backward()); // candle begins with ones
            store?;
            Ok([forward, backward])
        })?;

        let operands: usize = inputs.iter().chain(&parameters).map(|v| v.elem_count()).sum();
        let moved = moved.unwrap_or([operands + result, result + 2 * operands]);
        let limits = self.limits([flops, 2 * flops], moved);
        self.row(name, measured(of_fused, of_composite, limits));
        Ok(())
    }

    /// A map onto a vocabulary and the loss behind it, of few tokens. Its backward pass is part of its forward pass.
    fn cross_entropy(&self) -> Result<()> {
        let (t, c, v) = (self.tokens.div_ceil(16), self.width, VOCABULARY);
        let x = random(1, &[t, c], 1.0)?;
        let parameters = [random(2, &[v, c], 0.05)?, random(3, &[v], 0.05)?];
        let targets: Vec<Option<u32>> = (0..t).map(|row| Some((row * 7919 % v) as u32)).collect();

        let (numbers, slots) = (x.flatten_all()?.to_vec1::<f32>()?, parameters.each_ref().map(with_slot));
        let (w, b) = (&slots[0], Some(&slots[1]));
        let fused = passes(self.repeat, || {
            let (losses, forward) = timed(|| linear_losses(&numbers, w, b, &targets, 0.0, self.factors));
            let (loss, both) =
                timed(|| linear_cross_entropy(&numbers, w, b, &targets, 0.0, 1.0, self.factors));
            losses?;
            loss?;
            slots.iter().for_each(forget);
            Ok([forward, both - forward])
        })?;
        let weights = parameters.each_ref().map(tracked);
        let composite = passes(FEW, || {
            let (losses, forward) =
                timed(|| cross_entropy::composite(&x, &weights[0], Some(&weights[1]), &targets, 0.0));
            let losses = losses?;
            let (store, backward) = timed(|| losses.backward());
            store?;
            Ok([forward, backward])
        })?;

        let (flops, operands) = (2 * t * c * v, t * c + v * c + v);
        let limits = self.limits([flops, 2 * flops], [operands + t, 2 * operands]);
        self.row(&format!("cross-entropy, T {t}"), measured(fused, composite, limits));
        Ok(())
    }

    /// A step on a vocabulary's table, all of whose rows have a gradient.
    fn adamw(&self) -> Result<()> {
        let manifest = manifest(|o| o.embed(At::body("x").table(VOCABULARY, self.width), Ids::Tokens))?;
        let constants = Constants { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };
        let gradient = random(1, &[VOCABULARY, self.width], 1.0)?;
        let numbers = gradient.flatten_all()?.to_vec1::<f32>()?;
        let run = |kernels, repeat| {
            let params = Params::from_scratch(&manifest, Init { seed: 1, std: 0.02 }, &Device::Cpu)?;
            let mut optimizer = AdamW::new(constants, &params, kernels)?;
            passes(repeat, || {
                let gradients = match kernels {
                    Kernels::Composite => Gradients::flat(&params, &[gradient.as_detached_tensor()])?,
                    Kernels::Fused => {
                        params.gradients()[0].add_values(&numbers);
                        Gradients::Slots
                    }
                };
                let (done, seconds) = timed(|| optimizer.step(&params, &gradients, |_| 1e-5, 1.0));
                done?;
                Ok([seconds, 0.0])
            })
        };
        let (fused, composite) = (run(Kernels::Fused, self.repeat)?, run(Kernels::Composite, FEW)?);
        let limits = self.limits([0, 0], [7 * numbers.len(), 0]);
        let [step, _] = measured(fused, composite, limits);
        self.row("AdamW, a step", [step]);
        Ok(())
    }

    /// The least seconds of a forward and of a backward pass.
    fn limits(&self, flops: [usize; 2], moved: [usize; 2]) -> [f64; 2] {
        [0, 1].map(|pass| (flops[pass] as f64 / self.speed).max(copying(moved[pass])))
    }

    fn head(&self) {
        let share = peak::peak(self.factors).map(|(unit, peak)| {
            format!(" ({:.0} % of {unit}'s {:.0})", 100.0 * self.speed / peak, peak / 1e9)
        });
        let share = share.unwrap_or_default();
        println!(
            "{} tokens, width {}, {} threads: products {:.0} GFLOP/s{share}, copies {:.1} GB/s\n",
            self.tokens,
            self.width,
            rayon::current_num_threads(),
            self.speed / 1e9,
            bytes(LARGEST) / copying(LARGEST) / 1e9,
        );
        let columns =
            format!("{:>9}{:>11}{:>9}{:>13}{:>7}", "fused", "composite", "limit", "fused/limit", "gain");
        println!("{:22}{:>49}   {:>49}", "milliseconds", "forward", "forward and backward");
        println!("{:22}{columns}   {columns}", "");
    }

    /// A forward pass, and both where there are two.
    fn row<const N: usize>(&self, name: &str, measured: [Measured; N]) {
        let columns = measured.map(|Measured { fused, composite, limit }| {
            let (over, gain) = (fused / limit, composite / fused);
            let [fused, composite, limit] = [fused, composite, limit].map(|seconds| 1e3 * seconds);
            format!("{fused:9.2}{composite:11.1}{limit:9.2}{over:13.2}{gain:7.1}")
        });
        println!("{name:22}{}", columns.join("   "));
    }
}

/// A forward pass, and both together.
fn measured(fused: [f64; 2], composite: [f64; 2], limits: [f64; 2]) -> [Measured; 2] {
    let limits = [limits[0], limits[0] + limits[1]];
    [0, 1].map(|i| Measured { fused: fused[i], composite: composite[i], limit: limits[i] })
}

impl Operation {
    fn new(name: &'static str, flops: usize, inputs: &[&[usize]], parameters: &[&[usize]]) -> Result<Self> {
        let of = |shapes: &[&[usize]], seed: u64, scale| -> Result<Vec<Var>> {
            (seed..).zip(shapes).map(|(seed, shape)| random(seed, shape, scale)).collect()
        };
        let (inputs, parameters) = (of(inputs, 1, 1.0)?, of(parameters, 10, 0.05)?);
        Ok(Self { name, flops, moved: None, inputs, parameters })
    }

    fn moves(self, numbers: [usize; 2]) -> Self {
        Self { moved: Some(numbers), ..self }
    }
}

/// The median seconds of the first pass, and of both together. The first run allocates, and does not count.
fn passes(repeat: usize, mut run: impl FnMut() -> Result<[f64; 2]>) -> Result<[f64; 2]> {
    run()?;
    let runs = (0..repeat).map(|_| run()).collect::<Result<Vec<_>>>()?;
    let median = |of: fn(&[f64; 2]) -> f64| {
        let mut seconds: Vec<f64> = runs.iter().map(of).collect();
        seconds.sort_by(f64::total_cmp);
        seconds[seconds.len() / 2]
    };
    Ok([median(|run| run[0]), median(|run| run[0] + run[1])])
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, f64) {
    let started = Instant::now();
    let result = work();
    (result, started.elapsed().as_secs_f64())
}

/// The seconds of the fastest of five.
fn fastest(mut work: impl FnMut()) -> f64 {
    (0..5).map(|_| timed(&mut work).1).fold(f64::INFINITY, f64::min)
}

/// The FLOPs in a second of a product whose matrices are too large for the caches.
fn speed_of_products(factors: Factors) -> f64 {
    let (m, n, k) = (4096, 1536, 1536);
    let (a, b, mut c) = (vec![0.5; m * k], vec![0.5; k * n], vec![0.0; m * n]);
    let seconds = fastest(|| {
        let dst = MatrixMut::new(&mut c, m, n, n);
        let (a, b) = (Matrix::new(&a, m, k, k), Matrix::new(&b, k, n, n));
        parallel_product(dst, Write::Replace, a, b, factors);
    });
    2.0 * (m * n * k) as f64 / seconds
}

/// Numbers moved (256 MiB) whose copy is measured; that of more takes as much longer.
const LARGEST: usize = 64 * 1024 * 1024;

/// Seconds of reading and writing so many numbers, half of them each, on all threads. Few of them stay in the caches,
/// as an operation's do.
fn copying(moved: usize) -> f64 {
    const CHUNK: usize = 16 * 1024;
    if moved == 0 {
        return 0.0;
    }
    let n = moved.min(LARGEST).div_ceil(2);
    let (from, mut to) = (vec![0.5f32; n], vec![0.0f32; n]);
    let seconds = fastest(|| {
        to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK)).for_each(|(to, from)| to.copy_from_slice(from));
    });
    seconds * moved as f64 / (2 * n) as f64
}

fn bytes(numbers: usize) -> f64 {
    (size_of::<f32>() * numbers) as f64
}

/// Numbers between −2 and 2, times `scale`, that a seed and a place decide.
fn random(seed: u64, shape: &[usize], scale: f32) -> Result<Var> {
    let number = |i| ((mix(seed << 32 | i) >> 40) as f32 / (1u64 << 22) as f32 - 2.0) * scale;
    let numbers: Vec<f32> = (0..shape.iter().product::<usize>() as u64).map(number).collect();
    Ok(Var::from_tensor(&Tensor::from_vec(numbers, shape, &Device::Cpu)?)?)
}

/// A parameter of a fused operation.
fn with_slot(var: &Var) -> Weight {
    Weight { values: var.as_detached_tensor(), gradient: Some(Arc::new(Gradient::new(var.dims()))) }
}

/// A parameter of a composite.
fn tracked(var: &Var) -> Weight {
    Weight { values: var.as_tensor().clone(), gradient: None }
}

/// What a step does with a gradient in the end.
fn forget(weight: &Weight) {
    if let Some(gradient) = &weight.gradient {
        gradient.lock().clear();
    }
}

/// What [`map`] computes, in candle's operations.
fn mapped(x: &Tensor, weight: &Weight, bias: &Weight) -> candle_core::Result<Tensor> {
    linear::composite(x, weight, Some(bias), Layout::OutIn)
}

fn norm(weight: &Weight, bias: &Weight) -> NormWeights {
    NormWeights { weight: weight.clone(), bias: Some(bias.clone()), eps: EPS }
}
