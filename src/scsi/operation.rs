//! The long operation that a unit may be engaged in: SANITIZE or FORMAT UNIT, how far it is, and what its failure leaves.

use crate::scsi::sense::{Fault, Triple};
use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

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

    /// Ends.
    pub fn end(&self, well: bool) {
        let mut state = self.state.lock();
        *state = match *state {
            State::Running(kind, _) if !well => State::Failed(kind),
            _ => State::Idle,
        };
        self.engaged.store(!matches!(*state, State::Idle), Ordering::Release);
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
