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
#[cfg(feature = "s3")]
pub mod objects;
mod policies;
mod read;
pub mod sequence;
pub mod server;
mod sessions;
pub mod stops;
pub mod store;

pub use app::{App, Places, Served};
pub use args::{Args, Settings};
pub use error::{Error, Result};
