//! A second tier as configuration.

use crate::PolicyError;
use locret_core::Tier;
use serde::{Deserialize, Serialize};
use std::{fmt, path::PathBuf, str::FromStr};

/// Where units lie that are put away. As text: `memory`, `disk` (scratch files where the system keeps such), or
/// `disk:FOLDER`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
#[non_exhaustive]
pub enum TierConfig {
    /// [`Tier::memory`].
    Memory,
    /// [`Tier::disk`].
    Disk(Option<PathBuf>),
}

impl TierConfig {
    /// The tier.
    pub fn tier(&self) -> Tier {
        match self {
            Self::Memory => Tier::memory(),
            Self::Disk(folder) => Tier::disk(folder.clone()),
        }
    }
}

impl FromStr for TierConfig {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, PolicyError> {
        match (text, text.strip_prefix("disk:")) {
            ("memory", _) => Ok(Self::Memory),
            ("disk", _) => Ok(Self::Disk(None)),
            (_, Some(folder)) if !folder.is_empty() => Ok(Self::Disk(Some(folder.into()))),
            _ => Err(PolicyError::Config(format!(
                "unknown tier `{text}`, expected memory, disk or disk:FOLDER"
            ))),
        }
    }
}

impl fmt::Display for TierConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory => f.write_str("memory"),
            Self::Disk(None) => f.write_str("disk"),
            Self::Disk(Some(folder)) => write!(f, "disk:{}", folder.display()),
        }
    }
}

impl TryFrom<String> for TierConfig {
    type Error = PolicyError;

    fn try_from(text: String) -> Result<Self, PolicyError> {
        text.parse()
    }
}

impl From<TierConfig> for String {
    fn from(tier: TierConfig) -> Self {
        tier.to_string()
    }
}
