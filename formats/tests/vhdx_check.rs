//! Growing and checking VHDX images.

mod foreign;

use foreign::operations::{Places, random_operations};
use foreign::vhdx_writer::{Block, Vhdx};
use foreign::{GIB, MIB, Raw, assert_reads, open, qemu_img, qemu_reads};
use formats::{BlockDevice, Kind};
use std::fs::File;
use std::io::IoSlice;
use std::os::unix::fs::FileExt;
use std::path::Path;
use uuid::Uuid;

fn qemu_finds_nothing(dir: &Path) {
    let text = qemu_img(dir, &["check", "image.vhdx"]);
    assert!(text.contains("No errors"), "{text}");
}

fn grown(from: u64, to: &[u64], options: &str) {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut pieces = vec![(0, 2 * MIB), (from - 2 * MIB, 2 * MIB)];
    let mut raw = Raw::new(dir.join("raw"), from, 7, &pieces);
    qemu_img(dir, &["convert", "-f", "raw", "-O", "vhdx", "-o", options, "raw", "image.vhdx"]);
    let image = open(&dir.join("image.vhdx"), true);
    assert_eq!(image.grow(from - 4096).unwrap_err().kind(), Kind::InvalidOption);
    assert_eq!(image.grow(65 << 40).unwrap_err().kind(), Kind::InvalidOption);
    for (index, size) in to.iter().enumerate() {
        random_operations(options, &image, &raw, &Places::new(&pieces), index as u64, 60);
        image.grow(*size).unwrap_or_else(|e| panic!("{}", e.chain()));
        raw.file.set_len(*size).unwrap();
        raw.size = *size;
        pieces.push((size - 3 * MIB, 3 * MIB));
        assert_reads(options, &image, &raw);
        random_operations(options, &image, &raw, &Places::new(&pieces), 100 + index as u64, 60);
    }
    assert_reads(options, &image, &raw);
    image.close().unwrap();
    drop(image);
    qemu_finds_nothing(dir);
    qemu_reads(dir, "vhdx", "image.vhdx", &raw, &pieces);
    let image = open(&dir.join("image.vhdx"), true);
    random_operations(options, &image, &raw, &Places::new(&pieces), 200, 60);
    assert_reads(options, &image, &raw);
    let report = image.check(false).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.notes);
    image.close().unwrap();
    drop(image);
    qemu_finds_nothing(dir);
}

#[test]
fn grows_within_its_table() {
    grown(10 * MIB + 1024, &[11 * MIB + 512, 40 * MIB, 5 * GIB], "block_size=1M");
    grown(10 * MIB + 1024, &[11 * MIB, 700 * MIB], "block_size=16M");
}

/// A table of 1 MiB has room for the blocks of 128 GiB.
#[test]
fn grows_beyond_its_table() {
    grown(100 * GIB + 1024, &[200 * GIB, 600 * GIB + 512], "block_size=1M");
}

/// New space reads as zeros, also where the parent goes on.
#[test]
fn a_child_shorter_than_its_parent_grows() {
    for child_size in [5 * MIB + 512, 6 * MIB] {
        for last in [None, Some(Block::Zero), Some(Block::Full(vec![3; MIB as usize])), Some(Block::Partial(vec![(0, vec![4; 512])]))] {
            let dir = tempfile::tempdir().unwrap();
            let dir = dir.path();
            let base = Vhdx {
                size: 12 * MIB,
                block: MIB,
                sector: 512,
                data_write: Uuid::new_v4(),
                parent: None,
                blocks: (0..12).map(|b| (b, Block::Full(vec![0xBB; MIB as usize]))).collect(),
            };
            base.write(&dir.join("base.vhdx"));
            let last_block = (child_size - 1) / MIB;
            let child = Vhdx {
                size: child_size,
                data_write: Uuid::new_v4(),
                parent: Some(vec![("parent_linkage", base.data_write.to_string()), ("relative_path", "base.vhdx".to_owned())]),
                blocks: last.iter().map(|b| (last_block, b.clone())).collect(),
                ..base
            };
            child.write(&dir.join("image.vhdx"));
            let image = open(&dir.join("image.vhdx"), true);
            let before = foreign::read(&image, 0, child_size);
            image.grow(11 * MIB + 1024).unwrap_or_else(|e| panic!("{}", e.chain()));
            image.close().unwrap();
            drop(image);
            let image = open(&dir.join("image.vhdx"), false);
            let after = foreign::read(&image, 0, 11 * MIB + 1024);
            assert!(before == after[..before.len()], "{last_block}: the old bytes");
            assert_eq!(after[before.len()..].iter().position(|b| *b != 0), None, "{child_size}: the new bytes");
        }
    }
}

/// Byte offset of the allocation table of an image that QEMU or we made.
fn table(path: &Path) -> u64 {
    let file = File::open(path).unwrap();
    let mut regions = vec![0; 16 + 64];
    file.read_exact_at(&mut regions, 192 << 10).unwrap();
    let entry = regions[16..].chunks(32).find(|e| e.starts_with(&[0x66, 0x77, 0xC2, 0x2D])).expect("the table's GUID");
    u64::from_le_bytes(entry[16..24].try_into().unwrap())
}

#[test]
fn damage_is_found_and_mended() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let path = dir.join("image.vhdx");
    let raw = Raw::new(dir.join("raw"), 16 * MIB, 8, &[(0, 16 * MIB)]);
    qemu_img(dir, &["convert", "-f", "raw", "-O", "vhdx", "-o", "block_size=1M", "raw", "image.vhdx"]);
    let bat = table(&path);
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let entry = |index: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, bat + index * 8).unwrap();
        u64::from_le_bytes(bytes)
    };
    let image = open(&path, true);
    let report = image.check(true).unwrap();
    assert_eq!((report.corruptions, report.allocated_units), (0, 16), "{:?}", report.notes);
    drop(image);
    let put = |index: u64, value: u64| file.write_all_at(&value.to_le_bytes(), bat + index * 8).unwrap();
    put(3, entry(2)); // two blocks in one place
    put(5, entry(5) | 0x7FFF_F000_0000_0000); // beyond the end
    put(7, entry(7) & !7 | 4); // no such state
    put(9, bat | 6); // the table itself
    put(11, entry(11) & !7 | 7); // partial without a parent
    // Read: errors where the damage is. Written: not at all.
    let image = open(&path, true);
    assert_eq!(foreign::read(&image, 0, 3 * MIB), raw.read(0, 3 * MIB));
    for block in [5, 7, 9, 11] {
        let mut byte = [0];
        let error = image.read(&mut [std::io::IoSliceMut::new(&mut byte)], block * MIB).expect_err("damaged");
        assert_eq!(error.kind(), Kind::Corrupt, "{}", error.chain());
    }
    let error = image.write(&[IoSlice::new(b"x")], 0).expect_err("damaged images are not written to");
    assert_eq!(error.kind(), Kind::Corrupt, "{}", error.chain());
    drop(image);
    let report = open(&path, false).check(false).unwrap();
    assert_eq!((report.corruptions, report.corruptions_fixed), (5, 0), "{:?}", report.notes);
    let image = open(&path, true);
    let report = image.check(true).unwrap();
    assert_eq!((report.corruptions, report.corruptions_fixed), (5, 5), "{:?}", report.notes);
    let report = image.check(false).unwrap();
    assert_eq!(report.corruptions, 0, "{:?}", report.notes);
    for block in [5, 7, 9, 11] {
        raw.file.write_all_at(&vec![0; MIB as usize], block * MIB).unwrap();
    }
    // Which of the two blocks the bytes belong to cannot be known.
    raw.file.write_all_at(&raw.read(2 * MIB, MIB), 3 * MIB).unwrap();
    assert_reads("mended", &image, &raw);
    random_operations("mended", &image, &raw, &Places::whole(16 * MIB), 1, 200);
    assert_reads("mended", &image, &raw);
    image.close().unwrap();
    drop(image);
    qemu_finds_nothing(dir);
    qemu_reads(dir, "vhdx", "image.vhdx", &raw, &[(0, 16 * MIB)]);
}

#[test]
fn a_file_cut_short_is_lengthened() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let path = dir.join("image.vhdx");
    let raw = Raw::new(dir.join("raw"), 16 * MIB, 8, &[(0, 16 * MIB)]);
    qemu_img(dir, &["convert", "-f", "raw", "-O", "vhdx", "-o", "block_size=8M", "raw", "image.vhdx"]);
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(file.metadata().unwrap().len() - MIB / 2).unwrap();
    let image = open(&path, true);
    let report = image.check(true).unwrap();
    assert_eq!((report.corruptions, report.corruptions_fixed), (1, 1), "{:?}", report.notes);
    raw.file.write_all_at(&vec![0; MIB as usize / 2], 16 * MIB - MIB / 2).unwrap();
    assert_reads("mended", &image, &raw);
    image.close().unwrap();
    drop(image);
    qemu_finds_nothing(dir);
}
