//! Which tokens of a text are to be found, and what stands in their places (Devlin et al. 2018, arXiv:1810.04805, A.1).

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::Masked;
use crate::data::batch::Encoding;
use crate::task::Example;

/// How tokens are masked.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Masking {
    /// The share of a text's tokens that are to be found.
    pub probability: f64,
    /// Whether all tokens of a word are, or none.
    pub whole_words: bool,
    /// The token that stands for one that is hidden.
    pub mask: u32,
    /// Tokens below this one may stand for another.
    pub vocabulary: usize,
}

/// Of the tokens that are to be found, the share that the mask stands for.
const HIDDEN: f64 = 0.8;
/// And the share that another token stands for; the rest stay as they are.
const REPLACED: f64 = 0.1;

impl Masking {
    /// The text with tokens masked at random, a function of the key: each token of the text, or each word, with the
    /// probability; one at least, where it has any. `words`, (T), are the words that tokens are of, and none of what is no
    /// part of the text.
    pub fn masked(&self, encoding: &Encoding, words: &[Option<u32>], key: u64) -> Example<Masked> {
        let mut rng = ChaCha8Rng::seed_from_u64(key);
        let mut encoding = encoding.clone();
        let mut wanted = vec![None; encoding.len()];
        for unit in self.chosen(words, &mut rng) {
            for at in unit {
                let id = &mut encoding.ids[at];
                wanted[at] = Some(*id);
                let fate = uniform(&mut rng);
                if fate < HIDDEN {
                    *id = self.mask;
                } else if fate < HIDDEN + REPLACED {
                    *id = below(&mut rng, self.vocabulary) as u32;
                }
            }
        }
        Example { encoding, target: Masked { words: words.into(), wanted } }
    }

    /// Tokens, or those of whole words, that are to be found.
    fn chosen(&self, words: &[Option<u32>], rng: &mut impl Rng) -> Vec<std::ops::Range<usize>> {
        let mut units: Vec<std::ops::Range<usize>> = Vec::new();
        for (at, word) in words.iter().enumerate().filter(|(_, word)| word.is_some()) {
            match units.last_mut() {
                Some(unit) if self.whole_words && unit.end == at && words[unit.start] == *word => {
                    unit.end += 1;
                }
                _ => units.push(at..at + 1),
            }
        }
        let mut chosen: Vec<_> = units.iter().filter(|_| uniform(rng) < self.probability).cloned().collect();
        if chosen.is_empty() && !units.is_empty() {
            chosen.push(units[below(rng, units.len())].clone());
        }
        chosen
    }
}

/// A number in [0, 1).
pub(in crate::task) fn uniform(rng: &mut impl Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
}

/// A whole number below `n`, which is not 0.
pub(in crate::task) fn below(rng: &mut impl Rng, n: usize) -> usize {
    ((u128::from(rng.next_u64()) * n as u128) >> 64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    const MASKING: Masking = Masking { probability: 0.15, whole_words: false, mask: 4, vocabulary: 1000 };

    /// A special token, words of one, two and three tokens over and over, a special token.
    fn text(tokens: usize) -> (Encoding, Vec<Option<u32>>) {
        let ids: Vec<u32> = (0..tokens as u32 + 2).map(|i| 2000 + i).collect();
        let mut words: Vec<Option<u32>> = vec![None; tokens + 2];
        let lengths = [1, 2, 3].into_iter().cycle();
        let of = lengths.zip(0..).flat_map(|(length, word)| std::iter::repeat_n(word, length));
        words[1..=tokens].iter_mut().zip(of).for_each(|(own, word)| *own = Some(word));
        (Encoding { type_ids: vec![0; ids.len()], ids, truncated: false }, words)
    }

    #[test]
    fn shares_are_those_of_bert_and_a_key_repeats_them() {
        let (encoding, words) = text(600);
        let (mut found, mut hidden, mut replaced, mut kept) = (0, 0, 0, 0);
        for key in 0..300 {
            let Example { encoding: masked, target } = MASKING.masked(&encoding, &words, key);
            assert_eq!(target.wanted.first(), Some(&None), "special tokens are never to be found");
            assert_eq!(target.wanted.last(), Some(&None));
            for (at, wanted) in target.wanted.iter().enumerate() {
                let Some(id) = *wanted else {
                    assert_eq!(masked.ids[at], encoding.ids[at], "what is not to be found stays");
                    continue;
                };
                assert_eq!(id, encoding.ids[at]);
                found += 1;
                match masked.ids[at] {
                    4 => hidden += 1,
                    id if id == encoding.ids[at] => kept += 1,
                    id => {
                        assert!(id < 1000);
                        replaced += 1;
                    }
                }
            }
            assert_eq!(MASKING.masked(&encoding, &words, key).encoding, masked);
        }
        let share = |n: i32, of: i32| f64::from(n) / f64::from(of);
        assert!((share(found, 300 * 600) - 0.15).abs() < 0.003, "{found}");
        assert!((share(hidden, found) - 0.8).abs() < 0.01, "{hidden} of {found}");
        assert!((share(replaced, found) - 0.1).abs() < 0.01, "{replaced} of {found}");
        assert!((share(kept, found) - 0.1).abs() < 0.01, "{kept} of {found}");
    }

    #[test]
    fn whole_words_are_found_or_not_and_every_text_has_something_to_find() {
        let whole = Masking { whole_words: true, ..MASKING };
        let (encoding, words) = text(60);
        for key in 0..50 {
            let wanted = whole.masked(&encoding, &words, key).target.wanted;
            for at in 1..60 {
                if words[at] == words[at + 1] {
                    assert_eq!(wanted[at].is_some(), wanted[at + 1].is_some(), "token {at}");
                }
            }
            let (short, words) = text(1);
            assert_eq!(MASKING.masked(&short, &words, key).target.wanted, [None, Some(2001), None]);
        }
        let (none, words) = text(0);
        assert_eq!(MASKING.masked(&none, &words, 0).encoding, none);
    }
}
