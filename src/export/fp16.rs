//! A graph in fp16, measured on this machine's CPU, which computes what it rounds as a GPU does.

use super::{Export, Exported, PRECISIONS, compared};
use crate::Result;
use crate::onnx::{GraphKind, Precision, write};
use crate::predict::graphs;
use crate::task::{Example, Form};

impl Export<'_> {
    /// The graph in fp16.
    ///
    /// # Errors
    /// Unusable: a weight is too large for it. It loses more than `max_drop` points: nothing is put in place then.
    pub fn in_fp16(
        &self,
        opset: i64,
        external_data: bool,
        examples: Option<&[Example]>,
        max_drop: f64,
    ) -> Result<Exported> {
        let (saved, precision) = (self.saved, Precision::Fp16);
        let target = graphs::in_precision(&saved.dir, precision);
        let written = self.scratch.path().join(target.file_name().unwrap_or_default());
        let gate = self.gate(opset, examples)?;
        let kind = GraphKind { precision, ..GraphKind::fp32(Form::Whole, opset) };
        let external = write::save(self.build(&kind)?, &written, external_data)?;
        let loss = gate.loss(&written)?;
        loss.check(precision, max_drop)?;
        let compared = compared(saved, &written, Form::Whole, f32::INFINITY)?;
        let found = format!("{}{}", loss.told(precision), super::hint(examples.is_some()));
        self.put(PRECISIONS, &target, &kind, external, loss.about(max_drop, &compared), &found)
    }
}
