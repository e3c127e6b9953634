//! A language model that answers requests: one engine, in a thread of its own, that texts enter and leave at every step.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use anyhow::Context;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::answers::ModelInfo;
use super::queue::Refused;
use crate::Result;
use crate::data::tokens::Tokenizer;
use crate::generate::{
    Ends, Engine, Generated, GenerationConfig, Limits, News, Prompt, Prompts, Request, RequestId,
};
use crate::onnx::Precision;
use crate::predict::graphs;
use crate::runtime::{Providers, Slots};
use crate::saved::Saved;
use crate::say::Say;

/// News of a request's texts.
pub enum TextNews {
    /// Text that will stand, of one of them; and the whole, where it is over.
    Text { sequence: usize, text: String, finished: Option<Generated> },
    /// The request can't be gone on with, and why.
    Failed(String),
}

/// A request's texts as they come. Dropping it ends them.
pub struct Texts {
    pub news: UnboundedReceiver<TextNews>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    _place: Place,
}

/// One of the places that requests take; free again when it is dropped.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

struct Submitted {
    request: Request,
    news: UnboundedSender<TextNews>,
}

/// A language model that answers requests.
pub struct Generator {
    /// What requests call it.
    pub name: String,
    /// What `/info` says of it.
    pub about: ModelInfo,
    pub tokenizer: Tokenizer,
    prompts: Prompts,
    /// None once no more requests are taken.
    submit: Mutex<Option<Sender<Submitted>>>,
    /// Requests under way, and how many there may be.
    taken: Arc<AtomicUsize>,
    most: usize,
    engine: Mutex<Option<JoinHandle<()>>>,
}

/// How a language model is served.
pub struct GeneratorOptions<'a> {
    pub providers: &'a Providers,
    pub precision: Precision,
    pub threads: usize,
    pub limits: Limits,
    /// Requests that may be under way.
    pub requests: usize,
}

impl Generator {
    /// Starts the engine, once it has given a text a token.
    ///
    /// # Errors
    /// There is no graph of these weights, or it can't be run.
    pub fn start(name: String, saved: &Saved, options: &GeneratorOptions<'_>, say: Say) -> Result<Self> {
        let lm = saved.task.generating("serve")?;
        let (ends, positions) = (Ends::of(&saved.dir, lm)?, saved.config.max_positions());
        let prompts = Prompts::new(saved, lm, &ends, positions, false)?;
        let graph = graphs::checked_generating(saved, options.precision)?;
        let slots = Slots::open(&graph, options.providers, options.threads, say)?;
        let about = ModelInfo {
            model_id: name.clone(),
            model_sha: crate::onnx::write::metadata(&graph)?.get("weights_sha256").cloned(),
            model_dtype: options.precision.name(),
            task: saved.task.name(),
            id2label: None,
            mask_token: None,
            provider: slots.provider().name(),
            max_input_length: positions - 1,
            max_batch_tokens: None,
            auto_truncate: false,
            version: env!("CARGO_PKG_VERSION"),
        };
        let (tokenizer, limits) = (saved.tokenizer.clone(), options.limits);
        let (submit, submitted) = channel();
        let (ready, is_ready) = channel();
        let work = move || {
            let mut engine = Engine::new(slots, tokenizer.inner(), ends.ends, positions, limits);
            let warm = warm_up(&mut engine);
            let failed = warm.is_err();
            // nobody waits for it any more where the server has ended
            let _ = ready.send(warm);
            if !failed {
                generate(&mut engine, &submitted);
            }
        };
        let engine = std::thread::Builder::new().name(format!("model {name}")).spawn(work);
        let engine = engine.context("starting a thread")?;
        is_ready
            .recv()
            .context("the engine broke down")?
            .with_context(|| format!("{name}: the first prompt"))?;
        Ok(Self {
            name,
            about,
            tokenizer: saved.tokenizer.clone(),
            prompts,
            submit: Mutex::new(Some(submit)),
            taken: Arc::default(),
            most: options.requests,
            engine: Mutex::new(Some(engine)),
        })
    }

    /// A prompt's request.
    ///
    /// # Errors
    /// The prompt leaves no room for a token, or can't be tokenized.
    pub fn prompt(&self, text: &str, settings: GenerationConfig) -> Result<Request> {
        let Prompt { request, .. } = self.prompts.request(text, settings)?;
        Ok(request)
    }

    /// Takes a request.
    ///
    /// # Errors
    /// Too many are under way, or the server is about to stop.
    pub fn submit(&self, request: Request) -> Result<Texts, Refused> {
        let free = |taken| (taken < self.most).then_some(taken + 1);
        if self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, free).is_err() {
            return Err(Refused::Full);
        }
        let place = Place(self.taken.clone());
        let prompt_tokens = request.prompt.len();
        let (tell, news) = unbounded_channel();
        let submit = self.submit.lock().unwrap_or_else(PoisonError::into_inner);
        let sent =
            submit.as_ref().is_some_and(|submit| submit.send(Submitted { request, news: tell }).is_ok());
        if sent { Ok(Texts { news, prompt_tokens, _place: place }) } else { Err(Refused::Closed) }
    }

    /// How many requests are under way.
    pub fn under_way(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }

    /// Takes no more requests, and waits until those that were taken are over.
    pub fn stop(&self) {
        drop(self.submit.lock().unwrap_or_else(PoisonError::into_inner).take());
        let engine = self.engine.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(engine) = engine {
            let _ = engine.join();
        }
    }
}

/// Gives a short text one token.
fn warm_up(engine: &mut Engine) -> Result<()> {
    let settings = GenerationConfig { max_new_tokens: 1, ..GenerationConfig::default() };
    engine.run(&[Request { prompt: vec![0], settings }], &mut |_| Ok(())).map(drop)
}

/// Takes requests and generates, until nobody can submit any more and all are over.
fn generate(engine: &mut Engine, submitted: &Receiver<Submitted>) {
    let mut listeners: HashMap<RequestId, UnboundedSender<TextNews>> = HashMap::new();
    loop {
        if engine.is_idle() {
            match submitted.recv() {
                Ok(next) => take(engine, next, &mut listeners),
                Err(_) => return,
            }
        }
        while let Ok(next) = submitted.try_recv() {
            take(engine, next, &mut listeners);
        }
        let gone: Vec<RequestId> =
            listeners.iter().filter(|(_, news)| news.is_closed()).map(|(&id, _)| id).collect();
        for id in gone {
            engine.cancel(id);
            listeners.remove(&id);
        }
        if engine.is_idle() {
            continue;
        }
        let mut tell = |news: News| {
            if let Some(listener) = listeners.get(&news.request) {
                let (sequence, text) = (news.sequence, news.text.to_owned());
                let finished = news.finished.cloned();
                if !text.is_empty() || finished.is_some() {
                    // an error is that the client has gone, which the next step sees
                    let _ = listener.send(TextNews::Text { sequence, text, finished });
                }
            }
            if news.last {
                listeners.remove(&news.request);
            }
        };
        let stepped = catch_unwind(AssertUnwindSafe(|| engine.step(&mut tell)));
        let failed = match stepped {
            Ok(Ok(_)) => continue,
            Ok(Err(error)) => format!("{error:#}"),
            Err(panic) => {
                // what a panic leaves is dropped; where even that fails, the next request tells
                let _ = engine.clear();
                crate::error::of_panic("the engine", panic.as_ref()).to_string()
            }
        };
        for (_, listener) in listeners.drain() {
            let _ = listener.send(TextNews::Failed(failed.clone()));
        }
    }
}

fn take(engine: &mut Engine, next: Submitted, listeners: &mut HashMap<RequestId, UnboundedSender<TextNews>>) {
    let Submitted { request, news } = next;
    if news.is_closed() {
        return;
    }
    match engine.submit(request) {
        Ok(id) => drop(listeners.insert(id, news)),
        Err(error) => drop(news.send(TextNews::Failed(format!("{error:#}")))),
    }
}
