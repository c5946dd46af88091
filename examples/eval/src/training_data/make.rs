//! The seeded generator.

use super::{
    TrainingAnswer, TrainingCorpus, TrainingText,
    corpus::Passage,
    words::{self, Fact, Of},
};
use crate::{
    Error, Result,
    tasks::{Count, Frame},
};
use rand::{RngExt, SeedableRng, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;
use std::{collections::HashSet, fmt, str::FromStr};

/// What the built-in training texts are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Recipe {
    /// Prose with facts strewn in, tables, repeated filler, chats, and all of
    /// [`Plain`](Self::Plain).
    #[default]
    Builtin,
    /// Nothing planted: real texts with their own continuation, quotes and repetitions, and with
    /// questions that people asked about them.
    Plain,
    /// Nothing planted, nothing asked: ordinary texts of many kinds, to be repeated as a whole
    /// ([`tokenise`](super::tokenise)).
    Reconstruct,
}

impl FromStr for Recipe {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "builtin" => Ok(Self::Builtin),
            "plain" => Ok(Self::Plain),
            "reconstruct" => Ok(Self::Reconstruct),
            _ => Err(Error::Usage(format!(
                "unknown recipe {s:?}: there are builtin, plain, reconstruct"
            ))),
        }
    }
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Builtin => "builtin",
            Self::Plain => "plain",
            Self::Reconstruct => "reconstruct",
        })
    }
}

/// One kind of text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Facts,
    Hidden,
    Table,
    Chat,
    Article,
    Puzzle,
    Prose,
    /// Passages, questions and answers.
    Asked,
    Code,
    Languages,
    Conversation,
    /// A table alone.
    Rows,
    Log,
    List,
}

/// The kinds of text with planted statements, in turn.
const PLANTED: &[Kind] = &[Kind::Facts, Kind::Chat, Kind::Hidden, Kind::Table];

impl Recipe {
    /// The kinds in turn, by their share.
    fn kinds(self) -> &'static [Kind] {
        use Kind::{
            Article, Asked, Chat, Code, Conversation, Facts, Hidden, Languages, List, Log, Prose,
            Puzzle, Rows, Table,
        };
        match self {
            Self::Builtin => &[
                Facts, Chat, Facts, Article, Hidden, Facts, Chat, Prose, Facts, Table, Facts,
                Puzzle,
            ],
            Self::Plain => &[Prose, Article, Puzzle],
            Self::Reconstruct => &[
                Prose,
                Code,
                Article,
                Rows,
                Puzzle,
                Conversation,
                Prose,
                Log,
                Asked,
                Code,
                Languages,
                List,
            ],
        }
    }
}

/// Shortest and longest text in tokens; short ones are more frequent.
const LENGTHS: (usize, usize) = (700, 2800);

/// The same where texts are repeated: none is so short that its labels would be of another scale.
const REPEATED: (usize, usize) = (750, 2800);

/// Tokens of a continuation.
const CONTINUATION: usize = 64;

/// Makes `count` training texts. Number `i` depends on the seed, the recipe, `planted`, `i`, and nothing else.
///
/// `planted` is the share of texts with planted statements and questions about them among those of
/// [`Recipe::Reconstruct`]; the other recipes have what they have. `frame` has the model's chat turns; some of the texts are plain all the same. `tokens` counts
/// a text's tokens.
///
/// # Errors
/// Those of `tokens`; [`Error::Usage`] for a corpus that is too small.
pub fn generate(
    recipe: Recipe,
    planted: f64,
    count: usize,
    seed: u64,
    corpus: &TrainingCorpus,
    frame: &Frame,
    tokens: Count<'_>,
) -> Result<Vec<TrainingText>> {
    if !(0.0..=1.0).contains(&planted) {
        return Err(Error::Usage("the share of planted texts is 0 to 1".into()));
    }
    let plain = Frame::plain(&frame.begin);
    let kinds = recipe.kinds();
    (0..count)
        .map(|i| {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(((recipe as u64) << 32) | i as u64);
            let so_far = |i: usize| (i as f64 * planted).floor() as usize;
            let kind = match recipe == Recipe::Reconstruct && so_far(i + 1) > so_far(i) {
                true => PLANTED[so_far(i) % PLANTED.len()],
                false => kinds[i % kinds.len()],
            };
            let (least, most) = match recipe {
                Recipe::Reconstruct => REPEATED,
                _ => LENGTHS,
            };
            let share: f64 = rng.random::<f64>().powf(1.5);
            let length = least + (share * (most - least) as f64) as usize;
            let frame = if rng.random_range(0..10) < 7 {
                frame
            } else {
                &plain
            };
            let mut maker = Maker {
                recipe,
                corpus,
                frame: frame.clone(),
                tokens,
                length,
                rng,
            };
            let made = match kind {
                Kind::Facts => maker.facts(),
                Kind::Hidden => maker.hidden(),
                Kind::Table => maker.table(),
                Kind::Chat => maker.chat(),
                Kind::Article => maker.article(),
                Kind::Puzzle => maker.puzzle(),
                Kind::Prose => maker.prose(),
                _ => maker.ordinary(kind).map(|text| TrainingText {
                    prompt: maker.frame.open.clone() + &text,
                    answers: Vec::new(),
                    opening: String::new(),
                }),
            };
            made.map(|mut text| {
                text.opening = maker.frame.open.clone();
                // Questions are asked about what was planted.
                if recipe == Recipe::Reconstruct && !PLANTED.contains(&kind) {
                    text.answers.clear();
                }
                text
            })
        })
        .collect()
}

pub(super) struct Maker<'a> {
    recipe: Recipe,
    pub(super) corpus: &'a TrainingCorpus,
    frame: Frame,
    tokens: Count<'a>,
    pub(super) length: usize,
    pub(super) rng: ChaCha8Rng,
}

/// A fact with its blanks filled in.
struct Planted {
    statement: String,
    question: String,
    opening: String,
    answer: String,
}

impl Maker<'_> {
    pub(super) fn count(&self, text: &str) -> Result<usize> {
        (self.tokens)(text)
    }

    pub(super) fn pick<'l>(&mut self, list: &[&'l str]) -> &'l str {
        list.choose(&mut self.rng).copied().unwrap_or_default()
    }

    fn person(&mut self) -> String {
        match self.rng.random_range(0..4) {
            0 => self.pick(words::ROLES).to_owned(),
            1 => self.pick(words::FIRST).to_owned(),
            _ => format!("{} {}", self.pick(words::FIRST), self.pick(words::FAMILY)),
        }
    }

    pub(super) fn digits(&mut self, least: usize, most: usize) -> String {
        let n = self.rng.random_range(least..=most);
        let first = self.rng.random_range(1..10u8);
        let rest = (1..n).map(|_| char::from(b'0' + self.rng.random_range(0..10u8)));
        std::iter::once(char::from(b'0' + first))
            .chain(rest)
            .collect()
    }

    pub(super) fn invented(&mut self) -> String {
        const ONSETS: &[&str] = &[
            "b", "br", "d", "dr", "f", "gl", "k", "kr", "l", "m", "n", "p", "r", "s", "t", "v", "z",
        ];
        const VOWELS: &[&str] = &["a", "e", "i", "o", "u", "ai", "ou"];
        const ENDS: &[&str] = &["n", "r", "l", "x", "s", "th", "nd", ""];
        let mut word = String::new();
        for _ in 0..self.rng.random_range(2..=3) {
            word += self.pick(ONSETS);
            word += self.pick(VOWELS);
        }
        word + self.pick(ENDS)
    }

    fn value(&mut self, of: Of) -> String {
        match of {
            Of::List(list) => self.pick(list).to_owned(),
            Of::Number(least, most) => self.digits(least, most),
            Of::Code => {
                let letter = |rng: &mut ChaCha8Rng| char::from(b'A' + rng.random_range(0..26u8));
                let letters: String = (0..2).map(|_| letter(&mut self.rng)).collect();
                format!("{letters}-{}", self.digits(3, 4))
            }
            Of::Invented => self.invented(),
            Of::Person => format!("{} {}", self.pick(words::FIRST), self.pick(words::FAMILY)),
            Of::Time => {
                let (h, m) = (self.rng.random_range(1..13), self.rng.random_range(0..60));
                format!("{h}:{m:02}")
            }
            Of::Date => {
                const MONTHS: &[&str] = &[
                    "January",
                    "February",
                    "March",
                    "April",
                    "May",
                    "June",
                    "July",
                    "August",
                    "September",
                    "October",
                    "November",
                    "December",
                ];
                format!("{} {}", self.pick(MONTHS), self.rng.random_range(1..29))
            }
        }
    }

    fn fill(&mut self, fact: &Fact) -> Planted {
        let (who, what) = (self.person(), self.pick(fact.what));
        let value = self.value(fact.value);
        let fill = |text: &str| {
            let text = text.replace("{who}", &who).replace("{what}", what);
            let text = text.replace("{value}", &value);
            let mut letters = text.chars();
            let first = letters.next().map(|c| c.to_uppercase().to_string());
            first.unwrap_or_default() + letters.as_str()
        };
        let opening = fill(fact.opening);
        let gap = if opening.ends_with([' ', '"']) {
            ""
        } else {
            " "
        };
        Planted {
            statement: fill(fact.statement),
            question: fill(fact.question),
            answer: format!("{gap}{value}"),
            opening,
        }
    }

    /// Up to `count` facts with different questions.
    fn some(&mut self, facts: &[Fact], count: usize) -> Vec<Planted> {
        let mut asked = HashSet::new();
        let mut all = Vec::new();
        for _ in 0..4 * count {
            if all.len() == count {
                break;
            }
            let Some(fact) = facts.choose(&mut self.rng) else {
                break;
            };
            let planted = self.fill(fact);
            if asked.insert(planted.question.clone()) {
                all.push(planted);
            }
        }
        all
    }

    fn ask(&self, planted: &Planted) -> TrainingAnswer {
        TrainingAnswer {
            query: self.frame.query(&planted.question, &planted.opening),
            answer: planted.answer.clone(),
        }
    }

    fn introduction(&mut self, list: &[&str]) -> String {
        if self.recipe == Recipe::Reconstruct {
            // All that is read is repeated.
            return self.frame.open.clone();
        }
        let text = self.pick(list);
        let gap = if text.is_empty() { "" } else { "\n\n" };
        format!("{}{text}{gap}", self.frame.open)
    }

    /// Consecutive sentences of the prose of about `tokens` tokens, and what follows them.
    fn excerpt(&mut self, tokens: usize) -> Result<(Vec<String>, String)> {
        let prose = &self.corpus.prose;
        let start = self.rng.random_range(0..prose.sentences().len());
        let mut all = prose.from(start);
        let mut take = |wanted: usize| -> Result<Vec<String>> {
            let (mut taken, mut n) = (Vec::new(), 0);
            while n < wanted {
                let Some(sentence) = all.next() else { break };
                n += (self.tokens)(sentence)?.max(1);
                taken.push(sentence.to_owned());
            }
            Ok(taken)
        };
        let text = take(tokens)?;
        let next = take(CONTINUATION)?;
        Ok((text, next.concat()))
    }

    /// Answers that any prose has: its own continuation and quotes.
    fn own(&mut self, sentences: &[String], next: String, quotes: usize) -> Vec<TrainingAnswer> {
        let mut all = vec![TrainingAnswer {
            query: String::new(),
            answer: next,
        }];
        for _ in 0..quotes {
            let Some(sentence) = sentences.choose(&mut self.rng) else {
                continue;
            };
            let sentence = sentence.trim();
            let words: Vec<&str> = sentence.split(' ').collect();
            if !(8..60).contains(&words.len()) {
                continue;
            }
            let start = words[..4].join(" ");
            let request = self.pick(words::QUOTES).replace("{start}", &start);
            all.push(TrainingAnswer {
                query: self.frame.query(&request, ""),
                answer: sentence.to_owned(),
            });
        }
        all
    }

    /// A passage of the text once more, from its first words on.
    fn repetition(&mut self, sentences: &[String]) -> Option<TrainingAnswer> {
        let at = self
            .rng
            .random_range(0..sentences.len().saturating_sub(2).max(1));
        let passage = sentences.get(at..at + 2)?.concat();
        let passage = passage.trim();
        let cut = passage.match_indices(' ').nth(4)?.0;
        Some(TrainingAnswer {
            query: format!("\n\n{}", &passage[..cut]),
            answer: passage[cut..].to_owned(),
        })
    }

    fn prose(&mut self) -> Result<TrainingText> {
        let introduction = self.introduction(words::INTRODUCTIONS);
        let (sentences, next) = self.excerpt(self.length)?;
        let mut answers = self.own(&sentences, next, 4);
        for _ in 0..3 {
            answers.extend(self.repetition(&sentences));
        }
        Ok(TrainingText {
            prompt: introduction + sentences.concat().trim_start(),
            answers,
            opening: String::new(),
        })
    }

    fn facts(&mut self) -> Result<TrainingText> {
        let introduction = self.introduction(words::INTRODUCTIONS);
        let (sentences, _) = self.excerpt(self.length)?;
        // More than an evaluation asks for at once: what singles them out is learned
        // from the share of a text that they are.
        let count = self.rng.random_range(6..=10);
        let planted = self.some(words::FACTS, count);
        let mut places: Vec<usize> = planted
            .iter()
            .map(|_| self.rng.random_range(0..sentences.len()))
            .collect();
        places.sort_unstable();
        let mut text = String::new();
        let mut due = planted.iter().zip(places).peekable();
        for (i, sentence) in sentences.iter().enumerate() {
            text += sentence;
            while let Some((fact, _)) = due.next_if(|(_, place)| *place == i) {
                text.push(' ');
                text += &fact.statement;
            }
        }
        Ok(TrainingText {
            prompt: introduction + text.trim_start(),
            answers: planted.iter().map(|p| self.ask(p)).collect(),
            opening: String::new(),
        })
    }

    fn hidden(&mut self) -> Result<TrainingText> {
        let introduction = self.introduction(words::INTRODUCTIONS);
        let filler = self.pick(words::FILLERS);
        let each = (self.tokens)(filler)?.max(1);
        let count = self.rng.random_range(2..=3);
        let planted = self.some(words::HIDDEN, count);
        let rounds = (self.length / each).max(4);
        let mut text = String::new();
        let places: Vec<usize> = planted
            .iter()
            .map(|_| self.rng.random_range(0..rounds))
            .collect();
        for round in 0..rounds {
            let gap = if round == 0 { "" } else { " " };
            text = text + gap + filler;
            for (fact, _) in planted.iter().zip(&places).filter(|(_, p)| **p == round) {
                text = text + " " + &fact.statement;
            }
        }
        Ok(TrainingText {
            prompt: introduction + &text,
            answers: planted.iter().map(|p| self.ask(p)).collect(),
            opening: String::new(),
        })
    }

    fn table(&mut self) -> Result<TrainingText> {
        let mut prompt = self.introduction(words::INTRODUCTIONS);
        let (sentences, _) = self.excerpt(self.length * 3 / 4)?;
        let heading = self.pick(words::TABLE_INTRODUCTIONS);
        let rows = self.rng.random_range(6..=16);
        let mut keys: Vec<&str> = Vec::new();
        while keys.len() < rows {
            let key = self.pick(words::TABLE_KEYS);
            if !keys.contains(&key) {
                keys.push(key);
            }
        }
        let values: Vec<String> = (keys.iter())
            .map(|_| match self.rng.random_range(0..3) {
                0 => self.value(Of::Code),
                1 => self.invented(),
                _ => self.digits(3, 6),
            })
            .collect();
        let style = self.rng.random_range(0..3);
        let lines = keys.iter().zip(&values).map(|(k, v)| match style {
            0 => format!("- {k}: {v}"),
            1 => format!("{k} = {v};"),
            _ => format!("| {k} | {v} |"),
        });
        let table = lines.collect::<Vec<_>>().join("\n");
        let place = self.rng.random_range(0..=sentences.len());
        prompt += sentences[..place].concat().trim_start();
        prompt = format!("{}\n\n{heading}\n{table}\n\n", prompt.trim_end());
        prompt += sentences[place..].concat().trim_start();
        let mut answers = Vec::new();
        for _ in 0..6 {
            let row = self.rng.random_range(0..rows);
            let query = format!("Which entry stands beside \"{}\"?", keys[row]);
            let opening = format!("Beside \"{}\" stands", keys[row]);
            answers.push(TrainingAnswer {
                query: self.frame.query(&query, &opening),
                answer: format!(" {}", values[row]),
            });
        }
        Ok(TrainingText {
            prompt,
            answers,
            opening: String::new(),
        })
    }

    fn chat(&mut self) -> Result<TrainingText> {
        self.frame = self.frame.dialogue();
        let turns = self.rng.random_range(2..=5);
        let planted = self.some(words::MENTIONS, 2 * turns);
        let mut text = self.frame.open.clone();
        for turn in 0..turns {
            let (sentences, _) = self.excerpt(self.length / turns)?;
            let handover = words::HANDOVERS[turn % words::HANDOVERS.len()];
            let passage = sentences.concat();
            let passage = passage.trim_start();
            // A remark behind the passage, and sometimes one before it.
            let mut remarks = planted.iter().skip(2 * turn).map(|p| &p.statement);
            let behind = remarks.next().map_or("", String::as_str);
            let before = match self.rng.random_range(0..2) {
                0 => String::new(),
                _ => remarks.next().map_or_else(String::new, |r| format!(" {r}")),
            };
            text += &format!("{handover}{before}\n\n{passage}\n\n{behind}");
            text += &self.frame.to_answer;
            text += self.pick(words::REPLIES);
            text += &self.frame.to_user;
        }
        // A question follows as the user's next words.
        let next = |question: &str, opening: &str, frame: &Frame| {
            [question, frame.to_answer.as_str(), opening].concat()
        };
        let answers = (planted.iter())
            .filter(|p| text.contains(&p.statement))
            .map(|p| TrainingAnswer {
                query: next(&p.question, &p.opening, &self.frame),
                answer: p.answer.clone(),
            })
            .collect();
        Ok(TrainingText {
            prompt: text,
            answers,
            opening: String::new(),
        })
    }

    fn article(&mut self) -> Result<TrainingText> {
        let article = &self.corpus.articles[self.rng.random_range(0..self.corpus.articles.len())];
        let start = self.rng.random_range(0..article.len());
        let passages = article.iter().cycle().skip(start).take(article.len());
        self.passages(passages.collect())
    }

    fn puzzle(&mut self) -> Result<TrainingText> {
        let puzzles = &self.corpus.puzzles;
        let start = self.rng.random_range(0..puzzles.len());
        let passages = puzzles
            .iter()
            .cycle()
            .skip(start)
            .take(puzzles.len())
            .flatten();
        self.passages(passages.take(80).collect())
    }

    /// Passages up to the length, and the questions on those that are whole.
    fn passages(&mut self, passages: Vec<&Passage>) -> Result<TrainingText> {
        let introduction = self.introduction(words::INTRODUCTIONS);
        let mut n = 0;
        let mut used = Vec::new();
        let mut rest = passages.into_iter();
        for passage in rest.by_ref() {
            n += (self.tokens)(&passage.text)?;
            used.push(passage);
            if n >= self.length {
                break;
            }
        }
        let text: Vec<&str> = used.iter().map(|p| p.text.trim()).collect();
        let mut answers = Vec::new();
        let questions: Vec<&(String, String)> = used.iter().flat_map(|p| &p.questions).collect();
        let chosen: Vec<_> = questions.sample(&mut self.rng, 7).copied().collect();
        for (question, answer) in chosen {
            answers.push(TrainingAnswer {
                query: self.frame.query(question.trim(), ""),
                answer: answer.clone(),
            });
        }
        if self.recipe == Recipe::Plain || answers.len() < 2 {
            // As they stand in the prompt, so that consecutive ones are a part of it.
            let mut sentences: Vec<String> = Vec::new();
            for passage in &text {
                let first = sentences.len();
                sentences.extend(passage.split_inclusive(". ").map(String::from));
                if first > 0
                    && let Some(sentence) = sentences.get_mut(first)
                {
                    sentence.insert_str(0, "\n\n");
                }
            }
            let next = rest
                .next()
                .map(|p| format!("\n\n{}", p.text))
                .unwrap_or_default();
            let next: String = next.split_inclusive(' ').take(CONTINUATION).collect();
            let mut own = self.own(&sentences, next, 3);
            own.extend(self.repetition(&sentences));
            answers.extend(own.into_iter().filter(|a| !a.answer.is_empty()));
        }
        Ok(TrainingText {
            prompt: introduction + &text.join("\n\n"),
            answers,
            opening: String::new(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        tasks,
        training_data::{corpus::tests::small, ordinary::tests::small as ordinary},
    };

    fn count(text: &str) -> Result<usize> {
        Ok(text.split_whitespace().count())
    }

    fn frame() -> Frame {
        let render = |turns: &[(&str, &str)]| -> Result<String> {
            let turns = turns.iter().map(|(r, c)| format!("<|{r}|>{c}<|end|>"));
            Ok(format!("{}<|assistant|>", turns.collect::<String>()))
        };
        Frame::chat("", render).unwrap().unwrap()
    }

    fn make(recipe: Recipe, seed: u64) -> Vec<TrainingText> {
        let corpus = small().with(ordinary());
        generate(recipe, 0.0, 40, seed, &corpus, &frame(), &count).unwrap()
    }

    #[test]
    fn texts_to_be_repeated_are_of_all_kinds_and_nothing_is_asked() {
        let corpus = small().with(ordinary());
        let with = |planted: f64| {
            generate(
                Recipe::Reconstruct,
                planted,
                48,
                5,
                &corpus,
                &frame(),
                &count,
            )
        };
        let texts = with(0.0).unwrap();
        for text in &texts {
            let n = count(&text.prompt).unwrap();
            assert!((600..3400).contains(&n), "{n}: {}", text.prompt);
            assert!(text.answers.is_empty() && text.prompt.starts_with(&text.opening));
        }
        for mark in [
            "let x",
            "Wort Nummer",
            "\nQ: ",
            " | ",
            " INFO ",
            ": Line ",
            ", ",
        ] {
            assert!(texts.iter().any(|t| t.prompt.contains(mark)), "{mark}");
        }
        let framed = texts.iter().filter(|t| !t.opening.is_empty()).count();
        assert!((20..44).contains(&framed), "{framed}");
        let mixed = with(0.25).unwrap();
        let asked = |t: &&TrainingText| !t.answers.is_empty();
        assert_eq!(mixed.iter().filter(asked).count(), 12);
        let same = mixed.iter().zip(&texts).filter(|(a, b)| a == b).count();
        assert_eq!(same, 36);
        assert!(with(1.5).is_err());
        // Code and languages are fetched for this recipe alone.
        let bare = generate(Recipe::Reconstruct, 0.0, 12, 5, &small(), &frame(), &count);
        assert!(bare.is_err());
    }

    #[test]
    fn texts_have_their_length_and_hold_their_answers() {
        for recipe in [Recipe::Builtin, Recipe::Plain] {
            let (mut held, mut all) = (0, 0);
            for text in make(recipe, 1) {
                let n = count(&text.prompt).unwrap();
                assert!((400..3400).contains(&n), "{n}: {}", text.prompt);
                assert!(text.answers.len() >= 2, "{}", text.prompt);
                for a in text.answers.iter().filter(|a| !a.query.is_empty()) {
                    assert!(!a.answer.trim().is_empty());
                    all += 1;
                    held += usize::from(text.prompt.contains(a.answer.trim()));
                }
                for blank in ["{who}", "{what}", "{value}", "{start}"] {
                    assert!(!text.prompt.contains(blank));
                    assert!(!text.answers.iter().any(|a| a.query.contains(blank)));
                }
            }
            assert!(all > 100 && held == all, "{recipe}: {held} of {all}");
        }
    }

    #[test]
    fn a_seed_gives_the_same_texts_and_another_one_others() {
        let texts = make(Recipe::Builtin, 1);
        assert_eq!(texts, make(Recipe::Builtin, 1));
        assert_ne!(texts, make(Recipe::Builtin, 2));
        let fewer = generate(Recipe::Builtin, 0.0, 3, 1, &small(), &frame(), &count).unwrap();
        assert_eq!(texts[..3], fewer);
        let mut prompts: Vec<&str> = texts.iter().map(|t| t.prompt.as_str()).collect();
        prompts.sort_unstable();
        prompts.dedup();
        assert_eq!(prompts.len(), texts.len());
    }

    #[test]
    fn nothing_is_planted_in_plain_texts() {
        for text in make(Recipe::Plain, 3) {
            for name in words::FIRST.iter().chain(words::TABLE_KEYS) {
                assert!(!text.prompt.contains(name), "{name}: {}", text.prompt);
            }
        }
    }

    #[test]
    fn nothing_is_shared_with_the_evaluation() {
        let ours: Vec<String> = words::templates().map(str::to_lowercase).collect();
        for phrase in tasks::words::phrases() {
            let phrase = phrase.to_lowercase();
            assert!(!ours.iter().any(|t| t.contains(&phrase)), "{phrase}");
        }
        for sentence in tasks::words::FILLER.split(". ") {
            assert!(
                !ours.iter().any(|t| t.contains(&sentence.to_lowercase())),
                "{sentence}"
            );
        }
        let listed: HashSet<String> = words::lists()
            .iter()
            .flat_map(|l| l.iter())
            .flat_map(|w| w.split(' '))
            .map(str::to_lowercase)
            .collect();
        for name in tasks::words::names() {
            assert!(!listed.contains(&name.to_lowercase()), "{name}");
        }
        // Our own fixed phrases do not occur in the evaluation's templates either.
        for fact in words::FACTS
            .iter()
            .chain(words::MENTIONS)
            .chain(words::HIDDEN)
        {
            for text in [fact.statement, fact.question, fact.opening] {
                for part in text.split(['{', '}']).step_by(2) {
                    let part = part.trim();
                    // "What is the" is anyone's.
                    if part.split_whitespace().count() >= 4 {
                        let theirs = tasks::words::phrases();
                        assert!(!theirs.iter().any(|t| t.contains(part)), "{part}");
                    }
                }
            }
        }
    }

    #[test]
    fn recipes_have_names() {
        for recipe in [Recipe::Builtin, Recipe::Plain, Recipe::Reconstruct] {
            assert_eq!(recipe.to_string().parse::<Recipe>().unwrap(), recipe);
        }
        assert!("other".parse::<Recipe>().is_err());
    }
}
