//! What this process asks of the C library and of candle before it computes.

/// Makes the process ready for training; the first thing that `main` does, before another thread runs.
pub fn prepare() {
    keep_freed_memory();
    leave_threads_to_rayon();
}

/// Keeps candle's element-wise operations in the thread that calls them. Its own pool of threads would wait
/// spinning for the next one, on the cores that our kernels compute on. A CANDLE_NUM_THREADS that is set wins.
fn leave_threads_to_rayon() {
    const KEY: &str = "CANDLE_NUM_THREADS";
    if std::env::var_os(KEY).is_none() {
        // SAFETY: called before any other thread runs.
        unsafe { std::env::set_var(KEY, "1") };
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
