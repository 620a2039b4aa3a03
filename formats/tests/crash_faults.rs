//! Disks that fill up, sectors that cannot be written, syncs that fail: errors are reported, nothing that was acknowledged is lost, the image stays in
//! order, and goes on once the host does.

mod table;

use formats::redo::{self, replay};
use formats::store::failing::{FailingStore, Faults};
use formats::store::recording::{Journal, RecordingStore};
use formats::store::{MemoryStore, Store};
use formats::{BlockDevice, Kind as ErrorKind};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::sync::Arc;
use table::cut::{self, Cutter, Run};
use table::guest::{Change, History, SECTOR, ZEROED, patterns, writer_of};
use table::operations::{Operation, random, range};
use table::pages::{PageStore, Pages};
use table::{Kind, for_each_writable_kind, kind_tests, long, open, qemu, scratch, seed};

/// What may be in a sector: more than one thing after a request that failed.
type Allowed = Vec<Vec<u32>>;

fn compare(kind: &Kind, now: &[u8], content: &[u8], allowed: &Allowed, when: &str) {
    for (sector, bytes) in now.chunks(SECTOR).enumerate() {
        let first = &content[sector * SECTOR..(sector + 1) * SECTOR];
        let fits = allowed[sector].iter().any(|w| match w {
            0 => bytes == first,
            w => writer_of(bytes, sector as u64) == Some(*w),
        });
        assert!(
            fits,
            "{} {when}: sector {sector} holds {:?}, not one of {:?}",
            kind.name,
            writer_of(bytes, sector as u64),
            allowed[sector]
        );
    }
}

/// Rounds of requests with faults, and without again.
fn full_and_bad_disks(kind: &Kind) {
    let dir = scratch();
    let made = kind.make(dir.path());
    let mut rng = StdRng::seed_from_u64(seed());
    let (mut reported, mut failed) = (0, 0);
    for round_seed in 0..if long() { 200 } else { 6 } {
        let disk = Arc::new(MemoryStore::new(open::bytes(&made)));
        let failing = Arc::new(FailingStore::new(disk.clone(), seed() * 1000 + round_seed));
        let log = redo::Memory::default();
        let image = open::over(kind, &made.file, failing.clone(), true, Box::new(log.clone())).unwrap();
        let mix = cut::mix(kind, image.limits().granularity);
        let mut allowed: Allowed = vec![vec![0]; made.content.len() / SECTOR];
        for index in 0..120_u32 {
            // Faults come and go.
            if index % 20 == 10 {
                let space = rng.random_bool(0.5).then(|| disk.len().unwrap() + rng.random_range(0..20) * 4096);
                failing.set(match rng.random_range(0..3) {
                    0 => Faults { space, full_one_in: 10, ..Faults::default() },
                    1 => Faults { error_one_in: 8, ..Faults::default() },
                    _ => Faults { error_one_in: 30, read_error_one_in: 30, full_one_in: 30, ..Faults::default() },
                });
            } else if index % 20 == 0 {
                failing.set(Faults::default());
                image.flush().unwrap_or_else(|e| panic!("{}: the disk is well again: {}", kind.name, e.chain()));
                let now = open::read_all(&*image).unwrap();
                compare(kind, &now, &made.content, &allowed, "after the faults");
                for (sector, bytes) in now.chunks(SECTOR).enumerate() {
                    let first = &made.content[sector * SECTOR..][..SECTOR];
                    let writer = writer_of(bytes, sector as u64);
                    allowed[sector].retain(|w| if *w == 0 { bytes == first } else { writer == Some(*w) });
                }
                // Whatever happened meanwhile, the bytes that the kernel has and the redo log are the whole truth.
                let after: Arc<dyn Store> = Arc::new(MemoryStore::new(disk.to_vec()));
                replay(&log.records(), std::slice::from_ref(&after)).unwrap();
                let heir = open::over(kind, &made.file, after, true, Box::new(redo::None)).unwrap();
                compare(kind, &open::read_all(&*heir).unwrap(), &made.content, &allowed, "after a death");
            }
            let operation = random(&mut rng, &mix);
            let (at, len) = range(&operation);
            let sectors = (at / SECTOR as u64) as usize..((at + len) / SECTOR as u64) as usize;
            let (result, value) = match operation {
                Operation::Write { sector, count } => (open::write(&*image, at, &patterns(index + 1, sector, count)), index + 1),
                Operation::Zero { mode, .. } => (image.zero(at, len, mode), ZEROED),
                // May have done as little as it likes.
                Operation::Discard { .. } => (image.discard(at, len).and(Err(formats::Error::unsupported(""))), ZEROED),
                Operation::Flush | Operation::Reopen => (image.flush(), 0),
            };
            if let Err(error) = &result {
                reported += u64::from(error.kind() != ErrorKind::Unsupported);
                assert!(
                    matches!(error.kind(), ErrorKind::Io | ErrorKind::NoSpace | ErrorKind::Unsupported),
                    "{}: a fault of the host is reported as {:?}: {}",
                    kind.name,
                    error.kind(),
                    error.chain()
                );
            }
            for sector in sectors {
                match &result {
                    Ok(()) => allowed[sector] = vec![value],
                    Err(_) => allowed[sector].push(value),
                }
            }
        }
        failing.set(Faults::default());
        failed += failing.failed();
        image.close().unwrap_or_else(|e| panic!("{}: {}", kind.name, e.chain()));
        compare(kind, &open::read_all(&*image).unwrap(), &made.content, &allowed, "at the end");
        if kind.check {
            let report = image.check(false).unwrap();
            assert_eq!(report.corruptions, 0, "{}: {:?}", kind.name, report.notes);
        }
        drop(image);
        let file = dir.path().join("afterwards");
        std::fs::write(&file, disk.to_vec()).unwrap();
        qemu::check(kind, &file).unwrap_or_else(|e| panic!("{}: {e}", kind.name));
    }
    assert!(failed > 5 && reported > 0, "{failed} faults, {reported} reported: too few to tell anything");
}

/// A sync fails: from then on flushes and changes do, and what earlier flushes covered is there after a cut.
fn failed_syncs(kind: &Kind) {
    let dir = scratch();
    let made = kind.make(dir.path());
    let base = open::bytes(&made);
    for run_seed in 0..if long() { 300 } else { 8 } {
        let mut rng = StdRng::seed_from_u64(seed() * 1000 + run_seed);
        let journal = Journal::new();
        let recording = Arc::new(RecordingStore::new(base.clone(), journal.clone(), 1, &made.file));
        let failing = Arc::new(FailingStore::new(recording, run_seed));
        let image = open::over(kind, &made.file, failing.clone(), true, Box::new(redo::None)).unwrap();
        let mix = cut::mix(kind, image.limits().granularity);
        let mut history = History::new(made.content.clone());
        let fails_at = rng.random_range(5..50);
        let mut refused = false;
        for index in 0..60_u32 {
            if index == fails_at {
                failing.set(Faults { sync: true, ..Faults::default() });
            }
            let operation = if index == 55 { Operation::Flush } else { random(&mut rng, &mix) };
            let (at, len) = range(&operation);
            let began = journal.mark(0);
            let (result, writer) = match operation {
                Operation::Write { sector, count } => (open::write(&*image, at, &patterns(index + 1, sector, count)), index + 1),
                Operation::Zero { mode, .. } => (image.zero(at, len, mode), ZEROED),
                Operation::Discard { .. } => (image.discard(at, len), ZEROED),
                Operation::Flush | Operation::Reopen => (image.flush(), 0),
            };
            if refused {
                assert!(result.is_err(), "{}: {operation:?} was accepted after a sync had failed", kind.name);
            }
            refused |= failing.failed() > 0;
            // After a failure anything that was not flushed may have been lost or done, so nothing more is promised than the flushes before.
            let optional = result.is_err() || matches!(operation, Operation::Discard { .. });
            let acknowledged = if optional { usize::MAX } else { journal.mark(0) };
            for sector in (at / SECTOR as u64) as usize..((at + len) / SECTOR as u64) as usize {
                history.sectors[sector].push(Change { writer, began, acknowledged });
            }
            if operation == Operation::Flush && result.is_ok() {
                assert!(!refused, "{}: a flush succeeded after a sync had failed", kind.name);
                history.flushes.push((began, journal.mark(0)));
            }
        }
        assert!(refused, "{}: nothing was synced", kind.name);
        image.close().unwrap_err();
        drop(image);
        let run = Run { entries: journal.entries(), history, base: Pages::from(base.as_slice()) };
        let mut cutter = Cutter::new(&run);
        let mut positions: Vec<usize> = (0..10).map(|_| rng.random_range(0..=run.entries.len())).collect();
        positions.sort_unstable();
        for position in positions {
            let file = Arc::new(PageStore::new(cutter.after_power_cut(position, rng.random())));
            let image = open::over(kind, &made.file, file, true, Box::new(redo::None)).unwrap();
            let now = open::read_all(&*image).unwrap();
            run.history.allowed_after_cut(&now, position).unwrap_or_else(|e| panic!("{}, seed {run_seed}: {e}", kind.name));
            if kind.check {
                let report = image.check(false).unwrap();
                assert_eq!(report.corruptions, 0, "{}: {:?}", kind.name, report.notes);
            }
        }
    }
}

macro_rules! tests {
    ($($kind:ident)*) => {
        kind_tests!(full_and_bad_disks: $($kind)*);
        kind_tests!(failed_syncs: $($kind)*);
    };
}
for_each_writable_kind!(tests);
