//! What fuzzing found, one test each.

mod qcow2_images;

use formats::BlockDevice;
use qcow2_images::{qemu_img, try_open};
use std::fs::{self, File};
use std::io::IoSlice;
use std::os::unix::fs::FileExt;

/// An L1 entry with bits that mean something only with a table, and without one: a write that needs the entry refuses it as damage, so the check
/// must have found it. It once looked at entries with a table alone.
#[test]
fn qcow2_check_looks_at_l1_entries_without_a_table() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    qemu_img(dir.path(), &["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "image", "64k"]);
    let bytes = fs::read(&path).unwrap();
    let l1_at = u64::from_be_bytes(bytes[40..48].try_into().unwrap());
    assert_eq!(bytes[l1_at as usize..l1_at as usize + 16], [0; 16]);
    let clean = try_open(&path, true).unwrap();
    assert_eq!(clean.check(false).unwrap().corruptions, 0);
    drop(clean);
    File::options().write(true).open(&path).unwrap().write_all_at(&0x8000_0000_0000_0100u64.to_be_bytes(), l1_at + 8).unwrap();

    let image = try_open(&path, true).unwrap();
    let report = image.check(false).unwrap();
    assert_eq!(report.corruptions, 1, "{:?}", report.notes);
    let second = 64 * 512;
    let error = image.write(&[IoSlice::new(&[1; 512])], second).unwrap_err();
    assert_eq!(error.kind(), formats::Kind::Corrupt, "{}", error.chain());
}

/// Bitmaps that an autoclear bit has given up, and whose clusters `qemu-img check -r leaks` has freed: the clusters are anybody's. They were once taken for
/// the list of bitmaps still, and the image for damaged as soon as one of them was handed out.
#[test]
fn qcow2_clusters_of_bitmaps_that_were_given_up_are_used() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    qemu_img(dir.path(), &["create", "-q", "-f", "qcow2", "-o", "cluster_size=64k", "image", "8M"]);
    qemu_img(dir.path(), &["bitmap", "--add", "image", "backup"]);
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let mut autoclear = [0; 8];
    file.read_exact_at(&mut autoclear, 88).unwrap();
    assert_eq!(autoclear, 1u64.to_be_bytes());
    file.write_all_at(&[0; 8], 88).unwrap();
    qemu_img(dir.path(), &["check", "-q", "-r", "leaks", "image"]);

    let image = try_open(&path, true).unwrap();
    let content = qcow2_images::content(8 << 20, 1);
    qcow2_images::write(&*image, 0, &content);
    let report = image.check(false).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.notes);
    image.close().unwrap();
    drop(image);
    qemu_img(dir.path(), &["check", "-q", "image"]);
    qcow2_images::assert_reads("reopened", &try_open(&path, false).unwrap(), &content, 1);
}

/// A VHDX file whose length is no multiple of a MiB: its last MiB is free space, of which only a part is in the file. A block that was put there was not
/// in the file to its end: what was not written of it could not be read, and the check called the file cut short.
#[test]
fn vhdx_blocks_at_the_odd_end_of_a_file_are_whole() {
    const MIB: usize = 1 << 20;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    qemu_img(dir.path(), &["create", "-q", "-f", "vhdx", "-o", "block_size=1M", "image", "4M"]);
    let file = File::options().append(true).open(&path).unwrap();
    std::io::Write::write_all(&mut &file, &[0xEE; 40_000]).unwrap();

    let options = formats::OpenOptions::new(&path).format("vhdx");
    let image = formats::open(&options).unwrap();
    let mut content = vec![0; 4 * MIB];
    for block in 0..3 {
        let at = block * MIB + 4096;
        content[at..at + 512].fill(0x11);
        qcow2_images::write(&*image, at as u64, &[0x11; 512]);
    }
    qcow2_images::assert_reads("written", &image, &content, 1);
    image.close().unwrap();
    drop(image);
    let image = formats::open(&options.clone().read_only(true)).unwrap();
    assert_eq!(image.check(false).unwrap().corruptions, 0, "{:?}", image.check(false).unwrap().notes);
    qcow2_images::assert_reads("reopened", &image, &content, 2);
}
