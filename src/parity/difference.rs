//! Where two runtimes part: the first tap of the definition whose values differ.

use ndarray::Array2;
use serde::Serialize;

use super::compare::distance;
use super::runtimes::{LoadedGraph, padded};
use super::{BATCH, Runtime, Subject};
use crate::Result;
use crate::data::batch::Encoding;
use crate::eager::Evaluator;
use crate::runtime::session::Values;
use crate::task::{Outputs, Scope};

/// One number that differs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// The tap's name, or the output's where every tap agrees.
    pub tap: String,
    /// The record's index.
    pub record: usize,
    /// The token's index within the record; absent behind `pick`.
    pub token: Option<usize>,
    pub channel: usize,
    pub expected: f32,
    pub found: f32,
}

/// The first tap, in the order of the definition, at which a runtime leaves the eager one; the logits
/// themselves where no tap differs.
pub fn first(
    subject: &Subject,
    runtime: Runtime,
    wanted: &[Outputs],
    found: &[Outputs],
    tolerance: f32,
) -> Result<Option<Difference>> {
    let apart = |i: &usize| {
        let pairs = wanted[*i].iter().zip(&found[*i]);
        wanted[*i].len() != found[*i].len()
            || pairs.map(|(a, b)| (flat(a), flat(b))).any(|(a, b)| !same(&a, &b, tolerance))
    };
    let Some(record) = (0..wanted.len()).find(apart) else {
        return Ok(None);
    };
    // the batch that it ran in, so that its neighbours and its padding are the same
    let start = record / BATCH * BATCH;
    let batch = &subject.encodings[start..subject.encodings.len().min(start + BATCH)];
    if runtime != Runtime::Eager {
        let evaluator = Evaluator::open(subject.saved, &candle_core::Device::Cpu)?;
        let mut expected = Vec::new();
        for (name, tensor) in evaluator.taps(batch)? {
            expected.push((name, tensor.to_vec2::<f32>()?));
        }
        let names: Vec<String> = expected.iter().map(|(name, _)| name.clone()).collect();
        let outputs = LoadedGraph::open(runtime, subject, &names)?.run(&padded(subject, batch))?;
        for (name, rows) in &expected {
            let Some(values) = outputs.iter().find(|values| values.name == *name) else {
                continue;
            };
            if let Some(difference) = in_tap(rows, values, batch, tolerance) {
                return Ok(Some(Difference { record: start + difference.record, ..difference }));
            }
        }
    }
    let outputs = subject.saved.task.outputs(subject.saved.task.form());
    for (output, (expected, found)) in outputs.iter().zip(wanted[record].iter().zip(&found[record])) {
        let width = expected.ncols().max(1);
        if let Some((at, expected, found)) = in_row(&flat(expected), &flat(found), tolerance) {
            return Ok(Some(Difference {
                tap: output.name.to_owned(),
                record,
                token: (output.scope() == Scope::Token).then_some(at / width),
                channel: at % width,
                expected,
                found,
            }));
        }
    }
    Ok(None)
}

/// An output's numbers, row by row.
fn flat(output: &Array2<f32>) -> Vec<f32> {
    output.iter().copied().collect()
}

/// Compares packed rows, one a token or one a record, with a padded output.
fn in_tap(packed: &[Vec<f32>], values: &Values, batch: &[Encoding], tolerance: f32) -> Option<Difference> {
    let shape = values.array.shape();
    let rows: Vec<Vec<f32>> = values.array.rows().into_iter().map(|row| row.to_vec()).collect();
    let row = |i: usize| rows.get(i).map_or(&[][..], Vec::as_slice);
    let per_token = shape.len() == 3;
    let mut next = 0;
    for (record, encoding) in batch.iter().enumerate() {
        for token in 0..if per_token { encoding.len() } else { 1 } {
            let at = if per_token { record * shape[1] + token } else { record };
            let expected = packed.get(next).map_or(&[][..], Vec::as_slice);
            next += 1;
            if let Some((channel, expected, found)) = in_row(expected, row(at), tolerance) {
                let token = per_token.then_some(token);
                return Some(Difference {
                    tap: values.name.clone(),
                    record,
                    token,
                    channel,
                    expected,
                    found,
                });
            }
        }
    }
    None
}

/// Whether two rows are finite and within the tolerance.
fn same(expected: &[f32], found: &[f32], tolerance: f32) -> bool {
    distance(expected, found) <= tolerance
}

/// The first number of a row that differs; rows of different lengths differ at the shorter one's end.
fn in_row(expected: &[f32], found: &[f32], tolerance: f32) -> Option<(usize, f32, f32)> {
    (0..expected.len().max(found.len())).find_map(|i| {
        let at = |row: &[f32]| row.get(i).copied().unwrap_or(f32::NAN);
        let (expected, found) = (at(expected), at(found));
        (!same(&[expected], &[found], tolerance)).then_some((i, expected, found))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_is_not_compared_and_the_place_is_named() {
        let encoding = |n: usize| Encoding { ids: vec![1; n], type_ids: vec![0; n], truncated: false };
        let batch = [encoding(1), encoding(2)];
        let packed = [vec![1.0], vec![2.0], vec![3.0]];
        let array = ndarray::array![[[1.0], [9.0]], [[2.0], [3.0]]].into_dyn();
        let mut values = Values { name: "t".to_owned(), array };
        assert_eq!(in_tap(&packed, &values, &batch, 1e-4), None);
        values.array[[1, 1, 0]] = 4.0;
        let difference = in_tap(&packed, &values, &batch, 1e-4).unwrap();
        assert_eq!((difference.record, difference.token, difference.channel), (1, Some(1), 0));
        assert_eq!((difference.expected, difference.found), (3.0, 4.0));
    }
}
