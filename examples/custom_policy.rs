//! A policy written outside the crates, in an ablation on a real model beside two that are built in.
//!
//! ```text
//! cargo run --release --example custom_policy
//! ```

use locret_core::{Budget, Evict, LayerUnits, Prefill, Result as CoreResult, Scorer, Scores, Step};
use locret_eval::ablation::{Ablation, Candidate, Journal, Origin, TaskSet, markdown, rows};
use locret_eval::tasks::{Kind, Recipe};
use locret_examples::{Result, args::ModelArgs, runtime};
use locret_policies::{Method, PolicyConfig};
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
            Ok(norm(units.values(head)?.into_tensor()) / norm(units.keys(head)?.into_tensor()))
        })
    }
}

fn main() -> ExitCode {
    locret_examples::run(|| {
        println!("{}", compare(&ModelArgs::default())?);
        Ok(())
    })
}

/// Asks all three for five facts from 900 tokens.
fn compare(args: &ModelArgs) -> Result<String> {
    let (runtime, essays) = (args.load()?, runtime::essays(&args.fetch())?);
    let model = runtime.model();
    let recipe = Recipe {
        kinds: vec![Kind::Facts],
        tokens: 900,
        samples: 1,
        seed: 1,
    };
    let tasks = recipe.generate(&runtime.frame(None)?, &essays, &|text| runtime.count(text))?;

    let units = Budget::Units(256);
    let own = Evict::new(ValueOverKey, units).sinks(4).recent(32);
    let candidates = [
        Candidate::configured(PolicyConfig::new(Method::Full), &*model)?,
        Candidate::configured(PolicyConfig::new(Method::Window).budget(units), &*model)?,
        Candidate::new("mine", Arc::new(own), serde_json::json!({ "budget": 256 })),
    ];
    let ablation = Ablation {
        prefill: Prefill::default(),
        origin: Origin::here(runtime.name.clone(), None),
        model: model.clone(),
    };
    let encode = |text: &str| runtime.encode(text);
    let (set, mut journal) = (TaskSet::of(tasks), Journal::default());
    let records = ablation.run(&candidates, &set, &encode, &mut journal, &mut |_| {})?;
    let full = model.spec().full_cache_bytes(1, 2);
    Ok(markdown(&rows(&records, full)))
}

#[test]
fn all_three_stand_in_one_table() {
    let table = compare(&ModelArgs::default()).unwrap();
    let rows = ["| full ", "| window ", "| mine "];
    assert!(rows.iter().all(|row| table.contains(row)), "{table}");
}
