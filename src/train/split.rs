//! Records to learn from → which of them are measured on, and which are left out. What is drawn depends on the seed and the
//! records alone.

use std::collections::BTreeMap;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::plan::shuffle;
use crate::data::records::{Columns, Files, Numbered, Place};
use crate::eager::kernels::dropout::mix;
use crate::say::listed;
use crate::task::flags::refuse_records;
use crate::task::{RecordFlags, Task, TrainingFlags};
use crate::{Result, bail_unusable};

/// Labels that are told by name.
const LISTED: usize = 8;

/// Which of the training records are learnt from.
#[derive(Clone, Debug, Default, PartialEq, clap::Args, Serialize, Deserialize)]
#[group(skip)]
#[serde(rename_all = "kebab-case", default)]
pub struct SplitFlags {
    /// Measure on this share of the training records, drawn by --seed, and learn from the others. Of a task with one label
    /// a record each label keeps its share.
    #[arg(long, value_name = "X", conflicts_with = "eval", help_heading = "Splits")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation_split: Option<f64>,
    /// Learn from this share of the training records (of what --validation-split leaves), drawn in the same way.
    #[arg(long, value_name = "X", help_heading = "Splits")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train_fraction: Option<f64>,
    /// Records that have the same in this column stay together: all of them are learnt from, measured on or left out.
    #[arg(long, value_name = "NAME", help_heading = "Splits")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group_column: Option<String>,
}

/// The training records before a split, and all that a split depends on.
#[derive(Clone, Copy, Debug)]
pub struct Whole<'a> {
    /// The task's name.
    pub task: &'a str,
    pub train: &'a Files,
    pub records: &'a RecordFlags,
    pub training: &'a TrainingFlags,
    pub seed: u64,
}

/// The training records after a split.
#[derive(Clone, Debug)]
pub struct Divided {
    pub train: Files,
    /// What was drawn to be measured on.
    pub eval: Option<Files>,
    /// What people ought to know of it.
    pub told: Vec<String>,
}

impl SplitFlags {
    /// Refuses shares that are none.
    ///
    /// # Errors
    /// Unusable: names the flag.
    pub fn check(&self) -> Result<()> {
        if let Some(share) = self.validation_split.filter(|share| !(*share > 0.0 && *share < 1.0)) {
            bail_unusable!("--validation-split {share}: expected a share between 0 and 1, such as 0.1");
        }
        if let Some(share) = self.train_fraction.filter(|share| !(*share > 0.0 && *share <= 1.0)) {
            bail_unusable!("--train-fraction {share}: expected a share above 0 and up to 1");
        }
        if self.group_column.is_some() && self.validation_split.is_none() && self.train_fraction.is_none() {
            bail_unusable!(
                "--group-column is for --validation-split and --train-fraction; here is none of them"
            );
        }
        Ok(())
    }

    /// Draws from the training records; none where nothing is to be drawn.
    ///
    /// # Errors
    /// Unusable: records that can't be read, one without a group, a share that is less than a record or than a group.
    pub fn divide(&self, whole: &Whole) -> Result<Option<Divided>> {
        self.check()?;
        let fraction = self.train_fraction.filter(|share| *share < 1.0);
        if self.validation_split.is_none() && fraction.is_none() {
            return Ok(None);
        }
        let mut records = Records::read(whole, self.group_column.as_deref())?;
        let mut told = Vec::new();
        if let (Some(column), false) = (&self.group_column, records.parts.is_empty()) {
            told.push(format!(
                "records with the same {column:?} stay together, so labels keep their shares by chance alone"
            ));
        }
        let lone = records.lone_classes();
        if !lone.is_empty() {
            let names = listed(lone.iter().map(String::as_str), LISTED);
            told.push(format!("labels with a single record, which stays in training: {names}"));
        }
        let mut keeps = vec![true; records.all];
        let mut draw = |records: &mut Records, share: f64, salt: u64, flag: &str| -> Result<Vec<usize>> {
            let drawn = records.draw(share, mix(whole.seed ^ mix(salt)), flag)?;
            drawn.iter().for_each(|&record| keeps[record] = false);
            Ok(drawn)
        };
        let mut eval = None;
        if let Some(share) = self.validation_split {
            let (flag, before) = (format!("--validation-split {share}"), records.len());
            let drawn = draw(&mut records, share, 1, &flag)?;
            told.push(format!("{flag}: {} of {before} records are measured on", drawn.len()));
            let mut measured = vec![false; records.all];
            drawn.iter().for_each(|&record| measured[record] = true);
            eval = Some(whole.train.keeping(measured));
        }
        if let Some(share) = fraction {
            let (flag, before) = (format!("--train-fraction {share}"), records.len());
            draw(&mut records, 1.0 - share, 2, &flag)?;
            told.push(format!("{flag}: {} of {before} records are learnt from", records.len()));
        }
        Ok(Some(Divided { train: whole.train.keeping(keeps), eval, told }))
    }
}

/// Records by what is drawn of them alike.
struct Records {
    /// How many the files have, with those that can't be used: these are never drawn, so that training tells of them.
    all: usize,
    /// Numbers of records: each part of one class, or of one group.
    parts: BTreeMap<String, Vec<usize>>,
    /// The column whose groups the parts are; else each is a class, and keeps its share.
    groups: Option<String>,
}

impl Records {
    fn read(whole: &Whole, group_column: Option<&str>) -> Result<Self> {
        let (how, columns) = Task::reading_of(whole.task, whole.records)?;
        let groups = Columns::default().with("group", group_column.map(str::to_owned));
        let (mut all, mut numbers, mut values) = (0, Vec::new(), Vec::new());
        let mut wrong: Vec<(Place, String)> = Vec::new();
        for numbered in whole.train.read(&how) {
            let Numbered { number, file, row } = numbered?;
            all = number + 1;
            let Ok(mut row) = row else { continue };
            let place = Place { file, line: row.line };
            let value = match group_column {
                Some(_) => {
                    row.value(&groups, "group").map(drop).and_then(|()| row.take_any(&groups, "group"))
                }
                None => Ok(Task::class_field(whole.task).and_then(|field| row.take(&columns, field))),
            };
            match value {
                Ok(value) => {
                    numbers.push(number);
                    values.push(value.unwrap_or_default());
                }
                Err(bad) => wrong.push((place, bad.message)),
            }
        }
        refuse_records(whole.train, "records without a group", wrong)?;
        let names = match group_column {
            Some(_) => values.iter().map(name).collect(),
            None => Task::classes(whole.task, &values.iter().collect::<Vec<_>>(), whole.training)
                .unwrap_or_else(|| vec![String::new(); values.len()]),
        };
        let mut parts: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (name, number) in names.into_iter().zip(numbers) {
            parts.entry(name).or_default().push(number);
        }
        Ok(Self { all, parts, groups: group_column.map(str::to_owned) })
    }

    /// Those that are left.
    fn len(&self) -> usize {
        self.parts.values().map(Vec::len).sum()
    }

    /// Classes of one record, where there are others.
    fn lone_classes(&self) -> Vec<String> {
        if self.groups.is_some() || self.parts.len() < 2 {
            return Vec::new();
        }
        self.parts.iter().filter(|(_, own)| own.len() == 1).map(|(name, _)| name.clone()).collect()
    }

    /// Draws this share of the records, and leaves the others.
    ///
    /// # Errors
    /// Unusable: it is less than a record, or than a group.
    fn draw(&mut self, share: f64, seed: u64, flag: &str) -> Result<Vec<usize>> {
        let wanted = (self.len() as f64 * share).round() as usize;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let drawn = match &self.groups {
            Some(column) => {
                let mut order: Vec<String> = self.parts.keys().cloned().collect();
                shuffle(&mut order, &mut rng);
                let (groups, smallest) =
                    (order.len(), self.parts.values().map(Vec::len).min().unwrap_or_default());
                let mut drawn = Vec::new();
                for group in order {
                    let own = self.parts.get(&group).map_or(0, Vec::len);
                    if drawn.len() + own <= wanted {
                        drawn.extend(self.parts.remove(&group).unwrap_or_default());
                    }
                }
                if drawn.is_empty() && smallest > wanted && wanted > 0 {
                    bail_unusable!(
                        "{flag}: a part of {wanted} records is to be drawn, and the smallest of the {groups} groups of \
                         {column:?} has {smallest}: draw a larger part, or group by another column"
                    );
                }
                drawn
            }
            None => {
                let counts: Vec<usize> = self.parts.values().map(Vec::len).collect();
                let mut drawn = Vec::new();
                for (own, count) in self.parts.values_mut().zip(shares(&counts, share, wanted)) {
                    shuffle(own, &mut rng);
                    drawn.extend(own.split_off(own.len() - count));
                }
                drawn
            }
        };
        if drawn.is_empty() || self.len() == 0 {
            let (drawn, left) = (drawn.len(), self.len());
            bail_unusable!(
                "{flag} parts {} records into {drawn} and {left}: each part needs one",
                drawn + left
            );
        }
        Ok(drawn)
    }
}

/// A group's name: a number and its text are one.
fn name(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// How many of each class are drawn: its share, rounded up or down so that all are `wanted`; one of each stays.
fn shares(counts: &[usize], share: f64, wanted: usize) -> Vec<usize> {
    let exact = |count: usize| count as f64 * share;
    let most = |class: usize| counts[class].saturating_sub(1);
    let mut drawn: Vec<usize> =
        (0..counts.len()).map(|class| (exact(counts[class]).floor() as usize).min(most(class))).collect();
    let mut order: Vec<usize> = (0..counts.len()).collect();
    let rest = |class: &usize| exact(counts[*class]).fract();
    order.sort_by(|a, b| rest(b).total_cmp(&rest(a)));
    for class in order {
        if drawn.iter().sum::<usize>() < wanted && drawn[class] < most(class) && rest(&class) > 0.0 {
            drawn[class] += 1;
        }
    }
    drawn
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of_classes(counts: &[usize]) -> Records {
        let mut all = 0;
        let mut parts = BTreeMap::new();
        for (class, &count) in counts.iter().enumerate() {
            parts.insert(format!("{class:03}"), (all..all + count).collect());
            all += count;
        }
        Records { all, parts, groups: None }
    }

    proptest! {
        #[test]
        fn each_class_keeps_its_share_within_a_record(
            counts in proptest::collection::vec(1usize..60, 1..12),
            share in 0.01f64..0.99,
            seed in any::<u64>(),
        ) {
            let drawn = shares(&counts, share, (counts.iter().sum::<usize>() as f64 * share).round() as usize);
            for (&count, &drawn) in counts.iter().zip(&drawn) {
                prop_assert!(drawn < count, "a class is lost");
                prop_assert!((drawn as f64 - count as f64 * share).abs() < 1.0 || drawn == count - 1);
            }
            let mut records = of_classes(&counts);
            let Ok(mut all) = records.draw(share, seed, "--x") else { return Ok(()) };
            prop_assert_eq!(&of_classes(&counts).draw(share, seed, "--x").unwrap(), &all, "drawn otherwise");
            prop_assert_eq!(all.len(), drawn.iter().sum::<usize>());
            all.extend(records.parts.into_values().flatten());
            all.sort_unstable();
            prop_assert_eq!(all, (0..counts.iter().sum()).collect::<Vec<_>>(), "a record is lost, or stands in both");
        }

        #[test]
        fn a_group_is_drawn_whole_or_not_at_all(
            counts in proptest::collection::vec(1usize..20, 2..20),
            share in 0.05f64..0.95,
            seed in any::<u64>(),
        ) {
            let mut records = Records { groups: Some("who".to_owned()), ..of_classes(&counts) };
            let of = of_classes(&counts);
            match records.draw(share, seed, "--x") {
                Ok(drawn) => {
                    let wanted = (counts.iter().sum::<usize>() as f64 * share).round() as usize;
                    prop_assert!(!drawn.is_empty() && drawn.len() <= wanted);
                    for group in of.parts.values() {
                        let own = group.iter().filter(|record| drawn.contains(record)).count();
                        prop_assert!(own == 0 || own == group.len());
                    }
                }
                Err(error) => prop_assert!(error.to_string().starts_with("--x"), "{}", error),
            }
        }
    }

    #[test]
    fn another_seed_draws_others() {
        let draw = |seed| of_classes(&[50, 50]).draw(0.2, seed, "--x").unwrap();
        assert_ne!(draw(1), draw(2));
        assert_eq!(draw(1).len(), 20);
    }

    #[test]
    fn a_part_without_a_record_is_refused() {
        let refused =
            |counts: &[usize], share| of_classes(counts).draw(share, 7, "--x").unwrap_err().to_string();
        assert_eq!(refused(&[3], 0.1), "--x parts 3 records into 0 and 3: each part needs one");
        assert_eq!(refused(&[1, 1, 1], 0.5), "--x parts 3 records into 0 and 3: each part needs one");
        let mut records = Records { groups: Some("who".to_owned()), ..of_classes(&[9, 8]) };
        let said = records.draw(0.2, 7, "--x").unwrap_err().to_string();
        assert!(said.contains("3 records") && said.contains("2 groups of \"who\" has 8"), "{said}");
    }
}
