//! The runtimes side by side: the same records through each, the same numbers expected.

pub mod candle;
pub mod compare;
pub mod decoding;
pub mod difference;
pub mod inputs;
pub mod report;
pub mod runtimes;

use std::path::Path;

pub use compare::Compared;
pub use runtimes::Runtime;

use crate::Result;
use crate::data::batch::Encoding;
use crate::saved::Saved;
use crate::task::Outputs;

/// How far a logit may be from the reference's: what float32 rounding explains, and no more.
pub const TOLERANCE: f32 = 1e-4;

/// Records that run together. Their lengths are mixed as they come, so that rows are padded.
pub(crate) const BATCH: usize = 8;

/// What is compared: one trained model, its graph, and records.
pub struct Subject<'a> {
    pub saved: &'a Saved,
    /// The ONNX file that ONNX Runtime runs.
    pub graph: &'a Path,
    pub encodings: &'a [Encoding],
}

/// Runs the records on every runtime and compares each with the first.
///
/// # Errors
/// A runtime can't be had or fails. Numbers that differ are no error: see [`Compared::pass`].
pub fn run(subject: &Subject, runtimes: &[Runtime], tolerance: f32) -> Result<Vec<Compared>> {
    let Some((&reference, others)) = runtimes.split_first() else {
        return Ok(Vec::new());
    };
    let wanted = runtimes::outputs(reference, subject)?;
    others
        .iter()
        .map(|&runtime| {
            let found = runtimes::outputs(runtime, subject)?;
            let (expected, given) = (rows(&wanted), rows(&found));
            let mut compared = Compared::new(runtime, reference, &expected, &given, tolerance)?;
            compared.records = subject.encodings.len();
            if !compared.pass {
                compared.first_difference = difference::first(subject, runtime, &wanted, &found, tolerance)?;
            }
            Ok(compared)
        })
        .collect()
}

/// The rows of all outputs of all records, one after another.
fn rows(records: &[Outputs]) -> Vec<Vec<f32>> {
    records.iter().flatten().flat_map(|output| output.rows()).map(|row| row.to_vec()).collect()
}
