//! Scores → log-probabilities: of the token that stands there, and of the likeliest ones.

/// What is told of a token: log-probabilities under the model, before a temperature or a penalty.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    pub id: u32,
    /// None of a text's first token, in front of which nothing stands.
    pub logprob: Option<f32>,
    /// The likeliest tokens at its place, the best first.
    pub top: Vec<(u32, f32)>,
}

impl TokenLogprobs {
    /// A text's first token.
    pub fn first(id: u32) -> Self {
        Self { id, logprob: None, top: Vec::new() }
    }

    /// A token's, and the `top` best, from the scores (V) behind what stands in front of it. Scores that are no numbers are
    /// not among the best.
    pub fn of(scores: &[f32], id: u32, top: usize) -> Self {
        let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = scores.iter().map(|&x| f64::from(x - max).exp()).sum();
        let log = |x: f32| (f64::from(x - max) - sum.ln()) as f32;
        let mut best: Vec<(u32, f32)> = Vec::with_capacity(top + 1);
        for (id, &score) in (0..).zip(scores) {
            let least =
                if best.len() < top { Some(f32::NEG_INFINITY) } else { best.last().map(|last| last.1) };
            if least.is_some_and(|least| score > least) {
                let place = best.partition_point(|&(_, other)| other >= score);
                best.insert(place, (id, score));
                best.truncate(top);
            }
        }
        let top = best.into_iter().map(|(id, score)| (id, log(score))).collect();
        Self { id, logprob: scores.get(id as usize).copied().map(log), top }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_come_first_and_all_together_are_one() {
        let scores = [1.0, 3.0, f32::NAN, 3.0, -2.0, f32::NEG_INFINITY];
        let numbers = [1.0, 3.0, 3.0, -2.0];
        let of = |top| TokenLogprobs::of(&scores[..2], 0, top);
        assert_eq!(of(0).top, []);
        let all = of(5).top;
        assert_eq!(all.iter().map(|&(id, _)| id).collect::<Vec<_>>(), [1, 0]);
        assert!((all.iter().map(|&(_, log)| f64::from(log).exp()).sum::<f64>() - 1.0).abs() < 1e-6);
        assert_eq!(of(1).logprob, Some(all[1].1), "the token itself, though it is not the best");
        let best = TokenLogprobs::of(&numbers, 3, 2);
        assert_eq!(
            best.top.iter().map(|&(id, _)| id).collect::<Vec<_>>(),
            [1, 2],
            "equal ones in their order"
        );
        let best = TokenLogprobs::of(&scores, 3, 9).top;
        assert_eq!(best.iter().map(|&(id, _)| id).collect::<Vec<_>>(), [1, 3, 0, 4]);
    }
}
