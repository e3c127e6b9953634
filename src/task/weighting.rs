//! Losses in which not every example counts alike: weights of labels, and less of what is known well (focal loss).

use std::path::{Path, PathBuf};

use anyhow::Context;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::SharedTrainingFlags;
use super::id2label;
use crate::say::nearest;
use crate::{Result, bail_unusable, unusable};

/// The largest exponent of the focal loss that is believed.
const MOST_GAMMA: f64 = 100.0;
/// The least and the largest weight of a label.
const WEIGHTS: std::ops::RangeInclusive<f64> = 1e-6..=1e6;
/// The most bytes of a file of weights.
const MOST_BYTES: u64 = 16 << 20;
/// What 1 − p is at least in the focal loss, of which a power below 1 has no slope at 0.
const LEAST: f64 = 1e-7;

/// Where weights of labels come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum ClassWeights {
    /// From how often the labels stand in the training data.
    Balanced,
    /// From a file of labels and numbers.
    File(PathBuf),
}

impl From<String> for ClassWeights {
    fn from(text: String) -> Self {
        if text == "balanced" { Self::Balanced } else { Self::File(text.into()) }
    }
}

impl From<ClassWeights> for String {
    fn from(weights: ClassWeights) -> Self {
        match weights {
            ClassWeights::Balanced => "balanced".to_owned(),
            ClassWeights::File(path) => path.display().to_string(),
        }
    }
}

/// How much the examples of each label count in the loss that is learnt. Evaluations measure the plain one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Weighting {
    /// A number a label, where they are not all 1.
    labels: Option<Vec<f32>>,
    focal_gamma: f64,
}

impl Weighting {
    /// What was asked for. `balanced` gives the weights that the training data ask for.
    ///
    /// # Errors
    /// Unusable: numbers that are none of weights, or a file that can't be read or speaks of other labels.
    pub fn new(
        flags: &SharedTrainingFlags,
        labels: &[String],
        balanced: impl FnOnce() -> Vec<f32>,
    ) -> Result<Self> {
        let focal_gamma = flags.focal_gamma.unwrap_or(0.0);
        if !(0.0..=MOST_GAMMA).contains(&focal_gamma) {
            bail_unusable!("--focal-gamma is {focal_gamma}, expected 0 to {MOST_GAMMA}");
        }
        let labels = match &flags.class_weights {
            None => None,
            Some(ClassWeights::Balanced) => Some(balanced()),
            Some(ClassWeights::File(path)) => {
                Some(read(path, labels).with_context(|| format!("--class-weights {}", path.display()))?)
            }
        };
        Ok(Self { labels, focal_gamma })
    }

    /// Whether every example counts alike.
    pub fn is_plain(&self) -> bool {
        self.labels.is_none() && self.focal_gamma == 0.0
    }

    /// The weight of a label.
    pub fn of(&self, label: u32) -> f64 {
        self.labels.as_ref().map_or(1.0, |weights| f64::from(weights[label as usize]))
    }

    /// The weights, label by label, where there are any.
    pub fn by_label<'a>(&self, labels: &'a [String]) -> Vec<(&'a str, f32)> {
        let weights = self.labels.iter().flatten();
        labels.iter().map(String::as_str).zip(weights.copied()).collect()
    }

    /// What is told of it before the first step.
    pub fn told(&self, labels: &[String]) -> Option<String> {
        let weights: Vec<String> =
            self.by_label(labels).iter().map(|(name, weight)| format!("{name} {weight:.4}")).collect();
        let weights = (!weights.is_empty()).then(|| format!("class weights: {}", id2label::told(&weights)));
        let focal = (self.focal_gamma > 0.0).then(|| format!("focal loss, gamma {}", self.focal_gamma));
        let told: Vec<String> = weights.into_iter().chain(focal).collect();
        (!told.is_empty()).then(|| told.join("; "))
    }

    /// The sum over rows of scores, (rows, C), of those that have a target: `torch.nn.CrossEntropyLoss`'s with its
    /// `weight` and `label_smoothing`, times (1 − p)^gamma for p the target's probability (Lin et al. 2017,
    /// arXiv:1708.02002). A mean divides it by the sum of the targets' weights.
    pub fn of_rows(&self, scores: &Tensor, targets: &[Option<u32>], smoothing: f64) -> Result<Tensor> {
        let (rows, labels) = scores.dims2()?;
        let outside = targets.iter().flatten().find(|&&id| id as usize >= labels);
        anyhow::ensure!(outside.is_none() && targets.len() == rows, "targets of other scores");
        let device = scores.device();
        let ids: Vec<u32> = targets.iter().map(|target| target.unwrap_or(0)).collect();
        let weights: Vec<f32> = targets.iter().map(|id| id.map_or(0.0, |id| self.of(id) as f32)).collect();
        let log_p = candle_nn::ops::log_softmax(scores, 1)?;
        let of_targets = log_p.gather(&Tensor::from_vec(ids, (rows, 1), device)?, 1)?.squeeze(1)?;
        let mut losses =
            (&of_targets * Tensor::from_vec(weights, rows, device)?)?.affine(smoothing - 1.0, 0.0)?;
        if smoothing > 0.0 {
            let share = |(target, id): (&Option<u32>, u32)| target.map_or(0.0, |_| self.of(id) as f32);
            let shares =
                targets.iter().flat_map(|target| (0..labels as u32).map(move |id| share((target, id))));
            let shares = Tensor::from_vec(shares.collect(), (rows, labels), device)?;
            losses = (losses - ((log_p * shares)?.sum(1)? * (smoothing / labels as f64))?)?;
        }
        if self.focal_gamma > 0.0 {
            losses = (losses * self.focal(&of_targets.exp()?)?)?;
        }
        Ok(losses.sum_all()?)
    }

    /// The sum over examples of several labels, (B, C), each a mean over its labels: `torch.nn.BCEWithLogitsLoss`'s with
    /// the weights as its `pos_weight`, times (1 − p)^gamma for p the probability of what is so.
    pub fn of_labels(&self, scores: &Tensor, wanted: &Tensor) -> Result<Tensor> {
        let (_, labels) = scores.dims2()?;
        // −x of a label that is there, x of one that is not: −log p = log(1 + e^that)
        let plain = softplus(&(scores * wanted.affine(-2.0, 1.0)?)?)?;
        let mut losses = plain.clone();
        if let Some(weights) = &self.labels {
            let more: Vec<f32> = weights.iter().map(|weight| weight - 1.0).collect();
            let more = Tensor::from_vec(more, (1, labels), scores.device())?;
            losses = (losses * (wanted.broadcast_mul(&more)? + 1.0)?)?;
        }
        if self.focal_gamma > 0.0 {
            losses = (losses * self.focal(&plain.neg()?.exp()?)?)?;
        }
        Ok((losses.sum_all()? / labels as f64)?)
    }

    /// (1 − p)^gamma.
    fn focal(&self, p: &Tensor) -> Result<Tensor> {
        Ok(p.affine(-1.0, 1.0)?.maximum(LEAST)?.powf(self.focal_gamma)?)
    }
}

/// log(1 + e^x), which does not overflow: max(x, 0) + log(1 + e^−|x|). |x| is taken as 2 · max(x, 0) − x, so that the slope
/// at 0 is the half that it is.
pub fn softplus(x: &Tensor) -> Result<Tensor> {
    let positive = x.relu()?;
    let magnitude = ((&positive * 2.0)? - x)?;
    Ok((positive + (magnitude.neg()?.exp()? + 1.0)?.log()?)?)
}

/// Weights with which every label counts alike, from how often each is met: n / (labels · count), scikit-learn's
/// `balanced`. A label that is never met weighs 1 and is not counted.
pub fn balanced(counts: &[usize]) -> Vec<f32> {
    let (n, met) = (counts.iter().sum::<usize>(), counts.iter().filter(|&&count| count > 0).count());
    let weight = |&count: &usize| match count {
        0 => 1.0,
        count => (n as f64 / (met as f64 * count as f64)) as f32,
    };
    counts.iter().map(weight).collect()
}

/// The same where each of n examples may have several: how many have it not for each that has it, as PyTorch's
/// documentation of `pos_weight` says. A label that all or none have weighs 1.
pub fn balanced_of_several(counts: &[usize], n: usize) -> Vec<f32> {
    let weight = |&count: &usize| match count {
        0 => 1.0,
        count if count >= n => 1.0,
        count => ((n - count) as f64 / count as f64) as f32,
    };
    counts.iter().map(weight).collect()
}

/// Reads a file of labels and their weights, JSON or TOML; labels that it does not have weigh 1.
///
/// # Errors
/// Unusable: it can't be read, or has a label that is none of these, or what is no weight.
fn read(path: &Path, labels: &[String]) -> Result<Vec<f32>> {
    let unreadable = |e: std::io::Error| unusable!("can't be read: {e}");
    let size = path.metadata().map_err(unreadable)?.len();
    if size > MOST_BYTES {
        bail_unusable!("has {size} bytes, expected at most {MOST_BYTES}");
    }
    let text = std::fs::read_to_string(path).map_err(unreadable)?;
    let weights: Map<String, Value> = match path.extension().and_then(|end| end.to_str()) {
        Some("json") => {
            serde_json::from_str(&text).map_err(|e| unusable!("no JSON object of labels and weights: {e}"))?
        }
        Some("toml") => {
            toml::from_str(&text).map_err(|e| unusable!("no TOML table of labels and weights: {e}"))?
        }
        _ => bail_unusable!("expected balanced, or a .json or a .toml file of labels and weights"),
    };
    let mut numbers = vec![1.0; labels.len()];
    for (label, weight) in &weights {
        let Some(at) = labels.iter().position(|known| known == label) else {
            let near = nearest(label, labels).map(|near| format!(", did you mean {near:?}?"));
            bail_unusable!(
                "{label:?} is not one of the labels{}; they are {}",
                near.unwrap_or_default(),
                id2label::told(labels)
            );
        };
        let number = weight.as_f64().filter(|number| WEIGHTS.contains(number)).ok_or_else(|| {
            unusable!(
                "{label:?} weighs {weight}, expected a number from {:e} to {:e}",
                WEIGHTS.start(),
                WEIGHTS.end()
            )
        })?;
        numbers[at] = number as f32;
    }
    Ok(numbers)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    const SCORES: [[f32; 3]; 4] = [[1.0, -2.0, 0.5], [0.25, 3.0, -1.0], [-0.5, 0.0, 2.0], [1.5, 1.0, -3.0]];
    const TARGETS: [Option<u32>; 4] = [Some(0), Some(2), Some(1), Some(0)];

    fn weighting(weights: Option<[f32; 3]>, focal_gamma: f64) -> Weighting {
        Weighting { labels: weights.map(Vec::from), focal_gamma }
    }

    fn holds(found: &Tensor, scores: &Var, name: &str, loss: f32, gradient: [f32; 12]) {
        let value = found.to_scalar::<f32>().unwrap();
        assert!((value - loss).abs() < 1e-6, "{name}: {value}, PyTorch {loss}");
        let store = found.backward().unwrap();
        let found: Vec<f32> =
            store.get(scores.as_tensor()).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        for (found, wanted) in found.iter().zip(gradient) {
            assert!((found - wanted).abs() < 1e-6, "{name}: {found}, PyTorch {wanted}");
        }
    }

    /// PyTorch 2's, with `x` the scores, `t` the targets, `w = [0.5, 2, 1.5]` and `lp` the targets' log-softmax:
    /// `F.cross_entropy(x, t, w)`, the same with `label_smoothing=0.1`, `((1 - lp.exp()) ** 2 * -lp).mean()`, and
    /// `((1 - lp.exp()) ** 2 * -lp * w[t]).sum() / w[t].sum()`; gradients by `torch.autograd.grad`.
    #[test]
    fn losses_of_one_label_are_pytorchs() {
        let weights = Some([0.5, 2.0, 1.5]);
        for (name, weights, gamma, smoothing, loss, gradient) in [
            (
                "weights",
                weights,
                0.0,
                0.0,
                2.445_512,
                [
                    -0.0440279, 0.0033399, 0.040688, 0.0196899, 0.3080021, -0.3276921, 0.0299668, -0.3950375,
                    0.3650707, -0.0424239, 0.0416609, 0.000763,
                ],
            ),
            (
                "weights and smoothing",
                weights,
                0.0,
                0.1,
                2.439_259_8,
                [
                    -0.02544, -0.0109183, 0.0363582, 0.0157674, 0.2897651, -0.3055325, 0.0252642, -0.3670548,
                    0.3417905, -0.0235687, 0.0337895, -0.0102209,
                ],
            ),
            (
                "focal",
                None,
                2.0,
                0.0,
                1.456_740_9,
                [
                    -0.0394716, 0.0029942, 0.0364774, 0.0162762, 0.2546025, -0.2708787, 0.0206344,
                    -0.2720134, 0.251379, -0.0355882, 0.0349481, 0.0006401,
                ],
            ),
            (
                "focal and weights",
                weights,
                2.0,
                0.0,
                2.101_964,
                [
                    -0.0175429, 0.0013308, 0.0162122, 0.0217016, 0.33947, -0.3611716, 0.0366835, -0.4835794,
                    0.446896, -0.015817, 0.0155325, 0.0002845,
                ],
            ),
        ] {
            let scores = Var::new(&SCORES, &Device::Cpu).unwrap();
            let weighting = weighting(weights, gamma);
            let of: f64 = TARGETS.iter().flatten().map(|&id| weighting.of(id)).sum();
            let found = (weighting.of_rows(&scores, &TARGETS, smoothing).unwrap() / of).unwrap();
            holds(&found, &scores, name, loss, gradient);
            // rows without a target add nothing
            let more = Tensor::cat(&[scores.as_tensor(), scores.as_tensor()], 0).unwrap();
            let targets = [&TARGETS[..], &[None; 4]].concat();
            let more = (weighting.of_rows(&more, &targets, smoothing).unwrap() / of).unwrap();
            assert!((more.to_scalar::<f32>().unwrap() - loss).abs() < 1e-6, "{name}");
        }
    }

    /// The same with `y` below: `F.binary_cross_entropy_with_logits(x, y, pos_weight=w)`, and that with
    /// `reduction="none"`, without and with `pos_weight`, times `(1 - pt) ** 1.5`, where `p = x.sigmoid()` and
    /// `pt = p * y + (1 - p) * (1 - y)`, as in torchvision's `sigmoid_focal_loss`; `.mean()`.
    #[test]
    fn losses_of_several_labels_are_pytorchs() {
        let wanted = [[1f32, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0]];
        let wanted = Tensor::new(&wanted, &Device::Cpu).unwrap();
        let weights = Some([0.5, 2.0, 1.5]);
        for (name, weights, gamma, loss, gradient) in [
            (
                "pos_weight",
                weights,
                0.0,
                0.667_420_3,
                [
                    -0.0112059, 0.0099336, -0.0471926, 0.046848, 0.0793812, 0.0224118, 0.0314617, -0.0833333,
                    -0.0149004, -0.0076011, -0.0448236, 0.0039522,
                ],
            ),
            (
                "focal",
                None,
                1.5,
                0.317_098_35,
                [
                    -0.0071184, 0.000984, -0.0158553, 0.0388001, 0.090604, 0.0071184, 0.0158553, -0.0300479,
                    -0.000984, -0.0027883, -0.0071184, 0.0001006,
                ],
            ),
            (
                "focal and pos_weight",
                weights,
                1.5,
                0.343_486_93,
                [
                    -0.0035592, 0.000984, -0.0237829, 0.0388001, 0.090604, 0.0071184, 0.0158553, -0.0600958,
                    -0.0014759, -0.0013942, -0.0142368, 0.0001006,
                ],
            ),
        ] {
            let scores = Var::new(&SCORES, &Device::Cpu).unwrap();
            let found = (weighting(weights, gamma).of_labels(&scores, &wanted).unwrap() / 4.0).unwrap();
            holds(&found, &scores, name, loss, gradient);
        }
    }

    #[test]
    fn what_is_certain_has_a_finite_loss_and_gradient() {
        let scores = Var::new(&[[200f32, -200.0], [-200.0, 200.0]], &Device::Cpu).unwrap();
        let wanted = Tensor::new(&[[1f32, 0.0], [1.0, 0.0]], &Device::Cpu).unwrap();
        for gamma in [0.5, 1.0, 2.0] {
            let weighting = weighting(None, gamma);
            let rows = weighting.of_rows(&scores, &[Some(0), Some(0)], 0.0).unwrap();
            for loss in [rows, weighting.of_labels(&scores, &wanted).unwrap()] {
                let store = loss.backward().unwrap();
                let gradient = store.get(scores.as_tensor()).unwrap().flatten_all().unwrap();
                assert!(gradient.to_vec1::<f32>().unwrap().iter().all(|x| x.is_finite()), "{gamma}");
                assert!(loss.to_scalar::<f32>().unwrap().is_finite());
            }
        }
    }

    /// scikit-learn's `compute_class_weight("balanced", classes=[0, 1, 2], y=[0] * 6 + [1] * 3 + [2])`.
    #[test]
    fn balanced_weights_are_scikit_learns() {
        assert_eq!(balanced(&[6, 3, 1]), [0.555_555_6, 1.111_111_2, 3.333_333_3]);
        assert_eq!(balanced(&[6, 3, 0, 1]), [0.555_555_6, 1.111_111_2, 1.0, 3.333_333_3]);
        assert_eq!(balanced_of_several(&[6, 0, 10, 1], 10), [4.0 / 6.0, 1.0, 1.0, 9.0]);
    }

    #[test]
    fn files_of_weights_are_read_and_wrong_ones_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let labels = ["negative", "neutral", "positive"].map(str::to_owned);
        let found = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            read(&path, &labels).map_err(|error| {
                assert_eq!(crate::error::exit_code(&error), 2);
                error.to_string()
            })
        };
        assert_eq!(found("a.json", r#"{"positive": 2, "negative": 0.5}"#).unwrap(), [0.5, 1.0, 2.0]);
        assert_eq!(found("a.toml", "positive = 2\nnegative = 0.5\n").unwrap(), [0.5, 1.0, 2.0]);
        for (name, text, says) in [
            ("b.json", r#"{"postive": 2}"#, "did you mean \"positive\"?"),
            ("b.json", r#"{"positive": 0}"#, "weighs 0, expected a number"),
            ("b.json", r#"{"positive": "2"}"#, "weighs \"2\", expected a number"),
            ("b.json", "[1, 2]", "no JSON object"),
            ("b.toml", "positive = nan", "weighs null, expected a number"),
            ("b.toml", "positive", "no TOML table"),
            ("balnced", "", "expected balanced, or a .json"),
        ] {
            let said = found(name, text).unwrap_err();
            assert!(said.contains(says), "{said}");
        }
        assert!(
            read(&dir.path().join("none.json"), &labels).unwrap_err().to_string().contains("can't be read")
        );
    }
}
