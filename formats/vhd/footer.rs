//! The footer: at the end of every VHD, and, if the file is not of fixed size, as a copy at its start.

use crate::error::{Error, Result};
use crate::field::{array, put};
use crate::store::Store;
use uuid::Uuid;

/// Size of a footer and of a sector, in bytes.
pub(super) const SECTOR: u64 = 512;
/// Old programs wrote footers of this size, in bytes.
const SHORT: u64 = 511;
/// The largest disk, in bytes: 2040 GiB.
pub(super) const MAX_SIZE: u64 = 0xFF00_0000 * SECTOR;
/// The largest geometry there is; it says nothing about the size.
const MAX_GEOMETRY: (u16, u8, u8) = (65_535, 16, 255);
/// Programs that make disks of exactly the footer's size. All others, among them those whose geometry QEMU follows, are known by cylinders, heads and sectors.
const EXACT: [&[u8; 4]; 6] = [b"qem2", b"win ", b"d2v ", b"tap\0", b"CTXS", b"wa\0\0"];

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Fixed,
    Dynamic,
    Differencing,
}

/// A valid footer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Footer {
    bytes: [u8; SECTOR as usize],
    kind: Kind,
}

/// One's complement of the sum of all bytes, the field at `at` counted as zeros.
pub(super) fn checksum(bytes: &[u8], at: usize) -> u32 {
    let sum = |part: Option<&[u8]>| part.unwrap_or_default().iter().map(|b| u32::from(*b)).sum::<u32>();
    !sum(bytes.get(..at)).wrapping_add(sum(bytes.get(at.saturating_add(4)..)))
}

impl Footer {
    /// A valid footer, or what is wrong with it; `None`: these bytes are none.
    fn parse(bytes: [u8; SECTOR as usize]) -> Option<Result<Self>> {
        bytes.starts_with(b"conectix").then(|| {
            if u32::from_be_bytes(array(&bytes, 64)?) != checksum(&bytes, 64) {
                return Err(Error::corrupt("the footer has a wrong checksum"));
            }
            let version = u32::from_be_bytes(array(&bytes, 12)?);
            if version >> 16 != 1 {
                return Err(Error::unsupported(format!("VHD version {version:#x}; only version 1.0 is known")));
            }
            let kind = match u32::from_be_bytes(array(&bytes, 60)?) {
                2 => Kind::Fixed,
                3 => Kind::Dynamic,
                4 => Kind::Differencing,
                other => {
                    return Err(Error::unsupported(format!(
                        "VHD images of type {other}; known are fixed (2), dynamic (3) and differencing (4)"
                    )));
                }
            };
            Ok(Self { bytes, kind })
        })
    }

    fn be32(&self, at: usize) -> u32 {
        array(&self.bytes, at).map_or(0, u32::from_be_bytes)
    }

    fn be64(&self, at: usize) -> u64 {
        array(&self.bytes, at).map_or(0, u64::from_be_bytes)
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    /// Byte offset of the dynamic header.
    pub(super) fn header_at(&self) -> u64 {
        self.be64(16)
    }

    /// Seconds since 2000-01-01.
    pub(super) fn timestamp(&self) -> u32 {
        self.be32(24)
    }

    /// The program that made the file.
    pub(super) fn creator(&self) -> [u8; 4] {
        array(&self.bytes, 28).unwrap_or_default()
    }

    pub(super) fn uuid(&self) -> Uuid {
        Uuid::from_bytes(array(&self.bytes, 68).unwrap_or_default())
    }

    /// The disk belongs to a machine in saved state, which would not survive changes.
    pub(super) fn saved_state(&self) -> bool {
        self.bytes[84] != 0
    }

    /// The size field, in bytes.
    pub(super) fn current_size(&self) -> u64 {
        self.be64(48)
    }

    fn geometry(&self) -> (u16, u8, u8) {
        (array(&self.bytes, 56).map_or(0, u16::from_be_bytes), self.bytes[58], self.bytes[59])
    }

    /// Size by cylinders, heads and sectors, in bytes.
    fn geometry_size(&self) -> u64 {
        let (cylinders, heads, sectors) = self.geometry();
        u64::from(cylinders) * u64::from(heads) * u64::from(sectors) * SECTOR
    }

    /// The size that the program which made the file gives the disk, in bytes. A wrong choice cuts the disk or adds to it.
    pub(super) fn size(&self) -> u64 {
        let exact = EXACT.contains(&&self.creator()) || self.geometry() == MAX_GEOMETRY || self.geometry_size() == 0;
        if exact { self.current_size() } else { self.geometry_size() }
    }

    /// The same for a disk of another size.
    pub(super) fn with_size(&self, size: u64) -> Self {
        let mut footer = self.clone();
        put(&mut footer.bytes, 48, &size.to_be_bytes());
        let mut geometry = geometry_for(size / SECTOR);
        let by_geometry = u64::from(geometry.0) * u64::from(geometry.1) * u64::from(geometry.2) * SECTOR;
        if !EXACT.contains(&&self.creator()) && by_geometry != size {
            geometry = MAX_GEOMETRY;
        }
        put(&mut footer.bytes, 56, &geometry.0.to_be_bytes());
        put(&mut footer.bytes, 58, &[geometry.1, geometry.2]);
        let sum = checksum(&footer.bytes, 64);
        put(&mut footer.bytes, 64, &sum.to_be_bytes());
        footer
    }
}

/// Cylinders, heads and sectors for a number of sectors (VHD specification, appendix "CHS Calculation").
fn geometry_for(sectors: u64) -> (u16, u8, u8) {
    let sectors = sectors.min(65_535 * 16 * 255);
    let (per_track, heads, tracks) = if sectors >= 65_535 * 16 * 63 {
        (255, 16, sectors / 255)
    } else {
        let (mut per_track, mut tracks) = (17, sectors / 17);
        let mut heads = tracks.div_ceil(1024).max(4);
        if tracks >= heads * 1024 || heads > 16 {
            (per_track, heads, tracks) = (31, 16, sectors / 31);
        }
        if tracks >= heads * 1024 {
            (per_track, heads, tracks) = (63, 16, sectors / 63);
        }
        (per_track, heads, tracks)
    };
    let narrow = |n: u64| u8::try_from(n).unwrap_or(u8::MAX);
    (u16::try_from(tracks / heads).unwrap_or(u16::MAX), narrow(heads), narrow(per_track))
}

/// The footer of a file, and where it is.
#[derive(Clone, Debug)]
pub(super) struct Footers {
    pub(super) footer: Footer,
    /// Where the footer at the end is, or belongs, as a byte offset: nothing of the disk lies behind.
    pub(super) end: u64,
    /// What is wrong with the footer at the end.
    pub(super) end_damage: Option<String>,
    /// What is wrong with the copy at the start.
    pub(super) start_damage: Option<String>,
}

impl Footers {
    pub(super) fn read(store: &dyn Store) -> Result<Self> {
        let fail = |e| Error::io("cannot read the footer", e);
        let len = store.len().map_err(fail)?;
        let read = |at: u64, count: u64| -> Result<Option<Result<Footer>>> {
            let mut bytes = [0; SECTOR as usize];
            let part = bytes.get_mut(..count as usize).unwrap_or_default();
            store.read_zero_filled(part, at).map_err(fail)?;
            Ok(Footer::parse(bytes))
        };
        let mut at_end = match len.checked_sub(SECTOR) {
            Some(at) => read(at, SECTOR)?.map(|f| (f, at)),
            None => None,
        };
        if at_end.is_none()
            && let Some(at) = len.checked_sub(SHORT)
        {
            at_end = read(at, SHORT)?.map(|f| (f, at));
        }
        let at_start = read(0, SECTOR)?;
        match (at_end, at_start) {
            (Some((Ok(footer), end)), _) if footer.kind == Kind::Fixed => Ok(Self { footer, end, end_damage: None, start_damage: None }),
            (Some((Ok(footer), end)), start) => {
                let start_damage = match start {
                    Some(Ok(copy)) if copy == footer => None,
                    Some(Ok(_)) => Some("the copy of the footer at the start differs from the footer".to_owned()),
                    Some(Err(e)) => Some(format!("at the start of the file, {e}")),
                    None => Some("there is no copy of the footer at the start".to_owned()),
                };
                let end_damage = (!end.is_multiple_of(SECTOR)).then(|| "the footer does not begin with a sector".to_owned());
                Ok(Self { footer, end: end.next_multiple_of(SECTOR), end_damage, start_damage })
            }
            (end, Some(Ok(footer))) if footer.kind != Kind::Fixed => {
                // A damaged footer is overwritten; otherwise whatever is there stays.
                let (place, end_damage) = match end {
                    Some((Err(e), at)) => (at, format!("at the end of the file, {e}")),
                    _ => (len, "there is no footer at the end".to_owned()),
                };
                Ok(Self { footer, end: place.next_multiple_of(SECTOR), end_damage: Some(end_damage), start_damage: None })
            }
            (Some((Err(e), at)), _) => Err(e.at_offset(at)),
            (None, Some(Err(e))) => Err(e.at_offset(0)),
            (None, Some(Ok(_))) => {
                Err(Error::corrupt("the file begins with the footer of a fixed VHD and does not end with one").at_offset(0))
            }
            (None, None) => Err(Error::invalid_format("not a VHD: there is no footer at the end of the file, nor a copy at its start")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn geometries_are_those_of_the_specification() {
        // As `qemu-img create` computes them.
        assert_eq!(geometry_for(20_480), (301, 4, 17));
        assert_eq!(geometry_for(65_535 * 16 * 255 + 1), (65_535, 16, 255));
        let (c, h, s) = geometry_for(4_194_304);
        assert_eq!((c, h, s), (4161, 16, 63));
    }

    #[test]
    fn the_sum_skips_its_field() {
        assert_eq!(checksum(&[1, 2, 255, 255, 255, 255, 3], 2), !6);
    }
}
