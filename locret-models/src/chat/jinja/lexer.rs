//! A template's text as tokens.

use super::{Outcome, fault};
use std::sync::Arc;

/// No template comes near these.
const MAX_SOURCE: usize = 1 << 19;
/// A token takes a hundred times the memory that a character does, or more, as it becomes a part of the tree.
const MAX_TOKENS: usize = 1 << 14;

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Token {
    /// Text between tags.
    Text(Arc<str>),
    /// `{{`
    Open,
    /// `}}`
    Close,
    /// `{%`
    OpenTag,
    /// `%}`
    CloseTag,
    Name(Arc<str>),
    Str(String),
    Int(i64),
    Float(f64),
    Op(&'static str),
    End,
}

/// Longer ones first.
const OPERATORS: [&str; 27] = [
    "**", "//", "==", "!=", "<=", ">=", "+", "-", "*", "/", "%", "~", "<", ">", "=", "(", ")", "[",
    "]", "{", "}", ",", ":", ".", "|", ";", "!",
];

pub(super) struct Lexer<'a> {
    rest: &'a str,
    line: u32,
    /// Whether the text before `rest` ends a line, or there is none.
    line_start: bool,
    tokens: Vec<(Token, u32)>,
}

impl<'a> Lexer<'a> {
    /// The tokens of a source, each with its line, as Jinja cuts it with `trim_blocks` and
    /// `lstrip_blocks`.
    pub(super) fn tokens(source: &'a str) -> Outcome<Vec<(Token, u32)>> {
        if source.len() > MAX_SOURCE {
            return Err(fault(format!(
                "a template of at most {MAX_SOURCE} bytes was expected, found {}",
                source.len()
            )));
        }
        // The last line break of a file is not part of the template.
        let ends = ["\r\n", "\n", "\r"];
        let rest = ends.iter().find_map(|end| source.strip_suffix(end));
        let rest = rest.unwrap_or(source);
        let mut lexer = Self {
            rest,
            line: 1,
            line_start: true,
            tokens: Vec::new(),
        };
        while !lexer.rest.is_empty() {
            lexer.text()?;
        }
        lexer.push(Token::End)?;
        Ok(lexer.tokens)
    }

    fn push(&mut self, token: Token) -> Outcome<()> {
        if self.tokens.len() >= MAX_TOKENS {
            let most = format!("a template of at most {MAX_TOKENS} words was expected");
            return Err(self.fault(most));
        }
        self.tokens.push((token, self.line));
        Ok(())
    }

    fn skip(&mut self, bytes: usize) {
        let (gone, rest) = self.rest.split_at(bytes);
        if let Some(last) = gone.as_bytes().last() {
            self.line_start = *last == b'\n';
        }
        self.line += gone.matches('\n').count() as u32;
        self.rest = rest;
    }

    /// Text up to a tag, and that tag.
    fn text(&mut self) -> Outcome<()> {
        let tag = find_tag(self.rest);
        let Some((at, kind)) = tag else {
            let text = normal(self.rest);
            self.push(Token::Text(text))?;
            self.skip(self.rest.len());
            return Ok(());
        };
        let text = &self.rest[..at];
        let sign = self.rest[at + 2..]
            .chars()
            .next()
            .filter(|c| "-+".contains(*c));
        let shown = match sign {
            Some('-') => text.trim_end(),
            None if kind != '{' => self.without_indent(text),
            _ => text,
        };
        if !shown.is_empty() {
            let shown = normal(shown);
            self.push(Token::Text(shown))?;
        }
        self.skip(at + 2 + sign.map_or(0, char::len_utf8));
        match kind {
            '#' => {
                let Some(end) = self.rest.find("#}") else {
                    return Err(self.fault("a comment without an end"));
                };
                let signed = end.checked_sub(1).and_then(|i| self.rest.as_bytes().get(i));
                let signed = signed.copied();
                self.skip(end + 2);
                self.after_tag(signed, true);
                Ok(())
            }
            '{' => {
                self.push(Token::Open)?;
                self.inside("}}", Token::Close)
            }
            _ => match raw_tag(self.rest, "raw") {
                Some((length, trimming)) => self.raw(length, trimming),
                None => {
                    self.push(Token::OpenTag)?;
                    self.inside("%}", Token::CloseTag)
                }
            },
        }
    }

    /// Without the white space before a tag that stands first in its line.
    fn without_indent<'t>(&self, text: &'t str) -> &'t str {
        let line = text.rfind('\n').map_or(0, |i| i + 1);
        let first = line > 0 || self.line_start;
        if first && text[line..].chars().all(char::is_whitespace) {
            &text[..line]
        } else {
            text
        }
    }

    /// White space after a tag that ends with `sign`.
    fn after_tag(&mut self, sign: Option<u8>, block: bool) {
        match sign {
            Some(b'-') => self.skip(self.rest.len() - self.rest.trim_start().len()),
            Some(b'+') => {}
            _ if block => {
                let line = self
                    .rest
                    .strip_prefix("\r\n")
                    .or(self.rest.strip_prefix('\n'));
                if let Some(after) = line {
                    self.skip(self.rest.len() - after.len());
                }
            }
            _ => {}
        }
    }

    /// Text that is not looked into, up to `{% endraw %}`.
    fn raw(&mut self, length: usize, trimming: Option<u8>) -> Outcome<()> {
        self.skip(length);
        self.after_tag(trimming, true);
        let mut from = 0;
        let (at, length, before, after) = loop {
            let Some(at) = self.rest[from..].find("{%").map(|i| i + from) else {
                return Err(self.fault("a raw block without an end"));
            };
            let inner = &self.rest[at + 2..];
            let sign = inner.bytes().next().filter(|b| b"-+".contains(b));
            let skipped = usize::from(sign.is_some());
            if let Some((length, after)) = raw_tag(&inner[skipped..], "endraw") {
                break (at, 2 + skipped + length, sign, after);
            }
            from = at + 2;
        };
        let text = &self.rest[..at];
        let text = match before {
            Some(b'-') => text.trim_end(),
            None => self.without_indent(text),
            _ => text,
        };
        let text = normal(text);
        self.push(Token::Text(text))?;
        self.skip(at + length);
        self.after_tag(after, true);
        Ok(())
    }

    /// What is inside of a tag, and its end.
    fn inside(&mut self, close: &'static str, token: Token) -> Outcome<()> {
        let mut braces = Vec::new();
        loop {
            self.skip(self.rest.len() - self.rest.trim_start().len());
            let Some(c) = self.rest.chars().next() else {
                return Err(self.fault("a tag without an end"));
            };
            if braces.is_empty() {
                let signed = c == '-' || c == '+';
                let end = &self.rest[usize::from(signed)..];
                if end.starts_with(close) {
                    let sign = signed.then_some(c as u8);
                    self.skip(usize::from(signed) + 2);
                    self.push(token.clone())?;
                    self.after_tag(sign, close == "%}");
                    return Ok(());
                }
            }
            if c == '"' || c == '\'' {
                self.string(c)?;
            } else if c.is_ascii_digit() {
                self.number()?;
            } else if c == '_' || c.is_alphabetic() {
                let end = self.rest.find(|c: char| c != '_' && !c.is_alphanumeric());
                let name = &self.rest[..end.unwrap_or(self.rest.len())];
                let length = name.len();
                let name = Token::Name(name.into());
                self.push(name)?;
                self.skip(length);
            } else if let Some(op) = OPERATORS.iter().find(|op| self.rest.starts_with(**op)) {
                match *op {
                    "(" => braces.push(")"),
                    "[" => braces.push("]"),
                    "{" => braces.push("}"),
                    ")" | "]" | "}" if braces.pop() != Some(op) => {
                        return Err(self.fault(format!("an unexpected {op:?}")));
                    }
                    _ => {}
                }
                self.push(Token::Op(op))?;
                self.skip(op.len());
            } else {
                return Err(self.fault(format!("an unexpected character {c:?}")));
            }
        }
    }

    fn number(&mut self) -> Outcome<()> {
        let digits = |text: &str| {
            let end = text.find(|c: char| c != '_' && !c.is_ascii_digit());
            end.unwrap_or(text.len())
        };
        let mut end = digits(self.rest);
        let after = &self.rest[end..];
        let mut float = false;
        if let Some(fraction) = after.strip_prefix('.')
            && fraction.starts_with(|c: char| c.is_ascii_digit())
        {
            float = true;
            end += 1 + digits(fraction);
        }
        if let Some(exponent) = self.rest[end..].strip_prefix(['e', 'E']) {
            let number = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
            if number.starts_with(|c: char| c.is_ascii_digit()) {
                float = true;
                end += 1 + (exponent.len() - number.len()) + digits(number);
            }
        }
        let text = self.rest[..end].replace('_', "");
        let bad = |_| self.fault(format!("the number {} cannot be read", short(&text)));
        let token = if float {
            Token::Float(text.parse().map_err(|_| bad(()))?)
        } else {
            Token::Int(text.parse().map_err(|_| bad(()))?)
        };
        self.push(token)?;
        self.skip(end);
        Ok(())
    }

    /// A string as Python writes it.
    fn string(&mut self, quote: char) -> Outcome<()> {
        let mut out = String::new();
        let mut chars = self.rest.char_indices().skip(1);
        loop {
            let Some((at, c)) = chars.next() else {
                return Err(self.fault("a string without an end"));
            };
            if c == quote {
                self.push(Token::Str(out))?;
                self.skip(at + 1);
                return Ok(());
            }
            if c != '\\' {
                out.push(c);
                continue;
            }
            let Some((_, escape)) = chars.next() else {
                return Err(self.fault("a string without an end"));
            };
            let digits = match escape {
                'x' => 2,
                'u' => 4,
                'U' => 8,
                _ => 0,
            };
            if digits > 0 {
                let code: String = chars.by_ref().take(digits).map(|(_, c)| c).collect();
                let found = u32::from_str_radix(&code, 16).ok().and_then(char::from_u32);
                match found.filter(|_| code.len() == digits) {
                    Some(c) => out.push(c),
                    None => return Err(self.fault("an escape that is no character")),
                }
                continue;
            }
            match escape {
                '\n' => {}
                'n' => out.push('\n'),
                't' => out.push('\t'),
                'r' => out.push('\r'),
                'a' => out.push('\u{7}'),
                'b' => out.push('\u{8}'),
                'f' => out.push('\u{c}'),
                'v' => out.push('\u{b}'),
                '0' => out.push('\0'),
                '\\' | '\'' | '"' => out.push(escape),
                other => out.extend(['\\', other]),
            }
        }
    }

    fn fault(&self, message: impl Into<String>) -> super::Fault {
        fault(message).at(self.line)
    }
}

/// The first tag of a text: where, and the character after its brace.
fn find_tag(text: &str) -> Option<(usize, char)> {
    let bytes = text.as_bytes();
    (0..bytes.len().saturating_sub(1))
        .find(|&i| bytes[i] == b'{' && matches!(bytes[i + 1], b'{' | b'%' | b'#'))
        .map(|i| (i, char::from(bytes[i + 1])))
}

/// The length of the rest of a tag of only this name, and the sign at its end.
fn raw_tag(text: &str, name: &str) -> Option<(usize, Option<u8>)> {
    let inner = text.trim_start().strip_prefix(name)?.trim_start();
    let sign = inner.bytes().next().filter(|b| b"-+".contains(b));
    let inner = &inner[usize::from(sign.is_some())..];
    let rest = inner.strip_prefix("%}")?;
    Some((text.len() - rest.len(), sign))
}

fn normal(text: &str) -> Arc<str> {
    if text.contains('\r') {
        text.replace("\r\n", "\n").replace('\r', "\n").into()
    } else {
        text.into()
    }
}

fn short(text: &str) -> String {
    text.chars().take(40).collect()
}
