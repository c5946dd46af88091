//! Text to token ids and back.

mod model_file;

use crate::{Array, Gguf, ModelError, Result, Value, json};
use serde_json::Value as Json;
use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
    fmt,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};
use tokenizers::{
    AddedToken, Tokenizer as Inner,
    models::bpe::{BPE, Merges, Vocab},
    normalizers::{Prepend, Replace, Sequence as Normalizers},
    pre_tokenizers::{byte_level::ByteLevel, digits::Digits, sequence::Sequence as PreTokenizers},
};

/// No vocabulary comes near this; a larger id is damage.
const MAX_ID: u32 = 1 << 24;
/// Longer tokens of a SentencePiece vocabulary are never merged to: trying all their splits takes
/// quadratic time, and no real vocabulary has any.
const MAX_TOKEN: usize = 4096;
/// Tokens that end a turn in the chat formats of common models.
const END_OF_TURN: [&str; 4] = ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>"];
/// How the word boundary is written in SentencePiece vocabularies.
const WORD_START: &str = "\u{2581}";

/// How Llama 3 splits text before merging: contractions, words with one leading character, up to
/// three digits, punctuation, line breaks, spaces.
const LLAMA3_SPLIT: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    r"|[^\r\n\p{L}\p{N}]?\p{L}+",
    r"|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"|\s*[\r\n]+",
    r"|\s+(?!\S)",
    r"|\s+"
);

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

/// How tokens become bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Alphabet {
    /// Every character is a byte, as in GPT-2.
    Bytes,
    /// Characters, `▁` for spaces, `<0x0A>` for single bytes.
    SentencePiece,
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
    /// Reads `tokenizer.json`, and `tokenizer_config.json` if it is there, of a model folder; a
    /// `tokenizer.model` ([`from_model_file`](Self::from_model_file)) where there is none.
    ///
    /// # Errors
    /// [`ModelError::Io`], [`ModelError::Json`]; [`ModelError::Tokenizer`] for a tokenizer that is
    /// damaged, or whose decoder is of a kind that no causal language model of today uses.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let (file, model) = (dir.join("tokenizer.json"), dir.join("tokenizer.model"));
        if !file.exists() && model.exists() {
            return Self::from_model_file(model);
        }
        let config: Option<Json> = json::read_optional(&dir.join("tokenizer_config.json"))?;
        let named = |key: &str| {
            let token = config.as_ref()?.get(key)?;
            let text = token.as_str().or_else(|| token.get("content")?.as_str())?;
            Some(text.to_owned())
        };
        let names = [
            named("bos_token"),
            named("eos_token"),
            named("unk_token"),
            named("pad_token"),
        ];
        Self::from_json(&file, names)
    }

    /// `names`: the beginning, end, unknown and padding token.
    fn from_json(path: &Path, names: [Option<String>; 4]) -> Result<Self> {
        let bytes = json::read_bytes(path)?;
        let mut inner = guarded(path, || Inner::from_bytes(&bytes))?;
        // A prompt is never cut or filled up in silence.
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|e| ModelError::tokenizer(path, e))?;
        let decoder = inner
            .get_decoder()
            .map(serde_json::to_value)
            .transpose()
            .map_err(|e| ModelError::tokenizer(path, e))?;
        let (alphabet, strip) = alphabet(path, decoder.as_ref())?;
        let known: HashSet<&str> = names.iter().flatten().map(String::as_str).collect();
        let mut this = Self::new(path, inner, alphabet, strip, &known)?;
        let id = |name: &Option<String>| this.token_to_id(name.as_deref()?);
        (this.bos, this.eos) = (id(&names[0]), id(&names[1]));
        Ok(this)
    }

    /// Builds the tokenizer that a GGUF file describes: byte-level BPE (`gpt2`, splitting as
    /// `gpt-2`, `smollm` or `llama-bpe` do), or SentencePiece BPE (`llama`).
    ///
    /// # Errors
    /// [`ModelError::Config`] for a missing key, or a model or splitting rule that is not
    /// supported; [`ModelError::Tokenizer`] for lists that don't fit together.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        Vocabulary::read(gguf)?.build(gguf)
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
        if max.is_some_and(|max| max > MAX_ID) {
            return Err(ModelError::tokenizer(
                path,
                format!("token ids up to {MAX_ID} are expected, but there is {max:?}"),
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
        Ok(encoding.get_ids().to_vec())
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

    /// Whether an id is a special token, one that `skip_special` leaves out.
    pub fn is_special(&self, id: u32) -> bool {
        self.pieces
            .get(id as usize)
            .is_some_and(|piece| piece.as_ref().is_some_and(|p| p.special))
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

/// How a `tokenizer.json` decodes: its alphabet, and the spaces to take off the start.
fn alphabet(path: &Path, decoder: Option<&Json>) -> Result<(Alphabet, usize)> {
    let unsupported = |what: &Json| {
        Err(ModelError::tokenizer(
            path,
            format!("the decoder {what} is not supported; byte-level and SentencePiece ones are"),
        ))
    };
    let Some(decoder) = decoder else {
        return unsupported(&Json::Null);
    };
    let steps = match decoder["type"].as_str() {
        Some("Sequence") => decoder["decoders"].as_array().cloned().unwrap_or_default(),
        _ => vec![decoder.clone()],
    };
    let mut alphabet = None;
    let mut strip = 0;
    for step in &steps {
        match step["type"].as_str() {
            Some("ByteLevel") if steps.len() == 1 => alphabet = Some(Alphabet::Bytes),
            Some("Replace")
                if step["pattern"]["String"] == WORD_START && step["content"] == " " =>
            {
                alphabet = Some(Alphabet::SentencePiece);
            }
            Some("Metaspace") if step["replacement"] == WORD_START => {
                alphabet = Some(Alphabet::SentencePiece);
                strip = usize::from(step["prepend_scheme"] != "never");
            }
            Some("Strip") if step["content"] == " " && step["stop"] == 0 => {
                strip = step["start"].as_u64().map_or(0, |n| n.min(8) as usize);
            }
            Some("ByteFallback" | "Fuse") => {}
            _ => return unsupported(decoder),
        }
    }
    match alphabet {
        Some(alphabet) => Ok((alphabet, strip)),
        None => unsupported(decoder),
    }
}

/// The 256 characters that byte-level vocabularies spell bytes with: printable ones of Latin-1 for
/// themselves, the others moved up from U+0100 on in order.
struct ByteAlphabet(HashMap<char, u8>);

impl ByteAlphabet {
    fn new() -> Self {
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
    fn letters(&self) -> [char; 256] {
        let mut letters = ['\0'; 256];
        for (&letter, &byte) in &self.0 {
            letters[byte as usize] = letter;
        }
        letters
    }

    fn decode(&self, token: &str, alphabet: Alphabet) -> Vec<u8> {
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

/// Kinds of tokens in a GGUF file.
mod kind {
    pub(super) const NORMAL: i64 = 1;
    pub(super) const UNKNOWN: i64 = 2;
    pub(super) const CONTROL: i64 = 3;
    pub(super) const USER_DEFINED: i64 = 4;
}

/// The vocabulary in a GGUF file.
struct Vocabulary<'a> {
    path: &'a Path,
    tokens: &'a [String],
    kinds: Cow<'a, [i64]>,
    bos: Option<u32>,
    eos: Option<u32>,
    unknown: Option<u32>,
}

impl<'a> Vocabulary<'a> {
    fn read(gguf: &'a Gguf) -> Result<Self> {
        const TOKENS: &str = "tokenizer.ggml.tokens";
        const KINDS: &str = "tokenizer.ggml.token_type";
        let path = gguf.path();
        let tokens = gguf
            .get_strings(TOKENS)?
            .ok_or_else(|| ModelError::config(path, TOKENS, "an array of strings", "nothing"))?;
        let kinds = match gguf.metadata().get(KINDS) {
            None => vec![kind::NORMAL; tokens.len()],
            Some(Value::Array(Array::I32(kinds))) => kinds.iter().map(|&k| i64::from(k)).collect(),
            Some(Value::Array(Array::U32(kinds))) => kinds.iter().map(|&k| i64::from(k)).collect(),
            Some(_) => {
                return Err(ModelError::config(
                    path,
                    KINDS,
                    "an array of 32-bit integers",
                    "another type",
                ));
            }
        };
        if kinds.len() != tokens.len() || tokens.len() > MAX_ID as usize {
            return Err(ModelError::tokenizer(
                path,
                format!(
                    "{} tokens (at most {MAX_ID}) and {} token types",
                    tokens.len(),
                    kinds.len()
                ),
            ));
        }
        let id = |key: &str| -> Result<Option<u32>> {
            let key = format!("tokenizer.ggml.{key}");
            match gguf.get_u64(&key)? {
                None => Ok(None),
                Some(id) if id < tokens.len() as u64 => Ok(Some(id as u32)),
                Some(id) => Err(ModelError::config(
                    path,
                    key,
                    format!("less than the {} tokens", tokens.len()),
                    id,
                )),
            }
        };
        Ok(Self {
            path,
            tokens,
            kinds: kinds.into(),
            bos: id("bos_token_id")?,
            eos: id("eos_token_id")?,
            unknown: id("unknown_token_id")?,
        })
    }

    fn build(&self, gguf: &'a Gguf) -> Result<Tokenizer> {
        let model = gguf.get_str("tokenizer.ggml.model")?.unwrap_or("nothing");
        let pre = gguf.get_str("tokenizer.ggml.pre")?;
        let (mut inner, alphabet, strip, bos_by_default) = match model {
            "gpt2" => {
                let (inner, bos) = self.byte_level(gguf, pre)?;
                (inner, Alphabet::Bytes, 0, bos)
            }
            "llama" => {
                let prefix = gguf
                    .get_bool("tokenizer.ggml.add_space_prefix")?
                    .unwrap_or(true);
                let inner = self.sentence_piece(self.scores(gguf)?, prefix)?;
                (inner, Alphabet::SentencePiece, prefix.into(), true)
            }
            other => {
                return Err(ModelError::config(
                    self.path,
                    "tokenizer.ggml.model",
                    "gpt2 or llama",
                    other,
                ));
            }
        };
        // Phi-3's control tokens swallow the line breaks after them. The format has no place for
        // this, so that it hangs on the architecture.
        let phi3 = model == "llama" && gguf.get_str("general.architecture")? == Some("phi3");
        inner
            .add_special_tokens(self.added(phi3))
            .map_err(|e| ModelError::tokenizer(self.path, e))?;
        let mut this = Tokenizer::new(self.path, inner, alphabet, strip, &self.known())?;
        let flag = |key| gguf.get_bool(key);
        let bos = flag("tokenizer.ggml.add_bos_token")?.unwrap_or(bos_by_default);
        let eos = flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
        this.around = Around {
            bos: self.bos.filter(|_| bos),
            eos: self.eos.filter(|_| eos),
        };
        (this.bos, this.eos) = (self.bos, self.eos);
        for key in ["eot", "eom"] {
            let key = format!("tokenizer.ggml.{key}_token_id");
            let id = gguf.get_u64(&key)?;
            this.eot.extend(id.and_then(|id| u32::try_from(id).ok()));
        }
        Ok(this)
    }

    /// The names of the beginning, end and unknown token.
    fn known(&self) -> HashSet<&str> {
        let known = [self.bos, self.eos, self.unknown].into_iter().flatten();
        known.map(|id| self.tokens[id as usize].as_str()).collect()
    }

    /// Control tokens, and those that the model's user has defined.
    fn added(&self, phi3: bool) -> Vec<AddedToken> {
        let controls = self.tokens.iter().zip(&*self.kinds);
        controls
            .filter_map(|(text, &kind)| {
                let special = matches!(kind, kind::CONTROL | kind::UNKNOWN);
                if !(special || kind == kind::USER_DEFINED) {
                    return None;
                }
                let keeps = matches!(text.as_str(), "<unk>" | "<s>" | "<|endoftext|>");
                Some(
                    AddedToken::from(text.as_str(), special)
                        .normalized(false)
                        .rstrip(phi3 && !keeps),
                )
            })
            .collect()
    }

    /// Ids by text; of equal texts the first.
    fn ids(&self) -> Vocab {
        let mut ids = Vocab::default();
        for (id, text) in self.tokens.iter().enumerate() {
            ids.entry(text.clone()).or_insert(id as u32);
        }
        ids
    }

    /// Byte-level BPE, and whether a text begins with the beginning-of-text token by default.
    fn byte_level(&self, gguf: &Gguf, pre: Option<&str>) -> Result<(Inner, bool)> {
        const MERGES: &str = "tokenizer.ggml.merges";
        let lines = gguf.get_strings(MERGES)?.ok_or_else(|| {
            ModelError::config(self.path, MERGES, "an array of strings", "nothing")
        })?;
        let ids = self.ids();
        let mut merges = Merges::with_capacity(lines.len());
        for line in lines {
            let merge = line.split_once(' ').filter(|(a, b)| {
                let merged = format!("{a}{b}");
                [*a, *b, &merged].iter().all(|t| ids.contains_key(*t))
            });
            let Some((a, b)) = merge else {
                return Err(ModelError::tokenizer(
                    self.path,
                    format!("the merge {line:?} is not one of two tokens to a third"),
                ));
            };
            merges.push((a.to_owned(), b.to_owned()));
        }
        let llama3 = matches!(pre, Some("llama-bpe" | "llama3" | "llama-v3"));
        let model = BPE::builder()
            .vocab_and_merges(ids, merges)
            .ignore_merges(llama3);
        let model = guarded(self.path, || model.build())?;
        let mut inner = Inner::new(model);
        match pre {
            None | Some("default" | "gpt-2") => {
                inner.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
            }
            Some("smollm") => {
                inner.with_pre_tokenizer(Some(PreTokenizers::new(vec![
                    Digits::new(true).into(),
                    ByteLevel::new(false, true, true).into(),
                ])));
            }
            Some("llama-bpe" | "llama3" | "llama-v3") => {
                model_file::split_as_llama3(self.path, &mut inner)?;
            }
            Some(other) => {
                return Err(ModelError::config(
                    self.path,
                    "tokenizer.ggml.pre",
                    "gpt-2, smollm or llama-bpe",
                    other,
                ));
            }
        }
        Ok((inner, llama3))
    }

    /// The scores of a SentencePiece vocabulary, one for each token.
    fn scores(&self, gguf: &'a Gguf) -> Result<&'a [f32]> {
        const SCORES: &str = "tokenizer.ggml.scores";
        match gguf.metadata().get(SCORES) {
            Some(Value::Array(Array::F32(scores))) if scores.len() == self.tokens.len() => {
                Ok(scores)
            }
            _ => Err(ModelError::config(
                self.path,
                SCORES,
                format!("an array of {} f32", self.tokens.len()),
                "none such",
            )),
        }
    }

    /// SentencePiece BPE with byte fallback. The file has scores instead of merges: a pair may merge
    /// if the result is a token, better scores first.
    fn sentence_piece(&self, scores: &[f32], prefix: bool) -> Result<Inner> {
        let ids = self.ids();
        let normal = |text: &str| {
            ids.get(text)
                .is_some_and(|&id| self.kinds[id as usize] == kind::NORMAL)
        };
        let mut merges: Vec<(f32, &str, &str)> = Vec::new();
        for (id, text) in self.tokens.iter().enumerate() {
            let first = ids.get(text) == Some(&(id as u32));
            if self.kinds[id] != kind::NORMAL || !first || text.len() > MAX_TOKEN {
                continue;
            }
            for (at, _) in text.char_indices().skip(1) {
                let (a, b) = text.split_at(at);
                if normal(a) && normal(b) {
                    merges.push((scores[id], a, b));
                }
            }
        }
        // Of the ways to make one token, the longer left part first.
        merges.sort_by(|x, y| {
            y.0.total_cmp(&x.0)
                .then_with(|| y.1.chars().count().cmp(&x.1.chars().count()))
        });
        let merges: Merges = merges
            .into_iter()
            .map(|(_, a, b)| (a.to_owned(), b.to_owned()))
            .collect();
        let mut model = BPE::builder()
            .vocab_and_merges(ids, merges)
            .fuse_unk(true)
            .byte_fallback(true);
        if let Some(unknown) = self.unknown {
            model = model.unk_token(self.tokens[unknown as usize].clone());
        }
        let model = guarded(self.path, || model.build())?;
        let mut inner = Inner::new(model);
        let spaces = Replace::new(" ", WORD_START);
        let spaces = spaces.map_err(|e| ModelError::tokenizer(self.path, e))?;
        let mut normalizers = Vec::new();
        if prefix {
            normalizers.push(Prepend::new(WORD_START.into()).into());
        }
        normalizers.push(spaces.into());
        inner
            .with_normalizer(Some(Normalizers::new(normalizers)))
            .map_err(|e| ModelError::tokenizer(self.path, e))?;
        Ok(inner)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::gguf::{Value as Meta, writer::File};
    use proptest::prelude::*;
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

    static BYTE_LEVEL: LazyLock<Tokenizer> =
        LazyLock::new(|| build(&byte_level_file("gpt-2")).unwrap());

    fn golden(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/golden/sentencepiece")
            .join(name)
    }

    static SENTENCE_PIECE: LazyLock<Tokenizer> = LazyLock::new(|| {
        Tokenizer::from_gguf(&Gguf::open(golden("vocabulary.gguf")).unwrap()).unwrap()
    });

    fn names(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
        ids.iter()
            .map(|&id| tokenizer.id_to_token(id).unwrap())
            .collect()
    }

    #[test]
    fn splitting_rules() {
        let text = " hello123";
        for (pre, expected) in [
            ("gpt-2", vec!["Ġhello", "123"]),
            ("default", vec!["Ġhello", "123"]),
            ("smollm", vec!["Ġhello", "1", "2", "3"]),
        ] {
            let tokenizer = build(&byte_level_file(pre)).unwrap();
            let ids = tokenizer.encode(text, SpecialTokens::Plain).unwrap();
            assert_eq!(names(&tokenizer, &ids), expected, "{pre}");
        }
        // Llama 3 takes digits by threes, and begins a text with its token.
        let tokenizer = build(&byte_level_file("llama-bpe")).unwrap();
        let ids = tokenizer
            .encode(" hello1231", SpecialTokens::Plain)
            .unwrap();
        assert_eq!(names(&tokenizer, &ids), ["<|bos|>", "Ġhello", "123", "1"]);
        let part = tokenizer.encode_part(" hello1231", SpecialTokens::Plain);
        assert_eq!(part.unwrap(), ids[1..]);
        assert!(matches!(
            build(&byte_level_file("qwen2")),
            Err(ModelError::Config { what, found, .. })
                if what == "tokenizer.ggml.pre" && found == "qwen2"
        ));
    }

    #[test]
    fn what_the_file_puts_around_a_text() {
        let flags = |bos, eos| {
            let file = byte_level_file("gpt-2")
                .meta("tokenizer.ggml.add_bos_token", Meta::Bool(bos))
                .meta("tokenizer.ggml.add_eos_token", Meta::Bool(eos));
            let tokenizer = build(&file).unwrap();
            names(
                &tokenizer,
                &tokenizer.encode("a", SpecialTokens::Plain).unwrap(),
            )
        };
        assert_eq!(flags(false, false), ["a"]);
        assert_eq!(flags(true, false), ["<|bos|>", "a"]);
        assert_eq!(flags(true, true), ["<|bos|>", "a", "<|im_end|>"]);
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
        assert!(tokenizer.is_special(end) && !tokenizer.is_special(0));
        assert!(!tokenizer.is_special(u32::MAX));
        assert_eq!(tokenizer.vocab_size(), 268);
    }

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

    #[test]
    fn phi3_control_tokens_take_white_space_along() {
        let base = |arch: &str| {
            let tokens = ["<unk>", "<s>", "</s>", "<|end|>", "\u{2581}", "a", "<0x0A>"];
            File::default()
                .meta("general.architecture", Meta::String(arch.into()))
                .meta("tokenizer.ggml.model", Meta::String("llama".into()))
                .meta(
                    "tokenizer.ggml.tokens",
                    Meta::Array(Array::String(tokens.map(String::from).to_vec())),
                )
                .meta(
                    "tokenizer.ggml.token_type",
                    Meta::Array(Array::I32(vec![2, 3, 3, 3, 1, 1, 6])),
                )
                .meta(
                    "tokenizer.ggml.scores",
                    Meta::Array(Array::F32(vec![0.0; 7])),
                )
                .meta("tokenizer.ggml.unknown_token_id", Meta::U32(0))
        };
        let ids = |arch: &str| {
            let tokenizer = build(&base(arch)).unwrap();
            let ids = tokenizer.encode_part("<|end|>\na", SpecialTokens::Interpret);
            let around = tokenizer.encode_around("<|end|>\na", &[]).unwrap();
            assert_eq!(ids.as_ref().unwrap(), &around);
            around
        };
        assert_eq!(ids("phi3"), [3, 4, 5]);
        assert_eq!(ids("llama"), [3, 4, 6, 5]);
    }

    #[test]
    fn hostile_vocabularies() {
        let with = |key: &str, value: Option<Meta>| {
            let mut file = byte_level_file("gpt-2");
            file.metadata.retain(|(k, _)| k != key);
            match value {
                Some(value) => file.meta(key, value),
                None => file,
            }
        };
        let strings = |texts: &[&str]| {
            Some(Meta::Array(Array::String(
                texts.iter().map(|t| t.to_string()).collect(),
            )))
        };
        for (key, value) in [
            ("tokenizer.ggml.tokens", None),
            ("tokenizer.ggml.tokens", Some(Meta::U32(1))),
            ("tokenizer.ggml.tokens", strings(&["a"])),
            ("tokenizer.ggml.token_type", Some(Meta::U32(1))),
            (
                "tokenizer.ggml.token_type",
                Some(Meta::Array(Array::I32(vec![1]))),
            ),
            ("tokenizer.ggml.merges", None),
            ("tokenizer.ggml.merges", strings(&["h"])),
            ("tokenizer.ggml.merges", strings(&["h zz"])),
            ("tokenizer.ggml.merges", strings(&["hello hello"])),
            ("tokenizer.ggml.model", None),
            ("tokenizer.ggml.model", Some(Meta::String("bert".into()))),
            ("tokenizer.ggml.bos_token_id", Some(Meta::U32(1 << 20))),
            // SentencePiece without scores.
            ("tokenizer.ggml.model", Some(Meta::String("llama".into()))),
        ] {
            assert!(
                matches!(
                    build(&with(key, value.clone())),
                    Err(ModelError::Config { .. } | ModelError::Tokenizer { .. })
                ),
                "{key}: {value:?}"
            );
        }
    }

    #[test]
    fn hostile_tokenizer_files() {
        let model = |merges: &str, vocab: &str| {
            format!(
                r#"{{"version": "1.0", "added_tokens": [], "decoder": {{"type": "ByteLevel",
                "add_prefix_space": false, "trim_offsets": false, "use_regex": false}},
                "model": {{"type": "BPE", "vocab": {vocab}, "merges": {merges}}}}}"#
            )
        };
        let dir = tempfile::tempdir().unwrap();
        let read = |text: &str| {
            fs::write(dir.path().join("tokenizer.json"), text).unwrap();
            Tokenizer::from_dir(dir.path())
        };
        read(&model("[]", r#"{"a": 0, "b": 1}"#)).unwrap();
        for bad in [
            "",
            "{}",
            "[]",
            // The merged token is longer than any that there is.
            &model(r#"["aa bb"]"#, r#"{"aa": 0, "bb": 1}"#),
            &model(r#"["a c"]"#, r#"{"a": 0, "b": 1}"#),
            &model("[]", r#"{"a": 4000000000}"#),
            &model("[]", r#"{"a": -1}"#),
            &model("[]", r#"{"a": 0}"#).replace("ByteLevel", "WordPiece"),
            r#"{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}"#,
        ] {
            assert!(
                matches!(read(bad), Err(ModelError::Tokenizer { .. })),
                "{bad}"
            );
        }
        fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
        assert!(matches!(
            Tokenizer::from_dir(dir.path()),
            Err(ModelError::Io { .. })
        ));
    }

    #[test]
    fn tokenizer_config_names_tokens() {
        let dir = tempfile::tempdir().unwrap();
        fs::copy(golden("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
        let config = r#"{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}"#;
        fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
        let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
        assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(1), Some(2)));
        assert_eq!(tokenizer.end_of_turn(&[]), [2]);
    }
}
