//! Weight matrices, where they are used: for the CPU kernels in the type that they are held in,
//! packed blocks of a GGUF file included; as tensors elsewhere.

use crate::{Activations, Encoding, Loader, ModelError, Result, WeightDtype};
use burn::tensor::{DType, FloatDType, Int, Tensor};
use locret_core::{
    from_f32, ids_tensor, into_f32,
    kernels::linear::{Format, Weight, matmul_between, matmul_rounded},
};

/// Values that are checked at a time where a matrix stays packed.
const BAND: usize = 1 << 20;

/// A projection without bias.
#[derive(Debug)]
pub(crate) enum Linear {
    /// In host memory.
    Host {
        /// Matrices `[rows, in]`, one below the other.
        weights: Vec<Weight<'static>>,
        /// How few tokens meet packed ones.
        activations: Activations,
    },
    /// `[in, out]`
    Tensor(Tensor<2>),
}

/// A tensor as 32-bit values; itself if it is.
fn full<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if x.dtype() == DType::F32 {
        x
    } else {
        x.cast(FloatDType::F32)
    }
}

/// One matrix for the CPU kernels.
fn host_weight(
    loader: &Loader<'_>,
    name: &str,
    [rows, columns]: [usize; 2],
) -> Result<Weight<'static>> {
    let source = loader.weights();
    let encoding = source.info(name).map(|info| info.encoding);
    let packed = match (loader.dtype(), encoding) {
        (WeightDtype::File, Some(Encoding::Q8_0)) => Some(Format::Q8_0),
        (WeightDtype::File, Some(Encoding::Q4_0)) => Some(Format::Q4_0),
        (WeightDtype::File, Some(Encoding::Q4_1)) => Some(Format::Q4_1),
        _ => None,
    };
    let (format, bytes) = match packed {
        Some(format) => {
            loader.check(name, &[rows, columns])?;
            let band = (BAND / columns.max(1)).max(1);
            for start in (0..rows).step_by(band) {
                // Scales that are not finite are found and named.
                source.tensor_rows_f32(name, start..(start + band).min(rows))?;
            }
            (format, loader.packed(name, &[rows, columns])?)
        }
        None => {
            let (dtype, bytes) = loader.bytes(name, &[rows, columns])?;
            let format = match dtype {
                DType::F16 => Format::F16,
                DType::BF16 => Format::Bf16,
                _ => Format::F32,
            };
            (format, bytes)
        }
    };
    Weight::shared(format, rows, columns, bytes)
        .map_err(|e| ModelError::format(source.path(), name, "whole blocks", e))
}

impl Linear {
    /// The matrices `names`, each `[rows, input]`, one below the other.
    pub(crate) fn load(
        loader: &Loader<'_>,
        names: &[(String, usize)],
        input: usize,
        host: bool,
    ) -> Result<Self> {
        if host {
            let parts = names
                .iter()
                .map(|(name, rows)| host_weight(loader, name, [*rows, input]));
            return Ok(Self::Host {
                weights: parts.collect::<Result<_>>()?,
                activations: loader.activations(),
            });
        }
        let mut parts = Vec::with_capacity(names.len());
        for (name, rows) in names {
            let part = loader.load::<2>(name, [*rows, input])?;
            // Transposed in memory once, so that no product has to walk it crosswise.
            parts.push(part.transpose().mul_scalar(1.0));
        }
        Ok(Self::Tensor(match parts.len() {
            1 => parts.remove(0),
            _ => Tensor::cat(parts, 1),
        }))
    }

    /// `[tokens, in]` to `[tokens, out]` in host memory; the outputs side by side in as many parts
    /// as are given.
    pub(crate) fn host(&self, x: &[f32], tokens: usize, outs: &mut [&mut [f32]]) -> Result<()> {
        match self {
            Self::Host {
                weights,
                activations,
            } => {
                let weights: Vec<&Weight<'_>> = weights.iter().collect();
                match activations {
                    Activations::Exact => matmul_between(&[x], &weights, outs),
                    Activations::Bytes => matmul_rounded(&[x], &weights, outs),
                }
            }
            Self::Tensor(weight) => {
                let x = from_f32(x.to_vec(), [tokens, weight.dims()[0]], &weight.device());
                let y = into_f32(self.tensor(x)?)?;
                let rows = y.len() / tokens.max(1);
                let mut first = 0;
                for out in outs {
                    let width = out.len() / tokens.max(1);
                    let parts = y
                        .chunks_exact(rows.max(1))
                        .map(|y| &y[first..first + width]);
                    for (out, part) in out.chunks_exact_mut(width.max(1)).zip(parts) {
                        out.copy_from_slice(part);
                    }
                    first += width;
                }
            }
        }
        Ok(())
    }

    /// The numbers that the matrix stands for, `[out, in]`, row-major.
    pub(crate) fn values(&self) -> Result<Vec<f32>> {
        match self {
            Self::Host { weights, .. } => {
                let numbers = weights.iter().map(|w| w.rows() * w.columns()).sum();
                let mut out = vec![0.0; numbers];
                let mut rest = &mut out[..];
                for weight in weights {
                    for row in 0..weight.rows() {
                        let (to, next) = rest.split_at_mut(weight.columns());
                        weight.row(row, to);
                        rest = next;
                    }
                }
                Ok(out)
            }
            Self::Tensor(weight) => Ok(into_f32(full(weight.clone()).transpose())?),
        }
    }

    /// `[tokens, in]` to `[tokens, out]`.
    pub(crate) fn tensor(&self, x: Tensor<2>) -> Result<Tensor<2>> {
        match self {
            Self::Host { weights, .. } => {
                let (tokens, device) = (x.dims()[0], x.device());
                let rows: usize = weights.iter().map(Weight::rows).sum();
                let mut out = vec![0.0; tokens * rows];
                self.host(&into_f32(x)?, tokens, &mut [&mut out])?;
                Ok(from_f32(out, [tokens, rows], &device))
            }
            Self::Tensor(weight) => Ok(x.matmul(full(weight.clone()))),
        }
    }
}

/// The token embedding, which may be the head as well.
#[derive(Debug)]
pub(crate) enum Embedding {
    /// `[vocab, hidden]`, in host memory; the head reads the same memory.
    Host {
        /// One matrix.
        table: Linear,
        /// Whether it is the head.
        tied: bool,
    },
    /// As tensors.
    Tensor {
        /// `[vocab, hidden]`
        table: Tensor<2>,
        /// `[hidden, vocab]`, where the embedding is the head.
        head: Option<Linear>,
    },
}

impl Embedding {
    pub(crate) fn load(
        loader: &Loader<'_>,
        name: &str,
        [vocab, hidden]: [usize; 2],
        tied: bool,
        host: bool,
    ) -> Result<Self> {
        if host {
            let table = Linear::load(loader, &[(name.to_owned(), vocab)], hidden, true)?;
            return Ok(Self::Host { table, tied });
        }
        let table = loader.load::<2>(name, [vocab, hidden])?;
        let head = tied.then(|| Linear::Tensor(table.clone().transpose().mul_scalar(1.0)));
        Ok(Self::Tensor { table, head })
    }

    /// `[tokens, hidden]`, in host memory.
    pub(crate) fn host_rows(&self, ids: &[u32]) -> Result<Vec<f32>> {
        match self {
            Self::Host {
                table: Linear::Host { weights, .. },
                ..
            } if weights.len() == 1 => {
                let columns = weights[0].columns();
                let mut out = vec![0.0; ids.len() * columns];
                for (id, row) in ids.iter().zip(out.chunks_exact_mut(columns)) {
                    weights[0].row(*id as usize, row);
                }
                Ok(out)
            }
            _ => Ok(into_f32(self.rows(ids)?)?),
        }
    }

    /// `[tokens, hidden]`.
    pub(crate) fn rows(&self, ids: &[u32]) -> Result<Tensor<2>> {
        match self {
            Self::Tensor { table, .. } => {
                let ids: Tensor<1, Int> = ids_tensor(ids, &table.device());
                Ok(full(table.clone().select(0, ids)))
            }
            Self::Host { .. } => Err(ModelError::Core(locret_core::Error::NotSupported {
                operation: "rows as a tensor",
                implementer: "an embedding in host memory".into(),
            })),
        }
    }

    pub(crate) fn head(&self) -> Option<&Linear> {
        match self {
            Self::Host { table, tied } => tied.then_some(table),
            Self::Tensor { head, .. } => head.as_ref(),
        }
    }
}
