//! NBD clients that send anything, over a small disk. What comes back is NBD to the last byte, and answers nothing that was not asked.

use super::disk;
use super::input::Input;
use super::sparse::Sparse;
use img_tcmu::export::nbd::{Export, Workers, converse};
use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, OnceLock};

const MAGIC: u64 = 0x4948_4156_454F_5054;
const MAX_OPTIONS: usize = 8;
const MAX_REQUESTS: usize = 30;
const SIZE: u64 = 137 * 512;

/// The client's side: what it sends is known, what it gets is kept.
#[derive(Clone, Default)]
struct Client {
    sends: Arc<Mutex<io::Cursor<Vec<u8>>>>,
    gets: Arc<Mutex<Vec<u8>>>,
}

impl Read for Client {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        // In small pieces now and then, so that requests are cut.
        let mut sends = self.sends.lock().unwrap_or_else(|e| e.into_inner());
        let most = if sends.position() % 3 == 1 { 11 } else { usize::MAX };
        let len = buf.len().min(most);
        sends.read(&mut buf[..len])
    }
}

impl Write for Client {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.gets.lock().unwrap_or_else(|e| e.into_inner()).extend(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn workers() -> &'static Workers {
    static WORKERS: OnceLock<Workers> = OnceLock::new();
    WORKERS.get_or_init(|| Workers::new(2).expect("threads can be started"))
}

pub fn nbd(data: &[u8]) {
    let mut input = Input::new(data);
    let how = input.u8();
    let writable = how & 2 == 0;
    let Ok(image) = disk::open(Arc::new(Sparse::new(&[0x33; SIZE as usize])), "raw", writable) else { return };
    let export = Export { name: "disk".into(), description: "a disk".into(), device: image };
    let script = if how & 1 == 0 { Some(Script::new(&mut input)) } else { None };
    let sends = script.as_ref().map_or_else(|| input.rest().to_vec(), |s| s.bytes.clone());
    let client = Client { sends: Arc::new(Mutex::new(io::Cursor::new(sends))), ..Client::default() };
    let _ = converse(&mut client.clone(), Box::new(client.clone()), &export, workers());
    if let Some(script) = script {
        let gets = client.gets.lock().unwrap_or_else(|e| e.into_inner());
        script.check(&gets);
    }
}

/// A conversation in proper form, if not with proper contents.
#[derive(Default)]
struct Script {
    bytes: Vec<u8>,
    no_zeroes: bool,
    /// The client has entered transmission by EXPORT_NAME.
    by_name: bool,
    structured: bool,
    extended: bool,
    requests: Vec<(u64, u16)>,
}

impl Script {
    fn new(input: &mut Input<'_>) -> Self {
        let mut this = Self::default();
        let flags = input.u8();
        this.no_zeroes = flags & 2 != 0;
        this.bytes.extend(u32::from(flags & 3 | 1).to_be_bytes());
        for _ in 0..input.below(MAX_OPTIONS as u64 + 1) {
            let number = input.choose(&[3u32, 6, 8, 9, 10, 11, 5, 77]);
            let content = match number {
                6 => [info_name(input), vec![0, 1, 0, input.u8() % 5]].concat(),
                9 | 10 => {
                    let mut content = info_name(input);
                    let count = u32::from(input.u8() % 3);
                    content.extend(count.to_be_bytes());
                    for _ in 0..count {
                        let query: &[u8] = if input.flag() { b"base:allocation" } else { b"base:" };
                        content.extend((query.len() as u32).to_be_bytes());
                        content.extend(query);
                    }
                    content
                }
                8 | 11 | 3 => {
                    if input.u8().is_multiple_of(8) {
                        vec![1]
                    } else {
                        Vec::new()
                    }
                }
                _ => input.take(9).to_vec(),
            };
            // Damaged now and then.
            let content = if input.u8().is_multiple_of(8) { input.take(12).to_vec() } else { content };
            this.structured |= number == 8 && content.is_empty();
            this.extended |= number == 11 && content.is_empty();
            this.option(number, &content);
        }
        this.structured |= this.extended;
        if input.u8().is_multiple_of(4) {
            this.by_name = true;
            this.option(1, b"disk");
        } else {
            this.option(7, b"\0\0\0\x04disk\0\0");
        }
        for cookie in 0..input.below(MAX_REQUESTS as u64 + 1) {
            this.request(cookie + 0x1234_5678_0000, input);
        }
        if input.flag() {
            this.frame(0, 2, 99, 0, 0);
        }
        this
    }

    fn option(&mut self, number: u32, content: &[u8]) {
        self.bytes.extend(MAGIC.to_be_bytes());
        self.bytes.extend(number.to_be_bytes());
        self.bytes.extend((content.len() as u32).to_be_bytes());
        self.bytes.extend(content);
    }

    fn frame(&mut self, flags: u16, kind: u16, cookie: u64, offset: u64, len: u64) {
        self.bytes.extend(if self.extended { 0x21E4_1C71u32 } else { 0x2560_9513 }.to_be_bytes());
        self.bytes.extend(flags.to_be_bytes());
        self.bytes.extend(kind.to_be_bytes());
        self.bytes.extend(cookie.to_be_bytes());
        self.bytes.extend(offset.to_be_bytes());
        if self.extended {
            self.bytes.extend(len.to_be_bytes());
        } else {
            self.bytes.extend((len as u32).to_be_bytes());
        }
    }

    fn request(&mut self, cookie: u64, input: &mut Input<'_>) {
        let kind = input.choose(&[0u16, 0, 1, 1, 3, 4, 5, 6, 7, 9]);
        let mut flags = if input.u8().is_multiple_of(4) { input.u16() } else { 0 };
        let offset = if input.u8().is_multiple_of(8) { input.telling(&[SIZE]) } else { input.below(SIZE) };
        let mut len = if input.u8().is_multiple_of(8) { input.telling(&[SIZE, 1 << 25]) } else { input.below(SIZE + 1 - offset.min(SIZE)) };
        if !self.extended {
            len &= 0xffff_ffff;
        }
        if kind == 1 {
            len = len.min(40_000);
            if self.extended {
                flags |= 32;
            }
        } else {
            flags &= !32;
        }
        self.frame(flags, kind, cookie, offset, len);
        self.requests.push((cookie, kind));
        if kind == 1 {
            self.bytes.resize(self.bytes.len() + len as usize, 0x44);
        }
    }

    /// Walks over everything that the server sent.
    fn check(&self, gets: &[u8]) {
        let mut rest = Walk(gets);
        assert_eq!((rest.number(8), rest.number(8), rest.number(2)), (0x4E42_444D_4147_4943, MAGIC, 3));
        // Answers to options, up to the one that ends the negotiation.
        loop {
            if rest.0.starts_with(&0x0003_E889_0455_65A9u64.to_be_bytes()) {
                rest.number(8);
                let (number, kind, len) = (rest.number(4), rest.number(4), rest.number(4));
                rest.bytes(len);
                if number == 7 && kind == 1 {
                    break;
                }
            } else {
                assert!(self.by_name, "no answer to an option, and none was expected: {:x?}", rest.0.get(..16));
                assert_eq!(rest.number(8), SIZE);
                rest.number(2);
                if !self.no_zeroes {
                    assert!(rest.bytes(124).iter().all(|b| *b == 0));
                }
                break;
            }
        }
        let mut ended = std::collections::BTreeSet::new();
        while !rest.0.is_empty() {
            let magic = rest.number(4) as u32;
            let (cookie, done) = match magic {
                0x6744_6698 => {
                    let error = rest.number(4);
                    let cookie = rest.number(8);
                    let read = self.requests.contains(&(cookie, 0));
                    assert!(!self.structured || !read, "a simple reply to a read");
                    if read && error == 0 {
                        rest.bytes(self.read_len(cookie));
                    }
                    (cookie, true)
                }
                0x668E_33EF | 0x6E8A_278C => {
                    assert!(self.structured && (magic == 0x6E8A_278C) == self.extended, "a chunk of another kind than agreed");
                    let (flags, _kind, cookie) = (rest.number(2), rest.number(2), rest.number(8));
                    if self.extended {
                        rest.number(8);
                    }
                    let len = rest.number(if self.extended { 8 } else { 4 });
                    rest.bytes(len);
                    (cookie, flags & 1 == 1)
                }
                other => panic!("{other:#x} is no magic number of a reply"),
            };
            assert!(self.requests.iter().any(|(c, _)| *c == cookie), "an answer to {cookie:#x}, which was not asked");
            assert!(!done || ended.insert(cookie), "two answers to {cookie:#x}");
        }
        assert_eq!(ended.len(), self.requests.len(), "requests without an answer");
    }

    fn read_len(&self, cookie: u64) -> u64 {
        // Without extended headers: the length field is the last word of the frame that holds the cookie.
        let at = self.bytes.windows(8).position(|w| w == cookie.to_be_bytes()).map_or(0, |at| at + 16);
        self.bytes.get(at..at + 4).map_or(0, |b| b.iter().fold(0, |n, b| n << 8 | u64::from(*b)))
    }
}

fn info_name(input: &mut Input<'_>) -> Vec<u8> {
    let name: &[u8] = input.choose(&[&b""[..], b"disk", b"other"]);
    [&(name.len() as u32).to_be_bytes()[..], name].concat()
}

struct Walk<'a>(&'a [u8]);

impl Walk<'_> {
    fn bytes(&mut self, len: u64) -> &[u8] {
        assert!(len <= self.0.len() as u64, "{len} bytes are announced and {} come", self.0.len());
        let (now, later) = self.0.split_at(len as usize);
        self.0 = later;
        now
    }

    fn number(&mut self, len: u64) -> u64 {
        self.bytes(len).iter().fold(0, |n, b| n << 8 | u64::from(*b))
    }
}
