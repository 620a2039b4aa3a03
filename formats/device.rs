//! What SCSI, NBD, FUSE and filters see of an image: a flat run of bytes that can be read, written, zeroed, discarded,
//! flushed and mapped, by as many threads at once as callers like.

use crate::error::Result;
use std::io::{IoSlice, IoSliceMut};

/// What a device is and can do. Constant while it is open, but for `size` after a resize.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Size in bytes.
    pub size: u64,
    /// Logical sector size of the image in bytes (512 or 4096): the block size its guest was made for.
    pub sector: u32,
    /// Physical sector size in bytes, a multiple of `sector`.
    pub physical_sector: u32,
    /// Unit of allocation in bytes (qcow2 cluster, VHDX block): discards smaller than this free nothing. A power of two.
    pub granularity: u64,
    /// Writes, zeroes and discards fail with [`Kind::ReadOnly`](crate::Kind::ReadOnly).
    pub read_only: bool,
    /// [`BlockDevice::discard`] frees space.
    pub can_discard: bool,
    /// Discarded units of `granularity` read as zeros.
    pub discard_zeroes: bool,
    /// Whole units can be zeroed without writing zeros.
    pub cheap_zero: bool,
    /// The backing format can take space as it is needed: the device is thin.
    pub thin: bool,
}

/// How to zero a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroMode {
    /// Space may be given back (NBD without NO_HOLE, WRITE SAME with UNMAP).
    MayUnmap,
    /// Space stays reserved.
    KeepAllocated,
    /// Only if it is cheap; otherwise fail with [`Kind::Unsupported`](crate::Kind::Unsupported) having done nothing (NBD FAST_ZERO).
    OnlyIfCheap,
}

/// State of a run of bytes, as GET LBA STATUS, `base:allocation`, SEEK_HOLE and `img-tcmu map` show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapExtent {
    /// Length in bytes, never 0, never beyond what was asked.
    pub len: u64,
    /// Space is allocated for it somewhere in the chain.
    pub allocated: bool,
    /// It reads as zeros, known without reading.
    pub zero: bool,
    /// It is stored encoded (compressed, encrypted).
    pub encoded: bool,
    /// How deep in the chain it lies: 0 is the image itself.
    pub depth: u32,
    /// Where in the file of that depth, if it lies there as it is. Bytes.
    pub offset: Option<u64>,
}

/// A disk. Offsets and lengths are bytes and need no alignment. A request beyond `limits().size` fails with
/// [`Kind::OutOfBounds`](crate::Kind::OutOfBounds) and has no effect.
///
/// Requests that overlap in time have no order. A write that returned is seen by every later read, and survives the death of
/// the process; a flush that returned makes every write that returned before the flush *began* survive a power cut.
pub trait BlockDevice: Send + Sync {
    /// What the device is and can do.
    fn limits(&self) -> Limits;

    /// Fills all of `bufs`, in order, from `at`.
    fn read(&self, bufs: &mut [IoSliceMut<'_>], at: u64) -> Result<()>;

    /// Like `read`, but only if it needs no wait for a disk and no decoding: `Ok(false)` means not done (buffers undefined).
    fn try_read(&self, bufs: &mut [IoSliceMut<'_>], at: u64) -> Result<bool> {
        let _ = (bufs, at);
        Ok(false)
    }

    /// Writes all of `bufs`, in order, at `at`.
    fn write(&self, bufs: &[IoSlice<'_>], at: u64) -> Result<()>;

    /// Makes a range read as zeros.
    fn zero(&self, at: u64, len: u64, mode: ZeroMode) -> Result<()>;

    /// Gives back the space of whole units inside the range, as far as the format can. What is not given back is unchanged;
    /// what is reads as zeros when `limits().discard_zeroes`, and otherwise as anything that stays the same from read to read.
    fn discard(&self, at: u64, len: u64) -> Result<()>;

    /// Makes all completed writes safe from a power cut.
    fn flush(&self) -> Result<()>;

    /// State of the first run at `at`; its length is at most `len`, which is not 0.
    fn map(&self, at: u64, len: u64) -> Result<MapExtent>;

    /// Grows the device to `size` bytes; new space reads as zeros. Shrinking is refused.
    fn grow(&self, size: u64) -> Result<()> {
        let _ = size;
        Err(crate::Error::unsupported("this device cannot be resized"))
    }
}
