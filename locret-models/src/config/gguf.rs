//! Settings in the metadata of a GGUF file.

use super::{Family, ModelConfig, head_dim, limits, long_rope_attention};
use crate::{Gguf, ModelError, Result, Value, tokenizer::named_id};
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
        if let Some(experts @ 1..) = keys.size("expert_count")? {
            return Err(keys.bad(
                "expert_count",
                "0 (mixtures of experts are not supported)",
                experts,
            ));
        }
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
        let layers = keys.need("block_count")?;
        let has = |part: &str| gguf.tensor(&format!("blk.0.{part}")).is_some();
        let config = Self {
            family: Family::new(arch),
            hidden,
            intermediate: keys.need("feed_forward_length")?,
            layers,
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
            sliding_window: keys.window(layers, max_positions)?,
            attention_bias: has("attn_q.bias"),
            output_bias: has("attn_output.bias"),
            mlp_bias: has("ffn_down.bias"),
            head_norms: has("attn_q_norm.weight"),
            activation: "silu".into(),
            bos: named_id(gguf, "bos", vocab)?,
            eos: named_id(gguf, "eos", vocab)?.into_iter().collect(),
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
        let full = self.key(key);
        // Some files have a list with a number for each layer; a model of different ones is another.
        let n = match self.gguf.metadata().get(&full) {
            Some(Value::Array(list)) => {
                let list = list.as_integers().unwrap_or_default();
                let first = list.first().and_then(|first| u64::try_from(*first).ok());
                let same = list.windows(2).all(|pair| pair[0] == pair[1]);
                let found = first.filter(|_| same);
                found.ok_or_else(|| self.bad(key, "the same number for all layers", "a list"))?
            }
            _ => match self.gguf.get_u64(&full)? {
                Some(n) => n,
                None => return Ok(None),
            },
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

    /// How many tokens attention sees. Files of Phi-3 from before there was a key for that leave it out;
    /// the two models with such a window are known by their dimensions, as llama.cpp knew them.
    fn window(&self, layers: usize, max_positions: usize) -> Result<Option<usize>> {
        match self.size("attention.sliding_window")? {
            Some(window) => Ok(Some(window).filter(|&n| n > 0)),
            None if self.arch == "phi3" && matches!(layers, 32 | 40) && max_positions == 4096 => {
                Ok(Some(2047))
            }
            None => Ok(None),
        }
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

    /// The factor of a linear scaling, 1 where there is none.
    fn linear(&self) -> Result<f64> {
        let factor = match self.number("rope.scaling.factor")? {
            Some(factor) => Some(factor),
            None => self.number("rope.scale_linear")?,
        };
        // Programs write 0 for "none".
        let factor = factor.filter(|factor| *factor != 0.0);
        match self.gguf.get_str(&self.key("rope.scaling.type"))? {
            Some("none") => Ok(1.0),
            None | Some("linear") => Ok(factor.unwrap_or(1.0)),
            Some(other) => {
                let expected = "none, or linear with a factor, or factors as tensors";
                Err(self.bad("rope.scaling.type", expected, other))
            }
        }
    }

    fn rope(&self, head_dim: usize, max_positions: usize) -> Result<RopeConfig> {
        let original_max = self
            .size("rope.scaling.original_context_length")?
            .unwrap_or(max_positions);
        let rotary_dim = self.size("rope.dimension_count")?.unwrap_or(head_dim);
        // On cosines and sines, whatever the scaling.
        let attention = self.number("rope.scaling.attn_factor")?;
        let attention = attention.filter(|factor| *factor != 0.0);
        let long = self.factors("rope_factors_long.weight")?;
        let short = self.factors("rope_factors_short.weight")?;
        let scaling = if let (Some(long), Some(short)) = (long, short) {
            let factor = match self.gguf.get_str(&self.key("rope.scaling.type"))? {
                // The type that goes with such factors.
                Some("longrope") => 1.0,
                _ => self.linear()?,
            };
            let scaled = |factors: Vec<f64>| factors.iter().map(|f| f * factor).collect();
            let attention_factor = attention.unwrap_or_else(|| {
                let factor = max_positions as f64 / original_max as f64;
                long_rope_attention(factor, original_max)
            });
            RopeScaling::LongRope {
                short: scaled(short),
                long: scaled(long),
                original_max,
                attention_factor,
                switch: LongRopeSwitch::ByLength,
            }
        } else {
            let factor = self.linear()?;
            let factors = self.factors("rope_freqs.weight")?;
            let attention_factor = attention.unwrap_or(1.0);
            if factors.is_none() && attention_factor == 1.0 {
                match factor {
                    1.0 => RopeScaling::None,
                    _ => RopeScaling::Linear { factor },
                }
            } else {
                // Llama 3.1 as converted: the scaled frequencies themselves, as divisors that hold at
                // every length. A further scaling divides once more.
                let factors = factors.unwrap_or_else(|| vec![1.0; rotary_dim / 2]);
                let factors: Vec<f64> = factors.iter().map(|f| f * factor).collect();
                RopeScaling::LongRope {
                    short: factors.clone(),
                    long: factors,
                    original_max,
                    attention_factor,
                    switch: LongRopeSwitch::ByLength,
                }
            }
        };
        Ok(RopeConfig {
            theta: self.number("rope.freq_base")?.unwrap_or(10_000.0),
            rotary_dim,
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
        assert_eq!(gguf(&gguf_file("qwen2")).unwrap().family, Family::Qwen2);
        let other = gguf(&gguf_file("gpt2")).unwrap();
        assert_eq!(other.family, Family::Other("gpt2".into()));
    }

    #[test]
    fn numbers_of_any_width() {
        let plain = gguf(&gguf_file("llama")).unwrap();
        for value in [
            Meta::U8(2),
            Meta::I8(2),
            Meta::U16(2),
            Meta::I16(2),
            Meta::I32(2),
            Meta::U64(2),
            Meta::I64(2),
            Meta::Array(Array::I32(vec![2, 2])),
            Meta::Array(Array::U64(vec![2, 2])),
        ] {
            let key = "llama.attention.head_count_kv";
            let mut file = gguf_file("llama");
            file.metadata.retain(|(k, _)| k != key);
            assert_eq!(
                gguf(&file.meta(key, value.clone())).unwrap(),
                plain,
                "{value:?}"
            );
        }
    }

    #[test]
    fn tokens_that_there_are_not() {
        for none in [Meta::I32(-1), Meta::U32(u32::MAX), Meta::U32(300)] {
            for key in ["tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"] {
                let mut file = gguf_file("llama");
                file.metadata.retain(|(k, _)| k != key);
                let config = gguf(&file.meta(key, none.clone())).unwrap();
                assert!(
                    config.bos.is_none() || config.eos.is_empty(),
                    "{key}: {none:?}"
                );
            }
        }
    }

    #[test]
    fn windows_of_phi3() {
        let phi3 = |layers: u32, context: u32| {
            let mut file = gguf_file("phi3");
            let own = ["phi3.block_count", "phi3.context_length"];
            file.metadata.retain(|(k, _)| !own.contains(&k.as_str()));
            file.meta(own[0], Meta::U32(layers))
                .meta(own[1], Meta::U32(context))
        };
        let window = |file: &File| gguf(file).unwrap().sliding_window;
        assert_eq!(window(&phi3(32, 4096)), Some(2047));
        assert_eq!(window(&phi3(40, 4096)), Some(2047));
        assert_eq!(window(&phi3(32, 131_072)), None);
        assert_eq!(window(&gguf_file("llama")), None);
        let key = "phi3.attention.sliding_window";
        assert_eq!(window(&phi3(32, 4096).meta(key, Meta::U32(512))), Some(512));
        assert_eq!(window(&phi3(32, 4096).meta(key, Meta::U32(0))), None);
    }

    #[test]
    fn a_scaling_beside_factors() {
        let scaled = |kind: &str, factor: Meta| {
            let file = gguf_file("llama")
                .f32(
                    "rope_freqs.weight",
                    &[8],
                    &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
                )
                .meta("llama.rope.scaling.type", Meta::String(kind.into()))
                .meta("llama.rope.scaling.factor", factor);
            gguf(&file)
        };
        let first = |config: ModelConfig| match config.rope.scaling {
            RopeScaling::LongRope { short, long, .. } if short == long => short[1],
            other => panic!("{other:?}"),
        };
        assert_eq!(first(scaled("linear", Meta::F32(4.0)).unwrap()), 8.0);
        assert_eq!(first(scaled("linear", Meta::F32(0.0)).unwrap()), 2.0);
        assert_eq!(first(scaled("none", Meta::F32(4.0)).unwrap()), 2.0);
        assert!(scaled("yarn", Meta::F32(4.0)).is_err());
        // 0 is what programs write for "none".
        let zero = gguf_file("llama").meta("llama.rope.scale_linear", Meta::F32(0.0));
        assert_eq!(gguf(&zero).unwrap().rope.scaling, RopeScaling::None);
    }

    #[test]
    fn heads_may_have_a_size_of_their_own() {
        let own = |key: u32, value: u32| {
            let file = gguf_file("llama")
                .meta("llama.attention.key_length", Meta::U32(key))
                .meta("llama.attention.value_length", Meta::U32(value));
            gguf(&file)
        };
        let config = own(32, 32).unwrap();
        assert_eq!((config.head_dim, config.rope.rotary_dim), (32, 32));
        assert_eq!(gguf(&gguf_file("llama")).unwrap().head_dim, 16);
        assert!(own(32, 16).is_err());
    }

    #[test]
    fn a_factor_on_cosines_counts_with_every_scaling() {
        let with = |file: File| {
            let file = file.meta("llama.rope.scaling.attn_factor", Meta::F32(1.5));
            match gguf(&file).unwrap().rope.scaling {
                RopeScaling::LongRope {
                    short,
                    long,
                    attention_factor,
                    ..
                } if short == long => (attention_factor, long),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(with(gguf_file("llama")), (1.5, vec![1.0; 8]));
        let linear = gguf_file("llama").meta("llama.rope.scaling.factor", Meta::F32(2.0));
        assert_eq!(with(linear), (1.5, vec![2.0; 8]));
        let factors = gguf_file("llama").f32("rope_freqs.weight", &[8], &[3.0; 8]);
        assert_eq!(with(factors), (1.5, vec![3.0; 8]));
        for none in [0.0, 1.0] {
            let key = "llama.rope.scaling.attn_factor";
            let plain = gguf_file("llama").meta(key, Meta::F32(none));
            assert_eq!(gguf(&plain).unwrap().rope.scaling, RopeScaling::None);
        }
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
            ("llama.expert_count", Meta::U32(8)),
            ("llama.attention.value_length", Meta::U32(8)),
            ("llama.rope.scaling.type", Meta::String("yarn".into())),
            ("tokenizer.ggml.eos_token_id", Meta::String("2".into())),
            (
                "llama.attention.head_count_kv",
                Meta::Array(Array::U32(vec![2, 4])),
            ),
            ("llama.block_count", Meta::Array(Array::U32(vec![]))),
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
