//! The shared memory itself: mapping it, and words and bytes in it. Nothing here knows what they mean.
//!
//! Everything outside of the data area is read and written through atomics, because somebody else writes there too; the data area
//! is lent out as slices by [`grant`](super::grant) alone.

use memmap2::{MmapOptions, MmapRaw};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

/// A mapping of the memory that one device shares with the kernel. Offsets are bytes from its start.
#[derive(Debug)]
pub struct Region {
    map: MmapRaw,
}

/// An access that is not inside the region or not aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfRegion;

impl Region {
    /// Maps `len` bytes of `fd`, readable and writable, shared. Pages are not touched: in a TCMU region only pages that belong to
    /// a command may be.
    pub fn map(fd: impl AsFd, len: usize) -> io::Result<Self> {
        let map = MmapOptions::new().len(len).map_raw(fd.as_fd().as_raw_fd())?;
        Ok(Self { map })
    }

    /// Size in bytes.
    #[allow(clippy::len_without_is_empty)] // a mapping of no bytes does not exist
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Loads the word at `offset`.
    pub fn load_u32(&self, offset: usize, order: Ordering) -> Result<u32, OutOfRegion> {
        Ok(self.word32(offset)?.load(order))
    }

    /// Stores the word at `offset`.
    pub fn store_u32(&self, offset: usize, value: u32, order: Ordering) -> Result<(), OutOfRegion> {
        self.word32(offset)?.store(value, order);
        trace_store(offset, &value.to_ne_bytes());
        Ok(())
    }

    /// Loads the double word at `offset`, relaxed.
    pub fn load_u64(&self, offset: usize) -> Result<u64, OutOfRegion> {
        Ok(self.word64(offset)?.load(Ordering::Relaxed))
    }

    /// Stores the double word at `offset`, relaxed.
    pub fn store_u64(&self, offset: usize, value: u64) -> Result<(), OutOfRegion> {
        self.word64(offset)?.store(value, Ordering::Relaxed);
        trace_store(offset, &value.to_ne_bytes());
        Ok(())
    }

    /// Copies bytes out, by double words where `offset` is a multiple of 8.
    pub fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), OutOfRegion> {
        self.check(offset, into.len())?;
        let mut at = offset;
        let (words, rest) = if offset.is_multiple_of(8) { into.as_chunks_mut::<8>() } else { (&mut [][..], into) };
        for word in words {
            *word = self.load_u64(at)?.to_ne_bytes();
            at += 8;
        }
        for byte in rest {
            *byte = self.byte(at)?.load(Ordering::Relaxed);
            at += 1;
        }
        Ok(())
    }

    /// Copies bytes in, by double words where `offset` is a multiple of 8.
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<(), OutOfRegion> {
        self.check(offset, from.len())?;
        let mut at = offset;
        let (words, rest) = if offset.is_multiple_of(8) { from.as_chunks::<8>() } else { (&[][..], from) };
        for word in words {
            self.store_u64(at, u64::from_ne_bytes(*word))?;
            at += 8;
        }
        for byte in rest {
            self.byte(at)?.store(*byte, Ordering::Relaxed);
            trace_store(at, &[*byte]);
            at += 1;
        }
        Ok(())
    }

    /// Where `len` bytes at `offset` lie in this process.
    pub(super) fn pointer(&self, offset: usize, len: usize) -> Result<NonNull<u8>, OutOfRegion> {
        self.check(offset, len)?;
        NonNull::new(self.map.as_mut_ptr().wrapping_add(offset)).ok_or(OutOfRegion)
    }

    fn check(&self, offset: usize, len: usize) -> Result<(), OutOfRegion> {
        match offset.checked_add(len) {
            Some(end) if end <= self.map.len() => Ok(()),
            _ => Err(OutOfRegion),
        }
    }

    fn byte(&self, offset: usize) -> Result<&AtomicU8, OutOfRegion> {
        let pointer = self.pointer(offset, 1)?;
        // SAFETY: the byte is inside the mapping, which lives as long as `self`; outside of granted data every access by this
        // process is atomic.
        Ok(unsafe { AtomicU8::from_ptr(pointer.as_ptr()) })
    }

    fn word32(&self, offset: usize) -> Result<&AtomicU32, OutOfRegion> {
        let pointer = self.pointer(offset, 4)?.cast::<u32>();
        if !pointer.is_aligned() {
            return Err(OutOfRegion);
        }
        // SAFETY: the word is aligned and inside the mapping, which lives as long as `self`; outside of granted data every access
        // by this process is atomic.
        Ok(unsafe { AtomicU32::from_ptr(pointer.as_ptr()) })
    }

    fn word64(&self, offset: usize) -> Result<&AtomicU64, OutOfRegion> {
        let pointer = self.pointer(offset, 8)?.cast::<u64>();
        if !pointer.is_aligned() {
            return Err(OutOfRegion);
        }
        // SAFETY: as for `word32`.
        Ok(unsafe { AtomicU64::from_ptr(pointer.as_ptr()) })
    }
}

#[cfg(test)]
fn trace_store(offset: usize, bytes: &[u8]) {
    store_trace::store(offset, bytes);
}

#[cfg(not(test))]
#[inline(always)]
fn trace_store(_: usize, _: &[u8]) {}

/// Lets a test see every store in order, so that it can stop the world after each.
#[cfg(test)]
pub(super) mod store_trace {
    use std::cell::RefCell;

    /// Offset and bytes.
    type Store = (usize, Vec<u8>);

    thread_local! {
        static STORES: RefCell<Option<Vec<Store>>> = const { RefCell::new(None) };
    }

    /// Runs `work` and returns the stores that it made in this thread.
    pub fn record(work: impl FnOnce()) -> Vec<Store> {
        STORES.with(|stores| *stores.borrow_mut() = Some(Vec::new()));
        work();
        STORES.with(|stores| stores.borrow_mut().take().unwrap_or_default())
    }

    pub(super) fn store(offset: usize, bytes: &[u8]) {
        STORES.with(|stores| {
            if let Some(stores) = stores.borrow_mut().as_mut() {
                stores.push((offset, bytes.to_vec()));
            }
        });
    }
}
