//! `tk`: arguments in, exit code out; errors as a chain on stderr.

use std::process::ExitCode;

use tk::cli::{self, Cli};
use tk::say::{Logged, StdoutClosed, tell};

fn main() -> ExitCode {
    // SAFETY: no other thread runs yet.
    unsafe { tk::process::prepare() };
    ended(|| Cli::parse_with_config(std::env::args_os()).and_then(cli::run)).into()
}

/// Runs the command and tells of its error; the exit code.
fn ended(command: impl FnOnce() -> tk::Result<()> + std::panic::UnwindSafe) -> u8 {
    let done = std::panic::catch_unwind(command);
    let done = done.unwrap_or_else(|panic| Err(tk::error::of_panic("the command", panic.as_ref())));
    let Err(error) = done else { return 0 };
    if error.chain().any(|cause| cause.is::<StdoutClosed>()) {
        return 0; // as `head` wants it; another pipe's reader that goes is a failure
    }
    if !error.is::<Logged>() {
        tell(format!("error: {error:#}"));
    }
    tk::error::exit_code(&error)
}

#[cfg(test)]
mod tests {
    use std::io::{Error, ErrorKind};

    use super::*;

    #[test]
    fn a_panic_is_work_that_failed() {
        assert_eq!(ended(|| panic!("of a test")), 1);
    }

    #[test]
    fn only_standard_output_may_be_closed_by_its_reader() {
        assert_eq!(ended(|| Err(anyhow::Error::new(StdoutClosed).context("generating"))), 0);
        assert_eq!(ended(|| Err(anyhow::Error::new(Error::from(ErrorKind::BrokenPipe)))), 1);
    }
}
