//! What this process asks of the C library, of candle and of ONNX Runtime before it computes.

/// Makes the process ready; the first thing that `main` does, before another thread runs.
pub fn prepare() {
    keep_freed_memory();
    // Keeps candle's element-wise operations in the thread that calls them. Its own pool of threads would wait spinning
    // for the next one, on the cores that our kernels compute on.
    set_default("CANDLE_NUM_THREADS", "1");
    // GroupQueryAttention in tiles ("flash") is the slower way of ONNX Runtime 1.31 on a CPU, for prompts and for single
    // tokens: benches/generate with and without it tells by how much.
    set_default("ORT_GQA_DISABLE_FLASH_ATTENTION", "1");
}

/// Sets an environment variable, if it is not set.
fn set_default(key: &str, value: &str) {
    if std::env::var_os(key).is_none() {
        // SAFETY: called before any other thread runs.
        unsafe { std::env::set_var(key, value) };
    }
}

/// Tells glibc to keep large freed blocks. A training step allocates and frees the same large buffers over and
/// over; given back to the system, each is page-faulted in again, which costs as much as the arithmetic.
fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: called before any other thread runs; mallopt only sets the allocator's parameters.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}
