//! Queries that see less than everything before them, through the whole engine.

use crate::{
    device, model, model_of,
    policies::{Attended, Birth, Everything, KeyNorm, Largest, Logits, Several},
    spec, text,
};
use locret_core::{
    Budget, CacheOptions, DType, Error, Evict, Kernels, KvCachePolicy, KvStore, LayerSpec,
    LayerUnits, Needs, Observation, Placement, Positions, Prefill, Quantization, QuantizedStore,
    Result, Rows, Session, Step, Verdict, View, Views, Visible,
    conformance::{Case, PolicyCheck, check_policy},
};
use std::{ops::Range, sync::Arc};

/// Another policy's verdicts, over attention to units that are drawn by lot.
#[derive(Debug)]
struct Choosing<P> {
    inner: P,
    seed: u64,
    /// Whether some are seen at one distance.
    far: bool,
    /// Whether anything is hidden at all.
    hides: bool,
    bits: Option<u8>,
}

impl<P: KvCachePolicy> Choosing<P> {
    fn new(case: &Case<'_>, inner: P) -> Self {
        Self {
            inner,
            seed: case.seed,
            far: case.positions == Positions::Compact && !case.seed.is_multiple_of(3),
            hides: case.budget < 1 << 20,
            bits: None,
        }
    }
}

impl<P: KvCachePolicy> KvCachePolicy for Choosing<P> {
    fn name(&self) -> String {
        format!("choosing {}", self.inner.name())
    }

    fn needs(&self) -> Needs {
        match self.far {
            true => self.inner.needs().far(),
            false => self.inner.needs().before(),
        }
    }

    fn positions(&self) -> Positions {
        self.inner.positions()
    }

    fn carries(&self) -> Option<String> {
        self.inner.carries()
    }

    fn carried_width(&self, layer: &LayerSpec) -> usize {
        self.inner.carried_width(layer)
    }

    fn store(&self, layer: &LayerSpec, place: &Placement) -> Result<Box<dyn KvStore>> {
        match self.bits {
            None => self.inner.store(layer, place),
            Some(bits) => QuantizedStore::boxed(layer, place, Quantization::bits(bits)),
        }
    }

    fn limit(&self, layer: &LayerSpec, total: usize) -> Option<usize> {
        self.inner.limit(layer, total)
    }

    fn decode_slack(&self) -> Option<usize> {
        self.inner.decode_slack()
    }

    fn before(&self, at: &Step, queries: &Rows, units: &LayerUnits<'_>) -> Result<Visible> {
        assert_eq!(queries.rows(), at.incoming);
        assert_eq!(units.incoming(), at.incoming);
        if !self.hides {
            return Ok(Visible::All);
        }
        let mut state = self.seed ^ ((at.layer.index as u64) << 32) ^ at.seen as u64;
        let mut below = |n: usize| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % n.max(1)
        };
        if below(8) == 0 {
            return Ok(Visible::All);
        }
        let block = 1 + below(at.incoming + 2);
        let heads = [at.layer.heads, at.layer.kv_heads][below(2)];
        let lists = (0..heads).map(|head| {
            let len = units.len(head * at.layer.kv_heads / heads);
            let blocks = 0..at.incoming.div_ceil(block);
            let view = |_| {
                let mut ranges = |most: usize| -> Vec<Range<u32>> {
                    let range = |_| {
                        let start = below(len + 1);
                        start as u32..(start + below(len - start + 1)) as u32
                    };
                    (0..most).map(range).collect()
                };
                let (near, distant) = (ranges(2), ranges(2));
                View {
                    ranges: if below(2) == 0 { near } else { Vec::new() },
                    columns: (0..below(9)).map(|_| below(len) as u32).collect(),
                    window: [0, 1, below(30)][below(3)],
                    far: if self.far { distant } else { Vec::new() },
                }
            };
            blocks.map(view).collect()
        });
        let views = Views::new(block, lists.collect());
        if !self.far {
            return Ok(Visible::Chosen(views));
        }
        let views = views.far_at(5 + self.seed as usize % 50);
        if below(2) == 0 {
            return Ok(Visible::Chosen(views));
        }
        let places = (0..at.layer.kv_heads).map(|head| {
            let len = units.len(head);
            (0..len).map(|_| below(len) as u32).collect()
        });
        Ok(Visible::Chosen(views.placed(places.collect())))
    }

    fn step(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Verdict> {
        self.inner.step(at, units)
    }
}

fn evict<S: locret_core::Scorer + 'static>(case: &Case<'_>, scorer: S) -> Evict<S> {
    Evict::new(scorer, Budget::Units(case.budget))
        .with_positions(case.positions)
        .while_decoding(case.decode)
}

#[test]
fn whatever_is_seen_and_evicted() {
    check_policy(&device(), &PolicyCheck::default(), |case| {
        Arc::new(Choosing::new(case, evict(case, KeyNorm).sinks(2)))
    })
    .unwrap();
    check_policy(&device(), &PolicyCheck::default(), |case| {
        Arc::new(Choosing::new(case, evict(case, Birth).stabilizers(4)))
    })
    .unwrap();
}

#[test]
fn what_is_observed_is_attention_to_what_is_seen() {
    check_policy(&device(), &PolicyCheck::default(), |case| {
        Arc::new(Choosing::new(case, evict(case, Attended)))
    })
    .unwrap();
    check_policy(&device(), &PolicyCheck::default(), |case| {
        let largest = Largest(Observation::MaxWeightsByInput);
        Arc::new(Choosing::new(case, evict(case, largest)))
    })
    .unwrap();
    check_policy(&device(), &PolicyCheck::default(), |case| {
        Arc::new(Choosing::new(case, evict(case, Logits).recent(2)))
    })
    .unwrap();
}

#[test]
fn several_numbers_of_a_unit_are_those_of_where_it_stands() {
    let check = PolicyCheck {
        seeds: 0..40,
        ..PolicyCheck::default()
    };
    check_policy(&device(), &check, |case| {
        let several = Several {
            limit: case.budget,
            positions: case.positions,
        };
        Arc::new(Choosing::new(case, several))
    })
    .unwrap();
}

#[test]
fn over_units_of_few_bits() {
    let check = PolicyCheck {
        dense: false,
        dtypes: vec![DType::F32],
        tolerance: 5e-2,
        store_tolerance: crate::suite::off_by(Quantization::bits(8)),
        ..PolicyCheck::default()
    };
    check_policy(&device(), &check, |case| {
        Arc::new(Choosing {
            bits: Some(8),
            ..Choosing::new(case, evict(case, Birth))
        })
    })
    .unwrap();
}

/// Everything stays, and queries see what it says.
#[derive(Debug)]
struct Says {
    positions: Positions,
    needs: Needs,
    visible: Visible,
}

impl KvCachePolicy for Says {
    fn name(&self) -> String {
        "says".into()
    }

    fn needs(&self) -> Needs {
        self.needs
    }

    fn positions(&self) -> Positions {
        self.positions
    }

    fn before(&self, at: &Step, queries: &Rows, units: &LayerUnits<'_>) -> Result<Visible> {
        let survey = units.survey(queries, 3)?;
        assert_eq!(survey.units.len(), at.layer.heads);
        for (by_unit, by_distance) in survey.units.iter().zip(&survey.distances) {
            let (all, own) = (by_unit.iter().sum::<f32>(), by_distance.iter().sum::<f32>());
            let due = at.incoming.min(3) as f32;
            assert!((all - due).abs() < 1e-4 && (own - due).abs() < 1e-4);
        }
        Ok(self.visible.clone())
    }

    fn step(&self, _at: &Step, _units: &LayerUnits<'_>) -> Result<Verdict> {
        Ok(Verdict::keep_all())
    }
}

fn read(policy: Says, kernels: Kernels) -> Result<Vec<f32>> {
    let options = CacheOptions::new().kernels(kernels);
    let mut session = Session::with_options(model(), Arc::new(policy), options)?;
    session.prefill(&text(20), &Prefill::new(10, 0))?;
    Ok(session.logits().unwrap_or_default().to_vec())
}

#[test]
fn what_does_not_fit_is_the_policys_error() {
    let view = |units: Range<u32>| View {
        ranges: std::iter::once(units).collect(),
        ..View::default()
    };
    let heads = spec().heads;
    for views in [
        Views::new(10, vec![vec![view(0..11)]; heads]),
        Views::new(10, vec![vec![view(0..5)]; heads + 1]),
        Views::new(4, vec![vec![view(0..5)]; heads]),
        Views::new(10, vec![vec![view(0..5)]; heads]).far_at(3),
        // Not asked for by `Needs::far`.
        Views::new(10, vec![vec![view(0..5)]; heads]).placed(vec![vec![0; 10]; spec().kv_heads]),
    ] {
        for kernels in [Kernels::Auto, Kernels::Operations] {
            let policy = Says {
                positions: Positions::Compact,
                needs: Needs::NOTHING.before(),
                visible: Visible::Chosen(views.clone()),
            };
            let error = read(policy, kernels).unwrap_err();
            assert!(matches!(error, Error::Policy { .. }), "{error}");
        }
    }
    let rotated = Says {
        positions: Positions::Original,
        needs: Needs::NOTHING.far(),
        visible: Visible::All,
    };
    let error = read(rotated, Kernels::Auto).unwrap_err();
    assert!(error.to_string().contains("Compact"), "{error}");
}

#[test]
fn nobody_is_asked_who_did_not_ask_for_it() {
    let says = |needs| Says {
        positions: Positions::Original,
        needs,
        visible: Visible::Chosen(Views::new(10, vec![vec![View::default()]; spec().kv_heads])),
    };
    for kernels in [Kernels::Auto, Kernels::Operations] {
        let seeing_nothing = read(says(Needs::NOTHING.before()), kernels).unwrap();
        assert!(seeing_nothing.iter().all(|x| x.is_finite()));
        let full = read(says(Needs::NOTHING), kernels).unwrap();
        let mut session = Session::new(model_of(spec()), Arc::new(Everything::default())).unwrap();
        let prefill = Prefill::new(10, 0);
        session.prefill(&text(20), &prefill).unwrap();
        let due = session.logits().unwrap();
        let same = full.iter().zip(due).all(|(a, b)| (a - b).abs() < 1e-4);
        assert!(same && full != seeing_nothing);
    }
}
