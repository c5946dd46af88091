//! Weights of retaining heads, and their files.

use super::{
    container::{self, Kind, Named, Raw},
    layouts::{self, Part, Sizes},
};
use crate::error::{PolicyError, Result};
use locret_core::{BudgetTable, DType, ModelSpec, Positions, Share};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

/// The weights of a model's retaining heads: one head for each layer, all of one [form](HeadForm).
///
/// Files use the names that heads of this form are published with.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct HeadWeights {
    /// What is computed with the weights.
    pub form: HeadForm,
    /// One head per layer.
    pub layers: Vec<LayerHead>,
    /// Free text that a safetensors file carries: where the heads come from.
    pub metadata: BTreeMap<String, String>,
}

/// What a head makes of a token, and the tensors that files have of it in layer `i`. `h` is the layer's input,
/// `D` its features, `G` KV heads.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum HeadForm {
    /// Locret's (arXiv 2410.01805 §3.1): `fc2 · silu(fc1 · [q; k; v])`. `model.layers.{i}.self_attn.fc1.weight`
    /// `[d_R, (H + 2G)·d]`, `.fc2.weight` `[G, d_R]`.
    #[default]
    Locret,
    /// KVzap's linear one (arXiv 2601.07891 §3): `fc1 · h + b1`. `layers.{i}.weight` `[G, D]`, `.bias` `[G]`.
    Linear,
    /// KVzap's MLP: `fc2 · gelu(fc1 · h + b1) + b2`. `layers.{i}.0.weight` `[d_R, D]`, `.0.bias` `[d_R]`,
    /// `.2.weight` `[G, d_R]`, `.2.bias` `[G]`.
    Mlp,
    /// TRIM-KV's (arXiv 2512.03324 §4): `ln β = logsigmoid(fc2 · silu(fc1 · h + b1) + b2)`, and the score of unit `i`
    /// at time `t` is `(t - i) · ln β`: it falls as the unit grows old.
    /// `model.layers.{i}.self_attn.retention_gate.linear1.weight` `[d_R, D]`, `.linear1.bias` `[d_R]`,
    /// `.linear2.weight` `[G, d_R]`, `.bias` `[G]`.
    Decay,
    /// Fast KVzip's gate (arXiv 2601.17668 §3): see [`Gate`]. `module.{i}.q_proj.weight` `[G·g·f, D]`, `.q_proj.bias`
    /// `[G·g·f]`, `.k_proj.weight` `[G·f, D]`, `.q_norm.weight` and `.k_norm.weight` `[f]`, `.k_base`
    /// `[G, 1, S, f]`, `.b` `[G, 1, g]`.
    Gate,
}

impl HeadForm {
    /// What heads of this form read.
    pub fn reads(self) -> HeadInput {
        match self {
            Self::Locret => HeadInput::Qkv,
            _ => HeadInput::Layer,
        }
    }
}

/// What a head reads of a token.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum HeadInput {
    /// Its query, key and value before rotation, side by side.
    #[default]
    Qkv,
    /// What the layer makes these from: the hidden state behind the layer's first normalisation.
    Layer,
}

impl HeadInput {
    /// Its name in files.
    #[cfg(feature = "training")]
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Qkv => "qkv",
            Self::Layer => "input",
        }
    }

    /// How many features that are.
    pub fn features(self, model: &ModelSpec) -> usize {
        match self {
            Self::Qkv => model.layer(0).qkv_features(),
            Self::Layer => model.hidden,
        }
    }
}

/// How heads are best used, as their file says: settings that won on texts put aside when they were
/// trained. A file of the authors' says nothing, and so leaves their procedure as it is.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeadAdvice {
    /// Over how many neighbouring units scores are max-pooled for selection (odd).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<usize>,
    /// First units of the text that stay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sinks: Option<usize>,
    /// Newest units that stay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recent: Option<usize>,
    /// The share of a budget that each head keeps by itself, while the rest goes to the best scores of all that
    /// share it ([`Evict::ada`](locret_core::Evict::ada)).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ada: Option<f64>,
    /// Which heads share a budget.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share: Option<Share>,
    /// Fixed shares of layers, or of layers and heads ([`Evict::table`](locret_core::Evict::table)).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table: Option<BudgetTable>,
    /// Which positions attention uses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub positions: Option<Positions>,
}

/// The key of [`HeadAdvice`] in the metadata.
const ADVICE: &str = "advice";

/// One layer's retaining head. Matrices are row-major.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LayerHead {
    /// Rows of `fc1`: intermediate features, `d_R`; of a linear head its outputs.
    pub d_r: usize,
    /// `[d_r, features that are read]`; of a gate, queries and then keys.
    pub fc1: Vec<f32>,
    /// `[d_r]`, or nothing in a form without.
    pub fc1_bias: Vec<f32>,
    /// `[G, d_r]`, or nothing in a form without.
    pub fc2: Vec<f32>,
    /// `[G]`, or nothing in a form without.
    pub fc2_bias: Vec<f32>,
    /// What a gate has beside.
    pub gate: Option<Gate>,
}

/// What Fast KVzip's gate has beside its two projections, [`LayerHead::fc1`]: `f` features a head, `S` sinks, groups of
/// `g` query heads.
///
/// With `q` and `k` the RMS norms (ε 1e-6) of a token's projections, `z = k·q/√f + offset` and `s_j = base_j·q/√f`,
/// the score is the mean over the group of `1 / (1 + Σ_j exp(s_j - z))`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Gate {
    /// `[f]`
    pub query_norm: Vec<f32>,
    /// `[f]`
    pub key_norm: Vec<f32>,
    /// `[G, S, f]`
    pub base: Vec<f32>,
    /// `[G, g]`
    pub offset: Vec<f32>,
}

impl HeadWeights {
    /// Reads heads for `model`.
    ///
    /// `path` is a safetensors file, a PyTorch `.bin`, `.pt` or `.pth` (any container that `torch.save` writes; no
    /// code in it is run), the index of either kind's shards, or a folder that has one of these
    /// under its usual name. What it is, is found from its content; of what form the heads are, from the names of
    /// its tensors. A file of heads alone may
    /// have nothing else in it; in a whole checkpoint the other tensors are passed over. `d_R` is
    /// read from the file and can differ between layers.
    ///
    /// # Errors
    /// [`PolicyError::Io`]; [`PolicyError::File`] for a damaged file or one of another kind, or of heads of several
    /// forms; [`PolicyError::MissingKeys`], [`PolicyError::UnknownKeys`], [`PolicyError::Shape`],
    /// [`PolicyError::Dtype`], [`PolicyError::NotFinite`] for heads that don't fit.
    pub fn load(path: impl AsRef<Path>, model: &ModelSpec) -> Result<Self> {
        let path = path.as_ref();
        let mut form = None;
        let mut layers: Vec<(Sizes, BTreeMap<Part, Vec<f32>>)> = Vec::new();
        layers.resize_with(model.layers, Default::default);
        let mut others = BTreeSet::new();
        let mut metadata = BTreeMap::new();
        for file in container::files(path)? {
            let mut take = |name: &str, raw: Raw<'_>| {
                let Some((found, layer, part)) = layouts::place(name, model.layers) else {
                    others.insert(name.to_owned());
                    return Ok(());
                };
                if *form.get_or_insert(found) != found {
                    let message = format!("heads of several forms: {name} is of another one");
                    return Err(PolicyError::file(&file, message));
                }
                let (sizes, parts) = &mut layers[layer];
                sizes.fit(found, part, name, &raw.shape, model)?;
                parts.insert(part, raw.values(&file, name)?);
                Ok(())
            };
            match container::kind(&file)? {
                Kind::Safetensors => {
                    metadata.extend(container::read_safetensors(&file, &mut take)?);
                }
                Kind::Torch => container::read_torch(&file, &mut take)?,
                Kind::Index => return Err(PolicyError::file(&file, "an index within an index")),
            }
        }
        let form = form.unwrap_or_default();
        let whole = others.iter().any(|name| is_of_a_model(name));
        let unknown: Vec<String> = others
            .into_iter()
            .filter(|name| !whole || layouts::is_of_a_head(name))
            .collect();
        let missing: Vec<String> = (layers.iter().enumerate())
            .flat_map(|(layer, (_, parts))| {
                let due = layouts::parts(form).iter();
                due.filter(|part| !parts.contains_key(part))
                    .map(move |part| layouts::name(form, layer, *part))
            })
            .collect();
        let path = path.to_owned();
        if !unknown.is_empty() {
            return Err(PolicyError::UnknownKeys {
                path,
                keys: unknown,
            });
        }
        if !missing.is_empty() {
            return Err(PolicyError::MissingKeys {
                path,
                keys: missing,
            });
        }
        let layers = layers.into_iter();
        let heads = Self {
            form,
            layers: layers
                .map(|(_, parts)| layouts::assemble(form, parts, model))
                .collect(),
            metadata,
        };
        heads.validate(model)?;
        Ok(heads)
    }

    /// Checks the shapes against a model.
    ///
    /// # Errors
    /// [`PolicyError::Shape`].
    pub fn validate(&self, model: &ModelSpec) -> Result<()> {
        if self.layers.len() != model.layers {
            return Err(PolicyError::Shape {
                key: "retaining heads".into(),
                expected: format!("[{}] layers", model.layers),
                found: vec![self.layers.len()],
            });
        }
        for (layer, head) in self.layers.iter().enumerate() {
            layouts::check(self.form, layer, head, model)?;
        }
        Ok(())
    }

    /// What [`metadata`](Self::metadata) says about the use of these heads, under `advice`.
    ///
    /// # Errors
    /// [`PolicyError::Config`] for an entry that is not the JSON of [`HeadAdvice`].
    pub fn advice(&self) -> Result<HeadAdvice> {
        match self.metadata.get(ADVICE) {
            Some(text) => serde_json::from_str(text)
                .map_err(|e| PolicyError::Config(format!("the advice of these heads: {e}"))),
            None => Ok(HeadAdvice::default()),
        }
    }

    /// Puts advice into [`metadata`](Self::metadata).
    pub fn advise(&mut self, advice: &HeadAdvice) {
        // A struct of numbers and names always has a JSON form.
        if let Ok(text) = serde_json::to_string(advice) {
            self.metadata.insert(ADVICE.into(), text);
        }
    }

    /// Writes a safetensors file, with [`metadata`](Self::metadata). The file appears whole or not
    /// at all: it is written beside its place and renamed.
    ///
    /// # Errors
    /// [`PolicyError::Io`], [`PolicyError::File`]; [`PolicyError::Dtype`] for a type other than
    /// [`DType::F32`], [`DType::F16`] and [`DType::BF16`]; [`PolicyError::NotFinite`] for a weight
    /// that `dtype` cannot hold; [`PolicyError::Shape`] for lengths that are not those of a head of this form.
    pub fn save(&self, path: impl AsRef<Path>, dtype: DType) -> Result<()> {
        let mut tensors: Vec<Named> = Vec::new();
        for (layer, head) in self.layers.iter().enumerate() {
            tensors.extend(layouts::tensors(self.form, layer, head)?);
        }
        container::write(path.as_ref(), &tensors, &self.metadata, dtype)
    }

    /// Weights over all layers.
    pub fn parameters(&self) -> usize {
        self.layers.iter().map(LayerHead::parameters).sum()
    }
}

impl LayerHead {
    fn parameters(&self) -> usize {
        self.lists().map(<[f32]>::len).sum()
    }

    /// All its weights, in a fixed order.
    pub(super) fn lists(&self) -> impl Iterator<Item = &[f32]> {
        let own = [&self.fc1, &self.fc2, &self.fc1_bias, &self.fc2_bias];
        let gate = self.gate.iter();
        let gate = gate.flat_map(|g| [&g.query_norm, &g.key_norm, &g.base, &g.offset]);
        own.into_iter().chain(gate).map(Vec::as_slice)
    }
}

/// Whether a tensor can only be a language model's own.
fn is_of_a_model(name: &str) -> bool {
    name.ends_with("embed_tokens.weight")
        || [".q_proj.", ".qkv_proj.", ".o_proj.", ".mlp."]
            .iter()
            .any(|part| name.contains(part))
}
