//! VM disk images behind one engine: a format says where a byte lives, the engine moves the bytes.
//!
//! Front ends open an image with [`open()`] and see a [`BlockDevice`]. Format authors implement [`Format`].
//! This crate knows nothing of SCSI, TCMU, NBD or the daemon, and holds no unsafe code.

mod bitmap;
mod bochs;
pub mod cache;
mod cloop;
pub mod compressed;
pub mod device;
mod dmg;
pub mod drivers;
mod entries;
pub mod error;
mod field;
pub mod filter;
mod flat;
pub mod format;
pub mod gate;
pub mod grace;
pub mod image;
pub mod locks;
pub mod open;
mod ova;
pub mod overlay;
mod parallels;
pub mod probe;
mod qcow1;
pub mod qcow2;
mod qed;
pub mod ranges;
pub mod raw;
pub mod redo;
pub mod segments;
mod space;
mod split;
pub mod store;
mod table;
mod tail;
mod tree;
mod vdi;
pub(crate) mod vhd;
pub mod vhdx;
pub(crate) mod vmdk;
pub mod writeback;

pub use cache::Cache;
pub use device::{BlockDevice, Limits, MapExtent, ZeroMode};
pub use error::{Error, Kind, Result};
pub use format::{CheckReport, Extent, Format, FormatLimits, Place, Placement, Unit};
pub use image::Image;
pub use open::{OpenOptions, open};
