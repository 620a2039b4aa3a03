//! One daemon a machine: a locked file in the run directory.

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Held for the life of the daemon; the kernel drops it with the process, however that ends.
pub struct InstanceLock(#[expect(dead_code, reason = "held, not used")] Flock<File>);

impl InstanceLock {
    /// Takes `DIR/lock` and writes our process id into it.
    ///
    /// # Errors
    /// Another daemon holds it ([`io::ErrorKind::WouldBlock`], with its process id in the text), or the file cannot be made.
    pub fn take(dir: &Path) -> io::Result<Self> {
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
        drop(first);
        InstanceLock::take(dir.path()).expect("after the first");
    }
}
