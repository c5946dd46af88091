//! Which kernels observe attention, and how many cubes of them.

use crate::{
    attention::worth_joining,
    kernels::{
        attention::{Form, HIDDEN},
        observe::{self, Gather},
    },
    place::{Place, element, made},
    tables::Table,
};
use burn::tensor::DType as TensorType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;
use locret_core::{LayerSpec, Result};

/// Keys of a layer, as attention reads them.
pub(crate) struct Keys {
    /// `[rows, dim]`
    pub(crate) rows: CubeTensor,
    /// First row and number of units of each head.
    pub(crate) bounds: CubeTensor,
    /// Units of each head.
    pub(crate) lens: Vec<usize>,
}

impl Keys {
    fn longest(&self) -> usize {
        self.lens.iter().copied().max().unwrap_or(0)
    }

    fn units(&self) -> usize {
        self.lens.iter().sum()
    }
}

/// Queries that are observed: the last `count` of `[tokens, heads * dim]`, of which there is at least one.
pub(crate) struct Observing<'a> {
    pub(crate) place: &'a Place,
    pub(crate) layer: LayerSpec,
    pub(crate) q: CubeTensor,
    pub(crate) count: usize,
    pub(crate) keys: &'a Keys,
    pub(crate) table: Option<&'a Table>,
    pub(crate) scale: f32,
    /// Parts of the units of a head, where somebody has said how many.
    pub(crate) parts: Option<usize>,
}

impl Observing<'_> {
    /// What is gathered, by the heads that it is gathered for; `None` where heads are too wide. The largest weights
    /// are multiplied by a factor of each query.
    pub(crate) fn gathered(
        &self,
        gather: Gather,
        factors: Option<&[f32]>,
    ) -> Option<Result<Vec<Vec<f32>>>> {
        let form = self.form()?;
        let heads = gather.heads(self.layer.group());
        let numbers = heads * self.keys.units();
        let out = self.place.empty([1, numbers], TensorType::F32);
        let (stats, parts) = match gather {
            Gather::Logits => (self.place.empty([1], TensorType::F32), 1),
            _ => self.tops(form),
        };
        let factors = match (gather, factors) {
            (Gather::Largest, Some(factors)) => self.place.list(factors, TensorType::F32),
            (Gather::Largest, None) => self.place.list(&vec![1.0f32; self.count], TensorType::F32),
            _ => self.place.empty([1], TensorType::F32),
        };
        self.by_unit(form, gather, &stats, parts, factors, &out);
        let lists = self.read(out, heads, 1).map(|mut lists| {
            if gather == Gather::Logits {
                let all = lists.iter_mut().flatten();
                all.filter(|x| **x <= HIDDEN)
                    .for_each(|x| *x = f32::NEG_INFINITY);
            }
            lists
        });
        Some(lists)
    }

    /// Sums of weights by unit and by distance, by query head; `None` where heads are too wide.
    pub(crate) fn survey(&self) -> Option<Result<[Vec<Vec<f32>>; 2]>> {
        let form = self.form()?;
        let (heads, units) = (self.layer.group(), self.keys.units());
        let out = self.place.empty([1, 2 * heads * units], TensorType::F32);
        let (stats, parts) = self.tops(form);
        let factors = self.place.empty([1], TensorType::F32);
        self.by_unit(form, Gather::Sum, &stats, parts, factors, &out);
        let [cos, sin] = self.angles();
        observe::by_distance::launch(
            &self.place.client,
            self.tiles(form),
            CubeDim::new_1d(form.units() as u32),
            self.q.clone().into_tensor_arg(),
            self.keys.rows.clone().into_buffer_arg(),
            self.keys.bounds.clone().into_buffer_arg(),
            cos.into_buffer_arg(),
            sin.into_buffer_arg(),
            stats.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            self.scale,
            self.tokens() as u32,
            self.count as u32,
            parts as u32,
            (heads * units) as u32,
            form,
            element(self.keys.rows.dtype),
        );
        Some(self.read(out, heads, 2).map(|mut units| {
            let distances = units.split_off(self.layer.heads);
            [units, distances]
        }))
    }

    fn tokens(&self) -> usize {
        self.q.meta.shape()[0]
    }

    fn form(&self) -> Option<Form> {
        let (half, group) = (self.table.map_or(0, Table::half), self.layer.group());
        Form::new(self.layer.head_dim, half, group, self.count * group)
    }

    fn angles(&self) -> [CubeTensor; 2] {
        match self.table {
            Some(table) => [table.cos.clone(), table.sin.clone()],
            None => [(); 2].map(|()| self.place.empty([1], TensorType::F32)),
        }
    }

    /// Tiles of the longest head's units.
    fn tiles(&self, form: Form) -> CubeCount {
        let tiles = self.keys.longest().div_ceil(form.tile());
        let across = tiles.clamp(1, 1 << 15);
        CubeCount::Static(
            across as u32,
            self.layer.kv_heads as u32,
            tiles.div_ceil(across) as u32,
        )
    }

    /// What softmaxes divide by, in so many parts.
    fn tops(&self, form: Form) -> (CubeTensor, usize) {
        let rows = self.count * self.layer.group();
        let (blocks, heads) = (rows.div_ceil(form.rows), self.layer.kv_heads);
        let parts = self.parts.unwrap_or_else(|| {
            worth_joining(self.place, form.tile(), blocks * heads, self.keys.longest())
        });
        let form = Form {
            split: parts > 1,
            ..form
        };
        let stats = self
            .place
            .empty([2 * parts * heads * rows], TensorType::F32);
        let [cos, sin] = self.angles();
        observe::tops::launch(
            &self.place.client,
            CubeCount::Static(blocks as u32, heads as u32, parts as u32),
            CubeDim::new_1d(form.units() as u32),
            self.q.clone().into_tensor_arg(),
            self.keys.rows.clone().into_buffer_arg(),
            self.keys.bounds.clone().into_buffer_arg(),
            cos.into_buffer_arg(),
            sin.into_buffer_arg(),
            stats.clone().into_buffer_arg(),
            self.scale,
            self.tokens() as u32,
            self.count as u32,
            form,
            element(self.keys.rows.dtype),
        );
        (stats, parts)
    }

    fn by_unit(
        &self,
        form: Form,
        gather: Gather,
        stats: &CubeTensor,
        parts: usize,
        factors: CubeTensor,
        out: &CubeTensor,
    ) {
        let [cos, sin] = self.angles();
        observe::by_unit::launch(
            &self.place.client,
            self.tiles(form),
            CubeDim::new_1d(form.units() as u32),
            self.q.clone().into_tensor_arg(),
            self.keys.rows.clone().into_buffer_arg(),
            self.keys.bounds.clone().into_buffer_arg(),
            cos.into_buffer_arg(),
            sin.into_buffer_arg(),
            stats.clone().into_buffer_arg(),
            factors.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            self.scale,
            self.tokens() as u32,
            self.count as u32,
            parts as u32,
            form,
            gather,
            element(self.keys.rows.dtype),
        );
    }

    /// Lists of `times` outputs, by KV head and by `heads` of each: the one copy to the host.
    fn read(&self, out: CubeTensor, heads: usize, times: usize) -> Result<Vec<Vec<f32>>> {
        let all = made(out).into_values()?;
        let mut left = &all[..];
        let lens = (0..times).flat_map(|_| &self.keys.lens);
        let lens = lens.flat_map(|len| std::iter::repeat_n(*len, heads));
        let list = |len: usize| {
            let (list, rest) = left.split_at(len);
            left = rest;
            list.to_vec()
        };
        Ok(lens.map(list).collect())
    }
}
