//! `--device` → a candle device; `--precision` → whether it computes in that.

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::{Result, bail_unusable, unusable};

/// Opens `cpu`, `cuda` or `cuda:N`.
///
/// # Errors
/// Another name, a build without CUDA, or a device that is not there: never another device instead.
pub fn open(name: &str) -> Result<Device> {
    let index = match name {
        "cpu" => return Ok(Device::Cpu),
        "cuda" => 0,
        other => match other.strip_prefix("cuda:").map(str::parse) {
            Some(Ok(index)) => index,
            _ => bail_unusable!("--device {name}: expected cpu, cuda or cuda:N"),
        },
    };
    if !candle_core::utils::cuda_is_available() {
        bail_unusable!(
            "--device {name}: this tk was built without CUDA; build one that has it with \
             `cargo build --release --features cuda` (it needs NVIDIA's CUDA toolkit with nvcc)"
        );
    }
    Device::new_cuda(index).map_err(|e| unusable!("--device {name}: {e}"))
}

/// What training computes in. Parameters, the optimizer's state and all that is saved are fp32 in both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TrainingPrecision {
    #[default]
    Fp32,
    /// Products and activations in bf16; layer norms, softmax, non-linearities and the loss in fp32.
    Bf16,
}

impl TrainingPrecision {
    /// The activations' type.
    pub fn dtype(self) -> DType {
        match self {
            Self::Fp32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }

    /// Whether the device computes in it, found out by a small product.
    ///
    /// # Errors
    /// It does not: the CPU, or a GPU (or kernels built for one) older than Ampere.
    pub fn check(self, device: &Device) -> Result<()> {
        if self == Self::Fp32 {
            return Ok(());
        }
        if device.is_cpu() {
            bail_unusable!(
                "--precision bf16 needs --device cuda: the CPU's fused operations compute in fp32, and candle \
                 multiplies bf16 there by way of fp32; leave --precision out, or train on a GPU"
            );
        }
        let probe = || {
            let ones = Tensor::ones((2, 2), self.dtype(), device)?;
            (ones.matmul(&ones)? + &ones)?.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>()
        };
        match probe() {
            Ok(12.0) => Ok(()),
            Ok(sum) => bail_unusable!("--precision bf16: the device's sums are wrong ({sum}, expected 12)"),
            Err(e) => bail_unusable!(
                "--precision bf16: the device does not compute in bf16, which takes compute capability 8.0 (Ampere) \
                 or higher, also in the build (CUDA_COMPUTE_CAP): {e}"
            ),
        }
    }
}
