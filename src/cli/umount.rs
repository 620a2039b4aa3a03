//! `img-tcmu umount`: what `mount` did goes.

use super::Failure;
use super::detach::Detach;
use super::mount::state::{State, Way, mounted_on};
use super::mount::{server, sweep};
use clap::Args;
use nix::mount::{MntFlags, umount2};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

/// The last flush of a slow disk may take long.
const PATIENCE: Duration = Duration::from_secs(600);

/// Undo 'img-tcmu mount': unmount DIR, and let go of the image
///
/// When this returns, everything is written and the image is free for others. It refuses while files in DIR are in use. It can be repeated, also after an
/// interruption or after a plain 'umount DIR'.
#[derive(Debug, Args)]
pub struct Umount {
    /// The directory
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    #[arg(long, hide = true, default_value = crate::daemon::RUN_DIRECTORY)]
    run_dir: PathBuf,
}

impl Umount {
    /// Unmounts and waits for the image to be closed.
    pub fn run(self) -> Result<ExitCode, Failure> {
        let name = self.directory.display();
        // A filesystem that is dead cannot be looked at, but its name is known.
        let directory = self.directory.canonicalize().or_else(|_| std::path::absolute(&self.directory));
        let directory = directory.map_err(|error| Failure::caused(format!("cannot resolve {name}"), error))?;
        let mine = State::all(&self.run_dir).into_iter().find(|state| state.record.directory == directory);
        let mounted = mounted_on(&directory).map_err(|error| Failure::caused("cannot read the mount table", error))?;
        let Some(state) = mine else {
            return Err(Failure::new(match mounted {
                Some(_) => format!("{name} was not mounted by 'img-tcmu mount': use umount(8)"),
                None => format!("nothing is mounted on {name}"),
            }));
        };
        match (&mounted, &state.record.device) {
            (Some(there), Some(device)) if there == device => unmount(&directory)?,
            (Some(there), _) => return Err(Failure::new(format!("{} is mounted over it on {name}: unmount that first", there.display()))),
            (None, _) => {}
        }
        finish(state)?;
        sweep(&self.run_dir);
        Ok(ExitCode::SUCCESS)
    }
}

/// umount(8), which also keeps the user space's tables.
fn unmount(directory: &Path) -> Result<(), Failure> {
    let out = Command::new("umount")
        .arg("--")
        .arg(directory)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Failure::caused("cannot run umount(8)", error))?;
    if out.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&out.stderr);
    Err(Failure::new(format!("{} ('fuser -vm {}' shows who uses it)", said.trim(), directory.display())))
}

/// What was below the mount.
fn finish(state: State) -> Result<(), Failure> {
    match &state.record.way {
        Way::Tcmu => {
            if let Some(device) = &state.record.device {
                Detach::disk(device).run()?;
            }
        }
        Way::Fuse { server } => {
            // It is in sight only if `mount` was killed.
            let _ = umount2(&state.fuse_directory(), MntFlags::MNT_DETACH);
            if let Some(server) = server
                && !server::wait(*server, PATIENCE)
            {
                return Err(Failure::new(format!(
                    "process {} still serves {}: something else uses its loop device ('losetup -l' shows them)",
                    server.id, state.record.image
                )));
            }
            let said = fs::read_to_string(state.log()).unwrap_or_default();
            let complaints: Vec<&str> = said.lines().collect();
            if complaints.iter().any(|line| line.starts_with("img-tcmu: ")) {
                let failure = Failure::new(format!("{} was not closed well: {}", state.record.image, complaints.join("; ")));
                state.remove()?;
                return Err(failure);
            }
            if !complaints.is_empty() {
                eprintln!("{}", complaints.join("\n"));
            }
        }
    }
    state.remove()
}
