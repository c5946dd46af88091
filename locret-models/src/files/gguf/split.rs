//! Files that were split into several.

use super::{MappedFile, header::Header};
use crate::{ModelError, Result};
use std::path::{Path, PathBuf};

/// No model comes in more parts.
const MAX_PARTS: u64 = 4096;

/// The number under a key of a part.
fn number(header: &Header, key: &str) -> Option<u64> {
    header.metadata.get(key)?.as_u64()
}

/// The names of all parts of the file that one of this name is a part of; none for other names.
pub(crate) fn part_names(name: &str) -> Vec<String> {
    let parts = || {
        let (stem, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (stem, this) = stem.rsplit_once('-')?;
        let number = |text: &str| text.parse().ok().filter(|_| text.len() == 5);
        let (this, count): (u64, u64) = (number(this)?, number(count)?);
        let fits = (1..=count).contains(&this) && count <= MAX_PARTS;
        let part = |n| format!("{stem}-{n:05}-of-{count:05}.gguf");
        fits.then(|| (1..=count).map(part).collect())
    };
    parts().unwrap_or_default()
}

/// All parts of the file that `file` is a part of, in order; none if it is not a part.
pub(super) fn parts(file: &MappedFile, header: &Header) -> Result<Vec<PathBuf>> {
    let count = number(header, "split.count").unwrap_or(0);
    if count < 2 {
        return Ok(Vec::new());
    }
    let this = number(header, "split.no").unwrap_or(0).saturating_add(1);
    let path = file.path();
    let name = path.file_name().and_then(|name| name.to_str());
    let ending = format!("-{this:05}-of-{count:05}.gguf");
    let names = part_names(name.unwrap_or_default());
    if names.len() as u64 != count || names.get((this - 1) as usize).map(String::as_str) != name {
        return Err(ModelError::format(
            path,
            format!("part {this} of {count}"),
            format!("a name that ends in {ending}, beside the other parts"),
            name.unwrap_or("another name"),
        ));
    }
    let parts: Vec<PathBuf> = names.iter().map(|name| path.with_file_name(name)).collect();
    match parts.iter().find(|part| !part.exists()) {
        None => Ok(parts),
        Some(missing) => Err(ModelError::NotFound {
            name: missing.display().to_string(),
            help: format!(
                "{} is part {this} of {count} of a model, and all parts have to be in one folder",
                path.display()
            ),
        }),
    }
}

/// Checks that a file is the part that its name says.
pub(super) fn check(path: &Path, header: &Header, index: usize, count: usize) -> Result<()> {
    let found = [number(header, "split.no"), number(header, "split.count")];
    let expected = [index as u64, count as u64];
    if found == expected.map(Some) {
        return Ok(());
    }
    Err(ModelError::format(
        path,
        "split.no and split.count",
        format!("{expected:?}"),
        format!("{found:?}"),
    ))
}

/// Checks that the parts have all tensors of the whole.
pub(super) fn check_count(path: &Path, header: &Header, found: usize) -> Result<()> {
    match number(header, "split.tensors.count") {
        Some(expected) if expected != found as u64 => Err(ModelError::format(
            path,
            "split.tensors.count",
            format!("{expected} tensors in all parts"),
            found,
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use crate::{Gguf, ModelError, Value, gguf_file::File};
    use std::{fs, path::PathBuf};
    use tempfile::TempDir;

    fn part(no: u16, count: u16, tensors: &[&str]) -> File {
        let mut file = File::default();
        if no == 0 {
            file = file.meta("general.architecture", Value::String("llama".into()));
        }
        file = file
            .meta("split.no", Value::U16(no))
            .meta("split.count", Value::U16(count))
            .meta("split.tensors.count", Value::I32(3));
        for name in tensors {
            file = file.f32(name, &[2], &[f32::from(no), 1.0]);
        }
        file
    }

    fn write(parts: &[File]) -> (TempDir, Vec<PathBuf>) {
        let dir = tempfile::tempdir().unwrap();
        let paths = parts.iter().enumerate().map(|(i, file)| {
            let name = format!("m-{:05}-of-{:05}.gguf", i + 1, parts.len());
            let path = dir.path().join(name);
            fs::copy(file.write().path(), &path).unwrap();
            path
        });
        let paths = paths.collect();
        (dir, paths)
    }

    #[test]
    fn names_of_parts() {
        let names = super::part_names("a/m-q4-00002-of-00003.gguf");
        assert_eq!(names[0], "a/m-q4-00001-of-00003.gguf");
        assert_eq!(
            (names.len(), &names[2][..]),
            (3, "a/m-q4-00003-of-00003.gguf")
        );
        for other in [
            "m.gguf",
            "m-00004-of-00003.gguf",
            "m-2-of-3.gguf",
            "m-00000-of-00003.gguf",
        ] {
            assert!(super::part_names(other).is_empty(), "{other}");
        }
    }

    #[test]
    fn any_part_is_the_whole() {
        let parts = [part(0, 3, &["a"]), part(1, 3, &["b"]), part(2, 3, &["c"])];
        let (_dir, paths) = write(&parts);
        for path in &paths {
            let gguf = Gguf::open(path).unwrap();
            assert_eq!(gguf.path(), paths[0]);
            assert_eq!(gguf.get_str("general.architecture").unwrap(), Some("llama"));
            for (name, no) in [("a", 0.0), ("b", 1.0), ("c", 2.0)] {
                let tensor = gguf.tensor(name).unwrap();
                assert_eq!(gguf.dequantize(tensor).unwrap(), [no, 1.0]);
            }
        }
    }

    #[test]
    fn parts_that_do_not_belong_together() {
        let whole = || vec![part(0, 3, &["a"]), part(1, 3, &["b"]), part(2, 3, &["c"])];
        let (_dir, paths) = write(&whole());
        fs::remove_file(&paths[1]).unwrap();
        let missing = Gguf::open(&paths[2]).unwrap_err();
        assert!(matches!(missing, ModelError::NotFound { .. }), "{missing}");
        assert!(missing.to_string().contains("part 3 of 3"), "{missing}");

        let (dir, paths) = write(&whole());
        let renamed = dir.path().join("other.gguf");
        fs::rename(&paths[1], &renamed).unwrap();
        let error = Gguf::open(&renamed).unwrap_err();
        assert!(error.to_string().contains("part 2 of 3"), "{error}");

        for (i, other) in [
            (1, part(2, 3, &["b"])),
            (1, part(1, 4, &["b"])),
            (1, part(1, 3, &["a"])),
            (1, part(1, 3, &[])),
            (2, File::default()),
        ] {
            let mut parts = whole();
            parts[i] = other;
            let (_dir, paths) = write(&parts);
            assert!(Gguf::open(&paths[0]).is_err());
        }
        // One of one is not split.
        let (_dir, paths) = write(&[part(0, 1, &["a", "b", "c"])]);
        assert_eq!(Gguf::open(&paths[0]).unwrap().tensors().len(), 3);
    }
}
