//! Compressed streams for tests: data that compress like a disk image, other people's tools that compress them, and reads in every way that a guest may read.
#![allow(dead_code, reason = "each test binary uses a part")]

use formats::Cache;
use formats::compressed::{self, Options};
use formats::store::{FileStore, Store};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use std::fs::File;
use std::io::IoSliceMut;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use tempfile::TempDir;

/// A directory with a source file, and what is made of it.
pub struct Workshop {
    pub dir: TempDir,
    pub data: Vec<u8>,
}

impl Workshop {
    /// `len` bytes: text, noise, zeros, in runs of up to 400 kB.
    pub fn new(len: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let data = image_like(len, 7);
        std::fs::write(dir.path().join("disk"), &data).unwrap();
        Self { dir, data }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs a shell command in the directory, where the source is the file `disk`.
    pub fn run(&self, command: &str) {
        let output = Command::new("bash").args(["-o", "pipefail", "-ec", command]).current_dir(self.dir.path()).output().unwrap();
        assert!(
            output.status.success(),
            "`{command}` failed; is its package installed (tests/packages.txt)?\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// Options that leave nothing outside the directory.
    pub fn options(&self) -> Options {
        let cache_dir = self.path("cache");
        std::fs::create_dir_all(&cache_dir).unwrap();
        Options { cache_dir: Some(cache_dir), progress: None, ..Options::default() }
    }

    pub fn open(&self, name: &str) -> formats::Result<Option<Arc<dyn Store>>> {
        self.open_with(name, &self.options())
    }

    pub fn open_with(&self, name: &str, options: &Options) -> formats::Result<Option<Arc<dyn Store>>> {
        compressed::open(file(&self.path(name)), options, &Arc::new(Cache::new(16 << 20)))
    }

    /// Opens `name` and reads it in every way.
    pub fn check(&self, name: &str) -> Arc<dyn Store> {
        let stream = self.open(name).unwrap_or_else(|error| panic!("{name}: {}", error.chain())).expect("recognised");
        check_reads(&*stream, &self.data);
        stream
    }
}

pub fn file(path: &Path) -> Arc<dyn Store> {
    Arc::new(FileStore::new(File::open(path).unwrap(), path).unwrap())
}

pub fn image_like(len: usize, seed: u64) -> Vec<u8> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut data = Vec::with_capacity(len);
    while data.len() < len {
        let run = rng.random_range(1..400_000).min(len - data.len());
        match rng.random_range(0..10) {
            0..3 => data.resize(data.len() + run, 0),
            3..5 => {
                let start = data.len();
                data.resize(start + run, 0);
                rng.fill_bytes(&mut data[start..]);
            }
            _ => {
                let end = data.len() + run;
                while data.len() < end {
                    let word = rng.random_range(0..2000_u32);
                    data.extend_from_slice(format!("{word:x} entry {} ", word * 7919 % 1000).as_bytes());
                }
                data.truncate(end);
            }
        }
    }
    data
}

/// Reads all of it, parts at random, scattered, and with four threads at once, and compares.
pub fn check_reads(stream: &dyn Store, data: &[u8]) {
    assert_eq!(stream.len().unwrap(), data.len() as u64);
    let mut buf = vec![0; (1 << 20) + 1];
    let mut at = 0;
    while at < data.len() {
        let got = read(stream, &mut buf, at as u64);
        assert!(got > 0 && buf[..got] == data[at..at + got], "wrong bytes in the whole read near {at}");
        at += got;
    }
    assert_eq!(read(stream, &mut buf, data.len() as u64), 0, "there is nothing behind the end");
    std::thread::scope(|scope| {
        for seed in 0..4 {
            scope.spawn(move || random_reads(stream, data, seed, 150));
        }
    });
}

pub fn random_reads(stream: &dyn Store, data: &[u8], seed: u64, count: usize) {
    let mut rng = StdRng::seed_from_u64(seed);
    for _ in 0..count {
        let at = rng.random_range(0..data.len());
        let want = match rng.random_range(0..10) {
            0 => rng.random_range(1..700_000),
            1..4 => rng.random_range(1..20_000),
            _ => 4096,
        };
        let at = if rng.random_bool(0.5) { at & !4095 } else { at };
        let (mut a, mut b, mut c) = (vec![0xAA; want / 3], vec![0xAA; want / 7], vec![0xAA; want - want / 3 - want / 7]);
        let got = stream.read_at(&mut [IoSliceMut::new(&mut a), IoSliceMut::new(&mut b), IoSliceMut::new(&mut c)], at as u64).unwrap();
        let all = [a, b, c].concat();
        let len = want.min(data.len() - at);
        assert_eq!(got, len);
        assert!(all[..len] == data[at..at + len], "wrong bytes at {at}, {want} long");
    }
}

pub fn read(stream: &dyn Store, buf: &mut [u8], at: u64) -> usize {
    stream.read_at(&mut [IoSliceMut::new(buf)], at).unwrap()
}
