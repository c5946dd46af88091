//! Q-Filters: keys that point where queries do.

mod calibrate;
mod file;

pub use calibrate::QFilterProbe;

use crate::published::Published;
use locret_core::{Budget, Error, Evict, LayerUnits, ModelSpec, Result, Scorer, Scores, Step};
use sha2::{Digest, Sha256};
use std::sync::Arc;

/// Q-Filters (arXiv 2503.02812 §3): queries of a head spread around one direction, and how far a key points in
/// that direction is about how much attention it gets on average. The score of a unit is `u · k`, where `u` is
/// the direction, of the layer's KV head, turned towards the queries.
///
/// **Keeps** in every KV head the units whose keys point most in the direction of the queries.
///
/// **Cost:** one pass over the keys of a layer, when something has to go. The directions are made once for a
/// model ([`QFilterProbe`], a minute of reading).
///
/// **Chunked prefill:** the score depends on the unit alone and does not change with the chunks.
///
/// Keys are taken as attention sees them, and directions are made of queries rotated in the same way. In compact
/// positions a unit's angle shrinks as others go, so that its score changes a little.
///
/// **Sign.** A singular vector has none. Files of the authors (`q_filters` in safetensors, without metadata) point
/// away from the queries, and are turned around when they are read; files of this library say that they point
/// to them.
#[derive(Debug, Clone)]
pub struct QFilters {
    /// `[layers, kv_heads, head_dim]`
    filters: Arc<[f32]>,
    shape: [usize; 3],
}

impl QFilters {
    /// Directions `[layers, kv_heads, head_dim]` of the shape `[layers, kv_heads, head_dim]`, which point to the
    /// queries.
    ///
    /// # Errors
    /// [`Error::Shape`] for another number of values, [`Error::NotFinite`].
    pub fn new(filters: Vec<f32>, shape: [usize; 3]) -> Result<Self> {
        if filters.len() != shape.iter().product::<usize>() {
            return Err(Error::Shape {
                what: "filters of queries",
                expected: format!("{shape:?}"),
                found: format!("{} numbers", filters.len()),
            });
        }
        if let Some(at) = filters.iter().position(|x| !x.is_finite()) {
            return Err(Error::NotFinite {
                what: "a filter of queries",
                at: format!("element {at}"),
            });
        }
        Ok(Self {
            filters: filters.into(),
            shape,
        })
    }

    /// The direction of a KV head of a layer.
    ///
    /// # Panics
    /// For a layer or a head that they do not have.
    pub fn direction(&self, layer: usize, head: usize) -> &[f32] {
        let [_, heads, width] = self.shape;
        &self.filters[(layer * heads + head) * width..][..width]
    }

    /// Keeps the `budget` units that point most to the queries, original positions.
    pub fn policy(self, budget: Budget) -> Evict<Self> {
        self.published(budget)
    }
}

impl Published for QFilters {}

impl Scorer for QFilters {
    fn name(&self) -> String {
        "q-filters".into()
    }

    /// Too many numbers for `Debug`.
    fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        for x in self.filters.iter() {
            hash.update(x.to_le_bytes());
        }
        let digest: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
        format!("QFilters {{ shape: {:?}, filters: {digest} }}", self.shape)
    }

    fn validate(&self, model: &ModelSpec) -> Result<()> {
        let due = [model.layers, model.kv_heads, model.head_dim];
        match self.shape == due {
            true => Ok(()),
            false => Err(Error::Shape {
                what: "filters of queries (layers, KV heads, features)",
                expected: format!("{due:?}"),
                found: format!("{:?}", self.shape),
            }),
        }
    }

    fn score(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        let heads = (0..units.kv_heads()).map(|head| {
            let direction = self.direction(at.layer.index, head);
            let keys = units.keys(head)?;
            let keys = keys.values()?;
            let along = |key: &[f32]| key.iter().zip(direction).map(|(k, u)| k * u).sum();
            Ok(keys.chunks_exact(direction.len()).map(along).collect())
        });
        Scores::per_head(heads.collect::<Result<_>>()?)
    }
}
