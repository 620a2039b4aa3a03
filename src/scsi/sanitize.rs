//! SANITIZE (overwrite, block erase, exit failure mode) and FORMAT UNIT: what rewrites the whole medium (SBC-3 5.24, 5.5).
//!
//! While one runs, in a thread of its own, commands for the medium end with its progress.

use crate::scsi::cdb::Cdb;
use crate::scsi::data::Data;
use crate::scsi::lun::{Command, State};
use crate::scsi::opcode::Reply;
use crate::scsi::operation::{Kind, Waited};
use crate::scsi::sense::{Fault, Triple};
use formats::ZeroMode;
use std::io::IoSlice;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;

/// Bytes written between two reports of progress, and erased unless the image's units are larger.
const STEP: u64 = 4 << 20;

/// What is done to every byte of the medium, pass by pass.
enum Work {
    /// Each pass writes its pattern, repeated.
    Overwrite(Vec<Vec<u8>>),
    /// Space is given back, and what stays is zeroed.
    Erase,
}

pub fn overwrite(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    let list_len = usize::from(cdb.u16(7));
    let block = usize::try_from(command.block_size()).unwrap_or(0);
    if !(5..=4 + block).contains(&list_len) {
        return Err(Fault::cdb(7, None));
    }
    let mut list = vec![0; list_len];
    if data.copy_out(0, &mut list) < list_len {
        return Err(Triple::INVALID_FIELD_IN_COMMAND_IU.into());
    }
    let (invert, passes) = (list[0] & 0x80 != 0, list[0] & 0x1F);
    if list[0] & 0x60 != 0 {
        return Err(Fault::parameter(0, Some(6)));
    }
    if passes == 0 {
        return Err(Fault::parameter(0, Some(4)));
    }
    if list[1] != 0 {
        return Err(Fault::parameter(1, None));
    }
    if usize::from(u16::from_be_bytes([list[2], list[3]])) != list_len - 4 {
        return Err(Fault::parameter(2, None));
    }
    // The pattern begins anew with each block.
    let pattern: Vec<u8> = list[4..].iter().copied().cycle().take(block).collect();
    let inverted: Vec<u8> = pattern.iter().map(|byte| !byte).collect();
    let patterns = (0..passes).map(|pass| if invert && pass % 2 == 1 { inverted.clone() } else { pattern.clone() });
    start(command, sanitize_kind(cdb), cdb.has(1, 0x80), Work::Overwrite(patterns.collect()))
}

pub fn block_erase(command: &Command<'_>, cdb: &Cdb<'_>, _: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    no_parameters(cdb)?;
    start(command, sanitize_kind(cdb), cdb.has(1, 0x80), Work::Erase)
}

pub fn exit_failure_mode(command: &Command<'_>, cdb: &Cdb<'_>, _: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    no_parameters(cdb)?;
    if command.lun.operation.exit_failure() { Ok(Reply::Done) } else { Err(Fault::cdb(1, Some(4))) }
}

fn no_parameters(cdb: &Cdb<'_>) -> Result<(), Fault> {
    if cdb.u16(7) == 0 { Ok(()) } else { Err(Fault::cdb(7, None)) }
}

/// AUSE says whether EXIT FAILURE MODE may end a failure.
fn sanitize_kind(cdb: &Cdb<'_>) -> Kind {
    Kind::Sanitize { may_exit: cdb.has(1, 0x20) }
}

/// A format without protection information, defect lists or an initialization pattern; the blocks read as zeros afterwards.
pub fn format_unit(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    let (long, has_data) = (cdb.has(1, 0x20), cdb.has(1, 0x10));
    let mut immediate = false;
    if has_data {
        let mut list = [0; 8];
        let len = if long { 8 } else { 4 };
        if data.copy_out(0, &mut list[..len]) < len {
            return Err(Triple::PARAMETER_LIST_LENGTH_ERROR.into());
        }
        // IMMED is all that may be set; FOV alone has no effect. Neither are there defect lists to be added.
        if let Some(at) = list.iter().enumerate().position(|(at, byte)| byte & !(if at == 1 { 0x82 } else { 0 }) != 0) {
            return Err(Fault::parameter(at, None));
        }
        immediate = list[1] & 0x02 != 0;
    } else if long || cdb.has(1, 0x0F) {
        return Err(Fault::cdb(1, Some(if long { 5 } else { 3 })));
    }
    start(command, Kind::Format, immediate, Work::Erase)
}

/// Hands the work to a thread, and waits for it unless the command is immediate. A command that is given up meanwhile ends at once: its
/// data were taken over already, and the work goes on without it.
fn start(command: &Command<'_>, kind: Kind, immediate: bool, work: Work) -> Result<Reply, Fault> {
    command.lun.operation.begin(kind)?;
    let mut engaged = Engaged { lun: command.lun.clone(), end: None };
    let (wake, waited) = sync_channel(1);
    if !immediate {
        command.lun.operation.wait(command.tag, wake);
    }
    let (device, limits) = (command.device.clone(), *command.limits);
    let background = move || {
        let command = Command { lun: &engaged.lun, device: &device, limits: &limits, no_wait: false, again: false, tag: None };
        engaged.end = Some(run(&command, &work));
        drop(device);
        drop(engaged);
    };
    if std::thread::Builder::new().name("scsi-sanitize".into()).spawn(background).is_err() {
        return Err(Triple::INTERNAL_FAILURE.into());
    }
    if immediate {
        return Ok(Reply::Done);
    }
    match waited.recv() {
        Ok(Waited::Ended(result)) => result.map(|()| Reply::Done),
        Ok(Waited::GivenUp) => Err(command.lun.operation.state().unwrap_or(Triple::NO_SENSE.into())),
        Err(_) => Err(Triple::INTERNAL_FAILURE.into()),
    }
}

/// The unit's operation under way. Dropped without an end (by a panic below, say) it has failed.
struct Engaged {
    lun: Arc<State>,
    end: Option<Result<(), Fault>>,
}

impl Drop for Engaged {
    fn drop(&mut self) {
        let end = self.end.take().unwrap_or(Err(Triple::INTERNAL_FAILURE.into()));
        self.lun.operation.end(end.is_ok());
        // The operation's state keeps the failure for whoever asks, if nobody waits.
        self.lun.operation.wake(Waited::Ended(end));
    }
}

/// Does the work once all commands that were under way have ended.
fn run(command: &Command<'_>, work: &Work) -> Result<(), Fault> {
    let size = command.lun.blocks() * command.block_size();
    let _exclusive = command.lun.ranges.exclusive(0..size);
    match work {
        Work::Erase => {
            // Less than a unit would not be given back.
            let step = STEP.next_multiple_of(command.limits.granularity.max(1));
            each_step(command, size, step, 0, 1, |at, len| {
                if command.can_unmap() {
                    command.device.discard(at, len)?;
                }
                command.device.zero(at, len, ZeroMode::MayUnmap)
            })?;
        }
        Work::Overwrite(patterns) => {
            for (pass, pattern) in patterns.iter().enumerate() {
                let repeats = usize::try_from(STEP).unwrap_or(0) / pattern.len().max(1);
                let bytes = pattern.repeat(repeats.max(1));
                each_step(command, size, STEP, pass as u64, patterns.len() as u64, |at, len| {
                    let len = usize::try_from(len).map_or(bytes.len(), |len| len.min(bytes.len()));
                    command.device.write(&[IoSlice::new(&bytes[..len])], at)
                })?;
                // Or the next pass would only replace this one in the cache.
                command.flush()?;
            }
        }
    }
    command.flush()
}

/// Calls `step` with one piece of the medium, `step_len` bytes long, after the other; this is pass `pass` of `passes`.
fn each_step(
    command: &Command<'_>,
    size: u64,
    step_len: u64,
    pass: u64,
    passes: u64,
    mut step: impl FnMut(u64, u64) -> formats::Result<()>,
) -> Result<(), Fault> {
    let mut at = 0;
    while at < size {
        let len = step_len.min(size - at);
        step(at, len).map_err(|e| command.write_error(&e))?;
        at += len;
        let done = pass.saturating_mul(size).saturating_add(at);
        command.lun.operation.progress(done, passes.saturating_mul(size));
    }
    Ok(())
}
