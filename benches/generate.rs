//! Reading prompts and generating behind them, greedily, through an exported graph.
//!
//!     cargo bench --bench generate -- MODEL [--batch 1,8,32] [--prompt N | --prompts FILE] [--new N]
//!         [--precision fp32|q8|q4] [--capacity N] [--repeat N] [--json]
//!
//! FILE is a JSON list of prompts of one length, each a list of ids; without it they are made up.

use std::path::PathBuf;
use std::time::Instant;

use clap::ValueEnum;
use serde_json::json;
use tk::Result;
use tk::generate::GenerationConfig;
use tk::generate::batch::TOGETHER;
use tk::generate::sampler::Sampler;
use tk::onnx::Precision;
use tk::predict::graphs;
use tk::runtime::Slots;
use tk::runtime::slots::SlotRead;
use tk::say::Say;

/// One shape's seconds and what was generated.
struct Run {
    prefill: f64,
    /// Seconds of the steps behind the first token.
    decode: f64,
    /// Each slot's new tokens.
    tokens: Vec<Vec<i64>>,
}

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
    let mut slots = Slots::open(&graphs::generating(&model, precision), threads, Say::default())?;
    let prompts: Vec<Vec<i64>> = match prompts {
        Some(file) => serde_json::from_slice(&std::fs::read(file)?)?,
        None => made_up(batches.iter().copied().max().unwrap_or(1), prompt, slots.vocabulary()),
    };
    let bytes = weights(&model, precision)?;
    for batch in batches {
        slots.resize(0, 0)?;
        slots.resize(batch, capacity)?;
        run(&mut slots, &prompts, 4)?;
        let mut runs = (0..repeat).map(|_| run(&mut slots, &prompts, new)).collect::<Result<Vec<_>>>()?;
        let mut median = |seconds: fn(&Run) -> f64| {
            runs.sort_by(|a, b| seconds(a).total_cmp(&seconds(b)));
            seconds(&runs[runs.len() / 2])
        };
        let (prefill, decode) = (median(|run| run.prefill), median(|run| run.decode));
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

/// Prompts of so many tokens.
fn made_up(count: usize, length: usize, vocabulary: usize) -> Vec<Vec<i64>> {
    let id = |slot: usize, i: usize| ((i * 7919 + slot * 104_729 + 1) % (vocabulary - 1)) as i64;
    (0..count).map(|slot| (0..length).map(|i| id(slot, i)).collect()).collect()
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

/// Reads a prompt in each slot, and goes on in all of them together.
fn run(slots: &mut Slots, prompts: &[Vec<i64>], new: usize) -> Result<Run> {
    let (rows, width) = (slots.slots(), slots.vocabulary());
    anyhow::ensure!(prompts.len() >= rows, "{} prompts for {rows} slots", prompts.len());
    let mut greedy = Sampler::new(&GenerationConfig::default(), 0);
    let mut likeliest = |row: &mut [f32]| i64::from(greedy.next(row, &[]));
    let started = Instant::now();
    let mut ids = Vec::new();
    let length = prompts.first().map_or(0, Vec::len);
    let together = (TOGETHER / length.max(1)).max(1);
    for (group, prompts) in prompts[..rows].chunks(together).enumerate() {
        let start = group * together;
        let (slots_read, asked) = (start..start + prompts.len(), [length as i64 - 1]);
        let lengths = vec![0; prompts.len()];
        let reading =
            SlotRead { slots: &slots_read, ids: &prompts.concat(), lengths: &lengths, asked: &asked };
        ids.extend(slots.read(reading)?.chunks_exact_mut(width).map(&mut likeliest));
    }
    let prefill = started.elapsed().as_secs_f64();
    let mut lengths: Vec<usize> = prompts.iter().take(rows).map(Vec::len).collect();
    let mut tokens: Vec<Vec<i64>> = ids.iter().map(|&id| vec![id]).collect();
    for _ in 1..new {
        let reading = SlotRead { slots: &(0..rows), ids: &ids, lengths: &lengths, asked: &[0] };
        ids = slots.read(reading)?.chunks_exact_mut(width).map(&mut likeliest).collect();
        tokens.iter_mut().zip(&ids).for_each(|(tokens, &id)| tokens.push(id));
        lengths.iter_mut().for_each(|length| *length += 1);
    }
    Ok(Run { prefill, decode: started.elapsed().as_secs_f64() - prefill, tokens })
}
