//! Beam search for one prompt, as transformers' `_beam_search` (4.57) with `early_stopping=False`: which
//! sequences are gone on with and which are finished. The model is the caller's.

use anyhow::ensure;

use super::config::GenerationConfig;
use super::sampler::penalise;
use crate::Result;

/// The state of a search.
pub struct Beams {
    prompt: usize,
    /// Sequences that are gone on with, best first; before the first step the prompt alone.
    running: Vec<Beam>,
    /// At most `num_beams`, best first; the scores are those of [`Hypothesis`].
    finished: Vec<Beam>,
    num_beams: usize,
    returned: usize,
    length_penalty: f64,
    repetition_penalty: f32,
    ends: Vec<u32>,
    max_length: usize,
}

/// A sequence, with its prompt.
#[derive(Clone)]
struct Beam {
    ids: Vec<u32>,
    score: f32,
}

/// What the model reads next. Both lists have one entry for each sequence that is gone on with, best first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BeamStep {
    /// The row of the last scores that the sequence comes from: where its cache is.
    pub from: Vec<usize>,
    /// The token that it reads.
    pub tokens: Vec<u32>,
    /// No sequence is gone on with: the lists are empty.
    pub done: bool,
}

/// An answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Hypothesis {
    /// The new tokens, without the end token.
    pub ids: Vec<u32>,
    /// The sum of the tokens' log-probabilities over their number, the end token counted, to the power of
    /// `length_penalty`.
    pub score: f32,
    /// Whether the end token ended it, and not the length.
    pub ended: bool,
}

/// A continuation of a running sequence.
#[derive(Clone, Copy)]
struct Candidate {
    row: usize,
    token: u32,
    score: f32,
}

impl Beams {
    /// A search that ends a sequence at one of the tokens `ends`, or at `max_length` tokens, the prompt's counted; of
    /// a prompt that has as many already, after one more.
    pub fn new(prompt: &[u32], settings: &GenerationConfig, ends: &[u32], max_length: usize) -> Self {
        Self {
            prompt: prompt.len(),
            running: vec![Beam { ids: prompt.to_vec(), score: 0.0 }],
            finished: Vec::new(),
            num_beams: settings.num_beams.max(1),
            returned: settings.num_return_sequences,
            length_penalty: settings.length_penalty.into(),
            repetition_penalty: settings.repetition_penalty,
            ends: ends.to_vec(),
            max_length,
        }
    }

    /// Takes the scores (rows, V) of the tokens behind every sequence: at first one row, the prompt's, then
    /// one for each entry of the last step. These are `num_beams`, fewer where the vocabulary has no more
    /// tokens to begin with. Log-probabilities are written over the scores. After the search is done nothing
    /// happens.
    ///
    /// # Errors
    /// The scores are not so many rows.
    pub fn step(&mut self, logits: &mut [f32]) -> Result<BeamStep> {
        let rows = self.running.len();
        if rows == 0 {
            return Ok(BeamStep { done: true, ..BeamStep::default() });
        }
        let (len, width) = (logits.len(), logits.len() / rows);
        ensure!(width > 0 && len == rows * width, "{len} scores are no {rows} rows, one for each beam");

        // as many that, if all sequences end, enough others are left
        let mut candidates = BestCandidates::new(self.num_beams.saturating_mul(2.max(1 + self.ends.len())));
        for (row, (logits, beam)) in logits.chunks_exact_mut(width).zip(&self.running).enumerate() {
            log_softmax(logits);
            penalise(logits, &beam.ids, self.repetition_penalty);
            for (token, &mut log_probability) in (0..).zip(logits) {
                candidates.offer(Candidate { row, token, score: log_probability + beam.score });
            }
        }
        let grown = |candidate: &Candidate, score: f32| {
            let mut ids = self.running[candidate.row].ids.clone();
            ids.push(candidate.token);
            Beam { ids, score }
        };
        let length = self.running[0].ids.len() + 1;
        let full = length >= self.max_length;
        let divisor = ((length - self.prompt) as f64).powf(self.length_penalty) as f32;

        // only the first `num_beams` may finish, the others stand in for them
        let ends = |candidate: &&Candidate| full || self.ends.contains(&candidate.token);
        let finishing = candidates.list.iter().take(self.num_beams).filter(ends);
        self.finished.extend(finishing.map(|candidate| grown(candidate, candidate.score / divisor)));
        self.finished.sort_by(|a, b| b.score.total_cmp(&a.score));
        self.finished.truncate(self.num_beams);

        let next = candidates.list.iter().filter(|candidate| !ends(candidate)).take(self.num_beams);
        let next: Vec<&Candidate> = next.collect();
        let running = next.iter().map(|candidate| grown(candidate, candidate.score)).collect();
        let step = BeamStep {
            from: next.iter().map(|candidate| candidate.row).collect(),
            tokens: next.iter().map(|candidate| candidate.token).collect(),
            done: false,
        };
        self.running = running;
        // the heuristic of transformers: the best running sequence as if it ended here
        let improvable = |best: &Beam| match self.finished.get(self.num_beams - 1) {
            Some(worst) => best.score / divisor > worst.score,
            None => true,
        };
        if self.running.first().is_some_and(improvable) {
            return Ok(step);
        }
        self.running.clear();
        Ok(BeamStep { done: true, ..BeamStep::default() })
    }

    /// The `num_return_sequences` best answers, best first; fewer if the search is not done and fewer have
    /// ended.
    pub fn best(self) -> Vec<Hypothesis> {
        let hypothesis = |Beam { ids, score }| {
            let mut ids = ids[self.prompt..].to_vec();
            let ended = ids.pop_if(|id| self.ends.contains(id)).is_some();
            Hypothesis { ids, score, ended }
        };
        self.finished.into_iter().take(self.returned).map(hypothesis).collect()
    }
}

/// The highest candidates of those that were offered, best first, earlier ones before their equals.
struct BestCandidates {
    list: Vec<Candidate>,
    room: usize,
}

impl BestCandidates {
    fn new(room: usize) -> Self {
        Self { list: Vec::new(), room }
    }

    fn offer(&mut self, candidate: Candidate) {
        let fits = self.list.len() < self.room && !candidate.score.is_nan();
        if fits || self.list.last().is_some_and(|worst| candidate.score > worst.score) {
            let place = self.list.partition_point(|other| other.score >= candidate.score);
            self.list.insert(place, candidate);
            self.list.truncate(self.room);
        }
    }
}

/// Scores (V) → log-probabilities.
fn log_softmax(logits: &mut [f32]) {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from((x - highest).exp())).sum();
    let log = sum.ln() as f32;
    logits.iter_mut().for_each(|x| *x = *x - highest - log);
}

#[cfg(test)]
mod tests {
    use super::*;

    const END: u32 = 0;

    /// A model of 12 tokens, of different scores each: they depend on the last two ids, in 128ths.
    fn scores(ids: &[u32]) -> Vec<f32> {
        let [.., a, b] = *ids else { panic!() };
        let (first, step) = (a * 17 + b * 29 + a * b * 3, 1 + (a * 37 + b * 91 + a * b * 5) % 250);
        let score = |t| (first + t * step) % 251 * 2 + if t == END { 79 } else { 0 };
        (0..12).map(|t| score(t) as f32 / 128.0).collect()
    }

    /// The answers, and how often the model was asked. The caller's rows follow `from` and `tokens`, as a
    /// cache does.
    fn search(prompt: &[u32], settings: &GenerationConfig) -> (Vec<Hypothesis>, usize) {
        let mut beams = Beams::new(prompt, settings, &[END], prompt.len() + settings.max_new_tokens);
        let (mut rows, mut asked) = (vec![prompt.to_vec()], 0);
        loop {
            let mut logits: Vec<f32> = rows.iter().flat_map(|ids| scores(ids)).collect();
            asked += 1;
            let step = beams.step(&mut logits).unwrap();
            if step.done {
                return (beams.best(), asked);
            }
            assert_eq!(step.from.len(), settings.num_beams);
            let grown = step.from.iter().zip(&step.tokens);
            rows = grown.map(|(&row, &token)| [&rows[row][..], &[token]].concat()).collect();
        }
    }

    /// The sequences, their scores and the number of forward passes are transformers 4.57.6's:
    /// `generate(prompt, num_beams, length_penalty, repetition_penalty, max_new_tokens, num_return_sequences,
    /// do_sample=False, early_stopping=False, output_scores=True)` of a `GenerationMixin` whose `forward`
    /// returns these scores; `sequences` up to the length that `beam_indices` gives, and `sequences_scores`.
    #[test]
    fn the_best_sequences_are_those_that_transformers_finds() {
        type Expected<'a> = &'a [(&'a [u32], f32, bool)];
        let check = |prompt: &[u32], given: (usize, f32, f32, usize), passes, expected: Expected| {
            let (num_beams, length_penalty, repetition_penalty, max_new_tokens) = given;
            let settings = GenerationConfig {
                num_beams,
                length_penalty,
                repetition_penalty,
                max_new_tokens,
                num_return_sequences: expected.len(),
                ..GenerationConfig::default()
            };
            let (found, asked) = search(prompt, &settings);
            assert_eq!((asked, found.len()), (passes, expected.len()), "{prompt:?} {given:?}");
            for (found, &(ids, score, ended)) in found.iter().zip(expected) {
                assert_eq!((&found.ids[..], found.ended), (ids, ended), "{prompt:?} {given:?}");
                assert!((found.score - score).abs() < 2e-6 * score.abs(), "{found:?} {score} {given:?}");
            }
        };
        check(&[3, 5], (2, 2.0, 1.0, 12), 2, &[(&[7], -0.8358742, true), (&[], -0.8601193, true)]);
        check(
            &[3, 5],
            (4, 1.0, 1.0, 12),
            8,
            &[
                (&[], -0.8601193, true),
                (&[5, 11, 2, 2, 5], -1.4062687, true),
                (&[5, 11, 2, 7, 6, 5, 2], -1.4289008, true),
                (&[5, 10, 10, 7, 6, 5, 2], -1.4321333, true),
            ],
        );
        check(
            &[3, 5],
            (4, 2.0, 1.0, 12),
            12,
            &[
                (&[5, 11, 2, 7, 6, 5, 2, 9, 7, 5, 8, 7], -0.12139935, false),
                (&[5, 10, 10, 7, 6, 5, 2, 9, 7, 5, 8, 7], -0.12157893, false),
            ],
        );
        check(
            &[3, 5],
            (6, 2.0, 1.0, 12),
            12,
            &[
                (&[5, 11, 2, 7, 6, 5, 5, 11, 2, 2, 5], -0.11617605, true),
                (&[5, 10, 10, 7, 6, 5, 5, 11, 2, 2, 5], -0.11635563, true),
            ],
        );
        check(
            &[3, 5],
            (6, 1.0, 1.3, 12),
            10,
            &[(&[], -0.8601193, true), (&[7, 1, 4, 2, 9, 6], -1.5348139, true)],
        );
        check(
            &[7, 2],
            (4, 0.0, 1.0, 12),
            4,
            &[(&[], -1.0424653, true), (&[2, 5], -3.5092292, true), (&[1, 1, 7], -5.2283936, true)],
        );
        check(
            &[7, 2],
            (2, 2.0, 1.0, 12),
            4,
            &[(&[2, 5, 3], -0.335885, true), (&[1, 11, 4], -0.34437335, true)],
        );
        check(
            &[7, 2],
            (6, -1.0, 1.0, 12),
            5,
            &[(&[], -1.0424653, true), (&[2, 5], -10.527687, true), (&[1, 1, 7], -20.913574, true)],
        );
        check(&[4, 4], (6, 0.5, 1.0, 12), 5, &[(&[], -0.8996407, true), (&[8, 2], -2.3676312, true)]);
        check(
            &[9, 9, 1],
            (4, 1.0, 1.5, 10),
            7,
            &[(&[7], -1.2474737, true), (&[], -1.385402, true), (&[8, 4, 2, 7, 6, 3], -1.3970745, true)],
        );
        check(
            &[9, 9, 1],
            (4, 1.5, 0.8, 10),
            10,
            &[
                (&[7, 7, 9, 3, 8, 9, 5, 3, 8, 9], -0.40160432, false),
                (&[7, 7, 9, 3, 8, 9, 5, 3, 8, 3], -0.40358075, false),
                (&[7, 7, 9, 3, 8, 3, 9, 9, 1, 7], -0.40593168, false),
            ],
        );
        check(
            &[7, 2],
            (3, 0.5, 1.2, 1),
            1,
            &[(&[], -1.0424653, true), (&[1], -1.4721528, false), (&[2], -1.5415834, false)],
        );
    }

    #[test]
    fn scores_of_another_shape_are_an_error_and_odd_ones_are_none() {
        let settings = GenerationConfig { num_beams: 2, ..GenerationConfig::default() };
        let mut beams = Beams::new(&[1], &settings, &[END], 9);
        assert!(beams.step(&mut []).is_err());
        let step = beams.step(&mut [f32::NEG_INFINITY, 1.0, 0.0]).unwrap();
        assert_eq!(step, BeamStep { from: vec![0, 0], tokens: vec![1, 2], done: false });
        assert!(beams.step(&mut [0.0; 5]).is_err());
        let step = beams.step(&mut [f32::NAN; 6]).unwrap();
        assert!(step.done && beams.best().is_empty());
        // a vocabulary that is smaller than the beams, and a prompt that fills the length
        let mut beams =
            Beams::new(&[1], &GenerationConfig { num_beams: 5, ..GenerationConfig::default() }, &[END], 1);
        assert!(beams.step(&mut [0.0, 1.0]).unwrap().done);
        assert_eq!(beams.best()[0].ids, [1]);
    }
}
