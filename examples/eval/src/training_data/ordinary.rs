//! Ordinary texts of many kinds, in which nothing is put for a question: what [`Recipe::Reconstruct`] has
//! repeated.
//!
//! Prose, articles and puzzles are those of the other recipes. Code, and sentences of other languages, come out
//! of one more pinned package; tables, logs, lists and chats are made up here.
//!
//! [`Recipe::Reconstruct`]: super::Recipe::Reconstruct

use super::{
    make::{Kind, Maker},
    words,
};
use crate::{
    Error, Result,
    corpus::{self, OnProgress},
};
use locret_models::{FetchOptions, Pinned};
use rand::{RngExt, seq::SliceRandom};

/// A file of Django 5.2.8 (BSD-3-Clause; the script library in it is MIT).
const fn member(member: &'static str, member_sha256: &'static str) -> Pinned {
    Pinned {
        package: "django",
        version: "5.2.8",
        wheel_sha256: "37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f",
        member,
        member_sha256,
    }
}

/// Python, JavaScript and CSS.
const CODE: [Pinned; 3] = [
    member(
        "django/contrib/admin/options.py",
        "970a9c0b89f1818f5ce5e658c200cfb53357970440136416cbb7d45f3a2661cb",
    ),
    member(
        "django/contrib/admin/static/admin/js/vendor/jquery/jquery.js",
        "78a85aca2f0b110c29e0d2b137e09f0a1fb7a8e554b499f740d6744dc8962cfe",
    ),
    member(
        "django/contrib/admin/static/admin/css/base.css",
        "737e61de79492d6acfb351ee3e930b0ea3995452966f9d3f725601fdea80a86e",
    ),
];

/// Messages of programs in German, French, Spanish and Russian.
const MESSAGES: [Pinned; 4] = [
    member(
        "django/conf/locale/de/LC_MESSAGES/django.po",
        "bee23320c466971b03e18d5ab9f5ce1d768adfab7c634d7096c871664fe51051",
    ),
    member(
        "django/conf/locale/fr/LC_MESSAGES/django.po",
        "c5d2472789be6b426437600e4de3f5b7ffc3b928929e9ebeecd744d335c2f57e",
    ),
    member(
        "django/conf/locale/es/LC_MESSAGES/django.po",
        "0e4ee0f5427feb88412cba281f076a8523d278ad47cae3ff9bf80a20b185061d",
    ),
    member(
        "django/conf/locale/ru/LC_MESSAGES/django.po",
        "ad551d54b5c623ffe5dc87acd7a158343be760d306a166af6aca276243173a0d",
    ),
];

/// Texts beside prose and passages.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ordinary {
    /// Lines of files of code.
    pub(super) code: Vec<Vec<String>>,
    /// Sentences and names of other languages.
    pub(super) languages: Vec<Vec<String>>,
}

impl Ordinary {
    /// The pinned texts.
    ///
    /// # Errors
    /// As [`corpus::text`].
    pub fn fetch(options: &FetchOptions, shown: OnProgress<'_>) -> Result<Self> {
        let text = |pinned| corpus::text(pinned, options, shown);
        let code = CODE.iter().map(text).collect::<Result<Vec<_>>>()?;
        let messages = MESSAGES.iter().map(text).collect::<Result<Vec<_>>>()?;
        Ok(Self::new(&code, &messages))
    }

    /// From files of code, and catalogues of translated messages (`.po`).
    pub fn new(code: &[String], catalogues: &[String]) -> Self {
        let lines = |text: &String| text.lines().map(|l| l.trim_end().to_owned()).collect();
        Self {
            code: code.iter().map(lines).collect(),
            languages: catalogues.iter().map(|c| translations(c)).collect(),
        }
    }
}

/// The translated messages of a catalogue, one after the other.
fn translations(catalogue: &str) -> Vec<String> {
    let (mut all, mut within) = (Vec::<String>::new(), false);
    for line in catalogue.lines() {
        let (starts, part) = match line.strip_prefix("msgstr") {
            // `msgstr[1]` is the plural.
            Some(rest) => (true, rest.trim_start_matches(|c| c != '"')),
            None => (false, line),
        };
        within = starts || within && line.starts_with('"');
        let quoted = part.strip_prefix('"').and_then(|p| p.strip_suffix('"'));
        let (true, Some(text)) = (within, quoted) else {
            continue;
        };
        let text = text.replace("\\n", " ").replace("\\\"", "\"");
        match all.last_mut() {
            Some(last) if !starts => last.push_str(&text),
            _ => all.push(text),
        }
    }
    // The first message of a catalogue is about the catalogue.
    all.drain(..all.len().min(1));
    all.retain(|text: &String| !text.trim().is_empty());
    all
}

impl Maker<'_> {
    /// One of the kinds that only this recipe has.
    pub(super) fn ordinary(&mut self, kind: Kind) -> Result<String> {
        match kind {
            Kind::Code => self.code(),
            Kind::Languages => self.languages(),
            Kind::Conversation => self.conversation(),
            Kind::Rows => self.rows(),
            Kind::Log => self.log(),
            Kind::List => self.list(),
            _ => self.asked(),
        }
    }

    /// Parts, joined, up to the length.
    fn fill_up(
        &self,
        mut next: impl FnMut(usize) -> Option<String>,
        between: &str,
    ) -> Result<String> {
        let (mut text, mut n, mut number) = (String::new(), 0, 0);
        while n < self.length {
            let Some(part) = next(number) else { break };
            if number > 0 {
                text += between;
            }
            n += self.count(&part)?.max(1);
            text += &part;
            number += 1;
        }
        match number {
            0 => Err(Error::Usage("the corpus lacks a kind of text".into())),
            _ => Ok(text),
        }
    }

    fn code(&mut self) -> Result<String> {
        let files = &self.corpus.ordinary.code;
        let Some(file) = files.get(self.rng.random_range(0..files.len().max(1))) else {
            return Err(Error::Usage("the corpus has no code".into()));
        };
        let start = self.rng.random_range(0..file.len().max(1));
        let mut lines = file.iter().cycle().skip(start).cloned();
        self.fill_up(|_| lines.next(), "\n")
    }

    fn languages(&mut self) -> Result<String> {
        let languages = &self.corpus.ordinary.languages;
        let Some(messages) = languages.get(self.rng.random_range(0..languages.len().max(1))) else {
            return Err(Error::Usage("the corpus has no other languages".into()));
        };
        let start = self.rng.random_range(0..messages.len().max(1));
        let mut messages = messages.iter().cycle().skip(start).cloned();
        self.fill_up(|_| messages.next(), "\n")
    }

    /// Passages with the questions that people asked about them, and the answers.
    fn asked(&mut self) -> Result<String> {
        let articles = &self.corpus.articles;
        let article = &articles[self.rng.random_range(0..articles.len())];
        let start = self.rng.random_range(0..article.len());
        let mut passages = article.iter().cycle().skip(start);
        self.fill_up(
            |_| {
                let passage = passages.next()?;
                let asked = passage.questions.iter().take(4);
                let asked = asked.map(|(q, a)| format!("\nQ: {}\nA: {a}", q.trim()));
                Some(passage.text.trim().to_owned() + &asked.collect::<String>())
            },
            "\n\n",
        )
    }

    /// People who ask each other and talk at length.
    fn conversation(&mut self) -> Result<String> {
        let [one, other] = [self.pick(words::FIRST), self.pick(words::FIRST)];
        let articles = &self.corpus.articles;
        let article = &articles[self.rng.random_range(0..articles.len())];
        let questions: Vec<_> = article.iter().flat_map(|p| &p.questions).collect();
        let from = self.rng.random_range(0..questions.len().max(1));
        let mut questions = questions.into_iter().cycle().skip(from);
        let prose = &self.corpus.prose;
        let start = self.rng.random_range(0..prose.sentences().len());
        let mut prose = prose.from(start);
        self.fill_up(
            |number| match number % 4 {
                0 => questions.next().map(|(question, answer)| {
                    format!("{one}: {}\n{other}: {answer}.", question.trim())
                }),
                n => {
                    let who = [one, other][n % 2];
                    let said: Vec<&str> = prose.by_ref().take(2).map(str::trim).collect();
                    Some(format!("{who}: {}", said.join(" ")))
                }
            },
            "\n",
        )
    }

    fn rows(&mut self) -> Result<String> {
        let style = self.rng.random_range(0..3);
        let columns = ["item", "owner", "place", "count", "price", "date"];
        let line = |cells: &[String]| match style {
            0 => cells.join(","),
            1 => format!("| {} |", cells.join(" | ")),
            _ => cells.join("\t"),
        };
        let mut lines = vec![line(&columns.map(str::to_owned))];
        if style == 1 {
            lines.push(line(&columns.map(|_| "---".to_owned())));
        }
        let lists = words::lists();
        // More than are needed, however tokens are counted.
        for _ in 0..self.length {
            let list = self.rng.random_range(0..lists.len());
            let item = self.pick(lists[list]);
            let cells = [
                item.to_owned(),
                format!("{} {}", self.pick(words::FIRST), self.pick(words::FAMILY)),
                self.pick(words::TABLE_KEYS).to_owned(),
                self.digits(1, 4),
                format!("{}.{}", self.digits(1, 3), self.digits(2, 2)),
                self.date(),
            ];
            lines.push(line(&cells));
        }
        let mut lines = lines.into_iter();
        self.fill_up(|_| lines.next(), "\n")
    }

    fn date(&mut self) -> String {
        let (year, month, day) = (
            self.rng.random_range(1998..2026),
            self.rng.random_range(1..13),
            self.rng.random_range(1..29),
        );
        format!("{year}-{month:02}-{day:02}")
    }

    fn log(&mut self) -> Result<String> {
        const PARTS: &[&str] = &["store", "worker", "net", "auth", "queue", "disk"];
        const LEVELS: &[&str] = &["INFO", "INFO", "INFO", "DEBUG", "WARN", "ERROR"];
        let (date, mut second) = (self.date(), self.rng.random_range(0..40_000u32));
        let mut lines = Vec::new();
        for _ in 0..self.length {
            second += self.rng.random_range(0..9);
            let (part, level) = (self.pick(PARTS), self.pick(LEVELS));
            let (a, b) = (self.digits(1, 5), self.digits(1, 3));
            let message = match self.rng.random_range(0..5) {
                0 => format!("request {a} done in {b} ms"),
                1 => format!("user={} opened session {a}", self.pick(words::FIRST)),
                2 => format!("retry {b} of job {}", self.invented()),
                3 => format!("{a} bytes written, {b} pending"),
                _ => format!("connection from 10.{b}.0.{} closed", self.digits(1, 2)),
            };
            let (h, m, s) = (second / 3600, second / 60 % 60, second % 60);
            lines.push(format!(
                "{date} {h:02}:{m:02}:{s:02} {level} {part}: {message}"
            ));
        }
        let mut lines = lines.into_iter();
        self.fill_up(|_| lines.next(), "\n")
    }

    /// Numbers, or names.
    fn list(&mut self) -> Result<String> {
        let style = self.rng.random_range(0..3);
        let mut entries = Vec::new();
        for _ in 0..self.length {
            entries.push(match style {
                0 => self.digits(1, 7),
                1 => format!("{} {}", self.pick(words::FIRST), self.pick(words::FAMILY)),
                _ => format!("{}: {}", self.invented(), self.digits(3, 6)),
            });
        }
        entries.shuffle(&mut self.rng);
        let mut entries = entries.into_iter();
        self.fill_up(|_| entries.next(), if style == 2 { "\n" } else { ", " })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A little code, and a catalogue.
    pub(crate) fn small() -> Ordinary {
        let code: String = (0..300)
            .map(|i| format!("let x{i} = f({i});  \n"))
            .collect();
        let catalogue: String = (0..200)
            .map(|i| format!("msgid \"Word {i}\"\nmsgstr \"Wort Nummer {i}\"\n\n"))
            .collect();
        let head = "msgid \"\"\nmsgstr \"\"\n\"Language: de\\n\"\n\n";
        Ordinary::new(&[code], &[head.to_owned() + &catalogue])
    }

    #[test]
    fn messages_are_read_from_a_catalogue() {
        let text = "# A comment\nmsgid \"\"\nmsgstr \"\"\n\"Plural-Forms: 2\\n\"\n\"Language: fr\\n\"\n\n\
             msgid \"Yes\"\nmsgstr \"Oui\"\n\nmsgid \"\"\n\"A long \"\n\"one\"\nmsgstr \"\"\n\"Une \\\"longue\\\" \"\n\
             \"phrase\"\n\nmsgid \"%d day\"\nmsgid_plural \"%d days\"\nmsgstr[0] \"%d jour\"\nmsgstr[1] \"%d jours\"\n\n\
             msgid \"Missing\"\nmsgstr \"\"\n";
        let due = ["Oui", "Une \"longue\" phrase", "%d jour", "%d jours"];
        assert_eq!(translations(text), due);
        assert!(translations("").is_empty());
        assert_eq!(
            small().languages[0][..2],
            ["Wort Nummer 0", "Wort Nummer 1"]
        );
        assert_eq!(small().code[0][299], "let x299 = f(299);");
    }
}
