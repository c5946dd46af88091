//! Repositories of a hub that lives in the test: redirects, ranges, interruptions, hashes, tokens, and the
//! cache folder that other tools share.
#![cfg(feature = "hub")]

#[path = "common/hub_server.rs"]
mod hub_server;

use hub_server::{COMMIT, Fault, GOOD, HubServer, Repo, STRANGER, sha256};
use locret_models::{FetchOptions, ModelError, Progress, resolve};
use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// A file of the repository that is large.
fn large(seed: u8, len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| (i as u8).wrapping_mul(31) ^ seed)
        .collect()
}

fn model() -> Repo {
    let index = r#"{"weight_map": {"a": "s1.safetensors", "b": "s2.safetensors"}}"#;
    let text = |text: &str| text.as_bytes().to_vec();
    let files = [
        ("config.json", text("{}")),
        ("tokenizer.json", large(9, 2000)),
        ("tokenizer_config.json", text("{ }")),
        ("README.md", text("text")),
        ("model.safetensors.index.json", text(index)),
        ("s1.safetensors", large(1, 50_000)),
        ("s2.safetensors", large(2, 30_000)),
        ("m.gguf", large(3, 5000)),
        ("q/m-00001-of-00002.gguf", large(4, 4000)),
        ("q/m-00002-of-00002.gguf", large(5, 3000)),
    ];
    Repo {
        files: files.map(|(name, bytes)| (name.into(), bytes)).into(),
        ..Repo::default()
    }
}

struct Place {
    hub: HubServer,
    cache: TempDir,
}

impl Place {
    fn new(repo: Repo) -> Self {
        Self {
            hub: HubServer::start(repo),
            cache: tempfile::tempdir().unwrap(),
        }
    }

    fn options(&self) -> FetchOptions {
        FetchOptions::new()
            .cache(self.cache.path())
            .hub_endpoint(&self.hub.endpoint)
            // None but the ones that tests give.
            .token("")
            .patience(Duration::from_millis(500))
    }

    fn get(&self, source: &str) -> Result<PathBuf, ModelError> {
        resolve(source, &self.options(), &|_| {})
    }

    fn repo(&self) -> PathBuf {
        self.cache.path().join("hub/models--o--n")
    }

    fn blob(&self, name: &str) -> PathBuf {
        let repo = self.hub.repo.lock().unwrap();
        self.repo().join("blobs").join(sha256(&repo.files[name]))
    }

    fn incomplete(&self, name: &str) -> PathBuf {
        self.blob(name).with_added_extension("incomplete")
    }

    fn fail_next(&self, faults: impl IntoIterator<Item = Fault>) {
        self.hub.repo.lock().unwrap().faults.extend(faults);
    }

    /// Every file in the cache's folder of the repository.
    fn files(&self) -> Vec<String> {
        fn walk(dir: &Path, all: &mut Vec<String>) {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                if entry.file_type().unwrap().is_dir() {
                    walk(&entry.path(), all);
                } else {
                    all.push(entry.path().display().to_string());
                }
            }
        }
        let mut all = Vec::new();
        walk(&self.repo(), &mut all);
        all
    }
}

/// What a refusal says.
fn refused(result: Result<PathBuf, ModelError>) -> String {
    match result {
        Err(error @ ModelError::Hub { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_repository_comes_whole_and_once() {
    let place = Place::new(model());
    let verified = Mutex::new(Vec::new());
    let progress = |p: Progress<'_>| {
        if let Progress::Verifying { what } = p {
            verified.lock().unwrap().push(what.to_owned());
        }
    };
    let dir = resolve("hf:o/n", &place.options(), &progress).unwrap();
    // What is large has a hash.
    let hashed = ["tokenizer.json", "s1.safetensors", "s2.safetensors"];
    assert_eq!(*verified.lock().unwrap(), hashed);
    assert_eq!(dir, place.repo().join("snapshots").join(COMMIT));
    for (name, bytes) in model().files {
        let here = dir.join(&name);
        if name == "README.md" || name.ends_with(".gguf") {
            assert!(!here.exists(), "{name}");
        } else {
            assert_eq!(fs::read(&here).unwrap(), bytes, "{name}");
        }
    }
    // As other tools have it: content by its name on the hub, links to it, and what a branch was.
    let s1 = sha256(&model().files["s1.safetensors"]);
    let link = fs::read_link(dir.join("s1.safetensors")).unwrap();
    assert_eq!(link, Path::new("../../blobs").join(s1));
    let main = fs::read_to_string(place.repo().join("refs/main")).unwrap();
    assert_eq!(main, COMMIT);
    let absent = place.repo().join(".no_exist").join(COMMIT);
    assert!(absent.join("tokenizer.model").is_file());
    assert!(!place.files().iter().any(|f| f.ends_with(".incomplete")));

    // All of it is there: nobody is asked any more.
    place.hub.requests();
    assert_eq!(place.get("hf:o/n").unwrap(), dir);
    assert_eq!(place.get(&format!("hf:o/n@{COMMIT}")).unwrap(), dir);
    let offline = place.options().offline(true);
    assert_eq!(resolve("hf:o/n", &offline, &|_| {}).unwrap(), dir);
    assert_eq!(place.hub.requests().len(), 0);
}

#[test]
fn files_of_their_own_may_lie_in_folders_and_have_parts() {
    let place = Place::new(model());
    let file = place.get("hf:o/n/m.gguf").unwrap();
    assert_eq!(fs::read(file).unwrap(), large(3, 5000));
    let first = place.get("hf:o/n/q/m-00001-of-00002.gguf").unwrap();
    assert_eq!(fs::read(&first).unwrap(), large(4, 4000));
    let second = first.with_file_name("m-00002-of-00002.gguf");
    assert_eq!(fs::read(second).unwrap(), large(5, 3000));
    place.hub.requests();
    assert_eq!(place.get("hf:o/n/q/m-00001-of-00002.gguf").unwrap(), first);
    assert_eq!(place.hub.requests().len(), 0);
}

#[test]
fn the_token_is_told_to_the_hub_alone() {
    let place = Place::new(model());
    let options = place.options().token(GOOD);
    resolve("hf:o/n", &options, &|_| {}).unwrap();
    let requests = place.hub.requests();
    let (store, hub): (Vec<_>, Vec<_>) = requests.into_iter().partition(|r| r.store);
    assert!(hub.len() >= 6 && store.len() == 3, "{hub:?} {store:?}");
    assert!(
        hub.iter().all(|r| r.token.as_deref() == Some(GOOD)),
        "{hub:?}"
    );
    assert!(store.iter().all(|r| r.token.is_none()), "{store:?}");
}

#[test]
fn an_interrupted_download_goes_on() {
    // At once, as long as something comes.
    let place = Place::new(model());
    place.fail_next([Fault::Cut(1000), Fault::Busy, Fault::Cut(500)]);
    let file = place.get("hf:o/n/m.gguf").unwrap();
    assert_eq!(fs::read(file).unwrap(), large(3, 5000));
    let store = place.hub.requests().into_iter().filter(|r| r.store);
    let ranges: Vec<_> = store.map(|r| r.range.unwrap_or_default()).collect();
    assert_eq!(ranges, ["", "bytes=1000-", "bytes=1000-", "bytes=1500-"]);

    // In another process, later.
    let place = Place::new(model());
    place.fail_next([Fault::Cut(2000), Fault::Cut(0), Fault::Cut(0)]);
    let error = refused(place.get("hf:o/n/m.gguf"));
    assert!(
        error.contains("m.gguf") && error.contains("kept"),
        "{error}"
    );
    assert!(!place.blob("m.gguf").exists());
    assert_eq!(fs::read(place.incomplete("m.gguf")).unwrap().len(), 2000);
    place.hub.requests();
    let file = place.get("hf:o/n/m.gguf").unwrap();
    assert_eq!(fs::read(file).unwrap(), large(3, 5000));
    let last = place.hub.requests().pop().unwrap();
    assert_eq!(last.range.as_deref(), Some("bytes=2000-"));
    assert!(!place.incomplete("m.gguf").exists());

    // From a server that knows no ranges, from its beginning.
    let place = Place::new(model());
    place.fail_next([Fault::Cut(2000), Fault::Whole]);
    let file = place.get("hf:o/n/m.gguf").unwrap();
    assert_eq!(fs::read(file).unwrap(), large(3, 5000));

    // All was there, and only the name was missing.
    let place = Place::new(model());
    let part = place.incomplete("m.gguf");
    fs::create_dir_all(part.parent().unwrap()).unwrap();
    fs::write(&part, large(3, 5000)).unwrap();
    place.get("hf:o/n/m.gguf").unwrap();
    assert_eq!(fs::read(place.blob("m.gguf")).unwrap(), large(3, 5000));
}

#[test]
fn what_has_another_hash_is_not_kept() {
    let place = Place::new(Repo {
        etag: Some("0".repeat(64)),
        ..model()
    });
    for _ in 0..2 {
        match place.get("hf:o/n/m.gguf") {
            Err(ModelError::Hash { what, .. }) => assert_eq!(what, "m.gguf"),
            other => panic!("{other:?}"),
        }
        assert!(place.files().is_empty(), "{:?}", place.files());
    }
    // Leftovers of something else: what is wrong is theirs, and they go.
    for leftover in [vec![7; 100], vec![7; 5000], vec![7; 6000]] {
        let place = Place::new(model());
        let part = place.incomplete("m.gguf");
        fs::create_dir_all(part.parent().unwrap()).unwrap();
        fs::write(&part, &leftover).unwrap();
        let file = place.get("hf:o/n/m.gguf").unwrap();
        assert_eq!(fs::read(file).unwrap(), large(3, 5000));
        assert!(!part.exists());
    }
}

#[test]
fn a_gated_repository_says_what_to_do() {
    let place = Place::new(Repo {
        gated: true,
        ..model()
    });
    let get = |token: &str| resolve("hf:o/n", &place.options().token(token), &|_| {});
    let error = refused(get(""));
    for part in [
        "o/n",
        "gated",
        "accept its conditions at http://",
        "/settings/tokens",
        "HF_TOKEN",
        "401",
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
    let error = refused(get(STRANGER));
    for part in [
        "gated",
        "no access",
        "accept its conditions",
        "403",
        "restricted",
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert!(!error.contains(STRANGER), "{error}");
    get(GOOD).unwrap();
}

#[test]
fn what_there_is_not_is_named() {
    let place = Place::new(model());
    let error = refused(place.get("hf:o/none"));
    assert!(
        error.contains("no public repository") && error.contains("HF_TOKEN"),
        "{error}"
    );
    let known = place.options().token(GOOD);
    let error = refused(resolve("hf:o/none", &known, &|_| {}));
    assert!(error.contains("no such repository"), "{error}");
    let error = refused(resolve("hf:o/none/m.gguf", &known, &|_| {}));
    assert!(error.contains("no such repository"), "{error}");
    let error = refused(place.get("hf:o/n@v2"));
    assert!(error.contains("no revision \"v2\""), "{error}");
    let error = refused(place.get("hf:o/n/none.gguf"));
    assert!(error.contains("no file \"none.gguf\""), "{error}");

    let only = |name: &str, bytes: &[u8]| {
        Place::new(Repo {
            files: [(name.into(), bytes.to_vec())].into(),
            ..Repo::default()
        })
    };
    let error = refused(only("m.gguf", b"x").get("hf:o/n"));
    assert!(
        error.contains("add its name") && error.contains("m.gguf"),
        "{error}"
    );
    let error = refused(only("config.json", b"{}").get("hf:o/n"));
    assert!(error.contains("no safetensors"), "{error}");
    let place = only("config.json", b"{}");
    let outside = br#"{"weight_map": {"a": "../s1.safetensors"}}"#.to_vec();
    let mut repo = place.hub.repo.lock().unwrap();
    repo.files
        .insert("model.safetensors.index.json".into(), outside);
    drop(repo);
    let found = place.get("hf:o/n");
    assert!(matches!(found, Err(ModelError::ShardOutside { .. })));
}

#[test]
fn a_silent_server_is_not_waited_for() {
    // In the middle of a file: the rest is asked for anew.
    let place = Place::new(model());
    place.fail_next([Fault::Stall(1000)]);
    let file = place.get("hf:o/n/m.gguf").unwrap();
    assert_eq!(fs::read(file).unwrap(), large(3, 5000));
    let last = place.hub.requests().pop().unwrap();
    assert_eq!(last.range.as_deref(), Some("bytes=1000-"));

    // From the beginning.
    let place = Place::new(Repo {
        silent: true,
        ..model()
    });
    let began = Instant::now();
    let error = refused(place.get("hf:o/n"));
    assert!(error.contains("sent nothing for 0.5 seconds"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(20));
}

#[test]
fn an_unreachable_hub_is_an_error() {
    let place = Place::new(model());
    // Nobody listens on this port.
    let options = place.options().hub_endpoint("http://127.0.0.1:9");
    assert!(refused(resolve("hf:o/n", &options, &|_| {})).contains("127.0.0.1:9"));
    let offline = options.offline(true);
    let found = resolve("hf:o/n", &offline, &|_| {});
    assert!(matches!(found, Err(ModelError::NotFound { .. })));
}

#[test]
fn names_from_the_network_stay_in_the_cache() {
    for (etag, commit) in [
        (Some("../../../x"), None),
        (Some(""), None),
        (None, Some("..")),
        (None, Some("a/../../b")),
    ] {
        let place = Place::new(Repo {
            etag: etag.map(Into::into),
            commit: commit.map(Into::into),
            ..model()
        });
        let error = refused(place.get("hf:o/n/m.gguf"));
        assert!(error.contains("no usable"), "{error}");
        assert!(place.files().is_empty());
    }
}

#[test]
fn two_that_want_the_same_take_turns() {
    let place = Place::new(model());
    let paths: Vec<PathBuf> = thread::scope(|scope| {
        let get = || place.get("hf:o/n/m.gguf").unwrap();
        let all = [scope.spawn(get), scope.spawn(get), scope.spawn(get)];
        all.map(|one| one.join().unwrap()).into()
    });
    assert!(paths.iter().all(|path| *path == paths[0]));
    assert_eq!(fs::read(&paths[0]).unwrap(), large(3, 5000));
}

#[cfg(unix)]
#[test]
fn what_another_tool_has_fetched_is_used() {
    // A folder as huggingface_hub leaves it after loading the model without its tokenizer.
    let place = Place::new(model());
    let snapshot = place.repo().join("snapshots").join(COMMIT);
    for dir in ["blobs", "refs"] {
        fs::create_dir_all(place.repo().join(dir)).unwrap();
    }
    fs::create_dir_all(&snapshot).unwrap();
    fs::write(place.repo().join("refs/main"), COMMIT).unwrap();
    let put = |name: &str| {
        let bytes = &model().files[name];
        let blob = sha256(bytes);
        fs::write(place.repo().join("blobs").join(&blob), bytes).unwrap();
        let link = Path::new("../../blobs").join(blob);
        std::os::unix::fs::symlink(link, snapshot.join(name)).unwrap();
    };
    for name in [
        "config.json",
        "model.safetensors.index.json",
        "s1.safetensors",
        "s2.safetensors",
    ] {
        put(name);
    }
    let offline = place.options().offline(true);
    assert_eq!(resolve("hf:o/n", &offline, &|_| {}).unwrap(), snapshot);
    assert_eq!(place.hub.requests().len(), 0);
    // With the network the tokenizer comes along, and the weights do not.
    assert_eq!(place.get("hf:o/n").unwrap(), snapshot);
    assert!(snapshot.join("tokenizer.json").is_file());
    let fetched = place.hub.requests();
    assert!(
        !fetched.iter().any(|r| r.path.contains("safetensors")),
        "{fetched:?}"
    );
}

const CHILD: &str = "LOCRET_TEST_HUB";

/// Runs in a process of its own, with an environment of its own.
#[test]
fn child() {
    if let Ok(out) = env::var(CHILD) {
        let found = resolve("hf:o/n", &FetchOptions::new(), &|_| {});
        let found = found.map_err(|e| e.to_string());
        fs::write(out, format!("{found:?}")).unwrap();
    }
}

#[test]
fn the_environment_is_heeded() {
    let place = Place::new(Repo {
        gated: true,
        ..model()
    });
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("out");
    let run = |variables: &[(&str, &str)]| {
        let done = Command::new(env::current_exe().unwrap())
            .args(["--exact", "child"])
            .env_clear()
            .env("HOME", home.path())
            .env("HF_ENDPOINT", &place.hub.endpoint)
            .env("HF_HOME", place.cache.path())
            .env(CHILD, &out)
            .envs(variables.iter().copied())
            .status();
        assert!(done.unwrap().success());
        fs::read_to_string(&out).unwrap()
    };
    assert!(run(&[]).contains("gated"));
    assert!(run(&[("HF_HUB_OFFLINE", "1")]).contains("not complete"));
    let found = run(&[("HF_TOKEN", GOOD)]);
    let expected = place.repo().join("snapshots").join(COMMIT);
    assert_eq!(found, format!("{:?}", Ok::<_, String>(expected)));
    // And the file that `hf auth login` writes.
    fs::remove_dir_all(place.repo()).unwrap();
    fs::write(place.cache.path().join("token"), GOOD).unwrap();
    assert!(run(&[]).starts_with("Ok"));
}
