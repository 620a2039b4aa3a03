//! MODE SENSE and MODE SELECT (6) and (10): pages 01h, 08h and 0Ah (SPC-4 6.11 to 6.14, SBC-3 6.5).
//!
//! Three bits can be changed: WCE, D_SENSE and SWP. Nothing is saved.

use crate::scsi::cdb::Cdb;
use crate::scsi::data::Data;
use crate::scsi::lun::Command;
use crate::scsi::opcode::Reply;
use crate::scsi::sense::{Fault, Triple};
use std::sync::atomic::{AtomicBool, Ordering};

/// The mode parameters that can be changed.
pub struct Parameters {
    write_cache: AtomicBool,
    descriptor_sense: AtomicBool,
    software_write_protect: AtomicBool,
}

impl Parameters {
    /// The defaults, with WCE as given.
    pub fn new(write_cache: bool) -> Self {
        Self {
            write_cache: AtomicBool::new(write_cache),
            descriptor_sense: AtomicBool::new(false),
            software_write_protect: AtomicBool::new(false),
        }
    }

    /// WCE: writes may stay in a volatile cache.
    pub fn write_cache(&self) -> bool {
        self.write_cache.load(Ordering::Acquire)
    }

    /// Sets WCE. Who turns it off flushes afterwards.
    pub fn set_write_cache(&self, on: bool) {
        self.write_cache.store(on, Ordering::Release);
    }

    /// D_SENSE: sense data are in descriptor format.
    pub fn descriptor_sense(&self) -> bool {
        self.descriptor_sense.load(Ordering::Relaxed)
    }

    /// SWP: the initiators do not want writes.
    pub fn software_write_protect(&self) -> bool {
        self.software_write_protect.load(Ordering::Relaxed)
    }
}

/// Offset of the byte with WCE in page 08h, and the bit.
const WCE: (usize, u8) = (2, 0x04);
/// The same of D_SENSE in page 0Ah.
const D_SENSE: (usize, u8) = (2, 0x04);
/// The same of SWP in page 0Ah.
const SWP: (usize, u8) = (4, 0x08);

/// A mode page: its default bytes and which bits of them can be changed. Both have the page's header.
struct Page {
    default: &'static [u8],
    changeable: &'static [(usize, u8)],
}

/// Read-write error recovery, caching, control.
const PAGES: [Page; 3] = [
    Page { default: &[0x01, 0x0A, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], changeable: &[] },
    Page { default: &[0x08, 0x12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], changeable: &[WCE] },
    // GLTSD; unrestricted reordering; TAS; busy for an unlimited time.
    Page { default: &[0x0A, 0x0A, 0x02, 0x10, 0, 0x40, 0, 0, 0xFF, 0xFF, 0, 0], changeable: &[D_SENSE, SWP] },
];

impl Page {
    fn code(&self) -> u8 {
        self.default[0]
    }

    /// The bytes for a page control: current (0), changeable (1) or default (2).
    fn bytes(&self, command: &Command<'_>, control: u8) -> Vec<u8> {
        let mut bytes = self.default.to_vec();
        let parameters = &command.lun.parameters;
        match control {
            1 => {
                bytes[2..].fill(0);
                self.changeable.iter().for_each(|(at, bit)| bytes[*at] |= bit);
            }
            _ if self.code() == 0x08 => {
                let on = if control == 2 { command.lun.config.write_cache } else { parameters.write_cache() };
                set(&mut bytes, WCE, on);
            }
            0 if self.code() == 0x0A => {
                set(&mut bytes, D_SENSE, parameters.descriptor_sense());
                set(&mut bytes, SWP, parameters.software_write_protect());
            }
            _ => {}
        }
        bytes
    }
}

fn set(bytes: &mut [u8], (at, bit): (usize, u8), on: bool) {
    if on {
        bytes[at] |= bit;
    }
}

fn get(bytes: &[u8], (at, bit): (usize, u8)) -> bool {
    bytes.get(at).is_some_and(|byte| byte & bit != 0)
}

pub fn sense_6(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    let pages = sense_pages(command, cdb)?;
    let descriptor = if cdb.has(1, 0x08) { Vec::new() } else { short_descriptor(command) };
    let len = 3 + descriptor.len() + pages.len();
    let mut reply = vec![u8::try_from(len).unwrap_or(u8::MAX), 0, device_specific(command), descriptor.len() as u8];
    reply.extend(descriptor);
    reply.extend(pages);
    Ok(Reply::DataIn(data.reply(&reply, u64::from(cdb.byte(4)))))
}

pub fn sense_10(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    let pages = sense_pages(command, cdb)?;
    let long = cdb.has(1, 0x10);
    let descriptor = match (cdb.has(1, 0x08), long) {
        (true, _) => Vec::new(),
        (false, false) => short_descriptor(command),
        (false, true) => long_descriptor(command),
    };
    let [high, low] = u16::try_from(6 + descriptor.len() + pages.len()).unwrap_or(u16::MAX).to_be_bytes();
    let long = u8::from(long && !descriptor.is_empty());
    let mut reply = vec![high, low, 0, device_specific(command), long, 0, 0, descriptor.len() as u8];
    reply.extend(descriptor);
    reply.extend(pages);
    Ok(Reply::DataIn(data.reply(&reply, u64::from(cdb.u16(7)))))
}

/// The pages that byte 2 and the subpage code ask for.
fn sense_pages(command: &Command<'_>, cdb: &Cdb<'_>) -> Result<Vec<u8>, Fault> {
    let (control, code, subpage) = (cdb.byte(2) >> 6, cdb.byte(2) & 0x3F, cdb.byte(3));
    if control == 3 {
        return Err(Triple::SAVING_NOT_SUPPORTED.into());
    }
    // There are no subpages; "all of them" is the page alone.
    if subpage != 0x00 && subpage != 0xFF {
        return Err(Fault::cdb(3, None));
    }
    let mut bytes = Vec::new();
    for page in PAGES.iter().filter(|p| code == 0x3F || p.code() == code) {
        bytes.extend(page.bytes(command, control));
    }
    if bytes.is_empty() { Err(Fault::cdb(2, Some(5))) } else { Ok(bytes) }
}

/// WP and DPOFUA.
fn device_specific(command: &Command<'_>) -> u8 {
    let protected = command.is_read_only() || command.lun.parameters.software_write_protect();
    0x10 | if protected { 0x80 } else { 0 }
}

fn short_descriptor(command: &Command<'_>) -> Vec<u8> {
    let blocks = u32::try_from(command.lun.blocks()).unwrap_or(u32::MAX);
    let mut descriptor = blocks.to_be_bytes().to_vec();
    // The length field has 24 bits; byte 4 is reserved.
    descriptor.extend(command.lun.block_size().to_be_bytes());
    descriptor
}

fn long_descriptor(command: &Command<'_>) -> Vec<u8> {
    let mut descriptor = command.lun.blocks().to_be_bytes().to_vec();
    descriptor.extend([0; 4]);
    descriptor.extend(command.lun.block_size().to_be_bytes());
    descriptor
}

pub fn select_6(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    select(command, cdb, usize::from(cdb.byte(4)), 4, data)
}

pub fn select_10(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    select(command, cdb, usize::from(cdb.u16(7)), 8, data)
}

/// Checks the whole parameter list, and only then changes anything.
fn select(command: &Command<'_>, cdb: &Cdb<'_>, list_len: usize, header_len: usize, data: &Data<'_, '_>) -> Result<Reply, Fault> {
    if !cdb.has(1, 0x10) {
        return Err(Fault::cdb(1, Some(4)));
    }
    if cdb.has(1, 0x01) {
        return Err(Fault::cdb(1, Some(0)));
    }
    if list_len == 0 {
        return Ok(Reply::Done);
    }
    let mut list = vec![0; list_len];
    if data.copy_out(0, &mut list) < list_len || list_len < header_len {
        return Err(Triple::PARAMETER_LIST_LENGTH_ERROR.into());
    }
    let (descriptor_len, long) = match header_len {
        4 => (usize::from(list[3]), false),
        _ => (usize::from(u16::from_be_bytes([list[6], list[7]])), list[4] & 0x01 != 0),
    };
    let descriptor = list.get(header_len..header_len + descriptor_len).ok_or(Triple::PARAMETER_LIST_LENGTH_ERROR)?;
    check_descriptor(command, descriptor, long, header_len)?;

    let mut at = header_len + descriptor_len;
    let parameters = &command.lun.parameters;
    let (mut write_cache, mut descriptor_sense, mut protect) =
        (parameters.write_cache(), parameters.descriptor_sense(), parameters.software_write_protect());
    while at < list.len() {
        let page = PAGES.iter().find(|p| p.code() == list[at] & 0x7F).ok_or(Fault::parameter(at, Some(6)))?;
        let new = list.get(at..at + page.default.len()).ok_or(Triple::PARAMETER_LIST_LENGTH_ERROR)?;
        if new[1] != page.default[1] {
            return Err(Fault::parameter(at + 1, None));
        }
        let (current, changeable) = (page.bytes(command, 0), page.bytes(command, 1));
        for byte in 2..new.len() {
            let refused = (new[byte] ^ current[byte]) & !changeable[byte];
            if refused != 0 {
                return Err(Fault::parameter(at + byte, Some(7 - refused.leading_zeros() as u8)));
            }
        }
        match page.code() {
            0x08 => write_cache = get(new, WCE),
            0x0A => (descriptor_sense, protect) = (get(new, D_SENSE), get(new, SWP)),
            _ => {}
        }
        at += new.len();
    }
    parameters.descriptor_sense.store(descriptor_sense, Ordering::Relaxed);
    parameters.software_write_protect.store(protect, Ordering::Relaxed);
    if parameters.write_cache() && !write_cache {
        parameters.set_write_cache(false);
        command.flush()?;
    }
    parameters.set_write_cache(write_cache);
    Ok(Reply::Done)
}

/// A block descriptor may only say what is so: the block size, and the capacity (or 0 or all ones, which leave it alone).
fn check_descriptor(command: &Command<'_>, descriptor: &[u8], long: bool, at: usize) -> Result<(), Fault> {
    let (blocks, all_ones, size_at) = match (descriptor.len(), long) {
        (0, _) => return Ok(()),
        (8, false) => (u64::from(be32(descriptor, 0)), u64::from(u32::MAX), 4),
        (16, true) => (u64::from(be32(descriptor, 0)) << 32 | u64::from(be32(descriptor, 4)), u64::MAX, 12),
        _ => return Err(Fault::parameter(at - 1, None)),
    };
    if blocks != 0 && blocks != all_ones && blocks != command.lun.blocks() {
        return Err(Fault::parameter(at, None));
    }
    if be32(descriptor, size_at) & 0x00FF_FFFF != command.lun.block_size() {
        return Err(Fault::parameter(at + size_at + 1, None));
    }
    Ok(())
}

/// The 32-bit field at `at`; the caller has checked the length.
fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().fold(0, |value, byte| value << 8 | u32::from(*byte))
}
