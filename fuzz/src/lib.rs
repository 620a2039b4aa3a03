//! What the fuzz targets do: one function for each, from bytes to nothing; whatever is wrong is a panic.
//!
//! libFuzzer is not needed here: `tests/fuzz.rs` of the project compiles these files too, and replays inputs with a stable toolchain.

mod cdb;
mod disk;
mod images;
mod input;
mod nbd;
mod probe;
mod qcow2;
mod ring;
mod sparse;
mod streams;
mod texts;
mod vhd;
mod vhdx;
mod vmdk;

/// A target: its name and what it does.
pub type Target = (&'static str, fn(&[u8]));

/// All targets, the riskiest first.
pub const TARGETS: &[Target] = &[
    ("qcow2_structured", images::qcow2_structured),
    ("vhdx_structured", images::vhdx_structured),
    ("cdb", cdb::cdb),
    ("ring", ring::ring),
    ("vhd_structured", images::vhd_structured),
    ("gzip", streams::gzip),
    ("xz", streams::xz),
    ("zstd", streams::zstd),
    ("bzip2", streams::bzip2),
    ("lz4", streams::lz4),
    ("lzip", streams::lzip),
    ("nbd", nbd::nbd),
    ("qcow2", images::qcow2),
    ("vhdx", images::vhdx),
    ("vhd", images::vhd),
    ("vmdk_structured", images::vmdk_structured),
    ("vmdk", images::vmdk),
    ("ova", images::ova),
    ("netlink", texts::netlink),
    ("cfgstring", texts::cfgstring),
    ("raw_probe", probe::raw_probe),
];

/// Runs a target once.
pub fn run(name: &str, data: &[u8]) {
    let (_, target) = TARGETS.iter().find(|(n, _)| *n == name).unwrap_or_else(|| panic!("there is no target {name}"));
    target(data);
}
