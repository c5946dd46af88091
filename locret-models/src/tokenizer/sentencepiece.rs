//! Llama 2's vocabulary as Meta published it: in SentencePiece's format, a protocol buffer.

use super::{Alphabet, MAX_ID, NamedTokens, Tokenizer, vocabulary::Vocabulary};
use crate::{ModelError, Result};
use prost::Message;
use std::path::Path;

/// A file. Of all messages, only the fields that matter here are named; what a file leaves out has
/// the format's defaults.
#[derive(Message)]
struct Model {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<Piece>,
    #[prost(message, optional, tag = "2")]
    trainer: Option<Trainer>,
    #[prost(message, optional, tag = "3")]
    normalizer: Option<Normalizer>,
}

#[derive(Message)]
struct Piece {
    #[prost(string, tag = "1")]
    text: String,
    #[prost(float, tag = "2")]
    score: f32,
    #[prost(int32, tag = "3", default = "1")]
    kind: i32,
}

#[derive(Message)]
struct Trainer {
    /// 1 unigram, 2 BPE, 3 words, 4 characters.
    #[prost(int32, tag = "3", default = "1")]
    model_type: i32,
    #[prost(bool, tag = "24")]
    space_after: bool,
    #[prost(bool, tag = "35")]
    byte_fallback: bool,
    /// Ids; -1 where there is no such token.
    #[prost(int32, tag = "40", default = "0")]
    unknown: i32,
    #[prost(int32, tag = "41", default = "1")]
    bos: i32,
    #[prost(int32, tag = "42", default = "2")]
    eos: i32,
}

#[derive(Message)]
struct Normalizer {
    /// Replacements of characters.
    #[prost(bytes = "vec", tag = "2")]
    characters: Vec<u8>,
    #[prost(bool, tag = "3", default = "true")]
    space_first: bool,
    #[prost(bool, tag = "4", default = "true")]
    fewer_spaces: bool,
    #[prost(bool, tag = "5", default = "true")]
    escaped_spaces: bool,
}

/// The tokenizer of a SentencePiece model.
pub(super) fn build(path: &Path, bytes: &[u8], named: &NamedTokens) -> Result<Tokenizer> {
    let model = Model::decode(bytes)
        .map_err(|e| ModelError::tokenizer(path, format!("a damaged SentencePiece model: {e}")))?;
    let count = model.pieces.len();
    if count > MAX_ID as usize {
        return Err(ModelError::tokenizer(path, "too many pieces"));
    }
    let trainer = model.trainer.unwrap_or_default();
    let normalizer = model.normalizer.unwrap_or_default();
    for (right, what) in [
        (trainer.model_type == 2, "BPE"),
        (trainer.byte_fallback, "byte fallback"),
        (!trainer.space_after, "spaces before their words"),
        (normalizer.escaped_spaces, "escaped spaces"),
        (!normalizer.fewer_spaces, "all spaces kept"),
        (
            normalizer.characters.is_empty(),
            "no replacement of characters",
        ),
    ] {
        if !right {
            return Err(ModelError::tokenizer(
                path,
                format!("a SentencePiece model with {what} is expected, as Llama 2 has it"),
            ));
        }
    }
    let id = |id: i32| match u32::try_from(id) {
        Err(_) => Ok(None),
        Ok(id) if (id as usize) < count => Ok(Some(id)),
        Ok(id) => Err(ModelError::tokenizer(
            path,
            format!("token {id} of {count} is a control token"),
        )),
    };
    let scores: Vec<f32> = model.pieces.iter().map(|piece| piece.score).collect();
    let kinds = model.pieces.iter().map(|piece| piece.kind.into()).collect();
    let tokens: Vec<String> = model.pieces.into_iter().map(|piece| piece.text).collect();
    let vocabulary = Vocabulary {
        path,
        tokens: &tokens,
        kinds,
        bos: id(trainer.bos)?,
        eos: id(trainer.eos)?,
        unknown: id(trainer.unknown)?,
    };
    let mut inner = vocabulary.sentence_piece(&scores, normalizer.space_first)?;
    inner
        .add_special_tokens(vocabulary.added(false))
        .map_err(|e| ModelError::tokenizer(path, e))?;
    named.add_to(&mut inner, path)?;
    let strip = usize::from(normalizer.space_first);
    let alphabet = Alphabet::SentencePiece;
    let mut known = vocabulary.known();
    known.extend(named.names());
    let mut this = Tokenizer::new(path, inner, alphabet, strip, &known)?;
    (this.bos, this.eos) = (vocabulary.bos, vocabulary.eos);
    named.finish(&mut this, true);
    Ok(this)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::read_model as read;

    fn varint(mut n: u64, out: &mut Vec<u8>) {
        while n >= 0x80 {
            out.push(n as u8 | 0x80);
            n >>= 7;
        }
        out.push(n as u8);
    }

    fn message(number: u64, bytes: &[u8], out: &mut Vec<u8>) {
        varint(number << 3 | 2, out);
        varint(bytes.len() as u64, out);
        out.extend(bytes);
    }

    fn numbers(settings: &[(u64, u64)]) -> Vec<u8> {
        let mut out = Vec::new();
        for (number, value) in settings {
            varint(number << 3, &mut out);
            varint(*value, &mut out);
        }
        out
    }

    /// `<unk> <s> </s>`, the bytes, and a few pieces.
    fn pieces(trainer: &[(u64, u64)], normalizer: &[(u64, u64)]) -> Vec<u8> {
        let mut out = Vec::new();
        let bytes = (0..=255).map(|b| (format!("<0x{b:02X}>"), 6));
        let normal = ["\u{2581}", "a", "b", "ab", "\u{2581}ab"].map(|t| (t.to_owned(), 1));
        let controls = [("<unk>", 2), ("<s>", 3), ("</s>", 3)].map(|(t, k)| (t.to_owned(), k));
        let all = controls.into_iter().chain(bytes).chain(normal);
        for (i, (text, kind)) in all.enumerate() {
            let mut piece = Vec::new();
            message(1, text.as_bytes(), &mut piece);
            piece.push(2 << 3 | 5);
            piece.extend((-(i as f32)).to_le_bytes());
            piece.extend(numbers(&[(3, kind)]));
            message(1, &piece, &mut out);
        }
        let trainer: Vec<_> = [(3, 2), (35, 1)].iter().chain(trainer).copied().collect();
        message(2, &numbers(&trainer), &mut out);
        let normalizer: Vec<_> = [(4, 0)].iter().chain(normalizer).copied().collect();
        message(3, &numbers(&normalizer), &mut out);
        out
    }

    #[test]
    fn pieces_become_ids() {
        let tokenizer = read(&pieces(&[], &[])).unwrap();
        let plain = crate::SpecialTokens::Plain;
        let ids = tokenizer.encode("ab b\n", plain).unwrap();
        assert_eq!(ids, [1, 263, 259, 261, 3 + 10]);
        assert_eq!(tokenizer.decode(&ids[1..], false), "ab b\n");
        assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(1), Some(2)));
        let without = read(&pieces(&[], &[(3, 0)])).unwrap();
        assert_eq!(without.encode_part("ab", plain).unwrap(), [262]);
        // A field of a later version of the format means nothing.
        let mut later = pieces(&[(99, 1)], &[]);
        message(77, b"later", &mut later);
        assert!(read(&later).is_ok());
    }

    #[test]
    fn other_and_damaged_sentence_piece_models() {
        for (what, bytes) in [
            ("unigram", pieces(&[(3, 1)], &[])),
            ("no byte fallback", pieces(&[(35, 0)], &[])),
            ("suffixes", pieces(&[(24, 1)], &[])),
            ("fewer spaces", pieces(&[], &[(4, 1)])),
            ("spaces as they are", pieces(&[], &[(5, 0)])),
            ("bos outside", pieces(&[(41, 9999)], &[])),
            ("no pieces but a tag", vec![0x0a]),
            ("a length beyond the file", vec![0x0a, 0xff, 0xff, 0x03, 1]),
            ("an endless number", [&[0x0a][..], &[0xff; 12]].concat()),
            ("a group", vec![0x0a, 0, 0x0b]),
            ("a name that is no text", vec![0x0a, 3, 0x0a, 1, 0xff]),
        ] {
            let found = read(&bytes);
            assert!(matches!(found, Err(ModelError::Tokenizer { .. })), "{what}");
        }
        let whole = pieces(&[], &[]);
        for cut in [1, whole.len() / 2, whole.len() - 1] {
            let found = read(&whole[..cut]);
            assert!(matches!(found, Err(ModelError::Tokenizer { .. })), "{cut}");
        }
    }
}
