//! Tokenizers: `tokenizer.json` with what may stand beside it, SentencePiece's models, and ranks.

use crate::{Feed, Input, Target, edit, places};
use locret_models::{SpecialTokens, Tokenizer};
use serde_json::{Value, json};
use std::sync::LazyLock;

pub(crate) const JSON: Target = Target {
    name: "tokenizer",
    ready: || {
        LazyLock::force(&SEEDS);
        LazyLock::force(&PARTS);
    },
    make: make_json,
    read: read_json,
};

pub(crate) const MODEL: Target = Target {
    name: "tokenizer-model",
    ready: || {
        LazyLock::force(&MODELS);
    },
    make: make_model,
    read: read_model,
};

static SEEDS: LazyLock<Vec<Value>> = LazyLock::new(|| {
    let golden = places::golden("locret-models/tests/golden/sentencepiece/tokenizer.json");
    let golden = serde_json::from_slice(&golden).expect("a valid seed");
    let bytes = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [
            { "id": 7, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
              "normalized": false, "special": true },
            { "id": 8, "content": "<|im_end|>", "single_word": false, "lstrip": true, "rstrip": true,
              "normalized": true, "special": false } ],
        "normalizer": { "type": "NFC" },
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": [
            { "type": "Split", "pattern": { "Regex": "(?i:'s|'t)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|\\s+" },
              "behavior": "Isolated", "invert": false },
            { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false } ] },
        "post_processor": { "type": "TemplateProcessing",
            "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
            "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
            "special_tokens": { "<s>": { "id": "<s>", "ids": [7], "tokens": ["<s>"] } } },
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": { "a": 0, "b": 1, "ab": 2, "c": 3, "abc": 4, "Ġ": 5, "Ġa": 6 },
            "merges": [["a", "b"], ["ab", "c"], ["Ġ", "a"]] } });
    let mut unigram: Value = bytes.clone();
    unigram["model"] = json!({ "type": "Unigram", "unk_id": 0, "byte_fallback": true,
        "vocab": [["<unk>", 0.0], ["a", -1.0], ["b", -2.0], ["ab", -1.5], ["\u{2581}", -3.0]] });
    unigram["decoder"] = json!({ "type": "Metaspace", "replacement": "\u{2581}",
        "prepend_scheme": "always", "split": true });
    unigram["pre_tokenizer"] = unigram["decoder"].clone();
    vec![bytes, unigram, golden]
});

/// Parts that such files may have.
static PARTS: LazyLock<Vec<Value>> = LazyLock::new(|| {
    vec![
        json!("added_tokens"),
        json!("normalizer"),
        json!("merges"),
        json!("unk_token"),
        json!({ "type": "Replace", "pattern": { "String": "" }, "content": "aaaaaaaa" }),
        json!({ "type": "Replace", "pattern": { "Regex": "(a*)*$" }, "content": "a" }),
        json!({ "type": "Replace", "pattern": { "Regex": "" }, "content": "xx" }),
        json!({ "type": "Prepend", "prepend": "\u{2581}" }),
        json!({ "type": "Strip", "strip_left": true, "strip_right": true }),
        json!({ "type": "NFKD" }),
        json!({ "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
            "strip_accents": null, "lowercase": true }),
        json!({ "type": "Precompiled", "precompiled_charsmap": "AAAAAAAAAAA=" }),
        json!({ "type": "Sequence", "normalizers": [] }),
        json!({ "type": "Split", "pattern": { "Regex": "(?=(a+))\\1b|(?<!x)y{1,1000}" },
            "behavior": "MergedWithNext", "invert": true }),
        json!({ "type": "FixedLength", "length": 0 }),
        json!({ "type": "UnicodeScripts" }),
        json!({ "type": "Digits", "individual_digits": true }),
        json!({ "type": "Punctuation", "behavior": "Contiguous" }),
        json!({ "type": "WordPiece", "prefix": "##", "cleanup": true }),
        json!({ "type": "BPEDecoder", "suffix": "</w>" }),
        json!({ "type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": true }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
        json!({ "type": "WordLevel", "vocab": { "a": 0 }, "unk_token": "a" }),
        json!({ "type": "WordPiece", "vocab": { "a": 0 }, "unk_token": "a",
            "continuing_subword_prefix": "##", "max_input_chars_per_word": 100 }),
        json!({ "max_length": 0, "strategy": "LongestFirst", "stride": 5, "direction": "Right" }),
        json!({ "strategy": { "Fixed": 1_000_000_000 }, "direction": "Left", "pad_to_multiple_of": 0,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "a" }),
    ]
});

fn make_json(feed: &mut Feed<'_>) -> Input {
    let seed = SEEDS[feed.below(SEEDS.len())].clone();
    let bytes = edit::json(seed, &PARTS, feed).to_string().into_bytes();
    Input {
        bytes,
        kind: 0,
        rest: feed.take(64).to_vec(),
    }
}

fn read_json(input: &Input) {
    let folder = places::folder("tokenizer");
    places::write(&folder.join("tokenizer.json"), &input.bytes);
    if let Ok(tokenizer) = Tokenizer::from_dir(&folder) {
        try_out(&tokenizer, &input.rest);
    }
}

/// One that nothing is wrong with.
pub(super) fn sound() -> Tokenizer {
    let folder = places::folder("sound");
    places::write(
        &folder.join("tokenizer.json"),
        SEEDS[0].to_string().as_bytes(),
    );
    Tokenizer::from_dir(&folder).expect("a valid seed")
}

/// Encodes and decodes with it.
pub(super) fn try_out(tokenizer: &Tokenizer, rest: &[u8]) {
    let own = String::from_utf8_lossy(rest);
    let words = "Hello <s> abc\u{2581}ab  <|im_end|>\n it's 12345 \u{e9}\u{1f600} aaaaaaaaaaaaaaaa";
    for text in [&*own, words, ""] {
        for special in [SpecialTokens::Plain, SpecialTokens::Interpret] {
            let Ok(ids) = tokenizer.encode(text, special) else {
                continue;
            };
            assert!(
                ids.iter().all(|id| (*id as usize) < tokenizer.vocab_size()),
                "ids beyond the vocabulary"
            );
            let decoded = tokenizer.decode(&ids, false);
            let mut stream = tokenizer.decode_stream(false);
            let pieces: String = ids.iter().map(|id| stream.push(*id)).collect();
            assert_eq!(pieces + &stream.finish(), decoded);
        }
    }
    let ids = rest.chunks(4).map(|b| {
        let mut id = [0; 4];
        id[..b.len()].copy_from_slice(b);
        u32::from_le_bytes(id)
    });
    let ids: Vec<u32> = ids.collect();
    let _any = tokenizer.decode(&ids, true);
    let _any = tokenizer.end_of_turn(&ids);
}

/// A SentencePiece model of few pieces, and ranks.
static MODELS: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let mut model = Vec::new();
    let mut pieces: Vec<(String, f32, u8)> = vec![
        ("<unk>".into(), 0.0, 2),
        ("<s>".into(), 0.0, 3),
        ("</s>".into(), 0.0, 3),
    ];
    pieces.extend((0..256).map(|byte| (format!("<0x{byte:02X}>"), 0.0, 6)));
    for (i, piece) in ["\u{2581}", "a", "b", "ab", "\u{2581}a", "he", "l"]
        .iter()
        .enumerate()
    {
        pieces.push(((*piece).into(), -(i as f32), 1));
    }
    for (text, score, kind) in pieces {
        let mut piece = vec![0x0a, text.len() as u8];
        piece.extend(text.as_bytes());
        piece.push(0x15);
        piece.extend(score.to_le_bytes());
        piece.extend([0x18, kind]);
        model.extend([0x0a, piece.len() as u8]);
        model.extend(piece);
    }
    // The trainer's settings: its kind is BPE, and bytes stand in for what is unknown.
    model.extend([0x12, 5, 0x18, 2, 0x98, 0x02, 1]);
    // The normaliser's: spaces stay.
    model.extend([0x1a, 2, 0x20, 0]);
    let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut ranks = String::new();
    for byte in 0..=255u8 {
        let digits = [
            alphabet[usize::from(byte >> 2)],
            alphabet[usize::from(byte & 3) << 4],
        ];
        ranks += &format!("{}{}== {byte}\n", digits[0] as char, digits[1] as char);
    }
    ranks += "YWI= 256\nYWJj 257\n";
    vec![model, ranks.into_bytes()]
});

fn make_model(feed: &mut Feed<'_>) -> Input {
    let seed = &MODELS[feed.below(MODELS.len())];
    // The settings at the end, two bytes each, and as many of the pieces before them.
    let end = seed.len();
    let fields: Vec<_> = (1..12).map(|i| end - i..end - i + 1).collect();
    let bytes = edit::bytes(seed, &fields, feed);
    Input {
        bytes,
        kind: 0,
        rest: feed.take(64).to_vec(),
    }
}

fn read_model(input: &Input) {
    let path = places::path("tokenizer.model");
    places::write(&path, &input.bytes);
    if let Ok(tokenizer) = Tokenizer::from_model_file(&path) {
        try_out(&tokenizer, &input.rest);
    }
}
