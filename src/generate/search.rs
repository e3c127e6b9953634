//! A beam search in the KV cache: a slot a beam.

use std::sync::Arc;

use super::batch::PART;
use super::beams::{BeamStep, Beams};
use super::engine::{Finish, Generated, Listener, Model, News, Submitted};
use super::text::TextStream;
use crate::Result;
use crate::runtime::slots::SlotRead;

/// A beam search under way, which has the cache for itself.
pub(super) struct Search {
    pub submitted: Arc<Submitted>,
    beams: Beams,
    state: State,
}

/// Prefill → Decode, until a step is the last one.
enum State {
    /// The prompt is to be read.
    Prefill,
    /// All slots have read so many tokens, and read these next.
    Decode(usize, BeamStep),
}

impl Search {
    /// Makes slots for a request's beams. What the cache held before is gone.
    ///
    /// # Errors
    /// There is no memory for them.
    pub fn new(submitted: Arc<Submitted>, model: &mut Model) -> Result<Self> {
        let request = &submitted.request;
        model.cache.resize(0, 0)?;
        model.cache.resize(request.settings.num_beams, model.room(request.prompt.len()))?;
        let beams = Beams::new(&request.prompt, &request.settings, &model.ends, model.most(request));
        Ok(Self { beams, submitted, state: State::Prefill })
    }

    /// Reads the prompt, or a token for each beam. Whether it was the last step.
    ///
    /// # Errors
    /// As [`Slots::read`](crate::runtime::Slots::read); there is no memory for a longer text.
    pub fn step(&mut self, model: &mut Model) -> Result<bool> {
        let (length, step) = match &self.state {
            State::Prefill => {
                let prompt = &self.submitted.request.prompt;
                (prompt.len(), prefill(prompt, &mut self.beams, model)?)
            }
            State::Decode(length, next) => {
                let start = self.submitted.request.prompt.len();
                (length + 1, decode(start..*length, next, &mut self.beams, model)?)
            }
        };
        let done = step.done;
        self.state = State::Decode(length, step);
        Ok(done)
    }

    /// Tells of the best sequences.
    ///
    /// # Errors
    /// As [`TextStream::new`].
    pub fn finish(self, model: &Model, listener: &mut Listener) -> Result<()> {
        let id = self.submitted.id;
        listener.unfinished.remove(&id);
        let best = self.beams.best();
        if best.is_empty() {
            (listener.tell)(News { last: true, ..News::of(id, 0) }); // no score was a number
        }
        let count = best.len();
        for (place, best) in best.into_iter().enumerate() {
            let mut stream = TextStream::new(model.tokenizer, &[])?;
            let mut text: String = best.ids.iter().map(|&id| stream.push(id).text).collect();
            text.push_str(&stream.finish());
            let finish = if best.ended { Finish::Stop } else { Finish::Length };
            let generated = Generated { text, ids: best.ids, finish, logprobs: Vec::new() };
            (listener.tell)(News {
                tokens: generated.ids.len(),
                text: &generated.text,
                finished: Some(&generated),
                last: place + 1 == count,
                ..News::of(id, place)
            });
        }
        Ok(())
    }
}

/// Reads the prompt in the first slot, and copies it to the others.
fn prefill(prompt: &[u32], beams: &mut Beams, model: &mut Model) -> Result<BeamStep> {
    let mut step = BeamStep::default();
    for (i, part) in prompt.chunks(PART).enumerate() {
        let ids: Vec<i64> = part.iter().map(|&id| i64::from(id)).collect();
        let asked = [ids.len() as i64 - 1];
        let reading = SlotRead { slots: &(0..1), ids: &ids, lengths: &[i * PART], asked: &asked };
        let scores = model.cache.read(reading)?;
        if (i + 1) * PART >= prompt.len() {
            step = beams.step(scores)?;
        }
    }
    let copies: Vec<(usize, usize)> = (1..model.cache.slots()).map(|to| (0, to)).collect();
    model.cache.copy(&copies, 0..prompt.len())?;
    Ok(step)
}

/// A decode step: one token for each beam. What they have generated before stands in `generated` of their slots, and
/// moves to where it is gone on with; what stands in front of it is the same in all slots.
fn decode(
    generated: std::ops::Range<usize>,
    next: &BeamStep,
    beams: &mut Beams,
    model: &mut Model,
) -> Result<BeamStep> {
    let length = generated.end;
    let moved: Vec<(usize, usize)> = next
        .from
        .iter()
        .copied()
        .enumerate()
        .map(|(to, from)| (from, to))
        .filter(|(from, to)| from != to)
        .collect();
    model.cache.copy(&moved, generated)?;
    model.make_room(length + 1)?;
    let ids: Vec<i64> = next.tokens.iter().map(|&id| i64::from(id)).collect();
    let lengths = vec![length; ids.len()];
    let reading = SlotRead { slots: &(0..ids.len()), ids: &ids, lengths: &lengths, asked: &[0] };
    beams.step(model.cache.read(reading)?)
}
