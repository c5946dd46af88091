//! Where snapshots are kept.

use crate::{Result, SnapshotError};
use std::{
    ffi::OsStr,
    fmt::{self, Debug},
    fs::{self, File},
    io::{self, BufReader, BufWriter, ErrorKind, Read, Write},
    path::{Path, PathBuf},
};

/// Keeps snapshots by name: a folder, or whatever several processes share.
///
/// ```
/// use locret_core::{Folder, SnapshotStore};
/// # fn demo(folder: &std::path::Path, session: &locret_core::Session) -> locret_core::Result<()> {
///
/// let store = Folder::new(folder)?;
/// store.put("conversation-7", &mut |to| session.write(to))?;
/// assert!(store.get("conversation-7")?.is_some());
/// # Ok(()) }
/// ```
pub trait SnapshotStore: Debug + Send + Sync {
    /// Keeps what `write` writes as `key`, in place of what was there before. Whoever reads gets all of the
    /// one or all of the other. `write` can be called again after a failure of the store's.
    ///
    /// # Errors
    /// [`SnapshotError::Key`] for a key that is not allowed, [`SnapshotError::Io`], and those of `write`;
    /// what was there is there then, or all of the new one, if only its safe arrival could not be confirmed.
    fn put(&self, key: &str, write: &mut dyn FnMut(&mut dyn Write) -> Result<()>) -> Result<()>;

    /// What was kept as `key`.
    ///
    /// # Errors
    /// [`SnapshotError::Key`], [`SnapshotError::Io`].
    fn get(&self, key: &str) -> Result<Option<Stored>>;

    /// Forgets what was kept as `key`, if there is anything.
    ///
    /// # Errors
    /// [`SnapshotError::Key`], [`SnapshotError::Io`].
    fn remove(&self, key: &str) -> Result<()>;
}

/// What a [`SnapshotStore`] hands out.
pub struct Stored {
    /// The bytes.
    pub from: Box<dyn Read + Send>,
    /// How many there are.
    pub length: u64,
}

impl Debug for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stored")
            .field("length", &self.length)
            .finish_non_exhaustive()
    }
}

/// A folder with one file for each key: 1 to 128 of the characters `A-Z a-z 0-9 . _ -`, the first of
/// which is no point.
#[derive(Debug, Clone)]
pub struct Folder(PathBuf);

impl Folder {
    /// This folder, which is made if it is not there.
    ///
    /// # Errors
    /// [`SnapshotError::Io`].
    pub fn new(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        fs::create_dir_all(&path).map_err(SnapshotError::io(path.display()))?;
        Ok(Self(path))
    }

    fn path(&self, key: &str) -> Result<PathBuf> {
        let allowed = |c: u8| c.is_ascii_alphanumeric() || b"._-".contains(&c);
        match (1..=128).contains(&key.len()) && !key.starts_with('.') && key.bytes().all(allowed) {
            true => Ok(self.0.join(key)),
            false => Err(SnapshotError::Key(key.to_owned()).into()),
        }
    }
}

impl SnapshotStore for Folder {
    fn put(&self, key: &str, write: &mut dyn FnMut(&mut dyn Write) -> Result<()>) -> Result<()> {
        replace(&self.path(key)?, write)
    }

    fn get(&self, key: &str) -> Result<Option<Stored>> {
        let path = self.path(key)?;
        match open(&path) {
            Ok((from, length)) => Ok(Some(Stored {
                from: Box::new(from),
                length,
            })),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(SnapshotError::io(path.display())(e).into()),
        }
    }

    fn remove(&self, key: &str) -> Result<()> {
        let path = self.path(key)?;
        match fs::remove_file(&path) {
            Err(e) if e.kind() != ErrorKind::NotFound => {
                Err(SnapshotError::io(path.display())(e).into())
            }
            _ => Ok(()),
        }
    }
}

/// A file to be read, and how long it is.
pub(super) fn open(path: &Path) -> io::Result<(BufReader<File>, u64)> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    Ok((BufReader::new(file), length))
}

/// Writes a file in place of the one that is there: at any moment the path is all of the old one or all
/// of the new one, also if the process or the machine dies.
pub(super) fn replace(
    path: &Path,
    write: &mut dyn FnMut(&mut dyn Write) -> Result<()>,
) -> Result<()> {
    let failed = || SnapshotError::io(path.display());
    let folder = match path.parent() {
        Some(folder) if folder != OsStr::new("") => folder,
        _ => Path::new("."),
    };
    // In the same folder, since a file can be renamed within a file system only; of a name that nobody
    // else has, so that what a killed process left behind hinders nobody; gone if anything fails.
    let mut temporary = tempfile::Builder::new()
        .prefix(".snapshot-")
        .suffix(".tmp")
        .tempfile_in(folder)
        .map_err(failed())?;
    let mut to = BufWriter::new(&mut temporary);
    write(&mut to)?;
    to.flush().map_err(failed())?;
    drop(to);
    temporary.as_file().sync_all().map_err(failed())?;
    temporary.persist(path).map_err(|e| failed()(e.error))?;
    // The new name is an entry of the folder, which has to reach the disk, too.
    #[cfg(unix)]
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(failed())?;
    Ok(())
}
