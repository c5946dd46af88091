//! Policies as configuration: the same choice in a file, on a command line and in code.

use crate::{
    Full, H2o, HeadAdvice, HeadWeights, KeyDiff, KeyNorm, Locret, Merge, PolicyError, Quantized,
    Random, Result, RetainingHeads, SirLlm, SnapKv, Tova, Window,
};
use burn::tensor::Device;
use locret_core::{
    Budget, CausalLm, DecodeEviction, Evict, Guard, KvCachePolicy, ModelSpec, Positions,
    Quantization, Scorer,
};
use serde::{Deserialize, Deserializer, Serialize, de};
use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};

/// The methods of this crate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Method {
    /// [`Full`]
    Full,
    /// [`Window`] (StreamingLLM)
    Window,
    /// [`Random`]
    Random,
    /// [`KeyNorm`]
    KeyNorm,
    /// [`KeyDiff`]
    KeyDiff,
    /// [`SirLlm`]
    #[serde(rename = "sirllm")]
    SirLlm,
    /// [`Locret`]
    Locret,
    /// [`H2o`]
    #[serde(rename = "h2o")]
    H2o,
    /// [`SnapKv`]
    #[serde(rename = "snapkv")]
    SnapKv,
    /// [`Tova`]
    Tova,
}

impl Method {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Full,
        Self::Window,
        Self::Random,
        Self::KeyNorm,
        Self::KeyDiff,
        Self::SirLlm,
        Self::Locret,
        Self::H2o,
        Self::SnapKv,
        Self::Tova,
    ];

    /// The name in files and on command lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Window => "window",
            Self::Random => "random",
            Self::KeyNorm => "key-norm",
            Self::KeyDiff => "key-diff",
            Self::SirLlm => "sirllm",
            Self::Locret => "locret",
            Self::H2o => "h2o",
            Self::SnapKv => "snapkv",
            Self::Tova => "tova",
        }
    }

    /// The positions that the method was published with, where nothing else is asked for.
    pub fn default_positions(self) -> Positions {
        match self {
            Self::Window | Self::SirLlm | Self::Locret => Positions::Compact,
            _ => Positions::Original,
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Method {
    type Err = PolicyError;

    fn from_str(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|method| method.name() == name);
        found.ok_or_else(|| {
            let known = Self::ALL.map(Self::name).join(", ");
            PolicyError::Config(format!("unknown policy `{name}`, expected one of {known}"))
        })
    }
}

/// A policy with its settings.
///
/// What is `None` takes the method's own default. A setting that the method does not have is an
/// error rather than ignored.
///
/// ```
/// use locret_policies::{Method, PolicyConfig};
///
/// let config = PolicyConfig::from_toml(
///     r#"
///     policy = "window"
///     budget = 256           # or { ratio = 0.125 } or { bytes = 4_000_000 }
///     positions = "original"
///     decode = { every = 16 }
///     "#,
/// )?;
/// assert_eq!(config.policy, Method::Window);
/// assert!(PolicyConfig::from_toml(r#"policy = "windows""#).is_err());
/// # Ok::<(), locret_policies::PolicyError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyConfig {
    /// Which method.
    pub policy: Method,
    /// How many units each KV head of each layer keeps: a number of units, or a [`Budget`]. Every
    /// method but `full` needs it.
    #[serde(
        default,
        deserialize_with = "budget",
        skip_serializing_if = "Option::is_none"
    )]
    pub budget: Option<Budget>,
    /// First units that stay. By default 4 for `window` and `sirllm`, else 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sinks: Option<usize>,
    /// Newest units that stay, always. By default half of the budget for `h2o`, a quarter for
    /// `sirllm`, the window for `snapkv` (at most half of the budget), 1 for `tova`, else 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recent: Option<usize>,
    /// Newest units that stay while further chunks follow. By default an eighth of the budget for
    /// `locret`, else 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stabilizers: Option<usize>,
    /// Which positions attention uses. By default compact for `window`, `sirllm` and `locret`,
    /// else original.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub positions: Option<Positions>,
    /// Whether units are dropped while text is generated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decode: Option<DecodeEviction>,
    /// Selects on scores max-pooled over this many neighbouring units (odd; by default what the
    /// file of heads advises for `locret`, else 1, which is no pooling).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<usize>,
    /// Shares the budget out over the layers, more for lower ones, with this β ([`Evict::pyramid`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pyramid: Option<f64>,
    /// Shares a layer's budget out over its heads, with this floor ([`Evict::ada`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ada: Option<f64>,
    /// Folds dropped values into kept ones where the cosine of the keys is at least this
    /// ([`Merge`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub merge: Option<f32>,
    /// Keeps units as integers of this many bits, or a [`Quantization`] ([`Quantized`]).
    #[serde(
        default,
        deserialize_with = "quantization",
        skip_serializing_if = "Option::is_none"
    )]
    pub quantize: Option<Quantization>,
    /// `locret`: the file of retaining heads, see [`HeadWeights::load`]. Its
    /// [`HeadAdvice`](crate::HeadAdvice) stands in for `pool`, `sinks` and `positions` where they
    /// are not set; `pool = 1, sinks = 0, positions = "compact"` is the authors' procedure with any
    /// heads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heads: Option<PathBuf>,
    /// `random`: the seed (0).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// `sirllm`: the factor on carried scores when a further turn begins (1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decay: Option<f32>,
    /// `snapkv`: how many of the last queries are observed (64).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<usize>,
    /// `snapkv`: over how many neighbouring units their attention is averaged (odd, 5).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<usize>,
}

/// A budget, or a plain number of units.
fn budget<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Budget>, D::Error> {
    struct Visitor;

    impl<'de> de::Visitor<'de> for Visitor {
        type Value = Option<Budget>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a number of units, or one of `units`, `ratio` and `bytes` with its value")
        }

        fn visit_u64<E: de::Error>(self, units: u64) -> Result<Self::Value, E> {
            let units = usize::try_from(units).map_err(E::custom)?;
            Ok(Some(Budget::Units(units)))
        }

        fn visit_i64<E: de::Error>(self, units: i64) -> Result<Self::Value, E> {
            let units = usize::try_from(units)
                .map_err(|_| E::invalid_value(de::Unexpected::Signed(units), &self))?;
            Ok(Some(Budget::Units(units)))
        }

        fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
            Budget::deserialize(de::value::MapAccessDeserializer::new(map)).map(Some)
        }
    }

    from.deserialize_any(Visitor)
}

/// A quantisation, or a plain number of bits.
fn quantization<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Quantization>, D::Error> {
    struct Visitor;

    impl<'de> de::Visitor<'de> for Visitor {
        type Value = Option<Quantization>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a number of bits, or a table of `bits`, `layout`, `group` and `residual`")
        }

        fn visit_u64<E: de::Error>(self, bits: u64) -> Result<Self::Value, E> {
            let bits = u8::try_from(bits)
                .map_err(|_| E::invalid_value(de::Unexpected::Unsigned(bits), &self))?;
            Ok(Some(Quantization::bits(bits)))
        }

        fn visit_i64<E: de::Error>(self, bits: i64) -> Result<Self::Value, E> {
            let bits = u64::try_from(bits)
                .map_err(|_| E::invalid_value(de::Unexpected::Signed(bits), &self))?;
            self.visit_u64(bits)
        }

        fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
            Quantization::deserialize(de::value::MapAccessDeserializer::new(map)).map(Some)
        }
    }

    from.deserialize_any(Visitor)
}

impl PolicyConfig {
    /// A method with its defaults.
    pub fn new(policy: Method) -> Self {
        Self {
            policy,
            budget: None,
            sinks: None,
            recent: None,
            stabilizers: None,
            positions: None,
            decode: None,
            pool: None,
            pyramid: None,
            ada: None,
            merge: None,
            quantize: None,
            heads: None,
            seed: None,
            decay: None,
            window: None,
            kernel: None,
        }
    }

    /// The same with a budget.
    pub fn budget(mut self, budget: Budget) -> Self {
        self.budget = Some(budget);
        self
    }

    /// The same in other positions.
    pub fn positions(mut self, positions: Positions) -> Self {
        self.positions = Some(positions);
        self
    }

    /// From TOML.
    ///
    /// # Errors
    /// [`PolicyError::Config`] that names what is unknown, and where.
    pub fn from_toml(text: &str) -> Result<Self> {
        toml::from_str(text).map_err(|e| PolicyError::Config(e.to_string()))
    }

    /// From JSON.
    ///
    /// # Errors
    /// As [`from_toml`](Self::from_toml).
    pub fn from_json(text: &str) -> Result<Self> {
        serde_json::from_str(text).map_err(|e| PolicyError::Config(e.to_string()))
    }

    /// From a file: JSON if its name ends so, else TOML. A relative path of heads counts from the
    /// file's folder.
    ///
    /// # Errors
    /// [`PolicyError::Io`], and as [`from_toml`](Self::from_toml).
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(PolicyError::io(path))?;
        let json = path
            .extension()
            .is_some_and(|e| e.eq_ignore_ascii_case("json"));
        let parsed = if json {
            Self::from_json(&text)
        } else {
            Self::from_toml(&text)
        };
        let mut config = parsed.map_err(|e| match e {
            PolicyError::Config(message) => PolicyError::file(path, message),
            other => other,
        })?;
        if let (Some(heads), Some(folder)) = (&mut config.heads, path.parent()) {
            *heads = folder.join(&*heads);
        }
        Ok(config)
    }

    /// The policy, for a model that runs on `device`.
    ///
    /// # Errors
    /// [`PolicyError::Setting`] for a setting that the method does not have or lacks; those of
    /// [`HeadWeights::load`]; and what [`KvCachePolicy::validate`] says of the model.
    pub fn build(&self, model: &ModelSpec, device: &Device) -> Result<Arc<dyn KvCachePolicy>> {
        self.build_with(model, &|weights| {
            RetainingHeads::new(weights, model, device)
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
                self.wrap(Full::new().with_positions(positions))
            }
            Method::Window => self.evict(model, Window)?,
            Method::Random => self.evict(model, Random::new(self.seed.unwrap_or(0)))?,
            Method::KeyNorm => self.evict(model, KeyNorm)?,
            Method::KeyDiff => self.evict(model, KeyDiff)?,
            Method::SirLlm => self.evict(model, SirLlm::new().decay(self.decay.unwrap_or(1.0)))?,
            Method::H2o => self.evict(model, H2o)?,
            Method::SnapKv => self.evict(model, self.snapkv())?,
            Method::Tova => self.evict(model, Tova)?,
            Method::Locret => {
                let file = self.heads.as_ref().ok_or_else(|| {
                    PolicyError::setting(self.policy, "needs `heads`, a file of retaining heads")
                })?;
                let weights = HeadWeights::load(file, model)?;
                let heads = place(&weights)?;
                let advice = weights
                    .advice()
                    .map_err(|e| PolicyError::file(file, e.to_string()))?;
                self.advised(&advice).evict(model, Locret::new(heads))?
            }
        };
        policy.validate(model, &Default::default())?;
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
        let policy = self.evict(model, Locret::new(heads))?;
        policy.validate(model, &Default::default())?;
        Ok(policy)
    }

    /// With what heads advise, where nothing else is set.
    fn advised(&self, advice: &HeadAdvice) -> Self {
        let mut config = self.clone();
        config.pool = config.pool.or(advice.pool);
        config.sinks = config.sinks.or(advice.sinks);
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
        let evicts = self.policy != Method::Full;
        let only = |methods: &[Method]| methods.contains(&self.policy);
        let settings = [
            ("budget", self.budget.is_some(), evicts),
            ("sinks", self.sinks.is_some(), evicts),
            ("recent", self.recent.is_some(), evicts),
            ("stabilizers", self.stabilizers.is_some(), evicts),
            ("decode", self.decode.is_some(), evicts),
            ("pool", self.pool.is_some(), evicts),
            ("pyramid", self.pyramid.is_some(), evicts),
            ("ada", self.ada.is_some(), evicts),
            ("merge", self.merge.is_some(), evicts),
            ("heads", self.heads.is_some(), only(&[Method::Locret])),
            ("seed", self.seed.is_some(), only(&[Method::Random])),
            ("decay", self.decay.is_some(), only(&[Method::SirLlm])),
            ("window", self.window.is_some(), only(&[Method::SnapKv])),
            ("kernel", self.kernel.is_some(), only(&[Method::SnapKv])),
        ];
        match settings.into_iter().find(|(_, set, has)| *set && !has) {
            Some((name, ..)) => Err(PolicyError::setting(
                self.policy,
                format!("has no setting `{name}`"),
            )),
            None => Ok(()),
        }
    }

    fn evict<S: Scorer + 'static>(
        &self,
        model: &ModelSpec,
        scorer: S,
    ) -> Result<Arc<dyn KvCachePolicy>> {
        let budget = self.budget.ok_or_else(|| {
            PolicyError::setting(self.policy, "needs `budget`, the units that it keeps")
        })?;
        let mut policy = Evict::new(scorer, budget)
            .guard(self.guard(model, budget))
            .pool(self.pool.unwrap_or(1))
            .with_positions(self.positions.unwrap_or(self.policy.default_positions()))
            .while_decoding(self.decode.unwrap_or_default());
        if let Some(beta) = self.pyramid {
            policy = policy.pyramid(beta);
        }
        if let Some(floor) = self.ada {
            policy = policy.ada(floor);
        }
        Ok(match self.merge {
            Some(threshold) => self.wrap(Merge::new(policy, threshold)),
            None => self.wrap(policy),
        })
    }

    fn wrap(&self, policy: impl KvCachePolicy + 'static) -> Arc<dyn KvCachePolicy> {
        match self.quantize {
            Some(config) => Arc::new(Quantized::new(policy, config)),
            None => Arc::new(policy),
        }
    }

    /// What is protected. Defaults shrink with the budget; what was asked for does not.
    fn guard(&self, model: &ModelSpec, budget: Budget) -> Guard {
        // A ratio has no number of units before the text is known: then the defaults are those
        // of a budget of 256 units.
        let units = match budget {
            Budget::Ratio(_) => 256,
            _ => budget.units(&model.layer(0), 0),
        };
        let sinks = self.sinks.unwrap_or(match self.policy {
            Method::Window | Method::SirLlm => 4.min(units.saturating_sub(1)),
            _ => 0,
        });
        let room = units.saturating_sub(sinks + 1);
        let recent = self.recent.unwrap_or(match self.policy {
            Method::H2o => (units / 2).min(room),
            Method::SirLlm => (units / 4).min(room),
            Method::SnapKv => self.snapkv().queries().min(units / 2).min(room),
            Method::Tova => 1.min(room),
            _ => 0,
        });
        let stabilizers = self.stabilizers.unwrap_or(match self.policy {
            Method::Locret => (units / 8).min(room),
            _ => 0,
        });
        Guard {
            sinks,
            recent,
            stabilizers,
        }
    }
}
