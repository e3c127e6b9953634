//! `tk`: arguments in, exit code out; errors as a chain on stderr.

use std::process::ExitCode;

use tk::cli::{self, Cli};

fn main() -> ExitCode {
    tk::process::prepare();
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
