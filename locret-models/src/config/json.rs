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
    /// transformers 4 writes them, `rope_parameters` as transformers 5 does. Of a model of several media
    /// it is the language model's part (`text_config`). What a file leaves out is what it stands for in
    /// transformers' configuration of its family.
    ///
    /// # Errors
    /// [`ModelError::Io`], [`ModelError::Json`]; [`ModelError::Config`] for a setting that is
    /// missing, impossible or not supported (yarn and dynamic scaling among them).
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let path = dir.join("config.json");
        let config = text_part(json::read(&path)?);
        // How GPTQ's checkpoints were marked before their configurations said it.
        let quantised = dir.join("quantize_config.json");
        if quantised.exists() {
            return Err(ModelError::config(
                &quantised,
                "checkpoint",
                UNQUANTISED,
                "quantised weights (GPTQ)",
            ));
        }
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

/// What is read instead of quantised safetensors.
const UNQUANTISED: &str = "weights as f32, f16 or bf16 (take the checkpoint that this one was made of, \
                           or a GGUF file with quantised weights)";

/// The settings of the language model: those of the whole, or a part of them.
fn text_part(mut whole: Map<String, Value>) -> Map<String, Value> {
    if whole.contains_key("hidden_size") || !whole.get("text_config").is_some_and(Value::is_object)
    {
        return whole;
    }
    let Some(Value::Object(mut part)) = whole.remove("text_config") else {
        return whole;
    };
    for key in QUANTISED.into_iter().chain(["tie_word_embeddings"]) {
        if let Some(value) = whole.remove(key).filter(|value| !value.is_null()) {
            part.insert(key.to_owned(), value);
        }
    }
    for key in ["bos_token_id", "eos_token_id"] {
        if part.get(key).is_none_or(Value::is_null)
            && let Some(value) = whole.remove(key)
        {
            part.insert(key.to_owned(), value);
        }
    }
    part
}

/// Where configurations say that weights are quantised.
const QUANTISED: [&str; 3] = ["quantization_config", "compression_config", "quantization"];

/// One JSON object of settings.
struct Settings<'a> {
    path: &'a Path,
    values: Map<String, Value>,
}

impl<'a> Settings<'a> {
    fn bad(&self, key: &str, expected: &str, found: impl ToString) -> ModelError {
        ModelError::config(self.path, key, expected, found)
    }

    /// A value that is there and not null.
    fn value(&self, key: &str) -> Option<&Value> {
        self.values.get(key).filter(|v| !v.is_null())
    }

    fn get<'s, T>(
        &'s self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&'s Value) -> Option<T>,
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
    fn object(&self, key: &str) -> Result<Option<Settings<'a>>> {
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
        // Qwen writes a window and says elsewhere whether it is in use, and by which layers.
        let qwen = matches!(family, Family::Qwen2 | Family::Qwen3);
        let window = match self.values.get("sliding_window") {
            None if qwen || *family == Family::Mistral => Some(4096),
            _ => self.size("sliding_window")?,
        };
        let used = self.flag("use_sliding_window")?.unwrap_or(!qwen);
        let first = self.size("max_window_layers")?.unwrap_or(28);
        let kinds = self.get("layer_types", "a list", Value::as_array)?;
        let full = match kinds {
            Some(kinds) => kinds.iter().all(|kind| kind == "full_attention"),
            None => qwen && first >= layers,
        };
        Ok(window.filter(|_| used && !full))
    }

    fn model(&self, generation: Option<&Settings<'_>>) -> Result<ModelConfig> {
        let heads = self.need("num_attention_heads")?;
        let hidden = self.need("hidden_size")?;
        let family = Family::new(
            self.text("model_type")?
                .ok_or_else(|| self.bad("model_type", "a string", "nothing"))?,
        );
        let head_dim = match self.size("head_dim")? {
            Some(n) => n,
            None if family == Family::Qwen3 && !self.values.contains_key("head_dim") => 128,
            None => head_dim(self.path, hidden, heads)?,
        };
        for key in QUANTISED {
            if let Some(Value::Object(settings)) = self.value(key)
                && !is_plain(settings)
            {
                let method = settings.get("quant_method").or(settings.get("format"));
                let found = method.map_or_else(|| "another way".into(), excerpt);
                return Err(self.bad(key, UNQUANTISED, found));
            }
        }
        let kv_heads = match self.size("num_key_value_heads")? {
            Some(n) => n,
            None if self.values.contains_key("num_key_value_heads") => heads,
            None => match family {
                Family::Mistral => 8,
                Family::Qwen2 | Family::Qwen3 => 32,
                _ => heads,
            },
        };
        let max_positions = match self.size("max_position_embeddings")? {
            Some(n) => n,
            None => match family {
                Family::Phi3 => 4096,
                Family::Mistral => 131_072,
                Family::Qwen2 | Family::Qwen3 => 32_768,
                _ => 2048,
            },
        };
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
        // The other families have biases or not, whatever a file says.
        let may = matches!(family, Family::Llama | Family::Qwen3 | Family::Other(_));
        let bias = self.flag("attention_bias")?.unwrap_or(false) && may;
        let mlp_bias = self.flag("mlp_bias")?.unwrap_or(false);
        let mut bos = self.tokens("bos_token_id", vocab)?;
        if let (true, Some(generation)) = (bos.is_empty(), generation) {
            bos = generation.tokens("bos_token_id", vocab)?;
        }
        let config = ModelConfig {
            rope: self.rope(&family, head_dim, max_positions)?,
            hidden,
            intermediate: self.need("intermediate_size")?,
            layers,
            heads,
            kv_heads,
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
            output_bias: bias,
            head_norms: family == Family::Qwen3,
            mlp_bias: mlp_bias && matches!(family, Family::Llama | Family::Other(_)),
            activation: self
                .text("hidden_act")?
                .or(self.text("hidden_activation")?)
                .map_or("silu", |name| if name == "swish" { "silu" } else { name })
                .to_owned(),
            bos: bos.first().copied(),
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
        // One for each kind of layer, where there are several kinds.
        let rope = rope.object("full_attention")?.unwrap_or(rope);
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

/// Whether settings of a quantisation say that there is none.
fn is_plain(settings: &Map<String, Value>) -> bool {
    let off = |key: &str| settings.get(key).is_some_and(|on| on == false);
    settings.is_empty() || (off("load_in_4bit") && off("load_in_8bit"))
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
        assert_eq!(family("qwen2", used.clone()).binding_window(), None);
        let used = with(used, json!({"max_window_layers": 1}));
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
    fn what_files_leave_out_is_what_families_stand_for() {
        let family = |name: &str, gone: &[&str]| {
            let mut config = with(llama(), json!({"model_type": name}));
            for key in gone {
                config.as_object_mut().unwrap().remove(*key);
            }
            read(&config).unwrap()
        };
        for (name, positions) in [
            ("llama", 2048),
            ("phi3", 4096),
            ("mistral", 131_072),
            ("qwen2", 32_768),
            ("qwen3", 32_768),
        ] {
            let found = family(name, &["max_position_embeddings"]).max_positions;
            assert_eq!(found, positions, "{name}");
        }
        assert_eq!(family("llama", &["num_key_value_heads"]).kv_heads, 4);
        let wide = with(
            llama(),
            json!({"model_type": "mistral", "num_attention_heads": 16}),
        );
        let mut unsaid = wide.clone();
        unsaid
            .as_object_mut()
            .unwrap()
            .remove("num_key_value_heads");
        assert_eq!(read(&unsaid).unwrap().kv_heads, 8);
        let null = with(wide, json!({"num_key_value_heads": null}));
        assert_eq!(read(&null).unwrap().kv_heads, 16);
        assert_eq!(family("qwen3", &[]).head_dim, 128);
        assert_eq!(family("qwen2", &[]).head_dim, 16);
        let null = with(llama(), json!({"model_type": "qwen3", "head_dim": null}));
        assert_eq!(read(&null).unwrap().head_dim, 16);
        // Biases that a family does not have are not there, whatever is written.
        let biases = json!({"attention_bias": true, "mlp_bias": true});
        for (name, found) in [
            ("mistral", [false; 3]),
            ("phi3", [false; 3]),
            ("qwen2", [true, false, false]),
        ] {
            let config = with(with(llama(), json!({"model_type": name})), biases.clone());
            let config = read(&config).unwrap();
            assert_eq!(
                [config.attention_bias, config.output_bias, config.mlp_bias],
                found,
                "{name}"
            );
        }
        let begin = json!({"bos_token_id": 7});
        let unsaid = with(llama(), json!({"bos_token_id": null}));
        assert_eq!(read_with(&unsaid, Some(&begin)).unwrap().bos, Some(7));
    }

    #[test]
    fn the_language_model_of_several_media() {
        let mut text = with(
            llama(),
            json!({"model_type": "mistral", "sliding_window": null}),
        );
        let text_map = text.as_object_mut().unwrap();
        for key in ["bos_token_id", "eos_token_id", "tie_word_embeddings"] {
            text_map.remove(key);
        }
        let whole = json!({
            "model_type": "mistral3", "text_config": text, "vision_config": {"hidden_size": 8},
            "bos_token_id": 1, "eos_token_id": [2, 3], "tie_word_embeddings": true
        });
        let config = read(&whole).unwrap();
        assert_eq!(
            (config.family.clone(), config.hidden),
            (Family::Mistral, 64)
        );
        assert_eq!(
            (config.bos, config.eos.as_slice()),
            (Some(1), [2, 3].as_slice())
        );
        assert!(config.tied_embeddings);
        let fp8 = with(
            whole,
            json!({"quantization_config": {"quant_method": "fp8"}}),
        );
        assert_eq!(refused(&fp8).0, "quantization_config");
    }

    #[test]
    fn rotary_settings_of_each_kind_of_layer() {
        let kinds = json!({"rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 77.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}
        }});
        let mut config = with(llama(), kinds);
        config.as_object_mut().unwrap().remove("rope_theta");
        assert_eq!(read(&config).unwrap().rope.theta, 77.0);
    }

    #[test]
    fn quantised_checkpoints_are_refused() {
        let fp8 = json!({"quantization_config": {"quant_method": "fp8"}});
        let (what, found) = refused(&with(llama(), fp8));
        assert_eq!(what, "quantization_config");
        assert!(found.contains("fp8"));
        for plain in [
            json!(null),
            json!({}),
            json!({"quant_method": "bitsandbytes", "load_in_4bit": false, "load_in_8bit": false}),
        ] {
            read(&with(llama(), json!({"quantization_config": plain}))).unwrap();
        }
        // MLX has another name for it.
        let mlx = json!({"quantization": {"group_size": 64, "bits": 4}});
        assert_eq!(refused(&with(llama(), mlx)).0, "quantization");
        // And older files of GPTQ say it beside.
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), llama().to_string()).unwrap();
        fs::write(dir.path().join("quantize_config.json"), "{}").unwrap();
        let error = ModelConfig::from_dir(dir.path()).unwrap_err().to_string();
        assert!(error.contains("GPTQ") && error.contains("GGUF"), "{error}");
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
