//! Records → between what numbers the activations lie that a product in int8 rounds.

use std::collections::BTreeMap;
use std::path::Path;

use crate::data::batch::{Encoding, PaddedBatch};
use crate::data::records::{self, How, Source};
use crate::onnx::emit::{LEAST, MOST};
use crate::onnx::{GraphKind, Range, write};
use crate::predict::Predictor;
use crate::runtime::{Model, OrtSession, Provider, Providers, Threads};
use crate::task::AnswerFlags;
use crate::{Result, bail_unusable, process, unusable};

use super::Export;

/// Records of a file that are looked at.
pub const CALIBRATION_RECORDS: usize = 512;

/// The share of the records whose activations lie in the range that is taken.
const WITHIN: f64 = 0.99;

impl Export<'_> {
    /// The ranges of a model's activations on the first records of a file, which need no labels.
    ///
    /// # Errors
    /// Unusable: a record can't be read, or there is none.
    pub fn calibrated(
        &self,
        input: &Path,
        flags: &AnswerFlags,
        opset: i64,
    ) -> Result<BTreeMap<String, Range>> {
        let graph = self.scratch.path().join("observed.onnx");
        write::save(self.build(&GraphKind::observed(opset))?, &graph, false)?;
        let providers = Providers::only(Provider::Cpu);
        let predictor = Predictor::by_default(self.saved, &graph, &providers)?;
        let read = predictor.reader();
        let mut encodings = Vec::new();
        let how = How { untagged: true, ..flags.reading.how() };
        for row in records::read(&Source::Path(input.into()), &how)?.take(CALIBRATION_RECORDS) {
            let asked = row?.and_then(|row| read(&row));
            let asked =
                asked.map_err(|bad| unusable!("{}:{}: {}", input.display(), bad.line, bad.message))?;
            encodings.extend(asked.encodings().iter().cloned());
        }
        if encodings.is_empty() {
            bail_unusable!("{}: there is no record to calibrate on", input.display());
        }
        drop(predictor);
        self.ranges(&graph, &encodings)
    }

    /// The ranges of each text alone, for padding has activations, too; of which the widest are left out.
    fn ranges(&self, graph: &Path, encodings: &[Encoding]) -> Result<BTreeMap<String, Range>> {
        let threads = Threads::Together(process::cores());
        let providers = Providers::only(Provider::Cpu);
        let session = OrtSession::open(Model::File(graph), &providers, threads, self.say)?;
        let mut found: BTreeMap<String, (Vec<f32>, Vec<f32>)> = BTreeMap::new();
        let bar = self.say.bar(encodings.len() as u64, "{bar:30} {pos}/{len} texts, {eta} left")?;
        for encoding in encodings {
            for values in session.run(&PaddedBatch::new(&[encoding], self.saved.tokenizer.pad_id()))? {
                let number = || values.array.first().copied().unwrap_or_default();
                if let Some(weight) = values.name.strip_suffix(LEAST) {
                    found.entry(weight.to_owned()).or_default().0.push(number());
                } else if let Some(weight) = values.name.strip_suffix(MOST) {
                    found.entry(weight.to_owned()).or_default().1.push(number());
                }
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        let range = |(mut least, mut most): (Vec<f32>, Vec<f32>)| {
            least.sort_by(|a, b| b.total_cmp(a));
            most.sort_by(f32::total_cmp);
            let last = (least.len() as f64 * WITHIN).ceil() as usize;
            let at = last.clamp(1, least.len().max(1)) - 1;
            (least[at], most[at])
        };
        Ok(found.into_iter().map(|(weight, found)| (weight, range(found))).collect())
    }
}
