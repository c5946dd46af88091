//! The cache folder: where it is, whose turn it is to write to it, and what is kept in it.

use super::{FetchOptions, Progress};
use crate::{ModelError, Result};
use sha2::{Digest, Sha256};
use std::{
    env,
    ffi::OsString,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

/// Unfinished files begin with this; under the lock, what is left of them is rubbish.
pub(super) const PARTIAL: &str = ".partial-";
pub(super) const LOCK: &str = ".lock";

/// The cache folder that `options` lead to. It need not exist yet.
///
/// # Errors
/// [`ModelError::NotFound`] if neither the options nor the environment name one.
pub fn cache_dir(options: &FetchOptions) -> Result<PathBuf> {
    cache_dir_in(options, &|name| env::var_os(name))
}

/// A folder that a variable of the environment names, if it is an absolute one.
pub(super) fn absolute_in(
    variable: &dyn Fn(&str) -> Option<OsString>,
    name: &str,
) -> Option<PathBuf> {
    let path = variable(name).map(PathBuf::from);
    path.filter(|path| path.is_absolute())
}

pub(super) fn cache_dir_in(
    options: &FetchOptions,
    variable: &dyn Fn(&str) -> Option<OsString>,
) -> Result<PathBuf> {
    let path = |name| variable(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let absolute = |name| absolute_in(variable, name);
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

/// Waits for the right to write into a folder; held until the file is closed.
pub(super) fn lock(dir: &Path, what: &str, progress: &dyn Fn(Progress<'_>)) -> Result<File> {
    lock_file(&dir.join(LOCK), what, progress)
}

/// The same for a file that stands for whatever is written.
pub(super) fn lock_file(path: &Path, what: &str, progress: &dyn Fn(Progress<'_>)) -> Result<File> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(ModelError::io("open", path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => {
            progress(Progress::Waiting { what });
            file.lock().map_err(ModelError::io("lock", path))?;
            Ok(file)
        }
        Err(fs::TryLockError::Error(e)) => Err(ModelError::io("lock", path)(e)),
    }
}

/// Removes what killed processes have left. Only under the lock.
pub(super) fn remove_leftovers(dir: &Path) -> Result<()> {
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

pub(super) fn expect_hash(what: &str, expected: &str, found: &str) -> Result<()> {
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
pub(super) fn sha256_of(path: &Path) -> Result<String> {
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

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_folder() {
        let absolute = |p: &str| Some(OsString::from(p));
        let find = |cache: Option<&str>, variables: &[(&str, &str)]| {
            let options = FetchOptions {
                cache: cache.map(PathBuf::from),
                ..FetchOptions::default()
            };
            cache_dir_in(&options, &|name| {
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
}
