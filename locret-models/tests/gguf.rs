//! The reader against files and values of the reference package, and against hostile files.

mod common;

use common::gguf_file::{self, File};
use locret_models::{Array, DType, Gguf, GgufTensor, ModelError, Result, Value};
use proptest::prelude::*;
use std::path::PathBuf;

fn golden(name: &str) -> PathBuf {
    common::golden("gguf").join(name)
}

#[test]
fn every_encoding_decodes_to_the_bit() {
    let gguf = Gguf::open(golden("encodings.gguf")).unwrap();
    let expected: Vec<f32> = std::fs::read(golden("encodings.f32"))
        .unwrap()
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect();
    assert_eq!(gguf.tensors().len(), DType::ALL.len());
    for dtype in DType::ALL {
        assert!(gguf.tensor(dtype.name()).is_some(), "{dtype}");
    }
    for (tensor, expected) in gguf.tensors().iter().zip(expected.chunks_exact(2 * 512)) {
        assert_eq!(tensor.shape, [2, 512]);
        assert_eq!(tensor.name, tensor.dtype.name());
        let found = gguf.dequantize(tensor).unwrap();
        for (i, (a, b)) in found.iter().zip(expected).enumerate() {
            // A zero times a negative scale may be either zero.
            assert!(
                a.to_bits() == b.to_bits() || (*a == 0.0 && *b == 0.0),
                "{} at {i}: found {a}, expected {b}",
                tensor.name
            );
        }
        let row = gguf.dequantize_rows(tensor, 1..2).unwrap();
        assert_eq!(row, expected[512..], "{}", tensor.name);
    }
}

#[test]
fn metadata_of_every_type() {
    let gguf = Gguf::open(golden("encodings.gguf")).unwrap();
    let strings = ["a", "", "日本"].map(String::from).to_vec();
    for (key, value) in [
        ("u8", Value::U8(200)),
        ("i8", Value::I8(-100)),
        ("u16", Value::U16(60_000)),
        ("i16", Value::I16(-30_000)),
        ("u32", Value::U32(4_000_000_000)),
        ("i32", Value::I32(-2_000_000_000)),
        ("u64", Value::U64(1 << 60)),
        ("i64", Value::I64(-(1 << 60))),
        ("f32", Value::F32(1.5)),
        ("f64", Value::F64(-2.25)),
        ("bool", Value::Bool(true)),
        ("string", Value::String("grüße ☃".into())),
        ("strings", Value::Array(Array::String(strings))),
        ("ints", Value::Array(Array::I32(vec![1, -2, 3]))),
        ("floats", Value::Array(Array::F32(vec![0.5, -0.25]))),
    ] {
        assert_eq!(gguf.metadata()[&format!("test.{key}")], value, "{key}");
    }
}

#[test]
fn entries_that_are_not_of_this_file() {
    let gguf = Gguf::open(golden("encodings.gguf")).unwrap();
    let own = gguf.tensors()[0].clone();
    assert!(gguf.raw_rows(&own, 0..2).is_ok());
    for (shape, bytes) in [
        (vec![4, 512], own.bytes.clone()),
        (vec![usize::MAX, usize::MAX, 2], own.bytes.clone()),
        (vec![2, usize::MAX], own.bytes.clone()),
        (own.shape.clone(), 0..usize::MAX),
        #[expect(clippy::reversed_empty_ranges)]
        (own.shape.clone(), 9..3),
        (own.shape.clone(), own.bytes.start..own.bytes.start + 3),
        (Vec::new(), usize::MAX - 1..usize::MAX),
    ] {
        let strange = GgufTensor {
            shape,
            bytes,
            ..own.clone()
        };
        let last = strange.rows();
        for rows in [0..last, last - 1..last, 0..usize::MAX] {
            for found in [
                gguf.raw_rows(&strange, rows.clone()).map(drop),
                gguf.dequantize_rows(&strange, rows).map(drop),
            ] {
                assert!(
                    matches!(found, Err(ModelError::Format { .. })),
                    "{strange:?}"
                );
            }
        }
    }
}

fn open(bytes: &[u8]) -> Result<Gguf> {
    Gguf::open(gguf_file::write(bytes).path())
}

fn open_error(bytes: &[u8]) -> ModelError {
    open(bytes).expect_err("a hostile file was accepted")
}

fn every_value() -> Vec<(&'static str, Value)> {
    vec![
        ("u8", Value::U8(200)),
        ("i8", Value::I8(-100)),
        ("u16", Value::U16(60_000)),
        ("i16", Value::I16(-30_000)),
        ("u32", Value::U32(4_000_000_000)),
        ("i32", Value::I32(-2_000_000_000)),
        ("u64", Value::U64(1 << 60)),
        ("i64", Value::I64(-(1 << 60))),
        ("f32", Value::F32(1.5)),
        ("f64", Value::F64(-2.25)),
        ("bool", Value::Bool(true)),
        ("string", Value::String("grüße".into())),
        ("a.u8", Value::Array(Array::U8(vec![1, 2]))),
        ("a.i8", Value::Array(Array::I8(vec![-1, 2]))),
        ("a.u16", Value::Array(Array::U16(vec![1, 2]))),
        ("a.i16", Value::Array(Array::I16(vec![-1, 2]))),
        ("a.u32", Value::Array(Array::U32(vec![1, 2]))),
        ("a.i32", Value::Array(Array::I32(vec![-1, 2]))),
        ("a.u64", Value::Array(Array::U64(vec![1, 2]))),
        ("a.i64", Value::Array(Array::I64(vec![-1, 2]))),
        ("a.f32", Value::Array(Array::F32(vec![1.5]))),
        ("a.f64", Value::Array(Array::F64(vec![1.5, 2.5]))),
        ("a.bool", Value::Array(Array::Bool(vec![true, false]))),
        (
            "a.string",
            Value::Array(Array::String(vec!["a".into(), String::new()])),
        ),
        (
            "a.array",
            Value::Array(Array::Array(vec![
                Array::U8(vec![7]),
                Array::String(vec!["x".into()]),
            ])),
        ),
    ]
}

fn small() -> File {
    let mut file = File::default();
    for (key, value) in every_value() {
        file = file.meta(key, value);
    }
    file.f32("norm", &[3], &[1.0, 2.0, 3.0])
        .tensor("w", &[2, 32], DType::Q8_0, vec![1; 68])
        .f32("m", &[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
}

#[test]
fn every_value_type_is_read() {
    let file = small().write();
    let gguf = Gguf::open(file.path()).unwrap();
    assert_eq!(gguf.version(), 3);
    for (key, value) in every_value() {
        assert_eq!(gguf.metadata()[key], value, "{key}");
    }
    assert_eq!(gguf.get_u64("u16").unwrap(), Some(60_000));
    assert_eq!(gguf.get_f64("f64").unwrap(), Some(-2.25));
    assert_eq!(gguf.get_bool("bool").unwrap(), Some(true));
    assert_eq!(gguf.get_str("string").unwrap(), Some("grüße"));
    assert_eq!(gguf.get_strings("a.string").unwrap().unwrap().len(), 2);
    assert_eq!(gguf.get_str("absent").unwrap(), None);
    assert!(matches!(
        gguf.get_u64("string"),
        Err(ModelError::Config { what, .. }) if what == "string"
    ));
}

#[test]
fn tensors_and_rows() {
    let file = small().write();
    let gguf = Gguf::open(file.path()).unwrap();
    let m = gguf.tensor("m").unwrap();
    assert_eq!(
        (m.shape.as_slice(), m.rows(), m.cols()),
        ([2, 3].as_slice(), 2, 3)
    );
    assert_eq!(gguf.dequantize(m).unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    assert_eq!(gguf.dequantize_rows(m, 1..2).unwrap(), [4.0, 5.0, 6.0]);
    assert_eq!(gguf.raw_rows(m, 1..2).unwrap()[..4], 4f32.to_le_bytes());
    assert!(gguf.dequantize_rows(m, 1..3).is_err());
    #[allow(clippy::reversed_empty_ranges)]
    let reversed = 2..1;
    assert!(gguf.dequantize_rows(m, reversed).is_err());
    let norm = gguf.tensor("norm").unwrap();
    assert_eq!((norm.rows(), norm.cols()), (1, 3));
    assert!(gguf.tensor("absent").is_none());
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = small().bytes();
    open(&bytes).unwrap();
    for len in 0..bytes.len() {
        assert!(open(&bytes[..len]).is_err(), "cut at {len}");
    }
    assert!(matches!(
        open_error(&bytes[..bytes.len() - 1]),
        ModelError::Truncated { what, .. } if what.contains("\"m\"")
    ));
}

#[test]
fn counts_and_lengths_beyond_the_file() {
    let head = |tensors: u64, metadata: u64| {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend(tensors.to_le_bytes());
        out.extend(metadata.to_le_bytes());
        out
    };
    for count in [1 << 60, u64::MAX, 1000] {
        assert!(matches!(
            open_error(&head(count, 0)),
            ModelError::Truncated { needed, .. } if needed >= u128::from(count)
        ));
        assert!(matches!(
            open_error(&head(0, count)),
            ModelError::Truncated { .. }
        ));
        // A key, a string and an array of every type that claim as many.
        let mut key = head(0, 1);
        key.extend(count.to_le_bytes());
        key.extend([0; 64]);
        assert!(matches!(open_error(&key), ModelError::Truncated { .. }));
        for tag in 0..=12u32 {
            let mut array = head(0, 1);
            gguf_file::string(&mut array, "key");
            array.extend(9u32.to_le_bytes());
            array.extend(tag.to_le_bytes());
            array.extend(count.to_le_bytes());
            array.extend([0; 64]);
            assert!(
                matches!(open_error(&array), ModelError::Truncated { .. }),
                "type {tag}, {count}"
            );
        }
    }
    let huge = |shape: &[u64]| {
        let mut file = File::default();
        file.tensors
            .push(("t".into(), shape.to_vec(), 0, vec![0; 64]));
        file.bytes()
    };
    for shape in [
        &[1 << 60][..],
        &[1 << 32, 1 << 32],
        &[u64::MAX, u64::MAX, u64::MAX, u64::MAX],
        &[17],
    ] {
        assert!(
            matches!(open_error(&huge(shape)), ModelError::Truncated { .. }),
            "{shape:?}"
        );
    }
    assert!(matches!(open_error(&huge(&[0])), ModelError::Format { .. }));
    assert!(matches!(
        open_error(&huge(&[1, 1, 1, 1, 1])),
        ModelError::Format { .. }
    ));
    assert!(matches!(open_error(&huge(&[])), ModelError::Format { .. }));
}

#[test]
fn nested_arrays_end() {
    let mut inner = Array::U8(vec![1]);
    for _ in 0..3 {
        inner = Array::Array(vec![inner]);
    }
    let fits = File::default().meta("k", Value::Array(inner.clone()));
    open(&fits.bytes()).unwrap();
    // Deeper ones are written by hand, without recursion.
    let mut bytes = b"GGUF\x03\0\0\0".to_vec();
    bytes.extend(0u64.to_le_bytes());
    bytes.extend(1u64.to_le_bytes());
    gguf_file::string(&mut bytes, "k");
    bytes.extend(9u32.to_le_bytes());
    for _ in 0..100_000 {
        bytes.extend(9u32.to_le_bytes());
        bytes.extend(1u64.to_le_bytes());
    }
    assert!(matches!(
        open_error(&bytes),
        ModelError::Format { expected, .. } if expected.contains("nested")
    ));
}

#[test]
fn offsets_and_overlaps() {
    let mut file = small();
    file.offsets = Some(vec![0, 32, 32]);
    assert!(matches!(
        open_error(&file.bytes()),
        ModelError::Overlap { .. }
    ));
    file.offsets = Some(vec![0, 33, 128]);
    assert!(matches!(
        open_error(&file.bytes()),
        ModelError::Format { expected, .. } if expected.contains("multiple of 32")
    ));
    for offset in [1 << 20, 1 << 60, u64::MAX - 31] {
        file.offsets = Some(vec![0, 32, offset]);
        assert!(matches!(
            open_error(&file.bytes()),
            ModelError::Truncated { .. }
        ));
    }
}

#[test]
fn alignment_is_read_and_checked() {
    let file = small().meta("general.alignment", Value::U32(64)).write();
    let gguf = Gguf::open(file.path()).unwrap();
    let m = gguf.tensor("m").unwrap();
    assert_eq!(m.bytes.start % 64, 0);
    assert_eq!(gguf.dequantize(m).unwrap()[5], 6.0);
    for bad in [
        Value::U32(0),
        Value::U32(3),
        Value::U32(1 << 31),
        Value::I32(-32),
        Value::F32(32.0),
    ] {
        let bytes = File::default().meta("general.alignment", bad).bytes();
        assert!(matches!(
            open_error(&bytes),
            ModelError::Format { what, .. } if what == "general.alignment"
        ));
    }
}

#[test]
fn names_are_unique() {
    let file = small().f32("m", &[1], &[0.0]);
    assert!(matches!(
        open_error(&file.bytes()),
        ModelError::Duplicate { name, .. } if name == "m"
    ));
    let file = small().meta("u8", Value::U8(1));
    assert!(matches!(
        open_error(&file.bytes()),
        ModelError::Duplicate { name, .. } if name == "u8"
    ));
}

#[test]
fn other_formats_are_named() {
    assert!(matches!(open_error(b""), ModelError::Truncated { .. }));
    assert!(matches!(
        open_error(b"PK\x03\x04aaaa"),
        ModelError::Format { .. }
    ));
    let mut bytes = small().bytes();
    bytes[4] = 1;
    assert!(matches!(
        open_error(&bytes),
        ModelError::Format { what, .. } if what == "version"
    ));
    bytes[4..8].copy_from_slice(&3u32.to_be_bytes());
    assert!(open_error(&bytes).to_string().contains("big-endian"));
    let mut file = small();
    for (tag, name) in [(19, "IQ1_S"), (21, "IQ3_S"), (29, "IQ1_M"), (39, "MXFP4")] {
        file.tensors[0].2 = tag;
        assert!(matches!(
            open_error(&file.bytes()),
            ModelError::UnsupportedEncoding { encoding, .. } if encoding == name
        ));
    }
    file.tensors[0].2 = 77;
    assert!(matches!(
        open_error(&file.bytes()),
        ModelError::UnsupportedEncoding { .. }
    ));
    file = small();
    file.tensors[1].1 = vec![2, 31];
    assert!(matches!(
        open_error(&file.bytes()),
        ModelError::Format { expected, .. } if expected.contains("whole Q8_0 blocks")
    ));
    assert!(matches!(
        Gguf::open("/no/such/file.gguf"),
        Err(ModelError::Io { .. })
    ));
    assert!(Gguf::open(std::env::temp_dir()).is_err());
}

#[test]
fn names_are_utf8_and_bools_are_bools() {
    // A key.
    let mut bytes = File::default().meta("k", Value::Bool(true)).bytes();
    let at = bytes.len() - 1 - 4 - 1;
    assert_eq!(bytes[at], b'k');
    bytes[at] = 0xff;
    assert!(matches!(
        open_error(&bytes),
        ModelError::Format { expected, .. } if expected == "UTF-8 text"
    ));
    // Values may have parts of characters: vocabularies do.
    for value in [
        Value::String("abc".into()),
        Value::Array(Array::String(vec!["x".into(), "abc".into()])),
    ] {
        let mut bytes = File::default().meta("k", value).bytes();
        let at = bytes.len() - 1;
        bytes[at] = 0xe3;
        let found = format!("{:?}", open(&bytes).unwrap().metadata()["k"]);
        assert!(found.contains("ab\u{fffd}"), "{found}");
    }
    let mut bytes = File::default().meta("k", Value::Bool(true)).bytes();
    let at = bytes.len() - 1;
    bytes[at] = 2;
    assert!(matches!(open_error(&bytes), ModelError::Format { .. }));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn mutated_files_never_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
        cut in prop::option::weighted(0.2, any::<prop::sample::Index>()),
    ) {
        let mut bytes = small().bytes();
        for (at, value) in edits {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok(gguf) = open(&bytes) {
            for tensor in gguf.tensors() {
                gguf.dequantize(tensor).unwrap();
            }
        }
    }
}
