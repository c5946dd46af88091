//! Methods of Python's strings, lists and dicts that change nothing.

use super::{
    Meter, Outcome, fault, format,
    run::{Given, whole},
    value::{Map, Value},
};
use std::{cell::RefCell, rc::Rc};

const OF_STRINGS: [&str; 43] = [
    "capitalize",
    "casefold",
    "center",
    "count",
    "endswith",
    "expandtabs",
    "find",
    "format",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isprintable",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
    "upper",
    "zfill",
];

/// Whether a value has a method of this name.
pub(super) fn of(value: &Value, name: &str) -> bool {
    match value {
        Value::Str(_) => OF_STRINGS.contains(&name),
        Value::List(_) => matches!(name, "count" | "index" | "copy"),
        Value::Tuple(_) => matches!(name, "count" | "index"),
        Value::Map(_) => matches!(name, "get" | "items" | "keys" | "values" | "copy"),
        Value::Loop(_) => matches!(name, "cycle" | "changed"),
        _ => false,
    }
}

/// Calls a method.
pub(super) fn call(meter: &Meter, value: &Value, name: &str, given: Given) -> Outcome<Value> {
    match value {
        Value::Str(s) => string(meter, s, name, given),
        Value::List(list) | Value::Tuple(list) => {
            if name == "copy" {
                let [] = given.bind([])?;
                return Ok(value.clone());
            }
            let [wanted] = given.bind([""])?;
            let wanted = wanted.ok_or_else(|| fault(format!("{name}: a value was expected")))?;
            let mut count = 0;
            for (i, item) in list.items.iter().enumerate() {
                if item.equals(&wanted, meter)? {
                    if name == "index" {
                        return Ok(Value::Int(i as i64));
                    }
                    count += 1;
                }
            }
            match name {
                "count" => Ok(Value::Int(count)),
                _ => Err(fault("index: the list does not have the value")),
            }
        }
        Value::Map(map) => dict(meter, map, value, name, given),
        Value::Loop(state) if name == "cycle" => match given.positional.len() {
            0 => Err(fault("cycle: values were expected")),
            n => Ok(given.positional[state.index % n].clone()),
        },
        Value::Loop(state) => {
            let now = Value::tuple(meter, given.positional)?;
            changed(meter, &state.seen, now)
        }
        other => Err(fault(format!("a {} has no method {name}", other.kind()))),
    }
}

fn changed(meter: &Meter, seen: &Rc<RefCell<Option<Value>>>, now: Value) -> Outcome<Value> {
    let mut seen = seen.borrow_mut();
    let same = match &*seen {
        Some(before) => before.equals(&now, meter)?,
        None => false,
    };
    *seen = Some(now);
    Ok(Value::Bool(!same))
}

fn dict(meter: &Meter, map: &Map, value: &Value, name: &str, given: Given) -> Outcome<Value> {
    if name == "get" {
        let [key, default] = given.bind(["", ""])?;
        let key = key.ok_or_else(|| fault("get: a key was expected"))?;
        let found = map.get(&key, meter)?.cloned();
        return Ok(found.or(default).unwrap_or(Value::None));
    }
    let [] = given.bind([])?;
    let entries = &map.entries;
    meter.elements(entries.len())?;
    let items = match name {
        "copy" => return Ok(value.clone()),
        "keys" => entries.iter().map(|(key, _)| key.clone()).collect(),
        "values" => entries.iter().map(|(_, value)| value.clone()).collect(),
        _ => {
            let mut items = Vec::with_capacity(entries.len());
            for (key, value) in entries {
                items.push(Value::tuple(meter, vec![key.clone(), value.clone()])?);
            }
            items
        }
    };
    Value::list(meter, items)
}

fn string(meter: &Meter, s: &str, name: &str, given: Given) -> Outcome<Value> {
    meter.reads(s.len())?;
    let simple = |given: Given| given.bind([]).map(|[]| ());
    let made = |text: String| Ok(Value::made(text));
    // No change of case makes more than three times the bytes.
    let recased = |given: Given| {
        simple(given)?;
        meter.makes(s.len().saturating_mul(3))
    };
    let all = |given: Given, is: fn(char) -> bool| {
        simple(given)?;
        Ok(Value::Bool(!s.is_empty() && s.chars().all(is)))
    };
    match name {
        "upper" => {
            recased(given)?;
            made(s.to_uppercase())
        }
        "lower" | "casefold" => {
            recased(given)?;
            made(s.to_lowercase())
        }
        "capitalize" => {
            recased(given)?;
            let mut chars = s.chars();
            let first = chars.next().into_iter().flat_map(char::to_uppercase);
            made(first.chain(chars.flat_map(char::to_lowercase)).collect())
        }
        "title" => {
            recased(given)?;
            let mut inside = false;
            let mut out = String::new();
            for c in s.chars() {
                match inside {
                    true => out.extend(c.to_lowercase()),
                    false => out.extend(c.to_uppercase()),
                }
                inside = c.is_alphabetic();
            }
            made(out)
        }
        "swapcase" => {
            recased(given)?;
            let mut out = String::new();
            for c in s.chars() {
                match c.is_uppercase() {
                    true => out.extend(c.to_lowercase()),
                    false => out.extend(c.to_uppercase()),
                }
            }
            made(out)
        }
        "isalnum" => all(given, char::is_alphanumeric),
        "isalpha" => all(given, char::is_alphabetic),
        "isdecimal" | "isdigit" | "isnumeric" => all(given, char::is_numeric),
        "isspace" => all(given, char::is_whitespace),
        "isascii" => {
            simple(given)?;
            Ok(Value::Bool(s.is_ascii()))
        }
        "isprintable" => {
            simple(given)?;
            Ok(Value::Bool(!s.chars().any(char::is_control)))
        }
        "isidentifier" => {
            simple(given)?;
            let first = s
                .chars()
                .next()
                .is_some_and(|c| c == '_' || c.is_alphabetic());
            let rest = s.chars().all(|c| c == '_' || c.is_alphanumeric());
            Ok(Value::Bool(first && rest))
        }
        "islower" => {
            simple(given)?;
            let cased = s.chars().any(char::is_lowercase);
            Ok(Value::Bool(cased && !s.chars().any(char::is_uppercase)))
        }
        "isupper" => {
            simple(given)?;
            let cased = s.chars().any(char::is_uppercase);
            Ok(Value::Bool(cased && !s.chars().any(char::is_lowercase)))
        }
        "istitle" => {
            simple(given)?;
            let (mut inside, mut cased, mut right) = (false, false, true);
            for c in s.chars() {
                right &= !(if inside {
                    c.is_uppercase()
                } else {
                    c.is_lowercase()
                });
                inside = c.is_uppercase() || c.is_lowercase();
                cased |= inside;
            }
            Ok(Value::Bool(cased && right))
        }
        "strip" | "lstrip" | "rstrip" => {
            let [chars] = given.bind(["chars"])?;
            let chars = match &chars {
                None | Some(Value::None) => None,
                Some(chars) => Some(text(name, chars)?),
            };
            // Every character at the ends is looked for among these.
            let width = chars.map_or(0, str::len);
            meter.steps(s.len().saturating_mul(width) / 16)?;
            let gone = |c: char| match chars {
                Some(chars) => chars.contains(c),
                None => c.is_whitespace(),
            };
            let part = match name {
                "strip" => s.trim_matches(gone),
                "lstrip" => s.trim_start_matches(gone),
                _ => s.trim_end_matches(gone),
            };
            Value::part(meter, part)
        }
        "removeprefix" | "removesuffix" => {
            let [affix] = given.bind([""])?;
            let affix = affix.unwrap_or(Value::None);
            let affix = text(name, &affix)?;
            let rest = match name {
                "removeprefix" => s.strip_prefix(affix),
                _ => s.strip_suffix(affix),
            };
            Value::part(meter, rest.unwrap_or(s))
        }
        "startswith" | "endswith" => {
            let [affix] = given.bind([""])?;
            let affix = affix.unwrap_or(Value::None);
            let is = |affix: &Value| {
                let affix = text(name, affix)?;
                meter.reads(affix.len())?;
                Ok(match name {
                    "startswith" => s.starts_with(affix),
                    _ => s.ends_with(affix),
                })
            };
            match &affix {
                Value::Tuple(list) => {
                    for affix in &list.items {
                        if is(affix)? {
                            return Ok(Value::Bool(true));
                        }
                    }
                    Ok(Value::Bool(false))
                }
                one => is(one).map(Value::Bool),
            }
        }
        "find" | "rfind" | "index" | "rindex" => {
            let [part] = given.bind([""])?;
            let part = part.unwrap_or(Value::None);
            let part = text(name, &part)?;
            meter.reads(part.len())?;
            let found = match name {
                "find" | "index" => s.find(part),
                _ => s.rfind(part),
            };
            match found {
                Some(at) => Ok(Value::Int(s[..at].chars().count() as i64)),
                None if name.ends_with("find") => Ok(Value::Int(-1)),
                None => Err(fault(format!("{name}: the string does not have the part"))),
            }
        }
        "count" => {
            let [part] = given.bind([""])?;
            let part = part.unwrap_or(Value::None);
            Ok(Value::Int(s.matches(text(name, &part)?).count() as i64))
        }
        "replace" => {
            let [old, new, count] = given.bind(["old", "new", "count"])?;
            let (old, new) = (old.unwrap_or(Value::None), new.unwrap_or(Value::None));
            let (old, new) = (text(name, &old)?, text(name, &new)?);
            let most = match count {
                None | Some(Value::None) => usize::MAX,
                Some(count) => usize::try_from(whole(&count)?).unwrap_or(usize::MAX),
            };
            meter.reads(s.len() + old.len())?;
            let found = s.matches(old).count().min(most);
            meter.makes(s.len() + found.saturating_mul(new.len()))?;
            made(s.replacen(old, new, found))
        }
        "split" | "rsplit" => {
            let [between, most] = given.bind(["sep", "maxsplit"])?;
            let most = match most {
                None | Some(Value::None) => usize::MAX,
                Some(most) => usize::try_from(whole(&most)?).unwrap_or(usize::MAX),
            };
            let between = match &between {
                None | Some(Value::None) => None,
                Some(between) => Some(text(name, between)?).filter(|b| !b.is_empty()),
            };
            split(meter, s, between, most, name == "split")
        }
        "splitlines" => {
            let [keep] = given.bind(["keepends"])?;
            let keep = keep.is_some_and(|keep| keep.truth());
            splitlines(meter, s, keep)
        }
        "partition" | "rpartition" => {
            let [between] = given.bind([""])?;
            let between = between.unwrap_or(Value::None);
            let between = text(name, &between)?;
            if between.is_empty() {
                return Err(fault("an empty separator"));
            }
            let found = match name {
                "partition" => s.split_once(between).map(|(a, b)| [a, between, b]),
                _ => s.rsplit_once(between).map(|(a, b)| [a, between, b]),
            };
            let whole = match name {
                "partition" => [s, "", ""],
                _ => ["", "", s],
            };
            let parts = found.unwrap_or(whole);
            let parts: Outcome<Vec<_>> = parts.iter().map(|p| Value::part(meter, p)).collect();
            Value::tuple(meter, parts?)
        }
        "join" => {
            let [items] = given.bind([""])?;
            let items = items.unwrap_or(Value::None).defined()?.iterate(meter)?;
            let mut out = String::new();
            for (i, item) in items.iter().enumerate() {
                let item = text(name, item)?;
                meter.makes(s.len() + item.len())?;
                if i > 0 {
                    out.push_str(s);
                }
                out.push_str(item);
            }
            made(out)
        }
        "center" | "ljust" | "rjust" | "zfill" => {
            let [width, fill] = given.bind(["width", "fillchar"])?;
            let width = width.as_ref().map(whole).transpose()?.unwrap_or(0);
            let width = usize::try_from(width).unwrap_or(0);
            let fill = match &fill {
                None if name == "zfill" => '0',
                None => ' ',
                Some(fill) => match text(name, fill)?.chars().next() {
                    Some(c) => c,
                    None => return Err(fault(format!("{name}: one character was expected"))),
                },
            };
            let length = s.chars().count();
            let missing = width.saturating_sub(length);
            meter.makes(s.len() + missing.saturating_mul(4))?;
            let many = |n: usize| fill.to_string().repeat(n);
            made(match name {
                "ljust" => s.to_owned() + &many(missing),
                "rjust" => many(missing) + s,
                "zfill" => match s.strip_prefix(['-', '+']) {
                    Some(rest) => s[..1].to_owned() + &many(missing) + rest,
                    None => many(missing) + s,
                },
                _ => {
                    // As Python has it: the odd one goes left if the width is odd, too.
                    let left = missing / 2 + (missing & width & 1);
                    many(left) + s + &many(missing - left)
                }
            })
        }
        "expandtabs" => {
            let [size] = given.bind(["tabsize"])?;
            let size = size.as_ref().map(whole).transpose()?.unwrap_or(8);
            let size = usize::try_from(size).unwrap_or(0);
            let tabs = s.matches('\t').count();
            meter.makes(s.len() + tabs.saturating_mul(size))?;
            let (mut out, mut column) = (String::new(), 0);
            for c in s.chars() {
                match c {
                    '\t' if size > 0 => {
                        let n = size - column % size;
                        out.push_str(&" ".repeat(n));
                        column += n;
                    }
                    '\t' => {}
                    c => {
                        out.push(c);
                        column = if matches!(c, '\n' | '\r') {
                            0
                        } else {
                            column + 1
                        };
                    }
                }
            }
            made(out)
        }
        "format" => made(format::braces(meter, s, &given)?),
        _ => Err(fault(format!("a string has no method {name}"))),
    }
}

fn text<'a>(method: &str, value: &'a Value) -> Outcome<&'a str> {
    let found = value.defined()?.as_str();
    found.ok_or_else(|| {
        fault(format!(
            "{method}: a string was expected, found a {}",
            value.kind()
        ))
    })
}

fn split(
    meter: &Meter,
    s: &str,
    between: Option<&str>,
    most: usize,
    from_left: bool,
) -> Outcome<Value> {
    let pieces = match between {
        Some(between) => s.matches(between).count().min(most) + 1,
        None => s.split_whitespace().count().min(most.saturating_add(1)),
    };
    // Each piece is an element and a text.
    meter.elements(pieces.saturating_mul(2))?;
    meter.makes(s.len())?;
    let limit = most.saturating_add(1);
    let mut parts: Vec<Value> = match between {
        Some(between) if from_left => s.splitn(limit, between).map(Value::text).collect(),
        Some(between) => s.rsplitn(limit, between).map(Value::text).collect(),
        None => {
            let mut parts = Vec::new();
            let mut rest = s.trim();
            while !rest.is_empty() {
                let cut = match from_left {
                    _ if parts.len() == most => None,
                    true => rest.split_once(char::is_whitespace),
                    false => rest.rsplit_once(char::is_whitespace).map(|(a, b)| (b, a)),
                };
                let (part, others) = cut.unwrap_or((rest, ""));
                parts.push(Value::text(part));
                rest = match from_left {
                    true => others.trim_start(),
                    false => others.trim_end(),
                };
            }
            parts
        }
    };
    if !from_left {
        parts.reverse();
    }
    Value::list(meter, parts)
}

fn splitlines(meter: &Meter, s: &str, keep: bool) -> Outcome<Value> {
    let ends = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'
                ..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    meter.elements(s.matches(ends).count().saturating_mul(2))?;
    meter.makes(s.len())?;
    let mut lines = Vec::new();
    let mut rest = s;
    while !rest.is_empty() {
        let end = rest.find(ends).unwrap_or(rest.len());
        let after = &rest[end..];
        let width = match after.starts_with("\r\n") {
            true => 2,
            false => after.chars().next().map_or(0, char::len_utf8),
        };
        let kept = if keep { end + width } else { end };
        lines.push(Value::text(&rest[..kept]));
        rest = &rest[end + width..];
    }
    Value::list(meter, lines)
}
