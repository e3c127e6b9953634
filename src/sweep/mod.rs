//! `tk sweep`: runs of training that differ in some settings → a table, and the best model. One run after the other, each
//! in a process of its own; what is finished is kept, so that a sweep that was ended goes on.

mod child;
mod keep;
mod space;
mod state;
mod stop;
mod table;

use std::path::PathBuf;
use std::sync::atomic::{AtomicI32, Ordering};

use anyhow::Context;

use self::child::{Child, Ended};
use self::space::told;
pub use self::space::{FilesOf, Sweep};
use self::state::{State, Status};
pub use self::table::Report;
use crate::error::Stopped;
use crate::say::Say;
use crate::{Result, files, unusable};

impl Sweep {
    /// Runs what is not yet finished, and keeps the best model as `best` in the output. Runs that have failed are made
    /// anew.
    ///
    /// # Errors
    /// Unusable: the output is somebody else's, or a sweep's with other settings; or the first run is refused. A signal
    /// has asked for the end, or a file can't be written.
    pub fn go(&self, stopped: &AtomicI32, say: &Say) -> Result<Report> {
        let place = || self.output.display().to_string();
        files::create_folder(&self.output)
            .map_err(|e| unusable!("output {} can't be written: {e}", place()))?;
        let _held = files::try_lock(&self.output)?;
        let mut state = State::open(self)?;
        files::sweep(&self.output).with_context(place)?;
        let runs = self.runs();
        files::create_folder(&runs).with_context(place)?;
        for (at, point) in self.points.iter().enumerate() {
            let child = Child { folder: &runs, name: Self::name(at) };
            let name = &child.name;
            match state.runs.get(name).map(|ran| ran.status) {
                Some(Status::Finished | Status::Stopped) => {
                    keep::clear(&child.output())?; // a kill may have come before
                    continue;
                }
                Some(Status::Failed) => {
                    state.runs.remove(name);
                    state.save(&self.output)?;
                    child.remove()?;
                }
                None => {}
            }
            say.line(format!("run {name} of {}: {}", Self::name(self.points.len() - 1), told(point)));
            let ran = match self.run(&child, at, &state, stopped)? {
                Ended::Interrupted => return Err(self.interrupted(name, &state, stopped)),
                Ended::Failed { error, is_unusable: true } if state.runs.is_empty() && !child.is_begun() => {
                    child.remove()?;
                    std::fs::remove_dir(&runs).with_context(place)?;
                    state.remove(&self.output)?;
                    let file = self.path.display();
                    return Err(unusable!("{file}: run {name} ({}) is refused: {error}", told(point)));
                }
                ended => state.ran(ended, |metric| child.evaluations(metric))?,
            };
            let line = format!("run {name}: {}", ran.told(state.metric.as_deref()));
            state.runs.insert(name.clone(), ran);
            let is_best = state.best() == Some(name);
            if is_best {
                keep::keep(&child.output(), &self.best())?;
            }
            state.save(&self.output)?;
            keep::clear(&child.output())?;
            say.line(line + if is_best { "  (the best so far)" } else { "" });
        }
        Ok(Report::new(self, &state))
    }

    /// Makes one run, or goes on with it.
    fn run(&self, child: &Child, at: usize, state: &State, stopped: &AtomicI32) -> Result<Ended> {
        let finished: Vec<Vec<f64>> = state.finished().map(|(_, ran)| ran.numbers()).collect();
        let hopeless = || {
            let Some(metric) = &state.metric else { return false };
            self.stop.is_hopeless(&child.evaluations(metric), &finished, state.more_is_better)
        };
        child.run(&self.settings(at), hopeless, stopped)
    }

    fn interrupted(&self, name: &str, state: &State, stopped: &AtomicI32) -> anyhow::Error {
        let message = format!(
            "stopped in run {name}; the same command goes on from there ({} of {} runs have ended)",
            state.runs.len(),
            self.points.len()
        );
        Stopped { signal: stopped.load(Ordering::Relaxed), message }.into()
    }

    /// The folder of all runs.
    fn runs(&self) -> PathBuf {
        self.output.join("runs")
    }

    /// The directory of the best model.
    fn best(&self) -> PathBuf {
        self.output.join("best")
    }
}
