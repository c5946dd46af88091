//! Long runs of small models: whether memory stays flat, and whether what is left at the end is what an oracle keeps.

use crate::{
    Error, Result,
    memory::Memory,
    random::{self, RandomWeights},
};
use burn::tensor::Device;
use locret_core::{
    Batch, Births, Budget, CausalLm, End, Event, Evict, Generate, KvCachePolicy, Limits, ModelSpec,
    Positions, Prefill, Request, RopeConfig, Sampling, Session,
};
use locret_models::{DecoderConfig, Layout, LoadOptions};
use locret_policies::{Full, H2o, KeyNorm, Locret, SnapKv, Window};
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Units that each head keeps.
const BUDGET: usize = 64;
const PREFILL: Prefill = Prefill::new(256, 0);
/// How far logits may be from those of a session that read only what was kept: keys that were turned again with every
/// chunk, in 32 bits. Logits of these models are some units in size.
const TOLERANCE: f32 = 1e-3;
/// Heap that may come and go, whatever the text: of threads, and of an allocator's lists.
const SLACK: usize = 8 << 20;

/// A model of random weights: so many layers and KV heads.
fn model(layers: usize, kv_heads: usize) -> Result<Arc<dyn CausalLm>> {
    let spec = ModelSpec::new(layers, 2 * kv_heads, kv_heads, 32, 509)
        .with_head_dim(16)
        .with_rope(RopeConfig::plain(10_000.0, 16));
    let config = DecoderConfig {
        spec,
        intermediate: 48,
        norm_epsilon: 1e-5,
        tied: false,
        layout: Layout::Separate,
    };
    let weights = RandomWeights::new(&config, 5);
    let decoder = random::decoder(&config, &weights, &LoadOptions::new(), &Device::flex())?;
    Ok(Arc::new(decoder))
}

/// What a soak found.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Soaked {
    /// Tokens, or sequences, that were worked on.
    pub count: usize,
    /// Anonymous memory after a tenth of it and at the end, in bytes; `None` where the system does not tell.
    pub memory: Option<[usize; 2]>,
    /// Time for the second tenth and for the last.
    pub tenths: [Duration; 2],
    /// What was compared with an oracle: units, or sequences.
    pub compared: usize,
    /// The largest difference of logits, where there was something to compare.
    pub difference: Option<f32>,
}

/// What a soak finds wrong.
fn wrong(what: impl Into<String>) -> Error {
    Error::Usage(what.into())
}

/// Anonymous memory, and whether it grew by more than is allowed since a tenth was done.
fn grown(memory: Option<[usize; 2]>, allowed: usize) -> Result<()> {
    match memory {
        Some([tenth, end]) if end > tenth + allowed => Err(wrong(format!(
            "memory grew from {tenth} to {end} bytes, {allowed} are allowed"
        ))),
        _ => Ok(()),
    }
}

fn anonymous() -> Option<usize> {
    Memory::now().map(|memory| memory.anonymous)
}

/// Reads `tokens` tokens into one session of Locret's heads in compact positions, prompt after prompt, and then holds
/// it against oracles: each head has the units whose scores were the best when they came, with these scores to the
/// bit, where they stood; and, for a model of one layer and one KV head, the logits are those of a session that reads
/// nothing but what was kept.
///
/// # Errors
/// [`Error::Usage`] that says what is wrong; those of models and sessions.
pub fn session(layers: usize, kv_heads: usize, tokens: usize) -> Result<Soaked> {
    let model = model(layers, kv_heads)?;
    let heads = random::heads(&*model, 16, 3)?;
    let policy = Evict::new(Locret::new(heads), Budget::Units(BUDGET));
    let policy: Arc<dyn KvCachePolicy> = Arc::new(policy.with_positions(Positions::Compact));
    let ids = random::tokens(tokens, model.spec().vocab, 7);
    let mut session = Session::new(model.clone(), policy.clone())?;
    let parts = ids.chunks(tokens.div_ceil(10).max(1));
    let (mut tenth, mut times) = (None, Vec::new());
    for part in parts {
        let start = Instant::now();
        for prompt in part.chunks(20 * PREFILL.chunk) {
            session.prefill(prompt, &PREFILL)?;
        }
        times.push(start.elapsed());
        tenth = tenth.or_else(anonymous);
    }
    let memory = tenth.zip(anonymous()).map(|(tenth, end)| [tenth, end]);
    // The list of all tokens has 4 bytes for each, and may be twice as long while it grows.
    grown(memory, SLACK + 12 * tokens)?;

    // The same once more, watched: what every unit was born with.
    let mut births = Births::default();
    let mut watched = Session::new(model.clone(), policy)?;
    for part in ids.chunks(tokens.div_ceil(10).max(1)) {
        for prompt in part.chunks(20 * PREFILL.chunk) {
            watched.prefill_watched(prompt, &PREFILL, &mut births)?;
        }
    }
    let (cache, mut compared) = (session.cache(), 0);
    for (layer, heads) in births.scores().iter().enumerate() {
        for (head, born) in heads.iter().enumerate() {
            let mut all: Vec<u32> = (0..born.len() as u32).collect();
            // Of equals the earlier one.
            all.sort_by(|a, b| {
                born[*b as usize]
                    .total_cmp(&born[*a as usize])
                    .then(a.cmp(b))
            });
            all.truncate(BUDGET);
            all.sort_unstable();
            let at = format!("layer {layer}, head {head}");
            if born.len() != tokens || cache.positions(layer, head) != all {
                return Err(wrong(format!("{at}: other units than the best ones")));
            }
            let scores = all.iter().map(|at| born[*at as usize].to_bits());
            if !scores.eq(cache.scores(layer, head).iter().map(|s| s.to_bits())) {
                return Err(wrong(format!("{at}: scores that changed")));
            }
            compared += all.len();
        }
    }
    let difference = match layers * kv_heads {
        1 => Some(alone(&model, &session, &ids)?),
        _ => None,
    };
    Ok(Soaked {
        count: tokens,
        memory,
        tenths: [times[1.min(times.len() - 1)], times[times.len() - 1]],
        compared,
        difference,
    })
}

/// The largest difference of the logits after one more token from those of a session that reads what was kept. In one
/// layer keys and values are functions of their token.
fn alone(model: &Arc<dyn CausalLm>, session: &Session, ids: &[u32]) -> Result<f32> {
    let kept = session.cache().positions(0, 0);
    let kept: Vec<u32> = kept.iter().map(|at| ids[*at as usize]).collect();
    let full = Full::new().with_positions(Positions::Compact);
    let mut fresh = Session::new(model.clone(), Arc::new(full))?;
    fresh.prefill(&kept, &PREFILL)?;
    let next = |mut session: Session| -> Result<Vec<f32>> {
        // As a tail, so that nothing is dropped before its logits.
        session.prefill(&[11], &Prefill::new(1, 1))?;
        let logits = session.logits().ok_or_else(|| wrong("no logits"))?;
        Ok(logits.to_vec())
    };
    let (soaked, fresh) = (next(session.fork()?)?, next(fresh)?);
    let pairs = soaked.iter().zip(&fresh);
    let difference = pairs.fold(0.0f32, |most, (a, b)| most.max((a - b).abs()));
    if !(difference <= TOLERANCE) {
        return Err(wrong(format!(
            "logits are {difference} from those of what was kept, {TOLERANCE} is allowed"
        )));
    }
    Ok(difference)
}

/// What is heard of a sequence.
#[derive(Debug, Default)]
struct Heard {
    tokens: Vec<u32>,
    end: Option<End>,
}

/// Sends `sequences` requests of all kinds through a batch of bounded memory, eight at a time: some are cancelled, and
/// of the others each fiftieth is held against a session of its own.
///
/// # Errors
/// [`Error::Usage`] that says what is wrong; those of models and batches.
pub fn batch(sequences: usize) -> Result<Soaked> {
    const AT_ONCE: usize = 8;
    let model = model(2, 2)?;
    let limits = Limits::new().memory(1 << 20).running(4).waiting(AT_ONCE);
    let mut batch = Batch::new(model.clone(), limits)?;
    let budget = Budget::Units(24);
    let policies: [Arc<dyn KvCachePolicy>; 5] = [
        Arc::new(Window::policy(budget)),
        Arc::new(KeyNorm::policy(budget)),
        Arc::new(H2o::policy(budget)),
        Arc::new(SnapKv::new().window(8).policy(budget)),
        Arc::new(Full::new()),
    ];
    let lots = random::tokens(8 * sequences, 1 << 30, 9);
    let mut running: Vec<(usize, Arc<Mutex<Heard>>)> = Vec::new();
    let (mut tenth, mut times, mut compared) = (None, Vec::new(), 0);
    let mut start = Instant::now();
    let asked = |n: usize| {
        let lot = |i: usize, below: usize| lots[8 * n + i] as usize % below;
        let policy = policies[lot(0, policies.len())].clone();
        let prompt = random::tokens(1 + lot(1, 120), model.spec().vocab, n as u64);
        let prefill = Prefill::new(1 + lot(2, 40), lot(3, 8));
        let sampling = Sampling {
            temperature: [0.0, 0.8][lot(4, 2)],
            seed: n as u64,
            ..Sampling::greedy()
        };
        let generate = Generate::greedy(lot(5, 16)).sampling(sampling);
        (policy, prompt, prefill, generate)
    };
    let mut next = 0;
    while next < sequences || !running.is_empty() {
        while next < sequences && running.len() < AT_ONCE {
            let (policy, prompt, prefill, generate) = asked(next);
            let request = Request::new(prompt, policy)
                .prefill(prefill)
                .generate(generate);
            let heard = Arc::new(Mutex::new(Heard::default()));
            let sink = heard.clone();
            let id = batch.submit(
                request,
                Box::new(move |event| {
                    let mut heard = sink.lock().unwrap_or_else(PoisonError::into_inner);
                    match event {
                        Event::Token(token) => heard.tokens.push(token),
                        Event::Ended(ended) => heard.end = Some(ended.end),
                        _ => {}
                    }
                }),
            )?;
            if lots[8 * next + 6].is_multiple_of(20) {
                batch.step();
                batch.cancel(id);
            }
            running.push((next, heard));
            next += 1;
            if next % sequences.div_ceil(10).max(1) == 0 {
                times.push(start.elapsed());
                start = Instant::now();
                tenth = tenth.or_else(anonymous);
            }
        }
        batch.step();
        let mut ended = Vec::new();
        running.retain(|(n, heard)| {
            let mut heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
            match heard.end.take() {
                None => true,
                Some(end) => {
                    ended.push((*n, std::mem::take(&mut heard.tokens), end));
                    false
                }
            }
        });
        for (n, tokens, end) in ended {
            match end {
                End::Failed(error) => return Err(wrong(format!("sequence {n}: {error}"))),
                End::Cancelled => continue,
                _ if n % 50 != 0 => continue,
                _ => {}
            }
            let (policy, prompt, prefill, generate) = asked(n);
            let mut alone = Session::new(model.clone(), policy)?;
            alone.prefill(&prompt, &prefill)?;
            let expected: Vec<u32> = alone.generate(generate)?.collect::<Result<_, _>>()?;
            if tokens != expected {
                return Err(wrong(format!(
                    "sequence {n}: {tokens:?}, alone {expected:?}"
                )));
            }
            compared += 1;
        }
    }
    let load = batch.load();
    if (load.running, load.waiting, load.promised) != (0, 0, 0) {
        return Err(wrong(format!("sequences or promises are left: {load:?}")));
    }
    let memory = tenth.zip(anonymous()).map(|(tenth, end)| [tenth, end]);
    grown(memory, SLACK)?;
    if times.len() < 2 {
        times.resize(2, start.elapsed());
    }
    Ok(Soaked {
        count: sequences,
        memory,
        tenths: [times[1], times[times.len() - 1]],
        compared,
        difference: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same as an example's, short. Memory is everybody's here, and too little for its figures to say anything.
    #[test]
    fn a_long_session_and_a_busy_batch_end_as_their_oracles() {
        let small = session(2, 2, 6_000).unwrap();
        assert_eq!(small.compared, 2 * 2 * BUDGET);
        assert!(session(1, 1, 6_000).unwrap().difference.unwrap() < 1e-4);
        let busy = batch(200).unwrap();
        assert!(busy.compared >= 3, "{busy:?}");
    }
}
