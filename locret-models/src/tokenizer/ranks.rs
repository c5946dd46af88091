//! Llama 3's vocabulary as Meta published it: byte strings in the order of their ranks.

use super::{
    Alphabet, ByteAlphabet, Inner, MAX_ID, MAX_TOKEN, NamedTokens, Tokenizer, guarded,
    splits::Splitting,
};
use crate::{ModelError, Result};
use base64::{Engine, prelude::BASE64_STANDARD};
use std::{
    collections::{HashMap, HashSet},
    path::Path,
};
use tokenizers::{
    AddedToken,
    models::bpe::{BPE, Merges, Vocab},
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

/// The tokenizer of a file of ranks.
pub(super) fn build(path: &Path, bytes: &[u8], named: &NamedTokens) -> Result<Tokenizer> {
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
        let token = BASE64_STANDARD
            .decode(token)
            .map_err(|_| damaged(at, "the token is not base64"))?;
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
    Splitting::LLAMA3.apply(path, &mut inner)?;
    let reserved = (2..).map(|i| format!("<|reserved_special_token_{i}|>"));
    let controls = LLAMA3_NAMED.map(String::from).into_iter().chain(reserved);
    let controls = controls.take(LLAMA3_CONTROLS);
    let added = controls.map(|name| AddedToken::from(name, true).normalized(false));
    inner
        .add_special_tokens(added.collect::<Vec<_>>())
        .map_err(|e| ModelError::tokenizer(path, e))?;
    named.add_to(&mut inner, path)?;
    let known: HashSet<&str> = named.names().collect();
    let mut this = Tokenizer::new(path, inner, Alphabet::Bytes, 0, &known)?;
    let id = |name: &str| this.token_to_id(name);
    (this.bos, this.eos) = (id(LLAMA3_NAMED[0]), id(LLAMA3_NAMED[1]));
    named.finish(&mut this, true);
    Ok(this)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::read_model as read;

    fn ranks(tokens: &[Vec<u8>]) -> String {
        let lines = tokens.iter().enumerate();
        lines
            .map(|(rank, token)| format!("{} {rank}\n", BASE64_STANDARD.encode(token)))
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
}
