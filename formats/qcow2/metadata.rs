//! Which host clusters hold metadata: asked before anything is written to a cluster, so that a damaged image is not made worse.
//!
//! Knows the header, the tables of the active state, the refcount structures, the lists of snapshots and bitmaps and the snapshots' L1 tables. The
//! snapshots' L2 tables are protected by their refcounts alone, as in QEMU.

use parking_lot::RwLock;
use std::collections::{HashMap, HashSet};

/// What a cluster of metadata holds, for messages.
pub(super) type What = &'static str;
/// The directory of persistent bitmaps.
pub(super) const BITMAP_LIST: What = "list of bitmaps";

#[derive(Debug, Default)]
struct Inner {
    /// Runs of bytes in order, that do not touch each other.
    runs: Vec<(u64, u64, What)>,
    /// Single clusters by offset.
    tables: HashMap<u64, What>,
    /// Clusters that hold two tables at once: a sign of damage.
    doubled: HashSet<u64>,
}

impl Inner {
    fn run_at(&self, at: u64) -> Option<What> {
        let after = self.runs.partition_point(|(start, ..)| *start <= at);
        let (_, end, what) = self.runs.get(after.checked_sub(1)?)?;
        (at < *end).then_some(*what)
    }
}

/// The places of metadata in an image that is open for writing.
#[derive(Debug, Default)]
pub(super) struct Metadata(RwLock<Inner>);

impl Metadata {
    /// Adds a run of whole clusters. `Some`: it overlaps what is known already.
    pub fn add_run(&self, at: u64, len: u64, what: What) -> Option<What> {
        if len == 0 {
            return None;
        }
        let mut inner = self.0.write();
        let mut end = at.saturating_add(len);
        let first = inner.runs.partition_point(|(_, e, _)| *e <= at);
        let last = inner.runs.partition_point(|(s, ..)| *s < end);
        let overlapped: Vec<_> = inner.runs.drain(first..last.max(first)).collect();
        let start = overlapped.first().map_or(at, |(s, ..)| at.min(*s));
        end = overlapped.last().map_or(end, |(_, e, _)| end.max(*e));
        let name = overlapped.first().map_or(what, |(.., w)| *w);
        inner.runs.insert(first, (start, end, name));
        overlapped.first().map(|(.., w)| *w)
    }

    /// Forgets everything.
    pub fn clear(&self) {
        *self.0.write() = Inner::default();
    }

    /// Forgets a run that was added and overlapped nothing.
    pub fn remove_run(&self, at: u64) {
        self.0.write().runs.retain(|(start, ..)| *start != at);
    }

    /// Adds a table of one cluster; remembers it as damage if something is there already.
    pub fn add_table(&self, at: u64, what: What) {
        let mut inner = self.0.write();
        let taken = inner.run_at(at).is_some();
        if inner.tables.insert(at, what).is_some() || taken {
            inner.doubled.insert(at);
        }
    }

    /// The cluster holds no table any more.
    pub fn remove_table(&self, at: u64) {
        self.0.write().tables.remove(&at);
    }

    /// What the cluster at `at` holds, if it is metadata.
    pub fn what(&self, at: u64) -> Option<What> {
        let inner = self.0.read();
        inner.run_at(at).or_else(|| inner.tables.get(&at).copied())
    }

    /// Whether the table at `at` shares its cluster with other metadata.
    pub fn is_doubled(&self, at: u64) -> bool {
        self.0.read().doubled.contains(&at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_merge_and_tell() {
        let places = Metadata::default();
        assert_eq!(places.add_run(0, 512, "header"), None);
        assert_eq!(places.add_run(4096, 1024, "L1 table"), None);
        assert_eq!(places.add_run(512, 512, "refcount table"), None);
        assert_eq!(places.add_run(4608, 4096, "snapshot table"), Some("L1 table"));
        assert_eq!(places.add_run(0, 1, "L1 table"), Some("header"));
        for (at, what) in [
            (0, Some("header")),
            (512, Some("refcount table")),
            (1024, None),
            (4096, Some("L1 table")),
            (8192, Some("L1 table")),
            (8704, None),
        ] {
            assert_eq!(places.what(at), what, "{at}");
        }
    }

    #[test]
    fn two_tables_in_one_cluster() {
        let places = Metadata::default();
        places.add_run(0, 512, "header");
        places.add_table(1024, "L2 table");
        places.add_table(2048, "L2 table");
        places.add_table(2048, "refcount block");
        places.add_table(0, "L2 table");
        assert!(places.is_doubled(2048) && places.is_doubled(0) && !places.is_doubled(1024));
        places.remove_table(1024);
        assert_eq!((places.what(1024), places.what(2048)), (None, Some("refcount block")));
    }
}
