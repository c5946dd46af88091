//! The kernels of what policies ask for, of codes, and of the last token.

use super::{Source, buffer, properties, settings, source, target, tensor};
use crate::kernels::{
    attention::Form,
    coded_attention,
    codes::{self, Codes, TURNING},
    largest,
    observe::{self, Gather},
};
use burn::tensor::DType as TensorType;

/// Codes of heads of 128, as they are by default for so many bits.
fn codes_of(bits: usize) -> Codes {
    Codes {
        dim: 128,
        bits,
        width: if bits == 2 { 32 } else { 64 },
        run: if bits == 2 { 32 } else { 0 },
        block: if bits < 4 { 128 } else { 1 },
    }
}

pub(super) fn sources() -> Result<Vec<Source>, String> {
    let mut all = observed()?;
    for bits in [8, 4, 3, 2] {
        all.extend(coded(codes_of(bits))?);
    }
    let kernel = largest::largest::Largest::new(
        settings(largest::UNITS),
        properties(),
        target(),
        tensor(),
        buffer(),
    );
    let shared = 8 * largest::UNITS;
    all.push(source("largest".into(), largest::UNITS, shared, kernel)?);
    Ok(all)
}

fn observed() -> Result<Vec<Source>, String> {
    let element = crate::place::element(TensorType::F16);
    let mut all = Vec::new();
    for (what, half, queries) in [
        ("a chunk", 64, 1024),
        ("a chunk's last 32", 0, 32),
        ("a token", 0, 1),
    ] {
        let Some(form) = Form::new(128, half, 4, 4 * queries) else {
            return Err(format!("observation, {what}: no form"));
        };
        let (units, shared) = (form.units(), form.shared());
        let kernel = observe::tops::Tops::new(
            settings(units),
            properties(),
            target(),
            tensor(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            (),
            (),
            (),
            Form {
                split: queries == 1,
                ..form
            },
            element,
        );
        all.push(source(
            format!("observation, sums of {what}"),
            units,
            shared,
            kernel,
        )?);
        for gather in [Gather::Sum, Gather::Largest, Gather::Logits] {
            let kernel = observe::by_unit::ByUnit::new(
                settings(units),
                properties(),
                target(),
                tensor(),
                buffer(),
                buffer(),
                buffer(),
                buffer(),
                buffer(),
                buffer(),
                buffer(),
                (),
                (),
                (),
                (),
                form,
                gather,
                element,
            );
            let name = format!("observation, {gather:?} of {what}").to_lowercase();
            all.push(source(name, units, shared, kernel)?);
        }
        let kernel = observe::by_distance::ByDistance::new(
            settings(units),
            properties(),
            target(),
            tensor(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            (),
            (),
            (),
            (),
            (),
            form,
            element,
        );
        all.push(source(
            format!("observation, distances of {what}"),
            units,
            shared,
            kernel,
        )?);
    }
    Ok(all)
}

fn coded(codes: Codes) -> Result<Vec<Source>, String> {
    let mut all = Vec::new();
    let name = |what: &str| format!("{} bits, {what}", codes.bits);
    for (what, half, rows) in [
        ("a chunk", 0, 4096),
        ("a rotated chunk", 64, 4096),
        ("a token", 0, 4),
    ] {
        let Some(form) = Form::new(128, half, 4, rows) else {
            return Err(format!("attention to codes, {what}: no form"));
        };
        let form = Form {
            split: rows <= form.rows,
            ..form
        };
        let kernel = coded_attention::attend_coded::AttendCoded::new(
            settings(form.units()),
            properties(),
            target(),
            tensor(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            (),
            (),
            form,
            codes,
        );
        let shared = form.shared() + 4 * form.tile();
        all.push(source(
            name(&format!("attention of {what}")),
            form.units(),
            shared,
            kernel,
        )?);
    }
    let kernel = codes::read::Read::new(
        settings(256),
        properties(),
        target(),
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        (),
        false,
        codes,
    );
    all.push(source(name("keys"), 256, 0, kernel)?);
    let kernel = codes::pairs::Pairs::new(
        settings(256),
        properties(),
        target(),
        buffer(),
        buffer(),
        buffer(),
        codes,
    );
    all.push(source(name("steps"), 256, 0, kernel)?);
    let kernel = codes::encode::Encode::new(
        settings(256),
        properties(),
        target(),
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        codes,
    );
    all.push(source(name("codes"), 256, 0, kernel)?);
    if codes.run > 0 {
        let kernel = codes::shared_pairs::SharedPairs::new(
            settings(256),
            properties(),
            target(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            codes,
        );
        all.push(source(name("shared steps"), 256, 0, kernel)?);
    }
    if codes.block > 1 {
        let kernel = codes::turn_plain::TurnPlain::new(
            settings(TURNING),
            properties(),
            target(),
            buffer(),
            buffer(),
            codes,
        );
        all.push(source(name("turned"), TURNING, 8 * codes.dim, kernel)?);
        let kernel = codes::turn_read::TurnRead::new(
            settings(TURNING),
            properties(),
            target(),
            buffer(),
            buffer(),
            (),
            codes,
        );
        all.push(source(name("turned back"), TURNING, 4 * codes.dim, kernel)?);
    }
    let kernel = codes::pick::Pick::new(
        settings(256),
        properties(),
        target(),
        buffer(),
        buffer(),
        buffer(),
        codes.record(),
    );
    all.push(source(name("compaction"), 256, 0, kernel)?);
    Ok(all)
}
