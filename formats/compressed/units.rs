//! Where the independently decodable units of a stream lie, in the compressed file and in the decoded bytes.

use crate::error::{Error, Result};

/// The most units a stream may have: bounds the index's memory (about 128 MiB) against a file made to exhaust it.
pub(super) const MAX_UNITS: usize = 4 << 20;

/// One unit. A span without coded bytes reads as zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    /// First decoded byte.
    pub(super) at: u64,
    /// Decoded length in bytes.
    pub(super) len: u64,
    /// First byte in the compressed file.
    pub(super) coded_at: u64,
    /// Bytes in the compressed file.
    pub(super) coded_len: u64,
}

impl Span {
    pub(super) fn is_zero(&self) -> bool {
        self.coded_len == 0
    }

    pub(super) fn end(&self) -> u64 {
        self.at + self.len
    }
}

/// All units in order, without gaps.
#[derive(Debug, Default)]
pub(super) struct Units {
    spans: Vec<Span>,
    len: u64,
}

impl Units {
    /// Adds a unit of `len` decoded bytes after the last one. Units of no bytes are left out. Returns whether it was added.
    pub(super) fn push(&mut self, len: u64, coded_at: u64, coded_len: u64) -> Result<bool> {
        if len == 0 {
            return Ok(false);
        }
        if self.spans.len() >= MAX_UNITS {
            return Err(Error::unsupported(format!("the stream has more than {MAX_UNITS} blocks: compress it with larger ones")));
        }
        let end = self.len.checked_add(len).filter(|end| i64::try_from(*end).is_ok());
        let Some(end) = end else {
            return Err(too_long(coded_at));
        };
        self.spans.push(Span { at: self.len, len, coded_at, coded_len });
        self.len = end;
        Ok(true)
    }

    /// Adds `len` zeros, if `join` to the last unit where that is zeros too. Returns whether a unit was added.
    pub(super) fn push_zeros(&mut self, len: u64, join: bool) -> Result<bool> {
        let Some(last) = self.spans.last_mut().filter(|last| join && last.is_zero()) else { return self.push(len, 0, 0) };
        let end = self.len.checked_add(len).filter(|end| i64::try_from(*end).is_ok());
        let Some(end) = end else { return Err(too_long(0)) };
        last.len += len;
        self.len = end;
        Ok(false)
    }

    /// Makes units of zeros from `number` on ones that are asked of the codec.
    pub(super) fn unzero(&mut self, number: usize) {
        for span in self.spans.iter_mut().skip(number).filter(|span| span.is_zero()) {
            span.coded_len = 1;
        }
    }

    /// Decoded length of the whole stream.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn spans(&self) -> &[Span] {
        &self.spans
    }

    pub(super) fn get(&self, number: usize) -> Option<&Span> {
        self.spans.get(number)
    }

    /// Number and span of the unit that holds the decoded byte `at`.
    pub(super) fn find(&self, at: u64) -> Option<(usize, Span)> {
        let number = self.spans.partition_point(|span| span.end() <= at);
        self.spans.get(number).map(|span| (number, *span))
    }
}

fn too_long(coded_at: u64) -> Error {
    Error::corrupt("the sizes of the stream's blocks add up to more than 2^63 bytes").at_offset(coded_at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_units_and_refuses_overflow() {
        let mut units = Units::default();
        assert!(units.push(10, 0, 5).unwrap());
        assert!(!units.push(0, 5, 5).unwrap());
        assert!(units.push(20, 10, 5).unwrap());
        assert_eq!(units.find(0).unwrap().0, 0);
        assert_eq!(units.find(9).unwrap().0, 0);
        assert_eq!(units.find(10).unwrap(), (1, Span { at: 10, len: 20, coded_at: 10, coded_len: 5 }));
        assert!(units.find(30).is_none());
        assert!(units.push(i64::MAX as u64, 0, 1).is_err());
        assert_eq!(units.len(), 30);
    }
}
