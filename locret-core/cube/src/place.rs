//! A device of Burn's GPU backends, and what lies on it.

use crate::matrix_units::Tiles;
use burn::{
    backend::cubecl::dtype_to_storage_type,
    tensor::{DType as TensorType, Device, Shape, Tensor},
};
use burn_cubecl::{
    CubeBackend, CubeDevice, ops::numeric::empty_device_contiguous_dtype, tensor::CubeTensor,
};
use cubecl::{client::Client, prelude::ElemType};
use locret_core::{Error, Result, Rows, caught};

/// Where kernels run.
#[derive(Clone)]
pub(crate) struct Place {
    pub(crate) device: Device,
    pub(crate) client: Client,
    /// How chunks are computed, if in tiles of 16-bit numbers.
    pub(crate) tiles: Option<Tiles>,
    cube: CubeDevice,
}

impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Place").field(&self.device).finish()
    }
}

impl Place {
    pub(crate) fn new(device: &Device) -> Result<Self> {
        // A card that is not there shows as a panic of the backend.
        let one = caught(|| primitive(Tensor::zeros([1, 1], device)))?;
        Ok(Self {
            device: device.clone(),
            client: one.client,
            tiles: None,
            cube: one.device,
        })
    }

    /// The same, with chunks computed in tiles.
    pub(crate) fn in_tiles(&self, tiles: Tiles) -> Self {
        Self {
            tiles: Some(tiles),
            ..self.clone()
        }
    }

    /// Numbers of which nobody has said yet what they are, one row behind the other.
    pub(crate) fn empty(&self, shape: impl Into<Shape>, dtype: TensorType) -> CubeTensor {
        let mut shape = shape.into();
        // No buffer is empty.
        if shape.num_elements() == 0 {
            shape = Shape::from(vec![1; shape.num_dims()]);
        }
        empty_device_contiguous_dtype(self.client.clone(), self.cube.clone(), shape, dtype)
    }

    /// A list of 32-bit numbers on the device.
    pub(crate) fn list<T: bytemuck::NoUninit>(
        &self,
        values: &[T],
        dtype: TensorType,
    ) -> CubeTensor {
        debug_assert_eq!(dtype.size(), size_of::<T>());
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let handle = match bytes.is_empty() {
            true => self.client.create_from_slice(&[0; 4]),
            false => self.client.create_from_slice(bytes),
        };
        CubeTensor::new_contiguous(
            self.client.clone(),
            self.cube.clone(),
            Shape::from(vec![values.len().max(1)]),
            handle,
            dtype,
        )
    }

    /// Unit numbers, lengths and the like.
    pub(crate) fn indices(&self, values: &[u32]) -> CubeTensor {
        self.list(values, TensorType::U32)
    }

    /// Rows as a tensor whose numbers within a row follow each other.
    pub(crate) fn rows(&self, rows: &Rows) -> Result<CubeTensor> {
        let tensor = primitive(rows.tensor())?;
        Ok(match tensor.meta.strides()[1] {
            1 => tensor,
            _ => burn_cubecl::kernel::into_contiguous(tensor),
        })
    }
}

/// A tensor as what kernels take.
pub(crate) fn primitive(tensor: Tensor<2>) -> Result<CubeTensor> {
    let device = tensor.device();
    tensor.try_into_primitive::<CubeBackend>().map_err(|_| {
        Error::setting(
            "device of GPU kernels",
            "one of Burn's CubeCL backends, without its fusion",
            format!("{device:?}"),
        )
    })
}

/// What kernels have made, as rows.
pub(crate) fn made(tensor: CubeTensor) -> Rows {
    Tensor::<2>::from_primitive::<CubeBackend>(tensor).into()
}

/// CubeCL's name of a type.
pub(crate) fn element(dtype: TensorType) -> ElemType {
    dtype_to_storage_type(dtype)
}
