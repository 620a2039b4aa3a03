//! A small iSCSI target over one [`Lun`] (RFC 7143): enough for libiscsi's test suite to reach every command without a
//! kernel. One thread a connection, error recovery level 0, no digests, no authentication. Residuals are counted as the
//! standard says, also where the kernel's target cannot.

use img_tcmu::scsi::{Data, Lun, Status};
use std::collections::VecDeque;
use std::io::{self, IoSliceMut, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;

/// Data-in of one PDU.
const MAX_DATA_IN: usize = 256 << 10;
/// Data-out asked for by one R2T.
const MAX_BURST: usize = 1 << 20;
/// Immediate data.
const FIRST_BURST: usize = 64 << 10;

pub const NAME: &str = "iqn.2026-01.org.example:disk";

/// Serves `lun` as LUN 0 on a free port until the process ends.
pub fn serve(lun: Lun) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (stream, lun) = (stream.unwrap(), lun.clone());
            thread::spawn(move || {
                stream.set_nodelay(true).unwrap();
                // A connection that breaks off is the initiator's affair.
                let session = Session { stream, lun, waiting: VecDeque::new(), stat_sn: 1, exp_cmd_sn: 0 };
                let _ = session.run();
            });
        }
    });
    address
}

struct Pdu {
    header: [u8; 48],
    data: Vec<u8>,
}

impl Pdu {
    fn new(opcode: u8, flags: u8, request: &Pdu) -> Self {
        let mut header = [0; 48];
        (header[0], header[1]) = (opcode, flags);
        header[16..20].copy_from_slice(&request.header[16..20]);
        Self { header, data: Vec::new() }
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.header[at..at + 4].try_into().unwrap())
    }

    fn put(&mut self, at: usize, value: u32) {
        self.header[at..at + 4].copy_from_slice(&value.to_be_bytes());
    }
}

struct Session {
    stream: TcpStream,
    lun: Lun,
    /// What came while data-out was awaited.
    waiting: VecDeque<Pdu>,
    stat_sn: u32,
    exp_cmd_sn: u32,
}

impl Session {
    fn run(mut self) -> io::Result<()> {
        loop {
            let pdu = match self.waiting.pop_front() {
                Some(pdu) => pdu,
                None => self.receive()?,
            };
            let immediate = pdu.header[0] & 0x40 != 0;
            let opcode = pdu.header[0] & 0x3F;
            if opcode == 0x03 || opcode != 0x05 && !immediate && pdu.u32(24) == self.exp_cmd_sn {
                self.exp_cmd_sn = pdu.u32(24).wrapping_add(u32::from(!immediate));
            } else if opcode != 0x05 && !immediate {
                continue; // out of the window: dropped
            }
            match opcode {
                0x00 if pdu.u32(16) != u32::MAX => self.nop(&pdu)?,
                0x01 => self.command(&pdu)?,
                0x02 => {
                    let mut reply = Pdu::new(0x22, 0x80, &pdu);
                    self.status(&mut reply)?;
                }
                0x03 => self.login(&pdu)?,
                0x06 => {
                    let mut reply = Pdu::new(0x26, 0x80, &pdu);
                    return self.status(&mut reply);
                }
                _ => {}
            }
        }
    }

    fn receive(&mut self) -> io::Result<Pdu> {
        let mut header = [0; 48];
        self.stream.read_exact(&mut header)?;
        let additional = usize::from(header[4]) * 4;
        let len = u32::from_be_bytes([0, header[5], header[6], header[7]]) as usize;
        let mut rest = vec![0; additional + len.next_multiple_of(4)];
        self.stream.read_exact(&mut rest)?;
        Ok(Pdu { header, data: rest[additional..additional + len].to_vec() })
    }

    fn send(&mut self, pdu: &mut Pdu) -> io::Result<()> {
        let len = (pdu.data.len() as u32).to_be_bytes();
        pdu.header[5..8].copy_from_slice(&len[1..]);
        pdu.put(28, self.exp_cmd_sn);
        pdu.put(32, self.exp_cmd_sn.wrapping_add(64));
        let mut bytes = pdu.header.to_vec();
        bytes.extend(&pdu.data);
        bytes.resize(48 + pdu.data.len().next_multiple_of(4), 0);
        self.stream.write_all(&bytes)
    }

    /// Sends a PDU that carries a status.
    fn status(&mut self, pdu: &mut Pdu) -> io::Result<()> {
        pdu.put(24, self.stat_sn);
        self.stat_sn = self.stat_sn.wrapping_add(1);
        self.send(pdu)
    }

    fn nop(&mut self, request: &Pdu) -> io::Result<()> {
        let mut reply = Pdu::new(0x20, 0x80, request);
        reply.put(20, u32::MAX);
        reply.data = request.data.clone();
        self.status(&mut reply)
    }

    fn login(&mut self, request: &Pdu) -> io::Result<()> {
        let stage = request.header[1];
        let mut reply = Pdu::new(0x23, stage & 0x8F, request);
        reply.header[8..14].copy_from_slice(&request.header[8..14]);
        reply.header[15] = 1;
        let keys: &[&str] = match stage >> 2 & 3 {
            0 => &["AuthMethod=None", "TargetPortalGroupTag=1"],
            _ => &[
                "HeaderDigest=None",
                "DataDigest=None",
                "InitialR2T=Yes",
                "ImmediateData=Yes",
                "MaxBurstLength=1048576",
                "FirstBurstLength=65536",
                "MaxRecvDataSegmentLength=262144",
                "MaxOutstandingR2T=1",
                "MaxConnections=1",
                "ErrorRecoveryLevel=0",
                "DefaultTime2Wait=0",
                "DefaultTime2Retain=0",
                "DataPDUInOrder=Yes",
                "DataSequenceInOrder=Yes",
            ],
        };
        reply.data = keys.iter().flat_map(|key| key.bytes().chain([0])).collect();
        self.status(&mut reply)
    }

    fn command(&mut self, request: &Pdu) -> io::Result<()> {
        let (reads, writes) = (request.header[1] & 0x40 != 0, request.header[1] & 0x20 != 0);
        let expected = request.u32(20) as usize;
        let cdb: [u8; 16] = request.header[32..].try_into().unwrap();
        // Old bytes of earlier commands, as in the ring.
        let mut buffer = vec![0xE7; expected];
        if writes {
            let mut have = request.data.len().min(expected);
            buffer[..have].copy_from_slice(&request.data[..have]);
            assert!(have <= FIRST_BURST);
            // No more is asked for than the command says it has, as any target with a command parser does.
            while have < expected {
                have = self.ask_for(request, &mut buffer, have)?;
            }
        }
        if cdb[0] == 0xA0 {
            let luns = [&[0, 0, 0, 8, 0, 0, 0, 0][..], &[0; 8]].concat();
            let valid = luns.len().min(expected);
            buffer[..valid].copy_from_slice(&luns[..valid]);
            return self.data_in(request, &buffer[..valid], expected, 16);
        }
        let outcome = {
            let mut segments: Vec<IoSliceMut<'_>> = buffer.chunks_mut(4096).map(IoSliceMut::new).collect();
            self.lun.execute(&cdb, &mut Data::new(&mut segments))
        };
        match (outcome.status, outcome.data_in) {
            (Status::Good, Some(valid)) if reads => {
                let valid = valid as usize;
                self.data_in(request, &buffer[..valid], expected, self.asked_for(&cdb).unwrap_or(valid))
            }
            (status, _) => {
                let mut reply = Pdu::new(0x21, 0x80, request);
                reply.header[3] = status as u8;
                if let Some(sense) = outcome.sense {
                    reply.data = (sense.as_bytes().len() as u16).to_be_bytes().to_vec();
                    reply.data.extend(sense.as_bytes());
                }
                if let (Status::Good, true, Some(asked)) = (status, writes, self.asked_for(&cdb)) {
                    residual(&mut reply, expected, asked);
                }
                self.status(&mut reply)
            }
        }
    }

    /// Bytes that the CDB of a plain read or write says are to be transferred.
    fn asked_for(&self, cdb: &[u8; 16]) -> Option<usize> {
        let blocks = match cdb[0] {
            0x28 | 0x2A | 0x2E => u32::from(u16::from_be_bytes([cdb[7], cdb[8]])),
            0xA8 | 0xAA | 0xAE => u32::from_be_bytes(cdb[6..10].try_into().unwrap()),
            0x88 | 0x8A | 0x8E => u32::from_be_bytes(cdb[10..14].try_into().unwrap()),
            _ => return None,
        };
        Some(blocks as usize * self.lun.block_size() as usize)
    }

    /// Asks for the next burst of data-out; returns how much there is then.
    fn ask_for(&mut self, request: &Pdu, buffer: &mut [u8], have: usize) -> io::Result<usize> {
        let end = buffer.len().min(have + MAX_BURST);
        let mut ready = Pdu::new(0x31, 0x80, request);
        ready.put(20, 1); // target transfer tag
        ready.put(24, self.stat_sn);
        ready.put(40, have as u32);
        ready.put(44, (end - have) as u32);
        self.send(&mut ready)?;
        let mut at = have;
        while at < end {
            let pdu = self.receive()?;
            if pdu.header[0] & 0x3F != 0x05 {
                self.waiting.push_back(pdu);
                continue;
            }
            let offset = pdu.u32(40) as usize;
            buffer[offset..offset + pdu.data.len()].copy_from_slice(&pdu.data);
            at += pdu.data.len();
        }
        Ok(end)
    }

    /// Sends data-in, the status in its last PDU. `asked` is what the CDB says.
    fn data_in(&mut self, request: &Pdu, data: &[u8], expected: usize, asked: usize) -> io::Result<()> {
        for (index, chunk) in data.chunks(MAX_DATA_IN).enumerate() {
            let last = (index + 1) * MAX_DATA_IN >= data.len();
            let mut pdu = Pdu::new(0x25, if last { 0x81 } else { 0 }, request);
            pdu.put(36, index as u32);
            pdu.put(40, (index * MAX_DATA_IN) as u32);
            pdu.data = chunk.to_vec();
            if last {
                residual(&mut pdu, expected, asked);
                return self.status(&mut pdu);
            }
            self.send(&mut pdu)?;
        }
        let mut reply = Pdu::new(0x21, 0x80, request);
        residual(&mut reply, expected, asked);
        self.status(&mut reply)
    }
}

/// Overflow or underflow and its count.
fn residual(pdu: &mut Pdu, expected: usize, asked: usize) {
    if asked > expected {
        pdu.header[1] |= 0x04;
    } else if asked < expected {
        pdu.header[1] |= 0x02;
    }
    pdu.put(44, asked.abs_diff(expected) as u32);
}
