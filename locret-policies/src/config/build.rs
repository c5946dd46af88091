//! From a configuration to a policy.

use super::{Method, PolicyConfig, TableConfig, TierConfig};
use crate::{
    Cam, CamKeeps, ChunkKv, Compactor, Critical, Cur, D2o, DuoAttention, ExpectedAttention,
    FastKvZip, Full, H2o, HeadAdvice, HeadWeights, Heavy, InfLlm, KeyDiff, KeyNorm, KvZap, LagKv,
    Locret, MInference, Merge, OutputNorms, PolicyError, PutAway, QFilters, Quantized, Random,
    Result, RetainingHeads, SirLlm, SnapKv, Sparse, Threshold, Tiered, Tova, Window,
    minference::{Pattern, Patterns},
    published::Published,
};
use locret_core::{
    Budget, CausalLm, Compute, DecodeEviction, KvCachePolicy, ModelSpec, Positions, Prefill, Share,
};
use std::{path::Path, sync::Arc};

impl PolicyConfig {
    /// The policy, for a model that `compute` computes.
    ///
    /// # Errors
    /// [`PolicyError::Setting`] for a setting that the method does not have or lacks; those of
    /// [`HeadWeights::load`]; and what [`KvCachePolicy::validate`] says of the model.
    pub fn build(
        &self,
        model: &ModelSpec,
        compute: &dyn Compute,
    ) -> Result<Arc<dyn KvCachePolicy>> {
        let heads = |weights: &HeadWeights| RetainingHeads::new(weights, model, compute);
        self.build_with(model, &heads, &|| Err(self.no_model()))
    }

    /// The policy for `model` itself: as [`build`](Self::build), with heads that are folded into the
    /// model's matrices where it has them ([`RetainingHeads::for_model`]), which makes them cheaper.
    ///
    /// # Errors
    /// As [`build`](Self::build), and the model's.
    pub fn build_for(&self, model: &dyn CausalLm) -> Result<Arc<dyn KvCachePolicy>> {
        let heads = |weights: &HeadWeights| RetainingHeads::for_model(weights, model);
        self.build_with(model.spec(), &heads, &|| OutputNorms::for_model(model))
    }

    fn build_with(
        &self,
        model: &ModelSpec,
        place: &dyn Fn(&HeadWeights) -> Result<RetainingHeads>,
        norms: Norms<'_>,
    ) -> Result<Arc<dyn KvCachePolicy>> {
        self.check()?;
        let policy: Arc<dyn KvCachePolicy> = match self.policy {
            Method::Full => {
                let positions = self.positions.unwrap_or_default();
                self.wrap(Full::new().with_positions(positions), None)?
            }
            Method::InfLlm => self.infllm(model)?,
            Method::Window => self.evict(norms, Window)?,
            Method::Random => self.evict(norms, Random::new(self.seed.unwrap_or(0)))?,
            Method::KeyNorm => self.evict(norms, KeyNorm)?,
            Method::KeyDiff => self.evict(norms, KeyDiff)?,
            Method::SirLlm => self.evict(norms, SirLlm::new().decay(self.decay.unwrap_or(1.0)))?,
            Method::H2o => self.evict(norms, H2o)?,
            Method::SnapKv => self.evict(norms, self.snapkv())?,
            Method::Tova => self.evict(norms, Tova)?,
            Method::ExpectedAttention => self.evict(norms, self.expected_attention())?,
            Method::LagKv => self.evict(norms, LagKv::new().lag(self.lag.unwrap_or(LagKv::LAG)))?,
            Method::Cur => {
                self.evict(norms, Cur::new().window(self.window.unwrap_or(Cur::WINDOW)))?
            }
            Method::QFilters => {
                let file = self.filters.as_ref().ok_or_else(|| {
                    PolicyError::setting(self.policy, "needs `filters`, a file of directions")
                })?;
                self.evict(norms, QFilters::load(file)?)?
            }
            Method::Compactor => {
                let scorer = Compactor::new().seed(self.seed.unwrap_or(0));
                let factor = self.blending.unwrap_or(Compactor::BLENDING);
                self.evict(norms, scorer.blending(factor))?
            }
            Method::KvZap | Method::FastKvZip => {
                let heads = place(&self.head_weights(model)?)?;
                self.surrogate(norms, Arc::new(heads))?
            }
            Method::D2o => self.evict(norms, Heavy)?,
            Method::Cam => match self.keeps.unwrap_or_default() {
                CamKeeps::Window => self.evict(norms, Window)?,
                CamKeeps::Heavy => self.evict(norms, Heavy)?,
            },
            Method::DuoAttention => self.wrap(self.duo()?, None)?,
            Method::MInference => {
                let positions = self.positions.unwrap_or_default();
                let policy = MInference::new(self.patterns()?).with_positions(positions);
                self.wrap(policy, None)?
            }
            Method::Locret => {
                let weights = self.head_weights(model)?;
                let heads = place(&weights)?;
                let file = self.heads.as_deref().unwrap_or(Path::new(""));
                let advice = weights
                    .advice()
                    .map_err(|e| PolicyError::file(file, e.to_string()))?;
                self.advised(&advice).evict(norms, Locret::new(heads))?
            }
        };
        self.validated(policy, model)
    }

    /// The policy, if it fits the model; prompts' chunks are no matter of it yet.
    fn validated(
        &self,
        policy: Arc<dyn KvCachePolicy>,
        model: &ModelSpec,
    ) -> Result<Arc<dyn KvCachePolicy>> {
        let mut prefill = Prefill::default();
        if let Some(most) = self.exec_block {
            prefill.chunk = prefill.chunk.min(most.max(1));
        }
        policy.validate(model, &prefill)?;
        Ok(policy)
    }

    /// The policy with heads that are in memory already, instead of [`heads`](Self::heads).
    ///
    /// # Errors
    /// As [`build`](Self::build).
    pub fn build_with_heads(
        &self,
        model: &ModelSpec,
        heads: impl Into<Arc<RetainingHeads>>,
    ) -> Result<Arc<dyn KvCachePolicy>> {
        self.check()?;
        let norms = || Err(self.no_model());
        let policy = match self.policy {
            Method::Locret => self.evict(&norms, Locret::new(heads))?,
            Method::KvZap | Method::FastKvZip => self.surrogate(&norms, heads.into())?,
            _ => return Err(PolicyError::setting(self.policy, "has no retaining heads")),
        };
        self.validated(policy, model)
    }

    fn head_weights(&self, model: &ModelSpec) -> Result<HeadWeights> {
        let file = self.heads.as_ref().ok_or_else(|| {
            PolicyError::setting(self.policy, "needs `heads`, a file of retaining heads")
        })?;
        HeadWeights::load(file, model)
    }

    /// Heads that stand in for KVzip, with a budget or with a threshold.
    fn surrogate(
        &self,
        norms: Norms<'_>,
        heads: Arc<RetainingHeads>,
    ) -> Result<Arc<dyn KvCachePolicy>> {
        match (self.policy, self.threshold) {
            (Method::KvZap, None) => self.evict(norms, KvZap::new(heads)),
            (Method::KvZap, Some(least)) => self.cut(KvZap::new(heads), 0, least),
            (_, None) => self.evict(norms, FastKvZip::new(heads)),
            (_, Some(least)) => self.cut(FastKvZip::new(heads), FastKvZip::SINKS, least),
        }
    }

    /// A scorer with a threshold.
    fn cut<S: Published + 'static>(
        &self,
        scorer: S,
        sinks: usize,
        least: f32,
    ) -> Result<Arc<dyn KvCachePolicy>> {
        let policy = Threshold::new(scorer, least)
            .sinks(self.sinks.unwrap_or(sinks))
            .window(self.recent.unwrap_or(Threshold::<S>::WINDOW))
            .with_positions(self.positions.unwrap_or(S::POSITIONS))
            .while_decoding(self.decode.is_some_and(|d| d != DecodeEviction::Off));
        match self.merge {
            Some(threshold) => {
                let by = self.merge_by.unwrap_or_default();
                self.wrap(Merge::new(policy, threshold).by(by), None)
            }
            None => self.wrap(policy, None),
        }
    }

    fn duo(&self) -> Result<DuoAttention> {
        let file = self.patterns.as_ref().ok_or_else(|| {
            PolicyError::setting(self.policy, "needs `patterns`, a file of heads' scores")
        })?;
        let share = self.streaming.unwrap_or(DuoAttention::STREAMING);
        Ok(DuoAttention::load(file, share)?
            .sinks(self.sinks.unwrap_or(DuoAttention::SINKS))
            .recent(self.recent.unwrap_or(DuoAttention::RECENT))
            .with_positions(self.positions.unwrap_or_default())
            .while_decoding(self.decode.unwrap_or_default()))
    }

    /// With sizes as published, or such that a budget is what is resident between two chunks.
    fn infllm(&self, model: &ModelSpec) -> Result<Arc<dyn KvCachePolicy>> {
        let mut policy = InfLlm::new();
        let units = match self.budget {
            None => None,
            Some(Budget::Units(_) | Budget::Bytes(_)) => {
                self.budget.map(|budget| budget.units(&model.layer(0), 0))
            }
            Some(other) => {
                let found = format!("needs a `budget` of units or bytes, not {other}");
                return Err(PolicyError::setting(self.policy, found));
            }
        };
        if let Some(units) = units {
            policy = InfLlm::within(units);
        }
        if let Some(units) = self.n_init {
            policy = policy.init(units);
        }
        if let Some(units) = self.n_local {
            policy = policy.local(units);
        }
        if let Some(units) = self.block_size {
            policy = policy.block(units);
        }
        if let Some(blocks) = self.topk {
            policy = policy.topk(blocks);
        }
        if let Some(keys) = self.repr_topk {
            policy = policy.representatives(keys);
        }
        if let Some(tokens) = self.exec_block {
            policy = policy.exec_block(tokens);
        }
        if let Some(units) = units.filter(|units| policy.seen() > *units) {
            let found = format!(
                "sees {} units at once with these sizes, more than its `budget` of {units}",
                policy.seen()
            );
            return Err(PolicyError::setting(self.policy, found));
        }
        let room = units.map(|units| Room {
            units,
            step: policy.longest_chunk(),
        });
        self.wrap(policy, room)
    }

    /// With the settings of blocks that are given.
    fn putting_away(&self, policy: Arc<dyn KvCachePolicy>) -> PutAway<Arc<dyn KvCachePolicy>> {
        let mut policy = PutAway::new(policy);
        if let Some(units) = self.block_size {
            policy = policy.block(units);
        }
        if let Some(blocks) = self.topk {
            policy = policy.topk(blocks);
        }
        if let Some(keys) = self.repr_topk {
            policy = policy.representatives(keys);
        }
        policy
    }

    /// From a file, or the same for all heads.
    fn patterns(&self) -> Result<Patterns> {
        match (&self.patterns, self.vertical, self.slash) {
            (None, None, None) => Ok(Patterns::default()),
            (Some(file), None, None) => Patterns::load(file),
            (None, Some(vertical), Some(slash)) => Ok(Patterns::uniform(Pattern::VerticalSlash {
                vertical,
                slash,
            })),
            _ => Err(PolicyError::setting(
                self.policy,
                "takes either `patterns`, or `vertical` and `slash`, which are both needed then",
            )),
        }
    }

    /// The same with what heads advise where nothing is set, if [`advice`](Self::advice) is followed.
    ///
    /// Of a budget in units at most an eighth goes to first units and a quarter to the newest. How layers share is
    /// said once: where `pyramid`, `table` or `share = "model"` is set, neither a table nor sharing over the model is
    /// taken.
    pub fn advised(&self, advice: &HeadAdvice) -> Self {
        let mut config = self.clone();
        if config.advice == Some(false) {
            return config;
        }
        let model = Some(Share::Model);
        let said = config.pyramid.is_some() || config.table.is_some() || config.share == model;
        let (mut share, mut table) = (advice.share, advice.table.clone());
        if said {
            share = share.filter(|share| Some(*share) != model);
            table = None;
        }
        config.pool = config.pool.or(advice.pool);
        let most = |part: usize| match config.budget {
            Some(Budget::Units(units)) => units / part,
            _ => usize::MAX,
        };
        let (sinks, recent) = (most(8), most(4));
        config.sinks = config.sinks.or(advice.sinks.map(|units| units.min(sinks)));
        config.recent = config
            .recent
            .or(advice.recent.map(|units| units.min(recent)));
        config.ada = config.ada.or(advice.ada);
        config.share = config.share.or(share);
        config.table = config.table.or(table.map(TableConfig::Shares));
        config.positions = config.positions.or(advice.positions);
        config
    }

    fn snapkv(&self) -> SnapKv {
        let mut scorer = SnapKv::new();
        if let Some(window) = self.window {
            scorer = scorer.window(window);
        }
        if let Some(kernel) = self.kernel {
            scorer = scorer.kernel(kernel);
        }
        scorer
    }

    fn expected_attention(&self) -> ExpectedAttention {
        let mut scorer = ExpectedAttention::new();
        if let Some(positions) = self.future {
            scorer = scorer.future(positions);
        }
        if self.critical {
            // Values are weighed behind the output projection.
            scorer = scorer.value_norm(false);
        } else if self.ada.is_some() || self.share.is_some() {
            scorer = scorer.epsilon(ExpectedAttention::SHARED_EPSILON);
        }
        scorer
    }

    /// Refuses settings that the method would ignore.
    fn check(&self) -> Result<()> {
        let evicts = self.policy.evicts();
        let infllm = self.policy == Method::InfLlm;
        if infllm && self.positions == Some(Positions::Original) {
            return Err(PolicyError::setting(
                self.policy,
                "has compact positions only: distant units are seen at one distance",
            ));
        }
        if self.resident.is_some() && self.tier.is_none() && !(infllm && self.budget.is_some()) {
            let found = "has a setting `resident` only with a `tier`";
            return Err(PolicyError::setting(self.policy, found));
        }
        let blocks = infllm || (evicts && self.put_away);
        let duo = self.policy == Method::DuoAttention;
        // A threshold stands in for a budget and all that shares it out.
        let cut = self.threshold.is_some();
        let shares = evicts && !cut;
        let only = |methods: &[Method]| methods.contains(&self.policy);
        let d2o = only(&[Method::D2o]);
        let sparse = only(&[Method::MInference]) || self.sparse;
        let merges = self.policy.merges();
        let settings = [
            (
                "threshold",
                cut,
                only(&[Method::KvZap, Method::FastKvZip]) && self.budget.is_none(),
            ),
            ("budget", self.budget.is_some(), self.policy.takes_budget()),
            ("sinks", self.sinks.is_some(), evicts || duo),
            ("recent", self.recent.is_some(), evicts || duo),
            ("stabilizers", self.stabilizers.is_some(), shares),
            ("decode", self.decode.is_some(), evicts || duo),
            ("pool", self.pool.is_some(), shares),
            ("pyramid", self.pyramid.is_some(), shares),
            ("ada", self.ada.is_some(), shares),
            ("share", self.share.is_some(), shares),
            ("table", self.table.is_some(), shares),
            ("merge", self.merge.is_some(), evicts && !merges),
            ("merge_by", self.merge_by.is_some(), self.merge.is_some()),
            ("critical", self.critical, shares && self.blocks.is_none()),
            ("blocks", self.blocks.is_some(), shares),
            ("heads", self.heads.is_some(), self.policy.takes_heads()),
            ("advice", self.advice.is_some(), only(&[Method::Locret])),
            (
                "seed",
                self.seed.is_some(),
                only(&[Method::Random, Method::Compactor, Method::Cam]),
            ),
            (
                "blending",
                self.blending.is_some(),
                only(&[Method::Compactor]),
            ),
            ("streaming", self.streaming.is_some(), duo),
            ("decay", self.decay.is_some(), only(&[Method::SirLlm])),
            (
                "window",
                self.window.is_some(),
                only(&[Method::SnapKv, Method::Cur, Method::Cam]),
            ),
            ("lag", self.lag.is_some(), only(&[Method::LagKv])),
            (
                "future",
                self.future.is_some(),
                only(&[Method::ExpectedAttention]),
            ),
            ("filters", self.filters.is_some(), only(&[Method::QFilters])),
            ("kernel", self.kernel.is_some(), only(&[Method::SnapKv])),
            ("patterns", self.patterns.is_some(), sparse || duo),
            ("vertical", self.vertical.is_some(), sparse),
            ("slash", self.slash.is_some(), sparse),
            ("sparse", self.sparse, evicts && !self.put_away),
            ("n_init", self.n_init.is_some(), infllm),
            ("n_local", self.n_local.is_some(), infllm),
            ("exec_block", self.exec_block.is_some(), infllm),
            ("block_size", self.block_size.is_some(), blocks),
            ("topk", self.topk.is_some(), blocks),
            ("repr_topk", self.repr_topk.is_some(), blocks),
            (
                "put_away",
                self.put_away,
                evicts && self.merge.is_none() && !merges,
            ),
            ("form", self.form.is_some(), d2o),
            ("mix_keys", self.mix_keys.is_some(), d2o),
            ("smoothing", self.smoothing.is_some(), d2o),
            ("exempt", self.exempt.is_some(), d2o),
            ("exempt_whole", self.exempt_whole, d2o),
            ("keeps", self.keeps.is_some(), only(&[Method::Cam])),
            ("sums", self.sums, only(&[Method::Cam])),
            ("tier", self.tier.is_some(), infllm || self.put_away),
        ];
        match settings.into_iter().find(|(_, set, has)| *set && !has) {
            Some((name, ..)) => Err(PolicyError::setting(
                self.policy,
                format!("has no setting `{name}`"),
            )),
            None => Ok(()),
        }
    }

    /// What `critical` cannot do without.
    fn no_model(&self) -> PolicyError {
        PolicyError::setting(
            self.policy,
            "needs the model's output projections for `critical` (`PolicyConfig::build_for`)",
        )
    }

    /// What chooses by more than scores goes around the scorer.
    fn evict<S: Published + 'static>(
        &self,
        norms: Norms<'_>,
        scorer: S,
    ) -> Result<Arc<dyn KvCachePolicy>> {
        match (self.critical, self.blocks) {
            (true, _) => self.bounded(Critical::new(scorer, norms()?)),
            (false, Some(tokens)) => self.bounded(ChunkKv::new(scorer).block(tokens)),
            (false, None) => self.bounded(scorer),
        }
    }

    fn bounded<S: Published + 'static>(&self, scorer: S) -> Result<Arc<dyn KvCachePolicy>> {
        let budget = self.budget.ok_or_else(|| {
            PolicyError::setting(self.policy, "needs `budget`, the units that it keeps")
        })?;
        let mut policy = scorer
            .published(budget)
            .pool(self.pool.unwrap_or(1))
            .with_positions(self.positions.unwrap_or(S::POSITIONS))
            .while_decoding(self.decode.unwrap_or_default());
        if let Some(units) = self.sinks {
            policy = policy.sinks(units);
        }
        if let Some(units) = self.recent {
            policy = policy.recent(units);
        }
        if let Some(units) = self.stabilizers {
            policy = policy.stabilizers(units);
        }
        if let Some(beta) = self.pyramid {
            policy = policy.pyramid(beta);
        }
        if let Some(floor) = self.ada {
            policy = policy.ada(floor);
        }
        if let Some(share) = self.share {
            policy = policy.share(share);
        }
        if let Some(table) = &self.table {
            policy = policy.table(table.table()?);
        }
        let room = match budget {
            Budget::Units(units) => Some(Room { units, step: STEP }),
            _ => None,
        };
        match (self.policy, self.merge) {
            (Method::D2o, _) => self.wrap(self.d2o(policy), room),
            (Method::Cam, _) => self.wrap(self.cam(policy), room),
            (_, Some(threshold)) => {
                let by = self.merge_by.unwrap_or_default();
                self.wrap(Merge::new(policy, threshold).by(by), room)
            }
            (_, None) => self.wrap(policy, room),
        }
    }

    fn d2o<P: KvCachePolicy>(&self, policy: P) -> D2o<P> {
        let (first, last) = self.exempt.unwrap_or(D2o::<P>::EXEMPT);
        D2o::new(policy)
            .form(self.form.unwrap_or_default())
            .keys(self.mix_keys.unwrap_or(true))
            .smoothing(self.smoothing.unwrap_or(D2o::<P>::SMOOTHING))
            .exempt(first, last)
            .whole(self.exempt_whole)
    }

    fn cam<P: KvCachePolicy>(&self, policy: P) -> Cam<P> {
        Cam::new(policy)
            .window(self.window.unwrap_or(Cam::<P>::NEXT))
            .seed(self.seed.unwrap_or(0))
            .sums(self.sums)
    }

    /// What goes around the method. `room` is what has to be resident where nothing else is said, but for retrieved
    /// blocks of what is put away.
    fn wrap(
        &self,
        policy: impl KvCachePolicy + 'static,
        mut room: Option<Room>,
    ) -> Result<Arc<dyn KvCachePolicy>> {
        let mut policy: Arc<dyn KvCachePolicy> = Arc::new(policy);
        if self.sparse {
            policy = Arc::new(Sparse::new(policy, self.patterns()?));
        }
        if self.put_away {
            let mut putting = self.putting_away(policy);
            if let Some(Budget::Units(units)) = self.resident {
                putting = putting.within(units);
            }
            room = room.map(|room| Room {
                units: room.units.saturating_add(putting.seen()),
                ..room
            });
            policy = Arc::new(putting);
        }
        if let Some(config) = self.quantize {
            policy = Arc::new(Quantized::new(policy, config));
        }
        let tier = match (&self.tier, self.policy, self.budget) {
            (Some(tier), ..) => tier,
            (None, Method::InfLlm, Some(_)) => &TierConfig::Memory,
            _ => return Ok(policy),
        };
        let tiered = match (self.resident, room) {
            (Some(resident), _) => Tiered::new(policy, tier.tier(), resident),
            (None, Some(Room { units, step })) => {
                Tiered::new(policy, tier.tier(), Budget::Units(units)).step(step)
            }
            (None, None) => {
                let found = "needs `resident`, what is not put away, or a budget of units";
                return Err(PolicyError::setting(self.policy, found));
            }
        };
        Ok(Arc::new(tiered))
    }
}

/// A model's output projections, for whoever needs them.
type Norms<'a> = &'a dyn Fn() -> Result<OutputNorms>;

/// Units of a step, where no method says how many it may have.
const STEP: usize = 512;

/// Units of each KV head that are resident: between two steps, and new ones.
#[derive(Debug, Clone, Copy)]
struct Room {
    units: usize,
    step: usize,
}
