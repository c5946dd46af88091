//! Requests to the server, over a connection each.

use super::{MODEL, tokenizers};
use crate::{Feed, Input, Target, edit, places};
use locret_core::{Budget, CacheOptions, Limits, Prefill};
use locret_models::ChatTemplate;
use locret_policies::{Method, PolicyConfig};
use locret_serve::{App, Places, Served, Settings, server, store};
use serde_json::{Value, json};
use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{Arc, LazyLock},
    time::Duration,
};
use tokio::net::TcpListener;

pub(crate) const TARGET: Target = Target {
    name: "http",
    ready: || {
        LazyLock::force(&SERVER);
        LazyLock::force(&BODIES);
    },
    make,
    read,
};

/// A server for as long as the process lives.
static SERVER: LazyLock<SocketAddr> = LazyLock::new(|| {
    let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}";
    let served = Served {
        name: "random".into(),
        model: MODEL.clone(),
        tokenizer: tokenizers::sound(),
        template: Some(ChatTemplate::new(template, "", "").expect("a template")),
        stop: vec![8],
    };
    let settings = Settings {
        max_tokens: 40,
        max_prompt: 400,
        timeout: Duration::from_secs(20),
        body_timeout: Duration::from_secs(2),
        max_body: 1 << 16,
        connections: 8,
        grace: Duration::from_secs(1),
        token: None,
    };
    let policy = PolicyConfig::new(Method::KeyNorm).budget(Budget::Units(16));
    let reading = (Prefill::new(16, 4), CacheOptions::new());
    let sessions = places::folder("sessions");
    let places = Places {
        sessions: Some(store::open(&sessions.to_string_lossy()).expect("a folder")),
        ..Places::default()
    };
    let limits = Limits::new().memory(4 << 20).waiting(8).running(4);
    let app = App::new(served, limits, policy, reading, settings, places).expect("a server");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a thread");
    let listener = runtime
        .block_on(TcpListener::bind("127.0.0.1:0"))
        .expect("a port");
    let at = listener.local_addr().expect("an address");
    let app = Arc::new(app);
    std::thread::spawn(move || {
        let ended = server::serve(app, listener, std::future::pending());
        runtime.block_on(ended).expect("the server goes on")
    });
    at
});

static BODIES: LazyLock<Vec<(&'static str, Value)>> = LazyLock::new(|| {
    vec![
        (
            "/v1/completions",
            json!({ "prompt": "abc abc", "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["c"] }),
        ),
        (
            "/v1/chat/completions",
            json!({ "messages": [{ "role": "system", "content": "ab" },
                { "role": "user", "content": [{ "type": "text", "text": "abc" }] }],
                "max_tokens": 2, "stream": true, "stream_options": { "include_usage": true } }),
        ),
        (
            "/v1/completions",
            json!({ "prompt": [0, 1, 2], "max_tokens": 2, "session": "one", "top_k": 3, "min_p": 0.1,
                "policy": { "policy": "window", "budget": 8 } }),
        ),
        ("/v1/read", json!({ "prompt": "abc", "watch": true })),
    ]
});

const WORDS: &[&str] = &[
    "\r\n",
    "\r\n\r\n",
    ": ",
    "Content-Length: 0",
    "Content-Length: 18446744073709551616",
    "Transfer-Encoding: chunked",
    "Expect: 100-continue",
    "Connection: close",
    "HTTP/1.0",
    "HTTP/2.0",
    "GET ",
    "POST ",
    "/v1/models/random",
    "/v1/models/%00",
    "/metrics",
    "/health",
    "/../../etc/passwd",
    "%",
    "0\r\n\r\n",
    "ffffffffffffffff\r\n",
    "\u{0}",
    "\t",
];

fn make(feed: &mut Feed<'_>) -> Input {
    let (path, body) = &BODIES[feed.below(BODIES.len())];
    let parts = [
        "session",
        "policy",
        "prefill",
        "messages",
        "prompt",
        "tools",
        "response_format",
        "n",
        "logprobs",
        "budget",
        "max_tokens",
        "../x",
        "assistant",
        "one",
        "stream",
    ]
    .map(Value::from);
    let body = match feed.below(4) {
        0 => edit::text(
            &body.to_string(),
            &["{", "[", "\"", "\\ud800", "1e999"],
            feed,
        ),
        _ => edit::json(body.clone(), &parts, feed).to_string(),
    };
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n",
        body.len()
    );
    let head = match feed.below(4) {
        0 => edit::text(&head, WORDS, feed),
        _ => head,
    };
    Input {
        bytes: format!("{head}\r\n{body}").into_bytes(),
        ..Input::default()
    }
}

fn read(input: &Input) {
    // Most close the connection when they have answered; what waits for more is left.
    ask(&input.bytes, Duration::from_millis(60));
    let health = b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    let answer = ask(health, Duration::from_secs(30));
    assert!(
        answer.starts_with(b"HTTP/1.1 200"),
        "the server is gone: {:?}",
        String::from_utf8_lossy(&answer)
    );
}

/// Sends, and reads to the end, or for as long as there is patience.
fn ask(request: &[u8], patience: Duration) -> Vec<u8> {
    let mut stream = TcpStream::connect(*SERVER).expect("the server takes connections");
    stream.set_read_timeout(Some(patience)).expect("a socket");
    // It may have answered and closed before all is said.
    let _any = stream.write_all(request);
    let mut answer = Vec::new();
    let _any = stream.read_to_end(&mut answer);
    answer
}
