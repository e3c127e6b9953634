//! A language model: prompts read, and tokens generated behind them, side by side.

use std::time::Instant;

use serde::Serialize;

use crate::Result;
use crate::generate::GenerationConfig;
use crate::generate::batch::TOGETHER;
use crate::generate::sampler::Sampler;
use crate::runtime::Slots;
use crate::runtime::slots::SlotRead;

/// Tokens that are generated behind each prompt.
pub const NEW: usize = 32;

/// What was measured of texts that are generated side by side.
#[derive(Clone, Debug, Serialize)]
pub struct TextCell {
    /// Tokens of each prompt.
    pub prompt: usize,
    /// Texts.
    pub batch: usize,
    /// Milliseconds until every prompt is read and has its first token.
    pub prefill_ms: f64,
    pub prefill_tokens_per_second: f64,
    pub decode_tokens_per_second: f64,
}

/// Reads so many prompts of made-up tokens, and generates behind them, greedily; the median of the runs.
///
/// # Errors
/// The model fails, or has no room for it.
pub fn of_language_model(slots: &mut Slots, batch: usize, prompt: usize, runs: usize) -> Result<TextCell> {
    slots.resize(0, 0)?;
    slots.resize(batch, prompt + NEW)?;
    once(slots, prompt)?; // what is done once
    let mut times = (0..runs.max(1)).map(|_| once(slots, prompt)).collect::<Result<Vec<_>>>()?;
    let mut median = |seconds: fn(&(f64, f64)) -> f64| {
        times.sort_by(|a, b| seconds(a).total_cmp(&seconds(b)));
        seconds(&times[times.len() / 2])
    };
    let (prefill, decode) = (median(|times| times.0), median(|times| times.1));
    Ok(TextCell {
        prompt,
        batch,
        prefill_ms: prefill * 1e3,
        prefill_tokens_per_second: (batch * prompt) as f64 / prefill,
        decode_tokens_per_second: (batch * (NEW - 1)) as f64 / decode,
    })
}

/// Seconds of reading, and of generating.
fn once(slots: &mut Slots, prompt: usize) -> Result<(f64, f64)> {
    let (rows, width) = (slots.slots(), slots.vocabulary());
    let id = |slot: usize, i: usize| ((i * 7919 + slot * 104_729 + 1) % (width - 1)) as i64;
    let mut greedy = Sampler::new(&GenerationConfig::default(), 0);
    let mut likeliest = |row: &mut [f32]| i64::from(greedy.next(row, &[]));
    let started = Instant::now();
    let mut ids: Vec<i64> = Vec::with_capacity(rows);
    let together = (TOGETHER / prompt.max(1)).max(1);
    for start in (0..rows).step_by(together) {
        let read = start..(start + together).min(rows);
        let prompts: Vec<i64> = read.clone().flat_map(|slot| (0..prompt).map(move |i| id(slot, i))).collect();
        let reading = SlotRead {
            slots: &read,
            ids: &prompts,
            lengths: &vec![0; read.len()],
            asked: &[prompt as i64 - 1],
        };
        ids.extend(slots.read(reading)?.chunks_exact_mut(width).map(&mut likeliest));
    }
    let prefill = started.elapsed().as_secs_f64();
    let mut lengths = vec![prompt; rows];
    for _ in 1..NEW {
        let reading = SlotRead { slots: &(0..rows), ids: &ids, lengths: &lengths, asked: &[0] };
        ids = slots.read(reading)?.chunks_exact_mut(width).map(&mut likeliest).collect();
        lengths.iter_mut().for_each(|length| *length += 1);
    }
    Ok((prefill, started.elapsed().as_secs_f64() - prefill))
}
