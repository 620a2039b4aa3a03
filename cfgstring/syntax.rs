//! The string's outer grammar: items separated by `@`, escapes. Knows no keys.

use crate::error::{Error, Problem, printable};

/// One `key=value`, or a lone name. Unescaped.
#[derive(Debug)]
pub(crate) struct Item {
    /// Column of its first byte.
    pub column: usize,
    /// The text before the first bare `=`, made printable.
    pub key: String,
    /// Column of the value's first byte, and the value; `None` without `=`.
    pub value: Option<(usize, Vec<u8>)>,
}

/// Splits `rest`, whose first byte is `@`.
pub(crate) fn items(rest: &[u8]) -> Result<Vec<Item>, Error> {
    let mut items = Vec::new();
    let mut at = 1;
    loop {
        let (item, next) = item(rest, at)?;
        items.push(item);
        match next {
            Some(next) => at = next,
            None => return Ok(items),
        }
    }
}

/// The item that starts at index `start`, and the index after the `@` that ends it.
fn item(rest: &[u8], start: usize) -> Result<(Item, Option<usize>), Error> {
    let column = start + 1;
    let mut key = Vec::new();
    let mut value: Option<(usize, Vec<u8>)> = None;
    let mut at = start;
    let mut end = None;
    while let Some(&byte) = rest.get(at) {
        let literal = match byte {
            b'@' if rest.get(at + 1) == Some(&b'@') => {
                at += 1;
                b'@'
            }
            b'@' => {
                end = Some(at + 1);
                break;
            }
            b'%' => {
                let decoded = rest.get(at + 1..at + 3).and_then(hex_byte).ok_or_else(|| Error::at(at + 1, Problem::BadEscape))?;
                at += 2;
                decoded
            }
            b'=' if value.is_none() => {
                at += 1;
                value = Some((at + 1, Vec::new()));
                continue;
            }
            byte => byte,
        };
        at += 1;
        match &mut value {
            Some((_, value)) => value.push(literal),
            None => key.push(literal),
        }
    }
    if key.is_empty() {
        return Err(Error::at(column, Problem::NoKey));
    }
    Ok((Item { column, key: printable(&key), value }, end))
}

fn hex_byte(digits: &[u8]) -> Option<u8> {
    let [high, low] = digits else { return None };
    let digit = |byte: &u8| char::from(*byte).to_digit(16);
    u8::try_from(digit(high)? * 16 + digit(low)?).ok()
}

/// Appends `value` such that it survives kernel, rtslib, targetcli and a shell.
pub(crate) fn escape(value: &[u8], out: &mut impl std::fmt::Write) -> std::fmt::Result {
    for &byte in value {
        match byte {
            b'@' => out.write_str("@@")?,
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b'_' | b'-' | b'+' | b'=' => out.write_char(char::from(byte))?,
            byte => write!(out, "%{byte:02X}")?,
        }
    }
    Ok(())
}
