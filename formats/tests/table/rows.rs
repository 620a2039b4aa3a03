//! The rows of the table. Made by `qemu-img`, which is somebody else's writer.

use super::{Kind, Made, guest, qemu};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::fs;
use std::path::Path;

/// What most rows have in common.
fn kind(name: &'static str, format: &'static str, size: u64) -> Kind {
    Kind {
        name,
        format,
        size,
        make: Box::new(|_, _| unreachable!("every row has a recipe")),
        qemu: true,
        qemu_check: format == "qcow2",
        check: formats::drivers::by_name(format).unwrap().can.check,
        mend: |_| {},
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Content by `qemu-img convert` with these arguments; then `after` does more to the file and its content.
fn converted(kind: Kind, arguments: &'static [&'static str], after: fn(&Path, &mut [u8])) -> Kind {
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
fn overlaid(kind: Kind, base_format: &'static str, between: usize, arguments: &'static [&'static str]) -> Kind {
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

fn nothing(_: &Path, _: &mut [u8]) {}

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
    converted(kind("qcow2_2m", "qcow2", 12 << 20), &["-o", "cluster_size=2M"], nothing)
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
