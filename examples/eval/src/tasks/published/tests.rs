use super::{Benchmark, Prompts, Reading, Scorer};
use crate::{
    Error, Result,
    evaluate::Tokeniser,
    tasks::{Frame, Rule, Task},
};
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

#[derive(Deserialize)]
struct Case {
    scorer: Scorer,
    answer: String,
    references: Vec<String>,
    #[serde(default)]
    classes: Vec<String>,
    score: f64,
}

#[test]
fn scores_are_those_of_the_authors_code() {
    let golden = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/src/tasks/published/golden/scores.json"
    );
    let cases: Vec<Case> = serde_json::from_str(&fs::read_to_string(golden).unwrap()).unwrap();
    let mut seen: BTreeMap<String, [usize; 2]> = BTreeMap::new();
    for case in &cases {
        let found = case
            .scorer
            .score(&case.answer, &case.references, &case.classes);
        assert!(
            (found - case.score).abs() < 1e-12,
            "{:?} of {:?} for {:?}: {found}, theirs is {}",
            case.scorer,
            case.answer,
            case.references,
            case.score
        );
        let right = usize::from(case.score > 0.0);
        let counts = seen.entry(format!("{:?}", case.scorer)).or_default();
        counts[right] += 1;
    }
    // All of them, each with right and with wrong answers.
    assert_eq!(seen.len(), 23);
    assert!(
        seen.values()
            .all(|[wrong, right]| *wrong >= 2 && *right >= 3),
        "{seen:?}"
    );
}

/// A token is a character.
struct Characters;

impl Tokeniser for Characters {
    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(text.chars().map(u32::from).collect())
    }

    fn decode(&self, ids: &[u32]) -> Result<String> {
        Ok(ids.iter().filter_map(|id| char::from_u32(*id)).collect())
    }
}

struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, text).unwrap();
        path
    }

    fn prompts(&self, text: &str) -> Prompts {
        Prompts::read(&self.write("prompts.json", text), None).unwrap()
    }
}

fn read(
    benchmark: Benchmark,
    prompts: &Prompts,
    tokens: usize,
    frame: &Frame,
    path: &Path,
) -> Result<Vec<Task>> {
    let reading = Reading {
        benchmark,
        prompts,
        tokens,
        frame,
        tokeniser: &Characters,
    };
    reading.tasks(path, None)
}

fn chat() -> Frame {
    Frame {
        open: "<s><user>".into(),
        to_answer: "</user><assistant>".into(),
        is_chat: true,
        ..Frame::plain("<s>")
    }
}

#[test]
fn longbench_is_read_as_its_authors_read_it() {
    let files = Files::new();
    let lengths = files.write(
        "lengths.json",
        r#"{"hotpotqa": 32, "trec": 64, "dureader": 9}"#,
    );
    let prompts = files.prompts(
        r#"{"hotpotqa": "Read. {context} Q: {input} A:", "trec": "{context}\n{input}", "dureader": "{context}"}"#,
    );
    let prompts = prompts.lengths(&lengths).unwrap();
    let line = r#"{"_id": "7", "input": "who?", "context": "abcdefghijklmnopqrstuvwxyz", "answers": ["me", "I"],
                   "length": 1, "dataset": "x", "language": "en", "all_classes": CLASSES}"#;
    let line = line.replace('\n', " ");
    let qa = files.write("hotpotqa.jsonl", &line.replace("CLASSES", "null"));
    let [task] = &read(Benchmark::LongBench, &prompts, 1000, &chat(), &qa).unwrap()[..] else {
        panic!();
    };
    assert_eq!((task.id.as_str(), task.task.as_str()), ("7", "hotpotqa"));
    assert_eq!(task.context, "<s><user>Read. abcdefghijklmnopqrstuvwxyz");
    let query = &task.queries[0];
    assert_eq!(query.query, " Q: who? A:</user><assistant>");
    let judge = query.judge.as_ref().unwrap();
    assert_eq!(
        (judge.rule, judge.tokens),
        (Rule::Published(Scorer::TokenF1), 32)
    );
    assert_eq!(
        (judge.score("Me."), judge.score("you"), judge.first_line),
        (1.0, 0.0, false)
    );
    // Half of the tokens from the beginning, half from the end of the whole prompt.
    let whole = "Read. abcdefghijklmnopqrstuvwxyz Q: who? A:";
    let [task] = &read(Benchmark::LongBench, &prompts, 33, &chat(), &qa).unwrap()[..] else {
        panic!();
    };
    let due = format!("{}{}", &whole[..16], &whole[whole.len() - 16..]);
    let found = format!("{}{}", task.context, task.queries[0].query);
    assert_eq!(found, format!("<s><user>{due}</user><assistant>"));
    // What is left is not even the question.
    assert!(matches!(
        read(Benchmark::LongBench, &prompts, 12, &chat(), &qa),
        Err(Error::Usage(_))
    ));
    // Examples stay plain text, and of an answer the first line counts.
    let trec = files.write("trec_e.jsonl", &line.replace("CLASSES", r#"["me", "you"]"#));
    let [task] = &read(Benchmark::LongBench, &prompts, 1000, &chat(), &trec).unwrap()[..] else {
        panic!();
    };
    assert_eq!(
        (task.task.as_str(), task.context.as_str()),
        ("trec", "<s>abcdefghijklmnopqrstuvwxyz")
    );
    let judge = task.queries[0].judge.as_ref().unwrap();
    assert_eq!(
        (judge.score("it is me\nyou"), judge.score("me or you")),
        (1.0, 0.5)
    );
    for (name, found) in [("dureader.jsonl", "Chinese"), ("news.jsonl", "tokens")] {
        let other = files.write(name, &line.replace("CLASSES", "null"));
        let error = read(Benchmark::LongBench, &prompts, 1000, &chat(), &other).unwrap_err();
        assert!(
            matches!(&error, Error::Usage(text) if text.contains(found)),
            "{error}"
        );
    }
    let broken = files.write(
        "hotpotqa.jsonl",
        &format!("{}\n{{}}", line.replace("CLASSES", "null")),
    );
    let error = read(Benchmark::LongBench, &prompts, 1000, &chat(), &broken).unwrap_err();
    assert!(matches!(error, Error::Line { line: 2, .. }), "{error}");
}

#[test]
fn infinitebench_is_read_as_its_authors_read_it() {
    let files = Files::new();
    let prompts = files.prompts(
        r#"{"passkey": "Find. {context}\n{input} Key:", "code_run": "{context} {func}: {func_call}", "math_find":
            "{prefix}\n{context}\n{input}", "code_debug": "{context} A. {OPTION_A} B. {OPTION_B} C. {OPTION_C} D. {OPTION_D}",
            "longbook_qa_eng": "{context} {question}", "math_calc": "{context}"}"#,
    );
    let frame = Frame::plain("<s>");
    let one = |name: &str, line: &str| -> Result<Task> {
        let path = files.write(name, line);
        read(Benchmark::InfiniteBench, &prompts, 1000, &frame, &path).map(|mut all| all.remove(0))
    };
    let task = one(
        "passkey.jsonl",
        r#"{"id": 3, "context": "c", "input": "What?", "answer": ["71432"], "options": []}"#,
    );
    let task = task.unwrap();
    assert_eq!(
        (task.id.as_str(), task.context.as_str()),
        ("3", "<s>Find. c")
    );
    assert_eq!(task.queries[0].query, "\nWhat? Key:");
    assert_eq!(task.queries[0].answer, " 71432");
    let judge = task.queries[0].judge.as_ref().unwrap();
    assert_eq!((judge.score("71432."), judge.tokens), (1.0, 6));
    let run = one(
        "code_run.jsonl",
        r#"{"context": "def", "input": "the value of func_12(-3). func_1(2)", "answer": -7}"#,
    );
    let run = run.unwrap();
    assert_eq!(
        (run.id.as_str(), run.queries[0].query.as_str()),
        ("0", " func_12: func_12(-3)")
    );
    assert_eq!(
        run.queries[0].judge.as_ref().unwrap().score("it is -7."),
        1.0
    );
    let find = one(
        "math_find.jsonl",
        r#"{"context": "[1, 2.5]", "input": "One number. The Second largest number of the list is: ", "answer": 2.5}"#,
    );
    let find = find.unwrap();
    assert!(
        find.context
            .starts_with("<s>What is the second largest number in"),
        "{}",
        find.context
    );
    assert_eq!(find.queries[0].judge.as_ref().unwrap().score("2.5"), 1.0);
    let debug = one(
        "code_debug.jsonl",
        r#"{"context": "code", "input": "", "answer": ["g"], "options": ["f", "g", "h", "i"]}"#,
    );
    let debug = debug.unwrap();
    assert_eq!(debug.queries[0].query, " A. f B. g C. h D. i");
    let judge = debug.queries[0].judge.as_ref().unwrap();
    assert_eq!(
        (
            judge.score("B."),
            judge.score("answer: g()"),
            judge.score("A.")
        ),
        (1.0, 1.0, 0.0)
    );
    let calc = one(
        "math_calc.jsonl",
        r#"{"context": "1 + 2 - 1", "input": "", "answer": [3, 2]}"#,
    )
    .unwrap();
    assert_eq!(calc.queries[0].answer, " [3, 2]");
    assert_eq!(calc.queries[0].judge.as_ref().unwrap().score("[3, 1]"), 0.5);
    for (name, line, found) in [
        (
            "code_run.jsonl",
            r#"{"context": "", "input": "func_(3) func_1()", "answer": 1}"#,
            "called",
        ),
        (
            "math_find.jsonl",
            r#"{"context": "", "input": "The", "answer": 1}"#,
            "sought",
        ),
        (
            "code_debug.jsonl",
            r#"{"context": "", "answer": "x", "options": ["a", "b"]}"#,
            "four options",
        ),
        (
            "code_debug.jsonl",
            r#"{"context": "", "answer": "x", "options": ["a", "b", "c", "d"]}"#,
            "none of the options",
        ),
        (
            "passkey.jsonl",
            r#"{"context": "", "answer": []}"#,
            "no answer",
        ),
        ("songs.jsonl", r#"{"context": "", "answer": "a"}"#, "songs"),
        (
            "kv_retrieval.jsonl",
            r#"{"context": "", "answer": "a"}"#,
            "no prompt",
        ),
        ("passkey.jsonl", "", "no tasks"),
    ] {
        let error = one(name, line).unwrap_err().to_string();
        assert!(error.contains(found), "{error}");
    }
}

#[test]
fn leval_longbench2_and_ruler_are_read_as_their_authors_read_them() {
    let files = Files::new();
    let frame = chat();
    let template = "Document: {document} I: {inst} ({words})";
    let prompts = files.prompts(&format!(
        "{{\"financial_qa\": \"{template}\", \"codeU\": \"{template}\"}}"
    ));
    let line = r#"{"instructions": ["What?", "Who?"], "outputs": ["so it is", "me"], "input": "INPUT", "source": "s",
                   "evaluation": "f1"}"#;
    let line = line.replace('\n', " ");
    let path = files.write("financial_qa.jsonl", &line);
    let [task] = &read(Benchmark::LEval, &prompts, 1000, &frame, &path).unwrap()[..] else {
        panic!();
    };
    assert_eq!(task.context, "<s><user>Document: INPUT");
    let queries: Vec<&str> = task.queries.iter().map(|q| q.query.as_str()).collect();
    assert_eq!(
        queries,
        [
            " I: What? (3)</user><assistant>",
            " I: Who? (1)</user><assistant>"
        ]
    );
    assert_eq!(
        task.queries[0].judge.as_ref().unwrap().score("It is so!"),
        1.0
    );
    // Words from the beginning of a document, and from the end of a program.
    let words: Vec<String> = (0..400).map(|i| format!("w{i}")).collect();
    let long = line.replace("INPUT", &words.join(" "));
    for (name, evaluation, first, last) in
        [("financial_qa", "f1", 0, 149), ("codeU", "exam", 250, 399)]
    {
        let text = long.replace("\"f1\"", &format!("\"{evaluation}\""));
        let path = files.write(&format!("{name}.jsonl"), &text);
        // 900 tokens: of 900 words, 650, 400 and 150 the last fit.
        let tasks = read(Benchmark::LEval, &prompts, 900 + 512, &frame, &path).unwrap();
        let found: Vec<&str> = tasks[0].context.split(' ').skip(1).collect();
        assert_eq!(
            (found[0], *found.last().unwrap()),
            (words[first].as_str(), words[last].as_str())
        );
    }
    let judged = files.write("financial_qa.jsonl", &line.replace("\"f1\"", "\"LLM\""));
    assert!(matches!(
        read(Benchmark::LEval, &prompts, 1000, &frame, &judged),
        Err(Error::Usage(_))
    ));

    let shot = files.write(
        "0shot.txt",
        "Text: $DOC$ Q: $Q$ (A) $C_A$ (B) $C_B$ (C) $C_C$ (D) $C_D$",
    );
    let prompts = Prompts::read(&shot, None).unwrap();
    let item = r#"[{"_id": "x", "domain": "d", "sub_domain": "s", "difficulty": "easy", "length": "short",
                    "question": " q ", "choice_A": "a", "choice_B": "b", "choice_C": "c", "choice_D": "d",
                    "answer": "C", "context": " c {x} "}]"#;
    let path = files.write("data.json", item);
    let [task] = &read(Benchmark::LongBench2, &prompts, 1000, &frame, &path).unwrap()[..] else {
        panic!();
    };
    assert_eq!(task.context, "<s><user>Text: c {x}");
    assert_eq!(
        task.queries[0].query,
        " Q: q (A) a (B) b (C) c (D) d</user><assistant>"
    );
    assert_eq!(
        task.queries[0]
            .judge
            .as_ref()
            .unwrap()
            .score("The correct answer is (C)."),
        1.0
    );

    let prompts = Prompts::default();
    let whole = r#"{"index": 4, "input": "text and question", "outputs": ["1", "2"], "length": 9, "answer_prefix": " They are"}"#;
    let apart = r#"{"context": "text", "question": "why?", "answer_prefix": "So", "answer": ["x"], "task": "qa_1", "max_new_tokens": 32}"#;
    let path = files.write("niah_multivalue.jsonl", &format!("{whole}\n\n{apart}"));
    let tasks = read(Benchmark::Ruler, &prompts, 1000, &frame, &path).unwrap();
    assert_eq!(tasks[0].context, "<s><user>text and question");
    assert_eq!(tasks[0].queries[0].query, "</user><assistant> They are");
    let judge = tasks[0].queries[0].judge.as_ref().unwrap();
    assert_eq!((judge.score("1"), judge.tokens), (0.5, 128));
    assert_eq!(
        (tasks[1].task.as_str(), tasks[1].context.as_str()),
        ("qa_1", "<s><user>text")
    );
    assert_eq!(tasks[1].queries[0].query, "why?</user><assistant>So");
    let path = files.write("songs.jsonl", whole);
    assert!(matches!(
        read(Benchmark::Ruler, &prompts, 1000, &frame, &path),
        Err(Error::Usage(_))
    ));
    for name in ["ruler", "infinitebench", "longbench", "longbench2", "leval"] {
        assert_eq!(name.parse::<Benchmark>().unwrap().to_string(), name);
    }
    assert!(matches!("x".parse::<Benchmark>(), Err(Error::Usage(_))));
}
