//! What the tests of VHD and VHDX images share: programs of others that make and read such images, and the plain file that is what the guest should see.

#![allow(dead_code)] // Each test binary uses a part.

pub mod operations;
pub mod readers;
pub mod vhd_writer;
pub mod vhdx_writer;
pub mod vmdk_writer;

use formats::{BlockDevice, Image, OpenOptions};
use rand::{Rng, RngCore, SeedableRng, rngs::StdRng};
use std::fs::File;
use std::io::IoSliceMut;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;

/// Runs a program in `dir` and returns its output; its failure is the test's.
pub fn run(dir: &Path, program: &str, args: &[&str]) -> String {
    let (ok, text) = try_run(dir, program, args);
    assert!(ok, "{program} {args:?}: {text}");
    text
}

/// Runs a program; whether it succeeded, and all its output.
pub fn try_run(dir: &Path, program: &str, args: &[&str]) -> (bool, String) {
    let out = Command::new(program)
        .args(args)
        .current_dir(dir)
        .output()
        .unwrap_or_else(|e| panic!("{program} is needed for this test and cannot be run: {e} (Debian: qemu-utils, python3-libvhdi)"));
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    (out.status.success(), text)
}

pub fn qemu_img(dir: &Path, args: &[&str]) -> String {
    run(dir, "qemu-img", args)
}

/// QEMU reads windows of an image (of `format`; the pieces, and a MiB on both sides) as what is in the plain file. Comparing all of a large disk would take
/// it minutes.
pub fn qemu_reads(dir: &Path, format: &str, image: &str, raw: &Raw, pieces: &[(u64, u64)]) {
    for (at, len) in pieces {
        let start = at.saturating_sub(MIB) / 512 * 512;
        let len = (at + len + MIB).min(raw.size) - start;
        let window = format!("driver=raw,offset={start},size={len}");
        let plain = format!("{window},file.driver=file,file.filename={}", raw.path.display());
        let image = format!("{window},file.driver={format},file.file.driver=file,file.file.filename={image}");
        qemu_img(dir, &["compare", "--image-opts", &plain, &image]);
    }
}

/// Runs `qemu-io` commands on an image.
pub fn qemu_io(dir: &Path, format: &str, image: &str, commands: &[&str]) -> String {
    let mut args = vec!["-f", format];
    commands.iter().for_each(|c| args.extend(["-c", c]));
    args.push(image);
    run(dir, "qemu-io", &args)
}

/// A sparse raw file: what a guest should see.
pub struct Raw {
    pub file: File,
    pub path: PathBuf,
    pub size: u64,
}

impl Raw {
    /// `size` bytes with random data at `(at, len)` of each of `data`, of which parts are text-like and parts zeros.
    pub fn new(path: PathBuf, size: u64, seed: u64, data: &[(u64, u64)]) -> Self {
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        file.set_len(size).unwrap();
        let mut rng = StdRng::seed_from_u64(seed);
        for (at, len) in data {
            let mut bytes = vec![0; usize::try_from(*len).unwrap()];
            for piece in bytes.chunks_mut(10_007) {
                match rng.random_range(0..4) {
                    0 => {}
                    1 => piece.fill(rng.random()),
                    _ => rng.fill_bytes(piece),
                }
            }
            bytes.truncate(usize::try_from(size.saturating_sub(*at)).unwrap());
            file.write_all_at(&bytes, *at).unwrap();
        }
        Self { file, path, size }
    }

    /// The whole of an existing file.
    pub fn existing(path: PathBuf) -> Self {
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let size = file.metadata().unwrap().len();
        Self { file, path, size }
    }

    pub fn read(&self, at: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        self.file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    /// Runs of data, as the file system knows them.
    pub fn data(&self) -> Vec<(u64, u64)> {
        use formats::store::{FileStore, Store};
        let store = FileStore::new(self.file.try_clone().unwrap(), &self.path).unwrap();
        let (mut at, mut runs) = (0, Vec::new());
        while at < self.size {
            match store.hole_or_data(at).unwrap() {
                Some((len, data)) => {
                    let len = len.min(self.size - at);
                    if data {
                        runs.push((at, len));
                    }
                    at += len;
                }
                None => return vec![(0, self.size)],
            }
        }
        runs
    }
}

pub fn try_open(path: &Path, writable: bool) -> formats::Result<Arc<Image>> {
    formats::open(&OpenOptions::new(path).read_only(!writable))
}

pub fn open(path: &Path, writable: bool) -> Arc<Image> {
    try_open(path, writable).unwrap_or_else(|e| panic!("{}", e.chain()))
}

pub fn read(image: &Image, at: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0xA5; usize::try_from(len).unwrap()];
    image.read(&mut [IoSliceMut::new(&mut bytes)], at).unwrap_or_else(|e| panic!("read {len} at {at}: {}", e.chain()));
    bytes
}

/// Compares everything that is data in the file and much of what is not: in order, at random, unaligned, scattered over buffers, by four threads at once.
pub fn assert_reads(name: &str, image: &Image, raw: &Raw) {
    assert_eq!(image.size(), raw.size, "{name}: size");
    let runs = raw.data();
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    let whole = if raw.size <= 256 * MIB { vec![(0, raw.size)] } else { runs.clone() };
    for (at, len) in whole {
        let (mut here, end) = (at.saturating_sub(70_001), (at + len + 70_001).min(raw.size));
        while here < end {
            let step = (end - here).min(3 * MIB + 511);
            ranges.push((here, step));
            here += step;
        }
    }
    let mut rng = StdRng::seed_from_u64(raw.size);
    for _ in 0..400 {
        let len = *[1, 511, 512, 4096, 5000, 65_536, 300_000].get(rng.random_range(0..7)).unwrap();
        let near = match runs.get(rng.random_range(0..runs.len().max(1))) {
            Some((at, run)) if rng.random_bool(0.8) => at + rng.random_range(0..*run),
            _ => rng.random_range(0..raw.size),
        };
        let at = near.saturating_sub(rng.random_range(0..5000)).min(raw.size - 1);
        ranges.push((at, len.min(raw.size - at)));
    }
    std::thread::scope(|scope| {
        for part in ranges.chunks(ranges.len().div_ceil(4).max(1)) {
            scope.spawn(move || {
                for (at, len) in part {
                    let want = raw.read(*at, *len);
                    let mut got = vec![0xA5; want.len()];
                    let (a, b) = got.split_at_mut(want.len() / 3);
                    image
                        .read(&mut [IoSliceMut::new(a), IoSliceMut::new(b)], *at)
                        .unwrap_or_else(|e| panic!("{name}: read {len} at {at}: {}", e.chain()));
                    if let Some(index) = got.iter().zip(&want).position(|(g, w)| g != w) {
                        panic!("{name}: byte {} differs: {:#x}, should be {:#x}", at + index as u64, got[index], want[index]);
                    }
                }
            });
        }
    });
}
