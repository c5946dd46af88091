//! Tokens that are named beside `tokenizer.json`.

use super::{Around, Inner, MAX_ID, MAX_TOKEN, Tokenizer};
use crate::{ModelError, Result, files::json};
use serde_json::{Map, Value as Json};
use std::{collections::BTreeMap, path::Path};
use tokenizers::AddedToken;

/// The tokens with a part to play, in the order in which transformers adds them.
const PARTS: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];
/// Lists (or, of the second, objects with names) of further control tokens.
const FURTHER: [&str; 2] = ["additional_special_tokens", "extra_special_tokens"];

/// Ids that nothing is said of, between those that something is said of.
const MAX_GAP: u32 = 4096;

/// What the files beside `tokenizer.json` say of tokens: `tokenizer_config.json`,
/// `special_tokens_map.json`, `added_tokens.json`. They are read as transformers does.
#[derive(Debug, Default)]
pub(crate) struct NamedTokens {
    /// By part, `bos_token` for example.
    named: Vec<(String, AddedToken)>,
    further: Vec<AddedToken>,
    /// By id.
    added: BTreeMap<u32, AddedToken>,
    /// They are those of `added_tokens.json`, which says nothing but their ids: tokens that are there stay.
    legacy: bool,
    /// Whether texts begin and end with their tokens, where that is said.
    begins: Option<bool>,
    ends: Option<bool>,
}

impl NamedTokens {
    /// Reads the files of a folder that are there.
    ///
    /// # Errors
    /// [`ModelError::Io`], [`ModelError::Json`]; [`ModelError::Tokenizer`] for what is no token.
    pub(crate) fn read(dir: &Path) -> Result<Self> {
        let file = |name: &str| -> Result<Map<String, Json>> {
            let object: Option<Json> = json::read_optional(&dir.join(name))?;
            match object {
                None | Some(Json::Null) => Ok(Map::new()),
                Some(Json::Object(object)) => Ok(object),
                Some(_) => Err(ModelError::tokenizer(&dir.join(name), "expected an object")),
            }
        };
        let config_path = dir.join("tokenizer_config.json");
        let config = file("tokenizer_config.json")?;
        let map = file("special_tokens_map.json")?;
        let listed = config.get("added_tokens_decoder").and_then(Json::as_object);
        // Where the configuration lists the added tokens it is the younger of the two files, otherwise
        // the map was written when tokens were renamed.
        let order = match listed {
            Some(_) => [&config, &map],
            None => [&map, &config],
        };
        let find = |key: &str| {
            let mut found = order.iter().filter_map(|file| file.get(key));
            found.find(|value| !value.is_null())
        };
        let flag = |key: &str| config.get(key).and_then(Json::as_bool);
        let mut this = Self {
            begins: flag("add_bos_token"),
            ends: flag("add_eos_token"),
            ..Self::default()
        };
        for part in PARTS {
            if let Some(token) = find(part).and_then(|value| token(value, true)) {
                this.named.push((part.to_owned(), token));
            }
        }
        for key in FURTHER {
            for value in order.iter().filter_map(|file| file.get(key)) {
                match value {
                    Json::Array(tokens) => {
                        for token in tokens.iter().filter_map(|value| token(value, true)) {
                            if this
                                .further
                                .iter()
                                .all(|known| known.content != token.content)
                            {
                                this.further.push(token);
                            }
                        }
                    }
                    Json::Object(tokens) => {
                        for (name, value) in tokens {
                            let known = this.named.iter().any(|(known, _)| known == name);
                            if let Some(token) = token(value, true).filter(|_| !known) {
                                this.named.push((name.clone(), token));
                            }
                        }
                    }
                    _ => {}
                }
            }
        }
        let id = |text: &str| text.parse().ok().filter(|id| *id <= MAX_ID);
        if let Some(listed) = listed {
            for (key, value) in listed {
                let entry = id(key).zip(token(value, false));
                let (id, token) = entry.ok_or_else(|| {
                    let what = format!("added_tokens_decoder: {key:?} is not the id of a token");
                    ModelError::tokenizer(&config_path, what)
                })?;
                this.added.insert(id, token);
            }
        } else {
            this.legacy = true;
            let path = dir.join("added_tokens.json");
            for (text, value) in file("added_tokens.json")? {
                let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
                let id = id
                    .filter(|id| *id <= MAX_ID && fits(&text))
                    .ok_or_else(|| {
                        ModelError::tokenizer(&path, format!("the id {value} is none of a token"))
                    })?;
                let all = this
                    .named
                    .iter()
                    .map(|(_, token)| token)
                    .chain(&this.further);
                let special = all.into_iter().any(|token| token.content == text);
                this.added.insert(id, AddedToken::from(text, special));
            }
        }
        Ok(this)
    }

    /// The texts of tokens by their parts, for chat templates, in which the first two are never undefined.
    pub(crate) fn texts(&self) -> Vec<(String, String)> {
        let mut texts: Vec<_> = ["bos_token", "eos_token"]
            .iter()
            .filter(|part| self.text(part).is_none())
            .map(|part| (part.to_string(), String::new()))
            .collect();
        let named = self.named.iter();
        texts.extend(named.map(|(part, token)| (part.clone(), token.content.clone())));
        texts
    }

    /// Whether it is said what texts begin and end with, so that no other file says it.
    pub(super) fn says_ends(&self) -> bool {
        self.begins.is_some() || self.ends.is_some()
    }

    /// The same, but tokens that a tokenizer has stay as it has them: for files that say themselves which
    /// tokens are controls.
    pub(super) fn only_new(mut self) -> Self {
        self.legacy = true;
        self
    }

    /// Gives a tokenizer its beginning and end; `begins` where it is not said whether texts have one.
    pub(super) fn finish(&self, this: &mut Tokenizer, begins: bool) {
        let id = |part: &str| this.token_to_id(self.text(part)?);
        let (bos, eos) = (id("bos_token"), id("eos_token"));
        (this.bos, this.eos) = (bos.or(this.bos), eos.or(this.eos));
        this.around = Around {
            bos: this.bos.filter(|_| self.begins.unwrap_or(begins)),
            eos: this.eos.filter(|_| self.ends.unwrap_or(false)),
        };
    }

    /// The text of a part.
    pub(super) fn text(&self, part: &str) -> Option<&str> {
        let found = self.named.iter().find(|(known, _)| known == part);
        found.map(|(_, token)| token.content.as_str())
    }

    /// The texts of all parts.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        let all = self.named.iter().map(|(_, token)| token);
        all.chain(&self.further).map(|token| token.content.as_str())
    }

    /// Adds the tokens that a tokenizer does not have.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] if a token cannot get the id that its file gives it.
    pub(super) fn add_to(&self, inner: &mut Inner, path: &Path) -> Result<()> {
        let known = inner.get_added_tokens_decoder();
        let has = |text: &str| known.values().any(|token| token.content == text);
        let first = inner
            .get_vocab(true)
            .into_values()
            .max()
            .map_or(0, |id| id + 1);
        let mut next = first;
        let mut tokens = Vec::new();
        for (&id, token) in &self.added {
            let same = match self.legacy {
                true => has(&token.content),
                false => known.get(&id) == Some(token),
            };
            if same {
                continue;
            }
            if id >= next && inner.token_to_id(&token.content).is_none() {
                if id - next > MAX_GAP {
                    return Err(ModelError::tokenizer(
                        path,
                        format!(
                            "{:?} is to be the token {id}, after {first} others",
                            token.content
                        ),
                    ));
                }
                // As transformers fills gaps.
                for gap in next..id {
                    tokens.push(AddedToken::from(format!("<|reserved_token_{gap}|>"), true));
                }
                next = id + 1;
            }
            tokens.push(token.clone());
        }
        for token in self
            .named
            .iter()
            .map(|(_, token)| token)
            .chain(&self.further)
        {
            let mut listed = self.added.values();
            if !has(&token.content) && !listed.any(|known| known.content == token.content) {
                tokens.push(token.clone());
            }
        }
        let added = inner.add_tokens(tokens);
        added.map_err(|e| ModelError::tokenizer(path, e))?;
        for (&id, token) in self.added.range(first..) {
            let found = inner.token_to_id(&token.content);
            if found != Some(id) {
                return Err(ModelError::tokenizer(
                    path,
                    format!(
                        "{:?} is to be the token {id}, and is {found:?}",
                        token.content
                    ),
                ));
            }
        }
        Ok(())
    }
}

fn fits(text: &str) -> bool {
    !text.is_empty() && text.len() <= MAX_TOKEN
}

/// A token: its text, or an object that has it.
fn token(value: &Json, special: bool) -> Option<AddedToken> {
    let text = value.as_str().or_else(|| value.get("content")?.as_str());
    let text = text.filter(|text| fits(text))?;
    let flag = |key: &str, default: bool| {
        let found = value.get(key).and_then(Json::as_bool);
        found.unwrap_or(default)
    };
    let special = special || flag("special", false);
    Some(
        AddedToken::from(text, special)
            .single_word(flag("single_word", false))
            .lstrip(flag("lstrip", false))
            .rstrip(flag("rstrip", false))
            .normalized(flag("normalized", !special)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ChatTemplate, SpecialTokens, Tokenizer};
    use base64::{Engine, prelude::BASE64_STANDARD};
    use serde_json::json;
    use std::fs;

    /// `a b ab <s>` of the model, and what files beside say.
    fn folder(added: Json, files: &[(&str, Json)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = json!({
            "version": "1.0", "added_tokens": added,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "<s>": 3}, "merges": [["a", "b"]]}
        });
        fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        for (name, content) in files {
            fs::write(dir.path().join(name), content.to_string()).unwrap();
        }
        dir
    }

    fn ids(dir: &tempfile::TempDir, text: &str) -> Vec<u32> {
        let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
        tokenizer
            .encode_part(text, SpecialTokens::Interpret)
            .unwrap()
    }

    fn token(content: &str) -> Json {
        json!({"content": content, "special": true, "lstrip": false, "rstrip": false,
            "normalized": false, "single_word": false})
    }

    #[test]
    fn texts_begin_and_end_as_their_settings_say() {
        let config = |more: Json| {
            let mut config = json!({"bos_token": "<s>", "eos_token": "<e>"});
            config
                .as_object_mut()
                .unwrap()
                .extend(more.as_object().unwrap().clone());
            ("tokenizer_config.json", config)
        };
        let encode = |dir: &tempfile::TempDir| {
            let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
            let part = tokenizer.encode_part("ab", SpecialTokens::Plain);
            assert_eq!(part.unwrap(), [2]);
            tokenizer.encode("ab", SpecialTokens::Plain).unwrap()
        };
        for (more, expected) in [
            (json!({}), vec![2]),
            (json!({"add_bos_token": true}), vec![3, 2]),
            (json!({"add_eos_token": true}), vec![2, 4]),
            (
                json!({"add_bos_token": true, "add_eos_token": true}),
                vec![3, 2, 4],
            ),
            (json!({"add_bos_token": false}), vec![2]),
            (json!({"add_bos_token": null}), vec![2]),
            // There is no such token.
            (json!({"add_bos_token": true, "bos_token": null}), vec![2]),
        ] {
            assert_eq!(
                encode(&folder(json!([]), &[config(more.clone())])),
                expected,
                "{more}"
            );
        }
        // What the tokenizer's own file puts around texts counts where nothing else is said.
        let own = |more: Json| {
            let dir = folder(json!([]), &[config(more)]);
            let path = dir.path().join("tokenizer.json");
            let mut file: Json = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
            file["post_processor"] = json!({
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [3], "tokens": ["<s>"]}}
            });
            fs::write(&path, file.to_string()).unwrap();
            encode(&dir)
        };
        assert_eq!(own(json!({})), [3, 2]);
        assert_eq!(own(json!({"add_bos_token": true})), [3, 2]);
        assert_eq!(own(json!({"add_bos_token": false})), [2]);
    }

    #[test]
    fn control_tokens_beside_a_model_file() {
        let dir = tempfile::tempdir().unwrap();
        let model: String = (0..=255u8)
            .map(|b| format!("{} {b}\n", BASE64_STANDARD.encode([b])))
            .collect();
        fs::write(dir.path().join("tokenizer.model"), model).unwrap();
        let plain = Tokenizer::from_dir(dir.path()).unwrap();
        let next = plain.vocab_size() as u32;
        let added = json!({"<|mine|>": next});
        fs::write(dir.path().join("added_tokens.json"), added.to_string()).unwrap();
        let config = json!({"add_bos_token": false, "eos_token": "<|mine|>"});
        fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
        assert_eq!(ids(&dir, "a<|mine|>"), [97, next]);
        assert_eq!(plain.encode("a", SpecialTokens::Plain).unwrap(), [256, 97]);
        assert_eq!(tokenizer.encode("a", SpecialTokens::Plain).unwrap(), [97]);
        assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(256), Some(next)));
    }

    #[test]
    fn control_tokens_beside_the_tokenizer() {
        let config = "tokenizer_config.json";
        let map = "special_tokens_map.json";
        let (text, expected) = ("ab<|x|>b<|y|>", [2, 4, 1, 5]);
        for files in [
            vec![(
                config,
                json!({"added_tokens_decoder": {"4": token("<|x|>"), "5": token("<|y|>")}}),
            )],
            vec![("added_tokens.json", json!({"<|x|>": 4, "<|y|>": 5}))],
            vec![(
                map,
                json!({"additional_special_tokens": ["<|x|>", token("<|y|>")]}),
            )],
            vec![(
                map,
                json!({"bos_token": "<|x|>", "eos_token": {"content": "<|y|>"}}),
            )],
            vec![(config, json!({"bos_token": "<|x|>", "pad_token": "<|y|>"}))],
            vec![(
                config,
                json!({"extra_special_tokens": {"image_token": "<|x|>", "more": "<|y|>"}}),
            )],
            vec![
                (config, json!({"additional_special_tokens": ["<|x|>"]})),
                ("added_tokens.json", json!({"<|x|>": 4, "<|y|>": 5})),
            ],
        ] {
            let dir = folder(json!([]), &files);
            assert_eq!(ids(&dir, text), expected, "{files:?}");
            let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
            // They count only where they are asked for.
            let plain = tokenizer
                .encode_part("<|x|>", SpecialTokens::Plain)
                .unwrap();
            assert!(!plain.contains(&4), "{files:?}");
        }
        // A token that the model has becomes a control token by its name.
        let dir = folder(json!([]), &[(map, json!({"bos_token": "<s>"}))]);
        assert_eq!(ids(&dir, "a<s>b"), [0, 3, 1]);
        assert_eq!(Tokenizer::from_dir(dir.path()).unwrap().bos(), Some(3));
        // Gaps are filled, and what takes another's place is not given another id in silence.
        let gap = json!({"added_tokens_decoder": {"6": token("<|x|>")}});
        assert_eq!(ids(&folder(json!([]), &[(config, gap)]), "<|x|>"), [6]);
        for wrong in [
            json!({"added_tokens_decoder": {"4000000": token("<|x|>")}}),
            json!({"added_tokens_decoder": {"-1": token("<|x|>")}}),
            json!({"added_tokens_decoder": {"4": 5}}),
        ] {
            let dir = folder(json!([]), &[(config, wrong.clone())]);
            let found = Tokenizer::from_dir(dir.path());
            assert!(
                matches!(found, Err(ModelError::Tokenizer { .. })),
                "{wrong}"
            );
        }
    }

    #[test]
    fn the_younger_file_names_the_token() {
        let template = (
            "chat_template.jinja",
            "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}",
        );
        let render = |files: &[(&str, Json)]| {
            let dir = folder(json!([]), files);
            fs::write(dir.path().join(template.0), template.1).unwrap();
            let template = ChatTemplate::from_dir(dir.path()).unwrap().unwrap();
            template.render(&[], false).unwrap()
        };
        let config = |more: Json| {
            let mut config = json!({"bos_token": "<c>"});
            for (key, value) in more.as_object().unwrap() {
                config[key] = value.clone();
            }
            ("tokenizer_config.json", config)
        };
        let map = (
            "special_tokens_map.json",
            json!({"bos_token": "<m>", "pad_token": {"content": "<p>"}}),
        );
        assert_eq!(render(&[]), "||");
        assert_eq!(render(&[config(json!({}))]), "<c>||");
        assert_eq!(render(std::slice::from_ref(&map)), "<m>||<p>");
        assert_eq!(render(&[config(json!({})), map.clone()]), "<m>||<p>");
        let listed = config(json!({"added_tokens_decoder": {}, "eos_token": null}));
        assert_eq!(render(&[listed, map]), "<c>||<p>");
    }
}
