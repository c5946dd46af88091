//! Settings in the metadata of a GGUF file.

use super::{Family, ModelConfig, head_dim, limits, long_rope_attention};
use crate::{Gguf, ModelError, Result};
use locret_core::{LongRopeSwitch, RopeConfig, RopeScaling};

impl ModelConfig {
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
    use crate::{
        Array, Value as Meta,
        config::json::tests::{llama, read},
        gguf_file::File,
    };

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
