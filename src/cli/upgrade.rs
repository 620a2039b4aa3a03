//! `img-tcmu upgrade`: a running daemon becomes another version of itself.

use super::Failure;
use crate::daemon::RUN_DIRECTORY;
use crate::daemon::control::{
    self,
    protocol::{Request, Status},
};
use clap::Args;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

/// How long the successor may take until it serves.
const PATIENCE: Duration = Duration::from_secs(120);

/// Have the running daemon replaced by this program, without an initiator noticing more than a pause
///
/// The daemon first has the new program check its command line and configuration, and goes on as it is if that fails. Otherwise it
/// finishes the commands under way, flushes and closes the images and executes the new program in its own place, under the same
/// process id. Initiators wait meanwhile.
#[derive(Debug, Args)]
pub struct Upgrade {
    /// The program that takes over [default: the one that runs this command]
    #[arg(value_name = "PROGRAM")]
    binary: Option<PathBuf>,
    #[arg(long, hide = true, default_value = RUN_DIRECTORY)]
    run_dir: PathBuf,
}

impl Upgrade {
    /// Asks for it, and waits until all disks are served again.
    pub fn run(self) -> Result<ExitCode, Failure> {
        let binary = match self.binary {
            Some(binary) => binary.canonicalize().map_err(|error| Failure::caused(format!("cannot find {}", binary.display()), error))?,
            None => std::env::current_exe().map_err(|error| Failure::caused("cannot find this program", error))?,
        };
        let before: Status = control::ask(&self.run_dir, &Request::Status)?;
        let begun: String = control::ask(&self.run_dir, &Request::Upgrade { binary })?;
        writeln!(io::stdout(), "{begun}").map_err(Failure::output)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            thread::sleep(Duration::from_millis(20));
            let status: Result<Status, _> = control::ask(&self.run_dir, &Request::Status);
            if let Ok(Status { pause_ms: Some(pause), incarnation, version, devices, .. }) = status
                && incarnation != before.incarnation
            {
                let text = format!("img-tcmu {version} serves {} disks; the pause was {pause:.1} ms\n", devices.len());
                io::stdout().write_all(text.as_bytes()).map_err(Failure::output)?;
                return Ok(ExitCode::SUCCESS);
            }
            if Instant::now() > deadline {
                let text = "the new program does not serve all disks yet; 'img-tcmu status' and the daemon's log tell more";
                return Err(Failure::new(text));
            }
        }
    }
}
