//! Other people's crates as second opinions, on the images that they are right about (`docs/dependencies.md` has what they are wrong about):
//! both must read what we have written, and we what `imago` has written. Likewise the crate `vhdx`, which only reads.

mod table;

use formats::{BlockDevice, ZeroMode};
use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};
use qcow2_rs::dev::Qcow2DevParams;
use qcow2_rs::helpers::Qcow2IoBuf;
use qcow2_rs::utils::qcow2_setup_dev_sync;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use std::io::Read;
use std::path::Path;
use table::{Kind, open, qemu, rows, scratch, seed};

const REQUESTS: usize = 300;

fn imago(file: &Path, writable: bool) -> FormatAccess<File> {
    let image = Qcow2::<File>::builder_path(file).write(writable).open(PermissiveImplicitOpenGate::default());
    FormatAccess::new(image.unwrap_or_else(|e| panic!("imago: {e}")))
}

fn read_by_imago(file: &Path) -> Vec<u8> {
    let image = imago(file, false);
    let mut bytes = vec![0xEE; image.size() as usize];
    image.read(&mut bytes[..], 0).unwrap_or_else(|e| panic!("imago: {e}"));
    bytes
}

fn read_by_qcow2_rs(file: &Path, size: u64) -> Vec<u8> {
    let image = qcow2_setup_dev_sync(file, &Qcow2DevParams::new(9, None, None, true, false)).unwrap_or_else(|e| panic!("qcow2-rs: {e}"));
    futures::executor::block_on(async {
        image.qcow2_prep_io().await.unwrap();
        let mut bytes = Qcow2IoBuf::<u8>::new(size as usize);
        image.read_at(&mut bytes, 0).await.unwrap_or_else(|e| panic!("qcow2-rs: {e}"));
        bytes.to_vec()
    })
}

/// A random range of whole sectors, up to 200,000 bytes.
fn range(rng: &mut StdRng, size: u64) -> std::ops::Range<usize> {
    let first = rng.random_range(0..size / 512);
    let count = rng.random_range(1..=400).min(size / 512 - first);
    (first * 512) as usize..((first + count) * 512) as usize
}

/// Our engine writes, zeros and discards at random.
fn write_by_us(format: &str, file: &Path, content: &mut [u8], rng: &mut StdRng) {
    let image = formats::open(&formats::OpenOptions::new(file).format(format)).unwrap();
    for _ in 0..REQUESTS {
        let range = range(rng, content.len() as u64);
        let (at, len) = (range.start as u64, range.len() as u64);
        match rng.random_range(0..10) {
            0..6 => {
                rng.fill_bytes(&mut content[range.clone()]);
                open::write(&*image, at, &content[range]).unwrap();
            }
            6..8 => {
                content[range].fill(0);
                image.zero(at, len, ZeroMode::MayUnmap).unwrap();
            }
            _ => {
                image.discard(at, len).unwrap();
                content[range.clone()].copy_from_slice(&open::read(&*image, at, range.len()).unwrap());
            }
        }
    }
    image.close().unwrap();
}

fn opinions(kind: &Kind, qcow2_rs_too: bool) {
    let dir = scratch();
    let mut made = kind.make(dir.path());
    let mut rng = StdRng::seed_from_u64(seed());
    assert!(read_by_imago(&made.file) == made.content, "imago, as made");
    write_by_us("qcow2", &made.file, &mut made.content, &mut rng);
    assert!(read_by_imago(&made.file) == made.content, "imago, after our writes");
    if qcow2_rs_too {
        assert!(read_by_qcow2_rs(&made.file, kind.size) == made.content, "qcow2-rs, after our writes");
    }
    let theirs = imago(&made.file, true);
    for _ in 0..REQUESTS {
        let range = range(&mut rng, kind.size);
        rng.fill_bytes(&mut made.content[range.clone()]);
        theirs.write(&made.content[range.clone()], range.start as u64).unwrap_or_else(|e| panic!("imago: {e}"));
    }
    theirs.flush().unwrap();
    drop(theirs);
    let image = open::file(kind, &made.file, false);
    assert!(open::read_all(&*image).unwrap() == made.content, "we, after imago's writes");
    assert_eq!(image.check(false).unwrap().corruptions, 0);
    drop(image);
    // And on from there.
    write_by_us("qcow2", &made.file, &mut made.content, &mut rng);
    assert!(read_by_imago(&made.file) == made.content, "imago, after our writes to what it has written");
    qemu::check(kind, &made.file).unwrap();
    qemu::compare(kind, &made.file, &made.content).unwrap();
}

macro_rules! tests {
    ($($kind:ident: $both:literal)*) => {
        $(
            #[test]
            fn $kind() {
                opinions(&rows::$kind(), $both);
            }
        )*
    };
}
// qcow2-rs: no backing file that is raw, no clusters of 512 bytes, no sizes that are no multiple of the cluster.
tests!(
    qcow2: true qcow2_v2: true qcow2_4k: true qcow2_2m: true qcow2_lazy: true qcow2_refcount8: true
    qcow2_512: false qcow2_refcount32: false qcow2_odd_size: false qcow2_refcount1: false qcow2_refcount2: false qcow2_refcount4: false qcow2_refcount64: false
    qcow2_zlib: true qcow2_snapshots: true qcow2_compressed_snapshots: true qcow2_on_raw: false qcow2_chain: false qcow2_v2_on_raw: false
);

/// An overlay, as qcow2-rs reads it: qcow2 on qcow2, named in full.
#[test]
fn qcow2_on_qcow2() {
    let dir = scratch();
    let mut made = rows::qcow2().make(dir.path());
    let base = made.file.to_str().unwrap();
    let overlay = dir.path().join("overlay");
    qemu::must("qemu-img", &["create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", overlay.to_str().unwrap()]);
    write_by_us("qcow2", &overlay, &mut made.content, &mut StdRng::seed_from_u64(seed()));
    assert!(read_by_imago(&overlay) == made.content, "imago");
    assert!(read_by_qcow2_rs(&overlay, made.content.len() as u64) == made.content, "qcow2-rs");
}

/// Clean VHDX images far below 4 GiB.
fn vhdx_opinion(kind: &Kind) {
    let dir = scratch();
    let mut made = kind.make(dir.path());
    write_by_us("vhdx", &made.file, &mut made.content, &mut StdRng::seed_from_u64(seed()));
    let mut disk = vhdx::Vhdx::load(&made.file);
    let mut bytes = vec![0xEE; made.content.len()];
    disk.reader().read_exact(&mut bytes).unwrap();
    assert!(bytes == made.content, "vhdx, after our writes");
}

#[test]
fn vhdx_dynamic() {
    vhdx_opinion(&rows::vhdx_dynamic());
}

#[test]
fn vhdx_fixed() {
    vhdx_opinion(&rows::vhdx_fixed());
}
