//! Which kernels there are, and for what they are made.

use super::{SHARED, Writer, buffer, settings, tensor};
use crate::{
    kernels::{
        attention::{self as numbers, Form},
        coded_attention,
        codes::{self, Codes, TURNING},
        elementwise::{self, From, ROW_UNITS, Turn},
        heads, largest, lists,
        observe::{self, Gather},
        product::{self, FEW_UNITS, Kind, PITCH, TILE, TILE_UNITS},
        surprisal, tile_attention, tile_product, units as arena,
    },
    place::element,
};
use burn::tensor::DType as TensorType;

/// Types of units.
const FLOATS: [TensorType; 3] = [TensorType::F32, TensorType::F16, TensorType::BF16];

/// Units of a cube that takes a number each.
const EACH: usize = 256;

/// What a kernel is given: a tensor, a buffer, or a number.
macro_rules! given {
    (tensor) => {
        tensor()
    };
    (buffer) => {
        buffer()
    };
    (number) => {
        ()
    };
}

/// Adds a kernel: its name, the units and the shared memory of a cube, how it is made, what it is given, and what it is
/// made for.
macro_rules! add {
    ($to:ident, $name:expr, $units:expr, $shared:expr, $new:expr,
     [$($given:ident)*] $(, $of:expr)* $(,)?) => {{
        let (properties, target) = ($to.properties.clone(), $to.target.clone());
        let kernel = $new(settings($units), properties, target, $(given!($given),)* $($of),*);
        $to.add($name, $units, $shared, kernel)?;
    }};
}

/// The form of attention, in parts if a cube has all rows.
fn form(dim: usize, half: usize, group: usize, rows: usize) -> Result<Form, String> {
    let form = Form::new(dim, half, group, rows);
    let form = form.ok_or_else(|| format!("attention over heads of {dim}: no form"))?;
    Ok(Form {
        split: rows <= form.rows,
        ..form
    })
}

/// Attention over numbers, with and without tiles.
pub(super) fn attention(to: &mut Writer) -> Result<(), String> {
    for dtype in FLOATS {
        for (what, dim, half, group, rows) in [
            // Llama-3.1-8B: a chunk, compact and not, and a decoded token.
            ("chunk of heads of 128", 128, 0, 4, 4096),
            ("rotated chunk of heads of 128", 128, 64, 4, 4096),
            ("token of heads of 128", 128, 0, 4, 4),
            // SmolLM2-135M.
            ("chunk of heads of 64", 64, 0, 3, 3072),
            // Phi-3-mini.
            ("chunk of heads of 96", 96, 0, 1, 1024),
        ] {
            let form = form(dim, half, group, rows)?;
            add!(
                to,
                format!("attention, {what}, {dtype:?}"),
                form.units(),
                form.shared(),
                numbers::attend::Attend::new,
                [tensor buffer buffer buffer buffer buffer buffer buffer number number],
                form,
                element(dtype),
            );
        }
    }
    for dtype in [TensorType::F16, TensorType::BF16] {
        for parts in [1, 2] {
            for (what, half, split) in [
                ("chunk", 0, false),
                ("rotated chunk", 64, false),
                ("part of a chunk", 0, true),
            ] {
                // Llama-3.1-8B.
                let form = tile_attention::Form::new(128, half, 4, parts, true, SHARED);
                let Some(form) = form else {
                    return Err(format!("attention in tiles, {what}: no form"));
                };
                let form = tile_attention::Form { split, ..form };
                add!(
                    to,
                    format!("tiles, attention of a {what}, {dtype:?} in {parts}"),
                    form.units(),
                    form.shared(),
                    tile_attention::attend::Attend::new,
                    [tensor buffer buffer buffer buffer buffer buffer buffer number number],
                    4,
                    4,
                    form,
                    element(dtype),
                );
            }
        }
    }
    add!(
        to,
        "attention, joined",
        EACH,
        0,
        numbers::join::Join::new,
        [buffer buffer buffer number],
        128,
    );
    Ok(())
}

/// Units that come, are moved together, and are read.
pub(super) fn units(to: &mut Writer) -> Result<(), String> {
    for dtype in FLOATS {
        add!(
            to,
            format!("append, {dtype:?}"),
            EACH,
            0,
            arena::append::Append::new,
            [tensor tensor buffer buffer buffer],
            128,
            element(dtype),
        );
        add!(
            to,
            format!("compaction, {dtype:?}"),
            EACH,
            0,
            arena::copy::Copy::new,
            [buffer buffer buffer buffer buffer buffer buffer],
            128,
            true,
            element(dtype),
        );
    }
    Ok(())
}

/// What queries pay: H2O's 512 newest ones, SnapKV's window, of Llama-3.1-8B.
pub(super) fn observed(to: &mut Writer) -> Result<(), String> {
    for dtype in [TensorType::F32, TensorType::BF16] {
        let form = form(128, 64, 4, 2048)?;
        // A number of each lane in place of a weight of each key.
        let weights = form.rows * (form.tile() + 1);
        let tops = form.shared() - 4 * weights + 4 * form.rows * numbers::ACROSS;
        add!(
            to,
            format!("observed, softmax, {dtype:?}"),
            form.units(),
            tops,
            observe::tops::Tops::new,
            [tensor buffer buffer buffer buffer buffer number number number],
            form,
            element(dtype),
        );
        for gather in [Gather::Sum, Gather::Largest, Gather::Logits] {
            add!(
                to,
                format!("observed, {gather:?}, {dtype:?}"),
                form.units(),
                form.shared(),
                observe::by_unit::ByUnit::new,
                [tensor buffer buffer buffer buffer buffer buffer buffer number number number number],
                form,
                gather,
                element(dtype),
            );
        }
        add!(
            to,
            format!("observed, by distance, {dtype:?}"),
            form.units(),
            form.shared(),
            observe::by_distance::ByDistance::new,
            [tensor buffer buffer buffer buffer buffer buffer number number number number number],
            form,
            element(dtype),
        );
    }
    Ok(())
}

/// Units as codes: made, moved, read and attended to.
pub(super) fn codes(to: &mut Writer) -> Result<(), String> {
    let plain = Codes {
        dim: 128,
        bits: 4,
        width: 32,
        run: 0,
        block: 1,
    };
    for (what, codes) in [
        ("4 bit", plain),
        ("8 bit", Codes { bits: 8, ..plain }),
        (
            "3 bit, turned",
            Codes {
                bits: 3,
                block: 128,
                ..plain
            },
        ),
        (
            "2 bit in runs, turned",
            Codes {
                bits: 2,
                run: 32,
                block: 128,
                ..plain
            },
        ),
    ] {
        for (of, half, rows) in [("chunk", 64, 4096), ("token", 0, 4)] {
            let form = form(128, half, 4, rows)?;
            add!(
                to,
                format!("attention, {of}, {what}"),
                form.units(),
                form.shared() + 4 * form.tile(),
                coded_attention::attend_coded::AttendCoded::new,
                [tensor buffer buffer buffer buffer buffer buffer buffer buffer buffer number number],
                form,
                codes,
            );
        }
        if codes.block > 1 {
            add!(
                to,
                format!("codes, turned, {what}"),
                TURNING,
                8 * codes.dim,
                codes::turn_plain::TurnPlain::new,
                [buffer buffer],
                codes,
            );
            add!(
                to,
                format!("codes, turned back, {what}"),
                TURNING,
                4 * codes.dim,
                codes::turn_read::TurnRead::new,
                [buffer buffer number],
                codes,
            );
        }
        if codes.run > 0 {
            add!(
                to,
                format!("codes, steps of runs, {what}"),
                EACH,
                0,
                codes::shared_pairs::SharedPairs::new,
                [buffer buffer buffer buffer],
                codes,
            );
        }
        add!(
            to,
            format!("codes, steps, {what}"),
            EACH,
            0,
            codes::pairs::Pairs::new,
            [buffer buffer buffer],
            codes,
        );
        add!(
            to,
            format!("codes, {what}"),
            EACH,
            0,
            codes::encode::Encode::new,
            [buffer buffer buffer buffer buffer],
            codes,
        );
        add!(
            to,
            format!("codes, read, {what}"),
            EACH,
            0,
            codes::read::Read::new,
            [buffer buffer buffer buffer buffer buffer number],
            true,
            codes,
        );
    }
    add!(
        to,
        "codes, rounded",
        EACH,
        0,
        codes::round::Round::new,
        [buffer buffer],
        128,
    );
    add!(
        to,
        "codes, append",
        EACH,
        0,
        codes::append::Append::new,
        [tensor tensor buffer buffer],
        128,
    );
    add!(
        to,
        "codes, compaction",
        EACH,
        0,
        codes::pick::Pick::new,
        [buffer buffer buffer],
        plain.record(),
    );
    Ok(())
}

/// Products with weights of all types, with and without tiles.
pub(super) fn products(to: &mut Writer) -> Result<(), String> {
    for kind in [
        Kind::F32,
        Kind::F16,
        Kind::BF16,
        Kind::Q8_0,
        Kind::Q4_0,
        Kind::Q4_1,
        Kind::Q4K,
        Kind::Q5K,
        Kind::Q6K,
    ] {
        for rows in [1, 8] {
            add!(
                to,
                format!("product of {rows} rows, {kind:?}"),
                FEW_UNITS,
                4 * FEW_UNITS * rows,
                product::few::Few::new,
                [tensor buffer buffer buffer number number number number],
                rows,
                kind,
            );
        }
        add!(
            to,
            format!("product of a chunk, {kind:?}"),
            TILE_UNITS,
            8 * TILE * PITCH,
            product::many::Many::new,
            [tensor buffer buffer buffer number number number number],
            kind,
        );
        for parts in [1, 2] {
            let form = tile_product::Form::new(kind, parts, true);
            add!(
                to,
                format!("tiles, product of a chunk, {kind:?} in {parts}"),
                form.units(),
                form.shared(),
                tile_product::product::Product::new,
                [tensor buffer buffer buffer number number number number],
                4,
                kind,
                form,
            );
        }
    }
    Ok(())
}

/// What is done to rows: norms, gates, rotations, retaining heads, the largest number.
pub(super) fn rows(to: &mut Writer) -> Result<(), String> {
    for (name, add) in [("norm", false), ("norm of a sum", true)] {
        add!(
            to,
            name,
            ROW_UNITS,
            4 * ROW_UNITS,
            elementwise::norm::Norm::new,
            [tensor tensor buffer buffer buffer number],
            add,
        );
    }
    add!(
        to,
        "gate",
        EACH,
        0,
        elementwise::gate::Gate::new,
        [tensor buffer],
    );
    let turn = Turn {
        dim: 128,
        half: 64,
        from: From::First,
        inverse: false,
    };
    add!(
        to,
        "rotation",
        EACH,
        0,
        elementwise::rotate::Rotate::new,
        [tensor buffer buffer buffer buffer number number],
        turn,
    );
    add!(
        to,
        "retaining heads, second product",
        heads::UNITS,
        4 * heads::UNITS,
        heads::second::Second::new,
        [tensor buffer buffer number],
    );
    add!(
        to,
        "largest number",
        largest::UNITS,
        8 * largest::UNITS,
        largest::largest::Largest::new,
        [tensor buffer],
    );
    add!(
        to,
        "surprisal",
        largest::UNITS,
        4 * largest::UNITS,
        surprisal::surprisal::Surprisal::new,
        [tensor buffer buffer],
    );
    Ok(())
}

/// Positions and scores, and the choice among them.
pub(super) fn lists(to: &mut Writer) -> Result<(), String> {
    for (name, moved) in [("scores, append", false), ("scores, append, moved", true)] {
        add!(
            to,
            name,
            EACH,
            0,
            lists::append::Append::new,
            [tensor buffer buffer buffer buffer buffer buffer number],
            moved,
        );
    }
    add!(
        to,
        "selection",
        lists::UNITS,
        4 * lists::DIGITS * lists::UNITS,
        lists::select::Select::new,
        [buffer buffer buffer buffer buffer buffer buffer buffer buffer buffer],
    );
    Ok(())
}
