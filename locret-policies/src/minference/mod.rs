//! MInference: prompts read with a part of their attention (arXiv 2407.02490).

mod search;
mod table;

pub use search::{Found, recalled, search_layer};
pub use table::{Pattern, Patterns};

use locret_core::{
    KvCachePolicy, LayerUnits, ModelSpec, Needs, Phase, Positions, Prefill, Result, Rows, Step,
    Survey, Verdict, View, Views, Visible,
};
use sha2::{Digest, Sha256};
use std::ops::Range;

/// Queries of a tile, and keys of a block.
const TILE: usize = Views::BLOCK;

/// Queries at the end of a chunk that the estimate is made with.
const LAST: usize = 64;

/// The first columns and the newest diagonals are always chosen.
const FIRST: usize = 30;
const NEWEST: usize = 100;

/// The least numbers of columns and of diagonals.
const LEAST: [usize; 2] = [30, 50];

/// MInference (arXiv 2407.02490 §3): each query head looks at its prompt in one of three patterns
/// ([`Pattern`]), with sizes from a table that was searched for offline ([`Patterns`], [`search_layer`]).
///
/// **Keeps** everything: only what a prompt's queries *see* is chosen ([`KvCachePolicy::before`]). A chunk's
/// last 64 queries are asked where they look, over the cache and the chunk; the columns and diagonals with most
/// of their attention are what all queries of the chunk see, in tiles of 64 queries: a diagonal covers the 64
/// units that it crosses beside a tile, and overlapping ones become ranges. What is generated, and text that is
/// forced on the model, sees everything.
///
/// **Cost:** attention to `columns + diagonals` units a query (and up to 64 more for each range) instead of all,
/// and one more pass over the keys for 64 queries of a chunk. Chunks should be long (4,096), so that this
/// is little. As long as a head's columns or diagonals are all there are, it sees everything at no cost.
///
/// **Chunked prefill:** the authors read a prompt in one pass, and its last queries are the question. Here every
/// chunk is judged by its own last queries, which do not know the question yet.
///
/// **Where units are gone**, as in [`Sparse`](crate::Sparse), distances count units that are held. In compact positions
/// these are the distances that attention knows, in original ones it is so up to the first gap.
#[derive(Debug, Clone, Default)]
#[must_use]
pub struct MInference {
    patterns: Patterns,
    positions: Positions,
}

impl MInference {
    /// With these patterns, at original positions.
    pub fn new(patterns: Patterns) -> Self {
        Self {
            patterns,
            positions: Positions::Original,
        }
    }

    /// Chooses the positions; they are the same ones, since nothing is dropped.
    pub fn with_positions(self, positions: Positions) -> Self {
        Self { positions, ..self }
    }

    /// The patterns.
    pub fn patterns(&self) -> &Patterns {
        &self.patterns
    }
}

impl KvCachePolicy for MInference {
    fn name(&self) -> String {
        "minference".into()
    }

    fn fingerprint(&self) -> String {
        // A table has a thousand heads.
        let digest = Sha256::digest(self.patterns.to_json().as_bytes());
        let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        let positions = self.positions;
        format!("MInference {{ patterns: {digest}, positions: {positions:?} }}")
    }

    fn needs(&self) -> Needs {
        Needs::NOTHING.before()
    }

    fn positions(&self) -> Positions {
        self.positions
    }

    fn validate(&self, model: &ModelSpec, _prefill: &Prefill) -> Result<()> {
        self.patterns.check(model.layers, model.heads)
    }

    fn before(&self, at: &Step, queries: &Rows, units: &LayerUnits<'_>) -> Result<Visible> {
        let reads = matches!(at.phase, Phase::Prefill { .. } | Phase::Tail);
        if !reads || at.incoming == 1 {
            return Ok(Visible::All);
        }
        let t = at.incoming;
        // The pattern of each query head, and how many units there are for it.
        let patterns: Vec<(Pattern, usize)> = (0..at.layer.heads)
            .map(|head| {
                let pattern = self.patterns.of(at.layer.index, head);
                (pattern, units.len(head / at.layer.group()))
            })
            .collect();
        if patterns.iter().all(|(pattern, n)| pattern.sees_all(*n)) {
            return Ok(Visible::All);
        }
        let estimated = |(pattern, n): &(Pattern, usize)| {
            matches!(pattern, Pattern::VerticalSlash { .. }) && !pattern.sees_all(*n)
        };
        let survey = match patterns.iter().any(estimated) {
            true => Some(units.survey(queries, LAST)?),
            false => None,
        };
        let list = |(head, (pattern, n)): (usize, &(Pattern, usize))| -> Result<Vec<View>> {
            let n = *n;
            if pattern.sees_all(n) {
                return Ok(vec![View::all(); t.div_ceil(TILE)]);
            }
            match (*pattern, &survey) {
                (Pattern::VerticalSlash { vertical, slash }, Some(survey)) => {
                    let chosen = Lines::choose(units, survey, head, vertical, slash)?;
                    Ok(chosen.views(n, t))
                }
                (Pattern::BlockSparse { blocks }, _) => {
                    block_sparse(at, queries, units, head, blocks)
                }
                (Pattern::AShape { init, local }, _) => {
                    let view = View {
                        ranges: std::iter::once(0..init.min(n) as u32).collect(),
                        window: local,
                        ..View::default()
                    };
                    Ok(vec![view; t.div_ceil(TILE)])
                }
                (Pattern::VerticalSlash { .. }, None) => Ok(vec![View::all(); t.div_ceil(TILE)]),
            }
        };
        let lists = patterns.iter().enumerate().map(list);
        let lists = lists.collect::<Result<Vec<_>>>()?;
        Ok(Visible::Chosen(Views::new(TILE, lists)))
    }

    fn step(&self, _at: &Step, _units: &LayerUnits<'_>) -> Result<Verdict> {
        Ok(Verdict::keep_all())
    }
}

/// Columns and diagonals of a head.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Lines {
    /// Units, ascending.
    columns: Vec<u32>,
    /// Distances from a query, ascending.
    diagonals: Vec<u32>,
}

impl Lines {
    /// Those with most of the attention.
    fn choose(
        units: &LayerUnits<'_>,
        survey: &Survey,
        head: usize,
        vertical: usize,
        slash: usize,
    ) -> Result<Self> {
        let (columns, diagonals) = (&survey.units[head], &survey.distances[head]);
        let n = columns.len();
        let [vertical, slash] = [vertical.max(LEAST[0]).min(n), slash.max(LEAST[1]).min(n)];
        let select = |sums: &[f32], keep: usize, always: usize| {
            let protected: Range<usize> = 0..always.min(keep);
            units.compute().select(sums, keep, &[protected])
        };
        Ok(Self {
            columns: select(columns, vertical, FIRST)?,
            diagonals: select(diagonals, slash, NEWEST)?,
        })
    }

    /// What each tile of the last `t` of `n` tokens sees.
    fn views(&self, n: usize, t: usize) -> Vec<View> {
        let tile = |first: usize| {
            let (first, end) = (n - t + first, n - t + first + TILE);
            let columns = self.columns.iter().copied();
            View {
                ranges: crossed(&self.diagonals, first, end)
                    .into_iter()
                    .map(|range| range.start.min(n) as u32..range.end.min(n) as u32)
                    .collect(),
                columns: columns.take_while(|unit| (*unit as usize) < end).collect(),
                ..View::default()
            }
        };
        (0..t).step_by(TILE).map(tile).collect()
    }
}

/// The ranges of units that diagonals (ascending distances) cross beside the tile of queries whose own units are
/// `first..end`, as the authors' kernel covers them: blocks of 64 units from where a diagonal meets the tile's
/// first query, and one more block where the next one lies within it.
fn crossed(diagonals: &[u32], first: usize, end: usize) -> Vec<Range<usize>> {
    let block = end - first;
    let mut ranges: Vec<Range<usize>> = Vec::new();
    // From the farthest on, so that ends ascend.
    for distance in diagonals.iter().rev().map(|distance| *distance as usize) {
        if distance >= end {
            continue;
        }
        let to = (end - distance).max(block);
        match ranges.last_mut() {
            Some(last) if to <= last.end => {}
            Some(last) if to <= last.end + block => last.end += block,
            _ => ranges.push(to - block..to),
        }
    }
    ranges
}

/// Blocks of units whose mean key is most like the mean query of a tile.
fn block_sparse(
    at: &Step,
    queries: &Rows,
    units: &LayerUnits<'_>,
    head: usize,
    blocks: usize,
) -> Result<Vec<View>> {
    let (d, t) = (at.layer.head_dim, at.incoming);
    let keys = units.keys(head / at.layer.group())?;
    let (keys, queries) = (keys.values()?, queries.values()?);
    let n = keys.len() / d;
    let keys = sums(&keys, d);
    let queries: Vec<f32> = queries
        .chunks_exact(at.layer.heads * d)
        .flat_map(|row| &row[head * d..(head + 1) * d])
        .copied()
        .collect();
    let tiles = sums(&queries, d);
    let tile = |(tile, query): (usize, &Vec<f32>)| -> Result<View> {
        // Blocks that begin no later than the tile's last query.
        let last = (n - t + (tile + 1) * TILE).min(n) - 1;
        let scores: Vec<f32> = keys[..last / TILE + 1]
            .iter()
            .map(|key| key.iter().zip(query).map(|(k, q)| k * q).sum())
            .collect();
        let chosen = units
            .compute()
            .select(&scores, blocks.min(scores.len()), &[])?;
        let range = |block: u32| {
            let first = block as usize * TILE;
            first as u32..(first + TILE).min(n) as u32
        };
        Ok(View {
            ranges: chosen.into_iter().map(range).collect(),
            ..View::default()
        })
    };
    tiles.iter().enumerate().map(tile).collect()
}

/// Sums of 64 rows each of `d` numbers; the last ones may be fewer.
fn sums(rows: &[f32], d: usize) -> Vec<Vec<f32>> {
    let sum = |block: &[f32]| {
        let mut sum = vec![0.0; d];
        for row in block.chunks_exact(d) {
            for (sum, x) in sum.iter_mut().zip(row) {
                *sum += x;
            }
        }
        sum
    };
    rows.chunks(TILE * d).map(sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn diagonals_cover_what_they_cross() {
        // Distances 0 and 1: two blocks from 63 units before the tile's end.
        assert_eq!(crossed(&[0], 128, 192), [128..192]);
        assert_eq!(crossed(&[0, 1], 128, 192), [127..255]);
        // Apart, at the beginning of the text, and beyond it.
        assert_eq!(crossed(&[0, 100], 192, 256), [92..156, 192..256]);
        assert_eq!(crossed(&[0, 150, 1000], 128, 192), [0..64, 128..192]);
        let every: Vec<u32> = (0..100).collect();
        assert_eq!(crossed(&every, 512, 576), [413..605]);
    }

    #[test]
    fn every_query_sees_what_its_diagonals_cross() {
        let lines = Lines {
            columns: vec![0, 3, 77, 300],
            diagonals: vec![0, 1, 5, 64, 130, 131, 260],
        };
        let (n, t) = (333, 200);
        for (tile, view) in lines.views(n, t).iter().enumerate() {
            for own in (n - t + tile * TILE..n).take(TILE) {
                let sees = |unit: usize| {
                    let unit = unit as u32;
                    view.columns.contains(&unit) || view.ranges.iter().any(|r| r.contains(&unit))
                };
                let diagonals = lines.diagonals.iter().map(|d| *d as usize);
                assert!(diagonals.filter(|d| *d <= own).all(|d| sees(own - d)));
                let columns = lines.columns.iter().map(|unit| *unit as usize);
                assert!(columns.filter(|unit| *unit <= own).all(sees));
            }
        }
    }
}
