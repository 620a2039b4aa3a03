//! The data area's blocks: which are free.

use std::collections::BTreeSet;

/// Hands out the lowest free blocks, as the kernel does.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    free: BTreeSet<usize>,
}

impl Blocks {
    pub fn new(count: usize) -> Self {
        Self { free: (0..count).collect() }
    }

    /// Takes `count` blocks; none if there are not so many.
    pub fn take(&mut self, count: usize) -> Option<Vec<usize>> {
        if self.free.len() < count {
            return None;
        }
        Some((0..count).filter_map(|_| self.free.pop_first()).collect())
    }

    pub fn release(&mut self, blocks: &[usize]) {
        self.free.extend(blocks);
    }
}
