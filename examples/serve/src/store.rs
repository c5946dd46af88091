//! Where sessions are kept: a folder, or an object store that several machines share.

use crate::{Error, Result};
use locret_core::{Folder, SnapshotStore};
use std::sync::Arc;

/// A store by its place: a folder, or `s3://bucket/prefix` where the server was built with that feature.
///
/// # Errors
/// [`Error::Store`] if it cannot be opened.
pub fn open(place: &str) -> Result<Arc<dyn SnapshotStore>> {
    if place.starts_with("s3://") {
        return s3(place);
    }
    let folder = Folder::new(place).map_err(|e| Error::Store(e.to_string()))?;
    Ok(Arc::new(folder))
}

#[cfg(not(feature = "s3"))]
fn s3(place: &str) -> Result<Arc<dyn SnapshotStore>> {
    Err(Error::Store(format!(
        "{place}: this server was built without S3: build it with --features s3"
    )))
}

#[cfg(feature = "s3")]
fn s3(place: &str) -> Result<Arc<dyn SnapshotStore>> {
    crate::objects::s3(place)
}
