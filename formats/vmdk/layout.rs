//! What a disk consists of: its extents one behind the other, and the files that they are in.

use super::descriptor::{Access, Descriptor, Kind, MAX_LEN, SECTOR};
use super::header;
use super::sparse::Sparse;
use crate::drivers::OpenFile;
use crate::error::{Error, Result};
use crate::probe::Head;
use crate::store::Store;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where the bytes of an extent are.
#[derive(Clone, Copy, Debug)]
pub(super) enum Bytes {
    /// As they are in a store, from this byte on.
    Flat {
        store: usize,
        at: u64,
    },
    /// In a sparse extent, by its number.
    Sparse(usize),
    Zero,
    /// Not for the guest to see.
    Hidden,
}

/// An extent of the disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    /// First byte of the disk.
    pub(super) start: u64,
    /// Byte behind the last one.
    pub(super) end: u64,
    pub(super) bytes: Bytes,
    /// Its file is open for writing.
    pub(super) writable: bool,
}

/// All of a disk.
pub(super) struct Layout {
    pub(super) descriptor: Descriptor,
    /// Byte offset of the descriptor in the first store.
    pub(super) descriptor_at: u64,
    /// The image file, then the files that it names, in the order in which they were opened.
    pub(super) stores: Vec<Arc<dyn Store>>,
    pub(super) pieces: Vec<Piece>,
    pub(super) sparse: Vec<Sparse>,
    /// Why nothing can be written, if that was asked for.
    pub(super) fixed: Option<String>,
}

impl Layout {
    pub(super) fn open(store: Arc<dyn Store>, writable: bool, open_file: &mut OpenFile<'_>) -> Result<Self> {
        let head = Head::read(&*store)?;
        let sparse = head.has(0, header::HOSTED) || head.has(0, header::COWD) || head.has(0, &header::SESPARSE);
        if sparse { Self::open_alone(store, writable) } else { Self::open_descriptor(store, writable, open_file) }
    }

    /// A sparse extent that is the disk.
    fn open_alone(store: Arc<dyn Store>, writable: bool) -> Result<Self> {
        let extent = Sparse::open(0, store.clone())?;
        let (at, len) = extent.header.descriptor.unwrap_or_default();
        let descriptor = Descriptor::parse(&read(&*store, at, len)?)?;
        if descriptor.extents.len() > 1 {
            return Err(Error::unsupported(format!("a sparse extent whose descriptor names {} extents", descriptor.extents.len())));
        }
        let mut fixed = extent.header.fixed.map(str::to_owned);
        if len == 0 && fixed.is_none() {
            fixed = Some("it has no descriptor: it may be one of several extents of a disk, whose descriptor is to be opened".into());
        }
        let end = extent.header.capacity;
        let piece = Piece { start: 0, end, bytes: Bytes::Sparse(0), writable: writable && fixed.is_none() };
        Ok(Self { descriptor, descriptor_at: at, stores: vec![store], pieces: vec![piece], sparse: vec![extent], fixed })
    }

    /// A descriptor, and the files that it names.
    fn open_descriptor(store: Arc<dyn Store>, writable: bool, open_file: &mut OpenFile<'_>) -> Result<Self> {
        let len = store.len().map_err(|e| Error::io("cannot find out the length of the file", e))?;
        if len > MAX_LEN {
            return Err(Error::invalid_format(format!("a VMDK descriptor of {len} bytes; the longest that is read has {MAX_LEN}")));
        }
        let text = read(&*store, 0, len)?;
        if !super::is_descriptor(&text) {
            return Err(Error::invalid_format("this is neither a VMDK descriptor nor a sparse extent"));
        }
        let descriptor = Descriptor::parse(&text)?;
        if descriptor.extents.is_empty() {
            return Err(Error::corrupt("the descriptor names no extents"));
        }
        let mut found = Self { descriptor, descriptor_at: 0, stores: vec![store], pieces: Vec::new(), sparse: Vec::new(), fixed: None };
        let mut files = Files { open_file, opened: Vec::new() };
        let lines = found.descriptor.extents.clone();
        let mut start = 0u64;
        for line in lines {
            let end = start.checked_add(line.len).filter(|end| *end <= i64::MAX as u64);
            let end = end.ok_or_else(|| Error::corrupt("the extents add up to more than 2^63 bytes"))?;
            let writable = writable && line.access == Access::ReadWrite;
            let piece = |bytes, writable| Piece { start, end, bytes, writable };
            let piece = match line.kind {
                _ if line.access == Access::None => piece(Bytes::Hidden, false),
                Kind::Zero => piece(Bytes::Zero, false),
                Kind::Flat { name, at } => {
                    let store = files.open(&mut found.stores, &name, writable)?;
                    found.check_flat(store, &name, at.saturating_add(line.len))?;
                    piece(Bytes::Flat { store, at }, writable)
                }
                Kind::Sparse { name } => {
                    let number = found.add_sparse(&mut files, &name, writable, (start, end))?;
                    piece(Bytes::Sparse(number), writable)
                }
            };
            found.pieces.push(piece);
            start = end;
        }
        if found.fixed.is_some() {
            found.pieces.iter_mut().for_each(|piece| piece.writable = false);
        }
        Ok(found)
    }

    fn check_flat(&self, store: usize, name: &Path, end: u64) -> Result<()> {
        let Some(file) = self.stores.get(store) else { return Ok(()) };
        let len = file.len().map_err(|e| Error::io(format!("cannot find out the length of \"{}\"", name.display()), e))?;
        if len < end {
            return Err(Error::corrupt(format!(
                "the extent \"{}\" has {len} bytes, of which the descriptor says that {end} are the disk's: it has been cut short",
                name.display()
            )));
        }
        Ok(())
    }

    /// Opens a sparse extent for the bytes of the disk that it is to have.
    fn add_sparse(&mut self, files: &mut Files<'_, '_>, name: &Path, writable: bool, (start, end): (u64, u64)) -> Result<usize> {
        let store = files.open(&mut self.stores, name, writable)?;
        let file = self.stores.get(store).cloned().ok_or_else(|| Error::corrupt("the extent has no file"))?;
        if self.sparse.iter().any(|s| s.store == store) {
            return Err(Error::corrupt(format!("the descriptor names the sparse extent \"{}\" twice", name.display())));
        }
        let extent = Sparse::open(store, file).map_err(|e| e.context(format!("the extent \"{}\" cannot be used", name.display())))?;
        if extent.header.capacity < end - start {
            return Err(Error::corrupt(format!(
                "the extent \"{}\" has {} bytes, and the descriptor says {}",
                name.display(),
                extent.header.capacity,
                end - start
            )));
        }
        let reason =
            extent.header.fixed.or((!start.is_multiple_of(extent.header.grain)).then_some("its grains do not begin where the disk's do"));
        if let Some(reason) = reason.filter(|_| writable) {
            self.fixed.get_or_insert_with(|| format!("of the extent \"{}\": {reason}", name.display()));
        }
        self.sparse.push(extent);
        Ok(self.sparse.len() - 1)
    }

    /// Size of the disk in bytes.
    pub(super) fn size(&self) -> u64 {
        self.pieces.last().map_or(0, |piece| piece.end)
    }
}

/// The files that a descriptor names, each opened once.
struct Files<'a, 'b> {
    open_file: &'a mut OpenFile<'b>,
    /// Name, store, and whether it is open for writing.
    opened: Vec<(PathBuf, usize, bool)>,
}

impl Files<'_, '_> {
    fn open(&mut self, stores: &mut Vec<Arc<dyn Store>>, name: &Path, writable: bool) -> Result<usize> {
        if let Some((_, store, how)) = self.opened.iter().find(|(opened, ..)| opened == name) {
            if *how != writable {
                return Err(Error::unsupported(format!(
                    "the descriptor names the file \"{}\" for extents of different access",
                    name.display()
                )));
            }
            return Ok(*store);
        }
        stores.push((self.open_file)(name, writable)?);
        self.opened.push((name.to_path_buf(), stores.len() - 1, writable));
        Ok(stores.len() - 1)
    }
}

/// `len` bytes at `at`, at most as long as a descriptor may be.
fn read(store: &dyn Store, at: u64, len: u64) -> Result<Vec<u8>> {
    let mut text = vec![0; usize::try_from(len.min(MAX_LEN)).unwrap_or(0)];
    store.read_zero_filled(&mut text, at).map_err(|e| Error::io("cannot read the descriptor", e).at_offset(at))?;
    Ok(text)
}

/// The unit of locking of disks without grains, in bytes.
const FLAT_UNIT: u64 = 64 << 10;

impl Layout {
    /// The unit that no grain straddles, in bytes.
    pub(super) fn unit(&self) -> u64 {
        self.sparse.iter().map(|s| s.header.grain).max().unwrap_or(FLAT_UNIT).max(SECTOR)
    }
}
