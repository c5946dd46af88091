//! Chunks by a device's matrix units.

use crate::{
    kernels::{
        product::Kind,
        tile_attention::{self, Form},
        tile_product,
    },
    matrix::FEW,
    place::{Place, element},
    store::CubeStore,
};
use burn_cubecl::tensor::CubeTensor;
use cubecl::{
    ir::{
        ElemType, FloatKind,
        features::{MmaConfig, Plane},
    },
    prelude::*,
};
use locret_core::LayerSpec;

/// Shared memory that every device has.
const SHARED: usize = 32 * 1024;

/// As how many numbers of 16 bits (bf16) matrix units take a number of 32 bits.
///
/// Sums have 32 bits in any case. How far products are from those of 32-bit numbers, in parts of the sum of all
/// products without their signs:
///
/// | weights | [`One`](Self::One) | [`Two`](Self::Two) |
/// |---|--:|--:|
/// | `bf16` | 2⁻⁸ | 2⁻¹⁶ |
/// | `f16` | 2⁻⁷ | 2⁻¹⁵ |
/// | others | 2⁻⁷ | 3 · 2⁻¹⁶ |
///
/// at most; signs differ, so that it is much less of a long sum. Neither overflows: bf16 has the range of 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Parts {
    /// The nearest one: what models in bf16 are computed with elsewhere. A weight of 16 bits that is no bf16 loses
    /// three, and one of eight bits is rounded as much as its code was.
    One,
    /// The sum of two, for two products of a bf16 weight and three of others. As exact as sums of 32 bits are in
    /// most, and twice or three times the work.
    Two,
}

impl Parts {
    fn count(self) -> usize {
        match self {
            Self::One => 1,
            Self::Two => 2,
        }
    }
}

/// How chunks are computed in tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tiles {
    pub(crate) parts: Parts,
    /// By the device's matrix units, and otherwise by loops.
    pub(crate) matrix_units: bool,
}

/// Whether a device has the matrix units that kernels are written for: `mma.m16n8k16` on bf16, `ldmatrix`, and planes of
/// 32 units.
pub(crate) fn available(place: &Place) -> bool {
    let properties = place.client.properties();
    let (features, hardware) = (&properties.features, &properties.hardware);
    let [bf16, f32] = [FloatKind::BF16, FloatKind::F32].map(ElemType::Float);
    let product = MmaConfig {
        a_type: bf16,
        b_type: bf16,
        cd_type: f32,
        m: 16,
        n: 8,
        k: 16,
    };
    features.matmul.mma.contains(&product)
        && features.matmul.ldmatrix.contains(&bf16)
        && features.plane.contains(Plane::Ops)
        && features.plane.contains(Plane::Sync)
        && [hardware.plane_size_min, hardware.plane_size_max] == [32; 2]
}

/// Bytes of shared memory that a cube may have.
fn shared(place: &Place, tiles: Tiles) -> usize {
    match tiles.matrix_units {
        true => place.client.properties().hardware.max_shared_memory_size,
        false => SHARED,
    }
}

/// Length of the vectors in which rows of floats are read that begin at multiples of all of these numbers.
fn vector(tensor: &CubeTensor, numbers: &[usize]) -> usize {
    let begin = tensor.handle.offset_start.unwrap_or(0) as usize;
    let whole = begin.is_multiple_of(4 * tensor.dtype.size())
        && numbers.iter().all(|number| number.is_multiple_of(4));
    if whole { 4 } else { 1 }
}

/// Columns from `first` on of a product, with one part of a matrix: what [`product::many`](crate::kernels::product::many)
/// makes. `out` is `[rows, across]`.
pub(crate) fn product(
    place: &Place,
    tiles: Tiles,
    x: &CubeTensor,
    [words, scales, out]: [&CubeTensor; 3],
    [rows, eights, first, across]: [u32; 4],
    kind: Kind,
) {
    let form = tile_product::Form::new(kind, tiles.parts.count(), tiles.matrix_units);
    debug_assert!(form.shared() <= shared(place, tiles));
    let tokens = x.meta.shape()[0];
    tile_product::product::launch(
        &place.client,
        CubeCount::Static(
            tokens.div_ceil(form.rows()) as u32,
            rows.div_ceil(form.outputs() as u32),
            1,
        ),
        CubeDim::new_1d(form.units() as u32),
        vector(x, &[x.meta.shape()[1], x.meta.strides()[0]]),
        x.clone().into_tensor_arg(),
        words.clone().into_buffer_arg(),
        scales.clone().into_buffer_arg(),
        out.clone().into_buffer_arg(),
        rows,
        eights,
        first,
        across,
        kind,
        form,
    );
}

/// The form of attention in tiles; `None` for few tokens, and where heads are too wide for it.
pub(crate) fn form(place: &Place, layer: &LayerSpec, half: usize, tokens: usize) -> Option<Form> {
    let tiles = place.tiles.filter(|_| tokens > FEW)?;
    Form::new(
        layer.head_dim,
        half,
        layer.group(),
        tiles.parts.count(),
        tiles.matrix_units,
        shared(place, tiles),
    )
}

/// Attention, with the arguments of [`attention::attend`](crate::kernels::attention::attend).
pub(crate) fn attend(
    place: &Place,
    form: Form,
    cubes: CubeCount,
    q: CubeTensor,
    store: &CubeStore,
    [cos, sin, made, stats]: [CubeTensor; 4],
    scale: f32,
) {
    let (tokens, width) = (q.meta.shape()[0], q.meta.shape()[1]);
    let of_q = vector(&q, &[width, form.dim, q.meta.strides()[0]]);
    let of_units = vector(&store.keys, &[form.dim, form.half]);
    tile_attention::attend::launch(
        &place.client,
        cubes,
        CubeDim::new_1d(form.units() as u32),
        of_units,
        of_q,
        q.into_tensor_arg(),
        store.keys.clone().into_buffer_arg(),
        store.values.clone().into_buffer_arg(),
        store.bounds.clone().into_buffer_arg(),
        cos.into_buffer_arg(),
        sin.into_buffer_arg(),
        made.into_buffer_arg(),
        stats.into_buffer_arg(),
        scale,
        tokens as u32,
        form,
        element(store.kind()),
    );
}
