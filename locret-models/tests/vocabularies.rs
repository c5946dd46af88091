//! The published vocabularies of Llama 3 and Llama 2 against their reference tokenizers, and the splitting
//! rules of all families against the tokenizers library, on texts in many scripts with code and emoji.

mod common;

use common::{gguf_file::File, golden, json, numbers};
use locret_models::{FetchOptions, Gguf, Pinned, SpecialTokens, Tokenizer, fetch_wheel};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::sync::LazyLock;

/// Llama 3's vocabulary as Meta publishes it (Llama licence: fetched, never part of this crate).
const LLAMA3: Pinned = Pinned {
    package: "llama-models",
    version: "0.3.0",
    wheel_sha256: "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f",
    member: "llama_models/llama3/tokenizer.model",
    member_sha256: "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55",
};

/// Llama 2's, the file that came with the weights.
const LLAMA2: Pinned = Pinned {
    package: "maxtext",
    version: "0.2.5",
    wheel_sha256: "2fe8e4ffc3a06bd06f94daeaaf5fe3ecee748bb6f661c0f426e07e2ca10c9406",
    member: "maxtext/assets/tokenizers/tokenizer.llama2",
    member_sha256: "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347",
};

static TEXTS: LazyLock<Vec<String>> = LazyLock::new(|| {
    let parts = json(&golden("vocabularies").join("fragments.json"));
    let list = |name: &str| -> Vec<String> {
        let items = parts[name].as_array().unwrap().iter();
        items.map(|x| x.as_str().unwrap().to_owned()).collect()
    };
    let (fragments, separators) = (list("fragments"), list("separators"));
    let mut state = 1u64;
    // The rule is in the golden files' script.
    let mut draw = |n: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % n
    };
    let text = |_| {
        let count = 1 + draw(16);
        let mut text = String::new();
        for _ in 0..count {
            text.push_str(&fragments[draw(fragments.len())]);
            text.push_str(&separators[draw(separators.len())]);
        }
        text
    };
    (0..10_000).map(text).collect()
});

static GOLDEN: LazyLock<Value> =
    LazyLock::new(|| json(&golden("vocabularies").join("golden.json")));

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// Compares the ids of all texts with those of the reference.
fn compare(reference: &str, encode: impl Fn(&str) -> Vec<u32>) {
    compare_with(&GOLDEN[reference], reference, encode);
}

fn compare_with(golden: &Value, reference: &str, encode: impl Fn(&str) -> Vec<u32>) {
    let mut hash = Sha256::new();
    let mut total = 0;
    let mut first = golden["first"].as_array().unwrap().iter();
    for text in &*TEXTS {
        let ids = encode(text);
        if let Some(expected) = first.next() {
            assert_eq!(ids, numbers::<u32>(expected), "{reference}: {text:?}");
        }
        hash.update((ids.len() as u32).to_le_bytes());
        for id in &ids {
            hash.update(id.to_le_bytes());
        }
        total += ids.len() as u64;
    }
    assert_eq!(Some(total), golden["total"].as_u64(), "{reference}");
    assert_eq!(hex(hash), golden["sha256"].as_str().unwrap(), "{reference}");
}

/// Every text comes back from its ids, at once and id by id; but `stands_for` is a space.
fn round_trips(tokenizer: &Tokenizer, stands_for: Option<char>) {
    for text in TEXTS.iter().step_by(5) {
        let ids = tokenizer.encode_part(text, SpecialTokens::Plain).unwrap();
        let expected = match stands_for {
            Some(letter) => text.replace(letter, " "),
            None => text.clone(),
        };
        assert_eq!(tokenizer.decode(&ids, true), expected);
        let mut stream = tokenizer.decode_stream(true);
        let mut streamed: String = ids.iter().map(|id| stream.push(*id)).collect();
        streamed.push_str(&stream.finish());
        assert_eq!(streamed, expected);
    }
}

fn tokenizer(pinned: &Pinned) -> Tokenizer {
    let file = fetch_wheel(pinned, &FetchOptions::default(), &|_| {}).unwrap();
    Tokenizer::from_model_file(file).unwrap()
}

#[test]
fn the_texts_are_those_of_the_script() {
    let hash = Sha256::new_with_prefix(TEXTS.join("\0"));
    assert_eq!(hex(hash), GOLDEN["texts"].as_str().unwrap());
}

#[test]
fn llama3_tokenises_as_its_reference() {
    let tokenizer = tokenizer(&LLAMA3);
    assert_eq!(tokenizer.vocab_size(), 128_256);
    compare("llama3", |text| {
        tokenizer.encode(text, SpecialTokens::Plain).unwrap()
    });
    compare("llama3_controls", |text| {
        tokenizer
            .encode_part(text, SpecialTokens::Interpret)
            .unwrap()
    });
    round_trips(&tokenizer, None);
    // <|end_of_text|>, <|eom_id|>, <|eot_id|>
    assert_eq!(tokenizer.end_of_turn(&[]), [128_001, 128_008, 128_009]);
}

#[test]
fn llama2_tokenises_as_its_reference() {
    let tokenizer = tokenizer(&LLAMA2);
    assert_eq!(tokenizer.vocab_size(), 32_000);
    compare("llama2", |text| {
        tokenizer.encode(text, SpecialTokens::Plain).unwrap()
    });
    // The format writes spaces as U+2581 and cannot tell them apart when it decodes.
    round_trips(&tokenizer, Some('\u{2581}'));
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(1), Some(2)));
}

#[test]
fn a_folder_may_have_either_kind_of_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = fetch_wheel(&LLAMA2, &FetchOptions::default(), &|_| {}).unwrap();
    std::fs::copy(file, dir.path().join("tokenizer.model")).unwrap();
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!(tokenizer.vocab_size(), 32_000);
    std::fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    assert!(Tokenizer::from_dir(dir.path()).is_err());
}

#[test]
fn texts_are_split_as_the_families_do() {
    let folder = golden("splits");
    let golden = json(&folder.join("golden.json"));
    let hash = Sha256::new_with_prefix(TEXTS.join("\0"));
    assert_eq!(hex(hash), golden["texts"].as_str().unwrap());
    let file = Gguf::open(folder.join("vocabulary.gguf")).unwrap();
    let strings = |key: &str| file.get_strings(key).unwrap().unwrap();
    let rules = golden["rules"].as_object().unwrap();
    assert_eq!(rules.len(), 6);
    for (rule, golden) in rules {
        let encode = |tokenizer: &Tokenizer, text: &str| {
            tokenizer.encode(text, SpecialTokens::Plain).unwrap()
        };
        // The same vocabulary in a GGUF file that names the rule.
        let mut renamed = File::default();
        for (key, value) in file.metadata() {
            renamed = match key.as_str() {
                "tokenizer.ggml.pre" => {
                    renamed.meta(key, locret_models::Value::String(rule.clone()))
                }
                _ => renamed.meta(key, value.clone()),
            };
        }
        let renamed = renamed.write();
        let tokenizer = Tokenizer::from_gguf(&Gguf::open(renamed.path()).unwrap()).unwrap();
        compare_with(golden, rule, |text| encode(&tokenizer, text));
        // And in a tokenizer.json that has it.
        let mut whole = golden["tokenizer"].clone();
        let tokens = strings("tokenizer.ggml.tokens").iter().enumerate();
        let vocab = tokens.map(|(id, token)| (token.clone(), id.into()));
        whole["model"]["vocab"] = Value::Object(vocab.collect());
        whole["model"]["merges"] = strings("tokenizer.ggml.merges").into();
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer.json"), whole.to_string()).unwrap();
        let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
        compare_with(golden, rule, |text| encode(&tokenizer, text));
    }
}
