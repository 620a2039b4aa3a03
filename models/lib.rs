//! Concurrency models: the range locks, the cache's single flight, the grace periods and the ring, compiled once more with locks and atomics that belong to a
//! scheduler ([`shuttle`]), which tries interleavings by the thousand and repeats the one that failed.
//!
//! The sources are those that are shipped: `build.rs` copies them and replaces the names of `parking_lot` and `std::sync::atomic` by [`sync`]. It also makes
//! mutants of them, with one mistake each; a test beside every model shows that the model finds it. All operations are sequentially consistent here: what a
//! weaker ordering allows is for ThreadSanitizer.
#![allow(dead_code, unused, missing_docs, clippy::all, reason = "copies, of which the models use a part, and mutants")]

pub mod error {
    pub use formats::error::*;
}

pub mod sync;

include!(concat!(env!("OUT_DIR"), "/modules.rs"));
