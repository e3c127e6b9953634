//! Reading prompts of random tokens and generating behind them, greedily, through an exported graph.
//!
//!     cargo bench --bench generate -- MODEL [--batch 1,8,32] [--prompt N] [--new N] [--precision fp32|q8|q4]
//!         [--capacity N] [--repeat N] [--json]

use std::path::PathBuf;
use std::time::Instant;

use clap::ValueEnum;
use serde_json::json;
use tk::Result;
use tk::onnx::Precision;
use tk::runtime::Slots;
use tk::runtime::slots::Reading;
use tk::say::Say;
use tk::serve::served;

/// One shape's seconds and what was generated.
struct Run {
    prefill: f64,
    /// Seconds of the steps behind the first token.
    decode: f64,
    tokens: Vec<i64>,
}

fn main() -> Result<()> {
    tk::process::prepare();
    let (mut model, mut batches) = (None, vec![1, 8, 32]);
    let (mut prompt, mut new, mut capacity, mut repeat) = (64, 48, 256, 3);
    let (mut precision, mut as_json) = (Precision::Fp32, false);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_default();
        match argument.as_str() {
            "--bench" => {} // cargo's own
            "--json" => as_json = true,
            "--batch" => batches = value().split(',').map(str::parse).collect::<Result<_, _>>()?,
            "--prompt" => prompt = value().parse()?,
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
    let mut slots = Slots::open(&served::generating(&model, precision), threads, Say::default())?;
    for batch in batches {
        slots.resize(0, 0);
        slots.resize(batch, capacity);
        run(&mut slots, prompt, 4)?;
        let mut runs = (0..repeat).map(|_| run(&mut slots, prompt, new)).collect::<Result<Vec<_>>>()?;
        let mut median = |seconds: fn(&Run) -> f64| {
            runs.sort_by(|a, b| seconds(a).total_cmp(&seconds(b)));
            seconds(&runs[runs.len() / 2])
        };
        let (prefill, decode) = (median(|run| run.prefill), median(|run| run.decode));
        let rate = (batch * (new - 1)) as f64 / decode;
        if as_json {
            let line = json!({
                "batch": batch, "precision": precision.name(), "prefill_seconds": prefill,
                "decode_tokens_per_second": rate, "tokens": runs[0].tokens,
            });
            println!("{line}");
        } else {
            let ms = prefill * 1e3;
            println!("{precision} {batch:>2} × {prompt:<3}  prefill {ms:8.1} ms  decode {rate:7.1} tokens/s");
        }
    }
    Ok(())
}

/// Reads a prompt in each slot, and goes on in all of them together. Gives the first slot's tokens.
fn run(slots: &mut Slots, prompt: usize, new: usize) -> Result<Run> {
    let (rows, width) = (slots.slots(), slots.vocabulary());
    let likeliest =
        |row: &[f32]| (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best }) as i64;
    let started = Instant::now();
    let mut ids = Vec::new();
    for slot in 0..rows {
        let prompt: Vec<i64> =
            (0..prompt).map(|i| ((i * 7919 + slot * 104_729 + 1) % (width - 1)) as i64).collect();
        let asked = [prompt.len() as i64 - 1];
        let reading = Reading { slots: &(slot..slot + 1), ids: &prompt, lengths: &[0], asked: &asked };
        ids.push(likeliest(slots.read(reading)?));
    }
    let prefill = started.elapsed().as_secs_f64();
    let (mut lengths, mut tokens) = (vec![prompt; rows], vec![ids[0]]);
    for _ in 1..new {
        let reading = Reading { slots: &(0..rows), ids: &ids, lengths: &lengths, asked: &[0] };
        ids = slots.read(reading)?.chunks_exact(width).map(likeliest).collect();
        tokens.push(ids[0]);
        lengths.iter_mut().for_each(|length| *length += 1);
    }
    Ok(Run { prefill, decode: started.elapsed().as_secs_f64() - prefill, tokens })
}
