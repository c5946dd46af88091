//! Snapshots of sessions.

use super::MODEL;
use crate::{Feed, Input, Target, edit};
use locret_core::{
    Budget, CacheOptions, DType, Generate, KvCachePolicy, Positions, Prefill, Quantization, Session,
};
use locret_policies::{Full, InfLlm, KeyNorm, Quantized, SirLlm, Window};
use sha2::{Digest, Sha256};
use std::sync::{Arc, LazyLock};

pub(crate) const TARGET: Target = Target {
    name: "snapshot",
    ready: || {
        LazyLock::force(&SEEDS);
    },
    make,
    read,
};

struct Seed {
    policy: Arc<dyn KvCachePolicy>,
    options: CacheOptions,
    bytes: Vec<u8>,
}

fn session(policy: &Arc<dyn KvCachePolicy>, options: CacheOptions) -> Session {
    Session::with_options(MODEL.clone(), policy.clone(), options).expect("a session")
}

static SEEDS: LazyLock<Vec<Seed>> = LazyLock::new(|| {
    let compact = Positions::Compact;
    let codes = Quantization {
        group: 4,
        residual: 3,
        ..Quantization::default()
    };
    let policies: [(Arc<dyn KvCachePolicy>, DType); 6] = [
        (Arc::new(Full::new().with_positions(compact)), DType::F32),
        (Arc::new(Window::policy(Budget::Units(12))), DType::F16),
        (Arc::new(KeyNorm::policy(Budget::Units(9))), DType::BF16),
        (
            Arc::new(SirLlm::new().policy(Budget::Units(12), 3)),
            DType::F32,
        ),
        (Arc::new(Quantized::new(Full::new(), codes)), DType::F32),
        (
            Arc::new(
                InfLlm::new()
                    .init(2)
                    .local(8)
                    .block(4)
                    .topk(1)
                    .representatives(1)
                    .exec_block(4),
            ),
            DType::F32,
        ),
    ];
    let seed = |(policy, dtype)| {
        let options = CacheOptions::new().dtype(dtype);
        let mut session = session(&policy, options);
        let ids: Vec<u32> = (0..24).map(|i| i * 7 % 61).collect();
        session
            .prefill(&ids, &Prefill::new(4, 2))
            .expect("a prompt");
        let mut bytes = Vec::new();
        session.write(&mut bytes).expect("a snapshot");
        Seed {
            policy,
            options,
            bytes,
        }
    };
    policies.into_iter().map(seed).collect()
});

fn make(feed: &mut Feed<'_>) -> Input {
    let kind = feed.below(SEEDS.len());
    let seed = &SEEDS[kind].bytes;
    let length = u64::from_le_bytes(seed[..8].try_into().expect("eight bytes")) as usize;
    let (header, rest) = seed[8..].split_at(length);
    let mut bytes = match feed.below(4) {
        // The header is text, and is put where numbers are aligned.
        0 | 1 => {
            let text = std::str::from_utf8(header).expect("a header is text");
            let words = [
                "0",
                "1",
                "null",
                "[",
                "]",
                "\"U8\"",
                "18446744073709551615",
                "tokens",
            ];
            let mut header = edit::text(text, &words, feed).into_bytes();
            header.resize(header.len().next_multiple_of(8), b' ');
            let length = (header.len() as u64).to_le_bytes();
            [&length[..], &header, rest].concat()
        }
        2 => {
            let words = (8 + length..seed.len() - 32).step_by(8);
            let fields: Vec<_> = words.map(|at| at..at + 8).collect();
            edit::bytes(seed, &fields, feed)
        }
        _ => edit::bytes(seed, &[0..8], feed),
    };
    // Most with a hash that is right, since else nothing behind it is reached.
    if feed.below(8) > 0 && bytes.len() >= 32 {
        let end = bytes.len() - 32;
        let digest = Sha256::digest(&bytes[..end]);
        bytes[end..].copy_from_slice(&digest);
    }
    Input {
        bytes,
        kind,
        ..Input::default()
    }
}

fn read(input: &Input) {
    let seed = &SEEDS[input.kind % SEEDS.len()];
    let length = input.bytes.len() as u64;
    let (model, policy) = (MODEL.clone(), seed.policy.clone());
    let Ok(mut session) = Session::read(model, policy, seed.options, &mut &input.bytes[..], length)
    else {
        return;
    };
    let _any = session.prefill(&[1, 2, 3, 4, 5], &Prefill::new(2, 1));
    if let Ok(tokens) = session.generate(Generate::greedy(2)) {
        tokens.for_each(drop);
    }
    let _any = session.write(&mut Vec::new());
}
