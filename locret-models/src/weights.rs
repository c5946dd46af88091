//! One view of a model's weights, whatever the file format.

use crate::{DType, ModelError, Result, numbers::decode_finite};
use burn::tensor::{DType as TensorDType, Device, Tensor, TensorData};
use bytes::Bytes;
use half::{bf16, f16};
use locret_core::{
    Compute, Matrix, Rows, Weight,
    kernels::{dtype::Number, pages::Arena},
    layer_compute,
};
use rayon::prelude::*;
use std::{
    borrow::Cow,
    collections::BTreeSet,
    fmt::Debug,
    ops::Range,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

/// Rows are converted in bands of about this many values, so that pages of the file can be let go
/// of while a large tensor is being read.
const BAND_VALUES: usize = 8 << 20;
/// Values that are checked at a time where a matrix stays packed.
const PACKED_VALUES: usize = 1 << 20;
/// What one thread converts at a time.
const PIECE_VALUES: usize = 64 << 10;

/// Shape and storage of a tensor in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Dimensions, slowest first: `[rows, columns]` of a matrix.
    pub shape: Vec<usize>,
    /// How values are stored.
    pub dtype: DType,
}

impl TensorInfo {
    /// Values in a row: the last dimension; 1 for a scalar.
    pub fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// How many rows: the product of all dimensions but the last.
    pub fn rows(&self) -> usize {
        self.shape.iter().rev().skip(1).product()
    }
}

/// The weights of a model under the names that Hugging Face transformers gives them.
///
/// Implemented by [`SafetensorsDir`](crate::SafetensorsDir) and by [`GgufWeights`](crate::GgufWeights),
/// so that an adapter sees one naming scheme, one row order, and one conversion.
pub trait Weights: Debug + Send + Sync {
    /// The file or folder, for messages.
    fn path(&self) -> &Path;

    /// All names, sorted.
    fn names(&self) -> Vec<&str>;

    /// Shape and storage of a tensor; `None` if there is no such tensor.
    fn info(&self, name: &str) -> Option<&TensorInfo>;

    /// The bytes of some rows as they are stored: whole blocks, row after row.
    ///
    /// # Errors
    /// [`ModelError::MissingTensors`] for an unknown name; [`ModelError::Format`] for rows that the
    /// tensor does not have.
    fn raw_rows(&self, name: &str, rows: Range<usize>) -> Result<Cow<'_, [u8]>>;

    /// A hint that some rows have been read and that their pages need not stay in memory.
    fn release_rows(&self, name: &str, rows: Range<usize>) {
        let _ = (name, rows);
    }
}

/// The type that weights are held in.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum WeightDtype {
    /// Single precision.
    F32,
    /// IEEE half precision. Values beyond 65504 are refused.
    F16,
    /// The upper half of single precision, rounded to nearest even.
    BF16,
    /// As the file has it. `f16` and `bf16` stay; for the CPU kernels so do matrices in blocks of
    /// `Q8_0`, `Q4_0`, `Q4_1`, `Q4_K`, `Q5_K` and `Q6_K`; everything else becomes `f32`, and so does what the
    /// device has no type for.
    #[default]
    File,
}

impl WeightDtype {
    /// The type that a tensor is held in which is stored as `stored`: one of the three floats.
    pub fn resident(self, stored: DType) -> DType {
        match (self, stored) {
            (Self::F16, _) | (Self::File, DType::F16) => DType::F16,
            (Self::BF16, _) | (Self::File, DType::BF16) => DType::BF16,
            (Self::F32 | Self::File, _) => DType::F32,
        }
    }
}

/// What can be read from any [`Weights`].
pub trait WeightsExt: Weights {
    /// A tensor's values in row-major order.
    ///
    /// # Errors
    /// [`ModelError::MissingTensors`]; [`ModelError::NotFinite`].
    fn tensor_f32(&self, name: &str) -> Result<Vec<f32>>;

    /// Some rows of a tensor, for instance the embeddings of a few tokens.
    ///
    /// # Errors
    /// [`ModelError::MissingTensors`]; [`ModelError::NotFinite`]; [`ModelError::Format`] for rows
    /// that the tensor does not have.
    fn tensor_rows_f32(&self, name: &str, rows: Range<usize>) -> Result<Vec<f32>>;

    /// A tensor on a device, of shape `expected`, in the type that `dtype` says.
    ///
    /// Host memory holds the tensor once, in the type that it is held in.
    ///
    /// # Errors
    /// [`ModelError::MissingTensors`]; [`ModelError::Shape`]; [`ModelError::NotFinite`];
    /// [`ModelError::UnsupportedDtype`] if the device does not have the type.
    fn load<const D: usize>(
        &self,
        name: &str,
        expected: [usize; D],
        dtype: WeightDtype,
        device: &Device,
    ) -> Result<Tensor<D>>;
}

impl<W: Weights + ?Sized> WeightsExt for W {
    fn tensor_f32(&self, name: &str) -> Result<Vec<f32>> {
        let rows = self.expect(name)?.rows();
        self.convert(name, 0..rows)
    }

    fn tensor_rows_f32(&self, name: &str, rows: Range<usize>) -> Result<Vec<f32>> {
        self.convert(name, rows)
    }

    fn load<const D: usize>(
        &self,
        name: &str,
        expected: [usize; D],
        dtype: WeightDtype,
        device: &Device,
    ) -> Result<Tensor<D>> {
        let info = self.expect_shape(name, &expected)?;
        let rows = 0..info.rows();
        let mut held = dtype.resident(info.dtype);
        if dtype == WeightDtype::File && !device.supports_dtype(of_tensors(held)) {
            held = DType::F32;
        }
        if !device.supports_dtype(of_tensors(held)) {
            return Err(ModelError::UnsupportedDtype {
                dtype: format!("{held:?}").to_lowercase(),
            });
        }
        let data = match held {
            DType::F16 => TensorData::new(self.convert::<f16>(name, rows)?, expected),
            DType::BF16 => TensorData::new(self.convert::<bf16>(name, rows)?, expected),
            _ => TensorData::new(self.convert::<f32>(name, rows)?, expected),
        };
        Ok(Tensor::from_data(data, (device, of_tensors(held))))
    }
}

/// Burn's name for a type that weights are held in.
fn of_tensors(held: DType) -> TensorDType {
    match held {
        DType::F16 => TensorDType::F16,
        DType::BF16 => TensorDType::BF16,
        _ => TensorDType::F32,
    }
}

/// How weights are converted.
trait Convert: Weights {
    fn expect(&self, name: &str) -> Result<&TensorInfo> {
        self.info(name).ok_or_else(|| ModelError::MissingTensors {
            path: self.path().to_path_buf(),
            names: vec![name.to_owned()],
        })
    }

    fn expect_shape(&self, name: &str, expected: &[usize]) -> Result<&TensorInfo> {
        let info = self.expect(name)?;
        if info.shape != expected {
            return Err(ModelError::Shape {
                path: self.path().to_path_buf(),
                tensor: name.to_owned(),
                expected: expected.to_vec(),
                found: info.shape.clone(),
            });
        }
        Ok(info)
    }

    /// A tensor's little-endian bytes in the type that `dtype` says, and that type. Memory holds
    /// them once, beside what is being converted.
    fn resident_bytes(
        &self,
        name: &str,
        dtype: WeightDtype,
        arena: &mut Arena,
    ) -> Result<(DType, Bytes)> {
        let info = self.expect(name)?;
        let (rows, values) = (info.rows(), info.rows() * info.cols());
        let dtype = dtype.resident(info.dtype);
        let mut out = arena.zeros(values * dtype.block_bytes());
        match dtype {
            DType::F16 => self.convert_bytes::<f16>(name, rows, &mut out),
            DType::BF16 => self.convert_bytes::<bf16>(name, rows, &mut out),
            _ => self.convert_bytes::<f32>(name, rows, &mut out),
        }?;
        Ok((dtype, out.freeze()))
    }

    fn convert<T: Number>(&self, name: &str, rows: Range<usize>) -> Result<Vec<T>> {
        let info = self.expect(name)?;
        if rows.start > rows.end || rows.end > info.rows() {
            return Err(ModelError::format(
                self.path(),
                format!("rows of tensor {name:?}"),
                format!("a range within 0..{}", info.rows()),
                format!("{rows:?}"),
            ));
        }
        let mut out = vec![T::zeroed(); rows.len() * info.cols()];
        self.convert_with(name, rows, T::DTYPE, &mut out, 1, decode_finite::<T>)?;
        Ok(out)
    }

    fn convert_bytes<T: Number>(&self, name: &str, rows: usize, out: &mut [u8]) -> Result<()> {
        let size = size_of::<T>();
        self.convert_with(name, 0..rows, T::DTYPE, out, size, |stored, bytes, out| {
            let mut values = vec![T::zeroed(); out.len() / size];
            decode_finite(stored, bytes, &mut values)?;
            out.copy_from_slice(bytemuck::cast_slice(&values));
            Ok(())
        })
    }

    /// Converts rows that the tensor has, band by band, each band by all threads: `decode` writes
    /// the values of some blocks, `per_value` elements of `out` for each, or gives the index and
    /// the value of one that `dtype` cannot hold.
    fn convert_with<E: Send>(
        &self,
        name: &str,
        rows: Range<usize>,
        dtype: DType,
        out: &mut [E],
        per_value: usize,
        decode: impl Fn(DType, &[u8], &mut [E]) -> Result<(), (usize, f32)> + Sync,
    ) -> Result<()> {
        let info = self.expect(name)?;
        let (cols, stored) = (info.cols(), info.dtype);
        if cols == 0 {
            return Ok(());
        }
        let band = (BAND_VALUES / cols).max(1);
        let piece = (PIECE_VALUES / cols).max(1);
        let width = cols * per_value;
        for (i, out) in out.chunks_mut(band * width).enumerate() {
            let start = rows.start + i * band;
            let end = start + out.len() / width;
            let bytes = self.raw_rows(name, start..end)?;
            let row_bytes = bytes.len() / (end - start);
            out.par_chunks_mut(piece * width)
                .zip(bytes.par_chunks(piece * row_bytes))
                .enumerate()
                .try_for_each(|(j, (out, bytes))| {
                    decode(stored, bytes, out).map_err(|(at, value)| ModelError::NotFinite {
                        path: self.path().to_path_buf(),
                        tensor: name.to_owned(),
                        row: start + j * piece + at / cols,
                        value,
                        dtype,
                    })
                })?;
            drop(bytes);
            self.release_rows(name, start..end);
        }
        Ok(())
    }
}

impl<W: Weights + ?Sized> Convert for W {}

/// Loads a model's tensors and keeps count of them.
///
/// A name that a model asks for and that is not there is an error at once; [`finish`](Self::finish)
/// finds those that the model never asked for. Both mean that file and model are not of one kind.
#[derive(Debug, Clone)]
#[must_use]
pub struct Loader<'a> {
    weights: &'a dyn Weights,
    dtype: WeightDtype,
    compute: Arc<dyn Compute>,
    used: Arc<Mutex<BTreeSet<String>>>,
    arena: Arc<Mutex<Arena>>,
}

impl<'a> Loader<'a> {
    /// A loader of `weights` for what computes with them, that nothing has been taken from.
    pub fn new(weights: &'a dyn Weights, dtype: WeightDtype, compute: &Arc<dyn Compute>) -> Self {
        Self {
            weights,
            dtype,
            compute: compute.clone(),
            used: Arc::default(),
            arena: Arc::default(),
        }
    }

    /// The same loader for another compute: both keep one count.
    pub fn at(&self, compute: &Arc<dyn Compute>) -> Self {
        Self {
            compute: compute.clone(),
            ..self.clone()
        }
    }

    /// The same loader for what computes a layer, if layers lie on several devices ([`DeviceMap`]).
    ///
    /// [`DeviceMap`]: locret_core::DeviceMap
    pub fn at_layer(&self, index: usize) -> Self {
        self.at(layer_compute(&self.compute, index))
    }

    /// The weights.
    pub fn weights(&self) -> &'a dyn Weights {
        self.weights
    }

    /// What computes with the weights.
    pub fn compute(&self) -> &Arc<dyn Compute> {
        &self.compute
    }

    /// The matrices `names`, `[rows, columns]` each, one below the other, where they are computed with.
    ///
    /// # Errors
    /// As [`load`](Self::load), and those of [`Compute::matrix`].
    pub fn matrix(&self, names: &[(String, usize)], columns: usize) -> Result<Arc<dyn Matrix>> {
        let parts = names
            .iter()
            .map(|(name, rows)| self.weight(name, [*rows, columns]));
        Ok(self.compute.matrix(parts.collect::<Result<_>>()?)?)
    }

    /// A row `[1, width]` of 32-bit numbers, for instance the gain of a norm.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn row(&self, name: &str, width: usize) -> Result<Rows> {
        Ok(self.compute.rows(self.values(name, &[width])?, width)?)
    }

    /// One matrix, in the type that it is computed with.
    fn weight(&self, name: &str, [rows, columns]: [usize; 2]) -> Result<Weight> {
        self.check(name, &[rows, columns])?;
        let stored = self.weights.expect(name)?.dtype;
        let mut held = self.dtype;
        let (dtype, bytes) = if held == WeightDtype::File
            && !stored.is_float()
            && self.compute.computes_with(stored)
        {
            let band = (PACKED_VALUES / columns.max(1)).max(1);
            for start in (0..rows).step_by(band) {
                // Scales that are not finite are found and named.
                let band = start..(start + band).min(rows);
                self.weights.tensor_rows_f32(name, band)?;
            }
            (stored, self.packed(name)?)
        } else {
            if held == WeightDtype::File && !self.compute.computes_with(held.resident(stored)) {
                held = WeightDtype::F32;
            }
            if !self.compute.computes_with(held.resident(stored)) {
                return Err(ModelError::UnsupportedDtype {
                    dtype: held.resident(stored).to_string().to_lowercase(),
                });
            }
            let mut arena = self.arena.lock().unwrap_or_else(PoisonError::into_inner);
            self.weights.resident_bytes(name, held, &mut arena)?
        };
        Ok(Weight {
            dtype,
            rows,
            columns,
            bytes,
        })
    }

    /// Counts a tensor as used and checks that it is there in shape `expected`.
    ///
    /// # Errors
    /// [`ModelError::MissingTensors`]; [`ModelError::Shape`].
    pub fn check(&self, name: &str, expected: &[usize]) -> Result<()> {
        self.skip(name);
        self.weights.expect_shape(name, expected).map(drop)
    }

    /// Whether there is a tensor of this name. This does not count as use.
    pub fn has(&self, name: &str) -> bool {
        self.weights.info(name).is_some()
    }

    /// Whether two tensors are stored as the same numbers. This does not count as use.
    ///
    /// # Errors
    /// [`ModelError::MissingTensors`], and those of reading the file.
    pub fn same(&self, a: &str, b: &str) -> Result<bool> {
        let (first, second) = (self.weights.expect(a)?, self.weights.expect(b)?);
        if first != second {
            return Ok(false);
        }
        let band = (BAND_VALUES / first.cols().max(1)).max(1);
        for start in (0..first.rows()).step_by(band) {
            let rows = start..(start + band).min(first.rows());
            let same = self.weights.raw_rows(a, rows.clone())?
                == self.weights.raw_rows(b, rows.clone())?;
            self.weights.release_rows(a, rows.clone());
            self.weights.release_rows(b, rows);
            if !same {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Marks a tensor as known to the model although it is not loaded.
    pub fn skip(&self, name: &str) {
        self.used
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(name.to_owned());
    }

    /// A tensor of shape `expected` in the loader's type.
    ///
    /// # Errors
    /// [`ModelError::MissingTensors`]; [`ModelError::Shape`]; [`ModelError::NotFinite`];
    /// [`ModelError::UnsupportedDtype`].
    pub fn load<const D: usize>(&self, name: &str, expected: [usize; D]) -> Result<Tensor<D>> {
        self.load_as(name, expected, self.dtype)
    }

    /// A tensor of shape `expected` in another type, for instance a norm that stays `f32`.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_as<const D: usize>(
        &self,
        name: &str,
        expected: [usize; D],
        dtype: WeightDtype,
    ) -> Result<Tensor<D>> {
        self.skip(name);
        self.weights
            .load(name, expected, dtype, self.compute.device())
    }

    /// Values of a tensor of shape `expected`, `f32`, in row-major order.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn values(&self, name: &str, expected: &[usize]) -> Result<Vec<f32>> {
        self.check(name, expected)?;
        self.weights.tensor_f32(name)
    }

    /// The bytes of a tensor as the file has them, in memory of their own: side by side with all others
    /// that this loader holds, as [`Arena`] says.
    fn packed(&self, name: &str) -> Result<Bytes> {
        let rows = 0..self.weights.expect(name)?.rows();
        let bytes = self.weights.raw_rows(name, rows.clone())?;
        let mut arena = self.arena.lock().unwrap_or_else(PoisonError::into_inner);
        let mut out = arena.zeros(bytes.len());
        out.copy_from_slice(&bytes);
        drop(bytes);
        // Or the file's pages count beside the copy.
        self.weights.release_rows(name, rows);
        Ok(out.freeze())
    }

    /// The names that nothing has asked for.
    pub fn unused(&self) -> Vec<String> {
        let used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        self.weights
            .names()
            .into_iter()
            .filter(|name| !used.contains(*name))
            .map(str::to_owned)
            .collect()
    }

    /// Ends the loading.
    ///
    /// # Errors
    /// [`ModelError::UnusedTensors`] if a tensor was never asked for.
    pub fn finish(self) -> Result<()> {
        let names = self.unused();
        if names.is_empty() {
            return Ok(());
        }
        Err(ModelError::UnusedTensors {
            path: self.weights.path().to_path_buf(),
            names,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use locret_core::compute;
    use std::{collections::BTreeMap, path::PathBuf};

    #[derive(Debug)]
    struct Memory {
        path: PathBuf,
        tensors: BTreeMap<String, (TensorInfo, Vec<u8>)>,
    }

    impl Weights for Memory {
        fn path(&self) -> &Path {
            &self.path
        }
        fn names(&self) -> Vec<&str> {
            self.tensors.keys().map(String::as_str).collect()
        }
        fn info(&self, name: &str) -> Option<&TensorInfo> {
            self.tensors.get(name).map(|t| &t.0)
        }
        fn raw_rows(&self, name: &str, rows: Range<usize>) -> Result<Cow<'_, [u8]>> {
            let (info, bytes) = &self.tensors[name];
            let n = info.dtype.bytes(info.cols()).unwrap();
            Ok(Cow::Borrowed(&bytes[rows.start * n..rows.end * n]))
        }
    }

    fn memory(tensors: &[(&str, &[usize], DType, Vec<u8>)]) -> Memory {
        Memory {
            path: "memory".into(),
            tensors: tensors
                .iter()
                .map(|(name, shape, dtype, bytes)| {
                    let info = TensorInfo {
                        shape: shape.to_vec(),
                        dtype: *dtype,
                    };
                    (name.to_string(), (info, bytes.clone()))
                })
                .collect(),
        }
    }

    fn f32s(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|x| x.to_le_bytes()).collect()
    }

    #[test]
    fn large_tensors_in_bands_equal_one_conversion() {
        // More than one band, and pieces that do not divide it.
        let (rows, cols) = (7000, 1500);
        let values: Vec<f32> = (0..rows * cols).map(|i| (i % 9973) as f32 - 17.0).collect();
        let memory = memory(&[("w", &[rows, cols], DType::F32, f32s(&values))]);
        let weights = &memory;
        assert!(weights.tensor_f32("w").unwrap() == values);
        let part = weights.tensor_rows_f32("w", 6990..7000).unwrap();
        assert!(part == values[6990 * cols..]);
        assert!(weights.tensor_rows_f32("w", 6990..7001).is_err());
        assert!(weights.tensor_rows_f32("w", 0..0).unwrap().is_empty());
    }

    #[test]
    fn resident_types() {
        let device = Device::flex();
        let bf: Vec<u8> = [1.5f32, -2.0]
            .iter()
            .flat_map(|&x| bf16::from_f32(x).to_le_bytes())
            .collect();
        let memory = memory(&[
            ("f32", &[2], DType::F32, f32s(&[1.001, -2.0])),
            ("bf16", &[1, 2], DType::BF16, bf),
        ]);
        let weights = &memory;
        for (name, dtype, found) in [
            ("f32", WeightDtype::File, TensorDType::F32),
            ("f32", WeightDtype::BF16, TensorDType::BF16),
            ("f32", WeightDtype::F16, TensorDType::F16),
        ] {
            let tensor = weights.load(name, [2], dtype, &device).unwrap();
            assert_eq!(tensor.dtype(), found);
        }
        for (dtype, found) in [
            (WeightDtype::File, TensorDType::BF16),
            (WeightDtype::F32, TensorDType::F32),
            (WeightDtype::F16, TensorDType::F16),
        ] {
            let tensor = weights.load("bf16", [1, 2], dtype, &device).unwrap();
            assert_eq!(tensor.dtype(), found);
            let values = tensor.into_data().convert::<f32>();
            assert_eq!(values.as_slice::<f32>().unwrap(), [1.5, -2.0]);
        }
    }

    #[test]
    fn values_that_are_not_finite_are_named() {
        let mut values = vec![1.0; 3 * 100_000];
        values[250_000] = f32::NAN;
        let memory = memory(&[
            ("nan", &[3, 100_000], DType::F32, f32s(&values)),
            ("large", &[2], DType::F32, f32s(&[1.0, 1e6])),
        ]);
        let weights = &memory;
        let device = Device::flex();
        assert!(matches!(
            weights.load("nan", [3, 100_000], WeightDtype::BF16, &device),
            Err(ModelError::NotFinite { tensor, row: 2, value, .. })
                if tensor == "nan" && value.is_nan()
        ));
        weights
            .load("large", [2], WeightDtype::F32, &device)
            .unwrap();
        // 1e6 is no f16: an infinity must not arise in silence.
        assert!(matches!(
            weights.load("large", [2], WeightDtype::F16, &device),
            Err(ModelError::NotFinite { row: 0, value, .. }) if value == 1e6
        ));
    }

    #[test]
    fn bytes_are_those_of_the_values() {
        // More than one band again.
        let (rows, cols) = (6000, 1501);
        let values: Vec<f32> = (0..rows * cols).map(|i| (i % 509) as f32 - 8.25).collect();
        let half: Vec<u8> = (values.iter())
            .flat_map(|x| bf16::from_f32(*x).to_le_bytes())
            .collect();
        let memory = memory(&[
            ("f32", &[rows, cols], DType::F32, f32s(&values)),
            ("bf16", &[rows, cols], DType::BF16, half.clone()),
            ("nan", &[2, 2], DType::F32, f32s(&[0.0, 0.0, 0.0, f32::NAN])),
        ]);
        let load = |name: &str, dtype, shape: [usize; 2]| {
            let weight = Loader::new(&memory, dtype, &compute(&Device::flex())).weight(name, shape);
            weight.map(|weight| (weight.dtype, weight.bytes))
        };
        let shape = [rows, cols];
        let (dtype, bytes) = load("f32", WeightDtype::File, shape).unwrap();
        assert!(dtype == DType::F32 && bytes == f32s(&values));
        for (name, wanted) in [
            ("f32", WeightDtype::BF16),
            ("bf16", WeightDtype::BF16),
            ("bf16", WeightDtype::File),
        ] {
            let (dtype, bytes) = load(name, wanted, shape).unwrap();
            assert!(
                dtype == DType::BF16 && bytes == half,
                "{name} as {wanted:?}"
            );
        }
        let (dtype, bytes) = load("bf16", WeightDtype::F16, shape).unwrap();
        let found = bytes
            .chunks_exact(2)
            .map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32());
        let exact = values.iter().map(|x| bf16::from_f32(*x).to_f32());
        assert!(dtype == DType::F16 && found.eq(exact));
        assert!(matches!(
            load("f32", WeightDtype::File, [cols, rows]),
            Err(ModelError::Shape { .. })
        ));
        for dtype in [WeightDtype::F32, WeightDtype::BF16] {
            assert!(matches!(
                load("nan", dtype, [2, 2]),
                Err(ModelError::NotFinite { tensor, row: 1, .. }) if tensor == "nan"
            ));
        }
    }

    #[test]
    fn the_loader_keeps_count() {
        let memory = memory(&[
            ("a", &[2], DType::F32, f32s(&[1.0, 2.0])),
            ("b", &[2], DType::F32, f32s(&[1.0, 2.0])),
            ("c", &[2], DType::F32, f32s(&[1.0, 2.0])),
        ]);
        let compute = compute(&Device::flex());
        let loader = Loader::new(&memory, WeightDtype::F32, &compute);
        loader.load("a", [2]).unwrap();
        assert!(matches!(
            loader.load("a", [1, 2]),
            Err(ModelError::Shape { expected, found, .. }) if expected == [1, 2] && found == [2]
        ));
        assert!(matches!(
            loader.load("d", [2]),
            Err(ModelError::MissingTensors { names, .. }) if names == ["d"]
        ));
        assert_eq!(loader.values("b", &[2]).unwrap(), [1.0, 2.0]);
        assert!(loader.values("b", &[3]).is_err());
        assert!(loader.has("c") && !loader.has("d"));
        assert_eq!(loader.unused(), ["c"]);
        assert!(matches!(
            loader.finish(),
            Err(ModelError::UnusedTensors { names, .. }) if names == ["c"]
        ));
        let loader = Loader::new(&memory, WeightDtype::F32, &compute);
        for name in ["a", "b", "c"] {
            loader.skip(name);
        }
        loader.finish().unwrap();
    }
}
