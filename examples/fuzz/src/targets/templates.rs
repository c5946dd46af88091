//! Chat templates: those of models, altered, and such as the grammar allows.

use super::tokenizers;
use crate::{Feed, Input, Target, edit, places};
use locret_models::{ChatTemplate, Date, Message, Tokenizer};
use serde_json::Value;
use std::sync::LazyLock;

pub(crate) const TARGET: Target = Target {
    name: "template",
    ready: || {
        LazyLock::force(&SOURCES);
        LazyLock::force(&TOKENIZER);
    },
    make,
    read,
};

static SOURCES: LazyLock<Vec<String>> = LazyLock::new(|| {
    let golden = places::golden("locret-models/tests/golden/templates/golden.json");
    let golden: Value = serde_json::from_slice(&golden).expect("valid seeds");
    let cases = golden["cases"].as_array().expect("a list");
    let sources = cases.iter().filter_map(|case| case["source"].as_str());
    sources.map(str::to_owned).collect()
});

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(tokenizers::sound);

const WORDS: &[&str] = &[
    "{{",
    "}}",
    "{%",
    "%}",
    "{#",
    "#}",
    "{%-",
    "-%}",
    "{% endfor %}",
    "{% endif %}",
    "{% raw %}",
    "{% set x = x ~ x %}",
    "{% for m in messages %}",
    "{% for i in range(100000) %}",
    "{% macro f(a) %}",
    "{% endmacro %}",
    "{{ f(f) }}",
    "{% set ns = namespace(a=[]) %}",
    "{% set ns.a = ns.a + [ns] %}",
    "{% set ns.a = [ns.a, ns.a] %}",
    "messages",
    "ns",
    "loop",
    "loop.index0",
    "cycler",
    "namespace(",
    "range(",
    "raise_exception('x')",
    "strftime_now('%Y')",
    "dict(",
    "lipsum(",
    "joiner()",
    "m['content']",
    ".content",
    "| tojson",
    "| tojson(indent=100000)",
    "| length",
    "| join('x')",
    "| replace('', 'aa')",
    "| list",
    "| map(attribute='a')",
    "| sort",
    "| reverse",
    "| batch(3)",
    "| indent(100000)",
    "| center(100000)",
    "| unique",
    "| groupby('a')",
    "| pprint",
    "| format(1)",
    "| e",
    "| trim",
    "| default('')",
    "| selectattr('role')",
    "| sum(start=[])",
    "| slice(100000)",
    "| wordwrap(1)",
    "| random",
    "| dictsort",
    "| items",
    "| string",
    "| int",
    "| float",
    ".split('')",
    ".strip()",
    ".format('a')",
    ".join(messages)",
    ".append(x)",
    ".keys()",
    ".items()",
    "'%1000000d' % 1",
    "'{:>1000000}'.format(1)",
    "* 100000",
    "** 100000",
    "// 0",
    "% 0",
    "~",
    "+",
    "-",
    "9223372036854775807",
    "-9223372036854775808",
    "1e308",
    "[::-1]",
    "[0:100000:0]",
    "[-1]",
    "is defined",
    "is mapping",
    "is in messages",
    "not",
    "and",
    "if",
    "else",
    "in",
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    ",",
    ":",
    "'",
    "\"",
    "\\u0000",
    "'a' * 100000",
    "none",
    "true",
    "\n",
];

fn make(feed: &mut Feed<'_>) -> Input {
    let source = match feed.below(3) {
        0 => {
            let seed = &SOURCES[feed.below(SOURCES.len())];
            edit::text(seed, WORDS, feed)
        }
        1 => {
            let mut out = String::new();
            for _ in 0..=feed.below(4) {
                statement(feed, 3, &mut out);
            }
            out
        }
        _ => {
            let words = (0..=feed.below(40)).map(|_| feed.of(WORDS));
            words.collect::<Vec<_>>().join(" ")
        }
    };
    Input {
        bytes: source.into_bytes(),
        kind: 0,
        rest: feed.take(64).to_vec(),
    }
}

/// A statement as the grammar has them.
fn statement(feed: &mut Feed<'_>, depth: usize, out: &mut String) {
    let body = |feed: &mut Feed<'_>, out: &mut String| {
        for _ in 0..feed.below(3) {
            if depth > 0 {
                statement(feed, depth - 1, out);
            }
        }
    };
    match feed.below(6) {
        0 => *out += &format!("{{{{ {} }}}}", expression(feed, 3)),
        1 => {
            *out += &format!("{{% for {} in {} %}}", name(feed), expression(feed, 2));
            body(feed, out);
            *out += "{% endfor %}";
        }
        2 => {
            *out += &format!("{{% if {} %}}", expression(feed, 2));
            body(feed, out);
            *out += "{% else %}";
            body(feed, out);
            *out += "{% endif %}";
        }
        3 => *out += &format!("{{% set {} = {} %}}", name(feed), expression(feed, 3)),
        4 => {
            let name = name(feed);
            *out += &format!("{{% macro {name}(x, y={}) %}}", expression(feed, 1));
            body(feed, out);
            *out += "{% endmacro %}";
        }
        _ => *out += &format!("{{% set ns.{} = {} %}}", name(feed), expression(feed, 2)),
    }
}

fn name(feed: &mut Feed<'_>) -> &'static str {
    feed.of(&["x", "y", "ns", "m", "messages", "loop", "a"])
}

fn expression(feed: &mut Feed<'_>, depth: usize) -> String {
    if depth == 0 {
        return match feed.below(5) {
            0 => name(feed).into(),
            1 => format!("'{}'", feed.text(4).replace(['\'', '\\'], "")),
            2 => (feed.number() as i64).to_string(),
            3 => "1.5".into(),
            _ => feed
                .of(&["true", "none", "[]", "{}", "()", "messages[0]"])
                .into(),
        };
    }
    let inner = |feed: &mut Feed<'_>| expression(feed, depth - 1);
    match feed.below(12) {
        0 => {
            let operator = feed.of(&[
                "+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "and", "or",
            ]);
            format!("({} {operator} {})", inner(feed), inner(feed))
        }
        1 => format!("[{}, {}]", inner(feed), inner(feed)),
        2 => format!("{{{}: {}}}", inner(feed), inner(feed)),
        3 => {
            let filter = feed.of(WORDS);
            match filter.starts_with('|') {
                true => format!("({} {filter})", inner(feed)),
                false => format!("({} | {})", inner(feed), "list"),
            }
        }
        4 => {
            let method = feed.of(WORDS);
            match method.starts_with('.') {
                true => format!("{}{method}", inner(feed)),
                false => format!("{}.{}", inner(feed), name(feed)),
            }
        }
        5 => format!("{}[{}]", inner(feed), inner(feed)),
        6 => format!("{}[{}:{}]", inner(feed), inner(feed), inner(feed)),
        7 => format!("({} if {} else {})", inner(feed), inner(feed), inner(feed)),
        8 => format!("range({})", inner(feed)),
        9 => format!("namespace({}={})", name(feed), inner(feed)),
        10 => format!("{}({})", name(feed), inner(feed)),
        _ => format!(
            "(not {} is {})",
            inner(feed),
            feed.of(&["defined", "none", "string", "mapping", "iterable"])
        ),
    }
}

fn read(input: &Input) {
    let source = String::from_utf8_lossy(&input.bytes);
    if let Ok(template) = ChatTemplate::new(&source, "<s>", "</s>") {
        try_out(&template, &input.rest);
        let dated = template.with_date(Date {
            year: 2024,
            month: 2,
            day: 29,
        });
        try_out(&dated, &input.rest);
    }
}

/// Writes conversations with it, and encodes one.
pub(super) fn try_out(template: &ChatTemplate, rest: &[u8]) {
    let own = String::from_utf8_lossy(rest);
    let messages = [
        Message::new("system", "Be brief."),
        Message::new("user", &*own),
        Message::new("assistant", "<|im_end|>{{ x }}"),
        Message::new("user", " \u{e9} "),
    ];
    let _any = template.render(&messages, true);
    let _any = template.render(&[], false);
    let said = template.render(&messages[1..2], true);
    // What cuts a text into tokens takes some 130 bytes for each of its own, whoever wrote it.
    if said.is_ok_and(|text| text.len() <= 1 << 16) {
        let _any = template.encode(&TOKENIZER, &messages[1..2], true);
    }
}
