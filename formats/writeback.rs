//! The ordered write-back buffer: every change of metadata of every format passes through here.
//!
//! A format says what depends on what; this says when to sync. Two kinds of writes:
//! - [`reserve`](WriteBack::reserve): harmless on its own (a raised refcount, a fresh table nobody points to yet). May reach the file at any time.
//! - [`publish`](WriteBack::publish): makes something visible (a table entry). Reaches the file only after a sync of all data and
//!   all reserving writes that were made before it.
//!
//! Reads of metadata must come through [`read`](WriteBack::read), which shows the file as it will be.

/// Space that nothing refers to any more. Meaning of the fields is the format's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Freed {
    /// Which of the format's stores.
    pub store: usize,
    /// Byte offset.
    pub at: u64,
    /// Bytes.
    pub len: u64,
}
