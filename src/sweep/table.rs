//! A sweep's result, for people and as JSON.

use std::fmt::Write;
use std::path::PathBuf;

use serde::Serialize;

use super::Sweep;
use super::space::told;
use super::state::{State, Status};
use crate::task::is_better;

/// What came of a sweep.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What the runs were compared by.
    pub metric: Option<String>,
    pub more_is_better: bool,
    /// The name of the best run, and its value.
    pub best: Option<String>,
    pub best_value: Option<f64>,
    /// The directory of its model; none where it has been moved away.
    pub model: Option<PathBuf>,
    /// The folder of what each run has said and logged.
    pub logs: PathBuf,
    /// The best first; then those that were stopped, and those that failed.
    pub runs: Vec<Row>,
}

/// A run.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub name: String,
    pub status: Status,
    pub value: Option<f64>,
    pub evaluations: usize,
    pub steps: Option<u64>,
    pub seconds: Option<f64>,
    pub settings: toml::Table,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Report {
    pub(super) fn new(sweep: &Sweep, state: &State) -> Self {
        let row = |(at, point): (usize, &toml::Table)| {
            let name = Sweep::name(at);
            let ran = state.runs.get(&name)?;
            Some(Row {
                name,
                status: ran.status,
                value: ran.value,
                evaluations: ran.evaluations.len(),
                steps: ran.steps,
                seconds: ran.seconds,
                settings: point.clone(),
                error: ran.error.clone(),
            })
        };
        let mut runs: Vec<Row> = sweep.points.iter().enumerate().filter_map(row).collect();
        runs.sort_by(|a, b| {
            let by_value = match (a.value, b.value) {
                (Some(a), Some(b)) if is_better(a, b, state.more_is_better) => std::cmp::Ordering::Less,
                (Some(a), Some(b)) if is_better(b, a, state.more_is_better) => std::cmp::Ordering::Greater,
                (a, b) => a.is_none().cmp(&b.is_none()),
            };
            a.status.cmp(&b.status).then(by_value)
        });
        let best = state.best().cloned();
        let model = best.as_ref().map(|_| sweep.best()).filter(|model| model.is_dir());
        Self {
            metric: state.metric.clone(),
            more_is_better: state.more_is_better,
            best_value: best.as_ref().and_then(|best| state.runs[best].value),
            model,
            logs: sweep.runs(),
            best,
            runs,
        }
    }

    /// A line a run.
    pub fn told(&self) -> String {
        let metric = self.metric.as_deref().unwrap_or("metric");
        let wide = metric.len().max(10);
        let mut text = format!("run    status    {metric:>wide$}  evaluations   seconds  settings\n");
        for row in &self.runs {
            let number = |value: Option<f64>, digits: usize| {
                value.map_or("-".to_owned(), |value| format!("{value:.digits$}"))
            };
            // writing to a string does not fail
            let _ = writeln!(
                text,
                "{:<6} {:<9} {:>wide$}  {:>11}  {:>8}  {}",
                row.name,
                row.status.name(),
                number(row.value, 4),
                row.evaluations,
                number(row.seconds, 1),
                told(&row.settings)
            );
        }
        for Row { name, error, .. } in &self.runs {
            let _ = error.iter().try_for_each(|error| writeln!(text, "{name}: {error}"));
        }
        let _ = match (&self.best, &self.model) {
            (Some(best), Some(model)) => writeln!(text, "the best is {best}: {}", model.display()),
            (Some(best), None) => writeln!(text, "the best is {best}, whose model has been moved away"),
            (None, _) => Ok(()),
        };
        text.truncate(text.trim_end().len());
        text
    }
}
