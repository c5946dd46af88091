//! One file, from the hub into the cache.

use super::{
    Repository,
    client::{Client, Failure, Incoming},
    layout::{Layout, create_parent, is_plain},
};
use crate::{
    ModelError, Result,
    fetch::{
        Progress,
        cache::{expect_hash, lock_file, sha256_of},
    },
};
use std::{
    fs::{self, File},
    io::{Read, Write},
    path::{Path, PathBuf},
};

/// Tries without a byte that came, after which a download is given up.
const TRIES: u32 = 3;

/// What a file is fetched with.
pub(super) struct Fetch<'a> {
    pub(super) repository: &'a Repository<'a>,
    pub(super) client: &'a Client,
    pub(super) layout: &'a Layout,
    pub(super) progress: &'a dyn Fn(Progress<'_>),
}

impl Fetch<'_> {
    /// Fetches a file, and says where it is and of which commit.
    pub(super) fn file(&self, file: &str) -> Result<(PathBuf, String)> {
        let first = self.ask(file, 0)?;
        let name = |what: &str, value: Option<&String>| {
            let value = value.filter(|value| is_plain(value)).cloned();
            value.ok_or_else(|| {
                let what = format!("{file}: the hub's answer has no usable {what}");
                self.repository.error(what)
            })
        };
        let etag = name("ETag", first.etag.as_ref())?;
        let commit = name("X-Repo-Commit", first.commit.as_ref())?;
        let blob = self.layout.blob(&etag);
        create_parent(&blob)?;
        let lock = self.layout.lock(&etag);
        create_parent(&lock)?;
        let _lock = lock_file(&lock, file, self.progress)?;
        // Another process may have finished while this one waited.
        if !blob.is_file() {
            self.fill(file, &etag, first)?;
        }
        let path = self.layout.link(&commit, file, &etag)?;
        self.layout.set_commit(self.repository.revision, &commit)?;
        (self.progress)(Progress::Done { path: &path });
        Ok((path, commit))
    }

    fn ask(&self, file: &str, from: u64) -> Result<Incoming> {
        let Repository { id, revision, .. } = self.repository;
        self.client
            .file(id, revision, file, from)
            .map_err(|failure| self.repository.failed(self.client, Some(file), failure))
    }

    /// Brings the content, checks it, and gives it its name.
    fn fill(&self, file: &str, etag: &str, first: Incoming) -> Result<()> {
        let part = self.layout.incomplete(etag);
        let resumed = fs::metadata(&part).is_ok_and(|found| found.len() > 0);
        self.bring(file, etag, first, &part)?;
        // Large files are named by their hash.
        if etag.len() == 64 && etag.bytes().all(|b| b.is_ascii_hexdigit()) {
            let verify = || {
                (self.progress)(Progress::Verifying { what: file });
                expect_hash(file, etag, &sha256_of(&part)?)
            };
            let mut checked = verify();
            if checked.is_err() && resumed {
                // What lay there may have been of something else.
                remove(&part)?;
                self.bring(file, etag, self.ask(file, 0)?, &part)?;
                checked = verify();
            }
            if let Err(wrong) = checked {
                remove(&part)?;
                return Err(wrong);
            }
        }
        let blob = self.layout.blob(etag);
        fs::rename(&part, &blob).map_err(ModelError::io("write", &blob))
    }

    /// Appends to what is there until the file is as long as it should be. An interruption goes on from
    /// there, as long as something came in between.
    fn bring(&self, file: &str, etag: &str, first: Incoming, part: &Path) -> Result<()> {
        let size = first.size;
        let io = |action| ModelError::io(action, part);
        let mut out = File::options()
            .create(true)
            .append(true)
            .open(part)
            .map_err(io("open"))?;
        let mut have = out.metadata().map_err(io("look at"))?.len();
        if size.is_none_or(|size| have > size) {
            out.set_len(0).map_err(io("write"))?;
            have = 0;
        }
        let mut next = (have == 0).then_some(first);
        let mut tries = 0;
        loop {
            if size == Some(have) {
                break;
            }
            let before = have;
            let incoming = match next.take() {
                Some(first) => first,
                None => self.ask(file, have)?,
            };
            if incoming.etag.as_deref() != Some(etag) || incoming.size != size {
                let what = format!("{file}: it was changed while it came in; try again");
                return Err(self.repository.error(what));
            }
            if incoming.from != have {
                // The server has begun somewhere else: at the beginning, or nobody knows why.
                out.set_len(0).map_err(io("write"))?;
                have = 0;
                if incoming.from != 0 {
                    tries += 1;
                    if tries >= TRIES {
                        let what =
                            format!("{file}: the hub sends other parts than it is asked for");
                        return Err(self.repository.error(what));
                    }
                    continue;
                }
            }
            let broken = self.receive(file, incoming, &mut out, &mut have, size, part)?;
            let failure = match broken {
                None if size.is_none_or(|size| size == have) => break,
                None if size.is_some_and(|size| size < have) => {
                    remove(part)?;
                    let what = format!("{file}: more bytes came than the {size:?} announced");
                    return Err(self.repository.error(what));
                }
                None => Failure::Transport {
                    host: self.client.endpoint().to_owned(),
                    why: format!("the file ended after {have} bytes of {}", size.unwrap_or(0)),
                },
                Some(failure) => failure,
            };
            tries = if have > before { 1 } else { tries + 1 };
            if tries >= TRIES {
                return Err(self.repository.failed(self.client, Some(file), failure));
            }
            if size.is_none() {
                // Where it ends is not known, so that nothing can be appended to it.
                out.set_len(0).map_err(io("write"))?;
                have = 0;
            }
            self.client.pause(tries);
        }
        // On disk before it gets its name: a crash must not leave a name without content.
        out.sync_all().map_err(io("write"))
    }

    /// Writes what comes; what stopped it, if something did.
    fn receive(
        &self,
        file: &str,
        incoming: Incoming,
        out: &mut File,
        have: &mut u64,
        size: Option<u64>,
        part: &Path,
    ) -> Result<Option<Failure>> {
        let host = incoming.host;
        let mut body = incoming.body.into_reader();
        let mut buffer = vec![0; 1 << 18];
        loop {
            let n = match body.read(&mut buffer) {
                Ok(0) => return Ok(None),
                Ok(n) => n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) => return Ok(Some(self.client.broken(&host, e))),
            };
            out.write_all(&buffer[..n])
                .map_err(ModelError::io("write", part))?;
            *have += n as u64;
            (self.progress)(Progress::Downloading {
                what: file,
                bytes: *have,
                total: size,
            });
            if size.is_some_and(|size| *have > size) {
                return Ok(None);
            }
        }
    }
}

fn remove(path: &Path) -> Result<()> {
    fs::remove_file(path).map_err(ModelError::io("remove", path))
}
