//! Where units lie that are put away: a scratch file, memory apart, or whatever else takes bytes and gives them back.

use crate::{Error, Result};
use std::{
    collections::BTreeMap,
    fmt,
    fs::File,
    io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
};

/// Bytes by their place. Reads and writes are positional, so that a file that is cut off, a disk that fills or one that
/// fails is an error of one call (a mapping of it would kill the process).
pub trait Scratch: fmt::Debug + Send + Sync {
    /// Writes all of `bytes` from `at` on, beyond the end, too.
    ///
    /// # Errors
    /// What the system says.
    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()>;

    /// Fills `bytes` with what was written from `at` on.
    ///
    /// # Errors
    /// What the system says; [`io::ErrorKind::UnexpectedEof`] if it is not there any more.
    fn read_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()>;

    /// Says that these bytes will not be read again.
    fn forget(&self, _at: u64, _length: u64) {}
}

/// A second tier for units: what makes a [`Scratch`] for each layer of each sequence, when something is first put
/// away.
///
/// In a [`Spilled`](crate::Spilled) store.
#[derive(Clone)]
pub struct Tier {
    name: String,
    open: Arc<dyn Fn() -> io::Result<Box<dyn Scratch>> + Send + Sync>,
}

impl Tier {
    /// Host memory, apart from what is resident: for a device that has less of its own, or to hold units as they were
    /// written rather than as they are computed with.
    pub fn memory() -> Self {
        Self::new("memory", || Ok(Box::new(InMemory::default())))
    }

    /// Scratch files in a folder, or where the system keeps such files (which may be memory, too). A file has no name
    /// there: it is gone with the store, or with the process, whatever ends it.
    ///
    /// Each layer of each sequence that has put something away holds one open file.
    pub fn disk(folder: Option<PathBuf>) -> Self {
        let name = match &folder {
            Some(folder) => format!("disk {}", folder.display()),
            None => "disk".into(),
        };
        Self::new(name, move || {
            let file = match &folder {
                Some(folder) => tempfile::tempfile_in(folder),
                None => tempfile::tempfile(),
            };
            Ok(Box::new(OnDisk(file?)))
        })
    }

    /// Anything else; `name` stands in messages, and for policies' fingerprints.
    pub fn new(
        name: impl Into<String>,
        open: impl Fn() -> io::Result<Box<dyn Scratch>> + Send + Sync + 'static,
    ) -> Self {
        Self {
            name: name.into(),
            open: Arc::new(open),
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A place of one's own in it.
    pub(super) fn open(&self) -> Result<Arc<Space>> {
        let scratch = (self.open)().map_err(|e| self.failed("opening it", e))?;
        Ok(Arc::new(Space {
            tier: self.clone(),
            scratch,
            room: Mutex::default(),
        }))
    }

    fn failed(&self, what: impl fmt::Display, source: io::Error) -> Error {
        Error::Tier {
            what: format!("{} ({what})", self.name),
            source,
        }
    }
}

impl fmt::Debug for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tier({:?})", self.name)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A store's part of a tier, which its forks share: what is written is never changed.
#[derive(Debug)]
pub(super) struct Space {
    tier: Tier,
    scratch: Box<dyn Scratch>,
    room: Mutex<Room>,
}

/// Where there is room.
#[derive(Debug, Default)]
struct Room {
    end: u64,
    /// By length, places that were given back.
    free: BTreeMap<u64, Vec<u64>>,
}

/// Bytes that were written, until nobody has this any more.
#[derive(Debug)]
pub(super) struct Extent {
    space: Arc<Space>,
    at: u64,
    length: u64,
    hash: u64,
}

impl Space {
    /// Puts bytes away.
    pub(super) fn write(self: &Arc<Self>, bytes: &[u8]) -> Result<Extent> {
        let length = bytes.len() as u64;
        let at = {
            let mut room = lock(&self.room);
            let freed = room.free.get_mut(&length).and_then(Vec::pop);
            freed.unwrap_or_else(|| {
                let at = room.end;
                room.end += length;
                at
            })
        };
        let extent = Extent {
            space: self.clone(),
            at,
            length,
            hash: hash(bytes),
        };
        let written = self.scratch.write_at(bytes, at);
        written.map_err(|e| {
            self.tier
                .failed(format!("writing {length} bytes at {at}"), e)
        })?;
        Ok(extent)
    }
}

impl Extent {
    /// The bytes again.
    pub(super) fn read(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.length as usize];
        let what = || format!("reading {} bytes at {}", self.length, self.at);
        let tier = &self.space.tier;
        let read = self.space.scratch.read_at(&mut bytes, self.at);
        read.map_err(|e| tier.failed(what(), e))?;
        match hash(&bytes) == self.hash {
            true => Ok(bytes),
            // A file that was cut off and written to again has holes that read as zeros.
            false => {
                let other = "these are not the bytes that were written";
                let other = io::Error::new(io::ErrorKind::InvalidData, other);
                Err(tier.failed(what(), other))
            }
        }
    }
}

impl Drop for Extent {
    fn drop(&mut self) {
        self.space.scratch.forget(self.at, self.length);
        let mut room = lock(&self.space.room);
        room.free.entry(self.length).or_default().push(self.at);
    }
}

/// Of bytes, eight at a time (FNV-1a's step): to notice what was lost or altered.
fn hash(bytes: &[u8]) -> u64 {
    let step = |hash: u64, word: u64| (hash ^ word).wrapping_mul(0x0100_0000_01b3).rotate_left(23);
    let words = bytes.chunks_exact(8);
    let rest = words.remainder().iter().map(|byte| u64::from(*byte));
    let words = words.map(|word| word.iter().rev().fold(0, |all, b| all << 8 | u64::from(*b)));
    words.chain(rest).fold(0xcbf2_9ce4_8422_2325, step)
}

/// Pieces of memory by their place.
#[derive(Debug, Default)]
struct InMemory(RwLock<BTreeMap<u64, Box<[u8]>>>);

impl Scratch for InMemory {
    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        let mut all = self.0.write().unwrap_or_else(PoisonError::into_inner);
        all.insert(at, bytes.into());
        Ok(())
    }

    fn read_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        let all = self.0.read().unwrap_or_else(PoisonError::into_inner);
        match all.get(&at).filter(|own| own.len() == bytes.len()) {
            Some(own) => {
                bytes.copy_from_slice(own);
                Ok(())
            }
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn forget(&self, at: u64, _length: u64) {
        let mut all = self.0.write().unwrap_or_else(PoisonError::into_inner);
        all.remove(&at);
    }
}

/// A file without a name.
#[derive(Debug)]
struct OnDisk(File);

#[cfg(any(unix, windows))]
impl Scratch for OnDisk {
    #[cfg(unix)]
    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::write_all_at(&self.0, bytes, at)
    }

    #[cfg(unix)]
    fn read_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(&self.0, bytes, at)
    }

    #[cfg(windows)]
    fn write_at(&self, mut bytes: &[u8], mut at: u64) -> io::Result<()> {
        while !bytes.is_empty() {
            match std::os::windows::fs::FileExt::seek_write(&self.0, bytes, at)? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                n => (bytes, at) = (&bytes[n..], at + n as u64),
            }
        }
        Ok(())
    }

    #[cfg(windows)]
    fn read_at(&self, mut bytes: &mut [u8], mut at: u64) -> io::Result<()> {
        while !bytes.is_empty() {
            match std::os::windows::fs::FileExt::seek_read(&self.0, bytes, at)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => (bytes, at) = (&mut bytes[n..], at + n as u64),
            }
        }
        Ok(())
    }
}

#[cfg(not(any(unix, windows)))]
impl Scratch for OnDisk {
    fn write_at(&self, _bytes: &[u8], _at: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn read_at(&self, _bytes: &mut [u8], _at: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_away_comes_back_and_its_room_is_used_again() {
        for tier in [Tier::memory(), Tier::disk(None)] {
            let space = tier.open().unwrap();
            let bytes = |seed: u8, n: usize| -> Vec<u8> {
                (0..n).map(|i| seed.wrapping_add((i * i) as u8)).collect()
            };
            let first = space.write(&bytes(1, 100)).unwrap();
            let second = space.write(&bytes(2, 37)).unwrap();
            assert_eq!(first.read().unwrap(), bytes(1, 100));
            assert_eq!(second.read().unwrap(), bytes(2, 37));
            let at = first.at;
            drop(first);
            let third = space.write(&bytes(3, 100)).unwrap();
            assert_eq!((third.at, third.read().unwrap()), (at, bytes(3, 100)));
            assert_eq!(second.read().unwrap(), bytes(2, 37));
            assert_eq!(lock(&space.room).end, 137);
        }
    }

    #[test]
    fn every_byte_counts() {
        let bytes: Vec<u8> = (0..45).collect();
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut other = bytes.clone();
                other[at] ^= 1 << bit;
                assert_ne!(hash(&bytes), hash(&other));
            }
        }
        assert_ne!(hash(&[0; 16]), hash(&[0; 8]));
    }

    #[test]
    fn a_file_that_is_cut_off_is_an_error_and_its_holes_are_not_zeros() {
        let file = tempfile::tempfile().unwrap();
        let same = file.try_clone().unwrap();
        let files = Mutex::new(Some(file));
        let tier = Tier::new("cut off", move || {
            let file = lock(&files).take().ok_or(io::ErrorKind::NotFound)?;
            Ok(Box::new(OnDisk(file)))
        });
        let space = tier.open().unwrap();
        let first = space.write(&[7; 64]).unwrap();
        same.set_len(10).unwrap();
        let Error::Tier { what, source } = first.read().unwrap_err() else {
            panic!("another error");
        };
        assert!(what.contains("reading 64 bytes at 0"), "{what}");
        assert_eq!(source.kind(), io::ErrorKind::UnexpectedEof);
        let second = space.write(&[8; 64]).unwrap();
        assert_eq!(second.read().unwrap(), [8; 64]);
        let Error::Tier { source, .. } = first.read().unwrap_err() else {
            panic!("another error");
        };
        assert_eq!(source.kind(), io::ErrorKind::InvalidData);
        assert!(tier.open().is_err());
    }
}
