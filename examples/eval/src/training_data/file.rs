//! Training texts from files.

use super::{TrainingAnswer, TrainingText};
use crate::{Error, Result, tasks::Frame};
use serde::Deserialize;
use std::{fs, path::Path};

/// One text as files write it.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Line {
    /// ShareGPT's form, as LongAlpaca has it.
    Chat { conversations: Vec<Turn> },
    /// Alpaca's form.
    Instruction {
        instruction: String,
        #[serde(default)]
        input: String,
        output: String,
    },
    /// Ready text with queries.
    Queries {
        prompt: String,
        answers: Vec<TrainingAnswer>,
    },
    /// Ready text with answers.
    Answers {
        prompt: String,
        answers: Vec<String>,
    },
    /// Ready text with one answer.
    One { prompt: String, answer: String },
}

#[derive(Debug, Deserialize)]
struct Turn {
    from: String,
    value: String,
}

/// Reads training texts: JSON lines, or one JSON array, of objects of any of these forms:
///
/// - `{"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}, …]}` (ShareGPT;
///   speakers may also be called `user` and `assistant`): everything up to the last answer is the
///   prompt;
/// - `{"instruction": …, "input": …, "output": …}` (Alpaca; `input` is optional);
/// - `{"prompt": …, "answers": [{"query": …, "answer": …}, …]}`, `{"prompt": …, "answers": [text, …]}`
///   or `{"prompt": …, "answer": text}`: taken as they are.
///
/// The first two are put into the turns of `frame`.
///
/// # Errors
/// [`Error::Read`]; [`Error::Line`] and [`Error::Format`] for what has another form;
/// [`Error::Format`] for a file without a text.
pub fn read(path: &Path, frame: &Frame) -> Result<Vec<TrainingText>> {
    let content = fs::read_to_string(path).map_err(|e| Error::read(path, e))?;
    let mut texts = Vec::new();
    if content.trim_start().starts_with('[') {
        let all: Vec<Line> = serde_json::from_str(&content).map_err(|e| Error::format(path, e))?;
        for (i, line) in all.into_iter().enumerate() {
            let text = line.text(frame);
            texts.push(text.map_err(|m| Error::format(path, format!("item {}: {m}", i + 1)))?);
        }
    } else {
        for (i, line) in content.lines().enumerate() {
            if line.trim().is_empty() {
                continue;
            }
            let at = |message: String| Error::Line {
                path: path.to_owned(),
                line: i + 1,
                message,
            };
            let line: Line = serde_json::from_str(line).map_err(|e| at(e.to_string()))?;
            texts.push(line.text(frame).map_err(at)?);
        }
    }
    if texts.is_empty() {
        return Err(Error::format(path, "there is no text in it"));
    }
    Ok(texts)
}

impl Line {
    fn text(self, frame: &Frame) -> Result<TrainingText, String> {
        let one = |query: String, answer: String| vec![TrainingAnswer { query, answer }];
        Ok(match self {
            Self::Chat { conversations } => {
                let mut prompt = String::new();
                let turns = conversations;
                let mut last: Option<String> = None;
                for turn in turns {
                    let is_user = matches!(turn.from.as_str(), "human" | "user");
                    match (turn.from.as_str(), &last) {
                        // A system message stands with the user's first words.
                        ("system", None) if prompt.is_empty() => {
                            prompt = format!("{}{}\n\n", frame.open, turn.value);
                        }
                        ("human" | "user", None) if prompt.is_empty() => {
                            prompt = format!("{}{}", frame.open, turn.value);
                        }
                        ("human" | "user", None) => prompt += &turn.value,
                        ("human" | "user", Some(answer)) => {
                            prompt += &frame.to_answer;
                            prompt += answer;
                            prompt += &frame.to_user;
                            prompt += &turn.value;
                        }
                        ("gpt" | "assistant", None) if !prompt.is_empty() => {}
                        (from, _) => {
                            return Err(format!("a turn of {from:?} where none belongs"));
                        }
                    }
                    last = (!is_user && turn.from != "system").then_some(turn.value);
                }
                let answer = last.ok_or("the conversation does not end with an answer")?;
                TrainingText {
                    prompt,
                    answers: one(frame.to_answer.clone(), answer),
                    opening: frame.open.clone(),
                }
            }
            Self::Instruction {
                instruction,
                input,
                output,
            } => {
                let gap = if input.is_empty() { "" } else { "\n\n" };
                TrainingText {
                    prompt: [&frame.open, instruction.as_str(), gap, &input].concat(),
                    answers: one(frame.to_answer.clone(), output),
                    opening: frame.open.clone(),
                }
            }
            Self::Queries { prompt, answers } => TrainingText {
                prompt,
                answers,
                opening: String::new(),
            },
            Self::Answers { prompt, answers } => TrainingText {
                prompt,
                answers: (answers.into_iter())
                    .map(|answer| TrainingAnswer {
                        query: String::new(),
                        answer,
                    })
                    .collect(),
                opening: String::new(),
            },
            Self::One { prompt, answer } => TrainingText {
                prompt,
                answers: one(String::new(), answer),
                opening: String::new(),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame() -> Frame {
        Frame {
            open: "<u>".into(),
            to_answer: "<a>".into(),
            to_user: "</a><u>".into(),
            ..Frame::plain("")
        }
    }

    fn read_text(content: &str) -> Result<Vec<TrainingText>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.jsonl");
        fs::write(&path, content).unwrap();
        read(&path, &frame())
    }

    #[test]
    fn every_form_is_read() {
        let chat = r#"{"id": 3, "conversations": [{"from": "human", "value": "A"},
            {"from": "gpt", "value": "B"}, {"from": "human", "value": "C"},
            {"from": "gpt", "value": "D"}]}"#
            .replace('\n', " ");
        let lines = format!(
            "{chat}\n\n{}\n{}\n{}\n{}\n",
            r#"{"instruction": "Do", "output": "Done"}"#,
            r#"{"prompt": "P", "answers": [{"query": "Q", "answer": "R"}, {"answer": "S"}]}"#,
            r#"{"prompt": "P", "answers": ["R", "S"]}"#,
            r#"{"prompt": "P", "answer": "R"}"#,
        );
        let all = read_text(&lines).unwrap();
        let flat: Vec<(&str, Vec<(&str, &str)>)> = (all.iter())
            .map(|t| {
                let answers = t
                    .answers
                    .iter()
                    .map(|a| (a.query.as_str(), a.answer.as_str()));
                (t.prompt.as_str(), answers.collect())
            })
            .collect();
        assert_eq!(
            flat,
            [
                ("<u>A<a>B</a><u>C", vec![("<a>", "D")]),
                ("<u>Do", vec![("<a>", "Done")]),
                ("P", vec![("Q", "R"), ("", "S")]),
                ("P", vec![("", "R"), ("", "S")]),
                ("P", vec![("", "R")]),
            ]
        );
        let array = format!(
            "[{chat}, {}]",
            r#"{"instruction": "Do", "input": "it", "output": "x"}"#
        );
        let all = read_text(&array).unwrap();
        assert_eq!(all[1].prompt, "<u>Do\n\nit");
    }

    #[test]
    fn what_has_another_form_is_an_error_with_its_place() {
        let error =
            read_text("{\"prompt\": \"P\", \"answer\": \"R\"}\n{\"prompt\": 3}").unwrap_err();
        assert!(error.to_string().contains("line 2"), "{error}");
        for bad in [
            r#"{"conversations": [{"from": "gpt", "value": "B"}]}"#,
            r#"{"conversations": [{"from": "human", "value": "B"}]}"#,
            r#"{"conversations": [{"from": "human", "value": "B"}, {"from": "dog", "value": "B"}]}"#,
            "[3]",
            "",
        ] {
            assert!(read_text(bad).is_err(), "{bad}");
        }
    }
}
