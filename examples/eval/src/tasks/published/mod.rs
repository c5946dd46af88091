//! Tasks of published benchmarks from their own files, and their scorers.
//!
//! Nothing of them is here: neither data nor prompts, which are read from people's own copies ([`Prompts`]). What a
//! scorer says is what the authors' code says (`golden/scores.py`).

mod prompts;
mod read;
mod scores;
#[cfg(test)]
mod tests;
mod words;

pub use prompts::Prompts;
pub use read::{Benchmark, Reading};
pub use scores::Scorer;
