//! An HTTP server over a batch of bounded caches, with the interface that OpenAI's clients speak.
//!
//! Sequences are promised their memory before they begin ([`locret_core::Batcher`]), so that a server
//! with a cap keeps it whoever comes: what does not fit waits, and what will never fit is told so.
//!
//! | | |
//! |---|---|
//! | [`server`] | addresses, connections, the end |
//! | [`App`] | what all requests share |
//! | [`sequence`] | one sequence, from tokens to text |
//! | [`stops`] | texts that end an answer |
#![deny(missing_docs)]

mod answer;
mod app;
mod args;
mod ask;
mod body;
mod error;
mod job;
mod load;
mod metrics;
mod policies;
mod read;
pub mod sequence;
pub mod server;
pub mod stops;

pub use app::{App, Served};
pub use args::{Args, Settings};
pub use body::whole;
pub use error::{Error, Result};
