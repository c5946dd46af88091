//! What a run was, and several runs of parts of one grid as one.

use super::{
    Grid, Journal, Key, Origin, Own, Point, Record, Settings, Shard, TaskSet,
    run::{cases, others},
};
use crate::{
    Error, Result,
    files::{sha256, write_atomically, write_json},
};
use locret_policies::{PolicyConfig, TableConfig};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{
    collections::{HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
};

/// The file of results in a run's folder.
pub const RESULTS: &str = "results.jsonl";

/// The file in a run's folder that says what the run was.
pub const RUN: &str = "run.json";

/// What a run was: all that is needed to make it again, and to join it with others.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// The version of this crate, the model, the revision and the machine.
    pub origin: Origin,
    /// The grid; of files in it, the names without their folders.
    pub grid: Value,
    /// What policies beside the grid's are called.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub own: Vec<String>,
    /// SHA-256 of all tasks, their texts, questions and answers among them.
    pub data_sha256: String,
    /// Which part of the grid was run.
    pub shard: Shard,
    /// Cases of the whole grid.
    pub cases: usize,
    /// Bytes that a token takes in a full cache of 16-bit values.
    pub unit_bytes: usize,
}

impl Run {
    /// Of a grid whose tasks these are, and of policies beside it.
    ///
    /// # Errors
    /// As [`Own::candidates`].
    pub fn new(
        grid: &Grid,
        own: &[Own],
        sets: &[TaskSet],
        origin: Origin,
        unit_bytes: usize,
    ) -> Result<Self> {
        let tasks = sets.iter().flat_map(|set| &set.tasks);
        let hashes: Vec<String> = tasks.map(|task| task.sha256()).collect();
        let labels = own.iter().map(|policy| policy.label().to_owned());
        Ok(Self {
            origin,
            grid: without_folders(grid)?,
            own: labels.collect(),
            data_sha256: sha256(hashes.join(" ").as_bytes()),
            shard: Shard::whole(),
            cases: cases(&grid.points(), others(grid, own)?.len(), sets),
            unit_bytes,
        })
    }

    /// A part of it.
    #[must_use]
    pub fn part(self, shard: Shard) -> Self {
        Self { shard, ..self }
    }

    /// From a run's folder.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::Format`].
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(RUN);
        let text = fs::read_to_string(&path).map_err(|e| Error::read(&path, e))?;
        serde_json::from_str(&text).map_err(|e| Error::format(&path, e))
    }

    /// Into a run's folder.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn write(&self, folder: &Path) -> Result<()> {
        write_json(&folder.join(RUN), self)
    }

    /// What makes results of another run no part of this one.
    fn differs(&self, other: &Self) -> Option<String> {
        if let Some(found) = differs(&self.origin, &other.origin) {
            return Some(found);
        }
        let pairs = [
            ("data", &self.data_sha256, &other.data_sha256),
            ("grid", &self.grid.to_string(), &other.grid.to_string()),
            ("policies", &self.own.join(", "), &other.own.join(", ")),
        ];
        let other_one = pairs.into_iter().find(|(_, a, b)| a != b);
        other_one.map(|(what, a, b)| match what {
            "grid" => "of another grid".into(),
            "policies" => format!("of other policies beside the grid's ({b:?}, not {a:?})"),
            what => format!("of other {what} ({b:.12}…, not {a:.12}…)"),
        })
    }
}

/// What makes results of two origins no parts of one run: not the machine.
fn differs(a: &Origin, b: &Origin) -> Option<String> {
    let shown = |x: &Option<String>| x.clone().unwrap_or_else(|| "unknown".into());
    let model = |o: &Origin| o.model_sha256.clone().unwrap_or_else(|| o.model.clone());
    let pairs = [
        ("model", model(a), model(b)),
        ("version", shown(&a.version), shown(&b.version)),
        ("revision", shown(&a.git), shown(&b.git)),
    ];
    let other = pairs.into_iter().find(|(_, a, b)| a != b);
    other.map(|(what, a, b)| format!("of another {what} ({b}, not {a})"))
}

/// A grid as JSON in which no folder of this machine is named.
fn without_folders(grid: &Grid) -> Result<Value> {
    let mut grid = grid.clone();
    let names = grid.policies.iter_mut().flat_map(|e| e.config.files());
    for file in names.chain(&mut grid.tasks_file) {
        if let Some(name) = file.file_name() {
            *file = PathBuf::from(name);
        }
    }
    serde_json::to_value(&grid).map_err(|e| Error::Usage(format!("the grid: {e}")))
}

/// A grid whose policies have the heads of those of `run`'s where they name none: heads that a grid does not name are a
/// machine's own.
fn with_heads_of(run: &Value, mut grid: Value) -> Value {
    const HEADS: &str = "heads";
    let (runs, grids) = (run.get("policies"), grid.get_mut("policies"));
    let runs = runs.and_then(Value::as_array).into_iter().flatten();
    let grids = grids.and_then(Value::as_array_mut).into_iter().flatten();
    for (run, grid) in runs.zip(grids) {
        let heads = run.pointer("/config/heads");
        let config = grid.get_mut("config").and_then(Value::as_object_mut);
        if let (Some(heads), Some(config)) = (heads, config) {
            config.entry(HEADS).or_insert_with(|| heads.clone());
        }
    }
    grid
}

/// Runs of parts of a grid, joined.
#[derive(Debug, Clone)]
pub struct Merged {
    /// What was run.
    pub run: Run,
    /// The results in the order of the grid's policies, each by the names of tasks.
    pub records: Vec<Record>,
    /// Cases of the grid that no run has.
    pub missing: usize,
}

/// Joins the results of runs, by their folders. A case that several have is taken from the first of them.
///
/// # Errors
/// [`Error::Read`] and [`Error::Format`] for what is no run's folder; [`Error::Usage`] for results of another model,
/// version, grid or other data than those of the first, and for none.
pub fn merge(grid: &Grid, folders: &[PathBuf]) -> Result<Merged> {
    let Some(first) = folders.first() else {
        return Err(Error::Usage("no run's folder was named".into()));
    };
    let whole = Run::read(first)?.part(Shard::whole());
    let refused =
        |folder: &Path, why: String| Error::Usage(format!("{}: results {why}", folder.display()));
    if whole.grid != with_heads_of(&whole.grid, without_folders(grid)?) {
        return Err(refused(first, "of another grid".into()));
    }
    let mut seen: HashSet<Key> = HashSet::new();
    let mut records = Vec::new();
    let mut paths = Paths::default();
    for folder in folders {
        if let Some(why) = whole.differs(&Run::read(folder)?) {
            return Err(refused(folder, why));
        }
        for mut record in Journal::read(&folder.join(RESULTS))? {
            if let Some(why) = differs(&whole.origin, &record.origin) {
                return Err(refused(folder, why));
            }
            paths.same(&mut record);
            if seen.insert(record.key()) {
                records.push(record);
            }
        }
    }
    let mut found = Vec::with_capacity(records.len());
    for point in grid.points() {
        let (mut own, rest): (Vec<_>, _) = records
            .into_iter()
            .partition(|record| of_point(record, &point));
        let name = |record: &Record| (record.case.task.clone(), record.case.id.clone());
        own.sort_by_cached_key(name);
        found.extend(own);
        records = rest;
    }
    for label in &whole.own {
        let is_own = |record: &Record| {
            record.label == *label && matches!(record.policy, Settings::Own { .. })
        };
        let (mut own, rest): (Vec<_>, _) = records.into_iter().partition(is_own);
        own.sort_by_cached_key(|record| {
            let budget = record.policy.budget();
            let place = grid.budgets.iter().position(|b| Some(*b) == budget);
            let store = grid.stores.iter().position(|s| *s == record.store);
            let case = (record.case.task.clone(), record.case.id.clone());
            (place, store, record.length, record.seed, case)
        });
        found.extend(own);
        records = rest;
    }
    Ok(Merged {
        missing: whole.cases.saturating_sub(found.len()),
        run: whole,
        records: found,
    })
}

impl Merged {
    /// Writes what a run of the whole grid would have written into its folder.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn write(&self, folder: &Path) -> Result<()> {
        write_atomically(&folder.join(RESULTS), |out| {
            for record in &self.records {
                writeln!(out, "{}", serde_json::to_string(record)?)?;
            }
            Ok(())
        })?;
        self.run.write(folder)
    }
}

/// Whether a result is one of a point's. Heads that a grid does not name are a machine's own.
fn of_point(record: &Record, point: &Point) -> bool {
    let plain = |config: &PolicyConfig| {
        let mut config = config.clone();
        config.files().for_each(|file| *file = PathBuf::new());
        config.heads = None;
        config
    };
    let Settings::Config(config) = &record.policy else {
        return false;
    };
    (
        &record.label,
        record.store,
        record.length,
        record.seed,
        record.query_aware,
    ) == (
        &point.label,
        point.store,
        point.length,
        point.seed,
        point.query_aware,
    ) && plain(config) == plain(&point.config)
}

/// Where files lie on the first machine, by what is in them: results of one file are one row of a table, wherever
/// it was.
#[derive(Debug, Default)]
struct Paths {
    by_content: HashMap<String, PathBuf>,
    tasks: Option<PathBuf>,
}

impl Paths {
    fn same(&mut self, record: &mut Record) {
        if let Settings::Config(config) = &mut record.policy {
            let table = match &mut config.table {
                Some(TableConfig::File(path)) => Some(path),
                _ => None,
            };
            let pairs = [
                (&record.heads_sha256, config.heads.as_mut()),
                (&record.table_sha256, table),
            ];
            for (hash, path) in pairs {
                if let (Some(hash), Some(path)) = (hash, path) {
                    *path = (self.by_content.entry(hash.clone()))
                        .or_insert_with(|| path.clone())
                        .clone();
                }
            }
        }
        if let Some(path) = &mut record.tasks_file {
            *path = self.tasks.get_or_insert_with(|| path.clone()).clone();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::journal::tests::records, *};
    use crate::tasks::{Query, Task};

    const GRID: &str = r#"
        budgets = [128, 256]
        [[policies]]
        policy = "full"
        [[policies]]
        policy = "window"
    "#;

    fn set() -> TaskSet {
        let task = |task: &str, id: &str| Task {
            id: id.into(),
            task: task.into(),
            context: "some text".into(),
            queries: vec![Query::exact("what?", " this")],
        };
        TaskSet {
            length: 2000,
            seed: 1,
            ..TaskSet::of(vec![
                task("facts", "facts-true"),
                task("facts", "facts-false"),
            ])
        }
    }

    fn write(folder: &Path, change: impl Fn(&mut Run), records: &[Record]) {
        let grid = Grid::from_toml(GRID).unwrap();
        let origin = records[0].origin.clone();
        let mut run = Run::new(&grid, &[], &[set()], origin, 500).unwrap();
        assert_eq!(run.cases, 6);
        change(&mut run);
        run.write(folder).unwrap();
        let mut journal = Journal::open(&folder.join(RESULTS)).unwrap();
        for record in records {
            journal.add(record).unwrap();
        }
    }

    #[test]
    fn parts_are_joined_in_the_order_of_the_grid() {
        let dir = tempfile::tempdir().unwrap();
        let grid = Grid::from_toml(GRID).unwrap();
        let all: Vec<Record> = records()
            .into_iter()
            .filter(|r| r.case.task == "facts")
            .collect();
        let [a, b, c] = ["a", "b", "c"].map(|name| dir.path().join(name));
        // The later part first, and one case twice.
        write(&a, |run| run.shard = Shard::new(2, 2).unwrap(), &all[2..]);
        write(&b, |run| run.shard = Shard::new(1, 2).unwrap(), &all[..3]);
        let merged = merge(&grid, &[a.clone(), b.clone()]).unwrap();
        assert_eq!(merged.missing, 2);
        assert_eq!(merged.records[0], all[0]);
        assert_eq!(merged.records.last(), all.last());
        assert_eq!(merged.records.len(), all.len());
        assert!(merged.run.shard.is_whole());
        merged.write(&c).unwrap();
        let again = merge(&grid, std::slice::from_ref(&c)).unwrap();
        assert_eq!((again.records, again.run), (merged.records, merged.run));

        // Of another model, version, revision, grid, or other data.
        type Change = fn(&mut Run);
        let changes: [(&str, Change); 5] = [
            ("another model", |run| run.origin.model = "n".into()),
            ("another version", |run| {
                run.origin.version = Some("0".into())
            }),
            ("another revision", |run| {
                run.origin.git = Some("abc".into())
            }),
            ("other data", |run| run.data_sha256 = "0".into()),
            ("another grid", |run| run.grid = Value::Null),
        ];
        for (what, change) in changes {
            write(&b, change, &all[..1]);
            let error = merge(&grid, &[a.clone(), b.clone()]).unwrap_err();
            assert!(
                matches!(&error, Error::Usage(text) if text.contains(what)),
                "{error}"
            );
        }
        // But for heads that the grid leaves to a machine.
        let heads = |run: &mut Run| run.grid["policies"][1]["config"]["heads"] = "h.bin".into();
        let [f, g] = ["f", "g"].map(|name| dir.path().join(name));
        write(&f, heads, &all[..1]);
        let only = std::slice::from_ref(&f);
        assert_eq!(merge(&grid, only).unwrap().records, all[..1]);
        let named = format!("{GRID}heads = \"h.bin\"");
        assert!(merge(&Grid::from_toml(&named).unwrap(), only).is_ok());
        let named = format!("{GRID}heads = \"other.bin\"");
        let named = Grid::from_toml(&named).unwrap();
        assert!(matches!(merge(&named, only), Err(Error::Usage(_))));
        write(&g, |_| {}, &all[1..2]);
        assert!(matches!(merge(&grid, &[f, g]), Err(Error::Usage(_))));
        // And so is a single result, though the run says otherwise.
        let mut other = all[0].clone();
        other.origin.git = Some("abc".into());
        let d = dir.path().join("d");
        write(&d, |run| run.origin.git = None, &[other]);
        let mut run = Run::read(&d).unwrap();
        run.origin.git = None;
        run.write(&d).unwrap();
        assert!(matches!(
            merge(&grid, &[a.clone(), d]),
            Err(Error::Usage(_))
        ));
        // Of machines whose files lie elsewhere, results are of one policy.
        let with_heads = |at: &str| {
            let mut record = all[3].clone();
            record.heads_sha256 = Some("h".into());
            if let Settings::Config(config) = &mut record.policy {
                config.heads = Some(at.into());
            }
            record
        };
        let e = dir.path().join("e");
        write(
            &e,
            |_| {},
            &[
                with_heads("/here/h.safetensors"),
                with_heads("/there/h.safetensors"),
            ],
        );
        assert_eq!(
            merge(&grid, &[e]).unwrap().records,
            [with_heads("/here/h.safetensors")]
        );

        assert!(matches!(merge(&grid, &[]), Err(Error::Usage(_))));
        assert!(matches!(
            merge(&grid, &[dir.path().join("x")]),
            Err(Error::Read { .. })
        ));
        fs::write(a.join(RUN), "{}").unwrap();
        assert!(matches!(merge(&grid, &[a]), Err(Error::Format { .. })));
    }
}
