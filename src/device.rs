//! `--device` → a candle device.

use candle_core::Device;

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
