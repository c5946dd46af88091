//! Python's two ways of filling values into a text.

use super::{
    Meter, Outcome, fault,
    run::{Given, place},
    value::Value,
};

/// The widest field, and the most digits after a point.
const WIDTH: usize = 4096;
const DIGITS: usize = 64;

/// How one value is written.
#[derive(Debug)]
struct Field {
    fill: char,
    align: Option<char>,
    sign: Option<char>,
    hash: bool,
    width: usize,
    group: Option<char>,
    precision: Option<usize>,
    kind: Option<char>,
}

impl Field {
    fn plain() -> Self {
        Self {
            fill: ' ',
            align: None,
            sign: None,
            hash: false,
            width: 0,
            group: None,
            precision: None,
            kind: None,
        }
    }

    fn write(&self, meter: &Meter, value: &Value, out: &mut String) -> Outcome<()> {
        let kind = self.kind.unwrap_or(match value {
            Value::Float(_) => 'n',
            Value::Int(_) => 'd',
            Value::Bool(_) if self.width > 0 => 'd',
            _ => 's',
        });
        if kind == 's' {
            let mut text = String::new();
            value.print(&mut text, meter)?;
            if let Some(most) = self.precision
                && let Some((end, _)) = text.char_indices().nth(most)
            {
                text.truncate(end);
            }
            return self.pad(meter, "", &text, '<', out);
        }
        meter.makes(400)?;
        let negative;
        let prefix;
        let mut digits = match kind {
            'd' | 'i' | 'u' | 'x' | 'X' | 'o' | 'b' | 'c' => {
                let n = match (value, self.kind) {
                    (Value::Float(x), Some('d' | 'i' | 'u')) if x.abs() < 9e18 => x.trunc() as i64,
                    _ => super::run::whole(value)?,
                };
                if kind == 'c' {
                    let c = u32::try_from(n).ok().and_then(char::from_u32);
                    let c = c.ok_or_else(|| fault("no character has this number"))?;
                    return self.pad(meter, "", c.encode_utf8(&mut [0; 4]), '<', out);
                }
                negative = n < 0;
                let size = n.unsigned_abs();
                let (text, shown) = match kind {
                    'x' => (format!("{size:x}"), "0x"),
                    'X' => (format!("{size:X}"), "0X"),
                    'o' => (format!("{size:o}"), "0o"),
                    'b' => (format!("{size:b}"), "0b"),
                    _ => (size.to_string(), ""),
                };
                prefix = if self.hash { shown } else { "" };
                let missing = self.precision.unwrap_or(0).saturating_sub(text.len());
                "0".repeat(missing) + &text
            }
            _ => {
                let number = value.as_number();
                let x = number.ok_or_else(|| {
                    fault(format!("a number was expected, found a {}", value.kind()))
                })?;
                negative = x.is_sign_negative() && !x.is_nan();
                prefix = "";
                let (size, places) = (x.abs(), self.precision.unwrap_or(6));
                match kind {
                    _ if !x.is_finite() => super::value::float(size),
                    'f' | 'F' => format!("{size:.places$}"),
                    '%' => format!("{:.places$}%", size * 100.0),
                    'e' | 'E' => exponential(size, places, kind),
                    'n' if self.precision.is_none() => super::value::float(size),
                    'g' | 'G' | 'n' => general(size, places.max(1)),
                    other => return Err(fault(format!("there is no format {other:?}"))),
                }
            }
        };
        if let Some(mark) = self.group {
            digits = grouped(&digits, mark);
        }
        let sign = match (negative, self.sign) {
            (true, _) => "-",
            (false, Some('+')) => "+",
            (false, Some(' ')) => " ",
            _ => "",
        };
        self.pad(meter, &format!("{sign}{prefix}"), &digits, '>', out)
    }

    /// Fills up to the width. `sign` comes before a filling with `=`.
    fn pad(
        &self,
        meter: &Meter,
        sign: &str,
        text: &str,
        default: char,
        out: &mut String,
    ) -> Outcome<()> {
        let length = sign.chars().count() + text.chars().count();
        let missing = self.width.saturating_sub(length);
        meter.makes(sign.len() + text.len() + missing.saturating_mul(4))?;
        let (left, inner, right) = match self.align.unwrap_or(default) {
            '<' => (0, 0, missing),
            '^' => (missing / 2, 0, missing - missing / 2),
            '=' => (0, missing, 0),
            _ => (missing, 0, 0),
        };
        let many = |n: usize| std::iter::repeat_n(self.fill, n);
        out.extend(many(left));
        out.push_str(sign);
        out.extend(many(inner));
        out.push_str(text);
        out.extend(many(right));
        Ok(())
    }
}

fn exponential(size: f64, places: usize, kind: char) -> String {
    let text = format!("{size:.places$e}");
    match text.split_once('e') {
        Some((digits, exponent)) => {
            let (sign, number) = match exponent.strip_prefix('-') {
                Some(number) => ('-', number),
                None => ('+', exponent),
            };
            format!("{digits}{kind}{sign}{number:0>2}")
        }
        None => text,
    }
}

fn general(size: f64, places: usize) -> String {
    let exponent = match size == 0.0 {
        true => 0,
        false => size.log10().floor() as i32,
    };
    let trim = |text: &str| match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text.to_owned(),
    };
    if exponent < -4 || exponent >= places as i32 {
        let text = exponential(size, places - 1, 'e');
        return match text.split_once('e') {
            Some((digits, exponent)) => format!("{}e{exponent}", trim(digits)),
            None => text,
        };
    }
    let after = (places as i32 - 1 - exponent).max(0) as usize;
    trim(&format!("{size:.after$}"))
}

/// Whole digits by threes.
fn grouped(digits: &str, mark: char) -> String {
    let end = digits
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(digits.len());
    let (whole, rest) = digits.split_at(end);
    let mut out = String::new();
    for (i, c) in whole.chars().enumerate() {
        if i > 0 && (whole.len() - i).is_multiple_of(3) {
            out.push(mark);
        }
        out.push(c);
    }
    out + rest
}

fn bounded(digits: &str, most: usize) -> Outcome<usize> {
    match digits.parse() {
        Ok(n) if n <= most => Ok(n),
        _ => Err(fault(format!("a field of at most {most} was expected"))),
    }
}

/// Digits at the start of a text, and what is left.
fn number(text: &str) -> (&str, &str) {
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    text.split_at(end)
}

/// `"%s and %d" % values`
pub(super) fn percent(meter: &Meter, pattern: &str, values: &Value) -> Outcome<String> {
    meter.makes(pattern.len())?;
    let one = std::slice::from_ref(values);
    let positional = match values {
        Value::Tuple(list) => &list.items[..],
        _ => one,
    };
    let mut given = positional.iter();
    let mut out = String::new();
    let mut rest = pattern;
    while let Some((text, after)) = rest.split_once('%') {
        meter.steps(1)?;
        out.push_str(text);
        if let Some(after) = after.strip_prefix('%') {
            out.push('%');
            rest = after;
            continue;
        }
        let mut after = after;
        let mut named = None;
        if let Some(inner) = after.strip_prefix('(') {
            let (key, behind) = inner
                .split_once(')')
                .ok_or_else(|| fault("a format with an open bracket"))?;
            let Value::Map(map) = values else {
                return Err(fault("a format with names wants a dict"));
            };
            let found = map.get(&Value::text(key), meter)?;
            named = Some(found.ok_or_else(|| fault(format!("the dict has no {key:?}")))?);
            after = behind;
        }
        let mut field = Field::plain();
        let mut zero = false;
        while let Some(flag) = after.chars().next().filter(|c| "-+ #0".contains(*c)) {
            match flag {
                '-' => field.align = Some('<'),
                '#' => field.hash = true,
                '0' => zero = true,
                '+' => field.sign = Some('+'),
                _ => field.sign = field.sign.or(Some(' ')),
            }
            after = &after[1..];
        }
        let (width, behind) = number(after);
        after = behind;
        if !width.is_empty() {
            field.width = bounded(width, WIDTH)?;
        }
        if let Some(behind) = after.strip_prefix('.') {
            let (digits, behind) = number(behind);
            field.precision = Some(match digits {
                "" => 0,
                digits => bounded(digits, DIGITS)?,
            });
            after = behind;
        }
        let kind = after.chars().next();
        let kind = kind.ok_or_else(|| fault("a format that is not complete"))?;
        after = &after[kind.len_utf8()..];
        let value = match named {
            Some(value) => value,
            None => given
                .next()
                .ok_or_else(|| fault("more values are wanted by the format"))?,
        };
        if zero && field.align.is_none() {
            (field.fill, field.align) = ('0', Some('='));
        }
        match kind {
            's' | 'r' | 'a' => {
                field.kind = Some('s');
                (field.fill, field.align) = (' ', field.align.filter(|a| *a == '<').or(Some('>')));
                if kind == 's' {
                    field.write(meter, value, &mut out)?;
                } else {
                    let mut text = String::new();
                    value.repr(&mut text, meter)?;
                    field.write(meter, &Value::made(text), &mut out)?;
                }
            }
            'd' | 'i' | 'u' | 'x' | 'X' | 'o' | 'c' | 'f' | 'F' | 'e' | 'E' | 'g' | 'G' => {
                field.kind = Some(kind);
                if kind == 'c' && value.as_str().is_some() {
                    field.kind = Some('s');
                }
                field.write(meter, value, &mut out)?;
            }
            other => return Err(fault(format!("there is no format %{other}"))),
        }
        rest = after;
    }
    out.push_str(rest);
    let named = matches!(values, Value::Map(_));
    if !named && given.next().is_some() {
        return Err(fault("fewer values are wanted by the format"));
    }
    Ok(out)
}

/// `"{} and {name:>8}".format(values)`
pub(super) fn braces(meter: &Meter, pattern: &str, given: &Given) -> Outcome<String> {
    meter.makes(pattern.len())?;
    let mut out = String::new();
    let mut rest = pattern;
    let mut next = 0;
    while let Some(at) = rest.find(['{', '}']) {
        meter.steps(1)?;
        out.push_str(&rest[..at]);
        let mark = &rest[at..=at];
        let after = &rest[at + 1..];
        if let Some(after) = after.strip_prefix(mark) {
            out.push_str(mark);
            rest = after;
            continue;
        }
        if mark == "}" {
            return Err(fault("a single \"}\" in a format"));
        }
        let (inner, after) = after
            .split_once('}')
            .ok_or_else(|| fault("a format with an open brace"))?;
        if inner.contains('{') {
            return Err(fault("fields in fields are not supported"));
        }
        let (path, spec) = inner.split_once(':').unwrap_or((inner, ""));
        let (path, conversion) = match path.split_once('!') {
            Some((path, conversion)) => (path, Some(conversion)),
            None => (path, None),
        };
        let value = argument(meter, path, given, &mut next)?;
        let value = match conversion {
            None => value,
            Some("s") => Value::Str(value.to_text(meter)?),
            Some("r" | "a") => {
                let mut text = String::new();
                value.repr(&mut text, meter)?;
                Value::made(text)
            }
            Some(other) => return Err(fault(format!("there is no conversion {other:?}"))),
        };
        field(spec)?.write(meter, &value, &mut out)?;
        rest = after;
    }
    out.push_str(rest);
    Ok(out)
}

/// `0`, `name`, `name[key]`, `name.key`, or nothing for the next.
fn argument(meter: &Meter, path: &str, given: &Given, next: &mut usize) -> Outcome<Value> {
    let end = path.find(['.', '[']).unwrap_or(path.len());
    let (name, mut path) = path.split_at(end);
    let found = match name {
        "" => {
            *next += 1;
            given.positional.get(*next - 1)
        }
        name => match name.parse::<usize>() {
            Ok(at) => given.positional.get(at),
            Err(_) => {
                let named = given.named.iter().find(|(known, _)| **known == *name);
                named.map(|(_, value)| value)
            }
        },
    };
    let mut value = found.ok_or_else(|| fault(format!("the format has no value for {name:?}")))?;
    while !path.is_empty() {
        meter.steps(1)?;
        let (key, rest) = match path.strip_prefix('[') {
            Some(inner) => inner
                .split_once(']')
                .ok_or_else(|| fault("an open bracket"))?,
            None => {
                let inner = path.strip_prefix('.');
                let inner = inner.ok_or_else(|| fault("a field that cannot be read"))?;
                inner.split_at(inner.find(['.', '[']).unwrap_or(inner.len()))
            }
        };
        let at = key.parse().ok();
        let found = match value {
            Value::Map(map) => map.get(&Value::text(key), meter)?,
            Value::List(list) | Value::Tuple(list) => at
                .and_then(|at| place(at, list.items.len()))
                .map(|at| &list.items[at]),
            _ => None,
        };
        value = found.ok_or_else(|| fault(format!("the format has no value for {key:?}")))?;
        path = rest;
    }
    Ok(value.clone())
}

/// `[[fill]align][sign][#][0][width][,][.precision][type]`
fn field(spec: &str) -> Outcome<Field> {
    let mut field = Field::plain();
    let aligns = |c: &char| "<>=^".contains(*c);
    let mut chars = spec.chars();
    let (first, second) = (chars.next(), chars.next());
    let mut rest = spec;
    if let Some(fill) = first
        && second.as_ref().is_some_and(aligns)
    {
        (field.fill, field.align) = (fill, second);
        rest = &rest[fill.len_utf8() + 1..];
    } else if first.as_ref().is_some_and(aligns) {
        field.align = first;
        rest = &rest[1..];
    }
    if let Some(sign) = rest.chars().next().filter(|c| "+- ".contains(*c)) {
        field.sign = Some(sign);
        rest = &rest[1..];
    }
    if let Some(after) = rest.strip_prefix('#') {
        field.hash = true;
        rest = after;
    }
    if rest.starts_with('0') && field.align.is_none() {
        (field.fill, field.align) = ('0', Some('='));
    }
    let (width, after) = number(rest);
    rest = after;
    if !width.is_empty() {
        field.width = bounded(width, WIDTH)?;
    }
    if let Some(mark) = rest.chars().next().filter(|c| ",_".contains(*c)) {
        field.group = Some(mark);
        rest = &rest[1..];
    }
    if let Some(after) = rest.strip_prefix('.') {
        let (digits, after) = number(after);
        field.precision = Some(bounded(digits, DIGITS)?);
        rest = after;
    }
    let mut chars = rest.chars();
    field.kind = chars.next();
    match chars.next() {
        None => Ok(field),
        Some(_) => Err(fault(format!(
            "the format {:?} cannot be read",
            short(spec)
        ))),
    }
}

fn short(text: &str) -> String {
    text.chars().take(40).collect()
}
