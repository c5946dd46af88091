//! Keys that are turned again and again stay what they were.

use crate::{device, policies::Newest};
use locret_core::{
    Budget, CacheOptions, DecodeEviction, Evict, Kernels, Pass, Phase, Positions, Qkv, Rows,
    SequenceCache, compute, conformance::small_spec,
};
use std::sync::Arc;

const DIM: usize = 64;
const BUDGET: usize = 32;
const SINKS: usize = 16;
const EVICTIONS: usize = 1000;
/// As far as the largest keys of real models reach.
const SIZE: f32 = 10.0;

/// `tokens` rows that are the same for the same seed.
fn rows(tokens: usize, seed: usize) -> Vec<f32> {
    let number = |i: usize| {
        let x = ((i + 1) as u64 * 0x9E37_79B9_7F4A_7C15) ^ (seed as u64) << 32;
        let x = (x ^ x >> 29).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        (x >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..tokens * DIM).map(number).collect()
}

/// Row `at` rotated to its position, in 64 bits.
fn rotated(row: &[f32], at: usize) -> Vec<f64> {
    let half = DIM / 2;
    let mut out = vec![0.0; DIM];
    for i in 0..half {
        let frequency = 1e4f64.powf(-2.0 * i as f64 / DIM as f64) as f32;
        let (sin, cos) = f64::from(at as f32 * frequency).sin_cos();
        let (a, b) = (f64::from(row[i]), f64::from(row[i + half]));
        out[i] = a * cos - b * sin;
        out[i + half] = b * cos + a * sin;
    }
    out
}

/// What attention over units at positions `0..n` is, in 64 bits.
fn attention(query: &[f32], units: &[(Vec<f32>, Vec<f32>)]) -> Vec<f64> {
    let query = rotated(query, units.len() - 1);
    let logit = |(at, (key, _)): (usize, &(Vec<f32>, Vec<f32>))| {
        let dot: f64 = rotated(key, at)
            .iter()
            .zip(&query)
            .map(|(a, b)| a * b)
            .sum();
        dot / (DIM as f64).sqrt()
    };
    let logits: Vec<f64> = units.iter().enumerate().map(logit).collect();
    let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = logits.iter().map(|l| (l - most).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let mut out = vec![0.0; DIM];
    for (weight, (_, value)) in weights.iter().zip(units) {
        for (out, v) in out.iter_mut().zip(value) {
            *out += weight / sum * f64::from(*v);
        }
    }
    out
}

/// Compact positions move with every eviction, so that keys which are kept rotated while text is
/// generated are rotated back and anew each time.
#[test]
fn a_thousand_evictions_leave_keys_as_they_were() {
    let mut spec = small_spec(1, 1, DIM);
    spec.layers = 1;
    spec.layer_input = false;
    for kernels in [Kernels::Auto, Kernels::Operations] {
        let policy = Evict::new(Newest, Budget::Units(BUDGET))
            .sinks(SINKS)
            .with_positions(Positions::Compact)
            .while_decoding(DecodeEviction::Every(1));
        let options = CacheOptions::new().kernels(kernels);
        let mut cache =
            SequenceCache::new(&spec, Arc::new(policy), &compute(&device()), options).unwrap();
        let mut units: Vec<(Vec<f32>, Vec<f32>)> = Vec::new();
        let mut worst = 0.0f64;
        for step in 0..=EVICTIONS {
            let (phase, tokens) = match step {
                0 => (Phase::Prefill { last: true }, BUDGET),
                _ => (Phase::Decode, 1),
            };
            let keys: Vec<f32> = rows(tokens, 3 * step).iter().map(|x| SIZE * x).collect();
            let (values, queries) = (rows(tokens, 3 * step + 1), rows(tokens, 3 * step + 2));
            let pairs = keys.chunks(DIM).zip(values.chunks(DIM));
            units.extend(pairs.map(|(k, v)| (k.to_vec(), v.to_vec())));
            let expected = attention(&queries[(tokens - 1) * DIM..], &units);
            let rows = |x| Rows::new(x, DIM, &device()).unwrap();
            let mut pass = Pass::new([cache.step(phase, tokens, 0)]).unwrap();
            let qkv = Qkv::new(rows(queries), rows(keys), rows(values));
            let found = pass.attend(0, qkv).unwrap().into_values().unwrap();
            pass.finish(None).unwrap();
            if step > 0 {
                units.remove(SINKS);
            }
            for (a, b) in found[(tokens - 1) * DIM..].iter().zip(&expected) {
                worst = worst.max((f64::from(*a) - b).abs());
            }
        }
        assert_eq!(cache.len(0, 0), BUDGET);
        assert_eq!(
            cache.positions(0, 0)[SINKS..][0] as usize,
            EVICTIONS + SINKS
        );
        assert!(worst < 1e-4, "{kernels:?}: attention is off by {worst}");
        // After an eviction the store holds them un-rotated.
        let keys = cache.store(0).keys(0).unwrap().into_values().unwrap();
        let expected: Vec<f32> = units.iter().flat_map(|unit| unit.0.clone()).collect();
        let off = |(a, b): (&f32, &f32)| (a - b).abs();
        let drift = keys.iter().zip(&expected).map(off).fold(0.0, f32::max);
        assert!(
            drift < 1e-4 * SIZE,
            "{kernels:?}: keys up to {SIZE} have drifted by {drift}"
        );
        println!("{kernels:?}: attention {worst:.1e}, keys {drift:.1e}");
    }
}
