//! CriticalKV: of what a scorer would keep, half by its scores, half by what values do as well.

use super::projection::OutputNorms;
use crate::{published::Published, scorers::observed};
use locret_core::{
    Error, Guard, LayerSpec, LayerUnits, ModelSpec, Needs, Positions, Result, Rows, Scorer, Scores,
    Step,
};
use std::sync::Arc;

/// CriticalKV (arXiv 2502.03805 §4) around any scorer. Half of what a head keeps is chosen by the scores alone;
/// the rest by `(score + ε) · ‖v W‖₁`, how much the unit's value becomes behind the output projection, mean over
/// the query heads of the group. What is bounded by this is the error of the layer's output.
///
/// With a budget that heads share ([`Evict::ada`](locret_core::Evict::ada)) it is CriticalAda: how many units a
/// head keeps is found by the scores, and what it keeps on its own account is chosen by them, too.
///
/// **Keeps** as many units as the scorer inside would.
///
/// **Cost:** a product of each new value with the layer's output projection, once, when its unit is born: about
/// a tenth of what the layer computes for the token anyway. One number for each unit is carried beside its score.
/// The projections are held a second time, in 16 bits where these are exact.
///
/// **Chunked prefill:** the norm depends on the unit alone; it is taken before values are quantised, and what is
/// folded into a value later ([`Merge`](crate::Merge)) does not change it. What the scorer inside loses by chunks
/// stays lost.
///
/// Scores should not be below `-ε`, where a larger value would lower them, nor weigh values themselves
/// ([`ExpectedAttention::value_norm`](crate::ExpectedAttention::value_norm)).
#[derive(Debug, Clone)]
pub struct Critical<S> {
    inner: S,
    norms: Arc<OutputNorms>,
    epsilon: f32,
}

impl<S: Scorer> Critical<S> {
    /// What is added to scores, as published.
    pub const EPSILON: f32 = 1e-4;

    /// Around `inner`, in a model that `norms` are of.
    pub fn new(inner: S, norms: impl Into<Arc<OutputNorms>>) -> Self {
        Self {
            inner,
            norms: norms.into(),
            epsilon: Self::EPSILON,
        }
    }

    /// Numbers that the scorer inside carries with a unit, or the one that stands for its score.
    fn own(&self, layer: &LayerSpec) -> usize {
        match self.inner.carries() {
            true => self.inner.carried_width(layer),
            false => 1,
        }
    }

    /// What the scorer inside says, or zeros if it need not be asked, and each unit's norm behind it.
    fn scored(&self, at: &Step, units: &LayerUnits<'_>, cut: bool) -> Result<Scores> {
        let own = self.own(&at.layer);
        let width = own + 1;
        let carries = self.inner.carries();
        let carried = (0..units.kv_heads()).map(|head| {
            let all = units.carried(head).chunks_exact(width);
            match carries {
                true => all.flat_map(|unit| &unit[..own]).copied().collect(),
                false => Vec::new(),
            }
        });
        let part = units.carrying(carried.collect());
        let inner = match (cut, carries) {
            (true, _) => Some(self.inner.score(at, &part.units())?),
            (false, true) => Some(self.inner.carry(at, &part.units())?),
            (false, false) => None,
        };
        let new = match units.incoming() {
            0 => Vec::new(),
            _ => self.norms.of(&at.layer, &observed::qkv(self, units)?.v)?,
        };
        let kv_heads = units.kv_heads();
        let lists = (0..kv_heads).map(|head| {
            let old = units
                .carried(head)
                .chunks_exact(width)
                .map(|unit| unit[own]);
            let new = new.iter().skip(head).step_by(kv_heads).copied();
            let mut list = Vec::with_capacity(units.len(head) * width);
            for (unit, norm) in old.chain(new).enumerate() {
                match &inner {
                    Some(scores) => {
                        let own = scores.head(head).get(unit * own..(unit + 1) * own);
                        let missing = || Error::policy(self.name(), "a unit without a score");
                        list.extend_from_slice(own.ok_or_else(missing)?);
                    }
                    None => list.push(0.0),
                }
                list.push(norm);
            }
            Ok(list)
        });
        Scores::wide(width, lists.collect::<Result<_>>()?)
    }
}

impl<S: Published> Published for Critical<S> {
    const POSITIONS: Positions = S::POSITIONS;
}

#[deny(clippy::missing_trait_methods)]
impl<S: Scorer> Scorer for Critical<S> {
    fn name(&self) -> String {
        format!("critical-{}", self.inner.name())
    }

    fn fingerprint(&self) -> String {
        let (inner, norms) = (self.inner.fingerprint(), self.norms.fingerprint());
        let epsilon = self.epsilon;
        format!("Critical {{ inner: {inner}, norms: {norms}, epsilon: {epsilon:?} }}")
    }

    fn needs(&self) -> Needs {
        self.inner.needs().qkv()
    }

    fn carries(&self) -> bool {
        true
    }

    fn carried_width(&self, layer: &LayerSpec) -> usize {
        self.own(layer) + 1
    }

    fn noted(&self, layer: &LayerSpec) -> usize {
        self.inner.noted(layer)
    }

    fn notes(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Option<Vec<f32>>> {
        self.inner.notes(at, units)
    }

    fn keeps_newest(&self) -> bool {
        false
    }

    fn guard(&self, units: usize) -> Guard {
        self.inner.guard(units)
    }

    fn validate(&self, model: &ModelSpec) -> Result<()> {
        self.norms.validate(model)?;
        self.inner.validate(model)
    }

    fn score(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        self.scored(at, units, true)
    }

    /// Units are chosen by more than their own scores.
    fn born(&self, _at: &Step, _units: &LayerUnits<'_>) -> Result<Option<Rows>> {
        Ok(None)
    }

    fn carry(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        self.scored(at, units, false)
    }

    fn ranks(
        &self,
        at: &Step,
        units: &LayerUnits<'_>,
        scores: &Scores,
        keeps: &[(usize, usize)],
    ) -> Result<Option<Scores>> {
        let own = self.own(&at.layer);
        let lists = scores
            .heads()
            .iter()
            .zip(keeps)
            .map(|(list, (keep, alone))| {
                let numbers = || list.chunks_exact(own + 1);
                let plain: Vec<f32> = numbers().map(|unit| unit[0]).collect();
                let weighed = numbers().map(|unit| (unit[0] + self.epsilon) * unit[own]);
                let mut ranks: Vec<f32> = weighed.collect();
                let first = (keep / 2).max(1).max(*alone).min(*keep);
                for unit in units.compute().select(&plain, first, &[])? {
                    // Below what is protected, which stands at infinity.
                    ranks[unit as usize] = f32::MAX;
                }
                Ok(ranks)
            });
        Scores::per_head(lists.collect::<Result<_>>()?).map(Some)
    }
}
