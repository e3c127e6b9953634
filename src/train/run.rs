//! The training loop: epochs, evaluations, checkpoints, the best model kept, early stopping, resuming.

use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Instant;

use candle_core::Device;
use indicatif::ProgressBar;
use serde_json::json;

use super::checkpoint::{Best, Folder, Progress};
use super::log::{Entry, Log, Phase, RunLog};
use super::not_finite::NotFinite;
use super::supply::{Streamed, Supply};
use super::trainer::{StepReport, Trainer};
use super::{Settings, audit};
use crate::data::tokens::Tokenizer;
use crate::eager::{Forward, Interrupted, Params};
use crate::model::Family;
use crate::say::Say;
use crate::task::{Example, Metric, Task, is_better};
use crate::world::World;
use crate::{Result, bail_unusable, files};

/// All that a run needs.
pub struct Run<'a> {
    pub settings: &'a Settings,
    pub family: &'a Family,
    pub task: &'a Task,
    pub params: &'a Params,
    pub device: &'a Device,
    /// What is learnt from: all of it, or the first buffer.
    pub train: &'a [Example],
    /// What the other buffers come from.
    pub streamed: Option<Streamed<'a>>,
    pub eval: &'a [Example],
    pub folder: &'a Folder,
    pub tokenizer: &'a Tokenizer,
    /// Those that train the same model; the first of them writes.
    pub world: &'a dyn World,
    pub say: Say,
    /// Set from outside to a signal's number, it ends the run at the next step, behind a checkpoint.
    pub stopped: &'a AtomicI32,
    /// Ends the run after so many steps, behind a checkpoint.
    pub stop_at: Option<usize>,
}

/// How a run ended; the parameters are those of the best evaluation, or the last where none was made; of `--ema`, the
/// averages.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub progress: Progress,
    /// How many epochs the steps are.
    pub epochs: f64,
    pub end: End,
}

/// Why a run has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// There was no more to do.
    Finished,
    /// A signal asked for it.
    Stopped(i32),
    /// It has come to [`Run::stop_at`].
    StopAt,
}

impl Run<'_> {
    /// Trains from the start, or from the newest checkpoint with `resume`.
    ///
    /// # Errors
    /// A step fails (see [`Trainer::step`]), or a file can't be written.
    pub fn go(self, resume: bool) -> Result<Outcome> {
        // on a thread of the pool, which then works itself instead of waiting for the others
        rayon::scope(move |_| self.train(resume))
    }

    fn train(mut self, resume: bool) -> Result<Outcome> {
        let streamed = self.streamed.take();
        let mut supply = Supply::new(self.settings, self.task, self.world.size(), self.train, streamed);
        let total = supply.total_steps();
        if let Some(step) = self.stop_at.filter(|&step| step > total) {
            bail_unusable!("the whole run has {total} steps, fewer than {step}");
        }
        let mut trainer =
            Trainer::new(self.settings, self.family, self.task, self.params, self.device, total)?
                .in_world(self.world);
        let restored = match resume {
            true => self.folder.restore(self.params, &mut trainer.optimizer, trainer.ema.as_mut())?,
            false => None,
        };
        let mut progress = restored.unwrap_or_default();
        supply.go_behind(progress.step, progress.buffer)?;
        let best_step = |progress: &Progress| progress.best.as_ref().map(|best| best.step);
        // of the newest checkpoint: a run that goes on from it asks for these weights
        let mut saved_best = best_step(&progress);
        // all have read the checkpoint before one changes a file
        self.world.meet()?;
        let leads = self.world.leads();
        let mut log = match leads {
            true => RunLog::open(self.folder, progress.step)?,
            false => RunLog::none(),
        };
        let audits = self.settings.audit.filter(|_| leads);
        let audits = audits.map(|_| Log::open(&self.folder.audit(), progress.step));
        let mut audits = audits.transpose()?;
        let bar = self.say.bar(total as u64, "{bar:24} {pos}/{len} steps  {msg}  {eta} left")?;
        bar.set_position(progress.step as u64);
        let (started, seconds_before) = (Instant::now(), progress.seconds);
        let goes_on = |progress: &Progress| progress.step < total && !self.is_patience_gone(progress);
        while progress.unmeasured || goes_on(&progress) {
            if !progress.unmeasured {
                let micro_batches = supply.step(progress.step)?;
                let before = Instant::now();
                let step = trainer.step(&micro_batches).map_err(|error| self.not_finite(error))?;
                progress.step += 1;
                progress.buffer = supply.buffer();
                progress.tokens += step.tokens as u64;
                progress.loss_sum += step.loss;
                progress.seconds = seconds_before + started.elapsed().as_secs_f64();
                let speed = step.tokens as f64 / before.elapsed().as_secs_f64();
                self.report(&mut log, &bar, &progress, &supply, &step, speed)?;
                if let (Some(audits), Some(rows)) = (&mut audits, &step.audit) {
                    audits.write(&json!({"step": progress.step, "parameters": rows}))?;
                    bar.suspend(|| self.say.line(audit::told(progress.step, rows)));
                }
                progress.unmeasured =
                    supply.is_due(self.settings.eval_every, progress.step) && !self.eval.is_empty();
            }
            if progress.unmeasured {
                let mut evaluate = || self.evaluate(&mut log, &bar, &mut progress, &supply);
                let evaluated = match &trainer.ema {
                    Some(ema) => ema.instead(self.params, evaluate),
                    None => evaluate(),
                };
                match evaluated {
                    Err(error) if error.is::<Interrupted>() => {}
                    evaluated => {
                        evaluated?;
                        progress.unmeasured = false;
                        if leads {
                            let kept = [saved_best, best_step(&progress)].into_iter().flatten();
                            self.folder.keep_best(&kept.collect::<Vec<_>>())?;
                        }
                    }
                }
            }
            let last = progress.step == total && !progress.unmeasured;
            let signal = self.world.largest(self.stopped.load(Ordering::Relaxed))?;
            let end = match self.stop_at {
                _ if signal != 0 => Some(End::Stopped(signal)),
                Some(step) if step == progress.step => Some(End::StopAt),
                _ => None,
            };
            if supply.is_due(self.settings.save_every, progress.step) || end.is_some() {
                if leads {
                    self.folder.save(
                        &progress,
                        self.params,
                        &trainer.optimizer,
                        trainer.ema.as_ref(),
                        self.settings.keep_checkpoints,
                    )?;
                }
                saved_best = best_step(&progress);
            }
            if let Some(end) = end.filter(|end| *end == End::StopAt || !last) {
                bar.abandon();
                return Ok(Outcome { epochs: supply.epochs(progress.step), progress, end });
            }
        }
        bar.finish_and_clear();
        if let Some(ema) = &trainer.ema {
            self.params.set_values(&ema.values()?)?;
        }
        if let Some(best) = progress.best.as_ref().filter(|_| leads) {
            let Metric { name, .. } = self.deciding_metric()?;
            if best.number(name).is_some() {
                self.folder.restore_best(best.step, self.params)?;
            } else {
                self.say.warn(format!(
                    "{name} was not a number in any evaluation, so none is the best and the last weights are kept; \
                     --best-metric takes another"
                ));
            }
        }
        Ok(Outcome { epochs: supply.epochs(progress.step), progress, end: End::Finished })
    }

    /// Of a step that was not taken because something is not finite: writes its batch down, and says what to do.
    fn not_finite(&self, error: anyhow::Error) -> anyhow::Error {
        let Some(stop) = error.downcast_ref::<NotFinite>() else { return error };
        let path = self.folder.not_finite();
        let advice = stop.advice(self.tokenizer);
        let told = stop.told(self.task, self.tokenizer);
        match files::write(&path, format!("{told:#}\n")) {
            Ok(()) => anyhow::anyhow!("{error}; {advice}; the examples stand in {}", path.display()),
            Err(unwritten) => {
                anyhow::anyhow!("{error}; {advice}; their file can't be written: {unwritten:#}")
            }
        }
    }

    fn is_patience_gone(&self, progress: &Progress) -> bool {
        self.settings.early_stopping_patience.is_some_and(|most| progress.evaluations_without_gain >= most)
    }

    fn report(
        &self,
        log: &mut RunLog,
        bar: &ProgressBar,
        progress: &Progress,
        supply: &Supply,
        step: &StepReport,
        tokens_per_second: f64,
    ) -> Result<()> {
        let total = supply.total_steps();
        let mut numbers = vec![
            ("loss", step.loss),
            ("learning_rate", step.learning_rate),
            ("grad_norm", step.grad_norm),
            ("tokens_per_second", tokens_per_second.round()),
        ];
        let names = self.task.loss_names();
        numbers.extend(names.iter().copied().zip(step.losses.iter().copied()).filter(|_| names.len() > 1));
        let numbers = numbers.into_iter().map(|(name, number)| (name.to_owned(), number)).collect();
        let epoch = supply.epochs(progress.step);
        log.write(&Entry {
            step: progress.step,
            epoch,
            phase: Phase::Train,
            tokens: Some(step.tokens),
            numbers,
        })?;
        let mean_speed = progress.tokens as f64 / progress.seconds;
        bar.set_position(progress.step as u64);
        bar.set_message(format!("loss {:.4}  {mean_speed:.0} tokens/s", step.loss));
        if bar.is_hidden() && (progress.step.is_multiple_of(total.div_ceil(20)) || progress.step == total) {
            let left = progress.seconds / progress.step as f64 * (total - progress.step) as f64;
            self.say.line(format!(
                "step {}/{total}  epoch {:.2}  loss {:.4}  {mean_speed:.0} tokens/s  {left:.0} s left",
                progress.step,
                supply.epochs(progress.step),
                step.loss,
            ));
        }
        Ok(())
    }

    fn evaluate(
        &self,
        log: &mut RunLog,
        bar: &ProgressBar,
        progress: &mut Progress,
        supply: &Supply,
    ) -> Result<()> {
        let Self { params, family, task, device, world, .. } = *self;
        let measured = {
            // several processes meet in an evaluation: one alone can't leave it
            let stopped = (world.size() == 1).then_some(self.stopped);
            task.measure(&Forward { params, family, task, device, world, stopped }, self.eval)?
        };
        let Metric { name, more_is_better, .. } = self.deciding_metric()?;
        let new = Best { step: progress.step, metrics: measured.metrics, details: measured.details };
        let is_gain = is_gain(
            new.number(name),
            progress.best.as_ref().and_then(|best| best.number(name)),
            more_is_better,
        );
        let details = new.details.iter().filter_map(|(name, value)| Some((name.clone(), value.as_f64()?)));
        let numbers = new.metrics.iter().map(|(name, value)| (name.clone(), *value)).chain(details).collect();
        let epoch = supply.epochs(progress.step);
        log.write(&Entry { step: progress.step, epoch, phase: Phase::Eval, tokens: None, numbers })?;
        let shown: Vec<String> =
            new.metrics.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
        let text = format!("step {}  evaluation: {}", progress.step, shown.join("  "));
        bar.suspend(|| self.say.line(text + if is_gain { "  (the best so far)" } else { "" }));
        if is_gain {
            if self.world.leads() {
                self.folder.save_best(new.step, self.params)?;
            }
            progress.best = Some(new);
            progress.evaluations_without_gain = 0;
        } else {
            progress.evaluations_without_gain += 1;
            if progress.best.as_ref().is_none_or(|best| best.number(name).is_none()) {
                progress.best = Some(new); // the last one, as long as none is a number
            }
        }
        Ok(())
    }

    /// The metric that says which evaluation is the best.
    fn deciding_metric(&self) -> Result<Metric> {
        self.task.deciding_metric(self.settings.best_metric.as_deref())
    }
}

/// Whether a metric's new value is better than the best one before; none stands for what is not a number, which is
/// worse than every number.
fn is_gain(new: Option<f64>, best: Option<f64>, more_is_better: bool) -> bool {
    match (new, best) {
        (None, _) => false,
        (Some(_), None) => true,
        (Some(new), Some(best)) => is_better(new, best, more_is_better),
    }
}

#[cfg(test)]
mod tests {
    use super::is_gain;

    #[test]
    fn what_is_not_a_number_never_wins_over_one() {
        for more in [true, false] {
            assert!(is_gain(Some(1.0), None, more));
            assert!(!is_gain(None, Some(1.0), more));
            assert!(!is_gain(None, None, more));
            assert!(!is_gain(Some(1.0), Some(1.0), more));
        }
        assert!(is_gain(Some(2.0), Some(1.0), true) && !is_gain(Some(2.0), Some(1.0), false));
    }
}
