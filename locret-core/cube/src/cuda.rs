//! The kernels as CUDA C++, written by CubeCL's compiler for a card that is described by hand.

use crate::kernels::{
    attention::{self, Form},
    elementwise::{self, From, ROW_UNITS, Turn},
    product::{self, FEW_UNITS, Kind, PITCH, TILE, TILE_UNITS},
    tile_attention, tile_product, units,
};
use burn::tensor::DType as TensorType;
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

fn source(
    name: String,
    units: usize,
    shared: usize,
    kernel: impl CubeKernel,
) -> Result<Source, String> {
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
    Ok(Source {
        text: compiled.to_string(),
        name,
        units,
        shared,
    })
}

/// All kernels, as they are launched for models of common shapes.
///
/// # Errors
/// What CubeCL's compiler says, after the kernel's name.
pub fn sources() -> Result<Vec<Source>, String> {
    let (properties, target) = (properties(), target());
    let element = crate::place::element;
    let mut all = Vec::new();
    for dtype in [TensorType::F32, TensorType::F16, TensorType::BF16] {
        for (what, dim, half, group, rows) in [
            // Llama-3.1-8B: a chunk, compact and not, and a decoded token.
            ("chunk of heads of 128", 128, 0, 4, 4096),
            ("rotated chunk of heads of 128", 128, 64, 4, 4096),
            ("token of heads of 128", 128, 0, 4, 4),
            // SmolLM2-135M.
            ("chunk of heads of 64", 64, 0, 3, 3072),
            // Phi-3-mini.
            ("chunk of heads of 96", 96, 0, 1, 1024),
        ] {
            let Some(form) = Form::new(dim, half, group, rows) else {
                return Err(format!("attention, {what}: no form"));
            };
            let form = Form {
                split: rows <= form.rows,
                ..form
            };
            let kernel = attention::attend::Attend::new(
                settings(form.units()),
                properties.clone(),
                target.clone(),
                tensor(),
                buffer(),
                buffer(),
                buffer(),
                buffer(),
                buffer(),
                buffer(),
                buffer(),
                (),
                (),
                form,
                element(dtype),
            );
            let name = format!("attention, {what}, {dtype:?}").to_lowercase();
            all.push(source(name, form.units(), form.shared(), kernel)?);
        }
        let kernel = units::append::Append::new(
            settings(256),
            properties.clone(),
            target.clone(),
            tensor(),
            tensor(),
            buffer(),
            buffer(),
            buffer(),
            128,
            element(dtype),
        );
        all.push(source(
            format!("append, {dtype:?}").to_lowercase(),
            256,
            0,
            kernel,
        )?);
        let kernel = units::copy::Copy::new(
            settings(256),
            properties.clone(),
            target.clone(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            128,
            true,
            element(dtype),
        );
        all.push(source(
            format!("compaction, {dtype:?}").to_lowercase(),
            256,
            0,
            kernel,
        )?);
    }
    for dtype in [TensorType::F16, TensorType::BF16] {
        for parts in [1, 2] {
            for (what, half, split) in [
                ("chunk", 0, false),
                ("rotated chunk", 64, false),
                ("part of a chunk", 0, true),
            ] {
                // Llama-3.1-8B.
                let form = tile_attention::Form::new(128, half, 4, parts, true, SHARED);
                let Some(form) = form else {
                    return Err(format!("attention in tiles, {what}: no form"));
                };
                let form = tile_attention::Form { split, ..form };
                let kernel = tile_attention::attend::Attend::new(
                    settings(form.units()),
                    properties.clone(),
                    target.clone(),
                    tensor(),
                    buffer(),
                    buffer(),
                    buffer(),
                    buffer(),
                    buffer(),
                    buffer(),
                    buffer(),
                    (),
                    (),
                    4,
                    4,
                    form,
                    element(dtype),
                );
                let name = format!("tiles, attention of a {what}, {dtype:?} in {parts}");
                let name = name.to_lowercase();
                all.push(source(name, form.units(), form.shared(), kernel)?);
            }
        }
    }
    let join = attention::join::Join::new(
        settings(256),
        properties.clone(),
        target.clone(),
        buffer(),
        buffer(),
        buffer(),
        (),
        128,
    );
    all.push(source("attention, joined".into(), 256, 0, join)?);
    for kind in [
        Kind::F32,
        Kind::F16,
        Kind::BF16,
        Kind::Q8_0,
        Kind::Q4_0,
        Kind::Q4_1,
        Kind::Q4K,
        Kind::Q5K,
        Kind::Q6K,
    ] {
        for rows in [1, 8] {
            let kernel = product::few::Few::new(
                settings(FEW_UNITS),
                properties.clone(),
                target.clone(),
                tensor(),
                buffer(),
                buffer(),
                buffer(),
                (),
                (),
                (),
                (),
                rows,
                kind,
            );
            let name = format!("product of {rows} rows, {kind:?}").to_lowercase();
            all.push(source(name, FEW_UNITS, 4 * FEW_UNITS * rows, kernel)?);
        }
        let kernel = product::many::Many::new(
            settings(TILE_UNITS),
            properties.clone(),
            target.clone(),
            tensor(),
            buffer(),
            buffer(),
            buffer(),
            (),
            (),
            (),
            (),
            kind,
        );
        let name = format!("product of a chunk, {kind:?}").to_lowercase();
        all.push(source(name, TILE_UNITS, 8 * TILE * PITCH, kernel)?);
    }
    for kind in [
        Kind::F32,
        Kind::F16,
        Kind::BF16,
        Kind::Q8_0,
        Kind::Q4_0,
        Kind::Q4_1,
        Kind::Q4K,
        Kind::Q5K,
        Kind::Q6K,
    ] {
        for parts in [1, 2] {
            let form = tile_product::Form::new(kind, parts, true);
            let kernel = tile_product::product::Product::new(
                settings(form.units()),
                properties.clone(),
                target.clone(),
                tensor(),
                buffer(),
                buffer(),
                buffer(),
                (),
                (),
                (),
                (),
                4,
                kind,
                form,
            );
            let name = format!("tiles, product of a chunk, {kind:?} in {parts}").to_lowercase();
            all.push(source(name, form.units(), form.shared(), kernel)?);
        }
    }
    for add in [false, true] {
        let kernel = elementwise::norm::Norm::new(
            settings(ROW_UNITS),
            properties.clone(),
            target.clone(),
            tensor(),
            tensor(),
            buffer(),
            buffer(),
            buffer(),
            (),
            add,
        );
        let name = if add { "norm of a sum" } else { "norm" };
        all.push(source(name.into(), ROW_UNITS, 4 * ROW_UNITS, kernel)?);
    }
    let gate = elementwise::gate::Gate::new(
        settings(256),
        properties.clone(),
        target.clone(),
        tensor(),
        buffer(),
    );
    all.push(source("gate".into(), 256, 0, gate)?);
    let turn = Turn {
        dim: 128,
        half: 64,
        from: From::First,
        inverse: false,
    };
    let rotate = elementwise::rotate::Rotate::new(
        settings(256),
        properties,
        target,
        tensor(),
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        (),
        (),
        turn,
    );
    all.push(source("rotation".into(), 256, 0, rotate)?);
    Ok(all)
}
