//! The top error: one variant a module, each with a hint and an exit code.

use crate::cli::eval::ConfigFileError;
use crate::job::JobError;

/// Why a command could not be done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Config(#[from] ConfigFileError),
    #[error(transparent)]
    Job(#[from] JobError),
}

impl Error {
    /// How to mend it.
    pub fn hint(&self) -> String {
        match self {
            Error::Config(error) => error.hint(),
            Error::Job(error) => error.hint(),
        }
    }

    /// 2: it could not run.
    pub fn exit_code(&self) -> u8 {
        2
    }
}

/// Prints the error, its place and its hint to stderr.
#[allow(
    clippy::print_stderr,
    reason = "the one place where a failed command speaks"
)]
pub fn print(error: &Error) {
    eprintln!("error: {error}");
    eprintln!("hint: {}", error.hint());
}
