//! qcow2 images that were damaged on purpose: our check finds what `qemu-img check` finds, a repair mends it so that `qemu-img check` is content, what was not
//! damaged still reads as it did, and life goes on.

mod qcow2_images;

use formats::{BlockDevice, CheckReport, Image, Kind, OpenOptions};
use qcow2_images::{assert_reads, content, qemu_img, read, run, try_open, try_run, write};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;

/// The bytes of an image file, and where in them is what.
struct File {
    bytes: Vec<u8>,
}

impl File {
    fn be(&self, at: u64, len: usize) -> u64 {
        self.bytes[at as usize..at as usize + len].iter().fold(0, |n, b| n << 8 | u64::from(*b))
    }

    fn put(&mut self, at: u64, value: u64, len: usize) {
        self.bytes[at as usize..at as usize + len].copy_from_slice(&value.to_be_bytes()[8 - len..]);
    }

    fn cluster(&self) -> u64 {
        1 << self.be(20, 4)
    }

    fn clusters(&self) -> u64 {
        (self.bytes.len() as u64).div_ceil(self.cluster())
    }

    fn l1_entry(&self, index: u64) -> u64 {
        self.be(40, 8) + index * 8
    }

    /// Where the L2 entry of a guest cluster is.
    fn l2_entry(&self, guest_cluster: u64) -> u64 {
        let per_table = self.cluster() / 8;
        let table = self.be(self.l1_entry(guest_cluster / per_table), 8) & OFFSET;
        assert!(table != 0);
        table + guest_cluster % per_table * 8
    }

    fn guest_clusters(&self) -> u64 {
        self.be(24, 8).div_ceil(self.cluster())
    }

    /// Guest clusters with data of their own.
    fn data(&self) -> Vec<u64> {
        let all = 0..self.guest_clusters();
        all.filter(|c| self.be(self.l1_entry(c / (self.cluster() / 8)), 8) & OFFSET != 0)
            .filter(|c| {
                let raw = self.be(self.l2_entry(*c), 8);
                raw & OFFSET != 0 && raw & 1 == 0 && raw >> 62 & 1 == 0
            })
            .collect()
    }

    /// Bytes of a refcount.
    fn width(&self) -> u64 {
        if self.be(4, 4) < 3 { 2 } else { (1 << self.be(96, 4)) / 8 }
    }

    fn refcount_at(&self, host_cluster: u64) -> u64 {
        let per_block = self.cluster() / self.width();
        let block = self.be(self.be(48, 8) + host_cluster / per_block * 8, 8);
        assert!(block != 0);
        block + host_cluster % per_block * self.width()
    }

    fn refcount(&self, host_cluster: u64) -> u64 {
        self.be(self.refcount_at(host_cluster), self.width() as usize)
    }

    fn set_refcount(&mut self, host_cluster: u64, count: u64) {
        self.put(self.refcount_at(host_cluster), count, self.width() as usize);
    }

    fn host_cluster(&self, guest_cluster: u64) -> u64 {
        (self.be(self.l2_entry(guest_cluster), 8) & OFFSET) / self.cluster()
    }

    fn set_incompatible(&mut self, bit: u8) {
        assert!(self.be(4, 4) >= 3);
        self.bytes[79] |= bit;
    }

    /// The guest bytes of a guest cluster.
    fn range(&self, guest_cluster: u64) -> Range<usize> {
        let (at, size) = (guest_cluster * self.cluster(), self.be(24, 8));
        at as usize..(at + self.cluster()).min(size) as usize
    }
}

/// What a damage did to the guest's bytes.
#[derive(Default)]
struct Harm {
    /// Read as something else, before and after.
    changed: Vec<(Range<usize>, Vec<u8>)>,
    /// Cannot be read any more, and are zeros after a repair.
    lost: Vec<Range<usize>>,
}

const VARIANTS: [(&str, &str); 5] = [
    ("default", "cluster_size=64k"),
    ("small", "cluster_size=4k"),
    ("v2", "compat=0.10,cluster_size=16k"),
    ("wide", "refcount_bits=64,cluster_size=512"),
    ("narrow", "refcount_bits=8,cluster_size=4k"),
];

fn qemu_counts(dir: &Path) -> (u64, u64) {
    let output = try_run(dir, "qemu-img", &["check", "-f", "qcow2", "--output=json", "image"]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|e| panic!("qemu-img check: {e}: {}", String::from_utf8_lossy(&output.stderr)));
    let count = |key: &str| json[key].as_u64().unwrap_or(0);
    (count("corruptions"), count("leaks"))
}

fn for_repair(path: &Path) -> Arc<Image> {
    let options = OpenOptions { repair: true, ..OpenOptions::new(path).format("qcow2") };
    formats::open(&options).unwrap_or_else(|e| panic!("cannot be opened for repair: {}", e.chain()))
}

fn left(report: &CheckReport) -> (u64, u64) {
    (report.corruptions - report.corruptions_fixed, report.leaks - report.leaks_fixed)
}

/// Makes images of every variant (`v3`: but for version 2), damages them, compares what is found, and mends them.
fn mended(v3: bool, snapshot: bool, damage: impl Fn(&mut File, &[u8], &mut StdRng) -> Harm) {
    for (name, options) in VARIANTS {
        if v3 && name == "v2" {
            continue;
        }
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let mut want = content((1 << 20) + 3000 / 512 * 512, 7);
        std::fs::write(dir.join("plain"), &want).unwrap();
        qemu_img(dir, &["convert", "-q", "-f", "raw", "-O", "qcow2", "-o", options, "plain", "image"]);
        if snapshot {
            qemu_img(dir, &["snapshot", "-c", "one", "image"]);
            run(dir, "qemu-io", &["-f", "qcow2", "-c", "write -P 7 100k 200k", "image"]);
            want[100 << 10..300 << 10].fill(7);
        }
        let path = dir.join("image");
        let mut file = File { bytes: std::fs::read(&path).unwrap() };
        let harm = damage(&mut file, &want, &mut StdRng::seed_from_u64(1));
        std::fs::write(&path, &file.bytes).unwrap();
        harm.changed.iter().for_each(|(range, bytes)| want[range.clone()].copy_from_slice(bytes));

        let theirs = qemu_counts(dir);
        let image = try_open(&path, false).unwrap_or_else(|e| panic!("{name}: {}", e.chain()));
        let report = image.check(false).unwrap();
        assert_eq!(
            (report.corruptions, report.leaks),
            theirs,
            "{name}: QEMU finds so many corruptions and leaks; ours: {:?}",
            report.notes
        );
        let mut at = 0;
        for lost in harm.lost.iter().chain([&(want.len()..want.len())]) {
            assert!(read(&*image, at as u64, lost.start - at) == want[at..lost.start], "{name}: undamaged data of a damaged image");
            at = lost.end;
        }
        drop(image);

        let image = for_repair(&path);
        let report = image.check(true).unwrap_or_else(|e| panic!("{name}: {}", e.chain()));
        assert_eq!(left(&report), (0, 0), "{name}: {:?}", report.notes);
        assert!(theirs == (0, 0) || report.corruptions_fixed + report.leaks_fixed > 0, "{name}: nothing was found to mend");
        image.close().unwrap();
        drop(image);
        assert_eq!(qemu_counts(dir), (0, 0), "{name}: QEMU after the repair");
        run(dir, "qemu-img", &["check", "-q", "-f", "qcow2", "image"]);
        harm.lost.iter().for_each(|lost| want[lost.clone()].fill(0));
        std::fs::write(dir.join("plain"), &want).unwrap();
        run(dir, "qemu-img", &["compare", "-f", "raw", "-F", "qcow2", "plain", "image"]);

        // Life goes on.
        let image = try_open(&path, true).unwrap_or_else(|e| panic!("{name}: {}", e.chain()));
        let mut rng = StdRng::seed_from_u64(2);
        for _ in 0..40 {
            let at = rng.random_range(0..want.len() - 10);
            let end = (at + rng.random_range(1..60_000)).min(want.len());
            rng.fill_bytes(&mut want[at..end]);
            write(&*image, at as u64, &want[at..end]);
        }
        assert_reads(name, &image, &want, 3);
        image.close().unwrap();
        drop(image);
        assert_eq!(qemu_counts(dir), (0, 0), "{name}: QEMU after more writes");
        if snapshot {
            // The snapshot still shows its state.
            qemu_img(dir, &["convert", "-q", "-l", "snapshot.name=one", "-f", "qcow2", "-O", "raw", "image", "then"]);
            let mut then = content((1 << 20) + 3000 / 512 * 512, 7);
            harm.lost.iter().for_each(|lost| then[lost.clone()].fill(0));
            assert!(std::fs::read(dir.join("then")).unwrap() == then, "{name}: the snapshot");
        }
    }
}

/// A cluster that is the guest's and the image's at once, with refcounts that agree to that: `qemu-img check` has nothing against it, but the data are lost as
/// soon as the metadata change. A repair gives the guest a copy of what its data are by now.
#[test]
fn guest_data_in_clusters_of_metadata() {
    type Place = fn(&File) -> u64;
    let places: [(&str, Place); 4] = [
        ("L1 table", |f| f.be(40, 8)),
        ("refcount table", |f| f.be(48, 8)),
        ("refcount block", |f| f.be(f.be(48, 8), 8)),
        ("L2 table", |f| f.be(f.l1_entry(0), 8) & OFFSET),
    ];
    for (what, place) in places {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let mut want = content(1 << 20, 7);
        std::fs::write(dir.join("plain"), &want).unwrap();
        qemu_img(dir, &["convert", "-q", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", "plain", "image"]);
        let path = dir.join("image");
        let mut file = File { bytes: std::fs::read(&path).unwrap() };
        let guest = file.data()[9];
        let (host, was) = (place(&file), file.host_cluster(guest));
        file.put(file.l2_entry(guest), host, 8);
        file.set_refcount(was, 0);
        file.set_refcount(host / file.cluster(), 2);
        // The flag of an entry that names the cluster tells its refcount.
        for entry in (0..8).map(|i| file.l1_entry(i)).collect::<Vec<_>>() {
            if file.be(entry, 8) & OFFSET == host {
                file.put(entry, host, 8);
            }
        }
        std::fs::write(&path, &file.bytes).unwrap();

        let report = try_open(&path, false).unwrap().check(false).unwrap();
        assert_eq!(report.corruptions, 1, "{what}: {:?}", report.notes);
        let image = for_repair(&path);
        let report = image.check(true).unwrap();
        assert_eq!(left(&report), (0, 0), "{what}: {:?}", report.notes);
        want[file.range(guest)].copy_from_slice(&read(&*image, guest * 4096, 4096));
        image.close().unwrap();
        drop(image);
        let image = try_open(&path, true).unwrap();
        assert_eq!(image.check(false).unwrap().corruptions, 0, "{what}");
        want[..60_000].fill(3);
        write(&*image, 0, &want[..60_000]);
        assert_reads(what, &image, &want, 3);
        image.close().unwrap();
        drop(image);
        assert_eq!(qemu_counts(dir), (0, 0), "{what}: QEMU after the repair");
    }
}

fn some(data: &[u64], rng: &mut StdRng) -> u64 {
    data[rng.random_range(0..data.len())]
}

#[test]
fn leaked_clusters() {
    mended(false, false, |file, _, _| {
        let (end, more) = (file.clusters(), 3 * file.cluster() as usize);
        file.bytes.resize(end as usize * file.cluster() as usize, 0);
        file.bytes.resize(file.bytes.len() + more, 0x11);
        (end..end + 3).for_each(|cluster| file.set_refcount(cluster, 1));
        Harm::default()
    });
}

#[test]
fn refcounts_too_high() {
    mended(false, false, |file, _, rng| {
        let data = file.data();
        for count in [2, 3, 250] {
            let cluster = file.host_cluster(some(&data, rng));
            file.set_refcount(cluster, count);
        }
        // The header, too.
        file.set_refcount(0, 2);
        Harm::default()
    });
}

#[test]
fn refcounts_too_low() {
    mended(false, false, |file, _, rng| {
        let data = file.data();
        for _ in 0..3 {
            let cluster = file.host_cluster(some(&data, rng));
            file.set_refcount(cluster, 0);
        }
        Harm::default()
    });
}

#[test]
fn refcounts_of_shared_clusters_too_low_and_too_high() {
    mended(false, true, |file, _, rng| {
        let shared: Vec<u64> = file.data().into_iter().filter(|c| file.refcount(file.host_cluster(*c)) == 2).collect();
        for count in [1, 0, 5] {
            let cluster = file.host_cluster(some(&shared, rng));
            file.set_refcount(cluster, count);
        }
        Harm::default()
    });
}

#[test]
fn copied_flags() {
    mended(false, true, |file, _, rng| {
        let data = file.data();
        for _ in 0..5 {
            let at = file.l2_entry(some(&data, rng));
            file.put(at, file.be(at, 8) ^ COPIED, 8);
        }
        let at = file.l1_entry(0);
        file.put(at, file.be(at, 8) ^ COPIED, 8);
        Harm::default()
    });
}

/// QEMU counts the leak of the cluster that nothing refers to any more, and cannot mend the entry.
#[test]
fn entries_beyond_the_end_of_the_file() {
    mended(false, false, |file, _, rng| {
        let guest = some(&file.data(), rng);
        let at = file.l2_entry(guest);
        let far = (file.clusters() + 7) * file.cluster();
        file.put(at, far | COPIED, 8);
        Harm { lost: vec![file.range(guest)], ..Harm::default() }
    });
}

#[test]
fn a_file_that_was_cut() {
    mended(false, false, |file, _, _| {
        let data = file.data();
        // Data are last, perhaps but for refcount blocks.
        let last = data.iter().map(|c| file.host_cluster(*c)).max().unwrap();
        let end = last * file.cluster();
        let lost = vec![file.range(*data.iter().find(|c| file.host_cluster(**c) == last).unwrap())];
        file.bytes.truncate(end as usize);
        Harm { lost, ..Harm::default() }
    });
}

#[test]
fn two_entries_to_one_cluster() {
    mended(false, false, |file, want, _| {
        let data: Vec<u64> = file.data().into_iter().filter(|c| file.range(*c).len() as u64 == file.cluster()).collect();
        let (first, second) = (data[0], data[data.len() / 2]);
        let raw = file.be(file.l2_entry(first), 8);
        file.put(file.l2_entry(second), raw, 8);
        Harm { changed: vec![(file.range(second), want[file.range(first)].to_vec())], ..Harm::default() }
    });
}

/// The same with refcounts that agree to it. A write to one of them would leave the other with the wrong flag.
#[test]
fn two_entries_to_one_cluster_with_its_refcount() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut want = content(1 << 20, 7);
    std::fs::write(dir.join("plain"), &want).unwrap();
    qemu_img(dir, &["convert", "-q", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", "plain", "image"]);
    let path = dir.join("image");
    let mut file = File { bytes: std::fs::read(&path).unwrap() };
    let (first, second) = (file.data()[3], file.data()[9]);
    let (host, was) = (file.host_cluster(first), file.host_cluster(second));
    [first, second].iter().for_each(|guest| file.put(file.l2_entry(*guest), host * file.cluster(), 8));
    file.set_refcount(was, 0);
    file.set_refcount(host, 2);
    std::fs::write(&path, &file.bytes).unwrap();
    want.copy_within(file.range(first), file.range(second).start);

    assert_eq!(qemu_counts(dir), (0, 0));
    let report = try_open(&path, false).unwrap().check(false).unwrap();
    assert_eq!(report.corruptions, 1, "{:?}", report.notes);
    let image = for_repair(&path);
    let report = image.check(true).unwrap();
    assert_eq!(left(&report), (0, 0), "{:?}", report.notes);
    want[file.range(first)].fill(3);
    write(&*image, file.range(first).start as u64, &want[file.range(first)]);
    assert_reads("mended", &image, &want, 3);
    assert_eq!(image.check(false).unwrap().corruptions, 0);
    image.close().unwrap();
    drop(image);
    assert_eq!(qemu_counts(dir), (0, 0), "QEMU after the repair");
}

#[test]
fn a_refcount_table_entry_that_is_gone() {
    mended(false, true, |file, _, _| {
        file.put(file.be(48, 8), 0, 8);
        Harm::default()
    });
}

#[test]
fn a_refcount_block_beyond_the_end_of_the_file() {
    mended(false, false, |file, _, _| {
        let far = (file.clusters() + 100) * file.cluster();
        file.put(file.be(48, 8), far, 8);
        Harm::default()
    });
}

#[test]
fn a_refcount_block_of_noise() {
    mended(false, false, |file, _, rng| {
        let (at, len) = (file.be(file.be(48, 8), 8) as usize, file.cluster() as usize);
        rng.fill_bytes(&mut file.bytes[at..at + len.min(4096)]);
        Harm::default()
    });
}

/// As a writer with lazy refcounts leaves an image that dies. An ordinary opening for writing mends it, too.
#[test]
fn the_dirty_bit_with_stale_refcounts() {
    let damage = |file: &mut File, _: &[u8], _: &mut StdRng| {
        file.set_incompatible(1);
        for guest in file.data().into_iter().step_by(2) {
            let cluster = file.host_cluster(guest);
            file.set_refcount(cluster, 0);
        }
        Harm::default()
    };
    mended(true, false, damage);
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let want = content(1 << 20, 7);
    std::fs::write(dir.join("plain"), &want).unwrap();
    qemu_img(dir, &["convert", "-f", "raw", "-O", "qcow2", "-o", "lazy_refcounts=on", "plain", "image"]);
    let mut file = File { bytes: std::fs::read(dir.join("image")).unwrap() };
    damage(&mut file, &want, &mut StdRng::seed_from_u64(1));
    std::fs::write(dir.join("image"), &file.bytes).unwrap();
    let image = try_open(&dir.join("image"), true).unwrap();
    assert_reads("opened", &image, &want, 1);
    image.close().unwrap();
    drop(image);
    assert_eq!(qemu_counts(dir), (0, 0));
    assert_eq!(File { bytes: std::fs::read(dir.join("image")).unwrap() }.bytes[79], 0, "the bit is gone");
}

/// Somebody found the image damaged: it is read, not written, until it is mended.
#[test]
fn the_corrupt_bit() {
    mended(true, true, |file, _, rng| {
        file.set_incompatible(2);
        let data = file.data();
        let (low, high) = (file.host_cluster(some(&data, rng)), file.host_cluster(some(&data, rng)));
        file.set_refcount(low, 0);
        file.set_refcount(high, 9);
        Harm::default()
    });
    // With nothing wrong any more.
    mended(true, false, |file, _, _| {
        file.set_incompatible(2);
        Harm::default()
    });
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    qemu_img(dir, &["create", "-q", "-f", "qcow2", "image", "1M"]);
    let path = dir.join("image");
    let mut file = File { bytes: std::fs::read(&path).unwrap() };
    file.set_incompatible(2);
    std::fs::write(&path, &file.bytes).unwrap();
    let error = try_open(&path, true).err().expect("it is marked as damaged");
    assert_eq!(error.kind(), Kind::Corrupt, "{}", error.chain());
    assert!(error.chain().contains("check --repair"), "{}", error.chain());
    let image = for_repair(&path);
    image.write(&[std::io::IoSlice::new(b"x")], 0).expect_err("not before it is mended");
    image.check(true).unwrap();
    image.write(&[std::io::IoSlice::new(b"x")], 0).expect("it is in order");
}

/// What cannot be mended is said to be left, and the image stays closed to writers.
#[test]
fn damage_that_cannot_be_mended_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let want = content(1 << 20, 7);
    std::fs::write(dir.join("plain"), &want).unwrap();
    qemu_img(dir, &["convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", "plain", "image"]);
    let path = dir.join("image");
    let mut file = File { bytes: std::fs::read(&path).unwrap() };
    file.set_incompatible(2);
    let data = file.data();
    // Bits that no version of the format gives a meaning: whose data the cluster holds is anybody's guess.
    let at = file.l2_entry(data[3]);
    file.put(at, file.be(at, 8) | 1 << 58, 8);
    let low = file.host_cluster(data[5]);
    file.set_refcount(low, 0);
    let high = file.host_cluster(data[7]);
    file.set_refcount(high, 4);
    std::fs::write(&path, &file.bytes).unwrap();
    let image = for_repair(&path);
    let report = image.check(true).unwrap();
    assert!(report.corruptions_fixed >= 1, "{:?}", report.notes);
    assert_eq!(report.corruptions - report.corruptions_fixed, 1, "{:?}", report.notes);
    image.write(&[std::io::IoSlice::new(b"x")], 0).expect_err("it is still damaged");
    image.close().unwrap();
    drop(image);
    try_open(&path, true).err().expect("it is still marked");
}
