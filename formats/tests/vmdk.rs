//! VMDK images: content ids and parents, extents of every type, redundant tables, damage and repair.

mod foreign;

use foreign::operations::{Places, random_operations};
use foreign::{MIB, Raw, assert_reads, open, qemu_img, read, try_open, try_run};
use formats::drivers::{self, Opened, Request};
use formats::gate::Gate;
use formats::image::Parts;
use formats::overlay::Overlay;
use formats::redo::{self, file::RedoDirectory};
use formats::store::recording::{Fate, Journal, RecordingStore, apply, changes_at};
use formats::store::{MemoryStore, Store};
use formats::{BlockDevice, Cache, Image, Kind, OpenOptions, ZeroMode};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::fs::{self, File};
use std::io::IoSlice;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

fn write(image: &Image, at: u64, bytes: &[u8]) -> formats::Result<()> {
    image.write(&[IoSlice::new(bytes)], at)
}

/// `image.vmdk` with the content of the returned file.
fn convert(dir: &Path, size: u64, data: &[(u64, u64)], options: &str) -> Raw {
    let raw = Raw::new(dir.join("raw"), size, 7, data);
    qemu_img(dir, &["convert", "-f", "raw", "-O", "vmdk", "-o", options, "raw", "image.vmdk"]);
    raw
}

fn compares(dir: &Path) {
    qemu_img(dir, &["compare", "-f", "raw", "-F", "vmdk", "raw", "image.vmdk"]);
    qemu_img(dir, &["check", "-f", "vmdk", "image.vmdk"]);
}

fn cid(path: &Path) -> String {
    let bytes = fs::read(path).unwrap();
    let at = bytes.windows(5).position(|w| w == b"\nCID=").unwrap() + 5;
    // QEMU writes as many digits as are needed.
    let digits = bytes[at..].split(|b| !b.is_ascii_hexdigit()).next().unwrap();
    format!("{:08x}", u32::from_str_radix(std::str::from_utf8(digits).unwrap(), 16).unwrap())
}

fn refused(path: &Path, writable: bool) -> formats::Error {
    try_open(path, writable).err().unwrap_or_else(|| panic!("{} was opened", path.display()))
}

#[test]
fn the_first_write_changes_the_content_id() {
    for subformat in ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse"] {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let raw = convert(dir, 3 * MIB, &[(0, 2 * MIB)], &format!("subformat={subformat}"));
        let path = dir.join("image.vmdk");
        qemu_img(dir, &["create", "-q", "-f", "vmdk", "-b", "image.vmdk", "-F", "vmdk", "child.vmdk"]);
        let first = cid(&path);
        let image = open(&path, true);
        image.flush().unwrap();
        image.close().unwrap();
        drop(image);
        assert_eq!(cid(&path), first, "{subformat}: nothing was written");
        assert_reads(subformat, &open(&dir.join("child.vmdk"), true), &raw);
        let image = open(&path, true);
        write(&image, 5000, b"changed").unwrap();
        let second = cid(&path);
        assert_ne!(second, first, "{subformat}");
        write(&image, 9000, b"changed").unwrap();
        assert_eq!((cid(&path), image.format().identity().unwrap()), (second.clone(), second.clone()), "{subformat}: once");
        image.close().unwrap();
        drop(image);
        raw.file.write_all_at(b"changed", 5000).unwrap();
        raw.file.write_all_at(b"changed", 9000).unwrap();
        compares(dir);
        // Who was made on it notices, here and in QEMU.
        let error = refused(&dir.join("child.vmdk"), false);
        let text = error.chain();
        assert!(error.kind() == Kind::Corrupt && text.contains(&first) && text.contains(&second) && text.contains("parentCID"), "{text}");
        let (ok, _) = try_run(dir, "qemu-io", &["-f", "vmdk", "-c", "read 0 512", "child.vmdk"]);
        assert!(!ok, "QEMU reads a child whose parent has changed");
    }
}

#[test]
fn parents_are_found_beside_their_children() {
    let dir = tempfile::tempdir().unwrap();
    let other = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let raw = convert(dir, 3 * MIB, &[(0, 2 * MIB)], "subformat=monolithicSparse");
    let away = other.path().join("image.vmdk");
    fs::rename(dir.join("image.vmdk"), &away).unwrap();
    qemu_img(dir, &["create", "-q", "-f", "vmdk", "-b", away.to_str().unwrap(), "-F", "vmdk", "child.vmdk"]);
    // By an absolute name, outside the image's tree.
    let error = refused(&dir.join("child.vmdk"), false);
    assert!(error.kind() == Kind::Denied && error.chain().contains("--allow"), "{}", error.chain());
    let gate = Gate { allowed: vec![other.path().to_path_buf()], ..Gate::default() };
    let options = OpenOptions { gate, ..OpenOptions::new(dir.join("child.vmdk")).read_only(true) };
    assert_reads("allowed", &formats::open(&options).unwrap(), &raw);
    // Moved with its child.
    fs::rename(&away, dir.join("image.vmdk")).unwrap();
    let image = open(&dir.join("child.vmdk"), true);
    assert_reads("moved", &image, &raw);
    random_operations("moved", &image, &raw, &Places::whole(raw.size), 3, 100);
    assert_reads("moved", &image, &raw);
}

fn descriptor(dir: &Path, lines: &str) {
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"custom\"\n{lines}\nddb.adapterType=\"ide\"\n"
    );
    fs::write(dir.join("image.vmdk"), text).unwrap();
}

#[test]
fn extents_of_every_access() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    fs::write(dir.join("a"), vec![1; 8192]).unwrap();
    fs::write(dir.join("b"), vec![2; 8192]).unwrap();
    descriptor(dir, "RW 16 FLAT \"a\" 0\nRW 16 ZERO\nRDONLY 8 FLAT \"b\" 4\nNOACCESS 8 FLAT \"c\" 0\nRDONLY 8 FLAT \"a\" 4");
    let path = dir.join("image.vmdk");
    let error = refused(&path, true);
    assert!(error.chain().contains("different access"), "{}", error.chain());
    descriptor(dir, "RW 16 FLAT \"a\" 0\nRW 16 ZERO\nRDONLY 8 FLAT \"b\" 4\nNOACCESS 8 ZERO");
    let image = open(&path, true);
    assert_eq!(image.size(), 48 * 512);
    assert_eq!(read(&image, 0, 8192), vec![1; 8192]);
    assert_eq!(read(&image, 8192, 8192), vec![0; 8192]);
    assert_eq!(read(&image, 16384, 4096), vec![2; 4096]);
    let mut bytes = [0; 512];
    let hidden = image.read(&mut [std::io::IoSliceMut::new(&mut bytes)], 20480).unwrap_err();
    assert!(hidden.chain().contains("not accessible"), "{}", hidden.chain());
    // Over the boundary of two: the first part alone is written, the rest is refused by name.
    write(&image, 100, &[7; 50]).unwrap();
    assert_eq!(write(&image, 9000, &[7; 50]).unwrap_err().kind(), Kind::ReadOnly);
    assert_eq!(write(&image, 17000, &[7; 50]).unwrap_err().kind(), Kind::ReadOnly);
    assert_eq!(image.zero(16384, 512, ZeroMode::MayUnmap).unwrap_err().kind(), Kind::ReadOnly);
    image.zero(0, 16384, ZeroMode::MayUnmap).unwrap();
    assert_eq!(read(&image, 0, 16384), vec![0; 16384]);
    assert_eq!(fs::read(dir.join("b")).unwrap(), vec![2; 8192]);
}

#[test]
fn extents_lie_in_the_images_tree() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), vec![1; 8192]).unwrap();
    let dir = outside.path().join("images");
    fs::create_dir(&dir).unwrap();
    let path = dir.join("image.vmdk");
    let secret = outside.path().join("secret");
    std::os::unix::fs::symlink(&secret, dir.join("link")).unwrap();
    for name in ["../secret", secret.to_str().unwrap(), "link", "/dev/zero", "json:{}", "nbd://localhost/x", "."] {
        for (line, writable) in [("FLAT", false), ("FLAT", true), ("VMFS", false), ("SPARSE", false)] {
            descriptor(&dir, &format!("RW 16 {line} \"{name}\" 0"));
            let error = refused(&path, writable);
            assert_eq!(error.kind(), Kind::Denied, "{name} {line}: {}", error.chain());
        }
    }
    descriptor(&dir, "RW 16 FLAT \"missing\" 0");
    assert_eq!(refused(&path, false).kind(), Kind::NotFound);
    descriptor(&dir, "RW 16 FLAT \"image.vmdk\" 0");
    assert!(refused(&path, false).chain().contains("circle"));
    fs::write(dir.join("short"), vec![1; 8191]).unwrap();
    descriptor(&dir, "RW 16 FLAT \"short\" 0");
    assert!(refused(&path, false).chain().contains("cut short"));
    // More extents than a chain may have images.
    let lines: Vec<String> = (0..500).map(|n| format!("RW 1 FLAT \"part{n}\"")).collect();
    (0..500).for_each(|n| fs::write(dir.join(format!("part{n}")), vec![n as u8; 512]).unwrap());
    descriptor(&dir, &lines.join("\n"));
    let image = open(&path, true);
    write(&image, 1000, &[0xAA; 100_000]).unwrap();
    assert_eq!(read(&image, 100_990, 30), [vec![0xAA; 10], vec![197; 20]].concat());
}

/// The tables that the two directories of a hosted extent lead to.
fn tables(file: &File) -> Vec<[(u64, Vec<u8>); 2]> {
    let mut head = [0; 512];
    file.read_exact_at(&mut head, 0).unwrap();
    let le64 = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().unwrap());
    let count = le64(12).div_ceil(le64(20) * 512);
    let table = |directory: u64, number: u64| {
        let mut entry = [0; 4];
        file.read_exact_at(&mut entry, directory * 512 + number * 4).unwrap();
        let at = u64::from(u32::from_le_bytes(entry)) * 512;
        let mut bytes = vec![0; 2048];
        if at > 0 {
            file.read_exact_at(&mut bytes, at).unwrap();
        }
        (at, bytes)
    };
    (0..count).map(|number| [table(le64(56), number), table(le64(48), number)]).collect()
}

fn rw(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

#[test]
fn both_directories_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let raw = convert(dir, 100 * MIB + 512, &[(0, 2 * MIB), (70 * MIB, MIB)], "zeroed_grain=on");
    let path = dir.join("image.vmdk");
    let image = open(&path, true);
    random_operations("both", &image, &raw, &Places::whole(raw.size), 5, 300);
    image.close().unwrap();
    drop(image);
    let file = rw(&path);
    for (number, [first, second]) in tables(&file).iter().enumerate() {
        assert!(first.0 != second.0 && first.1 == second.1, "tables {number}");
    }
    compares(dir);
    // One that lags behind is no corruption, is seen, and is brought up to date by the next first write.
    let at = tables(&file)[1][1].0;
    file.write_all_at(&[0; 100], at).unwrap();
    let image = open(&path, true);
    let report = image.check(false).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 1), "{:?}", report.notes);
    assert_reads("lagging", &image, &raw);
    write(&image, 0, &raw.read(0, 512)).unwrap();
    let report = image.check(false).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.notes);
    image.close().unwrap();
    assert!(tables(&file).iter().all(|[first, second]| first.1 == second.1));
}

#[test]
fn tables_are_made_where_there_are_none() {
    for options in ["zeroed_grain=on", "zeroed_grain=off"] {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let raw = convert(dir, 150 * MIB, &[(0, MIB), (140 * MIB, MIB)], options);
        let path = dir.join("image.vmdk");
        let file = rw(&path);
        let mut head = [0; 64];
        file.read_exact_at(&mut head, 0).unwrap();
        for at in [48, 56] {
            let directory = u64::from_le_bytes(head[at..at + 8].try_into().unwrap()) * 512;
            // Tables 1 to 3 are empty.
            file.write_all_at(&[0; 12], directory + 4).unwrap();
        }
        let image = open(&path, true);
        assert_reads(options, &image, &raw);
        random_operations(options, &image, &raw, &Places::whole(raw.size), 6, 200);
        assert_reads(options, &image, &raw);
        let report = image.check(false).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.notes);
        image.close().unwrap();
        drop(image);
        assert!(tables(&file)[1..4].iter().any(|[first, second]| first.0 > 0 && second.0 > 0 && first.1 == second.1));
        compares(dir);
        assert_reads(options, &open(&path, false), &raw);
    }
}

#[test]
fn damage_is_seen_and_mended() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let path = dir.join("image.vmdk");
    for case in ["beyond the end", "over another", "over a table", "the directory", "both directories"] {
        let raw = convert(dir, 100 * MIB, &[(0, 2 * MIB), (40 * MIB, MIB)], "subformat=monolithicSparse");
        let file = rw(&path);
        let found = tables(&file);
        let entry = |number: usize, index: usize| u32::from_le_bytes(found[number][0].1[index * 4..][..4].try_into().unwrap());
        let put = |number: usize, index: u64, value: u32| {
            for copy in &found[number] {
                file.write_all_at(&value.to_le_bytes(), copy.0 + index * 4).unwrap();
            }
        };
        let data = (0..32).find(|n| entry(0, *n) != 0).unwrap();
        // An entry of a grain that is not there.
        let free = (32..512).find(|n| entry(0, *n) == 0).unwrap() as u64;
        let mut lost = None;
        match case {
            "beyond the end" => put(0, free, 0x7000_0000),
            "over another" => {
                put(0, free, entry(0, data));
                let bytes = raw.read(data as u64 * 65536, 65536);
                raw.file.write_all_at(&bytes, free * 65536).unwrap();
            }
            "over a table" => put(0, free, (found[1][0].0 / 512) as u32),
            _ => {
                let mut head = [0; 64];
                file.read_exact_at(&mut head, 0).unwrap();
                for at in if case == "the directory" { vec![56] } else { vec![48, 56] } {
                    let directory = u64::from_le_bytes(head[at..at + 8].try_into().unwrap()) * 512;
                    file.write_all_at(&0x7000_0000_u32.to_le_bytes(), directory + 4).unwrap();
                }
                lost = (case != "the directory").then_some(32 * MIB);
            }
        }
        let image = open(&path, true);
        let report = image.check(false).unwrap();
        assert!(report.corruptions > 0, "{case}");
        // Nothing is made worse.
        let before = fs::read(&path).unwrap();
        assert_eq!(write(&image, 0, b"x").unwrap_err().kind(), Kind::Corrupt, "{case}");
        image.close().unwrap();
        drop(image);
        assert!(before == fs::read(&path).unwrap(), "{case}: a damaged image was changed");
        let image = formats::open(&OpenOptions { repair: true, ..OpenOptions::new(&path) }).unwrap();
        let report = image.check(true).unwrap();
        assert_eq!(report.corruptions, report.corruptions_fixed, "{case}: {:?}", report.notes);
        let again = image.check(false).unwrap();
        assert_eq!((again.corruptions, again.leaks), (0, 0), "{case}: {:?}", again.notes);
        if let Some(at) = lost {
            raw.file.write_all_at(&vec![0; 32 << 20], at).unwrap();
        }
        assert_reads(case, &image, &raw);
        random_operations(case, &image, &raw, &Places::whole(raw.size), 2, 60);
        image.close().unwrap();
        drop(image);
        compares(dir);
    }
}

#[test]
fn streams_are_written_to_by_an_overlay() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let raw = convert(dir, 5 * MIB, &[(0, 2 * MIB)], "subformat=streamOptimized");
    let path = dir.join("image.vmdk");
    let image = open(&path, true);
    assert!(image.limits().read_only);
    assert_eq!(write(&image, 0, b"x").unwrap_err().kind(), Kind::ReadOnly);
    drop(image);
    let before = fs::read(&path).unwrap();
    let overlay = Some(Overlay::Kept { path: dir.join("over.qcow2"), create: true });
    let image = formats::open(&OpenOptions { overlay, ..OpenOptions::new(&path) }).unwrap();
    random_operations("overlay", &image, &raw, &Places::whole(raw.size), 4, 150);
    assert_reads("overlay", &image, &raw);
    image.close().unwrap();
    drop(image);
    assert!(before == fs::read(&path).unwrap());
    qemu_img(dir, &["compare", "-f", "raw", "-F", "qcow2", "raw", "over.qcow2"]);
    // A footer that is not there is told.
    let (ok, text) = try_run(dir, "/usr/bin/python3", &["-c", "import VMDKstream; VMDKstream.convert_to_stream('raw', 'footer.vmdk')"]);
    assert!(ok, "VMDKstream (python3-vmdkstream): {text}");
    let path = dir.join("footer.vmdk");
    assert_reads("footer", &open(&path, false), &raw);
    let file = rw(&path);
    file.set_len(file.metadata().unwrap().len() - 512).unwrap();
    assert!(refused(&path, false).chain().contains("incomplete"));
}

#[test]
fn acknowledged_writes_survive_the_process() {
    let dir = tempfile::tempdir().unwrap();
    let redo = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let raw = convert(dir, 3 * MIB, &[(0, MIB)], "subformat=twoGbMaxExtentSparse");
    let path = dir.join("image.vmdk");
    let options = || OpenOptions {
        // The dead hold no locks.
        gate: Gate { locking: false, ..Gate::default() },
        redo: Some(Arc::new(RedoDirectory::new(redo.path()).unwrap())),
        ..OpenOptions::new(&path)
    };
    let image = formats::open(&options()).unwrap();
    random_operations("first life", &image, &raw, &Places::whole(raw.size), 8, 120);
    write(&image, 2 * MIB, &[0x77; 70_000]).unwrap();
    raw.file.write_all_at(&[0x77; 70_000], 2 * MIB).unwrap();
    // Never closed.
    std::mem::forget(image);
    let logs = fs::read_dir(redo.path()).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).filter(|len| *len > 4096).count();
    assert!(logs > 0, "nothing was pending");
    let image = formats::open(&options()).unwrap();
    assert_reads("second life", &image, &raw);
    image.close().unwrap();
    drop(image);
    compares(dir);
}

#[test]
fn other_programs_are_kept_from_the_extents() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    convert(dir, MIB, &[], "subformat=monolithicFlat");
    let image = open(&dir.join("image.vmdk"), true);
    let (ok, text) = try_run(dir, "qemu-io", &["-f", "raw", "-c", "write 0 512", "image-flat.vmdk"]);
    assert!(!ok && text.contains("lock"), "{text}");
    drop(image);
}

/// A file whose writes are recorded, and the number that it has in the journal.
struct Recorded {
    name: &'static str,
    number: usize,
    base: Vec<u8>,
}

/// Opens the disk whose files are these stores, the first being the descriptor.
fn over(files: &[(&str, Arc<dyn Store>)]) -> formats::Result<Image> {
    let mut open_file = |name: &Path, _: bool| -> formats::Result<Arc<dyn Store>> {
        let found = files.iter().find(|(known, _)| Path::new(known) == name);
        Ok(found.unwrap_or_else(|| panic!("{} is asked for", name.display())).1.clone())
    };
    let request = Request {
        store: files[0].1.clone(),
        path: Path::new("/nowhere/image.vmdk"),
        writable: true,
        repair: false,
        redo: Box::new(redo::None),
        open_file: &mut open_file,
        snapshot_name: None,
    };
    let Opened { format, writeback, parent } = (drivers::by_name("vmdk")?.open)(request)?;
    assert!(parent.is_none());
    let cache = Arc::new(Cache::new(1 << 20));
    Image::new(Parts { format, writeback, parent: None, cache, path: "/nowhere/image.vmdk".into(), discard: true, guard: None })
}

/// Power cuts of a disk of four files, each of which keeps and loses writes on its own: what was flushed is there, in all of them, and check finds nothing.
#[test]
fn power_cuts_of_a_disk_of_many_files() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for name in ["a", "b"] {
        qemu_img(dir, &["create", "-q", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", &format!("{name}.vmdk"), "2M"]);
    }
    fs::write(dir.join("flat"), vec![0; 1 << 20]).unwrap();
    descriptor(dir, "RW 4096 SPARSE \"a-s001.vmdk\"\nRW 2048 FLAT \"flat\" 0\nRW 4096 SPARSE \"b-s001.vmdk\"");
    let names = ["image.vmdk", "a-s001.vmdk", "flat", "b-s001.vmdk"];
    let files: Vec<Recorded> =
        names.into_iter().enumerate().map(|(n, name)| Recorded { name, number: n + 1, base: fs::read(dir.join(name)).unwrap() }).collect();
    let sectors = 10240_u64;
    for seed in 0..if std::env::var_os("FORMATS_TEST_LONG").is_some() { 60 } else { 3 } {
        let mut rng = StdRng::seed_from_u64(seed);
        let journal = Journal::new();
        let stores: Vec<(&str, Arc<dyn Store>)> = files
            .iter()
            .map(|f| (f.name, Arc::new(RecordingStore::new(f.base.clone(), journal.clone(), f.number, f.name)) as Arc<dyn Store>))
            .collect();
        let image = over(&stores).unwrap();
        // Of every sector the values that it was given, each with the place in the journal where that began.
        let mut history: Vec<Vec<(u32, usize)>> = vec![vec![(0, 0)]; sectors as usize];
        let mut flushes: Vec<(usize, usize)> = Vec::new();
        for value in 1..200_u32 {
            let began = journal.len();
            if rng.random_ratio(1, 8) {
                image.flush().unwrap();
                flushes.push((began, journal.len()));
                continue;
            }
            // Often near the boundaries of extents.
            let near = [0, 4096, 6144, rng.random_range(0..sectors)][rng.random_range(0..4)];
            let first = (near + rng.random_range(0..300)).saturating_sub(150).min(sectors - 1);
            let zero = rng.random_ratio(1, 4);
            // Zeroed are whole grains: their space is used again.
            let first = if zero { first / 128 * 128 } else { first };
            let count = if zero { 256 } else { rng.random_range(1..200) }.min(sectors - first);
            let range = first as usize..(first + count) as usize;
            history[range].iter_mut().for_each(|h| h.push((if zero { 0 } else { value }, began)));
            if zero {
                image.zero(first * 512, count * 512, ZeroMode::MayUnmap).unwrap();
            } else {
                write(&image, first * 512, &value.to_le_bytes().repeat((count * 128) as usize)).unwrap();
            }
        }
        let entries = journal.entries();
        drop(image);
        for _ in 0..100 {
            // Half of them during a flush, where the order of things matters.
            let (from, to) = if rng.random() { flushes[rng.random_range(0..flushes.len())] } else { (0, entries.len()) };
            let position = rng.random_range(from..=to);
            let keep = [0.0, 0.1, 0.5, 0.9, 1.0][rng.random_range(0..5)];
            let after: Vec<(&str, Arc<dyn Store>)> = files
                .iter()
                .map(|f| {
                    let mut bytes = f.base.clone();
                    for (_, action, fate) in changes_at(&entries, f.number, position) {
                        if fate == Fate::Durable || rng.random_bool(keep) {
                            apply(action, &mut bytes);
                        }
                    }
                    (f.name, Arc::new(MemoryStore::new(bytes)) as Arc<dyn Store>)
                })
                .collect();
            let image = over(&after).unwrap_or_else(|e| panic!("seed {seed}, cut at {position}: {}", e.chain()));
            let report = image.check(false).unwrap();
            assert_eq!(report.corruptions, 0, "seed {seed}, cut at {position}: {:?}", report.notes);
            let flushed = flushes.iter().filter(|(_, ended)| *ended <= position).map(|(began, _)| *began).max().unwrap_or(0);
            let now = read(&image, 0, sectors * 512);
            for (sector, bytes) in now.chunks(512).enumerate() {
                let value = u32::from_le_bytes(bytes[..4].try_into().unwrap());
                assert!(bytes.chunks(4).all(|c| c == &bytes[..4]), "seed {seed}, cut at {position}: sector {sector} is mixed");
                let list = &history[sector];
                let last = list.iter().rposition(|(_, began)| *began < flushed).unwrap_or(0);
                let allowed = list[last..].iter().any(|(v, began)| *v == value && *began <= position);
                assert!(allowed, "seed {seed}, cut at {position}: sector {sector} holds {value}, of {list:?}; flushed at {flushed}");
            }
            // Life goes on.
            write(&image, 512 * rng.random_range(0..sectors), &[0x5A; 512]).unwrap();
            image.close().unwrap();
        }
    }
}
