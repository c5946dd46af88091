//! Tokenizers of `tokenizer.json`.

use super::{Alphabet, Inner, Tokenizer, WORD_START, guarded};
use crate::{ModelError, Result, files::json};
use serde_json::Value as Json;
use std::{collections::HashSet, path::Path};

impl Tokenizer {
    /// Reads `tokenizer.json`, and `tokenizer_config.json` if it is there, of a model folder; a
    /// `tokenizer.model` ([`from_model_file`](Self::from_model_file)) where there is none.
    ///
    /// # Errors
    /// [`ModelError::Io`], [`ModelError::Json`]; [`ModelError::Tokenizer`] for a tokenizer that is
    /// damaged, or whose decoder is of a kind that no causal language model of today uses.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let (file, model) = (dir.join("tokenizer.json"), dir.join("tokenizer.model"));
        if !file.exists() && model.exists() {
            return Self::from_model_file(model);
        }
        let config: Option<Json> = json::read_optional(&dir.join("tokenizer_config.json"))?;
        let named = |key: &str| {
            let token = config.as_ref()?.get(key)?;
            let text = token.as_str().or_else(|| token.get("content")?.as_str())?;
            Some(text.to_owned())
        };
        let names = [
            named("bos_token"),
            named("eos_token"),
            named("unk_token"),
            named("pad_token"),
        ];
        Self::from_json(&file, names)
    }

    /// `names`: the beginning, end, unknown and padding token.
    fn from_json(path: &Path, names: [Option<String>; 4]) -> Result<Self> {
        let bytes = json::read_bytes(path)?;
        let mut inner = guarded(path, || Inner::from_bytes(&bytes))?;
        // A prompt is never cut or filled up in silence.
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|e| ModelError::tokenizer(path, e))?;
        let decoder = inner
            .get_decoder()
            .map(serde_json::to_value)
            .transpose()
            .map_err(|e| ModelError::tokenizer(path, e))?;
        let (alphabet, strip) = alphabet(path, decoder.as_ref())?;
        let known: HashSet<&str> = names.iter().flatten().map(String::as_str).collect();
        let mut this = Self::new(path, inner, alphabet, strip, &known)?;
        let id = |name: &Option<String>| this.token_to_id(name.as_deref()?);
        (this.bos, this.eos) = (id(&names[0]), id(&names[1]));
        Ok(this)
    }
}

/// How a `tokenizer.json` decodes: its alphabet, and the spaces to take off the start.
fn alphabet(path: &Path, decoder: Option<&Json>) -> Result<(Alphabet, usize)> {
    let unsupported = |what: &Json| {
        Err(ModelError::tokenizer(
            path,
            format!("the decoder {what} is not supported; byte-level and SentencePiece ones are"),
        ))
    };
    let Some(decoder) = decoder else {
        return unsupported(&Json::Null);
    };
    let steps = match decoder["type"].as_str() {
        Some("Sequence") => decoder["decoders"].as_array().cloned().unwrap_or_default(),
        _ => vec![decoder.clone()],
    };
    let mut alphabet = None;
    let mut strip = 0;
    for step in &steps {
        match step["type"].as_str() {
            Some("ByteLevel") if steps.len() == 1 => alphabet = Some(Alphabet::Bytes),
            Some("Replace")
                if step["pattern"]["String"] == WORD_START && step["content"] == " " =>
            {
                alphabet = Some(Alphabet::SentencePiece);
            }
            Some("Metaspace") if step["replacement"] == WORD_START => {
                alphabet = Some(Alphabet::SentencePiece);
                strip = usize::from(step["prepend_scheme"] != "never");
            }
            Some("Strip") if step["content"] == " " && step["stop"] == 0 => {
                strip = step["start"].as_u64().map_or(0, |n| n.min(8) as usize);
            }
            Some("ByteFallback" | "Fuse") => {}
            _ => return unsupported(decoder),
        }
    }
    match alphabet {
        Some(alphabet) => Ok((alphabet, strip)),
        None => unsupported(decoder),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::golden;
    use std::fs;

    #[test]
    fn hostile_tokenizer_files() {
        let model = |merges: &str, vocab: &str| {
            format!(
                r#"{{"version": "1.0", "added_tokens": [], "decoder": {{"type": "ByteLevel",
                "add_prefix_space": false, "trim_offsets": false, "use_regex": false}},
                "model": {{"type": "BPE", "vocab": {vocab}, "merges": {merges}}}}}"#
            )
        };
        let dir = tempfile::tempdir().unwrap();
        let read = |text: &str| {
            fs::write(dir.path().join("tokenizer.json"), text).unwrap();
            Tokenizer::from_dir(dir.path())
        };
        read(&model("[]", r#"{"a": 0, "b": 1}"#)).unwrap();
        for bad in [
            "",
            "{}",
            "[]",
            // The merged token is longer than any that there is.
            &model(r#"["aa bb"]"#, r#"{"aa": 0, "bb": 1}"#),
            &model(r#"["a c"]"#, r#"{"a": 0, "b": 1}"#),
            &model("[]", r#"{"a": 4000000000}"#),
            &model("[]", r#"{"a": -1}"#),
            &model("[]", r#"{"a": 0}"#).replace("ByteLevel", "WordPiece"),
            r#"{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}"#,
        ] {
            assert!(
                matches!(read(bad), Err(ModelError::Tokenizer { .. })),
                "{bad}"
            );
        }
        fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
        assert!(matches!(
            Tokenizer::from_dir(dir.path()),
            Err(ModelError::Io { .. })
        ));
    }

    #[test]
    fn tokenizer_config_names_tokens() {
        let dir = tempfile::tempdir().unwrap();
        fs::copy(golden("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
        let config = r#"{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}"#;
        fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
        let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
        assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(1), Some(2)));
        assert_eq!(tokenizer.end_of_turn(&[]), [2]);
    }
}
