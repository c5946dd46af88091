//! Any policy, with what it drops folded into what it keeps.

use super::nearest::{Nearest, nearest};
use locret_core::{
    Error, Fold, Held, Keep, KvCachePolicy, KvStore, LayerSpec, LayerUnits, ModelSpec, Needs,
    Placement, Positions, Prefill, Ranking, Result, Rows, Step, Verdict, Visible,
};
use serde::{Deserialize, Serialize};
use std::str::FromStr;

/// A policy whose dropped units leave their values behind: each is folded into the value of the
/// kept unit of its head whose key is most like its own (the largest cosine), if they are alike
/// enough.
///
/// Nothing is trained. A kept unit's new value is the mean of its own and all that are folded into
/// it in this step, or a mean in which each counts as [`MergeBy`] says; its key stays. Means are taken of 32-bit
/// numbers; a store of codes makes codes of the result. The idea is that of [`Cam`](crate::Cam) and
/// [`D2o`](crate::D2o), which are policies of their own; LoCoCo (arXiv 2406.05317), which the authors of Locret combined it with, trains a convolution
/// instead: 28.70 instead of 27.96 on L-Eval (arXiv 2410.01805, table 4).
///
/// **Keeps** the units that the policy inside keeps.
///
/// **Cost:** a product of the dropped keys with the kept ones of each head, when something goes.
///
/// **Chunked prefill:** values that were folded once are folded again with their unit, so that what
/// is mixed into a unit over a long text is a blur.
#[derive(Debug, Clone)]
#[must_use]
pub struct Merge<P> {
    inner: P,
    threshold: f32,
    by: MergeBy,
}

/// How much a dropped value counts beside the kept one that it is folded into, which counts 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum MergeBy {
    /// As much.
    #[default]
    Mean,
    /// The cosine of the two keys times the share that the dropped value has in the lengths of both: what is
    /// hardly alike or small is hardly mixed in, and what was large before is not diluted by crowds. A
    /// cosine below 0 counts nothing.
    Weighted,
}

impl FromStr for MergeBy {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "mean" => Ok(Self::Mean),
            "weighted" => Ok(Self::Weighted),
            _ => Err(Error::setting("merge_by", "mean or weighted", text)),
        }
    }
}

impl<P: KvCachePolicy> Merge<P> {
    /// Folds what `inner` drops where the cosine of the keys is at least `threshold` (from -1,
    /// everything, to 1).
    pub fn new(inner: P, threshold: f32) -> Self {
        Self {
            inner,
            threshold,
            by: MergeBy::Mean,
        }
    }

    /// Counts what is folded in another way.
    pub fn by(self, by: MergeBy) -> Self {
        Self { by, ..self }
    }

    /// The same verdict, with what is dropped folded into what stays.
    fn merged(&self, mut verdict: Verdict, units: &LayerUnits<'_>) -> Result<Verdict> {
        if let Keep::Slots(kept) = verdict.keep {
            let folds = kept.heads().iter().enumerate();
            let folds = folds
                .map(|(head, kept)| self.folds(units, head, kept))
                .collect::<Result<_>>()?;
            verdict.keep = Keep::Merged {
                kept,
                folds,
                keys: false,
            };
        }
        Ok(verdict)
    }

    /// What is folded into what, in one head of which `kept` stays.
    fn folds(&self, units: &LayerUnits<'_>, head: usize, kept: &[u32]) -> Result<Vec<Fold>> {
        let nearest = nearest(units, head, kept)?;
        if nearest.is_empty() {
            return Ok(Vec::new());
        }
        let lengths = match self.by {
            MergeBy::Mean => Vec::new(),
            MergeBy::Weighted => {
                let values = units.values(head)?;
                let length = |v: &[f32]| v.iter().map(|x| x * x).sum::<f32>().sqrt();
                let rows = values.width().max(1);
                values.values()?.chunks_exact(rows).map(length).collect()
            }
        };
        let mut targets = Vec::with_capacity(nearest.len());
        let mut folded = vec![0f32; kept.len()];
        for near in nearest {
            let Nearest {
                dropped,
                target,
                cosine,
            } = near;
            let weight = match self.by {
                MergeBy::Mean => 1.0,
                MergeBy::Weighted => {
                    let [own, other] = [dropped, kept[target]].map(|unit| lengths[unit as usize]);
                    cosine.max(0.0) * own / (own + other).max(f32::MIN_POSITIVE)
                }
            };
            if cosine >= self.threshold && weight > 0.0 {
                targets.push((dropped, target, weight));
                folded[target] += weight;
            }
        }
        let fold = |(from, target, weight): (u32, usize, f32)| Fold {
            from,
            into: kept[target],
            share: weight / (1.0 + folded[target]),
        };
        Ok(targets.into_iter().map(fold).collect())
    }
}

#[deny(clippy::missing_trait_methods)]
impl<P: KvCachePolicy> KvCachePolicy for Merge<P> {
    fn name(&self) -> String {
        format!("{}+merge", self.inner.name())
    }

    fn fingerprint(&self) -> String {
        let Self {
            inner,
            threshold,
            by,
        } = self;
        let inner = inner.fingerprint();
        match by {
            MergeBy::Mean => format!("Merge {{ inner: {inner}, threshold: {threshold:?} }}"),
            by => format!("Merge {{ inner: {inner}, threshold: {threshold:?}, by: {by:?} }}"),
        }
    }

    fn needs(&self) -> Needs {
        self.inner.needs()
    }

    fn positions(&self) -> Positions {
        self.inner.positions()
    }

    fn carries(&self) -> Option<String> {
        self.inner.carries()
    }

    fn carried_width(&self, layer: &LayerSpec) -> usize {
        self.inner.carried_width(layer)
    }

    fn noted(&self, layer: &LayerSpec) -> usize {
        self.inner.noted(layer)
    }

    fn validate(&self, model: &ModelSpec, prefill: &Prefill) -> Result<()> {
        if !(-1.0..=1.0).contains(&self.threshold) {
            return Err(Error::setting(
                "merge threshold",
                "a cosine, from -1 to 1",
                self.threshold,
            ));
        }
        self.inner.validate(model, prefill)
    }

    fn store(&self, layer: &LayerSpec, place: &Placement) -> Result<Box<dyn KvStore>> {
        self.inner.store(layer, place)
    }

    fn limit(&self, layer: &LayerSpec, total: usize) -> Option<usize> {
        self.inner.limit(layer, total)
    }

    fn held(&self, layer: &LayerSpec, total: usize) -> Option<Held> {
        self.inner.held(layer, total)
    }

    fn decode_slack(&self) -> Option<usize> {
        self.inner.decode_slack()
    }

    fn before(&self, at: &Step, queries: &Rows, units: &LayerUnits<'_>) -> Result<Visible> {
        self.inner.before(at, queries, units)
    }

    fn step(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Verdict> {
        self.merged(self.inner.step(at, units)?, units)
    }

    /// What is merged depends on what is dropped.
    fn ranking(&self, _at: &Step, _units: &LayerUnits<'_>) -> Result<Option<Ranking>> {
        Ok(None)
    }

    fn steps(&self, at: &[Step], units: &[LayerUnits<'_>]) -> Result<Vec<Verdict>> {
        let verdicts = self.inner.steps(at, units)?.into_iter().zip(units);
        verdicts
            .map(|(verdict, units)| self.merged(verdict, units))
            .collect()
    }
}
