//! Sense data: the named key/ASC/ASCQ triples, what points into the CDB or parameter list, and both encodings (SPC-4 4.5).
//!
//! A [`Fault`] is how a command ends other than well; the one mapping from an image's error to a fault is here too.

use formats::Kind;

/// A sense key with its additional sense code and qualifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Triple {
    /// Sense key, 4 bits.
    pub key: u8,
    /// Additional sense code.
    pub asc: u8,
    /// Additional sense code qualifier.
    pub ascq: u8,
}

impl Triple {
    const fn new(key: u8, asc: u8, ascq: u8) -> Self {
        Self { key, asc, ascq }
    }

    /// Nothing to report.
    pub const NO_SENSE: Self = Self::new(0x0, 0x00, 0x00);
    /// LOGICAL UNIT NOT READY, FORMAT IN PROGRESS.
    pub const FORMAT_IN_PROGRESS: Self = Self::new(0x2, 0x04, 0x04);
    /// LOGICAL UNIT NOT READY, SANITIZE IN PROGRESS.
    pub const SANITIZE_IN_PROGRESS: Self = Self::new(0x2, 0x04, 0x1B);
    /// WRITE ERROR.
    pub const WRITE_ERROR: Self = Self::new(0x3, 0x0C, 0x00);
    /// UNRECOVERED READ ERROR.
    pub const READ_ERROR: Self = Self::new(0x3, 0x11, 0x00);
    /// SANITIZE COMMAND FAILED.
    pub const SANITIZE_FAILED: Self = Self::new(0x3, 0x31, 0x03);
    /// FORMAT COMMAND FAILED.
    pub const FORMAT_FAILED: Self = Self::new(0x3, 0x31, 0x01);
    /// INTERNAL TARGET FAILURE.
    pub const INTERNAL_FAILURE: Self = Self::new(0x4, 0x44, 0x00);
    /// INVALID FIELD IN COMMAND INFORMATION UNIT: the transport's length contradicts the CDB.
    pub const INVALID_FIELD_IN_COMMAND_IU: Self = Self::new(0x5, 0x0E, 0x03);
    /// PARAMETER LIST LENGTH ERROR.
    pub const PARAMETER_LIST_LENGTH_ERROR: Self = Self::new(0x5, 0x1A, 0x00);
    /// INVALID COMMAND OPERATION CODE.
    pub const INVALID_OPCODE: Self = Self::new(0x5, 0x20, 0x00);
    /// LOGICAL BLOCK ADDRESS OUT OF RANGE.
    pub const LBA_OUT_OF_RANGE: Self = Self::new(0x5, 0x21, 0x00);
    /// INVALID FIELD IN CDB.
    pub const INVALID_FIELD_IN_CDB: Self = Self::new(0x5, 0x24, 0x00);
    /// INVALID FIELD IN PARAMETER LIST.
    pub const INVALID_FIELD_IN_PARAMETER_LIST: Self = Self::new(0x5, 0x26, 0x00);
    /// TOO MANY TARGET DESCRIPTORS.
    pub const TOO_MANY_TARGET_DESCRIPTORS: Self = Self::new(0x5, 0x26, 0x06);
    /// UNSUPPORTED TARGET DESCRIPTOR TYPE CODE.
    pub const UNSUPPORTED_TARGET_DESCRIPTOR: Self = Self::new(0x5, 0x26, 0x07);
    /// TOO MANY SEGMENT DESCRIPTORS.
    pub const TOO_MANY_SEGMENT_DESCRIPTORS: Self = Self::new(0x5, 0x26, 0x08);
    /// UNSUPPORTED SEGMENT DESCRIPTOR TYPE CODE.
    pub const UNSUPPORTED_SEGMENT_DESCRIPTOR: Self = Self::new(0x5, 0x26, 0x09);
    /// INLINE DATA LENGTH EXCEEDED.
    pub const INLINE_DATA_LENGTH_EXCEEDED: Self = Self::new(0x5, 0x26, 0x0B);
    /// SAVING PARAMETERS NOT SUPPORTED.
    pub const SAVING_NOT_SUPPORTED: Self = Self::new(0x5, 0x39, 0x00);
    /// CAPACITY DATA HAS CHANGED.
    pub const CAPACITY_CHANGED: Self = Self::new(0x6, 0x2A, 0x09);
    /// INQUIRY DATA HAS CHANGED.
    pub const INQUIRY_CHANGED: Self = Self::new(0x6, 0x3F, 0x03);
    /// THIN PROVISIONING SOFT THRESHOLD REACHED.
    pub const THRESHOLD_REACHED: Self = Self::new(0x6, 0x38, 0x07);
    /// SET TARGET PORT GROUPS COMMAND FAILED.
    pub const SET_TARGET_PORT_GROUPS_FAILED: Self = Self::new(0x4, 0x67, 0x0A);
    /// WRITE PROTECTED.
    pub const WRITE_PROTECTED: Self = Self::new(0x7, 0x27, 0x00);
    /// LOGICAL UNIT SOFTWARE WRITE PROTECTED.
    pub const SOFTWARE_WRITE_PROTECTED: Self = Self::new(0x7, 0x27, 0x02);
    /// SPACE ALLOCATION FAILED WRITE PROTECT.
    pub const SPACE_ALLOCATION_FAILED: Self = Self::new(0x7, 0x27, 0x07);
    /// COPY ABORTED with no further sense: the copy manager could not go on.
    pub const COPY_ABORTED: Self = Self::new(0xA, 0x00, 0x00);
    /// COPY TARGET DEVICE NOT REACHABLE.
    pub const COPY_TARGET_NOT_REACHABLE: Self = Self::new(0xA, 0x0D, 0x02);
    /// INCORRECT COPY TARGET DEVICE TYPE.
    pub const COPY_TARGET_WRONG_TYPE: Self = Self::new(0xA, 0x0D, 0x03);
    /// MISCOMPARE DURING VERIFY OPERATION.
    pub const MISCOMPARE: Self = Self::new(0xE, 0x1D, 0x00);
}

/// The sense-key specific field (SPC-4 4.5.2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Specific {
    /// The byte of the CDB in error, and its most significant bit in error if one is meant.
    CdbField(u16, Option<u8>),
    /// The byte of the parameter list in error, and the bit if one is meant.
    ParameterField(u16, Option<u8>),
    /// How far an operation has got, in 65536ths.
    Progress(u16),
}

/// A command that does not end well: CHECK CONDITION with this sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What.
    pub triple: Triple,
    /// The INFORMATION field, where the command gives it a meaning.
    pub information: Option<u64>,
    /// Where.
    pub specific: Option<Specific>,
}

impl From<Triple> for Fault {
    fn from(triple: Triple) -> Self {
        Self { triple, information: None, specific: None }
    }
}

impl Fault {
    /// A field of the CDB has a value that is not accepted: its byte, and its most significant bit if it is less than a byte.
    pub fn cdb(byte: u16, bit: Option<u8>) -> Self {
        Self { specific: Some(Specific::CdbField(byte, bit)), ..Triple::INVALID_FIELD_IN_CDB.into() }
    }

    /// A field of the parameter list has a value that is not accepted.
    pub fn parameter(byte: usize, bit: Option<u8>) -> Self {
        let byte = u16::try_from(byte).unwrap_or(u16::MAX);
        Self { specific: Some(Specific::ParameterField(byte, bit)), ..Triple::INVALID_FIELD_IN_PARAMETER_LIST.into() }
    }

    /// The data differ from byte `offset` on.
    pub fn miscompare(offset: u64) -> Self {
        Self { information: Some(offset), ..Triple::MISCOMPARE.into() }
    }

    /// An operation that takes long is under way.
    pub fn progress(triple: Triple, progress: u16) -> Self {
        Self { specific: Some(Specific::Progress(progress)), ..triple.into() }
    }

    /// What the initiator is told when the image failed while it was read.
    pub fn reading(error: &formats::Error) -> Self {
        Self::of(error.kind(), Triple::READ_ERROR)
    }

    /// What the initiator is told when the image failed while it was written.
    pub fn writing(error: &formats::Error) -> Self {
        Self::of(error.kind(), Triple::WRITE_ERROR)
    }

    /// The one mapping from an image's error to sense; `medium` is the medium error of the operation.
    fn of(kind: Kind, medium: Triple) -> Self {
        match kind {
            Kind::Io | Kind::Corrupt | Kind::InvalidFormat => medium,
            Kind::NotFound | Kind::Denied | Kind::Locked => medium,
            Kind::ReadOnly => Triple::WRITE_PROTECTED,
            Kind::NoSpace => Triple::SPACE_ALLOCATION_FAILED,
            Kind::OutOfBounds => Triple::LBA_OUT_OF_RANGE,
            Kind::Unsupported | Kind::InvalidOption => Triple::INTERNAL_FAILURE,
        }
        .into()
    }
}

/// Encoded sense data, in the format that D_SENSE asks for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Sense {
    bytes: [u8; Self::MAX],
    len: u8,
}

impl Sense {
    /// The longest that is made; the ring has room for 96.
    const MAX: usize = 28;

    /// Encodes `fault` in descriptor format (72h) or fixed format (70h).
    pub fn encode(fault: &Fault, descriptor: bool) -> Self {
        let Triple { key, asc, ascq } = fault.triple;
        let specific = fault.specific.map(encode_specific);
        let mut bytes = [0; Self::MAX];
        if !descriptor {
            bytes[0] = 0x70;
            bytes[2] = key;
            // Fixed format has 32 bits of information; a value that does not fit is left out.
            if let Some(information) = fault.information.and_then(|i| u32::try_from(i).ok()) {
                bytes[0] |= 0x80;
                bytes[3..7].copy_from_slice(&information.to_be_bytes());
            }
            bytes[7] = 0x0A;
            bytes[12] = asc;
            bytes[13] = ascq;
            if let Some(specific) = specific {
                bytes[15..18].copy_from_slice(&specific);
            }
            return Self { bytes, len: 18 };
        }
        bytes[..4].copy_from_slice(&[0x72, key, asc, ascq]);
        let mut len = 8;
        if let Some(information) = fault.information {
            bytes[len..len + 3].copy_from_slice(&[0x00, 0x0A, 0x80]);
            bytes[len + 4..len + 12].copy_from_slice(&information.to_be_bytes());
            len += 12;
        }
        if let Some(specific) = specific {
            bytes[len..len + 2].copy_from_slice(&[0x02, 0x06]);
            bytes[len + 4..len + 7].copy_from_slice(&specific);
            len += 8;
        }
        bytes[7] = (len - 8) as u8;
        Self { bytes, len: len as u8 }
    }

    /// The encoded bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

impl std::fmt::Debug for Sense {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Sense({:02x?})", self.as_bytes())
    }
}

/// The three bytes of the sense-key specific field, SKSV set.
fn encode_specific(specific: Specific) -> [u8; 3] {
    let (first, value) = match specific {
        Specific::CdbField(byte, bit) => (0xC0 | encode_bit(bit), byte),
        Specific::ParameterField(byte, bit) => (0x80 | encode_bit(bit), byte),
        Specific::Progress(progress) => (0x80, progress),
    };
    let [high, low] = value.to_be_bytes();
    [first, high, low]
}

/// BPV and the bit pointer.
fn encode_bit(bit: Option<u8>) -> u8 {
    bit.map_or(0, |bit| 0x08 | (bit & 7))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fixed_format() {
        let sense = Sense::encode(&Fault::cdb(2, Some(5)), false);
        assert_eq!(sense.as_bytes(), [0x70, 0, 5, 0, 0, 0, 0, 0x0A, 0, 0, 0, 0, 0x24, 0, 0, 0xCD, 0, 2]);
        let sense = Sense::encode(&Fault::miscompare(0x0102), false);
        assert_eq!(sense.as_bytes(), [0xF0, 0, 0xE, 0, 0, 1, 2, 0x0A, 0, 0, 0, 0, 0x1D, 0, 0, 0, 0, 0]);
        let sense = Sense::encode(&Fault::miscompare(1 << 32), false);
        assert_eq!(sense.as_bytes()[0], 0x70, "information that does not fit is not valid");
    }

    #[test]
    fn descriptor_format() {
        let sense = Sense::encode(&Fault::parameter(0x123, None), true);
        assert_eq!(sense.as_bytes(), [0x72, 5, 0x26, 0, 0, 0, 0, 8, 2, 6, 0, 0, 0x80, 1, 0x23, 0]);
        let sense = Sense::encode(&Fault::miscompare(1 << 32), true);
        assert_eq!(sense.as_bytes(), [0x72, 0xE, 0x1D, 0, 0, 0, 0, 12, 0, 0x0A, 0x80, 0, 0, 0, 0, 1, 0, 0, 0, 0]);
        let both = Fault { information: Some(1), ..Fault::progress(Triple::FORMAT_IN_PROGRESS, 0x8000) };
        assert_eq!(Sense::encode(&both, true).as_bytes().len(), 28);
    }
}
