//! The kernels as CUDA C++, written by CubeCL's compiler for a card that is described by hand.

mod list;

use cubecl::{
    Compiler, CubeKernel,
    cmma::MatrixLayout,
    define_kernel,
    ir::{
        AddressType, ContiguousElements, DeviceIdentity, DeviceProperties, HardwareProperties,
        MemoryDeviceProperties, MmaProperties, TargetProperties, features::Features,
    },
    prelude::*,
};
use cubecl_cpp::{
    cuda::mma::manual::contiguous_elements_cuda,
    shared::{CompilationOptions, CppCompiler, CppSupportedFeatures},
    target::Cuda,
};
use std::sync::Arc;

/// Shared memory of a cube on the smallest of the cards: that of compute capability 8.9.
const SHARED: usize = 99 * 1024;

/// A kernel as a compiler takes it.
#[derive(Debug, Clone)]
pub struct Source {
    /// What it is, and what it is made for.
    pub name: String,
    /// Units of a cube: CUDA's threads of a block.
    pub units: usize,
    /// Bytes of shared memory of a cube, which CUDA is told at launch.
    pub shared: usize,
    /// CUDA C++.
    pub text: String,
}

/// A card of NVIDIA's, as far as kernels are told.
fn properties() -> Arc<DeviceProperties> {
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

fn target() -> Arc<TargetProperties> {
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

fn settings(units: usize) -> KernelSettings {
    let dim = CubeDim::new_1d(units as u32);
    KernelSettings::new(*dim, ExecutionMode::Checked, AddressType::U32)
}

fn buffer() -> BufferCompilationArg {
    BufferCompilationArg { inplace: None }
}

fn tensor() -> TensorCompilationArg {
    TensorCompilationArg {
        meta: TensorMetaCompilationArg { len: (), rank: () },
        buffer: buffer(),
    }
}

/// Kernels for a card.
struct Writer {
    properties: Arc<DeviceProperties>,
    target: Arc<TargetProperties>,
    all: Vec<Source>,
}

impl Writer {
    fn add(
        &mut self,
        name: impl Into<String>,
        units: usize,
        shared: usize,
        kernel: impl CubeKernel,
    ) -> Result<(), String> {
        let name = name.into().to_lowercase();
        let definition = define_kernel(&kernel).map_err(|e| format!("{name}: {e:?}"))?;
        let options = CompilationOptions {
            supports_features: CppSupportedFeatures {
                fast_math: true,
                ..Default::default()
            },
            ..Default::default()
        };
        let compiled = CppCompiler::<Cuda>::default()
            .compile(definition, &options)
            .map_err(|e| format!("{name}: {e:?}"))?;
        self.all.push(Source {
            text: compiled.to_string(),
            name,
            units,
            shared,
        });
        Ok(())
    }
}

/// All kernels, as they are launched for models of common shapes.
///
/// # Errors
/// What CubeCL's compiler says, after the kernel's name.
pub fn sources() -> Result<Vec<Source>, String> {
    let mut to = Writer {
        properties: properties(),
        target: target(),
        all: Vec::new(),
    };
    list::attention(&mut to)?;
    list::units(&mut to)?;
    list::observed(&mut to)?;
    list::codes(&mut to)?;
    list::products(&mut to)?;
    list::rows(&mut to)?;
    list::lists(&mut to)?;
    Ok(to.all)
}
