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

/// Seconds of texts that were generated side by side.
pub struct TextRun {
    /// Until every prompt is read and has its first token.
    pub prefill: f64,
    /// Of the tokens behind the first.
    pub decode: f64,
    /// Each slot's new tokens.
    pub tokens: Vec<Vec<i64>>,
}

/// Reads so many prompts of made-up tokens, and generates behind them, greedily; the median of the runs.
///
/// # Errors
/// The model fails, or has no room for it.
pub fn of_language_model(slots: &mut Slots, batch: usize, prompt: usize, runs: usize) -> Result<TextCell> {
    let prompts = made_up(batch, prompt, slots.vocabulary());
    slots.resize(0, 0)?;
    slots.resize(batch, prompt + NEW)?;
    generated(slots, &prompts, NEW)?; // what is done once
    let runs = (0..runs.max(1)).map(|_| generated(slots, &prompts, NEW)).collect::<Result<Vec<_>>>()?;
    let [prefill, decode] = medians(&runs);
    Ok(TextCell {
        prompt,
        batch,
        prefill_ms: prefill * 1e3,
        prefill_tokens_per_second: (batch * prompt) as f64 / prefill,
        decode_tokens_per_second: (batch * (NEW - 1)) as f64 / decode,
    })
}

/// The medians of reading and of generating.
pub fn medians(runs: &[TextRun]) -> [f64; 2] {
    [|run: &TextRun| run.prefill, |run: &TextRun| run.decode].map(|seconds| {
        let mut seconds: Vec<f64> = runs.iter().map(seconds).collect();
        seconds.sort_by(f64::total_cmp);
        seconds[seconds.len() / 2]
    })
}

/// Prompts of so many tokens.
pub fn made_up(count: usize, length: usize, vocabulary: usize) -> Vec<Vec<i64>> {
    let id = |slot: usize, i: usize| ((i * 7919 + slot * 104_729 + 1) % (vocabulary - 1)) as i64;
    (0..count).map(|slot| (0..length).map(|i| id(slot, i)).collect()).collect()
}

/// Reads a prompt in each slot, all of one length, and goes on in all of them together, greedily.
///
/// # Errors
/// There are fewer prompts than slots. The model fails.
pub fn generated(slots: &mut Slots, prompts: &[Vec<i64>], new: usize) -> Result<TextRun> {
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
    Ok(TextRun { prefill, decode: started.elapsed().as_secs_f64() - prefill, tokens })
}
