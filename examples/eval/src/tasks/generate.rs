//! Seeded generators of the built-in tasks.

use super::{
    Frame, Kind, Query, Ruler, Task, drawn,
    words::{self, Template, Value},
};
use crate::{
    Error, Result,
    corpus::{Essays, OnProgress},
};
use locret_models::FetchOptions;
use rand::{
    RngExt, SeedableRng,
    seq::{IndexedRandom, SliceRandom},
};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// How many tokens a text has; control tokens in it count as one.
pub type Count<'a> = &'a dyn Fn(&str) -> Result<usize>;

/// What tasks are made of.
#[derive(Debug, Clone)]
pub struct Texts {
    /// Essays.
    pub essays: Essays,
    /// What RULER's tasks are made of.
    pub ruler: Option<Ruler>,
}

impl Texts {
    /// What these kinds need, fetched unless the cache has it.
    ///
    /// # Errors
    /// As [`Essays::for_evaluation`] and [`Ruler::fetch`].
    pub fn fetch(kinds: &[Kind], options: &FetchOptions, shown: OnProgress<'_>) -> Result<Self> {
        let has = |kind: Kind| kinds.contains(&kind);
        let questions = [has(Kind::Qa1), has(Kind::Qa2)];
        let ruler = kinds.iter().any(|kind| Kind::RULER.contains(kind));
        Ok(Self {
            essays: Essays::for_evaluation(options, shown)?,
            ruler: match ruler {
                true => Some(Ruler::fetch(questions, options, shown)?),
                false => None,
            },
        })
    }
}

/// Which tasks to make.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// Kinds of task.
    pub kinds: Vec<Kind>,
    /// Tokens of a context (perplexity, text: of context and answer). No task has more, and few have
    /// more than a sentence less.
    pub tokens: usize,
    /// Contexts of each kind.
    pub samples: usize,
    /// Seed. A sample depends on it, its kind and its number, and on nothing else.
    pub seed: u64,
}

impl Recipe {
    /// The tasks, kind by kind.
    ///
    /// # Errors
    /// [`Error::Usage`] if a kind does not fit into so few tokens, and for RULER's kinds, which
    /// [`generate_from`](Self::generate_from) makes; those of `count`.
    pub fn generate(&self, frame: &Frame, essays: &Essays, count: Count<'_>) -> Result<Vec<Task>> {
        self.make(frame, essays, None, count)
    }

    /// The tasks, kind by kind.
    ///
    /// # Errors
    /// [`Error::Usage`] if a kind does not fit into so few tokens, or its texts are not there; those of
    /// `count`.
    pub fn generate_from(
        &self,
        frame: &Frame,
        texts: &Texts,
        count: Count<'_>,
    ) -> Result<Vec<Task>> {
        self.make(frame, &texts.essays, texts.ruler.as_ref(), count)
    }

    fn make(
        &self,
        frame: &Frame,
        essays: &Essays,
        ruler: Option<&Ruler>,
        count: Count<'_>,
    ) -> Result<Vec<Task>> {
        let mut tasks = Vec::with_capacity(self.kinds.len() * self.samples);
        for kind in &self.kinds {
            for sample in 0..self.samples {
                let (context, queries) = match kind.ruler() {
                    None => self.built_in(*kind, sample, frame, essays, count)?,
                    Some(own) => {
                        let ruler = ruler.ok_or_else(|| {
                            Error::Usage(format!("the texts of RULER, for {kind}, are not there"))
                        })?;
                        // Numbers of one seed are apart from those of all others that are likely.
                        let number = (self.seed as u32).wrapping_mul(100_003);
                        let number = number.wrapping_add(sample as u32);
                        own.make(ruler, frame, self.tokens, number, count)?
                    }
                };
                tasks.push(Task {
                    id: format!("{kind}-{}-s{}-{sample:03}", self.tokens, self.seed),
                    task: kind.name().into(),
                    context,
                    queries,
                });
            }
        }
        Ok(tasks)
    }

    fn built_in(
        &self,
        kind: Kind,
        sample: usize,
        frame: &Frame,
        essays: &Essays,
        count: Count<'_>,
    ) -> Result<(String, Vec<Query>)> {
        // Distinct streams for every kind and sample, whatever else is generated.
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(((kind as u64) << 32) | sample as u64);
        let mut maker = Maker {
            kind,
            tokens: self.tokens,
            frame,
            essays,
            count,
            rng,
        };
        maker.make()
    }
}

/// Makes one sample.
struct Maker<'a> {
    kind: Kind,
    tokens: usize,
    frame: &'a Frame,
    essays: &'a Essays,
    count: Count<'a>,
    rng: ChaCha8Rng,
}

/// A filled-in template.
struct Planted {
    statement: String,
    question: String,
    opening: String,
    answer: String,
}

/// Facts of a context.
const FACTS: usize = 5;
/// Needles of a context.
const NEEDLES: usize = 4;
/// Pairs of a JSON object, and how many are asked for.
const PAIRS: (usize, usize) = (4, 2);
/// Turns of a chat.
const TURNS: usize = 4;
/// Tokens of the answer in a perplexity task, if that is at most a quarter of all.
const CONTINUATION: usize = 512;
/// Tokens of the context in a task that predicts a whole text.
const BEGINNING: usize = 128;

impl Maker<'_> {
    fn make(&mut self) -> Result<(String, Vec<Query>)> {
        match self.kind {
            Kind::Passkey => self.in_filler(&words::PASSKEY),
            Kind::Number => self.in_filler(&words::NUMBER),
            Kind::KeyValue => self.key_value(),
            Kind::Needle => {
                let templates = vec![&words::NEEDLE; NEEDLES];
                self.in_essays(&templates)
            }
            Kind::Facts => {
                let templates = self.some(words::FACTS, FACTS);
                self.in_essays(&templates)
            }
            Kind::MultiTurn => self.multi_turn(),
            Kind::Perplexity => self.continuation(CONTINUATION.min(self.tokens / 4)),
            Kind::Text => self.continuation(self.tokens.saturating_sub(BEGINNING)),
            Kind::KvRetrieval | Kind::MathFind | Kind::CodeRun => {
                let (frame, tokens, count) = (self.frame, self.tokens, self.count);
                let made = drawn::make(self.kind, frame, tokens, &self.rng, count)?;
                made.ok_or_else(|| self.too_short(2 * tokens))
            }
            Kind::EssayPasskey => self.in_essays(&[&words::PASSKEY]),
            other => Err(Error::Usage(format!("{other} is one of RULER's"))),
        }
    }

    /// `n` different elements of `list` in random order.
    fn some<T>(&mut self, list: &'static [T], n: usize) -> Vec<&'static T> {
        let mut all: Vec<&T> = list.iter().collect();
        all.shuffle(&mut self.rng);
        all.truncate(n);
        all
    }

    fn digits(&mut self, n: usize) -> String {
        (0..n)
            .map(|i| {
                let first = u8::from(i == 0);
                char::from(b'0' + self.rng.random_range(first..10))
            })
            .collect()
    }

    /// Fills templates in; no two of them get the same name or thing.
    fn plant(&mut self, templates: &[&Template]) -> Vec<Planted> {
        let names = self.some(words::NAMES, templates.len());
        let mut things: Vec<&str> = Vec::new();
        let mut planted = Vec::with_capacity(templates.len());
        for (template, who) in templates.iter().zip(names) {
            let left: Vec<&str> = (template.things.iter().copied())
                .filter(|thing| !things.contains(thing))
                .collect();
            let what = left.choose(&mut self.rng).copied().unwrap_or_default();
            things.push(what);
            let value = match template.value {
                Value::Digits(n) => self.digits(n),
                Value::Word(list) => {
                    let i = self.rng.random_range(0..list.len());
                    list[i].to_owned()
                }
            };
            let fill = |text: &str| {
                text.replace("{who}", who)
                    .replace("{what}", what)
                    .replace("{value}", &value)
            };
            planted.push(Planted {
                statement: fill(template.statement),
                question: fill(template.question),
                opening: fill(template.opening),
                answer: match template.value {
                    Value::Digits(_) => value,
                    Value::Word(_) => format!(" {value}"),
                },
            });
        }
        planted
    }

    fn queries(&self, planted: &[Planted]) -> Vec<Query> {
        let query =
            |p: &Planted| Query::exact(self.frame.query(&p.question, &p.opening), &p.answer);
        planted.iter().map(query).collect()
    }

    fn too_short(&self, least: usize) -> Error {
        Error::Usage(format!(
            "a {} task does not fit into {} tokens: it takes at least {least}",
            self.kind, self.tokens
        ))
    }

    /// Repeated filler with one statement in it.
    fn in_filler(&mut self, template: &Template) -> Result<(String, Vec<Query>)> {
        let planted = self.plant(&[template]);
        let head = format!("{}{}\n", self.frame.open, words::FILLER_INTRODUCTION);
        let filler = format!("\n{}", words::FILLER);
        let statement = format!("\n{}", planted[0].statement);
        let fixed = (self.count)(&head)? + (self.count)(&statement)?;
        let each = (self.count)(&filler)?.max(1);
        let mut n = self.tokens.saturating_sub(fixed) / each;
        loop {
            if n == 0 {
                return Err(self.too_short(fixed + each));
            }
            let before = self.rng.random_range(0..=n);
            let text = [
                head.clone(),
                filler.repeat(before),
                statement.clone(),
                filler.repeat(n - before),
            ]
            .concat();
            // Counts of parts need not add up to the count of the whole.
            if (self.count)(&text)? <= self.tokens {
                return Ok((text, self.queries(&planted)));
            }
            n -= 1;
        }
    }

    fn in_essays(&mut self, templates: &[&Template]) -> Result<(String, Vec<Query>)> {
        let planted = self.plant(templates);
        let statements: Vec<String> = (planted.iter())
            .map(|p| format!(" {}", p.statement))
            .collect();
        let context = self.essays_with(&statements)?;
        Ok((context, self.queries(&planted)))
    }

    fn key_value(&mut self) -> Result<(String, Vec<Query>)> {
        let (all, asked) = PAIRS;
        let keys = self.some(words::KEYS, all);
        let pairs: Vec<(&str, String)> = keys.into_iter().map(|k| (*k, self.digits(5))).collect();
        let inner: Vec<String> = (pairs.iter())
            .map(|(key, value)| format!("\"{key}\": {value}"))
            .collect();
        let object = format!(
            "\n\n{}\n{{{}}}",
            words::PAIRS_INTRODUCTION,
            inner.join(", ")
        );
        let context = self.essays_with(&[object])?;
        let mut order: Vec<usize> = (0..all).collect();
        order.shuffle(&mut self.rng);
        let queries = order.into_iter().take(asked).map(|i| {
            let (key, value) = &pairs[i];
            let fill = |text: &str| text.replace("{what}", key);
            let opening = fill(words::PAIRS_OPENING);
            Query::exact(
                self.frame.query(&fill(words::PAIRS_QUESTION), &opening),
                value,
            )
        });
        let queries = queries.collect();
        Ok((context, queries))
    }

    /// Essays with `planted` texts between their sentences, one in every equal part.
    fn essays_with(&mut self, planted: &[String]) -> Result<String> {
        let head = format!("{}{}\n\n", self.frame.open, words::ESSAY_INTRODUCTION);
        let mut fixed = (self.count)(&head)?;
        for text in planted {
            fixed += (self.count)(text)?;
        }
        let room = self.tokens.saturating_sub(fixed);
        let mut pieces = self.excerpt(room)?;
        loop {
            if pieces.len() < planted.len().max(1) {
                return Err(self.too_short(fixed + 64));
            }
            let text = self.strew(&head, &pieces, planted);
            if (self.count)(&text)? <= self.tokens {
                return Ok(text);
            }
            pieces.pop();
        }
    }

    /// `planted[i]` somewhere in the `i`-th of as many equal parts.
    fn strew(&mut self, head: &str, pieces: &[String], planted: &[String]) -> String {
        let n = pieces.len();
        let part = |i: usize| i * n / planted.len().max(1);
        // The text never begins with something planted.
        let places: Vec<usize> = (0..planted.len())
            .map(|i| {
                self.rng
                    .random_range(part(i).max(1)..part(i + 1).max(2).min(n + 1))
            })
            .collect();
        let mut text = head.to_owned();
        let mut next = 0;
        for (i, piece) in pieces.iter().enumerate() {
            while places.get(next) == Some(&i) {
                text += &planted[next];
                next += 1;
            }
            text += if i == 0 { piece.trim_start() } else { piece };
        }
        for late in &planted[next..] {
            text += late;
        }
        text
    }

    /// Consecutive sentences from a random place, of at most `tokens` tokens together.
    fn excerpt(&mut self, tokens: usize) -> Result<Vec<String>> {
        let start = self.rng.random_range(0..self.essays.sentences().len());
        self.excerpt_from(start, tokens)
    }

    fn excerpt_from(&self, start: usize, tokens: usize) -> Result<Vec<String>> {
        let mut left = tokens;
        let mut pieces = Vec::new();
        for piece in self.essays.from(start) {
            match left.checked_sub((self.count)(piece)?.max(1)) {
                Some(rest) => left = rest,
                None => break,
            }
            pieces.push(piece.to_owned());
        }
        Ok(pieces)
    }

    fn multi_turn(&mut self) -> Result<(String, Vec<Query>)> {
        let frame = self.frame.dialogue();
        let remarks = self.some(words::REMARKS, TURNS);
        let planted = self.plant(&remarks);
        let turns: Vec<(String, String)> = (0..TURNS)
            .map(|i| {
                let request = words::PASSAGE_REQUESTS[i % words::PASSAGE_REQUESTS.len()];
                let reply = words::ACKNOWLEDGEMENTS[i % words::ACKNOWLEDGEMENTS.len()];
                (
                    format!("{request}\n\n"),
                    format!(
                        "\n\n{}{}{reply}{}",
                        planted[i].statement, frame.to_answer, frame.to_user
                    ),
                )
            })
            .collect();
        let mut fixed = (self.count)(&frame.open)?;
        for (request, reply) in &turns {
            fixed += (self.count)(request)? + (self.count)(reply)?;
        }
        let start = self.rng.random_range(0..self.essays.sentences().len());
        let mut each = self.tokens.saturating_sub(fixed) / TURNS;
        loop {
            let mut text = frame.open.clone();
            let mut at = start;
            for (request, reply) in &turns {
                let passage = self.excerpt_from(at, each)?;
                if passage.is_empty() {
                    return Err(self.too_short(fixed + 64 * TURNS));
                }
                at += passage.len();
                text += request;
                text += passage.concat().trim_start();
                text += reply;
            }
            if (self.count)(&text)? <= self.tokens {
                let query = |p: &Planted| {
                    let parts = [&p.question, &frame.to_answer, &p.opening];
                    Query::exact(parts.map(String::as_str).concat(), &p.answer)
                };
                return Ok((text, planted.iter().map(query).collect()));
            }
            each = each.saturating_sub(1);
        }
    }

    fn continuation(&mut self, last: usize) -> Result<(String, Vec<Query>)> {
        let start = self.rng.random_range(0..self.essays.sentences().len());
        let begin = &self.frame.begin;
        let room = (self.tokens - last).saturating_sub((self.count)(begin)?);
        let mut pieces = self.excerpt_from(start, room)?;
        let answer = self.excerpt_from(start + pieces.len(), last)?;
        if pieces.is_empty() || answer.is_empty() {
            return Err(self.too_short(512));
        }
        let answer = answer.concat();
        // Sentences are dropped from the beginning, so that the answer goes on with the text.
        loop {
            let context = format!("{begin}{}", pieces.concat().trim_start());
            if (self.count)(&context)? + last <= self.tokens {
                return Ok((context, vec![Query::exact("", answer)]));
            }
            pieces.remove(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stand-in for a tokenizer: words, and every other character on its own.
    fn count(text: &str) -> Result<usize> {
        let mut n = 0;
        let mut in_word = false;
        for c in text.chars() {
            let letter = c.is_alphabetic();
            n += usize::from(!(c.is_whitespace() || letter && in_word));
            in_word = letter;
        }
        Ok(n)
    }

    fn essays() -> Essays {
        let essay = |k: usize| {
            let sentences = (0..120).map(|i| {
                let gap = if i % 7 == 6 { "\n\n" } else { " " };
                format!("Sentence {i} of essay {k} says that work and play are alike.{gap}")
            });
            (format!("essay-{k}"), sentences.collect::<String>())
        };
        Essays::from_texts((0..3).map(essay)).unwrap()
    }

    fn frames() -> [Frame; 2] {
        let render = |turns: &[(&str, &str)]| -> Result<String> {
            let turns = turns.iter().map(|(r, c)| format!("<|{r}|>{c}<|end|>"));
            Ok(format!("{}<|assistant|>", turns.collect::<String>()))
        };
        [
            Frame::plain("<s>"),
            Frame::chat("<s>", render).unwrap().unwrap(),
        ]
    }

    fn recipe(tokens: usize, seed: u64) -> Recipe {
        Recipe {
            kinds: Kind::ALL.to_vec(),
            tokens,
            samples: 3,
            seed,
        }
    }

    #[test]
    fn lengths_are_kept_and_answers_stand_in_the_context() {
        let essays = essays();
        for frame in frames() {
            for tokens in [600, 2000, 9000] {
                let tasks = recipe(tokens, 1).generate(&frame, &essays, &count).unwrap();
                assert_eq!(tasks.len(), Kind::ALL.len() * 3);
                for task in &tasks {
                    let mut n = count(&task.context).unwrap();
                    if task.is_continuation() {
                        n += count(&task.queries[0].answer).unwrap();
                    }
                    assert!(n <= tokens && n + 80 > tokens, "{}: {n}", task.id);
                    for q in &task.queries {
                        assert_ne!(q.answer, "");
                        if !q.query.is_empty() {
                            let answer = q.answer.trim_start();
                            assert!(task.context.contains(answer), "{}", task.id);
                            assert!(!q.query.contains(answer), "{}", task.id);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_seed_gives_the_same_tasks_and_another_one_others() {
        let (essays, frame) = (essays(), Frame::plain(""));
        let make = |seed| {
            recipe(1000, seed)
                .generate(&frame, &essays, &count)
                .unwrap()
        };
        let tasks = make(7);
        assert_eq!(tasks, make(7));
        let other = make(8);
        for (a, b) in tasks.iter().zip(&other) {
            assert_ne!(a.context, b.context, "{}", a.id);
            assert_ne!(a.id, b.id);
        }
        // Ids and contexts are unique, and a sample does not depend on what else is made.
        let mut contexts: Vec<&str> = tasks.iter().map(|t| t.context.as_str()).collect();
        contexts.sort_unstable();
        contexts.dedup();
        assert_eq!(contexts.len(), tasks.len());
        let alone = Recipe {
            kinds: vec![Kind::Facts],
            samples: 1,
            ..recipe(1000, 7)
        };
        let alone = alone.generate(&frame, &essays, &count).unwrap();
        let same = tasks.iter().find(|t| t.id == alone[0].id).unwrap();
        assert_eq!(&alone[0], same);
    }

    #[test]
    fn each_question_of_a_context_has_one_answer() {
        let (essays, frame) = (essays(), Frame::plain(""));
        for task in recipe(1500, 3).generate(&frame, &essays, &count).unwrap() {
            let mut queries: Vec<&str> = task.queries.iter().map(|q| q.query.as_str()).collect();
            queries.sort_unstable();
            queries.dedup();
            assert_eq!(queries.len(), task.queries.len(), "{}", task.id);
        }
    }

    #[test]
    fn planted_facts_are_spread_over_the_context() {
        let (essays, frame) = (essays(), Frame::plain(""));
        let facts = Recipe {
            kinds: vec![Kind::Facts],
            samples: 10,
            ..recipe(3000, 5)
        };
        let mut quarters = [0usize; 4];
        for task in facts.generate(&frame, &essays, &count).unwrap() {
            for q in &task.queries {
                let at = task.context.find(q.answer.trim_start()).unwrap();
                quarters[(4 * at / task.context.len()).min(3)] += 1;
            }
        }
        assert!(quarters.iter().all(|n| *n >= 5), "{quarters:?}");
    }

    #[test]
    fn the_continuation_follows_the_context_in_the_text() {
        let (essays, frame) = (essays(), Frame::plain(""));
        let one = Recipe {
            kinds: vec![Kind::Perplexity],
            ..recipe(800, 2)
        };
        for task in one.generate(&frame, &essays, &count).unwrap() {
            let all: String = essays.from(0).take(2 * 360).collect();
            let text = format!("{}{}", task.context, task.queries[0].answer);
            assert!(all.contains(text.trim_start()), "{}", task.id);
        }
    }

    #[test]
    fn too_few_tokens_are_an_error_and_names_are_checked() {
        let (essays, frame) = (essays(), Frame::plain(""));
        for kind in Kind::ALL {
            let recipe = Recipe {
                kinds: vec![kind],
                ..recipe(8, 1)
            };
            let error = recipe.generate(&frame, &essays, &count).unwrap_err();
            assert!(error.to_string().contains(kind.name()), "{error}");
            assert_eq!(kind.name().parse::<Kind>().unwrap(), kind);
        }
        assert!("pass-key".parse::<Kind>().is_err());
    }
}
