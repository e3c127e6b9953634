//! Whether a provider really runs: one matrix product, loaded, placed, run and checked.

use std::borrow::Cow;

use prost::Message;

use super::{Model, OrtSession, Provider, Providers, Threads};
use crate::Result;
use crate::data::batch::{Encoding, PaddedBatch};
use crate::model::ops::{At, Ids, Ops};
use crate::onnx::{DEFAULT_OPSET, GraphKind, emit};
use crate::say::Say;
use crate::task::{Dim, Form, Output};

/// Runs a product of known result on a provider.
///
/// # Errors
/// Says why the provider can't be had, or that its result is wrong.
pub fn probe(provider: Provider) -> Result<()> {
    let outputs = [Output { name: "y", dims: vec![Dim::Batch, Dim::Sequence, Dim::Of(2)] }];
    let model = emit::graph(
        |o| {
            let x = o.embed(At::body("x").table(2, 4), Ids::Tokens)?;
            Ok(vec![o.linear(At::body("f").linear(4, 2), &x)?])
        },
        &outputs,
        GraphKind::fp32(Form::Whole, DEFAULT_OPSET),
        // x: 0 1 2 3 / 4 5 6 7; f: the same as two rows; its bias: 0 1
        |param| Ok(Cow::Owned((0..param.numel()).map(|i| i as f32).collect())),
    )?;
    let bytes = model.encode_to_vec();
    let (model, alone) = (Model::Bytes(&bytes), Threads::Together(1));
    let session = OrtSession::open(model, &Providers::only(provider), alone, Say::default())?;
    let tokens = Encoding { ids: vec![1], type_ids: vec![0], truncated: false };
    let found = session.run(&PaddedBatch::new(&[&tokens], 0))?.remove(0).array;
    // 4·0 + 5·1 + 6·2 + 7·3, and 4·4 + 5·5 + 6·6 + 7·7 + 1
    let wanted = ndarray::array![[[38.0, 127.0]]].into_dyn();
    anyhow::ensure!(found == wanted, "provider {} computes {found:?}, expected {wanted:?}", provider.name());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_computes_a_product() {
        probe(Provider::Cpu).unwrap();
    }
}
