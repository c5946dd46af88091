//! The names of methods.

use crate::{
    Compactor, Cur, ExpectedAttention, FastKvZip, H2o, Heavy, KeyDiff, KeyNorm, KvZap, LagKv,
    Locret, PolicyError, QFilters, Random, Result, SirLlm, SnapKv, Tova, Window,
    published::Published,
};
use locret_core::Positions;
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// The methods of this crate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Method {
    /// [`Full`](crate::Full)
    Full,
    /// [`Window`] (StreamingLLM)
    Window,
    /// [`Random`]
    Random,
    /// [`KeyNorm`]
    KeyNorm,
    /// [`KeyDiff`]
    KeyDiff,
    /// [`SirLlm`]
    #[serde(rename = "sirllm")]
    SirLlm,
    /// [`Locret`]
    Locret,
    /// [`H2o`]
    #[serde(rename = "h2o")]
    H2o,
    /// [`SnapKv`]
    #[serde(rename = "snapkv")]
    SnapKv,
    /// [`Tova`]
    Tova,
    /// [`ExpectedAttention`]
    ExpectedAttention,
    /// [`LagKv`]
    #[serde(rename = "lagkv")]
    LagKv,
    /// [`Cur`] (CurDKV)
    Cur,
    /// [`QFilters`]
    QFilters,
    /// [`Compactor`]
    Compactor,
    /// [`KvZap`]
    #[serde(rename = "kvzap")]
    KvZap,
    /// [`FastKvZip`]
    #[serde(rename = "fast-kvzip")]
    FastKvZip,
    /// [`D2o`](crate::D2o)
    #[serde(rename = "d2o")]
    D2o,
    /// [`Cam`](crate::Cam)
    Cam,
    /// [`DuoAttention`](crate::DuoAttention)
    DuoAttention,
    /// [`MInference`](crate::MInference)
    #[serde(rename = "minference")]
    MInference,
    /// [`InfLlm`](crate::InfLlm)
    #[serde(rename = "infllm")]
    InfLlm,
}

impl Method {
    /// All of them.
    pub const ALL: [Self; 22] = [
        Self::Full,
        Self::Window,
        Self::Random,
        Self::KeyNorm,
        Self::KeyDiff,
        Self::SirLlm,
        Self::Locret,
        Self::H2o,
        Self::SnapKv,
        Self::Tova,
        Self::ExpectedAttention,
        Self::LagKv,
        Self::Cur,
        Self::QFilters,
        Self::Compactor,
        Self::KvZap,
        Self::FastKvZip,
        Self::D2o,
        Self::Cam,
        Self::DuoAttention,
        Self::MInference,
        Self::InfLlm,
    ];

    /// The name in files and on command lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Window => "window",
            Self::Random => "random",
            Self::KeyNorm => "key-norm",
            Self::KeyDiff => "key-diff",
            Self::SirLlm => "sirllm",
            Self::Locret => "locret",
            Self::H2o => "h2o",
            Self::SnapKv => "snapkv",
            Self::Tova => "tova",
            Self::ExpectedAttention => "expected-attention",
            Self::LagKv => "lagkv",
            Self::Cur => "cur",
            Self::QFilters => "q-filters",
            Self::Compactor => "compactor",
            Self::KvZap => "kvzap",
            Self::FastKvZip => "fast-kvzip",
            Self::D2o => "d2o",
            Self::Cam => "cam",
            Self::DuoAttention => "duo-attention",
            Self::MInference => "minference",
            Self::InfLlm => "infllm",
        }
    }

    /// Whether the method drops units down to a budget. Of the others, `duo-attention` drops what its streaming
    /// heads do not keep, and the rest keep everything.
    pub fn evicts(self) -> bool {
        !matches!(
            self,
            Self::Full | Self::DuoAttention | Self::MInference | Self::InfLlm
        )
    }

    /// Whether the method folds what it drops into what it keeps, in a way of its own: it has neither `merge` nor
    /// `put_away`.
    pub fn merges(self) -> bool {
        matches!(self, Self::D2o | Self::Cam)
    }

    /// Whether the method scores with trained heads, so that it needs a file of them.
    pub fn takes_heads(self) -> bool {
        matches!(self, Self::Locret | Self::KvZap | Self::FastKvZip)
    }

    /// Whether the method can have a budget: what it keeps, or what of everything is resident.
    pub fn takes_budget(self) -> bool {
        self.evicts() || self == Self::InfLlm
    }

    /// The positions that the method was published with, where nothing else is asked for.
    pub fn default_positions(self) -> Positions {
        match self {
            Self::Full | Self::DuoAttention | Self::MInference => Positions::Original,
            Self::InfLlm => Positions::Compact,
            Self::Window => Window::POSITIONS,
            Self::Random => Random::POSITIONS,
            Self::KeyNorm => KeyNorm::POSITIONS,
            Self::KeyDiff => KeyDiff::POSITIONS,
            Self::SirLlm => SirLlm::POSITIONS,
            Self::Locret => Locret::POSITIONS,
            Self::H2o => H2o::POSITIONS,
            Self::SnapKv => SnapKv::POSITIONS,
            Self::Tova => Tova::POSITIONS,
            Self::ExpectedAttention => ExpectedAttention::POSITIONS,
            Self::LagKv => LagKv::POSITIONS,
            Self::Cur => Cur::POSITIONS,
            Self::QFilters => QFilters::POSITIONS,
            Self::Compactor => Compactor::POSITIONS,
            Self::KvZap => KvZap::POSITIONS,
            Self::FastKvZip => FastKvZip::POSITIONS,
            Self::D2o => Heavy::POSITIONS,
            Self::Cam => Window::POSITIONS,
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Method {
    type Err = PolicyError;

    fn from_str(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|method| method.name() == name);
        found.ok_or_else(|| {
            let known = Self::ALL.map(Self::name).join(", ");
            PolicyError::Config(format!("unknown policy `{name}`, expected one of {known}"))
        })
    }
}
