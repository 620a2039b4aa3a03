//! Random requests of a guest.

use super::guest::SECTOR;
use formats::ZeroMode;
use rand::Rng;
use rand::rngs::StdRng;

/// One request; places are in sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Write {
        sector: u64,
        count: u64,
    },
    Zero {
        sector: u64,
        count: u64,
        mode: ZeroMode,
    },
    Discard {
        sector: u64,
        count: u64,
    },
    Flush,
    /// Close and open again.
    Reopen,
}

/// What a run looks like.
#[derive(Clone, Copy)]
pub struct Mix {
    /// The guest's size in sectors.
    pub sectors: u64,
    /// Allocation unit in sectors.
    pub unit: u64,
    /// Of so many operations one is a flush.
    pub flush_one_in: u32,
}

/// A random request. Hits the same places often, unit boundaries often, whole units sometimes.
pub fn random(rng: &mut StdRng, mix: &Mix) -> Operation {
    if rng.random_ratio(1, mix.flush_one_in) {
        return Operation::Flush;
    }
    let units = mix.sectors.div_ceil(mix.unit);
    // Half of all requests go to an eighth of the units.
    let unit = if rng.random_bool(0.5) { rng.random_range(0..units.div_ceil(8)) } else { rng.random_range(0..units) };
    let whole = rng.random_bool(0.3);
    let sector = (unit * mix.unit + if whole { 0 } else { rng.random_range(0..mix.unit) }).min(mix.sectors - 1);
    let longest = mix.unit.clamp(8, 2048) * 2;
    let count = match rng.random_range(0..10) {
        0..3 => 1,
        3..6 => rng.random_range(1..=8),
        6..9 if whole => mix.unit * rng.random_range(1..=3),
        _ => rng.random_range(1..=longest),
    };
    // No run of megabytes for the large units.
    let count = count.min(4096.max(mix.unit)).min(mix.sectors - sector);
    match rng.random_range(0..10) {
        0..6 => Operation::Write { sector, count: count.min(512) },
        6..8 => {
            let mode = if rng.random_bool(0.7) { ZeroMode::MayUnmap } else { ZeroMode::KeepAllocated };
            Operation::Zero { sector, count, mode }
        }
        _ => Operation::Discard { sector, count },
    }
}

/// The byte range of an operation.
pub fn range(operation: &Operation) -> (u64, u64) {
    match *operation {
        Operation::Write { sector, count } | Operation::Zero { sector, count, .. } | Operation::Discard { sector, count } => {
            (sector * SECTOR as u64, count * SECTOR as u64)
        }
        Operation::Flush | Operation::Reopen => (0, 0),
    }
}
