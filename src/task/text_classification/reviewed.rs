//! Texts' predicted labels beside the wanted ones → what people look at.

use anyhow::Context;

use super::{ProblemType, TextClassification, Wanted, Window, read};
use crate::Result;
use crate::task::review::{Calibration, Confusion, Review, Row, Source, Wrong};
use crate::task::scores::{argmax, cross_entropy};

impl TextClassification {
    /// What there is to see, of each text's logits and what was wanted.
    ///
    /// # Errors
    /// The records are others than those that were predicted.
    pub(super) fn reviewed(&self, texts: &[(Vec<f32>, &Window)], of: Source) -> Result<Review> {
        let records = read(of.files, of.records)?;
        let (mut review, mut wrong) = (self.counted(texts), Vec::new());
        for (logits, target) in texts {
            let predicted = self.predicted(logits);
            let (is_wrong, found, score) = match (&target.wanted, self.problem) {
                (Wanted::Number(_), _) | (_, ProblemType::Regression) => (true, logits[0].to_string(), None),
                (wanted, _) => {
                    let found = Wanted::Classes(predicted.clone());
                    let score = match wanted {
                        Wanted::Class(_) => Some(f64::from(self.scores(logits)[predicted[0] as usize])),
                        _ => None,
                    };
                    (wanted.ids() != predicted, self.names(&found).join(", "), score)
                }
            };
            if is_wrong {
                let record = records.get(target.text).context("the records have changed")?;
                wrong.push(Wrong {
                    line: record.place.line,
                    text: record.text.clone(),
                    pair: record.pair.clone(),
                    wanted: self.names(&target.wanted).join(", "),
                    found,
                    score,
                    loss: loss(logits, &target.wanted),
                });
            }
        }
        if self.problem == ProblemType::Regression {
            wrong.retain(|wrong| wrong.loss > 0.0 || wrong.loss.is_nan());
        }
        review = review.with_wrong(wrong);
        Ok(review)
    }

    /// Confusion, rows and calibration; the pairs of a regression.
    fn counted(&self, texts: &[(Vec<f32>, &Window)]) -> Review {
        match self.problem {
            ProblemType::SingleLabelClassification => {
                let pairs = texts.iter().map(|(logits, target)| (target.wanted.ids(), argmax(logits)));
                let pairs = pairs.filter_map(|(wanted, found)| Some((*wanted.first()? as usize, found)));
                let confusion = Confusion::new(&self.labels, pairs);
                let claims = texts.iter().map(|(logits, target)| {
                    let best = argmax(logits);
                    (f64::from(self.scores(logits)[best]), target.wanted.ids() == [best as u32])
                });
                let rows = confusion.rows();
                Review {
                    rows,
                    rows_of: "label",
                    scores: Some("score"),
                    confusion: Some(confusion),
                    calibration: Calibration::new(claims),
                    ..Review::default()
                }
            }
            ProblemType::MultiLabelClassification => {
                let claims = texts.iter().flat_map(|(logits, target)| {
                    let wanted = target.wanted.ids();
                    let scores = self.scores(logits).into_iter().zip(0..);
                    scores.map(move |(score, id)| (f64::from(score), wanted.contains(&id)))
                });
                let calibration = Calibration::new(claims);
                let rows = self.rows_of_several(texts);
                Review { rows, rows_of: "label", calibration, ..Review::default() }
            }
            ProblemType::Regression => {
                let number = |(logits, target): &(Vec<f32>, &Window)| match target.wanted {
                    Wanted::Number(wanted) => Some((f64::from(wanted), f64::from(logits[0]))),
                    _ => None,
                };
                Review { numbers: texts.iter().filter_map(number).collect(), ..Review::default() }
            }
        }
    }

    /// A row for each label that was wanted or predicted, where a text has several.
    fn rows_of_several(&self, texts: &[(Vec<f32>, &Window)]) -> Vec<Row> {
        let mut of = vec![(0, 0, 0); self.labels.len()];
        for (logits, target) in texts {
            let (found, wanted) = (self.predicted(logits), target.wanted.ids());
            found.iter().for_each(|&id| of[id as usize].1 += 1);
            wanted.iter().for_each(|&id| of[id as usize].2 += 1);
            found.iter().filter(|id| wanted.contains(id)).for_each(|&id| of[id as usize].0 += 1);
        }
        let met = self.labels.iter().zip(of).filter(|(_, (_, predicted, support))| predicted + support > 0);
        met.map(|(label, (right, predicted, support))| Row::new(label, right, predicted, support)).collect()
    }
}

impl Wanted {
    /// The labels' ids; none of a number.
    fn ids(&self) -> Vec<u32> {
        match self {
            Self::Class(id) => vec![*id],
            Self::Classes(ids) => ids.clone(),
            Self::Number(_) => Vec::new(),
        }
    }
}

/// A text's loss, as training has it.
fn loss(logits: &[f32], wanted: &Wanted) -> f64 {
    match wanted {
        Wanted::Class(id) => cross_entropy(logits, *id as usize),
        Wanted::Classes(ids) => {
            let of = |(x, id): (f64, u32)| {
                x.max(0.0) - if ids.contains(&id) { x } else { 0.0 } + (-x.abs()).exp().ln_1p()
            };
            logits.iter().map(|&x| f64::from(x)).zip(0..).map(of).sum::<f64>() / logits.len() as f64
        }
        Wanted::Number(number) => f64::from(logits[0] - number).powi(2),
    }
}
