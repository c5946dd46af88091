//! Runs candidates on tasks.

use super::{Grid, Journal, Origin, Own, Point, Record, Shard, Store};
use crate::{
    Error, Result,
    evaluate::{Encode, Event, QueryAware, Reader},
    files::file_sha256,
    tasks::Task,
};
use locret_core::{Budget, CacheOptions, CausalLm, KvCachePolicy, Positions, Prefill};
use locret_policies::{PolicyConfig, TableConfig};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{path::PathBuf, sync::Arc};

/// A policy that is compared with others.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Candidate {
    /// What tables say.
    pub label: String,
    /// The policy.
    pub policy: Arc<dyn KvCachePolicy>,
    /// What tells its results from those of others.
    pub settings: Settings,
    /// How keys and values are kept. Whether as integers is the policy's own affair
    /// ([`Quantized`](locret_policies::Quantized)); the name is for tables then.
    pub store: Store,
    /// SHA-256 of the retaining heads, where the policy has any.
    pub heads_sha256: Option<String>,
    /// Locret-Q: how many of a query's last tokens stand before its context; 0 for none.
    pub query_aware: usize,
    /// SHA-256 of the table of budgets, where the policy has one.
    pub table_sha256: Option<String>,
}

impl Candidate {
    /// Any policy. `settings` are whatever its results depend on: those of a [`Journal`] are taken
    /// over where its name and settings are the same. Tables show a `budget` among them, a number of
    /// units or a [`Budget`].
    ///
    /// Keys and values are kept in 32 bits.
    pub fn new(label: impl Into<String>, policy: Arc<dyn KvCachePolicy>, settings: Value) -> Self {
        Self {
            label: label.into(),
            settings: Settings::Own {
                policy: policy.name(),
                positions: policy.positions(),
                settings,
            },
            policy,
            store: Store::F32,
            heads_sha256: None,
            query_aware: 0,
            table_sha256: None,
        }
    }

    /// A policy of `locret-policies` for `model`, called by its method's name. Keys and values are kept in
    /// 32 bits unless the policy does otherwise.
    ///
    /// # Errors
    /// As [`PolicyConfig::build_for`]; [`Error::Read`](crate::Error::Read) for its heads.
    pub fn configured(config: PolicyConfig, model: &dyn CausalLm) -> Result<Self> {
        Ok(Self {
            label: config.policy.name().into(),
            // Other heads by the same name are another policy.
            heads_sha256: config.heads.as_deref().map(file_sha256).transpose()?,
            table_sha256: (config.table.as_ref().and_then(TableConfig::file))
                .map(file_sha256)
                .transpose()?,
            policy: config.build_for(model)?,
            settings: Settings::Config(config),
            store: Store::F32,
            query_aware: 0,
        })
    }
}

/// What a candidate was run with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Settings {
    /// Of a policy of `locret-policies`.
    Config(PolicyConfig),
    /// Of any other.
    Own {
        /// Its name.
        policy: String,
        /// Its positions.
        positions: Positions,
        /// Whatever else its results depend on.
        settings: Value,
    },
}

impl Settings {
    /// What each KV head keeps, where that is said.
    pub fn budget(&self) -> Option<Budget> {
        match self {
            Self::Config(config) => config.budget,
            Self::Own { settings, .. } => {
                let budget = settings.get("budget")?;
                Some(Budget::deserialize(budget).ok()?)
            }
        }
    }

    /// The positions that attention used.
    pub fn positions(&self) -> Positions {
        match self {
            Self::Config(c) => c.positions.unwrap_or(c.policy.default_positions()),
            Self::Own { positions, .. } => *positions,
        }
    }

    /// Whether a policy was run with other positions than it was published with.
    pub fn moved(&self) -> bool {
        match self {
            Self::Config(config) => self.positions() != config.policy.default_positions(),
            Self::Own { .. } => false,
        }
    }
}

/// Tasks that all candidates are run on.
#[derive(Debug, Clone, Default)]
pub struct TaskSet {
    /// Tokens of a context; 0 for tasks that a grid did not make.
    pub length: usize,
    /// Seed of the tasks; 0 for tasks that a grid did not make.
    pub seed: u64,
    /// Whether texts are turns of a chat.
    pub chat: bool,
    /// The file that they are from.
    pub file: Option<PathBuf>,
    /// Tokens that every context begins with, before which nothing can stand: those of
    /// [`Frame::begin`](crate::tasks::Frame::begin).
    pub begin: usize,
    /// The tasks.
    pub tasks: Vec<Task>,
}

impl TaskSet {
    /// Tasks from anywhere.
    pub fn of(tasks: Vec<Task>) -> Self {
        Self {
            tasks,
            ..Self::default()
        }
    }
}

/// What candidates are compared on: a model, and how it reads.
#[derive(Debug, Clone)]
pub struct Ablation {
    /// The model.
    pub model: Arc<dyn CausalLm>,
    /// How contexts are read.
    pub prefill: Prefill,
    /// What results say of where they came about.
    pub origin: Origin,
}

impl Ablation {
    /// What reads the contexts of a set with a candidate's policy.
    pub fn reader(&self, candidate: &Candidate, set: &TaskSet) -> Reader {
        let aware = QueryAware {
            tokens: candidate.query_aware,
            after: set.begin,
        };
        Reader {
            model: self.model.clone(),
            policy: candidate.policy.clone(),
            cache: CacheOptions::new().dtype(candidate.store.dtype()),
            prefill: self.prefill,
            query_aware: (aware.tokens > 0).then_some(aware),
        }
    }

    /// The results of candidates, one after the other: those that `journal` has, and the others as
    /// they are run, each of which is added to it at once. `on_event` hears of every task.
    ///
    /// # Errors
    /// As [`Reader::run`] and [`Journal::add`].
    pub fn run(
        &self,
        candidates: &[Candidate],
        set: &TaskSet,
        encode: Encode<'_>,
        journal: &mut Journal,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<Vec<Record>> {
        self.run_some(candidates, set, &mut || true, encode, journal, on_event)
    }

    /// The same of those cases that `wanted` says yes to, which is asked about each in turn.
    fn run_some(
        &self,
        candidates: &[Candidate],
        set: &TaskSet,
        wanted: &mut dyn FnMut() -> bool,
        encode: Encode<'_>,
        journal: &mut Journal,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<Vec<Record>> {
        let mut records = Vec::with_capacity(candidates.len() * set.tasks.len());
        for candidate in candidates {
            let reader = self.reader(candidate, set);
            let policy = &candidate.label;
            for task in &set.tasks {
                if !wanted() {
                    continue;
                }
                on_event(Event::Next { policy, task });
                let mut record = self.record(candidate, set, task);
                match journal.get(&record.key()) {
                    Some(known) => {
                        record.case = known.case.clone();
                        record.origin = known.origin.clone();
                        on_event(Event::Known);
                    }
                    None => {
                        record.case = reader.run(task, encode, &mut |_| {})?;
                        journal.add(&record)?;
                        on_event(Event::Done);
                    }
                }
                records.push(record);
            }
        }
        Ok(records)
    }

    /// The results of a grid and of policies beside it, or of a part of them, on the grid's own [`TaskSet`]s.
    ///
    /// # Errors
    /// As [`Ablation::run`], [`Candidate::configured`] and [`Own::candidates`].
    #[expect(clippy::too_many_arguments, reason = "each is said once")]
    pub fn run_grid(
        &self,
        grid: &Grid,
        own: &[Own],
        sets: &[TaskSet],
        shard: Shard,
        encode: Encode<'_>,
        journal: &mut Journal,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<Vec<Record>> {
        let points = grid.points();
        for point in &points {
            // A policy that cannot be made should say so before hours are spent on others.
            point.candidate(&*self.model)?;
        }
        let others = others(grid, own)?;
        let dealt = shard.deal(cases(&points, others.len(), sets));
        let mut dealt = dealt.into_iter();
        let mut wanted = || dealt.next().unwrap_or(false);
        let mut records = Vec::new();
        for point in &points {
            let candidate = [point.candidate(&*self.model)?];
            for set in sets.iter().filter(|set| point.takes(set)) {
                let wanted = &mut wanted;
                let found = self.run_some(&candidate, set, wanted, encode, journal, on_event)?;
                records.extend(found);
            }
        }
        for candidate in &others {
            let candidate = std::slice::from_ref(candidate);
            for set in sets {
                let wanted = &mut wanted;
                let found = self.run_some(candidate, set, wanted, encode, journal, on_event)?;
                records.extend(found);
            }
        }
        Ok(records)
    }

    /// A case that has not been run.
    pub(crate) fn record(&self, candidate: &Candidate, set: &TaskSet, task: &Task) -> Record {
        Record {
            label: candidate.label.clone(),
            policy: candidate.settings.clone(),
            store: candidate.store,
            length: set.length,
            seed: set.seed,
            chunk: self.prefill.chunk,
            local: self.prefill.local,
            chat: set.chat,
            tasks_file: set.file.clone(),
            task_sha256: Some(task.sha256()),
            heads_sha256: candidate.heads_sha256.clone(),
            query_aware: candidate.query_aware,
            table_sha256: candidate.table_sha256.clone(),
            case: task.into(),
            origin: self.origin.clone(),
        }
    }
}

/// All candidates of policies beside a grid.
pub(super) fn others(grid: &Grid, own: &[Own]) -> Result<Vec<Candidate>> {
    let mut all = Vec::new();
    for (i, policy) in own.iter().enumerate() {
        let label = policy.label();
        if own[..i].iter().any(|before| before.label() == label) {
            return Err(Error::Usage(format!(
                "two policies of your own are called {label:?}"
            )));
        }
        all.extend(policy.candidates(grid)?);
    }
    Ok(all)
}

/// The cases of a grid's points on the sets that they take, and of as many others on all.
pub(super) fn cases(points: &[Point], others: usize, sets: &[TaskSet]) -> usize {
    let of = |set: &TaskSet| {
        let takers = points.iter().filter(|point| point.takes(set)).count();
        (takers + others) * set.tasks.len()
    };
    sets.iter().map(of).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ablation::{RESULTS, Run, markdown, merge, rows},
        random::{self, RandomWeights},
        tasks::Query,
    };
    use burn::tensor::Device;
    use locret_models::LoadOptions;
    use locret_policies::{KeyNorm, Method};
    use serde_json::json;

    #[test]
    fn settings_of_any_policy_are_told_apart_from_configurations() {
        let policy = Arc::new(KeyNorm::policy(Budget::Units(16)));
        let own = |settings| Candidate::new("mine", policy.clone(), settings).settings;
        let configured = PolicyConfig::new(Method::KeyNorm).budget(Budget::Units(16));
        let configured = Settings::Config(configured.positions(Positions::Compact));
        let shared = own(json!({ "budget": { "ratio": 0.25 } }));
        for settings in [&configured, &shared, &own(json!({})), &own(json!(null))] {
            let text = serde_json::to_string(settings).unwrap();
            assert_eq!(serde_json::from_str::<Settings>(&text).unwrap(), *settings);
        }
        assert_eq!(shared.budget(), Some(Budget::Ratio(0.25)));
        assert_eq!(own(json!({ "budget": 7 })).budget(), Some(Budget::Units(7)));
        assert_eq!(own(json!({ "budget": "much" })).budget(), None);
        assert!(configured.moved() && !shared.moved());
        assert_eq!(shared.positions(), Positions::Original);
    }

    #[test]
    fn any_policy_stands_beside_built_in_ones_and_is_run_once() {
        let config = random::tests::config(32, 256);
        let weights = RandomWeights::new(&config, 1);
        let options = LoadOptions::default();
        let model = random::decoder(&config, &weights, &options, &Device::flex()).unwrap();
        let ablation = Ablation {
            model: Arc::new(model),
            prefill: Prefill::new(16, 4),
            origin: Origin::here("random".into(), None),
        };
        let task = |id: &str| Task {
            id: id.into(),
            task: "letters".into(),
            context: "The quick brown fox jumps over the lazy dog. ".repeat(2),
            queries: vec![Query::exact("The", " quick")],
        };
        let dir = tempfile::tempdir().unwrap();
        let set = TaskSet::of(vec![task("a"), task("b")]);
        let encode = |text: &str| Ok(text.bytes().map(u32::from).collect());
        let units = Budget::Units(24);
        let policy = || Arc::new(KeyNorm::policy(units).recent(2));
        let built_in = |config| Candidate::configured(config, &*ablation.model).unwrap();
        let candidates = [
            built_in(PolicyConfig::new(Method::Full)),
            built_in(PolicyConfig::new(Method::Window).budget(units)),
            Candidate::new("mine", policy(), json!({ "budget": 24 })),
        ];
        let mut journal = Journal::default();
        let mut ran = |candidates: &[Candidate], set: &TaskSet| {
            let (mut known, mut done) = (0, 0);
            let records = ablation.run(candidates, set, &encode, &mut journal, &mut |e| match e {
                Event::Known => known += 1,
                Event::Done => done += 1,
                Event::Next { .. } => {}
            });
            (records.unwrap(), known, done)
        };
        let (records, known, done) = ran(&candidates, &set);
        assert_eq!((records.len(), known, done), (6, 0, 6));
        assert_eq!(ran(&candidates, &set), (records.clone(), 6, 0));
        // Other settings are another policy.
        let other = Candidate::new("mine", policy(), json!({ "budget": 24, "recent": 2 }));
        assert_eq!(ran(&[other], &set).2, 2);
        // Another question by an old name is another task, wherever it differs.
        for change in [
            (|t: &mut Task| t.context += "It sleeps.") as fn(&mut Task),
            |t| t.queries[0].query = "A".into(),
            |t| t.queries[0].answer = " lazy".into(),
            |t| t.task = "words".into(),
        ] {
            let mut edited = set.clone();
            change(&mut edited.tasks[1]);
            let (_, known, done) = ran(&candidates[..1], &edited);
            assert_eq!((known, done), (1, 1));
        }

        // With the question before its context it is another text, and another result.
        let aware = |tokens| Candidate {
            query_aware: tokens,
            ..candidates[0].clone()
        };
        let marked = TaskSet {
            begin: 1,
            ..set.clone()
        };
        let (found, known, done) = ran(&[aware(2)], &marked);
        assert_eq!((known, done), (0, 2));
        let mut by_hand = set.clone();
        for task in &mut by_hand.tasks {
            task.context.insert_str(1, "he");
        }
        let (due, ..) = ran(&candidates[..1], &by_hand);
        for (found, due) in found.iter().zip(&due) {
            assert_eq!(found.case.queries, due.case.queries);
            assert_eq!(found.case.peak_kv_bytes, due.case.peak_kv_bytes);
            assert_eq!((found.query_aware, due.query_aware), (2, 0));
        }
        assert_ne!(found[0].case.queries, records[0].case.queries);
        let text = serde_json::to_string(&found[0]).unwrap();
        assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), found[0]);

        // In a grid's table, with its budgets, and in its parts.
        let grid = "budgets = [24, 12]\ntasks = ['facts']\n[[policies]]\npolicy = 'full'\n";
        let grid = Grid::from_toml(grid).unwrap();
        let own = || Own::new("mine", move |budget| KeyNorm::policy(budget).recent(2));
        let set = TaskSet {
            length: grid.lengths[0],
            seed: grid.seeds[0],
            ..set
        };
        let sets = std::slice::from_ref(&set);
        // Times are those of the first run.
        let mut once = Journal::default();
        let mut in_grid = |shard: Shard, own: &[Own]| {
            let journal = &mut once;
            ablation.run_grid(&grid, own, sets, shard, &encode, journal, &mut |_| {})
        };
        let whole = in_grid(Shard::whole(), &[own()]).unwrap();
        let labels: Vec<&str> = whole.iter().map(|r| r.label.as_str()).collect();
        assert_eq!(labels, ["full", "full", "mine", "mine", "mine", "mine"]);
        let run = Run::new(&grid, &[own()], sets, ablation.origin.clone(), 1).unwrap();
        assert_eq!((run.cases, &*run.own), (6, &["mine".to_owned()][..]));
        let mut parts = Vec::new();
        for index in [2, 1] {
            let shard = Shard::new(index, 2).unwrap();
            let records = in_grid(shard, &[own()]).unwrap();
            let folder = dir.path().join(shard.folder());
            std::fs::create_dir(&folder).unwrap();
            run.clone().part(shard).write(&folder).unwrap();
            let mut journal = Journal::open(&folder.join(RESULTS)).unwrap();
            for record in &records {
                journal.add(record).unwrap();
            }
            parts.push(folder);
        }
        let joined = merge(&grid, &parts).unwrap();
        assert_eq!((joined.missing, joined.records), (0, whole));
        let codes = "stores = ['q4']\n[[policies]]\npolicy = 'full'\n";
        let refused = own().candidates(&Grid::from_toml(codes).unwrap());
        assert!(matches!(refused, Err(Error::Usage(_))), "{refused:?}");
        for own in [vec![own(), own()], vec![Own::new("full", KeyNorm::policy)]] {
            let refused = in_grid(Shard::whole(), &own);
            assert!(matches!(refused, Err(Error::Usage(_))), "{refused:?}");
        }

        let kept: Vec<f64> = rows(&records, 1).iter().map(|r| r.kept).collect();
        assert!(kept[1] < kept[0] / 2.0 && kept[2] == kept[1], "{kept:?}");
        let table = markdown(&rows(&records, 1));
        let mine = table.lines().find(|l| l.starts_with("| mine")).unwrap();
        assert!(
            mine.contains("| original") && mine.contains(" 24 |"),
            "{table}"
        );
    }
}
