//! The negotiation: fixed newstyle, options until the client goes or leaves.

use super::Export;
use super::wire::{self, info, option, option_reply, transmission};
use std::io::{self, Read, Write};

/// What was agreed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agreed {
    /// Replies come in chunks.
    pub structured: bool,
    /// Requests and chunks have 64-bit lengths.
    pub extended: bool,
    /// The client may ask for `base:allocation`.
    pub allocation: bool,
}

/// What the connection is protected by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Security {
    /// Nothing, and there is nothing.
    None,
    /// Nothing yet: nothing is said or done before STARTTLS (FORCEDTLS of the protocol's document).
    Wanted,
    /// TLS.
    Tls,
}

/// How a negotiation ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// In transmission.
    Agreed(Agreed),
    /// The client left in good order.
    Left,
    /// The client's next byte begins TLS; inside it, options go on from the start.
    StartTls,
}

/// Negotiates without TLS. `None`: the client left in good order.
///
/// # Errors
/// The connection's; `InvalidData` for what is no NBD, after which nothing can be said any more.
pub fn negotiate(stream: &mut (impl Read + Write), export: &Export) -> io::Result<Option<Agreed>> {
    let no_zeroes = greet(stream)?;
    match haggle(stream, export, no_zeroes, Security::None)? {
        Outcome::Agreed(agreed) => Ok(Some(agreed)),
        Outcome::Left | Outcome::StartTls => Ok(None),
    }
}

/// The greeting. Whether the client does without 124 zeros after the answer to EXPORT_NAME.
///
/// # Errors
/// As for [`negotiate`].
pub fn greet(stream: &mut (impl Read + Write)) -> io::Result<bool> {
    let mut hello = Vec::new();
    hello.extend(wire::INIT_MAGIC.to_be_bytes());
    hello.extend(wire::OPTION_MAGIC.to_be_bytes());
    hello.extend((wire::FLAG_FIXED_NEWSTYLE | wire::FLAG_NO_ZEROES).to_be_bytes());
    stream.write_all(&hello)?;
    let flags = u32::from_be_bytes(take(stream)?);
    let known = u32::from(wire::FLAG_FIXED_NEWSTYLE | wire::FLAG_NO_ZEROES);
    if flags & !known != 0 {
        return Err(invalid(format!("the client sent unknown handshake flags {flags:#x}")));
    }
    Ok(flags & u32::from(wire::FLAG_NO_ZEROES) != 0)
}

/// The options, until the client goes on or leaves.
///
/// # Errors
/// As for [`negotiate`].
pub fn haggle(stream: &mut (impl Read + Write), export: &Export, no_zeroes: bool, security: Security) -> io::Result<Outcome> {
    let mut agreed = Agreed::default();
    loop {
        if u64::from_be_bytes(take(stream)?) != wire::OPTION_MAGIC {
            return Err(invalid("an option without its magic number".into()));
        }
        let number = u32::from_be_bytes(take(stream)?);
        let len = u32::from_be_bytes(take(stream)?);
        if len > wire::MAX_OPTION {
            // Read past it, so that the answer can be understood; never kept.
            io::copy(&mut stream.take(u64::from(len)), &mut io::sink())?;
            if number == option::EXPORT_NAME {
                return Err(invalid("an export name that is too long".into()));
            }
            answer(stream, number, option_reply::ERR_TOO_BIG, b"the option is too long")?;
            continue;
        }
        let mut data = vec![0; len as usize];
        stream.read_exact(&mut data)?;
        match number {
            option::STARTTLS if security == Security::Wanted && data.is_empty() => {
                answer(stream, number, option_reply::ACK, b"")?;
                return Ok(Outcome::StartTls);
            }
            option::EXPORT_NAME if security == Security::Wanted => {
                return Err(invalid("the client asked for the export without TLS".into()));
            }
            option::ABORT | option::STARTTLS => {}
            _ if security == Security::Wanted => {
                answer(stream, number, option_reply::ERR_TLS_REQD, b"this server insists on TLS")?;
                continue;
            }
            _ => {}
        }
        match number {
            option::EXPORT_NAME => {
                if !names(export, &data) {
                    // The option has no error reply: the connection is dropped.
                    return Err(invalid(format!("the client asked for export {:?}, which there is not", String::from_utf8_lossy(&data))));
                }
                let mut reply = Vec::new();
                reply.extend(export.device.limits().size.to_be_bytes());
                reply.extend(flags_of(export, agreed).to_be_bytes());
                if !no_zeroes {
                    reply.resize(reply.len() + 124, 0);
                }
                stream.write_all(&reply)?;
                return Ok(Outcome::Agreed(agreed));
            }
            option::ABORT => {
                // The client may be gone already.
                let _ = answer(stream, number, option_reply::ACK, b"");
                return Ok(Outcome::Left);
            }
            option::LIST if data.is_empty() => {
                let mut entry = Vec::new();
                push_string(&mut entry, export.name.as_bytes());
                entry.extend(export.description.as_bytes());
                answer(stream, number, option_reply::SERVER, &entry)?;
                answer(stream, number, option_reply::ACK, b"")?;
            }
            option::STRUCTURED_REPLY if data.is_empty() => {
                agreed.structured = true;
                answer(stream, number, option_reply::ACK, b"")?;
            }
            option::EXTENDED_HEADERS if data.is_empty() => {
                (agreed.structured, agreed.extended) = (true, true);
                answer(stream, number, option_reply::ACK, b"")?;
            }
            option::INFO | option::GO => {
                if information(stream, number, &data, export, agreed)? && number == option::GO {
                    return Ok(Outcome::Agreed(agreed));
                }
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => contexts(stream, number, &data, export, &mut agreed)?,
            option::LIST | option::STRUCTURED_REPLY | option::EXTENDED_HEADERS => {
                answer(stream, number, option_reply::ERR_INVALID, b"this option takes no data")?;
            }
            option::STARTTLS if security == Security::None => answer(stream, number, option_reply::ERR_UNSUP, b"this server has no TLS")?,
            option::STARTTLS => answer(stream, number, option_reply::ERR_INVALID, b"TLS is on, or the option came with data")?,
            _ => answer(stream, number, option_reply::ERR_UNSUP, b"unknown option")?,
        }
    }
}

/// The transmission flags of an export.
pub fn flags_of(export: &Export, agreed: Agreed) -> u16 {
    let limits = export.device.limits();
    let mut flags = transmission::HAS_FLAGS
        | transmission::SEND_FLUSH
        | transmission::SEND_FUA
        | transmission::SEND_CACHE
        | transmission::CAN_MULTI_CONN;
    if agreed.structured {
        flags |= transmission::SEND_DF;
    }
    if limits.read_only {
        return flags | transmission::READ_ONLY;
    }
    flags |= transmission::SEND_WRITE_ZEROES | transmission::SEND_FAST_ZERO;
    if limits.can_discard { flags | transmission::SEND_TRIM } else { flags }
}

/// Answers INFO and GO; whether the export is the one that there is.
fn information(stream: &mut impl Write, number: u32, data: &[u8], export: &Export, agreed: Agreed) -> io::Result<bool> {
    let mut rest = data;
    let name = string(&mut rest);
    let count = word(&mut rest).map(usize::from);
    let (Some(name), Some(count)) = (name, count) else {
        answer(stream, number, option_reply::ERR_INVALID, b"malformed")?;
        return Ok(false);
    };
    if rest.len() != count * 2 {
        answer(stream, number, option_reply::ERR_INVALID, b"malformed")?;
        return Ok(false);
    }
    if !names(export, name) {
        answer(stream, number, option_reply::ERR_UNKNOWN, b"there is no export of that name")?;
        return Ok(false);
    }
    let limits = export.device.limits();
    let mut reply = Vec::new();
    reply.extend(info::EXPORT.to_be_bytes());
    reply.extend(limits.size.to_be_bytes());
    reply.extend(flags_of(export, agreed).to_be_bytes());
    answer(stream, number, option_reply::INFO, &reply)?;
    for wanted in rest.as_chunks::<2>().0.iter().map(|b| u16::from_be_bytes(*b)) {
        let mut reply = wanted.to_be_bytes().to_vec();
        match wanted {
            info::NAME => reply.extend(export.name.as_bytes()),
            info::DESCRIPTION => reply.extend(export.description.as_bytes()),
            info::BLOCK_SIZE => {
                let preferred = u32::try_from(limits.granularity.clamp(4096, 1 << 20)).unwrap_or(4096);
                // Any alignment is served; the minimum is a promise to the client that it may ask for single bytes.
                [1, preferred, wire::MAX_PAYLOAD].iter().for_each(|size| reply.extend(size.to_be_bytes()));
            }
            _ => continue,
        }
        answer(stream, number, option_reply::INFO, &reply)?;
    }
    answer(stream, number, option_reply::ACK, b"")?;
    Ok(true)
}

fn contexts(stream: &mut impl Write, number: u32, data: &[u8], export: &Export, agreed: &mut Agreed) -> io::Result<()> {
    let set = number == option::SET_META_CONTEXT;
    if set {
        // Whatever comes of it, an earlier choice is void.
        agreed.allocation = false;
    }
    if !agreed.structured {
        return answer(stream, number, option_reply::ERR_INVALID, b"structured replies must be agreed on first");
    }
    let mut rest = data;
    let (Some(name), Some(count)) = (string(&mut rest), double_word(&mut rest)) else {
        return answer(stream, number, option_reply::ERR_INVALID, b"malformed");
    };
    let mut wanted = count == 0 && !set;
    for _ in 0..count {
        let Some(query) = string(&mut rest) else {
            return answer(stream, number, option_reply::ERR_INVALID, b"malformed");
        };
        wanted |= query == wire::BASE_ALLOCATION.as_bytes() || !set && query == b"base:";
    }
    if !rest.is_empty() {
        return answer(stream, number, option_reply::ERR_INVALID, b"malformed");
    }
    if !names(export, name) {
        return answer(stream, number, option_reply::ERR_UNKNOWN, b"there is no export of that name");
    }
    if wanted {
        let mut reply = if set { wire::BASE_ALLOCATION_ID } else { 0 }.to_be_bytes().to_vec();
        reply.extend(wire::BASE_ALLOCATION.as_bytes());
        answer(stream, number, option_reply::META_CONTEXT, &reply)?;
        agreed.allocation |= set;
    }
    answer(stream, number, option_reply::ACK, b"")
}

/// The default name is always right: there is one export.
fn names(export: &Export, name: &[u8]) -> bool {
    name.is_empty() || name == export.name.as_bytes()
}

fn answer(stream: &mut impl Write, number: u32, kind: u32, data: &[u8]) -> io::Result<()> {
    let mut reply = Vec::with_capacity(20 + data.len());
    reply.extend(wire::OPTION_REPLY_MAGIC.to_be_bytes());
    reply.extend(number.to_be_bytes());
    reply.extend(kind.to_be_bytes());
    reply.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
    reply.extend(data);
    stream.write_all(&reply)
}

fn push_string(into: &mut Vec<u8>, bytes: &[u8]) {
    into.extend(u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes());
    into.extend(bytes);
}

fn take<const N: usize>(stream: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn word(rest: &mut &[u8]) -> Option<u16> {
    let (now, later) = rest.split_first_chunk::<2>()?;
    *rest = later;
    Some(u16::from_be_bytes(*now))
}

fn double_word(rest: &mut &[u8]) -> Option<u32> {
    let (now, later) = rest.split_first_chunk::<4>()?;
    *rest = later;
    Some(u32::from_be_bytes(*now))
}

fn string<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let len = double_word(rest)? as usize;
    let (now, later) = rest.split_at_checked(len).filter(|_| len <= wire::MAX_STRING)?;
    *rest = later;
    Some(now)
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}
