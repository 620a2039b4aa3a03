//! One device of a pool: who is in it, and how it is left.

use super::Service;
use super::pool::Shared;
use super::statistics::{Snapshot, Statistics};
use crate::tcmu::Ring;
use parking_lot::{Condvar, Mutex};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::time::{Duration, Instant};

/// A device that the pool serves.
pub(super) struct Device {
    pub key: u64,
    pub name: String,
    pub service: Arc<dyn Service>,
    pub statistics: Statistics,
    gate: Mutex<Gate>,
    /// Nobody is in the device any more.
    empty: Condvar,
    /// Somebody has been asked to look after the ring and has not come yet.
    pub relief: AtomicBool,
    /// A command of the device hangs: the last free threads keep out.
    pub stalled: AtomicBool,
    /// It failed: commands are answered with the ring's failure status.
    out_of_service: AtomicBool,
}

struct Gate {
    /// Gone when the device is being stopped.
    ring: Option<Ring>,
    /// How many threads are in it.
    inside: usize,
}

impl Device {
    pub fn new(key: u64, ring: Ring, service: Arc<dyn Service>) -> Self {
        Self {
            key,
            name: ring.name().to_owned(),
            service,
            statistics: Statistics::default(),
            gate: Mutex::new(Gate { ring: Some(ring), inside: 0 }),
            empty: Condvar::new(),
            relief: AtomicBool::new(false),
            stalled: AtomicBool::new(false),
            out_of_service: AtomicBool::new(false),
        }
    }

    /// Goes in to work on the ring; none if the device is being stopped.
    pub fn enter(&self) -> Option<Visit<'_>> {
        let mut gate = self.gate.lock();
        let ring = gate.ring.clone()?;
        gate.inside += 1;
        Some(Visit { device: self, ring: Some(ring) })
    }

    /// Whether the device is still to be served.
    pub fn is_open(&self) -> bool {
        self.gate.lock().ring.is_some()
    }

    pub fn is_out_of_service(&self) -> bool {
        self.out_of_service.load(Acquire)
    }

    /// Takes the device out of service.
    pub fn retire(&self, reason: &str) {
        if !self.out_of_service.swap(true, AcqRel) {
            tracing::error!(device = %self.name, "out of service: {reason}");
            self.service.out_of_service(reason);
        }
    }

    /// Whether there is something to fetch.
    pub fn has_pending(&self) -> bool {
        self.gate.lock().ring.as_ref().is_some_and(Ring::has_pending)
    }

    /// Lets nobody in any more. Returns the ring the first time.
    fn shut(&self) -> Option<Ring> {
        self.gate.lock().ring.take()
    }

    /// Waits until nobody is inside.
    fn wait_empty(&self, deadline: Instant) -> bool {
        let mut gate = self.gate.lock();
        while gate.inside > 0 {
            if self.empty.wait_until(&mut gate, deadline).timed_out() {
                return gate.inside == 0;
            }
        }
        true
    }
}

/// A thread's stay in a device. While it lasts, the ring stays mapped.
pub(super) struct Visit<'a> {
    device: &'a Device,
    ring: Option<Ring>,
}

impl Visit<'_> {
    pub fn ring(&self) -> Option<&Ring> {
        self.ring.as_ref()
    }
}

impl Drop for Visit<'_> {
    fn drop(&mut self) {
        // The handle goes first: whoever waits for the last visitor then holds the last one.
        drop(self.ring.take());
        let mut gate = self.device.gate.lock();
        gate.inside -= 1;
        if gate.inside == 0 {
            self.device.empty.notify_all();
        }
    }
}

/// A device in service. Dropping it stops the device without waiting.
pub struct Served {
    pool: Arc<Shared>,
    device: Arc<Device>,
    ring: Option<Ring>,
}

impl Served {
    pub(super) fn new(pool: Arc<Shared>, device: Arc<Device>) -> Self {
        Self { pool, device, ring: None }
    }

    /// Whether the device failed and its commands are answered with errors.
    pub fn is_out_of_service(&self) -> bool {
        self.device.is_out_of_service()
    }

    /// What it has done.
    pub fn statistics(&self) -> Snapshot {
        self.device.statistics.snapshot()
    }

    /// How many commands are being executed.
    pub fn in_flight(&self) -> usize {
        self.device.enter().and_then(|visit| visit.ring().map(Ring::in_flight)).unwrap_or(0)
    }

    /// Waits until the ring is empty and everything in it was answered, at most for `timeout`; true if it is. New commands are
    /// served meanwhile: block the device before, or this may not come to an end.
    pub fn drain(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        loop {
            let Some(visit) = self.device.enter() else { return false };
            let busy = visit.ring().is_some_and(|ring| ring.has_pending() || ring.in_flight() > 0);
            drop(visit);
            if !busy {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Fetches nothing more. Commands that were fetched are completed; those left in the ring stay there for a successor.
    pub fn stop(mut self) -> Stopping {
        self.shut();
        Stopping { device: Arc::clone(&self.device), ring: self.ring.take() }
    }

    fn shut(&mut self) {
        if let Some(ring) = self.device.shut() {
            self.pool.forget(self.device.key, &ring);
            self.ring = Some(ring);
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.shut();
    }
}

/// A device that is being stopped.
pub struct Stopping {
    device: Arc<Device>,
    ring: Option<Ring>,
}

impl Stopping {
    /// Waits until everything fetched is completed and announced, the memory is unmapped and the device file is closed; at most
    /// for `timeout`. True if that is so. Can be called again.
    pub fn wait(&mut self, timeout: Duration) -> bool {
        if !self.device.wait_empty(Instant::now() + timeout) {
            return false;
        }
        if let Some(ring) = self.ring.take() {
            if let Err(error) = ring.kick() {
                tracing::debug!(device = %self.device.name, "last kick: {error}");
            }
            if !ring.close() {
                tracing::error!(device = %self.device.name, "the ring is still in use after its last command");
            }
        }
        true
    }

    /// How many commands are still being executed.
    pub fn in_flight(&self) -> usize {
        self.ring.as_ref().map_or(0, Ring::in_flight)
    }
}

impl Device {
    /// Asks for relief, unless somebody is on the way. True if the caller has to pass the request on.
    pub fn ask_for_relief(&self) -> bool {
        !self.relief.swap(true, AcqRel)
    }

    /// Somebody came.
    pub fn relieved(&self) {
        self.relief.store(false, Release);
    }

    pub fn is_stalled(&self) -> bool {
        self.stalled.load(Relaxed)
    }
}
