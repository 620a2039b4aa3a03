//! The daemon's place on a real bus: a private dbus-daemon, and a stand-in for tcmu-runner.

use img_tcmu::daemon::dbus::{self, Options, Role, SharedEnvironment};
use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};
use zbus::blocking::connection::Builder;
use zbus::blocking::fdo::{ObjectManagerProxy, PropertiesProxy};
use zbus::blocking::{Connection, Proxy};
use zbus::zvariant::OwnedValue;

const NAME: &str = "org.kernel.TCMUService1";
const PATH: &str = "/org/kernel/TCMUService1";
const WAIT: Duration = Duration::from_secs(25);

/// A bus of our own, gone with the value.
struct Bus {
    daemon: Child,
    address: String,
}

impl Bus {
    fn start(dir: &Path) -> Self {
        let config = dir.join("bus.conf");
        let socket = dir.join("bus");
        let text = format!(
            "<busconfig><type>session</type><listen>unix:path={}</listen><auth>EXTERNAL</auth><policy context=\"default\">\
             <allow send_destination=\"*\"/><allow receive_sender=\"*\"/><allow own=\"*\"/></policy></busconfig>",
            socket.display()
        );
        std::fs::write(&config, text).expect("bus.conf");
        let mut daemon = Command::new("dbus-daemon")
            .arg(format!("--config-file={}", config.display()))
            .args(["--nofork", "--print-address"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("these tests need dbus-daemon: apt-get install dbus");
        let mut address = String::new();
        BufReader::new(daemon.stdout.take().expect("stdout")).read_line(&mut address).expect("address");
        Self { daemon, address: address.trim().to_owned() }
    }

    fn options(&self) -> Options {
        Options { address: Some(self.address.clone()), retry: Duration::from_millis(100), grace: Duration::from_millis(500) }
    }

    fn connect(&self) -> Connection {
        Builder::address(self.address.as_str()).expect("address").build().expect("connection")
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        self.daemon.kill().expect("kill");
        self.daemon.wait().expect("wait");
    }
}

fn wait_for(roles: &Receiver<Role>, wanted: Role) {
    let start = Instant::now();
    loop {
        match roles.recv_timeout(WAIT.saturating_sub(start.elapsed())) {
            Ok(role) if role == wanted => return,
            Ok(_) => {}
            Err(error) => panic!("never became {wanted:?}: {error}"),
        }
    }
}

fn check_config(connection: &Connection, config: &str) -> (bool, String) {
    let proxy = Proxy::new(connection, NAME, format!("{PATH}/img"), NAME).expect("proxy");
    proxy.call("CheckConfig", &config).expect("CheckConfig")
}

#[test]
fn targetcli_finds_the_subtype_and_its_description() {
    let dir = tempfile::tempdir().expect("tempdir");
    let bus = Bus::start(dir.path());
    let roles = dbus::start(bus.options(), SharedEnvironment::default()).expect("start");
    wait_for(&roles, Role::Owner);
    let client = bus.connect();
    let manager = ObjectManagerProxy::builder(&client).destination(NAME).unwrap().path(PATH).unwrap().build().unwrap();
    let objects = manager.get_managed_objects().expect("GetManagedObjects");
    assert_eq!(objects.keys().map(|path| path.as_str().to_owned()).collect::<Vec<_>>(), [format!("{PATH}/img")]);
    let interfaces = objects.values().next().expect("one object");
    let properties: &HashMap<String, OwnedValue> = interfaces.get(NAME).expect("the interface");
    let description = <&str>::try_from(properties.get("ConfigDesc").expect("ConfigDesc")).expect("a string");
    assert!(description.contains("@file=/path/to/image"), "{description}");
    let proxy = PropertiesProxy::builder(&client).destination(NAME).unwrap().path(format!("{PATH}/img")).unwrap().build().unwrap();
    let value = proxy.get(NAME.try_into().unwrap(), "ConfigDesc").expect("Get");
    assert_eq!(<&str>::try_from(&value).expect("a string"), description);
}

#[test]
fn check_config_answers_with_reasons() {
    let dir = tempfile::tempdir().expect("tempdir");
    let bus = Bus::start(dir.path());
    let roles = dbus::start(bus.options(), SharedEnvironment::default()).expect("start");
    wait_for(&roles, Role::Owner);
    let client = bus.connect();
    let image = dir.path().join("disk.raw");
    std::fs::write(&image, vec![0; 1 << 20]).expect("image");
    let image = image.to_str().expect("UTF-8");
    assert_eq!(check_config(&client, &format!("img/@id=a@file={image}@format=raw")), (true, "success".into()));
    let refused = [
        (format!("img/@file={image},size=1"), "%2C"),
        (format!("img/@file={image}@sise=1"), "did you mean 'size'?"),
        (format!("qcow/{image}"), "img/"),
        ("img/".into(), "empty"),
        (format!("img/@file={image}:1"), "%3A"),
    ];
    for (config, words) in refused {
        let (ok, reason) = check_config(&client, &config);
        assert!(!ok && reason.contains(words), "{config}: {reason}");
    }
    // Only root is told about files; see the unit test for everybody else.
    if nix::unistd::geteuid().is_root() {
        let (ok, reason) = check_config(&client, "img/@file=/no/such/image");
        assert!(!ok && reason.contains("/no/such/image"), "{reason}");
        let (ok, reason) = check_config(&client, "img/@file=relative/image");
        assert!(!ok && reason.contains("absolute"), "{reason}");
    } else {
        eprintln!("NOT TESTED: what root is told about files needs root");
    }
}

/// Registers what comes, as tcmu-runner does: looks for the name and calls the object behind it.
struct Registrar {
    registered: mpsc::Sender<(String, String)>,
}

#[zbus::interface(name = "org.kernel.TCMUService1.HandlerManager1")]
impl Registrar {
    async fn register_handler(
        &self,
        subtype: String,
        description: String,
        #[zbus(connection)] connection: &zbus::Connection,
    ) -> (bool, String) {
        let name = format!("{NAME}.HandlerManager1.{subtype}");
        let path = format!("{PATH}/HandlerManager1/{subtype}");
        let proxy = zbus::Proxy::new(connection, name, path, NAME).await.expect("proxy");
        let (ok, reason): (bool, String) = proxy.call("CheckConfig", &"img/@file=/a,b").await.expect("CheckConfig");
        assert!(!ok && reason.contains("%2C"), "{reason}");
        self.registered.send((subtype, description)).expect("send");
        (true, String::new())
    }
}

fn runner(bus: &Bus, registered: &mpsc::Sender<(String, String)>) -> Connection {
    Builder::address(bus.address.as_str())
        .expect("address")
        .serve_at(format!("{PATH}/HandlerManager1"), Registrar { registered: registered.clone() })
        .expect("object")
        .name(NAME)
        .expect("name")
        .build()
        .expect("connection")
}

#[test]
fn beside_tcmu_runner_it_registers_and_registers_again_and_takes_over() {
    let dir = tempfile::tempdir().expect("tempdir");
    let bus = Bus::start(dir.path());
    let (sender, registered) = mpsc::channel();
    let first = runner(&bus, &sender);
    let options = Options { grace: Duration::from_secs(3), ..bus.options() };
    let roles = dbus::start(options, SharedEnvironment::default()).expect("start");
    wait_for(&roles, Role::Registered);
    let (subtype, description) = registered.recv_timeout(WAIT).expect("registered");
    assert_eq!(subtype, "img");
    assert!(description.contains("@file="), "{description}");
    // It restarts: we register again.
    first.close().expect("close");
    let second = runner(&bus, &sender);
    registered.recv_timeout(WAIT).expect("registered again");
    // It goes for good: the name is ours.
    second.close().expect("close");
    wait_for(&roles, Role::Owner);
    assert!(!check_config(&bus.connect(), "img/@file=/a,b").0);
}

#[test]
fn a_bus_that_comes_late_or_restarts_is_found() {
    let dir = tempfile::tempdir().expect("tempdir");
    let address = format!("unix:path={}", dir.path().join("bus").display());
    let options = Options { address: Some(address), retry: Duration::from_millis(100), ..Options::default() };
    let roles = dbus::start(options, SharedEnvironment::default()).expect("start");
    wait_for(&roles, Role::Absent);
    let bus = Bus::start(dir.path());
    wait_for(&roles, Role::Owner);
    drop(bus);
    wait_for(&roles, Role::Absent);
    let _bus = Bus::start(dir.path());
    wait_for(&roles, Role::Owner);
}
