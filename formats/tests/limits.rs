//! Images that ask for too much: each is refused, or served within stated memory and time.

mod table;

use formats::{BlockDevice, Kind as ErrorKind, OpenOptions};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};
use table::{open, qemu, scratch};

/// One test at a time measures the process's memory.
static ONE: Mutex<()> = Mutex::new(());

fn peak_memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmPeak:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// Runs `work`, which must not take more than so much time and address space.
fn within(seconds: u64, memory: u64, work: impl FnOnce()) {
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    let (started, before) = (Instant::now(), peak_memory());
    work();
    let (took, used) = (started.elapsed(), peak_memory() - before);
    assert!(took < Duration::from_secs(seconds), "took {took:?}");
    assert!(used < memory, "took {used} bytes of memory");
}

fn create(dir: &Path, name: &str, arguments: &[&str]) -> std::path::PathBuf {
    let file = dir.join(name);
    let path = file.to_str().unwrap().to_string();
    let arguments: Vec<&str> = arguments.iter().map(|a| if *a == "FILE" { path.as_str() } else { a }).collect();
    qemu::must("qemu-img", &[&["create", "-q"], &arguments[..]].concat());
    file
}

fn patch(file: &Path, at: u64, bytes: &[u8]) {
    let file = File::options().write(true).open(file).unwrap();
    file.write_all_at(bytes, at).unwrap();
}

fn refused(file: &Path, format: &str, kinds: &[ErrorKind]) {
    let Err(error) = formats::open(&OpenOptions::new(file).format(format).read_only(true)) else { panic!("{} was opened", file.display()) };
    assert!(kinds.contains(&error.kind()), "{:?}: {}", error.kind(), error.chain());
}

#[test]
fn an_l1_table_of_2_to_the_32_entries() {
    let dir = scratch();
    let file = create(dir.path(), "image", &["-f", "qcow2", "FILE", "1M"]);
    // In a sparse file that is long enough for it.
    File::options().write(true).open(&file).unwrap().set_len(40 << 30).unwrap();
    patch(&file, 36, &u32::MAX.to_be_bytes());
    within(2, 64 << 20, || refused(&file, "qcow2", &[ErrorKind::Corrupt, ErrorKind::Unsupported, ErrorKind::InvalidFormat]));
}

#[test]
fn the_largest_l1_table_there_may_be() {
    let dir = scratch();
    let file = create(dir.path(), "image", &["-f", "qcow2", "-o", "cluster_size=64k", "FILE", "1M"]);
    File::options().write(true).open(&file).unwrap().set_len(1 << 30).unwrap();
    // 32 MiB of entries, all zero, far out in the file; a size of 2 EiB that needs them.
    patch(&file, 24, &(((4 << 20) as u64) << 29).to_be_bytes());
    patch(&file, 36, &(4u32 << 20).to_be_bytes());
    patch(&file, 40, &(512u64 << 20).to_be_bytes());
    within(5, 256 << 20, || {
        let image = formats::open(&OpenOptions::new(&file).format("qcow2").read_only(true)).unwrap_or_else(|e| panic!("{}", e.chain()));
        let size = image.limits().size;
        assert_eq!(open::read(&*image, size - 512, 512).unwrap(), [0; 512]);
    });
}

#[test]
fn snapshots_and_backing_names_without_end() {
    let dir = scratch();
    for (at, bytes) in
        [(60, u32::MAX.to_be_bytes()), (16, u32::MAX.to_be_bytes()), (20, 63u32.to_be_bytes()), (100, u32::MAX.to_be_bytes())]
    {
        let file = create(dir.path(), "image", &["-f", "qcow2", "FILE", "1M"]);
        File::options().write(true).open(&file).unwrap().set_len(40 << 30).unwrap();
        patch(&file, 8, &256u64.to_be_bytes());
        patch(&file, at, &bytes);
        within(2, 64 << 20, || refused(&file, "qcow2", &[ErrorKind::Corrupt, ErrorKind::Unsupported, ErrorKind::InvalidFormat]));
    }
}

#[test]
fn a_chain_of_ten_thousand_files() {
    let dir = scratch();
    let count = 10_000;
    let base = create(dir.path(), "0", &["-f", "raw", "FILE", "64k"]);
    assert!(base.is_file());
    let second = create(dir.path(), "overlay", &["-f", "qcow2", "-o", "cluster_size=512", "-b", "00000", "-F", "raw", "-u", "FILE", "64k"]);
    let template = fs::read(&second).unwrap();
    let name_at = template.windows(5).position(|w| w == b"00000").unwrap();
    let format_at = template.windows(8).position(|w| w == b"\xe2\x79\x2a\xca\0\0\0\x03").unwrap();
    fs::rename(dir.path().join("0"), dir.path().join("00000")).unwrap();
    for index in 1..=count {
        let mut bytes = template.clone();
        bytes[name_at..name_at + 5].copy_from_slice(format!("{:05}", index - 1).as_bytes());
        if index > 1 {
            bytes[format_at + 7] = 5;
            bytes[format_at + 8..format_at + 13].copy_from_slice(b"qcow2");
        }
        fs::write(dir.path().join(format!("{index:05}")), bytes).unwrap();
    }
    within(5, 512 << 20, || refused(&dir.path().join(format!("{count:05}")), "qcow2", &[ErrorKind::Denied]));
    // A long one that is allowed is served.
    within(10, 1 << 30, || {
        let image = formats::open(&OpenOptions::new(dir.path().join("00199")).format("qcow2").read_only(true))
            .unwrap_or_else(|e| panic!("{}", e.chain()));
        assert!(open::read_all(&*image).unwrap().iter().all(|b| *b == 0));
    });
}

#[test]
fn chains_that_go_in_a_circle() {
    let dir = scratch();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    for (file, other) in [(&a, "b"), (&b, "a")] {
        let create = ["create", "-q", "-f", "qcow2", "-u", "-b", other, "-F", "qcow2", file.to_str().unwrap(), "1M"];
        qemu::must("qemu-img", &create);
    }
    within(2, 64 << 20, || refused(&a, "qcow2", &[ErrorKind::Denied]));
    let own = dir.path().join("own");
    qemu::must("qemu-img", &["create", "-q", "-f", "qcow2", "-u", "-b", "own", "-F", "qcow2", own.to_str().unwrap(), "1M"]);
    within(2, 64 << 20, || refused(&own, "qcow2", &[ErrorKind::Denied]));
    // By another name: a link.
    std::os::unix::fs::symlink("own", dir.path().join("link")).unwrap();
    within(2, 64 << 20, || refused(&dir.path().join("link"), "qcow2", &[ErrorKind::Denied]));
}

#[test]
fn the_longest_file_there_is() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("image");
    // As long as this file system allows.
    let handle = File::create(&file).unwrap();
    let len = (30..63).rev().map(|bits| 1u64 << bits).find(|len| handle.set_len(*len).is_ok()).unwrap();
    within(5, 64 << 20, || {
        let image = formats::open(&OpenOptions::new(&file).format("raw")).unwrap();
        assert_eq!(image.limits().size, len);
        assert_eq!(open::read(&*image, len - 512, 512).unwrap(), [0; 512]);
        open::write(&*image, len - 512, &[7; 512]).unwrap();
        // As much as one command of a guest can ask for.
        let much = len.min(2 << 40);
        image.discard(len - much, much).unwrap();
        image.zero(len - much, much, formats::ZeroMode::MayUnmap).unwrap();
        assert_eq!(open::read(&*image, len - 512, 512).unwrap(), [0; 512]);
        assert!(image.read(&mut [std::io::IoSliceMut::new(&mut [0; 512])], len).is_err());
    });
}

#[test]
fn a_descriptor_of_a_gigabyte() {
    let dir = scratch();
    let file = dir.path().join("image.vmdk");
    fs::write(&file, b"# Disk DescriptorFile\nversion=1\n").unwrap();
    File::options().write(true).open(&file).unwrap().set_len(1 << 30).unwrap();
    within(2, 64 << 20, || {
        assert!(formats::open(&OpenOptions::new(&file).read_only(true)).is_err());
    });
}
