//! Settings: policies, grids, patterns, tables, and the files of tasks and training texts.

use super::{MODEL, try_out};
use crate::{Feed, Input, Target, edit, places};
use locret_core::{BudgetTable, Generate, Prefill, Session};
use locret_eval::{ablation::Grid, tasks, tasks::Frame, training_data};
use locret_policies::{PolicyConfig, minference::Patterns};
use serde_json::{Value, json};
use std::sync::LazyLock;

fn ready() {
    LazyLock::force(&POLICIES);
    LazyLock::force(&PARTS);
    // The first pass makes what all others share.
    try_out(&MODEL);
}

pub(crate) const POLICY: Target = Target {
    name: "policy",
    ready,
    make: make_policy,
    read: read_policy,
};

pub(crate) const GRID: Target = Target {
    name: "grid",
    ready,
    make: make_grid,
    read: read_grid,
};

pub(crate) const TASKS: Target = Target {
    name: "tasks",
    ready,
    make: make_tasks,
    read: read_tasks,
};

static POLICIES: LazyLock<Vec<Value>> = LazyLock::new(|| {
    vec![
        json!({ "policy": "window", "budget": 16, "sinks": 4, "positions": "original", "decode": { "every": 4 } }),
        json!({ "policy": "full", "quantize": { "bits": 4, "group": 4, "residual": 4, "layout": "kivi" } }),
        json!({ "policy": "snapkv", "budget": "25%", "window": 4, "kernel": 3, "pool": 3, "ada": 0.2, "share": "model" }),
        json!({ "policy": "sirllm", "budget": 12, "decay": 0.5, "recent": 3, "pyramid": 5.0 }),
        json!({ "policy": "h2o", "budget": { "bytes": 4096 }, "merge": 0.7 }),
        json!({ "policy": "tova", "budget": "8KiB" }),
        json!({ "policy": "random", "budget": 9, "seed": 3, "stabilizers": 2 }),
        json!({ "policy": "infllm", "init": 2, "local": 8, "block": 4, "topk": 2, "representatives": 1, "exec_block": 8 }),
        json!({ "policy": "minference" }),
        json!({ "policy": "key-norm", "budget": 8 }),
    ]
});

static PARTS: LazyLock<Vec<Value>> = LazyLock::new(|| {
    let mut parts: Vec<Value> = [
        "budget",
        "sinks",
        "recent",
        "stabilizers",
        "positions",
        "decode",
        "pool",
        "pyramid",
        "ada",
        "share",
        "merge",
        "quantize",
        "seed",
        "decay",
        "window",
        "kernel",
        "tier",
        "topk",
        "block",
        "table",
        "patterns",
        "heads",
        "compact",
        "original",
        "never",
        "layer",
        "100%",
        "0.001%",
        "1e9GiB",
        "-1MiB",
        "memory",
    ]
    .map(Value::from)
    .into();
    parts.extend([
        json!(2),
        json!(8),
        json!({ "units": 5 }),
        json!({ "share": 0.5 }),
        json!({ "bits": 2, "layout": "per_token", "group": 0, "residual": 1u64 << 60 }),
        json!({ "every": 0 }),
    ]);
    parts
});

/// Kind 0 is TOML, 1 is JSON.
fn make_policy(feed: &mut Feed<'_>) -> Input {
    let seed = POLICIES[feed.below(POLICIES.len())].clone();
    let value = edit::json(seed, &PARTS, feed);
    let kind = feed.below(2);
    let text = match (kind, toml::to_string(&value)) {
        (0, Ok(text)) => text,
        _ => value.to_string(),
    };
    let text = match feed.below(4) {
        0 => edit::text(
            &text,
            &["[", "]", "=", "\"", "{", "}", "[[a]]", "1e9"],
            feed,
        ),
        _ => text,
    };
    Input {
        bytes: text.into_bytes(),
        kind,
        ..Input::default()
    }
}

fn read_policy(input: &Input) {
    let text = String::from_utf8_lossy(&input.bytes);
    let config = match input.kind % 2 {
        0 => PolicyConfig::from_toml(&text),
        _ => PolicyConfig::from_json(&text),
    };
    let Ok(config) = config else {
        return;
    };
    let Ok(policy) = config.build_for(&**MODEL) else {
        return;
    };
    let Ok(mut session) = Session::new(MODEL.clone(), policy) else {
        return;
    };
    let ids: Vec<u32> = (0..40).map(|i| i * 11 % 61).collect();
    for chunk in [8, 3] {
        let _any = session.prefill(&ids, &Prefill::new(chunk, 2));
        if let Ok(tokens) = session.generate(Generate::greedy(3)) {
            tokens.for_each(drop);
        }
    }
}

/// Kind 0 is a grid, 1 are patterns, 2 is a table of budgets.
fn make_grid(feed: &mut Feed<'_>) -> Input {
    let kind = feed.below(3);
    let seed = match kind {
        0 => {
            json!({ "lengths": [1000, 20], "samples": 1, "tasks": ["passkey", "needle"], "budgets": [128, "5%"],
            "stores": ["f32", "q4"], "seeds": [0, 1], "chunk": 128, "local": 32, "positions": ["compact"],
            "policies": [{ "policy": "full" }, { "label": "w", "policy": "window", "sinks": 2 }] })
        }
        1 => json!([{ "0": ["vertical_and_slash", 30, 800, 1.0], "1": ["stream_llm", 4, 64, 0.5] },
            { "0": ["block_sparse", 10, 0, 0.1] }]),
        _ => json!({ "shares": [[0.5, 1.5], [1.0, 1.0]] }),
    };
    let value = edit::json(seed, &PARTS, feed);
    let text = match (kind, toml::to_string(&value)) {
        (0, Ok(text)) => text,
        _ => value.to_string(),
    };
    Input {
        bytes: text.into_bytes(),
        kind,
        ..Input::default()
    }
}

fn read_grid(input: &Input) {
    let text = String::from_utf8_lossy(&input.bytes);
    match input.kind % 3 {
        0 => drop(Grid::from_toml(&text)),
        1 => {
            // One pattern for all heads is written as none that can be read.
            if let Ok(patterns) = Patterns::from_json(&text)
                && patterns.layers() > 0
            {
                let again = Patterns::from_json(&patterns.to_json());
                assert!(again.is_ok(), "what was read is written");
            }
        }
        _ => {
            if let Ok(table) = serde_json::from_str::<BudgetTable>(&text) {
                let spec = MODEL.spec();
                for layer in 0..spec.layers {
                    let units = table.units(&spec.layer(layer), 64);
                    assert!(units.len() <= spec.kv_heads.max(1), "{units:?}");
                }
            }
        }
    }
}

/// Kind 0 are tasks, 1 are training texts.
fn make_tasks(feed: &mut Feed<'_>) -> Input {
    let kind = feed.below(2);
    let lines: Vec<Value> = match kind {
        0 => vec![
            json!({ "id": "1", "task": "passkey", "context": "c", "queries": [{ "query": "q", "answer": "a" }] }),
            json!({ "id": "2", "task": "qa", "context": "d", "queries": [{ "query": "q", "answer": "a",
                "judge": { "rule": "all", "references": ["a", "b"], "tokens": 5 } }] }),
        ],
        _ => vec![
            json!({ "conversations": [{ "from": "human", "value": "A" }, { "from": "gpt", "value": "B" }] }),
            json!({ "instruction": "Do", "input": "it", "output": "Done" }),
            json!({ "prompt": "P", "answers": [{ "query": "Q", "answer": "R" }] }),
        ],
    };
    let parts = ["system", "", "judge", "references", "any"].map(Value::from);
    let altered = lines
        .into_iter()
        .map(|line| edit::json(line, &parts, feed).to_string());
    let text = altered.collect::<Vec<_>>().join("\n");
    let text = match feed.below(3) {
        0 => edit::text(&text, &["\n", "[", "{\"id\":", "\u{feff}", "\\ud800"], feed),
        _ => text,
    };
    Input {
        bytes: text.into_bytes(),
        kind,
        ..Input::default()
    }
}

fn read_tasks(input: &Input) {
    let path = places::path("tasks.jsonl");
    places::write(&path, &input.bytes);
    match input.kind % 2 {
        0 => {
            if let Ok(read) = tasks::read(&path) {
                tasks::write(&path, &read).expect("a file of this process");
                assert_eq!(tasks::read(&path).expect("what was written"), read);
            }
        }
        _ => drop(training_data::read(&path, &Frame::plain(""))),
    }
}
