//! Sequences that are put away for others while they generate, and taken up again.

use crate::{
    Running,
    client::{Answer, Client},
    settings, story,
};
use locret_core::{Error, Folder, Limits, Result, SnapshotError, SnapshotStore, Stored};
use locret_serve::{Places, Settings};
use serde_json::{Value, json};
use std::{
    io::{self, ErrorKind, Read, Write},
    net::TcpStream,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

/// A folder on a disk that may be full, that may not be written to, or that hands out something else.
#[derive(Debug)]
struct Disk {
    folder: Folder,
    /// Bytes of a file for which there is room.
    room: AtomicUsize,
    read_only: AtomicBool,
    /// So many files come back altered.
    alters: AtomicUsize,
}

impl Disk {
    fn new(path: &Path) -> Arc<Self> {
        Arc::new(Self {
            folder: Folder::new(path).unwrap(),
            room: usize::MAX.into(),
            read_only: false.into(),
            alters: 0.into(),
        })
    }
}

fn failed(kind: ErrorKind) -> Error {
    let what = "a disk".to_owned();
    let source = kind.into();
    SnapshotError::Io { what, source }.into()
}

/// Takes so many bytes and no more.
struct Room<'a> {
    to: &'a mut dyn Write,
    left: usize,
}

impl Write for Room<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = bytes.len().min(self.left);
        if n == 0 && !bytes.is_empty() {
            return Err(ErrorKind::StorageFull.into());
        }
        let n = self.to.write(&bytes[..n])?;
        self.left -= n;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

impl SnapshotStore for Disk {
    fn put(&self, key: &str, write: &mut dyn FnMut(&mut dyn Write) -> Result<()>) -> Result<()> {
        if self.read_only.load(Ordering::Acquire) {
            return Err(failed(ErrorKind::ReadOnlyFilesystem));
        }
        let left = self.room.load(Ordering::Acquire);
        self.folder
            .put(key, &mut |to| write(&mut Room { to, left }))
    }

    fn get(&self, key: &str) -> Result<Option<Stored>> {
        let Some(mut stored) = self.folder.get(key)? else {
            return Ok(None);
        };
        let one_less = |n: usize| n.checked_sub(1);
        let alters = &self.alters;
        if alters
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, one_less)
            .is_ok()
        {
            let mut bytes = Vec::new();
            stored.from.read_to_end(&mut bytes).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 16;
            stored.from = Box::new(io::Cursor::new(bytes));
        }
        Ok(Some(stored))
    }

    fn remove(&self, key: &str) -> Result<()> {
        self.folder.remove(key)
    }
}

/// Bytes in which one of [`asked`] fits, and no two.
const ONE: usize = 700_000;

fn asked(n: usize) -> Value {
    let ids: Vec<u32> = (0..40u32).map(|i| (i * 7 + n as u32) % 90).collect();
    match n % 3 {
        0 => json!({ "prompt": ids, "max_tokens": 250, "temperature": 0, "policy": "full" }),
        // Drawn, and streamed.
        1 => json!({
            "prompt": ids, "max_tokens": 240, "temperature": 0.9, "seed": 7, "policy": "full", "stream": true,
        }),
        // Several chunks of a prompt, of which much is evicted.
        _ => {
            let ids: Vec<u32> = (0..200u32).map(|i| (i * 11 + n as u32) % 90).collect();
            json!({ "prompt": ids, "max_tokens": 260, "temperature": 0, "budget": 200 })
        }
    }
}

/// The text of an answer, whole or streamed, or what its error says.
fn text(answer: &Answer) -> std::result::Result<String, String> {
    let message = |error: &Value| error["message"].as_str().unwrap().to_owned();
    if answer.header("content-type") != Some("text/event-stream") {
        return match answer.status {
            200 => Ok(answer.json()["choices"][0]["text"].as_str().unwrap().into()),
            500 => Err(message(&answer.json()["error"])),
            other => panic!("{other}: {answer:?}"),
        };
    }
    let (events, mut text) = (answer.events(), String::new());
    for event in &events {
        if event == "[DONE]" {
            return Ok(text);
        }
        let event: Value = serde_json::from_str(event).unwrap();
        if !event["error"].is_null() {
            return Err(message(&event["error"]));
        }
        text += event["choices"][0]["text"].as_str().unwrap();
    }
    panic!("an answer without an end: {events:?}")
}

/// Asks for all at the same time.
fn together(server: &Running, bodies: &[Value]) -> Vec<std::result::Result<String, String>> {
    let ask = |body: &Value| text(&server.client().post("/v1/completions", body));
    std::thread::scope(|scope| {
        let asked: Vec<_> = bodies
            .iter()
            .map(|body| scope.spawn(move || ask(body)))
            .collect();
        asked.into_iter().map(|a| a.join().unwrap()).collect()
    })
}

/// What a server says that is asked for one after the other, and puts nothing away.
fn undisturbed(bodies: &[Value]) -> Vec<std::result::Result<String, String>> {
    let server = Running::usual();
    let one = |body| together(&server, std::slice::from_ref(body)).remove(0);
    bodies.iter().map(one).collect()
}

fn server(disk: &Arc<Disk>, memory: usize, settings: Settings) -> Running {
    let places = Places {
        spill: Some(disk.clone()),
        ..Places::default()
    };
    Running::with(Limits::new().memory(memory), settings, places)
}

fn files(folder: &Path) -> usize {
    std::fs::read_dir(folder).map_or(0, Iterator::count)
}

fn until(what: &str, mut there: impl FnMut() -> bool) {
    let start = Instant::now();
    while !there() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn metric(client: &Client, name: &str) -> u64 {
    let body = client.get("/metrics").body;
    let mut lines = body.lines();
    let line = lines.find_map(|line| line.strip_prefix(&format!("{name} ")));
    line.unwrap().parse().unwrap()
}

#[test]
fn answers_that_took_turns_are_what_they_are_undisturbed() {
    let bodies: Vec<Value> = (0..6).map(asked).collect();
    let due = undisturbed(&bodies);
    let folder = tempfile::tempdir().unwrap();
    let server = server(&Disk::new(folder.path()), ONE, settings());
    assert_eq!(together(&server, &bodies), due);
    server.idle();
    let load = server.app.batcher.load();
    assert!(load.parked >= 6 && load.stayed == 0, "{load:?}");
    let counted = metric(&server.client(), "locret_sequences_parked_total");
    assert_eq!(counted, load.parked);
    assert_eq!(files(folder.path()), 0, "what was taken up again is gone");
}

#[test]
fn conversations_take_turns_too() {
    let bodies = |turn: usize, answers: &[String]| -> Vec<Value> {
        let messages = |n: usize| {
            let mut messages = vec![json!({ "role": "user", "content": story(30 + 10 * n) })];
            if turn > 0 {
                messages.push(json!({ "role": "assistant", "content": answers[n] }));
                messages.push(json!({ "role": "user", "content": "And then?" }));
            }
            json!({
                "messages": messages, "session": format!("talk-{n}"), "max_tokens": 200,
                "temperature": 0, "policy": "full",
            })
        };
        (0..3).map(messages).collect()
    };
    let talk = |server: &Running| {
        let mut answers = Vec::new();
        let mut all = Vec::new();
        for turn in 0..2 {
            let ask = |body: &Value| {
                let answer = server.client().post("/v1/chat/completions", body);
                assert_eq!(answer.status, 200, "{answer:?}");
                let content = &answer.json()["choices"][0]["message"]["content"];
                content.as_str().unwrap().to_owned()
            };
            let asked = bodies(turn, &answers);
            answers = std::thread::scope(|scope| {
                let talks: Vec<_> = asked.iter().map(|b| scope.spawn(|| ask(b))).collect();
                talks.into_iter().map(|talk| talk.join().unwrap()).collect()
            });
            all.push(answers.clone());
        }
        server.idle();
        (all, server.app.batcher.load().parked)
    };
    let (kept, spill) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let places = |name: &str, spill: Option<Arc<dyn SnapshotStore>>| Places {
        sessions: Some(Arc::new(Folder::new(kept.path().join(name)).unwrap())),
        spill,
        prefixes: 0,
    };
    let alone = Running::with(Limits::new().running(1), settings(), places("alone", None));
    let (due, _) = talk(&alone);
    let disk = Disk::new(spill.path());
    let places = places("turns", Some(disk));
    let server = Running::with(Limits::new().memory(1_200_000), settings(), places);
    let (found, parked) = talk(&server);
    assert_eq!(found, due);
    assert!(parked > 0);
    assert_eq!(files(spill.path()), 0);
}

#[test]
fn a_disk_that_nothing_can_be_written_to_harms_nobody() {
    let bodies: Vec<Value> = (0..3).map(asked).collect();
    let due = undisturbed(&bodies);
    for fault in ["full", "read-only", "gone"] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("spill");
        let disk = Disk::new(&path);
        match fault {
            "full" => disk.room.store(5000, Ordering::Release),
            "read-only" => disk.read_only.store(true, Ordering::Release),
            _ => std::fs::remove_dir(&path).unwrap(),
        }
        let server = server(&disk, ONE, settings());
        assert_eq!(together(&server, &bodies), due, "{fault}");
        server.idle();
        let load = server.app.batcher.load();
        assert!(load.parked == 0 && load.stayed > 0, "{fault}: {load:?}");
        let counted = metric(&server.client(), "locret_sequences_not_parked_total");
        assert_eq!(counted, load.stayed);
        assert_eq!(files(&path), 0, "{fault}: nothing is left half-written");
        // When it can be written to again they take turns again.
        disk.room.store(usize::MAX, Ordering::Release);
        disk.read_only.store(false, Ordering::Release);
        std::fs::create_dir_all(&path).unwrap();
        assert_eq!(together(&server, &bodies), due, "{fault}");
        server.idle();
        let load = server.app.batcher.load();
        assert!(load.parked > 0, "{fault}: {load:?}");
        assert_eq!(files(&path), 0);
    }
}

#[test]
fn what_comes_back_altered_is_its_own_sequences_error() {
    let bodies: Vec<Value> = (0..3).map(asked).collect();
    let due = undisturbed(&bodies);
    let folder = tempfile::tempdir().unwrap();
    let disk = Disk::new(folder.path());
    disk.alters.store(1, Ordering::Release);
    let server = server(&disk, ONE, settings());
    let found = together(&server, &bodies);
    let lost: Vec<&String> = found.iter().filter_map(|f| f.as_ref().err()).collect();
    assert_eq!(lost.len(), 1, "{lost:?}");
    assert!(lost[0].contains("not what was written"), "{lost:?}");
    for (found, due) in found.iter().zip(&due) {
        assert!(found.is_err() || found == due);
    }
    server.idle();
    assert_eq!(files(folder.path()), 0);
    assert_eq!(together(&server, &bodies), due);
}

/// An answer that takes many seconds, of which some is there.
fn started(server: &Running) -> TcpStream {
    let before = server.app.batcher.load().generated;
    let body = json!({
        "prompt": "a", "max_tokens": 4000, "temperature": 0, "policy": "full", "stream": true,
    });
    let sent = server
        .client()
        .send("POST", "/v1/completions", body.to_string().as_bytes());
    until("it does not begin", || {
        server.app.batcher.load().generated >= before + 3
    });
    sent
}

#[test]
fn whoever_leaves_while_it_is_put_away_leaves_nothing_behind() {
    // Memory for one such answer, and for nobody beside it.
    let promised = {
        let server = Running::usual();
        let _sent = started(&server);
        server.app.batcher.load().promised
    };
    let folder = tempfile::tempdir().unwrap();
    let grace = Duration::from_millis(300);
    let mut server = server(
        &Disk::new(folder.path()),
        promised,
        Settings {
            grace,
            ..settings()
        },
    );
    let first = started(&server);
    let body = asked(0).to_string();
    let other = |server: &Running| {
        server
            .client()
            .send("POST", "/v1/completions", body.as_bytes())
    };
    let mut second = other(&server);
    until("nobody makes way", || files(folder.path()) == 1);
    drop(first);
    until("it is still there", || files(folder.path()) == 0);
    let second = crate::client::read(&mut second);
    assert_eq!(text(&second), undisturbed(&[asked(0)])[0]);
    server.idle();
    // A server that does not wait for them leaves nothing behind either.
    let _first = started(&server);
    let _second = started_beside(&server);
    until("nobody makes way", || files(folder.path()) == 1);
    assert!(!server.end());
    server.idle();
    assert_eq!(files(folder.path()), 0);
}

/// Another long answer, which waits.
fn started_beside(server: &Running) -> TcpStream {
    let body = json!({ "prompt": "b", "max_tokens": 4000, "temperature": 0, "policy": "full" });
    server
        .client()
        .send("POST", "/v1/completions", body.to_string().as_bytes())
}
