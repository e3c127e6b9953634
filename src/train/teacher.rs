//! A trained model and the records of a run → its logits beside the examples to learn from: asked once, before the first
//! step, and kept for other runs.

use std::path::Path;
use std::time::Instant;

use anyhow::Context;
use candle_core::Device;
use indicatif::HumanCount;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::prepare::Job;
use crate::checkpoint::hex;
use crate::data::batch::Encoding;
use crate::data::cache::{Cache, Key};
use crate::eager::Evaluator;
use crate::model::ops::Param;
use crate::onnx::model::weights_sha256;
use crate::saved::{Saved, cut};
use crate::say::Say;
use crate::task::{Distillation, Encoder, Example, Task};
use crate::{Result, bail_unusable};

/// Examples that are answered between two looks at the progress bar.
const BLOCK: usize = 64;

/// Tokens that tell how long all of them take.
const TRIED_TOKENS: usize = 2048;

/// A model to learn from, and the records as it reads them.
pub struct Teacher {
    saved: Saved,
    about: AboutTeacher,
    /// Of the same records as those that are learnt from, in its own tokens.
    examples: Vec<Example>,
    /// The hash of all that its logits depend on: weights, configuration, and every token that it reads.
    content: String,
}

/// What there is to say of it before a run.
#[derive(Clone, Debug, Serialize)]
pub struct AboutTeacher {
    pub dir: String,
    pub family: String,
    pub parameters: usize,
    /// Tokens of the longest example that it reads.
    pub max_length: usize,
    pub temperature: f64,
    pub weight: f64,
    /// Whether the labels count, too.
    pub takes_labels: bool,
}

impl Teacher {
    /// Opens the model that was named, if one was, and reads the records with its tokenizer.
    ///
    /// # Errors
    /// Unusable: a model that can't be read, or can't teach the task; records that it can't read.
    pub fn of(job: &Job, task: &Task) -> Result<Option<Self>> {
        let (Some(dir), Some(distillation)) = (&job.training.shared.teacher, task.distillation()) else {
            return Ok(None);
        };
        let opened = Self::open(dir, job, task, distillation);
        opened.map(Some).with_context(|| format!("--teacher {}", dir.display()))
    }

    fn open(dir: &Path, job: &Job, task: &Task, distillation: Distillation) -> Result<Self> {
        let mut saved = Saved::open(dir)?;
        task.check_teacher(&saved.task)?;
        let hash = weights_sha256(&saved.config, &saved.task, &saved.weights)?;
        let max_length = job.settings.max_length.min(saved.max_length);
        saved.tokenizer = saved.tokenizer.cached_in(job.cache);
        let encoder =
            Encoder { records: job.records, training: job.training, tokenizer: &saved.tokenizer, max_length };
        let examples = saved.task.examples(job.train, &encoder)?;
        let mut content = Sha256::new();
        content.update(hash);
        content.update(serde_json::to_string(&saved.config.raw)?);
        for Encoding { ids, type_ids, .. } in examples.iter().map(|example| &example.encoding) {
            content.update((ids.len() as u64).to_le_bytes());
            ids.iter().chain(type_ids).for_each(|id| content.update(id.to_le_bytes()));
        }
        let about = AboutTeacher {
            dir: dir.display().to_string(),
            family: saved.config.family.model_type().to_owned(),
            parameters: saved.task.params(&saved.config.family)?.iter().map(Param::numel).sum(),
            max_length,
            temperature: distillation.temperature,
            weight: distillation.weight,
            takes_labels: distillation.takes_labels(),
        };
        Ok(Self { saved, about, examples, content: hex(&content.finalize()) })
    }

    /// The hash of all that its logits depend on.
    pub fn content(&self) -> &str {
        &self.content
    }

    /// What there is to say of it before a run.
    pub fn about(&self) -> &AboutTeacher {
        &self.about
    }

    /// How long it takes to ask it for all examples, by some of them.
    ///
    /// # Errors
    /// It can't be asked.
    pub fn seconds(&self, device: &Device) -> Result<f64> {
        let evaluator = Evaluator::open(&self.saved, device)?;
        let (mut some, mut tokens) = (Vec::new(), 0);
        for Example { encoding, .. } in &self.examples {
            if tokens + encoding.len() > TRIED_TOKENS && !some.is_empty() {
                break;
            }
            tokens += encoding.len();
            some.push(encoding);
        }
        let began = Instant::now();
        evaluator.outputs(&some)?;
        let all: usize = self.examples.iter().map(Example::tokens).sum();
        Ok(began.elapsed().as_secs_f64() / tokens.max(1) as f64 * all as f64)
    }

    /// Puts its logits beside the examples to learn from: those of the cache, where it was asked before.
    ///
    /// # Errors
    /// Unusable: logits that are not finite.
    pub fn teach(
        &self,
        task: &Task,
        examples: &mut [Example],
        device: &Device,
        cache: Option<&Cache>,
        say: &Say,
    ) -> Result<()> {
        let longer = cut(&self.examples);
        if longer > 0 {
            say.warn(format!(
                "{} of {} examples are longer than the {} tokens that the teacher reads, and it says what it says of their \
                 beginning",
                HumanCount(longer as u64),
                HumanCount(self.examples.len() as u64),
                self.about.max_length
            ));
        }
        let said = self.said(device, cache, say)?;
        let untaught = task.teach(examples, &self.saved.task, &self.examples, &said)?;
        if untaught > 0 {
            let all: usize = examples.iter().flat_map(|example| example.target.losses()).sum();
            say.warn(format!(
                "the teacher has no token for {} of {} words: {}",
                HumanCount(untaught as u64),
                HumanCount(all as u64),
                match self.about.takes_labels {
                    true => "they are learnt from their labels alone",
                    false => "nothing is learnt of them",
                }
            ));
        }
        Ok(())
    }

    /// What it says of each of its examples.
    fn said(&self, device: &Device, cache: Option<&Cache>, say: &Say) -> Result<Vec<Vec<f32>>> {
        let task = &self.saved.task;
        let width = task.outputs(task.form()).first().context("the teacher has no output")?.width();
        let due = |i: usize| self.examples[i].target.losses().iter().sum::<usize>() * width;
        let fits = |i: usize, said: &Vec<f32>| said.len() == due(i) && said.iter().all(|x| x.is_finite());
        // on a thread of the pool, which then works itself
        let ask = || rayon::scope(|_| self.ask(device, say));
        let said = match cache {
            None => ask()?,
            Some(cache) => {
                let key = Key::new(&format!("teacher {:?} {}", device.location(), self.content));
                let (said, read) =
                    cache.at_once("a teacher's logits", key, self.examples.len(), fits, ask)?;
                if let Some(path) = read {
                    say.line(format!("the teacher's logits were in {}", path.display()));
                }
                said
            }
        };
        anyhow::ensure!(
            said.iter().enumerate().all(|(i, said)| fits(i, said)),
            "the teacher says something else"
        );
        Ok(said)
    }

    fn ask(&self, device: &Device, say: &Say) -> Result<Vec<Vec<f32>>> {
        let began = Instant::now();
        let evaluator = Evaluator::open(&self.saved, device)?;
        let all = self.examples.len();
        let bar = say.bar(all as u64, "{bar:24} {pos}/{len} examples read by the teacher, {eta} left")?;
        let mut said = Vec::with_capacity(all);
        let blocks = all.div_ceil(BLOCK);
        for (block, examples) in self.examples.chunks(BLOCK).enumerate() {
            let encodings: Vec<&Encoding> = examples.iter().map(|example| &example.encoding).collect();
            for (example, outputs) in examples.iter().zip(evaluator.outputs(&encodings)?) {
                let own = self.saved.task.said(&outputs, example)?;
                if let Some(x) = own.iter().find(|x| !x.is_finite()) {
                    bail_unusable!(
                        "--teacher {}: a logit of example {} is {x}: such a model teaches nothing",
                        self.saved.dir.display(),
                        said.len() + 1
                    );
                }
                said.push(own);
            }
            bar.set_position(said.len() as u64);
            if bar.is_hidden() && blocks > 1 && (block + 1).is_multiple_of(blocks.div_ceil(10)) {
                say.line(format!("the teacher has read {} of {all} examples", said.len()));
            }
        }
        bar.finish_and_clear();
        say.line(format!(
            "the teacher has read {} examples in {:.1} s",
            HumanCount(all as u64),
            began.elapsed().as_secs_f64()
        ));
        Ok(said)
    }
}

impl AboutTeacher {
    /// A line of text.
    pub fn told(&self) -> String {
        let labels = if self.takes_labels { "" } else { ", labels count nothing" };
        format!(
            "{}: a {} of {} parameters that reads {} tokens at most; temperature {}, weight {}{labels}",
            self.dir,
            self.family,
            HumanCount(self.parameters as u64),
            self.max_length,
            self.temperature,
            self.weight
        )
    }
}
