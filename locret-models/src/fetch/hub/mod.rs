//! Repositories of the Hugging Face hub.

mod client;
mod download;
mod layout;

use super::{
    FetchOptions, Progress,
    cache::{absolute_in, cache_dir_in},
};
use crate::{
    ModelError, Result,
    files::{
        gguf::part_names,
        safetensors::{self, INDEX, SINGLE},
    },
};
use client::{Client, Failure};
use download::Fetch;
use layout::Layout;
use serde::Deserialize;
use std::{
    collections::BTreeSet,
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

/// The hub that everybody means.
const ENDPOINT: &str = "https://huggingface.co";
/// How long a server may be silent.
const PATIENCE: Duration = Duration::from_secs(60);

const CONFIG: &str = "config.json";
/// Read if they are there. They come before the weights, so that a snapshot with all weights is
/// complete.
const SETTINGS: [&str; 11] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "additional_chat_templates/default.jinja",
    "additional_chat_templates/tool_use.jinja",
];

/// `owner/name[/file.gguf][@revision]`; the file may lie in folders.
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
        let mut parts = path.splitn(3, '/');
        let (owner, name) = (parts.next().unwrap_or(""), parts.next().unwrap_or(""));
        let file = parts.next();
        let fits = |file: &str| file.split('/').all(plain) && file.ends_with(".gguf");
        let valid = plain(owner) && plain(name) && file.is_none_or(fits);
        if !(valid && revision.split('/').all(plain)) {
            return Err(ModelError::NotFound {
                name: format!("hf:{text}"),
                help: "a hub repository is written hf:owner/name, hf:owner/name@revision or \
                       hf:owner/name/file.gguf"
                    .into(),
            });
        }
        Ok(Self {
            id: format!("{owner}/{name}"),
            file,
            revision,
        })
    }

    fn error(&self, message: impl ToString) -> ModelError {
        ModelError::Hub {
            repo: self.id.clone(),
            message: message.to_string(),
        }
    }

    /// What a failed request for a file, or for the repository itself, means and what to do.
    fn failed(&self, client: &Client, file: Option<&str>, failure: Failure) -> ModelError {
        let (id, endpoint, revision) = (&self.id, client.endpoint(), self.revision);
        let tokens = format!("{endpoint}/settings/tokens");
        let message = match failure {
            Failure::Silent { host, patience } => format!(
                "{host} sent nothing for {} seconds; try again (what has come is kept)",
                patience.as_secs_f64()
            ),
            Failure::Transport { host, why } => {
                format!("{host}: {why}; try again (what has come is kept)")
            }
            Failure::Status { status, code, said } => {
                let gated = code == "GatedRepo" || status == 403;
                let what = match (status, client.has_token()) {
                    (401 | 403, false) if gated => format!(
                        "it is gated: accept its conditions at {endpoint}/{id}, make a token at \
                         {tokens}, and set HF_TOKEN to it"
                    ),
                    (401 | 403, true) if gated => format!(
                        "it is gated, and the account of your token (HF_TOKEN, or that of `hf auth \
                         login`) has no access: accept its conditions at {endpoint}/{id}, and let \
                         the token read gated repositories at {tokens}"
                    ),
                    (401, false) => format!(
                        "there is no public repository of this name; for a private or gated one set \
                         HF_TOKEN to a token of an account that may read it ({tokens})"
                    ),
                    (401, true) => format!(
                        "the hub does not take your token (HF_TOKEN, or that of `hf auth login`), or \
                         the repository does not exist; tokens are made at {tokens}"
                    ),
                    (404, _) => match (code.as_str(), file) {
                        ("RevisionNotFound", _) => format!("it has no revision {revision:?}"),
                        ("EntryNotFound", Some(file)) => format!("it has no file {file:?}"),
                        (_, Some(file)) if code.is_empty() => format!(
                            "there is no such repository, or no file {file:?} at {revision:?} in it"
                        ),
                        _ => format!(
                            "there is no such repository at {endpoint}, or none that you may read"
                        ),
                    },
                    (429, false) => {
                        "too many requests: wait, or set HF_TOKEN to a token, which may make more"
                            .to_owned()
                    }
                    (429, true) => "too many requests: wait a while".to_owned(),
                    (500.., _) => "the hub has a fault: try again later".to_owned(),
                    _ => "the hub refused".to_owned(),
                };
                let said = match said.is_empty() {
                    true => format!(" (HTTP {status})"),
                    false => format!(" (HTTP {status}: {said})"),
                };
                what + &said
            }
        };
        match file {
            Some(file) => self.error(format!("{file}: {message}")),
            None => self.error(message),
        }
    }
}

/// What options and the environment say of the hub.
#[derive(Debug)]
struct Settings {
    /// Where its files are kept.
    folder: PathBuf,
    endpoint: String,
    token: Option<String>,
    offline: bool,
    patience: Duration,
}

impl Settings {
    fn new(
        options: &FetchOptions,
        variable: &dyn Fn(&str) -> Option<OsString>,
    ) -> Result<Self, ModelError> {
        let text = |name: &str| {
            let value = variable(name).and_then(|value| value.into_string().ok());
            value
                .map(|value| value.trim().to_owned())
                .filter(|v| !v.is_empty())
        };
        let path = |name: &str| text(name).map(PathBuf::from);
        let shared = absolute_in(variable, "XDG_CACHE_HOME")
            .or_else(|| Some(absolute_in(variable, "HOME")?.join(".cache")))
            .map(|cache| cache.join("huggingface"));
        let home = path("HF_HOME");
        let named = || {
            let own = path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE"));
            own.or_else(|| Some(home.as_ref()?.join("hub")))
        };
        // The one that other tools use, where there is one and nobody asks for another.
        let used = || {
            let hub = shared.as_ref()?.join("hub");
            (variable("LOCRET_CACHE").is_none() && hub.is_dir()).then_some(hub)
        };
        let folder = match &options.cache {
            Some(cache) => cache.join("hub"),
            None => match named().or_else(used) {
                Some(folder) => folder,
                None => cache_dir_in(options, variable)?.join("hub"),
            },
        };
        let endpoint = options.hub_endpoint.clone().or_else(|| text("HF_ENDPOINT"));
        let endpoint = endpoint.unwrap_or_else(|| ENDPOINT.to_owned());
        if !(endpoint.starts_with("http://") || endpoint.starts_with("https://")) {
            return Err(ModelError::NotFound {
                name: format!("hub {endpoint:?}"),
                help: "HF_ENDPOINT is an address such as https://huggingface.co".into(),
            });
        }
        let file = path("HF_TOKEN_PATH").or_else(|| Some(home.or(shared)?.join("token")));
        let token = options
            .token
            .clone()
            .or_else(|| text("HF_TOKEN"))
            .or_else(|| text("HUGGING_FACE_HUB_TOKEN"))
            .or_else(|| fs::read_to_string(file?).ok())
            .map(|token| token.trim().to_owned())
            .filter(|token| !token.is_empty());
        if let Some(token) = &token
            && !token.bytes().all(|b| b.is_ascii_graphic())
        {
            return Err(ModelError::NotFound {
                name: "a token for the hub".into(),
                help: "HF_TOKEN has characters that no token has; copy it again".into(),
            });
        }
        let yes = |value: String| {
            ["1", "true", "yes", "on"].contains(&value.to_ascii_lowercase().as_str())
        };
        Ok(Self {
            folder,
            endpoint,
            token,
            offline: options.offline || text("HF_HUB_OFFLINE").is_some_and(yes),
            patience: options.patience.unwrap_or(PATIENCE),
        })
    }
}

pub(super) fn hub_model(
    repository: &str,
    options: &FetchOptions,
    progress: &dyn Fn(Progress<'_>),
) -> Result<PathBuf> {
    let repository = Repository::parse(repository)?;
    let settings = Settings::new(options, &|name| env::var_os(name))?;
    let layout = Layout::new(&settings.folder, &repository.id);
    if let Some(path) = in_cache(&repository, &layout, settings.offline) {
        return Ok(path);
    }
    if settings.offline {
        return Err(ModelError::NotFound {
            name: format!("hf:{}", repository.id),
            help: format!(
                "it is not complete in {}, and the network is not to be used",
                settings.folder.display()
            ),
        });
    }
    let client = Client::new(
        &settings.endpoint,
        settings.token.as_deref(),
        settings.patience,
    );
    let from = Fetch {
        repository: &repository,
        client: &client,
        layout: &layout,
        progress,
    };
    match repository.file {
        Some(file) => fetch_gguf(&from, file),
        None => fetch_folder(&from),
    }
}

/// What the hub says of a repository.
#[derive(Debug, Deserialize)]
struct Info {
    siblings: Vec<Sibling>,
}

#[derive(Debug, Deserialize)]
struct Sibling {
    rfilename: String,
}

/// A GGUF file with all its parts.
fn fetch_gguf(from: &Fetch<'_>, file: &str) -> Result<PathBuf> {
    let (path, commit) = from.file(file)?;
    for part in part_names(file) {
        of_commit(from, &part, &commit)?;
    }
    Ok(path)
}

/// A further file of a commit.
fn of_commit(from: &Fetch<'_>, file: &str, commit: &str) -> Result<PathBuf> {
    if let Some(path) = from.layout.get(commit, file) {
        return Ok(path);
    }
    let (path, found) = from.file(file)?;
    match found == commit {
        true => Ok(path),
        false => Err(from
            .repository
            .error("it was changed while its files came in; try again")),
    }
}

/// A model in the layout of transformers.
fn fetch_folder(from: &Fetch<'_>) -> Result<PathBuf> {
    let (repository, layout) = (from.repository, from.layout);
    let info = from.client.info(&repository.id, repository.revision);
    let info = info.map_err(|failure| repository.failed(from.client, None, failure))?;
    let info: Info = serde_json::from_slice(&info)
        .map_err(|e| repository.error(format!("the hub's list of its files: {e}")))?;
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
    // Which commit it is, is asked anew; what is there of that commit is not.
    let (config, commit) = from.file(CONFIG)?;
    let fetch = |file: &str| of_commit(from, file, &commit);
    for file in SETTINGS {
        if has.contains(file) {
            fetch(file)?;
        } else {
            layout.set_absent(&commit, file)?;
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

/// The model if every file of it is in the cache. Offline, files beside the weights that another tool had
/// no use for may be missing.
fn in_cache(repository: &Repository<'_>, layout: &Layout, offline: bool) -> Option<PathBuf> {
    let commit = layout.commit(repository.revision)?;
    let get = |file: &str| layout.get(&commit, file);
    if let Some(file) = repository.file {
        for part in part_names(file) {
            get(&part)?;
        }
        return get(file);
    }
    let config = get(CONFIG)?;
    let settled = |file: &&str| layout.is_settled(&commit, file);
    if !offline && !SETTINGS.iter().all(settled) {
        return None;
    }
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

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!(
            parse("a/b/Q4/m-00001-of-00002.gguf"),
            Some(("a/b".into(), Some("Q4/m-00001-of-00002.gguf"), "main"))
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
            "a/b/c/../d.gguf",
            "a/b//d.gguf",
            "a/b/c/",
            "a/b?x",
            "a/b c",
        ] {
            assert!(
                matches!(Repository::parse(bad), Err(ModelError::NotFound { .. })),
                "{bad:?}"
            );
        }
    }

    #[test]
    fn the_environment() {
        let home = tempfile::tempdir().unwrap();
        let home = home.path();
        let h = home.to_str().unwrap();
        let read = |options: &FetchOptions, variables: &[(&str, &str)]| {
            let variable = |name: &str| {
                let (_, value) = variables.iter().find(|(n, _)| *n == name)?;
                Some(OsString::from(value))
            };
            Settings::new(options, &variable)
        };
        let settings = |variables: &[(&str, &str)]| read(&FetchOptions::new(), variables).unwrap();
        let folder = |variables: &[(&str, &str)]| settings(variables).folder;
        // Nobody uses the shared folder yet.
        assert_eq!(folder(&[("HOME", h)]), home.join(".cache/locret/hub"));
        let shared = home.join(".cache/huggingface");
        fs::create_dir_all(shared.join("hub")).unwrap();
        assert_eq!(folder(&[("HOME", h)]), shared.join("hub"));
        assert_eq!(
            folder(&[("HOME", h), ("LOCRET_CACHE", "/l")]),
            Path::new("/l/hub")
        );
        assert_eq!(
            folder(&[("HOME", h), ("HF_HOME", "/f")]),
            Path::new("/f/hub")
        );
        let both = [
            ("HF_HOME", "/f"),
            ("HF_HUB_CACHE", "/c"),
            ("LOCRET_CACHE", "/l"),
        ];
        assert_eq!(folder(&both), Path::new("/c"));
        let given = read(&FetchOptions::new().cache("/g"), &both).unwrap();
        assert_eq!(given.folder, Path::new("/g/hub"));

        let token = |variables: &[(&str, &str)]| settings(variables).token;
        assert_eq!(token(&[("HOME", h)]), None);
        fs::write(shared.join("token"), "hf_file\n").unwrap();
        assert_eq!(token(&[("HOME", h)]).unwrap(), "hf_file");
        assert_eq!(
            token(&[("HOME", h), ("HF_TOKEN", " hf_own ")]).unwrap(),
            "hf_own"
        );
        assert_eq!(token(&[("HOME", h), ("HF_HOME", "/nowhere")]), None);
        let options = FetchOptions::new().token("hf_given");
        let given = read(&options, &[("HOME", h), ("HF_TOKEN", "hf_own")]).unwrap();
        assert_eq!(given.token.unwrap(), "hf_given");
        assert!(!format!("{options:?}").contains("hf_given"));
        let bad = read(&FetchOptions::new(), &[("HOME", h), ("HF_TOKEN", "a\nb")]);
        assert!(!bad.unwrap_err().to_string().contains("a\nb"));

        let plain = settings(&[("HOME", h)]);
        assert_eq!(plain.endpoint, "https://huggingface.co");
        assert!(!plain.offline);
        let other = settings(&[
            ("HOME", h),
            ("HF_ENDPOINT", "http://m"),
            ("HF_HUB_OFFLINE", "1"),
        ]);
        assert!(other.offline && other.endpoint == "http://m");
        assert!(read(&FetchOptions::new(), &[("HOME", h), ("HF_ENDPOINT", "m")]).is_err());
    }
}
