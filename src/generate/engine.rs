//! Many prompts through the slots of one cache: a slot that is done takes the next prompt at once.

use std::iter::repeat_n;
use std::ops::Range;

use rayon::prelude::*;
use tokenizers::Tokenizer;

use super::beams::Beams;
use super::config::GenerationConfig;
use super::sampler::Sampler;
use super::text::TextStream;
use crate::Result;
use crate::runtime::Slots;
use crate::runtime::slots::Reading;

/// Tokens of a prompt that are read at once, at most.
const PART: usize = 512;

/// Tokens of prompts behind which the slots that write go on: they wait for these and for one part more at most.
const PAUSE: usize = 256;

/// Steps in which the slots' room grows, in tokens.
const STEP: usize = 128;

/// Tokens of short prompts that are read side by side, at most. One alone would read all weights for its few tokens.
pub const TOGETHER: usize = 256;

/// Tokens that two prompts must share for the second to copy what the first has read.
const WORTH_COPYING: usize = 16;

/// A prompt, and how it is to be gone on with.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// At least one token, fewer than the model has positions.
    pub prompt: Vec<u32>,
    pub settings: GenerationConfig,
}

/// What stands behind a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generated {
    pub text: String,
    /// The new tokens, without the one that ends a text.
    pub ids: Vec<u32>,
    pub finish: Finish,
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct News<'a> {
    /// The request's place.
    pub request: usize,
    /// Which of its texts.
    pub sequence: usize,
    /// New tokens.
    pub tokens: usize,
    /// Text that will stand: never part of a character, nor of what may become a stop text. Often empty.
    pub text: &'a str,
}

/// What an engine may use.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The most texts that are generated side by side.
    pub slots: usize,
    /// The most bytes that the cache may take.
    pub cache_bytes: usize,
}

/// A model that generates.
pub struct Engine<'t> {
    slots: Slots,
    tokenizer: &'t Tokenizer,
    ends: Vec<u32>,
    positions: usize,
    limits: Limits,
}

/// A text under way in a slot.
struct Line<'t> {
    request: usize,
    sequence: usize,
    /// The prompt and what was generated.
    ids: Vec<u32>,
    prompt: usize,
    /// How many tokens it may have.
    most: usize,
    sampler: Sampler,
    stream: TextStream<'t>,
}

/// Requests and which of their texts, the next one last.
type Waiting = Vec<(usize, usize)>;

/// A slot of the cache.
#[derive(Default)]
struct Slot<'t> {
    line: Option<Line<'t>>,
    /// The tokens that it has read; those of the last line stay until they are written over.
    read: Vec<u32>,
}

impl Slot<'_> {
    /// Whether its line reads its prompt, or has none to read any more.
    fn reads(&self) -> bool {
        self.line.as_ref().is_some_and(|line| self.read.len() < line.prompt)
    }

    fn writes(&self) -> bool {
        self.line.is_some() && !self.reads()
    }
}

/// What a run has made so far, and whom to tell.
struct Results<'a> {
    /// For each request its texts.
    texts: Vec<Vec<Option<Generated>>>,
    tell: &'a mut dyn FnMut(News) -> Result<()>,
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
        Self { slots, tokenizer, ends, positions, limits }
    }

    /// The tokens of the longest text, with its prompt.
    fn most(&self, request: &Request) -> usize {
        self.positions.min(request.prompt.len().saturating_add(request.settings.max_new_tokens))
    }

    /// Whether the cache may grow as large as a request asks for.
    pub fn fits(&self, request: &Request) -> bool {
        self.bytes(request) <= self.limits.cache_bytes
    }

    /// The bytes of cache that a request takes at most.
    fn bytes(&self, request: &Request) -> usize {
        let tokens = rounded(self.most(request)).min(self.positions);
        request.settings.num_beams.saturating_mul(tokens).saturating_mul(self.slots.token_bytes())
    }

    /// Generates for every request, and gives for each its texts, as many as it asked for. `tell` hears of every
    /// token. Who stands beside whom, and so the last bits of a result, depends on the requests and the limits alone.
    ///
    /// # Errors
    /// A prompt is empty, too long for the model or for the cache; a run of the model or `tell` fails.
    pub fn run(
        &mut self,
        requests: &[Request],
        tell: &mut dyn FnMut(News) -> Result<()>,
    ) -> Result<Vec<Vec<Generated>>> {
        for request in requests {
            anyhow::ensure!(
                (1..self.positions).contains(&request.prompt.len()),
                "a prompt of {} tokens, the model has {} positions",
                request.prompt.len(),
                self.positions
            );
            anyhow::ensure!(self.fits(request), "a prompt's cache is too large");
            request.settings.check()?;
        }
        let texts =
            requests.iter().map(|request| vec![None; request.settings.num_return_sequences]).collect();
        let mut results = Results { texts, tell };
        let (searched, sampled): (Vec<usize>, Vec<usize>) =
            (0..requests.len()).partition(|&i| requests[i].settings.num_beams > 1);
        self.sample(requests, &sampled, &mut results)?;
        for i in searched {
            self.search(&requests[i], i, &mut results)?;
        }
        let all = results.texts.into_iter().map(|texts| texts.into_iter().flatten().collect());
        Ok(all.collect())
    }

    /// Token by token, all slots at once.
    fn sample(&mut self, requests: &[Request], places: &[usize], results: &mut Results) -> Result<()> {
        let Some(largest) = places.iter().map(|&i| self.bytes(&requests[i])).max() else { return Ok(()) };
        // the longest first, so that the last ones end together
        let mut waiting: Waiting = places
            .iter()
            .flat_map(|&i| (0..requests[i].settings.num_return_sequences).map(move |sequence| (i, sequence)))
            .collect();
        waiting.sort_by_key(|&(i, sequence)| {
            (
                requests[i].settings.max_new_tokens,
                requests[i].prompt.len(),
                usize::MAX - i,
                usize::MAX - sequence,
            )
        });
        let count = self.limits.slots.min(waiting.len()).min(self.limits.cache_bytes / largest.max(1));
        self.slots.resize(0, 0)?; // what another run has left would decide what is copied
        self.slots.resize(count, STEP.min(self.positions))?;
        let mut slots: Vec<Slot> = (0..count).map(|_| Slot::default()).collect();
        loop {
            self.read_prompts(&mut slots, &mut waiting, requests, results)?;
            if waiting.is_empty() {
                self.close_gaps(&mut slots);
            }
            let rows = slots.iter().rposition(Slot::writes).map_or(0, |last| last + 1);
            if rows == 0 {
                return Ok(()); // nobody writes, so all prompts were read
            }
            self.write(&mut slots[..rows], results)?;
        }
    }

    /// Fills empty slots and reads prompts: as many as there are while nobody waits for it.
    fn read_prompts(
        &mut self,
        slots: &mut [Slot<'t>],
        waiting: &mut Waiting,
        requests: &[Request],
        results: &mut Results,
    ) -> Result<()> {
        let mut left = if slots.iter().any(Slot::writes) { PAUSE } else { usize::MAX };
        while left > 0
            && let Some(place) =
                slots.iter().position(|slot| slot.reads() || (slot.line.is_none() && !waiting.is_empty()))
        {
            let rows = self.fill(slots, place, waiting, requests)?;
            let tokens = self.read_parts(slots, place..place + rows, results)?;
            left = left.saturating_sub(tokens);
        }
        Ok(())
    }

    /// Gives an empty slot a text, and the empty ones behind it those whose prompts are read with its own. How many of
    /// the slots read together.
    fn fill(
        &mut self,
        slots: &mut [Slot<'t>],
        place: usize,
        waiting: &mut Waiting,
        requests: &[Request],
    ) -> Result<usize> {
        if slots[place].line.is_none()
            && let Some((request, sequence)) = waiting.pop()
        {
            let line = self.line(&requests[request], request, sequence)?;
            self.take_over(slots, place, &line.ids);
            slots[place].line = Some(line);
        }
        let Some(first) = slots[place].line.as_ref().filter(|_| slots[place].read.is_empty()) else {
            return Ok(1);
        };
        let (mut rows, mut longest, mut tokens) = (1, first.prompt, first.prompt);
        while let Some(&(request, sequence)) = waiting.last()
            && slots.get(place + rows).is_some_and(|slot| slot.line.is_none())
        {
            let prompt = &requests[request].prompt;
            longest = longest.max(prompt.len());
            tokens += prompt.len();
            let padded = (rows + 1) * longest;
            let copies = |slot: &Slot| {
                let others = slot.line.as_ref().filter(|_| slot.read.is_empty());
                shared(others.map_or(&slot.read, |line| &line.ids), prompt) >= WORTH_COPYING
            };
            if padded > TOGETHER || padded * 4 > tokens * 5 || slots.iter().any(copies) {
                break;
            }
            let line = self.line(&requests[request], request, sequence)?;
            slots[place + rows] = Slot { line: Some(line), read: Vec::new() };
            waiting.pop();
            rows += 1;
        }
        Ok(rows)
    }

    /// Reads the next part of the prompts of consecutive slots, as many tokens as the longest has: what pads the others
    /// stands behind their own, which don't see it, and is written over. How many tokens were read.
    fn read_parts(
        &mut self,
        slots: &mut [Slot<'t>],
        places: Range<usize>,
        results: &mut Results,
    ) -> Result<usize> {
        let group = &mut slots[places.clone()];
        let (mut parts, mut lengths) = (Vec::new(), Vec::new());
        for Slot { line, read } in group.iter_mut() {
            let Some(line) = line else { continue };
            let part = &line.ids[read.len()..line.prompt.min(read.len() + PART)];
            parts.push(part.iter().map(|&id| i64::from(id)).collect::<Vec<_>>());
            lengths.push(read.len());
            read.extend_from_slice(part);
        }
        let longest = parts.iter().map(Vec::len).max().unwrap_or(0);
        self.make_room(lengths.iter().max().map_or(0, |length| length + longest))?;
        let padded =
            |part: &Vec<i64>| part.iter().copied().chain(repeat_n(0, longest - part.len())).collect();
        let ids = parts.iter().map(padded).collect::<Vec<Vec<i64>>>().concat();
        // every row gives the scores behind all columns that are some row's last
        let mut asked: Vec<i64> = parts.iter().map(|part| part.len() as i64 - 1).collect();
        asked.sort_unstable();
        asked.dedup();
        let width = self.slots.vocabulary();
        let scores =
            self.slots.read(Reading { slots: &places, ids: &ids, lengths: &lengths, asked: &asked })?;
        let rows = scores.chunks_exact_mut(width * asked.len());
        let mut chosen = Vec::new();
        for ((Slot { line, read }, part), scores) in group.iter_mut().zip(&parts).zip(rows) {
            let done = line.as_mut().filter(|line| line.prompt == read.len());
            let column = asked.partition_point(|&column| column < part.len() as i64 - 1);
            let last = &mut scores[column * width..][..width];
            chosen.push(done.map(|line| line.sampler.next(last, &line.ids)));
        }
        self.add_all(group, chosen, results)?;
        Ok(ids.len())
    }

    fn line(&self, request: &Request, place: usize, sequence: usize) -> Result<Line<'t>> {
        Ok(Line {
            request: place,
            sequence,
            ids: request.prompt.clone(),
            prompt: request.prompt.len(),
            most: self.most(request),
            sampler: Sampler::new(&request.settings, sequence as u64),
            stream: TextStream::new(self.tokenizer, &request.settings.stop)?,
        })
    }

    /// Copies what another slot has read of the same prompt. The last token is read again, for its scores.
    fn take_over(&mut self, slots: &mut [Slot], place: usize, prompt: &[u32]) {
        let common = |i: usize| shared(&slots[i].read, prompt);
        let best = (0..slots.len()).max_by_key(|&i| (common(i), i == place)).unwrap_or(place);
        let common = common(best);
        let kept = if common < WORTH_COPYING { 0 } else { common };
        if best != place && kept > 0 {
            self.slots.copy(&[(best, place)], 0..kept);
        }
        slots[place].read = prompt[..kept].to_vec();
    }

    /// Moves the last slots' texts to empty ones, so that no row is computed for nobody.
    fn close_gaps(&mut self, slots: &mut [Slot]) {
        while let (Some(empty), Some(last)) = (
            slots.iter().position(|slot| slot.line.is_none()),
            slots.iter().rposition(|slot| slot.line.is_some()),
        ) && empty < last
        {
            self.slots.copy(&[(last, empty)], 0..slots[last].read.len());
            slots[empty].read = slots[last].read.clone();
            slots[empty].line = slots[last].line.take();
        }
    }

    fn make_room(&mut self, tokens: usize) -> Result<()> {
        if tokens > self.slots.capacity() {
            self.slots.resize(self.slots.slots(), rounded(tokens).min(self.positions))?;
        }
        Ok(())
    }

    /// One token for each slot that writes. The others' rows are computed for nobody, behind what they have read.
    fn write(&mut self, slots: &mut [Slot<'t>], results: &mut Results) -> Result<()> {
        for slot in slots.iter_mut().filter(|slot| slot.line.is_none()) {
            if slot.read.len() == self.positions {
                slot.read.clear();
            }
        }
        let lengths: Vec<usize> = slots.iter().map(|slot| slot.read.len()).collect();
        self.make_room(lengths.iter().max().map_or(0, |longest| longest + 1))?;
        let last = |slot: &Slot| match &slot.line {
            Some(line) if slot.writes() => line.ids.last().map_or(0, |&id| i64::from(id)),
            _ => 0,
        };
        let ids: Vec<i64> = slots.iter().map(last).collect();
        let reading = Reading { slots: &(0..slots.len()), ids: &ids, lengths: &lengths, asked: &[0] };
        let width = self.slots.vocabulary();
        let scores = self.slots.read(reading)?;
        let chosen: Vec<Option<u32>> = slots
            .par_iter_mut()
            .zip(scores.par_chunks_exact_mut(width))
            .map(|(slot, scores)| {
                let writes = slot.writes();
                let line = slot.line.as_mut().filter(|_| writes)?;
                slot.read.extend(line.ids.last());
                Some(line.sampler.next(scores, &line.ids))
            })
            .collect();
        self.add_all(slots, chosen, results)
    }

    /// Adds the tokens that were chosen for slots.
    fn add_all(&self, slots: &mut [Slot<'t>], chosen: Vec<Option<u32>>, results: &mut Results) -> Result<()> {
        for (slot, id) in slots.iter_mut().zip(chosen) {
            if let Some(id) = id {
                self.add(slot, id, results)?;
            }
        }
        Ok(())
    }

    /// Adds a token to a slot's text, which may be over with it.
    fn add(&self, slot: &mut Slot<'t>, id: u32, results: &mut Results) -> Result<()> {
        let Some(line) = &mut slot.line else { return Ok(()) };
        let ended = self.ends.contains(&id);
        let mut finish = ended.then_some(Finish::Stop);
        if !ended {
            line.ids.push(id);
            let piece = line.stream.push(id);
            if piece.stopped {
                finish = Some(Finish::Stop);
            } else if line.ids.len() == line.most {
                finish = Some(Finish::Length);
            }
            results.tell(line.request, line.sequence, 1, &piece.text)?;
        }
        if let (Some(finish), Some(line)) = (finish, slot.line.take_if(|_| finish.is_some())) {
            let mut text = line.stream.text().to_owned();
            let rest = line.stream.finish();
            results.tell(line.request, line.sequence, 0, &rest)?;
            text.push_str(&rest);
            let generated = Generated { text, ids: line.ids[line.prompt..].to_vec(), finish };
            results.texts[line.request][line.sequence] = Some(generated);
        }
        Ok(())
    }

    /// The best sequences of a beam search: a slot a beam.
    fn search(&mut self, request: &Request, place: usize, results: &mut Results) -> Result<()> {
        let Request { prompt, settings } = request;
        self.slots.resize(0, 0)?;
        self.slots.resize(settings.num_beams, self.positions.min(rounded(prompt.len())))?;
        let mut beams = Beams::new(prompt, settings, &self.ends, self.most(request));
        let mut step = None;
        for (i, part) in prompt.chunks(PART).enumerate() {
            let ids: Vec<i64> = part.iter().map(|&id| i64::from(id)).collect();
            let asked = [ids.len() as i64 - 1];
            let reading = Reading { slots: &(0..1), ids: &ids, lengths: &[i * PART], asked: &asked };
            let scores = self.slots.read(reading)?;
            if (i + 1) * PART >= prompt.len() {
                step = Some(beams.step(scores)?);
            }
        }
        let copies: Vec<(usize, usize)> = (1..settings.num_beams).map(|to| (0, to)).collect();
        self.slots.copy(&copies, 0..prompt.len());
        let mut length = prompt.len();
        while let Some(next) = step.take_if(|step| !step.done) {
            // what stands in front of the beams is the same in all slots
            let moved: Vec<(usize, usize)> =
                next.from.iter().copied().enumerate().map(|(to, from)| (from, to)).collect();
            let moved: Vec<(usize, usize)> = moved.into_iter().filter(|(from, to)| from != to).collect();
            self.slots.copy(&moved, prompt.len()..length);
            self.make_room(length + 1)?;
            let ids: Vec<i64> = next.tokens.iter().map(|&id| i64::from(id)).collect();
            let lengths = vec![length; ids.len()];
            let reading = Reading { slots: &(0..ids.len()), ids: &ids, lengths: &lengths, asked: &[0] };
            step = Some(beams.step(self.slots.read(reading)?)?);
            length += 1;
        }
        for (sequence, best) in beams.best().into_iter().enumerate() {
            let mut stream = TextStream::new(self.tokenizer, &[])?;
            let mut text: String = best.ids.iter().map(|&id| stream.push(id).text).collect();
            text.push_str(&stream.finish());
            results.tell(place, sequence, best.ids.len(), &text)?;
            let finish = if best.ended { Finish::Stop } else { Finish::Length };
            results.texts[place][sequence] = Some(Generated { text, ids: best.ids, finish });
        }
        Ok(())
    }
}

impl Results<'_> {
    fn tell(&mut self, request: usize, sequence: usize, tokens: usize, text: &str) -> Result<()> {
        (self.tell)(News { request, sequence, tokens, text })
    }
}

/// Tokens in whole steps.
fn rounded(tokens: usize) -> usize {
    tokens.checked_next_multiple_of(STEP).unwrap_or(usize::MAX)
}

/// How many tokens a prompt has in common with what was read. Its last one is not among them: it is read for its scores.
fn shared(read: &[u32], prompt: &[u32]) -> usize {
    read.iter().zip(&prompt[..prompt.len() - 1]).take_while(|(a, b)| a == b).count()
}
