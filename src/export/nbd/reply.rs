//! The encoding of answers, into one buffer that is sent as a whole.

use super::handshake::Agreed;
use super::wire::{self, chunk};

/// Answers that wait to be sent. Payloads of reads are read straight into it.
#[derive(Debug, Default)]
pub struct Replies {
    /// Initialised memory; the first `len` bytes are to be sent.
    bytes: Vec<u8>,
    len: usize,
}

impl Replies {
    /// What is to be sent.
    pub fn pending(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }

    /// It was sent. Memory of unusually long answers is given back.
    pub fn clear(&mut self) {
        self.len = 0;
        if self.bytes.len() > 4 << 20 {
            self.bytes.truncate(1 << 20);
            self.bytes.shrink_to_fit();
        }
    }

    /// All that waits, to be sent by somebody else.
    pub fn into_bytes(mut self) -> Vec<u8> {
        self.bytes.truncate(self.len);
        self.bytes
    }

    /// Takes back everything after the first `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// How many bytes wait.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Room for `len` bytes, which the caller fills.
    pub fn room(&mut self, len: usize) -> &mut [u8] {
        let end = self.len + len;
        if self.bytes.len() < end {
            self.bytes.resize(end.next_multiple_of(64 << 10), 0);
        }
        let room = self.bytes.get_mut(self.len..end).unwrap_or_default();
        self.len = end;
        room
    }

    fn put(&mut self, bytes: &[u8]) {
        self.room(bytes.len()).copy_from_slice(bytes);
    }

    /// The head of a chunk.
    fn chunk(&mut self, agreed: Agreed, kind: u16, cookie: u64, offset: u64, payload: u64) {
        if agreed.extended {
            self.put(&wire::EXTENDED_REPLY_MAGIC.to_be_bytes());
        } else {
            self.put(&wire::STRUCTURED_REPLY_MAGIC.to_be_bytes());
        }
        self.put(&chunk::FLAG_DONE.to_be_bytes());
        self.put(&kind.to_be_bytes());
        self.put(&cookie.to_be_bytes());
        if agreed.extended {
            self.put(&offset.to_be_bytes());
            self.put(&payload.to_be_bytes());
        } else {
            self.put(&u32::try_from(payload).unwrap_or(u32::MAX).to_be_bytes());
        }
    }

    fn simple(&mut self, error: u32, cookie: u64) {
        self.put(&wire::SIMPLE_REPLY_MAGIC.to_be_bytes());
        self.put(&error.to_be_bytes());
        self.put(&cookie.to_be_bytes());
    }

    /// Done, without data.
    pub fn done(&mut self, agreed: Agreed, cookie: u64, offset: u64) {
        if agreed.extended { self.chunk(agreed, chunk::NONE, cookie, offset, 0) } else { self.simple(0, cookie) }
    }

    /// Failed. A structured answer says why.
    pub fn error(&mut self, agreed: Agreed, cookie: u64, offset: u64, error: u32, message: &str) {
        if !agreed.structured {
            return self.simple(error, cookie);
        }
        let message = message.get(..message.len().min(1024)).unwrap_or("");
        self.chunk(agreed, chunk::ERROR, cookie, offset, 6 + message.len() as u64);
        self.put(&error.to_be_bytes());
        self.put(&u16::try_from(message.len()).unwrap_or(0).to_be_bytes());
        self.put(message.as_bytes());
    }

    /// The head of an answer to a read; `len` bytes of data follow, for which there is [`Self::room`].
    pub fn data(&mut self, agreed: Agreed, cookie: u64, offset: u64, len: u32) {
        if agreed.structured {
            self.chunk(agreed, chunk::OFFSET_DATA, cookie, offset, u64::from(len) + 8);
            self.put(&offset.to_be_bytes());
        } else {
            self.simple(0, cookie);
        }
    }

    /// The answer to a read of a hole.
    pub fn hole(&mut self, agreed: Agreed, cookie: u64, offset: u64, len: u32) {
        self.chunk(agreed, chunk::OFFSET_HOLE, cookie, offset, 12);
        self.put(&offset.to_be_bytes());
        self.put(&len.to_be_bytes());
    }

    /// The answer to BLOCK_STATUS: runs of length and state.
    pub fn status(&mut self, agreed: Agreed, cookie: u64, offset: u64, runs: &[(u64, u32)]) {
        let count = runs.len() as u64;
        if agreed.extended {
            self.chunk(agreed, chunk::BLOCK_STATUS_EXT, cookie, offset, 8 + 16 * count);
            self.put(&wire::BASE_ALLOCATION_ID.to_be_bytes());
            self.put(&u32::try_from(count).unwrap_or(0).to_be_bytes());
            for (len, state) in runs {
                self.put(&len.to_be_bytes());
                self.put(&u64::from(*state).to_be_bytes());
            }
        } else {
            self.chunk(agreed, chunk::BLOCK_STATUS, cookie, offset, 4 + 8 * count);
            self.put(&wire::BASE_ALLOCATION_ID.to_be_bytes());
            for (len, state) in runs {
                self.put(&u32::try_from(*len).unwrap_or(u32::MAX).to_be_bytes());
                self.put(&state.to_be_bytes());
            }
        }
    }
}
