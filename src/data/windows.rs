//! Documents that are longer than the model → windows, of which one predicts each token.

use std::ops::Range;

use crate::{Result, bail_unusable};

/// Neighbouring windows share up to a quarter of their room.
pub const SHARED: usize = 4;

/// Tokens that the model sees at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// Of the document's tokens, special ones not counted.
    pub tokens: Range<usize>,
    /// Those whose predictions count: they stand farther from the window's ends than in any other window.
    pub predicts: Range<usize>,
}

/// Windows of at most `room` tokens that begin and end between words; neighbours share up to `stride` tokens. A word
/// that is longer than `room` is cut. Every token is predicted exactly once, in order.
///
/// `words` are the words' numbers of tokens; one may have none.
///
/// # Errors
/// Unusable: no room, or a stride that leaves no room for new tokens.
pub fn windows(words: &[usize], room: usize, stride: usize) -> Result<Vec<Window>> {
    if room == 0 {
        bail_unusable!("the maximum length has no room for a token beside the special ones");
    }
    if stride >= room {
        bail_unusable!(
            "--stride {stride}: windows have room for {room} tokens, so they can share {} at most",
            room - 1
        );
    }
    let borders = borders(words, room);
    let mut windows: Vec<Range<usize>> = Vec::new();
    let (mut first, mut end) = (0, 0); // of borders
    while end + 1 < borders.len() {
        while end + 1 < borders.len() && borders[end + 1] - borders[first] <= room {
            end += 1;
        }
        windows.push(borders[first]..borders[end]);
        if end + 1 == borders.len() {
            break;
        }
        // the next one begins with shared words, but must hold a new one
        let before = first;
        first = end;
        let fits = |first: usize| {
            borders[end] - borders[first] <= stride && borders[end + 1] - borders[first] <= room
        };
        while first - 1 > before && fits(first - 1) {
            first -= 1;
        }
    }
    Ok(assigned(&borders, windows))
}

/// Where tokens may be parted: between words, and inside those that are longer than a window. From 0 to the last.
fn borders(words: &[usize], room: usize) -> Vec<usize> {
    let mut borders = vec![0];
    let mut at = 0;
    for &length in words {
        if length > room {
            borders.extend(at + 1..at + length);
        }
        at += length;
        if length > 0 {
            borders.push(at);
        }
    }
    borders
}

/// Gives what stands between two borders to the window with the most context; the first of equals.
fn assigned(borders: &[usize], windows: Vec<Range<usize>>) -> Vec<Window> {
    let mut assigned: Vec<Window> =
        windows.into_iter().map(|tokens| Window { predicts: tokens.start..tokens.start, tokens }).collect();
    let mut here = 0;
    for word in borders.windows(2) {
        let context = |window: &Window| {
            let inside = window.tokens.start <= word[0] && word[1] <= window.tokens.end;
            inside.then(|| (word[0] - window.tokens.start).min(window.tokens.end - word[1]))
        };
        // from window to window the context on the left shrinks and that on the right grows: one is the best, and
        // for later words it is no earlier one
        while assigned.get(here + 1).is_some_and(|next| context(next) > context(&assigned[here])) {
            here += 1;
        }
        let window = &mut assigned[here];
        if window.predicts.is_empty() {
            window.predicts.start = word[0];
        }
        window.predicts.end = word[1];
    }
    assigned.retain(|window| !window.predicts.is_empty());
    assigned
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn window(tokens: Range<usize>, predicts: Range<usize>) -> Window {
        Window { tokens, predicts }
    }

    #[test]
    fn what_fits_is_one_window() {
        assert_eq!(windows(&[1, 2, 0, 3], 6, 2).unwrap(), [window(0..6, 0..6)]);
        assert_eq!(windows(&[], 6, 2).unwrap(), []);
        assert_eq!(windows(&[0, 0], 6, 2).unwrap(), []);
    }

    #[test]
    fn shared_words_are_predicted_where_they_have_more_context() {
        // of the four shared tokens, the first two are nearer to the middle of the first window
        assert_eq!(windows(&[1; 16], 10, 4).unwrap(), [window(0..10, 0..8), window(6..16, 8..16)]);
        // the middle one of three is as near in both: the first window has it
        assert_eq!(windows(&[1; 17], 10, 3).unwrap(), [window(0..10, 0..9), window(7..17, 9..17)]);
        assert_eq!(windows(&[1; 20], 10, 0).unwrap(), [window(0..10, 0..10), window(10..20, 10..20)]);
    }

    #[test]
    fn windows_part_words_only_where_they_are_too_long() {
        let parts = windows(&[3, 3, 9, 2], 5, 0).unwrap();
        let tokens: Vec<_> = parts.into_iter().map(|window| window.tokens).collect();
        assert_eq!(tokens, [0..3, 3..8, 8..13, 13..17]);
    }

    #[test]
    fn a_stride_must_leave_room() {
        assert!(windows(&[1; 9], 0, 0).is_err());
        assert!(windows(&[1; 9], 5, 5).unwrap_err().to_string().contains("4 at most"));
        assert_eq!(windows(&[1; 9], 5, 4).unwrap().len(), 5);
    }

    proptest! {
        #[test]
        fn every_token_is_predicted_once_and_in_order(
            words in prop::collection::vec(0_usize..12, 0..60),
            room in 1_usize..20,
            part in 0.0..1.0_f64,
        ) {
            let stride = (room as f64 * part) as usize;
            let total: usize = words.iter().sum();
            let parts = windows(&words, room, stride).unwrap();
            let mut next = 0;
            for Window { tokens, predicts } in &parts {
                prop_assert!(tokens.len() <= room);
                prop_assert!(tokens.start <= predicts.start && predicts.end <= tokens.end);
                prop_assert_eq!(predicts.start, next);
                prop_assert!(!predicts.is_empty());
                next = predicts.end;
            }
            prop_assert_eq!(next, total);
            let mut at = 0;
            for &length in &words {
                let word = at..at + length;
                at += length;
                if length == 0 {
                    continue;
                }
                let context = |w: &Window| {
                    let inside = w.tokens.start <= word.start && word.end <= w.tokens.end;
                    inside.then(|| (word.start - w.tokens.start).min(w.tokens.end - word.end))
                };
                if length <= room {
                    // whole in one window, and in no other with more context
                    let own = parts.iter().find(|w| w.predicts.start <= word.start && word.end <= w.predicts.end);
                    prop_assert!(own.is_some());
                    prop_assert_eq!(parts.iter().filter_map(context).max(), own.and_then(context));
                    prop_assert!(parts.iter().all(|w| !(word.start < w.tokens.start && w.tokens.start < word.end)));
                }
            }
            for pair in parts.windows(2) {
                prop_assert!(pair[0].tokens.end.saturating_sub(pair[1].tokens.start) <= stride);
            }
        }
    }
}
