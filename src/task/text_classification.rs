//! Text classification: one text or a pair → one label, several labels, or a number.

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{Dim, Metrics, Output, Target, metrics};
use crate::model::ops::Ops;
use crate::model::{Family, ModelConfig, heads};
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
    fn name(self) -> &'static str {
        match self {
            Self::SingleLabelClassification => "single_label_classification",
            Self::MultiLabelClassification => "multi_label_classification",
            Self::Regression => "regression",
        }
    }
}

/// The score above which a label of several is predicted: a logit above 0.
const THRESHOLD: f32 = 0.5;

impl TextClassification {
    /// Reads `problem_type` and `id2label` of a fine-tuned model. As in transformers, one label without a
    /// `problem_type` is a regression, and labels without names are `LABEL_0`, `LABEL_1` ….
    pub fn from_config(config: &ModelConfig) -> Result<Self> {
        let labels = match labels_of(config)? {
            Some(labels) => labels,
            None => {
                let n = config.raw.get("num_labels").and_then(Value::as_u64).unwrap_or(2);
                (0..n).map(|i| format!("LABEL_{i}")).collect()
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

    /// Finds out from the labels of the training data what is to be learnt.
    ///
    /// A list is multi label, a fraction a regression, all else a single label; `problem` overrides.
    /// Where the model's own `id2label` already names every label, its order is kept; integers inside its
    /// range are taken for its ids. Otherwise the labels are sorted (integers by value).
    ///
    /// # Errors
    /// Labels of mixed kinds, or fewer than two different labels.
    pub fn from_labels(labels: &[&Value], problem: Option<Problem>, config: &ModelConfig) -> Result<Self> {
        let problem = match problem {
            Some(problem) => problem,
            None if labels.iter().any(|label| label.is_array()) => Problem::MultiLabelClassification,
            None if labels.iter().all(|label| as_number(label).is_some())
                && labels.iter().any(|label| as_integer(label).is_none()) =>
            {
                Problem::Regression
            }
            None => Problem::SingleLabelClassification,
        };
        if problem == Problem::Regression {
            return Ok(Self { problem, labels: vec!["LABEL_0".to_owned()] });
        }
        let mut names: Vec<String> = Vec::new();
        for label in labels {
            names.extend(label_names(label, problem)?);
        }
        names.sort_by(|a, b| match (a.parse::<i64>(), b.parse::<i64>()) {
            (Ok(a), Ok(b)) => a.cmp(&b),
            _ => a.cmp(b),
        });
        names.dedup();
        if let Some(known) = labels_of(config)? {
            let ids = 0..known.len();
            let by_name = names.iter().all(|name| known.contains(name));
            let by_id = names.iter().all(|name| name.parse().is_ok_and(|id: usize| ids.contains(&id)));
            if by_name || by_id {
                return Ok(Self { problem, labels: known });
            }
        }
        let least = if problem == Problem::SingleLabelClassification { 2 } else { 1 };
        if names.len() < least {
            bail_unusable!(
                "the training data has the labels {names:?}: a classifier needs at least {least} different ones"
            );
        }
        Ok(Self { problem, labels: names })
    }

    /// Reads one label of a record.
    ///
    /// # Errors
    /// Names the label that was found and what was expected.
    pub fn target(&self, label: &Value) -> Result<Target> {
        if self.problem == Problem::Regression {
            let number = as_number(label).ok_or_else(|| {
                unusable!("label is {label}, expected a number (the problem is a regression)")
            })?;
            return Ok(Target::Number(number as f32));
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

    fn id_of(&self, name: &str) -> Result<u32> {
        let by_name = self.labels.iter().position(|known| known == name);
        let by_id = || name.parse().ok().filter(|&id: &usize| id < self.labels.len());
        by_name.or_else(by_id).map(|id| id as u32).ok_or_else(|| {
            unusable!("label \"{name}\" is not one of the model's labels: {}", self.labels.join(", "))
        })
    }

    pub(super) fn define<O: Ops>(&self, o: &O, family: &Family) -> Result<O::X> {
        heads::sequence_classification(o, family, self.labels.len())
    }

    pub(super) fn outputs(&self) -> Vec<Output> {
        vec![Output { name: "logits", dims: vec![Dim::Batch, Dim::Of(self.labels.len())] }]
    }

    pub(super) fn write_config(&self, config: &mut ModelConfig) {
        let family = match config.family {
            Family::Bert(_) => "Bert",
            Family::Gpt2(_) => "GPT2",
        };
        let id2label: Map<String, Value> =
            self.labels.iter().enumerate().map(|(id, name)| (id.to_string(), json!(name))).collect();
        let label2id: Map<String, Value> =
            self.labels.iter().enumerate().map(|(id, name)| (name.clone(), json!(id))).collect();
        let raw = &mut config.raw;
        raw.insert("architectures".to_owned(), json!([format!("{family}ForSequenceClassification")]));
        raw.insert("problem_type".to_owned(), json!(self.problem.name()));
        raw.insert("id2label".to_owned(), Value::Object(id2label));
        raw.insert("label2id".to_owned(), Value::Object(label2id));
        raw.remove("num_labels"); // transformers derives it from id2label
        if matches!(config.family, Family::Gpt2(_)) && raw.get("pad_token_id").is_none_or(Value::is_null) {
            // transformers finds the last token of a padded row by it
            let end = raw.get("eos_token_id").cloned().unwrap_or_else(|| json!(50_256));
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
                Target::Next(_) => {} // of another task
            }
        }
        matrix
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
                let best = argmax(&scores);
                record.insert("label".to_owned(), json!(self.labels[best]));
                record.insert("score".to_owned(), short(scores[best]));
                record.insert("scores".to_owned(), Value::Object(by_label()));
            }
            Problem::MultiLabelClassification => {
                let labels: Vec<&String> = self
                    .labels
                    .iter()
                    .zip(&scores)
                    .filter(|&(_, &score)| score > THRESHOLD)
                    .map(|(label, _)| label)
                    .collect();
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
    pub fn measure(&self, logits: &[Vec<f32>], targets: &[&Target]) -> Result<Metrics> {
        let width = self.labels.len();
        let matrix = Tensor::from_vec(logits.concat(), (logits.len(), width), &Device::Cpu)?;
        let loss = self.loss(&matrix.to_dtype(DType::F64)?, targets, 0.0)?.to_scalar::<f32>()?;
        let mut metrics = self.compare(logits, targets);
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
                        Target::Number(_) | Target::Next(_) => Vec::new(),
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

    /// The predicted label ids, ascending.
    fn predicted(&self, logits: &[f32]) -> Vec<u32> {
        match self.problem {
            Problem::MultiLabelClassification => {
                (0..).zip(logits).filter(|&(_, &x)| x > 0.0).map(|(id, _)| id).collect()
            }
            _ => vec![argmax(logits) as u32],
        }
    }
}

/// A number with the digits that tell it from every other f32, and no more.
fn short(x: f32) -> Value {
    json!(x.to_string().parse().unwrap_or(f64::from(x)))
}

fn argmax(values: &[f32]) -> usize {
    (0..values.len()).fold(0, |best, i| if values[i] > values[best] { i } else { best })
}

/// The labels that `id2label` names, by ascending id.
fn labels_of(config: &ModelConfig) -> Result<Option<Vec<String>>> {
    let Some(map) = config.raw.get("id2label").and_then(Value::as_object) else {
        return Ok(None);
    };
    let mut labels = vec![None; map.len()];
    for (id, name) in map {
        let slot = id.parse().ok().and_then(|id: usize| labels.get_mut(id));
        match (slot, name.as_str()) {
            (Some(slot), Some(name)) => *slot = Some(name.to_owned()),
            _ => bail_unusable!(
                "id2label has \"{id}\": {name}; expected the ids 0 to {} with names",
                map.len() - 1
            ),
        }
    }
    labels
        .into_iter()
        .collect::<Option<Vec<_>>>()
        .map(Some)
        .ok_or_else(|| unusable!("id2label repeats an id"))
}

fn label_names(label: &Value, problem: Problem) -> Result<Vec<String>> {
    let one = |label: &Value| match label {
        Value::String(name) => Ok(name.clone()),
        Value::Number(n) if n.is_i64() || n.is_u64() => Ok(n.to_string()),
        Value::Bool(flag) => Ok(u8::from(*flag).to_string()),
        other => Err(unusable!("label is {other}, expected a name or an integer")),
    };
    match (label, problem) {
        (Value::Array(list), Problem::MultiLabelClassification) => list.iter().map(one).collect(),
        (Value::Array(_), _) => {
            Err(unusable!("label is a list, expected one label (the problem is {})", problem.name()))
        }
        (label, _) => Ok(vec![one(label)?]),
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

fn as_integer(label: &Value) -> Option<i64> {
    match label {
        Value::Number(n) => n.as_i64(),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    }
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
        TextClassification::from_labels(&labels, None, &config(more))
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
            (json!(["1", "0.5"]), Regression, vec!["LABEL_0"]),
        ] {
            let task = found(labels.clone(), json!({})).unwrap();
            assert_eq!(
                (task.problem, task.labels),
                (problem, names.into_iter().map(str::to_owned).collect()),
                "{labels}"
            );
        }
        for labels in [json!(["a", "a"]), json!(["a", {"b": 1}]), json!([0.5, "a"])] {
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
