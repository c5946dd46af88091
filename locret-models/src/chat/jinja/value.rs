//! Values of a template.

use super::{Fault, Meter, Outcome, fault, run::Callable};
use std::{cell::RefCell, cmp::Ordering, collections::HashMap, rc::Rc, sync::Arc};

/// How deep lists and dicts may hold each other.
const DEPTH: u32 = 64;

/// A value. Cheap to copy: what it holds is shared, and never changes but for a namespace.
#[derive(Debug, Clone)]
pub(in crate::chat) enum Value {
    /// A name or a key that there is not: prints as nothing, and is an error where more is asked of it.
    Undefined(Arc<str>),
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Str(Arc<str>),
    List(Rc<List>),
    Tuple(Rc<List>),
    Map(Rc<Map>),
    /// Nothing else can hold one, so that no value holds itself.
    Namespace(Rc<RefCell<HashMap<Arc<str>, Value>>>),
    Loop(Rc<Loop>),
    Callable(Rc<Callable>),
}

/// Elements, and how deep they are.
#[derive(Debug)]
pub(in crate::chat) struct List {
    pub(super) items: Vec<Value>,
    depth: u32,
}

/// Entries in the order in which their keys were first given.
#[derive(Debug)]
pub(in crate::chat) struct Map {
    pub(super) entries: Vec<(Value, Value)>,
    index: HashMap<Key, usize>,
    depth: u32,
}

/// What `loop` is.
#[derive(Debug)]
pub(in crate::chat) struct Loop {
    pub(super) index: usize,
    pub(super) items: Rc<[Value]>,
    /// What `changed` was last asked about, in all rounds.
    pub(super) seen: Rc<RefCell<Option<Value>>>,
}

/// Keys that Python takes for equal are equal.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Key {
    None,
    Int(i64),
    Float(u64),
    Str(Arc<str>),
}

impl Key {
    fn of(value: &Value) -> Outcome<Self> {
        Ok(match value {
            Value::None => Self::None,
            Value::Bool(b) => Self::Int((*b).into()),
            Value::Int(n) => Self::Int(*n),
            Value::Float(x) if x.fract() == 0.0 && x.abs() < 9e15 => Self::Int(*x as i64),
            Value::Float(x) => Self::Float(x.to_bits()),
            Value::Str(s) => Self::Str(s.clone()),
            other => {
                return Err(fault(format!("a {} cannot be a key", other.kind())));
            }
        })
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Str(s) => s.len(),
            _ => 0,
        }
    }
}

impl Value {
    /// Text.
    pub(in crate::chat) fn text(text: &str) -> Self {
        Self::Str(text.into())
    }

    /// A list of what comes from outside of the template.
    pub(in crate::chat) fn given_list(items: Vec<Value>) -> Self {
        let depth = 1 + items.iter().map(Self::depth).max().unwrap_or(0);
        Self::List(Rc::new(List { items, depth }))
    }

    /// A dict of what comes from outside of the template.
    pub(in crate::chat) fn given_map(entries: Vec<(&str, Value)>) -> Self {
        let mut map = Map::empty();
        for (key, value) in entries {
            map.put(Key::Str(key.into()), Self::text(key), value);
        }
        Self::Map(Rc::new(map))
    }

    pub(super) fn list(meter: &Meter, items: Vec<Value>) -> Outcome<Self> {
        Ok(Self::List(Rc::new(List::new(meter, items)?)))
    }

    pub(super) fn tuple(meter: &Meter, items: Vec<Value>) -> Outcome<Self> {
        Ok(Self::Tuple(Rc::new(List::new(meter, items)?)))
    }

    pub(super) fn map(meter: &Meter, entries: Vec<(Value, Value)>) -> Outcome<Self> {
        // An entry is in the list and in the index.
        meter.elements(entries.len().saturating_mul(3))?;
        let mut map = Map::empty();
        for (key, value) in entries {
            let hashed = Key::of(&key)?;
            meter.reads(hashed.bytes())?;
            data(&value)?;
            map.put(hashed, key, value);
        }
        deep(map.depth)?;
        Ok(Self::Map(Rc::new(map)))
    }

    /// Text that was counted before it was made.
    pub(super) fn made(text: String) -> Self {
        Self::Str(text.into())
    }

    /// A copy of a part of a text.
    pub(super) fn part(meter: &Meter, text: &str) -> Outcome<Self> {
        meter.makes(text.len())?;
        Ok(Self::Str(text.into()))
    }

    fn depth(&self) -> u32 {
        match self {
            Self::List(list) | Self::Tuple(list) => list.depth,
            Self::Map(map) => map.depth,
            _ => 0,
        }
    }

    /// What it is, for messages.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Undefined(_) => "undefined value",
            Self::None => "none",
            Self::Bool(_) => "truth value",
            Self::Int(_) => "whole number",
            Self::Float(_) => "number",
            Self::Str(_) => "string",
            Self::List(_) => "list",
            Self::Tuple(_) => "tuple",
            Self::Map(_) => "dict",
            Self::Namespace(_) => "namespace",
            Self::Loop(_) => "loop",
            Self::Callable(_) => "function",
        }
    }

    pub(super) fn truth(&self) -> bool {
        match self {
            Self::Undefined(_) | Self::None => false,
            Self::Bool(b) => *b,
            Self::Int(n) => *n != 0,
            Self::Float(x) => *x != 0.0,
            Self::Str(s) => !s.is_empty(),
            Self::List(list) | Self::Tuple(list) => !list.items.is_empty(),
            Self::Map(map) => !map.entries.is_empty(),
            Self::Namespace(_) | Self::Loop(_) | Self::Callable(_) => true,
        }
    }

    pub(super) fn defined(&self) -> Outcome<&Self> {
        match self {
            Self::Undefined(name) => Err(undefined(name)),
            _ => Ok(self),
        }
    }

    /// The elements of a list or tuple.
    pub(super) fn elements(&self) -> Option<&[Value]> {
        match self {
            Self::List(list) | Self::Tuple(list) => Some(&list.items),
            _ => None,
        }
    }

    pub(super) fn as_str(&self) -> Option<&str> {
        match self {
            Self::Str(s) => Some(s),
            _ => None,
        }
    }

    pub(super) fn as_int(&self) -> Option<i64> {
        match self {
            Self::Int(n) => Some(*n),
            Self::Bool(b) => Some((*b).into()),
            _ => None,
        }
    }

    pub(super) fn as_number(&self) -> Option<f64> {
        match self {
            Self::Float(x) => Some(*x),
            _ => self.as_int().map(|n| n as f64),
        }
    }

    /// What a loop goes through, as values of their own.
    pub(super) fn iterate(&self, meter: &Meter) -> Outcome<Vec<Value>> {
        match self {
            Self::Undefined(_) => Ok(Vec::new()),
            Self::List(list) | Self::Tuple(list) => {
                meter.elements(list.items.len())?;
                Ok(list.items.clone())
            }
            Self::Map(map) => {
                meter.elements(map.entries.len())?;
                Ok(map.entries.iter().map(|(key, _)| key.clone()).collect())
            }
            Self::Str(s) => {
                let n = s.chars().count();
                meter.elements(n.saturating_mul(2))?;
                let mut buffer = [0; 4];
                let mut one = |c: char| Self::text(c.encode_utf8(&mut buffer));
                Ok(s.chars().map(&mut one).collect())
            }
            other => Err(fault(format!("a {} has no elements", other.kind()))),
        }
    }

    /// How many elements or characters there are.
    pub(super) fn length(&self, meter: &Meter) -> Outcome<usize> {
        match self {
            Self::Undefined(_) => Ok(0),
            Self::List(list) | Self::Tuple(list) => Ok(list.items.len()),
            Self::Map(map) => Ok(map.entries.len()),
            Self::Str(s) => {
                meter.reads(s.len())?;
                Ok(s.chars().count())
            }
            other => Err(fault(format!("a {} has no length", other.kind()))),
        }
    }

    /// Whether Python's `==` holds.
    pub(super) fn equals(&self, other: &Self, meter: &Meter) -> Outcome<bool> {
        meter.steps(1)?;
        if let (Some(a), Some(b)) = (self.as_int(), other.as_int()) {
            return Ok(a == b);
        }
        if let (Some(a), Some(b)) = (self.as_number(), other.as_number()) {
            return Ok(a == b);
        }
        Ok(match (self, other) {
            (Self::Undefined(_), Self::Undefined(_)) | (Self::None, Self::None) => true,
            (Self::Str(a), Self::Str(b)) => {
                meter.reads(a.len().min(b.len()))?;
                a == b
            }
            (Self::List(a), Self::List(b)) | (Self::Tuple(a), Self::Tuple(b)) => {
                if a.items.len() != b.items.len() {
                    return Ok(false);
                }
                for (a, b) in a.items.iter().zip(&b.items) {
                    if !a.equals(b, meter)? {
                        return Ok(false);
                    }
                }
                true
            }
            (Self::Map(a), Self::Map(b)) => {
                if a.entries.len() != b.entries.len() {
                    return Ok(false);
                }
                for (key, value) in &a.entries {
                    match b.get(key, meter)? {
                        Some(found) if value.equals(found, meter)? => {}
                        _ => return Ok(false),
                    }
                }
                true
            }
            (Self::Namespace(a), Self::Namespace(b)) => Rc::ptr_eq(a, b),
            (Self::Loop(a), Self::Loop(b)) => Rc::ptr_eq(a, b),
            (Self::Callable(a), Self::Callable(b)) => Rc::ptr_eq(a, b),
            _ => false,
        })
    }

    /// Python's order, where there is one.
    pub(super) fn order(&self, other: &Self, meter: &Meter) -> Outcome<Ordering> {
        meter.steps(1)?;
        if let (Some(a), Some(b)) = (self.as_int(), other.as_int()) {
            return Ok(a.cmp(&b));
        }
        if let (Some(a), Some(b)) = (self.as_number(), other.as_number()) {
            return Ok(a.total_cmp(&b));
        }
        match (self, other) {
            (Self::Str(a), Self::Str(b)) => {
                meter.reads(a.len().min(b.len()))?;
                Ok(a.cmp(b))
            }
            (Self::List(a), Self::List(b)) | (Self::Tuple(a), Self::Tuple(b)) => {
                for (a, b) in a.items.iter().zip(&b.items) {
                    if !a.equals(b, meter)? {
                        return a.order(b, meter);
                    }
                }
                Ok(a.items.len().cmp(&b.items.len()))
            }
            _ => Err(fault(format!(
                "a {} and a {} have no order",
                self.kind(),
                other.kind()
            ))),
        }
    }

    /// Whether `item` is in this.
    pub(super) fn contains(&self, item: &Self, meter: &Meter) -> Outcome<bool> {
        match self {
            Self::Undefined(_) => Ok(false),
            Self::Str(s) => match item {
                Self::Str(part) => {
                    meter.reads(s.len() + part.len())?;
                    Ok(s.contains(&**part))
                }
                other => Err(fault(format!(
                    "what is looked for in a string is a string, found a {}",
                    other.defined()?.kind()
                ))),
            },
            Self::List(list) | Self::Tuple(list) => {
                for element in &list.items {
                    if element.equals(item, meter)? {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
            Self::Map(map) => Ok(map.get(item, meter)?.is_some()),
            other => Err(fault(format!("a {} holds nothing", other.kind()))),
        }
    }

    /// As Python's `str` writes it.
    pub(super) fn print(&self, out: &mut String, meter: &Meter) -> Outcome<()> {
        match self {
            Self::Undefined(_) => Ok(()),
            Self::Str(s) => {
                meter.makes(s.len())?;
                out.push_str(s);
                Ok(())
            }
            other => other.repr(out, meter),
        }
    }

    /// As a text of its own.
    pub(super) fn to_text(&self, meter: &Meter) -> Outcome<Arc<str>> {
        if let Self::Str(s) = self {
            return Ok(s.clone());
        }
        let mut out = String::new();
        self.print(&mut out, meter)?;
        Ok(out.into())
    }

    /// As Python's `repr` writes it.
    pub(super) fn repr(&self, out: &mut String, meter: &Meter) -> Outcome<()> {
        let items = |items: &[Value], out: &mut String| {
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                item.repr(out, meter)?;
            }
            Ok::<_, Fault>(())
        };
        meter.makes(4)?;
        match self {
            Self::Undefined(_) => out.push_str("Undefined"),
            Self::None => out.push_str("None"),
            Self::Bool(true) => out.push_str("True"),
            Self::Bool(false) => out.push_str("False"),
            Self::Int(n) => {
                meter.makes(20)?;
                out.push_str(&n.to_string());
            }
            Self::Float(x) => {
                meter.makes(24)?;
                out.push_str(&float(*x));
            }
            Self::Str(s) => {
                meter.makes(s.len().saturating_mul(2))?;
                quoted(s, out, meter)?;
            }
            Self::List(list) => {
                out.push('[');
                items(&list.items, out)?;
                out.push(']');
            }
            Self::Tuple(list) => {
                out.push('(');
                items(&list.items, out)?;
                out.push_str(if list.items.len() == 1 { ",)" } else { ")" });
            }
            Self::Map(map) => {
                out.push('{');
                for (i, (key, value)) in map.entries.iter().enumerate() {
                    if i > 0 {
                        out.push_str(", ");
                    }
                    key.repr(out, meter)?;
                    out.push_str(": ");
                    value.repr(out, meter)?;
                }
                out.push('}');
            }
            Self::Namespace(_) => out.push_str("<Namespace>"),
            Self::Loop(_) => out.push_str("<LoopContext>"),
            Self::Callable(_) => out.push_str("<function>"),
        }
        Ok(())
    }
}

impl List {
    fn new(meter: &Meter, items: Vec<Value>) -> Outcome<Self> {
        meter.elements(items.len())?;
        let mut depth = 0;
        for item in &items {
            data(item)?;
            depth = depth.max(item.depth());
        }
        deep(depth + 1)?;
        Ok(Self {
            items,
            depth: depth + 1,
        })
    }
}

impl Map {
    fn empty() -> Self {
        Self {
            entries: Vec::new(),
            index: HashMap::new(),
            depth: 1,
        }
    }

    fn put(&mut self, hashed: Key, key: Value, value: Value) {
        self.depth = self.depth.max(1 + value.depth());
        match self.index.get(&hashed) {
            Some(&at) => self.entries[at].1 = value,
            None => {
                self.index.insert(hashed, self.entries.len());
                self.entries.push((key, value));
            }
        }
    }

    /// The value of a key; none for what cannot be a key.
    pub(super) fn get(&self, key: &Value, meter: &Meter) -> Outcome<Option<&Value>> {
        let Ok(key) = Key::of(key) else {
            return Ok(None);
        };
        meter.reads(key.bytes())?;
        Ok(self.index.get(&key).map(|&at| &self.entries[at].1))
    }

    pub(super) fn named(&self, key: &Arc<str>) -> Option<&Value> {
        let at = self.index.get(&Key::Str(key.clone()))?;
        Some(&self.entries[*at].1)
    }
}

pub(super) fn undefined(name: &str) -> Fault {
    fault(format!("{name} is undefined"))
}

/// Whether lists, dicts and namespaces may hold it: anything else could come to hold itself.
pub(super) fn data(value: &Value) -> Outcome<()> {
    match value {
        Value::Namespace(_) | Value::Loop(_) | Value::Callable(_) => Err(fault(format!(
            "a {} cannot be put into another value",
            value.kind()
        ))),
        _ => Ok(()),
    }
}

fn deep(depth: u32) -> Outcome<()> {
    if depth > DEPTH {
        return Err(fault(format!(
            "lists and dicts nested at most {DEPTH} deep were expected"
        )));
    }
    Ok(())
}

/// A number as Python writes it.
pub(super) fn float(x: f64) -> String {
    if x.is_nan() {
        return "nan".into();
    }
    if x.is_infinite() {
        return if x > 0.0 { "inf" } else { "-inf" }.into();
    }
    let size = x.abs();
    if size != 0.0 && !(1e-4..1e16).contains(&size) {
        let text = format!("{x:e}");
        return match text.split_once('e') {
            Some((digits, exponent)) => {
                let (sign, number) = match exponent.strip_prefix('-') {
                    Some(number) => ('-', number),
                    None => ('+', exponent),
                };
                format!("{digits}e{sign}{number:0>2}")
            }
            None => text,
        };
    }
    let text = x.to_string();
    if text.contains('.') {
        text
    } else {
        text + ".0"
    }
}

/// A string between quotation marks, as Python writes it.
fn quoted(text: &str, out: &mut String, meter: &Meter) -> Outcome<()> {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => out.extend(['\\', c]),
            c if (c as u32) < 0x20 || c as u32 == 0x7f => {
                meter.makes(8)?;
                out.push_str(&format!("\\x{:02x}", c as u32));
            }
            c => out.push(c),
        }
    }
    out.push(quote);
    Ok(())
}
