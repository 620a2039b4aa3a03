//! The pool against fake kernels: nothing is lost, nothing waits for what it need not wait for, and one device's failure is its own.

use img_tcmu::serve::{Pool, Service};
use img_tcmu::tcmu::fake::{BLOCK, FakeKernel, Options, Request};
use img_tcmu::tcmu::{Command, Completion, Ring, TaskManagement};
use parking_lot::{Condvar, Mutex};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

const SENSE: [u8; 18] = [0x70, 0, 4, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x44, 0, 0, 0, 0, 0];
const LONG: Duration = Duration::from_secs(20);

/// A command that can be answered at once.
const QUICK: [u8; 6] = [0x00; 6];
/// A command that waits until the device's gate is open.
const WAITS: [u8; 6] = [0x01, 0, 0, 0, 0, 0];
/// A command that panics.
const PANICS: [u8; 6] = [0x02, 0, 0, 0, 0, 0];
/// A command that may wait but does not.
const MAY_WAIT: [u8; 6] = [0x03, 0, 0, 0, 0, 0];

#[derive(Default)]
struct Device {
    open: Mutex<bool>,
    opened: Condvar,
    waiting: AtomicUsize,
    notices: AtomicUsize,
    out_of_service: AtomicBool,
}

impl Device {
    fn open(&self) {
        *self.open.lock() = true;
        self.opened.notify_all();
    }
}

impl Service for Device {
    fn try_execute(&self, command: &mut Command) -> Option<Completion> {
        match command.cdb()[0] {
            0x00 => Some(Completion::good()),
            _ => None,
        }
    }

    fn execute(&self, command: &mut Command) -> Completion {
        match command.cdb()[0] {
            0x01 => {
                self.waiting.fetch_add(1, SeqCst);
                let mut open = self.open.lock();
                while !*open {
                    self.opened.wait(&mut open);
                }
                self.waiting.fetch_sub(1, SeqCst);
                Completion::good()
            }
            0x02 => panic!("as asked"),
            _ => Completion::good(),
        }
    }

    fn task_management(&self, _: &TaskManagement) {
        self.notices.fetch_add(1, SeqCst);
    }

    fn out_of_service(&self, _: &str) {
        assert!(!self.out_of_service.swap(true, SeqCst), "told once");
    }
}

fn attach(kernel: &FakeKernel) -> Ring {
    Ring::attach(kernel.map().unwrap(), kernel.doorbell(), "user_0/test", Completion::check_condition(&SENSE)).unwrap()
}

fn kernel() -> FakeKernel {
    FakeKernel::new(Options { blocks: 512, ..Options::default() }).unwrap()
}

fn without_data(cdb: [u8; 6], count: usize) -> Vec<Request> {
    vec![Request::without_data(&cdb); count]
}

/// Waits until `done`, or fails.
fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_batch_of_quick_commands_takes_one_kick() {
    let pool = Pool::new(Some(1)).unwrap();
    let kernel = kernel();
    let _served = pool.serve(attach(&kernel), Arc::new(Device::default())).unwrap();
    // The first kick is for what a predecessor may have left.
    wait("the first look", || kernel.kicks() == 1);
    for round in 0..50 {
        let ids = kernel.submit_silently(&without_data(QUICK, 32));
        assert_eq!(ids.len(), 32);
        kernel.ring();
        wait("answers", || kernel.answers().len() == 32 || kernel.answered() == 32 * (round + 1));
        assert_eq!(kernel.kicks(), round + 2);
        kernel.answers();
    }
    assert_eq!(kernel.violations(), []);
    assert!(pool.shutdown(LONG));
}

#[test]
fn commands_that_were_there_before_are_served() {
    let kernel = kernel();
    drop(attach(&kernel));
    kernel.submit_silently(&without_data(QUICK, 3));
    let pool = Pool::new(Some(2)).unwrap();
    let _served = pool.serve(attach(&kernel), Arc::new(Device::default())).unwrap();
    wait("answers", || kernel.answered() == 3);
}

/// What waits keeps nobody waiting: neither what was completed before it, nor what comes after it in the same ring, nor others.
#[test]
fn a_command_that_waits_keeps_nothing_waiting() {
    for order in [[QUICK, WAITS, QUICK, QUICK], [WAITS, QUICK, QUICK, QUICK], [QUICK, QUICK, QUICK, WAITS]] {
        let pool = Pool::new(Some(2)).unwrap();
        let (slow, other) = (kernel(), kernel());
        let device = Arc::new(Device::default());
        let _served = pool.serve(attach(&slow), Arc::clone(&device)).unwrap();
        let _another = pool.serve(attach(&other), Arc::new(Device::default())).unwrap();
        let requests: Vec<_> = order.iter().map(|cdb| Request::without_data(cdb)).collect();
        slow.submit(&requests);
        wait("the quick ones", || slow.answered() == 3);
        other.submit(&without_data(QUICK, 5));
        wait("the other device", || other.answered() == 5);
        slow.submit(&without_data(QUICK, 5));
        wait("what came later", || slow.answered() == 8);
        assert_eq!(device.waiting.load(SeqCst), 1);
        device.open();
        wait("the slow one", || slow.answered() == 9);
        assert_eq!((slow.violations(), other.violations()), (vec![], vec![]));
    }
}

#[test]
fn a_device_that_hangs_leaves_threads_for_the_others() {
    let pool = Pool::new(Some(2)).unwrap();
    let (hung, healthy) = (kernel(), kernel());
    let device = Arc::new(Device::default());
    let served = pool.serve(attach(&hung), Arc::clone(&device)).unwrap();
    let _healthy = pool.serve(attach(&healthy), Arc::new(Device::default())).unwrap();
    hung.submit(&without_data(WAITS, 40));
    wait("both threads are stuck", || device.waiting.load(SeqCst) >= 2);
    let start = Instant::now();
    healthy.submit(&without_data(QUICK, 10));
    wait("the healthy device", || healthy.answered() == 10);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    // From now on it is not even noticed.
    for round in 2..20 {
        let start = Instant::now();
        healthy.submit(&without_data(MAY_WAIT, 10));
        wait("the healthy device", || healthy.answered() == 10 * round);
        assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
        std::thread::sleep(Duration::from_millis(50));
    }
    let stuck = pool.stuck();
    assert!(stuck.iter().all(|stuck| stuck.device == "user_0/test" && stuck.opcode == 1 && stuck.age >= Duration::from_secs(1)));
    assert!(stuck.len() >= 2 && pool.threads() <= 2 + 41, "{} stuck, {} threads", stuck.len(), pool.threads());
    // A stop reports what it waits for, and ends when that ends.
    let mut stopping = served.stop();
    assert!(!stopping.wait(Duration::from_millis(50)));
    assert!(stopping.in_flight() >= 2);
    device.open();
    assert!(stopping.wait(LONG));
    wait("the spare threads leave", || pool.threads() == 2 && pool.stuck().is_empty());
    assert_eq!(hung.violations(), []);
    // What was not fetched is left for a successor.
    let answered = hung.answered();
    assert!(answered < 40);
    let _served = pool.serve(attach(&hung), device).unwrap();
    wait("the rest", || hung.answered() == 40);
    assert!(pool.shutdown(LONG));
}

#[test]
fn a_panic_takes_one_device_out_of_service() {
    let pool = Pool::new(Some(2)).unwrap();
    let (bad, good) = (kernel(), kernel());
    let device = Arc::new(Device::default());
    let served = pool.serve(attach(&bad), Arc::clone(&device)).unwrap();
    let _good = pool.serve(attach(&good), Arc::new(Device::default())).unwrap();
    let ids = bad.submit(&[Request::without_data(&PANICS), Request::read(&QUICK, BLOCK), Request::without_data(&PANICS)]);
    let mut answers: Vec<_> = (0..3).map(|_| bad.answer(LONG).unwrap()).collect();
    answers.sort_by_key(|answer| answer.id);
    assert_eq!((answers[0].status, &answers[0].sense[..18]), (2, &SENSE[..]));
    assert_eq!((answers[2].id, answers[2].status), (ids[2], 2));
    wait("it is told", || device.out_of_service.load(SeqCst));
    assert!(served.is_out_of_service());
    for _ in 0..10 {
        bad.submit(&[Request::read(&QUICK, BLOCK)]);
        let answer = bad.answer(LONG).unwrap();
        assert_eq!((answer.status, &answer.sense[..18], answer.data.len()), (2, &SENSE[..], 0));
        good.submit(&without_data(QUICK, 1));
        assert_eq!(good.answer(LONG).unwrap().status, 0);
    }
    assert_eq!(pool.threads(), 2);
    assert!(served.stop().wait(LONG));
}

#[test]
fn a_broken_ring_takes_one_device_out_of_service() {
    let pool = Pool::new(Some(2)).unwrap();
    let (bad, good) = (kernel(), kernel());
    let device = Arc::new(Device::default());
    let served = pool.serve(attach(&bad), Arc::clone(&device)).unwrap();
    let _good = pool.serve(attach(&good), Arc::new(Device::default())).unwrap();
    bad.set_head(4);
    wait("it is told", || device.out_of_service.load(SeqCst));
    good.submit(&without_data(QUICK, 1));
    assert_eq!(good.answer(LONG).unwrap().status, 0);
    assert!(served.stop().wait(LONG));
}

#[test]
fn notices_reach_the_service_and_a_drain_waits_for_all() {
    let pool = Pool::new(Some(2)).unwrap();
    let kernel = kernel();
    let device = Arc::new(Device::default());
    let served = pool.serve(attach(&kernel), Arc::clone(&device)).unwrap();
    kernel.submit(&without_data(WAITS, 1));
    assert!(kernel.submit_tmr(1, &[1]));
    wait("the notice", || device.notices.load(SeqCst) == 1);
    assert!(!served.drain(Duration::from_millis(20)));
    device.open();
    assert!(served.drain(LONG));
    assert_eq!((kernel.answered(), kernel.tail()), (1, kernel.head()));
}

#[test]
fn a_stop_under_load_unmaps_and_loses_nothing() {
    let pool = Pool::new(Some(3)).unwrap();
    let kernel = kernel();
    for round in 0..200 {
        let served = pool.serve(attach(&kernel), Arc::new(Device::default())).unwrap();
        let feeder = {
            let kernel = kernel.clone();
            std::thread::spawn(move || (0..20).map(|_| kernel.submit(&without_data(MAY_WAIT, 3)).len()).sum::<usize>())
        };
        if round % 3 == 0 {
            std::thread::yield_now();
        }
        let mut stopping = served.stop();
        assert!(stopping.wait(LONG));
        assert!(stopping.wait(Duration::ZERO), "and once more");
        let fed = feeder.join().unwrap();
        // A successor finds the rest.
        let served = pool.serve(attach(&kernel), Arc::new(Device::default())).unwrap();
        assert!(served.drain(LONG));
        assert!(served.stop().wait(LONG));
        assert_eq!((kernel.outstanding(), kernel.answers().len()), (0, fed), "round {round}");
    }
    assert_eq!(kernel.violations(), []);
}

/// Several feeders and threads at several rings, for a few seconds, always down to an empty ring: a lost wake-up hangs it.
#[test]
fn no_wakeup_is_lost() {
    for (workers, depth) in [(1, 1), (2, 1), (2, 4), (4, 32)] {
        let pool = Pool::new(Some(workers)).unwrap();
        let kernels: Vec<_> = (0..3).map(|_| kernel()).collect();
        let _served: Vec<_> = kernels.iter().map(|kernel| pool.serve(attach(kernel), Arc::new(Device::default())).unwrap()).collect();
        let end = Instant::now() + Duration::from_millis(1500);
        let feeders: Vec<_> = kernels
            .iter()
            .cloned()
            .enumerate()
            .map(|(number, kernel)| {
                std::thread::spawn(move || {
                    let mut rounds = 0u64;
                    while Instant::now() < end {
                        let cdb = if (rounds + number as u64).is_multiple_of(3) { MAY_WAIT } else { QUICK };
                        let ids = kernel.submit(&without_data(cdb, depth));
                        for _ in ids {
                            let answer = kernel.answer(LONG).expect("a wake-up was lost");
                            assert_eq!(answer.status, 0);
                        }
                        rounds += 1;
                    }
                    rounds
                })
            })
            .collect();
        let rounds: u64 = feeders.into_iter().map(|feeder| feeder.join().unwrap()).sum();
        assert!(rounds > 100, "{rounds}");
        assert!(kernels.iter().all(|kernel| kernel.violations().is_empty()));
        assert!(pool.shutdown(LONG));
    }
}

#[test]
fn threads_do_not_grow_with_devices() {
    let pool = Pool::new(Some(2)).unwrap();
    let kernels: Vec<_> =
        (0..100).map(|_| FakeKernel::new(Options { ring_size: 1024, blocks: 1, ..Options::default() }).unwrap()).collect();
    let _served: Vec<_> = kernels.iter().map(|kernel| pool.serve(attach(kernel), Arc::new(Device::default())).unwrap()).collect();
    for _ in 0..5 {
        kernels.iter().for_each(|kernel| assert_eq!(kernel.submit(&without_data(MAY_WAIT, 2)).len(), 2));
        kernels.iter().for_each(|kernel| assert!((0..2).all(|_| kernel.answer(LONG).is_some())));
    }
    assert_eq!(pool.threads(), 2);
}
