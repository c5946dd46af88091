//! Texts as published scorers take them apart, and what two of them have in common.

use std::collections::{HashMap, HashSet};

/// What Python takes for white space.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// The words of a text.
pub(super) fn split(text: &str) -> impl Iterator<Item = &str> {
    text.split(is_space).filter(|word| !word.is_empty())
}

/// Some characters as spaces, and then the words.
pub(super) fn words_without(text: &str, marks: &str) -> Vec<String> {
    let plain: String = text
        .chars()
        .map(|c| if marks.contains(c) { ' ' } else { c })
        .collect();
    split(&plain).map(str::to_owned).collect()
}

/// Every run of decimal digits.
pub(super) fn numbers(text: &str) -> Vec<&str> {
    let parts = text.split(|c: char| !c.is_ascii_digit());
    parts.filter(|run| !run.is_empty()).collect()
}

/// As SQuAD's scorer has it: no punctuation, no articles, words apart by one space; small letters if `lower`.
pub(super) fn normalised(text: &str, lower: bool) -> String {
    let text = match lower {
        true => text.to_lowercase(),
        false => text.to_owned(),
    };
    let plain: String = text.chars().filter(|c| !c.is_ascii_punctuation()).collect();
    let in_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut out = String::with_capacity(plain.len());
    let mut rest = plain.as_str();
    while let Some(c) = rest.chars().next() {
        let same = |other: char| in_word(other) == in_word(c);
        let run = &rest[..rest.find(|c| !same(c)).unwrap_or(rest.len())];
        out += if ["a", "an", "the"].contains(&run) {
            " "
        } else {
            run
        };
        rest = &rest[run.len()..];
    }
    split(&out).collect::<Vec<_>>().join(" ")
}

/// The same for Chinese: no punctuation of either kind, no space.
pub(super) fn normalised_chinese(text: &str) -> String {
    let keeps = |c: &char| !c.is_ascii_punctuation() && !is_space(*c) && !chinese_mark(*c);
    text.to_lowercase().chars().filter(keeps).collect()
}

/// Marks of Chinese texts that scorers leave out.
fn chinese_mark(c: char) -> bool {
    matches!(c,
        '\u{2013}' | '\u{2014}' | '\u{2018}' | '\u{2019}' | '\u{201b}'..='\u{201f}' | '\u{2026}' | '\u{2027}'
        | '\u{3001}'..='\u{3003}' | '\u{300b}'..='\u{3011}' | '\u{3014}'..='\u{301f}' | '\u{3030}'
        | '\u{303e}' | '\u{303f}' | '\u{fe4f}' | '\u{ff01}'..='\u{ff0d}' | '\u{ff0f}'
        | '\u{ff1a}'..='\u{ff20}' | '\u{ff3b}'..='\u{ff40}' | '\u{ff5b}'..='\u{ff64}')
}

/// F1 of what two lists have in common, each as often as it is in both.
pub(super) fn f1<T: Eq + std::hash::Hash>(found: &[T], due: &[T]) -> f64 {
    let mut left: HashMap<&T, usize> = HashMap::new();
    due.iter().for_each(|x| *left.entry(x).or_default() += 1);
    let same = found.iter().filter(|x| match left.get_mut(x) {
        Some(n) if *n > 0 => {
            *n -= 1;
            true
        }
        _ => false,
    });
    let same = same.count() as f64;
    if same == 0.0 {
        return 0.0;
    }
    harmonic(same / found.len() as f64, same / due.len() as f64)
}

fn harmonic(precision: f64, recall: f64) -> f64 {
    match precision + recall > 0.0 {
        true => 2.0 * precision * recall / (precision + recall),
        false => 0.0,
    }
}

/// Lengths of the longest common subsequences of all beginnings, `[a + 1][b + 1]`.
fn common(a: &[&str], b: &[&str]) -> Vec<Vec<usize>> {
    let mut table = vec![vec![0; b.len() + 1]; a.len() + 1];
    for (i, x) in a.iter().enumerate() {
        for (j, y) in b.iter().enumerate() {
            table[i + 1][j + 1] = match x == y {
                true => table[i][j] + 1,
                false => table[i][j + 1].max(table[i + 1][j]),
            };
        }
    }
    table
}

/// Which of `a` are in a longest common subsequence. Of several, that which goes on in `a` where both ways are
/// as long, or in `b` if `second`.
fn subsequence(a: &[&str], b: &[&str], second: bool) -> Vec<usize> {
    let table = common(a, b);
    let (mut i, mut j) = (a.len(), b.len());
    let mut found = Vec::new();
    while i > 0 && j > 0 {
        let (up, left) = (table[i - 1][j], table[i][j - 1]);
        if a[i - 1] == b[j - 1] {
            (i, j) = (i - 1, j - 1);
            found.push(i);
        } else if left > up || (second && left == up) {
            j -= 1;
        } else {
            i -= 1;
        }
    }
    found.reverse();
    found
}

/// Words of letters and digits, as the package `rouge-score` has them.
fn plain_words(text: &str) -> Vec<String> {
    let lower = text.to_lowercase();
    let parts = lower.split(|c: char| !(c.is_ascii_lowercase() || c.is_ascii_digit()));
    parts.filter(|w| !w.is_empty()).map(str::to_owned).collect()
}

fn as_str(words: &[String]) -> Vec<&str> {
    words.iter().map(String::as_str).collect()
}

/// ROUGE-L of the package `rouge-score`, without a stemmer.
pub(super) fn rouge_l(found: &str, due: &str) -> f64 {
    let (found, due) = (plain_words(found), plain_words(due));
    if found.is_empty() || due.is_empty() {
        return 0.0;
    }
    let same = common(&as_str(&due), &as_str(&found))[due.len()][found.len()] as f64;
    harmonic(same / found.len() as f64, same / due.len() as f64)
}

/// ROUGE-Lsum of the same: sentences are lines.
pub(super) fn rouge_l_sum(found: &str, due: &str) -> f64 {
    let sentences = |text: &str| -> Vec<Vec<String>> {
        let lines = text.split('\n').filter(|line| !line.is_empty());
        lines.map(plain_words).collect()
    };
    let (found, due) = (sentences(found), sentences(due));
    let count = |all: &[Vec<String>]| {
        let mut counts: HashMap<String, usize> = HashMap::new();
        for word in all.iter().flatten() {
            *counts.entry(word.clone()).or_default() += 1;
        }
        counts
    };
    let (mut of_found, mut of_due) = (count(&found), count(&due));
    let total = |all: &[Vec<String>]| all.iter().map(Vec::len).sum::<usize>() as f64;
    let mut hits = 0.0;
    for sentence in &due {
        let sentence = as_str(sentence);
        let mut union: Vec<usize> = (found.iter())
            .flat_map(|other| subsequence(&sentence, &as_str(other), false))
            .collect();
        union.sort_unstable();
        union.dedup();
        for word in union {
            // Nothing counts twice.
            let pair = (
                of_found.get_mut(sentence[word]),
                of_due.get_mut(sentence[word]),
            );
            if let (Some(a @ 1..), Some(b @ 1..)) = pair {
                (*a, *b) = (*a - 1, *b - 1);
                hits += 1.0;
            }
        }
    }
    match total(&found) > 0.0 && total(&due) > 0.0 {
        true => harmonic(hits / total(&found), hits / total(&due)),
        false => 0.0,
    }
}

/// ROUGE-L of the package `rouge`: sentences end with full stops, and words count once.
pub(super) fn rouge_l_of_sets(found: &str, due: &str) -> f64 {
    let sentences = |text: &str| -> Vec<String> {
        let parts = text.split('.').filter(|part| !part.is_empty());
        parts
            .map(|part| split(part).collect::<Vec<_>>().join(" "))
            .collect()
    };
    let (found, due) = (sentences(found), sentences(due));
    let words = |all: &[String]| -> HashSet<String> {
        let words = all.iter().flat_map(|sentence| sentence.split(' '));
        words.map(str::to_owned).collect()
    };
    if found.is_empty() || due.is_empty() {
        return 0.0;
    }
    let mut union: HashSet<&str> = HashSet::new();
    for sentence in &due {
        let sentence: Vec<&str> = sentence.split(' ').collect();
        for other in &found {
            let other: Vec<&str> = other.split(' ').collect();
            let own = subsequence(&sentence, &other, true);
            union.extend(own.into_iter().map(|word| sentence[word]));
        }
    }
    let same = union.len() as f64;
    let (precision, recall) = (
        same / words(&found).len() as f64,
        same / words(&due).len() as f64,
    );
    2.0 * (precision * recall / (precision + recall + 1e-8))
}

/// How much of two texts is the same, as Python's `difflib` sees it: twice the characters of matching pieces by those
/// of both.
pub(super) fn ratio(a: &str, b: &str) -> f64 {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    if a.is_empty() && b.is_empty() {
        return 1.0;
    }
    let mut places: HashMap<char, Vec<usize>> = HashMap::new();
    for (i, c) in b.iter().enumerate() {
        places.entry(*c).or_default().push(i);
    }
    // In long texts what is everywhere says nothing.
    if b.len() >= 200 {
        let most = b.len() / 100 + 1;
        places.retain(|_, list| list.len() <= most);
    }
    let mut same = 0;
    let mut open = vec![(0, a.len(), 0, b.len())];
    while let Some((a_from, a_to, b_from, b_to)) = open.pop() {
        let (i, j, len) = longest(&a, &b, &places, (a_from, a_to, b_from, b_to));
        if len > 0 {
            same += len;
            open.push((a_from, i, b_from, j));
            open.push((i + len, a_to, j + len, b_to));
        }
    }
    2.0 * same as f64 / (a.len() + b.len()) as f64
}

/// The longest piece of both, the earliest in `a` and then in `b`.
fn longest(
    a: &[char],
    b: &[char],
    places: &HashMap<char, Vec<usize>>,
    (a_from, a_to, b_from, b_to): (usize, usize, usize, usize),
) -> (usize, usize, usize) {
    let mut best = (a_from, b_from, 0);
    let mut ends: HashMap<usize, usize> = HashMap::new();
    for (i, c) in a.iter().enumerate().take(a_to).skip(a_from) {
        let mut next = HashMap::new();
        for j in places.get(c).into_iter().flatten().copied() {
            if !(b_from..b_to).contains(&j) {
                continue;
            }
            let before = j.checked_sub(1).and_then(|j| ends.get(&j)).copied();
            let len = before.unwrap_or(0) + 1;
            next.insert(j, len);
            if len > best.2 {
                best = (i + 1 - len, j + 1 - len, len);
            }
        }
        ends = next;
    }
    // Characters that are everywhere are taken along at both ends.
    let (mut i, mut j, mut len) = best;
    while i > a_from && j > b_from && a[i - 1] == b[j - 1] {
        (i, j, len) = (i - 1, j - 1, len + 1);
    }
    while i + len < a_to && j + len < b_to && a[i + len] == b[j + len] {
        len += 1;
    }
    (i, j, len)
}
