//! `tokenizer.model`: the vocabularies as Meta published them, Llama 2's in SentencePiece's format,
//! Llama 3's as a list of byte strings in the order of their ranks.

use super::{
    Alphabet, Around, ByteAlphabet, Inner, LLAMA3_SPLIT, MAX_ID, MAX_TOKEN, Tokenizer, Vocabulary,
    guarded, kind,
};
use crate::{ModelError, Result, json};
use std::{
    collections::{HashMap, HashSet},
    path::Path,
};
use tokenizers::{
    AddedToken,
    models::bpe::{BPE, Merges, Vocab},
    pre_tokenizers::{
        byte_level::ByteLevel,
        sequence::Sequence as PreTokenizers,
        split::{Split, SplitPattern},
    },
    tokenizer::SplitDelimiterBehavior,
};

/// Llama 3's control tokens that have a meaning, in the order of their ids after the last rank.
const LLAMA3_NAMED: [&str; 12] = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
];
/// All of Llama 3's control tokens.
const LLAMA3_CONTROLS: usize = 256;

impl Tokenizer {
    /// Reads a `tokenizer.model` as Meta published it: SentencePiece BPE with byte fallback
    /// (Llama 2), or the ranks of byte strings (Llama 3; a line for each, base64 and rank, with
    /// Llama 3's splitting rule and its 256 control tokens after the last rank).
    ///
    /// As their own code does, a text begins with the beginning-of-text token.
    ///
    /// # Errors
    /// [`ModelError::Io`]; [`ModelError::Tokenizer`] for a damaged file, and for a SentencePiece
    /// model of another kind.
    pub fn from_model_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = json::read_bytes(path)?;
        // SentencePiece's files begin with the tag of their first piece, which base64 has not.
        if bytes.first() == Some(&0x0a) {
            SentencePiece::parse(path, &bytes)?.build(path)
        } else {
            from_ranks(path, &bytes)
        }
    }
}

/// Splits text as Llama 3 does before merging.
pub(super) fn split_as_llama3(path: &Path, inner: &mut Inner) -> Result<()> {
    let split = Split::new(
        SplitPattern::Regex(LLAMA3_SPLIT.into()),
        SplitDelimiterBehavior::Isolated,
        false,
    )
    .map_err(|e| ModelError::tokenizer(path, e))?;
    inner.with_pre_tokenizer(Some(PreTokenizers::new(vec![
        split.into(),
        ByteLevel::new(false, true, false).into(),
    ])));
    Ok(())
}

fn from_ranks(path: &Path, bytes: &[u8]) -> Result<Tokenizer> {
    let damaged =
        |line: usize, what: &str| ModelError::tokenizer(path, format!("line {}: {what}", line + 1));
    let text = std::str::from_utf8(bytes)
        .map_err(|_| ModelError::tokenizer(path, "neither SentencePiece's format nor text"))?;
    let mut tokens: Vec<Vec<u8>> = Vec::new();
    for (at, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let mut words = line.split_ascii_whitespace();
        let (Some(token), Some(rank), None) = (words.next(), words.next(), words.next()) else {
            return Err(damaged(at, "expected a token and its rank"));
        };
        let token = base64(token).ok_or_else(|| damaged(at, "the token is not base64"))?;
        if token.is_empty() || token.len() > MAX_TOKEN {
            return Err(damaged(at, "a token of no bytes, or of very many"));
        }
        if rank.parse() != Ok(tokens.len()) || tokens.len() >= MAX_ID as usize {
            return Err(damaged(at, "ranks have to count up from 0"));
        }
        tokens.push(token);
    }
    let ranks: HashMap<&[u8], usize> = (tokens.iter().enumerate())
        .map(|(rank, token)| (token.as_slice(), rank))
        .collect();
    if ranks.len() != tokens.len() {
        return Err(ModelError::tokenizer(path, "a token occurs twice"));
    }
    if let Some(byte) = (0..=255u8).find(|b| !ranks.contains_key(&[*b][..])) {
        return Err(ModelError::tokenizer(
            path,
            format!("there is no token of the single byte {byte:#04x}"),
        ));
    }
    let letters = ByteAlphabet::new().letters();
    let spell = |bytes: &[u8]| -> String { bytes.iter().map(|b| letters[*b as usize]).collect() };
    let mut merges = Merges::new();
    for token in &tokens {
        // A token may arise from any two; the ranks of the parts decide between them.
        let mut pairs: Vec<(usize, usize, usize)> = (1..token.len())
            .filter_map(|at| {
                let (a, b) = token.split_at(at);
                Some((*ranks.get(a)?, *ranks.get(b)?, at))
            })
            .collect();
        pairs.sort_unstable();
        let spelled = |at: usize| (spell(&token[..at]), spell(&token[at..]));
        merges.extend(pairs.into_iter().map(|(_, _, at)| spelled(at)));
    }
    let vocab: Vocab = (tokens.iter().enumerate())
        .map(|(rank, token)| (spell(token), rank as u32))
        .collect();
    let model = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .ignore_merges(true);
    let model = guarded(path, || model.build())?;
    let mut inner = Inner::new(model);
    split_as_llama3(path, &mut inner)?;
    let reserved = (2..).map(|i| format!("<|reserved_special_token_{i}|>"));
    let controls = LLAMA3_NAMED.map(String::from).into_iter().chain(reserved);
    let controls = controls.take(LLAMA3_CONTROLS);
    let added = controls.map(|name| AddedToken::from(name, true).normalized(false));
    inner
        .add_special_tokens(added.collect::<Vec<_>>())
        .map_err(|e| ModelError::tokenizer(path, e))?;
    let mut this = Tokenizer::new(path, inner, Alphabet::Bytes, 0, &HashSet::new())?;
    let id = |name: &str| this.token_to_id(name);
    (this.bos, this.eos) = (id(LLAMA3_NAMED[0]), id(LLAMA3_NAMED[1]));
    this.around = Around {
        bos: this.bos,
        eos: None,
    };
    Ok(this)
}

/// Standard base64 with padding.
fn base64(text: &str) -> Option<Vec<u8>> {
    let body = text.trim_end_matches('=');
    if !text.len().is_multiple_of(4) || text.len() - body.len() > 2 {
        return None;
    }
    let mut out = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut have) = (0u32, 0);
    for c in body.bytes() {
        let digit = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(digit);
        have += 6;
        if have >= 8 {
            have -= 8;
            out.push((bits >> have) as u8);
            bits &= (1 << have) - 1;
        }
    }
    (bits == 0).then_some(out)
}

/// What a SentencePiece model says. Fields that a file leaves out have the format's defaults.
#[derive(Debug)]
struct SentencePiece {
    tokens: Vec<String>,
    scores: Vec<f32>,
    kinds: Vec<i64>,
    /// 1 unigram, 2 BPE, 3 words, 4 characters.
    model_type: u64,
    byte_fallback: bool,
    space_after: bool,
    unknown: i64,
    bos: i64,
    eos: i64,
    space_first: bool,
    fewer_spaces: bool,
    escaped_spaces: bool,
    /// Replacements of characters.
    characters: bool,
}

/// One field of a protocol buffer.
enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    Bits32(u32),
}

/// The first `n` bytes, which are taken off.
fn take<'a>(bytes: &mut &'a [u8], n: usize) -> Option<&'a [u8]> {
    let (taken, rest) = bytes.split_at_checked(n)?;
    *bytes = rest;
    Some(taken)
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for i in 0..10 {
        let byte = take(bytes, 1)?[0];
        value |= u64::from(byte & 0x7f) << (7 * i);
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn field<'a>(bytes: &mut &'a [u8]) -> Option<(u64, Field<'a>)> {
    let tag = varint(bytes)?;
    let field = match tag & 7 {
        0 => Field::Number(varint(bytes)?),
        1 => Field::Bytes(take(bytes, 8)?),
        2 => {
            let n = varint(bytes)?;
            Field::Bytes(take(bytes, usize::try_from(n).ok()?)?)
        }
        5 => Field::Bits32(u32::from_le_bytes(take(bytes, 4)?.try_into().ok()?)),
        _ => return None,
    };
    Some((tag >> 3, field))
}

/// Reads the fields of a protocol buffer; `None` comes last if it is damaged.
fn fields(mut bytes: &[u8]) -> impl Iterator<Item = Option<(u64, Field<'_>)>> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let found = field(&mut bytes);
        if found.is_none() {
            bytes = &[];
        }
        Some(found)
    })
}

impl SentencePiece {
    fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let damaged = || ModelError::tokenizer(path, "a damaged SentencePiece model");
        let mut this = Self {
            tokens: Vec::new(),
            scores: Vec::new(),
            kinds: Vec::new(),
            model_type: 1,
            byte_fallback: false,
            space_after: false,
            unknown: 0,
            bos: 1,
            eos: 2,
            space_first: true,
            fewer_spaces: true,
            escaped_spaces: true,
            characters: false,
        };
        for part in fields(bytes) {
            match part.ok_or_else(damaged)? {
                (1, Field::Bytes(piece)) => this.piece(piece).ok_or_else(damaged)?,
                (2, Field::Bytes(trainer)) => {
                    for setting in fields(trainer) {
                        match setting.ok_or_else(damaged)? {
                            (3, Field::Number(n)) => this.model_type = n,
                            (24, Field::Number(n)) => this.space_after = n != 0,
                            (35, Field::Number(n)) => this.byte_fallback = n != 0,
                            (40, Field::Number(n)) => this.unknown = n as i64,
                            (41, Field::Number(n)) => this.bos = n as i64,
                            (42, Field::Number(n)) => this.eos = n as i64,
                            _ => {}
                        }
                    }
                }
                (3, Field::Bytes(normalizer)) => {
                    for setting in fields(normalizer) {
                        match setting.ok_or_else(damaged)? {
                            (2, Field::Bytes(map)) => this.characters = !map.is_empty(),
                            (3, Field::Number(n)) => this.space_first = n != 0,
                            (4, Field::Number(n)) => this.fewer_spaces = n != 0,
                            (5, Field::Number(n)) => this.escaped_spaces = n != 0,
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        if this.tokens.len() > MAX_ID as usize {
            return Err(ModelError::tokenizer(path, "too many pieces"));
        }
        Ok(this)
    }

    fn piece(&mut self, bytes: &[u8]) -> Option<()> {
        let (mut text, mut score, mut kind) = (String::new(), 0.0, kind::NORMAL);
        for field in fields(bytes) {
            match field? {
                (1, Field::Bytes(bytes)) => text = std::str::from_utf8(bytes).ok()?.to_owned(),
                (2, Field::Bits32(bits)) => score = f32::from_bits(bits),
                (3, Field::Number(n)) => kind = i64::try_from(n).ok()?,
                _ => {}
            }
        }
        self.tokens.push(text);
        self.scores.push(score);
        self.kinds.push(kind);
        Some(())
    }

    fn build(&self, path: &Path) -> Result<Tokenizer> {
        for (right, what) in [
            (self.model_type == 2, "BPE"),
            (self.byte_fallback, "byte fallback"),
            (!self.space_after, "spaces before their words"),
            (self.escaped_spaces, "escaped spaces"),
            (!self.fewer_spaces, "all spaces kept"),
            (!self.characters, "no replacement of characters"),
        ] {
            if !right {
                return Err(ModelError::tokenizer(
                    path,
                    format!("a SentencePiece model with {what} is expected, as Llama 2 has it"),
                ));
            }
        }
        let id = |id: i64| -> Result<Option<u32>> {
            match usize::try_from(id) {
                Err(_) => Ok(None),
                Ok(i) if i < self.tokens.len() => Ok(Some(i as u32)),
                Ok(i) => Err(ModelError::tokenizer(
                    path,
                    format!("token {i} of {} is a control token", self.tokens.len()),
                )),
            }
        };
        let vocabulary = Vocabulary {
            path,
            tokens: &self.tokens,
            kinds: (&self.kinds).into(),
            bos: id(self.bos)?,
            eos: id(self.eos)?,
            unknown: id(self.unknown)?,
        };
        let mut inner = vocabulary.sentence_piece(&self.scores, self.space_first)?;
        inner
            .add_special_tokens(vocabulary.added(false))
            .map_err(|e| ModelError::tokenizer(path, e))?;
        let strip = usize::from(self.space_first);
        let alphabet = Alphabet::SentencePiece;
        let mut this = Tokenizer::new(path, inner, alphabet, strip, &vocabulary.known())?;
        (this.bos, this.eos) = (vocabulary.bos, vocabulary.eos);
        this.around = Around {
            bos: this.bos,
            eos: None,
        };
        Ok(this)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

    fn encoded(bytes: &[u8]) -> String {
        let mut out = String::new();
        for three in bytes.chunks(3) {
            let mut group = [0; 3];
            group[..three.len()].copy_from_slice(three);
            let bits = u32::from_be_bytes([0, group[0], group[1], group[2]]);
            for i in 0..4 {
                let digit = DIGITS[(bits >> (18 - 6 * i) & 63) as usize];
                out.push(if i > three.len() { '=' } else { digit.into() });
            }
        }
        out
    }

    fn read(bytes: &[u8]) -> Result<Tokenizer> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.model");
        fs::write(&path, bytes).unwrap();
        Tokenizer::from_model_file(&path)
    }

    fn ranks(tokens: &[Vec<u8>]) -> String {
        let lines = tokens.iter().enumerate();
        lines
            .map(|(rank, token)| format!("{} {rank}\n", encoded(token)))
            .collect()
    }

    fn some_ranks() -> Vec<Vec<u8>> {
        let more = ["he", "ll", "hell", "hello", " hello"].map(|t| t.as_bytes().to_vec());
        (0..=255u8).map(|b| vec![b]).chain(more).collect()
    }

    #[test]
    fn ranks_become_ids() {
        let tokenizer = read(ranks(&some_ranks()).as_bytes()).unwrap();
        assert_eq!(tokenizer.vocab_size(), 261 + 256);
        let plain = crate::SpecialTokens::Plain;
        let ids = tokenizer.encode("hello hello\u{e9}", plain).unwrap();
        assert_eq!(ids, [261, 259, 260, 0xc3, 0xa9]);
        assert_eq!(tokenizer.decode(&ids[1..], false), "hello hello\u{e9}");
        let interpret = crate::SpecialTokens::Interpret;
        let ids = tokenizer.encode_part("<|eot_id|>", interpret).unwrap();
        assert_eq!(ids, [261 + 9]);
        assert_eq!(tokenizer.end_of_turn(&[]), [262, 269, 270]);
        let last = tokenizer.id_to_token(261 + 255).unwrap();
        assert_eq!(last, "<|reserved_special_token_245|>");
        assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(261), Some(262)));
    }

    #[test]
    fn damaged_ranks() {
        let good = some_ranks();
        let twice: Vec<Vec<u8>> = good.iter().chain(&good[..1]).cloned().collect();
        let long: Vec<Vec<u8>> = (good.iter().cloned())
            .chain([vec![b'a'; MAX_TOKEN + 1]])
            .collect();
        for (what, text) in [
            ("nothing", String::new()),
            ("no byte 0xff", ranks(&good[..255])),
            ("a token twice", ranks(&twice)),
            ("a long token", ranks(&long)),
            ("a gap", ranks(&good).replace(" 7\n", " 8\n")),
            ("no rank", ranks(&good).replace(" 7\n", "\n")),
            ("a third word", ranks(&good).replace(" 7\n", " 7 7\n")),
            ("no base64", ranks(&good).replace(" 7\n", "! 7\n")),
            (
                "bits left over",
                ranks(&good).replace("AA== 0\n", "AB== 0\n"),
            ),
            ("a negative rank", ranks(&good).replace(" 7\n", " -7\n")),
        ] {
            let found = read(text.as_bytes());
            assert!(matches!(found, Err(ModelError::Tokenizer { .. })), "{what}");
        }
        let binary = read(b"\xff\xfe\x00");
        assert!(matches!(binary, Err(ModelError::Tokenizer { .. })));
        assert!(matches!(
            Tokenizer::from_model_file("/none/tokenizer.model"),
            Err(ModelError::Io { .. })
        ));
    }

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
