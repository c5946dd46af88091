//! Requests that are wrong, by mistake or on purpose: the right status, and a server that goes on.

use crate::{Running, client::read, settings};
use locret_core::Limits;
use locret_serve::Settings;
use serde_json::{Value, json};
use std::{
    io::{Read, Write},
    net::Shutdown,
    time::{Duration, Instant},
};

/// Asks something that has to work.
fn serves(server: &Running) {
    let ask = json!({ "prompt": "one two", "max_tokens": 3, "temperature": 0 });
    let answer = server.client().post("/v1/completions", &ask);
    assert_eq!(answer.status, 200, "{answer:?}");
    server.idle();
}

#[test]
fn fields_that_are_wrong() {
    let server = Running::usual();
    let wrong = [
        (json!({ "model": "gpt-9" }), 404),
        (json!({ "model": 7 }), 400),
        (json!({ "prompt": null }), 400),
        (json!({ "prompt": [] }), 400),
        (json!({ "prompt": "" }), 400),
        (json!({ "prompt": ["a", "b"] }), 400),
        (json!({ "prompt": [-1] }), 400),
        (json!({ "prompt": [4_000_000_000u32] }), 400),
        (json!({ "prompt": vec![1; 4001] }), 400),
        (json!({ "max_tokens": -5 }), 400),
        (json!({ "max_tokens": 0 }), 400),
        (json!({ "max_tokens": 1_000_000_000_000u64 }), 400),
        (json!({ "max_tokens": 1.5 }), 400),
        (json!({ "max_completion_tokens": 4001 }), 400),
        (json!({ "temperature": -1 }), 400),
        (json!({ "temperature": 3 }), 400),
        (json!({ "temperature": "hot" }), 400),
        (json!({ "top_p": 0 }), 400),
        (json!({ "top_p": 1.1 }), 400),
        (json!({ "min_p": 2 }), 400),
        (json!({ "repetition_penalty": 0 }), 400),
        (json!({ "seed": "x" }), 400),
        (json!({ "n": 2 }), 400),
        (json!({ "n": 0 }), 400),
        (json!({ "best_of": 3 }), 400),
        (json!({ "stop": "" }), 400),
        (json!({ "stop": ["a", "b", "c", "d", "e"] }), 400),
        (json!({ "stop": ["x".repeat(513)] }), 400),
        (json!({ "stop": 7 }), 400),
        (json!({ "logprobs": 3 }), 400),
        (json!({ "echo": true }), 400),
        (json!({ "suffix": "end" }), 400),
        (json!({ "frequency_penalty": 1 }), 400),
        (json!({ "logit_bias": { "5": 100 } }), 400),
        (json!({ "stream": "yes" }), 400),
        (json!({ "session": "mine" }), 400),
    ];
    for (field, status) in wrong {
        let mut ask = json!({ "prompt": "a", "max_tokens": 2 });
        let fields = ask.as_object_mut().unwrap();
        fields.extend(field.as_object().unwrap().clone());
        let answer = server.client().post("/v1/completions", &ask);
        assert_eq!(answer.status, status, "{field}: {answer:?}");
        let (message, kind, _) = answer.error();
        assert_eq!(kind, "invalid_request_error");
        assert!(!message.is_empty() && message.len() < 400, "{message}");
    }
    // What clients commonly send and what changes nothing.
    let harmless = json!({ "prompt": "a", "max_tokens": 2, "user": "u", "n": 1, "logit_bias": {},
        "logprobs": null, "presence_penalty": 0.0, "echo": false, "metadata": { "a": [1] } });
    assert_eq!(
        server.client().post("/v1/completions", &harmless).status,
        200
    );
    for messages in [
        json!([]),
        json!("hello"),
        json!([{ "role": "user" , "content": 7 }]),
        json!([{ "content": "x" }]),
        json!([{ "role": "<|im_start|>", "content": "x" }]),
        json!([{ "role": "user", "content": [{ "type": "image_url", "image_url": {} }] }]),
        json!(vec![json!({ "role": "user", "content": "x" }); 5000]),
    ] {
        let ask = json!({ "messages": messages, "max_tokens": 2 });
        let answer = server.client().post("/v1/chat/completions", &ask);
        assert_eq!(answer.status, 400, "{answer:?}");
    }
    let tools = json!({ "messages": [{ "role": "user", "content": "x" }],
        "tools": [{ "type": "function", "function": { "name": "f" } }] });
    assert_eq!(
        server.client().post("/v1/chat/completions", &tools).status,
        400
    );
    serves(&server);
}

#[test]
fn bodies_that_are_wrong() {
    let max_body = 8 << 20;
    let server = Running::new(
        Limits::new(),
        Settings {
            max_body,
            ..settings()
        },
    );
    let post = |body: &[u8]| server.client().ask("POST", "/v1/completions", body).status;
    for bad in [
        &b""[..],
        b"{",
        b"[]",
        b"null",
        b"\"prompt\"",
        b"{\"prompt\": \"a\"} more",
        b"{\"prompt\": \"\xff\xfe\"}",
        b"{\"prompt\": \"\\ud800\"}",
        b"{\"prompt\": \"a\", \"temperature\": 1e999}",
        b"{\"prompt\": \"a\", \"max_tokens\": 1, \"max_tokens\": 2}",
        b"\x00\x01\x02",
    ] {
        assert_eq!(post(bad), 400, "{:?}", String::from_utf8_lossy(bad));
    }
    let deep = format!("{{\"prompt\": \"a\", \"x\": {}", "[".repeat(1 << 20));
    assert_eq!(post(deep.as_bytes()), 400);
    let deep = format!(
        "{{\"prompt\": {}1{}}}",
        "[".repeat(100_000),
        "]".repeat(100_000)
    );
    assert_eq!(post(deep.as_bytes()), 400);
    let stops: Vec<String> = (0..1_000_000).map(|i| format!("{i:x}")).collect();
    let many = json!({ "prompt": "a", "stop": stops });
    let start = Instant::now();
    let answer = server.client().post("/v1/completions", &many);
    assert_eq!(answer.status, 400);
    assert!(answer.error().0.contains("1000000"), "{answer:?}");
    let many = json!({ "prompt": "a", "stop": vec![""; 1_000_000] });
    let answer = server.client().post("/v1/completions", &many);
    assert_eq!(answer.status, 400);
    assert!(answer.error().0.contains("1000000"), "{answer:?}");
    assert!(start.elapsed() < Duration::from_secs(20));
    // Another type, as a form on somebody's page sends it.
    let form = server.client().with("content-type", "text/plain");
    assert_eq!(form.ask("POST", "/v1/completions", b"{}").status, 415);
    let with = server
        .client()
        .with("content-type", "application/json; charset=utf-8");
    let ask = json!({ "prompt": "a", "max_tokens": 1 });
    assert_eq!(with.post("/v1/completions", &ask).status, 200);
    serves(&server);
}

#[test]
fn bodies_that_are_too_large() {
    let server = Running::usual();
    let big = vec![b' '; 3 << 20];
    let answer = server.client().ask("POST", "/v1/completions", &big);
    assert_eq!(answer.status, 413);
    assert!(answer.error().0.contains("1048576"));
    let many = json!({ "prompt": "a", "stop": vec!["x"; 1_000_000] });
    let answer = server.client().post("/v1/completions", &many);
    assert_eq!(answer.status, 413);
    // Without a length: in chunks that do not end.
    let mut stream = server.client().connect();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: here\r\nconnection: close\r\n\
                content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).unwrap();
    let chunk = [b"10000\r\n", &[b' '; 0x10000][..], b"\r\n"].concat();
    for _ in 0..24 {
        if stream.write_all(&chunk).is_err() {
            break;
        }
    }
    assert_eq!(read(&mut stream).status, 413);
    // A length that no body has.
    let mut stream = server.client().connect();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: here\r\nconnection: close\r\n\
                content-type: application/json\r\ncontent-length: 99999999999999999999999\r\n\r\n";
    stream.write_all(head.as_bytes()).unwrap();
    assert_eq!(read(&mut stream).status, 400);
    serves(&server);
}

#[test]
fn what_is_slow_or_breaks_off() {
    let body_timeout = Duration::from_millis(600);
    let server = Running::new(
        Limits::new(),
        Settings {
            body_timeout,
            ..settings()
        },
    );
    // A body byte by byte.
    let mut slow = server.client().connect();
    let head = server.client().head("POST", "/v1/completions", 1000);
    slow.write_all(head.as_bytes()).unwrap();
    let start = Instant::now();
    let mut writer = slow.try_clone().unwrap();
    let drip = std::thread::spawn(move || {
        while start.elapsed() < Duration::from_secs(3) && writer.write_all(b" ").is_ok() {
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    let answer = read(&mut slow);
    assert_eq!(answer.status, 408);
    assert!(start.elapsed() < Duration::from_secs(3));
    drop(slow);
    drip.join().unwrap();
    // Headers that never end: closed, with a status or without one.
    let mut slow = server.client().connect();
    slow.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: ")
        .unwrap();
    let start = Instant::now();
    let mut rest = Vec::new();
    let _ = slow.read_to_end(&mut rest);
    assert!(start.elapsed() < Duration::from_secs(3));
    // Half of a body, and no more to come.
    let mut half = server.client().connect();
    let head = server.client().head("POST", "/v1/completions", 1000);
    half.write_all(head.as_bytes()).unwrap();
    half.write_all(b"{\"prompt\": ").unwrap();
    half.shutdown(Shutdown::Write).unwrap();
    let mut rest = Vec::new();
    let _ = half.read_to_end(&mut rest);
    let rest = String::from_utf8(rest).unwrap();
    assert!(
        rest.is_empty() || rest.starts_with("HTTP/1.1 400"),
        "{rest}"
    );
    // Nothing at all, and connections that only sit there.
    let sitting: Vec<_> = (0..10).map(|_| server.client().connect()).collect();
    serves(&server);
    drop(sitting);
    serves(&server);
}

#[test]
fn addresses_and_methods_that_are_wrong() {
    let server = Running::usual();
    let client = server.client();
    for (method, path, status) in [
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("PUT", "/v1/chat/completions", 405),
        ("POST", "/health", 405),
        ("GET", "/v1", 404),
        ("GET", "/v1/../etc/passwd", 404),
        ("GET", "/%00", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/models/%ff", 400),
    ] {
        let answer = client.ask(method, path, b"");
        assert_eq!(answer.status, status, "{method} {path}: {answer:?}");
        if status != 400 {
            answer.error();
        }
    }
    for nonsense in [
        &b"hello\r\n\r\n"[..],
        b"\x16\x03\x01\x02\x00",
        b"GET / HTTP/9.9\r\n\r\n",
    ] {
        let mut stream = client.connect();
        stream.write_all(nonsense).unwrap();
        let _ = stream.shutdown(Shutdown::Write);
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        let rest = String::from_utf8_lossy(&rest);
        assert!(rest.is_empty() || rest.starts_with("HTTP/1.1 4"), "{rest}");
    }
    // A hundred long headers.
    let mut many = client.clone();
    for i in 0..100 {
        many = many.with(&format!("x-{i}"), &"y".repeat(8000));
    }
    let mut stream = many.send("GET", "/health", b"");
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
    let rest = String::from_utf8_lossy(&rest);
    assert!(
        rest.is_empty() || rest.starts_with("HTTP/1.1 431"),
        "{rest}"
    );
    let _: Value = client.get("/v1/models").json();
    serves(&server);
}
