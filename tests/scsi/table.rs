//! The opcode table against what it drives: dispatch, REPORT SUPPORTED OPERATION CODES, and the table in docs/scsi.md.

use crate::harness::*;
use img_tcmu::scsi::Config;
use img_tcmu::scsi::opcode::{Direction, Entry, Presence, TABLE};

fn rsoc(options: u8, opcode: u8, action: u16) -> [u8; 12] {
    let [high, low] = action.to_be_bytes();
    [0xA3, 0x0C, options, opcode, high, low, 0, 0, 0xFF, 0xFF, 0, 0]
}

/// Opcode and service action of every command that the unit reports.
fn reported(disk: &Disk) -> Vec<(u8, Option<u16>)> {
    let reply = disk.read(&rsoc(0, 0, 0), 65535);
    assert_eq!(u32::from_be_bytes(reply[..4].try_into().unwrap()) as usize, reply.len() - 4);
    let one = |d: &[u8]| (d[0], (d[5] & 1 != 0).then(|| u16::from_be_bytes([d[2], d[3]])));
    reply[4..].chunks_exact(8).map(one).collect()
}

fn by_the_kernel(opcode: u8) -> bool {
    TABLE.iter().any(|e| e.opcode == opcode && matches!(e.presence, Presence::Kernel | Presence::KernelAlways))
}

#[test]
fn the_kernels_commands_are_reported_if_it_does_them() {
    let reservations = |disk: &Disk| reported(disk).iter().filter(|(o, _)| matches!(o, 0x16 | 0x17 | 0x5E | 0x5F)).count();
    assert_eq!(reservations(&Disk::new()), 14);
    let without = Disk::with(Memory::new(1 << 20), Config { kernel_reservations: false, ..Config::default() });
    assert_eq!(reservations(&without), 0);
    assert!(reported(&without).contains(&(0xA0, None)), "REPORT LUNS");
}

#[test]
fn reported_commands_are_those_that_are_not_refused() {
    for discard in [true, false] {
        let disk = Disk::with(Memory::new(1 << 20), Config { discard, ..Config::default() });
        let reported = reported(&disk);
        for opcode in 0..=255u8 {
            for action in 0..32u8 {
                let mut cdb = [0; 16];
                (cdb[0], cdb[1]) = (opcode, action);
                let outcome = disk.run(&cdb, &mut []);
                let sense = outcome.sense.map(|s| s.as_bytes().to_vec()).unwrap_or_default();
                let unknown = sense.get(12) == Some(&0x20);
                if by_the_kernel(opcode) {
                    assert!(sense[2] == 5, "opcode {opcode:02x} is not ours");
                    continue;
                }
                let rows: Vec<_> = reported.iter().filter(|(o, _)| *o == opcode).collect();
                assert_eq!(rows.is_empty(), unknown, "opcode {opcode:02x}");
                if rows.iter().all(|(_, a)| a.is_some_and(|a| a != u16::from(action))) && !rows.is_empty() {
                    assert_eq!(disk.cdb_fault(&cdb, &[]), (1, Some(4)), "{opcode:02x}/{action:02x}");
                }
            }
        }
        assert_eq!(reported.iter().any(|(o, _)| *o == 0x42), discard);
    }
}

#[test]
fn each_command_alone() {
    let disk = Disk::new();
    for (opcode, action) in reported(&disk) {
        let (right, wrong) = if action.is_some() { (2, 1) } else { (1, 2) };
        let reply = disk.read(&rsoc(right, opcode, action.unwrap_or(0)), 65535);
        assert_eq!(disk.read(&rsoc(3, opcode, action.unwrap_or(0)), 65535), reply);
        assert_eq!(reply[..2], [0, 3]);
        assert_eq!(usize::from(u16::from_be_bytes([reply[2], reply[3]])), reply.len() - 4);
        assert_eq!(reply[4], opcode);
        if let Some(action) = action {
            assert_eq!(u16::from(reply[5] & 0x1F), action);
        }
        assert_eq!(disk.cdb_fault(&rsoc(wrong, opcode, action.unwrap_or(0)), &[]), (2, Some(2)));
    }
    assert_eq!(disk.read(&rsoc(1, 0xC0, 0), 65535), [0, 1, 0, 0], "not supported");
    assert_eq!(disk.read(&rsoc(2, 0x9E, 0x1F), 65535), [0, 1, 0, 0]);
    assert_eq!(disk.cdb_fault(&rsoc(4, 0, 0), &[]), (2, Some(2)));
}

#[test]
fn timeouts() {
    let disk = Disk::new();
    let reply = disk.read(&rsoc(0x80, 0, 0), 65535);
    let descriptors = reply[4..].chunks_exact(20);
    assert_eq!(descriptors.len(), reported(&disk).len());
    for d in descriptors {
        assert_eq!((d[5] & 2, d[8], d[9]), (2, 0, 10));
        assert!(d[12..16] <= d[16..20], "nominal is not above recommended");
    }
    let one = disk.read(&rsoc(0x81, 0x28, 0), 65535);
    assert_eq!((one[1], one.len()), (0x83, 4 + 10 + 12));
}

#[test]
fn usage_bits_are_the_ones_that_are_evaluated() {
    // Every bit outside the usage data and the list of ignored bits is refused, with its place.
    let disk = Disk::new();
    for entry in TABLE.iter().filter(|e| matches!(e.presence, Presence::Always | Presence::Thin | Presence::Atomic)) {
        for byte in 1..entry.usage.len() {
            for bit in 0..8u8 {
                let known = entry.usage[byte] | entry.ignored_bits(byte);
                if known & 1 << bit != 0 {
                    continue;
                }
                let mut cdb = vec![0; entry.usage.len()];
                cdb[0] = entry.opcode;
                cdb[1] = entry.action.unwrap_or(0);
                cdb[byte] |= 1 << bit;
                assert_eq!(disk.cdb_fault(&cdb, &[]), (byte as u16, Some(bit)), "{} {cdb:02x?}", entry.name);
            }
        }
        let short: Vec<u8> = entry.usage[..entry.usage.len() - 1].to_vec();
        let mut short: Vec<u8> = short.iter().map(|_| 0).collect();
        (short[0], short[1]) = (entry.opcode, entry.action.unwrap_or(0));
        assert_eq!(disk.cdb_fault(&short, &[]), (short.len() as u16, None), "cut {}", entry.name);
    }
}

/// A line of the table in the documentation.
fn line(entry: &Entry) -> String {
    let opcode = match entry.action {
        Some(action) => format!("{:02X}/{action:02X}", entry.opcode),
        None => format!("{:02X}", entry.opcode),
    };
    let data = match entry.direction {
        Direction::None => "none",
        Direction::In => "in",
        Direction::Out => "out",
    };
    let usage: Vec<String> = entry.usage[1..].iter().map(|b| format!("{b:02X}")).collect();
    let when = match entry.presence {
        Presence::Always => "always",
        Presence::Thin => "blocks can be unmapped",
        Presence::Atomic => "512-byte blocks",
        Presence::Ports(0b10) => "explicit ALUA",
        Presence::Ports(_) => "target port groups",
        Presence::Kernel | Presence::KernelAlways => "by the kernel",
    };
    format!("| {opcode} | {} | {data} | `{}` | {when} |", entry.name, usage.join(" "))
}

#[test]
fn the_documentation_has_this_table() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/scsi.md");
    let text = std::fs::read_to_string(path).unwrap();
    let section = text.split("\n## ").find(|s| s.starts_with("Commands\n")).unwrap();
    let documented: Vec<&str> = section.lines().filter(|l| l.starts_with("| ")).skip(1).collect();
    let expected: Vec<String> = TABLE.iter().map(line).collect();
    assert_eq!(documented.join("\n"), expected.join("\n"), "docs/scsi.md should have:\n{}", expected.join("\n"));
}
