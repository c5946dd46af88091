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
pub trait CausalLm: Debug + Send + Sync {
    /// The model's dimensions.
    fn spec(&self) -> &ModelSpec;

    /// Where the weights lie.
    fn device(&self) -> &Device;

    /// Hidden states `[tokens, hidden]` of new tokens, after the last normalisation.
    ///
    /// Calls [`SequenceCache::attend`] once for every layer, from 0 on.
    ///
    /// # Errors
    /// The cache's; an adapter's own as [`Error::Model`](crate::Error::Model).
    fn hidden(&self, ids: &[u32], cache: &mut SequenceCache) -> Result<Tensor<2>>;

    /// Logits `[tokens, vocab]` of hidden states `[tokens, hidden]`.
    ///
    /// # Errors
    /// An adapter's own as [`Error::Model`](crate::Error::Model).
    fn logits(&self, hidden: Tensor<2>) -> Result<Tensor<2>>;
}
