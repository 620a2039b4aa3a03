//! Redo logs as files in a directory that outlives the process and not the machine (`/run`).
//!
//! One file per image, named by device and inode. Layout, little-endian:
//! ```text
//! header (4096 bytes)   magic "IMGREDO1", boot id (16), device u64, inode u64, start u64, last sign of life u64 (ns since 1970)
//! record (from `start`) length of bytes u32, CRC-32C of all that follows u32, group u64, at u64, store u32, stage u32, bytes
//! ```
//! A record that is cut short or whose checksum is wrong ends the log: it was never acknowledged. Records that became durable in the image are
//! given back as a hole before `start`, so the file takes as much memory as is pending.
//!
//! # Whose image is it?
//! Between the death of a process and its successor's start, somebody else may have opened the image. A log is only made good if the image
//! has not been written to after the log's last sign of life ([`HEARTBEAT`] apart while there are records) plus a [`GRACE`]. Otherwise the image is left
//! alone and opening it for writing fails, loudly.

use super::{Record, RedoLog, replay};
use crate::error::{Error, Kind, Result};
use crate::open::RedoLogs;
use crate::store::{FileStore, Store};
use crate::writeback::Stage;
use parking_lot::Mutex;
use rustix::fs::{FallocateFlags, fallocate};
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Time between signs of life.
pub const HEARTBEAT: Duration = Duration::from_millis(500);
/// How much later than the last sign of life the image may have been written to by us.
pub const GRACE: Duration = Duration::from_secs(2);

const MAGIC: &[u8; 8] = b"IMGREDO1";
const HEADER: u64 = 4096;
const START_AT: u64 = 40;
const ALIVE_AT: u64 = 48;
const RECORD: usize = 32;
/// No single write of metadata is longer than the largest table that a format writes at once.
const MAX_RECORD: u32 = 256 << 20;

/// A directory of redo logs.
pub struct RedoDirectory {
    directory: PathBuf,
    boot_id: [u8; 16],
    live: Arc<Mutex<Vec<Weak<Mutex<State>>>>>,
}

impl RedoDirectory {
    /// Uses `directory` (`/run/img-tcmu/redo`), which is made if it is missing, for root's eyes only.
    ///
    /// # Errors
    /// The host's.
    pub fn new(directory: impl Into<PathBuf>) -> Result<Self> {
        let directory = directory.into();
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .map_err(|e| Error::io("cannot make the directory for redo logs", e).at_path(&directory))?;
        let live: Arc<Mutex<Vec<Weak<Mutex<State>>>>> = Arc::default();
        let logs = Arc::downgrade(&live);
        std::thread::Builder::new()
            .name("redo-heartbeat".into())
            .spawn(move || {
                while let Some(logs) = logs.upgrade() {
                    logs.lock().retain(|log| log.upgrade().map(|log| log.lock().beat()).is_some());
                    drop(logs);
                    std::thread::sleep(HEARTBEAT);
                }
            })
            .map_err(|e| Error::io("cannot start the thread that keeps redo logs alive", e))?;
        Ok(Self { directory, boot_id: boot_id()?, live })
    }
}

/// This boot's id; a log of another boot is void, since the page cache that it relies on is gone.
fn boot_id() -> Result<[u8; 16]> {
    let path = "/proc/sys/kernel/random/boot_id";
    let text = std::fs::read_to_string(path).map_err(|e| Error::io("cannot read the boot id", e).at_path(path))?;
    Ok(uuid::Uuid::parse_str(text.trim()).map_or([0; 16], uuid::Uuid::into_bytes))
}

impl RedoLogs for RedoDirectory {
    fn begin(&self, image: &FileStore, stores: &[Arc<dyn Store>]) -> Result<Box<dyn RedoLog>> {
        let meta = image.file().metadata().map_err(|e| Error::io("cannot look at the image", e))?;
        let path = self.directory.join(format!("{}-{}.redo", meta.dev(), meta.ino()));
        let fail = |what: &str, e: io::Error| Error::io(what, e).at_path(&path);
        // Who holds the image's locks is the only one to come here: no lock is needed on the log.
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(nix::libc::O_NOFOLLOW)
            .open(&path)
            .map_err(|e| fail("cannot open the redo log", e))?;
        let left = read(&file).map_err(|e| fail("cannot read the redo log", e))?;
        if let Some(left) = left.filter(|l| l.boot_id == self.boot_id && !l.records.is_empty()) {
            let written = Duration::new(u64::try_from(meta.mtime()).unwrap_or(0), u32::try_from(meta.mtime_nsec()).unwrap_or(0));
            if written > left.alive + GRACE {
                return Err(Error::new(
                    Kind::Denied,
                    format!(
                        "a process that served this image died with {} acknowledged changes still to be written, and somebody has written to the image since; they are not applied over it. Check the image, then remove {} to open it without them",
                        left.records.len(),
                        path.display()
                    ),
                ));
            }
            tracing::warn!(image = ?image.path(), records = left.records.len(), "finishing what a process that died had acknowledged");
            replay(&left.records, stores)?;
        }
        let mut header = vec![0; HEADER as usize];
        header[..8].copy_from_slice(MAGIC);
        header[8..24].copy_from_slice(&self.boot_id);
        header[24..32].copy_from_slice(&meta.dev().to_le_bytes());
        header[32..40].copy_from_slice(&meta.ino().to_le_bytes());
        header[40..48].copy_from_slice(&HEADER.to_le_bytes());
        header[48..56].copy_from_slice(&nanoseconds().to_le_bytes());
        file.set_len(0).and_then(|()| file.write_all_at(&header, 0)).map_err(|e| fail("cannot start the redo log", e))?;
        let state = State { file, start: HEADER, end: HEADER, holed: HEADER, groups: VecDeque::new(), scratch: Vec::new() };
        let state = Arc::new(Mutex::new(state));
        self.live.lock().push(Arc::downgrade(&state));
        Ok(Box::new(FileLog { state, path }))
    }
}

fn nanoseconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).ok().and_then(|d| u64::try_from(d.as_nanos()).ok()).unwrap_or(0)
}

struct State {
    file: File,
    start: u64,
    end: u64,
    /// Up to where (from the end of the header) the file's memory has been given back.
    holed: u64,
    /// Where each group's records begin.
    groups: VecDeque<(u64, u64)>,
    scratch: Vec<u8>,
}

impl State {
    /// A sign of life, while there is something to lose.
    fn beat(&mut self) {
        if self.end > self.start {
            // If /run cannot be written, appending fails too, and that is reported there.
            let _ = self.file.write_all_at(&nanoseconds().to_le_bytes(), ALIVE_AT);
        }
    }
}

struct FileLog {
    state: Arc<Mutex<State>>,
    path: PathBuf,
}

impl RedoLog for FileLog {
    fn append(&self, group: u64, stage: Stage, store: usize, at: u64, bytes: &[u8]) -> io::Result<()> {
        let state = &mut *self.state.lock();
        let len = u32::try_from(bytes.len()).ok().filter(|l| *l <= MAX_RECORD).ok_or(io::ErrorKind::InvalidInput)?;
        let store = u32::try_from(store).map_err(|_| io::ErrorKind::InvalidInput)?;
        let record = &mut state.scratch;
        record.clear();
        record.extend_from_slice(&len.to_le_bytes());
        record.extend_from_slice(&[0; 4]);
        record.extend_from_slice(&group.to_le_bytes());
        record.extend_from_slice(&at.to_le_bytes());
        record.extend_from_slice(&store.to_le_bytes());
        record.extend_from_slice(&u32::from(stage == Stage::Publish).to_le_bytes());
        record.extend_from_slice(bytes);
        let crc = crc32c::crc32c(&record[8..]);
        record[4..8].copy_from_slice(&crc.to_le_bytes());
        let first = state.start == state.end;
        state.file.write_all_at(record, state.end)?;
        if state.groups.back().is_none_or(|(g, _)| *g != group) {
            state.groups.push_back((group, state.end));
        }
        state.end += record.len() as u64;
        if first {
            state.beat();
        }
        Ok(())
    }

    fn durable(&self, group: u64, empty: bool) -> io::Result<()> {
        let state = &mut *self.state.lock();
        while state.groups.front().is_some_and(|(g, _)| *g <= group) {
            state.groups.pop_front();
        }
        let start = if empty { HEADER } else { state.groups.front().map_or(state.end, |(_, at)| *at) };
        if empty || start == state.end {
            state.groups.clear();
            (state.start, state.end, state.holed) = (HEADER, HEADER, HEADER);
            // The header first: a log that seems longer than it is would be made good again over newer contents.
            state.file.write_all_at(&HEADER.to_le_bytes(), START_AT)?;
            return state.file.set_len(HEADER);
        }
        if start > state.start {
            state.file.write_all_at(&start.to_le_bytes(), START_AT)?;
            // Whole pages only; a file system without holes just keeps them.
            let to = start & !4095;
            if to.saturating_sub(state.holed) >= 1 << 20 {
                let _ = fallocate(&state.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, state.holed, to - state.holed);
                state.holed = to;
            }
            state.start = start;
        }
        Ok(())
    }
}

impl Drop for FileLog {
    fn drop(&mut self) {
        let state = self.state.lock();
        if state.start == state.end {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// What a predecessor left.
struct Left {
    boot_id: [u8; 16],
    alive: Duration,
    records: Vec<Record>,
}

/// Reads a log; `None`: it is not one.
fn read(file: &File) -> io::Result<Option<Left>> {
    let mut header = [0; 56];
    let len = file.metadata()?.len();
    if len < HEADER {
        return Ok(None);
    }
    file.read_exact_at(&mut header, 0)?;
    let Some(boot_id) = header.strip_prefix(MAGIC).and_then(|h| h.first_chunk::<16>()).copied() else { return Ok(None) };
    let word = |at: u64| header.get(at as usize..).and_then(|h| h.first_chunk::<8>()).map_or(0, |b| u64::from_le_bytes(*b));
    let (mut at, alive) = (word(START_AT), Duration::from_nanos(word(ALIVE_AT)));
    let mut records = Vec::new();
    let mut head = [0; RECORD];
    while at.checked_add(RECORD as u64).is_some_and(|end| end <= len) {
        file.read_exact_at(&mut head, at)?;
        let half = |i: usize| head.get(i..).and_then(|h| h.first_chunk::<4>()).map_or(0, |b| u32::from_le_bytes(*b));
        let whole = |i: usize| head.get(i..).and_then(|h| h.first_chunk::<8>()).map_or(0, |b| u64::from_le_bytes(*b));
        let size = half(0);
        let body = at + RECORD as u64;
        if size > MAX_RECORD || u64::from(size) > len - body {
            break;
        }
        let mut bytes = vec![0; size as usize];
        file.read_exact_at(&mut bytes, body)?;
        if crc32c::crc32c_append(crc32c::crc32c(&head[8..]), &bytes) != half(4) {
            break;
        }
        let stage = if half(28) == 0 { Stage::Reserve } else { Stage::Publish };
        records.push(Record { group: whole(8), stage, store: half(24) as usize, at: whole(16), bytes });
        at = body + u64::from(size);
    }
    Ok(Some(Left { boot_id, alive, records }))
}

/// The log file that would be used for an image, for messages and tools.
pub fn path_for(directory: &Path, image: &File) -> io::Result<PathBuf> {
    let meta = image.metadata()?;
    Ok(directory.join(format!("{}-{}.redo", meta.dev(), meta.ino())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStore;

    struct Bed {
        directory: tempfile::TempDir,
        image: FileStore,
    }

    fn bed() -> Bed {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        std::fs::write(&path, [0; 8192]).unwrap();
        let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        Bed { image: FileStore::new(file, path).unwrap(), directory }
    }

    fn logs(bed: &Bed) -> RedoDirectory {
        RedoDirectory::new(bed.directory.path().join("redo")).unwrap()
    }

    #[test]
    fn a_successor_makes_good_what_was_not_durable() {
        let bed = bed();
        let memory = Arc::new(MemoryStore::new(vec![0; 64]));
        let stores: [Arc<dyn Store>; 1] = [memory.clone()];
        let log = logs(&bed).begin(&bed.image, &stores).unwrap();
        log.append(0, Stage::Reserve, 0, 0, b"old").unwrap();
        log.append(0, Stage::Publish, 0, 8, b"old").unwrap();
        log.append(1, Stage::Publish, 0, 16, b"new").unwrap();
        log.durable(0, false).unwrap();
        log.append(1, Stage::Reserve, 0, 24, b"also").unwrap();
        std::mem::forget(log);
        let log = logs(&bed).begin(&bed.image, &stores).unwrap();
        let bytes = memory.to_vec();
        assert_eq!((&bytes[0..3], &bytes[8..11]), (&[0; 3][..], &[0; 3][..]));
        assert_eq!((&bytes[16..19], &bytes[24..28]), (&b"new"[..], &b"also"[..]));
        // Once only.
        memory.set_len(0).unwrap();
        std::mem::forget(log);
        drop(logs(&bed).begin(&bed.image, &stores).unwrap());
        assert!(memory.to_vec().is_empty());
        assert_eq!(std::fs::read_dir(bed.directory.path().join("redo")).unwrap().count(), 0, "an empty log is removed");
    }

    #[test]
    fn a_torn_record_ends_the_log() {
        let bed = bed();
        let memory = Arc::new(MemoryStore::new(vec![0; 64]));
        let stores: [Arc<dyn Store>; 1] = [memory.clone()];
        let log = logs(&bed).begin(&bed.image, &stores).unwrap();
        log.append(0, Stage::Publish, 0, 0, b"whole").unwrap();
        log.append(0, Stage::Publish, 0, 8, b"torn").unwrap();
        std::mem::forget(log);
        let path = path_for(&bed.directory.path().join("redo"), bed.image.file()).unwrap();
        let file = OpenOptions::new().write(true).open(path).unwrap();
        file.set_len(file.metadata().unwrap().len() - 1).unwrap();
        drop(logs(&bed).begin(&bed.image, &stores).unwrap());
        assert_eq!(&memory.to_vec()[..12], b"whole\0\0\0\0\0\0\0");
    }

    #[test]
    fn an_image_that_was_written_to_since_is_left_alone() {
        let bed = bed();
        let memory = Arc::new(MemoryStore::new(vec![0; 64]));
        let stores: [Arc<dyn Store>; 1] = [memory.clone()];
        let log = logs(&bed).begin(&bed.image, &stores).unwrap();
        log.append(0, Stage::Publish, 0, 0, b"change").unwrap();
        std::mem::forget(log);
        bed.image.file().set_modified(SystemTime::now() + GRACE + Duration::from_secs(5)).unwrap();
        let error = logs(&bed).begin(&bed.image, &stores).err().unwrap();
        assert_eq!(error.kind(), Kind::Denied);
        assert!(error.to_string().contains(".redo"), "{error}");
        assert_eq!(memory.to_vec(), vec![0; 64]);
    }

    #[test]
    fn memory_is_given_back_while_the_log_never_empties() {
        let bed = bed();
        let stores: [Arc<dyn Store>; 1] = [Arc::new(MemoryStore::default())];
        let log = logs(&bed).begin(&bed.image, &stores).unwrap();
        for group in 0..40 {
            log.append(group, Stage::Publish, 0, 0, &vec![1; 1 << 20]).unwrap();
            if group > 0 {
                log.durable(group - 1, false).unwrap();
            }
        }
        let path = path_for(&bed.directory.path().join("redo"), bed.image.file()).unwrap();
        let blocks = std::fs::metadata(path).unwrap().blocks() * 512;
        assert!(blocks < 8 << 20, "{blocks} bytes held for one pending MiB");
    }
}
