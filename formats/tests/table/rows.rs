//! The rows of the table. Made by `qemu-img`, which is somebody else's writer, or, where no program on Linux makes them, by the tests' own writers, which
//! know nothing of the code under test.

use super::foreign::readers::{dissect_agrees, dissect_reads};
use super::foreign::vhd_writer::{Runs, Vhd, flatten, uuid};
use super::foreign::vhdx_writer::{Block, Vhdx, data_write_guid};
use super::foreign::{MIB, Raw};
#[allow(unused_imports, reason = "each test binary uses a part")]
pub use super::vmdk_rows::*;
use super::{Kind, Made, Reader, guest, qemu};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use std::fs;
use std::path::Path;
use std::process::Command;
use uuid::Uuid;

/// What most rows have in common.
pub(super) fn kind(name: &'static str, format: &'static str, size: u64) -> Kind {
    Kind {
        name,
        format,
        size,
        make: Box::new(|_, _| unreachable!("every row has a recipe")),
        qemu: true,
        qemu_check: matches!(format, "qcow2" | "vmdk" | "vdi" | "qed" | "parallels"),
        qemu_tolerated: None,
        parent_format: None,
        check: formats::drivers::by_name(format).unwrap().can.check,
        grows: formats::drivers::by_name(format).unwrap().can.grow,
        stream: false,
        reader: None,
        mend: |_| {},
    }
}

pub(super) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Content by `qemu-img convert` with these arguments; then `after` does more to the file and its content.
pub(super) fn converted(kind: Kind, arguments: &'static [&'static str], after: fn(&Path, &mut [u8])) -> Kind {
    Kind {
        make: Box::new(move |kind, dir| {
            let mut content = guest::initial(kind.size);
            let (source, file) = (dir.join("source"), dir.join("image"));
            fs::write(&source, &content).unwrap();
            let convert = ["convert", "-q", "-f", "raw", "-O", kind.format];
            qemu::must("qemu-img", &[&convert, arguments, &[text(&source), text(&file)]].concat());
            fs::remove_file(source).unwrap();
            after(&file, &mut content);
            Made { file, content }
        }),
        ..kind
    }
}

/// Writes runs of one byte with `qemu-io`, here and there.
fn scribble(file: &Path, format: &str, content: &mut [u8], runs: usize) {
    let mut rng = StdRng::seed_from_u64(content.len() as u64 + runs as u64);
    let mut arguments = vec!["-f".to_string(), format.to_string()];
    for _ in 0..runs {
        let at = rng.random_range(0..content.len() / 512) * 512;
        let len = (rng.random_range(1..120) * 512).min(content.len() - at);
        let byte: u8 = rng.random_range(0..=255);
        arguments.extend(["-c".into(), format!("write -P {byte} {at} {len}")]);
        content[at..at + len].fill(byte);
    }
    arguments.push(text(file).into());
    qemu::must("qemu-io", &arguments.iter().map(String::as_str).collect::<Vec<_>>());
}

/// An overlay on a base that is shorter than it, and so many overlays between them.
pub(super) fn overlaid(kind: Kind, base_format: &'static str, between: usize, arguments: &'static [&'static str]) -> Kind {
    Kind {
        make: Box::new(move |kind, dir| {
            let base_size = kind.size as usize / 4 * 3;
            let mut content = guest::initial(kind.size);
            content[base_size..].fill(0);
            let (source, base) = (dir.join("source"), dir.join("base"));
            fs::write(&source, &content[..base_size]).unwrap();
            qemu::must("qemu-img", &["convert", "-q", "-f", "raw", "-O", base_format, text(&source), text(&base)]);
            fs::remove_file(source).unwrap();
            let mut below = ("base".to_string(), base_format);
            for level in 0..=between {
                let name = if level == between { "image".to_string() } else { format!("overlay{level}") };
                let (file, size) = (dir.join(&name), kind.size.to_string());
                let create = ["create", "-q", "-f", kind.format, "-b", &below.0, "-F", below.1];
                qemu::must("qemu-img", &[&create, arguments, &[text(&file), &size]].concat());
                scribble(&file, kind.format, &mut content, 5);
                below = (name, kind.format);
            }
            Made { file: dir.join("image"), content }
        }),
        ..kind
    }
}

pub(super) fn nothing(_: &Path, _: &mut [u8]) {}

/// A raw file.
pub fn raw() -> Kind {
    converted(kind("raw", "raw", 2 << 20), &[], nothing)
}

/// A raw file that ends inside a sector.
pub fn raw_odd_length() -> Kind {
    converted(kind("raw_odd_length", "raw", (1 << 20) + 5 * 512), &[], |file, content| {
        let end = content.len() - 211;
        content[end..].fill(0);
        fs::OpenOptions::new().write(true).open(file).unwrap().set_len(end as u64).unwrap();
    })
}

/// As `qemu-img` makes it by default.
pub fn qcow2() -> Kind {
    converted(kind("qcow2", "qcow2", 6 << 20), &[], nothing)
}

/// Version 2.
pub fn qcow2_v2() -> Kind {
    converted(kind("qcow2_v2", "qcow2", 3 << 20), &["-o", "compat=0.10,cluster_size=16k"], nothing)
}

/// The smallest clusters: many tables, L1 with many entries.
pub fn qcow2_512() -> Kind {
    converted(kind("qcow2_512", "qcow2", 1 << 20), &["-o", "cluster_size=512"], nothing)
}

/// Small clusters.
pub fn qcow2_4k() -> Kind {
    converted(kind("qcow2_4k", "qcow2", 2 << 20), &["-o", "cluster_size=4k"], nothing)
}

/// The largest clusters.
pub fn qcow2_2m() -> Kind {
    converted(kind("qcow2_2m", "qcow2", 6 << 20), &["-o", "cluster_size=2M"], nothing)
}

/// A size that is no multiple of the cluster.
pub fn qcow2_odd_size() -> Kind {
    converted(kind("qcow2_odd_size", "qcow2", (2 << 20) + 3 * 512), &[], nothing)
}

/// Refcounts of one bit.
pub fn qcow2_refcount1() -> Kind {
    converted(kind("qcow2_refcount1", "qcow2", 1 << 20), &["-o", "refcount_bits=1,cluster_size=1k"], nothing)
}

/// Refcounts of two bits.
pub fn qcow2_refcount2() -> Kind {
    converted(kind("qcow2_refcount2", "qcow2", 1 << 20), &["-o", "refcount_bits=2,cluster_size=2k"], nothing)
}

/// Refcounts of four bits.
pub fn qcow2_refcount4() -> Kind {
    converted(kind("qcow2_refcount4", "qcow2", 1 << 20), &["-o", "refcount_bits=4,cluster_size=4k"], nothing)
}

/// Refcounts of eight bits.
pub fn qcow2_refcount8() -> Kind {
    converted(kind("qcow2_refcount8", "qcow2", 1 << 20), &["-o", "refcount_bits=8,cluster_size=4k"], nothing)
}

/// Refcounts of 32 bits.
pub fn qcow2_refcount32() -> Kind {
    converted(kind("qcow2_refcount32", "qcow2", 1 << 20), &["-o", "refcount_bits=32,cluster_size=512"], nothing)
}

/// Refcounts of 64 bits: the refcount table grows soon.
pub fn qcow2_refcount64() -> Kind {
    converted(kind("qcow2_refcount64", "qcow2", 3 << 20), &["-o", "refcount_bits=64,cluster_size=512"], nothing)
}

/// Refcounts that may lag behind.
pub fn qcow2_lazy() -> Kind {
    converted(kind("qcow2_lazy", "qcow2", 2 << 20), &["-o", "lazy_refcounts=on,cluster_size=8k"], nothing)
}

/// Clusters compressed with zlib.
pub fn qcow2_zlib() -> Kind {
    converted(kind("qcow2_zlib", "qcow2", 3 << 20), &["-c", "-o", "cluster_size=16k"], nothing)
}

/// Clusters compressed with zstd.
pub fn qcow2_zstd() -> Kind {
    converted(kind("qcow2_zstd", "qcow2", 3 << 20), &["-c", "-o", "compression_type=zstd,cluster_size=32k"], nothing)
}

/// Two internal snapshots, with writes before, between and after.
pub fn qcow2_snapshots() -> Kind {
    converted(kind("qcow2_snapshots", "qcow2", 2 << 20), &["-o", "cluster_size=4k"], |file, content| {
        for name in ["first", "second"] {
            qemu::must("qemu-img", &["snapshot", "-c", name, text(file)]);
            scribble(file, "qcow2", content, 6);
        }
    })
}

/// Snapshots of compressed clusters: shared, and in host clusters that several guest clusters share.
pub fn qcow2_compressed_snapshots() -> Kind {
    converted(kind("qcow2_compressed_snapshots", "qcow2", 2 << 20), &["-c", "-o", "cluster_size=8k"], |file, content| {
        qemu::must("qemu-img", &["snapshot", "-c", "first", text(file)]);
        scribble(file, "qcow2", content, 6);
    })
}

/// A persistent dirty bitmap.
pub fn qcow2_bitmap() -> Kind {
    converted(kind("qcow2_bitmap", "qcow2", 2 << 20), &["-o", "cluster_size=16k"], |file, content| {
        qemu::must("qemu-img", &["bitmap", "--add", text(file), "backup"]);
        scribble(file, "qcow2", content, 4);
    })
}

/// On a raw backing file that is shorter.
pub fn qcow2_on_raw() -> Kind {
    overlaid(kind("qcow2_on_raw", "qcow2", 3 << 20), "raw", 0, &["-o", "cluster_size=16k"])
}

/// A chain of four.
pub fn qcow2_chain() -> Kind {
    overlaid(kind("qcow2_chain", "qcow2", 3 << 20), "qcow2", 2, &["-o", "cluster_size=8k"])
}

/// Clusters of 32 subclusters.
pub fn qcow2_subclusters() -> Kind {
    converted(kind("qcow2_subclusters", "qcow2", 3 << 20), &["-o", "extended_l2=on"], |file, content| scribble(file, "qcow2", content, 8))
}

/// The smallest subclusters: one sector each.
pub fn qcow2_subclusters_16k() -> Kind {
    converted(kind("qcow2_subclusters_16k", "qcow2", 2 << 20), &["-o", "extended_l2=on,cluster_size=16k"], |file, content| {
        scribble(file, "qcow2", content, 8);
    })
}

/// Large clusters, and a size that is no multiple of a subcluster.
pub fn qcow2_subclusters_2m() -> Kind {
    converted(kind("qcow2_subclusters_2m", "qcow2", (4 << 20) + 3 * 512), &["-o", "extended_l2=on,cluster_size=2M"], |file, content| {
        scribble(file, "qcow2", content, 8);
    })
}

/// Subclusters beside compressed clusters.
pub fn qcow2_subclusters_zlib() -> Kind {
    converted(kind("qcow2_subclusters_zlib", "qcow2", 2 << 20), &["-c", "-o", "extended_l2=on,cluster_size=32k"], |file, content| {
        scribble(file, "qcow2", content, 6);
    })
}

/// Subclusters of clusters that snapshots share.
pub fn qcow2_subclusters_snapshots() -> Kind {
    converted(kind("qcow2_subclusters_snapshots", "qcow2", 2 << 20), &["-o", "extended_l2=on,cluster_size=16k"], |file, content| {
        for name in ["first", "second"] {
            qemu::must("qemu-img", &["snapshot", "-c", name, text(file)]);
            scribble(file, "qcow2", content, 6);
        }
    })
}

/// Subclusters through which a backing file shows.
pub fn qcow2_subclusters_on_raw() -> Kind {
    overlaid(kind("qcow2_subclusters_on_raw", "qcow2", 3 << 20), "raw", 0, &["-o", "extended_l2=on,cluster_size=64k"])
}

/// A chain of four, all with subclusters.
pub fn qcow2_subclusters_chain() -> Kind {
    overlaid(kind("qcow2_subclusters_chain", "qcow2", 3 << 20), "qcow2", 2, &["-o", "extended_l2=on,cluster_size=32k"])
}

/// The guest's data in a file of their own, named `data` beside the image.
fn with_data_file(kind: Kind, options: &'static str) -> Kind {
    Kind {
        make: Box::new(move |kind, dir| {
            let mut content = guest::initial(kind.size);
            fs::write(dir.join("source"), &content).unwrap();
            // Absolute: QEMU takes a relative name from where it is started.
            let options = format!("data_file={},{options}", text(&dir.join("data")));
            let convert = Command::new("qemu-img")
                .args(["convert", "-q", "-f", "raw", "-O", "qcow2", "-o", &options, "source", "image"])
                .current_dir(dir)
                .status()
                .unwrap();
            assert!(convert.success(), "{options}");
            fs::remove_file(dir.join("source")).unwrap();
            let file = dir.join("image");
            scribble(&file, "qcow2", &mut content, 6);
            Made { file, content }
        }),
        ..kind
    }
}

/// An external data file.
pub fn qcow2_data_file() -> Kind {
    with_data_file(kind("qcow2_data_file", "qcow2", 2 << 20), "cluster_size=16k")
}

/// An external data file that is a raw image as well.
pub fn qcow2_data_file_raw() -> Kind {
    with_data_file(kind("qcow2_data_file_raw", "qcow2", 2 << 20), "data_file_raw=on,cluster_size=32k")
}

/// An external data file, and subclusters.
pub fn qcow2_data_file_subclusters() -> Kind {
    with_data_file(kind("qcow2_data_file_subclusters", "qcow2", 2 << 20), "extended_l2=on,cluster_size=32k")
}

/// An external data file with a backing file below.
pub fn qcow2_data_file_on_raw() -> Kind {
    Kind {
        make: Box::new(|kind, dir| {
            let mut content = guest::initial(kind.size);
            fs::write(dir.join("base"), &content).unwrap();
            let create = Command::new("qemu-img")
                .args(["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "-o"])
                .arg(format!("data_file={},cluster_size=16k", text(&dir.join("data"))))
                .arg("image")
                .current_dir(dir)
                .status()
                .unwrap();
            assert!(create.success());
            let file = dir.join("image");
            scribble(&file, "qcow2", &mut content, 6);
            Made { file, content }
        }),
        ..kind("qcow2_data_file_on_raw", "qcow2", 2 << 20)
    }
}

/// An overlay of our own making on what `command` makes of the file `source`, written to here and there.
fn our_overlay(kind: Kind, command: &'static str) -> Kind {
    Kind {
        make: Box::new(move |kind, dir| {
            let mut content = guest::initial(kind.size);
            fs::write(dir.join("source"), &content).unwrap();
            let made = Command::new("bash").args(["-ec", command]).current_dir(dir).status().unwrap();
            assert!(made.success(), "{command}");
            fs::remove_file(dir.join("source")).unwrap();
            let overlay = formats::overlay::Overlay::Kept { path: dir.join("image"), create: true };
            let options = formats::OpenOptions { overlay: Some(overlay), ..formats::OpenOptions::new(dir.join("base")) };
            let image = formats::open(&options).unwrap_or_else(|e| panic!("{}: {}", kind.name, e.chain()));
            let mut rng = StdRng::seed_from_u64(kind.size);
            for _ in 0..6 {
                let at = rng.random_range(0..content.len() / 512) * 512;
                let len = (rng.random_range(1..120) * 512).min(content.len() - at);
                rng.fill_bytes(&mut content[at..at + len]);
                super::open::write(&*image, at as u64, &content[at..at + len]).unwrap();
            }
            image.close().unwrap();
            Made { file: dir.join("image"), content }
        }),
        ..kind
    }
}

/// Over a compressed stream, which QEMU cannot read.
pub fn overlay_on_gzip() -> Kind {
    our_overlay(Kind { qemu: false, qemu_check: false, ..kind("overlay_on_gzip", "qcow2", (2 << 20) + 1024) }, "gzip -1c source >base")
}

/// Over a VHDX.
pub fn overlay_on_vhdx() -> Kind {
    our_overlay(kind("overlay_on_vhdx", "qcow2", 3 << 20), "qemu-img convert -q -f raw -O vhdx -o block_size=1M source base")
}

/// Version 2 on a backing file: it has no zero clusters.
pub fn qcow2_v2_on_raw() -> Kind {
    overlaid(kind("qcow2_v2_on_raw", "qcow2", 2 << 20), "raw", 0, &["-o", "compat=0.10,cluster_size=4k"])
}

/// Blocks of 1 MiB, as needed.
pub fn vhdx_dynamic() -> Kind {
    Kind { mend: mend_vhdx, ..converted(kind("vhdx_dynamic", "vhdx", 4 << 20), &["-o", "block_size=1M"], nothing) }
}

/// All blocks from the start.
pub fn vhdx_fixed() -> Kind {
    Kind { mend: mend_vhdx, ..converted(kind("vhdx_fixed", "vhdx", 2 << 20), &["-o", "block_size=1M,subformat=fixed"], nothing) }
}

/// Makes the checksums of headers and region tables fit again.
fn mend_vhdx(bytes: &mut [u8]) {
    for (at, len) in [(64 << 10, 4 << 10), (128 << 10, 4 << 10), (192 << 10, 64 << 10), (256 << 10, 64 << 10)] {
        let Some(part) = bytes.get_mut(at..at + len) else { continue };
        part[4..8].fill(0);
        let sum = crc32c::crc32c(part);
        part[4..8].copy_from_slice(&sum.to_le_bytes());
    }
}

/// Larger blocks than the disk's pieces.
pub fn vhdx_2m() -> Kind {
    Kind { mend: mend_vhdx, ..converted(kind("vhdx_2m", "vhdx", 5 << 20), &["-o", "block_size=2M"], nothing) }
}

/// One block, of which the disk takes a part.
pub fn vhdx_32m() -> Kind {
    Kind { mend: mend_vhdx, ..converted(kind("vhdx_32m", "vhdx", 3 << 20), &["-o", "block_size=32M"], nothing) }
}

/// Some whole blocks, some in part, some zeros, over what a parent shows; `content` becomes what the child shows.
fn child_blocks(content: &mut [u8], sector: u64) -> Vec<(u64, Block)> {
    let mut rng = StdRng::seed_from_u64(content.len() as u64);
    let mut blocks = Vec::new();
    for (number, part) in content.chunks_mut(MIB as usize).enumerate() {
        let block = match number % 4 {
            0 => {
                let (mut runs, mut first) = (Vec::new(), rng.random_range(0..20));
                while (first as usize + 1) * sector as usize <= part.len() && runs.len() < 30 {
                    let count = rng.random_range(1..30).min(part.len() as u64 / sector - first);
                    let range = (first * sector) as usize..((first + count) * sector) as usize;
                    rng.fill_bytes(&mut part[range.clone()]);
                    runs.push((first, part[range].to_vec()));
                    first += count + rng.random_range(1..60);
                }
                Block::Partial(runs)
            }
            1 => continue,
            2 => {
                rng.fill_bytes(part);
                Block::Full(part.to_vec())
            }
            _ => {
                part.fill(0);
                Block::Zero
            }
        };
        blocks.push((number as u64, block));
    }
    blocks
}

/// The file `image` on the file `base`, or alone.
fn written_vhdx(name: &'static str, size: u64, sector: u64, differencing: bool) -> Kind {
    let reader: Reader = |file, content| {
        let plain = tempfile::NamedTempFile::new_in(file.parent().unwrap()).unwrap();
        fs::write(plain.path(), content).unwrap();
        dissect_agrees(file.parent().unwrap(), text(file), &Raw::existing(plain.path().to_path_buf()));
    };
    Kind {
        make: Box::new(move |kind, dir| {
            let mut content = guest::initial(kind.size);
            let write = |name: &str, parent: Option<Uuid>, blocks| {
                let parent = parent.map(|id| vec![("parent_linkage", format!("{{{id}}}")), ("relative_path", ".\\base".into())]);
                Vhdx { size: kind.size, block: MIB, sector, data_write: Uuid::new_v4(), parent, blocks }.write(&dir.join(name));
            };
            let full =
                |content: &[u8]| content.chunks(MIB as usize).enumerate().map(|(n, b)| (n as u64, Block::Full(b.to_vec()))).collect();
            if differencing {
                write("base", None, full(&content));
                write("image", Some(data_write_guid(&dir.join("base"))), child_blocks(&mut content, sector));
            } else {
                content[MIB as usize..2 * MIB as usize].fill(0);
                let mut blocks: Vec<_> = full(&content);
                blocks.remove(1);
                write("image", None, blocks);
            }
            Made { file: dir.join("image"), content }
        }),
        // QEMU knows neither parents nor sectors of 4096 bytes.
        qemu: false,
        reader: Some(reader),
        mend: mend_vhdx,
        ..kind(name, "vhdx", size)
    }
}

/// On a parent.
pub fn vhdx_differencing() -> Kind {
    written_vhdx("vhdx_differencing", (3 << 20) + (200 << 10), 512, true)
}

/// For a guest with sectors of 4096 bytes.
pub fn vhdx_4096() -> Kind {
    written_vhdx("vhdx_4096", (3 << 20) + (16 << 10), 4096, false)
}

/// The same on a parent.
pub fn vhdx_differencing_4096() -> Kind {
    written_vhdx("vhdx_differencing_4096", (3 << 20) + (200 << 10), 4096, true)
}

/// Blocks of 2 MiB, as needed.
pub fn vhd_dynamic() -> Kind {
    Kind { mend: mend_vhd, ..converted(kind("vhd_dynamic", "vpc", (5 << 20) + 1536), &["-o", "force_size=on"], nothing) }
}

/// The disk and a footer.
pub fn vhd_fixed() -> Kind {
    Kind { mend: mend_vhd, ..converted(kind("vhd_fixed", "vpc", (2 << 20) + 512), &["-o", "subformat=fixed,force_size=on"], nothing) }
}

/// Random runs of sectors for every other block of `block` bytes; `content` becomes what the image shows.
fn runs(content: &mut [u8], block: u64) -> Vec<(u64, Runs)> {
    let mut rng = StdRng::seed_from_u64(content.len() as u64);
    let mut blocks = Vec::new();
    for (number, part) in content.chunks_mut(block as usize).enumerate().filter(|(number, _)| number % 2 == 0) {
        let (mut list, mut first) = (Runs::new(), if number == 2 { 0 } else { rng.random_range(0..30) });
        while (first as usize + 1) * 512 <= part.len() {
            let count = if number == 2 { u64::MAX } else { rng.random_range(1..70) }.min(part.len() as u64 / 512 - first);
            let range = (first * 512) as usize..((first + count) * 512) as usize;
            rng.fill_bytes(&mut part[range.clone()]);
            list.push((first, part[range].to_vec()));
            first += count + rng.random_range(1..90);
        }
        blocks.push((number as u64, list));
    }
    blocks
}

/// On a dynamic parent that QEMU made; read by a reader of the tests' own, since others mistake runs of sectors.
pub fn vhd_differencing() -> Kind {
    Kind {
        make: Box::new(|kind, dir| {
            let mut content = guest::initial(kind.size);
            let (source, base) = (dir.join("source"), dir.join("base"));
            fs::write(&source, &content).unwrap();
            qemu::must("qemu-img", &["convert", "-q", "-f", "raw", "-O", "vpc", "-o", "force_size=on", text(&source), text(&base)]);
            fs::remove_file(source).unwrap();
            let block = 512 << 10;
            let blocks = runs(&mut content, block);
            let parent = Some((uuid(&base), vec![(b"W2ru", ".\\base".to_string())]));
            Vhd { size: kind.size, block, uuid: Uuid::new_v4(), parent, blocks }.write(&dir.join("image"));
            Made { file: dir.join("image"), content }
        }),
        qemu: false,
        // The format cannot say that what lies behind the old end is not the parent's.
        grows: false,
        reader: Some(|file, content| {
            assert!(flatten(file.parent().unwrap(), &[text(file), "base"]) == content, "{} shows something else", file.display());
        }),
        mend: mend_vhd,
        ..kind("vhd_differencing", "vpc", (3 << 20) + 1024)
    }
}

/// Small blocks with bits of their bitmaps clear, as other programs than QEMU leave them.
pub fn vhd_small_blocks() -> Kind {
    Kind {
        make: Box::new(|kind, dir| {
            let mut content = vec![0; kind.size as usize];
            let block = 128 << 10;
            let blocks = runs(&mut content, block);
            Vhd { size: kind.size, block, uuid: Uuid::new_v4(), parent: None, blocks }.write(&dir.join("image"));
            Made { file: dir.join("image"), content }
        }),
        mend: mend_vhd,
        ..kind("vhd_small_blocks", "vpc", (1 << 20) + 512)
    }
}

/// Makes the checksums of footers and header fit again.
fn mend_vhd(bytes: &mut [u8]) {
    let end = bytes.len().saturating_sub(512);
    for (at, len, sum_at) in [(0, 512, 64), (512, 1024, 36), (end, 512, 64)] {
        let Some(part) = bytes.get_mut(at..at + len).filter(|p| p.starts_with(b"conectix") || p.starts_with(b"cxsparse")) else { continue };
        part[sum_at..sum_at + 4].fill(0);
        let sum = !part.iter().map(|b| u32::from(*b)).sum::<u32>();
        part[sum_at..sum_at + 4].copy_from_slice(&sum.to_be_bytes());
    }
}

/// QEMU calls it an error when the header counts a block that is not used, which no order of writes can spare a cut.
const VDI_COUNT: Option<&str> = Some("allocated blocks mismatch");

/// Blocks of 1 MiB, as needed.
pub fn vdi_dynamic() -> Kind {
    Kind { qemu_tolerated: VDI_COUNT, ..converted(kind("vdi_dynamic", "vdi", (5 << 20) + 1536), &[], nothing) }
}

/// All blocks from the start.
pub fn vdi_static() -> Kind {
    let row = kind("vdi_static", "vdi", (2 << 20) + (300 << 10));
    Kind { qemu_tolerated: VDI_COUNT, grows: false, ..converted(row, &["-o", "static=on"], nothing) }
}

/// On a parent: images that QEMU made, of which one is turned into the other's child, with a block of zeros over the parent's.
pub fn vdi_differencing() -> Kind {
    Kind {
        make: Box::new(|kind, dir| {
            let mut content = guest::initial(kind.size);
            let (source, base, file) = (dir.join("source"), dir.join("base"), dir.join("image"));
            fs::write(&source, &content).unwrap();
            qemu::must("qemu-img", &["convert", "-q", "-f", "raw", "-O", "vdi", text(&source), text(&base)]);
            fs::remove_file(source).unwrap();
            qemu::must("qemu-img", &["create", "-q", "-f", "vdi", text(&file), &kind.size.to_string()]);
            // What QEMU does not write of a block is zeros.
            let mut written = vec![0; 2 * MIB as usize];
            scribble(&file, "vdi", &mut written, 4);
            let mut bytes = fs::read(&file).unwrap();
            let le32 = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
            let map = le32(&bytes, 0x154) as usize;
            for block in 0..2 {
                let range = block * MIB as usize..(block + 1) * MIB as usize;
                if le32(&bytes, map + block * 4) < 0xFFFF_FFFE {
                    content[range.clone()].copy_from_slice(&written[range]);
                }
            }
            bytes[map + 12..map + 16].copy_from_slice(&0xFFFF_FFFE_u32.to_le_bytes());
            content[3 * MIB as usize..4 * MIB as usize].fill(0);
            bytes[0x4C] = 4;
            let parent = fs::read(&base).unwrap();
            bytes[0x1A8..0x1B8].copy_from_slice(&parent[0x188..0x198]);
            bytes[0x1B8..0x1C8].copy_from_slice(&parent[0x198..0x1A8]);
            fs::write(&file, bytes).unwrap();
            Made { file, content }
        }),
        qemu: false,
        qemu_check: false,
        reader: Some(|file, content| dissect_reads("vdi", file, content)),
        ..kind("vdi_differencing", "vdi", (5 << 20) + 1024)
    }
}

/// QEMU calls it an error that an image was not closed, which after a cut it was not.
const PARALLELS_OPEN: Option<&str> = Some("image was not closed correctly");

/// As `qemu-img` makes it: clusters of 1 MiB.
pub fn parallels() -> Kind {
    Kind { qemu_tolerated: PARALLELS_OPEN, ..converted(kind("parallels", "parallels", (5 << 20) + 1536), &[], nothing) }
}

/// Small clusters.
pub fn parallels_64k() -> Kind {
    let row = kind("parallels_64k", "parallels", (2 << 20) + 512);
    Kind { qemu_tolerated: PARALLELS_OPEN, ..converted(row, &["-o", "cluster_size=64k"], nothing) }
}

/// The older kind, whose table counts sectors: QEMU's newer one with its table and sizes rewritten, read by QEMU.
pub fn parallels_old() -> Kind {
    let row = kind("parallels_old", "parallels", (3 << 20) + 1024);
    Kind {
        qemu_tolerated: PARALLELS_OPEN,
        ..converted(row, &["-o", "cluster_size=128k"], |file, _| {
            let mut bytes = fs::read(file).unwrap();
            let le32 = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
            let (tracks, entries) = (le32(&bytes, 28), le32(&bytes, 32));
            bytes[..16].copy_from_slice(b"WithoutFreeSpace");
            for entry in 0..entries as usize {
                let at = 64 + entry * 4;
                let sector = le32(&bytes, at) * tracks;
                bytes[at..at + 4].copy_from_slice(&sector.to_le_bytes());
            }
            // Of the size only the lower half counts.
            bytes[40..44].fill(0xA5);
            fs::write(file, bytes).unwrap();
        })
    }
}

/// As `qemu-img` makes it: clusters of 64 KiB.
pub fn qed() -> Kind {
    converted(kind("qed", "qed", (5 << 20) + 1536), &[], nothing)
}

/// Small clusters and tables: many of them.
pub fn qed_4k() -> Kind {
    converted(kind("qed_4k", "qed", (3 << 20) + 512), &["-o", "cluster_size=4k,table_size=2"], nothing)
}

/// On a raw backing file, which the format can say.
pub fn qed_on_raw() -> Kind {
    overlaid(kind("qed_on_raw", "qed", 3 << 20), "raw", 0, &["-o", "cluster_size=16k"])
}

/// On another, which somebody has to say.
pub fn qed_on_qcow2() -> Kind {
    Kind { parent_format: Some("qcow2"), ..overlaid(kind("qed_on_qcow2", "qed", 2 << 20), "qcow2", 0, &["-o", "cluster_size=8k"]) }
}

/// Version 1 of qcow.
pub fn qcow1() -> Kind {
    converted(kind("qcow1", "qcow", (3 << 20) + 1536), &[], nothing)
}

/// The same with compressed clusters, some of them overwritten, one by one: QEMU's converter fails when it is to make them.
pub fn qcow1_zlib() -> Kind {
    Kind {
        make: Box::new(|kind, dir| {
            let mut content = guest::initial(kind.size);
            let file = dir.join("image");
            qemu::must("qemu-img", &["create", "-q", "-f", "qcow", text(&file), &kind.size.to_string()]);
            let mut arguments = vec!["-f".to_owned(), "qcow".to_owned()];
            for (number, part) in content.chunks_mut(4096).enumerate() {
                let source = dir.join(format!("cluster{number}"));
                if number % 4 == 3 {
                    part.fill(0);
                    continue;
                }
                // So that it can be compressed. Sectors are zeros as a whole or not at all.
                part[2048..].fill(number as u8 | 1);
                fs::write(&source, &part).unwrap();
                arguments.extend(["-c".into(), format!("write -q -c -s {} {} 4096", text(&source), number * 4096)]);
            }
            arguments.push(text(&file).to_owned());
            qemu::must("qemu-io", &arguments.iter().map(String::as_str).collect::<Vec<_>>());
            (0..content.len() / 4096).for_each(|n| drop(fs::remove_file(dir.join(format!("cluster{n}")))));
            scribble(&file, "qcow", &mut content, 5);
            Made { file, content }
        }),
        ..kind("qcow1_zlib", "qcow", 1 << 20)
    }
}

/// The same on a backing file: clusters of a sector.
pub fn qcow1_on_raw() -> Kind {
    Kind { parent_format: Some("raw"), ..overlaid(kind("qcow1_on_raw", "qcow", 1 << 20), "raw", 0, &[]) }
}

/// Made from the file `source` by a command of bash's, and read by `confirm`.
fn made_by(kind: Kind, command: &'static str, confirm: fn(&Kind, &Path, &[u8])) -> Kind {
    Kind {
        make: Box::new(move |kind, dir| {
            let content = guest::initial(kind.size);
            fs::write(dir.join("source"), &content).unwrap();
            let udif = concat!(env!("CARGO_MANIFEST_DIR"), "/../samples/udif");
            let made = Command::new("bash").args(["-ec", command]).env("UDIF", udif).current_dir(dir).output().unwrap();
            assert!(made.status.success(), "`{command}` failed; is its package installed?\n{}", String::from_utf8_lossy(&made.stderr));
            fs::remove_file(dir.join("source")).unwrap();
            let file = dir.join("image");
            confirm(kind, &file, &content);
            Made { file, content }
        }),
        ..kind
    }
}

/// QEMU reads it as these bytes.
fn qemu_confirms(kind: &Kind, file: &Path, content: &[u8]) {
    qemu::compare(kind, file, content).unwrap();
}

/// dmg2img does, which does not know xz and the older files.
fn dmg2img_confirms(_: &Kind, file: &Path, content: &[u8]) {
    let other = file.with_extension("by-dmg2img");
    qemu::must("dmg2img", &["-s", "-i", text(file), "-o", text(&other)]);
    assert!(fs::read(&other).unwrap() == content, "dmg2img reads {} as something else", file.display());
    fs::remove_file(other).unwrap();
}

/// Bochs' growing image, by Bochs' own tool.
pub fn bochs() -> Kind {
    let row = kind("bochs", "bochs", (3 << 20) + 512);
    made_by(row, "bximage -func=convert -imgmode=growing -q source image", qemu_confirms)
}

/// A compressed loop image of small blocks.
pub fn cloop() -> Kind {
    made_by(kind("cloop", "cloop", 2 << 20), "create_compressed_fs -B 65536 source image", qemu_confirms)
}

/// Apple's image, nothing compressed.
pub fn dmg_raw() -> Kind {
    made_by(kind("dmg_raw", "dmg", (1 << 20) + 512), "$UDIF raw source image", qemu_confirms)
}

/// Compressed in the oldest way.
pub fn dmg_adc() -> Kind {
    made_by(kind("dmg_adc", "dmg", (1 << 20) + 512), "$UDIF adc source image", dmg2img_confirms)
}

/// In the most common.
pub fn dmg_zlib() -> Kind {
    made_by(kind("dmg_zlib", "dmg", (2 << 20) + 1536), "$UDIF zlib source image", |kind, file, content| {
        qemu_confirms(kind, file, content);
        dmg2img_confirms(kind, file, content);
    })
}

/// With bzip2.
pub fn dmg_bzip2() -> Kind {
    made_by(kind("dmg_bzip2", "dmg", 1 << 20), "$UDIF bzip2 source image", dmg2img_confirms)
}

/// In the newest way, which no reader on Linux knows: the chunks are those of Python's xz.
pub fn dmg_xz() -> Kind {
    made_by(kind("dmg_xz", "dmg", 1 << 20), "$UDIF xz source image", |_, _, _| {})
}

/// Without a property list.
pub fn dmg_resources() -> Kind {
    made_by(kind("dmg_resources", "dmg", 1 << 20), "$UDIF zlib/resources source image", qemu_confirms)
}

/// An image in a stream, made from `inner` by a shell command that reads the file `plain` and writes to standard output.
fn streamed(name: &'static str, inner: Kind, command: &'static str) -> Kind {
    Kind {
        name,
        format: inner.format,
        size: inner.size,
        qemu: false,
        qemu_check: false,
        qemu_tolerated: None,
        parent_format: None,
        check: inner.check,
        grows: false,
        stream: true,
        reader: None,
        mend: |_| {},
        make: Box::new(move |_, dir| {
            let made = inner.make(dir);
            fs::rename(&made.file, dir.join("plain")).unwrap();
            let command = format!("{command} > image");
            let output = Command::new("bash").args(["-o", "pipefail", "-ec", &command]).current_dir(dir).output().unwrap();
            assert!(output.status.success(), "`{command}` failed; is its package installed?\n{}", String::from_utf8_lossy(&output.stderr));
            Made { file: dir.join("image"), content: made.content }
        }),
    }
}

/// Decoded whole for many a damaged stream.
fn small_raw() -> Kind {
    converted(kind("small_raw", "raw", 700 << 10), &[], nothing)
}

fn small_qcow2() -> Kind {
    converted(kind("small_qcow2", "qcow2", 600 << 10), &["-o", "cluster_size=4k"], nothing)
}

const GZIP: &str = "gzip -c plain";
const BGZF: &str = "bgzip -c plain";
const XZ: &str = "xz -1 -T2 --block-size=256KiB -c plain";
const ZSTD: &str = "split -b 300000 plain part.; for p in part.*; do zstd -qc $p; done";
const BZIP2: &str = "bzip2 -1c plain";
const LZ4: &str = "lz4 -q -B4 -BI -c plain";
const LZIP: &str = "plzip -0 -n2 -B 300KiB -c plain";

/// A raw disk in gzip.
pub fn raw_gzip() -> Kind {
    streamed("raw_gzip", small_raw(), GZIP)
}

/// A raw disk in bgzf.
pub fn raw_bgzf() -> Kind {
    streamed("raw_bgzf", small_raw(), BGZF)
}

/// A raw disk in xz.
pub fn raw_xz() -> Kind {
    streamed("raw_xz", small_raw(), XZ)
}

/// A raw disk in zstd.
pub fn raw_zstd() -> Kind {
    streamed("raw_zstd", small_raw(), ZSTD)
}

/// A raw disk in bzip2.
pub fn raw_bzip2() -> Kind {
    streamed("raw_bzip2", small_raw(), BZIP2)
}

/// A raw disk in lz4.
pub fn raw_lz4() -> Kind {
    streamed("raw_lz4", small_raw(), LZ4)
}

/// A raw disk in lzip.
pub fn raw_lzip() -> Kind {
    streamed("raw_lzip", small_raw(), LZIP)
}

/// A qcow2 image in gzip.
pub fn qcow2_gzip() -> Kind {
    streamed("qcow2_gzip", small_qcow2(), GZIP)
}

/// A qcow2 image in bgzf.
pub fn qcow2_bgzf() -> Kind {
    streamed("qcow2_bgzf", small_qcow2(), BGZF)
}

/// A qcow2 image in xz.
pub fn qcow2_xz() -> Kind {
    streamed("qcow2_xz", small_qcow2(), XZ)
}

/// A qcow2 image in zstd.
pub fn qcow2_zstd_stream() -> Kind {
    streamed("qcow2_zstd_stream", small_qcow2(), ZSTD)
}

/// A qcow2 image in bzip2.
pub fn qcow2_bzip2() -> Kind {
    streamed("qcow2_bzip2", small_qcow2(), BZIP2)
}

/// A qcow2 image in lz4.
pub fn qcow2_lz4() -> Kind {
    streamed("qcow2_lz4", small_qcow2(), LZ4)
}

/// A qcow2 image in lzip.
pub fn qcow2_lzip() -> Kind {
    streamed("qcow2_lzip", small_qcow2(), LZIP)
}
