//! Batches of one shape, on every thread at once, as they are served.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde::Serialize;

use super::{Cell, WARM_UP, percentile, timed};
use crate::Result;
use crate::data::batch::{Encoding, PaddedBatch};
use crate::predict::Predictor;
use crate::runtime::OrtSession;
use crate::saved::Saved;

/// A loaded model.
pub struct Bench<'a> {
    predictor: &'a Predictor,
    /// Ids of a long text, of which sequences are cut.
    ids: Vec<u32>,
    pad_id: u32,
}

/// How it was loaded.
#[derive(Clone, Debug, Serialize)]
pub struct Load {
    pub seconds: f64,
    pub provider: &'static str,
    pub threads: usize,
    pub batch_tokens: usize,
    /// Nodes of the graph by the provider that runs them.
    pub nodes: BTreeMap<String, usize>,
}

impl Load {
    /// What a predictor is, that was loaded in so many seconds.
    ///
    /// # Errors
    /// ONNX Runtime does not say where its nodes run.
    pub fn of(predictor: &Predictor, seconds: f64) -> Result<Self> {
        let pool = predictor.pool();
        Ok(Self {
            seconds,
            provider: predictor.provider().name(),
            threads: pool.sessions().len(),
            batch_tokens: predictor.batch_tokens(),
            nodes: pool.sessions().next().context("no session")?.nodes()?,
        })
    }
}

impl<'a> Bench<'a> {
    /// Sequences are cut out of the built-in pages of English.
    ///
    /// # Errors
    /// The tokenizer fails on them.
    pub fn new(saved: &Saved, predictor: &'a Predictor) -> Result<Self> {
        let english: Vec<&str> = crate::data::english().collect();
        let ids = saved.tokenizer.encode(&english.join(" "), None, usize::MAX)?.ids;
        Ok(Self { predictor, ids, pad_id: saved.tokenizer.pad_id() })
    }

    fn batch(&self, rows: usize, length: usize) -> PaddedBatch {
        let sequence = |row: usize| Encoding {
            ids: self.ids.iter().cycle().skip(row * 7).take(length).copied().collect(),
            type_ids: vec![0; length],
            truncated: false,
        };
        let sequences: Vec<Encoding> = (0..rows).map(sequence).collect();
        PaddedBatch::new(&sequences.iter().collect::<Vec<_>>(), self.pad_id)
    }

    /// Runs batches of a shape for so long on every thread.
    ///
    /// # Errors
    /// The model fails.
    pub fn cell(&self, rows: usize, length: usize, time: Duration) -> Result<Cell> {
        let pool = self.predictor.pool();
        let batch = &self.batch(rows, length);
        let run = |session: &OrtSession| session.run(batch).map(drop);
        pool.sessions().try_for_each(|session| (0..WARM_UP).try_for_each(|_| run(session)))?;
        let started = Instant::now();
        let times = std::thread::scope(|scope| {
            let start = |session| scope.spawn(move || timed(time, || run(session)));
            let threads: Vec<_> = pool.sessions().map(start).collect();
            threads
                .into_iter()
                .map(|thread| {
                    thread
                        .join()
                        .map_err(|panic| crate::error::of_panic("a thread of a session", panic.as_ref()))?
                })
                .collect::<Result<Vec<Vec<Duration>>>>()
        })?;
        let seconds = started.elapsed().as_secs_f64();
        let mut times = times.concat();
        times.sort_unstable();
        let records = (times.len() * rows) as f64 / seconds;
        Ok(Cell {
            length,
            batch: rows,
            runs: times.len(),
            p50_ms: percentile(&times, 0.5),
            p90_ms: percentile(&times, 0.9),
            p99_ms: percentile(&times, 0.99),
            records_per_second: records,
            tokens_per_second: records * length as f64,
        })
    }
}
