//! What is peculiar to VDI, Parallels, QED and qcow1 images: parents found by UUID, marks of open images, counts and clusters that are mended.

mod table;

use formats::{BlockDevice, Kind as ErrorKind, OpenOptions};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use table::{open, qemu, rows, scratch};

fn poke(path: &Path, at: u64, bytes: &[u8]) {
    File::options().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
}

fn le32(path: &Path, at: u64) -> u32 {
    let mut bytes = [0; 4];
    File::open(path).unwrap().read_exact_at(&mut bytes, at).unwrap();
    u32::from_le_bytes(bytes)
}

fn read_only(path: &Path) -> OpenOptions {
    OpenOptions::new(path).read_only(true)
}

#[test]
fn vdi_parents_are_found_by_their_uuid() {
    let dir = scratch();
    let made = rows::vdi_differencing().make(dir.path());
    // VirtualBox's layout: the parent beside the directory of the snapshots, which lies outside the child's own tree.
    fs::create_dir(dir.path().join("Snapshots")).unwrap();
    let child = dir.path().join("Snapshots/image");
    fs::rename(&made.file, &child).unwrap();
    fs::rename(dir.path().join("base"), dir.path().join("any name.vdi")).unwrap();
    let refused = formats::open(&read_only(&child)).err().expect("the parent lies outside");
    assert_eq!(refused.kind(), ErrorKind::Denied, "{}", refused.chain());
    let mut allowed = read_only(&child);
    allowed.gate.allowed.push(dir.path().to_path_buf());
    assert!(open::read_all(&*formats::open(&allowed).unwrap()).unwrap() == made.content);
    // A file of another UUID is not taken.
    let parent = dir.path().join("Snapshots/any name.vdi");
    fs::rename(dir.path().join("any name.vdi"), &parent).unwrap();
    assert!(open::read_all(&*formats::open(&read_only(&child)).unwrap()).unwrap() == made.content);
    poke(&parent, 0x188, &[7; 16]);
    let missing = formats::open(&read_only(&child)).err().expect("there is no such parent");
    assert_eq!(missing.kind(), ErrorKind::NotFound, "{}", missing.chain());
    // Named by the user it is still not the one.
    let named = OpenOptions { parent: Some(parent), ..read_only(&child) };
    assert_eq!(formats::open(&named).err().unwrap().kind(), ErrorKind::Corrupt);
}

#[test]
fn vdi_parents_that_have_changed_are_refused() {
    let dir = scratch();
    let made = rows::vdi_differencing().make(dir.path());
    drop(formats::open(&OpenOptions::new(&made.file)).unwrap());
    assert!(open::read_all(&*formats::open(&read_only(&made.file)).unwrap()).unwrap() == made.content);
    let base = formats::open(&OpenOptions::new(dir.path().join("base"))).unwrap();
    open::write(&*base, 0, b"changed").unwrap();
    drop(base);
    let error = formats::open(&read_only(&made.file)).err().expect("the parent has changed");
    assert!(error.chain().contains("modification UUID"), "{}", error.chain());
}

#[test]
fn vdi_counts_are_mended() {
    let dir = scratch();
    let kind = rows::vdi_dynamic();
    let made = kind.make(dir.path());
    let allocated = le32(&made.file, 0x184);
    // Blocks that are counted and not used: one in the middle, and some that the header has on top.
    let map = u64::from(le32(&made.file, 0x154));
    let victim = (0..5).find(|n| le32(&made.file, map + n * 4) == 1).unwrap();
    poke(&made.file, map + victim * 4, &u32::MAX.to_le_bytes());
    let mut content = made.content.clone();
    content[(victim << 20) as usize..((victim + 1) << 20) as usize].fill(0);
    let image = formats::open(&OpenOptions { repair: true, ..OpenOptions::new(&made.file) }).unwrap();
    assert_eq!((image.check(false).unwrap().corruptions, image.check(false).unwrap().leaks), (0, 1));
    let report = image.check(true).unwrap();
    assert_eq!((report.leaks, report.leaks_fixed), (1, 1), "{:?}", report.notes);
    assert!(open::read_all(&*image).unwrap() == content);
    open::write(&*image, victim << 20, &[9; 700]).unwrap();
    content[(victim << 20) as usize..(victim << 20) as usize + 700].fill(9);
    drop(image);
    qemu::clean(&kind, &made.file).unwrap();
    qemu::compare(&kind, &made.file, &content).unwrap();
    // A block behind those that are counted, where another program would put its next one.
    poke(&made.file, 0x184, &(allocated - 1).to_le_bytes());
    let image = formats::open(&OpenOptions { repair: true, ..OpenOptions::new(&made.file) }).unwrap();
    let report = image.check(true).unwrap();
    assert_eq!((report.corruptions, report.corruptions_fixed), (1, 1), "{:?}", report.notes);
    drop(image);
    qemu::clean(&kind, &made.file).unwrap();
    qemu::compare(&kind, &made.file, &content).unwrap();
}

#[test]
fn vdi_kinds_that_are_not_served_are_named() {
    let dir = scratch();
    let made = rows::vdi_dynamic().make(dir.path());
    poke(&made.file, 0x4C, &3u32.to_le_bytes());
    let error = formats::open(&read_only(&made.file)).err().unwrap();
    assert!(error.kind() == ErrorKind::Unsupported && error.chain().contains("undo"), "{}", error.chain());
}

#[test]
fn parallels_images_say_that_they_are_open() {
    const OPEN: u32 = 0x746F_6E59;
    let dir = scratch();
    let kind = rows::parallels_64k();
    let made = kind.make(dir.path());
    let image = formats::open(&OpenOptions::new(&made.file)).unwrap();
    assert_eq!(le32(&made.file, 44), 0, "nothing has been written yet");
    open::write(&*image, 0, b"x").unwrap();
    assert_eq!(le32(&made.file, 44), OPEN);
    image.close().unwrap();
    drop(image);
    assert_eq!(le32(&made.file, 44), 0);
    // Left open, with a cluster that nothing leads to: served read-only as it is, mended before it is written to.
    poke(&made.file, 44, &OPEN.to_le_bytes());
    let len = fs::metadata(&made.file).unwrap().len();
    File::options().write(true).open(&made.file).unwrap().set_len(len + (64 << 10)).unwrap();
    let image = formats::open(&read_only(&made.file)).unwrap();
    assert_eq!(image.check(false).unwrap().leaks, 1);
    drop(image);
    assert_eq!(le32(&made.file, 44), OPEN);
    drop(formats::open(&OpenOptions::new(&made.file)).unwrap());
    assert_eq!((le32(&made.file, 44), fs::metadata(&made.file).unwrap().len()), (0, len));
    qemu::clean(&kind, &made.file).unwrap();
    // Bitmaps that writing would make wrong.
    poke(&made.file, 56, &(len / 512).to_le_bytes());
    assert_eq!(formats::open(&OpenOptions::new(&made.file)).err().unwrap().kind(), ErrorKind::Unsupported);
    formats::open(&read_only(&made.file)).unwrap();
}

#[test]
fn qed_images_say_that_they_need_a_check() {
    let dir = scratch();
    let kind = rows::qed();
    let made = kind.make(dir.path());
    let image = formats::open(&OpenOptions::new(&made.file)).unwrap();
    assert_eq!(le32(&made.file, 16), 0, "nothing has been written yet");
    open::write(&*image, 0, b"x").unwrap();
    assert_eq!(le32(&made.file, 16), 2);
    image.close().unwrap();
    drop(image);
    assert_eq!(le32(&made.file, 16), 0);
    // Left open, with clusters that nothing leads to: served read-only as it is, mended before it is written to.
    poke(&made.file, 16, &[2]);
    let len = fs::metadata(&made.file).unwrap().len();
    File::options().write(true).open(&made.file).unwrap().set_len(len + (128 << 10)).unwrap();
    let image = formats::open(&read_only(&made.file)).unwrap();
    assert_eq!(image.check(false).unwrap().leaks, 2);
    drop(image);
    assert_eq!(le32(&made.file, 16), 2);
    drop(formats::open(&OpenOptions::new(&made.file)).unwrap());
    assert_eq!((le32(&made.file, 16), fs::metadata(&made.file).unwrap().len()), (0, len));
    qemu::clean(&kind, &made.file).unwrap();
    // QEMU agrees on what such an image is, and mends ours.
    poke(&made.file, 16, &[2]);
    qemu::must("qemu-io", &["-f", "qed", "-c", "write -q -P 7 1M 64k", made.file.to_str().unwrap()]);
    assert_eq!(le32(&made.file, 16), 0);
    // Features that nobody knows.
    poke(&made.file, 16, &[0x40]);
    let error = formats::open(&read_only(&made.file)).err().unwrap();
    assert!(error.kind() == ErrorKind::Unsupported && error.chain().contains("0x40"), "{}", error.chain());
}

/// What the tables of a QED image lead to, broken in each way that can be mended.
#[test]
fn qed_tables_are_mended() {
    let dir = scratch();
    let kind = rows::qed();
    let made = kind.make(dir.path());
    let le64 = |at: u64| u64::from(le32(&made.file, at)) | u64::from(le32(&made.file, at + 4)) << 32;
    let table = le64(le64(40));
    let used: Vec<u64> = (0..80).filter(|n| le64(table + n * 8) > 1).collect();
    let [shared, lost, other, ..] = used[..] else { panic!("the image has few clusters") };
    let mut content = made.content.clone();
    let cluster = |n: u64| (n << 16) as usize..((n + 1) << 16) as usize;
    content.copy_within(cluster(other), cluster(shared).start);
    content[cluster(lost)].fill(0);
    poke(&made.file, table + shared * 8, &le64(table + other * 8).to_le_bytes());
    poke(&made.file, table + lost * 8, &(1u64 << 40).to_le_bytes());
    assert_eq!(formats::open(&OpenOptions::new(&made.file)).unwrap().check(false).unwrap().corruptions, 2);
    let error = open::write(&*formats::open(&OpenOptions::new(&made.file)).unwrap(), 0, b"x").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{}", error.chain());
    let image = formats::open(&OpenOptions { repair: true, ..OpenOptions::new(&made.file) }).unwrap();
    let report = image.check(true).unwrap();
    assert_eq!((report.corruptions, report.corruptions_fixed), (2, 2), "{:?}", report.notes);
    assert_eq!(image.check(false).unwrap().corruptions, 0);
    assert!(open::read_all(&*image).unwrap() == content);
    drop(image);
    qemu::check(&kind, &made.file).unwrap();
    qemu::compare(&kind, &made.file, &content).unwrap();
}

#[test]
fn backing_files_of_unknown_format_are_refused() {
    let dir = scratch();
    for kind in [rows::qed_on_qcow2(), rows::qcow1_on_raw()] {
        let dir = tempfile::tempdir_in(dir.path()).unwrap();
        let made = kind.make(dir.path());
        let error = formats::open(&read_only(&made.file)).err().expect("nobody says what it is");
        assert!(error.kind() == ErrorKind::Denied && error.chain().contains("parent-format"), "{}", error.chain());
        assert!(open::read_all(&*open::file(&kind, &made.file, true)).unwrap() == made.content);
    }
}

#[test]
fn encrypted_qcow1_images_are_refused_by_name() {
    let dir = scratch();
    let made = rows::qcow1().make(dir.path());
    poke(&made.file, 36, &1u32.to_be_bytes());
    let error = formats::open(&read_only(&made.file)).err().unwrap();
    assert!(error.kind() == ErrorKind::Unsupported && error.chain().contains("AES"), "{}", error.chain());
}

/// A grown disk has room for blocks in all of it, at once.
#[test]
fn grown_vdi_images_can_be_filled() {
    let dir = scratch();
    let kind = rows::vdi_dynamic();
    let made = kind.make(dir.path());
    let image = formats::open(&OpenOptions::new(&made.file)).unwrap();
    image.grow(12 << 20).unwrap();
    let content = vec![0xA7; 12 << 20];
    open::write(&*image, 0, &content).unwrap();
    image.close().unwrap();
    drop(image);
    qemu::clean(&kind, &made.file).unwrap();
    qemu::compare(&kind, &made.file, &content).unwrap();
}
