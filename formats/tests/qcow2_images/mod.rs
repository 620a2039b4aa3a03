//! Images made by `qemu-img`, and the plain bytes that they hold.
#![allow(dead_code, reason = "each test program uses a part")]

use formats::{BlockDevice, Image, OpenOptions};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use std::io::{IoSlice, IoSliceMut};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

/// Runs a tool in `dir`; it must succeed.
pub fn run(dir: &Path, tool: &str, args: &[&str]) -> Output {
    let output = try_run(dir, tool, args);
    assert!(
        output.status.success(),
        "{tool} {args:?} failed: {}\n{}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// Runs a tool in `dir`.
pub fn try_run(dir: &Path, tool: &str, args: &[&str]) -> Output {
    let found = Command::new(tool).args(args).current_dir(dir).output();
    found.unwrap_or_else(|e| panic!("{tool} cannot be run ({e}): this test needs Debian's package qemu-utils"))
}

/// Runs `qemu-img`; it must succeed.
pub fn qemu_img(dir: &Path, args: &[&str]) -> Output {
    run(dir, "qemu-img", args)
}

/// `size` bytes: zeros, text and noise in runs of many lengths.
pub fn content(size: usize, seed: u64) -> Vec<u8> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut bytes = Vec::with_capacity(size);
    while bytes.len() < size {
        let len = (512usize << rng.random_range(0..9)).min(size - bytes.len());
        match rng.random_range(0..3) {
            0 => bytes.resize(bytes.len() + len, 0),
            1 => {
                let word = rng.random::<u16>();
                bytes.extend(
                    (0..len).map(|i| b"the quick brown fox jumps over the lazy dog "[i % 44] ^ ((i as u16 / 977) ^ word) as u8 & 1),
                );
            }
            _ => {
                let from = bytes.len();
                bytes.resize(from + len, 0);
                rng.fill_bytes(&mut bytes[from..]);
            }
        }
    }
    bytes
}

/// Opens an image as a user would.
pub fn open(path: &Path, writable: bool) -> Arc<Image> {
    try_open(path, writable).unwrap_or_else(|e| panic!("{}", e.chain()))
}

/// Opens an image as a user would.
pub fn try_open(path: &Path, writable: bool) -> formats::Result<Arc<Image>> {
    formats::open(&OpenOptions::new(path).format("qcow2").read_only(!writable))
}

/// Reads a range.
pub fn read(image: &dyn BlockDevice, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xEE; len];
    image.read(&mut [IoSliceMut::new(&mut bytes)], at).unwrap_or_else(|e| panic!("read {len} at {at}: {}", e.chain()));
    bytes
}

/// Writes a range.
pub fn write(image: &dyn BlockDevice, at: u64, bytes: &[u8]) {
    image.write(&[IoSlice::new(bytes)], at).unwrap_or_else(|e| panic!("write {} at {at}: {}", bytes.len(), e.chain()));
}

/// Panics with the place of the first difference.
pub fn assert_same(what: &str, got: &[u8], want: &[u8]) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    if let Some(at) = got.iter().zip(want).position(|(g, w)| g != w) {
        panic!("{what}: byte {at} is {:#04x} and should be {:#04x}", got[at], want[at]);
    }
}

/// All of an image, and random pieces of it, equal `want`.
pub fn assert_reads(what: &str, image: &Image, want: &[u8], seed: u64) {
    assert_eq!(image.size(), want.len() as u64, "{what}: size");
    assert_same(what, &read(image, 0, want.len()), want);
    let mut rng = StdRng::seed_from_u64(seed);
    for _ in 0..200 {
        let at = rng.random_range(0..want.len());
        let len = rng.random_range(0..200_000.min(want.len() - at) + 1);
        assert_same(what, &read(image, at as u64, len), &want[at..at + len]);
    }
}
