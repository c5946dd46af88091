//! Texts for the training of retaining heads: a seeded generator over packaged corpora, and files.
//!
//! [`Recipe::Builtin`] strews facts into real prose, tables, repeated filler and chats, and asks
//! for them, next to real questions on real texts, continuations and quotes. [`Recipe::Plain`] has
//! nothing planted at all. Neither shares a name, a template or a sentence of prose with the
//! evaluation tasks of [`crate::tasks`].

mod corpus;
mod file;
mod make;
mod words;

pub use corpus::TrainingCorpus;
pub use file::read;
pub use make::{Recipe, generate};

use crate::{Error, Result};
use locret_policies::training::{Answer, Sample};
use serde::{Deserialize, Serialize};

/// A text to train on, and what may follow it. Tokenised apart, control tokens taken as control
/// tokens, nothing added.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainingText {
    /// What is read.
    pub prompt: String,
    /// Each follows the prompt on its own.
    pub answers: Vec<TrainingAnswer>,
}

/// What may follow a text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainingAnswer {
    /// What stands between the text and the answer; empty where the answer follows at once.
    #[serde(default)]
    pub query: String,
    /// What the model should say.
    pub answer: String,
}

/// Tokenises texts. A prompt of more than `most` tokens loses its middle (0: none does). Texts and
/// answers without a token are left out.
///
/// # Errors
/// Those of `encode`; [`Error::Usage`] if nothing is left.
pub fn tokenise(
    texts: &[TrainingText],
    most: usize,
    encode: &dyn Fn(&str) -> Result<Vec<u32>>,
) -> Result<Vec<Sample>> {
    let mut samples = Vec::with_capacity(texts.len());
    for text in texts {
        let mut prompt = encode(&text.prompt)?;
        if most > 0 && prompt.len() > most {
            let tail = prompt.split_off(prompt.len() - most / 2);
            prompt.truncate(most - most / 2);
            prompt.extend(tail);
        }
        let mut answers = Vec::with_capacity(text.answers.len());
        for a in &text.answers {
            let answer = encode(&a.answer)?;
            if !answer.is_empty() {
                let query = encode(&a.query)?;
                answers.push(Answer { query, answer });
            }
        }
        if !prompt.is_empty() && !answers.is_empty() {
            samples.push(Sample { prompt, answers });
        }
    }
    if samples.is_empty() {
        return Err(Error::Usage(
            "the training data have no text with an answer".into(),
        ));
    }
    Ok(samples)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_prompts_lose_their_middle() {
        let encode = |text: &str| Ok(text.bytes().map(u32::from).collect::<Vec<u32>>());
        let text = |prompt: &str, answer: &str| TrainingText {
            prompt: prompt.into(),
            answers: vec![TrainingAnswer {
                query: "?".into(),
                answer: answer.into(),
            }],
        };
        let texts = [text("abcdefgh", "x"), text("", "x"), text("a", "")];
        let all = tokenise(&texts, 5, &encode).unwrap();
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].prompt, encode("abcgh").unwrap());
        assert_eq!(tokenise(&texts, 0, &encode).unwrap()[0].prompt.len(), 8);
        assert!(tokenise(&texts[1..], 0, &encode).is_err());
    }
}
