//! The command ring against a kernel that sends anything: entries, mailbox, indices, records of completions.
//!
//! Whatever is in the shared memory, buffers that are lent lie in the data area, never two of them in the same place, and nothing else is written but what
//! the protocol says. As long as the kernel is honest, every command is answered once, with its own data.

use super::input::Input;
use img_tcmu::tcmu::abi;
use img_tcmu::tcmu::fake::{BLOCK, FakeKernel, Options, Request};
use img_tcmu::tcmu::{Command, Completion, Fetched, Ring};
use std::ops::Range;

const BLOCKS: usize = 16;
const MAX_STEPS: usize = 60;

struct World {
    kernel: FakeKernel,
    options: Options,
    ring: Option<Ring>,
    /// Fetched, with what was put into their buffers and where those are in this process.
    commands: Vec<(Command, u8, Vec<Range<usize>>)>,
    honest: bool,
    stamp: u8,
    sent: usize,
}

pub fn ring(data: &[u8]) {
    let mut input = Input::new(data);
    let flags = input.u8();
    let options = Options {
        ring_size: input.choose(&[4096 - 128, 256, 512, 1024, 8192 - 128]),
        blocks: BLOCKS,
        flags: u16::from(flags & 15),
        fragmented: flags & 16 != 0,
    };
    let Ok(kernel) = FakeKernel::new(options) else { return };
    let mut world = World { kernel, options, ring: None, commands: Vec::new(), honest: true, stamp: 0, sent: 0 };
    world.attach();
    for _ in 0..MAX_STEPS {
        if input.is_empty() {
            break;
        }
        world.step(&mut input);
    }
    world.end();
}

impl World {
    fn data_start(&self) -> usize {
        // Where the ring says that it ends, which a hostile kernel may change; the fake one's own here.
        abi::MAILBOX_SIZE + self.options.ring_size as usize
    }

    fn attach(&mut self) {
        let Ok(region) = self.kernel.map() else { return };
        let failure = Completion::check_condition(&[0x70, 0, 4, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x44, 0, 0, 0, 0, 0]);
        let attached = Ring::attach(region, self.kernel.doorbell(), "user_0/fuzz", failure);
        assert!(attached.is_ok() || !self.honest, "an honest ring is refused: {attached:?}");
        self.ring = attached.ok();
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.u8() % 16 {
            0..3 => self.submit(input),
            3..6 => self.fetch(),
            6..9 => self.complete(input),
            9 => self.raw_entry(input),
            10 => self.damage(input),
            11 => self.damage_mailbox(input),
            12 => {
                self.kernel.submit_tmr(input.u8(), &[1, input.u16()]);
            }
            13 => {
                if let Some(ring) = &self.ring {
                    let _ = ring.kick();
                }
            }
            14 => self.succeed(),
            _ => {
                self.honest = false;
                self.kernel.reset();
            }
        }
    }

    fn submit(&mut self, input: &mut Input<'_>) {
        let mut cdb = input.take(16).to_vec();
        cdb.resize(16, 0);
        if cdb[0] == 0x7f {
            // The kernel lets none through that is longer.
            cdb[7] = cdb[7].min((abi::MAX_CDB - 8) as u8);
        }
        let len = abi::cdb_len(cdb[..8].try_into().unwrap_or_default());
        cdb.resize(len, 0);
        let bytes = input.below((BLOCK * 5) as u64) as usize;
        let request = match input.u8() % 3 {
            0 => Request::without_data(&cdb),
            1 => Request::read(&cdb, bytes),
            _ => Request::write(&cdb, vec![0x77; bytes]),
        };
        self.sent += self.kernel.submit(&[request]).len();
    }

    fn fetch(&mut self) {
        let Some(ring) = &self.ring else { return };
        match ring.fetch() {
            Ok(Some(Fetched::Command(mut command))) => {
                assert!(command.cdb().len() <= abi::MAX_CDB);
                self.stamp = self.stamp.wrapping_add(1) | 1;
                let before = self.control();
                let len: u64 = command.data().len();
                let mut sum = 0;
                let mut places = Vec::new();
                for slice in command.data().slices_mut().iter_mut() {
                    sum += slice.len() as u64;
                    let place = slice.as_ptr() as usize..slice.as_ptr() as usize + slice.len();
                    let others = self.commands.iter().flat_map(|(_, _, places)| places).chain(&places);
                    assert!(
                        !others.into_iter().any(|other| other.start < place.end && place.start < other.end),
                        "two buffers in one place"
                    );
                    places.push(place);
                    if self.honest {
                        slice.fill(self.stamp);
                    } else if let Some(first) = slice.first_mut() {
                        *first = self.stamp;
                    }
                    if let Some(last) = slice.last_mut() {
                        *last = self.stamp;
                    }
                }
                assert_eq!(sum, len, "a buffer's length");
                if let Some(mut bidi) = command.bidi() {
                    bidi.slices_mut().iter_mut().for_each(|slice| slice.fill(self.stamp));
                }
                assert!(self.control() == before, "a lent buffer lies outside of the data area");
                self.commands.push((command, self.stamp, places));
            }
            Ok(_) => {}
            Err(error) => assert!(!self.honest, "an honest ring is out of service: {error}"),
        }
    }

    /// Mailbox and ring.
    fn control(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.data_start()];
        let _ = self.kernel.region().read(0, &mut bytes);
        bytes
    }

    fn complete(&mut self, input: &mut Input<'_>) {
        if self.commands.is_empty() {
            return;
        }
        let (mut command, stamp, _) = self.commands.swap_remove(input.below(self.commands.len() as u64) as usize);
        // Nobody else's data are in it, unless the kernel itself gave it to two.
        let mut data = command.data();
        let others = data.slices_mut().iter().any(|slice| slice.first().is_some_and(|byte| *byte != stamp));
        assert!(!others || !self.honest, "somebody else's data are in a buffer");
        let len = command.data().len();
        match input.u8() % 6 {
            0 => drop(command),
            1 => command.complete(Completion::good_with(input.below(len + 2) as u32)),
            2 => command.complete(Completion::check_condition(input.take(20))),
            3 => command.complete(Completion::status(input.u8())),
            _ => command.complete(Completion::good()),
        }
    }

    fn raw_entry(&mut self, input: &mut Input<'_>) {
        self.honest = false;
        let op = u32::from(input.u8() % 5);
        let id = u16::from(input.u8());
        let mut body = vec![0; input.below(200) as usize & !7];
        if op == abi::OP_CMD {
            body.resize(body.len().max(112), 0);
            // Counts of iovecs, where the CDB is, iovecs.
            body[0] = input.u8() % 4;
            body[4] = if input.u8().is_multiple_of(4) { input.u8() } else { 0 };
            let cdb_at = self.offset(input);
            body[16..24].copy_from_slice(&cdb_at.to_le_bytes());
            for index in 0..3 {
                let (base, len) = (self.offset(input), input.telling(&[4096, 8192]));
                body[40 + index * 16..48 + index * 16].copy_from_slice(&base.to_le_bytes());
                body[48 + index * 16..56 + index * 16].copy_from_slice(&len.to_le_bytes());
            }
        } else {
            let given = input.take(40);
            let len = body.len().min(given.len());
            body[..len].copy_from_slice(&given[..len]);
        }
        self.kernel.submit_raw(op, id, &body);
    }

    /// An offset in the region that means something.
    fn offset(&self, input: &mut Input<'_>) -> u64 {
        let data = self.data_start().next_multiple_of(BLOCK) as u64;
        let head = abi::MAILBOX_SIZE as u64 + u64::from(self.kernel.head());
        let about = [data, data + 4096, data + 8192, head, head + 112, self.kernel.size() as u64, self.data_start() as u64];
        input.telling(&about)
    }

    fn damage(&mut self, input: &mut Input<'_>) {
        self.honest = false;
        let at = (abi::MAILBOX_SIZE + input.below(u64::from(self.options.ring_size)) as usize) & !7;
        let value = self.offset(input);
        let bytes = value.to_le_bytes();
        let width = if input.flag() { 4 } else { 8 };
        let _ = self.kernel.region().write(at, &bytes[..width]);
    }

    fn damage_mailbox(&mut self, input: &mut Input<'_>) {
        self.honest = false;
        let at = input.below(32) as usize * 4;
        let value = match input.u8() % 4 {
            0 => input.u32(),
            1 => u32::from(input.u8()) * 8,
            2 => input.choose(&[0, 1, 2, u32::from_le_bytes(*b"imT1"), self.options.ring_size, self.kernel.head(), self.kernel.tail()]),
            _ => input.telling(&[self.offset(&mut Input::new(&[]))]) as u32,
        };
        let _ = self.kernel.region().write(at, &value.to_le_bytes());
    }

    /// Another process opens what is in the memory now, in a copy of it, and completes everything.
    fn succeed(&mut self) {
        let Ok(copy) = FakeKernel::new(self.options) else { return };
        let mut bytes = vec![0; self.kernel.size()];
        let done = self.kernel.region().read(0, &mut bytes).and_then(|()| copy.region().write(0, &bytes));
        let Ok(region) = copy.map() else { return };
        if done.is_err() {
            return;
        }
        let attached = Ring::attach(region, copy.doorbell(), "user_0/successor", Completion::status(8));
        let Ok(ring) = attached else {
            assert!(!self.honest, "a successor is refused: {attached:?}");
            return;
        };
        let mut fetched = 0;
        for _ in 0..200 {
            match ring.fetch() {
                Ok(Some(Fetched::Command(command))) => {
                    assert!(command.recovered(), "a command of before is not known as one");
                    fetched += 1;
                    command.complete(Completion::good());
                }
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(error) => {
                    assert!(!self.honest, "a successor's ring is out of service: {error}");
                    break;
                }
            }
        }
        if self.honest {
            // All that the kernel has had no answer to, less what was completed but not yet taken.
            assert!(fetched <= self.kernel.outstanding() && fetched >= self.commands.len(), "a successor found {fetched} commands");
        }
    }

    fn end(mut self) {
        for _ in 0..200 {
            let before = self.commands.len();
            self.fetch();
            if self.commands.len() == before {
                break;
            }
        }
        for (command, ..) in self.commands.drain(..) {
            command.complete(Completion::good());
        }
        let Some(ring) = self.ring.take() else { return };
        if self.honest {
            // Notices may stand between commands.
            while let Ok(Some(fetched)) = ring.fetch() {
                drop(fetched);
            }
            let _ = ring.kick();
            assert_eq!(self.kernel.violations(), [], "what was done to an honest kernel");
            assert_eq!((self.kernel.outstanding(), self.kernel.answered()), (0, self.sent as u64), "commands without an answer");
        }
        assert_eq!(ring.in_flight(), 0, "commands in flight when all are completed");
        assert!(ring.close(), "the ring is still in use");
    }
}
