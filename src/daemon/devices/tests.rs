//! Events, changes and ends, with the real engine, SCSI layer, threads and ring, over a kernel that is played.

use super::*;
use crate::daemon::rings::failure;
use crate::tcmu::configfs::Backstore;
use crate::tcmu::fake::{Answer, FakeKernel, Options, Request};
use crate::tcmu::{Error, Ring};
use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, Sender};

const WAIT: Duration = Duration::from_secs(20);
const MIB: u64 = 1 << 20;

/// Devices that tests make, with their rings.
#[derive(Clone, Default)]
struct Fakes(Arc<Mutex<HashMap<u32, (UioDevice, FakeKernel)>>>);

impl Rings for Fakes {
    fn scan(&self) -> crate::tcmu::Result<Vec<UioDevice>> {
        Ok(self.0.lock().values().map(|(uio, _)| uio.clone()).collect())
    }

    fn lookup(&self, minor: u32) -> crate::tcmu::Result<Option<UioDevice>> {
        Ok(self.0.lock().get(&minor).map(|(uio, _)| uio.clone()))
    }

    fn attach(&self, device: &UioDevice, _: &Backstore) -> crate::tcmu::Result<Ring> {
        let kernel = self.0.lock().get(&device.minor).map(|(_, kernel)| kernel.clone());
        let kernel = kernel.ok_or(Error::Invalid("no such device".into()))?;
        let region = kernel.map().map_err(|error| Error::Invalid(error.to_string()))?;
        Ring::attach(region, kernel.doorbell(), &device.name.short(), failure())
    }
}

struct Told(Sender<i32>);

impl Question for Told {
    fn answer(self: Box<Self>, errno: i32) {
        self.0.send(errno).expect("the test waits");
    }
}

struct Bed {
    dir: tempfile::TempDir,
    fakes: Fakes,
    devices: Devices,
}

impl Bed {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        let at = |name: &str| dir.path().join(name);
        let configfs = Configfs { target: at("target"), modules: at("module"), scsi_devices: at("scsi"), dev: at("dev") };
        let fakes = Fakes::default();
        let devices = Devices::new(Means {
            configfs,
            rings: Box::new(fakes.clone()),
            pool: Pool::new(Some(2)).expect("pool"),
            environment: SharedEnvironment::default(),
        });
        Self { dir, fakes, devices }
    }

    fn image(&self, name: &str, mib: u64) -> String {
        let path = self.dir.path().join(name);
        fs::File::create(&path).and_then(|file| file.set_len(mib * MIB)).expect("image");
        path.to_str().expect("UTF-8").to_owned()
    }

    fn directory(&self, minor: u32) -> PathBuf {
        self.dir.path().join(format!("target/core/user_{minor}/disk{minor}"))
    }

    /// What the kernel makes of a create: configfs and UIO. `size` in bytes.
    fn make(&self, minor: u32, config: &str, size: u64) -> DeviceName {
        let directory = self.directory(minor);
        for name in ["attrib", "wwn", "action"] {
            fs::create_dir_all(directory.join(name)).expect("directory");
        }
        let write = |name: &str, text: &str| fs::write(directory.join(name), text).expect("write");
        write("attrib/dev_size", &size.to_string());
        write("attrib/hw_block_size", "512");
        write("attrib/hw_max_sectors", "128");
        write("wwn/vpd_unit_serial", "T10 VPD Unit Serial Number: abc\n");
        write("action/block_dev", "");
        let name = DeviceName::parse(&format!("tcm-user/{minor}/disk{minor}/img/{config}")).expect("name");
        let kernel = FakeKernel::new(Options::default()).expect("kernel");
        let uio = UioDevice { minor, name: name.clone(), map_size: kernel.size() as u64 };
        self.fakes.0.lock().insert(minor, (uio, kernel));
        name
    }

    fn tell(&self, name: &DeviceName, minor: u32, action: Action) -> Receiver<i32> {
        let (sender, receiver) = mpsc::channel();
        self.devices.event(name, minor, action, Box::new(Told(sender)));
        receiver
    }

    fn ask(&self, name: &DeviceName, minor: u32, action: Action) -> i32 {
        self.tell(name, minor, action).recv_timeout(WAIT).expect("an answer")
    }

    fn run(&self, minor: u32, request: Request) -> Answer {
        let kernel = self.fakes.0.lock().get(&minor).map(|(_, kernel)| kernel.clone()).expect("device");
        kernel.submit(&[request]);
        kernel.answer(WAIT).expect("an answer")
    }

    fn wait_for(&self, what: &str, condition: impl Fn(&[(String, State)]) -> bool) {
        let deadline = Instant::now() + WAIT;
        while !condition(&self.devices.list()) {
            assert!(Instant::now() < deadline, "never: {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn blocked(&self, minor: u32) -> String {
        fs::read_to_string(self.directory(minor).join("action/block_dev")).expect("read")
    }
}

fn write_10(lba: u32, blocks: u16, payload: Vec<u8>) -> Request {
    let mut cdb = vec![0x2A, 0];
    cdb.extend(lba.to_be_bytes());
    cdb.push(0);
    cdb.extend(blocks.to_be_bytes());
    cdb.push(0);
    Request::write(&cdb, payload)
}

fn read_10(lba: u32, blocks: u16) -> Request {
    let mut cdb = vec![0x28, 0];
    cdb.extend(lba.to_be_bytes());
    cdb.push(0);
    cdb.extend(blocks.to_be_bytes());
    cdb.push(0);
    Request::read(&cdb, usize::from(blocks) * 512)
}

fn served(list: &[(String, State)]) -> usize {
    list.iter().filter(|(_, state)| matches!(state, State::Served(_))).count()
}

#[test]
fn a_device_is_added_used_and_removed() {
    let bed = Bed::new();
    let image = bed.image("a.raw", 4);
    let name = bed.make(0, &format!("@file={image}@format=raw"), 4 * MIB);
    assert_eq!(bed.ask(&name, 0, Action::Added), 0);
    assert_eq!(bed.run(0, Request::without_data(&[0; 6])).status, 0);
    assert_eq!(bed.run(0, write_10(8, 2, vec![0xAB; 1024])).status, 0);
    assert_eq!(bed.run(0, read_10(8, 2)).data, vec![0xAB; 1024]);
    assert_eq!(bed.ask(&name, 0, Action::Removed), 0);
    assert!(bed.devices.list().is_empty());
    assert_eq!(&fs::read(&image).expect("read")[4096..5120], [0xAB; 1024]);
    // Nobody holds the image any more.
    let reopened = bed.make(1, &format!("@file={image}"), 4 * MIB);
    assert_eq!(bed.ask(&reopened, 1, Action::Added), 0);
}

#[test]
fn refusals_have_the_errno_of_their_reason() {
    let bed = Bed::new();
    let image = bed.image("a.raw", 4);
    let cases = [
        ("@file=/no/such/file".to_owned(), 4, Errno::ENOENT),
        ("@file=relative".to_owned(), 4, Errno::EINVAL),
        ("@file=/x@sise=1".to_owned(), 4, Errno::EINVAL),
        ("@no-such-export".to_owned(), 4, Errno::ENOENT),
        (format!("@file={image}"), 5, Errno::EINVAL),
        (format!("@file={image}@format=qcow2"), 4, Errno::EINVAL),
    ];
    for (minor, (config, mib, errno)) in (0..).zip(cases) {
        let name = bed.make(minor, &config, mib * MIB);
        assert_eq!(bed.ask(&name, minor, Action::Added), errno as i32, "{config}");
    }
    assert!(bed.devices.list().is_empty());
    // The smaller one is served.
    let name = bed.make(100, &format!("@file={image}"), 3 * MIB);
    assert_eq!(bed.ask(&name, 100, Action::Added), 0);
    assert_eq!(bed.run(100, read_10(6143, 1)).status, 0);
    assert_eq!(bed.run(100, read_10(6144, 1)).status, 2);
}

#[test]
fn the_same_image_cannot_be_written_by_two() {
    let bed = Bed::new();
    let image = bed.image("a.raw", 4);
    let first = bed.make(0, &format!("@file={image}"), 4 * MIB);
    assert_eq!(bed.ask(&first, 0, Action::Added), 0);
    let second = bed.make(1, &format!("@file={image}"), 4 * MIB);
    assert_eq!(bed.ask(&second, 1, Action::Added), Errno::EBUSY as i32);
    assert_eq!(bed.run(0, read_10(0, 1)).status, 0);
}

#[test]
fn changes_to_what_is_already_so_are_agreed_to() {
    let bed = Bed::new();
    let image = bed.image("a.raw", 4);
    let config = format!("@file={image}@format=raw");
    let name = bed.make(0, &config, 4 * MIB);
    assert_eq!(bed.ask(&name, 0, Action::Added), 0);
    assert_eq!(bed.ask(&name, 0, Action::SetConfig(format!("img/{config}"))), 0);
    assert_eq!(bed.ask(&name, 0, Action::SetConfig(format!("img/@format=raw@file={image}"))), 0);
    assert_eq!(bed.ask(&name, 0, Action::SetSize(4 * MIB)), 0);
    assert_eq!(bed.ask(&name, 0, Action::SetWriteCache(true)), 0);
    // Nothing changed, so there is nothing to be told.
    assert_eq!(bed.run(0, Request::without_data(&[0; 6])).status, 0);
}

#[test]
fn another_image_another_size_another_cache() {
    let bed = Bed::new();
    let (first, second) = (bed.image("a.raw", 4), bed.image("b.raw", 4));
    fs::write(&second, vec![0x55; 4 << 20]).expect("write");
    let name = bed.make(0, &format!("@file={first}@format=raw"), 4 * MIB);
    assert_eq!(bed.ask(&name, 0, Action::Added), 0);
    assert_eq!(bed.ask(&name, 0, Action::SetConfig(format!("img/@file={second}@format=raw"))), 0);
    // The initiator is told first that something changed.
    assert_eq!(bed.run(0, read_10(0, 1)).status, 2);
    assert_eq!(bed.run(0, read_10(0, 1)).data, vec![0x55; 512]);
    assert_eq!(bed.ask(&name, 0, Action::SetConfig("img/@file=/no/such/file".into())), Errno::ENOENT as i32);
    assert_eq!(bed.ask(&name, 0, Action::SetConfig("qcow//x".into())), Errno::EINVAL as i32);
    assert_eq!(bed.run(0, read_10(0, 1)).data, vec![0x55; 512]);
    assert_eq!(bed.ask(&name, 0, Action::SetWriteCache(false)), 0);
    // Nobody takes space away from a disk in use, or gives it half a block.
    for size in [0, 2 * MIB, 6 * MIB + 1] {
        assert_eq!(bed.ask(&name, 0, Action::SetSize(size)), Errno::EINVAL as i32);
    }
    // A raw image is as large as its file, which can grow.
    assert_eq!(bed.ask(&name, 0, Action::SetSize(6 * MIB)), 0);
    assert_eq!(bed.run(0, read_10(0, 1)).status, 2);
    assert_eq!(bed.run(0, read_10(12287, 1)).data, vec![0; 512]);
    assert_eq!(fs::metadata(&second).expect("metadata").len(), 6 * MIB);
}

#[test]
fn a_hanging_device_holds_up_nobody_else() {
    let bed = Bed::new();
    // Opening a FIFO would hang, if it were opened without care.
    let fifo = bed.dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).expect("mkfifo");
    let stuck = bed.make(0, &format!("@file={}", fifo.display()), MIB);
    let image = bed.image("a.raw", 1);
    let free = bed.make(1, &format!("@file={image}"), MIB);
    let answer = bed.tell(&stuck, 0, Action::Added);
    assert_eq!(bed.ask(&free, 1, Action::Added), 0);
    assert_eq!(answer.recv_timeout(WAIT).expect("an answer"), Errno::EINVAL as i32);
}

#[test]
fn existing_devices_are_found_and_those_without_image_wait() {
    let bed = Bed::new();
    let image = bed.image("a.raw", 1);
    bed.make(0, &format!("@file={image}"), MIB);
    let late = bed.dir.path().join("late.raw");
    bed.make(1, &format!("@file={}", late.display()), MIB);
    bed.devices.rescan();
    bed.wait_for("one served, one waiting", |list| list.len() == 2 && served(list) == 1);
    bed.wait_for("blocked", |_| bed.blocked(1) == "1");
    assert_eq!(bed.blocked(0), "0");
    bed.image("late.raw", 1);
    bed.devices.retry();
    bed.wait_for("both served", |list| served(list) == 2);
    bed.wait_for("unblocked", |_| bed.blocked(1) == "0");
    assert_eq!(bed.run(1, read_10(0, 1)).status, 0);
    // One goes without a word.
    bed.fakes.0.lock().remove(&0);
    bed.devices.rescan();
    bed.wait_for("one left", |list| list.len() == 1);
}

#[test]
fn commands_that_came_before_us_are_answered() {
    let bed = Bed::new();
    let image = bed.image("a.raw", 1);
    bed.make(0, &format!("@file={image}"), MIB);
    let kernel = bed.fakes.0.lock().get(&0).map(|(_, kernel)| kernel.clone()).expect("device");
    // A predecessor marked the ring as its own, and died with a command in it.
    let region = kernel.map().expect("map");
    drop(Ring::attach(region, kernel.doorbell(), "predecessor", failure()).expect("attach"));
    kernel.submit(&[write_10(0, 1, vec![7; 512])]);
    bed.devices.rescan();
    assert_eq!(kernel.answer(WAIT).expect("an answer").status, 0);
    assert_eq!(fs::read(&image).expect("read")[..512], [7; 512]);
}

#[test]
fn at_the_end_everything_is_blocked_drained_and_closed() {
    let bed = Bed::new();
    let names: Vec<_> =
        (0..3).map(|minor| (minor, bed.make(minor, &format!("@file={}", bed.image(&format!("{minor}.raw"), 1)), MIB))).collect();
    for (minor, name) in &names {
        assert_eq!(bed.ask(name, *minor, Action::Added), 0);
    }
    assert!(bed.devices.stop(WAIT));
    assert!(bed.devices.list().is_empty());
    assert!((0..3).all(|minor| bed.blocked(minor) == "1"));
    let late = bed.make(9, "@file=/x", MIB);
    assert_eq!(bed.ask(&late, 9, Action::Added), Errno::ESHUTDOWN as i32);
}

#[test]
fn what_a_disk_does_is_reported() {
    let bed = Bed::new();
    let image = bed.image("one", 4);
    let name = bed.make(0, &format!("@file={image}"), 4 * MIB);
    assert_eq!(bed.ask(&name, 0, Action::Added), 0);
    for lba in 0..10 {
        bed.run(0, write_10(lba * 8, 8, vec![1; 4096]));
        bed.run(0, read_10(lba * 8, 16));
    }
    bed.run(0, read_10(1 << 20, 1));
    let reporter = crate::daemon::control::Reporter::new(bed.devices.clone());
    let status = reporter.status();
    let [device] = status.devices.as_slice() else { panic!("{status:?}") };
    let served = device.served.as_ref().expect("served");
    assert_eq!((device.name.as_str(), served.size, served.block_size, served.read_only), ("user_0/disk0", 4 * MIB, 512, false));
    assert_eq!(
        served.chain.iter().map(|link| (link.path.to_str(), link.format.as_str())).collect::<Vec<_>>(),
        [(Some(image.as_str()), "raw")]
    );
    let (reads, writes) = (&served.counters.reads, &served.counters.writes);
    assert_eq!((reads.count, reads.errors, reads.bytes), (11, 1, 81_920), "the last read is beyond the end");
    assert_eq!((writes.count, writes.errors, writes.bytes), (10, 0, 40_960));
    assert!(reads.total_ns > 0 && reads.max_ns > 0 && reads.quantile(1.0).is_some());
    assert_eq!(served.in_flight, 0);

    let missing = bed.make(1, "@file=/nowhere/at/all", MIB);
    bed.devices.rescan();
    bed.wait_for("the second disk waits", |list| {
        list.iter().any(|(key, state)| *key == missing.short() && matches!(state, State::Waiting(_)))
    });
    let status = reporter.status();
    let second = &status.devices[1];
    assert!(second.served.is_none() && second.reason.as_ref().is_some_and(|reason| reason.contains("/nowhere/at/all")), "{second:?}");
}
