//! What layers and heads keep where all share one budget: a table for budgets that are fixed.

use crate::{Error, Result};
use locret_core::{BudgetTable, CacheOptions, CausalLm, KvCachePolicy, Prefill, Session};
use std::sync::Arc;

/// Reads texts under a policy and takes the mean of what each head of each layer kept, as a share of what its
/// text left in all of them. `on_text` hears of each text's end.
///
/// # Errors
/// The engine's; [`Error::Usage`] without texts.
pub fn measured(
    model: &Arc<dyn CausalLm>,
    policy: &Arc<dyn KvCachePolicy>,
    prefill: &Prefill,
    texts: &[Vec<u32>],
    on_text: &mut dyn FnMut(),
) -> Result<BudgetTable> {
    if texts.is_empty() {
        return Err(Error::Usage("a table of budgets takes texts".into()));
    }
    let (layers, heads) = (model.spec().layers, model.spec().kv_heads);
    let mut shares = vec![vec![0.0; heads]; layers];
    for text in texts {
        let options = CacheOptions::default();
        let mut session = Session::with_options(model.clone(), policy.clone(), options)?;
        session.prefill(text, prefill)?;
        let cache = session.cache();
        let all = cache.units() as f64;
        for (layer, shares) in shares.iter_mut().enumerate() {
            for (head, share) in shares.iter_mut().enumerate() {
                *share += cache.len(layer, head) as f64 / all;
            }
        }
        on_text();
    }
    // As multiples of what a head has on average.
    let scale = (layers * heads) as f64 / texts.len() as f64;
    let shares = shares.into_iter();
    let shares = shares.map(|row| row.into_iter().map(|share| share * scale).collect());
    Ok(BudgetTable::new(shares.collect())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{self, RandomWeights};
    use burn::tensor::Device;
    use locret_core::{Budget, Share};
    use locret_models::LoadOptions;
    use locret_policies::H2o;

    #[test]
    fn a_table_is_the_mean_of_what_was_kept() {
        let config = random::tests::config(32, 256);
        let weights = RandomWeights::new(&config, 1);
        let options = LoadOptions::default();
        let model = random::decoder(&config, &weights, &options, &Device::flex()).unwrap();
        let model: Arc<dyn CausalLm> = Arc::new(model);
        let texts: Vec<Vec<u32>> = (0..3).map(|i| random::tokens(90, 256, i)).collect();
        let policy = H2o::policy(Budget::Units(20)).share(Share::Model);
        let policy: Arc<dyn KvCachePolicy> = Arc::new(policy);
        let prefill = Prefill::new(16, 0);
        let mut read = 0;
        let table = measured(&model, &policy, &prefill, &texts, &mut || read += 1).unwrap();
        assert_eq!(read, 3);
        let all: f64 = table.shares().iter().flatten().sum();
        assert!((all - 4.0).abs() < 1e-9, "{table:?}");
        let kept = |text: &Vec<u32>| {
            let mut session = Session::new(model.clone(), policy.clone()).unwrap();
            session.prefill(text, &prefill).unwrap();
            session.cache().len(1, 1) as f64
        };
        let mean = texts.iter().map(kept).sum::<f64>() / 3.0;
        assert!((table.shares()[1][1] - mean / 20.0).abs() < 1e-9);
        assert!(measured(&model, &policy, &prefill, &[], &mut || ()).is_err());
    }
}
