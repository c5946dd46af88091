//! How well a policy does: what a model is asked, how it answers from a bounded cache, and what that
//! looks like as tables and pictures.
//!
//! - [`tasks`] are contexts and questions, of the texts in [`corpus`] or from a file;
//!   [`training_data`] is what retaining heads are trained on.
//! - [`evaluate`] runs tasks under one policy, [`ablation`] under many, and [`trace`] writes down what
//!   a policy kept.
//! - [`oracle`] runs labels as the scores that they are labels for: what scores could be worth.
//! - [`budget_table`] measures what layers and heads keep where all share one budget.
//! - [`patterns`] searches for what heads look at, and measures how much of it a policy shows them.
//! - [`soak`] runs long and looks for what grows or drifts.
//! - [`report`] and [`pictures`] show results. [`golden`], [`random`] and [`memory`] measure adapters,
//!   models of published dimensions, and the process.
//!
//! Nothing here reads a command line or prints; that is the examples' part.
#![deny(missing_docs)]

pub mod ablation;
pub mod budget_table;
pub mod corpus;
#[cfg(doctest)]
mod documents;
mod error;
pub mod evaluate;
pub mod files;
pub mod golden;
pub mod memory;
pub mod oracle;
pub mod patterns;
pub mod pictures;
pub mod random;
pub mod report;
pub mod soak;
pub mod tasks;
pub mod trace;
pub mod training_data;

pub use error::{Error, Result};
