//! Memory before anything is loaded: weights, retaining heads, cache and activations.

use crate::{Error, Result, report};
use locret_core::{Budget, KvDtype, LayerSpec, Prefill, QuantLayout, Quantization};
use locret_models::ModelConfig;
use locret_policies::{Method, PolicyConfig};

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

    pub(crate) fn layer(&self) -> LayerSpec {
        LayerSpec {
            index: 0,
            layers: self.layers,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
        }
    }

    /// Numbers in the model.
    pub fn parameters(&self) -> usize {
        let qkv = self.layer().qkv_features() * self.hidden;
        let output = self.heads * self.head_dim * self.hidden;
        let mlp = 3 * self.hidden * self.intermediate;
        let layer = qkv + output + mlp + 2 * self.hidden;
        let embedding = self.vocab * self.hidden * if self.tied { 1 } else { 2 };
        self.layers * layer + embedding + self.hidden
    }

    /// Bytes of retaining heads of width `d_r` in memory, folded into the model's matrices where that makes them narrower
    /// ([`RetainingHeads::for_model`](locret_policies::RetainingHeads::for_model)), in 32 bits.
    pub fn head_bytes(&self, d_r: usize) -> usize {
        let inputs = self.hidden.min(self.layer().qkv_features());
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
    pub store: KvDtype,
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

/// Dense units and codes grow by this many units when single tokens are appended.
const DECODE_RESERVE: usize = 64;

impl Request {
    /// Works the plan out, chunk by chunk as the engine reads.
    ///
    /// Exact for dense stores. Quantised ones are estimated, as it depends on the text which of
    /// their units are dropped: within 5 %, and up to 20 % too much for KIVI's layout (2 bits)
    /// under a policy that drops single units here and there, which is planned as if they went by
    /// lot. Budgets that are shared out over layers or heads are counted as if every head had its
    /// mean.
    ///
    /// # Errors
    /// [`Error::Usage`] for an empty prompt or a policy without a budget; [`Error::Core`] for a
    /// chunk of 0 or an impossible budget.
    pub fn plan(&self) -> Result<Plan> {
        self.prefill.validate()?;
        if self.context == 0 {
            return Err(Error::Usage("a prompt has at least one token".into()));
        }
        let shape = &self.shape;
        let layer = shape.layer();
        let budget = self.budget(&layer)?;
        let l = shape.layers;
        // Where surprisal is known after the last layer only, no layer is cut back before.
        let at_once = self.policy.policy == Method::SirLlm;
        let scattered = self.policy.policy != Method::Window;
        let mut memory = Memory::new(shape, self.store, self.policy.quantize, scattered);
        let local = self.prefill.local.min(self.context);
        let body = self.context - local;
        let chunks = pieces(body, self.prefill.chunk).map(|t| (t, budget));
        let tail = pieces(local, self.prefill.chunk).map(|t| (t, None));
        let mut kv_prefill = 0;
        for (t, budget) in chunks.chain(tail) {
            memory.append(t);
            let during = memory.bytes();
            memory.settle(budget);
            // The last layer is about to be cut, the others have been.
            let others = if at_once { during } else { memory.bytes() };
            kv_prefill = kv_prefill.max((l - 1) * others + during);
        }
        // The last token is never fed back.
        for _ in 1..self.max_new {
            memory.append(1);
            memory.settle(None);
        }
        let kv_decode = l * memory.bytes();
        let total = self.context + self.max_new.saturating_sub(1);
        let rows = self.prefill.chunk.min(self.context);
        let logits_rows = if at_once { rows.min(64) } else { 1 };
        // Residual, normalised and output rows; q, k, v; gate, up and their product; logits.
        let per_row = 3 * shape.hidden + 2 * layer.qkv_features() + 3 * shape.intermediate;
        let locret = self.policy.policy == Method::Locret;
        Ok(Plan {
            weights: shape.parameters() * self.weight_bytes,
            heads: if locret {
                shape.head_bytes(self.d_r)
            } else {
                0
            },
            kv_prefill,
            kv_decode,
            kv_full: l * shape.kv_heads * 2 * shape.head_dim * self.store.bytes() * total,
            activations: 4 * (rows * per_row + logits_rows * shape.vocab),
            peak_units: memory.longest,
        })
    }

    fn budget(&self, layer: &LayerSpec) -> Result<Option<usize>> {
        if self.policy.policy == Method::Full {
            return Ok(None);
        }
        let budget = self
            .policy
            .budget
            .ok_or_else(|| Error::Usage(format!("policy {} needs a budget", self.policy.policy)))?;
        budget.validate(layer)?;
        if let Budget::Bytes(_) = budget {
            // The engine counts such a budget in 32-bit values.
            return Ok(Some(budget.units(layer, 0)));
        }
        Ok(Some(budget.units(layer, self.context).max(1)))
    }
}

/// `n` in pieces of `size`, the last one smaller.
fn pieces(n: usize, size: usize) -> impl Iterator<Item = usize> {
    (0..n).step_by(size).map(move |at| size.min(n - at))
}

/// The heads of one layer, in units.
#[derive(Debug)]
struct Memory {
    /// Units that are kept as integers, and what is reserved for them.
    coded: usize,
    coded_capacity: usize,
    /// Units that are kept as they are, and what is reserved for them.
    tail: usize,
    capacity: usize,
    longest: usize,
    quantization: Option<Quantization>,
    /// Bytes of a unit of all heads, as integers and as it is.
    coded_bytes: usize,
    tail_bytes: usize,
    /// Groups of tokens that have a member left, where keys are scaled by group, and the bytes of
    /// what its members share in all heads.
    groups: f64,
    group_bytes: usize,
    /// Whether units go here and there, and not the oldest first.
    scattered: bool,
}

impl Memory {
    fn new(
        shape: &Shape,
        store: KvDtype,
        quantization: Option<Quantization>,
        scattered: bool,
    ) -> Self {
        let d = shape.head_dim;
        let (coded, group) = quantization.map_or((0, 0), |q| {
            // Two 16-bit numbers for each group.
            let codes = 2 * (d * usize::from(q.bits)).div_ceil(8);
            let by_token = 4 * d.div_ceil(q.group.clamp(1, d));
            match q.layout {
                QuantLayout::PerToken => (codes + 2 * by_token, 0),
                QuantLayout::Kivi => (codes + by_token, 4 * d),
            }
        });
        let value = if quantization.is_some() {
            4
        } else {
            store.bytes()
        };
        Self {
            coded: 0,
            coded_capacity: 0,
            tail: 0,
            capacity: 0,
            longest: 0,
            quantization,
            coded_bytes: coded * shape.kv_heads,
            tail_bytes: shape.kv_heads * 2 * d * value,
            groups: 0.0,
            group_bytes: group * shape.kv_heads,
            scattered,
        }
    }

    fn append(&mut self, t: usize) {
        if self.capacity - self.tail < t {
            let single = t == 1 && self.quantization.is_none();
            self.capacity = self.tail + if single { DECODE_RESERVE } else { t };
        }
        self.tail += t;
        self.longest = self.longest.max(self.coded + self.tail);
    }

    /// Cuts back to `budget` units and turns what is older than the residual into integers.
    fn settle(&mut self, budget: Option<usize>) {
        let len = self.coded + self.tail;
        let kept = budget.map_or(len, |b| len.min(b));
        let dropped = len - kept;
        let Some(q) = self.quantization else {
            let spare = self.capacity - self.tail;
            self.tail = kept;
            if dropped > 1 || dropped == 1 && (spare == 0 || spare + 1 > DECODE_RESERVE) {
                self.capacity = kept;
            }
            return;
        };
        if dropped > 0 {
            let before = self.coded as f64;
            if self.scattered {
                // As if units went by lot, older and newer ones alike: which do depends on the text.
                let left = kept as f64 / len as f64;
                self.coded = (before * left).round() as usize;
                // The share of groups of which at least one member is left.
                let members = before / self.groups.max(1.0);
                self.groups *= 1.0 - (1.0 - left).powf(members);
            } else {
                self.coded = self.coded.saturating_sub(dropped);
                self.groups = self.coded.div_ceil(q.group.max(1)) as f64;
            }
            self.tail = kept - self.coded;
            let reserve = if dropped > 1 { 0 } else { DECODE_RESERVE };
            if self.coded_capacity > self.coded + reserve {
                self.coded_capacity = self.coded;
            }
        }
        let mut units = self.tail.saturating_sub(q.residual);
        if q.layout == QuantLayout::Kivi {
            units -= units % q.group.max(1);
        }
        if units > 0 {
            if self.coded_capacity - self.coded < units {
                let room = if units == 1 { DECODE_RESERVE } else { units };
                self.coded_capacity = self.coded + room;
            }
            self.coded += units;
            self.tail -= units;
            self.groups += units as f64 / q.group.max(1) as f64;
        }
        if self.capacity > self.tail + 1 {
            self.capacity = self.tail;
        }
    }

    fn bytes(&self) -> usize {
        self.coded_capacity * self.coded_bytes
            + (self.groups * self.group_bytes as f64) as usize
            + self.capacity * self.tail_bytes
    }
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

    const GIB: f64 = (1u64 << 30) as f64;

    fn request(model: &str, policy: PolicyConfig, chunk: usize) -> Request {
        Request {
            shape: Shape::preset(model).unwrap(),
            context: 131_072,
            max_new: 1,
            policy,
            prefill: Prefill { chunk, local: 100 },
            store: KvDtype::Bf16,
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
        // 65 tokens are fed back, in steps of 64 units.
        assert_eq!(plan.kv_decode, 30 * 1128 * unit);
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
