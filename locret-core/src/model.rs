//! What a language model has to offer.

use crate::{ModelSpec, Result, SequenceCache};
use burn::tensor::{Device, Tensor};
use std::fmt::Debug;

/// A decoder-only language model over a [`SequenceCache`].
///
/// [`hidden`](Self::hidden) and [`logits`](Self::logits) are apart, so that reading a prompt
/// computes logits for its last token only.
///
/// An adapter never sees a position, a mask or a policy: it projects hidden states to q, k and v,
/// calls [`SequenceCache::attend`] with the layer's index, and goes on with what comes back.
///
/// An adapter whose q, k and v are plain products can say so with [`qkv_weight`](Self::qkv_weight) and
/// call [`SequenceCache::attend_from`] instead: policies that look at q, k and v through a matrix of
/// their own then become cheaper.
pub trait CausalLm: Debug + Send + Sync {
    /// The model's dimensions.
    fn spec(&self) -> &ModelSpec;

    /// Where the weights lie.
    fn device(&self) -> &Device;

    /// Hidden states `[tokens, hidden]` of new tokens, after the last normalisation.
    ///
    /// Calls [`SequenceCache::attend`] (or [`attend_from`](SequenceCache::attend_from)) once for every
    /// layer, from 0 on.
    ///
    /// # Errors
    /// The cache's; an adapter's own as [`Error::Model`](crate::Error::Model).
    fn hidden(&self, ids: &[u32], cache: &mut SequenceCache) -> Result<Tensor<2>>;

    /// Logits `[tokens, vocab]` of hidden states `[tokens, hidden]`.
    ///
    /// # Errors
    /// An adapter's own as [`Error::Model`](crate::Error::Model).
    fn logits(&self, hidden: Tensor<2>) -> Result<Tensor<2>>;

    /// The matrix that makes a layer's q, k and v, side by side, of the input that the adapter gives
    /// [`SequenceCache::attend_from`]: `[(heads + 2 * kv_heads) * head_dim, hidden]`, row-major, and
    /// nothing is added or done to them afterwards.
    ///
    /// `None`, the default, where there is no such matrix (biases, normalised heads), or where the
    /// adapter calls [`SequenceCache::attend`].
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for a layer that the model does not have,
    /// [`Error::Device`](crate::Error::Device).
    fn qkv_weight(&self, _layer: usize) -> Result<Option<Vec<f32>>> {
        Ok(None)
    }
}
