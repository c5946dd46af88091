//! Heads that are folded into a model's matrices, where they can be.

mod common;

use burn::tensor::Device;
use common::Numbers;
use locret_core::{
    Births, Budget, CacheOptions, CausalLm, Compute, Error, KvCachePolicy, ModelSpec, Pass,
    Prefill, Result, Rows, SequenceCache, Session,
    conformance::{RandomModel, small_spec},
};
use locret_policies::{HeadWeights, LayerHead, Locret, PolicyError, RetainingHeads};
use std::sync::Arc;

/// What an adapter says of its projections.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Says {
    All,
    /// Nothing of the second layer.
    Half,
    Nothing,
    /// A matrix of another shape.
    Wrong,
}

#[derive(Debug)]
struct Adapter(RandomModel, Says);

impl CausalLm for Adapter {
    fn spec(&self) -> &ModelSpec {
        self.0.spec()
    }

    fn compute(&self) -> &Arc<dyn Compute> {
        self.0.compute()
    }

    fn hidden(&self, ids: &[u32], pass: &mut Pass<'_>) -> Result<Rows> {
        self.0.hidden(ids, pass)
    }

    fn logits(&self, hidden: Rows) -> Result<Rows> {
        self.0.logits(hidden)
    }

    fn qkv_weight(&self, layer: usize) -> Result<Option<Vec<f32>>> {
        let own = self.0.qkv_weight(layer)?;
        Ok(match self.1 {
            Says::All => own,
            Says::Half => own.filter(|_| layer == 0),
            Says::Nothing => None,
            Says::Wrong => own.map(|own| own[1..].to_vec()),
        })
    }
}

fn model(spec: ModelSpec, says: Says) -> Arc<Adapter> {
    let model = RandomModel::new(spec, 3, &Device::flex()).unwrap();
    Arc::new(Adapter(model, says))
}

fn weights(spec: &ModelSpec) -> HeadWeights {
    let mut numbers = Numbers(4);
    let layer = |l: usize| LayerHead {
        d_r: 20,
        fc1: numbers.list(20 * spec.layer(l).qkv_features(), 0.3),
        fc2: numbers.list(20 * spec.kv_heads, 0.3),
        ..LayerHead::default()
    };
    HeadWeights {
        layers: (0..spec.layers).map(layer).collect(),
        metadata: Default::default(),
        ..HeadWeights::default()
    }
}

/// Scores as units were born with them.
fn births(model: &Arc<Adapter>, heads: RetainingHeads) -> Vec<f32> {
    let policy = Locret::authors(heads, Budget::Units(20), 5);
    let mut session = Session::new(model.clone(), Arc::new(policy)).unwrap();
    let mut births = Births::default();
    let ids: Vec<u32> = (0..60).map(|i| (i * i + 3) % 61).collect();
    let prefill = Prefill::new(16, 4);
    session
        .prefill_watched(&ids, &prefill, &mut births)
        .unwrap();
    births.scores().concat().concat()
}

#[test]
fn folded_heads_give_the_same_scores_in_a_session() {
    let model = model(small_spec(6, 2, 16), Says::All);
    let weights = weights(model.spec());
    let plain = RetainingHeads::new(&weights, model.spec(), &**model.compute()).unwrap();
    let folded = RetainingHeads::for_model(&weights, &*model).unwrap();
    assert!(folded.folded() && !plain.folded());
    let needs =
        |heads: &RetainingHeads| Locret::authors(heads.clone(), Budget::Units(20), 0).needs();
    assert!(needs(&folded).input && !needs(&folded).qkv);
    assert!(needs(&plain).qkv && !needs(&plain).input);
    let (found, expected) = (births(&model, folded), births(&model, plain));
    assert_eq!(expected.len(), 2 * 2 * 60);
    for (a, b) in found.iter().zip(&expected) {
        assert!((a - b).abs() < 1e-5 * b.abs().max(1.0), "{a} and {b}");
    }
}

#[test]
fn heads_stay_as_they_are_where_folding_is_not_possible_or_does_not_pay() {
    for says in [Says::Half, Says::Nothing] {
        let model = model(small_spec(6, 2, 16), says);
        let heads = RetainingHeads::for_model(&weights(model.spec()), &*model).unwrap();
        assert!(!heads.folded(), "{says:?}");
        births(&model, heads);
    }
    // Queries, keys and values have no more features than what they are made from.
    let narrow = model(small_spec(1, 1, 8), Says::All);
    let heads = RetainingHeads::for_model(&weights(narrow.spec()), &*narrow).unwrap();
    assert!(!heads.folded());
}

#[test]
fn what_does_not_fit_is_an_error() {
    let wrong = model(small_spec(6, 2, 16), Says::Wrong);
    let own = weights(wrong.spec());
    let error = RetainingHeads::for_model(&own, &*wrong).unwrap_err();
    assert!(
        matches!(error, PolicyError::Core(Error::Shape { .. })),
        "{error}"
    );
    let other = weights(&small_spec(4, 2, 16));
    let error = RetainingHeads::for_model(&other, &*wrong).unwrap_err();
    assert!(matches!(error, PolicyError::Shape { .. }), "{error}");

    // An adapter that says nothing of the layer's input has no use for heads that read it.
    let model = model(small_spec(6, 2, 16), Says::All);
    let heads = RetainingHeads::for_model(&own, &*model).unwrap();
    assert!(heads.validate(model.spec()).is_ok());
    let mut wide = model.spec().clone();
    wide.hidden = 32;
    assert!(heads.validate(&wide).is_err());
    let policy: Arc<dyn KvCachePolicy> = Arc::new(Locret::authors(heads, Budget::Units(20), 0));
    let mut silent = model.spec().clone();
    silent.layer_input = false;
    let options = CacheOptions::default();
    let error = SequenceCache::new(&silent, policy, model.compute(), options).unwrap_err();
    assert!(matches!(error, Error::NotSupported { .. }), "{error}");
}
