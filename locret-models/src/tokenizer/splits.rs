//! How byte-level vocabularies split a text before pieces of it are merged.
//!
//! The patterns are those of the families' own `tokenizer.json`; a GGUF file has the name of one.

use super::{Inner, guarded};
use crate::{ModelError, Result};
use std::path::Path;
use tokenizers::{
    normalizers::NFC,
    pre_tokenizers::{
        byte_level::ByteLevel,
        digits::Digits,
        sequence::Sequence as PreTokenizers,
        split::{Split, SplitPattern},
    },
    tokenizer::SplitDelimiterBehavior,
};

/// Llama 3: contractions, words with one leading character, up to three digits, punctuation, line
/// breaks, spaces.
const LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    r"|[^\r\n\p{L}\p{N}]?\p{L}+",
    r"|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"|\s*[\r\n]+",
    r"|\s+(?!\S)",
    r"|\s+"
);

/// Qwen2 and 3: the same with single digits.
const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    r"|[^\r\n\p{L}\p{N}]?\p{L}+",
    r"|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"|\s*[\r\n]+",
    r"|\s+(?!\S)",
    r"|\s+"
);

/// GPT-4o, Phi-4-mini: words change where capitals begin, marks are letters, contractions belong to their
/// word, and slashes to the line break after them.
const GPT4O: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r"|\s*[\r\n]+",
    r"|\s+(?!\S)",
    r"|\s+"
);

/// Mistral's Tekken: the same without contractions, and with single digits.
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r"|\s*[\r\n]+",
    r"|\s+(?!\S)",
    r"|\s+"
);

/// What pieces are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pieces {
    /// GPT-2's, which the library knows.
    Gpt2,
    /// The same, with each digit a piece.
    Gpt2Digits,
    Matches(&'static str),
}

/// What goes with a byte-level vocabulary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Splitting {
    pieces: Pieces,
    /// Texts are brought into normal form C.
    composes: bool,
    /// A piece that is a token becomes that token, whatever the merges.
    pub(super) ignores_merges: bool,
    /// Texts begin with the beginning-of-text token where the file does not say.
    pub(super) begins: bool,
}

impl Splitting {
    const fn new(pieces: Pieces) -> Self {
        Self {
            pieces,
            composes: false,
            ignores_merges: false,
            begins: false,
        }
    }

    /// Pieces that are tokens are not merged, and texts have a beginning.
    const fn whole(pieces: Pieces) -> Self {
        Self {
            ignores_merges: true,
            begins: true,
            ..Self::new(pieces)
        }
    }

    /// That of Llama 3.
    pub(super) const LLAMA3: Self = Self::whole(Pieces::Matches(LLAMA3));

    /// The splitting that GGUF files have under a name (`tokenizer.ggml.pre`), as llama.cpp gives them.
    pub(super) fn named(name: &str) -> Option<Self> {
        use Pieces::*;
        Some(match name {
            "default" | "gpt-2" | "phi-2" | "mellum" | "trillion" | "a.x-4.0" => Self::new(Gpt2),
            "smollm" | "minerva-7b" => Self::new(Gpt2Digits),
            "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "pixtral" | "midm-2.0" => {
                Self::LLAMA3
            }
            // Phi-4 goes by the first of these.
            "dbrx" | "smaug-bpe" => Self::new(Matches(LLAMA3)),
            "qwen2" => Self {
                composes: true,
                ..Self::new(Matches(QWEN2))
            },
            // Qwen's vocabulary and pieces in tokenizers that leave texts as they are.
            "deepseek-r1-qwen" | "megrez" | "kormo" => Self::new(Matches(QWEN2)),
            "gpt-4o" | "llama4" => Self::new(Matches(GPT4O)),
            "tekken" => Self::whole(Matches(TEKKEN)),
            _ => return None,
        })
    }

    /// Makes a tokenizer split so.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] if the library does not take a pattern.
    pub(super) fn apply(self, path: &Path, inner: &mut Inner) -> Result<()> {
        let bytes = |split| ByteLevel::new(false, true, split).into();
        let parts = match self.pieces {
            Pieces::Gpt2 => vec![bytes(true)],
            Pieces::Gpt2Digits => vec![Digits::new(true).into(), bytes(true)],
            Pieces::Matches(pattern) => {
                let split = guarded(path, || {
                    Split::new(
                        SplitPattern::Regex(pattern.into()),
                        SplitDelimiterBehavior::Isolated,
                        false,
                    )
                })?;
                vec![split.into(), bytes(false)]
            }
        };
        inner.with_pre_tokenizer(Some(PreTokenizers::new(parts)));
        if self.composes {
            inner
                .with_normalizer(Some(NFC))
                .map_err(|e| ModelError::tokenizer(path, e))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_same_are_the_same() {
        let of = |name| Splitting::named(name).unwrap();
        assert_eq!(of("llama-bpe"), of("llama3"));
        assert_eq!(of("gpt-4o"), of("llama4"));
        assert_ne!(of("gpt-4o"), of("tekken"));
        assert_ne!(of("qwen2"), of("deepseek-r1-qwen"));
        assert!(of("tekken").begins && !of("qwen2").begins);
        for unknown in ["", "Qwen2", "deepseek-v3", "bloom"] {
            assert_eq!(Splitting::named(unknown), None, "{unknown}");
        }
    }
}
