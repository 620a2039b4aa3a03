//! Every sample of `samples/MANIFEST`, read whole, at random unaligned places, scattered, and by many threads at once, against the
//! digest that the manifest gives; and its map against its bytes.

use formats::{BlockDevice, Image, OpenOptions};
use rand::{Rng, SeedableRng, rngs::StdRng};
use sha2::{Digest, Sha256};
use std::io::IoSliceMut;
use std::path::{Path, PathBuf};
use std::sync::Arc;

struct Sample {
    path: PathBuf,
    format: String,
    size: u64,
    digest: String,
}

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../samples")
}

/// The lines of the manifest: file, format, guest size, digest, backing file, description.
fn samples() -> Vec<Sample> {
    let text = std::fs::read_to_string(directory().join("MANIFEST")).expect("samples/MANIFEST");
    let lines = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    lines
        .map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            let [file, format, size, digest, ..] = fields[..] else { panic!("samples/MANIFEST: {line}") };
            Sample { path: directory().join(file), format: format.into(), size: size.parse().expect(line), digest: digest.into() }
        })
        .collect()
}

/// Opened read-only. Only a raw image is opened by the name of its format: the others must be recognised.
fn open(sample: &Sample) -> Arc<Image> {
    let options = OpenOptions::new(&sample.path).read_only(true);
    let options = if sample.format == "raw" { options.format("raw") } else { options };
    formats::open(&options).unwrap_or_else(|e| panic!("{}: {}", sample.path.display(), e.chain()))
}

fn read(image: &Image, at: u64, len: usize) -> Vec<u8> {
    // Poisoned, so that a byte that was not filled shows.
    let mut bytes = vec![0xee; len];
    image.read(&mut [IoSliceMut::new(&mut bytes)], at).unwrap_or_else(|e| panic!("{} bytes at {at}: {}", len, e.chain()));
    bytes
}

/// The whole image in requests of `step` bytes.
fn whole(image: &Image, step: usize) -> Vec<u8> {
    let size = image.limits().size;
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < size {
        let at = bytes.len() as u64;
        bytes.extend(read(image, at, step.min((size - at) as usize)));
    }
    bytes
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn the_manifest_names_every_sample_and_only_those() {
    let mut there: Vec<PathBuf> = std::fs::read_dir(directory()).unwrap().map(|entry| entry.unwrap().path()).collect();
    there.retain(|path| !["MANIFEST", "make", "check", "differencing", "udif", "guest-bytes"].iter().any(|name| path.ends_with(name)));
    there.sort();
    let mut named: Vec<PathBuf> = samples().into_iter().map(|sample| sample.path).collect();
    named.sort();
    assert_eq!(there, named);
    assert!(named.len() >= 6);
}

#[test]
fn whole_reads_give_the_digest() {
    for sample in samples() {
        let image = open(&sample);
        assert_eq!(image.limits().size, sample.size, "{}", sample.path.display());
        for step in [1 << 20, 65536, 10_007] {
            assert_eq!(hex(&Sha256::digest(whole(&image, step))), sample.digest, "{} by {step}", sample.path.display());
        }
    }
}

#[test]
fn random_scattered_reads_are_right() {
    for sample in samples() {
        let image = open(&sample);
        let bytes = whole(&image, 1 << 20);
        let mut random = StdRng::seed_from_u64(1);
        for _ in 0..400 {
            let at = random.random_range(0..sample.size);
            let len = random.random_range(1..=200_000).min(sample.size - at) as usize;
            let mut found = vec![0xee; len];
            let cut = random.random_range(0..=len);
            let (head, tail) = found.split_at_mut(cut);
            image.read(&mut [IoSliceMut::new(head), IoSliceMut::new(&mut []), IoSliceMut::new(tail)], at).unwrap();
            assert!(found == bytes[at as usize..at as usize + len], "{}: {len} bytes at {at}", sample.path.display());
        }
    }
}

#[test]
fn concurrent_reads_are_right() {
    for sample in samples() {
        let expected = whole(&open(&sample), 1 << 20);
        let image = open(&sample);
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let (image, expected, sample) = (&image, &expected, &sample);
                scope.spawn(move || {
                    let mut random = StdRng::seed_from_u64(thread);
                    for _ in 0..150 {
                        let at = random.random_range(0..sample.size);
                        let len = random.random_range(1..=70_000).min(sample.size - at) as usize;
                        let found = read(image, at, len);
                        assert!(found == expected[at as usize..at as usize + len], "{}: {len} bytes at {at}", sample.path.display());
                    }
                });
            }
        });
    }
}

#[test]
fn the_map_covers_the_image_and_its_zeros_are_zeros() {
    for sample in samples() {
        let image = open(&sample);
        let mut at = 0;
        while at < sample.size {
            let extent = image.map(at, sample.size - at).unwrap();
            assert!(extent.len > 0 && at + extent.len <= sample.size, "{}: {extent:?} at {at}", sample.path.display());
            if extent.zero {
                let bytes = read(&image, at, extent.len as usize);
                assert!(bytes.iter().all(|byte| *byte == 0), "{}: {extent:?} at {at}", sample.path.display());
            } else if let (Some(offset), "raw") = (extent.offset, sample.format.as_str()) {
                assert_eq!(offset, at);
            }
            at += extent.len;
        }
    }
}

#[test]
fn reads_beyond_the_end_are_refused() {
    for sample in samples() {
        let image = open(&sample);
        for (at, len) in [(sample.size, 1), (sample.size - 1, 2), (u64::MAX, 1), (u64::MAX - 511, 512)] {
            let mut bytes = vec![0; len];
            let error = image.read(&mut [IoSliceMut::new(&mut bytes)], at).expect_err("a read beyond the end");
            assert_eq!(error.kind(), formats::Kind::OutOfBounds, "{}: {len} at {at}", sample.path.display());
        }
    }
}
