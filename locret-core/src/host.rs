//! Tensors whose memory is the host's: handed to kernels and back without a copy.

use crate::{Error, Result};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Tensors that this process has read so far.
#[cfg(feature = "conformance")]
pub(crate) static READ: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);

/// Whether tensors on `device` lie in host memory and change hands without a copy.
///
/// Found by trying: the address of a buffer that went in and came out again is the same. This
/// names no backend, so any that keeps the promise is served by the CPU kernels.
pub fn is_host_device(device: &Device) -> bool {
    let values = vec![0f32; 64];
    let address = values.as_ptr();
    let tensor = Tensor::<1>::from_data(TensorData::new(values, [64]), device);
    match tensor.try_into_data() {
        Ok(data) => data
            .as_slice::<f32>()
            .is_ok_and(|back| back.as_ptr() == address),
        Err(_) => false,
    }
}

/// The values of a float tensor as `f32` in row-major order; no copy where the tensor is the only
/// owner of host memory.
///
/// # Errors
/// [`Error::Device`] if the device fails.
pub fn into_f32<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>> {
    let data = waited(|| tensor.try_into_data().map_err(|e| failed(&e)))?;
    let data = if data.dtype() == DType::F32 {
        data
    } else {
        data.convert::<f32>()
    };
    data.try_into_vec::<f32>()
        .map_err(|e| Error::Device(format!("{e:?}")))
}

/// The numbers of an integer tensor, none of them negative.
///
/// # Errors
/// [`Error::Device`] if the device fails.
pub(crate) fn into_u32(tensor: Tensor<1, Int>) -> Result<Vec<u32>> {
    let data = waited(|| tensor.try_into_data().map_err(|e| failed(&e)))?;
    data.convert::<u32>()
        .try_into_vec::<u32>()
        .map_err(|e| Error::Device(format!("{e:?}")))
}

/// What a device says of an error, without the backtrace that some backends append.
fn failed(error: &dyn std::fmt::Display) -> Error {
    let text = error.to_string();
    let ends = ["\nBacktrace", "\nNo backtrace"].map(|mark| text.find(mark));
    let end = ends.into_iter().flatten().min().unwrap_or(text.len());
    Error::Device(text[..end].trim_end().to_owned())
}

/// Does what waits for a device. What a backend cannot hand back as an error (a lost device, memory that the
/// driver does not give) it panics with, here or on a thread of its own whose panic is raised again here.
///
/// # Errors
/// [`Error::Device`] for a panic; those of `work`.
pub fn caught<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => done,
        Err(panic) => Err(match Error::panicked(&*panic) {
            Error::Panicked(text) => failed(&text),
            other => other,
        }),
    }
}

/// The same as [`caught`] for what brings numbers to the host, which is counted in tests.
///
/// # Errors
/// As there.
pub fn waited<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    #[cfg(feature = "conformance")]
    READ.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    caught(work)
}

/// A float tensor of shape `shape` that takes over `values`.
pub fn from_f32<const D: usize>(values: Vec<f32>, shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values, shape), device)
}

/// Token ids as a tensor `[tokens]`, for an adapter's embedding.
pub fn ids_tensor(ids: &[u32], device: &Device) -> Tensor<1, Int> {
    let ids: Vec<i32> = ids.iter().map(|id| *id as i32).collect();
    let len = ids.len();
    Tensor::from_data(TensorData::new(ids, [len]), device)
}

/// Bytes in hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
