//! Memory before anything is loaded: weights, retaining heads, cache and activations.

use crate::Result;
use burn::tensor::Device;
use locret_core::{CacheOptions, Compute, DType, Host, ModelSpec, Prefill, plan};
use locret_eval::report;
use locret_models::ModelConfig;
use locret_policies::{HeadWeights, LayerHead, Method, PolicyConfig, RetainingHeads};
use std::sync::Arc;

/// A model's dimensions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    /// What it is called.
    pub name: String,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Features of one head.
    pub head_dim: usize,
    /// Features of the hidden state.
    pub hidden: usize,
    /// Features between the two halves of the MLP.
    pub intermediate: usize,
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// Whether the embedding is the output matrix, too.
    pub tied: bool,
}

impl Shape {
    /// Models by name.
    pub const PRESETS: [&str; 6] = [
        "smollm2-135m",
        "llama-3.2-1b",
        "llama-3.1-8b",
        "llama-2-7b",
        "phi-3-mini",
        "phi-3-medium",
    ];

    /// The model called `name`; `None` if there is no such preset.
    pub fn preset(name: &str) -> Option<Self> {
        // layers, heads, kv_heads, head_dim, hidden, intermediate, vocab, tied
        let (l, h, g, d, hidden, intermediate, vocab, tied) = match name {
            "smollm2-135m" => (30, 9, 3, 64, 576, 1536, 49152, true),
            "llama-3.2-1b" => (16, 32, 8, 64, 2048, 8192, 128_256, true),
            "llama-3.1-8b" => (32, 32, 8, 128, 4096, 14336, 128_256, false),
            "llama-2-7b" => (32, 32, 32, 128, 4096, 11008, 32000, false),
            "phi-3-mini" => (32, 32, 32, 96, 3072, 8192, 32064, false),
            "phi-3-medium" => (40, 40, 10, 128, 5120, 17920, 32064, false),
            _ => return None,
        };
        Some(Self {
            name: name.into(),
            layers: l,
            heads: h,
            kv_heads: g,
            head_dim: d,
            hidden,
            intermediate,
            vocab,
            tied,
        })
    }

    /// The dimensions of a model's files.
    pub fn of(name: impl Into<String>, config: &ModelConfig) -> Self {
        Self {
            name: name.into(),
            layers: config.layers,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            hidden: config.hidden,
            intermediate: config.intermediate,
            vocab: config.vocab,
            tied: config.tied_embeddings,
        }
    }

    /// What the engine has to know of the model.
    pub fn spec(&self) -> ModelSpec {
        let (heads, kv_heads) = (self.heads, self.kv_heads);
        ModelSpec::new(self.layers, heads, kv_heads, self.hidden, self.vocab)
            .with_head_dim(self.head_dim)
    }

    /// Numbers in the model.
    pub fn parameters(&self) -> usize {
        let qkv = self.spec().layer(0).qkv_features() * self.hidden;
        let output = self.heads * self.head_dim * self.hidden;
        let mlp = 3 * self.hidden * self.intermediate;
        let layer = qkv + output + mlp + 2 * self.hidden;
        let embedding = self.vocab * self.hidden * if self.tied { 1 } else { 2 };
        self.layers * layer + embedding + self.hidden
    }

    /// Bytes of retaining heads of width `d_r` in memory, folded into the model's matrices where that makes them narrower
    /// ([`RetainingHeads::for_model`](locret_policies::RetainingHeads::for_model)), in 32 bits.
    pub fn head_bytes(&self, d_r: usize) -> usize {
        let inputs = self.hidden.min(self.spec().layer(0).qkv_features());
        4 * self.layers * d_r * (inputs + self.kv_heads)
    }
}

/// What is planned.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The model.
    pub shape: Shape,
    /// Tokens of the prompt.
    pub context: usize,
    /// Tokens to generate.
    pub max_new: usize,
    /// The policy.
    pub policy: PolicyConfig,
    /// How the prompt is read.
    pub prefill: Prefill,
    /// Type of cached keys and values.
    pub store: DType,
    /// Bytes of one weight.
    pub weight_bytes: usize,
    /// Width of retaining heads; used for Locret alone.
    pub d_r: usize,
}

/// Bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// The model's weights.
    pub weights: usize,
    /// Retaining heads.
    pub heads: usize,
    /// The most that keys and values take while the prompt is read.
    pub kv_prefill: usize,
    /// What they take when everything has been generated.
    pub kv_decode: usize,
    /// What a full cache of the same type would take in the end.
    pub kv_full: usize,
    /// An estimate of the largest intermediate results of one layer, and of a row of logits.
    pub activations: usize,
    /// The most units in one head of one layer at any moment.
    pub peak_units: usize,
}

impl Request {
    /// Works the plan out, chunk by chunk as the engine reads ([`locret_core::plan`]).
    ///
    /// # Errors
    /// [`Error::Policy`](crate::Error::Policy) for a policy without a budget,
    /// [`Error::Core`](crate::Error::Core) for an empty prompt, a chunk of 0
    /// or an impossible budget.
    pub fn plan(&self) -> Result<Plan> {
        let (shape, spec) = (&self.shape, self.shape.spec());
        let compute: Arc<dyn Compute> = Arc::new(Host::new(&Device::default()));
        let locret = self.policy.policy == Method::Locret;
        let policy = match locret {
            true => self
                .policy
                .build_with_heads(&spec, stand_in(&spec, &*compute)?)?,
            false => self.policy.build(&spec, &*compute)?,
        };
        let options = CacheOptions::new().dtype(self.store);
        let tokens = [self.context, self.max_new];
        let cache = plan(&spec, &*policy, &compute, options, &self.prefill, tokens)?;
        let total = self.context + self.max_new.saturating_sub(1);
        let rows = self.prefill.chunk.min(self.context);
        let logits_rows = if policy.needs().surprisal {
            rows.min(64)
        } else {
            1
        };
        // Residual, normalised and output rows; q, k, v; gate, up and their product; logits.
        let per_row = 3 * shape.hidden + 2 * spec.layer(0).qkv_features() + 3 * shape.intermediate;
        Ok(Plan {
            weights: shape.parameters() * self.weight_bytes,
            heads: if locret {
                shape.head_bytes(self.d_r)
            } else {
                0
            },
            kv_prefill: cache.prefill.bytes,
            kv_decode: cache.bytes,
            kv_full: spec.full_cache_bytes(total, self.store.block_bytes()),
            activations: 4 * (rows * per_row + logits_rows * shape.vocab),
            peak_units: cache.peak.units_per_head,
        })
    }
}

/// Heads of one feature: what a cache takes does not depend on what they say.
fn stand_in(spec: &ModelSpec, compute: &dyn Compute) -> Result<RetainingHeads> {
    let head = LayerHead {
        d_r: 1,
        fc1: vec![0.0; spec.layer(0).qkv_features()],
        fc2: vec![0.0; spec.kv_heads],
        ..LayerHead::default()
    };
    let weights = HeadWeights {
        layers: vec![head; spec.layers],
        ..HeadWeights::default()
    };
    Ok(RetainingHeads::new(&weights, spec, compute)?)
}

impl Plan {
    /// Everything at the worst moment.
    pub fn total(&self) -> usize {
        self.weights + self.heads + self.kv_prefill.max(self.kv_decode) + self.activations
    }

    /// The plan as a table.
    pub fn table(&self) -> report::Table {
        let mut table = report::Table::new(&["what", ">bytes"]);
        for (what, bytes) in [
            ("weights", self.weights),
            ("retaining heads", self.heads),
            ("KV cache, peak while reading", self.kv_prefill),
            ("KV cache, after generating", self.kv_decode),
            ("activations (estimate)", self.activations),
            ("together at the worst moment", self.total()),
            ("for comparison: a full KV cache", self.kv_full),
        ] {
            table.row([what.to_owned(), report::bytes(bytes)]);
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use locret_core::{Budget, Quantization};

    const GIB: f64 = (1u64 << 30) as f64;

    fn request(model: &str, policy: PolicyConfig, chunk: usize) -> Request {
        Request {
            shape: Shape::preset(model).unwrap(),
            context: 131_072,
            max_new: 1,
            policy,
            prefill: Prefill::new(chunk, 100),
            store: DType::BF16,
            weight_bytes: 2,
            d_r: 1024,
        }
    }

    #[test]
    fn the_papers_caches_are_reproduced() {
        let rows = [
            ("phi-3-mini", 6000, 3072, 48.0, 2.2),
            ("llama-3.1-8b", 16384, 1024, 16.0, 2.0),
        ];
        for (model, budget, chunk, full, bounded) in rows {
            let policy = PolicyConfig::new(Method::Locret).budget(Budget::Units(budget));
            let plan = request(model, policy, chunk).plan().unwrap();
            assert!((plan.kv_full as f64 / GIB - full).abs() < 0.01, "{model}");
            // The paper counts the budget alone; local tokens and the last chunk come on top.
            let kept = Shape::preset(model).unwrap();
            let unit = kept.kv_heads * 2 * kept.head_dim * 2;
            let paper = (kept.layers * budget * unit) as f64 / GIB;
            assert!((paper - bounded).abs() < 0.01, "{model} {paper}");
            let expected = kept.layers * (budget + 100) * unit;
            assert_eq!(plan.kv_decode, expected);
            assert_eq!(
                plan.kv_prefill,
                expected.max((kept.layers * budget + chunk) * unit)
            );
            assert_eq!(plan.peak_units, budget + chunk);
        }
    }

    #[test]
    fn parameters_are_those_of_the_models() {
        for (name, millions) in [
            ("smollm2-135m", 134.5),
            ("llama-3.2-1b", 1235.8),
            ("llama-3.1-8b", 8030.3),
            ("llama-2-7b", 6738.4),
            ("phi-3-mini", 3821.1),
            ("phi-3-medium", 13960.2),
        ] {
            let n = Shape::preset(name).unwrap().parameters() as f64 / 1e6;
            assert!((n - millions).abs() < 0.1, "{name}: {n}");
        }
        assert!(Shape::PRESETS.iter().all(|p| Shape::preset(p).is_some()));
        // Published heads of Phi-3-mini: d_R 1024.
        let phi = Shape::preset("phi-3-mini").unwrap();
        assert_eq!(phi.head_bytes(1024), 4 * 32 * 1024 * (3072 + 32));
    }

    #[test]
    fn short_prompts_and_full_caches() {
        let mut r = request("smollm2-135m", PolicyConfig::new(Method::Full), 256);
        r.context = 1000;
        r.max_new = 66;
        let unit = 3 * 2 * 64 * 2;
        let plan = r.plan().unwrap();
        assert_eq!(plan.kv_prefill, 30 * 1000 * unit);
        // 65 tokens are fed back, for which there is room up to multiples of 64 units.
        assert_eq!(plan.kv_decode, 30 * 1088 * unit);
        assert_eq!(plan.kv_full, 30 * 1065 * unit);
        r.policy = PolicyConfig::new(Method::KeyNorm).budget(Budget::Units(2000));
        assert_eq!(r.plan().unwrap().kv_prefill, plan.kv_prefill);
        r.policy.budget = Some(Budget::Units(0));
        assert!(r.plan().is_err());
        r.policy = PolicyConfig::new(Method::Full);
        r.policy.quantize = Some(Quantization::bits(4));
        // 968 units of 2 (32 + 4) bytes a head, 32 newest ones of 32 bits.
        r.max_new = 1;
        let quantised = r.plan().unwrap();
        let units = 968 * 2 * (32 + 4) + 32 * 2 * 64 * 4;
        assert_eq!(quantised.kv_decode, 30 * 3 * units);
        r.policy = PolicyConfig::new(Method::KeyNorm);
        assert!(r.plan().unwrap_err().to_string().contains("budget"));
        r.context = 0;
        assert!(r.plan().is_err());
    }
}
