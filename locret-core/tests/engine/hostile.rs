//! What callers may hand over: dimensions of nothing, numbers at the ends of their types, views of what is not there.
//! Errors or answers, no panics.

use crate::{device, model, policies::Newest, spec, text};
use locret_core::{
    Budget, CacheOptions, CausalLm, DecodeEviction, Error, Evict, Generate, KvCachePolicy,
    LayerUnits, ModelSpec, Needs, Positions, Prefill, Result, RopeConfig, RopeScaling, Rows,
    Sampling, Scores, Selection, Session, Step, TokenScore, Verdict, View, Views, Visible, argmax,
    compute,
    conformance::{RandomModel, small_spec},
    plan,
};
use std::{ops::Range, sync::Arc};

#[test]
fn models_of_impossible_dimensions() {
    const MOST: usize = usize::MAX;
    for spec in [
        ModelSpec::new(0, 0, 0, 0, 0),
        ModelSpec::new(1, 3, 2, 8, 8),
        ModelSpec::new(1, 1, 0, 8, 8),
        small_spec(2, 1, 0),
        small_spec(2, 1, 8).with_softmax_scale(f32::NAN),
        small_spec(2, 1, 8).with_rope(RopeConfig::plain(f64::NAN, 8)),
        small_spec(2, 1, 8).with_rope(RopeConfig::plain(1e4, 7)),
        small_spec(2, 1, 8).with_rope(RopeConfig::plain(1e4, MOST)),
    ] {
        assert!(spec.validate().is_err(), "{spec:?}");
        assert!(RandomModel::new(spec.clone(), 1, &device()).is_err());
        let layer = spec.layer(MOST);
        for budget in [
            Budget::Units(MOST),
            Budget::Ratio(f64::NAN),
            Budget::Bytes(MOST),
        ] {
            let _any = (budget.units(&layer, MOST), budget.validate(&layer));
        }
    }
    let nothing = ModelSpec::new(0, 0, 0, 0, 0).layer(0);
    assert_eq!((nothing.group(), nothing.qkv_features()), (0, 0));
    assert_eq!(Budget::Bytes(100).units(&nothing, 5), 0);
    assert!(Budget::Bytes(100).validate(&nothing).is_err());
    // More bytes than there are numbers for.
    let large = ModelSpec::new(MOST, MOST, MOST, 8, 8).with_head_dim(MOST);
    assert_eq!(large.unit_bytes(MOST), MOST);
    assert_eq!(large.full_cache_bytes(MOST, MOST), MOST);
    assert_eq!(large.layer(0).qkv_features(), MOST);
    for scaling in [
        RopeScaling::Linear { factor: 0.0 },
        RopeScaling::LongRope {
            short: Vec::new(),
            long: vec![f64::NAN; 4],
            original_max: 0,
            attention_factor: f64::INFINITY,
            switch: Default::default(),
        },
    ] {
        let rope = RopeConfig {
            scaling,
            ..RopeConfig::plain(1e4, 8)
        };
        assert!(rope.validate(8).is_err());
        let _any = (rope.is_long(MOST), rope.frequencies(true));
    }
}

#[test]
fn budgets_and_guards_of_any_size() {
    const MOST: usize = usize::MAX;
    let numbers = [0, 1, 7, MOST];
    let budgets = [
        Budget::Units(0),
        Budget::Units(1),
        Budget::Units(MOST),
        Budget::Ratio(0.1),
        Budget::Ratio(-1.0),
        Budget::Ratio(f64::NAN),
        Budget::Ratio(1e300),
        Budget::Bytes(0),
        Budget::Bytes(5_000),
        Budget::Bytes(MOST),
    ];
    let mut fine = 0;
    for (i, budget) in budgets.into_iter().enumerate() {
        for n in numbers {
            let policies = [
                Evict::new(Newest, budget).sinks(n),
                Evict::new(Newest, budget).recent(n).sinks(n),
                Evict::new(Newest, budget).stabilizers(n),
                Evict::new(Newest, budget).pool(n),
                Evict::new(Newest, budget).while_decoding(DecodeEviction::Every(n)),
                Evict::new(Newest, budget).pyramid([0.5, f64::NAN, f64::INFINITY, 1e300][i % 4]),
                Evict::new(Newest, budget).ada([-1.0, f64::NAN, 0.5, 1e300][i % 4]),
            ];
            for policy in policies {
                let _any = policy.protected(n);
                let model: Arc<dyn CausalLm> = model();
                let Ok(mut session) = Session::new(model, Arc::new(policy)) else {
                    continue;
                };
                let read = session.prefill(&text(20), &Prefill::new(6, 2));
                fine += usize::from(read.is_ok());
                if let Ok(tokens) = session.generate(Generate::greedy(3)) {
                    tokens.for_each(drop);
                }
            }
        }
    }
    assert!(fine > 30, "{fine}");
}

#[test]
fn prompts_and_samplings_of_any_kind() {
    let sampling = Sampling::greedy();
    for hostile in [
        Sampling {
            temperature: f32::NAN,
            ..sampling
        },
        Sampling {
            temperature: -1.0,
            ..sampling
        },
        Sampling {
            top_p: f32::INFINITY,
            ..sampling
        },
        Sampling {
            min_p: -0.5,
            ..sampling
        },
        Sampling {
            repetition_penalty: 0.0,
            ..sampling
        },
    ] {
        assert!(hostile.init().is_err(), "{hostile:?}");
    }
    let hot = Sampling {
        temperature: 1e-30,
        top_k: usize::MAX,
        min_p: 1.0,
        ..sampling
    };
    let sampler = hot.init().unwrap();
    assert_eq!(argmax(&[]), None);
    assert!(sampler.sample(&[], &[]).is_err());
    assert!(sampler.sample(&[f32::NAN], &[u32::MAX]).is_err());
    assert!(sampler.sample(&[f32::NEG_INFINITY; 3], &[]).is_err());
    assert_eq!(
        sampler
            .sample(&[f32::MAX, f32::MIN], &[u32::MAX; 9])
            .unwrap(),
        0
    );
    assert!(TokenScore::of(&[], 0).is_err());
    assert!(TokenScore::of(&[1.0], u32::MAX).is_err());

    let model: Arc<dyn CausalLm> = model();
    let mut session = Session::new(
        model.clone(),
        Arc::new(Evict::new(Newest, Budget::Units(8))),
    )
    .unwrap();
    for (ids, prefill) in [
        (vec![], Prefill::new(4, 0)),
        (vec![1, u32::MAX], Prefill::new(4, 0)),
        (vec![61], Prefill::new(4, 0)),
        (vec![1; 4], Prefill::new(0, 0)),
    ] {
        assert!(session.prefill(&ids, &prefill).is_err(), "{ids:?}");
    }
    // Nothing of these was read, and it goes on.
    assert!(session.score(&[1]).is_err() || session.tokens().len() == 1);
    session
        .prefill(&[1; 4], &Prefill::new(usize::MAX, usize::MAX))
        .unwrap();

    let (compute, options) = (compute(&device()), CacheOptions::new());
    let policy = Evict::new(Newest, Budget::Units(8));
    let planned = |prompt, generated, prefill: Prefill| {
        plan(
            &spec(),
            &policy,
            &compute,
            options,
            &prefill,
            [prompt, generated],
        )
    };
    assert!(planned(0, 5, Prefill::default()).is_err());
    // No such text has positions.
    assert!(matches!(
        planned(usize::MAX, usize::MAX, Prefill::new(1, usize::MAX)),
        Err(Error::Setting { .. })
    ));
    assert!(planned(1000, usize::MAX, Prefill::new(1, 7)).is_ok());
}

#[test]
fn lists_and_rows_that_are_none() {
    assert!(Scores::wide(0, vec![vec![1.0]]).is_err());
    assert!(Scores::wide(2, vec![vec![1.0; 3]]).is_err());
    assert!(Scores::per_head(vec![vec![f32::NAN]]).is_err());
    let _any = Scores::shared(vec![1.0], usize::MAX >> 40);
    assert!(Selection::new(vec![vec![1, 1]]).is_err());
    assert!(Selection::new(vec![vec![2, 1]]).is_err());
    assert!(Rows::new(vec![0.0; 3], 2, &device()).is_err());
    assert!(Rows::new(vec![0.0; 3], 0, &device()).is_err());
    let rows = Rows::new(vec![0.0; 6], 2, &device()).unwrap();
    #[expect(clippy::reversed_empty_ranges)]
    let ranges: [Range<usize>; 3] = [2..1, 0..4, 3..usize::MAX];
    for range in ranges {
        assert!(rows.slice(range).is_err());
    }
    assert!(Rows::below(Vec::new()).is_err());
}

/// Says that queries see this.
#[derive(Debug)]
struct Seeing(Views, Needs);

impl KvCachePolicy for Seeing {
    fn name(&self) -> String {
        "seeing".into()
    }

    fn needs(&self) -> Needs {
        self.1
    }

    fn positions(&self) -> Positions {
        match self.1.far {
            true => Positions::Compact,
            false => Positions::Original,
        }
    }

    fn before(&self, _at: &Step, _queries: &Rows, _units: &LayerUnits<'_>) -> Result<Visible> {
        Ok(Visible::Chosen(self.0.clone()))
    }

    fn step(&self, _at: &Step, _units: &LayerUnits<'_>) -> Result<Verdict> {
        Ok(Verdict::keep_all())
    }
}

#[test]
fn views_of_what_is_not_there() {
    let view = View {
        window: usize::MAX,
        ..View::default()
    };
    #[expect(clippy::reversed_empty_ranges)]
    let reversed = View {
        ranges: vec![5..2],
        ..View::default()
    };
    let beyond = View {
        columns: vec![u32::MAX],
        far: vec![0..u32::MAX],
        ..View::default()
    };
    let before = Needs::NOTHING.before();
    let placed = |places| Views::new(8, vec![vec![view.clone()]; 2]).placed(places);
    for (views, needs) in [
        (Views::new(0, vec![vec![view.clone()]; 2]), before),
        (Views::new(usize::MAX, vec![vec![view.clone()]; 2]), before),
        (Views::new(4, Vec::new()), before),
        (Views::new(4, vec![Vec::new(); 2]), before),
        (Views::new(4, vec![vec![view.clone(); 9]; 3]), before),
        (Views::new(4, vec![vec![reversed; 2]; 2]), before),
        (Views::new(4, vec![vec![beyond.clone(); 2]; 2]), before),
        (
            Views::new(4, vec![vec![beyond; 2]; 2]).far_at(usize::MAX),
            before.far(),
        ),
        (placed(vec![]), before.far()),
        (placed(vec![vec![0; 7]; 2]), before.far()),
        (placed(vec![vec![8; 8]; 2]), before.far()),
        (placed(vec![vec![u32::MAX; 8]; 2]), before.far()),
        (placed(vec![vec![0; 8]; 2]), before),
    ] {
        let model: Arc<dyn CausalLm> = model();
        let policy = Seeing(views.clone(), needs);
        let mut session = Session::new(model, Arc::new(policy)).unwrap();
        let read = session.prefill(&text(8), &Prefill::new(8, 0));
        // A window of everything in one block is no mistake.
        assert_eq!(
            read.is_ok(),
            views.block() == usize::MAX,
            "{views:?}: {read:?}"
        );
    }
}
