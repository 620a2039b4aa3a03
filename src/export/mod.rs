//! Ways to serve a block device to hosts that have no TCMU.
//!
//! Siblings of `scsi`: they see a [`BlockDevice`](formats::BlockDevice) and know nothing of image formats or of rings.

pub mod fuse;
pub mod manager;
pub mod nbd;
