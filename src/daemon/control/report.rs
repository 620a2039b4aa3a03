//! What the daemon and its disks are doing, as the control socket and the metrics tell it.

use super::protocol::{Cache, Device, State, Status};
use crate::daemon::devices::{self, Devices};
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Answers how things are. Clones are the same.
#[derive(Clone)]
pub struct Reporter {
    devices: Devices,
    started: Instant,
    pause: Arc<Mutex<Option<Duration>>>,
}

impl Reporter {
    /// Of these devices.
    pub fn new(devices: Devices) -> Self {
        Self { devices, started: Instant::now(), pause: Arc::default() }
    }

    /// For so long no disk was served while this program took the place of another.
    pub fn paused_for(&self, pause: Duration) {
        *self.pause.lock() = Some(pause);
    }

    /// All of it.
    pub fn status(&self) -> Status {
        let cache = formats::Cache::shared().stats();
        Status {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            incarnation: super::incarnation().into(),
            uptime_s: self.started.elapsed().as_secs_f64(),
            pause_ms: self.pause.lock().map(|pause| pause.as_secs_f64() * 1e3),
            threads: self.devices.threads(),
            cache: Cache { hits: cache.hits, misses: cache.misses, used: cache.used, budget: cache.budget },
            devices: self.devices(),
        }
    }

    fn devices(&self) -> Vec<Device> {
        let stuck = self.devices.stuck();
        let device = |(name, state): (String, devices::State)| match state {
            devices::State::Waiting(reason) => Device { name, state: State::Waiting, reason: Some(reason), served: None },
            devices::State::Served(device) => {
                let oldest = stuck.iter().filter(|stuck| stuck.device == name).map(|stuck| stuck.age.as_secs_f64()).reduce(f64::max);
                let (served, failed) = device.report();
                let state = if failed { State::OutOfService } else { State::Served };
                Device { name, state, reason: None, served: served.map(|served| super::protocol::Served { oldest_s: oldest, ..served }) }
            }
        };
        self.devices.list().into_iter().map(device).collect()
    }
}
