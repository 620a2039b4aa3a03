//! Reads through the engine, by format and by kind of stream: 4 KiB at random places and 1 MiB in sequence, beside what QEMU and nbdkit do with the same files.
//!
//! `make bench-formats` prints a table. *Cold*: just opened, with an empty cache of decoded units; a stream's index is kept, as it is in use. *Warm*: all units are
//! in a cache of 256 MiB. Files are in the page cache in both. The peers run as processes, measured by `qemu-img bench` itself: their start does not count, and
//! the first request does. Every figure is the median of the rounds; a round measures everything once, so that what else the machine does meets all alike.
//!
//! Environment: BENCH_ROUNDS (3), BENCH_MIB (64: the disk's size), BENCH_PEERS (1; 0 leaves them out).

use formats::overlay::Overlay;
use formats::{BlockDevice, Cache, Image, OpenOptions};
use std::collections::BTreeMap;
use std::io::IoSliceMut;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long one measurement may take.
const SLICE: Duration = Duration::from_millis(600);
const MIB: u64 = 1 << 20;

/// A file and who else can read it.
struct Kind {
    name: &'static str,
    /// Makes the file `name` out of `disk`.
    recipe: &'static str,
    peer: Peer,
}

#[derive(Clone, Copy)]
enum Peer {
    Nobody,
    /// QEMU's driver.
    Qemu(&'static str),
    /// nbdkit's filter.
    Nbdkit(&'static str),
}

const KINDS: &[Kind] = &[
    Kind { name: "raw", recipe: "cp disk raw", peer: Peer::Qemu("raw") },
    Kind { name: "qcow2", recipe: "qemu-img convert -O qcow2 disk qcow2", peer: Peer::Qemu("qcow2") },
    Kind { name: "qcow2-zlib", recipe: "qemu-img convert -O qcow2 -c disk qcow2-zlib", peer: Peer::Qemu("qcow2") },
    Kind { name: "qcow2-zstd", recipe: "qemu-img convert -O qcow2 -c -o compression_type=zstd disk qcow2-zstd", peer: Peer::Qemu("qcow2") },
    Kind { name: "qcow2-on-qcow2", recipe: "qemu-img create -q -f qcow2 -b qcow2 -F qcow2 qcow2-on-qcow2", peer: Peer::Qemu("qcow2") },
    Kind { name: "vhdx", recipe: "qemu-img convert -O vhdx disk vhdx", peer: Peer::Qemu("vhdx") },
    Kind { name: "vhdx-fixed", recipe: "qemu-img convert -O vhdx -o subformat=fixed disk vhdx-fixed", peer: Peer::Qemu("vhdx") },
    Kind { name: "vhd", recipe: "qemu-img convert -O vpc -o force_size=on disk vhd", peer: Peer::Qemu("vpc") },
    Kind { name: "vhd-fixed", recipe: "qemu-img convert -O vpc -o subformat=fixed,force_size=on disk vhd-fixed", peer: Peer::Qemu("vpc") },
    Kind { name: "gzip", recipe: "gzip -c disk >gzip", peer: Peer::Nbdkit("gzip") },
    Kind { name: "bgzip", recipe: "bgzip -c disk >bgzip", peer: Peer::Nobody },
    Kind { name: "xz-blocks", recipe: "xz -1 -T2 --block-size=1MiB -c disk >xz-blocks", peer: Peer::Nbdkit("xz") },
    Kind { name: "xz-one-block", recipe: "xz -1 -T1 -c disk >xz-one-block", peer: Peer::Nobody },
    Kind { name: "pzstd", recipe: "pzstd -q -p 2 -c disk >pzstd", peer: Peer::Nobody },
    Kind { name: "zstd-one-frame", recipe: "zstd -q -c disk >zstd-one-frame", peer: Peer::Nobody },
    Kind { name: "bzip2", recipe: "bzip2 -c disk >bzip2", peer: Peer::Nobody },
    Kind { name: "lz4-BI", recipe: "lz4 -q -BI -B6 -c disk >lz4-BI", peer: Peer::Nobody },
    Kind { name: "plzip", recipe: "plzip -1 -B 1MiB -c disk >plzip", peer: Peer::Nobody },
    Kind { name: "overlay-on-xz-blocks", recipe: "cp xz-blocks overlay-on-xz-blocks", peer: Peer::Nobody },
];

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

/// A third zeros, the rest text-like with some noise, in runs.
fn disk(len: u64) -> Vec<u8> {
    let mut state = 1_u64;
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    };
    let mut bytes = Vec::with_capacity(len as usize);
    while (bytes.len() as u64) < len {
        let end = bytes.len() + 4096 * (1 + next() as usize % 100);
        match next() % 6 {
            0 | 1 => bytes.resize(end, 0),
            2 => bytes.resize_with(end, || next() as u8),
            _ => {
                while bytes.len() < end {
                    bytes.extend_from_slice(format!("{:x} entry {} ", next() % 2000, next() % 1000).as_bytes());
                }
            }
        }
    }
    bytes.truncate(len as usize);
    bytes
}

fn sh(dir: &Path, command: &str) {
    let output = Command::new("bash").args(["-ec", command]).current_dir(dir).output().expect("bash");
    assert!(output.status.success(), "`{command}`: {}", String::from_utf8_lossy(&output.stderr));
}

fn open(dir: &Path, kind: &Kind, cache: usize) -> Arc<Image> {
    let mut options = OpenOptions::new(dir.join(kind.name)).read_only(true);
    match kind.peer {
        Peer::Qemu(format) => options.format = Some(format.into()),
        _ if kind.name.starts_with("overlay") => {
            options.read_only = false;
            options.overlay = Some(Overlay::ThrowAway { dir: Some(dir.to_path_buf()) });
        }
        _ => {}
    }
    options.cache = Some(Arc::new(Cache::new(cache)));
    formats::open(&options).unwrap_or_else(|e| panic!("{}: {}", kind.name, e.chain()))
}

/// Reads of 4 KiB a second at random places, for a [`SLICE`].
fn random(image: &Image) -> f64 {
    let blocks = image.limits().size / 4096;
    let mut buf = [0; 4096];
    let (started, mut count, mut at) = (Instant::now(), 0_u64, 12_345_u64);
    while started.elapsed() < SLICE {
        for _ in 0..8 {
            at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            image.read(&mut [IoSliceMut::new(&mut buf)], (at >> 33) % blocks * 4096).expect("read");
            count += 1;
        }
    }
    count as f64 / started.elapsed().as_secs_f64()
}

/// MiB a second of reads of 1 MiB, once over the disk.
fn sequential(image: &Image) -> f64 {
    let size = image.limits().size;
    let mut buf = vec![0; MIB as usize];
    let started = Instant::now();
    for at in (0..size).step_by(MIB as usize) {
        image.read(&mut [IoSliceMut::new(&mut buf)], at).expect("read");
    }
    (size / MIB) as f64 / started.elapsed().as_secs_f64()
}

/// Seconds that `qemu-img bench` says.
fn qemu_bench(dir: &Path, kind: &Kind, count: u64, arguments: &str) -> Option<f64> {
    let bench = format!("qemu-img bench -d 1 -c {count} {arguments}");
    let command = match kind.peer {
        Peer::Nobody => return None,
        Peer::Qemu(format) => format!("{bench} -f {format} {}", kind.name),
        Peer::Nbdkit(filter) => {
            let file = dir.join(kind.name);
            format!("nbdkit -r -U - --filter={filter} file {} --run '{bench} -f raw \"$uri\"'", file.display())
        }
    };
    let output = Command::new("bash").args(["-ec", &command]).current_dir(dir).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let seconds = text.split("Run completed in ").nth(1)?.split(' ').next()?.parse().ok();
    seconds.filter(|_| output.status.success())
}

fn main() {
    // `cargo test --benches` only wants to know that it builds.
    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    let (rounds, size, peers) = (setting("BENCH_ROUNDS", 3), setting("BENCH_MIB", 64) * MIB, setting("BENCH_PEERS", 1) != 0);
    let dir = tempfile::tempdir().expect("a directory");
    let path: PathBuf = dir.path().to_path_buf();
    std::fs::write(path.join("disk"), disk(size)).expect("write");
    for kind in KINDS {
        sh(&path, kind.recipe);
        // Indexes are made here.
        drop(open(&path, kind, 0));
    }
    let mut figures: BTreeMap<(usize, usize), Vec<f64>> = BTreeMap::new();
    for round in 0..rounds {
        for (row, kind) in KINDS.iter().enumerate() {
            let mut note = |column: usize, figure: Option<f64>| {
                if let Some(figure) = figure {
                    figures.entry((row, column)).or_default().push(figure);
                }
            };
            note(0, Some(random(&open(&path, kind, 16 << 20))));
            note(2, Some(sequential(&open(&path, kind, 16 << 20))));
            let warm = open(&path, kind, 256 << 20);
            sequential(&warm);
            note(1, Some(random(&warm)));
            note(3, Some(sequential(&warm)));
            drop(warm);
            if peers {
                let slow = matches!(kind.peer, Peer::Nbdkit(_)) || kind.name.starts_with("qcow2-z");
                let count = if slow { 300 } else { 20_000 };
                // Steps that are no power of two visit all of the disk in no useful order.
                note(4, qemu_bench(&path, kind, count, "-s 4096 -S 7348224").map(|s| count as f64 / s));
                let count = size / MIB;
                note(5, qemu_bench(&path, kind, count, "-s 1048576").map(|s| count as f64 / s));
            }
            eprintln!("round {} of {rounds}: {}", round + 1, kind.name);
        }
    }
    println!("| | 4 KiB/s cold | 4 KiB/s warm | peer | MiB/s cold | MiB/s warm | peer |");
    println!("|---|---|---|---|---|---|---|");
    for (row, kind) in KINDS.iter().enumerate() {
        let cell = |column: usize| {
            let mut all = figures.get(&(row, column)).cloned().unwrap_or_default();
            all.sort_by(f64::total_cmp);
            all.get(all.len() / 2).map_or_else(|| "–".to_owned(), |median| format!("{median:.0}"))
        };
        println!("| {} | {} | {} | {} | {} | {} | {} |", kind.name, cell(0), cell(1), cell(4), cell(2), cell(3), cell(5));
    }
}
