//! Texts for the training of retaining heads: a seeded generator over packaged corpora, and files.
//!
//! [`Recipe::Reconstruct`] makes ordinary texts of many kinds, in which nothing is put for a question, to be
//! repeated as a whole ([`repetition`]). [`Recipe::Builtin`] strews facts into real prose, tables, repeated filler and chats, and asks
//! for them, next to real questions on real texts, continuations and quotes. [`Recipe::Plain`] has
//! nothing planted at all. Neither shares a name, a template or a sentence of prose with the
//! evaluation tasks of [`crate::tasks`].

mod corpus;
mod file;
mod make;
mod ordinary;
mod words;

pub use corpus::TrainingCorpus;
pub use file::read;
pub use make::{Recipe, generate};
pub use ordinary::Ordinary;

use crate::{Error, Result, tasks::Frame};
use locret_policies::training::{Answer, Repetition, Sample};
use serde::{Deserialize, Serialize};

/// A text to train on, and what may follow it. Tokenised apart, control tokens taken as control
/// tokens, nothing added.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainingText {
    /// What is read.
    pub prompt: String,
    /// Each follows the prompt on its own.
    pub answers: Vec<TrainingAnswer>,
    /// What the prompt begins with and is not a part of what is read: a chat template's first words.
    #[serde(default)]
    pub opening: String,
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

/// How a model is asked, in its chat turns or in plain text, for a text once more, in pieces of `piece` tokens.
///
/// # Errors
/// Those of `encode`.
pub fn repetition(
    frame: &Frame,
    piece: usize,
    encode: &dyn Fn(&str) -> Result<Vec<u32>>,
) -> Result<Repetition> {
    // The words matter little (KVzip, arXiv 2505.23416, has three wordings and none within .2 of each other).
    let first = "Say all of the text above once more, word for word.";
    let next = "Say once more, word for word, what comes in the text above after these words: ";
    Ok(Repetition {
        first: encode(&frame.query(first, ""))?,
        next: [
            encode(&[&frame.ask, next].concat())?,
            encode(&frame.to_answer)?,
        ],
        quoted: 8,
        piece,
    })
}

/// Tokenises texts. A prompt of more than `most` tokens loses its middle (0: none does). With a `repetition`
/// each text is repeated as a whole beside its own answers. Texts and answers without a token are left out.
///
/// # Errors
/// Those of `encode` and of `repetition`; [`Error::Usage`] if nothing is left.
pub fn tokenise(
    texts: &[TrainingText],
    most: usize,
    repetition: Option<&Repetition>,
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
        if let (Some(repetition), false) = (repetition, prompt.is_empty()) {
            // Control tokens are tokens by themselves, so that what they open begins behind them.
            let opening = encode(&text.opening)?;
            let from = match prompt.starts_with(&opening) && prompt.len() > opening.len() {
                true => opening.len(),
                false => 0,
            };
            let repeated = repetition.sample(&prompt, from..prompt.len())?;
            answers.extend(repeated.answers);
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
            opening: String::new(),
        };
        let texts = [text("abcdefgh", "x"), text("", "x"), text("a", "")];
        let all = tokenise(&texts, 5, None, &encode).unwrap();
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].prompt, encode("abcgh").unwrap());
        assert_eq!(
            tokenise(&texts, 0, None, &encode).unwrap()[0].prompt.len(),
            8
        );
        assert!(tokenise(&texts[1..], 0, None, &encode).is_err());
    }

    #[test]
    fn texts_are_repeated_behind_what_opens_them() {
        let encode = |text: &str| Ok(text.bytes().map(u32::from).collect::<Vec<u32>>());
        let frame = Frame::plain("<");
        let repetition = repetition(&frame, 3, &encode).unwrap();
        let text = |opening: &str| TrainingText {
            prompt: "<abcdefg".into(),
            answers: Vec::new(),
            opening: opening.into(),
        };
        let texts = [text("<"), text("")];
        let all = tokenise(&texts, 0, Some(&repetition), &encode).unwrap();
        let answers = |sample: &Sample| -> Vec<String> {
            let text = |ids: &[u32]| ids.iter().map(|id| char::from(*id as u8)).collect();
            sample.answers.iter().map(|a| text(&a.answer)).collect()
        };
        assert_eq!(answers(&all[0]), ["abc", "def", "g"]);
        assert_eq!(answers(&all[1]), ["<ab", "cde", "fg"]);
        let query: String = (all[0].answers[1].query.iter())
            .map(|id| char::from(*id as u8))
            .collect();
        assert!(query.ends_with("these words: abc\nAnswer: "), "{query}");
        assert!(tokenise(&texts, 0, None, &encode).is_err());
    }
}
