//! Scores of the next token → a token: transformers' logits processors, in its order.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::config::GenerationConfig;

/// How many of the best tokens are first sorted to find those that reach `top_p`.
const SORTED: usize = 128;

/// Chooses the tokens of one sequence. What it draws depends on the seed, the record, the sequence and how many tokens
/// it drew before, on nothing else.
pub struct Sampler {
    temperature: f64,
    top_k: usize,
    top_p: f64,
    min_p: f64,
    penalty: f32,
    rng: ChaCha8Rng,
    /// The tokens that may be drawn, with their weights: their probabilities over that of the best token.
    kept: Vec<(f64, u32)>,
    scores: Vec<f32>,
}

impl Sampler {
    /// A sampler for the `sequence`-th of the answers for a prompt.
    pub fn new(settings: &GenerationConfig, sequence: u64) -> Self {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&settings.seed.to_le_bytes());
        key[8..16].copy_from_slice(&settings.record.to_le_bytes());
        let mut rng = ChaCha8Rng::from_seed(key);
        rng.set_stream(sequence);
        Self {
            temperature: settings.temperature.into(),
            top_k: settings.top_k,
            top_p: settings.top_p.into(),
            min_p: settings.min_p.into(),
            penalty: settings.repetition_penalty,
            rng,
            kept: Vec::new(),
            scores: Vec::new(),
        }
    }

    /// The next token, from the scores (V) of all tokens and the ids of the prompt and of what was generated
    /// so far. The penalty for repetition is written into the scores. A score that is no number is never
    /// chosen.
    pub fn next(&mut self, logits: &mut [f32], seen: &[u32]) -> u32 {
        penalise(logits, seen, self.penalty);
        let best = best(logits);
        if self.temperature == 0.0 {
            return best;
        }
        self.keep(logits, best);
        let total: f64 = self.kept.iter().map(|(weight, _)| weight).sum();
        let mut left = (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64 * total;
        for &(weight, id) in &self.kept {
            if left < weight {
                return id;
            }
            left -= weight;
        }
        best // where rounding leaves a rest
    }

    /// Fills `kept`: of all tokens the `top_k` best and those that equal the last of them; of these the
    /// fewest whose probabilities reach `top_p`; and of these the ones that have `min_p` of the best one's.
    fn keep(&mut self, logits: &[f32], best: u32) {
        let least = if (1..logits.len()).contains(&self.top_k) {
            self.scores.clear();
            self.scores.extend(logits.iter().map(|&x| if x.is_nan() { f32::NEG_INFINITY } else { x }));
            *self.scores.select_nth_unstable_by(self.top_k - 1, |a, b| b.total_cmp(a)).1
        } else {
            f32::NEG_INFINITY
        };
        let highest = logits.get(best as usize).copied().unwrap_or(0.0);
        let weight = |x: f32| match x == highest {
            true => 1.0, // of infinities too
            false => ((f64::from(x) - f64::from(highest)) / self.temperature).exp(),
        };
        self.kept.clear();
        let ids = logits.iter().zip(0..).filter(|(x, _)| **x >= least);
        self.kept.extend(ids.map(|(&x, id)| (weight(x), id)));
        if self.top_p < 1.0 {
            nucleus(&mut self.kept, self.top_p);
        }
        if self.min_p > 0.0 {
            self.kept.retain(|&(weight, _)| weight >= self.min_p);
        }
    }
}

/// Keeps the fewest tokens whose share of all weights reaches `p`, one at least. Of equal tokens the later
/// ones are kept, as transformers does, which sorts ascending and drops from the front.
fn nucleus(kept: &mut Vec<(f64, u32)>, p: f64) {
    let descending = |a: &(f64, u32), b: &(f64, u32)| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1));
    let enough = p * kept.iter().map(|(weight, _)| weight).sum::<f64>();
    let (mut sorted, mut above) = (0, 0.0);
    while sorted < kept.len() {
        let end = (sorted + SORTED.max(3 * sorted)).min(kept.len());
        if end < kept.len() {
            kept[sorted..].select_nth_unstable_by(end - sorted, descending);
        }
        kept[sorted..end].sort_unstable_by(descending);
        for i in sorted..end {
            if i > 0 && above >= enough {
                return kept.truncate(i);
            }
            above += kept[i].0;
        }
        sorted = end;
    }
}

/// Divides the scores (V) of the tokens that were seen by the penalty, and multiplies those below 0, each
/// token's once (Keskar et al. 2019, arXiv:1909.05858).
pub fn penalise(logits: &mut [f32], seen: &[u32], penalty: f32) {
    if penalty == 1.0 {
        return;
    }
    let mut seen = seen.to_vec();
    seen.sort_unstable();
    seen.dedup();
    for id in seen {
        if let Some(score) = logits.get_mut(id as usize) {
            *score = if *score < 0.0 { *score * penalty } else { *score / penalty };
        }
    }
}

/// The token of the highest score, the first of equals.
fn best(logits: &[f32]) -> u32 {
    // several maxima side by side, which the compiler keeps in one register
    let mut lanes = [f32::NEG_INFINITY; 16];
    for part in logits.chunks(lanes.len()) {
        for (lane, &score) in lanes.iter_mut().zip(part) {
            *lane = if score > *lane { score } else { *lane };
        }
    }
    let highest = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max);
    logits.iter().position(|&score| score == highest).unwrap_or(0) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 8] = [2.0, -1.0, 0.5, 3.0, 0.5, -2.5, 1.5, 0.25];

    fn sampling() -> GenerationConfig {
        GenerationConfig { temperature: 1.0, ..GenerationConfig::default() }
    }

    /// The tokens that may be drawn and their probabilities, in the order of their ids.
    fn probabilities(settings: &GenerationConfig, logits: &[f32], seen: &[u32]) -> Vec<(u32, f64)> {
        let mut sampler = Sampler::new(settings, 0);
        let mut logits = logits.to_vec();
        sampler.next(&mut logits, seen);
        let total: f64 = sampler.kept.iter().map(|(weight, _)| weight).sum();
        let mut kept: Vec<_> = sampler.kept.iter().map(|(weight, id)| (*id, weight / total)).collect();
        kept.sort_by_key(|&(id, _)| id);
        kept
    }

    /// The numbers are transformers 4.57.6's:
    /// `torch.softmax(LogitsProcessorList([...])(torch.tensor([seen]), torch.tensor([LOGITS])), -1)` with
    /// RepetitionPenaltyLogitsProcessor(repetition_penalty), TemperatureLogitsWarper(temperature),
    /// TopKLogitsWarper(top_k), TopPLogitsWarper(top_p) and MinPLogitsWarper(min_p), those that are on.
    #[test]
    fn what_may_be_drawn_is_what_transformers_draws_from() {
        let of = |repetition_penalty, temperature, top_k, top_p, min_p| GenerationConfig {
            repetition_penalty,
            temperature,
            top_k,
            top_p,
            min_p,
            ..GenerationConfig::default()
        };
        let unseen: &[u32] = &[];
        type Case<'a> = (GenerationConfig, &'a [u32], &'a [(u32, f64)]);
        let cases: [Case; 12] = [
            (
                of(1.0, 0.7, 0, 1.0, 0.0),
                unseen,
                &[
                    (0, 0.166823),
                    (1, 0.0022961),
                    (2, 0.0195715),
                    (3, 0.6961079),
                    (4, 0.0195715),
                    (5, 0.0002694),
                    (6, 0.0816668),
                    (7, 0.0136937),
                ],
            ),
            // two are equal in the fourth place, both stay
            (
                of(1.0, 1.0, 4, 1.0, 0.0),
                unseen,
                &[(0, 0.2095965), (2, 0.0467673), (3, 0.5697423), (4, 0.0467673), (6, 0.1271267)],
            ),
            (of(1.0, 1.0, 0, 0.8, 0.0), unseen, &[(0, 0.2312239), (3, 0.6285317), (6, 0.1402444)]),
            (of(1.0, 1.0, 0, 0.05, 0.0), unseen, &[(3, 1.0)]),
            // of the two equal ones one is enough
            (
                of(1.0, 1.0, 0, 0.89, 0.0),
                unseen,
                &[(0, 0.2198797), (3, 0.5976949), (4, 0.0490618), (6, 0.1333638)],
            ),
            (
                of(1.0, 1.0, 0, 0.94, 0.0),
                unseen,
                &[(0, 0.2095965), (2, 0.0467673), (3, 0.5697423), (4, 0.0467673), (6, 0.1271267)],
            ),
            (of(1.0, 1.0, 0, 1.0, 0.1), unseen, &[(0, 0.2312239), (3, 0.6285317), (6, 0.1402444)]),
            (
                of(1.3, 1.0, 0, 1.0, 0.0),
                &[3, 5, 3, 0],
                &[
                    (0, 0.192627),
                    (1, 0.0152152),
                    (2, 0.0681897),
                    (3, 0.4157094),
                    (4, 0.0681897),
                    (5, 0.0016037),
                    (6, 0.185359),
                    (7, 0.0531062),
                ],
            ),
            (
                of(1.3, 1.6, 6, 0.9, 0.15),
                &[3, 5, 3, 0],
                &[(0, 0.2155794), (2, 0.1126506), (3, 0.3486605), (4, 0.1126506), (6, 0.210459)],
            ),
            (of(1.0, 2.0, 3, 0.7, 0.0), unseen, &[(0, 0.3775407), (3, 0.6224594)]),
            (of(1.0, 2.0, 0, 0.9, 0.3), unseen, &[(0, 0.291756), (3, 0.4810243), (6, 0.2272198)]),
            (of(1.0, 1.0, 1, 1.0, 0.0), unseen, &[(3, 1.0)]),
        ];
        for (settings, seen, expected) in cases {
            let found = probabilities(&settings, &LOGITS, seen);
            let ids = |kept: &[(u32, f64)]| kept.iter().map(|kept| kept.0).collect::<Vec<_>>();
            assert_eq!(ids(&found), ids(expected), "{settings:?}");
            for (found, expected) in found.iter().zip(expected) {
                assert!((found.1 - expected.1).abs() < 2e-6, "{settings:?}: {found:?} {expected:?}");
            }
        }
    }

    #[test]
    fn a_large_vocabulary_is_cut_where_a_full_sort_cuts_it() {
        let logits: Vec<f32> = (0..5_000u32).map(|i| (i * 7919 % 5003) as f32 / 600.0).collect();
        let weights = |logits: &[f32]| logits.iter().map(|&x| f64::from(x).exp()).collect::<Vec<_>>();
        for p in [0.01, 0.3, 0.6, 0.9, 0.999] {
            let mut sorted = logits.clone();
            sorted.sort_by(|a, b| b.total_cmp(a));
            let total: f64 = weights(&sorted).iter().sum();
            let above = weights(&sorted).into_iter().scan(0.0, |sum, weight| {
                let above = *sum;
                *sum += weight;
                Some(above / total)
            });
            let expected = above.take_while(|&above| above < f64::from(p)).count();
            let found = probabilities(&GenerationConfig { top_p: p, ..sampling() }, &logits, &[]);
            assert_eq!(found.len(), expected, "{p}");
            let least = sorted[expected - 1];
            assert!(found.iter().all(|&(id, _)| logits[id as usize] >= least), "{p}");
        }
    }

    #[test]
    fn tokens_are_drawn_as_often_as_they_are_probable() {
        let settings = GenerationConfig { temperature: 1.5, ..sampling() };
        let expected = probabilities(&settings, &LOGITS, &[]);
        let (mut sampler, draws) = (Sampler::new(&settings, 3), 20_000);
        let mut counts = [0.0; 8];
        for _ in 0..draws {
            counts[sampler.next(&mut LOGITS.clone(), &[]) as usize] += 1.0;
        }
        let squares = expected.iter().map(|&(id, p)| {
            let mean = p * f64::from(draws);
            (counts[id as usize] - mean).powi(2) / mean
        });
        let chi_square: f64 = squares.sum();
        assert!(chi_square < 18.5, "{chi_square}: above 18.5 in one of a hundred, of 7 degrees of freedom");
    }

    #[test]
    fn a_seed_repeats_and_a_sequence_draws_its_own() {
        let drawn = |seed, sequence| -> Vec<u32> {
            let mut sampler =
                Sampler::new(&GenerationConfig { seed, temperature: 3.0, ..sampling() }, sequence);
            (0..32).map(|_| sampler.next(&mut LOGITS.clone(), &[])).collect()
        };
        assert_eq!(drawn(1, 0), drawn(1, 0));
        assert_ne!(drawn(1, 0), drawn(1, 1));
        assert_ne!(drawn(1, 0), drawn(2, 0));
        let of_record = |record| -> Vec<u32> {
            let settings = GenerationConfig { seed: 1, record, temperature: 3.0, ..sampling() };
            let mut sampler = Sampler::new(&settings, 0);
            (0..32).map(|_| sampler.next(&mut LOGITS.clone(), &[])).collect()
        };
        assert_eq!(of_record(0), drawn(1, 0));
        assert_ne!(of_record(1), of_record(2));
        // the place in the sequence decides, not what could be drawn before it
        let (mut one, mut other) = (Sampler::new(&sampling(), 0), Sampler::new(&sampling(), 0));
        one.next(&mut [0.0], &[]);
        other.next(&mut LOGITS.clone(), &[]);
        assert_eq!(one.next(&mut LOGITS.clone(), &[]), other.next(&mut LOGITS.clone(), &[]));
    }

    #[test]
    fn greedy_takes_the_first_of_the_best_once_repetition_is_penalised() {
        let mut greedy =
            Sampler::new(&GenerationConfig { repetition_penalty: 2.0, ..GenerationConfig::default() }, 0);
        assert_eq!(greedy.next(&mut [1.0, 3.0, 3.0], &[]), 1);
        assert_eq!(greedy.next(&mut [2.0, 3.0, 2.0], &[1, 1]), 0);
        let mut logits = [4.0, -4.0, 4.0];
        penalise(&mut logits, &[1, 0, 1, 0, 99], 2.0);
        assert_eq!(logits, [2.0, -8.0, 4.0], "once each, however often they were seen");
    }

    #[test]
    fn scores_that_are_no_numbers_are_not_chosen() {
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        let cases: [(&[f32], u32); 6] = [
            (&[nan, 1.0, nan], 1),
            (&[-inf, -inf], 0),
            (&[0.0, inf], 1),
            (&[nan], 0),
            (&[], 0),
            (&[-inf, 1.0], 1),
        ];
        for (logits, expected) in cases {
            let all = GenerationConfig { top_k: 1, top_p: 0.5, min_p: 0.5, ..sampling() };
            for settings in [GenerationConfig::default(), sampling(), all] {
                let found = Sampler::new(&settings, 0).next(&mut logits.to_vec(), &[]);
                assert!(found == expected || logits == [-inf, -inf], "{logits:?} {settings:?}: {found}");
            }
        }
    }
}
