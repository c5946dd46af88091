//! What is answered: whole, in parts, and by a lone session.

use crate::{PREFILL, Running, TEMPLATE, TOKENIZER, client::Answer, config, lone, story};
use locret_core::{Prefill, Sampling};
use locret_models::{Message, SpecialTokens};
use serde_json::{Value, json};

/// The text of a streamed answer, its end and its usage.
fn streamed(answer: &Answer, chat: bool) -> (String, String, Value) {
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.header("content-type"), Some("text/event-stream"));
    let events = answer.events();
    assert_eq!(events.last().unwrap(), "[DONE]");
    let (mut text, mut finish, mut usage) = (String::new(), String::new(), Value::Null);
    for (i, event) in events[..events.len() - 1].iter().enumerate() {
        let event: Value = serde_json::from_str(event).unwrap();
        if !event["usage"].is_null() {
            usage = event["usage"].clone();
            assert_eq!(event["choices"], json!([]));
            continue;
        }
        let choice = &event["choices"][0];
        let piece = match chat {
            true => &choice["delta"]["content"],
            false => &choice["text"],
        };
        if chat && i == 0 {
            assert_eq!(choice["delta"]["role"], "assistant");
            assert_eq!(event["object"], "chat.completion.chunk");
        }
        text += piece.as_str().unwrap_or_default();
        assert_eq!(finish, "", "nothing comes after the end");
        finish += choice["finish_reason"].as_str().unwrap_or_default();
    }
    (text, finish, usage)
}

#[test]
fn texts_whole_and_in_parts_are_a_lone_sessions() {
    let server = Running::usual();
    let drawn = Sampling {
        temperature: 0.9,
        top_p: 0.8,
        seed: 5,
        ..Sampling::greedy()
    };
    for (words, sampling) in [
        (3, Sampling::greedy()),
        (150, Sampling::greedy()),
        (80, drawn),
    ] {
        let text = story(words);
        let ids = TOKENIZER.encode(&text, SpecialTokens::Plain).unwrap();
        let expected = lone(&[(&ids, PREFILL)], 40, sampling);
        let expected = TOKENIZER.decode(&expected, true);
        let mut ask = json!({
            "model": "random", "prompt": text, "max_tokens": 40,
            "temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed,
        });
        let whole = server.client().post("/v1/completions", &ask).json();
        assert_eq!(whole["choices"][0]["text"], expected);
        assert_eq!(whole["choices"][0]["finish_reason"], "length");
        assert_eq!(whole["object"], "text_completion");
        assert_eq!(whole["usage"]["prompt_tokens"], ids.len());
        assert_eq!(whole["usage"]["completion_tokens"], 40);
        assert_eq!(whole["usage"]["total_tokens"], ids.len() + 40);
        // The same prompt as tokens.
        ask["prompt"] = json!(ids);
        let same = server.client().post("/v1/completions", &ask).json();
        assert_eq!(same["choices"], whole["choices"]);
        assert_ne!(same["id"], whole["id"]);
        ask["stream"] = true.into();
        ask["stream_options"] = json!({ "include_usage": true });
        let answer = server.client().post("/v1/completions", &ask);
        let (parts, finish, usage) = streamed(&answer, false);
        assert_eq!(parts, expected);
        assert_eq!(finish, "length");
        assert_eq!(usage, whole["usage"]);
    }
    server.idle();
}

#[test]
fn conversations_are_read_as_the_template_writes_them() {
    let server = Running::usual();
    let turns = [
        ("system", "You know all rivers. <|im_end|> is no end."),
        ("user", &story(60)),
        ("assistant", "Seven."),
        ("user", "Which ones?"),
    ];
    let messages: Vec<Message> = turns.iter().map(|(r, t)| Message::new(*r, *t)).collect();
    let ids = TEMPLATE.encode(&TOKENIZER, &messages, true).unwrap();
    let system = TEMPLATE.encode(&TOKENIZER, &messages[..1], false).unwrap();
    assert!(ids.starts_with(&system));
    let (first, rest) = ids.split_at(system.len());
    let without_tail = Prefill::new(PREFILL.chunk, 0);
    let prompts = [(first, without_tail), (rest, PREFILL)];
    let expected = lone(&prompts, 30, Sampling::greedy());
    let expected = TOKENIZER.decode(&expected, true);
    let json: Vec<Value> = turns
        .iter()
        .map(|(role, text)| json!({ "role": role, "content": [{ "type": "text", "text": text }] }))
        .collect();
    let mut ask = json!({
        "model": "random", "messages": json, "max_completion_tokens": 30, "temperature": 0,
    });
    let whole = server.client().post("/v1/chat/completions", &ask).json();
    let message = &whole["choices"][0]["message"];
    assert_eq!(message["content"], expected);
    assert_eq!(message["role"], "assistant");
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(whole["usage"]["prompt_tokens"], ids.len());
    ask["stream"] = true.into();
    let answer = server.client().post("/v1/chat/completions", &ask);
    let (parts, finish, usage) = streamed(&answer, true);
    assert_eq!((parts.as_str(), finish.as_str()), (&*expected, "length"));
    assert!(usage.is_null(), "nobody asked for it");
}

#[test]
fn stop_texts_cut_exactly_and_nothing_is_generated_after_them() {
    let server = Running::usual();
    let ids = TOKENIZER.encode(&story(40), SpecialTokens::Plain).unwrap();
    let tokens = lone(&[(&ids, PREFILL)], 60, Sampling::greedy());
    let pieces: Vec<String> = {
        let mut stream = TOKENIZER.decode_stream(true);
        tokens.iter().map(|id| stream.push(*id)).collect()
    };
    let text = pieces.concat();
    // Pieces of text from every tenth token on, that reach into the next one.
    for at in (10..50).step_by(10) {
        let ends = |s: &str| s.chars().last().map(String::from);
        let Some(end) = ends(&pieces[at]) else {
            continue;
        };
        let Some(start) = pieces[at + 1].chars().next() else {
            continue;
        };
        let stop = format!("{end}{start}");
        let first = text.find(&stop).unwrap();
        // The token in which it is complete.
        let mut whole = String::new();
        let needed = pieces.iter().position(|piece| {
            whole += piece;
            whole.contains(&stop)
        });
        let needed = needed.unwrap() + 1;
        let ask = |stream: bool| {
            json!({ "prompt": ids, "max_tokens": 60, "temperature": 0, "stream": stream,
                "stop": ["never in there", stop], "stream_options": { "include_usage": true } })
        };
        let found = server.client().post("/v1/completions", &ask(false)).json();
        assert_eq!(found["choices"][0]["text"], text[..first], "{stop:?}");
        assert_eq!(found["choices"][0]["finish_reason"], "stop");
        assert_eq!(found["usage"]["completion_tokens"], needed);
        let answer = server.client().post("/v1/completions", &ask(true));
        let (parts, finish, usage) = streamed(&answer, false);
        assert_eq!((parts.as_str(), finish.as_str()), (&text[..first], "stop"));
        assert_eq!(usage["completion_tokens"], needed);
    }
    // One that does not come: everything that was held back is there.
    let end: String = text
        .chars()
        .rev()
        .take(3)
        .collect::<Vec<_>>()
        .iter()
        .rev()
        .collect();
    let ask = json!({ "prompt": ids, "max_tokens": 60, "temperature": 0, "stop": end + "!?" });
    let found = server.client().post("/v1/completions", &ask).json();
    assert_eq!(found["choices"][0]["text"], text);
    assert_eq!(found["choices"][0]["finish_reason"], "length");
    server.idle();
}

#[test]
fn requests_choose_policy_and_budget() {
    let server = Running::usual();
    let ids = TOKENIZER.encode(&story(150), SpecialTokens::Plain).unwrap();
    let ask = |more: Value| {
        let mut ask = json!({ "prompt": ids, "max_tokens": 12, "temperature": 0 });
        ask.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        server.client().post("/v1/completions", &ask)
    };
    let lone = |config: &locret_policies::PolicyConfig| {
        let policy = config.build_for(&**crate::MODEL).unwrap();
        let mut session = locret_core::Session::new(crate::MODEL.clone(), policy).unwrap();
        session.prefill(&ids, &PREFILL).unwrap();
        let tokens = session.generate(locret_core::Generate::greedy(12)).unwrap();
        let tokens: Vec<u32> = tokens.map(Result::unwrap).collect();
        TOKENIZER.decode(&tokens, true)
    };
    let text = |answer: Answer| {
        answer.json()["choices"][0]["text"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let half = config().budget("50%".parse().unwrap());
    assert_eq!(text(ask(json!({ "budget": "50%" }))), lone(&half));
    let units = config().budget(locret_core::Budget::Units(20));
    assert_eq!(text(ask(json!({ "budget": 20 }))), lone(&units));
    let full = locret_policies::PolicyConfig::new(locret_policies::Method::Full);
    assert_eq!(text(ask(json!({ "policy": "full" }))), lone(&full));
    let window = locret_policies::PolicyConfig::new(locret_policies::Method::Window)
        .budget(config().budget.unwrap());
    assert_eq!(text(ask(json!({ "policy": "window" }))), lone(&window));
    for bad in [
        json!({ "policy": "windows" }),
        json!({ "policy": "locret" }),
        json!({ "budget": 0 }),
        json!({ "budget": -5 }),
        json!({ "budget": 1u64 << 40 }),
        json!({ "budget": "200%" }),
        json!({ "budget": "1B" }),
        json!({ "budget": {} }),
        json!({ "policy": "full", "budget": 7 }),
    ] {
        let answer = ask(bad.clone());
        assert_eq!(answer.status, 400, "{bad}: {answer:?}");
        assert_eq!(answer.error().1, "invalid_request_error");
    }
}

#[test]
fn the_rest_of_the_interface() {
    let server = Running::usual();
    let models = server.client().get("/v1/models").json();
    assert_eq!(models["object"], "list");
    assert_eq!(models["data"][0]["id"], "random");
    let one = server.client().get("/v1/models/random").json();
    assert_eq!(one, models["data"][0]);
    assert_eq!(server.client().get("/v1/models/other").status, 404);
    assert_eq!(server.client().get("/health").json()["status"], "ok");
    let page = server.client().get("/");
    assert_eq!(page.status, 200);
    assert!(page.body.contains("<form") && page.header("content-security-policy").is_some());
    let ask = json!({ "prompt": "a", "max_tokens": 5, "temperature": 0 });
    for _ in 0..3 {
        assert_eq!(server.client().post("/v1/completions", &ask).status, 200);
    }
    server.idle();
    let metrics = server.client().get("/metrics");
    assert!(
        metrics
            .header("content-type")
            .unwrap()
            .starts_with("text/plain")
    );
    for line in [
        "locret_generated_tokens_total 15",
        "locret_prompt_tokens_total 3",
        "locret_sequences_running 0",
        "locret_memory_promised_bytes 0",
        "locret_requests_total{route=\"/v1/completions\",status=\"200\"} 3",
        "locret_requests_total{route=\"/v1/models/{name}\",status=\"404\"} 1",
        "locret_first_token_seconds_count 3",
        "locret_request_seconds_bucket{le=\"+Inf\"} 3",
    ] {
        assert!(
            metrics.body.lines().any(|l| l == line),
            "{line}: {}",
            metrics.body
        );
    }
}
