//! Writing VHDX images: random operations against a plain file, then QEMU's word.

mod foreign;

use foreign::operations::{Places, concurrent_operations, random_operations};
use foreign::{GIB, MIB, Raw, assert_reads, open, qemu_img, qemu_reads, run};
use formats::{BlockDevice, ZeroMode};
use std::io::IoSlice;
use std::os::unix::fs::FileExt;
use std::path::Path;

const FAR: [(u64, u64); 6] = [
    (0, 3 * MIB),
    (4 * GIB - 2 * MIB, 4 * MIB),
    (8 * GIB - MIB, 3 * MIB),
    (8 * GIB + 300 * MIB, 2 * MIB),
    (12 * GIB - MIB, 2 * MIB),
    (13 * GIB - MIB, MIB),
];

fn qemu_finds_nothing(dir: &Path) {
    let text = qemu_img(dir, &["check", "image.vhdx"]);
    assert!(text.contains("No errors"), "{text}");
}

/// QEMU finds nothing wrong and reads what is in the plain file.
fn qemu_agrees(dir: &Path, raw: &Raw) {
    qemu_finds_nothing(dir);
    run(dir, "qemu-img", &["compare", "-f", "raw", "-F", "vhdx", raw.path.to_str().unwrap(), "image.vhdx"]);
}

/// Random operations on an image made with `options`, in several sessions, then with four threads.
fn operations(size: u64, options: &str, places: Places, count: usize) {
    let dir = tempfile::tempdir().unwrap();
    let data: Vec<_> = places.pieces.iter().map(|(at, len)| (at + len / 3, len / 4)).collect();
    let raw = Raw::new(dir.path().join("raw"), size, 11, &data);
    qemu_img(dir.path(), &["convert", "-f", "raw", "-O", "vhdx", "-o", options, "raw", "image.vhdx"]);
    let path = dir.path().join("image.vhdx");
    for session in 0..3 {
        let image = open(&path, true);
        random_operations(options, &image, &raw, &places, session, count);
        if session == 1 {
            concurrent_operations(options, &image, &raw, &places, session, count);
        }
        assert_reads(options, &image, &raw);
        image.close().unwrap();
        drop(image);
        qemu_finds_nothing(dir.path());
        qemu_reads(dir.path(), "vhdx", "image.vhdx", &raw, &places.pieces);
    }
    assert_reads(options, &open(&path, false), &raw);
    // What we left is what QEMU can go on with.
    let commands = ["write -P 0x5a 1M 70k", "write -z 3M 1M", "write -P 0x33 777k 5000"];
    foreign::qemu_io(dir.path(), "vhdx", "image.vhdx", &commands);
    raw.file.write_all_at(&[0x5A; 70 << 10], MIB).unwrap();
    raw.file.write_all_at(&vec![0; MIB as usize], 3 * MIB).unwrap();
    raw.file.write_all_at(&[0x33; 5000], 777 << 10).unwrap();
    assert_reads(options, &open(&path, true), &raw);
}

#[test]
fn small_blocks() {
    operations(41 * MIB + 1536, "block_size=1M", Places::whole(41 * MIB + 1536), 250);
}

#[test]
fn large_blocks() {
    operations(100 * MIB, "block_size=16M", Places::whole(100 * MIB), 150);
}

#[test]
fn largest_blocks() {
    operations(700 * MIB, "block_size=256M", Places::new(&[(0, 2 * MIB), (255 * MIB, 2 * MIB), (699 * MIB, MIB)]), 80);
}

#[test]
fn fixed() {
    operations(30 * MIB, "subformat=fixed", Places::whole(30 * MIB), 150);
}

#[test]
fn beyond_four_and_eight_gib() {
    operations(13 * GIB, "block_size=1M", Places::new(&FAR), 200);
}

#[test]
fn beyond_four_gib_in_blocks_of_32_mib() {
    operations(13 * GIB, "block_size=32M", Places::new(&FAR), 60);
}

/// One flush changes more sectors of the allocation table than an entry of the smallest log can hold.
#[test]
fn a_flush_larger_than_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let size = 200 * GIB;
    let raw = Raw::new(dir.path().join("raw"), size, 1, &[]);
    qemu_img(dir.path(), &["create", "-q", "-f", "vhdx", "-o", "block_size=1M,log_size=1M", "image.vhdx", &size.to_string()]);
    let image = open(&dir.path().join("image.vhdx"), true);
    for round in 0..2u8 {
        for index in 0..390u64 {
            let at = index * 512 * MIB + u64::from(round) * 3 * MIB + 5000;
            image.write(&[IoSlice::new(&[round + 1; 3000])], at).unwrap();
            raw.file.write_all_at(&[round + 1; 3000], at).unwrap();
        }
        image.flush().unwrap();
    }
    assert_reads("many", &image, &raw);
    image.close().unwrap();
    drop(image);
    qemu_finds_nothing(dir.path());
    let pieces: Vec<_> = (0..390u64).step_by(7).map(|i| (i * 512 * MIB, 5 * MIB)).collect();
    qemu_reads(dir.path(), "vhdx", "image.vhdx", &raw, &pieces);
    assert_reads("many", &open(&dir.path().join("image.vhdx"), false), &raw);
}

/// Discarded and zeroed blocks give their space back, and new blocks take it.
#[test]
fn freed_blocks_are_reused() {
    let dir = tempfile::tempdir().unwrap();
    let raw = Raw::new(dir.path().join("raw"), 64 * MIB, 1, &[]);
    qemu_img(dir.path(), &["create", "-q", "-f", "vhdx", "-o", "block_size=1M", "image.vhdx", "64M"]);
    let path = dir.path().join("image.vhdx");
    let image = open(&path, true);
    let fill = |range: std::ops::Range<u64>, byte: u8| {
        for block in range {
            // A part only: the rest must read as zeros although the space is a used one.
            image.write(&[IoSlice::new(&[byte; 700_000])], block * MIB + 1000).unwrap();
            raw.file.write_all_at(&[byte; 700_000], block * MIB + 1000).unwrap();
        }
        image.flush().unwrap();
    };
    fill(0..20, 1);
    let len = std::fs::metadata(&path).unwrap().len();
    for round in 2..6u8 {
        let (at, count) = (u64::from(round % 2) * 20 * MIB, 20 * MIB);
        let other = 20 * MIB - at;
        if round % 2 == 0 {
            image.discard(at, count).unwrap()
        } else {
            image.zero(at, count, ZeroMode::MayUnmap).unwrap()
        }
        raw.file.write_all_at(&vec![0; count as usize], at).unwrap();
        // The second drain finds that nobody can see the old blocks any more.
        image.flush().unwrap();
        image.write(&[IoSlice::new(&[9])], 63 * MIB).unwrap();
        raw.file.write_all_at(&[9], 63 * MIB).unwrap();
        image.flush().unwrap();
        fill(other / MIB..other / MIB + 20, round);
        assert_reads("reused", &image, &raw);
    }
    let now = std::fs::metadata(&path).unwrap().len();
    assert!(now <= len + 2 * MIB, "the file grew from {len} to {now}");
    image.close().unwrap();
    drop(image);
    qemu_agrees(dir.path(), &raw);
    // Another session finds the gaps.
    let image = open(&path, true);
    image.discard(0, 60 * MIB).unwrap();
    raw.file.write_all_at(&vec![0; 60 << 20], 0).unwrap();
    image.close().unwrap();
    drop(image);
    let image = open(&path, true);
    image.write(&[IoSlice::new(&[3; 5000])], 7 * MIB).unwrap();
    raw.file.write_all_at(&[3; 5000], 7 * MIB).unwrap();
    assert_reads("reused", &image, &raw);
    image.close().unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), now);
    drop(image);
    qemu_agrees(dir.path(), &raw);
}

#[test]
fn identifiers_change_with_the_first_write_only() {
    let dir = tempfile::tempdir().unwrap();
    qemu_img(dir.path(), &["create", "-q", "-f", "vhdx", "image.vhdx", "64M"]);
    let path = dir.path().join("image.vhdx");
    let before = std::fs::read(&path).unwrap();
    let image = open(&path, true);
    let guid = image.format().identity().unwrap();
    foreign::read(&image, 0, 5000);
    image.flush().unwrap();
    image.close().unwrap();
    drop(image);
    assert!(before == std::fs::read(&path).unwrap(), "reading changes nothing");
    let image = open(&path, true);
    image.write(&[IoSlice::new(b"x")], 0).unwrap();
    let changed = image.format().identity().unwrap();
    assert_ne!(guid, changed);
    image.write(&[IoSlice::new(b"y")], 1).unwrap();
    assert_eq!(changed, image.format().identity().unwrap());
}

/// Damaged copies are replaced at the first write.
#[test]
fn damaged_copies_are_mended() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.vhdx");
    for places in [[64 << 10, 192 << 10], [128 << 10, 256 << 10]] {
        qemu_img(dir.path(), &["create", "-q", "-f", "vhdx", "-o", "block_size=1M", "image.vhdx", "16M"]);
        let raw = Raw::new(dir.path().join("raw"), 16 * MIB, 1, &[]);
        let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
        places.iter().for_each(|at| file.write_all_at(b"torn", *at).unwrap());
        let image = open(&path, true);
        image.write(&[IoSlice::new(&[7; 10_000])], 5 * MIB).unwrap();
        raw.file.write_all_at(&[7; 10_000], 5 * MIB).unwrap();
        image.close().unwrap();
        drop(image);
        // Without the copies that were sound before.
        let others = if places[0] == 64 << 10 { [128 << 10, 256 << 10] } else { [64 << 10, 192 << 10] };
        others.iter().for_each(|at| file.write_all_at(b"torn", *at).unwrap());
        assert_reads("mended", &open(&path, false), &raw);
        // QEMU never looks at the second copy of the region table.
        if places[1] == 192 << 10 {
            run(dir.path(), "qemu-img", &["compare", "-f", "raw", "-F", "vhdx", "raw", "image.vhdx"]);
        }
    }
}
