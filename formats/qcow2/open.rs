//! Opening an image, and what `info` says about one.

use super::Qcow2;
use super::entry::{Geometry, MAX_L1_BYTES, REFTABLE_OFFSET};
use super::header::{AUTOCLEAR_BITMAPS, AUTOCLEAR_RAW_DATA_FILE, Compression, Header, LAZY_REFCOUNTS, incompatible};
use super::l1::L1;
use super::l2::L2Cache;
use super::metadata::BITMAP_LIST;
use super::refcount::Refcounts;
use super::{bitmaps, snapshots};
use crate::drivers::{Opened, ParentRef, Request};
use crate::error::{Error, Kind, Result};
use crate::writeback::WriteBack;
use parking_lot::Mutex;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Memory for L2 tables in bytes, as in QEMU: at 64 KiB clusters the tables of 256 GiB.
const L2_CACHE: usize = 32 << 20;
/// How many L2 tables can be made at once.
const TABLE_LOCKS: usize = 16;

/// Opens an image; see [`Driver::open`](crate::drivers::Driver::open).
///
/// # Errors
/// `InvalidFormat`, `Unsupported`, `Corrupt` with the offset and reason; `InvalidOption` for a snapshot that is not there.
pub fn open(request: Request<'_>) -> Result<Opened> {
    let header = Header::read(&*request.store)?;
    let (writable, repair) = (request.writable && request.snapshot_name.is_none(), request.repair);
    let mut stores = vec![request.store];
    if header.geometry.data_file {
        let name = header.data_file.as_deref().filter(|name| !name.is_empty()).ok_or_else(|| {
            Error::unsupported(
                "the guest's data are in another file that the image does not name (qemu-img amend -o data_file=FILE writes the name down)",
            )
        })?;
        stores.push((request.open_file)(Path::new(name), writable)?);
    }
    let writeback = Arc::new(WriteBack::new(stores.clone(), request.redo));
    let geometry = header.geometry;
    let file_len = stores[0].len().map_err(|e| Error::io("cannot find out the length of the file", e))?;
    let (snapshots, snapshots_len) = snapshots::read(&writeback, &header)?;
    let (l1_at, l1_entries, size) = match request.snapshot_name {
        None => (header.l1_at, header.l1_entries, header.size),
        Some(name) => place_of_snapshot(&header, &snapshots, name)?,
    };
    let l1 = L1::read(&writeback, l1_at, u64::from(l1_entries), file_len)?;
    let refcounts = writable.then(|| open_refcounts(&writeback, &header, file_len)).transpose()?;
    let parent = header.backing.as_ref().map(|name| ParentRef {
        names: vec![PathBuf::from(OsString::from_vec(name.clone()))],
        format: header.backing_format.clone(),
        verify: None,
    });
    let format = Qcow2 {
        geometry,
        size: AtomicU64::new(size),
        size_pending: AtomicBool::new(false),
        l1,
        l2: L2Cache::new(geometry, L2_CACHE),
        snapshots,
        snapshots_len,
        refcounts,
        autoclear: Mutex::new(header.autoclear),
        table_locks: (0..TABLE_LOCKS).map(|_| Mutex::new(())).collect(),
        incompatible: Mutex::new(header.incompatible),
        damaged: AtomicBool::new(false),
        header,
        stores,
        writeback: writeback.clone(),
    };
    if let Some(refcounts) = &format.refcounts {
        make_writable(&format, refcounts, repair)?;
    }
    Ok(Opened { format: Arc::new(format), writeback, parent })
}

fn open_refcounts(writeback: &Arc<WriteBack>, header: &Header, file_len: u64) -> Result<Refcounts> {
    if header.reftable_clusters == 0 || header.reftable_at >= file_len {
        return Err(Error::corrupt("the image has no refcount table inside the file").at_offset(header.reftable_at));
    }
    Refcounts::read(writeback.clone(), header.geometry, header.reftable_at, header.reftable_clusters, file_len)
}

/// What must be in order before an image is changed. One that was not closed cleanly gets its refcounts mended, as QEMU does; with `repair` that is left
/// to the caller, who will ask for it.
fn make_writable(image: &Qcow2, refcounts: &Refcounts, repair: bool) -> Result<()> {
    let features = image.header.incompatible;
    if features & incompatible::CORRUPT != 0 && !repair {
        return Err(Error::corrupt(
            "the image is marked as damaged, so it can only be opened read-only; a check with repair may mend it (img-tcmu check --repair)",
        ));
    }
    let registered = register_metadata(image, refcounts);
    if repair {
        let damaged = registered.is_err() || features & (incompatible::CORRUPT | incompatible::DIRTY) != 0;
        image.damaged.store(damaged, Ordering::Release);
        return Ok(());
    }
    registered?;
    if features & incompatible::DIRTY != 0 {
        tracing::warn!("the image was not closed cleanly: its refcounts are checked and mended");
        let report = image.check_image(true)?;
        let left = report.corruptions.saturating_sub(report.corruptions_fixed);
        if left > 0 {
            let last = report.notes.last().map_or("", String::as_str);
            return Err(Error::corrupt(format!(
                "the image was not closed cleanly and cannot be mended: {left} corruptions, the last: {last} (img-tcmu check --repair may mend more)"
            )));
        }
        tracing::info!(corruptions = report.corruptions_fixed, leaks = report.leaks_fixed, "the image was mended");
    }
    Ok(())
}

/// Notes where all metadata lie that are known without a full check.
///
/// # Errors
/// `Corrupt` when structures that every write needs lie over each other.
pub(super) fn register_metadata(image: &Qcow2, refcounts: &Refcounts) -> Result<()> {
    let (g, header, places) = (image.geometry, &image.header, &refcounts.metadata);
    places.clear();
    let (table_at, table) = {
        let state = refcounts.lock();
        (state.table_at, state.table.clone())
    };
    let vital = [
        (0, g.cluster_size(), "header"),
        (image.l1.at(), image.l1.entries() * 8, "L1 table"),
        (table_at, table.len() as u64 * 8, "refcount table"),
        (header.snapshots_at, image.snapshots_len, "snapshot table"),
    ];
    for (at, len, what) in vital {
        if let Some(other) = places.add_run(at, g.round_up(len), what) {
            return Err(Error::corrupt(format!("the {what} overlaps the {other}")).at_offset(at));
        }
    }
    for snapshot in &image.snapshots {
        places.add_run(snapshot.l1_at, g.round_up(u64::from(snapshot.l1_entries) * 8), "L1 table of a snapshot");
    }
    // Where the autoclear bit is not set the list means nothing, and its clusters may have been given to others (`qemu-img check -r leaks` does that).
    if let Some(bitmaps) = header.bitmaps.filter(|_| *image.autoclear.lock() & AUTOCLEAR_BITMAPS != 0) {
        places.add_run(bitmaps.at, g.round_up(bitmaps.size.min(image.file_len()?)), BITMAP_LIST);
    }
    table.iter().filter(|raw| **raw & REFTABLE_OFFSET != 0).for_each(|raw| places.add_table(raw & REFTABLE_OFFSET, "refcount block"));
    image.l1.used().filter_map(|i| image.l1.slot(i)).for_each(|slot| places.add_table(slot.table_at(), "L2 table"));
    Ok(())
}

/// Whether an L1 table may be there and that long.
pub(super) fn l1_is_possible(geometry: Geometry, at: u64, entries: u64) -> bool {
    entries * 8 <= MAX_L1_BYTES && geometry.aligned(at) && at.checked_add(entries * 8).is_some_and(|end| end <= i64::MAX as u64)
}

/// L1 table and size of a snapshot, by its name or else its id.
fn place_of_snapshot(header: &Header, snapshots: &[snapshots::Snapshot], name: &str) -> Result<(u64, u32, u64)> {
    let found = snapshots.iter().find(|s| s.name == name).or_else(|| snapshots.iter().find(|s| s.id == name));
    let Some(snapshot) = found else {
        let names: Vec<String> = snapshots.iter().take(50).map(|s| format!("{:?}", s.name)).collect();
        let there = if names.is_empty() { "it has none".to_owned() } else { format!("there are: {}", names.join(", ")) };
        return Err(Error::new(Kind::InvalidOption, format!("the image has no internal snapshot {name:?}; {there}")));
    };
    let size = snapshot.disk_size.unwrap_or(header.size);
    let entries = u64::from(snapshot.l1_entries);
    let possible = l1_is_possible(header.geometry, snapshot.l1_at, entries);
    if !possible || size > i64::MAX as u64 || entries < header.geometry.l1_entries_for(size) {
        return Err(Error::corrupt(format!("the L1 table of the snapshot {name:?} is impossible")).at_offset(snapshot.l1_at));
    }
    Ok((snapshot.l1_at, snapshot.l1_entries, size))
}

/// See [`Format::describe`](crate::format::Format::describe): QEMU's own keys, and what else is worth knowing.
pub(super) fn describe(image: &Qcow2) -> serde_json::Value {
    let header = &image.header;
    let v3 = header.geometry.version >= 3;
    let compression = match header.compression {
        Compression::Zlib => "zlib",
        Compression::Zstd => "zstd",
    };
    let mut details = serde_json::json!({
        "compat": if v3 { "1.1" } else { "0.10" },
        "compression-type": compression,
        "refcount-bits": 1u32 << header.geometry.refcount_order,
        "cluster-size": header.geometry.cluster_size(),
    });
    let mut add = |key: &str, value: serde_json::Value| {
        if let Some(map) = details.as_object_mut() {
            map.insert(key.to_owned(), value);
        }
    };
    if v3 {
        add("lazy-refcounts", (header.compatible & LAZY_REFCOUNTS != 0).into());
        add("corrupt", (header.incompatible & incompatible::CORRUPT != 0).into());
        add("extended-l2", (header.incompatible & incompatible::EXTENDED_L2 != 0).into());
        add("dirty-flag", (header.incompatible & incompatible::DIRTY != 0).into());
    }
    if let Some(name) = &header.backing {
        add("backing-filename", String::from_utf8_lossy(name).into());
    }
    if let Some(format) = &header.backing_format {
        add("backing-filename-format", format.as_str().into());
    }
    if header.geometry.data_file {
        if let Some(name) = &header.data_file {
            add("data-file", name.as_str().into());
        }
        add("data-file-raw", (*image.autoclear.lock() & AUTOCLEAR_RAW_DATA_FILE != 0).into());
    }
    if let Some(at) = header.bitmaps
        && let Ok((_, list)) = image.file_len().and_then(|len| bitmaps::read(&image.writeback, at, len))
    {
        let list = list.iter().map(|b| {
            serde_json::json!({
                "name": b.name,
                "granularity": 1u64.checked_shl(b.granularity_bits.into()),
                "flags": b.flag_names(),
            })
        });
        add("bitmaps", list.collect::<Vec<_>>().into());
    }
    let list: Vec<serde_json::Value> = image
        .snapshots
        .iter()
        .map(|s| {
            serde_json::json!({
                "id": s.id,
                "name": s.name,
                "vm-state-size": s.vm_state,
                "date-sec": s.date.0,
                "date-nsec": s.date.1,
                "vm-clock-sec": s.vm_clock / 1_000_000_000,
                "vm-clock-nsec": s.vm_clock % 1_000_000_000,
            })
        })
        .collect();
    if !list.is_empty() {
        add("snapshots", list.into());
    }
    details
}
