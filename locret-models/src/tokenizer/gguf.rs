//! Tokenizers of the vocabulary in a GGUF file.

use super::{
    Alphabet, Around, Inner, MAX_ID, Tokenizer, guarded,
    splits::Splitting,
    vocabulary::{Vocabulary, kind},
};
use crate::{Gguf, ModelError, Result, Value};
use tokenizers::models::bpe::{BPE, Merges};

impl Tokenizer {
    /// Builds the tokenizer that a GGUF file describes: byte-level BPE (`gpt2`, splitting as
    /// `gpt-2`, `smollm`, `llama-bpe`, `dbrx`, `qwen2`, `gpt-4o` or `tekken` do, and those that go by
    /// other names), or SentencePiece BPE (`llama`).
    ///
    /// # Errors
    /// [`ModelError::Config`] for a missing key, or a model or splitting rule that is not
    /// supported; [`ModelError::Tokenizer`] for lists that don't fit together.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        Vocabulary::read(gguf)?.build(gguf)
    }
}

/// The id of the token with a part to play (`bos`, `eos`, `unknown`, `padding`, `eot`, `eom`), one of
/// `count` tokens.
///
/// # Errors
/// [`ModelError::Config`] if there is another type of value.
pub(crate) fn named_id(gguf: &Gguf, part: &str, count: usize) -> Result<Option<u32>> {
    let key = format!("tokenizer.ggml.{part}_token_id");
    let id = match gguf.metadata().contains_key(&key) {
        true => gguf.get_id(&key)?,
        // Where a file with a vocabulary of SentencePiece says nothing, these are the usual ones.
        false if gguf.get_str("tokenizer.ggml.model")? == Some("llama") => match part {
            "unknown" => Some(0),
            "bos" => Some(1),
            "eos" => Some(2),
            _ => None,
        },
        false => None,
    };
    // There are files with -1, or the id of a token that was left out, for "none".
    Ok(id.filter(|id| (*id as usize) < count))
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
            Some(Value::Array(kinds)) if kinds.as_integers().is_some() => {
                let kinds = kinds.as_integers().unwrap_or_default();
                kinds.into_iter().map(|k| k.clamp(-1, 99) as i64).collect()
            }
            Some(_) => {
                return Err(ModelError::config(
                    path,
                    KINDS,
                    "an array of integers",
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
        Ok(Self {
            path,
            tokens,
            kinds,
            bos: named_id(gguf, "bos", tokens.len())?,
            eos: named_id(gguf, "eos", tokens.len())?,
            unknown: named_id(gguf, "unknown", tokens.len())?,
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
                let inner = self.sentence_piece(&self.scores(gguf)?, prefix)?;
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
        for part in ["eot", "eom"] {
            this.eot.extend(named_id(gguf, part, self.tokens.len())?);
        }
        Ok(this)
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
        let pre = pre.unwrap_or("default");
        let splitting = Splitting::named(pre).ok_or_else(|| {
            ModelError::config(
                self.path,
                "tokenizer.ggml.pre",
                "a splitting rule of Llama, Mistral, Qwen or Phi: gpt-2, smollm, llama-bpe, dbrx, \
                 qwen2, gpt-4o or tekken",
                pre,
            )
        })?;
        let model = BPE::builder()
            .vocab_and_merges(ids, merges)
            .ignore_merges(splitting.ignores_merges);
        let model = guarded(self.path, || model.build())?;
        let mut inner = Inner::new(model);
        splitting.apply(self.path, &mut inner)?;
        Ok((inner, splitting.begins))
    }

    /// The scores of a SentencePiece vocabulary, one for each token.
    fn scores(&self, gguf: &'a Gguf) -> Result<Vec<f32>> {
        const SCORES: &str = "tokenizer.ggml.scores";
        let scores = match gguf.metadata().get(SCORES) {
            Some(Value::Array(scores)) => scores.as_f32(),
            _ => None,
        };
        match scores {
            Some(scores) if scores.len() == self.tokens.len() => Ok(scores),
            _ => Err(ModelError::config(
                self.path,
                SCORES,
                format!("an array of {} numbers", self.tokens.len()),
                "none such",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Array, SpecialTokens, Value as Meta,
        gguf_file::File,
        tokenizer::tests::{build, byte_level_file, names},
    };

    #[test]
    fn splitting_rules() {
        let text = " hello123";
        for (pre, expected) in [
            ("gpt-2", vec!["Ġhello", "123"]),
            ("default", vec!["Ġhello", "123"]),
            ("smollm", vec!["Ġhello", "1", "2", "3"]),
            ("qwen2", vec!["Ġhello", "1", "2", "3"]),
            ("gpt-4o", vec!["Ġhello", "123"]),
            ("tekken", vec!["<|bos|>", "Ġhello", "1", "2", "3"]),
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
            build(&byte_level_file("deepseek-v3")),
            Err(ModelError::Config { what, found, .. })
                if what == "tokenizer.ggml.pre" && found == "deepseek-v3"
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
        // The beginning and the end are the usual ones, unless the file names others or none.
        let usual = build(&base("llama")).unwrap();
        assert_eq!((usual.bos(), usual.eos()), (Some(1), Some(2)));
        assert_eq!(usual.encode("a", SpecialTokens::Plain).unwrap()[0], 1);
        let none = base("llama").meta("tokenizer.ggml.bos_token_id", Meta::I32(-1));
        assert_eq!(build(&none).unwrap().bos(), None);
    }

    #[test]
    fn parts_of_characters_are_tokens_that_no_text_has() {
        let mut file = byte_level_file("gpt-2");
        for (key, value) in &mut file.metadata {
            match value {
                Meta::Array(Array::String(tokens)) if key.ends_with("tokens") => {
                    // As a reader makes them of what is no text.
                    tokens.extend(["\u{fffd}".to_owned(), "\u{fffd}".to_owned()]);
                }
                Meta::Array(Array::I32(kinds)) => kinds.extend([1, 1]),
                _ => {}
            }
        }
        let tokenizer = build(&file).unwrap();
        let plain = build(&byte_level_file("gpt-2")).unwrap();
        for text in ["hello", "\u{fffd}", "h\u{e9}\u{fffd} "] {
            let ids = |t: &crate::Tokenizer| t.encode(text, SpecialTokens::Plain).unwrap();
            assert_eq!(ids(&tokenizer), ids(&plain), "{text}");
        }
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
            (
                "tokenizer.ggml.bos_token_id",
                Some(Meta::String("1".into())),
            ),
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
}
