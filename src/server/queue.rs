//! Records that wait for a model: so many and no more, taken in batches of about one length.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::served::{Ask, Told};

/// What a queue may hold, and what is taken of it at once.
#[derive(Clone, Copy, Debug)]
pub struct QueueLimits {
    /// Records that wait at most.
    pub records: usize,
    /// Padded tokens of a batch with more than one window.
    pub batch_tokens: usize,
    /// How long the oldest record waits for others at most, where a batch is not full.
    pub wait: Duration,
}

/// A record that waits for its answer.
pub struct Job {
    pub asked: Ask,
    pub arrived: Instant,
    reply: oneshot::Sender<Reply>,
}

impl Job {
    /// Hands the answer to whoever waits for it, if somebody still does.
    pub fn answer(self, reply: Reply) {
        let _ = self.reply.send(reply);
    }
}

/// What became of a record.
pub struct Reply {
    /// What the model tells; or why it could tell nothing.
    pub told: Result<Told, String>,
    /// Between its arrival and the batch that it was in.
    pub queued: Duration,
    /// What that batch took.
    pub computed: Duration,
}

/// Why records are not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Too many wait already.
    Full,
    /// The server is about to stop.
    Closed,
}

/// Records that wait for a model.
pub struct Queue {
    state: Mutex<State>,
    changed: Condvar,
    limits: QueueLimits,
}

#[derive(Default)]
struct State {
    /// In the order of their arrival.
    waiting: Vec<Job>,
    closed: bool,
}

impl Queue {
    /// An empty queue.
    pub fn new(limits: QueueLimits) -> Self {
        Self { state: Mutex::default(), changed: Condvar::new(), limits }
    }

    /// Takes all of a request's records, or none. Dropping a receiver takes its record back.
    ///
    /// # Errors
    /// There is no room for all of them, or the queue is closed.
    pub fn submit(&self, records: Vec<Ask>) -> Result<Vec<oneshot::Receiver<Reply>>, Refused> {
        let mut state = self.state();
        if state.closed {
            return Err(Refused::Closed);
        }
        if state.waiting.len() + records.len() > self.limits.records {
            state.waiting.retain(|job| !job.reply.is_closed());
        }
        if state.waiting.len() + records.len() > self.limits.records {
            return Err(Refused::Full);
        }
        let arrived = Instant::now();
        let mut receivers = Vec::with_capacity(records.len());
        for asked in records {
            let (reply, receiver) = oneshot::channel();
            state.waiting.push(Job { asked, arrived, reply });
            receivers.push(receiver);
        }
        drop(state);
        self.changed.notify_all();
        Ok(receivers)
    }

    /// The next batch: the oldest record, and those nearest to its length that fit beside it. Waits for one; none once the
    /// queue is closed and empty.
    pub fn next(&self) -> Option<Vec<Job>> {
        let mut state = self.state();
        loop {
            state.waiting.retain(|job| !job.reply.is_closed());
            let Some(oldest) = state.waiting.first() else {
                if state.closed {
                    return None;
                }
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let sizes: Vec<(usize, usize)> =
                state.waiting.iter().map(|job| (job.asked.windows(), job.asked.longest())).collect();
            let picked = pick(&sizes, self.limits.batch_tokens);
            let left = self.limits.wait.saturating_sub(oldest.arrived.elapsed());
            if picked.len() == sizes.len() && !left.is_zero() && !state.closed {
                let waited = self.changed.wait_timeout(state, left);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            let mut taken = picked.iter().peekable();
            let mut place = 0;
            let jobs = state
                .waiting
                .extract_if(.., |_| {
                    let is_next = taken.next_if(|&&picked| picked == place).is_some();
                    place += 1;
                    is_next
                })
                .collect();
            return Some(jobs);
        }
    }

    /// Takes no more records; those that wait are still answered.
    pub fn close(&self) {
        self.state().closed = true;
        self.changed.notify_all();
    }

    /// How many records wait.
    pub fn len(&self) -> usize {
        self.state().waiting.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Of records with so many windows, the longest of so many tokens: the first one, and those nearest to its length, as long
/// as windows × the longest one is within the budget. In their order.
fn pick(sizes: &[(usize, usize)], budget: usize) -> Vec<usize> {
    let Some(&(mut windows, mut longest)) = sizes.first() else { return Vec::new() };
    let first = longest;
    let mut others: Vec<usize> = (1..sizes.len()).collect();
    others.sort_by_key(|&i| (sizes[i].1.abs_diff(first), i));
    let mut picked = vec![0];
    for i in others {
        let (more, length) = sizes[i];
        let wide = longest.max(length);
        if (windows + more) * wide <= budget {
            (windows, longest) = (windows + more, wide);
            picked.push(i);
        }
    }
    picked.sort_unstable();
    picked
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::predict::Asked;

    fn limits(records: usize) -> QueueLimits {
        QueueLimits { records, batch_tokens: 8, wait: Duration::ZERO }
    }

    fn asked(tokens: usize) -> Ask {
        Ask::Record(Asked::of_length(tokens))
    }

    fn lengths(jobs: &[Job]) -> Vec<usize> {
        jobs.iter().map(|job| job.asked.longest()).collect()
    }

    #[test]
    fn the_oldest_goes_first_with_those_of_its_length() {
        let queue = Queue::new(limits(10));
        let receivers = queue.submit([4, 1, 9, 4, 3].map(asked).into()).unwrap();
        assert_eq!(lengths(&queue.next().unwrap()), [4, 4]);
        assert_eq!(lengths(&queue.next().unwrap()), [1, 3]);
        // longer than a batch: alone
        assert_eq!(lengths(&queue.next().unwrap()), [9]);
        assert!(queue.is_empty());
        drop(receivers);
    }

    #[test]
    fn a_full_queue_takes_all_of_a_request_or_none_and_what_nobody_waits_for_makes_room() {
        let queue = Queue::new(limits(3));
        let first = queue.submit(vec![asked(1), asked(1)]).unwrap();
        assert_eq!(queue.submit(vec![asked(1), asked(1)]).err(), Some(Refused::Full));
        assert_eq!(queue.len(), 2);
        drop(first);
        let second = queue.submit(vec![asked(2), asked(2)]).unwrap();
        // those of the client that went are not computed
        assert_eq!(lengths(&queue.next().unwrap()), [2, 2]);
        drop(second);
    }

    #[test]
    fn a_closed_queue_gives_what_it_has_taken_and_ends() {
        let queue = Queue::new(limits(3));
        let receivers = queue.submit(vec![asked(1)]).unwrap();
        queue.close();
        assert_eq!(queue.submit(vec![asked(1)]).err(), Some(Refused::Closed));
        assert_eq!(queue.next().map(|jobs| jobs.len()), Some(1));
        assert!(queue.next().is_none());
        drop(receivers);
    }

    #[test]
    fn who_waits_for_a_record_hears_of_the_next_one() {
        let queue = Queue::new(limits(3));
        std::thread::scope(|scope| {
            let taken = scope.spawn(|| queue.next().map(|jobs| jobs.len()));
            let receivers = queue.submit(vec![asked(1)]).unwrap();
            assert_eq!(taken.join().unwrap(), Some(1));
            let ended = scope.spawn(|| queue.next().is_none());
            queue.close();
            assert!(ended.join().unwrap());
            drop(receivers);
        });
    }

    proptest! {
        #[test]
        fn a_batch_holds_the_first_record_and_stays_within_the_budget(
            sizes in proptest::collection::vec((1usize..4, 1usize..300), 1..60),
            budget in 1usize..1000,
        ) {
            let picked = pick(&sizes, budget);
            prop_assert_eq!(picked[0], 0);
            prop_assert!(picked.windows(2).all(|pair| pair[0] < pair[1]));
            let windows: usize = picked.iter().map(|&i| sizes[i].0).sum();
            let longest = picked.iter().map(|&i| sizes[i].1).max().unwrap();
            prop_assert!(picked.len() == 1 || windows * longest <= budget);
        }
    }
}
