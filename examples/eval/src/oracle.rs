//! What scores could be worth: the labels of a context used as its own scores.
//!
//! A head that is trained on labels can hardly do better than the labels themselves ([`Known`]). Set beside each
//! other, a budget for each head, shared over a layer and shared over the model, a text that is cut once and one that is
//! cut after every chunk, say how much labels, budgets and eviction as one reads each lose.

use crate::{
    Error, Result,
    ablation::{Ablation, Candidate, Journal, Record, Settings, TaskSet},
    evaluate::{self, Case, Encode, Event},
    report::{self, Table},
    tasks::Task,
};
use locret_core::{
    Budget, CacheOptions, Error as CoreError, Evict, KvCachePolicy, LayerUnits, ModelSpec,
    Positions, Prefill, Scorer, Scores, Session, Share, Step,
};
use locret_policies::Full;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::{fmt, str::FromStr, sync::Arc, time::Instant};

/// Scores of a text's units, `[layers][kv_heads][tokens]`.
pub type Labels = Vec<Vec<Vec<f32>>>;

/// A scorer that knows every unit's score before, by its position in one text.
#[derive(Debug, Clone)]
pub struct Known {
    labels: Arc<Labels>,
    /// Of which text, for fingerprints.
    text: String,
}

impl Known {
    /// The labels of a text, which has a name of its own.
    pub fn new(labels: Arc<Labels>, text: impl Into<String>) -> Self {
        Self {
            labels,
            text: text.into(),
        }
    }
}

impl Scorer for Known {
    fn name(&self) -> String {
        "known".into()
    }

    fn fingerprint(&self) -> String {
        format!("Known {{ text: {:?} }}", self.text)
    }

    fn validate(&self, model: &ModelSpec) -> locret_core::Result<()> {
        let expected = (model.layers, model.kv_heads);
        let heads = self.labels.first().map_or(0, Vec::len);
        match (self.labels.len(), heads) == expected {
            true => Ok(()),
            false => Err(CoreError::Setting {
                what: "known scores",
                expected: format!("those of {expected:?} layers and KV heads"),
                found: format!("those of {:?}", (self.labels.len(), heads)),
            }),
        }
    }

    fn score(&self, at: &Step, units: &LayerUnits<'_>) -> locret_core::Result<Scores> {
        let layer = &self.labels[at.layer.index];
        let of = |head: usize| -> locret_core::Result<Vec<f32>> {
            let positions = units.positions(head).iter();
            let known = positions.map(|p| layer[head].get(*p as usize).copied());
            known.collect::<Option<_>>().ok_or_else(|| {
                let found = units.positions(head).last();
                let found = found.map_or_else(|| "none".into(), u32::to_string);
                let expected = format!("below {}, of which scores are known", layer[head].len());
                CoreError::setting("positions of units", expected, found)
            })
        };
        Scores::per_head(
            (0..units.kv_heads())
                .map(of)
                .collect::<locret_core::Result<_>>()?,
        )
    }
}

/// When units are dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reading {
    /// Once, when the whole text has been read with a full cache.
    OneShot,
    /// After every chunk, as bounded caches do.
    Chunks,
}

/// Who has a budget of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sharing {
    /// Every head.
    Head,
    /// Every layer: its heads share ([`Evict::ada`]).
    Layer,
    /// The model ([`Share::Model`]).
    Model,
}

macro_rules! names {
    ($kind:ty, $what:literal, $($value:path => $name:literal),+) => {
        impl fmt::Display for $kind {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(match self { $($value => $name),+ })
            }
        }

        impl FromStr for $kind {
            type Err = Error;

            fn from_str(text: &str) -> Result<Self> {
                match text {
                    $($name => Ok($value),)+
                    _ => Err(Error::Usage(format!(
                        concat!("unknown ", $what, " {:?}: there are ", $($name, ", "),+, "no others"),
                        text,
                    ))),
                }
            }
        }
    };
}

names!(Reading, "reading", Reading::OneShot => "one-shot", Reading::Chunks => "chunks");
names!(Sharing, "sharing", Sharing::Head => "head", Sharing::Layer => "layer", Sharing::Model => "model");

/// One way to keep a part of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Point {
    /// When units are dropped.
    pub reading: Reading,
    /// Who has a budget of its own.
    pub sharing: Sharing,
    /// Newest units that always stay.
    pub recent: usize,
    /// Of how many units one stays.
    pub factor: usize,
}

/// What is the same for all points.
#[derive(Debug, Clone)]
pub struct Oracle {
    /// What reads, in chunks of `prefill.chunk`; nothing is exempt from eviction at a text's end.
    pub ablation: Ablation,
    /// First units that always stay.
    pub sinks: usize,
    /// What each head keeps on its own account where budgets are shared.
    pub floor: f64,
    /// Positions.
    pub positions: Positions,
    /// What labels are and how they are made, for results.
    pub labels: serde_json::Value,
    /// No task is begun after this.
    pub until: Option<Instant>,
}

/// Makes the labels of a task's context.
pub type Labelling<'a> = &'a dyn Fn(&Task) -> Result<Labels>;

impl Oracle {
    fn policy(&self, point: &Point, scores: Known) -> Evict<Known> {
        let policy = Evict::new(scores, budget(point))
            .sinks(self.sinks)
            .recent(point.recent)
            .with_positions(self.positions);
        match point.sharing {
            Sharing::Head => policy,
            Sharing::Layer => policy.ada(self.floor),
            Sharing::Model => policy.ada(self.floor).share(Share::Model),
        }
    }

    /// A full cache, and all points: those that `journal` has, and the others as they are run, each of which
    /// is added to it at once. Points of whose budget nothing would be left to choose are left out.
    ///
    /// # Errors
    /// Those of `labels`, the engine's and [`Journal::add`].
    pub fn run(
        &self,
        points: &[Point],
        set: &TaskSet,
        encode: Encode<'_>,
        labels: Labelling<'_>,
        journal: &mut Journal,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<Vec<Record>> {
        let mut records = Vec::new();
        for task in &set.tasks {
            if self.until.is_some_and(|until| Instant::now() >= until) {
                break;
            }
            let ids = encode.encode(&task.context)?;
            let (mut known, mut whole) = (None, None);
            let fits = |point: &&Point| {
                self.sinks + point.recent < ids.len().div_ceil(point.factor.max(1))
            };
            let all = [None]
                .into_iter()
                .chain(points.iter().filter(fits).map(Some));
            for point in all {
                let (label, settings) = match point {
                    None => ("full".to_owned(), json!({})),
                    Some(point) => (label(point), self.settings(point)),
                };
                // Not yet with labels: these are made if there is something to run.
                let policy: Arc<dyn KvCachePolicy> = match point {
                    None => Arc::new(Full::new().with_positions(self.positions)),
                    Some(point) => Arc::new(self.policy(point, Known::new(Arc::default(), ""))),
                };
                let mut candidate = Candidate::new(&label, policy, settings);
                on_event(Event::Next {
                    policy: &label,
                    task,
                });
                let mut record = self.ablation.record(&candidate, set, task);
                if let Some(found) = journal.get(&record.key()) {
                    record.case = found.case.clone();
                    record.origin = found.origin.clone();
                    on_event(Event::Known);
                    records.push(record);
                    continue;
                }
                if let Some(point) = point {
                    if known.is_none() {
                        known = Some(Known::new(Arc::new(labels(task)?), task.sha256()));
                    }
                    if let Some(known) = &known {
                        candidate.policy = Arc::new(self.policy(point, known.clone()));
                    }
                }
                let started = Instant::now();
                let session = match point.map(|point| point.reading) {
                    Some(Reading::Chunks) => self.read(&candidate, &ids)?,
                    _ => {
                        if whole.is_none() {
                            let full: Arc<dyn KvCachePolicy> =
                                Arc::new(Full::new().with_positions(self.positions));
                            let full = Candidate::new("full", full, json!({}));
                            whole = Some(self.read(&full, &ids)?);
                        }
                        let whole = whole.as_ref().ok_or(CoreError::EmptyPrompt)?;
                        let mut session = whole.fork()?;
                        let cache = session.cache_mut();
                        cache.set_policy(candidate.policy.clone())?;
                        cache.turn(ids.len())?;
                        session
                    }
                };
                let (queries, peak) = evaluate::answers(&session, task, encode)?;
                record.case = Case {
                    context_tokens: ids.len(),
                    queries,
                    peak_kv_bytes: peak,
                    kept_kv_bytes: session.report().kv_bytes,
                    seconds: started.elapsed().as_secs_f64(),
                    ..Case::from(task)
                };
                journal.add(&record)?;
                on_event(Event::Done);
                records.push(record);
            }
        }
        Ok(records)
    }

    fn read(&self, candidate: &Candidate, ids: &[u32]) -> Result<Session> {
        let (model, policy) = (self.ablation.model.clone(), candidate.policy.clone());
        let mut session = Session::with_options(model, policy, CacheOptions::default())?;
        session.prefill(ids, &Prefill::new(self.ablation.prefill.chunk, 0))?;
        Ok(session)
    }

    fn settings(&self, point: &Point) -> serde_json::Value {
        json!({
            "budget": budget(point),
            "point": point,
            "sinks": self.sinks,
            "floor": self.floor,
            "labels": self.labels,
        })
    }
}

fn budget(point: &Point) -> Budget {
    Budget::Ratio(1.0 / point.factor.max(1) as f64)
}

/// What a point is called, whatever its budget.
fn label(point: &Point) -> String {
    let Point {
        reading,
        sharing,
        recent,
        ..
    } = point;
    format!("{reading}, by {sharing}, newest {recent}")
}

/// The point that a record is of; `None` for the full cache.
fn point(record: &Record) -> Option<Point> {
    match &record.policy {
        Settings::Own { settings, .. } => Point::deserialize(settings.get("point")?).ok(),
        Settings::Config(_) => None,
    }
}

/// What every point answered, one line for each way to read, share and protect, a column for each part that was kept.
pub fn tables(records: &[Record], points: &[Point]) -> [Table; 2] {
    let mut factors: Vec<usize> = points.iter().map(|point| point.factor).collect();
    factors.sort_unstable();
    factors.dedup();
    let mut lines: Vec<(Point, String)> = Vec::new();
    for point in points {
        let name = label(point);
        if !lines.iter().any(|line| line.1 == name) {
            lines.push((*point, name));
        }
    }
    let names: Vec<String> = factors.iter().map(|f| format!(">{f} ×")).collect();
    let mut columns = vec!["units are dropped", "budget of each", ">newest kept"];
    columns.extend(names.iter().map(String::as_str));
    let mut tables = [Table::new(&columns), Table::new(&columns)];
    let cells = |of: &dyn Fn(&Record) -> bool| -> [String; 2] {
        let of: Vec<&Case> = records.iter().filter(|r| of(r)).map(|r| &r.case).collect();
        let asked = of
            .iter()
            .filter(|c| !c.continuation)
            .flat_map(|c| &c.queries);
        let (mut right, mut all) = (0.0, 0);
        for query in asked {
            right += query.points();
            all += 1;
        }
        let continued = of
            .iter()
            .filter(|c| c.continuation)
            .flat_map(|c| &c.queries);
        let (mut nll, mut tokens) = (0.0, 0);
        for query in continued {
            nll += query.nll;
            tokens += query.tokens;
        }
        let dash = || "–".to_owned();
        [
            if all > 0 {
                format!("{right:.0} / {all}")
            } else {
                dash()
            },
            if tokens > 0 {
                format!("{:.3}", nll / tokens as f64)
            } else {
                dash()
            },
        ]
    };
    let full = cells(&|record: &Record| point(record).is_none());
    for (table, full) in tables.iter_mut().zip(full) {
        let mut row = vec!["never".to_owned(), "–".into(), "–".into()];
        row.extend(factors.iter().map(|_| full.clone()));
        table.row(row);
    }
    for (line, _) in lines {
        let mut rows = [Vec::new(), Vec::new()];
        for row in &mut rows {
            let when = match line.reading {
                Reading::OneShot => "once",
                Reading::Chunks => "after every chunk",
            };
            row.extend([
                when.to_owned(),
                line.sharing.to_string(),
                line.recent.to_string(),
            ]);
        }
        for factor in &factors {
            let own = Point {
                factor: *factor,
                ..line
            };
            let found = cells(&|record: &Record| point(record) == Some(own));
            rows.iter_mut()
                .zip(found)
                .for_each(|(row, cell)| row.push(cell));
        }
        tables.iter_mut().zip(rows).for_each(|(table, row)| {
            table.row(row);
        });
    }
    tables
}

/// The tables in Markdown, with what they show.
pub fn markdown(records: &[Record], points: &[Point]) -> String {
    let [answers, continuations] = tables(records, points);
    let contexts = records.iter().filter(|r| point(r).is_none()).count();
    format!(
        "Right answers; one of so many units stays ({} contexts):\n\n{}\nMean −ln p of a token of \
         continuations:\n\n{}",
        report::grouped(contexts),
        answers.markdown(),
        continuations.markdown()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ablation::Origin,
        random::{self, RandomWeights},
        tasks::Query,
    };
    use burn::tensor::Device;
    use locret_models::LoadOptions;

    fn bytes(text: &str) -> Result<Vec<u32>> {
        Ok(text.bytes().map(u32::from).collect())
    }

    fn oracle() -> Oracle {
        let config = random::tests::config(32, 256);
        let weights = RandomWeights::new(&config, 1);
        let options = LoadOptions::default();
        let model = random::decoder(&config, &weights, &options, &Device::flex()).unwrap();
        Oracle {
            ablation: Ablation {
                model: Arc::new(model),
                prefill: Prefill::new(16, 4),
                origin: Origin::here("random".into(), None),
            },
            sinks: 1,
            floor: 0.2,
            positions: Positions::Compact,
            labels: json!("made up"),
            until: None,
        }
    }

    fn points(factors: &[usize]) -> Vec<Point> {
        let mut all = Vec::new();
        for reading in [Reading::OneShot, Reading::Chunks] {
            for sharing in [Sharing::Head, Sharing::Layer, Sharing::Model] {
                for factor in factors {
                    all.push(Point {
                        reading,
                        sharing,
                        recent: 4,
                        factor: *factor,
                    });
                }
            }
        }
        all
    }

    /// Scores that differ between layers and heads.
    fn scores(spec: &ModelSpec, tokens: usize) -> Labels {
        let score = |l: usize, h: usize, t: usize| {
            ((t * 31 + 7 * l + 3 * h) % 53) as f32 + (l + 5 * h) as f32
        };
        let head = |l: usize, h: usize| (0..tokens).map(|t| score(l, h, t)).collect();
        let layer = |l: usize| (0..spec.kv_heads).map(|h| head(l, h)).collect();
        (0..spec.layers).map(layer).collect()
    }

    #[test]
    fn every_point_keeps_the_best_units_of_its_own() {
        let oracle = oracle();
        let spec = oracle.ablation.model.spec().clone();
        let text = "The quick brown fox jumps over the lazy dog. ".repeat(3);
        let ids = bytes(&text).unwrap();
        let labels = Arc::new(scores(&spec, ids.len()));
        let known = || Known::new(labels.clone(), "x");
        for point in points(&[3, 8]) {
            let candidate =
                Candidate::new("x", Arc::new(oracle.policy(&point, known())), json!({}));
            let session = oracle.read(&candidate, &ids).unwrap();
            let cache = session.cache();
            let budget = ids.len().div_ceil(point.factor);
            let layers = 0..spec.layers;
            let heads = layers.flat_map(|l| (0..spec.kv_heads).map(move |h| (l, h)));
            let lens: Vec<usize> = heads.clone().map(|(l, h)| cache.len(l, h)).collect();
            assert_eq!(
                lens.iter().sum::<usize>(),
                budget * spec.layers * spec.kv_heads
            );
            assert_eq!(
                lens.iter().all(|n| *n == budget),
                point.sharing == Sharing::Head
            );
            for (l, h) in heads {
                let kept = cache.positions(l, h);
                assert!(kept.contains(&0) && kept.contains(&(ids.len() as u32 - 1)));
            }
        }
        // A text that is longer than what is known.
        let short = Known::new(Arc::new(scores(&spec, 20)), "x");
        let policy = oracle.policy(&points(&[8])[0], short);
        let candidate = Candidate::new("x", Arc::new(policy), json!({}));
        let error = oracle.read(&candidate, &ids).unwrap_err().to_string();
        assert!(error.contains("below 20"), "{error}");
        let other = Known::new(Arc::new(vec![]), "x");
        assert!(other.validate(&spec).is_err());
    }

    #[test]
    fn a_run_is_resumed_and_summed_up() {
        let oracle = oracle();
        let spec = oracle.ablation.model.spec().clone();
        let task = |id: &str, query: &str| Task {
            id: id.into(),
            task: "letters".into(),
            context: "The quick brown fox jumps over the lazy dog. ".repeat(2) + id,
            queries: vec![Query::exact(query, " quick")],
        };
        let set = TaskSet::of(vec![task("a", "The"), task("b", "")]);
        let (mut journal, points) = (Journal::default(), points(&[2, 4, 32]));
        let made = std::cell::Cell::new(0);
        let labels = |task: &Task| {
            made.set(made.get() + 1);
            Ok(scores(&spec, task.context.len()))
        };
        let mut run = || {
            let (mut known, mut done) = (0, 0);
            let records = oracle.run(
                &points,
                &set,
                &bytes,
                &labels,
                &mut journal,
                &mut |e| match e {
                    Event::Known => known += 1,
                    Event::Done => done += 1,
                    Event::Next { .. } => {}
                },
            );
            (records.unwrap(), known, done)
        };
        let (records, known, done) = run();
        // Five units are not enough for a 32nd of 91: 1 + 4 are protected of 3.
        assert_eq!((records.len(), known, done, made.get()), (2 * 13, 0, 26, 2));
        assert_eq!(run(), (records.clone(), 26, 0));
        assert_eq!(made.get(), 2);
        let late = Oracle {
            until: Some(Instant::now()),
            ..oracle.clone()
        };
        let mut nothing = Journal::default();
        let none = late.run(&points, &set, &bytes, &labels, &mut nothing, &mut |_| {});
        assert_eq!(none.unwrap().len(), 0);
        let full = &records[0].case;
        for record in &records[1..13] {
            let budget = record.policy.budget().unwrap();
            let Budget::Ratio(ratio) = budget else {
                panic!()
            };
            let units = (ratio * full.context_tokens as f64).ceil() / full.context_tokens as f64;
            let kept = record.case.kept_kv_bytes as f64 / full.kept_kv_bytes as f64;
            assert!(
                (kept - units).abs() < 1e-9,
                "{}: {kept} for {units}",
                record.label
            );
        }
        let text = markdown(&records, &points);
        assert!(
            text.contains("| never") && text.contains("after every chunk"),
            "{text}"
        );
        assert_eq!(text.matches("| once").count(), 6, "{text}");
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        for reading in [Reading::OneShot, Reading::Chunks] {
            assert_eq!(reading.to_string().parse::<Reading>().unwrap(), reading);
        }
        for sharing in [Sharing::Head, Sharing::Layer, Sharing::Model] {
            assert_eq!(sharing.to_string().parse::<Sharing>().unwrap(), sharing);
        }
        let error = "all".parse::<Sharing>().unwrap_err().to_string();
        assert!(error.contains("head, layer, model"), "{error}");
    }
}
