//! Results as they are kept.

use super::{Settings, Store};
use crate::{Error, Result, evaluate::Case, files::write_atomically};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
};

/// Where and with what results came about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The model's name.
    pub model: String,
    /// SHA-256 of the model's weights, where they are one file.
    pub model_sha256: Option<String>,
    /// The revision of this repository, with `+` if files were changed.
    pub git: Option<String>,
    /// The version of this crate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Operating system, processor and threads.
    pub machine: String,
}

impl Origin {
    /// Of this machine and this working tree.
    pub fn here(model: String, model_sha256: Option<String>) -> Self {
        let cpu = fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| {
            let line = text.lines().find(|l| l.starts_with("model name"))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        });
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            model,
            model_sha256,
            git: revision(),
            version: Some(env!("CARGO_PKG_VERSION").into()),
            machine: format!(
                "{} {}, {}, {threads} threads",
                std::env::consts::OS,
                std::env::consts::ARCH,
                cpu.as_deref().unwrap_or("unknown processor")
            ),
        }
    }
}

fn revision() -> Option<String> {
    let git = |args: &[&str]| {
        let out = std::process::Command::new("git").args(args).output().ok()?;
        let text = String::from_utf8(out.stdout).ok()?;
        out.status.success().then(|| text.trim().to_owned())
    };
    let revision = git(&["rev-parse", "--short=12", "HEAD"])?;
    let changed = git(&["status", "--porcelain", "--untracked-files=no"])?;
    let mark = if changed.is_empty() { "" } else { "+" };
    Some(format!("{revision}{mark}"))
}

/// A line of the results.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// What the policy was called.
    pub label: String,
    /// The policy.
    pub policy: Settings,
    /// How keys and values are kept.
    pub store: Store,
    /// Tokens of a context.
    pub length: usize,
    /// Seed of the tasks.
    pub seed: u64,
    /// Tokens that were read together.
    pub chunk: usize,
    /// Last tokens of a context that were not evicted.
    pub local: usize,
    /// Whether texts were turns of a chat.
    pub chat: bool,
    /// The task file, where there is one.
    pub tasks_file: Option<PathBuf>,
    /// [`Task::sha256`](crate::tasks::Task::sha256). Results from before it was written down have none, and
    /// are those of no task that can be run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task_sha256: Option<String>,
    /// SHA-256 of the retaining heads, where the policy has any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heads_sha256: Option<String>,
    /// Locret-Q: how many of a query's last tokens stood before its context.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub query_aware: usize,
    /// SHA-256 of the table of budgets, where the policy has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table_sha256: Option<String>,
    /// How the task went.
    pub case: Case,
    /// Where it ran.
    pub origin: Origin,
}

fn is_zero(count: &usize) -> bool {
    *count == 0
}

/// What makes two results the same: everything but the label and where they ran.
pub type Key = String;

impl Record {
    /// Tells this case from all others.
    pub fn key(&self) -> Key {
        let Self {
            policy,
            store,
            length,
            seed,
            chunk,
            local,
            chat,
            tasks_file,
            task_sha256: task,
            heads_sha256: heads,
            query_aware: aware,
            table_sha256: table,
            case,
            origin,
            ..
        } = self;
        let model = origin.model_sha256.as_ref().unwrap_or(&origin.model);
        let id = (&case.task, &case.id);
        let parts = (
            policy, store, length, seed, chunk, local, chat, tasks_file, id, task, model, heads,
            aware, table,
        );
        // None of these types can fail to become JSON.
        serde_json::to_string(&parts).unwrap_or_default()
    }
}

/// Results in a file of JSON lines, to which each new one is appended at once; by default in memory
/// alone.
#[derive(Debug, Default)]
pub struct Journal {
    file: Option<(PathBuf, File)>,
    known: HashMap<Key, Record>,
}

impl Journal {
    /// Opens or makes the file. A last line that was cut off is dropped.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::Write`]; [`Error::Line`] for a complete line that is no result.
    pub fn open(path: &Path) -> Result<Self> {
        let mut text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(Error::read(path, e)),
        };
        let whole = text.rfind('\n').map_or(0, |i| i + 1);
        let cut = whole < text.len();
        text.truncate(whole);
        let records = lines(path, &text)?.into_iter();
        let known = records.map(|record| (record.key(), record)).collect();
        if cut || !path.exists() {
            write_atomically(path, |out| out.write_all(text.as_bytes()))?;
        }
        let file = OpenOptions::new()
            .append(true)
            .open(path)
            .map_err(|e| Error::write(path, e))?;
        Ok(Self {
            file: Some((path.to_owned(), file)),
            known,
        })
    }

    /// The results of a file in their order, without opening it for more. A last line that was cut off is left out.
    ///
    /// # Errors
    /// [`Error::Read`]; [`Error::Line`] for a complete line that is no result.
    pub fn read(path: &Path) -> Result<Vec<Record>> {
        let text = fs::read_to_string(path).map_err(|e| Error::read(path, e))?;
        lines(path, &text[..text.rfind('\n').map_or(0, |i| i + 1)])
    }

    /// The result of a case, if it has been run.
    pub fn get(&self, key: &Key) -> Option<&Record> {
        self.known.get(key)
    }

    /// Adds a result.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn add(&mut self, record: &Record) -> Result<()> {
        if let Some((path, file)) = &mut self.file {
            let line = serde_json::to_string(record).map_err(std::io::Error::from);
            line.and_then(|line| {
                file.write_all(format!("{line}\n").as_bytes())?;
                file.flush()
            })
            .map_err(|e| Error::write(path, e))?;
        }
        self.known.insert(record.key(), record.clone());
        Ok(())
    }
}

fn lines(path: &Path, text: &str) -> Result<Vec<Record>> {
    let record = |line: &str| -> serde_json::Result<Record> {
        let mut value: Value = serde_json::from_str(line)?;
        // From before stores had these: what they are without.
        let quantize = value.pointer_mut("/policy/quantize");
        if let Some(quantize) = quantize.and_then(Value::as_object_mut) {
            quantize.entry("hadamard").or_insert(false.into());
            quantize.entry("first").or_insert(0.into());
        }
        serde_json::from_value(value)
    };
    let parsed = text.lines().enumerate().map(|(i, line)| {
        record(line).map_err(|e| Error::Line {
            path: path.to_owned(),
            line: i + 1,
            message: e.to_string(),
        })
    });
    parsed.collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::evaluate::Answered;
    use locret_core::{Budget, Quantization};
    use locret_policies::{Method, PolicyConfig};

    fn record(label: &str, budget: usize, task: &str, exact: bool, kept: usize) -> Record {
        let policy = match budget {
            0 => PolicyConfig::new(Method::Full),
            n => PolicyConfig::new(Method::Window).budget(Budget::Units(n)),
        };
        let right = if exact { 5 } else { 2 };
        Record {
            label: label.into(),
            policy: Settings::Config(policy),
            store: Store::F32,
            length: 2000,
            seed: 1,
            chunk: 256,
            local: 32,
            chat: false,
            tasks_file: None,
            task_sha256: Some("a task".into()),
            heads_sha256: None,
            query_aware: 0,
            table_sha256: None,
            case: Case {
                id: format!("{task}-{exact}"),
                task: task.into(),
                continuation: task == "perplexity",
                context_tokens: 2000,
                queries: vec![Answered {
                    score: None,
                    exact,
                    right,
                    tokens: 5,
                    nll: 2.5,
                }],
                peak_kv_bytes: kept + 1000,
                kept_kv_bytes: kept,
                curve: vec![(1000, kept), (2000, kept)],
                footprint: Some(kept as f64 / 2e6),
                first_token_seconds: (task != "perplexity").then_some(0.5),
                seconds: 1.0,
            },
            origin: Origin {
                model: "m".into(),
                model_sha256: None,
                git: None,
                version: None,
                machine: "x".into(),
            },
        }
    }

    pub fn records() -> Vec<Record> {
        vec![
            record("full", 0, "facts", true, 1_000_000),
            record("full", 0, "perplexity", false, 1_000_000),
            record("window", 128, "facts", false, 60_000),
            record("window", 128, "facts", true, 60_000),
            record("window", 256, "facts", true, 120_000),
        ]
    }

    #[test]
    fn a_journal_survives_a_cut_line_and_ignores_labels() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("results.jsonl");
        let all = records();
        let mut journal = Journal::open(&path).unwrap();
        for record in &all {
            journal.add(record).unwrap();
        }
        drop(journal);
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), all.len());
        fs::write(&path, &text[..text.len() - 30]).unwrap();
        let mut journal = Journal::open(&path).unwrap();
        let (last, others) = all.split_last().unwrap();
        assert_eq!(journal.get(&last.key()), None);
        let mut renamed = others[0].clone();
        renamed.label = "everything".into();
        renamed.origin.git = Some("abc".into());
        assert!(journal.get(&renamed.key()).is_some());
        renamed.chunk = 128;
        assert!(journal.get(&renamed.key()).is_none());
        renamed.chunk = others[0].chunk;
        renamed.heads_sha256 = Some("other heads".into());
        assert!(journal.get(&renamed.key()).is_none());
        renamed.heads_sha256 = None;
        renamed.table_sha256 = Some("another table".into());
        assert!(journal.get(&renamed.key()).is_none());
        renamed.table_sha256 = None;
        renamed.task_sha256 = Some("another task".into());
        assert!(journal.get(&renamed.key()).is_none());
        journal.add(last).unwrap();
        drop(journal);
        let journal = Journal::open(&path).unwrap();
        assert!(all.iter().all(|r| journal.get(&r.key()) == Some(r)));
        // A line from before tasks were told apart by their text is read, and stands for none.
        let mut old = serde_json::to_value(&all[0]).unwrap();
        assert!(old.as_object_mut().unwrap().remove("task_sha256").is_some());
        fs::write(&path, format!("{old}\n")).unwrap();
        let journal = Journal::open(&path).unwrap();
        assert_eq!(journal.get(&all[0].key()), None);
        // Nor is one of codes from before these were turned one of codes that are.
        let mut coded = all[0].clone();
        if let Settings::Config(config) = &mut coded.policy {
            config.quantize = Some(Quantization::bits(2));
        }
        let mut old = serde_json::to_value(&coded).unwrap();
        let quantize = old["policy"]["quantize"].as_object_mut().unwrap();
        assert!(quantize.remove("hadamard").is_some() && quantize.remove("first").is_some());
        fs::write(
            &path,
            format!("{old}\n{}\n", serde_json::to_string(&coded).unwrap()),
        )
        .unwrap();
        let read = Journal::read(&path).unwrap();
        assert_eq!(read[1], coded);
        assert_ne!(read[0].key(), coded.key());
        fs::write(&path, "{}\n").unwrap();
        assert!(matches!(
            Journal::open(&path),
            Err(Error::Line { line: 1, .. })
        ));
    }
}
