//! CUR: units whose keys and values are large among their neighbours.

use super::observed;
use crate::published::Published;
use locret_core::{
    Budget, Error, Evict, Guard, LayerSpec, LayerUnits, ModelSpec, Needs, Result, Rows, Scorer,
    Scores, Step,
};

/// CUR (CurDKV, arXiv 2509.15038, in the form without a random projection): the share that the square of a
/// unit's key has in the sum over its window of 16 tokens, times the same of its value. It stands for leverage
/// scores, by which rows of a matrix are chosen for a CUR decomposition.
///
/// **Keeps** the first units, and of the rest those with the largest product.
///
/// **Cost:** a pass over the new keys and values. Three numbers are carried with each unit: its score, and the
/// two squares, which later units of its window need.
///
/// **Chunked prefill:** windows are those of the text, so that a score is made once, with the window's last
/// token, and does not depend on what was dropped. Only where a chunk ends within a window are its units judged
/// by a part of it (chunks of a multiple of 16 have none). Published scores are also divided by their sum over
/// the text, which changes no order within a head and is not known before the text ends: it is left out, and
/// heads that share a budget ([`Evict::ada`]) are compared by the shares themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub struct Cur {
    window: usize,
}

impl Default for Cur {
    fn default() -> Self {
        Self {
            window: Self::WINDOW,
        }
    }
}

impl Cur {
    /// First units that stay, as published.
    pub const SINKS: usize = 4;
    /// Tokens of a window, as published.
    pub const WINDOW: usize = 16;

    /// Windows of 16 tokens.
    pub fn new() -> Self {
        Self::default()
    }

    /// Windows of `tokens` (at least 1).
    pub fn window(self, tokens: usize) -> Self {
        Self { window: tokens }
    }

    /// Keeps `budget` units, the first four for certain; original positions.
    pub fn policy(self, budget: Budget) -> Evict<Self> {
        self.published(budget)
    }
}

/// Numbers of a unit: its score, and the squares of its key and its value.
const WIDTH: usize = 3;

/// For each head of each token, the sum of squares: `[tokens, heads]`.
fn squares(rows: &Rows, head_dim: usize) -> Result<Vec<f32>> {
    let heads = rows.values()?;
    let square = |x: &[f32]| x.iter().map(|x| x * x).sum();
    Ok(heads.chunks_exact(head_dim).map(square).collect())
}

impl Published for Cur {}

impl Scorer for Cur {
    fn name(&self) -> String {
        "cur".into()
    }

    fn needs(&self) -> Needs {
        Needs::NOTHING.qkv()
    }

    fn carries(&self) -> bool {
        true
    }

    fn carried_width(&self, _layer: &LayerSpec) -> usize {
        WIDTH
    }

    fn guard(&self, _units: usize) -> Guard {
        Guard {
            sinks: Self::SINKS,
            ..Guard::default()
        }
    }

    fn validate(&self, _model: &ModelSpec) -> Result<()> {
        match self.window {
            0 => Err(Error::setting("window", "at least 1 token", 0)),
            _ => Ok(()),
        }
    }

    fn score(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        let kv_heads = units.kv_heads();
        let carried = (0..kv_heads).map(|head| units.carried(head).to_vec());
        let mut lists: Vec<Vec<f32>> = carried.collect();
        if units.incoming() > 0 {
            let qkv = observed::qkv(self, units)?;
            let width = at.layer.head_dim;
            let (keys, values) = (squares(&qkv.k, width)?, squares(&qkv.v, width)?);
            for (i, (key, value)) in keys.into_iter().zip(values).enumerate() {
                lists[i % kv_heads].extend([0.0, key, value]);
            }
        }
        // New units, and what came before them in the first one's window.
        let open = at.seen - at.seen % self.window;
        for (head, list) in lists.iter_mut().enumerate() {
            let positions = units.positions(head);
            let first = positions.partition_point(|p| (*p as usize) < open);
            let window = |unit: &(u32, &mut [f32])| unit.0 as usize / self.window;
            let late = positions[first..].iter().copied();
            let mut late: Vec<_> = late
                .zip(list[first * WIDTH..].chunks_exact_mut(WIDTH))
                .collect();
            for members in late.chunk_by_mut(|a, b| window(a) == window(b)) {
                let sum = |of: usize| members.iter().map(|(_, unit)| unit[of]).sum::<f32>();
                let sums = [sum(1), sum(2)];
                for (position, unit) in members {
                    let share = |of: usize| match sums[of - 1] > 0.0 {
                        true => unit[of] / sums[of - 1],
                        false => 0.0,
                    };
                    unit[0] = match (*position as usize) < Self::SINKS {
                        true => 1.0,
                        false => share(1) * share(2),
                    };
                }
            }
        }
        Scores::wide(WIDTH, lists)
    }
}
