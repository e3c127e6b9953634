//! Continuous batching: sequences side by side in the slots of one KV cache. A slot whose sequence is over takes the next
//! one at once.

use std::cmp::Reverse;
use std::iter::repeat_n;
use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use super::engine::{Finish, Generated, Limits, Listener, Model, News, Request, RequestId, STEP, Submitted};
use super::logprobs::TokenLogprobs;
use super::sampler::Sampler;
use super::text::TextStream;
use crate::Result;
use crate::runtime::slots::SlotRead;

/// Tokens of a prompt that are read at once, at most.
pub(super) const PART: usize = 512;

/// The same of a prompt whose every token is scored, a row of the vocabulary each.
const SCORED_PART: usize = 128;

/// Tokens of prompts behind which decoding goes on: it waits for these and for one part more at most.
const PAUSE: usize = 256;

/// Tokens of short prompts that are read side by side, at most. One alone would read all weights for its few tokens.
pub const TOGETHER: usize = 256;

/// Tokens that two prompts must share for the second to copy what the first has read.
const WORTH_COPYING: usize = 16;

/// The slots, and what waits for them.
#[derive(Default)]
pub(super) struct Batch<'t> {
    slots: Vec<Slot<'t>>,
    /// Requests and which of their sequences, the next one last.
    waiting: Vec<(Arc<Submitted>, usize)>,
}

/// A slot of the KV cache.
#[derive(Default)]
struct Slot<'t> {
    state: State<'t>,
    /// The tokens whose keys and values it holds. Those of the last sequence stay until they are written over: a prompt
    /// that begins alike copies them.
    read: Vec<u32>,
}

/// What a slot does.
///
/// ```text
///          fill              prompt read, first token
///   Idle ───────→ Prefill ──────────────────────────→ Decode
///    ↑               │  first token is the last one      │  end token, stop text, length
///    └───────────────┴───────────────────────────────────┘  and both by cancel
/// ```
#[derive(Default)]
enum State<'t> {
    #[default]
    Idle,
    /// Reads its prompt: some of it is not read yet.
    Prefill(Sequence<'t>),
    /// Gets a token at every step. All of its tokens but the last are read.
    Decode(Sequence<'t>),
}

/// One of the texts of a request, under way.
struct Sequence<'t> {
    request: RequestId,
    /// Which of the request's texts.
    place: usize,
    /// The prompt and what was generated.
    ids: Vec<u32>,
    /// Tokens of the prompt.
    prompt: usize,
    /// How many tokens it may have.
    most: usize,
    sampler: Sampler,
    stream: TextStream<'t>,
    /// How many of the likeliest tokens are told of beside every token, where something is.
    top: Option<usize>,
    /// Whether the prompt's tokens are scored.
    scores_prompt: bool,
    logprobs: Vec<TokenLogprobs>,
}

impl<'t> Slot<'t> {
    fn sequence(&self) -> Option<&Sequence<'t>> {
        match &self.state {
            State::Idle => None,
            State::Prefill(sequence) | State::Decode(sequence) => Some(sequence),
        }
    }

    fn is_idle(&self) -> bool {
        matches!(self.state, State::Idle)
    }

    fn is_prefill(&self) -> bool {
        matches!(self.state, State::Prefill(_))
    }

    fn is_decode(&self) -> bool {
        matches!(self.state, State::Decode(_))
    }

    /// Adds a token to the sequence, which may be over with it.
    fn add(&mut self, id: u32, ends: &[u32], listener: &mut Listener) {
        let (State::Prefill(mut sequence) | State::Decode(mut sequence)) = std::mem::take(&mut self.state)
        else {
            return;
        };
        match sequence.add(id, ends, listener) {
            None => self.state = State::Decode(sequence),
            Some(finish) => sequence.finish(finish, listener),
        }
    }
}

impl Sequence<'_> {
    /// The next token, from the scores (V) behind all there are.
    fn next(&mut self, scores: &mut [f32]) -> u32 {
        let Some(top) = self.top else { return self.sampler.next(scores, &self.ids) };
        let of_the_model = scores.to_vec(); // the sampler writes its penalty into them
        let id = self.sampler.next(scores, &self.ids);
        self.logprobs.push(TokenLogprobs::of(&of_the_model, id, top));
        id
    }

    /// Scores the prompt's tokens from the `begin`-th on, each by the row (V) behind the one in front of it.
    fn score(&mut self, begin: usize, rows: &[f32], width: usize) {
        let top = self.top.unwrap_or(0);
        for (scores, &id) in rows.chunks_exact(width).zip(&self.ids[begin..self.prompt]) {
            self.logprobs.push(TokenLogprobs::of(scores, id, top));
        }
    }

    /// Adds a token and tells of it; why the sequence is over with it, if it is.
    fn add(&mut self, id: u32, ends: &[u32], listener: &mut Listener) -> Option<Finish> {
        if ends.contains(&id) {
            return Some(Finish::Stop);
        }
        self.ids.push(id);
        let piece = self.stream.push(id);
        (listener.tell)(News { text: &piece.text, tokens: 1, ..News::of(self.request, self.place) });
        match piece.stopped {
            true => Some(Finish::Stop),
            false => (self.ids.len() == self.most).then_some(Finish::Length),
        }
    }

    fn finish(self, finish: Finish, listener: &mut Listener) {
        let mut text = self.stream.text().to_owned();
        let rest = self.stream.finish();
        text.push_str(&rest);
        let (ids, mut logprobs) = (self.ids[self.prompt..].to_vec(), self.logprobs);
        // not of the token that ends a text
        logprobs.truncate(ids.len() + if self.scores_prompt { self.prompt } else { 0 });
        let generated = Generated { text, ids, finish, logprobs };
        let last = listener.one_less(self.request);
        let news = News::of(self.request, self.place);
        (listener.tell)(News { text: &rest, finished: Some(&generated), last, ..news });
    }
}

impl<'t> Batch<'t> {
    /// Whether nothing waits for a slot.
    pub fn all_placed(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether nothing waits, and no slot has a sequence.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.active() == 0
    }

    /// How many slots have a sequence.
    pub fn active(&self) -> usize {
        self.slots.iter().filter(|slot| !slot.is_idle()).count()
    }

    /// Drops the sequences of a request. What their slots have read stays.
    pub fn cancel(&mut self, id: RequestId) {
        self.waiting.retain(|(submitted, _)| submitted.id != id);
        for slot in &mut self.slots {
            if slot.sequence().is_some_and(|sequence| sequence.request == id) {
                slot.state = State::Idle;
            }
        }
    }

    /// Takes requests, the longest first so that the last ones end together, and makes slots for them: as many as they
    /// are and the limits allow, if all were as large as the largest, of those under way too. Where that is no more than
    /// are under way it takes none, and gives false. Nothing may wait when it is called.
    pub fn admit(&mut self, requests: &[Arc<Submitted>], model: &mut Model, limits: &Limits) -> Result<bool> {
        let under_way =
            self.slots.iter().filter_map(Slot::sequence).map(|sequence| model.room(sequence.most));
        let asked = requests.iter().map(|submitted| model.room(model.most(&submitted.request)));
        let Some(largest) = asked.max().map(|asked| under_way.max().map_or(asked, |room| room.max(asked)))
        else {
            return Ok(true);
        };
        let token_bytes = model.cache.token_bytes();
        let allowed = limits.slots.min(limits.cache_bytes / largest.saturating_mul(token_bytes).max(1));
        let active = self.active();
        if active >= allowed {
            return Ok(false);
        }
        self.waiting = requests
            .iter()
            .flat_map(|submitted| {
                let sequences = submitted.request.settings.num_return_sequences;
                (0..sequences).map(move |sequence| (submitted.clone(), sequence))
            })
            .collect();
        self.waiting.sort_by_key(|(submitted, sequence)| {
            let Request { prompt, settings } = &submitted.request;
            (settings.max_new_tokens, prompt.len(), Reverse(submitted.id), Reverse(*sequence))
        });

        let (old, needed) = (self.slots.len(), active + self.waiting.len());
        // more than are needed, so that requests that come one by one don't move the cache one by one
        let count = if needed > old { needed.max(2 * old) } else { old }.min(allowed);
        if count < old {
            self.close_gaps(model)?; // the active ones to the front
        }
        let mut capacity = model.cache.capacity();
        if old == 0 {
            model.cache.resize(0, 0)?; // what others have left would decide what is copied
            capacity = STEP.min(model.positions);
        } else if count.saturating_mul(capacity).saturating_mul(token_bytes) > limits.cache_bytes {
            capacity = capacity.min(largest);
        }
        self.slots.resize_with(count, Slot::default);
        model.cache.resize(count, capacity)?;
        // a decode step computes a token behind what an idle slot has read: that must not make the slots grow
        let most = capacity.max(largest) - 1;
        self.slots.iter_mut().filter(|slot| slot.is_idle()).for_each(|slot| slot.read.truncate(most));
        Ok(true)
    }

    /// Reads prompts, and gives every slot in decode a token.
    pub fn step(&mut self, model: &mut Model<'t>, listener: &mut Listener) -> Result<()> {
        self.prefill(model, listener)?;
        if self.waiting.is_empty() {
            self.close_gaps(model)?;
        }
        match self.slots.iter().rposition(Slot::is_decode) {
            Some(last) => self.decode(last + 1, model, listener),
            None => Ok(()),
        }
    }

    /// Fills idle slots and reads prompts: as many as there are while nothing else waits for it.
    fn prefill(&mut self, model: &mut Model<'t>, listener: &mut Listener) -> Result<()> {
        let mut left = if self.slots.iter().any(Slot::is_decode) { PAUSE } else { usize::MAX };
        while left > 0
            && let Some(place) = self
                .slots
                .iter()
                .position(|slot| slot.is_prefill() || (slot.is_idle() && !self.waiting.is_empty()))
        {
            let rows = self.fill(place, model)?;
            let tokens = self.prefill_parts(place..place + rows, model, listener)?;
            left = left.saturating_sub(tokens);
        }
        Ok(())
    }

    /// Gives an idle slot a sequence, and the idle ones behind it those whose prompts are read with its own. How many of
    /// the slots read together.
    fn fill(&mut self, place: usize, model: &mut Model<'t>) -> Result<usize> {
        if self.slots[place].is_idle()
            && let Some((submitted, sequence)) = self.waiting.pop()
        {
            let sequence = model.sequence(&submitted, sequence)?;
            match sequence.scores_prompt {
                true => self.slots[place].read.clear(),
                false => self.take_over(place, &sequence.ids, model)?,
            }
            self.slots[place].state = State::Prefill(sequence);
        }
        let alone = |first: &&Sequence| !self.slots[place].read.is_empty() || first.scores_prompt;
        let Some(first) = self.slots[place].sequence().filter(|first| !alone(first)) else {
            return Ok(1);
        };
        let (mut rows, mut longest, mut tokens) = (1, first.prompt, first.prompt);
        while let Some((submitted, sequence)) = self.waiting.last()
            && self.slots.get(place + rows).is_some_and(Slot::is_idle)
        {
            let Request { prompt, settings } = &submitted.request;
            if settings.prompt_logprobs {
                break;
            }
            longest = longest.max(prompt.len());
            tokens += prompt.len();
            let padded = (rows + 1) * longest;
            let copies = |slot: &Slot| {
                let unread = slot.sequence().filter(|_| slot.read.is_empty());
                shared(unread.map_or(&slot.read, |sequence| &sequence.ids), prompt) >= WORTH_COPYING
            };
            if padded > TOGETHER || padded * 4 > tokens * 5 || self.slots.iter().any(copies) {
                break;
            }
            let sequence = model.sequence(submitted, *sequence)?;
            self.slots[place + rows] = Slot { state: State::Prefill(sequence), read: Vec::new() };
            self.waiting.pop();
            rows += 1;
        }
        Ok(rows)
    }

    /// Reads the next part of the prompts of consecutive slots, as many tokens as the longest has: what pads the others
    /// stands behind their own, which don't see it, and is written over. How many tokens were read.
    fn prefill_parts(
        &mut self,
        places: Range<usize>,
        model: &mut Model<'t>,
        listener: &mut Listener,
    ) -> Result<usize> {
        let group = &mut self.slots[places.clone()];
        let (mut parts, mut lengths) = (Vec::new(), Vec::new());
        for Slot { state, read } in group.iter_mut() {
            let State::Prefill(sequence) = state else { continue };
            let most = if sequence.scores_prompt { SCORED_PART } else { PART };
            let part = &sequence.ids[read.len()..sequence.prompt.min(read.len() + most)];
            parts.push(part.iter().map(|&id| i64::from(id)).collect::<Vec<_>>());
            lengths.push(read.len());
            read.extend_from_slice(part);
        }
        let longest = parts.iter().map(Vec::len).max().unwrap_or(0);
        model.make_room(lengths.iter().max().map_or(0, |length| length + longest))?;
        let padded =
            |part: &Vec<i64>| part.iter().copied().chain(repeat_n(0, longest - part.len())).collect();
        let ids = parts.iter().map(padded).collect::<Vec<Vec<i64>>>().concat();
        // every row gives the scores behind all columns that are some row's last
        let scored = group.iter().filter_map(Slot::sequence).any(|sequence| sequence.scores_prompt);
        let last = parts.iter().map(|part| part.len() as i64 - 1);
        let mut asked: Vec<i64> = if scored { (0..longest as i64).collect() } else { last.collect() };
        asked.sort_unstable();
        asked.dedup();
        let width = model.cache.vocabulary();
        let scores =
            model.cache.read(SlotRead { slots: &places, ids: &ids, lengths: &lengths, asked: &asked })?;
        let rows = scores.chunks_exact_mut(width * asked.len());
        for ((slot, part), scores) in group.iter_mut().zip(&parts).zip(rows) {
            let State::Prefill(sequence) = &mut slot.state else { continue };
            if sequence.scores_prompt {
                sequence.score(slot.read.len() - part.len() + 1, scores, width);
            }
            if slot.read.len() == sequence.prompt {
                let column = asked.partition_point(|&column| column < part.len() as i64 - 1);
                let id = sequence.next(&mut scores[column * width..][..width]);
                slot.add(id, &model.ends, listener);
            }
        }
        Ok(ids.len())
    }

    /// Copies what another slot has read of the same prompt. The last token is read again, for its scores.
    fn take_over(&mut self, place: usize, prompt: &[u32], model: &mut Model) -> Result<()> {
        let common = |i: usize| shared(&self.slots[i].read, prompt);
        let best = (0..self.slots.len()).max_by_key(|&i| (common(i), i == place)).unwrap_or(place);
        let common = common(best);
        let kept = if common < WORTH_COPYING { 0 } else { common };
        if best != place && kept > 0 {
            model.cache.copy(&[(best, place)], 0..kept)?;
        }
        self.slots[place].read = prompt[..kept].to_vec();
        Ok(())
    }

    /// Moves the last slots' sequences to idle ones, so that no row is computed for nobody.
    fn close_gaps(&mut self, model: &mut Model) -> Result<()> {
        let slots = &mut self.slots;
        while let (Some(empty), Some(last)) =
            (slots.iter().position(Slot::is_idle), slots.iter().rposition(|slot| !slot.is_idle()))
            && empty < last
        {
            model.cache.copy(&[(last, empty)], 0..slots[last].read.len())?;
            slots[empty].read = slots[last].read.clone();
            slots[empty].state = std::mem::take(&mut slots[last].state);
        }
        Ok(())
    }

    /// A decode step: one token for each of the first slots that decodes. The others' rows are computed for nobody,
    /// behind what they have read.
    fn decode(&mut self, rows: usize, model: &mut Model, listener: &mut Listener) -> Result<()> {
        let slots = &mut self.slots[..rows];
        let lengths: Vec<usize> = slots.iter().map(|slot| slot.read.len()).collect();
        model.make_room(lengths.iter().max().map_or(0, |longest| longest + 1))?;
        let last = |slot: &Slot| match &slot.state {
            State::Decode(sequence) => sequence.ids.last().map_or(0, |&id| i64::from(id)),
            State::Idle | State::Prefill(_) => 0,
        };
        let ids: Vec<i64> = slots.iter().map(last).collect();
        let reading = SlotRead { slots: &(0..rows), ids: &ids, lengths: &lengths, asked: &[0] };
        let width = model.cache.vocabulary();
        let scores = model.cache.read(reading)?;
        let chosen: Vec<Option<u32>> = slots
            .par_iter_mut()
            .zip(scores.par_chunks_exact_mut(width))
            .map(|(slot, scores)| {
                let State::Decode(sequence) = &mut slot.state else { return None };
                slot.read.extend(sequence.ids.last());
                Some(sequence.next(scores))
            })
            .collect();
        for (slot, id) in slots.iter_mut().zip(chosen) {
            if let Some(id) = id {
                slot.add(id, &model.ends, listener);
            }
        }
        Ok(())
    }
}

impl<'t> Model<'t> {
    /// A sequence that begins.
    fn sequence(&self, submitted: &Submitted, place: usize) -> Result<Sequence<'t>> {
        let Submitted { id, request } = submitted;
        let settings = &request.settings;
        let scores_prompt = settings.prompt_logprobs;
        Ok(Sequence {
            request: *id,
            place,
            ids: request.prompt.clone(),
            prompt: request.prompt.len(),
            most: self.most(request),
            sampler: Sampler::new(&request.settings, place as u64),
            stream: TextStream::new(self.tokenizer, &request.settings.stop)?,
            top: settings.logprobs,
            scores_prompt,
            logprobs: scores_prompt.then(|| TokenLogprobs::first(request.prompt[0])).into_iter().collect(),
        })
    }
}

/// How many tokens a prompt has in common with what was read. Its last one is not among them: it is read for its scores.
fn shared(read: &[u32], prompt: &[u32]) -> usize {
    read.iter().zip(&prompt[..prompt.len() - 1]).take_while(|(a, b)| a == b).count()
}
