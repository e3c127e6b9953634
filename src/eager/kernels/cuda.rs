//! What a GPU runs where candle's operations would be many, or have no gradient: candle's own kernels of softmax,
//! layer norm and rotary positions, and dropout, whose mask is drawn where it is used.
//!
//! None of this has run on a GPU yet: it is compiled by `scripts/check-cuda`, the mask's arithmetic is held against the
//! CPU's by a test of `dropout`, and `scripts/gpu-check` trains with it.

use std::sync::OnceLock;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{LaunchConfig, PushKernelArg};
use candle_core::cuda_backend::cudarc::nvrtc::compile_ptx;
use candle_core::cuda_backend::{CudaStorage, WrapErr, kernels};
use candle_core::{Layout, Result, Shape};

use super::contiguous;
use super::dropout::Mask;

/// Threads of a block, of element-wise kernels.
const THREADS: u32 = 256;

/// Blocks of an element-wise kernel, at most: each thread goes on to the next of its numbers.
const BLOCKS: usize = 1 << 16;

/// [`super::softmax::softmax`] of an f32 storage, a warp a row.
pub fn softmax(x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
    let (n, columns) = (layout.shape().elem_count(), last(layout));
    let device = x.device().clone();
    let x = x.as_cuda_slice::<f32>()?.slice(contiguous(layout)?);
    // SAFETY: the kernel writes every number.
    let mut y = unsafe { device.alloc::<f32>(n)? };
    if n > 0 {
        let kernel = device.get_or_load_func("softmax_f32", &kernels::REDUCE)?;
        let grid = LaunchConfig {
            grid_dim: ((n / columns) as u32, 1, 1),
            block_dim: (1, 32, 1),
            shared_mem_bytes: 0,
        };
        let columns = columns as i32;
        let mut launch = kernel.builder();
        launch.arg(&x).arg(&mut y).arg(&columns);
        // SAFETY: the arguments are those of the kernel, and x and y have a row for each block.
        unsafe { launch.launch(grid) }.w()?;
    }
    Ok((CudaStorage::wrap_cuda_slice(y, device), layout.shape().clone()))
}

/// [`super::layer_norm::composite`] of f32 storages, a block a row.
pub fn layer_norm([x, weight, bias]: [(&CudaStorage, &Layout); 3], eps: f32) -> Result<(CudaStorage, Shape)> {
    let shape = x.1.shape().clone();
    let (n, columns) = (shape.elem_count(), last(x.1));
    let device = x.0.device().clone();
    let x = x.0.as_cuda_slice::<f32>()?.slice(contiguous(x.1)?);
    let weight = weight.0.as_cuda_slice::<f32>()?.slice(contiguous(weight.1)?);
    let bias = bias.0.as_cuda_slice::<f32>()?.slice(contiguous(bias.1)?);
    // SAFETY: the kernel writes every number.
    let mut y = unsafe { device.alloc::<f32>(n)? };
    if n > 0 {
        let kernel = device.get_or_load_func("layernorm_f32", &kernels::REDUCE)?;
        let threads = if columns < 1024 { 32 } else { 1024 };
        let grid = LaunchConfig {
            grid_dim: ((n / columns) as u32, 1, 1),
            block_dim: (threads, 1, 1),
            shared_mem_bytes: 0,
        };
        let (columns, threads) = (columns as i32, threads as i32);
        let mut launch = kernel.builder();
        launch.arg(&x).arg(&mut y).arg(&weight).arg(&bias).arg(&columns).arg(&threads).arg(&eps);
        // SAFETY: the arguments are those of the kernel; x and y have a row for each block, and weight and bias a number
        // for each column.
        unsafe { launch.launch(grid) }.w()?;
    }
    Ok((CudaStorage::wrap_cuda_slice(y, device), shape))
}

/// [`super::rotary::Turns::turn`] of f32 storages, rows of (T, H, D) by (T, D / 2): a thread a pair of channels.
pub fn turn(
    [x, cos, sin]: [(&CudaStorage, &Layout); 3],
    (rows, heads, d): (usize, usize, usize),
) -> Result<(CudaStorage, Shape)> {
    let (shape, n) = (x.1.shape().clone(), rows * heads * d);
    let device = x.0.device().clone();
    let x = x.0.as_cuda_slice::<f32>()?.slice(contiguous(x.1)?);
    let cos = cos.0.as_cuda_slice::<f32>()?.slice(contiguous(cos.1)?);
    let sin = sin.0.as_cuda_slice::<f32>()?.slice(contiguous(sin.1)?);
    // SAFETY: the kernel writes every number.
    let mut y = unsafe { device.alloc::<f32>(n)? };
    if n > 0 {
        let kernel = device.get_or_load_func("rope_thd_f32", &kernels::REDUCE)?;
        let grid = LaunchConfig::for_num_elems((n / 2) as u32);
        // one batch, whose angles are not others' too
        let [batches, rows, heads, d, of_batch] = [1, rows as u32, heads as u32, d as u32, 0];
        let mut launch = kernel.builder();
        launch.arg(&x).arg(&cos).arg(&sin).arg(&mut y);
        launch.arg(&batches).arg(&rows).arg(&heads).arg(&d).arg(&of_batch);
        // SAFETY: the arguments are those of the kernel, which stays inside rows · heads · d numbers of x and y and
        // rows · d / 2 of the angles.
        unsafe { launch.launch(grid) }.w()?;
    }
    Ok((CudaStorage::wrap_cuda_slice(y, device), shape))
}

/// An f32 storage times a mask; of rows, (R), where they are given, each of which has a part of x.
pub fn dropout(
    x: &CudaStorage,
    layout: &Layout,
    mask: Mask,
    rows: Option<(&CudaStorage, &Layout)>,
) -> Result<(CudaStorage, Shape)> {
    static COMPILED: OnceLock<String> = OnceLock::new();
    let ptx = match COMPILED.get() {
        Some(ptx) => ptx,
        None => {
            let ptx = compile_ptx(include_str!("cuda.cu")).w()?.to_src();
            COMPILED.get_or_init(|| ptx)
        }
    };
    let n = layout.shape().elem_count();
    let device = x.device().clone();
    let x = x.as_cuda_slice::<f32>()?.slice(contiguous(layout)?);
    // SAFETY: the kernel writes every number.
    let mut y = unsafe { device.alloc::<f32>(n)? };
    if n > 0 {
        let grid = LaunchConfig {
            grid_dim: (n.div_ceil(THREADS as usize).min(BLOCKS) as u32, 1, 1),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: 0,
        };
        let name = if rows.is_some() { "dropout_of_rows" } else { "dropout" };
        let kernel = device.get_or_load_custom_func(name, "tk", ptx)?;
        let Mask { key, threshold, scale } = mask;
        let numbers = n as u64;
        let rows = match rows {
            Some((rows, of_rows)) => Some(rows.as_cuda_slice::<u32>()?.slice(contiguous(of_rows)?)),
            None => None,
        };
        let columns = rows.as_ref().map_or(0, |rows| n / rows.len()) as u32;
        let mut launch = kernel.builder();
        launch.arg(&x).arg(&mut y);
        if let Some(rows) = &rows {
            launch.arg(rows).arg(&columns);
        }
        launch.arg(&numbers).arg(&key).arg(&threshold).arg(&scale);
        // SAFETY: the arguments are those of the kernel, which stays inside the n numbers of x and y and reads of rows
        // one for each of their `columns`.
        unsafe { launch.launch(grid) }.w()?;
    }
    Ok((CudaStorage::wrap_cuda_slice(y, device), layout.shape().clone()))
}

fn last(layout: &Layout) -> usize {
    layout.shape().dims().last().copied().unwrap_or(1).max(1)
}
