//! A grid of policies, budgets, stores, positions, tasks, lengths and seeds: run so that it can be
//! interrupted, and summed up as tables and pictures.

use crate::{
    Error, Result,
    evaluate::{Case, Results},
    pictures::{Chart, Scale, Series},
    report::{self, Table},
    tasks::Kind,
};
use locret_core::{Budget, KvDtype, Positions, Quantization};
use locret_policies::{Method, PolicyConfig};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
};

/// What is compared: a TOML file.
///
/// ```
/// use locret_examples::ablation::Grid;
///
/// let grid = Grid::from_toml(
///     r#"
///     lengths = [2000]
///     samples = 2
///     budgets = [128, 256]
///     tasks = ["passkey", "facts"]
///
///     [[policies]]
///     policy = "full"
///
///     [[policies]]
///     label = "StreamingLLM"
///     policy = "window"
///     budgets = [512]          # instead of the grid's
///     "#,
/// )?;
/// assert_eq!(grid.points().len(), 2);
/// # Ok::<(), locret_examples::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grid {
    /// Built-in tasks; [`Kind::DEFAULT`] by default.
    #[serde(default = "all_kinds")]
    pub tasks: Vec<Kind>,
    /// Tasks from a file instead; `tasks`, `lengths`, `samples` and `seeds` then say nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tasks_file: Option<PathBuf>,
    /// Tokens of a context.
    #[serde(default = "default_lengths")]
    pub lengths: Vec<usize>,
    /// Contexts of each task, length and seed.
    #[serde(default = "two")]
    pub samples: usize,
    /// Seeds of the tasks.
    #[serde(default = "default_seeds")]
    pub seeds: Vec<u64>,
    /// Units that every KV head keeps; a policy that keeps everything has none.
    #[serde(default = "default_budgets")]
    pub budgets: Vec<Budgeted>,
    /// How keys and values are kept: f32, f16, bf16, q8, q4, q2.
    #[serde(default = "default_stores")]
    pub stores: Vec<Store>,
    /// Positions; by default those that each policy was published with.
    #[serde(default = "default_positions")]
    pub positions: Vec<Place>,
    /// Tokens that are read together.
    #[serde(default = "default_chunk")]
    pub chunk: usize,
    /// Last tokens of a context that are not evicted.
    #[serde(default = "default_local")]
    pub local: usize,
    /// Whether contexts and questions are turns of a chat; else plain text. By default wherever
    /// the model has a chat template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat: Option<bool>,
    /// Labels of policies whose kept units are drawn for one prompt; all that evict by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub maps: Option<Vec<String>>,
    /// What is compared.
    pub policies: Vec<Entry>,
}

fn all_kinds() -> Vec<Kind> {
    Kind::DEFAULT.to_vec()
}
fn default_lengths() -> Vec<usize> {
    vec![2000]
}
fn two() -> usize {
    2
}
fn default_seeds() -> Vec<u64> {
    vec![1]
}
fn default_budgets() -> Vec<Budgeted> {
    vec![Budgeted(Budget::Units(256))]
}
fn default_stores() -> Vec<Store> {
    vec![Store::F32]
}
fn default_positions() -> Vec<Place> {
    vec![Place::Published]
}
fn default_chunk() -> usize {
    256
}
fn default_local() -> usize {
    32
}

/// How keys and values are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Store {
    /// 32-bit numbers.
    F32,
    /// IEEE half.
    F16,
    /// Brain float.
    Bf16,
    /// Integers of 8 bits.
    Q8,
    /// Integers of 4 bits.
    Q4,
    /// Integers of 2 bits.
    Q2,
}

impl Store {
    /// The name in files and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8 => "q8",
            Self::Q4 => "q4",
            Self::Q2 => "q2",
        }
    }

    /// The type of dense values; quantised stores have none.
    pub fn dtype(self) -> KvDtype {
        match self {
            Self::F16 => KvDtype::F16,
            Self::Bf16 => KvDtype::Bf16,
            _ => KvDtype::F32,
        }
    }

    fn quantization(self) -> Option<Quantization> {
        let bits = match self {
            Self::Q8 => 8,
            Self::Q4 => 4,
            Self::Q2 => 2,
            _ => return None,
        };
        Some(Quantization::bits(bits))
    }
}

/// A budget: a number of units, or `{ ratio = 0.125 }`, or `{ bytes = 4_000_000 }`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(from = "Units", into = "Budget")]
pub struct Budgeted(pub Budget);

#[derive(Deserialize)]
#[serde(untagged)]
enum Units {
    Plain(usize),
    Other(Budget),
}

impl From<Units> for Budgeted {
    fn from(units: Units) -> Self {
        match units {
            Units::Plain(n) => Self(Budget::Units(n)),
            Units::Other(budget) => Self(budget),
        }
    }
}

impl From<Budgeted> for Budget {
    fn from(budget: Budgeted) -> Self {
        budget.0
    }
}

/// Which positions a policy is run with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    /// Those that the policy was published with.
    Published,
    /// [`Positions::Original`]
    Original,
    /// [`Positions::Compact`]
    Compact,
}

/// A policy of a grid: its configuration, and what it is called and tried with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "toml::Table")]
pub struct Entry {
    /// What tables say; the policy's name by default.
    pub label: String,
    /// Instead of the grid's.
    pub budgets: Option<Vec<Budgeted>>,
    /// Instead of the grid's.
    pub stores: Option<Vec<Store>>,
    /// The policy. A budget or positions in it are instead of the grid's, too.
    pub config: PolicyConfig,
}

impl TryFrom<toml::Table> for Entry {
    type Error = String;

    fn try_from(mut table: toml::Table) -> Result<Self, String> {
        fn take<T: serde::de::DeserializeOwned>(
            table: &mut toml::Table,
            key: &str,
        ) -> Result<Option<T>, String> {
            let value = table.remove(key);
            let parsed = value.map(|v| v.try_into::<T>()).transpose();
            parsed.map_err(|e| format!("`{key}` of a policy: {e}"))
        }
        let label = take(&mut table, "label")?;
        let budgets = take(&mut table, "budgets")?;
        let stores = take(&mut table, "stores")?;
        let config: PolicyConfig = table.try_into().map_err(|e| e.to_string())?;
        Ok(Self {
            label: label.unwrap_or_else(|| config.policy.name().to_owned()),
            budgets,
            stores,
            config,
        })
    }
}

/// One policy with one budget, store, length and seed.
#[derive(Debug, Clone, PartialEq)]
pub struct Point {
    /// What tables say.
    pub label: String,
    /// The policy with its budget and positions.
    pub config: PolicyConfig,
    /// How keys and values are kept.
    pub store: Store,
    /// Tokens of a context; 0 for tasks of a file.
    pub length: usize,
    /// Seed of the tasks; 0 for tasks of a file.
    pub seed: u64,
}

impl Grid {
    /// From TOML.
    ///
    /// # Errors
    /// [`Error::Usage`] that says what is wrong, and where.
    pub fn from_toml(text: &str) -> Result<Self> {
        let grid: Self = toml::from_str(text).map_err(|e| Error::Usage(e.to_string()))?;
        grid.validate()?;
        Ok(grid)
    }

    /// From a file. Relative paths of heads and tasks count from the file's folder.
    ///
    /// # Errors
    /// [`Error::Read`]; [`Error::Format`] that says what is wrong, and where.
    pub fn load(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(|e| Error::read(path, e))?;
        let mut grid = Self::from_toml(&text).map_err(|e| Error::format(path, e))?;
        if let Some(folder) = path.parent() {
            let paths = grid
                .policies
                .iter_mut()
                .filter_map(|e| e.config.heads.as_mut());
            for file in paths.chain(&mut grid.tasks_file) {
                *file = folder.join(&*file);
            }
        }
        Ok(grid)
    }

    fn validate(&self) -> Result<()> {
        let empty = [
            ("tasks", self.tasks.is_empty()),
            ("lengths", self.lengths.is_empty()),
            ("seeds", self.seeds.is_empty()),
            ("budgets", self.budgets.is_empty()),
            ("stores", self.stores.is_empty()),
            ("positions", self.positions.is_empty()),
            ("policies", self.policies.is_empty()),
            ("samples", self.samples == 0),
        ];
        if let Some((name, _)) = empty.into_iter().find(|e| e.1) {
            return Err(Error::Usage(format!("`{name}` must not be empty")));
        }
        let labels: Vec<&str> = self.policies.iter().map(|e| e.label.as_str()).collect();
        for (i, label) in labels.iter().enumerate() {
            if labels[..i].contains(label) {
                return Err(Error::Usage(format!(
                    "two policies are called {label:?}: give them labels"
                )));
            }
        }
        let maps = self.maps.iter().flatten();
        if let Some(unknown) = maps.into_iter().find(|m| !labels.contains(&m.as_str())) {
            return Err(Error::Usage(format!(
                "`maps` names {unknown:?}, which no policy is called"
            )));
        }
        Ok(())
    }

    /// Everything that has to be run, the policies of one length and seed one after the other.
    pub fn points(&self) -> Vec<Point> {
        let (lengths, seeds) = match self.tasks_file {
            Some(_) => (vec![0], vec![0]),
            None => (self.lengths.clone(), self.seeds.clone()),
        };
        let mut all = Vec::new();
        for length in lengths {
            for seed in &seeds {
                for entry in &self.policies {
                    for (config, store) in self.variants(entry) {
                        all.push(Point {
                            label: entry.label.clone(),
                            config,
                            store,
                            length,
                            seed: *seed,
                        });
                    }
                }
            }
        }
        all
    }

    fn variants(&self, entry: &Entry) -> Vec<(PolicyConfig, Store)> {
        let config = &entry.config;
        let keeps_all = config.policy == Method::Full;
        let budgets: Vec<Option<Budget>> = match (&entry.budgets, config.budget) {
            _ if keeps_all => vec![None],
            (_, Some(budget)) => vec![Some(budget)],
            (Some(own), None) => own.iter().map(|b| Some(b.0)).collect(),
            (None, None) => self.budgets.iter().map(|b| Some(b.0)).collect(),
        };
        // Positions are the same while nothing is gone.
        let positions: Vec<Option<Positions>> = match config.positions {
            Some(own) => vec![Some(own)],
            None if keeps_all => vec![None],
            None => (self.positions.iter())
                .map(|place| match place {
                    Place::Published => None,
                    Place::Original => Some(Positions::Original),
                    Place::Compact => Some(Positions::Compact),
                })
                .collect(),
        };
        // A quantisation in the policy's own settings is a store of its own.
        let own = [Store::F32];
        let stores = match (&entry.stores, config.quantize) {
            (_, Some(_)) => &own[..],
            (Some(stores), None) => stores,
            (None, None) => &self.stores,
        };
        let mut all = Vec::new();
        for budget in &budgets {
            for positions in &positions {
                for store in stores {
                    let config = PolicyConfig {
                        budget: *budget,
                        positions: *positions,
                        quantize: config.quantize.or(store.quantization()),
                        ..config.clone()
                    };
                    // "published" and the same by name are one case.
                    let resolved =
                        |c: &PolicyConfig| c.positions.unwrap_or(c.policy.default_positions());
                    let twice = all.iter().any(|(c, s): &(PolicyConfig, Store)| {
                        c.budget == config.budget && s == store && resolved(c) == resolved(&config)
                    });
                    if !twice {
                        all.push((config, *store));
                    }
                }
            }
        }
        all
    }
}

/// Where and with what results came about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The model's name.
    pub model: String,
    /// SHA-256 of the model's weights, where they are one file.
    pub model_sha256: Option<String>,
    /// The revision of this repository, with `+` if files were changed.
    pub git: Option<String>,
    /// Operating system, processor and threads.
    pub machine: String,
}

impl Origin {
    /// Of this machine and this working tree.
    pub fn here(model: String, model_sha256: Option<String>) -> Self {
        let cpu = fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| {
            let line = text.lines().find(|l| l.starts_with("model name"))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        });
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            model,
            model_sha256,
            git: revision(),
            machine: format!(
                "{} {}, {}, {threads} threads",
                std::env::consts::OS,
                std::env::consts::ARCH,
                cpu.as_deref().unwrap_or("unknown processor")
            ),
        }
    }
}

fn revision() -> Option<String> {
    let git = |args: &[&str]| {
        let out = std::process::Command::new("git").args(args).output().ok()?;
        let text = String::from_utf8(out.stdout).ok()?;
        out.status.success().then(|| text.trim().to_owned())
    };
    let revision = git(&["rev-parse", "--short=12", "HEAD"])?;
    let changed = git(&["status", "--porcelain", "--untracked-files=no"])?;
    let mark = if changed.is_empty() { "" } else { "+" };
    Some(format!("{revision}{mark}"))
}

/// A line of the results.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// What the policy was called.
    pub label: String,
    /// The policy.
    pub policy: PolicyConfig,
    /// How keys and values are kept.
    pub store: Store,
    /// Tokens of a context.
    pub length: usize,
    /// Seed of the tasks.
    pub seed: u64,
    /// Tokens that were read together.
    pub chunk: usize,
    /// Last tokens of a context that were not evicted.
    pub local: usize,
    /// Whether texts were turns of a chat.
    pub chat: bool,
    /// The task file, where there is one.
    pub tasks_file: Option<PathBuf>,
    /// SHA-256 of the retaining heads, where the policy has any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heads_sha256: Option<String>,
    /// How the task went.
    pub case: Case,
    /// Where it ran.
    pub origin: Origin,
}

/// What makes two results the same: everything but the label and where they ran.
pub type Key = String;

impl Record {
    /// Tells this case from all others.
    pub fn key(&self) -> Key {
        let Self {
            policy,
            store,
            length,
            seed,
            chunk,
            local,
            chat,
            tasks_file,
            heads_sha256: heads,
            case,
            origin,
            ..
        } = self;
        let model = origin.model_sha256.as_ref().unwrap_or(&origin.model);
        let id = (&case.task, &case.id);
        let parts = (
            policy, store, length, seed, chunk, local, chat, tasks_file, id, model, heads,
        );
        // None of these types can fail to become JSON.
        serde_json::to_string(&parts).unwrap_or_default()
    }
}

/// Results in a file of JSON lines, to which each new one is appended at once.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    known: HashMap<Key, Record>,
}

impl Journal {
    /// Opens or makes the file. A last line that was cut off is dropped.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::Write`]; [`Error::Line`] for a complete line that is no result.
    pub fn open(path: &Path) -> Result<Self> {
        let mut text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(Error::read(path, e)),
        };
        let whole = text.rfind('\n').map_or(0, |i| i + 1);
        let cut = whole < text.len();
        text.truncate(whole);
        let mut known = HashMap::new();
        for (i, line) in text.lines().enumerate() {
            let record: Record = serde_json::from_str(line).map_err(|e| Error::Line {
                path: path.to_owned(),
                line: i + 1,
                message: e.to_string(),
            })?;
            known.insert(record.key(), record);
        }
        if cut || !path.exists() {
            crate::write_atomically(path, |out| out.write_all(text.as_bytes()))?;
        }
        let file = OpenOptions::new()
            .append(true)
            .open(path)
            .map_err(|e| Error::write(path, e))?;
        Ok(Self {
            path: path.to_owned(),
            file,
            known,
        })
    }

    /// The result of a case, if it has been run.
    pub fn get(&self, key: &Key) -> Option<&Record> {
        self.known.get(key)
    }

    /// Adds a result.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn add(&mut self, record: &Record) -> Result<()> {
        let line = serde_json::to_string(record).map_err(std::io::Error::from);
        line.and_then(|line| {
            self.file.write_all(format!("{line}\n").as_bytes())?;
            self.file.flush()
        })
        .map_err(|e| Error::write(&self.path, e))?;
        self.known.insert(record.key(), record.clone());
        Ok(())
    }
}

/// A policy with one budget, store and length, over all tasks and seeds.
#[derive(Debug, Clone)]
pub struct Row {
    /// What the policy is called.
    pub label: String,
    /// The policy.
    pub config: PolicyConfig,
    /// How keys and values are kept.
    pub store: Store,
    /// Tokens of a context.
    pub length: usize,
    /// Mean bytes of keys and values when a context that is asked about was read.
    pub kept: f64,
    /// `kept` as a share of a full cache of 16-bit values.
    pub share: f64,
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
        // The longest context shows the most.
        let longest = cases.iter().max_by_key(|c| c.context_tokens);
        let curve = longest.map(|c| &c.curve[..]).unwrap_or(&[]);
        Row {
            label: first.label.clone(),
            config: first.policy.clone(),
            store: first.store,
            length: first.length,
            kept,
            share: kept / (tokens * unit_bytes as f64).max(1.0),
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
        if let Some(positions) = self.config.positions
            && positions != self.config.policy.default_positions()
        {
            name += &format!(", {}", positions_name(positions));
        }
        if with_store {
            name += &format!(", {}", self.store.name());
        }
        name
    }

    fn budget(&self) -> String {
        match self.config.budget {
            None => "–".into(),
            Some(Budget::Units(n)) => n.to_string(),
            Some(Budget::Ratio(r)) => format!("{} %", r * 100.0),
            Some(Budget::Bytes(n)) => report::bytes(n),
        }
    }
}

fn positions_name(positions: Positions) -> &'static str {
    match positions {
        Positions::Original => "original",
        Positions::Compact => "compact",
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
        text += "\nExact match by task; `mean` is over the tasks with questions, its 95 % interval \
                 after Wilson over all their questions; `of full` is the share of a full 16-bit \
                 cache that was kept; tasks without questions show −ln p a token.\n\n";
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
        ">mean",
        "95 %",
    ];
    columns.extend(names.iter().map(String::as_str));
    let mut table = Table::new(&columns);
    for row in rows {
        let positions = row.config.positions;
        let mut cells = vec![
            row.label.clone(),
            positions_name(positions.unwrap_or(row.config.policy.default_positions())).into(),
            row.store.name().into(),
            row.budget(),
            report::bytes(row.kept.round() as usize),
            format!("{:.3}", row.share),
        ];
        match &row.results.mean {
            Some(mean) => {
                let right = (mean.exact * mean.n as f64).round() as usize;
                let (low, high) = report::wilson(right, mean.n);
                cells.push(format!("{:.3}", mean.exact));
                cells.push(format!("{low:.2}–{high:.2}"));
            }
            None => cells.extend(["–".into(), "–".into()]),
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
            }),
        }
    }
    series
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evaluate::Answered;

    const GRID: &str = r#"
        lengths = [1000, 2000]
        seeds = [1, 2]
        budgets = [128, 256, { ratio = 0.25 }]
        positions = ["published", "original", "compact"]
        stores = ["f32", "bf16"]

        [[policies]]
        policy = "full"

        [[policies]]
        label = "StreamingLLM"
        policy = "window"
        stores = ["f16"]

        [[policies]]
        policy = "key-norm"
        budget = 64
        positions = "compact"
    "#;

    #[test]
    fn a_grid_is_every_combination_once() {
        let grid = Grid::from_toml(GRID).unwrap();
        let points = grid.points();
        let count = |label: &str| points.iter().filter(|p| p.label == label).count();
        // Two lengths and two seeds; full has no budgets and positions but two stores; window is
        // published with compact positions, so that three names are two cases.
        assert_eq!(count("full"), 4 * 2);
        assert_eq!(count("StreamingLLM"), 4 * 3 * 2);
        assert_eq!(count("key-norm"), 4 * 2);
        let full = points.iter().find(|p| p.label == "full").unwrap();
        assert_eq!(
            (full.config.budget, full.length, full.seed),
            (None, 1000, 1)
        );
        let ratio = Some(Budget::Ratio(0.25));
        assert!(points.iter().any(|p| p.config.budget == ratio));
    }

    #[test]
    fn mistakes_in_a_grid_are_named() {
        let bad = [
            ("[[policies]]\npolicy = \"windows\"", "windows"),
            (
                "[[policies]]\npolicy = \"full\"\nbudgets = \"x\"",
                "`budgets` of a policy",
            ),
            ("[[policies]]\npolicy = \"full\"\nsinkz = 1", "sinkz"),
            ("policies = []", "`policies`"),
            ("samples = 0\n[[policies]]\npolicy = \"full\"", "`samples`"),
            ("budget = 3\n[[policies]]\npolicy = \"full\"", "budget"),
            ("maps = [\"x\"]\n[[policies]]\npolicy = \"full\"", "\"x\""),
            (
                "[[policies]]\npolicy = \"full\"\n[[policies]]\npolicy = \"full\"",
                "give them labels",
            ),
        ];
        for (text, expected) in bad {
            let error = Grid::from_toml(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("grid.toml");
        fs::write(&path, "policies = 3").unwrap();
        assert!(matches!(Grid::load(&path), Err(Error::Format { .. })));
        let text = "[[policies]]\npolicy = \"locret\"\nheads = \"h.bin\"";
        fs::write(&path, text).unwrap();
        let grid = Grid::load(&path).unwrap();
        assert_eq!(
            grid.policies[0].config.heads,
            Some(dir.path().join("h.bin"))
        );
    }

    #[test]
    fn the_grids_beside_the_examples_can_be_read() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("grids");
        let files = fs::read_dir(dir).unwrap().map(|f| f.unwrap().path());
        let sizes: Vec<usize> = files
            .map(|f| Grid::load(&f).unwrap().points().len())
            .collect();
        assert!(
            sizes.len() >= 2 && sizes.iter().all(|n| *n >= 5),
            "{sizes:?}"
        );
    }

    fn record(label: &str, budget: usize, task: &str, exact: bool, kept: usize) -> Record {
        let policy = match budget {
            0 => PolicyConfig::new(Method::Full),
            n => PolicyConfig::new(Method::Window).budget(Budget::Units(n)),
        };
        let right = if exact { 5 } else { 2 };
        Record {
            label: label.into(),
            policy,
            store: Store::F32,
            length: 2000,
            seed: 1,
            chunk: 256,
            local: 32,
            chat: false,
            tasks_file: None,
            heads_sha256: None,
            case: Case {
                id: format!("{task}-{exact}"),
                task: task.into(),
                continuation: task == "perplexity",
                context_tokens: 2000,
                queries: vec![Answered {
                    exact,
                    right,
                    tokens: 5,
                    nll: 2.5,
                }],
                peak_kv_bytes: kept + 1000,
                kept_kv_bytes: kept,
                curve: vec![(1000, kept), (2000, kept)],
                seconds: 1.0,
            },
            origin: Origin {
                model: "m".into(),
                model_sha256: None,
                git: None,
                machine: "x".into(),
            },
        }
    }

    fn records() -> Vec<Record> {
        vec![
            record("full", 0, "facts", true, 1_000_000),
            record("full", 0, "perplexity", false, 1_000_000),
            record("window", 128, "facts", false, 60_000),
            record("window", 128, "facts", true, 60_000),
            record("window", 256, "facts", true, 120_000),
        ]
    }

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
    }

    #[test]
    fn a_journal_survives_a_cut_line_and_ignores_labels() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("results.jsonl");
        let all = records();
        let mut journal = Journal::open(&path).unwrap();
        for record in &all {
            journal.add(record).unwrap();
        }
        drop(journal);
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), all.len());
        fs::write(&path, &text[..text.len() - 30]).unwrap();
        let mut journal = Journal::open(&path).unwrap();
        let (last, others) = all.split_last().unwrap();
        assert_eq!(journal.get(&last.key()), None);
        let mut renamed = others[0].clone();
        renamed.label = "everything".into();
        renamed.origin.git = Some("abc".into());
        assert!(journal.get(&renamed.key()).is_some());
        renamed.chunk = 128;
        assert!(journal.get(&renamed.key()).is_none());
        renamed.chunk = others[0].chunk;
        renamed.heads_sha256 = Some("other heads".into());
        assert!(journal.get(&renamed.key()).is_none());
        journal.add(last).unwrap();
        drop(journal);
        let journal = Journal::open(&path).unwrap();
        assert!(all.iter().all(|r| journal.get(&r.key()) == Some(r)));
        fs::write(&path, "{}\n").unwrap();
        assert!(matches!(
            Journal::open(&path),
            Err(Error::Line { line: 1, .. })
        ));
    }
}
