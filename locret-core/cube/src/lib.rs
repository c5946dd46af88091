//! Fused kernels for GPUs, on any device of Burn's CubeCL backends (CUDA, Vulkan, Metal, WebGPU): `Cube` is a `Compute` of
//! `locret-core`, beside its CPU kernels and Burn's operations.
//!
//! ```ignore
//! let compute: Arc<dyn Compute> = Arc::new(locret_cube::Cube::new(&device)?);
//! let loaded = locret_models::load_model_with(path, &LoadOptions::default(), &compute)?;
//! ```
//!
//! Everything needs the feature `kernels`, and Burn built with a runtime.
#![cfg(feature = "kernels")]
#![deny(missing_docs)]

mod attention;
mod coded;
mod compute;
#[cfg(feature = "cuda-source")]
pub mod cuda;
mod elementwise;
mod kernels;
mod lists;
mod matrix;
mod matrix_units;
mod observe;
mod perceptron;
mod place;
mod store;
mod tables;

pub use compute::Cube;
pub use matrix_units::Parts;
