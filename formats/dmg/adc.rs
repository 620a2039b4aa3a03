//! Apple Data Compression: runs of literal bytes, and copies of what was decoded before.

/// Fills `out` with what `input` holds, which is exactly as much.
///
/// The first byte of an item tells its kind: from 80h on, that many plus 1 (less 80h) literal bytes; from 40h on, a copy of that many plus 4 (less 40h) bytes, whose
/// distance less 1 the next two bytes give; below, a copy of its upper bits plus 3, whose distance less 1 is its lower two bits and the next byte.
pub(super) fn decode(input: &[u8], out: &mut [u8]) -> bool {
    let mut rest = input;
    let mut done = 0;
    while done < out.len() {
        let (len, distance) = match *rest {
            [first @ 0x80..=0xFF, ref after @ ..] => {
                let len = usize::from(first & 0x7F) + 1;
                let (Some(from), Some(to)) = (after.get(..len), out.get_mut(done..done + len)) else { return false };
                to.copy_from_slice(from);
                done += len;
                rest = after.get(len..).unwrap_or_default();
                continue;
            }
            [first @ 0x40..=0x7F, high, low, ref after @ ..] => {
                rest = after;
                (usize::from(first & 0x3F) + 4, usize::from(high) << 8 | usize::from(low))
            }
            [first @ 0..=0x3F, low, ref after @ ..] => {
                rest = after;
                (usize::from(first >> 2) + 3, usize::from(first & 3) << 8 | usize::from(low))
            }
            _ => return false,
        };
        let Some(from) = done.checked_sub(distance + 1) else { return false };
        if done + len > out.len() {
            return false;
        }
        // Byte by byte: a copy may overlap what it makes.
        for step in 0..len {
            let Some(byte) = out.get(from + step).copied() else { return false };
            if let Some(place) = out.get_mut(done + step) {
                *place = byte;
            }
        }
        done += len;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_and_copies() {
        let mut out = [0; 14];
        // "abc"; 4 bytes from 3 back; 7 bytes from 1 back.
        assert!(decode(&[0x82, b'a', b'b', b'c', 0x04, 2, 0x43, 0, 0], &mut out));
        assert_eq!(&out, b"abcabcaaaaaaaa");
        assert!(!decode(&[0x82, b'a', b'b'], &mut out), "cut short");
        assert!(!decode(&[0x80, b'a', 0x04, 1], &mut out), "before the start");
        assert!(!decode(&[0x80, b'a', 0x7F, 0, 0], &mut out), "beyond the end");
        assert!(!decode(&[], &mut out));
    }
}
