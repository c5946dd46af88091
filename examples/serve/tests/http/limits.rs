//! Queues, clients that leave, keys, and the end.

use crate::{Running, client::read, settings};
use locret_core::Limits;
use locret_serve::Settings;
use serde_json::{Value, json};
use std::{
    io::Read,
    net::TcpStream,
    time::{Duration, Instant},
};

/// An answer that takes many seconds.
fn long(stream: bool) -> Value {
    json!({ "prompt": "a", "max_tokens": 4000, "temperature": 0, "stream": stream })
}

fn started(server: &Running, stream: bool) -> TcpStream {
    let before = server.app.batcher.load().generated;
    let body = long(stream).to_string();
    let sent = server
        .client()
        .send("POST", "/v1/completions", body.as_bytes());
    let start = Instant::now();
    while server.app.batcher.load().generated < before + 3 {
        assert!(start.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(2));
    }
    sent
}

#[test]
fn whoever_leaves_is_forgotten() {
    let server = Running::usual();
    for stream in [true, false] {
        let before = server.app.batcher.load().generated;
        let mut sent = started(&server, stream);
        if stream {
            let mut some = [0; 200];
            sent.read_exact(&mut some).unwrap();
        }
        drop(sent);
        server.idle();
        let generated = server.app.batcher.load().generated - before;
        assert!(generated < 3500, "{generated}");
    }
    // Half-closed: whoever says nothing more is taken to have left.
    let sent = started(&server, true);
    sent.shutdown(std::net::Shutdown::Write).unwrap();
    server.idle();
    assert_eq!(server.client().get("/health").status, 200);
}

#[test]
fn a_full_queue_says_when_to_come_again() {
    let server = Running::new(Limits::new().running(1).waiting(1), settings());
    let running = started(&server, true);
    let body = long(false).to_string();
    let waiting = server
        .client()
        .send("POST", "/v1/completions", body.as_bytes());
    let start = Instant::now();
    while server.app.batcher.load().waiting < 1 {
        assert!(start.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(2));
    }
    let refused = server.client().post("/v1/completions", &long(false));
    assert_eq!(refused.status, 429);
    assert_eq!(refused.header("retry-after"), Some("1"));
    let (message, kind, code) = refused.error();
    assert_eq!(
        (kind.as_str(), code.as_deref()),
        ("rate_limit_error", Some("queue_full"))
    );
    assert!(message.contains('1'), "{message}");
    drop((running, waiting));
    server.idle();
    let small = json!({ "prompt": "a", "max_tokens": 2 });
    assert_eq!(server.client().post("/v1/completions", &small).status, 200);
}

#[test]
fn what_will_never_fit_is_told_so_with_the_numbers() {
    let server = Running::new(Limits::new().memory(400_000), settings());
    let ask = |tokens: usize| {
        let ids: Vec<u32> = (0..tokens as u32).map(|i| i % 100).collect();
        let full = json!({ "prompt": ids, "max_tokens": 4, "policy": "full" });
        server.client().post("/v1/completions", &full)
    };
    assert_eq!(ask(100).status, 200);
    let refused = ask(3000);
    assert_eq!(refused.status, 400, "{refused:?}");
    let (message, _, code) = refused.error();
    assert!(message.contains("400000"), "{message}");
    assert_eq!(code.as_deref(), Some("context_length_exceeded"));
    let refused = ask(4001);
    let (message, ..) = refused.error();
    assert!(
        message.contains("4001") && message.contains("4000"),
        "{message}"
    );
    assert_eq!(refused.status, 400);
    assert_eq!(ask(100).status, 200);
}

#[test]
fn answers_that_take_too_long_are_given_up() {
    let timeout = Duration::from_secs(1);
    let server = Running::new(
        Limits::new(),
        Settings {
            timeout,
            ..settings()
        },
    );
    // The queue is part of the time.
    let others: Vec<TcpStream> = (0..12)
        .map(|_| {
            let body = long(true).to_string();
            server
                .client()
                .send("POST", "/v1/completions", body.as_bytes())
        })
        .collect();
    let whole = server.client().post("/v1/completions", &long(false));
    assert_eq!(whole.status, 504);
    assert_eq!(whole.error().2.as_deref(), Some("timeout"));
    for mut other in others {
        let parts = read(&mut other);
        assert_eq!(parts.status, 200);
        let last: Value = serde_json::from_str(parts.events().last().unwrap()).unwrap();
        assert_eq!(last["error"]["code"], "timeout");
    }
    server.idle();
}

#[test]
fn keys() {
    let token = Some("secret-7".to_owned());
    let server = Running::new(
        Limits::new(),
        Settings {
            token,
            ..settings()
        },
    );
    let ask = json!({ "prompt": "a", "max_tokens": 2 });
    let with = |value: &str| {
        let client = server.client().with("authorization", value);
        client.post("/v1/completions", &ask)
    };
    assert_eq!(with("Bearer secret-7").status, 200);
    assert_eq!(with("bearer secret-7").status, 200);
    for wrong in [
        "Bearer secret-8",
        "Bearer",
        "Bearer ",
        "secret-7",
        "Basic secret-7",
        "Bearer secret-77",
    ] {
        let answer = with(wrong);
        assert_eq!(answer.status, 401, "{wrong}");
        assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
        assert_eq!(answer.error().2.as_deref(), Some("invalid_api_key"));
    }
    for path in ["/v1/models", "/metrics"] {
        assert_eq!(server.client().get(path).status, 401);
    }
    for path in ["/", "/health"] {
        assert_eq!(server.client().get(path).status, 200);
    }
}

#[test]
fn an_end_waits_for_what_runs() {
    let mut server = Running::usual();
    let body = json!({ "prompt": "a", "max_tokens": 600, "temperature": 0 }).to_string();
    let mut sent = server
        .client()
        .send("POST", "/v1/completions", body.as_bytes());
    let idle = server.client().connect();
    while server.app.batcher.load().generated < 3 {
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(server.end());
    assert!(TcpStream::connect(server.at).is_err());
    let answer = read(&mut sent);
    assert_eq!(answer.status, 200);
    assert_eq!(answer.json()["usage"]["completion_tokens"], 600);
    drop(idle);
}

#[test]
fn an_end_does_not_wait_for_ever() {
    let grace = Duration::from_millis(300);
    let mut server = Running::new(
        Limits::new(),
        Settings {
            grace,
            ..settings()
        },
    );
    let _sent = started(&server, true);
    let start = Instant::now();
    assert!(!server.end());
    assert!(start.elapsed() < Duration::from_secs(5));
    server.idle();
}
