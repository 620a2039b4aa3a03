//! A generic netlink socket.

use super::message::Message;
use crate::tcmu::{Error, Result};
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt, socket, sockopt,
};
use nix::{setsockopt_impl, sockopt_impl};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

// Options of netlink sockets that the nix crate does not have.
sockopt_impl!(
    /// Joins a multicast group by number.
    JoinGroup, SetOnly, libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP, u32
);
sockopt_impl!(
    /// Whoever multicasts is told if this socket could not take it.
    ReportLossToSender, SetOnly, libc::SOL_NETLINK, NETLINK_BROADCAST_ERROR, u32
);

/// Of `linux/netlink.h`.
const NETLINK_BROADCAST_ERROR: i32 = 4;

/// How long the kernel may take to answer a request. It answers within the call that sends it.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// No message of the families used here is longer.
const DATAGRAM: usize = 64 << 10;

#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    sequence: u32,
}

fn failed(what: &'static str) -> impl Fn(Errno) -> Error {
    move |errno| Error::Netlink { what, source: errno.into() }
}

impl Socket {
    pub fn open() -> Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkGeneric).map_err(failed("open a socket"))?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0)).map_err(failed("bind"))?;
        Ok(Self { fd, sequence: 0 })
    }

    /// Makes room for `bytes` of messages, beyond the system's limit if we may.
    pub fn set_buffer(&mut self, bytes: usize) -> Result<()> {
        setsockopt(&self.fd, sockopt::RcvBufForce, &bytes)
            .or_else(|_| setsockopt(&self.fd, sockopt::RcvBuf, &bytes))
            .map_err(failed("set the buffer size"))
    }

    /// See [`ReportLossToSender`].
    pub fn report_loss_to_sender(&self) -> Result<()> {
        setsockopt(&self.fd, ReportLossToSender, &1).map_err(failed("ask for errors to the sender"))
    }

    /// Listens to a multicast group.
    pub fn join(&self, group: u32) -> Result<()> {
        setsockopt(&self.fd, JoinGroup, &group).map_err(failed("join the event group"))
    }

    /// Waits for a datagram; none if the time is up.
    pub fn receive(&self, timeout: Option<Duration>) -> Result<Option<Vec<u8>>> {
        let limit = timeout.map_or(PollTimeout::NONE, |time| PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX));
        let mut buffer = vec![0; DATAGRAM];
        loop {
            match recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(len) => {
                    buffer.truncate(len);
                    return Ok(Some(buffer));
                }
                Err(Errno::EAGAIN) => {}
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(failed("receive")(errno)),
            }
            match poll(&mut [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)], limit) {
                Ok(0) => return Ok(None),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(failed("wait for a message")(errno)),
            }
        }
    }

    /// Sends a request that the kernel acknowledges, and waits for that.
    pub fn request(&mut self, request: impl FnOnce(u32) -> Vec<u8>) -> Result<()> {
        self.query(request).map(drop)
    }

    /// Sends a request and waits for the first answer to it; an error that is answered is an error.
    pub fn query(&mut self, request: impl FnOnce(u32) -> Vec<u8>) -> Result<Vec<u8>> {
        self.sequence = self.sequence.wrapping_add(1);
        let bytes = request(self.sequence);
        send(self.fd.as_raw_fd(), &bytes, MsgFlags::empty()).map_err(failed("send"))?;
        loop {
            let Some(datagram) = self.receive(Some(ANSWER_TIMEOUT))? else {
                return Err(Error::Netlink { what: "wait for the kernel's answer", source: io::ErrorKind::TimedOut.into() });
            };
            let error = match Message::all(&datagram).find(|message| message.sequence == self.sequence) {
                Some(first) => first.error(),
                None => continue,
            };
            return match error {
                None | Some(0) => Ok(datagram),
                Some(errno) => Err(Error::Netlink { what: "request", source: io::Error::from_raw_os_error(errno) }),
            };
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
