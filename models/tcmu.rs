//! The ring and the fake kernel, without what lies around them.

pub mod abi;
mod error;
pub mod fake;
pub mod ring;

pub use error::{Error, Result, RingFault};
pub use ring::{Command, Completion, Data, Doorbell, Fetched, Region, Ring, TaskManagement, TmrKind};
