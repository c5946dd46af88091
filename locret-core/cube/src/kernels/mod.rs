//! What runs on the device. Here a `Tensor` is CubeCL's.

#![allow(
    clippy::too_many_arguments,
    reason = "a kernel's arguments are its buffers"
)]

pub(crate) mod attention;
pub(crate) mod coded_attention;
pub(crate) mod codes;
pub(crate) mod elementwise;
pub(crate) mod heads;
pub(crate) mod largest;
pub(crate) mod lists;
pub(crate) mod observe;
mod online;
pub(crate) mod product;
mod reduced;
pub(crate) mod surprisal;
pub(crate) mod tile_attention;
pub(crate) mod tile_product;
pub(crate) mod tiles;
pub(crate) mod units;
