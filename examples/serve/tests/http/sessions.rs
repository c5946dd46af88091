//! Conversations that go on where they were, in this process or another one.

use crate::{MODEL, PREFILL, Running, TEMPLATE, TOKENIZER, config, settings, story};
use locret_core::{Folder, Generate, Limits, Prefill, Session};
use locret_models::Message;
use locret_serve::Places;
use serde_json::{Value, json};
use std::{path::Path, sync::Arc};

fn places(folder: &Path) -> Places {
    Places {
        sessions: Some(Arc::new(Folder::new(folder).unwrap())),
        prefixes: 1 << 20,
        ..Places::default()
    }
}

fn server(folder: &Path) -> Running {
    Running::with(Limits::new(), settings(), places(folder))
}

fn ask(server: &Running, messages: &[Value], session: &str, more: Value) -> crate::client::Answer {
    let mut ask = json!({
        "messages": messages, "max_tokens": 20, "temperature": 0, "session": session,
    });
    ask.as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    server.client().post("/v1/chat/completions", &ask)
}

fn said(answer: &Value) -> String {
    answer["choices"][0]["message"]["content"]
        .as_str()
        .unwrap()
        .to_owned()
}

/// The conversation as a lone session has it: answers, tokens of each turn, tokens before it.
fn lone(system: &str, turns: &[String]) -> Vec<(String, usize, usize)> {
    let policy = config().build_for(&**MODEL).unwrap();
    let mut session = Session::new(MODEL.clone(), policy).unwrap();
    let stop = TOKENIZER.end_of_turn(&[]);
    let system = [Message::new("system", system)];
    let mut answers = Vec::new();
    for (i, turn) in turns.iter().enumerate() {
        let before = session.tokens().len();
        let all = |messages: &[Message]| TEMPLATE.encode(&TOKENIZER, messages, true).unwrap();
        let user = Message::new("user", turn);
        let ids = if i == 0 {
            let first = TEMPLATE.encode(&TOKENIZER, &system, false).unwrap();
            session
                .prefill(&first, &Prefill::new(PREFILL.chunk, 0))
                .unwrap();
            let ids = all(&[system[0].clone(), user]);
            ids[first.len()..].to_vec()
        } else {
            // What the template writes between an answer and the next one.
            let open = Message::new("assistant", "x");
            let with = all(&[system[0].clone(), open.clone(), user]);
            let end = with.iter().rposition(|id| stop.contains(id)).unwrap();
            let end = with[..end]
                .iter()
                .rposition(|id| stop.contains(id))
                .unwrap();
            let ended = stop.contains(session.tokens().last().unwrap());
            with[end + usize::from(ended)..].to_vec()
        };
        session.prefill(&ids, &PREFILL).unwrap();
        let generate = Generate::greedy(20).stop_at(stop.iter().copied());
        let tokens = session.generate(generate).unwrap();
        let tokens: Vec<u32> = tokens.map(Result::unwrap).collect();
        answers.push((TOKENIZER.decode(&tokens, true), ids.len(), before));
    }
    answers
}

#[test]
fn a_conversation_goes_on_in_another_process_as_if_it_had_stayed() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (server(folder.path()), server(folder.path()));
    let turns = [
        story(90),
        "And then?".to_owned(),
        "Which one?".into(),
        "Why?".into(),
    ];
    let expected = lone("You know rivers.", &turns);
    let mut messages = vec![json!({ "role": "system", "content": "You know rivers." })];
    for (i, turn) in turns.iter().enumerate() {
        messages.push(json!({ "role": "user", "content": turn }));
        let server = [&one, &two][i % 2];
        let answer = ask(server, &messages, "talk-1", json!({}));
        assert_eq!(answer.status, 200, "{answer:?}");
        // Once more, as after an answer that was lost; by the other one, and streamed.
        let again = ask([&two, &one][i % 2], &messages, "talk-1", json!({}));
        let answer = answer.json();
        assert_eq!(said(&again.json()), said(&answer));
        assert_eq!(said(&answer), expected[i].0, "turn {i}");
        let usage = &answer["usage"];
        if i > 0 {
            assert_eq!(usage["prompt_tokens"], expected[i].1 + expected[i].2);
            assert_eq!(
                usage["prompt_tokens_details"]["cached_tokens"],
                expected[i].2
            );
        }
        messages.push(json!({ "role": "assistant", "content": said(&answer) }));
    }
    // Only the last two states are kept, and what the conversation begins with.
    let kept = std::fs::read_dir(folder.path()).unwrap();
    let mut kept: Vec<String> = kept
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("talk-1"))
        .collect();
    kept.sort();
    assert_eq!(kept, ["talk-1.7", "talk-1.9"]);
    for server in [&one, &two] {
        server.idle();
    }
}

impl Running {
    fn stored(&self) -> u64 {
        let metrics = self.client().get("/metrics").body;
        let line = metrics
            .lines()
            .find(|l| l.starts_with("locret_sessions_stored_total "));
        line.unwrap().rsplit(' ').next().unwrap().parse().unwrap()
    }
}

#[test]
fn conversations_that_do_not_go_on_are_conflicts() {
    let folder = tempfile::tempdir().unwrap();
    let server = server(folder.path());
    let user = |text: &str| json!({ "role": "user", "content": text });
    let assistant = |text: &str| json!({ "role": "assistant", "content": text });
    let first = ask(&server, &[user("one")], "a", json!({ "budget": 40 })).json();
    let answer = assistant(&said(&first));
    let conflict = |messages: &[Value], session: &str, more: Value| {
        let found = ask(&server, messages, session, more);
        assert_eq!(found.status, 409, "{found:?}");
        assert_eq!(found.error().2.as_deref(), Some("session_conflict"));
        found.error().0
    };
    let none = json!({});
    let altered = [user("one"), assistant("no such answer"), user("two")];
    assert!(conflict(&altered, "a", none.clone()).contains("message 1"));
    let other = [user("eins"), answer.clone(), user("two")];
    assert!(conflict(&other, "a", none.clone()).contains("message 0"));
    let right = [user("one"), answer.clone(), user("two")];
    conflict(&right, "b", none.clone());
    conflict(&right, "a", json!({ "budget": 41 }));
    conflict(&right, "a", json!({ "policy": "window" }));
    // A damaged state is no state, and no answer either.
    let file = folder.path().join("a.2");
    let whole = std::fs::read(&file).unwrap();
    let mut damaged = whole.clone();
    *damaged.last_mut().unwrap() ^= 1;
    std::fs::write(&file, &damaged).unwrap();
    let found = ask(&server, &right, "a", none.clone());
    assert!(found.status >= 500, "{found:?}");
    std::fs::write(&file, &whole).unwrap();
    for bad in ["", "../a", "a.2", &"x".repeat(65)] {
        assert_eq!(ask(&server, &right, bad, none.clone()).status, 400);
    }
    // By a header, too.
    let body = json!({ "messages": right, "max_tokens": 4, "temperature": 0 });
    let header = server.client().with("x-session", "a");
    let found = header.post("/v1/chat/completions", &body);
    assert_eq!(found.status, 200, "{found:?}");
    server.idle();
    let without = Running::usual();
    assert_eq!(ask(&without, &[user("one")], "a", none).status, 400);
}

#[test]
fn a_turn_whose_client_left_is_not_kept() {
    let folder = tempfile::tempdir().unwrap();
    let server = server(folder.path());
    let body = json!({
        "messages": [{ "role": "user", "content": "one" }], "session": "left", "stream": true,
        "max_tokens": 4000, "temperature": 0,
    });
    let sent = server
        .client()
        .send("POST", "/v1/chat/completions", body.to_string().as_bytes());
    while server.app.batcher.load().generated < 3 {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    drop(sent);
    server.idle();
    assert_eq!(server.stored(), 0);
    assert!(!folder.path().join("left.2").exists());
}

#[test]
fn memory_is_kept_where_conversations_wait_for_each_other() {
    let folder = tempfile::tempdir().unwrap();
    // Enough for two or three at once.
    let limits = Limits::new().memory(6 << 20);
    let server = Running::with(
        limits,
        settings(),
        Places {
            prefixes: 0,
            ..places(folder.path())
        },
    );
    let talk = |i: usize| {
        let mut messages = Vec::new();
        for turn in [story(30 + 10 * i), "And?".into(), "Then?".into()] {
            messages.push(json!({ "role": "user", "content": turn }));
            let answer = ask(&server, &messages, &format!("t{i}"), json!({}));
            assert_eq!(answer.status, 200, "{answer:?}");
            messages.push(json!({ "role": "assistant", "content": said(&answer.json()) }));
        }
        messages
    };
    let together: Vec<Vec<Value>> = std::thread::scope(|scope| {
        let talks: Vec<_> = (0..8)
            .map(|i| {
                let talk = &talk;
                scope.spawn(move || talk(i))
            })
            .collect();
        talks.into_iter().map(|talk| talk.join().unwrap()).collect()
    });
    server.idle();
    for (i, messages) in together.iter().enumerate() {
        assert_eq!(*messages, talk(i), "{i}");
    }
}
