//! The examples that are longer than a screen: flags, and what is done with them.

pub mod ablation;
pub mod benchmarks;
pub mod budget_table;
pub mod evaluate;
pub mod generate;
pub mod long_shapes;
pub mod oracle;
pub mod plan;
pub mod q_filters;
pub mod quickstart;
pub mod rank_heads;
pub mod search_patterns;
pub mod soak;
pub mod trace;
pub mod train_heads;
