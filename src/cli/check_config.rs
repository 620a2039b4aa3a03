//! `img-tcmu check-config`: what CheckConfig on D-Bus would answer.

use super::Failure;
use crate::config::Configuration;
use crate::daemon::check;
use clap::Args;
use std::ffi::OsString;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::process::ExitCode;

/// Check a configuration string: its grammar, then whether the image opens
#[derive(Debug, Args)]
pub struct CheckConfig {
    /// As given to targetcli (@key=value…, @NAME or /path), with or without a leading 'img/'
    cfgstring: OsString,
    /// Check the grammar alone; open nothing
    #[arg(long)]
    syntax: bool,
    /// The configuration file, for @NAME and directories [default: /etc/img-tcmu/config.toml]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl CheckConfig {
    /// Prints the string in its canonical form, or fails with the reason.
    pub fn run(self) -> Result<ExitCode, Failure> {
        let bytes = self.cfgstring.as_bytes();
        let rest = bytes.strip_prefix(b"img/").unwrap_or(bytes);
        let config = check::syntax(rest).map_err(Failure::new)?;
        if !self.syntax {
            let configuration = Configuration::load(self.config.as_deref()).map_err(|error| Failure::new(error.to_string()))?;
            check::open(&configuration.environment(), &config)?;
        }
        writeln!(io::stdout(), "{config}").map_err(Failure::output)?;
        Ok(ExitCode::SUCCESS)
    }
}
