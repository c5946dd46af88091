//! Token ids to text as they come.

use super::Tokenizer;

impl Tokenizer {
    /// The text of token ids, as UTF-8; bytes that are no UTF-8 become U+FFFD as
    /// [`String::from_utf8_lossy`] has it. `skip_special` leaves out special tokens. Ids that the
    /// vocabulary does not have are left out.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut stream = self.decode_stream(skip_special);
        let mut text = String::new();
        for &id in ids {
            text.push_str(&stream.push(id));
        }
        text.push_str(&stream.finish());
        text
    }

    /// Decodes ids as they come.
    pub fn decode_stream(&self, skip_special: bool) -> DecodeStream<'_> {
        DecodeStream {
            tokenizer: self,
            skip_special,
            strip: self.strip,
            pending: Vec::new(),
        }
    }
}

/// Decodes token ids one at a time; what it returns is whole characters, and all of it together is
/// what [`Tokenizer::decode`] gives.
#[derive(Debug, Clone)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    /// Spaces still to be taken off the start.
    strip: usize,
    /// The beginning of a character.
    pending: Vec<u8>,
}

impl DecodeStream<'_> {
    /// Takes the next token; returns the text that is complete now, often none.
    pub fn push(&mut self, id: u32) -> String {
        let piece = self.tokenizer.pieces.get(id as usize);
        let Some(piece) = piece.and_then(Option::as_ref) else {
            return String::new();
        };
        if piece.special && self.skip_special {
            return String::new();
        }
        let mut bytes = &piece.bytes[..];
        while self.strip > 0 && !bytes.is_empty() {
            match bytes.strip_prefix(b" ") {
                Some(rest) => {
                    bytes = rest;
                    self.strip -= 1;
                }
                None => self.strip = 0,
            }
        }
        self.pending.extend_from_slice(bytes);
        self.take(false)
    }

    /// Ends the text; returns what was held back, a U+FFFD for a character that never got whole.
    pub fn finish(mut self) -> String {
        self.take(true)
    }

    fn take(&mut self, last: bool) -> String {
        let keep = match std::str::from_utf8(&self.pending) {
            Ok(text) => {
                let text = text.to_owned();
                self.pending.clear();
                return text;
            }
            Err(_) if last => 0,
            Err(_) => incomplete_tail(&self.pending),
        };
        let rest = self.pending.split_off(self.pending.len() - keep);
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending = rest;
        text
    }
}

/// How many bytes at the end are the valid beginning of a character.
fn incomplete_tail(bytes: &[u8]) -> usize {
    let mut from = 0;
    loop {
        match std::str::from_utf8(&bytes[from..]) {
            Ok(_) => return 0,
            Err(e) => match e.error_len() {
                Some(n) => from += e.valid_up_to() + n,
                None => return bytes.len() - from - e.valid_up_to(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::{
        SpecialTokens,
        tokenizer::tests::{BYTE_LEVEL, SENTENCE_PIECE},
    };
    use proptest::prelude::*;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    #[test]
    fn characters_come_whole() {
        let tokenizer = &*BYTE_LEVEL;
        let text = "é€😀";
        let ids = tokenizer.encode(text, SpecialTokens::Plain).unwrap();
        assert_eq!(ids.len(), 9);
        let mut stream = tokenizer.decode_stream(false);
        let parts: Vec<String> = ids.iter().map(|&id| stream.push(id)).collect();
        assert_eq!(parts, ["", "é", "", "", "€", "", "", "", "😀"]);
        assert_eq!(stream.finish(), "");
        // Cut in the middle; then a letter where a continuation is due.
        let mut stream = tokenizer.decode_stream(false);
        assert_eq!(stream.push(ids[2]) + &stream.push(ids[3]), "");
        assert_eq!(stream.clone().finish(), "\u{fffd}");
        let letter = tokenizer.token_to_id("a").unwrap();
        assert_eq!(stream.push(letter), "\u{fffd}a");
        // Ids that there are none of.
        assert_eq!(
            tokenizer.decode(&[letter, 5000, u32::MAX, letter], false),
            "aa"
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        #[test]
        fn streams_equal_decoding(
            ids in prop::collection::vec(0u32..268, 0..40),
            skip in any::<bool>(),
        ) {
            let tokenizer = &*BYTE_LEVEL;
            let mut reference = tokenizer.interpret.clone();
            reference.with_decoder(Some(ByteLevel::new(false, true, true)));
            let mut stream = tokenizer.decode_stream(skip);
            let mut text = String::new();
            for &id in &ids {
                text.push_str(&stream.push(id));
            }
            text.push_str(&stream.finish());
            prop_assert_eq!(&text, &tokenizer.decode(&ids, skip));
            prop_assert_eq!(&text, &reference.decode(&ids, skip).unwrap());
        }
    }

    #[test]
    fn sentence_piece_streams() {
        let tokenizer = &*SENTENCE_PIECE;
        let ids = tokenizer
            .encode("the 日本 lamp", SpecialTokens::Plain)
            .unwrap();
        let mut stream = tokenizer.decode_stream(true);
        let mut text = String::new();
        for &id in &ids {
            let part = stream.push(id);
            assert!(!part.contains('\u{fffd}'));
            text.push_str(&part);
        }
        text.push_str(&stream.finish());
        assert_eq!(text, "the 日本 lamp");
        // The space that is put in front is taken off again, the others stay.
        let ids = tokenizer.encode("  two", SpecialTokens::Plain).unwrap();
        assert_eq!(tokenizer.decode(&ids, true), "  two");
    }
}
