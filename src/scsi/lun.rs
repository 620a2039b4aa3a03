//! A logical unit: its state, and the rules that every command goes through before its own function runs.
//!
//! Holds the image, the identity, the mode parameters, the range lock and pending unit attentions. Commands live in their
//! own modules and see a [`Command`].

use crate::scsi::attention::Attention;
use crate::scsi::cdb::{Cdb, Extent};
use crate::scsi::copy::CopyPeers;
use crate::scsi::copy_results::Copies;
use crate::scsi::data::Data;
use crate::scsi::failure_log::FailureLog;
use crate::scsi::log::Counters;
use crate::scsi::mode::Parameters;
use crate::scsi::opcode::{self, Access, Blocking, Direction, Entry, Presence, Reply};
use crate::scsi::operation::Operation;
use crate::scsi::ports::TargetPorts;
use crate::scsi::range_lock::RangeLock;
use crate::scsi::sense::{Fault, Sense, Triple};
use crate::scsi::vpd;
use formats::{BlockDevice, Limits, MapExtent, ZeroMode};
use parking_lot::{RwLock, RwLockWriteGuard};
use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// SCSI status (SAM-5 5.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// The command ended well.
    Good = 0x00,
    /// It did not: the sense data say why.
    CheckCondition = 0x02,
    /// Try again.
    Busy = 0x08,
    /// No resources for this command now.
    TaskSetFull = 0x28,
}

/// How a command ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The status to send.
    pub status: Status,
    /// Sense data, if the status is CHECK CONDITION.
    pub sense: Option<Sense>,
    /// For data-in commands that ended well: how many bytes of the buffer are valid. The rest of it is zeros.
    pub data_in: Option<u32>,
}

/// How the logical unit introduces itself.
#[derive(Clone)]
pub struct Identity {
    /// T10 vendor identification, up to 8 ASCII characters.
    pub vendor: String,
    /// Product identification, up to 16.
    pub product: String,
    /// Product revision, up to 4.
    pub revision: String,
    /// The unit serial number, asked for at each INQUIRY: the kernel's may be set after the device went on line.
    pub serial: Arc<dyn Fn() -> Option<String> + Send + Sync>,
}

impl Identity {
    /// The project's own names, with a serial number that does not change.
    pub fn with_serial(serial: impl Into<String>) -> Self {
        let serial = serial.into();
        Self::with_serial_source(move || Some(serial.clone()))
    }

    /// The project's own names, with a serial number that is looked up when asked for.
    pub fn with_serial_source(serial: impl Fn() -> Option<String> + Send + Sync + 'static) -> Self {
        Self {
            vendor: "IMG-TCMU".into(),
            product: "disk image".into(),
            revision: env!("CARGO_PKG_VERSION").into(),
            serial: Arc::new(serial),
        }
    }
}

/// What the logical unit is to be, apart from what the image says.
#[derive(Clone, Debug)]
pub struct Config {
    /// Logical block size in bytes: 512 or 4096.
    pub block_size: u32,
    /// Size in bytes, if it is to be less than the image's.
    pub size: Option<u64>,
    /// Refuse writes even if the image would take them.
    pub read_only: bool,
    /// Writes may stay in a volatile cache until they are synchronized (WCE when the unit starts).
    pub write_cache: bool,
    /// Offer UNMAP if the image can discard.
    pub discard: bool,
    /// Longest transfer of one command in blocks (VPD B0).
    pub max_transfer_blocks: u32,
    /// The transfer length that suits best in blocks (VPD B0); 0 says nothing.
    pub optimal_transfer_blocks: u32,
    /// The image's format records the sector size its guest used, so that the unit's blocks must be of that size. Otherwise
    /// they must only be no smaller.
    pub fixed_sector: bool,
    /// The kernel answers reservations (its `emulate_pr`), so that they are among the supported operation codes.
    pub kernel_reservations: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            block_size: 512,
            size: None,
            read_only: false,
            write_cache: true,
            discard: true,
            max_transfer_blocks: 1 << 16,
            optimal_transfer_blocks: 0,
            fixed_sector: false,
            kernel_reservations: true,
        }
    }
}

/// Why a logical unit cannot be made of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Neither 512 nor 4096.
    #[error("the block size is {0}; it must be 512 or 4096")]
    BlockSize(u32),
    /// The guest of the image addressed it in other sectors.
    #[error("the image has sectors of {image} bytes and the LUN blocks of {lun}: create the backstore with hw_block_size={image}")]
    Sector {
        /// Of the image.
        image: u32,
        /// Of the logical unit.
        lun: u32,
    },
    /// Less than one block.
    #[error("{0} bytes are less than one block")]
    TooSmall(u64),
    /// The image is smaller than asked for.
    #[error("the LUN is to have {lun} bytes and the image has {image}")]
    TooLarge {
        /// Of the image.
        image: u64,
        /// Of the logical unit.
        lun: u64,
    },
}

/// Come again.
const BUSY: Outcome = Outcome { status: Status::Busy, sense: None, data_in: None };

/// Longest transfer that is never refused, whatever is published.
const MAX_TRANSFER_BLOCKS: u32 = 1 << 16;

/// A logical unit. Clones are the same unit.
#[derive(Clone)]
pub struct Lun {
    pub(super) state: Arc<State>,
}

/// What a logical unit is made of. Operations that outlive their command hold it.
pub struct State {
    backing: RwLock<Backing>,
    /// The image is being exchanged: commands are told to come again.
    exchanging: AtomicBool,
    pub(super) identity: Identity,
    pub(super) config: Config,
    /// Capacity in blocks.
    blocks: AtomicU64,
    pub(super) parameters: Parameters,
    pub(super) ranges: RangeLock,
    pub(super) attention: Attention,
    pub(super) operation: Operation,
    pub(super) copies: Copies,
    pub(super) counters: Counters,
    failures: FailureLog,
    pub(super) ports: Option<Arc<dyn TargetPorts>>,
    pub(super) peers: Option<Arc<dyn CopyPeers>>,
}

/// The image behind a logical unit, and what it said of itself when it was put there.
struct Backing {
    device: Arc<dyn BlockDevice>,
    limits: Limits,
}

impl Backing {
    fn new(device: Arc<dyn BlockDevice>, config: &Config) -> Result<Self, ConfigError> {
        let limits = device.limits();
        match config.block_size {
            512 | 4096 if limits.sector == config.block_size => {}
            512 | 4096 if limits.sector < config.block_size && !config.fixed_sector => {}
            512 | 4096 => return Err(ConfigError::Sector { image: limits.sector, lun: config.block_size }),
            other => return Err(ConfigError::BlockSize(other)),
        }
        Ok(Self { device, limits })
    }
}

/// No image, in the place of one with these limits.
struct Absent(Limits);

impl Absent {
    fn error() -> formats::Error {
        formats::Error::new(formats::Kind::NotFound, "there is no image behind this unit")
    }
}

impl BlockDevice for Absent {
    fn limits(&self) -> Limits {
        self.0
    }

    fn read(&self, _: &mut [IoSliceMut<'_>], _: u64) -> formats::Result<()> {
        Err(Self::error())
    }

    fn write(&self, _: &[IoSlice<'_>], _: u64) -> formats::Result<()> {
        Err(Self::error())
    }

    fn zero(&self, _: u64, _: u64, _: ZeroMode) -> formats::Result<()> {
        Err(Self::error())
    }

    fn discard(&self, _: u64, _: u64) -> formats::Result<()> {
        Err(Self::error())
    }

    fn flush(&self) -> formats::Result<()> {
        Err(Self::error())
    }

    fn map(&self, _: u64, _: u64) -> formats::Result<MapExtent> {
        Err(Self::error())
    }
}

impl Lun {
    /// A logical unit over `device` that knows of no target ports and no other units.
    pub fn new(device: Arc<dyn BlockDevice>, identity: Identity, config: Config) -> Result<Self, ConfigError> {
        Self::with_surroundings(device, identity, config, None, None)
    }

    /// A logical unit over `device`. With `ports` it reports (and may change) target port group states; with `peers`
    /// EXTENDED COPY reaches other units.
    pub fn with_surroundings(
        device: Arc<dyn BlockDevice>,
        identity: Identity,
        config: Config,
        ports: Option<Arc<dyn TargetPorts>>,
        peers: Option<Arc<dyn CopyPeers>>,
    ) -> Result<Self, ConfigError> {
        let backing = Backing::new(device, &config)?;
        let size = config.size.unwrap_or(backing.limits.size);
        if size > backing.limits.size {
            return Err(ConfigError::TooLarge { image: backing.limits.size, lun: size });
        }
        let blocks = size / u64::from(config.block_size);
        if blocks == 0 {
            return Err(ConfigError::TooSmall(size));
        }
        let state = State {
            backing: RwLock::new(backing),
            exchanging: AtomicBool::new(false),
            identity,
            blocks: AtomicU64::new(blocks),
            parameters: Parameters::new(config.write_cache),
            config,
            ranges: RangeLock::default(),
            attention: Attention::default(),
            operation: Operation::default(),
            copies: Copies::default(),
            counters: Counters::default(),
            failures: FailureLog::default(),
            ports,
            peers,
        };
        Ok(Self { state: Arc::new(state) })
    }

    /// Does one command. Thread-safe: as many at once as callers like.
    pub fn execute(&self, cdb: &[u8], data: &mut Data<'_, '_>) -> Outcome {
        self.run(cdb, data, Manner::Whole, None).unwrap_or(BUSY)
    }

    /// The same for the command that the transport calls `tag`, so that it can be [given up](Self::given_up).
    pub fn execute_tagged(&self, tag: u16, cdb: &[u8], data: &mut Data<'_, '_>) -> Outcome {
        self.run(cdb, data, Manner::Whole, Some(tag)).unwrap_or(BUSY)
    }

    /// Does a command that a process before this one may have done in part or whole without telling anybody.
    pub fn execute_again(&self, tag: u16, cdb: &[u8], data: &mut Data<'_, '_>) -> Outcome {
        self.run(cdb, data, Manner::Again, Some(tag)).unwrap_or(BUSY)
    }

    /// Nobody wants the answers of these commands any more: those that only wait for something end at once.
    pub fn given_up(&self, tags: &[u16]) {
        self.state.operation.given_up(tags);
    }

    /// Does the command if that needs no wait: it is answered from memory, or reads what is in memory. `None` means that
    /// nothing happened, and that the buffer may have changed.
    pub fn try_execute(&self, cdb: &[u8], data: &mut Data<'_, '_>) -> Option<Outcome> {
        self.run(cdb, data, Manner::NoWait, None)
    }

    fn run(&self, cdb: &[u8], data: &mut Data<'_, '_>, manner: Manner, tag: Option<u16>) -> Option<Outcome> {
        let no_wait = manner == Manner::NoWait;
        if self.state.exchanging.load(Ordering::Acquire) {
            return None;
        }
        let backing = if no_wait { self.state.backing.try_read()? } else { self.state.backing.read() };
        let again = manner == Manner::Again;
        let command = Command { lun: &self.state, device: &backing.device, limits: &backing.limits, no_wait, again, tag };
        let cdb = Cdb::new(cdb);
        let result = match command.find(&cdb) {
            Ok(entry) if no_wait && entry.blocking == Blocking::May => return None,
            Ok(entry) => command.admit(entry, &cdb).and_then(|()| (entry.run)(&command, &cdb, data)).inspect(|_| {
                // A buffer that the command has no use for goes back to the initiator too.
                if entry.direction == Direction::None {
                    data.zero_from(0);
                }
            }),
            Err(fault) => Err(fault),
        };
        Some(match result {
            Ok(Reply::WouldBlock) => return None,
            Ok(Reply::Done) => Outcome { status: Status::Good, sense: None, data_in: None },
            Ok(Reply::DataIn(valid)) => Outcome { status: Status::Good, sense: None, data_in: Some(valid) },
            Err(fault) => {
                self.state.counters.count(&fault);
                self.outcome_of(&fault)
            }
        })
    }

    /// CHECK CONDITION with the sense of `fault`, in the format that the mode parameters ask for. For callers that have to
    /// answer a command which cannot be executed.
    pub fn outcome_of(&self, fault: &Fault) -> Outcome {
        let sense = Sense::encode(fault, self.state.parameters.descriptor_sense());
        Outcome { status: Status::CheckCondition, sense: Some(sense), data_in: None }
    }

    /// Capacity in blocks.
    pub fn blocks(&self) -> u64 {
        self.state.blocks()
    }

    /// Logical block size in bytes.
    pub fn block_size(&self) -> u32 {
        self.state.block_size()
    }

    /// Takes a new size in bytes, no larger than the image is by now, and tells the initiator that asks next.
    pub fn capacity_changed(&self, size: u64) -> Result<(), ConfigError> {
        let mut backing = self.state.backing_to_change();
        let limits = backing.device.limits();
        if size > limits.size {
            return Err(ConfigError::TooLarge { image: limits.size, lun: size });
        }
        let blocks = size / u64::from(self.state.config.block_size);
        if blocks == 0 {
            return Err(ConfigError::TooSmall(size));
        }
        backing.limits = limits;
        if self.state.blocks.swap(blocks, Ordering::AcqRel) != blocks {
            self.state.attention.raise(Triple::CAPACITY_CHANGED);
        }
        Ok(())
    }

    /// Puts another image behind the logical unit, once the commands under way have ended. It must not be smaller than the
    /// unit. Returns the image that was there.
    pub fn replace(&self, device: Arc<dyn BlockDevice>) -> Result<Arc<dyn BlockDevice>, ConfigError> {
        let new = Backing::new(device, &self.state.config)?;
        let lun = self.blocks() * u64::from(self.state.config.block_size);
        if new.limits.size < lun {
            return Err(ConfigError::TooLarge { image: new.limits.size, lun });
        }
        let mut backing = self.state.backing_to_change();
        let old = std::mem::replace(&mut *backing, new);
        self.state.attention.raise(Triple::INQUIRY_CHANGED);
        Ok(old.device)
    }

    /// Whether the image may be put behind this unit: it has its sectors and is no smaller.
    pub fn fits(&self, device: &Arc<dyn BlockDevice>) -> Result<(), ConfigError> {
        let new = Backing::new(Arc::clone(device), &self.state.config)?;
        let lun = self.blocks() * u64::from(self.state.config.block_size);
        if new.limits.size < lun { Err(ConfigError::TooLarge { image: new.limits.size, lun }) } else { Ok(()) }
    }

    /// Puts another image behind the unit where the two cannot be open at once. When the commands under way have ended, `bring`
    /// is called with the unit holding no image, and returns the one to go on with (one that [fits](Self::fits)) and whether it is
    /// another one. Until then commands end with BUSY, which initiators send again. Without an image they fail from then on.
    pub fn exchange(&self, bring: impl FnOnce() -> Option<(Arc<dyn BlockDevice>, bool)>) {
        let state = &self.state;
        state.exchanging.store(true, Ordering::Release);
        {
            let mut backing = state.backing_to_change();
            backing.device = Arc::new(Absent(backing.limits));
        }
        if let Some((device, another)) = bring() {
            *state.backing.write() = Backing { limits: device.limits(), device };
            if another {
                state.attention.raise(Triple::INQUIRY_CHANGED);
            }
        }
        state.exchanging.store(false, Ordering::Release);
    }

    /// The NAA designator that it has in VPD page 83h; none while it has no serial number.
    pub fn naa(&self) -> Option<[u8; 16]> {
        vpd::naa_of(&self.state)
    }

    /// The image.
    pub fn device(&self) -> Arc<dyn BlockDevice> {
        self.state.backing.read().device.clone()
    }

    /// Whether writes may stay in a volatile cache (WCE).
    pub fn write_cache(&self) -> bool {
        self.state.parameters.write_cache()
    }

    /// Changes WCE. When it is turned off, everything written so far is made safe first.
    pub fn set_write_cache(&self, on: bool) -> formats::Result<()> {
        self.state.parameters.set_write_cache(on);
        if on { Ok(()) } else { self.device().flush() }
    }

    /// Tells the initiator that asks next that space on the host runs low.
    pub fn threshold_reached(&self) {
        self.state.attention.raise(Triple::THRESHOLD_REACHED);
    }
}

impl State {
    /// Capacity in blocks.
    pub(super) fn blocks(&self) -> u64 {
        self.blocks.load(Ordering::Acquire)
    }

    /// Logical block size in bytes.
    pub(super) fn block_size(&self) -> u32 {
        self.config.block_size
    }

    /// Calls `run` with the image held in place, unless somebody is about to replace it.
    pub(super) fn with_command<R>(self: &Arc<Self>, run: impl FnOnce(&Command<'_>) -> R) -> Option<R> {
        let backing = self.backing.try_read()?;
        Some(run(&Command { lun: self, device: &backing.device, limits: &backing.limits, no_wait: false, again: false, tag: None }))
    }

    /// The image's place, to put another image there. Nobody uses the one that is there now.
    fn backing_to_change(&self) -> RwLockWriteGuard<'_, Backing> {
        loop {
            // An operation begins with its command holding the image, so none begins once this is held.
            let backing = self.backing.write();
            if !self.operation.is_running() {
                return backing;
            }
            drop(backing);
            self.operation.wait_for_end();
        }
    }
}

/// A command under way: what its function may use.
pub struct Command<'a> {
    pub(super) lun: &'a Arc<State>,
    pub(super) device: &'a Arc<dyn BlockDevice>,
    pub(super) limits: &'a Limits,
    /// Give up with [`Reply::WouldBlock`] rather than wait.
    pub(super) no_wait: bool,
    /// Another process may have done it, in part or whole, and died.
    pub(super) again: bool,
    /// What the transport calls it.
    pub(super) tag: Option<u16>,
}

/// How a command is done.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Manner {
    Whole,
    NoWait,
    Again,
}

impl Command<'_> {
    /// The table's row for a CDB.
    fn find(&self, cdb: &Cdb<'_>) -> Result<&'static Entry, Fault> {
        let rows = opcode::rows(cdb.byte(0)).ok_or(Triple::INVALID_OPCODE)?;
        let mut present = rows.iter().filter(|e| self.has(e)).peekable();
        if present.peek().is_none() {
            return Err(Triple::INVALID_OPCODE.into());
        }
        let action = cdb.byte(1) & 0x1F;
        present.find(|e| e.action.is_none_or(|a| a == action)).ok_or(Fault::cdb(1, Some(4)))
    }

    /// The command exists on this logical unit.
    pub(super) fn has(&self, entry: &Entry) -> bool {
        match entry.presence {
            Presence::Always => true,
            Presence::Thin => self.can_unmap(),
            Presence::Atomic => self.has_atomic_blocks(),
            Presence::Ports(mode) => self.lun.ports.as_ref().is_some_and(|ports| ports.modes() & mode != 0),
            Presence::Kernel => self.lun.config.kernel_reservations,
            Presence::KernelAlways => true,
        }
    }

    /// The bits of the usage data that mean nothing here.
    pub(super) fn unsupported_bits(&self, entry: &Entry) -> Option<(usize, u8)> {
        entry.unmap_bits.filter(|_| !self.can_unmap())
    }

    /// What stands in the way of any command, in the order of precedence.
    fn admit(&self, entry: &Entry, cdb: &Cdb<'_>) -> Result<(), Fault> {
        if entry.access != Access::Always
            && let Some(condition) = self.lun.attention.take()
        {
            return Err(condition.into());
        }
        // Before any look at the fields: an initiator may ask in just this way whether it may write.
        if entry.access == Access::Write {
            self.writable()?;
        }
        if matches!(entry.access, Access::Medium | Access::Write) {
            self.lun.operation.admit(entry.opcode)?;
        }
        cdb.check(entry, self.unsupported_bits(entry))
    }

    /// The medium may be changed.
    pub(super) fn writable(&self) -> Result<(), Fault> {
        if self.is_read_only() {
            return Err(Triple::WRITE_PROTECTED.into());
        }
        if self.lun.parameters.software_write_protect() {
            return Err(Triple::SOFTWARE_WRITE_PROTECTED.into());
        }
        Ok(())
    }

    /// Logical blocks can be unmapped (LBPME).
    pub(super) fn can_unmap(&self) -> bool {
        self.limits.can_discard && self.lun.config.discard
    }

    /// A write of one logical block is whole or has not happened after a power cut.
    pub(super) fn has_atomic_blocks(&self) -> bool {
        self.lun.config.block_size <= self.limits.sector
    }

    /// The medium cannot be written, whatever the mode parameters say.
    pub(super) fn is_read_only(&self) -> bool {
        self.lun.config.read_only || self.limits.read_only
    }

    /// Logical block size in bytes.
    pub(super) fn block_size(&self) -> u64 {
        u64::from(self.lun.config.block_size)
    }

    /// The bytes of an extent, if it lies on the medium. An LBA beyond the last is refused even for no blocks at all.
    pub(super) fn range(&self, lba: u64, blocks: u64) -> Result<Range<u64>, Fault> {
        let capacity = self.lun.blocks();
        if lba >= capacity || blocks > capacity - lba {
            return Err(Triple::LBA_OUT_OF_RANGE.into());
        }
        // The capacity in bytes was an u64, so no product here overflows.
        Ok(lba * self.block_size()..(lba + blocks) * self.block_size())
    }

    /// The same for a command that transfers the extent. An initiator that does not know the limit published in VPD B0 may
    /// exceed it to some extent: the transport found room for its data.
    pub(super) fn transfer_range(&self, extent: &Extent) -> Result<Range<u64>, Fault> {
        let range = self.range(extent.lba, u64::from(extent.blocks))?;
        if extent.blocks > self.lun.config.max_transfer_blocks.max(MAX_TRANSFER_BLOCKS) {
            return Err(Fault::cdb(extent.blocks_field, None));
        }
        Ok(range)
    }

    /// What the initiator is told when the image failed while it was read; the log is told the rest.
    pub(super) fn read_error(&self, error: &formats::Error) -> Fault {
        self.lun.failures.log("reading", error);
        Fault::reading(error)
    }

    /// The same while it was written.
    pub(super) fn write_error(&self, error: &formats::Error) -> Fault {
        self.lun.failures.log("writing", error);
        Fault::writing(error)
    }

    /// After a change of the medium: makes it safe if the initiator asked for that, or has no write cache.
    pub(super) fn settle(&self, force_unit_access: bool) -> Result<(), Fault> {
        if force_unit_access || !self.lun.parameters.write_cache() { self.flush() } else { Ok(()) }
    }

    /// Makes everything written safe.
    pub(super) fn flush(&self) -> Result<(), Fault> {
        if self.limits.read_only {
            return Ok(());
        }
        self.device.flush().map_err(|e| self.write_error(&e))
    }
}
