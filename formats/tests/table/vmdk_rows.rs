//! The rows of VMDK, of the archives that hold one, and of disks in pieces.

use super::foreign::Raw;
use super::foreign::readers::dissect_agrees;
use super::foreign::vmdk_writer::{Grain, cowd, sesparse};
use super::rows::{converted, kind, nothing, overlaid, text};
use super::{Kind, Made, guest, qemu};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use std::fs;
use std::path::Path;
use std::process::Command;

/// dissect.hypervisor reads these bytes in the file.
fn dissect_shows(file: &Path, content: &[u8]) {
    let plain = tempfile::NamedTempFile::new_in(file.parent().unwrap()).unwrap();
    fs::write(plain.path(), content).unwrap();
    dissect_agrees(file.parent().unwrap(), text(file), &Raw::existing(plain.path().to_path_buf()));
}

/// A sparse extent that is the disk.
pub fn vmdk_sparse() -> Kind {
    converted(kind("vmdk_sparse", "vmdk", (6 << 20) + 1536), &[], nothing)
}

/// One whose tables have a word for zeros.
pub fn vmdk_zeroed_grains() -> Kind {
    converted(kind("vmdk_zeroed_grains", "vmdk", 4 << 20), &["-o", "zeroed_grain=on"], nothing)
}

/// On a parent that is shorter.
pub fn vmdk_child() -> Kind {
    overlaid(kind("vmdk_child", "vmdk", 4 << 20), "vmdk", 0, &[])
}

/// A chain of three that can say that there are zeros.
pub fn vmdk_child_zeroed_grains() -> Kind {
    overlaid(kind("vmdk_child_zeroed_grains", "vmdk", 4 << 20), "vmdk", 1, &["-o", "zeroed_grain=on"])
}

/// Compressed grains.
pub fn vmdk_stream() -> Kind {
    converted(kind("vmdk_stream", "vmdk", (3 << 20) + 512), &["-o", "subformat=streamOptimized"], nothing)
}

/// Compressed grains, and the directory at the end, with a footer.
pub fn vmdk_stream_footer() -> Kind {
    Kind {
        make: Box::new(|kind, dir| {
            let content = guest::initial(kind.size);
            fs::write(dir.join("source"), &content).unwrap();
            let script = "import VMDKstream, sys; VMDKstream.convert_to_stream('source', 'image')";
            let output = Command::new("/usr/bin/python3").args(["-c", script]).current_dir(dir).output().unwrap();
            assert!(output.status.success(), "VMDKstream (python3-vmdkstream): {}", String::from_utf8_lossy(&output.stderr));
            fs::remove_file(dir.join("source")).unwrap();
            Made { file: dir.join("image"), content }
        }),
        ..kind("vmdk_stream_footer", "vmdk", 3 << 20)
    }
}

/// A descriptor and a flat extent.
pub fn vmdk_flat() -> Kind {
    converted(kind("vmdk_flat", "vmdk", (2 << 20) + 512), &["-o", "subformat=monolithicFlat"], nothing)
}

/// A descriptor and a sparse extent.
pub fn vmdk_2gb_sparse() -> Kind {
    converted(kind("vmdk_2gb_sparse", "vmdk", (3 << 20) + 512), &["-o", "subformat=twoGbMaxExtentSparse"], nothing)
}

/// A descriptor and a flat extent that is numbered.
pub fn vmdk_2gb_flat() -> Kind {
    converted(kind("vmdk_2gb_flat", "vmdk", 1 << 20), &["-o", "subformat=twoGbMaxExtentFlat"], nothing)
}

/// Lines of a descriptor, as the descriptor's own file.
fn vmdk_descriptor(kind: &str, parent: Option<&Path>, extents: &[String]) -> String {
    let parent = parent.map(|base| {
        let text = fs::read(base).unwrap();
        let text = String::from_utf8_lossy(&text);
        let cid = text.lines().find_map(|l| l.strip_prefix("CID=")).unwrap();
        format!("parentCID={cid}\nparentFileNameHint=\"{}\"", base.file_name().unwrap().to_str().unwrap())
    });
    let parent = parent.unwrap_or_else(|| "parentCID=ffffffff".into());
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=5a3c1e00\n{parent}\ncreateType=\"{kind}\"\n\n# Extent description\n{}\n\n# The Disk Data Base\n#DDB\n\nddb.adapterType = \"lsilogic\"\n",
        extents.join("\n")
    )
}

/// A piece of a file, a sparse extent, and two pieces of another file, the second one first.
pub fn vmdk_mixed() -> Kind {
    Kind {
        make: Box::new(|kind, dir| {
            let content = guest::initial(kind.size);
            // QEMU reads on to the end of a grain where the extent ends inside it.
            let (flat, sparse) = (1 << 20, (1 << 20) + (64 << 10));
            let rest = content.len() - flat - sparse;
            let mut file = vec![0xEE; 4096];
            file.extend_from_slice(&content[..flat]);
            fs::write(dir.join("first.bin"), file).unwrap();
            fs::write(dir.join("source"), &content[flat..flat + sparse]).unwrap();
            let convert = ["convert", "-q", "-f", "raw", "-O", "vmdk", "-o", "subformat=twoGbMaxExtentSparse"];
            qemu::must("qemu-img", &[&convert[..], &[text(&dir.join("source")), text(&dir.join("two.vmdk"))]].concat());
            fs::remove_file(dir.join("source")).unwrap();
            let (a, b) = content[flat + sparse..].split_at(rest / 1024 * 512);
            fs::write(dir.join("third and fourth.bin"), [b, a].concat()).unwrap();
            let extents = [
                format!("RW {} FLAT \"first.bin\" 8", flat / 512),
                format!("RW {} SPARSE \"two-s001.vmdk\"", sparse / 512),
                format!("RW {} FLAT \"third and fourth.bin\" {}", a.len() / 512, b.len() / 512),
                format!("RW {} VMFS \"third and fourth.bin\"", b.len() / 512),
            ];
            fs::write(dir.join("image"), vmdk_descriptor("twoGbMaxExtentSparse", None, &extents)).unwrap();
            Made { file: dir.join("image"), content }
        }),
        ..kind("vmdk_mixed", "vmdk", (3 << 20) + 512)
    }
}

/// An extent of the tests' own writer, on a parent or alone, of what `content` shows; without a parent, what is not there is zeros.
fn written_vmdk(kind: Kind, parent: bool, line: &'static str, grain: usize, write: fn(usize, &[Grain<'_>]) -> Vec<u8>) -> Kind {
    Kind {
        make: Box::new(move |kind, dir| {
            let mut content = guest::initial(kind.size);
            let base = dir.join("base");
            if parent {
                fs::write(dir.join("source"), &content).unwrap();
                let convert = ["convert", "-q", "-f", "raw", "-O", "vmdk", "-o", "subformat=monolithicFlat"];
                qemu::must("qemu-img", &[&convert[..], &[text(&dir.join("source")), text(&base)]].concat());
                fs::remove_file(dir.join("source")).unwrap();
            }
            let mut rng = StdRng::seed_from_u64(kind.size);
            let mut what = Vec::new();
            for part in content.chunks_mut(grain) {
                what.push(rng.random_range(0..3));
                match what.last() {
                    Some(0) if parent => {}
                    Some(2) => rng.fill_bytes(part),
                    _ => part.fill(0),
                }
            }
            let grains: Vec<_> = content
                .chunks(grain)
                .zip(what)
                .map(|(part, what)| match what {
                    0 => Grain::Absent,
                    1 => Grain::Zero,
                    _ => Grain::Data(part),
                })
                .collect();
            let sectors = content.len() / 512;
            fs::write(dir.join("extent.vmdk"), write(sectors, &grains)).unwrap();
            let extents = [format!("RW {sectors} {line} \"extent.vmdk\"")];
            let create = if line == "SESPARSE" { "seSparse" } else { "vmfsSparse" };
            fs::write(dir.join("image"), vmdk_descriptor(create, parent.then_some(base.as_path()), &extents)).unwrap();
            // The writer is right, others say.
            qemu::compare(kind, &dir.join("image"), &content).unwrap();
            Made { file: dir.join("image"), content }
        }),
        reader: Some(dissect_shows),
        // It knows no way to check these.
        qemu_check: false,
        ..kind
    }
}

/// An ESX sparse extent on a flat parent.
pub fn vmdk_cowd() -> Kind {
    written_vmdk(kind("vmdk_cowd", "vmdk", (3 << 20) + 8192), true, "VMFSSPARSE", 512, |sectors, grains| cowd(sectors, 1, grains))
}

/// A space-efficient extent.
pub fn vmdk_sesparse() -> Kind {
    written_vmdk(kind("vmdk_sesparse", "vmdk", 18 << 20), false, "SESPARSE", 4096, sesparse)
}

/// A space-efficient extent on a flat parent.
pub fn vmdk_sesparse_child() -> Kind {
    written_vmdk(kind("vmdk_sesparse_child", "vmdk", (2 << 20) + 8192), true, "SESPARSE", 4096, sesparse)
}

/// A streamOptimized disk in an archive behind its description.
pub fn ova() -> Kind {
    let inner = vmdk_stream();
    Kind {
        make: Box::new(move |_, dir| {
            let made = inner.make(dir);
            fs::rename(&made.file, dir.join("machine-disk1.vmdk")).unwrap();
            fs::write(dir.join("machine.ovf"), "<Envelope/>").unwrap();
            fs::write(dir.join("machine.mf"), "").unwrap();
            let arguments = ["--format=ustar", "-cf", "image", "machine.ovf", "machine.mf", "machine-disk1.vmdk"];
            let made_archive = Command::new("tar").args(arguments).current_dir(dir).status().unwrap();
            assert!(made_archive.success(), "tar {arguments:?}");
            Made { file: dir.join("image"), content: made.content }
        }),
        qemu: false,
        ..kind("ova", "ova", (3 << 20) + 512)
    }
}

/// A raw disk in pieces, whose last one ends inside a sector.
pub fn split() -> Kind {
    Kind {
        make: Box::new(|kind, dir| {
            let mut content = guest::initial(kind.size);
            let end = content.len() - 211;
            content[end..].fill(0);
            fs::write(dir.join("source"), &content[..end]).unwrap();
            let arguments = ["-b", "700416", "-d", "-a", "3", "source", "image."];
            assert!(Command::new("split").args(arguments).current_dir(dir).status().unwrap().success(), "split {arguments:?}");
            fs::remove_file(dir.join("source")).unwrap();
            Made { file: dir.join("image.000"), content }
        }),
        qemu: false,
        reader: Some(|file, content| {
            let script = format!("cat '{}'*", text(&file.with_extension("")));
            let output = Command::new("bash").args(["-ec", &script]).output().unwrap();
            let (read, rest) = content.split_at(output.stdout.len().min(content.len()));
            assert!(output.stdout == read && rest.iter().all(|b| *b == 0) && rest.len() < 512, "{} shows something else", file.display());
        }),
        ..kind("split", "split", (2 << 20) + 1024)
    }
}
