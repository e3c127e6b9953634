//! Tasks: what models are trained for and serve. [`Objective`] says what a task is, and the list below which there are;
//! nothing else names one.

pub mod causal_lm;
pub mod distillation;
pub mod embedding;
pub mod flags;
mod id2label;
mod look;
pub mod masked_lm;
pub mod next_sentence;
pub mod objective;
pub mod output;
pub mod pre_training;
pub mod question_answering;
pub mod review;
pub mod scores;
#[cfg(test)]
mod tests;
pub mod text_classification;
pub mod token_classification;
pub mod weighting;

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::checkpoint::Weights;
use crate::data::batch::{Encoding, PackedBatch};
use crate::data::records::{BadRow, Columns, Files, How, Row};
use crate::data::tokens::Tokenizer;
use crate::eager::{Eager, Forward, X};
use crate::model::ops::{Ops, Param};
use crate::model::{Family, Head, ModelConfig, manifest, token_ids};
use crate::runtime::Slots;
use crate::say::nearest;
use crate::{Result, bail_unusable, unusable};
pub use causal_lm::CausalLm;
pub use distillation::Distillation;
pub use embedding::Embedding;
pub use flags::{Reading, SharedFlags, SharedRecordFlags, SharedTrainingFlags, TextColumns};
pub use look::{Beside, Look};
pub use masked_lm::MaskedLm;
pub use next_sentence::NextSentence;
pub use objective::{Asking, Encoder, Form, Learning, Objective, Start};
pub use output::{Dim, Output, Outputs, Scope};
pub use pre_training::PreTraining;
pub use question_answering::QuestionAnswering;
pub use review::{Review, Source};
pub use text_classification::TextClassification;
pub use token_classification::TokenClassification;

/// An example that is learnt from, or measured on.
#[derive(Clone, Debug)]
pub struct Example<T = Target> {
    pub encoding: Encoding,
    pub target: T,
}

impl Example {
    /// All its sequences: most have one.
    pub fn encodings(&self) -> impl Iterator<Item = &Encoding> {
        [&self.encoding].into_iter().chain(self.target.others())
    }

    /// Tokens of all its sequences.
    pub fn tokens(&self) -> usize {
        self.encodings().map(Encoding::len).sum()
    }

    /// Whether something of it was cut off.
    pub fn is_cut(&self) -> bool {
        self.encodings().any(|encoding| encoding.truncated)
    }
}

/// The fields of a record's answer, or why there is none.
pub type Answer = Result<Map<String, Value>, String>;

/// Metrics by name, in alphabetical order. Not a number where a metric is not defined.
pub type Metrics = BTreeMap<String, f64>;

/// What is measured on examples: the metrics that runs are compared by, and what else there is to say, such as a row a
/// type of entity.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Measured {
    #[serde(flatten)]
    pub metrics: Metrics,
    #[serde(flatten)]
    pub details: Map<String, Value>,
}

impl From<Metrics> for Measured {
    fn from(metrics: Metrics) -> Self {
        Self { metrics, details: Map::new() }
    }
}

/// Whether a metric's value is better than another; both are numbers.
pub fn is_better(new: f64, old: f64, more_is_better: bool) -> bool {
    if more_is_better { new > old } else { new < old }
}

/// A metric's name, and whether more of it is better.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Metric {
    pub name: &'static str,
    pub more_is_better: bool,
    /// What all right is, of a metric of which more is better: 1, or 100.
    pub best: f64,
}

impl Metric {
    /// What every task has.
    pub const LOSS: Self = Self::falling("loss");

    /// More is better.
    pub const fn rising(name: &'static str) -> Self {
        Self { name, more_is_better: true, best: 1.0 }
    }

    /// The same, where all right is 100.
    pub const fn percent(name: &'static str) -> Self {
        Self { best: 100.0, ..Self::rising(name) }
    }

    /// Less is better.
    pub const fn falling(name: &'static str) -> Self {
        Self { name, more_is_better: false, best: 0.0 }
    }

    /// How many points of 100 were lost; where less is better, by how many percent it rose.
    pub fn lost(self, before: f64, after: f64) -> f64 {
        if self.more_is_better {
            (before - after) / self.best * 100.0
        } else {
            (after / before - 1.0) * 100.0
        }
    }
}

/// Makes the list of tasks: enums over what their modules define, each call handed to the one that is meant.
macro_rules! tasks {
    ($($task:ident in $module:ident),+ $(,)?) => {
        /// What a model is trained for and serves: one of all that tk defines.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Task {
            $($task($task)),+
        }

        /// What an example ought to give.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Target {
            $($task(<$task as Objective>::Target)),+
        }

        /// What is kept of a record until its windows are computed.
        pub enum Question {
            $($task(<$task as Objective>::Question)),+
        }

        $(impl From<$task> for Task {
            fn from(task: $task) -> Self {
                Self::$task(task)
            }
        })+

        /// How records are read, to learn from and to measure on. Each task has its own; another's are refused.
        #[derive(Clone, Debug, Default, PartialEq, clap::Args, Serialize, Deserialize)]
        #[group(skip)]
        #[serde(rename_all = "kebab-case", default)]
        pub struct RecordFlags {
            #[command(flatten)]
            #[serde(flatten)]
            pub reading: Reading,
            #[command(flatten)]
            #[serde(flatten)]
            pub texts: TextColumns,
            #[command(flatten)]
            #[serde(flatten)]
            pub shared: flags::SharedRecordFlags,
            $(#[command(flatten)]
            #[serde(flatten)]
            pub $module: $module::RecordFlags,)+
        }

        /// What is learnt, beside the regime.
        #[derive(Clone, Debug, Default, PartialEq, clap::Args, Serialize, Deserialize)]
        #[group(skip)]
        #[serde(rename_all = "kebab-case", default)]
        pub struct TrainingFlags {
            #[command(flatten)]
            #[serde(flatten)]
            pub shared: flags::SharedTrainingFlags,
            $(#[command(flatten)]
            #[serde(flatten)]
            pub $module: $module::TrainingFlags,)+
        }

        /// How records are read to be answered, and how they are answered.
        #[derive(Clone, Debug, Default, PartialEq, clap::Args, Serialize)]
        #[group(skip)]
        #[serde(rename_all = "kebab-case")]
        pub struct AnswerFlags {
            #[command(flatten)]
            #[serde(flatten)]
            pub reading: Reading,
            #[command(flatten)]
            #[serde(flatten)]
            pub texts: TextColumns,
            #[command(flatten)]
            #[serde(flatten)]
            pub shared: SharedFlags,
            $(#[command(flatten)]
            #[serde(flatten)]
            pub $module: $module::AnswerFlags,)+
        }

        impl RecordFlags {
            /// Refuses what says nothing to a task that reads these files.
            ///
            /// # Errors
            /// Unusable: names the flag.
            pub fn check(&self, task: &str, files: &[&Path]) -> Result<()> {
                $(if task != $task::NAME {
                    flags::refuse_given(&self.$module, $task::NAME, task)?;
                })+
                flags::refuse_shared(&self.shared, &[$(($task::NAME, $task::RECORD_FLAGS)),+], task)?;
                self.shared.check_files(&self.reading, files)?;
                match task {
                    $($task::NAME => {
                        flags::refuse_texts(&self.texts, $task::TEXTS_LEARNT, task)?;
                        $task::check_files(self, files)
                    })+
                    _ => Ok(()),
                }
            }

            /// Refuses all of them, where no records are named.
            ///
            /// # Errors
            /// Unusable: names the first.
            pub fn check_none(&self) -> Result<()> {
                match flags::given(self)?.first() {
                    Some(flag) => bail_unusable!("{flag} is for the records of --input: name them"),
                    None => Ok(()),
                }
            }

            /// Refuses what says nothing where texts alone are read.
            ///
            /// # Errors
            /// Unusable: names the flag.
            pub fn check_of_texts(&self) -> Result<()> {
                let own = Self { reading: Reading::default(), texts: TextColumns::default(), ..self.clone() };
                match flags::given(&own)?.first() {
                    Some(flag) => bail_unusable!("{flag} says nothing where texts alone are read"),
                    None => Ok(()),
                }
            }
        }

        impl TrainingFlags {
            /// Refuses what says nothing to a task.
            ///
            /// # Errors
            /// Unusable: names the flag.
            pub fn check(&self, task: &str) -> Result<()> {
                $(if task != $task::NAME {
                    flags::refuse_given(&self.$module, $task::NAME, task)?;
                })+
                flags::refuse_shared(&self.shared, &[$(($task::NAME, $task::TRAINING_FLAGS)),+], task)
            }
        }

        impl AnswerFlags {
            /// Refuses what says nothing to a task.
            ///
            /// # Errors
            /// Unusable: names the flag.
            pub fn check(&self, task: &str) -> Result<()> {
                $(if task != $task::NAME {
                    flags::refuse_given(&self.$module, $task::NAME, task)?;
                })+
                flags::refuse_shared(&self.shared, &[$(($task::NAME, $task::ANSWER_FLAGS)),+], task)?;
                match task {
                    $($task::NAME => flags::refuse_texts(&self.texts, $task::TEXTS_ASKED, task),)+
                    _ => Ok(()),
                }
            }
        }

        $(impl Own for $task {
            fn own(target: &Target) -> Option<&Self::Target> {
                match target {
                    Target::$task(own) => Some(own),
                    _ => None,
                }
            }
        })+

        impl Target {
            /// See [`Objective::others`].
            pub fn others(&self) -> &[Encoding] {
                match self { $(Self::$task(target) => $task::others(target)),+ }
            }

            /// How many losses it has of each of the task's: a step's loss is their mean.
            pub fn losses(&self) -> Vec<usize> {
                match self { $(Self::$task(target) => $task::losses(target)),+ }
            }

            /// See [`Objective::asked`].
            pub fn asked(&self) -> Option<Vec<usize>> {
                match self { $(Self::$task(target) => $task::asked(target)),+ }
            }
        }

        impl Task {
            /// The names that `--task` takes.
            pub const NAMES: &'static [&'static str] = &[$($task::NAME),+];

            /// The head that each of them asks a family for.
            pub const HEADS: &'static [Head] = &[$($task::HEAD),+];

            /// Files of a model's directory that one of the tasks reads and writes, beside what every model has.
            pub fn files() -> Vec<&'static str> {
                [$($task::FILES),+].concat()
            }

            /// The task that a trained model directory's `config.json` speaks of.
            ///
            /// # Errors
            /// `architectures` names no head that tk knows, the labels are inconsistent, or a token id is none of the
            /// vocabulary.
            pub fn from_config(config: &ModelConfig) -> Result<Self> {
                token_ids::check(&config.raw, config.vocab_size())?;
                $(if $task::MARK.is_none() && config.has($task::HEAD) {
                    return Ok(Self::$task($task::from_config(config)?));
                })+
                let known: Vec<String> =
                    [$(($task::HEAD, $task::MARK)),+]
                        .into_iter()
                        .filter_map(|(head, mark)| config.family.class(head).filter(|_| mark.is_none()))
                        .collect();
                match config.architecture() {
                    Some(name) => bail_unusable!(
                        "architectures is [\"{name}\"], which is no trained task of tk's ({} are): fine-tune it first \
                         with `tk train`",
                        known.join(", ")
                    ),
                    None => bail_unusable!(
                        "architectures is missing, so the task is unknown: fine-tune with `tk train`"
                    ),
                }
            }

            /// The task that a trained model's directory speaks of: by a file of one task's own, or by `config.json`.
            ///
            /// # Errors
            /// As [`Task::from_config`]; or the file is inconsistent.
            pub fn open(dir: &Path, config: &ModelConfig) -> Result<Self> {
                $(if $task::MARK.is_some_and(|file| dir.join(file).exists()) {
                    return Self::open_as($task::NAME, dir, config);
                })+
                Self::from_config(config)
                    .map_err(|error| error.context(dir.join("config.json").display().to_string()))
            }

            /// The task of this name, as far as a trained model's directory speaks of it.
            ///
            /// # Errors
            /// There is no such task, or the directory's files are inconsistent.
            pub fn open_as(name: &str, dir: &Path, config: &ModelConfig) -> Result<Self> {
                token_ids::check(&config.raw, config.vocab_size())
                    .map_err(|error| error.context(dir.join("config.json").display().to_string()))?;
                match name {
                    $($task::NAME => Ok(Self::$task($task::open(dir, config)?)),)+
                    other => bail_unusable!("{other} is no task; tk has {}", Self::NAMES.join(", ")),
                }
            }

            /// Starts to learn the task of this name. See [`Objective::learn`].
            pub fn learn(name: &str, start: &mut Start) -> Result<Learning<Self, Target>> {
                match name {
                    $($task::NAME => {
                        let Learning { task, tokenizer, examples, files } = $task::learn(start)?;
                        let examples = listed(examples, Target::$task);
                        Ok(Learning { task: Self::$task(task), tokenizer, examples, files })
                    })+
                    other => bail_unusable!("{other} is no task; tk has {}", Self::NAMES.join(", ")),
                }
            }

            /// See [`Objective::NAME`].
            pub fn name(&self) -> &'static str {
                match self { $(Self::$task(_) => $task::NAME),+ }
            }

            /// See [`Objective::head`].
            pub fn head(&self) -> Head {
                match self { $(Self::$task(task) => task.head()),+ }
            }

            /// See [`Objective::PIPELINE_TAG`].
            pub fn pipeline_tag(&self) -> Option<&'static str> {
                match self { $(Self::$task(_) => $task::PIPELINE_TAG),+ }
            }

            /// See [`Objective::FIELDS_ASKED`].
            pub fn fields_asked(&self) -> &'static [&'static str] {
                match self { $(Self::$task(_) => $task::FIELDS_ASKED),+ }
            }

            /// See [`Objective::FIELDS_ANSWERED`].
            pub fn fields_answered(&self) -> &'static [&'static str] {
                match self { $(Self::$task(_) => $task::FIELDS_ANSWERED),+ }
            }

            /// See [`Objective::write_config`].
            pub fn write_config(&self, config: &mut ModelConfig) {
                match self { $(Self::$task(task) => task.write_config(config)),+ }
            }

            /// See [`Objective::examples`].
            pub fn examples(&self, files: &Files, encoder: &Encoder) -> Result<Vec<Example>> {
                match self {
                    $(Self::$task(task) => Ok(listed(task.examples(files, encoder)?, Target::$task)),)+
                }
            }

            /// See [`Objective::learnt`].
            pub fn learnt(&self, files: &Files, encoder: &Encoder) -> Result<Vec<Example>> {
                match self {
                    $(Self::$task(task) => Ok(listed(task.learnt(files, encoder)?, Target::$task)),)+
                }
            }

            /// See [`Objective::check_learnt`].
            pub fn check_learnt(&self, files: &Files, flags: &RecordFlags) -> Result<()> {
                match self { $(Self::$task(task) => task.check_learnt(files, flags)),+ }
            }

            /// See [`Objective::reading`].
            pub fn reading(&self, flags: &RecordFlags) -> (How, Columns) {
                match self { $(Self::$task(_) => $task::reading(flags)),+ }
            }

            /// The same of the task of this name.
            ///
            /// # Errors
            /// There is no such task.
            pub fn reading_of(name: &str, flags: &RecordFlags) -> Result<(How, Columns)> {
                match name {
                    $($task::NAME => Ok($task::reading(flags)),)+
                    other => bail_unusable!("{other} is no task; tk has {}", Self::NAMES.join(", ")),
                }
            }

            /// See [`Objective::CLASS`].
            pub fn class_field(name: &str) -> Option<&'static str> {
                match name {
                    $($task::NAME => $task::CLASS,)+
                    _ => None,
                }
            }

            /// See [`Objective::classes`].
            pub fn classes(name: &str, labels: &[&Value], flags: &TrainingFlags) -> Option<Vec<String>> {
                match name {
                    $($task::NAME => $task::classes(labels, flags),)+
                    _ => None,
                }
            }

            /// See [`Objective::needs_eval`]; of the task of this name.
            pub fn needs_eval(name: &str, flags: &TrainingFlags) -> Option<&'static str> {
                match name {
                    $($task::NAME => $task::needs_eval(flags),)+
                    _ => None,
                }
            }

            /// See [`Objective::look`].
            pub fn look(&self, files: &Files, flags: &RecordFlags) -> Result<Vec<Look>> {
                match self { $(Self::$task(task) => task.look(files, flags)),+ }
            }

            /// See [`Objective::has_one_label`].
            pub fn has_one_label(&self) -> bool {
                match self { $(Self::$task(task) => task.has_one_label()),+ }
            }

            /// See [`Objective::beside`].
            pub fn beside(&self, target: &Target, tokenizer: &Tokenizer) -> Beside {
                match (self, target) {
                    $((Self::$task(task), Target::$task(target)) => task.beside(target, tokenizer),)+
                    _ => Beside::Example("another task's".to_owned()),
                }
            }

            /// See [`Objective::summary`].
            pub fn summary(&self) -> Option<String> {
                match self { $(Self::$task(task) => task.summary()),+ }
            }

            /// See [`Objective::smooths_labels`].
            pub fn smooths_labels(&self) -> bool {
                match self { $(Self::$task(task) => task.smooths_labels()),+ }
            }

            /// See [`Objective::chunk`].
            pub fn chunk(&self) -> Option<usize> {
                match self { $(Self::$task(task) => task.chunk()),+ }
            }

            /// See [`Objective::max_length`].
            pub fn max_length(&self) -> Option<usize> {
                match self { $(Self::$task(task) => task.max_length()),+ }
            }

            /// See [`Objective::AHEAD`].
            pub fn ahead(&self) -> usize {
                match self { $(Self::$task(_) => $task::AHEAD),+ }
            }

            /// See [`Objective::define`].
            pub fn define<O: Ops>(&self, o: &O, family: &Family) -> Result<Vec<O::X>> {
                match self { $(Self::$task(task) => task.define(o, family)),+ }
            }

            /// See [`Objective::generate`].
            pub fn generate<O: Ops>(&self, o: &O, family: &Family) -> Result<Vec<O::X>> {
                match self { $(Self::$task(task) => task.generate(o, family)),+ }
            }

            /// See [`Objective::language_model`].
            pub fn language_model(&self) -> Option<&CausalLm> {
                match self { $(Self::$task(task) => task.language_model()),+ }
            }

            /// See [`Objective::form`].
            pub fn form(&self) -> Form {
                match self { $(Self::$task(task) => task.form()),+ }
            }

            /// See [`Objective::outputs`].
            pub fn outputs(&self, form: Form) -> Vec<Output> {
                match self { $(Self::$task(task) => task.outputs(form)),+ }
            }

            /// See [`Objective::metrics`].
            pub fn metrics(&self) -> &'static [Metric] {
                match self { $(Self::$task(task) => task.metrics()),+ }
            }

            /// See [`Objective::keeps`]; another task's head is not kept.
            pub fn keeps(&self, base: &Self) -> bool {
                match (self, base) {
                    $((Self::$task(task), Self::$task(base)) => task.keeps(base),)+
                    _ => false,
                }
            }

            /// See [`Objective::loss_names`].
            pub fn loss_names(&self) -> &'static [&'static str] {
                match self { $(Self::$task(task) => task.loss_names()),+ }
            }

            /// See [`Objective::weights`].
            pub fn weights(&self, target: &Target) -> Vec<f64> {
                match (self, target) {
                    $((Self::$task(task), Target::$task(target)) => task.weights(target),)+
                    _ => target.losses().into_iter().map(|count| count as f64).collect(),
                }
            }

            /// See [`Objective::class_weights`].
            pub fn class_weights(&self) -> Vec<(&str, f32)> {
                match self { $(Self::$task(task) => task.class_weights()),+ }
            }

            /// See [`Objective::distillation`].
            pub fn distillation(&self) -> Option<Distillation> {
                match self { $(Self::$task(task) => task.distillation()),+ }
            }

            /// Whether another model can be this one's teacher.
            ///
            /// # Errors
            /// Unusable: it is one for another task, or as [`Objective::places_in`].
            pub fn check_teacher(&self, teacher: &Self) -> Result<()> {
                match (self, teacher) {
                    $((Self::$task(task), Self::$task(teacher)) => task.places_in(teacher).map(drop),)+
                    _ => bail_unusable!("it is a {} model, and this is {}", teacher.name(), self.name()),
                }
            }

            /// See [`Objective::said`].
            pub fn said(&self, outputs: &Outputs, example: &Example) -> Result<Vec<f32>> {
                match (self, &example.target) {
                    $((Self::$task(task), Target::$task(target)) => task.said(outputs, target),)+
                    _ => anyhow::bail!("an example of another task than {}", self.name()),
                }
            }

            /// See [`Objective::teach`]; `heard` are the teacher's examples, and `said` is what it has said of each.
            pub fn teach(
                &self,
                examples: &mut [Example],
                teacher: &Self,
                heard: &[Example],
                said: &[Vec<f32>],
            ) -> Result<usize> {
                match (self, teacher) {
                    $((Self::$task(task), Self::$task(teacher)) => {
                        let targets = examples.iter_mut().map(|example| match &mut example.target {
                            Target::$task(target) => Ok(target),
                            _ => anyhow::bail!("an example of another task than {}", $task::NAME),
                        });
                        let heard = own::<$task>(heard)?.into_iter().zip(said);
                        let said: Vec<_> = heard.map(|((_, target), said)| (target, &said[..])).collect();
                        task.teach(targets.collect::<Result<_>>()?, teacher, &said)
                    })+
                    _ => anyhow::bail!("a teacher for another task than {}", self.name()),
                }
            }

            /// See [`Objective::drawn`].
            pub fn drawn(&self, example: &Example, key: u64) -> Result<Option<Example>> {
                match self {
                    $(Self::$task(task) => {
                        let Target::$task(target) = &example.target else {
                            anyhow::bail!("an example of another task than {}", $task::NAME)
                        };
                        let example = Example { encoding: example.encoding.clone(), target: target.clone() };
                        let drawn = task.drawn(&example, key)?;
                        Ok(drawn.map(|drawn| Example {
                            encoding: drawn.encoding,
                            target: Target::$task(drawn.target),
                        }))
                    })+
                }
            }

            /// See [`Objective::loss`].
            pub fn loss(
                &self,
                eager: &Eager,
                outputs: Vec<X>,
                examples: &[&Example],
                label_smoothing: f64,
                of: &[f64],
            ) -> Result<Vec<Tensor>> {
                match self {
                    $(Self::$task(task) => task.loss(eager, outputs, &own::<$task>(examples)?, label_smoothing, of)),+
                }
            }

            /// See [`Objective::measure`].
            pub fn measure(&self, model: &Forward, examples: &[Example]) -> Result<Measured> {
                match self {
                    $(Self::$task(task) => task.measure(model, &own::<$task>(examples)?)),+
                }
            }

            /// See [`Objective::review`].
            pub fn review(
                &self,
                model: &Forward,
                examples: &[Example],
                of: Source,
            ) -> Result<(Measured, Review)> {
                match self {
                    $(Self::$task(task) => task.review(model, &own::<$task>(examples)?, of)),+
                }
            }

            /// See [`Objective::kept`].
            pub fn kept(&self, outputs: Vec<Outputs>, examples: &[Example]) -> Result<Vec<Outputs>> {
                match self {
                    $(Self::$task(task) => {
                        let targets = own::<$task>(examples)?.into_iter().map(|(_, target)| target);
                        let targets = targets.flat_map(|target| {
                            std::iter::repeat_n(target, 1 + $task::others(target).len())
                        });
                        outputs.into_iter().zip(targets).map(|(outputs, target)| task.kept(outputs, target)).collect()
                    })+
                }
            }

            /// See [`Objective::measure_outputs`].
            pub fn measure_outputs(&self, outputs: &[Outputs], examples: &[Example]) -> Result<Measured> {
                let due = examples.iter().flat_map(Example::encodings).count();
                anyhow::ensure!(outputs.len() == due, "{} outputs for {due} examples", outputs.len());
                match self {
                    $(Self::$task(task) => {
                        task.measure_examples(outputs, &own::<$task>(examples)?)
                    })+
                }
            }

            /// See [`Objective::agreement`].
            pub fn agreement(&self, wanted: &Outputs, found: &Outputs) -> f64 {
                match self { $(Self::$task(task) => task.agreement(wanted, found)),+ }
            }

            /// See [`Objective::measure_in_place`].
            pub fn measure_in_place(&self, slots: &mut Slots, examples: &[Example]) -> Result<Measured> {
                match self {
                    $(Self::$task(task) => task.measure_in_place(slots, &own::<$task>(examples)?)),+
                }
            }

            /// See [`Objective::tuned`].
            pub fn tuned(&self, best: &Measured) -> Option<Self> {
                match self { $(Self::$task(task) => task.tuned(best).map(Self::$task)),+ }
            }

            /// See [`Objective::tuning_told`].
            pub fn tuning_told(&self, best: &Measured) -> Option<String> {
                match self { $(Self::$task(task) => task.tuning_told(best)),+ }
            }

            /// See [`Objective::check_room`].
            pub fn check_room(&self, asking: &Asking) -> Result<()> {
                match self { $(Self::$task(task) => task.check_room(asking)),+ }
            }

            /// See [`Objective::columns`].
            pub fn columns(&self, flags: &AnswerFlags) -> Columns {
                match self { $(Self::$task(_) => $task::columns(flags)),+ }
            }

            /// See [`Objective::row_width`].
            pub fn row_width(&self, flags: &AnswerFlags) -> Option<usize> {
                match self { $(Self::$task(task) => task.row_width(flags)),+ }
            }

            /// See [`Objective::ask`].
            pub fn ask(&self, row: &Row, asking: &Asking) -> Result<(Vec<Encoding>, Question), BadRow> {
                match self {
                    $(Self::$task(task) => {
                        let (windows, question) = task.ask(row, asking)?;
                        Ok((windows, Question::$task(question)))
                    })+
                }
            }

            /// See [`Objective::answer`].
            pub fn answer(
                &self,
                question: &Question,
                outputs: &[Outputs],
                asking: &Asking,
            ) -> Result<Answer> {
                match (self, question) {
                    $((Self::$task(task), Question::$task(question)) => task.answer(question, outputs, asking),)+
                    _ => anyhow::bail!("a question of another task than {}", self.name()),
                }
            }
        }
    };
}

tasks!(
    TextClassification in text_classification,
    TokenClassification in token_classification,
    QuestionAnswering in question_answering,
    MaskedLm in masked_lm,
    NextSentence in next_sentence,
    PreTraining in pre_training,
    CausalLm in causal_lm,
    Embedding in embedding,
);

/// A task's examples as those of any task.
fn listed<T>(examples: Vec<Example<T>>, target: fn(T) -> Target) -> Vec<Example> {
    let listed = |Example { encoding, target: own }| Example { encoding, target: target(own) };
    examples.into_iter().map(listed).collect()
}

/// Tells a task's targets from others'.
trait Own: Objective {
    fn own(target: &Target) -> Option<&Self::Target>;
}

/// Examples as their own task has them.
///
/// # Errors
/// One is another task's.
fn own<'e, T: Own>(
    examples: impl IntoIterator<Item = &'e (impl Borrow<Example> + 'e)>,
) -> Result<Vec<(&'e Encoding, &'e T::Target)>> {
    let own = |example: &'e Example| {
        let target = T::own(&example.target)
            .with_context(|| format!("an example of another task than {}", T::NAME))?;
        Ok((&example.encoding, target))
    };
    examples.into_iter().map(|example| own(example.borrow())).collect()
}

impl Task {
    /// Examples as one packed batch, which asks for the tokens that their losses look at.
    pub fn packed(examples: &[&Example]) -> PackedBatch {
        let batch = PackedBatch::new(examples.iter().flat_map(|example| example.encodings()));
        let places = examples.iter().flat_map(|example| {
            let others = example.target.others().iter().map(|_| None);
            std::iter::once(example.target.asked()).chain(others)
        });
        let places: Vec<_> = places.collect();
        if places.iter().all(Option::is_none) { batch } else { batch.asking(&places) }
    }

    /// The parameters of the model with the task's head.
    pub fn params(&self, family: &Family) -> Result<Vec<Param>> {
        manifest::manifest(|o| self.define(o, family).map(drop))
    }

    /// The same, all of which must be among the weights.
    ///
    /// # Errors
    /// Unusable: names those that the checkpoint lacks.
    pub fn trained_params(&self, family: &Family, weights: &Weights) -> Result<Vec<Param>> {
        let params = self.params(family)?;
        let fit = weights.fit(&params)?;
        if !fit.new.is_empty() {
            bail_unusable!(
                "the checkpoint lacks {}: it is not trained for {}; fine-tune it with `tk train`",
                fit.new.join(", "),
                self.name()
            );
        }
        Ok(params)
    }

    /// How many numbers a graph of the task gives for a token.
    pub fn numbers_of_token(&self) -> usize {
        let outputs = self.outputs(self.form()).into_iter().filter(|output| output.scope() == Scope::Token);
        outputs.map(|output| output.width()).sum()
    }

    /// What the rows of each output stand for.
    pub fn scopes(&self) -> Vec<Scope> {
        self.outputs(self.form()).iter().map(Output::scope).collect()
    }

    /// The language model that a command which generates works with.
    ///
    /// # Errors
    /// Unusable: names the command and the task.
    pub fn generating(&self, command: &str) -> Result<&CausalLm> {
        self.language_model().ok_or_else(|| {
            unusable!("tk {command} works with {}; this is a {} model", CausalLm::NAME, self.name())
        })
    }

    /// The metric that decides which evaluation is the best: the asked one, or the task's own.
    ///
    /// # Errors
    /// Unusable: the task has no such metric.
    pub fn deciding_metric(&self, asked: Option<&str>) -> Result<Metric> {
        let others = self.metrics().iter().copied().filter(|metric| *metric != Metric::LOSS);
        let mut all = self.metrics().iter().copied().chain([Metric::LOSS]);
        let found = match asked {
            None => all.next(),
            Some(name) => all.find(|metric| metric.name == name),
        };
        found.ok_or_else(|| {
            let known: Vec<&str> = ["loss"].into_iter().chain(others.map(|metric| metric.name)).collect();
            let asked = asked.unwrap_or_default();
            let meant = nearest(asked, &known).map(|near| format!("; did you mean \"{near}\"?"));
            let meant = meant.unwrap_or_default();
            unusable!("--best-metric {asked}: {} has {}{meant}", self.name(), known.join(", "))
        })
    }
}
