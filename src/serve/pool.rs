//! Several sessions with one thread each: encoded records in, their logits out.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::Context;

use super::batching::batches;
use crate::Result;
use crate::data::batch::{Encoding, Padded};
use crate::runtime::{Model, OrtSession, Provider, Providers};
use crate::say::Say;

/// Padded tokens of a batch: on CPU small batches keep each thread's data in its cache, on a GPU large ones
/// fill it.
const CPU_BATCH_TOKENS: usize = 256;
const GPU_BATCH_TOKENS: usize = 16_384;

/// Sessions over one model that share the work.
pub struct Pool {
    sessions: Vec<OrtSession>,
    pad_id: u32,
    batch_tokens: usize,
}

impl Pool {
    /// Opens a session a thread on CPU, and one on a GPU.
    ///
    /// # Errors
    /// As [`OrtSession::open`].
    pub fn open(
        model: &Path,
        providers: &Providers,
        threads: usize,
        batch_tokens: Option<usize>,
        pad_id: u32,
        say: Say,
    ) -> Result<Self> {
        let mut sessions = vec![OrtSession::open(Model::File(model), providers, 1, say)?];
        let provider = sessions[0].provider();
        let (count, default) = match provider {
            Provider::Cpu => (threads, CPU_BATCH_TOKENS),
            Provider::Cuda | Provider::TensorRt => (1, GPU_BATCH_TOKENS),
        };
        for _ in 1..count {
            sessions.push(OrtSession::open(Model::File(model), &Providers::only(provider), 1, say)?);
        }
        Ok(Self { sessions, pad_id, batch_tokens: batch_tokens.unwrap_or(default) })
    }

    /// What runs the model.
    pub fn provider(&self) -> Provider {
        self.sessions[0].provider()
    }

    /// The most padded tokens of a batch with more than one record.
    pub fn batch_tokens(&self) -> usize {
        self.batch_tokens
    }

    /// Each record's logits, in order. The batches, and so the last bits of the results, depend on the
    /// lengths and the budget alone, not on how many sessions there are or which is faster.
    pub fn logits(&mut self, encodings: &[&Encoding]) -> Result<Vec<Vec<f32>>> {
        let lengths: Vec<usize> = encodings.iter().map(|encoding| encoding.len()).collect();
        let batches = batches(&lengths, self.batch_tokens);
        let pad_id = self.pad_id;
        // from the longest, so that the sessions finish together
        let (left, failed) = (AtomicUsize::new(batches.len()), AtomicBool::new(false));
        let rows = Mutex::new(vec![Vec::new(); encodings.len()]);
        let work = |session: &mut OrtSession| -> Result<()> {
            while !failed.load(Ordering::Relaxed) {
                let taken = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
                let Ok(n) = taken else { break };
                let batch = &batches[n - 1];
                let members: Vec<&Encoding> = batch.iter().map(|&i| encodings[i]).collect();
                let found = run(session, &Padded::new(&members, pad_id));
                if found.is_err() {
                    failed.store(true, Ordering::Relaxed);
                }
                let mut rows = rows.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                for (&i, row) in batch.iter().zip(found?) {
                    rows[i] = row;
                }
            }
            Ok(())
        };
        let work = &work;
        std::thread::scope(|scope| {
            let start = |session| std::thread::Builder::new().spawn_scoped(scope, move || work(session));
            let threads: Vec<_> = self.sessions.iter_mut().map(start).collect();
            threads
                .into_iter()
                .map(|thread| match thread.context("starting a thread")?.join() {
                    Ok(done) => done,
                    Err(panic) => Err(crate::error::of_panic("a session's thread", panic.as_ref())),
                })
                .collect::<Result<Vec<()>>>()
        })?;
        Ok(rows.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()))
    }
}

/// The logits of a batch, a row a sequence.
fn run(session: &mut OrtSession, batch: &Padded) -> Result<Vec<Vec<f32>>> {
    let outputs = session.run(batch)?;
    outputs.first().context("the graph has no output")?.rows(batch.rows)
}
