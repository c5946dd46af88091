//! From a configuration to a policy.

use super::{Method, PolicyConfig, TierConfig};
use crate::{
    Full, H2o, HeadAdvice, HeadWeights, InfLlm, KeyDiff, KeyNorm, Locret, MInference, Merge,
    PolicyError, PutAway, Quantized, Random, Result, RetainingHeads, SirLlm, SnapKv, Tiered, Tova,
    Window,
    minference::{Pattern, Patterns},
    published::Published,
};
use locret_core::{
    Budget, BudgetTable, CausalLm, Compute, KvCachePolicy, ModelSpec, Positions, Prefill,
};
use std::{fs, path::Path, sync::Arc};

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
        self.build_with(model, &|weights| {
            RetainingHeads::new(weights, model, compute)
        })
    }

    /// The policy for `model` itself: as [`build`](Self::build), with heads that are folded into the
    /// model's matrices where it has them ([`RetainingHeads::for_model`]), which makes them cheaper.
    ///
    /// # Errors
    /// As [`build`](Self::build), and the model's.
    pub fn build_for(&self, model: &dyn CausalLm) -> Result<Arc<dyn KvCachePolicy>> {
        self.build_with(model.spec(), &|weights| {
            RetainingHeads::for_model(weights, model)
        })
    }

    fn build_with(
        &self,
        model: &ModelSpec,
        place: &dyn Fn(&HeadWeights) -> Result<RetainingHeads>,
    ) -> Result<Arc<dyn KvCachePolicy>> {
        self.check()?;
        let policy: Arc<dyn KvCachePolicy> = match self.policy {
            Method::Full => {
                let positions = self.positions.unwrap_or_default();
                self.wrap(Full::new().with_positions(positions), None)?
            }
            Method::InfLlm => self.infllm(model)?,
            Method::Window => self.evict(Window)?,
            Method::Random => self.evict(Random::new(self.seed.unwrap_or(0)))?,
            Method::KeyNorm => self.evict(KeyNorm)?,
            Method::KeyDiff => self.evict(KeyDiff)?,
            Method::SirLlm => self.evict(SirLlm::new().decay(self.decay.unwrap_or(1.0)))?,
            Method::H2o => self.evict(H2o)?,
            Method::SnapKv => self.evict(self.snapkv())?,
            Method::Tova => self.evict(Tova)?,
            Method::MInference => {
                let positions = self.positions.unwrap_or_default();
                let policy = MInference::new(self.patterns()?).with_positions(positions);
                self.wrap(policy, None)?
            }
            Method::Locret => {
                let file = self.heads.as_ref().ok_or_else(|| {
                    PolicyError::setting(self.policy, "needs `heads`, a file of retaining heads")
                })?;
                let weights = HeadWeights::load(file, model)?;
                let heads = place(&weights)?;
                let advice = weights
                    .advice()
                    .map_err(|e| PolicyError::file(file, e.to_string()))?;
                self.advised(&advice).evict(Locret::new(heads))?
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
        if self.policy != Method::Locret {
            return Err(PolicyError::setting(self.policy, "has no retaining heads"));
        }
        let policy = self.evict(Locret::new(heads))?;
        self.validated(policy, model)
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

    /// With what heads advise, where nothing else is set.
    fn advised(&self, advice: &HeadAdvice) -> Self {
        let mut config = self.clone();
        config.pool = config.pool.or(advice.pool);
        config.sinks = config.sinks.or(advice.sinks);
        config.recent = config.recent.or(advice.recent);
        config.ada = config.ada.or(advice.ada);
        config.share = config.share.or(advice.share);
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
        let only = |methods: &[Method]| methods.contains(&self.policy);
        let settings = [
            ("budget", self.budget.is_some(), self.policy.takes_budget()),
            ("sinks", self.sinks.is_some(), evicts),
            ("recent", self.recent.is_some(), evicts),
            ("stabilizers", self.stabilizers.is_some(), evicts),
            ("decode", self.decode.is_some(), evicts),
            ("pool", self.pool.is_some(), evicts),
            ("pyramid", self.pyramid.is_some(), evicts),
            ("ada", self.ada.is_some(), evicts),
            ("share", self.share.is_some(), evicts),
            ("table", self.table.is_some(), evicts),
            ("merge", self.merge.is_some(), evicts),
            ("heads", self.heads.is_some(), only(&[Method::Locret])),
            ("seed", self.seed.is_some(), only(&[Method::Random])),
            ("decay", self.decay.is_some(), only(&[Method::SirLlm])),
            ("window", self.window.is_some(), only(&[Method::SnapKv])),
            ("kernel", self.kernel.is_some(), only(&[Method::SnapKv])),
            (
                "patterns",
                self.patterns.is_some(),
                only(&[Method::MInference]),
            ),
            (
                "vertical",
                self.vertical.is_some(),
                only(&[Method::MInference]),
            ),
            ("slash", self.slash.is_some(), only(&[Method::MInference])),
            ("n_init", self.n_init.is_some(), infllm),
            ("n_local", self.n_local.is_some(), infllm),
            ("exec_block", self.exec_block.is_some(), infllm),
            ("block_size", self.block_size.is_some(), blocks),
            ("topk", self.topk.is_some(), blocks),
            ("repr_topk", self.repr_topk.is_some(), blocks),
            ("put_away", self.put_away, evicts && self.merge.is_none()),
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

    fn evict<S: Published + 'static>(&self, scorer: S) -> Result<Arc<dyn KvCachePolicy>> {
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
        if let Some(path) = &self.table {
            policy = policy.table(table(path)?);
        }
        let room = match budget {
            Budget::Units(units) => Some(Room { units, step: STEP }),
            _ => None,
        };
        match self.merge {
            Some(threshold) => self.wrap(Merge::new(policy, threshold), room),
            None => self.wrap(policy, room),
        }
    }

    /// What goes around the method. `room` is what has to be resident where nothing else is said, but for retrieved
    /// blocks of what is put away.
    fn wrap(
        &self,
        policy: impl KvCachePolicy + 'static,
        mut room: Option<Room>,
    ) -> Result<Arc<dyn KvCachePolicy>> {
        let mut policy: Arc<dyn KvCachePolicy> = Arc::new(policy);
        if self.put_away {
            let putting = self.putting_away(policy);
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

/// Units of a step, where no method says how many it may have.
const STEP: usize = 512;

/// Units of each KV head that are resident: between two steps, and new ones.
#[derive(Debug, Clone, Copy)]
struct Room {
    units: usize,
    step: usize,
}

/// A file's table of budgets.
fn table(path: &Path) -> Result<BudgetTable> {
    let text = fs::read_to_string(path).map_err(PolicyError::io(path))?;
    serde_json::from_str(&text).map_err(|e| PolicyError::file(path, e.to_string()))
}
