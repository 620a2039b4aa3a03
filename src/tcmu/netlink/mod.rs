//! The generic netlink family `TCM-USER`: the kernel's events about devices, and our answers.
//!
//! The kernel announces that a device was added, is about to be removed, or is about to be changed, to everyone who listens, and
//! (kernels that count as version 2) makes whoever caused it wait, without a time limit, for the first answer. So two things
//! matter more than any other: that no event is lost, and that nobody answers for a device of somebody else. [`Netlink`] reports
//! only devices of its own subtype, and an answer can only be given to what was reported.
//!
//! The socket code is our own and not a netlink crate's: what is needed of the protocol is little, and the socket options
//! that decide about lost events (a forced buffer size, errors to the sender) and the overrun signal are not within reach there.

mod message;
mod socket;

use super::uio::DeviceName;
use super::{Error, Result};
use message::{Builder, FLAG_ACK, FLAG_REQUEST, Message};
use socket::Socket;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

/// Version of the family's messages that we send.
const VERSION: u8 = 2;

mod command {
    pub const ADDED: u8 = 1;
    pub const REMOVED: u8 = 2;
    pub const RECONFIGURED: u8 = 3;
    /// An answer is the event's command and this.
    pub const DONE: u8 = 3;
    pub const SET_FEATURES: u8 = 7;
}

mod attribute {
    pub const DEVICE: u16 = 1;
    pub const MINOR: u16 = 2;
    pub const CONFIG: u16 = 4;
    pub const SIZE: u16 = 5;
    pub const WRITE_CACHE: u16 = 6;
    pub const STATUS: u16 = 7;
    pub const DEVICE_ID: u16 = 8;
    pub const REPLIES_SUPPORTED: u16 = 9;
}

/// Bytes of events that may wait for us, unless somebody wants it otherwise: thousands of events.
pub const EVENT_BUFFER: usize = 8 << 20;

/// What the kernel says.
#[derive(Debug)]
pub enum Event {
    /// Something about one device of ours.
    Device(DeviceEvent),
    /// Events were lost: look for devices yourself ([`uio::scan`](super::uio::scan)).
    Overrun,
}

/// An event about a device of our subtype.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceEvent {
    /// The device; in a change of its dev_config still the old one.
    pub name: DeviceName,
    /// Number of its UIO device.
    pub minor: u32,
    /// What happens.
    pub action: Action,
    /// The kernel's id of the device, if it expects an answer.
    answer_to: Option<u32>,
}

/// What happens to a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// It exists. The answer decides whether its creation succeeds.
    Added,
    /// It is about to go: its memory must be unmapped and its file closed before the answer.
    Removed,
    /// The whole dev_config (`<subtype>/<config>`) is about to change, if the answer is 0.
    SetConfig(String),
    /// The size in bytes is about to change, if the answer is 0.
    SetSize(u64),
    /// The write cache is about to be switched on or off, if the answer is 0.
    SetWriteCache(bool),
}

impl DeviceEvent {
    /// Whether the kernel may be waiting for an answer.
    pub fn expects_answer(&self) -> bool {
        self.answer_to.is_some()
    }

    /// Takes an event apart; none if it is not one, or not about a device of `subtype`.
    fn parse(message: &Message<'_>, subtype: &str) -> Option<Self> {
        let (command, version, body) = message.generic()?;
        let (mut name, mut minor, mut id, mut change) = (None, None, None, None);
        for (kind, payload) in message::attributes(body) {
            match kind {
                attribute::DEVICE => name = DeviceName::parse(&message::text(payload)),
                attribute::MINOR => minor = message::u32_of(payload),
                attribute::DEVICE_ID => id = message::u32_of(payload),
                attribute::CONFIG => change = Some(Action::SetConfig(message::text(payload).trim_end_matches('\n').to_owned())),
                attribute::SIZE => change = message::u64_of(payload).map(Action::SetSize),
                attribute::WRITE_CACHE => change = payload.first().map(|&on| Action::SetWriteCache(on != 0)),
                _ => {}
            }
        }
        let action = match command {
            command::ADDED => Action::Added,
            command::REMOVED => Action::Removed,
            command::RECONFIGURED => change?,
            _ => return None,
        };
        let name = name.filter(|name| name.subtype == subtype)?;
        // Kernels whose events are of version 1 take no answers.
        Some(Self { name, minor: minor?, action, answer_to: id.filter(|_| version >= 2) })
    }

    fn command(&self) -> u8 {
        match self.action {
            Action::Added => command::ADDED,
            Action::Removed => command::REMOVED,
            Action::SetConfig(_) | Action::SetSize(_) | Action::SetWriteCache(_) => command::RECONFIGURED,
        }
    }

    /// The answer as a message; none if the kernel takes none.
    fn answer(&self, family: u16, errno: i32, sequence: u32) -> Option<Vec<u8>> {
        let id = self.answer_to?;
        let status = errno.saturating_abs().saturating_neg();
        let builder = Builder::new(family, FLAG_REQUEST | FLAG_ACK, sequence, self.command() + command::DONE, VERSION);
        Some(builder.attribute(attribute::STATUS, &status.to_ne_bytes()).attribute(attribute::DEVICE_ID, &id.to_ne_bytes()).finish())
    }
}

/// A connection to the kernel's family: one thread waits for events, any thread answers.
#[derive(Debug)]
pub struct Netlink {
    family: u16,
    subtype: String,
    events: Socket,
    /// Answers have a socket of their own, so that their acknowledgements are not mixed with events.
    answers: parking_lot::Mutex<Socket>,
    waiting: parking_lot::Mutex<VecDeque<Event>>,
}

impl Netlink {
    /// Connects and listens for events about devices of `subtype`, of which `buffer` bytes may wait. Needs CAP_NET_ADMIN.
    pub fn open(subtype: &str, buffer: usize) -> Result<Self> {
        let mut answers = Socket::open()?;
        let (family, group) = resolve(&mut answers, "TCM-USER", "config")?;
        let mut events = Socket::open()?;
        // A lost event may leave somebody waiting for ever. So the buffer is large; should it still overflow, the kernel tells
        // whoever caused the event (the operation fails) instead of waiting for an answer, and tells us.
        events.set_buffer(buffer)?;
        events.report_loss_to_sender()?;
        events.join(group)?;
        Ok(Self { family, subtype: subtype.to_owned(), events, answers: answers.into(), waiting: VecDeque::new().into() })
    }

    /// Tells the kernel that there is somebody who answers. The kernel remembers it until it is rebooted. Old kernels do not know
    /// the request, which is not an error.
    pub fn announce(&self) -> Result<()> {
        let request = |sequence| {
            Builder::new(self.family, FLAG_REQUEST | FLAG_ACK, sequence, command::SET_FEATURES, VERSION)
                .attribute(attribute::REPLIES_SUPPORTED, &[1])
                .finish()
        };
        match self.answers.lock().request(request) {
            Err(Error::Netlink { source, .. }) if matches!(source.raw_os_error(), Some(nix::libc::EOPNOTSUPP | nix::libc::EINVAL)) => {
                Ok(())
            }
            other => other,
        }
    }

    /// Waits for the next event, at most for `timeout` (for ever if there is none); none if there was none.
    pub fn next(&self, timeout: Option<Duration>) -> Result<Option<Event>> {
        loop {
            if let Some(event) = self.waiting.lock().pop_front() {
                return Ok(Some(event));
            }
            let datagram = match self.events.receive(timeout) {
                Ok(Some(datagram)) => datagram,
                Ok(None) => return Ok(None),
                Err(Error::Netlink { source, .. }) if source.raw_os_error() == Some(nix::libc::ENOBUFS) => return Ok(Some(Event::Overrun)),
                Err(error) => return Err(error),
            };
            let events = events_in(&datagram, self.family, &self.subtype);
            self.waiting.lock().extend(events.into_iter().map(Event::Device));
            if timeout.is_some() && self.waiting.lock().is_empty() {
                return Ok(None);
            }
        }
    }

    /// Answers an event: 0 agrees, anything else is the errno that the operation fails with. Does nothing for kernels that take
    /// no answers. An answer that nobody waits for (the device is gone, somebody else was faster) is not an error.
    pub fn answer(&self, event: &DeviceEvent, errno: i32) -> Result<()> {
        let mut socket = self.answers.lock();
        if !event.expects_answer() {
            return Ok(());
        }
        let sent = socket.request(|sequence| event.answer(self.family, errno, sequence).unwrap_or_default());
        match sent {
            Err(Error::Netlink { source, .. }) if matches!(source.raw_os_error(), Some(nix::libc::ENODEV | nix::libc::ENOENT)) => {
                tracing::debug!(device = %event.name.short(), "nobody waits for the answer: {source}");
                Ok(())
            }
            other => other,
        }
    }
}

impl AsFd for Netlink {
    /// Readable when an event has come.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}

/// Asks the kernel's controller for the ids of a family and of one of its multicast groups.
fn resolve(socket: &mut Socket, family: &str, group: &str) -> Result<(u16, u32)> {
    const CONTROLLER: u16 = 0x10;
    const GET_FAMILY: u8 = 3;
    const FAMILY_NAME: u16 = 2;

    let name = [family.as_bytes(), &[0]].concat();
    let request = |sequence| Builder::new(CONTROLLER, FLAG_REQUEST, sequence, GET_FAMILY, 1).attribute(FAMILY_NAME, &name).finish();
    let datagram = match socket.query(request) {
        Err(Error::Netlink { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Err(Error::NoFamily),
        other => other?,
    };
    let incomplete = || Error::Netlink { what: "find the event group", source: io::ErrorKind::InvalidData.into() };
    family_in(&datagram, group).ok_or_else(incomplete)
}

/// The ids of the family and of the group of that name, in an answer of the controller.
#[doc(hidden)]
pub fn family_in(datagram: &[u8], group: &str) -> Option<(u16, u32)> {
    const FAMILY_ID: u16 = 1;
    const GROUPS: u16 = 7;
    const GROUP_NAME: u16 = 1;
    const GROUP_ID: u16 = 2;

    let (mut family_id, mut group_id) = (None, None);
    for message in Message::all(datagram) {
        let Some((_, _, body)) = message.generic() else { continue };
        for (kind, payload) in message::attributes(body) {
            match kind {
                FAMILY_ID => family_id = message::u16_of(payload),
                GROUPS => {
                    for (_, entry) in message::attributes(payload) {
                        let named = |(kind, payload): (u16, &[u8])| kind == GROUP_NAME && message::text(payload) == group;
                        if message::attributes(entry).any(named) {
                            let id = message::attributes(entry).find(|(kind, _)| *kind == GROUP_ID);
                            group_id = id.and_then(|(_, payload)| message::u32_of(payload));
                        }
                    }
                }
                _ => {}
            }
        }
    }
    family_id.zip(group_id)
}

/// The events about devices of `subtype` in a datagram of the family.
#[doc(hidden)]
pub fn events_in(datagram: &[u8], family: u16, subtype: &str) -> Vec<DeviceEvent> {
    let ours = Message::all(datagram).filter(|message| message.kind == family);
    ours.filter_map(|message| DeviceEvent::parse(&message, subtype)).collect()
}

/// The message that answers an event; none if the kernel takes none.
#[doc(hidden)]
pub fn answer_to(event: &DeviceEvent, family: u16, errno: i32, sequence: u32) -> Option<Vec<u8>> {
    event.answer(family, errno, sequence)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(command: u8, version: u8, name: &str, more: &[(u16, &[u8])]) -> Vec<u8> {
        let name = [name.as_bytes(), &[0]].concat();
        let mut builder = Builder::new(30, 0, 0, command, version)
            .attribute(attribute::DEVICE, &name)
            .attribute(attribute::MINOR, &3u32.to_ne_bytes())
            .attribute(attribute::DEVICE_ID, &42u32.to_ne_bytes());
        for (kind, payload) in more {
            builder = builder.attribute(*kind, payload);
        }
        builder.finish()
    }

    fn parse(bytes: &[u8]) -> Option<DeviceEvent> {
        DeviceEvent::parse(&Message::all(bytes).next().unwrap(), "img")
    }

    #[test]
    fn events_become_values() {
        let added = parse(&event(1, 2, "tcm-user/0/d/img/@file=/a/b", &[])).unwrap();
        assert_eq!(added.action, Action::Added);
        assert_eq!((added.minor, added.name.config.as_str()), (3, "@file=/a/b"));
        assert!(added.expects_answer());
        let action = |kind, payload: &[u8]| parse(&event(3, 2, "tcm-user/0/d/img/x", &[(kind, payload)])).unwrap().action;
        assert_eq!(action(attribute::SIZE, &(1u64 << 40).to_ne_bytes()), Action::SetSize(1 << 40));
        assert_eq!(action(attribute::WRITE_CACHE, &[1]), Action::SetWriteCache(true));
        assert_eq!(action(attribute::WRITE_CACHE, &[0]), Action::SetWriteCache(false));
        assert_eq!(action(attribute::CONFIG, b"img/@file=/new\n\0"), Action::SetConfig("img/@file=/new".into()));
    }

    #[test]
    fn foreign_and_strange_events_are_not_reported() {
        assert_eq!(parse(&event(1, 2, "tcm-user/0/d/qcow//x", &[])), None);
        assert_eq!(parse(&event(1, 2, "tcm-user/0/d/image/x", &[])), None);
        assert_eq!(parse(&event(1, 2, "tcm-user/0/d", &[])), None);
        assert_eq!(parse(&event(3, 2, "tcm-user/0/d/img/x", &[])), None);
        assert_eq!(parse(&event(4, 2, "tcm-user/0/d/img/x", &[])), None);
    }

    #[test]
    fn an_answer_names_the_event_the_device_and_the_status() {
        let added = parse(&event(1, 2, "tcm-user/0/d/img/x", &[])).unwrap();
        for (errno, status) in [(0, 0i32), (2, -2), (-2, -2)] {
            let bytes = added.answer(30, errno, 9).unwrap();
            let message = Message::all(&bytes).next().unwrap();
            assert_eq!((message.kind, message.sequence), (30, 9));
            let (command, version, body) = message.generic().unwrap();
            assert_eq!((command, version), (4, 2));
            let found: Vec<_> = message::attributes(body).collect();
            assert_eq!(found, [(7, &status.to_ne_bytes()[..]), (8, &42u32.to_ne_bytes()[..])]);
        }
        let removed = parse(&event(2, 2, "tcm-user/0/d/img/x", &[])).unwrap();
        assert_eq!(Message::all(&removed.answer(30, 0, 9).unwrap()).next().unwrap().generic().unwrap().0, 5);
    }

    #[test]
    fn old_kernels_get_no_answer() {
        let added = parse(&event(1, 1, "tcm-user/0/d/img/x", &[])).unwrap();
        assert!(!added.expects_answer());
        assert_eq!(added.answer(30, 0, 9), None);
    }

    /// The controller's own family is always there, with a group that tells of families.
    #[test]
    fn families_and_groups_are_resolved_by_the_running_kernel() {
        let mut socket = Socket::open().unwrap();
        let (family, group) = resolve(&mut socket, "nlctrl", "notify").unwrap();
        assert_eq!(family, 0x10);
        let events = Socket::open().unwrap();
        events.join(group).unwrap();
        assert!(events.receive(Some(Duration::ZERO)).unwrap().is_none());
        let error = resolve(&mut socket, "no-such-family", "x").unwrap_err().to_string();
        assert!(error.contains("modprobe target_core_user"), "{error}");
    }
}
