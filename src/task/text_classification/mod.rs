//! Text classification: one text or a pair → one label, several labels, or a number.

mod labels;
pub(super) mod metrics;
mod reviewed;
#[cfg(test)]
mod tests;
mod tuning;
mod windows;

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Context;
use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

pub use self::tuning::Tuning;
pub use self::windows::{Aggregation, Window, WindowFlags};
use super::distillation;
use super::flags::{LABEL_FLAGS, refuse_records};
use super::id2label::{self, default_names};
use super::review::{Review, Source};
use super::scores::{argmax, short};
use super::weighting::{self, Weighting, softplus};
use super::{
    Answer, Asking, Beside, Dim, Distillation, Encoder, Example, Form, Learning, Look, Measured, Metric,
    Metrics, Objective, Output, Outputs, Start, TextColumns,
};
use crate::data::batch::Encoding;
use crate::data::cache::Key;
use crate::data::records::{self, BadRow, Columns, Files, How, Place, Row};
use crate::data::tokens::Tokenizer;
use crate::eager::{Eager, Forward, X, tensors};
use crate::model::{Head, ModelConfig};
use crate::{Result, bail_unusable, unusable};

/// The labels and what a text may have of them.
#[derive(Clone, Debug, PartialEq)]
pub struct TextClassification {
    pub problem: ProblemType,
    /// In the order of `id2label`; one, for a regression.
    pub labels: Vec<String>,
    /// What becomes of a text that is longer than the model.
    pub aggregation: Aggregation,
    /// How much examples count in the loss that is learnt.
    pub weighting: Weighting,
    /// How it learns from a teacher, if it has one.
    pub distillation: Option<Distillation>,
    /// What was found on evaluation data.
    pub tuning: Tuning,
}

/// The key of config.json that keeps it.
const AGGREGATION: &str = "window_aggregation";

/// What a text ought to be labelled with.
#[derive(Clone, Debug, PartialEq)]
pub enum Wanted {
    Class(u32),
    /// Label ids, ascending.
    Classes(Vec<u32>),
    Number(f32),
}

/// Flags of labelled texts.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
#[group(skip)]
#[serde(rename_all = "kebab-case", default)]
pub struct RecordFlags {
    /// The column of the label [default: label].
    #[arg(long, value_name = "NAME", help_heading = "Records")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label_column: Option<String>,
    #[command(flatten)]
    #[serde(flatten)]
    pub windows: WindowFlags,
}

/// Flags of training.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
#[group(skip)]
#[serde(rename_all = "kebab-case", default)]
pub struct TrainingFlags {
    /// For text-classification, what kind of label is learnt [default: found in the training data].
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem_type: Option<ProblemType>,
    /// Where a text may have several labels, find for each the probability above which it is said, by its F1 on the --eval
    /// records, instead of 0.5. They are kept in config.json, and evaluations are measured with them.
    #[arg(long, help_heading = "Evaluation and checkpoints")]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub tune_thresholds: bool,
    /// Where a text has one label, find the temperature with which the scores are as sure as they are right, on the --eval
    /// records. It is kept in config.json and divides the logits where they become scores; they themselves, the labels and
    /// the loss stay as they are.
    #[arg(long, help_heading = "Evaluation and checkpoints")]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub calibrate: bool,
}

/// Flags of answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::Args, Serialize)]
#[group(skip)]
#[serde(rename_all = "kebab-case")]
pub struct AnswerFlags {
    /// For text-classification, write the logits too, in the order of id2label.
    #[arg(long)]
    pub logits: bool,
    #[command(flatten)]
    #[serde(flatten)]
    pub windows: WindowFlags,
}

/// A record before the labels are known: its place, its texts, its label.
struct Labelled {
    place: Place,
    text: String,
    pair: Option<String>,
    label: Value,
}

/// transformers' `problem_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[value(rename_all = "snake_case")]
#[serde(rename_all = "snake_case")]
pub enum ProblemType {
    /// Exactly one of the labels: softmax, cross-entropy.
    SingleLabelClassification,
    /// Any number of the labels: a sigmoid each, binary cross-entropy.
    MultiLabelClassification,
    /// A number: mean squared error.
    Regression,
}

impl ProblemType {
    fn name(self) -> &'static str {
        match self {
            Self::SingleLabelClassification => "single_label_classification",
            Self::MultiLabelClassification => "multi_label_classification",
            Self::Regression => "regression",
        }
    }
}

/// The largest `num_labels` that is believed.
const MOST_LABELS: u64 = 1 << 24;

impl Objective for TextClassification {
    const NAME: &'static str = "text-classification";
    const PIPELINE_TAG: Option<&'static str> = Some(Self::NAME);
    const HEAD: Head = Head::SequenceClassification { labels: 0 };
    const TEXTS_LEARNT: &'static [&'static str] = &["text", "text_pair"];
    const TEXTS_ASKED: &'static [&'static str] = Self::TEXTS_LEARNT;
    const TRAINING_FLAGS: &'static [&'static str] = LABEL_FLAGS;
    const FIELDS_ANSWERED: &'static [&'static str] = &["label", "labels", "score", "scores", "logits"];

    type Target = Window;
    /// The windows are all.
    type Question = ();

    /// Reads `problem_type` and `id2label` of a fine-tuned model. As in transformers, one label without a
    /// `problem_type` is a regression, and labels without names are `LABEL_0`, `LABEL_1` ….
    fn from_config(config: &ModelConfig) -> Result<Self> {
        let labels = match id2label::read(config)? {
            Some(labels) => labels,
            None => {
                let n = config.raw.get("num_labels").and_then(Value::as_u64).unwrap_or(2);
                if n > MOST_LABELS {
                    bail_unusable!("num_labels is {n}; up to {MOST_LABELS} were expected");
                }
                default_names(n as usize)
            }
        };
        let problem = match config.raw.get("problem_type").and_then(Value::as_str) {
            Some("single_label_classification") => ProblemType::SingleLabelClassification,
            Some("multi_label_classification") => ProblemType::MultiLabelClassification,
            Some("regression") => ProblemType::Regression,
            Some(other) => bail_unusable!(
                "problem_type is \"{other}\", expected single_label_classification, \
                 multi_label_classification or regression"
            ),
            None if labels.len() == 1 => ProblemType::Regression,
            None => ProblemType::SingleLabelClassification,
        };
        if problem == ProblemType::Regression && labels.len() != 1 {
            bail_unusable!("a regression has one label, id2label has {}", labels.len());
        }
        let aggregation = match config.raw.get(AGGREGATION) {
            None | Some(Value::Null) => Aggregation::First,
            Some(value) => serde_json::from_value(value.clone())
                .map_err(|_| unusable!("{AGGREGATION} is {value}, expected first, mean or max"))?,
        };
        let tuning = Tuning::from_config(&config.raw, problem, &labels)?;
        Ok(Self { aggregation, tuning, ..Self::new(problem, labels) })
    }

    fn write_config(&self, config: &mut ModelConfig) {
        id2label::write(config, self.head(), &self.labels);
        let pads_with_the_end = config.family.pads_with_the_end();
        let raw = &mut config.raw;
        raw.insert("problem_type".to_owned(), json!(self.problem.name()));
        raw.remove(AGGREGATION);
        self.tuning.write(raw, &self.labels);
        if self.aggregation != Aggregation::First {
            raw.insert(AGGREGATION.to_owned(), json!(self.aggregation));
        }
        if pads_with_the_end && raw.get("pad_token_id").is_none_or(Value::is_null) {
            // transformers finds the last token of a padded row by it
            let end = raw.get("eos_token_id").cloned().unwrap_or_else(|| json!(50_256));
            let end = end.get(0).cloned().unwrap_or(end); // the first of a list
            raw.insert("pad_token_id".to_owned(), end);
        }
    }

    fn reading(flags: &super::RecordFlags) -> (How, Columns) {
        let label = flags.text_classification.label_column.clone();
        (flags.reading.how(), flags.texts.columns().with("label", label))
    }

    fn learn(start: &mut Start) -> Result<Learning<Self, Window>> {
        let tokenizer = start.tokenizer()?;
        let records = read(start.train, start.records)?;
        let known = Self::known(&start.config).context("config.json of the model to start from")?;
        let labels: Vec<&Value> = records.iter().map(|record| &record.label).collect();
        let problem = start.training.text_classification.problem_type;
        let wrong = Self::unfit(&labels, problem).into_iter();
        refuse_records(
            start.train,
            WRONG_LABELS,
            wrong.map(|(i, error)| (records[i].place, error.to_string())),
        )?;
        let task = Self::from_labels(&labels, problem, known).with_context(|| start.train.to_string())?;
        let asked = start.records.text_classification.windows.window_aggregation;
        let tuning = Tuning::asked(&start.training.text_classification, task.problem)?;
        let distillation = task.distillation_of(start)?;
        let task = Self { aggregation: asked.unwrap_or_default(), distillation, tuning, ..task };
        let examples = task.encode(&records, start.train, &tokenizer, start.max_length, task.aggregation)?;
        let task = Self { weighting: task.weighting_of(start, &examples)?, ..task };
        Ok(Learning { task, tokenizer, examples, files: Vec::new() })
    }

    fn examples(&self, files: &Files, encoder: &Encoder) -> Result<Vec<Example<Window>>> {
        let Encoder { records, tokenizer, max_length, .. } = *encoder;
        let asked = records.text_classification.windows.window_aggregation;
        self.encode(&read(files, records)?, files, tokenizer, max_length, asked.unwrap_or(self.aggregation))
    }

    fn check_learnt(&self, files: &Files, flags: &super::RecordFlags) -> Result<()> {
        self.wanted(&read(files, flags)?, files).map(drop)
    }

    fn look(&self, files: &Files, flags: &super::RecordFlags) -> Result<Vec<Look>> {
        let records = read(files, flags)?;
        let labels: Vec<&Value> = records.iter().map(|record| &record.label).collect();
        let targets = self.targets(&labels);
        let look = |(record, target): (Labelled, Result<Wanted>)| {
            let labels = match target? {
                Wanted::Number(_) => Vec::new(),
                wanted => self.names(&wanted),
            };
            Ok(Look { place: record.place, texts: vec![(record.text, record.pair)], labels })
        };
        records.into_iter().zip(targets).map(look).collect()
    }

    const CLASS: Option<&'static str> = Some("label");

    fn classes(labels: &[&Value], flags: &super::TrainingFlags) -> Option<Vec<String>> {
        Self::classes_of(labels, flags.text_classification.problem_type)
    }

    fn needs_eval(flags: &super::TrainingFlags) -> Option<&'static str> {
        let own = &flags.text_classification;
        [("--tune-thresholds", own.tune_thresholds), ("--calibrate", own.calibrate)]
            .into_iter()
            .find_map(|(flag, given)| given.then_some(flag))
    }

    fn has_one_label(&self) -> bool {
        self.problem == ProblemType::SingleLabelClassification
    }

    fn beside(&self, target: &Window, _: &Tokenizer) -> Beside {
        Beside::Example(self.names(&target.wanted).join(", "))
    }

    fn summary(&self) -> Option<String> {
        Some(match self.problem {
            ProblemType::Regression => "the labels are numbers: a regression".to_owned(),
            _ => {
                let weighting = self.weighting.told(&self.labels).map(|told| format!("; {told}"));
                format!("labels: {}{}", id2label::told(&self.labels), weighting.unwrap_or_default())
            }
        })
    }

    fn keeps(&self, base: &Self) -> bool {
        (self.problem, &self.labels) == (base.problem, &base.labels)
    }

    /// One label's share is spread over the others: where there are none, there is nothing to spread.
    fn smooths_labels(&self) -> bool {
        self.problem == ProblemType::SingleLabelClassification
    }

    fn weights(&self, target: &Window) -> Vec<f64> {
        let of_label = match target.wanted {
            Wanted::Class(id) => self.weighting.of(id),
            _ => 1.0,
        };
        // a teacher's rows count alike
        [of_label].into_iter().chain(self.distillation.map(|_| 1.0)).collect()
    }

    fn loss_names(&self) -> &'static [&'static str] {
        if self.distillation.is_some() { Distillation::LOSSES } else { Self::LOSSES }
    }

    fn distillation(&self) -> Option<Distillation> {
        self.distillation
    }

    fn places_in(&self, teacher: &Self) -> Result<Vec<usize>> {
        if self.problem != teacher.problem {
            bail_unusable!(
                "its problem_type is {}, and {} is to be learnt",
                teacher.problem.name(),
                self.problem.name()
            );
        }
        match self.problem {
            ProblemType::Regression => Ok(vec![0]), // a number needs no name
            _ => distillation::places(&self.labels, &teacher.labels),
        }
    }

    fn said(&self, outputs: &Outputs, _: &Window) -> Result<Vec<f32>> {
        self.logits(outputs)
    }

    /// Every window of a text learns what is said of all of it.
    fn teach(&self, targets: Vec<&mut Window>, teacher: &Self, said: &[(&Window, &[f32])]) -> Result<usize> {
        let places = self.places_in(teacher)?;
        let mut texts: BTreeMap<usize, Arc<[f32]>> = BTreeMap::new();
        for own in said.chunk_by(|(a, _), (b, _)| a.text == b.text) {
            let windows: Vec<Vec<f32>> = own.iter().map(|(_, row)| row.to_vec()).collect();
            let Window { text, aggregation, .. } = own[0].0;
            let logits = aggregation.of(&windows);
            anyhow::ensure!(logits.len() == teacher.labels.len(), "a text's logits are not one a label");
            texts.insert(*text, places.iter().map(|&at| logits[at]).collect());
        }
        let mut untaught = 0;
        for target in targets {
            target.taught = texts.get(&target.text).cloned();
            untaught += usize::from(target.taught.is_none());
        }
        Ok(untaught)
    }

    fn class_weights(&self) -> Vec<(&str, f32)> {
        self.weighting.by_label(&self.labels)
    }

    fn head(&self) -> Head {
        Head::SequenceClassification { labels: self.labels.len() }
    }

    fn outputs(&self, _: Form) -> Vec<Output> {
        vec![Output { name: "logits", dims: vec![Dim::Batch, Dim::Of(self.labels.len())] }]
    }

    fn loss(
        &self,
        _: &Eager,
        outputs: Vec<X>,
        examples: &[(&Encoding, &Window)],
        label_smoothing: f64,
        of: &[f64],
    ) -> Result<Vec<Tensor>> {
        let outputs = tensors(outputs)?;
        let logits = outputs.first().context("the model has no output")?;
        let targets: Vec<&Wanted> = examples.iter().map(|(_, target)| &target.wanted).collect();
        let of_labels = || -> Result<Tensor> {
            let sum = match self.weighting.is_plain() {
                true => self.sum_of_losses(logits, &targets, label_smoothing)?,
                false => self.weighted_sum_of_losses(logits, &targets, label_smoothing)?,
            };
            Ok((sum / of[0])?)
        };
        let Some(distillation) = self.distillation else { return Ok(vec![of_labels()?]) };
        let taught: Vec<Option<&[f32]>> =
            examples.iter().map(|(_, target)| target.taught.as_deref()).collect();
        let sum = match self.problem {
            ProblemType::SingleLabelClassification => distillation.of_rows(logits, &taught)?,
            ProblemType::MultiLabelClassification => distillation.of_labels(logits, &taught)?,
            ProblemType::Regression => distillation.of_numbers(logits, &taught)?,
        };
        distillation.terms(of_labels, &(sum / of[1])?)
    }

    fn metrics(&self) -> &'static [Metric] {
        const F1_MACRO: Metric = Metric::rising("f1_macro");
        const ACCURACY: Metric = Metric::rising("accuracy");
        match self.problem {
            ProblemType::SingleLabelClassification => const { &[ACCURACY, F1_MACRO, Metric::falling("ece")] },
            ProblemType::MultiLabelClassification => {
                const { &[Metric::rising("f1_micro"), ACCURACY, F1_MACRO] }
            }
            ProblemType::Regression => {
                const {
                    &[
                        Metric::falling("mse"),
                        Metric::falling("mae"),
                        Metric::rising("pearson"),
                        Metric::rising("spearman"),
                    ]
                }
            }
        }
    }

    /// Of texts, whatever windows they are read in.
    fn measure_outputs(&self, outputs: &[Outputs], targets: &[&Window]) -> Result<Measured> {
        self.measure_texts(&self.texts(outputs, targets)?)
    }

    fn review(
        &self,
        model: &Forward,
        examples: &[(&Encoding, &Window)],
        of: Source,
    ) -> Result<(Measured, Review)> {
        let (encodings, targets): (Vec<_>, Vec<_>) = examples.iter().copied().unzip();
        let outputs = model.outputs(&encodings)?;
        let texts = self.texts(&outputs, &targets)?;
        Ok((self.measure_texts(&texts)?, self.reviewed(&texts, of)?))
    }

    /// Of several labels, the share that both give or both don't; of numbers, how near they are: 1 − |a − b| / max(|a|, 1).
    fn agreement(&self, wanted: &Outputs, found: &Outputs) -> f64 {
        if self.problem == ProblemType::SingleLabelClassification {
            return super::scores::agreement(wanted, found);
        }
        let (Ok(wanted), Ok(found)) = (self.logits(wanted), self.logits(found)) else { return 0.0 };
        let of = |(label, (&a, &b)): (usize, (&f32, &f32))| match self.problem {
            _ if !b.is_finite() => 0.0,
            ProblemType::Regression => (1.0 - f64::from((a - b).abs() / a.abs().max(1.0))).max(0.0),
            _ => f64::from(u8::from(self.tuning.says(label, a) == self.tuning.says(label, b))),
        };
        let pairs = wanted.iter().zip(&found).enumerate().map(of);
        pairs.sum::<f64>() / wanted.len().max(1) as f64
    }

    fn tuned(&self, best: &Measured) -> Option<Self> {
        Some(Self { tuning: self.tuning.of(best, &self.labels)?, ..self.clone() })
    }

    fn tuning_told(&self, best: &Measured) -> Option<String> {
        self.tuning.told(best, &self.labels)
    }

    fn columns(flags: &super::AnswerFlags) -> Columns {
        flags.texts.columns()
    }

    fn check_room(&self, asking: &Asking) -> Result<()> {
        let pair = asking.tokenizer.takes_pairs().then_some("a pair");
        asking.tokenizer.encode("", pair, asking.max_length).map(drop)
    }

    fn ask(&self, row: &Row, asking: &Asking) -> Result<(Vec<Encoding>, ()), BadRow> {
        let (text, pair) = TextColumns::read(&asking.columns, row)?;
        let asked = asking.flags.text_classification.windows.window_aggregation;
        let how = asked.unwrap_or(self.aggregation);
        match how.windows(&asking.tokenizer, &text, pair.as_deref(), asking.max_length) {
            Ok(windows) if windows.iter().any(Encoding::is_empty) => Err(row.bad("the text has no tokens")),
            Ok(windows) => Ok((windows, ())),
            Err(error) => Err(row.bad(format!("{error:#}"))),
        }
    }

    fn answer(&self, (): &(), outputs: &[Outputs], asking: &Asking) -> Result<Answer> {
        let windows = outputs.iter().map(|outputs| self.logits(outputs)).collect::<Result<Vec<_>>>()?;
        anyhow::ensure!(!windows.is_empty(), "a record has no output");
        let asked = asking.flags.text_classification.windows.window_aggregation;
        let row = asked.unwrap_or(self.aggregation).of(&windows);
        if row.iter().all(|x| x.is_finite()) {
            Ok(Ok(self.prediction(&row, asking.flags.text_classification.logits)))
        } else {
            Ok(Err(format!("the model's logits are not finite: {row:?}")))
        }
    }
}

const WRONG_LABELS: &str = "labels that can't be used";

/// Reads every record.
fn read(files: &Files, flags: &super::RecordFlags) -> Result<Vec<Labelled>> {
    let (how, columns) = TextClassification::reading(flags);
    records::read_examples(files, &how, |row| {
        let (text, pair) = TextColumns::read(&columns, &row)?;
        let label = match (row.value(&columns, "label")?, row.exact.get(columns.of("label"))) {
            (Value::String(name), _) if name.trim().is_empty() => {
                return Err(
                    row.bad(format!("field {:?} is empty: a label was expected", columns.of("label")))
                );
            }
            // an integer beyond 64 bits
            (Value::Number(_), Some(digits)) if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
                digits.clone().into()
            }
            (label, _) => label.clone(),
        };
        Ok(Labelled { place: row.place(), text, pair, label })
    })
}

impl TextClassification {
    /// Of texts whose beginning is read.
    pub fn new(problem: ProblemType, labels: Vec<String>) -> Self {
        Self {
            problem,
            labels,
            aggregation: Aggregation::First,
            weighting: Weighting::default(),
            distillation: None,
            tuning: Tuning::default(),
        }
    }

    /// What a text is labelled with, as it is written.
    fn names(&self, wanted: &Wanted) -> Vec<String> {
        let name = |&id: &u32| self.labels[id as usize].clone();
        match wanted {
            Wanted::Class(id) => vec![name(id)],
            Wanted::Classes(ids) => ids.iter().map(name).collect(),
            Wanted::Number(number) => vec![number.to_string()],
        }
    }

    /// Reads records' labels.
    ///
    /// # Errors
    /// Unusable: labels that the task does not have; the first of them are listed with file and line.
    fn wanted(&self, records: &[Labelled], files: &Files) -> Result<Vec<Wanted>> {
        let (mut targets, mut wrong) = (Vec::with_capacity(records.len()), Vec::new());
        let labels: Vec<&Value> = records.iter().map(|record| &record.label).collect();
        for (record, target) in records.iter().zip(self.targets(&labels)) {
            match target {
                Ok(target) => targets.push(target),
                Err(error) => wrong.push((record.place, error.to_string())),
            }
        }
        refuse_records(files, WRONG_LABELS, wrong)?;
        Ok(targets)
    }

    /// Encodes records and reads their labels.
    ///
    /// # Errors
    /// Unusable: labels that the task does not have; the first of them are listed with file and line.
    fn encode(
        &self,
        records: &[Labelled],
        files: &Files,
        tokenizer: &Tokenizer,
        max_length: usize,
        aggregation: Aggregation,
    ) -> Result<Vec<Example<Window>>> {
        let targets = self.wanted(records, files)?;
        let windows = |record: &Labelled| {
            aggregation.windows(tokenizer, &record.text, record.pair.as_deref(), max_length)
        };
        let (mut examples, mut empty, mut targets) = (Vec::new(), Vec::new(), targets.into_iter());
        let of = format!("{} {aggregation:?} {max_length}", Self::NAME);
        let own = |record: &Labelled, key: &mut Key| {
            key.add(Some(&record.text));
            key.add(record.pair.as_deref());
        };
        tokenizer.in_order(&of, records, own, windows, |text, windows| {
            let windows = windows.with_context(|| files.at(records[text].place))?;
            if windows.iter().any(Encoding::is_empty) {
                empty.push((records[text].place, "the text is empty".to_owned()));
            }
            let wanted = targets.next().context("a record has no target")?;
            let target = Window { wanted, text, aggregation, taught: None };
            let example = |encoding| Example { encoding, target: target.clone() };
            examples.extend(windows.into_iter().map(example));
            Ok(())
        })?;
        refuse_records(files, "texts without tokens", empty)?;
        Ok(examples)
    }

    /// The logits of each text, from those of its windows.
    ///
    /// # Errors
    /// A window's outputs are not one a label.
    fn texts<'t>(&self, outputs: &[Outputs], targets: &[&'t Window]) -> Result<Vec<(Vec<f32>, &'t Window)>> {
        let windows = outputs.iter().map(|outputs| self.logits(outputs)).collect::<Result<Vec<_>>>()?;
        let mut rest = &windows[..];
        let texts = targets.chunk_by(|a, b| a.text == b.text).map(|own| {
            let (windows, others) = rest.split_at(own.len().min(rest.len()));
            rest = others;
            (own[0].aggregation.of(windows), own[0])
        });
        Ok(texts.collect())
    }

    fn measure_texts(&self, texts: &[(Vec<f32>, &Window)]) -> Result<Measured> {
        let logits: Vec<Vec<f32>> = texts.iter().map(|(logits, _)| logits.clone()).collect();
        let targets: Vec<&Wanted> = texts.iter().map(|(_, target)| &target.wanted).collect();
        let matrix = Tensor::from_vec(logits.concat(), (logits.len(), self.labels.len()), &Device::Cpu)?;
        let loss = self.sum_of_losses(&matrix.to_dtype(DType::F64)?, &targets, 0.0)?.to_scalar::<f32>()?;
        let (tuning, details) = match self.tuning.found(self, &logits, &targets) {
            Some((tuning, details)) => (tuning, details),
            None => (self.tuning.clone(), Map::new()),
        };
        let mut metrics = Self { tuning, ..self.clone() }.compare(&logits, &targets);
        metrics.insert("loss".to_owned(), f64::from(loss) / logits.len() as f64);
        Ok(Measured { metrics, details })
    }

    /// The sum over the examples. A mean over the labels of an example with several, as in
    /// `torch.nn.BCEWithLogitsLoss`; label smoothing as in `torch.nn.CrossEntropyLoss`.
    fn sum_of_losses(&self, logits: &Tensor, targets: &[&Wanted], label_smoothing: f64) -> Result<Tensor> {
        let (rows, width) = logits.dims2()?;
        let wanted = self.matrix(targets, label_smoothing as f32);
        let wanted = Tensor::from_vec(wanted, (rows, width), logits.device())?.to_dtype(logits.dtype())?;
        let loss = match self.problem {
            ProblemType::SingleLabelClassification => {
                let log_p = candle_nn::ops::log_softmax(logits, 1)?;
                (log_p * wanted)?.sum_all()?.neg()?
            }
            ProblemType::MultiLabelClassification => {
                // −y · log σ(x) − (1 − y) · log(1 − σ(x))
                ((softplus(logits)? - (logits * wanted)?)?.sum_all()? / width as f64)?
            }
            ProblemType::Regression => (logits - wanted)?.sqr()?.sum_all()?,
        };
        Ok(loss.to_dtype(DType::F32)?)
    }

    /// The same where labels have weights, or what is known well counts less.
    fn weighted_sum_of_losses(&self, logits: &Tensor, targets: &[&Wanted], smoothing: f64) -> Result<Tensor> {
        if self.problem == ProblemType::SingleLabelClassification {
            let class = |target: &&Wanted| match target {
                Wanted::Class(id) => Some(*id),
                _ => None,
            };
            let classes: Vec<Option<u32>> = targets.iter().map(class).collect();
            return self.weighting.of_rows(logits, &classes, smoothing);
        }
        let wanted = Tensor::from_vec(self.matrix(targets, 0.0), logits.shape(), logits.device())?;
        self.weighting.of_labels(logits, &wanted)
    }

    /// How it learns from a teacher, as the flags ask for it.
    ///
    /// # Errors
    /// Unusable: a regression with a temperature; or as [`Distillation::asked`].
    fn distillation_of(&self, start: &Start) -> Result<Option<Distillation>> {
        let flags = &start.training.shared;
        if self.problem == ProblemType::Regression && flags.distillation_temperature.is_some() {
            bail_unusable!("--distillation-temperature is for labels, and these are numbers: a regression");
        }
        Distillation::asked(flags)
    }

    /// How much the examples to learn from count, as the flags ask for it.
    ///
    /// # Errors
    /// Unusable: a regression, which has no labels; or as [`Weighting::new`].
    fn weighting_of(&self, start: &Start, examples: &[Example<Window>]) -> Result<Weighting> {
        let flags = &start.training.shared;
        if self.problem == ProblemType::Regression {
            for (flag, given) in [
                ("--class-weights", flags.class_weights.is_some()),
                ("--focal-gamma", flags.focal_gamma.is_some()),
            ] {
                if given {
                    bail_unusable!("{flag} is for labels, and these are numbers: a regression");
                }
            }
            return Ok(Weighting::default());
        }
        Weighting::new(flags, &self.labels, || {
            let mut counts = vec![0; self.labels.len()];
            for example in examples {
                match &example.target.wanted {
                    Wanted::Class(id) => counts[*id as usize] += 1,
                    Wanted::Classes(ids) => ids.iter().for_each(|&id| counts[id as usize] += 1),
                    Wanted::Number(_) => {}
                }
            }
            match self.problem {
                ProblemType::MultiLabelClassification => {
                    weighting::balanced_of_several(&counts, examples.len())
                }
                _ => weighting::balanced(&counts),
            }
        })
    }

    /// Targets as a matrix, (B, labels).
    fn matrix(&self, targets: &[&Wanted], label_smoothing: f32) -> Vec<f32> {
        let width = self.labels.len();
        let mut matrix = vec![0.0; targets.len() * width];
        for (row, target) in matrix.chunks_mut(width).zip(targets) {
            match target {
                Wanted::Class(id) => {
                    row.fill(label_smoothing / width as f32);
                    row[*id as usize] += 1.0 - label_smoothing;
                }
                Wanted::Classes(ids) => ids.iter().for_each(|&id| row[id as usize] = 1.0),
                Wanted::Number(number) => row[0] = *number,
            }
        }
        matrix
    }

    /// One example's logits, of its outputs.
    ///
    /// # Errors
    /// They are not one a label.
    pub fn logits(&self, outputs: &Outputs) -> Result<Vec<f32>> {
        let labels = self.labels.len();
        match &outputs[..] {
            [logits] if logits.dim() == (1, labels) => Ok(logits.iter().copied().collect()),
            _ => {
                let shapes: Vec<_> = outputs.iter().map(|output| output.dim()).collect();
                anyhow::bail!("the model gives outputs of {shapes:?} for {labels} labels: export it again")
            }
        }
    }

    /// A prediction as a record's fields, from one example's logits.
    pub fn prediction(&self, logits: &[f32], with_logits: bool) -> Map<String, Value> {
        let mut record = Map::new();
        let scores = self.scores(logits);
        let by_label = || -> Map<String, Value> {
            self.labels.iter().zip(&scores).map(|(label, &score)| (label.clone(), short(score))).collect()
        };
        match self.problem {
            ProblemType::SingleLabelClassification => {
                let best = argmax(logits);
                record.insert("label".to_owned(), json!(self.labels[best]));
                record.insert("score".to_owned(), short(scores[best]));
                record.insert("scores".to_owned(), Value::Object(by_label()));
            }
            ProblemType::MultiLabelClassification => {
                let labels: Vec<&String> =
                    self.predicted(logits).iter().map(|&id| &self.labels[id as usize]).collect();
                record.insert("labels".to_owned(), json!(labels));
                record.insert("scores".to_owned(), Value::Object(by_label()));
            }
            ProblemType::Regression => {
                record.insert("score".to_owned(), short(scores[0]));
            }
        }
        if with_logits {
            record.insert("logits".to_owned(), logits.iter().copied().map(short).collect());
        }
        record
    }

    /// Softmax, sigmoids, or the number itself.
    fn scores(&self, logits: &[f32]) -> Vec<f32> {
        match self.problem {
            ProblemType::SingleLabelClassification => self.tuning.probabilities(logits),
            ProblemType::MultiLabelClassification => {
                logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect()
            }
            ProblemType::Regression => logits.to_vec(),
        }
    }

    fn compare(&self, logits: &[Vec<f32>], targets: &[&Wanted]) -> Metrics {
        match self.problem {
            ProblemType::Regression => {
                let predicted: Vec<f64> = logits.iter().map(|row| f64::from(row[0])).collect();
                let wanted: Vec<f64> = targets
                    .iter()
                    .map(|target| match target {
                        Wanted::Number(number) => f64::from(*number),
                        _ => f64::NAN,
                    })
                    .collect();
                metrics::regression(&predicted, &wanted)
            }
            _ => {
                let predicted: Vec<Vec<u32>> = logits.iter().map(|row| self.predicted(row)).collect();
                let wanted: Vec<Vec<u32>> = targets
                    .iter()
                    .map(|target| match target {
                        Wanted::Class(id) => vec![*id],
                        Wanted::Classes(ids) => ids.clone(),
                        Wanted::Number(_) => Vec::new(),
                    })
                    .collect();
                match self.problem {
                    ProblemType::MultiLabelClassification => {
                        metrics::multi_label(&predicted, &wanted, self.labels.len())
                    }
                    _ => {
                        let mut metrics = metrics::single_label(&predicted, &wanted, self.labels.len());
                        metrics.insert("ece".to_owned(), self.tuning.ece(logits, targets));
                        metrics
                    }
                }
            }
        }
    }

    /// The predicted label ids, ascending: the largest logit, or of several labels each above its threshold.
    fn predicted(&self, logits: &[f32]) -> Vec<u32> {
        match self.problem {
            ProblemType::MultiLabelClassification => {
                let said = logits.iter().enumerate().filter(|&(label, &x)| self.tuning.says(label, x));
                said.map(|(label, _)| label as u32).collect()
            }
            _ => vec![argmax(logits) as u32],
        }
    }
}
