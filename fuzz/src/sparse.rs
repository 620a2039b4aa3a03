//! A sparse store in memory whose copies are cheap, and which is full when an image has taken more than it should.

use formats::store::Store;
use std::collections::HashMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::sync::{Arc, Mutex, MutexGuard};

const PAGE: usize = 4096;
/// Pages that may be taken: 24 MiB.
const MAX_PAGES: usize = 6 << 10;
/// As long as files can be on a common file system.
const MAX_LEN: u64 = 1 << 44;

#[derive(Clone, Default)]
struct Pages {
    pages: HashMap<u64, Arc<[u8; PAGE]>>,
    len: u64,
}

#[derive(Default)]
pub struct Sparse(Mutex<Pages>);

impl Sparse {
    pub fn new(bytes: &[u8]) -> Self {
        let this = Self::default();
        this.put(0, bytes);
        this.lock().len = bytes.len() as u64;
        this
    }

    /// The same bytes in a store of their own.
    pub fn copy(&self) -> Arc<Self> {
        Arc::new(Self(Mutex::new(self.lock().clone())))
    }

    fn lock(&self) -> MutexGuard<'_, Pages> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Writes, whatever the limits.
    pub fn put(&self, at: u64, bytes: &[u8]) {
        let mut pages = self.lock();
        let mut rest = bytes;
        let mut at = at;
        while !rest.is_empty() {
            let within = (at % PAGE as u64) as usize;
            let (now, later) = rest.split_at(rest.len().min(PAGE - within));
            // Pages that are not there are zeros already.
            if pages.pages.contains_key(&(at / PAGE as u64)) || now.iter().any(|byte| *byte != 0) {
                let page = pages.pages.entry(at / PAGE as u64).or_insert_with(|| Arc::new([0; PAGE]));
                Arc::make_mut(page)[within..within + now.len()].copy_from_slice(now);
            }
            at += now.len() as u64;
            rest = later;
        }
        pages.len = pages.len.max(at);
    }

    /// `len` bytes; zeros beyond the end.
    pub fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let _ = self.read_zero_filled(&mut bytes, at);
        bytes
    }
}

impl Store for Sparse {
    fn read_at(&self, bufs: &mut [IoSliceMut<'_>], at: u64) -> io::Result<usize> {
        let pages = self.lock();
        let mut at = at;
        let mut done = 0;
        for buf in bufs {
            let want = buf.len().min(usize::try_from(pages.len.saturating_sub(at)).unwrap_or(usize::MAX));
            let mut rest = &mut buf[..want];
            while !rest.is_empty() {
                let within = (at % PAGE as u64) as usize;
                let len = rest.len().min(PAGE - within);
                let (now, later) = rest.split_at_mut(len);
                match pages.pages.get(&(at / PAGE as u64)) {
                    Some(page) => now.copy_from_slice(&page[within..within + len]),
                    None => now.fill(0),
                }
                at += len as u64;
                rest = later;
            }
            done += want;
        }
        Ok(done)
    }

    fn try_read_at(&self, bufs: &mut [IoSliceMut<'_>], at: u64) -> io::Result<Option<usize>> {
        // Some places are "not in memory".
        if at / (64 << 10) % 3 == 1 { Ok(None) } else { self.read_at(bufs, at).map(Some) }
    }

    fn write_at(&self, bufs: &[IoSlice<'_>], at: u64) -> io::Result<()> {
        let mut at = at;
        for buf in bufs {
            let end = at.checked_add(buf.len() as u64).filter(|end| *end <= MAX_LEN).ok_or(io::ErrorKind::FileTooLarge)?;
            if self.lock().pages.len() + buf.len() / PAGE > MAX_PAGES {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.put(at, buf);
            at = end;
        }
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.lock().len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if len > MAX_LEN {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let mut pages = self.lock();
        if len < pages.len {
            pages.pages.retain(|number, _| number * (PAGE as u64) < len);
            if let Some(page) = pages.pages.get_mut(&(len / PAGE as u64)) {
                Arc::make_mut(page)[(len % PAGE as u64) as usize..].fill(0);
            }
        }
        pages.len = len;
        Ok(())
    }

    fn punch(&self, at: u64, len: u64) -> io::Result<bool> {
        self.zero(at, len)
    }

    fn zero(&self, at: u64, len: u64) -> io::Result<bool> {
        let mut pages = self.lock();
        let end = at.saturating_add(len).min(pages.len);
        for (number, page) in &mut pages.pages {
            let start = number * PAGE as u64;
            let (from, to) = (at.max(start), end.min(start + PAGE as u64));
            if from < to {
                Arc::make_mut(page)[(from - start) as usize..(to - start) as usize].fill(0);
            }
        }
        Ok(true)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}
