//! Values as JSON.

use super::{
    Fault, Meter, Outcome, fault,
    run::{Given, whole},
    value::{Value, float},
};
use std::sync::Arc;

/// How Python's `json.dumps` is asked to write.
struct Style {
    indent: Option<String>,
    between: Arc<str>,
    after_key: Arc<str>,
    ascii: bool,
    sorted: bool,
}

/// The filter `tojson`, as transformers gives it to templates.
pub(super) fn filter(meter: &Meter, value: &Value, given: Given) -> Outcome<Value> {
    let [ascii, indent, separators, sorted] =
        given.bind(["ensure_ascii", "indent", "separators", "sort_keys"])?;
    let is = |flag: Option<Value>| flag.is_some_and(|flag| flag.truth());
    let indent = match indent {
        None | Some(Value::None) => None,
        Some(Value::Str(indent)) => Some(indent.to_string()),
        Some(width) => {
            let width = usize::try_from(whole(&width)?).unwrap_or(0);
            meter.makes(width)?;
            Some(" ".repeat(width))
        }
    };
    let (between, after_key) = match separators.as_ref().and_then(Value::elements) {
        Some([between, after_key]) => (between.to_text(meter)?, after_key.to_text(meter)?),
        _ if indent.is_some() => (",".into(), ": ".into()),
        _ => (", ".into(), ": ".into()),
    };
    let style = Style {
        indent,
        between,
        after_key,
        ascii: is(ascii),
        sorted: is(sorted),
    };
    let mut out = String::new();
    write(meter, value, &style, 0, &mut out)?;
    Ok(Value::made(out))
}

fn write(
    meter: &Meter,
    value: &Value,
    style: &Style,
    level: usize,
    out: &mut String,
) -> Outcome<()> {
    let line = |level: usize, out: &mut String| {
        if let Some(indent) = &style.indent {
            meter.makes(1 + indent.len().saturating_mul(level))?;
            out.push('\n');
            out.push_str(&indent.repeat(level));
        }
        Ok::<_, Fault>(())
    };
    let next = |i: usize, out: &mut String| {
        if i > 0 {
            meter.makes(style.between.len())?;
            out.push_str(&style.between);
        }
        line(level + 1, out)
    };
    meter.makes(8)?;
    match value {
        Value::None => out.push_str("null"),
        Value::Bool(b) => out.push_str(if *b { "true" } else { "false" }),
        Value::Int(n) => {
            meter.makes(20)?;
            out.push_str(&n.to_string());
        }
        Value::Float(x) if x.is_nan() => out.push_str("NaN"),
        Value::Float(x) if x.is_infinite() => {
            out.push_str(if *x > 0.0 { "Infinity" } else { "-Infinity" });
        }
        Value::Float(x) => {
            meter.makes(24)?;
            out.push_str(&float(*x));
        }
        Value::Str(s) => string(meter, s, style.ascii, out)?,
        Value::List(list) | Value::Tuple(list) => {
            out.push('[');
            for (i, item) in list.items.iter().enumerate() {
                next(i, out)?;
                write(meter, item, style, level + 1, out)?;
            }
            if !list.items.is_empty() {
                line(level, out)?;
            }
            out.push(']');
        }
        Value::Map(map) => {
            meter.elements(map.entries.len())?;
            let mut entries: Vec<(Arc<str>, &Value)> = Vec::with_capacity(map.entries.len());
            for (key, value) in &map.entries {
                let key = match key {
                    Value::None => "null".into(),
                    Value::Bool(b) => if *b { "true" } else { "false" }.into(),
                    other => other.to_text(meter)?,
                };
                entries.push((key, value));
            }
            if style.sorted {
                let bytes = entries.iter().map(|(key, _)| key.len()).sum::<usize>();
                meter.reads(bytes.saturating_mul(16))?;
                entries.sort_by(|a, b| a.0.cmp(&b.0));
            }
            out.push('{');
            for (i, (key, value)) in entries.iter().enumerate() {
                next(i, out)?;
                string(meter, key, style.ascii, out)?;
                meter.makes(style.after_key.len())?;
                out.push_str(&style.after_key);
                write(meter, value, style, level + 1, out)?;
            }
            if !entries.is_empty() {
                line(level, out)?;
            }
            out.push('}');
        }
        other => {
            return Err(fault(format!(
                "a {} cannot be written as JSON",
                other.kind()
            )));
        }
    }
    Ok(())
}

fn string(meter: &Meter, text: &str, ascii: bool, out: &mut String) -> Outcome<()> {
    meter.makes(text.len().saturating_mul(2).saturating_add(2))?;
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if (c as u32) < 0x20 || (ascii && c as u32 > 0x7e) => {
                meter.makes(12)?;
                for unit in c.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
    Ok(())
}
