//! What the blocks of each packed format stand for.
//!
//! The order of operations (product of the scales first, then times the code, then the minimum) is
//! that of GGML's reference, so that results agree to the bit.

use half::f16;

/// The half-precision number at byte `at`.
fn scale(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

pub(super) fn q4_0(block: &[u8], out: &mut [f32]) {
    let d = scale(block, 0);
    let (low, high) = out.split_at_mut(16);
    for ((&q, l), h) in block[2..].iter().zip(low).zip(high) {
        *l = d * (i32::from(q & 15) - 8) as f32;
        *h = d * (i32::from(q >> 4) - 8) as f32;
    }
}

pub(super) fn q4_1(block: &[u8], out: &mut [f32]) {
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

pub(super) fn q5_0(block: &[u8], out: &mut [f32]) {
    let d = scale(block, 0);
    five_bits(&block[2..6], &block[6..], |i, q| {
        out[i] = d * (i32::from(q) - 16) as f32;
    });
}

pub(super) fn q5_1(block: &[u8], out: &mut [f32]) {
    let (d, min) = (scale(block, 0), scale(block, 2));
    five_bits(&block[4..8], &block[8..], |i, q| {
        out[i] = d * f32::from(q) + min;
    });
}

pub(super) fn q8_0(block: &[u8], out: &mut [f32]) {
    let d = scale(block, 0);
    for (&q, x) in block[2..].iter().zip(out) {
        *x = d * f32::from(q as i8);
    }
}

pub(super) fn q2_k(block: &[u8], out: &mut [f32]) {
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

pub(super) fn q3_k(block: &[u8], out: &mut [f32]) {
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

pub(super) fn q4_k(block: &[u8], out: &mut [f32]) {
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

pub(super) fn q5_k(block: &[u8], out: &mut [f32]) {
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

pub(super) fn q6_k(block: &[u8], out: &mut [f32]) {
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

/// The values of the formats that are not evenly spaced.
const IQ4: [i8; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

/// 16 bytes of codes: the low nibbles, then the high ones.
fn iq4_codes(d: f32, codes: &[u8], out: &mut [f32]) {
    let (low, high) = out.split_at_mut(16);
    for ((&q, low), high) in codes.iter().zip(low).zip(high) {
        *low = d * f32::from(IQ4[usize::from(q & 15)]);
        *high = d * f32::from(IQ4[usize::from(q >> 4)]);
    }
}

pub(super) fn iq4_nl(block: &[u8], out: &mut [f32]) {
    iq4_codes(scale(block, 0), &block[2..], out);
}

pub(super) fn iq4_xs(block: &[u8], out: &mut [f32]) {
    let d = scale(block, 0);
    let high = u16::from_le_bytes([block[2], block[3]]);
    let (low, codes) = block[4..].split_at(4);
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        // Scales of 6 bits: the low four in nibbles, the high two in pairs of bits.
        let low = low[group / 2] >> (4 * (group % 2)) & 15;
        let high = (high >> (2 * group) & 3) as u8;
        let d = d * f32::from((low | high << 4) as i8 - 32);
        iq4_codes(d, &codes[16 * group..16 * group + 16], out);
    }
}
