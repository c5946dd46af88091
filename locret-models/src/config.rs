//! A model's hyper-parameters, from `config.json` or from a GGUF file.

use crate::{Gguf, ModelError, Result, json};
use locret_core::{LongRopeSwitch, ModelSpec, RopeConfig, RopeScaling};
use serde_json::{Map, Value};
use std::path::Path;

/// Which kind of model a checkpoint is of.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Family {
    /// Llama 2 and 3, and models of the same layout such as SmolLM2.
    Llama,
    /// Phi-3 with its fused projections.
    Phi3,
    /// Another one, as the file names it. For adapters outside this crate.
    Other(String),
}

impl Family {
    fn new(name: &str) -> Self {
        match name {
            "llama" => Self::Llama,
            "phi3" => Self::Phi3,
            other => Self::Other(other.to_owned()),
        }
    }
}

/// Hyper-parameters of a decoder-only transformer, checked.
///
/// The same for both file formats.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ModelConfig {
    /// The kind of model.
    pub family: Family,
    /// Features of the hidden state.
    pub hidden: usize,
    /// Features inside the feed-forward part.
    pub intermediate: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads; divides `heads`.
    pub kv_heads: usize,
    /// Features of one head; even.
    pub head_dim: usize,
    /// Tokens in the vocabulary, padding rows of the embedding included.
    pub vocab: usize,
    /// Added to the mean square in normalisations.
    pub rms_norm_eps: f64,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// The length that the model was made for, in tokens.
    pub max_positions: usize,
    /// The embedding is the output matrix too.
    pub tied_embeddings: bool,
    /// Attention sees this many of the newest tokens only.
    pub sliding_window: Option<usize>,
    /// q, k, v (and in some models o) have biases.
    pub attention_bias: bool,
    /// The feed-forward matrices have biases.
    pub mlp_bias: bool,
    /// The activation, `silu` for example.
    pub activation: String,
    /// The token before every text, if any.
    pub bos: Option<u32>,
    /// The tokens that end a text or a turn, as the configuration lists them.
    pub eos: Vec<u32>,
}

/// Upper bounds of what is taken for a model and not for a damaged file.
mod limits {
    pub(super) const FEATURES: usize = 1 << 22;
    pub(super) const LAYERS: usize = 1 << 12;
    pub(super) const HEADS: usize = 1 << 14;
    pub(super) const HEAD_DIM: usize = 1 << 14;
    pub(super) const VOCAB: usize = 1 << 24;
    pub(super) const POSITIONS: usize = 1 << 32;
}

impl ModelConfig {
    /// Reads `config.json`, and `generation_config.json` if it is there, of a model folder.
    ///
    /// Both spellings of the rotary settings are read: `rope_theta` and `rope_scaling` as
    /// transformers 4 writes them, `rope_parameters` as transformers 5 does.
    ///
    /// # Errors
    /// [`ModelError::Io`], [`ModelError::Json`]; [`ModelError::Config`] for a setting that is
    /// missing, impossible or not supported (yarn and dynamic scaling among them).
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let path = dir.join("config.json");
        let config: Map<String, Value> = json::read(&path)?;
        let generation_path = dir.join("generation_config.json");
        let generation: Option<Map<String, Value>> = json::read_optional(&generation_path)?;
        let generation = generation.map(|values| Settings {
            path: &generation_path,
            values,
        });
        Settings {
            path: &path,
            values: config,
        }
        .model(generation.as_ref())
    }

    /// Reads the metadata of a GGUF file.
    ///
    /// # Errors
    /// [`ModelError::Config`] for a key that is missing, impossible or not supported.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let arch = gguf.get_str("general.architecture")?.ok_or_else(|| {
            ModelError::config(gguf.path(), "general.architecture", "a string", "nothing")
        })?;
        let keys = Keys { gguf, arch };
        let heads = keys.need("attention.head_count")?;
        let hidden = keys.need("embedding_length")?;
        let head_dim = match keys.size("attention.key_length")? {
            Some(n) => n,
            None => head_dim(gguf.path(), hidden, heads)?,
        };
        if let Some(n) = keys.size("attention.value_length")?
            && n != head_dim
        {
            return Err(keys.bad("attention.value_length", head_dim.to_string(), n));
        }
        let vocab = match keys.size("vocab_size")? {
            Some(n) => n,
            None => gguf
                .get_strings("tokenizer.ggml.tokens")?
                .map(<[String]>::len)
                .ok_or_else(|| keys.bad("vocab_size", "a number", "nothing"))?,
        };
        let max_positions = keys.need("context_length")?;
        let config = Self {
            family: Family::new(arch),
            hidden,
            intermediate: keys.need("feed_forward_length")?,
            layers: keys.need("block_count")?,
            heads,
            kv_heads: keys.size("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            vocab,
            rms_norm_eps: gguf
                .get_f64(&keys.key("attention.layer_norm_rms_epsilon"))?
                .ok_or_else(|| {
                    keys.bad("attention.layer_norm_rms_epsilon", "a number", "nothing")
                })?,
            rope: keys.rope(head_dim, max_positions)?,
            max_positions,
            tied_embeddings: gguf.tensor("output.weight").is_none(),
            sliding_window: keys.size("attention.sliding_window")?.filter(|&n| n > 0),
            attention_bias: gguf.tensor("blk.0.attn_q.bias").is_some(),
            mlp_bias: gguf.tensor("blk.0.ffn_down.bias").is_some(),
            activation: "silu".into(),
            bos: keys.token("tokenizer.ggml.bos_token_id")?,
            eos: keys
                .token("tokenizer.ggml.eos_token_id")?
                .into_iter()
                .collect(),
        };
        config.validate(gguf.path())?;
        Ok(config)
    }

    /// What the engine has to know: dimensions, scale `1 / √d`, rotation.
    pub fn spec(&self) -> ModelSpec {
        ModelSpec {
            layers: self.layers,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            hidden: self.hidden,
            vocab: self.vocab,
            softmax_scale: (1.0 / (self.head_dim as f64).sqrt()) as f32,
            max_positions: Some(self.max_positions),
            rope: self.rope.clone(),
        }
    }

    /// A sliding window that is narrower than the context, so that it changes results.
    pub fn binding_window(&self) -> Option<usize> {
        self.sliding_window.filter(|&w| w < self.max_positions)
    }

    /// LongRoPE with its long factors at every length, as the authors of Locret run it.
    pub fn always_long(mut self) -> Self {
        if let RopeScaling::LongRope { switch, .. } = &mut self.rope.scaling {
            *switch = LongRopeSwitch::AlwaysLong;
        }
        self
    }

    fn validate(&self, path: &Path) -> Result<()> {
        use limits::*;
        for (what, n, max) in [
            ("hidden size", self.hidden, FEATURES),
            ("intermediate size", self.intermediate, FEATURES),
            ("number of layers", self.layers, LAYERS),
            ("number of heads", self.heads, HEADS),
            ("number of KV heads", self.kv_heads, HEADS),
            ("head dimension", self.head_dim, HEAD_DIM),
            ("vocabulary size", self.vocab, VOCAB),
            ("context length", self.max_positions, POSITIONS),
            (
                "sliding window",
                self.sliding_window.unwrap_or(POSITIONS),
                POSITIONS,
            ),
        ] {
            if n == 0 || n > max {
                return Err(ModelError::config(path, what, format!("1 to {max}"), n));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(ModelError::config(
                path,
                "number of KV heads",
                format!("a divisor of the {} query heads", self.heads),
                self.kv_heads,
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(ModelError::config(
                path,
                "head dimension",
                "an even number (its halves are rotated)",
                self.head_dim,
            ));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps >= 0.0) {
            return Err(ModelError::config(
                path,
                "rms_norm_eps",
                "a finite number from 0 on",
                self.rms_norm_eps,
            ));
        }
        if let Some(id) = self
            .eos
            .iter()
            .chain(&self.bos)
            .find(|&&id| id as usize >= self.vocab)
        {
            return Err(ModelError::config(
                path,
                "bos or eos token id",
                format!("less than the vocabulary of {}", self.vocab),
                id,
            ));
        }
        self.spec()
            .validate()
            .map_err(|e| ModelError::config(path, "rotary settings", "a valid rotation", e))
    }
}

/// The head dimension where no key gives it.
fn head_dim(path: &Path, hidden: usize, heads: usize) -> Result<usize> {
    if heads == 0 || !hidden.is_multiple_of(heads) {
        return Err(ModelError::config(
            path,
            "number of heads",
            format!("a divisor of the hidden size {hidden}, where no head dimension is given"),
            heads,
        ));
    }
    Ok(hidden / heads)
}

/// How many features are rotated.
fn rotary_dim(path: &Path, head_dim: usize, fraction: f64) -> Result<usize> {
    if !(fraction > 0.0 && fraction <= 1.0) {
        return Err(ModelError::config(
            path,
            "partial_rotary_factor",
            "more than 0 and at most 1",
            fraction,
        ));
    }
    Ok((head_dim as f64 * fraction) as usize)
}

/// The factor on cosines and sines of LongRoPE (arXiv 2402.13753, as transformers has it):
/// `√(1 + ln(factor) / ln(original))`.
fn long_rope_attention(factor: f64, original: usize) -> f64 {
    if factor <= 1.0 {
        1.0
    } else {
        (1.0 + factor.ln() / (original as f64).ln()).sqrt()
    }
}

/// One JSON object of settings.
struct Settings<'a> {
    path: &'a Path,
    values: Map<String, Value>,
}

impl Settings<'_> {
    fn bad(&self, key: &str, expected: &str, found: impl ToString) -> ModelError {
        ModelError::config(self.path, key, expected, found)
    }

    /// A value that is there and not null.
    fn value(&self, key: &str) -> Option<&Value> {
        self.values.get(key).filter(|v| !v.is_null())
    }

    fn get<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        match self.value(key) {
            None => Ok(None),
            Some(value) => match read(value) {
                Some(x) => Ok(Some(x)),
                None => Err(self.bad(key, expected, excerpt(value))),
            },
        }
    }

    fn size(&self, key: &str) -> Result<Option<usize>> {
        self.get(key, "a non-negative integer", |v| {
            v.as_u64().and_then(|n| n.try_into().ok())
        })
    }

    fn need(&self, key: &str) -> Result<usize> {
        self.size(key)?
            .ok_or_else(|| self.bad(key, "a number", "nothing"))
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        self.get(key, "a number", Value::as_f64)
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.get(key, "true or false", Value::as_bool)
    }

    fn text(&self, key: &str) -> Result<Option<&str>> {
        self.get(key, "a string", Value::as_str)
    }

    fn numbers(&self, key: &str) -> Result<Vec<f64>> {
        self.get(key, "a list of numbers", |v| {
            v.as_array()?.iter().map(Value::as_f64).collect()
        })?
        .ok_or_else(|| self.bad(key, "a list of numbers", "nothing"))
    }

    /// A settings object inside this one; an empty one counts as absent.
    fn object(&self, key: &str) -> Result<Option<Settings<'_>>> {
        let values = self.get(key, "an object", Value::as_object)?;
        Ok(values.filter(|v| !v.is_empty()).map(|values| Settings {
            path: self.path,
            values: values.clone(),
        }))
    }

    /// One token id or a list of them.
    fn tokens(&self, key: &str) -> Result<Vec<u32>> {
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        Ok(self
            .get(key, "a token id or a list of them", |v| match v {
                Value::Array(ids) => ids.iter().map(id).collect(),
                one => id(one).map(|id| vec![id]),
            })?
            .unwrap_or_default())
    }

    fn model(&self, generation: Option<&Settings<'_>>) -> Result<ModelConfig> {
        let heads = self.need("num_attention_heads")?;
        let hidden = self.need("hidden_size")?;
        let head_dim = match self.size("head_dim")? {
            Some(n) => n,
            None => head_dim(self.path, hidden, heads)?,
        };
        let family = Family::new(
            self.text("model_type")?
                .ok_or_else(|| self.bad("model_type", "a string", "nothing"))?,
        );
        let max_positions = self.size("max_position_embeddings")?.unwrap_or(2048);
        // Qwen2 writes a window and says elsewhere that it is not in use.
        let windowed = self.flag("use_sliding_window")?.unwrap_or(true);
        let mut eos = match generation {
            Some(generation) => generation.tokens("eos_token_id")?,
            None => Vec::new(),
        };
        for id in self.tokens("eos_token_id")? {
            if !eos.contains(&id) {
                eos.push(id);
            }
        }
        let config = ModelConfig {
            rope: self.rope(&family, head_dim, max_positions)?,
            hidden,
            intermediate: self.need("intermediate_size")?,
            layers: self.need("num_hidden_layers")?,
            heads,
            kv_heads: self.size("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            vocab: self.need("vocab_size")?,
            rms_norm_eps: self
                .number("rms_norm_eps")?
                .ok_or_else(|| self.bad("rms_norm_eps", "a number", "nothing"))?,
            max_positions,
            tied_embeddings: self.flag("tie_word_embeddings")?.unwrap_or(false),
            sliding_window: self.size("sliding_window")?.filter(|_| windowed),
            attention_bias: self.flag("attention_bias")?.unwrap_or(false),
            mlp_bias: self.flag("mlp_bias")?.unwrap_or(false),
            activation: self
                .text("hidden_act")?
                .or(self.text("hidden_activation")?)
                .unwrap_or("silu")
                .to_owned(),
            bos: self.tokens("bos_token_id")?.first().copied(),
            eos,
            family,
        };
        config.validate(self.path)?;
        Ok(config)
    }

    fn rope(&self, family: &Family, head_dim: usize, max_positions: usize) -> Result<RopeConfig> {
        // transformers 5 lets `rope_scaling` win if a file has both.
        let rope = match self.object("rope_scaling")? {
            Some(rope) => rope,
            None => self.object("rope_parameters")?.unwrap_or(Settings {
                path: self.path,
                values: Map::new(),
            }),
        };
        let theta = match rope.number("rope_theta")? {
            Some(theta) => theta,
            None => self.number("rope_theta")?.unwrap_or(10_000.0),
        };
        let fraction = match rope.number("partial_rotary_factor")? {
            Some(fraction) => fraction,
            None => self.number("partial_rotary_factor")?.unwrap_or(1.0),
        };
        let kind = match rope.text("rope_type")? {
            Some(kind) => kind,
            None => rope.text("type")?.unwrap_or("default"),
        };
        let need = |key: &str| {
            rope.number(key)?
                .ok_or_else(|| rope.bad(key, "a number", "nothing"))
        };
        // A key beside `rope_scaling` goes before one inside it.
        const ORIGINAL: &str = "original_max_position_embeddings";
        let original_max = match self.size(ORIGINAL)? {
            Some(n) => n,
            None => rope.size(ORIGINAL)?.unwrap_or(match family {
                Family::Phi3 => 4096,
                _ => max_positions,
            }),
        };
        let scaling = match kind {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear {
                factor: need("factor")?,
            },
            "llama3" => RopeScaling::Llama3 {
                factor: need("factor")?,
                low_freq_factor: need("low_freq_factor")?,
                high_freq_factor: need("high_freq_factor")?,
                original_max,
            },
            "longrope" | "su" => {
                for key in ["short_mscale", "long_mscale"] {
                    if rope.value(key).is_some() {
                        return Err(rope.bad(key, "no such key (it is not supported)", "one"));
                    }
                }
                let attention_factor = match rope.number("attention_factor")? {
                    Some(factor) => factor,
                    None => {
                        let factor = rope
                            .number("factor")?
                            .unwrap_or(max_positions as f64 / original_max as f64);
                        long_rope_attention(factor, original_max)
                    }
                };
                RopeScaling::LongRope {
                    short: rope.numbers("short_factor")?,
                    long: rope.numbers("long_factor")?,
                    original_max,
                    attention_factor,
                    switch: LongRopeSwitch::ByLength,
                }
            }
            other => {
                return Err(rope.bad(
                    "rope_type",
                    "default, linear, llama3 or longrope (others are not supported)",
                    other,
                ));
            }
        };
        Ok(RopeConfig {
            theta,
            rotary_dim: rotary_dim(self.path, head_dim, fraction)?,
            scaling,
        })
    }
}

/// A value for a message, not longer than a line.
fn excerpt(value: &Value) -> String {
    const MAX: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// The keys of one architecture in a GGUF file.
struct Keys<'a> {
    gguf: &'a Gguf,
    arch: &'a str,
}

impl Keys<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.arch)
    }

    fn bad(&self, key: &str, expected: impl Into<String>, found: impl ToString) -> ModelError {
        ModelError::config(self.gguf.path(), self.key(key), expected, found)
    }

    fn size(&self, key: &str) -> Result<Option<usize>> {
        let Some(n) = self.gguf.get_u64(&self.key(key))? else {
            return Ok(None);
        };
        usize::try_from(n)
            .map(Some)
            .map_err(|_| self.bad(key, "a number that fits in memory", n))
    }

    fn need(&self, key: &str) -> Result<usize> {
        self.size(key)?
            .ok_or_else(|| self.bad(key, "a number", "nothing"))
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        self.gguf.get_f64(&self.key(key))
    }

    fn token(&self, key: &str) -> Result<Option<u32>> {
        let Some(id) = self.gguf.get_u64(key)? else {
            return Ok(None);
        };
        u32::try_from(id)
            .map(Some)
            .map_err(|_| ModelError::config(self.gguf.path(), key, "a token id", id))
    }

    /// A tensor of factors for the frequencies.
    fn factors(&self, name: &str) -> Result<Option<Vec<f64>>> {
        let Some(tensor) = self.gguf.tensor(name) else {
            return Ok(None);
        };
        if tensor.rows() * tensor.cols() > limits::HEAD_DIM {
            return Err(ModelError::config(
                self.gguf.path(),
                name,
                format!("at most {} factors", limits::HEAD_DIM),
                format!("{:?}", tensor.shape),
            ));
        }
        let values = self.gguf.dequantize(tensor)?;
        Ok(Some(values.into_iter().map(f64::from).collect()))
    }

    fn rope(&self, head_dim: usize, max_positions: usize) -> Result<RopeConfig> {
        let original_max = self
            .size("rope.scaling.original_context_length")?
            .unwrap_or(max_positions);
        let long = self.factors("rope_factors_long.weight")?;
        let short = self.factors("rope_factors_short.weight")?;
        let scaling = if let (Some(long), Some(short)) = (long, short) {
            let attention_factor = match self.number("rope.scaling.attn_factor")? {
                Some(factor) => factor,
                None => {
                    let factor = max_positions as f64 / original_max as f64;
                    long_rope_attention(factor, original_max)
                }
            };
            RopeScaling::LongRope {
                short,
                long,
                original_max,
                attention_factor,
                switch: LongRopeSwitch::ByLength,
            }
        } else if let Some(factors) = self.factors("rope_freqs.weight")? {
            // Llama 3.1 as converted: the scaled frequencies themselves, as divisors that hold at
            // every length.
            RopeScaling::LongRope {
                short: factors.clone(),
                long: factors,
                original_max,
                attention_factor: 1.0,
                switch: LongRopeSwitch::ByLength,
            }
        } else {
            let kind = self.gguf.get_str(&self.key("rope.scaling.type"))?;
            let factor = match self.number("rope.scaling.factor")? {
                Some(factor) => Some(factor),
                None => self.number("rope.scale_linear")?,
            };
            match (kind, factor) {
                (None | Some("none"), None) | (Some("none"), Some(_)) => RopeScaling::None,
                (None | Some("linear"), Some(factor)) => RopeScaling::Linear { factor },
                (Some(other), _) => {
                    return Err(self.bad(
                        "rope.scaling.type",
                        "none, or linear with a factor, or factors as tensors",
                        other,
                    ));
                }
            }
        };
        Ok(RopeConfig {
            theta: self.number("rope.freq_base")?.unwrap_or(10_000.0),
            rotary_dim: self.size("rope.dimension_count")?.unwrap_or(head_dim),
            scaling,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::{Array, Value as Meta, writer::File};
    use serde_json::json;
    use std::fs;

    fn llama() -> Value {
        json!({
            "model_type": "llama",
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
            "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "rope_theta": 500000.0,
            "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": true
        })
    }

    fn with(mut base: Value, changes: Value) -> Value {
        for (key, value) in changes.as_object().unwrap() {
            base[key] = value.clone();
        }
        base
    }

    fn read(config: &Value) -> Result<ModelConfig> {
        read_with(config, None)
    }

    fn read_with(config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        if let Some(generation) = generation {
            let path = dir.path().join("generation_config.json");
            fs::write(path, generation.to_string()).unwrap();
        }
        ModelConfig::from_dir(dir.path())
    }

    fn refused(config: &Value) -> (String, String) {
        match read(config) {
            Err(ModelError::Config { what, found, .. }) => (what, found),
            other => panic!("expected a refusal, found {other:?}"),
        }
    }

    #[test]
    fn plain_llama() {
        let config = read(&llama()).unwrap();
        assert_eq!(config.family, Family::Llama);
        assert_eq!((config.heads, config.kv_heads, config.head_dim), (4, 2, 16));
        assert_eq!(config.rope, RopeConfig::plain(500_000.0, 16));
        assert!(config.tied_embeddings && !config.attention_bias && !config.mlp_bias);
        assert_eq!(
            (config.bos, config.eos.as_slice()),
            (Some(1), [2].as_slice())
        );
        assert_eq!(config.activation, "silu");
        assert_eq!(config.spec().softmax_scale, 0.25);
        config.spec().validate().unwrap();
        let explicit = read(&with(
            llama(),
            json!({"head_dim": 32, "num_key_value_heads": null}),
        ));
        let explicit = explicit.unwrap();
        assert_eq!((explicit.head_dim, explicit.kv_heads), (32, 4));
    }

    #[test]
    fn both_spellings_of_llama3_scaling() {
        let settings = json!({
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"
        });
        let old = read(&with(llama(), json!({"rope_scaling": settings}))).unwrap();
        let mut new = llama();
        new.as_object_mut().unwrap().remove("rope_theta");
        let settings = with(settings, json!({"rope_theta": 500000.0}));
        let new = read(&with(new, json!({"rope_parameters": settings}))).unwrap();
        assert_eq!(old, new);
        assert_eq!(old.rope.theta, 500_000.0);
        assert_eq!(
            old.rope.scaling,
            RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max: 8192
            }
        );
        let linear = json!({"rope_scaling": {"type": "linear", "factor": 4}});
        let linear = read(&with(llama(), linear)).unwrap();
        assert_eq!(linear.rope.scaling, RopeScaling::Linear { factor: 4.0 });
        for plain in [
            json!({"rope_scaling": null}),
            json!({"rope_scaling": {}}),
            json!({"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
        ] {
            let plain = read(&with(llama(), plain)).unwrap();
            assert_eq!(plain.rope, RopeConfig::plain(500_000.0, 16));
        }
    }

    #[test]
    fn long_rope() {
        let factors: Vec<f64> = (1..=6).map(f64::from).collect();
        let phi3 = with(
            llama(),
            json!({
                "model_type": "phi3", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
                "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
                "sliding_window": 262144,
                "rope_scaling": {"type": "su", "short_factor": factors, "long_factor": factors}
            }),
        );
        let config = read(&phi3).unwrap();
        assert_eq!(config.family, Family::Phi3);
        assert_eq!(config.rope.rotary_dim, 12);
        assert_eq!(config.sliding_window, Some(262_144));
        assert_eq!(config.binding_window(), None);
        let RopeScaling::LongRope {
            short,
            original_max: 4096,
            attention_factor,
            switch: LongRopeSwitch::ByLength,
            ..
        } = &config.rope.scaling
        else {
            panic!("{:?}", config.rope.scaling);
        };
        assert_eq!(short, &factors);
        // √(1 + ln 32 / ln 4096) = √(1 + 5/12)
        assert!((attention_factor - (17.0f64 / 12.0).sqrt()).abs() < 1e-12);
        assert!(matches!(
            config.always_long().rope.scaling,
            RopeScaling::LongRope {
                switch: LongRopeSwitch::AlwaysLong,
                ..
            }
        ));

        let short = json!({"rope_scaling":
            {"rope_type": "longrope", "short_factor": [1.0], "long_factor": factors}});
        assert_eq!(refused(&with(phi3.clone(), short)).0, "rotary settings");
        let words = json!({"rope_scaling":
            {"rope_type": "longrope", "short_factor": ["a"], "long_factor": factors}});
        assert_eq!(refused(&with(phi3.clone(), words)).0, "short_factor");
        let negative: Vec<f64> = factors.iter().map(|x| -x).collect();
        let negative = json!({"rope_scaling":
            {"rope_type": "longrope", "short_factor": negative, "long_factor": factors}});
        assert_eq!(refused(&with(phi3.clone(), negative)).0, "rotary settings");
        let mscale = json!({"rope_scaling": {"rope_type": "longrope", "short_factor": factors,
            "long_factor": factors, "short_mscale": 1.1}});
        assert_eq!(refused(&with(phi3, mscale)).0, "short_mscale");
    }

    #[test]
    fn other_scalings_are_refused_by_name() {
        for kind in ["yarn", "dynamic", "mrope"] {
            let scaling = json!({"rope_scaling": {"rope_type": kind, "factor": 2.0}});
            assert_eq!(
                refused(&with(llama(), scaling)),
                ("rope_type".into(), kind.into())
            );
        }
    }

    #[test]
    fn end_of_text_ids() {
        let one = json!({"eos_token_id": 7});
        let list = json!({"eos_token_id": [2, 8]});
        let config = read(&with(llama(), list.clone())).unwrap();
        assert_eq!(config.eos, [2, 8]);
        let config = read_with(&with(llama(), one), Some(&list)).unwrap();
        assert_eq!(config.eos, [2, 8, 7]);
        let config = read_with(&llama(), Some(&json!({}))).unwrap();
        assert_eq!(config.eos, [2]);
        let config = read(&with(llama(), json!({"eos_token_id": null}))).unwrap();
        assert!(config.eos.is_empty());
        assert_eq!(
            refused(&with(llama(), json!({"eos_token_id": -1}))).0,
            "eos_token_id"
        );
        assert_eq!(
            refused(&with(llama(), json!({"eos_token_id": 300}))).0,
            "bos or eos token id"
        );
    }

    #[test]
    fn windows() {
        let narrow = json!({"sliding_window": 2047});
        let config = read(&with(llama(), narrow)).unwrap();
        assert_eq!(config.binding_window(), Some(2047));
        let unused = json!({"sliding_window": 2047, "use_sliding_window": false});
        let config = read(&with(llama(), unused)).unwrap();
        assert_eq!(config.sliding_window, None);
    }

    #[test]
    fn impossible_settings() {
        for (changes, what) in [
            (json!({"num_attention_heads": 0}), "number of heads"),
            (
                json!({"num_attention_heads": 0, "head_dim": 16}),
                "number of heads",
            ),
            (json!({"num_attention_heads": 3}), "number of heads"),
            (json!({"num_key_value_heads": 3}), "number of KV heads"),
            (json!({"num_key_value_heads": 0}), "number of KV heads"),
            (json!({"hidden_size": 0}), "hidden size"),
            (json!({"hidden_size": 1u64 << 60}), "hidden size"),
            (json!({"hidden_size": 64.5}), "hidden_size"),
            (json!({"hidden_size": -64}), "hidden_size"),
            (json!({"hidden_size": "64"}), "hidden_size"),
            (json!({"hidden_size": null}), "hidden_size"),
            (json!({"num_hidden_layers": 0}), "number of layers"),
            (json!({"num_hidden_layers": 1u64 << 40}), "number of layers"),
            (json!({"vocab_size": 0}), "vocabulary size"),
            (json!({"vocab_size": u64::MAX}), "vocabulary size"),
            (json!({"head_dim": 15}), "head dimension"),
            (json!({"head_dim": 0}), "head dimension"),
            (json!({"rms_norm_eps": -1.0}), "rms_norm_eps"),
            (json!({"rms_norm_eps": null}), "rms_norm_eps"),
            (json!({"max_position_embeddings": 0}), "context length"),
            (json!({"sliding_window": 0}), "sliding window"),
            (json!({"rope_theta": 0.0}), "rotary settings"),
            (json!({"rope_theta": "a"}), "rope_theta"),
            (
                json!({"partial_rotary_factor": 0.0}),
                "partial_rotary_factor",
            ),
            (
                json!({"partial_rotary_factor": 1.5}),
                "partial_rotary_factor",
            ),
            (json!({"partial_rotary_factor": 0.2}), "rotary settings"),
            (json!({"rope_scaling": []}), "rope_scaling"),
            (json!({"rope_scaling": {"type": "linear"}}), "factor"),
            (
                json!({"rope_scaling": {"type": "linear", "factor": 0}}),
                "rotary settings",
            ),
            (json!({"model_type": null}), "model_type"),
            (json!({"tie_word_embeddings": 1}), "tie_word_embeddings"),
        ] {
            assert_eq!(
                refused(&with(llama(), changes.clone())).0,
                what,
                "{changes}"
            );
        }
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(
            ModelConfig::from_dir(dir.path()),
            Err(ModelError::Io { .. })
        ));
        for text in ["", "[]", "{", "null"] {
            fs::write(dir.path().join("config.json"), text).unwrap();
            assert!(matches!(
                ModelConfig::from_dir(dir.path()),
                Err(ModelError::Json { .. })
            ));
        }
    }

    fn gguf_file(arch: &str) -> File {
        let key = |k: &str| format!("{arch}.{k}");
        File::default()
            .meta("general.architecture", Meta::String(arch.into()))
            .meta(&key("block_count"), Meta::U32(2))
            .meta(&key("context_length"), Meta::U32(4096))
            .meta(&key("embedding_length"), Meta::U32(64))
            .meta(&key("feed_forward_length"), Meta::U32(128))
            .meta(&key("attention.head_count"), Meta::U32(4))
            .meta(&key("attention.head_count_kv"), Meta::U32(2))
            .meta(&key("attention.layer_norm_rms_epsilon"), Meta::F32(1e-5))
            .meta(&key("rope.freq_base"), Meta::F32(500_000.0))
            .meta("tokenizer.ggml.bos_token_id", Meta::U32(1))
            .meta("tokenizer.ggml.eos_token_id", Meta::U32(2))
            .meta(
                "tokenizer.ggml.tokens",
                Meta::Array(Array::String(vec![String::new(); 300])),
            )
    }

    fn gguf(file: &File) -> Result<ModelConfig> {
        let file = file.write();
        ModelConfig::from_gguf(&Gguf::open(file.path()).unwrap())
    }

    #[test]
    fn gguf_gives_the_same_settings() {
        let mut config = gguf(&gguf_file("llama")).unwrap();
        assert!((config.rms_norm_eps - 1e-5).abs() < 1e-9);
        config.rms_norm_eps = 1e-5;
        assert_eq!(config, read(&llama()).unwrap());
        let untied = gguf_file("llama").f32("output.weight", &[1], &[1.0]);
        assert!(!gguf(&untied).unwrap().tied_embeddings);
        let linear = gguf_file("llama")
            .meta("llama.rope.scaling.type", Meta::String("linear".into()))
            .meta("llama.rope.scaling.factor", Meta::F32(2.0));
        assert_eq!(
            gguf(&linear).unwrap().rope.scaling,
            RopeScaling::Linear { factor: 2.0 }
        );
        let other = gguf(&gguf_file("qwen2")).unwrap();
        assert_eq!(other.family, Family::Other("qwen2".into()));
    }

    #[test]
    fn gguf_factors_are_tensors() {
        let factors: Vec<f32> = (1..=8).map(|i| i as f32).collect();
        let llama31 = gguf_file("llama").f32("rope_freqs.weight", &[8], &factors);
        let config = gguf(&llama31).unwrap();
        assert!(matches!(
            &config.rope.scaling,
            RopeScaling::LongRope { short, long, attention_factor: 1.0, .. }
                if short == long && short.len() == 8
        ));
        let phi3 = gguf_file("phi3")
            .f32("rope_factors_long.weight", &[8], &factors)
            .f32("rope_factors_short.weight", &[8], &[1.0; 8])
            .meta("phi3.rope.scaling.original_context_length", Meta::U32(1024));
        let config = gguf(&phi3).unwrap();
        assert!(matches!(
            &config.rope.scaling,
            RopeScaling::LongRope { long, original_max: 1024, attention_factor, .. }
                if long[7] == 8.0 && (attention_factor - 1.2f64.sqrt()).abs() < 1e-12
        ));
        let wrong = gguf_file("llama").f32("rope_freqs.weight", &[3], &[1.0; 3]);
        assert!(matches!(gguf(&wrong), Err(ModelError::Config { .. })));
    }

    #[test]
    fn impossible_gguf_settings() {
        for (key, value) in [
            ("llama.attention.head_count", Meta::U32(0)),
            ("llama.attention.head_count", Meta::String("4".into())),
            ("llama.attention.head_count_kv", Meta::U32(3)),
            ("llama.embedding_length", Meta::U64(1 << 60)),
            ("llama.block_count", Meta::I32(-1)),
            (
                "llama.attention.layer_norm_rms_epsilon",
                Meta::F32(f32::NAN),
            ),
            ("llama.rope.freq_base", Meta::F32(f32::INFINITY)),
            ("llama.rope.dimension_count", Meta::U32(17)),
            ("llama.attention.key_length", Meta::U32(7)),
            ("llama.attention.value_length", Meta::U32(8)),
            ("llama.rope.scaling.type", Meta::String("yarn".into())),
            ("tokenizer.ggml.eos_token_id", Meta::U32(5000)),
        ] {
            let mut file = gguf_file("llama");
            file.metadata.retain(|(k, _)| k != key);
            let file = file.meta(key, value);
            assert!(
                matches!(gguf(&file), Err(ModelError::Config { .. })),
                "{key}"
            );
        }
        for key in [
            "llama.block_count",
            "general.architecture",
            "llama.context_length",
        ] {
            let mut file = gguf_file("llama");
            file.metadata.retain(|(k, _)| k != key);
            assert!(
                matches!(gguf(&file), Err(ModelError::Config { .. })),
                "{key}"
            );
        }
    }
}
