//! Which command is in which slot of the ring, and which completion can be written next. Bookkeeping only: no shared memory.
//!
//! The kernel takes completions from the slots at the tail, whatever command the slot was made for. Writing a response into the
//! slot of a command that is not completed would destroy the only copy of it that outlives this process. So that command first
//! moves to the slot of the one being completed, which nobody needs any more: the slots between tail and cursor always hold
//! exactly the commands in flight, in some order. A completion whose slot is too small for the command at the tail waits until
//! another one makes way.

use super::entry::{Header, Shape};
use super::intent::Response;
use std::collections::VecDeque;

/// The slots between the tail and the cursor, and the commands in them.
#[derive(Debug, Default)]
pub(super) struct Slots {
    queue: VecDeque<Slot>,
    /// How many slots have left the queue: numbers of slots count from the first one ever.
    departed: u64,
    /// By command id. The kernel uses the lowest free id.
    live: Vec<Option<Live>>,
    live_count: usize,
    /// Responses that are not written yet.
    waiting: Vec<Response>,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    at: u32,
    len: u32,
    /// The command whose request is in the slot; none in filler and notices.
    owner: Option<u16>,
}

#[derive(Clone, Copy, Debug)]
struct Live {
    slot: u64,
    shape: Shape,
    kflags: u8,
    finished: bool,
}

/// What to do at the tail.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Move the tail by so many bytes.
    Skip(u32),
    /// Write the response into the slot, after moving the command in it to a spare slot if `moves` says so, and move the tail.
    Respond {
        /// The slot at the tail, with the id of the command that is in it.
        slot: SlotAt,
        moves: Option<(u32, Shape)>,
        response: Response,
    },
}

/// Place, length and content of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SlotAt {
    pub at: u32,
    pub len: u32,
    pub id: u16,
    pub kflags: u8,
}

impl Slots {
    /// How many commands are in flight.
    pub fn live_count(&self) -> usize {
        self.live_count
    }

    /// How many completed commands wait for a slot.
    pub fn waiting_count(&self) -> usize {
        self.waiting.len()
    }

    /// Whether the command is in flight.
    pub fn is_live(&self, id: u16) -> bool {
        self.live.get(usize::from(id)).is_some_and(Option::is_some)
    }

    /// A slot that needs no answer was fetched.
    pub fn push_filler(&mut self, at: u32, len: u32) {
        self.queue.push_back(Slot { at, len, owner: None });
    }

    /// A command was fetched; its id is not in use.
    pub fn push_command(&mut self, header: &Header, shape: Shape) {
        let index = usize::from(header.id);
        if self.live.len() <= index {
            self.live.resize(index + 1, None);
        }
        let slot = self.departed + self.queue.len() as u64;
        if let Some(entry) = self.live.get_mut(index) {
            *entry = Some(Live { slot, shape, kflags: header.kflags, finished: false });
            self.live_count += 1;
        }
        self.queue.push_back(Slot { at: header.at, len: header.len, owner: Some(header.id) });
    }

    /// A command has been executed. False if it was not in flight.
    pub fn finish(&mut self, response: Response) -> bool {
        match self.live.get_mut(usize::from(response.id)) {
            Some(Some(live)) if !live.finished => {
                live.finished = true;
                self.waiting.push(response);
                true
            }
            _ => false,
        }
    }

    /// The next thing to do at the tail, which the caller then must do; none if the tail has to stay.
    pub fn step(&mut self, out_of_order: bool) -> Option<Step> {
        let front = *self.queue.front()?;
        let Some(owner) = front.owner else {
            self.depart();
            return Some(Step::Skip(front.len));
        };
        if self.waiting.is_empty() {
            return None;
        }
        let live = self.live.get(usize::from(owner)).copied().flatten()?;
        let slot = SlotAt { at: front.at, len: front.len, id: owner, kflags: live.kflags };
        if live.finished {
            let index = self.waiting.iter().position(|response| response.id == owner)?;
            let response = self.waiting.swap_remove(index);
            self.forget(owner);
            self.depart();
            return Some(Step::Respond { slot, moves: None, response });
        }
        if !out_of_order {
            return None;
        }
        let need = live.shape.need();
        let index = self.waiting.iter().position(|response| self.slot_of(response.id).is_some_and(|slot| slot.len >= need))?;
        let spare_number = self.live.get(usize::from(self.waiting.get(index)?.id)).copied().flatten()?.slot;
        let response = self.waiting.swap_remove(index);
        self.forget(response.id);
        let place = usize::try_from(spare_number.checked_sub(self.departed)?).ok()?;
        let spare = self.queue.get_mut(place)?;
        spare.owner = Some(owner);
        let spare_at = spare.at;
        // The command's CDB now follows its iovecs at once.
        let shape = Shape { cdb_at: live.shape.iovecs_end(), ..live.shape };
        if let Some(entry) = self.live.get_mut(usize::from(owner)) {
            *entry = Some(Live { slot: spare_number, shape, ..live });
        }
        self.depart();
        Some(Step::Respond { slot, moves: Some((spare_at, live.shape)), response })
    }

    /// Forgets everything, and says how many commands were in flight and are still being executed.
    pub fn clear(&mut self) -> usize {
        let executing = self.live_count - self.waiting.len();
        *self = Self::default();
        executing
    }

    fn slot_of(&self, id: u16) -> Option<&Slot> {
        let live = self.live.get(usize::from(id))?.as_ref()?;
        self.queue.get(usize::try_from(live.slot.checked_sub(self.departed)?).ok()?)
    }

    fn forget(&mut self, id: u16) {
        if let Some(entry) = self.live.get_mut(usize::from(id))
            && entry.take().is_some()
        {
            self.live_count -= 1;
        }
    }

    fn depart(&mut self) {
        self.queue.pop_front();
        self.departed += 1;
    }
}
