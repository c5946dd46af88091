//! Weight matrices, where they are used.

use crate::{Loader, Result};
use burn::tensor::{DType, FloatDType, Int, Tensor};
use locret_core::{from_f32, into_f32};

/// A projection without bias.
#[derive(Debug)]
pub(crate) struct Linear {
    /// `[in, out]`, in the type that weights are held in.
    weight: Tensor<2>,
}

/// A tensor as 32-bit values; itself if it is.
fn full<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if x.dtype() == DType::F32 {
        x
    } else {
        x.cast(FloatDType::F32)
    }
}

impl Linear {
    /// The matrices `names`, each `[rows, input]`, one below the other.
    pub(crate) fn load(
        loader: &Loader<'_>,
        names: &[(String, usize)],
        input: usize,
    ) -> Result<Self> {
        let mut parts = Vec::with_capacity(names.len());
        for (name, rows) in names {
            let part = loader.load::<2>(name, [*rows, input])?;
            // Transposed in memory once, so that no product has to walk it crosswise.
            parts.push(part.transpose().mul_scalar(1.0));
        }
        let weight = match parts.len() {
            1 => parts.remove(0),
            _ => Tensor::cat(parts, 1),
        };
        Ok(Self { weight })
    }

    /// `[tokens, in]` to `[tokens, out]`, in host memory.
    pub(crate) fn host(&self, x: Vec<f32>, tokens: usize) -> Result<Vec<f32>> {
        let features = x.len() / tokens;
        let x = from_f32(x, [tokens, features], &self.weight.device());
        Ok(into_f32(self.tensor(x)?)?)
    }

    /// `[tokens, in]` to `[tokens, out]`.
    pub(crate) fn tensor(&self, x: Tensor<2>) -> Result<Tensor<2>> {
        Ok(x.matmul(full(self.weight.clone())))
    }
}

/// The token embedding, which may be the head as well.
#[derive(Debug)]
pub(crate) struct Embedding {
    /// `[vocab, hidden]`
    weight: Tensor<2>,
    /// `[hidden, vocab]`, where the embedding is the head.
    head: Option<Linear>,
}

impl Embedding {
    pub(crate) fn load(
        loader: &Loader<'_>,
        name: &str,
        shape: [usize; 2],
        tied: bool,
    ) -> Result<Self> {
        let weight = loader.load::<2>(name, shape)?;
        let head = tied.then(|| Linear {
            weight: weight.clone().transpose().mul_scalar(1.0),
        });
        Ok(Self { weight, head })
    }

    /// `[tokens, hidden]`
    pub(crate) fn rows(&self, ids: Tensor<1, Int>) -> Tensor<2> {
        full(self.weight.clone().select(0, ids))
    }

    pub(crate) fn head(&self) -> Option<&Linear> {
        self.head.as_ref()
    }
}
