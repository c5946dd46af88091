//! Memory before anything is loaded: weights, retaining heads, cache and activations.

use crate::Result;
use burn::tensor::Device;
use locret_core::{
    CacheOptions, Compute, DType, Host, KvCachePolicy, ModelSpec, Plan as CachePlan, Prefill,
    plan_layers,
};
use locret_eval::report;
use locret_models::ModelConfig;
use locret_policies::{HeadWeights, LayerHead, Method, PolicyConfig, RetainingHeads};
use std::{cell::RefCell, collections::BTreeMap, ops::Range, sync::Arc};

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

    /// Bytes of a matrix of so many numbers.
    fn matrix_bytes(numbers: usize, dtype: DType) -> usize {
        numbers / dtype.block() * dtype.block_bytes()
    }

    /// Bytes of one layer's weights, whose norms are in 32 bits whatever the matrices are in.
    pub fn layer_bytes(&self, dtype: DType) -> usize {
        let qkv = self.spec().layer(0).qkv_features() * self.hidden;
        let output = self.heads * self.head_dim * self.hidden;
        let mlp = 3 * self.hidden * self.intermediate;
        Self::matrix_bytes(qkv + output + mlp, dtype) + 2 * self.norm_bytes()
    }

    /// Bytes of the embedding, or of an output matrix.
    pub fn table_bytes(&self, dtype: DType) -> usize {
        Self::matrix_bytes(self.vocab * self.hidden, dtype)
    }

    /// Bytes of a norm.
    pub fn norm_bytes(&self) -> usize {
        4 * self.hidden
    }

    /// Bytes of all weights.
    pub fn weight_bytes(&self, dtype: DType) -> usize {
        let tables = if self.tied { 1 } else { 2 };
        let tables = tables * self.table_bytes(dtype);
        self.layers * self.layer_bytes(dtype) + tables + self.norm_bytes()
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
    /// Type of the matrices.
    pub weights: DType,
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
        let (shape, planned) = (&self.shape, self.planned()?);
        let cache = planned.layers(self, 0..shape.layers)?;
        let total = self.context + self.max_new.saturating_sub(1);
        Ok(Plan {
            weights: shape.weight_bytes(self.weights),
            heads: planned.heads(self),
            kv_prefill: cache.prefill.bytes,
            kv_decode: cache.bytes,
            kv_full: (planned.spec).full_cache_bytes(total, self.store.block_bytes()),
            activations: planned.activations(self, true, true),
            peak_units: cache.peak.units_per_head,
        })
    }

    /// What plans of any of the layers are made with.
    pub(crate) fn planned(&self) -> Result<Planned> {
        let spec = self.shape.spec();
        let compute: Arc<dyn Compute> = Arc::new(Host::new(&Device::default()));
        let policy = match self.policy.policy == Method::Locret {
            true => self
                .policy
                .build_with_heads(&spec, stand_in(&spec, &*compute)?)?,
            false => self.policy.build(&spec, &*compute)?,
        };
        Ok(Planned {
            spec,
            policy,
            compute,
            known: RefCell::default(),
        })
    }
}

/// A model's shape and a policy for it.
pub(crate) struct Planned {
    spec: ModelSpec,
    policy: Arc<dyn KvCachePolicy>,
    compute: Arc<dyn Compute>,
    /// What was planned before.
    known: RefCell<BTreeMap<[usize; 2], CachePlan>>,
}

impl Planned {
    /// What the caches of these layers take.
    pub(crate) fn layers(&self, request: &Request, layers: Range<usize>) -> Result<CachePlan> {
        let options = CacheOptions::new().dtype(request.store);
        let tokens = [request.context, request.max_new];
        let (spec, policy, prefill) = (&self.spec, &*self.policy, &request.prefill);
        let (compute, key) = (&self.compute, [layers.start, layers.end]);
        if let Some(known) = self.known.borrow().get(&key) {
            return Ok(*known);
        }
        let made = plan_layers(spec, policy, compute, options, prefill, tokens, layers)?;
        self.known.borrow_mut().insert(key, made);
        Ok(made)
    }

    /// Bytes of retaining heads.
    pub(crate) fn heads(&self, request: &Request) -> usize {
        match request.policy.policy == Method::Locret {
            true => request.shape.head_bytes(request.d_r),
            false => 0,
        }
    }

    /// Bytes of the largest intermediate results of a layer, if there is one, and of rows of logits, if there are any.
    pub(crate) fn activations(&self, request: &Request, layer: bool, logits: bool) -> usize {
        let (shape, rows) = (&request.shape, request.prefill.chunk.min(request.context));
        let logits_rows = match (logits, self.policy.needs().surprisal) {
            (false, _) => 0,
            (true, true) => rows.min(64),
            (true, false) => 1,
        };
        // Residual, normalised and output rows; q, k, v; gate, up and their product; logits.
        let qkv = self.spec.layer(0).qkv_features();
        let per_row = match layer {
            true => 3 * shape.hidden + 2 * qkv + 3 * shape.intermediate,
            false => 2 * shape.hidden,
        };
        4 * (rows * per_row + logits_rows * shape.vocab)
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
            weights: DType::BF16,
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

    #[test]
    fn llama_8b_on_24_gib() {
        // Layers of Llama-3.1-8B: q, k and v; o; gate, up and down. Two norms of 32 bits beside them.
        let layer = 6144 * 4096 + 4096 * 4096 + 3 * 4096 * 14_336;
        let table = 128_256 * 4096;
        let norms = 4 * 4096;
        let bf16 = 32 * (2 * layer + 2 * norms) + 2 * 2 * table + norms;
        let q4_k = 32 * (layer / 256 * 144 + 2 * norms) + 2 * (table / 256 * 144) + norms;
        assert_eq!([bf16, q4_k], [16_061_054_976, 4_517_937_152]);
        // Keys and values of a token in a layer, in bf16; all tokens, or the budget with 100 local ones.
        let unit = 2 * 8 * 128 * 2;
        let (all, kept) = (32 * 131_072 * unit, 32 * (16_384 + 100) * unit);
        assert_eq!([all, kept], [17_179_869_184, 2_160_590_848]);
        // Heads of d_R 1,024, folded, in f32; three rows of the model's width, q, k and v twice, and three of the
        // MLP's, for each token of a chunk, and a row of logits.
        let heads = 4 * 32 * 1024 * (4096 + 8);
        let rows = 4 * (1024 * (3 * 4096 + 2 * 6144 + 3 * 14_336) + 128_256);
        assert_eq!([heads, rows], [537_919_488, 277_337_088]);
        let card = 24 << 30;
        let locret = PolicyConfig::new(Method::Locret).budget(Budget::Units(16_384));
        let window = PolicyConfig::new(Method::Window).budget(Budget::Units(16_384));
        let full = PolicyConfig::new(Method::Full);
        for (weights, bytes, policy, expected, fits) in [
            (DType::BF16, bf16, &full, bf16 + all + rows, false),
            (DType::BF16, bf16, &locret, bf16 + heads + kept + rows, true),
            (DType::BF16, bf16, &window, bf16 + kept + rows, true),
            (DType::Q4_K, q4_k, &full, q4_k + all + rows, true),
            (DType::Q4_K, q4_k, &locret, q4_k + heads + kept + rows, true),
            (DType::Q4_K, q4_k, &window, q4_k + kept + rows, true),
        ] {
            let mut request = request("llama-3.1-8b", policy.clone(), 1024);
            request.weights = weights;
            let plan = request.plan().unwrap();
            assert_eq!(plan.weights, bytes);
            assert_eq!(plan.total(), expected, "{weights}, {}", policy.policy);
            assert_eq!(plan.total() <= card, fits, "{weights}, {}", policy.policy);
            let split = request.split(&[card]).unwrap();
            assert_eq!(split.is_whole(), fits, "{weights}, {}", policy.policy);
            if fits {
                assert_eq!(split.parts[0].total(), expected);
                assert_eq!(split.flags(), "--device cuda");
            }
        }
        // The full cache beside bf16: what a layer takes, and the head with the last norm; as many layers as there
        // is room for.
        let request = request("llama-3.1-8b", full, 1024);
        let there = (card - 2 * table - norms - rows) / (2 * layer + 2 * norms + 131_072 * unit);
        assert_eq!(there, 25);
        let split = request.split(&[card]).unwrap();
        assert_eq!(split.flags(), "--device cuda --gpu-layers 26");
        let [cpu, gpu] = &split.parts[..] else {
            panic!("{split:?}")
        };
        assert_eq!([cpu.layers.clone(), gpu.layers.clone()], [0..7, 7..32]);
        assert_eq!(cpu.weights + gpu.weights, bf16);
        assert_eq!(cpu.kv + gpu.kv, all);
        assert!(gpu.fits());
        // Two such cards have room for all of it, 16 layers each.
        let split = request.split(&[card, card]).unwrap();
        assert_eq!(split.flags(), "--devices cuda:0,cuda:1 --layers-each 16,16");
        let weights: usize = split.parts.iter().map(|part| part.weights).sum();
        assert_eq!(weights, bf16);
    }

    #[test]
    fn layers_are_laid_by_bytes() {
        let window = PolicyConfig::new(Method::Window).budget(Budget::Units(1000));
        let mut request = request("smollm2-135m", window, 256);
        request.context = 4000;
        let plan = request.plan().unwrap();
        // The second card has a third of the first one's memory.
        let (large, small) = (plan.total(), plan.total() / 3);
        let split = request.split(&[large, small]).unwrap();
        let [first, second] = &split.parts[..] else {
            panic!("{split:?}")
        };
        assert!(split.is_whole() && first.fits() && second.fits());
        // Moving a layer either way makes the fuller one fuller.
        let fill = |part: &crate::split::Part| part.total() as f64 / part.memory.unwrap() as f64;
        let layer = first.weights as f64 / first.layers.len() as f64;
        assert!((fill(first) - fill(second)).abs() < 1.5 * layer / small as f64);
        // A tied head is held twice where the embedding stays on the CPU.
        let split = request.split(&[small]).unwrap();
        let [cpu, gpu] = &split.parts[..] else {
            panic!("{split:?}")
        };
        let table = request.shape.table_bytes(request.weights);
        assert_eq!(cpu.weights + gpu.weights, plan.weights + table);
        assert!(gpu.fits() && !split.is_whole() && !gpu.layers.is_empty());
        // Nothing fits: all of it on the CPU.
        let split = request.split(&[1 << 20]).unwrap();
        assert_eq!(
            (split.flags().as_str(), split.on_devices()),
            ("--device flex", 0)
        );
        assert_eq!(split.parts[0].weights, plan.weights);
        assert_eq!(split, request.split(&[]).unwrap());
    }
}
