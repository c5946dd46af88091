//! Scorers of published benchmarks, as their authors' code computes them.

use super::words::{
    f1, is_space, normalised, normalised_chinese, numbers, ratio, rouge_l, rouge_l_of_sets,
    rouge_l_sum, split, words_without,
};
use serde::{Deserialize, Serialize};

/// A scorer. What it is given as references is said of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scorer {
    /// F1 of words as SQuAD's scorer has it (LongBench, ∞Bench, L-Eval); the best of all references.
    TokenF1,
    /// F1 of characters (∞Bench's Chinese book); the best of all references.
    CharacterF1,
    /// ROUGE-L as the package `rouge` has it (LongBench); the best of all references.
    RougeOfSets,
    /// ROUGE-L as the package `rouge-score` has it (L-Eval); the best of all references.
    RougeL,
    /// ROUGE-Lsum as the same package has it (∞Bench); the best of all references.
    RougeLSum,
    /// LongBench's classes: the references are the right ones, and the classes are the judge's.
    Class,
    /// LongBench's counts: the share of an answer's numbers that are the reference.
    Count,
    /// LongBench's paragraphs: the same of a reference's number.
    Paragraph,
    /// LongBench's code: how alike its first line without a comment is.
    CodeLine,
    /// LongBench v2: the letter after the sentence that the prompt asks for.
    Letter,
    /// ∞Bench's pass keys and numbers: the first run of digits is the reference.
    FirstDigits,
    /// ∞Bench's pairs: the reference is one of the words.
    Word,
    /// ∞Bench's `code_run`: the last word is the number.
    LastNumber,
    /// ∞Bench's `math_find`: the first number is the reference.
    FirstNumber,
    /// ∞Bench's `math_calc`: how many of the references the numbers begin with.
    Beginning,
    /// ∞Bench's `code_debug`: the references are a function and its letter.
    Function,
    /// ∞Bench's book with options: the references are an option and its letter.
    Option,
    /// ∞Bench's dialogue: the reference is one of the words in capitals.
    Name,
    /// L-Eval: one letter of A to D.
    ExamLetter,
    /// L-Eval's `coursera`: letters of A to D; some of them, and no wrong one, are worth a quarter.
    ExamLetters,
    /// L-Eval's `gsm100`: the number after a text of steps.
    ExamNumber,
    /// L-Eval's `codeU`: what a program prints, at the end of the answer.
    ExamCode,
    /// L-Eval's retrieval of topics: the reference is in the answer, whatever the case and the spaces.
    ExamText,
}

impl Scorer {
    /// What an answer is worth, from 0 to 1.
    pub(crate) fn score(self, answer: &str, references: &[String], classes: &[String]) -> f64 {
        let first = references.first().map_or("", String::as_str);
        let best = |of: &dyn Fn(&str) -> f64| references.iter().map(|r| of(r)).fold(0.0, f64::max);
        let is = |right: bool| f64::from(u8::from(right));
        match self {
            Self::TokenF1 => {
                let found = normalised(answer, true);
                let found: Vec<&str> = split(&found).collect();
                best(&|due| f1(&found, &split(&normalised(due, true)).collect::<Vec<_>>()))
            }
            Self::CharacterF1 => {
                let found: Vec<char> = normalised_chinese(answer).chars().collect();
                best(&|due| f1(&found, &normalised_chinese(due).chars().collect::<Vec<_>>()))
            }
            Self::RougeOfSets => best(&|due| rouge_l_of_sets(answer, due)),
            Self::RougeL => best(&|due| rouge_l(answer, due)),
            Self::RougeLSum => best(&|due| rouge_l_sum(answer, due)),
            Self::Class => best(&|due| class(answer, due, classes)),
            Self::Count => best(&|due| share_of_numbers(answer, due)),
            Self::Paragraph => {
                best(&|due| share_of_numbers(answer, numbers(due).first().copied().unwrap_or("")))
            }
            Self::CodeLine => {
                let lines = answer.trim_start_matches('\n').split('\n');
                let plain = |line: &&str| !["`", "#", "//"].iter().any(|mark| line.contains(mark));
                let line = lines.into_iter().find(plain).unwrap_or("");
                best(&|due| python_round(100.0 * ratio(line, due)) / 100.0)
            }
            Self::Letter => is(letter(answer) == first.chars().next()),
            Self::FirstDigits => is(numbers(answer).first().copied().unwrap_or("") == first),
            Self::Word => {
                let words = words_without(answer, "\n:\"'.,?!{}");
                is(words.iter().any(|word| word == first))
            }
            Self::LastNumber => {
                let words = words_without(answer.trim_matches(is_space), "\n.`'\":");
                let last = words.last().and_then(|word| whole(word));
                is(last.is_some() && last == whole(first))
            }
            Self::FirstNumber => is(first_number(answer, first)),
            Self::Beginning => {
                let found = numbers(answer);
                let same = |(due, found): &(&String, &&str)| whole(due) == whole(found);
                let right = references.iter().zip(&found).take_while(same).count();
                right as f64 / references.len().max(1) as f64
            }
            Self::Function => is(function(answer, references)),
            Self::Option => is(option(answer, references)),
            Self::Name => {
                let words = words_without(answer, "\n:\"'.,?!{}");
                is(words.iter().any(|word| word.to_uppercase() == first))
            }
            Self::ExamLetter => exam(&exam_letters(answer, false), &letters_of_key(first)),
            Self::ExamLetters => exam(&exam_letters(answer, true), &letters_of_key(first)),
            Self::ExamNumber => exam(&exam_number(answer), &exam_number(first)),
            Self::ExamCode => exam(&exam_code(answer, first), &plain_code(first)),
            Self::ExamText => exam(answer, first),
        }
    }
}

/// Half of even numbers stays, as Python rounds.
fn python_round(x: f64) -> f64 {
    x.round_ties_even()
}

/// A whole number as Python's `int` reads it, without underscores.
fn whole(text: &str) -> Option<i128> {
    text.parse().ok()
}

fn share_of_numbers(answer: &str, due: &str) -> f64 {
    let found = numbers(answer);
    let right = found.iter().filter(|number| **number == due).count();
    right as f64 / found.len().max(1) as f64
}

/// Classes that an answer names; parts of the right one's name are taken off, as the authors' loop does it, which leaves
/// out the next after one that it takes off.
fn class(answer: &str, due: &str, classes: &[String]) -> f64 {
    let mut named: Vec<&str> = (classes.iter().map(String::as_str))
        .filter(|class| answer.contains(class))
        .collect();
    let mut at = 0;
    while let Some(class) = named.get(at).copied() {
        if due.contains(class) && class != due {
            // The first of that name.
            if let Some(first) = named.iter().position(|other| *other == class) {
                named.remove(first);
            }
        }
        at += 1;
    }
    match named.contains(&due) {
        true => 1.0 / named.len() as f64,
        false => 0.0,
    }
}

fn letter(answer: &str) -> Option<char> {
    const LEAD: &str = "The correct answer is ";
    let plain = answer.replace('*', "");
    let after = |lead: &str, end: &str| {
        let mut places = plain.match_indices(lead);
        places.find_map(|(at, _)| {
            let rest = &plain[at + lead.len()..];
            let letter = rest.chars().next().filter(|c| ('A'..='D').contains(c))?;
            rest[1..].starts_with(end).then_some(letter)
        })
    };
    after(&format!("{LEAD}("), ")").or_else(|| after(LEAD, ""))
}

/// The first number of an answer; where a whole one is due, a broken one is none.
fn first_number(answer: &str, due: &str) -> bool {
    let digit = |c: char| c.is_ascii_digit();
    let Some(start) = answer.find(digit) else {
        return false;
    };
    let rest = &answer[start..];
    let end = rest.find(|c| !digit(c)).unwrap_or(rest.len());
    let broken = rest[end..].strip_prefix('.').map(|after| {
        let digits = after.find(|c| !digit(c)).unwrap_or(after.len());
        end + 1 + digits
    });
    let number = match broken {
        Some(to) if to > end + 1 => &rest[..to],
        _ => &rest[..end],
    };
    match whole(due) {
        Some(due) => whole(number) == Some(due),
        None => number.parse::<f64>().ok() == due.parse::<f64>().ok(),
    }
}

/// Marks as spaces, of which several become one.
fn spaced(text: &str, marks: &[&str]) -> String {
    let mut text = text.to_owned();
    marks.iter().for_each(|mark| text = text.replace(mark, " "));
    while text.contains("  ") {
        text = text.replace("  ", " ");
    }
    text
}

/// What stands after the first of these phrases that is there, and one character more; `None` if there is none of them.
fn after_phrase(text: &str, phrases: &[&str]) -> Option<String> {
    let (at, phrase) = phrases.iter().find_map(|p| Some((text.find(p)?, p)))?;
    let rest = &text[at + phrase.len()..];
    Some(rest.chars().skip(1).collect())
}

fn function(answer: &str, references: &[String]) -> bool {
    let [name, letter] = references else {
        return false;
    };
    let answer = answer.trim_matches(is_space);
    if [".", ":"]
        .iter()
        .any(|end| answer.starts_with(&format!("{letter}{end}")))
    {
        return true;
    }
    let plain = spaced(
        answer,
        &["\n", "`", "'", "\"", "-", "*", "Option", "option"],
    );
    let phrases = ["answer is:", "is:", "answer:", "correct option is:"];
    after_phrase(&plain, &phrases).is_some_and(|rest| {
        !rest.is_empty() && (rest.starts_with(letter) || rest.starts_with(name))
    })
}

fn option(answer: &str, references: &[String]) -> bool {
    let answer = answer.trim_matches(is_space);
    let Some(first) = answer.chars().next() else {
        return false;
    };
    let is = |word: &str| references.iter().any(|reference| reference == word);
    if ('A'..='D').contains(&first) {
        return is(&first.to_string());
    }
    if is(answer) {
        return true;
    }
    let plain = spaced(answer, &["\n", "\"", "'", ".", ",", "?", "!", "{", "}"]);
    let phrases = ["answer is:", "answer:", "answer is", "option is"];
    if let Some(rest) = after_phrase(&plain, &phrases) {
        return !rest.is_empty() && references.iter().any(|r| rest.starts_with(r));
    }
    // Pieces of "ABCD" are letters, too.
    let word = split(&plain).find(|word| "ABCD".contains(word));
    word.is_some_and(is)
}

/// L-Eval's exact match.
fn exam(found: &str, due: &str) -> f64 {
    let key = normalised(due, false);
    if key.chars().all(|c| ('A'..='D').contains(&c)) {
        let found = normalised(found, false);
        return if found == key {
            1.0
        } else if found.chars().all(|c| key.contains(c)) {
            0.25
        } else {
            0.0
        };
    }
    let number = |text: &str| text.trim_matches(is_space).parse::<f64>().ok();
    let right = match (number(found), number(due)) {
        (Some(found), Some(due)) => found == due,
        _ => {
            let plain = |text: &str| text.to_lowercase().replace(' ', "");
            plain(found).contains(&plain(due))
        }
    };
    f64::from(u8::from(right))
}

/// The letters of a key: those of its first word.
fn letters_of_key(key: &str) -> String {
    let word = split(key).next().unwrap_or("");
    let letters: String = word.chars().filter(|c| ('A'..='D').contains(c)).collect();
    if letters.is_empty() {
        "A".into()
    } else {
        letters
    }
}

/// The letters of an answer; `many` where several may be right.
fn exam_letters(answer: &str, many: bool) -> String {
    let is_letter = |c: &char| ('A'..='D').contains(c);
    if answer.trim_matches(is_space).is_empty() {
        return "None".into();
    }
    if "ABCD".contains(answer) {
        return answer.into();
    }
    if !many && let Some(letter) = answer.chars().find(is_letter) {
        return letter.into();
    }
    let sorted = |letters: &str| -> String {
        let mut all: Vec<char> = letters.chars().filter(is_letter).collect();
        all.sort_unstable();
        all.dedup();
        all.into_iter().collect()
    };
    let mut letters: String = answer.chars().take_while(is_letter).collect();
    // Of a run of letters as many are taken off the beginning.
    let mut rest = &answer[letters.len()..];
    if letters.len() > 1 {
        return sorted(&letters);
    }
    rest = rest.split("Question").next().unwrap_or("");
    // Capitals before a space, a full stop or a bracket.
    let ends = rest.chars().skip(1).map(Some).chain([None]);
    let capitals = rest.chars().zip(ends).filter(|(c, next)| {
        c.is_ascii_uppercase() && next.is_some_and(|c| is_space(c) || c == '.' || c == ')')
    });
    letters.extend(capitals.map(|(c, _)| c));
    letters = sorted(&letters);
    if letters.is_empty() {
        let from = rest.find(|c| is_letter(&c)).unwrap_or(rest.len());
        letters = rest[from..].chars().take_while(is_letter).collect();
    }
    if letters.is_empty() {
        "A".into()
    } else {
        letters
    }
}

/// The digits of the number that an answer ends with, as far as a full stop.
fn exam_number(answer: &str) -> String {
    const LEAD: &str = "The answer is ";
    let stated = answer.match_indices(LEAD).find_map(|(at, _)| {
        let rest = &answer[at + LEAD.len()..];
        let word = &rest[..rest.find(is_space).unwrap_or(rest.len())];
        (!word.is_empty()).then_some(word)
    });
    let word = stated.unwrap_or_else(|| {
        let first = answer.split("\n\n").next().unwrap_or("");
        let with_digit = |word: &&str| word.contains(|c: char| c.is_numeric());
        first.rsplit(' ').find(with_digit).unwrap_or("")
    });
    let whole = word.split('.').next().unwrap_or("");
    whole.chars().filter(|c| c.is_numeric()).collect()
}

/// A program's output without what does not matter.
fn plain_code(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut space = false;
    for c in text.chars() {
        if !is_space(c) {
            out.push(c);
        } else if !space {
            out.push(' ');
        }
        space = is_space(c);
    }
    let pairs = [
        (",", ""),
        ("'", ""),
        ("\\", ""),
        (".0", ""),
        ("] [", "]["),
        ("[ [", "[["),
        ("] ]", "]]"),
    ];
    pairs
        .iter()
        .for_each(|(from, to)| out = out.replace(from, to));
    out
}

/// As many words of an answer as the key has, and three: its last ones, or those after the phrase that announces them.
fn exam_code(answer: &str, key: &str) -> String {
    const END: &str = "the final output";
    let words = split(key).count() + 3;
    let mut text = plain_code(answer);
    for phrase in [
        "will be",
        "of the code",
        "is",
        "would be",
        "the value of",
        "the result of",
        "printed",
    ] {
        text = text.replace(phrase, "");
    }
    let announced = text.contains(END);
    let text = match announced {
        true => text.rsplit(END).next().unwrap_or(""),
        false => text.as_str(),
    };
    // Empty words at both ends count.
    let mut all: Vec<&str> = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(is_space) {
        all.push(&rest[..at]);
        rest = rest[at..].trim_start_matches(is_space);
    }
    all.push(rest);
    let from = if announced {
        0
    } else {
        all.len().saturating_sub(words)
    };
    all[from..all.len().min(from + words)].join(" ")
}
