//! Every kind of image in the table: all ways to read it give the same bytes, and random requests do to it what they do to plain bytes.

mod table;

use formats::{BlockDevice, Image, ZeroMode};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;
use table::{Kind, for_each_kind, for_each_kind_of_many_files, for_each_writable_kind, kind_tests, long, open, qemu, scratch, seed};

/// Reads a range into many buffers of random lengths.
fn read_scattered(image: &Image, rng: &mut StdRng, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xEE; len];
    let mut rest = bytes.as_mut_slice();
    let mut parts = Vec::new();
    while !rest.is_empty() {
        let count = if rng.random_ratio(1, 8) { 0 } else { rng.random_range(1..=rest.len().min(20_000)) };
        let (now, later) = rest.split_at_mut(count);
        parts.push(IoSliceMut::new(now));
        rest = later;
    }
    image.read(&mut parts, at).unwrap_or_else(|e| panic!("{}", e.chain()));
    drop(parts);
    bytes
}

/// A random range, often at a unit's boundary.
fn random_range(rng: &mut StdRng, size: u64, unit: u64, longest: u64) -> (u64, usize) {
    let at = match rng.random_range(0..4) {
        0 => rng.random_range(0..size),
        1 => (rng.random_range(0..size.div_ceil(unit)) * unit).min(size - 1),
        2 => (rng.random_range(0..size.div_ceil(unit)) * unit + rng.random_range(0..1024)).saturating_sub(512).min(size - 1),
        _ => rng.random_range(0..size) & !511,
    };
    let len = match rng.random_range(0..4) {
        0 => rng.random_range(1..=16),
        1 => 512 * rng.random_range(1..=8),
        2 => unit.min(longest),
        _ => rng.random_range(1..=longest),
    };
    (at, len.min(size - at) as usize)
}

/// Whole, at random, unaligned, scattered, past the end, by several threads at once; and the maps agree with the bytes.
fn reads(kind: &Kind) {
    let dir = scratch();
    let made = kind.make(dir.path());
    let content = &made.content;
    let image = open::file(kind, &made.file, true);
    let limits = image.limits();
    assert_eq!(limits.size, kind.size);
    assert!(limits.read_only);
    assert!(open::read_all(&*image).unwrap() == *content, "the whole");
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let image = &image;
            scope.spawn(move || {
                let mut rng = StdRng::seed_from_u64(seed() * 100 + thread);
                for _ in 0..if long() { 5000 } else { 400 } {
                    let (at, len) = random_range(&mut rng, kind.size, limits.granularity, 300_000);
                    let expected = &content[at as usize..at as usize + len];
                    assert!(read_scattered(image, &mut rng, at, len) == expected, "{len} bytes at {at}");
                    let mut now = vec![0xEE; len];
                    if image.try_read(&mut [IoSliceMut::new(&mut now)], at).unwrap() {
                        assert!(now == expected, "{len} bytes at {at}, without waiting");
                    }
                }
            });
        }
    });
    let mut byte = [0; 2];
    let beyond = image.read(&mut [IoSliceMut::new(&mut byte)], kind.size - 1).unwrap_err();
    assert_eq!(beyond.kind(), formats::Kind::OutOfBounds);
    image.read(&mut [IoSliceMut::new(&mut byte)], u64::MAX).unwrap_err();
    for change in [open::write(&*image, 0, b"x"), image.zero(0, 512, ZeroMode::MayUnmap), image.discard(0, 512)] {
        assert_eq!(change.unwrap_err().kind(), formats::Kind::ReadOnly);
    }
    let mut at = 0;
    while at < kind.size {
        let extent = image.map(at, kind.size - at).unwrap();
        assert!(extent.len > 0 && extent.len <= kind.size - at, "{extent:?} at {at}");
        if extent.zero {
            assert!(content[at as usize..(at + extent.len) as usize].iter().all(|b| *b == 0), "{extent:?} at {at}");
        }
        at += extent.len;
    }
    image.flush().unwrap();
    if kind.check {
        let report = image.check(false).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.notes);
    }
}

/// Random requests of any alignment against plain bytes; QEMU and our own check look at the file afterwards.
fn random_requests(kind: &Kind) {
    let dir = scratch();
    let made = kind.make(dir.path());
    let mut model = made.content.clone();
    let mut rng = StdRng::seed_from_u64(seed());
    let mut image = open::file(kind, &made.file, false);
    let limits = image.limits();
    let longest = (limits.granularity * 3).clamp(70_000, 1 << 20);
    let mut log: Vec<String> = Vec::new();
    let count = if long() { 20_000 } else { 1500 };
    for index in 0..count {
        let (at, len) = random_range(&mut rng, kind.size, limits.granularity, longest);
        let range = at as usize..at as usize + len;
        let what = rng.random_range(0..100);
        log.push(format!("{index}: {what} {at} {len}"));
        let result = match what {
            0..40 => {
                let bytes = read_scattered(&image, &mut rng, at, len);
                same(kind, &bytes, &model[range], at, &log);
                Ok(())
            }
            40..72 => {
                rng.fill_bytes(&mut model[range.clone()]);
                let (first, second) = model[range].split_at(len / 3);
                image.write(&[IoSlice::new(first), IoSlice::new(&[]), IoSlice::new(second)], at)
            }
            72..82 => {
                model[range].fill(0);
                image.zero(at, len as u64, if what < 79 { ZeroMode::MayUnmap } else { ZeroMode::KeepAllocated })
            }
            82..85 => match image.zero(at, len as u64, ZeroMode::OnlyIfCheap) {
                Ok(()) => {
                    model[range].fill(0);
                    Ok(())
                }
                Err(e) if e.kind() == formats::Kind::Unsupported => Ok(()),
                Err(e) => Err(e),
            },
            85..93 => {
                let result = image.discard(at, len as u64);
                // What is given back reads as zeros; what is not is unchanged. Whole units are given back where that is promised.
                let now = open::read(&*image, at, len).unwrap();
                let unit = limits.granularity;
                for (i, byte) in now.iter().enumerate() {
                    let place = at + i as u64;
                    let start = place / unit * unit;
                    let whole = start >= at && (start + unit).min(kind.size) <= at + len as u64;
                    let old = model[place as usize];
                    let right = *byte == 0 || (*byte == old && !(whole && limits.discard_zeroes));
                    assert!(
                        right && (whole || *byte == old),
                        "{}: discard changed byte {place} from {old} to {byte}\n{}",
                        kind.name,
                        tail(&log)
                    );
                }
                model[range].copy_from_slice(&now);
                result
            }
            93..97 => image.flush(),
            97 => {
                let got = open::read_all(&*image).unwrap();
                same(kind, &got, &model, 0, &log);
                Ok(())
            }
            98 if kind.check => {
                let report = image.check(false).unwrap();
                assert_eq!(report.corruptions, 0, "{}: {:?}\n{}", kind.name, report.notes, tail(&log));
                Ok(())
            }
            _ => {
                let closed = image.close();
                drop(image);
                image = open::file(kind, &made.file, false);
                closed
            }
        };
        result.unwrap_or_else(|e| panic!("{}: {}\n{}", kind.name, e.chain(), tail(&log)));
    }
    image.close().unwrap();
    let got = open::read_all(&*image).unwrap();
    same(kind, &got, &model, 0, &log);
    if kind.check {
        let report = image.check(false).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{}: {:?}", kind.name, report.notes);
    }
    drop(image);
    qemu::compare(kind, &made.file, &model).unwrap_or_else(|e| panic!("{}: {e}", kind.name));
    qemu::clean(kind, &made.file).unwrap_or_else(|e| panic!("{}: {e}", kind.name));
    let again = open::file(kind, &made.file, true);
    same(kind, &open::read_all(&*again).unwrap(), &model, 0, &log);
}

fn same(kind: &Kind, got: &[u8], expected: &[u8], at: u64, log: &[String]) {
    if let Some(first) = got.iter().zip(expected).position(|(a, b)| a != b) {
        panic!(
            "{}: byte {} is {} instead of {} (request at {at}, {} bytes)\n{}",
            kind.name,
            at + first as u64,
            got[first],
            expected[first],
            got.len(),
            tail(log)
        );
    }
}

/// The latest requests.
fn tail(log: &[String]) -> String {
    log[log.len().saturating_sub(12)..].join("\n")
}

/// Growth, where the driver can: the new space reads as zeros, also after it was opened again.
fn growth(kind: &Kind) {
    let dir = scratch();
    let made = kind.make(dir.path());
    let mut model = made.content.clone();
    let mut image = open::file(kind, &made.file, false);
    if !kind.grows {
        let error = image.grow(kind.size + (1 << 20)).unwrap_err();
        assert_eq!((error.kind(), image.limits().size), (formats::Kind::Unsupported, kind.size), "{}", error.chain());
        return assert!(open::read_all(&*image).unwrap() == model);
    }
    assert!(image.grow(kind.size - 512).is_err(), "shrinking loses data");
    let mut rng = StdRng::seed_from_u64(seed());
    let sector = u64::from(image.limits().sector);
    for _ in 0..4 {
        let size = model.len() as u64 + sector * rng.random_range(1..(3000 * 512 / sector));
        image.grow(size).unwrap_or_else(|e| panic!("{}", e.chain()));
        assert_eq!(image.limits().size, size);
        model.resize(size as usize, 0);
        assert!(open::read_all(&*image).unwrap() == model);
        let at = rng.random_range(0..size - 5000);
        rng.fill_bytes(&mut model[at as usize..at as usize + 5000]);
        open::write(&*image, at, &model[at as usize..at as usize + 5000]).unwrap();
        image.close().unwrap();
        drop(image);
        image = open::file(kind, &made.file, false);
        assert!(open::read_all(&*image).unwrap() == model);
    }
    drop(image);
    qemu::compare(kind, &made.file, &model).unwrap();
    qemu::clean(kind, &made.file).unwrap();
}

/// Two openings for writing exclude each other, and us and QEMU.
fn locks(kind: &Kind) {
    let dir = scratch();
    let made = kind.make(dir.path());
    let image: Arc<Image> = open::file(kind, &made.file, false);
    let options = formats::OpenOptions::new(&made.file).format(kind.format);
    let Err(error) = formats::open(&options) else { panic!("opened for writing twice") };
    assert_eq!(error.kind(), formats::Kind::Locked);
    if kind.qemu {
        let output = qemu::run("qemu-io", &["-f", kind.format, "-c", "read 0 512", made.file.to_str().unwrap()]);
        assert!(!output.status.success(), "QEMU opened an image that we write to, to write");
    }
    drop(image);
    let _first = open::file(kind, &made.file, true);
    let _second = open::file(kind, &made.file, true);
}

macro_rules! tests {
    ($($kind:ident)*) => {
        kind_tests!(reads: $($kind)*);
    };
}
for_each_kind!(tests);

macro_rules! writing_tests {
    ($($kind:ident)*) => {
        kind_tests!(random_requests: $($kind)*);
        kind_tests!(growth: $($kind)*);
        kind_tests!(locks: $($kind)*);
    };
}
for_each_writable_kind!(writing_tests);

mod many_files {
    use super::*;
    for_each_kind_of_many_files!(writing_tests);
}
