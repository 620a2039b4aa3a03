//! The threads: how they wait, how they find work, and how one command goes through.
//!
//! All threads wait on one epoll. Each ring's event file is in it edge-triggered and is never read: the kernel's every ring of
//! the bell after the last look is an edge, so none is lost, and an edge wakes one thread. A thread that has been woken works
//! on the ring until it finds it empty; a bell that rings meanwhile wakes another one, which is how commands of one ring come to
//! be executed in parallel.

use super::Service;
use super::inbox::Inbox;
use super::served::{Device, Served};
use super::watch::{self, Post, Stuck, Watch};
use crate::tcmu::abi::STATUS_GOOD;
use crate::tcmu::{Command, Fetched, Ring};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use parking_lot::{Mutex, RwLock};
use std::collections::HashMap;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The inbox's key in the epoll; devices count from 1.
const INBOX: u64 = 0;

/// A ring's completions are announced at the latest after so many, even if there is more to do.
const KICK_AFTER: usize = 64;

/// Threads that serve rings. Dropping it ends them as soon as they have nothing to do, without waiting for them.
pub struct Pool {
    shared: Arc<Shared>,
    watch: Option<JoinHandle<()>>,
}

/// What the threads, the handles and the watch share.
pub(super) struct Shared {
    epoll: Epoll,
    inbox: Inbox,
    devices: RwLock<HashMap<u64, Arc<Device>>>,
    next_key: Mutex<u64>,
    pub posts: RwLock<Vec<Arc<Post>>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// How many threads there are when nothing hangs.
    pub base: usize,
    pub total: AtomicUsize,
    /// Threads that wait for events.
    pub idle: AtomicUsize,
    /// Threads that are to go when they have nothing to do.
    pub surplus: AtomicUsize,
    stop: AtomicBool,
    pub watch: Watch,
}

impl Pool {
    /// Starts `workers` threads; without a number, one for each CPU that this process may use, and at least two.
    pub fn new(workers: Option<usize>) -> io::Result<Self> {
        let cpus = || std::thread::available_parallelism().map_or(2, usize::from).max(2);
        let base = workers.unwrap_or_else(cpus).max(1);
        let shared = Arc::new(Shared {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            inbox: Inbox::new()?,
            devices: RwLock::default(),
            next_key: Mutex::new(INBOX),
            posts: RwLock::default(),
            threads: Mutex::default(),
            base,
            total: AtomicUsize::new(0),
            idle: AtomicUsize::new(0),
            surplus: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            watch: Watch::default(),
        });
        shared.epoll.add(&shared.inbox, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, INBOX))?;
        let mut pool = Self { shared, watch: None };
        for _ in 0..base {
            Shared::spawn(&pool.shared)?;
        }
        let watched = Arc::clone(&pool.shared);
        pool.watch = Some(std::thread::Builder::new().name("ring-watch".into()).spawn(move || watch::run(&watched))?);
        Ok(pool)
    }

    /// Takes a ring into service.
    pub fn serve<S: Service + 'static>(&self, ring: Ring, service: Arc<S>) -> io::Result<Served> {
        let key = {
            let mut next = self.shared.next_key.lock();
            *next += 1;
            *next
        };
        let device = Arc::new(Device::new(key, ring.clone(), service));
        self.shared.devices.write().insert(key, Arc::clone(&device));
        let served = Served::new(Arc::clone(&self.shared), device);
        self.shared.epoll.add(ring.fd(), EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, key))?;
        // What is in the ring already makes no edge.
        self.shared.inbox.push(key);
        Ok(served)
    }

    /// How many threads there are now; more than at the start only while commands hang.
    pub fn threads(&self) -> usize {
        self.shared.total.load(Relaxed)
    }

    /// Commands that have been executing for a second or more.
    pub fn stuck(&self) -> Vec<Stuck> {
        self.shared.watch.stuck()
    }

    /// Ends the threads, and waits for those that have nothing to do, at most for `timeout`. True if all have ended.
    pub fn shutdown(mut self, timeout: Duration) -> bool {
        self.shared.end();
        let deadline = Instant::now() + timeout;
        let mut threads = std::mem::take(&mut *self.shared.threads.lock());
        threads.extend(self.watch.take());
        while threads.iter().any(|thread| !thread.is_finished()) {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        threads.into_iter().all(|thread| thread.join().is_ok())
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.end();
    }
}

impl Shared {
    /// Adds a thread.
    pub fn spawn(this: &Arc<Self>) -> io::Result<()> {
        let post = Arc::new(Post::default());
        let number = this.total.fetch_add(1, Relaxed);
        let (shared, mine) = (Arc::clone(this), Arc::clone(&post));
        let spawned = std::thread::Builder::new().name(format!("ring-{number}")).spawn(move || {
            shared.work(&mine);
            shared.posts.write().retain(|other| !Arc::ptr_eq(other, &mine));
            shared.total.fetch_sub(1, Relaxed);
        });
        match spawned {
            Ok(thread) => {
                this.posts.write().push(post);
                let mut threads = this.threads.lock();
                threads.retain(|thread| !thread.is_finished());
                threads.push(thread);
                Ok(())
            }
            Err(error) => {
                this.total.fetch_sub(1, Relaxed);
                Err(error)
            }
        }
    }

    fn end(&self) {
        self.stop.store(true, Release);
        self.inbox.wake();
        self.watch.wake();
    }

    pub fn is_ending(&self) -> bool {
        self.stop.load(Acquire)
    }

    /// Takes a device out of the epoll. `ring` is its ring.
    pub fn forget(&self, key: u64, ring: &Ring) {
        self.devices.write().remove(&key);
        if let Err(errno) = self.epoll.delete(ring.fd()) {
            tracing::debug!(device = ring.name(), "epoll: {errno}");
        }
    }

    pub fn device(&self, key: u64) -> Option<Arc<Device>> {
        self.devices.read().get(&key).cloned()
    }

    /// Devices that are kept from the last free threads.
    pub fn stalled_devices(&self) -> Vec<Arc<Device>> {
        self.devices.read().values().filter(|device| device.is_stalled()).cloned().collect()
    }

    /// Asks for a thread to look at a device.
    pub fn look_at(&self, key: u64) {
        self.inbox.push(key);
    }

    /// One thread's life.
    fn work(&self, post: &Post) {
        let mut events = [EpollEvent::empty()];
        loop {
            self.idle.fetch_add(1, SeqCst);
            let waited = self.epoll.wait(&mut events, EpollTimeout::NONE);
            self.idle.fetch_sub(1, SeqCst);
            if self.is_ending() {
                // Pass it on.
                self.inbox.wake();
                return;
            }
            match waited {
                Ok(0) | Err(Errno::EINTR) => continue,
                Ok(_) => {}
                Err(errno) => {
                    tracing::error!("epoll: {errno}: a thread ends");
                    return;
                }
            }
            let flags = events[0].events();
            let key = if events[0].data() == INBOX { self.inbox.pop() } else { Some(events[0].data()) };
            if let Some(device) = key.and_then(|key| self.device(key)) {
                if flags.intersects(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP) {
                    device.retire("the kernel has removed the device");
                }
                self.visit(&device, post);
            }
            if self.surplus.load(Relaxed) > 0 && self.surplus.fetch_update(AcqRel, Acquire, |count| count.checked_sub(1)).is_ok() {
                return;
            }
        }
    }

    /// Works on a device until its ring is empty.
    fn visit(&self, device: &Device, post: &Post) {
        device.relieved();
        if device.is_stalled() && self.idle.load(SeqCst) == 0 {
            // Somebody must stay free for the others. The watch sends somebody here when there is.
            return;
        }
        let Some(visit) = device.enter() else { return };
        let Some(ring) = visit.ring() else { return };
        post.arrive(device.key, &self.watch);
        // Whoever asked for relief may have completed something before it went to wait.
        self.kick(device, ring);
        let mut completed = 0;
        // A command begins when it is fetched, which is right after the one before it has ended.
        let mut clock = Instant::now();
        while device.is_open() {
            match ring.fetch() {
                Ok(None) => break,
                Ok(Some(Fetched::Command(command))) => {
                    self.run(device, ring, post, command, &mut clock);
                    completed += 1;
                    if completed % KICK_AFTER == 0 {
                        self.kick(device, ring);
                    }
                }
                Ok(Some(Fetched::TaskManagement(notice))) => device.service.task_management(&notice),
                Err(error) => {
                    device.retire(&error.to_string());
                    break;
                }
            }
        }
        self.kick(device, ring);
        post.leave();
    }

    /// Executes and completes one command. `clock` is when it was fetched, and then when it ended.
    fn run(&self, device: &Device, ring: &Ring, post: &Post, mut command: Command, clock: &mut Instant) {
        if device.is_out_of_service() {
            command.complete(ring.failure());
            return;
        }
        let opcode = command.cdb().first().copied().unwrap_or(0);
        let len = command.data().len();
        post.begin(command.id(), opcode);
        let executed = catch_unwind(AssertUnwindSafe(|| match device.service.try_execute(&mut command) {
            Some(completion) => completion,
            None => {
                self.prepare_to_wait(device, ring);
                device.service.execute(&mut command)
            }
        }));
        let completion = executed.unwrap_or_else(|panic| {
            device.retire(&format!("a command panicked: {}", panic_message(&*panic)));
            ring.failure()
        });
        let failed = completion.status != STATUS_GOOD;
        let bytes = completion.read_len.map_or(len, u64::from).min(len);
        command.complete(completion);
        post.end();
        let now = Instant::now();
        device.statistics.record(device.service.kind(opcode), bytes, now - *clock, failed);
        *clock = now;
    }

    /// The thread may be away for a while: what it has completed is announced, and what is left in the ring is seen to.
    fn prepare_to_wait(&self, device: &Device, ring: &Ring) {
        if !ring.has_pending() {
            self.kick(device, ring);
        } else if device.ask_for_relief() {
            self.inbox.push(device.key);
        }
    }

    fn kick(&self, device: &Device, ring: &Ring) {
        if let Err(error) = ring.kick() {
            device.retire(&format!("the kernel cannot be told of completions: {error}"));
        }
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}
