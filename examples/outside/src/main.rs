//! A policy of one's own in the table of a grid, beside the field.

use burn::tensor::Tensor;
use clap::Parser;
use locret_core::{Evict, LayerUnits, Result, Scorer, Scores, Step};
use locret_eval::ablation::Own;
use locret_examples::cli::ablation;
use std::process::ExitCode;

/// Keeps units whose values are large for their keys.
#[derive(Debug)]
struct ValueOverKey;

impl Scorer for ValueOverKey {
    fn name(&self) -> String {
        "value-over-key".into()
    }

    fn score(&self, _at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        let norm = |x: Tensor<2>| x.square().sum_dim(1).sqrt();
        units.score_heads(|head| {
            let (keys, values) = (units.keys(head)?, units.values(head)?);
            Ok(norm(values.into_tensor()) / norm(keys.into_tensor()))
        })
    }
}

fn main() -> ExitCode {
    let mine = Own::new("mine", |budget| {
        Evict::new(ValueOverKey, budget).sinks(4).recent(32)
    });
    locret_examples::run(|| ablation::run_with(&ablation::Args::parse(), &[mine]))
}
