//! A sparse set of bytes to be written: pages with a mask of which bytes are meant. Bytes that nobody put are never written.

use super::MetaWrite;
use std::collections::BTreeMap;

const PAGE: usize = 4096;
const WORDS: usize = PAGE / 64;

struct Page {
    bytes: [u8; PAGE],
    mask: [u64; WORDS],
}

impl Page {
    fn new() -> Box<Self> {
        Box::new(Self { bytes: [0; PAGE], mask: [0; WORDS] })
    }

    fn has(&self, index: usize) -> bool {
        self.mask[index / 64] >> (index % 64) & 1 == 1
    }

    fn set(&mut self, from: usize, bytes: &[u8]) {
        self.bytes[from..from + bytes.len()].copy_from_slice(bytes);
        let (mut index, end) = (from, from + bytes.len());
        while index < end {
            let word = index / 64;
            let upto = end.min((word + 1) * 64);
            let count = upto - index;
            let ones = if count == 64 { u64::MAX } else { (1 << count) - 1 };
            self.mask[word] |= ones << (index % 64);
            index = upto;
        }
    }

    /// Runs of bytes that are meant, as ranges within the page.
    fn runs(&self) -> impl Iterator<Item = std::ops::Range<usize>> + '_ {
        let mut index = 0;
        std::iter::from_fn(move || {
            while index < PAGE && !self.has(index) {
                // Whole empty words at a time.
                index = if index.is_multiple_of(64) && self.mask[index / 64] == 0 { index + 64 } else { index + 1 };
            }
            if index >= PAGE {
                return None;
            }
            let start = index;
            while index < PAGE && self.has(index) {
                index = if index.is_multiple_of(64) && self.mask[index / 64] == u64::MAX { index + 64 } else { index + 1 };
            }
            Some(start..index)
        })
    }
}

/// Pending bytes of all stores of an image.
#[derive(Default)]
pub(super) struct Pages(BTreeMap<(usize, u64), Box<Page>>);

/// Splits `[at, at + len)` at page boundaries: page number, offset in it, offset in the range, length.
fn split(at: u64, len: usize) -> impl Iterator<Item = (u64, usize, usize, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done >= len {
            return None;
        }
        let here = at + done as u64;
        let from = (here % PAGE as u64) as usize;
        let count = (PAGE - from).min(len - done);
        let piece = (here / PAGE as u64, from, done, count);
        done += count;
        Some(piece)
    })
}

impl Pages {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn memory(&self) -> usize {
        self.0.len() * size_of::<Page>()
    }

    pub(super) fn put(&mut self, store: usize, at: u64, bytes: &[u8]) {
        for (page, from, done, count) in split(at, bytes.len()) {
            self.0.entry((store, page)).or_insert_with(Page::new).set(from, &bytes[done..done + count]);
        }
    }

    /// Lays the pending bytes over `buf`, which was read at `at`.
    pub(super) fn patch(&self, store: usize, at: u64, buf: &mut [u8]) {
        if self.0.is_empty() {
            return;
        }
        for (page, from, done, count) in split(at, buf.len()) {
            let Some(page) = self.0.get(&(store, page)) else { continue };
            for run in page.runs() {
                let (start, end) = (run.start.max(from), run.end.min(from + count));
                if start < end {
                    let into = done + (start - from);
                    buf[into..into + (end - start)].copy_from_slice(&page.bytes[start..end]);
                }
            }
        }
    }

    /// Whether any byte of a range is pending.
    pub(super) fn touches(&self, store: usize, at: u64, len: usize) -> bool {
        split(at, len).any(|(page, from, _, count)| {
            self.0.get(&(store, page)).is_some_and(|p| p.runs().any(|run| run.start < from + count && from < run.end))
        })
    }

    /// Adds newer bytes on top.
    pub(super) fn overlay(&mut self, newer: Self) {
        for ((store, number), page) in newer.0 {
            for run in page.runs() {
                self.put(store, number * PAGE as u64 + run.start as u64, &page.bytes[run]);
            }
        }
    }

    /// All pending bytes as contiguous writes, in order of store and offset.
    pub(super) fn runs(&self) -> Vec<MetaWrite> {
        let mut writes: Vec<MetaWrite> = Vec::new();
        for (&(store, number), page) in &self.0 {
            for run in page.runs() {
                let at = number * PAGE as u64 + run.start as u64;
                let bytes = &page.bytes[run];
                match writes.last_mut() {
                    Some(last) if last.store == store && last.at + last.bytes.len() as u64 == at => last.bytes.extend_from_slice(bytes),
                    _ => writes.push(MetaWrite { store, at, bytes: bytes.to_vec() }),
                }
            }
        }
        writes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Against a map from offset to byte.
        #[test]
        fn agrees_with_a_map_of_bytes(puts in prop::collection::vec((0u64..20_000, prop::collection::vec(any::<u8>(), 1..300)), 1..40), split_at in 0usize..40) {
            let mut model = BTreeMap::new();
            let (mut pages, mut newer) = (Pages::default(), Pages::default());
            for (index, (at, bytes)) in puts.iter().enumerate() {
                if index < split_at { pages.put(0, *at, bytes) } else { newer.put(0, *at, bytes) }
                for (i, b) in bytes.iter().enumerate() {
                    model.insert(at + i as u64, *b);
                }
            }
            pages.overlay(newer);
            let mut flat = BTreeMap::new();
            let runs = pages.runs();
            for run in &runs {
                for (i, b) in run.bytes.iter().enumerate() {
                    prop_assert!(flat.insert(run.at + i as u64, *b).is_none());
                }
            }
            prop_assert_eq!(&flat, &model);
            prop_assert!(runs.windows(2).all(|w| w[0].at + (w[0].bytes.len() as u64) < w[1].at));
            let mut buf = vec![0xEE; 21_000];
            pages.patch(0, 0, &mut buf);
            for (i, b) in buf.iter().enumerate() {
                prop_assert_eq!(*b, model.get(&(i as u64)).copied().unwrap_or(0xEE));
            }
            let mut part = vec![0xEE; 5_000];
            pages.patch(0, 3_333, &mut part);
            prop_assert_eq!(&part[..], &buf[3_333..8_333]);
        }
    }
}
