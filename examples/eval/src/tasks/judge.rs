//! How generated answers are judged.

use super::published::Scorer;
use serde::{Deserialize, Serialize};

/// What an answer has to have in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judge {
    /// Texts that are looked for, or what else a [`Scorer`] says.
    pub references: Vec<String>,
    /// What is looked for, and how.
    pub rule: Rule,
    /// The most tokens that are generated.
    pub tokens: usize,
    /// All classes that an answer could name, for [`Scorer::Class`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<String>,
    /// Whether only the first line of an answer counts.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub first_line: bool,
}

/// How an answer is judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rule {
    /// All references have to be there: the share that is counts (RULER's `string_match_all`).
    All,
    /// Any of them (RULER's `string_match_part`).
    Any,
    /// As another benchmark's scorer has it.
    #[serde(untagged)]
    Published(Scorer),
}

impl Judge {
    /// By these references, with nothing else said.
    pub fn new(rule: Rule, references: Vec<String>, tokens: usize) -> Self {
        Self {
            references,
            rule,
            tokens,
            classes: Vec::new(),
            first_line: false,
        }
    }

    /// What an answer is worth, from 0 to 1.
    ///
    /// Of RULER's rules case does not matter, control characters are line breaks, and space around the answer is
    /// nothing.
    pub fn score(&self, answer: &str) -> f64 {
        let answer = match self.first_line {
            true => answer.trim_start_matches('\n').split('\n').next(),
            false => Some(answer),
        };
        let answer = answer.unwrap_or("");
        if let Rule::Published(scorer) = self.rule {
            return scorer.score(answer, &self.references, &self.classes);
        }
        let lines = |c: char| if c < ' ' { '\n' } else { c };
        let answer: String = answer.trim().chars().map(lines).collect();
        let answer = answer.trim().to_lowercase();
        let found = |reference: &&String| answer.contains(&reference.to_lowercase());
        let found = self.references.iter().filter(found).count();
        match self.rule {
            Rule::Any => f64::from(found > 0),
            _ => found as f64 / self.references.len().max(1) as f64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_one_word_in_a_file() {
        for (rule, text) in [
            (Rule::All, "\"all\""),
            (Rule::Any, "\"any\""),
            (Rule::Published(Scorer::TokenF1), "\"token-f1\""),
            (Rule::Published(Scorer::ExamLetters), "\"exam-letters\""),
        ] {
            assert_eq!(serde_json::to_string(&rule).unwrap(), text);
            assert_eq!(serde_json::from_str::<Rule>(text).unwrap(), rule);
        }
        assert!(serde_json::from_str::<Rule>("\"most\"").is_err());
        let judge = Judge::new(Rule::Any, vec!["a".into()], 3);
        let text = serde_json::to_string(&judge).unwrap();
        assert_eq!(text, r#"{"references":["a"],"rule":"any","tokens":3}"#);
        assert_eq!(serde_json::from_str::<Judge>(&text).unwrap(), judge);
    }

    #[test]
    fn only_the_first_line_may_count() {
        let mut judge = Judge::new(
            Rule::Published(Scorer::TokenF1),
            vec!["two words".into()],
            9,
        );
        let answer = "\n\nTwo words.\nAnd many more of them";
        assert!(judge.score(answer) < 0.5);
        judge.first_line = true;
        assert_eq!(judge.score(answer), 1.0);
    }
}
