//! Evaluation tasks: contexts, and questions with known answers.
//!
//! A task is one object a line of a JSON lines file ([`read`], [`write`](fn@write)), or comes from a seeded
//! generator ([`Recipe`]).

mod drawn;
mod file;
mod frame;
mod generate;
mod judge;
mod kind;
mod published;
mod ruler;
pub mod words;

pub use file::{read, write};
pub use frame::Frame;
pub use generate::{Count, Recipe, Texts};
pub use judge::{Judge, Rule};
pub use kind::Kind;
pub use published::{Benchmark, Prompts, Reading, Scorer};
pub use ruler::Ruler;

use crate::files::sha256;
use serde::{Deserialize, Serialize};

/// A context, and what is asked about it.
///
/// Context, query and answer are tokenised apart, control tokens in them are taken as control
/// tokens, and nothing is added: the text is all there is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// Tells this task from the others of a file.
    pub id: String,
    /// What kind of task it is; results are gathered by it.
    pub task: String,
    /// What is read before any query.
    pub context: String,
    /// Each is answered on its own, after the context.
    pub queries: Vec<Query>,
}

/// A question and the answer that is expected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Query {
    /// What follows the context; empty where the answer is the text's own continuation.
    pub query: String,
    /// What the model should go on with.
    pub answer: String,
    /// How what it generates is judged; by default it has to be the answer, token for token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub judge: Option<Judge>,
}

impl Query {
    /// A question whose answer has to come token for token.
    pub fn exact(query: impl Into<String>, answer: impl Into<String>) -> Self {
        Self {
            query: query.into(),
            answer: answer.into(),
            judge: None,
        }
    }
}

impl Task {
    /// Whether the task measures how well a text is predicted and asks nothing.
    pub fn is_continuation(&self) -> bool {
        self.queries.iter().all(|q| q.query.is_empty())
    }

    /// SHA-256 of all that is asked, in hexadecimal: tasks by one name in two files, or before and after
    /// a file was edited, are not one task.
    pub fn sha256(&self) -> String {
        // Strings cannot fail to become JSON.
        sha256(&serde_json::to_vec(self).unwrap_or_default())
    }
}
