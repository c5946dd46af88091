//! Weights on the device, as a file has them.

use crate::{
    kernels::product::{self, EIGHT, FEW_UNITS, Kind, LANES, TILE, TILE_UNITS},
    matrix_units,
    place::{Place, made},
    store::{elementwise, spread},
};
use burn::tensor::{DType as TensorType, Tensor};
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;
use locret_core::{DType, Error, Matrix, Result, Rows, Weight, check_product, divided, no_row};
use std::sync::Arc;

/// Rows that are few enough to meet weights one by one.
pub(crate) const FEW: usize = 8;

/// Rows that are decoded at once where all are asked for.
const DECODED: usize = 4096;

/// Matrices one below the other, each in its own type.
#[derive(Debug)]
pub(crate) struct CubeMatrix {
    place: Arc<Place>,
    parts: Vec<Part>,
    columns: usize,
}

#[derive(Debug)]
struct Part {
    kind: Kind,
    rows: usize,
    words: CubeTensor,
    scales: CubeTensor,
}

/// How kernels read a type, if they do.
pub(crate) fn kind(dtype: DType) -> Option<Kind> {
    Some(match dtype {
        DType::F32 => Kind::F32,
        DType::F16 => Kind::F16,
        DType::BF16 => Kind::BF16,
        DType::Q8_0 => Kind::Q8_0,
        DType::Q4_0 => Kind::Q4_0,
        DType::Q4_1 => Kind::Q4_1,
        DType::Q4_K => Kind::Q4K,
        DType::Q5_K => Kind::Q5K,
        DType::Q6_K => Kind::Q6K,
        _ => return None,
    })
}

/// Words and scales of a matrix, from its bytes.
fn packed(kind: Kind, weight: &Weight) -> [Vec<u32>; 2] {
    let (bytes, dtype) = (&weight.bytes[..], weight.dtype);
    let words = |bytes: &[u8]| -> Vec<u32> {
        let word = |four: &[u8]| {
            let mut word = [0; 4];
            word[..four.len()].copy_from_slice(four);
            u32::from_le_bytes(word)
        };
        bytes.chunks(4).map(word).collect()
    };
    // Scales lie in front of a block's codes, or behind them.
    let apart = |scale: usize, behind: bool| {
        let (mut codes, mut scales) = (Vec::new(), Vec::new());
        for block in bytes.chunks(dtype.block_bytes()) {
            let at = if behind { block.len() - scale } else { scale };
            let (left, right) = block.split_at(at);
            let (own, rest) = if behind { (right, left) } else { (left, right) };
            scales.extend_from_slice(own);
            codes.extend_from_slice(rest);
        }
        [words(&codes), words(&scales)]
    };
    match kind {
        Kind::F32 | Kind::F16 | Kind::BF16 => {
            let number = dtype.block_bytes();
            let row = weight.columns * number;
            let mut padded = Vec::with_capacity(weight.rows * (row + EIGHT * number));
            for row in bytes.chunks(row) {
                padded.extend_from_slice(row);
                padded.resize(padded.len().next_multiple_of(EIGHT * number), 0);
            }
            [words(&padded), Vec::new()]
        }
        Kind::Q8_0 | Kind::Q4_0 => apart(2, false),
        Kind::Q4_1 => apart(4, false),
        Kind::Q6K => apart(2, true),
        Kind::Q4K | Kind::Q5K => [words(bytes), Vec::new()],
    }
}

impl CubeMatrix {
    /// Of parts whose types all have a [`kind`], and whose columns were found to be the same.
    pub(crate) fn new(place: &Arc<Place>, parts: &[Weight]) -> Result<Self> {
        let part = |weight: &Weight| {
            let Some(kind) = kind(weight.dtype) else {
                return Err(Error::NotSupported {
                    operation: "products with weights of this type",
                    implementer: format!("GPU kernels ({})", weight.dtype),
                });
            };
            let row = weight.dtype.bytes(weight.columns);
            if row.and_then(|row| row.checked_mul(weight.rows)) != Some(weight.bytes.len()) {
                let expected = format!("[{}, {}] of {}", weight.rows, weight.columns, weight.dtype);
                let found = format!("{} bytes", weight.bytes.len());
                return Err(Error::shape("a matrix of weights", expected, found));
            }
            let [words, scales] = packed(kind, weight).map(|words| place.indices(&words));
            Ok(Part {
                kind,
                rows: weight.rows,
                words,
                scales,
            })
        };
        let columns = parts.first().map_or(0, |part| part.columns);
        if columns == 0 {
            return Err(Error::shape("columns of a matrix", "at least one", 0));
        }
        if let Some(other) = parts.iter().find(|part| part.columns != columns) {
            return Err(Error::shape("columns of a matrix", columns, other.columns));
        }
        // Parts of one type are one matrix: one launch.
        let like = parts
            .chunk_by(|a, b| a.dtype == b.dtype)
            .map(|like| match like {
                [only] => only.clone(),
                _ => Weight {
                    rows: like.iter().map(|part| part.rows).sum(),
                    bytes: like
                        .iter()
                        .flat_map(|part| part.bytes.iter().copied())
                        .collect(),
                    ..like[0].clone()
                },
            });
        Ok(Self {
            place: place.clone(),
            columns,
            parts: like.map(|like| part(&like)).collect::<Result<_>>()?,
        })
    }

    fn eights(&self) -> usize {
        self.columns.div_ceil(EIGHT)
    }

    /// `x · Wᵀ`, `[tokens, inputs]` to `[tokens, outputs]`.
    fn product(&self, x: &CubeTensor) -> CubeTensor {
        let (tokens, outputs) = (x.meta.shape()[0], self.shape()[0]);
        let client = &self.place.client;
        let out = self.place.empty([tokens, outputs], TensorType::F32);
        let mut first = 0;
        for part in &self.parts {
            let [rows, eights, at, across] =
                [part.rows, self.eights(), first, outputs].map(|n| n as u32);
            let buffers = || {
                let buffers = [&part.words, &part.scales, &out];
                buffers.map(|buffer| buffer.clone().into_buffer_arg())
            };
            first += part.rows;
            if let Some(tiles) = self.place.tiles.filter(|_| tokens > FEW) {
                let buffers = [&part.words, &part.scales, &out];
                let sizes = [rows, eights, at, across];
                matrix_units::product(&self.place, tiles, x, buffers, sizes, part.kind);
                continue;
            }
            let [words, scales, to] = buffers();
            let x = x.clone().into_tensor_arg();
            match tokens <= FEW {
                true => product::few::launch(
                    client,
                    spread(part.rows.div_ceil(FEW_UNITS / LANES)),
                    CubeDim::new_1d(FEW_UNITS as u32),
                    x,
                    words,
                    scales,
                    to,
                    rows,
                    eights,
                    at,
                    across,
                    tokens,
                    part.kind,
                ),
                false => product::many::launch(
                    client,
                    CubeCount::Static(rows.div_ceil(TILE as u32), tokens.div_ceil(TILE) as u32, 1),
                    CubeDim::new_1d(TILE_UNITS as u32),
                    x,
                    words,
                    scales,
                    to,
                    rows,
                    eights,
                    at,
                    across,
                    part.kind,
                ),
            }
        }
        out
    }

    /// Some rows, which are there.
    fn decoded(&self, ids: &[u32]) -> CubeTensor {
        let out = self.place.empty([ids.len(), self.columns], TensorType::F32);
        let on_device = self.place.indices(ids);
        let mut first = 0;
        for part in &self.parts {
            let (count, dim) = elementwise(&self.place, ids.len() * self.eights());
            product::rows::launch(
                &self.place.client,
                count,
                dim,
                on_device.clone().into_buffer_arg(),
                part.words.clone().into_buffer_arg(),
                part.scales.clone().into_buffer_arg(),
                out.clone().into_tensor_arg(),
                part.rows as u32,
                self.eights() as u32,
                first as u32,
                part.kind,
            );
            first += part.rows;
        }
        out
    }
}

impl Matrix for CubeMatrix {
    fn shape(&self) -> [usize; 2] {
        let outputs = self.parts.iter().map(|part| part.rows).sum();
        [outputs, self.columns]
    }

    fn apply_parts(&self, x: &Rows, widths: &[usize]) -> Result<Vec<Rows>> {
        let shape = self.shape();
        check_product(shape, x, widths)?;
        let y: Tensor<2> = match x.rows() {
            0 => Tensor::zeros([0, shape[0]], &self.place.device),
            _ => made(self.product(&self.place.rows(x)?)).into_tensor(),
        };
        Ok(divided(y, widths))
    }

    fn rows(&self, ids: &[u32]) -> Result<Rows> {
        let shape = self.shape();
        if let Some(id) = ids.iter().find(|id| **id as usize >= shape[0]) {
            return Err(no_row(*id, shape));
        }
        Ok(match ids.is_empty() {
            true => Tensor::zeros([0, self.columns], &self.place.device).into(),
            false => made(self.decoded(ids)),
        })
    }

    fn values(&self) -> Result<Vec<f32>> {
        let ids: Vec<u32> = (0..self.shape()[0] as u32).collect();
        let mut values = Vec::with_capacity(ids.len() * self.columns);
        for ids in ids.chunks(DECODED) {
            values.extend(self.rows(ids)?.into_values()?);
        }
        Ok(values)
    }
}
