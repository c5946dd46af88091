//! A policy written outside the crates, on a real model.
//!
//! ```text
//! cargo run --release --example custom_policy
//! ```

use locret_core::{
    Budget, Evict, Generate, LayerUnits, Prefill, Result as CoreResult, Scorer, Scores, Session,
    Step,
};
use locret_examples::{Result, args::ModelArgs, report};
use std::{process::ExitCode, sync::Arc};

/// Keeps units whose values are large for their keys: small keys attract attention (arXiv
/// 2406.11430), and attention to a large value changes the output most.
#[derive(Debug)]
struct ValueOverKey;

impl Scorer for ValueOverKey {
    fn name(&self) -> String {
        "value-over-key".into()
    }

    fn score(&self, _at: &Step, units: &LayerUnits<'_>) -> CoreResult<Scores> {
        units.score_heads(|head| {
            let norm = |x: burn::tensor::Tensor<2>| x.square().sum_dim(1).sqrt();
            Ok(norm(units.values(head)?) / norm(units.keys(head)?))
        })
    }
}

#[allow(dead_code, reason = "tests include this file and call run")]
fn main() -> ExitCode {
    locret_examples::run(|| run(&ModelArgs::default()))
}

/// The example.
pub fn run(model: &ModelArgs) -> Result<()> {
    let runtime = model.load()?;
    let policy = Evict::new(ValueOverKey, Budget::Units(128))
        .sinks(4)
        .recent(32);
    let mut session = Session::new(runtime.model(), Arc::new(policy))?;

    let lines = (1..=60).map(|i| format!("Line {i}: the visitor signed the book and went on.\n"));
    let prompt = format!(
        "{}\nThe next line says: Line 61:",
        lines.collect::<String>()
    );
    let prefill = Prefill {
        chunk: 128,
        local: 32,
    };
    session.prefill(&runtime.encode(&prompt)?, &prefill)?;
    let ids = session
        .generate(Generate::greedy(12))?
        .collect::<CoreResult<Vec<u32>>>()?;
    println!("… Line 61:{}", runtime.tokenizer()?.decode(&ids, true));
    println!("\n{}", report::session(&session));
    Ok(())
}
