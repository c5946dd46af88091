//! Jinja as chat templates use it, for templates that nobody trusts.
//!
//! Values never change once they are made (but for a namespace's attributes, which nothing else can
//! hold), have a bounded depth, and everything that looks at them or makes new ones is counted by a
//! [`Meter`] before it does so. So time, memory and stack are bounded whatever a template does.
//! Semantics are those of Jinja in Python with the settings that transformers gives it.

mod filters;
mod format;
mod json;
mod lexer;
mod meter;
mod methods;
mod run;
mod syntax;
mod value;

#[cfg(test)]
mod tests;

pub(super) use run::Clock;
pub(super) use value::Value;

use lexer::Lexer;
use meter::Meter;
use run::Run;
use std::{panic, sync::Arc, thread};
use syntax::{Body, Parser};

/// What a template did wrong, and in which line.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Fault {
    message: String,
    line: Option<u32>,
}

type Outcome<T> = Result<T, Fault>;

/// Bytes of stack for one template. Builds without optimisation take some 3 MiB at most, others less
/// than one; what is not used takes no memory.
const STACK: usize = 16 << 20;

/// Characters of a message: it may be made of what a template says.
const MESSAGE: usize = 600;

impl Fault {
    fn new(message: &str) -> Self {
        fault(message)
    }

    /// The same with a line, where there is none yet.
    fn at(mut self, line: u32) -> Self {
        self.line.get_or_insert(line);
        self
    }
}

fn fault(message: impl Into<String>) -> Fault {
    let mut message = message.into();
    if let Some((end, _)) = message.char_indices().nth(MESSAGE) {
        message.truncate(end);
        message.push('…');
    }
    Fault {
        message,
        line: None,
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)?;
        match self.line {
            Some(line) => write!(f, " (line {line})"),
            None => Ok(()),
        }
    }
}

/// A template that can be rendered.
#[derive(Debug)]
pub(super) struct Template {
    body: Body,
}

impl Template {
    pub(super) fn new(source: &str) -> Outcome<Self> {
        apart(|| {
            let tokens = Lexer::tokens(source)?;
            let body = Parser::new(tokens).template()?;
            Ok(Self { body })
        })
    }

    /// The text for some variables, at most `limit` bytes of it. `input`: how many bytes of them come
    /// from messages.
    pub(super) fn render(
        &self,
        variables: impl FnOnce() -> Vec<(Arc<str>, Value)> + Send,
        clock: Option<Clock<'_>>,
        input: usize,
        limit: usize,
    ) -> Outcome<String> {
        apart(|| {
            let meter = Meter::new(input);
            Run::new(&meter, variables(), clock).template(&self.body, limit)
        })
    }
}

/// Does some work on a stack that is large enough for all that sources and values may be nested, however
/// little is left of the caller's.
fn apart<T: Send>(work: impl FnOnce() -> Outcome<T> + Send) -> Outcome<T> {
    thread::scope(|scope| {
        let builder = thread::Builder::new()
            .name("chat template".into())
            .stack_size(STACK);
        let thread = builder
            .spawn_scoped(scope, work)
            .map_err(|e| fault(format!("no thread for the template: {e}")))?;
        match thread.join() {
            Ok(done) => done,
            Err(panic) => panic::resume_unwind(panic),
        }
    })
}
