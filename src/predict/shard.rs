//! One of several parts of an input: which records it has.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use crate::{Result, bail_unusable, unusable};

/// The part `part`, from 0, of `of`; written `part/of`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    part: u32,
    of: u32,
}

impl Shard {
    /// The records of this part, of so many. A part is whole windows, whose batches are then those of one run; the
    /// parts follow each other and differ by a window at most. Where there are fewer windows than parts, some are empty.
    pub fn records(self, count: usize, window: usize) -> Range<usize> {
        let windows = count.div_ceil(window) as u128;
        let begin = |part: u32| {
            let before = windows * u128::from(part) / u128::from(self.of);
            (before as usize).saturating_mul(window).min(count)
        };
        begin(self.part)..begin(self.part + 1)
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}/{}", self.part, self.of)
    }
}

impl FromStr for Shard {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let numbers = text.split_once('/').map(|(part, of)| (part.parse(), of.parse()));
        let Some((Ok(part), Ok(of))) = numbers else {
            return Err(unusable!("I/N was expected, the part from 0 and how many there are, such as 0/4"));
        };
        match of {
            0 => bail_unusable!("there are no 0 parts: N is 1 or more"),
            _ if part >= of => bail_unusable!("there is no part {part}: of {of} the last is {}", of - 1),
            _ => Ok(Self { part, of }),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn parts_are_whole_windows_one_behind_the_other(
            count in 0usize..500, window in 1usize..60, of in 1u32..40
        ) {
            let parts: Vec<_> = (0..of).map(|part| Shard { part, of }.records(count, window)).collect();
            let mut end = 0;
            for part in &parts {
                prop_assert_eq!(part.start, end);
                prop_assert!(part.start % window == 0 || part.is_empty());
                end = part.end;
            }
            prop_assert_eq!(end, count);
            let windows = || parts.iter().map(|part| part.len().div_ceil(window));
            prop_assert!(windows().max().unwrap() - windows().min().unwrap() <= 1);
        }
    }

    #[test]
    fn numbers_of_any_size_are_cut() {
        let last = Shard { part: u32::MAX - 1, of: u32::MAX };
        assert_eq!(last.records(usize::MAX, 1).end, usize::MAX);
        assert_eq!(Shard { part: 0, of: 1 }.records(usize::MAX, usize::MAX), 0..usize::MAX);
    }

    #[test]
    fn a_part_is_written_as_it_is_read() {
        assert_eq!("3/4".parse::<Shard>().unwrap().to_string(), "3/4");
        for (text, wanted) in [
            ("4/4", "of 4 the last is 3"),
            ("0/0", "N is 1 or more"),
            ("1", "such as 0/4"),
            ("-1/2", "such as 0/4"),
            ("1/2/3", "such as 0/4"),
            ("/", "such as 0/4"),
            ("0/4294967296", "such as 0/4"),
        ] {
            let error = text.parse::<Shard>().unwrap_err();
            assert!(error.to_string().contains(wanted), "{text}: {error}");
        }
    }
}
