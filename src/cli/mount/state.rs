//! What `umount` has to know: one directory for each mount under `/run/img-tcmu/mounts`, with a file that is replaced whole.
//!
//! The truth about what is mounted is the kernel's mount table; the state says what belongs to it. It is written before each step, so that a `mount`
//! that was killed leaves something to clean up by.

use crate::cli::Failure;
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// How the disk got into this kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// A process that serves a file over FUSE, and a loop device over that.
    Fuse {
        /// The process, once it runs.
        server: Option<Process>,
    },
    /// A disk of the SCSI target.
    Tcmu,
}

/// A process, so that another one with the same number is not taken for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its number.
    pub id: i32,
    /// When it started, in clock ticks since boot.
    pub started: u64,
}

impl Process {
    /// The process of that number, as it is now.
    pub fn of(id: u32) -> Option<Self> {
        let id = i32::try_from(id).ok()?;
        // proc(5): the name, in parentheses, may contain anything; "starttime" is field 22, the 20th after it.
        let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
        let after = stat.get(stat.rfind(')')? + 2..)?;
        if after.starts_with('Z') {
            return None;
        }
        Some(Self { id, started: after.split(' ').nth(19)?.parse().ok()? })
    }

    /// Whether it still runs.
    pub fn is_alive(self) -> bool {
        u32::try_from(self.id).ok().and_then(Self::of) == Some(self)
    }
}

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Where it is mounted: absolute, without links.
    pub directory: PathBuf,
    /// The image, for people.
    pub image: String,
    /// How.
    pub way: Way,
    /// The block device, once there is one.
    pub device: Option<PathBuf>,
    /// The `mount` that is at it.
    pub mounter: Option<Process>,
}

/// A record and the directory that it is kept in.
pub struct State {
    path: PathBuf,
    /// What is known.
    pub record: Record,
}

impl State {
    /// Starts a record.
    pub fn new(run_directory: &Path, record: Record) -> io::Result<Self> {
        let parent = run_directory.join("mounts");
        DirBuilder::new().recursive(true).mode(0o755).create(&parent)?;
        let path = parent.join(uuid::Uuid::new_v4().to_string());
        DirBuilder::new().mode(0o700).create(&path)?;
        let state = Self { path, record };
        state.save()?;
        Ok(state)
    }

    /// All records, of whatever age.
    pub fn all(run_directory: &Path) -> Vec<Self> {
        let Ok(entries) = fs::read_dir(run_directory.join("mounts")) else { return Vec::new() };
        entries
            .flatten()
            .filter_map(|entry| {
                let path = entry.path();
                let record = serde_json::from_slice(&fs::read(path.join("state.json")).ok()?).ok()?;
                Some(Self { path, record })
            })
            .collect()
    }

    /// Writes what is known now.
    pub fn save(&self) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(&self.record)?;
        let new = self.path.join("state.new");
        fs::write(&new, text)?;
        fs::rename(new, self.path.join("state.json"))
    }

    /// Where the server mounts its file, for as long as it takes to put a loop device over it.
    pub fn fuse_directory(&self) -> PathBuf {
        self.path.join("fuse")
    }

    /// What the server says.
    pub fn log(&self) -> PathBuf {
        self.path.join("log")
    }

    /// Where the server says that it is ready.
    pub fn notify_socket(&self) -> PathBuf {
        self.path.join("ready")
    }

    /// Forgets it. Never what is behind a mount: only the files that there may be, by name.
    pub fn remove(self) -> Result<(), Failure> {
        for file in [self.log(), self.notify_socket(), self.path.join("state.new"), self.path.join("state.json")] {
            match fs::remove_file(&file) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Failure::caused(format!("cannot remove {}", file.display()), error));
                }
                _ => {}
            }
        }
        for directory in [self.fuse_directory(), self.path] {
            match fs::remove_dir(&directory) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Failure::caused(format!("cannot remove {}", directory.display()), error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// The device that is mounted on a directory, the topmost if several are: `major:minor` is left to the caller, this is the table's source.
pub fn mounted_on(directory: &Path) -> io::Result<Option<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(table.lines().rev().find_map(|line| {
        // proc(5): "36 35 98:0 /root /point options optional… - type source options".
        let (front, back) = line.split_once(" - ")?;
        let point = unescape(front.split(' ').nth(4)?);
        (point == directory.as_os_str().as_encoded_bytes()).then(|| {
            let source = unescape(back.split(' ').nth(1).unwrap_or_default());
            PathBuf::from(std::ffi::OsStr::new(&*String::from_utf8_lossy(&source)))
        })
    }))
}

/// Blanks, tabs, newlines and backslashes are written as `\ooo`.
fn unescape(field: &str) -> Vec<u8> {
    let bytes = field.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let code = field.get(at + 1..at + 4).filter(|_| *byte == b'\\').and_then(|digits| u8::from_str_radix(digits, 8).ok());
        out.push(code.unwrap_or(*byte));
        at += if code.is_some() { 4 } else { 1 };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_more_than_its_number() {
        let me = Process::of(std::process::id()).unwrap();
        assert!(me.is_alive());
        assert!(!Process { started: me.started + 1, ..me }.is_alive());
        assert!(!Process { id: -1, started: 0 }.is_alive());
    }

    #[test]
    fn a_record_is_found_again_and_forgotten() {
        let run = tempfile::tempdir().unwrap();
        let record = Record {
            directory: "/mnt".into(),
            image: "/x y".into(),
            way: Way::Fuse { server: Process::of(std::process::id()) },
            device: None,
            mounter: None,
        };
        let state = State::new(run.path(), record.clone()).unwrap();
        fs::create_dir(state.fuse_directory()).unwrap();
        fs::write(state.log(), "x").unwrap();
        assert_eq!(State::all(run.path()).first().map(|s| s.record.clone()), Some(record));
        state.remove().unwrap();
        assert!(State::all(run.path()).is_empty());
        assert_eq!(fs::read_dir(run.path().join("mounts")).unwrap().count(), 0);
    }

    #[test]
    fn fields_of_the_mount_table_are_unescaped() {
        assert_eq!(unescape(r"/a\040b\134c"), br"/a b\c");
        assert_eq!(unescape(r"\04"), br"\04");
        assert_eq!(unescape(r"\"), br"\");
        assert_eq!(mounted_on(Path::new("/proc")).unwrap(), Some("proc".into()));
    }
}
