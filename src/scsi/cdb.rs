//! A command descriptor block as fields: checked big-endian access, the usual LBA and length positions, and what is
//! refused before a command looks at its own fields.

use crate::scsi::opcode::Entry;
use crate::scsi::sense::Fault;

/// The bytes of one CDB. Access beyond its end reads zeros; [`Cdb::check`] has made sure that nothing is missing.
#[derive(Clone, Copy, Debug)]
pub struct Cdb<'c>(&'c [u8]);

/// The LBA and transfer length of a command, in logical blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First logical block.
    pub lba: u64,
    /// Number of logical blocks.
    pub blocks: u32,
    /// Where in the CDB the length field begins, for the field pointer.
    pub blocks_field: u16,
}

impl<'c> Cdb<'c> {
    /// Wraps the bytes that the transport delivered; what follows the command's own length is ignored.
    pub fn new(bytes: &'c [u8]) -> Self {
        Self(bytes)
    }

    /// Byte `at`.
    pub fn byte(&self, at: usize) -> u8 {
        self.0.get(at).copied().unwrap_or(0)
    }

    /// Any bit of `mask` in byte `at` is set.
    pub fn has(&self, at: usize, mask: u8) -> bool {
        self.byte(at) & mask != 0
    }

    /// The big-endian 16-bit field at byte `at`.
    pub fn u16(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.byte(at), self.byte(at + 1)])
    }

    /// The big-endian 32-bit field at byte `at`.
    pub fn u32(&self, at: usize) -> u32 {
        u32::from(self.u16(at)) << 16 | u32::from(self.u16(at + 2))
    }

    /// The big-endian 64-bit field at byte `at`.
    pub fn u64(&self, at: usize) -> u64 {
        u64::from(self.u32(at)) << 32 | u64::from(self.u32(at + 4))
    }

    /// Refuses a CDB that is too short for its command or sets a bit that the command does not define. `extra` are bits that
    /// the command defines and this logical unit does not support at present.
    pub fn check(&self, entry: &Entry, unsupported: Option<(usize, u8)>) -> Result<(), Fault> {
        if self.0.len() < entry.usage.len() {
            return Err(Fault::cdb(u16::try_from(self.0.len()).unwrap_or(u16::MAX), None));
        }
        for (at, (&byte, &usage)) in self.0.iter().zip(entry.usage).enumerate().skip(1) {
            let mut reserved = byte & !usage;
            if reserved != 0 {
                reserved &= !entry.ignored_bits(at);
            }
            if let Some((_, mask)) = unsupported.filter(|(byte, _)| *byte == at) {
                reserved |= byte & mask;
            }
            if reserved != 0 {
                return Err(Fault::cdb(at as u16, Some(7 - reserved.leading_zeros() as u8)));
            }
        }
        Ok(())
    }

    /// LBA and length of a 6-byte command: 21 bits, and a length of 0 is 256 blocks (SBC-4 5.13).
    pub fn extent_6(&self) -> Extent {
        let blocks = if self.byte(4) == 0 { 256 } else { u32::from(self.byte(4)) };
        Extent { lba: u64::from(self.u32(0) & 0x1F_FFFF), blocks, blocks_field: 4 }
    }

    /// LBA and length of a 10-byte command.
    pub fn extent_10(&self) -> Extent {
        Extent { lba: u64::from(self.u32(2)), blocks: u32::from(self.u16(7)), blocks_field: 7 }
    }

    /// LBA and length of a 12-byte command.
    pub fn extent_12(&self) -> Extent {
        Extent { lba: u64::from(self.u32(2)), blocks: self.u32(6), blocks_field: 6 }
    }

    /// LBA and length of a 16-byte command.
    pub fn extent_16(&self) -> Extent {
        Extent { lba: self.u64(2), blocks: self.u32(10), blocks_field: 10 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields() {
        let cdb = Cdb::new(&[0x08, 0xFF, 0x12, 0x34, 0x00, 0x00]);
        assert_eq!(cdb.extent_6(), Extent { lba: 0x1F_1234, blocks: 256, blocks_field: 4 });
        assert_eq!(cdb.u64(2), 0x1234_0000_0000_0000, "beyond the end are zeros");
        let cdb = Cdb::new(&[0x88, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0, 0]);
        assert_eq!(cdb.extent_16(), Extent { lba: 0x0102_0304_0506_0708, blocks: 0x090A_0B0C, blocks_field: 10 });
    }
}
