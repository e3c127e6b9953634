//! `tk sweep`: runs of training that differ in some settings → a table, and the best model. One run after the other, each
//! in a process of its own; what is finished is kept, so that a sweep that was ended goes on.

mod child;
mod space;
mod state;
mod stop;
mod table;

use std::path::Path;
use std::sync::atomic::{AtomicI32, Ordering};

use anyhow::Context;

use self::child::{Child, Ended};
pub use self::space::Sweep;
use self::space::told;
use self::state::{Ran, State, Status};
use self::stop::is_better;
pub use self::table::Report;
use crate::error::Stopped;
use crate::say::Say;
use crate::train::checkpoint::Folder;
use crate::{Result, files, unusable};

impl Sweep {
    /// Runs what is not yet finished, and keeps the best model as `best` in the output.
    ///
    /// # Errors
    /// Unusable: the output is somebody else's, or a sweep's with other settings. A signal has asked for the end, or a
    /// file can't be written.
    pub fn go(&self, stopped: &AtomicI32, say: &Say) -> Result<Report> {
        let runs = self.output.join("runs");
        files::create_folder(&runs)
            .map_err(|e| unusable!("output {} can't be written: {e}", self.output.display()))?;
        let _held = files::try_lock(&self.output)?;
        files::sweep(&self.output).with_context(|| self.output.display().to_string())?;
        let mut state = State::open(self)?;
        for at in 0..self.points.len() {
            let name = Self::name(at);
            if state.runs.get(&name).is_some_and(|ran| ran.status != Status::Failed) {
                continue;
            }
            say.line(format!(
                "run {name} of {}: {}",
                Self::name(self.points.len() - 1),
                told(&self.points[at])
            ));
            let Some(ran) = self.run(at, &runs, &mut state, stopped)? else {
                let signal = stopped.load(Ordering::Relaxed);
                let message = format!(
                    "stopped in run {name}; the same command goes on from there ({} of {} runs have ended)",
                    state.runs.len(),
                    self.points.len()
                );
                return Err(Stopped { signal, message }.into());
            };
            let is_best = ran.value.is_some_and(|value| {
                let best = state.best().and_then(|best| state.runs[&best].value);
                ran.status == Status::Finished
                    && best.is_none_or(|best| is_better(value, best, state.more_is_better))
            });
            let line = format!("run {name}: {}", ran.told(state.metric.as_deref()));
            say.line(line + if is_best { "  (the best so far)" } else { "" });
            state.runs.insert(name.clone(), ran);
            state.save(&self.output)?;
            if state.runs[&name].status != Status::Failed {
                Folder::of(&runs.join(&name)).drop_weights()?; // nobody goes on with it
            }
        }
        if let Some(best) = state.best() {
            self.keep(&best, &runs, &mut state)?;
        }
        Ok(Report::new(self, &state))
    }

    /// Makes one run, or goes on with it. None where a signal has asked for the end.
    fn run(&self, at: usize, runs: &Path, state: &mut State, stopped: &AtomicI32) -> Result<Option<Ran>> {
        let child = Child { folder: runs, name: Self::name(at) };
        let finished: Vec<Vec<f64>> = state.finished().map(Ran::numbers).collect();
        let finished: Vec<&[f64]> = finished.iter().map(Vec::as_slice).collect();
        let hopeless = || {
            let Some(metric) = &state.metric else { return false };
            self.stop.is_hopeless(&child.evaluations(metric), &finished, state.more_is_better)
        };
        let ended = child.run(&self.settings(at), hopeless, stopped)?;
        let (status, mut ran) = match ended {
            Ended::Interrupted => return Ok(None),
            Ended::Failed(error) => (Status::Failed, Ran { error: Some(error), ..Ran::default() }),
            Ended::Hopeless => (Status::Stopped, Ran::default()),
            Ended::Finished(result) => {
                let metric = result["best_metric"].as_str().context("a run's result names no metric")?;
                state.metric = Some(metric.to_owned());
                state.more_is_better = result["more_is_better"] == true;
                let ran = Ran {
                    value: result["eval"][metric].as_f64(),
                    steps: result["steps"].as_u64(),
                    seconds: result["train_seconds"].as_f64(),
                    ..Ran::default()
                };
                (Status::Finished, ran)
            }
        };
        ran.status = status;
        if let Some(metric) = &state.metric {
            let evaluations = child.evaluations(metric);
            ran.evaluations = evaluations.iter().map(|value| value.is_finite().then_some(*value)).collect();
        }
        if status == Status::Stopped {
            let better = |a: f64, b: f64| if is_better(a, b, state.more_is_better) { a } else { b };
            ran.value = ran.evaluations.iter().flatten().copied().reduce(better);
        }
        Ok(Some(ran))
    }

    /// Copies a run's model to `best`, whole or not at all.
    fn keep(&self, name: &str, runs: &Path, state: &mut State) -> Result<()> {
        let best = self.output.join("best");
        let place = || best.display().to_string();
        if state.kept.as_deref() == Some(name) && best.join("model.safetensors").is_file() {
            return Ok(()); // with what was exported there since
        }
        let temporary = tempfile::Builder::new().prefix(files::TEMPORARY).tempdir_in(&self.output)?;
        copy_model(&runs.join(name), temporary.path()).with_context(place)?;
        state.kept = None;
        state.save(&self.output)?;
        if best.exists() {
            std::fs::remove_dir_all(&best).with_context(place)?;
        }
        std::fs::rename(temporary.path(), &best).with_context(place)?;
        let _ = temporary.keep(); // the name is gone
        state.kept = Some(name.to_owned());
        state.save(&self.output)
    }
}

/// Copies a directory's files and folders, but for what is of its training.
fn copy_model(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in from.read_dir()? {
        let entry = entry?;
        let (path, to) = (entry.path(), to.join(entry.file_name()));
        if entry.file_name() == "training" {
            continue;
        }
        match entry.file_type()?.is_dir() {
            true => copy_model(&path, &to)?,
            false => std::fs::copy(&path, &to).map(drop)?,
        }
    }
    Ok(())
}
