//! Policies as configuration: the same choice in a file, on a command line and in code.

mod build;
mod method;
mod shares;
mod tier;

pub use method::Method;
pub use shares::TableConfig;
pub use tier::TierConfig;

use crate::{CamKeeps, D2oForm, MergeBy, PolicyError, Result};
use locret_core::{Budget, DecodeEviction, Positions, Quantization, Share};
use serde::{Deserialize, Deserializer, Serialize, de};
use std::{
    fmt,
    path::{Path, PathBuf},
};

/// A policy with its settings.
///
/// What is `None` takes the method's own default. A setting that the method does not have is an
/// error rather than ignored. In code, begin with [`PolicyConfig::new`] and set the fields.
///
/// ```
/// use locret_policies::{Method, PolicyConfig};
///
/// let config = PolicyConfig::from_toml(
///     r#"
///     policy = "window"
///     budget = 256           # or "12.5%", "64MiB", { bytes = 4_000_000 }
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
#[non_exhaustive]
#[must_use]
pub struct PolicyConfig {
    /// Which method.
    pub policy: Method,
    /// How many units each KV head of each layer keeps, in any of the forms of a [`Budget`]. Every
    /// method but `full`, `minference` and `duo-attention` needs it, or a [`threshold`](Self::threshold). Of `infllm` these are the units that are resident, and it
    /// can do without: all of them are then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget: Option<Budget>,
    /// First units that stay. By default 4 for `window`, `sirllm`, `expected-attention`, `lagkv`, `cur`, `d2o`, `cam` and
    /// `fast-kvzip`, 8 for `compactor`, 128 for `duo-attention`, else 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sinks: Option<usize>,
    /// Newest units that stay, always. By default half of the budget for `h2o`, a quarter for
    /// `sirllm`, `d2o` and `cam` that keeps `heavy`, the window for `snapkv` and 128 for `kvzap` (at most half of the budget), an eighth for
    /// `fast-kvzip` (at most 4,096), 4 for `compactor`, 256 for `duo-attention`, 1 for `tova`, else 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recent: Option<usize>,
    /// Newest units that stay while further chunks follow. By default an eighth of the budget for
    /// `locret`, else 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stabilizers: Option<usize>,
    /// Which positions attention uses. By default compact for `window`, `sirllm`, `locret` and `cam` that keeps a
    /// window, else original.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub positions: Option<Positions>,
    /// Whether units are dropped while text is generated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decode: Option<DecodeEviction>,
    /// Selects on scores max-pooled over this many neighbouring units (odd; by default what the
    /// file of heads advises for `locret`, else 1, which is no pooling).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<usize>,
    /// Shares the budget out over the layers, more for lower ones, with this β
    /// ([`Evict::pyramid`](locret_core::Evict::pyramid)).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pyramid: Option<f64>,
    /// Shares a budget out over heads by their scores, with this floor
    /// ([`Evict::ada`](locret_core::Evict::ada)). By default [`Share::FLOOR`] where `share` is set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ada: Option<f64>,
    /// Over what heads share, if they do: `layer` (the default where `ada` is set) or `model`
    /// ([`Evict::share`](locret_core::Evict::share)).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share: Option<Share>,
    /// Shares the budget out over layers, or layers and heads, as a JSON file says or as is said here
    /// ([`Evict::table`](locret_core::Evict::table)).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table: Option<TableConfig>,
    /// Folds dropped values into kept ones where the cosine of the keys is at least this
    /// ([`Merge`](crate::Merge)).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub merge: Option<f32>,
    /// How much a folded value counts: `mean` (the default) or `weighted` ([`MergeBy`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub merge_by: Option<MergeBy>,
    /// Half of what is kept is chosen by what values become, too ([`Critical`](crate::Critical)). Needs the model
    /// itself ([`build_for`](Self::build_for)).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub critical: bool,
    /// Blocks of this many tokens stay or go together ([`ChunkKv`](crate::ChunkKv), 20 as published).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blocks: Option<usize>,
    /// Keeps units as integers of this many bits, or a [`Quantization`]
    /// ([`Quantized`](crate::Quantized)).
    #[serde(
        default,
        deserialize_with = "quantization",
        skip_serializing_if = "Option::is_none"
    )]
    pub quantize: Option<Quantization>,
    /// `locret`, `kvzap`, `fast-kvzip`: the file of heads, see [`HeadWeights::load`](crate::HeadWeights::load).
    /// Of Locret's, its [`HeadAdvice`](crate::HeadAdvice) stands in for what is not set ([`advised`](Self::advised)).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heads: Option<PathBuf>,
    /// `locret`: whether the advice in the file of heads is followed (true). Without it and without other settings,
    /// the procedure is the authors'.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advice: Option<bool>,
    /// `random`, `compactor`, `cam`: the seed (0).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// `sirllm`: the factor on carried scores when a further turn begins (1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decay: Option<f32>,
    /// `snapkv`: how many of the last queries are observed (64). `cur`: tokens of a window (16).
    /// `cam`: units that a dropped value is spread over (32).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<usize>,
    /// `snapkv`: over how many neighbouring units their attention is averaged (odd, 5).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<usize>,
    /// `kvzap`, `fast-kvzip`: keeps what scores at least this, instead of a budget
    /// ([`Threshold`](crate::Threshold)). `sinks` (4 for `fast-kvzip`) and `recent` (128) stay whatever their score.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threshold: Option<f32>,
    /// `d2o`: what is folded and what it counts, as in the `paper` (the default) or in the authors' `code` ([`D2oForm`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub form: Option<D2oForm>,
    /// `d2o`: whether keys are mixed as values are, where the store can (true).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mix_keys: Option<bool>,
    /// `d2o`: how much of the threshold a step's mean cosine is (0.5).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub smoothing: Option<f32>,
    /// `d2o`: how many of the first and of the last layers have nothing folded (`[2, 1]`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exempt: Option<(usize, usize)>,
    /// `d2o`: those layers keep everything, as published; memory is then not bounded.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub exempt_whole: bool,
    /// `cam`: what stays, `window` (the default) or `heavy` ([`CamKeeps`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keeps: Option<CamKeeps>,
    /// `cam`: values are added up however many units go into one ([`Cam::sums`](crate::Cam::sums)).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub sums: bool,
    /// `duo-attention`: the share of heads that stream (0.5).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub streaming: Option<f64>,
    /// `compactor`: the factor on leverage (0.35).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blending: Option<f32>,
    /// `lagkv`: units of a partition (128).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lag: Option<usize>,
    /// `expected-attention`: how many positions queries to come are taken to stand at (512).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub future: Option<usize>,
    /// `q-filters`: the file of directions, see [`QFilters::load`](crate::QFilters::load).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filters: Option<PathBuf>,
    /// A prompt's queries see a part of what the method keeps ([`Sparse`](crate::Sparse)), with the patterns of
    /// `minference`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub sparse: bool,
    /// `minference`, and with `sparse`: the file of patterns, see
    /// [`Patterns::load`](crate::minference::Patterns::load); by default
    /// [`Pattern::UNKNOWN`](crate::minference::Pattern::UNKNOWN) for all heads. `duo-attention`: the file of heads'
    /// scores, which it needs, see [`DuoAttention::load`](crate::DuoAttention::load).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub patterns: Option<PathBuf>,
    /// `minference`, and with `sparse`: columns of all heads, instead of a file; `slash` is then needed, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vertical: Option<usize>,
    /// `minference`, and with `sparse`: diagonals of all heads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slash: Option<usize>,
    /// `infllm`: first units, which are always seen. As published (128) without a budget, else of
    /// [`InfLlm::within`](crate::InfLlm::within); and so below.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n_init: Option<usize>,
    /// `infllm`: newest units, which are seen where they stand (4096).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n_local: Option<usize>,
    /// `infllm` (128), and with `put_away` (32): units of a block.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_size: Option<usize>,
    /// `infllm` (16), and with `put_away` (8): blocks that are retrieved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topk: Option<usize>,
    /// `infllm`, and with `put_away`: keys in a block's representative (4).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repr_topk: Option<usize>,
    /// `infllm`: the most tokens of a chunk (512).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exec_block: Option<usize>,
    /// What the method drops is put away, and retrieved by blocks ([`PutAway`](crate::PutAway)).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub put_away: bool,
    /// Where units lie that are not resident: `memory`, `disk` or `disk:FOLDER` ([`Tiered`](crate::Tiered)). By
    /// default `memory` for `infllm` with a budget, else there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tier: Option<TierConfig>,
    /// What is resident where there is a tier: units of each KV head, or bytes of all layers. By default the budget
    /// and, for `infllm`, an execution block; with `put_away`, retrieved blocks and 512 units of a step. A number of
    /// units with `put_away` is also what a step may see: blocks are retrieved as far as there is room
    /// ([`PutAway::within`](crate::PutAway::within)).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resident: Option<Budget>,
}

/// A quantisation, or a plain number of bits.
fn quantization<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Quantization>, D::Error> {
    struct Visitor;

    impl<'de> de::Visitor<'de> for Visitor {
        type Value = Option<Quantization>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a number of bits, or a table of `bits`, `layout`, `group`, `residual`, `first` and `hadamard`")
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
            share: None,
            table: None,
            merge: None,
            merge_by: None,
            critical: false,
            blocks: None,
            quantize: None,
            heads: None,
            advice: None,
            seed: None,
            decay: None,
            window: None,
            kernel: None,
            threshold: None,
            form: None,
            mix_keys: None,
            smoothing: None,
            exempt: None,
            exempt_whole: false,
            keeps: None,
            sums: false,
            streaming: None,
            blending: None,
            lag: None,
            future: None,
            filters: None,
            sparse: false,
            patterns: None,
            vertical: None,
            slash: None,
            n_init: None,
            n_local: None,
            block_size: None,
            topk: None,
            repr_topk: None,
            exec_block: None,
            put_away: false,
            tier: None,
            resident: None,
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

    /// The files that it names.
    pub fn files(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        let tier = match &mut self.tier {
            Some(TierConfig::Disk(folder)) => folder.as_mut(),
            _ => None,
        };
        let table = match &mut self.table {
            Some(TableConfig::File(file)) => Some(file),
            _ => None,
        };
        let files = [&mut self.heads, &mut self.filters, &mut self.patterns];
        files.into_iter().flatten().chain(table).chain(tier)
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

    /// From a file: JSON if its name ends so, else TOML. Relative paths of heads, of filters, of patterns, of tables and of
    /// a tier's folder count from the file's folder.
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
        if let Some(folder) = path.parent() {
            config.files().for_each(|file| *file = folder.join(&*file));
        }
        Ok(config)
    }
}
