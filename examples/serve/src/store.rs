//! Where sessions are kept: a folder, or an object store that several machines share.

use crate::{Error, Result, app::random};
use locret_core::{
    Error as CoreError, Folder, Result as CoreResult, SnapshotError, SnapshotStore, Stored,
};
use std::{
    io::{ErrorKind, Write},
    sync::{Arc, Mutex, PoisonError},
};

/// A store by its place: a folder, or `s3://bucket/prefix` where the server was built with that feature.
/// Something is written to it and taken away again, so that a place that nothing can be written to is found
/// before anybody has an answer that cannot be kept.
///
/// # Errors
/// [`Error::Store`] if it cannot be opened, or written to.
pub fn open(place: &str) -> Result<Arc<dyn SnapshotStore>> {
    let store = if place.starts_with("s3://") {
        s3(place)?
    } else {
        let folder = Folder::new(place).map_err(|e| Error::Store(e.to_string()))?;
        Arc::new(folder)
    };
    // Of a name that no other process tries at the same time.
    let key = format!("probe-{:x}-{:x}", std::process::id(), random());
    let write = |to: &mut dyn Write| {
        let failed = |source| SnapshotError::Io {
            what: "writing".into(),
            source,
        };
        Ok(to.write_all(b"can be written to").map_err(failed)?)
    };
    let tried = store.put(&key, &mut { write });
    tried
        .and_then(|()| store.remove(&key))
        .map_err(|e| Error::Store(format!("{place} cannot be written to: {e}")))?;
    Ok(store)
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

/// A store for those that make way, of whose failures nobody else would hear: whoever was to make way goes on, and
/// whoever waits goes on waiting. They are told to whoever looks after the server: of several in a row that have the
/// same cause, the first.
#[derive(Debug)]
pub(crate) struct Told {
    store: Arc<dyn SnapshotStore>,
    /// Whether the last one failed, and what the system called it.
    last: Mutex<Option<Option<ErrorKind>>>,
}

impl Told {
    pub(crate) fn new(store: Arc<dyn SnapshotStore>) -> Self {
        Self {
            store,
            last: Mutex::new(None),
        }
    }
}

impl SnapshotStore for Told {
    fn put(
        &self,
        key: &str,
        write: &mut dyn FnMut(&mut dyn Write) -> CoreResult<()>,
    ) -> CoreResult<()> {
        let done = self.store.put(key, write);
        let failed = done.as_ref().err().map(|error| match error {
            CoreError::Snapshot(SnapshotError::Io { source, .. }) => Some(source.kind()),
            _ => None,
        });
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let told = *last == failed;
        *last = failed;
        drop(last);
        if let (Err(error), false) = (&done, told) {
            eprintln!("error: nobody can make way for those that wait: {error}");
        }
        done
    }

    fn get(&self, key: &str) -> CoreResult<Option<Stored>> {
        self.store.get(key)
    }

    fn remove(&self, key: &str) -> CoreResult<()> {
        self.store.remove(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_that_nothing_can_be_written_to_are_found_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("new/sessions");
        open(place.to_str().unwrap()).unwrap();
        assert_eq!(std::fs::read_dir(&place).unwrap().count(), 0);
        let file = folder.path().join("file");
        std::fs::write(&file, "x").unwrap();
        let mut bad = vec![file.join("below"), file];
        if cfg!(target_os = "linux") {
            // A folder in which nobody makes a file, whoever that is.
            bad.push("/proc/self".into());
        }
        for bad in bad {
            let bad = bad.to_str().unwrap();
            let error = open(bad).unwrap_err().to_string();
            assert!(error.contains(bad), "{error}");
        }
    }
}
