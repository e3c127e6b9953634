//! `tk`: arguments in, exit code out; errors as a chain on stderr.

use std::process::ExitCode;

use tk::cli::{self, Cli};

fn main() -> ExitCode {
    keep_freed_memory();
    leave_threads_to_rayon();
    let done = Cli::parse_with_config(std::env::args_os()).and_then(cli::run);
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if is_closed_pipe(&error) {
                return ExitCode::SUCCESS;
            }
            eprintln!("error: {error:#}");
            ExitCode::from(tk::error::exit_code(&error))
        }
    }
}

/// Whether the reader of our output has gone, as `head` does: no failure of ours.
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
    })
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
