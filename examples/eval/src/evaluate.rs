//! Runs tasks: a context is read once, and each of its queries on a fork of the cache.

use crate::{
    Error, Result,
    files::write_atomically,
    report::{self, Table},
    tasks::Task,
};
use locret_core::{
    CacheOptions, CausalLm, ChunkDone, Generate, KvCachePolicy, Prefill, Session, TokenScore,
};
use locret_policies::query_first;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

/// Between texts and tokens. A function from a text to its tokens is one that cannot go back, which is enough
/// where no answer is judged.
pub trait Tokeniser {
    /// The tokens of a text: control tokens in it are control tokens, nothing is added.
    ///
    /// # Errors
    /// The tokenizer's.
    fn encode(&self, text: &str) -> Result<Vec<u32>>;

    /// The text of generated tokens.
    ///
    /// # Errors
    /// The tokenizer's; [`Error::Usage`] where there is no way back.
    fn decode(&self, _ids: &[u32]) -> Result<String> {
        Err(Error::Usage(
            "answers that are judged need a tokenizer that goes back to a text".into(),
        ))
    }

    /// Tokens that end an answer.
    ///
    /// # Errors
    /// The tokenizer's.
    fn ends(&self) -> Result<Vec<u32>> {
        Ok(Vec::new())
    }
}

impl<F: Fn(&str) -> Result<Vec<u32>>> Tokeniser for F {
    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self(text)
    }
}

/// What texts are tokenised with.
pub type Encode<'a> = &'a dyn Tokeniser;

/// What reads the contexts and answers the queries.
#[derive(Debug, Clone)]
pub struct Reader {
    /// The model.
    pub model: Arc<dyn CausalLm>,
    /// The policy.
    pub policy: Arc<dyn KvCachePolicy>,
    /// The cache's settings.
    pub cache: CacheOptions,
    /// How contexts are read. Their last `local` tokens are not evicted, nor is any token of a
    /// query or an answer.
    pub prefill: Prefill,
    /// Whether a query stands before its context, too.
    pub query_aware: Option<QueryAware>,
}

/// Locret-Q: a context is read for each of its queries, of which the last tokens stand before it
/// ([`query_first`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueryAware {
    /// How many tokens of the query.
    pub tokens: usize,
    /// Tokens that every context begins with, which stay in front: those of
    /// [`Frame::begin`](crate::tasks::Frame::begin).
    pub after: usize,
}

/// How one query was answered.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Answered {
    /// Whether the greedy continuation is the answer, token for token; of an answer that is judged, whether
    /// nothing is missing.
    pub exact: bool,
    /// What the generated answer is worth, where it is judged ([`Judge::score`](crate::tasks::Judge::score)).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub score: Option<f64>,
    /// Tokens of the answer that were the most likely ones after the right tokens before them.
    pub right: usize,
    /// Tokens of the answer.
    pub tokens: usize,
    /// Sum over the answer's tokens of `-ln p`.
    pub nll: f64,
}

/// How one task went.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Case {
    /// [`Task::id`]
    pub id: String,
    /// [`Task::task`]
    pub task: String,
    /// [`Task::is_continuation`]
    pub continuation: bool,
    /// Tokens of the context.
    pub context_tokens: usize,
    /// One for each query.
    pub queries: Vec<Answered>,
    /// The most bytes of keys and values at any moment.
    pub peak_kv_bytes: usize,
    /// Bytes of keys and values when the context was read.
    pub kept_kv_bytes: usize,
    /// Tokens of the context and bytes of keys and values after each chunk.
    pub curve: Vec<(usize, usize)>,
    /// The KV footprint (units × steps; arXiv 2506.17121) of reading the context, as a share of a full cache's:
    /// for each token, the units that a KV head held when it was read, its own among them, as a mean over all heads.
    /// Older results have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub footprint: Option<f64>,
    /// Wall-clock time until the first token of an answer was known: the context was read, and the first query.
    /// `None` for continuations and older results.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_token_seconds: Option<f64>,
    /// Wall-clock time.
    pub seconds: f64,
}

/// Units by steps of reading a context.
#[derive(Debug, Default)]
struct Footprint {
    tokens: usize,
    /// Units in all heads after the last chunk.
    units: usize,
    sum: f64,
}

impl Footprint {
    /// So many tokens have been read now, and so many units are left in all of so many heads.
    fn chunk(&mut self, tokens: usize, units: usize, heads: usize) {
        let new = tokens.saturating_sub(self.tokens) as f64;
        let held = self.units as f64 / heads.max(1) as f64;
        self.sum += new * held + new * (new + 1.0) / 2.0;
        (self.tokens, self.units) = (tokens, units);
    }

    /// As a share of a full cache's.
    fn share(&self) -> Option<f64> {
        let n = self.tokens as f64;
        (self.tokens > 0).then(|| self.sum / (n * (n + 1.0) / 2.0))
    }
}

impl Reader {
    /// Reads a task's context and answers its queries. `on_chunk` sees the cache after every chunk
    /// of the context.
    ///
    /// The greedy answer equals the expected one exactly if every token of it is the most likely
    /// one after the right tokens before it, so that one pass over the answer gives all three
    /// scores. Only where the policy evicts while it generates, or an answer is judged, are answers
    /// generated as well.
    ///
    /// # Errors
    /// Those of `encode` and of the engine; [`Error::Usage`] for a text without tokens.
    pub fn run(
        &self,
        task: &Task,
        encode: Encode<'_>,
        on_chunk: &mut (dyn FnMut(&ChunkDone<'_>) + Send),
    ) -> Result<Case> {
        let started = Instant::now();
        let ids = encode.encode(&task.context)?;
        let (mut curve, mut footprint) = (Vec::new(), Footprint::default());
        let spec = self.model.spec();
        let heads = spec.layers * spec.kv_heads;
        let mut read = |ids: &[u32]| -> Result<Session> {
            let mut session =
                Session::with_options(self.model.clone(), self.policy.clone(), self.cache)?;
            // Of several readings the first is drawn.
            let first = curve.is_empty();
            session.prefill_with(ids, &self.prefill, &mut |chunk| {
                if first {
                    curve.push((chunk.done, chunk.cache.bytes()));
                    footprint.chunk(chunk.done, chunk.cache.units(), heads);
                }
                on_chunk(chunk);
                Ok(())
            })?;
            Ok(session)
        };
        let (mut kept, mut peak, mut queries) = (0, 0, Vec::with_capacity(task.queries.len()));
        let mut first_token_seconds = None;
        // On a fork of its own, so that nothing else depends on it.
        let mut asked_first = |session: &Session| -> Result<()> {
            if let Some(query) = task.queries.first().filter(|_| !task.is_continuation())
                && first_token_seconds.is_none()
            {
                session.fork()?.score(&encode.encode(&query.query)?)?;
                first_token_seconds = Some(started.elapsed().as_secs_f64());
            }
            Ok(())
        };
        // A text that is only continued has no query.
        match self.query_aware.filter(|_| !task.is_continuation()) {
            None => {
                let session = read(&ids)?;
                kept = session.report().kv_bytes;
                asked_first(&session)?;
                (queries, peak) = answers(&session, task, encode)?;
            }
            Some(QueryAware { tokens, after }) => {
                for (i, query) in task.queries.iter().enumerate() {
                    let asked = encode.encode(&query.query)?;
                    let session = read(&query_first(&ids, &asked, tokens, after))?;
                    kept = kept.max(session.report().kv_bytes);
                    asked_first(&session)?;
                    let (answered, most) = answer(&session, task, i, encode)?;
                    peak = peak.max(most);
                    queries.push(answered);
                }
            }
        }
        Ok(Case {
            context_tokens: ids.len(),
            queries,
            peak_kv_bytes: peak,
            kept_kv_bytes: kept,
            footprint: footprint.share(),
            first_token_seconds,
            curve,
            seconds: started.elapsed().as_secs_f64(),
            ..Case::from(task)
        })
    }
}

/// Answers a task's queries, each on a fork of a session that has read its context. Also the most bytes of
/// keys and values that were held so far.
///
/// # Errors
/// As [`Reader::run`].
pub fn answers(
    session: &Session,
    task: &Task,
    encode: Encode<'_>,
) -> Result<(Vec<Answered>, usize)> {
    let mut all = Vec::with_capacity(task.queries.len());
    let mut peak = session.report().peak.bytes;
    for i in 0..task.queries.len() {
        let (answered, most) = answer(session, task, i, encode)?;
        peak = peak.max(most);
        all.push(answered);
    }
    Ok((all, peak))
}

/// The same for one of the queries.
fn answer(
    session: &Session,
    task: &Task,
    i: usize,
    encode: Encode<'_>,
) -> Result<(Answered, usize)> {
    let evicts = session.cache().policy().decode_slack().is_some();
    let query = &task.queries[i];
    let (asked, answer) = (encode.encode(&query.query)?, encode.encode(&query.answer)?);
    if answer.is_empty() {
        let (id, number) = (&task.id, i + 1);
        let found = format!("task {id}: the answer of query {number} has no tokens");
        return Err(Error::Usage(found));
    }
    let mut fork = session.fork()?;
    let generate = |settings: Generate| -> Result<Vec<u32>> {
        let mut fork = session.fork()?;
        fork.score(&asked)?;
        let greedy = fork.generate(settings)?;
        Ok(greedy.collect::<Result<_, _>>()?)
    };
    let (mut exact, mut score) = (None, None);
    if let Some(judge) = &query.judge {
        let ends = encode.ends()?;
        let settings = Generate::greedy(judge.tokens).stop_at(ends.iter().copied());
        let mut said = generate(settings)?;
        said.retain(|id| !ends.contains(id));
        let worth = judge.score(&encode.decode(&said)?);
        (exact, score) = (Some(worth >= 1.0), Some(worth));
    } else if evicts && !task.is_continuation() {
        exact = Some(generate(Generate::greedy(answer.len()))? == answer);
    }
    let all = fork.score(&[asked.as_slice(), &answer].concat())?;
    let answered = Answered {
        score,
        ..Answered::of(&all[asked.len()..], exact)
    };
    Ok((answered, fork.report().peak.bytes))
}

impl From<&Task> for Case {
    /// Before anything has been run.
    fn from(task: &Task) -> Self {
        Self {
            id: task.id.clone(),
            task: task.task.clone(),
            continuation: task.is_continuation(),
            context_tokens: 0,
            queries: Vec::new(),
            peak_kv_bytes: 0,
            kept_kv_bytes: 0,
            curve: Vec::new(),
            footprint: None,
            first_token_seconds: None,
            seconds: 0.0,
        }
    }
}

impl Answered {
    /// From 0 to 1: the score where the answer was judged, else whether it was exact.
    pub fn points(&self) -> f64 {
        self.score.unwrap_or(f64::from(u8::from(self.exact)))
    }

    fn of(scores: &[TokenScore], exact: Option<bool>) -> Self {
        let right = scores.iter().filter(|s| s.top).count();
        Self {
            exact: exact.unwrap_or(right == scores.len()),
            score: None,
            right,
            tokens: scores.len(),
            nll: scores.iter().map(|s| f64::from(s.nll)).sum(),
        }
    }
}

/// What happens while tasks are run.
#[derive(Debug, Clone, Copy)]
pub enum Event<'a> {
    /// A task is next.
    Next {
        /// What the policy is called.
        policy: &'a str,
        /// The task.
        task: &'a Task,
    },
    /// Its result was there from an earlier run.
    Known,
    /// It has been run.
    Done,
}

/// Runs all tasks, and writes each result to `partial` at once: a run that is started again with
/// the same `settings` goes on where it was. `on_event` hears of every task.
///
/// # Errors
/// As [`Reader::run`]; [`Error::Write`].
pub fn run_all(
    reader: &Reader,
    tasks: &[Task],
    encode: Encode<'_>,
    partial: Option<(&Path, &serde_json::Value)>,
    on_event: &mut dyn FnMut(Event<'_>),
) -> Result<Vec<Case>> {
    let mut log = match partial {
        Some((path, settings)) => Some(Log::open(path, settings)?),
        None => None,
    };
    let mut cases = Vec::with_capacity(tasks.len());
    let policy = &reader.policy.name();
    for task in tasks {
        on_event(Event::Next { policy, task });
        let known = log.as_mut().and_then(|l| l.take(&task.task, &task.id));
        let case = match known {
            Some(case) => {
                on_event(Event::Known);
                case
            }
            None => {
                let case = reader.run(task, encode, &mut |_| {})?;
                if let Some(log) = &mut log {
                    log.add(&case)?;
                }
                on_event(Event::Done);
                case
            }
        };
        cases.push(case);
    }
    Ok(cases)
}

/// Results as JSON lines, the settings first.
#[derive(Debug)]
struct Log {
    path: PathBuf,
    file: File,
    known: HashMap<(String, String), Case>,
}

impl Log {
    fn open(path: &Path, settings: &serde_json::Value) -> Result<Self> {
        let head = serde_json::json!({ "settings": settings });
        let mut known = HashMap::new();
        // Anything unreadable is run again: a line that was cut off when the run was killed, or
        // the results of other settings.
        if let Ok(text) = fs::read_to_string(path) {
            let mut lines = text.lines();
            let first = lines.next().map(serde_json::from_str::<serde_json::Value>);
            if matches!(first, Some(Ok(found)) if found == head) {
                for case in lines.map_while(|line| serde_json::from_str::<Case>(line).ok()) {
                    known.insert((case.task.clone(), case.id.clone()), case);
                }
            }
        }
        // Beside its place first: a kill in between leaves what was there.
        write_atomically(path, |out| {
            writeln!(out, "{head}")?;
            for case in known.values() {
                writeln!(out, "{}", serde_json::to_string(case)?)?;
            }
            Ok(())
        })?;
        let file = OpenOptions::new()
            .append(true)
            .open(path)
            .map_err(|e| Error::write(path, e))?;
        Ok(Self {
            path: path.to_owned(),
            file,
            known,
        })
    }

    fn take(&mut self, task: &str, id: &str) -> Option<Case> {
        self.known.remove(&(task.to_owned(), id.to_owned()))
    }

    fn add(&mut self, case: &Case) -> Result<()> {
        let line = serde_json::to_string(case).map_err(std::io::Error::from);
        line.and_then(|line| {
            self.file.write_all(format!("{line}\n").as_bytes())?;
            self.file.flush()
        })
        .map_err(|e| Error::write(&self.path, e))
    }
}

/// Scores of a kind of task.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Share of queries whose greedy answer is the expected one; of answers that are judged, their mean
    /// score.
    pub exact: f64,
    /// Share of the answers' tokens that were right, teacher-forced.
    pub tokens: f64,
    /// Mean of `-ln p` over the answers' tokens.
    pub nll: f64,
    /// Queries.
    pub n: usize,
}

/// What `evaluate` writes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// The policy's name.
    pub policy: String,
    /// Everything that the numbers depend on.
    pub settings: serde_json::Value,
    /// Scores by kind of task.
    pub tasks: BTreeMap<String, Scores>,
    /// The mean over the kinds that have questions (`n`: all their queries). `None` if there is
    /// no such kind.
    pub mean: Option<Scores>,
    /// The most bytes of keys and values at any moment of any task.
    pub peak_kv_bytes: usize,
    /// Wall-clock time of all tasks.
    pub seconds: f64,
    /// Kinds without questions, which the mean leaves out.
    #[serde(skip)]
    pub continuations: Vec<String>,
    /// By kind, what the answers of each context were worth.
    #[serde(skip)]
    pub contexts: BTreeMap<String, Vec<Vec<f64>>>,
}

impl Results {
    /// Gathers the results of cases.
    pub fn of(policy: &str, settings: serde_json::Value, cases: &[Case]) -> Self {
        let mut kinds: BTreeMap<String, Vec<&Case>> = BTreeMap::new();
        for case in cases {
            kinds.entry(case.task.clone()).or_default().push(case);
        }
        let continues = |cases: &[&Case]| cases.iter().all(|c| c.continuation);
        let asked: Vec<Scores> = (kinds.values())
            .filter(|cases| !continues(cases))
            .map(|cases| Scores::of(cases))
            .collect();
        let mean = |f: fn(&Scores) -> f64| asked.iter().map(f).sum::<f64>() / asked.len() as f64;
        Self {
            policy: policy.into(),
            settings,
            mean: (!asked.is_empty()).then(|| Scores {
                exact: mean(|s| s.exact),
                tokens: mean(|s| s.tokens),
                nll: mean(|s| s.nll),
                n: asked.iter().map(|s| s.n).sum(),
            }),
            tasks: (kinds.iter())
                .map(|(kind, cases)| (kind.clone(), Scores::of(cases)))
                .collect(),
            peak_kv_bytes: cases.iter().map(|c| c.peak_kv_bytes).max().unwrap_or(0),
            seconds: cases.iter().map(|c| c.seconds).sum(),
            contexts: (kinds.iter())
                .map(|(kind, cases)| {
                    let points = |case: &&Case| case.queries.iter().map(Answered::points).collect();
                    (kind.clone(), cases.iter().map(points).collect())
                })
                .collect(),
            continuations: (kinds.iter())
                .filter(|(_, cases)| continues(cases))
                .map(|(kind, _)| kind.clone())
                .collect(),
        }
    }

    /// The 95 % interval of the mean over the kinds with questions, by drawing contexts of each kind anew
    /// ([`report::bootstrap`]).
    pub fn mean_interval(&self) -> (f64, f64) {
        let asked = self.contexts.iter();
        let asked = asked.filter(|(kind, _)| !self.continuations.contains(kind));
        report::bootstrap(asked.map(|(_, contexts)| &contexts[..]))
    }

    /// A table with 95 % intervals of the exact matches: Wilson's, for which each question stands alone, and
    /// those of contexts drawn anew.
    pub fn table(&self) -> Table {
        let columns = [
            "task",
            ">exact",
            "95 %",
            "by context",
            ">tokens",
            ">nll",
            ">n",
        ];
        let mut table = Table::new(&columns);
        let row = |name: &str, s: &Scores, drawn: (f64, f64)| {
            let right = (s.exact * s.n as f64).round() as usize;
            let (low, high) = report::wilson(right, s.n);
            [
                name.to_owned(),
                format!("{:.3}", s.exact),
                format!("{low:.2}–{high:.2}"),
                format!("{:.2}–{:.2}", drawn.0, drawn.1),
                format!("{:.3}", s.tokens),
                format!("{:.3}", s.nll),
                s.n.to_string(),
            ]
        };
        for (name, scores) in &self.tasks {
            let contexts = self.contexts.get(name).map_or(&[][..], Vec::as_slice);
            table.row(row(name, scores, report::bootstrap([contexts])));
        }
        if let Some(mean) = &self.mean {
            table.row(row("mean of questions", mean, self.mean_interval()));
        }
        table
    }
}

impl Scores {
    fn of(cases: &[&Case]) -> Self {
        let queries: Vec<&Answered> = cases.iter().flat_map(|c| &c.queries).collect();
        let n = queries.len();
        let tokens = queries.iter().map(|q| q.tokens).sum::<usize>().max(1) as f64;
        Self {
            exact: queries.iter().map(|q| q.points()).sum::<f64>() / n.max(1) as f64,
            tokens: queries.iter().map(|q| q.right).sum::<usize>() as f64 / tokens,
            nll: queries.iter().map(|q| q.nll).sum::<f64>() / tokens,
            n,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_footprint_counts_what_each_token_met() {
        // Chunks of 4 tokens, of which two heads keep 3 units and 1 unit of all that they have.
        let mut footprint = Footprint::default();
        assert_eq!(footprint.share(), None);
        for tokens in [4, 8, 10] {
            footprint.chunk(tokens, 4, 2);
        }
        let mut units = Vec::new();
        for (chunk, held) in [(4, 0), (4, 2), (2, 2)] {
            units.extend((1..=chunk).map(|own| held + own));
        }
        let all: usize = (1..=10).sum();
        assert_eq!(
            footprint.share(),
            Some(units.iter().sum::<usize>() as f64 / all as f64)
        );
        let mut full = Footprint::default();
        (1..=3).for_each(|chunk| full.chunk(3 * chunk, 5 * 3 * chunk, 5));
        assert_eq!(full.share(), Some(1.0));
    }
    use crate::{
        random,
        tasks::{Judge, Query, Rule},
    };
    use burn::tensor::Device;
    use locret_models::LoadOptions;
    use locret_policies::Full;
    use serde_json::json;
    use std::io::Read;

    fn case(task: &str, id: &str, continuation: bool, queries: &[(bool, usize, usize)]) -> Case {
        Case {
            id: id.into(),
            task: task.into(),
            continuation,
            context_tokens: 10,
            queries: (queries.iter())
                .map(|(exact, right, tokens)| Answered {
                    exact: *exact,
                    score: None,
                    right: *right,
                    tokens: *tokens,
                    nll: *tokens as f64 * 0.5,
                })
                .collect(),
            peak_kv_bytes: 100 * queries.len(),
            kept_kv_bytes: 50,
            curve: vec![(10, 50)],
            footprint: None,
            first_token_seconds: None,
            seconds: 1.5,
        }
    }

    /// Letters, whatever the token; 0 ends an answer.
    struct Letters;

    fn letter(id: u32) -> char {
        char::from(b'a' + (id % 26) as u8)
    }

    impl Tokeniser for Letters {
        fn encode(&self, text: &str) -> Result<Vec<u32>> {
            Ok(text.bytes().map(u32::from).collect())
        }

        fn decode(&self, ids: &[u32]) -> Result<String> {
            Ok(ids.iter().map(|id| letter(*id)).collect())
        }

        fn ends(&self) -> Result<Vec<u32>> {
            Ok(vec![0])
        }
    }

    #[test]
    fn answers_are_generated_where_they_are_judged() {
        let config = random::tests::config(32, 256);
        let weights = random::RandomWeights::new(&config, 1);
        let options = LoadOptions::default();
        let model = random::decoder(&config, &weights, &options, &Device::flex()).unwrap();
        let reader = Reader {
            model: Arc::new(model),
            policy: Arc::new(Full::new()),
            cache: CacheOptions::default(),
            prefill: Prefill::new(16, 4),
            query_aware: None,
        };
        let context = "The quick brown fox jumps over the lazy dog.";
        let mut session = Session::new(reader.model.clone(), reader.policy.clone()).unwrap();
        let ids = Letters.encode(context).unwrap();
        session.prefill(&ids, &reader.prefill).unwrap();
        session.score(&Letters.encode("Who?").unwrap()).unwrap();
        let said = session.generate(Generate::greedy(5).stop_at([0])).unwrap();
        let said: String = said.map(|id| letter(id.unwrap())).collect();
        let task = |references: &[&str], rule| Task {
            id: "1".into(),
            task: "letters".into(),
            context: context.into(),
            queries: vec![Query {
                judge: Some(Judge::new(
                    rule,
                    references.iter().map(|r| (*r).to_owned()).collect(),
                    5,
                )),
                ..Query::exact("Who?", " fox")
            }],
        };
        let upper = said.to_uppercase();
        let one_of_two = task(&[&upper, "123"], Rule::All);
        let case = reader.run(&one_of_two, &Letters, &mut |_| {}).unwrap();
        let [answered] = case.queries[..] else {
            panic!("{case:?}");
        };
        assert_eq!((answered.score, answered.exact), (Some(0.5), false));
        let any = task(&[&upper, "123"], Rule::Any);
        let other = reader.run(&any, &Letters, &mut |_| {}).unwrap();
        let found = (other.queries[0].score, other.queries[0].exact);
        assert_eq!(found, (Some(1.0), true));
        // What is judged changes nothing in how probable the expected answer is.
        assert_eq!(other.queries[0].nll, answered.nll);
        let results = Results::of("full", json!({}), &[case, other]);
        assert_eq!(
            (results.tasks["letters"].exact, results.mean.unwrap().exact),
            (0.75, 0.75)
        );
        // A function cannot go back.
        let function = |text: &str| Letters.encode(text);
        let error = reader.run(&any, &function, &mut |_| {}).unwrap_err();
        assert!(error.to_string().contains("goes back"), "{error}");
    }

    #[test]
    fn results_keep_perplexity_apart_from_the_mean() {
        let cases = [
            case("a", "1", false, &[(true, 5, 5), (false, 1, 5)]),
            case("b", "1", false, &[(true, 2, 2)]),
            case("b", "2", false, &[(false, 0, 2)]),
            case("text", "1", true, &[(false, 30, 100)]),
        ];
        let r = Results::of("window", json!({"chunk": 8}), &cases);
        assert_eq!(r.tasks["a"].exact, 0.5);
        assert_eq!(r.tasks["a"].tokens, 0.6);
        assert_eq!((r.tasks["b"].exact, r.tasks["b"].n), (0.5, 2));
        assert_eq!(r.tasks["text"].tokens, 0.3);
        let mean = r.mean.unwrap();
        assert_eq!(
            (mean.exact, mean.tokens, mean.nll, mean.n),
            (0.5, 0.55, 0.5, 4)
        );
        assert_eq!((r.peak_kv_bytes, r.seconds), (200, 6.0));
        assert_eq!(r.table().len(), 4);

        let value = serde_json::to_value(&r).unwrap();
        let keys: Vec<&String> = value.as_object().unwrap().keys().collect();
        assert_eq!(
            keys,
            [
                "mean",
                "peak_kv_bytes",
                "policy",
                "seconds",
                "settings",
                "tasks"
            ]
        );
        assert_eq!(
            value["tasks"]["b"],
            json!({"exact": 0.5, "tokens": 0.5, "nll": 0.5, "n": 2})
        );
        assert_eq!(Results::of("full", json!({}), &cases[3..]).mean, None);
    }

    #[test]
    fn a_log_goes_on_after_a_cut_line_and_forgets_other_settings() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.json.part");
        let settings = json!({"budget": 64});
        let mut log = Log::open(&path, &settings).unwrap();
        log.add(&case("a", "1", false, &[(true, 1, 1)])).unwrap();
        log.add(&case("a", "2", false, &[(false, 0, 1)])).unwrap();
        drop(log);
        // As if the run had been killed while it wrote.
        let text = fs::read_to_string(&path).unwrap();
        let cut = &text[..text.len() - 20];
        fs::write(&path, cut).unwrap();
        let mut before = File::open(&path).unwrap();
        let mut log = Log::open(&path, &settings).unwrap();
        // What was there is replaced, never emptied: a kill at any moment loses nothing.
        let mut left = String::new();
        before.read_to_string(&mut left).unwrap();
        assert_eq!(left, cut);
        assert_eq!(
            log.take("a", "1"),
            Some(case("a", "1", false, &[(true, 1, 1)]))
        );
        assert_eq!(log.take("a", "2"), None);
        log.add(&case("a", "2", false, &[(false, 0, 1)])).unwrap();
        drop(log);
        let mut log = Log::open(&path, &settings).unwrap();
        assert!(log.take("a", "1").is_some() && log.take("a", "2").is_some());
        drop(log);
        let mut log = Log::open(&path, &json!({"budget": 65})).unwrap();
        assert_eq!(log.take("a", "1"), None);
    }
}
