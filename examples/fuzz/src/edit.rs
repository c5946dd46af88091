//! Valid inputs, altered where their structure is.

use crate::Feed;
use serde_json::{Map, Value, json};
use std::ops::Range;

/// No input becomes longer, so that what is refused for its mere length does not take all the time.
const LONGEST: usize = 1 << 18;

/// One to four alterations of `seed`, most of them at its `fields`: numbers become other numbers, pieces vanish,
/// come twice, or move.
pub fn bytes(seed: &[u8], fields: &[Range<usize>], feed: &mut Feed<'_>) -> Vec<u8> {
    let mut out = seed.to_vec();
    for _ in 0..=feed.below(4) {
        if out.is_empty() {
            return out;
        }
        let mut field = match fields.is_empty() {
            true => 0..0,
            false => fields[feed.below(fields.len())].clone(),
        };
        let kind = feed.below(10);
        if field.is_empty() || field.end > out.len() || kind > 4 {
            let start = feed.below(out.len());
            let length = [1, 4, 8, usize::from(feed.byte()) + 1][feed.below(4)];
            field = start..(start + length).min(out.len());
        }
        match kind {
            0..=2 | 5 => {
                let number = feed.number().to_le_bytes();
                for (byte, new) in out[field].iter_mut().zip(number) {
                    *byte = new;
                }
            }
            // One more or one less.
            3 => {
                let delta = [1u8, 255][feed.below(2)];
                out[field.start] = out[field.start].wrapping_add(delta);
            }
            4 | 6 => out[field.start] ^= 1 << feed.below(8),
            7 => drop(out.drain(field)),
            8 => {
                let piece = out[field].to_vec();
                let to = feed.below(out.len() + 1);
                for _ in 0..=feed.below(4) {
                    if out.len() + piece.len() <= LONGEST {
                        out.splice(to..to, piece.iter().copied());
                    }
                }
            }
            _ => out.truncate(field.start),
        }
    }
    out
}

/// One to four alterations of a text: pieces vanish, come again, many times or elsewhere, and `words` are put in.
pub fn text(seed: &str, words: &[&str], feed: &mut Feed<'_>) -> String {
    let mut out = seed.to_owned();
    for _ in 0..=feed.below(4) {
        let at = |feed: &mut Feed<'_>| {
            let mut at = feed.below(out.len() + 1);
            while !out.is_char_boundary(at) {
                at -= 1;
            }
            at
        };
        let (a, b) = (at(feed), at(feed));
        let piece = out[a.min(b)..a.max(b)].to_owned();
        match feed.below(6) {
            0 => out.replace_range(a.min(b)..a.max(b), ""),
            1 => out.insert_str(a, feed.of(words)),
            2 => out.replace_range(a.min(b)..a.max(b), feed.of(words)),
            3 => out.insert_str(a, &piece),
            4 => {
                let times = feed.below(1 << 12).min(LONGEST / (piece.len() + 1));
                out.insert_str(a, &piece.repeat(times));
            }
            _ => {
                let own = feed.text(24);
                out.insert_str(a, &own);
            }
        }
        if out.len() > LONGEST {
            let mut end = LONGEST;
            while !out.is_char_boundary(end) {
                end -= 1;
            }
            out.truncate(end);
        }
    }
    out
}

/// One to five alterations of a document: values become others, vanish, change places, and nest. `parts` are values
/// and names that the format knows.
pub fn json(mut value: Value, parts: &[Value], feed: &mut Feed<'_>) -> Value {
    for _ in 0..=feed.below(5) {
        let all = count(&value);
        let other = node(&mut value, feed.below(all)).clone();
        let found = node(&mut value, feed.below(all));
        match feed.below(8) {
            0 | 1 => *found = odd(found, feed),
            2 if !parts.is_empty() => *found = parts[feed.below(parts.len())].clone(),
            3 => *found = other,
            4 => match found {
                Value::Object(map) => {
                    let key = map.keys().nth(feed.below(map.len())).cloned();
                    key.and_then(|key| map.remove(&key));
                }
                Value::Array(list) if !list.is_empty() => {
                    list.remove(feed.below(list.len()));
                }
                _ => *found = Value::Null,
            },
            5 => match found {
                // Under a name that the format knows, or any.
                Value::Object(map) => {
                    let names: Vec<&str> = parts.iter().filter_map(Value::as_str).collect();
                    let key = match names.is_empty() {
                        true => feed.text(12),
                        false => feed.of(&names).to_owned(),
                    };
                    map.insert(key, other);
                }
                Value::Array(list) if list.len() < 4096 => {
                    let at = feed.below(list.len() + 1);
                    let times = 1 << feed.below(8);
                    list.splice(at..at, std::iter::repeat_n(other, times.min(4)));
                }
                _ => *found = json!([other]),
            },
            6 => {
                // Deeply nested, or once.
                for _ in 0..1 << feed.below(8) {
                    let inner = found.take();
                    *found = match feed.below(2) {
                        0 => json!([inner]),
                        _ => json!({ "a": inner }),
                    };
                }
            }
            _ => *found = Value::Number(feed.number().into()),
        }
        if all > 1 << 16 {
            break;
        }
    }
    value
}

/// Something that is not what stood there.
fn odd(found: &Value, feed: &mut Feed<'_>) -> Value {
    match (found, feed.below(9)) {
        (Value::Number(n), 0..=2) => {
            let n = n.as_f64().unwrap_or(0.0);
            json!([n + 1.0, n - 1.0, -n, n * 2.0, n / 2.0, n * 1e18, 1e308][feed.below(7)])
        }
        (Value::Number(n), 3..=5) => {
            let n = n.as_i64().unwrap_or(1);
            let to = [1, -1, n, n.wrapping_neg()];
            json!(n.wrapping_add(to[feed.below(4)]))
        }
        (Value::String(text), 0..=5) => match feed.below(5) {
            0 => json!(""),
            1 => json!(text.repeat(1 << feed.below(8))),
            2 => json!(feed.text(24)),
            3 => json!(format!("{text}{}", feed.text(4))),
            _ => json!(text.chars().rev().collect::<String>()),
        },
        (_, 6) => json!([true, false][feed.below(2)]),
        (_, 7) => json!(feed.text(16)),
        (_, 8) => Value::Object(Map::new()),
        _ => {
            json!([null, 0, -1, [], "", 1.5e-45, 4_294_967_296u64, "\u{0}"])[feed.below(8)].clone()
        }
    }
}

fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(list) => list.iter().map(count).sum(),
        Value::Object(map) => map.values().map(count).sum(),
        _ => 0,
    }
}

/// Value number `n` of a document, from its beginning.
fn node(value: &mut Value, mut n: usize) -> &mut Value {
    fn find<'a>(value: &'a mut Value, n: &mut usize) -> Option<&'a mut Value> {
        if *n == 0 {
            return Some(value);
        }
        *n -= 1;
        match value {
            Value::Array(list) => list.iter_mut().find_map(|inner| find(inner, n)),
            Value::Object(map) => map.values_mut().find_map(|inner| find(inner, n)),
            _ => None,
        }
    }
    let all = count(value);
    n %= all;
    find(value, &mut n).expect("there are more values")
}
