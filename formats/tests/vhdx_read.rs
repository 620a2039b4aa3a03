//! VHDX images that `qemu-img` made read as what they were made from.

mod foreign;

use foreign::{GIB, MIB, Raw, assert_reads, open, qemu_img, run, try_open, try_run};
use formats::{BlockDevice, Kind};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Makes `image.vhdx` in `dir` from `raw` with these options.
fn convert(dir: &Path, raw: &Raw, options: &str) {
    qemu_img(dir, &["convert", "-f", "raw", "-O", "vhdx", "-o", options, raw.path.to_str().unwrap(), "image.vhdx"]);
}

fn converted(size: u64, data: &[(u64, u64)], options: &str) {
    let dir = tempfile::tempdir().unwrap();
    let raw = Raw::new(dir.path().join("raw"), size, 1, data);
    convert(dir.path(), &raw, options);
    let image = open(&dir.path().join("image.vhdx"), false);
    assert_eq!(image.format().name(), "vhdx");
    assert_eq!(image.limits().sector, 512);
    assert_reads(options, &image, &raw);
}

#[test]
fn small_blocks() {
    converted(50 * MIB + 512, &[(0, 3 * MIB), (10 * MIB + 4096, 70_000), (49 * MIB, 2 * MIB)], "block_size=1M");
}

#[test]
fn default_blocks_and_a_larger_log() {
    converted(80 * MIB, &[(5 * MIB, 3 * MIB), (79 * MIB, MIB)], "log_size=2M");
}

#[test]
fn largest_blocks() {
    converted(600 * MIB, &[(0, MIB), (255 * MIB, 2 * MIB), (599 * MIB, MIB)], "block_size=256M");
}

#[test]
fn fixed() {
    converted(33 * MIB, &[(0, 2 * MIB), (20 * MIB, 100_000), (32 * MIB, MIB)], "subformat=fixed");
}

#[test]
fn blocks_are_not_in_state_zero() {
    converted(40 * MIB, &[(8 * MIB, MIB)], "block_state_zero=off,block_size=1M");
}

/// Bitmap entries are interleaved every 4 GiB of 512-byte sectors.
#[test]
fn beyond_four_and_eight_gib() {
    let data = [
        (0, MIB),
        (4 * GIB - MIB - 4096, 2 * MIB),
        (5 * GIB + 1, MIB),
        (8 * GIB - 100_000, 200_000),
        (8 * GIB + 7 * MIB, MIB),
        (12 * GIB - 5000, 10_000),
        (13 * GIB - MIB, MIB),
    ];
    for options in ["block_size=1M", "block_size=32M", "block_size=256M"] {
        converted(13 * GIB, &data, options);
    }
}

/// The byte at `at` of a file is changed.
fn damage(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x55], at).unwrap();
}

#[test]
fn one_copy_of_header_and_region_table_is_enough() {
    let dir = tempfile::tempdir().unwrap();
    let raw = Raw::new(dir.path().join("raw"), 20 * MIB, 2, &[(MIB, 3 * MIB)]);
    let path = dir.path().join("image.vhdx");
    for places in [
        &[64 << 10][..],
        &[(128 << 10) + 20],
        &[192 << 10],
        &[(256 << 10) + 17],
        &[(64 << 10) + 70, (256 << 10) + 60_000],
        &[128 << 10, (192 << 10) + 8],
    ] {
        convert(dir.path(), &raw, "block_size=1M");
        places.iter().for_each(|at| damage(&path, *at));
        assert_reads(&format!("{places:x?}"), &open(&path, false), &raw);
    }
    for places in [[64 << 10, 128 << 10], [192 << 10, 256 << 10]] {
        convert(dir.path(), &raw, "block_size=1M");
        places.iter().for_each(|at| damage(&path, *at));
        let error = try_open(&path, false).err().expect("both copies are damaged");
        assert_eq!(error.kind(), Kind::Corrupt, "{}", error.chain());
    }
}

/// Leaves a log entry that was written but not applied: the write to the allocation table fails.
fn dirty(dir: &Path, raw: &Raw) {
    convert(dir, raw, "block_size=1M");
    let file = File::open(dir.join("image.vhdx")).unwrap();
    // The BAT's entry in the region table: QEMU writes it first.
    let mut at = [0; 8];
    file.read_exact_at(&mut at, (192 << 10) + 16 + 16).unwrap();
    let bat = u64::from_le_bytes(at);
    let options = format!(
        "driver=vhdx,file.driver=blkdebug,file.image.driver=file,file.image.filename=image.vhdx,\
         file.inject-error.0.event=none,file.inject-error.0.iotype=write,file.inject-error.0.errno=5,file.inject-error.0.sector={}",
        bat / 512
    );
    let (_, text) = try_run(dir, "qemu-io", &["--image-opts", &options, "-c", "write -P 0x77 2M 1M"]);
    assert!(text.contains("Input/output error"), "{text}");
    raw.file.write_all_at(&vec![0x77; MIB as usize], 2 * MIB).unwrap();
}

#[test]
fn a_dirty_log_is_replayed_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    let raw = Raw::new(dir.path().join("raw"), 20 * MIB, 3, &[(5 * MIB, 3 * MIB)]);
    dirty(dir.path(), &raw);
    let path = dir.path().join("image.vhdx");
    let before = std::fs::read(&path).unwrap();
    let (ok, text) = try_run(dir.path(), "qemu-img", &["info", "image.vhdx"]);
    assert!(!ok || text.contains("log"), "QEMU refuses this image: {text}");
    assert_reads("dirty", &open(&path, false), &raw);
    assert!(before == std::fs::read(&path).unwrap(), "opening read-only changes nothing");
    // QEMU's own replay agrees.
    qemu_img(dir.path(), &["check", "-r", "all", "image.vhdx"]);
    run(dir.path(), "qemu-img", &["compare", "-f", "raw", "-F", "vhdx", "raw", "image.vhdx"]);
}

#[test]
fn a_dirty_log_is_replayed_into_a_writable_file() {
    let dir = tempfile::tempdir().unwrap();
    let raw = Raw::new(dir.path().join("raw"), 20 * MIB, 4, &[(5 * MIB, 3 * MIB)]);
    dirty(dir.path(), &raw);
    let path = dir.path().join("image.vhdx");
    let image = open(&path, true);
    assert_reads("dirty", &image, &raw);
    image.close().unwrap();
    drop(image);
    let text = qemu_img(dir.path(), &["check", "image.vhdx"]);
    assert!(text.contains("No errors"), "{text}");
    run(dir.path(), "qemu-img", &["compare", "-f", "raw", "-F", "vhdx", "raw", "image.vhdx"]);
}

#[test]
fn a_dirty_log_without_a_complete_sequence_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let raw = Raw::new(dir.path().join("raw"), 20 * MIB, 5, &[(5 * MIB, 3 * MIB)]);
    dirty(dir.path(), &raw);
    let path = dir.path().join("image.vhdx");
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let mut log = vec![0; MIB as usize];
    file.read_exact_at(&mut log, MIB).unwrap();
    for (index, sector) in log.chunks_mut(4096).enumerate() {
        if sector.starts_with(b"loge") {
            sector[100] ^= 1;
            file.write_all_at(sector, MIB + index as u64 * 4096).unwrap();
        }
    }
    for writable in [false, true] {
        let error = try_open(&path, writable).err().expect("nothing to recover from");
        assert_eq!(error.kind(), Kind::Corrupt, "{}", error.chain());
        assert!(error.chain().contains("log"), "{}", error.chain());
    }
}

#[test]
fn a_file_cut_short_fails_where_it_is_cut() {
    let dir = tempfile::tempdir().unwrap();
    let raw = Raw::new(dir.path().join("raw"), 20 * MIB, 6, &[(0, 20 * MIB)]);
    convert(dir.path(), &raw, "block_size=1M");
    let path = dir.path().join("image.vhdx");
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(file.metadata().unwrap().len() - MIB / 2).unwrap();
    let image = open(&path, false);
    assert_eq!(foreign::read(&image, 0, 19 * MIB + MIB / 2), raw.read(0, 19 * MIB + MIB / 2));
    let mut byte = [0];
    let error = image.read(&mut [std::io::IoSliceMut::new(&mut byte)], 20 * MIB - 1).expect_err("this block is cut");
    assert_eq!(error.kind(), Kind::Corrupt);
}
