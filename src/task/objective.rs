//! What a task is: all that is particular to one kind of work stands in one module, which implements [`Objective`];
//! [`super::Task`] is the one list of them. On its way from a file to an answer, a record is
//!
//! ```text
//! row ─read─▶ record ─encode─▶ examples (one, or several windows, each with its target)
//!     ─drawn(key)─▶ what a step learns of them (masked-lm masks other tokens each time)
//!     ─define(head)─▶ outputs, a row a sequence or a row a token
//!     ├─loss─▶ training   ├─measure─▶ metrics   └─answer─▶ the JSON that users read
//! ```

use std::path::Path;

use anyhow::Context;
use candle_core::Tensor;
use serde_json::Value;

use super::review::{Review, Source};
use super::{
    Answer, AnswerFlags, Beside, CausalLm, Distillation, Example, Look, Measured, Metric, Output, Outputs,
    RecordFlags, Task, TrainingFlags, scores,
};
use crate::data::batch::Encoding;
use crate::data::cache::Cache;
use crate::data::records::{BadRow, Columns, Files, How, Row};
use crate::data::tokens::Tokenizer;
use crate::eager::{Eager, Forward, X};
use crate::model::ops::Ops;
use crate::model::{Family, Head, ModelConfig, token_ids};
use crate::runtime::Slots;
use crate::say::Say;
use crate::{Result, bail_unusable};

/// Whether a graph goes on from tokens that it has read before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// It reads whole sequences.
    Whole,
    /// Keys and values of earlier tokens come in as `past_key_values.{layer}.key` and `.value`, and those of all go
    /// out as `present.{layer}.key` and `.value`, (B, H, T, D) each; positions are an input. What Optimum calls
    /// `text-generation-with-past`.
    Cached,
    /// Keys and values stand in buffers of a capacity that is not yet used up, (B, H, capacity, D): new ones are
    /// written into them in place, each row at its own length, and the same buffers go in as `past_key_values…` and
    /// out as `present…`. Scores are given for the tokens at the columns `logits_at` alone. ONNX Runtime's own
    /// operators; what tk generates with.
    InPlace,
}

/// What a run of training starts from.
pub struct Start<'a> {
    /// The directory of the model.
    pub model: &'a Path,
    /// What it says; a task that trains a tokenizer changes the vocabulary.
    pub config: ModelConfig,
    /// Whether all weights are drawn anew.
    pub from_scratch: bool,
    /// The records to learn from.
    pub train: &'a Files,
    pub records: &'a RecordFlags,
    pub training: &'a TrainingFlags,
    pub max_length: usize,
    /// Where tokens are kept for other runs.
    pub cache: Option<&'a Cache>,
    pub say: &'a Say,
}

impl Start<'_> {
    /// The model's tokenizer.
    ///
    /// # Errors
    /// Unusable: it can't be read, or does not fit the model.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        self.checked(Tokenizer::open(self.model)?)
    }

    /// Holds a tokenizer and the configuration's token ids against the vocabulary.
    ///
    /// # Errors
    /// Unusable: one of them has tokens that the model has not.
    pub fn checked(&self, mut tokenizer: Tokenizer) -> Result<Tokenizer> {
        tokenizer.check_fits(self.config.vocab_size(), self.config.token_types())?;
        token_ids::check(&self.config.raw, self.config.vocab_size())
            .map_err(|error| self.in_config(error))?;
        Ok(tokenizer.cached_in(self.cache))
    }

    /// The model's tokenizer; of a model that is drawn anew and has none, one that learns its vocabulary from the texts,
    /// which becomes the model's. Returns whether it did.
    ///
    /// # Errors
    /// Unusable: as [`Start::tokenizer`], or a `vocab_size` that is too small.
    pub fn tokenizer_of(&mut self, texts: &[&str]) -> Result<(Tokenizer, bool)> {
        if !self.from_scratch || Tokenizer::is_in(self.model) {
            return Ok((self.tokenizer()?, false));
        }
        let kind = self.config.family.vocabulary();
        let tokenizer = Tokenizer::train(kind, texts, self.config.vocab_size())?;
        self.config.set_vocabulary(tokenizer.vocab_size(), kind.ids())?;
        let size = indicatif::HumanCount(tokenizer.vocab_size() as u64);
        self.say.line(format!("trained a tokenizer of {size} tokens on the texts"));
        Ok((self.checked(tokenizer)?, true))
    }

    /// Says of an error that it is about the model's configuration.
    pub fn in_config(&self, error: anyhow::Error) -> anyhow::Error {
        error.context(self.model.join("config.json").display().to_string())
    }
}

/// What is to be learnt, and the examples for it.
pub struct Learning<T, G> {
    pub task: T,
    pub tokenizer: Tokenizer,
    pub examples: Vec<Example<G>>,
    /// Files of the trained model that the task writes, of those in [`Objective::FILES`].
    pub files: Vec<(&'static str, String)>,
}

/// How records become examples to measure on.
#[derive(Clone, Copy)]
pub struct Encoder<'a> {
    pub records: &'a RecordFlags,
    pub training: &'a TrainingFlags,
    pub tokenizer: &'a Tokenizer,
    pub max_length: usize,
}

/// How records become questions.
pub struct Asking {
    pub columns: Columns,
    pub tokenizer: Tokenizer,
    pub max_length: usize,
    pub flags: AnswerFlags,
}

/// One kind of work: its records, head, loss, outputs, metrics and answers.
pub trait Objective: Clone + Into<Task> {
    /// As `--task` takes it.
    const NAME: &'static str;
    /// The head that it asks a family for, of any size: by it a saved model's task is known.
    const HEAD: Head;
    /// The file of a directory that says it is this task's, whatever class of `transformers` it was saved from.
    const MARK: Option<&'static str> = None;
    /// What the Hugging Face hub calls it, and `transformers`' pipeline, where they have it.
    const PIPELINE_TAG: Option<&'static str> = None;
    /// How many of a graph's outputs are for other programs: those in front of what answers and metrics are made of.
    const AHEAD: usize = 0;
    /// The texts, of those that [`super::TextColumns`] maps, that its records to learn from have.
    const TEXTS_LEARNT: &'static [&'static str];
    /// The same of records to answer.
    const TEXTS_ASKED: &'static [&'static str];
    /// The fields of a record to answer.
    const FIELDS_ASKED: &'static [&'static str] = Self::TEXTS_ASKED;
    /// The fields that an answer may have.
    const FIELDS_ANSWERED: &'static [&'static str];
    /// The flags of records, of training and of answers that it takes, of those that several tasks share.
    const RECORD_FLAGS: &'static [&'static str] = &[];
    const TRAINING_FLAGS: &'static [&'static str] = &[];
    const ANSWER_FLAGS: &'static [&'static str] = &[];
    /// What its losses are called in a run's log, where there are several: they are added up.
    const LOSSES: &'static [&'static str] = &["loss"];
    /// Files of a model's directory, beside configuration, weights and tokenizer, that it reads and writes.
    const FILES: &'static [&'static str] = &[];

    /// What an example ought to give.
    type Target: Clone + std::fmt::Debug + PartialEq;
    /// What is kept of a record until its windows are computed.
    type Question: Send;

    /// Reads what a trained model's `config.json` says of the task.
    ///
    /// # Errors
    /// Unusable: it is inconsistent.
    fn from_config(config: &ModelConfig) -> Result<Self>;

    /// Reads what a trained model's directory says of the task: its `config.json`, and files of its own.
    ///
    /// # Errors
    /// Unusable: they are inconsistent.
    fn open(dir: &Path, config: &ModelConfig) -> Result<Self> {
        Self::from_config(config).with_context(|| dir.join("config.json").display().to_string())
    }

    /// Writes what the task knows into a configuration that is about to be saved.
    fn write_config(&self, config: &mut ModelConfig);

    /// Refuses flags that say nothing of any of these files.
    ///
    /// # Errors
    /// Unusable: names the flag.
    fn check_files(_flags: &RecordFlags, _files: &[&Path]) -> Result<()> {
        Ok(())
    }

    /// How records to learn from stand in a file, and under which columns.
    fn reading(flags: &RecordFlags) -> (How, Columns);

    /// Reads the records to learn from, and finds out what is to be learnt.
    ///
    /// # Errors
    /// Unusable: records that can't be learnt from, with file and line.
    fn learn(start: &mut Start) -> Result<Learning<Self, Self::Target>>;

    /// Reads records to measure on.
    ///
    /// # Errors
    /// Unusable: records that the model can't be measured on, with file and line.
    fn examples(&self, files: &Files, encoder: &Encoder) -> Result<Vec<Example<Self::Target>>>;

    /// Reads more records to learn from, now that the task is found.
    ///
    /// # Errors
    /// Unusable: as [`Objective::learn`], and records that others than the first were needed to know of.
    fn learnt(&self, files: &Files, encoder: &Encoder) -> Result<Vec<Example<Self::Target>>> {
        self.examples(files, encoder)
    }

    /// Reads the same without making anything of them, and refuses what [`Objective::learnt`] would refuse.
    ///
    /// # Errors
    /// As [`Objective::learnt`], as far as records are read.
    fn check_learnt(&self, files: &Files, flags: &RecordFlags) -> Result<()> {
        self.look(files, flags).map(drop)
    }

    /// Reads records to learn from, or to measure on, as they are.
    ///
    /// # Errors
    /// Unusable: as [`Objective::learn`], as far as records are read.
    fn look(&self, files: &Files, flags: &RecordFlags) -> Result<Vec<Look>>;

    /// The field of a record that may be its class. See [`Objective::classes`].
    const CLASS: Option<&'static str> = None;

    /// The class of each record, of what stands in [`Objective::CLASS`], where every record has one: a part that is drawn
    /// of them keeps the classes' shares.
    fn classes(_labels: &[&Value], _flags: &TrainingFlags) -> Option<Vec<String>> {
        None
    }

    /// The flag that asks for records to measure on, if one does.
    fn needs_eval(_flags: &TrainingFlags) -> Option<&'static str> {
        None
    }

    /// Whether every record has one of the labels.
    fn has_one_label(&self) -> bool {
        false
    }

    /// What an example's tokens ought to give.
    fn beside(&self, target: &Self::Target, tokenizer: &Tokenizer) -> Beside;

    /// What is told of the task before the first step.
    fn summary(&self) -> Option<String> {
        None
    }

    /// Whether `--label-smoothing` means something.
    fn smooths_labels(&self) -> bool {
        true
    }

    /// Whether the last map of a head that was trained as `base` means the same here: it is kept then.
    fn keeps(&self, base: &Self) -> bool {
        self.head() == base.head()
    }

    /// The sequences of an example behind its first one: each has outputs of its own, and all stand in one batch.
    fn others(_target: &Self::Target) -> &[Encoding] {
        &[]
    }

    /// The same as this run learns: a teacher's loss is one of its own.
    fn loss_names(&self) -> &'static [&'static str] {
        Self::LOSSES
    }

    /// How it learns from a teacher, if it has one.
    fn distillation(&self) -> Option<Distillation> {
        None
    }

    /// Where each of its labels stands among a teacher's.
    ///
    /// # Errors
    /// Unusable: they are other labels, or the teacher's numbers mean something else.
    fn places_in(&self, _teacher: &Self) -> Result<Vec<usize>> {
        bail_unusable!("a {} model learns from no teacher", Self::NAME)
    }

    /// What students learn of an example's outputs where this model is their teacher: a row of numbers for each of the
    /// target's [losses](Objective::losses).
    ///
    /// # Errors
    /// They are not those of the target.
    fn said(&self, _outputs: &Outputs, _target: &Self::Target) -> Result<Vec<f32>> {
        bail_unusable!("a {} model teaches nothing", Self::NAME)
    }

    /// Puts beside targets what a teacher has [said](Objective::said) of the same records, each beside the teacher's own
    /// target. Returns how many losses it has said nothing of.
    ///
    /// # Errors
    /// As [`Objective::places_in`]; or it is what was said of other records.
    fn teach(
        &self,
        _targets: Vec<&mut Self::Target>,
        _teacher: &Self,
        _said: &[(&Self::Target, &[f32])],
    ) -> Result<usize> {
        bail_unusable!("a {} model learns from no teacher", Self::NAME)
    }

    /// How many losses of each of [`Objective::LOSSES`] a target has: a step's loss is their mean.
    fn losses(_target: &Self::Target) -> Vec<usize> {
        vec![1]
    }

    /// How much a target's losses count together, of each of [`Objective::loss_names`], in the loss that is learnt: how many
    /// they are, where each counts alike.
    fn weights(&self, target: &Self::Target) -> Vec<f64> {
        Self::losses(target).into_iter().map(|count| count as f64).collect()
    }

    /// The weights of labels with which it learns, where they are not all 1.
    fn class_weights(&self) -> Vec<(&str, f32)> {
        Vec::new()
    }

    /// The example as a step with this key learns it, where it is another one at every step.
    ///
    /// # Errors
    /// As of making an example.
    fn drawn(&self, _example: &Example<Self::Target>, _key: u64) -> Result<Option<Example<Self::Target>>> {
        Ok(None)
    }

    /// The places of the tokens that the loss asks for, in order, where these are not all. The outputs then have a row
    /// for each of them, and one for the first token.
    fn asked(_target: &Self::Target) -> Option<Vec<usize>> {
        None
    }

    /// Where a batch's loss is computed of all its outputs before a gradient is: the examples whose activations are held
    /// at a time. No output is an [`X`] that is not computed yet then.
    fn chunk(&self) -> Option<usize> {
        None
    }

    /// The longest sequence that the model was trained with, where the task's files say so.
    fn max_length(&self) -> Option<usize> {
        None
    }

    /// The head, with its size.
    fn head(&self) -> Head;

    /// The model with the task's head: the graph's outputs, in the order of [`Objective::outputs`].
    ///
    /// # Errors
    /// The family has no such head.
    fn define<O: Ops>(&self, o: &O, family: &Family) -> Result<Vec<O::X>> {
        family.define(o, self.head())
    }

    /// The same for the last token of every sequence alone: what a graph that generates computes.
    ///
    /// # Errors
    /// Unusable: the task's model generates nothing.
    fn generate<O: Ops>(&self, _o: &O, _family: &Family) -> Result<Vec<O::X>> {
        bail_unusable!("a {} model generates no text", Self::NAME)
    }

    /// The language model, of a task that answers by generating.
    fn language_model(&self) -> Option<&CausalLm> {
        None
    }

    /// What a graph of the task takes and gives beside its tokens.
    fn form(&self) -> Form {
        Form::Whole
    }

    /// The outputs of a graph of this form.
    fn outputs(&self, form: Form) -> Vec<Output>;

    /// For each of [`Objective::loss_names`] the sum of the examples' losses over the outputs of [`Objective::define`],
    /// divided by the number that `of` has for it, the sum of the whole step's [weights](Objective::weights); gradients flow back through them. The examples are those of the batch.
    ///
    /// # Errors
    /// The outputs do not fit the targets.
    fn loss(
        &self,
        eager: &Eager,
        outputs: Vec<X>,
        examples: &[(&Encoding, &Self::Target)],
        label_smoothing: f64,
        of: &[f64],
    ) -> Result<Vec<Tensor>>;

    /// The metrics, beside the loss; the first says which evaluation is the best, where nobody asks for another.
    fn metrics(&self) -> &'static [Metric];

    /// The metrics and the mean loss of what a model computes in candle.
    fn measure(&self, model: &Forward, examples: &[(&Encoding, &Self::Target)]) -> Result<Measured> {
        let (encodings, targets): (Vec<_>, Vec<_>) = examples.iter().copied().unzip();
        self.measure_outputs(&model.outputs(&encodings)?, &targets)
    }

    /// The same, and what there is to see of the predictions beside metrics.
    ///
    /// # Errors
    /// The records can't be read again.
    fn review(
        &self,
        model: &Forward,
        examples: &[(&Encoding, &Self::Target)],
        _of: Source,
    ) -> Result<(Measured, Review)> {
        Ok((self.measure(model, examples)?, Review::default()))
    }

    /// What of an example's outputs has to be kept until those of all are there: the outputs themselves, where they are
    /// few.
    ///
    /// # Errors
    /// They are not those of the target.
    fn kept(&self, outputs: Outputs, _target: &Self::Target) -> Result<Outputs> {
        Ok(outputs)
    }

    /// The metrics and the mean loss of what is [kept](Objective::kept) of outputs, whatever has computed them.
    ///
    /// # Errors
    /// They are not those of the targets; or the task's outputs are too many to be held.
    fn measure_outputs(&self, outputs: &[Outputs], targets: &[&Self::Target]) -> Result<Measured>;

    /// The same of a task that looks at what the outputs are of, too.
    fn measure_examples(
        &self,
        outputs: &[Outputs],
        examples: &[(&Encoding, &Self::Target)],
    ) -> Result<Measured> {
        let targets: Vec<_> = examples.iter().map(|(_, target)| *target).collect();
        self.measure_outputs(outputs, &targets)
    }

    /// How far two runtimes' outputs of a sequence say the same, from 0 to 1: the share of rows whose largest number stands
    /// in the same place; of a number a token, the share of the outputs where it stands at the same token.
    fn agreement(&self, wanted: &Outputs, found: &Outputs) -> f64 {
        scores::agreement(wanted, found)
    }

    /// The same of a language model's graph that generates, which gives the scores of few tokens at once.
    ///
    /// # Errors
    /// Unusable: the task's model generates nothing. As [`Slots::read`].
    fn measure_in_place(&self, _: &mut Slots, _: &[(&Encoding, &Self::Target)]) -> Result<Measured> {
        bail_unusable!("a {} model generates no text", Self::NAME)
    }

    /// The task as it is kept with the weights of its best evaluation, where something of it was found there.
    fn tuned(&self, _best: &Measured) -> Option<Self> {
        None
    }

    /// What is told of what was found in the best evaluation.
    fn tuning_told(&self, _best: &Measured) -> Option<String> {
        None
    }

    /// The columns of a record to answer.
    fn columns(flags: &AnswerFlags) -> Columns;

    /// How many numbers the row has that answers a text, where answers make a matrix.
    fn row_width(&self, _flags: &AnswerFlags) -> Option<usize> {
        None
    }

    /// Refuses a length that leaves no room for a text between the tokens that stand around it.
    ///
    /// # Errors
    /// Unusable: says how many tokens these are.
    fn check_room(&self, asking: &Asking) -> Result<()> {
        asking.tokenizer.encode("", None, asking.max_length).map(drop)
    }

    /// Makes of a record the windows that the model is asked with.
    ///
    /// # Errors
    /// The record lacks something, or has what can't be tokenized.
    fn ask(&self, row: &Row, asking: &Asking) -> Result<(Vec<Encoding>, Self::Question), BadRow>;

    /// The answer to a record as its fields, from the outputs of its windows.
    ///
    /// # Errors
    /// The outputs are not those of the windows: then no record can be answered. The inner error is the record's.
    fn answer(&self, question: &Self::Question, outputs: &[Outputs], asking: &Asking) -> Result<Answer>;
}
