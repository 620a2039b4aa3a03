//! Damaged, cut, hostile and unsupported streams: an error where it belongs, clear, and never a panic, a hang, or memory out of proportion.

mod streams;

use formats::compressed::{self, Options};
use formats::store::{MemoryStore, Store};
use formats::{Cache, Kind};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::sync::Arc;
use std::time::{Duration, Instant};
use streams::{Workshop, read};

/// A stream of every kind, of 700 kB, with independent units where the codec has them.
const KINDS: &[(&str, &str)] = &[
    ("gzip", "gzip -6c disk > out"),
    ("gzip members", "split -b 100000 disk part.; for p in part.*; do gzip -c $p >> out; done"),
    ("bgzf", "bgzip -c disk > out"),
    ("xz", "xz -0 -T2 --block-size=100KiB -c disk > out"),
    ("xz single", "xz -0c disk > out"),
    ("zstd", "split -b 100000 disk part.; for p in part.*; do zstd -qc $p >> out; done"),
    ("zstd unsized", "split -b 100000 disk part.; for p in part.*; do zstd -qc < $p >> out; done"),
    ("bzip2", "bzip2 -1c disk > out"),
    ("lz4", "lz4 -q -B4 -BX -c disk > out"),
    ("lz4 linked", "lz4 -q -B4 -BD -c disk > out"),
    ("lzip", "split -b 100000 disk part.; for p in part.*; do lzip.lzip -0c $p >> out; done"),
];

fn made(command: &str) -> (Workshop, Vec<u8>) {
    let workshop = Workshop::new(700_000);
    workshop.run(command);
    let coded = std::fs::read(workshop.path("out")).unwrap();
    (workshop, coded)
}

fn options() -> Options {
    Options { keep_index: false, scratch_limit: Some(64 << 20), memory_limit: 64 << 20, progress: None, ..Options::default() }
}

fn open(coded: &[u8]) -> formats::Result<Option<Arc<dyn Store>>> {
    compressed::open(Arc::new(MemoryStore::new(coded.to_vec())), &options(), &Arc::new(Cache::new(4 << 20)))
}

/// Every byte is right, or its read fails: where the codec has checksums, no change of the stream gives wrong bytes.
fn mutate(kind: &str, command: &str, has_checksums: bool) {
    let (workshop, coded) = made(command);
    let mut rng = StdRng::seed_from_u64(42);
    let (mut refused, mut failed, mut wrong) = (0, 0, 0);
    for _ in 0..mutants() {
        let mut mutant = coded.clone();
        for _ in 0..rng.random_range(1..4) {
            let at = match rng.random_range(0..4) {
                0 => rng.random_range(0..64.min(mutant.len())),
                1 => mutant.len() - 1 - rng.random_range(0..64.min(mutant.len())),
                _ => rng.random_range(0..mutant.len()),
            };
            match rng.random_range(0..5) {
                0 => mutant.truncate(at.max(1)),
                1 => mutant[at] = 0,
                2 => mutant[at] = 0xff,
                3 => mutant.insert(at, rng.random()),
                _ => mutant[at] ^= 1 << rng.random_range(0..8),
            }
        }
        let started = Instant::now();
        match open(&mutant) {
            Err(_) | Ok(None) => refused += 1,
            Ok(Some(stream)) => {
                let len = stream.len().unwrap();
                // Sizes that a damaged stream claims are not to be read through to the end.
                let mut buf = vec![0; 1 << 16];
                let mut at = 0;
                while at < len.min(2 << 20) {
                    match stream.read_at(&mut [std::io::IoSliceMut::new(&mut buf)], at) {
                        Ok(got) => {
                            let end = (at as usize + got).min(workshop.data.len());
                            if workshop.data.get(at as usize..end) != buf.get(..end.saturating_sub(at as usize)) {
                                wrong += 1;
                            }
                        }
                        Err(_) => failed += 1,
                    }
                    at += buf.len() as u64;
                }
            }
        }
        assert!(started.elapsed() < Duration::from_secs(20), "{kind}: a mutant took {:?}", started.elapsed());
    }
    assert!(refused + failed > 0, "{kind}: no mutant was noticed at all");
    if has_checksums {
        assert_eq!(wrong, 0, "{kind}: wrong bytes without an error");
    }
    println!("{kind}: {refused} refused, {failed} reads failed, {wrong} reads with other bytes");
}

/// 1,000 of each kind when asked for all (`IMG_TCMU_LONG=1`).
fn mutants() -> usize {
    if std::env::var_os("IMG_TCMU_LONG").is_some() { 1000 } else { 150 }
}

macro_rules! mutants {
    ($($name:ident: $n:literal, $checksums:literal;)*) => {
        $(
            #[test]
            fn $name() {
                let (kind, command) = KINDS[$n];
                mutate(kind, command, $checksums);
            }
        )*
    };
}

// Where whole members, frames or blocks can be cut away or changed in number without a trace, other bytes come up at other places: only that nothing breaks is tested then.
mutants! {
    mutants_of_gzip: 0, true;
    mutants_of_gzip_members: 1, false;
    mutants_of_bgzf: 2, false;
    mutants_of_xz: 3, true;
    mutants_of_single_block_xz: 4, true;
    mutants_of_zstd: 5, false;
    mutants_of_unsized_zstd: 6, false;
    mutants_of_bzip2: 7, true;
    mutants_of_lz4: 8, false;
    mutants_of_linked_lz4: 9, false;
    mutants_of_lzip: 10, false;
}

#[test]
fn cut_streams_are_refused_or_end_where_a_part_ends() {
    for (kind, command) in KINDS {
        let (_workshop, coded) = made(command);
        for keep in [coded.len() - 1, coded.len() - 5, coded.len() / 2, coded.len() / 3, 20] {
            match open(&coded[..keep]) {
                Err(error) => {
                    assert!(matches!(error.kind(), Kind::Corrupt | Kind::InvalidFormat), "{kind} cut to {keep}: {}", error.chain());
                    assert!(
                        error.chain().contains("cut short") || error.chain().contains("damaged"),
                        "{kind} cut to {keep}: {}",
                        error.chain()
                    );
                }
                Ok(None) => panic!("{kind} cut to {keep}: not recognised"),
                Ok(Some(_)) => panic!("{kind} cut to {keep}: opened"),
            }
        }
    }
}

/// Changes a byte in the middle of the stream; only the unit that holds it may fail.
#[test]
fn damage_stays_in_its_unit() {
    for (kind, command) in KINDS {
        if ["gzip", "xz single", "lz4 linked", "zstd unsized", "bzip2"].contains(kind) {
            // One unit, or damage that is seen when the index is made.
            continue;
        }
        let (workshop, mut coded) = made(command);
        let middle = coded.len() / 2;
        coded[middle] ^= 0x55;
        coded[middle + 1] ^= 0xaa;
        let stream = open(&coded).unwrap_or_else(|error| panic!("{kind}: {}", error.chain())).unwrap();
        let mut buf = vec![0; 4096];
        let (mut bad, mut good) = (Vec::new(), 0);
        for at in (0..stream.len().unwrap()).step_by(4096) {
            match stream.read_at(&mut [std::io::IoSliceMut::new(&mut buf)], at) {
                Ok(got) => {
                    assert!(buf[..got] == workshop.data[at as usize..at as usize + got], "{kind}: wrong bytes at {at}");
                    good += 1;
                }
                Err(error) => bad.push((at, error)),
            }
        }
        assert!(good > 100, "{kind}: only {good} good reads");
        let (first, error) = bad.first().unwrap_or_else(|| panic!("{kind}: damage was not noticed"));
        assert!(bad.last().unwrap().0 - first <= 100_000 + 4096, "{kind}: damage spread");
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidData, "{kind}: {error}");
        assert!(error.to_string().contains("damaged"), "{kind}: {error}");
    }
}

#[test]
fn corrupt_bzip2_and_gzip_are_refused_when_indexed() {
    for command in [KINDS[0].1, KINDS[7].1] {
        let (_workshop, mut coded) = made(command);
        let middle = coded.len() / 2;
        coded[middle] ^= 0x55;
        let error = open(&coded).map(drop).unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt);
        assert!(error.chain().contains("damaged"), "{}", error.chain());
    }
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let workshop = Workshop::new(100_000);
    workshop.run("lz4 -q -l -c disk > legacy; zstd -q --train disk /dev/null 2>/dev/null || true");
    let error = workshop.open("legacy").map(drop).unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(error.to_string().contains("lz4 -BI"), "{error}");
    assert!(workshop.open("disk").unwrap().is_none(), "not a stream");
    for junk in [&b""[..], b"\x1f\x8b", b"\x1f\x8b\x08\xff0000000", b"BZh", b"\xfd7zXZ", b"\x50\x2a\x4d\x18\x04\0\0\0aaaa"] {
        assert!(open(junk).unwrap().is_none(), "{junk:x?}");
    }
}

#[test]
fn a_dictionary_larger_than_the_memory_limit_is_refused_with_advice() {
    let workshop = Workshop::new(1_000_000);
    workshop.run("xz --lzma2=preset=0,dict=512MiB -c disk > out.xz; zstd -q --long=30 -c < disk > out.zst");
    let stream = workshop.open("out.xz").unwrap().unwrap();
    let error = stream.read_at(&mut [std::io::IoSliceMut::new(&mut [0; 10])], 0).unwrap_err();
    assert!(error.to_string().contains("256 MiB of memory"), "{error}");
    let larger = Options { memory_limit: 600 << 20, ..workshop.options() };
    let stream = workshop.open_with("out.xz", &larger).unwrap().unwrap();
    streams::check_reads(&*stream, &workshop.data);
    let error = workshop.open("out.zst").map(drop).unwrap_err();
    assert!(error.chain().contains("memory"), "{}", error.chain());
}

/// Much in little: the memory that is needed does not follow what comes out.
#[test]
fn bombs_stay_small() {
    let workshop = Workshop::new(1000);
    workshop.run("head -c 100M /dev/zero | gzip -1c > gz; truncate -s 2G big; zstd -q -c big > zst; rm big; head -c 100M /dev/zero | xz -0c --block-size=16MiB > xz");
    let before = peak_kib();
    for name in ["gz", "xz"] {
        let stream = workshop.open(name).unwrap_or_else(|error| panic!("{name}: {}", error.chain())).unwrap();
        assert_eq!(stream.len().unwrap(), 100 << 20, "{name}");
        let mut buf = vec![1; 4096];
        assert_eq!(read(&*stream, &mut buf, (100 << 20) - 5000), 4096);
        assert!(buf.iter().all(|byte| *byte == 0));
    }
    let small = Options { scratch_limit: Some(1 << 30), ..workshop.options() };
    let error = workshop.open_with("zst", &small).map(drop).unwrap_err();
    assert_eq!(error.kind(), Kind::NoSpace);
    assert!(error.chain().contains("pzstd"), "says how to compress instead: {}", error.chain());
    let grown = peak_kib() - before;
    assert!(grown < 80 << 10, "memory grew by {grown} KiB");
}

/// The most memory that the process had, in KiB.
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
