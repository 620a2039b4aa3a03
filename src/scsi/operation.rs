//! The long operation that a unit may be engaged in: SANITIZE or FORMAT UNIT, how far it is, what its failure leaves, and the
//! command that waits for its end.

use crate::scsi::sense::{Fault, Triple};
use parking_lot::{Condvar, Mutex};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;

/// Which operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// SANITIZE. After a failure the medium stays out of reach; EXIT FAILURE MODE may lift that if the command allowed it.
    Sanitize {
        /// AUSE of the command.
        may_exit: bool,
    },
    /// FORMAT UNIT.
    Format,
}

#[derive(Clone, Copy, Default)]
enum State {
    #[default]
    Idle,
    /// With progress in 65536ths.
    Running(Kind, u16),
    Failed(Kind),
}

/// The state of one logical unit.
#[derive(Default)]
pub struct Operation {
    /// Not idle; spares every command the lock.
    engaged: AtomicBool,
    state: Mutex<State>,
    ended: Condvar,
    waiting: Mutex<Option<Waiting>>,
}

/// The command that began an operation and ends with it.
struct Waiting {
    /// The transport's number of the command.
    tag: Option<u16>,
    wake: SyncSender<Waited>,
}

/// Why a command need not wait any longer.
pub enum Waited {
    /// The operation ended so.
    Ended(Result<(), Fault>),
    /// Nobody wants the command's answer any more. The operation goes on (SBC-3 4.11: no task management function ends it).
    GivenUp,
}

/// SANITIZE's operation code.
const SANITIZE: u8 = 0x48;
/// FORMAT UNIT's operation code.
const FORMAT_UNIT: u8 = 0x04;

impl Operation {
    /// Refuses a command for the medium while an operation runs, or after it failed, unless it is one that repairs that.
    pub fn admit(&self, opcode: u8) -> Result<(), Fault> {
        if !self.engaged.load(Ordering::Acquire) {
            return Ok(());
        }
        match *self.state.lock() {
            State::Failed(Kind::Sanitize { .. }) if opcode == SANITIZE => Ok(()),
            State::Failed(Kind::Format) if opcode == SANITIZE || opcode == FORMAT_UNIT => Ok(()),
            state => sense_of(state).map_or(Ok(()), Err),
        }
    }

    /// What REQUEST SENSE tells of it.
    pub fn state(&self) -> Option<Fault> {
        if self.engaged.load(Ordering::Acquire) { sense_of(*self.state.lock()) } else { None }
    }

    /// The command `tag` waits for the end, and is told of it through `wake`.
    pub fn wait(&self, tag: Option<u16>, wake: SyncSender<Waited>) {
        *self.waiting.lock() = Some(Waiting { tag, wake });
    }

    /// Tells the command that waits, if there is one still.
    pub fn wake(&self, why: Waited) {
        if let Some(waiting) = self.waiting.lock().take() {
            // A command that is no longer there needs no waking.
            let _ = waiting.wake.try_send(why);
        }
    }

    /// These commands' answers are not wanted any more.
    pub fn given_up(&self, tags: &[u16]) {
        let named = self.waiting.lock().as_ref().and_then(|waiting| waiting.tag).is_some_and(|tag| tags.contains(&tag));
        if named {
            self.wake(Waited::GivenUp);
        }
    }

    /// Begins, unless one is under way.
    pub fn begin(&self, kind: Kind) -> Result<(), Fault> {
        let mut state = self.state.lock();
        if let State::Running(..) = *state {
            return sense_of(*state).map_or(Ok(()), Err);
        }
        *state = State::Running(kind, 0);
        self.engaged.store(true, Ordering::Release);
        Ok(())
    }

    /// So many of so many steps are done.
    pub fn progress(&self, done: u64, total: u64) {
        if let State::Running(_, progress) = &mut *self.state.lock() {
            let part = u128::from(done) * 65536 / u128::from(total.max(1));
            *progress = u16::try_from(part).unwrap_or(u16::MAX);
        }
    }

    /// One is under way.
    pub fn is_running(&self) -> bool {
        self.engaged.load(Ordering::Acquire) && matches!(*self.state.lock(), State::Running(..))
    }

    /// Waits while one is under way.
    pub fn wait_for_end(&self) {
        self.ended.wait_while(&mut self.state.lock(), |state| matches!(state, State::Running(..)));
    }

    /// Ends.
    pub fn end(&self, well: bool) {
        let mut state = self.state.lock();
        *state = match *state {
            State::Running(kind, _) if !well => State::Failed(kind),
            _ => State::Idle,
        };
        self.engaged.store(!matches!(*state, State::Idle), Ordering::Release);
        self.ended.notify_all();
    }

    /// EXIT FAILURE MODE: gives the medium back after a failed SANITIZE that allowed it.
    pub fn exit_failure(&self) -> bool {
        let mut state = self.state.lock();
        match *state {
            State::Failed(Kind::Sanitize { may_exit: false }) => return false,
            State::Failed(Kind::Sanitize { may_exit: true }) => *state = State::Idle,
            _ => {}
        }
        self.engaged.store(!matches!(*state, State::Idle), Ordering::Release);
        true
    }
}

fn sense_of(state: State) -> Option<Fault> {
    match state {
        State::Idle => None,
        State::Running(Kind::Sanitize { .. }, progress) => Some(Fault::progress(Triple::SANITIZE_IN_PROGRESS, progress)),
        State::Running(Kind::Format, progress) => Some(Fault::progress(Triple::FORMAT_IN_PROGRESS, progress)),
        State::Failed(Kind::Sanitize { .. }) => Some(Triple::SANITIZE_FAILED.into()),
        State::Failed(Kind::Format) => Some(Triple::FORMAT_FAILED.into()),
    }
}
