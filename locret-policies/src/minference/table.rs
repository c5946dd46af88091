//! Which pattern each query head has.

use crate::{PolicyError, Result};
use locret_core::Error;
use serde_json::Value;
use std::{collections::BTreeMap, path::Path};

/// What a query head sees of a prompt (arXiv 2407.02490 §3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Pattern {
    /// The first units and the newest.
    AShape {
        /// First units.
        init: usize,
        /// Newest units, a query's own among them.
        local: usize,
    },
    /// Columns and diagonals, chosen anew in each chunk.
    VerticalSlash {
        /// Columns; at least 30, of which the first 30 units are some.
        vertical: usize,
        /// Diagonals; at least 50, of which the newest 100 are some (as many of them as there is room for).
        slash: usize,
    },
    /// Blocks of 64 units, chosen anew for each 64 queries.
    BlockSparse {
        /// How many.
        blocks: usize,
    },
}

impl Pattern {
    /// What the authors give heads that no table knows.
    pub const UNKNOWN: Self = Self::VerticalSlash {
        vertical: 1000,
        slash: 6096,
    };

    /// Blocks that the authors' kernel takes, whatever a table says.
    const BLOCKS: usize = 100;

    /// Whether all of `n` units are seen.
    pub(super) fn sees_all(self, n: usize) -> bool {
        match self {
            Self::AShape { init, local } => init.saturating_add(local) >= n,
            Self::VerticalSlash { vertical, slash } => vertical.max(slash) >= n,
            Self::BlockSparse { blocks } => blocks >= n.div_ceil(super::TILE),
        }
    }

    /// The authors' name and numbers.
    fn published(self) -> (&'static str, usize, usize) {
        match self {
            Self::AShape { init, local } => ("stream_llm", init, local),
            Self::VerticalSlash { vertical, slash } => ("vertical_and_slash", vertical, slash),
            Self::BlockSparse { blocks } => ("block_sparse", blocks, 1),
        }
    }

    fn from_published(name: &str, a: usize, b: usize) -> Option<Self> {
        Some(match name {
            "stream_llm" => Self::AShape { init: a, local: b },
            "vertical_and_slash" => Self::VerticalSlash {
                vertical: a,
                slash: b,
            },
            "block_sparse" => Self::BlockSparse {
                blocks: Self::BLOCKS,
            },
            _ => return None,
        })
    }
}

/// The patterns of a model's query heads, as the authors publish them: a JSON list with an object for each layer,
/// in which a head's number stands for `[name, size, size, score]`. Such a list alone is one pattern for all heads.
///
/// Their table for Llama-3.1-8B has (512, 2048) for all heads, which is [`Patterns::llama_3_1`]. That for
/// Phi-3-mini-128K (378 heads (3500, 100), 277 (1000, 6096), 184 (100, 750), 92 (500, 700), 50 (30, 800), and 43
/// with the A-shape (100, 800)) is a file of theirs, which [`Patterns::load`] reads.
#[derive(Debug, Clone, PartialEq)]
pub struct Patterns {
    /// By layer, by head: the pattern, and what the search scored it.
    layers: Vec<BTreeMap<usize, (Pattern, f64)>>,
    others: Pattern,
}

impl Default for Patterns {
    /// [`Pattern::UNKNOWN`] for all heads.
    fn default() -> Self {
        Self::uniform(Pattern::UNKNOWN)
    }
}

impl Patterns {
    /// The same for all heads.
    pub fn uniform(pattern: Pattern) -> Self {
        Self {
            layers: Vec::new(),
            others: pattern,
        }
    }

    /// The authors' table for Llama-3.1-8B (their second one, which they use by default).
    pub fn llama_3_1() -> Self {
        Self::uniform(Pattern::VerticalSlash {
            vertical: 512,
            slash: 2048,
        })
    }

    /// The pattern of a query head: [`Pattern::UNKNOWN`] if there is a table without it.
    pub fn of(&self, layer: usize, head: usize) -> Pattern {
        let of_layer = self.layers.get(layer);
        let found = of_layer.and_then(|heads| heads.get(&head));
        found.map_or(self.others, |(pattern, _)| *pattern)
    }

    /// Layers of the table; none if all heads have the same pattern.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// What the search scored a head's pattern, if it is in the table.
    pub fn score(&self, layer: usize, head: usize) -> Option<f64> {
        let found = self.layers.get(layer)?.get(&head);
        found.map(|(_, score)| *score)
    }

    /// One more layer, with its heads' patterns and what the search scored them.
    pub fn push(&mut self, heads: impl IntoIterator<Item = (Pattern, f64)>) {
        self.layers.push(heads.into_iter().enumerate().collect());
    }

    /// Whether a model of so many layers and query heads can have this table.
    pub(super) fn check(&self, layers: usize, heads: usize) -> locret_core::Result<()> {
        let found = self.layers.len();
        if found != 0 && found != layers {
            let expected = format!("those of {layers} layers");
            let found = format!("those of {found}");
            return Err(Error::setting("patterns of heads", expected, found));
        }
        let last = self.layers.iter().filter_map(|heads| heads.keys().last());
        match last.max() {
            Some(head) if *head >= heads => Err(Error::setting(
                "patterns of heads",
                format!("those of {heads} query heads"),
                format!("head {head}"),
            )),
            _ => Ok(()),
        }
    }

    /// From a file.
    ///
    /// # Errors
    /// [`PolicyError::Io`]; [`PolicyError::File`] that says what is no pattern.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(PolicyError::io(path))?;
        Self::from_json(&text).map_err(|message| PolicyError::file(path, message))
    }

    /// From JSON.
    ///
    /// # Errors
    /// A sentence that says what is no pattern.
    pub fn from_json(text: &str) -> Result<Self, String> {
        type Entry = (String, usize, usize, f64);
        let value: Value = serde_json::from_str(text).map_err(|e| e.to_string())?;
        let one = value.get(0).is_some_and(Value::is_string);
        if let (true, Ok((name, a, b, _))) = (one, serde_json::from_value::<Entry>(value.clone())) {
            let pattern = Pattern::from_published(&name, a, b);
            return pattern
                .map(Self::uniform)
                .ok_or_else(|| format!("no pattern is named {name:?}"));
        }
        let layers: Vec<BTreeMap<String, Value>> =
            serde_json::from_value(value).map_err(|e| e.to_string())?;
        let mut table = Self::default();
        for (index, layer) in layers.into_iter().enumerate() {
            let mut heads = BTreeMap::new();
            for (head, value) in layer {
                let wrong = || {
                    format!(
                        "layer {index}, head {head:?}: expected a number, and [name, size, size, \
                         score] with one of the names stream_llm, vertical_and_slash and \
                         block_sparse, found {value}"
                    )
                };
                let number: usize = head.parse().map_err(|_| wrong())?;
                let (name, a, b, score): Entry =
                    serde_json::from_value(value.clone()).map_err(|_| wrong())?;
                let pattern = Pattern::from_published(&name, a, b).ok_or_else(wrong)?;
                heads.insert(number, (pattern, score));
            }
            table.layers.push(heads);
        }
        Ok(table)
    }

    /// As JSON. One pattern for all heads is its own list alone, with a score of 0.
    pub fn to_json(&self) -> String {
        let entry = |(pattern, score): &(Pattern, f64)| {
            let (name, a, b) = pattern.published();
            serde_json::json!([name, a, b, score])
        };
        let layer = |heads: &BTreeMap<usize, (Pattern, f64)>| {
            let heads = heads
                .iter()
                .map(|(head, found)| (head.to_string(), entry(found)));
            Value::Object(heads.collect())
        };
        let layers: Vec<Value> = self.layers.iter().map(layer).collect();
        match layers.is_empty() {
            true => entry(&(self.others, 0.0)).to_string(),
            false => Value::from(layers).to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = r#"[{"0": ["vertical_and_slash", 1000, 6096, 336787.6],
        "2": ["stream_llm", 100, 800, 4]}, {"1": ["block_sparse", 10, 1, 0.5]}]"#;

    #[test]
    fn tables_are_read_and_written() {
        let table = Patterns::from_json(TABLE).unwrap();
        let a_shape = Pattern::AShape {
            init: 100,
            local: 800,
        };
        assert_eq!(table.of(0, 0), Pattern::UNKNOWN);
        assert_eq!(table.of(0, 2), a_shape);
        assert_eq!(table.of(0, 1), Pattern::UNKNOWN);
        // As their kernel has it, whatever a table says.
        assert_eq!(table.of(1, 1), Pattern::BlockSparse { blocks: 100 });
        assert_eq!(table.score(0, 0), Some(336_787.6));
        for table in [&table, &Patterns::llama_3_1(), &Patterns::default()] {
            assert_eq!(&Patterns::from_json(&table.to_json()).unwrap(), table);
        }
        assert!(table.check(2, 3).is_ok());
        assert!(table.check(3, 3).is_err() && table.check(2, 2).is_err());
        assert!(Patterns::llama_3_1().check(32, 32).is_ok());
        assert_eq!(
            Patterns::llama_3_1().of(31, 31),
            Pattern::VerticalSlash {
                vertical: 512,
                slash: 2048
            }
        );
    }

    #[test]
    fn what_is_no_table_is_refused() {
        for (text, says) in [
            ("", "EOF"),
            ("{}", "expected a sequence"),
            (r#"[{"x": ["stream_llm", 1, 2, 3]}]"#, "layer 0, head \"x\""),
            (r#"[{}, {"0": ["stream", 1, 2, 3]}]"#, "layer 1, head \"0\""),
            (r#"[{"0": ["stream_llm", -1, 2, 3]}]"#, "found"),
            (r#"[{"0": ["stream_llm", 1, 2]}]"#, "found"),
            (r#"[{"0": 7}]"#, "found 7"),
            (r#"["stream", 1, 2, 3]"#, "no pattern is named"),
            (r#"["stream_llm", 1]"#, "expected a map"),
        ] {
            let found = Patterns::from_json(text).unwrap_err();
            assert!(found.contains(says), "{text}: {found}");
        }
    }
}
