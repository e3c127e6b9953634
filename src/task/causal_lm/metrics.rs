//! How much a generated text has of the one that was wanted: ROUGE-L and chrF.

use std::collections::HashMap;

/// The longest n-grams of characters that chrF counts.
const ORDER: usize = 6;
/// How many times as much recall counts as precision in chrF, squared.
const BETA_SQUARED: f64 = 4.0;

/// ROUGE-L of a text: the F-measure of the longest common subsequence of words, from 0 to 100. Words are runs of `a` to `z`
/// and digits after lower-casing, as `rougeL` of Google's `rouge-score` takes them without a stemmer; other scripts have
/// none.
pub fn rouge_l(wanted: &str, found: &str) -> f64 {
    let [wanted, found] = [wanted, found].map(str::to_lowercase);
    let [wanted, found] = [&wanted, &found].map(|text| words(text).collect::<Vec<_>>());
    let common = longest_common(&wanted, &found) as f64;
    if common == 0.0 {
        return 0.0;
    }
    let (precision, recall) = (common / found.len() as f64, common / wanted.len() as f64);
    200.0 * precision * recall / (precision + recall)
}

fn words(lower: &str) -> impl Iterator<Item = &str> {
    let is_of_word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    lower.split(move |c| !is_of_word(c)).filter(|word| !word.is_empty())
}

/// The length of the longest common subsequence.
fn longest_common(a: &[&str], b: &[&str]) -> usize {
    // of what is in front of each word of `b`, with the words of `a` so far
    let mut lengths = vec![0; b.len() + 1];
    for word in a {
        let mut diagonal = 0;
        for (at, other) in b.iter().enumerate() {
            let above = lengths[at + 1];
            lengths[at + 1] = if word == other { diagonal + 1 } else { above.max(lengths[at]) };
            diagonal = above;
        }
    }
    lengths[b.len()]
}

/// chrF of a corpus, as sacrebleu computes `chrF2` where nothing else is said: n-grams of 1 to 6 characters without white
/// space, counted over all texts.
#[derive(Clone, Copy, Debug, Default)]
pub struct ChrF {
    /// For each n: n-grams of the found texts, of those that were wanted, and of both.
    counts: [[usize; 3]; ORDER],
}

impl ChrF {
    /// Counts a text.
    pub fn add(&mut self, wanted: &str, found: &str) {
        let [wanted, found] =
            [wanted, found].map(|text| text.chars().filter(|c| !is_space(*c)).collect::<Vec<_>>());
        for (n, [in_found, in_wanted, in_both]) in (1..).zip(&mut self.counts) {
            let wanted = ngrams(&wanted, n);
            if wanted.is_empty() {
                continue; // what was found where nothing is wanted of this length does not count
            }
            for (ngram, count) in ngrams(&found, n) {
                *in_found += count;
                *in_both += count.min(wanted.get(ngram).copied().unwrap_or(0));
            }
            *in_wanted += wanted.values().sum::<usize>();
        }
    }

    /// From 0 to 100: the F-measure of the means of precision and recall over those n that have both.
    pub fn score(&self) -> f64 {
        let counted = self.counts.iter().filter(|[found, wanted, _]| *found > 0 && *wanted > 0);
        let (mut precision, mut recall, mut orders) = (0.0, 0.0, 0.0);
        for [found, wanted, both] in counted {
            precision += *both as f64 / *found as f64;
            recall += *both as f64 / *wanted as f64;
            orders += 1.0;
        }
        if precision + recall == 0.0 {
            return 0.0;
        }
        let (precision, recall) = (precision / orders, recall / orders);
        100.0 * (1.0 + BETA_SQUARED) * precision * recall / (BETA_SQUARED * precision + recall)
    }
}

/// What Python's `str.split` takes for spaces: Unicode's, and ASCII's separators.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

fn ngrams(text: &[char], n: usize) -> HashMap<&[char], usize> {
    let mut counts = HashMap::new();
    for ngram in text.windows(n) {
        *counts.entry(ngram).or_default() += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    /// `models/texts.json`, as `scripts/reference-texts` wrote it.
    #[derive(Deserialize)]
    struct Reference {
        pairs: Vec<Pair>,
        together: Scores,
    }

    #[derive(Deserialize)]
    struct Pair {
        wanted: String,
        found: String,
        #[serde(flatten)]
        scores: Scores,
    }

    #[derive(Debug, Deserialize)]
    struct Scores {
        rouge_l: f64,
        chrf: f64,
    }

    impl Scores {
        fn check(&self, rouge_l: f64, chrf: f64, what: &str) {
            let near = |a: f64, b: f64| (a - b).abs() < 1e-9;
            assert!(near(rouge_l, self.rouge_l), "{what}: rouge_l {rouge_l}, expected {self:?}");
            assert!(near(chrf, self.chrf), "{what}: chrf {chrf}, expected {self:?}");
        }
    }

    #[test]
    fn scores_are_those_of_rouge_score_and_sacrebleu() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/texts.json");
        let reference: Reference = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let (mut rouge, mut together) = (0.0, ChrF::default());
        for Pair { wanted, found, scores } in &reference.pairs {
            let mut alone = ChrF::default();
            alone.add(wanted, found);
            scores.check(rouge_l(wanted, found), alone.score(), &format!("{wanted:?}, {found:?}"));
            rouge += rouge_l(wanted, found) / reference.pairs.len() as f64;
            together.add(wanted, found);
        }
        reference.together.check(rouge, together.score(), "together");
        assert_eq!(ChrF::default().score(), 0.0);
    }
}
