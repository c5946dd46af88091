//! JSON files of a model's folder.

use crate::{ModelError, Result};
use serde::de::DeserializeOwned;
use std::{fs::File, io::Read, path::Path};

/// No settings file comes near this size (the largest tokenizers have some 30 MB); a larger one is
/// not read into memory.
const MAX_BYTES: u64 = 512 << 20;

/// Reads a file into memory, if it is not absurdly large.
pub(crate) fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(ModelError::io("open", path))?;
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(ModelError::io("read", path))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(ModelError::format(
            path,
            "file",
            format!("at most {MAX_BYTES} bytes"),
            "more",
        ));
    }
    super::check_content(path, &bytes)?;
    Ok(bytes)
}

/// Reads text.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    String::from_utf8(read_bytes(path)?)
        .map_err(|e| ModelError::format(path, "file", "UTF-8 text", e.utf8_error()))
}

/// Reads JSON.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    serde_json::from_slice(&read_bytes(path)?).map_err(|source| ModelError::Json {
        path: path.to_path_buf(),
        source,
    })
}

/// Reads JSON if the file exists.
pub(crate) fn read_optional<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    if path.exists() {
        read(path).map(Some)
    } else {
        Ok(None)
    }
}
