//! `img-tcmu reload`: the daemon reads its configuration file again.

use super::Failure;
use crate::daemon::RUN_DIRECTORY;
use crate::daemon::control::{self, protocol::Request};
use clap::Args;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

/// Have the daemon read its configuration file again
///
/// A file with errors changes nothing, and the errors are told. The same as SIGHUP, which tells the log. What is read: exports,
/// directories and the cache's size; the rest takes a restart.
#[derive(Debug, Args)]
pub struct Reload {
    #[arg(long, hide = true, default_value = RUN_DIRECTORY)]
    run_dir: PathBuf,
}

impl Reload {
    /// Prints what the daemon says.
    pub fn run(self) -> Result<ExitCode, Failure> {
        let done: String = control::ask(&self.run_dir, &Request::Reload)?;
        writeln!(io::stdout(), "{done}").map_err(Failure::output)?;
        Ok(ExitCode::SUCCESS)
    }
}

impl From<control::AskError> for Failure {
    fn from(error: control::AskError) -> Self {
        let message = error.to_string();
        match error {
            control::AskError::Absent(_, source) | control::AskError::Broken(_, source) => Self::caused(message, source),
            control::AskError::Refused(_) => Self::new(message),
        }
    }
}
