//! A trained model → the ONNX model that is exported: its task's graph, and what a server must know of it.

use serde_json::Value;

use super::proto::tensor_proto::DataType;
use super::proto::{ModelProto, StringStringEntryProto};
use super::{GraphKind, emit, graph};
use crate::checkpoint::{self, Weights};
use crate::model::ModelConfig;
use crate::model::ops::Param;
use crate::task::{Form, Task};
use crate::{Result, unusable};

/// Builds the graph of a trained model, with its metadata.
///
/// # Errors
/// Weights that are missing, do not fit the configuration or are not finite, and an opset tk does not write.
pub fn build(
    config: &ModelConfig,
    task: &Task,
    weights: &Weights,
    tokenizer_sha256: &str,
    kind: GraphKind,
) -> Result<ModelProto> {
    let params = trained(config, task, weights)?;
    let mut model = emit::graph(
        |o| {
            if kind.form == Form::InPlace {
                task.generate(o, &config.family)
            } else {
                task.define(o, &config.family)
            }
        },
        &task.outputs(kind.form),
        kind,
        |param| weights.f32(&param.name),
    )?;
    let mut about = vec![
        ("max_positions", config.max_positions().to_string()),
        ("task", task.name().to_owned()),
        ("tk_version", env!("CARGO_PKG_VERSION").to_owned()),
        ("tokenizer_sha256", tokenizer_sha256.to_owned()),
        ("weights_sha256", hash(&params, weights)?),
    ];
    let mut named = config.clone();
    task.write_config(&mut named);
    if let Some(labels) = named.raw.get("id2label").and_then(Value::as_object) {
        let labels: Vec<&Value> = labels.values().collect();
        about.push(("labels", serde_json::to_string(&labels)?));
    }
    if let Some(problem) = named.raw.get("problem_type").and_then(Value::as_str) {
        about.push(("problem_type", problem.to_owned()));
    }
    about.sort_unstable();
    model.metadata_props =
        about.into_iter().map(|(key, value)| StringStringEntryProto { key: key.to_owned(), value }).collect();
    Ok(model)
}

/// Sha-256 over the parameters that a trained model's graph holds, as its metadata has it.
pub fn weights_sha256(config: &ModelConfig, task: &Task, weights: &Weights) -> Result<String> {
    hash(&trained(config, task, weights)?, weights)
}

/// The metadata entry of this name.
pub fn metadata<'m>(model: &'m ModelProto, key: &str) -> Option<&'m str> {
    model.metadata_props.iter().find(|entry| entry.key == key).map(|entry| entry.value.as_str())
}

/// The same model with intermediate values as outputs too, behind its own.
pub fn with_outputs(mut model: ModelProto, names: &[String]) -> ModelProto {
    if let Some(graph) = &mut model.graph {
        graph.output.extend(names.iter().map(|name| graph::typed(name, DataType::Float, None)));
    }
    model
}

/// The parameters of the model with its head, all of which must be there.
fn trained(config: &ModelConfig, task: &Task, weights: &Weights) -> Result<Vec<Param>> {
    let params = task.params(&config.family)?;
    let fit = weights.fit(&params)?;
    match fit.new.first() {
        None => Ok(params),
        Some(_) => Err(unusable!(
            "the checkpoint lacks {}: it is not trained for {}; fine-tune it with `tk train`",
            fit.new.join(", "),
            task.name()
        )),
    }
}

fn hash(params: &[Param], weights: &Weights) -> Result<String> {
    let values = params.iter().map(|p| weights.f32(&p.name)).collect::<Result<Vec<_>>>()?;
    Ok(checkpoint::weights_hash(
        params.iter().zip(&values).map(|(p, values)| (p.name.as_str(), p.shape.as_slice(), values.as_ref())),
    ))
}
