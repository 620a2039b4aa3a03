//! Compressed streams as a read-only layer under any format: `disk.qcow2.xz`, `disk.raw.gz`, `disk.vmdk.zst`.
//!
//! [`open`] recognises a stream by its first bytes and gives its decoded bytes as a [`Store`], on which any format can be opened. Nothing is decoded but what is read, wherever
//! the stream allows that:
//!
//! | stream | units that decode alone | how they are found |
//! |---|---|---|
//! | gzip | about 1 MiB, by restart points | one pass over the stream; the index is kept |
//! | bgzf | its blocks | `.gzi` file, or a walk over the blocks' headers |
//! | xz | its blocks | the index at the stream's end |
//! | zstd | its frames | seek table, or a walk over frames and blocks |
//! | bzip2 | its blocks | one pass over the stream; the index is kept |
//! | lz4 | its blocks if independent, otherwise frames | a walk over blocks and their tokens; the index is kept |
//! | lzip | its members | their trailers, from the end |
//!
//! A unit that is too large for memory (a single-block xz, a single-frame zstd) is decoded once into a scratch file of bounded size. Decoded units of all streams share the cache
//! ([`crate::cache`]). A damaged unit is an error for those who read it, and for nobody else, where the codec can tell.
//!
//! This layer knows nothing of disk formats, and never writes to the compressed file.

mod bgzf;
mod bits;
mod bzip2;
mod codec;
mod gzip;
mod lz4;
mod lzip;
mod options;
pub(crate) mod scratch;
mod sidecar;
mod source;
mod stream;
mod units;
mod workers;
mod xz;
mod zstd;

pub use options::{Options, Progress, log_lines, terminal_bar};

use crate::cache::Cache;
use crate::error::{Error, Kind, Result};
use crate::store::Store;
use codec::{Codec, Context, IN_MEMORY};
use scratch::Scratch;
use sidecar::{Decoder, Sidecar, Stored};
use source::Source;
use std::sync::Arc;
use std::time::{Duration, Instant};
use stream::Stream;
use units::{Span, Units};

/// Units longer than this are decoded when the stream is opened: a reader in the middle of a guest's command could not wait for them.
const EAGER: u64 = 512 << 20;
/// Indexes that took less time to make are not kept.
const WORTH_STORING: Duration = Duration::from_millis(100);
/// Decoded units of a stream that fit in memory take at most this much of a scratch file, and a quarter of what is free.
const KEPT: u64 = 4 << 30;

/// The streams that [`open`] knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamKind {
    /// gzip, RFC 1952; bgzf too.
    Gzip,
    /// xz.
    Xz,
    /// Zstandard, RFC 8878.
    Zstd,
    /// bzip2.
    Bzip2,
    /// The LZ4 frame format.
    Lz4,
    /// The format of the Linux kernel's `lz4 -l`, which is recognised to be refused.
    Lz4Legacy,
    /// lzip.
    Lzip,
}

impl StreamKind {
    const ALL: [Self; 7] = [Self::Gzip, Self::Xz, Self::Zstd, Self::Bzip2, Self::Lz4, Self::Lz4Legacy, Self::Lzip];

    /// What people call it; also the first part of a format's name such as `xz+qcow2`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
            Self::Bzip2 => "bzip2",
            Self::Lz4 => "lz4",
            Self::Lz4Legacy => "lz4-legacy",
            Self::Lzip => "lzip",
        }
    }

    /// The stream of that name.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// What `store` is, if it is a compressed stream: its header alone is looked at.
///
/// # Errors
/// The host's; `Unsupported` for a stream that is known and cannot be opened.
pub fn kind(store: Arc<dyn Store>) -> Result<Option<StreamKind>> {
    match recognise_through(&Source::new(store)?)? {
        Some(StreamKind::Lz4Legacy) => Err(legacy_lz4()),
        kind => Ok(kind),
    }
}

fn legacy_lz4() -> Error {
    Error::unsupported("a legacy lz4 stream (lz4 -l) has no sizes or checksums and is not supported: recompress it with `lz4 -d | lz4 -BI`")
}

/// What a file that begins with `first` (16 bytes or more, unless it is shorter) is, if it is a compressed stream. Skippable frames, with which zstd and lz4 streams may begin, are not seen
/// through here, but by [`open`].
pub fn recognise(first: &[u8]) -> Option<StreamKind> {
    match first {
        [0xfd, b'7', b'z', b'X', b'Z', 0, 0, 0..=15, ..] => Some(StreamKind::Xz),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(StreamKind::Zstd),
        [b'B', b'Z', b'h', b'1'..=b'9', 0x31, 0x41, 0x59, 0x26, 0x53, 0x59, ..] => Some(StreamKind::Bzip2),
        [b'B', b'Z', b'h', b'1'..=b'9', 0x17, 0x72, 0x45, 0x38, 0x50, 0x90, ..] => Some(StreamKind::Bzip2),
        [0x04, 0x22, 0x4d, 0x18, 0x40..=0x7f, ..] => Some(StreamKind::Lz4),
        [0x02, 0x21, 0x4c, 0x18, ..] => Some(StreamKind::Lz4Legacy),
        [b'L', b'Z', b'I', b'P', 1, ..] => Some(StreamKind::Lzip),
        _ if gzip::header::is_gzip(first) => Some(StreamKind::Gzip),
        _ => None,
    }
}

/// Opens `store` as a compressed stream: a store of the decoded bytes. `None`: it is not one.
///
/// Where the stream has no index this reads all of it (see [`Options::progress`]), unless an earlier call kept one; where it has no independent parts this decodes all of it to a scratch file.
///
/// # Errors
/// [`Kind::Corrupt`]: cut short, or damaged so that not even its length is known. [`Kind::Unsupported`]: needs a dictionary, or more memory than [`Options::memory_limit`].
/// [`Kind::NoSpace`]: needs more scratch space than there is or [`Options::scratch_limit`] allows.
pub fn open(store: Arc<dyn Store>, options: &Options, cache: &Arc<Cache>) -> Result<Option<Arc<dyn Store>>> {
    let path = store.path().map(ToOwned::to_owned);
    open_stream(store, options, cache).map_err(|error| match &path {
        Some(path) => error.at_path(path),
        None => error,
    })
}

fn open_stream(store: Arc<dyn Store>, options: &Options, cache: &Arc<Cache>) -> Result<Option<Arc<dyn Store>>> {
    let source = Source::new(store)?;
    let Some(kind) = recognise_through(&source)? else { return Ok(None) };
    let context = Context { source: &source, options };
    let sidecar = Sidecar::locate(&source, options)?;
    let (units, codec): (Units, Box<dyn Codec>) = match kind {
        StreamKind::Gzip => match bgzf::index(&context)? {
            Some((units, codec)) => (units, Box::new(codec)),
            None => indexed(sidecar, &context, "gzip", gzip::index, gzip::restore)?,
        },
        StreamKind::Xz => boxed(xz::index(&context)?),
        StreamKind::Zstd => indexed(sidecar, &context, "zstd", zstd::index, zstd::restore)?,
        StreamKind::Bzip2 => indexed(sidecar, &context, "bzip2", bzip2::index, bzip2::restore)?,
        StreamKind::Lz4 => indexed(sidecar, &context, "lz4", lz4::index, lz4::restore)?,
        StreamKind::Lz4Legacy => return Err(legacy_lz4()),
        StreamKind::Lzip => boxed(lzip::index(&context)?),
    };
    finish(source, units, codec, options, cache).map(Some)
}

fn boxed<C: Codec + 'static>((units, codec): (Units, C)) -> (Units, Box<dyn Codec>) {
    (units, Box::new(codec))
}

/// [`recognise`], behind skippable frames.
fn recognise_through(source: &Source) -> Result<Option<StreamKind>> {
    let mut reader = source.reader(0, source.len());
    for _ in 0..1 << 16 {
        let at = reader.position();
        match *reader.peek(16)? {
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, a, b, c, d, ..] => reader.seek(at + 8 + u64::from(u32::from_le_bytes([a, b, c, d]))),
            ref first => return Ok(recognise(first)),
        }
    }
    Ok(None)
}

type Restore<C> = fn(&Source, &Units, &mut Decoder<'_>, Stored) -> Option<C>;

/// The stored index if there is one, or a new one, which is stored.
fn indexed<C: Codec + 'static>(
    sidecar: Option<Sidecar>,
    context: &Context<'_>,
    name: &str,
    index: fn(&Context<'_>) -> Result<(Units, C)>,
    restore: Restore<C>,
) -> Result<(Units, Box<dyn Codec>)> {
    let load = |sidecar: &Sidecar| {
        let (units, body, stored) = sidecar.load(name)?;
        let codec = restore(context.source, &units, &mut Decoder::new(&body), stored)?;
        Some(boxed((units, codec)))
    };
    if let Some(found) = sidecar.as_ref().and_then(load) {
        return Ok(found);
    }
    let started = Instant::now();
    let (units, codec) = index(context)?;
    match &sidecar {
        Some(sidecar) if started.elapsed() >= WORTH_STORING || context.options.cache_dir.is_some() => {
            sidecar.save(&units, &codec);
            // The windows are then read from there, and need no memory.
            Ok(load(sidecar).unwrap_or_else(|| boxed((units, codec))))
        }
        _ => Ok(boxed((units, codec))),
    }
}

/// Provides the scratch file, and decodes to it what must be.
fn finish(source: Source, units: Units, codec: Box<dyn Codec>, options: &Options, cache: &Arc<Cache>) -> Result<Arc<dyn Store>> {
    let in_memory = options.in_memory.min(IN_MEMORY);
    let largest = units.spans().iter().filter(|span| !span.is_zero()).map(|span| span.len).max().unwrap_or(0);
    let eager: Vec<(usize, Span)> =
        units.spans().iter().copied().enumerate().filter(|(_, span)| span.len > EAGER && !span.is_zero()).collect();
    let single = units.spans().len() == 1 && largest > in_memory;
    let eager = if single { units.spans().iter().copied().enumerate().collect() } else { eager };
    let scratch = scratch_file(&units, largest, eager.iter().map(|(_, span)| span.len).sum(), codec.name(), options)?;
    let total = eager.iter().map(|(_, span)| span.len).sum();
    let stream = Stream::new(source, units, codec, Arc::clone(cache), scratch, in_memory);
    if !eager.is_empty() {
        tracing::warn!("this stream cannot be decoded in parts and is decoded to a scratch file first: {}", hint(stream.name()));
        let mut report = options::Report::new(options, "decoding the stream to a scratch file", total);
        let mut before = 0;
        for (number, span) in eager {
            stream.prefill(number, |done| report.update(before + done))?;
            before += span.len;
        }
    }
    Ok(Arc::new(stream))
}

fn scratch_file(units: &Units, largest: u64, eager: u64, name: &str, options: &Options) -> Result<Option<Scratch>> {
    let dir = options.scratch_dir();
    let needed = largest > options.in_memory.min(IN_MEMORY);
    if !needed && largest < stream::WORTH_KEEPING {
        return Ok(None);
    }
    let room = match (options.scratch_limit, scratch::room(&dir)) {
        (Some(limit), Ok(room)) => limit.min(room),
        (None, Ok(room)) => room,
        (_, Err(error)) if needed => return Err(error),
        (_, Err(_)) => return Ok(None),
    };
    if !needed {
        let limit = units.len().min(KEPT).min(room / 4);
        return Ok(Scratch::new(&dir, limit).ok());
    }
    let least = eager.max(largest);
    if least > room {
        return Err(Error::new(
            Kind::NoSpace,
            format!(
                "this {name} stream cannot be decoded in parts small enough for memory, and a scratch file for it would need {} MiB of the {} MiB that it may have in {}: allow it more, or {}",
                least.div_ceil(1 << 20),
                room >> 20,
                dir.display(),
                hint(name)
            ),
        ));
    }
    Scratch::new(&dir, units.len().min(room)).map(Some)
}

/// How to compress so that parts can be read.
fn hint(codec: &str) -> &'static str {
    match codec {
        "xz" => "compress with `xz -T0 --block-size=4MiB` to be able to read parts of it",
        "zstd" => "compress with `pzstd`, or in the seekable format, to be able to read parts of it",
        "lz4" => "compress with `lz4 -BI` to be able to read parts of it",
        "lzip" => "compress with `plzip` to be able to read parts of it",
        _ => "compress it in blocks to be able to read parts of it",
    }
}
