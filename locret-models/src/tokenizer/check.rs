//! What a `tokenizer.json` may ask for.
//!
//! The library that reads these files trusts them: it panics on some, and takes any time and memory on
//! others. So everything in a file is looked at before it gets there: parts of kinds that causal
//! language models use, whose numbers are sane, whose names refer to something, that make only so much
//! more of a text, and whose regular expressions do not run away.

use super::{MAX_ID, MAX_TOKEN};
use fancy_regex::Expr;
use serde_json::{Map, Value as Json};

/// Parts of one kind, nested or not.
const PARTS: usize = 64;
/// How deep sequences of parts may be nested.
const DEPTH: usize = 4;
/// How many times longer replacements may make a text, all of them together.
const GROWTH: usize = 32;
/// Bytes of a prefix.
const PREFIX: usize = 64;
/// Tokens that may be put around a text.
const AROUND: usize = 64;
/// Bytes of a regular expression.
const PATTERN: usize = 16 << 10;
/// Its size with repetitions written out.
const WEIGHT: usize = 4096;
/// Repetitions without an end that one match may go through, where it may have to be tried again.
const LOOPS: usize = 4;

type Checked<T = ()> = Result<T, String>;

/// A file's tokenizer, as the library may read it.
pub(super) fn check(file: &mut Json) -> Checked {
    let Json::Object(file) = file else {
        return Err("expected an object".into());
    };
    // A prompt is never cut or filled up in silence.
    file.remove("truncation");
    file.remove("padding");
    model(file.get("model").unwrap_or(&Json::Null))?;
    added_tokens(file.get("added_tokens").unwrap_or(&Json::Null))?;
    let mut parts = PARTS;
    let part = |key: &str| file.get(key).filter(|value| !value.is_null());
    if let Some(part) = part("normalizer") {
        let mut growth = 1;
        normalizer(part, DEPTH, &mut parts, &mut growth)?;
    }
    if let Some(part) = part("pre_tokenizer") {
        pre_tokenizer(part, DEPTH, &mut parts)?;
    }
    if let Some(part) = part("post_processor") {
        let mut around = AROUND;
        post_processor(part, DEPTH, &mut parts, &mut around)?;
    }
    if let Some(part) = part("decoder") {
        decoder(part, DEPTH, &mut parts)?;
    }
    Ok(())
}

fn object(value: &Json) -> Checked<&Map<String, Json>> {
    value
        .as_object()
        .ok_or_else(|| format!("expected an object, found {}", excerpt(value)))
}

/// The kind of a part, which counts as one.
fn kind<'a>(part: &'a Json, left: &mut usize) -> Checked<&'a str> {
    *left = left
        .checked_sub(1)
        .ok_or_else(|| format!("more than {PARTS} parts"))?;
    let kind = object(part)?.get("type").and_then(Json::as_str);
    kind.ok_or_else(|| format!("a part without a type: {}", excerpt(part)))
}

/// The parts of a sequence.
fn sequence<'a>(part: &'a Json, key: &str, depth: usize) -> Checked<(&'a [Json], usize)> {
    let depth = depth
        .checked_sub(1)
        .ok_or("sequences that are nested too deep")?;
    match part.get(key).and_then(Json::as_array) {
        Some(parts) => Ok((parts, depth)),
        None => Err(format!("a sequence without {key}")),
    }
}

fn text<'a>(part: &'a Json, key: &str) -> Checked<&'a str> {
    let found = part.get(key).and_then(Json::as_str);
    found.ok_or_else(|| format!("{key}: expected a string in {}", excerpt(part)))
}

fn id(value: &Json) -> Checked<u32> {
    let found = value.as_u64().and_then(|id| u32::try_from(id).ok());
    found.filter(|id| *id <= MAX_ID).ok_or_else(|| {
        format!(
            "token ids up to {MAX_ID} are expected, found {}",
            excerpt(value)
        )
    })
}

fn model(model: &Json) -> Checked {
    let fields = object(model)?;
    let empty = |key: &str| match fields.get(key) {
        None | Some(Json::Null) => Ok(()),
        Some(Json::String(text)) if text.is_empty() => Ok(()),
        Some(other) => Err(format!("{key} {} is not supported", excerpt(other))),
    };
    // Files from before 2023 leave it out.
    match fields.get("type").map_or(Some("BPE"), Json::as_str) {
        Some("BPE") => {
            empty("continuing_subword_prefix")?;
            empty("end_of_word_suffix")?;
            match fields.get("dropout") {
                None | Some(Json::Null) => {}
                Some(chance) if chance.as_f64() == Some(0.0) => {}
                Some(other) => return Err(format!("dropout {} is not supported", excerpt(other))),
            }
            let vocab = vocabulary(fields)?;
            let known = |token: &str| vocab.contains_key(token);
            if let Some(Json::String(unknown)) = fields.get("unk_token")
                && !known(unknown)
            {
                return Err(format!("the unknown token {} is none", quoted(unknown)));
            }
            let merges = fields.get("merges").and_then(Json::as_array);
            let merges = merges.ok_or("merges: expected a list")?;
            let mut merged = String::new();
            for merge in merges {
                let pair = match merge {
                    Json::String(line) if line.starts_with("#version") => continue,
                    Json::String(line) => line.split_once(' '),
                    Json::Array(pair) => match &pair[..] {
                        [Json::String(a), Json::String(b)] => Some((a.as_str(), b.as_str())),
                        _ => None,
                    },
                    _ => None,
                };
                merged.clear();
                let found = pair.filter(|(a, b)| {
                    merged.push_str(a);
                    merged.push_str(b);
                    known(a) && known(b) && known(&merged)
                });
                if found.is_none() {
                    return Err(format!(
                        "the merge {} is not one of two tokens to a third",
                        excerpt(merge)
                    ));
                }
            }
            Ok(())
        }
        Some("WordLevel") => {
            let vocab = vocabulary(fields)?;
            match fields.get("unk_token").and_then(Json::as_str) {
                Some(unknown) if vocab.contains_key(unknown) => Ok(()),
                _ => Err("the unknown token is none".into()),
            }
        }
        Some("Unigram") => {
            let pieces = fields.get("vocab").and_then(Json::as_array);
            let pieces = pieces.ok_or("vocab: expected a list")?;
            if pieces.is_empty() || pieces.len() > MAX_ID as usize {
                return Err(format!("{} pieces", pieces.len()));
            }
            for piece in pieces {
                let right = match piece.as_array().map(Vec::as_slice) {
                    Some([Json::String(text), score]) => {
                        !text.is_empty()
                            && text.len() <= MAX_TOKEN
                            && score.as_f64().is_some_and(f64::is_finite)
                    }
                    _ => false,
                };
                if !right {
                    return Err(format!(
                        "expected a piece and its score, found {}",
                        excerpt(piece)
                    ));
                }
            }
            match fields.get("unk_id") {
                None | Some(Json::Null) => Ok(()),
                Some(unknown) if unknown.as_u64().is_some_and(|id| id < pieces.len() as u64) => {
                    Ok(())
                }
                Some(other) => Err(format!("the unknown token's id {} is none", excerpt(other))),
            }
        }
        other => Err(format!(
            "the model {other:?} is not supported; BPE, Unigram and WordLevel are"
        )),
    }
}

fn vocabulary(fields: &Map<String, Json>) -> Checked<&Map<String, Json>> {
    let vocab = fields.get("vocab").and_then(Json::as_object);
    let vocab = vocab.ok_or("vocab: expected an object")?;
    for value in vocab.values() {
        id(value)?;
    }
    Ok(vocab)
}

fn added_tokens(tokens: &Json) -> Checked {
    let tokens = match tokens {
        Json::Null => return Ok(()),
        Json::Array(tokens) if tokens.len() <= MAX_ID as usize => tokens,
        _ => return Err("added_tokens: expected a list".into()),
    };
    for token in tokens {
        id(token.get("id").unwrap_or(&Json::Null))?;
        let content = text(token, "content")?;
        if content.is_empty() || content.len() > MAX_TOKEN {
            return Err(format!(
                "an added token of 1 to {MAX_TOKEN} bytes was expected, found {}",
                content.len()
            ));
        }
    }
    Ok(())
}

fn normalizer(part: &Json, depth: usize, left: &mut usize, growth: &mut usize) -> Checked {
    match kind(part, left)? {
        "Sequence" => {
            let (parts, depth) = sequence(part, "normalizers", depth)?;
            for part in parts {
                normalizer(part, depth, left, growth)?;
            }
            Ok(())
        }
        "Prepend" => match text(part, "prepend")?.len() {
            1..=PREFIX => Ok(()),
            other => Err(format!("a prefix of {other} bytes")),
        },
        "Replace" => {
            let least = pattern(part)?;
            if least == 0 {
                return Err("a replacement of nothing".into());
            }
            let times = text(part, "content")?.len().div_ceil(least).max(1);
            *growth = growth.saturating_mul(times);
            if *growth > GROWTH {
                return Err(format!(
                    "replacements that make a text more than {GROWTH} times as long"
                ));
            }
            Ok(())
        }
        "NFC" | "NFD" | "NFKC" | "NFKD" | "Nmt" | "Lowercase" | "Strip" | "StripAccents"
        | "ByteLevel" | "Bert" | "BertNormalizer" => Ok(()),
        other => Err(format!("the normalizer {} is not supported", quoted(other))),
    }
}

fn pre_tokenizer(part: &Json, depth: usize, left: &mut usize) -> Checked {
    match kind(part, left)? {
        "Sequence" => {
            let (parts, depth) = sequence(part, "pretokenizers", depth)?;
            for part in parts {
                pre_tokenizer(part, depth, left)?;
            }
            Ok(())
        }
        "Split" => {
            if let Some(Json::String(text)) = part.get("pattern").and_then(|p| p.get("String"))
                && text.is_empty()
            {
                return Err("a split at nothing".into());
            }
            pattern(part).map(drop)
        }
        "FixedLength" => match part.get("length").map_or(Some(5), Json::as_u64) {
            Some(1..) => Ok(()),
            _ => Err("pieces of at least one character were expected".into()),
        },
        "ByteLevel" | "Digits" | "Punctuation" | "Whitespace" | "WhitespaceSplit" | "Metaspace"
        | "UnicodeScripts" | "BertPreTokenizer" | "Delimiter" | "CharDelimiterSplit" => Ok(()),
        other => Err(format!(
            "the pre-tokenizer {} is not supported",
            quoted(other)
        )),
    }
}

fn post_processor(part: &Json, depth: usize, left: &mut usize, around: &mut usize) -> Checked {
    let mut more = |n: usize| {
        *around = around
            .checked_sub(n)
            .ok_or_else(|| format!("more than {AROUND} tokens around a text"))?;
        Ok::<_, String>(())
    };
    match kind(part, left)? {
        "Sequence" => {
            let (parts, depth) = sequence(part, "processors", depth)?;
            for part in parts {
                post_processor(part, depth, left, around)?;
            }
            Ok(())
        }
        "ByteLevel" => Ok(()),
        "BertProcessing" | "RobertaProcessing" => {
            for key in ["sep", "cls"] {
                let pair = part.get(key).and_then(Json::as_array);
                match pair.map(Vec::as_slice) {
                    Some([Json::String(_), value]) => id(value)?,
                    _ => return Err(format!("{key}: expected a token and its id")),
                };
                more(1)?;
            }
            Ok(())
        }
        "TemplateProcessing" => {
            let none = Map::new();
            let special = part.get("special_tokens").and_then(Json::as_object);
            let special = special.unwrap_or(&none);
            for (name, token) in special {
                let list = |key: &str| {
                    let found = token.get(key).and_then(Json::as_array);
                    found.ok_or_else(|| format!("{}: expected {key}", quoted(name)))
                };
                let (ids, tokens) = (list("ids")?, list("tokens")?);
                if ids.len() != tokens.len() || ids.len() > AROUND {
                    return Err(format!("{}: {} ids", quoted(name), ids.len()));
                }
                ids.iter().try_for_each(|value| id(value).map(drop))?;
            }
            let pieces = part.get("single").and_then(Json::as_array);
            let pieces = pieces.ok_or("single: expected a list")?;
            let mut texts = 0;
            for piece in pieces {
                let sequence = piece.get("Sequence").and_then(|s| s.get("id"));
                let token = piece.get("SpecialToken").and_then(|s| s.get("id"));
                match (sequence, token.and_then(Json::as_str)) {
                    (Some(sequence), None) if sequence == "A" => texts += 1,
                    (None, Some(name)) => {
                        let ids = special.get(name).and_then(|token| token.get("ids"));
                        let ids = ids.and_then(Json::as_array);
                        let ids = ids.ok_or_else(|| format!("there is no {}", quoted(name)))?;
                        more(ids.len().max(1))?;
                    }
                    _ => return Err(format!("an unknown piece {}", excerpt(piece))),
                }
            }
            match texts {
                1 => Ok(()),
                n => Err(format!("a template that has the text {n} times")),
            }
        }
        other => Err(format!(
            "the post-processor {} is not supported",
            quoted(other)
        )),
    }
}

fn decoder(part: &Json, depth: usize, left: &mut usize) -> Checked {
    match kind(part, left)? {
        "Sequence" => {
            let (parts, depth) = sequence(part, "decoders", depth)?;
            for part in parts {
                decoder(part, depth, left)?;
            }
            Ok(())
        }
        "Replace" => pattern(part).map(drop),
        "ByteLevel" | "Metaspace" | "Strip" | "ByteFallback" | "Fuse" => Ok(()),
        other => Err(format!(
            "the decoder {} is not supported; byte-level and SentencePiece ones are",
            quoted(other)
        )),
    }
}

/// The pattern of a part; how many bytes it matches at least.
fn pattern(part: &Json) -> Checked<usize> {
    let pattern = part.get("pattern").unwrap_or(&Json::Null);
    if let Some(text) = pattern.get("String").and_then(Json::as_str) {
        return match text.len() {
            0..=PATTERN => Ok(text.len()),
            more => Err(format!("a pattern of {more} bytes")),
        };
    }
    let Some(text) = pattern.get("Regex").and_then(Json::as_str) else {
        return Err(format!("expected a pattern, found {}", excerpt(pattern)));
    };
    let refuse = |why: &str| format!("the regular expression {}: {why}", quoted(text));
    if text.len() > PATTERN {
        return Err(refuse("too long"));
    }
    let tree = Expr::parse_tree(text).map_err(|e| refuse(&e.to_string()))?;
    let shape = Shape::of(&tree.expr).map_err(|why| refuse(&why))?;
    if shape.weight > WEIGHT {
        return Err(refuse("too many repetitions"));
    }
    // Without looking around, matching takes linear time whatever the expression is.
    if shape.looks && (shape.nested || shape.loops > LOOPS) {
        return Err(refuse("it may take too long to match"));
    }
    Ok(shape.least)
}

/// What is to be known of a regular expression.
#[derive(Debug, Clone, Copy, Default)]
struct Shape {
    /// Characters that it matches at least, and at most where that is bounded.
    least: usize,
    most: Option<usize>,
    /// Its size, repetitions written out.
    weight: usize,
    /// It may match one text in several ways.
    branches: bool,
    /// Repetitions without an end, one after the other.
    loops: usize,
    /// One of them in another.
    nested: bool,
    /// It looks at what it does not match.
    looks: bool,
}

impl Shape {
    fn fixed(size: usize) -> Self {
        Self {
            least: size,
            most: Some(size),
            weight: size.max(1),
            ..Self::default()
        }
    }

    fn of(expr: &Expr) -> Checked<Self> {
        Ok(match expr {
            Expr::Empty | Expr::Assertion(_) => Self::fixed(0),
            Expr::Any { .. } => Self::fixed(1),
            Expr::Literal { val, .. } => Self::fixed(val.chars().count()),
            Expr::Delegate { size, .. } => Self::fixed(*size),
            Expr::Group(inner) => Self::of(inner)?,
            Expr::AtomicGroup(inner) => Self {
                looks: true,
                ..Self::of(inner)?
            },
            Expr::LookAround(inner, _) => Self {
                least: 0,
                most: Some(0),
                looks: true,
                ..Self::of(inner)?
            },
            Expr::Concat(parts) => {
                let mut all = Self::fixed(0);
                for part in parts {
                    let part = Self::of(part)?;
                    all.least = all.least.saturating_add(part.least);
                    all.most = all.most.zip(part.most).and_then(|(a, b)| a.checked_add(b));
                    all.weight = all.weight.saturating_add(part.weight);
                    all.loops += part.loops;
                    all.nested |= part.nested;
                    all.looks |= part.looks;
                    all.branches |= part.branches;
                }
                all
            }
            Expr::Alt(parts) => {
                let mut all = Self {
                    least: usize::MAX,
                    most: Some(0),
                    branches: parts.len() > 1,
                    ..Self::default()
                };
                for part in parts {
                    let part = Self::of(part)?;
                    all.least = all.least.min(part.least);
                    all.most = all.most.zip(part.most).map(|(a, b)| a.max(b));
                    all.weight = all.weight.saturating_add(part.weight);
                    all.branches |= part.branches;
                    all.loops = all.loops.max(part.loops);
                    all.nested |= part.nested;
                    all.looks |= part.looks;
                }
                all
            }
            Expr::Repeat { child, lo, hi, .. } => {
                let inner = Self::of(child)?;
                let endless = *hi == usize::MAX;
                let times = if endless { (*lo).max(1) } else { *hi };
                Self {
                    least: inner.least.saturating_mul(*lo),
                    most: inner
                        .most
                        .filter(|_| !endless)
                        .and_then(|n| n.checked_mul(*hi)),
                    weight: inner.weight.saturating_mul(times.max(1)),
                    loops: inner.loops + usize::from(endless || *hi > 16),
                    nested: inner.nested
                        || ((inner.branches || inner.least == 0) && (endless || *hi > 16)),
                    branches: inner.branches || lo != hi,
                    looks: inner.looks,
                }
            }
            _ => {
                return Err(
                    "only classes, repetitions, groups and looking around are supported".into(),
                );
            }
        })
    }
}

fn excerpt(value: &Json) -> String {
    // A value may be huge; what it begins with is enough.
    match value {
        Json::String(text) => quoted(text),
        Json::Array(items) => format!("a list of {}", items.len()),
        Json::Object(_) => "an object".into(),
        other => other.to_string(),
    }
}

fn quoted(text: &str) -> String {
    let mut shown: String = text.chars().take(60).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    format!("{shown:?}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn file() -> Json {
        json!({
            "version": "1.0", "added_tokens": [],
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
        })
    }

    #[test]
    fn what_published_tokenizers_use() {
        // GPT-2, Llama 3, o200k, DeepSeek, BLOOM, groups of three digits.
        let patterns = [
            r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            r" ?[^(\s|[.,!?…。，、।۔،])]+",
            r"(?=(\d{3})+(?!\d))",
            r"\p{N}",
            r"[0-9][0-9][0-9]",
        ];
        for pattern in patterns {
            let mut file = file();
            file["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
                {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}
            ]});
            assert_eq!(check(&mut file), Ok(()), "{pattern}");
        }
        let mut file = file();
        file["normalizer"] = json!({"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u{2581}"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"}
        ]});
        file["post_processor"] = json!({"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}});
        file["decoder"] = json!({"type": "Sequence", "decoders": [{"type": "Fuse"}]});
        assert_eq!(check(&mut file), Ok(()));
    }

    #[test]
    fn what_would_harm() {
        let replace = |pattern: Json, content: &str| json!({"type": "Replace", "pattern": pattern, "content": content});
        let template = |single: Json, special: Json| json!({"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": special});
        let text = json!({"Sequence": {"id": "A", "type_id": 0}});
        let many: Vec<u32> = vec![0; 1_000_000];
        let names: Vec<String> = vec![String::new(); 1_000_000];
        let mut deep = json!({"type": "NFC"});
        for _ in 0..20 {
            deep = json!({"type": "Sequence", "normalizers": [deep]});
        }
        let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        for (key, part) in [
            (
                "normalizer",
                json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
            ),
            ("normalizer", json!({"prepend": "a"})),
            ("normalizer", json!({"type": "Prepend", "prepend": ""})),
            (
                "normalizer",
                json!({"type": "Prepend", "prepend": "a".repeat(100_000)}),
            ),
            ("normalizer", replace(json!({"String": ""}), "b")),
            ("normalizer", replace(json!({"Regex": ""}), "b")),
            ("normalizer", replace(json!({"Regex": "a*"}), "b")),
            ("normalizer", replace(json!({"Regex": "(?=a)"}), "b")),
            (
                "normalizer",
                replace(json!({"String": "a"}), &"a".repeat(1000)),
            ),
            (
                "normalizer",
                json!({"type": "Sequence", "normalizers": vec![replace(json!({"String": "a"}), "aa"); 30]}),
            ),
            (
                "normalizer",
                json!({"type": "Sequence", "normalizers": vec![json!({"type": "NFC"}); 1000]}),
            ),
            ("normalizer", deep),
            ("pre_tokenizer", json!({"type": "FixedLength", "length": 0})),
            (
                "pre_tokenizer",
                json!({"type": "FixedLength", "length": -1}),
            ),
            (
                "pre_tokenizer",
                json!({"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": false}),
            ),
            ("pre_tokenizer", split("(a*)*(?!b)")),
            ("pre_tokenizer", split("(a|a)+(?!b)")),
            ("pre_tokenizer", split(r"(a+)\1")),
            ("pre_tokenizer", split("((a{100}){100}){100}")),
            ("pre_tokenizer", split("a*a*a*a*a*a*(?!b)")),
            ("pre_tokenizer", split("(")),
            ("pre_tokenizer", split(&"(".repeat(10_000))),
            (
                "post_processor",
                template(
                    json!([{"SpecialToken": {"id": "<x>", "type_id": 0}}, text]),
                    json!({}),
                ),
            ),
            (
                "post_processor",
                template(json!([{"Sequence": {"id": "B", "type_id": 0}}]), json!({})),
            ),
            (
                "post_processor",
                template(json!(vec![text.clone(); 1000]), json!({})),
            ),
            ("post_processor", template(json!([]), json!({}))),
            (
                "post_processor",
                template(
                    json!([{"SpecialToken": {"id": "x", "type_id": 0}}, text]),
                    json!({"x": {"id": "x", "ids": many, "tokens": names}}),
                ),
            ),
            (
                "post_processor",
                json!({"type": "RobertaProcessing", "sep": ["a", -1], "cls": ["b", 1]}),
            ),
            ("decoder", json!({"type": "WordPiece", "prefix": "##"})),
            ("added_tokens", json!([{"id": 5, "content": ""}])),
            (
                "added_tokens",
                json!([{"id": 4_000_000_000u64, "content": "x"}]),
            ),
            ("added_tokens", json!(5)),
        ] {
            let mut file = file();
            file[key] = part.clone();
            assert!(check(&mut file).is_err(), "{key}: {}", excerpt(&part));
        }
        for (key, value) in [
            ("type", json!("WordPiece")),
            ("continuing_subword_prefix", json!("##")),
            ("end_of_word_suffix", json!("</w>")),
            ("dropout", json!(0.5)),
            ("unk_token", json!("none")),
            ("vocab", json!({"a": 4_000_000_000u64})),
            ("vocab", json!([["a", 0.0]])),
            ("merges", json!(["a"])),
            ("merges", json!(["a c"])),
            ("merges", json!([["b", "a"]])),
            ("merges", json!([["a", "b", "ab"]])),
            ("merges", json!({})),
        ] {
            let mut file = file();
            file["model"][key] = value.clone();
            assert!(check(&mut file).is_err(), "{key}: {value}");
        }
        let unigram = |vocab: Json, unknown: Json| {
            let mut file = file();
            file["model"] = json!({"type": "Unigram", "vocab": vocab, "unk_id": unknown});
            check(&mut file)
        };
        assert_eq!(unigram(json!([["a", -1.0]]), json!(0)), Ok(()));
        for (vocab, unknown) in [
            (json!([["", -1.0]]), json!(0)),
            (json!([["a", null]]), json!(0)),
            (json!([["a", -1.0]]), json!(1)),
            (json!([]), json!(null)),
        ] {
            assert!(unigram(vocab.clone(), unknown).is_err(), "{vocab}");
        }
    }
}
