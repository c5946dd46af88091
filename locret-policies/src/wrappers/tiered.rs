//! Any policy over a store with a second tier.

use locret_core::{
    Budget, Error, Held, KvCachePolicy, KvStore, LayerSpec, LayerUnits, ModelSpec, Needs,
    Placement, Positions, Prefill, Ranking, Result, Rows, Spilled, Step, Tier, Verdict, Visible,
};

/// A policy of whose units at most so many are resident; what it says may be put away
/// ([`Verdict::away`](locret_core::Verdict::away)) lies in a second tier when there is no room for it
/// ([`Spilled`]). Around anything whose units lie in another form, such as [`Quantized`](crate::Quantized).
///
/// **Cost:** a block is written once, and read whenever it is seen and not resident. Positions, and what a policy
/// carries with each unit, stay in memory: for 32-bit keys and values of 64 features, 512 bytes a unit, this is 4 bytes
/// and as many for each number that is carried.
///
/// Policies that put nothing away ([`InfLlm`](crate::InfLlm) and [`PutAway`](crate::PutAway) do) are bounded all the
/// same, by [`Error::Memory`].
#[derive(Debug, Clone)]
#[must_use]
pub struct Tiered<P> {
    inner: P,
    tier: Tier,
    resident: Budget,
    step: usize,
}

impl<P: KvCachePolicy> Tiered<P> {
    /// `inner`, of which at most `resident` is resident at any moment: so many bytes of all layers together, a step's
    /// new units included; or what so many units of each KV head take between two steps in the store of `inner`, with
    /// room for a generated one.
    pub fn new(inner: P, tier: Tier, resident: Budget) -> Self {
        Self {
            inner,
            tier,
            resident,
            step: 0,
        }
    }

    /// Room for so many new units of a step beside the units that `resident` counts, as they come: numbers, where the
    /// store makes codes of them later. Where `resident` is bytes these are all there are.
    pub fn step(self, units: usize) -> Self {
        Self {
            step: units,
            ..self
        }
    }

    /// Bytes of one layer.
    fn bytes(&self, layer: &LayerSpec, store: &dyn KvStore) -> Result<usize> {
        match self.resident {
            Budget::Units(units) => {
                let mut growth = store.growth();
                growth.bound();
                growth.append(units);
                growth.settle();
                let between = growth.bytes();
                growth.append(self.step);
                // For single tokens what is near takes room for some more.
                let mut single = store.growth();
                single.append(1);
                Ok(growth.bytes().max(between + single.bytes()))
            }
            Budget::Bytes(bytes) => Ok(bytes / layer.layers.max(1)),
            other => Err(Error::setting(
                "resident part of two tiers",
                "units or bytes",
                other,
            )),
        }
    }
}

#[deny(clippy::missing_trait_methods)]
impl<P: KvCachePolicy> KvCachePolicy for Tiered<P> {
    fn name(&self) -> String {
        format!("{} in two tiers", self.inner.name())
    }

    fn fingerprint(&self) -> String {
        // Where units are put away changes no number; how many may be resident is an error or nothing.
        format!("Tiered {{ inner: {} }}", self.inner.fingerprint())
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
        self.resident.validate(&model.layer(0))?;
        if let Budget::Ratio(ratio) = self.resident {
            let expected = "units or bytes, which do not grow with the text";
            return Err(Error::setting(
                "resident part of two tiers",
                expected,
                ratio,
            ));
        }
        self.inner.validate(model, prefill)
    }

    fn store(&self, layer: &LayerSpec, place: &Placement) -> Result<Box<dyn KvStore>> {
        let near = self.inner.store(layer, place)?;
        let bytes = self.bytes(layer, &*near)?;
        Ok(Spilled::boxed(layer, near, &self.tier, bytes))
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
        self.inner.step(at, units)
    }

    fn ranking(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Option<Ranking>> {
        self.inner.ranking(at, units)
    }

    fn steps(&self, at: &[Step], units: &[LayerUnits<'_>]) -> Result<Vec<Verdict>> {
        self.inner.steps(at, units)
    }
}
