//! Inflates a raw deflate stream (RFC 1951) and tells, to the bit, where in it the output came from: what libraries do not tell, and what restart points need.
//!
//! It owns the bit buffer and the sliding output buffer. It does not choose where restart points are made, and is not used to decode from them: that is a
//! faster library's work.

use super::super::source::SourceReader;
use super::huffman::{Symbol, Table, code_length, distance, literal_or_length};
use crate::error::{Error, Result};

/// How far back a match may reach.
pub(super) const WINDOW: usize = 32 << 10;

/// The most that one step can add beyond its limit: a stored block.
const OVERSHOOT: usize = 65_535;

/// Slack behind the output that copies may touch.
const SLACK: usize = 320;

/// Why a step ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// At the end of a block that is not the last.
    BlockEnd,
    /// In the middle of a block: the limit is reached.
    Limit,
    /// At the end of the last block.
    StreamEnd,
}

/// The block that is being read, as a restart in its middle needs it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct OpenBlock {
    /// First bit of its header, in bits from the start of the file.
    pub(super) header_at: u64,
    /// Length of its header with the code tables, in bits.
    pub(super) header_len: u32,
    /// The end-of-block code, first bit lowest, and its length in bits.
    pub(super) end_code: (u16, u8),
}

/// An inflater over one file. Output is in [`Inflater::unit`] until [`Inflater::next_unit`].
pub(super) struct Inflater<'a, 'b> {
    bits: Bits<'a, 'b>,
    literals: Table<11>,
    distances: Table<9>,
    lengths: Table<7>,
    block: Option<OpenBlock>,
    last_block: bool,
    out: Vec<u8>,
    /// Where the unit begins in `out`, and where the next byte goes.
    start: usize,
    at: usize,
    /// First byte of `out` that matches may refer to.
    oldest: usize,
}

impl<'a, 'b> Inflater<'a, 'b> {
    /// An inflater whose units have at most about `unit` bytes.
    pub(super) fn new(reader: &'b mut SourceReader<'a>, unit: usize) -> Self {
        Self {
            bits: Bits { reader, held: 0, count: 0, past_end: 0 },
            literals: Table::new(),
            distances: Table::new(),
            lengths: Table::new(),
            block: None,
            last_block: false,
            out: vec![0; WINDOW + unit + OVERSHOOT + SLACK],
            start: WINDOW,
            at: WINDOW,
            oldest: WINDOW,
        }
    }

    /// The file's reader, between streams.
    pub(super) fn reader(&mut self) -> &mut SourceReader<'a> {
        self.bits.align_reader();
        self.bits.reader
    }

    /// Begins a stream: nothing before it can be referred to. Keeps what the unit holds.
    pub(super) fn begin_stream(&mut self) {
        self.oldest = self.at;
        self.block = None;
        self.last_block = false;
    }

    /// Where the next bit is, in bits from the start of the file.
    pub(super) fn bit_position(&self) -> u64 {
        self.bits.position()
    }

    /// The block that is being read, if in the middle of one.
    pub(super) fn open_block(&self) -> Option<OpenBlock> {
        self.block
    }

    /// The bytes since the last [`Inflater::next_unit`].
    pub(super) fn unit(&self) -> &[u8] {
        self.out.get(self.start..self.at).unwrap_or_default()
    }

    /// The bytes that what follows may refer to.
    pub(super) fn window(&self) -> &[u8] {
        self.out.get(self.oldest.max(self.at.saturating_sub(WINDOW))..self.at).unwrap_or_default()
    }

    /// Forgets the unit's bytes but for the window.
    pub(super) fn next_unit(&mut self) {
        let from = self.at.saturating_sub(WINDOW);
        self.out.copy_within(from..self.at, 0);
        self.oldest = self.oldest.saturating_sub(from);
        self.at -= from;
        self.start = self.at;
    }

    /// Decodes until the unit has `limit` bytes (at most the length given to `new`), or a block ends.
    pub(super) fn step(&mut self, limit: usize) -> Result<Step> {
        if self.block.is_none() {
            let header_at = self.bit_position();
            let begun = self.begin_block(header_at).map_err(|error| error.at_offset(header_at / 8))?;
            if !begun {
                return Ok(self.end_block());
            }
        }
        let until = self.start.saturating_add(limit).min(self.out.len() - OVERSHOOT - SLACK);
        let ended = self.codes(until).map_err(|error| error.at_offset(self.bit_position() / 8))?;
        Ok(if ended { self.end_block() } else { Step::Limit })
    }

    fn end_block(&mut self) -> Step {
        self.block = None;
        if self.last_block { Step::StreamEnd } else { Step::BlockEnd }
    }

    /// Reads a block's header. A stored block is read whole: false.
    fn begin_block(&mut self, header_at: u64) -> Result<bool> {
        self.last_block = self.bits.take(1)? == 1;
        match self.bits.take(2)? {
            0 => {
                self.stored()?;
                return Ok(false);
            }
            1 => {
                let mut lens = [8_u8; 288];
                lens.iter_mut().take(256).skip(144).for_each(|len| *len = 9);
                lens.iter_mut().take(280).skip(256).for_each(|len| *len = 7);
                self.literals.build(&lens, literal_or_length);
                self.distances.build(&[5; 32], distance);
                self.open(header_at, &lens);
            }
            2 => {
                let (lens, literals) = self.code_lengths()?;
                let (literal_lens, distance_lens) = lens.split_at_checked(literals).unwrap_or_default();
                if literal_lens.get(256).is_none_or(|len| *len == 0) || !self.literals.build(literal_lens, literal_or_length) {
                    return Err(damaged("a block's literal code is invalid"));
                }
                if !self.distances.build(distance_lens, distance) {
                    return Err(damaged("a block's distance code is invalid"));
                }
                self.open(header_at, literal_lens);
            }
            _ => return Err(damaged("a block is of no known type")),
        }
        Ok(true)
    }

    /// Notes where the block's header ends, and the end-of-block code of the literal code with lengths `lens`.
    fn open(&mut self, header_at: u64, lens: &[u8]) {
        let header_len = (self.bit_position() - header_at) as u32;
        let end_len = lens.get(256).copied().unwrap_or(0);
        // The canonical code (RFC 1951, 3.2.2): after all shorter codes and those of its length with a smaller symbol.
        let mut code = 0_u32;
        for len in 1..=end_len {
            code <<= 1;
            let mut count = |same: &[u8]| code += same.iter().filter(|other| **other == len).count() as u32;
            if len < end_len { count(lens) } else { count(lens.get(..256).unwrap_or_default()) }
        }
        let reversed = if end_len == 0 { 0 } else { code.reverse_bits() >> (32 - u32::from(end_len)) };
        self.block = Some(OpenBlock { header_at, header_len, end_code: (reversed as u16, end_len) });
    }

    /// The code lengths of a dynamic block, and how many of them are of the literal code.
    fn code_lengths(&mut self) -> Result<(Vec<u8>, usize)> {
        const ORDER: [usize; 19] = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];
        let literals = self.bits.take(5)? as usize + 257;
        let distances = self.bits.take(5)? as usize + 1;
        let given = self.bits.take(4)? as usize + 4;
        if literals > 286 || distances > 30 {
            return Err(damaged("a block has too many codes"));
        }
        let mut lens = [0_u8; 19];
        for symbol in ORDER.iter().take(given) {
            lens[*symbol] = self.bits.take(3)? as u8;
        }
        if !self.lengths.build(&lens, code_length) {
            return Err(damaged("a block's code of code lengths is invalid"));
        }
        let mut lens: Vec<u8> = Vec::with_capacity(literals + distances);
        while lens.len() < literals + distances {
            self.bits.refill()?;
            let entry = self.lengths.find(self.bits.held);
            let Symbol::Literal(symbol) = entry.symbol() else { return Err(damaged("a code length has no valid code")) };
            self.bits.drop(entry.code_len());
            let (len, times) = match symbol {
                16 => (lens.last().copied().ok_or_else(|| damaged("the first code length repeats one before it"))?, self.bits.take(2)? + 3),
                17 => (0, self.bits.take(3)? + 3),
                18 => (0, self.bits.take(7)? + 11),
                len => (len, 1),
            };
            lens.extend(std::iter::repeat_n(len, times as usize));
            self.bits.check()?;
        }
        if lens.len() > literals + distances {
            return Err(damaged("a block's code lengths are too many"));
        }
        Ok((lens, literals))
    }

    fn stored(&mut self) -> Result<()> {
        self.bits.drop(self.bits.count % 8);
        let (len, check) = (self.bits.take(16)?, self.bits.take(16)?);
        if len ^ check != 0xffff {
            return Err(damaged("a stored block's length is damaged"));
        }
        let mut left = len as usize;
        self.bits.align_reader();
        while left > 0 {
            let have = self.bits.reader.peek(1)?;
            let part = have.len().min(left);
            let (Some(from), Some(to)) = (have.get(..part).filter(|from| !from.is_empty()), self.out.get_mut(self.at..self.at + part))
            else {
                return Err(truncated());
            };
            to.copy_from_slice(from);
            self.bits.reader.consume(part);
            self.at += part;
            left -= part;
        }
        Ok(())
    }

    /// Decodes until `self.at >= until`, or the block ends: true.
    fn codes(&mut self, until: usize) -> Result<bool> {
        while self.at < until {
            self.bits.refill()?;
            // 56 bits are at hand: enough for two literals (30), or a length with extra bits (20) and a distance with its own (28).
            let mut entry = self.literals.find(self.bits.held);
            if entry.is_literal() {
                self.bits.drop(entry.code_len());
                self.out[self.at] = entry.literal();
                self.at += 1;
                entry = self.literals.find(self.bits.held);
                if entry.is_literal() {
                    self.bits.drop(entry.code_len());
                    self.out[self.at] = entry.literal();
                    self.at += 1;
                    self.bits.check()?;
                    continue;
                }
                self.bits.check()?;
                self.bits.refill()?;
            }
            self.bits.drop(entry.code_len());
            match entry.symbol() {
                Symbol::Run { base, extra } => {
                    let len = usize::from(base) + self.bits.take_held(extra);
                    let entry = self.distances.find(self.bits.held);
                    self.bits.drop(entry.code_len());
                    let Symbol::Run { base, extra } = entry.symbol() else { return Err(damaged("a distance has no valid code")) };
                    let back = usize::from(base) + self.bits.take_held(extra);
                    self.bits.check()?;
                    if back > self.at - self.oldest {
                        return Err(damaged("a match reaches back too far"));
                    }
                    copy_match(&mut self.out, self.at, back, len);
                    self.at += len;
                }
                Symbol::End => {
                    self.bits.check()?;
                    return Ok(true);
                }
                Symbol::Literal(_) | Symbol::Invalid => return Err(damaged("a literal or length has no valid code")),
            }
        }
        Ok(false)
    }
}

/// Copies `len` bytes from `back` before `at` to `at`; may write up to 16 bytes more.
#[inline]
fn copy_match(out: &mut [u8], at: usize, back: usize, len: usize) {
    if back == 1 {
        let byte = out[at - 1];
        out[at..at + len].fill(byte);
    } else if back >= 16 {
        let mut done = 0;
        while done < len {
            let from = at - back + done;
            out.copy_within(from..from + 16, at + done);
            done += 16;
        }
    } else {
        for done in 0..len {
            out[at + done] = out[at + done - back];
        }
    }
}

fn damaged(what: &str) -> Error {
    Error::corrupt(format!("the compressed stream is damaged: {what}"))
}

fn truncated() -> Error {
    Error::corrupt("the compressed stream is cut short: the file ends in the middle of a block")
}

/// The bit buffer.
struct Bits<'a, 'b> {
    reader: &'b mut SourceReader<'a>,
    held: u64,
    count: u32,
    /// Bytes of zeros that were put in after the end of the file.
    past_end: u32,
}

impl Bits<'_, '_> {
    /// Makes at least 56 bits available; after the end of the file they are zeros, which [`Bits::check`] notices when they are used.
    #[inline]
    fn refill(&mut self) -> Result<()> {
        if self.count >= 48 {
            return Ok(());
        }
        match self.reader.peek_word() {
            Some(word) => {
                self.held |= word << self.count;
                let bytes = (63 - self.count) / 8;
                self.reader.consume(bytes as usize);
                self.count += bytes * 8;
                Ok(())
            }
            None => self.refill_slowly(),
        }
    }

    #[cold]
    fn refill_slowly(&mut self) -> Result<()> {
        while self.count <= 56 {
            match self.reader.peek(8)?.first().copied() {
                Some(byte) => {
                    self.held |= u64::from(byte) << self.count;
                    self.reader.consume(1);
                }
                None => self.past_end += 1,
            }
            self.count += 8;
        }
        self.check()
    }

    #[inline]
    fn drop(&mut self, count: u32) {
        self.held >>= count;
        self.count = self.count.wrapping_sub(count);
    }

    /// Bits that are known to be held.
    #[inline]
    fn take_held(&mut self, count: u8) -> usize {
        let bits = self.held & ((1 << count) - 1);
        self.drop(u32::from(count));
        bits as usize
    }

    fn take(&mut self, count: u8) -> Result<u32> {
        self.refill()?;
        let bits = self.take_held(count) as u32;
        self.check()?;
        Ok(bits)
    }

    /// Whether bits were used that the file does not have.
    #[inline]
    fn check(&self) -> Result<()> {
        if self.past_end > 0 && self.count < self.past_end * 8 { Err(truncated()) } else { Ok(()) }
    }

    fn position(&self) -> u64 {
        (self.reader.position() + u64::from(self.past_end)) * 8 - u64::from(self.count)
    }

    /// Gives whole bytes back to the reader and drops the rest of a byte.
    fn align_reader(&mut self) {
        let whole = (self.count / 8).saturating_sub(self.past_end);
        let at = self.reader.position() - u64::from(whole);
        self.reader.seek(at);
        (self.held, self.count, self.past_end) = (0, 0, 0);
    }
}
