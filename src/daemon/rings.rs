//! Where rings come from: the kernel's UIO devices. A seam, so that tests bring rings of their own.

use crate::tcmu::configfs::{Backstore, ResetStatus};
use crate::tcmu::uio::{self, Paths, Uio, UioDevice};
use crate::tcmu::{Completion, Error, Result, Ring, RingFault};
use std::thread;
use std::time::{Duration, Instant};

/// A predecessor that was killed holds its devices until its last thread has left the kernel.
const PREDECESSOR: Duration = Duration::from_secs(10);

/// Finds devices and takes over their rings.
pub trait Rings: Send + Sync {
    /// All devices of our subtype.
    ///
    /// # Errors
    /// sysfs cannot be read.
    fn scan(&self) -> Result<Vec<UioDevice>>;

    /// The device with this UIO number, if it is there and of TCMU.
    ///
    /// # Errors
    /// sysfs cannot be read.
    fn lookup(&self, minor: u32) -> Result<Option<UioDevice>>;

    /// Opens and maps the device. What a predecessor of ours left in the ring is served on; what somebody else left is
    /// returned as BUSY, which initiators send again.
    ///
    /// # Errors
    /// Another process serves it, or the ring is not one that we know.
    fn attach(&self, device: &UioDevice, backstore: &Backstore) -> Result<Ring>;
}

/// The running kernel's.
#[derive(Clone, Debug, Default)]
pub struct Kernel {
    paths: Paths,
}

impl Rings for Kernel {
    fn scan(&self) -> Result<Vec<UioDevice>> {
        uio::scan(&self.paths, cfgstring::SUBTYPE)
    }

    fn lookup(&self, minor: u32) -> Result<Option<UioDevice>> {
        uio::lookup(&self.paths, minor)
    }

    fn attach(&self, device: &UioDevice, backstore: &Backstore) -> Result<Ring> {
        match self.open(device) {
            Err(Error::Ring { fault: RingFault::Foreign, .. }) => {
                tracing::warn!("another program left commands in the ring: they are returned as BUSY");
                backstore.block(true)?;
                backstore.reset_ring(ResetStatus::Busy)?;
                let ring = self.open(device);
                backstore.block(false)?;
                ring
            }
            other => other,
        }
    }
}

impl Kernel {
    fn open(&self, device: &UioDevice) -> Result<Ring> {
        let deadline = Instant::now() + PREDECESSOR;
        let uio = loop {
            match Uio::open(&self.paths, device) {
                Err(Error::Busy { .. }) if Instant::now() < deadline => thread::sleep(Duration::from_millis(10)),
                other => break other?,
            }
        };
        let region = uio.map()?;
        Ring::attach(region, Box::new(uio), &device.name.short(), failure())
    }
}

/// What a command ends with that nobody answered (a panic): HARDWARE ERROR, INTERNAL TARGET FAILURE (SPC-4 4.5.6).
pub fn failure() -> Completion {
    let mut sense = [0; 18];
    sense[0] = 0x70;
    sense[2] = 0x04;
    sense[7] = 0x0A;
    sense[12] = 0x44;
    Completion::check_condition(&sense)
}
