//! Two steps of training, on weights that are thrown away → what the whole run will take.

use std::time::Instant;

use anyhow::Context;
use candle_core::Device;
use serde::Serialize;

use crate::Result;
use crate::say::peak_rss_bytes;
use crate::task::Example;
use crate::train::Settings;
use crate::train::plan::Plan;
use crate::train::prepare::Prepared;
use crate::train::trainer::Trainer;

/// An evaluation computes no gradients, which are two thirds of a step.
const FORWARD: f64 = 1.0 / 3.0;

/// What a run will take.
#[derive(Clone, Debug, Serialize)]
pub struct Estimate {
    /// A micro-batch of ordinary size, with its optimizer step.
    pub step_seconds: f64,
    pub step_tokens: usize,
    /// Training and evaluations, and asking a teacher, where it was not asked before.
    pub seconds: f64,
    /// The memory of this process, after a step of the largest micro-batch; 0 where the system does not tell.
    pub peak_rss_bytes: u64,
}

impl Estimate {
    /// Takes a step of the largest micro-batch of the first epoch, and one of the middle, which is timed.
    ///
    /// # Errors
    /// A step fails, as it would in a run.
    pub fn new(prepared: &Prepared, settings: &Settings, device: &Device, plan: &Plan) -> Result<Self> {
        let Prepared { config, learning, params, eval, teacher, .. } = prepared;
        let examples = &learning.examples;
        let tokens = |batch: &[usize]| batch.iter().map(|&i| examples[i].tokens()).sum::<usize>();
        let epoch = plan.steps_of(0);
        let steps = epoch.len();
        let mut batches: Vec<Vec<usize>> = epoch.into_iter().flatten().collect();
        let all: usize = batches.iter().map(|batch| tokens(batch)).sum();
        batches.sort_by_key(|batch| tokens(batch));
        let (largest, middle) = (batches.last().context("no micro-batch")?, &batches[batches.len() / 2]);

        let total = plan.total_steps();
        let mut trainer = Trainer::new(settings, &config.family, &learning.task, params, device, total)?;
        let mut step = |batch: &[usize]| -> Result<f64> {
            let began = Instant::now();
            trainer.step(&[batch.iter().map(|&i| &examples[i]).collect()])?;
            Ok(began.elapsed().as_secs_f64())
        };
        step(largest)?;
        let peak_rss_bytes = peak_rss_bytes();
        let step_seconds = step(middle)?;
        let step_tokens = tokens(middle);
        let second_per_token = step_seconds / step_tokens.max(1) as f64;
        let epochs = total as f64 / steps.max(1) as f64;
        let evaluations = match settings.eval_every {
            Some(every) => total.div_ceil(every.max(1)) as f64,
            None => epochs.ceil(),
        };
        let measured = eval.iter().map(Example::tokens).sum::<usize>() as f64 * evaluations * FORWARD;
        let asked = teacher.as_ref().map_or(Ok(0.0), |teacher| teacher.seconds(device))?;
        let seconds = (all as f64 * epochs + measured) * second_per_token + asked;
        Ok(Self { step_seconds, step_tokens, seconds, peak_rss_bytes })
    }
}
