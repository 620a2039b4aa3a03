//! Eight threads on the same few units: every sector is a register, and what was read of it must fit *some* order of what was done to it.
//!
//! The writes of a sector have unique values, so that the check is exact for them (Gibbons and Korach: a register's history with unique values is linearisable if
//! and only if no two forward zones of values overlap and no backward zone lies within a forward zone). Zeros are not unique: a read of zeros needs a
//! zeroing that may have been the latest, and no value may be read that a zeroing has certainly ended.

mod table;

use formats::{BlockDevice, Image, ZeroMode};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use table::guest::{SECTOR, Writer, ZEROED, pattern, patterns};
use table::{Kind, for_each_kind_of_many_files, for_each_writable_kind, kind_tests, long, open, qemu, scratch, seed};

const THREADS: u64 = 8;

/// What happened to a sector between two ticks of the clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    Wrote(Writer),
    Zeroed,
    /// May have zeroed it.
    Discarded,
    Read(Writer),
}

type Happening = (u64, u64, Event);

/// The values in a sector that was read: one, or several where a read and a write of the host met.
fn values(bytes: &[u8], sector: u64, first: &[u8]) -> Result<Vec<Writer>, String> {
    let mut seen = Vec::new();
    for (index, chunk) in bytes.chunks_exact(16).enumerate() {
        let range = index * 16..index * 16 + 16;
        let word = u64::from_le_bytes(chunk[..8].try_into().unwrap());
        let writer = if chunk == &first[range.clone()] {
            0
        } else if chunk.iter().all(|b| *b == 0) {
            ZEROED
        } else if chunk == &pattern(word as u32, sector)[range] {
            word as u32
        } else {
            return Err(format!("sector {sector} holds what nobody wrote there: {chunk:02x?}"));
        };
        // The maker's sectors may hold zeros: those chunks say nothing.
        if !seen.contains(&writer) {
            seen.push(writer);
        }
    }
    if seen.contains(&0) && first.chunks(16).any(|c| c.iter().all(|b| *b == 0)) && first.iter().any(|b| *b != 0) {
        seen.retain(|w| *w != ZEROED);
    }
    Ok(seen)
}

/// Whether the happenings of one sector fit some order.
fn linearisable(events: &[Happening], first_is_zero: bool) -> Result<(), String> {
    // Per value: the write, the earliest end and the latest start of all that concerns it.
    struct Value {
        wrote: (u64, u64),
        earliest_end: u64,
        latest_start: u64,
    }
    let mut values: HashMap<Writer, Value> = HashMap::new();
    let mut zeroings: Vec<(u64, u64)> = Vec::new();
    let mut discards: Vec<(u64, u64)> = Vec::new();
    if first_is_zero {
        zeroings.push((0, 0));
    } else {
        values.insert(0, Value { wrote: (0, 0), earliest_end: 0, latest_start: 0 });
    }
    for &(start, end, event) in events {
        match event {
            Event::Wrote(w) => {
                values.insert(w, Value { wrote: (start, end), earliest_end: end, latest_start: start });
            }
            Event::Zeroed => zeroings.push((start, end)),
            Event::Discarded => discards.push((start, end)),
            Event::Read(_) => {}
        }
    }
    for &(start, end, event) in events {
        let Event::Read(writer) = event else { continue };
        let writer = if first_is_zero && writer == 0 { ZEROED } else { writer };
        if writer == ZEROED {
            // Some zeroing began before the read ended, and no write certainly lies between them.
            let may_be_latest = |z: &(u64, u64)| z.0 < end && !values.values().any(|v| z.1 < v.wrote.0 && v.wrote.1 < start);
            if !zeroings.iter().any(may_be_latest) && !discards.iter().any(may_be_latest) {
                return Err(format!("zeros read from {start} to {end}, which nothing can have put there"));
            }
            continue;
        }
        let Some(value) = values.get_mut(&writer) else { return Err(format!("the value {writer} was never written")) };
        if end < value.wrote.0 {
            return Err(format!("the value {writer} was read from {start} to {end}, before it was written"));
        }
        value.earliest_end = value.earliest_end.min(end);
        value.latest_start = value.latest_start.max(start);
        let wrote = value.wrote;
        if let Some(z) = zeroings.iter().find(|z| wrote.1 < z.0 && z.1 < start) {
            return Err(format!("the value {writer}, written {wrote:?}, was read from {start} to {end}, after it was zeroed {z:?}"));
        }
    }
    let zone = |v: &Value| (v.earliest_end.min(v.latest_start), v.earliest_end.max(v.latest_start), v.earliest_end < v.latest_start);
    let mut zones: Vec<((u64, u64, bool), Writer)> = values.iter().map(|(w, v)| (zone(v), *w)).collect();
    zones.sort();
    let forward: Vec<_> = zones.iter().filter(|z| z.0.2).collect();
    for pair in forward.windows(2) {
        if pair[1].0.0 < pair[0].0.1 {
            return Err(format!("the values {} and {} were both the latest: {pair:?}", pair[0].1, pair[1].1));
        }
    }
    for z in zones.iter().filter(|z| !z.0.2) {
        if let Some(around) = forward.iter().find(|f| f.0.0 < z.0.0 && z.0.1 < f.0.1) {
            return Err(format!("the value {} came and went while {} was the latest: {z:?} within {around:?}", z.1, around.1));
        }
    }
    Ok(())
}

/// What the threads share.
struct Crowd<'a> {
    image: &'a Image,
    content: &'a [u8],
    clock: AtomicU64,
    events: Vec<Mutex<Vec<Happening>>>,
    /// First sectors and lengths of the places they crowd in.
    places: Vec<(u64, u64)>,
}

impl Crowd<'_> {
    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    fn note(&self, sector: u64, start: u64, end: u64, event: Event) {
        self.events[sector as usize].lock().push((start, end, event));
    }

    fn read(&self, sector: u64, count: u64) {
        let start = self.tick();
        let bytes = open::read(self.image, sector * SECTOR as u64, (count * SECTOR as u64) as usize).unwrap();
        let end = self.tick();
        for (s, read) in (sector..).zip(bytes.chunks(SECTOR)) {
            let first = &self.content[s as usize * SECTOR..(s as usize + 1) * SECTOR];
            for value in values(read, s, first).unwrap_or_else(|e| panic!("{e}")) {
                self.note(s, start, end, Event::Read(value));
            }
        }
    }

    fn thread(&self, thread: u64, each: u64) {
        let mut rng = StdRng::seed_from_u64(seed() * 100 + thread);
        for index in 0..each {
            let writer = (index * THREADS + thread + 1) as Writer;
            let (first, len) = self.places[rng.random_range(0..self.places.len())];
            let sector = first + rng.random_range(0..len);
            let count = rng.random_range(1..=24).min(first + len - sector);
            let (at, bytes) = (sector * SECTOR as u64, count * SECTOR as u64);
            let change = |event, run: &dyn Fn() -> formats::Result<()>, sector: u64, count: u64| {
                let start = self.tick();
                run().unwrap_or_else(|e| panic!("{}", e.chain()));
                let end = self.tick();
                (sector..sector + count).for_each(|s| self.note(s, start, end, event));
            };
            match rng.random_range(0..20) {
                0..8 => self.read(sector, count),
                8..14 => {
                    let data = patterns(writer, sector, count);
                    change(Event::Wrote(writer), &|| open::write(self.image, at, &data), sector, count);
                }
                14 => change(Event::Zeroed, &|| self.image.zero(at, bytes, ZeroMode::MayUnmap), sector, count),
                15 => change(Event::Zeroed, &|| self.image.zero(at, bytes, ZeroMode::KeepAllocated), sector, count),
                // The whole place: at least one unit.
                16 | 17 => {
                    let (at, bytes) = (first * SECTOR as u64, len * SECTOR as u64);
                    change(Event::Discarded, &|| self.image.discard(at, bytes), first, len);
                }
                18 => self.image.flush().unwrap_or_else(|e| panic!("{}", e.chain())),
                _ => {
                    self.image.map(at, bytes).unwrap();
                }
            }
        }
    }
}

fn crowd(kind: &Kind) {
    let dir = scratch();
    let made = kind.make(dir.path());
    let image: Arc<Image> = open::file(kind, &made.file, false);
    let unit = (image.limits().granularity / SECTOR as u64).max(1);
    let sectors = kind.size / SECTOR as u64;
    let mut rng = StdRng::seed_from_u64(seed());
    let places = (0..6)
        .map(|_| {
            let first = rng.random_range(0..sectors.div_ceil(unit)) * unit;
            (first, (unit * rng.random_range(1..=2)).min(sectors - first))
        })
        .collect();
    let crowd = Crowd {
        image: &image,
        content: &made.content,
        clock: AtomicU64::new(1),
        events: (0..sectors).map(|_| Mutex::default()).collect(),
        places,
    };
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let crowd = &crowd;
            scope.spawn(move || crowd.thread(thread, if long() { 20_000 } else { 500 }));
        }
    });
    crowd.places.iter().for_each(|(first, len)| crowd.read(*first, *len));
    for (sector, events) in crowd.events.iter().enumerate() {
        let first = &made.content[sector * SECTOR..(sector + 1) * SECTOR];
        let mut events = events.lock();
        events.sort_by_key(|e| e.0);
        if let Err(error) = linearisable(&events, first.iter().all(|b| *b == 0)) {
            panic!("{}, sector {sector}: {error}\n{events:?}", kind.name);
        }
    }
    image.close().unwrap();
    let now = open::read_all(&*image).unwrap();
    if kind.check {
        let report = image.check(false).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.notes);
    }
    drop(crowd);
    drop(image);
    qemu::clean(kind, &made.file).unwrap();
    qemu::compare(kind, &made.file, &now).unwrap();
}

#[test]
fn the_check_sees_what_is_wrong() {
    use Event::*;
    let wrong: [&[Happening]; 6] = [
        // A value of the past.
        &[(1, 2, Wrote(1)), (3, 4, Wrote(2)), (5, 6, Read(1))],
        // There and back again.
        &[(1, 10, Wrote(1)), (1, 10, Wrote(2)), (11, 12, Read(1)), (13, 14, Read(2)), (15, 16, Read(1))],
        // Before it was written.
        &[(1, 2, Read(1)), (3, 4, Wrote(1))],
        // After it was zeroed.
        &[(1, 2, Wrote(1)), (3, 4, Zeroed), (5, 6, Read(1))],
        // Zeros from nowhere.
        &[(1, 2, Wrote(1)), (3, 4, Read(ZEROED))],
        // A write that came and went unseen between two reads of another that were later than it.
        &[(1, 2, Wrote(1)), (3, 4, Wrote(2)), (5, 6, Wrote(3)), (7, 8, Read(2))],
    ];
    for events in wrong {
        linearisable(events, false).expect_err(&format!("{events:?}"));
    }
    let right: [&[Happening]; 4] = [
        &[(1, 2, Wrote(1)), (3, 6, Wrote(2)), (4, 5, Read(1)), (4, 7, Read(2)), (8, 9, Read(2))],
        &[(1, 2, Wrote(1)), (3, 4, Discarded), (5, 6, Read(1))],
        &[(1, 2, Wrote(1)), (3, 4, Discarded), (5, 6, Read(ZEROED))],
        &[(1, 2, Read(0)), (1, 5, Zeroed), (6, 7, Read(ZEROED))],
    ];
    for events in right {
        linearisable(events, false).unwrap();
    }
}

macro_rules! tests {
    ($($kind:ident)*) => {
        kind_tests!(crowd: $($kind)*);
    };
}
for_each_writable_kind!(tests);

mod many_files {
    use super::*;
    for_each_kind_of_many_files!(tests);
}
