//! Filters and tests.

use super::{
    Meter, Outcome, fault, format, json, methods,
    run::{Given, Run, whole},
    value::Value,
};
use std::{cmp::Ordering, rc::Rc};

/// A filter.
pub(super) fn apply(run: &mut Run<'_>, name: &str, value: Value, given: Given) -> Outcome<Value> {
    let meter = run.meter;
    meter.steps(1)?;
    match name {
        "default" | "d" => {
            let [other, falsy] = given.bind(["default_value", "boolean"])?;
            let falsy = falsy.is_some_and(|b| b.truth());
            let missing = matches!(value, Value::Undefined(_)) || (falsy && !value.truth());
            return Ok(match missing {
                true => other.unwrap_or_else(|| Value::text("")),
                false => value,
            });
        }
        "map" => return map(run, &value, given),
        "select" | "reject" => return select(run, &value, given, name == "select", false),
        "selectattr" | "rejectattr" => {
            return select(run, &value, given, name == "selectattr", true);
        }
        "sort" => {
            let [reverse, sensitive, attribute] =
                given.bind(["reverse", "case_sensitive", "attribute"])?;
            let sorted = sort(run, &value, reverse, sensitive, attribute)?;
            return Value::list(meter, sorted);
        }
        "min" | "max" => {
            let [sensitive, attribute] = given.bind(["case_sensitive", "attribute"])?;
            let sorted = sort(run, &value, None, sensitive, attribute)?;
            let found = if name == "min" {
                sorted.first()
            } else {
                sorted.last()
            };
            return Ok(found.cloned().unwrap_or_else(|| missing(name)));
        }
        "unique" => {
            let [sensitive, attribute] = given.bind(["case_sensitive", "attribute"])?;
            let mut seen: Vec<Value> = Vec::new();
            let mut kept = Vec::new();
            for item in value.iterate(meter)? {
                let key = sort_key(run, &item, &sensitive, &attribute)?;
                let mut known = false;
                for other in &seen {
                    known |= other.equals(&key, meter)?;
                }
                if !known {
                    seen.push(key);
                    kept.push(item);
                }
            }
            return Value::list(meter, kept);
        }
        "sum" => {
            let [attribute, start] = given.bind(["attribute", "start"])?;
            let mut sum = start.unwrap_or(Value::Int(0));
            for item in value.iterate(meter)? {
                let item = match &attribute {
                    Some(path) => dig(run, &item, path)?,
                    None => item,
                };
                sum = add(&sum, &item)?;
            }
            return Ok(sum);
        }
        "attr" => {
            let [name] = given.bind(["name"])?;
            let name = name.unwrap_or(Value::None).to_text(meter)?;
            return run.attribute(&value, &name);
        }
        "join" => {
            let [between, attribute] = given.bind(["d", "attribute"])?;
            let between = between.map(|b| b.to_text(meter)).transpose()?;
            let mut out = String::new();
            for (i, item) in value.iterate(meter)?.into_iter().enumerate() {
                let item = match &attribute {
                    Some(path) => dig(run, &item, path)?,
                    None => item,
                };
                if i > 0
                    && let Some(between) = &between
                {
                    meter.makes(between.len())?;
                    out.push_str(between);
                }
                item.print(&mut out, meter)?;
            }
            return Ok(Value::made(out));
        }
        _ => {}
    }
    alone(meter, name, value, given)
}

/// Filters that ask nothing of the template.
fn alone(meter: &Meter, name: &str, value: Value, given: Given) -> Outcome<Value> {
    let text = || value.to_text(meter);
    match name {
        "trim" | "upper" | "lower" | "title" | "capitalize" | "replace" | "center" => {
            let text = Value::Str(text()?);
            let method = match name {
                "trim" => "strip",
                other => other,
            };
            let mut given = given;
            if name == "center" && given.positional.is_empty() && given.named.is_empty() {
                given.positional.push(Value::Int(80));
            }
            if name == "replace" {
                // Jinja's filter takes any values, Python's method strings only.
                for argument in given.positional.iter_mut().take(2) {
                    *argument = Value::Str(argument.to_text(meter)?);
                }
            }
            methods::call(meter, &text, method, given)
        }
        "length" | "count" => {
            let [] = given.bind([])?;
            Ok(Value::Int(value.length(meter)? as i64))
        }
        "string" => {
            let [] = given.bind([])?;
            Ok(Value::Str(text()?))
        }
        "safe" => {
            let [] = given.bind([])?;
            Ok(value)
        }
        "list" => {
            let [] = given.bind([])?;
            Value::list(meter, value.iterate(meter)?)
        }
        "first" | "last" => {
            let [] = given.bind([])?;
            let items = value.iterate(meter)?;
            let found = if name == "first" {
                items.first()
            } else {
                items.last()
            };
            Ok(found.cloned().unwrap_or_else(|| missing(name)))
        }
        "reverse" => {
            let [] = given.bind([])?;
            if let Some(s) = value.as_str() {
                meter.makes(s.len())?;
                return Ok(Value::made(s.chars().rev().collect()));
            }
            let mut items = value.iterate(meter)?;
            items.reverse();
            Value::list(meter, items)
        }
        "items" => {
            let [] = given.bind([])?;
            match &value {
                Value::Undefined(_) => Value::list(meter, Vec::new()),
                Value::Map(_) => methods::call(meter, &value, "items", Given::default()),
                other => Err(fault(format!(
                    "items: expected a dict, found a {}",
                    other.kind()
                ))),
            }
        }
        "dictsort" => dictsort(meter, &value, given),
        "tojson" => json::filter(meter, &value, given),
        "pprint" => {
            let [] = given.bind([])?;
            let mut out = String::new();
            value.repr(&mut out, meter)?;
            Ok(Value::made(out))
        }
        "format" => {
            let s = text()?;
            let arguments = if given.named.is_empty() {
                Value::tuple(meter, given.positional)?
            } else {
                let named = given.named.into_iter().map(|(k, v)| (Value::Str(k), v));
                Value::map(meter, named.collect())?
            };
            Ok(Value::made(format::percent(meter, &s, &arguments)?))
        }
        "int" => {
            let [default, base] = given.bind(["default", "base"])?;
            let base = base.as_ref().map(whole).transpose()?.unwrap_or(10);
            Ok(to_int(meter, &value, base)?
                .map(Value::Int)
                .or(default)
                .unwrap_or(Value::Int(0)))
        }
        "float" => {
            let [default] = given.bind(["default"])?;
            let found = match &value {
                Value::Str(s) => {
                    meter.reads(s.len())?;
                    s.trim().parse().ok()
                }
                other => other.as_number(),
            };
            Ok(found
                .map(Value::Float)
                .or(default)
                .unwrap_or(Value::Float(0.0)))
        }
        "abs" => {
            let [] = given.bind([])?;
            match value {
                Value::Float(x) => Ok(Value::Float(x.abs())),
                other => match whole(&other)?.checked_abs() {
                    Some(n) => Ok(Value::Int(n)),
                    None => Err(fault("a whole number of more than 64 bits")),
                },
            }
        }
        "round" => {
            let [precision, method] = given.bind(["precision", "method"])?;
            let precision = precision.as_ref().map(whole).transpose()?.unwrap_or(0);
            let x = number(&value)?;
            let scale = 10f64.powi(precision.clamp(-300, 300) as i32);
            let rounded = match method.as_ref().and_then(Value::as_str) {
                Some("ceil") => (x * scale).ceil() / scale,
                Some("floor") => (x * scale).floor() / scale,
                None | Some("common") => match usize::try_from(precision) {
                    Ok(digits) => format!("{x:.*}", digits.min(17)).parse().unwrap_or(x),
                    Err(_) => (x * scale).round() / scale,
                },
                Some(other) => return Err(fault(format!("round: there is no method {other:?}"))),
            };
            Ok(Value::Float(rounded))
        }
        "indent" => {
            let [width, first, blank] = given.bind(["width", "first", "blank"])?;
            let is = |flag: Option<Value>| flag.is_some_and(|flag| flag.truth());
            let (first, blank) = (is(first), is(blank));
            let text = text()?;
            let indent = match width {
                Some(Value::Str(indent)) => indent,
                Some(width) => {
                    let width = usize::try_from(whole(&width)?).unwrap_or(0);
                    meter.makes(width)?;
                    " ".repeat(width).into()
                }
                None => "    ".into(),
            };
            let lines = text.matches('\n').count() + 1;
            meter.makes(text.len() + lines.saturating_mul(indent.len()))?;
            let mut out = String::new();
            for (i, line) in text.split('\n').enumerate() {
                if i > 0 {
                    out.push('\n');
                }
                let shown = if i == 0 {
                    first
                } else {
                    blank || !line.is_empty()
                };
                if shown {
                    out.push_str(&indent);
                }
                out.push_str(line);
            }
            Ok(Value::made(out))
        }
        "truncate" => {
            let [length, kill, end, leeway] =
                given.bind(["length", "killwords", "end", "leeway"])?;
            let size = |n: Option<Value>, default: i64| match n {
                Some(n) => whole(&n).map(|n| usize::try_from(n).unwrap_or(0)),
                None => Ok(default as usize),
            };
            let (length, leeway) = (size(length, 255)?, size(leeway, 5)?);
            let end = match end {
                Some(end) => end.to_text(meter)?,
                None => "...".into(),
            };
            let text = text()?;
            meter.makes(text.len().saturating_mul(5) + end.len())?;
            let chars: Vec<char> = text.chars().collect();
            if chars.len() <= length.saturating_add(leeway) {
                return Ok(Value::Str(text));
            }
            let keep = length.saturating_sub(end.chars().count()).min(chars.len());
            let mut out: String = chars[..keep].iter().collect();
            if !kill.is_some_and(|kill| kill.truth())
                && let Some((words, _)) = out.rsplit_once(' ')
            {
                out.truncate(words.len());
            }
            out.push_str(&end);
            Ok(Value::made(out))
        }
        "escape" | "e" | "forceescape" => {
            let text = text()?;
            meter.makes(text.len().saturating_mul(5))?;
            let mut out = String::new();
            for c in text.chars() {
                match c {
                    '&' => out.push_str("&amp;"),
                    '<' => out.push_str("&lt;"),
                    '>' => out.push_str("&gt;"),
                    '\'' => out.push_str("&#39;"),
                    '"' => out.push_str("&#34;"),
                    c => out.push(c),
                }
            }
            Ok(Value::made(out))
        }
        "wordcount" => {
            let text = text()?;
            meter.reads(text.len())?;
            Ok(Value::Int(text.split_whitespace().count() as i64))
        }
        "batch" => {
            let [size, fill] = given.bind(["linecount", "fill_with"])?;
            let size = size.as_ref().map(whole).transpose()?.unwrap_or(0);
            let size = usize::try_from(size).unwrap_or(0);
            if size == 0 {
                return Err(fault("batch: a number of at least 1 was expected"));
            }
            let mut rows = Vec::new();
            for row in value.iterate(meter)?.chunks(size) {
                let mut row = row.to_vec();
                if let Some(fill) = &fill {
                    meter.elements(size)?;
                    row.resize(size, fill.clone());
                }
                rows.push(Value::list(meter, row)?);
            }
            Value::list(meter, rows)
        }
        _ => Err(fault(format!("there is no filter {name:?}"))),
    }
}

/// A test.
pub(super) fn test(run: &Run<'_>, name: &str, value: &Value, given: Given) -> Outcome<bool> {
    let meter = run.meter;
    meter.steps(1)?;
    let [other] = given.bind([""])?;
    let with = || {
        other
            .as_ref()
            .ok_or_else(|| fault(format!("the test {name} compares with a value")))
    };
    let order = || value.defined()?.order(with()?.defined()?, meter);
    let cased = |wanted: fn(char) -> bool, other: fn(char) -> bool| match value.as_str() {
        Some(s) => {
            meter.reads(s.len())?;
            Ok(s.chars().any(wanted) && !s.chars().any(other))
        }
        None => Ok(false),
    };
    Ok(match name {
        "defined" => !matches!(value, Value::Undefined(_)),
        "undefined" => matches!(value, Value::Undefined(_)),
        "none" => matches!(value, Value::None),
        "boolean" => matches!(value, Value::Bool(_)),
        "true" => matches!(value, Value::Bool(true)),
        "false" => matches!(value, Value::Bool(false)),
        "integer" => matches!(value, Value::Int(_)),
        "float" => matches!(value, Value::Float(_)),
        "number" => matches!(value, Value::Bool(_) | Value::Int(_) | Value::Float(_)),
        "string" => matches!(value, Value::Str(_)),
        "mapping" => matches!(value, Value::Map(_)),
        "sequence" => matches!(
            value,
            Value::Str(_) | Value::List(_) | Value::Tuple(_) | Value::Map(_) | Value::Undefined(_)
        ),
        "iterable" => matches!(
            value,
            Value::Str(_)
                | Value::List(_)
                | Value::Tuple(_)
                | Value::Map(_)
                | Value::Undefined(_)
                | Value::Loop(_)
        ),
        "callable" => matches!(value, Value::Callable(_)),
        "escaped" => false,
        "even" => whole(value)?.rem_euclid(2) == 0,
        "odd" => whole(value)?.rem_euclid(2) == 1,
        "divisibleby" => match whole(with()?)? {
            0 => return Err(fault("a division by zero")),
            n => whole(value)?.checked_rem(n).unwrap_or(0) == 0,
        },
        "lower" => cased(char::is_lowercase, char::is_uppercase)?,
        "upper" => cased(char::is_uppercase, char::is_lowercase)?,
        "eq" | "equalto" | "==" => value.equals(with()?, meter)?,
        "ne" | "!=" => !value.equals(with()?, meter)?,
        "lt" | "lessthan" | "<" => order()? == Ordering::Less,
        "le" | "<=" => order()? != Ordering::Greater,
        "gt" | "greaterthan" | ">" => order()? == Ordering::Greater,
        "ge" | ">=" => order()? != Ordering::Less,
        "in" => with()?.contains(value, meter)?,
        "sameas" => match (value, with()?) {
            (Value::List(a), Value::List(b)) | (Value::Tuple(a), Value::Tuple(b)) => {
                Rc::ptr_eq(a, b)
            }
            (Value::Map(a), Value::Map(b)) => Rc::ptr_eq(a, b),
            (Value::Bool(a), Value::Bool(b)) => a == b,
            (Value::Bool(_), _) | (_, Value::Bool(_)) => false,
            (a, b) => a.equals(b, meter)?,
        },
        _ => return Err(fault(format!("there is no test {name:?}"))),
    })
}

fn map(run: &mut Run<'_>, value: &Value, mut given: Given) -> Outcome<Value> {
    let items = value.iterate(run.meter)?;
    let mut out = Vec::with_capacity(items.len());
    if given.positional.is_empty() {
        let [attribute, default] = given.bind(["attribute", "default"])?;
        let path = attribute.ok_or_else(|| fault("map: a filter or an attribute was expected"))?;
        for item in &items {
            out.push(dig_or(run, item, &path, default.as_ref())?);
        }
    } else {
        let filter = given.positional.remove(0).to_text(run.meter)?;
        for item in items {
            let given = copied(run.meter, &given)?;
            out.push(apply_one(run, &filter, item, given)?);
        }
    }
    Value::list(run.meter, out)
}

/// A filter of another filter's: one level deeper.
fn apply_one(run: &mut Run<'_>, name: &str, value: Value, given: Given) -> Outcome<Value> {
    run.meter.enter()?;
    let value = apply(run, name, value, given)?;
    run.meter.leave();
    Ok(value)
}

fn copied(meter: &Meter, given: &Given) -> Outcome<Given> {
    meter.elements(given.positional.len() + given.named.len())?;
    Ok(Given {
        positional: given.positional.clone(),
        named: given.named.clone(),
    })
}

fn select(
    run: &Run<'_>,
    value: &Value,
    mut given: Given,
    wanted: bool,
    attribute: bool,
) -> Outcome<Value> {
    let items = value.iterate(run.meter)?;
    let mut next = |what: &str| match given.positional.is_empty() {
        true => Err(fault(format!("{what} was expected"))),
        false => Ok(given.positional.remove(0)),
    };
    let path = match attribute {
        true => Some(next("an attribute")?),
        false => None,
    };
    let name = next("a test")
        .ok()
        .map(|name| name.to_text(run.meter))
        .transpose()?;
    let mut kept = Vec::new();
    for item in items {
        let found = match &path {
            Some(path) => dig(run, &item, path)?,
            None => item.clone(),
        };
        let holds = match &name {
            Some(name) => test(run, name, &found, copied(run.meter, &given)?)?,
            None => found.truth(),
        };
        if holds == wanted {
            kept.push(item);
        }
    }
    Value::list(run.meter, kept)
}

/// An attribute of an attribute, `a.b.0`.
fn dig(run: &Run<'_>, value: &Value, path: &Value) -> Outcome<Value> {
    dig_or(run, value, path, None)
}

/// The same; `default` stands for each that there is not.
fn dig_or(run: &Run<'_>, value: &Value, path: &Value, default: Option<&Value>) -> Outcome<Value> {
    let found = |value: Value| match (value, default) {
        (Value::Undefined(_), Some(default)) => default.clone(),
        (value, _) => value,
    };
    if let Value::Int(_) = path {
        return run.item(value, path).map(found);
    }
    let path = path.to_text(run.meter)?;
    run.meter.makes(path.len())?;
    let mut value = value.clone();
    for part in path.split('.') {
        run.meter.steps(1)?;
        let key = match part.parse::<i64>() {
            Ok(n) => Value::Int(n),
            Err(_) => Value::text(part),
        };
        value = found(run.item(&value, &key)?);
    }
    Ok(value)
}

fn sort_key(
    run: &Run<'_>,
    item: &Value,
    sensitive: &Option<Value>,
    attribute: &Option<Value>,
) -> Outcome<Value> {
    let key = match attribute {
        Some(path) => dig(run, item, path)?,
        None => item.clone(),
    };
    folded(run.meter, key, sensitive)
}

fn folded(meter: &Meter, key: Value, sensitive: &Option<Value>) -> Outcome<Value> {
    match &key {
        Value::Str(s) if !sensitive.as_ref().is_some_and(Value::truth) => {
            meter.makes(s.len())?;
            Ok(Value::made(s.to_lowercase()))
        }
        _ => Ok(key),
    }
}

fn sort(
    run: &Run<'_>,
    value: &Value,
    reverse: Option<Value>,
    sensitive: Option<Value>,
    attribute: Option<Value>,
) -> Outcome<Vec<Value>> {
    let mut keyed = Vec::new();
    for item in value.iterate(run.meter)? {
        keyed.push((sort_key(run, &item, &sensitive, &attribute)?, item));
    }
    let reverse = reverse.is_some_and(|reverse| reverse.truth());
    let sorted = merge_sort(run.meter, keyed, reverse)?;
    Ok(sorted.into_iter().map(|(_, item)| item).collect())
}

/// Stable. (The library's sort may panic where an order is none, and has no way to fail.)
fn merge_sort(
    meter: &Meter,
    items: Vec<(Value, Value)>,
    reverse: bool,
) -> Outcome<Vec<(Value, Value)>> {
    let mut runs: Vec<Vec<(Value, Value)>> = items.into_iter().map(|item| vec![item]).collect();
    while runs.len() > 1 {
        let mut merged = Vec::with_capacity(runs.len() / 2 + 1);
        let mut pairs = runs.into_iter();
        while let Some(left) = pairs.next() {
            let Some(right) = pairs.next() else {
                merged.push(left);
                break;
            };
            let mut out = Vec::with_capacity(left.len() + right.len());
            let (mut left, mut right) = (left.into_iter().peekable(), right.into_iter().peekable());
            while let (Some(a), Some(b)) = (left.peek(), right.peek()) {
                let order = a.0.order(&b.0, meter)?;
                let order = if reverse { order.reverse() } else { order };
                let next = if order == Ordering::Greater {
                    right.next()
                } else {
                    left.next()
                };
                out.extend(next);
            }
            out.extend(left);
            out.extend(right);
            merged.push(out);
        }
        runs = merged;
    }
    Ok(runs.pop().unwrap_or_default())
}

fn dictsort(meter: &Meter, value: &Value, given: Given) -> Outcome<Value> {
    let [sensitive, by, reverse] = given.bind(["case_sensitive", "by", "reverse"])?;
    let Value::Map(map) = value.defined()? else {
        return Err(fault(format!(
            "dictsort: expected a dict, found a {}",
            value.kind()
        )));
    };
    let by_value = by.as_ref().and_then(Value::as_str) == Some("value");
    let mut keyed = Vec::new();
    meter.elements(map.entries.len())?;
    for (key, value) in &map.entries {
        let by = if by_value { value } else { key };
        let pair = Value::tuple(meter, vec![key.clone(), value.clone()])?;
        keyed.push((folded(meter, by.clone(), &sensitive)?, pair));
    }
    let sorted = merge_sort(meter, keyed, reverse.is_some_and(|reverse| reverse.truth()))?;
    Value::list(meter, sorted.into_iter().map(|(_, pair)| pair).collect())
}

fn add(a: &Value, b: &Value) -> Outcome<Value> {
    if let (Some(a), Some(b)) = (a.as_int(), b.as_int()) {
        return match a.checked_add(b) {
            Some(n) => Ok(Value::Int(n)),
            None => Err(fault("a whole number of more than 64 bits")),
        };
    }
    Ok(Value::Float(number(a)? + number(b)?))
}

fn number(value: &Value) -> Outcome<f64> {
    let found = value.defined()?.as_number();
    found.ok_or_else(|| fault(format!("a number was expected, found a {}", value.kind())))
}

fn to_int(meter: &Meter, value: &Value, base: i64) -> Outcome<Option<i64>> {
    let Some(s) = value.as_str() else {
        return Ok(match value {
            Value::Float(x) if x.is_finite() && x.abs() < 9e18 => Some(x.trunc() as i64),
            other => other.as_int(),
        });
    };
    meter.makes(s.len())?;
    let text = s.trim().replace('_', "");
    let base = u32::try_from(base)
        .ok()
        .filter(|base| (2..=36).contains(base));
    let Some(base) = base else {
        return Err(fault("int: a base from 2 to 36 was expected"));
    };
    let digits = match base {
        16 => text.trim_start_matches("0x"),
        8 => text.trim_start_matches("0o"),
        2 => text.trim_start_matches("0b"),
        _ => &text,
    };
    let whole = i64::from_str_radix(digits, base).ok();
    let float = text
        .parse::<f64>()
        .ok()
        .filter(|x| x.is_finite() && x.abs() < 9e18);
    Ok(whole.or(float.filter(|_| base == 10).map(|x| x.trunc() as i64)))
}

fn missing(name: &str) -> Value {
    Value::Undefined(format!("the {name} of nothing").into())
}
