//! Attention over a store: our CPU kernels on host memory, Burn operations elsewhere.

use crate::{
    Error, LayerSpec, Observation, Observe, Observed, Result, host,
    kernels::{
        attention::{self as kernel, AttnShape},
        observe as observe_kernel,
        rope::{self, RopeTable},
        tiles::KvTiles,
    },
    store::KvStore,
};
use burn::tensor::{Tensor, TensorData, activation::softmax, module, ops::AttentionModuleOptions};

/// Rotated queries of one step, and what is needed to attend with them.
pub(crate) struct Attention<'a> {
    pub(crate) layer: LayerSpec,
    pub(crate) store: &'a dyn KvStore,
    pub(crate) scale: f32,
    /// Set where the store's keys are not rotated yet: unit `i` belongs at position `i`.
    pub(crate) rotation: Option<&'a RopeTable>,
}

impl Attention<'_> {
    fn tiles(&self) -> Option<Vec<Box<dyn KvTiles + '_>>> {
        (0..self.layer.kv_heads)
            .map(|head| self.store.tiles(head))
            .collect()
    }

    fn shape(&self, tokens: usize) -> AttnShape {
        AttnShape {
            tokens,
            heads: self.layer.heads,
            kv_heads: self.layer.kv_heads,
            head_dim: self.layer.head_dim,
            scale: self.scale,
        }
    }

    /// Causal attention of `q` `[tokens, heads * head_dim]` over the store, whose last units are
    /// the new tokens'. Returns `[tokens, heads * head_dim]`.
    pub(crate) fn attend(&self, q: Tensor<2>) -> Result<Tensor<2>> {
        let [t, width] = q.dims();
        let device = q.device();
        if let Some(tiles) = self.tiles() {
            let q = host::into_f32(q)?;
            let heads: Vec<&dyn KvTiles> = tiles.iter().map(|t| &**t as &dyn KvTiles).collect();
            let mut out = vec![0f32; t * width];
            kernel::attend(&q, &heads, self.shape(t), self.rotation, &mut out);
            return Ok(host::from_f32(out, [t, width], &device));
        }
        let (g, d) = (self.layer.group(), self.layer.head_dim);
        // The backends' fused kernels want the default scale.
        let scaled = self.scale * (d as f32).sqrt();
        let q = if (scaled - 1.0).abs() < 1e-6 {
            q
        } else {
            q.mul_scalar(scaled)
        };
        let mut out = Vec::with_capacity(self.layer.kv_heads);
        for head in 0..self.layer.kv_heads {
            let (k, v) = (self.rotated_keys(head)?, self.store.values(head)?);
            let n = k.dims()[0];
            let q = grouped(&q, head, g, d).unsqueeze::<4>();
            let expand = |x: Tensor<2>| x.reshape([1, 1, n, d]).expand([1, g, n, d]);
            let attended = module::attention(
                q,
                expand(k),
                expand(v),
                None,
                None,
                AttentionModuleOptions {
                    is_causal: true,
                    ..Default::default()
                },
            );
            out.push(
                attended
                    .reshape([g, t, d])
                    .swap_dims(0, 1)
                    .reshape([t, g * d]),
            );
        }
        Ok(Tensor::cat(out, 1))
    }

    fn rotated_keys(&self, head: usize) -> Result<Tensor<2>> {
        let keys = self.store.keys(head)?;
        match self.rotation {
            Some(table) => rotate_contiguous(keys, self.layer.head_dim, table, false),
            None => Ok(keys),
        }
    }

    /// What the last of `q`'s queries pay attention to.
    pub(crate) fn observe(&self, q: Tensor<2>, what: Observe) -> Result<Observed> {
        let t = q.dims()[0];
        let count = what.queries.count(t);
        let per_head = if let Some(tiles) = self.tiles() {
            let q = host::into_f32(q)?;
            let heads: Vec<&dyn KvTiles> = tiles.iter().map(|t| &**t as &dyn KvTiles).collect();
            let chosen: Vec<usize> = (t - count..t).collect();
            let shape = self.shape(t);
            match what.what {
                Observation::Weights => {
                    observe_kernel::observe_weights(&q, &heads, shape, self.rotation, &chosen)
                }
                Observation::MaxLogits => {
                    observe_kernel::observe_max_logits(&q, &heads, shape, self.rotation, &chosen)
                }
            }
        } else {
            self.observe_tensors(q, what.what, count)?
        };
        Ok(Observed {
            per_head,
            queries: count,
            what: what.what,
        })
    }

    fn observe_tensors(
        &self,
        q: Tensor<2>,
        what: Observation,
        count: usize,
    ) -> Result<Vec<Vec<f32>>> {
        /// Rows of a block: bounds the score matrix to `group · BLOCK · units`.
        const BLOCK: usize = 256;
        let (g, d) = (self.layer.group(), self.layer.head_dim);
        let t = q.dims()[0];
        let mut all = Vec::new();
        for head in 0..self.layer.kv_heads {
            let keys = self.rotated_keys(head)?;
            let n = keys.dims()[0];
            let q = grouped(&q, head, g, d);
            let keys = keys.transpose().unsqueeze::<3>();
            let rows = match what {
                Observation::Weights => g,
                Observation::MaxLogits => 1,
            };
            let mut sum: Option<Tensor<2>> = None;
            let mut start = t - count;
            while start < t {
                let block = BLOCK.min(t - start);
                let scores = q
                    .clone()
                    .narrow(1, start, block)
                    .matmul(keys.clone())
                    .mul_scalar(self.scale);
                // Query `i` sees units up to `n - t + i`.
                let hidden: Vec<bool> = (start..start + block)
                    .flat_map(|i| (0..n).map(move |unit| unit > n - t + i))
                    .collect();
                let hidden = Tensor::<3, burn::tensor::Bool>::from_data(
                    TensorData::new(hidden, [1, block, n]),
                    &scores.device(),
                );
                let scores = scores.mask_fill(hidden.expand([g, block, n]), f32::NEG_INFINITY);
                let part = match what {
                    Observation::Weights => softmax(scores, 2).sum_dim(1).reshape([rows, n]),
                    Observation::MaxLogits => {
                        scores.reshape([g * block, n]).max_dim(0).reshape([rows, n])
                    }
                };
                sum = Some(match (sum, what) {
                    (None, _) => part,
                    (Some(sum), Observation::Weights) => sum + part,
                    (Some(sum), Observation::MaxLogits) => sum.max_pair(part),
                });
                start += block;
            }
            match sum {
                Some(sum) => {
                    let flat = host::into_f32(sum)?;
                    all.extend(flat.chunks(n).map(<[f32]>::to_vec));
                }
                None => {
                    let nothing = match what {
                        Observation::Weights => 0.0,
                        Observation::MaxLogits => f32::NEG_INFINITY,
                    };
                    all.extend((0..rows).map(|_| vec![nothing; n]));
                }
            }
        }
        Ok(all)
    }
}

/// The queries of one KV head's group, `[g, tokens, d]`.
fn grouped(q: &Tensor<2>, head: usize, g: usize, d: usize) -> Tensor<3> {
    let t = q.dims()[0];
    q.clone()
        .narrow(1, head * g * d, g * d)
        .reshape([t, g, d])
        .swap_dims(0, 1)
}

/// Rotates row `i` of `[rows, dim]` by row `i` of the table.
pub(crate) fn rotate_contiguous(
    keys: Tensor<2>,
    dim: usize,
    table: &RopeTable,
    on_host: bool,
) -> Result<Tensor<2>> {
    rotate_rows(keys, dim, table, &|row| row, on_host)
}

/// Undoes [`rotate_rows`].
///
/// In 32 bits `cos² + sin²` is not quite 1, by the same amount whenever the same row is used: keys
/// that are turned back and forth with every eviction would grow or shrink steadily. So what is
/// still missing after the first attempt is added, and what is left is rounding.
pub(crate) fn unrotate_rows(
    x: Tensor<2>,
    dim: usize,
    table: &RopeTable,
    row_of: &(dyn Fn(usize) -> usize + Sync),
    on_host: bool,
) -> Result<Tensor<2>> {
    let back = |x| turn_rows(x, dim, table, row_of, true, on_host);
    let first = back(x.clone())?;
    let missing = x - rotate_rows(first.clone(), dim, table, row_of, on_host)?;
    Ok(first + back(missing)?)
}

/// Rotates `x` `[tokens, heads * dim]`, token `i` by row `row_of(i)` of the table.
pub(crate) fn rotate_rows(
    x: Tensor<2>,
    dim: usize,
    table: &RopeTable,
    row_of: &(dyn Fn(usize) -> usize + Sync),
    on_host: bool,
) -> Result<Tensor<2>> {
    turn_rows(x, dim, table, row_of, false, on_host)
}

fn turn_rows(
    x: Tensor<2>,
    dim: usize,
    table: &RopeTable,
    row_of: &(dyn Fn(usize) -> usize + Sync),
    inverse: bool,
    on_host: bool,
) -> Result<Tensor<2>> {
    let [t, width] = x.dims();
    if t == 0 {
        return Ok(x);
    }
    let last = (0..t).map(row_of).max().unwrap_or(0);
    if last >= table.len() {
        return Err(Error::shape("rotation table", [last + 1], [table.len()]));
    }
    let (heads, device) = (width / dim, x.device());
    if on_host {
        let mut values = host::into_f32(x)?;
        rope::rotate(&mut values, dim, dim, table, |i| row_of(i / heads), inverse);
        return Ok(host::from_f32(values, [t, width], &device));
    }
    let half = table.rotary_dim() / 2;
    // The table's cosines and sines have the factor in them: undoing divides by it twice.
    let factor = if inverse {
        1.0 / (table.factor() * table.factor())
    } else {
        1.0
    };
    let rows = |values: &[f32]| {
        let part = (0..t).flat_map(|i| {
            let at = row_of(i) * half;
            values[at..at + half].iter().map(|v| v * factor)
        });
        host::from_f32::<2>(part.collect(), [t, half], &device).reshape([t, 1, half])
    };
    let (cos, sin) = (rows(table.cos()), rows(table.sin()));
    let sin = if inverse { sin.neg() } else { sin };
    let x = x.reshape([t, heads, dim]);
    let (a, b) = (
        x.clone().narrow(2, 0, half),
        x.clone().narrow(2, half, half),
    );
    let mut parts = vec![
        a.clone() * cos.clone() - b.clone() * sin.clone(),
        b * cos + a * sin,
    ];
    if 2 * half < dim {
        parts.push(x.narrow(2, 2 * half, dim - 2 * half));
    }
    Ok(Tensor::cat(parts, 2).reshape([t, width]))
}

/// Rotates `x` `[tokens, heads * dim]` in as many groups of heads as `first` has entries: token `i`
/// of group `j` by row `first[j] + i` of the table.
pub(crate) fn rotate_grouped(
    x: Tensor<2>,
    dim: usize,
    table: &RopeTable,
    first: &[usize],
    on_host: bool,
) -> Result<Tensor<2>> {
    if first.windows(2).all(|w| w[0] == w[1]) {
        return rotate_rows(x, dim, table, &|i| first[0] + i, on_host);
    }
    let group = x.dims()[1] / first.len();
    let parts = first
        .iter()
        .enumerate()
        .map(|(index, start)| {
            let part = x.clone().narrow(1, index * group, group);
            rotate_rows(part, dim, table, &|i| start + i, on_host)
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(Tensor::cat(parts, 1))
}
