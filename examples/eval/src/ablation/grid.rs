//! What is compared, as a file.

use super::{Candidate, TaskSet};
use crate::{
    Error, Result,
    tasks::{self, Count, Frame, Kind, Recipe, Texts},
};
use locret_core::{Budget, CausalLm, DType, Positions, Prefill, Quantization};
use locret_policies::PolicyConfig;
use serde::{Deserialize, Deserializer, Serialize, de};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// What is compared: a TOML file.
///
/// ```
/// use locret_eval::ablation::Grid;
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
/// # Ok::<(), locret_eval::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grid {
    /// Built-in tasks; [`Kind::DEFAULT`] by default. `ruler` stands for all of RULER's.
    #[serde(default = "all_kinds", deserialize_with = "kinds")]
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
    pub budgets: Vec<Budget>,
    /// How keys and values are kept: f32, f16, bf16, q8, q4, q3, q2.
    #[serde(default = "default_stores")]
    pub stores: Vec<Store>,
    /// First units that stay under every policy that evicts and does not say so itself; by default what each
    /// was published with. Policies are compared at equal protection where this, `recent` and `stabilizers`
    /// are set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sinks: Option<usize>,
    /// Newest units that stay, likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recent: Option<usize>,
    /// Newest units that stay while further chunks follow, likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stabilizers: Option<usize>,
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

fn kinds<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Kind>, D::Error> {
    let names = Vec::<String>::deserialize(from)?;
    let kinds = names.iter().map(|name| Kind::named(name));
    let kinds: Result<Vec<Vec<Kind>>> = kinds.collect();
    kinds.map(|kinds| kinds.concat()).map_err(de::Error::custom)
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
fn default_budgets() -> Vec<Budget> {
    vec![Budget::Units(256)]
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
    /// Integers of 3 bits.
    Q3,
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
            Self::Q3 => "q3",
            Self::Q2 => "q2",
        }
    }

    /// The type of dense values; quantised stores have none.
    pub fn dtype(self) -> DType {
        match self {
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
            _ => DType::F32,
        }
    }

    pub(super) fn quantization(self) -> Option<Quantization> {
        let bits = match self {
            Self::Q8 => 8,
            Self::Q4 => 4,
            Self::Q3 => 3,
            Self::Q2 => 2,
            _ => return None,
        };
        Some(Quantization::bits(bits))
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
    pub budgets: Option<Vec<Budget>>,
    /// Instead of the grid's.
    pub stores: Option<Vec<Store>>,
    /// Locret-Q: how many of a query's last tokens stand before its context.
    pub query_aware: usize,
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
        let query_aware = take(&mut table, "query_aware")?;
        let config: PolicyConfig = table.try_into().map_err(|e| e.to_string())?;
        Ok(Self {
            label: label.unwrap_or_else(|| config.policy.name().to_owned()),
            budgets,
            stores,
            query_aware: query_aware.unwrap_or(0),
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
    /// Locret-Q: how many of a query's last tokens stand before its context.
    pub query_aware: usize,
}

impl Point {
    /// The policy, made for `model`.
    ///
    /// # Errors
    /// As [`Candidate::configured`].
    pub fn candidate(&self, model: &dyn CausalLm) -> Result<Candidate> {
        let made = Candidate::configured(self.config.clone(), model)?;
        Ok(Candidate {
            label: self.label.clone(),
            store: self.store,
            query_aware: self.query_aware,
            ..made
        })
    }

    /// Whether these are the tasks that it is run on.
    pub fn takes(&self, set: &TaskSet) -> bool {
        (self.length, self.seed) == (set.length, set.seed)
    }
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

    /// From a file. Relative paths in it count from the file's folder.
    ///
    /// # Errors
    /// [`Error::Read`]; [`Error::Format`] that says what is wrong, and where.
    pub fn load(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(|e| Error::read(path, e))?;
        let mut grid = Self::from_toml(&text).map_err(|e| Error::format(path, e))?;
        if let Some(folder) = path.parent() {
            let entries = grid.policies.iter_mut();
            let paths = entries.flat_map(|entry| entry.config.files());
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

    /// The settings that contexts are read with.
    pub fn prefill(&self) -> Prefill {
        Prefill::new(self.chunk, self.local)
    }

    /// The tasks of every length and seed, or those of the file. `texts` is asked where they are
    /// made, for the grid's kinds; `count` says how many tokens a text has.
    ///
    /// # Errors
    /// As [`tasks::read`] and [`Recipe::generate_from`], and those of `texts`.
    pub fn task_sets(
        &self,
        frame: &Frame,
        texts: &dyn Fn(&[Kind]) -> Result<Texts>,
        count: Count<'_>,
    ) -> Result<Vec<TaskSet>> {
        if let Some(file) = &self.tasks_file {
            return Ok(vec![TaskSet {
                chat: frame.is_chat,
                file: Some(file.clone()),
                begin: count(&frame.begin)?,
                ..TaskSet::of(tasks::read(file)?)
            }]);
        }
        let texts = texts(&self.tasks)?;
        let mut sets: Vec<TaskSet> = Vec::new();
        for length in &self.lengths {
            for seed in &self.seeds {
                if sets.iter().any(|s| (s.length, s.seed) == (*length, *seed)) {
                    continue;
                }
                let recipe = Recipe {
                    kinds: self.tasks.clone(),
                    tokens: *length,
                    samples: self.samples,
                    seed: *seed,
                };
                sets.push(TaskSet {
                    length: *length,
                    seed: *seed,
                    chat: frame.is_chat,
                    file: None,
                    begin: count(&frame.begin)?,
                    tasks: recipe.generate_from(frame, &texts, count)?,
                });
            }
        }
        Ok(sets)
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
                            query_aware: entry.query_aware,
                        });
                    }
                }
            }
        }
        all
    }

    fn variants(&self, entry: &Entry) -> Vec<(PolicyConfig, Store)> {
        let config = &entry.config;
        let keeps_all = !config.policy.takes_budget();
        let stay = !config.policy.evicts();
        let budgets: Vec<Option<Budget>> = match (&entry.budgets, config.budget) {
            _ if keeps_all => vec![None],
            (_, Some(budget)) => vec![Some(budget)],
            (Some(own), None) => own.iter().copied().map(Some).collect(),
            (None, None) => self.budgets.iter().copied().map(Some).collect(),
        };
        // Positions are the same while nothing is gone.
        let positions: Vec<Option<Positions>> = match config.positions {
            Some(own) => vec![Some(own)],
            None if stay => vec![None],
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
                    let mut config = config.clone();
                    if !keeps_all {
                        config.sinks = config.sinks.or(self.sinks);
                        config.recent = config.recent.or(self.recent);
                        config.stabilizers = config.stabilizers.or(self.stabilizers);
                    }
                    config.budget = *budget;
                    config.positions = *positions;
                    config.quantize = config.quantize.or(store.quantization());
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

#[cfg(test)]
mod tests {
    use super::*;

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
    fn protection_is_the_same_for_all_that_do_not_say_otherwise() {
        let grid = Grid::from_toml(
            r#"
            sinks = 4
            recent = 32
            stabilizers = 0
            tasks = ["ruler", "facts"]
            [[policies]]
            policy = "full"
            [[policies]]
            policy = "locret"
            [[policies]]
            policy = "h2o"
            recent = 64
            "#,
        );
        let grid = grid.unwrap();
        assert_eq!(grid.tasks.len(), 14);
        let guards: Vec<_> = (grid.points().iter())
            .map(|p| (p.config.sinks, p.config.recent, p.config.stabilizers))
            .collect();
        let own = (Some(4), Some(32), Some(0));
        assert_eq!(
            guards,
            [(None, None, None), own, (Some(4), Some(64), Some(0))]
        );
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
            (
                "tasks = [\"rulers\"]\n[[policies]]\npolicy = \"full\"",
                "rulers",
            ),
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
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../grids");
        let files = fs::read_dir(dir).unwrap().map(|f| f.unwrap().path());
        let sizes: Vec<usize> = files
            .map(|f| Grid::load(&f).unwrap().points().len())
            .collect();
        assert!(
            sizes.len() >= 2 && sizes.iter().all(|n| *n >= 5),
            "{sizes:?}"
        );
    }
}
