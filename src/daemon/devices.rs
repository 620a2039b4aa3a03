//! The set of devices: what the kernel announces becomes a [`Device`], is changed, and goes.
//!
//! Events of one device are handled in order, those of different devices at once ([`Serial`]): a file system that hangs holds up
//! its own devices alone. Every event is answered exactly once, whatever happens to the job that handles it.

use super::dbus::SharedEnvironment;
use super::device::{Device, Surroundings};
use super::errno::Refusal;
use super::rings::Rings;
use super::serial::Serial;
use super::surroundings::Ports;
use crate::scsi::{CopyPeers, Lun};
use crate::serve::{Pool, Stuck};
use crate::tcmu::configfs::Configfs;
use crate::tcmu::netlink::Action;
use crate::tcmu::uio::{DeviceName, UioDevice};
use nix::errno::Errno;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// The kernel's question, to be answered once: 0, or a positive errno.
pub trait Question: Send {
    /// Answers.
    fn answer(self: Box<Self>, errno: i32);
}

/// Answers with EIO when it is dropped unanswered: the kernel waits for ever otherwise.
struct Pending(Option<Box<dyn Question>>);

impl Pending {
    fn answer(mut self, verdict: Result<(), Refusal>) {
        if let Some(question) = self.0.take() {
            question.answer(verdict.err().map_or(0, |refusal| refusal.errno()));
        }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if let Some(question) = self.0.take() {
            question.answer(Errno::EIO as i32);
        }
    }
}

/// A device of ours.
#[derive(Clone)]
enum Slot {
    /// It is served.
    Served(Arc<Device>),
    /// It exists and could not be taken into service yet, for this reason.
    Waiting(UioDevice, String),
}

impl Slot {
    fn minor(&self) -> u32 {
        match self {
            Self::Served(device) => device.uio().minor,
            Self::Waiting(uio, _) => uio.minor,
        }
    }
}

/// How a device is doing.
pub enum State {
    /// It is served.
    Served(Arc<Device>),
    /// It could not be taken into service yet, for this reason.
    Waiting(String),
}

/// What devices are made with.
pub struct Means {
    /// The administration's tree.
    pub configfs: Configfs,
    /// Where rings come from.
    pub rings: Box<dyn Rings>,
    /// The threads that serve them.
    pub pool: Pool,
    /// How images are opened.
    pub environment: SharedEnvironment,
}

/// The set. Clones are the same one.
#[derive(Clone)]
pub struct Devices(Arc<Inner>);

struct Inner {
    means: Means,
    slots: Mutex<BTreeMap<String, Slot>>,
    serial: Serial,
    stopping: AtomicBool,
    peers: Arc<Peers>,
}

/// The units that EXTENDED COPY finds.
struct Peers(Weak<Inner>);

impl CopyPeers for Peers {
    fn find(&self, naa: &[u8; 16]) -> Option<Lun> {
        let served = |slot: &Slot| if let Slot::Served(device) = slot { Some(device.lun().clone()) } else { None };
        let units: Vec<Lun> = self.0.upgrade()?.slots.lock().values().filter_map(served).collect();
        // Names are asked for without the lock: they come from configfs.
        units.into_iter().find(|unit| unit.naa().as_ref() == Some(naa))
    }
}

impl Devices {
    /// No devices.
    pub fn new(means: Means) -> Self {
        Self(Arc::new_cyclic(|inner| Inner {
            means,
            slots: Mutex::default(),
            serial: Serial::default(),
            stopping: AtomicBool::new(false),
            peers: Arc::new(Peers(inner.clone())),
        }))
    }

    /// Handles what happens to the device `name` in the background, and answers.
    pub fn event(&self, name: &DeviceName, minor: u32, action: Action, question: Box<dyn Question>) {
        let pending = Pending(Some(question));
        let inner = Arc::clone(&self.0);
        let key = name.short();
        self.0.serial.run(&key.clone(), move || {
            let span = tracing::info_span!("device", name = %key);
            let _entered = span.enter();
            let verdict = inner.handle(&key, minor, &action);
            if let Err(refusal) = &verdict {
                tracing::error!("{}: {refusal} (errno {})", refused(&action), refusal.errno());
            }
            pending.answer(verdict);
        });
    }

    /// Takes devices into service that exist already, lets go of those that exist no more.
    pub fn rescan(&self) {
        let found = match self.0.means.rings.scan() {
            Ok(found) => found,
            Err(error) => {
                tracing::error!("cannot look for devices: {error}");
                return;
            }
        };
        let gone: Vec<(String, u32)> = {
            let slots = self.0.slots.lock();
            let exists = |key: &str, minor: u32| found.iter().any(|uio| uio.minor == minor && uio.name.short() == key);
            slots.iter().map(|(key, slot)| (key.clone(), slot.minor())).filter(|(key, minor)| !exists(key, *minor)).collect()
        };
        for (key, minor) in gone {
            self.background(&key, move |inner, key| {
                // It may have come, or come back, between the scan and now.
                if !matches!(inner.means.rings.lookup(minor), Ok(Some(uio)) if uio.name.short() == key) {
                    tracing::warn!("is gone without an announcement");
                    inner.remove(key, minor);
                }
            });
        }
        for uio in found {
            self.background(&uio.name.short(), move |inner, key| inner.recover(key, uio));
        }
    }

    /// Tries again what could not be taken into service.
    pub fn retry(&self) {
        let waiting: Vec<UioDevice> = {
            let slots = self.0.slots.lock();
            let waiting = |slot: &Slot| if let Slot::Waiting(uio, _) = slot { Some(uio.clone()) } else { None };
            slots.values().filter_map(waiting).collect()
        };
        for uio in waiting {
            let key = uio.name.short();
            // A device whose last attempt still hangs is not asked again.
            if !self.0.serial.is_busy(&key) {
                self.background(&key, move |inner, key| inner.recover(key, uio));
            }
        }
    }

    /// All devices by name.
    pub fn list(&self) -> Vec<(String, State)> {
        let state = |slot: &Slot| match slot {
            Slot::Served(device) => State::Served(Arc::clone(device)),
            Slot::Waiting(_, reason) => State::Waiting(reason.clone()),
        };
        self.0.slots.lock().iter().map(|(key, slot)| (key.clone(), state(slot))).collect()
    }

    /// Threads that do I/O.
    pub fn threads(&self) -> usize {
        self.0.means.pool.threads()
    }

    /// Something is being taken into service, changed or let go.
    pub fn is_busy(&self) -> bool {
        self.0.serial.busy() > 0
    }

    /// Commands that have been executing for a second or more.
    pub fn stuck(&self) -> Vec<Stuck> {
        self.0.means.pool.stuck()
    }

    /// Takes everything out of service, at once: no new commands, those under way ended, images flushed and closed. Devices are left
    /// blocked, so that their initiators see BUSY, which they send again, until a successor unblocks them. False: some did not end
    /// in time.
    pub fn stop(&self, patience: Duration) -> bool {
        self.0.stopping.store(true, Ordering::Release);
        let keys: Vec<String> = self.0.slots.lock().keys().cloned().collect();
        for key in &keys {
            self.background(key, |inner, key| inner.halt(key));
        }
        let deadline = Instant::now() + patience;
        while self.0.serial.busy() > 0 {
            if Instant::now() >= deadline {
                tracing::error!("{} devices did not come to an end within {} s", self.0.serial.busy(), patience.as_secs());
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }

    fn background(&self, key: &str, job: impl FnOnce(&Inner, &str) + Send + 'static) {
        let inner = Arc::clone(&self.0);
        let name = key.to_owned();
        self.0.serial.run(key, move || {
            let span = tracing::info_span!("device", name = %name);
            let _entered = span.enter();
            job(&inner, &name);
        });
    }
}

fn refused(action: &Action) -> &'static str {
    match action {
        Action::Added => "cannot be served",
        Action::Removed => "removal",
        Action::SetConfig(_) => "keeps its configuration",
        Action::SetSize(_) => "keeps its size",
        Action::SetWriteCache(_) => "keeps its write cache as it is",
    }
}

impl Inner {
    fn handle(&self, key: &str, minor: u32, action: &Action) -> Result<(), Refusal> {
        match action {
            Action::Added => self.add(key, minor),
            Action::Removed => {
                self.remove(key, minor);
                Ok(())
            }
            change => {
                let device = self.served(key)?;
                let environment = Arc::clone(&self.means.environment.read());
                match change {
                    Action::SetConfig(config) => device.set_config(config, &environment),
                    Action::SetSize(size) => device.set_size(*size),
                    Action::SetWriteCache(on) => device.set_write_cache(*on),
                    Action::Added | Action::Removed => Ok(()),
                }
            }
        }
    }

    fn served(&self, key: &str) -> Result<Arc<Device>, Refusal> {
        match self.slots.lock().get(key) {
            Some(Slot::Served(device)) => Ok(Arc::clone(device)),
            Some(Slot::Waiting(_, reason)) => Err(Refusal::new(Errno::ENXIO, format!("is not in service: {reason}"))),
            None => Err(Refusal::new(Errno::ENXIO, "is not known here")),
        }
    }

    /// A new device. Its creation fails if it cannot be served.
    fn add(&self, key: &str, minor: u32) -> Result<(), Refusal> {
        if self.stopping.load(Ordering::Acquire) {
            return Err(Refusal::new(Errno::ESHUTDOWN, "the daemon is stopping"));
        }
        let uio = self.means.rings.lookup(minor)?;
        let uio = uio.ok_or_else(|| Refusal::new(Errno::ENODEV, format!("there is no UIO device uio{minor}")))?;
        if matches!(self.slots.lock().get(key), Some(Slot::Served(device)) if *device.uio() == uio) {
            // Found by a scan before its announcement was read.
            return Ok(());
        }
        let device = self.start(uio);
        let mut slots = self.slots.lock();
        match device {
            Ok(device) => {
                slots.insert(key.to_owned(), Slot::Served(Arc::new(device)));
                Ok(())
            }
            Err(refusal) => {
                slots.remove(key);
                Err(refusal)
            }
        }
    }

    fn start(&self, uio: UioDevice) -> Result<Device, Refusal> {
        let backstore = self.means.configfs.backstore(&uio.name);
        let environment = Arc::clone(&self.means.environment.read());
        let surroundings = Surroundings { ports: Arc::new(Ports(backstore.clone())), peers: Arc::clone(&self.peers) as _ };
        Device::start(uio, &backstore, surroundings, &environment, &*self.means.rings, &self.means.pool)
    }

    /// A device that exists already. When it cannot be served it is blocked, so that its initiators wait, and tried again later.
    fn recover(&self, key: &str, uio: UioDevice) {
        if self.stopping.load(Ordering::Acquire) {
            return;
        }
        let before = match self.slots.lock().get(key) {
            Some(Slot::Served(_)) => return,
            Some(Slot::Waiting(_, reason)) => Some(reason.clone()),
            None => None,
        };
        let backstore = self.means.configfs.backstore(&uio.name);
        match self.start(uio.clone()) {
            Ok(device) => {
                self.slots.lock().insert(key.to_owned(), Slot::Served(Arc::new(device)));
                self.block(&backstore, false);
            }
            Err(refusal) => {
                let reason = refusal.to_string();
                if before.as_ref() != Some(&reason) {
                    tracing::error!("cannot be served: {reason}; initiators are told to wait, and it is tried again");
                }
                self.slots.lock().insert(key.to_owned(), Slot::Waiting(uio, reason));
                self.block(&backstore, true);
            }
        }
    }

    fn block(&self, backstore: &crate::tcmu::configfs::Backstore, block: bool) {
        if let Err(error) = backstore.block(block) {
            tracing::warn!("cannot {} the device: {error}", if block { "block" } else { "unblock" });
        }
    }

    /// The kernel is about to forget the device.
    fn remove(&self, key: &str, minor: u32) {
        let slot = {
            let mut slots = self.slots.lock();
            match slots.get(key) {
                Some(slot) if slot.minor() == minor => slots.remove(key),
                _ => None,
            }
        };
        if let Some(Slot::Served(device)) = slot {
            stop(&device);
            tracing::info!("removed");
        }
    }

    /// The daemon is about to end.
    fn halt(&self, key: &str) {
        let slot = self.slots.lock().get(key).cloned();
        if let Some(Slot::Served(device)) = slot {
            self.block(&self.means.configfs.backstore(&device.uio().name), true);
            stop(&device);
            self.slots.lock().remove(key);
        }
    }
}

fn stop(device: &Device) {
    let start = Instant::now();
    device.stop(|in_flight| {
        tracing::warn!(
            "waits for {in_flight} commands since {} s: does the file system of {} hang?",
            start.elapsed().as_secs(),
            device.describe()
        );
    });
}

#[cfg(test)]
mod tests;
