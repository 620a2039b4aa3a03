//! The redo log: a mirror of the write-back buffer that outlives the process, so that its successor can finish what was acknowledged.
//!
//! The engine defines the trait; the daemon supplies a file in memory that survives it (and not the machine). After the death of a process the
//! records are made again, in order, before anything else looks at the image ([`replay`]).

pub mod file;

use crate::drivers;
use crate::error::{Error, Result};
use crate::store::Store;
use crate::writeback::Stage;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A mirror of the pending metadata writes of one image.
pub trait RedoLog: Send + Sync {
    /// Keeps a record; it must be safe from the death of the process when this returns.
    fn append(&self, group: u64, stage: Stage, store: usize, at: u64, bytes: &[u8]) -> io::Result<()>;

    /// All records of `group` and earlier are durable in the image. `empty`: and there are no later ones, so the log can start anew.
    fn durable(&self, group: u64, empty: bool) -> io::Result<()>;
}

/// No mirror.
#[derive(Debug)]
pub struct None;

impl RedoLog for None {
    fn append(&self, _: u64, _: Stage, _: usize, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn durable(&self, _: u64, _: bool) -> io::Result<()> {
        Ok(())
    }
}

/// The mirror of an image that consists of several files: each has a log of its own, which is found, and made good, with the file.
///
/// No write of metadata in one file depends on one in another, so that the logs need no common order.
#[derive(Clone)]
pub struct PerFile(Arc<parking_lot::RwLock<Vec<OneFile>>>);

struct OneFile {
    log: Box<dyn RedoLog>,
    /// It holds records.
    used: AtomicBool,
}

impl PerFile {
    /// With the log of the image's first file.
    pub fn new(first: Box<dyn RedoLog>) -> Self {
        let files = Self(Arc::default());
        files.add(first);
        files
    }

    /// Adds the log of the next file.
    pub fn add(&self, log: Box<dyn RedoLog>) {
        self.0.write().push(OneFile { log, used: AtomicBool::new(false) });
    }
}

impl RedoLog for PerFile {
    fn append(&self, group: u64, stage: Stage, store: usize, at: u64, bytes: &[u8]) -> io::Result<()> {
        let files = self.0.read();
        let file = files.get(store).ok_or(io::ErrorKind::InvalidInput)?;
        file.used.store(true, Ordering::Relaxed);
        // In its own log the file is the only one.
        file.log.append(group, stage, 0, at, bytes)
    }

    fn durable(&self, group: u64, empty: bool) -> io::Result<()> {
        // The write-back buffer asks while nobody can append.
        self.0.read().iter().filter(|file| file.used.load(Ordering::Relaxed)).try_for_each(|file| {
            file.log.durable(group, empty)?;
            file.used.store(!empty, Ordering::Relaxed);
            Ok(())
        })
    }
}

/// One record of a redo log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Number of the group it belongs to; groups become durable in order.
    pub group: u64,
    /// Before or after the group's barrier.
    pub stage: Stage,
    /// Which of the format's stores.
    pub store: usize,
    /// Byte offset.
    pub at: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// Makes the records again in the files, with a group's barrier between its reservations and its publications, and syncs. A format's own log comes
/// first: it is older than the records, and replayed after them would bring back what they replaced.
///
/// # Errors
/// The host's, or a record that names a store which does not exist. The files are then as after a power cut, and the replay can be repeated.
pub fn replay(records: &[Record], stores: &[Arc<dyn Store>]) -> Result<()> {
    let sync = || stores.iter().try_for_each(|s| s.sync()).map_err(|e| Error::io("cannot sync while finishing acknowledged writes", e));
    let write = |record: &Record| -> Result<()> {
        let store = stores
            .get(record.store)
            .ok_or_else(|| Error::corrupt(format!("the redo log names file {} of an image that has {}", record.store, stores.len())))?;
        store.write_all_at(&record.bytes, record.at).map_err(|e| Error::io("cannot finish an acknowledged write", e).at_offset(record.at))
    };
    if let (Some(store), false) = (stores.first(), records.is_empty()) {
        drivers::finish_log(store)?;
    }
    for group in records.chunk_by(|a, b| a.group == b.group) {
        group.iter().filter(|r| r.stage == Stage::Reserve).try_for_each(&write)?;
        sync()?;
        group.iter().filter(|r| r.stage == Stage::Publish).try_for_each(&write)?;
        sync()?;
    }
    Ok(())
}

/// A log in this process's own memory: for tests that cut a process short.
#[derive(Clone, Debug, Default)]
pub struct Memory(Arc<parking_lot::Mutex<Vec<Record>>>);

impl Memory {
    /// The records now in the log.
    pub fn records(&self) -> Vec<Record> {
        self.0.lock().clone()
    }
}

impl RedoLog for Memory {
    fn append(&self, group: u64, stage: Stage, store: usize, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.lock().push(Record { group, stage, store, at, bytes: bytes.to_vec() });
        Ok(())
    }

    fn durable(&self, group: u64, _empty: bool) -> io::Result<()> {
        self.0.lock().retain(|r| r.group > group);
        Ok(())
    }
}
