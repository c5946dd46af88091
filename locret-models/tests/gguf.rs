//! The reader against files and values of the reference package.

use locret_models::{Array, Encoding, Gguf, Value};
use std::path::PathBuf;

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/gguf")
        .join(name)
}

#[test]
fn every_encoding_decodes_to_the_bit() {
    let gguf = Gguf::open(golden("encodings.gguf")).unwrap();
    let expected: Vec<f32> = std::fs::read(golden("encodings.f32"))
        .unwrap()
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect();
    assert_eq!(gguf.tensors().len(), Encoding::ALL.len());
    for encoding in Encoding::ALL {
        assert!(gguf.tensor(encoding.name()).is_some(), "{encoding}");
    }
    for (tensor, expected) in gguf.tensors().iter().zip(expected.chunks_exact(2 * 512)) {
        assert_eq!(tensor.shape, [2, 512]);
        assert_eq!(tensor.name, tensor.encoding.name());
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
