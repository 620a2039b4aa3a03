//! Vital product data pages (SPC-4 7.8, SBC-3 6.6): one function a page, and the table that page 00h lists.

use crate::scsi::inquiry::ascii;
use crate::scsi::lun::Command;
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
    serial(command).unwrap_or_default().into_bytes()
}

/// The serial number, printable and short enough for every page that holds it.
fn serial(command: &Command<'_>) -> Option<String> {
    let serial = (command.lun.identity.serial)()?;
    Some(serial.chars().filter(|c| c.is_ascii_graphic() || *c == ' ').take(200).collect())
}

/// T10 vendor identification with the serial number, and the NAA designator that the kernel makes of the same serial number,
/// so that the unit keeps its name whatever program serves it.
fn device_identification(command: &Command<'_>) -> Vec<u8> {
    let mut page = Vec::new();
    let Some(serial) = serial(command) else { return page };
    let mut t10 = ascii::<8>(&command.lun.identity.vendor).to_vec();
    t10.extend(serial.bytes());
    designator(&mut page, 0x02, 0x01, &t10);
    designator(&mut page, 0x01, 0x03, &naa(&serial));
    page
}

/// Appends a designation descriptor of the logical unit.
fn designator(page: &mut Vec<u8>, code_set: u8, kind: u8, designator: &[u8]) {
    // Serial numbers are at most 200 bytes, so the length fits a byte.
    page.extend([code_set, kind, 0, designator.len() as u8]);
    page.extend(designator);
}

/// NAA 6 (IEEE registered extended) with OpenFabrics' company id 001405h, as LIO does: the hexadecimal digits of the serial
/// number fill the 25 digits that are left.
pub(super) fn naa(serial: &str) -> [u8; 16] {
    let digits = serial.chars().filter_map(|c| c.to_digit(16)).map(|d| d as u8);
    let mut nibbles = [0x6, 0x0, 0x0, 0x1, 0x4, 0x0, 0x5].into_iter().chain(digits).chain(std::iter::repeat(0));
    std::array::from_fn(|_| nibbles.next().unwrap_or(0) << 4 | nibbles.next().unwrap_or(0))
}

fn extended_inquiry(_: &Command<'_>) -> Vec<u8> {
    let mut page = vec![0; 60];
    page[1] = 0x07; // HEADSUP, ORDSUP, SIMPSUP: the target core orders them
    page[2] = 0x01; // V_SUP: there is a volatile cache
    page
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
    page[0] = 0x01; // WSNZ: WRITE SAME of no blocks is refused
    page[1] = 0xFF; // COMPARE AND WRITE of up to 255 blocks
    let granularity = 1u16 << command.physical_exponent();
    page[2..4].copy_from_slice(&granularity.to_be_bytes());
    page
}

fn block_device_characteristics(_: &Command<'_>) -> Vec<u8> {
    let mut page = vec![0; 60];
    page[1] = 0x01; // does not rotate
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
