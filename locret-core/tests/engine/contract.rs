//! What happens when a caller, a policy, a store or an adapter breaks its word: an error, never a
//! panic, and the conformance suite says which word it was.

use crate::{
    device, model,
    policies::{Chance, Everything, KeyNorm, Newest},
    session, spec, text,
};
use burn::tensor::{Device, Tensor};
use locret_core::{
    Budget, CacheOptions, CausalLm, Dense, Error, Evict, Fold, Generate, Keep, KvCachePolicy,
    KvStore, LayerSpec, LayerUnits, ModelSpec, Needs, Phase, Placement, Positions, Prefill, Qkv,
    Result, Scorer, Scores, Selection, SequenceCache, Session, Step, TurnKeys, Verdict,
    conformance::{
        AdapterCheck, ConformanceError, PolicyCheck, Promise, RandomModel, StoreCheck,
        check_adapter, check_policy, check_store,
    },
    from_f32, into_f32,
    kernels::tiles::KvTiles,
};
use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

fn cache(policy: impl KvCachePolicy + 'static) -> SequenceCache {
    SequenceCache::new(
        &spec(),
        Arc::new(policy),
        &device(),
        CacheOptions::default(),
    )
    .unwrap()
}

fn qkv(tokens: usize) -> Qkv {
    let spec = spec();
    let tensor = |heads: usize| {
        let width = heads * spec.head_dim;
        from_f32(vec![0.1; tokens * width], [tokens, width], &device())
    };
    Qkv {
        q: tensor(spec.heads),
        k: tensor(spec.kv_heads),
        v: tensor(spec.kv_heads),
    }
}

const BODY: Phase = Phase::Prefill { last: false };

#[test]
fn layers_are_due_once_and_in_order() {
    let mut cache = cache(Everything::default());
    cache.begin(BODY, 3, 3).unwrap();
    let error = cache.attend(1, qkv(3)).unwrap_err();
    assert!(
        matches!(
            error,
            Error::LayerOrder {
                expected: 0,
                found: 1,
                layers: 2
            }
        ),
        "{error}"
    );
    cache.attend(0, qkv(3)).unwrap();
    let error = cache.attend(0, qkv(3)).unwrap_err();
    assert!(
        matches!(
            error,
            Error::LayerOrder {
                expected: 1,
                found: 0,
                ..
            }
        ),
        "{error}"
    );
    let error = cache.finish(None).unwrap_err();
    assert!(
        matches!(
            error,
            Error::LayerOrder {
                expected: 1,
                found: 2,
                ..
            }
        ),
        "{error}"
    );
    cache.attend(1, qkv(3)).unwrap();
    let error = cache.attend(2, qkv(3)).unwrap_err();
    assert!(
        matches!(
            error,
            Error::LayerOrder {
                expected: 2,
                found: 2,
                ..
            }
        ),
        "{error}"
    );
    cache.finish(None).unwrap();
    assert_eq!(cache.seen(), 3);
    // Outside of a step there is nothing to attend in, or to finish.
    assert!(matches!(cache.attend(0, qkv(3)), Err(Error::Unusable)));
    assert!(matches!(cache.finish(None), Err(Error::Unusable)));
}

#[test]
fn shapes_are_checked() {
    let good = qkv(3);
    let wide = |x: &Tensor<2>| Tensor::cat(vec![x.clone(), x.clone()], 1);
    let long = |x: &Tensor<2>| Tensor::cat(vec![x.clone(), x.clone()], 0);
    for bad in [
        Qkv {
            q: wide(&good.q),
            ..good.clone()
        },
        Qkv {
            k: wide(&good.k),
            ..good.clone()
        },
        Qkv {
            v: wide(&good.v),
            ..good.clone()
        },
        Qkv {
            k: long(&good.k),
            ..good.clone()
        },
        Qkv {
            v: long(&good.v),
            ..good.clone()
        },
        qkv(4),
    ] {
        let mut cache = cache(Everything::default());
        cache.begin(BODY, 3, 3).unwrap();
        let error = cache.attend(0, bad).unwrap_err();
        assert!(matches!(error, Error::Shape { .. }), "{error}");
        assert_eq!(cache.units(), 0);
    }
}

#[test]
fn a_step_that_was_not_finished_makes_a_cache_unusable() {
    let mut cache = cache(Everything::default());
    cache.begin(BODY, 3, 3).unwrap();
    assert!(matches!(cache.begin(BODY, 3, 6), Err(Error::Unusable)));
    assert!(matches!(cache.turn(6), Err(Error::Unusable)));
    assert!(matches!(cache.fork(), Err(Error::Unusable)));
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
            assert_eq!(x.dims(), [at.incoming, spec().hidden]);
            into_f32(x).unwrap()
        });
        if let Some(host) = units.host_input() {
            assert_eq!(input.as_deref(), Some(host));
        }
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
                let policy = Arc::new(Inputs {
                    needs: Needs {
                        input: asked,
                        surprisal,
                        ..Needs::NOTHING
                    },
                    seen: Mutex::default(),
                });
                let options = CacheOptions::default();
                let mut cache =
                    SequenceCache::new(&spec(), policy.clone(), &device(), options).unwrap();
                cache.begin(BODY, 3, 3).unwrap();
                for layer in 0..2 {
                    let mut input = numbers(layer);
                    if host {
                        cache.attend_from(layer, &input[..], qkv(3)).unwrap();
                    } else {
                        let tensor = from_f32::<2>(input.clone(), [3, hidden], &device());
                        cache.attend_from(layer, &tensor, qkv(3)).unwrap();
                    }
                    // What the adapter does with its memory afterwards is its own business.
                    input.fill(0.0);
                }
                cache.finish(surprisal.then_some(&[1.0; 3])).unwrap();
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
    let policy = Everything {
        needs: Needs {
            input: true,
            ..Needs::NOTHING
        },
        ..Everything::default()
    };
    let mut cache = cache(policy);
    cache.begin(BODY, 3, 3).unwrap();
    let error = cache.attend_from(0, &[0.0; 5][..], qkv(3)).unwrap_err();
    assert!(matches!(error, Error::Shape { .. }), "{error}");
    let tensor = Tensor::<2>::zeros([2, hidden], &device());
    let error = cache.attend_from(0, &tensor, qkv(3)).unwrap_err();
    assert!(matches!(error, Error::Shape { .. }), "{error}");
}

#[test]
fn surprisal_has_to_come_where_it_is_needed() {
    let policy = Everything {
        needs: Needs {
            surprisal: true,
            ..Needs::NOTHING
        },
        ..Everything::default()
    };
    let mut cache = cache(policy);
    cache.begin(BODY, 3, 3).unwrap();
    for layer in 0..2 {
        cache.attend(layer, qkv(3)).unwrap();
    }
    for bad in [None, Some(&[1.0, 2.0][..])] {
        let error = cache.finish(bad).unwrap_err();
        assert!(
            matches!(
                error,
                Error::Shape {
                    what: "surprisal",
                    ..
                }
            ),
            "{error}"
        );
    }
    cache.finish(Some(&[f32::NAN, 1.0, 2.0])).unwrap();
}

#[test]
fn impossible_models_have_no_cache() {
    for bad in [
        ModelSpec {
            layers: 0,
            ..spec()
        },
        ModelSpec {
            kv_heads: 4,
            ..spec()
        },
        ModelSpec {
            kv_heads: 0,
            ..spec()
        },
        ModelSpec {
            softmax_scale: f32::NAN,
            ..spec()
        },
        ModelSpec {
            head_dim: 7,
            ..spec()
        },
    ] {
        let policy = Arc::new(Everything::default());
        let error = SequenceCache::new(&bad, policy, &device(), CacheOptions::default());
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
        },
        scores: None,
    })
}

#[test]
fn verdicts_that_do_not_fit_are_refused_and_end_the_sequence() {
    type Answer = fn() -> Result<Verdict>;
    let answers: [(&str, Answer); 8] = [
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
    how: How,
    now: AtomicBool,
    calls: AtomicUsize,
    last: Mutex<Option<Tensor<2>>>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum How {
    FailsBefore,
    FailsAfter,
    SkipsLayers,
    WrongWidth,
    Swallows,
    Remembers,
    Rotates,
    NotANumber,
    MixesRows,
    OtherMatrix,
    ShortMatrix,
    NoInput,
}

impl Naughty {
    fn new(how: How, now: bool) -> Arc<Self> {
        Arc::new(Self {
            model: model(),
            how,
            now: AtomicBool::new(now),
            calls: AtomicUsize::new(0),
            last: Mutex::new(None),
        })
    }

    fn fails() -> Error {
        Error::Model("out of weights".into())
    }
}

impl CausalLm for Naughty {
    fn spec(&self) -> &ModelSpec {
        self.model.spec()
    }

    fn device(&self) -> &Device {
        self.model.device()
    }

    fn hidden(&self, ids: &[u32], cache: &mut SequenceCache) -> Result<Tensor<2>> {
        if !self.now.load(Ordering::Relaxed) {
            return self.model.hidden(ids, cache);
        }
        self.calls.fetch_add(1, Ordering::Relaxed);
        match self.how {
            How::FailsBefore => Err(Self::fails()),
            How::FailsAfter => {
                self.model.hidden(ids, cache)?;
                Err(Self::fails())
            }
            How::SkipsLayers => {
                cache.attend(0, qkv(ids.len()))?;
                Ok(Tensor::zeros([ids.len(), spec().hidden], &device()))
            }
            How::WrongWidth => Ok(self.model.hidden(ids, cache)?.narrow(1, 1, 5)),
            How::Swallows => Ok(self
                .model
                .hidden(ids, cache)
                .unwrap_or_else(|_| Tensor::zeros([ids.len(), spec().hidden], &device()))),
            How::Remembers => {
                let hidden = self.model.hidden(ids, cache)?;
                let own = hidden.clone().mean_dim(0);
                let before = self.last.lock().unwrap().replace(own);
                Ok(match before {
                    Some(before) => hidden + before.mul_scalar(0.1),
                    None => hidden,
                })
            }
            How::Rotates => {
                // As an adapter does that has not heard that positions are the engine's.
                let spec = spec();
                let mut x = self.model.hidden_start(ids);
                for layer in 0..spec.layers {
                    let [q, k, v] = [spec.heads, spec.kv_heads, spec.kv_heads].map(|heads| {
                        Tensor::cat(vec![x.clone(); heads], 1).narrow(1, 0, heads * spec.head_dim)
                    });
                    let place: Vec<f32> = (0..ids.len())
                        .map(|i| 1.0 + 0.01 * (cache.seen() + i) as f32)
                        .collect();
                    let place = from_f32::<2>(place, [ids.len(), 1], &device());
                    let k = k * place;
                    let out = cache.attend(layer, Qkv { q, k, v })?;
                    x = x + out.narrow(1, 0, spec.hidden);
                }
                Ok(x)
            }
            How::NotANumber => Ok(self.model.hidden(ids, cache)?.mul_scalar(f32::NAN)),
            How::MixesRows | How::OtherMatrix | How::ShortMatrix => self.model.hidden(ids, cache),
            How::NoInput => {
                let hidden = spec().hidden;
                for layer in 0..spec().layers {
                    cache.attend(layer, qkv(ids.len()))?;
                }
                Ok(Tensor::zeros([ids.len(), hidden], &device()))
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

    fn logits(&self, hidden: Tensor<2>) -> Result<Tensor<2>> {
        let hidden = match self.how {
            How::MixesRows => hidden.clone() + hidden.mean_dim(0),
            _ => hidden,
        };
        self.model.logits(hidden)
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
        How::SkipsLayers,
        How::WrongWidth,
    ] {
        let start = |now| {
            let model = Naughty::new(how, now);
            let policy = Arc::new(Evict::new(KeyNorm, Budget::Units(10)));
            (model.clone(), Session::new(model, policy).unwrap())
        };
        let expected = |error: &Error| match how {
            How::FailsBefore | How::FailsAfter => matches!(error, Error::Model(_)),
            How::SkipsLayers => matches!(error, Error::LayerOrder { .. }),
            _ => matches!(error, Error::Shape { .. }),
        };
        let prefill = Prefill { chunk: 8, local: 2 };
        // In the first prompt, which is longer than the next one that is tried.
        let (_, mut session) = start(true);
        let error = session.prefill(&text(100), &prefill).unwrap_err();
        assert!(expected(&error), "{how:?}: {error}");
        unusable(&mut session);
        // In the middle of a prompt.
        let (model, mut session) = start(false);
        let error = session
            .prefill_with(&text(100), &prefill, &mut |done| {
                model.now.store(done.index == 3, Ordering::Relaxed);
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
        (How::Rotates, &[Promise::PositionFree]),
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

    fn store(&self, layer: &LayerSpec, place: &Placement) -> Result<Box<dyn KvStore>> {
        let inner = Dense::boxed(layer, place);
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
            Bend::Moody if evicts => {
                let call = self.calls.fetch_add(1, Ordering::Relaxed);
                let start = (call / 7 % 2) as u32;
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
    TurnsHalf,
    OddTiles,
    MixesKeys,
    Settles,
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

    fn append(&mut self, keys: Tensor<2>, values: Tensor<2>) -> Result<()> {
        if self.how == Spoil::Accepts {
            // Whatever comes is made to fit.
            let width = keys.dims()[1].min(values.dims()[1]);
            let rows = keys.dims()[0].min(values.dims()[0]);
            let cut = |x: Tensor<2>| x.narrow(0, 0, rows).narrow(1, 0, width);
            return self.inner.append(cut(keys), cut(values)).or(Ok(()));
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
            self.inner.turn_keys(&|_, keys| Ok(keys.add_scalar(1e-6)))?;
        }
        Ok(())
    }

    fn settle(&mut self) -> Result<()> {
        self.inner.settle()?;
        if self.how == Spoil::Settles {
            self.inner.turn_keys(&|_, keys| Ok(keys.add_scalar(1e-6)))?;
        }
        Ok(())
    }

    fn fold_values(&mut self, head: usize, folds: &[Fold]) -> Result<()> {
        self.inner.fold_values(head, folds)?;
        if self.how == Spoil::MixesKeys {
            self.inner.turn_keys(&|_, keys| Ok(keys.add_scalar(1e-6)))?;
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

    fn keys(&self, head: usize) -> Result<Tensor<2>> {
        self.inner.keys(head)
    }

    fn values(&self, head: usize) -> Result<Tensor<2>> {
        self.inner.values(head)
    }

    fn tiles(&self, head: usize) -> Option<Box<dyn KvTiles + '_>> {
        match self.how {
            Spoil::OddTiles if head == 0 => None,
            _ => self.inner.tiles(head),
        }
    }

    fn turn_keys(&mut self, turn: &TurnKeys<'_>) -> Result<bool> {
        let turned = self.inner.turn_keys(turn)?;
        Ok(turned && self.how != Spoil::TurnsHalf)
    }

    fn fork(&self) -> Box<dyn KvStore> {
        let mut inner = self.inner.fork();
        if self.how == Spoil::ForksOther {
            // What the fork has is not what was there.
            inner.turn_keys(&|_, keys| Ok(keys.add_scalar(1.0))).ok();
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
            dtypes: vec![locret_core::KvDtype::F32],
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
        evicts_while_decoding: false,
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
        device: device(),
        dtype: locret_core::KvDtype::F32,
        host: true,
    };
    for (how, promises) in [
        (Spoil::Loses, &[Promise::Content][..]),
        (Spoil::Changes, &[Promise::Content, Promise::Survivors]),
        (Spoil::Reverses, &[Promise::Content]),
        (Spoil::Hoards, &[Promise::Freed]),
        (Spoil::ForksOther, &[Promise::Content, Promise::Fork]),
        (Spoil::Accepts, &[Promise::Refused]),
        (Spoil::TurnsHalf, &[Promise::Content, Promise::TurnedKeys]),
        (Spoil::OddTiles, &[Promise::Tiles]),
        (Spoil::MixesKeys, &[Promise::Content, Promise::Survivors]),
        (Spoil::Settles, &[Promise::Content, Promise::Survivors]),
    ] {
        let error = check_store(&device(), &StoreCheck::default(), |layer| {
            Ok(Box::new(Spoiled {
                inner: Dense::boxed(layer, &place),
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
            inner: Dense::boxed(layer, &place),
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
                assert_eq!(units.keys(head)?.dims(), dims);
                assert_eq!(units.values(head)?.dims(), dims);
                all.push(positions.iter().map(|p| *p as f32).collect());
            }
            Scores::per_head(all)
        }
    }
    let model = model();
    let mut session = session(&model, Evict::new(Checking, Budget::Units(9)));
    let prefill = Prefill { chunk: 7, local: 4 };
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
    assert_eq!(
        into_f32(session.cache().store(0).keys(0).unwrap())
            .unwrap()
            .len()
            % 16,
        0
    );
}
