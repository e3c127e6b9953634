//! A model, records and a task → everything that a run of training needs, checked before the first file is written.

use std::path::{Path, PathBuf};

use anyhow::Context;
use candle_core::Device;
use indicatif::HumanCount;

use super::teacher::Teacher;
use super::{Settings, lora, rates};
use crate::checkpoint::{self, Weights, adapter, file_hash};
use crate::data::cache::Cache;
use crate::data::records::Files;
use crate::data::{hub, tokens};
use crate::eager::{Init, Params};
use crate::model::ModelConfig;
use crate::model::ops::{Param, Part};
use crate::say::Say;
use crate::task::weighting::ClassWeights;
use crate::task::{
    Distillation, Encoder, Example, Learning, Measured, RecordFlags, Start, Target, Task, TrainingFlags,
};
use crate::world::World;
use crate::{Result, bail_unusable};

/// What is to be learnt, from what.
#[derive(Clone, Copy)]
pub struct Job<'a> {
    /// The task's name.
    pub task: &'a str,
    /// A directory, or a hub id.
    pub model: &'a str,
    pub train: &'a Files,
    pub eval: Option<&'a Files>,
    /// Whether all weights are drawn anew.
    pub from_scratch: bool,
    pub records: &'a RecordFlags,
    pub training: &'a TrainingFlags,
    pub settings: &'a Settings,
    /// Where tokens are kept for other runs.
    pub cache: Option<&'a Cache>,
}

impl Job<'_> {
    /// Refuses files that can't be trained on, and flags that the task has no use for.
    ///
    /// # Errors
    /// Unusable: names the file or the flag.
    pub fn check(&self) -> Result<()> {
        let files = self.files();
        for file in &files {
            // a second look at a pipe would wait for ever
            if file.metadata().is_ok_and(|about| !about.is_file() && !about.is_dir()) {
                bail_unusable!(
                    "{} is a pipe or a device, and training reads its records and then hashes them: give a file",
                    file.display()
                );
            }
        }
        self.training.check(self.task)?;
        self.check_teacher()?;
        if self.settings.label_smoothing > 0.0
            && self.training.shared.focal_gamma.is_some_and(|gamma| gamma > 0.0)
        {
            bail_unusable!(
                "--label-smoothing and --focal-gamma exclude each other: the one asks for less than what the other \
                 takes for known"
            );
        }
        if self.settings.shuffle_buffer.is_some()
            && self.training.shared.class_weights == Some(ClassWeights::Balanced)
        {
            bail_unusable!(
                "--class-weights balanced counts the labels of all records, and --shuffle-buffer holds some of them at a \
                 time: give a FILE"
            );
        }
        self.records.check(self.task, &files)
    }

    /// Refuses flags of a teacher where there is none, those of labels where they count nothing, and a teacher who could not be
    /// asked for all records at once.
    fn check_teacher(&self) -> Result<()> {
        let shared = &self.training.shared;
        let Some(taught) = Distillation::asked(shared)? else { return Ok(()) };
        if self.settings.shuffle_buffer.is_some() {
            bail_unusable!(
                "--teacher is asked for all records before the first step, and --shuffle-buffer holds some of them at a time: \
                 leave one of them out"
            );
        }
        if taught.takes_labels() {
            return Ok(());
        }
        for (flag, given) in [
            ("--label-smoothing", self.settings.label_smoothing > 0.0),
            ("--class-weights", shared.class_weights.is_some()),
            ("--focal-gamma", shared.focal_gamma.is_some()),
        ] {
            if given {
                bail_unusable!("{flag} is for labels, which count nothing with --distillation-weight 1");
            }
        }
        Ok(())
    }

    /// All files of records.
    fn files(&self) -> Vec<&Path> {
        [self.train].into_iter().chain(self.eval).flat_map(Files::all).collect()
    }
}

/// Below it a whole model is trained.
const SLOW_FOR_LORA: f64 = 1e-4;

/// Everything that is read and checked before the first file is written.
pub struct Prepared {
    /// The directory of the model that training starts from.
    pub model: PathBuf,
    /// As it was asked for.
    asked: String,
    /// What the trained model's directory will say.
    pub config: ModelConfig,
    pub learning: Learning<Task, Target>,
    pub params: Params,
    /// Parameters that are drawn anew.
    pub new: Vec<String>,
    /// Weights of the checkpoint that nothing asks for.
    pub unused: Vec<String>,
    /// What is measured on.
    pub eval: Vec<Example>,
    /// What is learnt from beside labels.
    pub teacher: Option<Teacher>,
}

impl Prepared {
    /// Takes over what the task has found in the evaluation whose weights are kept.
    pub fn tune(&mut self, best: &Measured, say: &Say) {
        if let Some(tuned) = self.learning.task.tuned(best) {
            tuned.write_config(&mut self.config);
            if let Some(told) = tuned.tuning_told(best) {
                say.line(told);
            }
        }
    }

    /// Asks the teacher, if there is one, before the first step; it is needed no more then.
    ///
    /// # Errors
    /// As [`Teacher::teach`].
    pub fn be_taught(&mut self, device: &Device, cache: Option<&Cache>, say: &Say) -> Result<()> {
        match self.teacher.take() {
            Some(teacher) => {
                teacher.teach(&self.learning.task, &mut self.learning.examples, device, cache, say)
            }
            None => Ok(()),
        }
    }

    /// Reads model and records, and finds out what is to be learnt.
    ///
    /// # Errors
    /// Unusable: a model that can't be trained for the task, or records that can't be learnt from.
    pub fn new(job: &Job, device: &Device, say: &Say) -> Result<Self> {
        let Job { settings, records, training, from_scratch, train, cache, .. } = *job;
        if let (Some(flag), None) = (Task::needs_eval(job.task, training), job.eval) {
            bail_unusable!("{flag} finds what suits the records that are measured on: give --eval");
        }
        let max_length = settings.max_length;
        let model = hub::model_dir(job.model, say.quiet)?;
        let mut config = ModelConfig::read(&model)?;
        if let Some(p) = settings.dropout {
            config.set_dropout(p)?;
        }
        if max_length > config.max_positions() {
            bail_unusable!(
                "--max-length {max_length} is above the {} tokens that the model takes",
                config.max_positions()
            );
        }
        let model = model.as_path();
        if settings.lora.lora_rank.is_some() && adapter::is_in(model) {
            bail_unusable!(
                "{} is an adapter, and --lora-rank would put another beside it: merge it first (`tk export --merged`)",
                model.display()
            );
        }
        let mut start =
            Start { model, config, from_scratch, train, records, training, max_length, cache, say };
        let learning = Task::learn(job.task, &mut start)?;
        let (task, mut config) = (&learning.task, start.config);
        settings.check_task(task)?;
        let teacher = Teacher::of(job, task)?;
        let encoder = Encoder { records, training, tokenizer: &learning.tokenizer, max_length };
        let eval = job.eval.map(|files| task.examples(files, &encoder)).transpose()?;

        let adapted = settings.lora.chosen(&config.family, task.head())?;
        config.family = config.family.adapted(adapted);
        let manifest = task.params(&config.family)?;
        let init = Init { seed: settings.seed, std: config.initializer_range() };
        let (mut params, fit) = if from_scratch {
            (Params::from_scratch(&manifest, init, device)?, Default::default())
        } else {
            let mut weights = Weights::open(model, config.family.names())?;
            if !Task::open(model, &config).is_ok_and(|base| task.keeps(&base)) {
                // a head that was trained for other labels
                for Param { name, .. } in manifest.iter().filter(|param| param.part == Part::Labels) {
                    if weights.forget(name) {
                        say.line(format!("{name} was trained for other labels and starts anew"));
                    }
                }
            }
            Params::load(&manifest, &weights, init, device)?
        };
        let mut new = fit.new;
        if config.family.lora().is_some() {
            let is_trained = |param: &Param| {
                matches!(param.part, Part::Adapter | Part::Labels)
                    || lora::is_head(&param.name, task.head())
                    || new.contains(&param.name)
            };
            params.freeze(|param| !is_trained(param));
            new.retain(|name| {
                !manifest.iter().any(|param| param.part == Part::Adapter && param.name == *name)
            });
        }
        if !settings.freeze.is_empty() {
            rates::freeze(&mut params, &settings.freeze, &new)?;
        }
        task.write_config(&mut config);
        for key in ["torch_dtype", "dtype"] {
            if config.raw.contains_key(key) {
                config.raw.insert(key.to_owned(), "float32".into()); // what is saved
            }
        }
        let (unused, eval) = (fit.unused, eval.unwrap_or_default());
        let (model, asked) = (model.to_owned(), job.model.to_owned());
        Ok(Self { model, asked, config, learning, params, new, unused, eval, teacher })
    }

    /// What an adapter's base is called: the place of a directory, or a hub id and its revision.
    ///
    /// # Errors
    /// The directory's place can't be told.
    pub fn base(&self) -> Result<(String, Option<String>)> {
        let asked = Path::new(&self.asked);
        if asked.is_dir() {
            let place = asked.canonicalize().with_context(|| self.asked.clone())?;
            return Ok((place.display().to_string(), None));
        }
        Ok(match self.asked.split_once('@') {
            Some((id, revision)) => (id.to_owned(), Some(revision.to_owned())),
            None => (self.asked.clone(), None),
        })
    }

    /// Tells what was found.
    pub fn describe(&self, job: &Job, say: &Say) {
        say.line(format!(
            "{}: {} parameters; {}",
            self.model.display(),
            grouped(self.params.numel()),
            if job.from_scratch {
                "all drawn anew".to_owned()
            } else if self.new.is_empty() {
                "all from the checkpoint".to_owned()
            } else {
                format!("{} drawn anew", self.new.join(", "))
            }
        ));
        if let Some(lora) = self.config.family.lora() {
            let beside: usize = self
                .params
                .trainable()
                .filter(|own| own.param.part == Part::Adapter)
                .map(|own| own.param.numel())
                .sum();
            say.line(format!("LoRA: {} numbers beside {} maps", grouped(beside), lora.maps.len()));
            if job.settings.learning_rate < SLOW_FOR_LORA {
                say.line(format!(
                    "LoRA is usually trained at ten to forty times the learning rate of a whole model; --learning-rate is {:e}",
                    job.settings.learning_rate
                ));
            }
        }
        let frozen: usize = self
            .params
            .iter()
            .filter(|(param, _)| self.params.is_frozen(&param.name))
            .map(|(param, _)| param.numel())
            .sum();
        if frozen > 0 {
            say.line(format!("{} of them are frozen", grouped(frozen)));
        }
        if !self.unused.is_empty() {
            let shown = self.unused.len().min(8);
            say.line(format!(
                "not used from the checkpoint: {}{}",
                self.unused[..shown].join(", "),
                if self.unused.len() > shown { " …" } else { "" }
            ));
        }
        let cut = |examples: &[Example]| examples.iter().filter(|example| example.is_cut()).count();
        let train = &self.learning.examples;
        let tokens: usize = train.iter().map(Example::tokens).sum();
        let learnt: usize = train.iter().filter_map(|example| example.target.losses().first().copied()).sum();
        // what is drawn at every step counts none before
        let learnt =
            (learnt != train.len() && learnt > 0).then(|| format!("{} tokens are learnt", grouped(learnt)));
        let more = self.learning.task.summary().into_iter().chain(learnt).map(|text| format!("; {text}"));
        say.line(format!(
            "{} training examples of {:.1} tokens, {} to measure on{}",
            grouped(train.len()),
            tokens as f64 / train.len() as f64,
            grouped(self.eval.len()),
            more.collect::<String>()
        ));
        for (name, examples) in [("training", train), ("evaluation", &self.eval)] {
            if cut(examples) > 0 {
                say.warn(format!(
                    "{} of {} {name} examples are longer than --max-length {} and are cut",
                    grouped(cut(examples)),
                    grouped(examples.len()),
                    job.settings.max_length
                ));
            }
        }
        if let Some(teacher) = &self.teacher {
            say.line(format!("teacher: {}", teacher.about().told()));
        }
    }

    /// What a run's result depends on beside its settings: the hash of each file, and how many processes there are.
    pub fn inputs(&self, job: &Job, world: &dyn World) -> Result<Vec<(String, String)>> {
        let mut inputs = Vec::new();
        // what was drawn to be measured on stands in the files to learn from
        let eval = job.eval.filter(|files| files.drawn_from().is_none());
        for (name, files) in [("train", Some(job.train)), ("eval", eval)] {
            match files.map(Files::paths) {
                None => {}
                Some([path]) => inputs.push((name.to_owned(), file_hash(path)?)),
                Some(paths) => {
                    for path in paths {
                        inputs.push((format!("{name} {}", path.display()), file_hash(path)?));
                    }
                }
            }
        }
        if world.size() > 1 {
            inputs.push(("the number of processes".to_owned(), world.size().to_string()));
        }
        if let Some(ClassWeights::File(path)) = &job.training.shared.class_weights {
            inputs.push(("class-weights".to_owned(), file_hash(path)?));
        }
        if let Some(teacher) = &self.teacher {
            inputs.push(("teacher".to_owned(), teacher.content().to_owned()));
        }
        let of_tasks = Task::files();
        if adapter::is_in(&self.model) {
            inputs.push((adapter::CONFIG.to_owned(), file_hash(&self.model.join(adapter::CONFIG))?));
        }
        let mut names: Vec<PathBuf> =
            ["config.json"].iter().chain(&of_tasks).chain(&tokens::FILES).map(PathBuf::from).collect();
        if !job.from_scratch {
            let weights = checkpoint::weight_files(&self.model)?;
            if !weights.contains(&self.model.join("model.safetensors")) {
                names.push(checkpoint::INDEX.into());
            }
            names.extend(
                weights.iter().filter_map(|path| Some(path.strip_prefix(&self.model).ok()?.to_owned())),
            );
        }
        for name in names {
            let path = self.model.join(&name);
            if path.is_file() {
                inputs.push((name.display().to_string(), file_hash(&path)?));
            }
        }
        Ok(inputs)
    }
}

/// Digits in groups of three.
fn grouped(n: usize) -> HumanCount {
    HumanCount(n as u64)
}
