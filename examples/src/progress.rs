//! Progress of long work: a bar on a terminal, now and then a line elsewhere.
//!
//! Everything goes to standard error, so that standard output holds results alone.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use locret_eval::{evaluate::Event, report};
use locret_models::Progress as Fetch;
use std::{
    cell::RefCell,
    io::IsTerminal,
    time::{Duration, Instant},
};

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Bytes of a download or a file.
    Bytes,
    /// Tokens of a prompt.
    Tokens,
    /// Cases of a run.
    Cases,
}

/// A piece of work with a known or unknown length.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    label: String,
    unit: Unit,
    total: Option<u64>,
    done: u64,
    /// Units that had been done before.
    skipped: u64,
    started: Instant,
    told: Instant,
}

/// How often a line is written where there is no terminal.
const QUIET: Duration = Duration::from_secs(15);

impl Progress {
    /// Starts the work called `label`, of `total` units if that is known.
    pub fn new(label: impl Into<String>, total: Option<u64>, unit: Unit) -> Self {
        let label = label.into();
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = match total {
                Some(n) => ProgressBar::new(n),
                None => ProgressBar::no_length(),
            };
            bar.set_draw_target(ProgressDrawTarget::stderr_with_hz(8));
            let counts = match (unit, total) {
                (Unit::Bytes, Some(_)) => "{binary_bytes}/{binary_total_bytes}",
                (Unit::Bytes, None) => "{binary_bytes}",
                (Unit::Tokens, _) => "{human_pos}/{human_len} tokens  {per_sec}",
                (Unit::Cases, _) => "{human_pos}/{human_len}",
            };
            let time = if total.is_some() { "  {eta} left" } else { "" };
            let template = format!("{{msg:28!}} [{{bar:28}}] {counts}{time}");
            if let Ok(style) = ProgressStyle::with_template(&template) {
                bar.set_style(style.progress_chars("━╸─"));
            }
            bar.set_message(label.clone());
            bar
        });
        let now = Instant::now();
        Self {
            bar,
            label,
            unit,
            total,
            done: 0,
            skipped: 0,
            started: now,
            told: now,
        }
    }

    /// Says that `done` units are done.
    pub fn set(&mut self, done: u64) {
        self.done = done;
        match &self.bar {
            Some(bar) => bar.set_position(done),
            None if self.told.elapsed() >= QUIET => {
                self.told = Instant::now();
                eprintln!("{}", self.line());
            }
            None => {}
        }
    }

    /// Says how many units there are in all, once that is known.
    pub fn set_total(&mut self, total: u64) {
        if self.total != Some(total) {
            self.total = Some(total);
            if let Some(bar) = &self.bar {
                bar.set_length(total);
            }
        }
    }

    /// One unit more.
    pub fn step(&mut self) {
        self.set(self.done + 1);
    }

    /// One unit more that was done before: it says nothing about the time left.
    pub fn skip(&mut self) {
        self.set(self.done + 1);
        self.skipped += 1;
        if let Some(bar) = &self.bar {
            bar.reset_eta();
        }
    }

    /// Follows tasks that are run.
    pub fn follow(&mut self, event: Event<'_>) {
        match event {
            Event::Next { policy, task } => self.label(format!("{policy} {}", task.id)),
            Event::Known => self.skip(),
            Event::Done => self.step(),
        }
    }

    /// Changes what is said before the bar.
    pub fn label(&mut self, label: impl Into<String>) {
        self.label = label.into();
        if let Some(bar) = &self.bar {
            bar.set_message(self.label.clone());
        }
    }

    /// Writes a line that stays, above the bar.
    pub fn note(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }

    /// Ends the work and takes the bar away.
    pub fn finish(self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    /// Ends the work and leaves a line that says how long it took.
    pub fn finish_with_line(self) {
        let seconds = self.started.elapsed().as_secs_f64();
        let text = format!("{}: {}", self.label, report::duration(seconds));
        self.finish();
        eprintln!("{text}");
    }

    fn line(&self) -> String {
        let show = |n: u64| match self.unit {
            Unit::Bytes => report::bytes(n as usize),
            Unit::Tokens | Unit::Cases => report::grouped(n as usize),
        };
        let seconds = self.started.elapsed().as_secs_f64();
        let (label, done) = (&self.label, show(self.done));
        match self.total {
            Some(total) if self.done > self.skipped => {
                let each = seconds / (self.done - self.skipped) as f64;
                let left = each * total.saturating_sub(self.done) as f64;
                let all = show(total);
                format!("{label}: {done} of {all}, {} left", report::duration(left))
            }
            _ => format!("{label}: {done}, {}", report::duration(seconds)),
        }
    }
}

impl Drop for Progress {
    /// An error on the way must not leave half a bar behind.
    fn drop(&mut self) {
        if let Some(bar) = &self.bar
            && !bar.is_finished()
        {
            bar.finish_and_clear();
        }
    }
}

/// Shows what a fetch is doing.
#[derive(Debug, Default)]
pub struct Fetching {
    /// What is under way: its name, and its bar.
    now: RefCell<Option<(String, Progress)>>,
}

impl Fetching {
    /// Nothing is shown before anything happens.
    pub fn new() -> Self {
        Self::default()
    }

    /// To be called with every event.
    pub fn show(&self, event: Fetch<'_>) {
        let mut now = self.now.borrow_mut();
        let (label, done, total) = match event {
            Fetch::Waiting { what } => (format!("waiting for {what}"), 0, None),
            Fetch::Downloading { what, bytes, total } => {
                (format!("downloading {what}"), bytes, total)
            }
            Fetch::Verifying { what } => (format!("verifying {what}"), 0, None),
            Fetch::Unpacking { what, bytes, total } => {
                let file = what.rsplit('/').next().unwrap_or(what);
                (format!("unpacking {file}"), bytes, Some(total))
            }
            Fetch::Done { .. } => {
                *now = None;
                return;
            }
            _ => return,
        };
        if now.as_ref().is_none_or(|(name, _)| *name != label) {
            let bar = Progress::new(label.clone(), total, Unit::Bytes);
            if bar.bar.is_none() {
                eprintln!("{label} …");
            }
            *now = Some((label, bar));
        }
        if let Some((_, bar)) = &mut *now {
            if let Some(total) = total {
                bar.set_total(total);
            }
            bar.set(done);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_say_what_is_done_and_what_is_left() {
        let mut p = Progress::new("reading", Some(2000), Unit::Tokens);
        p.started = Instant::now() - Duration::from_secs(10);
        p.done = 500;
        assert_eq!(p.line(), "reading: 500 of 2,000, 30 s left");
        let mut p = Progress::new("fetching", None, Unit::Bytes);
        p.started = Instant::now() - Duration::from_secs(20);
        p.done = 2048;
        assert_eq!(p.line(), "fetching: 2.00 KiB, 20 s");
    }
}
