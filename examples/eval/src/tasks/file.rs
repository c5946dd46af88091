//! Tasks as JSON lines: one object a line, blank lines ignored.

use super::Task;
use crate::{Error, Result};
use std::{collections::HashMap, fs, path::Path};

/// Reads the tasks of a file.
///
/// # Errors
/// [`Error::Read`]; [`Error::Line`] with the line's number for anything that is not a task: bad
/// JSON, a missing field, an empty context, no query, an empty answer, a judge with nothing to look for, or an
/// id that another line of the same kind has; [`Error::Usage`] for a file without tasks.
pub fn read(path: &Path) -> Result<Vec<Task>> {
    let text = fs::read_to_string(path).map_err(|e| Error::read(path, e))?;
    let mut tasks = Vec::new();
    let mut ids: HashMap<(String, String), usize> = HashMap::new();
    for (number, line) in text.lines().enumerate().map(|(i, l)| (i + 1, l)) {
        if line.trim().is_empty() {
            continue;
        }
        let at = |message: String| Error::Line {
            path: path.to_owned(),
            line: number,
            message,
        };
        let task: Task = serde_json::from_str(line).map_err(|e| at(e.to_string()))?;
        if task.context.is_empty() {
            return Err(at("the context is empty".into()));
        }
        if task.queries.is_empty() {
            return Err(at("there is no query".into()));
        }
        if let Some(i) = task.queries.iter().position(|q| q.answer.is_empty()) {
            return Err(at(format!("the answer of query {} is empty", i + 1)));
        }
        let judged = task.queries.iter().map(|q| q.judge.as_ref());
        let mut empty = judged.map(|j| j.is_some_and(|j| j.references.is_empty() || j.tokens == 0));
        if let Some(i) = empty.position(|empty| empty) {
            let message = format!("query {} is judged by no references, or no tokens", i + 1);
            return Err(at(message));
        }
        let key = (task.task.clone(), task.id.clone());
        if let Some(first) = ids.insert(key, number) {
            return Err(at(format!(
                "the id {:?} of task {:?} is that of line {first} as well",
                task.id, task.task
            )));
        }
        tasks.push(task);
    }
    if tasks.is_empty() {
        return Err(Error::Usage(format!("{}: no tasks", path.display())));
    }
    Ok(tasks)
}

/// Writes tasks to a file, which is replaced as a whole or not at all.
///
/// # Errors
/// [`Error::Write`].
pub fn write(path: &Path, tasks: &[Task]) -> Result<()> {
    crate::files::write_atomically(path, |out| {
        for task in tasks {
            serde_json::to_writer(&mut *out, task)?;
            out.write_all(b"\n")?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tasks::Query;

    fn fails(text: &str) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tasks.jsonl");
        fs::write(&path, text).unwrap();
        read(&path).unwrap_err().to_string()
    }

    #[test]
    fn what_is_written_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tasks.jsonl");
        let tasks = vec![
            Task {
                id: "a".into(),
                task: "passkey".into(),
                context: "line\none \"two\" \u{1F600}<|im_end|>".into(),
                queries: vec![Query::exact("?", " 1")],
            },
            Task {
                id: "a".into(),
                task: "perplexity".into(),
                context: "x".into(),
                queries: vec![Query {
                    judge: None,
                    query: String::new(),
                    answer: "y".into(),
                }],
            },
        ];
        write(&path, &tasks).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), 2);
        assert_eq!(read(&path).unwrap(), tasks);
        assert!(!tasks[0].is_continuation() && tasks[1].is_continuation());
    }

    #[test]
    fn errors_name_the_line() {
        let good = r#"{"id":"1","task":"t","context":"c","queries":[{"query":"q","answer":"a"}]}"#;
        let all = [
            (format!("{good}\n\n{{\"id\": 1"), "line 3"),
            (r#"{"id":"1","task":"t","context":"c"}"#.into(), "queries"),
            (good.replace("\"c\"", "\"\""), "context is empty"),
            (good.replace("\"a\"", "\"\""), "answer of query 1 is empty"),
            (
                good.replace(r#"{"query":"q","answer":"a"}"#, ""),
                "no query",
            ),
            (format!("{good}\n{good}"), "line 1 as well"),
            (String::new(), "no tasks"),
        ];
        for (text, expected) in all {
            let message = fails(&text);
            assert!(message.contains(expected), "{message}");
        }
        let missing = read(Path::new("/nowhere/tasks.jsonl")).unwrap_err();
        assert!(matches!(missing, Error::Read { .. }));
    }
}
