//! Tokenizers of `tokenizer.json`.

use super::{Alphabet, Inner, NamedTokens, Tokenizer, WORD_START, check::check, guarded};
use crate::{ModelError, Result, files::json};
use serde_json::Value as Json;
use std::{collections::HashSet, path::Path};
use tokenizers::{NormalizedString, Normalizer, PostProcessorWrapper};

impl Tokenizer {
    /// Reads `tokenizer.json` of a model folder, or a `tokenizer.model`
    /// ([`from_model_file`](Self::from_model_file)) where there is none, with the tokens that
    /// `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` name, where these are
    /// there. Where the first of them says whether texts begin and end with a token (`add_bos_token`,
    /// `add_eos_token`), that counts.
    ///
    /// # Errors
    /// [`ModelError::Io`], [`ModelError::Json`]; [`ModelError::Tokenizer`] for a tokenizer that is
    /// damaged, that would take endless time or memory, or that has parts of a kind that no causal
    /// language model of today uses.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let (file, model) = (dir.join("tokenizer.json"), dir.join("tokenizer.model"));
        let named = NamedTokens::read(dir)?;
        if !file.exists() && model.exists() {
            return Self::from_model(&model, &named.only_new());
        }
        Self::from_json(&file, &named)
    }

    fn from_json(path: &Path, named: &NamedTokens) -> Result<Self> {
        let bytes = json::read_bytes(path)?;
        let fail = |e: &dyn std::fmt::Display| ModelError::tokenizer(path, e);
        let mut file: Json = serde_json::from_slice(&bytes).map_err(|e| fail(&e))?;
        drop(bytes);
        check(&mut file).map_err(|e| fail(&e))?;
        let mut inner: Inner = guarded(path, || Ok(serde_json::from_value(file)?))?;
        named.add_to(&mut inner, path)?;
        check_normalized(path, &inner)?;
        if named.says_ends() {
            // As transformers does: what the file itself puts around texts does not count then.
            inner.with_post_processor(None::<PostProcessorWrapper>);
        }
        let decoder = inner
            .get_decoder()
            .map(serde_json::to_value)
            .transpose()
            .map_err(|e| ModelError::tokenizer(path, e))?;
        let (alphabet, strip) = alphabet(path, decoder.as_ref())?;
        let known: HashSet<&str> = named.names().collect();
        let mut this = Self::new(path, inner, alphabet, strip, &known)?;
        named.finish(&mut this, false);
        Ok(this)
    }
}

/// A token that is looked for in the normalised text has to be there: the library would find nothing
/// everywhere, in the middle of characters, too.
fn check_normalized(path: &Path, inner: &Inner) -> Result<()> {
    let Some(normalizer) = inner.get_normalizer() else {
        return Ok(());
    };
    for token in inner.get_added_tokens_decoder().values() {
        if !token.normalized {
            continue;
        }
        let mut text = NormalizedString::from(token.content.as_str());
        guarded(path, || normalizer.normalize(&mut text))?;
        if text.get().is_empty() {
            let what = format!("the normalizer leaves nothing of {:?}", token.content);
            return Err(ModelError::tokenizer(path, what));
        }
    }
    Ok(())
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
    use crate::{SpecialTokens, tokenizer::tests::golden};
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
        let vanishing = model("[]", r#"{"a": 0}"#)
            .replace(r#""added_tokens": []"#, r#""added_tokens": [{"id": 1, "content": " ",
                "single_word": false, "lstrip": false, "rstrip": false, "normalized": true, "special": false}],
                "normalizer": {"type": "Strip", "strip_left": true, "strip_right": true}"#);
        let error = read(&vanishing).unwrap_err().to_string();
        assert!(error.contains("leaves nothing"), "{error}");
        // What is put around a text need not be in the vocabulary.
        let around = r#""post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "a", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"a": {"id": "a", "ids": [9], "tokens": ["a"]}}}, "decoder""#;
        let around = model("[]", r#"{"a": 0}"#).replace(r#""decoder""#, around);
        let tokenizer = read(&around).unwrap();
        let ids = |text: &str| tokenizer.encode(text, SpecialTokens::Plain);
        assert!(ids("a").unwrap_err().to_string().contains("token 9 of 1"));
        assert_eq!(
            tokenizer.encode_part("a", SpecialTokens::Plain).unwrap(),
            [0]
        );
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
