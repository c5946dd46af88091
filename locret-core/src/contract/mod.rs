//! What a policy, a model and the engine promise each other.

mod budget;
mod error;
mod evict;
mod model;
mod policy;
mod ranking;
mod share;
mod spec;
mod units;

pub use budget::{Budget, DecodeEviction, Guard};
pub use error::{Error, Result, SnapshotError};
pub use evict::Evict;
pub use model::CausalLm;
pub use policy::{
    Held, Keep, KvCachePolicy, Needs, Observation, Observe, Phase, Positions, Queries, Scorer,
    Step, Verdict, Visible,
};
pub use ranking::{Best, Ranking};
pub use share::{BudgetTable, Share};
pub use spec::{LayerSpec, ModelSpec, PastContext};
pub(crate) use units::HeadMeta;
pub use units::{LayerUnits, Observed, Part, Qkv, Scores, Selection, Survey};
