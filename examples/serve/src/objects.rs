//! An object store as a store of snapshots.

use crate::{Error, Result};
use locret_core::{Result as CoreResult, SnapshotError, SnapshotStore, Stored};
use object_store::{ObjectStore, ObjectStoreExt, WriteMultipart, aws::AmazonS3Builder, path::Path};
use std::{
    fmt,
    fs::File,
    io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write},
    sync::Arc,
};
use tokio::runtime::{Builder, Runtime};

/// An object store: each key is an object under a prefix. Called from threads that may block.
///
/// Objects are read into a file without a name first, so that a session is not read at the pace of a
/// network when its turn has come, and written to one, so that an object is only begun when all of it is
/// there. A put is one request, or several parts which become an object together: whoever reads finds the
/// old one or the new one.
pub struct Objects {
    store: Arc<dyn ObjectStore>,
    prefix: Path,
    /// Its requests are made on a thread of its own, whoever waits for them.
    runtime: Option<Runtime>,
}

/// The last to let go may be a task of another runtime, in which nothing may wait: whoever asked for something has
/// waited for it already.
impl Drop for Objects {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl fmt::Debug for Objects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Objects")
            .field("store", &self.store)
            .field("prefix", &self.prefix)
            .finish_non_exhaustive()
    }
}

/// Bytes of one part of a large object; S3 wants 5 MiB at least.
const PART: usize = 8 << 20;
/// Parts that are under way at once.
const PARTS: usize = 2;

/// `s3://bucket/prefix`, with credentials, region and endpoint from the variables that other programs
/// take them from (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT`, …).
///
/// # Errors
/// [`Error::Store`] for a place without a bucket, and for settings that contradict each other.
pub fn s3(place: &str) -> Result<Arc<dyn SnapshotStore>> {
    let failed = |e: &dyn fmt::Display| Error::Store(format!("{place}: {e}"));
    let rest = place.strip_prefix("s3://").unwrap_or(place);
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    if bucket.is_empty() {
        return Err(failed(&"expected s3://bucket/prefix"));
    }
    // One of the two that rustls knows; an error only says that it has been chosen before.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let store = AmazonS3Builder::from_env().with_bucket_name(bucket).build();
    let store = store.map_err(|e| failed(&e))?;
    Ok(Arc::new(Objects::new(Arc::new(store), prefix)?))
}

impl Objects {
    /// Objects of `store` whose names begin with `prefix`.
    ///
    /// # Errors
    /// [`Error::Store`] for a prefix that no name can begin with, or if the system gives no thread.
    pub fn new(store: Arc<dyn ObjectStore>, prefix: &str) -> Result<Self> {
        let prefix = Path::parse(prefix).map_err(|e| Error::Store(e.to_string()))?;
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("locret-objects")
            .enable_all()
            .build()
            .map_err(|e| Error::Store(format!("no thread: {e}")))?;
        Ok(Self {
            store,
            prefix,
            runtime: Some(runtime),
        })
    }

    /// The object of a key; the same keys as a folder has.
    fn path(&self, key: &str) -> CoreResult<Path> {
        let allowed = |c: u8| c.is_ascii_alphanumeric() || b"._-".contains(&c);
        match (1..=128).contains(&key.len()) && !key.starts_with('.') && key.bytes().all(allowed) {
            true => Ok(self.prefix.clone().join(key)),
            false => Err(SnapshotError::Key(key.to_owned()).into()),
        }
    }

    /// Makes requests on the store's own threads, and waits for them.
    fn wait<T: Send + 'static>(
        &self,
        what: &str,
        work: impl Future<Output = io::Result<T>> + Send + 'static,
    ) -> CoreResult<T> {
        let (to, done) = std::sync::mpsc::channel();
        if let Some(runtime) = &self.runtime {
            runtime.spawn(async move {
                let _ = to.send(work.await);
            });
        }
        let done = done.recv().map_err(|e| io::Error::other(e.to_string()));
        done.and_then(|done| done).map_err(failed(what))
    }
}

fn failed(what: &str) -> impl FnOnce(io::Error) -> locret_core::Error {
    let what = what.to_owned();
    move |source| SnapshotError::Io { what, source }.into()
}

impl SnapshotStore for Objects {
    fn put(
        &self,
        key: &str,
        write: &mut dyn FnMut(&mut dyn Write) -> CoreResult<()>,
    ) -> CoreResult<()> {
        let path = self.path(key)?;
        let what = path.to_string();
        let mut file = tempfile::tempfile().map_err(failed("a temporary file"))?;
        let mut to = BufWriter::new(&mut file);
        write(&mut to)?;
        to.flush().map_err(failed(&what))?;
        drop(to);
        file.seek(SeekFrom::Start(0)).map_err(failed(&what))?;
        let store = self.store.clone();
        self.wait(&what, async move { upload(&*store, &path, file).await })
    }

    fn get(&self, key: &str) -> CoreResult<Option<Stored>> {
        let path = self.path(key)?;
        let what = path.to_string();
        let store = self.store.clone();
        let found = self.wait(&what, async move { download(&*store, &path).await })?;
        Ok(found.map(|(file, length)| Stored {
            from: Box::new(BufReader::new(file)),
            length,
        }))
    }

    fn remove(&self, key: &str) -> CoreResult<()> {
        let path = self.path(key)?;
        let what = path.to_string();
        let store = self.store.clone();
        self.wait(&what, async move {
            match store.delete(&path).await {
                Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
                Err(e) => Err(e.into()),
            }
        })
    }
}

async fn upload(store: &dyn ObjectStore, path: &Path, mut file: File) -> io::Result<()> {
    let length = file.metadata()?.len();
    if length <= PART as u64 {
        let mut all = Vec::with_capacity(length as usize);
        file.read_to_end(&mut all)?;
        store.put(path, all.into()).await?;
        return Ok(());
    }
    let upload = store.put_multipart(path).await?;
    let mut parts = WriteMultipart::new_with_chunk_size(upload, PART);
    let mut part = vec![0; PART];
    loop {
        let n = file.read(&mut part)?;
        if n == 0 {
            break;
        }
        parts.wait_for_capacity(PARTS).await?;
        parts.write(&part[..n]);
    }
    parts.finish().await?;
    Ok(())
}

async fn download(store: &dyn ObjectStore, path: &Path) -> io::Result<Option<(File, u64)>> {
    use futures_util::TryStreamExt;
    let found = match store.get(path).await {
        Ok(found) => found,
        Err(object_store::Error::NotFound { .. }) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    let length = found.meta.size;
    let mut file = tempfile::tempfile()?;
    let mut parts = found.into_stream();
    let mut written = 0;
    while let Some(part) = parts.try_next().await? {
        file.write_all(&part)?;
        written += part.len() as u64;
    }
    if written != length {
        let message = format!("{written} of {length} bytes came");
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, message));
    }
    file.seek(SeekFrom::Start(0))?;
    Ok(Some((file, length)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use object_store::memory::InMemory;

    fn objects() -> (Arc<InMemory>, Objects) {
        let store = Arc::new(InMemory::new());
        let objects = Objects::new(store.clone(), "a/b").unwrap();
        (store, objects)
    }

    fn content(objects: &Objects, key: &str) -> Option<Vec<u8>> {
        let mut stored = objects.get(key).unwrap()?;
        let mut all = Vec::new();
        stored.from.read_to_end(&mut all).unwrap();
        assert_eq!(all.len() as u64, stored.length);
        Some(all)
    }

    #[test]
    fn what_is_put_comes_back_whole() {
        let (store, objects) = objects();
        assert_eq!(content(&objects, "k"), None);
        objects.remove("k").unwrap();
        // One request, and several parts.
        for length in [0, 5, PART, PART + 1, 2 * PART + 77] {
            let bytes: Vec<u8> = (0..length).map(|i| (i * i % 251) as u8).collect();
            let put = objects.put("k", &mut |to| {
                to.write_all(&bytes).map_err(failed("a test"))
            });
            put.unwrap();
            assert_eq!(content(&objects, "k").unwrap(), bytes);
        }
        let runtime = Builder::new_current_thread().build().unwrap();
        let there = runtime.block_on(store.head(&Path::from("a/b/k")));
        assert_eq!(there.unwrap().size, 2 * PART as u64 + 77);
        objects.remove("k").unwrap();
        assert_eq!(content(&objects, "k"), None);
    }

    #[test]
    fn what_fails_leaves_the_old_one() {
        let (_, objects) = objects();
        let text = |text: &'static [u8]| {
            move |to: &mut dyn Write| to.write_all(text).map_err(failed("a test"))
        };
        objects.put("k", &mut text(b"old")).unwrap();
        let broken = objects.put("k", &mut |to| {
            text(b"half")(to)?;
            Err(locret_core::Error::Closed)
        });
        assert!(broken.is_err());
        assert_eq!(content(&objects, "k").unwrap(), b"old");
        for bad in ["", ".k", "a/b", "..", "é", &"x".repeat(129)] {
            assert!(objects.get(bad).is_err(), "{bad}");
            assert!(objects.put(bad, &mut text(b"x")).is_err());
            assert!(objects.remove(bad).is_err());
        }
        assert!(s3("s3://").is_err());
    }

    #[test]
    fn the_last_to_let_go_may_be_a_task() {
        let (_, objects) = objects();
        let runtime = Builder::new_current_thread().build().unwrap();
        runtime.block_on(async move { drop(objects) });
    }

    #[test]
    fn a_folder_of_the_machine_is_an_object_store_too() {
        let folder = tempfile::tempdir().unwrap();
        let local = object_store::local::LocalFileSystem::new_with_prefix(folder.path());
        let objects = Objects::new(Arc::new(local.unwrap()), "").unwrap();
        let put = objects.put("k.1", &mut |to| {
            to.write_all(b"x").map_err(failed("a test"))
        });
        put.unwrap();
        assert_eq!(content(&objects, "k.1").unwrap(), b"x");
        assert_eq!(std::fs::read(folder.path().join("k.1")).unwrap(), b"x");
    }
}
