//! What a policy kept after every chunk, with which scores, and what the model then said.

use crate::Result;
use locret_core::{
    Births, ChunkDone, Decided, Error as CoreError, Generate, Phase, Prefill, Probe, Session,
};
use serde::{Deserialize, Serialize};

/// What was evicted, and why.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trace {
    /// `[chunk][layer][kv_head]`: original positions that are left after the chunk's eviction,
    /// ascending. The prompt's last `local` tokens are no chunk.
    pub kept: Vec<Vec<Vec<Vec<u32>>>>,
    /// `[layer][kv_head][prompt token]`: the score that each token was born with, `null` if it is
    /// infinite; `None` for a policy that gives no scores to carry.
    pub scores: Option<Vec<Vec<Vec<Option<f32>>>>>,
    /// The most likely tokens after the prompt.
    pub last_logits_top20: Top,
    /// Greedy tokens after the prompt; the first one is the most likely one. End-of-turn tokens
    /// do not stop it.
    pub generated: Vec<u32>,
    /// The most units that a head of a layer held at any moment.
    pub peak_units_per_head: usize,
    /// The most bytes of keys and values at any moment.
    pub peak_kv_bytes: usize,
    /// How fast the prompt was read.
    pub prefill_tokens_per_second: f64,
    /// How fast tokens were generated.
    pub decode_tokens_per_second: f64,
}

/// The largest logits, descending; of equals the smaller id first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Top {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Their logits.
    pub values: Vec<f32>,
}

impl Top {
    /// The `n` largest of `logits`.
    pub fn of(logits: &[f32], n: usize) -> Self {
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        ids.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
        ids.truncate(n);
        Self {
            values: ids.iter().map(|id| logits[*id as usize]).collect(),
            ids,
        }
    }
}

/// Watches a prompt being read.
struct Watching<'a> {
    births: Births,
    /// `[chunk][layer][kv_head]`
    kept: Vec<Vec<Vec<Vec<u32>>>>,
    on_tokens: &'a mut (dyn FnMut(usize) + Send),
}

impl Probe for Watching<'_> {
    fn decided(&mut self, at: &Decided<'_>) -> locret_core::Result<()> {
        self.births.decided(at)
    }

    fn chunk(&mut self, done: &ChunkDone<'_>) -> locret_core::Result<()> {
        if let Phase::Prefill { .. } = done.phase {
            self.kept.push(kept_positions(done.cache));
        }
        (self.on_tokens)(done.done);
        Ok(())
    }
}

/// Reads a prompt on a fresh session, generates `max_new` tokens greedily, and keeps a record.
/// `on_tokens` hears how many tokens of the prompt are done.
///
/// # Errors
/// As [`Session::prefill`] and [`Session::generate`].
pub fn trace(
    session: &mut Session,
    ids: &[u32],
    prefill: &Prefill,
    max_new: usize,
    on_tokens: &mut (dyn FnMut(usize) + Send),
) -> Result<Trace> {
    let mut watching = Watching {
        births: Births::default(),
        kept: Vec::new(),
        on_tokens,
    };
    session.prefill_watched(ids, prefill, &mut watching)?;
    let Watching { births, kept, .. } = watching;
    let births = births.scores();
    let scored = births.iter().flatten().any(|head| !head.is_empty());
    let finite = |s: &f32| s.is_finite().then_some(*s);
    let head = |h: &Vec<f32>| h.iter().map(finite).collect();
    let scores = scored.then(|| {
        (births.iter())
            .map(|layer| layer.iter().map(head).collect())
            .collect()
    });
    let logits = session.logits().ok_or(CoreError::EmptyPrompt)?;
    let last_logits_top20 = Top::of(logits, 20);
    let generated = session
        .generate(Generate::greedy(max_new))?
        .collect::<Result<Vec<u32>, _>>()?;
    let report = session.report();
    Ok(Trace {
        kept,
        scores,
        last_logits_top20,
        generated,
        peak_units_per_head: report.peak.units_per_head,
        peak_kv_bytes: report.peak.bytes,
        prefill_tokens_per_second: report.prefill_rate(),
        decode_tokens_per_second: report.decode_rate(),
    })
}

/// `[layer][kv_head]`: original positions of what a cache holds.
pub fn kept_positions(cache: &locret_core::SequenceCache) -> Vec<Vec<Vec<u32>>> {
    let spec = cache.spec();
    (0..spec.layers)
        .map(|layer| {
            (0..spec.kv_heads)
                .map(|head| cache.positions(layer, head).to_vec())
                .collect()
        })
        .collect()
}

/// The share of (layer, KV head) pairs that hold each of `tokens` positions.
pub fn survival(kept: &[Vec<Vec<u32>>], tokens: usize) -> Vec<f64> {
    let mut counts = vec![0usize; tokens];
    let mut heads = 0;
    for head in kept.iter().flatten() {
        heads += 1;
        for p in head {
            if let Some(count) = counts.get_mut(*p as usize) {
                *count += 1;
            }
        }
    }
    let all = heads.max(1) as f64;
    counts.into_iter().map(|n| n as f64 / all).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_logits_come_first_and_equals_by_id() {
        let top = Top::of(&[1.0, 3.0, -2.0, 3.0, 0.5], 3);
        assert_eq!((top.ids, top.values), (vec![1, 3, 0], vec![3.0, 3.0, 1.0]));
        assert_eq!(Top::of(&[1.0], 20).ids, [0]);
    }

    #[test]
    fn survival_counts_heads() {
        let kept = vec![vec![vec![0, 2], vec![2]], vec![vec![1, 2], vec![2, 9]]];
        assert_eq!(survival(&kept, 4), [0.25, 0.25, 1.0, 0.0]);
    }

    #[test]
    fn json_has_the_documented_fields() {
        let trace = Trace {
            kept: vec![vec![vec![vec![0, 2]]]],
            scores: Some(vec![vec![vec![Some(0.5), None]]]),
            last_logits_top20: Top::of(&[1.0, 2.0], 20),
            generated: vec![1, 0],
            peak_units_per_head: 3,
            peak_kv_bytes: 4,
            prefill_tokens_per_second: 5.0,
            decode_tokens_per_second: 6.0,
        };
        let value = serde_json::to_value(&trace).unwrap();
        assert_eq!(value["kept"][0][0][0], serde_json::json!([0, 2]));
        assert_eq!(value["scores"][0][0], serde_json::json!([0.5, null]));
        assert_eq!(
            value["last_logits_top20"],
            serde_json::json!({"ids": [1, 0], "values": [2.0, 1.0]})
        );
        assert_eq!(value.as_object().unwrap().len(), 8);
        let none = Trace {
            scores: None,
            ..trace
        };
        assert!(serde_json::to_value(&none).unwrap()["scores"].is_null());
    }
}
