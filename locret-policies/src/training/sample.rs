//! What heads are trained on.

use crate::{PolicyError, Result, locret::query_first};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// A text, and what the model should go on with after it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// Token ids of the text whose units get labels.
    pub prompt: Vec<u32>,
    /// Continuations of the prompt, each on its own. A unit's label is the largest over them.
    pub answers: Vec<Answer>,
}

/// One continuation of a prompt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Token ids between prompt and answer, a question for instance; may be empty.
    pub query: Vec<u32>,
    /// Token ids of the answer, which are forced on the model.
    pub answer: Vec<u32>,
}

impl Sample {
    /// Tokens that have to go through the model to label this sample.
    pub fn tokens(&self) -> usize {
        let answers = self.answers.iter();
        self.prompt.len()
            + answers
                .map(|a| a.query.len() + a.answer.len())
                .sum::<usize>()
    }

    /// The samples of *Locret-Q* (arXiv 2410.01805 §5): for each answer, the last `tokens` tokens
    /// of its query stand in the prompt, too, after the first `after` tokens (a beginning-of-text
    /// token, where there is one). Answers without a query stay together in one sample with the prompt
    /// unchanged.
    pub fn query_aware(&self, tokens: usize, after: usize) -> Vec<Self> {
        let (plain, asked): (Vec<&Answer>, Vec<&Answer>) =
            self.answers.iter().partition(|a| a.query.is_empty());
        let mut all = Vec::with_capacity(asked.len() + 1);
        if !plain.is_empty() {
            all.push(Self {
                prompt: self.prompt.clone(),
                answers: plain.into_iter().cloned().collect(),
            });
        }
        for answer in asked {
            all.push(Self {
                prompt: query_first(&self.prompt, &answer.query, tokens, after),
                answers: vec![answer.clone()],
            });
        }
        all
    }

    pub(super) fn validate(&self, index: usize, vocab: usize) -> Result<()> {
        let wrong = |message: String| {
            Err(PolicyError::setting(
                "training",
                format!("sample {index}: {message}"),
            ))
        };
        if self.prompt.is_empty() {
            return wrong("the prompt is empty".into());
        }
        if self.answers.is_empty() {
            return wrong("there is no answer".into());
        }
        if self.answers.iter().any(|a| a.answer.is_empty()) {
            return wrong("an answer is empty".into());
        }
        let answers = self
            .answers
            .iter()
            .flat_map(|a| a.query.iter().chain(&a.answer));
        match self
            .prompt
            .iter()
            .chain(answers)
            .find(|id| **id as usize >= vocab)
        {
            Some(id) => wrong(format!(
                "token id {id} is outside the vocabulary of {vocab}"
            )),
            None => Ok(()),
        }
    }

    /// All ids with marks between them, for a fingerprint.
    pub(super) fn bytes(&self) -> impl Iterator<Item = u8> + '_ {
        let list = |ids: &[u32]| {
            let len = ids.len() as u32;
            std::iter::once(len)
                .chain(ids.to_vec())
                .flat_map(u32::to_le_bytes)
        };
        let answers = self.answers.iter();
        list(&self.prompt).chain(answers.flat_map(move |a| list(&a.query).chain(list(&a.answer))))
    }
}

/// How a model is asked for a text once more, for labels by reconstruction: a unit is worth what the repetition
/// pays it (KVzip, arXiv 2505.23416 §3.2).
///
/// The text is repeated in pieces, each by itself with only the text before it, so that an answer's softmax goes
/// over about as much for all units, however long the text: over the whole text and at most a piece.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Repetition {
    /// Token ids that ask for the first piece.
    pub first: Vec<u32>,
    /// Token ids before and after the last tokens of a piece, which ask for the one that follows it.
    pub next: [Vec<u32>; 2],
    /// How many of these tokens are quoted. KVzip: 8.
    pub quoted: usize,
    /// Tokens of a piece. KVzip: 2,048.
    pub piece: usize,
}

impl Repetition {
    /// The sample whose answers are the tokens `text` of `prompt`, all of them.
    ///
    /// Pieces are repeated as the ids that they are in the prompt, so that no seam is tokenised anew.
    ///
    /// # Errors
    /// [`PolicyError::Setting`] for pieces of no tokens, and for tokens that the prompt does not have.
    pub fn sample(&self, prompt: &[u32], text: Range<usize>) -> Result<Sample> {
        let wrong = |message: &str| Err(PolicyError::setting("training", message));
        if self.piece == 0 {
            return wrong("a piece to be repeated has at least one token");
        }
        if text.is_empty() || text.end > prompt.len() {
            return wrong("what is to be repeated is empty, or more than the prompt has");
        }
        let (all, start) = (&prompt[text.clone()], text.start);
        let pieces = all.chunks(self.piece).enumerate();
        let answers = pieces.map(|(number, piece)| {
            let before = start + number * self.piece;
            let quoted = &prompt[before.saturating_sub(self.quoted).max(start)..before];
            let [open, close] = &self.next;
            Answer {
                query: match number {
                    0 => self.first.clone(),
                    _ => [open, quoted, close].concat(),
                },
                answer: piece.to_vec(),
            }
        });
        Ok(Sample {
            prompt: prompt.to_vec(),
            answers: answers.collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_repeated_in_pieces_and_whole() {
        let repetition = Repetition {
            first: vec![90],
            next: [vec![91], vec![92, 93]],
            quoted: 2,
            piece: 3,
        };
        let prompt: Vec<u32> = (0..9).collect();
        let sample = repetition.sample(&prompt, 1..8).unwrap();
        assert_eq!(sample.prompt, prompt);
        let answers = [
            (vec![90], vec![1, 2, 3]),
            (vec![91, 2, 3, 92, 93], vec![4, 5, 6]),
            (vec![91, 5, 6, 92, 93], vec![7]),
        ];
        let due = answers.map(|(query, answer)| Answer { query, answer });
        assert_eq!(sample.answers, due);
        // Nothing is quoted from before the text.
        let short = Repetition {
            piece: 1,
            ..repetition.clone()
        };
        let sample = short.sample(&prompt, 4..6).unwrap();
        assert_eq!(sample.answers[1].query, [91, 4, 92, 93]);
        let none = Repetition {
            piece: 0,
            ..repetition.clone()
        };
        assert!(none.sample(&prompt, 1..8).is_err());
        for bad in [0..0, 3..10] {
            assert!(repetition.sample(&prompt, bad).is_err());
        }
    }

    fn answer(query: &[u32]) -> Answer {
        Answer {
            query: query.to_vec(),
            answer: vec![9],
        }
    }

    #[test]
    fn the_query_stands_at_the_start_for_each_answer() {
        let sample = Sample {
            prompt: vec![1, 2, 3],
            answers: vec![answer(&[]), answer(&[5, 6, 7]), answer(&[8])],
        };
        let all = sample.query_aware(2, 1);
        let prompts: Vec<&[u32]> = all.iter().map(|s| s.prompt.as_slice()).collect();
        assert_eq!(prompts, [&[1, 2, 3][..], &[1, 6, 7, 2, 3], &[1, 8, 2, 3]]);
        assert!(all.iter().all(|s| s.answers.len() == 1));
        assert_eq!(sample.tokens(), 3 + 3 + 4);
    }

    #[test]
    fn impossible_samples_are_refused() {
        let good = Sample {
            prompt: vec![1],
            answers: vec![answer(&[2])],
        };
        good.validate(0, 10).unwrap();
        let mut none = good.clone();
        none.answers.clear();
        let mut empty = good.clone();
        empty.answers[0].answer.clear();
        let mut no_prompt = good.clone();
        no_prompt.prompt.clear();
        for bad in [none, empty, no_prompt] {
            assert!(
                bad.validate(3, 10)
                    .unwrap_err()
                    .to_string()
                    .contains("sample 3")
            );
        }
        assert!(good.validate(0, 9).is_err());
    }
}
