//! Damaged images: whatever is wrong with a file, opening it, reading, writing and checking it give data or an error; never a panic, a hang, or memory
//! out of proportion to the file.

mod table;

use formats::redo;
use formats::store::MemoryStore;
use formats::{BlockDevice, ZeroMode};
use nix::time::{ClockId, clock_gettime};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::{Arc, Mutex};
use table::{Kind, for_each_kind, kind_tests, long, open, scratch, seed};

/// Processor time that a mutant may take, in seconds.
const SECONDS: f64 = 2.0;
/// Address space that the test may take beyond what it began with, in bytes: the caches, and what a few images need.
const MEMORY: u64 = 256 << 20;

/// One test at a time measures the process's memory.
static ONE: Mutex<()> = Mutex::new(());

fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmPeak:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap();
    time.tv_sec() as f64 + time.tv_nsec() as f64 / 1e9
}

/// Damages a valid image: headers and tables more often than data.
fn mutate(rng: &mut StdRng, original: &[u8]) -> Vec<u8> {
    let mut bytes = original.to_vec();
    for _ in 0..[1, 1, 1, 2, 4, 16][rng.random_range(0..6)] {
        let len = bytes.len();
        if len < 16 {
            break;
        }
        let at = match rng.random_range(0..8) {
            0..3 => rng.random_range(0..len.min(128)),
            3 => rng.random_range(0..len.min(4096)),
            4 => rng.random_range(0..len.min(512 << 10)),
            // At the start of a block, where tables are.
            5 | 6 => rng.random_range(0..len.div_ceil(512)) * 512 + rng.random_range(0..8) * 8,
            _ => rng.random_range(0..len),
        };
        let at = at.min(len - 9);
        // Fields are mostly aligned.
        let at = if rng.random() { at & !7 } else { at };
        let interesting =
            [0, 1, 2, 0x7f, 0xff, 0x1_0000, 0x7fff_ffff, 0xffff_ffff, 1 << 32, len as u64, len as u64 / 2, u64::MAX >> 1, u64::MAX];
        let value: u64 = interesting[rng.random_range(0..interesting.len())].wrapping_add(rng.random_range(0..3)).wrapping_sub(1);
        match rng.random_range(0..11) {
            0..3 => bytes[at] ^= 1 << rng.random_range(0..8),
            3 => bytes[at] = rng.random(),
            4 => bytes[at..at + 4].copy_from_slice(&(value as u32).to_be_bytes()),
            5 => bytes[at..at + 4].copy_from_slice(&(value as u32).to_le_bytes()),
            6 => bytes[at..at + 8].copy_from_slice(&value.to_be_bytes()),
            7 => bytes[at..at + 8].copy_from_slice(&value.to_le_bytes()),
            8 => {
                let from = rng.random_range(0..len - 8) & !7;
                bytes.copy_within(from..from + 8, at);
            }
            9 => rng.fill_bytes(&mut bytes[at..(at + 64).min(len)]),
            _ if rng.random_ratio(1, 4) => bytes.truncate(rng.random_range(0..len)),
            _ => bytes[at] = bytes[at].wrapping_add(1),
        }
    }
    bytes
}

/// Everything that can be done with an image; errors are as good as data.
fn exercise(kind: &Kind, path: &Path, bytes: Vec<u8>, writable: bool, rng: &mut StdRng) -> bool {
    let store = Arc::new(MemoryStore::new(bytes));
    let Ok(image) = open::over(kind, path, store, writable, Box::new(redo::None)) else { return false };
    let size = image.limits().size;
    let _ = image.format().describe();
    let mut buffer = vec![0; 1 << 20];
    let mut read = |at: u64| {
        let len = (size.saturating_sub(at)).min(1 << 20) as usize;
        let _ = image.read(&mut [std::io::IoSliceMut::new(&mut buffer[..len])], at);
    };
    // All of it if it is not too long; otherwise here and there.
    if size <= 32 << 20 {
        (0..size.div_ceil(1 << 20)).for_each(|i| read(i << 20));
    } else {
        (0..16).for_each(|_| read(rng.random_range(0..size)));
        read(size - 512);
    }
    let mut at = 0;
    for _ in 0..200 {
        if at >= size {
            break;
        }
        match image.map(at, size - at) {
            Ok(extent) => {
                assert!(extent.len > 0 && extent.len <= size - at);
                at += extent.len;
            }
            Err(_) => at += 1 << 16,
        }
    }
    if writable && size > 0 {
        let data = vec![0x5A; 70_000];
        for _ in 0..12 {
            let at = rng.random_range(0..size);
            let len = rng.random_range(1..=data.len() as u64).min(size - at);
            let _ = match rng.random_range(0..6) {
                0..4 => open::write(&*image, at, &data[..len as usize]),
                4 => image.zero(at, len, ZeroMode::MayUnmap),
                _ => image.discard(at & !0xffff, (4 << 20).min(size - (at & !0xffff))),
            };
        }
        let _ = image.flush();
    }
    if kind.check {
        let _ = image.check(false);
        if writable {
            let _ = image.check(true);
        }
    }
    let _ = image.close();
    true
}

fn mutants(kind: &Kind) {
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    let dir = scratch();
    let made = kind.make(dir.path());
    let original = open::bytes(&made);
    let can_write = !kind.stream && formats::drivers::by_name(kind.format).unwrap().can.write;
    assert!(exercise(kind, &made.file, original.clone(), can_write, &mut StdRng::seed_from_u64(1)), "{} as it was made", kind.name);
    let memory_before = peak_memory();
    let (mut opened, count) = (0, if long() { 20_000 } else { 250 });
    for number in 0..count {
        let seed = seed().wrapping_mul(1_000_003) + number;
        let mut rng = StdRng::seed_from_u64(seed);
        let mut bytes = mutate(&mut rng, &original);
        if rng.random_ratio(3, 4) {
            (kind.mend)(&mut bytes);
        }
        let writable = can_write && rng.random();
        let started = cpu_seconds();
        let result = std::panic::catch_unwind(AssertUnwindSafe(|| exercise(kind, &made.file, bytes, writable, &mut rng)));
        let took = cpu_seconds() - started;
        opened += u64::from(result.unwrap_or_else(|_| panic!("{}: mutant {seed} made it panic (above)", kind.name)));
        assert!(took < SECONDS, "{}: mutant {seed} took {took} s", kind.name);
        let memory = peak_memory().saturating_sub(memory_before);
        assert!(memory < MEMORY, "{}: mutant {seed} took {memory} bytes of memory", kind.name);
    }
    // If next to none can be opened, the damage never gets past the first check. Of a stream that is decoded whole to learn its length none is opened.
    let least = if kind.stream { 0 } else { count / 20 };
    assert!(opened >= least, "only {opened} of {count} mutants could be opened");
}

macro_rules! tests {
    ($($kind:ident)*) => {
        kind_tests!(mutants: $($kind)*);
    };
}
for_each_kind!(tests);
