//! From a file or folder to a model that can read.

use crate::{
    ChatTemplate, Decoder, DecoderConfig, Family, Gguf, GgufWeights, Layout, Loader, ModelConfig,
    ModelError, Result, SafetensorsDir, Tokenizer, WeightDtype, Weights,
};
use burn::tensor::Device;
use locret_core::{Activations, CausalLm, Kernels};
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

/// Loads a model of a family that this crate knows: Llama or Phi-3.
///
/// `path` is a GGUF file, or a folder with `config.json` and safetensors.
///
/// # Errors
/// Whatever is wrong with the files; [`ModelError::Config`] for a family, an activation, biases or
/// a sliding window that the decoder does not have.
pub fn load_model(
    path: impl AsRef<Path>,
    options: &LoadOptions,
    device: &Device,
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
    let compute = options.kernels.with(device, options.activations);
    let loader = Loader::new(&*weights, options.weights, &compute);
    let model = Decoder::load(&decoder, &loader)?;
    loader.finish()?;
    Ok(LoadedModel {
        model: Arc::new(model),
        config,
        files,
    })
}

/// What the decoder needs, if it can be this model.
fn decoder_config(config: &ModelConfig, path: &Path) -> Result<DecoderConfig> {
    let refuse = |what: &str, expected: &str, found: String| {
        Err(ModelError::config(path, what, expected, found))
    };
    let layout = match &config.family {
        Family::Llama => Layout::Separate,
        Family::Phi3 => Layout::Fused,
        Family::Other(name) => {
            return refuse(
                "model type",
                "llama or phi3 (or an adapter of yours)",
                name.clone(),
            );
        }
    };
    if config.activation != "silu" {
        return refuse("activation", "silu", config.activation.clone());
    }
    if config.attention_bias || config.mlp_bias {
        return refuse("biases", "none in this family", "some".into());
    }
    if let Some(window) = config.binding_window() {
        return refuse(
            "sliding_window",
            &format!(
                "none, or at least the context of {} tokens: a cache that evicts by a policy \
                 does not imitate windowed attention",
                config.max_positions
            ),
            window.to_string(),
        );
    }
    Ok(DecoderConfig {
        spec: config.spec(),
        intermediate: config.intermediate,
        norm_epsilon: config.rms_norm_eps as f32,
        tied: config.tied_embeddings,
        layout,
    })
}
