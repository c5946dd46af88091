//! ∞Bench's tasks that are drawn and not written (arXiv 2402.13718): pairs of identifiers, numbers, and functions.
//!
//! What is drawn is drawn as the authors draw it, and answers are scored as they score them; the words around it are
//! this crate's, and there is as much of it as fits.

use super::{Count, Frame, Judge, Kind, Query, Rule, Scorer};
use crate::Result;
use rand::{RngExt, seq::IndexedRandom, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use std::collections::HashMap;

/// A text that can be of any size, and the question on it.
struct Sample {
    text: String,
    question: String,
    opening: String,
    answer: String,
    judge: Judge,
}

/// A sample of so many tokens at most, or `None` if none is so small.
///
/// # Errors
/// Those of `count`.
pub(super) fn make(
    kind: Kind,
    frame: &Frame,
    tokens: usize,
    rng: &ChaCha8Rng,
    count: Count<'_>,
) -> Result<Option<(String, Vec<Query>)>> {
    let draw = |size: usize| {
        // Each size from the same beginning.
        let mut rng = rng.clone();
        match kind {
            Kind::KvRetrieval => pairs(&mut rng, size),
            Kind::MathFind => numbers(&mut rng, size),
            _ => functions(&mut rng, size),
        }
    };
    let context = |sample: &Sample| [&frame.open, &sample.text].map(String::as_str).concat();
    let fits = |size: usize| -> Result<bool> { Ok(count(&context(&draw(size)))? <= tokens) };
    let least = 10;
    if !fits(least)? {
        return Ok(None);
    }
    let (mut good, mut bad) = (least, 2 * least);
    while fits(bad)? {
        (good, bad) = (bad, 2 * bad);
    }
    while bad - good > 1 {
        let middle = good + (bad - good) / 2;
        match fits(middle)? {
            true => good = middle,
            false => bad = middle,
        }
    }
    let sample = draw(good);
    let query = Query {
        query: frame.query(&sample.question, &sample.opening),
        answer: sample.answer.clone(),
        judge: Some(sample.judge.clone()),
    };
    Ok(Some((context(&sample), vec![query])))
}

fn judge(scorer: Scorer, answer: &str, tokens: usize) -> Judge {
    Judge::new(Rule::Published(scorer), vec![answer.into()], tokens)
}

/// An identifier of random digits, in its usual form.
fn identifier(rng: &mut ChaCha8Rng) -> String {
    let digits: String = (0..32)
        .map(|i| match i {
            12 => '4',
            16 => ['8', '9', 'a', 'b'][rng.random_range(0..4)],
            _ => char::from_digit(rng.random_range(0..16), 16).unwrap_or('0'),
        })
        .collect();
    let parts = [0..8, 8..12, 12..16, 16..20, 20..32];
    parts.map(|part| &digits[part]).join("-")
}

/// `R.KV`: nothing but pairs, of which one is asked for.
fn pairs(rng: &mut ChaCha8Rng, size: usize) -> Sample {
    let pairs: Vec<[String; 2]> = (0..size)
        .map(|_| [(); 2].map(|()| identifier(rng)))
        .collect();
    let [key, value] = pairs[rng.random_range(0..size)].clone();
    let inner: Vec<String> = (pairs.iter())
        .map(|[key, value]| format!("\"{key}\": \"{value}\""))
        .collect();
    Sample {
        text: format!(
            "This JSON object has a value for every key.\n\n{{{}}}",
            inner.join(", ")
        ),
        question: format!("Which value does the key \"{key}\" have?"),
        opening: format!("The value of \"{key}\" is \""),
        judge: judge(Scorer::Word, &value, 50),
        answer: value,
    }
}

/// What is sought in a list.
#[derive(Clone, Copy)]
enum Sought {
    Largest(usize),
    Smallest(usize),
    Median,
}

const ORDINALS: [&str; 3] = ["", "second ", "third "];

/// `Math.Find`: a list of numbers below 100, of which one is found.
fn numbers(rng: &mut ChaCha8Rng, size: usize) -> Sample {
    let kinds = [
        Sought::Largest(0),
        Sought::Largest(1),
        Sought::Largest(2),
        Sought::Smallest(0),
        Sought::Smallest(1),
        Sought::Smallest(2),
        Sought::Median,
    ];
    let sought = *kinds.choose(rng).unwrap_or(&Sought::Median);
    // The end that is sought is drawn, too, or all lists had the same.
    let high = match sought {
        Sought::Median => rng.random(),
        Sought::Largest(_) => true,
        Sought::Smallest(_) => false,
    };
    let (low, most) = match high {
        true => (0, rng.random_range(79..=99)),
        false => (rng.random_range(0..=19), 99),
    };
    let list: Vec<u32> = (0..size).map(|_| rng.random_range(low..=most)).collect();
    let mut sorted = list.clone();
    sorted.sort_unstable();
    let (name, answer) = match sought {
        Sought::Median => {
            let middle = f64::from(sorted[(size - 1) / 2] + sorted[size / 2]) / 2.0;
            ("median".to_owned(), middle.to_string())
        }
        Sought::Largest(nth) | Sought::Smallest(nth) => {
            let mut different = sorted;
            different.dedup();
            let word = match high {
                true => {
                    different.reverse();
                    "largest"
                }
                false => "smallest",
            };
            // Short lists may not have so many different ones.
            let nth = nth.min(different.len() - 1);
            let name = format!("{}{word} number", ORDINALS[nth]);
            (name, different[nth].to_string())
        }
    };
    let shown: Vec<String> = list.iter().map(u32::to_string).collect();
    Sample {
        text: format!(
            "This is a list of numbers, some of which are the same.\n\n[{}]",
            shown.join(", ")
        ),
        question: format!("What is the {name} of the list? Only one number is the answer."),
        opening: format!("The {name} of the list is "),
        judge: judge(Scorer::FirstNumber, &answer, 3),
        answer,
    }
}

/// `Code.Run`: functions that call each other in a chain of 2 to 10, and the result of one call.
fn functions(rng: &mut ChaCha8Rng, size: usize) -> Sample {
    let depth = *[2usize, 4, 6, 8, 10].choose(rng).unwrap_or(&2);
    let each = (size / depth).max(1);
    let mut names: Vec<usize> = (1..=2 * size.max(depth)).collect();
    names.shuffle(rng);
    let levels: Vec<&[usize]> = names.chunks(each).take(depth).collect();
    let mut bodies: HashMap<usize, (Option<usize>, i64)> = HashMap::new();
    for (level, own) in levels.iter().enumerate() {
        for name in *own {
            let next = levels.get(level + 1).and_then(|next| next.choose(rng));
            bodies.insert(*name, (next.copied(), rng.random_range(-12..=17)));
        }
    }
    let (called, x) = (
        *levels[0].choose(rng).unwrap_or(&1),
        rng.random_range(-10..=10),
    );
    let (mut at, mut value) = (Some(called), x);
    while let Some((next, added)) = at.and_then(|name| bodies.get(&name)) {
        value += added;
        at = *next;
    }
    let mut sorted: Vec<_> = bodies.into_iter().collect();
    sorted.sort_unstable();
    let text: Vec<String> = (sorted.into_iter())
        .map(|(name, (next, added))| {
            let inner = next.map_or("x".to_owned(), |next| format!("func_{next}(x)"));
            let added = match added {
                0 => String::new(),
                less if less < 0 => format!(" - {}", -less),
                more => format!(" + {more}"),
            };
            format!("def func_{name}(x):\n    return {inner}{added}\n")
        })
        .collect();
    let answer = value.to_string();
    Sample {
        text: format!("A file of Python functions:\n\n{}", text.join("\n")),
        question: format!("What does func_{called}({x}) return? Only the number is the answer."),
        opening: format!("func_{called}({x}) returns "),
        judge: judge(Scorer::LastNumber, &answer, 5),
        answer,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    fn count(text: &str) -> Result<usize> {
        Ok(text.len().div_ceil(3))
    }

    fn made(kind: Kind, seed: u64, tokens: usize) -> (String, Query) {
        let rng = ChaCha8Rng::seed_from_u64(seed);
        let frame = Frame::plain("<s>");
        let (context, mut queries) = make(kind, &frame, tokens, &rng, &count).unwrap().unwrap();
        assert_eq!(queries.len(), 1);
        (context, queries.remove(0))
    }

    fn right(query: &Query) -> f64 {
        let judge = query.judge.as_ref().unwrap();
        judge.score(&format!("{}{}", &query.answer, "\n"))
    }

    #[test]
    fn texts_are_as_long_as_fits_and_answers_are_right() {
        for seed in 0..40 {
            for kind in [Kind::KvRetrieval, Kind::MathFind, Kind::CodeRun] {
                let (context, query) = made(kind, seed, 1500);
                let n = count(&context).unwrap();
                // Functions come in tens.
                let least = if kind == Kind::CodeRun { 1300 } else { 1400 };
                assert!((least..=1500).contains(&n), "{kind}: {n}");
                assert_eq!(right(&query), 1.0, "{kind}: {query:?}");
                assert_eq!(made(kind, seed, 1500), (context, query));
                let rng = ChaCha8Rng::seed_from_u64(seed);
                let small = make(kind, &Frame::plain(""), 5, &rng, &count).unwrap();
                assert!(small.is_none());
            }
        }
    }

    #[test]
    fn pairs_have_the_value_of_the_key_once() {
        let (context, query) = made(Kind::KvRetrieval, 3, 2000);
        let object = &context[context.find('{').unwrap()..];
        let object: HashMap<String, String> = serde_json::from_str(object).unwrap();
        let key = query.query.split('"').nth(1).unwrap();
        assert_eq!(object[key], query.answer);
        assert!(object.len() > 40 && object.keys().all(|key| key.len() == 36));
    }

    #[test]
    fn numbers_are_found_in_plain_loops() {
        let mut names = Vec::new();
        for seed in 0..60 {
            let (context, query) = made(Kind::MathFind, seed, 400);
            let list = &context[context.find('[').unwrap()..];
            let mut list: Vec<f64> = serde_json::from_str(list).unwrap();
            let name = query.query.split("What is the ").nth(1).unwrap();
            let name = name.split(" of the list").next().unwrap().to_owned();
            let due = if name == "median" {
                list.sort_by(f64::total_cmp);
                let n = list.len();
                match n % 2 {
                    1 => list[n / 2],
                    _ => (list[n / 2 - 1] + list[n / 2]) / 2.0,
                }
            } else {
                let largest = name.contains("largest");
                let worst = |a: f64, b: f64| if largest { a.max(b) } else { a.min(b) };
                let none = if largest { f64::MIN } else { f64::MAX };
                let skipped = ["second", "third"].iter().position(|w| name.starts_with(w));
                for _ in 0..skipped.map_or(0, |at| at + 1) {
                    let best = list.iter().copied().fold(none, worst);
                    list.retain(|x| *x != best);
                }
                list.iter().copied().fold(none, worst)
            };
            assert_eq!(query.answer.parse::<f64>().unwrap(), due, "{name}");
            names.push(name);
        }
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 7, "{names:?}");
    }

    #[test]
    fn functions_return_what_following_them_gives() {
        for seed in 0..30 {
            let (context, query) = made(Kind::CodeRun, seed, 1200);
            let call = query.query.split("does ").nth(1).unwrap();
            let (mut name, rest) = call.split_once('(').unwrap();
            let mut value: i64 = rest.split(')').next().unwrap().parse().unwrap();
            let mut depth = 0;
            while name != "x" {
                let head = format!("def {name}(x):\n    return ");
                let at = context.find(&head).unwrap() + head.len();
                let body = context[at..].lines().next().unwrap();
                let mut words = body.split(' ');
                name = words.next().unwrap().split('(').next().unwrap();
                if let Some(sign) = words.next() {
                    let n: i64 = words.next().unwrap().parse().unwrap();
                    value += if sign == "-" { -n } else { n };
                }
                depth += 1;
            }
            assert!([2, 4, 6, 8, 10].contains(&depth), "{depth}");
            assert_eq!(query.answer, value.to_string());
        }
    }
}
