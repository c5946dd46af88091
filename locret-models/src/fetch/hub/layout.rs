//! Where files of the hub are kept: the layout of `HF_HOME`, which other tools share.
//!
//! ```text
//! models--owner--name/blobs/ETAG             the content; ETAG.incomplete while it comes in
//! models--owner--name/snapshots/COMMIT/FILE  a link to it
//! models--owner--name/refs/REVISION          the commit that a branch or tag stood for
//! models--owner--name/.no_exist/COMMIT/FILE  the repository was asked for this file, and has none
//! .locks/models--owner--name/ETAG.lock       whose turn it is to write
//! ```

use crate::{ModelError, Result};
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// The folder of one repository.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    dir: PathBuf,
    locks: PathBuf,
}

impl Layout {
    pub(super) fn new(hub: &Path, id: &str) -> Self {
        let name = format!("models--{}", id.replace('/', "--"));
        Self {
            locks: hub.join(".locks").join(&name),
            dir: hub.join(name),
        }
    }

    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.dir.join("blobs").join(etag)
    }

    pub(super) fn incomplete(&self, etag: &str) -> PathBuf {
        self.dir.join("blobs").join(format!("{etag}.incomplete"))
    }

    pub(super) fn lock(&self, etag: &str) -> PathBuf {
        self.locks.join(format!("{etag}.lock"))
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.dir.join("snapshots").join(commit)
    }

    /// The commit that a revision was when it was last looked at.
    pub(super) fn commit(&self, revision: &str) -> Option<String> {
        let known = fs::read_to_string(self.dir.join("refs").join(revision)).ok();
        let known = known.map(|text| text.trim().to_owned());
        known.filter(|commit| is_plain(commit)).or_else(|| {
            // A commit stands for itself.
            let itself = is_plain(revision) && self.snapshot(revision).is_dir();
            itself.then(|| revision.to_owned())
        })
    }

    /// A file of a commit.
    pub(super) fn get(&self, commit: &str, file: &str) -> Option<PathBuf> {
        let path = self.snapshot(commit).join(file);
        path.is_file().then_some(path)
    }

    fn absent(&self, commit: &str, file: &str) -> PathBuf {
        self.dir.join(".no_exist").join(commit).join(file)
    }

    /// Whether it is known of a file whether the repository has it.
    pub(super) fn is_settled(&self, commit: &str, file: &str) -> bool {
        self.get(commit, file).is_some() || self.absent(commit, file).is_file()
    }

    /// Remembers that the repository does not have a file.
    pub(super) fn set_absent(&self, commit: &str, file: &str) -> Result<()> {
        let path = self.absent(commit, file);
        create_parent(&path)?;
        fs::write(&path, "").map_err(ModelError::io("write", &path))
    }

    /// Gives a complete blob its name in a commit.
    pub(super) fn link(&self, commit: &str, file: &str, etag: &str) -> Result<PathBuf> {
        let path = self.snapshot(commit).join(file);
        if path.is_file() {
            return Ok(path);
        }
        create_parent(&path)?;
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(ModelError::io("remove", &path)(e));
            }
            // Gone, if it was there: a link that leads nowhere.
            _ => {}
        }
        let mut up = PathBuf::from("../..");
        up.extend(file.split('/').skip(1).map(|_| ".."));
        let target = up.join("blobs").join(etag);
        put(&target, &self.blob(etag), &path).map_err(ModelError::io("write", &path))?;
        Ok(path)
    }

    /// Remembers which commit a revision is.
    pub(super) fn set_commit(&self, revision: &str, commit: &str) -> Result<()> {
        if revision == commit {
            return Ok(());
        }
        let path = self.dir.join("refs").join(revision);
        create_parent(&path)?;
        fs::write(&path, commit).map_err(ModelError::io("write", &path))
    }
}

/// A link to `blob`, which lies at `target` as seen from `path`.
#[cfg(unix)]
fn put(target: &Path, _blob: &Path, path: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, path)
}

/// The same where links are a privilege: then the blob itself goes there, as other tools do it.
#[cfg(windows)]
fn put(target: &Path, blob: &Path, path: &Path) -> io::Result<()> {
    std::os::windows::fs::symlink_file(target, path).or_else(|_| fs::rename(blob, path))
}

#[cfg(not(any(unix, windows)))]
fn put(_target: &Path, blob: &Path, path: &Path) -> io::Result<()> {
    fs::rename(blob, path)
}

pub(super) fn create_parent(path: &Path) -> Result<()> {
    match path.parent() {
        Some(dir) => fs::create_dir_all(dir).map_err(ModelError::io("create", dir)),
        None => Ok(()),
    }
}

/// Whether a name from the network may name a file.
pub(super) fn is_plain(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 200
        && !name.starts_with('.')
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn revisions_lead_to_commits() {
        let hub = tempfile::tempdir().unwrap();
        let layout = Layout::new(hub.path(), "o/n");
        assert_eq!(layout.commit("main"), None);
        layout.set_commit("refs/pr/1", "c0ffee").unwrap();
        assert_eq!(layout.commit("refs/pr/1").unwrap(), "c0ffee");
        assert_eq!(layout.commit("c0ffee"), None);
        fs::create_dir_all(layout.snapshot("c0ffee")).unwrap();
        assert_eq!(layout.commit("c0ffee").unwrap(), "c0ffee");
        // What names no folder is no commit.
        layout.set_commit("main", "../../x").unwrap();
        assert_eq!(layout.commit("main"), None);
        assert!(hub.path().join("models--o--n/refs/refs/pr/1").is_file());
    }

    #[test]
    fn links_lead_to_blobs_from_any_depth() {
        let hub = tempfile::tempdir().unwrap();
        let layout = Layout::new(hub.path(), "o/n");
        create_parent(&layout.blob("e")).unwrap();
        fs::write(layout.blob("e"), "content").unwrap();
        for file in ["a", "d/a", "d/d/a"] {
            let path = layout.link("c", file, "e").unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), "content");
            assert_eq!(layout.get("c", file).unwrap(), path);
            assert!(layout.is_settled("c", file));
        }
        // One that leads nowhere is made anew.
        fs::write(layout.blob("f"), "other").unwrap();
        let path = layout.link("c", "b", "f").unwrap();
        fs::remove_file(layout.blob("f")).unwrap();
        assert_eq!(layout.get("c", "b"), None);
        layout.link("c", "b", "e").unwrap();
        assert_eq!(fs::read_to_string(path).unwrap(), "content");
        assert!(!layout.is_settled("c", "x"));
        layout.set_absent("c", "x").unwrap();
        assert!(layout.is_settled("c", "x") && layout.get("c", "x").is_none());
    }
}
