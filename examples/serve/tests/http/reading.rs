//! A text that is watched while it is read.

use crate::{Running, story};
use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Value, json};

#[test]
fn what_survives_is_told_after_every_chunk() {
    let server = Running::usual();
    let text = story(150);
    let ask =
        json!({ "text": text, "question": "Which river?", "max_tokens": 8, "temperature": 0 });
    let answer = server.client().post("/v1/read", &ask);
    assert_eq!(answer.status, 200, "{answer:?}");
    let events: Vec<Value> = answer
        .events()
        .iter()
        .map(|event| serde_json::from_str(event).unwrap())
        .collect();
    let pieces: Vec<&str> = events[0]["pieces"]
        .as_array()
        .unwrap()
        .iter()
        .map(|piece| piece.as_str().unwrap())
        .collect();
    let whole = pieces.concat();
    assert!(whole.contains(&text) && whole.contains("Which river?"));
    let frames: Vec<&Value> = events.iter().filter(|e| !e["kept"].is_null()).collect();
    assert!(!frames.is_empty());
    let mut before = 0;
    for frame in &frames {
        let done = frame["done"].as_u64().unwrap() as usize;
        assert!(done > before && done <= pieces.len());
        before = done;
        assert_eq!(frame["tokens"], pieces.len());
        // Two layers of two heads: a quarter of 255, rounded up, for each in which a token is kept.
        let kept = BASE64_STANDARD
            .decode(frame["kept"].as_str().unwrap())
            .unwrap();
        assert_eq!(kept.len(), done);
        let units: usize = kept.iter().map(|k| usize::from(*k) * 4 / 255).sum();
        assert!(units <= 4 * (48 + 8), "{units}");
        assert!(done < 48 || units >= 4 * 48, "{units} of {done}");
        let bytes = frame["kv_bytes"].as_u64().unwrap() as usize;
        // A unit has a key and a value of 16 numbers; single tokens come with a reserve.
        assert!(bytes >= units * 2 * 16 * 4, "{bytes}");
        assert_eq!(frame["full_bytes"], done * 4 * 2 * 16 * 4);
    }
    // Whoever fetches slowly sees fewer of them, but always the last one.
    assert_eq!(before, pieces.len());
    let end = &events.last().unwrap()["end"];
    assert_eq!(end["prompt_tokens"], pieces.len());
    assert_eq!(end["completion_tokens"], 8);
    server.idle();
    let bad = json!({ "text": 7 });
    assert_eq!(server.client().post("/v1/read", &bad).status, 400);
    let session = json!({ "text": "a", "session": "s" });
    assert_eq!(server.client().post("/v1/read", &session).status, 400);
    let empty = server
        .client()
        .post("/v1/read", &json!({ "text": "", "max_tokens": 1 }));
    assert_eq!(empty.status, 200);
}
