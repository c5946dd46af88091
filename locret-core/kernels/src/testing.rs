//! Numbers, and views, for tests.

use crate::visible::{View, Views};
use proptest::prelude::ProptestConfig;

/// So many cases; two where an interpreter takes the time of thousands.
pub(super) fn cases(usual: u32) -> ProptestConfig {
    ProptestConfig::with_cases(if cfg!(miri) { 2 } else { usual })
}

/// A reproducible sequence of numbers in `-1..1`.
pub(super) struct Numbers(u64);

impl Numbers {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(super) fn take(&mut self, n: usize) -> Vec<f32> {
        let next = |_| {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..n).map(next).collect()
    }
}

/// Views by chance: for each KV head or each query head, for each block, any of the ways of seeing, all of them
/// and none.
pub(super) fn views(seed: u64, tokens: usize, block: usize, lens: &[usize], group: usize) -> Views {
    let mut numbers = Numbers::new(seed);
    // Drawn before use, so that the stream has no short cycle of calls.
    let mut below = |n: usize| ((numbers.take(2)[1] + 1.0) / 2.0 * n as f32) as usize % n.max(1);
    let by_query_head = below(2) == 1;
    let lists = lens.iter().flat_map(|len| {
        let each = if by_query_head { group } else { 1 };
        std::iter::repeat_n(*len, each)
    });
    let lists: Vec<Vec<View>> = lists
        .map(|len| {
            (0..tokens.div_ceil(block))
                .map(|_| {
                    let mut ranges = |most: usize| -> Vec<std::ops::Range<u32>> {
                        (0..below(most))
                            .map(|_| {
                                let start = below(len + 1);
                                let most = below(len - start + 1);
                                start as u32..(start + most.min(90)) as u32
                            })
                            .collect()
                    };
                    let (near, far) = (ranges(4), ranges(3));
                    let columns = (0..below(3) * below(40)).map(|_| below(len) as u32);
                    View {
                        ranges: near,
                        columns: columns.collect(),
                        far,
                        window: [0, 0, 1, 3 + below(100)][below(4)],
                    }
                })
                .collect()
        })
        .collect();
    Views::new(block, lists).far_at(7)
}
