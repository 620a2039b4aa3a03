//! A SCSI logical unit as a [`Service`].

use super::Service;
use crate::scsi::{Data, Lun, Outcome};
use crate::tcmu::{Command, Completion};

impl Service for Lun {
    fn try_execute(&self, command: &mut Command) -> Option<Completion> {
        let (cdb, mut data) = command.parts();
        let mut slices = data.slices_mut();
        Lun::try_execute(self, cdb, &mut Data::new(&mut slices)).map(Completion::from)
    }

    fn execute(&self, command: &mut Command) -> Completion {
        let (cdb, mut data) = command.parts();
        let mut slices = data.slices_mut();
        Lun::execute(self, cdb, &mut Data::new(&mut slices)).into()
    }
}

impl From<Outcome> for Completion {
    fn from(outcome: Outcome) -> Self {
        match outcome.sense {
            Some(sense) => Completion::check_condition(sense.as_bytes()),
            None if outcome.status == crate::scsi::Status::Good => Completion { read_len: outcome.data_in, ..Completion::good() },
            None => Completion::status(outcome.status as u8),
        }
    }
}
