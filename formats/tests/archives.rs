//! Disks in pieces, and disks inside OVA archives.

mod foreign;

use foreign::operations::{Places, random_operations};
use foreign::{MIB, Raw, assert_reads, open, qemu_img, run, try_open};
use formats::{BlockDevice, Kind, OpenOptions};
use std::fs;
use std::io::IoSlice;
use std::path::Path;

fn refused(path: &Path) -> formats::Error {
    try_open(path, false).err().unwrap_or_else(|| panic!("{} was opened", path.display()))
}

/// The content, and `disk.NNN` from the number on.
fn pieces(dir: &Path, size: u64, first: u32, piece: u64) -> Raw {
    let raw = Raw::new(dir.join("raw"), size, 3, &[(0, size)]);
    let (piece, first) = (piece.to_string(), first.to_string());
    run(dir, "split", &["-b", &piece, &format!("--numeric-suffixes={first}"), "-a", "3", "raw", "disk."]);
    raw
}

#[test]
fn pieces_are_joined() {
    for (first, piece) in [(0, 100_003), (1, MIB)] {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let raw = pieces(dir, 3 * MIB, first, piece);
        let path = dir.join(format!("disk.{first:03}"));
        // By the names of the files that are there, and by name.
        let image = open(&path, false);
        assert_eq!(image.format().name(), "split");
        assert_reads("guessed", &image, &raw);
        drop(image);
        let image = formats::open(&OpenOptions::new(&path).format("split")).unwrap();
        random_operations("named", &image, &raw, &Places::whole(raw.size), 1, 200);
        image.close().unwrap();
        drop(image);
        run(dir, "bash", &["-ec", "cat disk.* | cmp - raw"]);
        // Only the first one stands for the disk; said to be raw, it is its own.
        assert!(formats::open(&OpenOptions::new(dir.join(format!("disk.{:03}", first + 1))).format("split")).is_err());
        assert_eq!(formats::open(&OpenOptions::new(&path).format("raw").read_only(true)).unwrap().size(), piece.next_multiple_of(512));
        fs::rename(dir.join(format!("disk.{:03}", first + 1)), dir.join("away")).unwrap();
        let error = formats::open(&OpenOptions::new(&path).format("split").read_only(true)).err().unwrap();
        assert!(error.chain().contains("missing"), "{}", error.chain());
    }
}

#[test]
fn a_guest_cannot_make_its_first_piece_something_else() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    pieces(dir, 3 * MIB, 0, MIB);
    let path = dir.join("disk.000");
    let image = open(&path, true);
    let write = |at: u64, bytes: &[u8]| image.write(&[IoSlice::new(bytes)], at);
    let header = [&b"QFI\xfb"[..], &[0, 0, 0, 3]].concat();
    assert_eq!(write(0, &header).unwrap_err().kind(), Kind::Denied);
    // What a fixed VHD has at its end, at the end of the first piece.
    assert_eq!(write(MIB - 512, b"conectix").unwrap_err().kind(), Kind::Denied);
    write(MIB, &header).unwrap();
    write(2 * MIB - 512, b"conectix").unwrap();
    drop(image);
    let image = formats::open(&OpenOptions::new(&path).format("split")).unwrap();
    image.write(&[IoSlice::new(&header)], 0).unwrap();
}

/// An archive of these files.
fn archive(dir: &Path, format: &str, files: &[&str]) {
    let _ = fs::remove_file(dir.join("machine.ova"));
    let format = format!("--format={format}");
    run(dir, "tar", &[&[format.as_str(), "-cf", "machine.ova"], files].concat());
}

#[test]
fn the_disk_inside_an_archive() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let raw = Raw::new(dir.join("raw"), 3 * MIB, 3, &[(0, 2 * MIB)]);
    let long = format!("{}-disk1.vmdk", "a machine with a long name ".repeat(6));
    fs::write(dir.join("machine.ovf"), "<Envelope/>").unwrap();
    fs::write(dir.join("machine.mf"), "SHA256(x)= 0").unwrap();
    qemu_img(dir, &["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", "raw", &long]);
    run(dir, "/usr/bin/python3", &["-c", "import VMDKstream; VMDKstream.convert_to_stream('raw', 'footer.vmdk')"]);
    qemu_img(dir, &["convert", "-f", "raw", "-O", "qcow2", "raw", "disk.qcow2"]);
    let path = dir.join("machine.ova");
    for format in ["gnu", "pax"] {
        for disk in [long.as_str(), "footer.vmdk", "disk.qcow2"] {
            archive(dir, format, &["machine.ovf", "machine.mf", disk]);
            let image = open(&path, true);
            assert!(image.limits().read_only && image.format().name() == "ova", "{format} {disk}");
            assert_reads(disk, &image, &raw);
            let report = image.check(false).unwrap();
            assert_eq!(report.corruptions, 0, "{disk}: {:?}", report.notes);
            let about = image.format().describe();
            let (at, len) = (about["offset"].as_u64().unwrap(), about["length"].as_u64().unwrap());
            assert_eq!(about["member"].as_str(), Some(disk));
            drop(image);
            // QEMU shown the place reads the same.
            let inner = if disk.ends_with(".qcow2") { "qcow2" } else { "vmdk" };
            let shown = format!(
                "json:{{\"driver\":\"{inner}\",\"file\":{{\"driver\":\"raw\",\"offset\":{at},\"size\":{len},\"file\":{{\"driver\":\"file\",\"filename\":\"machine.ova\"}}}}}}"
            );
            qemu_img(dir, &["compare", "-F", "raw", &shown, "raw"]);
        }
    }
    // None is chosen among several.
    archive(dir, "ustar", &["machine.ovf", "footer.vmdk", "disk.qcow2"]);
    let text = refused(&path).chain();
    assert!(text.contains("footer.vmdk") && text.contains("disk.qcow2"), "{text}");
    archive(dir, "ustar", &["machine.ovf", "machine.mf"]);
    assert!(refused(&path).chain().contains("machine.mf"));
    run(dir, "gzip", &["-k", "footer.vmdk"]);
    archive(dir, "ustar", &["machine.ovf", "footer.vmdk.gz"]);
    assert!(refused(&path).chain().contains("compressed"));
    // Cut short, and a damaged header.
    archive(dir, "ustar", &["machine.ovf", "footer.vmdk"]);
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..MIB as usize]).unwrap();
    assert!(refused(&path).chain().contains("cut short"));
    let mut bytes = whole.clone();
    bytes[1024] ^= 1;
    fs::write(&path, bytes).unwrap();
    assert_eq!(refused(&path).kind(), Kind::Corrupt);
    // An archive that does not begin with a description is taken for one by name alone.
    archive(dir, "ustar", &["footer.vmdk"]);
    assert_eq!(open(&path, false).format().name(), "raw");
    assert_reads("named", &formats::open(&OpenOptions::new(&path).format("ova").read_only(true)).unwrap(), &raw);
    // A guest cannot write one to its raw disk.
    fs::write(dir.join("plain"), vec![0; MIB as usize]).unwrap();
    let image = open(&dir.join("plain"), true);
    assert_eq!(image.write(&[IoSlice::new(&whole[..4096])], 0).unwrap_err().kind(), Kind::Denied);
}
