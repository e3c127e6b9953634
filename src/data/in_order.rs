//! Items → what is made of each, by all threads, in the order of the items.

use rayon::prelude::*;

use crate::Result;

/// Items that are under way together: enough to keep all threads at work, few enough to be held.
pub(super) const BLOCK: usize = 4096;

/// Makes something of each item, and hands it over with the item's index, one after the other: it is as if one thread did
/// all. What is made and not yet taken is that of a block, however many items there are.
///
/// # Errors
/// The first that `take` gives, behind which nothing is taken.
pub fn in_order<I: Sync, O: Send>(
    items: &[I],
    make: impl Fn(&I) -> O + Sync,
    mut take: impl FnMut(usize, O) -> Result<()>,
) -> Result<()> {
    let mut taken = 0;
    blocks(items, make, |made| {
        for made in made {
            take(taken, made)?;
            taken += 1;
        }
        Ok(())
    })
}

/// The same, where what is made is taken a block at a time.
pub(super) fn blocks<I: Sync, O: Send>(
    items: &[I],
    make: impl Fn(&I) -> O + Sync,
    mut take: impl FnMut(Vec<O>) -> Result<()>,
) -> Result<()> {
    items.chunks(BLOCK).try_for_each(|items| take(items.par_iter().map(&make).collect()))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn what_is_made_comes_in_the_order_of_the_items_and_never_waits_in_heaps() {
        let items: Vec<usize> = (0..3 * BLOCK + 17).collect();
        let waiting = AtomicUsize::new(0);
        let mut taken = Vec::new();
        let make = |&item: &usize| {
            waiting.fetch_add(1, Ordering::Relaxed);
            (0..item % 97).sum::<usize>() + item // some take longer than others
        };
        let take = |i: usize, made: usize| {
            assert!(waiting.fetch_sub(1, Ordering::Relaxed) <= BLOCK);
            taken.push((i, made));
            Ok(())
        };
        in_order(&items, make, take).unwrap();
        assert!(taken.iter().copied().eq(items.iter().map(|&i| (i, (0..i % 97).sum::<usize>() + i))));
    }

    #[test]
    fn the_first_error_ends_it() {
        let items: Vec<usize> = (0..2 * BLOCK).collect();
        let mut taken = 0;
        let make =
            |&item: &usize| if item == 5 || item == 3 { Err(anyhow::anyhow!("{item}")) } else { Ok(()) };
        let take = |_, made: Result<()>| {
            made?;
            taken += 1;
            Ok(())
        };
        assert_eq!(in_order(&items, make, take).unwrap_err().to_string(), "3");
        assert_eq!(taken, 3);
    }
}
