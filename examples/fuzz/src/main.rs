//! The fuzzer of one target, which the environment's `LOCRET_FUZZ` names.
#![no_main]

use libfuzzer_sys::{Corpus, fuzz_target};
use locret_fuzz::{TARGETS, Target, run};
use std::sync::OnceLock;

static CHOSEN: OnceLock<&'static Target> = OnceLock::new();

fuzz_target!(|bytes: &[u8]| -> Corpus {
    let target = CHOSEN.get_or_init(|| {
        let name = std::env::var("LOCRET_FUZZ").unwrap_or_default();
        let found = TARGETS.iter().find(|target| target.name == name);
        found.unwrap_or_else(|| {
            let all: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
            eprintln!("LOCRET_FUZZ has to be one of {}", all.join(", "));
            std::process::exit(2);
        })
    });
    run(target, bytes);
    Corpus::Keep
});
