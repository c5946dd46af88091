//! A benchmark's own files as tasks.

use super::{Prompts, Scorer, prompts::filled};
use crate::{
    Error, Result,
    evaluate::Tokeniser,
    tasks::{Frame, Judge, Query, Rule, Task},
};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;
use std::{fmt, fs, path::Path, str::FromStr};

/// A benchmark whose files people have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Benchmark {
    /// RULER (arXiv 2404.06654): what its generators write, or the files in which the question stands apart.
    Ruler,
    /// ∞Bench (arXiv 2402.13718).
    InfiniteBench,
    /// LongBench (arXiv 2308.14508).
    LongBench,
    /// LongBench v2 (arXiv 2412.15204).
    LongBench2,
    /// L-Eval (arXiv 2307.11088).
    LEval,
}

const NAMES: [(&str, Benchmark); 5] = [
    ("ruler", Benchmark::Ruler),
    ("infinitebench", Benchmark::InfiniteBench),
    ("longbench", Benchmark::LongBench),
    ("longbench2", Benchmark::LongBench2),
    ("leval", Benchmark::LEval),
];

impl fmt::Display for Benchmark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let own = NAMES.iter().find(|(_, benchmark)| benchmark == self);
        f.write_str(own.map_or("", |(name, _)| name))
    }
}

impl FromStr for Benchmark {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let own = NAMES.iter().find(|(name, _)| *name == text);
        own.map(|(_, benchmark)| *benchmark).ok_or_else(|| {
            let names: Vec<&str> = NAMES.iter().map(|(name, _)| *name).collect();
            let names = names.join(", ");
            Error::Usage(format!("unknown benchmark {text:?}: there are {names}"))
        })
    }
}

/// How files become tasks.
pub struct Reading<'a> {
    /// What they are files of.
    pub benchmark: Benchmark,
    /// Its prompts. RULER's files have theirs in them.
    pub prompts: &'a Prompts,
    /// Tokens of a prompt, at most: the middle of a longer one is left out (of L-Eval's documents the end, or of
    /// programs the beginning).
    pub tokens: usize,
    /// How prompts are put to the model; LongBench's examples and programs stay plain text.
    pub frame: &'a Frame,
    /// What counts tokens.
    pub tokeniser: &'a dyn Tokeniser,
}

impl fmt::Debug for Reading<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reading")
            .field("benchmark", &self.benchmark)
            .field("tokens", &self.tokens)
            .finish_non_exhaustive()
    }
}

/// A record of any benchmark, not yet a prompt.
struct Sample {
    id: String,
    /// What stands for what in the template, the context first.
    values: Vec<(&'static str, String)>,
    judge: Judge,
    /// What is expected to follow, for its probability.
    answer: String,
}

#[derive(Deserialize)]
struct RulerLine {
    index: Option<Value>,
    input: Option<String>,
    outputs: Option<Vec<String>>,
    answer_prefix: Option<String>,
    context: Option<String>,
    question: Option<String>,
    answer: Option<Vec<String>>,
    task: Option<String>,
    max_new_tokens: Option<usize>,
}

#[derive(Deserialize)]
struct InfiniteLine {
    id: Option<Value>,
    context: String,
    #[serde(default)]
    input: String,
    answer: Value,
    #[serde(default)]
    options: Option<Vec<String>>,
}

#[derive(Deserialize)]
struct LongLine {
    #[serde(rename = "_id")]
    id: String,
    input: String,
    context: String,
    answers: Vec<String>,
    all_classes: Option<Vec<String>>,
}

#[derive(Deserialize)]
struct Long2Line {
    #[serde(rename = "_id")]
    id: String,
    question: String,
    #[serde(rename = "choice_A")]
    a: String,
    #[serde(rename = "choice_B")]
    b: String,
    #[serde(rename = "choice_C")]
    c: String,
    #[serde(rename = "choice_D")]
    d: String,
    answer: String,
    context: String,
}

#[derive(Deserialize)]
struct EvalLine {
    instructions: Vec<String>,
    outputs: Vec<String>,
    input: String,
    evaluation: String,
}

/// The records of a file: an object a line, or an array of them.
fn records<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    let text = fs::read_to_string(path).map_err(|e| Error::read(path, e))?;
    if text.trim_start().starts_with('[') {
        return serde_json::from_str(&text).map_err(|e| Error::format(path, e));
    }
    let lines = text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty());
    let parsed = lines.map(|(i, line)| {
        serde_json::from_str(line).map_err(|e| Error::Line {
            path: path.to_owned(),
            line: i + 1,
            message: e.to_string(),
        })
    });
    parsed.collect()
}

/// A value as text: numbers as they stand there.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// A list of values, or one, as texts; of a list of lists the first one.
fn list(value: &Value) -> Vec<String> {
    match value {
        Value::Array(all) => match all.first() {
            Some(inner @ Value::Array(_)) => list(inner),
            _ => all.iter().map(plain).collect(),
        },
        one => vec![plain(one)],
    }
}

impl Reading<'_> {
    /// The tasks of a file. `task` is what the benchmark calls them; by default the file's name.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::Line`], [`Error::Format`]; [`Error::Usage`] for a task that the benchmark has not, or
    /// that is judged by a model, or in Chinese words; those of the tokeniser.
    pub fn tasks(&self, path: &Path, task: Option<&str>) -> Result<Vec<Task>> {
        let stem = path.file_stem().and_then(|stem| stem.to_str());
        let task = task.or(stem).unwrap_or("");
        // LongBench-E has the same tasks.
        let task = match self.benchmark {
            Benchmark::LongBench => task.strip_suffix("_e").unwrap_or(task),
            _ => task,
        };
        let tasks: Result<Vec<Task>> = match self.benchmark {
            Benchmark::Ruler => {
                let lines = records::<RulerLine>(path)?.into_iter().enumerate();
                lines.map(|(i, line)| self.ruler(line, task, i)).collect()
            }
            Benchmark::InfiniteBench => {
                let lines = records::<InfiniteLine>(path)?.into_iter().enumerate();
                let samples = lines.map(|(i, line)| infinite(line, task, i));
                samples.map(|sample| self.one(sample?, task)).collect()
            }
            Benchmark::LongBench => {
                let generate = self.prompts.generate(task).ok_or_else(|| {
                    Error::Usage(format!("nothing says how many tokens {task} generates"))
                })?;
                let lines = records::<LongLine>(path)?.into_iter();
                let samples = lines.map(|line| long(line, task, generate));
                samples.map(|sample| self.one(sample?, task)).collect()
            }
            Benchmark::LongBench2 => {
                let lines = records::<Long2Line>(path)?.into_iter();
                lines.map(|line| self.one(long2(line), task)).collect()
            }
            Benchmark::LEval => {
                let lines = records::<EvalLine>(path)?.into_iter().enumerate();
                lines.map(|(i, line)| self.eval(line, task, i)).collect()
            }
        };
        let tasks = tasks?;
        match tasks.is_empty() {
            true => Err(Error::Usage(format!("{}: no tasks", path.display()))),
            false => Ok(tasks),
        }
    }

    fn template(&self, task: &str) -> Result<&str> {
        self.prompts
            .template(task)
            .ok_or_else(|| Error::Usage(format!("there is no prompt for {task:?}")))
    }

    /// A prompt around a sample, short enough, as a task.
    fn one(&self, sample: Sample, task: &str) -> Result<Task> {
        let marks: Vec<(&str, &str)> = (sample.values.iter())
            .map(|(mark, value)| (*mark, value.as_str()))
            .collect();
        let braces = self.benchmark != Benchmark::LongBench2;
        let wrong = |e| Error::Usage(format!("{task}: {e}"));
        let [context, query] = filled(self.template(task)?, &marks, braces).map_err(wrong)?;
        let context = self.shortened(context, &query, &sample.id)?;
        let plain = self.benchmark == Benchmark::LongBench
            && matches!(
                task,
                "trec" | "triviaqa" | "samsum" | "lsht" | "lcc" | "repobench-p"
            );
        Ok(self.framed(
            sample.id,
            task,
            context,
            vec![(query, sample.answer, sample.judge)],
            plain,
        ))
    }

    /// A context and what is asked, in the model's own frame.
    fn framed(
        &self,
        id: String,
        task: &str,
        context: String,
        asked: Vec<(String, String, Judge)>,
        plain: bool,
    ) -> Task {
        let chat = self.frame.is_chat && !plain;
        let (open, close) = match chat {
            true => (self.frame.open.as_str(), self.frame.to_answer.as_str()),
            false => (self.frame.begin.as_str(), ""),
        };
        let query = |(query, answer, judge): (String, String, Judge)| {
            let query = query + close;
            let gap = if query.ends_with(char::is_whitespace) {
                ""
            } else {
                " "
            };
            Query {
                answer: format!("{gap}{answer}"),
                query,
                judge: Some(judge),
            }
        };
        Task {
            id,
            task: task.into(),
            context: format!("{open}{context}"),
            queries: asked.into_iter().map(query).collect(),
        }
    }

    /// A context whose prompt has no more tokens than there may be: the middle of the whole prompt is left out.
    fn shortened(&self, context: String, query: &str, id: &str) -> Result<String> {
        let whole = format!("{context}{query}");
        let ids = self.tokeniser.encode(&whole)?;
        if ids.len() <= self.tokens {
            return Ok(context);
        }
        let half = self.tokens / 2;
        let last = match self.benchmark {
            Benchmark::LongBench => half,
            // Theirs round the other way there.
            _ => self.tokens - half,
        };
        let (first, last) = (&ids[..half], &ids[ids.len() - last..]);
        let cut = match self.benchmark {
            Benchmark::LongBench => self.tokeniser.decode(first)? + &self.tokeniser.decode(last)?,
            _ => self.tokeniser.decode(&[first, last].concat())?,
        };
        cut.strip_suffix(query).map(str::to_owned).ok_or_else(|| {
            let tokens = self.tokens;
            Error::Usage(format!(
                "{id}: of {tokens} tokens the question takes more than half"
            ))
        })
    }

    fn ruler(&self, line: RulerLine, task: &str, number: usize) -> Result<Task> {
        let task = line.task.as_deref().unwrap_or(task);
        let (rule, generate) = match task {
            "vt" => (Rule::All, 30),
            "cwe" => (Rule::All, 120),
            "fwe" => (Rule::All, 50),
            "qa_1" | "qa_2" => (Rule::Any, 32),
            niah if niah.starts_with("niah_") => (Rule::All, 128),
            other => return Err(unknown("RULER", other)),
        };
        let generate = line.max_new_tokens.unwrap_or(generate);
        let prefix = line.answer_prefix.unwrap_or_default();
        let (context, query) = match (line.context, line.input) {
            (Some(context), _) => (context, line.question.unwrap_or_default()),
            (None, Some(input)) => (input, String::new()),
            (None, None) => return Err(Error::Usage(format!("{task} {number}: no text"))),
        };
        let references = line.outputs.or(line.answer).unwrap_or_default();
        let answer = match rule {
            Rule::Any => references.first().cloned().unwrap_or_default(),
            _ => references.join(", "),
        };
        if answer.is_empty() {
            return Err(Error::Usage(format!("{task} {number}: no answer")));
        }
        let id = line.index.as_ref().map_or(number.to_string(), plain);
        let judge = Judge::new(rule, references, generate);
        // What the answer begins with comes after the turn.
        let context = self.shortened(context, &query, &id)?;
        let mut made = self.framed(id, task, context, vec![(query, answer, judge)], false);
        for query in &mut made.queries {
            query.query += &prefix;
        }
        Ok(made)
    }

    fn eval(&self, line: EvalLine, task: &str, number: usize) -> Result<Task> {
        let scorer = match (line.evaluation.as_str(), task) {
            ("exam", "quality" | "tpo") => Scorer::ExamLetter,
            ("exam", "coursera") => Scorer::ExamLetters,
            ("exam", task) if task.starts_with("gsm") => Scorer::ExamNumber,
            ("exam", task) if task.to_lowercase().starts_with("codeu") => Scorer::ExamCode,
            ("exam", task) if task.starts_with("topic_retrieval") => Scorer::ExamText,
            ("exam", "sci_fi") => {
                return Err(Error::Usage(
                    "sci_fi is asked twice, and is not read".into(),
                ));
            }
            ("f1", _) => Scorer::TokenF1,
            ("rouge", _) => Scorer::RougeL,
            ("LLM" | "human", task) => {
                return Err(Error::Usage(format!(
                    "{task} is judged by a model or people"
                )));
            }
            (_, other) => return Err(unknown("L-Eval", other)),
        };
        let id = number.to_string();
        if line.instructions.is_empty() || line.instructions.len() != line.outputs.len() {
            return Err(Error::Usage(format!(
                "{task} {id}: not one output an instruction"
            )));
        }
        let document = self.document(&line.input, scorer == Scorer::ExamCode)?;
        let template = self.template(task)?;
        let mut context = String::new();
        let mut asked = Vec::with_capacity(line.outputs.len());
        for (instruction, output) in line.instructions.iter().zip(line.outputs) {
            let words = output.split_whitespace().count().to_string();
            let marks = [
                ("{document}", document.as_str()),
                ("{inst}", instruction),
                ("{words}", &words),
            ];
            let wrong = |e| Error::Usage(format!("{task}: {e}"));
            let [before, after] = filled(template, &marks, true).map_err(wrong)?;
            if !context.is_empty() && context != before {
                let found =
                    "the instruction stands before the document, which is then another each time";
                return Err(Error::Usage(format!("{task}: {found}")));
            }
            context = before;
            let answer = output.trim().to_owned();
            let judge = Judge::new(Rule::Published(scorer), vec![output], 512);
            asked.push((after, answer, judge));
        }
        Ok(self.framed(id, task, context, asked, false))
    }

    /// The beginning of a document that is too long, or the end of a program, as L-Eval cuts them: by words, 250 fewer
    /// each time.
    fn document(&self, text: &str, code: bool) -> Result<String> {
        let most = self.tokens.saturating_sub(512);
        let mut document = text.to_owned();
        let mut fewer = 0;
        while self.tokeniser.encode(&document)?.len() > most {
            let words: Vec<&str> = document.split(' ').collect();
            let left = most.saturating_sub(fewer);
            if left == 0 {
                return Err(Error::Usage(format!(
                    "a document does not fit into {most} tokens"
                )));
            }
            let kept = match code {
                true => &words[words.len().saturating_sub(left)..],
                false => &words[..left.min(words.len())],
            };
            document = kept.join(" ");
            fewer += 250;
        }
        Ok(document)
    }
}

fn unknown(benchmark: &str, task: &str) -> Error {
    Error::Usage(format!("{benchmark} has no task {task:?} that can be read"))
}

fn infinite(line: InfiniteLine, task: &str, number: usize) -> Result<Sample> {
    let id = line.id.as_ref().map_or(number.to_string(), plain);
    let at = |message: &str| Error::Usage(format!("{task} {id}: {message}"));
    let (scorer, generate) = match task {
        "passkey" => (Scorer::FirstDigits, 6),
        "number_string" => (Scorer::FirstDigits, 12),
        "kv_retrieval" => (Scorer::Word, 50),
        "longbook_sum_eng" => (Scorer::RougeLSum, 1200),
        "longbook_choice_eng" => (Scorer::Option, 40),
        "longbook_qa_eng" => (Scorer::TokenF1, 40),
        "longbook_qa_chn" => (Scorer::CharacterF1, 40),
        "longdialogue_qa_eng" => (Scorer::Name, 40),
        "math_find" => (Scorer::FirstNumber, 3),
        "math_calc" => (Scorer::Beginning, 30_000),
        "code_run" => (Scorer::LastNumber, 5),
        "code_debug" => (Scorer::Function, 5),
        other => return Err(unknown("∞Bench", other)),
    };
    let mut references = list(&line.answer);
    if references.first().is_none_or(String::is_empty) {
        return Err(at("no answer"));
    }
    let mut values = vec![("{context}", line.context)];
    if matches!(task, "longbook_choice_eng" | "code_debug") {
        let options = line.options.unwrap_or_default();
        let [a, b, c, d] = <[String; 4]>::try_from(options).map_err(|_| at("not four options"))?;
        if references.len() == 1 {
            let place = [&a, &b, &c, &d]
                .iter()
                .position(|option| **option == references[0]);
            let place = place.ok_or_else(|| at("the answer is none of the options"))?;
            references.push(["A", "B", "C", "D"][place].into());
        }
        values.extend([
            ("{OPTION_A}", a),
            ("{OPTION_B}", b),
            ("{OPTION_C}", c),
            ("{OPTION_D}", d),
        ]);
    }
    match task {
        "code_run" => {
            let call = call(&line.input).ok_or_else(|| at("no function is called"))?;
            let name = call.split('(').next().unwrap_or("").to_owned();
            values.extend([("{func_call}", call), ("{func}", name)]);
        }
        "math_find" => {
            let what = sought(&line.input).ok_or_else(|| at("nothing is sought"))?;
            values.push(("{prefix}", format!("What is {what} in the following list?")));
        }
        _ => {}
    }
    values.extend([("{question}", line.input.clone()), ("{input}", line.input)]);
    // Of a list of numbers all, of several answers the first one.
    let answer = match scorer {
        Scorer::Beginning => format!("[{}]", references.join(", ")),
        Scorer::Option | Scorer::Function => references[1].clone(),
        _ => references[0].clone(),
    };
    Ok(Sample {
        id,
        values,
        judge: Judge::new(Rule::Published(scorer), references, generate),
        answer,
    })
}

/// The first call of a function in a question: `func_7(-3)`.
fn call(text: &str) -> Option<String> {
    text.match_indices("func_").find_map(|(at, name)| {
        let rest = &text[at + name.len()..];
        let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
        let number = digits(rest);
        let argument = rest[number..].strip_prefix('(').filter(|_| number > 0)?;
        let unsigned = argument.strip_prefix('-').unwrap_or(argument);
        let count = digits(unsigned);
        unsigned[count..].strip_prefix(')').filter(|_| count > 0)?;
        let end = text.len() - unsigned.len() + count + 1;
        Some(text[at..end].to_owned())
    })
}

/// What is sought in a list, in small letters: from the first "The" to the last "of" of a line.
fn sought(text: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let from = line.find("The ")?;
        let to = line.rfind(" of").filter(|to| *to > from + 4)?;
        Some(line[from..to].to_lowercase())
    })
}

fn long(line: LongLine, task: &str, generate: usize) -> Result<Sample> {
    let scorer = match task {
        "narrativeqa" | "qasper" | "multifieldqa_en" | "hotpotqa" | "2wikimqa" | "musique"
        | "triviaqa" => Scorer::TokenF1,
        "gov_report" | "qmsum" | "multi_news" | "samsum" => Scorer::RougeOfSets,
        "trec" | "lsht" => Scorer::Class,
        "passage_retrieval_en" | "passage_retrieval_zh" => Scorer::Paragraph,
        "passage_count" => Scorer::Count,
        "lcc" | "repobench-p" => Scorer::CodeLine,
        "multifieldqa_zh" | "dureader" | "vcsum" => {
            return Err(Error::Usage(format!(
                "{task} is scored by Chinese words, which nothing here tells apart"
            )));
        }
        other => return Err(unknown("LongBench", other)),
    };
    let Some(answer) = line
        .answers
        .first()
        .filter(|answer| !answer.is_empty())
        .cloned()
    else {
        return Err(Error::Usage(format!("{task} {}: no answer", line.id)));
    };
    let judge = Judge {
        classes: line.all_classes.unwrap_or_default(),
        first_line: matches!(task, "trec" | "triviaqa" | "samsum" | "lsht"),
        ..Judge::new(Rule::Published(scorer), line.answers, generate)
    };
    Ok(Sample {
        id: line.id,
        values: vec![("{context}", line.context), ("{input}", line.input)],
        judge,
        answer,
    })
}

fn long2(line: Long2Line) -> Sample {
    let trimmed = |text: String| text.trim().to_owned();
    let answer = format!("The correct answer is ({})", line.answer);
    Sample {
        id: line.id,
        values: vec![
            ("$DOC$", trimmed(line.context)),
            ("$Q$", trimmed(line.question)),
            ("$C_A$", trimmed(line.a)),
            ("$C_B$", trimmed(line.b)),
            ("$C_C$", trimmed(line.c)),
            ("$C_D$", trimmed(line.d)),
        ],
        judge: Judge::new(Rule::Published(Scorer::Letter), vec![line.answer], 128),
        answer,
    }
}
