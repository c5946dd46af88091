//! A card that is described by hand.

use cubecl::{
    cmma::MatrixLayout,
    ir::{
        AddressType, ContiguousElements, DeviceIdentity, DeviceProperties, HardwareProperties,
        MemoryDeviceProperties, MmaProperties, TargetProperties, features::Features,
    },
    prelude::*,
};
use cubecl_cpp::cuda::mma::manual::contiguous_elements_cuda;
use std::sync::Arc;

/// A card of NVIDIA's, as far as kernels are told.
pub(super) fn properties() -> Arc<DeviceProperties> {
    let hardware = HardwareProperties {
        load_width: 128,
        vector_register_count: None,
        plane_size_min: 32,
        plane_size_max: 32,
        max_bindings: 1024,
        max_shared_memory_size: 48 * 1024,
        max_cube_count: (u32::MAX, u16::MAX.into(), u16::MAX.into()),
        max_units_per_cube: 1024,
        max_cube_dim: (1024, 1024, 64),
        num_streaming_multiprocessors: None,
        num_tensor_cores: None,
        min_tensor_cores_dim: None,
        num_cpu_cores: None,
        last_level_cache_size: None,
        max_vector_size: VectorSize::MAX,
        cube_mma_reserved_shared_memory: 0,
    };
    Arc::new(DeviceProperties::new(
        Features::default(),
        MemoryDeviceProperties::new(u64::MAX, 512),
        hardware,
        cubecl::profile::TimingMethod::Device,
        DeviceIdentity {
            name: "offline".into(),
            fingerprint: "offline".into(),
            physical: None,
        },
    ))
}

pub(super) fn target() -> Arc<TargetProperties> {
    Arc::new(TargetProperties {
        mma: MmaProperties {
            register_size_bits: 32,
            const_plane_size: 32,
            register_layout_a: MatrixLayout::RowMajor,
            register_layout_b: MatrixLayout::ColMajor,
            register_layout_acc: MatrixLayout::RowMajor,
            register_duplication_a: 1,
            register_duplication_b: 1,
            register_duplication_acc: 1,
            contiguous_elements: ContiguousElements::new(contiguous_elements_cuda),
        },
    })
}

pub(super) fn settings(units: usize) -> KernelSettings {
    let dim = CubeDim::new_1d(units as u32);
    KernelSettings::new(*dim, ExecutionMode::Checked, AddressType::U32)
}

pub(super) fn buffer() -> BufferCompilationArg {
    BufferCompilationArg { inplace: None }
}

pub(super) fn tensor() -> TensorCompilationArg {
    TensorCompilationArg {
        meta: TensorMetaCompilationArg { len: (), rank: () },
        buffer: buffer(),
    }
}
