//! What policies share that keep everything, and retrieve blocks of it.

use locret_core::{Error, LayerSpec, LayerUnits, Result, Rows, Step};

/// Checks that nothing was dropped from a layer before.
///
/// # Errors
/// [`Error::Policy`] in the name of `policy`.
pub(crate) fn check_whole(policy: String, at: &Step, units: &LayerUnits<'_>) -> Result<()> {
    let n = at.seen + at.incoming;
    match (0..units.kv_heads()).find(|head| units.len(*head) != n) {
        None => Ok(()),
        Some(head) => {
            let found = format!("{} units of {n} tokens are held", units.len(head));
            let found = format!("is for caches that keep everything: {found}");
            Err(Error::policy(policy, found))
        }
    }
}

/// Checks the sizes of blocks and of their representatives.
///
/// # Errors
/// [`Error::Setting`].
pub(crate) fn check_sizes(block: usize, topk: usize, representatives: usize) -> Result<()> {
    for (what, size) in [("block", block), ("number of retrieved blocks", topk)] {
        if size == 0 {
            return Err(Error::setting(what, "at least 1", 0));
        }
    }
    match (1..=block).contains(&representatives) {
        true => Ok(()),
        false => Err(Error::setting(
            "number of keys in a representative",
            format!("1 to {block}, a block's units"),
            representatives,
        )),
    }
}

/// Numbers that go with each unit of a KV head: what each query head of the group has paid to it, and once it is in
/// a block, its part of the block's representative.
pub(crate) fn width(layer: &LayerSpec, block: usize) -> usize {
    let representative = layer.group() * layer.head_dim;
    representative.div_ceil(block.max(1)).max(layer.group())
}

/// The mean of rows.
pub(crate) fn mean(rows: &Rows) -> Result<Vec<f32>> {
    let all: Vec<u32> = (0..rows.rows() as u32).collect();
    Ok(mean_of(&rows.values()?, rows.width(), &all))
}

/// The representative of a block for one query head: the mean of its `count` keys that were paid most. `keys` are
/// `[units, head_dim]`.
///
/// # Errors
/// Those of [`Compute::select`](locret_core::Compute::select).
pub(crate) fn representative(
    units: &LayerUnits<'_>,
    keys: &[f32],
    paid: &[f32],
    count: usize,
) -> Result<Vec<f32>> {
    let best = units.compute().select(paid, count, &[])?;
    Ok(mean_of(keys, units.layer().head_dim, &best))
}

fn mean_of(values: &[f32], width: usize, rows: &[u32]) -> Vec<f32> {
    let mut sum = vec![0.0; width];
    for row in rows {
        let row = &values[*row as usize * width..][..width];
        sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
    }
    let count = rows.len().max(1) as f32;
    sum.iter_mut().for_each(|x| *x /= count);
    sum
}
