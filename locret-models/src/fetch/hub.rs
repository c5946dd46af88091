//! Repositories of the Hugging Face hub.

use super::{
    FetchOptions, Progress,
    cache::{cache_dir, expect_hash, sha256_of},
};
use crate::{
    ModelError, Result,
    files::{
        gguf::part_names,
        safetensors::{self, INDEX, SINGLE},
    },
};
use hf_hub::{
    Cache, Repo, RepoType,
    api::sync::{ApiBuilder, ApiRepo},
};
use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
};

const CONFIG: &str = "config.json";
/// Read if they are there. They come before the weights, so that a snapshot with all weights is
/// complete.
const SETTINGS: [&str; 7] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// `owner/name[/file.gguf][@revision]`.
#[derive(Debug, PartialEq, Eq)]
struct Repository<'a> {
    id: String,
    file: Option<&'a str>,
    revision: &'a str,
}

impl<'a> Repository<'a> {
    fn parse(text: &'a str) -> Result<Self> {
        let (path, revision) = text.split_once('@').unwrap_or((text, "main"));
        let plain = |part: &str| {
            !part.is_empty()
                && !part.starts_with('.')
                && !part.contains("..")
                && part
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        let parts: Vec<&str> = path.split('/').collect();
        let valid = match parts[..] {
            [owner, name] => plain(owner) && plain(name),
            [owner, name, file] => {
                plain(owner) && plain(name) && plain(file) && file.ends_with(".gguf")
            }
            _ => false,
        };
        if !(valid && revision.split('/').all(plain)) {
            return Err(ModelError::NotFound {
                name: format!("hf:{text}"),
                help: "a hub repository is written hf:owner/name, hf:owner/name@revision or \
                       hf:owner/name/file.gguf"
                    .into(),
            });
        }
        Ok(Self {
            id: format!("{}/{}", parts[0], parts[1]),
            file: parts.get(2).copied(),
            revision,
        })
    }

    fn error(&self, message: impl ToString) -> ModelError {
        ModelError::Hub {
            repo: self.id.clone(),
            message: message.to_string(),
        }
    }
}

pub(super) fn hub_model(
    repository: &str,
    options: &FetchOptions,
    progress: &dyn Fn(Progress<'_>),
) -> Result<PathBuf> {
    let repository = Repository::parse(repository)?;
    let repo = Repo::with_revision(
        repository.id.clone(),
        RepoType::Model,
        repository.revision.to_owned(),
    );
    let cache = Cache::new(hub_cache(options)?);
    let cached = cache.repo(repo.clone());
    if let Some(path) = in_cache(&repository, |file| cached.get(file)) {
        return Ok(path);
    }
    if options.offline {
        return Err(ModelError::NotFound {
            name: format!("hf:{}", repository.id),
            help: format!(
                "it is not complete in {}, and the network is not to be used",
                cache.path().display()
            ),
        });
    }
    let mut builder = ApiBuilder::from_cache(cache).with_progress(false);
    let endpoint = options.hub_endpoint.clone();
    if let Some(endpoint) = endpoint.or_else(|| env::var("HF_ENDPOINT").ok()) {
        builder = builder.with_endpoint(endpoint);
    }
    let api = builder.build().map_err(|e| repository.error(e))?.repo(repo);
    let fetch = |file: &str| fetch(&repository, &api, |f| cached.get(f), file, progress);
    if let Some(file) = repository.file {
        for part in part_names(file) {
            fetch(&part)?;
        }
        return fetch(file);
    }
    let info = api.info().map_err(|e| repository.error(e))?;
    let has: BTreeSet<&str> = info.siblings.iter().map(|s| s.rfilename.as_str()).collect();
    if !has.contains(CONFIG) {
        let mut files: Vec<&str> = has.iter().copied().collect();
        files.retain(|f| f.ends_with(".gguf"));
        return Err(repository.error(format!(
            "the repository has no {CONFIG}; to use a GGUF file, add its name to the \
             repository's: {}",
            files.join(", ")
        )));
    }
    let config = fetch(CONFIG)?;
    for file in SETTINGS {
        if has.contains(file) {
            fetch(file)?;
        }
    }
    if has.contains(SINGLE) {
        fetch(SINGLE)?;
    } else if has.contains(INDEX) {
        for shard in shards(&fetch(INDEX)?)? {
            fetch(&shard)?;
        }
    } else {
        return Err(repository.error("the repository has no safetensors"));
    }
    parent(&config)
}

fn parent(config: &Path) -> Result<PathBuf> {
    config
        .parent()
        .map(Path::to_path_buf)
        .ok_or_else(|| ModelError::NotFound {
            name: config.display().to_string(),
            help: "the file has no folder".into(),
        })
}

/// The user's cache of the hub, so that nothing is fetched twice; ours if there is none.
fn hub_cache(options: &FetchOptions) -> Result<PathBuf> {
    if options.cache.is_none()
        && let Some(home) = env::var_os("HF_HOME").filter(|v| !v.is_empty())
    {
        return Ok(PathBuf::from(home).join("hub"));
    }
    Ok(cache_dir(options)?.join("hub"))
}

/// The model if every file of it is in the cache.
fn in_cache(repository: &Repository<'_>, get: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    if let Some(file) = repository.file {
        for part in part_names(file) {
            get(&part)?;
        }
        return get(file);
    }
    let config = get(CONFIG)?;
    if get(SINGLE).is_none() {
        for shard in shards(&get(INDEX)?).ok()? {
            get(&shard)?;
        }
    }
    parent(&config).ok()
}

/// The shards that an index names. Nothing but safetensors is fetched as one.
fn shards(index: &Path) -> Result<Vec<String>> {
    let shards = safetensors::shards(index)?;
    match shards
        .iter()
        .find(|(shard, _)| !shard.ends_with(".safetensors"))
    {
        Some((shard, tensors)) => Err(ModelError::ShardOutside {
            index: index.to_path_buf(),
            tensor: tensors.first().cloned().unwrap_or_default(),
            shard: shard.clone(),
        }),
        None => Ok(shards.into_keys().collect()),
    }
}

/// One file, from the cache or the hub.
fn fetch(
    repository: &Repository<'_>,
    api: &ApiRepo,
    cached: impl Fn(&str) -> Option<PathBuf>,
    file: &str,
    progress: &dyn Fn(Progress<'_>),
) -> Result<PathBuf> {
    if let Some(path) = cached(file) {
        return Ok(path);
    }
    let report = Report {
        what: file.to_owned(),
        bytes: 0,
        total: 0,
        progress,
    };
    let path = api
        .download_with_progress(file, report)
        .map_err(|e| repository.error(format!("{file}: {e}")))?;
    // Large files are stored under their hash: what came can be compared with it.
    let blob = path
        .canonicalize()
        .map_err(ModelError::io("find", path.as_path()))?;
    let name = blob
        .file_name()
        .map(|n| n.to_string_lossy().into_owned())
        .unwrap_or_default();
    if name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit()) {
        progress(Progress::Verifying { what: file });
        let found = sha256_of(&blob)?;
        if let Err(e) = expect_hash(file, &name, &found) {
            // Both the name and the content have to go, or the next try would find them.
            for path in [&path, &blob] {
                fs::remove_file(path).map_err(ModelError::io("remove", path))?;
            }
            return Err(e);
        }
    }
    progress(Progress::Done { path: &path });
    Ok(path)
}

struct Report<'a> {
    what: String,
    bytes: u64,
    total: u64,
    progress: &'a dyn Fn(Progress<'_>),
}

impl hf_hub::api::Progress for Report<'_> {
    fn init(&mut self, size: usize, _name: &str) {
        (self.bytes, self.total) = (0, size as u64);
    }

    fn update(&mut self, size: usize) {
        self.bytes += size as u64;
        (self.progress)(Progress::Downloading {
            what: &self.what,
            bytes: self.bytes,
            total: Some(self.total),
        });
    }

    fn finish(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fetch::{cache::hex, resolve};
    use sha2::{Digest, Sha256};
    use std::{
        collections::BTreeMap,
        io::{self, BufRead, BufReader, Write},
        net::{TcpListener, TcpStream},
        sync::{Arc, Mutex},
        thread,
    };

    #[test]
    fn repositories_are_parsed() {
        let parse = |text| {
            Repository::parse(text)
                .ok()
                .map(|r| (r.id, r.file, r.revision))
        };
        assert_eq!(parse("a/b"), Some(("a/b".into(), None, "main")));
        assert_eq!(
            parse("a/b-1.5@refs/pr/1"),
            Some(("a/b-1.5".into(), None, "refs/pr/1"))
        );
        assert_eq!(
            parse("a/b/m.gguf@v1"),
            Some(("a/b".into(), Some("m.gguf"), "v1"))
        );
        for bad in [
            "",
            "a",
            "a/",
            "/b",
            "a/..",
            "../b",
            "a/b@",
            "a/b@../x",
            "a/b/c",
            "a/b/../c.gguf",
            "a/b?x",
            "a/b c",
        ] {
            assert!(
                matches!(Repository::parse(bad), Err(ModelError::NotFound { .. })),
                "{bad:?}"
            );
        }
    }

    type Files = BTreeMap<&'static str, Vec<u8>>;

    /// A hub of one repository `o/n`: the few requests that a download makes.
    struct FakeHub {
        endpoint: String,
        requests: Arc<Mutex<Vec<String>>>,
    }

    impl FakeHub {
        fn new(files: Files, hashes: BTreeMap<&'static str, String>) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let endpoint = format!("http://{}", listener.local_addr().unwrap());
            let requests = Arc::new(Mutex::new(Vec::new()));
            let log = requests.clone();
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let _ = answer(stream, &files, &hashes, &log);
                }
            });
            Self { endpoint, requests }
        }
    }

    fn answer(
        mut stream: TcpStream,
        files: &Files,
        hashes: &BTreeMap<&str, String>,
        log: &Mutex<Vec<String>>,
    ) -> io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
        log.lock().unwrap().push(path.clone());
        let mut range = None;
        loop {
            let mut header = String::new();
            reader.read_line(&mut header)?;
            if header.trim().is_empty() {
                break;
            }
            if let Some(value) = header.to_lowercase().strip_prefix("range: bytes=") {
                let (from, to) = value.trim().split_once('-').unwrap();
                range = Some((from.parse::<usize>().unwrap(), to.parse::<usize>().ok()));
            }
        }
        let respond = |stream: &mut TcpStream, status: &str, headers: &str, body: &[u8]| {
            let head = format!(
                "HTTP/1.1 {status}\r\n{headers}content-length: {}\r\nconnection: close\r\n\r\n",
                body.len()
            );
            stream.write_all(head.as_bytes())?;
            stream.write_all(body)
        };
        if path == "/api/models/o/n/revision/main" {
            let siblings: Vec<_> = files
                .keys()
                .map(|f| serde_json::json!({"rfilename": f}))
                .collect();
            let body = serde_json::json!({"siblings": siblings, "sha": "c0ffee"}).to_string();
            let headers = "content-type: application/json\r\n";
            return respond(&mut stream, "200 OK", headers, body.as_bytes());
        }
        let name = path.strip_prefix("/o/n/resolve/main/").unwrap_or_default();
        let Some(bytes) = files.get(name) else {
            return respond(&mut stream, "404 Not Found", "", b"");
        };
        let (from, to) = range.unwrap_or((0, None));
        let end = to.map_or(bytes.len(), |to| (to + 1).min(bytes.len()));
        let etag = hashes
            .get(name)
            .cloned()
            .unwrap_or_else(|| format!("etag-{}", name.replace('.', "-")));
        let headers = format!(
            "etag: \"{etag}\"\r\nx-repo-commit: c0ffee\r\ncontent-range: bytes {from}-{}/{}\r\n",
            end.max(1) - 1,
            bytes.len()
        );
        respond(
            &mut stream,
            "206 Partial Content",
            &headers,
            &bytes[from.min(end)..end],
        )
    }

    fn options(hub: &FakeHub, cache: &Path) -> FetchOptions {
        FetchOptions {
            cache: Some(cache.to_path_buf()),
            hub_endpoint: Some(hub.endpoint.clone()),
            ..FetchOptions::default()
        }
    }

    fn sharded() -> Files {
        let index = r#"{"weight_map": {"a": "s1.safetensors", "b": "s2.safetensors"}}"#;
        BTreeMap::from([
            (CONFIG, b"{}".to_vec()),
            ("tokenizer.json", b"{}".to_vec()),
            ("README.md", b"text".to_vec()),
            (INDEX, index.as_bytes().to_vec()),
            ("s1.safetensors", vec![1; 5000]),
            ("s2.safetensors", vec![2; 3000]),
            ("m.gguf", vec![3; 100]),
        ])
    }

    #[test]
    fn a_repository_comes_whole_and_once() {
        let hashes = BTreeMap::from([("s1.safetensors", hex(&Sha256::digest([1; 5000])))]);
        let hub = FakeHub::new(sharded(), hashes);
        let cache = tempfile::tempdir().unwrap();
        let options = options(&hub, cache.path());
        let verified = std::cell::Cell::new(0);
        let progress = |p: Progress<'_>| {
            if matches!(p, Progress::Verifying { .. }) {
                verified.set(verified.get() + 1);
            }
        };
        let dir = resolve("hf:o/n", &options, &progress).unwrap();
        assert_eq!(verified.get(), 1);
        for (name, bytes) in sharded() {
            let here = dir.join(name);
            match name {
                "README.md" | "m.gguf" => assert!(!here.exists()),
                _ => assert_eq!(fs::read(here).unwrap(), bytes, "{name}"),
            }
        }
        let before = hub.requests.lock().unwrap().len();
        assert_eq!(resolve("hf:o/n", &options, &|_| {}).unwrap(), dir);
        let offline = FetchOptions {
            offline: true,
            ..options.clone()
        };
        assert_eq!(resolve("hf:o/n", &offline, &|_| {}).unwrap(), dir);
        assert_eq!(hub.requests.lock().unwrap().len(), before);

        let file = resolve("hf:o/n/m.gguf", &options, &|_| {}).unwrap();
        assert_eq!(fs::read(file).unwrap(), [3; 100]);
        assert!(matches!(
            resolve("hf:o/n/absent.gguf", &options, &|_| {}),
            Err(ModelError::Hub { .. })
        ));
    }

    #[test]
    fn corrupt_files_are_not_kept() {
        let files = BTreeMap::from([(CONFIG, b"{}".to_vec()), (SINGLE, vec![1; 100])]);
        let hashes = BTreeMap::from([(SINGLE, "0".repeat(64))]);
        let hub = FakeHub::new(files, hashes);
        let cache = tempfile::tempdir().unwrap();
        let options = options(&hub, cache.path());
        for _ in 0..2 {
            assert!(matches!(
                resolve("hf:o/n", &options, &|_| {}),
                Err(ModelError::Hash { what, .. }) if what == SINGLE
            ));
        }
    }

    #[test]
    fn what_a_repository_lacks_is_named() {
        let cache = tempfile::tempdir().unwrap();
        let files = BTreeMap::from([("m.gguf", vec![3; 100])]);
        let hub = FakeHub::new(files, BTreeMap::new());
        let options = options(&hub, cache.path());
        assert!(matches!(
            resolve("hf:o/n", &options, &|_| {}),
            Err(ModelError::Hub { message, .. }) if message.contains("m.gguf")
        ));
        let files = BTreeMap::from([(CONFIG, b"{}".to_vec())]);
        let hub = FakeHub::new(files, BTreeMap::new());
        let options = super::tests::options(&hub, cache.path());
        assert!(matches!(
            resolve("hf:o/n", &options, &|_| {}),
            Err(ModelError::Hub { message, .. }) if message.contains("no safetensors")
        ));
        let outside = br#"{"weight_map": {"a": "../s1.safetensors"}}"#.to_vec();
        let files = BTreeMap::from([(CONFIG, b"{}".to_vec()), (INDEX, outside)]);
        let hub = FakeHub::new(files, BTreeMap::new());
        let cache = tempfile::tempdir().unwrap();
        let options = super::tests::options(&hub, cache.path());
        assert!(matches!(
            resolve("hf:o/n", &options, &|_| {}),
            Err(ModelError::ShardOutside { .. })
        ));
    }

    #[test]
    fn an_unreachable_hub_is_an_error() {
        let cache = tempfile::tempdir().unwrap();
        let options = FetchOptions {
            cache: Some(cache.path().to_path_buf()),
            // Nobody listens on this port.
            hub_endpoint: Some("http://127.0.0.1:9".into()),
            ..FetchOptions::default()
        };
        assert!(matches!(
            resolve("hf:o/n", &options, &|_| {}),
            Err(ModelError::Hub { repo, .. }) if repo == "o/n"
        ));
        let offline = FetchOptions {
            offline: true,
            ..options
        };
        assert!(matches!(
            resolve("hf:o/n", &offline, &|_| {}),
            Err(ModelError::NotFound { .. })
        ));
    }
}
