//! Directions of queries in files.

use super::QFilters;
use crate::{PolicyError, Result};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use std::{collections::HashMap, fs, path::Path};

/// The tensor's name, as the authors publish it.
const TENSOR: &str = "q_filters";
/// Metadata of files whose directions point to the queries.
const POINTS: (&str, &str) = ("points", "to queries");

impl QFilters {
    /// From a safetensors file with the tensor `q_filters`, `[layers, kv_heads, head_dim]` in 32 or 16 bits.
    /// Without the metadata that [`save`](Self::save) writes it is one of the authors', whose directions point
    /// away from the queries: they are turned around.
    ///
    /// # Errors
    /// [`PolicyError::Io`], [`PolicyError::File`], [`PolicyError::MissingKeys`], [`PolicyError::Shape`],
    /// [`PolicyError::Dtype`], [`PolicyError::NotFinite`].
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = fs::read(path).map_err(PolicyError::io(path))?;
        let wrong = |e: safetensors::SafeTensorError| PolicyError::file(path, e);
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(wrong)?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let ours = metadata.get(POINTS.0).map(String::as_str) == Some(POINTS.1);
        let all = SafeTensors::deserialize(&bytes).map_err(wrong)?;
        let tensor = all.tensor(TENSOR).map_err(|_| PolicyError::MissingKeys {
            path: path.to_owned(),
            keys: vec![TENSOR.into()],
        })?;
        let shape: [usize; 3] = tensor.shape().try_into().map_err(|_| PolicyError::Shape {
            key: TENSOR.into(),
            expected: "[layers, kv_heads, head_dim]".into(),
            found: tensor.shape().to_vec(),
        })?;
        let (pairs, quads) = (tensor.data().chunks_exact(2), tensor.data().chunks_exact(4));
        let mut filters: Vec<f32> = match tensor.dtype() {
            Dtype::F32 => quads
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect(),
            Dtype::F16 => pairs
                .map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32())
                .collect(),
            Dtype::BF16 => pairs
                .map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32())
                .collect(),
            other => {
                return Err(PolicyError::Dtype {
                    key: TENSOR.into(),
                    found: format!("{other:?}"),
                });
            }
        };
        if let Some(index) = filters.iter().position(|x| !x.is_finite()) {
            return Err(PolicyError::NotFinite {
                key: TENSOR.into(),
                index,
            });
        }
        if !ours {
            filters.iter_mut().for_each(|x| *x = -*x);
        }
        Ok(Self::new(filters, shape)?)
    }

    /// Writes them as a safetensors file, with metadata that say that they point to the queries.
    ///
    /// # Errors
    /// [`PolicyError::Io`], [`PolicyError::File`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let bytes: Vec<u8> = self.filters.iter().flat_map(|x| x.to_le_bytes()).collect();
        let wrong = |e: safetensors::SafeTensorError| PolicyError::file(path, e);
        let view = TensorView::new(Dtype::F32, self.shape.to_vec(), &bytes).map_err(wrong)?;
        let metadata = HashMap::from([(POINTS.0.to_owned(), POINTS.1.to_owned())]);
        let file = safetensors::serialize([(TENSOR, view)], Some(metadata)).map_err(wrong)?;
        fs::write(path, file).map_err(PolicyError::io(path))
    }
}
