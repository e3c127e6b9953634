//! All that a run would read and do, looked at before its first step: what is in the files, what is learnt of them, what
//! the run will take, and what looks like a mistake. Nothing is written.

mod estimate;
mod split;
mod told;
mod twins;
mod warnings;

use candle_core::Device;
use serde::Serialize;

use self::estimate::Estimate;
use self::split::{Reader, Split};
use self::twins::{Known, Twins};
pub use self::warnings::Warning;
use super::plan::{Budget, Plan};
use super::prepare::{Job, Prepared};
use super::rates::{Group, Rates};
use super::schedule::warmup_steps;
use super::stream::Stream;
use super::teacher::{AboutTeacher, Teacher};
use crate::Result;
use crate::eager::kernels::dropout::mix;
use crate::task::{Beside, Example};

/// Examples that are shown.
const SHOWN: usize = 3;

/// What was found.
#[derive(Clone, Debug, Serialize)]
pub struct DryRun {
    pub warnings: Vec<Warning>,
    pub model: About,
    /// What is learnt from beside labels. It is not asked here, but for a few examples.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher: Option<AboutTeacher>,
    pub train: Split,
    pub eval: Option<Split>,
    /// Records to measure on that stand among those to learn from.
    pub shared: Option<Twins>,
    pub examples: Vec<Shown>,
    pub plan: Planned,
    pub estimate: Estimate,
}

/// The model that training starts from.
#[derive(Clone, Debug, Serialize)]
pub struct About {
    pub family: String,
    pub task: &'static str,
    /// Numbers that are trained, and that are not.
    pub trained: usize,
    pub frozen: usize,
    /// Whether all parameters are drawn anew; else which are.
    pub from_scratch: bool,
    pub drawn_anew: Vec<String>,
    /// Weights of the checkpoint that nothing asks for.
    pub unused: Vec<String>,
}

/// An example as the model reads it.
#[derive(Clone, Debug, Serialize)]
pub struct Shown {
    pub tokens: Vec<String>,
    /// What all of it ought to give.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// (T): what each token ought to give, where it ought to.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<Option<String>>,
}

/// What the run would do.
#[derive(Clone, Debug, Serialize)]
pub struct Planned {
    pub steps: usize,
    pub warmup_steps: usize,
    pub epochs: f64,
    /// Micro-batches of a step.
    pub accumulation: usize,
    /// Records of a micro-batch, or its tokens, at most.
    pub batch_size: Option<usize>,
    pub batch_tokens: Option<usize>,
    pub max_length: usize,
    pub schedule: String,
    pub groups: Vec<Group>,
    /// How much each label counts in the loss, where they don't count alike.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub class_weights: Vec<(String, f32)>,
}

impl DryRun {
    /// Looks at everything. Two steps are taken: the parameters are not those of the model any more.
    ///
    /// # Errors
    /// Unusable: what a run would refuse, too.
    pub fn new(job: &Job, prepared: &Prepared, stream: Option<&Stream>, device: &Device) -> Result<Self> {
        // on a thread of the pool, as a run is
        let mut found = rayon::scope(|_| Self::look(job, prepared, device))?;
        if let Some(stream) = stream {
            // what was looked at is its first buffer
            found.plan.epochs = stream.passes(found.plan.epochs);
            found.train.drawn_from = stream.counted();
        }
        Ok(found)
    }

    fn look(job: &Job, prepared: &Prepared, device: &Device) -> Result<Self> {
        let (settings, learning) = (job.settings, &prepared.learning);
        let (task, tokenizer) = (&learning.task, &learning.tokenizer);
        let reader = Reader {
            task,
            tokenizer,
            records: job.records,
            max_length: settings.max_length,
            seed: settings.seed,
        };
        let train_looks = task.look(job.train, job.records)?;
        let (known, duplicates) = Known::of(&train_looks);
        let train = Split::new("training", job.train, &train_looks, &learning.examples, duplicates, &reader)?;
        let (mut eval, mut shared) = (None, None);
        if let Some(files) = job.eval {
            let looks = task.look(files, job.records)?;
            let duplicates = Known::of(&looks).1;
            eval = Some(Split::new("evaluation", files, &looks, &prepared.eval, duplicates, &reader)?);
            shared = Some(known.shared_with(&looks));
        }

        let lengths = learning.examples.iter().map(Example::tokens).collect();
        let plan = Plan::new(settings, lengths);
        let planned = Planned::new(job, prepared, &plan);
        let examples = learning.examples.iter().take(SHOWN).enumerate();
        let examples = examples
            .map(|(i, example)| {
                let drawn = task.drawn(example, mix(settings.seed ^ mix(i as u64)))?;
                Ok(shown(prepared, drawn.as_ref().unwrap_or(example)))
            })
            .collect::<Result<Vec<_>>>()?;
        let estimate = Estimate::new(prepared, settings, device, &plan)?;
        let warnings = warnings::all(task, &train, eval.as_ref(), shared.as_ref(), &estimate);
        let trained = prepared.params.trainable().map(|own| own.param.numel()).sum();
        let model = About {
            family: prepared.config.family.model_type().to_owned(),
            task: task.name(),
            trained,
            frozen: prepared.params.numel() - trained,
            from_scratch: job.from_scratch,
            drawn_anew: prepared.new.clone(),
            unused: prepared.unused.clone(),
        };
        let teacher = prepared.teacher.as_ref().map(Teacher::about).cloned();
        Ok(Self { warnings, model, teacher, train, eval, shared, examples, plan: planned, estimate })
    }
}

impl Planned {
    fn new(job: &Job, prepared: &Prepared, plan: &Plan) -> Self {
        let settings = job.settings;
        let params = &prepared.params;
        let (batch_size, batch_tokens) = match settings.budget() {
            Budget::Examples(most) => (Some(most), None),
            Budget::Tokens(most) => (None, Some(most)),
        };
        let steps = plan.total_steps();
        let class_weights = prepared.learning.task.class_weights();
        Self {
            steps,
            warmup_steps: warmup_steps(settings.warmup_ratio, steps),
            epochs: steps as f64 / plan.steps_of(0).len().max(1) as f64,
            accumulation: settings.gradient_accumulation,
            batch_size,
            batch_tokens,
            max_length: settings.max_length,
            schedule: settings.schedule.name().to_owned(),
            groups: Rates::new(params, settings).groups(params, settings.weight_decay),
            class_weights: class_weights
                .into_iter()
                .map(|(name, weight)| (name.to_owned(), weight))
                .collect(),
        }
    }
}

fn shown(prepared: &Prepared, example: &Example) -> Shown {
    let tokenizer = &prepared.learning.tokenizer;
    let name = |&id: &u32| tokenizer.inner().id_to_token(id).unwrap_or_else(|| id.to_string());
    let tokens = example.encoding.ids.iter().map(name).collect();
    match prepared.learning.task.beside(&example.target, tokenizer) {
        Beside::Example(label) => Shown { tokens, label: Some(label), labels: Vec::new() },
        Beside::Tokens(labels) => Shown { tokens, label: None, labels },
    }
}
