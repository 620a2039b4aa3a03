//! The table of image kinds that the shared tests run over: how to make one, how to open it, and who else can say whether it is in order.
//!
//! A kind is one function in `rows.rs` and one name in [`for_each_kind`] (and in [`for_each_writable_kind`]); every test binary beside this folder
//! then has a test for it. Shared parts: `guest.rs` (what the guest wrote, and what it may read back), `open.rs` (files and recorded stores),
//! `operations.rs` (random requests), `pages.rs` (many variants of one file), `cut.rs` (power cuts and deaths), `qemu.rs` (QEMU's opinion, and other readers').
//!
//! `FORMATS_TEST_LONG=1` selects the long modes; `FORMATS_TEST_SEED=n` another run than the committed one.
#![allow(dead_code, reason = "each test binary uses a part")]

pub mod cut;
#[path = "../foreign/mod.rs"]
pub mod foreign;
pub mod guest;
pub mod open;
pub mod operations;
pub mod pages;
pub mod qemu;
pub mod rows;
pub mod vmdk_rows;

use std::path::{Path, PathBuf};

/// Looks at an image file with a reader other than QEMU's and panics if it does not show these bytes.
pub type Reader = fn(file: &Path, content: &[u8]);

/// Makes an image of a kind in a directory.
pub type Recipe = Box<dyn Fn(&Kind, &Path) -> Made + Send + Sync>;

/// One kind of image.
pub struct Kind {
    /// Its name in the table and in the names of tests.
    pub name: &'static str,
    /// The driver.
    pub format: &'static str,
    /// Guest size in bytes.
    pub size: u64,
    /// Makes an image file in a directory.
    pub make: Recipe,
    /// QEMU can open it (by the driver's name).
    pub qemu: bool,
    /// `qemu-img check` knows the format.
    pub qemu_check: bool,
    /// Of what `qemu-img check` says of an image after a cut: complaints of this are none of ours, since the format has no way to spare it them.
    pub qemu_tolerated: Option<&'static str>,
    /// The parent's format, where the image has no way to say it.
    pub parent_format: Option<&'static str>,
    /// Our own `check` knows it.
    pub check: bool,
    /// It can be made longer.
    pub grows: bool,
    /// The file is a compressed stream with the image in it, which nobody can write to.
    pub stream: bool,
    /// Who else reads it, where QEMU does not.
    pub reader: Option<Reader>,
    /// Mends checksums in the bytes of a mutant, so that damage gets past them.
    pub mend: fn(&mut [u8]),
}

/// An image file that a recipe has made.
pub struct Made {
    /// The file to open.
    pub file: PathBuf,
    /// The guest's bytes in it.
    pub content: Vec<u8>,
}

impl Kind {
    /// Makes one in `dir`.
    pub fn make(&self, dir: &Path) -> Made {
        let made = (self.make)(self, dir);
        assert_eq!(made.content.len() as u64, self.size);
        made
    }
}

/// Whether the long modes were asked for.
pub fn long() -> bool {
    std::env::var_os("FORMATS_TEST_LONG").is_some_and(|v| v != "0")
}

/// The seed of this run: fixed, unless the environment says another.
pub fn seed() -> u64 {
    std::env::var("FORMATS_TEST_SEED").map_or(1, |s| s.parse().expect("FORMATS_TEST_SEED is a number"))
}

/// A directory that goes away with the test. In memory if there is such a place: tests sync a lot.
pub fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let builder = tempfile::Builder::new();
    if memory.is_dir() { builder.tempdir_in(memory).unwrap() } else { builder.tempdir().unwrap() }
}

/// Makes tests: `for_each_kind!(test_macro)` calls `test_macro!(name name …)`.
#[allow(unused_macros)]
macro_rules! for_each_kind {
    ($tests:ident) => {
        $tests!(raw raw_odd_length
            qcow2 qcow2_v2 qcow2_512 qcow2_4k qcow2_2m qcow2_odd_size qcow2_refcount1 qcow2_refcount2 qcow2_refcount4 qcow2_refcount8
            qcow2_refcount32 qcow2_refcount64 qcow2_lazy qcow2_zlib qcow2_zstd qcow2_snapshots qcow2_compressed_snapshots qcow2_bitmap
            qcow2_subclusters qcow2_subclusters_16k qcow2_subclusters_2m qcow2_subclusters_zlib qcow2_subclusters_snapshots
            qcow2_subclusters_on_raw qcow2_subclusters_chain
            qcow2_on_raw qcow2_chain qcow2_v2_on_raw overlay_on_gzip overlay_on_vhdx
            vhd_dynamic vhd_fixed vhd_differencing vhd_small_blocks
            vhdx_dynamic vhdx_fixed vhdx_2m vhdx_32m vhdx_differencing vhdx_4096 vhdx_differencing_4096
            vdi_dynamic vdi_static vdi_differencing parallels parallels_64k parallels_old
            qed qed_4k qed_on_raw qed_on_qcow2 qcow1 qcow1_zlib qcow1_on_raw
            vmdk_sparse vmdk_zeroed_grains vmdk_child vmdk_child_zeroed_grains vmdk_stream vmdk_stream_footer
            vmdk_flat vmdk_2gb_sparse vmdk_2gb_flat vmdk_mixed vmdk_cowd vmdk_sesparse vmdk_sesparse_child ova split
            qcow2_data_file qcow2_data_file_raw qcow2_data_file_subclusters qcow2_data_file_on_raw
            bochs cloop dmg_raw dmg_adc dmg_zlib dmg_bzip2 dmg_xz dmg_resources
            raw_gzip raw_bgzf raw_xz raw_zstd raw_bzip2 raw_lz4 raw_lzip
            qcow2_gzip qcow2_bgzf qcow2_xz qcow2_zstd_stream qcow2_bzip2 qcow2_lz4 qcow2_lzip);
    };
}
#[allow(unused_imports)]
pub(crate) use for_each_kind;

/// Likewise for those that can be written.
#[allow(unused_macros)]
macro_rules! for_each_writable_kind {
    ($tests:ident) => {
        $tests!(raw raw_odd_length
            qcow2 qcow2_v2 qcow2_512 qcow2_4k qcow2_2m qcow2_odd_size qcow2_refcount1 qcow2_refcount2 qcow2_refcount4 qcow2_refcount8
            qcow2_refcount32 qcow2_refcount64 qcow2_lazy qcow2_zlib qcow2_zstd qcow2_snapshots qcow2_compressed_snapshots qcow2_bitmap
            qcow2_subclusters qcow2_subclusters_16k qcow2_subclusters_2m qcow2_subclusters_zlib qcow2_subclusters_snapshots
            qcow2_subclusters_on_raw qcow2_subclusters_chain
            qcow2_on_raw qcow2_chain qcow2_v2_on_raw overlay_on_gzip overlay_on_vhdx
            vhd_dynamic vhd_fixed vhd_differencing vhd_small_blocks
            vhdx_dynamic vhdx_fixed vhdx_2m vhdx_32m vhdx_differencing vhdx_4096 vhdx_differencing_4096
            vmdk_sparse vmdk_zeroed_grains vmdk_child vmdk_child_zeroed_grains
            vdi_dynamic vdi_static vdi_differencing parallels parallels_64k parallels_old
            qed qed_4k qed_on_raw qed_on_qcow2 qcow1 qcow1_zlib qcow1_on_raw);
    };
}
#[allow(unused_imports)]
pub(crate) use for_each_writable_kind;

/// Likewise for those that can be written and consist of several files, of which power cuts are not recorded.
#[allow(unused_macros)]
macro_rules! for_each_kind_of_many_files {
    ($tests:ident) => {
        $tests!(vmdk_flat vmdk_2gb_sparse vmdk_2gb_flat vmdk_mixed split
            qcow2_data_file qcow2_data_file_raw qcow2_data_file_subclusters qcow2_data_file_on_raw);
    };
}
#[allow(unused_imports)]
pub(crate) use for_each_kind_of_many_files;

/// A module `$test` with a test of every kind's name, which calls `super::$test(kind)`.
#[allow(unused_macros)]
macro_rules! kind_tests {
    ($test:ident: $($kind:ident)*) => {
        mod $test {
            $(
                #[test]
                fn $kind() {
                    super::$test(&crate::table::rows::$kind());
                }
            )*
        }
    };
}
#[allow(unused_imports)]
pub(crate) use kind_tests;
