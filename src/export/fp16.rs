//! A graph in fp16, measured on this machine's CPU, which computes what it rounds as a GPU does.

use serde_json::json;

use super::gate::Gate;
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
        let fp32 = self.scratch.path().join("fp32.onnx");
        write::save(self.build(&GraphKind::fp32(Form::Whole, opset))?, &fp32, false)?;
        let kind = GraphKind { precision, ..GraphKind::fp32(Form::Whole, opset) };
        let external = write::save(self.build(&kind)?, &written, external_data)?;
        let loss = Gate::new(saved, &fp32, examples)?.loss(&written)?;
        loss.check(precision, max_drop)?;
        let compared = compared(saved, &written, Form::Whole, f32::INFINITY)?;
        let found = format!("{}{}", loss.told(precision), super::hint(examples.is_some()));
        let about = [
            ("gate", json!(loss)),
            ("max_metric_drop", json!(max_drop)),
            ("max_abs", json!(compared.max_abs)),
            ("batch_invariance", json!(compared.batch_invariance)),
        ];
        self.put(PRECISIONS, &target, &kind, external, about, &found)
    }
}
