//! The data's order: (settings, the examples' lengths) → for each epoch its optimizer steps, each a list of
//! micro-batches of examples. It depends on nothing else, so a resumed run finds its place.

use anyhow::Context;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::Settings;
use crate::Result;
use crate::eager::kernels::dropout::mix;

/// Batches' worth of examples that are sorted by length together.
const WINDOW: usize = 16;

/// What one micro-batch may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Budget {
    /// This many examples.
    Examples(usize),
    /// Whole examples of this many tokens together; an example that has more stands alone.
    Tokens(usize),
}

/// Indices of the examples of one forward pass.
pub type MicroBatch = Vec<usize>;

/// The order that the settings and the lengths of the examples make, and the epoch that the run stands in.
#[derive(Clone, Debug)]
pub struct Plan {
    lengths: Vec<usize>,
    budget: Budget,
    accumulation: usize,
    /// None takes the examples in the order of the file.
    seed: Option<u64>,
    total: usize,
    /// The current epoch, the steps before it, and its own.
    epoch: usize,
    start: usize,
    steps: Vec<Vec<MicroBatch>>,
}

impl Plan {
    /// Plans a run over examples of the given numbers of tokens.
    pub fn new(settings: &Settings, lengths: Vec<usize>) -> Self {
        Self::of_processes(settings, lengths, 1)
    }

    /// The same where each of so many processes takes the forward passes that one would take of a step.
    pub fn of_processes(settings: &Settings, lengths: Vec<usize>, processes: usize) -> Self {
        Self::of_part(settings, lengths, processes, 0, 0)
    }

    /// Plans the steps behind `start` over the examples of one part of the data, in the order of this epoch.
    pub fn of_part(
        settings: &Settings,
        lengths: Vec<usize>,
        processes: usize,
        epoch: usize,
        start: usize,
    ) -> Self {
        let mut plan = Self {
            lengths,
            budget: settings.budget(),
            accumulation: settings.gradient_accumulation.saturating_mul(processes),
            seed: (!settings.no_shuffle).then_some(settings.seed),
            total: 0,
            epoch,
            start,
            steps: Vec::new(),
        };
        let planned = || (0..settings.epochs).map(|epoch| plan.steps_of(epoch).len()).sum();
        plan.total = settings.max_steps.unwrap_or_else(planned);
        plan.steps = plan.steps_of(epoch);
        plan
    }

    /// The step behind the current epoch's last one.
    pub fn end(&self) -> usize {
        self.start + self.steps.len()
    }

    /// Optimizer steps of the whole run.
    pub fn total_steps(&self) -> usize {
        self.total
    }

    /// Goes to the epoch whose steps `taken` ends or stands in.
    pub fn go_behind(&mut self, taken: usize) {
        while taken > self.end() && !self.steps.is_empty() {
            self.next_epoch();
        }
    }

    fn next_epoch(&mut self) {
        self.start = self.end();
        self.epoch += 1;
        self.steps = self.steps_of(self.epoch);
    }

    /// The micro-batches of the step that comes after `taken` steps; a run only goes forward.
    ///
    /// # Errors
    /// There are no examples, or the step is before the current epoch.
    pub fn step(&mut self, taken: usize) -> Result<&[MicroBatch]> {
        while taken >= self.end() && !self.steps.is_empty() {
            self.next_epoch();
        }
        let place = taken.checked_sub(self.start).and_then(|place| self.steps.get(place));
        Ok(place.with_context(|| format!("no examples are planned for step {}", taken + 1))?.as_slice())
    }

    /// Whether what is done every so many steps, or else after every epoch, is due after `taken` steps; after the
    /// last one it is.
    pub fn is_due(&self, every: Option<usize>, taken: usize) -> bool {
        taken == self.total || every.map_or(taken == self.end(), |every| taken.is_multiple_of(every))
    }

    /// How many epochs `taken` steps are, the current one counted by its share.
    pub fn epochs(&self, taken: usize) -> f64 {
        let length = self.steps.len();
        (self.epoch * length + taken - self.start) as f64 / length as f64
    }

    /// An epoch's steps, each a list of micro-batches; the last step may be smaller.
    ///
    /// Under a budget of tokens the epoch's random order is cut into windows, each window is sorted by length and
    /// cut into micro-batches, and these are shuffled: sequences of one length stand together, but lengths do not
    /// rise from step to step.
    pub fn steps_of(&self, epoch: usize) -> Vec<Vec<MicroBatch>> {
        let mut order: Vec<usize> = (0..self.lengths.len()).collect();
        let batches = match self.seed {
            None => self.fill(&order),
            Some(seed) => {
                let mut rng = ChaCha8Rng::seed_from_u64(mix(seed ^ mix(epoch as u64)));
                shuffle(&mut order, &mut rng);
                match self.budget {
                    Budget::Examples(_) => self.fill(&order),
                    Budget::Tokens(most) => self.windows(&order, most.saturating_mul(WINDOW), &mut rng),
                }
            }
        };
        batches.chunks(self.accumulation).map(<[_]>::to_vec).collect()
    }

    /// Micro-batches of windows that reach `size` tokens. What is left over of a window, too little for a whole
    /// micro-batch, goes on to the next one; it is the longest or the shortest by chance, so that no length is kept
    /// for the epoch's end.
    fn windows(&self, order: &[usize], size: usize, rng: &mut impl Rng) -> Vec<MicroBatch> {
        let (mut batches, mut window, mut tokens) = (Vec::new(), Vec::new(), 0);
        for (i, &example) in order.iter().enumerate() {
            window.push(example);
            tokens += self.lengths[example];
            let last = i + 1 == order.len();
            if tokens < size && !last {
                continue;
            }
            window.sort_by_key(|&example| self.lengths[example]);
            if rng.next_u64().is_multiple_of(2) {
                window.reverse();
            }
            let mut filled = self.fill(&window);
            window = if last { Vec::new() } else { filled.pop().unwrap_or_default() };
            tokens = window.iter().map(|&example| self.lengths[example]).sum();
            shuffle(&mut filled, rng);
            batches.append(&mut filled);
        }
        batches
    }

    /// Cuts examples into micro-batches as full as the budget allows, in the given order.
    fn fill(&self, order: &[usize]) -> Vec<MicroBatch> {
        let mut batches: Vec<MicroBatch> = Vec::new();
        let mut tokens = 0;
        for &example in order {
            let length = self.lengths[example];
            let fits = |batch: &MicroBatch| match self.budget {
                Budget::Examples(most) => batch.len() < most,
                Budget::Tokens(most) => tokens + length <= most,
            };
            match batches.last_mut() {
                Some(batch) if fits(batch) => {
                    batch.push(example);
                    tokens += length;
                }
                _ => {
                    batches.push(vec![example]);
                    tokens = length;
                }
            }
        }
        batches
    }
}

/// Fisher and Yates' shuffle.
pub(super) fn shuffle<T>(items: &mut [T], rng: &mut impl Rng) {
    for i in (1..items.len()).rev() {
        // the high half of a 64-bit product: a number below i + 1
        let j = ((u128::from(rng.next_u64()) * (i as u128 + 1)) >> 64) as usize;
        items.swap(i, j);
    }
}

#[cfg(test)]
mod tests;
