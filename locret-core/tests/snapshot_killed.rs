//! Processes that are killed while they save: the file is the old one or the new one, whole.
#![cfg(unix)]

use burn::tensor::Device;
use locret_core::{
    CacheOptions, CausalLm, KvCachePolicy, LayerUnits, Prefill, Result, Session, Step, Verdict,
    conformance::{RandomModel, small_spec},
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::{
    io::{Read, Write},
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    thread,
    time::Duration,
};

/// The folder of a process that saves until it is killed.
const FOLDER: &str = "LOCRET_TEST_SAVES_IN";
/// Which of the two sessions it saves first.
const FIRST: &str = "LOCRET_TEST_SAVES_FIRST";
const KILLS: usize = 200;

#[derive(Debug)]
struct Full;

impl KvCachePolicy for Full {
    fn name(&self) -> String {
        "full".into()
    }

    fn step(&self, _at: &Step, _units: &LayerUnits<'_>) -> Result<Verdict> {
        Ok(Verdict::keep_all())
    }
}

fn model() -> Arc<dyn CausalLm> {
    let spec = small_spec(2, 2, 32);
    Arc::new(RandomModel::new(spec, 1, &Device::flex()).unwrap())
}

fn restored(model: &Arc<dyn CausalLm>, path: &Path) -> Session {
    Session::restore(model.clone(), Arc::new(Full), CacheOptions::new(), path).unwrap()
}

/// Saves one and the other, over and over, in the same place.
fn save_for_ever(folder: &Path) -> ! {
    let model = model();
    let sessions = ["one", "other"].map(|name| restored(&model, &folder.join(name)));
    let mut out = std::io::stdout().lock();
    let first = std::env::var(FIRST).unwrap().parse().unwrap();
    for session in sessions.iter().cycle().skip(first) {
        session.save(folder.join("saved")).unwrap();
        out.write_all(b".").unwrap();
        out.flush().unwrap();
    }
    unreachable!("there are two sessions for ever")
}

#[test]
fn a_killed_process_leaves_the_old_file_or_the_new_one() {
    if let Some(folder) = std::env::var_os(FOLDER) {
        save_for_ever(Path::new(&folder));
    }
    let folder = tempfile::tempdir().unwrap();
    let (model, path) = (model(), folder.path().join("saved"));
    let mut texts = Vec::new();
    for (name, tokens) in [("one", 150), ("other", 170)] {
        let ids: Vec<u32> = (0..tokens).map(|i| (i * 7 % 61) as u32).collect();
        let mut session = Session::new(model.clone(), Arc::new(Full)).unwrap();
        session.prefill(&ids, &Prefill::default()).unwrap();
        session.save(folder.path().join(name)).unwrap();
        texts.push(ids);
    }
    let mut dice = ChaCha8Rng::seed_from_u64(3);
    let (mut saves, mut found) = (0, [0; 2]);
    for round in 0..KILLS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "a_killed_process",
                "--nocapture",
                "--test-threads=1",
                "--quiet",
            ])
            .env(FOLDER, folder.path())
            .env(FIRST, (round % 2).to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // Not before it saves.
        let mut out = child.stdout.take().unwrap();
        let mut byte = [0];
        while byte != *b"." {
            out.read_exact(&mut byte).unwrap();
        }
        thread::sleep(Duration::from_micros(dice.random_range(0..15_000)));
        child.kill().unwrap();
        child.wait().unwrap();
        let mut rest = Vec::new();
        out.read_to_end(&mut rest).unwrap();
        saves += 1 + rest.iter().filter(|byte| **byte == b'.').count();
        let session = restored(&model, &path);
        let which = texts
            .iter()
            .position(|ids| ids == session.tokens())
            .unwrap();
        found[which] += 1;
    }
    // Some were killed while they were writing: what they left behind hindered nobody.
    let names = std::fs::read_dir(folder.path()).unwrap();
    let left = names.count() - 3;
    println!("{saves} saves, {found:?} found, {left} cut off");
    assert!(left > KILLS / 10, "{saves} saves, {left} cut off");
    assert!(found.iter().all(|n| *n > KILLS / 20), "{found:?}");
}
