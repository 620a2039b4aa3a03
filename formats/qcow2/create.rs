//! Making a new, empty image: version 3, refcounts of 16 bits, nothing allocated but its own metadata.
//!
//! Layout, in clusters: header, refcount table, refcount blocks, L1 table. The header's cluster also holds the backing file's format (a header
//! extension) and name. Source: QEMU's docs/interop/qcow2.rst.

use super::entry::{Geometry, MAX_L1_BYTES};
use super::header::{extension, field};
use crate::error::{Error, Kind, Result};
use crate::store::{FileStore, Store};
use std::fs::{File, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// The cluster size that QEMU uses as well unless it is told otherwise, in bytes.
pub const DEFAULT_CLUSTER: u64 = 64 << 10;
/// log2 of the width of refcounts in bits.
const REFCOUNT_ORDER: u32 = 4;
/// Header of version 3 with the compression type.
const HEADER_LENGTH: u32 = 112;
/// The longest backing file name that the format allows.
const MAX_BACKING_NAME: usize = 1023;

/// What a new image is to be.
#[derive(Clone, Debug)]
pub struct NewImage {
    /// Guest-visible size in bytes, a multiple of 512.
    pub size: u64,
    /// Cluster size in bytes: a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// What shows through where nothing was written.
    pub backing: Option<Backing>,
}

/// A backing file as the image names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// Its name; a relative one counts from the image's directory.
    pub name: PathBuf,
    /// Its format.
    pub format: String,
}

impl NewImage {
    /// An image of `size` bytes with clusters of [`DEFAULT_CLUSTER`].
    pub fn new(size: u64) -> Self {
        Self { size, cluster_size: DEFAULT_CLUSTER, backing: None }
    }

    /// Writes the image to an empty store.
    ///
    /// # Errors
    /// `InvalidOption` for a size or name that the format cannot have; the host's.
    pub fn write(&self, store: &dyn Store) -> Result<()> {
        let plan = self.plan()?;
        let fail = |e| Error::io("cannot write the new image", e);
        // The header is last: until it is there, this is no image.
        store.set_len(plan.clusters << plan.geometry.cluster_bits).map_err(fail)?;
        let at = |cluster: u64| cluster << plan.geometry.cluster_bits;
        let table: Vec<u8> = (0..plan.blocks).flat_map(|i| at(plan.blocks_at + i).to_be_bytes()).collect();
        store.write_all_at(&table, at(plan.table_at)).map_err(fail)?;
        let ones: Vec<u8> = (0..plan.clusters).flat_map(|_| 1u16.to_be_bytes()).collect();
        store.write_all_at(&ones, at(plan.blocks_at)).map_err(fail)?;
        store.write_all_at(&self.header(&plan)?, 0).map_err(fail)
    }

    /// Makes the image at `path`, all of it or nothing, also in a power cut: the file appears under its name when its contents are durable.
    /// `mode` are its permissions (the umask applies). `false`: there is a file of that name already, and nothing was done.
    ///
    /// # Errors
    /// As for [`Self::write`].
    pub fn create(&self, path: &Path, mode: u32) -> Result<bool> {
        let dir = match path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            _ => Path::new("."),
        };
        let fail = |e: io::Error| Error::io("cannot create the image", e).at_path(path);
        let temporary =
            tempfile::Builder::new().prefix(".img-tcmu-new-").permissions(Permissions::from_mode(mode)).tempfile_in(dir).map_err(fail)?;
        let file = temporary.as_file().try_clone().map_err(fail)?;
        let store = FileStore::new(file, path).map_err(fail)?;
        self.write(&store).map_err(|e| e.at_path(path))?;
        temporary.as_file().sync_all().map_err(fail)?;
        // Never over a file that came to be meanwhile.
        match temporary.persist_noclobber(path) {
            Ok(_) => File::open(dir).and_then(|dir| dir.sync_all()).map(|()| true).map_err(fail),
            Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(fail(error.error)),
        }
    }

    fn plan(&self) -> Result<Plan> {
        let invalid = |why: String| Err(Error::new(Kind::InvalidOption, why));
        if !self.cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&self.cluster_size) {
            return invalid(format!("a cluster of {} bytes: powers of two from 512 to 2 MiB are possible", self.cluster_size));
        }
        if !self.size.is_multiple_of(512) || i64::try_from(self.size).is_err() {
            return invalid(format!("an image of {} bytes: multiples of 512 below 2^63 are possible", self.size));
        }
        let geometry = Geometry {
            version: 3,
            cluster_bits: self.cluster_size.trailing_zeros(),
            refcount_order: REFCOUNT_ORDER,
            ..Geometry::default()
        };
        let l1_entries = geometry.l1_entries_for(self.size);
        if l1_entries * 8 > MAX_L1_BYTES {
            return invalid(format!("an image of {} bytes needs larger clusters than {} bytes", self.size, self.cluster_size));
        }
        let l1 = geometry.clusters(l1_entries * 8);
        // The blocks count themselves and their table too: raise their number until it is enough.
        let (mut blocks, mut table) = (1, 1);
        let clusters = loop {
            let clusters = 1 + table + blocks + l1;
            let needed = clusters.div_ceil(geometry.refcounts_per_block());
            let needed_table = geometry.clusters(needed * 8);
            if needed <= blocks && needed_table <= table {
                break clusters;
            }
            (blocks, table) = (needed.max(blocks), needed_table.max(table));
        };
        Ok(Plan { geometry, l1_entries, clusters, blocks, table_at: 1, table, blocks_at: 1 + table, l1_at: 1 + table + blocks })
    }

    /// The bytes of the first cluster that are not zero.
    fn header(&self, plan: &Plan) -> Result<Vec<u8>> {
        let g = plan.geometry;
        let mut bytes = vec![0u8; HEADER_LENGTH as usize];
        let mut put = |at: u64, value: &[u8]| {
            if let Some(to) = bytes.get_mut(at as usize..at as usize + value.len()) {
                to.copy_from_slice(value);
            }
        };
        put(0, b"QFI\xfb");
        put(4, &3u32.to_be_bytes());
        put(20, &g.cluster_bits.to_be_bytes());
        put(field::SIZE, &self.size.to_be_bytes());
        // At most 2^22 entries, and as few clusters: both fit.
        put(field::L1_ENTRIES, &(plan.l1_entries as u32).to_be_bytes());
        put(40, &(plan.l1_at << g.cluster_bits).to_be_bytes());
        put(field::REFTABLE_AT, &(plan.table_at << g.cluster_bits).to_be_bytes());
        put(56, &(plan.table as u32).to_be_bytes());
        put(96, &REFCOUNT_ORDER.to_be_bytes());
        put(100, &HEADER_LENGTH.to_be_bytes());
        if let Some(backing) = &self.backing {
            let name = backing.name.as_os_str().as_bytes();
            bytes.extend(extension::BACKING_FORMAT.to_be_bytes());
            bytes.extend((backing.format.len() as u32).to_be_bytes());
            bytes.extend(backing.format.as_bytes());
            bytes.resize(bytes.len().next_multiple_of(8), 0);
            bytes.extend([0; 8]);
            let name_at = bytes.len();
            bytes.extend(name);
            if name.is_empty() || name.len() > MAX_BACKING_NAME || bytes.len() as u64 > self.cluster_size {
                return Err(Error::new(
                    Kind::InvalidOption,
                    format!("the backing file's name is {} bytes long, which does not fit the image's header", name.len()),
                ));
            }
            let mut put = |at: usize, value: &[u8]| {
                if let Some(to) = bytes.get_mut(at..at + value.len()) {
                    to.copy_from_slice(value);
                }
            };
            put(8, &(name_at as u64).to_be_bytes());
            put(16, &(name.len() as u32).to_be_bytes());
        }
        Ok(bytes)
    }
}

/// Where everything goes; offsets and lengths in clusters.
struct Plan {
    geometry: Geometry,
    l1_entries: u64,
    /// All of the file.
    clusters: u64,
    blocks: u64,
    table_at: u64,
    table: u64,
    blocks_at: u64,
    l1_at: u64,
}
