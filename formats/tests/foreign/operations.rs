//! Random operations on an image and on a plain file, which must stay the same.

use super::{Raw, read};
use formats::{BlockDevice, Image, ZeroMode};
use rand::{Rng, RngCore, SeedableRng, rngs::StdRng};
use std::io::IoSlice;
use std::os::unix::fs::FileExt;

/// Where operations happen: pieces of the disk (offset and length), so that a large one is visited densely; and which.
#[derive(Clone, Debug)]
pub struct Places {
    pub pieces: Vec<(u64, u64)>,
    /// Blocks are zeroed and discarded too.
    pub zeroing: bool,
    /// Changes begin and end at multiples of this, in bytes.
    pub align: u64,
}

impl Places {
    pub fn new(pieces: &[(u64, u64)]) -> Self {
        Self { pieces: pieces.to_vec(), zeroing: true, align: 1 }
    }

    pub fn whole(size: u64) -> Self {
        Self::new(&[(0, size)])
    }

    fn pick(&self, rng: &mut StdRng, size: u64, len: u64) -> (u64, u64) {
        let (at, room) = self.pieces[rng.random_range(0..self.pieces.len())];
        let at = at + rng.random_range(0..room.max(1));
        let at = if rng.random_bool(0.5) { at - at % 4096 } else { at }.min(size - 1);
        (at, len.min(size - at))
    }
}

/// `count` random operations; the same ones for the same `seed`.
pub fn random_operations(name: &str, image: &Image, raw: &Raw, places: &Places, seed: u64, count: usize) {
    let mut rng = StdRng::seed_from_u64(seed);
    let unit = image.limits().granularity;
    let mut bytes = vec![0; 3 << 20];
    for step in 0..count {
        let len = match rng.random_range(0..10) {
            0 => rng.random_range(1..2 << 20),
            1..=3 => 512 * rng.random_range(1..200),
            _ => rng.random_range(1..10_000),
        };
        let (at, len) = places.pick(&mut rng, raw.size, len);
        let (at, len) = {
            let start = at - at % places.align;
            (start, (at + len).next_multiple_of(places.align).min(raw.size) - start)
        };
        let what = format!("{name}, seed {seed}, step {step}: {len} at {at}");
        match rng.random_range(0..20) {
            0..=11 => {
                let data = &mut bytes[..len as usize];
                rng.fill_bytes(data);
                let (a, b) = data.split_at(data.len() / 2);
                image.write(&[IoSlice::new(a), IoSlice::new(b)], at).unwrap_or_else(|e| panic!("{what}: write: {}", e.chain()));
                raw.file.write_all_at(data, at).unwrap();
            }
            12 | 13 if places.zeroing => {
                let mode = if rng.random() { ZeroMode::MayUnmap } else { ZeroMode::KeepAllocated };
                let (at, len) = widen(&mut rng, raw.size, unit, at, len);
                image.zero(at, len, mode).unwrap_or_else(|e| panic!("{what}: zero {mode:?}: {}", e.chain()));
                zero_model(raw, at, len);
            }
            14 if places.zeroing => {
                let (at, len) = widen(&mut rng, raw.size, unit, at, len);
                image.discard(at, len).unwrap_or_else(|e| panic!("{what}: discard: {}", e.chain()));
                take_over_discard(&what, image, raw, unit, at, len);
            }
            15 => image.flush().unwrap_or_else(|e| panic!("{what}: flush: {}", e.chain())),
            _ => {
                let want = raw.read(at, len);
                assert!(read(image, at, len) == want, "{what}: read");
            }
        }
    }
}

/// Sometimes to whole units.
fn widen(rng: &mut StdRng, size: u64, unit: u64, at: u64, len: u64) -> (u64, u64) {
    if rng.random_bool(0.3) {
        return (at, len);
    }
    let start = at - at % unit;
    let end = (at + len).next_multiple_of(unit) + unit * rng.random_range(0..2);
    (start, end.min(size) - start)
}

fn zero_model(raw: &Raw, at: u64, len: u64) {
    use formats::store::{FileStore, Store};
    let store = FileStore::new(raw.file.try_clone().unwrap(), &raw.path).unwrap();
    if !store.punch(at, len).unwrap() {
        raw.file.write_all_at(&vec![0; len as usize], at).unwrap();
    }
}

/// Each whole unit of a discarded range reads as zeros or as before, and the rest as before.
fn take_over_discard(what: &str, image: &Image, raw: &Raw, unit: u64, at: u64, len: u64) {
    let end = at + len;
    let mut here = at.next_multiple_of(unit);
    while here < end {
        let stop = here + unit;
        if stop > end && end != raw.size {
            break;
        }
        let stop = stop.min(end);
        // Units can be very large.
        let now = read(image, here, (stop - here).min(32 << 20));
        if now.iter().all(|b| *b == 0) {
            zero_model(raw, here, stop - here);
        }
        assert!(now == raw.read(here, now.len() as u64), "{what}: discarded unit at {here}");
        here = stop;
    }
}

/// Four threads at once, each in its own stripes of the places, so that blocks are shared but bytes are not.
pub fn concurrent_operations(name: &str, image: &Image, raw: &Raw, places: &Places, seed: u64, count: usize) {
    const STRIPE: u64 = 12 * 512 + 100;
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            scope.spawn(move || {
                let mut rng = StdRng::seed_from_u64(seed * 10 + thread);
                let mut bytes = vec![0; STRIPE as usize];
                for step in 0..count {
                    let (at, _) = places.pick(&mut rng, raw.size, 1);
                    let stripe = at / STRIPE / 4 * 4 + thread;
                    let at = stripe * STRIPE + rng.random_range(0..STRIPE / 2);
                    let end = ((stripe + 1) * STRIPE).min(raw.size);
                    if at >= end {
                        continue;
                    }
                    let len = rng.random_range(1..=end - at);
                    let what = format!("{name}, seed {seed}, thread {thread}, step {step}: {len} at {at}");
                    match rng.random_range(0..10) {
                        0..=5 => {
                            let data = &mut bytes[..len as usize];
                            rng.fill_bytes(data);
                            image.write(&[IoSlice::new(data)], at).unwrap_or_else(|e| panic!("{what}: {}", e.chain()));
                            raw.file.write_all_at(data, at).unwrap();
                        }
                        6 if places.zeroing => {
                            image.zero(at, len, ZeroMode::MayUnmap).unwrap_or_else(|e| panic!("{what}: {}", e.chain()));
                            raw.file.write_all_at(&vec![0; len as usize], at).unwrap();
                        }
                        7 if step % 7 == 0 => image.flush().unwrap_or_else(|e| panic!("{what}: {}", e.chain())),
                        _ => assert!(read(image, at, len) == raw.read(at, len), "{what}: read"),
                    }
                }
            });
        }
    });
}
