//! Kinds of built-in tasks.

use super::ruler;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// A kind of built-in task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A five-digit pass key in repeated filler (∞Bench, arXiv 2402.13718, `R.PassKey`; the
    /// paper's own example). One question.
    Passkey,
    /// A ten-digit number in the same filler (∞Bench, `R.Number`). One question.
    Number,
    /// A JSON object of four pairs within essays, two of which are asked for (∞Bench, `R.KV`, which
    /// has nothing but pairs and is beyond small models).
    KeyValue,
    /// Four numbers in essays, each asked for on its own (RULER, arXiv 2404.06654, needles with
    /// several keys).
    Needle,
    /// Five facts in essays, words and numbers; five questions.
    Facts,
    /// A chat of four turns, in which the user mentions a fact after each passage of an essay; four
    /// questions.
    MultiTurn,
    /// How well the end of an essay is predicted: no question, a long answer.
    Perplexity,
    /// The pass key in essays instead of filler. One question.
    EssayPasskey,
    /// How well every token of an essay but the first few is predicted: what a store costs.
    /// Nothing is evicted while an answer is read.
    Text,
    /// RULER (arXiv 2404.06654): a number in repeated filler.
    #[serde(rename = "niah_single_1")]
    NiahSingle1,
    /// RULER: a number in essays.
    #[serde(rename = "niah_single_2")]
    NiahSingle2,
    /// RULER: a long identifier in essays.
    #[serde(rename = "niah_single_3")]
    NiahSingle3,
    /// RULER: one number of four in essays.
    #[serde(rename = "niah_multikey_1")]
    NiahMultikey1,
    /// RULER: a number among numbers.
    #[serde(rename = "niah_multikey_2")]
    NiahMultikey2,
    /// RULER: an identifier among identifiers.
    #[serde(rename = "niah_multikey_3")]
    NiahMultikey3,
    /// RULER: four numbers of one name in essays.
    #[serde(rename = "niah_multivalue")]
    NiahMultivalue,
    /// RULER: four numbers of four names in essays, asked for at once.
    #[serde(rename = "niah_multiquery")]
    NiahMultiquery,
    /// RULER: all variables that have a value by a chain of assignments.
    #[serde(rename = "vt")]
    Vt,
    /// RULER: the ten words that come most often in a list.
    #[serde(rename = "cwe")]
    Cwe,
    /// RULER: the three that come most often of coded words.
    #[serde(rename = "fwe")]
    Fwe,
    /// RULER: real questions on articles (SQuAD 2.0).
    #[serde(rename = "qa_1")]
    Qa1,
    /// RULER: real questions over several articles (HotpotQA).
    #[serde(rename = "qa_2")]
    Qa2,
    /// ∞Bench's `R.KV`: nothing but pairs of identifiers, one of which is asked for.
    #[serde(rename = "kv_retrieval")]
    KvRetrieval,
    /// ∞Bench's `Math.Find`: the largest, smallest or middle number of a list.
    #[serde(rename = "math_find")]
    MathFind,
    /// ∞Bench's `Code.Run`: the result of functions that call each other.
    #[serde(rename = "code_run")]
    CodeRun,
}

impl Kind {
    /// Those that a comparison runs if it names none, in the order of tables.
    pub const DEFAULT: [Self; 7] = [
        Self::Passkey,
        Self::Number,
        Self::KeyValue,
        Self::Needle,
        Self::Facts,
        Self::MultiTurn,
        Self::Perplexity,
    ];

    /// RULER's thirteen tasks, as `ruler` names them all.
    pub const RULER: [Self; 13] = [
        Self::NiahSingle1,
        Self::NiahSingle2,
        Self::NiahSingle3,
        Self::NiahMultikey1,
        Self::NiahMultikey2,
        Self::NiahMultikey3,
        Self::NiahMultivalue,
        Self::NiahMultiquery,
        Self::Vt,
        Self::Cwe,
        Self::Fwe,
        Self::Qa1,
        Self::Qa2,
    ];

    /// ∞Bench's tasks that are drawn and not written, as `infinitebench` names them all.
    pub const INFINITE: [Self; 5] = [
        Self::Passkey,
        Self::Number,
        Self::KvRetrieval,
        Self::MathFind,
        Self::CodeRun,
    ];

    /// All but RULER's, and those of ∞Bench's that no text is read for.
    pub const ALL: [Self; 9] = [
        Self::Passkey,
        Self::Number,
        Self::KeyValue,
        Self::Needle,
        Self::Facts,
        Self::MultiTurn,
        Self::Perplexity,
        Self::EssayPasskey,
        Self::Text,
    ];

    /// The name in files and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Passkey => "passkey",
            Self::Number => "number",
            Self::KeyValue => "key-value",
            Self::Needle => "needle",
            Self::Facts => "facts",
            Self::MultiTurn => "multi-turn",
            Self::Perplexity => "perplexity",
            Self::EssayPasskey => "essay-passkey",
            Self::Text => "text",
            Self::NiahSingle1 => "niah_single_1",
            Self::NiahSingle2 => "niah_single_2",
            Self::NiahSingle3 => "niah_single_3",
            Self::NiahMultikey1 => "niah_multikey_1",
            Self::NiahMultikey2 => "niah_multikey_2",
            Self::NiahMultikey3 => "niah_multikey_3",
            Self::NiahMultivalue => "niah_multivalue",
            Self::NiahMultiquery => "niah_multiquery",
            Self::Vt => "vt",
            Self::Cwe => "cwe",
            Self::Fwe => "fwe",
            Self::Qa1 => "qa_1",
            Self::Qa2 => "qa_2",
            Self::KvRetrieval => "kv_retrieval",
            Self::MathFind => "math_find",
            Self::CodeRun => "code_run",
        }
    }
}

impl Kind {
    /// The kinds that a name stands for: one, all of RULER's, or all of ∞Bench's.
    ///
    /// # Errors
    /// [`Error::Usage`] for an unknown name.
    pub fn named(name: &str) -> Result<Vec<Self>> {
        match name {
            "ruler" => Ok(Self::RULER.to_vec()),
            "infinitebench" => Ok(Self::INFINITE.to_vec()),
            name => Ok(vec![name.parse()?]),
        }
    }

    /// RULER's generator of this kind.
    pub(super) fn ruler(self) -> Option<ruler::Kind> {
        let at = Self::RULER.iter().position(|kind| *kind == self)?;
        Some(ruler::KINDS[at])
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Kind {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let drawn = [Self::KvRetrieval, Self::MathFind, Self::CodeRun];
        let mut all = Self::ALL.into_iter().chain(Self::RULER).chain(drawn);
        all.clone().find(|k| k.name() == s).ok_or_else(|| {
            let names: Vec<&str> = all.by_ref().map(Self::name).collect();
            let names = names.join(", ");
            Error::Usage(format!(
                "unknown task {s:?}: there are {names}, ruler, infinitebench"
            ))
        })
    }
}
