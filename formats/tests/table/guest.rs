//! What the guest wrote: sectors that say who wrote them, and the history of every sector, from which follows what it may read back after a cut.

use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};

/// Bytes of a sector.
pub const SECTOR: usize = 512;

/// Content for a new image: runs of zeros, of text and of random bytes, the same for the same size.
pub fn initial(size: u64) -> Vec<u8> {
    let mut rng = StdRng::seed_from_u64(size);
    let mut bytes = vec![0; usize::try_from(size).unwrap()];
    let mut at = 0;
    while at < bytes.len() {
        let run = (rng.random_range(1..40) * 4096).min(bytes.len() - at);
        let part = &mut bytes[at..at + run];
        match rng.random_range(0..3) {
            0 => {}
            1 => rng.fill_bytes(part),
            _ => part.iter_mut().enumerate().for_each(|(i, b)| *b = b"the quick brown fox jumps over the lazy dog\n"[(at + i / 7) % 44]),
        }
        at += run;
    }
    bytes
}

/// Who wrote a sector: 0 the image's maker, [`ZEROED`] a zero or a discard, otherwise the number of an operation.
pub type Writer = u32;

/// The writer of zeros.
pub const ZEROED: Writer = u32::MAX;

const MAGIC: u64 = 0x5ec7_0a11_0000_0000;

/// The content that operation `writer` gives to `sector`: says both in every 16 bytes, and nothing else writes such bytes.
pub fn pattern(writer: Writer, sector: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    if writer == ZEROED {
        return bytes;
    }
    for (i, chunk) in bytes.chunks_exact_mut(16).enumerate() {
        chunk[..8].copy_from_slice(&(MAGIC | u64::from(writer)).to_le_bytes());
        chunk[8..].copy_from_slice(&(sector << 8 | i as u64).to_le_bytes());
    }
    bytes
}

/// The patterns of `writer` for `[first, first + count)`.
pub fn patterns(writer: Writer, first: u64, count: u64) -> Vec<u8> {
    (first..first + count).flat_map(|s| pattern(writer, s)).collect()
}

/// Who wrote what is in `bytes`, which were read as `sector`; `None`: no one operation (torn, foreign, or the maker's).
pub fn writer_of(bytes: &[u8], sector: u64) -> Option<Writer> {
    let word = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    if word & 0xffff_ffff_0000_0000 == MAGIC {
        let writer = word as u32;
        return (bytes == pattern(writer, sector)).then_some(writer);
    }
    (bytes == [0; SECTOR]).then_some(ZEROED)
}

/// A change of one sector: who made it, and where in the journal it began and was acknowledged.
#[derive(Clone, Copy, Debug)]
pub struct Change {
    pub writer: Writer,
    pub began: usize,
    /// `usize::MAX`: not acknowledged.
    pub acknowledged: usize,
}

/// The changes of every sector, each sector's in order, and the flushes.
pub struct History {
    /// The guest's bytes before the first operation.
    pub content: Vec<u8>,
    pub sectors: Vec<Vec<Change>>,
    /// Where flushes that succeeded began and ended.
    pub flushes: Vec<(usize, usize)>,
}

impl History {
    pub fn new(content: Vec<u8>) -> Self {
        let sectors = vec![Vec::new(); content.len() / SECTOR];
        Self { content, sectors, flushes: Vec::new() }
    }

    /// Compares what is read after a power cut at `position` with what is allowed: the state at the last flush that had ended, or any later change.
    pub fn allowed_after_cut(&self, bytes: &[u8], position: usize) -> Result<(), String> {
        let safe = self.flushes.iter().filter(|(_, end)| *end <= position).map(|(began, _)| *began).max().unwrap_or(0);
        self.allowed(bytes, safe, position)
    }

    /// Compares what is read after the death of the process at `position`: all that was acknowledged is there, what was under way may be.
    pub fn allowed_after_death(&self, bytes: &[u8], position: usize) -> Result<(), String> {
        self.allowed(bytes, position, position)
    }

    fn allowed(&self, bytes: &[u8], safe: usize, position: usize) -> Result<(), String> {
        if bytes.len() != self.content.len() {
            return Err(format!("the device has {} bytes instead of {}", bytes.len(), self.content.len()));
        }
        let differs = |from: usize, to: usize| bytes[from * SECTOR..to * SECTOR] != self.content[from * SECTOR..to * SECTOR];
        let mut untouched = 0;
        for (sector, changes) in self.sectors.iter().enumerate().filter(|(_, changes)| !changes.is_empty()) {
            if differs(untouched, sector) {
                break;
            }
            untouched = sector + 1;
            let read = &bytes[sector * SECTOR..(sector + 1) * SECTOR];
            let known = changes.iter().take_while(|c| c.began < position).count();
            let oldest = changes[..known].iter().rposition(|c| c.acknowledged <= safe);
            let candidates = &changes[oldest.unwrap_or(0)..known];
            let wrote = writer_of(read, sector as u64);
            let fits = candidates.iter().any(|c| Some(c.writer) == wrote) || (oldest.is_none() && !differs(sector, sector + 1));
            if !fits {
                return Err(format!(
                    "sector {sector} holds {}; allowed: {}{candidates:?} (safe up to {safe}, cut at {position}; all changes: {changes:?})",
                    describe(read, sector),
                    if oldest.is_none() { "the first content, " } else { "" },
                ));
            }
        }
        // Nobody wrote to what is between those sectors, or behind them.
        let end = self.sectors.len();
        let next = (untouched..end).find(|s| !self.sectors[*s].is_empty()).unwrap_or(end);
        match (untouched..next).find(|sector| differs(*sector, sector + 1)) {
            Some(sector) => {
                Err(format!("sector {sector}, to which nobody wrote, holds {}", describe(&bytes[sector * SECTOR..][..SECTOR], sector)))
            }
            None => Ok(()),
        }
    }
}

/// A sector for a message.
fn describe(bytes: &[u8], sector: usize) -> String {
    match writer_of(bytes, sector as u64) {
        Some(ZEROED) => "zeros".into(),
        Some(writer) => format!("the data of operation {writer}"),
        None => {
            let words: Vec<String> = bytes.chunks_exact(16).take(3).map(|c| format!("{:02x?}", c)).collect();
            format!("something else ({}…)", words.join(" "))
        }
    }
}
