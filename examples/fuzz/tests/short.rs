//! Each target with its corpus, and with some choices by chance. `fuzz.py` goes on from there.

use locret_fuzz::{TARGETS, run};
use std::{
    panic,
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

/// Choices by chance for each target.
const BY_CHANCE: usize = 120;

static PANICS: AtomicUsize = AtomicUsize::new(0);
static LAST: Mutex<String> = Mutex::new(String::new());

/// One test, since the heap and the clock are everybody's.
#[test]
fn altered_inputs_keep_the_limits_and_nothing_panics() {
    // Those that are caught, too: they are printed, and end a process whose panics abort.
    panic::set_hook(Box::new(|info| {
        PANICS.fetch_add(1, Ordering::Relaxed);
        *LAST.lock().unwrap_or_else(|e| e.into_inner()) = info.to_string();
    }));
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    let mut faults = Vec::new();
    for target in TARGETS {
        let corpus = format!("corpus/{}.hex", target.name);
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join(corpus);
        let corpus = std::fs::read_to_string(&corpus).unwrap_or_default();
        let mut inputs: Vec<Vec<u8>> = corpus.lines().map(bytes).collect();
        for i in 0..BY_CHANCE {
            let length = 4 + usize::from(next()) % 60 + i;
            let mut input: Vec<u8> = (0..length).map(|_| next()).collect();
            // Alterations rather than noise.
            input[0] %= 255;
            inputs.push(input);
        }
        for input in inputs {
            let before = PANICS.load(Ordering::Relaxed);
            let ended = panic::catch_unwind(|| run(target, &input));
            if ended.is_err() || PANICS.load(Ordering::Relaxed) > before {
                let hex: String = input.iter().map(|b| format!("{b:02x}")).collect();
                let last = LAST.lock().unwrap_or_else(|e| e.into_inner()).clone();
                faults.push(format!("{} {hex}: {last}", target.name));
            }
        }
    }
    let _hook_of_the_test = panic::take_hook();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

fn bytes(hex: &str) -> Vec<u8> {
    let digits = hex.as_bytes().chunks_exact(2);
    let byte = |pair: &[u8]| {
        let text = std::str::from_utf8(pair).expect("digits");
        u8::from_str_radix(text, 16).expect("two hexadecimal digits")
    };
    digits.map(byte).collect()
}
