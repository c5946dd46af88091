//! The types that numbers are stored in, and their conversion to `f32`.

mod blocks;
mod number;

use half::{bf16, f16};
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

pub use number::Number;

/// How numbers are stored: in model files, in caches, in files of heads.
///
/// The block formats are those of GGML: a block of consecutive values of one row shares its scales.
/// A row always holds whole blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(non_camel_case_types, reason = "the names that the format is known by")]
#[non_exhaustive]
pub enum DType {
    /// IEEE single precision.
    #[default]
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of single precision.
    BF16,
    /// 32 values of 4 bits, one scale.
    Q4_0,
    /// 32 values of 4 bits, scale and minimum.
    Q4_1,
    /// 32 values of 5 bits, one scale.
    Q5_0,
    /// 32 values of 5 bits, scale and minimum.
    Q5_1,
    /// 32 values of 8 bits, one scale.
    Q8_0,
    /// 256 values of 2 bits in 16 groups with 4-bit scales and minima.
    Q2_K,
    /// 256 values of 3 bits in 16 groups with 6-bit scales.
    Q3_K,
    /// 256 values of 4 bits in 8 groups with 6-bit scales and minima.
    Q4_K,
    /// 256 values of 5 bits in 8 groups with 6-bit scales and minima.
    Q5_K,
    /// 256 values of 6 bits in 16 groups with 8-bit scales.
    Q6_K,
    /// 32 values, each one of 16 that are not evenly spaced, one scale.
    IQ4_NL,
    /// 256 values of the same 16 in 8 groups with 6-bit scales.
    IQ4_XS,
}

impl DType {
    /// Every type.
    pub const ALL: [Self; 15] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2_K,
        Self::Q3_K,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
        Self::IQ4_NL,
        Self::IQ4_XS,
    ];

    /// Values that share one block; 1 for plain numbers.
    pub const fn block(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 | Self::IQ4_NL => 32,
            Self::Q2_K | Self::Q3_K | Self::Q4_K | Self::Q5_K | Self::Q6_K | Self::IQ4_XS => 256,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q4_0 => 2 + 16,
            Self::Q4_1 => 4 + 16,
            Self::Q5_0 => 2 + 4 + 16,
            Self::Q5_1 => 4 + 4 + 16,
            Self::Q8_0 => 2 + 32,
            Self::Q2_K => 16 + 64 + 4,
            Self::Q3_K => 32 + 64 + 12 + 2,
            Self::Q4_K => 4 + 12 + 128,
            Self::Q5_K => 4 + 12 + 32 + 128,
            Self::Q6_K => 128 + 64 + 16 + 2,
            Self::IQ4_NL => 2 + 16,
            Self::IQ4_XS => 2 + 2 + 4 + 128,
        }
    }

    /// Bytes of a row of `cols` values; `None` where a row would not hold whole blocks, or where
    /// the number overflows.
    pub const fn bytes(self, cols: usize) -> Option<usize> {
        if !cols.is_multiple_of(self.block()) {
            return None;
        }
        (cols / self.block()).checked_mul(self.block_bytes())
    }

    /// Whether values are floats of their own, without blocks.
    pub const fn is_float(self) -> bool {
        self.block() == 1
    }

    /// The name as GGML and safetensors spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q2_K => "Q2_K",
            Self::Q3_K => "Q3_K",
            Self::Q4_K => "Q4_K",
            Self::Q5_K => "Q5_K",
            Self::Q6_K => "Q6_K",
            Self::IQ4_NL => "IQ4_NL",
            Self::IQ4_XS => "IQ4_XS",
        }
    }

    /// Converts whole blocks to `f32`.
    ///
    /// # Panics
    /// If `bytes` are not exactly the blocks of `out.len()` values.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(
            self.bytes(out.len()),
            Some(bytes.len()),
            "{self}: {} bytes are not the blocks of {} values",
            bytes.len(),
            out.len()
        );
        let decode: fn(&[u8], &mut [f32]) = match self {
            Self::F32 => return floats::<f32>(bytes, out),
            Self::F16 => return floats::<f16>(bytes, out),
            Self::BF16 => return floats::<bf16>(bytes, out),
            Self::Q4_0 => blocks::q4_0,
            Self::Q4_1 => blocks::q4_1,
            Self::Q5_0 => blocks::q5_0,
            Self::Q5_1 => blocks::q5_1,
            Self::Q8_0 => blocks::q8_0,
            Self::Q2_K => blocks::q2_k,
            Self::Q3_K => blocks::q3_k,
            Self::Q4_K => blocks::q4_k,
            Self::Q5_K => blocks::q5_k,
            Self::Q6_K => blocks::q6_k,
            Self::IQ4_NL => blocks::iq4_nl,
            Self::IQ4_XS => blocks::iq4_xs,
        };
        let outs = out.chunks_exact_mut(self.block());
        for (block, out) in bytes.chunks_exact(self.block_bytes()).zip(outs) {
            decode(block, out);
        }
    }
}

fn floats<T: Number>(bytes: &[u8], out: &mut [f32]) {
    for (b, x) in bytes.chunks_exact(size_of::<T>()).zip(out) {
        *x = bytemuck::pod_read_unaligned::<T>(b).to_f32();
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for DType {
    type Err = String;

    /// From a name in either case.
    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL
            .into_iter()
            .find(|dtype| dtype.name().eq_ignore_ascii_case(name));
        found.ok_or_else(|| {
            let all = Self::ALL.map(|dtype| dtype.name().to_ascii_lowercase());
            format!("one of {}", all.join(", "))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_hold_whole_blocks() {
        assert_eq!(DType::Q4_1.bytes(576), Some(18 * 20));
        assert_eq!(DType::Q4_1.bytes(33), None);
        assert_eq!(DType::Q4_K.bytes(128), None);
        assert_eq!(DType::F16.bytes(3), Some(6));
        assert_eq!(DType::F32.bytes(usize::MAX), None);
    }

    #[test]
    fn names_are_read_in_either_case() {
        for dtype in DType::ALL {
            assert_eq!(dtype.name().parse(), Ok(dtype));
            assert_eq!(dtype.name().to_lowercase().parse(), Ok(dtype));
        }
        assert!("q9".parse::<DType>().unwrap_err().contains("q4_k"));
    }

    #[test]
    fn plain_numbers() {
        let mut out = [0.0; 2];
        DType::F32.decode(&[0, 0, 0x80, 0x3f, 0, 0, 0, 0xc0], &mut out);
        assert_eq!(out, [1.0, -2.0]);
        DType::F16.decode(&[0, 0x3c, 0, 0xc0], &mut out);
        assert_eq!(out, [1.0, -2.0]);
        DType::BF16.decode(&[0x80, 0x3f, 0, 0xc0], &mut out);
        assert_eq!(out, [1.0, -2.0]);
    }

    #[test]
    #[should_panic(expected = "are not the blocks of")]
    fn a_wrong_length_is_a_bug_of_the_caller() {
        DType::Q8_0.decode(&[0; 33], &mut [0.0; 32]);
    }
}
