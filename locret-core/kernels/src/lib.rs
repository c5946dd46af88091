//! Compute kernels for tensors that lie in host memory.
//!
//! Plain slices of `f32` in row-major order, one sequence, no knowledge of policies or models.
//! Each kernel exists once and is compiled for AVX-512F, for AVX2 + FMA + F16C, for NEON and for
//! whatever the target has by default (products of many tokens for AMX's tiles, too); which one runs is chosen once
//! per process: the best one
//! ([`instruction_set`]), or the one that `LOCRET_INSTRUCTIONS` names in the environment. Threads
//! are rayon's: the pool that the caller runs in, its number of threads, and none at all where the
//! work is too small to share. Results don't depend on the number of threads.
//!
//! Kernels trust their caller for shapes: a slice of the wrong length is a mistake in this crate,
//! not in a caller's data, and panics as documented.
//!
//! | module | what |
//! |---|---|
//! | [`dtype`] | the types that numbers are stored in, and their conversion |
//! | [`codes`] | numbers as packed integers, and Hadamard's matrix |
//! | [`tiles`] | how attention reads keys and values, in whatever type they are stored |
//! | [`visible`] | what queries see, where it is not everything before them |
//! | [`rope`] | cosine and sine tables, rotation and its inverse |
//! | [`attention`] | causal grouped-query attention for prefill (`many`) and decode (`few`) |
//! | [`observe`] | weights and logits that chosen queries give to each unit |
//! | [`linear`] | products with weights in the type of their file: many tokens, by vectors or tiles, few, few rounded ones |
//! | [`perceptron`] | two products with a SiLU between |
//! | [`elementwise`] | SwiGLU, RMS norm with a residual, sums and copies |
//! | [`select`] | the k best of many, keeping rows in place |
//! | [`pages`] | memory for weights, in large pages |
//! | [`awake`] | threads that do not fall asleep between short pieces of work |
//!
//! Below them lie `simd` (vectors of `f32`, an implementation for each instruction set), `micro` (the
//! inner loop of every product, and the panels that it reads) and `scratch` (working memory that
//! threads keep).

#![deny(missing_docs, clippy::undocumented_unsafe_blocks)]

#[cfg(target_endian = "big")]
compile_error!(
    "weights, and the bytes of files, are read in the order of a little-endian processor"
);

pub mod attention;
pub mod awake;
pub mod codes;
pub mod dtype;
pub mod elementwise;
pub mod linear;
pub mod observe;
pub mod pages;
pub mod perceptron;
pub mod rope;
pub mod select;
pub mod tiles;
pub mod visible;

mod micro;
mod scratch;
mod simd;
#[cfg(test)]
mod testing;

/// The instruction set that kernels run with on this processor, for reports of measurements.
pub fn instruction_set() -> &'static str {
    simd::Isa::best().name()
}
