//! Which kernels attend, and how many cubes of them.

use crate::{
    coded::CodedStore,
    kernels::{
        attention::{self, Form},
        coded_attention, tile_attention,
    },
    matrix_units,
    place::{Place, element},
    store::{CubeStore, elementwise},
    tables::Table,
};
use burn::tensor::DType as TensorType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;
use locret_core::{KvStore, LayerSpec};

/// Cubes that keep a multiprocessor busy while others wait for memory.
const RESIDENT: usize = 4;

/// Multiprocessors of a device that does not say how many it has.
const PROCESSORS: usize = 16;

/// Tiles that a part of a row's units has at least: less is not worth joining.
const TILES: usize = 4;

/// Parts of all units that keep the device busy where there are so many cubes, and so many units in a tile.
pub(crate) fn worth_joining(place: &Place, tile: usize, cubes: usize, longest: usize) -> usize {
    let hardware = &place.client.properties().hardware;
    let processors = hardware.num_streaming_multiprocessors;
    let wanted = RESIDENT * processors.map_or(PROCESSORS, |n| n as usize);
    let most = longest.div_ceil(TILES * tile);
    wanted.div_ceil(cubes).min(most).max(1)
}

/// What is attended to.
#[derive(Clone, Copy)]
pub(crate) enum Units<'a> {
    Dense(&'a CubeStore),
    Coded(&'a CodedStore),
}

impl<'a> Units<'a> {
    /// Of a store that lies here.
    pub(crate) fn of(store: &'a dyn KvStore) -> Option<Self> {
        let store = store.as_any()?;
        let dense = store.downcast_ref().map(Self::Dense);
        dense.or_else(|| store.downcast_ref().map(Self::Coded))
    }

    fn longest(self) -> usize {
        match self {
            Self::Dense(store) => store.longest(),
            Self::Coded(store) => store.lens().into_iter().max().unwrap_or(0),
        }
    }
}

/// Attention of rotated queries `[tokens, heads * dim]` over all units of a store, in as many parts as there are to
/// be; `None` where heads are too wide.
pub(crate) fn attend(
    place: &Place,
    q: CubeTensor,
    store: Units<'_>,
    table: Option<&Table>,
    layer: &LayerSpec,
    scale: f32,
    parts: Option<usize>,
) -> Option<CubeTensor> {
    let (tokens, width) = (q.meta.shape()[0], q.meta.shape()[1]);
    let (group, dim) = (layer.group(), layer.head_dim);
    let rows = tokens * group;
    let half = table.map_or(0, Table::half);
    let form = Form::new(dim, half, group, rows)?;
    let tiled = match store {
        Units::Coded(_) if !coded_attention::fits(form) => return None,
        Units::Coded(_) => None,
        Units::Dense(_) => matrix_units::form(place, layer, half, tokens),
    };
    let (block, tile) = match tiled {
        Some(tiled) => (tiled.rows(), tiled.keys),
        None => (form.rows, form.tile()),
    };
    let blocks = rows.div_ceil(block);
    let cubes = blocks * layer.kv_heads;
    let parts = parts.unwrap_or_else(|| worth_joining(place, tile, cubes, store.longest()));
    let form = Form {
        split: parts > 1,
        ..form
    };
    let out = |parts: usize| place.empty([parts * tokens, width], TensorType::F32);
    let stats = match form.split {
        true => 2 * parts * tokens * layer.heads,
        false => 1,
    };
    let (made, stats) = (out(parts), place.empty([stats], TensorType::F32));
    let [cos, sin] = match table {
        Some(table) => [table.cos.clone(), table.sin.clone()],
        // A vector, though nothing is read.
        None => [(); 2].map(|()| place.empty([4], TensorType::F32)),
    };
    let count = CubeCount::Static(blocks as u32, layer.kv_heads as u32, parts as u32);
    let cube = CubeDim::new_1d(form.units() as u32);
    match (store, tiled) {
        (Units::Dense(store), Some(tiled)) => matrix_units::attend(
            place,
            tile_attention::Form {
                split: form.split,
                ..tiled
            },
            count,
            q,
            store,
            [cos, sin, made.clone(), stats.clone()],
            scale,
        ),
        (Units::Dense(store), None) => attention::attend::launch(
            &place.client,
            count,
            cube,
            q.into_tensor_arg(),
            store.keys.clone().into_buffer_arg(),
            store.values.clone().into_buffer_arg(),
            store.bounds.clone().into_buffer_arg(),
            cos.into_buffer_arg(),
            sin.into_buffer_arg(),
            made.clone().into_buffer_arg(),
            stats.clone().into_buffer_arg(),
            scale,
            tokens as u32,
            form,
            element(store.kind()),
        ),
        (Units::Coded(store), _) => coded_attention::attend_coded::launch(
            &place.client,
            count,
            cube,
            q.into_tensor_arg(),
            store.plain.clone().into_buffer_arg(),
            store.coded.clone().into_buffer_arg(),
            store.shared.clone().into_buffer_arg(),
            store.ends.clone().into_buffer_arg(),
            store.spans.clone().into_buffer_arg(),
            cos.into_buffer_arg(),
            sin.into_buffer_arg(),
            made.clone().into_buffer_arg(),
            stats.clone().into_buffer_arg(),
            scale,
            tokens as u32,
            form,
            store.codes,
        ),
    }
    if !form.split {
        return Some(made);
    }
    let joined = out(1);
    let (count, cube) = elementwise(place, tokens * width);
    attention::join::launch(
        &place.client,
        count,
        cube,
        made.into_buffer_arg(),
        stats.into_buffer_arg(),
        joined.clone().into_buffer_arg(),
        parts as u32,
        dim,
    );
    Some(joined)
}
