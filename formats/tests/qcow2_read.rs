//! Images that `qemu-img` made read as what they were made from.

mod qcow2_images;

use formats::{BlockDevice, Kind, OpenOptions};
use qcow2_images::{assert_reads, content, open, qemu_img, read, try_open};
use std::path::Path;

const SIZE: usize = 6 << 20;

/// Makes `NAME.qcow2` from a raw file with `options`, and compares.
fn converted(flags: &[&str], options: &str) {
    let dir = tempfile::tempdir().unwrap();
    let want = content(SIZE - 512 * 3, 1);
    std::fs::write(dir.path().join("raw"), &want).unwrap();
    let mut args = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", options];
    args.extend(flags);
    args.extend(["raw", "image.qcow2"]);
    qemu_img(dir.path(), &args);
    assert_reads(options, &open(&dir.path().join("image.qcow2"), false), &want, 2);
}

#[test]
fn every_cluster_size() {
    for bits in 9..=21 {
        converted(&[], &format!("cluster_size={}", 1 << bits));
    }
}

#[test]
fn every_refcount_width_and_version_2() {
    for width in [1, 2, 4, 8, 16, 32, 64] {
        converted(&[], &format!("refcount_bits={width}"));
    }
    converted(&[], "compat=0.10");
    converted(&[], "lazy_refcounts=on");
    converted(&[], "preallocation=metadata");
}

#[test]
fn compressed_clusters() {
    for size in ["512", "4k", "64k", "2M"] {
        for kind in ["zlib", "zstd"] {
            converted(&["-c"], &format!("cluster_size={size},compression_type={kind}"));
        }
    }
    converted(&["-c"], "compat=0.10");
}

#[test]
fn backing_files() {
    let dir = tempfile::tempdir().unwrap();
    let base = content(SIZE, 3);
    std::fs::write(dir.path().join("base.raw"), &base[..SIZE / 2 + 1024]).unwrap();
    qemu_img(dir.path(), &["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "mid.qcow2", "6M"]);
    run_io(dir.path(), "mid.qcow2", &["write -P 7 1M 64k", "write -z 2M 192k", "write -P 9 5M 4k"]);
    qemu_img(dir.path(), &["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2"]);
    run_io(dir.path(), "top.qcow2", &["write -P 8 1060k 8k", "write -z 3M 100k", "discard 4M 64k"]);
    qemu_img(dir.path(), &["convert", "-O", "raw", "top.qcow2", "want.raw"]);
    let want = std::fs::read(dir.path().join("want.raw")).unwrap();
    assert_reads("chain", &open(&dir.path().join("top.qcow2"), false), &want, 4);
}

fn run_io(dir: &Path, image: &str, commands: &[&str]) {
    let mut args = vec!["-f", "qcow2"];
    commands.iter().for_each(|c| args.extend(["-c", c]));
    args.push(image);
    qcow2_images::run(dir, "qemu-io", &args);
}

#[test]
fn snapshots_are_listed_and_read() {
    let dir = tempfile::tempdir().unwrap();
    qemu_img(dir.path(), &["create", "-q", "-f", "qcow2", "image.qcow2", "6M"]);
    run_io(dir.path(), "image.qcow2", &["write -P 1 0 1M", "write -P 2 3M 300k"]);
    qemu_img(dir.path(), &["snapshot", "-c", "first", "image.qcow2"]);
    run_io(dir.path(), "image.qcow2", &["write -P 3 512k 1M"]);
    qemu_img(dir.path(), &["snapshot", "-c", "second one", "image.qcow2"]);
    run_io(dir.path(), "image.qcow2", &["write -z 0 4M"]);
    let path = dir.path().join("image.qcow2");
    let image = open(&path, false);
    assert_eq!(read(&*image, 0, 4 << 20), vec![0; 4 << 20]);
    let details = image.format().describe();
    assert_eq!(details["snapshots"][0]["name"], "first");
    assert_eq!(details["snapshots"][1]["name"], "second one");
    assert_eq!((details["compat"].as_str(), details["refcount-bits"].as_u64()), (Some("1.1"), Some(16)));
    for name in ["first", "second one", "1"] {
        let snapshot = if name == "1" { "first" } else { name };
        qemu_img(dir.path(), &["convert", "-O", "raw", "-l", &format!("snapshot.name={snapshot}"), "image.qcow2", "want.raw"]);
        let want = std::fs::read(dir.path().join("want.raw")).unwrap();
        let mut options = OpenOptions::new(&path);
        options.snapshot_name = Some(name.to_owned());
        let shown = formats::open(&options).unwrap_or_else(|e| panic!("{}", e.chain()));
        assert!(shown.limits().read_only);
        assert_reads(name, &shown, &want, 5);
    }
    let mut options = OpenOptions::new(&path);
    options.snapshot_name = Some("third".into());
    let error = formats::open(&options).err().unwrap();
    assert_eq!(error.kind(), Kind::InvalidOption);
    assert!(error.chain().contains("\"second one\""), "{}", error.chain());
}

#[test]
fn what_cannot_be_served_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    // A data file that is not named, and two features that exclude each other.
    qemu_img(dir.path(), &["create", "-q", "-f", "qcow2", "-o", "data_file=d.raw", "data", "6M"]);
    let path = dir.path().join("data");
    let mut bytes = std::fs::read(&path).unwrap();
    let extension = bytes.windows(4).position(|w| w == b"DATA").unwrap();
    bytes[63] = 1;
    std::fs::write(&path, &bytes).unwrap();
    let error = try_open(&path, false).err().unwrap();
    assert!(error.kind() == Kind::InvalidFormat && error.chain().contains("internal snapshots"), "{}", error.chain());
    bytes[63] = 0;
    bytes[extension] = b'X';
    std::fs::write(&path, &bytes).unwrap();
    let error = try_open(&path, false).err().unwrap();
    assert!(error.kind() == Kind::Unsupported && error.chain().contains("does not name"), "{}", error.chain());
    // Subclusters of less than a sector.
    qemu_img(dir.path(), &["create", "-q", "-f", "qcow2", "-o", "cluster_size=8k", "small", "1M"]);
    let path = dir.path().join("small");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[79] |= 0x10;
    std::fs::write(&path, &bytes).unwrap();
    let error = try_open(&path, false).err().unwrap();
    assert!(error.kind() == Kind::InvalidFormat && error.chain().contains("16 KiB"), "{}", error.chain());
    // A feature that nobody knows, named by nobody and then by the image.
    qemu_img(dir.path(), &["create", "-q", "-f", "qcow2", "new", "6M"]);
    let path = dir.path().join("new");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[74] = 0x10;
    std::fs::write(&path, &bytes).unwrap();
    let error = try_open(&path, false).err().unwrap();
    assert!(error.chain().contains("feature bit 44"), "{}", error.chain());
    let entry = bytes.windows(11).position(|w| w == b"corrupt bit").unwrap() - 2;
    bytes[entry + 1] = 44;
    std::fs::write(&path, &bytes).unwrap();
    let error = try_open(&path, false).err().unwrap();
    assert!(error.chain().contains("\"corrupt bit\" (bit 44)"), "{}", error.chain());
}

/// Long runs of nothing, and sizes that no file could have, cost nothing.
#[test]
fn an_exabyte_is_mapped_in_few_steps() {
    let dir = tempfile::tempdir().unwrap();
    qemu_img(dir.path(), &["create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", "huge", "2097152T"]);
    let image = open(&dir.path().join("huge"), false);
    let (mut at, mut steps) = (0, 0);
    while at < image.size() {
        at += image.map(at, image.size() - at).unwrap().len;
        steps += 1;
    }
    assert!(steps < 10, "{steps} steps");
    assert_eq!(read(&*image, image.size() - 4096, 4096), vec![0; 4096]);
}
