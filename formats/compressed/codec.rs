//! What a codec is to the layer around it: an index of units, and how to decode one.

use super::gzip::Windows;
use super::options::{Options, Report};
use super::sidecar::Encoder;
use super::source::{Source, SourceReader};
use super::units::Span;
use crate::error::{Error, Result};
use std::io::Read;
use std::path::PathBuf;

/// An opened stream's codec. Any number of threads decode at once.
pub(super) trait Codec: Send + Sync {
    /// What people call the stream's format.
    fn name(&self) -> &'static str;

    /// Decodes unit `number`, whose place is `span`, into `out`, which is empty and has room for `span.len` bytes. The caller checks the length.
    fn decode(&self, source: &Source, number: usize, span: &Span, out: &mut Vec<u8>) -> Result<()>;

    /// The unit's bytes from front to back, for units that are too large for memory.
    fn reader<'a>(&'a self, source: &'a Source, number: usize, span: &Span) -> Result<Box<dyn Read + 'a>> {
        let _ = (source, number, span);
        Err(Error::unsupported(format!("{} units cannot be read in parts", self.name())))
    }

    /// Adds what the codec knows beside the units to a stored index. `false`: its index is not worth storing.
    fn save(&self, index: &mut Encoder) -> bool {
        let _ = index;
        false
    }

    /// Windows that belong to the index.
    fn windows(&self) -> Option<&Windows> {
        None
    }
}

/// What a codec is given to index a stream.
pub(super) struct Context<'a> {
    pub(super) source: &'a Source,
    pub(super) options: &'a Options,
}

impl Context<'_> {
    /// Where files without a name are made.
    pub(super) fn scratch_dir(&self) -> PathBuf {
        self.options.scratch_dir()
    }

    /// Tells how far something is that may take long.
    pub(super) fn progress(&self, what: &'static str, total: u64) -> Report<'_> {
        Report::new(self.options, what, total)
    }

    /// Accepts what follows the last stream: zeros silently, as `gzip` and `tar` do, other bytes with a warning.
    pub(super) fn trailing_garbage(&self, name: &str, reader: &mut SourceReader<'_>) -> Result<()> {
        let at = reader.position();
        loop {
            let bytes = reader.peek(1)?;
            let (len, zeros) = (bytes.len(), bytes.iter().all(|byte| *byte == 0));
            if len == 0 {
                return Ok(());
            }
            if !zeros {
                tracing::warn!("{name}: what follows the stream's end at byte {at:#x} is not part of it and is ignored");
                return Ok(());
            }
            reader.consume(len);
        }
    }
}

/// The most decoded bytes that a unit may have to be decoded in memory.
pub(super) const IN_MEMORY: u64 = crate::format::MAX_UNIT as u64;

/// The coded bytes of a unit that is decoded in memory. No codec makes data much longer: a unit of which that is said is damaged.
pub(super) fn coded_bytes(source: &Source, span: &Span) -> Result<Vec<u8>> {
    if span.coded_len > span.len + span.len / 8 + (64 << 10) {
        return Err(Error::corrupt(format!("a block of {} compressed bytes cannot decode to {}", span.coded_len, span.len))
            .at_offset(span.coded_at));
    }
    source.range(span.coded_at, span.coded_len)
}
