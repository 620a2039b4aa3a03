//! Vital product data pages (SPC-4 7.8, SBC-3 6.6): one function a page, and the table that page 00h lists.

use crate::scsi::atomic::MAX_ATOMIC_BLOCKS;
use crate::scsi::copy::{BLOCK_TO_BLOCK, BLOCK_TO_BLOCK_OFFSET, IDENTIFICATION, MAX_LIST, MAX_SEGMENT, MAX_SEGMENTS, MAX_TARGETS};
use crate::scsi::inquiry::ascii;
use crate::scsi::lun::{Command, State};
use crate::scsi::opcode::TABLE;
use crate::scsi::ports;
use crate::scsi::provisioning::{MAX_UNMAP_BLOCKS, MAX_UNMAP_DESCRIPTORS};
use crate::scsi::write_same::max_write_same_blocks;

/// A page's payload, without its header.
type Encode = fn(&Command<'_>) -> Vec<u8>;

/// All pages, in ascending order.
const PAGES: &[(u8, Encode)] = &[
    (0x00, supported_pages),
    (0x80, unit_serial_number),
    (0x83, device_identification),
    (0x86, extended_inquiry),
    (0x8F, third_party_copy),
    (0xB0, block_limits),
    (0xB1, block_device_characteristics),
    (0xB2, logical_block_provisioning),
];

/// The page with its header, if there is such a page.
pub fn page(command: &Command<'_>, code: u8) -> Option<Vec<u8>> {
    let (_, encode) = PAGES.iter().find(|(page, _)| *page == code)?;
    let payload = encode(command);
    let len = u16::try_from(payload.len()).ok()?.to_be_bytes();
    let mut reply = vec![0x00, code, len[0], len[1]];
    reply.extend(payload);
    Some(reply)
}

fn supported_pages(_: &Command<'_>) -> Vec<u8> {
    PAGES.iter().map(|(code, _)| *code).collect()
}

fn unit_serial_number(command: &Command<'_>) -> Vec<u8> {
    serial(command.lun).unwrap_or_default().into_bytes()
}

/// The serial number, printable and short enough for every page that holds it.
fn serial(lun: &State) -> Option<String> {
    let serial = (lun.identity.serial)()?;
    Some(serial.chars().filter(|c| c.is_ascii_graphic() || *c == ' ').take(200).collect())
}

/// T10 vendor identification with the serial number, and the NAA designator that the kernel makes of the same serial number,
/// so that the unit keeps its name whatever program serves it. The target port and its group follow where there is but one.
fn device_identification(command: &Command<'_>) -> Vec<u8> {
    let mut page = Vec::new();
    let Some(serial) = serial(command.lun) else { return page };
    let mut t10 = ascii::<8>(&command.lun.identity.vendor).to_vec();
    t10.extend(serial.bytes());
    designator(&mut page, 0x02, 0x01, &t10);
    designator(&mut page, 0x01, 0x03, &naa(&serial));
    if let Some(ports) = command.lun.ports.as_deref().filter(|ports| ports.modes() & 3 != 0) {
        let (port, group) = ports::only(ports);
        for (kind, id) in [(0x14, port), (0x15, group)] {
            if let Some(id) = id {
                let [high, low] = id.to_be_bytes();
                designator(&mut page, 0x01, kind, &[0, 0, high, low]);
            }
        }
    }
    page
}

/// Appends a designation descriptor; `kind` is its type, with the association if that is not the logical unit.
fn designator(page: &mut Vec<u8>, code_set: u8, kind: u8, designator: &[u8]) {
    // Serial numbers are at most 200 bytes, so the length fits a byte.
    page.extend([code_set, kind, 0, designator.len() as u8]);
    page.extend(designator);
}

/// NAA 6 (IEEE registered extended) with OpenFabrics' company id 001405h, as LIO does: the hexadecimal digits of the serial
/// number fill the 25 digits that are left.
fn naa(serial: &str) -> [u8; 16] {
    let digits = serial.chars().filter_map(|c| c.to_digit(16)).map(|d| d as u8);
    let mut nibbles = [0x6, 0x0, 0x0, 0x1, 0x4, 0x0, 0x5].into_iter().chain(digits).chain(std::iter::repeat(0));
    std::array::from_fn(|_| nibbles.next().unwrap_or(0) << 4 | nibbles.next().unwrap_or(0))
}

/// The NAA designator of a unit.
pub(super) fn naa_of(lun: &State) -> Option<[u8; 16]> {
    serial(lun).map(|serial| naa(&serial))
}

fn extended_inquiry(_: &Command<'_>) -> Vec<u8> {
    let mut page = vec![0; 60];
    page[1] = 0x07; // HEADSUP, ORDSUP, SIMPSUP: the target core orders them
    page[2] = 0x01; // V_SUP: there is a volatile cache
    page
}

/// Descriptors: supported commands, parameter data, supported descriptors, general copy operations (SPC-4 7.8.17).
fn third_party_copy(_: &Command<'_>) -> Vec<u8> {
    let mut page = Vec::new();
    let mut commands = vec![0];
    for opcode in [0x83, 0x84] {
        let actions: Vec<u8> = TABLE.iter().filter(|e| e.opcode == opcode).filter_map(|e| e.action).collect();
        commands.extend([opcode, actions.len() as u8]);
        commands.extend(actions);
    }
    commands[0] = commands.len() as u8 - 1;
    copy_descriptor(&mut page, 0x0001, &commands);

    let mut parameters = vec![0; 28];
    parameters[4..6].copy_from_slice(&MAX_TARGETS.to_be_bytes());
    parameters[6..8].copy_from_slice(&MAX_SEGMENTS.to_be_bytes());
    parameters[8..12].copy_from_slice(&MAX_LIST.to_be_bytes());
    copy_descriptor(&mut page, 0x0004, &parameters);

    copy_descriptor(&mut page, 0x0008, &[3, BLOCK_TO_BLOCK, BLOCK_TO_BLOCK_OFFSET, IDENTIFICATION]);

    let mut general = vec![0; 32];
    general[..4].copy_from_slice(&u32::from(MAX_SEGMENTS).to_be_bytes());
    general[8..12].copy_from_slice(&MAX_SEGMENT.to_be_bytes());
    general[12] = 9; // data segments in units of 2^9 bytes
    copy_descriptor(&mut page, 0x8001, &general);
    page
}

/// Appends a third-party copy descriptor, padded to a multiple of four bytes.
fn copy_descriptor(page: &mut Vec<u8>, kind: u16, payload: &[u8]) {
    let padded = payload.len().next_multiple_of(4);
    page.extend(kind.to_be_bytes());
    // All payloads are a few dozen bytes.
    page.extend((padded as u16).to_be_bytes());
    page.extend(payload);
    page.resize(page.len() + padded - payload.len(), 0);
}

fn block_limits(command: &Command<'_>) -> Vec<u8> {
    let mut page = vec![0; 60];
    let mut put = |at: usize, value: u32| page[at - 4..at].copy_from_slice(&value.to_be_bytes());
    let config = &command.lun.config;
    put(8, config.max_transfer_blocks);
    put(12, config.optimal_transfer_blocks);
    if command.can_unmap() {
        let granularity = (command.limits.granularity / command.block_size()).max(1);
        put(20, MAX_UNMAP_BLOCKS);
        put(24, MAX_UNMAP_DESCRIPTORS);
        put(28, u32::try_from(granularity).unwrap_or(1));
        put(32, 0x8000_0000); // UGAVALID, alignment 0
    }
    let write_same = max_write_same_blocks(command);
    put(40, write_same);
    if command.has_atomic_blocks() {
        put(44, MAX_ATOMIC_BLOCKS);
    }
    page[0] = 0x01; // WSNZ: a WRITE SAME without a count is refused
    page[1] = 0xFF; // COMPARE AND WRITE of up to 255 blocks
    let granularity = 1u16 << command.physical_exponent();
    page[2..4].copy_from_slice(&granularity.to_be_bytes());
    page
}

fn block_device_characteristics(command: &Command<'_>) -> Vec<u8> {
    let mut page = vec![0; 60];
    page[1] = 0x01; // does not rotate
    if command.can_unmap() {
        page[3] = 0x40; // WABEREQ: blocks can be read after a block erase
    }
    page[4] = 0x03; // FUAB: FUA and SYNCHRONIZE CACHE mean what SBC-3 says; VBULS: VERIFY compares unmapped blocks
    page
}

fn logical_block_provisioning(command: &Command<'_>) -> Vec<u8> {
    let mut page = vec![0; 4];
    if command.can_unmap() {
        page[1] = 0xE0 | if command.limits.discard_zeroes { 0x04 } else { 0 };
        page[2] = if command.limits.thin { 0x02 } else { 0x01 };
    }
    page
}
