//! Overlays, kept and thrown away, over images and streams of every kind; and new qcow2 images, of which they are made.

mod table;

use formats::overlay::Overlay;
use formats::qcow2::create::{Backing, NewImage};
use formats::{BlockDevice, Image, Kind, OpenOptions, ZeroMode};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use sha2::{Digest, Sha256};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use table::{guest, open, qemu};

/// Guest bytes of the bases.
const SIZE: u64 = 6 << 20;

/// Runs a shell command in `dir`.
fn sh(dir: &Path, command: &str) {
    let output = Command::new("bash").args(["-o", "pipefail", "-ec", command]).current_dir(dir).output().unwrap();
    assert!(output.status.success(), "`{command}`: {}", String::from_utf8_lossy(&output.stderr));
}

fn digest(path: &Path) -> Vec<u8> {
    Sha256::digest(std::fs::read(path).unwrap()).to_vec()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn kept(file: &Path, overlay: &Path) -> OpenOptions {
    OpenOptions { overlay: Some(Overlay::Kept { path: overlay.to_path_buf(), create: true }), ..OpenOptions::new(file) }
}

fn thrown_away(file: &Path, dir: &Path) -> OpenOptions {
    OpenOptions { overlay: Some(Overlay::ThrowAway { dir: Some(dir.to_path_buf()) }), ..OpenOptions::new(file) }
}

fn must(options: &OpenOptions) -> Arc<Image> {
    formats::open(options).unwrap_or_else(|e| panic!("{}", e.chain()))
}

fn refused(options: &OpenOptions, words: &str) {
    let error = formats::open(options).map(drop).unwrap_err();
    assert!(error.chain().contains(words), "{}", error.chain());
}

/// A base: how it is made of the file `disk`, and what an overlay says of it.
struct Base {
    name: &'static str,
    recipe: &'static str,
    stated: &'static str,
    qemu: bool,
}

const BASES: &[Base] = &[
    Base { name: "disk.raw", recipe: "cp disk disk.raw", stated: "raw", qemu: true },
    Base { name: "disk.qcow2", recipe: "qemu-img convert -O qcow2 -c -o cluster_size=32k disk disk.qcow2", stated: "qcow2", qemu: true },
    Base { name: "disk.vhdx", recipe: "qemu-img convert -O vhdx -o block_size=1M disk disk.vhdx", stated: "vhdx", qemu: true },
    Base { name: "dynamic.vhd", recipe: "qemu-img convert -O vpc -o force_size=on disk dynamic.vhd", stated: "vpc", qemu: true },
    Base {
        name: "fixed.vhd",
        recipe: "qemu-img convert -O vpc -o subformat=fixed,force_size=on disk fixed.vhd",
        stated: "vpc",
        qemu: true,
    },
    Base { name: "disk.raw.gz", recipe: "gzip -c disk > disk.raw.gz", stated: "gzip+raw", qemu: false },
    Base {
        name: "disk.qcow2.xz",
        recipe: "qemu-img convert -O qcow2 disk q; xz -T2 --block-size=1MiB -c q > disk.qcow2.xz; rm q",
        stated: "xz+qcow2",
        qemu: false,
    },
    Base {
        name: "disk.vhdx.zst",
        recipe: "qemu-img convert -O vhdx disk v; zstd -q -c v > disk.vhdx.zst; rm v",
        stated: "zstd+vhdx",
        qemu: false,
    },
    Base { name: "disk.raw.lz", recipe: "plzip -c disk > disk.raw.lz", stated: "lzip+raw", qemu: false },
];

/// A directory with the file `disk`, and its bytes.
fn disk() -> (tempfile::TempDir, Vec<u8>) {
    let dir = table::scratch();
    let content = guest::initial(SIZE);
    std::fs::write(dir.path().join("disk"), &content).unwrap();
    (dir, content)
}

/// Random writes, zeros and discards, on the image and on plain bytes.
fn change(image: &Image, content: &mut [u8], seed: u64, count: usize) {
    let mut rng = StdRng::seed_from_u64(seed);
    for number in 0..count {
        let at = rng.random_range(0..content.len() / 512) * 512;
        let len = (rng.random_range(1..=400) * 512).min(content.len() - at);
        let there = &mut content[at..at + len];
        match rng.random_range(0..5) {
            0 => {
                image.zero(at as u64, len as u64, ZeroMode::MayUnmap).unwrap();
                there.fill(0);
            }
            1 => {
                image.discard(at as u64, len as u64).unwrap();
                // Whole units are zeros now.
                there.copy_from_slice(&open::read(image, at as u64, len).unwrap());
            }
            _ => {
                rng.fill_bytes(there);
                open::write(image, at as u64, there).unwrap();
            }
        }
        if number % 16 == 0 {
            image.flush().unwrap();
        }
    }
    assert!(open::read_all(image).unwrap() == content);
}

/// `qemu-img check` of the overlay alone.
fn clean(overlay: &Path) {
    let alone = format!(r#"json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{}"}},"backing":null}}"#, text(overlay));
    qemu::must("qemu-img", &["check", "-q", &alone]);
}

fn info(file: &Path) -> serde_json::Value {
    serde_json::from_str(&qemu::must("qemu-img", &["info", "--output=json", text(file)])).unwrap()
}

#[test]
fn a_kept_overlay_takes_the_writes() {
    for base in BASES {
        let (dir, mut content) = disk();
        let path = |name: &str| dir.path().join(name);
        sh(dir.path(), base.recipe);
        let before = digest(&path(base.name));
        std::fs::create_dir(path("kept")).unwrap();
        let (file, overlay) = (path(base.name), path("kept/overlay.qcow2"));
        for round in 0..3 {
            let image = must(&kept(&file, &overlay));
            assert!(!image.limits().read_only && image.size() == SIZE, "{}", base.name);
            change(&image, &mut content, round, 60);
            image.close().unwrap();
        }
        assert!(digest(&file) == before, "{}: the base has changed", base.name);
        clean(&overlay);
        let info = info(&overlay);
        assert_eq!(info["backing-filename"], format!("../{}", base.name));
        assert_eq!(info["backing-filename-format"], base.stated);
        let compare = ["compare", "-f", "qcow2", "-F", "raw", text(&overlay)];
        std::fs::write(path("expected"), &content).unwrap();
        let verdict = qemu::run("qemu-img", &[&compare[..], &[text(&path("expected"))]].concat());
        if base.qemu {
            assert!(verdict.status.success(), "{}: {verdict:?}", base.name);
        } else {
            let message = String::from_utf8_lossy(&verdict.stderr);
            assert!(message.contains("Unknown driver"), "{}: QEMU must not read it wrongly: {message}", base.name);
        }
        // By its own name it is an image like any other, also when both have moved.
        sh(dir.path(), &format!("mkdir moved moved/kept; mv {} moved; mv kept/overlay.qcow2 moved/kept", base.name));
        let moved = OpenOptions::new(path("moved/kept/overlay.qcow2"));
        refused(&moved, "--allow");
        let gate = formats::gate::Gate { allowed: vec![path("moved")], ..Default::default() };
        let image = must(&OpenOptions { gate, ..moved });
        assert!(open::read_all(&*image).unwrap() == content, "{}", base.name);
        assert_eq!(image.parent().unwrap().format().name(), base.stated.rsplit('+').next().unwrap());
    }
}

#[test]
fn without_permission_to_write_nothing_is_made() {
    let (dir, content) = disk();
    let path = |name: &str| dir.path().join(name);
    sh(dir.path(), "gzip -c disk > disk.gz");
    let options = kept(&path("disk.gz"), &path("overlay.qcow2"));
    // Absent: the image is shown without it.
    let image = must(&options.clone().read_only(true));
    assert!(image.limits().read_only && open::read_all(&*image).unwrap() == content);
    drop(image);
    assert_eq!(formats::open::check(&options).unwrap(), None, "a stream is not decoded for a check");
    assert_eq!(formats::open::check(&kept(&path("disk"), &path("overlay.qcow2"))).unwrap(), Some(SIZE));
    let no_create =
        OpenOptions { overlay: Some(Overlay::Kept { path: path("overlay.qcow2"), create: false }), ..OpenOptions::new(path("disk.gz")) };
    assert!(must(&no_create).limits().read_only);
    assert!(!path("overlay.qcow2").exists());
    // Present: it is shown, and opened by as many as like.
    let image = must(&options);
    open::write(&*image, 0, b"written").unwrap();
    let error = formats::open(&options.clone().read_only(true)).map(drop).unwrap_err();
    assert_eq!(error.kind(), Kind::Locked, "{}", error.chain());
    drop(image);
    let (one, two) = (must(&options.clone().read_only(true)), must(&options.clone().read_only(true)));
    for image in [&one, &two] {
        assert!(image.limits().read_only);
        assert_eq!(open::read(&**image, 0, 7).unwrap(), b"written");
    }
    assert_eq!(formats::open::check(&options).unwrap(), None);
}

#[test]
fn a_check_finds_what_is_wrong_and_makes_nothing() {
    let (dir, _) = disk();
    let path = |name: &str| dir.path().join(name);
    sh(dir.path(), "gzip -c disk > disk.gz; printf 'text' > text; qemu-img create -q -f qcow2 other.qcow2 1M");
    let fails = |options: &OpenOptions, words: &str| {
        let error = formats::open::check(options).unwrap_err();
        assert!(error.chain().contains(words), "{}", error.chain());
    };
    fails(&OpenOptions::new(path("missing.gz")), "No such file");
    fails(&OpenOptions::new(path("disk.gz")).format("xz+raw"), "not a xz stream");
    fails(&kept(&path("disk.gz"), &path("no/such/directory")), "cannot be created");
    fails(&kept(&path("disk.gz"), &path("text")), "not a qcow2 image");
    fails(&kept(&path("disk.gz"), &path("other.qcow2")), "without a backing file");
    fails(&thrown_away(&path("disk.gz"), &path("no-directory")), "free space");
    let writer = must(&OpenOptions::new(path("disk")));
    fails(&OpenOptions::new(path("disk")), "in use");
    drop(writer);
    let names = |dir: &Path| std::fs::read_dir(dir).unwrap().count();
    assert_eq!(names(dir.path()), 4);
}

#[test]
fn an_overlay_of_something_else_is_refused() {
    let (dir, _) = disk();
    let path = |name: &str| dir.path().join(name);
    sh(
        dir.path(),
        "cp disk other; gzip -c disk > disk.gz
         qemu-img create -q -f qcow2 alone.qcow2 6M
         qemu-img create -q -f qcow2 -b other -F raw of-other.qcow2
         qemu-img create -q -f qcow2 -b disk.gz -F raw of-the-coded-bytes.qcow2
         qemu-img create -q -f qcow2 -u -b nbd:localhost:1 -F raw of-nbd.qcow2 6M
         qemu-img create -q -f qcow2 -b disk -F raw made-by-qemu.qcow2
         mkfifo fifo; mkdir dir; printf 'no image' > text",
    );
    refused(&kept(&path("disk"), &path("alone.qcow2")), "without a backing file");
    refused(&kept(&path("disk"), &path("of-other.qcow2")), "its backing file is \"other\"");
    refused(&kept(&path("disk.gz"), &path("of-the-coded-bytes.qcow2")), "takes the image for raw, which is gzip+raw here");
    refused(&kept(&path("disk"), &path("of-nbd.qcow2")), "its backing file is \"nbd:localhost:1\"");
    refused(&kept(&path("disk"), &path("text")), "not a qcow2 image");
    refused(&kept(&path("disk"), &path("disk")), "its own overlay");
    refused(&kept(&path("made-by-qemu.qcow2"), &path("disk")), "its own overlay");
    refused(&kept(&path("disk"), &path("fifo")), "regular file");
    refused(&kept(&path("disk"), &path("dir")), "directory");
    let snapshot = OpenOptions { snapshot_name: Some("one".into()), ..kept(&path("alone.qcow2"), &path("new.qcow2")) };
    sh(dir.path(), "qemu-img snapshot -c one alone.qcow2");
    refused(&snapshot, "internal snapshot");
    // QEMU's own overlay is as good as ours, also by way of links.
    symlink(path("disk"), path("link")).unwrap();
    let image = must(&kept(&path("link"), &path("made-by-qemu.qcow2")));
    open::write(&*image, 4096, b"x").unwrap();
    drop(image);
    qemu::must("qemu-img", &["check", "-q", text(&path("made-by-qemu.qcow2"))]);
    // A link that comes to lead to another image is noticed.
    let overlay = path("of-link.qcow2");
    drop(must(&kept(&path("link"), &overlay)));
    std::fs::remove_file(path("link")).unwrap();
    symlink(path("other"), path("link")).unwrap();
    refused(&kept(&path("link"), &overlay), "its backing file is \"disk\"");
}

#[test]
fn a_thrown_away_overlay_leaves_nothing() {
    for base in BASES {
        let (dir, content) = disk();
        sh(dir.path(), base.recipe);
        let scratch = dir.path().join("scratch");
        std::fs::create_dir(&scratch).unwrap();
        let file = dir.path().join(base.name);
        let before = digest(&file);
        for seed in 0..2 {
            let image = must(&thrown_away(&file, &scratch));
            assert!(open::read_all(&*image).unwrap() == content, "{}", base.name);
            change(&image, &mut content.clone(), seed, 40);
            assert_eq!(std::fs::read_dir(&scratch).unwrap().count(), 0, "its file has no name");
            image.close().unwrap();
        }
        assert!(digest(&file) == before, "{}: the base has changed", base.name);
        let image = must(&thrown_away(&file, &scratch).read_only(true));
        assert!(image.limits().read_only && image.parent().is_none());
    }
}

#[test]
fn a_thrown_away_overlay_over_an_internal_snapshot() {
    let (dir, content) = disk();
    sh(dir.path(), "qemu-img convert -O qcow2 disk d.qcow2; qemu-img snapshot -c then d.qcow2; qemu-io -c 'write -q -P 1 0 1M' d.qcow2");
    let options = OpenOptions { snapshot_name: Some("then".into()), ..thrown_away(&dir.path().join("d.qcow2"), dir.path()) };
    let image = must(&options);
    assert!(open::read_all(&*image).unwrap() == content);
    change(&image, &mut content.clone(), 3, 20);
}

#[test]
fn many_at_once_on_one_base_and_one_at_a_time_on_an_overlay() {
    let (dir, content) = disk();
    let path = |name: &str| dir.path().join(name);
    let images: Vec<_> = (0..4).map(|n| must(&kept(&path("disk"), &path(&format!("{n}.qcow2"))))).collect();
    std::thread::scope(|scope| {
        for (seed, image) in images.iter().enumerate() {
            let mut content = content.clone();
            scope.spawn(move || change(image, &mut content, seed as u64, 40));
        }
    });
    let error = formats::open(&kept(&path("disk"), &path("0.qcow2"))).map(drop).unwrap_err();
    assert_eq!(error.kind(), Kind::Locked);
    // The base is in use, too.
    assert_eq!(formats::open(&OpenOptions::new(path("disk"))).map(drop).unwrap_err().kind(), Kind::Locked);
    assert!(!qemu::run("qemu-io", &["-f", "raw", "-c", "write 0 512", text(&path("disk"))]).status.success());
}

#[test]
fn creators_that_race_get_one_overlay() {
    let (dir, _) = disk();
    let (file, overlay) = (dir.path().join("disk"), dir.path().join("overlay.qcow2"));
    let won: usize = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| match formats::open(&kept(&file, &overlay)) {
                    Ok(image) => {
                        std::thread::sleep(std::time::Duration::from_secs(2));
                        drop(image);
                        1
                    }
                    Err(error) => {
                        assert_eq!(error.kind(), Kind::Locked, "{}", error.chain());
                        0
                    }
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    assert_eq!(won, 1);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "nothing temporary is left");
    clean(&overlay);
}

#[test]
fn an_overlay_grows_and_has_its_bases_sectors() {
    let (dir, content) = disk();
    let path = |name: &str| dir.path().join(name);
    let image = must(&kept(&path("disk"), &path("overlay.qcow2")));
    image.grow(SIZE + (1 << 20)).unwrap();
    open::write(&*image, SIZE + 512, b"new").unwrap();
    drop(image);
    let image = must(&kept(&path("disk"), &path("overlay.qcow2")));
    assert!(open::read(&*image, 0, SIZE as usize).unwrap() == content);
    assert_eq!(open::read(&*image, SIZE, 600).unwrap()[512..515], *b"new");
    drop(image);
    assert_eq!(info(&path("overlay.qcow2"))["virtual-size"], SIZE + (1 << 20));
    // A VHDX of 4096-byte sectors: what qemu-img makes, with another value in its metadata.
    sh(dir.path(), "qemu-img convert -O vhdx disk large.vhdx");
    let file = std::fs::File::options().read(true).write(true).open(path("large.vhdx")).unwrap();
    let mut region = vec![0; 1 << 20];
    let mut region_at = 0;
    while !region.starts_with(b"metadata") {
        region_at += 1 << 20;
        file.read_exact_at(&mut region, region_at).unwrap();
    }
    // Logical sector size: item 8141BF1D-A96F-4709-BA47-F233A8FAAB5F.
    let id = [0x1D, 0xBF, 0x41, 0x81, 0x6F, 0xA9, 0x09, 0x47, 0xBA, 0x47, 0xF2, 0x33, 0xA8, 0xFA, 0xAB, 0x5F];
    let entry = region.windows(16).position(|w| w == id).unwrap();
    let at = u32::from_le_bytes(region[entry + 16..entry + 20].try_into().unwrap());
    file.write_all_at(&4096u32.to_le_bytes(), region_at + u64::from(at)).unwrap();
    drop(file);
    let image = must(&kept(&path("large.vhdx"), &path("large.qcow2")));
    assert_eq!(image.limits().sector, 4096);
    drop(image);
    assert_eq!(must(&OpenOptions::new(path("large.qcow2"))).limits().sector, 4096);
}

#[test]
fn a_stream_is_named_only_as_what_it_is() {
    let (dir, content) = disk();
    let path = |name: &str| dir.path().join(name);
    sh(dir.path(), "gzip -c disk > disk.gz");
    let image = must(&OpenOptions::new(path("disk.gz")).format("gzip+raw"));
    assert!(open::read_all(&*image).unwrap() == content);
    refused(&OpenOptions::new(path("disk.gz")).format("xz+raw"), "not a xz stream");
    refused(&OpenOptions::new(path("disk")).format("gzip+raw"), "not a gzip stream");
    refused(&OpenOptions::new(path("disk.gz")).format("arj+raw"), "no kind of compressed stream");
}

#[test]
fn a_full_throw_away_overlay_is_an_error_of_space() {
    let store = formats::store::ThrowAwayStore::new(tempfile::tempfile().unwrap(), "here", 1 << 20).unwrap();
    use formats::store::Store;
    store.write_all_at(&[1; 512], (1 << 20) - 512).unwrap();
    assert_eq!(store.write_all_at(&[1; 512], (1 << 20) - 511).unwrap_err().kind(), std::io::ErrorKind::StorageFull);
    assert_eq!(store.set_len((1 << 20) + 1).unwrap_err().kind(), std::io::ErrorKind::StorageFull);
}

#[test]
fn new_images_are_what_qemu_makes_of_them() {
    let dir = table::scratch();
    let path = |name: &str| dir.path().join(name);
    std::fs::write(path("back:ing"), vec![7; 1 << 20]).unwrap();
    let largest = |bits: u32| 1u64 << (22 + 2 * bits - 3).min(62);
    for bits in [9, 10, 12, 16, 18, 21] {
        for size in [0, 512, 65536, (1 << 20) + 512, 10 << 30, largest(bits)] {
            for backing in [None, Some(Backing { name: PathBuf::from("./back:ing"), format: "raw".into() })] {
                let file = path("new.qcow2");
                let new = NewImage { cluster_size: 1 << bits, backing: backing.clone(), ..NewImage::new(size) };
                // L1 tables of 32 MiB need not be made over and over.
                if size == largest(bits) && (backing.is_some() || bits == 9) {
                    continue;
                }
                assert!(new.create(&file, 0o600).unwrap());
                assert!(!new.create(&file, 0o600).unwrap(), "there is one already");
                qemu::must("qemu-img", &["check", "-q", "-f", "qcow2", text(&file)]);
                let info = info(&file);
                assert_eq!(info["virtual-size"], size);
                assert_eq!(info["cluster-size"], 1u64 << bits);
                assert_eq!(info["format-specific"]["data"]["compat"], "1.1");
                assert_eq!(info["backing-filename-format"].as_str(), backing.as_ref().map(|b| &*b.format));
                if (512..10 << 30).contains(&size) {
                    let image = must(&OpenOptions::new(&file));
                    let mut content = vec![if backing.is_some() { 7 } else { 0 }; size as usize];
                    content[(size as usize).min(1 << 20)..].fill(0);
                    change(&image, &mut content, size, 30);
                    drop(image);
                    std::fs::write(path("expected"), &content).unwrap();
                    qemu::must("qemu-img", &["check", "-q", "-f", "qcow2", text(&file)]);
                    qemu::must("qemu-img", &["compare", "-q", "-f", "qcow2", "-F", "raw", text(&file), text(&path("expected"))]);
                }
                std::fs::remove_file(&file).unwrap();
            }
        }
    }
    let refused = |new: NewImage| assert_eq!(new.create(&path("no"), 0o600).unwrap_err().kind(), Kind::InvalidOption);
    refused(NewImage::new(511));
    refused(NewImage::new(1 << 63));
    refused(NewImage { cluster_size: 512, ..NewImage::new(1 << 40) });
    refused(NewImage { cluster_size: 256, ..NewImage::new(1 << 20) });
    refused(NewImage { cluster_size: 4 << 20, ..NewImage::new(1 << 20) });
    let long = Backing { name: "x".repeat(1024).into(), format: "raw".into() };
    refused(NewImage { backing: Some(long), ..NewImage::new(512) });
    assert!(!path("no").exists());
}
