//! Several sessions with one thread each: encoded records in, their outputs out.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::Context;

use super::batching::batches;
use crate::Result;
use crate::data::batch::{Encoding, PaddedBatch};
use crate::runtime::session::Values;
use crate::runtime::{Model, OrtSession, Provider, Providers};
use crate::saved::Saved;
use crate::say::Say;
use crate::task::{Outputs, Scope};

/// Padded tokens of a batch: on CPU small batches keep each thread's data in its cache, on a GPU large ones
/// fill it.
const CPU_BATCH_TOKENS: usize = 256;
const GPU_BATCH_TOKENS: usize = 16_384;

/// Sessions over one model that share the work.
pub struct Pool {
    sessions: Vec<OrtSession>,
    pad_id: u32,
    batch_tokens: usize,
    /// Of the task's outputs, and how many of them are for other programs alone.
    scopes: Vec<Scope>,
    ahead: usize,
}

impl Pool {
    /// Opens a session a thread on CPU, and one on a GPU.
    ///
    /// # Errors
    /// As [`OrtSession::open`].
    pub fn open(
        saved: &Saved,
        model: &Path,
        providers: &Providers,
        threads: usize,
        batch_tokens: Option<usize>,
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
        let (pad_id, scopes, ahead) = (saved.tokenizer.pad_id(), saved.task.scopes(), saved.task.ahead());
        Ok(Self { sessions, pad_id, batch_tokens: batch_tokens.unwrap_or(default), scopes, ahead })
    }

    /// A pool for each session.
    pub fn split(self) -> Vec<Self> {
        let Self { sessions, pad_id, batch_tokens, scopes, ahead } = self;
        let of_session =
            |session| Self { sessions: vec![session], pad_id, batch_tokens, scopes: scopes.clone(), ahead };
        sessions.into_iter().map(of_session).collect()
    }

    /// What runs the model.
    pub fn provider(&self) -> Provider {
        self.sessions[0].provider()
    }

    /// The most padded tokens of a batch with more than one record.
    pub fn batch_tokens(&self) -> usize {
        self.batch_tokens
    }

    /// Each example's outputs, in order. The batches, and so the last bits of the results, depend on the
    /// lengths and the budget alone, not on how many sessions there are or which is faster.
    pub fn outputs(&mut self, encodings: &[&Encoding]) -> Result<Vec<Outputs>> {
        let lengths: Vec<usize> = encodings.iter().map(|encoding| encoding.len()).collect();
        let batches = batches(&lengths, self.batch_tokens);
        let (pad_id, scopes, ahead) = (self.pad_id, &self.scopes, self.ahead);
        // from the longest, so that the sessions finish together
        let (left, failed) = (AtomicUsize::new(batches.len()), AtomicBool::new(false));
        let found_so_far = Mutex::new(vec![Outputs::new(); encodings.len()]);
        let work = |session: &mut OrtSession| -> Result<()> {
            while !failed.load(Ordering::Relaxed) {
                let taken = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
                let Ok(n) = taken else { break };
                let batch = &batches[n - 1];
                let members: Vec<&Encoding> = batch.iter().map(|&i| encodings[i]).collect();
                let found = run(session, &PaddedBatch::new(&members, pad_id), scopes, ahead);
                if found.is_err() {
                    failed.store(true, Ordering::Relaxed);
                }
                let mut all = found_so_far.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                for (&i, outputs) in batch.iter().zip(found?) {
                    all[i] = outputs;
                }
            }
            Ok(())
        };
        let work = &work;
        match &mut self.sessions[..] {
            [session] => work(session)?, // nobody to share it with
            sessions => std::thread::scope(|scope| {
                let start = |session| std::thread::Builder::new().spawn_scoped(scope, move || work(session));
                let threads: Vec<_> = sessions.iter_mut().map(start).collect();
                threads.into_iter().try_for_each(|thread| match thread.context("starting a thread")?.join() {
                    Ok(done) => done,
                    Err(panic) => Err(crate::error::of_panic("a session's thread", panic.as_ref())),
                })
            })?,
        }
        Ok(found_so_far.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()))
    }
}

/// The outputs of each sequence of a batch, without those ahead.
fn run(
    session: &mut OrtSession,
    batch: &PaddedBatch,
    scopes: &[Scope],
    ahead: usize,
) -> Result<Vec<Outputs>> {
    let outputs = session.run(batch)?;
    unpack(outputs.get(ahead..).unwrap_or_default(), batch, &scopes[ahead..])
}

/// A graph's outputs, by sequence.
///
/// # Errors
/// There are fewer than the task has, or of other shapes.
pub fn unpack(outputs: &[Values], batch: &PaddedBatch, scopes: &[Scope]) -> Result<Vec<Outputs>> {
    anyhow::ensure!(
        outputs.len() >= scopes.len(),
        "the graph has {} outputs where {} are due: export it again",
        outputs.len(),
        scopes.len()
    );
    let mut by_sequence = vec![Outputs::new(); batch.rows];
    for (values, &scope) in outputs.iter().zip(scopes) {
        let own = values.unpack(scope, batch)?;
        by_sequence.iter_mut().zip(own).for_each(|(outputs, own)| outputs.push(own));
    }
    Ok(by_sequence)
}
