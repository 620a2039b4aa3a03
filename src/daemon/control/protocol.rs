//! What is said over the control socket: one line of JSON for the request, one for the answer.
//!
//! An answer is `{"protocol":1,"answer":…}` or `{"protocol":1,"error":"…"}`. Fields may be added to answers; a change that old clients would
//! misunderstand gets another number.

use crate::serve::Snapshot;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The number of the protocol.
pub const PROTOCOL: u32 = 1;

/// Longest request, in bytes.
pub const MAX_REQUEST: usize = 16 << 10;

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// A [`Status`].
    Status,
    /// That the configuration file be read again. The answer is a text.
    Reload,
    /// That the daemon become another program, which takes over all disks. The answer is a text, given before it happens.
    Upgrade {
        /// The program.
        binary: PathBuf,
    },
}

/// The envelope of an answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Reply<T> {
    /// [`PROTOCOL`].
    pub protocol: u32,
    /// What was asked for.
    #[serde(default = "Option::default", skip_serializing_if = "Option::is_none")]
    pub answer: Option<T>,
    /// Why there is no answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The daemon and its disks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the daemon.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// A number that is another one after each start, even of the same process.
    pub incarnation: String,
    /// For how long it has been running, in seconds.
    pub uptime_s: f64,
    /// From the end of the program before to now serving all its disks, in milliseconds, after an upgrade.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_ms: Option<f64>,
    /// Threads that do I/O now.
    pub threads: usize,
    /// The cache of decoded units that all images share.
    pub cache: Cache,
    /// The disks by name.
    pub devices: Vec<Device>,
}

/// The shared cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cache {
    /// Requests that found their unit.
    pub hits: u64,
    /// Requests that decoded it.
    pub misses: u64,
    /// Bytes in use.
    pub used: usize,
    /// Bytes that may be used.
    pub budget: usize,
}

/// How a disk is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It is served.
    Served,
    /// It could not be taken into service yet; initiators wait.
    Waiting,
    /// It failed, and its commands with it.
    OutOfService,
}

/// One disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Device {
    /// Name of the backstore, with that of its HBA: `user_0/disk0`.
    pub name: String,
    /// How it is doing.
    pub state: State,
    /// Why it is not served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The rest, if it is served.
    #[serde(flatten, default, skip_serializing_if = "Option::is_none")]
    pub served: Option<Served>,
}

/// One disk that is served.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Served {
    /// The image, then what it stands on.
    pub chain: Vec<Link>,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Logical block size in bytes.
    pub block_size: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// Writes may stay in a volatile cache.
    pub write_cache: bool,
    /// Commands being executed.
    pub in_flight: usize,
    /// Age of the oldest command, in seconds, if one has been executing for a second or more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oldest_s: Option<f64>,
    /// What it has done since it was taken into service.
    pub counters: Snapshot,
}

/// A file of a chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// Where it lies.
    pub path: PathBuf,
    /// Its format.
    pub format: String,
}
