//! Power cuts and deaths: a recorded run of random requests, and what the file may hold after a cut at any point of it.

use super::guest::{Change, History, SECTOR, ZEROED, patterns};
use super::operations::{Mix, Operation, random, range};
use super::pages::Pages;
use super::{Kind, guest, open};
use formats::redo::Record;
use formats::store::recording::{Action, Entry, Journal, RecordingStore};
use formats::{BlockDevice, Image};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// The number of the image file in journals.
const FILE: usize = 1;

/// A run that was recorded.
pub struct Run {
    pub entries: Vec<Entry>,
    pub history: History,
    /// The file before the run.
    pub base: Pages,
}

/// What the requests of kind's run look like.
pub fn mix(kind: &Kind, unit: u64) -> Mix {
    Mix { sectors: kind.size / SECTOR as u64, unit: (unit / SECTOR as u64).max(1), flush_one_in: 12 }
}

/// So many random requests.
pub fn operations(rng: &mut StdRng, mix: &Mix, count: usize) -> Vec<Operation> {
    (0..count).map(|_| if rng.random_ratio(1, 60) { Operation::Reopen } else { random(rng, mix) }).collect()
}

/// Runs the requests one after another on an image that lies in `base` and holds `content`.
pub fn record(kind: &Kind, path: &Path, base: Pages, content: Vec<u8>, operations: &[Operation]) -> Result<Run, String> {
    let journal = Journal::new();
    let store = Arc::new(RecordingStore::new(base.to_vec(), journal.clone(), FILE, path));
    let reopen = || open::over(kind, path, store.clone(), true, Box::new(journal.clone()));
    record_on(&journal, base, content, operations, reopen)
}

/// The same on an image of two files, of which the journal numbers the second [`FILE`] + 1.
pub fn record_two(kind: &Kind, path: &Path, bases: [Pages; 2], content: Vec<u8>, operations: &[Operation]) -> Result<Run, String> {
    let journal = Journal::new();
    let [first, second] = [(FILE, &bases[0]), (FILE + 1, &bases[1])]
        .map(|(number, base)| Arc::new(RecordingStore::new(base.to_vec(), journal.clone(), number, path)));
    let reopen = || open::over_files(kind, path, first.clone(), Some(second.clone()), true, Box::new(journal.clone()));
    let [base, _] = &bases;
    record_on(&journal, base.clone(), content, operations, reopen)
}

fn record_on(
    journal: &Journal,
    base: Pages,
    content: Vec<u8>,
    operations: &[Operation],
    open: impl Fn() -> formats::Result<Arc<Image>>,
) -> Result<Run, String> {
    let history = Mutex::new(History::new(content));
    let reopen = || open().map_err(|e| format!("cannot open: {}", e.chain()));
    let mut image = reopen()?;
    for (index, operation) in operations.iter().enumerate() {
        if *operation == Operation::Reopen {
            image.close().map_err(|e| format!("operation {index}, close: {}", e.chain()))?;
            drop(image);
            image = reopen()?;
        } else {
            perform(&image, journal, &history, operation, index as u32 + 1)
                .map_err(|e| format!("operation {index}, {operation:?}: {}", e.chain()))?;
        }
    }
    image.close().map_err(|e| format!("close: {}", e.chain()))?;
    Ok(Run { entries: journal.entries(), history: history.into_inner(), base })
}

/// One request, with its place in the history. Requests that run at once are for different sectors.
fn perform(image: &Image, journal: &Journal, history: &Mutex<History>, operation: &Operation, writer: u32) -> formats::Result<()> {
    let (at, len) = range(operation);
    let began = journal.mark(u64::from(writer));
    let first = (at / SECTOR as u64) as usize;
    let sectors = first..first + (len / SECTOR as u64) as usize;
    let note = |writer| Change { writer, began, acknowledged: usize::MAX };
    match *operation {
        Operation::Write { sector, count } => {
            sectors.clone().for_each(|s| history.lock().sectors[s].push(note(writer)));
            open::write(image, at, &patterns(writer, sector, count))?;
        }
        Operation::Zero { mode, .. } => {
            sectors.clone().for_each(|s| history.lock().sectors[s].push(note(ZEROED)));
            image.zero(at, len, mode)?;
        }
        Operation::Discard { .. } => {
            image.discard(at, len)?;
            let now = open::read(image, at, len as usize)?;
            let mut history = history.lock();
            for (s, bytes) in sectors.clone().zip(now.chunks(SECTOR)) {
                if bytes.iter().all(|b| *b == 0) {
                    history.sectors[s].push(note(ZEROED));
                }
            }
        }
        Operation::Flush => image.flush()?,
        Operation::Reopen => {}
    }
    let acknowledged = journal.mark(u64::from(writer));
    let mut history = history.lock();
    for sector in sectors {
        history.sectors[sector].iter_mut().filter(|c| c.began == began).for_each(|c| c.acknowledged = acknowledged);
    }
    if *operation == Operation::Flush {
        history.flushes.push((began, acknowledged));
    }
    Ok(())
}

/// Like [`record`], but so many threads at once, each on sectors of its own that share units with the others'.
pub fn record_crowd(kind: &Kind, path: &Path, base: Pages, content: Vec<u8>, threads: u64, seed: u64, each: usize) -> Result<Run, String> {
    let journal = Journal::new();
    let store = Arc::new(RecordingStore::new(base.to_vec(), journal.clone(), FILE, path));
    let history = Mutex::new(History::new(content));
    let image = open::over(kind, path, store, true, Box::new(journal.clone())).map_err(|e| format!("cannot open: {}", e.chain()))?;
    let mix = mix(kind, image.limits().granularity);
    let failure = Mutex::new(None);
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (image, journal, history, failure) = (&image, &journal, &history, &failure);
            scope.spawn(move || {
                let mut rng = StdRng::seed_from_u64(seed * 1000 + thread);
                for index in 0..each {
                    let operation = own(random(&mut rng, &mix), thread, threads, &mix);
                    let writer = (index as u64 * threads + thread + 1) as u32;
                    if let Err(error) = perform(image, journal, history, &operation, writer) {
                        failure.lock().get_or_insert(format!("{operation:?}: {}", error.chain()));
                        return;
                    }
                }
            });
        }
    });
    if let Some(failure) = failure.into_inner() {
        return Err(failure);
    }
    image.close().map_err(|e| format!("close: {}", e.chain()))?;
    Ok(Run { entries: journal.entries(), history: history.into_inner(), base })
}

/// Bends a request to a thread's own sectors, of which no other thread has any: strips of the first half of the device (of all of it if that is less than two
/// units), whole units of the second.
fn own(operation: Operation, thread: u64, threads: u64, mix: &Mix) -> Operation {
    let (sector, count) = match operation {
        Operation::Write { sector, count } | Operation::Zero { sector, count, .. } | Operation::Discard { sector, count } => {
            (sector, count)
        }
        other => return other,
    };
    let half = mix.sectors / 2 / mix.unit * mix.unit;
    let narrow = ((mix.unit / threads).clamp(1, 24), 0, if half == 0 { mix.sectors } else { half });
    let (strip, base, limit) = if sector < narrow.2 { narrow } else { (mix.unit, half, mix.sectors) };
    let round = strip * threads;
    let start = base + (sector - base) / round * round + thread * strip;
    let end = (start + strip).min(limit);
    if start >= end {
        return Operation::Flush;
    }
    let first = start + sector % (end - start);
    let count = count.min(end - first);
    match operation {
        Operation::Write { .. } => Operation::Write { sector: first, count },
        Operation::Zero { mode, .. } => Operation::Zero { sector: first, count, mode },
        _ if base > 0 => Operation::Discard { sector: start, count: end - start },
        _ => Operation::Discard { sector: first, count },
    }
}

/// Walks along a recorded run and tells what the file may hold at each position. Positions must not go back.
pub struct Cutter<'a> {
    file: usize,
    entries: &'a [Entry],
    position: usize,
    /// What every cut leaves: all changes that a sync covers.
    safe: Pages,
    /// The other changes, in the order in which they began, and whether each has ended and where.
    open: Vec<(usize, &'a Action, Option<usize>)>,
    /// Up to where the last sync covers what has ended.
    synced: usize,
    /// What the redo log holds.
    redo: Vec<&'a Record>,
}

impl<'a> Cutter<'a> {
    /// At the start of a run.
    pub fn new(run: &'a Run) -> Self {
        Self { file: FILE, entries: &run.entries, position: 0, safe: run.base.clone(), open: Vec::new(), synced: 0, redo: Vec::new() }
    }

    /// Likewise, for the second file of [`record_two`].
    pub fn of_second(run: &'a Run, base: Pages) -> Self {
        Self { file: FILE + 1, safe: base, ..Self::new(run) }
    }

    /// Goes on to `position`.
    fn advance(&mut self, position: usize) {
        assert!(position >= self.position, "a cutter does not go back");
        for (index, entry) in self.entries.iter().enumerate().take(position).skip(self.position) {
            match entry {
                Entry::Began { file, action: action @ (Action::Write { .. } | Action::SetLen(_) | Action::Zero { .. }) }
                    if *file == self.file =>
                {
                    self.open.push((index, action, None));
                }
                Entry::Began { action: Action::Redo(record), .. } => self.redo.push(record),
                Entry::Began { action: Action::RedoDurable(group), .. } => self.redo.retain(|r| r.group > *group),
                Entry::Began { .. } => {}
                Entry::Ended(began) => match &self.entries[*began] {
                    Entry::Began { file, action: Action::Sync } if *file == self.file && *began > self.synced => {
                        self.synced = *began;
                        let (safe, synced) = (&mut self.safe, self.synced);
                        self.open.retain(|(_, action, end)| {
                            let covered = end.is_some_and(|end| end < synced);
                            if covered {
                                safe.apply(action);
                            }
                            !covered
                        });
                    }
                    _ => {
                        if let Ok(found) = self.open.binary_search_by_key(began, |o| o.0) {
                            self.open[found].2 = Some(index);
                        }
                    }
                },
            }
        }
        self.position = position;
    }

    /// The file after a power cut at `position`; `seed` decides which of the changes that were not safe have reached the disk.
    ///
    /// Every sector of the file holds what a prefix of the writes to it left there: disks write whole sectors, in any order and any number of them.
    pub fn after_power_cut(&mut self, position: usize, seed: u64) -> Pages {
        self.advance(position);
        let mut rng = StdRng::seed_from_u64(seed);
        let mut file = self.safe.clone();
        // How many whole changes get through, and how many in part.
        let (whole, torn) =
            [(0.0, 0.0), (1.0, 0.0), (0.1, 0.0), (0.5, 0.0), (0.9, 0.0), (0.3, 0.4), (0.7, 0.3), (0.0, 1.0)][rng.random_range(0..8)];
        // Per sector of the file the number of the last change that got there, from 1 on.
        let mut last_kept: HashMap<u64, usize> = HashMap::new();
        let mut kept_lengths = vec![false; self.open.len()];
        let mut longest = file.len() as u64;
        for (index, (_, action, _)) in self.open.iter().enumerate() {
            let choice: f64 = rng.random();
            let keep = choice < whole;
            let part = !keep && choice < whole + torn;
            match action {
                Action::SetLen(new) => {
                    kept_lengths[index] = keep;
                    longest = longest.max(*new);
                }
                _ => {
                    for sector in sectors(action) {
                        if keep || (part && rng.random()) {
                            last_kept.insert(sector, index + 1);
                        }
                    }
                    let (at, len) = extent(action);
                    if matches!(action, Action::Write { .. }) {
                        longest = longest.max(at + len);
                    }
                }
            }
        }
        for (index, (_, action, _)) in self.open.iter().enumerate() {
            if matches!(action, Action::SetLen(_)) {
                if kept_lengths[index] {
                    file.apply(action);
                }
                continue;
            }
            let (at, len) = extent(action);
            for sector in sectors(action).filter(|s| last_kept.get(s).is_some_and(|last| *last > index)) {
                let (from, to) = ((sector * 512).max(at), ((sector + 1) * 512).min(at + len));
                match action {
                    Action::Write { bytes, .. } => file.write(from as usize, &bytes[(from - at) as usize..(to - at) as usize]),
                    _ => file.zero(from as usize, (to - from) as usize),
                }
            }
        }
        // The length may be on disk without the bytes.
        if rng.random_bool(0.5) && longest as usize > file.len() {
            file.set_len(longest as usize);
        }
        file
    }

    /// The file after the death of the process at `position`, and what its redo log holds: the kernel has all that had ended, and part of what was under way.
    pub fn after_death(&mut self, position: usize, seed: u64) -> (Pages, Vec<Record>) {
        self.advance(position);
        let mut rng = StdRng::seed_from_u64(seed);
        let mut file = self.safe.clone();
        for (_, action, end) in &self.open {
            match action {
                Action::Write { at, bytes } if end.is_none() => {
                    // The kernel copies whole pages; a signal comes between them.
                    let whole = (*at as usize + rng.random_range(0..=bytes.len())) & !511;
                    file.write(*at as usize, &bytes[..whole.saturating_sub(*at as usize)]);
                }
                _ if end.is_none() && rng.random() => {}
                _ => file.apply(action),
            }
        }
        (file, self.redo.iter().map(|r| (*r).clone()).collect())
    }
}

/// The sectors of the file that a change touches.
fn sectors(action: &Action) -> Range<u64> {
    let (at, len) = extent(action);
    at / 512..(at + len).div_ceil(512)
}

fn extent(action: &Action) -> (u64, u64) {
    match action {
        Action::Write { at, bytes } => (*at, bytes.len() as u64),
        Action::Zero { at, len } => (*at, *len),
        _ => (0, 0),
    }
}

/// The smallest list of requests found, by leaving out parts, for which `fails` still says why.
pub fn shrink(mut operations: Vec<Operation>, fails: impl Fn(&[Operation]) -> Option<String>) -> (Vec<Operation>, String) {
    let started = std::time::Instant::now();
    let mut why = String::from("not reproduced");
    let mut chunk = operations.len() / 2;
    while chunk > 0 && started.elapsed().as_secs() < 60 {
        let mut at = 0;
        while at < operations.len() && started.elapsed().as_secs() < 60 {
            let mut fewer = operations.clone();
            fewer.drain(at..(at + chunk).min(fewer.len()));
            match fails(&fewer) {
                Some(reason) => (operations, why) = (fewer, reason),
                None => at += chunk,
            }
        }
        chunk /= 2;
    }
    (operations, why)
}

/// Positions of `run` to cut at, in order: after every entry, or so many of them.
pub fn positions(run: &Run, count: usize, rng: &mut StdRng) -> Vec<usize> {
    let all = run.entries.len();
    if all <= count {
        return (0..=all).collect();
    }
    let mut some: Vec<usize> = (0..count).map(|_| rng.random_range(0..=all)).collect();
    some.sort_unstable();
    some
}

/// Bytes that an image held before a run.
pub fn content(kind: &Kind, image: &Image) -> Result<Vec<u8>, String> {
    let bytes = open::read_all(image).map_err(|e| format!("{}: cannot read: {}", kind.name, e.chain()))?;
    // A pattern that is taken for the maker's content must not be one of a later operation.
    debug_assert!(bytes.len().is_multiple_of(guest::SECTOR));
    Ok(bytes)
}
