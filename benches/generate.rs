//! Reading prompts and generating behind them, greedily, through an exported graph.
//!
//!     cargo bench --bench generate -- MODEL [--batch 1,8,32] [--prompt N | --prompts FILE] [--new N]
//!         [--precision fp32|q8|q4] [--capacity N] [--repeat N] [--json]
//!
//! FILE is a JSON list of prompts of one length, each a list of ids; without it they are made up.

use std::path::PathBuf;

use clap::ValueEnum;
use serde_json::json;
use tk::Result;
use tk::bench::{generated, made_up, medians};
use tk::onnx::Precision;
use tk::predict::graphs;
use tk::runtime::{Provider, Providers, Slots};
use tk::say::Say;

fn main() -> Result<()> {
    // SAFETY: no other thread runs yet.
    unsafe { tk::process::prepare() };
    let (mut model, mut batches) = (None, vec![1, 8, 32]);
    let (mut prompt, mut new, mut capacity, mut repeat) = (64, 48, 256, 3);
    let (mut precision, mut as_json, mut prompts) = (Precision::Fp32, false, None);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_default();
        match argument.as_str() {
            "--bench" => {} // cargo's own
            "--json" => as_json = true,
            "--batch" => batches = value().split(',').map(str::parse).collect::<Result<_, _>>()?,
            "--prompt" => prompt = value().parse()?,
            "--prompts" => prompts = Some(value()),
            "--new" => new = value().parse()?,
            "--capacity" => capacity = value().parse()?,
            "--repeat" => repeat = value().parse()?,
            "--precision" => precision = Precision::from_str(&value(), false).map_err(anyhow::Error::msg)?,
            _ => model = Some(PathBuf::from(argument)),
        }
    }
    let Some(model) = model else {
        anyhow::bail!("MODEL is missing: a directory that `tk export` has written to")
    };
    let threads = rayon::current_num_threads();
    let mut slots = Slots::open(
        &graphs::generating(&model, precision),
        &Providers::only(Provider::Cpu),
        threads,
        Say::default(),
    )?;
    let prompts: Vec<Vec<i64>> = match prompts {
        Some(file) => serde_json::from_slice(&std::fs::read(file)?)?,
        None => made_up(batches.iter().copied().max().unwrap_or(1), prompt, slots.vocabulary()),
    };
    let bytes = weights(&model, precision)?;
    for batch in batches {
        slots.resize(0, 0)?;
        slots.resize(batch, capacity)?;
        generated(&mut slots, &prompts, 4)?;
        let runs = (0..repeat).map(|_| generated(&mut slots, &prompts, new)).collect::<Result<Vec<_>>>()?;
        let [prefill, decode] = medians(&runs);
        let rate = (batch * (new - 1)) as f64 / decode;
        if as_json {
            let line = json!({
                "batch": batch, "precision": precision.name(), "prefill_seconds": prefill,
                "decode_tokens_per_second": rate, "bytes_per_step": bytes, "tokens": runs[0].tokens,
            });
            println!("{line}");
        } else {
            let ms = prefill * 1e3;
            println!("{precision} {batch:>2} × {prompt:<3}  prefill {ms:8.1} ms  decode {rate:7.1} tokens/s");
        }
    }
    Ok(())
}

/// The bytes of weights that a step reads: all but the positions', of which it reads a row.
fn weights(model: &std::path::Path, precision: Precision) -> Result<u64> {
    let file = match precision {
        Precision::Fp32 => graphs::path(model).with_extension("onnx_data"),
        _ => graphs::generating(model, precision),
    };
    let config: serde_json::Value = serde_json::from_slice(&std::fs::read(model.join("config.json"))?)?;
    let number = |name: &str| config[name].as_u64().unwrap_or_default();
    Ok(std::fs::metadata(file)?.len() - 4 * number("n_positions") * number("n_embd"))
}
