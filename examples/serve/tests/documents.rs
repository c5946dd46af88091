//! Commands that the documents give for the examples and the server: they exist, and read these flags.

use clap::Parser;
use locret_examples::cli::{
    ablation, benchmarks, budget_table, evaluate, generate, long_shapes, oracle, plan, q_filters,
    rank_heads, soak, trace, train_heads,
};
use locret_serve::Args;
use std::{
    fs,
    path::{Path, PathBuf},
};

fn documents() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut all: Vec<PathBuf> = fs::read_dir(root.join("docs"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "md"))
        .collect();
    all.extend(
        [
            "README.md",
            "CONTRIBUTING.md",
            "examples/README.md",
            "examples/assets/README.md",
            "examples/serve/README.md",
        ]
        .map(|name| root.join(name)),
    );
    all
}

/// Lines of the blocks of code; what is continued on the next one is one.
fn lines(text: &str) -> Vec<String> {
    let text = text.replace("\\\n", " ");
    let mut inside = false;
    text.lines()
        .filter(|line| {
            let fence = line.starts_with("```");
            inside ^= fence;
            inside && !fence
        })
        .map(str::to_owned)
        .collect()
}

/// Words as a shell has them, with double quotes.
fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    for c in line.chars() {
        match c {
            '"' => quoted = !quoted,
            ' ' if !quoted => words.push(String::new()),
            c => words.last_mut().unwrap().push(c),
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

/// The program of a command, and its flags.
fn program(line: &str) -> Option<(String, Vec<String>)> {
    let words = words(line);
    if let Some(name) = words.first()?.strip_prefix("target/release/examples/") {
        return Some((name.to_owned(), words[1..].to_vec()));
    }
    if !line.starts_with("cargo run ") {
        return None;
    }
    let end = words.iter().position(|word| word == "--");
    let (cargo, flags) = words.split_at(end.unwrap_or(words.len()));
    let name = match cargo.iter().position(|word| word == "--example") {
        Some(at) => cargo.get(at + 1)?.clone(),
        None if cargo.iter().any(|word| word == "locret-serve") => "serve".into(),
        // A program of the reader's.
        None => return None,
    };
    // Stands for any.
    let flags = flags.iter().skip(1).filter(|word| *word != "FLAGS");
    Some((name, flags.cloned().collect()))
}

#[test]
fn commands_are_read() {
    fn read<T: Parser>(words: Vec<String>) -> Result<(), String> {
        T::try_parse_from(words)
            .map(drop)
            .map_err(|e| e.to_string())
    }
    let mut found = Vec::new();
    for path in documents() {
        let text = fs::read_to_string(&path).unwrap();
        for line in lines(&text) {
            let Some((name, flags)) = program(&line) else {
                continue;
            };
            let words = [vec![name.clone()], flags].concat();
            let parsed = match &*name {
                "ablation" => read::<ablation::Args>(words),
                "benchmarks" => read::<benchmarks::Args>(words),
                "budget_table" => read::<budget_table::Args>(words),
                "evaluate" => read::<evaluate::Args>(words),
                "generate" => read::<generate::Args>(words),
                "long_shapes" => read::<long_shapes::Args>(words),
                "oracle" => read::<oracle::Args>(words),
                "plan" => read::<plan::Args>(words),
                "q_filters" => read::<q_filters::Args>(words),
                "rank_heads" => read::<rank_heads::Args>(words),
                "soak" => read::<soak::Args>(words),
                "trace" => read::<trace::Args>(words),
                "train_heads" => read::<train_heads::Args>(words),
                "serve" => read::<Args>(words),
                // These take no flags.
                "quickstart" | "custom_policy" | "custom_adapter" if words.len() == 1 => Ok(()),
                _ => Err("no such program, or none with flags".into()),
            };
            if let Err(error) = parsed {
                panic!("{}: {line}: {error}", path.display());
            }
            found.push(name);
        }
    }
    // Each of them is in some document.
    for name in [
        "quickstart",
        "generate",
        "evaluate",
        "ablation",
        "benchmarks",
        "train_heads",
        "plan",
        "long_shapes",
        "custom_policy",
        "custom_adapter",
        "trace",
        "serve",
    ] {
        assert!(found.iter().any(|other| other == name), "{name}");
    }
}

#[test]
fn what_a_reader_would_type() {
    let (name, flags) = program(r#"cargo run --release --example x -- --a "b c"  -d"#).unwrap();
    assert_eq!(
        (&*name, &flags[..]),
        ("x", &["--a", "b c", "-d"].map(String::from)[..])
    );
    let text = "cargo run a\n```text\ncargo run \\\n    b\n```\ncargo run c";
    assert_eq!(lines(text), ["cargo run      b"]);
    assert!(program("cargo test --example x").is_none());
}
