//! What is counted, in Prometheus' text format.

use crate::app::App;
use std::{
    collections::BTreeMap,
    fmt::Write,
    sync::{Mutex, PoisonError},
    time::Duration,
};

/// Upper ends of the buckets of times, in seconds.
const BUCKETS: [f64; 14] = [
    0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0,
];

/// How often times were at most so long.
#[derive(Debug, Clone, Copy, Default)]
struct Histogram {
    buckets: [u64; BUCKETS.len()],
    count: u64,
    sum: f64,
}

impl Histogram {
    fn note(&mut self, time: Duration) {
        let seconds = time.as_secs_f64();
        for (bucket, end) in self.buckets.iter_mut().zip(BUCKETS) {
            *bucket += u64::from(seconds <= end);
        }
        self.count += 1;
        self.sum += seconds;
    }

    fn write(&self, name: &str, help: &str, to: &mut String) {
        head(name, "histogram", help, to);
        for (bucket, end) in self.buckets.iter().zip(BUCKETS) {
            line(to, format_args!("{name}_bucket{{le=\"{end}\"}} {bucket}"));
        }
        line(
            to,
            format_args!("{name}_bucket{{le=\"+Inf\"}} {}", self.count),
        );
        line(to, format_args!("{name}_sum {}", self.sum));
        line(to, format_args!("{name}_count {}", self.count));
    }
}

#[derive(Debug, Default)]
struct Counts {
    /// By route and status.
    requests: BTreeMap<(String, u16), u64>,
    first_token: Histogram,
    total: Histogram,
    sessions_stored: u64,
    sessions_resumed: u64,
}

/// What has been counted so far.
#[derive(Debug, Default)]
pub struct Metrics(Mutex<Counts>);

impl Metrics {
    fn with(&self, note: impl FnOnce(&mut Counts)) {
        note(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// A request was answered, or its answer began.
    pub fn answered(&self, route: &str, status: u16) {
        self.with(|counts| {
            *counts
                .requests
                .entry((route.to_owned(), status))
                .or_default() += 1;
        });
    }

    /// The first token was there after so long.
    pub fn first_token(&self, after: Duration) {
        self.with(|counts| counts.first_token.note(after));
    }

    /// A sequence ended after so long.
    pub fn ended(&self, after: Duration) {
        self.with(|counts| counts.total.note(after));
    }

    /// A session was stored.
    pub fn stored(&self) {
        self.with(|counts| counts.sessions_stored += 1);
    }

    /// A session was taken up again.
    pub fn resumed(&self) {
        self.with(|counts| counts.sessions_resumed += 1);
    }

    /// Everything as text.
    pub fn text(&self, app: &App) -> String {
        let (load, limits) = (app.batcher.load(), app.batcher.limits());
        let mut text = String::new();
        let mut one = |name: &str, kind: &str, help: &str, value: u64| {
            head(name, kind, help, &mut text);
            line(&mut text, format_args!("{name} {value}"));
        };
        for (name, help, value) in [
            (
                "locret_memory_cap_bytes",
                "Bytes that sequences may take",
                limits.memory,
            ),
            (
                "locret_memory_promised_bytes",
                "Bytes promised to sequences",
                load.promised,
            ),
            ("locret_kv_bytes", "Bytes of keys and values", load.kv_bytes),
            (
                "locret_sequences_running",
                "Sequences that run",
                load.running,
            ),
            (
                "locret_sequences_waiting",
                "Sequences that wait",
                load.waiting,
            ),
        ] {
            one(name, "gauge", help, value as u64);
        }
        for (name, help, value) in [
            (
                "locret_prompt_tokens_total",
                "Tokens of prompts read",
                load.read,
            ),
            (
                "locret_generated_tokens_total",
                "Tokens generated",
                load.generated,
            ),
            (
                "locret_passes_total",
                "Passes through the model",
                load.passes,
            ),
            (
                "locret_sequences_ended_total",
                "Sequences that have ended",
                load.ended,
            ),
            (
                "locret_sequences_parked_total",
                "Times that a sequence made way for another",
                load.parked,
            ),
            (
                "locret_sequences_not_parked_total",
                "Times that a sequence could not be put away for another",
                load.stayed,
            ),
        ] {
            one(name, "counter", help, value);
        }
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (name, help, value) in [
            (
                "locret_sessions_stored_total",
                "Sessions stored",
                counts.sessions_stored,
            ),
            (
                "locret_sessions_resumed_total",
                "Sessions taken up again",
                counts.sessions_resumed,
            ),
        ] {
            one(name, "counter", help, value);
        }
        head(
            "locret_requests_total",
            "counter",
            "Requests by route and status",
            &mut text,
        );
        for ((route, status), n) in &counts.requests {
            line(
                &mut text,
                format_args!("locret_requests_total{{route=\"{route}\",status=\"{status}\"}} {n}"),
            );
        }
        let help = "From a request to its first token";
        counts
            .first_token
            .write("locret_first_token_seconds", help, &mut text);
        let help = "From a request to its last token";
        counts
            .total
            .write("locret_request_seconds", help, &mut text);
        text
    }
}

fn head(name: &str, kind: &str, help: &str, to: &mut String) {
    line(to, format_args!("# HELP {name} {help}."));
    line(to, format_args!("# TYPE {name} {kind}"));
}

fn line(to: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    let _ = writeln!(to, "{text}");
}
