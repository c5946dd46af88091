//! How tokens spell bytes.

use super::WORD_START;
use std::collections::HashMap;

/// How tokens become bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Alphabet {
    /// Every character is a byte, as in GPT-2.
    Bytes,
    /// Characters, `▁` for spaces, `<0x0A>` for single bytes.
    SentencePiece,
}

/// The 256 characters that byte-level vocabularies spell bytes with: printable ones of Latin-1 for
/// themselves, the others moved up from U+0100 on in order.
pub(super) struct ByteAlphabet(pub(super) HashMap<char, u8>);

impl ByteAlphabet {
    pub(super) fn new() -> Self {
        let mut next = 256;
        let pairs = (0..=255u8).filter_map(|byte| {
            let printable = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
            let code = if printable {
                u32::from(byte)
            } else {
                next += 1;
                next - 1
            };
            Some((char::from_u32(code)?, byte))
        });
        Self(pairs.collect())
    }

    /// The characters of bytes, by byte.
    pub(super) fn letters(&self) -> [char; 256] {
        let mut letters = ['\0'; 256];
        for (&letter, &byte) in &self.0 {
            letters[byte as usize] = letter;
        }
        letters
    }

    pub(super) fn decode(&self, token: &str, alphabet: Alphabet) -> Vec<u8> {
        match alphabet {
            Alphabet::Bytes => {
                let bytes: Option<Vec<u8>> =
                    token.chars().map(|c| self.0.get(&c).copied()).collect();
                bytes.unwrap_or_else(|| token.as_bytes().to_vec())
            }
            Alphabet::SentencePiece => match byte_token(token) {
                Some(byte) => vec![byte],
                None => token.replace(WORD_START, " ").into_bytes(),
            },
        }
    }
}

/// The byte of a token such as `<0x0A>`.
fn byte_token(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() != 2 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}
