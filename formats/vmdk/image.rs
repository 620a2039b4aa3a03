//! An open VMDK, and where its bytes live.

use super::descriptor::{ContentId, Descriptor, SECTOR};
use super::header::Scheme;
use super::layout::{Bytes, Layout, Piece};
use super::pages::Pages;
use super::sparse::{Grain, Sparse};
use super::stream;
use crate::device::ZeroMode;
use crate::error::{Error, Kind, Result};
use crate::format::{CheckReport, Extent, Format, FormatLimits, Place, Placement, Unit};
use crate::store::Store;
use crate::writeback::{Freed, WriteBack};
use parking_lot::Mutex;
use std::sync::Arc;

/// An open VMDK.
pub(super) struct Vmdk {
    pub(super) writeback: Arc<WriteBack>,
    pub(super) pages: Pages,
    pub(super) pieces: Vec<Piece>,
    pub(super) sparse: Vec<Sparse>,
    descriptor: Descriptor,
    descriptor_at: u64,
    pub(super) cid: Mutex<Option<ContentId>>,
    size: u64,
    unit: u64,
    pub(super) writable: bool,
    pub(super) has_parent: bool,
}

impl Vmdk {
    pub(super) fn new(writeback: Arc<WriteBack>, layout: Layout, writable: bool, has_parent: bool) -> Self {
        let (size, unit) = (layout.size(), layout.unit());
        Self {
            pages: Pages::new(writeback.clone()),
            cid: Mutex::new(layout.descriptor.cid),
            descriptor: layout.descriptor,
            descriptor_at: layout.descriptor_at,
            size,
            unit,
            writable: writable && layout.fixed.is_none(),
            has_parent,
            pieces: layout.pieces,
            sparse: layout.sparse,
            writeback,
        }
    }

    /// The extent that byte `at` of the disk is in.
    pub(super) fn piece(&self, at: u64) -> Result<&Piece> {
        let number = self.pieces.partition_point(|piece| piece.end <= at);
        self.pieces.get(number).ok_or_else(|| Error::new(Kind::OutOfBounds, format!("byte {at} lies beyond the end of the disk")))
    }

    pub(super) fn extent(&self, number: usize) -> Result<&Sparse> {
        self.sparse.get(number).ok_or_else(|| Error::corrupt(format!("there is no sparse extent {number}")))
    }

    pub(super) fn store(&self, number: usize) -> Result<&Arc<dyn Store>> {
        self.writeback.stores().get(number).ok_or_else(|| Error::corrupt(format!("the image has no file {number}")))
    }

    /// Gives the disk another content id, durably.
    pub(super) fn change_cid(&self) -> Result<()> {
        let mut cid = self.cid.lock();
        let Some(old) = *cid else { return Ok(()) };
        let mask = if old.digits < 8 { (1u32 << (4 * old.digits)) - 1 } else { u32::MAX };
        let seed = uuid::Uuid::new_v4().as_u128();
        let candidates = (0..4).map(|n| (seed >> (32 * n)) as u32 & mask).chain([old.value.wrapping_add(1) & mask, 0]);
        let Some(value) = candidates.into_iter().find(|value| *value != old.value && *value != u32::MAX) else { return Ok(()) };
        let text = format!("{value:0width$x}", width = old.digits);
        self.writeback.write_through(0, self.descriptor_at.saturating_add(old.at), text.as_bytes())?;
        *cid = Some(ContentId { value, ..old });
        Ok(())
    }

    fn map_sparse(&self, piece: &Piece, number: usize, inside: u64, want: u64) -> Result<Extent> {
        let extent = self.extent(number)?;
        let grain = extent.header.grain;
        let (index, skip) = (inside / grain, inside % grain);
        let (found, run) = extent.lookup(&self.pages, index, (skip + want).div_ceil(grain))?;
        let len = want.min(run.saturating_mul(grain) - skip);
        let place = match found {
            Grain::Absent if self.has_parent => Place::Parent,
            Grain::Absent | Grain::Zero => Place::Zero { reserved: false },
            Grain::Data(at) if extent.header.compressed => {
                let unit = Unit { id: stream::unit_id(number, at), aux: index, decoded_len: u32::try_from(grain).unwrap_or(0) };
                return Ok(Extent { len: want.min(grain - skip), place: Place::Encoded { unit, skip } });
            }
            Grain::Data(at) => Place::Data { store: extent.store, at: at.saturating_add(skip), in_place: piece.writable && self.writable },
        };
        Ok(Extent { len, place })
    }
}

impl Format for Vmdk {
    fn name(&self) -> &'static str {
        super::NAME
    }

    fn limits(&self) -> FormatLimits {
        FormatLimits {
            size: self.size,
            sector: SECTOR as u32,
            physical_sector: SECTOR as u32,
            unit: self.unit,
            read_only: !self.writable,
            cheap_zero: true,
            can_discard: true,
            thin: !self.sparse.is_empty(),
            holes_are_zeros: self.sparse.is_empty(),
        }
    }

    fn stores(&self) -> &[Arc<dyn Store>] {
        self.writeback.stores()
    }

    fn map(&self, at: u64, want: u64) -> Result<Extent> {
        let piece = self.piece(at)?;
        let (inside, len) = (at - piece.start, want.min(piece.end - at));
        match piece.bytes {
            Bytes::Flat { store, at } => {
                Ok(Extent { len, place: Place::Data { store, at: at.saturating_add(inside), in_place: piece.writable && self.writable } })
            }
            Bytes::Zero => Ok(Extent { len, place: Place::Zero { reserved: false } }),
            Bytes::Hidden => Err(Error::new(Kind::Denied, "this part of the disk is marked as not accessible in the descriptor")),
            Bytes::Sparse(number) => self.map_sparse(piece, number, inside, len),
        }
    }

    fn decode(&self, unit: &Unit, out: &mut [u8]) -> Result<()> {
        let (number, at) = stream::place(unit.id);
        let extent = self.extent(number)?;
        stream::decode(extent, at, unit.aux, out).map_err(|e| extent.explain(e.at_offset(at)))
    }

    fn prepare(&self, at: u64, len: u64) -> Result<Placement> {
        self.place(at, len)
    }

    fn commit(&self, placement: Placement) -> Result<()> {
        self.publish_placement(&placement)
    }

    fn cancel(&self, placement: Placement) {
        self.cancel_placement(&placement);
    }

    fn first_write(&self) -> Result<()> {
        self.begin_changes()
    }

    fn zero(&self, at: u64, len: u64, mode: ZeroMode) -> Result<u64> {
        self.clear(at, len, mode, false)
    }

    fn discard(&self, at: u64, len: u64) -> Result<u64> {
        self.clear(at, len, ZeroMode::MayUnmap, true)
    }

    fn reclaim(&self, freed: &[Freed]) -> Result<()> {
        self.reclaim_space(freed)
    }

    fn check(&self, repair: bool) -> Result<CheckReport> {
        self.look_for_damage(repair)
    }

    fn identity(&self) -> Option<String> {
        self.cid.lock().map(|cid| format!("{:08x}", cid.value))
    }

    fn describe(&self) -> serde_json::Value {
        let extents: Vec<_> = self
            .pieces
            .iter()
            .map(|piece| {
                let (kind, store, sparse) = match piece.bytes {
                    Bytes::Flat { store, .. } => ("FLAT", Some(store), None),
                    Bytes::Zero => ("ZERO", None, None),
                    Bytes::Hidden => ("NOACCESS", None, None),
                    Bytes::Sparse(number) => {
                        let extent = self.sparse.get(number);
                        let kind = match extent.map(|e| e.header.scheme) {
                            Some(Scheme::Cowd) => "VMFSSPARSE",
                            Some(Scheme::SeSparse { .. }) => "SESPARSE",
                            _ => "SPARSE",
                        };
                        (kind, extent.map(|e| e.store), extent)
                    }
                };
                let name = store.and_then(|s| self.stores().get(s)?.path()).map(|p| p.to_string_lossy().into_owned());
                serde_json::json!({
                    "format": kind,
                    "filename": name,
                    "virtual-size": piece.end - piece.start,
                    "compressed": sparse.map(|e| e.header.compressed),
                    "cluster-size": sparse.map(|e| e.header.grain),
                })
            })
            .collect();
        serde_json::json!({
            "create-type": self.descriptor.create_type,
            "cid": self.cid.lock().map(|cid| cid.value),
            "parent-cid": self.descriptor.parent_cid.unwrap_or(u32::MAX),
            "parent-hint": self.descriptor.parent_hint.as_ref().map(|p| p.to_string_lossy().into_owned()),
            "extents": extents,
        })
    }
}
