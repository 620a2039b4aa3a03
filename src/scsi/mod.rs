//! A SCSI disk (SPC-4, SBC-3) over a [`formats::BlockDevice`]: CDB and buffers in, status, sense and valid length out.
//!
//! [`Lun::execute`] is the whole interface for commands. Faults are CHECK CONDITION, never an error of Rust's: there is no
//! CDB and no buffer that makes it fail otherwise. It knows nothing of rings or transports. The life of a command:
//! [`opcode`] finds the command's row and with it the rules that all commands share ([`lun`]); the row's function parses its
//! fields ([`cdb`]) and does the work; [`sense`] encodes what went wrong.

mod atomic;
mod attention;
mod capacity;
pub mod cdb;
mod copy;
mod copy_results;
pub mod data;
mod defects;
mod failure_log;
mod inquiry;
mod io;
mod log;
pub mod lun;
mod mode;
pub mod opcode;
mod operation;
pub mod ports;
mod provisioning;
mod range_lock;
mod report_opcodes;
mod sanitize;
pub mod sense;
mod unit;
mod verify;
mod vpd;
mod write_same;

pub use copy::CopyPeers;
pub use data::Data;
pub use lun::{Config, ConfigError, Identity, Lun, Outcome, Status};
pub use ports::TargetPorts;
pub use sense::{Fault, Sense, Triple};
