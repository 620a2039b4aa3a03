//! `img-tcmu serve`: the daemon.

use super::Failure;
use crate::config::Configuration;
use crate::daemon::{self, dbus, log};
use clap::Args;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

/// Serve user:img backstores (the daemon; runs in the foreground)
///
/// Needs root, the kernel module target_core_user and configfs. Backstores are created with targetcli ('/backstores/user:img create
/// NAME SIZE @file=/path/to/image'), with 'img-tcmu attach', or by hand through configfs. No configuration file is needed. SIGTERM
/// drains and flushes all disks and ends; their initiators wait until a daemon runs again. SIGHUP reads the configuration file again.
#[derive(Debug, Args)]
pub struct Serve {
    /// The configuration file [default: /etc/img-tcmu/config.toml, if it exists]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Directory in which backing files and extents may lie, besides each image's own
    #[arg(long, value_name = "DIR")]
    allow: Vec<PathBuf>,
    /// Threads that do I/O, for all disks together
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: Option<u16>,
    /// Log level (error, warn, info, debug, trace) or a filter such as 'img_tcmu::tcmu=trace' [default: info]
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
    /// Only say whether the command line and the configuration are in order
    #[arg(long)]
    dry_run: bool,
    #[arg(long, hide = true, default_value = daemon::RUN_DIRECTORY)]
    run_dir: PathBuf,
    /// Bytes of kernel events that may wait: a small buffer shows what happens when it overflows.
    #[arg(long, hide = true)]
    event_buffer: Option<usize>,
    #[arg(long, hide = true)]
    dbus_address: Option<String>,
}

impl Serve {
    /// Runs the daemon to its end.
    pub fn run(self) -> Result<ExitCode, Failure> {
        let configuration = Configuration::load(self.config.as_deref()).map_err(|error| Failure::new(error.to_string()))?;
        let level = self.log_level.as_deref().or(configuration.log_level.as_deref()).unwrap_or("info");
        if self.dry_run {
            log::check(level).map_err(Failure::new)?;
            let text = format!("img-tcmu {}, {} exports\n", env!("CARGO_PKG_VERSION"), configuration.exports.len());
            io::stdout().write_all(text.as_bytes()).map_err(Failure::output)?;
            return Ok(ExitCode::SUCCESS);
        }
        log::init(level).map_err(Failure::new)?;
        let options = daemon::Options {
            config: self.config,
            run_directory: self.run_dir,
            workers: self.workers.map(usize::from),
            allow: self.allow,
            event_buffer: self.event_buffer,
            bus: dbus::Options { address: self.dbus_address, ..dbus::Options::default() },
        };
        daemon::run(&options, &configuration).map_err(|error| Failure::caused("the daemon ended", error))?;
        Ok(ExitCode::SUCCESS)
    }
}
