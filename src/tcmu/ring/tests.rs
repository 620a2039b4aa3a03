//! What a process that dies in the middle of a completion leaves behind: every store that a completion makes is a point of
//! death, and a successor must find every command that the kernel still waits for.

use super::region::store_trace;
use super::*;
use crate::tcmu::fake::{FakeKernel, Options, Request};
use std::collections::BTreeSet;

fn attach(kernel: &FakeKernel) -> Ring {
    Ring::attach(kernel.map().unwrap(), kernel.doorbell(), "test", Completion::check_condition(&[0x70])).unwrap()
}

fn fetch_all(ring: &Ring) -> Vec<Command> {
    let mut commands = Vec::new();
    while let Some(fetched) = ring.fetch().unwrap() {
        if let Fetched::Command(command) = fetched {
            commands.push(command);
        }
    }
    commands
}

/// Small: it is copied for every death.
fn small(fragmented: bool) -> Options {
    Options { ring_size: 2048, blocks: 64, fragmented, ..Options::default() }
}

/// Mailbox and ring.
fn snapshot(kernel: &FakeKernel) -> Vec<u8> {
    let mut bytes = vec![0; abi::MAILBOX_SIZE + small(false).ring_size as usize];
    kernel.region().read(0, &mut bytes).unwrap();
    bytes
}

/// The commands that differ in everything a slot can differ in: number of iovecs, length of the CDB.
fn requests() -> Vec<Request> {
    vec![
        Request::read(&[0x28, 0, 0, 0, 0, 1, 0, 0, 8, 0], 4096),
        Request::without_data(&[0, 0, 0, 0, 0, 0]),
        Request::write(&[0x8a, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 16, 0, 0], vec![7; 5 * 4096]),
        Request::read(&[0x7f, 0, 0, 0, 0, 0, 0, 24, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9], 512),
        Request::read(&[0x28, 0, 0, 0, 0, 3, 0, 0, 8, 0], 9 * 4096),
    ]
}

type Identity = (u16, Vec<u8>, Vec<(u64, u64)>);

fn identity(command: &Command) -> Identity {
    let spans = command.spans().iter().map(|span| (span.base, span.len)).collect();
    (command.id(), command.cdb().to_vec(), spans)
}

/// Completes `requests` in the order `order`; dies after every single store of each completion in turn.
fn die_everywhere(order: &[usize], fragmented: bool) {
    let kernel = FakeKernel::new(small(fragmented)).unwrap();
    let ring = attach(&kernel);
    kernel.submit(&requests());
    let mut commands: Vec<Option<Command>> = fetch_all(&ring).into_iter().map(Some).collect();
    let sense: Vec<u8> = (1..=18).collect();
    let mut live: BTreeSet<Identity> = commands.iter().flatten().map(identity).collect();
    for &index in order {
        let command = commands[index].take().unwrap();
        let completed = identity(&command);
        let completion = if index % 2 == 0 { Completion::check_condition(&sense) } else { Completion::status(8) };
        let before = snapshot(&kernel);
        let stores = store_trace::record(|| command.complete(completion));
        let written_back = ring.held_back() == 0;
        for death in 0..=stores.len() {
            // Another kernel with the same memory, as far as it had come.
            let twin = FakeKernel::new(small(fragmented)).unwrap();
            twin.region().write(0, &before).unwrap();
            for (offset, bytes) in &stores[..death] {
                twin.region().write(*offset, bytes).unwrap();
            }
            let successor = attach(&twin);
            let commands = fetch_all(&successor);
            assert!(commands.iter().all(Command::recovered));
            let found: BTreeSet<Identity> = commands.iter().map(identity).collect();
            let mut without = live.clone();
            without.remove(&completed);
            assert!(
                found == live || (found == without && written_back),
                "order {order:?}, completing {completed:?}: after {death} of {} stores {found:?} are found, not {live:?}",
                stores.len()
            );
            if found == without && written_back {
                // Then the response is in place behind the tail: the kernel will find it.
                let slot = twin_slot(&twin, &before);
                assert_eq!(slot.0, completed.0, "the response in the slot before the tail");
                assert_eq!(slot.1, if index % 2 == 0 { 2 } else { 8 });
                if index % 2 == 0 {
                    assert_eq!(&slot.2[..18], &sense[..]);
                    assert!(slot.2[18..].iter().all(|&byte| byte == 0));
                }
            }
        }
        if written_back {
            live = fetchable(&snapshot(&kernel));
        }
    }
    ring.kick().unwrap();
    assert_eq!(kernel.violations(), []);
    assert_eq!(kernel.outstanding(), 0);
    assert_eq!(kernel.answers().len(), requests().len());
}

/// Id, status and sense in the slot that was at the tail of `before`.
fn twin_slot(twin: &FakeKernel, before: &[u8]) -> (u16, u8, Vec<u8>) {
    let tail = u32::from_ne_bytes(*before[mailbox::TAIL..].first_chunk().unwrap()) as usize;
    let mut entry = vec![0; abi::command::MIN_SIZE as usize];
    twin.region().read(abi::MAILBOX_SIZE + tail, &mut entry).unwrap();
    (u16::from_ne_bytes([entry[4], entry[5]]), entry[8], entry[16..].to_vec())
}

/// What a successor would find in `memory`.
fn fetchable(memory: &[u8]) -> BTreeSet<Identity> {
    let twin = FakeKernel::new(small(false)).unwrap();
    twin.region().write(0, memory).unwrap();
    fetch_all(&attach(&twin)).iter().map(identity).collect()
}

fn permutations(count: usize) -> Vec<Vec<usize>> {
    if count == 0 {
        return vec![Vec::new()];
    }
    let mut all = Vec::new();
    for shorter in permutations(count - 1) {
        for place in 0..count {
            let mut order = shorter.clone();
            order.insert(place, count - 1);
            all.push(order);
        }
    }
    all
}

#[test]
fn death_at_any_store_of_any_order_of_completions_loses_nothing() {
    for order in permutations(5) {
        die_everywhere(&order, false);
    }
}

#[test]
fn death_with_fragmented_buffers_loses_nothing() {
    for order in permutations(5).into_iter().step_by(7) {
        die_everywhere(&order, true);
    }
}

#[test]
fn a_completion_waits_if_its_slot_is_too_small_for_the_command_at_the_tail() {
    let kernel = FakeKernel::new(Options { fragmented: true, ..Options::default() }).unwrap();
    let ring = attach(&kernel);
    kernel.submit(&[Request::read(&[0x28, 0, 0, 0, 0, 0, 0, 0, 80, 0], 10 * 4096), Request::without_data(&[0; 6])]);
    let mut commands = fetch_all(&ring);
    let (small, large) = (commands.pop().unwrap(), commands.pop().unwrap());
    small.complete(Completion::good());
    assert_eq!((ring.held_back(), kernel.tail()), (1, 0));
    // A larger one makes way.
    kernel.submit(&[Request::read(&[0x28, 0, 0, 0, 0, 0, 0, 0, 88, 0], 11 * 4096)]);
    let other = fetch_all(&ring).pop().unwrap();
    other.complete(Completion::good());
    assert_eq!(ring.held_back(), 0);
    ring.kick().unwrap();
    assert_eq!(kernel.answers().iter().map(|answer| answer.id).collect::<BTreeSet<_>>(), BTreeSet::from([2, 3]));
    large.complete(Completion::good());
    ring.kick().unwrap();
    assert_eq!(kernel.answers().len(), 1);
    assert_eq!(kernel.violations(), []);
}

#[test]
fn a_ring_of_somebody_else_has_to_be_reset_first() {
    let kernel = FakeKernel::new(Options::default()).unwrap();
    kernel.submit(&requests());
    // Somebody who does not mark it completes the first command, and dies.
    let first = kernel.region().load_u32(abi::MAILBOX_SIZE, Relaxed).unwrap() & !abi::OP_MASK;
    kernel.region().store_u32(mailbox::TAIL, first, Relaxed).unwrap();
    let error = Ring::attach(kernel.map().unwrap(), kernel.doorbell(), "test", Completion::default()).unwrap_err();
    assert!(matches!(error, Error::Ring { fault: RingFault::Foreign, .. }), "{error}");
    kernel.reset();
    let ring = attach(&kernel);
    kernel.submit(&requests());
    assert_eq!(fetch_all(&ring).len(), requests().len());
}

#[test]
fn a_ring_that_nobody_has_served_is_served_late() {
    let kernel = FakeKernel::new(Options::default()).unwrap();
    kernel.submit(&requests());
    let found = fetch_all(&attach(&kernel));
    assert!(found.len() == requests().len() && found.iter().all(Command::recovered));
}
