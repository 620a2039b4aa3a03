//! Partition tables as `sfdisk` makes them, and damaged ones.

use formats::filter::partition::{find, partitions};
use formats::filter::window::Window;
use formats::{BlockDevice, OpenOptions};
use std::io::{IoSlice, IoSliceMut, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

/// A raw disk of `size` bytes with the table that `script` describes to sfdisk.
fn disk(directory: &Path, size: u64, script: &str) -> std::path::PathBuf {
    let path = directory.join("disk.raw");
    std::fs::File::create(&path).unwrap().set_len(size).unwrap();
    let mut sfdisk = Command::new("/sbin/sfdisk").arg("-q").arg(&path).stdin(Stdio::piped()).spawn().expect("sfdisk (package fdisk)");
    sfdisk.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    assert!(sfdisk.wait().unwrap().success());
    path
}

/// What sfdisk says of it: number, first byte, length.
fn sfdisk(path: &Path) -> Vec<(u32, u64, u64)> {
    let out = Command::new("/sbin/sfdisk").arg("-J").arg(path).output().unwrap();
    let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let table = &json["partitiontable"];
    let sector = table["sectorsize"].as_u64().unwrap_or(512);
    let name = path.to_str().unwrap();
    let extended = ["5", "f", "85"];
    table["partitions"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|p| !extended.contains(&p["type"].as_str().unwrap()))
        .map(|p| {
            let number = p["node"].as_str().unwrap().strip_prefix(name).unwrap().parse().unwrap();
            (number, p["start"].as_u64().unwrap() * sector, p["size"].as_u64().unwrap() * sector)
        })
        .collect()
}

fn open(path: &Path) -> Arc<formats::Image> {
    formats::open(&OpenOptions::new(path).format("raw")).unwrap()
}

fn ours(path: &Path) -> Vec<(u32, u64, u64)> {
    partitions(&*open(path)).unwrap().iter().map(|p| (p.number, p.start, p.len)).collect()
}

#[test]
fn mbr_with_logical_partitions() {
    let directory = tempfile::tempdir().unwrap();
    let script = "label: dos\n,8M\n,4M,L\n,,E\n,5M,L\n,6M,L\n,3M,L\n";
    let path = disk(directory.path(), 64 << 20, script);
    assert_eq!(ours(&path), sfdisk(&path));
    assert_eq!(ours(&path).len(), 5);
}

#[test]
fn gpt_and_its_backup() {
    let directory = tempfile::tempdir().unwrap();
    let path = disk(directory.path(), 64 << 20, "label: gpt\n,8M\n,4M\n,5M\n");
    let whole = sfdisk(&path);
    assert_eq!(ours(&path), whole);
    let image = open(&path);
    image.write(&[IoSlice::new(&[0xFF; 64])], 512 + 40).unwrap();
    drop(image);
    assert_eq!(ours(&path), whole, "from the backup");
    let image = open(&path);
    image.write(&[IoSlice::new(&[0xFF; 64])], (64 << 20) - 512 + 40).unwrap();
    let error = partitions(&*image).unwrap_err();
    assert!(error.to_string().contains("both copies"), "{error}");
}

#[test]
fn a_partition_is_a_window() {
    let directory = tempfile::tempdir().unwrap();
    let path = disk(directory.path(), 16 << 20, "label: dos\n,4M\n,4M\n");
    let image = open(&path);
    let part = find(&*image, 2).unwrap();
    let window = Window::new(image.clone(), part.start, Some(part.len)).unwrap();
    assert_eq!(window.limits().size, 4 << 20);
    window.write(&[IoSlice::new(b"here")], 0).unwrap();
    let mut back = [0; 4];
    image.read(&mut [IoSliceMut::new(&mut back)], part.start).unwrap();
    assert_eq!(&back, b"here");
    assert_eq!(window.write(&[IoSlice::new(b"beyond")], (4 << 20) - 3).unwrap_err().kind(), formats::Kind::OutOfBounds);
    let error = find(&*image, 3).unwrap_err();
    assert!(error.to_string().contains("it has: 1, 2"), "{error}");
}

#[test]
fn no_table_is_an_error_and_noise_is_no_panic() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("noise.raw");
    let mut x = 1u64;
    for round in 0..300u64 {
        let mut bytes: Vec<u8> = (0..16384)
            .map(|_| {
                x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (x >> 56) as u8
            })
            .collect();
        if round > 0 {
            bytes[510..512].copy_from_slice(&[0x55, 0xAA]);
        }
        if round % 3 == 1 {
            bytes[450] = 0xEE;
            bytes[512..520].copy_from_slice(b"EFI PART");
        }
        if round % 3 == 2 {
            bytes[450] = 5;
            bytes[454..458].copy_from_slice(&u32::to_le_bytes((round % 30) as u32));
        }
        std::fs::write(&path, &bytes).unwrap();
        let result = partitions(&*open(&path));
        assert!(round > 0 || result.is_err());
        for part in result.unwrap_or_default() {
            assert!(part.len > 0 && part.start + part.len <= 16384);
        }
    }
}
