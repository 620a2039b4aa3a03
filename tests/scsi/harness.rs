//! A disk in memory that knows which of its units are allocated and fails on demand, and the script runner.

use formats::{BlockDevice, Error, Kind, Limits, MapExtent, Result, ZeroMode};
use img_tcmu::scsi::{Config, Data, Identity, Lun, Outcome, Status};
use std::io::{IoSlice, IoSliceMut};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// Unit of allocation of [`Memory`] in bytes.
pub const UNIT: u64 = 4096;
/// What a buffer holds before a command runs: bytes of "earlier commands" that must never get out.
pub const POISON: u8 = 0xE7;

pub struct Memory {
    state: Mutex<State>,
    limits: Mutex<Limits>,
    pub flushes: AtomicUsize,
}

struct State {
    bytes: Vec<u8>,
    allocated: Vec<bool>,
    failure: Option<Kind>,
}

impl Memory {
    pub fn new(size: u64) -> Self {
        let limits = Limits {
            size,
            sector: 512,
            physical_sector: 512,
            granularity: UNIT,
            read_only: false,
            can_discard: true,
            discard_zeroes: true,
            cheap_zero: true,
            thin: true,
        };
        Self::with_limits(limits)
    }

    pub fn with_limits(limits: Limits) -> Self {
        let units = limits.size.div_ceil(UNIT) as usize;
        let state = State { bytes: vec![0; limits.size as usize], allocated: vec![false; units], failure: None };
        Self { state: Mutex::new(state), limits: Mutex::new(limits), flushes: AtomicUsize::new(0) }
    }

    pub fn limits_now(&self) -> Limits {
        *self.limits.lock().unwrap()
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.state.lock().unwrap().bytes.clone()
    }

    pub fn fail(&self, kind: Option<Kind>) {
        self.state.lock().unwrap().failure = kind;
    }

    /// Keeps everything that reads or writes waiting until it is dropped.
    pub fn hold(&self) -> impl Sized + '_ {
        self.state.lock().unwrap()
    }

    pub fn flush_count(&self) -> usize {
        self.flushes.load(Ordering::SeqCst)
    }

    fn check<'s>(&self, state: &'s mut State, at: u64, len: u64) -> Result<&'s mut State> {
        if let Some(kind) = state.failure {
            return Err(Error::new(kind, "failure on demand"));
        }
        match at.checked_add(len) {
            Some(end) if end <= state.bytes.len() as u64 => Ok(state),
            _ => Err(Error::new(Kind::OutOfBounds, "beyond the end")),
        }
    }
}

impl BlockDevice for Memory {
    fn limits(&self) -> Limits {
        *self.limits.lock().unwrap()
    }

    fn read(&self, bufs: &mut [IoSliceMut<'_>], at: u64) -> Result<()> {
        let mut state = self.state.lock().unwrap();
        let len = bufs.iter().map(|b| b.len() as u64).sum();
        let state = self.check(&mut state, at, len)?;
        let mut at = at as usize;
        for buf in bufs {
            let len = buf.len();
            buf.copy_from_slice(&state.bytes[at..at + len]);
            at += len;
        }
        Ok(())
    }

    fn try_read(&self, bufs: &mut [IoSliceMut<'_>], at: u64) -> Result<bool> {
        // The second half of the disk is "not in memory".
        if at >= self.limits().size / 2 {
            return Ok(false);
        }
        self.read(bufs, at).map(|()| true)
    }

    fn write(&self, bufs: &[IoSlice<'_>], at: u64) -> Result<()> {
        let mut state = self.state.lock().unwrap();
        let len: u64 = bufs.iter().map(|b| b.len() as u64).sum();
        let state = self.check(&mut state, at, len)?;
        let mut to = at as usize;
        for buf in bufs {
            state.bytes[to..to + buf.len()].copy_from_slice(buf);
            to += buf.len();
        }
        state.allocated[(at / UNIT) as usize..(at + len).div_ceil(UNIT) as usize].fill(true);
        Ok(())
    }

    fn zero(&self, at: u64, len: u64, mode: ZeroMode) -> Result<()> {
        let mut state = self.state.lock().unwrap();
        let state = self.check(&mut state, at, len)?;
        state.bytes[at as usize..(at + len) as usize].fill(0);
        for unit in at / UNIT..(at + len).div_ceil(UNIT) {
            let whole = unit * UNIT >= at && (unit + 1) * UNIT <= at + len;
            match mode {
                ZeroMode::KeepAllocated => state.allocated[unit as usize] = true,
                _ if whole => state.allocated[unit as usize] = false,
                _ => {}
            }
        }
        Ok(())
    }

    fn discard(&self, at: u64, len: u64) -> Result<()> {
        let mut state = self.state.lock().unwrap();
        let state = self.check(&mut state, at, len)?;
        for unit in at.div_ceil(UNIT)..(at + len) / UNIT {
            state.bytes[(unit * UNIT) as usize..((unit + 1) * UNIT) as usize].fill(0);
            state.allocated[unit as usize] = false;
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        let mut state = self.state.lock().unwrap();
        self.check(&mut state, 0, 0)?;
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn map(&self, at: u64, len: u64) -> Result<MapExtent> {
        let mut state = self.state.lock().unwrap();
        let state = self.check(&mut state, at, len)?;
        let allocated = state.allocated[(at / UNIT) as usize];
        let same = (at / UNIT + 1..(at + len).div_ceil(UNIT)).take_while(|u| state.allocated[*u as usize] == allocated);
        let end = ((at / UNIT + 1 + same.count() as u64) * UNIT).min(at + len);
        Ok(MapExtent { len: end - at, allocated, zero: !allocated, encoded: false, depth: 0, offset: None })
    }

    fn grow(&self, size: u64) -> Result<()> {
        let mut state = self.state.lock().unwrap();
        state.bytes.resize(size as usize, 0);
        state.allocated.resize(size.div_ceil(UNIT) as usize, false);
        self.limits.lock().unwrap().size = size;
        Ok(())
    }
}

/// A logical unit with its disk.
pub struct Disk {
    pub memory: Arc<Memory>,
    pub lun: Lun,
}

impl Disk {
    /// 1 MiB in blocks of 512 bytes.
    pub fn new() -> Self {
        Self::with(Memory::new(1 << 20), Config::default())
    }

    pub fn with(memory: Memory, config: Config) -> Self {
        let memory = Arc::new(memory);
        let identity = Identity::with_serial("01234567-89ab-cdef-0123-456789abcdef");
        let lun = Lun::new(memory.clone(), identity, config).unwrap();
        Self { memory, lun }
    }

    /// Runs a CDB over `buffer`, lent in segments of odd lengths.
    pub fn run(&self, cdb: &[u8], buffer: &mut [u8]) -> Outcome {
        let cuts = [1, 0, 512, 7, 4096, 13];
        let mut segments = Vec::new();
        let mut rest = buffer;
        for cut in cuts.iter().cycle().take(40) {
            let (head, tail) = rest.split_at_mut((*cut).min(rest.len()));
            segments.push(IoSliceMut::new(head));
            rest = tail;
        }
        segments.push(IoSliceMut::new(rest));
        self.lun.execute(cdb, &mut Data::new(&mut segments))
    }

    /// Runs a command without data that must end well.
    pub fn ok(&self, cdb: &[u8]) {
        let outcome = self.run(cdb, &mut []);
        assert_eq!(outcome, good(), "cdb {cdb:02x?}");
    }

    /// Runs a data-in command into a buffer of `len` bytes; returns the valid ones, having checked that the rest is zeros.
    pub fn read(&self, cdb: &[u8], len: usize) -> Vec<u8> {
        let mut buffer = vec![POISON; len];
        let outcome = self.run(cdb, &mut buffer);
        assert_eq!(outcome.status, Status::Good, "cdb {cdb:02x?}: {outcome:?}");
        let valid = outcome.data_in.expect("data-in") as usize;
        assert!(buffer[valid..].iter().all(|b| *b == 0), "old bytes after the reply to {cdb:02x?}");
        buffer.truncate(valid);
        buffer
    }

    /// Runs a data-out command that must end well.
    pub fn write(&self, cdb: &[u8], data: &[u8]) {
        let outcome = self.run(cdb, &mut data.to_vec());
        assert_eq!(outcome, good(), "cdb {cdb:02x?}");
    }

    /// Runs a command that must fail; returns the sense data.
    pub fn fault(&self, cdb: &[u8], data: &[u8]) -> Vec<u8> {
        let outcome = self.run(cdb, &mut data.to_vec());
        assert_eq!(outcome.status, Status::CheckCondition, "cdb {cdb:02x?}");
        assert_eq!(outcome.data_in, None);
        outcome.sense.expect("sense").as_bytes().to_vec()
    }

    /// The same; returns key, ASC and ASCQ of fixed-format sense data.
    pub fn triple(&self, cdb: &[u8], data: &[u8]) -> (u8, u8, u8) {
        let sense = self.fault(cdb, data);
        assert_eq!(sense[0] & 0x7F, 0x70);
        (sense[2] & 0xF, sense[12], sense[13])
    }

    /// The same for an illegal field of the CDB: byte and bit that the field pointer names.
    pub fn cdb_fault(&self, cdb: &[u8], data: &[u8]) -> (u16, Option<u8>) {
        let sense = self.fault(cdb, data);
        assert_eq!((sense[2], sense[12], sense[13]), (5, 0x24, 0), "cdb {cdb:02x?}");
        assert_eq!(sense[15] & 0xC0, 0xC0, "a field pointer into the CDB");
        (u16::from_be_bytes([sense[16], sense[17]]), (sense[15] & 8 != 0).then_some(sense[15] & 7))
    }
}

pub fn good() -> Outcome {
    Outcome { status: Status::Good, sense: None, data_in: None }
}

/// The whole medium reads as this block, repeated.
pub fn all_blocks_are(memory: &Memory, block: &[u8]) -> bool {
    memory.bytes().chunks_exact(block.len()).all(|b| b == block)
}

/// A 10-byte CDB.
pub fn cdb10(opcode: u8, flags: u8, lba: u32, blocks: u16) -> [u8; 10] {
    let (l, n) = (lba.to_be_bytes(), blocks.to_be_bytes());
    [opcode, flags, l[0], l[1], l[2], l[3], 0, n[0], n[1], 0]
}

/// A 12-byte CDB.
pub fn cdb12(opcode: u8, flags: u8, lba: u32, blocks: u32) -> [u8; 12] {
    let mut cdb = [0; 12];
    (cdb[0], cdb[1]) = (opcode, flags);
    cdb[2..6].copy_from_slice(&lba.to_be_bytes());
    cdb[6..10].copy_from_slice(&blocks.to_be_bytes());
    cdb
}

/// A 16-byte CDB.
pub fn cdb16(opcode: u8, flags: u8, lba: u64, blocks: u32) -> [u8; 16] {
    let mut cdb = [0; 16];
    (cdb[0], cdb[1]) = (opcode, flags);
    cdb[2..10].copy_from_slice(&lba.to_be_bytes());
    cdb[10..14].copy_from_slice(&blocks.to_be_bytes());
    cdb
}

/// COMPARE AND WRITE.
pub fn compare_and_write(flags: u8, lba: u64, blocks: u8) -> [u8; 16] {
    let mut cdb = cdb16(0x89, flags, lba, 0);
    cdb[13] = blocks;
    cdb
}

/// Bytes that differ from block to block and within a block.
pub fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i / 512) as u8 ^ (i % 251) as u8 ^ seed).collect()
}
