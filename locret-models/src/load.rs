//! From a file or folder to a model that can read.

use crate::{
    ChatTemplate, Decoder, DecoderConfig, Family, Gguf, GgufWeights, Layout, Loader, ModelConfig,
    ModelError, Result, SafetensorsDir, Tokenizer, WeightDtype, Weights, decoder::Extras,
};
use burn::tensor::Device;
use locret_core::{Activations, CausalLm, Compute, Kernels};
use std::{path::Path, sync::Arc};

/// How a model is loaded.
///
/// ```
/// use locret_models::{LoadOptions, WeightDtype};
///
/// let options = LoadOptions::new().weights(WeightDtype::BF16);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
#[must_use]
pub struct LoadOptions {
    /// The type that weights are held in.
    pub weights: WeightDtype,
    /// How a decoded token meets packed weights.
    pub activations: Activations,
    /// Which implementation computes.
    pub kernels: Kernels,
    /// LongRoPE with its long factors at every length, as the authors of Locret run Phi-3.
    pub always_long: bool,
}

impl LoadOptions {
    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// The same with weights held in this type.
    pub fn weights(mut self, weights: WeightDtype) -> Self {
        self.weights = weights;
        self
    }

    /// The same with decoded tokens that meet packed weights like this.
    pub fn activations(mut self, activations: Activations) -> Self {
        self.activations = activations;
        self
    }

    /// The same, computed by this implementation.
    pub fn kernels(mut self, kernels: Kernels) -> Self {
        self.kernels = kernels;
        self
    }

    /// The same, with LongRoPE's long factors at every length or not.
    pub fn always_long(mut self, always_long: bool) -> Self {
        self.always_long = always_long;
        self
    }
}

/// A model, and what its files say of it.
#[derive(Debug, Clone)]
pub struct LoadedModel {
    /// The model.
    pub model: Arc<dyn CausalLm>,
    /// Its hyper-parameters.
    pub config: ModelConfig,
    /// Where its files are.
    pub files: ModelFiles,
}

/// The files of a model.
#[derive(Debug, Clone)]
pub enum ModelFiles {
    /// A GGUF file, which holds everything.
    Gguf(Arc<Gguf>),
    /// A folder as Hugging Face repositories are laid out.
    Folder(std::path::PathBuf),
}

impl ModelFiles {
    /// Opens a GGUF file, or a folder.
    ///
    /// # Errors
    /// [`ModelError::NotFound`], [`ModelError::Format`] and their kind for damaged files.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if path.is_dir() {
            Ok(Self::Folder(path.to_path_buf()))
        } else {
            Ok(Self::Gguf(Arc::new(Gguf::open(path)?)))
        }
    }

    /// The hyper-parameters that the files name.
    ///
    /// # Errors
    /// [`ModelError::Config`] and its kind.
    pub fn config(&self) -> Result<ModelConfig> {
        match self {
            Self::Gguf(gguf) => ModelConfig::from_gguf(gguf),
            Self::Folder(dir) => ModelConfig::from_dir(dir),
        }
    }

    /// The file or folder.
    pub fn path(&self) -> &Path {
        match self {
            Self::Gguf(gguf) => gguf.path(),
            Self::Folder(dir) => dir,
        }
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] if the files have none, or a damaged one.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        match self {
            Self::Gguf(gguf) => Tokenizer::from_gguf(gguf),
            Self::Folder(dir) => Tokenizer::from_dir(dir),
        }
    }

    /// The chat template, if there is one.
    ///
    /// # Errors
    /// [`ModelError::ChatTemplate`] for a damaged one.
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>> {
        match self {
            Self::Gguf(gguf) => ChatTemplate::from_gguf(gguf),
            Self::Folder(dir) => ChatTemplate::from_dir(dir),
        }
    }

    /// The weights under the names of transformers.
    ///
    /// # Errors
    /// [`ModelError::Format`] and its kind.
    pub fn weights(&self) -> Result<Box<dyn Weights>> {
        Ok(match self {
            Self::Gguf(gguf) => Box::new(GgufWeights::new(gguf.clone())?),
            Self::Folder(dir) => Box::new(SafetensorsDir::open(dir)?),
        })
    }
}

/// Loads a model of a family that this crate knows: Llama, Mistral, Qwen2, Qwen3 or Phi-3.
///
/// `path` is a GGUF file, or a folder with `config.json` and safetensors.
///
/// A model with a sliding window runs as far as the window goes: a cache that evicts by a policy does not
/// imitate it. Tensors that belong to none of the model's layers (further heads, the layers of another
/// medium) are left alone.
///
/// # Errors
/// Whatever is wrong with the files; [`ModelError::Config`] for a family or an activation that the
/// decoder does not have; [`ModelError::UnusedTensors`] for tensors of its layers that it does not know.
pub fn load_model(
    path: impl AsRef<Path>,
    options: &LoadOptions,
    device: &Device,
) -> Result<LoadedModel> {
    let compute = options.kernels.with(device, options.activations);
    load_model_with(path, options, &compute)
}

/// As [`load_model`], computed by `compute`, whatever `options` say of kernels and activations.
///
/// # Errors
/// As [`load_model`].
pub fn load_model_with(
    path: impl AsRef<Path>,
    options: &LoadOptions,
    compute: &Arc<dyn Compute>,
) -> Result<LoadedModel> {
    let files = ModelFiles::open(path)?;
    let config = files.config()?;
    let config = if options.always_long {
        config.always_long()
    } else {
        config
    };
    let decoder = decoder_config(&config, files.path())?;
    let weights = files.weights()?;
    let loader = Loader::new(&*weights, options.weights, compute);
    check_extras(&config, Extras::of(&loader, decoder.layout), files.path())?;
    let model = Decoder::load(&decoder, &loader)?;
    for name in loader.unused() {
        if !is_of_decoder(&name, config.layers) {
            loader.skip(&name);
        }
    }
    loader.finish()?;
    Ok(LoadedModel {
        model: Arc::new(model),
        config,
        files,
    })
}

/// Whether the settings and the tensors speak of the same biases and norms.
fn check_extras(config: &ModelConfig, found: Extras, path: &Path) -> Result<()> {
    for (what, said, found) in [
        (
            "biases of q, k and v",
            config.attention_bias,
            found.qkv_bias,
        ),
        (
            "bias of attention's output",
            config.output_bias,
            found.output_bias,
        ),
        ("biases of the MLP", config.mlp_bias, found.mlp_bias),
        (
            "norms of the heads of q and k",
            config.head_norms,
            found.head_norms,
        ),
    ] {
        if said != found {
            let count = |there: bool| if there { "some" } else { "none" };
            let expected = format!("{} among the tensors, as the settings have it", count(said));
            return Err(ModelError::config(path, what, expected, count(found)));
        }
    }
    Ok(())
}

/// What the decoder needs, if it can be this model.
fn decoder_config(config: &ModelConfig, path: &Path) -> Result<DecoderConfig> {
    let refuse = |what: &str, expected: &str, found: String| {
        Err(ModelError::config(path, what, expected, found))
    };
    let layout = match &config.family {
        Family::Llama | Family::Mistral | Family::Qwen2 | Family::Qwen3 => Layout::Separate,
        Family::Phi3 => Layout::Fused,
        Family::Other(name) => {
            return refuse(
                "model type",
                "llama, mistral, qwen2, qwen3 or phi3 (or an adapter of yours)",
                name.clone(),
            );
        }
    };
    if config.activation != "silu" {
        return refuse("activation", "silu", config.activation.clone());
    }
    Ok(DecoderConfig {
        spec: config.spec(),
        intermediate: config.intermediate,
        norm_epsilon: config.rms_norm_eps as f32,
        tied: config.tied_embeddings,
        layout,
    })
}

/// Whether a tensor would change what the decoder computes, if it knew it.
fn is_of_decoder(name: &str, layers: usize) -> bool {
    // Constants that old programs saved along with the weights.
    const CONSTANTS: [&str; 3] = [".inv_freq", ".masked_bias", ".attn_rot_embd.weight"];
    if CONSTANTS.iter().any(|constant| name.ends_with(constant)) {
        return false;
    }
    // The second is what a GGUF file calls a layer, for tensors without a name of transformers'.
    for prefix in ["model.layers.", "blk."] {
        if let Some(rest) = name.strip_prefix(prefix) {
            let layer = rest.split('.').next().and_then(|n| n.parse::<usize>().ok());
            // Layers behind the last predict several tokens at once.
            return layer.is_none_or(|layer| layer < layers);
        }
    }
    [
        "model.embed_tokens.",
        "model.norm.",
        "lm_head.",
        "output.",
        "output_norm.",
        "token_embd.",
    ]
    .iter()
    .any(|prefix| name.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::is_of_decoder;

    #[test]
    fn tensors_that_no_model_uses() {
        for harmless in [
            "model.layers.0.self_attn.rotary_emb.inv_freq",
            "model.layers.2.mlp.gate_proj.weight",
            "vision_tower.layers.0.weight",
            "score.weight",
            "v_head.summary.bias",
            "blk.2.nextn.eh_proj.weight",
        ] {
            assert!(!is_of_decoder(harmless, 2), "{harmless}");
        }
        for harmful in [
            "model.layers.1.self_attn.q_norm.weight",
            "model.layers.0.self_attn.q_proj.bias",
            "model.layers.0.mlp.gate_proj.weight_scale",
            "lm_head.bias",
            "blk.0.attn_q.scale",
        ] {
            assert!(is_of_decoder(harmful, 2), "{harmful}");
        }
    }
}
