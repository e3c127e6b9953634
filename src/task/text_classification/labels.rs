//! Labels of records → what is to be learnt, and the target of each.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{ProblemType, TextClassification, Wanted};
use crate::model::{Head, ModelConfig};
use crate::task::Objective;
use crate::task::id2label::{self, default_names};
use crate::{Result, bail_unusable, unusable};

impl TextClassification {
    /// The labels of a base model that training data may speak of: none where its `architectures` are another
    /// task's, or where it is a regression.
    ///
    /// # Errors
    /// The base classifies, and its configuration is inconsistent.
    pub fn known(config: &ModelConfig) -> Result<Vec<String>> {
        let of_others =
            config.architecture().is_some() && !config.has(Head::SequenceClassification { labels: 0 });
        if of_others || id2label::read(config)?.is_none() {
            return Ok(Vec::new());
        }
        let known = Self::from_config(config)?;
        Ok(if known.problem == ProblemType::Regression { Vec::new() } else { known.labels })
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
    pub fn from_labels(labels: &[&Value], problem: Option<ProblemType>, known: Vec<String>) -> Result<Self> {
        let problem = problem.unwrap_or_else(|| problem_of(labels));
        if problem == ProblemType::Regression {
            labels.iter().try_for_each(|label| number_of(label).map(drop))?;
            return Ok(Self::new(problem, vec!["LABEL_0".to_owned()]));
        }
        if let (ProblemType::MultiLabelClassification, Some(width)) = (problem, multi_hot_width(labels)) {
            let named = known.len() == width;
            return Ok(Self::new(problem, if named { known } else { default_names(width) }));
        }
        let mut names = BTreeSet::new();
        for label in labels {
            names.extend(label_names(label, problem)?);
        }
        let least = if problem == ProblemType::SingleLabelClassification { 2 } else { 1 };
        let own_integers = known.iter().any(|name| is_integer(name));
        let by_name = || names.iter().all(|name| known.contains(name));
        let by_id = || !own_integers && names.iter().all(|name| id_below(known.len(), name).is_some());
        if known.len() >= least && (by_name() || by_id()) {
            return Ok(Self::new(problem, known));
        }
        if names.len() < least {
            bail_unusable!(
                "the training data has the labels {names:?}: a classifier needs at least {least} different ones"
            );
        }
        Ok(Self::new(problem, id2label::in_order(names)))
    }

    /// The class of each record, where every one has a single label; a label that can't be used is a class of its own.
    pub fn classes_of(labels: &[&Value], problem: Option<ProblemType>) -> Option<Vec<String>> {
        let problem = problem.unwrap_or_else(|| problem_of(labels));
        let name = |label: &&Value| match label_names(label, problem) {
            Ok(names) => names.join(" "),
            Err(_) => label.to_string(),
        };
        (problem == ProblemType::SingleLabelClassification).then(|| labels.iter().map(name).collect())
    }

    /// The places of labels of training data that are of another kind than the others, and what is wrong with each.
    pub fn unfit(labels: &[&Value], problem: Option<ProblemType>) -> Vec<(usize, anyhow::Error)> {
        let problem = problem.unwrap_or_else(|| problem_of(labels));
        if problem == ProblemType::MultiLabelClassification && multi_hot_width(labels).is_some() {
            return Vec::new();
        }
        let are_named = labels.iter().any(|label| label.as_str().is_some_and(|name| !is_integer(name)));
        let check = |label: &Value| match problem {
            ProblemType::Regression => number_of(label).map(drop),
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
    pub fn targets(&self, labels: &[&Value]) -> Vec<Result<Wanted>> {
        let multi_hot = self.are_multi_hot(labels);
        labels.iter().map(|label| self.read(label, multi_hot)).collect()
    }

    /// Reads one label that stands alone.
    ///
    /// # Errors
    /// As [`TextClassification::targets`].
    pub fn target(&self, label: &Value) -> Result<Wanted> {
        self.read(label, self.are_multi_hot(&[label]))
    }

    fn are_multi_hot(&self, labels: &[&Value]) -> bool {
        let width = multi_hot_width(labels);
        let named = ["0", "1"].iter().all(|bit| self.labels.iter().any(|name| name == bit));
        // a model of the labels 0 and 1 reads [0, 1] as their names
        let as_names = || named && labels.iter().all(|label| label_names(label, self.problem).is_ok());
        self.problem == ProblemType::MultiLabelClassification
            && width == Some(self.labels.len())
            && !as_names()
    }

    fn read(&self, label: &Value, multi_hot: bool) -> Result<Wanted> {
        if self.problem == ProblemType::Regression {
            return Ok(Wanted::Number(number_of(label)?));
        }
        if let (true, Some(list)) = (multi_hot, label.as_array()) {
            let ids = (0..).zip(list).filter(|(_, value)| bit(value) == Some(true));
            return Ok(Wanted::Classes(ids.map(|(id, _)| id).collect()));
        }
        let mut ids = Vec::new();
        for name in label_names(label, self.problem)? {
            ids.push(self.id_of(&name)?);
        }
        if self.problem == ProblemType::SingleLabelClassification {
            return Ok(Wanted::Class(ids[0]));
        }
        ids.sort_unstable();
        ids.dedup();
        Ok(Wanted::Classes(ids))
    }

    /// An integer is an id only where no label is an integer itself.
    fn id_of(&self, name: &str) -> Result<u32> {
        let by_name = self.labels.iter().position(|known| known == name);
        let by_id = || {
            id_below(self.labels.len(), name).filter(|_| !self.labels.iter().any(|known| is_integer(known)))
        };
        by_name.or_else(by_id).map(|id| id as u32).ok_or_else(|| {
            unusable!("label \"{name}\" is not one of the model's labels: {}", id2label::told(&self.labels))
        })
    }
}

/// What labels of training data ask for. A few that are no numbers among fractions are faults, not classes.
fn problem_of(labels: &[&Value]) -> ProblemType {
    let numbers = labels.iter().filter(|label| as_number(label).is_some()).count();
    if labels.iter().any(|label| label.is_array()) {
        ProblemType::MultiLabelClassification
    } else if numbers * 2 > labels.len() && labels.iter().any(|label| is_fraction(label)) {
        ProblemType::Regression
    } else {
        ProblemType::SingleLabelClassification
    }
}

/// The id that a name is, as it is written in `id2label`: not `01`, not `+1`.
fn id_below(labels: usize, name: &str) -> Option<usize> {
    name.parse().ok().filter(|id: &usize| *id < labels && id.to_string() == name)
}

/// The names that a label gives: one, or those of a list.
fn label_names(label: &Value, problem: ProblemType) -> Result<Vec<String>> {
    match (label, problem) {
        (Value::Array(list), ProblemType::MultiLabelClassification) => {
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
