//! Which node of a loaded model runs where, and the proof that a provider runs what it was asked to run.

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char};

use ort::AsPointer;
use ort::session::Session;

use super::Provider;
use crate::{Result, bail_unusable};

/// Holds a session's nodes against the provider that was asked for.
///
/// # Errors
/// Unusable: a matrix product, or attention over a cache that lies in the provider's memory, landed on another provider.
pub(super) fn prove(provider: Provider, session: &Session) -> Result<()> {
    let proves =
        |node: &Placed| ["MatMul", "Gemm", "GroupQueryAttention"].iter().any(|op| node.op.contains(op));
    let elsewhere: Vec<String> = placed(session)?
        .iter()
        .filter(|node| proves(node) && node.provider != provider.id())
        .map(|node| format!("{} ({}) on {}", node.name, node.op, node.provider))
        .collect();
    if let Some(first) = elsewhere.first() {
        bail_unusable!(
            "{} of the matrix products and attentions are not on {}: {first}; is the model of a type that it can't run?",
            elsewhere.len(),
            provider.id()
        );
    }
    Ok(())
}

/// How many nodes each provider runs.
///
/// # Errors
/// ONNX Runtime does not tell.
pub(super) fn nodes(session: &Session) -> Result<BTreeMap<String, usize>> {
    let mut counts = BTreeMap::new();
    for node in placed(session)? {
        *counts.entry(node.provider).or_default() += 1;
    }
    Ok(counts)
}

/// A node and the provider that runs it.
struct Placed {
    name: String,
    op: String,
    provider: String,
}

/// Where each node of a session runs. The session must have been made with the option that records it.
fn placed(session: &Session) -> Result<Vec<Placed>> {
    let (api, mut nodes_of_all) = (ort::api(), Vec::new());
    let (mut subgraphs, mut count) = (std::ptr::null(), 0);
    // SAFETY: ONNX Runtime's own getters on a live session; the arrays and the strings belong to the session
    // and are copied before this function returns. A status is turned into an error before a result is read.
    unsafe {
        let status = (api.Session_GetEpGraphAssignmentInfo)(session.ptr(), &mut subgraphs, &mut count);
        ort::Error::result_from_status(status)?;
        for i in 0..count {
            let subgraph = *subgraphs.add(i);
            let provider = text(|out| (api.EpAssignedSubgraph_GetEpName)(subgraph, out))?;
            let (mut nodes, mut count) = (std::ptr::null(), 0);
            ort::Error::result_from_status((api.EpAssignedSubgraph_GetNodes)(
                subgraph, &mut nodes, &mut count,
            ))?;
            for j in 0..count {
                let node = *nodes.add(j);
                nodes_of_all.push(Placed {
                    name: text(|out| (api.EpAssignedNode_GetName)(node, out))?,
                    op: text(|out| (api.EpAssignedNode_GetOperatorType)(node, out))?,
                    provider: provider.clone(),
                });
            }
        }
    }
    Ok(nodes_of_all)
}

/// Copies the text that a getter of ONNX Runtime points at.
///
/// # Safety
/// `get` must fill its argument with null or a string that lives until this returns.
unsafe fn text(get: impl FnOnce(*mut *const c_char) -> ort::sys::OrtStatusPtr) -> Result<String> {
    let mut text = std::ptr::null();
    // SAFETY: as promised by the caller
    unsafe {
        ort::Error::result_from_status(get(&mut text))?;
        anyhow::ensure!(!text.is_null(), "ONNX Runtime gave no name");
        Ok(CStr::from_ptr(text).to_string_lossy().into_owned())
    }
}
