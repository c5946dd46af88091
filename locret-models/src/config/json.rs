//! Settings in `config.json`.

use super::{Family, ModelConfig, head_dim, long_rope_attention, rotary_dim};
use crate::{ModelError, Result, files::json};
use locret_core::{LongRopeSwitch, RopeConfig, RopeScaling};
use serde_json::{Map, Value};
use std::path::Path;

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

    /// One token id or a list of them. Those that the vocabulary does not have, -1 among them, say that
    /// there is no such token.
    fn tokens(&self, key: &str, vocab: usize) -> Result<Vec<u32>> {
        let id = |v: &Value| v.as_i64().or_else(|| v.as_u64().map(|_| i64::MAX));
        let ids: Vec<i64> = self
            .get(key, "a token id or a list of them", |v| match v {
                Value::Array(ids) => ids.iter().map(id).collect(),
                one => id(one).map(|id| vec![id]),
            })?
            .unwrap_or_default();
        let ids = ids.into_iter().filter_map(|id| u32::try_from(id).ok());
        Ok(ids.filter(|id| (*id as usize) < vocab).collect())
    }

    /// How many tokens attention sees, where that is not all.
    fn window(&self, family: &Family, layers: usize) -> Result<Option<usize>> {
        let window = match (self.values.get("sliding_window"), family) {
            // What its configuration stands for if it says nothing.
            (None, Family::Mistral) => Some(4096),
            _ => self.size("sliding_window")?,
        };
        // Qwen writes a window and says elsewhere whether it is in use, and by which layers.
        let qwen = matches!(family, Family::Qwen2 | Family::Qwen3);
        let used = self.flag("use_sliding_window")?.unwrap_or(!qwen);
        let first = self.size("max_window_layers")?.filter(|_| qwen);
        let none = first.is_some_and(|first| first >= layers);
        let kinds = self.get("layer_types", "a list", Value::as_array)?;
        let full = kinds.is_some_and(|kinds| kinds.iter().all(|kind| kind == "full_attention"));
        Ok(window.filter(|_| used && !none && !full))
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
        for key in ["quantization_config", "compression_config"] {
            if let Some(Value::Object(settings)) = self.value(key) {
                let method = settings.get("quant_method").or(settings.get("format"));
                return Err(self.bad(
                    key,
                    "weights as f32, f16 or bf16 (take the checkpoint that this one was made of, or a \
                     GGUF file with quantised weights)",
                    method.map_or_else(|| "another way".into(), excerpt),
                ));
            }
        }
        let max_positions = self.size("max_position_embeddings")?.unwrap_or(2048);
        let (vocab, layers) = (self.need("vocab_size")?, self.need("num_hidden_layers")?);
        let mut eos = match generation {
            Some(generation) => generation.tokens("eos_token_id", vocab)?,
            None => Vec::new(),
        };
        for id in self.tokens("eos_token_id", vocab)? {
            if !eos.contains(&id) {
                eos.push(id);
            }
        }
        let bias = self.flag("attention_bias")?.unwrap_or(false);
        let config = ModelConfig {
            rope: self.rope(&family, head_dim, max_positions)?,
            hidden,
            intermediate: self.need("intermediate_size")?,
            layers,
            heads,
            kv_heads: self.size("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            vocab,
            rms_norm_eps: self
                .number("rms_norm_eps")?
                .ok_or_else(|| self.bad("rms_norm_eps", "a number", "nothing"))?,
            max_positions,
            tied_embeddings: self.flag("tie_word_embeddings")?.unwrap_or(false),
            sliding_window: self.window(&family, layers)?,
            // Qwen2 always has them, on q, k and v alone.
            attention_bias: bias || family == Family::Qwen2,
            output_bias: bias && family != Family::Qwen2,
            head_norms: family == Family::Qwen3,
            mlp_bias: self.flag("mlp_bias")?.unwrap_or(false),
            activation: self
                .text("hidden_act")?
                .or(self.text("hidden_activation")?)
                .map_or("silu", |name| if name == "swish" { "silu" } else { name })
                .to_owned(),
            bos: self.tokens("bos_token_id", vocab)?.first().copied(),
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

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use serde_json::json;
    use std::fs;

    pub(in crate::config) fn llama() -> Value {
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

    pub(in crate::config) fn read(config: &Value) -> Result<ModelConfig> {
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
        // What the vocabulary does not have ends no text.
        let list = json!({"eos_token_id": [2, 300, -1, u64::MAX], "bos_token_id": -1});
        let config = read(&with(llama(), list)).unwrap();
        assert_eq!((config.bos, config.eos), (None, vec![2]));
        for wrong in [json!("2"), json!(2.5), json!([2, null]), json!({})] {
            let config = with(llama(), json!({"eos_token_id": wrong}));
            assert_eq!(refused(&config).0, "eos_token_id");
        }
    }

    #[test]
    fn families_have_what_their_configurations_leave_out() {
        let family = |name: &str, more: Value| {
            read(&with(with(llama(), json!({"model_type": name})), more)).unwrap()
        };
        let qwen2 = family("qwen2", json!({"sliding_window": 512}));
        assert_eq!(qwen2.family, Family::Qwen2);
        assert!(qwen2.attention_bias && !qwen2.output_bias && !qwen2.head_norms);
        assert_eq!(qwen2.sliding_window, None);
        let used = json!({"sliding_window": 512, "use_sliding_window": true});
        assert_eq!(family("qwen2", used.clone()).binding_window(), Some(512));
        let few = with(used, json!({"max_window_layers": 28}));
        assert_eq!(family("qwen2", few).binding_window(), None);
        let qwen3 = family("qwen3", json!({"attention_bias": false}));
        assert!(qwen3.head_norms && !qwen3.attention_bias);
        assert_eq!(family("mistral", json!({})).sliding_window, Some(4096));
        assert_eq!(
            family("mistral", json!({"sliding_window": null})).sliding_window,
            None
        );
        let full =
            json!({"sliding_window": 512, "layer_types": ["full_attention", "full_attention"]});
        assert_eq!(family("mistral", full).sliding_window, None);
        let biases = family("llama", json!({"attention_bias": true}));
        assert!(biases.attention_bias && biases.output_bias);
        assert_eq!(
            family("llama", json!({"hidden_act": "swish"})).activation,
            "silu"
        );
    }

    #[test]
    fn quantised_checkpoints_are_refused() {
        let fp8 = json!({"quantization_config": {"quant_method": "fp8"}});
        let (what, found) = refused(&with(llama(), fp8));
        assert_eq!(what, "quantization_config");
        assert!(found.contains("fp8"));
        read(&with(llama(), json!({"quantization_config": null}))).unwrap();
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
}
