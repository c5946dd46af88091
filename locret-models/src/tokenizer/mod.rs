//! Text to token ids and back.

mod alphabet;
mod check;
mod gguf;
mod json;
mod named;
mod ranks;
mod sentencepiece;
mod splits;
mod stream;
mod vocabulary;

pub(crate) use gguf::named_id;
pub(crate) use named::NamedTokens;
pub use stream::DecodeStream;

use crate::{ModelError, Result, files::json::read_bytes};
use alphabet::{Alphabet, ByteAlphabet};
use std::{
    collections::HashSet,
    fmt,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};
use tokenizers::{AddedToken, Tokenizer as Inner};

/// No vocabulary comes near this; a larger id is damage.
const MAX_ID: u32 = 1 << 22;
/// Ids that no token has: as many, and some for each token.
const MAX_UNUSED: u32 = 100_000;
/// Longer tokens of a SentencePiece vocabulary are never merged to: trying all their splits takes
/// quadratic time, and no real vocabulary has any.
const MAX_TOKEN: usize = 4096;
/// Tokens that end a turn in the chat formats of common models, or a text.
const END_OF_TURN: [&str; 6] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
];
/// How the word boundary is written in SentencePiece vocabularies.
const WORD_START: &str = "\u{2581}";

/// What the names of control tokens mean where they stand in a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SpecialTokens {
    /// Nothing: they are characters like any other. For text that is not one's own.
    Plain,
    /// The control tokens.
    Interpret,
}

/// A tokenizer: of a `tokenizer.json`, or of the vocabulary in a GGUF file.
pub struct Tokenizer {
    path: PathBuf,
    /// Knows control tokens.
    interpret: Inner,
    /// The same, but no text becomes a control token.
    plain: Inner,
    /// By id; `None` where the vocabulary has a gap.
    pieces: Vec<Option<Piece>>,
    controls: Vec<Control>,
    /// Spaces that are taken off the start of a decoded text.
    strip: usize,
    /// Put around a text: of a GGUF. (In a `tokenizer.json` the post-processor does it.)
    around: Around,
    bos: Option<u32>,
    eos: Option<u32>,
    eot: Vec<u32>,
}

/// What a token stands for.
#[derive(Debug, Clone)]
struct Piece {
    bytes: Box<[u8]>,
    special: bool,
}

/// A token that is a command to the model, not text.
#[derive(Debug, Clone)]
struct Control {
    id: u32,
    text: String,
    /// Takes the white space before it with it.
    lstrip: bool,
    /// Takes the white space after it with it.
    rstrip: bool,
    /// Is looked for in the normalised text.
    normalized: bool,
}

#[derive(Debug, Clone, Copy, Default)]
struct Around {
    bos: Option<u32>,
    eos: Option<u32>,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("path", &self.path)
            .field("vocab_size", &self.pieces.len())
            .field("controls", &self.controls.len())
            .finish()
    }
}

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
        Self::from_model(path.as_ref(), &NamedTokens::default())
    }

    /// The same, with tokens that are named beside it.
    fn from_model(path: &Path, named: &NamedTokens) -> Result<Self> {
        let bytes = read_bytes(path)?;
        // SentencePiece's files begin with the tag of their first piece, which base64 has not.
        if bytes.first() == Some(&0x0a) {
            sentencepiece::build(path, &bytes, named)
        } else {
            ranks::build(path, &bytes, named)
        }
    }

    fn new(
        path: &Path,
        interpret: Inner,
        alphabet: Alphabet,
        strip: usize,
        known_controls: &HashSet<&str>,
    ) -> Result<Self> {
        let added = interpret.get_added_tokens_decoder();
        let mut controls = Vec::new();
        let mut muted = Vec::new();
        for (&id, token) in &added {
            let shaped = token.content.starts_with("<|") && token.content.ends_with("|>");
            let known = known_controls.contains(token.content.as_str())
                || matches!(token.content.as_str(), "<s>" | "</s>" | "<unk>" | "<pad>");
            if !(token.special || shaped || known) {
                continue;
            }
            controls.push(Control {
                id,
                text: token.content.clone(),
                lstrip: token.lstrip,
                rstrip: token.rstrip,
                normalized: token.normalized,
            });
            muted.push(AddedToken {
                special: true,
                ..token.clone()
            });
        }
        controls.sort_by_key(|c| c.id);
        let mut plain = interpret.clone();
        plain
            .add_special_tokens(muted)
            .map_err(|e| ModelError::tokenizer(path, e))?;
        plain.set_encode_special_tokens(true);

        let vocab = interpret.get_vocab(true);
        let max = vocab.values().chain(added.keys()).max().copied();
        let most = MAX_ID.min(MAX_UNUSED + 8 * vocab.len() as u32);
        if max.is_some_and(|max| max > most) {
            return Err(ModelError::tokenizer(
                path,
                format!(
                    "ids up to {most} are expected of {} tokens, but there is {max:?}",
                    vocab.len()
                ),
            ));
        }
        let mut pieces = vec![None; max.map_or(0, |max| max as usize + 1)];
        let bytes = ByteAlphabet::new();
        for (text, id) in vocab {
            // An added token is what it says; a token of the model is spelled in its alphabet.
            let own = match added.get(&id) {
                Some(token) if alphabet == Alphabet::Bytes => token.content.clone().into_bytes(),
                _ => bytes.decode(&text, alphabet),
            };
            pieces[id as usize] = Some(Piece {
                bytes: own.into(),
                special: added.get(&id).is_some_and(|token| token.special),
            });
        }
        Ok(Self {
            path: path.to_path_buf(),
            interpret,
            plain,
            pieces,
            controls,
            strip,
            around: Around::default(),
            bos: None,
            eos: None,
            eot: Vec::new(),
        })
    }

    /// Token ids of a text, with what belongs around it: the beginning-of-text token, where the
    /// tokenizer's file asks for one.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`].
    pub fn encode(&self, text: &str, special: SpecialTokens) -> Result<Vec<u32>> {
        let mut ids = self.run(text, special, true)?;
        if let Some(bos) = self.around.bos {
            ids.insert(0, bos);
        }
        ids.extend(self.around.eos);
        Ok(ids)
    }

    /// Token ids of a part of a text: nothing is put around it.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`].
    pub fn encode_part(&self, text: &str, special: SpecialTokens) -> Result<Vec<u32>> {
        self.run(text, special, false)
    }

    fn run(&self, text: &str, special: SpecialTokens, around: bool) -> Result<Vec<u32>> {
        let inner = match special {
            SpecialTokens::Plain => &self.plain,
            SpecialTokens::Interpret => &self.interpret,
        };
        let encoding = guarded(&self.path, || inner.encode_fast(text, around))?;
        let ids = encoding.get_ids();
        // What is put around a text is named by the file, and need not be a token.
        if let Some(id) = ids.iter().find(|id| **id as usize >= self.pieces.len()) {
            return Err(ModelError::tokenizer(
                &self.path,
                format!("a text became token {id} of {}", self.pieces.len()),
            ));
        }
        Ok(ids.to_vec())
    }

    /// Token ids of a text in which control tokens count outside of the `literal` byte ranges only.
    ///
    /// The text between control tokens is encoded as one piece, so that a literal range does not
    /// change how its neighbourhood is split.
    pub(crate) fn encode_around(&self, text: &str, literal: &[Range<usize>]) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        let mut at = 0;
        for found in self.find_controls(text, literal) {
            let control = &self.controls[found.control];
            let (start, end) = (found.bytes.start, found.bytes.end);
            if start < at {
                continue;
            }
            let mut before = &text[at..start];
            if control.lstrip {
                before = before.trim_end();
            }
            if !before.is_empty() {
                ids.extend(self.run(before, SpecialTokens::Plain, false)?);
            }
            ids.push(control.id);
            at = end;
            if control.rstrip {
                at = text.len() - text[end..].trim_start().len();
            }
        }
        if at < text.len() {
            ids.extend(self.run(&text[at..], SpecialTokens::Plain, false)?);
        }
        Ok(ids)
    }

    /// The names of control tokens in a text outside of `literal` ranges (sorted, apart): leftmost
    /// first, of several at one place the longest.
    pub(crate) fn find_controls(&self, text: &str, literal: &[Range<usize>]) -> Vec<Found> {
        let mut found = Vec::new();
        let mut from = 0;
        let ends = literal.iter().map(|r| (r.start, r.end));
        for (start, end) in ends.chain([(text.len(), text.len())]) {
            let part = &text[from..start];
            for (control, token) in self.controls.iter().enumerate() {
                for (at, _) in part.match_indices(&token.text) {
                    let at = from + at;
                    found.push(Found {
                        control,
                        bytes: at..at + token.text.len(),
                    });
                }
            }
            from = end;
        }
        found.sort_by_key(|f| (f.bytes.start, std::cmp::Reverse(f.bytes.end)));
        let mut end = 0;
        found.retain(|f| {
            let free = f.bytes.start >= end;
            if free {
                end = f.bytes.end;
            }
            free
        });
        found
    }

    /// Whether control tokens are looked for in the normalised text, so that other characters than
    /// their names' may become them.
    pub(crate) fn normalizes_controls(&self) -> bool {
        self.interpret.get_normalizer().is_some() && self.controls.iter().any(|c| c.normalized)
    }

    /// The names of control tokens.
    pub(crate) fn control_names(&self) -> impl Iterator<Item = &str> {
        self.controls.iter().map(|c| c.text.as_str())
    }

    /// One more than the largest id. (A model's embedding may have more rows: padding.)
    pub fn vocab_size(&self) -> usize {
        self.pieces.len()
    }

    /// The id of a token by its name in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.interpret.token_to_id(token)
    }

    /// The name of a token in the vocabulary.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.interpret.id_to_token(id)
    }

    /// The beginning-of-text token.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The end-of-text token.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// All tokens that end a turn: those of the model's configuration, the tokenizer's own, and
    /// the control tokens that chat formats are known to end turns with. Sorted.
    pub fn end_of_turn(&self, configured: &[u32]) -> Vec<u32> {
        let known = self
            .controls
            .iter()
            .filter(|c| END_OF_TURN.contains(&c.text.as_str()))
            .map(|c| c.id);
        let mut ids: Vec<u32> = configured
            .iter()
            .copied()
            .chain(self.eos)
            .chain(self.eot.iter().copied())
            .chain(known)
            .collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }
}

/// A control token's name in a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    control: usize,
    pub(crate) bytes: Range<usize>,
}

/// Runs code of the tokenizers crate, some of which panics on damaged files.
fn guarded<T>(
    path: &Path,
    run: impl FnOnce() -> std::result::Result<T, tokenizers::Error>,
) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(e)) => Err(ModelError::tokenizer(path, e)),
        Err(_) => Err(ModelError::tokenizer(path, "the file is damaged")),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{Array, Gguf, Value as Meta, files::json, gguf_file::File};
    use proptest::prelude::*;
    use serde_json::Value as Json;
    use std::{fs, sync::LazyLock};

    /// Bytes, a few merges, and control tokens as chat models have them.
    pub(crate) fn byte_level_file(pre: &str) -> File {
        let alphabet = ByteAlphabet::new();
        let mut letters: Vec<(u8, char)> = alphabet.0.iter().map(|(&c, &b)| (b, c)).collect();
        letters.sort_unstable();
        let mut tokens: Vec<String> = letters.iter().map(|(_, c)| c.to_string()).collect();
        let mut kinds = vec![1; tokens.len()];
        let merges = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2", "12 3"];
        for merge in merges {
            tokens.push(merge.replace(' ', ""));
            kinds.push(1);
        }
        for control in ["<|bos|>", "<|im_start|>", "<|im_end|>"] {
            tokens.push(control.into());
            kinds.push(3);
        }
        tokens.push("<|user_defined|>".into());
        tokens.push("<b>".into());
        kinds.extend([4, 4]);
        let id = |text: &str| tokens.iter().position(|t| t == text).unwrap() as u32;
        let (bos, eos) = (id("<|bos|>"), id("<|im_end|>"));
        File::default()
            .meta("tokenizer.ggml.model", Meta::String("gpt2".into()))
            .meta("tokenizer.ggml.pre", Meta::String(pre.into()))
            .meta("tokenizer.ggml.tokens", Meta::Array(Array::String(tokens)))
            .meta("tokenizer.ggml.token_type", Meta::Array(Array::I32(kinds)))
            .meta(
                "tokenizer.ggml.merges",
                Meta::Array(Array::String(merges.map(String::from).to_vec())),
            )
            .meta("tokenizer.ggml.bos_token_id", Meta::U32(bos))
            .meta("tokenizer.ggml.eos_token_id", Meta::U32(eos))
    }

    pub(crate) fn build(file: &File) -> Result<Tokenizer> {
        let file = file.write();
        Tokenizer::from_gguf(&Gguf::open(file.path()).unwrap())
    }

    pub(super) fn read_model(bytes: &[u8]) -> Result<Tokenizer> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.model");
        fs::write(&path, bytes).unwrap();
        Tokenizer::from_model_file(&path)
    }

    pub(super) static BYTE_LEVEL: LazyLock<Tokenizer> =
        LazyLock::new(|| build(&byte_level_file("gpt-2")).unwrap());

    pub(super) fn golden(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/golden/sentencepiece")
            .join(name)
    }

    pub(super) static SENTENCE_PIECE: LazyLock<Tokenizer> = LazyLock::new(|| {
        Tokenizer::from_gguf(&Gguf::open(golden("vocabulary.gguf")).unwrap()).unwrap()
    });

    pub(super) fn names(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
        ids.iter()
            .map(|&id| tokenizer.id_to_token(id).unwrap())
            .collect()
    }

    #[test]
    fn control_tokens_count_only_if_asked() {
        let tokenizer = &*BYTE_LEVEL;
        for text in [
            "<|im_end|>",
            "a<|im_start|>b",
            "<|user_defined|>",
            "<|bos|>",
        ] {
            let plain = tokenizer.encode(text, SpecialTokens::Plain).unwrap();
            assert!(plain.iter().all(|&id| id < 263), "{text}: {plain:?}");
            let special = tokenizer.encode(text, SpecialTokens::Interpret).unwrap();
            assert_eq!(special.iter().filter(|&&id| id >= 263).count(), 1, "{text}");
            for ids in [plain, special] {
                assert_eq!(tokenizer.decode(&ids, false), text);
            }
        }
        // Not a command but text that the vocabulary has as a whole.
        let bold = tokenizer.token_to_id("<b>").unwrap();
        for special in [SpecialTokens::Plain, SpecialTokens::Interpret] {
            assert_eq!(tokenizer.encode("<b>", special).unwrap(), [bold]);
        }
        let ids = tokenizer.encode("a<|im_end|>b", SpecialTokens::Interpret);
        assert_eq!(tokenizer.decode(&ids.unwrap(), true), "ab");
    }

    #[test]
    fn literal_ranges() {
        let tokenizer = &*BYTE_LEVEL;
        let text = "<|im_start|>hello<|im_end|> hello<|im_end|>";
        let literal = 12..33;
        assert_eq!(&text[literal.clone()], "hello<|im_end|> hello");
        let ids = tokenizer.encode_around(text, std::slice::from_ref(&literal));
        let ids = ids.unwrap();
        let found = names(tokenizer, &ids);
        assert_eq!(found[0], "<|im_start|>");
        assert_eq!(found[found.len() - 2..], ["Ġhello", "<|im_end|>"]);
        assert_eq!(found.iter().filter(|t| *t == "<|im_end|>").count(), 1);
        assert_eq!(tokenizer.decode(&ids, false), text);
        // A name that reaches into a literal range does not count.
        let straddling = tokenizer.encode_around("<|im_end|>", &[3..5]).unwrap();
        assert_eq!(
            straddling,
            tokenizer
                .encode("<|im_end|>", SpecialTokens::Plain)
                .unwrap()
        );
        for text in ["", "plain", text] {
            assert_eq!(
                tokenizer.encode_around(text, &[]).unwrap(),
                tokenizer.encode(text, SpecialTokens::Interpret).unwrap()
            );
        }
    }

    #[test]
    fn ends_of_turns() {
        let tokenizer = &*BYTE_LEVEL;
        let end = tokenizer.token_to_id("<|im_end|>").unwrap();
        assert_eq!(tokenizer.eos(), Some(end));
        assert_eq!(tokenizer.bos(), tokenizer.token_to_id("<|bos|>"));
        assert_eq!(tokenizer.end_of_turn(&[]), [end]);
        assert_eq!(tokenizer.end_of_turn(&[7, end, 3]), [3, 7, end]);
        let file = byte_level_file("gpt-2").meta("tokenizer.ggml.eot_token_id", Meta::U32(9));
        assert_eq!(build(&file).unwrap().end_of_turn(&[]), [9, end]);
        let ids = [end, u32::MAX, tokenizer.token_to_id("a").unwrap()];
        assert_eq!(tokenizer.decode(&ids, true), "a");
        assert_eq!(tokenizer.decode(&ids, false), "<|im_end|>a");
        assert_eq!(tokenizer.vocab_size(), 268);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        #[test]
        fn any_text_survives(text in any::<String>(), known in "[hello<|im_end> 123]{0,20}") {
            for text in [text, known] {
                for special in [SpecialTokens::Plain, SpecialTokens::Interpret] {
                    let ids = BYTE_LEVEL.encode(&text, special).unwrap();
                    prop_assert_eq!(&BYTE_LEVEL.decode(&ids, false), &text);
                }
                let ids = SENTENCE_PIECE.encode_part(&text, SpecialTokens::Plain).unwrap();
                // What spells a space comes back as one.
                let expected = text.replace(WORD_START, " ");
                prop_assert_eq!(&SENTENCE_PIECE.decode(&ids, false), &expected);
            }
        }
    }

    #[test]
    fn sentence_piece_agrees_with_its_reference() {
        let folder = tempfile::tempdir().unwrap();
        fs::copy(
            golden("tokenizer.json"),
            folder.path().join("tokenizer.json"),
        )
        .unwrap();
        let published = Tokenizer::from_dir(folder.path()).unwrap();
        let golden: Json = json::read(&golden("golden.json")).unwrap();
        for case in golden["texts"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
            for tokenizer in [&*SENTENCE_PIECE, &published] {
                let found = tokenizer.encode_part(text, SpecialTokens::Plain).unwrap();
                assert_eq!(found, ids, "{text:?}");
                assert_eq!(tokenizer.decode(&ids, false), case["decoded"], "{text:?}");
                let around = tokenizer.encode(text, SpecialTokens::Plain).unwrap();
                assert_eq!(around, [&[1], &ids[..]].concat(), "{text:?}");
            }
        }
        assert_eq!(published.vocab_size(), SENTENCE_PIECE.vocab_size());
        let special = published.encode_part("a</s>", SpecialTokens::Interpret);
        assert_eq!(special.unwrap().last(), Some(&2));
    }
}
