//! A run's directory, and records to measure on → what people want to see of it, as a page, as a model card, as JSON.

pub mod card;
mod chart;
pub mod graphs;
pub mod history;
pub mod page;
pub mod run;

use std::path::Path;

use anyhow::Context;
use candle_core::Device;
use chrono::{DateTime, SecondsFormat, Utc};
use serde_json::{Map, Value, json};

use self::graphs::Graph;
use self::history::{Audited, History};
use self::run::Started;
use crate::data::records::Files;
use crate::eager::Evaluator;
use crate::saved::Saved;
use crate::say::{Say, listed};
use crate::task::{Measured, Metric, Metrics, RecordFlags, Review, Source, is_better};
use crate::train::checkpoint::Folder;
use crate::{Result, bail_unusable, files, html};

/// Files that are named.
const FILES: usize = 3;

/// What a report is asked for.
pub struct Asked<'a> {
    /// Records to measure on, and how they are read; else those of the run.
    pub input: Option<(&'a Files, &'a RecordFlags)>,
    pub max_length: Option<usize>,
    pub device: &'a Device,
}

/// All that a report tells.
pub struct Report<'a> {
    pub saved: &'a Saved,
    /// What the directory is called.
    pub name: String,
    /// What the run was started with; none of a model that tk did not train.
    pub started: Option<Started>,
    pub history: History,
    pub audited: Vec<Audited>,
    pub graphs: Vec<Graph>,
    /// What was measured for the report.
    pub seen: Option<Seen>,
    /// Why nothing was.
    pub unseen: Option<String>,
    /// The metric that decides, and the best evaluation of the run by it.
    pub best: Option<Best>,
    /// How many numbers the model has.
    pub parameters: usize,
    /// When its weights were written.
    pub written: Option<DateTime<Utc>>,
}

/// What was measured on records.
pub struct Seen {
    pub files: String,
    /// Examples, of which a long text may have several.
    pub examples: usize,
    pub measured: Measured,
    pub review: Review,
}

/// The best evaluation of a run.
#[derive(Clone, Debug)]
pub struct Best {
    pub metric: Metric,
    pub step: u64,
    /// All that was measured then.
    pub metrics: Metrics,
}

/// What a report's page is called in a model's directory.
pub const PAGE: &str = "report.html";

/// Removes the page and the card of a directory whose model is about to be replaced, if they are tk's.
///
/// # Errors
/// One can't be read or removed.
pub fn remove(dir: &Path) -> Result<()> {
    for (name, mark) in [(PAGE, html::MARK), (card::NAME, card::MARK)] {
        let path = dir.join(name);
        if files::beginning(&path)?.is_some_and(|text| text.contains(mark)) {
            std::fs::remove_file(&path).with_context(|| path.display().to_string())?;
        }
    }
    Ok(())
}

impl<'a> Report<'a> {
    /// Reads what the run has left, and measures the model.
    ///
    /// # Errors
    /// Unusable: no run was left here and there are no records to measure on; a file that can't be used.
    pub fn new(saved: &'a Saved, asked: &Asked, say: Say) -> Result<Self> {
        let folder = Folder::of(&saved.dir);
        let started = Started::read(&folder)?;
        let (source, unseen) = match (asked.input, &started) {
            (Some((files, records)), _) => (Some((files.clone(), records)), None),
            (None, Some(started)) => match started.measured_on()? {
                Ok(files) => (Some((files, started.records())), None),
                Err(why) => (None, Some(format!("{why}; --input FILE measures on any"))),
            },
            (None, None) => bail_unusable!(
                "{} holds no run of tk's: give --input, to measure the model",
                folder.path().display()
            ),
        };
        if let Some(why) = &unseen {
            say.warn(format!("nothing is measured: {why}"));
        }
        let seen = source.map(|source| Seen::new(saved, source, asked, say)).transpose()?;
        let history = History::read(&folder.log())?;
        let best = best(saved, &history, started.as_ref().and_then(Started::best_metric))?;
        let params = saved.task.params(&saved.config.family)?;
        let dir = saved.dir.canonicalize().unwrap_or_else(|_| saved.dir.clone());
        let written = crate::checkpoint::weight_files(&saved.dir)?;
        let written = written.iter().filter_map(|path| path.metadata().ok()?.modified().ok()).max();
        Ok(Self {
            saved,
            name: dir.file_name().map_or("model".to_owned(), |name| name.to_string_lossy().into_owned()),
            audited: history::audited(&folder.audit())?,
            graphs: graphs::of(saved)?,
            parameters: params.iter().map(|param| param.shape.iter().product::<usize>()).sum(),
            written: written.map(DateTime::from),
            started,
            history,
            seen,
            unseen,
            best,
        })
    }

    /// The metrics that are told first, and what they were measured on: of the report's own records, else of the run's best
    /// evaluation.
    pub fn metrics(&self) -> Option<(&Metrics, String)> {
        if let Some(seen) = &self.seen {
            return Some((&seen.measured.metrics, seen.files.clone()));
        }
        let best = self.best.as_ref()?;
        let files = self.started.as_ref().map(Started::eval).unwrap_or_default();
        let names: Vec<String> = files.iter().map(|path| file_name(path)).collect();
        Some((&best.metrics, listed(names.iter().map(String::as_str), FILES)))
    }

    /// Whether the directory is one of sentence-transformers'.
    pub fn is_sentence_transformer(&self) -> bool {
        self.saved.dir.join("modules.json").is_file()
    }

    /// When the weights were written, to the second.
    pub fn when(&self) -> Option<String> {
        self.written.map(|time| time.to_rfc3339_opts(SecondsFormat::Secs, true))
    }

    /// The numbers, as JSON.
    pub fn json(&self) -> Map<String, Value> {
        let mut all = Map::new();
        let mut put = |name: &str, value: Value| all.insert(name.to_owned(), value);
        put("name", json!(self.name));
        put("task", json!(self.saved.task.name()));
        put("parameters", json!(self.parameters));
        put("steps", json!(self.history.steps()));
        if let Some(seen) = &self.seen {
            put("measured_on", json!(seen.files));
            put("examples", json!(seen.examples));
            put("metrics", json!(seen.measured));
            put("review", json!(seen.review));
        }
        if let Some(why) = &self.unseen {
            put("not_measured", json!(why));
        }
        if let Some(best) = &self.best {
            put("best", json!({"step": best.step, "metric": best.metric.name, "metrics": best.metrics}));
        }
        put("graphs", json!(self.graphs));
        if let Some(audited) = self.audited.last() {
            put("audit", json!(audited));
        }
        all
    }
}

impl Seen {
    fn new(saved: &Saved, source: (Files, &RecordFlags), asked: &Asked, say: Say) -> Result<Self> {
        let (files, records) = source;
        let max_length = saved.checked_max_length(asked.max_length)?;
        let examples = saved.examples(&files, records, max_length, say)?;
        let evaluator = Evaluator::open(saved, asked.device)?;
        let (measured, review) = evaluator.review(&examples, Source { files: &files, records })?;
        let names: Vec<String> = files.all().into_iter().map(file_name).collect();
        let names = listed(names.iter().map(String::as_str), FILES);
        Ok(Self { files: names, examples: examples.len(), measured, review })
    }
}

/// The best evaluation of a log; none where there was none.
fn best(saved: &Saved, history: &History, asked: Option<&str>) -> Result<Option<Best>> {
    let metric = saved.task.deciding_metric(asked)?;
    let points = history.of(&format!("eval_{}", metric.name)).iter();
    // the first of equals, as training keeps it
    let best = points
        .filter(|(_, value)| value.is_finite())
        .copied()
        .reduce(|best, new| if is_better(new.1, best.1, metric.more_is_better) { new } else { best });
    let Some((step, _)) = best else { return Ok(None) };
    let then = |points: &[history::Point]| points.iter().find(|(at, _)| *at == step).map(|(_, value)| *value);
    let metrics = history.evaluations().filter_map(|(name, points)| Some((name.to_owned(), then(points)?)));
    Ok(Some(Best { metric, step, metrics: metrics.collect() }))
}

/// The last part of a path.
fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}
