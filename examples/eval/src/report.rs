//! What is printed: aligned tables, sizes and rates that people can read, and intervals.

use locret_core::Session;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::fmt;

/// Bytes in the largest binary unit that keeps the number at 1 or more.
///
/// ```
/// use locret_eval::report::bytes;
/// assert_eq!(bytes(512), "512 B");
/// assert_eq!(bytes(1536), "1.50 KiB");
/// assert_eq!(bytes(48 * 1024 * 1024), "48.0 MiB");
/// ```
pub fn bytes(n: usize) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    if n < 1024 {
        return format!("{n} B");
    }
    let mut value = n as f64;
    let mut unit = 0;
    // 1023.95 would be printed as 1024.0 of the smaller unit.
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let unit = UNITS[unit];
    if value < 9.995 {
        format!("{value:.2} {unit}")
    } else if value < 99.95 {
        format!("{value:.1} {unit}")
    } else {
        format!("{value:.0} {unit}")
    }
}

/// A whole number with a comma every three digits.
///
/// ```
/// assert_eq!(locret_eval::report::grouped(1_234_567), "1,234,567");
/// ```
pub fn grouped(n: usize) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Seconds as people say them: `0.8 s`, `42 s`, `3 min 05 s`, `2 h 10 min`.
pub fn duration(seconds: f64) -> String {
    if seconds < 9.95 {
        return format!("{seconds:.1} s");
    }
    let s = seconds.round() as u64;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {:02} s", s / 60, s % 60),
        _ => format!("{} h {:02} min", s / 3600, s % 3600 / 60),
    }
}

/// A rate to three significant digits.
pub fn rate(per_second: f64) -> String {
    if per_second <= 0.0 {
        "–".into()
    } else if per_second < 9.995 {
        format!("{per_second:.2}")
    } else if per_second < 99.95 {
        format!("{per_second:.1}")
    } else {
        format!("{per_second:.0}")
    }
}

/// Text on one line and of at most `chars` characters; what is cut is shown as `…`.
pub fn shorten(text: &str, chars: usize) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if line.chars().count() <= chars {
        return line;
    }
    let kept: String = line.chars().take(chars.saturating_sub(1)).collect();
    format!("{}…", kept.trim_end())
}

/// The 95 % interval of a share, after Wilson (1927): it stays within 0 to 1 and means something
/// at 0 and at 1 too. `(0, 1)` where nothing was counted.
///
/// ```
/// let (low, high) = locret_eval::report::wilson(8, 10);
/// assert!((low - 0.490).abs() < 5e-4 && (high - 0.943).abs() < 5e-4);
/// ```
pub fn wilson(right: usize, all: usize) -> (f64, f64) {
    if all == 0 {
        return (0.0, 1.0);
    }
    const Z: f64 = 1.959_963_985;
    let n = all as f64;
    let p = right as f64 / n;
    let scale = 1.0 / (1.0 + Z * Z / n);
    let centre = p + Z * Z / (2.0 * n);
    let spread = Z * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
    (
        (scale * (centre - spread)).max(0.0),
        (scale * (centre + spread)).min(1.0),
    )
}

/// How often contexts are drawn anew.
const DRAWS: usize = 2000;

/// The 95 % interval of a mean over kinds (each the mean over its questions), if contexts are drawn anew from
/// those that there are, with replacement, as many of each kind: questions about one context stand and fall
/// together, which intervals of single questions do not know (Efron 1979; percentiles of 2,000 draws, always
/// the same ones). A kind is a list of contexts, each with what its answers are worth. `(0, 1)` where nothing
/// was asked.
///
/// ```
/// use locret_eval::report::bootstrap;
/// let contexts = [vec![1.0, 1.0], vec![0.0, 0.0], vec![1.0, 0.0]];
/// let (low, high) = bootstrap([&contexts[..]]);
/// assert!(low < 0.2 && high > 0.8);
/// ```
pub fn bootstrap<'a>(kinds: impl IntoIterator<Item = &'a [Vec<f64>]>) -> (f64, f64) {
    // Of each context its sum and how many there are.
    let kinds: Vec<Vec<(f64, usize)>> = kinds
        .into_iter()
        .map(|contexts| contexts.iter().map(|c| (c.iter().sum(), c.len())).collect())
        .filter(|contexts: &Vec<(f64, usize)>| contexts.iter().any(|c| c.1 > 0))
        .collect();
    if kinds.is_empty() {
        return (0.0, 1.0);
    }
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let mut mean = || {
        let mut all = 0.0;
        for contexts in &kinds {
            let (mut sum, mut n) = (0.0, 0);
            // Contexts without a question alone say nothing.
            while n == 0 {
                for _ in 0..contexts.len() {
                    let drawn = contexts[rng.random_range(0..contexts.len())];
                    sum += drawn.0;
                    n += drawn.1;
                }
            }
            all += sum / n as f64;
        }
        all / kinds.len() as f64
    };
    let mut means: Vec<f64> = (0..DRAWS).map(|_| mean()).collect();
    means.sort_by(f64::total_cmp);
    (means[DRAWS / 40], means[DRAWS - 1 - DRAWS / 40])
}

/// Times and memory of a session.
pub fn session(session: &Session) -> Table {
    let report = session.report();
    let mut table = Table::new(&["", ">"]);
    let tokens = |n: usize, rate: f64| format!("{} at {} tok/s", grouped(n), self::rate(rate));
    table
        .row(["policy", &session.cache().policy().name()])
        .row([
            "tokens read",
            &tokens(report.prefill_tokens, report.prefill_rate()),
        ])
        .row([
            "tokens generated",
            &tokens(report.decode_tokens, report.decode_rate()),
        ])
        .row([
            "units in a head, at most",
            &grouped(report.peak.units_per_head),
        ])
        .row(["keys and values, at most", &bytes(report.peak.bytes)])
        .row(["keys and values, now", &bytes(report.kv_bytes)]);
    if report.total_bytes > report.kv_bytes {
        let (all, beside) = (bytes(report.total_bytes), bytes(report.metadata_bytes));
        table
            .row(["with what is put away", &all])
            .row(["positions and scores, now", &beside]);
    }
    table
        .row(["a full 32-bit cache", &bytes(report.full_bytes)])
        .row(["smaller by", &format!("{:.1} x", report.compression())]);
    table
}

/// Where a column's text stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    /// For names.
    Left,
    /// For numbers.
    Right,
}

/// A table with aligned columns; [`fmt::Display`] is for a terminal, [`Table::markdown`] for a
/// document.
#[derive(Debug, Clone)]
pub struct Table {
    columns: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these columns: a name that starts with `>` is set to the right.
    pub fn new(columns: &[&str]) -> Self {
        let columns = columns
            .iter()
            .map(|name| match name.strip_prefix('>') {
                Some(name) => (name.to_owned(), Align::Right),
                None => ((*name).to_owned(), Align::Left),
            })
            .collect();
        Self {
            columns,
            rows: Vec::new(),
        }
    }

    /// Adds a row; missing cells are empty, surplus ones are dropped.
    pub fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) -> &mut Self {
        let mut cells: Vec<String> = cells.into_iter().map(Into::into).collect();
        cells.resize(self.columns.len(), String::new());
        self.rows.push(cells);
        self
    }

    /// How many rows there are.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    fn widths(&self, cell: impl Fn(&str) -> usize) -> Vec<usize> {
        (0..self.columns.len())
            .map(|i| {
                let cells = self.rows.iter().map(|r| cell(&r[i]));
                cells.chain([cell(&self.columns[i].0)]).max().unwrap_or(0)
            })
            .collect()
    }

    /// The table in Markdown, its source aligned as well. Bars in cells are escaped.
    pub fn markdown(&self) -> String {
        let escape = |s: &str| s.replace('|', "\\|").replace('\n', " ");
        let widths: Vec<usize> = self
            .widths(|s| escape(s).chars().count())
            .into_iter()
            .map(|w| w.max(3))
            .collect();
        let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
        let names = self.columns.iter().map(|c| escape(&c.0));
        let mut out = line(self.padded(names, &widths));
        let rules = self.columns.iter().zip(&widths).map(|(c, w)| match c.1 {
            Align::Left => "-".repeat(*w),
            Align::Right => format!("{}:", "-".repeat(w - 1)),
        });
        out += &line(rules.collect());
        for row in &self.rows {
            out += &line(self.padded(row.iter().map(|c| escape(c)), &widths));
        }
        out
    }

    fn padded(&self, cells: impl Iterator<Item = String>, widths: &[usize]) -> Vec<String> {
        cells
            .zip(&self.columns)
            .zip(widths)
            .map(|((cell, (_, align)), width)| match align {
                Align::Left => format!("{cell:<width$}"),
                Align::Right => format!("{cell:>width$}"),
            })
            .collect()
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widths = self.widths(|s| s.chars().count());
        // Rows that name themselves need no head.
        if self.columns.iter().any(|c| !c.0.is_empty()) {
            let names = self.columns.iter().map(|c| c.0.clone());
            let head = self.padded(names, &widths).join("  ");
            writeln!(f, "{}", head.trim_end())?;
            let rules: Vec<String> = widths.iter().map(|w| "─".repeat(*w)).collect();
            writeln!(f, "{}", rules.join("──"))?;
        }
        for row in &self.rows {
            let line = self.padded(row.iter().cloned(), &widths).join("  ");
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_change_unit_where_they_would_read_badly() {
        for (n, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (10_240, "10.0 KiB"),
            (1_048_575, "1.00 MiB"),
            (100 << 20, "100 MiB"),
            (48 << 30, "48.0 GiB"),
            (3 << 50, "3072 TiB"),
        ] {
            assert_eq!(bytes(n), text);
        }
    }

    #[test]
    fn durations_and_numbers() {
        assert_eq!(duration(0.84), "0.8 s");
        assert_eq!(duration(59.6), "1 min 00 s");
        assert_eq!(duration(185.0), "3 min 05 s");
        assert_eq!(duration(7800.0), "2 h 10 min");
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(1000), "1,000");
        assert_eq!(rate(0.0), "–");
        assert_eq!(rate(312.4), "312");
        assert_eq!(shorten("a  b\nc", 10), "a b c");
        assert_eq!(shorten("abcdefgh", 5), "abcd…");
    }

    #[test]
    fn columns_line_up_whatever_the_characters() {
        let mut table = Table::new(&["policy", ">bytes"]);
        table.row(["full", "1.00 MiB"]).row(["café–lätt", "2 B"]);
        assert_eq!(table.len(), 2);
        let text = table.to_string();
        let lines: Vec<Vec<char>> = text.lines().map(|l| l.chars().collect()).collect();
        let width = "café–lätt".chars().count() + 2 + "1.00 MiB".len();
        assert!(lines[1].iter().all(|c| *c == '─'));
        for line in &lines {
            assert_eq!(line.len(), width, "{line:?}");
        }
        // Right-aligned: every line ends in its last character.
        assert!(lines.iter().skip(2).all(|l| l.last() == Some(&'B')));
    }

    #[test]
    fn markdown_escapes_bars_and_marks_the_alignment() {
        let mut table = Table::new(&["a", ">b"]);
        table.row(["x|y", "1"]);
        assert_eq!(
            table.markdown(),
            "| a    |   b |\n| ---- | --: |\n| x\\|y |   1 |\n"
        );
    }

    #[test]
    fn intervals_contain_the_share_and_stay_within_bounds() {
        for (right, all) in [(0, 5), (5, 5), (1, 3), (78, 104)] {
            let (low, high) = wilson(right, all);
            let p = right as f64 / all as f64;
            assert!((0.0..=p + 1e-12).contains(&low) && (p - 1e-12..=1.0).contains(&high));
        }
        assert_eq!(wilson(0, 0), (0.0, 1.0));
    }

    #[test]
    fn contexts_are_drawn_as_a_whole() {
        let lone: Vec<Vec<f64>> = (0..64).map(|i| vec![f64::from(i % 2)]).collect();
        // The same answers, eight of a context at a time all right or all wrong.
        let together: Vec<Vec<f64>> = (0..8).map(|i| vec![f64::from(i % 2); 8]).collect();
        let width = |contexts: &[Vec<f64>]| {
            let (low, high) = bootstrap([contexts]);
            assert!(low < 0.5 && high > 0.5);
            high - low
        };
        // A mean of 64 fair draws has a deviation of 1/16, of 8 draws one of .18.
        assert!(
            (width(&lone) - 3.92 / 16.0).abs() < 0.04,
            "{}",
            width(&lone)
        );
        assert!(
            (width(&together) - 3.92 / 32f64.sqrt()).abs() < 0.1,
            "{}",
            width(&together)
        );
        // The mean over kinds: one of them is always right.
        let right = vec![vec![1.0]; 5];
        let (low, high) = bootstrap([&lone[..], &right[..]]);
        assert!((high - low - width(&lone) / 2.0).abs() < 0.03);
        assert_eq!(bootstrap([&right[..]]), (1.0, 1.0));
        assert_eq!(bootstrap([&[][..]]), (0.0, 1.0));
        assert_eq!(bootstrap([&[vec![]][..]]), (0.0, 1.0));
    }
}
