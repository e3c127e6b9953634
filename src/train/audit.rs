//! What a step does to every parameter: gradients and weights before and after → a row each.

use serde::Serialize;

use super::gradients::Gradients;
use crate::Result;
use crate::eager::{Params, Trainable};

/// What a step did to one parameter.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub name: String,
    /// The gradient's Euclidean norm, before clipping.
    pub grad_norm: f64,
    /// The parameter's own, behind the step.
    pub weight_norm: f64,
    /// That of the change.
    pub update_norm: f64,
    /// The change over the parameter as it was before; none where that was zero. About 1e-3 is usual.
    pub update_ratio: Option<f64>,
    /// The share of the gradient's numbers that are zero.
    pub zeros: f64,
}

/// A step that is looked at: what is there before it is taken.
pub struct Audit {
    before: Vec<Vec<f32>>,
    /// Of each gradient its norm, and the share of zeros.
    gradients: Vec<(f64, f64)>,
}

impl Audit {
    /// Notes weights and gradients.
    pub fn before(params: &Params, gradients: &Gradients) -> Result<Self> {
        let norms = gradients.norms(params)?;
        let zeros = gradients.zeros(params)?;
        Ok(Self { before: params.values()?, gradients: norms.into_iter().zip(zeros).collect() })
    }

    /// Holds what is there now against it.
    pub fn after(self, params: &Params) -> Result<Vec<Row>> {
        let after = params.values()?;
        let rows = params.trainable().zip(self.before.iter().zip(&after)).zip(self.gradients);
        let row = |((Trainable { param, .. }, (before, after)), (grad_norm, zeros)): (
            (_, (&Vec<f32>, &Vec<f32>)),
            _,
        )| {
            let changed = before.iter().zip(after).map(|(before, after)| after - before);
            let (was, update_norm) = (norm(before.iter().copied()), norm(changed));
            Row {
                name: param.name.clone(),
                grad_norm,
                weight_norm: norm(after.iter().copied()),
                update_norm,
                update_ratio: (was > 0.0).then(|| update_norm / was),
                zeros,
            }
        };
        Ok(rows.map(row).collect())
    }
}

fn norm(numbers: impl Iterator<Item = f32>) -> f64 {
    numbers.map(|x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt()
}

/// What is to be seen at a glance: the largest and the smallest change, and gradients that are all zero.
pub fn told(step: usize, rows: &[Row]) -> String {
    let ratio = |row: &&Row| row.update_ratio;
    let with_ratio = || rows.iter().filter(|row| row.update_ratio.is_some());
    let by = |a: &&Row, b: &&Row| ratio(a).unwrap_or(0.0).total_cmp(&ratio(b).unwrap_or(0.0));
    let shown = |row: Option<&Row>| {
        row.map_or("none".to_owned(), |row| format!("{:.1e} ({})", row.update_ratio.unwrap_or(0.0), row.name))
    };
    let dead: Vec<&str> = rows.iter().filter(|row| row.zeros == 1.0).map(|row| row.name.as_str()).collect();
    let dead = match dead.len() {
        0 => String::new(),
        n => format!("; gradients that are all zero: {n} ({})", crate::say::listed(dead.into_iter(), 3)),
    };
    format!(
        "audit of step {step}: updates over weights from {} to {}{dead}",
        shown(with_ratio().min_by(by)),
        shown(with_ratio().max_by(by))
    )
}
