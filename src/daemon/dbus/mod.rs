//! Our place on D-Bus: how targetcli finds the subtype and checks configuration strings.
//!
//! One thread keeps us there for the daemon's life. It owns `org.kernel.TCMUService1`; while tcmu-runner owns that name it
//! registers with it instead, again each time the owner changes, and takes the name over when its owner stays away. Without a bus
//! it tries again and again: disks are served without one.

mod handler;

use handler::Handler;
pub use handler::Shared as SharedEnvironment;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};
use zbus::blocking::connection::Builder;
use zbus::blocking::fdo::DBusProxy;
use zbus::blocking::{Connection, Proxy};
use zbus::fdo::{ObjectManager, RequestNameFlags, RequestNameReply};
use zbus::names::WellKnownName;

const NAME: &str = "org.kernel.TCMUService1";
const PATH: &str = "/org/kernel/TCMUService1";
const REGISTRAR: &str = "org.kernel.TCMUService1.HandlerManager1";
const REGISTRAR_PATH: &str = "/org/kernel/TCMUService1/HandlerManager1";

/// Which bus, and how long to wait for things.
#[derive(Clone, Debug)]
pub struct Options {
    /// A D-Bus address; `None`: the system bus.
    pub address: Option<String>,
    /// Between attempts to connect.
    pub retry: Duration,
    /// How long the name must be free before we take it from an owner who may be restarting.
    pub grace: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self { address: None, retry: Duration::from_secs(5), grace: Duration::from_secs(5) }
    }
}

/// What became of us on the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// We own the service's name.
    Owner,
    /// Somebody else owns it and knows our subtype.
    Registered,
    /// Somebody else owns it and does not take us (yet).
    Refused,
    /// There is no bus (yet).
    Absent,
}

/// Starts the thread. The returned channel tells the role, first when it is clear for the first time, then when it changes.
///
/// # Errors
/// The thread cannot be started.
pub fn start(options: Options, environment: SharedEnvironment) -> std::io::Result<mpsc::Receiver<Role>> {
    let (roles, receiver) = mpsc::channel();
    thread::Builder::new()
        .name("dbus".into())
        .spawn(move || keep(&options, &Handler::new(environment), &mut Roles { sender: roles, last: None }))?;
    Ok(receiver)
}

struct Roles {
    sender: mpsc::Sender<Role>,
    last: Option<Role>,
}

impl Roles {
    fn set(&mut self, role: Role) {
        if self.last.replace(role) != Some(role) {
            // The daemon may have stopped listening; the log line is what counts then.
            let _ = self.sender.send(role);
        }
    }
}

/// Connects, stays while it lasts, and again.
fn keep(options: &Options, handler: &Handler, roles: &mut Roles) {
    loop {
        match stay(options, handler, roles) {
            Ok(()) => tracing::warn!("the D-Bus connection closed; disks are served on, targetcli cannot create new ones for now"),
            Err(error) if roles.last != Some(Role::Absent) => tracing::warn!(
                "no D-Bus: {error}; disks are served, but targetcli will not show user:{} until the bus is there",
                cfgstring::SUBTYPE
            ),
            Err(error) => tracing::debug!("still no D-Bus: {error}"),
        }
        roles.set(Role::Absent);
        thread::sleep(options.retry);
    }
}

/// The owner of the service's name changed.
struct OwnerChanged {
    vacant: bool,
}

fn stay(options: &Options, handler: &Handler, roles: &mut Roles) -> zbus::Result<()> {
    let builder = match &options.address {
        Some(address) => Builder::address(address.as_str())?,
        None => Builder::system()?,
    };
    let connection = builder
        .method_timeout(Duration::from_secs(20))
        .serve_at(format!("{PATH}/{}", cfgstring::SUBTYPE), handler.clone())?
        .serve_at(PATH, ObjectManager)?
        .build()?;
    let bus = DBusProxy::new(&connection)?;
    let changes = watch_owner(&bus)?;
    let seat = Seat { connection: &connection, bus: &bus, handler: handler.clone() };
    roles.set(seat.take()?);
    // When the name became free while somebody else might come back to it.
    let mut free_since: Option<Instant> = None;
    loop {
        let wait = match free_since {
            Some(since) => options.grace.saturating_sub(since.elapsed()),
            None => Duration::from_secs(3600),
        };
        match changes.recv_timeout(wait) {
            Ok(OwnerChanged { vacant: true }) => {
                tracing::info!("{NAME} has no owner any more");
                free_since = Some(Instant::now());
            }
            Ok(OwnerChanged { vacant: false }) => {
                free_since = None;
                roles.set(seat.take()?);
            }
            Err(RecvTimeoutError::Timeout) if free_since.is_some() => {
                free_since = None;
                roles.set(seat.take()?);
            }
            // Registration was refused, perhaps for a passing reason.
            Err(RecvTimeoutError::Timeout) => {
                if roles.last == Some(Role::Refused) {
                    roles.set(seat.take()?);
                }
            }
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
    }
}

/// Signals arrive on a thread of their own, so that we can wait for them with a timeout. It ends with the connection.
fn watch_owner(bus: &DBusProxy<'_>) -> zbus::Result<mpsc::Receiver<OwnerChanged>> {
    let signals = bus.receive_name_owner_changed_with_args(&[(0, NAME)])?;
    let own = bus.inner().connection().unique_name().map(ToString::to_string);
    let (sender, receiver) = mpsc::channel();
    thread::Builder::new()
        .name("dbus-signals".into())
        .spawn(move || {
            for signal in signals {
                let Ok(args) = signal.args() else { continue };
                let new_owner = args.new_owner().as_ref().map(ToString::to_string);
                if new_owner.is_some() && new_owner == own {
                    continue;
                }
                if sender.send(OwnerChanged { vacant: new_owner.is_none() }).is_err() {
                    return;
                }
            }
        })
        .map_err(|error| zbus::Error::InputOutput(error.into()))?;
    Ok(receiver)
}

/// What is needed to take a role.
struct Seat<'a> {
    connection: &'a Connection,
    bus: &'a DBusProxy<'a>,
    handler: Handler,
}

impl Seat<'_> {
    /// Owns the name, or registers with its owner.
    fn take(&self) -> zbus::Result<Role> {
        if self.own(NAME)? {
            // Not there unless we were registered with another owner before.
            let _ = self.connection.object_server().remove::<Handler, _>(self.secondary_path());
            tracing::info!("owns {NAME}: targetcli finds user:{}", cfgstring::SUBTYPE);
            return Ok(Role::Owner);
        }
        match self.register() {
            Ok((true, _)) => {
                tracing::warn!(
                    "another program (tcmu-runner?) owns {NAME}; registered user:{} with it. Its answers to the kernel can beat ours: \
                     create backstores with control=nl_reply_supported=-1, or stop the other program",
                    cfgstring::SUBTYPE
                );
                Ok(Role::Registered)
            }
            Ok((false, reason)) => {
                tracing::error!("the owner of {NAME} does not register user:{}: {reason}", cfgstring::SUBTYPE);
                Ok(Role::Refused)
            }
            Err(error) => {
                tracing::error!("cannot register user:{} with the owner of {NAME}: {error}", cfgstring::SUBTYPE);
                Ok(Role::Refused)
            }
        }
    }

    fn own(&self, name: &str) -> zbus::Result<bool> {
        let reply = self.bus.request_name(WellKnownName::try_from(name)?, RequestNameFlags::DoNotQueue.into())?;
        Ok(matches!(reply, RequestNameReply::PrimaryOwner | RequestNameReply::AlreadyOwner))
    }

    fn secondary_path(&self) -> String {
        format!("{REGISTRAR_PATH}/{}", cfgstring::SUBTYPE)
    }

    /// Registers the subtype with whoever owns the service: it sees our name, then our object, and forwards CheckConfig.
    fn register(&self) -> zbus::Result<(bool, String)> {
        self.connection.object_server().at(self.secondary_path(), self.handler.clone())?;
        let name = format!("{REGISTRAR}.{}", cfgstring::SUBTYPE);
        if !self.own(&name)? {
            return Ok((false, format!("the name {name} belongs to another program")));
        }
        let registrar = Proxy::new(self.connection, NAME, REGISTRAR_PATH, REGISTRAR)?;
        registrar.call("RegisterHandler", &(cfgstring::SUBTYPE, cfgstring::DESCRIPTION))
    }
}
