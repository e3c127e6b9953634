//! candle-onnx: candle's evaluator, over the graph of an opset whose operators it has.

use std::collections::HashMap;

use anyhow::Context;
use candle_core::{DType, Device, Tensor};
use ndarray::ArrayD;

use crate::Result;
use crate::data::batch::PaddedBatch;
use crate::onnx::{CANDLE_OPSET, GraphKind, model, proto::ModelProto};
use crate::runtime::session::Values;
use crate::saved::Saved;

/// A graph in memory that candle interprets node by node.
pub struct Evaluated {
    model: ModelProto,
    outputs: Vec<String>,
}

impl Evaluated {
    /// The graph of a trained model, with intermediate values as outputs behind its own.
    pub fn of(saved: &Saved, taps: &[String]) -> Result<Self> {
        // the evaluator does not read the tokenizer's hash
        let model = model::build(
            &saved.config,
            &saved.task,
            &saved.weights,
            "",
            GraphKind::fp32(saved.task.form(), CANDLE_OPSET),
        )?;
        let model = model::with_outputs(model, taps);
        let outputs = model.graph.iter().flat_map(|graph| &graph.output).map(|output| output.name.clone());
        Ok(Self { outputs: outputs.collect(), model })
    }

    /// Every output of one batch.
    pub fn run(&self, batch: &PaddedBatch) -> Result<Vec<Values>> {
        let shape = (batch.rows, batch.width);
        let inputs: HashMap<String, Tensor> =
            [("input_ids", &batch.ids), ("attention_mask", &batch.mask), ("token_type_ids", &batch.type_ids)]
                .into_iter()
                .map(|(name, values)| Ok((name.to_owned(), Tensor::from_slice(values, shape, &Device::Cpu)?)))
                .collect::<Result<_>>()?;
        let results = candle_onnx::simple_eval(&self.model, inputs)?;
        self.outputs
            .iter()
            .map(|name| {
                let tensor = results.get(name).with_context(|| format!("candle-onnx gives no {name}"))?;
                let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
                Ok(Values { name: name.clone(), array: ArrayD::from_shape_vec(tensor.dims(), values)? })
            })
            .collect()
    }
}
