//! The kernel's side of a ring, played on a memfd: for tests and benchmarks of the real user-space side.
//!
//! It behaves as `target_core_user` does: it writes entries with their payload, filler at the end of the ring and notices; hands
//! out data blocks and takes them back without zeroing them; looks at completions only when kicked, inside the kick; and breaks for
//! good when a completion has an id that it does not know. Whatever it finds wrong is a [`Violation`] that tests look for. It does no I/O
//! of its own and has no timers.

mod blocks;

use super::abi::{self, command, mailbox, tmr};
use super::ring::{Doorbell, OutOfRegion, Region};
use blocks::Blocks;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use parking_lot::{Condvar, Mutex};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::time::{Duration, Instant};

/// Size of a data block in bytes.
pub const BLOCK: usize = 4096;

/// What the fake kernel is like.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Size of the command ring in bytes; a multiple of 8 of at least 256.
    pub ring_size: u32,
    /// Number of data blocks.
    pub blocks: usize,
    /// Mailbox flags.
    pub flags: u16,
    /// One iovec a block, as on a fragmented data area, instead of one for each run of blocks.
    pub fragmented: bool,
}

impl Default for Options {
    fn default() -> Self {
        let flags = abi::FLAG_OUT_OF_ORDER | abi::FLAG_READ_LEN | abi::FLAG_TMR;
        Self { ring_size: (1 << 16) - abi::MAILBOX_SIZE as u32, blocks: 4096, flags, fragmented: false }
    }
}

/// A command as an initiator would send it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// The CDB.
    pub cdb: Vec<u8>,
    /// The payload, for a command that writes.
    pub payload: Vec<u8>,
    /// Bytes expected, for a command that reads.
    pub read_len: usize,
}

impl Request {
    /// A command without data.
    pub fn without_data(cdb: &[u8]) -> Self {
        Self { cdb: cdb.to_vec(), ..Self::default() }
    }

    /// A command that reads `len` bytes.
    pub fn read(cdb: &[u8], len: usize) -> Self {
        Self { cdb: cdb.to_vec(), read_len: len, ..Self::default() }
    }

    /// A command that writes `payload`.
    pub fn write(cdb: &[u8], payload: Vec<u8>) -> Self {
        Self { cdb: cdb.to_vec(), payload, read_len: 0 }
    }
}

/// What the initiator gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The command's id.
    pub id: u16,
    /// SCSI status.
    pub status: u8,
    /// Sense data, 96 bytes, with CHECK CONDITION.
    pub sense: Vec<u8>,
    /// Data of a read.
    pub data: Vec<u8>,
}

/// Something that user space must never do.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Violation {
    /// A completion for a command that is not outstanding.
    UnknownId(u16),
    /// The tail is not the end of an entry.
    Tail(u32),
    /// An entry's length or opcode was changed.
    Header(u32),
    /// The shared memory is smaller than it says.
    OutOfRegion,
}

/// The kernel's side. Clones are handles to the same one.
#[derive(Clone)]
pub struct FakeKernel(Arc<Inner>);

struct Inner {
    memory: OwnedFd,
    size: usize,
    region: Region,
    options: Options,
    events: EventFd,
    state: Mutex<State>,
    answered: Condvar,
}

#[derive(Default)]
struct State {
    head: u32,
    /// How far completions were taken.
    cleaned: u32,
    outstanding: BTreeMap<u16, Outstanding>,
    /// Length and opcode of every entry between `cleaned` and `head`.
    entries: VecDeque<(u32, u32)>,
    blocks: Blocks,
    answers: VecDeque<Answer>,
    keep_data: bool,
    violations: Vec<Violation>,
    kicks: u64,
    answered: u64,
}

struct Outstanding {
    blocks: Vec<usize>,
    read_len: usize,
}

impl From<OutOfRegion> for Violation {
    fn from(_: OutOfRegion) -> Self {
        Self::OutOfRegion
    }
}

impl FakeKernel {
    /// A device without commands.
    pub fn new(options: Options) -> io::Result<Self> {
        let memory = memfd_create(c"tcmu-ring", MFdFlags::MFD_CLOEXEC)?;
        let data_start = abi::MAILBOX_SIZE + options.ring_size as usize;
        let size = data_start.next_multiple_of(BLOCK) + options.blocks * BLOCK;
        nix::unistd::ftruncate(&memory, size as i64)?;
        let region = Region::map(&memory, size)?;
        let flags_word = [abi::MAILBOX_VERSION.to_ne_bytes(), options.flags.to_ne_bytes()].concat();
        let mailbox = region.write(0, &flags_word).and_then(|()| {
            region.store_u32(mailbox::CMDR_OFF, abi::MAILBOX_SIZE as u32, Relaxed)?;
            region.store_u32(mailbox::CMDR_SIZE, options.ring_size, Relaxed)
        });
        mailbox.map_err(|OutOfRegion| io::Error::from(io::ErrorKind::InvalidInput))?;
        let events = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let state = State { blocks: Blocks::new(options.blocks), keep_data: true, ..State::default() };
        Ok(Self(Arc::new(Inner { memory, size, region, options, events, state: Mutex::new(state), answered: Condvar::new() })))
    }

    /// Maps the shared memory once more, as user space does.
    pub fn map(&self) -> io::Result<Region> {
        Region::map(&self.0.memory, self.0.size)
    }

    /// The shared memory, for a test to damage.
    pub fn region(&self) -> &Region {
        &self.0.region
    }

    /// The file behind the shared memory, to hand to another process.
    pub fn memory(&self) -> BorrowedFd<'_> {
        self.0.memory.as_fd()
    }

    /// Size of the shared memory in bytes.
    pub fn size(&self) -> usize {
        self.0.size
    }

    /// The file that becomes readable when there is something in the ring.
    pub fn events(&self) -> BorrowedFd<'_> {
        self.0.events.as_fd()
    }

    /// User space's end of the wake-ups.
    pub fn doorbell(&self) -> Box<dyn Doorbell> {
        Box::new(self.clone())
    }

    /// Whether read data is copied out of the data area into answers (it is at first). Benchmarks switch it off.
    pub fn keep_data(&self, keep: bool) {
        self.0.state.lock().keep_data = keep;
    }

    /// Puts commands into the ring, as many as there is room for, and then rings once. Returns their ids.
    pub fn submit(&self, requests: &[Request]) -> Vec<u16> {
        let ids = self.submit_silently(requests);
        if !ids.is_empty() {
            self.ring();
        }
        ids
    }

    /// Puts commands into the ring without ringing.
    pub fn submit_silently(&self, requests: &[Request]) -> Vec<u16> {
        let mut state = self.0.state.lock();
        let mut ids = Vec::new();
        for request in requests {
            match self.0.push_command(&mut state, request) {
                Ok(Some(id)) => ids.push(id),
                Ok(None) => break,
                Err(OutOfRegion) => {
                    state.violations.push(Violation::OutOfRegion);
                    break;
                }
            }
        }
        ids
    }

    /// Tells user space to look.
    pub fn ring(&self) {
        // The counter cannot overflow in a lifetime of tests.
        let _ = self.0.events.write(1);
    }

    /// Puts a notice into the ring that `ids` were aborted, and rings. False if there is no room.
    pub fn submit_tmr(&self, kind: u8, ids: &[u16]) -> bool {
        let mut state = self.0.state.lock();
        let done = self.0.push_tmr(&mut state, kind, ids).unwrap_or(false);
        drop(state);
        self.ring();
        done
    }

    /// Writes an entry of any bytes after its header, which says `op` and the real length.
    pub fn submit_raw(&self, op: u32, id: u16, body: &[u8]) -> bool {
        let mut state = self.0.state.lock();
        let len = (abi::HEADER_SIZE as usize + body.len()).next_multiple_of(abi::ENTRY_ALIGN as usize) as u32;
        let write = |state: &mut State| -> Result<bool, OutOfRegion> {
            let Some(at) = self.0.make_room(state, len)? else { return Ok(false) };
            self.0.header(at, len, op, id)?;
            self.0.region.write(self.0.offset(at, abi::HEADER_SIZE), body)?;
            self.0.publish(state, len, op)?;
            Ok(true)
        };
        let done = write(&mut state).unwrap_or(false);
        drop(state);
        self.ring();
        done
    }

    /// Moves the head on without writing an entry: what is there is taken for entries.
    pub fn set_head(&self, head: u32) {
        let _ = self.0.region.store_u32(mailbox::HEAD, head, Release);
        self.ring();
    }

    /// Where the next entry goes: offset in the ring.
    pub fn head(&self) -> u32 {
        self.0.state.lock().head
    }

    /// The tail that user space has written.
    pub fn tail(&self) -> u32 {
        self.0.region.load_u32(mailbox::TAIL, Acquire).unwrap_or(u32::MAX)
    }

    /// Empties the ring as `action/reset_ring` does: outstanding commands are answered BUSY.
    pub fn reset(&self) {
        let mut state = self.0.state.lock();
        for (id, outstanding) in std::mem::take(&mut state.outstanding) {
            state.blocks.release(&outstanding.blocks);
            state.answers.push_back(Answer { id, status: 0x08, sense: Vec::new(), data: Vec::new() });
        }
        state.entries.clear();
        state.head = 0;
        state.cleaned = 0;
        let region = &self.0.region;
        let _ = region.store_u32(mailbox::TAIL, 0, Relaxed);
        let _ = region.store_u32(mailbox::HEAD, 0, Release);
        self.0.answered.notify_all();
    }

    /// Takes an answer, waiting for it at most for `timeout`.
    pub fn answer(&self, timeout: Duration) -> Option<Answer> {
        let deadline = Instant::now() + timeout;
        let mut state = self.0.state.lock();
        loop {
            if let Some(answer) = state.answers.pop_front() {
                return Some(answer);
            }
            if self.0.answered.wait_until(&mut state, deadline).timed_out() {
                return state.answers.pop_front();
            }
        }
    }

    /// Takes the answers that are there.
    pub fn answers(&self) -> Vec<Answer> {
        self.0.state.lock().answers.drain(..).collect()
    }

    /// How many commands wait for their answer.
    pub fn outstanding(&self) -> usize {
        self.0.state.lock().outstanding.len()
    }

    /// How often user space has kicked.
    pub fn kicks(&self) -> u64 {
        self.0.state.lock().kicks
    }

    /// How many commands were answered.
    pub fn answered(&self) -> u64 {
        self.0.state.lock().answered
    }

    /// What user space did wrong. After the first, nothing is answered any more, as with the real kernel.
    pub fn violations(&self) -> Vec<Violation> {
        self.0.state.lock().violations.clone()
    }

    /// The completions that user space has written are taken now.
    pub fn take_completions(&self) {
        let mut state = self.0.state.lock();
        if state.violations.is_empty()
            && let Err(violation) = self.0.take_completions(&mut state)
        {
            state.violations.push(violation);
        }
        drop(state);
        self.0.answered.notify_all();
    }
}

impl Doorbell for FakeKernel {
    fn kick(&self) -> io::Result<()> {
        self.0.state.lock().kicks += 1;
        self.take_completions();
        Ok(())
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.events()
    }
}

impl Inner {
    fn offset(&self, at: u32, within: u32) -> usize {
        abi::MAILBOX_SIZE + at as usize + within as usize
    }

    fn block_offset(&self, block: usize) -> usize {
        (abi::MAILBOX_SIZE + self.options.ring_size as usize).next_multiple_of(BLOCK) + block * BLOCK
    }

    fn push_command(&self, state: &mut State, request: &Request) -> Result<Option<u16>, OutOfRegion> {
        let bytes = request.payload.len().max(request.read_len);
        let Some(blocks) = state.blocks.take(bytes.div_ceil(BLOCK)) else { return Ok(None) };
        let iovecs = self.iovecs(&blocks, bytes);
        let fixed = (command::IOV + iovecs.len() as u32 * command::IOV_SIZE).max(command::MIN_SIZE);
        let len = fixed + (request.cdb.len() as u32).next_multiple_of(abi::ENTRY_ALIGN);
        let Some(at) = self.make_room(state, len)? else {
            state.blocks.release(&blocks);
            return Ok(None);
        };
        for (block, part) in blocks.iter().zip(request.payload.chunks(BLOCK)) {
            self.region.write(self.block_offset(*block), part)?;
        }
        let id = (1..=u16::MAX).find(|id| !state.outstanding.contains_key(id)).unwrap_or(0);
        self.header(at, len, abi::OP_CMD, id)?;
        // The kernel clears the whole entry.
        for within in (command::IOV_CNT..len).step_by(8) {
            self.region.store_u64(self.offset(at, within), 0)?;
        }
        self.region.store_u32(self.offset(at, command::IOV_CNT), iovecs.len() as u32, Relaxed)?;
        self.region.store_u64(self.offset(at, command::CDB_OFF), self.offset(at, fixed) as u64)?;
        for (index, (base, len)) in iovecs.iter().enumerate() {
            let within = command::IOV + index as u32 * command::IOV_SIZE;
            self.region.store_u64(self.offset(at, within), *base as u64)?;
            self.region.store_u64(self.offset(at, within + 8), *len as u64)?;
        }
        self.region.write(self.offset(at, fixed), &request.cdb)?;
        state.outstanding.insert(id, Outstanding { blocks, read_len: request.read_len });
        self.publish(state, len, abi::OP_CMD)?;
        Ok(Some(id))
    }

    fn push_tmr(&self, state: &mut State, kind: u8, ids: &[u16]) -> Result<bool, OutOfRegion> {
        let len = (tmr::IDS + 2 * ids.len() as u32).next_multiple_of(abi::ENTRY_ALIGN);
        let Some(at) = self.make_room(state, len)? else { return Ok(false) };
        self.header(at, len, abi::OP_TMR, 0)?;
        self.region.store_u32(self.offset(at, tmr::KIND), u32::from_ne_bytes([kind, 0, 0, 0]), Relaxed)?;
        self.region.store_u32(self.offset(at, tmr::COUNT), ids.len() as u32, Relaxed)?;
        let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_ne_bytes()).collect();
        self.region.write(self.offset(at, tmr::IDS), &bytes)?;
        self.publish(state, len, abi::OP_TMR)?;
        Ok(true)
    }

    /// Adjacent blocks make one iovec, unless the data area is to look fragmented.
    fn iovecs(&self, blocks: &[usize], bytes: usize) -> Vec<(usize, usize)> {
        let mut iovecs: Vec<(usize, usize)> = Vec::new();
        let mut rest = bytes;
        for block in blocks {
            let (base, len) = (self.block_offset(*block), rest.min(BLOCK));
            rest -= len;
            match iovecs.last_mut() {
                Some(last) if !self.options.fragmented && last.0 + last.1 == base => last.1 += len,
                _ => iovecs.push((base, len)),
            }
        }
        iovecs
    }

    /// Finds a place for an entry, after filler up to the end of the ring if need be.
    fn make_room(&self, state: &mut State, len: u32) -> Result<Option<u32>, OutOfRegion> {
        let size = self.options.ring_size;
        let used = (state.head + size - state.cleaned) % size;
        let to_end = size - state.head;
        let need = if to_end < len { to_end + len } else { len };
        // Head must not catch up with the tail: the ring would look empty.
        if used + need >= size {
            return Ok(None);
        }
        if to_end < len {
            self.header(state.head, to_end, abi::OP_PAD, 0)?;
            self.publish(state, to_end, abi::OP_PAD)?;
        }
        Ok(Some(state.head))
    }

    fn header(&self, at: u32, len: u32, op: u32, id: u16) -> Result<(), OutOfRegion> {
        let [id0, id1] = id.to_ne_bytes();
        self.region.store_u32(self.offset(at, 0), len | op, Relaxed)?;
        self.region.store_u32(self.offset(at, command::ID_FLAGS), u32::from_ne_bytes([id0, id1, 0, 0]), Relaxed)
    }

    fn publish(&self, state: &mut State, len: u32, op: u32) -> Result<(), OutOfRegion> {
        state.entries.push_back((len, op));
        state.head = (state.head + len) % self.options.ring_size;
        self.region.store_u32(mailbox::HEAD, state.head, Release)
    }

    fn take_completions(&self, state: &mut State) -> Result<(), Violation> {
        let tail = self.region.load_u32(mailbox::TAIL, Acquire)?;
        while state.cleaned != tail {
            let at = state.cleaned;
            let (len, op) = state.entries.pop_front().ok_or(Violation::Tail(tail))?;
            if self.region.load_u32(self.offset(at, 0), Relaxed)? != len | op {
                return Err(Violation::Header(at));
            }
            if op == abi::OP_CMD {
                self.take_completion(state, at)?;
            }
            state.cleaned = (at + len) % self.options.ring_size;
        }
        Ok(())
    }

    fn take_completion(&self, state: &mut State, at: u32) -> Result<(), Violation> {
        let [id0, id1, _, uflags] = self.region.load_u32(self.offset(at, command::ID_FLAGS), Relaxed)?.to_ne_bytes();
        let id = u16::from_ne_bytes([id0, id1]);
        let outstanding = state.outstanding.remove(&id).ok_or(Violation::UnknownId(id))?;
        let [status, ..] = self.region.load_u32(self.offset(at, command::STATUS), Relaxed)?.to_ne_bytes();
        let read_len = self.region.load_u32(self.offset(at, command::READ_LEN), Relaxed)?;
        let takes_len = self.options.flags & abi::FLAG_READ_LEN != 0 && uflags & abi::UFLAG_READ_LEN != 0 && read_len != 0;
        let mut len = outstanding.read_len;
        if takes_len {
            len = len.min(read_len as usize);
        } else if status == abi::STATUS_CHECK_CONDITION {
            len = 0;
        }
        let mut sense = Vec::new();
        if status == abi::STATUS_CHECK_CONDITION {
            sense = vec![0; abi::SENSE_SIZE];
            self.region.read(self.offset(at, command::SENSE), &mut sense)?;
        }
        let mut data = Vec::new();
        if state.keep_data && len > 0 {
            data = vec![0; len];
            for (block, part) in outstanding.blocks.iter().zip(data.chunks_mut(BLOCK)) {
                self.region.read(self.block_offset(*block), part)?;
            }
        }
        state.blocks.release(&outstanding.blocks);
        state.answers.push_back(Answer { id, status, sense, data });
        state.answered += 1;
        Ok(())
    }
}
