//! `--device` → a candle device; `--precision` → whether it computes in that.

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::eager::kernels::gemm;
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

/// What training computes in. Parameters, the optimizer's state and all that is saved are fp32 in all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TrainingPrecision {
    #[default]
    Fp32,
    /// Products of bf16 numbers; layer norms, softmax, non-linearities and the loss in fp32.
    Bf16,
    /// bf16 where the device has products in it, else fp32.
    Auto,
}

impl TrainingPrecision {
    /// What an interpreter is to compute in there ([`crate::eager::Eager::with_dtype`]).
    pub fn dtype(self, device: &Device) -> DType {
        if self.taken(device).0 == Self::Bf16 { DType::BF16 } else { DType::F32 }
    }

    /// What `Auto` stands for on the device, and why, for people.
    pub fn taken(self, device: &Device) -> (Self, Option<String>) {
        if self != Self::Auto {
            return (self, None);
        }
        match why_not_bf16(device) {
            None => {
                let unit = gemm::bf16::unit().filter(|_| device.is_cpu());
                let by = unit.map(|unit| format!(" by {}", unit.name())).unwrap_or_default();
                (Self::Bf16, Some(format!("--precision auto: products in bf16{by}")))
            }
            Some(reason) => (Self::Fp32, Some(format!("--precision auto: fp32, for {reason}"))),
        }
    }

    /// Whether the device computes in it; of a GPU, found out by a small product.
    ///
    /// # Errors
    /// It does not: a CPU without a unit for bf16, or a GPU (or kernels built for one) older than Ampere.
    pub fn check(self, device: &Device) -> Result<()> {
        let reason = if self == Self::Bf16 { why_not_bf16(device) } else { None };
        match reason {
            None => Ok(()),
            Some(reason) if device.is_cpu() => bail_unusable!(
                "--precision bf16: {reason}, and without one bf16 is slower than fp32; leave --precision out, take \
                 --precision auto, or train on a GPU"
            ),
            Some(reason) => bail_unusable!("--precision bf16: {reason}"),
        }
    }
}

/// Why products in bf16 are not to be had there.
fn why_not_bf16(device: &Device) -> Option<String> {
    if device.is_cpu() {
        let reason = "this processor has neither AMX-BF16 nor AVX512-BF16, or its system keeps them back";
        return gemm::bf16::unit().is_none().then(|| reason.to_owned());
    }
    let probe = || {
        let ones = Tensor::ones((2, 2), DType::BF16, device)?;
        (ones.matmul(&ones)? + &ones)?.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>()
    };
    match probe() {
        Ok(12.0) => None,
        Ok(sum) => Some(format!("the device's sums are wrong ({sum}, expected 12)")),
        Err(e) => Some(format!(
            "the device does not compute in bf16, which takes compute capability 8.0 (Ampere) or higher, also in the \
             build (CUDA_COMPUTE_CAP): {e}"
        )),
    }
}
