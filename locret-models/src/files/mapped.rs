//! Read-only memory maps of files.

use crate::{ModelError, Result};
use memmap2::Mmap;
use std::{
    fs::File,
    ops::Range,
    path::{Path, PathBuf},
};

/// A file mapped into memory.
///
/// As with every memory map, a file that another process shortens while it is mapped takes this
/// process down; don't write to model files in place.
#[derive(Debug)]
pub(crate) struct MappedFile {
    path: PathBuf,
    map: Mmap,
}

impl MappedFile {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(ModelError::io("open", path))?;
        let meta = file.metadata().map_err(ModelError::io("read", path))?;
        if !meta.is_file() {
            return Err(ModelError::format(path, "model file", "a file", "a folder"));
        }
        // SAFETY: the map is read-only and never handed out as anything but bytes, any value of
        // which is valid. That nobody shortens the file is the documented demand on callers.
        let map = unsafe { Mmap::map(&file) }.map_err(ModelError::io("map", path))?;
        super::check_content(path, &map)?;
        Ok(Self {
            path: path.to_path_buf(),
            map,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Lets go of the resident pages of a range, which has been read and will hardly be again.
    /// Reading it anew is always possible.
    pub(crate) fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if range.start < range.end && range.end <= self.map.len() {
            // SAFETY: on a shared, read-only map of a file this only drops page table entries: the
            // next access reads the same bytes from the file again.
            let _ = unsafe {
                self.map.unchecked_advise_range(
                    memmap2::UncheckedAdvice::DontNeed,
                    range.start,
                    range.end - range.start,
                )
            };
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}
