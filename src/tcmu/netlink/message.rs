//! Generic netlink messages as bytes: building and taking apart. Native endian, everything aligned to 4 bytes.

/// Size of `struct nlmsghdr`.
const HEADER: usize = 16;
/// Size of `struct genlmsghdr`.
const GENERIC_HEADER: usize = 4;
/// Bits of an attribute's type that are flags.
const TYPE_MASK: u16 = 0x3fff;

/// `nlmsg_type` of an error or acknowledgement.
pub const TYPE_ERROR: u16 = 2;
/// `nlmsg_flags`: a request to the kernel.
pub const FLAG_REQUEST: u16 = 1;
/// `nlmsg_flags`: the kernel is to acknowledge it.
pub const FLAG_ACK: u16 = 4;

/// One message of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message<'a> {
    /// Family id, or one of the control types.
    pub kind: u16,
    pub sequence: u32,
    /// What follows the header.
    pub body: &'a [u8],
}

impl<'a> Message<'a> {
    /// The messages of a datagram; what is damaged ends the iteration.
    pub fn all(datagram: &'a [u8]) -> impl Iterator<Item = Message<'a>> {
        let mut rest = datagram;
        std::iter::from_fn(move || {
            let len = u32_at(rest, 0)? as usize;
            let body = rest.get(HEADER..len)?;
            let message = Message { kind: u16_at(rest, 4)?, sequence: u32_at(rest, 8)?, body };
            rest = rest.get(len.next_multiple_of(4)..).unwrap_or(&[]);
            Some(message)
        })
    }

    /// The errno of an error message; 0 is an acknowledgement. None if the message is something else.
    pub fn error(&self) -> Option<i32> {
        let code = u32_at(self.body, 0)?.cast_signed();
        (self.kind == TYPE_ERROR).then_some(code.saturating_neg())
    }

    /// Command, version and attributes of a generic netlink message.
    pub fn generic(&self) -> Option<(u8, u8, &'a [u8])> {
        let [command, version, _, _] = *self.body.first_chunk::<GENERIC_HEADER>()?;
        Some((command, version, self.body.get(GENERIC_HEADER..)?))
    }
}

/// The attributes in `bytes`: type and payload.
pub fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let len = usize::from(u16_at(rest, 0)?);
        let attribute = (u16_at(rest, 2)? & TYPE_MASK, rest.get(4..len)?);
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or(&[]);
        Some(attribute)
    })
}

/// A string attribute, without the zero that ends it.
pub fn text(payload: &[u8]) -> String {
    let end = payload.iter().position(|&byte| byte == 0).unwrap_or(payload.len());
    String::from_utf8_lossy(&payload[..end]).into_owned()
}

/// The first double word of an attribute.
pub fn u64_of(payload: &[u8]) -> Option<u64> {
    payload.first_chunk().map(|bytes| u64::from_ne_bytes(*bytes))
}

/// The first word of an attribute.
pub fn u32_of(payload: &[u8]) -> Option<u32> {
    u32_at(payload, 0)
}

/// The first half word of an attribute.
pub fn u16_of(payload: &[u8]) -> Option<u16> {
    u16_at(payload, 0)
}

/// Builds a request.
pub struct Builder {
    bytes: Vec<u8>,
}

impl Builder {
    /// A request to family `kind`.
    pub fn new(kind: u16, flags: u16, sequence: u32, command: u8, version: u8) -> Self {
        let mut bytes = vec![0; 4];
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(&sequence.to_ne_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&[command, version, 0, 0]);
        Self { bytes }
    }

    /// Adds an attribute; `payload` is short.
    #[must_use]
    pub fn attribute(mut self, kind: u16, payload: &[u8]) -> Self {
        let len = u16::try_from(payload.len() + 4).expect("attributes of requests are short");
        self.bytes.extend_from_slice(&len.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(payload);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }

    /// The finished message.
    pub fn finish(mut self) -> Vec<u8> {
        let len = u32::try_from(self.bytes.len()).expect("requests are short");
        self.bytes[..4].copy_from_slice(&len.to_ne_bytes());
        self.bytes
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|bytes| u16::from_ne_bytes(*bytes))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_built_is_read_back() {
        let mut datagram = Builder::new(30, FLAG_REQUEST, 7, 4, 2).attribute(1, b"abc\0").attribute(8, &5u32.to_ne_bytes()).finish();
        datagram.extend(Builder::new(31, 0, 8, 1, 1).attribute(6, &[1]).finish());
        let messages: Vec<_> = Message::all(&datagram).collect();
        assert_eq!(messages.len(), 2);
        assert_eq!((messages[0].kind, messages[0].sequence), (30, 7));
        let (command, version, body) = messages[0].generic().unwrap();
        assert_eq!((command, version), (4, 2));
        let found: Vec<_> = attributes(body).collect();
        assert_eq!(found, [(1, &b"abc\0"[..]), (8, &5u32.to_ne_bytes()[..])]);
        assert_eq!(text(found[0].1), "abc");
        let (_, _, body) = messages[1].generic().unwrap();
        assert_eq!(attributes(body).collect::<Vec<_>>(), [(6, &[1u8][..])]);
        assert_eq!(messages[1].error(), None);
    }

    #[test]
    fn errors_and_acknowledgements() {
        for (code, errno) in [(0i32, 0), (-22, 22), (i32::MIN, i32::MAX)] {
            let mut bytes = Builder::new(TYPE_ERROR, 0, 1, 0, 0).finish();
            bytes.truncate(HEADER);
            bytes.extend_from_slice(&code.to_ne_bytes());
            let len = bytes.len() as u32;
            bytes[..4].copy_from_slice(&len.to_ne_bytes());
            assert_eq!(Message::all(&bytes).next().unwrap().error(), Some(errno));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_end(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            for message in Message::all(&bytes) {
                message.error();
                if let Some((_, _, body)) = message.generic() {
                    for (_, payload) in attributes(body) {
                        text(payload);
                    }
                }
            }
        }
    }
}
