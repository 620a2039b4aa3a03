//! What the buffer promises: order, durability, and what is left after failures.

use super::*;
use crate::format::{Extent, FormatLimits, Place};
use crate::store::MemoryStore;
use crate::store::failing::{FailingStore, Faults};
use crate::store::recording::{Action, Entry, Journal, RecordingStore};
use proptest::prelude::*;
use std::io::{IoSlice, IoSliceMut};
use std::sync::mpsc;
use std::time::Duration;

/// A format that only remembers what was handed back to it.
#[derive(Default)]
struct Reclaimer(Mutex<Vec<Freed>>);

/// What [`Reclaimer`] cannot take back: its byte offset.
const STUCK: u64 = 666;

impl Format for Reclaimer {
    fn name(&self) -> &'static str {
        "test"
    }
    fn limits(&self) -> FormatLimits {
        FormatLimits {
            size: 0,
            sector: 512,
            physical_sector: 512,
            unit: 512,
            read_only: false,
            cheap_zero: false,
            can_discard: false,
            thin: false,
            holes_are_zeros: false,
        }
    }
    fn stores(&self) -> &[Arc<dyn Store>] {
        &[]
    }
    fn map(&self, _: u64, len: u64) -> Result<Extent> {
        Ok(Extent { len, place: Place::Parent })
    }
    fn reclaim(&self, freed: &[Freed]) -> Result<()> {
        if freed.iter().any(|f| f.at == STUCK) {
            return Err(Error::new(Kind::Io, "cannot be given back"));
        }
        self.0.lock().extend_from_slice(freed);
        Ok(())
    }
}

fn recorded() -> (Journal, WriteBack) {
    let journal = Journal::new();
    let store = Arc::new(RecordingStore::new(vec![0; 4096], journal.clone(), 1, "file"));
    (journal, WriteBack::unmirrored(vec![store]))
}

/// The journal as letters: the first byte of each write, `|` for a sync.
fn story(journal: &Journal) -> String {
    let letter = |entry: &Entry| match entry {
        Entry::Began { action: Action::Write { bytes, .. }, .. } => Some(bytes[0] as char),
        Entry::Began { action: Action::Sync, .. } => Some('|'),
        _ => None,
    };
    journal.entries().iter().filter_map(letter).collect()
}

#[test]
fn publications_come_after_a_sync_of_what_they_refer_to() {
    let (journal, buffer) = recorded();
    buffer.publish(0, 100, b"p").unwrap();
    buffer.reserve(0, 200, b"r").unwrap();
    buffer.drain(&Reclaimer::default()).unwrap();
    assert_eq!(story(&journal), "r|p|");
}

#[test]
fn space_that_cannot_be_given_back_fails_no_flush() {
    let (journal, buffer) = recorded();
    let format = Reclaimer::default();
    for at in [STUCK, 700] {
        buffer.publish(0, 100, b"p").unwrap();
        buffer.release(Freed { store: 0, at, len: 1 });
        buffer.drain(&format).unwrap();
        buffer.drain(&format).unwrap();
    }
    assert_eq!(story(&journal), "|p|p|");
    assert_eq!(format.0.lock().iter().map(|f| f.at).collect::<Vec<_>>(), [700]);
}

#[test]
fn one_sync_serves_where_nothing_is_published() {
    let (journal, buffer) = recorded();
    buffer.drain(&Reclaimer::default()).unwrap();
    buffer.drain(&Reclaimer::default()).unwrap();
    assert_eq!(story(&journal), "|", "the first flush syncs what others may have left, the second has nothing to do");
    buffer.wrote_data(0);
    buffer.drain(&Reclaimer::default()).unwrap();
    buffer.reserve(0, 0, b"r").unwrap();
    buffer.drain(&Reclaimer::default()).unwrap();
    assert_eq!(story(&journal), "||r|");
}

#[test]
fn reads_show_what_is_pending() {
    let (_, buffer) = recorded();
    buffer.reserve(0, 10, b"aaaa").unwrap();
    buffer.publish(0, 12, b"bb").unwrap();
    let mut seen = [0; 6];
    buffer.read(0, 9, &mut seen).unwrap();
    assert_eq!(&seen, b"\0aabb\0");
}

/// A store whose syncs wait to be let go, and end as they are told.
struct SlowSync {
    inner: MemoryStore,
    entered: Mutex<mpsc::Sender<()>>,
    go: Mutex<mpsc::Receiver<bool>>,
}

impl Store for SlowSync {
    fn read_at(&self, bufs: &mut [IoSliceMut<'_>], at: u64) -> io::Result<usize> {
        self.inner.read_at(bufs, at)
    }
    fn write_at(&self, bufs: &[IoSlice<'_>], at: u64) -> io::Result<()> {
        self.inner.write_at(bufs, at)
    }
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.inner.set_len(len)
    }
    fn punch(&self, at: u64, len: u64) -> io::Result<bool> {
        self.inner.punch(at, len)
    }
    fn zero(&self, at: u64, len: u64) -> io::Result<bool> {
        self.inner.zero(at, len)
    }
    fn sync(&self) -> io::Result<()> {
        self.entered.lock().send(()).unwrap();
        if self.go.lock().recv().unwrap() { Ok(()) } else { Err(io::Error::from_raw_os_error(nix::libc::EIO)) }
    }
}

/// A flush comes while a header is being written through, whose sync covers the flush's data but has not ended. Returns what the flush said, and
/// whether it said so before that sync ended.
fn flush_during_another_sync(sync_succeeds: bool) -> (Result<()>, bool) {
    let (entered, has_entered) = mpsc::channel();
    let (go, may_go) = mpsc::channel();
    let store = Arc::new(SlowSync { inner: MemoryStore::default(), entered: Mutex::new(entered), go: Mutex::new(may_go) });
    let buffer = WriteBack::unmirrored(vec![store]);
    buffer.wrote_data(0);
    std::thread::scope(|scope| {
        let buffer = &buffer;
        let header = scope.spawn(move || buffer.write_through(0, 0, b"header"));
        has_entered.recv().unwrap();
        let (said, answer) = mpsc::channel();
        scope.spawn(move || said.send(buffer.drain(&Reclaimer::default())).unwrap());
        let early = answer.recv_timeout(Duration::from_millis(200)).ok();
        go.send(sync_succeeds).unwrap();
        // The flush may sync once more.
        go.send(true).unwrap();
        assert_eq!(header.join().unwrap().is_ok(), sync_succeeds);
        let was_early = early.is_some();
        (early.unwrap_or_else(|| answer.recv().unwrap()), was_early)
    })
}

#[test]
fn a_flush_waits_for_the_sync_that_covers_its_data() {
    let (result, early) = flush_during_another_sync(true);
    assert!(!early, "the flush was acknowledged while its data were still on the way to the disk");
    result.unwrap();
}

#[test]
fn a_flush_fails_when_the_sync_that_covers_its_data_fails() {
    let (result, early) = flush_during_another_sync(false);
    assert!(!early);
    assert_eq!(result.unwrap_err().kind(), Kind::Io);
}

#[test]
fn a_full_disk_keeps_the_group_and_a_later_drain_writes_it() {
    let inner = Arc::new(MemoryStore::new(vec![0; 512]));
    let failing = Arc::new(FailingStore::new(inner.clone(), 1));
    let buffer = WriteBack::unmirrored(vec![failing.clone()]);
    let format = Reclaimer::default();
    failing.set(Faults { space: Some(512), ..Faults::default() });
    buffer.publish(0, 4096, b"table").unwrap();
    let freed = Freed { store: 0, at: 1, len: 2 };
    buffer.release(freed);
    for _ in 0..2 {
        assert_eq!(buffer.drain(&format).unwrap_err().kind(), Kind::NoSpace);
        assert!(format.0.lock().is_empty(), "space was reused before the change that frees it was durable");
        let mut seen = [0; 5];
        buffer.read(0, 4096, &mut seen).unwrap();
        assert_eq!(&seen, b"table");
    }
    buffer.publish(0, 4098, b"N").unwrap();
    failing.set(Faults::default());
    buffer.drain(&format).unwrap();
    assert_eq!(&inner.to_vec()[4096..4101], b"taNle");
    assert_eq!(*format.0.lock(), [freed]);
}

#[test]
fn a_failed_sync_is_for_good() {
    let failing = Arc::new(FailingStore::new(Arc::new(MemoryStore::default()), 1));
    let buffer = WriteBack::unmirrored(vec![failing.clone()]);
    buffer.wrote_data(0);
    failing.set(Faults { sync: true, ..Faults::default() });
    buffer.drain(&Reclaimer::default()).unwrap_err();
    buffer.drain(&Reclaimer::default()).unwrap_err();
    buffer.publish(0, 0, b"x").unwrap_err();
    buffer.write_through(0, 0, b"x").unwrap_err();
    assert!(buffer.has_failed());
}

#[test]
fn freed_space_waits_for_readers() {
    let (_, buffer) = recorded();
    let format = Reclaimer::default();
    let reader = buffer.enter();
    buffer.release(Freed { store: 0, at: 7, len: 1 });
    buffer.drain(&format).unwrap();
    buffer.drain(&format).unwrap();
    assert!(format.0.lock().is_empty());
    drop(reader);
    buffer.drain(&format).unwrap();
    assert_eq!(format.0.lock().len(), 1);
}

/// A redo log that cannot let go of its records.
struct Stuck(Arc<AtomicBool>);

impl RedoLog for Stuck {
    fn append(&self, _: u64, _: Stage, _: usize, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
    fn durable(&self, _: u64, _: bool) -> io::Result<()> {
        if self.0.load(Ordering::SeqCst) { Err(io::ErrorKind::Other.into()) } else { Ok(()) }
    }
}

#[test]
fn space_is_not_reused_while_the_redo_log_still_holds_writes_to_it() {
    let stuck = Arc::new(AtomicBool::new(true));
    let buffer = WriteBack::new(vec![Arc::new(MemoryStore::default())], Box::new(Stuck(stuck.clone())));
    let format = Reclaimer::default();
    buffer.publish(0, 0, b"p").unwrap();
    buffer.release(Freed { store: 0, at: 7, len: 1 });
    buffer.drain(&format).unwrap();
    assert!(format.0.lock().is_empty(), "a replay of the log would overwrite the space's new contents");
    stuck.store(false, Ordering::SeqCst);
    buffer.drain(&format).unwrap();
    assert_eq!(format.0.lock().len(), 1);
}

proptest! {
    /// Reads see every put, whatever fails; what a drain that succeeded covers is in the file and, with the redo log's records made again, so is the rest.
    #[test]
    fn agrees_with_plain_bytes_under_failures(
        steps in prop::collection::vec((0u8..10, 0u64..6000, prop::collection::vec(any::<u8>(), 1..50)), 1..60),
        seed in any::<u64>(),
    ) {
        let inner = Arc::new(MemoryStore::new(vec![0; 8192]));
        let failing = Arc::new(FailingStore::new(inner.clone(), seed));
        let log = redo::Memory::default();
        let buffer = WriteBack::new(vec![failing.clone()], Box::new(log.clone()));
        let format = Reclaimer::default();
        let mut model = vec![0; 8192];
        for (kind, at, bytes) in steps {
            let range = at as usize..at as usize + bytes.len();
            match kind {
                0..4 => {
                    // Reservations and publications are for different bytes: of the lower and of the upper half.
                    let at = at / 2;
                    buffer.reserve(0, at, &bytes).unwrap();
                    model[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
                }
                4..8 => {
                    let at = 4000 + at / 2;
                    buffer.publish(0, at, &bytes).unwrap();
                    model[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
                }
                8 => {
                    failing.set(Faults { error_one_in: 3, full_one_in: 3, ..Faults::default() });
                    let drained = buffer.drain(&format);
                    failing.set(Faults::default());
                    if drained.is_ok() {
                        prop_assert_eq!(&inner.to_vec()[..8192], &model[..]);
                        prop_assert!(log.records().is_empty());
                    }
                }
                _ => {
                    let mut seen = vec![0; range.len()];
                    buffer.read(0, at, &mut seen).unwrap();
                    prop_assert_eq!(&seen[..], &model[range]);
                }
            }
            // The process dies here.
            let after = Arc::new(MemoryStore::new(inner.to_vec()));
            redo::replay(&log.records(), &[after.clone() as Arc<dyn Store>]).unwrap();
            prop_assert_eq!(&after.to_vec()[..8192], &model[..]);
        }
    }
}
