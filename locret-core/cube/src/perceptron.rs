//! Retaining heads on the device.

use crate::{
    kernels::heads,
    matrix::CubeMatrix,
    place::{Place, made},
    store::spread,
};
use burn::tensor::{DType as TensorType, Tensor};
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;
use locret_core::{Error, Matrix, Perceptron, Result, Rows, Weight, check_parts};
use std::sync::Arc;

/// Two products with a SiLU between: the first one as those of a model's weights are, in the type that they have, the
/// second one, of few outputs, in 32 bits.
#[derive(Debug)]
pub(crate) struct CubePerceptron {
    place: Arc<Place>,
    first: CubeMatrix,
    /// `[outputs, inner]`
    second: CubeTensor,
    outputs: usize,
}

impl CubePerceptron {
    /// Of a first matrix that has a [`kind`](crate::matrix::kind).
    pub(crate) fn new(place: &Arc<Place>, first: Weight, second: &[f32]) -> Result<Self> {
        let (inner, found) = (first.rows, second.len());
        if inner == 0 || found == 0 || !found.is_multiple_of(inner) {
            let expected = format!("rows of {inner}");
            return Err(Error::shape(
                "a perceptron's second matrix",
                expected,
                found,
            ));
        }
        Ok(Self {
            place: place.clone(),
            first: CubeMatrix::new(place, &[first])?,
            second: place.list(second, TensorType::F32),
            outputs: found / inner,
        })
    }
}

impl Perceptron for CubePerceptron {
    fn shape(&self) -> [usize; 3] {
        let [inner, inputs] = self.first.shape();
        [inputs, inner, self.outputs]
    }

    fn apply(&self, parts: &[&Rows]) -> Result<Rows> {
        let tokens = check_parts(self.shape(), parts)?;
        if tokens == 0 {
            return Ok(Tensor::zeros([0, self.outputs], &self.place.device).into());
        }
        let inner = match parts {
            [only] => self.first.apply(only)?,
            _ => {
                let parts = parts.iter().map(|part| part.tensor()).collect();
                self.first.apply(&Tensor::cat(parts, 1).into())?
            }
        };
        let out = self.place.empty([tokens, self.outputs], TensorType::F32);
        heads::second::launch(
            &self.place.client,
            spread(tokens),
            CubeDim::new_1d(heads::UNITS as u32),
            self.place.rows(&inner)?.into_tensor_arg(),
            self.second.clone().into_buffer_arg(),
            out.clone().into_buffer_arg(),
            self.outputs as u32,
        );
        Ok(made(out))
    }
}
