//! Rows of numbers, wherever they lie.

use super::pool::Buffer;
use crate::{Compute, Error, Result, host};
use burn::tensor::{Device, Tensor};
use locret_kernels::elementwise::copied;
use std::{borrow::Cow, ops::Range, sync::Arc};

/// A matrix of 32-bit numbers `[rows, width]`: a slice of host memory, or a tensor on a device.
///
/// This is what flows between a model, the cache, policies and stores. Copies share their memory, and a
/// copy is made only when one of several owners changes it. Whoever wants a tensor asks for one
/// ([`tensor`](Self::tensor)), and whoever wants a slice for that ([`values`](Self::values)); where the
/// rows lie there already, nothing is copied.
#[derive(Debug, Clone)]
pub struct Rows {
    shape: [usize; 2],
    place: Place,
}

#[derive(Debug, Clone)]
enum Place {
    /// From number `start` of the buffer on; tensors are made on `device`.
    Host {
        buffer: Arc<Buffer>,
        start: usize,
        device: Device,
    },
    Device(Tensor<2>),
}

impl Rows {
    /// Rows of `width` numbers in host memory; tensors that are made of them lie on `device`.
    ///
    /// # Errors
    /// [`Error::Shape`] if `values` are not whole rows.
    pub fn new(values: Vec<f32>, width: usize, device: &Device) -> Result<Self> {
        let rows = values.len().checked_div(width).unwrap_or(0);
        if rows * width != values.len() {
            let found = [values.len()];
            return Err(Error::shape("rows", format!("rows of {width}"), found));
        }
        Ok(Self::host([rows, width], values.into(), device))
    }

    pub(super) fn host(shape: [usize; 2], buffer: Buffer, device: &Device) -> Self {
        debug_assert_eq!(shape[0] * shape[1], buffer.values.len());
        Self {
            shape,
            place: Place::Host {
                buffer: Arc::new(buffer),
                start: 0,
                device: device.clone(),
            },
        }
    }

    /// How many rows.
    pub fn rows(&self) -> usize {
        self.shape[0]
    }

    /// Numbers in a row.
    pub fn width(&self) -> usize {
        self.shape[1]
    }

    /// `[rows, width]`.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// The device that the rows lie on, or that their tensors are made on.
    pub fn device(&self) -> Device {
        match &self.place {
            Place::Host { device, .. } => device.clone(),
            Place::Device(tensor) => tensor.device(),
        }
    }

    fn len(&self) -> usize {
        self.shape[0] * self.shape[1]
    }

    /// The numbers, row by row, if they lie in host memory.
    fn in_host(&self) -> Option<&[f32]> {
        match &self.place {
            Place::Host { buffer, start, .. } => Some(&buffer.values[*start..*start + self.len()]),
            Place::Device(_) => None,
        }
    }

    /// The numbers, row by row; copied only if they lie on a device.
    ///
    /// # Errors
    /// [`Error::Device`] if the device fails.
    pub fn values(&self) -> Result<Cow<'_, [f32]>> {
        match &self.place {
            Place::Device(tensor) => host::into_f32(tensor.clone()).map(Cow::Owned),
            Place::Host { .. } => Ok(Cow::Borrowed(self.in_host().unwrap_or_default())),
        }
    }

    /// The numbers, row by row; copied if they have other owners.
    ///
    /// # Errors
    /// As [`values`](Self::values).
    pub fn into_values(self) -> Result<Vec<f32>> {
        let len = self.len();
        match self.place {
            Place::Device(tensor) => host::into_f32(tensor),
            Place::Host { buffer, start, .. } => Ok(own(buffer, start, len)),
        }
    }

    /// The numbers, row by row, to be changed: brought to host memory, and copied if they have other
    /// owners.
    ///
    /// # Errors
    /// As [`values`](Self::values).
    pub fn values_mut(&mut self) -> Result<&mut [f32]> {
        let device = self.device();
        let (start, buffer) = match &mut self.place {
            Place::Host { buffer, start, .. } => (*start, Some(buffer)),
            Place::Device(_) => (0, None),
        };
        let shared = buffer.is_none_or(|buffer| Arc::get_mut(buffer).is_none());
        if shared {
            let values = match self.values()? {
                Cow::Borrowed(values) => copied(values),
                Cow::Owned(values) => values,
            };
            *self = Self::host(self.shape, values.into(), &device);
        }
        let at = if shared { 0 } else { start };
        let at = at..at + self.len();
        match &mut self.place {
            Place::Host { buffer, .. } => match Arc::get_mut(buffer) {
                Some(buffer) => Ok(&mut buffer.values[at]),
                None => unreachable!("a buffer that was just made has one owner"),
            },
            Place::Device(_) => unreachable!("rows that were just brought to the host"),
        }
    }

    /// As a tensor `[rows, width]`; made of a copy if they lie in host memory.
    pub fn tensor(&self) -> Tensor<2> {
        match &self.place {
            Place::Device(tensor) => tensor.clone(),
            Place::Host { device, .. } => host::from_f32(
                copied(self.in_host().unwrap_or_default()),
                self.shape,
                device,
            ),
        }
    }

    /// As a tensor `[rows, width]`; copied if they lie in host memory and have other owners.
    pub fn into_tensor(self) -> Tensor<2> {
        let len = self.len();
        match self.place {
            Place::Device(tensor) => tensor,
            Place::Host {
                buffer,
                start,
                device,
            } => host::from_f32(own(buffer, start, len), self.shape, &device),
        }
    }

    /// Some of the rows, which share their memory with these.
    ///
    /// # Errors
    /// [`Error::Shape`] for rows that are not there.
    pub fn slice(&self, rows: Range<usize>) -> Result<Self> {
        let [have, width] = self.shape;
        if rows.start > rows.end || rows.end > have {
            return Err(Error::shape("rows", format!("within {have}"), rows));
        }
        let shape = [rows.len(), width];
        let place = match &self.place {
            Place::Host {
                buffer,
                start,
                device,
            } => Place::Host {
                buffer: buffer.clone(),
                start: start + rows.start * width,
                device: device.clone(),
            },
            // A tensor has no part of no rows.
            Place::Device(tensor) if rows.is_empty() => {
                return Self::new(Vec::new(), width, &tensor.device());
            }
            Place::Device(tensor) => {
                Place::Device(tensor.clone().narrow(0, rows.start, rows.len()))
            }
        };
        Ok(Self { shape, place })
    }

    /// All rows of `parts`, one below the other; in host memory if the first part is.
    ///
    /// # Errors
    /// [`Error::Shape`] for no parts, or parts of different widths; [`Error::Device`].
    pub fn below(mut parts: Vec<Self>) -> Result<Self> {
        let Some(first) = parts.first() else {
            return Err(Error::shape("parts", "at least one", 0));
        };
        let width = first.width();
        if let Some(other) = parts.iter().find(|part| part.width() != width) {
            return Err(Error::shape("rows", [other.rows(), width], other.shape));
        }
        if parts.len() == 1 {
            return Ok(parts.remove(0));
        }
        if first.in_host().is_none() {
            let parts = parts.into_iter().map(Self::into_tensor).collect();
            return Ok(Tensor::cat(parts, 0).into());
        }
        let device = first.device();
        let mut all = Vec::with_capacity(parts.iter().map(Self::len).sum());
        for part in &parts {
            all.extend_from_slice(&part.values()?);
        }
        Self::new(all, width, &device)
    }

    /// The same numbers where `compute` computes: these rows, if they lie on its device, or a copy that went by way
    /// of host memory.
    ///
    /// # Errors
    /// [`Error::Device`] if either device fails.
    pub fn moved_to(self, compute: &dyn Compute) -> Result<Self> {
        if self.device() == *compute.device() {
            return Ok(self);
        }
        let width = self.width();
        compute.rows(self.into_values()?, width)
    }

    /// Checks the shape.
    ///
    /// # Errors
    /// [`Error::Shape`] for another one.
    pub fn expect(&self, what: &'static str, expected: [usize; 2]) -> Result<()> {
        match self.shape == expected {
            true => Ok(()),
            false => Err(Error::shape(what, expected, self.shape)),
        }
    }
}

/// `len` numbers of a buffer from `start` on: the buffer's own memory, if nobody else has it.
fn own(buffer: Arc<Buffer>, start: usize, len: usize) -> Vec<f32> {
    match Arc::try_unwrap(buffer) {
        Ok(mut own) if own.values.len() == len => std::mem::take(&mut own.values),
        Ok(own) => copied(&own.values[start..start + len]),
        Err(shared) => copied(&shared.values[start..start + len]),
    }
}

impl From<Tensor<2>> for Rows {
    fn from(tensor: Tensor<2>) -> Self {
        Self {
            shape: tensor.dims(),
            place: Place::Device(tensor),
        }
    }
}

impl From<Rows> for Tensor<2> {
    fn from(rows: Rows) -> Self {
        rows.into_tensor()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(n: usize, width: usize) -> Rows {
        let values = (0..n * width).map(|i| i as f32).collect();
        Rows::new(values, width, &Device::flex()).unwrap()
    }

    #[test]
    fn slices_share_and_changes_do_not_reach_other_owners() {
        let all = rows(4, 3);
        let mut part = all.slice(1..3).unwrap();
        assert_eq!(part.shape(), [2, 3]);
        assert_eq!(
            part.values().unwrap().as_ptr(),
            all.values().unwrap()[3..].as_ptr()
        );
        part.values_mut().unwrap()[0] = -1.0;
        assert_eq!(part.values().unwrap()[..], [-1.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
        assert_eq!(all.values().unwrap()[3], 3.0);
        assert_eq!(
            all.slice(3..4).unwrap().into_values().unwrap(),
            [9.0, 10.0, 11.0]
        );
        assert!(all.slice(3..5).is_err());
        assert!(Rows::new(vec![0.0; 5], 3, &Device::flex()).is_err());
        assert_eq!(rows(0, 3).shape(), [0, 3]);
    }

    #[test]
    fn the_only_owner_is_not_copied() {
        let mut own = rows(2, 2);
        let address = own.values().unwrap().as_ptr();
        assert_eq!(own.values_mut().unwrap().as_ptr(), address);
        let tensor = own.into_tensor();
        let back = Rows::from(tensor).into_values().unwrap();
        assert_eq!(back.as_ptr(), address);
    }

    #[test]
    fn host_and_device_hold_the_same() {
        let (host, device) = (rows(3, 2), Rows::from(rows(3, 2).tensor()));
        assert_eq!(host.values().unwrap(), device.values().unwrap());
        for parts in [
            vec![host.clone(), device.clone()],
            vec![device.clone(), host.clone()],
        ] {
            let both = Rows::below(parts).unwrap();
            assert_eq!(both.shape(), [6, 2]);
            assert_eq!(both.values().unwrap()[6..], host.values().unwrap()[..]);
        }
        for place in [&host, &device] {
            let none = place.slice(2..2).unwrap();
            assert_eq!((none.shape(), none.device()), ([0, 2], place.device()));
            assert_eq!(none.values().unwrap().len(), 0);
        }
        let mut changed = device.slice(1..3).unwrap();
        changed.values_mut().unwrap()[1] = 7.0;
        assert_eq!(changed.into_values().unwrap(), [2.0, 7.0, 4.0, 5.0]);
        assert!(Rows::below(vec![host, rows(1, 3)]).is_err());
        assert!(Rows::below(Vec::new()).is_err());
    }
}
