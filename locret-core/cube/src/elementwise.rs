//! What a layer does between its products, one launch each.

use crate::{
    kernels::{
        elementwise::{self, From, ROW_UNITS, Turn},
        largest, surprisal,
    },
    place::{Place, made},
    store,
    tables::Tables,
};
use burn::tensor::DType as TensorType;
use cubecl::prelude::*;
use locret_core::{Error, Result, Rotation, Rows, TableRows, check_tokens};

pub(crate) fn norm(place: &Place, x: &Rows, gain: &Rows, epsilon: f32) -> Result<Rows> {
    Ok(normed(place, x, None, gain, epsilon)?.0)
}

/// `x += y`, and the norm of the sum.
pub(crate) fn add_norm(
    place: &Place,
    x: &mut Rows,
    y: &Rows,
    gain: &Rows,
    epsilon: f32,
) -> Result<Rows> {
    y.expect("rows to be added", x.shape())?;
    let (normed, sum) = normed(place, x, Some(y), gain, epsilon)?;
    *x = sum;
    Ok(normed)
}

/// The norm, and what it is one of.
fn normed(
    place: &Place,
    x: &Rows,
    y: Option<&Rows>,
    gain: &Rows,
    epsilon: f32,
) -> Result<(Rows, Rows)> {
    gain.expect("gain of a norm", [1, x.width()])?;
    if x.rows() == 0 {
        return Ok((x.clone(), x.clone()));
    }
    let out = || place.empty(x.shape(), TensorType::F32);
    let own = place.rows(x)?;
    let (added, sum, normed) = match y {
        Some(y) => (place.rows(y)?, out(), out()),
        None => (own.clone(), place.empty([1], TensorType::F32), out()),
    };
    elementwise::norm::launch(
        &place.client,
        store::spread(x.rows()),
        CubeDim::new_1d(ROW_UNITS as u32),
        own.into_tensor_arg(),
        added.into_tensor_arg(),
        place.rows(gain)?.into_buffer_arg(),
        sum.clone().into_buffer_arg(),
        normed.clone().into_buffer_arg(),
        epsilon,
        y.is_some(),
    );
    let sum = match y {
        Some(_) => made(sum),
        None => x.clone(),
    };
    Ok((made(normed), sum))
}

pub(crate) fn gate(place: &Place, gate_up: &Rows) -> Result<Rows> {
    let [rows, width] = gate_up.shape();
    if !width.is_multiple_of(2) {
        return Err(Error::shape("gates and ups", "an even width", width));
    }
    if rows * width == 0 {
        return Ok(burn::tensor::Tensor::zeros([rows, width / 2], &place.device).into());
    }
    let out = place.empty([rows, width / 2], TensorType::F32);
    let (count, dim) = store::elementwise(place, rows * width / 2);
    elementwise::gate::launch(
        &place.client,
        count,
        dim,
        place.rows(gate_up)?.into_tensor_arg(),
        out.clone().into_buffer_arg(),
    );
    Ok(made(out))
}

pub(crate) fn rotate(place: &Place, tables: &Tables, x: Rows, by: &Rotation<'_>) -> Result<Rows> {
    by.check(x.shape())?;
    let [tokens, width] = x.shape();
    if tokens * width == 0 {
        return Ok(x);
    }
    let heads = width / by.head_dim;
    let (from, first, rows) = match by.rows {
        TableRows::From(first) if first.windows(2).all(|two| two[0] == two[1]) => {
            (From::First, first[0], None)
        }
        TableRows::From(first) => {
            let rows = first.iter().map(|row| *row as u32).collect();
            (From::Groups(heads / first.len()), 0, Some(rows))
        }
        TableRows::Each(rows) => (From::Each, 0, Some(rows.to_vec())),
    };
    let rows = match rows {
        Some(rows) => place.indices(&rows),
        None => place.empty([1], TensorType::U32),
    };
    let table = tables.get(place, by.table);
    let turn = Turn {
        dim: by.head_dim,
        half: table.half(),
        from,
        inverse: by.inverse,
    };
    let out = place.empty([tokens, width], TensorType::F32);
    let (count, dim) = store::elementwise(place, tokens * heads * (turn.dim - turn.half));
    elementwise::rotate::launch(
        &place.client,
        count,
        dim,
        place.rows(&x)?.into_tensor_arg(),
        table.cos.into_buffer_arg(),
        table.sin.into_buffer_arg(),
        rows.into_buffer_arg(),
        out.clone().into_buffer_arg(),
        first as u32,
        by.table.factor(),
        turn,
    );
    Ok(made(out))
}

/// The number of the largest of each row, if there is one that is finite; `None` of so many that a float does not count
/// them.
pub(crate) fn largest(place: &Place, rows: &Rows) -> Result<Option<Vec<Option<u32>>>> {
    let [many, width] = rows.shape();
    if width == 0 || width >= 1 << f32::MANTISSA_DIGITS {
        return Ok(None);
    }
    if many == 0 {
        return Ok(Some(Vec::new()));
    }
    let out = place.empty([many, 2], TensorType::F32);
    largest::largest::launch(
        &place.client,
        store::spread(many),
        CubeDim::new_1d(largest::UNITS as u32),
        place.rows(rows)?.into_tensor_arg(),
        out.clone().into_buffer_arg(),
    );
    let found = made(out).into_values()?;
    let of_row = |row: &[f32]| row[1].is_finite().then_some(row[0] as u32);
    Ok(Some(found.chunks_exact(2).map(of_row).collect()))
}

/// `-ln` of the softmax weight of a number of each row.
pub(crate) fn surprisal(place: &Place, rows: &Rows, of: &[u32]) -> Result<Vec<f32>> {
    let [many, width] = rows.shape();
    check_tokens([many, width], of)?;
    if many == 0 {
        return Ok(Vec::new());
    }
    let out = place.empty([many, 1], TensorType::F32);
    surprisal::surprisal::launch(
        &place.client,
        store::spread(many),
        CubeDim::new_1d(largest::UNITS as u32),
        place.rows(rows)?.into_tensor_arg(),
        place.indices(of).into_buffer_arg(),
        out.clone().into_buffer_arg(),
    );
    made(out).into_values()
}
