//! The types that numbers are stored in, and their conversion to `f32`.

use half::{bf16, f16};
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

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
}

/// Values in a block of the K formats.
const QK: usize = 256;

impl DType {
    /// Every type.
    pub const ALL: [Self; 13] = [
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
    ];

    /// Values that share one block; 1 for plain numbers.
    pub const fn block(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q2_K | Self::Q3_K | Self::Q4_K | Self::Q5_K | Self::Q6_K => QK,
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
        let blocks = bytes.chunks_exact(self.block_bytes());
        let outs = out.chunks_exact_mut(self.block());
        let decode: fn(&[u8], &mut [f32]) = match self {
            Self::F32 => {
                for (b, x) in blocks.zip(out) {
                    *x = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                }
                return;
            }
            Self::F16 => {
                for (b, x) in blocks.zip(out) {
                    *x = f16::from_le_bytes([b[0], b[1]]).to_f32();
                }
                return;
            }
            Self::BF16 => {
                for (b, x) in blocks.zip(out) {
                    *x = bf16::from_le_bytes([b[0], b[1]]).to_f32();
                }
                return;
            }
            Self::Q4_0 => q4_0,
            Self::Q4_1 => q4_1,
            Self::Q5_0 => q5_0,
            Self::Q5_1 => q5_1,
            Self::Q8_0 => q8_0,
            Self::Q2_K => q2_k,
            Self::Q3_K => q3_k,
            Self::Q4_K => q4_k,
            Self::Q5_K => q5_k,
            Self::Q6_K => q6_k,
        };
        for (block, out) in blocks.zip(outs) {
            decode(block, out);
        }
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

// The order of operations below (product of the scales first, then times the code, then the
// minimum) is that of GGML's reference, so that results agree to the bit.

/// The half-precision number at byte `at`.
fn scale(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn q4_0(block: &[u8], out: &mut [f32]) {
    let d = scale(block, 0);
    let (low, high) = out.split_at_mut(16);
    for ((&q, l), h) in block[2..].iter().zip(low).zip(high) {
        *l = d * (i32::from(q & 15) - 8) as f32;
        *h = d * (i32::from(q >> 4) - 8) as f32;
    }
}

fn q4_1(block: &[u8], out: &mut [f32]) {
    let (d, min) = (scale(block, 0), scale(block, 2));
    let (low, high) = out.split_at_mut(16);
    for ((&q, l), h) in block[4..].iter().zip(low).zip(high) {
        *l = d * f32::from(q & 15) + min;
        *h = d * f32::from(q >> 4) + min;
    }
}

/// The 32 codes of 5 bits: low bits as in the 4-bit formats, fifth bits in one word.
fn five_bits(fifth: &[u8], codes: &[u8], mut put: impl FnMut(usize, u8)) {
    let fifth = u32::from_le_bytes([fifth[0], fifth[1], fifth[2], fifth[3]]);
    let bit = |i: usize| ((fifth >> i & 1) as u8) << 4;
    for (i, &q) in codes.iter().enumerate() {
        put(i, q & 15 | bit(i));
        put(i + 16, q >> 4 | bit(i + 16));
    }
}

fn q5_0(block: &[u8], out: &mut [f32]) {
    let d = scale(block, 0);
    five_bits(&block[2..6], &block[6..], |i, q| {
        out[i] = d * (i32::from(q) - 16) as f32;
    });
}

fn q5_1(block: &[u8], out: &mut [f32]) {
    let (d, min) = (scale(block, 0), scale(block, 2));
    five_bits(&block[4..8], &block[8..], |i, q| {
        out[i] = d * f32::from(q) + min;
    });
}

fn q8_0(block: &[u8], out: &mut [f32]) {
    let d = scale(block, 0);
    for (&q, x) in block[2..].iter().zip(out) {
        *x = d * f32::from(q as i8);
    }
}

fn q2_k(block: &[u8], out: &mut [f32]) {
    let (scales, rest) = block.split_at(16);
    let (codes, rest) = rest.split_at(64);
    let (d, dmin) = (scale(rest, 0), scale(rest, 2));
    for (group, out) in out.chunks_exact_mut(16).enumerate() {
        // A half of the block has 32 bytes of codes; its four runs of 32 values are the four bit
        // pairs of the same bytes.
        let (half, run, part) = (group / 8, group % 8 / 2, group % 2);
        let d = d * f32::from(scales[group] & 15);
        let min = dmin * f32::from(scales[group] >> 4);
        for (&q, x) in codes[half * 32 + part * 16..].iter().zip(out) {
            *x = d * f32::from(q >> (2 * run) & 3) - min;
        }
    }
}

fn q3_k(block: &[u8], out: &mut [f32]) {
    let (third, rest) = block.split_at(32);
    let (codes, rest) = rest.split_at(64);
    let (scales, d) = rest.split_at(12);
    let d = scale(d, 0);
    for (group, out) in out.chunks_exact_mut(16).enumerate() {
        let (half, run, part) = (group / 8, group % 8 / 2, group % 2);
        // Scales of 6 bits: the low four in eight bytes (first the low nibbles), the high two in
        // the last four bytes.
        let low = scales[group % 8] >> (4 * (group / 8)) & 15;
        let high = scales[8 + group % 4] >> (2 * (group / 4)) & 3;
        let d = d * f32::from((low | high << 4) as i8 - 32);
        let bit = 4 * half + run;
        let codes = &codes[half * 32 + part * 16..];
        let third = &third[part * 16..];
        for ((&q, &t), x) in codes.iter().zip(third).zip(out) {
            let q = (q >> (2 * run) & 3) as i8;
            let offset = if t >> bit & 1 == 1 { 0 } else { 4 };
            *x = d * f32::from(q - offset);
        }
    }
}

/// Scale and minimum of group `j` of 8: 6 bits each, packed into 12 bytes.
fn scale_min(scales: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (scales[j] & 63, scales[j + 4] & 63)
    } else {
        (
            scales[j + 4] & 15 | scales[j - 4] >> 6 << 4,
            scales[j + 4] >> 4 | scales[j] >> 6 << 4,
        )
    };
    (f32::from(scale), f32::from(min))
}

fn q4_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (scale(block, 0), scale(block, 2));
    let (scales, codes) = block[4..].split_at(12);
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let (sc, m) = scale_min(scales, group);
        let (d, min) = (d * sc, dmin * m);
        let shift = 4 * (group % 2);
        for (&q, x) in codes[group / 2 * 32..].iter().zip(out) {
            *x = d * f32::from(q >> shift & 15) - min;
        }
    }
}

fn q5_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (scale(block, 0), scale(block, 2));
    let (scales, rest) = block[4..].split_at(12);
    let (fifth, codes) = rest.split_at(32);
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let (sc, m) = scale_min(scales, group);
        let (d, min) = (d * sc, dmin * m);
        let shift = 4 * (group % 2);
        for ((&q, &h), x) in codes[group / 2 * 32..].iter().zip(fifth).zip(out) {
            let q = q >> shift & 15 | (h >> group & 1) << 4;
            *x = d * f32::from(q) - min;
        }
    }
}

fn q6_k(block: &[u8], out: &mut [f32]) {
    let (low, rest) = block.split_at(128);
    let (high, rest) = rest.split_at(64);
    let (scales, d) = rest.split_at(16);
    let d = scale(d, 0);
    for (group, out) in out.chunks_exact_mut(16).enumerate() {
        let d = d * f32::from(scales[group] as i8);
        // A half has four runs of 32: low nibbles of two runs of 32 bytes, then their high nibbles;
        // the upper two bits of all four in one run of 32 bytes.
        let (half, run, part) = (group / 8, group % 8 / 2, group % 2);
        let low = &low[half * 64 + run % 2 * 32 + part * 16..];
        let high = &high[half * 32 + part * 16..];
        let shift = 4 * (run / 2);
        for ((&l, &h), x) in low.iter().zip(high).zip(out) {
            let q = l >> shift & 15 | (h >> (2 * run) & 3) << 4;
            *x = d * f32::from(q as i8 - 32);
        }
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
