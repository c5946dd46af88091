//! What goes wrong on a device is an error, not a panic: a card that is not there, memory that is not there.
//!
//! ```text
//! cargo test -p locret-examples --features wgpu --test faults
//! ```

#![cfg(feature = "wgpu")]

use burn::tensor::{Device, DeviceKind, Tensor};
use locret_core::{Compute, Error, Rows, Weight, usable};
use locret_examples::runtime::{compute, device};
use locret_models::LoadOptions;
use std::sync::Arc;

fn on_device() -> Arc<dyn Compute> {
    compute(&device("wgpu").unwrap(), &LoadOptions::new()).unwrap()
}

#[test]
fn a_card_that_is_not_there() {
    let error = device("wgpu:7").unwrap_err().to_string();
    assert!(
        error.contains("the device wgpu:7 is not usable here"),
        "{error}"
    );
    // And the one that is there works as before.
    let compute = on_device();
    let one = compute.rows(vec![1.0, 2.0], 2).unwrap();
    // By which it is known whether rows have to move.
    assert_eq!(one.device(), *compute.device());
    assert_eq!(one.into_values().unwrap(), [1.0, 2.0]);
}

#[test]
fn kernels_for_a_card_that_is_not_there() {
    let none = Device::wgpu(DeviceKind::DiscreteGpu(7));
    let error = locret_cube::Cube::new(&none).unwrap_err();
    assert!(matches!(error, Error::Device(_)), "{error}");
    let error = usable(|| Device::wgpu(DeviceKind::IntegratedGpu(7))).unwrap_err();
    assert!(matches!(error, Error::Device(_)), "{error}");
}

#[test]
fn a_buffer_larger_than_any_is_an_error_when_it_is_read() {
    let compute = on_device();
    // 64 GiB, which are asked for and never written here.
    let rows = Rows::from(Tensor::<2>::zeros([1 << 10, 1 << 24], compute.device()));
    let one = rows.slice(0..1).unwrap();
    let error = one.into_values().unwrap_err();
    println!("{error}");
    assert!(matches!(error, Error::Device(_)), "{error}");
    // Nothing else is lost.
    let x = compute.rows(vec![1.0, 2.0], 2).unwrap();
    let matrix = compute
        .matrix(vec![Weight::from_f32(&[3.0, 4.0], 1, 2)])
        .unwrap();
    assert_eq!(matrix.apply(&x).unwrap().into_values().unwrap(), [11.0]);
}
