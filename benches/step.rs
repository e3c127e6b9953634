//! One optimizer step on full-length batches of random tokens, beside the matrix products that it cannot do
//! without.
//!
//!     cargo bench --bench step -- [--model minilm|base|distilbert|roberta|gpt2] [--lora RANK] [--repeat N] [--json]
//!                                 [--precision fp32|bf16] [--device cpu|cuda|cuda:N] [BATCHxLENGTH …]
//!
//! The bare products are the CPU's; on a GPU there are none.

use std::time::Instant;

use candle_core::Device;
use serde_json::json;
use tk::Result;
use tk::data::batch::Encoding;
use tk::device::TrainingPrecision;
use tk::eager::kernels::gemm::{Factors, Matrix, MatrixMut, Write, parallel_product};
use tk::eager::{Init, Params};
use tk::model::ModelConfig;
use tk::model::ops::{Param, Part, Role};
use tk::say::peak_rss_bytes;
use tk::task::causal_lm::NextTokens;
use tk::task::text_classification::{ProblemType, Wanted, Window};
use tk::task::{CausalLm, Example, Objective, Target, Task, TextClassification};
use tk::train::Settings;
use tk::train::lora::LoraFlags;
use tk::train::trainer::Trainer;

fn main() -> Result<()> {
    // SAFETY: no other thread runs yet.
    unsafe { tk::process::prepare() };
    let mut model = "minilm".to_owned();
    let (mut repeat, mut as_json, mut shapes) = (5, false, Vec::new());
    let mut device = "cpu".to_owned();
    let (mut lora, mut precision) = (LoraFlags::default(), TrainingPrecision::Fp32);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--bench" => {} // cargo's own
            "--json" => as_json = true,
            "--model" => model = arguments.next().unwrap_or_default(),
            "--lora" => lora.lora_rank = Some(arguments.next().unwrap_or_default().parse()?),
            "--precision" => match arguments.next().as_deref() {
                Some("fp32") => precision = TrainingPrecision::Fp32,
                Some("bf16") => precision = TrainingPrecision::Bf16,
                _ => anyhow::bail!("--precision: expected fp32 or bf16"),
            },
            "--device" => device = arguments.next().unwrap_or_default(),
            "--repeat" => repeat = arguments.next().unwrap_or_default().parse()?,
            shape => match shape.split_once('x') {
                Some((batch, length)) => shapes.push((batch.parse()?, length.parse()?)),
                None => anyhow::bail!("{shape}: expected BATCHxLENGTH"),
            },
        }
    }
    if shapes.is_empty() {
        shapes.push(match model.as_str() {
            "gpt2" => (4, 256),
            "minilm" => (32, 128),
            _ => (8, 128),
        });
    }
    // the thread that waits for the pool would take a core of it
    let device = tk::device::open(&device)?;
    precision.check(&device)?;
    let settings = Settings { precision, ..Settings::default() };
    rayon::scope(|_| {
        shapes
            .iter()
            .try_for_each(|&shape| report(&model, &lora, (&settings, &device), shape, repeat, as_json))
    })
}

fn report(
    model: &str,
    lora: &LoraFlags,
    how: (&Settings, &Device),
    (batch, length): (usize, usize),
    repeat: usize,
    as_json: bool,
) -> Result<()> {
    let (step, products, peak) = measure(model, lora, how, (batch, length), repeat)?;
    let tokens = (batch * length) as f64;
    if as_json {
        let line = json!({
            "model": model, "batch": batch, "length": length, "seconds": step,
            "tokens_per_second": tokens / step, "products_seconds": products, "peak_rss_bytes": peak,
        });
        println!("{line}");
    } else {
        let products = products.map(|products| {
            format!("  bare products {:8.1} ms  ratio {:.2}", 1e3 * products, step / products)
        });
        println!(
            "{model} {batch:>2} × {length:<3}  step {:8.1} ms  {:6.0} tokens/s{}",
            1e3 * step,
            tokens / step,
            products.unwrap_or_default()
        );
    }
    Ok(())
}

/// The median seconds of a step, and of the bare products of one that trains the whole model; the process's peak memory
/// after two steps.
fn measure(
    model: &str,
    lora: &LoraFlags,
    (settings, device): (&Settings, &Device),
    (batch, length): (usize, usize),
    repeat: usize,
) -> Result<(f64, Option<f64>, u64)> {
    let mut config = ModelConfig::parse(&config(model)?)?;
    let generates = config.family.class(CausalLm::HEAD).is_some();
    let task = match generates {
        true => Task::from(CausalLm::from_config(&config)?),
        false => Task::from(TextClassification::new(
            ProblemType::SingleLabelClassification,
            ["a", "b", "c"].map(str::to_owned).to_vec(),
        )),
    };
    config.family = config.family.clone().adapted(lora.chosen(&config.family, task.head())?);
    let manifest = task.params(&config.family)?;
    let mut params = Params::from_scratch(&manifest, Init { seed: 1, std: 0.02 }, device)?;
    if lora.lora_rank.is_some() {
        params.freeze(|param| !matches!(param.part, Part::Adapter | Part::Labels));
    }
    let examples: Vec<Example> = (0..batch)
        .map(|i| {
            // none is roberta's padding, 1, behind which it counts positions
            let ids = (0..length).map(|t| 2 + ((i * length + t) * 7919 % 30_000) as u32).collect();
            let encoding = Encoding { ids, type_ids: vec![0; length], truncated: false };
            let target = match generates {
                true => {
                    Target::CausalLm(NextTokens { predicted: (0..length).map(|t| t > 0).collect(), bytes: 0 })
                }
                false => Target::TextClassification(Window::whole(i, Wanted::Class(i as u32 % 3))),
            };
            Example { encoding, target }
        })
        .collect();
    let micro_batches: [Vec<&Example>; 1] = [examples.iter().collect()];
    let mut trainer = Trainer::new(settings, &config.family, &task, &params, device, repeat + 2)?;
    for _ in 0..2 {
        trainer.step(&micro_batches)?; // the first one allocates
    }
    let peak = peak_rss_bytes();
    let factors = match settings.precision {
        TrainingPrecision::Bf16 => Factors::Bf16,
        _ => Factors::F32,
    };
    let mut products = device.is_cpu().then(|| Products::new(&manifest, batch, length, factors));
    products.iter_mut().for_each(Products::run);
    let (mut steps, mut bare) = (Vec::new(), Vec::new());
    for _ in 0..repeat {
        let started = Instant::now();
        trainer.step(&micro_batches)?;
        steps.push(started.elapsed().as_secs_f64());
        let started = Instant::now();
        products.iter_mut().for_each(Products::run);
        bare.push(started.elapsed().as_secs_f64());
    }
    Ok((median(steps), products.map(|_| median(bare)), peak))
}

/// The products of a step: forward, the input's gradient and the weight's gradient of every linear map of the layers.
/// Of a classifier, the last layer's maps but those of keys and values are applied to the tokens that the head looks
/// at; a language model's head is a map of all.
struct Products {
    /// (tokens, out, in)
    shapes: Vec<[usize; 3]>,
    /// As wide as the widest activation: x, y, and what is written.
    activations: [Vec<f32>; 3],
    /// As large as the largest matrix: W, and what is written.
    weights: [Vec<f32>; 2],
    factors: Factors,
}

impl Products {
    fn new(manifest: &[Param], batch: usize, length: usize, factors: Factors) -> Self {
        let classifies = manifest.iter().any(|param| param.part == Part::Head);
        let is_map = |param: &&Param| match param.role {
            Role::Matrix => param.part == Part::Body,
            Role::Table => !classifies && param.name.ends_with("wte.weight"), // which is the head, too
            _ => false,
        };
        let maps: Vec<&Param> = manifest.iter().filter(is_map).collect();
        let layer = |param: &Param| param.name.split('.').find_map(|part| part.parse::<usize>().ok());
        let last = maps.iter().filter_map(|param| layer(param)).max();
        let shapes: Vec<[usize; 3]> = maps
            .iter()
            .map(|param| {
                let of_all = ["self.key", "self.value", "k_lin", "v_lin", "attn.k.", "attn.v.", "Wqkv"]
                    .iter()
                    .any(|name| param.name.contains(name));
                let picked = classifies && layer(param) == last && !of_all;
                let tokens = if picked { batch } else { batch * length };
                [tokens, param.shape[0], param.shape[1]]
            })
            .collect();
        let most = |size: fn(&[usize; 3]) -> usize| shapes.iter().map(size).max().unwrap_or(1);
        let (activation, weight) = (
            most(|[tokens, output, input]| tokens * output.max(input)),
            most(|[_, output, input]| output * input),
        );
        Self {
            activations: [(); 3].map(|()| vec![0.5; activation]),
            weights: [(); 2].map(|()| vec![0.5; weight]),
            shapes,
            factors,
        }
    }

    fn run(&mut self) {
        let ([x, y, out], [w, dw]) = (&mut self.activations, &mut self.weights);
        for &[t, output, input] in &self.shapes {
            let (x, y) = (Matrix::new(x, t, input, input), Matrix::new(y, t, output, output));
            let w = Matrix::new(w, output, input, input);
            let factors = self.factors;
            parallel_product(
                MatrixMut::new(out, t, output, output),
                Write::Replace,
                x,
                w.transposed(),
                factors,
            );
            parallel_product(MatrixMut::new(out, t, input, input), Write::Replace, y, w, factors);
            parallel_product(
                MatrixMut::new(dw, output, input, input),
                Write::Replace,
                y.transposed(),
                x,
                factors,
            );
        }
    }
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

/// The text of a `config.json` of the named size.
fn config(model: &str) -> Result<String> {
    let bert = |width: usize, layers: usize| {
        json!({
            "model_type": "bert", "vocab_size": 30522, "hidden_size": width, "num_hidden_layers": layers,
            "num_attention_heads": 12, "intermediate_size": 4 * width, "max_position_embeddings": 512,
        })
    };
    let config = match model {
        "minilm" => bert(384, 6),
        "base" => bert(768, 12),
        "distilbert" => json!({
            "model_type": "distilbert", "vocab_size": 30522, "dim": 768, "n_layers": 6, "n_heads": 12,
            "hidden_dim": 3072, "max_position_embeddings": 512,
        }),
        "roberta" => json!({
            "model_type": "roberta", "vocab_size": 50265, "hidden_size": 768, "num_hidden_layers": 12,
            "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 514,
            "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1,
        }),
        "gpt2" => json!({
            "model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12,
            "n_head": 12,
        }),
        "electra" => json!({
            "model_type": "electra", "vocab_size": 30522, "embedding_size": 768, "hidden_size": 768,
            "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
            "max_position_embeddings": 512,
        }),
        "mpnet" => json!({
            "model_type": "mpnet", "vocab_size": 30527, "hidden_size": 768, "num_hidden_layers": 12,
            "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 514,
            "layer_norm_eps": 1e-5,
        }),
        "modernbert" => json!({
            "model_type": "modernbert", "vocab_size": 50368, "hidden_size": 768, "num_hidden_layers": 22,
            "num_attention_heads": 12, "intermediate_size": 1152, "max_position_embeddings": 8192,
        }),
        // version 3
        "deberta" => json!({
            "model_type": "deberta-v2", "vocab_size": 128100, "hidden_size": 768, "num_hidden_layers": 12,
            "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 512,
            "relative_attention": true, "position_buckets": 256, "norm_rel_ebd": "layer_norm",
            "share_att_key": true, "pos_att_type": "p2c|c2p", "position_biased_input": false,
            "type_vocab_size": 0, "layer_norm_eps": 1e-7,
        }),
        _ => anyhow::bail!(
            "--model {model}: expected minilm, base, distilbert, roberta, electra, mpnet, modernbert, deberta or gpt2"
        ),
    };
    Ok(config.to_string())
}
