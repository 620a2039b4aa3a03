//! `kill -9` under load: a process that serves a ring is killed at random instants, again and again, and successors carry on. The
//! initiator, here, must see every command succeed exactly once, and every read return what was last written.
//!
//! The process under test is this test binary itself, started anew with one test selected. It finds the ring's memory through
//! `/proc`, is woken through its standard input, and kicks through its standard output.

use img_tcmu::serve::{Pool, Service};
use img_tcmu::tcmu::fake::{BLOCK, FakeKernel, Options, Request};
use img_tcmu::tcmu::{Command, Completion, Doorbell, Region, Ring};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

const MEMORY: &str = "RING_KILL_MEMORY";
const SIZE: &str = "RING_KILL_SIZE";
const DISK: &str = "RING_KILL_DISK";

const BLOCKS_ON_DISK: u32 = 64;
const READ: u8 = 0x28;
const WRITE: u8 = 0x2a;

/// Reads and writes blocks of a file, some at once and some after a while.
struct Disk {
    file: File,
    count: AtomicU32,
}

fn block_of(cdb: &[u8]) -> u32 {
    u32::from_be_bytes([cdb[2], cdb[3], cdb[4], cdb[5]])
}

impl Service for Disk {
    fn execute(&self, command: &mut Command) -> Completion {
        // Completions in every order, and deaths at every stage.
        match self.count.fetch_add(1, Relaxed) % 7 {
            0 => std::thread::sleep(Duration::from_micros(300)),
            3 => std::thread::sleep(Duration::from_micros(50)),
            _ => {}
        }
        let (cdb, mut data) = command.parts();
        let (opcode, mut at) = (cdb[0], u64::from(block_of(cdb)) * BLOCK as u64);
        if opcode == WRITE {
            for slice in data.slices() {
                self.file.write_all_at(&slice, at).unwrap();
                at += slice.len() as u64;
            }
        } else {
            for slice in data.slices_mut().iter_mut() {
                self.file.read_exact_at(slice, at).unwrap();
                at += slice.len() as u64;
            }
        }
        Completion::good()
    }
}

/// The child's end of the wake-ups.
struct Pipes {
    events: io::Stdin,
    kicks: File,
}

impl Doorbell for Pipes {
    fn kick(&self) -> io::Result<()> {
        (&self.kicks).write_all(b"k")
    }

    /// Never read: every byte that arrives is an edge.
    fn fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}

#[test]
#[ignore = "the process that is killed by the other test; does nothing by itself"]
fn served_until_killed() {
    let Ok(memory) = std::env::var(MEMORY) else { return };
    // Not even if the test is killed is it left behind.
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL).unwrap();
    let size = std::env::var(SIZE).unwrap().parse().unwrap();
    let file = File::options().read(true).write(true).open(std::env::var(DISK).unwrap()).unwrap();
    let memory = File::options().read(true).write(true).open(memory).unwrap();
    let region = Region::map(&memory, size).unwrap();
    let kicks = File::from(io::stdout().as_fd().try_clone_to_owned().unwrap());
    let pipes = Pipes { events: io::stdin(), kicks };
    let ring = Ring::attach(region, Box::new(pipes), "killed", Completion::check_condition(&[0x70])).unwrap();
    let pool = Pool::new(Some(3)).unwrap();
    let _served = pool.serve(ring, Arc::new(Disk { file, count: AtomicU32::new(std::process::id()) })).unwrap();
    loop {
        std::thread::park();
    }
}

fn start(kernel: &FakeKernel, disk: &Path) -> Child {
    let memory = format!("/proc/{}/fd/{}", std::process::id(), kernel.memory().as_raw_fd());
    std::process::Command::new(std::env::current_exe().unwrap())
        .args(["served_until_killed", "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .env(MEMORY, memory)
        .env(SIZE, kernel.size().to_string())
        .env(DISK, disk)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Kicks of the child reach the kernel, as long as the child lives.
fn pass_kicks(kernel: &FakeKernel, child: &mut Child) -> std::thread::JoinHandle<()> {
    let kernel = kernel.clone();
    let mut kicks = child.stdout.take().unwrap();
    std::thread::spawn(move || {
        let mut bytes = [0; 256];
        while kicks.read(&mut bytes).is_ok_and(|count| count > 0) {
            kernel.take_completions();
        }
    })
}

fn block(version: u32, number: u32) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK];
    for (index, chunk) in bytes.chunks_exact_mut(8).enumerate() {
        chunk.copy_from_slice(&(u64::from(version) << 32 | u64::from(number) << 16 | index as u64).to_le_bytes());
    }
    bytes
}

fn cycles() -> usize {
    std::env::var("RING_KILL_CYCLES").map_or(40, |text| text.parse().expect("RING_KILL_CYCLES is a number"))
}

#[test]
fn killed_at_random_instants_under_load() {
    let seed = rand::rng().random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let disk = tempfile::NamedTempFile::new().unwrap();
    let mut versions = vec![0u32; BLOCKS_ON_DISK as usize];
    for number in 0..BLOCKS_ON_DISK {
        disk.as_file().write_all_at(&block(0, number), u64::from(number) * BLOCK as u64).unwrap();
    }
    // A small ring, so that it wraps often, and a fragmented area, so that entries have several lengths.
    let kernel = FakeKernel::new(Options { ring_size: 4096, blocks: 64, fragmented: true, ..Options::default() }).unwrap();
    // Id, first block, how many, and whether it writes. An id is used again when its answer has been given, if not yet taken.
    let mut outstanding: Vec<(u16, u32, u32, bool)> = Vec::new();
    let mut busy = vec![false; BLOCKS_ON_DISK as usize];
    let (mut answered, mut inherited) = (0u64, 0usize);
    let cycles = cycles();
    for cycle in 0..=cycles {
        let mut child = start(&kernel, disk.path());
        let kicks = pass_kicks(&kernel, &mut child);
        let last = cycle == cycles;
        let end = Instant::now() + Duration::from_micros(random.random_range(2_000..60_000));
        let deadline = Instant::now() + Duration::from_secs(20);
        while if last { !outstanding.is_empty() } else { Instant::now() < end } {
            assert!(Instant::now() < deadline, "{} commands are not answered: {outstanding:?}", outstanding.len());
            if !last && outstanding.len() < 24 {
                let count = random.random_range(1..=6).min(BLOCKS_ON_DISK);
                let first = random.random_range(0..=BLOCKS_ON_DISK - count);
                let range = first as usize..(first + count) as usize;
                if !busy[range.clone()].contains(&true) {
                    let writes = random.random();
                    let mut cdb = vec![if writes { WRITE } else { READ }, 0, 0, 0, 0, 0, 0, 0, 0, 0];
                    cdb[2..6].copy_from_slice(&first.to_be_bytes());
                    let request = if writes {
                        let payload = (first..first + count).flat_map(|number| block(versions[number as usize] + 1, number)).collect();
                        Request::write(&cdb, payload)
                    } else {
                        Request::read(&cdb, count as usize * BLOCK)
                    };
                    for id in kernel.submit_silently(&[request]) {
                        busy[range.clone()].fill(true);
                        versions[range.clone()].iter_mut().for_each(|version| *version += u32::from(writes));
                        outstanding.push((id, first, count, writes));
                        // Nobody reads it if the child is gone.
                        let _ = child.stdin.as_mut().unwrap().write_all(b"e");
                    }
                }
            }
            let patience = if outstanding.len() < 24 && !last { Duration::ZERO } else { Duration::from_millis(1) };
            while let Some(answer) = kernel.answer(patience) {
                let index = outstanding.iter().position(|command| command.0 == answer.id).expect("a command is answered once");
                let (_, first, count, writes) = outstanding.remove(index);
                assert_eq!(answer.status, 0, "no command fails");
                if !writes {
                    let wanted: Vec<u8> = (first..first + count).flat_map(|number| block(versions[number as usize], number)).collect();
                    assert!(answer.data == wanted, "blocks {first}.. have what was last written");
                }
                busy[first as usize..(first + count) as usize].fill(false);
                answered += 1;
                if patience > Duration::ZERO {
                    break;
                }
            }
        }
        assert_eq!(kernel.violations(), []);
        child.kill().unwrap();
        let status = child.wait().unwrap();
        assert_eq!(status.signal(), Some(9), "it ran until it was killed");
        kicks.join().unwrap();
        inherited += kernel.outstanding();
    }
    println!("{cycles} kills, {answered} commands answered, {inherited} found by successors");
    assert!(answered > 20 * cycles as u64 && inherited > cycles, "{answered} answered, {inherited} inherited: too few to tell");
    for number in 0..BLOCKS_ON_DISK {
        let mut bytes = vec![0; BLOCK];
        disk.as_file().read_exact_at(&mut bytes, u64::from(number) * BLOCK as u64).unwrap();
        assert!(bytes == block(versions[number as usize], number), "block {number} on disk");
    }
}
