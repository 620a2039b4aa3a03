//! Power cuts and deaths: a recorded run of random requests, and what the file may hold after a cut at any point of it.

use super::guest::{Change, History, SECTOR, ZEROED, patterns};
use super::operations::{Mix, Operation, random, range};
use super::{Kind, guest, open};
use formats::store::recording::{Action, Entry, Fate, Journal, RecordingStore, apply, changes_at};
use formats::{BlockDevice, Image};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::path::Path;
use std::sync::Arc;

/// The number of the image file in journals.
const FILE: usize = 1;

/// A run that was recorded.
pub struct Run {
    pub entries: Vec<Entry>,
    pub history: History,
    /// The file before the run.
    pub base: Vec<u8>,
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
pub fn record(kind: &Kind, path: &Path, base: Vec<u8>, content: Vec<u8>, operations: &[Operation]) -> Result<Run, String> {
    let journal = Journal::new();
    let store = Arc::new(RecordingStore::new(base.clone(), journal.clone(), FILE, path));
    let history = Mutex::new(History::new(content));
    let reopen =
        || open::over(kind, path, store.clone(), true, Box::new(journal.clone())).map_err(|e| format!("cannot open: {}", e.chain()));
    let mut image = reopen()?;
    for (index, operation) in operations.iter().enumerate() {
        if *operation == Operation::Reopen {
            image.close().map_err(|e| format!("operation {index}, close: {}", e.chain()))?;
            drop(image);
            image = reopen()?;
        } else {
            perform(&image, &journal, &history, operation, index as u32 + 1)
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
pub fn record_crowd(
    kind: &Kind,
    path: &Path,
    base: Vec<u8>,
    content: Vec<u8>,
    threads: u64,
    seed: u64,
    each: usize,
) -> Result<Run, String> {
    let journal = Journal::new();
    let store = Arc::new(RecordingStore::new(base.clone(), journal.clone(), FILE, path));
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

/// Bends a request to a thread's own sectors: strips of the first half of the device, whole units of the second.
fn own(operation: Operation, thread: u64, threads: u64, mix: &Mix) -> Operation {
    let (sector, count) = match operation {
        Operation::Write { sector, count } | Operation::Zero { sector, count, .. } | Operation::Discard { sector, count } => {
            (sector, count)
        }
        other => return other,
    };
    let half = mix.sectors / 2 / mix.unit * mix.unit;
    let (strip, base) = if sector < half { ((mix.unit / threads).clamp(1, 24), 0) } else { (mix.unit, half) };
    let round = strip * threads;
    let start = base + (sector - base) / round * round + thread * strip;
    let (start, end) = (start, (start + strip).min(mix.sectors));
    if start >= end || (base == 0 && end > half) {
        return Operation::Flush;
    }
    let sector = start + sector % (end - start);
    let count = count.min(end - sector);
    match operation {
        Operation::Write { .. } => Operation::Write { sector, count },
        Operation::Zero { mode, .. } => Operation::Zero { sector, count, mode },
        _ if base == half => Operation::Discard { sector: start, count: end - start },
        _ => Operation::Discard { sector, count },
    }
}

/// The file after a power cut at `position`; `seed` decides which of the changes that were not safe have reached the disk.
///
/// Every sector of the file holds what a prefix of the writes to it left there: disks write whole sectors, in any order and any number of them.
pub fn after_power_cut(run: &Run, position: usize, seed: u64) -> Vec<u8> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut bytes = run.base.clone();
    let changes = changes_at(&run.entries, FILE, position);
    let (safe, open): (Vec<_>, Vec<_>) = changes.into_iter().partition(|c| c.2 == Fate::Durable);
    safe.iter().for_each(|c| apply(c.1, &mut bytes));
    // How many whole changes get through, and how many in part.
    let (whole, torn) =
        [(0.0, 0.0), (1.0, 0.0), (0.1, 0.0), (0.5, 0.0), (0.9, 0.0), (0.3, 0.4), (0.7, 0.3), (0.0, 1.0)][rng.random_range(0..8)];
    // Per sector of the file the number of the last change that got there, from 1 on.
    let mut last_kept: Vec<u32> = Vec::new();
    let mut kept_lengths = vec![false; open.len()];
    let mut longest = bytes.len() as u64;
    for (index, (_, action, _)) in open.iter().enumerate() {
        let choice: f64 = rng.random();
        let keep = choice < whole;
        let part = !keep && choice < whole + torn;
        let (at, len) = extent(action);
        match action {
            Action::SetLen(new) => {
                kept_lengths[index] = keep;
                longest = longest.max(*new);
            }
            _ => {
                let (first, end) = (at / 512, (at + len).div_ceil(512));
                if last_kept.len() < end as usize {
                    last_kept.resize(end as usize, 0);
                }
                for kept in &mut last_kept[first as usize..end as usize] {
                    if keep || (part && rng.random()) {
                        *kept = index as u32 + 1;
                    }
                }
                if matches!(action, Action::Write { .. }) {
                    longest = longest.max(at + len);
                }
            }
        }
    }
    for (index, (_, action, _)) in open.iter().enumerate() {
        let (at, len) = extent(action);
        match action {
            Action::SetLen(_) if kept_lengths[index] => apply(action, &mut bytes),
            Action::Write { bytes: new, .. } => {
                for sector in (at / 512..(at + len).div_ceil(512)).filter(|s| last_kept[*s as usize] as usize > index) {
                    let (from, to) = ((sector * 512).max(at), ((sector + 1) * 512).min(at + len));
                    let piece = new[(from - at) as usize..(to - at) as usize].into();
                    apply(&Action::Write { at: from, bytes: piece }, &mut bytes);
                }
            }
            Action::Zero { .. } => {
                for sector in (at / 512..(at + len).div_ceil(512)).filter(|s| last_kept[*s as usize] as usize > index) {
                    let (from, to) = ((sector * 512).max(at), ((sector + 1) * 512).min(at + len));
                    apply(&Action::Zero { at: from, len: to - from }, &mut bytes);
                }
            }
            _ => {}
        }
    }
    // The length may be on disk without the bytes.
    if rng.random_bool(0.5) {
        bytes.resize(bytes.len().max(longest as usize), 0);
    }
    bytes
}

/// The file after the death of the process at `position`: the kernel has all that had ended, and part of what was under way.
pub fn after_death(run: &Run, position: usize, seed: u64) -> Vec<u8> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut bytes = run.base.clone();
    for (_, action, fate) in changes_at(&run.entries, FILE, position) {
        match action {
            Action::Write { at, bytes: new } if fate == Fate::UnderWay => {
                // The kernel copies whole pages; a signal comes between them.
                let whole = (*at as usize + rng.random_range(0..=new.len())) & !511;
                let part = whole.saturating_sub(*at as usize);
                apply(&Action::Write { at: *at, bytes: new[..part].into() }, &mut bytes);
            }
            _ if fate == Fate::UnderWay && rng.random() => {}
            _ => apply(action, &mut bytes),
        }
    }
    bytes
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

/// Positions of `run` to cut at: after every entry, or so many of them.
pub fn positions(run: &Run, count: usize, rng: &mut StdRng) -> Vec<usize> {
    let all = run.entries.len();
    if all <= count { (0..=all).collect() } else { (0..count).map(|_| rng.random_range(0..=all)).collect() }
}

/// Bytes that an image held before a run.
pub fn content(kind: &Kind, image: &Image) -> Result<Vec<u8>, String> {
    let bytes = open::read_all(image).map_err(|e| format!("{}: cannot read: {}", kind.name, e.chain()))?;
    // A pattern that is taken for the maker's content must not be one of a later operation.
    debug_assert!(bytes.len().is_multiple_of(guest::SECTOR));
    Ok(bytes)
}
