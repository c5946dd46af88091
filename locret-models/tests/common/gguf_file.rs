//! A small writer of GGUF files, for tests of what reads them.
#![allow(
    unreachable_patterns,
    reason = "the tests inside the crate see all values"
)]

use locret_models::{Array, DType, Value};

/// A file in the making.
#[derive(Debug, Clone, Default)]
pub struct File {
    pub metadata: Vec<(String, Value)>,
    /// Name, shape (slowest first), type number, bytes.
    pub tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
    /// Offsets, where they are not to follow from the sizes.
    pub offsets: Option<Vec<u64>>,
}

/// GGML's number of a type.
pub fn tag(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::Q4_0 => 2,
        DType::Q4_1 => 3,
        DType::Q5_0 => 6,
        DType::Q5_1 => 7,
        DType::Q8_0 => 8,
        DType::Q2_K => 10,
        DType::Q3_K => 11,
        DType::Q4_K => 12,
        DType::Q5_K => 13,
        DType::Q6_K => 14,
        DType::IQ4_NL => 20,
        DType::IQ4_XS => 23,
        DType::BF16 => 30,
        other => panic!("no number for {other}"),
    }
}

impl File {
    pub fn meta(mut self, key: &str, value: Value) -> Self {
        self.metadata.push((key.to_owned(), value));
        self
    }

    pub fn tensor(mut self, name: &str, shape: &[u64], dtype: DType, bytes: Vec<u8>) -> Self {
        self.tensors
            .push((name.to_owned(), shape.to_vec(), tag(dtype), bytes));
        self
    }

    pub fn f32(self, name: &str, shape: &[u64], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.tensor(name, shape, DType::F32, bytes)
    }

    pub fn bytes(&self) -> Vec<u8> {
        let alignment = self
            .metadata
            .iter()
            .find(|(k, _)| k == "general.alignment")
            .and_then(|(_, v)| v.as_u64())
            .unwrap_or(32)
            .max(1) as usize;
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            string(&mut out, key);
            self::value(&mut out, value);
        }
        let mut offset = 0;
        for (i, (name, shape, tag, bytes)) in self.tensors.iter().enumerate() {
            string(&mut out, name);
            out.extend((shape.len() as u32).to_le_bytes());
            for dim in shape.iter().rev() {
                out.extend(dim.to_le_bytes());
            }
            out.extend(tag.to_le_bytes());
            let at = self.offsets.as_ref().map_or(offset as u64, |o| o[i]);
            out.extend(at.to_le_bytes());
            offset = (offset + bytes.len()).next_multiple_of(alignment);
        }
        for (_, _, _, bytes) in &self.tensors {
            out.resize(out.len().next_multiple_of(alignment), 0);
            out.extend(bytes);
        }
        out
    }

    pub fn write(&self) -> tempfile::NamedTempFile {
        write(&self.bytes())
    }
}

pub fn write(bytes: &[u8]) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    file
}

pub fn string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn value(out: &mut Vec<u8>, value: &Value) {
    macro_rules! put {
        ($tag:expr, $bytes:expr) => {{
            out.extend(($tag as u32).to_le_bytes());
            out.extend($bytes);
        }};
    }
    match value {
        Value::U8(x) => put!(0, x.to_le_bytes()),
        Value::I8(x) => put!(1, x.to_le_bytes()),
        Value::U16(x) => put!(2, x.to_le_bytes()),
        Value::I16(x) => put!(3, x.to_le_bytes()),
        Value::U32(x) => put!(4, x.to_le_bytes()),
        Value::I32(x) => put!(5, x.to_le_bytes()),
        Value::F32(x) => put!(6, x.to_le_bytes()),
        Value::Bool(x) => put!(7, [u8::from(*x)]),
        Value::String(x) => {
            put!(8, [0u8; 0]);
            string(out, x);
        }
        Value::Array(a) => {
            put!(9, [0u8; 0]);
            array(out, a);
        }
        Value::U64(x) => put!(10, x.to_le_bytes()),
        Value::I64(x) => put!(11, x.to_le_bytes()),
        Value::F64(x) => put!(12, x.to_le_bytes()),
        other => panic!("no number for {other:?}"),
    }
}

fn array(out: &mut Vec<u8>, array: &Array) {
    macro_rules! put {
        ($tag:expr, $values:expr) => {{
            out.extend(($tag as u32).to_le_bytes());
            out.extend(($values.len() as u64).to_le_bytes());
            for x in $values {
                out.extend(x.to_le_bytes());
            }
        }};
    }
    match array {
        Array::U8(v) => put!(0, v),
        Array::I8(v) => put!(1, v),
        Array::U16(v) => put!(2, v),
        Array::I16(v) => put!(3, v),
        Array::U32(v) => put!(4, v),
        Array::I32(v) => put!(5, v),
        Array::F32(v) => put!(6, v),
        Array::Bool(v) => {
            let bytes: Vec<u8> = v.iter().map(|&x| x.into()).collect();
            put!(7, &bytes);
        }
        Array::String(v) => {
            out.extend(8u32.to_le_bytes());
            out.extend((v.len() as u64).to_le_bytes());
            for text in v {
                string(out, text);
            }
        }
        Array::Array(v) => {
            out.extend(9u32.to_le_bytes());
            out.extend((v.len() as u64).to_le_bytes());
            for inner in v {
                self::array(out, inner);
            }
        }
        Array::U64(v) => put!(10, v),
        Array::I64(v) => put!(11, v),
        Array::F64(v) => put!(12, v),
        other => panic!("no number for {other:?}"),
    }
}
