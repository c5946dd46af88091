//! Tables and pictures of results.

use super::{Record, Settings, Store};
use crate::{
    evaluate::{Case, Results},
    pictures::{Chart, Scale, Series},
    report::{self, Table},
};
use locret_core::{Budget, Positions};
use std::collections::BTreeMap;

/// A policy with one budget, store and length, over all tasks and seeds.
#[derive(Debug, Clone)]
pub struct Row {
    /// What the policy is called.
    pub label: String,
    /// The policy.
    pub settings: Settings,
    /// How keys and values are kept.
    pub store: Store,
    /// Tokens of a context.
    pub length: usize,
    /// Mean bytes of keys and values when a context that is asked about was read.
    pub kept: f64,
    /// `kept` as a share of a full cache of 16-bit values.
    pub share: f64,
    /// Mean of the contexts' KV footprints ([`Case::footprint`]), where all have one.
    pub footprint: Option<f64>,
    /// Mean time until the first token of an answer, where all have one. Of one machine.
    pub first_token_seconds: Option<f64>,
    /// Scores and bytes.
    pub results: Results,
    /// Mean of the curves: tokens read, bytes held.
    pub curve: Vec<(f64, f64)>,
}

/// Sums records up. `unit_bytes` is what a token takes in a full cache of 16-bit values.
pub fn rows(records: &[Record], unit_bytes: usize) -> Vec<Row> {
    let mut groups: Vec<(&Record, Vec<&Record>)> = Vec::new();
    for record in records {
        let same = |r: &Record| {
            r.label == record.label
                && r.policy == record.policy
                && r.store == record.store
                && r.length == record.length
        };
        match groups.iter_mut().find(|(first, _)| same(first)) {
            Some((_, group)) => group.push(record),
            None => groups.push((record, vec![record])),
        }
    }
    let row = |(first, group): (&Record, Vec<&Record>)| {
        let cases: Vec<Case> = group.iter().map(|r| r.case.clone()).collect();
        // Of the contexts that are asked about: those of continuations are shorter.
        let asks = cases.iter().any(|c| !c.continuation);
        let counted: Vec<&Case> = cases.iter().filter(|c| !(asks && c.continuation)).collect();
        let n = counted.len() as f64;
        let kept = counted.iter().map(|c| c.kept_kv_bytes as f64).sum::<f64>() / n;
        let tokens = counted.iter().map(|c| c.context_tokens as f64).sum::<f64>() / n;
        let mean = |of: fn(&Case) -> Option<f64>| -> Option<f64> {
            let all: Option<Vec<f64>> = counted.iter().map(|c| of(c)).collect();
            all.filter(|all| !all.is_empty())
                .map(|all| all.iter().sum::<f64>() / all.len() as f64)
        };
        // The longest context shows the most.
        let longest = cases.iter().max_by_key(|c| c.context_tokens);
        let curve = longest.map(|c| &c.curve[..]).unwrap_or(&[]);
        Row {
            label: first.label.clone(),
            settings: first.policy.clone(),
            store: first.store,
            length: first.length,
            kept,
            share: kept / (tokens * unit_bytes as f64).max(1.0),
            footprint: mean(|c| c.footprint),
            first_token_seconds: mean(|c| c.first_token_seconds),
            curve: curve.iter().map(|(t, b)| (*t as f64, *b as f64)).collect(),
            results: Results::of(&first.label, serde_json::Value::Null, &cases),
        }
    };
    groups.into_iter().map(row).collect()
}

impl Row {
    /// The name of the row's line in a picture: the policy, and the store if `with_store`.
    fn line(&self, with_store: bool) -> String {
        let mut name = self.label.clone();
        if self.settings.moved() {
            name += &format!(", {}", positions_name(self.settings.positions()));
        }
        if with_store {
            name += &format!(", {}", self.store.name());
        }
        name
    }

    fn budget(&self) -> String {
        match self.settings.budget() {
            None => "–".into(),
            Some(Budget::Units(n)) => n.to_string(),
            Some(Budget::Ratio(r)) => format!("{} %", r * 100.0),
            Some(Budget::Bytes(n)) => report::bytes(n),
            Some(other) => other.to_string(),
        }
    }
}

fn positions_name(positions: Positions) -> &'static str {
    match positions {
        Positions::Original => "original",
        _ => "compact",
    }
}

/// The tables of a run in Markdown: one for each length, and which method is best at equal bytes.
pub fn markdown(rows: &[Row]) -> String {
    let mut lengths: Vec<usize> = rows.iter().map(|r| r.length).collect();
    lengths.sort_unstable();
    lengths.dedup();
    let mut text = String::new();
    for length in lengths {
        let rows: Vec<&Row> = rows.iter().filter(|r| r.length == length).collect();
        if length > 0 {
            text += &format!("### {} tokens\n\n", report::grouped(length));
        }
        text += &table(&rows).markdown();
        text += "\nExact match by task, of RULER's tasks their own score; `mean` is over the tasks with \
                 questions, its 95 % interval after Wilson over all their questions, and `by context` \
                 that of contexts drawn anew; `of full` is the share of a full 16-bit cache that was \
                 kept, `footprint` units × steps of reading as a share of a full cache's, and `first` the \
                 seconds until an answer's first token; tasks without questions show −ln p a token.\n\n";
        let best = best_at_equal_bytes(&rows);
        if !best.is_empty() {
            text += "At equal bytes: the highest mean with no more than this share of a full 16-bit \
                     cache (in brackets the budget), the best of each share in bold:\n\n";
            text += &best.markdown();
            text.push('\n');
        }
    }
    text
}

fn table(rows: &[&Row]) -> Table {
    let mut kinds: BTreeMap<&str, bool> = BTreeMap::new();
    for row in rows {
        for kind in row.results.tasks.keys() {
            kinds.insert(kind, !row.results.continuations.contains(kind));
        }
    }
    // Questions first.
    let mut kinds: Vec<(&str, bool)> = kinds.into_iter().collect();
    kinds.sort_by_key(|k| !k.1);
    let names: Vec<String> = kinds.iter().map(|k| format!(">{}", k.0)).collect();
    let mut columns = vec![
        "method",
        "positions",
        "store",
        ">budget",
        ">KV kept",
        ">of full",
        ">footprint",
        ">first",
        ">mean",
        "95 %",
        "by context",
    ];
    columns.extend(names.iter().map(String::as_str));
    let mut table = Table::new(&columns);
    for row in rows {
        let mut cells = vec![
            row.label.clone(),
            positions_name(row.settings.positions()).into(),
            row.store.name().into(),
            row.budget(),
            report::bytes(row.kept.round() as usize),
            format!("{:.3}", row.share),
            row.footprint.map_or("–".into(), |x| format!("{x:.3}")),
            (row.first_token_seconds).map_or("–".into(), |x| format!("{x:.2}")),
        ];
        match &row.results.mean {
            Some(mean) => {
                let right = (mean.exact * mean.n as f64).round() as usize;
                cells.push(format!("{:.3}", mean.exact));
                for (low, high) in [report::wilson(right, mean.n), row.results.mean_interval()] {
                    cells.push(format!("{low:.2}–{high:.2}"));
                }
            }
            None => cells.extend(["–".into(), "–".into(), "–".into()]),
        }
        for (kind, asks) in &kinds {
            cells.push(match row.results.tasks.get(*kind) {
                Some(s) if *asks => format!("{:.2}", s.exact),
                Some(s) => format!("{:.3}", s.nll),
                None => "–".into(),
            });
        }
        table.row(cells);
    }
    table
}

/// Shares of a full 16-bit cache, as divisors.
const SHARES: [usize; 4] = [4, 8, 16, 32];

/// For each method and each share of a full 16-bit cache, its highest mean (and the budget) that
/// kept no more; the best of a share is bold.
fn best_at_equal_bytes(rows: &[&Row]) -> Table {
    let mut lines: Vec<(String, [Option<(&Row, f64)>; 4])> = Vec::new();
    for row in rows {
        let Some(mean) = &row.results.mean else {
            continue;
        };
        let name = row.line(true);
        let at = match lines.iter().position(|l| l.0 == name) {
            Some(at) => at,
            None => {
                lines.push((name, [None; 4]));
                lines.len() - 1
            }
        };
        for (best, divisor) in lines[at].1.iter_mut().zip(SHARES) {
            // Contexts differ by a sentence.
            let fits = row.share <= 1.02 / divisor as f64;
            if fits && best.is_none_or(|(_, value)| mean.exact > value) {
                *best = Some((row, mean.exact));
            }
        }
    }
    lines.retain(|l| l.1.iter().any(Option::is_some));
    let mut table = Table::new(&["method", ">1/4", ">1/8", ">1/16", ">1/32"]);
    for (name, cells) in &lines {
        let cells = cells.iter().enumerate().map(|(i, cell)| match cell {
            None => "–".to_owned(),
            Some((row, value)) => {
                let all = lines.iter().filter_map(|l| l.1[i]);
                let top = all.map(|c| c.1).fold(f64::NEG_INFINITY, f64::max);
                let mark = if *value >= top { "**" } else { "" };
                format!("{mark}{value:.3}{mark} ({})", row.budget())
            }
        });
        table.row([name.clone()].into_iter().chain(cells));
    }
    table
}

/// Quality against bytes kept, for one length. `None` where no task has questions.
pub fn quality_chart(rows: &[Row], length: usize) -> Option<Chart> {
    let rows: Vec<&Row> = rows.iter().filter(|r| r.length == length).collect();
    let with_store = rows.iter().any(|r| r.store != rows[0].store);
    let points = rows.iter().filter_map(|row| {
        let mean = row.results.mean.as_ref()?;
        Some((row.line(with_store), (row.kept, mean.exact)))
    });
    let mut series = gather(points);
    for s in &mut series {
        s.points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    (!series.is_empty()).then(|| Chart {
        title: title("Quality against memory", length),
        x: ("bytes of keys and values kept".into(), Scale::LogBytes),
        y: ("exact match, mean over tasks".into(), Scale::Share),
        series,
    })
}

/// For one length and each task, quality against bytes kept, and the Pareto front: what nothing else beats with no more
/// bytes. With the names of the tasks.
pub fn pareto_charts(rows: &[Row], length: usize) -> Vec<(String, Chart)> {
    let rows: Vec<&Row> = rows.iter().filter(|r| r.length == length).collect();
    let with_store = rows.iter().any(|r| r.store != rows[0].store);
    let mut tasks: Vec<&String> = rows.iter().flat_map(|r| r.results.tasks.keys()).collect();
    tasks.sort();
    tasks.dedup();
    let chart = |task: &String| {
        let asks = |row: &&&Row| !row.results.continuations.contains(task);
        let asks = rows.iter().any(|row| asks(&row));
        let points = rows.iter().filter_map(|row| {
            let scores = row.results.tasks.get(task)?;
            let y = if asks { scores.exact } else { scores.nll };
            Some((row.line(with_store), (row.kept, y)))
        });
        let mut series = gather(points);
        let all: Vec<(f64, f64)> = series.iter().flat_map(|s| s.points.clone()).collect();
        for s in &mut series {
            s.points.sort_by(|a, b| a.0.total_cmp(&b.0));
            s.joined = false;
        }
        // First, so that marks lie on it.
        series.insert(
            0,
            Series {
                name: "Pareto front".into(),
                points: front(&all, asks),
                joined: true,
            },
        );
        let y = match asks {
            true => ("score".into(), Scale::Share),
            false => ("−ln p a token".into(), Scale::Near),
        };
        let chart = Chart {
            title: title(&format!("{task}: quality against memory"), length),
            x: ("bytes of keys and values kept".into(), Scale::LogBytes),
            y,
            series,
        };
        (task.clone(), chart)
    };
    tasks.into_iter().map(chart).collect()
}

/// The points that no other beats with no more bytes, in the order of bytes; `more` is better, or less is.
fn front(points: &[(f64, f64)], more: bool) -> Vec<(f64, f64)> {
    let worth = |y: f64| if more { y } else { -y };
    let mut sorted = points.to_vec();
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0).then(worth(b.1).total_cmp(&worth(a.1))));
    let mut best = f64::NEG_INFINITY;
    sorted.retain(|(_, y)| {
        let better = worth(*y) > best;
        best = best.max(worth(*y));
        better
    });
    sorted
}

/// Bytes held against tokens read, for one length, each policy at its largest budget.
pub fn memory_chart(rows: &[Row], length: usize) -> Option<Chart> {
    let rows: Vec<&Row> = rows.iter().filter(|r| r.length == length).collect();
    let with_store = rows.iter().any(|r| r.store != rows[0].store);
    let mut largest: Vec<(String, &Row)> = Vec::new();
    for row in rows {
        let name = row.line(with_store);
        match largest.iter_mut().find(|(n, _)| *n == name) {
            Some((_, best)) if best.kept < row.kept => *best = row,
            Some(_) => {}
            None => largest.push((name, row)),
        }
    }
    let series: Vec<Series> = (largest.into_iter())
        .map(|(name, row)| Series {
            name,
            points: row.curve.clone(),
            joined: true,
        })
        .filter(|s| !s.points.is_empty())
        .collect();
    (!series.is_empty()).then(|| Chart {
        title: title("Memory while a text is read", length),
        x: ("tokens read".into(), Scale::Linear),
        y: ("bytes of keys and values".into(), Scale::Bytes),
        series,
    })
}

fn title(what: &str, length: usize) -> String {
    match length {
        0 => what.into(),
        n => format!("{what}, {} tokens", report::grouped(n)),
    }
}

fn gather(points: impl Iterator<Item = (String, (f64, f64))>) -> Vec<Series> {
    let mut series: Vec<Series> = Vec::new();
    for (name, point) in points {
        match series.iter_mut().find(|s| s.name == name) {
            Some(s) => s.points.push(point),
            None => series.push(Series {
                name,
                points: vec![point],
                joined: true,
            }),
        }
    }
    series
}

#[cfg(test)]
mod tests {
    use super::{super::journal::tests::records, *};

    #[test]
    fn rows_tables_and_pictures_sum_records_up() {
        let rows = rows(&records(), 500);
        assert_eq!(rows.len(), 3);
        assert_eq!((rows[0].kept, rows[0].share), (1e6, 1.0));
        assert_eq!(rows[1].results.mean.unwrap().exact, 0.5);
        let text = markdown(&rows);
        assert!(text.starts_with("### 2,000 tokens\n\n| method"), "{text}");
        let line = |begin: &str| {
            text.lines()
                .find(|l| l.starts_with(begin))
                .unwrap()
                .to_owned()
        };
        // Full: facts right, perplexity as nats.
        assert!(line("| full").contains("| 1.000 |") && line("| full").contains("0.500 |"));
        // 0.12 of a full cache at 256 units, 0.06 at 128; the full cache fits nowhere.
        let best = line("| window, f32");
        assert!(line("| window ").contains(" 0.030 |  0.50 |"), "{text}");
        let cells: Vec<&str> = best.split('|').map(str::trim).collect();
        assert_eq!(
            cells[2..5],
            ["**1.000** (256)", "**1.000** (256)", "**0.500** (128)"]
        );
        assert_eq!(cells[5], "–");
        let quality = quality_chart(&rows, 2000).unwrap();
        assert_eq!(quality.series.len(), 2);
        assert_eq!(quality.series[1].points, [(60e3, 0.5), (120e3, 1.0)]);
        let memory = memory_chart(&rows, 2000).unwrap();
        assert_eq!(memory.series[1].points, [(1000.0, 120e3), (2000.0, 120e3)]);
        assert!(quality.svg().is_ok() && memory.svg().is_ok());
        let pareto = pareto_charts(&rows, 2000);
        let names: Vec<&str> = pareto.iter().map(|(task, _)| task.as_str()).collect();
        assert_eq!(names, ["facts", "perplexity"]);
        let [front, full, window] = &pareto[0].1.series[..] else {
            panic!("{pareto:?}");
        };
        // All that the full cache has is had for less.
        assert_eq!(front.points, [(60e3, 0.5), (120e3, 1.0)]);
        assert_eq!((full.points.len(), window.points.len()), (1, 2));
        assert!(front.joined && !window.joined);
        assert!(pareto.iter().all(|(_, chart)| chart.svg().is_ok()));
    }

    #[test]
    fn a_front_is_what_nothing_beats() {
        let points = [
            (4.0, 0.5),
            (1.0, 0.2),
            (2.0, 0.2),
            (2.0, 0.4),
            (3.0, 0.3),
            (8.0, 0.5),
        ];
        assert_eq!(front(&points, true), [(1.0, 0.2), (2.0, 0.4), (4.0, 0.5)]);
        assert_eq!(front(&points, false), [(1.0, 0.2)]);
        assert_eq!(front(&[], true), []);
    }
}
