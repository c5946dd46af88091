//! The names of methods.

use crate::{
    H2o, KeyDiff, KeyNorm, Locret, PolicyError, Random, Result, SirLlm, SnapKv, Tova, Window,
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
    /// [`MInference`](crate::MInference)
    #[serde(rename = "minference")]
    MInference,
    /// [`InfLlm`](crate::InfLlm)
    #[serde(rename = "infllm")]
    InfLlm,
}

impl Method {
    /// All of them.
    pub const ALL: [Self; 12] = [
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
            Self::MInference => "minference",
            Self::InfLlm => "infllm",
        }
    }

    /// Whether the method drops units, so that it has a budget. The others keep everything.
    pub fn evicts(self) -> bool {
        !matches!(self, Self::Full | Self::MInference | Self::InfLlm)
    }

    /// Whether the method can have a budget: what it keeps, or what of everything is resident.
    pub fn takes_budget(self) -> bool {
        self.evicts() || self == Self::InfLlm
    }

    /// The positions that the method was published with, where nothing else is asked for.
    pub fn default_positions(self) -> Positions {
        match self {
            Self::Full | Self::MInference => Positions::Original,
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
