//! The ways in which chunks are compressed.

use super::adc;
use crate::error::{Error, Result};
use lzfse_rust::LzfseRingDecoder;
use std::io::{self, Read, Write};

/// Memory that an xz decoder may take, in bytes.
const XZ_MEMORY: u64 = 80 << 20;

/// How a chunk is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Method {
    Adc,
    Zlib,
    Bzip2,
    Lzfse,
    Xz,
}

impl Method {
    pub(super) fn by_number(number: u32) -> Option<Self> {
        Some(match number {
            0x8000_0004 => Self::Adc,
            0x8000_0005 => Self::Zlib,
            0x8000_0006 => Self::Bzip2,
            0x8000_0007 => Self::Lzfse,
            0x8000_0008 => Self::Xz,
            _ => return None,
        })
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Adc => "adc",
            Self::Zlib => "zlib",
            Self::Bzip2 => "bzip2",
            Self::Lzfse => "lzfse",
            Self::Xz => "xz",
        }
    }
}

/// A place of fixed length to write to.
struct Bounded<'a> {
    out: &'a mut [u8],
    done: usize,
}

impl Write for Bounded<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let place = self.out.get_mut(self.done..).and_then(|rest| rest.get_mut(..bytes.len()));
        place.ok_or_else(|| io::Error::other("the chunk is longer than it should be"))?.copy_from_slice(bytes);
        self.done += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether a decoder fills `out` and has no more.
fn fills(mut decoder: impl Read, out: &mut [u8]) -> bool {
    decoder.read_exact(out).is_ok() && matches!(decoder.read(&mut [0]), Ok(0))
}

/// Fills `out` with the chunk in `input`, which has exactly as much.
pub(super) fn decode(method: Method, input: &[u8], out: &mut [u8]) -> Result<()> {
    let filled = match method {
        Method::Adc => adc::decode(input, out),
        Method::Zlib => crate::cloop::inflate(input, out),
        Method::Bzip2 => fills(bzip2::read::BzDecoder::new(input), out),
        Method::Lzfse => {
            let mut bounded = Bounded { out, done: 0 };
            let decoded = LzfseRingDecoder::default().decode(&mut &input[..], &mut bounded).is_ok();
            decoded && bounded.done == bounded.out.len()
        }
        Method::Xz => match liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY, 0) {
            Ok(stream) => fills(liblzma::read::XzDecoder::new_stream(input, stream), out),
            Err(_) => false,
        },
    };
    if filled { Ok(()) } else { Err(Error::corrupt(format!("a chunk compressed with {} cannot be decoded", method.name()))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Apple's own encoder made of [`text`] (a block of kind "bvx2").
    const LONG: &str = "62767832611700006c02c01400360150e58f9f3edd910200a80000003f0860002fc095ceab2000002260c7bcdb02c00b00430000600ba7c83340affc\
         1d32325d63af8b3de60b0000000000002c00000a00000000c011000000f027bc0c4fc37ff01ffc091fc3bff01f3c0d01000000000000000080d7e03b\
         780d7e8217e1412081240d591b080000000000000000000000000000000000000000000000000000000000000000000000000060338621d9085ac3e5\
         c1cc0acb49018d5c854789e00e9f7ea8436efcc0d60c987569ebe0bc94a9b236d992947374311657141a22026a98087efd0769332e9101541d9fa4e9\
         ba4a73a3c663913395672ba892d48b115207b89e6d90a31b253affa5ec135ad31c1d8c9add7be31d1575c87ab6613a10d93fed3927f022ec8c3937bb\
         e20eab3b51f6b33bee93dde9f7c2e6b67a892be2ff8a4b6bd1ec4b637f81078da840879b1edf7bb6d6886246b4bb1ac846249351d5b83a86aaceb248\
         7018b71202cab8920f881d694241e0565f3c1aca4da7d439c9f6253de6ec3f49354d1bd57f04425d8cb6ed104e5bc5a60a1cfa6322d5cb9dc760efa7\
         a95d537ddaecb518f17fd9df26274607a5a539a2038d5a209af0f4a1d8c2818491fb1282db443f0b3c0ddf4d3c293a29474f35a8e08dd49ab7fe7cba\
         f18dbe3e2eee38f178d1ff74bc8053184b50610100000000000000000000000f0de92c73278c39a7cb5748bd7c8a57278cecf5a2d30614d3674e1ff3\
         2ec8d931dde0b227ce989965c18901adef8d0c79565e21fd92a19eafc8f8155f01b5175e01d7165e01e566dd9c3463b8bb3e346ae69a0abc656c4398\
         9101f59acc4f9931ada99eb7c042fa1bb3a6c1adcb5b48b9402d2fcc182bd20b8c1afca2be2f6a9886aebca821d568c85f9731f756ed2d617056f569\
         094311d5cd57423528af6ea7c0e4975e01b5975c01d7165c01e576d8ba9b426998bf5db92ff25c5fce3c845e00c58588793365553bbb5c3944222fb6\
         f06ed912881558994c6198fc726518e02057e6361ed922b06ab052f2260d6f216b06578d644d8fa92b5b002b01d5932fcdbd5dbe0cd91ce4cb3ccc23\
         5f04277fd4932f2dbb2e530662069932baf3c8158151fd95922971a80d3933b871246f5aec5df286f0ba373d19335b5dcb9601bf205746f146ae08bc\
         ca97944c89b736f9524a2cc98a0d5b5602b53b8cc9148cfa7205d0beac506b2533869cfaf6e4cd0ceae5cc70b750ce504bc94cc1cdb9a6e5cd0d6ae4\
         4c41b250ce504bc94ce116df78a76034807222934343b699982a9ce63504a3dfa8ce14cc0bd0805516de84bb37509d1e559143db5d965208e2855692\
         d30ad14bf10f5dc8246ded472903a2472bc3b410a5105fa14b314df7a60cec085d882f45b44264852e65da5be3e8450014ad8439872ac61aa85224c6\
         bddf64006be842ac01aa086a802a62ccbb31f402e0ae084d1813aa147751858cf26e7dd432a07b9432cc00aa082b4ec518f5bbd5a6e5003725a5cc30\
         2ac692a152c6bd2dfe51f4ac764a56b38d39eac8189b0c79539f4599bdfa94d2a5a04761d21029616298bd92857c220c2c6408207ac2f410376161d0\
         1e64fe0871910d04101e0019840120d20062767824";
    /// And of `abcabcabc`, 20 times (a block of kind "bvxn").
    const SHORT: &str = "6276786eb400000011000000c803616263f09ce163060000000000000062767824";

    fn text() -> String {
        (0..140_u64).map(|i| format!("line {i} of a text that compresses: {:x}\n", i * i * 7919)).collect()
    }

    fn unhex(text: &str) -> Vec<u8> {
        (0..text.len() / 2).map(|i| u8::from_str_radix(&text[i * 2..i * 2 + 2], 16).unwrap()).collect()
    }

    #[test]
    fn lzfse_is_what_apples_encoder_makes() {
        for (coded, text) in [(LONG, text()), (SHORT, "abcabcabc".repeat(20))] {
            let coded = unhex(coded);
            let mut out = vec![0; text.len()];
            decode(Method::Lzfse, &coded, &mut out).unwrap();
            assert_eq!(String::from_utf8(out).unwrap(), text);
            let mut other = vec![0; text.len() + 1];
            assert!(decode(Method::Lzfse, &coded, &mut other).is_err(), "too short");
            assert!(decode(Method::Lzfse, &coded, &mut other[..text.len() - 1]).is_err(), "too long");
            assert!(decode(Method::Lzfse, &coded[..coded.len() / 2], &mut other).is_err(), "cut short");
        }
    }

    #[test]
    fn chunks_are_exactly_as_long_as_they_should_be() {
        use std::io::Read as _;
        let text = text();
        let mut zlib = Vec::new();
        flate2::read::ZlibEncoder::new(text.as_bytes(), flate2::Compression::default()).read_to_end(&mut zlib).unwrap();
        let mut bzip2 = Vec::new();
        bzip2::read::BzEncoder::new(text.as_bytes(), bzip2::Compression::default()).read_to_end(&mut bzip2).unwrap();
        let mut xz = Vec::new();
        liblzma::read::XzEncoder::new(text.as_bytes(), 6).read_to_end(&mut xz).unwrap();
        for (method, coded) in [(Method::Zlib, zlib), (Method::Bzip2, bzip2), (Method::Xz, xz)] {
            let mut out = vec![0; text.len()];
            decode(method, &coded, &mut out).unwrap();
            assert_eq!(out, text.as_bytes());
            assert!(decode(method, &coded, &mut vec![0; text.len() + 1]).is_err());
            assert!(decode(method, &coded, &mut vec![0; text.len() - 1]).is_err());
            assert!(decode(method, &coded[..coded.len() / 2], &mut out).is_err());
        }
    }
}
