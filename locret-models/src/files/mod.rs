//! Files that weights and settings come in.

pub(crate) mod gguf;
pub(crate) mod gguf_weights;
pub(crate) mod json;
mod mapped;
pub(crate) mod safetensors;

use crate::{ModelError, Result};
use std::path::Path;

/// What a file begins with that only says where its content is.
const POINTERS: [&[u8]; 3] = [
    b"version https://git-lfs.github.com/spec/",
    b"version https://hawser.github.com/spec/",
    b"version http://git-media.io/v/",
];

/// Finds files that stand for others: a repository that was cloned without Git LFS has them.
fn check_content(path: &Path, bytes: &[u8]) -> Result<()> {
    if !POINTERS.iter().any(|pointer| bytes.starts_with(pointer)) {
        return Ok(());
    }
    Err(ModelError::format(
        path,
        "file",
        "the content itself (`git lfs pull` in the repository gets it, or download the file)",
        "a pointer of Git LFS to it",
    ))
}

#[cfg(test)]
mod tests {
    use crate::{Gguf, SafetensorsDir, Tokenizer};
    use std::fs;

    #[test]
    fn pointers_of_git_lfs_are_told_apart() {
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n";
        let dir = tempfile::tempdir().unwrap();
        let names = ["m.gguf", "model.safetensors", "tokenizer.json"];
        for name in names {
            fs::write(dir.path().join(name), pointer).unwrap();
        }
        let errors = [
            Gguf::open(dir.path().join(names[0])).map(drop),
            SafetensorsDir::open(dir.path()).map(drop),
            Tokenizer::from_dir(dir.path()).map(drop),
        ];
        for (name, error) in names.iter().zip(errors) {
            let message = error.unwrap_err().to_string();
            assert!(
                message.contains("Git LFS") && message.contains(name),
                "{message}"
            );
        }
        fs::rename(
            dir.path().join(names[2]),
            dir.path().join("tokenizer.model"),
        )
        .unwrap();
        let message = Tokenizer::from_dir(dir.path()).unwrap_err().to_string();
        assert!(message.contains("Git LFS"), "{message}");
    }
}
