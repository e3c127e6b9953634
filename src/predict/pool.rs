//! Threads that share the work: encoded records in, their outputs out.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::Context;

use super::batching::batches;
use crate::Result;
use crate::data::batch::{Encoding, PaddedBatch};
use crate::onnx::{model, write};
use crate::runtime::session::Values;
use crate::runtime::tensorrt::{Engine, MOST_ROWS};
use crate::runtime::{How, Model, OrtSession, Provider, Providers, Threads};
use crate::saved::Saved;
use crate::say::Say;
use crate::task::{Outputs, Scope};

/// Padded tokens of a batch: on CPU small batches keep each thread's data in its cache, on a GPU large ones
/// fill it.
const CPU_BATCH_TOKENS: usize = 256;
const GPU_BATCH_TOKENS: usize = 16_384;

/// The most bytes of weights that the sessions of a CPU's threads hold together. Up to here each has its own, whose memory
/// stays in its core's cache: two threads answer up to a fifth more than with one session between them. Larger models
/// gain little, and all threads run one session.
const COPIED: u64 = 512 << 20;

/// A model, and threads that share the work: on a CPU each runs batches of its own, on one core.
pub struct Pool {
    /// One for each thread: its own, or the same for all.
    sessions: Vec<Arc<OrtSession>>,
    pad_id: u32,
    batch_tokens: usize,
    /// Of the task's outputs, and how many of them are for other programs alone.
    scopes: Vec<Scope>,
    ahead: usize,
}

impl Pool {
    /// Opens a session, for `threads` on a CPU, and for one on a GPU.
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
        let mut providers = providers.clone();
        if providers.order.names(Provider::TensorRt) {
            providers.how.engine = Some(engine(saved, model)?);
        }
        let session =
            Arc::new(OrtSession::open(Model::File(model), &providers, Threads::Apart(threads), say)?);
        let provider = session.provider();
        let (threads, default) =
            if provider.on_cpu() { (threads, CPU_BATCH_TOKENS) } else { (1, GPU_BATCH_TOKENS) };
        let mut sessions = vec![session; threads];
        // OpenVINO's threads share it whatever it weighs
        if provider == Provider::Cpu && bytes(model).saturating_mul(threads as u64) <= COPIED {
            for session in sessions.iter_mut().skip(1) {
                let only = Providers::only(provider);
                *session = Arc::new(OrtSession::open(Model::File(model), &only, Threads::Apart(1), say)?);
            }
        }
        let (pad_id, scopes, ahead) = (saved.tokenizer.pad_id(), saved.task.scopes(), saved.task.ahead());
        let batch_tokens = batch_tokens.unwrap_or(default);
        Ok(Self { sessions, pad_id, batch_tokens, scopes, ahead })
    }

    /// A pool for each thread.
    pub fn split(&self) -> Vec<Self> {
        let Self { pad_id, batch_tokens, ahead, .. } = *self;
        let of_session = |session: &Arc<OrtSession>| {
            let (sessions, scopes) = (vec![session.clone()], self.scopes.clone());
            Self { sessions, pad_id, batch_tokens, scopes, ahead }
        };
        self.sessions.iter().map(of_session).collect()
    }

    /// The same model for one batch at a time, which all threads compute together: sooner, and with less done in the end,
    /// than each a batch of its own. None where a single thread is all there is, or where the weights are too large for
    /// another copy.
    ///
    /// # Errors
    /// As [`OrtSession::open`].
    pub fn together(&self, model: &Path, how: &How) -> Result<Option<Self>> {
        let Self { pad_id, batch_tokens, ahead, .. } = *self;
        let threads = self.sessions.len();
        let copies =
            if threads > 1 && Arc::ptr_eq(&self.sessions[0], &self.sessions[1]) { 1 } else { threads };
        if threads == 1 || bytes(model).saturating_mul(copies as u64 + 1) > COPIED {
            return Ok(None);
        }
        let providers = Providers { how: how.clone(), ..Providers::only(self.provider()) };
        let threads = Threads::Together(threads);
        let session = OrtSession::open(Model::File(model), &providers, threads, Say::default())?;
        let (sessions, scopes) = (vec![Arc::new(session)], self.scopes.clone());
        Ok(Some(Self { sessions, pad_id, batch_tokens, scopes, ahead }))
    }

    /// The session that each thread runs.
    pub fn sessions(&self) -> impl ExactSizeIterator<Item = &OrtSession> {
        self.sessions.iter().map(|session| &**session)
    }

    fn batches(&self, lengths: &[usize]) -> Vec<Vec<usize>> {
        let rows = if self.provider() == Provider::TensorRt { MOST_ROWS } else { usize::MAX };
        batches(lengths, self.batch_tokens, rows)
    }

    /// Tokens that are computed for sequences of these lengths, with their padding.
    pub fn padded_tokens(&self, lengths: &[usize]) -> usize {
        let padded = |batch: &Vec<usize>| batch.len() * batch.iter().map(|&i| lengths[i]).max().unwrap_or(0);
        self.batches(lengths).iter().map(padded).sum()
    }

    /// What runs the model.
    pub fn provider(&self) -> Provider {
        self.sessions[0].provider()
    }

    /// The names of the graph's inputs, in its order.
    pub fn inputs(&self) -> Vec<String> {
        self.sessions[0].inputs()
    }

    /// The most padded tokens of a batch with more than one record.
    pub fn batch_tokens(&self) -> usize {
        self.batch_tokens
    }

    /// Each example's outputs, in order. The batches, and so the last bits of the results, depend on the
    /// lengths and the budget alone, not on how many threads there are or which is faster.
    pub fn outputs(&self, encodings: &[&Encoding]) -> Result<Vec<Outputs>> {
        self.outputs_behind(self.ahead, encodings)
    }

    /// The same of all that the graph gives, also for other programs alone.
    pub fn graph_outputs(&self, encodings: &[&Encoding]) -> Result<Vec<Outputs>> {
        self.outputs_behind(0, encodings)
    }

    /// The same without so many outputs ahead.
    fn outputs_behind(&self, ahead: usize, encodings: &[&Encoding]) -> Result<Vec<Outputs>> {
        let lengths: Vec<usize> = encodings.iter().map(|encoding| encoding.len()).collect();
        let batches = self.batches(&lengths);
        let pad_id = self.pad_id;
        // from the longest, so that the threads finish together
        let (left, failed) = (AtomicUsize::new(batches.len()), AtomicBool::new(false));
        let found_so_far = Mutex::new(vec![Outputs::new(); encodings.len()]);
        let work = |session: &OrtSession| -> Result<()> {
            while !failed.load(Ordering::Relaxed) {
                let taken = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
                let Ok(n) = taken else { break };
                let batch = &batches[n - 1];
                let members: Vec<&Encoding> = batch.iter().map(|&i| encodings[i]).collect();
                let found = self.run(session, ahead, &PaddedBatch::new(&members, pad_id));
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
        match &self.sessions[..self.sessions.len().min(batches.len())] {
            [] | [_] => work(&self.sessions[0])?, // nobody to share it with
            sessions => std::thread::scope(|scope| {
                let threads: Vec<_> = sessions
                    .iter()
                    .map(|session| std::thread::Builder::new().spawn_scoped(scope, move || work(session)))
                    .collect();
                // all are waited for, whatever the first one says
                let ended: Vec<Result<()>> = threads
                    .into_iter()
                    .map(|thread| match thread.context("starting a thread")?.join() {
                        Ok(done) => done,
                        Err(panic) => Err(crate::error::of_panic("a thread of a session", panic.as_ref())),
                    })
                    .collect();
                ended.into_iter().collect::<Result<()>>()
            })?,
        }
        Ok(found_so_far.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()))
    }

    /// The outputs of each sequence of a batch, without so many ahead.
    fn run(&self, session: &OrtSession, ahead: usize, batch: &PaddedBatch) -> Result<Vec<Outputs>> {
        let outputs = session.run(batch)?;
        unpack(outputs.get(ahead..).unwrap_or_default(), batch, &self.scopes[ahead..])
    }
}

/// The bytes of a graph and of the weights beside it.
fn bytes(graph: &Path) -> u64 {
    let size = |path: &Path| std::fs::metadata(path).map_or(0, |file| file.len());
    size(graph) + size(&write::data_path(graph))
}

/// What TensorRT is told of a graph.
fn engine(saved: &Saved, graph: &Path) -> Result<Engine> {
    let mut about = write::metadata(graph)?;
    let weights_sha256 = match about.remove("weights_sha256") {
        Some(hash) => hash,
        None => model::weights_sha256(&saved.config, &saved.task, &saved.weights)?, // of another program's graph
    };
    Ok(Engine {
        inputs: write::inputs(graph)?,
        longest: saved.max_length,
        fp16: about.get("precision").is_some_and(|precision| precision == "fp16"),
        weights_sha256,
    })
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
