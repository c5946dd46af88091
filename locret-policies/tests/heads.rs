//! Files of retaining heads: what PyTorch wrote, what is written here, and what is damaged or hostile.

mod common;

use common::{Numbers, spec};
use locret_core::{DType, ModelSpec, Rows, compute};
use locret_policies::{HeadWeights, LayerHead, PolicyError, RetainingHeads};
use std::path::{Path, PathBuf};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/heads")
        .join(name)
}

/// The model of `golden/heads/make.py`.
fn model() -> ModelSpec {
    spec(2, 1, 3, 2)
}

/// The values that `golden/heads/make.py` describes.
fn expected() -> Vec<LayerHead> {
    let values = |n: usize, count: usize| -> Vec<f32> {
        (0..count)
            .map(|i| (i as f32 % 7.0 - 3.0) / 8.0 + n as f32 / 4.0)
            .collect()
    };
    (0..2)
        .map(|layer| LayerHead {
            d_r: 4,
            fc1: values(2 * layer, 40),
            fc2: values(2 * layer + 1, 4),
            ..LayerHead::default()
        })
        .collect()
}

fn random_heads(spec: &ModelSpec, d_r: usize) -> HeadWeights {
    let mut numbers = Numbers(3);
    let inputs = spec.layer(0).qkv_features();
    let layer = |_| LayerHead {
        d_r,
        fc1: numbers.list(d_r * inputs, 1.0),
        fc2: numbers.list(spec.kv_heads * d_r, 1.0),
        ..LayerHead::default()
    };
    HeadWeights {
        layers: (0..spec.layers).map(layer).collect(),
        metadata: ["trained on", "by", "with"]
            .map(|key| (key.to_owned(), "nothing".to_owned()))
            .into(),
        ..HeadWeights::default()
    }
}

#[test]
fn files_of_every_kind_are_read() {
    for file in [
        "f32.safetensors",
        "f16.safetensors",
        "bf16.safetensors",
        "heads.bin",
        "views.bin",
        "legacy.bin",
        "whole.safetensors",
    ] {
        let heads =
            HeadWeights::load(golden(file), &model()).unwrap_or_else(|e| panic!("{file}: {e}"));
        assert_eq!(heads.layers, expected(), "{file}");
        assert_eq!(heads.parameters(), 88);
    }
    let heads = HeadWeights::load(golden("f32.safetensors"), &model()).unwrap();
    assert_eq!(heads.metadata["origin"], "make.py");
}

#[test]
fn what_is_saved_is_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(3, 2, 3, 4);
    let heads = random_heads(&spec, 8);
    for (dtype, error) in [(DType::F32, 0.0), (DType::F16, 5e-4), (DType::BF16, 4e-3)] {
        let path = folder.path().join("heads.safetensors");
        heads.save(&path, dtype).unwrap();
        let again = HeadWeights::load(&path, &spec).unwrap();
        assert_eq!(again.metadata, heads.metadata);
        for (a, b) in again.layers.iter().zip(&heads.layers) {
            assert_eq!(a.d_r, b.d_r);
            let pairs = a.fc1.iter().zip(&b.fc1).chain(a.fc2.iter().zip(&b.fc2));
            assert!(
                pairs.into_iter().all(|(a, b)| (a - b).abs() <= error),
                "{dtype:?}"
            );
        }
        let bytes = std::fs::read(&path).unwrap();
        again.save(&path, dtype).unwrap();
        assert!(
            bytes == std::fs::read(&path).unwrap(),
            "equal heads, equal files"
        );
        let size = bytes.len();
        let bytes = if dtype == DType::F32 { 4 } else { 2 };
        assert!(size > heads.parameters() * bytes && size < heads.parameters() * bytes + 2000);
    }
    // Nothing but the file is left in the folder.
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_file_that_cannot_be_written_leaves_the_old_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("heads.safetensors");
    let spec = spec(1, 1, 1, 2);
    let mut heads = random_heads(&spec, 2);
    heads.save(&path, DType::F32).unwrap();
    let before = std::fs::read(&path).unwrap();
    heads.layers[0].fc2[1] = 1e6;
    assert!(matches!(
        heads.save(&path, DType::F16),
        Err(PolicyError::NotFinite { index: 1, .. })
    ));
    heads.layers[0].fc2.pop();
    assert!(matches!(
        heads.save(&path, DType::F32),
        Err(PolicyError::Shape { .. })
    ));
    assert_eq!(std::fs::read(&path).unwrap(), before);
    assert!(matches!(
        random_heads(&spec, 2).save(&path, DType::Q8_0),
        Err(PolicyError::Dtype { found, .. }) if found == "Q8_0"
    ));
    assert_eq!(std::fs::read(&path).unwrap(), before);
    let nowhere = folder.path().join("no/such/folder/heads.safetensors");
    let heads = random_heads(&spec, 2);
    assert!(matches!(
        heads.save(nowhere, DType::F32),
        Err(PolicyError::Io { .. })
    ));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn widths_can_differ_between_layers() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("heads.safetensors");
    let spec = spec(2, 2, 1, 2);
    let mut heads = random_heads(&spec, 4);
    heads.layers[1] = random_heads(&spec, 6).layers.remove(1);
    heads.save(&path, DType::F32).unwrap();
    let again = HeadWeights::load(&path, &spec).unwrap();
    assert_eq!(again.layers, heads.layers);
    let on_device = RetainingHeads::new(&again, &spec, &*compute(&Default::default())).unwrap();
    on_device.validate(&spec).unwrap();
    for (layer, head) in again.layers.iter().enumerate() {
        assert_eq!(head.d_r, [4, 6][layer]);
        let layer_spec = spec.layer(layer);
        let part = |heads: usize| {
            let width = heads * layer_spec.head_dim;
            Rows::new(vec![0.5; width], width, &Default::default()).unwrap()
        };
        let (q, k) = (part(spec.heads), part(spec.kv_heads));
        let scores = on_device.scores(layer, &[&q, &k, &k]).unwrap();
        assert_eq!(scores.len(), spec.kv_heads);
    }
}

#[test]
fn heads_of_another_model_are_refused() {
    let file = golden("f32.safetensors");
    let load = |spec: &ModelSpec| HeadWeights::load(&file, spec).unwrap_err();
    // Three layers: the third has no head.
    match load(&spec(3, 1, 3, 2)) {
        PolicyError::MissingKeys { keys, .. } => assert_eq!(
            keys,
            [
                "model.layers.2.self_attn.fc1.weight",
                "model.layers.2.self_attn.fc2.weight"
            ]
        ),
        other => panic!("{other}"),
    }
    // One layer: the second head is too much.
    match load(&spec(1, 1, 3, 2)) {
        PolicyError::UnknownKeys { keys, .. } => assert_eq!(
            keys,
            [
                "model.layers.1.self_attn.fc1.weight",
                "model.layers.1.self_attn.fc2.weight"
            ]
        ),
        other => panic!("{other}"),
    }
    // ... in a whole checkpoint too.
    let whole = HeadWeights::load(golden("whole.safetensors"), &spec(1, 1, 3, 2));
    assert!(matches!(whole, Err(PolicyError::UnknownKeys { keys, .. }) if keys.len() == 2));
    // Wider heads, more KV heads.
    for other in [spec(2, 1, 3, 4), spec(2, 2, 3, 2), spec(2, 1, 5, 2)] {
        let error = load(&other);
        assert!(matches!(error, PolicyError::Shape { .. }), "{error}");
        assert!(error.to_string().contains("model.layers."), "{error}");
    }
    let heads = HeadWeights::load(&file, &model()).unwrap();
    assert!(
        RetainingHeads::new(&heads, &spec(3, 1, 3, 2), &*compute(&Default::default())).is_err()
    );
    let on_device = RetainingHeads::new(&heads, &model(), &*compute(&Default::default())).unwrap();
    assert!(on_device.validate(&spec(2, 1, 3, 4)).is_err());
}

/// A safetensors file with this header.
fn with_header(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

fn head_entry(
    layer: usize,
    name: &str,
    dtype: &str,
    shape: &str,
    from: usize,
    to: usize,
) -> String {
    format!(
        r#""model.layers.{layer}.self_attn.{name}.weight":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{from},{to}]}}"#
    )
}

#[test]
fn damaged_and_hostile_files_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    let spec = spec(1, 1, 1, 1);
    let load = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        HeadWeights::load(&path, &spec).unwrap_err()
    };
    let fc1 = |dtype: &str, to| head_entry(0, "fc1", dtype, "[2,3]", 0, to);
    let fc2 = |from: usize| head_entry(0, "fc2", "F32", "[1,2]", from, from + 8);
    let good = format!("{{{},{}}}", fc1("F32", 24), fc2(24));
    std::fs::write(&path, with_header(&good, 32)).unwrap();
    HeadWeights::load(&path, &spec).unwrap();

    assert!(matches!(load(b""), PolicyError::File { .. }));
    assert!(matches!(load(b"hello"), PolicyError::File { .. }));
    assert!(matches!(
        load(b"some text that is longer than a header"),
        PolicyError::File { .. }
    ));
    // Cut short in the data, in the header, in the length.
    for cut in [1, 9, 33, 200] {
        let whole = with_header(&good, 32);
        let error = load(&whole[..whole.len() - cut]);
        assert!(matches!(error, PolicyError::File { .. }), "{error}");
    }
    // A header of 2^60 bytes; a tensor of 2^60 elements; one whose size overflows.
    let mut long = with_header(&good, 32);
    long[..8].copy_from_slice(&(1u64 << 60).to_le_bytes());
    assert!(matches!(load(&long), PolicyError::File { .. }));
    for shape in [
        "[1152921504606846976,1]",
        "[4294967296,4294967296]",
        "[2,-3]",
    ] {
        let huge = format!("{{{}}}", head_entry(0, "fc1", "F32", shape, 0, 24));
        assert!(
            matches!(load(&with_header(&huge, 24)), PolicyError::File { .. }),
            "{shape}"
        );
    }
    // Overlapping offsets, offsets beyond the end.
    let overlap = format!("{{{},{}}}", fc1("F32", 24), fc2(16));
    assert!(matches!(
        load(&with_header(&overlap, 32)),
        PolicyError::File { .. }
    ));
    assert!(matches!(
        load(&with_header(&good, 31)),
        PolicyError::File { .. }
    ));
    // Integers and doubles.
    let integers = format!("{{{},{}}}", fc1("I32", 24), fc2(24));
    assert!(
        matches!(load(&with_header(&integers, 32)), PolicyError::Dtype { found, .. } if found == "I32")
    );
    let doubles = format!("{{{},{}}}", fc1("F64", 48), fc2(48));
    assert!(
        matches!(load(&with_header(&doubles, 56)), PolicyError::Dtype { found, .. } if found == "F64")
    );
    // Not a number.
    let mut nan = with_header(&good, 32);
    let at = nan.len() - 32 + 8;
    nan[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    assert!(matches!(
        load(&nan),
        PolicyError::NotFinite { index: 2, .. }
    ));
    // d_R of the two tensors, a scalar, nothing at all, a bias, an odd spelling.
    let uneven = format!(
        "{{{},{}}}",
        fc1("F32", 24),
        head_entry(0, "fc2", "F32", "[1,3]", 24, 36)
    );
    assert!(matches!(
        load(&with_header(&uneven, 36)),
        PolicyError::Shape { .. }
    ));
    let scalar = format!("{{{}}}", head_entry(0, "fc1", "F32", "[]", 0, 4));
    assert!(matches!(
        load(&with_header(&scalar, 4)),
        PolicyError::Shape { .. }
    ));
    let empty = format!("{{{}}}", head_entry(0, "fc1", "F32", "[0,3]", 0, 0));
    assert!(matches!(
        load(&with_header(&empty, 0)),
        PolicyError::Shape { .. }
    ));
    assert!(
        matches!(load(&with_header("{}", 0)), PolicyError::MissingKeys { keys, .. } if keys.len() == 2)
    );
    for name in [
        "model.layers.0.self_attn.fc1.bias",
        "model.layers.00.self_attn.fc1.weight",
        "fc1",
    ] {
        let extra = format!(
            r#"{},"{name}":{{"dtype":"F32","shape":[1],"data_offsets":[32,36]}}}}"#,
            &good[..good.len() - 1]
        );
        assert!(
            matches!(load(&with_header(&extra, 36)), PolicyError::UnknownKeys { keys, .. } if keys == [name]),
            "{name}"
        );
    }
    assert!(matches!(
        HeadWeights::load(folder.path().join("none"), &spec),
        Err(PolicyError::Io { .. })
    ));
}

#[test]
fn damaged_pytorch_files_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("heads.bin");
    for name in ["heads.bin", "legacy.bin"] {
        let good = std::fs::read(golden(name)).unwrap();
        let mut refused = 0;
        for cut in (1..good.len()).step_by(37) {
            std::fs::write(&path, &good[..cut]).unwrap();
            refused += usize::from(HeadWeights::load(&path, &model()).is_err());
        }
        assert_eq!(refused, (1..good.len()).step_by(37).count(), "{name}");
        // Any single byte can be wrong; what is then read is either right or an error.
        for at in (0..good.len()).step_by(11) {
            let mut bad = good.clone();
            bad[at] ^= 0x55;
            std::fs::write(&path, &bad).unwrap();
            if let Ok(heads) = HeadWeights::load(&path, &model()) {
                assert_eq!(heads.layers.len(), 2);
                heads.validate(&model()).unwrap();
            }
        }
    }
    // A pickle that names a function to call is not obeyed.
    std::fs::write(
        &path,
        b"\x80\x02cposix\nsystem\nq\x00X\x04\x00\x00\x00trueq\x01\x85q\x02Rq\x03.",
    )
    .unwrap();
    assert!(matches!(
        HeadWeights::load(&path, &model()),
        Err(PolicyError::File { .. })
    ));
}

#[test]
fn shards_and_folders_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(2, 1, 1, 1);
    let write = |name: &str, layer: usize| {
        let header = format!(
            "{{{},{}}}",
            head_entry(layer, "fc1", "F32", "[2,3]", 0, 24),
            head_entry(layer, "fc2", "F32", "[1,2]", 24, 32)
        );
        std::fs::write(folder.path().join(name), with_header(&header, 32)).unwrap();
    };
    write("model-1.safetensors", 0);
    write("model-2.safetensors", 1);
    let index = folder.path().join("model.safetensors.index.json");
    let text = |second: &str| {
        format!(r#"{{"metadata":{{}},"weight_map":{{"a":"model-1.safetensors","b":"{second}"}}}}"#)
    };
    std::fs::write(&index, text("model-2.safetensors")).unwrap();
    let heads = HeadWeights::load(folder.path(), &spec).unwrap();
    assert_eq!(heads, HeadWeights::load(&index, &spec).unwrap());
    assert_eq!(heads.layers.len(), 2);

    std::fs::write(&index, text("model-1.safetensors")).unwrap();
    assert!(matches!(
        HeadWeights::load(folder.path(), &spec),
        Err(PolicyError::MissingKeys { .. })
    ));
    // No name leads elsewhere, on any operating system.
    for outside in [
        "../model-2.safetensors",
        "/model-2.safetensors",
        "a/model-2.safetensors",
        "./model-2.safetensors",
        "model-2.safetensors/",
        r"..\\model-2.safetensors",
        "c:model-2.safetensors",
        r"model-2\u0000.safetensors",
        "..",
        "",
    ] {
        std::fs::write(&index, text(outside)).unwrap();
        match HeadWeights::load(folder.path(), &spec) {
            Err(PolicyError::File { message, .. }) if message.contains("beside the index") => {}
            other => panic!("{outside}: {other:?}"),
        }
    }
    std::fs::write(&index, text("model-3.safetensors")).unwrap();
    assert!(matches!(
        HeadWeights::load(folder.path(), &spec),
        Err(PolicyError::Io { .. })
    ));
    std::fs::write(&index, text("model.safetensors.index.json")).unwrap();
    assert!(matches!(
        HeadWeights::load(folder.path(), &spec),
        Err(PolicyError::File { .. })
    ));
    std::fs::write(&index, "{\"weight_map\": 3}").unwrap();
    assert!(matches!(
        HeadWeights::load(folder.path(), &spec),
        Err(PolicyError::File { .. })
    ));
    std::fs::remove_file(&index).unwrap();
    assert!(matches!(
        HeadWeights::load(folder.path(), &spec),
        Err(PolicyError::File { .. })
    ));
}

#[test]
fn heads_in_a_whole_bf16_checkpoint_of_shards() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(2, 1, 1, 1);
    let write = |layer: usize, odd: &str| {
        let header = format!(
            "{{{},{},\"model.layers.{layer}.self_attn.q_proj.weight\":{{\"dtype\":\"BF16\",\
             \"shape\":[1,2],\"data_offsets\":[16,20]}},\"model.embed_tokens.weight\":\
             {{\"dtype\":\"BF16\",\"shape\":[2],\"data_offsets\":[20,24]}}}}",
            head_entry(layer, "fc1", "BF16", "[2,3]", 0, 12),
            head_entry(layer, odd, "BF16", "[1,2]", 12, 16),
        );
        let mut bytes = with_header(&header, 24);
        // 1.5 in every place.
        let data = bytes.len() - 24;
        for value in bytes[data..].chunks_exact_mut(2) {
            value.copy_from_slice(&[0xc0, 0x3f]);
        }
        let file = folder.path().join(format!("model-{layer}.safetensors"));
        std::fs::write(file, bytes).unwrap();
    };
    write(0, "fc2");
    write(1, "fc2");
    let index = r#"{"weight_map":{"a":"model-0.safetensors","b":"model-1.safetensors"}}"#;
    std::fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
    let heads = HeadWeights::load(folder.path(), &spec).unwrap();
    assert_eq!(heads.layers.len(), 2);
    for layer in &heads.layers {
        assert_eq!(
            (&layer.fc1[..], &layer.fc2[..]),
            (&[1.5; 6][..], &[1.5; 2][..])
        );
    }
    // A head that is named otherwise is unknown; without it, one is missing.
    write(1, "fc3");
    match HeadWeights::load(folder.path(), &spec) {
        Err(PolicyError::MissingKeys { keys, .. }) => {
            assert_eq!(keys, ["model.layers.1.self_attn.fc2.weight"]);
        }
        Err(PolicyError::UnknownKeys { keys, .. }) => {
            assert_eq!(keys, ["model.layers.1.self_attn.fc3.weight"]);
        }
        other => panic!("{other:?}"),
    }
}
