//! `tk bench`: an exported model → how fast this machine answers with it.

use std::fmt::Write;
use std::path::PathBuf;
use std::time::Instant;

use serde_json::json;

use crate::bench::{Bench, Cell, Load, NEW, Soaked, TextCell, Whole, builtin, of_language_model};
use crate::data::records::{self, How, Row, Source};
use crate::onnx::Precision;
use crate::predict::{Options, Predictor, graphs};
use crate::runtime::{EpFlags, Slots, library};
use crate::saved::{Saved, TaskFlag};
use crate::say::{Say, peak_rss_bytes};
use crate::task::AnswerFlags;
use crate::{Result, bail_unusable, generate, process};

/// Measure throughput and latency of an exported model on this machine, by batch and length, and of whole records.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The trained model's directory, exported by `tk export`.
    dir: PathBuf,
    #[command(flatten)]
    task: TaskFlag,
    #[command(flatten)]
    ep: EpFlags,
    /// Which of the exported graphs: fp32, fp16 or int8, and for language models fp32, fp16, q8 or q4; with --ep openvino
    /// also bf16.
    #[arg(long, value_enum, default_value_t)]
    precision: Precision,
    /// Threads that compute; but for texts that are generated, each runs batches of its own [default: the cores].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1024))]
    threads: Option<u64>,
    /// Padded tokens of a batch of whole records [default: 256 on a CPU, 16384 on a GPU].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    batch_tokens: Option<u64>,
    /// Tokens of sequences or prompts, as far as the model takes them.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "16,32,64,128,256,512")]
    lengths: Vec<usize>,
    /// Sequences of a batch, or texts side by side.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1,8,32")]
    batches: Vec<usize>,
    /// How long each shape is run.
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    seconds: f64,
    /// Records as for `tk serve-batch`, the first 10,000 of them [default: built-in texts].
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Answer the records again and again for so many seconds; exit code 1 where memory grows or answers change.
    #[arg(long, value_name = "SECONDS")]
    soak: Option<f64>,
}

/// The most records that are held.
const MOST_RECORDS: usize = 10_000;

/// The most tokens of a shape: its numbers have to fit into memory.
const MOST_TOKENS: usize = 1 << 20;

/// Runs of a language model's shape.
const RUNS: usize = 3;

/// Measures and prints.
pub fn run(args: &Args, say: Say) -> Result<()> {
    let soak = args.soak.map(|time| super::seconds("--soak", time)).transpose()?;
    let seconds = super::seconds("--seconds", args.seconds)?;
    if args.lengths.contains(&0) || args.batches.contains(&0) {
        bail_unusable!("--lengths and --batches are numbers above 0");
    }
    let saved = Saved::open_for(&args.dir, &args.task)?;
    if saved.task.language_model().is_some() {
        return texts(args, &saved, say);
    }
    let providers = args.ep.providers(args.precision)?;
    let (threads, flags) = (args.threads.map_or_else(process::cores, |n| n as usize), AnswerFlags::default());
    let batch_tokens = args.batch_tokens.map(|n| n as usize);
    let options = Options { providers: &providers, threads, batch_tokens, max_length: None, flags: &flags };
    let started = Instant::now();
    let predictor = Predictor::open(&saved, args.precision, &options, say)?;
    let load = Load::of(&predictor, started.elapsed().as_secs_f64())?;
    let rows = rows(args, &saved)?;

    if let Some(time) = soak {
        let soaked = Soaked::soak(&predictor, &rows, time, say)?;
        let [before, after] = soaked.rss_bytes.map(|bytes| bytes as f64 / 1e6);
        let human = format!(
            "{} passes over {} records in {:.0} s: {:.0} records/s; {before:.1} MB after a quarter, {after:.1} MB at the end; {} \
             passes with other answers",
            soaked.passes,
            rows.len(),
            soaked.seconds,
            soaked.records_per_second,
            soaked.other_answers
        );
        say.result(human, &json!({"load": load, "soak": soaked}))?;
        anyhow::ensure!(soaked.pass, "memory grew, or answers changed");
        return Ok(());
    }

    let shapes: Vec<(usize, usize)> = shapes(args, saved.max_length)?;
    let bar = say.bar(shapes.len() as u64, "{bar:30} {pos}/{len} shapes, {eta} left")?;
    let bench = Bench::new(&saved, &predictor)?;
    let mut cells = Vec::with_capacity(shapes.len());
    for (length, batch) in shapes {
        cells.push(bench.cell(batch, length, seconds)?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    let whole = Whole::measure(&predictor, &rows, seconds)?;
    let report = json!({
        "machine": machine()?,
        "graph": predictor.graph(),
        "precision": args.precision.name(),
        "load": load,
        "cells": cells,
        "records": whole,
        "input": args.input,
        "peak_rss_bytes": peak_rss_bytes(),
    });
    say.result(human(args, &predictor, &load, &cells, &whole), &report)
}

/// The lengths and batches that are measured: of a length that is more than the model takes, nothing is.
fn shapes(args: &Args, longest: usize) -> Result<Vec<(usize, usize)>> {
    let lengths: Vec<usize> = args.lengths.iter().copied().filter(|&length| length <= longest).collect();
    if lengths.is_empty() {
        bail_unusable!("--lengths: the model takes {longest} tokens at most");
    }
    let shapes: Vec<(usize, usize)> =
        lengths.iter().flat_map(|&length| args.batches.iter().map(move |&batch| (length, batch))).collect();
    if let Some((length, batch)) =
        shapes.iter().find(|(length, batch)| length.saturating_mul(*batch) > MOST_TOKENS)
    {
        bail_unusable!(
            "{batch} sequences of {length} tokens are more than {MOST_TOKENS} tokens: leave them out"
        );
    }
    Ok(shapes)
}

/// The records that are answered whole.
fn rows(args: &Args, saved: &Saved) -> Result<Vec<Row>> {
    let Some(input) = &args.input else {
        return builtin(saved);
    };
    let how = How { untagged: true, ..How::default() };
    let mut rows = Vec::new();
    for row in records::read(&Source::Path(input.clone()), &how)?.take(MOST_RECORDS) {
        rows.extend(row?.ok());
    }
    if rows.is_empty() {
        bail_unusable!("{}: there is no record", input.display());
    }
    Ok(rows)
}

fn machine() -> Result<serde_json::Value> {
    Ok(json!({
        "cpu": process::cpu_model(),
        "threads": process::cores(),
        "onnxruntime": format!("1.{}", library::library()?.minor),
    }))
}

fn human(args: &Args, predictor: &Predictor, load: &Load, cells: &[Cell], whole: &Whole) -> String {
    let mut out = String::new();
    let nodes: Vec<String> =
        load.nodes.iter().map(|(name, count)| format!("{count} nodes on {name}")).collect();
    // writing to a String can't fail
    let _ = writeln!(
        out,
        "{} on {}, {} threads of {}; loaded in {:.2} s: {}\n",
        predictor.graph().display(),
        load.provider,
        load.threads,
        process::cpu_model().unwrap_or_else(|| "this machine".to_owned()),
        load.seconds,
        nodes.join(", ")
    );
    let _ = writeln!(
        out,
        "length  batch   p50, ms   p90, ms   p99, ms  records/s  tokens/s   ({} threads at once)",
        load.threads
    );
    for cell in cells {
        let _ = writeln!(
            out,
            "{:>6}{:>7}{:>10.2}{:>10.2}{:>10.2}{:>11.1}{:>10.0}",
            cell.length,
            cell.batch,
            cell.p50_ms,
            cell.p90_ms,
            cell.p99_ms,
            cell.records_per_second,
            cell.tokens_per_second
        );
    }
    let of = args.input.as_ref().map_or("built-in texts".to_owned(), |input| input.display().to_string());
    let _ = write!(
        out,
        "\n{} records of {of}, tokenizing included: {:.0} records/s, {:.0} tokens/s; {:.3} tokens computed for each; peak memory \
         {:.2} GB",
        whole.records,
        whole.records_per_second,
        whole.tokens_per_second,
        whole.padding,
        peak_rss_bytes() as f64 / 1e9
    );
    out
}

/// The same of a language model.
fn texts(args: &Args, saved: &Saved, say: Say) -> Result<()> {
    let providers = generate::providers(&args.ep, args.precision, say)?;
    for (flag, given) in [
        ("--input", args.input.is_some()),
        ("--soak", args.soak.is_some()),
        ("--batch-tokens", args.batch_tokens.is_some()),
    ] {
        if given {
            bail_unusable!(
                "{flag} is for models that answer records; this one generates texts: leave it out"
            );
        }
    }
    let graph = graphs::checked_generating(saved, args.precision)?;
    let threads = args.threads.map_or_else(process::cores, |n| n as usize);
    let mut slots = Slots::open(&graph, &providers, threads, say)?;
    let shapes = shapes(args, saved.max_length.saturating_sub(NEW))?;
    let bar = say.bar(shapes.len() as u64, "{bar:30} {pos}/{len} shapes, {eta} left")?;
    let mut cells = Vec::with_capacity(shapes.len());
    for (prompt, batch) in shapes {
        cells.push(of_language_model(&mut slots, batch, prompt, RUNS)?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    let mut out = format!(
        "{} on {}, {threads} threads\n\nprompt  batch  prefill, ms  prefill, tokens/s  decode, tokens/s",
        graph.display(),
        slots.provider().name()
    );
    for TextCell { prompt, batch, prefill_ms, prefill_tokens_per_second, decode_tokens_per_second } in &cells
    {
        let _ = write!(
            out,
            "\n{prompt:>6}{batch:>7}{prefill_ms:>13.1}{prefill_tokens_per_second:>19.0}{decode_tokens_per_second:>18.1}"
        );
    }
    let report = json!({
        "machine": machine()?,
        "graph": graph,
        "provider": slots.provider().name(),
        "precision": args.precision.name(),
        "threads": threads,
        "cells": cells,
        "peak_rss_bytes": peak_rss_bytes(),
    });
    say.result(out, &report)
}
