//! What happens when a caller, a policy, a store or an adapter breaks its word: an error, never a
//! panic, and the conformance suite says which word it was.

use crate::{
    device, model,
    policies::{Chance, Everything, KeyNorm, Newest},
    session, spec, text,
};
use burn::tensor::Tensor;
use locret_core::{
    Budget, CacheOptions, CausalLm, Compute, DType, Decided, DecodeEviction, Dense, Error, Evict,
    Fold, Generate, Growth, Keep, KvCachePolicy, KvStore, KvTiles, LayerSpec, LayerUnits,
    ModelSpec, Needs, Observation, Pass, Phase, Placement, Positions, Prefill, Probe, Qkv, Queries,
    Result, Rows, Scorer, Scores, Selection, SequenceCache, Session, Step, TurnKeys, Verdict,
    compute,
    conformance::{
        AdapterCheck, ConformanceError, PolicyCheck, Promise, RandomModel, StoreCheck,
        check_adapter, check_policy, check_store,
    },
    forward, from_f32,
};
use std::{
    io::{Read, Take, Write},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

fn cache(policy: impl KvCachePolicy + 'static) -> SequenceCache {
    SequenceCache::new(
        &spec(),
        Arc::new(policy),
        &compute(&device()),
        CacheOptions::default(),
    )
    .unwrap()
}

fn rows(tokens: usize, width: usize) -> Rows {
    Rows::new(vec![0.1; tokens * width], width, &device()).unwrap()
}

/// Without what they are made from.
fn bare(tokens: usize) -> Qkv {
    let spec = spec();
    let [q, kv] = [spec.heads, spec.kv_heads].map(|heads| rows(tokens, heads * spec.head_dim));
    Qkv::new(q, kv.clone(), kv)
}

fn qkv(tokens: usize) -> Qkv {
    bare(tokens).made_from(rows(tokens, spec().hidden))
}

fn begin(cache: &mut SequenceCache, tokens: usize) -> Result<Pass<'_>> {
    let total = cache.seen() + tokens;
    Pass::new([cache.step(BODY, tokens, total)])
}

const BODY: Phase = Phase::Prefill { last: false };

#[test]
fn layers_are_due_once_and_in_order() {
    let due = |error: Error, at: [usize; 2]| match error {
        Error::LayerOrder {
            expected,
            found,
            layers: 2,
        } => assert_eq!([expected, found], at),
        other => panic!("{other}"),
    };
    let mut one = cache(Everything::default());
    let mut pass = begin(&mut one, 3).unwrap();
    due(pass.attend(1, qkv(3)).unwrap_err(), [0, 1]);
    pass.attend(0, qkv(3)).unwrap();
    due(pass.attend(0, qkv(3)).unwrap_err(), [1, 0]);
    pass.attend(1, qkv(3)).unwrap();
    due(pass.attend(2, qkv(3)).unwrap_err(), [2, 2]);
    pass.finish(None).unwrap();
    assert_eq!(one.seen(), 3);
    let mut pass = begin(&mut one, 3).unwrap();
    pass.attend(0, qkv(3)).unwrap();
    let missing = pass.finish(None).unwrap_err();
    assert_eq!(missing.to_string(), "1 of 2 layers were attended");
    assert!(matches!(begin(&mut one, 3), Err(Error::Unusable)));
}

#[test]
fn shapes_are_checked() {
    let good = qkv(3);
    let wide = |x: &Rows| Rows::from(Tensor::cat(vec![x.tensor(), x.tensor()], 1));
    let long = |x: &Rows| Rows::below(vec![x.clone(), x.clone()]).unwrap();
    let with = |change: fn(&mut Qkv, Rows), to: Rows| {
        let mut bad = good.clone();
        change(&mut bad, to);
        bad
    };
    for bad in [
        with(|qkv, x| qkv.q = x, wide(&good.q)),
        with(|qkv, x| qkv.k = x, wide(&good.k)),
        with(|qkv, x| qkv.v = x, wide(&good.v)),
        with(|qkv, x| qkv.k = x, long(&good.k)),
        with(|qkv, x| qkv.v = x, long(&good.v)),
        qkv(4),
        bare(3),
        bare(3).made_from(rows(3, 5)),
        bare(3).made_from(rows(2, spec().hidden)),
    ] {
        let mut cache = cache(Everything::default());
        let error = begin(&mut cache, 3).unwrap().attend(0, bad).unwrap_err();
        assert!(matches!(error, Error::Shape { .. }), "{error}");
        assert_eq!(cache.units(), 0);
    }
}

#[test]
fn a_pass_that_was_not_finished_makes_a_cache_unusable() {
    let mut one = cache(Everything::default());
    drop(begin(&mut one, 3).unwrap());
    assert!(matches!(begin(&mut one, 3), Err(Error::Unusable)));
    assert!(matches!(one.turn(6), Err(Error::Unusable)));
    assert!(matches!(one.fork(), Err(Error::Unusable)));
    let policy = Arc::new(Everything::default());
    assert!(matches!(one.set_policy(policy), Err(Error::Unusable)));
    // A pass that cannot be made leaves the others as they were.
    let mut other = cache(Everything::default());
    let both = [other.step(BODY, 3, 3), one.step(BODY, 3, 3)];
    assert!(matches!(Pass::new(both), Err(Error::Unusable)));
    other.turn(3).unwrap();
}

#[test]
fn steps_that_do_not_go_together_make_no_pass() {
    let setting = |pass: Result<Pass<'_>>| {
        assert!(matches!(pass, Err(Error::Setting { .. })), "{pass:?}");
    };
    setting(Pass::new([]));
    let (mut a, mut b) = (cache(Everything::default()), cache(Everything::default()));
    setting(Pass::new([a.step(BODY, 3, 3), b.step(Phase::Turn, 0, 3)]));
    setting(Pass::new([a.step(Phase::Turn, 1, 3)]));
    setting(Pass::new([a.step(BODY, 0, 3)]));
    let mut small = spec();
    small.layers = 1;
    let policy = Arc::new(Everything::default());
    let options = CacheOptions::default();
    let mut other = SequenceCache::new(&small, policy, &compute(&device()), options).unwrap();
    setting(Pass::new([a.step(BODY, 3, 3), other.step(BODY, 3, 3)]));
    let model = model();
    let mut pass = Pass::new([other.step(BODY, 3, 3)]).unwrap();
    let error = forward(&*model, &text(3), &mut pass).unwrap_err();
    assert!(matches!(error, Error::Setting { .. }), "{error}");
    let mut pass = Pass::new([a.step(BODY, 3, 3), b.step(BODY, 2, 2)]).unwrap();
    let error = forward(&*model, &text(4), &mut pass).unwrap_err();
    assert!(matches!(error, Error::Shape { .. }), "{error}");
    // Nothing was computed yet.
    forward(&*model, &text(5), &mut pass).unwrap();
    pass.finish(None).unwrap();
    assert_eq!((a.seen(), b.seen()), (3, 2));
}

/// Needs what the policy does not, or what is not to be had.
struct Needing(Needs, Vec<bool>);

impl Probe for Needing {
    fn needs(&self) -> Needs {
        self.0
    }

    fn decided(&mut self, at: &Decided<'_>) -> Result<()> {
        self.1
            .push(at.units.qkv().is_some() && at.units.observed().is_some());
        assert_eq!(at.step.incoming, at.units.incoming());
        assert_eq!(at.verdict, &Verdict::keep_all());
        Ok(())
    }
}

#[test]
fn a_probe_sees_what_it_needs_beside_the_policy() {
    let mut one = cache(Everything::default());
    let needs = Needs::NOTHING
        .qkv()
        .observe(Queries::All, Observation::Weights);
    let mut probe = Needing(needs, Vec::new());
    let mut pass = Pass::new([one.step(BODY, 3, 3).watched(&mut probe)]).unwrap();
    forward(&*model(), &text(3), &mut pass).unwrap();
    pass.finish(None).unwrap();
    assert_eq!(probe.1, [true, true]);
    let policy = Everything {
        needs: Needs::NOTHING.observe(Queries::Last(2), Observation::Weights),
        ..Everything::default()
    };
    let mut other = cache(policy);
    let mut at_once = cache(Everything {
        needs: Needs::NOTHING.all_layers(),
        ..Everything::default()
    });
    let surprisal = Needs::NOTHING.surprisal();
    for (cache, needs) in [
        (&mut one, surprisal),
        (&mut at_once, surprisal),
        (&mut other, needs),
    ] {
        let mut probe = Needing(needs, Vec::new());
        let pass = Pass::new([cache.step(BODY, 3, 9).watched(&mut probe)]);
        assert!(matches!(pass, Err(Error::Setting { .. })), "{pass:?}");
        cache.turn(9).unwrap();
    }
}

/// Keeps in each layer what all layers together are willing to.
#[derive(Debug)]
struct Shared;

impl KvCachePolicy for Shared {
    fn name(&self) -> String {
        "shared".into()
    }

    fn needs(&self) -> Needs {
        Needs::NOTHING.all_layers()
    }

    fn step(&self, _at: &Step, _units: &LayerUnits<'_>) -> Result<Verdict> {
        Err(Error::policy(self.name(), "layers are decided together"))
    }

    fn steps(&self, at: &[Step], units: &[LayerUnits<'_>]) -> Result<Vec<Verdict>> {
        assert_eq!(at.len(), spec().layers);
        let kept = |step: &Step| (0..=step.layer.index as u32).collect::<Vec<_>>();
        let each = at.iter().zip(units);
        each.map(|(step, units)| Verdict::keep(vec![kept(step); units.kv_heads()]))
            .collect()
    }
}

#[test]
fn a_policy_can_decide_on_all_layers_at_once() {
    let mut one = cache(Shared);
    let mut pass = begin(&mut one, 5).unwrap();
    forward(&*model(), &text(5), &mut pass).unwrap();
    pass.finish(None).unwrap();
    assert_eq!((one.len(0, 0), one.len(1, 1)), (1, 2));
    // All layers held the chunk.
    assert_eq!(one.peak().units, 2 * 2 * 5);
}

/// As [`Shared`], and fails.
#[derive(Debug)]
struct Quarrel;

impl KvCachePolicy for Quarrel {
    fn name(&self) -> String {
        "quarrel".into()
    }

    fn needs(&self) -> Needs {
        Needs::NOTHING.all_layers()
    }

    fn step(&self, at: &Step, _units: &LayerUnits<'_>) -> Result<Verdict> {
        Err(Error::policy(self.name(), format!("{:?}", at.phase)))
    }
}

#[test]
fn no_sequence_of_a_pass_goes_on_if_another_one_fails_at_its_end() {
    let mut caches = [cache(Everything::default()), cache(Quarrel)];
    let [first, second] = &mut caches;
    let mut pass = Pass::new([first.step(BODY, 2, 2), second.step(BODY, 2, 2)]).unwrap();
    forward(&*model(), &text(4), &mut pass).unwrap();
    assert!(matches!(pass.finish(None), Err(Error::Policy { .. })));
    for cache in &mut caches {
        assert_eq!(cache.seen(), 0);
        assert!(matches!(cache.turn(2), Err(Error::Unusable)));
    }
}

/// Fails in the first layer.
#[derive(Debug)]
struct Stubborn;

impl KvCachePolicy for Stubborn {
    fn name(&self) -> String {
        "stubborn".into()
    }

    fn step(&self, _at: &Step, _units: &LayerUnits<'_>) -> Result<Verdict> {
        Err(Error::policy(self.name(), "does not"))
    }
}

#[test]
fn an_error_that_an_adapter_swallows_still_ends_the_pass() {
    let mut one = cache(Stubborn);
    let mut pass = begin(&mut one, 3).unwrap();
    assert!(matches!(pass.attend(0, qkv(3)), Err(Error::Policy { .. })));
    assert!(matches!(pass.attend(1, qkv(3)), Err(Error::Unusable)));
    assert!(matches!(pass.finish(None), Err(Error::Unusable)));
    assert!(matches!(begin(&mut one, 3), Err(Error::Unusable)));
}

#[test]
fn a_policy_that_is_given_later_is_checked_before_it_decides() {
    let mut session = Session::new(model(), Arc::new(Everything::default())).unwrap();
    session.prefill(&text(20), &Prefill::new(8, 2)).unwrap();
    let policy = Evict::new(KeyNorm, Budget::Units(10)).while_decoding(DecodeEviction::Every(0));
    session.cache_mut().set_policy(Arc::new(policy)).unwrap();
    let refused = session.generate(Generate::greedy(2)).map(drop);
    assert!(matches!(refused, Err(Error::Setting { .. })), "{refused:?}");
    let policy = Evict::new(KeyNorm, Budget::Units(10)).while_decoding(DecodeEviction::Every(1));
    session.cache_mut().set_policy(Arc::new(policy)).unwrap();
    let made: Result<Vec<u32>> = session.generate(Generate::greedy(2)).unwrap().collect();
    assert_eq!(made.unwrap().len(), 2);
}

/// Notes the input that it is shown.
#[derive(Debug)]
struct Inputs {
    needs: Needs,
    seen: Mutex<Vec<Option<Vec<f32>>>>,
}

impl KvCachePolicy for Inputs {
    fn name(&self) -> String {
        "inputs".into()
    }

    fn needs(&self) -> Needs {
        self.needs
    }

    fn step(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Verdict> {
        let input = units.input().map(|x| {
            assert_eq!(x.shape(), [at.incoming, spec().hidden]);
            x.clone().into_values().unwrap()
        });
        self.seen.lock().unwrap().push(input);
        Ok(Verdict::keep_all())
    }
}

/// In host memory and as a tensor, at once and after the last layer; never unasked for.
#[test]
fn a_policy_sees_what_queries_are_made_from_if_it_asks() {
    let hidden = spec().hidden;
    let numbers = |layer: usize| -> Vec<f32> {
        (0..3 * hidden)
            .map(|i| (i * (layer + 2) % 13) as f32)
            .collect()
    };
    for asked in [true, false] {
        for surprisal in [true, false] {
            for host in [true, false] {
                let needs = if asked {
                    Needs::NOTHING.input()
                } else {
                    Needs::NOTHING
                };
                let policy = Arc::new(Inputs {
                    needs: if surprisal { needs.surprisal() } else { needs },
                    seen: Mutex::default(),
                });
                let compute = compute(&device());
                let options = CacheOptions::default();
                let mut cache =
                    SequenceCache::new(&spec(), policy.clone(), &compute, options).unwrap();
                let mut pass = begin(&mut cache, 3).unwrap();
                for layer in 0..2 {
                    let input = Rows::new(numbers(layer), hidden, &device()).unwrap();
                    let mut input = if host { input } else { input.tensor().into() };
                    pass.attend(layer, bare(3).made_from(input.clone()))
                        .unwrap();
                    // What the adapter does with its rows afterwards is its own business.
                    input.values_mut().unwrap().fill(0.0);
                }
                pass.finish(surprisal.then_some(&[1.0; 3])).unwrap();
                cache.turn(3).unwrap();
                let expected = (0..2).map(|layer| asked.then(|| numbers(layer)));
                let expected: Vec<_> = expected.chain([None, None]).collect();
                assert_eq!(
                    *policy.seen.lock().unwrap(),
                    expected,
                    "{asked} {surprisal} {host}"
                );
            }
        }
    }
}

#[test]
fn a_policy_that_needs_the_input_of_layers_is_refused_where_there_is_none() {
    let mut spec = spec();
    spec.layer_input = false;
    let needing = || {
        Arc::new(Everything {
            needs: Needs::NOTHING.input(),
            ..Everything::default()
        })
    };
    let compute = compute(&device());
    let options = CacheOptions::default();
    let refused = SequenceCache::new(&spec, needing(), &compute, options).map(drop);
    let plain = Arc::new(Everything::default());
    let mut cache = SequenceCache::new(&spec, plain, &compute, options).unwrap();
    for refused in [refused, cache.set_policy(needing())] {
        let error = refused.unwrap_err();
        assert!(matches!(error, Error::NotSupported { .. }), "{error}");
    }
    // Nor does it come unasked.
    let error = begin(&mut cache, 3).unwrap().attend(0, qkv(3)).unwrap_err();
    assert!(matches!(error, Error::Shape { .. }), "{error}");
}

#[test]
fn surprisal_has_to_come_where_it_is_needed() {
    for given in [None, Some(&[1.0, 2.0][..]), Some(&[f32::NAN, 1.0, 2.0])] {
        let mut cache = cache(Everything {
            needs: Needs::NOTHING.surprisal(),
            ..Everything::default()
        });
        let mut pass = begin(&mut cache, 3).unwrap();
        for layer in 0..2 {
            pass.attend(layer, qkv(3)).unwrap();
        }
        let what = "surprisal";
        match pass.finish(given) {
            Ok(()) => assert_eq!(given.map(<[f32]>::len), Some(3)),
            Err(Error::Shape { what: found, .. }) => assert_eq!(found, what),
            Err(other) => panic!("{other}"),
        }
        assert_eq!(
            cache.seen(),
            if given.is_some_and(|g| g.len() == 3) {
                3
            } else {
                0
            }
        );
    }
}

#[test]
fn impossible_models_have_no_cache() {
    let changes: [fn(&mut ModelSpec); 5] = [
        |spec| spec.layers = 0,
        |spec| spec.kv_heads = 4,
        |spec| spec.kv_heads = 0,
        |spec| spec.softmax_scale = f32::NAN,
        |spec| spec.head_dim = 7,
    ];
    for change in changes {
        let mut bad = spec();
        change(&mut bad);
        let policy = Arc::new(Everything::default());
        let options = CacheOptions::default();
        let error = SequenceCache::new(&bad, policy, &compute(&device()), options);
        assert!(matches!(error, Err(Error::Setting { .. })), "{bad:?}");
    }
}

/// Returns a verdict that was made elsewhere.
struct Says<F>(F);

impl<F> std::fmt::Debug for Says<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Says")
    }
}

impl<F: Fn(&Step, &LayerUnits<'_>) -> Result<Verdict> + Send + Sync> KvCachePolicy for Says<F> {
    fn name(&self) -> String {
        "says".into()
    }

    fn step(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Verdict> {
        (self.0)(at, units)
    }
}

fn mixed(folds: Vec<Vec<Fold>>) -> Result<Verdict> {
    Ok(Verdict {
        keep: Keep::Merged {
            kept: Selection::new(vec![vec![0]; 2])?,
            folds,
            keys: false,
        },
        ..Verdict::keep_all()
    })
}

#[test]
fn verdicts_that_do_not_fit_are_refused_and_end_the_sequence() {
    type Answer = fn() -> Result<Verdict>;
    let answers: [(&str, Answer); 10] = [
        ("a head too few", || Verdict::keep(vec![vec![0]])),
        ("a head too many", || Verdict::keep(vec![vec![0]; 3])),
        ("a unit that is not there", || {
            Verdict::keep(vec![vec![0], vec![20]])
        }),
        ("mixtures for a head too few", || mixed(vec![vec![]])),
        ("a mixture with what is not there", || {
            let fold = Fold {
                from: 20,
                into: 0,
                share: 0.5,
            };
            mixed(vec![vec![fold], vec![]])
        }),
        ("scores of a head too few", || {
            Ok(Verdict::keep_all().carrying(Scores::per_head(vec![vec![0.0; 20]])?))
        }),
        ("a score too few", || {
            Ok(Verdict::keep_all().carrying(Scores::shared(vec![0.0; 19], 2)?))
        }),
        ("two scores for each unit", || {
            Ok(Verdict::keep_all().carrying(Scores::wide(2, vec![vec![0.0; 40]; 2])?))
        }),
        ("notes of a layer that has none", || {
            Ok(Verdict::keep_all().noting(Some(vec![0.0])))
        }),
        ("a score that is none", || {
            Ok(Verdict::keep_all().carrying(Scores::shared(vec![f32::NAN; 20], 2)?))
        }),
    ];
    let model = model();
    for (what, answer) in answers {
        let mut session = session(&model, Says(move |_: &Step, _: &LayerUnits<'_>| answer()));
        let error = session.prefill(&text(20), &Prefill::default()).unwrap_err();
        assert!(
            matches!(
                error,
                Error::Policy { .. } | Error::NotFinite { .. } | Error::Setting { .. }
            ),
            "{what}: {error}"
        );
        unusable(&mut session);
    }
    assert!(Selection::new(vec![vec![0, 1], vec![2, 2]]).is_err());
    assert!(Selection::new(vec![vec![3, 1]]).is_err());
    assert!(Selection::new(vec![vec![], vec![0, 5]]).is_ok());
}

/// Nothing goes on, nothing panics.
fn unusable(session: &mut Session) {
    for _ in 0..2 {
        for error in [
            session.prefill(&text(5), &Prefill::default()).unwrap_err(),
            session.generate(Generate::greedy(1)).map(drop).unwrap_err(),
            session.score(&text(3)).map(drop).unwrap_err(),
            session.fork().map(drop).unwrap_err(),
        ] {
            assert!(matches!(error, Error::Unusable), "{error}");
        }
    }
}

/// A model that does something else as soon as it is told to.
#[derive(Debug)]
struct Naughty {
    model: Arc<RandomModel>,
    spec: ModelSpec,
    how: How,
    now: AtomicBool,
    calls: AtomicUsize,
    last: Mutex<Option<Rows>>,
    read: Mutex<Vec<u32>>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum How {
    FailsBefore,
    FailsAfter,
    FailsLogits,
    SkipsLayers,
    WrongWidth,
    Swallows,
    Remembers,
    Counts,
    NotANumber,
    MixesRows,
    OtherMatrix,
    ShortMatrix,
    NoInput,
}

impl Naughty {
    fn new(how: How, now: bool) -> Arc<Self> {
        let model = model();
        let mut spec = model.spec().clone();
        spec.layer_input = ![How::Counts, How::NoInput].contains(&how);
        Arc::new(Self {
            model,
            spec,
            how,
            now: AtomicBool::new(now),
            calls: AtomicUsize::new(0),
            last: Mutex::new(None),
            read: Mutex::default(),
        })
    }

    fn fails() -> Error {
        Error::Model("out of weights".into())
    }
}

impl CausalLm for Naughty {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn compute(&self) -> &Arc<dyn Compute> {
        self.model.compute()
    }

    fn hidden(&self, ids: &[u32], pass: &mut Pass<'_>) -> Result<Rows> {
        if !self.now.load(Ordering::Relaxed) {
            return self.model.hidden(ids, pass);
        }
        self.calls.fetch_add(1, Ordering::Relaxed);
        let changed = |hidden: Result<Rows>, f: &dyn Fn(Tensor<2>) -> Tensor<2>| {
            hidden.map(|hidden| f(hidden.into_tensor()).into())
        };
        match self.how {
            How::FailsBefore => Err(Self::fails()),
            How::FailsAfter => {
                self.model.hidden(ids, pass)?;
                Err(Self::fails())
            }
            How::SkipsLayers => {
                pass.attend(0, qkv(ids.len()))?;
                Ok(rows(ids.len(), spec().hidden))
            }
            How::WrongWidth => changed(self.model.hidden(ids, pass), &|x| x.narrow(1, 1, 5)),
            How::Swallows => Ok(self
                .model
                .hidden(ids, pass)
                .unwrap_or_else(|_| rows(ids.len(), spec().hidden))),
            How::Remembers => {
                let hidden = self.model.hidden(ids, pass)?.into_tensor();
                let own = hidden.clone().mean_dim(0);
                let before = self.last.lock().unwrap().replace(own.into());
                Ok(match before {
                    Some(before) => hidden + before.into_tensor().mul_scalar(0.1),
                    None => hidden,
                }
                .into())
            }
            How::Counts => {
                // As an adapter does that thinks that it knows where a text stands.
                let before = std::mem::replace(&mut *self.read.lock().unwrap(), ids.to_vec());
                let again = before == ids && ids.len() > 10;
                let spec = spec();
                let mut x = self.model.hidden_start(ids);
                for layer in 0..spec.layers {
                    let [q, k, v] = [spec.heads, spec.kv_heads, spec.kv_heads].map(|heads| {
                        Tensor::cat(vec![x.clone(); heads], 1).narrow(1, 0, heads * spec.head_dim)
                    });
                    let k = if again { k.mul_scalar(1.3) } else { k };
                    let out = pass.attend(layer, Qkv::new(q, k, v))?.into_tensor();
                    x = x + out.narrow(1, 0, spec.hidden);
                }
                Ok(x.into())
            }
            How::NotANumber => changed(self.model.hidden(ids, pass), &|x| x.mul_scalar(f32::NAN)),
            How::MixesRows | How::OtherMatrix | How::ShortMatrix | How::FailsLogits => {
                self.model.hidden(ids, pass)
            }
            How::NoInput => {
                for layer in 0..spec().layers {
                    pass.attend(layer, bare(ids.len()))?;
                }
                Ok(rows(ids.len(), spec().hidden))
            }
        }
    }

    fn qkv_weight(&self, layer: usize) -> Result<Option<Vec<f32>>> {
        let own = self.model.qkv_weight(layer)?;
        Ok(own.and_then(|mut own| {
            match self.how {
                How::OtherMatrix => own.swap(0, 1),
                How::ShortMatrix => own.truncate(7),
                How::NoInput => {}
                _ => return None,
            }
            Some(own)
        }))
    }

    fn logits(&self, hidden: Rows) -> Result<Rows> {
        if self.how == How::FailsLogits && self.now.load(Ordering::Relaxed) {
            return Err(Self::fails());
        }
        self.model.logits(match self.how {
            How::MixesRows => {
                let hidden = hidden.into_tensor();
                (hidden.clone() + hidden.mean_dim(0)).into()
            }
            _ => hidden,
        })
    }
}

trait Start {
    fn hidden_start(&self, ids: &[u32]) -> Tensor<2>;
}

impl Start for RandomModel {
    /// Some vector for each token.
    fn hidden_start(&self, ids: &[u32]) -> Tensor<2> {
        let width = self.spec().hidden;
        let value = |id: u32, i: usize| ((id as usize * 7 + i * 3) % 11) as f32 / 11.0;
        let rows = ids
            .iter()
            .flat_map(|id| (0..width).map(move |i| value(*id, i)));
        from_f32(rows.collect(), [ids.len(), width], &device())
    }
}

#[test]
fn an_error_of_the_model_ends_the_sequence_at_any_time() {
    for how in [
        How::FailsBefore,
        How::FailsAfter,
        How::FailsLogits,
        How::SkipsLayers,
        How::WrongWidth,
    ] {
        let start = |now| {
            let model = Naughty::new(how, now);
            let policy = Arc::new(Evict::new(KeyNorm, Budget::Units(10)));
            (model.clone(), Session::new(model, policy).unwrap())
        };
        let expected = |error: &Error| match how {
            How::FailsBefore | How::FailsAfter | How::FailsLogits => {
                matches!(error, Error::Model(_))
            }
            How::SkipsLayers => matches!(error, Error::LayersMissing { .. }),
            _ => matches!(error, Error::Shape { .. }),
        };
        let prefill = Prefill::new(8, 2);
        // In the first prompt, which is longer than the next one that is tried.
        let (_, mut session) = start(true);
        let error = session.prefill(&text(100), &prefill).unwrap_err();
        assert!(expected(&error), "{how:?}: {error}");
        unusable(&mut session);
        // In the middle of a prompt.
        let (model, mut session) = start(false);
        let error = session
            .prefill_with(&text(100), &prefill, &mut |done| {
                model.now.store(done.index >= 3, Ordering::Relaxed);
                Ok(())
            })
            .unwrap_err();
        assert!(expected(&error), "{how:?}: {error}");
        unusable(&mut session);
        // While text is generated.
        let (model, mut session) = start(false);
        session.prefill(&text(30), &prefill).unwrap();
        let mut tokens = session.generate(Generate::greedy(10)).unwrap();
        tokens.next().unwrap().unwrap();
        model.now.store(true, Ordering::Relaxed);
        let error = tokens.next().unwrap().unwrap_err();
        assert!(expected(&error), "{how:?}: {error}");
        assert!(tokens.next().is_none());
        unusable(&mut session);
        // While it is scored.
        let (model, mut session) = start(false);
        session.prefill(&text(30), &prefill).unwrap();
        model.now.store(true, Ordering::Relaxed);
        assert!(expected(&session.score(&text(9)).unwrap_err()));
        unusable(&mut session);
    }
}

#[test]
fn the_adapter_suite_names_what_is_broken() {
    for (how, promises) in [
        (How::SkipsLayers, &[Promise::Layers][..]),
        (How::WrongWidth, &[Promise::Shapes]),
        (How::Swallows, &[Promise::Layers]),
        (
            How::Remembers,
            &[Promise::ChunkInvariant, Promise::Deterministic],
        ),
        (How::Counts, &[Promise::PositionFree]),
        (How::NotANumber, &[Promise::Finite]),
        (How::MixesRows, &[Promise::RowWise]),
        (How::OtherMatrix, &[Promise::Projection]),
        (How::ShortMatrix, &[Promise::Projection]),
        (How::NoInput, &[Promise::Projection]),
    ] {
        let error = check_adapter(Naughty::new(how, true), &text(30), &AdapterCheck::default());
        match error {
            Err(ConformanceError::Broken { promise, .. }) => {
                assert!(promises.contains(&promise), "{how:?}: {promise:?}");
            }
            other => panic!("{how:?}: {other:?}"),
        }
    }
    let error = check_adapter(
        Naughty::new(How::FailsAfter, true),
        &text(30),
        &AdapterCheck::default(),
    );
    assert!(
        matches!(error, Err(ConformanceError::Failed { .. })),
        "{error:?}"
    );
    for ids in [text(15), vec![61; 20]] {
        let error = check_adapter(model(), &ids, &AdapterCheck::default());
        assert!(
            matches!(error, Err(ConformanceError::Unusable(_))),
            "{error:?}"
        );
    }
}

/// A policy around another one that does one thing differently.
#[derive(Debug)]
struct Bent {
    inner: Evict<Chance>,
    how: Bend,
    calls: AtomicUsize,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Bend {
    KeepsMore,
    KeepsFewer,
    EvictsEarly,
    EvictsTail,
    Moody,
    BadStore(Spoil),
}

impl KvCachePolicy for Bent {
    fn name(&self) -> String {
        "bent".into()
    }

    fn positions(&self) -> Positions {
        KvCachePolicy::positions(&self.inner)
    }

    fn limit(&self, layer: &LayerSpec, total: usize) -> Option<usize> {
        self.inner.limit(layer, total)
    }

    fn decode_slack(&self) -> Option<usize> {
        self.inner.decode_slack()
    }

    fn store(&self, layer: &LayerSpec, place: &Placement) -> Result<Box<dyn KvStore>> {
        let inner = Dense::boxed(layer, place)?;
        Ok(match self.how {
            Bend::BadStore(how) => Box::new(Spoiled { inner, how }),
            _ => inner,
        })
    }

    fn step(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Verdict> {
        let mut verdict = self.inner.step(at, units)?;
        let n = units.len(0) as u32;
        let change = |kept: &mut dyn FnMut(Vec<u32>) -> Vec<u32>| -> Result<Verdict> {
            let of = |head: usize| match &verdict.keep {
                Keep::Slots(selection) => selection.head(head).to_vec(),
                _ => (0..n).collect(),
            };
            Verdict::keep((0..units.kv_heads()).map(|h| kept(of(h))).collect())
        };
        let evicts = matches!(verdict.keep, Keep::Slots(_));
        verdict = match self.how {
            Bend::KeepsMore if evicts => change(&mut |mut kept| {
                let more = (0..n).find(|u| !kept.contains(u));
                kept.extend(more);
                kept.sort_unstable();
                kept
            })?,
            Bend::KeepsFewer if evicts => change(&mut |kept| kept[1..].to_vec())?,
            Bend::EvictsEarly if !evicts && n > 3 && at.phase != Phase::Tail => {
                change(&mut |kept| kept[1..].to_vec())?
            }
            Bend::EvictsTail if at.phase == Phase::Tail => change(&mut |kept| kept[1..].to_vec())?,
            // The sequence of Thue and Morse, which has no period.
            Bend::Moody if evicts => {
                let call = self.calls.fetch_add(1, Ordering::Relaxed);
                let start = call.count_ones() % 2;
                change(&mut |kept| (start..kept.len() as u32 + start).collect())?
            }
            _ => verdict,
        };
        Ok(verdict)
    }
}

/// How a store can be wrong.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Spoil {
    Loses,
    Changes,
    Reverses,
    Hoards,
    ForksOther,
    Accepts,
    TurnsUnasked,
    PlansLess,
    ReadsHalf,
    OddTiles,
    MixesKeys,
    Settles,
}

fn added(keys: Rows, x: f32) -> Result<Rows> {
    Ok(keys.into_tensor().add_scalar(x).into())
}

#[derive(Debug)]
struct Spoiled {
    inner: Box<dyn KvStore>,
    how: Spoil,
}

impl KvStore for Spoiled {
    fn name(&self) -> String {
        format!("{:?}", self.how)
    }

    fn append(&mut self, keys: &Rows, values: &Rows) -> Result<()> {
        if self.how == Spoil::Accepts {
            // Whatever comes is made to fit.
            let width = keys.width().min(values.width());
            let rows = keys.rows().min(values.rows());
            let cut = |x: &Rows| x.tensor().narrow(0, 0, rows).narrow(1, 0, width).into();
            return self.inner.append(&cut(keys), &cut(values)).or(Ok(()));
        }
        self.inner.append(keys, values)
    }

    fn retain(&mut self, kept: &[Vec<u32>]) -> Result<()> {
        self.inner.fork().retain(kept)?;
        let mut kept = kept.to_vec();
        match self.how {
            Spoil::Loses => kept
                .iter_mut()
                .for_each(|list| list.truncate(list.len().saturating_sub(1))),
            Spoil::Reverses => {
                // The same number of units, but the first ones.
                for list in &mut kept {
                    *list = (0..list.len() as u32).collect();
                }
            }
            _ => {}
        }
        self.inner.retain(&kept)?;
        if self.how == Spoil::Changes {
            self.inner.turn_keys(&|_, keys| added(keys, 1e-6))?;
        }
        Ok(())
    }

    fn settle(&mut self) -> Result<()> {
        self.inner.settle()?;
        if self.how == Spoil::Settles {
            self.inner.turn_keys(&|_, keys| added(keys, 1e-6))?;
        }
        Ok(())
    }

    fn fold_values(&mut self, head: usize, folds: &[Fold]) -> Result<()> {
        self.inner.fold_values(head, folds)?;
        if self.how == Spoil::MixesKeys {
            self.inner.turn_keys(&|_, keys| added(keys, 1e-6))?;
        }
        Ok(())
    }

    fn len(&self, head: usize) -> usize {
        self.inner.len(head)
    }

    fn is_empty(&self) -> bool {
        self.inner.is_empty()
    }

    fn bytes(&self) -> usize {
        self.inner.bytes()
            + if self.how == Spoil::Hoards {
                1 << 20
            } else {
                0
            }
    }

    fn growth(&self) -> Box<dyn Growth> {
        match self.how {
            Spoil::PlansLess => {
                let mut growth = self.inner.growth();
                growth.append(1);
                growth
            }
            _ => self.inner.growth(),
        }
    }

    fn keys(&self, head: usize) -> Result<Rows> {
        self.inner.keys(head)
    }

    fn values(&self, head: usize) -> Result<Rows> {
        self.inner.values(head)
    }

    fn tiles(&self, head: usize) -> Option<Box<dyn KvTiles + '_>> {
        match self.how {
            Spoil::OddTiles if head == 0 => None,
            _ => self.inner.tiles(head),
        }
    }

    fn turns_keys(&self) -> bool {
        self.how != Spoil::TurnsUnasked && self.inner.turns_keys()
    }

    fn turn_keys(&mut self, turn: &TurnKeys<'_>) -> Result<()> {
        self.inner.turn_keys(turn)
    }

    fn write(&self, to: &mut dyn Write) -> Result<()> {
        self.inner.write(to)
    }

    fn read(&mut self, from: &mut Take<&mut dyn Read>) -> Result<()> {
        match self.how {
            Spoil::ReadsHalf => {
                let mut bytes = Vec::new();
                from.read_to_end(&mut bytes).unwrap();
                let length = bytes.len() as u64;
                let mut bytes = &bytes[..];
                let bytes: &mut dyn Read = &mut bytes;
                self.inner.read(&mut bytes.take(length)).or(Ok(()))
            }
            _ => self.inner.read(from),
        }
    }

    fn fork(&self) -> Box<dyn KvStore> {
        let mut inner = self.inner.fork();
        if self.how == Spoil::ForksOther {
            // What the fork has is not what was there.
            inner.turn_keys(&|_, keys| added(keys, 1.0)).ok();
        }
        Box::new(Self {
            inner,
            how: self.how,
        })
    }
}

#[test]
fn the_policy_suite_names_what_is_broken() {
    for (how, promises) in [
        (Bend::KeepsMore, &[Promise::Bound][..]),
        (Bend::KeepsFewer, &[Promise::FillsBudget]),
        (Bend::EvictsEarly, &[Promise::FillsBudget]),
        (Bend::EvictsTail, &[Promise::FillsBudget]),
        (Bend::Moody, &[Promise::Deterministic]),
        (Bend::BadStore(Spoil::Changes), &[Promise::Survivors]),
        (Bend::BadStore(Spoil::Reverses), &[Promise::Survivors]),
        (
            Bend::BadStore(Spoil::Loses),
            &[Promise::Agreement, Promise::Survivors],
        ),
        (Bend::BadStore(Spoil::Hoards), &[Promise::PeakBytes]),
        (Bend::BadStore(Spoil::ForksOther), &[Promise::Fork]),
        (Bend::BadStore(Spoil::Settles), &[Promise::Survivors]),
    ] {
        let check = PolicyCheck {
            dtypes: vec![DType::F32],
            ..PolicyCheck::default()
        };
        let error = check_policy(&device(), &check, |case| {
            Arc::new(Bent {
                inner: Evict::new(Chance(case.seed), Budget::Units(case.budget))
                    .with_positions(case.positions)
                    .while_decoding(case.decode),
                how,
                calls: AtomicUsize::new(0),
            })
        });
        match error {
            Err(ConformanceError::Broken { promise, .. }) => {
                assert!(promises.contains(&promise), "{how:?}: {promise:?}");
            }
            other => panic!("{how:?}: {other:?}"),
        }
    }
}

#[test]
fn a_policy_with_one_kind_of_positions_is_checked_in_that_one() {
    let check = PolicyCheck {
        seeds: 0..3,
        ..PolicyCheck::default()
    };
    let make = |positions| {
        move |case: &locret_core::conformance::Case<'_>| -> Arc<dyn KvCachePolicy> {
            Arc::new(Evict::new(Newest, Budget::Units(case.budget)).with_positions(positions))
        }
    };
    check_policy(&device(), &check, make(Positions::Compact)).unwrap();
    check_policy(&device(), &check, make(Positions::Original)).unwrap();
    let none = PolicyCheck {
        seeds: 0..0,
        ..check
    };
    let error = check_policy(&device(), &none, make(Positions::Original));
    assert!(
        matches!(error, Err(ConformanceError::Unusable(_))),
        "{error:?}"
    );
}

#[test]
fn the_store_suite_names_what_is_broken() {
    let place = Placement {
        compute: compute(&device()),
        dtype: DType::F32,
    };
    for (how, promises) in [
        (Spoil::Loses, &[Promise::Content][..]),
        (Spoil::Changes, &[Promise::Content, Promise::Survivors]),
        (Spoil::Reverses, &[Promise::Content]),
        (Spoil::Hoards, &[Promise::Freed]),
        (Spoil::ForksOther, &[Promise::Content, Promise::Fork]),
        (Spoil::Accepts, &[Promise::Refused]),
        (Spoil::TurnsUnasked, &[Promise::TurnedKeys]),
        (Spoil::PlansLess, &[Promise::Growth]),
        (Spoil::ReadsHalf, &[Promise::Saved]),
        (Spoil::OddTiles, &[Promise::Tiles]),
        (Spoil::MixesKeys, &[Promise::Content, Promise::Survivors]),
        (Spoil::Settles, &[Promise::Content, Promise::Survivors]),
    ] {
        let error = check_store(&device(), &StoreCheck::default(), |layer| {
            Ok(Box::new(Spoiled {
                inner: Dense::boxed(layer, &place)?,
                how,
            }))
        });
        match error {
            Err(ConformanceError::Broken { promise, .. }) => {
                assert!(promises.contains(&promise), "{how:?}: {promise:?}");
            }
            other => panic!("{how:?}: {other:?}"),
        }
    }
    // The message says what, where and how to see it again.
    let error = check_store(&device(), &StoreCheck::default(), |layer| {
        Ok(Box::new(Spoiled {
            inner: Dense::boxed(layer, &place)?,
            how: Spoil::Hoards,
        }))
    })
    .unwrap_err();
    let shown = format!("{error:?}");
    for part in ["store Hoards", "units that are dropped are freed", "seed 0"] {
        assert!(shown.contains(part), "{shown}");
    }
}

#[test]
fn scorers_see_what_was_promised() {
    /// Asserts on every call; its scores say where a unit stood.
    #[derive(Debug)]
    struct Checking;
    impl Scorer for Checking {
        fn name(&self) -> String {
            "checking".into()
        }
        fn carries(&self) -> bool {
            true
        }
        fn score(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
            assert_eq!(units.layer(), &at.layer);
            assert_eq!(units.incoming(), at.incoming);
            assert_eq!(at.phase == Phase::Turn, at.incoming == 0);
            assert!(units.qkv().is_none() && units.surprisal().is_none());
            assert!(units.observed().is_none() && !units.is_empty());
            let mut all = Vec::new();
            for head in 0..units.kv_heads() {
                let positions = units.positions(head);
                assert_eq!(positions.len(), units.len(head));
                assert!(units.longest() >= units.len(head));
                let new = positions.len() - at.incoming;
                let expected = (at.seen..at.seen + at.incoming).map(|p| p as u32);
                assert!(positions[new..].iter().copied().eq(expected));
                assert_eq!(units.carried(head).len(), new);
                for (score, position) in units.carried(head).iter().zip(positions) {
                    assert_eq!(*score, *position as f32);
                }
                let dims = [units.len(head), at.layer.head_dim];
                assert_eq!(units.keys(head)?.shape(), dims);
                assert_eq!(units.values(head)?.shape(), dims);
                all.push(positions.iter().map(|p| *p as f32).collect());
            }
            Scores::per_head(all)
        }
    }
    let model = model();
    let mut session = session(&model, Evict::new(Checking, Budget::Units(9)));
    let prefill = Prefill::new(7, 4);
    for _ in 0..3 {
        session.prefill(&text(30), &prefill).unwrap();
        let tokens = session.generate(Generate::greedy(4)).unwrap();
        for token in tokens {
            token.unwrap();
        }
    }
    let kept = session.cache().positions(1, 1);
    // 3 · 30 + 3 · 4 tokens, the last one unread; the newest have the best scores.
    assert!(
        kept.iter().copied().eq(101 - kept.len() as u32..101),
        "{kept:?}"
    );
    assert_eq!(session.cache().store(0).keys(0).unwrap().width(), 16);
}
