//! The header section: file identifier and the two copies of the header, of which the newer valid one counts.
//!
//! Not here: the region tables (`region.rs`), which lie in the same section but change through the log.

use crate::error::{Error, Result};
use crate::field::{array, put};
use crate::store::Store;
use crate::writeback::WriteBack;
use uuid::Uuid;

/// Unit in which everything in the file is laid out, in bytes.
pub(super) const MIB: u64 = 1 << 20;
/// Size of a header copy, in bytes.
const LEN: usize = 4096;
/// Byte offsets of the two copies.
const COPIES: [u64; 2] = [64 << 10, 128 << 10];
/// Everything before this is changed in place and never through the log: identifier and headers, in bytes.
pub(super) const IN_PLACE_END: u64 = 192 << 10;

/// The largest sequence number of an image that may be changed: each change of the header takes two, and they must not run out.
pub(super) const MAX_SEQUENCE: u64 = u64::MAX - (1 << 48);

/// CRC-32C of a structure, whose own field at `at` counts as zeros.
pub(super) fn checksum(bytes: &[u8], at: usize) -> u32 {
    let crc = crc32c::crc32c(bytes.get(..at).unwrap_or_default());
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    crc32c::crc32c_append(crc, bytes.get(at.saturating_add(4)..).unwrap_or_default())
}

/// One header ([MS-VHDX] 2.2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) sequence: u64,
    /// Changes whenever the file is going to be changed at all.
    pub(super) file_write: Uuid,
    /// Changes whenever the guest's bytes are going to be changed; children remember it.
    pub(super) data_write: Uuid,
    /// Not nil: the log holds entries of this identifier that must be replayed.
    pub(super) log: Uuid,
    pub(super) log_version: u16,
    pub(super) version: u16,
    /// Bytes.
    pub(super) log_len: u32,
    /// Byte offset.
    pub(super) log_at: u64,
}

impl Header {
    /// A valid copy, or what is wrong with it.
    fn parse(bytes: &[u8; LEN]) -> Result<Self, &'static str> {
        if !bytes.starts_with(b"head") {
            return Err("has no signature");
        }
        let fields = || -> Result<(u32, Self)> {
            Ok((
                u32::from_le_bytes(array(bytes, 4)?),
                Self {
                    sequence: u64::from_le_bytes(array(bytes, 8)?),
                    file_write: Uuid::from_bytes_le(array(bytes, 16)?),
                    data_write: Uuid::from_bytes_le(array(bytes, 32)?),
                    log: Uuid::from_bytes_le(array(bytes, 48)?),
                    log_version: u16::from_le_bytes(array(bytes, 64)?),
                    version: u16::from_le_bytes(array(bytes, 66)?),
                    log_len: u32::from_le_bytes(array(bytes, 68)?),
                    log_at: u64::from_le_bytes(array(bytes, 72)?),
                },
            ))
        };
        match fields() {
            Ok((sum, header)) if sum == checksum(bytes, 4) => Ok(header),
            _ => Err("has a wrong checksum"),
        }
    }

    fn encode(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        put(&mut bytes, 0, b"head");
        put(&mut bytes, 8, &self.sequence.to_le_bytes());
        put(&mut bytes, 16, &self.file_write.to_bytes_le());
        put(&mut bytes, 32, &self.data_write.to_bytes_le());
        put(&mut bytes, 48, &self.log.to_bytes_le());
        put(&mut bytes, 64, &self.log_version.to_le_bytes());
        put(&mut bytes, 66, &self.version.to_le_bytes());
        put(&mut bytes, 68, &self.log_len.to_le_bytes());
        put(&mut bytes, 72, &self.log_at.to_le_bytes());
        let sum = checksum(&bytes, 4);
        put(&mut bytes, 4, &sum.to_le_bytes());
        bytes
    }

    fn check(&self) -> Result<()> {
        if self.version != 1 {
            return Err(Error::unsupported(format!("VHDX version {}; only version 1 is known", self.version)));
        }
        if self.log_version != 0 && !self.log.is_nil() {
            return Err(Error::unsupported(format!(
                "the log that must be replayed has version {}; only version 0 is known",
                self.log_version
            )));
        }
        let end = self.log_at.checked_add(u64::from(self.log_len));
        let aligned = self.log_at.is_multiple_of(MIB) && u64::from(self.log_len).is_multiple_of(MIB);
        if !aligned || end.is_none_or(|e| e > i64::MAX as u64) || (self.log_len != 0 && self.log_at < MIB) {
            return Err(Error::corrupt(format!("the header places the log at {:#x}, {} bytes long", self.log_at, self.log_len)));
        }
        if self.log_len == 0 && !self.log.is_nil() {
            return Err(Error::corrupt("the header says that the log must be replayed, and that there is no log"));
        }
        Ok(())
    }
}

/// The current header and which copy it is in.
#[derive(Clone, Debug)]
pub(super) struct Headers {
    pub(super) current: Header,
    copy: usize,
    /// What is wrong with the other copy, if anything.
    pub(super) damage: Option<String>,
}

impl Headers {
    /// Refuses changes of an image without a log.
    ///
    /// # Errors
    /// `Unsupported`: the format changes metadata through the log only.
    pub(super) fn need_log(&self) -> Result<()> {
        match self.current.log_len {
            0 => Err(Error::unsupported("the image has no log, and its metadata must not be changed without one")),
            _ => Ok(()),
        }
    }

    /// Reads the identifier and both copies.
    pub(super) fn read(store: &dyn Store) -> Result<Self> {
        let fail = |e| Error::io("cannot read the header", e);
        let mut signature = [0; 8];
        store.read_zero_filled(&mut signature, 0).map_err(fail)?;
        if &signature != b"vhdxfile" {
            return Err(Error::invalid_format("not a VHDX file: it does not begin with \"vhdxfile\""));
        }
        let read = |at: u64| -> Result<Result<Header, &'static str>> {
            let mut bytes = [0; LEN];
            store.read_zero_filled(&mut bytes, at).map_err(fail)?;
            Ok(Header::parse(&bytes))
        };
        let (first, second) = (read(COPIES[0])?, read(COPIES[1])?);
        let (current, copy, damage) = match (first, second) {
            (Err(a), Err(b)) => {
                return Err(Error::corrupt(format!("both copies of the header are damaged: the first {a}, the second {b}")));
            }
            (Ok(header), Err(why)) => (header, 0, Some(format!("the second copy of the header {why}"))),
            (Err(why), Ok(header)) => (header, 1, Some(format!("the first copy of the header {why}"))),
            (Ok(a), Ok(b)) if a.sequence == b.sequence && a != b => {
                return Err(Error::corrupt(format!("both copies of the header have sequence number {} and they differ", a.sequence)));
            }
            (Ok(a), Ok(b)) => {
                if a.sequence >= b.sequence {
                    (a, 0, None)
                } else {
                    (b, 1, None)
                }
            }
        };
        current.check().map_err(|e| e.at_offset(COPIES[copy]))?;
        Ok(Self { current, copy, damage })
    }

    /// Writes a changed header, durably: one copy after the other, so that at every instant a valid one is in the file.
    pub(super) fn update(&mut self, writeback: &WriteBack, change: impl Fn(&mut Header)) -> Result<()> {
        let mut header = self.current;
        change(&mut header);
        for _ in 0..2 {
            let copy = 1 - self.copy;
            header.sequence = header
                .sequence
                .checked_add(1)
                .ok_or_else(|| Error::corrupt("the header's sequence number is the largest there is").at_offset(COPIES[self.copy]))?;
            writeback.write_through(0, COPIES[copy], &header.encode())?;
            self.copy = copy;
            self.current = header;
        }
        self.damage = None;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_encoding() {
        let header = Header {
            sequence: 7,
            file_write: Uuid::from_u128(1),
            data_write: Uuid::from_u128(2),
            log: Uuid::nil(),
            log_version: 0,
            version: 1,
            log_len: 1 << 20,
            log_at: 1 << 20,
        };
        let mut bytes = header.encode();
        assert_eq!(Header::parse(&bytes), Ok(header));
        bytes[4000] ^= 1;
        assert_eq!(Header::parse(&bytes), Err("has a wrong checksum"));
    }

    #[test]
    fn checksum_is_crc32c_with_a_zeroed_field() {
        // RFC 3720 B.4: CRC-32C of 32 bytes of zeros.
        let mut bytes = [0u8; 32];
        bytes[4..8].copy_from_slice(&[9; 4]);
        assert_eq!(checksum(&bytes, 4), 0x8A91_36AA);
    }
}
