//! What a language model has to offer.

use crate::{Compute, ModelSpec, Pass, Result, Rows};
use std::{fmt::Debug, sync::Arc};

/// A decoder-only language model.
///
/// [`hidden`](Self::hidden) and [`logits`](Self::logits) are apart, so that reading a prompt
/// computes logits for its last token only.
///
/// An adapter never sees a position, a mask, a policy, or where one sequence ends and the next begins:
/// it projects hidden states to q, k and v, calls [`Pass::attend`] with the layer's index, and goes on
/// with what comes back.
pub trait CausalLm: Debug + Send + Sync {
    /// The model's dimensions.
    fn spec(&self) -> &ModelSpec;

    /// Where the weights lie, and what computes with them.
    fn compute(&self) -> &Arc<dyn Compute>;

    /// Hidden states `[tokens, hidden]` of new tokens, after the last normalisation.
    ///
    /// Calls [`Pass::attend`] once for every layer, from 0 on.
    ///
    /// # Errors
    /// The pass's; an adapter's own as [`Error::Model`](crate::Error::Model).
    fn hidden(&self, ids: &[u32], pass: &mut Pass<'_>) -> Result<Rows>;

    /// Logits `[tokens, vocab]` of hidden states `[tokens, hidden]`.
    ///
    /// # Errors
    /// An adapter's own as [`Error::Model`](crate::Error::Model).
    fn logits(&self, hidden: Rows) -> Result<Rows>;

    /// The matrix that makes a layer's q, k and v, side by side, of the input that the adapter hands
    /// along ([`Qkv::made_from`](crate::Qkv::made_from)): `[(heads + 2 * kv_heads) * head_dim, hidden]`,
    /// row-major, and nothing is added or done to them afterwards. Policies that look at q, k and v
    /// through a matrix of their own then become cheaper.
    ///
    /// `None`, the default, where there is no such matrix (biases, normalised heads), or where the
    /// adapter hands no input along.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for a layer that the model does not have,
    /// [`Error::Device`](crate::Error::Device).
    fn qkv_weight(&self, _layer: usize) -> Result<Option<Vec<f32>>> {
        Ok(None)
    }

    /// The matrix that a layer applies to what [`Pass::attend`] returns, before it adds that to the hidden
    /// state: `[hidden, heads * head_dim]`, row-major (a bias apart). Labels that weigh what a value does to
    /// the hidden state (KVzip+, arXiv 2601.07891) look at it.
    ///
    /// `None`, the default, where there is no such matrix, or the adapter does not say.
    ///
    /// # Errors
    /// As [`qkv_weight`](Self::qkv_weight).
    fn output_weight(&self, _layer: usize) -> Result<Option<Vec<f32>>> {
        Ok(None)
    }

    /// What tells this model from any other, of the same shape too: for instance a hash of its weights as
    /// they are computed with. A saved [`Session`](crate::Session) is taken up by the same model alone.
    ///
    /// `None`, the default, where the adapter does not say: then the shape alone is compared
    /// ([`spec`](Self::spec)).
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device); an adapter's own as
    /// [`Error::Model`](crate::Error::Model).
    fn fingerprint(&self) -> Result<Option<String>> {
        Ok(None)
    }
}
