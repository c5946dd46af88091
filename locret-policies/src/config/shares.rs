//! A table of budgets as configuration.

use crate::{PolicyError, Result};
use locret_core::BudgetTable;
use serde::{Deserialize, Deserializer, Serialize, de};
use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

/// Fixed shares of a budget by layer, or by layer and head: a JSON file of a [`BudgetTable`], or the table itself,
/// `{ shares = [[1.5], [0.5]] }`.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
#[non_exhaustive]
pub enum TableConfig {
    /// In a file.
    File(PathBuf),
    /// Here.
    Shares(BudgetTable),
}

impl TableConfig {
    /// The table.
    ///
    /// # Errors
    /// [`PolicyError::Io`] and [`PolicyError::File`] for a file that cannot be read or is none.
    pub fn table(&self) -> Result<BudgetTable> {
        match self {
            Self::File(path) => {
                let text = fs::read_to_string(path).map_err(PolicyError::io(path))?;
                serde_json::from_str(&text).map_err(|e| PolicyError::file(path, e.to_string()))
            }
            Self::Shares(table) => Ok(table.clone()),
        }
    }

    /// The file, if it is in one.
    pub fn file(&self) -> Option<&Path> {
        match self {
            Self::File(path) => Some(path),
            Self::Shares(_) => None,
        }
    }
}

impl From<PathBuf> for TableConfig {
    fn from(path: PathBuf) -> Self {
        Self::File(path)
    }
}

impl From<&Path> for TableConfig {
    fn from(path: &Path) -> Self {
        Self::File(path.into())
    }
}

impl From<&str> for TableConfig {
    fn from(path: &str) -> Self {
        Self::File(path.into())
    }
}

impl From<BudgetTable> for TableConfig {
    fn from(table: BudgetTable) -> Self {
        Self::Shares(table)
    }
}

impl<'de> Deserialize<'de> for TableConfig {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(Reader)
    }
}

struct Reader;

impl<'de> de::Visitor<'de> for Reader {
    type Value = TableConfig;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of a JSON file, or `shares` with a row for each layer")
    }

    fn visit_str<E: de::Error>(self, path: &str) -> Result<TableConfig, E> {
        Ok(path.into())
    }

    fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<TableConfig, A::Error> {
        BudgetTable::deserialize(de::value::MapAccessDeserializer::new(map)).map(Into::into)
    }
}
