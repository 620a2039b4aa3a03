//! Apple's disk images (UDIF, ".dmg"), read-only.
//!
//! A trailer at the end of the file (`trailer.rs`) leads to a property list, or in older files a resource fork, which holds tables of chunks (`chunks.rs`): runs of
//! sectors that are zeros, plain bytes, or compressed (`codec.rs`). Images of several files and encrypted ones are refused by name.
//!
//! Source: QEMU's driver "dmg"; descriptions of the format by its users. Apple has published none.

mod adc;
mod chunks;
mod codec;
mod trailer;

use crate::drivers::{Driver, Opened, READ, Request};
use crate::error::{Error, Result};
use crate::format::{Extent, Format, FormatLimits, Place, Unit};
use crate::probe::Head;
use crate::store::Store;
use crate::tail::Tail;
use crate::writeback::WriteBack;
use chunks::{Chunk, Kind, SECTOR};
use std::sync::Arc;
use trailer::Trailer;

/// How an encrypted file begins.
const ENCRYPTED: &[u8] = b"encrcdsa";

/// The format's row in the table.
pub(crate) const DRIVER: Driver =
    Driver { name: "dmg", aliases: &[], recognise: |h| h.has(0, ENCRYPTED) || has_trailer(h), can: READ, open };

/// Whether a file ends as DMG images do.
pub(crate) fn has_trailer(head: &Head) -> bool {
    (512..=1023).any(|back| head.has_at_end(back, trailer::MAGIC))
}

/// An open image.
struct Dmg {
    tail: Tail,
    writeback: Arc<WriteBack>,
    /// By their first sector; none overlap.
    chunks: Vec<Chunk>,
    size: u64,
}

fn open(request: Request<'_>) -> Result<Opened> {
    if request.snapshot_name.is_some() {
        return Err(Error::unsupported("DMG images have no internal snapshots"));
    }
    let mut head = [0; ENCRYPTED.len()];
    request.store.read_zero_filled(&mut head, 0).map_err(|e| Error::io("cannot read the start of the file", e))?;
    if head == ENCRYPTED {
        return Err(Error::unsupported("this DMG image is encrypted, which is not supported"));
    }
    let trailer = Trailer::read(&*request.store)?;
    let chunks = chunks::read(&*request.store, &trailer)?;
    let end = chunks.last().map_or(0, |chunk| chunk.sector + chunk.count);
    let size = trailer.sectors.max(end).checked_mul(SECTOR).filter(|size| *size <= i64::MAX as u64);
    let size = size.ok_or_else(|| Error::corrupt(format!("a disk of {} sectors", trailer.sectors.max(end))))?;
    let writeback = Arc::new(WriteBack::unmirrored(vec![request.store]));
    let format = Dmg { tail: Tail::new(writeback.clone()), writeback: writeback.clone(), chunks, size };
    Ok(Opened { format: Arc::new(format), writeback, parent: None })
}

impl Format for Dmg {
    fn name(&self) -> &'static str {
        "dmg"
    }

    fn limits(&self) -> FormatLimits {
        FormatLimits {
            size: self.size,
            sector: SECTOR as u32,
            physical_sector: SECTOR as u32,
            // Chunks can be any number of sectors.
            unit: SECTOR,
            read_only: true,
            cheap_zero: false,
            can_discard: false,
            thin: false,
            holes_are_zeros: false,
        }
    }

    fn stores(&self) -> &[Arc<dyn Store>] {
        self.writeback.stores()
    }

    fn map(&self, at: u64, want: u64) -> Result<Extent> {
        let want = want.min(self.size.saturating_sub(at));
        let next = self.chunks.partition_point(|chunk| chunk.sector * SECTOR <= at);
        let found = next.checked_sub(1).and_then(|n| Some((n, self.chunks.get(n)?)));
        let Some((number, chunk)) = found.filter(|(_, chunk)| at < (chunk.sector + chunk.count) * SECTOR) else {
            // Between chunks: nothing is said of it.
            let end = self.chunks.get(next).map_or(self.size, |chunk| chunk.sector * SECTOR);
            return Ok(Extent { len: want.min(end - at), place: Place::Zero { reserved: false } });
        };
        let skip = at - chunk.sector * SECTOR;
        let len = want.min(chunk.count * SECTOR - skip);
        match chunk.kind {
            Kind::Zero => Ok(Extent { len, place: Place::Zero { reserved: false } }),
            Kind::Raw => self.tail.data(chunk.at + skip, len, false),
            Kind::Coded(_) => {
                let decoded_len = u32::try_from(chunk.count * SECTOR).map_err(|_| Error::corrupt("a chunk is too long"))?;
                Ok(Extent { len, place: Place::Encoded { unit: Unit { id: number as u64, aux: 0, decoded_len }, skip } })
            }
        }
    }

    fn decode(&self, unit: &Unit, out: &mut [u8]) -> Result<()> {
        let chunk = usize::try_from(unit.id).ok().and_then(|n| self.chunks.get(n));
        let chunk = chunk.ok_or_else(|| Error::corrupt(format!("there is no chunk {}", unit.id)))?;
        let Kind::Coded(method) = chunk.kind else { return Err(Error::corrupt(format!("chunk {} is not compressed", unit.id))) };
        if self.tail.in_file(chunk.at, chunk.len)? < chunk.len {
            return Err(crate::tail::cut_short(chunk.at));
        }
        // Bounded when the tables were read.
        let mut input = vec![0; usize::try_from(chunk.len).unwrap_or(0)];
        let fail = |e| Error::io("cannot read a compressed chunk", e).at_offset(chunk.at);
        self.tail.store()?.read_exact_at(&mut input, chunk.at).map_err(fail)?;
        codec::decode(method, &input, out).map_err(|e| e.at_offset(chunk.at))
    }

    fn describe(&self) -> serde_json::Value {
        let mut methods: Vec<&str> =
            self.chunks.iter().filter_map(|c| if let Kind::Coded(m) = c.kind { Some(m.name()) } else { None }).collect();
        methods.sort_unstable();
        methods.dedup();
        serde_json::json!({ "chunks": self.chunks.len(), "compression": methods })
    }
}
