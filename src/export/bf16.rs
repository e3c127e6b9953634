//! What products in bf16 lose, where OpenVINO computes the graph in fp32 so: measured, and kept in the manifest.

use serde_json::{Value, json};

use super::gate::Gate;
use super::{Export, Exported, MODEL, PRECISIONS, records};
use crate::Result;
use crate::onnx::Precision;
use crate::parity::{self, Runtime, Subject};
use crate::predict::{Predictor, graphs};
use crate::runtime::{Provider, Providers};
use crate::task::Example;

impl Export<'_> {
    /// The exported graph as OpenVINO computes it in bf16; no graph is written.
    ///
    /// # Errors
    /// Unusable: the model is not exported, or OpenVINO can't be had. It loses more than `max_drop` points.
    pub fn in_bf16(
        &self,
        providers: &Providers,
        examples: Option<&[Example]>,
        max_drop: f64,
    ) -> Result<Exported> {
        let (saved, precision) = (self.saved, Precision::Bf16);
        let graph = graphs::checked(saved, precision)?;
        self.say.detail("measuring in fp32");
        let gate = Gate::new(saved, &graph, examples)?;
        self.say.detail("measuring in bf16");
        let loss = gate.loss_of(&Predictor::by_default(saved, &graph, providers)?)?;
        loss.check(precision, max_drop)?;
        let encodings = records(saved)?;
        let subject =
            Subject { saved, graph: &graph, how: &providers.how, encodings: &encodings, examples: None };
        let runtimes = [Runtime::Eager, Runtime::Ort(Provider::OpenVino)];
        let compared = parity::run(&subject, &runtimes, f32::INFINITY)?.remove(0);

        let _held = self.locked()?;
        let entry = json!({
            "file": MODEL,
            "precision": precision.name(),
            "provider": Provider::OpenVino.name(),
            "tk_version": env!("CARGO_PKG_VERSION"),
        });
        let Value::Object(mut entry) = entry else { anyhow::bail!("an entry is an object") };
        let about = loss.about(max_drop, &compared);
        entry.extend(about.into_iter().map(|(name, value)| (name.to_owned(), value)));
        self.record(PRECISIONS, precision, &entry)?;

        let hint = super::hint(examples.is_some());
        let summary = format!("{} by OpenVINO: {}{hint}", graph.display(), loss.told(precision));
        entry.insert("path".to_owned(), json!(graph));
        Ok(Exported { summary, manifest: entry })
    }
}
