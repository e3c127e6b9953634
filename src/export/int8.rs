//! A graph in int8, as far as the answers stay what they are.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::json;

use super::gate::{Gate, Loss};
use super::{Export, Exported, compared};
use crate::onnx::int8::{self, LEAST_OUTPUTS};
use crate::onnx::{GraphKind, Precision, Range, write};
use crate::predict::graphs;
use crate::task::{Example, Form};
use crate::{Result, bail_unusable};

/// How activations are rounded; see [`int8`].
const DYNAMIC: &str = "dynamic";
const STATIC: &str = "static";

/// What a graph in int8 is to be.
pub struct Int8<'a> {
    pub opset: i64,
    pub external_data: bool,
    /// Labelled records to measure it on.
    pub examples: Option<&'a [Example]>,
    /// The most points that it may lose.
    pub max_drop: f64,
    /// The ranges of the activations, where they are rounded alike in every record.
    pub ranges: Option<BTreeMap<String, Range>>,
}

/// Where graphs in int8 are tried.
struct Trials<'a> {
    export: &'a Export<'a>,
    opset: i64,
    ranges: BTreeMap<String, Range>,
    external_data: bool,
    gate: Gate<'a>,
    /// The file that each is written to.
    written: PathBuf,
}

/// A graph in int8 that has been written, and what it loses.
struct Tried {
    external: bool,
    loss: Loss,
}

impl Trials<'_> {
    fn kind(&self, kept: &[String]) -> GraphKind {
        GraphKind::int8(kept.to_vec(), self.ranges.clone(), self.opset)
    }

    /// Writes the graph where `kept` stay in fp32; its weights in int8, and whether they stand in a file of their own.
    fn write(&self, kept: &[String]) -> Result<(Vec<String>, bool)> {
        let model = self.export.build(&self.kind(kept))?;
        let weights = int8::weights(&model);
        Ok((weights, write::save(model, &self.written, self.external_data)?))
    }

    /// The same, measured.
    fn tried(&self, kept: &[String]) -> Result<Tried> {
        let (_, external) = self.write(kept)?;
        Ok(Tried { external, loss: self.gate.loss(&self.written)? })
    }

    /// The weights, from the one that moves the outputs most where it alone is in int8.
    fn ranked(&self, all: &[String]) -> Result<Vec<String>> {
        let say = self.export.say;
        let mut ranked = Vec::with_capacity(all.len());
        let bar = say.bar(all.len() as u64, "{bar:30} {pos}/{len} matrices, {eta} left")?;
        for name in all {
            let kept: Vec<String> = all.iter().filter(|other| *other != name).cloned().collect();
            self.write(&kept)?;
            let apart = self.gate.apart(&self.written)?;
            say.detail(format!("{name} alone: {apart:.2e}"));
            ranked.push((apart, name.clone()));
            bar.inc(1);
        }
        bar.finish_and_clear();
        // not a number is the worst
        ranked.sort_by(|(a, _), (b, _)| b.total_cmp(a));
        Ok(ranked.into_iter().map(|(_, name)| name).collect())
    }
}

impl Export<'_> {
    /// The graph with its matrices in int8. Those whose rounding moves the outputs most stay in fp32, as few as it takes
    /// for the loss to be at most `max_drop` points.
    ///
    /// # Errors
    /// Unusable: no matrix is large enough. The loss is more whatever stays in fp32: nothing is put in place then.
    pub fn in_int8(&self, wanted: Int8<'_>) -> Result<Exported> {
        let Int8 { opset, external_data, examples, max_drop, ranges } = wanted;
        let form = if ranges.is_some() { STATIC } else { DYNAMIC };
        let target = graphs::in_precision(&self.saved.dir, Precision::Int8);
        let file = target.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let written = self.scratch.path().join(&file);
        let gate = self.gate(opset, examples)?;
        let ranges = ranges.unwrap_or_default();
        let trials = Trials { export: self, opset, ranges, external_data, gate, written: written.clone() };

        let (all, external) = trials.write(&[])?;
        if all.is_empty() {
            bail_unusable!(
                "the model has no matrix of {LEAST_OUTPUTS} outputs, and smaller ones gain nothing in int8"
            );
        }
        let mut kept = Vec::new();
        let mut tried = Tried { external, loss: trials.gate.loss(&trials.written)? };
        if tried.loss.is_above(max_drop) {
            let whole = tried.loss.told(Precision::Int8);
            let hint = super::hint(examples.is_some());
            self.say.line(format!("{whole}; looking for the matrices that lose most{hint}"));
            kept = fewest(&trials.ranked(&all)?, |kept| {
                let loss = trials.tried(kept)?.loss;
                self.say.line(format!(
                    "{} of {} in fp32: {}",
                    kept.len(),
                    all.len(),
                    loss.told(Precision::Int8)
                ));
                Ok(!loss.is_above(max_drop))
            })?;
            if kept.len() == all.len() {
                anyhow::bail!(
                    "{whole}, and no choice of matrices that stay in fp32 brings it to --max-metric-drop {max_drop}, so no \
                     {file} is written: allow more, or serve fp32"
                );
            }
            tried = trials.tried(&kept)?;
        }
        let kind = trials.kind(&kept);
        drop(trials);
        let Tried { external, loss } = tried;
        let compared = compared(self.saved, &written, Form::Whole, f32::INFINITY)?;

        let in_fp32 = match &kept[..] {
            [] => String::new(),
            kept => format!("; {} of {} matrices stay in fp32: {}", kept.len(), all.len(), kept.join(", ")),
        };
        let hint = super::hint(examples.is_some());
        let beside = compared.batch_invariance.unwrap_or_default();
        let neighbours = match form {
            DYNAMIC => format!(
                "a record's outputs depend on those beside it, whose numbers share a scale: by up to {beside:.1e} on the \
                 built-in records; with --calibration FILE they don't"
            ),
            _ => format!("a record alone and the same among others: {beside:.1e}"),
        };
        let found = format!("{}{in_fp32}{hint}\n{neighbours}", loss.told(Precision::Int8));
        let how = [("form", json!(form)), ("in_fp32", json!(kept))];
        let about = how.into_iter().chain(loss.about(max_drop, &compared));
        self.put(super::PRECISIONS, &target, &kind, external, about, &found)
    }
}

/// The shortest beginning of a list with which something holds, where a longer one holds, too. The whole list where none
/// shorter is found.
fn fewest(ranked: &[String], mut holds: impl FnMut(&[String]) -> Result<bool>) -> Result<Vec<String>> {
    let (mut below, mut above) = (0, 1);
    while above < ranked.len() && !holds(&ranked[..above])? {
        (below, above) = (above, above * 2);
    }
    let mut above = above.min(ranked.len());
    while above - below > 1 {
        let middle = below.midpoint(above);
        if holds(&ranked[..middle])? { above = middle } else { below = middle }
    }
    Ok(ranked[..above].to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_few_as_it_takes_stay_in_fp32() {
        let ranked: Vec<String> = (0..11).map(|i| format!("w{i}")).collect();
        for wanted in 1..=11 {
            let mut tries = 0;
            let kept = fewest(&ranked, |kept| {
                tries += 1;
                Ok(kept.len() >= wanted)
            });
            assert_eq!(kept.unwrap(), ranked[..wanted], "of {wanted}");
            assert!(tries <= 8, "{tries}");
        }
        // none holds: that is the whole list
        assert_eq!(fewest(&ranked, |_| Ok(false)).unwrap().len(), 11);
        assert_eq!(fewest(&ranked[..1], |_| Ok(false)).unwrap().len(), 1);
    }
}
