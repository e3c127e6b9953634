//! Text classification: one text or a pair → one label, several labels, or a number.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{Dim, Metrics, Output, Outputs, Target, metrics};
use crate::model::ops::Ops;
use crate::model::{Family, Head, ModelConfig};
use crate::{Result, bail_unusable, unusable};

/// The labels and what a text may have of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextClassification {
    pub problem: Problem,
    /// In the order of `id2label`; one, for a regression.
    pub labels: Vec<String>,
}

/// transformers' `problem_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[value(rename_all = "snake_case")]
#[serde(rename_all = "snake_case")]
pub enum Problem {
    /// Exactly one of the labels: softmax, cross-entropy.
    SingleLabelClassification,
    /// Any number of the labels: a sigmoid each, binary cross-entropy.
    MultiLabelClassification,
    /// A number: mean squared error.
    Regression,
}

impl Problem {
    /// What labels of training data ask for. A few that are no numbers among fractions are faults, not classes.
    fn of_labels(labels: &[&Value]) -> Self {
        let numbers = labels.iter().filter(|label| as_number(label).is_some()).count();
        if labels.iter().any(|label| label.is_array()) {
            Self::MultiLabelClassification
        } else if numbers * 2 > labels.len() && labels.iter().any(|label| is_fraction(label)) {
            Self::Regression
        } else {
            Self::SingleLabelClassification
        }
    }

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

impl TextClassification {
    /// Reads `problem_type` and `id2label` of a fine-tuned model. As in transformers, one label without a
    /// `problem_type` is a regression, and labels without names are `LABEL_0`, `LABEL_1` ….
    pub fn from_config(config: &ModelConfig) -> Result<Self> {
        let labels = match labels_of(config)? {
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
            Some("single_label_classification") => Problem::SingleLabelClassification,
            Some("multi_label_classification") => Problem::MultiLabelClassification,
            Some("regression") => Problem::Regression,
            Some(other) => bail_unusable!(
                "problem_type is \"{other}\", expected single_label_classification, \
                 multi_label_classification or regression"
            ),
            None if labels.len() == 1 => Problem::Regression,
            None => Problem::SingleLabelClassification,
        };
        if problem == Problem::Regression && labels.len() != 1 {
            bail_unusable!("a regression has one label, id2label has {}", labels.len());
        }
        Ok(Self { problem, labels })
    }

    /// The labels of a base model that training data may speak of: none where its `architectures` are another
    /// task's, or where it is a regression.
    ///
    /// # Errors
    /// The base classifies, and its configuration is inconsistent.
    pub fn known(config: &ModelConfig) -> Result<Vec<String>> {
        let architecture = config.raw.get("architectures").and_then(|list| list.get(0));
        let of_others = architecture
            .and_then(Value::as_str)
            .is_some_and(|name| !name.ends_with("ForSequenceClassification"));
        if of_others || labels_of(config)?.is_none() {
            return Ok(Vec::new());
        }
        let known = Self::from_config(config)?;
        Ok(if known.problem == Problem::Regression { Vec::new() } else { known.labels })
    }

    /// Finds out from the labels of the training data what is to be learnt.
    ///
    /// A list is multi label, a fraction a regression, all else a single label; `problem` overrides.
    /// Where the base model's `known` labels hold every label, their order is kept; integers inside their range
    /// are taken for ids, unless one of them is an integer itself. Otherwise the labels are sorted: by number where
    /// all are integers, else by text. Lists of 0 and 1 alone, all of one length, are multi-hot: their labels are
    /// `known` where the number is the same, else `LABEL_0`, `LABEL_1` ….
    ///
    /// # Errors
    /// Labels of mixed kinds, or fewer than two different labels.
    pub fn from_labels(labels: &[&Value], problem: Option<Problem>, known: Vec<String>) -> Result<Self> {
        let problem = problem.unwrap_or_else(|| Problem::of_labels(labels));
        if problem == Problem::Regression {
            labels.iter().try_for_each(|label| number_of(label).map(drop))?;
            return Ok(Self { problem, labels: vec!["LABEL_0".to_owned()] });
        }
        if let (Problem::MultiLabelClassification, Some(width)) = (problem, multi_hot_width(labels)) {
            let named = known.len() == width;
            return Ok(Self { problem, labels: if named { known } else { default_names(width) } });
        }
        let mut names = BTreeSet::new();
        for label in labels {
            names.extend(label_names(label, problem)?);
        }
        let least = if problem == Problem::SingleLabelClassification { 2 } else { 1 };
        let own_integers = known.iter().any(|name| is_integer(name));
        let by_name = || names.iter().all(|name| known.contains(name));
        let by_id = || !own_integers && names.iter().all(|name| id_below(known.len(), name).is_some());
        if known.len() >= least && (by_name() || by_id()) {
            return Ok(Self { problem, labels: known });
        }
        if names.len() < least {
            bail_unusable!(
                "the training data has the labels {names:?}: a classifier needs at least {least} different ones"
            );
        }
        Ok(Self { problem, labels: in_order(names) })
    }

    /// The places of labels of training data that are of another kind than the others, and what is wrong with each.
    pub fn unfit(labels: &[&Value], problem: Option<Problem>) -> Vec<(usize, anyhow::Error)> {
        let problem = problem.unwrap_or_else(|| Problem::of_labels(labels));
        if problem == Problem::MultiLabelClassification && multi_hot_width(labels).is_some() {
            return Vec::new();
        }
        let are_named = labels.iter().any(|label| label.as_str().is_some_and(|name| !is_integer(name)));
        let check = |label: &Value| match problem {
            Problem::Regression => number_of(label).map(drop),
            // the booleans are 0 and 1, and "true" is a label of its own
            _ if are_named && label.is_boolean() => {
                Err(unusable!("label is {label}, among labels that are names: write all of them as text"))
            }
            _ => label_names(label, problem).map(drop),
        };
        labels.iter().enumerate().filter_map(|(i, label)| Some((i, check(label).err()?))).collect()
    }

    /// Reads the labels of a file's records. Together, because lists of 0 and 1 are multi-hot only where all are.
    ///
    /// # Errors
    /// Each names the label that was found and what was expected.
    pub fn targets(&self, labels: &[&Value]) -> Vec<Result<Target>> {
        let multi_hot = self.are_multi_hot(labels);
        labels.iter().map(|label| self.read(label, multi_hot)).collect()
    }

    /// Reads one label that stands alone.
    ///
    /// # Errors
    /// As [`TextClassification::targets`].
    pub fn target(&self, label: &Value) -> Result<Target> {
        self.read(label, self.are_multi_hot(&[label]))
    }

    fn are_multi_hot(&self, labels: &[&Value]) -> bool {
        let width = multi_hot_width(labels);
        let named = ["0", "1"].iter().all(|bit| self.labels.iter().any(|name| name == bit));
        // a model of the labels 0 and 1 reads [0, 1] as their names
        let as_names = || named && labels.iter().all(|label| label_names(label, self.problem).is_ok());
        self.problem == Problem::MultiLabelClassification && width == Some(self.labels.len()) && !as_names()
    }

    fn read(&self, label: &Value, multi_hot: bool) -> Result<Target> {
        if self.problem == Problem::Regression {
            return Ok(Target::Number(number_of(label)?));
        }
        if let (true, Some(list)) = (multi_hot, label.as_array()) {
            let ids = (0..).zip(list).filter(|(_, value)| bit(value) == Some(true));
            return Ok(Target::Classes(ids.map(|(id, _)| id).collect()));
        }
        let mut ids = Vec::new();
        for name in label_names(label, self.problem)? {
            ids.push(self.id_of(&name)?);
        }
        if self.problem == Problem::SingleLabelClassification {
            return Ok(Target::Class(ids[0]));
        }
        ids.sort_unstable();
        ids.dedup();
        Ok(Target::Classes(ids))
    }

    /// An integer is an id only where no label is an integer itself.
    fn id_of(&self, name: &str) -> Result<u32> {
        let by_name = self.labels.iter().position(|known| known == name);
        let by_id = || {
            id_below(self.labels.len(), name).filter(|_| !self.labels.iter().any(|known| is_integer(known)))
        };
        by_name.or_else(by_id).map(|id| id as u32).ok_or_else(|| {
            unusable!("label \"{name}\" is not one of the model's labels: {}", self.labels.join(", "))
        })
    }

    pub(super) fn head(&self) -> Head {
        Head::SequenceClassification { labels: self.labels.len() }
    }

    pub(super) fn define<O: Ops>(&self, o: &O, family: &Family) -> Result<O::X> {
        family.define(o, self.head())
    }

    pub(super) fn outputs(&self) -> Vec<Output> {
        vec![Output { name: "logits", dims: vec![Dim::Batch, Dim::Of(self.labels.len())] }]
    }

    pub(super) fn write_config(&self, config: &mut ModelConfig) {
        write_labels(config, self.head(), &self.labels);
        let pads_with_the_end = config.family.pads_with_the_end();
        let raw = &mut config.raw;
        raw.insert("problem_type".to_owned(), json!(self.problem.name()));
        if pads_with_the_end && raw.get("pad_token_id").is_none_or(Value::is_null) {
            // transformers finds the last token of a padded row by it
            let end = raw.get("eos_token_id").cloned().unwrap_or_else(|| json!(50_256));
            let end = end.get(0).cloned().unwrap_or(end); // the first of a list
            raw.insert("pad_token_id".to_owned(), end);
        }
    }

    /// The sum over the examples. A mean over the labels of an example with several, as in
    /// `torch.nn.BCEWithLogitsLoss`; label smoothing as in `torch.nn.CrossEntropyLoss`.
    pub fn loss(&self, logits: &Tensor, targets: &[&Target], label_smoothing: f64) -> Result<Tensor> {
        let (rows, width) = logits.dims2()?;
        let wanted = self.matrix(targets, label_smoothing as f32);
        let wanted = Tensor::from_vec(wanted, (rows, width), logits.device())?.to_dtype(logits.dtype())?;
        let loss = match self.problem {
            Problem::SingleLabelClassification => {
                let log_p = candle_nn::ops::log_softmax(logits, 1)?;
                (log_p * wanted)?.sum_all()?.neg()?
            }
            Problem::MultiLabelClassification => {
                // max(x, 0) − x·y + log(1 + e^−|x|), which does not overflow
                let soft = ((logits.abs()?.neg()?.exp()? + 1.0)?.log()? + logits.relu()?)?;
                ((soft - (logits * wanted)?)?.sum_all()? / width as f64)?
            }
            Problem::Regression => (logits - wanted)?.sqr()?.sum_all()?,
        };
        Ok(loss.to_dtype(DType::F32)?)
    }

    /// Targets as a matrix, (B, labels).
    fn matrix(&self, targets: &[&Target], label_smoothing: f32) -> Vec<f32> {
        let width = self.labels.len();
        let mut matrix = vec![0.0; targets.len() * width];
        for (row, target) in matrix.chunks_mut(width).zip(targets) {
            match target {
                Target::Class(id) => {
                    row.fill(label_smoothing / width as f32);
                    row[*id as usize] += 1.0 - label_smoothing;
                }
                Target::Classes(ids) => ids.iter().for_each(|&id| row[id as usize] = 1.0),
                Target::Number(number) => row[0] = *number,
                Target::Tags(_) | Target::Next(_) => {} // of another task
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
            Problem::SingleLabelClassification => {
                let best = argmax(logits);
                record.insert("label".to_owned(), json!(self.labels[best]));
                record.insert("score".to_owned(), short(scores[best]));
                record.insert("scores".to_owned(), Value::Object(by_label()));
            }
            Problem::MultiLabelClassification => {
                let labels: Vec<&String> =
                    self.predicted(logits).iter().map(|&id| &self.labels[id as usize]).collect();
                record.insert("labels".to_owned(), json!(labels));
                record.insert("scores".to_owned(), Value::Object(by_label()));
            }
            Problem::Regression => {
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
            Problem::SingleLabelClassification => {
                let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let exp: Vec<f32> = logits.iter().map(|x| (x - max).exp()).collect();
                let sum: f32 = exp.iter().sum();
                exp.iter().map(|e| e / sum).collect()
            }
            Problem::MultiLabelClassification => logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
            Problem::Regression => logits.to_vec(),
        }
    }

    /// The metric that decides which evaluation is the best, and all that there are beside the loss.
    pub(super) fn metrics(&self) -> (&'static str, &'static [&'static str]) {
        match self.problem {
            Problem::SingleLabelClassification => ("accuracy", &["accuracy", "f1_macro"]),
            Problem::MultiLabelClassification => ("f1_micro", &["accuracy", "f1_macro", "f1_micro"]),
            Problem::Regression => ("mse", &["mse", "mae", "pearson", "spearman"]),
        }
    }

    /// The metrics over a whole evaluation set, and the mean `loss`.
    ///
    /// # Errors
    /// An example has other logits than one a label.
    pub fn measure(&self, outputs: &[Outputs], targets: &[&Target]) -> Result<Metrics> {
        let width = self.labels.len();
        let logits = outputs.iter().map(|outputs| self.logits(outputs)).collect::<Result<Vec<_>>>()?;
        let matrix = Tensor::from_vec(logits.concat(), (logits.len(), width), &Device::Cpu)?;
        let loss = self.loss(&matrix.to_dtype(DType::F64)?, targets, 0.0)?.to_scalar::<f32>()?;
        let mut metrics = self.compare(&logits, targets);
        metrics.insert("loss".to_owned(), f64::from(loss) / logits.len() as f64);
        Ok(metrics)
    }

    fn compare(&self, logits: &[Vec<f32>], targets: &[&Target]) -> Metrics {
        match self.problem {
            Problem::Regression => {
                let predicted: Vec<f64> = logits.iter().map(|row| f64::from(row[0])).collect();
                let wanted: Vec<f64> = targets
                    .iter()
                    .map(|target| match target {
                        Target::Number(number) => f64::from(*number),
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
                        Target::Class(id) => vec![*id],
                        Target::Classes(ids) => ids.clone(),
                        Target::Number(_) | Target::Tags(_) | Target::Next(_) => Vec::new(),
                    })
                    .collect();
                match self.problem {
                    Problem::MultiLabelClassification => {
                        metrics::multi_label(&predicted, &wanted, self.labels.len())
                    }
                    _ => metrics::single_label(&predicted, &wanted, self.labels.len()),
                }
            }
        }
    }

    /// The predicted label ids, ascending: the largest logit, or of several labels each with a logit above 0.
    fn predicted(&self, logits: &[f32]) -> Vec<u32> {
        match self.problem {
            Problem::MultiLabelClassification => {
                (0..).zip(logits).filter(|&(_, &x)| x > 0.0).map(|(id, _)| id).collect()
            }
            _ => vec![argmax(logits) as u32],
        }
    }
}

/// Writes a head's class and its labels, as transformers has them.
pub(super) fn write_labels(config: &mut ModelConfig, head: Head, labels: &[String]) {
    let id2label: Map<String, Value> =
        labels.iter().enumerate().map(|(id, name)| (id.to_string(), json!(name))).collect();
    let label2id: Map<String, Value> =
        labels.iter().enumerate().map(|(id, name)| (name.clone(), json!(id))).collect();
    let class = config.family.class(head);
    let raw = &mut config.raw;
    raw.insert("architectures".to_owned(), json!([class]));
    raw.insert("id2label".to_owned(), Value::Object(id2label));
    raw.insert("label2id".to_owned(), Value::Object(label2id));
    raw.remove("num_labels"); // transformers derives it from id2label
}

/// A number with the digits that tell it from every other f32, and no more.
pub(super) fn short(x: f32) -> Value {
    json!(x.to_string().parse().unwrap_or(f64::from(x)))
}

pub(super) fn argmax(values: &[f32]) -> usize {
    (0..values.len()).fold(0, |best, i| if values[i] > values[best] { i } else { best })
}

/// transformers' names of labels that have none.
pub(super) fn default_names(n: usize) -> Vec<String> {
    (0..n).map(|id| format!("{DEFAULT_NAME}{id}")).collect()
}

const DEFAULT_NAME: &str = "LABEL_";

/// The labels that `id2label` names, by ascending id.
pub(super) fn labels_of(config: &ModelConfig) -> Result<Option<Vec<String>>> {
    let map = match config.raw.get("id2label") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Object(map)) if !map.is_empty() => map,
        Some(other) => bail_unusable!("id2label is {other}, expected an object of ids with names"),
    };
    let mut labels: Vec<Option<&str>> = vec![None; map.len()];
    for (id, name) in map {
        let slot = id.parse().ok().and_then(|id: usize| labels.get_mut(id));
        match (slot, name.as_str()) {
            (Some(slot), Some(name)) => *slot = Some(name),
            _ => bail_unusable!(
                "id2label has \"{id}\": {name}; expected the ids 0 to {} with names",
                map.len() - 1
            ),
        }
    }
    let labels: Vec<&str> =
        labels.into_iter().collect::<Option<_>>().ok_or_else(|| unusable!("id2label repeats an id"))?;
    let mut ids = BTreeMap::new();
    for (id, name) in labels.iter().enumerate() {
        if let Some(first) = ids.insert(name, id) {
            bail_unusable!(
                "id2label names the ids {first} and {id} both {name:?}; give each a name of its own"
            );
        }
    }
    Ok(Some(labels.into_iter().map(str::to_owned).collect()))
}

/// Names as ids: by number where all are integers (or all are transformers' `LABEL_7`), else by text. One rule for
/// all of them, because numbers among texts have no order that holds for any three.
fn in_order(names: BTreeSet<String>) -> Vec<String> {
    let mut names: Vec<String> = names.into_iter().collect();
    let integer = |name: &str| name.parse::<i128>().ok();
    let default = |name: &str| name.strip_prefix(DEFAULT_NAME)?.parse::<i128>().ok();
    if names.iter().all(|name| integer(name).is_some()) {
        names.sort_by_key(|name| integer(name)); // is stable: 01 stands before 1
    } else if names.iter().all(|name| default(name).is_some()) {
        names.sort_by_key(|name| default(name));
    }
    names
}

/// The id that a name is, as it is written in `id2label`: not `01`, not `+1`.
fn id_below(labels: usize, name: &str) -> Option<usize> {
    name.parse().ok().filter(|id: &usize| *id < labels && id.to_string() == name)
}

/// The names that a label gives: one, or those of a list.
fn label_names(label: &Value, problem: Problem) -> Result<Vec<String>> {
    match (label, problem) {
        (Value::Array(list), Problem::MultiLabelClassification) => {
            let bits: Option<BTreeSet<bool>> = list.iter().map(bit).collect();
            if bits.is_some_and(|bits| bits.len() < list.len()) || list.iter().any(Value::is_f64) {
                bail_unusable!(
                    "label is {label}, expected a list of different names or ids; multi-hot lists hold 0 and 1 \
                     alone, one for each label, in every record"
                );
            }
            list.iter().map(label_name).collect()
        }
        (Value::Array(_), _) => {
            Err(unusable!("label is a list, expected one label (the problem is {})", problem.name()))
        }
        (label, _) => Ok(vec![label_name(label)?]),
    }
}

fn label_name(label: &Value) -> Result<String> {
    match label {
        Value::String(name) if name.trim().is_empty() => Err(unusable!("label is empty")),
        Value::String(name) => Ok(name.clone()),
        Value::Number(n) if n.is_i64() || n.is_u64() => Ok(n.to_string()),
        Value::Number(n) => match n.as_f64() {
            // pandas writes integers so where one is missing
            Some(x) if x.fract() == 0.0 && x.abs() < EXACT => Ok((x as i64).to_string()),
            Some(x) if x.fract() == 0.0 => {
                Err(unusable!("label is {n}, an integer that 64 bits don't hold; write it as a string"))
            }
            _ => Err(unusable!("label is {n}, expected a name or an integer")),
        },
        Value::Bool(flag) => Ok(u8::from(*flag).to_string()),
        other => Err(unusable!("label is {other}, expected a name or an integer")),
    }
}

/// Below it, every integer has a double of its own.
const EXACT: f64 = (1_u64 << 53) as f64;

/// The length of multi-hot lists: all of 0 and 1 alone, and of one length.
fn multi_hot_width(labels: &[&Value]) -> Option<usize> {
    let lists: Vec<&Vec<Value>> = labels.iter().map(|label| label.as_array()).collect::<Option<_>>()?;
    let width = lists.first()?.len();
    let are_bits = lists.iter().all(|list| list.len() == width && list.iter().all(|x| bit(x).is_some()));
    // a list of one integer is the id of one label
    let is_wide = width > 1 || lists.iter().any(|list| list.iter().any(Value::is_f64));
    (are_bits && is_wide).then_some(width)
}

/// A value of a multi-hot list.
fn bit(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(flag) => Some(*flag),
        Value::Number(n) if n.as_f64() == Some(0.0) => Some(false),
        Value::Number(n) if n.as_f64() == Some(1.0) => Some(true),
        _ => None,
    }
}

/// The label of a regression.
fn number_of(label: &Value) -> Result<f32> {
    if label.as_str().is_some_and(|text| text.trim().is_empty()) {
        bail_unusable!("label is empty");
    }
    let number = as_number(label)
        .ok_or_else(|| unusable!("label is {label}, expected a number (the problem is a regression)"))?;
    match number as f32 {
        x if x.is_finite() => Ok(x),
        _ => Err(unusable!("label is {label}, more than a 32-bit number holds")),
    }
}

fn as_number(label: &Value) -> Option<f64> {
    let number = match label {
        Value::Number(n) => n.as_f64(),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    };
    number.filter(|n: &f64| n.is_finite())
}

/// Whether a label is a number that is not written as an integer. Integers beyond 64 bits come as such numbers too.
fn is_fraction(label: &Value) -> bool {
    match label {
        Value::Number(n) => n.is_f64() && n.as_f64().is_some_and(|x| x.fract() != 0.0 || x.abs() < EXACT),
        Value::String(text) => as_number(label).is_some() && !is_integer(text.trim()),
        _ => false,
    }
}

/// Whether a text is an integer of any size.
fn is_integer(text: &str) -> bool {
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(more: Value) -> ModelConfig {
        let mut raw = json!({
            "model_type": "bert", "vocab_size": 9, "hidden_size": 4, "num_hidden_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 16,
        });
        raw.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        ModelConfig::parse(&raw.to_string()).unwrap()
    }

    fn found(labels: Value, more: Value) -> Result<TextClassification> {
        let labels: Vec<&Value> = labels.as_array().unwrap().iter().collect();
        TextClassification::from_labels(&labels, None, TextClassification::known(&config(more))?)
    }

    fn targets(task: &TextClassification, labels: Value) -> Vec<Result<Target, String>> {
        let labels: Vec<&Value> = labels.as_array().unwrap().iter().collect();
        task.targets(&labels).into_iter().map(|target| target.map_err(|error| error.to_string())).collect()
    }

    fn task(problem: Problem, labels: &[&str]) -> TextClassification {
        TextClassification { problem, labels: labels.iter().map(|&name| name.to_owned()).collect() }
    }

    #[test]
    fn the_problem_is_found_in_the_labels() {
        use Problem::*;
        for (labels, problem, names) in [
            (json!(["b", "a", "b"]), SingleLabelClassification, vec!["a", "b"]),
            (json!([10, 9, 10]), SingleLabelClassification, vec!["9", "10"]),
            (json!(["10", "9"]), SingleLabelClassification, vec!["9", "10"]),
            (json!([true, false]), SingleLabelClassification, vec!["0", "1"]),
            (json!([["b"], [], ["a", "c"]]), MultiLabelClassification, vec!["a", "b", "c"]),
            (json!([1, 0.5]), Regression, vec!["LABEL_0"]),
            (json!([1.0, 0.0]), Regression, vec!["LABEL_0"]), // a column of floats, as transformers' scripts
            (json!([0, u64::MAX]), SingleLabelClassification, vec!["0", "18446744073709551615"]),
            (json!(["1", "1", "01"]), SingleLabelClassification, vec!["01", "1"]),
            (json!(["-1", "+1", "0", "1"]), SingleLabelClassification, vec!["-1", "0", "+1", "1"]),
            (
                json!(["100000000000000000000000", "3"]),
                SingleLabelClassification,
                vec!["3", "100000000000000000000000"],
            ),
            (json!(["LABEL_10", "LABEL_9"]), SingleLabelClassification, vec!["LABEL_9", "LABEL_10"]),
            (json!(["3.5", "GPT-4", "Claude"]), SingleLabelClassification, vec!["3.5", "Claude", "GPT-4"]),
            (json!(["1", "0.5"]), Regression, vec!["LABEL_0"]),
        ] {
            let task = found(labels.clone(), json!({})).unwrap();
            assert_eq!(
                (task.problem, task.labels),
                (problem, names.into_iter().map(str::to_owned).collect()),
                "{labels}"
            );
        }
        for labels in [
            json!(["a", "a"]),
            json!(["a", {"b": 1}]),
            json!([0.5, "a"]),
            json!(["a", "b", ""]),
            json!(["a", "b", " "]),
            json!(["0.5", "0.25", ""]),
            json!(["0.5", "0.25", "NA"]),
            json!([0.5, 0.25, "NaN"]),
            json!([0.5, 1e300]),
            json!([1e22, 3]),
        ] {
            assert!(found(labels.clone(), json!({})).is_err(), "{labels}");
        }
    }

    #[test]
    fn labels_that_the_model_knows_keep_its_order() {
        let known = json!({"id2label": {"0": "z", "1": "a"}});
        for labels in [json!(["a", "z"]), json!(["a"]), json!([1, 0])] {
            assert_eq!(found(labels, known.clone()).unwrap().labels, ["z", "a"]);
        }
        assert_eq!(found(json!(["a", "new"]), known).unwrap().labels, ["a", "new"]);
    }

    #[test]
    fn ids_of_labels_do_not_depend_on_the_order_of_the_rows() {
        let mut names: Vec<String> =
            (0..40).map(|i| [format!("{i}"), format!("{i}a")][i % 2].clone()).collect();
        names.extend(["1a".to_owned(), "007".to_owned(), "7".to_owned(), "-0".to_owned(), "0".to_owned()]);
        let expected = found(json!(names), json!({})).unwrap().labels;
        assert_eq!(expected.len(), 43); // 1a and 0 stand there twice
        for turn in 0..names.len() {
            names.rotate_left(turn);
            names.reverse();
            assert_eq!(found(json!([&names[..], &names[..]].concat()), json!({})).unwrap().labels, expected);
        }
        let mixed = found(json!(["2", "1a", "10", "2"]), json!({})).unwrap();
        assert_eq!(mixed.labels, ["10", "1a", "2"]); // as text, for one of them is no integer
    }

    #[test]
    fn an_integer_is_an_id_only_where_no_label_is_an_integer() {
        let single = |labels| task(Problem::SingleLabelClassification, labels);
        for labels in
            [&["1", "2", "3"][..], &["-1", "1"], &["2", "4"], &["a", "7"], &["10000000000000000000000", "1"]]
        {
            let read = targets(&single(labels), json!([0, "0", false]));
            assert!(
                read.iter().all(|target| target.as_ref().is_err_and(|e| e.contains("is not one of"))),
                "{labels:?}"
            );
        }
        assert_eq!(
            targets(&single(&["1", "2"]), json!([1, "2", 2.0])),
            [0, 1, 1].map(|id| Ok(Target::Class(id)))
        );
        assert_eq!(
            targets(&single(&["b", "a"]), json!([1, "b", "1"])),
            [1, 0, 1].map(|id| Ok(Target::Class(id)))
        );
        assert!(targets(&single(&["b", "a"]), json!(["01", "+1", 2])).iter().all(Result::is_err));
        let several = task(Problem::MultiLabelClassification, &["1", "2", "3"]);
        assert!(targets(&several, json!([[0], []]))[0].is_err());

        let of_stars = json!({"id2label": {"0": "1", "1": "2", "2": "3"}});
        assert_eq!(found(json!([0, 1, 2]), of_stars.clone()).unwrap().labels, ["0", "1", "2"]);
        assert_eq!(found(json!([3, 1]), of_stars).unwrap().labels, ["1", "2", "3"]);
    }

    #[test]
    fn labels_of_a_base_of_another_task_are_not_taken_over() {
        let base = |architecture: &str, more: Value| {
            let mut base = json!({"id2label": {"0": "O", "1": "B-LOC"}, "architectures": [architecture]});
            base.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            base
        };
        for name in ["BertForTokenClassification", "BertForMultipleChoice", "BertForMaskedLM", "BertModel"] {
            assert_eq!(found(json!([0, 1]), base(name, json!({}))).unwrap().labels, ["0", "1"], "{name}");
        }
        let same = "BertForSequenceClassification";
        assert_eq!(found(json!([0, 1]), base(same, json!({}))).unwrap().labels, ["O", "B-LOC"]);
        // an odd id2label is that of the base: what another task wrote is not even looked at
        let odd = json!({"id2label": {"1": "a", "2": "b"}});
        assert!(found(json!([0, 1]), base(same, odd.clone())).is_err());
        assert!(found(json!([0, 1]), base("BertForTokenClassification", odd)).is_ok());
        let regression = json!({"id2label": {"0": "LABEL_0"}});
        assert_eq!(found(json!([["0"], []]), base(same, regression)).unwrap().labels, ["0"]);
    }

    #[test]
    fn lists_of_0_and_1_of_one_length_are_multi_hot() {
        for labels in [json!([[1, 0, 0], [0, 1, 1]]), json!([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])] {
            let task = found(labels.clone(), json!({})).unwrap();
            assert_eq!(task.labels, ["LABEL_0", "LABEL_1", "LABEL_2"]);
            let read = targets(&task, labels);
            assert_eq!(read, [Ok(Target::Classes(vec![0])), Ok(Target::Classes(vec![1, 2]))]);
            assert_eq!(targets(&task, json!([["LABEL_1"], [2]]))[0], Ok(Target::Classes(vec![1])));
        }
        let named = json!({"id2label": {"0": "x", "1": "y"}});
        assert_eq!(found(json!([[1, 0], [1, 1]]), named).unwrap().labels, ["x", "y"]);
        // ids and names stay what they are
        assert_eq!(found(json!([[0], [1], [1]]), json!({})).unwrap().labels, ["0", "1"]);
        assert_eq!(found(json!([[0, 1], [2]]), json!({})).unwrap().labels, ["0", "1", "2"]);
        let by_name = task(Problem::MultiLabelClassification, &["0", "1"]);
        assert_eq!(targets(&by_name, json!([[1, 0]])), [Ok(Target::Classes(vec![0, 1]))]);
        assert_eq!(targets(&by_name, json!([[1, 1]])), [Ok(Target::Classes(vec![0, 1]))]);
        // neither the one nor the other
        for labels in
            [json!([[1, 0, 0], [1, 0]]), json!([[1, 0, 0], []]), json!([[1, 0, 0], "a"]), json!([[1.0, 2.0]])]
        {
            assert!(found(labels.clone(), json!({})).is_err(), "{labels}");
        }
        let four = task(Problem::MultiLabelClassification, &["a", "b", "c", "d"]);
        assert!(targets(&four, json!([[1, 0, 0]]))[0].as_ref().is_err_and(|e| e.contains("multi-hot")));
        assert!(targets(&four, json!([[1.0, 0.0]]))[0].is_err());
    }

    #[test]
    fn an_odd_id2label_is_refused_by_name() {
        for (odd, says) in [
            (json!({"0": "same", "1": "same"}), "names the ids 0 and 1 both \"same\""),
            (json!(["a", "b"]), "id2label is [\"a\",\"b\"], expected an object"),
            (json!({}), "id2label is {}"),
            (json!({"1": "a", "2": "b"}), "id2label has \"2\""),
            (json!({"0": 0, "1": 1}), "id2label has \"0\": 0"),
            (json!({"1": "a", "01": "b"}), "id2label repeats an id"),
        ] {
            let error = TextClassification::from_config(&config(json!({"id2label": odd}))).unwrap_err();
            assert!(error.to_string().contains(says), "{error}");
        }
        assert!(TextClassification::from_config(&config(json!({"num_labels": 1_u64 << 60}))).is_err());
    }

    #[test]
    fn what_is_measured_is_what_is_served() {
        // logits that a softmax or a sigmoid of 32 bits can't tell apart
        let near = [90.0, 90.000_01, -20.0];
        let single = task(Problem::SingleLabelClassification, &["a", "b", "c"]);
        assert_eq!(single.prediction(&near, false)["label"], json!("b"));
        assert_eq!(single.predicted(&near), [1]);
        let several = task(Problem::MultiLabelClassification, &["a", "b", "c"]);
        let small = [1e-9, 0.0, -1e-9];
        assert_eq!(several.prediction(&small, false)["labels"], json!(["a"]));
        assert_eq!(several.predicted(&small), [0]);
    }

    #[test]
    fn what_is_written_reads_back() {
        for problem in [Problem::SingleLabelClassification, Problem::MultiLabelClassification] {
            let task = TextClassification { problem, labels: vec!["b".to_owned(), "a".to_owned()] };
            let mut config = config(json!({}));
            task.write_config(&mut config);
            assert_eq!(TextClassification::from_config(&config).unwrap(), task);
        }
    }

    #[test]
    fn one_label_without_a_problem_type_is_a_regression_as_in_transformers() {
        let task = TextClassification::from_config(&config(json!({"id2label": {"0": "LABEL_0"}}))).unwrap();
        assert_eq!(task.problem, Problem::Regression);
        assert_eq!(
            TextClassification::from_config(&config(json!({}))).unwrap().labels,
            ["LABEL_0", "LABEL_1"]
        );
    }

    #[test]
    fn predictions_say_what_the_problem_asks_for() {
        let labels = vec!["a".to_owned(), "b".to_owned()];
        let task = |problem| TextClassification { problem, labels: labels.clone() };
        let single = task(Problem::SingleLabelClassification).prediction(&[0.0, 3.0f32.ln()], true);
        assert_eq!((&single["label"], &single["logits"][0]), (&json!("b"), &json!(0.0)));
        assert!((single["score"].as_f64().unwrap() - 0.75).abs() < 1e-6);
        let multi = task(Problem::MultiLabelClassification).prediction(&[0.0, 2.0], false);
        assert_eq!(multi["labels"], json!(["b"]));
        assert_eq!(multi["scores"]["a"], json!(0.5));
        // large logits overflow nothing
        let large = task(Problem::SingleLabelClassification).prediction(&[1e4, -1e4], false);
        assert_eq!(large["score"], json!(1.0));
    }
}
