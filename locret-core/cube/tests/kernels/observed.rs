//! What is observed of attention, against loops in double precision: heads as models have them, of several lengths, by
//! few queries and by many, in one part and in several.

use super::cube;
use locret_core::{
    Attention, Compute, DType, KvStore, LayerSpec, Observation, Observe, Queries, RopeConfig,
    RopeTable, Survey,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How far a weight, a score or a sum of weights may be off, the latter as a share of what it is.
const TOLERANCE: f64 = 5e-6;

/// Keys of ragged heads, and queries.
struct Case {
    layer: LayerSpec,
    store: Box<dyn KvStore>,
    q: Vec<f32>,
    table: RopeTable,
    /// Queries that are observed.
    count: usize,
    factors: Vec<f32>,
}

impl Case {
    fn new(
        (dim, rotary, kv_heads, group, tokens, old, count): (
            usize,
            usize,
            usize,
            usize,
            usize,
            usize,
            usize,
        ),
        dtype: DType,
        random: &mut ChaCha8Rng,
    ) -> Self {
        let layer = LayerSpec {
            index: 0,
            layers: 1,
            heads: kv_heads * group,
            kv_heads,
            head_dim: dim,
        };
        let mut numbers =
            |n: usize| -> Vec<f32> { (0..n).map(|_| random.random_range(-1.0..1.0)).collect() };
        let (width, compute) = (kv_heads * dim, cube());
        let mut rows = |n: usize| compute.rows(numbers(n * width), width).unwrap();
        let mut store = compute.store(&layer, dtype).unwrap();
        if old > 0 {
            store.append(&rows(old), &rows(old)).unwrap();
            let kept = |head: usize| {
                let stays = |unit: &u32| *unit as usize % (head + 3) != 1;
                (0..old as u32).filter(stays).collect()
            };
            let kept: Vec<Vec<u32>> = (0..kv_heads).map(kept).collect();
            store.retain(&kept).unwrap();
        }
        store.append(&rows(tokens), &rows(tokens)).unwrap();
        let config = RopeConfig::plain(10_000.0, rotary);
        Self {
            layer,
            store,
            // Scores that are far from each other, too.
            q: numbers(tokens * layer.heads * dim)
                .iter()
                .map(|x| 3.0 * x)
                .collect(),
            table: RopeTable::new(&config.frequencies(false).0, 1.0, 0..old + tokens),
            count,
            factors: numbers(count).iter().map(|x| x.abs()).collect(),
        }
    }

    fn over(&self, rotated: bool) -> Attention<'_> {
        Attention {
            layer: self.layer,
            store: &*self.store,
            scale: 1.0 / (self.layer.head_dim as f32).sqrt(),
            rotation: rotated.then_some(&self.table),
            sight: None,
        }
    }

    /// Scores of what each chosen query sees, `[count]` by query head.
    fn scores(&self, rotated: bool) -> Vec<Vec<Vec<f64>>> {
        let (layer, d) = (self.layer, self.layer.head_dim);
        let tokens = self.q.len() / (layer.heads * d);
        let of_head = |head: usize| {
            let keys = self.store.keys(head / layer.group()).unwrap();
            let mut keys = keys.into_values().unwrap();
            let half = self.table.rotary_dim() / 2;
            for (row, key) in keys.chunks_mut(d).enumerate().filter(|_| rotated) {
                for i in 0..half {
                    let at = row * half + i;
                    let (cos, sin) = (self.table.cos()[at], self.table.sin()[at]);
                    let (a, b) = (key[i], key[half + i]);
                    key[i] = a * cos - b * sin;
                    key[half + i] = b * cos + a * sin;
                }
            }
            let of_query = |token: usize| {
                let q = &self.q[(token * layer.heads + head) * d..][..d];
                let seen = keys.len() / d - tokens + token + 1;
                let score = |key: &[f32]| {
                    let terms = q.iter().zip(key);
                    let sum: f64 = terms.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    sum / (d as f64).sqrt()
                };
                keys.chunks(d).take(seen).map(score).collect()
            };
            (tokens - self.count..tokens).map(of_query).collect()
        };
        (0..layer.heads).map(of_head).collect()
    }

    fn near(&self, what: &str, found: &[Vec<f32>], due: &[Vec<f64>]) {
        assert!(
            (found.iter().map(Vec::len)).eq(due.iter().map(Vec::len)),
            "{what}"
        );
        let mut off = 0.0f64;
        for (found, due) in found.iter().flatten().zip(due.iter().flatten()) {
            if f64::from(*found) != *due {
                off = off.max((f64::from(*found) - due).abs() / due.abs().max(1.0));
            }
        }
        println!("{what}: {off:.1e} off");
        assert!(off <= TOLERANCE, "{what}: {off:e} off");
    }
}

fn softmax(scores: &[f64]) -> Vec<f64> {
    let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|x| (x - most).exp()).sum();
    scores.iter().map(|x| (x - most).exp() / sum).collect()
}

#[test]
fn observed_attention_is_what_loops_compute() {
    let mut random = ChaCha8Rng::seed_from_u64(11);
    // Features, of which some are rotated; KV heads, query heads of each, tokens, units before them, and how many of the
    // tokens are observed.
    for (case, shape) in [
        (64, 64, 3, 3, 1, 200, 1),
        (64, 64, 3, 3, 33, 90, 33),
        (64, 32, 2, 1, 70, 0, 5),
        (80, 32, 2, 1, 5, 70, 4),
        (96, 96, 2, 1, 40, 0, 40),
        (128, 128, 2, 4, 1, 150, 1),
        (128, 128, 2, 4, 19, 61, 8),
        (256, 64, 1, 8, 3, 50, 3),
        (64, 64, 1, 40, 2, 30, 2),
        // Too wide for a tile: Burn's operations.
        (512, 512, 1, 2, 2, 20, 2),
    ]
    .into_iter()
    .enumerate()
    {
        for dtype in [DType::F32, DType::F16] {
            let case_of = Case::new(shape, dtype, &mut random);
            for (rotated, parts) in [(false, 1), (true, 3)] {
                let what = format!("case {case}, {dtype}, {parts} parts");
                observed(&case_of, &what, rotated, parts);
            }
        }
    }
}

fn observed(case: &Case, what: &str, rotated: bool, parts: usize) {
    let (layer, count) = (case.layer, case.count);
    let (over, compute) = (case.over(rotated), cube().in_parts(parts));
    let q = compute.rows(case.q.clone(), layer.heads * layer.head_dim);
    let q = q.unwrap();
    let scores = case.scores(rotated);
    let lens: Vec<usize> = (0..layer.heads)
        .map(|head| case.store.len(head / layer.group()))
        .collect();
    let zeros = || lens.iter().map(|len| vec![0.0f64; *len]);
    let [mut sums, mut most, mut factored] = [(); 3].map(|()| zeros().collect::<Vec<_>>());
    let mut distances: Vec<Vec<f64>> = zeros().collect();
    let heads = 0..layer.kv_heads;
    let mut logits: Vec<Vec<f64>> = heads
        .map(|head| vec![f64::NEG_INFINITY; case.store.len(head)])
        .collect();
    for (head, queries) in scores.iter().enumerate() {
        for (scores, factor) in queries.iter().zip(&case.factors) {
            for (unit, weight) in softmax(scores).into_iter().enumerate() {
                sums[head][unit] += weight;
                distances[head][scores.len() - 1 - unit] += weight;
                most[head][unit] = most[head][unit].max(weight);
                let with = f64::from(*factor) * weight;
                factored[head][unit] = factored[head][unit].max(with);
                let largest = &mut logits[head / layer.group()][unit];
                *largest = largest.max(scores[unit]);
            }
        }
    }
    let observe = |kind: Observation| {
        let asked = Observe {
            queries: Queries::Last(count),
            what: kind,
        };
        let by = (kind == Observation::MaxWeightsByInput).then_some(&case.factors[..]);
        let observed = compute.observe(&q, &over, asked, by).unwrap();
        assert_eq!((observed.queries, observed.what), (count, kind));
        observed.per_head
    };
    for (kind, due) in [
        (Observation::Weights, &sums),
        (Observation::NearWeights, &sums),
        (Observation::MaxWeights, &most),
        (Observation::MaxWeightsByInput, &factored),
        (Observation::MaxLogits, &logits),
    ] {
        case.near(&format!("{kind:?}, {what}"), &observe(kind), due);
    }
    let Survey {
        units,
        distances: found,
    } = compute.survey(&q, &over, count).unwrap();
    case.near(&format!("survey by unit, {what}"), &units, &sums);
    case.near(&format!("survey by distance, {what}"), &found, &distances);
}
