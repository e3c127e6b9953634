//! `--ep`: which execution provider is asked for, and how it is to compute.

use std::path::PathBuf;
use std::str::FromStr;

use ort::ep::{self, ArbitrarilyConfigurableExecutionProvider, ExecutionProvider, ExecutionProviderDispatch};
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use serde_json::json;

use super::library;
use super::missing;
use super::session::Threads;
use super::tensorrt::Engine;
use crate::onnx::Precision;
use crate::{Result, bail_unusable, unusable};

/// What computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provider {
    Cpu,
    OpenVino,
    Cuda,
    TensorRt,
}

impl Provider {
    /// All of them, the portable one first.
    pub const ALL: [Self; 4] = [Self::Cpu, Self::OpenVino, Self::Cuda, Self::TensorRt];

    /// The name that `--ep` takes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::OpenVino => "openvino",
            Self::Cuda => "cuda",
            Self::TensorRt => "tensorrt",
        }
    }

    /// ONNX Runtime's name.
    pub(super) fn id(self) -> &'static str {
        match self {
            Self::Cpu => ep::CPU::NAME,
            Self::OpenVino => ep::OpenVINO::NAME,
            Self::Cuda => ep::CUDA::NAME,
            Self::TensorRt => ep::TensorRT::NAME,
        }
    }

    /// Whether it computes on this machine's processor, where threads may run one model at once: see
    /// [`OrtSession`](super::OrtSession).
    pub fn on_cpu(self) -> bool {
        matches!(self, Self::Cpu | Self::OpenVino)
    }

    /// Whether the library was built with it; a GPU and its drivers are another question.
    pub fn compiled_in(self) -> Result<bool> {
        library::library()?;
        Ok(match self {
            Self::Cpu => ep::CPU::is_available(),
            Self::OpenVino => ep::OpenVINO::is_available(),
            Self::Cuda => ep::CUDA::is_available(),
            Self::TensorRt => ep::TensorRT::is_available(),
        }?)
    }

    /// Adds the provider to a session's options, and what they need for it.
    ///
    /// # Errors
    /// Unusable: the library or the machine does not have it; says which and what to do.
    pub(super) fn register(
        self,
        mut builder: SessionBuilder,
        how: &How,
        threads: Threads,
    ) -> Result<SessionBuilder> {
        if !self.compiled_in()? {
            let library = library::library()?;
            let remedy = match self {
                Self::OpenVino => {
                    "run ./scripts/setup --openvino, or set ORT_DYLIB_PATH to a build that has it (PyPI: onnxruntime-openvino)"
                }
                _ => "set ORT_DYLIB_PATH to a build that has it (PyPI: onnxruntime-gpu)",
            };
            bail_unusable!(
                "{} (1.{}) is built without {}; {remedy}",
                library.path.display(),
                library.minor,
                self.id()
            );
        }
        let providers = match self {
            // always there; registered by name, ort would switch its memory arena off
            Self::Cpu => {
                // its SkipLayerNormalization takes more than twice as long as a sum and its norm (ONNX Runtime 1.31)
                let (key, fusion) = ("optimization.disable_specified_optimizers", "SkipLayerNormFusion");
                return Ok(builder.with_config_entry(key, fusion).map_err(ort::Error::<()>::from)?);
            }
            Self::OpenVino => {
                // it knows none of the operators that ONNX Runtime would make of others
                let plain = GraphOptimizationLevel::Disable;
                builder = builder.with_optimization_level(plain).map_err(ort::Error::<()>::from)?;
                vec![openvino(how, threads)]
            }
            Self::Cuda => vec![cuda(how)],
            // what TensorRT does not take goes to CUDA
            Self::TensorRt => vec![tensorrt(how)?, cuda(how)],
        };
        for provider in providers {
            provider.register(&mut builder).map_err(|e| {
                unusable!(
                    "{} can't be used: {}{}",
                    provider.name(),
                    e.message(),
                    missing::remedy(self, e.message())
                )
            })?;
        }
        Ok(builder)
    }
}

impl FromStr for Provider {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|provider| provider.name() == text).ok_or_else(|| {
            unusable!("\"{text}\" is no execution provider; tk has cpu, openvino, cuda and tensorrt")
        })
    }
}

/// OpenVINO on the processor. Its own default is bf16 where the processor has it; here that is said or not done.
fn openvino(how: &How, threads: Threads) -> ExecutionProviderDispatch {
    let numbers = if how.bf16 { "bf16" } else { "f32" };
    let (all, streams) = (threads.all(), threads.runs());
    let settings = json!({"CPU": {
        "INFERENCE_PRECISION_HINT": numbers,
        "INFERENCE_NUM_THREADS": all,
        "NUM_STREAMS": streams,
    }});
    let mut provider = ep::OpenVINO::default()
        .with_device_type("CPU")
        .with_num_threads(all)
        .with_num_streams(u8::try_from(streams).unwrap_or(u8::MAX))
        .with_arbitrary_config("load_config", settings);
    if let Some(cache) = &how.cache {
        provider = provider.with_cache_dir(cache.display());
    }
    provider.build()
}

fn cuda(how: &How) -> ExecutionProviderDispatch {
    // fp32 is to mean fp32: TensorFloat-32 keeps ten bits of the mantissa
    let mut provider = ep::CUDA::default().with_device_id(how.device).with_tf32(how.tf32);
    if let Some(bytes) = how.gpu_memory {
        provider = provider.with_memory_limit(bytes);
    }
    provider.build()
}

fn tensorrt(how: &How) -> Result<ExecutionProviderDispatch> {
    let mut options = ep::TensorRT::default().with_device_id(how.device);
    if let Some(engine) = &how.engine {
        options = engine.options(options, how.cache.as_deref(), library::library()?.minor);
    }
    Ok(options.build())
}

/// How a provider computes, beside what it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct How {
    /// OpenVINO multiplies in bf16, of a graph in fp32.
    pub bf16: bool,
    /// Which GPU.
    pub device: i32,
    /// The most bytes that CUDA's arena may take.
    pub gpu_memory: Option<usize>,
    /// CUDA multiplies in TensorFloat-32.
    pub tf32: bool,
    /// Where OpenVINO and TensorRT keep what they have compiled.
    pub cache: Option<PathBuf>,
    /// What TensorRT is told of the model.
    pub engine: Option<Engine>,
    /// The graph that CUDA runs in place of the one that is given.
    pub optimized: Option<PathBuf>,
}

/// Which providers may be taken, and how they compute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Providers {
    pub order: Order,
    pub how: How,
}

impl Providers {
    /// This one or none.
    pub fn only(provider: Provider) -> Self {
        Self { order: Order::Listed(vec![provider]), how: How::default() }
    }

    /// OpenVINO with products in bf16. Chooses the build of ONNX Runtime: nothing may have loaded it before.
    ///
    /// # Errors
    /// Unusable: the processor has none.
    pub fn openvino_in_bf16() -> Result<Self> {
        library::prefer_openvino();
        check_bf16()?;
        Ok(Self { how: How { bf16: true, ..How::default() }, ..Self::only(Provider::OpenVino) })
    }
}

/// The order in which providers are tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// CUDA where this machine has it, else the CPU.
    Auto,
    /// The first of these that can be had.
    Listed(Vec<Provider>),
}

impl Order {
    /// Whether a provider is among those that are named.
    pub fn names(&self, provider: Provider) -> bool {
        matches!(self, Self::Listed(list) if list.contains(&provider))
    }
}

impl FromStr for Order {
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
        Ok(Self::Listed(list))
    }
}

/// `--ep` and what goes with it.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Execution provider")]
pub struct EpFlags {
    /// What computes: auto, or cpu, openvino, cuda, tensorrt; a list takes the first that can be had.
    #[arg(long, value_name = "LIST", default_value = "auto")]
    pub ep: Order,
    /// Of cuda and tensorrt, which GPU [default: 0].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(0..))]
    device_id: Option<i32>,
    /// Of cuda, the most megabytes that its arena may take.
    #[arg(long, value_name = "MB", value_parser = clap::value_parser!(u32).range(1..))]
    gpu_memory_mb: Option<u32>,
    /// Let cuda multiply in TensorFloat-32, which is faster and keeps ten bits of the mantissa.
    #[arg(long)]
    tf32: bool,
    /// Of openvino and tensorrt, a folder that keeps what they have compiled, for the next start.
    #[arg(long, value_name = "DIR")]
    ep_cache: Option<PathBuf>,
}

impl EpFlags {
    /// Whether products may be in TensorFloat-32.
    pub fn tf32(&self) -> bool {
        self.tf32
    }

    /// What was asked for, where a graph in this precision is run. Chooses the build of ONNX Runtime: nothing may have
    /// loaded it before.
    ///
    /// # Errors
    /// Unusable: a flag, or the precision, is none of the named providers'.
    pub fn providers(&self, precision: Precision) -> Result<Providers> {
        use Provider::{Cuda, OpenVino, TensorRt};
        let flags: [(&str, bool, &[Provider]); 4] = [
            ("--device-id", self.device_id.is_some(), &[Cuda, TensorRt]),
            ("--gpu-memory-mb", self.gpu_memory_mb.is_some(), &[Cuda, TensorRt]),
            ("--tf32", self.tf32, &[Cuda, TensorRt]),
            ("--ep-cache", self.ep_cache.is_some(), &[OpenVino, TensorRt]),
        ];
        for (flag, given, of) in flags {
            if given && !of.iter().any(|&provider| self.ep.names(provider)) {
                let names: Vec<&str> = of.iter().map(|provider| provider.name()).collect();
                bail_unusable!("{flag} is for {}: name it in --ep, or leave {flag} out", names.join(" and "));
            }
        }
        if self.ep.names(OpenVino) {
            library::prefer_openvino();
        }
        let bf16 = precision == Precision::Bf16;
        if bf16 {
            if self.ep != Order::Listed(vec![OpenVino]) {
                bail_unusable!(
                    "--precision bf16 is computed by OpenVINO: give --ep openvino, and no other beside it"
                );
            }
            check_bf16()?;
        }
        let how = How {
            bf16,
            device: self.device_id.unwrap_or(0),
            gpu_memory: self.gpu_memory_mb.map(|megabytes| megabytes as usize * 1_000_000),
            tf32: self.tf32,
            cache: self.ep_cache.clone(),
            engine: None,
            optimized: None,
        };
        Ok(Providers { order: self.ep.clone(), how })
    }
}

/// Refuses bf16 where the processor has no products in it: OpenVINO would compute in fp32 and not say so.
fn check_bf16() -> Result<()> {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512bf16") {
        return Ok(()); // as all have that have AMX
    }
    bail_unusable!("--precision bf16: this processor multiplies no bf16 (it has neither AVX512-BF16 nor AMX)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn providers_are_read_in_order_of_preference() {
        assert_eq!("auto".parse::<Order>().unwrap(), Order::Auto);
        let list = Order::Listed(vec![Provider::Cuda, Provider::Cpu]);
        assert_eq!("cuda, cpu".parse::<Order>().unwrap(), list);
        for wrong in ["", "gpu", "cpu,cpu", "cuda,auto", "cuda,"] {
            assert!(wrong.parse::<Order>().is_err(), "{wrong}");
        }
    }
}
