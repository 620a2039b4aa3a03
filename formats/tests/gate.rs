//! Escapes from the directories in which images have to lie: each way out is tried.

use formats::gate::Gate;
use formats::overlay::Overlay;
use formats::{Kind, OpenOptions};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::mkfifo;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

struct Place {
    _dir: TempDir,
    inside: PathBuf,
    outside: PathBuf,
}

fn place() -> Place {
    let dir = tempfile::tempdir().expect("a directory");
    let root = dir.path().canonicalize().expect("its real path");
    let (inside, outside) = (root.join("images"), root.join("elsewhere"));
    for dir in [&inside, &outside] {
        fs::create_dir(dir).expect("a directory");
        fs::write(dir.join("disk.raw"), [7; 4096]).expect("an image");
    }
    Place { _dir: dir, inside, outside }
}

impl Place {
    fn options(&self, file: impl AsRef<Path>) -> OpenOptions {
        let mut options = OpenOptions::new(file.as_ref());
        options.gate = Gate { images: Some(vec![self.inside.clone()]), block_devices: false, ..Gate::default() };
        options
    }

    fn verdict(&self, file: impl AsRef<Path>) -> Result<(), Kind> {
        formats::open(&self.options(file)).map(drop).map_err(|error| error.kind())
    }
}

#[test]
fn images_lie_in_their_directories_wherever_links_lead() {
    let place = place();
    let (inside, outside) = (&place.inside, &place.outside);
    assert_eq!(place.verdict(inside.join("disk.raw")), Ok(()));
    assert_eq!(place.verdict(outside.join("disk.raw")), Err(Kind::Denied));
    assert_eq!(place.verdict(inside.join("../elsewhere/disk.raw")), Err(Kind::Denied));
    symlink(outside.join("disk.raw"), inside.join("link")).expect("a link");
    symlink(outside, inside.join("dir")).expect("a link");
    assert_eq!(place.verdict(inside.join("link")), Err(Kind::Denied));
    assert_eq!(place.verdict(inside.join("dir/disk.raw")), Err(Kind::Denied));
    // Links that stay inside, or lead there, are fine.
    symlink(inside.join("disk.raw"), outside.join("into")).expect("a link");
    assert_eq!(place.verdict(outside.join("into")), Ok(()));
    // A directory of which the name is only the beginning.
    let beside = inside.with_file_name("images-of-others");
    fs::create_dir(&beside).expect("a directory");
    fs::write(beside.join("disk.raw"), [7; 4096]).expect("an image");
    assert_eq!(place.verdict(beside.join("disk.raw")), Err(Kind::Denied));
    // No directory at all: no image at all.
    let mut none = place.options(inside.join("disk.raw"));
    none.gate.images = Some(Vec::new());
    assert_eq!(formats::open(&none).map(drop).map_err(|error| error.kind()), Err(Kind::Denied));
}

#[test]
fn only_regular_files_are_images() {
    let place = place();
    mkfifo(&place.inside.join("fifo"), Mode::S_IRWXU).expect("a FIFO");
    assert_eq!(place.verdict(place.inside.join("fifo")), Err(Kind::InvalidOption));
    assert_eq!(place.verdict(&place.inside), Err(Kind::InvalidOption));
    let socket = place.inside.join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).expect("a socket");
    assert_eq!(place.verdict(&socket), Err(Kind::InvalidOption));
    assert_eq!(place.verdict("/dev/zero"), Err(Kind::Denied));
    // Making device nodes takes root, and a place that lets it.
    let node = place.inside.join("node");
    if mknod(&node, SFlag::S_IFBLK, Mode::S_IRWXU, makedev(7, 250)).is_ok() {
        assert_eq!(place.verdict(&node), Err(Kind::Denied));
    }
    let node = place.inside.join("character");
    if mknod(&node, SFlag::S_IFCHR, Mode::S_IRWXU, makedev(1, 5)).is_ok() {
        assert_eq!(place.verdict(&node), Err(Kind::InvalidOption));
    }
}

#[test]
fn overlays_and_named_parents_stay_inside() {
    let place = place();
    let (inside, outside) = (&place.inside, &place.outside);
    let with_overlay = |path: PathBuf| {
        let mut options = place.options(inside.join("disk.raw"));
        options.overlay = Some(Overlay::Kept { path, create: true });
        formats::open(&options).map(drop).map_err(|error| error.kind())
    };
    symlink(outside, inside.join("dir")).expect("a link");
    assert_eq!(with_overlay(outside.join("new.qcow2")), Err(Kind::Denied));
    assert_eq!(with_overlay(inside.join("dir/new.qcow2")), Err(Kind::Denied));
    assert!(!outside.join("new.qcow2").exists());
    assert_eq!(with_overlay(inside.join("new.qcow2")), Ok(()));
    // One that is there already.
    fs::copy(inside.join("new.qcow2"), outside.join("old.qcow2")).expect("a copy");
    assert_eq!(with_overlay(outside.join("old.qcow2")), Err(Kind::Denied));

    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "disk.raw", "top.qcow2"])
        .current_dir(inside)
        .status()
        .expect("qemu-img (package qemu-utils)");
    assert!(made.success());
    assert_eq!(place.verdict(inside.join("top.qcow2")), Ok(()));
    for (parent, expected) in [(outside.join("disk.raw"), Err(Kind::Denied)), (inside.join("disk.raw"), Ok(()))] {
        let mut options = place.options(inside.join("top.qcow2"));
        options.parent = Some(parent);
        assert_eq!(formats::open(&options).map(drop).map_err(|error| error.kind()), expected);
    }
    // A backing file outside, reached by a link inside.
    fs::remove_file(inside.join("disk.raw")).expect("removed");
    symlink(outside.join("disk.raw"), inside.join("disk.raw")).expect("a link");
    assert_eq!(place.verdict(inside.join("top.qcow2")), Err(Kind::Denied));
}
