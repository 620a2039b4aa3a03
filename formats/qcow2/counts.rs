//! References to host clusters, counted: a sparse array that takes memory where something is counted.

use std::collections::{BTreeMap, HashMap};

const CHUNK: u64 = 4096;
/// A count of this much or more is in the overflow map.
const LARGE: u8 = u8::MAX;

/// Counts by cluster index.
#[derive(Clone, Debug, Default)]
pub(super) struct Counts {
    chunks: BTreeMap<u64, Box<[u8; CHUNK as usize]>>,
    large: HashMap<u64, u64>,
}

impl Counts {
    /// Counts `more` references to a cluster.
    pub fn add(&mut self, cluster: u64, more: u64) {
        if more == 0 {
            return;
        }
        let chunk = self.chunks.entry(cluster / CHUNK).or_insert_with(|| Box::new([0; CHUNK as usize]));
        let small = &mut chunk[(cluster % CHUNK) as usize];
        let total = if *small == LARGE { self.large.get(&cluster).copied().unwrap_or(0) } else { u64::from(*small) }.saturating_add(more);
        match u8::try_from(total) {
            Ok(total) if total < LARGE => *small = total,
            _ => {
                *small = LARGE;
                self.large.insert(cluster, total);
            }
        }
    }

    /// References to a cluster.
    pub fn get(&self, cluster: u64) -> u64 {
        match self.chunks.get(&(cluster / CHUNK)).map_or(0, |c| c[(cluster % CHUNK) as usize]) {
            LARGE => self.large.get(&cluster).copied().unwrap_or(0),
            small => u64::from(small),
        }
    }

    /// Clusters with references, in order, with their counts.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let all = self.chunks.iter().flat_map(|(chunk, counts)| (chunk * CHUNK..).zip(counts.iter()));
        all.filter(|(_, count)| **count != 0).map(|(cluster, count)| match *count {
            LARGE => (cluster, self.large.get(&cluster).copied().unwrap_or(0)),
            small => (cluster, u64::from(small)),
        })
    }

    /// The last cluster with references.
    pub fn last(&self) -> Option<u64> {
        let (chunk, counts) = self.chunks.iter().rev().find(|(_, counts)| counts.iter().any(|c| *c != 0))?;
        let at = counts.iter().rposition(|c| *c != 0)?;
        Some(chunk * CHUNK + at as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_and_large() {
        let mut counts = Counts::default();
        counts.add(5, 1);
        counts.add(5, 253);
        counts.add(1 << 40, 1);
        assert_eq!((counts.get(5), counts.get(6), counts.last()), (254, 0, Some(1 << 40)));
        counts.add(5, 1);
        counts.add(5, 70_000);
        assert_eq!(counts.iter().collect::<Vec<_>>(), [(5, 70_255), (1 << 40, 1)]);
    }
}
