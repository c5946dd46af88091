//! How generated answers are judged.

use serde::{Deserialize, Serialize};

/// What an answer has to have in it, as RULER's scorers see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judge {
    /// Texts that are looked for.
    pub references: Vec<String>,
    /// How many of them have to be there.
    pub rule: Rule,
    /// The most tokens that are generated.
    pub tokens: usize,
}

/// How many references an answer has to have in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rule {
    /// All: the share that is there counts (RULER's `string_match_all`).
    All,
    /// Any of them (RULER's `string_match_part`).
    Any,
}

impl Judge {
    /// What an answer is worth, from 0 to 1. Case does not matter; control characters are line breaks, and
    /// space around the answer is nothing.
    pub fn score(&self, answer: &str) -> f64 {
        let lines = |c: char| if c < ' ' { '\n' } else { c };
        let answer: String = answer.trim().chars().map(lines).collect();
        let answer = answer.trim().to_lowercase();
        let found = |reference: &&String| answer.contains(&reference.to_lowercase());
        let found = self.references.iter().filter(found).count();
        match self.rule {
            Rule::Any => f64::from(found > 0),
            Rule::All => found as f64 / self.references.len().max(1) as f64,
        }
    }
}
