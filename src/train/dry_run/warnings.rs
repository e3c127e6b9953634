//! What looks like a mistake, though a run would take it.

use serde::Serialize;

use super::estimate::Estimate;
use super::split::Split;
use super::twins::Twins;
use crate::process;
use crate::task::Task;

/// The share of one class from which on a model that always says it looks well.
const IMBALANCE: f64 = 0.9;
/// The share of examples of which something is cut off.
const TRUNCATION: f64 = 0.05;
/// The share of records that say next to nothing.
const SHORT: f64 = 0.01;
/// Where there are as many labels as this share of the records, the column is none of labels.
const MANY_LABELS: f64 = 0.5;
/// Fewer records tell nothing of that.
const FEW: usize = 20;
/// The share of the memory that a run may take before the system is at its end.
const MEMORY: f64 = 0.9;

/// Something to look at before a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Warning {
    pub kind: &'static str,
    pub message: String,
    /// Records, or whatever the message counts.
    pub count: usize,
}

/// Everything that looks like a mistake, the worst first.
pub fn all(
    task: &Task,
    train: &Split,
    eval: Option<&Split>,
    shared: Option<&Twins>,
    estimate: &Estimate,
) -> Vec<Warning> {
    let mut warnings = Vec::new();
    let mut warn = |kind, count, message| warnings.push(Warning { kind, message, count });
    if let (Some(shared), Some(eval)) = (shared.filter(|shared| shared.exact > 0), eval) {
        let message = format!(
            "{} of {} evaluation records stand in the training data, too{}: what is measured on them says nothing of \
             other texts",
            shared.exact,
            eval.records,
            first(shared, eval, "in training", train)
        );
        warn("leak", shared.exact, message);
    }
    let splits = || [Some(train), eval].into_iter().flatten();
    for split in splits() {
        let twins = &split.duplicates;
        if twins.all() > 0 {
            let labels = match twins.labelled_otherwise {
                0 => String::new(),
                count => format!("; {count} of them have other labels than it"),
            };
            let message = format!(
                "{} of {} {} records say what an earlier one says, {} of them but for case, punctuation and spaces{}{labels}",
                twins.all(),
                split.records,
                split.name,
                twins.alike,
                first(twins, split, "as", split),
            );
            warn("duplicates", twins.all(), message);
        }
    }
    if let (Some(shared), Some(eval)) = (shared.filter(|shared| shared.alike > 0), eval) {
        let message = format!(
            "{} evaluation records are training records but for case, punctuation and spaces{}",
            shared.alike,
            if shared.exact > 0 { String::new() } else { first(shared, eval, "in training", train) }
        );
        warn("duplicates", shared.alike, message);
    }
    for split in splits() {
        for group in split.similar_labels() {
            let message = format!(
                "{} {} differ in case or spaces alone, and are learnt as {} labels",
                split.name,
                group.iter().map(|label| format!("{label:?}")).collect::<Vec<_>>().join(", "),
                group.len()
            );
            warn("similar_labels", group.len(), message);
        }
        if task.has_one_label() {
            of_classes(split, &mut warn);
        }
    }
    for split in splits() {
        if split.cut as f64 >= TRUNCATION * split.examples as f64 && split.cut > 0 {
            let message = format!(
                "{} of {} {} examples are longer than --max-length and lose what stands behind it; half of the texts have \
                 at most {} tokens, 99 % at most {}",
                split.cut, split.examples, split.name, split.lengths.p50, split.lengths.p99
            );
            warn("truncation", split.cut, message);
        }
        if split.short_texts as f64 >= SHORT * split.records as f64 && split.short_texts > 0 {
            let message = format!(
                "{} of {} {} records have fewer than three letters or digits",
                split.short_texts, split.records, split.name
            );
            warn("short_texts", split.short_texts, message);
        }
    }
    if let Some(limit) = process::memory_limit()
        && estimate.peak_rss_bytes as f64 > MEMORY * limit as f64
    {
        let message = format!(
            "a step takes {:.1} GB of the {:.1} that there are: a smaller --batch-size with --gradient-accumulation takes less",
            estimate.peak_rss_bytes as f64 / 1e9,
            limit as f64 / 1e9
        );
        warn("memory", 1, message);
    }
    warnings
}

/// What is odd about the classes of a split.
fn of_classes(split: &Split, warn: &mut impl FnMut(&'static str, usize, String)) {
    let share = split.largest_share();
    match &split.labels[..] {
        [] => {}
        [(label, count)] => {
            warn("single_class", *count, format!("all {} records are {label:?}", split.name));
        }
        labels if labels.len() as f64 >= MANY_LABELS * split.records as f64 && split.records >= FEW => {
            let message = format!(
                "{} {} records have {} different labels: is the column of labels another one (--label-column)?",
                split.records,
                split.name,
                labels.len()
            );
            warn("many_labels", labels.len(), message);
        }
        [(label, count), ..] if share >= IMBALANCE => {
            let message = format!(
                "{:.1} % of the {} records are {label:?}: a model that always says so has that accuracy; look at f1_macro",
                share * 100.0,
                split.name
            );
            warn("imbalance", *count, message);
        }
        _ => {}
    }
}

/// Where the first of them stands.
fn first(twins: &Twins, of: &Split, how: &str, others: &Split) -> String {
    let told = |(record, twin)| format!(" ({} {how} {})", of.line(record), others.line(twin));
    twins.first.map_or(String::new(), told)
}
