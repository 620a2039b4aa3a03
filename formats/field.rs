//! Fields of on-disk structures: fixed arrays out of byte slices, by explicit offset; the caller says the byte order
//! (`u32::from_be_bytes(array(bytes, 12)?)`).

use crate::error::{Error, Result};

/// The `N` bytes at `at`.
///
/// # Errors
/// `Corrupt` when the structure ends before them.
pub(crate) fn array<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N]> {
    at.checked_add(N)
        .and_then(|end| bytes.get(at..end))
        .and_then(|field| field.try_into().ok())
        .ok_or_else(|| Error::corrupt(format!("a structure of {} bytes is too short for a field of {N} bytes at {at}", bytes.len())))
}

/// Puts `field` at `at`. The structure is the caller's own and long enough.
pub(crate) fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    if let Some(to) = bytes.get_mut(at..at.saturating_add(field.len())) {
        to.copy_from_slice(field);
    } else {
        debug_assert!(false, "a field at {at} outside its structure of {} bytes", bytes.len());
    }
}

/// UTF-16 text up to the first NUL; what is no valid text shows as U+FFFD.
pub(crate) fn utf16(units: impl Iterator<Item = u16>) -> String {
    char::decode_utf16(units.take_while(|u| *u != 0)).map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_end_with_the_structure() {
        let bytes = [1, 2, 3, 4];
        assert_eq!(u16::from_be_bytes(array(&bytes, 2).unwrap()), 0x0304);
        assert!(array::<2>(&bytes, 3).is_err());
        assert!(array::<2>(&bytes, usize::MAX).is_err());
    }

    #[test]
    fn text_ends_at_nul() {
        assert_eq!(utf16([0x61, 0xD800, 0x62, 0, 0x63].into_iter()), "a\u{FFFD}b");
    }
}
