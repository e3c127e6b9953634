//! A teacher's logits → what a student loses by answering otherwise: knowledge distillation.
//!
//! With the student's scores z, the teacher's t, a temperature T and a weight A, as Hinton et al. 2015 (arXiv:1503.02531,
//! section 2) have it:
//!
//! `loss = (1 − A) · loss of the labels + A · T² · KL(softmax(t / T) ‖ softmax(z / T))`,
//!
//! each a mean over the same rows. T² keeps the size of the second gradient whatever T is. PyTorch writes it
//! `F.kl_div(F.log_softmax(z / T, -1), F.log_softmax(t / T, -1), reduction="batchmean", log_target=True) * T**2`.

use candle_core::{DType, Tensor};

use super::SharedTrainingFlags;
use super::weighting::softplus;
use crate::{Result, bail_unusable};

/// Temperatures that are believed.
const TEMPERATURES: std::ops::RangeInclusive<f64> = 0.01..=1000.0;
const DEFAULT_TEMPERATURE: f64 = 2.0;
const DEFAULT_WEIGHT: f64 = 0.5;

/// How a student learns from a teacher.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Distillation {
    /// T: what logits are divided by; above 1, what is unlikely counts more.
    pub temperature: f64,
    /// A: the teacher's share of the loss. At 1 labels count nothing.
    pub weight: f64,
}

impl Distillation {
    /// What a run's log calls both terms of the loss, in their order.
    pub const LOSSES: &'static [&'static str] = &["label_loss", "teacher_loss"];

    /// What was asked for, if there is a teacher.
    ///
    /// # Errors
    /// Unusable: names the flag.
    pub fn asked(flags: &SharedTrainingFlags) -> Result<Option<Self>> {
        let (temperature, weight) = (flags.distillation_temperature, flags.distillation_weight);
        if flags.teacher.is_none() {
            for (flag, given) in
                [("--distillation-temperature", temperature), ("--distillation-weight", weight)]
            {
                if given.is_some() {
                    bail_unusable!("{flag} says how a teacher is learnt from: give --teacher");
                }
            }
            return Ok(None);
        }
        let temperature = temperature.unwrap_or(DEFAULT_TEMPERATURE);
        if !TEMPERATURES.contains(&temperature) {
            bail_unusable!(
                "--distillation-temperature is {temperature}, expected {} to {}",
                TEMPERATURES.start(),
                TEMPERATURES.end()
            );
        }
        let weight = weight.unwrap_or(DEFAULT_WEIGHT);
        if !(weight > 0.0 && weight <= 1.0) {
            bail_unusable!("--distillation-weight is {weight}, expected more than 0 and at most 1");
        }
        Ok(Some(Self { temperature, weight }))
    }

    /// Whether labels count, too.
    pub fn takes_labels(&self) -> bool {
        self.weight < 1.0
    }

    /// Both terms of the loss: what labels ask for, which is not computed where it counts nothing, and what the teacher
    /// does. Each comes as a mean.
    pub fn terms(&self, labels: impl FnOnce() -> Result<Tensor>, teacher: &Tensor) -> Result<Vec<Tensor>> {
        let labels = match self.takes_labels() {
            true => (labels()? * (1.0 - self.weight))?,
            false => Tensor::zeros((), DType::F32, teacher.device())?,
        };
        Ok(vec![labels, (teacher * self.weight)?])
    }

    /// The sum over rows of scores, (rows, C), of those of which a teacher has said something: T² · KL of its softmax and
    /// the student's.
    pub fn of_rows(&self, scores: &Tensor, taught: &[Option<&[f32]>]) -> Result<Tensor> {
        let (rows, width) = check(scores, taught)?;
        let (mut p, mut log_p) = (vec![0f32; rows * width], vec![0f32; rows * width]);
        for (row, logits) in taught.iter().enumerate().filter_map(|(row, logits)| Some((row, (*logits)?))) {
            let scaled: Vec<f64> = logits.iter().map(|&x| f64::from(x) / self.temperature).collect();
            let most = scaled.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let log_sum = most + scaled.iter().map(|x| (x - most).exp()).sum::<f64>().ln();
            for (column, x) in scaled.iter().enumerate() {
                log_p[row * width + column] = (x - log_sum) as f32;
                p[row * width + column] = (x - log_sum).exp() as f32;
            }
        }
        let [p, log_p] = [p, log_p].map(|values| Tensor::from_vec(values, (rows, width), scores.device()));
        let log_q = candle_nn::ops::log_softmax(&(scores / self.temperature)?, 1)?;
        Ok(((p? * (log_p? - log_q)?)?.sum_all()? * self.temperature.powi(2))?)
    }

    /// The same where each of C labels is there or not: of the two sigmoids, and a mean over the labels.
    pub fn of_labels(&self, scores: &Tensor, taught: &[Option<&[f32]>]) -> Result<Tensor> {
        let (rows, width) = check(scores, taught)?;
        // without a teacher: a half and its own loss, which count nothing
        let (mut p, mut least, mut counts) =
            (vec![0.5f32; rows * width], vec![0f32; rows * width], vec![0f32; rows]);
        for (row, logits) in taught.iter().enumerate().filter_map(|(row, logits)| Some((row, (*logits)?))) {
            counts[row] = 1.0;
            for (column, &x) in logits.iter().enumerate() {
                let x = f64::from(x) / self.temperature;
                let of_one = 1.0 / (1.0 + (-x).exp());
                p[row * width + column] = of_one as f32;
                // −p · log p − (1 − p) · log(1 − p)
                least[row * width + column] = (x.max(0.0) + (-x.abs()).exp().ln_1p() - x * of_one) as f32;
            }
        }
        let [p, least] = [p, least].map(|values| Tensor::from_vec(values, (rows, width), scores.device()));
        let counts = Tensor::from_vec(counts, (rows, 1), scores.device())?;
        let scaled = (scores / self.temperature)?;
        // −p · log σ(z) − (1 − p) · log(1 − σ(z)), less what it is at least
        let losses = ((softplus(&scaled)? - (scaled * p?)?)? - least?)?;
        let sum = losses.broadcast_mul(&counts)?.sum_all()?;
        Ok((sum * (self.temperature.powi(2) / width as f64))?)
    }

    /// The same of a number, (rows, 1): the square of what lies between. It has no temperature.
    pub fn of_numbers(&self, scores: &Tensor, taught: &[Option<&[f32]>]) -> Result<Tensor> {
        let (rows, width) = check(scores, taught)?;
        let (mut wanted, mut counts) = (vec![0f32; rows * width], vec![0f32; rows]);
        for (row, numbers) in taught.iter().enumerate().filter_map(|(row, logits)| Some((row, (*logits)?))) {
            counts[row] = 1.0;
            wanted[row * width..][..width].copy_from_slice(numbers);
        }
        let wanted = Tensor::from_vec(wanted, (rows, width), scores.device())?;
        let counts = Tensor::from_vec(counts, (rows, 1), scores.device())?;
        Ok((scores - wanted)?.sqr()?.broadcast_mul(&counts)?.sum_all()?)
    }
}

/// Whether each row's teacher has said as many numbers as the row has.
fn check(scores: &Tensor, taught: &[Option<&[f32]>]) -> Result<(usize, usize)> {
    let (rows, width) = scores.dims2()?;
    let fits = taught.len() == rows && taught.iter().flatten().all(|logits| logits.len() == width);
    anyhow::ensure!(fits, "a teacher's logits of other scores");
    Ok((rows, width))
}

/// Where each of a student's labels stands among its teacher's, by name.
///
/// # Errors
/// Unusable: they are not the same labels; lists both.
pub fn places(labels: &[String], teachers: &[String]) -> Result<Vec<usize>> {
    let place = |label| teachers.iter().position(|own| own == label);
    let places: Option<Vec<usize>> = labels.iter().map(place).collect();
    match places.filter(|places| places.len() == teachers.len()) {
        Some(places) => Ok(places),
        None => bail_unusable!(
            "it knows the labels {}; those to be learnt are {}: both have to be the same, in any order",
            super::id2label::told(teachers),
            super::id2label::told(labels)
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use candle_core::{Device, Var};
    use serde_json::Value;

    use super::*;

    fn flat(value: &Value) -> Vec<f32> {
        match value {
            Value::Array(rows) => rows.iter().flat_map(flat).collect(),
            number => vec![number.as_f64().unwrap() as f32],
        }
    }

    fn near(found: f32, wanted: f32) -> bool {
        (found - wanted).abs() <= 2e-6 * wanted.abs().max(1.0)
    }

    /// `terms_of_logits` of `scripts/reference-distillation`; some of the logits are as far apart as 130.
    #[test]
    fn terms_and_their_gradients_are_pytorchs() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/distillation.json");
        let numbers: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let numbers = &numbers["logits"];
        let mut kinds = Vec::new();
        for term in numbers["terms"].as_array().unwrap() {
            let kind = term["kind"].as_str().unwrap();
            let width = if kind == "numbers" { 1 } else { 3 };
            let rows = |name: &str| -> Vec<Vec<f32>> {
                flat(&numbers[name]).chunks(3).map(|row| row[..width].to_vec()).collect()
            };
            let (scores, teacher) = (rows("scores"), rows("teacher"));
            let scores = Var::from_vec(scores.concat(), (scores.len(), width), &Device::Cpu).unwrap();
            let temperature = term["temperature"].as_f64().unwrap();
            let distillation = Distillation { temperature, weight: 0.5 };
            let sum = |scores: &Tensor, taught: &[Option<&[f32]>]| match kind {
                "rows" => distillation.of_rows(scores, taught).unwrap(),
                "labels" => distillation.of_labels(scores, taught).unwrap(),
                _ => distillation.of_numbers(scores, taught).unwrap(),
            };
            let taught: Vec<Option<&[f32]>> = teacher.iter().map(|row| Some(&row[..])).collect();
            let found = sum(scores.as_tensor(), &taught);
            let (value, wanted) = (found.to_scalar::<f32>().unwrap(), flat(&term["sum"])[0]);
            assert!(near(value, wanted), "{kind}, {temperature}: {value}, PyTorch {wanted}");
            let store = found.backward().unwrap();
            let gradient = store.get(scores.as_tensor()).unwrap().flatten_all().unwrap();
            let wanted: Vec<f32> =
                flat(&term["gradient"]).chunks(3).flat_map(|row| row[..width].to_vec()).collect();
            for (found, wanted) in gradient.to_vec1::<f32>().unwrap().into_iter().zip(wanted) {
                assert!(near(found, wanted), "{kind}, {temperature}: {found}, PyTorch {wanted}");
            }
            // rows of which nothing was said add nothing
            let more = Tensor::cat(&[scores.as_tensor(), scores.as_tensor()], 0).unwrap();
            let more = sum(&more, &[&taught[..], &vec![None; taught.len()]].concat());
            assert!(near(more.to_scalar().unwrap(), value), "{kind}, {temperature}");
            kinds.push(kind);
        }
        kinds.dedup();
        assert_eq!(kinds, ["rows", "labels", "numbers"]);
    }

    #[test]
    fn logits_of_other_rows_are_an_error() {
        let scores = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
        let distillation = Distillation { temperature: 2.0, weight: 1.0 };
        assert!(distillation.of_rows(&scores, &[None]).is_err());
        assert!(distillation.of_rows(&scores, &[None, Some(&[1.0, 2.0])]).is_err());
        assert_eq!(distillation.of_rows(&scores, &[None, None]).unwrap().to_scalar::<f32>().unwrap(), 0.0);
    }

    #[test]
    fn labels_are_found_by_name_and_others_refused_with_both_lists() {
        let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        assert_eq!(places(&names(&["a", "b", "c"]), &names(&["c", "a", "b"])).unwrap(), [1, 2, 0]);
        for teachers in [&["a", "b"][..], &["a", "b", "d"], &["a", "b", "c", "d"]] {
            let error = places(&names(&["a", "b", "c"]), &names(teachers)).unwrap_err();
            assert_eq!(crate::error::exit_code(&error), 2);
            let said = error.to_string();
            assert!(said.contains(&teachers.join(", ")) && said.contains("learnt are a, b, c:"), "{said}");
        }
    }
}
