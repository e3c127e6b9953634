//! A model that answers requests: its queue, and a thread for each of its sessions. What waits in the queue is a record, or
//! a row of tokens for the model's graph.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::Context;

use super::answers::ModelInfo;
use super::metrics::Meter;
use super::queue::{Job, Queue, QueueLimits, Reply};
use super::routes::Record;
use super::signature::Signature;
use crate::Result;
use crate::data::batch::Encoding;
use crate::data::records::{BadRow, Row};
use crate::data::tokens::Tokenizer;
use crate::onnx::{Precision, write};
use crate::predict::{Asked, Predictor};
use crate::runtime::{How, Provider};
use crate::saved::Saved;
use crate::task::{Answer, Outputs, Task};

/// What a model is asked.
pub enum Ask {
    /// A record, as it is read by its task.
    Record(Asked),
    /// A row of tokens, of which these of the graph's outputs are wanted.
    Tokens { row: Encoding, outputs: Arc<[usize]> },
}

impl Ask {
    /// How many sequences it is.
    pub fn windows(&self) -> usize {
        match self {
            Self::Record(asked) => asked.windows(),
            Self::Tokens { .. } => 1,
        }
    }

    /// Tokens of its longest sequence.
    pub fn longest(&self) -> usize {
        match self {
            Self::Record(asked) => asked.longest(),
            Self::Tokens { row, .. } => row.len(),
        }
    }

    /// Tokens of all of them.
    pub fn tokens(&self) -> usize {
        match self {
            Self::Record(asked) => asked.tokens(),
            Self::Tokens { row, .. } => row.len(),
        }
    }
}

/// What a model tells of it.
pub enum Told {
    Answer(Answer),
    /// The outputs that are wanted, each (1, C) or (T, C).
    Outputs(Outputs),
}

/// Makes of a record what a model is asked with.
type Read = Box<dyn Fn(&Row) -> Result<Asked, BadRow> + Send + Sync>;

/// A model that answers requests.
pub struct Served {
    /// What requests call it.
    pub name: String,
    pub task: Task,
    pub tokenizer: Tokenizer,
    pub provider: Provider,
    /// What `/info` says of it.
    pub about: ModelInfo,
    /// Tokens of the longest window.
    pub max_length: usize,
    /// What its graph takes and gives.
    pub signature: Signature,
    pub queue: Arc<Queue>,
    read: Read,
    workers: Mutex<Vec<JoinHandle<()>>>,
}

impl Served {
    /// Starts a thread for each session, once each of them has answered. A batch beside which nothing waits and none is
    /// computed is answered by all threads together, where there is room for such a session.
    ///
    /// # Errors
    /// A session fails at its first record, or the system gives no thread.
    pub fn start(
        name: String,
        saved: &Saved,
        precision: Precision,
        predictor: Predictor,
        how: &How,
        limits: QueueLimits,
        meter: &Arc<Meter>,
    ) -> Result<Self> {
        let (provider, max_length) = (predictor.provider(), predictor.max_length());
        let read: Read = Box::new(predictor.reader());
        let about = about(&name, saved, precision, &predictor)?;
        let signature = signature(saved, &predictor);
        let queue = Arc::new(Queue::new(limits));
        let first = |predictor: &Predictor| {
            warm_up(saved, predictor).with_context(|| format!("{name}: the first record"))
        };
        let together = predictor.together(how)?;
        together.as_ref().map_or(Ok(()), first)?;
        let crew = Arc::new(Crew { together, busy: AtomicUsize::new(0) });
        let mut workers = Vec::new();
        for predictor in predictor.split() {
            first(&predictor)?;
            let (queue, crew, meter, of) = (queue.clone(), crew.clone(), meter.clone(), name.clone());
            let work = move || work(&queue, &predictor, &crew, &meter, &of);
            let worker = std::thread::Builder::new().name(format!("model {name}")).spawn(work);
            workers.push(worker.context("starting a thread")?);
        }
        let (task, tokenizer, workers) = (saved.task.clone(), saved.tokenizer.clone(), Mutex::new(workers));
        Ok(Self { name, task, tokenizer, provider, about, max_length, signature, queue, read, workers })
    }

    /// What a record asks.
    ///
    /// # Errors
    /// It lacks something, or has what can't be tokenized.
    pub fn asked(&self, record: Record) -> Result<Asked, String> {
        (self.read)(&Row::new(1, record)).map_err(|bad| bad.message)
    }

    /// Takes no more records, and waits until those that were taken are answered.
    pub fn stop(&self) {
        self.queue.close();
        let mut workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        for worker in workers.drain(..) {
            let _ = worker.join(); // its panics are caught
        }
    }
}

/// What was taken is still answered; then the threads end.
impl Drop for Served {
    fn drop(&mut self) {
        self.queue.close();
    }
}

/// Runs a short text and one of full length, so that no request pays for what a session does once.
fn warm_up(saved: &Saved, predictor: &Predictor) -> Result<()> {
    let longest = predictor.max_length();
    for text in ["a".to_owned(), "a ".repeat(longest)] {
        let encoding = saved.tokenizer.encode(&text, None, longest)?;
        if !encoding.is_empty() {
            predictor.outputs(&[&encoding])?;
        }
    }
    Ok(())
}

/// What the threads of a model share.
struct Crew {
    /// Answers one batch by all threads.
    together: Option<Predictor>,
    /// Batches that are computed.
    busy: AtomicUsize,
}

/// Answers batches until the queue is closed and empty.
fn work(queue: &Queue, predictor: &Predictor, crew: &Crew, meter: &Meter, name: &str) {
    while let Some(jobs) = queue.next() {
        let alone = crew.busy.fetch_add(1, Ordering::AcqRel) == 0 && queue.is_empty();
        let predictor = crew.together.as_ref().filter(|_| alone).unwrap_or(predictor);
        let started = Instant::now();
        let asked: Vec<&Ask> = jobs.iter().map(|job| &job.asked).collect();
        let told = catch_unwind(AssertUnwindSafe(|| told(predictor, &asked)));
        let told = told.unwrap_or_else(|panic| Err(crate::error::of_panic("the model", panic.as_ref())));
        crew.busy.fetch_sub(1, Ordering::AcqRel);
        let computed = started.elapsed();
        meter.batch(name, &asked, computed);
        let reply = |job: Job, told| {
            let queued = started.duration_since(job.arrived);
            job.answer(Reply { told, queued, computed });
        };
        match told {
            Ok(told) => jobs.into_iter().zip(told).for_each(|(job, told)| reply(job, Ok(told))),
            Err(error) => jobs.into_iter().for_each(|job| reply(job, Err(format!("{error:#}")))),
        }
    }
}

/// What the model tells of each, in order. Where a batch has both, records run apart from rows of tokens.
fn told(predictor: &Predictor, asked: &[&Ask]) -> Result<Vec<Told>> {
    let (mut records, mut rows) = (Vec::new(), Vec::new());
    for ask in asked {
        match ask {
            Ask::Record(asked) => records.push(asked),
            Ask::Tokens { row, outputs } => rows.push((row, &**outputs)),
        }
    }
    let mut answers = predictor.answers(&records)?.into_iter().map(Told::Answer);
    let mut outputs = predictor.graph_outputs(&rows)?.into_iter().map(Told::Outputs);
    let told = asked.iter().map(|ask| match ask {
        Ask::Record(_) => answers.next(),
        Ask::Tokens { .. } => outputs.next(),
    });
    told.collect::<Option<_>>().context("the model told of fewer than it was asked")
}

/// What the model's graph takes and gives.
fn signature(saved: &Saved, predictor: &Predictor) -> Signature {
    Signature {
        inputs: predictor.pool().inputs(),
        outputs: saved.task.outputs(saved.task.form()),
        vocabulary: saved.config.vocab_size(),
        token_types: saved.config.token_types().unwrap_or(1),
        max_length: predictor.max_length(),
    }
}

/// What text-embeddings-inference's `/info` says, as far as it is so here.
fn about(name: &str, saved: &Saved, precision: Precision, predictor: &Predictor) -> Result<ModelInfo> {
    let mut config = saved.config.clone();
    saved.task.write_config(&mut config);
    let metadata = write::metadata(predictor.graph())?;
    let fills = saved.task.fields_answered().contains(&"fills");
    let mask = saved.tokenizer.mask().filter(|_| fills);
    let mask_token = mask.and_then(|id| saved.tokenizer.inner().id_to_token(id));
    Ok(ModelInfo {
        model_id: name.to_owned(),
        model_sha: metadata.get("weights_sha256").cloned(),
        model_dtype: precision.name(),
        task: saved.task.name(),
        id2label: config.raw.get("id2label").cloned(),
        mask_token,
        provider: predictor.provider().name(),
        max_input_length: predictor.max_length(),
        max_batch_tokens: Some(predictor.batch_tokens()),
        auto_truncate: true,
        version: env!("CARGO_PKG_VERSION"),
    })
}
