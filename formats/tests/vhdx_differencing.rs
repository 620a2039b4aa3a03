//! Differencing VHDX images, and ones with 4096-byte sectors: made by the tests' own writer, confirmed by independent readers, read and written by us, and
//! confirmed again.

mod foreign;

use foreign::operations::{Places, concurrent_operations, random_operations};
use foreign::readers::{dissect_agrees, libvhdi_agrees};
use foreign::vhdx_writer::{Block, Vhdx, data_write_guid};
use foreign::{GIB, MIB, Raw, assert_reads, open, qemu_img, try_open};
use formats::{BlockDevice, Image, Kind};
use rand::{Rng, RngCore, SeedableRng, rngs::StdRng};
use std::os::unix::fs::FileExt;
use std::path::Path;
use uuid::Uuid;

/// Random blocks of every kind (`zeroing`: also those that read as zeros without data) for a child, laid over `raw`, which holds what its parent shows.
fn blocks(raw: &Raw, block: u64, sector: u64, numbers: &[u64], zeroing: bool, seed: u64) -> Vec<(u64, Block)> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut random = |len: u64| {
        let mut bytes = vec![0; len as usize];
        rng.fill_bytes(&mut bytes);
        bytes
    };
    let mut list = Vec::new();
    for (index, number) in numbers.iter().enumerate() {
        let at = number * block;
        let len = block.min(raw.size - at);
        let put = |at: u64, bytes: &[u8]| raw.file.write_all_at(bytes, at).unwrap();
        list.push((
            *number,
            match if zeroing { index % 5 } else { 2 + index % 3 } {
                0 => {
                    put(at, &vec![0; len as usize]);
                    Block::Zero
                }
                1 => {
                    put(at, &vec![0; len as usize]);
                    Block::Unmapped
                }
                2 => {
                    let bytes = random(len);
                    put(at, &bytes);
                    Block::Full(bytes)
                }
                _ => {
                    let mut rng = StdRng::seed_from_u64(seed + number);
                    let mut runs = Vec::new();
                    let mut first = rng.random_range(0..20);
                    while (first + 1) * sector <= len && runs.len() < 200 {
                        let count = rng.random_range(1..60).min(len / sector - first);
                        let bytes = random(count * sector);
                        put(at + first * sector, &bytes);
                        runs.push((first, bytes));
                        first += count + rng.random_range(1..90);
                    }
                    Block::Partial(runs)
                }
            },
        ));
    }
    list
}

fn locator(parent: &str, linkage: Uuid) -> foreign::vhdx_writer::Locator {
    vec![
        ("parent_linkage", format!("{{{linkage}}}")),
        ("relative_path", format!(".\\{parent}")),
        ("absolute_win32_path", format!("C:\\images\\{parent}")),
    ]
}

/// A chain of base.vhdx, perhaps middle.vhdx, and top.vhdx, of `size` bytes; returns what the top shows. `numbers`: the blocks of each child.
fn chain(dir: &Path, size: u64, block: u64, data: &[(u64, u64)], zeroing: bool, numbers: &[&[u64]]) -> Raw {
    let raw = Raw::new(dir.join("raw"), size, 5, data);
    qemu_img(dir, &["convert", "-f", "raw", "-O", "vhdx", "-o", "block_size=1M", "raw", "base.vhdx"]);
    let mut parent = ("base.vhdx", data_write_guid(&dir.join("base.vhdx")));
    for (level, numbers) in (2 - numbers.len()..).zip(numbers) {
        let name = ["middle.vhdx", "top.vhdx"][level];
        let image = Vhdx {
            size,
            block,
            sector: 512,
            data_write: Uuid::new_v4(),
            parent: Some(locator(parent.0, parent.1)),
            blocks: blocks(&raw, block, 512, numbers, zeroing, level as u64),
        };
        image.write(&dir.join(name));
        parent = (name, image.data_write);
    }
    raw
}

fn close(image: std::sync::Arc<Image>) {
    image.close().unwrap();
}

/// dissect.hypervisor is asked of a child and a base with blocks of one size: it misreads other chains.
#[test]
fn a_child_is_read_and_written() {
    read_and_written(MIB, true, &[&[1, 2, 4, 5, 6, 10, 13, 14, 35]], &["top.vhdx", "base.vhdx"], |dir, _, raw| {
        dissect_agrees(dir, "top.vhdx", raw);
    });
}

/// libvhdi shows the parent in blocks whose state is zero or unmapped, which the specification forbids: it is asked where there are none.
#[test]
fn a_chain_is_read_and_written() {
    let numbers: [&[u64]; 2] = [&[0, 2, 3, 5, 9, 12, 13], &[1, 2, 4, 5, 6, 10, 13, 14]];
    read_and_written(2 * MIB, false, &numbers, &["top.vhdx", "middle.vhdx", "base.vhdx"], libvhdi_agrees);
}

fn read_and_written(block: u64, zeroing: bool, numbers: &[&[u64]], names: &[&str], confirm: impl Fn(&Path, &[&str], &Raw)) {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let size = 40 * MIB;
    let raw = chain(dir, size, block, &[(0, 30 * MIB)], zeroing, numbers);
    let places = Places { zeroing, ..Places::whole(size) };
    // The writer is right, others say.
    confirm(dir, names, &raw);
    assert_reads("chain", &open(&dir.join("top.vhdx"), false), &raw);
    let parents = || names[1..].iter().map(|n| std::fs::read(dir.join(n)).unwrap()).collect::<Vec<_>>();
    let before = parents();
    for session in 0..3 {
        let image = open(&dir.join("top.vhdx"), true);
        random_operations("top", &image, &raw, &places, session, 200);
        if session == 1 {
            concurrent_operations("top", &image, &raw, &places, session, 200);
        }
        assert_reads("written", &image, &raw);
        close(image);
        confirm(dir, names, &raw);
    }
    assert_reads("written", &open(&dir.join("top.vhdx"), false), &raw);
    assert!(before == parents(), "parents are not written to");
}

/// Sector bitmaps of the second and third chunk.
#[test]
fn a_chain_beyond_four_and_eight_gib() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let size = 9 * GIB;
    let far = [0, 4095, 4096, 4097, 8190, 8191, 8192, 8193, 9214, 9215];
    let places: Vec<_> = far.iter().map(|b| (b * MIB, MIB)).collect();
    let raw = chain(dir, size, MIB, &places, true, &[&far[..7], &far[2..]]);
    assert_reads("chain", &open(&dir.join("top.vhdx"), false), &raw);
    for session in 0..2 {
        let image = open(&dir.join("top.vhdx"), true);
        random_operations("top", &image, &raw, &Places::new(&places), session, 200);
        close(image);
        assert_reads("written", &open(&dir.join("top.vhdx"), false), &raw);
    }
}

#[test]
fn sectors_of_4096_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let size = 30 * MIB + 8192;
    let raw = Raw::new(dir.join("raw"), size, 5, &[]);
    let mut base = Vhdx { size, block: MIB, sector: 4096, data_write: Uuid::new_v4(), parent: None, blocks: Vec::new() };
    let dense: Vec<(u64, Block)> = blocks(&raw, MIB, 4096, &[0, 1, 2, 5, 6, 7, 30], true, 3)
        .into_iter()
        .map(|(number, _)| (number, Block::Full(raw.read(number * MIB, MIB.min(size - number * MIB)))))
        .collect();
    base.blocks = dense;
    base.write(&dir.join("base.vhdx"));
    let image = open(&dir.join("base.vhdx"), false);
    assert_eq!(image.limits().sector, 4096);
    assert_reads("4096", &image, &raw);
    drop(image);
    libvhdi_agrees(dir, &["base.vhdx"], &raw);
    dissect_agrees(dir, "base.vhdx", &raw);
    let child = Vhdx {
        data_write: Uuid::new_v4(),
        parent: Some(locator("base.vhdx", base.data_write)),
        blocks: blocks(&raw, MIB, 4096, &[0, 3, 4, 5, 7, 8, 9], false, 4),
        ..base
    };
    child.write(&dir.join("child.vhdx"));
    assert_reads("4096 child", &open(&dir.join("child.vhdx"), false), &raw);
    libvhdi_agrees(dir, &["child.vhdx", "base.vhdx"], &raw);
    dissect_agrees(dir, "child.vhdx", &raw);
    let image = open(&dir.join("child.vhdx"), true);
    random_operations("4096 child", &image, &raw, &Places { zeroing: false, ..Places::whole(size) }, 1, 300);
    assert_reads("written", &image, &raw);
    close(image);
    libvhdi_agrees(dir, &["child.vhdx", "base.vhdx"], &raw);
    dissect_agrees(dir, "child.vhdx", &raw);
}

#[test]
fn the_wrong_parent_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let raw = chain(dir, 8 * MIB, MIB, &[(0, 3 * MIB)], true, &[&[0, 3], &[1, 4]]);
    // Written to behind its child's back.
    let image = open(&dir.join("base.vhdx"), true);
    image.write(&[std::io::IoSlice::new(b"x")], 0).unwrap();
    close(image);
    let error = try_open(&dir.join("top.vhdx"), false).err().expect("the base has changed");
    assert_eq!(error.kind(), Kind::Corrupt, "{}", error.chain());
    assert!(error.chain().contains("identifier"), "{}", error.chain());
    // By another of its names, once it is right again.
    let raw2 = Raw::existing(dir.join("raw"));
    qemu_img(dir, &["convert", "-f", "raw", "-O", "vhdx", "-o", "block_size=1M", "raw", "other.vhdx"]);
    let child = Vhdx {
        size: raw.size,
        block: MIB,
        sector: 512,
        data_write: Uuid::new_v4(),
        parent: Some(vec![
            ("parent_linkage2", data_write_guid(&dir.join("other.vhdx")).to_string()),
            ("parent_linkage", Uuid::new_v4().to_string()),
            ("relative_path", "..\\gone\\other.vhdx".to_owned()),
            ("absolute_win32_path", "D:\\elsewhere\\other.vhdx".to_owned()),
        ]),
        blocks: vec![(2, Block::Zero)],
    };
    raw2.file.write_all_at(&vec![0; MIB as usize], 2 * MIB).unwrap();
    child.write(&dir.join("child.vhdx"));
    assert_reads("second name", &open(&dir.join("child.vhdx"), false), &raw2);
}

#[test]
fn an_orphan_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    chain(dir.path(), 8 * MIB, MIB, &[(0, 3 * MIB)], true, &[&[0, 3], &[1, 4]]);
    std::fs::remove_file(dir.path().join("base.vhdx")).unwrap();
    let error = try_open(&dir.path().join("top.vhdx"), false).err().expect("its base is gone");
    assert!(error.chain().contains("base.vhdx"), "{}", error.chain());
}
