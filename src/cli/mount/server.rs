//! The process that serves the file for a loop device: `img-tcmu fuse`, which lives for as long as somebody has the file open.

use super::state::{Process, State, Way};
use crate::cli::{Failure, ImageArgs};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Between looks at whether something happened.
const TICK: Duration = Duration::from_millis(20);
/// A server that does not end after a signal in so long is left to itself.
const END: Duration = Duration::from_secs(60);

/// A server that nobody else uses yet: dropping it ends it.
pub struct Server {
    child: Child,
    directory: std::path::PathBuf,
    keep: bool,
}

impl Server {
    /// Starts it and waits until the file is there.
    ///
    /// # Errors
    /// What the server said when it ended; an interruption.
    pub fn start(state: &mut State, image: &ImageArgs, read_only: bool, interrupted: &AtomicBool) -> Result<Self, Failure> {
        let directory = state.fuse_directory();
        let failed = |error: io::Error| Failure::caused(format!("cannot prepare {}", directory.display()), error);
        fs::create_dir(&directory).map_err(failed)?;
        let socket = UnixDatagram::bind(state.notify_socket()).map_err(failed)?;
        socket.set_read_timeout(Some(TICK)).map_err(failed)?;
        let log = File::options().create_new(true).append(true).open(state.log()).map_err(failed)?;
        let words = log.try_clone().map_err(failed)?;
        let program = std::env::current_exe().map_err(|error| Failure::caused("cannot find our own program", error))?;
        let mut command = Command::new(program);
        command.args(["fuse", "--leash"]);
        command.arg(if read_only { "--read-only" } else { "--direct-io" });
        command.args(image.to_arguments()).arg(&directory);
        // A group of its own: the terminal's Ctrl-C is ours to handle.
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(log).env("NOTIFY_SOCKET", state.notify_socket()).process_group(0);
        let child = command.spawn().map_err(|error| Failure::caused("cannot start a server", error))?;
        let mut server = Self { child, directory: directory.clone(), keep: false };
        state.record.way = Way::Fuse { server: Process::of(server.child.id()) };
        state.save().map_err(failed)?;
        let mut message = [0; 4096];
        loop {
            match socket.recv(&mut message) {
                Ok(len) if message.get(..len).unwrap_or_default().starts_with(b"READY=1") => {
                    // What it complained of so far is told now, what it will complain of by `umount`.
                    let said = fs::read_to_string(state.log()).map_err(failed)?;
                    said.lines().filter(|line| !line.contains(&*directory.to_string_lossy())).for_each(|line| eprintln!("{line}"));
                    words.set_len(0).map_err(failed)?;
                    return Ok(server);
                }
                Ok(_) => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted) => {}
                Err(error) => return Err(failed(error)),
            }
            if interrupted.load(Ordering::SeqCst) {
                return Err(Failure::interrupted());
            }
            if server.child.try_wait().map_err(failed)?.is_some() {
                server.keep = true;
                let said = fs::read_to_string(state.log()).unwrap_or_default();
                return Err(Failure::new(match said.trim().trim_start_matches("img-tcmu: ") {
                    "" => "the server ended without a word".to_owned(),
                    said => said.to_owned(),
                }));
            }
        }
    }

    /// Lets it go on without us: out of sight, it ends when the loop device does.
    ///
    /// # Errors
    /// The server died, or its file cannot be hidden.
    pub fn leave(mut self) -> Result<(), Failure> {
        let said = self.child.stdin.take().map(|mut leash| leash.write_all(b"k"));
        if !matches!(said, Some(Ok(()))) {
            return Err(Failure::new("the server died"));
        }
        // Whoever has the file open keeps it.
        umount2(&self.directory, MntFlags::MNT_DETACH)
            .map_err(|error| Failure::caused(format!("cannot detach {}", self.directory.display()), error))?;
        self.keep = true;
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if !self.keep {
            // It is our child, and not waited for yet: the number is its own.
            if let Some(process) = Process::of(self.child.id()) {
                end(process);
            }
            let _ = self.child.wait();
        }
    }
}

/// Ends a server: by a signal, by a second one when its file is still in use.
pub fn end(process: Process) {
    for patience in [Duration::from_secs(5), END] {
        // It may have ended just now.
        let _ = kill(Pid::from_raw(process.id), Signal::SIGTERM);
        if wait(process, patience) {
            return;
        }
    }
}

/// Waits for a server to end. `false`: it has not.
pub fn wait(process: Process, patience: Duration) -> bool {
    let start = Instant::now();
    while process.is_alive() {
        if start.elapsed() > patience {
            return false;
        }
        thread::sleep(TICK);
    }
    true
}
