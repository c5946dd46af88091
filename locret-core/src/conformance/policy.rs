//! What every policy must satisfy.

use super::{
    ConformanceError, Dice, Listing, Promise,
    model::{RandomModel, small_spec},
    oracle::{Oracle, OraclePass},
    record::{Decision, Recording, Tap, Tapped},
};
use crate::{
    CacheOptions, CausalLm, DType, DecodeEviction, Error, Generate, Kernels, KvCachePolicy,
    LayerUnits, LongRopeSwitch, ModelSpec, Needs, Peak, Phase, Positions, Prefill, Result,
    RopeConfig, RopeScaling, Sampling, SequenceCache, Session, Step, Verdict, stores::RESERVE,
};
use burn::tensor::Device;
use std::{collections::VecDeque, fmt, ops::Range, sync::Arc};

/// What a policy is asked to be for one case.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Case<'a> {
    /// The model.
    pub model: &'a dyn CausalLm,
    /// Its dimensions.
    pub spec: &'a ModelSpec,
    /// Where its weights lie.
    pub device: &'a Device,
    /// Units that a head may keep, at least 8.
    pub budget: usize,
    /// The positions to use. A policy that has only one kind is checked in that one.
    pub positions: Positions,
    /// Eviction while decoding.
    pub decode: DecodeEviction,
    /// The seed of the case.
    pub seed: u64,
}

/// How a policy is checked. The default fits a policy that keeps as much as its budget allows, in
/// a dense store.
#[derive(Debug, Clone)]
pub struct PolicyCheck {
    /// One case for each seed and position mode: dimensions, rotary embedding, lengths, chunks,
    /// local tails, budget, turns and generated tokens are drawn from it.
    pub seeds: Range<u64>,
    /// Types of dense stores to go through.
    pub dtypes: Vec<DType>,
    /// Implementations of attention to go through.
    pub kernels: Vec<Kernels>,
    /// Whether a head always keeps as many units as [`KvCachePolicy::limit`] says. False for
    /// policies that keep fewer, or distribute a budget over heads.
    pub fills_budget: bool,
    /// Whether the policy's store is a dense one, so that bytes can be counted exactly and keys
    /// can be turned in place.
    pub dense: bool,
    /// How far hidden states may be from the oracle's with a 32-bit store (their root mean square
    /// is 1). 16-bit stores may be 50 (f16) and 400 times (bf16) as far.
    pub tolerance: f32,
    /// How far what a store hands out may be from what was appended, as a share of the largest
    /// number appended; for stores of few bits.
    pub store_tolerance: f32,
    /// The most tokens of a prompt.
    pub max_tokens: usize,
}

impl Default for PolicyCheck {
    fn default() -> Self {
        Self {
            seeds: 0..24,
            dtypes: vec![DType::F32, DType::F16, DType::BF16],
            kernels: vec![Kernels::Auto, Kernels::Operations],
            fills_budget: true,
            dense: true,
            tolerance: 1e-4,
            store_tolerance: 0.0,
            max_tokens: 120,
        }
    }
}

/// Runs a policy through many small conversations with random models, and checks every verdict,
/// every number that the cache reports, and every hidden state against the naive oracle.
///
/// `make` builds the policy for a [`Case`]. What is checked is the list of [`Promise`]s for
/// policies: the bound at every step and in bytes, survivors bit for bit, equality with full
/// attention over exactly the kept units, equality with a full cache below the budget, determinism,
/// independence of forks, several turns, and decoding with and without eviction.
///
/// # Errors
/// [`ConformanceError`] for the first broken promise.
pub fn check_policy(
    device: &Device,
    check: &PolicyCheck,
    make: impl Fn(&Case<'_>) -> Arc<dyn KvCachePolicy>,
) -> Result<(), ConformanceError> {
    let mut ran = false;
    for seed in check.seeds.clone() {
        for positions in [Positions::Original, Positions::Compact] {
            let mut plan = Plan::new(check, seed, positions);
            let model = RandomModel::new(plan.spec.clone(), seed, device);
            let model = Arc::new(model.map_err(|e| plan.failed("the model", e))?);
            let policy = make(&plan.case(&*model));
            if policy.positions() != positions {
                continue;
            }
            ran = true;
            if policy.decode_slack().is_none() {
                plan.decode = DecodeEviction::Off;
            }
            let check = Checking {
                check,
                plan: &plan,
                model: &model,
                policy: &policy,
            };
            check.contract()?;
            check.fork()?;
            check.ranking(device)?;
            check.like_full(make(&Case {
                budget: 1 << 20,
                ..plan.case(&*model)
            }))?;
        }
    }
    if ran {
        Ok(())
    } else {
        Err(ConformanceError::Unusable(
            "no seed led to a case in the positions that the policy uses".into(),
        ))
    }
}

/// Keeps everything.
#[derive(Debug)]
pub(super) struct Everything {
    pub(super) positions: Positions,
    pub(super) needs: Needs,
}

impl Everything {
    pub(super) const PLAIN: Self = Self {
        positions: Positions::Original,
        needs: Needs::NOTHING,
    };
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

/// A conversation.
#[derive(Debug)]
struct Plan {
    seed: u64,
    spec: ModelSpec,
    options: CacheOptions,
    positions: Positions,
    budget: usize,
    decode: DecodeEviction,
    turns: Vec<Turn>,
    /// Whether the store may turn keys in place.
    turning: bool,
}

#[derive(Debug)]
struct Turn {
    ids: Vec<u32>,
    prefill: Prefill,
    generate: usize,
    /// Tokens that are forced on the model after that.
    forced: Vec<u32>,
}

impl Plan {
    fn new(check: &PolicyCheck, seed: u64, positions: Positions) -> Self {
        let mut dice = Dice::new(seed);
        let kv_heads = dice.between(1, 3);
        let heads = kv_heads * dice.pick(&[1, 3, 8]);
        let mut spec = small_spec(heads, kv_heads, dice.pick(&[8, 12, 16, 32, 64]));
        if dice.chance(0.2) {
            spec.softmax_scale *= 0.7;
        }
        let turn = seed as usize;
        let options = CacheOptions {
            dtype: check.dtypes[turn % check.dtypes.len()],
            kernels: check.kernels[turn / check.dtypes.len() % check.kernels.len()],
        };
        spec.rope = rope(&mut dice, spec.head_dim);
        // Only a store that keeps what it is given can follow a switch of factors.
        let turnable = check.dense && options.dtype == DType::F32;
        if !turnable && let RopeScaling::LongRope { switch, .. } = &mut spec.rope.scaling {
            *switch = LongRopeSwitch::AlwaysLong;
        }
        let budget = dice.between(8, 40);
        let turns = (0..dice.between(1, 2))
            .map(|_| {
                let most = check.max_tokens.max(1);
                let tokens = if dice.chance(0.2) {
                    dice.between(1, most.min(12))
                } else {
                    dice.between(most.div_ceil(3), most)
                };
                let chunk = dice.pick(&[2, 3, 8, 16, 33, budget, 1]);
                Turn {
                    ids: dice.ids(tokens, spec.vocab),
                    prefill: Prefill {
                        chunk,
                        local: dice.pick(&[0, 1, 5, chunk + 3]),
                    },
                    generate: dice.between(0, 9),
                    forced: {
                        let tokens = dice.pick(&[0, 1, 12]);
                        dice.ids(tokens, spec.vocab)
                    },
                }
            })
            .collect();
        Self {
            seed,
            options,
            positions,
            budget,
            decode: dice.pick(&[
                DecodeEviction::Off,
                DecodeEviction::Every(1),
                DecodeEviction::Every(3),
            ]),
            turns,
            // A switch of factors at original positions needs it.
            turning: dice.chance(0.5) || positions == Positions::Original,
            spec,
        }
    }

    fn case<'a>(&'a self, model: &'a dyn CausalLm) -> Case<'a> {
        Case {
            model,
            spec: &self.spec,
            device: model.compute().device(),
            budget: self.budget,
            positions: self.positions,
            decode: self.decode,
            seed: self.seed,
        }
    }

    fn failed(&self, subject: impl Into<String>, source: Error) -> ConformanceError {
        ConformanceError::Failed {
            subject: subject.into(),
            case: self.to_string(),
            source: Box::new(source),
        }
    }

    fn tokens(&self) -> usize {
        let turns = self.turns.iter();
        turns
            .map(|turn| turn.ids.len() + turn.generate + turn.forced.len())
            .sum()
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "seed {}, {:?} positions, {}/{} heads of {} ({:?} rotated, {}), {:?} store, {:?} \
             kernels, budget {}, decode eviction {:?}",
            self.seed,
            self.positions,
            self.spec.heads,
            self.spec.kv_heads,
            self.spec.head_dim,
            self.spec.rope.rotary_dim,
            match self.spec.rope.scaling {
                RopeScaling::None => "plain",
                RopeScaling::Linear { .. } => "linear",
                RopeScaling::Llama3 { .. } => "llama3",
                RopeScaling::LongRope { .. } => "longrope",
            },
            self.options.dtype,
            self.options.kernels,
            self.budget,
            self.decode,
        )?;
        for turn in &self.turns {
            write!(
                f,
                "; {} tokens in chunks of {}, {} local, {} generated, {} forced",
                turn.ids.len(),
                turn.prefill.chunk,
                turn.prefill.local,
                turn.generate,
                turn.forced.len()
            )?;
        }
        Ok(())
    }
}

fn rope(dice: &mut Dice, head_dim: usize) -> RopeConfig {
    let rotary_dim = if head_dim >= 16 && dice.chance(0.25) {
        head_dim / 2
    } else {
        head_dim
    };
    let half = rotary_dim / 2;
    let original_max = dice.between(20, 90);
    RopeConfig {
        theta: dice.pick(&[10_000.0, 500_000.0]),
        rotary_dim,
        scaling: match dice.between(0, 5) {
            0..=2 => RopeScaling::None,
            3 => RopeScaling::Linear { factor: 4.0 },
            4 => RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max,
            },
            _ => RopeScaling::LongRope {
                short: (0..half).map(|i| 1.0 + 0.01 * i as f64).collect(),
                long: (0..half).map(|i| 1.5 + 0.5 * i as f64).collect(),
                original_max,
                attention_factor: 1.19,
                switch: LongRopeSwitch::ByLength,
            },
        },
    }
}

/// What a conversation left.
struct Played {
    passes: Vec<Tapped>,
    recording: Arc<Recording>,
    session: Session,
    /// After each prompt: logits, and the peak so far.
    read: Vec<(Vec<f32>, Peak)>,
}

/// Everything that a session shows of its state, floats by their bits.
#[derive(PartialEq)]
struct State {
    logits: Vec<u32>,
    positions: Vec<Vec<u32>>,
    tokens: Vec<u32>,
}

impl State {
    fn of(session: &Session) -> Self {
        let cache = session.cache();
        let spec = cache.spec();
        let heads = (0..spec.layers).flat_map(|l| (0..spec.kv_heads).map(move |h| (l, h)));
        Self {
            logits: session
                .logits()
                .map(|l| l.iter().map(|x| x.to_bits()).collect())
                .unwrap_or_default(),
            positions: heads.map(|(l, h)| cache.positions(l, h).to_vec()).collect(),
            tokens: session.tokens().to_vec(),
        }
    }
}

struct Checking<'a> {
    check: &'a PolicyCheck,
    plan: &'a Plan,
    model: &'a Arc<RandomModel>,
    policy: &'a Arc<dyn KvCachePolicy>,
}

impl Checking<'_> {
    fn broken(&self, promise: Promise, found: impl Into<String>) -> ConformanceError {
        ConformanceError::Broken {
            subject: self.policy.name(),
            promise,
            case: self.plan.to_string(),
            found: found.into(),
        }
    }

    fn failed(&self, error: Error) -> ConformanceError {
        self.plan.failed(self.policy.name(), error)
    }

    fn tolerance(&self) -> f64 {
        let tolerance = f64::from(self.check.tolerance);
        match self.plan.options.dtype {
            DType::F32 => tolerance,
            DType::F16 => tolerance * 50.0,
            _ => tolerance * 400.0,
        }
    }

    fn store_tolerance(&self) -> f32 {
        let own = match self.plan.options.dtype {
            DType::F32 => 0.0,
            DType::F16 => 5e-4,
            _ => 4e-3,
        };
        self.check.store_tolerance.max(own)
    }

    fn generate(&self, session: &mut Session, turn: &Turn) -> Result<()> {
        let generate = Generate::greedy(turn.generate);
        let sampling = Sampling {
            temperature: 1.0,
            seed: self.plan.seed,
            ..Sampling::greedy()
        };
        for token in session.generate(generate.sampling(sampling))? {
            token?;
        }
        if !turn.forced.is_empty() {
            session.score(&turn.forced)?;
        }
        Ok(())
    }

    /// `turning` says whether the store may turn keys in place.
    fn play(
        &self,
        policy: Arc<dyn KvCachePolicy>,
        turning: bool,
    ) -> Result<Played, ConformanceError> {
        let tap = Arc::new(Tap::new(self.model.clone()));
        let mut recording = Recording::new(policy)
            .store_tolerance(self.store_tolerance())
            .with_units();
        if !turning {
            recording = recording.without_turning();
        }
        let recording = Arc::new(recording);
        let mut session = Session::with_options(tap.clone(), recording.clone(), self.plan.options)
            .map_err(|e| self.failed(e))?;
        // A store that broke a promise stopped the work.
        let failed = |e| match recording.fault() {
            Some((promise, found)) => self.broken(promise, found),
            None => self.failed(e),
        };
        let mut read = Vec::new();
        for turn in &self.plan.turns {
            let mut disagreement = None;
            session
                .prefill_with(&turn.ids, &turn.prefill, &mut |done| {
                    if disagreement.is_none() {
                        disagreement = disagree(done.cache, &recording);
                    }
                    Ok(())
                })
                .map_err(failed)?;
            if let Some(found) = disagreement {
                return Err(self.broken(Promise::Agreement, found));
            }
            let logits = session.logits().map(<[f32]>::to_vec);
            let logits = logits.ok_or_else(|| self.failed(Error::EmptyPrompt))?;
            read.push((logits, session.cache().peak()));
            self.generate(&mut session, turn).map_err(failed)?;
        }
        if let Some(found) = disagree(session.cache(), &recording) {
            return Err(self.broken(Promise::Agreement, found));
        }
        Ok(Played {
            passes: tap.passes(),
            recording,
            session,
            read,
        })
    }

    /// Everything that can be said of one run, and that a second one is the same.
    fn contract(&self) -> Result<(), ConformanceError> {
        let turning = self.plan.turning;
        let played = self.play(self.policy.clone(), turning)?;
        self.replay(&played)?;
        let again = self.play(self.policy.clone(), turning)?;
        let verdicts = |played: &Played| {
            let decisions = played.recording.decisions();
            let kept = decisions
                .into_iter()
                .map(|d| (d.step, d.kept, d.folds, d.visible));
            kept.collect::<Vec<_>>()
        };
        let bits = |played: &Played| {
            let all = played.passes.iter().flat_map(|p| &p.hidden);
            all.map(|x| x.to_bits()).collect::<Vec<_>>()
        };
        if verdicts(&played) != verdicts(&again) {
            return Err(self.broken(
                Promise::Deterministic,
                "other units were kept or seen in a second sequence with the same tokens",
            ));
        }
        if bits(&played) != bits(&again) {
            return Err(self.broken(
                Promise::Deterministic,
                "a second sequence with the same tokens has other hidden states",
            ));
        }
        Ok(())
    }

    /// Goes through a run with the oracle.
    fn replay(&self, played: &Played) -> Result<(), ConformanceError> {
        let spec = &self.plan.spec;
        let needs = self.policy.needs();
        let mut oracle = Oracle::new(self.model, self.policy.positions()).observing(needs.observe);
        let mut walk = Walk {
            of: self,
            peak: Peak::default(),
            carried: vec![vec![Vec::new(); spec.kv_heads]; spec.layers],
            notes: vec![Vec::new(); spec.layers],
        };
        let mut decisions: VecDeque<Decision> = played.recording.decisions().into();
        let (mut turn, mut left) = (0, self.plan.turns[0].ids.len());
        let mut singles = false;
        for (index, pass) in played.passes.iter().enumerate() {
            // The engine asks once before a further prompt.
            while decisions
                .front()
                .is_some_and(|d| d.step.phase == Phase::Turn)
            {
                if let Some(decision) = decisions.pop_front() {
                    walk.verdict(&mut oracle, &decision)?;
                }
            }
            if decisions.len() < spec.layers {
                return Err(self.broken(
                    Promise::Layers,
                    format!("{} verdicts in pass {index}", decisions.len()),
                ));
            }
            let group: Vec<Decision> = decisions.drain(..spec.layers).collect();
            let before = walk.held(&oracle);
            let seen = oracle.seen();
            let visible: Vec<_> = group.iter().map(|d| d.visible.clone()).collect();
            let out = oracle.forward_seeing(&pass.ids, group[0].step.total, &visible);
            let expected = out.hidden.iter().flatten().copied();
            let (at, off) = super::largest_difference(doubles(&pass.hidden), expected);
            if off > self.tolerance() {
                return Err(self.broken(
                    Promise::Oracle,
                    format!(
                        "pass {index} ({:?}): off by {off:.2e} at token {} of {}, {:.1e} allowed",
                        group[0].step.phase,
                        at / spec.hidden,
                        pass.ids.len(),
                        self.tolerance(),
                    ),
                ));
            }
            walk.peaks(&before, pass.ids.len(), needs.later(), &group);
            for (layer, decision) in group.iter().enumerate() {
                let Step {
                    layer: found,
                    seen: was,
                    incoming,
                    ..
                } = decision.step;
                if (found.index, was, incoming) != (layer, seen, pass.ids.len()) {
                    return Err(self.broken(
                        Promise::View,
                        format!("pass {index}, layer {layer}: {:?}", decision.step),
                    ));
                }
                walk.view(decision, &out, layer)?;
                walk.verdict(&mut oracle, decision)?;
            }
            singles |= pass.ids.len() == 1;
            if let Phase::Decode | Phase::Forced = group[0].step.phase {
                continue;
            }
            left = left.saturating_sub(pass.ids.len());
            if left == 0 {
                let expected = out.logits.last().into_iter().flatten().copied();
                let (logits, peak) = &played.read[turn];
                let (at, off) = super::largest_difference(doubles(logits), expected);
                // Logits are about three times as large as hidden states.
                if off > 10.0 * self.tolerance() {
                    return Err(self.broken(
                        Promise::Oracle,
                        format!("logits after prompt {turn}: off by {off:.2e} at id {at}"),
                    ));
                }
                walk.compare_peak(*peak, singles || turn > 0)?;
                turn += 1;
                if let Some(next) = self.plan.turns.get(turn) {
                    // The last generated token is read with the next prompt, if none was forced after it.
                    let before = &self.plan.turns[turn - 1];
                    let pending = before.generate > 0 && before.forced.is_empty();
                    left = next.ids.len() + usize::from(pending);
                }
            }
        }
        self.first_prompt_peak(played)?;
        walk.compare_peak(played.session.cache().peak(), true)
    }

    /// A prompt that is long enough brings every head to its limit plus one whole chunk.
    fn first_prompt_peak(&self, played: &Played) -> Result<(), ConformanceError> {
        let turn = &self.plan.turns[0];
        let Prefill { chunk, local } = turn.prefill;
        let total = turn.ids.len();
        let body = total - local.min(total);
        let limits = (0..self.plan.spec.layers)
            .filter_map(|l| self.policy.limit(&self.plan.spec.layer(l), total));
        let Some(limit) = limits.max() else {
            return Ok(());
        };
        let peak = played.read[0].1.units_per_head;
        let most = (limit + chunk).max(limit + local);
        if peak > most {
            return Err(self.broken(
                Promise::PeakUnits,
                format!("{peak} units a head while the first prompt was read, {most} allowed"),
            ));
        }
        let enough = (limit.div_ceil(chunk) + 1) * chunk;
        if self.check.fills_budget && body >= enough && peak < limit + chunk {
            return Err(self.broken(
                Promise::PeakUnits,
                format!("{peak} units a head at most, where {limit} + {chunk} are due"),
            ));
        }
        Ok(())
    }

    fn fork(&self) -> Result<(), ConformanceError> {
        let plan = self.plan;
        let mut dice = Dice::new(plan.seed ^ 0xF0F0);
        let ids = [0, 1].map(|_| dice.ids(30, plan.spec.vocab));
        let prefill = plan.turns[0].prefill;
        let start = || -> Result<Session> {
            let mut session =
                Session::with_options(self.model.clone(), self.policy.clone(), plan.options)?;
            let turn = &plan.turns[0];
            session.prefill(&turn.ids, &turn.prefill)?;
            self.generate(&mut session, turn)?;
            Ok(session)
        };
        let run = || -> Result<[(Session, Session); 2]> {
            let mut origin = start()?;
            let mut fork = origin.fork()?;
            fork.prefill(&ids[1], &prefill)?;
            origin.prefill(&ids[0], &prefill)?;
            let mut alone = [start()?, start()?];
            for (session, ids) in alone.iter_mut().zip(&ids) {
                session.prefill(ids, &prefill)?;
            }
            let [a, b] = alone;
            Ok([(origin, a), (fork, b)])
        };
        let pairs = run().map_err(|e| self.failed(e))?;
        for ((forked, alone), who) in pairs.iter().zip(["the origin", "the fork"]) {
            let (forked, alone) = (State::of(forked), State::of(alone));
            if forked != alone {
                let what = if forked.positions != alone.positions {
                    "keeps other units"
                } else {
                    "has other logits or tokens"
                };
                return Err(self.broken(
                    Promise::Fork,
                    format!("{who} {what} than a sequence that was never forked"),
                ));
            }
        }
        Ok(())
    }

    /// Where it says how many of the best stay ([`KvCachePolicy::ranking`]), it says what its verdicts say.
    fn ranking(&self, device: &Device) -> Result<(), ConformanceError> {
        let plan = self.plan;
        let listing = Listing::new(self.model.compute().clone());
        let run = |listing: Option<&Listing>| -> Result<Session> {
            let model = RandomModel::new(plan.spec.clone(), plan.seed, device)?;
            let model = match listing {
                Some(listing) => model.computed_by(Arc::new(listing.clone())),
                None => model,
            };
            let mut session =
                Session::with_options(Arc::new(model), self.policy.clone(), plan.options)?;
            for turn in &plan.turns {
                session.prefill(&turn.ids, &turn.prefill)?;
                self.generate(&mut session, turn)?;
            }
            Ok(session)
        };
        let listed = run(Some(&listing)).map_err(|e| self.failed(e))?;
        if listing.chosen() == 0 {
            return Ok(());
        }
        let judged = run(None).map_err(|e| self.failed(e))?;
        let (listed, judged) = (State::of(&listed), State::of(&judged));
        let same = listed.positions == judged.positions;
        match listed == judged {
            true => Ok(()),
            false => Err(self.broken(
                Promise::Ranking,
                match same {
                    true => "other logits or tokens",
                    false => "other units",
                },
            )),
        }
    }

    /// `roomy` is the same policy with a budget that is never reached.
    fn like_full(&self, roomy: Arc<dyn KvCachePolicy>) -> Result<(), ConformanceError> {
        let spec = &self.plan.spec;
        let reached = (0..spec.layers).any(|layer| {
            let limit = roomy.limit(&spec.layer(layer), self.plan.turns[0].ids.len());
            limit.is_some_and(|limit| limit < self.plan.tokens())
        });
        if reached {
            return Ok(());
        }
        let roomy = self.play(roomy, self.plan.turning)?;
        // At original positions, where LongRoPE's switch of factors turns what is kept.
        let full = self.play(Arc::new(Everything::PLAIN), true)?;
        if roomy.session.cache().units() != full.session.cache().units() {
            return Err(self.broken(
                Promise::LikeFull,
                format!(
                    "{} units of {} are left",
                    roomy.session.cache().units(),
                    full.session.cache().units()
                ),
            ));
        }
        let lossy = !self.check.dense || self.plan.options.dtype != DType::F32;
        for (index, (a, b)) in roomy.passes.iter().zip(&full.passes).enumerate() {
            // Another text was drawn from logits that differ as much as they may.
            if lossy && a.ids != b.ids {
                break;
            }
            let (at, off) = super::largest_difference(doubles(&a.hidden), doubles(&b.hidden));
            if off > self.tolerance() {
                return Err(self.broken(
                    Promise::LikeFull,
                    format!(
                        "pass {index}: off by {off:.2e} at token {}",
                        at / spec.hidden
                    ),
                ));
            }
        }
        Ok(())
    }
}

fn doubles(x: &[f32]) -> impl Iterator<Item = f64> {
    x.iter().map(|x| f64::from(*x))
}

/// Whether the cache, its store and the verdicts disagree on what is held.
fn disagree(cache: &SequenceCache, recording: &Recording) -> Option<String> {
    let spec = cache.spec();
    let mut units = 0;
    for layer in 0..spec.layers {
        let kept = recording.last_kept(layer).unwrap_or_default();
        for head in 0..spec.kv_heads {
            let at = format!("layer {layer}, KV head {head}");
            let positions = cache.positions(layer, head);
            let n = positions.len();
            units += n;
            if kept.get(head).map(Vec::as_slice) != Some(positions) {
                return Some(format!("{at}: positions {positions:?}, verdict {kept:?}"));
            }
            let lens = (cache.len(layer, head), cache.store(layer).len(head));
            if lens != (n, n) {
                return Some(format!("{at}: {n} positions, (cache, store) hold {lens:?}"));
            }
            let scores = cache.scores(layer, head).len();
            let width = cache.policy().carried_width(&spec.layer(layer));
            if scores != 0 && scores != n * width {
                let found = format!("{scores} scores, {width} for each of {n} units");
                return Some(format!("{at}: {found}"));
            }
            if positions
                .last()
                .is_some_and(|p| *p as usize >= cache.seen())
            {
                return Some(format!("{at}: position beyond the {} seen", cache.seen()));
            }
        }
    }
    (cache.units() != units).then(|| format!("{} units reported, {units} held", cache.units()))
}

/// A run that is being gone through.
struct Walk<'a> {
    of: &'a Checking<'a>,
    peak: Peak,
    /// Scores that the units should carry, `[layer][head][unit]`.
    carried: Vec<Vec<Vec<f32>>>,
    /// What should be noted of each layer.
    notes: Vec<Vec<f32>>,
}

impl Walk<'_> {
    fn held(&self, oracle: &Oracle<'_>) -> Vec<Vec<usize>> {
        let spec = &self.of.plan.spec;
        let heads = |l| (0..spec.kv_heads).map(move |h| oracle.kept(l, h).len());
        (0..spec.layers).map(|l| heads(l).collect()).collect()
    }

    /// Counts what was held at each moment of a pass; all layers may have to wait with their eviction.
    fn peaks(&mut self, before: &[Vec<usize>], new: usize, wait: bool, group: &[Decision]) {
        let mut held = before.to_vec();
        let mut note = |held: &[Vec<usize>]| {
            let units: usize = held.iter().flatten().sum();
            let longest = held.iter().flatten().copied().max().unwrap_or(0);
            self.peak.units = self.peak.units.max(units);
            self.peak.units_per_head = self.peak.units_per_head.max(longest);
        };
        for (layer, decision) in group.iter().enumerate() {
            held[layer].iter_mut().for_each(|n| *n += new);
            note(&held);
            if !wait {
                held[layer] = decision.kept.iter().map(Vec::len).collect();
            }
        }
    }

    /// Bytes are exact unless single tokens were appended, for which stores reserve some room.
    fn compare_peak(&self, found: Peak, reserve: bool) -> Result<(), ConformanceError> {
        let of = self.of;
        if (found.units, found.units_per_head) != (self.peak.units, self.peak.units_per_head) {
            return Err(of.broken(
                Promise::PeakUnits,
                format!("reported {found:?}, held {:?}", self.peak),
            ));
        }
        if !of.check.dense {
            return Ok(());
        }
        let spec = &of.plan.spec;
        let unit = spec.unit_bytes(of.plan.options.dtype.block_bytes());
        let exact = self.peak.units * unit;
        let most = if reserve {
            exact + spec.layers * spec.kv_heads * RESERVE * unit
        } else {
            exact
        };
        if found.bytes < exact || found.bytes > most {
            return Err(of.broken(
                Promise::PeakBytes,
                format!("{} bytes, where {exact} to {most} are due", found.bytes),
            ));
        }
        Ok(())
    }

    fn verdict(
        &mut self,
        oracle: &mut Oracle<'_>,
        decision: &Decision,
    ) -> Result<(), ConformanceError> {
        let of = self.of;
        let Step {
            layer,
            phase,
            total,
            ..
        } = decision.step;
        let limit = of.policy.limit(&layer, total);
        for (head, (before, kept)) in decision.before.iter().zip(&decision.kept).enumerate() {
            let at = format!("layer {}, KV head {head}, {phase:?}", layer.index);
            if before.as_slice() != oracle.kept(layer.index, head) {
                return Err(of.broken(
                    Promise::Agreement,
                    format!(
                        "{at}: {before:?} was shown, {:?} is held",
                        oracle.kept(layer.index, head)
                    ),
                ));
            }
            if kept.windows(2).any(|w| w[0] >= w[1])
                || kept.iter().any(|p| before.binary_search(p).is_err())
            {
                return Err(of.broken(Promise::Subset, format!("{at}: {kept:?} of {before:?}")));
            }
            let Some(limit) = limit else { continue };
            let (n, left) = (before.len(), kept.len());
            let reading = matches!(phase, Phase::Turn | Phase::Prefill { .. });
            if reading && left > limit {
                return Err(of.broken(
                    Promise::Bound,
                    format!("{at}: {left} units, the limit is {limit}"),
                ));
            }
            let due = match (phase, of.plan.decode) {
                (Phase::Turn | Phase::Prefill { .. }, _) => n.min(limit),
                (Phase::Decode, DecodeEviction::Every(every)) if n >= limit + every => limit,
                _ => n,
            };
            if of.check.fills_budget && left != due {
                return Err(of.broken(
                    Promise::FillsBudget,
                    format!("{at}: {left} of {n} units are left, {due} are due"),
                ));
            }
        }
        if let Some(notes) = &decision.notes {
            self.notes[layer.index].clone_from(notes);
        }
        // What goes with the units.
        let carried = &mut self.carried[layer.index];
        for (head, carried) in carried.iter_mut().enumerate() {
            let (before, kept) = (&decision.before[head], &decision.kept[head]);
            let old = std::mem::take(carried);
            if let Some(scores) = &decision.scores {
                let new = scores.heads().get(head).map_or(&[][..], Vec::as_slice);
                let all = [&old[..scores.first() * scores.width()], new].concat();
                let all = all.chunks(scores.width()).zip(before);
                let stay = all.filter(|(_, p)| kept.binary_search(p).is_ok());
                carried.extend(stay.flat_map(|(scores, _)| scores));
            }
        }
        for (head, folds) in decision.folds.iter().enumerate() {
            oracle.fold(layer.index, head, folds);
            if decision.folds_keys {
                oracle.fold_keys(layer.index, head, folds);
            }
        }
        oracle.keep(layer.index, decision.kept.clone());
        Ok(())
    }

    /// Compares what the policy was shown with what the oracle computed.
    fn view(
        &self,
        decision: &Decision,
        out: &OraclePass,
        layer: usize,
    ) -> Result<(), ConformanceError> {
        let of = self.of;
        let needs = of.policy.needs();
        let seen = &decision.seen;
        let tolerance = of.tolerance();
        let compare = |what: &str, found: &[f32], expected: Vec<f64>, factor: f64| {
            let largest = expected.iter().filter(|x| x.is_finite());
            let largest = largest.fold(1f64, |most, x| most.max(x.abs()));
            // The first token of a sequence has no surprisal on either side.
            let numbers = |x: f64| if x.is_nan() { f64::MAX } else { x };
            let (at, off) = super::largest_difference(
                doubles(found).map(numbers),
                expected.iter().copied().map(numbers),
            );
            if found.len() == expected.len() && off <= tolerance * factor * largest {
                return Ok(());
            }
            Err(of.broken(
                Promise::View,
                format!(
                    "{what} of layer {layer}, {:?}: {} numbers for {}, off by {off:.2e} at {at}",
                    decision.step.phase,
                    found.len(),
                    expected.len()
                ),
            ))
        };
        let flat = |x: &[Vec<f64>]| x.iter().flatten().copied().collect::<Vec<_>>();
        if seen.carried != self.carried[layer] {
            return Err(of.broken(
                Promise::View,
                format!(
                    "carried scores of layer {layer}: {:?}, left by the last verdict: {:?}",
                    seen.carried, self.carried[layer]
                ),
            ));
        }
        if seen.notes != self.notes[layer] {
            return Err(of.broken(
                Promise::View,
                format!(
                    "{} notes of layer {layer}, other than the last verdict left",
                    seen.notes.len()
                ),
            ));
        }
        match (&seen.surprisal, needs.surprisal) {
            // Logits are about three times as large as hidden states.
            (Some(found), true) => compare("surprisal", found, out.surprisal.clone(), 10.0)?,
            (None, false) => {}
            (found, _) => {
                return Err(of.broken(Promise::View, format!("surprisal is {found:?}")));
            }
        }
        if needs.qkv {
            let found = seen.qkv.clone().unwrap_or_default();
            let parts = [("q", &out.q), ("k", &out.k), ("v", &out.v)];
            for ((what, expected), found) in parts.into_iter().zip(&found) {
                compare(what, found, flat(&expected[layer]), 1.0)?;
            }
        }
        if needs.input {
            let found = seen.input.clone().unwrap_or_default();
            compare("the input", &found, flat(&out.input[layer]), 1.0)?;
        }
        if let Some(observe) = needs.observe {
            let (found, queries) = seen.observed.clone().unwrap_or_default();
            let due = observe.queries.count(decision.step.incoming);
            if queries != due {
                return Err(of.broken(
                    Promise::View,
                    format!("{queries} queries were observed, {due} are due"),
                ));
            }
            compare(
                "observed attention",
                &found.concat(),
                out.observed[layer].concat(),
                2.0,
            )?;
        }
        for head in 0..of.plan.spec.kv_heads {
            let (keys, values) = (&out.keys[layer][head], &out.values[layer][head]);
            compare("keys", &seen.keys[head], flat(keys), 1.0)?;
            compare("values", &seen.values[head], flat(values), 1.0)?;
        }
        Ok(())
    }
}
