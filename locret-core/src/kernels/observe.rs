//! What chosen queries pay attention to.

use super::{attention::AttnShape, rope, rope::RopeTable, tiles::KvTiles};

/// Per **query** head, per unit, the sum over the chosen queries of the softmax weight.
///
/// Arguments as in [`attend`](super::attention::attend); `chosen` are ascending numbers of queries.
pub fn observe_weights(
    q: &[f32],
    heads: &[&dyn KvTiles],
    shape: AttnShape,
    key_rotation: Option<&RopeTable>,
    chosen: &[usize],
) -> Vec<Vec<f32>> {
    let mut all = Vec::with_capacity(shape.heads);
    for head in 0..shape.heads {
        let kv = heads[head / shape.group()];
        let mut sum = vec![0f32; kv.len()];
        logits(q, kv, shape, key_rotation, chosen, head, |row| {
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let total: f32 = row.iter().map(|x| (x - max).exp()).sum();
            for (s, x) in sum.iter_mut().zip(row) {
                *s += (x - max).exp() / total;
            }
        });
        all.push(sum);
    }
    all
}

/// Per KV head, per unit, the maximum over the chosen queries and the query heads of the group of
/// `scale · q·k`; `-∞` where no chosen query sees the unit.
pub fn observe_max_logits(
    q: &[f32],
    heads: &[&dyn KvTiles],
    shape: AttnShape,
    key_rotation: Option<&RopeTable>,
    chosen: &[usize],
) -> Vec<Vec<f32>> {
    let mut all: Vec<Vec<f32>> = Vec::with_capacity(shape.kv_heads);
    for head in 0..shape.heads {
        let kv = heads[head / shape.group()];
        if head.is_multiple_of(shape.group()) {
            all.push(vec![f32::NEG_INFINITY; kv.len()]);
        }
        let Some(best) = all.last_mut() else { continue };
        logits(q, kv, shape, key_rotation, chosen, head, |row| {
            for (b, x) in best.iter_mut().zip(row) {
                *b = b.max(*x);
            }
        });
    }
    all
}

fn logits(
    q: &[f32],
    kv: &dyn KvTiles,
    shape: AttnShape,
    key_rotation: Option<&RopeTable>,
    chosen: &[usize],
    head: usize,
    mut each: impl FnMut(&[f32]),
) {
    let (n, d) = (kv.len(), shape.head_dim);
    let mut scratch = vec![0f32; n * d];
    let mut keys = kv.keys(0..n, &mut scratch).to_vec();
    if let Some(table) = key_rotation {
        rope::rotate(&mut keys, d, d, table, |row| row, false);
    }
    let mut row = vec![0f32; n];
    for &i in chosen {
        let at = (i * shape.heads + head) * d;
        let query = &q[at..at + d];
        let seen = (n + i + 1).saturating_sub(shape.tokens);
        for (x, key) in row[..seen].iter_mut().zip(keys.chunks_exact(d)) {
            *x = query.iter().zip(key).map(|(a, b)| a * b).sum::<f32>() * shape.scale;
        }
        each(&row[..seen]);
    }
}
