//! The bytes of a file in shared pages: thousands of variants of one image, each of which differs from the others in a few places, cost what those places do.

use formats::store::Store;
use formats::store::recording::Action;
use parking_lot::RwLock;
use std::io::{self, IoSlice, IoSliceMut};
use std::sync::Arc;

/// Bytes of a page.
const PAGE: usize = 16 << 10;

type Page = Arc<[u8; PAGE]>;

/// A file's bytes. Copies share pages until they are changed. Bytes of the last page that lie behind the end are zeros.
#[derive(Clone, Default)]
pub struct Pages {
    /// `None`: zeros.
    pages: Vec<Option<Page>>,
    len: usize,
}

impl From<&[u8]> for Pages {
    fn from(bytes: &[u8]) -> Self {
        let mut pages = Self::default();
        pages.set_len(bytes.len());
        for (index, part) in bytes.chunks(PAGE).enumerate() {
            if part.iter().any(|b| *b != 0) {
                pages.write(index * PAGE, part);
            }
        }
        pages
    }
}

impl Pages {
    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// All bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        self.read(0, &mut bytes);
        bytes
    }

    /// Fills `to` from `at` as far as there are bytes; returns how many.
    pub fn read(&self, at: usize, to: &mut [u8]) -> usize {
        let count = to.len().min(self.len.saturating_sub(at));
        let (mut here, mut rest) = (at, &mut to[..count]);
        while !rest.is_empty() {
            let inside = here % PAGE;
            let (now, later) = rest.split_at_mut((PAGE - inside).min(rest.len()));
            match &self.pages[here / PAGE] {
                Some(page) => now.copy_from_slice(&page[inside..inside + now.len()]),
                None => now.fill(0),
            }
            here += now.len();
            rest = later;
        }
        count
    }

    /// Writes, behind the end as well.
    pub fn write(&mut self, at: usize, bytes: &[u8]) {
        if self.len < at + bytes.len() {
            self.set_len(at + bytes.len());
        }
        let (mut here, mut rest) = (at, bytes);
        while !rest.is_empty() {
            let inside = here % PAGE;
            let (now, later) = rest.split_at((PAGE - inside).min(rest.len()));
            let page = self.pages[here / PAGE].get_or_insert_with(|| Arc::new([0; PAGE]));
            Arc::make_mut(page)[inside..inside + now.len()].copy_from_slice(now);
            here += now.len();
            rest = later;
        }
    }

    /// Makes bytes zero, as far as there are any.
    pub fn zero(&mut self, at: usize, len: usize) {
        let end = at.saturating_add(len).min(self.len);
        let mut here = at;
        while here < end {
            let (index, inside) = (here / PAGE, here % PAGE);
            let count = (PAGE - inside).min(end - here);
            if count == PAGE {
                self.pages[index] = None;
            } else if let Some(page) = &mut self.pages[index] {
                Arc::make_mut(page)[inside..inside + count].fill(0);
            }
            here += count;
        }
    }

    /// Cuts off bytes, or adds zeros.
    pub fn set_len(&mut self, len: usize) {
        if len < self.len {
            // What is added again later is zeros.
            self.zero(len, self.len - len);
        }
        self.pages.resize(len.div_ceil(PAGE), None);
        self.len = len;
    }

    /// Does what `action` does to a file.
    pub fn apply(&mut self, action: &Action) {
        match action {
            Action::Write { at, bytes } => self.write(*at as usize, bytes),
            Action::SetLen(len) => self.set_len(*len as usize),
            Action::Zero { at, len } => self.zero(*at as usize, *len as usize),
            _ => {}
        }
    }
}

/// A file in memory.
#[derive(Default)]
pub struct PageStore(RwLock<Pages>);

impl PageStore {
    /// A file that holds these bytes.
    pub fn new(pages: Pages) -> Self {
        Self(RwLock::new(pages))
    }
}

impl Store for PageStore {
    fn read_at(&self, bufs: &mut [IoSliceMut<'_>], at: u64) -> io::Result<usize> {
        let pages = self.0.read();
        let mut done = 0;
        for buf in bufs {
            done += pages.read(usize::try_from(at).unwrap_or(usize::MAX).saturating_add(done), buf);
        }
        Ok(done)
    }

    fn write_at(&self, bufs: &[IoSlice<'_>], at: u64) -> io::Result<()> {
        let mut pages = self.0.write();
        let mut at = usize::try_from(at).map_err(|_| io::ErrorKind::FileTooLarge)?;
        for buf in bufs {
            // A damaged image may ask for any place; the test has no more memory than this.
            if at.checked_add(buf.len()).is_none_or(|end| end > 1 << 34) {
                return Err(io::ErrorKind::FileTooLarge.into());
            }
            pages.write(at, buf);
            at += buf.len();
        }
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.read().len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let len = usize::try_from(len).ok().filter(|len| *len <= 1 << 34).ok_or(io::ErrorKind::FileTooLarge)?;
        self.0.write().set_len(len);
        Ok(())
    }

    fn punch(&self, at: u64, len: u64) -> io::Result<bool> {
        self.zero(at, len)
    }

    fn zero(&self, at: u64, len: u64) -> io::Result<bool> {
        self.0.write().zero(usize::try_from(at).unwrap_or(usize::MAX), usize::try_from(len).unwrap_or(usize::MAX));
        Ok(true)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}
