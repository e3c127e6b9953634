//! Lengths → batches of about one length, under a budget of padded tokens.

/// Groups records by length: sorted, cut where rows × longest would exceed `budget`, or rows `most`; a record that is
/// longer stands alone. The same lengths give the same batches. Indices into `lengths`, longest batch last.
pub fn batches(lengths: &[usize], budget: usize, most: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&i| (lengths[i], i));
    let mut batches: Vec<Vec<usize>> = Vec::new();
    for i in order {
        match batches.last_mut() {
            // sorted, so this record is the longest so far
            Some(batch) if batch.len() < most && (batch.len() + 1) * lengths[i] <= budget => batch.push(i),
            _ => batches.push(vec![i]),
        }
    }
    batches
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn records_of_one_length_stand_together() {
        assert_eq!(batches(&[3, 9, 3, 4, 100], 10, usize::MAX), vec![vec![0, 2], vec![3], vec![1], vec![4]]);
        assert_eq!(batches(&[1; 5], 10, 2), vec![vec![0, 1], vec![2, 3], vec![4]]);
        assert_eq!(batches(&[], 10, usize::MAX), Vec::<Vec<usize>>::new());
    }

    proptest! {
        #[test]
        fn every_record_is_in_one_batch_under_the_budget(
            lengths in proptest::collection::vec(1usize..600, 0..200),
            budget in 1usize..2000,
            most in 1usize..300,
        ) {
            let batches = batches(&lengths, budget, most);
            let mut seen: Vec<usize> = batches.concat();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..lengths.len()).collect::<Vec<_>>());
            for batch in batches {
                let longest = batch.iter().map(|&i| lengths[i]).max().unwrap();
                prop_assert!(batch.len() == 1 || batch.len() * longest <= budget);
                prop_assert!(batch.len() <= most);
            }
        }
    }
}
