//! Finding out whether a device is there.

use crate::{Error, Result};
use burn::tensor::{Device, Tensor};
use std::{
    panic::{self, AssertUnwindSafe},
    sync::{Arc, Mutex, PoisonError},
};

/// The device that `make` makes, once it has computed a small sum.
///
/// A missing driver or card shows as a panic in the backend when the first tensor is made, often on a thread of
/// its own: what the first one says is the cause. To hear it, the process's panic hook is another one
/// meanwhile; call this before there are threads that may panic for reasons of their own.
///
/// # Errors
/// [`Error::Device`] for a device that is not there, that its backend cannot use, or that computes something else.
pub fn usable(make: impl FnOnce() -> Device) -> Result<Device> {
    let hook = panic::take_hook();
    let cause = Arc::new(Mutex::new(None));
    let heard = cause.clone();
    panic::set_hook(Box::new(move |panic| {
        let mut heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.get_or_insert_with(|| panic.payload_as_str().unwrap_or("it panicked").to_owned());
    }));
    let tried = panic::catch_unwind(AssertUnwindSafe(|| {
        let device = make();
        let sum = Tensor::<1>::ones([8], &device).sum();
        let data = sum.try_into_data().map_err(|e| e.to_string())?;
        match data.convert::<f32>().try_into_vec::<f32>() {
            Ok(sum) if sum == [8.0] => Ok(device),
            other => Err(format!("eight ones add up to {other:?}")),
        }
    }));
    panic::set_hook(hook);
    let said = match tried {
        Ok(Ok(device)) => return Ok(device),
        Ok(Err(said)) => Some(said),
        Err(_) => None,
    };
    let cause = cause.lock().unwrap_or_else(PoisonError::into_inner).take();
    let text = cause.or(said).unwrap_or_else(|| "it panicked".into());
    Err(Error::Device(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_panics_is_an_error_that_says_why() {
        assert!(usable(Device::flex).is_ok());
        let failed = usable(|| panic!("no adapter")).unwrap_err();
        assert!(
            matches!(&failed, Error::Device(why) if why == "no adapter"),
            "{failed}"
        );
    }
}
