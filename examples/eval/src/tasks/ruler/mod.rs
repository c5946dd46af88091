//! RULER's thirteen tasks (arXiv 2404.06654), made here: needles, chains of variables, counted words, and
//! real questions among real documents.
//!
//! Prompts, noise and essays come from the authors' own package, words from that which they take them from
//! ([`Ruler::fetch`]). A sample is drawn as their generators draw it, and has their text for the same seed
//! and size (`golden/ruler.py`), but for where essays are cut into sentences: at every `.`, `?` and `!`
//! before a space, where theirs have a trained model. Unlike theirs each sample has a seed of its own, and is
//! as large as fits.
//!
//! Questions on documents are asked on every fourth article of SQuAD and on every eighth puzzle of HotpotQA,
//! with no others among the documents: these are kept out of what heads are trained on.

mod prompts;
mod python;
mod sources;
#[cfg(test)]
mod tests;
mod text;
mod words;

pub use sources::Ruler;

use super::{Count, Frame, Judge, Query, Rule};
use crate::{Error, Result};
use sources::Inputs;
use text::{Haystack, Needles, Type};

/// What kind of sample a task has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    Needles(Needles),
    Variables,
    CommonWords,
    FrequentWords,
    /// SQuAD.
    Articles,
    /// HotpotQA.
    Puzzles,
}

/// One of RULER's tasks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Kind(Shape);

const fn needles(haystack: Haystack, keys: Type, values: Type, counts: [usize; 3]) -> Kind {
    Kind(Shape::Needles(Needles {
        haystack,
        keys,
        values,
        counts,
    }))
}

/// The tasks in the order of [`super::Kind::RULER`].
pub(super) const KINDS: [Kind; 13] = [
    needles(Haystack::Filler, Type::Words, Type::Numbers, [1, 1, 1]),
    needles(Haystack::Essays, Type::Words, Type::Numbers, [1, 1, 1]),
    needles(Haystack::Essays, Type::Words, Type::Uuids, [1, 1, 1]),
    needles(Haystack::Essays, Type::Words, Type::Numbers, [4, 1, 1]),
    needles(Haystack::Needles, Type::Words, Type::Numbers, [1, 1, 1]),
    needles(Haystack::Needles, Type::Uuids, Type::Uuids, [1, 1, 1]),
    needles(Haystack::Essays, Type::Words, Type::Numbers, [1, 4, 1]),
    needles(Haystack::Essays, Type::Words, Type::Numbers, [1, 1, 4]),
    Kind(Shape::Variables),
    Kind(Shape::CommonWords),
    Kind(Shape::FrequentWords),
    Kind(Shape::Articles),
    Kind(Shape::Puzzles),
];

/// A sample's text in parts.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Sample {
    /// Everything up to the end of what is to be read.
    context: String,
    /// What follows it.
    question: String,
    /// How the answer begins.
    opening: String,
    references: Vec<String>,
    rule: Rule,
    /// Tokens that are generated.
    generate: usize,
}

impl Sample {
    /// The text as the original has it.
    fn whole(&self) -> String {
        [self.context.as_str(), &self.question, &self.opening].concat()
    }
}

impl Kind {
    /// The context and the question of a sample of at most `tokens` tokens, with what is generated.
    ///
    /// # Errors
    /// [`Error::Usage`] if not even the smallest sample fits, and those of `count`.
    pub(super) fn make(
        self,
        ruler: &Ruler,
        frame: &Frame,
        tokens: usize,
        number: u32,
        count: Count<'_>,
    ) -> Result<(String, Vec<Query>)> {
        let inputs = ruler.inputs();
        let maker = Maker {
            shape: self.0,
            inputs,
            frame,
            tokens,
            seed: number,
            count,
        };
        let sample = match self.0 {
            Shape::Articles | Shape::Puzzles => maker.question()?,
            Shape::Variables => {
                let fits = |size: usize| {
                    let example = text::example(inputs, number, size);
                    let generate = inputs.prompts.variables.generate;
                    Ok(count(&example)? + generate <= text::EXAMPLE)
                };
                // The original tries multiples of five.
                let example = 5 * largest(1, 100, &|fives| fits(5 * fives))?.unwrap_or(1);
                maker.largest(6, usize::MAX, &|size| {
                    text::variables(inputs, number, [example, size])
                })?
            }
            Shape::Needles(task) => {
                let planted = task.counts[0].max(task.counts[2]) * task.counts[1];
                let most = match task.haystack {
                    Haystack::Essays => inputs.essays.len(),
                    _ => usize::MAX,
                };
                maker.largest(planted, most, &|size| {
                    text::needles(inputs, &task, number, size)
                })?
            }
            Shape::CommonWords => maker.largest(11, inputs.words.all.len(), &|size| {
                text::common_words(inputs, tokens, number, size)
            })?,
            Shape::FrequentWords => maker.largest(50, usize::MAX, &|size| {
                text::frequent_words(inputs, tokens, number, size)
            })?,
        };
        sample.map(|sample| maker.task(sample)).ok_or_else(|| {
            Error::Usage(format!(
                "a sample of RULER does not fit into {tokens} tokens"
            ))
        })
    }
}

struct Maker<'a> {
    shape: Shape,
    inputs: &'a Inputs,
    frame: &'a Frame,
    tokens: usize,
    seed: u32,
    count: Count<'a>,
}

/// The largest size from `least` to `most` that `fits`, if larger ones are longer.
fn largest(
    least: usize,
    most: usize,
    fits: &dyn Fn(usize) -> Result<bool>,
) -> Result<Option<usize>> {
    if !fits(least)? {
        return Ok(None);
    }
    let (mut good, mut bad) = (least, None);
    while good < most && bad != Some(good + 1) {
        let next = match bad {
            Some(bad) => good + (bad - good) / 2,
            None => good.saturating_mul(2).max(1).min(most),
        };
        match fits(next)? {
            true => good = next,
            false => bad = Some(next),
        }
    }
    Ok(Some(good))
}

impl Maker<'_> {
    /// Texts around a sample: what is read, and what follows it.
    fn around(&self, sample: &Sample) -> [String; 2] {
        let answer = match self.frame.is_chat {
            true => self.frame.to_answer.as_str(),
            false => "",
        };
        [
            [self.frame.open.as_str(), &sample.context].concat(),
            [sample.question.as_str(), answer, &sample.opening].concat(),
        ]
    }

    fn fits(&self, sample: &Sample) -> Result<bool> {
        let mut tokens = sample.generate;
        for part in self.around(sample) {
            tokens += (self.count)(&part)?;
        }
        Ok(tokens <= self.tokens)
    }

    fn largest(
        &self,
        least: usize,
        most: usize,
        make: &dyn Fn(usize) -> Sample,
    ) -> Result<Option<Sample>> {
        let size = largest(least, most, &|size| self.fits(&make(size)))?;
        Ok(size.map(make))
    }

    /// A question among as many documents as fit; the next one, if those that it is about do not.
    fn question(&self) -> Result<Option<Sample>> {
        let set = self.inputs.questions(self.shape)?;
        let mut rng = python::Python::new(u64::from(self.seed) << 32 | 1);
        for _ in 0..set.questions.len().min(200) {
            let index = rng.below(set.questions.len());
            let least = set.questions[index].documents.len();
            let sample = self.largest(least, set.documents.len(), &|size| {
                text::questions(set, &self.inputs.prompts, self.seed, index, size)
            })?;
            if sample.is_some() {
                return Ok(sample);
            }
        }
        Ok(None)
    }

    fn task(&self, sample: Sample) -> (String, Vec<Query>) {
        let [context, query] = self.around(&sample);
        // What may follow, for its probability.
        let answer = match (self.shape, sample.rule) {
            (_, Rule::Any) => sample.references.first().cloned().unwrap_or_default(),
            (Shape::Variables, _) => sample.references.join(" "),
            _ => sample.references.join(", "),
        };
        let gap = if query.ends_with(' ') { "" } else { " " };
        let query = Query {
            query,
            answer: format!("{gap}{answer}"),
            judge: Some(Judge::new(sample.rule, sample.references, sample.generate)),
        };
        (context, vec![query])
    }
}
