//! MInference against the authors' own code, and through the conformance suite.

use burn::tensor::Device;
use locret_core::{
    Budget, CacheOptions, DType, KvCachePolicy, LayerUnits, ModelSpec, Needs, Pass, Phase,
    Positions, Prefill, Qkv, QuantLayout, Quantization, Result, RopeConfig, RopeScaling, Rows,
    SequenceCache, Session, Step, Verdict, View, Visible, compute,
    conformance::{Decision, PolicyCheck, RandomModel, Recording, check_policy, small_spec},
};
use locret_policies::{
    Full, MInference, Method, PolicyConfig, PutAway, Quantized, Sparse,
    minference::{Found, Pattern, Patterns, recalled, search_layer},
};
use proptest::prelude::*;
use serde::Deserialize;
use std::sync::{Arc, Mutex};

/// Numbers in -1..1 by a hash of their place, as `make.py` makes them.
fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let number = |place: usize| {
        let mut x = (place as u64 + (seed << 20)) as u32 as u64;
        for (shift, factor) in [(16, 0x7feb_352d), (15, 0x846c_a68b), (16, 1)] {
            x = ((x ^ (x >> shift)) * factor) & 0xffff_ffff;
        }
        ((x >> 8) as f64 / f64::from(1 << 23) - 1.0) as f32
    };
    (0..count).map(number).collect()
}

/// Queries, keys and values `[heads][n][d]`.
fn inputs(heads: usize, n: usize, d: usize, seed: u64, near: f64, factor: f32) -> [Vec<f32>; 3] {
    let mut parts = [0, 1, 2].map(|i| numbers(heads * n * d, 3 * seed + i));
    for (part, x) in parts[..2].iter_mut().enumerate() {
        for (at, x) in x.iter_mut().enumerate() {
            let (feature, token) = (at % d, at / d % n);
            if part == 1 && token % 97 == 13 {
                *x *= 2.0;
            }
            let pair = feature % (d / 2);
            let angle = token as f64 * near / (1.0 + 3.0 * pair as f64);
            let turned = if feature < d / 2 {
                angle.cos()
            } else {
                angle.sin()
            };
            *x = factor * (*x + 2.0 * turned as f32);
        }
    }
    parts
}

/// `[tokens, heads * d]` of `[heads][tokens][d]`.
fn by_token(x: &[f32], heads: usize, d: usize) -> Vec<f32> {
    let n = x.len() / heads / d;
    let row = |at: usize| &x[(at % heads * n + at / heads) * d..][..d];
    (0..n * heads).flat_map(row).copied().collect()
}

/// A layer whose rotation turns nothing.
fn spec(heads: usize, kv_heads: usize, d: usize) -> ModelSpec {
    ModelSpec::new(1, heads, kv_heads, heads * d, 16)
        .with_head_dim(d)
        .with_rope(RopeConfig {
            theta: 10_000.0,
            rotary_dim: d,
            scaling: RopeScaling::Linear { factor: 1e30 },
        })
        .with_softmax_scale(1.0 / (d as f32).sqrt())
}

/// Attention of queries, keys and values `[heads][n][d]` in steps of so many tokens: the output `[n, heads * d]`
/// and what was decided in each step.
fn attend(
    policy: Arc<dyn KvCachePolicy>,
    [heads, kv_heads, d]: [usize; 3],
    qkv: &[Vec<f32>; 3],
    steps: &[usize],
) -> Result<(Vec<f32>, Vec<Decision>)> {
    let spec = spec(heads, kv_heads, d);
    let compute = compute(&Device::flex());
    let recording = Arc::new(Recording::new(policy));
    let mut cache =
        SequenceCache::new(&spec, recording.clone(), &compute, CacheOptions::default())?;
    let total = steps.iter().sum();
    let all = [heads, kv_heads, kv_heads];
    let all: Vec<Vec<f32>> = (qkv.iter().zip(all))
        .map(|(x, heads)| by_token(x, heads, d))
        .collect();
    let (mut out, mut first) = (Vec::new(), 0);
    for t in steps {
        let part = |which: usize, width: usize| -> Result<Rows> {
            compute.rows(
                all[which][first * width..(first + t) * width].to_vec(),
                width,
            )
        };
        let qkv = Qkv::new(
            part(0, heads * d)?,
            part(1, kv_heads * d)?,
            part(2, kv_heads * d)?,
        );
        let last = first + t == total;
        let mut pass = Pass::new([cache.step(Phase::Prefill { last }, *t, total)])?;
        out.extend(pass.attend(0, qkv)?.into_values()?);
        pass.finish(None)?;
        first += t;
    }
    Ok((out, recording.decisions()))
}

#[derive(Deserialize)]
struct Golden {
    vertical_slash: Vec<VerticalSlash>,
    block_sparse: Vec<BlockSparse>,
    search: Search,
}

#[derive(Deserialize)]
struct VerticalSlash {
    heads: usize,
    tokens: usize,
    dim: usize,
    seed: u64,
    vertical: usize,
    slash: usize,
    columns: Vec<Vec<u32>>,
    diagonals: Vec<Vec<usize>>,
    tiles: Vec<Vec<Tile>>,
    every: usize,
    out: Vec<Vec<f32>>,
}

#[derive(Deserialize)]
struct Tile {
    blocks: Vec<usize>,
    columns: Vec<usize>,
}

#[derive(Deserialize)]
struct BlockSparse {
    heads: usize,
    tokens: usize,
    dim: usize,
    seed: u64,
    blocks: usize,
    every: usize,
    out: Vec<Vec<f32>>,
}

#[derive(Deserialize)]
struct Search {
    tokens: usize,
    dim: usize,
    heads: Vec<Searched>,
}

#[derive(Deserialize)]
struct Searched {
    seed: u64,
    near: f64,
    factor: f32,
    pattern: (String, usize, usize),
    score: f64,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("golden/minference/golden.json")).unwrap()
}

/// Compares every `every`th row of `[n, heads * d]` with `[heads][rows * d]`.
fn same_output(found: &[f32], due: &[Vec<f32>], d: usize, every: usize) {
    let heads = due.len();
    let mut most = 0f32;
    for (row, found) in found.chunks(heads * d).step_by(every).enumerate() {
        for (head, due) in due.iter().enumerate() {
            let pairs = found[head * d..(head + 1) * d].iter().zip(&due[row * d..]);
            most = pairs.map(|(a, b)| (a - b).abs()).fold(most, f32::max);
        }
    }
    assert!(most <= 1e-5, "outputs are off by {most:.1e}");
}

/// Which of `n` units a view names.
fn named(view: &View, n: usize) -> Vec<bool> {
    let single = view.columns.iter().map(|unit| *unit..unit + 1);
    let ranges: Vec<_> = view.ranges.iter().cloned().chain(single).collect();
    let of = |unit: usize| ranges.iter().any(|r| r.contains(&(unit as u32)));
    (0..n).map(of).collect()
}

#[test]
fn columns_and_diagonals_are_the_authors() {
    for case in golden().vertical_slash {
        let (n, d) = (case.tokens, case.dim);
        let qkv = inputs(case.heads, n, d, case.seed, 1.0, 1.0);
        let pattern = Pattern::VerticalSlash {
            vertical: case.vertical,
            slash: case.slash,
        };
        let policy = Arc::new(MInference::new(Patterns::uniform(pattern)));
        let (out, decisions) = attend(policy, [case.heads, case.heads, d], &qkv, &[n]).unwrap();
        same_output(&out, &case.out, d, case.every);
        let views = match &decisions[0].visible {
            Visible::Chosen(views) => views,
            // A text that is no longer than the diagonals are many.
            _ => {
                assert!(case.slash.max(case.vertical) >= n);
                continue;
            }
        };
        let lists = views.lists().iter().zip(&case.tiles).zip(&case.columns);
        for (head, ((views, tiles), columns)) in lists.enumerate() {
            assert_eq!(views.len(), tiles.len());
            // The last tile comes after all columns.
            assert_eq!(&views[views.len() - 1].columns, columns);
            assert_eq!(case.diagonals[head].len(), case.slash.min(n));
            for (at, (view, tile)) in views.iter().zip(tiles).enumerate() {
                let end = ((at + 1) * 64).min(n);
                let mut due = vec![false; n];
                for block in &tile.blocks {
                    due[(*block).min(n)..(block + 64).min(n)].fill(true);
                }
                tile.columns.iter().for_each(|unit| due[*unit] = true);
                assert_eq!(named(view, n)[..end], due[..end], "head {head}, tile {at}");
            }
        }
    }
}

#[test]
fn blocks_are_the_authors() {
    for case in golden().block_sparse {
        let (n, d) = (case.tokens, case.dim);
        let qkv = inputs(case.heads, n, d, case.seed, 1.0, 1.0);
        let blocks = Pattern::BlockSparse {
            blocks: case.blocks,
        };
        let policy = Arc::new(MInference::new(Patterns::uniform(blocks)));
        let (out, _) = attend(policy, [case.heads, case.heads, d], &qkv, &[n]).unwrap();
        same_output(&out, &case.out, d, case.every);
    }
}

/// Keeps everything, and searches in the only layer there is.
#[derive(Debug, Default)]
struct Searching(Mutex<Vec<Found>>);

impl KvCachePolicy for Searching {
    fn name(&self) -> String {
        "searching".into()
    }

    fn needs(&self) -> Needs {
        Needs::NOTHING.before()
    }

    fn before(&self, _at: &Step, queries: &Rows, units: &LayerUnits<'_>) -> Result<Visible> {
        *self.0.lock().unwrap() = search_layer(units, queries, 2500)?;
        Ok(Visible::All)
    }

    fn step(&self, _at: &Step, _units: &LayerUnits<'_>) -> Result<Verdict> {
        Ok(Verdict::keep_all())
    }
}

#[test]
fn the_search_finds_what_the_authors_find() {
    let Search { tokens, dim, heads } = golden().search;
    let mut all = [Vec::new(), Vec::new(), Vec::new()];
    for head in &heads {
        let parts = inputs(1, tokens, dim, head.seed, head.near, head.factor);
        for (all, part) in all.iter_mut().zip(parts) {
            all.extend(part);
        }
    }
    let policy = Arc::new(Searching::default());
    let n = heads.len();
    attend(policy.clone(), [n, n, dim], &all, &[tokens]).unwrap();
    let found = policy.0.lock().unwrap();
    let mut kinds = Vec::new();
    for (found, due) in found.iter().zip(&heads) {
        let (vertical, slash) = (due.pattern.1, due.pattern.2);
        assert_eq!(due.pattern.0, "vertical_and_slash");
        assert_eq!(found.pattern, Pattern::VerticalSlash { vertical, slash });
        let off = (found.recalled - due.score).abs();
        assert!(off <= 1e-5, "{found:?} for {}", due.score);
        kinds.push((vertical, slash));
    }
    assert_eq!(found.len(), n);
    kinds.dedup();
    assert!(kinds.len() > 2, "{kinds:?}");
}

#[test]
fn everything_conforms() {
    let patterns = [
        Pattern::VerticalSlash {
            vertical: 30,
            slash: 100,
        },
        Pattern::VerticalSlash {
            vertical: 35,
            slash: 50,
        },
        Pattern::AShape { init: 3, local: 20 },
        Pattern::BlockSparse { blocks: 1 },
    ];
    for (index, pattern) in patterns.into_iter().enumerate() {
        let check = PolicyCheck {
            seeds: 10 * index as u64..10 * index as u64 + 5,
            max_tokens: 260,
            ..PolicyCheck::default()
        };
        check_policy(&Device::flex(), &check, |case| {
            let table = match case.budget < 1 << 20 {
                true => Patterns::uniform(pattern),
                // As if nothing were sparse.
                false => Patterns::default(),
            };
            Arc::new(MInference::new(table).with_positions(case.positions))
        })
        .unwrap_or_else(|e| panic!("{pattern:?}: {e}"));
    }
    let check = PolicyCheck {
        seeds: 50..55,
        max_tokens: 260,
        dense: false,
        dtypes: vec![DType::F32],
        tolerance: 0.2,
        store_tolerance: 0.03,
        ..PolicyCheck::default()
    };
    check_policy(&Device::flex(), &check, |case| {
        let table = match case.budget < 1 << 20 {
            true => Patterns::uniform(patterns[case.seed as usize % patterns.len()]),
            false => Patterns::default(),
        };
        let config = Quantization {
            bits: 8,
            layout: QuantLayout::PerToken,
            group: 16,
            residual: 4,
            first: 2,
            hadamard: true,
        };
        let policy = MInference::new(table).with_positions(case.positions);
        Arc::new(Quantized::new(policy, config))
    })
    .unwrap();
}

/// Where the last 64 queries of a step look, in plain loops: sums by unit and by distance.
fn survey(q: &[f32], keys: &[f32], n: usize, t: usize, d: usize) -> [Vec<f64>; 2] {
    let mut sums = [vec![0.0; n], vec![0.0; n]];
    for own in n - t.min(64)..n {
        let logit = |unit: usize| {
            let pairs = q[own * d..(own + 1) * d].iter().zip(&keys[unit * d..]);
            let dot: f64 = pairs.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            dot / (d as f64).sqrt()
        };
        let logits: Vec<f64> = (0..=own).map(logit).collect();
        let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = logits.iter().map(|x| (x - top).exp()).sum();
        for (unit, x) in logits.iter().enumerate() {
            let weight = (x - top).exp() / sum;
            sums[0][unit] += weight;
            sums[1][own - unit] += weight;
        }
    }
    sums
}

/// The largest, of which the first few are some; with a gap to the next one, or nothing.
fn clear(sums: &[f64], keep: usize, forced: usize) -> Option<Vec<usize>> {
    let mut order: Vec<usize> = (forced..sums.len()).collect();
    order.sort_by(|a, b| sums[*b].total_cmp(&sums[*a]));
    let rest = keep.saturating_sub(forced).min(order.len());
    let gap = match (rest.checked_sub(1).map(|i| order[i]), order.get(rest)) {
        (Some(last), Some(next)) => sums[last] - sums[*next],
        _ => 1.0,
    };
    let mut chosen: Vec<usize> = (0..forced.min(keep).min(sums.len())).collect();
    chosen.extend(&order[..rest]);
    chosen.sort_unstable();
    (gap > 1e-5).then_some(chosen)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn each_chunk_is_judged_by_its_own_last_queries(
        kv_heads in 1usize..3,
        group in 1usize..4,
        steps in prop::collection::vec(2usize..230, 1..4),
        vertical in 30usize..80,
        slash in 100usize..160,
        seed in 0u64..1000,
    ) {
        let (d, n) = (8, steps.iter().sum::<usize>());
        let heads = kv_heads * group;
        let [q, ..] = inputs(heads, n, d, seed, 1.0, 1.0);
        let [_, k, v] = inputs(kv_heads, n, d, seed, 1.0, 1.0);
        let pattern = Pattern::VerticalSlash { vertical, slash };
        let policy = Arc::new(MInference::new(Patterns::uniform(pattern)));
        let qkv = [q, k, v];
        let shape = [heads, kv_heads, d];
        let (out, decisions) = attend(policy, shape, &qkv, &steps).unwrap();
        judged_by_what_is_held(shape, &qkv, &out, &decisions, [vertical, slash])?;
    }

    #[test]
    fn a_bounded_cache_is_judged_by_what_it_holds(
        kv_heads in 1usize..3,
        group in 1usize..4,
        steps in prop::collection::vec(2usize..150, 2..5),
        vertical in 30usize..60,
        slash in 100usize..120,
        budget in 40usize..180,
        ada in prop::option::of(Just(0.2)),
        bits in prop::option::of(Just(8)),
        compact in any::<bool>(),
        seed in 0u64..1000,
    ) {
        let (d, n) = (8, steps.iter().sum::<usize>());
        let heads = kv_heads * group;
        let [q, ..] = inputs(heads, n, d, seed, 1.0, 1.0);
        let [_, k, v] = inputs(kv_heads, n, d, seed, 1.0, 1.0);
        let positions = if compact { Positions::Compact } else { Positions::Original };
        let mut config = PolicyConfig::new(Method::KeyNorm)
            .budget(Budget::Units(budget))
            .positions(positions);
        config.ada = ada;
        (config.sparse, config.vertical, config.slash) = (true, Some(vertical), Some(slash));
        config.quantize = bits.map(|bits| Quantization { group: 8, residual: n, ..Quantization::bits(bits) });
        let shape = [heads, kv_heads, d];
        let policy = config.build(&spec(heads, kv_heads, d), &*compute(&Device::flex())).unwrap();
        let qkv = [q, k, v];
        let (out, decisions) = attend(policy, shape, &qkv, &steps).unwrap();
        let held = decisions[1..].iter().map(|d| d.before[0].len() - d.step.incoming).max();
        prop_assert!(ada.is_some() || held.unwrap() <= budget);
        judged_by_what_is_held(shape, &qkv, &out, &decisions, [vertical, slash])?;
    }
}

/// What each step's queries see is what plain loops find in the units that the heads hold, and the outputs `[n, heads * d]`
/// are attention to nothing else.
fn judged_by_what_is_held(
    [heads, kv_heads, d]: [usize; 3],
    qkv: &[Vec<f32>; 3],
    out: &[f32],
    decisions: &[Decision],
    [vertical, slash]: [usize; 2],
) -> std::result::Result<(), TestCaseError> {
    let (group, n) = (heads / kv_heads, qkv[0].len() / heads / d);
    let rows = |x: &[f32], of: usize, at: &[u32]| -> Vec<f32> {
        let row = |at: &u32| &x[(of * n + *at as usize) * d..][..d];
        at.iter().flat_map(row).copied().collect()
    };
    let mut end = 0;
    for decision in decisions {
        let t = decision.step.incoming;
        end += t;
        for head in 0..heads {
            let held = &decision.before[head / group];
            let [q, k, v] = [(0, head), (1, head / group), (2, head / group)]
                .map(|(part, of)| rows(&qkv[part], of, held));
            let all = slash.max(vertical) >= held.len();
            let views = match &decision.visible {
                Visible::Chosen(views) => Some(views).filter(|_| !all),
                _ => {
                    prop_assert!(all);
                    None
                }
            };
            if let Some(views) = views {
                let [by_unit, by_distance] = survey(&q, &k, held.len(), t, d);
                if let Some(columns) = clear(&by_unit, vertical, 30) {
                    let last = &views.lists()[head][views.lists()[head].len() - 1];
                    let found: Vec<usize> = last.columns.iter().map(|u| *u as usize).collect();
                    prop_assert_eq!(found, columns);
                }
                let diagonals = clear(&by_distance, slash, 100).unwrap_or_default();
                for (token, own) in (held.len() - t..held.len()).enumerate() {
                    let named = named(views.of(head, heads, token), held.len());
                    for distance in diagonals.iter().filter(|distance| **distance <= own) {
                        prop_assert!(named[own - distance], "{} of {}", distance, own);
                    }
                }
            }
            for (token, own) in (held.len() - t..held.len()).enumerate() {
                let view = views.map(|views| views.of(head, heads, token));
                let seen = match view {
                    Some(view) => named(view, held.len()),
                    None => vec![true; held.len()],
                };
                let due = attention(&q[own * d..], &k, &v, d, |unit| unit <= own && seen[unit]);
                let row = (end - t + token) * heads + head;
                let off = (due.iter().zip(&out[row * d..]))
                    .map(|(a, b)| (a - f64::from(*b)).abs())
                    .fold(0.0, f64::max);
                prop_assert!(off < 1e-4, "off by {}", off);
            }
        }
    }
    Ok(())
}

/// What a query gets of the units that it sees.
fn attention(q: &[f32], k: &[f32], v: &[f32], d: usize, sees: impl Fn(usize) -> bool) -> Vec<f64> {
    let units: Vec<usize> = (0..k.len() / d).filter(|unit| sees(*unit)).collect();
    let logit = |unit: &usize| -> f64 {
        let pairs = q.iter().zip(&k[unit * d..(unit + 1) * d]);
        let dot: f64 = pairs.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        dot / (d as f64).sqrt()
    };
    let logits: Vec<f64> = units.iter().map(logit).collect();
    let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|x| (x - top).exp()).sum();
    let mut out = vec![0.0; d];
    for (unit, x) in units.iter().zip(&logits) {
        for (out, v) in out.iter_mut().zip(&v[unit * d..]) {
            *out += (x - top).exp() / sum * f64::from(*v);
        }
    }
    out
}

#[test]
fn bounded_caches_conform_with_prompts_that_see_a_part() {
    let patterns = [
        Pattern::VerticalSlash {
            vertical: 30,
            slash: 50,
        },
        Pattern::AShape { init: 3, local: 20 },
        Pattern::BlockSparse { blocks: 1 },
    ];
    let methods = [Method::Window, Method::H2o, Method::SnapKv, Method::KeyNorm];
    for bits in [None, Some(8), Some(4)] {
        for (index, method) in methods.into_iter().enumerate() {
            let check = PolicyCheck {
                seeds: 4 * index as u64..4 * index as u64 + 4,
                max_tokens: 200,
                dense: bits.is_none(),
                dtypes: match bits {
                    None => PolicyCheck::default().dtypes,
                    Some(_) => vec![DType::F32],
                },
                tolerance: match bits {
                    None => PolicyCheck::default().tolerance,
                    Some(8) => 0.2,
                    Some(_) => 1.0,
                },
                store_tolerance: match bits {
                    None => PolicyCheck::default().store_tolerance,
                    Some(8) => 0.03,
                    Some(_) => 0.1,
                },
                ..PolicyCheck::default()
            };
            check_policy(&Device::flex(), &check, |case| {
                let mut config = PolicyConfig::new(method)
                    .budget(Budget::Units(case.budget))
                    .positions(case.positions);
                config.decode = Some(case.decode);
                let policy = config.build_for(case.model).unwrap();
                let table = match case.budget < 1 << 20 {
                    true => Patterns::uniform(patterns[case.seed as usize % patterns.len()]),
                    // As if nothing were sparse.
                    false => Patterns::default(),
                };
                let policy: Arc<dyn KvCachePolicy> = Arc::new(Sparse::new(policy, table));
                match bits {
                    Some(bits) => Arc::new(Quantized::new(
                        policy,
                        Quantization {
                            group: 16,
                            residual: 4,
                            ..Quantization::bits(bits)
                        },
                    )),
                    None => policy,
                }
            })
            .unwrap_or_else(|e| panic!("{method}, {bits:?} bits: {e}"));
        }
    }
}

#[test]
fn what_chooses_itself_what_queries_see_cannot_be_inside() {
    let spec = small_spec(4, 2, 16);
    let window = PolicyConfig::new(Method::Window).budget(Budget::Units(20));
    let window = window.build(&spec, &*compute(&Device::flex())).unwrap();
    let check = |inner: Arc<dyn KvCachePolicy>| {
        Sparse::new(inner, Patterns::default()).validate(&spec, &Prefill::new(16, 0))
    };
    check(window.clone()).unwrap();
    check(Arc::new(PutAway::new(window))).unwrap_err();
    check(Arc::new(MInference::default())).unwrap_err();
    // A table for a model of other layers.
    let mut table = Patterns::default();
    table.push([(Pattern::AShape { init: 1, local: 2 }, 1.0)]);
    let wrong = Sparse::new(Full::new(), table);
    wrong.validate(&spec, &Prefill::new(16, 0)).unwrap_err();
}

/// Keeps everything, and measures how much of attention lies in what another policy shows.
#[derive(Debug)]
struct Recalling(MInference, Mutex<Vec<f64>>);

impl KvCachePolicy for Recalling {
    fn name(&self) -> String {
        "recalling".into()
    }

    fn needs(&self) -> Needs {
        self.0.needs()
    }

    fn before(&self, at: &Step, queries: &Rows, units: &LayerUnits<'_>) -> Result<Visible> {
        let visible = self.0.before(at, queries, units)?;
        if let Visible::Chosen(views) = &visible {
            *self.1.lock().unwrap() = recalled(units, queries, views, 1)?;
        }
        Ok(visible)
    }

    fn step(&self, _at: &Step, _units: &LayerUnits<'_>) -> Result<Verdict> {
        Ok(Verdict::keep_all())
    }
}

#[test]
fn recalled_attention_is_that_of_plain_loops() {
    let (heads, kv_heads, d, n) = (4, 2, 8, 300);
    let [q, ..] = inputs(heads, n, d, 7, 1.0, 1.0);
    let [_, k, v] = inputs(kv_heads, n, d, 7, 1.0, 1.0);
    let a_shape = Pattern::AShape { init: 5, local: 30 };
    let policy = Arc::new(Recalling(
        MInference::new(Patterns::uniform(a_shape)),
        Mutex::default(),
    ));
    let qkv = [q, k, v];
    attend(policy.clone(), [heads, kv_heads, d], &qkv, &[n]).unwrap();
    let found = policy.1.lock().unwrap();
    for (head, found) in found.iter().enumerate() {
        let (q, k) = (&qkv[0][head * n * d..], &qkv[1][head / 2 * n * d..]);
        let mut due = 0.0;
        for own in 0..n {
            // A step of one query has nobody else's weights.
            let [weights, _] = survey(q, k, own + 1, 1, d);
            let seen = |unit: &usize| *unit < 5 || own - unit < 30;
            due += (0..=own)
                .filter(seen)
                .map(|unit| weights[unit])
                .sum::<f64>()
                / n as f64;
        }
        assert!((found - due).abs() < 1e-5, "{found} for {due}");
    }
}

#[test]
fn only_prompts_are_sparse_and_whatever_the_cache_holds() {
    let model = Arc::new(RandomModel::new(small_spec(4, 2, 16), 3, &Device::flex()).unwrap());
    let a_shape = Pattern::AShape { init: 1, local: 4 };
    let policy = Arc::new(MInference::new(Patterns::uniform(a_shape)));
    let recording = Arc::new(Recording::new(policy.clone()));
    let mut session = Session::new(model.clone(), recording.clone()).unwrap();
    let ids: Vec<u32> = (0..40).map(|i| i * 7 % 50).collect();
    session.prefill(&ids, &Prefill::new(16, 3)).unwrap();
    session.score(&ids[..5]).unwrap();
    session
        .generate(locret_core::Generate::greedy(2))
        .unwrap()
        .for_each(|t| {
            t.unwrap();
        });
    for decision in recording.decisions() {
        let sparse = matches!(decision.visible, Visible::Chosen(_));
        let reads = matches!(decision.step.phase, Phase::Prefill { .. } | Phase::Tail);
        assert_eq!(sparse, reads, "{:?}", decision.step);
    }
    let mut bounded = PolicyConfig::new(Method::Window).budget(Budget::Units(8));
    bounded.positions = Some(Positions::Original);
    let bounded = bounded
        .build(&small_spec(4, 2, 16), &*compute(&Device::flex()))
        .unwrap();
    let mut session = Session::new(model, bounded).unwrap();
    session.prefill(&ids, &Prefill::new(16, 0)).unwrap();
    let recording = Arc::new(Recording::new(policy));
    session.cache_mut().set_policy(recording.clone()).unwrap();
    session.prefill(&ids, &Prefill::new(16, 0)).unwrap();
    for decision in recording.decisions() {
        // A turn begins with nothing to read.
        let sparse = matches!(decision.visible, Visible::Chosen(_));
        assert_eq!(sparse, decision.step.incoming > 0, "{:?}", decision.step);
    }
}
