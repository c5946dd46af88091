//! Policies set beside each other, so that a run can be interrupted, and summed up as tables and
//! pictures.
//!
//! What is compared are [`Candidate`]s: any policy, with a name and settings. A [`Grid`], which is a
//! TOML file, is one way to make them, of budgets, stores, positions, tasks, lengths and seeds.
//! An [`Ablation`] runs them on a [`TaskSet`], a [`Journal`] keeps every result, and [`rows`],
//! [`markdown`] and the charts sum them up. A policy that no configuration names can stand in a grid as [`Own`]. A grid may be cut into [`Shard`]s for several machines, whose results
//! [`merge`] joins; a [`Run`] says what results are of.
//!
//! ```
//! use locret_core::{Budget, CausalLm, Prefill};
//! use locret_eval::{
//!     Result,
//!     ablation::{Ablation, Candidate, Journal, Origin, TaskSet, markdown, rows},
//!     evaluate::Tokeniser,
//!     tasks::Task,
//! };
//! use locret_policies::{KeyNorm, Method, PolicyConfig};
//! use serde_json::json;
//! use std::sync::Arc;
//!
//! fn compare(
//!     model: Arc<dyn CausalLm>,
//!     encode: &dyn Tokeniser,
//!     tasks: Vec<Task>,
//! ) -> Result<String> {
//!     // Any `KvCachePolicy` can stand here; its settings are whatever its results depend on.
//!     let own = Arc::new(KeyNorm::policy(Budget::Units(128)).recent(16));
//!     let candidates = [
//!         Candidate::configured(PolicyConfig::new(Method::Full), &*model)?,
//!         Candidate::new("mine", own, json!({ "budget": 128, "recent": 16 })),
//!     ];
//!     let ablation = Ablation {
//!         model: model.clone(),
//!         prefill: Prefill::new(128, 32),
//!         origin: Origin::here("my model".into(), None),
//!     };
//!     let (set, mut journal) = (TaskSet::of(tasks), Journal::default());
//!     let records = ablation.run(&candidates, &set, encode, &mut journal, &mut |_| {})?;
//!     Ok(markdown(&rows(&records, model.spec().full_cache_bytes(1, 2))))
//! }
//! ```

mod grid;
mod journal;
mod merge;
mod own;
mod run;
mod shard;
mod summary;

pub use grid::{Entry, Grid, Place, Point, Store};
pub use journal::{Journal, Key, Origin, Record};
pub use merge::{Merged, RESULTS, RUN, Run, merge};
pub use own::Own;
pub use run::{Ablation, Candidate, Settings, TaskSet};
pub use shard::Shard;
pub use summary::{Row, markdown, memory_chart, pareto_charts, quality_chart, rows};
