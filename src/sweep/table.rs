//! A sweep's result, for people and as JSON.

use std::fmt::Write;
use std::path::PathBuf;

use serde::Serialize;

use super::Sweep;
use super::space::told;
use super::state::{State, Status};
use super::stop::is_better;

/// What came of a sweep.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What the runs were compared by.
    pub metric: Option<String>,
    pub more_is_better: bool,
    /// The name of the best run, and its value.
    pub best: Option<String>,
    pub best_value: Option<f64>,
    /// The directory of its model.
    pub model: Option<PathBuf>,
    /// The best first; then those that were stopped, and those that failed.
    pub runs: Vec<Row>,
}

/// A run.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub name: String,
    pub status: &'static str,
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
        let ended = sweep.points.iter().enumerate().filter_map(|(at, point)| {
            let name = Sweep::name(at);
            let ran = state.runs.get(&name)?;
            let row = Row {
                name,
                status: ran.status.name(),
                value: ran.value,
                evaluations: ran.evaluations.len(),
                steps: ran.steps,
                seconds: ran.seconds,
                settings: point.clone(),
                error: ran.error.clone(),
            };
            Some((ran.status, row))
        });
        let mut ended: Vec<(Status, Row)> = ended.collect();
        ended.sort_by(|(a_status, a), (b_status, b)| {
            let by_value = match (a.value, b.value) {
                (Some(a), Some(b)) if is_better(a, b, state.more_is_better) => std::cmp::Ordering::Less,
                (Some(a), Some(b)) if is_better(b, a, state.more_is_better) => std::cmp::Ordering::Greater,
                (a, b) => a.is_none().cmp(&b.is_none()),
            };
            a_status.cmp(b_status).then(by_value)
        });
        let best = state.best();
        Self {
            metric: state.metric.clone(),
            more_is_better: state.more_is_better,
            best_value: best.as_ref().and_then(|best| state.runs[best].value),
            model: best.as_ref().map(|_| sweep.output.join("best")),
            best,
            runs: ended.into_iter().map(|(_, row)| row).collect(),
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
                row.status,
                number(row.value, 4),
                row.evaluations,
                number(row.seconds, 1),
                told(&row.settings)
            );
        }
        if let (Some(best), Some(model)) = (&self.best, &self.model) {
            let _ = write!(text, "the best is {best}: {}", model.display());
        }
        text.truncate(text.trim_end().len());
        text
    }
}
