//! The command ring of one device: commands out, completions in.
//!
//! This module and the files below it are the only ones that touch the shared memory. [`Region`] maps it, `entry` turns bytes
//! into checked values, `grant` lends the data area, `slots` decides where completions go, `intent` makes each completion
//! safe from the death of the process.
//!
//! Any number of threads may fetch and complete at once: each of the two takes one short lock. What happens in between, the
//! command's execution, is the caller's, on the memory that the [`Command`] lends.
//!
//! # Death and succession
//!
//! The ring outlives the process. A successor that opens it with [`Ring::attach`] finds every command that was not completed
//! and fetches them like new ones ([`Command::recovered`] tells), so that `kill -9` is a pause for the initiator and not an
//! error. The kernel lets the successor open the device only when the last thread of the dead process is gone, so nothing of
//! the old process still writes to the buffers.
//!
//! # Resets
//!
//! If an administrator resets the ring (`action/reset_ring`) under a process that serves it, the commands in flight are lost to
//! the kernel and their buffers may be given to new ones while they are still being executed. The ring notices, waits until
//! all of them have ended, and starts afresh; but a write that was being executed may have taken wrong data. A ring must be reset
//! only while nobody serves it.

mod command;
mod entry;
mod grant;
mod intent;
mod region;
mod slots;
#[cfg(test)]
mod tests;

pub use command::{Command, Completion, Data, Fetched, TaskManagement, TmrKind};
pub use region::{OutOfRegion, Region};

use crate::tcmu::abi::{self, mailbox};
use crate::tcmu::{Error, RingFault};
use command::Unfilled;
use entry::{Geometry, Header, Request};
use grant::{Grant, Occupied};
use intent::{Intent, Response};
use parking_lot::Mutex;
use slots::{Slots, Step};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};

/// The wake-ups between the kernel and a ring: the UIO device, or what stands in for it.
pub trait Doorbell: Send + Sync {
    /// Tells the kernel to look at the tail.
    fn kick(&self) -> io::Result<()>;

    /// Becomes readable when the kernel has moved the head, and stays readable: to be polled edge-triggered.
    fn fd(&self) -> BorrowedFd<'_>;
}

/// A device's ring. Clones are handles to the same ring; the memory is unmapped and the doorbell closed when the last handle and
/// the last [`Command`] are gone.
#[derive(Clone)]
pub struct Ring(Arc<Inner>);

struct Inner {
    /// Dropped before the doorbell, whose file it maps.
    region: Region,
    doorbell: Box<dyn Doorbell>,
    geometry: Geometry,
    name: String,
    failure: Completion,
    state: Mutex<State>,
    /// The fetch cursor, for a look without the lock.
    cursor: AtomicU32,
    /// The tail moved since the last kick.
    unkicked: AtomicBool,
    kicks: AtomicU64,
    recovered: usize,
}

struct State {
    /// The next entry to fetch.
    cursor: u32,
    /// What we last wrote to the mailbox.
    tail: u32,
    slots: Slots,
    occupied: Occupied,
    fault: Option<RingFault>,
    /// Counts resets; commands of an earlier generation are no longer known to the kernel.
    generation: u32,
    /// Commands of earlier generations that are still being executed.
    orphans: usize,
    /// Bytes between the cursor and the head that was found at first.
    inherited: u32,
}

impl Ring {
    /// Takes over a ring. `name` is for messages; `failure` is what dropped commands complete with.
    ///
    /// Commands in it that a predecessor left are fetched first; if the predecessor did not leave them readable, the error is
    /// [`RingFault::Foreign`], and the ring has to be reset before.
    pub fn attach(region: Region, doorbell: Box<dyn Doorbell>, name: &str, failure: Completion) -> Result<Self, Error> {
        let broken = |fault| Error::Ring { device: name.to_owned(), fault };
        let geometry = Geometry::read(&region).map_err(broken)?;
        let index = |field, value: Result<u32, OutOfRegion>| match value {
            Ok(value) => geometry.check_index(field, value).map_err(broken),
            Err(OutOfRegion) => Err(broken(RingFault::Geometry { offset: 0, size: 0, region: region.len() })),
        };
        let head = index("head", region.load_u32(mailbox::HEAD, Acquire))?;
        let mut tail = index("tail", region.load_u32(mailbox::TAIL, Relaxed))?;
        let outside = |OutOfRegion| broken(RingFault::Geometry { offset: 0, size: 0, region: region.len() });
        if !intent::is_marked(&region).map_err(outside)? {
            // At tail 0 nothing was ever completed, so nothing is overwritten: the first to serve it comes late.
            if head != tail && tail != 0 {
                return Err(broken(RingFault::Foreign));
            }
            intent::mark(&region).map_err(outside)?;
        } else if Intent::finish(&region, &geometry, tail, head).map_err(outside)? {
            tail = index("tail", region.load_u32(mailbox::TAIL, Relaxed))?;
        }
        let inherited = geometry.distance(tail, head);
        let state = State {
            cursor: tail,
            tail,
            slots: Slots::default(),
            occupied: Occupied::new(geometry.data_start(), geometry.end, geometry.out_of_order()),
            fault: None,
            generation: 0,
            orphans: 0,
            inherited,
        };
        let inner = Inner {
            region,
            doorbell,
            geometry,
            name: name.to_owned(),
            failure,
            state: Mutex::new(state),
            cursor: AtomicU32::new(tail),
            // What a predecessor completed may not have been told.
            unkicked: AtomicBool::new(true),
            kicks: AtomicU64::new(0),
            recovered: inherited as usize,
        };
        Ok(Self(Arc::new(inner)))
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// What dropped commands complete with.
    pub fn failure(&self) -> Completion {
        self.0.failure.clone()
    }

    /// Takes the next entry out of the ring; none if there is none. An error means that the ring is out of service for good:
    /// commands in flight can still be completed, and nothing more will be fetched.
    pub fn fetch(&self) -> Result<Option<Fetched>, Error> {
        self.0.fetch(&self.0).map_err(|fault| Error::Ring { device: self.0.name.clone(), fault })
    }

    /// Whether there is something to fetch, as far as can be seen without a lock.
    pub fn has_pending(&self) -> bool {
        let head = self.0.region.load_u32(mailbox::HEAD, Acquire);
        head.is_ok_and(|head| head != self.0.cursor.load(Relaxed))
    }

    /// Whether completions wait for a [kick](Ring::kick).
    pub fn needs_kick(&self) -> bool {
        self.0.unkicked.load(Acquire)
    }

    /// Tells the kernel of the completions since the last kick, if there are any.
    pub fn kick(&self) -> io::Result<()> {
        if self.0.unkicked.swap(false, AcqRel) {
            self.0.kicks.fetch_add(1, Relaxed);
            self.0.doorbell.kick()?;
        }
        Ok(())
    }

    /// How often the kernel was told.
    pub fn kicks(&self) -> u64 {
        self.0.kicks.load(Relaxed)
    }

    /// How many commands are fetched and not yet given back to the kernel.
    pub fn in_flight(&self) -> usize {
        let state = self.0.state.lock();
        state.slots.live_count() + state.orphans
    }

    /// How many commands are executed and wait for a place in the ring.
    pub fn held_back(&self) -> usize {
        self.0.state.lock().slots.waiting_count()
    }

    /// Whether a predecessor left entries in the ring.
    pub fn inherited(&self) -> bool {
        self.0.recovered > 0
    }

    /// The file to poll: see [`Doorbell::fd`].
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.doorbell.fd()
    }

    /// Gives up this handle; true if it was the last one, and the memory is unmapped and the doorbell closed now.
    pub fn close(self) -> bool {
        Arc::into_inner(self.0).is_some()
    }
}

impl Inner {
    fn fetch(&self, this: &Arc<Self>) -> Result<Option<Fetched>, RingFault> {
        let mut state = self.state.lock();
        if let Some(fault) = &state.fault {
            return Err(fault.clone());
        }
        let fetched = self.fetch_locked(&mut state, this);
        if let Err(fault) = &fetched {
            state.fault = Some(fault.clone());
        }
        self.cursor.store(state.cursor, Relaxed);
        fetched
    }

    fn fetch_locked(&self, state: &mut State, this: &Arc<Self>) -> Result<Option<Fetched>, RingFault> {
        let (region, geometry) = (&self.region, &self.geometry);
        let outside = |OutOfRegion| RingFault::Geometry { offset: 0, size: 0, region: region.len() };
        let head = geometry.check_index("head", region.load_u32(mailbox::HEAD, Acquire).map_err(outside)?)?;
        let tail = region.load_u32(mailbox::TAIL, Relaxed).map_err(outside)?;
        if tail != state.tail || geometry.distance(tail, head) < geometry.distance(tail, state.cursor) {
            self.reset(state, tail)?;
        }
        if state.orphans > 0 {
            return Ok(None);
        }
        let mut fetched = None;
        while fetched.is_none() && state.cursor != head {
            let header = Header::read(region, geometry, state.cursor, head)?;
            match header.op {
                abi::OP_CMD => fetched = Some(Fetched::Command(self.fetch_command(state, this, &header)?)),
                op => {
                    match op {
                        abi::OP_PAD => {}
                        abi::OP_TMR => fetched = Some(Fetched::TaskManagement(TaskManagement::read(region, geometry, &header)?)),
                        _ => self.disown(&header).map_err(outside)?,
                    }
                    state.slots.push_filler(header.at, header.len);
                }
            }
            state.cursor = geometry.advance(state.cursor, header.len);
            state.inherited = state.inherited.saturating_sub(header.len);
        }
        self.settle(state);
        Ok(fetched)
    }

    fn fetch_command(&self, state: &mut State, this: &Arc<Self>, header: &Header) -> Result<Command, RingFault> {
        let request = Request::read(&self.region, &self.geometry, header)?;
        let id = header.id;
        if state.slots.is_live(id) {
            return Err(RingFault::DuplicateId { id });
        }
        state.occupied.take(id, &request.data)?;
        if let Err(fault) = state.occupied.take(id, &request.bidi) {
            state.occupied.release(&request.data);
            return Err(fault);
        }
        let bounds = |OutOfRegion| RingFault::BufferBounds { id, base: 0, len: 0 };
        let data = Grant::new(&self.region, request.data).map_err(bounds)?;
        let bidi = match request.bidi.is_empty() {
            true => None,
            false => Some(Box::new(Grant::new(&self.region, request.bidi).map_err(bounds)?)),
        };
        state.slots.push_command(header, request.shape);
        Ok(Command::new(Arc::clone(this), id, state.generation, state.inherited > 0, request.cdb, data, bidi))
    }

    /// Marks an entry whose opcode we do not know.
    fn disown(&self, header: &Header) -> Result<(), OutOfRegion> {
        tracing::warn!(device = %self.name, op = header.op, "entry of unknown kind in the ring: skipped");
        let [id0, id1] = header.id.to_ne_bytes();
        let word = u32::from_ne_bytes([id0, id1, header.kflags, abi::UFLAG_UNKNOWN_OP]);
        self.region.store_u32(self.geometry.offset(header.at, abi::command::ID_FLAGS), word, Relaxed)
    }

    /// The ring is not where we left it: somebody reset it.
    fn reset(&self, state: &mut State, tail: u32) -> Result<(), RingFault> {
        let tail = self.geometry.check_index("tail", tail)?;
        let executing = state.slots.clear();
        tracing::error!(
            device = %self.name, commands = executing,
            "the ring was reset while it is being served: writes in flight may have taken wrong data; reset a ring only while its daemon is stopped"
        );
        state.orphans += executing;
        state.generation = state.generation.wrapping_add(1);
        state.tail = tail;
        state.cursor = tail;
        state.inherited = 0;
        Ok(())
    }

    fn complete(&self, id: u16, generation: u32, completion: Completion, data: &mut Grant, mut bidi: Option<&mut Grant>) {
        let takes_read_len = self.geometry.flags & abi::FLAG_READ_LEN != 0;
        let answer = bidi.as_deref_mut().unwrap_or(data);
        let mut response = Response { id, status: completion.status, ..Response::default() };
        match Unfilled::of(&completion, answer.len(), takes_read_len) {
            Unfilled::Withheld => {}
            Unfilled::Limit(filled) => {
                response.uflags = abi::UFLAG_READ_LEN;
                response.read_len = filled;
            }
            Unfilled::ZeroFrom(start) => answer.zero_from(start),
        }
        response.sense = completion.sense;

        let mut state = self.state.lock();
        state.occupied.release(data.spans());
        if let Some(bidi) = &bidi {
            state.occupied.release(bidi.spans());
        }
        if generation != state.generation {
            state.orphans = state.orphans.saturating_sub(1);
            return;
        }
        if state.slots.finish(response) {
            self.settle(&mut state);
        }
    }

    /// Writes the completions that can be written, and moves the tail as far as it can go.
    fn settle(&self, state: &mut State) {
        let mut moved = false;
        while let Some(step) = state.slots.step(self.geometry.out_of_order()) {
            let (at, len) = match &step {
                Step::Skip(len) => (state.tail, *len),
                Step::Respond { slot, .. } => (slot.at, slot.len),
            };
            let tail = self.geometry.advance(at, len);
            let written = match step {
                Step::Skip(_) => self.region.store_u32(mailbox::TAIL, tail, Release),
                Step::Respond { slot, moves, response } => {
                    let slot = Header { at: slot.at, len: slot.len, op: abi::OP_CMD, id: slot.id, kflags: slot.kflags };
                    Intent { slot, moves, response: &response }.perform(&self.region, &self.geometry)
                }
            };
            if let Err(OutOfRegion) = written {
                // Every offset was checked when the entry was fetched.
                state.fault = Some(RingFault::Index { name: "tail", value: tail, size: self.geometry.ring_size });
                return;
            }
            state.tail = tail;
            moved = true;
        }
        if moved {
            self.unkicked.store(true, Release);
        }
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("name", &self.0.name).finish_non_exhaustive()
    }
}
