//! What `tk export` found of a model's graphs, and whether the files are still those.

use serde::Serialize;
use serde_json::{Map, Value};

use crate::predict::{graphs, vouched};
use crate::saved::Saved;
use crate::{Result, onnx, unusable};

/// An exported graph.
#[derive(Clone, Debug, Serialize)]
pub struct Graph {
    pub file: String,
    pub precision: String,
    pub opset: Option<u64>,
    /// The largest difference of an output from the trained model's.
    pub max_abs: Option<f64>,
    /// What was lost in fewer bits: a metric before and after.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gate: Option<Gate>,
    pub state: State,
    pub tk_version: String,
}

/// A metric of a graph in fewer bits beside the one in fp32.
#[derive(Clone, Debug, Serialize)]
pub struct Gate {
    pub metric: String,
    pub before: f64,
    pub after: f64,
    pub records: Option<u64>,
}

/// Whether a graph is what was held against the model that stands beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// The file was held against these weights, and is still that file.
    Verified,
    /// It was exported from other weights.
    OtherWeights,
    /// It is not the file that was verified.
    Changed,
    /// It is not there.
    Missing,
}

impl State {
    /// In words.
    pub fn told(self) -> &'static str {
        match self {
            Self::Verified => "verified against these weights",
            Self::OtherWeights => "exported from other weights",
            Self::Changed => "not the file that was verified",
            Self::Missing => "not there",
        }
    }
}

/// The graphs that the manifest in DIR/onnx speaks of; none where there is no manifest.
///
/// # Errors
/// Unusable: the manifest can't be read.
pub fn of(saved: &Saved) -> Result<Vec<Graph>> {
    let path = graphs::folder(&saved.dir).join(vouched::MANIFEST);
    let bytes = match std::fs::read(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        bytes => bytes.map_err(|e| unusable!("{}: {e}", path.display()))?,
    };
    let manifest: Map<String, Value> =
        serde_json::from_slice(&bytes).map_err(|e| unusable!("{}: {e}", path.display()))?;
    let weights = onnx::model::weights_sha256(&saved.config, &saved.task, &saved.weights)?;
    let mut found = Vec::new();
    collect(&manifest, saved, &weights, &mut found);
    Ok(found)
}

fn collect(entry: &Map<String, Value>, saved: &Saved, weights: &str, found: &mut Vec<Graph>) {
    let text = |key: &str| entry.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    if let Some(file) = entry.get("file").and_then(Value::as_str) {
        let path = graphs::folder(&saved.dir).join(file);
        let state = match () {
            () if !path.is_file() => State::Missing,
            () if text("weights_sha256") != weights => State::OtherWeights,
            () if !entry.contains_key("sha256") || vouched::check(&path).is_err() => State::Changed,
            () => State::Verified,
        };
        found.push(Graph {
            file: file.to_owned(),
            precision: text("precision"),
            opset: entry.get("opset").and_then(Value::as_u64),
            max_abs: entry.get("max_abs").and_then(Value::as_f64),
            gate: gate(entry),
            state,
            tk_version: text("tk_version"),
        });
    }
    for inner in entry.values().filter_map(Value::as_object) {
        collect(inner, saved, weights, found);
    }
}

fn gate(entry: &Map<String, Value>) -> Option<Gate> {
    let number = |of: &Map<String, Value>, key: &str| of.get(key).and_then(Value::as_f64);
    let records = |of: &Map<String, Value>| of.get("records").and_then(Value::as_u64);
    if let Some(gate) = entry.get("gate").and_then(Value::as_object) {
        return Some(Gate {
            metric: gate.get("metric")?.as_str()?.to_owned(),
            before: number(gate, "before")?,
            after: number(gate, "after")?,
            records: records(gate),
        });
    }
    let (before, after) = (number(entry, "perplexity_fp32")?, number(entry, "perplexity")?);
    Some(Gate { metric: "perplexity".to_owned(), before, after, records: records(entry) })
}
