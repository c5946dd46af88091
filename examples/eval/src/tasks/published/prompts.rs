//! Prompts as benchmarks publish them, from their own files.

use crate::{Error, Result};
use std::{collections::BTreeMap, fs, path::Path};

/// Templates by task, and how many tokens each task generates.
///
/// A benchmark's own files are read as they are: LongBench's `dataset2prompt.json` and `dataset2maxlen.json`, ∞Bench's
/// `prompt.py`, LongBench v2's `0shot.txt`. For a benchmark whose prompts stand in its code (L-Eval), they have to be
/// written into a file like the first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Prompts {
    templates: BTreeMap<String, String>,
    generate: BTreeMap<String, usize>,
}

impl Prompts {
    /// From a JSON object of task and template, a Python file in which `set` is such an object, or a text that is the
    /// template of every task.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::Format`].
    pub fn read(path: &Path, set: Option<&str>) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(|e| Error::read(path, e))?;
        let wrong = |message: String| Error::format(path, message);
        let templates = match path.extension().and_then(|ext| ext.to_str()) {
            Some("json") => serde_json::from_str(&text).map_err(|e| wrong(e.to_string()))?,
            Some("py") => {
                let set = set.ok_or_else(|| wrong("which object in it has the prompts?".into()))?;
                python_object(&text, set).map_err(wrong)?
            }
            _ => BTreeMap::from([(String::new(), text)]),
        };
        Ok(Self {
            templates,
            ..Self::default()
        })
    }

    /// How many tokens each task generates, from a JSON object.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::Format`].
    pub fn lengths(self, path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(|e| Error::read(path, e))?;
        let generate = serde_json::from_str(&text).map_err(|e| Error::format(path, e))?;
        Ok(Self { generate, ..self })
    }

    /// The template of a task.
    pub(super) fn template(&self, task: &str) -> Option<&str> {
        let own = self.templates.get(task).or_else(|| self.templates.get(""));
        own.map(String::as_str)
    }

    /// How many tokens a task generates, where that was said.
    pub(super) fn generate(&self, task: &str) -> Option<usize> {
        self.generate.get(task).copied()
    }
}

/// The texts of an object of texts in a Python file: `name = {"key": "value", …}`.
fn python_object(text: &str, name: &str) -> Result<BTreeMap<String, String>, String> {
    let open = format!("{name} = {{");
    let start = (text.match_indices(&open))
        .find(|(at, _)| *at == 0 || text[..*at].ends_with('\n'))
        .ok_or_else(|| format!("there is no {name} in it"))?;
    let mut rest = Python(&text[start.0 + open.len()..]);
    let mut all = BTreeMap::new();
    loop {
        rest.blank();
        if rest.takes('}') {
            return Ok(all);
        }
        let key = rest.text()?;
        if !rest.takes(':') {
            return Err(format!("no value after {key:?}"));
        }
        let value = rest.text()?;
        all.insert(key, value);
        if !rest.takes(',') && !rest.0.starts_with('}') {
            return Err("something other than texts in it".into());
        }
    }
}

/// What is left of a Python file.
struct Python<'a>(&'a str);

impl Python<'_> {
    /// Spaces and comments.
    fn blank(&mut self) {
        loop {
            self.0 = self.0.trim_start();
            match self.0.strip_prefix('#') {
                Some(rest) => self.0 = rest.find('\n').map_or("", |end| &rest[end..]),
                None => return,
            }
        }
    }

    fn takes(&mut self, mark: char) -> bool {
        self.blank();
        match self.0.strip_prefix(mark) {
            Some(rest) => {
                self.0 = rest;
                self.blank();
                true
            }
            None => false,
        }
    }

    /// Literals beside each other, or joined by plus signs.
    fn text(&mut self) -> Result<String, String> {
        let mut text = String::new();
        let mut found = false;
        loop {
            self.blank();
            match self.0.chars().next() {
                Some(quote @ ('"' | '\'')) => self.literal(quote, &mut text)?,
                Some('+') if found => self.0 = &self.0[1..],
                _ if found => return Ok(text),
                _ => return Err("something other than texts in it".into()),
            }
            found = true;
        }
    }

    fn literal(&mut self, quote: char, text: &mut String) -> Result<(), String> {
        let long = quote.to_string().repeat(3);
        let end = if self.0.starts_with(&long) {
            long
        } else {
            quote.to_string()
        };
        self.0 = &self.0[end.len()..];
        loop {
            if let Some(rest) = self.0.strip_prefix(end.as_str()) {
                self.0 = rest;
                return Ok(());
            }
            let mut chars = self.0.chars();
            match chars.next() {
                None => return Err("a text without an end".into()),
                Some('\n') if end.len() == 1 => return Err("a text without an end".into()),
                Some('\\') => {
                    let escaped = chars.next().ok_or("a text without an end")?;
                    let code = |digits: usize| {
                        let code = chars.as_str().get(..digits).unwrap_or("");
                        let code = u32::from_str_radix(code, 16).ok().and_then(char::from_u32);
                        code.ok_or_else(|| format!("\\{escaped} without its {digits} digits"))
                    };
                    let (one, digits) = match escaped {
                        'n' => (Some('\n'), 0),
                        't' => (Some('\t'), 0),
                        'r' => (Some('\r'), 0),
                        '\n' => (None, 0),
                        '\\' | '\'' | '"' => (Some(escaped), 0),
                        'x' => (Some(code(2)?), 2),
                        'u' => (Some(code(4)?), 4),
                        'U' => (Some(code(8)?), 8),
                        // Anything else stays as it is.
                        other => {
                            text.push('\\');
                            (Some(other), 0)
                        }
                    };
                    text.extend(one);
                    self.0 = &chars.as_str()[digits..];
                }
                Some(c) => {
                    text.push(c);
                    self.0 = chars.as_str();
                }
            }
        }
    }
}

/// A template with its values, cut where the context ends. `marks` are the names as they stand in the template, the
/// first of them the context's; of braces, two stand for one.
///
/// # Errors
/// What is wrong with the template.
pub(super) fn filled(
    template: &str,
    marks: &[(&str, &str)],
    braces: bool,
) -> Result<[String; 2], String> {
    let mut parts = [String::new(), String::new()];
    let (mut part, mut rest) = (0, template);
    'all: while !rest.is_empty() {
        for (number, (mark, value)) in marks.iter().enumerate() {
            if let Some(after) = rest.strip_prefix(mark) {
                parts[part] += value;
                rest = after;
                if number == 0 {
                    // A context that stands there twice would be cut at the second one.
                    part = 1;
                }
                continue 'all;
            }
        }
        let doubled = ["{{", "}}"].into_iter().find(|two| rest.starts_with(two));
        if let Some(two) = doubled.filter(|_| braces) {
            parts[part] += &two[..1];
            rest = &rest[2..];
            continue;
        }
        if braces && rest.starts_with(['{', '}']) {
            let shown: String = rest.chars().take(20).collect();
            return Err(format!(
                "the template has {shown:?}, which nothing stands for"
            ));
        }
        let end = rest.chars().next().map_or(0, char::len_utf8);
        parts[part] += &rest[..end];
        rest = &rest[end..];
    }
    match part {
        0 => Err(format!("the template has no {}", marks[0].0)),
        _ => Ok(parts),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_read_as_benchmarks_have_them() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::write(&path, text).unwrap();
            path
        };
        let python = write(
            "prompt.py",
            "import x\nothers = {\n  'a': 'no',\n}\n\nmine = {\n    \"a\": \"One \\\"two\\\"\\n{context}\", # noqa\n    \
             # \"b\": \"out\",\n    'b': 'x\\u00e9' + \"y\"\n      'z',  # it's\n    \"c\": \"\"\"l\n\\d\"\"\",\n}\nlast = {}\n",
        );
        let prompts = Prompts::read(&python, Some("mine")).unwrap();
        assert_eq!(prompts.template("a"), Some("One \"two\"\n{context}"));
        assert_eq!(prompts.template("b"), Some("xéyz"));
        assert_eq!(prompts.template("c"), Some("l\n\\d"));
        assert_eq!(prompts.template("d"), None);
        for (set, text) in [
            (None, "mine = {}"),
            (Some("theirs"), "mine = {}"),
            (Some("mine"), "mine = {\"a\": f(1)}"),
            (Some("mine"), "mine = {\"a\": \"open\n}"),
            (Some("mine"), "mine = {\"a\" \"b\"}"),
            (Some("mine"), "mine = {\"a\": \"b\" 1}"),
            (Some("mine"), "mine = {\"a\": \"\\u12\"}"),
            (Some("mine"), "mine = {\"a\": \"b\","),
        ] {
            let path = write("bad.py", text);
            let error = Prompts::read(&path, set).unwrap_err();
            assert!(matches!(error, Error::Format { .. }), "{text}: {error}");
        }
        let json = write("prompts.json", "{\"qa\": \"{context}\"}");
        let lengths = write("lengths.json", "{\"qa\": 32}");
        let prompts = Prompts::read(&json, None)
            .unwrap()
            .lengths(&lengths)
            .unwrap();
        assert_eq!(
            (prompts.template("qa"), prompts.generate("qa")),
            (Some("{context}"), Some(32))
        );
        let text = write("0shot.txt", "$DOC$");
        assert_eq!(
            Prompts::read(&text, None).unwrap().template("x"),
            Some("$DOC$")
        );
        assert!(matches!(
            Prompts::read(&json.join("x"), None),
            Err(Error::Read { .. })
        ));
    }

    #[test]
    fn a_template_is_cut_where_the_context_ends() {
        let marks = [("{context}", "a {b}"), ("{input}", "why?")];
        let [context, query] = filled("{input} {{x}} {context}\n{input}", &marks, true).unwrap();
        assert_eq!(
            (context.as_str(), query.as_str()),
            ("why? {x} a {b}", "\nwhy?")
        );
        assert!(
            filled("{input}", &marks, true)
                .unwrap_err()
                .contains("no {context}")
        );
        assert!(
            filled("{context}{other}", &marks, true)
                .unwrap_err()
                .contains("{other}")
        );
        let marks = [("$DOC$", "d"), ("$Q$", "q")];
        let [context, query] = filled("{$DOC$} $Q$", &marks, false).unwrap();
        assert_eq!((context.as_str(), query.as_str()), ("{d", "} q"));
    }
}
