//! A run's examples, step by step: of those that are held all along, or of one buffer of a stream after the other.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use super::Settings;
use super::plan::Plan;
use super::stream::Stream;
use crate::Result;
use crate::task::{Encoder, Example, Task};

/// Which buffer of a stream is learnt from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Buffer {
    /// Its number, from 0.
    pub number: usize,
    /// Steps that were taken before its first.
    pub start: usize,
}

/// What gives one buffer of examples after the other.
pub struct Streamed<'a> {
    pub stream: Stream<'a>,
    pub encoder: Encoder<'a>,
}

/// The examples of a run's steps.
pub struct Supply<'a> {
    settings: &'a Settings,
    task: &'a Task,
    processes: usize,
    plan: Plan,
    /// All of them, or those of the buffer.
    examples: Cow<'a, [Example]>,
    buffer: Buffer,
    streamed: Option<Streamed<'a>>,
}

impl<'a> Supply<'a> {
    /// The steps of so many processes over these examples: all there are, or those of the stream's first buffer.
    pub fn new(
        settings: &'a Settings,
        task: &'a Task,
        processes: usize,
        examples: &'a [Example],
        streamed: Option<Streamed<'a>>,
    ) -> Self {
        let examples = Cow::Borrowed(examples);
        let plan = Plan::of_processes(settings, lengths(&examples), processes);
        Self { settings, task, processes, plan, examples, buffer: Buffer::default(), streamed }
    }

    /// Optimizer steps of the whole run.
    pub fn total_steps(&self) -> usize {
        self.plan.total_steps()
    }

    /// The buffer that is learnt from, of a stream.
    pub fn buffer(&self) -> Option<Buffer> {
        self.streamed.as_ref().map(|_| self.buffer)
    }

    /// Goes to where an earlier process stood behind so many steps.
    ///
    /// # Errors
    /// As [`Stream::examples`].
    pub fn go_behind(&mut self, taken: usize, buffer: Option<Buffer>) -> Result<()> {
        match buffer {
            Some(buffer) => self.go_to(buffer)?,
            None => self.plan.go_behind(taken),
        }
        Ok(())
    }

    fn go_to(&mut self, buffer: Buffer) -> Result<()> {
        if let Some(Streamed { stream, encoder }) = &mut self.streamed
            && buffer != self.buffer
        {
            self.examples = Vec::new().into(); // before those that come instead
            self.examples = stream.examples(buffer.number, self.task, encoder)?.into();
            let lengths = lengths(&self.examples);
            self.plan = Plan::of_part(self.settings, lengths, self.processes, buffer.number, buffer.start);
            self.buffer = buffer;
        }
        Ok(())
    }

    /// The micro-batches of the step that comes after `taken` steps; a run only goes forward.
    ///
    /// # Errors
    /// As [`Plan::step`] and [`Stream::examples`].
    pub fn step(&mut self, taken: usize) -> Result<Vec<Vec<&Example>>> {
        while self.streamed.is_some() && taken >= self.plan.end() {
            self.go_to(Buffer { number: self.buffer.number + 1, start: self.plan.end() })?;
        }
        let examples = &self.examples;
        let micro_batches = self.plan.step(taken)?.iter();
        Ok(micro_batches.map(|batch| batch.iter().map(|&i| &examples[i]).collect()).collect())
    }

    /// As [`Plan::is_due`]; a buffer stands for an epoch.
    pub fn is_due(&self, every: Option<usize>, taken: usize) -> bool {
        self.plan.is_due(every, taken)
    }

    /// How many passes over the data `taken` steps are.
    pub fn epochs(&self, taken: usize) -> f64 {
        match &self.streamed {
            None => self.plan.epochs(taken),
            // of a buffer that the plan counts by its number
            Some(Streamed { stream, .. }) => stream.passes(self.plan.epochs(taken)),
        }
    }
}

fn lengths(examples: &[Example]) -> Vec<usize> {
    examples.iter().map(Example::tokens).collect()
}
