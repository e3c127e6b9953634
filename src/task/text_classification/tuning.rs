//! What is found on evaluation data behind training: from what probability on a label is said, and how sure a model is.
//! Read from and written to `config.json`, whose other keys `transformers` keeps.

use serde_json::{Map, Value, json};

use super::{ProblemType, TextClassification, TrainingFlags, Wanted};
use crate::say::nearest;
use crate::task::Measured;
use crate::task::scores::softmax;
use crate::{Result, bail_unusable, unusable};

/// The key of config.json with the thresholds: labels and probabilities.
const THRESHOLDS: &str = "thresholds";
/// The key with the temperature; `temperature` is that of generating.
const TEMPERATURE: &str = "calibration_temperature";
/// Beside it among what is measured: the error without it.
const ECE_BEFORE: &str = "ece_before";

/// From what probability on a label is said, where nothing else was found.
const EVEN: f64 = 0.5;
/// No threshold is nearer to 0 or 1.
const MARGIN: f64 = 1e-6;
/// Temperatures that are tried.
const TEMPERATURES: std::ops::RangeInclusive<f64> = 0.05..=20.0;
/// The golden section: each step leaves 0.618 of the range, so 60 leave nothing that a double tells apart.
const STEPS: usize = 60;
/// Bins of the expected calibration error.
const BINS: usize = 15;

/// What answers are made with, and what evaluations are to find.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tuning {
    /// A probability a label, of several labels.
    thresholds: Option<Vec<f64>>,
    /// What logits are divided by where they become probabilities, of one label.
    temperature: Option<f64>,
    /// Whether evaluations find the thresholds or the temperature that suit them best, and are measured with these.
    finds: bool,
}

impl Tuning {
    /// What a configuration says.
    ///
    /// # Errors
    /// Unusable: thresholds that are none, or of labels that are none; a temperature that is no number above 0.
    pub fn from_config(raw: &Map<String, Value>, problem: ProblemType, labels: &[String]) -> Result<Self> {
        let mut tuning = Self::default();
        let found = |key: &str| raw.get(key).filter(|value| !value.is_null());
        if let (ProblemType::MultiLabelClassification, Some(value)) = (problem, found(THRESHOLDS)) {
            let Value::Object(given) = value else {
                bail_unusable!("{THRESHOLDS} is {value}, expected an object of labels and probabilities");
            };
            let mut thresholds = vec![EVEN; labels.len()];
            for (label, threshold) in given {
                let Some(at) = labels.iter().position(|known| known == label) else {
                    let near = nearest(label, labels).map(|near| format!("; did you mean {near:?}?"));
                    bail_unusable!(
                        "{THRESHOLDS} has {label:?}, which is none of the labels{}",
                        near.unwrap_or_default()
                    );
                };
                thresholds[at] = threshold.as_f64().filter(|p| 0.0 < *p && *p < 1.0).ok_or_else(|| {
                    unusable!("{THRESHOLDS} has {label:?}: {threshold}, expected a number between 0 and 1")
                })?;
            }
            tuning.thresholds = Some(thresholds);
        }
        if let (ProblemType::SingleLabelClassification, Some(value)) = (problem, found(TEMPERATURE)) {
            let temperature = value.as_f64().filter(|t| TEMPERATURES.contains(t)).ok_or_else(|| {
                let (least, most) = (TEMPERATURES.start(), TEMPERATURES.end());
                unusable!("{TEMPERATURE} is {value}, expected a number from {least} to {most}")
            })?;
            tuning.temperature = Some(temperature);
        }
        Ok(tuning)
    }

    /// What flags of training ask for.
    ///
    /// # Errors
    /// Unusable: the problem has none of it.
    pub fn asked(flags: &TrainingFlags, problem: ProblemType) -> Result<Self> {
        let of = |problem| match problem {
            ProblemType::SingleLabelClassification => "one label a text",
            ProblemType::MultiLabelClassification => "several labels a text",
            ProblemType::Regression => "numbers",
        };
        for (flag, given, wanted) in [
            ("--tune-thresholds", flags.tune_thresholds, ProblemType::MultiLabelClassification),
            ("--calibrate", flags.calibrate, ProblemType::SingleLabelClassification),
        ] {
            if given && problem != wanted {
                bail_unusable!("{flag} is for {}, and the training data has {}", of(wanted), of(problem));
            }
        }
        Ok(Self { finds: flags.tune_thresholds || flags.calibrate, ..Self::default() })
    }

    /// Writes it into a configuration.
    pub fn write(&self, raw: &mut Map<String, Value>, labels: &[String]) {
        raw.remove(THRESHOLDS);
        raw.remove(TEMPERATURE);
        if let Some(thresholds) = &self.thresholds {
            raw.insert(THRESHOLDS.to_owned(), by_label(labels, thresholds));
        }
        if let Some(temperature) = self.temperature {
            raw.insert(TEMPERATURE.to_owned(), json!(temperature));
        }
    }

    /// Whether one of several labels is said, by its place and its logit. The logit is asked, not its probability in 32
    /// bits, in which near ones are the same.
    pub fn says(&self, label: usize, logit: f32) -> bool {
        let threshold = self.thresholds.as_ref().map_or(EVEN, |thresholds| thresholds[label]);
        f64::from(logit) > to_logit(threshold)
    }

    /// The probabilities of which one label is true.
    pub fn probabilities(&self, logits: &[f32]) -> Vec<f32> {
        match self.temperature {
            None => softmax(logits),
            Some(temperature) => {
                let cooler: Vec<f32> = logits.iter().map(|&x| (f64::from(x) / temperature) as f32).collect();
                softmax(&cooler)
            }
        }
    }

    /// What suits an evaluation best, by its logits, where that is to be found; and what there is to say of it.
    pub fn found(
        &self,
        task: &TextClassification,
        logits: &[Vec<f32>],
        wanted: &[&Wanted],
    ) -> Option<(Self, Map<String, Value>)> {
        if !self.finds || logits.iter().flatten().any(|x| !x.is_finite()) {
            return None;
        }
        let mut details = Map::new();
        let mut tuned = self.clone();
        match task.problem {
            ProblemType::MultiLabelClassification => {
                let thresholds = (0..task.labels.len()).map(|label| {
                    let has = |wanted: &&Wanted| matches!(wanted, Wanted::Classes(ids) if ids.contains(&(label as u32)));
                    threshold(logits.iter().map(|row| row[label]).zip(wanted.iter().map(has)).collect())
                });
                let thresholds: Vec<f64> = thresholds.collect();
                details.insert(THRESHOLDS.to_owned(), by_label(&task.labels, &thresholds));
                tuned.thresholds = Some(thresholds);
            }
            ProblemType::SingleLabelClassification => {
                let classes = classes(wanted);
                let temperature = temperature(logits, &classes);
                details.insert(TEMPERATURE.to_owned(), json!(temperature));
                details.insert(ECE_BEFORE.to_owned(), json!(Self::default().ece(logits, wanted)));
                tuned.temperature = Some(temperature);
            }
            ProblemType::Regression => return None,
        }
        Some((tuned, details))
    }

    /// What an evaluation has found, as it was kept with its weights.
    pub fn of(&self, best: &Measured, labels: &[String]) -> Option<Self> {
        if !self.finds {
            return None;
        }
        let problem = match best.details.contains_key(THRESHOLDS) {
            true => ProblemType::MultiLabelClassification,
            false => ProblemType::SingleLabelClassification,
        };
        let found = Self::from_config(&best.details, problem, labels).ok()?;
        (found != Self::default()).then_some(found)
    }

    /// What is told of it, beside the evaluation that it was found in.
    pub fn told(&self, best: &Measured, labels: &[String]) -> Option<String> {
        if let Some(thresholds) = &self.thresholds {
            let each: Vec<String> =
                labels.iter().zip(thresholds).map(|(name, p)| format!("{name} {p:.3}")).collect();
            return Some(format!("a label is said above: {}", super::id2label::told(&each)));
        }
        let number =
            |name: &str| best.metrics.get(name).copied().or_else(|| best.details.get(name)?.as_f64());
        let (before, after) = (number(ECE_BEFORE)?, number("ece")?);
        let temperature = self.temperature?;
        let end = if [*TEMPERATURES.start(), *TEMPERATURES.end()]
            .iter()
            .any(|t| (t / temperature - 1.0).abs() < 1e-3)
        {
            ", the last that is tried"
        } else {
            ""
        };
        Some(format!(
            "temperature {temperature:.3}{end}: the expected calibration error is {before:.4} without and {after:.4} with it"
        ))
    }

    /// The expected calibration error of one label (Guo et al. 2017, arXiv:1706.04599): how far the mean probability of
    /// what was said is from the share that is right, in bins by that probability.
    pub fn ece(&self, logits: &[Vec<f32>], wanted: &[&Wanted]) -> f64 {
        let mut bins = [(0usize, 0.0, 0.0); BINS];
        for (row, class) in logits.iter().zip(classes(wanted)) {
            let said = crate::task::scores::argmax(row);
            let sure = f64::from(self.probabilities(row)[said]);
            if !sure.is_finite() {
                return f64::NAN;
            }
            // (0, 1/15], (1/15, 2/15] …
            let at = ((sure * BINS as f64).ceil() as usize).clamp(1, BINS) - 1;
            let (count, sum, right) = &mut bins[at];
            *count += 1;
            *sum += sure;
            *right += f64::from(u8::from(said == class as usize));
        }
        bins.iter().map(|(_, sum, right)| (sum - right).abs()).sum::<f64>() / logits.len() as f64
    }
}

fn by_label(labels: &[String], numbers: &[f64]) -> Value {
    labels.iter().zip(numbers).map(|(label, number)| (label.clone(), json!(number))).collect()
}

fn classes(wanted: &[&Wanted]) -> Vec<u32> {
    let class = |wanted: &&Wanted| match wanted {
        Wanted::Class(id) => *id,
        _ => u32::MAX, // no label has it
    };
    wanted.iter().map(class).collect()
}

/// ln(p / (1 − p)); of an even chance exactly 0.
fn to_logit(p: f64) -> f64 {
    p.ln() - (1.0 - p).ln()
}

/// From what probability on a label is best said, by its logits and whether it is there: where its F1 is the highest, and
/// of several such places the one nearest to an even chance. That, where the label is never there.
fn threshold(mut scored: Vec<(f32, bool)>) -> f64 {
    let all = scored.iter().filter(|(_, there)| *there).count();
    if all == 0 {
        return EVEN;
    }
    scored.sort_by(|a, b| b.0.total_cmp(&a.0));
    let f1 = |said: usize, right: usize| 2.0 * right as f64 / (said + all) as f64;
    let at_even = scored.partition_point(|(logit, _)| *logit > 0.0);
    let right_at_even = scored[..at_even].iter().filter(|(_, there)| *there).count();
    let (mut best, mut chosen) = (f1(at_even, right_at_even), 0.0f64);
    let mut right = 0;
    for (i, &(logit, there)) in scored.iter().enumerate() {
        right += usize::from(there);
        let next = scored.get(i + 1).map(|next| f64::from(next.0));
        let logit = f64::from(logit);
        if next == Some(logit) {
            continue;
        }
        let between = next.map_or(logit - 1.0, |next| (logit + next) / 2.0);
        let own = f1(i + 1, right);
        if own > best || (own == best && between.abs() < chosen.abs()) {
            (best, chosen) = (own, between);
        }
    }
    match chosen {
        0.0 => EVEN,
        logit => (1.0 / (1.0 + (-logit).exp())).clamp(MARGIN, 1.0 - MARGIN),
    }
}

/// What logits are best divided by: where the mean −ln p of what is true is the lowest. It is convex in 1 / T, so in ln T it
/// has one valley.
fn temperature(logits: &[Vec<f32>], classes: &[u32]) -> f64 {
    let loss = |ln: f64| -> f64 {
        let share = (-ln).exp();
        let of_row = |(row, &class): (&Vec<f32>, &u32)| {
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let below = |x: f32| f64::from(x - max) * share;
            let sum: f64 = row.iter().map(|&x| below(x).exp()).sum();
            sum.ln() - row.get(class as usize).map_or(0.0, |&x| below(x))
        };
        logits.iter().zip(classes).map(of_row).sum()
    };
    let golden = (5f64.sqrt() - 1.0) / 2.0;
    let (mut low, mut high) = (TEMPERATURES.start().ln(), TEMPERATURES.end().ln());
    let inner = |low: f64, high: f64| (high - golden * (high - low), low + golden * (high - low));
    let (mut a, mut b) = inner(low, high);
    let (mut at_a, mut at_b) = (loss(a), loss(b));
    for _ in 0..STEPS {
        if at_a <= at_b {
            high = b;
            (b, at_b) = (a, at_a);
            a = inner(low, high).0;
            at_a = loss(a);
        } else {
            low = a;
            (a, at_a) = (b, at_b);
            b = inner(low, high).1;
            at_b = loss(b);
        }
    }
    ((low + high) / 2.0).exp().clamp(*TEMPERATURES.start(), *TEMPERATURES.end())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SciPy's `minimize_scalar` of `F.cross_entropy(x / T, t)` between 0.05 and 20, and the error of 15 bins as the paper's
    /// own code has it (`conf.gt(lo) * conf.le(hi)`), of doubles.
    #[test]
    fn temperature_and_calibration_error_are_scipys_and_the_papers() {
        let logits: Vec<Vec<f32>> = [
            [4.0, -2.0, 0.5],
            [0.25, 3.0, -1.0],
            [-0.5, 0.0, 5.0],
            [2.5, 1.0, -3.0],
            [0.0, 6.0, 1.0],
            [-1.0, 2.0, 2.5],
        ]
        .map(Vec::from)
        .to_vec();
        let wanted = [0, 2, 2, 0, 1, 1].map(Wanted::Class);
        let wanted: Vec<&Wanted> = wanted.iter().collect();
        let found = temperature(&logits, &classes(&wanted));
        assert!((found - 2.114_695_58).abs() < 1e-6, "{found}");
        let with = |temperature| Tuning { temperature, ..Tuning::default() }.ece(&logits, &wanted);
        assert!((with(None) - 0.295_268_86).abs() < 1e-6, "{}", with(None));
        assert!((with(Some(found)) - 0.340_867_65).abs() < 1e-6, "{}", with(Some(found)));
        // all right: the surer the better, up to where the search ends
        let sure = temperature(&logits[..1], &[0]);
        assert!((sure / TEMPERATURES.start() - 1.0).abs() < 1e-6, "{sure}");
        let unsure = temperature(&logits[..1], &[1]);
        assert!((unsure / TEMPERATURES.end() - 1.0).abs() < 1e-6, "{unsure}");
    }

    /// Every threshold that tells two logits apart is tried the slow way.
    #[test]
    fn no_threshold_has_a_higher_f1() {
        let f1 = |scored: &[(f32, bool)], says: &dyn Fn(f32) -> bool| {
            let count = |which: &dyn Fn(&&(f32, bool)) -> bool| scored.iter().filter(which).count() as f64;
            let right = count(&|(logit, there)| *there && says(*logit));
            2.0 * right / (count(&|(logit, _)| says(*logit)) + count(&|(_, there)| *there))
        };
        for seed in 0..200u64 {
            let number = |i: u64| (seed * 7919 + i * 104_729) % 1009;
            let scored: Vec<(f32, bool)> = (0..3 + seed % 20)
                .map(|i| ((number(i) % 13) as f32 / 2.0 - 3.0, number(i + 50) % 3 == 0))
                .collect();
            let found = threshold(scored.clone());
            let tuning = Tuning { thresholds: Some(vec![found]), ..Tuning::default() };
            let own = f1(&scored, &|logit| tuning.says(0, logit));
            if !scored.iter().any(|(_, there)| *there) {
                assert_eq!(found, EVEN);
                continue;
            }
            for step in -32..32 {
                let other = f1(&scored, &|logit| logit > step as f32 / 8.0);
                assert!(own >= other, "{scored:?}: {found} has {own}, {step} has {other}");
            }
        }
        // where an even chance is as good as any, it stays
        assert_eq!(threshold(vec![(2.0, true), (-2.0, false), (3.0, true)]), EVEN);
        let never = threshold(vec![(-90.0, true), (-91.0, false)]);
        assert_eq!(never, MARGIN);
    }

    #[test]
    fn a_configuration_that_is_wrong_is_refused_by_name() {
        let labels = ["food", "price"].map(str::to_owned);
        let read = |raw: Value, problem| {
            let Value::Object(raw) = raw else { panic!("an object") };
            Tuning::from_config(&raw, problem, &labels).map_err(|error| error.to_string())
        };
        let several = ProblemType::MultiLabelClassification;
        for (raw, says) in [
            (json!({"thresholds": {"foood": 0.5}}), "did you mean \"food\"?"),
            (json!({"thresholds": {"food": 1}}), "\"food\": 1, expected a number between"),
            (json!({"thresholds": {"food": "0.5"}}), "expected a number between"),
            (json!({"thresholds": [0.5, 0.5]}), "expected an object"),
        ] {
            let said = read(raw, several).unwrap_err();
            assert!(said.contains(says), "{said}");
        }
        let one = ProblemType::SingleLabelClassification;
        for wrong in [json!(0), json!(-1), json!(1e9), json!("2"), json!([2])] {
            let said = read(json!({"calibration_temperature": wrong}), one).unwrap_err();
            assert!(said.contains("calibration_temperature is"), "{said}");
        }
        // another problem's, and what transformers means by the word, say nothing
        assert_eq!(read(json!({"thresholds": [1], "temperature": 0.7}), one).unwrap(), Tuning::default());
        let part = read(json!({"thresholds": {"price": 0.25}}), several).unwrap();
        assert!(part.says(0, 0.01) && !part.says(0, 0.0) && part.says(1, -1.09) && !part.says(1, -1.11));
    }
}
