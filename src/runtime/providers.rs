//! `--ep`: which execution provider is asked for, and the proof that it runs what it was asked to run.

use std::ffi::{CStr, c_char};
use std::str::FromStr;

use ort::AsPointer;
use ort::ep::{self, ExecutionProvider};
use ort::session::Session;
use ort::session::builder::SessionBuilder;

use super::library;
use crate::{Result, bail_unusable, unusable};

/// What computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provider {
    Cpu,
    Cuda,
    TensorRt,
}

impl Provider {
    /// All of them, the portable one first.
    pub const ALL: [Self; 3] = [Self::Cpu, Self::Cuda, Self::TensorRt];

    /// The name that `--ep` takes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::TensorRt => "tensorrt",
        }
    }

    /// ONNX Runtime's name.
    fn id(self) -> &'static str {
        match self {
            Self::Cpu => ep::CPU::NAME,
            Self::Cuda => ep::CUDA::NAME,
            Self::TensorRt => ep::TensorRT::NAME,
        }
    }

    /// Whether the library was built with it; a GPU and its drivers are another question.
    pub fn compiled_in(self) -> Result<bool> {
        library::library()?;
        Ok(match self {
            Self::Cpu => ep::CPU::is_available(),
            Self::Cuda => ep::CUDA::is_available(),
            Self::TensorRt => ep::TensorRT::is_available(),
        }?)
    }

    /// Adds the provider to a session's options, and what they need for it.
    ///
    /// # Errors
    /// Unusable: the library or the machine does not have it; says which and what to do.
    pub(super) fn register(self, mut builder: SessionBuilder) -> Result<SessionBuilder> {
        if !self.compiled_in()? {
            let library = library::library()?;
            bail_unusable!(
                "{} (1.{}) is built without {}; set ORT_DYLIB_PATH to a build that has it (PyPI: onnxruntime-gpu)",
                library.path.display(),
                library.minor,
                self.id()
            );
        }
        // fp32 is to mean fp32: TensorFloat-32 keeps ten bits of the mantissa
        let cuda = || ep::CUDA::default().with_tf32(false).build();
        let providers = match self {
            // always there; registered by name, ort would switch its memory arena off
            Self::Cpu => {
                // its SkipLayerNormalization takes more than twice as long as a sum and its norm (ONNX Runtime 1.31)
                let (key, fusion) = ("optimization.disable_specified_optimizers", "SkipLayerNormFusion");
                return Ok(builder.with_config_entry(key, fusion).map_err(ort::Error::<()>::from)?);
            }
            Self::Cuda => vec![cuda()],
            // what TensorRT does not take goes to CUDA
            Self::TensorRt => vec![ep::TensorRT::default().build(), cuda()],
        };
        for provider in providers {
            provider.register(&mut builder).map_err(|e| {
                unusable!(
                    "{} can't be used: {}; it needs NVIDIA's driver and its libraries on the loader's path \
                     (LD_LIBRARY_PATH)",
                    provider.name(),
                    e.message()
                )
            })?;
        }
        Ok(builder)
    }

    /// Holds a session's nodes against what was asked for.
    ///
    /// # Errors
    /// Unusable: a matrix product landed on another provider.
    pub(super) fn prove(self, session: &Session) -> Result<()> {
        let products = |node: &Placed| node.op.contains("MatMul") || node.op.contains("Gemm");
        let elsewhere: Vec<String> = placed(session)?
            .iter()
            .filter(|node| products(node) && node.provider != self.id())
            .map(|node| format!("{} ({}) on {}", node.name, node.op, node.provider))
            .collect();
        if let Some(first) = elsewhere.first() {
            bail_unusable!(
                "{} of the matrix products are not on {}: {first}; is the model of a type that it can't run?",
                elsewhere.len(),
                self.id()
            );
        }
        Ok(())
    }
}

impl FromStr for Provider {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|provider| provider.name() == text)
            .ok_or_else(|| unusable!("\"{text}\" is no execution provider; tk has cpu, cuda and tensorrt"))
    }
}

/// Which providers may be taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Providers {
    /// CUDA where this machine has it, else the CPU.
    Auto,
    /// The first of these that can be had.
    Ordered(Vec<Provider>),
}

impl Providers {
    /// This one or none.
    pub fn only(provider: Provider) -> Self {
        Self::Ordered(vec![provider])
    }
}

impl FromStr for Providers {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let mut list = Vec::new();
        for name in text.split(',') {
            let provider: Provider = match name.trim() {
                "auto" => bail_unusable!("auto stands alone: leave it out, or the others"),
                name => name.parse()?,
            };
            if list.contains(&provider) {
                bail_unusable!("\"{text}\" names {} twice", provider.name());
            }
            list.push(provider);
        }
        Ok(Self::Ordered(list))
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn providers_are_read_in_order_of_preference() {
        assert_eq!("auto".parse::<Providers>().unwrap(), Providers::Auto);
        let list = Providers::Ordered(vec![Provider::Cuda, Provider::Cpu]);
        assert_eq!("cuda, cpu".parse::<Providers>().unwrap(), list);
        for wrong in ["", "gpu", "cpu,cpu", "cuda,auto", "cuda,"] {
            assert!(wrong.parse::<Providers>().is_err(), "{wrong}");
        }
    }
}
