//! Small policies of every kind that the contract allows.

use locret_core::{
    Fold, Keep, KvCachePolicy, KvStore, LayerSpec, LayerUnits, Needs, Observation, Placement,
    Positions, Quantization, QuantizedStore, Queries, Result, Rows, Scorer, Scores, Step, Verdict,
};

/// Any policy over a store of codes.
#[derive(Debug)]
pub(crate) struct Coded<P>(pub(crate) P, pub(crate) Quantization);

impl<P: KvCachePolicy> KvCachePolicy for Coded<P> {
    fn name(&self) -> String {
        format!("coded {}", self.0.name())
    }

    fn needs(&self) -> Needs {
        self.0.needs()
    }

    fn positions(&self) -> Positions {
        self.0.positions()
    }

    fn carries(&self) -> Option<String> {
        self.0.carries()
    }

    fn carried_width(&self, layer: &LayerSpec) -> usize {
        self.0.carried_width(layer)
    }

    fn store(&self, layer: &LayerSpec, place: &Placement) -> Result<Box<dyn KvStore>> {
        QuantizedStore::boxed(layer, place, self.1)
    }

    fn limit(&self, layer: &LayerSpec, total: usize) -> Option<usize> {
        self.0.limit(layer, total)
    }

    fn decode_slack(&self) -> Option<usize> {
        self.0.decode_slack()
    }

    fn step(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Verdict> {
        self.0.step(at, units)
    }

    fn steps(&self, at: &[Step], units: &[LayerUnits<'_>]) -> Result<Vec<Verdict>> {
        self.0.steps(at, units)
    }
}

/// Keys with a small norm are kept; nothing is carried.
#[derive(Debug)]
pub(crate) struct KeyNorm;

impl Scorer for KeyNorm {
    fn name(&self) -> String {
        "key-norm".into()
    }

    fn score(&self, _at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        units.score_heads(|head| Ok(-units.keys(head)?.into_tensor().square().sum_dim(1).sqrt()))
    }
}

/// The newest are kept.
#[derive(Debug)]
pub(crate) struct Newest;

impl Scorer for Newest {
    fn name(&self) -> String {
        "newest".into()
    }

    fn score(&self, _at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        let of = |head| units.positions(head).iter().map(|p| *p as f32).collect();
        Scores::per_head((0..units.kv_heads()).map(of).collect())
    }
}

/// By chance, the same chance for a position wherever it stands; many equal scores.
#[derive(Debug)]
pub(crate) struct Chance(pub(crate) u64);

impl Scorer for Chance {
    fn name(&self) -> String {
        "chance".into()
    }

    fn score(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        let chance = |head: usize, position: u32| {
            let mut x = self.0 ^ (at.layer.index as u64) << 48 ^ (head as u64) << 40;
            x ^= u64::from(position);
            x = x.wrapping_mul(0x9E37_79B9_7F4A_7C15);
            ((x ^ x >> 31).wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 60) as f32
        };
        let of = |head| {
            units
                .positions(head)
                .iter()
                .map(|p| chance(head, *p))
                .collect()
        };
        Scores::per_head((0..units.kv_heads()).map(of).collect())
    }
}

/// A score at birth from queries, keys and values, carried ever after.
#[derive(Debug)]
pub(crate) struct Birth;

impl Birth {
    /// By token, the scores of all KV heads.
    fn of_new(at: &Step, units: &LayerUnits<'_>) -> Result<Vec<f32>> {
        let LayerSpec {
            heads,
            kv_heads,
            head_dim: d,
            ..
        } = at.layer;
        let Some(qkv) = units.qkv() else {
            return Ok(Vec::new());
        };
        let (q, k, v) = (qkv.q.values()?, qkv.k.values()?, qkv.v.values()?);
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let score = |i: usize| {
            let (token, head) = (i / kv_heads, i % kv_heads);
            let own = (token * kv_heads + head) * d;
            let query = (token * heads + head * at.layer.group()) * d;
            let (k, q) = (&k[own..own + d], &q[query..query + d]);
            dot(q, k) + dot(k, &v[own..own + d])
        };
        Ok((0..units.incoming() * kv_heads).map(score).collect())
    }
}

impl Scorer for Birth {
    fn name(&self) -> String {
        "birth".into()
    }

    fn needs(&self) -> Needs {
        Needs::NOTHING.qkv()
    }

    fn carries(&self) -> bool {
        true
    }

    fn born(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Option<Rows>> {
        let new = Self::of_new(at, units)?;
        Rows::new(new, units.kv_heads(), units.compute().device()).map(Some)
    }

    fn score(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        let kv_heads = units.kv_heads();
        let mut all: Vec<Vec<f32>> = (0..kv_heads).map(|h| units.carried(h).to_vec()).collect();
        for token in Self::of_new(at, units)?.chunks_exact(kv_heads) {
            all.iter_mut().zip(token).for_each(|(all, x)| all.push(*x));
        }
        Scores::per_head(all)
    }
}

/// Tokens that were hard to predict are kept.
#[derive(Debug)]
pub(crate) struct Surprise;

impl Scorer for Surprise {
    fn name(&self) -> String {
        "surprise".into()
    }

    fn needs(&self) -> Needs {
        Needs::NOTHING.surprisal()
    }

    fn carries(&self) -> bool {
        true
    }

    fn score(&self, _at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        let new = units.surprisal().unwrap_or_default().iter();
        let new: Vec<f32> = new.map(|x| if x.is_nan() { 100.0 } else { *x }).collect();
        let of = |head| [units.carried(head), &new].concat();
        Scores::per_head((0..units.kv_heads()).map(of).collect())
    }
}

/// What was attended to so far is kept.
#[derive(Debug)]
pub(crate) struct Attended;

impl Scorer for Attended {
    fn name(&self) -> String {
        "attended".into()
    }

    fn needs(&self) -> Needs {
        Needs::NOTHING.observe(Queries::All, Observation::Weights)
    }

    fn carries(&self) -> bool {
        true
    }

    fn score(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        let group = at.layer.group();
        let of = |head: usize| {
            let mut scores = units.carried(head).to_vec();
            scores.resize(units.len(head), 0.0);
            if let Some(observed) = units.observed() {
                for query in head * group..(head + 1) * group {
                    let paid = observed.weights(query)?;
                    scores.iter_mut().zip(paid).for_each(|(s, p)| *s += p);
                }
            }
            Ok(scores)
        };
        let scores: Result<_> = (0..units.kv_heads()).map(of).collect();
        Scores::per_head(scores?)
    }
}

/// Several numbers go with each unit: one that it was born with, and what each query head of the group has paid to it
/// where it stood. All of them say what is kept.
#[derive(Debug)]
pub(crate) struct Several {
    pub(crate) limit: usize,
    pub(crate) positions: Positions,
}

impl KvCachePolicy for Several {
    fn name(&self) -> String {
        "several".into()
    }

    fn needs(&self) -> Needs {
        Needs::NOTHING.observe(Queries::All, Observation::NearWeights)
    }

    fn positions(&self) -> Positions {
        self.positions
    }

    fn carries(&self) -> Option<String> {
        Some("several numbers".into())
    }

    fn carried_width(&self, layer: &LayerSpec) -> usize {
        1 + layer.group()
    }

    fn limit(&self, _layer: &LayerSpec, _total: usize) -> Option<usize> {
        Some(self.limit)
    }

    fn step(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Verdict> {
        let width = self.carried_width(&at.layer);
        let (mut lists, mut kept) = (Vec::new(), Vec::new());
        for head in 0..units.kv_heads() {
            let mut numbers = units.carried(head).to_vec();
            assert_eq!(numbers.len(), width * (units.len(head) - units.incoming()));
            for position in &units.positions(head)[units.len(head) - units.incoming()..] {
                numbers.push((position * 37 % 101) as f32 / 1000.0);
                numbers.resize(numbers.len() + width - 1, 0.0);
            }
            if let Some(observed) = units.observed() {
                for index in 1..width {
                    let paid = observed.weights(head * at.layer.group() + index - 1)?;
                    let own = numbers.iter_mut().skip(index).step_by(width);
                    own.zip(paid).for_each(|(own, paid)| *own += paid);
                }
            }
            let scores: Vec<f32> = numbers.chunks(width).map(|x| x.iter().sum()).collect();
            let most = match at.phase.evicts() {
                true => self.limit.min(scores.len()),
                false => scores.len(),
            };
            kept.push(units.compute().select(&scores, most, &[])?);
            lists.push(numbers);
        }
        Ok(Verdict::keep(kept)?.carrying(Scores::wide(width, lists)?))
    }
}

/// The largest weight so far is kept.
#[derive(Debug)]
pub(crate) struct Largest(pub(crate) Observation);

impl Scorer for Largest {
    fn name(&self) -> String {
        "largest".into()
    }

    fn needs(&self) -> Needs {
        Needs::NOTHING.observe(Queries::All, self.0)
    }

    fn carries(&self) -> bool {
        true
    }

    fn score(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        let group = at.layer.group();
        let of = |head: usize| {
            let mut scores = units.carried(head).to_vec();
            scores.resize(units.len(head), 0.0);
            if let Some(observed) = units.observed() {
                for query in head * group..(head + 1) * group {
                    let paid = observed.max_weights(query)?;
                    scores
                        .iter_mut()
                        .zip(paid)
                        .for_each(|(s, p)| *s = s.max(*p));
                }
            }
            Ok(scores)
        };
        let scores: Result<_> = (0..units.kv_heads()).map(of).collect();
        Scores::per_head(scores?)
    }
}

/// The largest logits of the last queries; nothing is carried.
#[derive(Debug)]
pub(crate) struct Logits;

impl Scorer for Logits {
    fn name(&self) -> String {
        "logits".into()
    }

    fn needs(&self) -> Needs {
        Needs::NOTHING.observe(Queries::Last(4), Observation::MaxLogits)
    }

    fn score(&self, _at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        match units.observed() {
            Some(observed) => Scores::per_head(observed.per_head.clone()),
            // Between prompts nobody attends.
            None => Newest.score(_at, units),
        }
    }
}

/// Each head keeps fewer than the one before it; one keeps nothing at all.
#[derive(Debug)]
pub(crate) struct Ragged {
    pub(crate) limit: usize,
    pub(crate) positions: Positions,
}

impl KvCachePolicy for Ragged {
    fn name(&self) -> String {
        "ragged".into()
    }

    fn positions(&self) -> Positions {
        self.positions
    }

    fn limit(&self, _layer: &LayerSpec, _total: usize) -> Option<usize> {
        Some(self.limit)
    }

    fn step(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Verdict> {
        if !at.phase.evicts() {
            return Ok(Verdict::keep_all());
        }
        let of = |head: usize| {
            let n = units.len(head);
            if n <= self.limit {
                return (0..n as u32).collect();
            }
            let most = match head {
                2 => 0,
                _ => self.limit - 3 * head,
            };
            // Every other one of the newest.
            (n.saturating_sub(2 * most) as u32..n as u32)
                .step_by(2)
                .collect()
        };
        Verdict::keep((0..units.kv_heads()).map(of).collect())
    }
}

/// Keeps everything, with scores or without.
#[derive(Debug, Default)]
pub(crate) struct Everything {
    pub(crate) positions: Positions,
    pub(crate) needs: Needs,
}

impl KvCachePolicy for Everything {
    fn name(&self) -> String {
        "everything".into()
    }

    fn needs(&self) -> Needs {
        self.needs
    }

    fn positions(&self) -> Positions {
        self.positions
    }

    fn step(&self, _at: &Step, _units: &LayerUnits<'_>) -> Result<Verdict> {
        Ok(Verdict::keep_all())
    }
}

/// A window; what leaves it is mixed into the oldest and the newest that stay.
#[derive(Debug)]
pub(crate) struct Mixing {
    pub(crate) limit: usize,
    pub(crate) positions: Positions,
}

impl KvCachePolicy for Mixing {
    fn name(&self) -> String {
        "mixing".into()
    }

    fn positions(&self) -> Positions {
        self.positions
    }

    fn limit(&self, _layer: &LayerSpec, _total: usize) -> Option<usize> {
        Some(self.limit)
    }

    fn step(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Verdict> {
        let n = units.longest();
        if !at.phase.evicts() || n <= self.limit {
            return Ok(Verdict::keep_all());
        }
        let first = n - self.limit;
        let folds = |head: usize| {
            let into = [first, n - 1 - head];
            let each = |from| into.map(|into| (from, into as u32));
            let pairs = (0..first as u32).flat_map(each);
            let share = 0.5 / first as f32;
            pairs
                .map(|(from, into)| Fold { from, into, share })
                .collect()
        };
        let heads = 0..units.kv_heads();
        let kept = Verdict::keep(
            heads
                .clone()
                .map(|_| (first as u32..n as u32).collect())
                .collect(),
        )?;
        let Keep::Slots(kept) = kept.keep else {
            return Ok(kept);
        };
        Ok(Verdict {
            keep: Keep::Merged {
                kept,
                folds: heads.map(folds).collect(),
                keys: false,
            },
            ..Verdict::keep_all()
        })
    }
}
