//! Errors carry place, finding and remedy; the kind decides the exit code.
//!
//! Everything returns [`anyhow::Result`]. An error in whose chain an [`Unusable`] stands is the
//! caller's to mend (exit code 2, nothing was changed); every other error is work that failed (1).

use signal_hook::consts::SIGINT;

use crate::process;

/// Wrong usage or unusable input: a file, a setting or a machine that cannot serve the request.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Unusable(pub String);

/// The crate's result type.
pub type Result<T, E = anyhow::Error> = std::result::Result<T, E>;

/// Makes an [`Unusable`] error from a format string.
#[macro_export]
macro_rules! unusable {
    ($($arg:tt)*) => { ::anyhow::Error::new($crate::error::Unusable(format!($($arg)*))) };
}

/// Returns with an [`Unusable`] error.
#[macro_export]
macro_rules! bail_unusable {
    ($($arg:tt)*) => { return Err($crate::unusable!($($arg)*)) };
}

/// A signal has asked for the end of work that can be gone on with.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Stopped {
    pub signal: i32,
    pub message: String,
}

/// The process's exit code for an error: 2 where the input or the usage is at fault; 128 and its number where a signal
/// has stopped the work, but for Ctrl-C; else 1.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    if error.chain().any(|cause| cause.is::<Unusable>()) {
        return 2;
    }
    match error.chain().find_map(|cause| cause.downcast_ref::<Stopped>()) {
        Some(Stopped { signal, .. }) if *signal != SIGINT => {
            process::exit_code(*signal).try_into().unwrap_or(1)
        }
        _ => 1,
    }
}

/// What a thread's panic said, as an error.
pub fn of_panic(what: &str, panic: &(dyn std::any::Any + Send)) -> anyhow::Error {
    let said = panic.downcast_ref::<&str>().copied();
    let said = said.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("a panic");
    anyhow::anyhow!("{what} broke down: {said}; this is a fault of tk's, please report it")
}
