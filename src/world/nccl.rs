//! Sums of tensors on GPUs: NVIDIA's NCCL carries the numbers from one to the others, and each adds them up in the order
//! of the ranks, so that all have the same bits, in every run. (NCCL's own sums depend on how the GPUs are connected.)

use std::sync::{Mutex, OnceLock};

use anyhow::Context;
use candle_core::cuda_backend::CudaStorage;
use candle_core::cuda_backend::cudarc::nccl::{Comm, Id};
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Shape, Tensor};

use super::World;
use crate::Result;

/// Numbers that go round at a time: each GPU holds as many from every process.
const BLOCK: usize = 1 << 24;

/// A connection to the other processes' GPUs.
struct Connected(Comm);

// SAFETY: NCCL's handle may be used by any thread, one at a time, which the mutex around it sees to.
unsafe impl Send for Connected {}

/// The sum of a tensor over the processes, in the order of their ranks. f32, contiguous, on this process's GPU; the same
/// shape in all.
///
/// # Errors
/// NCCL can't be reached, or the other processes.
pub fn sum(world: &dyn World, tensor: &Tensor) -> Result<Tensor> {
    static CONNECTED: OnceLock<Mutex<Connected>> = OnceLock::new();
    let connected = match CONNECTED.get() {
        Some(connected) => connected,
        None => {
            let connected = connect(world, tensor)?;
            CONNECTED.get_or_init(|| Mutex::new(connected))
        }
    };
    let connected = connected.lock().unwrap_or_else(|broken| broken.into_inner());
    let flat = tensor.to_dtype(DType::F32)?.flatten_all()?;
    let mut sums = Vec::new();
    for start in (0..flat.elem_count()).step_by(BLOCK) {
        let block = flat.narrow(0, start, BLOCK.min(flat.elem_count() - start))?.contiguous()?;
        let all = block.apply_op1_no_bwd(&Gathered { connected: &connected.0, size: world.size() })?;
        let mut sum = all.get(0)?;
        for rank in 1..world.size() {
            sum = (sum + all.get(rank)?)?;
        }
        sums.push(sum);
    }
    Ok(Tensor::cat(&sums, 0)?.reshape(tensor.shape())?)
}

/// Joins the other processes, each with the GPU that the tensor is on.
fn connect(world: &dyn World, tensor: &Tensor) -> Result<Connected> {
    let failed = |what: &'static str| move |error| anyhow::anyhow!("NCCL: {what}: {error:?}");
    let stream = tensor.device().as_cuda_device()?.cuda_stream();
    let own = if world.leads() {
        Id::new().map_err(failed("no id"))?.internal().iter().map(|&byte| byte as u8).collect()
    } else {
        Vec::new()
    };
    let ids = world.gather(&own)?;
    let id =
        ids.first().and_then(|id| id.first_chunk::<128>()).context("rank 0 has given no id of NCCL's")?;
    let id = Id::uninit(id.map(|byte| byte as core::ffi::c_char));
    let comm = Comm::from_rank(stream, world.rank(), world.size(), id)
        .map_err(failed("the others can't be joined"))?;
    Ok(Connected(comm))
}

/// (n) → (size, n): what every process has, by rank.
struct Gathered<'a> {
    connected: &'a Comm,
    size: usize,
}

impl CustomOp1 for Gathered<'_> {
    fn name(&self) -> &'static str {
        "all-gather"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        candle_core::bail!("NCCL carries numbers from GPU to GPU")
    }

    fn cuda_fwd(&self, own: &CudaStorage, layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("numbers that go round have to be contiguous")
        };
        let own_numbers = own.as_cuda_slice::<f32>()?.slice(start..end);
        let mut all = own.device.alloc_zeros::<f32>(self.size * (end - start))?;
        self.connected
            .all_gather(&own_numbers, &mut all)
            .map_err(|error| candle_core::Error::msg(format!("NCCL: {error:?}")))?;
        let shape = Shape::from((self.size, end - start));
        Ok((CudaStorage::wrap_cuda_slice(all, own.device.clone()), shape))
    }
}
