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
use locret_policies::{Full, H2o, KeyNorm, Locret, Random, SnapKv, Window};
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Units that each head keeps.
pub const BUDGET: usize = 64;
const PREFILL: Prefill = Prefill::new(256, 0);
/// How far a number of a key may be from what it is in a session that read only what was kept, as a share of the largest
/// number: keys that were turned again with every prompt, in 32 bits.
const TOLERANCE: f32 = 1e-5;
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
    /// The largest difference of a key's numbers, as a share of the largest number, where keys were compared.
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

/// The tokens of a session in parts of a tenth, each in prompts of two chunks.
fn prompts(ids: &[u32]) -> impl Iterator<Item = impl Iterator<Item = &[u32]>> {
    let tenth = ids.len().div_ceil(10).max(1);
    ids.chunks(tenth).map(|part| part.chunks(2 * PREFILL.chunk))
}

/// Reads into one session, prompt after prompt, with so many generated tokens between them, and looks at the memory,
/// which may grow by the list of all tokens.
fn read(
    model: &Arc<dyn CausalLm>,
    policy: &Arc<dyn KvCachePolicy>,
    ids: &[u32],
    generated: usize,
) -> Result<(Session, Soaked)> {
    let mut session = Session::new(model.clone(), policy.clone())?;
    let (mut tenth, mut times) = (None, Vec::new());
    for part in prompts(ids) {
        let start = Instant::now();
        for prompt in part {
            // Keys stand turned while text is generated, and are turned back when units go.
            if generated > 0 && !session.tokens().is_empty() {
                let tokens = session.generate(Generate::greedy(generated))?;
                tokens.collect::<Result<Vec<u32>, _>>()?;
            }
            session.prefill(prompt, &PREFILL)?;
        }
        times.push(start.elapsed());
        tenth = tenth.or_else(anonymous);
    }
    let memory = tenth.zip(anonymous()).map(|(tenth, end)| [tenth, end]);
    // The list of all tokens has 4 bytes for each, and may be twice as long while it grows.
    grown(memory, SLACK + 12 * session.tokens().len())?;
    let soaked = Soaked {
        count: session.tokens().len(),
        memory,
        tenths: [times[1.min(times.len() - 1)], times[times.len() - 1]],
        compared: 0,
        difference: None,
    };
    Ok((session, soaked))
}

/// The best of all units, in the order of the text; of equals the earlier one.
fn best(score: impl Fn(usize) -> f32, units: usize) -> Vec<u32> {
    let mut all: Vec<u32> = (0..units as u32).collect();
    all.sort_by(|a, b| {
        score(*b as usize)
            .total_cmp(&score(*a as usize))
            .then(a.cmp(b))
    });
    all.truncate(BUDGET);
    all.sort_unstable();
    all
}

/// Reads `tokens` tokens into one session of Locret's heads in compact positions. At the end each head has the units
/// whose scores were the best when they came, with these scores to the bit.
///
/// # Errors
/// [`Error::Usage`] that says what is wrong, also for no tokens; those of models and sessions.
pub fn scores(tokens: usize) -> Result<Soaked> {
    let model = model(2, 2)?;
    let heads = random::heads(&*model, 16, 3)?;
    let policy = Evict::new(Locret::new(heads), Budget::Units(BUDGET));
    let policy: Arc<dyn KvCachePolicy> = Arc::new(policy.with_positions(Positions::Compact));
    let ids = random::tokens(tokens.max(1), model.spec().vocab, 7);
    let (session, mut soaked) = read(&model, &policy, &ids, 0)?;
    // The same once more, watched: what every unit was born with.
    let mut births = Births::default();
    let mut watched = Session::new(model, policy)?;
    for prompt in prompts(&ids).flatten() {
        watched.prefill_watched(prompt, &PREFILL, &mut births)?;
    }
    let cache = session.cache();
    for (layer, heads) in births.scores().iter().enumerate() {
        for (head, born) in heads.iter().enumerate() {
            let at = format!("layer {layer}, head {head}");
            let kept = best(|unit| born[unit], born.len());
            if born.len() != ids.len() || cache.positions(layer, head) != kept {
                return Err(wrong(format!("{at}: other units than the best ones")));
            }
            let scores = kept.iter().map(|at| born[*at as usize].to_bits());
            if !scores.eq(cache.scores(layer, head).iter().map(|s| s.to_bits())) {
                return Err(wrong(format!("{at}: scores that changed")));
            }
            soaked.compared += kept.len();
        }
    }
    Ok(soaked)
}

/// Reads `tokens` tokens into one session of a single layer and KV head that keeps units by lot, in compact positions,
/// and generates some between two prompts, so that keys are turned and turned back. At the end it has the units with the best lots, and keys as a
/// session has them that reads nothing but these.
///
/// # Errors
/// As [`scores`].
pub fn positions(tokens: usize) -> Result<Soaked> {
    let model = model(1, 1)?;
    let lots = Random::new(4);
    let policy = Evict::new(Random::new(4), Budget::Units(BUDGET));
    let policy: Arc<dyn KvCachePolicy> = Arc::new(policy.with_positions(Positions::Compact));
    let ids = random::tokens(tokens.max(1), model.spec().vocab, 8);
    let (session, mut soaked) = read(&model, &policy, &ids, 3)?;
    let all = session.tokens().to_vec();
    let kept = best(|unit| lots.lot(0, 0, unit as u32), all.len());
    if session.cache().positions(0, 0) != kept {
        return Err(wrong("other units than those with the best lots"));
    }
    // In one layer keys are functions of their token and its place. One more token each, as a tail, so that nothing is
    // dropped and all keys stand where they are read.
    let next = |mut session: Session| -> Result<Vec<f32>> {
        session.prefill(&[11], &Prefill::new(1, 1))?;
        session.generate(Generate::greedy(2))?.next().transpose()?;
        Ok(session.cache().store(0).keys(0)?.into_values()?)
    };
    let read: Vec<u32> = kept.iter().map(|at| all[*at as usize]).collect();
    let full = Full::new().with_positions(Positions::Compact);
    let mut fresh = Session::new(model, Arc::new(full))?;
    fresh.prefill(&read, &PREFILL)?;
    let (soaked_keys, fresh) = (next(session)?, next(fresh)?);
    let largest = fresh.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    let off = soaked_keys.iter().zip(&fresh).map(|(a, b)| (a - b).abs());
    let off = off.fold(
        0.0,
        |most: f32, x| if x > most || x.is_nan() { x } else { most },
    );
    let difference = off / largest;
    if soaked_keys.len() != fresh.len() || !(difference <= TOLERANCE) {
        return Err(wrong(format!(
            "keys are {difference} of the largest off, {TOLERANCE} is allowed"
        )));
    }
    soaked.compared = kept.len();
    soaked.difference = Some(difference);
    Ok(soaked)
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
