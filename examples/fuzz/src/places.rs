//! A folder for the files of this process.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::LazyLock,
};
use tempfile::TempDir;

static FOLDER: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a folder"));

/// The path of a file or folder of this process, whether it is there or not.
pub(crate) fn path(name: &str) -> PathBuf {
    FOLDER.path().join(name)
}

/// A folder of this process.
pub(crate) fn folder(name: &str) -> PathBuf {
    let path = path(name);
    fs::create_dir_all(&path).expect("a folder");
    path
}

/// Writes a file. What a reader has mapped of the one that was there is not touched.
pub(crate) fn write(path: &Path, bytes: &[u8]) {
    let _gone_or_never_there = fs::remove_file(path);
    fs::write(path, bytes).expect("a file of this process can be written");
}

/// A file of the tests of another crate.
pub(crate) fn golden(name: &str) -> Vec<u8> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    fs::read(root.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}
