//! Every format that is served, through one test: what nbdcopy gets is what qemu-img makes of the same image.

use crate::harness::{Server, run};
use std::path::Path;

/// So many MiB and a bit: text, noise, holes, zeros, and an end that is no whole cluster.
fn source(path: &Path, mib: usize) {
    let mut bytes = vec![0u8; (mib << 20) + 3 * 512];
    let mut x = 1u32;
    for (at, byte) in bytes.iter_mut().enumerate() {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = match (at >> 16) % 5 {
            0 | 1 => (at / 700) as u8,
            2 => (x >> 24) as u8,
            _ => 0,
        };
    }
    let end = bytes.len() - 10;
    bytes[end..].fill(0xEE);
    std::fs::write(path, bytes).unwrap();
}

fn serve_and_compare(image: &Path, want: &Path) {
    let copy = image.with_extension("copy");
    let server = Server::new(|_| image.to_owned(), &["--read-only"]);
    run("nbdcopy", &[&server.uri(), copy.to_str().unwrap()]);
    server.end();
    let (got, want) = (std::fs::read(&copy).unwrap(), std::fs::read(want).unwrap());
    assert_eq!(got.len(), want.len(), "{}", image.display());
    assert!(got == want, "{}", image.display());
}

#[test]
fn images_of_every_format_come_out_as_qemu_img_reads_them() {
    let directory = tempfile::tempdir().unwrap();
    let raw = directory.path().join("source.raw");
    source(&raw, 8);
    let raw_text = raw.to_str().unwrap();
    // What the binary says it reads, in every kind that qemu-img makes of it.
    let table = run(env!("CARGO_BIN_EXE_img-tcmu"), &["formats"]);
    let names: Vec<&str> =
        table.lines().filter_map(|l| l.strip_prefix("| ")?.split([' ', '|']).next()).filter(|n| *n != "format").collect();
    let kinds = |name: &str| -> Vec<Vec<&'static str>> {
        match name {
            "qcow2" => vec![
                vec!["-o", "compat=0.10"],
                vec!["-o", "cluster_size=4k,lazy_refcounts=on"],
                vec!["-c"],
                vec!["-c", "-o", "compression_type=zstd"],
            ],
            "vhdx" => vec![vec![], vec!["-o", "subformat=fixed"], vec!["-o", "block_size=1M"]],
            "vpc" => vec![vec!["-o", "force_size=on"], vec!["-o", "subformat=fixed,force_size=on"], vec![]],
            "vmdk" => vec![
                vec![],
                vec!["-o", "subformat=monolithicFlat"],
                vec!["-o", "subformat=streamOptimized"],
                vec!["-o", "subformat=twoGbMaxExtentSparse"],
            ],
            "vdi" => vec![vec![], vec!["-o", "static=on"]],
            _ => vec![vec![]],
        }
    };
    let mut tried = 0;
    for name in &names {
        for (number, options) in kinds(name).into_iter().enumerate() {
            let image = directory.path().join(format!("image-{number}.{name}"));
            let text = image.to_str().unwrap();
            let mut args = vec!["convert", "-q", "-f", "raw", "-O", name];
            args.extend(&options);
            args.extend([raw_text, text]);
            let (made, said) = crate::harness::try_run("qemu-img", &args);
            // Some it reads and does not make.
            if !made && said.contains("Unknown file format") || said.contains("does not support image creation") {
                continue;
            }
            assert!(made, "{args:?}: {said}");
            let want = directory.path().join("want");
            run("qemu-img", &["convert", "-q", "-f", name, "-O", "raw", text, want.to_str().unwrap()]);
            serve_and_compare(&image, &want);
            tried += 1;
        }
    }
    assert!(tried >= 11, "{tried} kinds of {names:?}");
}

#[test]
fn compressed_images_come_out_as_they_went_in() {
    let directory = tempfile::tempdir().unwrap();
    let raw = directory.path().join("source.raw");
    source(&raw, 3);
    for (command, extension) in [("gzip", "gz"), ("xz", "xz"), ("zstd", "zst"), ("bzip2", "bz2"), ("lz4", "lz4"), ("lzip", "lz")] {
        let image = directory.path().join(format!("disk.raw.{extension}"));
        let script = format!("{command} -c < {} > {}", raw.display(), image.display());
        run("sh", &["-c", &script]);
        serve_and_compare(&image, &raw);
    }
}
