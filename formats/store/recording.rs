//! A store that writes down what is done to it, so that a test can ask: what would the file hold if the power had failed *here*?
//!
//! Any number of stores, the redo log of an image, and the test's own marks share one [`Journal`]; its entries are in the order in which things began and
//! ended. A cut of the journal tells which changes had certainly reached the disk at a point of it, and which may have. For tests only: everything
//! is kept in memory for ever.

use super::{MemoryStore, Store};
use crate::redo::{Record, RedoLog};
use crate::writeback::Stage;
use parking_lot::Mutex;
use std::io::{self, IoSlice, IoSliceMut};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Something that was done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Bytes were written.
    Write {
        /// Byte offset.
        at: u64,
        /// The bytes.
        bytes: Arc<[u8]>,
    },
    /// The length was set.
    SetLen(u64),
    /// A range was made to read as zeros (punched or zeroed).
    Zero {
        /// Byte offset.
        at: u64,
        /// Bytes.
        len: u64,
    },
    /// All that ended before this began is durable when it ends.
    Sync,
    /// A record was appended to the redo log.
    Redo(Record),
    /// The redo log let go of the records of this group and earlier ones.
    RedoDurable(u64),
    /// The test's own.
    Mark(u64),
}

/// One line of the journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// An action on a file began.
    Began {
        /// The number that the store was given.
        file: usize,
        /// What.
        action: Action,
    },
    /// The action whose `Began` is at that index has ended, well.
    Ended(usize),
}

/// What is known of an action at a point of the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// A power cut leaves it done.
    Durable,
    /// It had ended; a power cut may leave it done, undone, or (a write) done in part.
    Ended,
    /// It was under way: the death of the process, too, may leave it done in part.
    UnderWay,
}

/// The shared list of entries.
#[derive(Clone, Debug, Default)]
pub struct Journal(Arc<Mutex<Vec<Entry>>>);

impl Journal {
    /// An empty journal.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many entries there are so far: a position to cut at.
    pub fn len(&self) -> usize {
        self.0.lock().len()
    }

    /// Whether nothing has happened yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A copy of all entries.
    pub fn entries(&self) -> Vec<Entry> {
        self.0.lock().clone()
    }

    /// Adds a mark of the test's own; returns its position.
    pub fn mark(&self, value: u64) -> usize {
        self.began(0, Action::Mark(value))
    }

    fn began(&self, file: usize, action: Action) -> usize {
        let mut entries = self.0.lock();
        entries.push(Entry::Began { file, action });
        entries.len() - 1
    }

    fn ended(&self, began: usize) {
        self.0.lock().push(Entry::Ended(began));
    }
}

/// Changes of one file at a point of `entries`, in the order in which they began, each with what is known of it.
pub fn changes_at(entries: &[Entry], file: usize, position: usize) -> Vec<(usize, &Action, Fate)> {
    let entries = entries.get(..position).unwrap_or(entries);
    // The end of each action, and up to where the last sync that ended covers.
    let mut end_of = vec![None; entries.len()];
    let mut synced = 0;
    for (index, entry) in entries.iter().enumerate() {
        let Entry::Ended(began) = entry else { continue };
        if let Some(end) = end_of.get_mut(*began) {
            *end = Some(index);
        }
        if matches!(&entries[*began], Entry::Began { file: f, action: Action::Sync } if *f == file) {
            synced = synced.max(*began);
        }
    }
    let fate = |index: usize| match end_of[index] {
        Some(end) if end < synced => Fate::Durable,
        Some(_) => Fate::Ended,
        None => Fate::UnderWay,
    };
    entries
        .iter()
        .enumerate()
        .filter_map(|(index, entry)| match entry {
            Entry::Began { file: f, action } if *f == file => match action {
                Action::Write { .. } | Action::SetLen(_) | Action::Zero { .. } => Some((index, action, fate(index))),
                _ => None,
            },
            _ => None,
        })
        .collect()
}

/// The records that the redo log holds at a point of `entries`.
pub fn redo_at(entries: &[Entry], position: usize) -> Vec<Record> {
    let mut records: Vec<Record> = Vec::new();
    for entry in entries.get(..position).unwrap_or(entries) {
        match entry {
            Entry::Began { action: Action::Redo(record), .. } => records.push(record.clone()),
            Entry::Began { action: Action::RedoDurable(group), .. } => records.retain(|r| r.group > *group),
            _ => {}
        }
    }
    records
}

/// Does to plain bytes what `action` does to a file.
pub fn apply(action: &Action, bytes: &mut Vec<u8>) {
    match action {
        Action::Write { at, bytes: new } => {
            let at = usize::try_from(*at).unwrap_or(usize::MAX);
            let end = at.saturating_add(new.len());
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[at..end].copy_from_slice(new);
        }
        Action::SetLen(len) => bytes.resize(usize::try_from(*len).unwrap_or(usize::MAX), 0),
        Action::Zero { at, len } => {
            let end = usize::try_from(at.saturating_add(*len)).unwrap_or(usize::MAX).min(bytes.len());
            let start = usize::try_from(*at).unwrap_or(usize::MAX).min(end);
            bytes[start..end].fill(0);
        }
        _ => {}
    }
}

/// The mirror of an image's pending metadata, in the same journal as its file.
impl RedoLog for Journal {
    fn append(&self, group: u64, stage: Stage, store: usize, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.began(0, Action::Redo(Record { group, stage, store, at, bytes: bytes.to_vec() }));
        Ok(())
    }

    fn durable(&self, group: u64, _empty: bool) -> io::Result<()> {
        self.began(0, Action::RedoDurable(group));
        Ok(())
    }
}

/// A file in memory whose changes are written down.
#[derive(Debug)]
pub struct RecordingStore {
    inner: MemoryStore,
    journal: Journal,
    file: usize,
    path: PathBuf,
}

impl RecordingStore {
    /// A file that holds `bytes` and is known as `file` in the journal; `path` is what it calls itself.
    pub fn new(bytes: Vec<u8>, journal: Journal, file: usize, path: impl Into<PathBuf>) -> Self {
        Self { inner: MemoryStore::new(bytes), journal, file, path: path.into() }
    }

    /// A copy of all bytes, as a reader of the file sees them now.
    pub fn to_vec(&self) -> Vec<u8> {
        self.inner.to_vec()
    }

    fn recorded<T>(&self, action: Action, run: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let began = self.journal.began(self.file, action);
        let done = run()?;
        self.journal.ended(began);
        Ok(done)
    }
}

impl Store for RecordingStore {
    fn read_at(&self, bufs: &mut [IoSliceMut<'_>], at: u64) -> io::Result<usize> {
        self.inner.read_at(bufs, at)
    }

    fn write_at(&self, bufs: &[IoSlice<'_>], at: u64) -> io::Result<()> {
        let bytes: Vec<u8> = bufs.iter().flat_map(|b| b.iter().copied()).collect();
        self.recorded(Action::Write { at, bytes: bytes.into() }, || self.inner.write_at(bufs, at))
    }

    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.recorded(Action::SetLen(len), || self.inner.set_len(len))
    }

    fn punch(&self, at: u64, len: u64) -> io::Result<bool> {
        self.recorded(Action::Zero { at, len }, || self.inner.punch(at, len))
    }

    fn zero(&self, at: u64, len: u64) -> io::Result<bool> {
        self.recorded(Action::Zero { at, len }, || self.inner.zero(at, len))
    }

    fn sync(&self) -> io::Result<()> {
        self.recorded(Action::Sync, || self.inner.sync())
    }

    fn path(&self) -> Option<&Path> {
        Some(&self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sync_covers_what_ended_before_it_began() {
        let journal = Journal::new();
        let store = RecordingStore::new(vec![0; 8], journal.clone(), 3, "f");
        store.write_all_at(b"aa", 0).unwrap();
        store.sync().unwrap();
        store.write_all_at(b"bb", 2).unwrap();
        let under_way = journal.began(3, Action::SetLen(4));
        let entries = journal.entries();
        let fates: Vec<Fate> = changes_at(&entries, 3, entries.len()).iter().map(|c| c.2).collect();
        assert_eq!(fates, [Fate::Durable, Fate::Ended, Fate::UnderWay]);
        assert_eq!(changes_at(&entries, 3, entries.len())[2].0, under_way);
        // In the middle of the sync nothing is safe yet.
        assert_eq!(changes_at(&entries, 3, 3)[0].2, Fate::Ended);
        assert!(changes_at(&entries, 0, entries.len()).is_empty());
        let mut bytes = vec![0; 8];
        changes_at(&entries, 3, entries.len()).iter().for_each(|c| apply(c.1, &mut bytes));
        assert_eq!(bytes, b"aabb");
    }
}
