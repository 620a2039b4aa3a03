//! VHD images: made by QEMU, or by the tests' own writer and confirmed by libvhdi; read, written, grown, damaged and mended.

mod foreign;

use foreign::operations::{Places, concurrent_operations, random_operations};
use foreign::readers::{dissect_agrees, libvhdi_agrees};
use foreign::vhd_writer::{Names, Runs, Vhd, flatten, reseal, uuid};
use foreign::{GIB, MIB, Raw, assert_reads, open, qemu_img, qemu_reads, try_open};
use formats::{BlockDevice, Kind, ZeroMode};
use rand::{Rng, RngCore, SeedableRng, rngs::StdRng};
use std::fs::File;
use std::io::IoSlice;
use std::os::unix::fs::FileExt;
use std::path::Path;
use uuid::Uuid;

fn qemu_compares(dir: &Path, raw: &Raw) {
    qemu_img(dir, &["compare", "-f", "raw", "-F", "vpc", raw.path.to_str().unwrap(), "image.vhd"]);
}

fn convert(dir: &Path, size: u64, data: &[(u64, u64)], options: &str) -> Raw {
    let raw = Raw::new(dir.join("raw"), size, 21, data);
    qemu_img(dir, &["convert", "-f", "raw", "-O", "vpc", "-o", options, "raw", "image.vhd"]);
    raw
}

/// Reads, then random operations in several sessions, of images made by QEMU.
fn operations(size: u64, options: &str, places: Places, count: usize) {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let data: Vec<_> = places.pieces.iter().map(|(at, len)| (at + len / 3, len / 4)).collect();
    let raw = convert(dir, size, &data, options);
    let path = dir.join("image.vhd");
    assert_reads(options, &open(&path, false), &raw);
    for session in 0..3 {
        let image = open(&path, true);
        assert_eq!(image.format().name(), "vpc");
        random_operations(options, &image, &raw, &places, session, count);
        if session == 1 {
            concurrent_operations(options, &image, &raw, &places, session, count);
        }
        assert_reads(options, &image, &raw);
        let report = image.check(false).unwrap();
        assert_eq!((report.corruptions, report.notes.len()), (0, 0), "{:?}", report.notes);
        image.close().unwrap();
        drop(image);
        qemu_reads(dir, "vpc", "image.vhd", &raw, &places.pieces);
        if size <= 256 * MIB {
            libvhdi_agrees(dir, &["image.vhd"], &raw);
            dissect_agrees(dir, "image.vhd", &raw);
        }
    }
    // What we left is what QEMU can go on with.
    foreign::qemu_io(dir, "vpc", "image.vhd", &["write -P 0x5a 1M 70k", "write -P 0x33 777k 5000"]);
    raw.file.write_all_at(&[0x5A; 70 << 10], MIB).unwrap();
    raw.file.write_all_at(&[0x33; 5000], 777 << 10).unwrap();
    let image = open(&path, true);
    assert_reads(options, &image, &raw);
    random_operations(options, &image, &raw, &places, 9, count);
    assert_reads(options, &image, &raw);
}

#[test]
fn dynamic() {
    operations(41 * MIB + 1536, "subformat=dynamic,force_size=on", Places::whole(41 * MIB + 1536), 250);
}

#[test]
fn fixed() {
    operations(30 * MIB + 512, "subformat=fixed,force_size=on", Places::whole(30 * MIB + 512), 200);
}

#[test]
fn large_dynamic() {
    let pieces = [(0, 3 * MIB), (4 * GIB - MIB, 3 * MIB), (100 * GIB, 2 * MIB), (2039 * GIB, 2 * MIB)];
    operations(2040 * GIB, "subformat=dynamic,force_size=on", Places::new(&pieces), 150);
}

/// Without `force_size` QEMU rounds the size up to a geometry and lets readers follow that.
#[test]
fn sizes_follow_the_creator() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for subformat in ["dynamic", "fixed"] {
        let options = format!("subformat={subformat}");
        let raw = convert(dir, 64 * MIB, &[(0, 3 * MIB), (63 * MIB, MIB)], &options);
        raw.file.set_len(67_125_248).unwrap();
        assert_reads(&options, &open(&dir.join("image.vhd"), false), &Raw::existing(dir.join("raw")));
        // The same file by other programs: (creator, size field, size).
        let file = File::options().read(true).write(true).open(dir.join("image.vhd")).unwrap();
        let end = file.metadata().unwrap().len() - 512;
        let cases: [(&[u8; 4], u64, u64); 8] = [
            (b"vpc ", 60 * MIB, 67_125_248),
            (b"qemu", 60 * MIB, 67_125_248),
            (b"????", 60 * MIB, 67_125_248),
            (b"qem2", 60 * MIB, 60 * MIB),
            (b"win ", 60 * MIB, 60 * MIB),
            (b"tap\0", 60 * MIB, 60 * MIB),
            (b"CTXS", 60 * MIB, 60 * MIB),
            (b"wa\0\0", 60 * MIB, 60 * MIB),
        ];
        for (creator, field, size) in cases {
            for at in if subformat == "fixed" { vec![end] } else { vec![0, end] } {
                file.write_all_at(creator, at + 28).unwrap();
                file.write_all_at(&field.to_be_bytes(), at + 48).unwrap();
                reseal(&file, at);
            }
            assert_eq!(open(&dir.join("image.vhd"), false).size(), size, "{subformat} {creator:?}");
            // QEMU is of the same opinion.
            if creator != b"????" {
                let info: serde_json::Value =
                    serde_json::from_str(&qemu_img(dir, &["info", "-f", "vpc", "--output=json", "image.vhd"])).unwrap();
                assert_eq!(info["virtual-size"].as_u64(), Some(size), "QEMU: {subformat} {creator:?}");
            }
        }
        // The largest geometry says nothing.
        for at in if subformat == "fixed" { vec![end] } else { vec![0, end] } {
            file.write_all_at(b"vpc ", at + 28).unwrap();
            file.write_all_at(&[0xFF, 0xFF, 16, 255], at + 56).unwrap();
            reseal(&file, at);
        }
        assert_eq!(open(&dir.join("image.vhd"), false).size(), 60 * MIB);
        // A geometry that hides data is not believed.
        if subformat == "dynamic" {
            for at in [0, end] {
                file.write_all_at(&[0, 100, 4, 17], at + 56).unwrap();
                file.write_all_at(&(64 * MIB).to_be_bytes(), at + 48).unwrap();
                reseal(&file, at);
            }
            assert_eq!(open(&dir.join("image.vhd"), false).size(), 64 * MIB);
        }
    }
}

#[test]
fn one_footer_is_enough() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let path = dir.join("image.vhd");
    for case in ["cut", "damaged end", "zeroed end", "damaged start", "short"] {
        let raw = convert(dir, 20 * MIB, &[(MIB, 3 * MIB), (19 * MIB, MIB)], "force_size=on");
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let end = file.metadata().unwrap().len() - 512;
        match case {
            "cut" => file.set_len(end).unwrap(),
            "damaged end" => file.write_all_at(&[1], end + 90).unwrap(),
            "zeroed end" => file.write_all_at(&[0; 512], end).unwrap(),
            "damaged start" => file.write_all_at(&[1], 90).unwrap(),
            _ => file.set_len(end + 511).unwrap(),
        }
        assert_reads(case, &open(&path, false), &raw);
        let image = open(&path, true);
        random_operations(case, &image, &raw, &Places::whole(raw.size), 3, 60);
        image.close().unwrap();
        drop(image);
        // Both are whole again.
        let end = file.metadata().unwrap().len() - 512;
        let (mut first, mut last) = ([0; 512], [0; 512]);
        file.read_exact_at(&mut first, 0).unwrap();
        file.read_exact_at(&mut last, end).unwrap();
        assert!(first == last && first.starts_with(b"conectix"), "{case}");
        qemu_compares(dir, &raw);
        libvhdi_agrees(dir, &["image.vhd"], &raw);
    }
    // Neither.
    convert(dir, 20 * MIB, &[(MIB, 3 * MIB)], "force_size=on");
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let end = file.metadata().unwrap().len() - 512;
    file.write_all_at(&[1], 90).unwrap();
    file.write_all_at(&[1], end + 90).unwrap();
    let error = try_open(&path, false).err().expect("both footers are damaged");
    assert_eq!(error.kind(), Kind::Corrupt, "{}", error.chain());
    // A fixed one has one only; that of old programs is a byte shorter.
    let raw = convert(dir, 20 * MIB, &[(MIB, 3 * MIB)], "force_size=on,subformat=fixed");
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(20 * MIB + 511).unwrap();
    assert_reads("short", &open(&path, false), &raw);
    file.set_len(20 * MIB + 500).unwrap();
    assert_eq!(open(&path, false).format().name(), "raw");
    let named = formats::open(&formats::OpenOptions::new(&path).format("vpc").read_only(true));
    assert_eq!(named.err().expect("no footer").kind(), Kind::InvalidFormat);
}

/// Random runs of sectors for blocks of a child, laid over `raw`, which holds what its parent shows. Runs begin and end at multiples of `align` sectors.
fn blocks(raw: &Raw, block: u64, numbers: &[u64], align: u64, seed: u64) -> Vec<(u64, Runs)> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut list = Vec::new();
    for (place, number) in numbers.iter().enumerate() {
        let at = number * block;
        let sectors = block.min(raw.size - at) / 512;
        let mut runs = Runs::new();
        let mut first = if place == 1 { 0 } else { rng.random_range(0..30) / align * align };
        while first < sectors && runs.len() < 100 {
            let count = if place == 1 { sectors } else { (rng.random_range(1..70) * align).min(sectors - first) };
            let mut bytes = vec![0; (count * 512) as usize];
            rng.fill_bytes(&mut bytes);
            raw.file.write_all_at(&bytes, at + first * 512).unwrap();
            runs.push((first, bytes));
            first += count + rng.random_range(1..90) * align;
        }
        list.push((*number, runs));
    }
    list
}

const CHAIN: [&str; 3] = ["top.vhd", "middle.vhd", "base.vhd"];

fn chain(dir: &Path, base_format: &str, block: u64, middle: Names, top: Names, align: u64) -> Raw {
    let raw = Raw::new(dir.join("raw"), 30 * MIB + 4096, 5, &[(0, 25 * MIB)]);
    let options = format!("force_size=on,subformat={base_format}");
    qemu_img(dir, &["convert", "-f", "raw", "-O", "vpc", "-o", &options, "raw", "base.vhd"]);
    let first = Vhd {
        size: raw.size,
        block,
        uuid: Uuid::new_v4(),
        parent: Some((uuid(&dir.join("base.vhd")), middle)),
        blocks: blocks(&raw, block, &[5, 0, 1, 6, 7], align, 1),
    };
    first.write(&dir.join("middle.vhd"));
    let second =
        Vhd { uuid: Uuid::new_v4(), parent: Some((first.uuid, top)), blocks: blocks(&raw, block, &[0, 2, 5, 6, 3], align, 2), ..first };
    second.write(&dir.join("top.vhd"));
    raw
}

fn read_and_written(dir: &Path, raw: &Raw, align: u64, confirm: impl Fn()) {
    // The writer is right, others say.
    confirm();
    assert_reads("chain", &open(&dir.join("top.vhd"), false), raw);
    let parents = || CHAIN[1..].iter().map(|n| std::fs::read(dir.join(n)).unwrap()).collect::<Vec<_>>();
    let before = parents();
    let places = Places { align: align * 512, ..Places::whole(raw.size) };
    for session in 0..3 {
        let image = open(&dir.join("top.vhd"), true);
        random_operations("chain", &image, raw, &places, session, 150);
        if session == 1 && align == 1 {
            concurrent_operations("chain", &image, raw, &places, session, 150);
        }
        assert_reads("chain", &image, raw);
        let report = image.check(false).unwrap();
        assert_eq!((report.corruptions, report.notes.len()), (0, 0), "{:?}", report.notes);
        image.close().unwrap();
        drop(image);
        confirm();
    }
    assert_reads("chain", &open(&dir.join("top.vhd"), false), raw);
    assert!(before == parents(), "parents are not written to");
}

/// libvhdi takes a run of sectors to last until a byte of the bitmap ends, and a block to begin where its parent's does: it is asked where runs are multiples
/// of 8 sectors and all blocks of one size. A reader of the tests' own is always asked.
#[test]
fn chains_are_read_and_written() {
    let cases: [(&str, u64, Names, Names); 3] = [
        (
            "dynamic",
            2 * MIB,
            vec![(b"W2ru", ".\\base.vhd".into())],
            vec![(b"W2ru", "middle.vhd".into()), (b"W2ku", "C:\\x\\middle.vhd".into())],
        ),
        ("fixed", MIB / 2, vec![(b"W2ku", "D:\\vm\\base.vhd".into())], vec![(b"MacX", "file://./middle.vhd".into())]),
        ("dynamic", 4 * MIB, vec![(b"MacX", "file://localhost/gone/base.vhd".into())], vec![(b"W2ru", "..\\gone\\middle.vhd".into())]),
    ];
    for (base, block, middle, top) in cases {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let raw = chain(dir, base, block, middle, top, 8);
        read_and_written(dir, &raw, 8, || {
            assert!(flatten(dir, &CHAIN) == raw.read(0, raw.size), "blocks of {block} bytes");
            if block == 2 * MIB {
                libvhdi_agrees(dir, &CHAIN, &raw);
            }
        });
    }
}

/// With any runs, against a reader of the tests' own.
#[test]
fn chains_with_runs_of_any_length_are_read_and_written() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let raw = chain(dir, "dynamic", 2 * MIB, vec![(b"W2ru", "base.vhd".into())], vec![(b"W2ru", "middle.vhd".into())], 1);
    read_and_written(dir, &raw, 1, || assert!(flatten(dir, &CHAIN) == raw.read(0, raw.size)));
}

#[test]
fn wrong_and_missing_parents_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let names = |n: &str| -> Names { vec![(b"W2ru", n.to_owned())] };
    let raw = chain(dir, "dynamic", 2 * MIB, names("base.vhd"), names("middle.vhd"), 1);
    qemu_img(dir, &["convert", "-f", "raw", "-O", "vpc", "-o", "force_size=on", "raw", "base.vhd"]);
    let error = try_open(&dir.join("top.vhd"), false).err().expect("another base");
    assert_eq!(error.kind(), Kind::Corrupt, "{}", error.chain());
    assert!(error.chain().contains("UUID"), "{}", error.chain());
    std::fs::remove_file(dir.join("base.vhd")).unwrap();
    let error = try_open(&dir.join("top.vhd"), false).err().expect("no base");
    assert!(error.chain().contains("base.vhd"), "{}", error.chain());
    drop(raw);
}

/// In a dynamic image all of a block is the image's, whatever the bits say, for us as for other readers; what is written has its bits set.
#[test]
fn bitmaps_of_dynamic_images_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let raw = Raw::new(dir.join("raw"), 12 * MIB, 5, &[]);
    let image = Vhd { size: raw.size, block: 2 * MIB, uuid: Uuid::new_v4(), parent: None, blocks: blocks(&raw, 2 * MIB, &[3, 1, 5], 1, 1) };
    image.write(&dir.join("image.vhd"));
    libvhdi_agrees(dir, &["image.vhd"], &raw);
    assert_reads("bitmaps", &open(&dir.join("image.vhd"), false), &raw);
    let image = open(&dir.join("image.vhd"), true);
    random_operations("bitmaps", &image, &raw, &Places { zeroing: false, ..Places::whole(raw.size) }, 1, 200);
    assert_reads("bitmaps", &image, &raw);
    image.close().unwrap();
    drop(image);
    libvhdi_agrees(dir, &["image.vhd"], &raw);
    // For a reader that looks at them the bits hide nothing.
    let file = File::open(dir.join("image.vhd")).unwrap();
    for block in 0..6u64 {
        let mut entry = [0; 4];
        file.read_exact_at(&mut entry, 1536 + block * 4).unwrap();
        let at = u64::from(u32::from_be_bytes(entry)) * 512;
        let mut bits = [0; 512];
        file.read_exact_at(&mut bits, at).unwrap();
        for sector in (0..4096u64).filter(|s| bits[*s as usize / 8] & (0x80 >> (s % 8)) == 0) {
            assert_eq!(raw.read(block * 2 * MIB + sector * 512, 512), [0; 512], "block {block}, sector {sector}");
        }
    }
}

#[test]
fn freed_blocks_are_reused() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let raw = convert(dir, 64 * MIB, &[], "force_size=on");
    let path = dir.join("image.vhd");
    let image = open(&path, true);
    let fill = |range: std::ops::Range<u64>, byte: u8| {
        for block in range {
            image.write(&[IoSlice::new(&[byte; 700_000])], block * 2 * MIB + 1000).unwrap();
            raw.file.write_all_at(&[byte; 700_000], block * 2 * MIB + 1000).unwrap();
        }
        image.flush().unwrap();
    };
    fill(0..10, 1);
    let len = std::fs::metadata(&path).unwrap().len();
    for round in 2..6u8 {
        let at = u64::from(round % 2) * 20 * MIB;
        let other = (20 * MIB - at) / (2 * MIB);
        if round % 2 == 0 {
            image.discard(at, 20 * MIB).unwrap()
        } else {
            image.zero(at, 20 * MIB, ZeroMode::MayUnmap).unwrap()
        }
        raw.file.write_all_at(&vec![0; 20 << 20], at).unwrap();
        image.flush().unwrap();
        image.write(&[IoSlice::new(&[9])], 63 * MIB).unwrap();
        raw.file.write_all_at(&[9], 63 * MIB).unwrap();
        image.flush().unwrap();
        fill(other..other + 10, round);
        assert_reads("reused", &image, &raw);
    }
    let now = std::fs::metadata(&path).unwrap().len();
    assert!(now <= len + 3 * MIB, "the file grew from {len} to {now}");
    image.discard(0, 20 * MIB).unwrap();
    raw.file.write_all_at(&vec![0; 20 << 20], 0).unwrap();
    image.close().unwrap();
    drop(image);
    qemu_compares(dir, &raw);
    // Another session finds the gaps.
    let image = open(&path, true);
    image.write(&[IoSlice::new(&[3; 5000])], 41 * MIB).unwrap();
    raw.file.write_all_at(&[3; 5000], 41 * MIB).unwrap();
    image.close().unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), now);
    assert_reads("reused", &image, &raw);
    drop(image);
    qemu_compares(dir, &raw);
}

fn grown(from: u64, to: &[u64], options: &str) {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut pieces = vec![(0, 2 * MIB), (from - 2 * MIB, 2 * MIB)];
    let mut raw = convert(dir, from, &pieces, options);
    let path = dir.join("image.vhd");
    let image = open(&path, true);
    assert_eq!(image.grow(from - 512).unwrap_err().kind(), Kind::InvalidOption);
    assert_eq!(image.grow(2041 * GIB).unwrap_err().kind(), Kind::InvalidOption);
    for (index, size) in to.iter().enumerate() {
        random_operations(options, &image, &raw, &Places::new(&pieces), index as u64, 60);
        image.grow(*size).unwrap_or_else(|e| panic!("{}", e.chain()));
        raw.file.set_len(*size).unwrap();
        raw.size = *size;
        pieces.push((size - 3 * MIB, 3 * MIB));
        assert_reads(options, &image, &raw);
        random_operations(options, &image, &raw, &Places::new(&pieces), 100 + index as u64, 60);
    }
    image.close().unwrap();
    drop(image);
    qemu_reads(dir, "vpc", "image.vhd", &raw, &pieces);
    let info: serde_json::Value = serde_json::from_str(&qemu_img(dir, &["info", "-f", "vpc", "--output=json", "image.vhd"])).unwrap();
    assert_eq!(info["virtual-size"].as_u64(), Some(raw.size));
    let image = open(&path, true);
    random_operations(options, &image, &raw, &Places::new(&pieces), 200, 60);
    assert_reads(options, &image, &raw);
    let report = image.check(false).unwrap();
    assert_eq!(report.corruptions, 0, "{:?}", report.notes);
}

#[test]
fn images_grow() {
    grown(10 * MIB + 1024, &[11 * MIB + 512, 40 * MIB], "force_size=on");
    grown(10 * MIB + 1024, &[300 * MIB, 5 * GIB, 900 * GIB], "force_size=on");
    grown(67_125_248, &[70 * MIB], "subformat=dynamic");
    grown(10 * MIB + 1024, &[11 * MIB + 512, 40 * MIB], "force_size=on,subformat=fixed");
}

#[test]
fn damage_is_found_and_mended() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let path = dir.join("image.vhd");
    let raw = convert(dir, 20 * MIB, &[(0, 20 * MIB)], "force_size=on");
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let entry = |index: u64| {
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, 1536 + index * 4).unwrap();
        u32::from_be_bytes(bytes)
    };
    let put = |index: u64, value: u32| file.write_all_at(&value.to_be_bytes(), 1536 + index * 4).unwrap();
    put(3, entry(2)); // two blocks in one place
    put(5, 0x7F00_0000); // beyond the end
    put(7, 2); // in the header
    file.set_len(file.metadata().unwrap().len() - MIB).unwrap(); // cut in block 9, with the footer
    let image = open(&path, true);
    assert_eq!(foreign::read(&image, 0, 6 * MIB), raw.read(0, 6 * MIB));
    for block in [5, 7] {
        let mut byte = [0];
        let error = image.read(&mut [std::io::IoSliceMut::new(&mut byte)], block * 2 * MIB).expect_err("damaged");
        assert_eq!(error.kind(), Kind::Corrupt, "{}", error.chain());
    }
    let error = image.write(&[IoSlice::new(b"x")], 0).expect_err("damaged images are not written to");
    assert_eq!(error.kind(), Kind::Corrupt, "{}", error.chain());
    drop(image);
    let report = open(&path, false).check(false).unwrap();
    assert_eq!((report.corruptions, report.corruptions_fixed), (4, 0), "{:?}", report.notes);
    let image = open(&path, true);
    let report = image.check(true).unwrap();
    assert_eq!((report.corruptions, report.corruptions_fixed), (4, 4), "{:?}", report.notes);
    assert_eq!(image.check(false).unwrap().corruptions, 0);
    for block in [5, 7] {
        raw.file.write_all_at(&vec![0; 2 << 20], block * 2 * MIB).unwrap();
    }
    raw.file.write_all_at(&raw.read(4 * MIB, 2 * MIB), 6 * MIB).unwrap();
    // A footer of 512 bytes was cut with the last MiB.
    raw.file.write_all_at(&vec![0; MIB as usize - 512], 19 * MIB + 512).unwrap();
    assert_reads("mended", &image, &raw);
    random_operations("mended", &image, &raw, &Places::whole(raw.size), 1, 100);
    assert_reads("mended", &image, &raw);
    image.close().unwrap();
    drop(image);
    qemu_compares(dir, &raw);
    libvhdi_agrees(dir, &["image.vhd"], &raw);
}

/// A file that was cut inside the last sector of its last block: that sector cannot be read, so the image is not in order, and nothing is written to it before it
/// is mended. The place where a footer belongs, at the next whole sector, once passed for the end of what is there.
#[test]
fn a_file_that_ends_inside_a_sector_is_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let path = dir.join("image.vhd");
    let raw = convert(dir, 4 * MIB, &[(0, 4 * MIB)], "force_size=on");
    let file = File::options().read(true).write(true).open(&path).unwrap();
    file.set_len(file.metadata().unwrap().len() - 512 - 100).unwrap();
    let image = open(&path, true);
    let error = image.read(&mut [std::io::IoSliceMut::new(&mut [0; 512])], 4 * MIB - 512).expect_err("it is not there");
    assert_eq!(error.kind(), Kind::Corrupt, "{}", error.chain());
    assert_eq!(image.check(false).unwrap().corruptions, 1);
    let error = image.write(&[IoSlice::new(b"x")], 0).expect_err("damaged images are not written to");
    assert_eq!(error.kind(), Kind::Corrupt, "{}", error.chain());
    let report = image.check(true).unwrap();
    assert_eq!((report.corruptions, report.corruptions_fixed), (1, 1), "{:?}", report.notes);
    assert_eq!(image.check(false).unwrap().corruptions, 0);
    raw.file.write_all_at(&[0; 100], 4 * MIB - 100).unwrap();
    assert_reads("mended", &image, &raw);
    random_operations("mended", &image, &raw, &Places::whole(raw.size), 1, 20);
    image.close().unwrap();
    drop(image);
    qemu_compares(dir, &raw);
}
