//! The generation engine: requests are submitted, stepped and cancelled; a closed list is a loop over that.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use anyhow::Context;
use tokenizers::Tokenizer;

use super::batch::Batch;
use super::config::GenerationConfig;
use super::logprobs::TokenLogprobs;
use super::search::Search;
use super::text::TextStream;
use crate::runtime::Slots;
use crate::{Result, bail_unusable};

/// Steps in which the slots' room grows, in tokens.
pub(super) const STEP: usize = 128;

/// A prompt, and how it is to be gone on with.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// At least one token, fewer than the model has positions.
    pub prompt: Vec<u32>,
    pub settings: GenerationConfig,
}

/// The name of a request that an engine has taken: no other request of the engine gets it.
pub type RequestId = usize;

/// What stands behind a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Generated {
    pub text: String,
    /// The new tokens, without the one that ends a text.
    pub ids: Vec<u32>,
    pub finish: Finish,
    /// Of every new token, where they are asked for; in front of them those of the prompt, where these are.
    pub logprobs: Vec<TokenLogprobs>,
}

/// Why a text ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// By the token that ends a text, or a stop text.
    Stop,
    /// By `max_new_tokens`, or the model's positions.
    Length,
}

impl Finish {
    /// The name that servers give it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// News of a text under way.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct News<'a> {
    /// What [`Engine::submit`] gave; in [`Engine::run`] the request's place.
    pub request: RequestId,
    /// Which of its texts.
    pub sequence: usize,
    /// New tokens.
    pub tokens: usize,
    /// Text that will stand: never part of a character, nor of what may become a stop text. Often empty.
    pub text: &'a str,
    /// The whole text, where it is over.
    pub finished: Option<&'a Generated>,
    /// Whether the request is over: no more news come of it. A beam search whose scores are no numbers is over with
    /// fewer texts than it was asked for.
    pub last: bool,
}

impl News<'_> {
    /// Nothing new of a text.
    pub(super) fn of(request: RequestId, sequence: usize) -> Self {
        Self { request, sequence, tokens: 0, text: "", finished: None, last: false }
    }
}

/// What an engine may use.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The most texts that are generated side by side, at least one. A beam search counts as one: it is alone, with a
    /// slot a beam.
    pub slots: usize,
    /// The most bytes that the KV cache may take.
    pub cache_bytes: usize,
}

impl Limits {
    /// So many texts, 48 where nobody says it, and so many megabytes, 2048.
    ///
    /// # Errors
    /// There are more megabytes than can be counted in bytes.
    pub fn of(slots: Option<u32>, cache_mb: Option<u32>) -> Result<Self> {
        let cache_bytes = (cache_mb.unwrap_or(2048) as usize).checked_mul(1 << 20);
        let cache_bytes = cache_bytes.context("--cache-mb is too large")?;
        Ok(Self { slots: slots.unwrap_or(48) as usize, cache_bytes })
    }
}

/// A model that generates: continuous batching over a KV cache.
///
/// **Order.** Requests are taken in waves: a wave is all that was submitted since the last one was taken. The next wave
/// is taken when every sequence of the last one has a slot or is over, and one of its own has room beside those under
/// way. In a wave the longest go first; its beam searches follow one by one when no slot has a sequence. So a request
/// waits for no request that was submitted after its wave was taken, and for none for ever.
pub struct Engine<'t> {
    model: Model<'t>,
    limits: Limits,
    /// What the next request is called.
    next: RequestId,
    /// How many texts of each request are not over.
    unfinished: HashMap<RequestId, usize>,
    /// The next wave, in the order of submission.
    submitted: Vec<Arc<Submitted>>,
    /// The beam searches of the wave.
    searches: VecDeque<Arc<Submitted>>,
    /// The other requests of the wave, and what is under way of earlier ones.
    batch: Batch<'t>,
    /// The beam search that has the cache; the batch is idle then.
    search: Option<Search>,
}

/// A request under way.
pub(super) struct Submitted {
    pub id: RequestId,
    pub request: Request,
}

/// What all sequences are generated with.
pub(super) struct Model<'t> {
    pub cache: Slots,
    pub tokenizer: &'t Tokenizer,
    /// The tokens that end a text.
    pub ends: Vec<u32>,
    /// The most tokens of a text, with its prompt.
    pub positions: usize,
}

impl Model<'_> {
    /// The tokens of a request's longest text, with its prompt.
    pub fn most(&self, request: &Request) -> usize {
        self.positions.min(request.prompt.len().saturating_add(request.settings.max_new_tokens))
    }

    /// The tokens that a slot has room for when so many are to be in it.
    pub fn room(&self, tokens: usize) -> usize {
        tokens.checked_next_multiple_of(STEP).unwrap_or(usize::MAX).min(self.positions)
    }

    /// The bytes of cache that a request takes at most: of one of its texts, or of all beams.
    fn bytes(&self, request: &Request) -> usize {
        let tokens = self.room(self.most(request));
        request.settings.num_beams.saturating_mul(tokens).saturating_mul(self.cache.token_bytes())
    }

    /// Makes the slots so large that so many tokens are in each.
    pub fn make_room(&mut self, tokens: usize) -> Result<()> {
        if tokens > self.cache.capacity() {
            self.cache.resize(self.cache.slots(), self.room(tokens))?;
        }
        Ok(())
    }
}

/// Whom to tell, and what is still to be told.
pub(super) struct Listener<'a> {
    pub unfinished: &'a mut HashMap<RequestId, usize>,
    pub tell: &'a mut dyn FnMut(News),
}

impl Listener<'_> {
    /// A text of a request is over. Whether it was the last one.
    pub fn one_less(&mut self, id: RequestId) -> bool {
        let left = self.unfinished.get(&id).map_or(0, |left| left - 1);
        match left {
            0 => self.unfinished.remove(&id),
            left => self.unfinished.insert(id, left),
        };
        left == 0
    }
}

impl<'t> Engine<'t> {
    /// Generates with a graph; any of `ends` ends a text.
    pub fn new(
        slots: Slots,
        tokenizer: &'t Tokenizer,
        ends: Vec<u32>,
        positions: usize,
        limits: Limits,
    ) -> Self {
        Self {
            model: Model { cache: slots, tokenizer, ends, positions },
            limits,
            next: 0,
            unfinished: HashMap::new(),
            submitted: Vec::new(),
            searches: VecDeque::new(),
            batch: Batch::default(),
            search: None,
        }
    }

    /// Whether the cache may grow as large as a request asks for.
    pub fn fits(&self, request: &Request) -> bool {
        self.model.bytes(request) <= self.limits.cache_bytes
    }

    /// Whether no request is under way.
    pub fn is_idle(&self) -> bool {
        self.unfinished.is_empty()
    }

    /// How many texts are generated side by side now; a beam search is one.
    pub fn active(&self) -> usize {
        self.batch.active() + usize::from(self.search.is_some())
    }

    /// The bytes that the KV cache takes now. An idle engine keeps what was read: a prompt that begins alike needs not
    /// read it again.
    pub fn cache_bytes(&self) -> usize {
        let Model { cache, .. } = &self.model;
        cache.slots() * cache.capacity() * cache.token_bytes()
    }

    /// Takes a request, whatever is under way. The next steps generate for it.
    ///
    /// # Errors
    /// Unusable: a prompt is empty, too long for the model or for the cache, or has a token that the model doesn't know;
    /// what [`GenerationConfig::check`] and [`TextStream::new`] refuse. Nothing is changed then.
    pub fn submit(&mut self, request: Request) -> Result<RequestId> {
        let (positions, vocabulary) = (self.model.positions, self.model.cache.vocabulary());
        let Request { prompt, settings } = &request;
        if !(1..positions).contains(&prompt.len()) {
            bail_unusable!("a prompt of {} tokens, the model has {positions} positions", prompt.len());
        }
        if let Some(id) = prompt.iter().find(|&&id| id as usize >= vocabulary) {
            bail_unusable!("the prompt has the token {id}, the model has {vocabulary}");
        }
        settings.check()?;
        TextStream::new(self.model.tokenizer, &settings.stop)?;
        if !self.fits(&request) {
            bail_unusable!("a prompt's cache is too large");
        }
        if self.limits.slots == 0 {
            bail_unusable!("the engine has no slots");
        }
        let id = self.next;
        self.next += 1;
        self.unfinished.insert(id, request.settings.num_return_sequences);
        self.submitted.push(Arc::new(Submitted { id, request }));
        Ok(id)
    }

    /// Drops a request: no more news come of it, and its slots are free. Whether it was under way.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        let known = self.unfinished.remove(&id).is_some();
        if known {
            self.submitted.retain(|submitted| submitted.id != id);
            self.searches.retain(|submitted| submitted.id != id);
            self.batch.cancel(id);
            self.search.take_if(|search| search.submitted.id == id);
        }
        known
    }

    /// Drops all requests, and what the cache holds.
    ///
    /// # Errors
    /// The cache can't be emptied.
    pub fn clear(&mut self) -> Result<()> {
        self.unfinished.clear();
        self.submitted.clear();
        self.searches.clear();
        self.batch = Batch::default();
        self.search = None;
        self.model.cache.resize(0, 0)
    }

    /// One step: reads prompts (prefill), all there are while no text waits for it, else a few hundred tokens of them;
    /// then gives every text under way its next token (a decode step). A beam search's step is its prompt or a token of
    /// each beam. `tell` hears of every token. Whether a request is left.
    ///
    /// # Errors
    /// A run of the model fails, or there is no memory. All requests are dropped then, without news, and the engine is
    /// idle: others may be submitted.
    pub fn step(&mut self, tell: &mut dyn FnMut(News)) -> Result<bool> {
        if let Err(error) = self.advance(tell) {
            self.clear()?;
            return Err(error);
        }
        Ok(!self.is_idle())
    }

    fn advance(&mut self, tell: &mut dyn FnMut(News)) -> Result<()> {
        if self.search.is_none() {
            self.schedule()?;
        }
        let listener = &mut Listener { unfinished: &mut self.unfinished, tell };
        match self.search.take() {
            None => self.batch.step(&mut self.model, listener)?,
            Some(mut search) => match search.step(&mut self.model)? {
                false => self.search = Some(search),
                true => search.finish(&self.model, listener)?,
            },
        }
        Ok(())
    }

    /// Takes the next wave, or the next beam search, if it is its turn.
    fn schedule(&mut self) -> Result<()> {
        if self.batch.all_placed() && self.searches.is_empty() {
            let (searches, others): (Vec<_>, Vec<_>) = self
                .submitted
                .iter()
                .cloned()
                .partition(|submitted| submitted.request.settings.num_beams > 1);
            if self.batch.admit(&others, &mut self.model, &self.limits)? {
                self.searches.extend(searches);
                self.submitted.clear();
            }
        }
        if self.batch.is_idle()
            && let Some(next) = self.searches.pop_front()
        {
            self.batch = Batch::default();
            self.search = Some(Search::new(next, &mut self.model)?);
        }
        Ok(())
    }

    /// Generates for every request, and gives for each its texts, as many as it asked for. `tell` hears of every
    /// token. Who stands beside whom, and so the last bits of a result, depends on the requests and the limits alone.
    ///
    /// # Errors
    /// A request is unusable, as [`Engine::submit`] says, or another one is under way: nothing was done then. A run of
    /// the model or `tell` fails: the engine is idle then.
    pub fn run(
        &mut self,
        requests: &[Request],
        tell: &mut dyn FnMut(News) -> Result<()>,
    ) -> Result<Vec<Vec<Generated>>> {
        anyhow::ensure!(self.is_idle(), "the engine generates for others");
        self.clear()?; // what others have left in the cache would decide what is copied
        let first = self.next;
        for request in requests {
            if let Err(error) = self.submit(request.clone()) {
                self.clear()?;
                return Err(error);
            }
        }
        let mut texts: Vec<Vec<Option<Generated>>> =
            requests.iter().map(|request| vec![None; request.settings.num_return_sequences]).collect();
        let mut told = Ok(());
        while !self.is_idle() {
            self.step(&mut |news| {
                let request = news.request - first;
                if told.is_ok() {
                    told = tell(News { request, ..news });
                }
                if let Some(generated) = news.finished {
                    texts[request][news.sequence] = Some(generated.clone());
                }
            })?;
            if told.is_err() {
                self.clear()?;
                break;
            }
        }
        told.map(|()| texts.into_iter().map(|texts| texts.into_iter().flatten().collect()).collect())
    }
}
