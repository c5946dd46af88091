//! The third place where things are computed.

use crate::{
    attention::{self, Units},
    coded::CodedStore,
    elementwise,
    kernels::observe::Gather,
    lists::CubeLists,
    matrix::{self, CubeMatrix},
    matrix_units::{self, Parts, Tiles},
    observe::{Keys, Observing},
    perceptron::CubePerceptron,
    place::{Place, made},
    store::CubeStore,
    tables::{Table, Tables},
};
use burn::tensor::Device;
use locret_core::{
    Attention, Compute, DType, Error, KvStore, LayerSpec, Matrix, Observation, Observe, Observed,
    Ops, Perceptron, Quantization, Result, Rotation, Rows, Survey, UnitLists, Weight,
    check_factors,
};
use std::sync::Arc;

/// Computes with fused kernels on a device of Burn's CubeCL backends, and with Burn's operations where it has none.
#[derive(Debug)]
pub struct Cube {
    place: Arc<Place>,
    ops: Ops,
    tables: Tables,
    parts: Option<usize>,
}

impl Cube {
    /// On `device`.
    ///
    /// # Errors
    /// [`Error::Setting`] for a device of another kind; [`Error::Device`] for one that is not there.
    pub fn new(device: &Device) -> Result<Self> {
        Ok(Self {
            place: Arc::new(Place::new(device)?),
            ops: Ops::new(device),
            tables: Tables::default(),
            parts: None,
        })
    }

    /// The same, with the units of every head attended to in so many parts, rather than in as many as keep the
    /// device busy.
    pub fn in_parts(self, parts: usize) -> Self {
        Self {
            parts: Some(parts.max(1)),
            ..self
        }
    }

    /// What keys are rotated by as they are loaded.
    fn table(&self, over: &Attention<'_>) -> Option<Table> {
        let table = over.rotation?;
        Some(self.tables.get(&self.place, table))
    }

    /// The keys of a store that lies here, where queries see all of it.
    fn keys(&self, over: &Attention<'_>) -> Option<Keys> {
        let units = Units::of(over.store).filter(|_| over.sight.is_none())?;
        Some(match units {
            Units::Dense(store) => Keys {
                rows: store.keys.clone(),
                bounds: store.bounds.clone(),
                lens: (0..over.layer.kv_heads)
                    .map(|head| store.len(head))
                    .collect(),
            },
            // Decoded for this once.
            Units::Coded(store) => {
                let lens = store.lens();
                let bounds = lens.iter().scan(0, |first, len| {
                    let of_head = [*first, *len as u32];
                    *first += *len as u32;
                    Some(of_head)
                });
                let bounds: Vec<u32> = bounds.flatten().collect();
                Keys {
                    rows: store.numbers(0..lens.len(), false),
                    bounds: self.place.indices(&bounds),
                    lens,
                }
            }
        })
    }

    fn observing<'a>(
        &'a self,
        q: &Rows,
        over: &Attention<'_>,
        count: usize,
        keys: &'a Keys,
        table: Option<&'a Table>,
    ) -> Result<Observing<'a>> {
        Ok(Observing {
            place: &self.place,
            layer: over.layer,
            q: self.place.rows(q)?,
            count,
            keys,
            table,
            scale: over.scale,
            parts: self.parts,
        })
    }

    /// The same, with products and attention of chunks (more than 8 tokens) by the device's matrix units (tensor cores):
    /// on tiles of 16-bit numbers, each of them in so many parts, with sums of 32 bits.
    ///
    /// They are asked for and not taken by themselves, since results differ by more than the rounding of sums
    /// ([`Parts`] says how much), and since these kernels have not run on a device that has such units.
    ///
    /// # Errors
    /// [`Error::NotSupported`] by a device without them: all but NVIDIA's from compute capability 8.0 on, by CUDA.
    pub fn with_matrix_units(self, parts: Parts) -> Result<Self> {
        if !matrix_units::available(&self.place) {
            return Err(Error::NotSupported {
                operation: "products of 16-bit tiles in matrix units",
                implementer: format!("this device ({:?})", self.place.device),
            });
        }
        Ok(self.in_tiles(parts, true))
    }

    /// What [`with_matrix_units`](Self::with_matrix_units) computes, on any device: the same kernels, in smaller tiles
    /// that are multiplied by plain loops. Slow: it shows what the rounding does, and whether the kernels are right.
    pub fn with_modelled_matrix_units(self, parts: Parts) -> Self {
        self.in_tiles(parts, false)
    }

    fn in_tiles(self, parts: Parts, matrix_units: bool) -> Self {
        let tiles = Tiles {
            parts,
            matrix_units,
        };
        Self {
            place: Arc::new(self.place.in_tiles(tiles)),
            ..self
        }
    }
}

impl Compute for Cube {
    fn name(&self) -> &'static str {
        "GPU kernels"
    }

    fn device(&self) -> &Device {
        &self.place.device
    }

    fn rows(&self, values: Vec<f32>, width: usize) -> Result<Rows> {
        self.ops.rows(values, width)
    }

    fn matrix(&self, parts: Vec<Weight>) -> Result<Arc<dyn Matrix>> {
        Ok(Arc::new(CubeMatrix::new(&self.place, &parts)?))
    }

    fn computes_with(&self, dtype: DType) -> bool {
        matrix::kind(dtype).is_some()
    }

    fn perceptron(&self, first: Weight, second: Vec<f32>) -> Result<Arc<dyn Perceptron>> {
        match matrix::kind(first.dtype) {
            Some(_) => Ok(Arc::new(CubePerceptron::new(&self.place, first, &second)?)),
            None => self.ops.perceptron(first, second),
        }
    }

    fn norm(&self, x: &Rows, gain: &Rows, epsilon: f32) -> Result<Rows> {
        elementwise::norm(&self.place, x, gain, epsilon)
    }

    fn add_norm(&self, x: &mut Rows, y: &Rows, gain: &Rows, epsilon: f32) -> Result<Rows> {
        elementwise::add_norm(&self.place, x, y, gain, epsilon)
    }

    fn gate(&self, gate_up: &Rows) -> Result<Rows> {
        elementwise::gate(&self.place, gate_up)
    }

    fn rotate(&self, x: Rows, by: &Rotation<'_>) -> Result<Rows> {
        elementwise::rotate(&self.place, &self.tables, x, by)
    }

    fn attend(&self, q: Rows, over: &Attention<'_>) -> Result<Rows> {
        let Some(units) = Units::of(over.store).filter(|_| over.sight.is_none()) else {
            return self.ops.attend(q, over);
        };
        over.validate(&q)?;
        if q.rows() == 0 {
            return Ok(q);
        }
        let table = self.table(over);
        let rows = self.place.rows(&q)?;
        let attended = attention::attend(
            &self.place,
            rows,
            units,
            table.as_ref(),
            &over.layer,
            over.scale,
            self.parts,
        );
        match attended {
            Some(attended) => Ok(made(attended)),
            None => self.ops.attend(q, over),
        }
    }

    fn observe(
        &self,
        q: &Rows,
        over: &Attention<'_>,
        what: Observe,
        factors: Option<&[f32]>,
    ) -> Result<Observed> {
        let queries = what.queries.count(q.rows());
        let gather = match what.what {
            // All of it is seen where it stands.
            Observation::Weights | Observation::NearWeights => Some(Gather::Sum),
            Observation::MaxWeights | Observation::MaxWeightsByInput => Some(Gather::Largest),
            Observation::MaxLogits => Some(Gather::Logits),
            _ => None,
        };
        let keys = match gather {
            Some(_) if queries > 0 => self.keys(over),
            _ => None,
        };
        let (Some(gather), Some(keys)) = (gather, keys) else {
            return self.ops.observe(q, over, what, factors);
        };
        over.validate(q)?;
        check_factors(what.what, queries, factors)?;
        let table = self.table(over);
        let observing = self.observing(q, over, queries, &keys, table.as_ref())?;
        match observing.gathered(gather, factors) {
            Some(per_head) => Ok(Observed {
                per_head: per_head?,
                queries,
                what: what.what,
            }),
            None => self.ops.observe(q, over, what, factors),
        }
    }

    fn survey(&self, q: &Rows, over: &Attention<'_>, last: usize) -> Result<Survey> {
        // Everything is seen, whatever attention is to see.
        let all = Attention {
            sight: None,
            ..*over
        };
        let queries = last.min(q.rows());
        let Some(keys) = self.keys(&all).filter(|_| queries > 0) else {
            return self.ops.survey(q, over, last);
        };
        over.validate(q)?;
        let table = self.table(over);
        let observing = self.observing(q, over, queries, &keys, table.as_ref())?;
        match observing.survey() {
            Some(survey) => survey.map(|[units, distances]| Survey { units, distances }),
            None => self.ops.survey(q, over, last),
        }
    }

    fn largest(&self, rows: &Rows) -> Result<Option<Vec<Option<u32>>>> {
        elementwise::largest(&self.place, rows)
    }

    fn surprisal(&self, rows: &Rows, of: &[u32]) -> Result<Option<Vec<f32>>> {
        elementwise::surprisal(&self.place, rows, of).map(Some)
    }

    fn unit_lists(&self, kv_heads: usize) -> Option<Box<dyn UnitLists>> {
        Some(Box::new(CubeLists::new(&self.place, kv_heads)))
    }

    fn store(&self, layer: &LayerSpec, dtype: DType) -> Result<Box<dyn KvStore>> {
        match CubeStore::new(&self.place, layer, dtype) {
            Some(store) => Ok(Box::new(store)),
            None => Err(Error::NotSupported {
                operation: "keeping units in this type",
                implementer: format!("this device ({dtype})"),
            }),
        }
    }

    fn coded_store(&self, layer: &LayerSpec, config: Quantization) -> Result<Box<dyn KvStore>> {
        match CodedStore::new(&self.place, layer, config)? {
            Some(store) => Ok(Box::new(store)),
            // A row's codes are not whole words.
            None => self.ops.coded_store(layer, config),
        }
    }
}
