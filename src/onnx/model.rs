//! A trained model → the ONNX model that is exported: its task's graph, and what a server must know of it.

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::proto::tensor_proto::DataType;
use super::proto::{ModelProto, StringStringEntryProto};
use super::{GraphKind, Precision, check, emit, fp16, graph};
use crate::Result;
use crate::checkpoint::{self, Weights};
use crate::model::ops::Param;
use crate::model::{ModelConfig, manifest};
use crate::task::{Form, Task};

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
    let params = task.trained_params(&config.family, weights)?;
    let (form, precision) = (kind.form, kind.precision);
    let mut model = emit::graph(
        |o| {
            if form == Form::InPlace {
                task.generate(o, &config.family)
            } else {
                task.define(o, &config.family)
            }
        },
        &task.outputs(form),
        kind,
        |param| weights.f32(&param.name),
    )?;
    if precision == Precision::Fp16 {
        model = fp16::convert(model)?;
        check::check(&model)?;
    }
    let mut about = vec![
        ("definition_sha256", definition_sha256(config, task)?),
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
    if precision != Precision::Fp32 {
        about.push(("precision", precision.name().to_owned()));
    }
    about.sort_unstable();
    model.metadata_props =
        about.into_iter().map(|(key, value)| StringStringEntryProto { key: key.to_owned(), value }).collect();
    Ok(model)
}

/// Sha-256 over the parameters that a trained model's graph holds, as its metadata has it.
pub fn weights_sha256(config: &ModelConfig, task: &Task, weights: &Weights) -> Result<String> {
    hash(&task.trained_params(&config.family, weights)?, weights)
}

/// Sha-256 over the verbs that the model's graph computes, as its metadata has it: the configuration's share, and the
/// task's.
pub fn definition_sha256(config: &ModelConfig, task: &Task) -> Result<String> {
    let verbs = manifest::verbs(|o| task.define(o, &config.family).map(drop))?;
    Ok(checkpoint::hex(&Sha256::digest(verbs)))
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

fn hash(params: &[Param], weights: &Weights) -> Result<String> {
    let values = params.iter().map(|p| weights.f32(&p.name)).collect::<Result<Vec<_>>>()?;
    Ok(checkpoint::weights_hash(
        params.iter().zip(&values).map(|(p, values)| (p.name.as_str(), p.shape.as_slice(), values.as_ref())),
    ))
}
