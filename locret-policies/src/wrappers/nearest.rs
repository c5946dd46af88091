//! Which kept unit a dropped one is most like.

use burn::tensor::{Int, Tensor, TensorData};
use locret_core::{LayerUnits, Result, into_f32};

/// A unit that goes, and the unit of its head that stays whose key makes the largest cosine with its own.
#[derive(Debug, Clone, Copy)]
pub(super) struct Nearest {
    pub(super) dropped: u32,
    /// Which of the kept units.
    pub(super) target: usize,
    pub(super) cosine: f32,
}

/// By dropped unit, in order; of equals the earlier target. Keys are compared as attention saw them.
pub(super) fn nearest(units: &LayerUnits<'_>, head: usize, kept: &[u32]) -> Result<Vec<Nearest>> {
    let dropped = dropped(units.len(head), kept);
    if kept.is_empty() || dropped.is_empty() {
        return Ok(Vec::new());
    }
    let keys = units.keys(head)?.into_tensor();
    let norm = (keys.clone() * keys.clone()).sum_dim(1).sqrt();
    let keys = keys / norm.clamp_min(1e-12);
    let pick = |list: &[u32]| {
        let at: Vec<i32> = list.iter().map(|unit| *unit as i32).collect();
        let at = Tensor::<1, Int>::from_data(TensorData::new(at, [list.len()]), &keys.device());
        keys.clone().select(0, at)
    };
    let cosines = into_f32(pick(&dropped).matmul(pick(kept).transpose()))?;
    let best = |(dropped, cosines): (&u32, &[f32])| {
        let (mut target, mut cosine) = (0, f32::NEG_INFINITY);
        for (i, x) in cosines.iter().enumerate() {
            if *x > cosine {
                (target, cosine) = (i, *x);
            }
        }
        Nearest {
            dropped: *dropped,
            target,
            cosine,
        }
    };
    let rows = cosines.chunks_exact(kept.len());
    Ok(dropped.iter().zip(rows).map(best).collect())
}

/// Those of `len` units that do not stay.
pub(super) fn dropped(len: usize, kept: &[u32]) -> Vec<u32> {
    let mut stays = kept.iter().copied().peekable();
    let units = 0..len as u32;
    units
        .filter(|unit| stays.next_if_eq(unit).is_none())
        .collect()
}
