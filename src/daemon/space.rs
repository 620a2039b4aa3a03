//! Host file systems that run out of space under growing images: the log and the initiators are warned while there is some left.

use super::device::Device;
use super::devices::{Devices, State};
use nix::sys::statvfs::statvfs;
use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// Between two looks.
const INTERVAL: Duration = Duration::from_secs(10);

/// Little space is less than this part of the file system, and less than [`LITTLE`] bytes.
const PART: u64 = 20;
const LITTLE: u64 = 1 << 30;

/// Starts the thread that looks. It may hang with a file system: nobody waits for it.
///
/// # Errors
/// The thread cannot be started.
pub fn watch(devices: Devices) -> std::io::Result<()> {
    thread::Builder::new().name("space".into()).spawn(move || {
        let mut warned = HashSet::new();
        loop {
            thread::sleep(INTERVAL);
            look(&devices, &mut warned);
        }
    })?;
    Ok(())
}

/// Warns once each time that space under a device becomes little. `warned` are the devices that know.
fn look(devices: &Devices, warned: &mut HashSet<String>) {
    let served = devices.list().into_iter().filter_map(|(name, state)| match state {
        State::Served(device) => Some((name, device)),
        State::Waiting(_) => None,
    });
    let served: Vec<(String, Arc<Device>)> = served.collect();
    warned.retain(|name| served.iter().any(|(other, _)| other == name));
    for (name, device) in served {
        let Some(path) = device.growing_file() else { continue };
        match little_space(&path) {
            Some(left) if warned.insert(name.clone()) => {
                tracing::warn!(
                    device = %name,
                    "only {} MiB are left on the file system of {}: make room, or writes to new space will fail",
                    left >> 20,
                    path.display()
                );
                device.lun().threshold_reached();
            }
            Some(_) => {}
            None => {
                warned.remove(&name);
            }
        }
    }
}

/// Bytes that are left for unprivileged writers where `path` lies, if those are few.
fn little_space(path: &Path) -> Option<u64> {
    let space = statvfs(path).ok()?;
    let of = |blocks: u64| blocks.saturating_mul(space.fragment_size());
    let (all, left) = (of(space.blocks()), of(space.blocks_available()));
    (all > 0 && left < LITTLE.min(all / PART)).then_some(left)
}
