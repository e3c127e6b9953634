use proptest::prelude::*;

use super::*;

fn settings(budget: Budget) -> Settings {
    let (batch_size, batch_tokens) = match budget {
        Budget::Examples(examples) => (Some(examples), None),
        Budget::Tokens(tokens) => (None, Some(tokens)),
    };
    Settings { batch_size, batch_tokens, ..Settings::default() }
}

/// Lengths from 5 to 100 in no order.
fn mixed(count: u64) -> Vec<usize> {
    (0..count).map(|i| 5 + (mix(i) % 96) as usize).collect()
}

fn tokens(plan: &Plan, batch: &MicroBatch) -> usize {
    batch.iter().map(|&example| plan.lengths[example]).sum()
}

/// All micro-batches of an epoch.
fn batches(plan: &Plan, epoch: usize) -> Vec<MicroBatch> {
    plan.steps_of(epoch).concat()
}

fn budgets() -> impl Strategy<Value = Budget> {
    prop_oneof![(1usize..40).prop_map(Budget::Examples), (1usize..900).prop_map(Budget::Tokens)]
}

proptest! {
    #[test]
    fn every_example_comes_once_an_epoch_within_the_budget(
        lengths in proptest::collection::vec(1usize..300, 1..200),
        budget in budgets(),
        gradient_accumulation in 1usize..5,
        epochs in 1usize..4,
        no_shuffle in any::<bool>(),
    ) {
        let settings = Settings { gradient_accumulation, epochs, no_shuffle, ..settings(budget) };
        let mut plan = Plan::new(&settings, lengths.clone());
        let mut taken = 0;
        for epoch in 0..epochs {
            let mut seen = Vec::new();
            while !(taken > 0 && plan.is_due(None, taken) && seen.len() == lengths.len()) {
                let step = plan.step(taken).unwrap().to_vec();
                taken += 1;
                prop_assert!(!step.is_empty() && step.len() <= gradient_accumulation);
                for batch in &step {
                    let fits = match budget {
                        Budget::Examples(most) => batch.len() <= most,
                        Budget::Tokens(most) => batch.len() == 1 || tokens(&plan, batch) <= most,
                    };
                    prop_assert!(!batch.is_empty() && fits, "{:?} of {:?}", batch, lengths);
                    seen.extend_from_slice(batch);
                }
                prop_assert_eq!(plan.is_due(None, taken), seen.len() == lengths.len());
            }
            prop_assert_eq!(plan.epochs(taken), (epoch + 1) as f64);
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..lengths.len()).collect::<Vec<_>>());
        }
        prop_assert_eq!(plan.total_steps(), taken);
    }

    /// Every micro-batch but an epoch's last is so full that no example of the longest kind fits.
    #[test]
    fn micro_batches_are_full(lengths in proptest::collection::vec(1usize..300, 1..400), most in 1usize..900) {
        let plan = Plan::new(&settings(Budget::Tokens(most)), lengths.clone());
        let longest = lengths.iter().max().unwrap();
        let short = batches(&plan, 0).iter().filter(|batch| tokens(&plan, batch) + longest <= most).count();
        prop_assert!(short <= 1, "{} of {:?}", short, batches(&plan, 0));
    }
}

#[test]
fn a_plan_repeats_and_differs_between_epochs_and_seeds() {
    for budget in [Budget::Examples(7), Budget::Tokens(300)] {
        let plan = |seed| Plan::new(&Settings { seed, ..settings(budget) }, mixed(500));
        assert_eq!(plan(1).steps_of(3), plan(1).steps_of(3));
        assert_ne!(plan(1).steps_of(3), plan(1).steps_of(4));
        assert_ne!(plan(1).steps_of(3), plan(2).steps_of(3));
    }
}

#[test]
fn a_run_that_goes_on_takes_the_steps_of_one_that_never_stopped() {
    let whole = Plan::new(&settings(Budget::Tokens(300)), mixed(200));
    let mut steps = whole.clone();
    for taken in 0..whole.total_steps() {
        let step = steps.step(taken).unwrap().to_vec();
        assert_eq!(whole.clone().step(taken).unwrap(), step, "step {taken}");
    }
    assert!(steps.step(0).is_err(), "a plan does not go back");
}

#[test]
fn the_schedule_is_planned_for_epochs_of_unequal_numbers_of_steps() {
    let plan = Plan::new(&Settings { epochs: 12, ..settings(Budget::Tokens(150)) }, mixed(300));
    let steps: Vec<usize> = (0..12).map(|epoch| plan.steps_of(epoch).len()).collect();
    assert!(steps.iter().any(|&n| n != steps[0]), "the test needs unequal epochs: {steps:?}");
    assert_eq!(plan.total_steps(), steps.iter().sum::<usize>());
    let settings = Settings { max_steps: Some(1_000_000_000_000), ..settings(Budget::Tokens(150)) };
    assert_eq!(Plan::new(&settings, mixed(300)).total_steps(), 1_000_000_000_000);
}

#[test]
fn lengths_are_alike_in_a_micro_batch_and_in_no_order_between_them() {
    let plan = Plan::new(&settings(Budget::Tokens(500)), mixed(3000));
    let batches = batches(&plan, 0);
    let spread = |batch: &MicroBatch| {
        let lengths = || batch.iter().map(|&example| plan.lengths[example]);
        lengths().max().unwrap() - lengths().min().unwrap()
    };
    let mean = |values: &mut dyn Iterator<Item = usize>| {
        let values: Vec<usize> = values.collect();
        values.iter().sum::<usize>() as f64 / values.len() as f64
    };
    let alike = mean(&mut batches.iter().map(spread));
    assert!(alike < 20.0, "lengths of a micro-batch are {alike} apart, of 95");

    // in sorted windows nearly all neighbours would rise, or nearly all fall
    let first: Vec<usize> = batches.iter().map(|batch| plan.lengths[batch[0]]).collect();
    for (i, window) in first.chunks_exact(WINDOW).enumerate() {
        let rises = window.windows(2).filter(|pair| pair[0] < pair[1]).count();
        assert!((3..=WINDOW - 4).contains(&rises), "window {i}: {window:?}");
    }
}

#[test]
fn neither_the_longest_nor_the_shortest_are_kept_for_an_epochs_end() {
    let mut lengths = mixed(3000);
    (lengths[7], lengths[11]) = (1, 130);
    let plan = Plan::new(&settings(Budget::Tokens(500)), lengths);
    for example in [7, 11] {
        let is_late = |epoch: &usize| {
            let batches = batches(&plan, *epoch);
            let at = batches.iter().position(|batch| batch.contains(&example)).unwrap();
            at + WINDOW >= batches.len()
        };
        let late = (0..40).filter(is_late).count();
        assert!(
            late < 15,
            "example {example}, one of 3000, is among the last {WINDOW} batches of {late} epochs of 40"
        );
    }
}

#[test]
fn the_files_order_is_kept() {
    let plan =
        |budget| Plan::new(&Settings { no_shuffle: true, ..settings(budget) }, vec![3, 9, 2, 4, 30, 1]);
    assert_eq!(plan(Budget::Tokens(12)).steps_of(1).concat(), [vec![0, 1], vec![2, 3], vec![4], vec![5]]);
    assert_eq!(plan(Budget::Examples(4)).steps_of(1).concat(), [vec![0, 1, 2, 3], vec![4, 5]]);
}

/// What runs of earlier versions were trained with, and go on with.
#[test]
fn the_shuffled_order_of_batches_of_examples_stays_what_it_is() {
    let settings = Settings { gradient_accumulation: 2, ..settings(Budget::Examples(3)) };
    let plan = Plan::new(&settings, vec![5; 10]);
    let expected = [vec![vec![8, 6, 2], vec![9, 5, 1]], vec![vec![3, 0, 4], vec![7]]];
    assert_eq!(plan.steps_of(1), expected);
}
