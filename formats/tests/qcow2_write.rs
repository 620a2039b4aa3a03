//! Random changes to images that `qemu-img` made, against plain bytes; afterwards QEMU's own check and compare.
//!
//! `QCOW2_ROUNDS` multiplies the number of operations (1 by default).

mod qcow2_images;

use formats::{BlockDevice, Image, ZeroMode};
use qcow2_images::{assert_same, content, open, qemu_img, read, write};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;

fn rounds() -> usize {
    std::env::var("QCOW2_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(1)
}

/// An image under test, and what it should hold.
struct Bench {
    dir: TempDir,
    path: PathBuf,
    image: Option<Arc<Image>>,
    want: Vec<u8>,
    cluster: usize,
    rng: StdRng,
    what: String,
}

impl Bench {
    /// `NAME.qcow2`, made by `make` in a fresh directory that has `raw`, `size` bytes of content.
    fn new(what: &str, size: usize, cluster: usize, seed: u64, make: impl FnOnce(&Path)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let want = content(size, seed);
        std::fs::write(dir.path().join("raw"), &want).unwrap();
        make(dir.path());
        let path = dir.path().join("image.qcow2");
        let image = Some(open(&path, true));
        Self { dir, path, image, want, cluster, rng: StdRng::seed_from_u64(seed), what: format!("{what} (seed {seed})") }
    }

    /// A qcow2 image with `options`, converted from raw.
    fn converted(options: &str, flags: &[&str], size: usize, cluster: usize, seed: u64) -> Self {
        Self::new(&format!("{options} {flags:?}"), size, cluster, seed, |dir| {
            let mut args = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", options];
            args.extend(flags);
            args.extend(["raw", "image.qcow2"]);
            qemu_img(dir, &args);
        })
    }

    fn image(&self) -> &Image {
        self.image.as_ref().unwrap()
    }

    fn range(&mut self) -> (usize, usize) {
        let size = self.want.len();
        let most = match self.rng.random_range(0..10) {
            0..4 => 4096,
            4..7 => self.cluster * 2,
            7..9 => self.cluster * 9,
            _ => 1 << 20,
        };
        let mut at = self.rng.random_range(0..size);
        let mut len = self.rng.random_range(1..=most);
        match self.rng.random_range(0..3) {
            0 => {}
            1 => (at, len) = (at / 512 * 512, len.next_multiple_of(512)),
            _ => (at, len) = (at / self.cluster * self.cluster, len.next_multiple_of(self.cluster)),
        }
        (at, len.min(size - at))
    }

    fn step(&mut self) {
        let (at, len) = self.range();
        match self.rng.random_range(0..100) {
            0..45 => {
                let mut bytes = vec![self.rng.random::<u8>(); len];
                if self.rng.random() {
                    self.rng.fill_bytes(&mut bytes);
                }
                write(self.image(), at as u64, &bytes);
                self.want[at..at + len].copy_from_slice(&bytes);
            }
            45..65 => assert_same(&self.what, &read(self.image(), at as u64, len), &self.want[at..at + len]),
            65..80 => {
                let mode = if self.rng.random() { ZeroMode::MayUnmap } else { ZeroMode::KeepAllocated };
                self.image().zero(at as u64, len as u64, mode).unwrap_or_else(|e| panic!("zero: {}", e.chain()));
                self.want[at..at + len].fill(0);
            }
            80..93 => self.discard(at, len),
            93..97 => self.image().flush().unwrap_or_else(|e| panic!("flush: {}", e.chain())),
            _ => self.reopen(),
        }
    }

    /// Every whole cluster inside becomes zeros or stays; nothing else changes.
    fn discard(&mut self, at: usize, len: usize) {
        self.image().discard(at as u64, len as u64).unwrap_or_else(|e| panic!("discard: {}", e.chain()));
        let size = self.want.len();
        let got = read(self.image(), at as u64, len);
        let (mut here, end) = (at.next_multiple_of(self.cluster), at + len);
        while here + self.cluster <= end || (here < end && end == size) {
            let upto = (here + self.cluster).min(size);
            if got[here - at..upto - at].iter().all(|b| *b == 0) {
                self.want[here..upto].fill(0);
            }
            here = upto;
        }
        assert_same(&self.what, &got, &self.want[at..end]);
    }

    fn reopen(&mut self) {
        drop(self.image.take());
        self.image = Some(open(&self.path, true));
    }

    fn run(&mut self, steps: usize) -> &mut Self {
        for _ in 0..steps * rounds() {
            self.step();
        }
        self
    }

    /// Closes the image, has QEMU look at it, and compares.
    fn finish(&mut self) {
        assert_same(&self.what, &read(self.image(), 0, self.want.len()), &self.want);
        drop(self.image.take());
        let check = qcow2_images::try_run(self.dir.path(), "qemu-img", &["check", "-f", "qcow2", "image.qcow2"]);
        assert!(
            check.status.success(),
            "{}: {}{}",
            self.what,
            String::from_utf8_lossy(&check.stdout),
            String::from_utf8_lossy(&check.stderr)
        );
        std::fs::write(self.dir.path().join("want"), &self.want).unwrap();
        qemu_img(self.dir.path(), &["compare", "-f", "qcow2", "-F", "raw", "image.qcow2", "want"]);
        self.image = Some(open(&self.path, false));
        assert_same(&self.what, &read(self.image(), 0, self.want.len()), &self.want);
    }
}

#[test]
fn every_cluster_size() {
    for bits in 9..=21 {
        let cluster = 1 << bits;
        let size = (cluster * 40).clamp(1 << 20, 20 << 20);
        Bench::converted(&format!("cluster_size={cluster}"), &[], size, cluster, bits).run(250).finish();
    }
}

#[test]
fn every_refcount_width() {
    for bits in [1, 2, 4, 8, 16, 32, 64] {
        for cluster in [1024, 65536] {
            Bench::converted(&format!("refcount_bits={bits},cluster_size={cluster}"), &[], 5 << 20, cluster, bits).run(300).finish();
        }
    }
}

#[test]
fn version_2_and_lazy_refcounts() {
    Bench::converted("compat=0.10", &[], 5 << 20, 65536, 1).run(400).finish();
    Bench::converted("compat=0.10,cluster_size=4k", &[], 5 << 20, 4096, 2).run(400).finish();
    Bench::converted("lazy_refcounts=on,cluster_size=4k", &[], 5 << 20, 4096, 3).run(400).finish();
    Bench::converted("preallocation=metadata", &[], 5 << 20, 65536, 4).run(400).finish();
}

#[test]
fn compressed() {
    for (seed, kind) in [(1, "zlib"), (2, "zstd")] {
        for cluster in [512, 4096, 65536, 1 << 20] {
            let size = (cluster * 40).clamp(1 << 20, 20 << 20);
            Bench::converted(&format!("compression_type={kind},cluster_size={cluster}"), &["-c"], size, cluster, seed).run(200).finish();
        }
    }
    Bench::converted("compat=0.10", &["-c"], 4 << 20, 65536, 3).run(300).finish();
}

/// Over a raw and a qcow2 backing file, longer and shorter than the image.
#[test]
fn backing_files() {
    let mut seed = 0;
    for compat in ["0.10", "1.1"] {
        for (cluster, backing) in [(65536, "raw"), (4096, "qcow2"), (512, "raw"), (65536, "short"), (16384, "long")] {
            seed += 1;
            let size = 5 << 20;
            let mut bench = Bench::new(&format!("{compat} {cluster} over {backing}"), size, cluster, seed, |dir| {
                let (format, name) = match backing {
                    "qcow2" => {
                        qemu_img(dir, &["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=128k", "raw", "base.qcow2"]);
                        ("qcow2", "base.qcow2")
                    }
                    "short" => {
                        let bytes = std::fs::read(dir.join("raw")).unwrap();
                        std::fs::write(dir.join("part"), &bytes[..size / 3 * 2 + 512]).unwrap();
                        ("raw", "part")
                    }
                    "long" => {
                        let mut bytes = std::fs::read(dir.join("raw")).unwrap();
                        bytes.resize(size * 2, 0x5A);
                        std::fs::write(dir.join("longer"), &bytes).unwrap();
                        ("raw", "longer")
                    }
                    _ => ("raw", "raw"),
                };
                let options = format!("compat={compat},cluster_size={cluster}");
                qemu_img(dir, &["create", "-q", "-f", "qcow2", "-o", &options, "-b", name, "-F", format, "image.qcow2", &size.to_string()]);
            });
            if backing == "short" {
                bench.want[size / 3 * 2 + 512..].fill(0);
            }
            let below = std::fs::read(bench.dir.path().join("raw")).unwrap();
            bench.run(300).finish();
            assert!(std::fs::read(bench.dir.path().join("raw")).unwrap() == below, "the backing file was changed");
        }
    }
}

/// Internal snapshots keep their contents, whatever is done to the active state.
#[test]
fn snapshots_stay() {
    for (seed, options, flags, cluster) in [
        (1, "cluster_size=64k", &[][..], 65536),
        (2, "cluster_size=4k,refcount_bits=2", &[], 4096),
        (3, "cluster_size=512,refcount_bits=8", &[], 512),
        (4, "compat=0.10", &["-c"], 65536),
        (5, "cluster_size=2M,refcount_bits=64", &[], 2 << 20),
    ] {
        let size = if cluster > 65536 { 12 << 20 } else { 3 << 20 };
        let mut bench = Bench::converted(options, flags, size, cluster, seed);
        let mut kept: Vec<(String, Vec<u8>)> = Vec::new();
        for name in ["one", "two"] {
            bench.run(120);
            drop(bench.image.take());
            qemu_img(bench.dir.path(), &["snapshot", "-c", name, "image.qcow2"]);
            kept.push((name.to_owned(), bench.want.clone()));
            bench.reopen();
        }
        bench.run(200).finish();
        for (name, want) in &kept {
            let from = format!("snapshot.name={name}");
            qemu_img(bench.dir.path(), &["convert", "-f", "qcow2", "-O", "raw", "-l", &from, "image.qcow2", "kept"]);
            assert_same(&format!("{} snapshot {name}", bench.what), &std::fs::read(bench.dir.path().join("kept")).unwrap(), want);
        }
        // Deleted, they leave nothing behind.
        drop(bench.image.take());
        qemu_img(bench.dir.path(), &["snapshot", "-d", "one", "image.qcow2"]);
        bench.reopen();
        bench.run(100).finish();
    }
}

/// Guests write what is not a multiple of anything, and the file grows by what is needed.
#[test]
fn a_sparse_disk_stays_sparse() {
    let dir = tempfile::tempdir().unwrap();
    qemu_img(dir.path(), &["create", "-q", "-f", "qcow2", "image.qcow2", "8T"]);
    let path = dir.path().join("image.qcow2");
    let image = open(&path, true);
    let mut rng = StdRng::seed_from_u64(1);
    let places: Vec<u64> = (0..200).map(|_| rng.random_range(0..(8 << 40) - 4096)).collect();
    for at in &places {
        write(&*image, *at, &at.to_le_bytes());
    }
    image.zero(1 << 40, 6 << 40, ZeroMode::MayUnmap).unwrap();
    image.discard(0, 8 << 39).unwrap();
    for at in &places {
        let gone = *at < 7 << 40;
        assert_eq!(read(&*image, *at, 8), if gone { [0; 8].to_vec() } else { at.to_le_bytes().to_vec() }, "{at}");
    }
    drop(image);
    qemu_img(dir.path(), &["check", "-f", "qcow2", "image.qcow2"]);
    let used = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&path).unwrap()) * 512;
    assert!(used < 40 << 20, "{used} bytes are in use");
}

/// Space that was given back is used again, and goes back to the host.
#[test]
fn freed_clusters_are_used_again() {
    let dir = tempfile::tempdir().unwrap();
    qemu_img(dir.path(), &["create", "-q", "-f", "qcow2", "image.qcow2", "64M"]);
    let path = dir.path().join("image.qcow2");
    let image = open(&path, true);
    for round in 0..10u8 {
        write(&*image, 0, &vec![round + 1; 16 << 20]);
        image.flush().unwrap();
        image.discard(0, 16 << 20).unwrap();
        image.flush().unwrap();
    }
    image.flush().unwrap();
    let meta = std::fs::metadata(&path).unwrap();
    assert!(meta.len() < 20 << 20, "{} bytes long", meta.len());
    let used = std::os::unix::fs::MetadataExt::blocks(&meta) * 512;
    assert!(used < 2 << 20, "{used} bytes are in use");
    drop(image);
    qemu_img(dir.path(), &["check", "-f", "qcow2", "image.qcow2"]);
}

/// Growth shows zeros, also where the backing file or an old last cluster has other bytes.
#[test]
fn growing() {
    for (cluster, from, to) in
        [(512, 70 << 10, 9 << 20), (512, 100_000 / 512 * 512, 40 << 20), (65536, 1_000_448, 3 << 20), (4096, 3 << 20, 70 << 20)]
    {
        for backed in [false, true] {
            let what = format!("{cluster} {from} {to} {backed}");
            let mut bench = Bench::new(&what, from, cluster, 9, |dir| {
                let size = from.to_string();
                let options = format!("cluster_size={cluster}");
                let mut args = vec!["create", "-q", "-f", "qcow2", "-o", &options];
                if backed {
                    let mut bytes = std::fs::read(dir.join("raw")).unwrap();
                    bytes.resize(from * 2, 0xA5);
                    std::fs::write(dir.join("base"), bytes).unwrap();
                    args.extend(["-b", "base", "-F", "raw"]);
                }
                args.extend(["image.qcow2", &size]);
                qemu_img(dir, &args);
            });
            if !backed {
                bench.want.fill(0);
                let bytes = content(from, 8);
                write(bench.image(), 0, &bytes);
                bench.want = bytes;
            }
            bench.run(30);
            bench.image().grow(to as u64).unwrap_or_else(|e| panic!("{what}: {}", e.chain()));
            bench.want.resize(to, 0);
            assert_eq!(bench.image().limits().size, to as u64);
            bench.run(30).finish();
            assert!(bench.image().grow(to as u64 * 2).is_err());
        }
    }
}

/// Bitmaps that a change makes stale are marked so, and nothing leaks.
#[test]
fn bitmaps_are_told() {
    let mut bench = Bench::new("bitmaps", 5 << 20, 65536, 1, |dir| {
        qemu_img(dir, &["convert", "-f", "raw", "-O", "qcow2", "raw", "image.qcow2"]);
        for name in ["first", "second"] {
            qemu_img(dir, &["bitmap", "--add", "image.qcow2", name]);
        }
    });
    let flags = |bench: &Bench| {
        let info = qemu_img(bench.dir.path(), &["info", "-U", "--output=json", "image.qcow2"]);
        let info: serde_json::Value = serde_json::from_slice(&info.stdout).unwrap();
        let theirs = info["format-specific"]["data"]["bitmaps"].as_array().unwrap().clone();
        let ours = bench.image().format().describe()["bitmaps"].as_array().unwrap().clone();
        theirs
            .into_iter()
            .zip(ours)
            .map(|(t, o)| {
                assert_eq!((&t["name"], &t["granularity"]), (&o["name"], &o["granularity"]));
                assert_eq!(t["flags"].as_array().unwrap().len(), o["flags"].as_array().unwrap().len());
                t["flags"].as_array().unwrap().iter().any(|f| f == "in-use")
            })
            .collect::<Vec<_>>()
    };
    assert_eq!(flags(&bench), [false, false]);
    assert_same("", &read(bench.image(), 0, 4096), &bench.want[..4096]);
    assert_eq!(flags(&bench), [false, false], "a read changes nothing");
    write(bench.image(), 0, &bench.want[..512]);
    assert_eq!(flags(&bench), [true, true]);
    bench.run(100).finish();
    drop(bench.image.take());
    qemu_img(bench.dir.path(), &["bitmap", "--remove", "image.qcow2", "first"]);
}
