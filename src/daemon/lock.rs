//! One daemon a machine: a locked file in the run directory.

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

/// Held for the life of the daemon; the kernel drops it with the process, however that ends.
pub struct InstanceLock(#[expect(dead_code, reason = "held, not used")] Flock<File>);

impl InstanceLock {
    /// Takes `DIR/lock` and writes our process id into it.
    ///
    /// # Errors
    /// Another daemon holds it ([`io::ErrorKind::WouldBlock`], with its process id in the text), or the file cannot be made.
    pub fn take(dir: &Path) -> io::Result<Self> {
        // Somebody who asks whether a daemon runs holds the lock for a moment.
        for _ in 0..10 {
            match Self::try_take(dir) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(Duration::from_millis(20)),
                other => return other,
            }
        }
        Self::try_take(dir)
    }

    fn try_take(dir: &Path) -> io::Result<Self> {
        let path = dir.join("lock");
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o644).open(&path)?;
        let mut lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((file, Errno::EWOULDBLOCK)) => {
                let mut holder = String::new();
                // The holder's id is a courtesy: without it the message still says what to do.
                let _ = file.take(20).read_to_string(&mut holder);
                let text = format!("{} is held by process {}: another daemon runs; stop it first", path.display(), holder.trim());
                return Err(io::Error::new(io::ErrorKind::WouldBlock, text));
            }
            Err((_, errno)) => return Err(errno.into()),
        };
        lock.set_len(0)?;
        writeln!(lock, "{}", std::process::id())?;
        Ok(Self(lock))
    }
}

/// Whether a daemon runs, as far as we may find out.
pub fn is_held(dir: &Path) -> bool {
    match File::open(dir.join("lock")) {
        Ok(file) => matches!(Flock::lock(file, FlockArg::LockSharedNonblock), Err((_, Errno::EWOULDBLOCK))),
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_daemon_learns_who_is_first() {
        let dir = tempfile::tempdir().expect("tempdir");
        let first = InstanceLock::take(dir.path()).expect("first");
        let error = InstanceLock::take(dir.path()).err().expect("second");
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        assert!(error.to_string().contains(&format!("process {}:", std::process::id())), "{error}");
        assert!(is_held(dir.path()));
        drop(first);
        assert!(!is_held(dir.path()));
        InstanceLock::take(dir.path()).expect("after the first");
    }
}
