//! The ring against a fake kernel side, in one thread: what goes in comes out, whatever the order, and whatever is wrong with the
//! entries ends in a clear error.

use img_tcmu::tcmu::abi::{self, FLAG_OUT_OF_ORDER, FLAG_READ_LEN, FLAG_TMR};
use img_tcmu::tcmu::fake::{BLOCK, FakeKernel, Options, Request, Violation};
use img_tcmu::tcmu::{Command, Completion, Error, Fetched, Ring, RingFault, TmrKind};
use std::collections::BTreeMap;
use std::time::Duration;

const SENSE: [u8; 18] = [0x70, 0, 4, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x44, 0, 0, 0, 0, 0];
const NOW: Duration = Duration::ZERO;

fn attach(kernel: &FakeKernel) -> Ring {
    Ring::attach(kernel.map().unwrap(), kernel.doorbell(), "user_0/test", Completion::check_condition(&SENSE)).unwrap()
}

fn pair(options: Options) -> (FakeKernel, Ring) {
    let kernel = FakeKernel::new(options).unwrap();
    let ring = attach(&kernel);
    (kernel, ring)
}

fn fetch(ring: &Ring) -> Option<Command> {
    match ring.fetch().unwrap()? {
        Fetched::Command(command) => Some(command),
        Fetched::TaskManagement(notice) => panic!("{notice:?}"),
    }
}

fn fault(ring: &Ring) -> RingFault {
    match ring.fetch() {
        Err(Error::Ring { device, fault }) => {
            assert_eq!(device, "user_0/test");
            // It stays so.
            assert!(matches!(ring.fetch(), Err(Error::Ring { fault: again, .. }) if again == fault));
            fault
        }
        other => panic!("{other:?}"),
    }
}

const READ: [u8; 10] = [0x28, 0, 0, 0, 0, 7, 0, 0, 8, 0];
const WRITE: [u8; 10] = [0x2a, 0, 0, 0, 0, 7, 0, 0, 8, 0];

#[test]
fn a_read_and_a_write_go_through_in_place() {
    let (kernel, ring) = pair(Options::default());
    assert!(ring.fetch().unwrap().is_none());
    let payload: Vec<u8> = (0..3 * BLOCK).map(|i| (i % 251) as u8).collect();
    let ids = kernel.submit(&[Request::write(&WRITE, payload.clone()), Request::read(&READ, BLOCK + 1)]);
    assert!(ring.has_pending());

    let mut write = fetch(&ring).unwrap();
    assert_eq!((write.id(), write.cdb()), (ids[0], &WRITE[..]));
    assert!(!write.recovered());
    assert_eq!(write.data().len(), payload.len() as u64);
    assert_eq!(write.data().slices().iter().flat_map(|slice| slice.iter().copied()).collect::<Vec<u8>>(), payload);
    let mut read = fetch(&ring).unwrap();
    assert!(fetch(&ring).is_none() && !ring.has_pending());
    assert_eq!(ring.in_flight(), 2);
    for (number, slice) in read.data().slices_mut().iter_mut().enumerate() {
        slice.fill(number as u8 + 1);
    }
    write.complete(Completion::good());
    read.complete(Completion::good());
    assert_eq!(kernel.answers(), []);
    assert!(ring.needs_kick());
    ring.kick().unwrap();
    ring.kick().unwrap();
    assert_eq!(kernel.kicks(), 1);
    let answers = kernel.answers();
    assert_eq!(answers.iter().map(|answer| (answer.id, answer.status)).collect::<Vec<_>>(), [(ids[0], 0), (ids[1], 0)]);
    assert_eq!(answers[1].data, vec![1; BLOCK + 1]);
    assert_eq!((ring.in_flight(), kernel.violations()), (0, vec![]));
}

#[test]
fn cdbs_of_every_length() {
    let (kernel, ring) = pair(Options::default());
    let mut cdbs = vec![vec![0u8; 6], vec![0x28; 10], vec![0x5e; 10], vec![0x88; 16], vec![0xa0; 12], vec![0xc0; 10], vec![0x60; 12]];
    for additional in [8u8, 24, 252] {
        let mut cdb = vec![0x7f; 8 + usize::from(additional)];
        cdb[7] = additional;
        cdbs.push(cdb);
    }
    for cdb in cdbs {
        kernel.submit(&[Request::without_data(&cdb)]);
        let command = fetch(&ring).unwrap();
        assert_eq!(command.cdb(), cdb);
        command.complete(Completion::good());
    }
}

#[test]
fn a_dropped_command_completes_with_the_failure_status() {
    let (kernel, ring) = pair(Options::default());
    kernel.submit(&[Request::read(&READ, BLOCK)]);
    drop(fetch(&ring).unwrap());
    ring.kick().unwrap();
    let answer = kernel.answer(NOW).unwrap();
    assert_eq!((answer.status, &answer.sense[..18], answer.data.len()), (2, &SENSE[..], 0));
}

/// Blocks are recycled with what is in them: none of it may reach another initiator.
#[test]
fn stale_bytes_never_reach_the_initiator() {
    for flags in [FLAG_OUT_OF_ORDER, FLAG_OUT_OF_ORDER | FLAG_READ_LEN] {
        let (kernel, ring) = pair(Options { flags, ..Options::default() });
        let complete_after_a_secret = |completion: Completion| {
            kernel.submit(&[Request::write(&WRITE, vec![0x5e; 2 * BLOCK])]);
            fetch(&ring).unwrap().complete(Completion::good());
            ring.kick().unwrap();
            kernel.answers();
            kernel.submit(&[Request::read(&[0x12, 0, 0, 0, 96, 0], BLOCK + 96)]);
            let mut command = fetch(&ring).unwrap();
            command.data().slices_mut()[0][..36].fill(1);
            command.complete(completion);
            ring.kick().unwrap();
            kernel.answer(NOW).unwrap()
        };
        let mut short = complete_after_a_secret(Completion::good_with(36)).data;
        assert_eq!(short.len(), if flags & FLAG_READ_LEN != 0 { 36 } else { BLOCK + 96 });
        assert!(short.drain(..36).all(|byte| byte == 1) && short.iter().all(|&byte| byte == 0));
        let nothing = complete_after_a_secret(Completion::good_with(0)).data;
        assert!(nothing.iter().all(|&byte| byte == 0));
        let busy = complete_after_a_secret(Completion { read_len: Some(0), ..Completion::status(0x08) });
        assert!(busy.status == 0x08 && busy.data.iter().all(|&byte| byte == 0));
        let fault = complete_after_a_secret(Completion::check_condition(&SENSE));
        assert!(fault.data.is_empty() && fault.sense[..18] == SENSE && fault.sense[18..].iter().all(|&byte| byte == 0));
        assert_eq!(kernel.violations(), []);
    }
}

#[test]
fn completions_in_every_order() {
    for order in [[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2], [2, 3, 0, 1], [1, 2, 3, 0], [3, 0, 1, 2]] {
        let (kernel, ring) = pair(Options::default());
        let requests = [
            Request::without_data(&[0; 6]),
            Request::read(&READ, BLOCK),
            Request::write(&WRITE, vec![1; 9 * BLOCK]),
            Request::read(&READ, 3 * BLOCK),
        ];
        let ids = kernel.submit(&requests);
        let mut commands: Vec<_> = (0..4).map(|_| fetch(&ring)).collect();
        for index in order {
            commands[index].take().unwrap().complete(Completion::status(index as u8 * 8));
            ring.kick().unwrap();
            let answer = kernel.answer(NOW).expect("nothing waits for another command");
            assert_eq!((answer.id, answer.status), (ids[index], index as u8 * 8));
        }
        assert_eq!((kernel.violations(), kernel.tail()), (vec![], kernel.head()));
    }
}

#[test]
fn completions_in_order_where_the_kernel_needs_it() {
    let (kernel, ring) = pair(Options { flags: 0, ..Options::default() });
    let ids = kernel.submit(&[Request::read(&READ, BLOCK), Request::read(&READ, BLOCK), Request::read(&READ, BLOCK)]);
    let mut commands: Vec<_> = (0..3).map(|_| fetch(&ring)).collect();
    for (index, answered) in [(2, 0), (1, 0), (0, 3)] {
        commands[index].take().unwrap().complete(Completion::good());
        ring.kick().unwrap();
        assert_eq!(kernel.answered(), answered);
    }
    assert_eq!(kernel.answers().iter().map(|answer| answer.id).collect::<Vec<_>>(), ids);
    assert_eq!(kernel.violations(), []);
}

#[test]
fn the_ring_wraps_behind_filler() {
    let (kernel, ring) = pair(Options { ring_size: 600, blocks: 16, ..Options::default() });
    let mut wrapped = 0;
    let mut before = 0;
    for round in 0..1000usize {
        let bytes = round % 7 * 1000;
        let request = if round % 2 == 0 { Request::read(&READ, bytes) } else { Request::write(&WRITE, vec![round as u8; bytes]) };
        assert_eq!(kernel.submit(&[request]).len(), 1, "round {round}");
        let mut command = fetch(&ring).unwrap();
        assert_eq!(command.data().len(), bytes as u64);
        command.complete(Completion::good());
        ring.kick().unwrap();
        assert_eq!(kernel.answered(), round as u64 + 1);
        wrapped += usize::from(kernel.head() < before);
        before = kernel.head();
    }
    assert!(wrapped > 100 && kernel.violations().is_empty());
}

#[test]
fn a_full_ring_is_emptied() {
    let (kernel, ring) = pair(Options { ring_size: 1024, ..Options::default() });
    for _ in 0..100 {
        let ids = kernel.submit(&vec![Request::without_data(&[0; 6]); 20]);
        assert!(ids.len() < 20 && ids.len() >= 7, "{}", ids.len());
        while let Some(command) = fetch(&ring) {
            command.complete(Completion::good());
        }
        ring.kick().unwrap();
        assert_eq!(kernel.answers().len(), ids.len());
    }
}

#[test]
fn notices_are_reported_and_the_tail_goes_over_them() {
    let (kernel, ring) = pair(Options::default());
    let ids = kernel.submit(&[Request::read(&READ, BLOCK)]);
    assert!(kernel.submit_tmr(5, &[ids[0], 4711]));
    let command = fetch(&ring).unwrap();
    match ring.fetch().unwrap() {
        Some(Fetched::TaskManagement(notice)) => {
            assert_eq!((notice.kind, notice.commands), (TmrKind::LunReset, vec![ids[0], 4711]));
        }
        other => panic!("{other:?}"),
    }
    assert_ne!(kernel.tail(), kernel.head());
    command.complete(Completion::good());
    assert_eq!(kernel.tail(), kernel.head());
    ring.kick().unwrap();
    // With nothing in flight the tail follows at once, and the kernel is told.
    assert!(kernel.submit_tmr(1, &[]));
    assert!(matches!(ring.fetch().unwrap(), Some(Fetched::TaskManagement(notice)) if notice.kind == TmrKind::AbortTask));
    assert_eq!(kernel.tail(), kernel.head());
    assert!(ring.needs_kick());
    ring.kick().unwrap();
    assert_eq!(kernel.violations(), []);
}

#[test]
fn entries_of_unknown_kind_are_disowned() {
    let (kernel, ring) = pair(Options::default());
    assert!(kernel.submit_raw(5, 9, &[0xff; 24]));
    assert!(ring.fetch().unwrap().is_none());
    assert_eq!(kernel.tail(), kernel.head());
    let mut header = [0; 8];
    kernel.region().read(abi::MAILBOX_SIZE, &mut header).unwrap();
    assert_eq!(header[7], abi::UFLAG_UNKNOWN_OP);
}

/// The body of a command entry, after the header.
fn body(iovecs: u32, bidi: u32, cdb_off: u64, spans: &[(u64, u64)], len: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(iovecs.to_ne_bytes());
    bytes.extend(bidi.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend(cdb_off.to_ne_bytes());
    bytes.extend([0; 16]);
    for (base, len) in spans {
        bytes.extend(base.to_ne_bytes());
        bytes.extend(len.to_ne_bytes());
    }
    bytes.resize(len - 8, 0);
    bytes
}

#[test]
fn damaged_entries_take_the_ring_out_of_service() {
    let start = abi::MAILBOX_SIZE as u64;
    let area = (start + u64::from(Options::default().ring_size)).next_multiple_of(BLOCK as u64);
    let end = area + 4096 * BLOCK as u64;
    let page = BLOCK as u64;
    let content = |what| RingFault::EntryContent { at: 0, len: 128, what };
    let bounds = |base, len| RingFault::BufferBounds { id: 3, base, len };
    let overlap = |base| RingFault::BufferOverlap { id: 3, base };
    let cdb = |cdb_off| RingFault::CdbOffset { at: 0, cdb_off };
    let cases: Vec<(Vec<u8>, RingFault)> = vec![
        (body(6, 0, start + 112, &[], 128), content("its iovecs")),
        (body(5, 0, start + 112, &[], 128), content("its CDB")),
        (body(u32::MAX, u32::MAX, start + 112, &[], 128), content("its iovecs")),
        (body(0, 0, start + 128, &[], 128), cdb(start + 128)),
        (body(0, 0, 0, &[], 128), cdb(0)),
        (body(0, 0, u64::MAX, &[], 128), cdb(u64::MAX)),
        (body(0, 0, end, &[], 128), cdb(end)),
        // A CDB that reaches over the end, and one over the fields of the entry.
        (body(0, 0, start + 124, &[], 128), content("its CDB")),
        (body(0, 0, start + 8, &[], 128), content("its CDB")),
        (body(1, 0, start + 112, &[(0, 128)], 128), bounds(0, 128)),
        (body(1, 0, start + 112, &[(end - 1, 2)], 128), bounds(end - 1, 2)),
        (body(1, 0, start + 112, &[(u64::MAX, 2)], 128), bounds(u64::MAX, 2)),
        (body(1, 0, start + 112, &[(area, u64::MAX)], 128), bounds(area, u64::MAX)),
        (body(2, 0, start + 112, &[(area, 2 * page), (area + page, page)], 128), overlap(area + page)),
        (body(1, 1, start + 112, &[(area, page), (area, page)], 128), overlap(area)),
    ];
    for (bytes, wanted) in cases {
        let (kernel, ring) = pair(Options::default());
        assert!(kernel.submit_raw(abi::OP_CMD, 3, &bytes));
        assert_eq!(fault(&ring), wanted);
    }
    let (kernel, ring) = pair(Options::default());
    assert!(kernel.submit_raw(abi::OP_CMD, 3, &[0; 96]));
    assert_eq!(fault(&ring), RingFault::EntryContent { at: 0, len: 104, what: "a command" });
    let (kernel, ring) = pair(Options::default());
    assert!(kernel.submit_raw(abi::OP_TMR, 0, &[0; 16]));
    assert_eq!(fault(&ring), RingFault::EntryContent { at: 0, len: 24, what: "a TMR" });
    let (kernel, ring) = pair(Options::default());
    let mut notice = vec![0; 32];
    notice[4..8].fill(0xff);
    assert!(kernel.submit_raw(abi::OP_TMR, 0, &notice));
    assert_eq!(fault(&ring), RingFault::EntryContent { at: 0, len: 40, what: "its command ids" });
}

#[test]
fn damaged_lengths_and_heads_take_the_ring_out_of_service() {
    use std::sync::atomic::Ordering::Release;
    for (len_op, len) in [(0, 0), (1, 0), (u32::MAX, !7), (136 | 1, 136), (1 << 31 | 1, 1 << 31)] {
        let (kernel, ring) = pair(Options::default());
        kernel.region().store_u32(abi::MAILBOX_SIZE, len_op, Release).unwrap();
        kernel.set_head(128);
        assert_eq!(fault(&ring), RingFault::EntryLength { at: 0, len });
    }
    let size = Options::default().ring_size;
    for head in [size, size + 8, 4, 1, u32::MAX] {
        let (kernel, ring) = pair(Options::default());
        kernel.set_head(head);
        assert_eq!(fault(&ring), RingFault::Index { name: "head", value: head, size });
    }
}

#[test]
fn two_commands_never_share_a_page_or_an_id() {
    let start = abi::MAILBOX_SIZE as u64;
    let area = (start + u64::from(Options::default().ring_size)).next_multiple_of(BLOCK as u64);
    let (kernel, ring) = pair(Options::default());
    assert!(kernel.submit_raw(abi::OP_CMD, 1, &body(1, 0, start + 112, &[(area, 512)], 128)));
    let first = fetch(&ring).unwrap();
    assert!(kernel.submit_raw(abi::OP_CMD, 2, &body(1, 0, start + 128 + 112, &[(area + 512, 512)], 128)));
    assert_eq!(fault(&ring), RingFault::BufferOverlap { id: 2, base: area + 512 });
    // What is in flight can still be completed.
    first.complete(Completion::good());
    assert_eq!(ring.in_flight(), 0);

    let (kernel, ring) = pair(Options::default());
    assert!(kernel.submit_raw(abi::OP_CMD, 7, &body(0, 0, start + 112, &[], 128)));
    let first = fetch(&ring).unwrap();
    assert!(kernel.submit_raw(abi::OP_CMD, 7, &body(0, 0, start + 128 + 112, &[], 128)));
    assert_eq!(fault(&ring), RingFault::DuplicateId { id: 7 });
    drop(first);
}

#[test]
fn mailboxes_that_make_no_sense_are_refused() {
    use std::sync::atomic::Ordering::Relaxed;
    let refuse = |offset: usize, value: u32| {
        let kernel = FakeKernel::new(Options::default()).unwrap();
        kernel.region().store_u32(offset, value, Relaxed).unwrap();
        match Ring::attach(kernel.map().unwrap(), kernel.doorbell(), "d", Completion::good()) {
            Err(Error::Ring { fault, .. }) => fault,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(refuse(0, 1), RingFault::Version(1));
    assert_eq!(refuse(0, 3), RingFault::Version(3));
    for (offset, values) in [(4, [0, 64, 132, u32::MAX]), (8, [0, 104, 4099, u32::MAX])] {
        for value in values {
            assert!(matches!(refuse(offset, value), RingFault::Geometry { .. }), "{offset}: {value}");
        }
    }
    assert!(matches!(refuse(12, 3), RingFault::Index { name: "head", .. }));
    assert!(matches!(refuse(64, u32::MAX), RingFault::Index { name: "tail", .. }));
}

#[test]
fn a_reset_under_our_feet_is_noticed_and_waited_out() {
    let (kernel, ring) = pair(Options::default());
    kernel.submit(&[Request::without_data(&[0; 6])]);
    fetch(&ring).unwrap().complete(Completion::good());
    ring.kick().unwrap();
    kernel.answers();
    kernel.submit(&[Request::write(&WRITE, vec![1; BLOCK]), Request::read(&READ, BLOCK), Request::read(&READ, BLOCK)]);
    let (one, two) = (fetch(&ring).unwrap(), fetch(&ring).unwrap());
    kernel.reset();
    assert_eq!(kernel.answers().len(), 3);
    let ids = kernel.submit(&[Request::read(&READ, BLOCK)]);
    // Nothing new while old commands are at work on buffers that may be the new ones'.
    assert!(ring.fetch().unwrap().is_none());
    one.complete(Completion::good());
    assert!(ring.fetch().unwrap().is_none());
    drop(two);
    let new = fetch(&ring).unwrap();
    assert_eq!(new.id(), ids[0]);
    new.complete(Completion::good());
    ring.kick().unwrap();
    assert_eq!(kernel.answer(NOW).unwrap().status, 0);
    assert_eq!(kernel.violations(), []);
}

#[test]
fn the_fake_kernel_notices_what_a_real_one_would() {
    let (kernel, ring) = pair(Options::default());
    kernel.submit(&[Request::read(&READ, BLOCK), Request::read(&READ, BLOCK)]);
    let (one, two) = (fetch(&ring).unwrap(), fetch(&ring).unwrap());
    one.complete(Completion::good());
    ring.kick().unwrap();
    // Somebody overwrites the id of the next response.
    two.complete(Completion::good());
    kernel.region().write(abi::MAILBOX_SIZE + 128 + 4, &[0x34, 0x12]).unwrap();
    ring.kick().unwrap();
    assert_eq!(kernel.violations(), [Violation::UnknownId(0x1234)]);
}

mod random {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Step {
        Submit { bytes: usize, write: bool, cdb: usize },
        Notice(u8),
        Fetch,
        Complete { which: usize, status: u8, read_len: Option<u32> },
        Drop(usize),
        Kick,
        Die,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (0usize..20 * BLOCK, any::<bool>(), 0usize..5).prop_map(|(bytes, write, cdb)| Step::Submit { bytes, write, cdb }),
            1 => any::<u8>().prop_map(Step::Notice),
            6 => Just(Step::Fetch),
            6 => (any::<usize>(), prop_oneof![Just(0u8), Just(2), Just(8)], proptest::option::of(0u32..100_000))
                .prop_map(|(which, status, read_len)| Step::Complete { which, status, read_len }),
            1 => any::<usize>().prop_map(Step::Drop),
            3 => Just(Step::Kick),
            1 => Just(Step::Die),
        ]
    }

    const CDBS: [&[u8]; 5] = [&[0; 6], &READ, &[0x88; 16], &[0xa8; 12], &[0x7f, 0, 0, 0, 0, 0, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8]];

    fn pattern(seed: u16, len: usize) -> Vec<u8> {
        (0..len).map(|at| (at as u16).wrapping_mul(31).wrapping_add(seed).to_le_bytes()[0]).collect()
    }

    /// What the initiator expects.
    struct Expected {
        request: Request,
        answer: Option<(u8, Option<u32>)>,
    }

    fn run(options: Options, steps: Vec<Step>) {
        let (kernel, mut ring) = pair(options);
        let mut expected: BTreeMap<u16, Expected> = BTreeMap::new();
        let mut flying: Vec<Command> = Vec::new();
        let mut serial = 0u16;
        let check = |kernel: &FakeKernel, expected: &mut BTreeMap<u16, Expected>| {
            assert_eq!(kernel.violations(), []);
            for answer in kernel.answers() {
                let Expected { request, answer: wanted } = expected.remove(&answer.id).expect("answered once");
                let (status, read_len) = wanted.expect("answered after it was completed");
                assert_eq!(answer.status, status);
                if status == 2 {
                    assert_eq!(&answer.sense[..18], &SENSE);
                } else if request.payload.is_empty() {
                    let filled = read_len.map_or(request.read_len, |len| request.read_len.min(len as usize));
                    let whole = pattern(answer.id, request.read_len);
                    assert_eq!(answer.data[..filled], whole[..filled]);
                    assert!(answer.data[filled..].iter().all(|&byte| byte == 0));
                }
            }
        };
        for step in steps {
            match step {
                Step::Submit { bytes, write, cdb } => {
                    serial = serial.wrapping_add(1);
                    let mut request = Request { cdb: CDBS[cdb].to_vec(), ..Request::default() };
                    if write {
                        request.payload = pattern(serial, bytes);
                    } else {
                        request.read_len = bytes;
                    }
                    for id in kernel.submit(std::slice::from_ref(&request)) {
                        assert!(expected.insert(id, Expected { request: request.clone(), answer: None }).is_none());
                    }
                }
                Step::Notice(kind) => {
                    kernel.submit_tmr(kind, &[1, 2, 3]);
                }
                Step::Fetch => {
                    if let Some(Fetched::Command(mut command)) = ring.fetch().unwrap() {
                        let Expected { request, .. } = &expected[&command.id()];
                        assert_eq!(command.cdb(), request.cdb);
                        if request.payload.is_empty() {
                            let whole = pattern(command.id(), request.read_len);
                            let mut rest = &whole[..];
                            for slice in command.data().slices_mut().iter_mut() {
                                let (part, after) = rest.split_at(slice.len());
                                slice.copy_from_slice(part);
                                rest = after;
                            }
                            assert!(rest.is_empty());
                        } else {
                            let payload: Vec<u8> = command.data().slices().iter().flat_map(|slice| slice.iter().copied()).collect();
                            assert_eq!(payload, request.payload);
                        }
                        flying.push(command);
                    }
                }
                Step::Complete { which, status, read_len } if !flying.is_empty() => {
                    let command = flying.swap_remove(which % flying.len());
                    let expected = expected.get_mut(&command.id()).unwrap();
                    let read_len = if status == 2 || !expected.request.payload.is_empty() { None } else { read_len };
                    expected.answer = Some((status, read_len));
                    let sense = if status == 2 { SENSE.as_slice().into() } else { Default::default() };
                    command.complete(Completion { status, sense, read_len });
                }
                Step::Drop(which) if !flying.is_empty() => {
                    let command = flying.swap_remove(which % flying.len());
                    expected.get_mut(&command.id()).unwrap().answer = Some((2, None));
                }
                Step::Kick => {
                    ring.kick().unwrap();
                    check(&kernel, &mut expected);
                }
                Step::Die => {
                    // The process is gone without a word; another one comes.
                    flying.drain(..).for_each(std::mem::forget);
                    ring = attach(&kernel);
                    // What had been completed but had no place in the ring is executed again.
                    kernel.take_completions();
                    check(&kernel, &mut expected);
                    expected.values_mut().for_each(|expected| expected.answer = None);
                }
                Step::Complete { .. } | Step::Drop(_) => {}
            }
        }
        // Everything comes to an end.
        for command in flying {
            expected.get_mut(&command.id()).unwrap().answer = Some((2, None));
        }
        while let Some(fetched) = ring.fetch().unwrap() {
            if let Fetched::Command(command) = fetched {
                let expected = expected.get_mut(&command.id()).unwrap();
                let read_len = expected.request.payload.is_empty().then_some(0);
                expected.answer = Some((8, read_len));
                command.complete(Completion { read_len, ..Completion::status(8) });
            }
        }
        ring.kick().unwrap();
        check(&kernel, &mut expected);
        assert!(expected.is_empty() && kernel.outstanding() == 0 && kernel.tail() == kernel.head());
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

        #[test]
        fn streams_of_commands(
            steps in proptest::collection::vec(step(), 1..200),
            fragmented: bool,
            in_order: bool,
            read_len: bool,
            ring_size in prop_oneof![Just(1024u32), Just(2000), Just(8192)],
        ) {
            let flags = if in_order { 0 } else { FLAG_OUT_OF_ORDER } | if read_len { FLAG_READ_LEN } else { 0 } | FLAG_TMR;
            run(Options { ring_size, blocks: 64, flags, fragmented }, steps);
        }

        /// Any bytes in the ring: an error or a value, never a panic.
        #[test]
        fn any_bytes(
            bytes in proptest::collection::vec(any::<u8>(), 1024),
            words in proptest::collection::vec((0usize..256, prop_oneof![Just(112u32 | 1), Just(128 | 1), Just(64 | 2), Just(16), Just(0)]), 0..30),
            head in 0u32..128,
        ) {
            let (kernel, ring) = pair(Options { ring_size: 1024, blocks: 4, ..Options::default() });
            kernel.region().write(abi::MAILBOX_SIZE, &bytes).unwrap();
            for (word, value) in words {
                kernel.region().store_u32(abi::MAILBOX_SIZE + 4 * word, value, std::sync::atomic::Ordering::Relaxed).unwrap();
            }
            kernel.set_head(head * 8);
            let mut commands = Vec::new();
            for _ in 0..200 {
                match ring.fetch() {
                    Ok(Some(Fetched::Command(command))) => commands.push(command),
                    Ok(Some(Fetched::TaskManagement(_))) => {}
                    Ok(None) | Err(_) => break,
                }
            }
            while let Some(command) = commands.pop() {
                command.complete(Completion::good());
            }
            // And whoever comes next.
            drop(Ring::attach(kernel.map().unwrap(), kernel.doorbell(), "next", Completion::good()).map(|ring| ring.fetch().map(drop)));
        }
    }
}
