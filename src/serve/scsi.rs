//! A SCSI logical unit as a [`Service`].

use super::{Kind, Service};
use crate::scsi::opcode::{self, Direction};
use crate::scsi::{Data, Lun, Outcome, Status};
use crate::tcmu::{Command, Completion, TaskManagement};

impl Service for Lun {
    fn try_execute(&self, command: &mut Command) -> Option<Completion> {
        if command.recovered() {
            return None;
        }
        let (cdb, mut data) = command.parts();
        let mut slices = data.slices_mut();
        let outcome = Lun::try_execute(self, cdb, &mut Data::new(&mut slices))?;
        Some(completion(outcome, cdb))
    }

    fn execute(&self, command: &mut Command) -> Completion {
        let (recovered, tag) = (command.recovered(), command.id());
        let (cdb, mut data) = command.parts();
        let mut slices = data.slices_mut();
        let mut data = Data::new(&mut slices);
        let outcome = if recovered { self.execute_again(tag, cdb, &mut data) } else { self.execute_tagged(tag, cdb, &mut data) };
        completion(outcome, cdb)
    }

    fn kind(&self, opcode: u8) -> Kind {
        match opcode {
            0x08 | 0x28 | 0x88 | 0xA8 => Kind::Read,
            0x0A | 0x2A | 0x2E | 0x8A | 0x8B | 0x8E | 0x9C | 0xAA | 0xAE => Kind::Write,
            _ => Kind::Other,
        }
    }

    fn task_management(&self, notice: &TaskManagement) {
        tracing::debug!("the target manages tasks: {notice:?}");
        self.given_up(&notice.commands);
    }
}

fn completion(outcome: Outcome, cdb: &[u8]) -> Completion {
    match (outcome.status, outcome.sense) {
        (Status::Good, _) => Completion { read_len: outcome.data_in, ..Completion::good() },
        (Status::CheckCondition, sense) => Completion::check_condition(sense.as_ref().map_or(&[], |sense| sense.as_bytes())),
        (status @ (Status::Busy | Status::TaskSetFull), _) => {
            // The buffer of a command that reads was not filled, and that of a command that writes must not be touched.
            let rows = cdb.first().and_then(|&opcode| opcode::rows(opcode)).unwrap_or_default();
            let reads = rows.iter().any(|row| row.direction == Direction::In);
            Completion { read_len: reads.then_some(0), ..Completion::status(status as u8) }
        }
    }
}
