//! The watch: finds commands that hang, and keeps the rest of the devices served.
//!
//! A file server that does not answer can take every thread that touches an image on it. The watch looks at the threads a few
//! times a second (not at all while nothing is being done). For each thread that has been executing one command for a second it adds a
//! spare thread, up to [`MAX_SPARE`]; the device of such a command is *stalled*, and a thread goes into a stalled device only if
//! another one stays free. When the commands end, the spare threads go.

use super::pool::Shared;
use parking_lot::{Condvar, Mutex};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::time::Duration;

/// How often the watch looks.
const TICK: Duration = Duration::from_millis(250);
/// A command is stuck when it has been executing for so many looks.
const STUCK_TICKS: u32 = 4;
/// A stuck command is reported when it has been executing for so many looks, and after every doubling of that.
const REPORT_TICKS: u32 = 20;
/// How many threads may be added to those that there are at first.
const MAX_SPARE: usize = 64;

/// A command that has been executing for a second or more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stuck {
    /// Name of the device.
    pub device: String,
    /// Id of the command.
    pub command: u16,
    /// Operation code of the command.
    pub opcode: u8,
    /// For how long, roughly.
    pub age: Duration,
}

/// What a thread is doing, for the watch to see.
#[derive(Debug, Default)]
pub(super) struct Post {
    /// The thread is in this device; 0 is none.
    device: AtomicU64,
    /// Changes at the start and the end of every command; odd while one is executed.
    step: AtomicU32,
    /// Command id and operation code.
    command: AtomicU32,
    /// For how many looks `step` has been the same odd number. Written by the watch alone.
    ticks: AtomicU32,
    seen: AtomicU32,
}

impl Post {
    pub fn arrive(&self, device: u64, watch: &Watch) {
        self.device.store(device, SeqCst);
        if watch.asleep.load(SeqCst) {
            watch.wake();
        }
    }

    pub fn begin(&self, id: u16, opcode: u8) {
        self.command.store(u32::from(id) << 8 | u32::from(opcode), Relaxed);
        self.step.store(self.step.load(Relaxed).wrapping_add(1), Release);
    }

    pub fn end(&self) {
        self.step.store(self.step.load(Relaxed).wrapping_add(1), Release);
    }

    pub fn leave(&self) {
        self.device.store(0, Release);
    }

    /// For how many looks the thread has been executing the same command.
    fn look(&self) -> u32 {
        let step = self.step.load(Acquire);
        let same = step == self.seen.swap(step, Relaxed) && step % 2 == 1;
        let ticks = if same { self.ticks.load(Relaxed).saturating_add(1) } else { 0 };
        self.ticks.store(ticks, Relaxed);
        ticks
    }
}

/// The watch's own state.
#[derive(Default)]
pub(super) struct Watch {
    asleep: AtomicBool,
    lock: Mutex<()>,
    alarm: Condvar,
    stuck: Mutex<Vec<Stuck>>,
}

impl Watch {
    pub fn wake(&self) {
        let _lock = self.lock.lock();
        self.asleep.store(false, SeqCst);
        self.alarm.notify_one();
    }

    pub fn stuck(&self) -> Vec<Stuck> {
        self.stuck.lock().clone()
    }
}

/// The watch's life.
pub(super) fn run(shared: &Arc<Shared>) {
    let mut warned = false;
    while !shared.is_ending() {
        let mut lock = shared.watch.lock.lock();
        shared.watch.asleep.store(true, SeqCst);
        // A thread that arrives from here on sees that the watch sleeps, or is seen here.
        let working = shared.posts.read().iter().any(|post| post.device.load(SeqCst) != 0);
        if working || shared.is_ending() || !shared.stalled_devices().is_empty() {
            shared.watch.asleep.store(false, SeqCst);
            shared.watch.alarm.wait_for(&mut lock, TICK);
        } else {
            while shared.watch.asleep.load(SeqCst) {
                shared.watch.alarm.wait(&mut lock);
            }
        }
        drop(lock);
        look(shared, &mut warned);
    }
}

fn look(shared: &Arc<Shared>, warned: &mut bool) {
    let posts = shared.posts.read().clone();
    let mut stuck = Vec::new();
    let mut stalled = BTreeSet::new();
    for post in &posts {
        let ticks = post.look();
        if ticks < STUCK_TICKS {
            continue;
        }
        let key = post.device.load(Relaxed);
        let Some(device) = shared.device(key) else {
            // It is being stopped; its thread is still away.
            stuck.push(None);
            continue;
        };
        stalled.insert(key);
        device.stalled.store(true, Relaxed);
        let command = post.command.load(Relaxed);
        let entry = Stuck { device: device.name.clone(), command: (command >> 8) as u16, opcode: command as u8, age: TICK * ticks };
        if ticks >= REPORT_TICKS && (ticks / REPORT_TICKS).is_power_of_two() && ticks.is_multiple_of(REPORT_TICKS) {
            tracing::warn!(device = %entry.device, command = entry.command, "operation {:02x}h has been executing for {:?}", entry.opcode, entry.age);
        }
        stuck.push(Some(entry));
    }
    adjust_threads(shared, stuck.len(), warned);
    *shared.watch.stuck.lock() = stuck.into_iter().flatten().collect();
    for device in shared.stalled_devices() {
        if !stalled.contains(&device.key) {
            device.stalled.store(false, Relaxed);
        }
        if device.has_pending() {
            shared.look_at(device.key);
        }
    }
}

/// Makes up for threads that are stuck; lets spare ones go.
fn adjust_threads(shared: &Arc<Shared>, stuck: usize, warned: &mut bool) {
    let total = shared.total.load(Relaxed);
    let wanted = shared.base + stuck.min(MAX_SPARE);
    for _ in total..wanted {
        if let Err(error) = Shared::spawn(shared) {
            tracing::error!("cannot add a thread while others are stuck: {error}");
            break;
        }
    }
    let exhausted = stuck > MAX_SPARE;
    if exhausted && !*warned {
        tracing::error!("{stuck} threads are stuck and no more are added: devices may not be served");
    }
    *warned = exhausted;
    let spare = total.saturating_sub(wanted);
    shared.surplus.store(spare, Release);
    for _ in 0..spare {
        // They find nothing, and go.
        shared.look_at(0);
    }
}
