//! Parallels' expandable images, of both kinds: with a table that counts sectors ("WithoutFreeSpace") and with one that counts clusters ("WithouFreSpacExt").
//!
//! A header (`header.rs`), the allocation table, the clusters. [`crate::flat`] does most of the work. While an image is changed its header says so; it is taken
//! back by a clean close. An image that was not closed is checked when it is opened for writing, as the format demands.
//!
//! Bitmaps of changes, which the format's extension holds, are not kept up: such an image is served read-only. A `.hdd` bundle is a directory; the image that is
//! in it is opened by its own name.

mod header;

use crate::device::ZeroMode;
use crate::drivers::{Capabilities, Driver, Opened, Request};
use crate::error::{Error, Kind, Result};
use crate::field::put;
use crate::flat::{Flat, Layout, Meaning};
use crate::format::{CheckReport, Extent, Format, FormatLimits, Placement};
use crate::store::Store;
use crate::table::Width;
use crate::writeback::WriteBack;
use header::{ENTRY, Header, LEN, MAGIC, OPEN, SECTOR, field};
use parking_lot::Mutex;
use std::sync::Arc;

/// QEMU's name of the format.
const NAME: &str = "parallels";

/// The format's row in the table.
pub(crate) const DRIVER: Driver = Driver {
    name: NAME,
    aliases: &["hdd"],
    recognise: |h| MAGIC.iter().any(|magic| h.has(0, *magic)),
    can: Capabilities { read: true, write: true, discard: true, cheap_zero: true, parent: false, check: true, repair: true, grow: true },
    open,
};

/// An open Parallels image.
struct Parallels {
    flat: Flat,
    header: Header,
    /// What changes in the header, as it is in the file.
    state: Mutex<State>,
}

#[derive(Clone, Copy)]
struct State {
    in_use: u32,
    entries: u64,
    /// It was found not closed, and has not been checked since: that stays to be seen.
    unchecked: bool,
}

fn open(request: Request<'_>) -> Result<Opened> {
    if request.snapshot_name.is_some() {
        return Err(Error::unsupported("Parallels images have no internal snapshots"));
    }
    let header = Header::read(&*request.store)?;
    if request.writable && header.extension.is_some() {
        return Err(Error::unsupported(
            "this Parallels image keeps bitmaps of changes in a format extension, which writing would make wrong: it can only be opened read-only",
        ));
    }
    let writeback = Arc::new(WriteBack::new(vec![request.store], request.redo));
    let step = if header.extended { header.cluster } else { SECTOR };
    let meaning = Meaning {
        width: Width::Le32,
        absent: 0,
        zero: None,
        base: 0,
        step,
        before: 0,
        first: header.data_at.next_multiple_of(step),
        largest: u64::from(u32::MAX),
    };
    let layout = Layout { table_at: LEN as u64, unit: header.cluster, size: header.size, writable: request.writable, parent: false };
    let state = Mutex::new(State { in_use: header.in_use, entries: header.entries, unchecked: header.in_use == OPEN });
    let image = Parallels { flat: Flat::new(writeback.clone(), meaning, &layout), header, state };
    if image.header.in_use == OPEN {
        image.after_no_close(request.writable, request.repair)?;
    }
    Ok(Opened { format: Arc::new(image), writeback, parent: None })
}

impl Parallels {
    /// The image was not closed: before it is changed its table must be in order.
    fn after_no_close(&self, writable: bool, repair: bool) -> Result<()> {
        if !writable || repair {
            tracing::warn!("the image was not closed cleanly");
            return Ok(());
        }
        let report = self.look_for_damage(true)?;
        self.flat.writeback.drain(self)?;
        tracing::warn!(
            corruptions = report.corruptions,
            "the image was not closed cleanly: it was checked, and mended where that was needed"
        );
        Ok(())
    }

    fn mark(&self, in_use: u32) -> Result<()> {
        let mut state = self.state.lock();
        if state.in_use != in_use {
            self.flat.writeback.write_through(0, field::IN_USE as u64, &in_use.to_le_bytes())?;
            state.in_use = in_use;
        }
        Ok(())
    }

    fn look_for_damage(&self, repair: bool) -> Result<CheckReport> {
        if repair && !self.flat.writable {
            return Err(Error::new(Kind::ReadOnly, "the image is open read-only and cannot be repaired"));
        }
        let mut report = CheckReport::default();
        let findings = self.flat.inspect(&mut report)?;
        let file_len = self.flat.tail.file_len()?;
        let first = self.flat.meaning.first;
        let used_end = findings.sound.last().map_or(first, |(at, len)| at.saturating_add(*len));
        if used_end > file_len && !findings.sound.is_empty() {
            report.corruption(format!("the file ends inside the last cluster, which should reach to {used_end:#x}"));
        }
        let used = findings.sound.len() as u64;
        // Bitmaps may lie in clusters that the table does not lead to.
        if self.header.extension.is_none() {
            let there = file_len.saturating_sub(first) / self.header.cluster;
            if there > used {
                report.leaks += there - used;
                report.note(format!("{} clusters of the file are not used", there - used));
            }
        }
        if !repair || (report.corruptions == 0 && report.leaks == 0) {
            self.state.lock().unchecked &= !repair;
            return Ok(report);
        }
        let was_cut = used_end > file_len && !findings.sound.is_empty();
        if was_cut {
            // What it lacks reads as zeros.
            self.flat.tail.cut(used_end)?;
            report.corruptions_fixed += 1;
        }
        self.flat.mend(findings, 0, &mut report)?;
        self.flat.writeback.drain(self)?;
        // Gaps are used later on; what lies behind the last cluster is given back.
        let findings = self.flat.inspect(&mut CheckReport::default())?;
        let end = findings.sound.last().map_or(first, |(at, len)| at.saturating_add(*len));
        let behind = self.flat.tail.file_len()?.saturating_sub(end) / self.header.cluster;
        if self.flat.tail.file_len()? > end {
            self.flat.tail.cut(end)?;
        }
        report.leaks_fixed = report.leaks.min(behind);
        self.flat.find_space_anew(0)?;
        self.state.lock().unchecked = false;
        Ok(report)
    }
}

impl Format for Parallels {
    fn name(&self) -> &'static str {
        NAME
    }

    fn limits(&self) -> FormatLimits {
        self.flat.limits()
    }

    fn stores(&self) -> &[Arc<dyn Store>] {
        self.flat.writeback.stores()
    }

    fn map(&self, at: u64, want: u64) -> Result<Extent> {
        self.flat.map(at, want)
    }

    fn prepare(&self, at: u64, _len: u64) -> Result<Placement> {
        self.flat.prepare(at)
    }

    fn commit(&self, placement: Placement) -> Result<()> {
        self.flat.commit(&placement)
    }

    fn cancel(&self, placement: Placement) {
        self.flat.cancel(&placement);
    }

    fn first_write(&self) -> Result<()> {
        self.flat.find_space(0)?;
        self.mark(OPEN)
    }

    fn zero(&self, at: u64, len: u64, mode: ZeroMode) -> Result<u64> {
        self.flat.zero(at, len, mode)
    }

    fn discard(&self, at: u64, len: u64) -> Result<u64> {
        self.flat.discard(at, len)
    }

    fn grow(&self, size: u64) -> Result<()> {
        let (clusters, sectors) = (size.div_ceil(self.header.cluster), size / SECTOR);
        let room = (self.header.data_at - LEN as u64) / ENTRY;
        if clusters > room || (!self.header.extended && sectors > u64::from(u32::MAX)) {
            let most = room.saturating_mul(self.header.cluster);
            return Err(Error::unsupported(format!(
                "this Parallels image cannot grow beyond {most} bytes: clusters follow its allocation table, which has no room for more"
            )));
        }
        if !size.is_multiple_of(SECTOR) {
            return Err(Error::new(Kind::InvalidOption, format!("{size} is no multiple of {SECTOR}")));
        }
        self.flat.writeback.drain(self)?;
        let mut state = self.state.lock();
        let entries = clusters.max(state.entries);
        self.flat.grow(size, || {
            // Both in one sector, which cannot be torn.
            let mut fields = [0; field::IN_USE - field::ENTRIES];
            put(&mut fields, 0, &u32::try_from(entries).unwrap_or(u32::MAX).to_le_bytes());
            put(&mut fields, field::SECTORS - field::ENTRIES, &sectors.to_le_bytes());
            self.flat.writeback.write_through(0, field::ENTRIES as u64, &fields)
        })?;
        state.entries = entries;
        Ok(())
    }

    fn check(&self, repair: bool) -> Result<CheckReport> {
        self.look_for_damage(repair)
    }

    fn describe(&self) -> serde_json::Value {
        serde_json::json!({
            "subformat": if self.header.extended { "extended" } else { "plain" },
            "cluster-size": self.header.cluster,
            "in-use": self.state.lock().in_use == OPEN,
            "format-extension": self.header.extension.is_some(),
        })
    }

    /// Takes back what [`Self::first_write`] has said.
    fn close(&self) -> Result<()> {
        let state = *self.state.lock();
        if state.in_use == OPEN && !state.unchecked { self.mark(0) } else { Ok(()) }
    }
}
