//! Trains retaining heads for a model.

use crate::{
    Error, Result,
    args::{ModelArgs, parse_dtype, parse_positions, parse_share},
    progress::{Fetching, Progress, Unit},
    report::{self, Table},
    runtime::{self, Runtime},
};
use clap::{Parser, ValueEnum};
use locret_core::{DType, Positions, Share};
use locret_eval::{
    pictures::{Chart, Scale, Series},
    training_data::{self, Ordinary, Recipe, TrainingCorpus},
};
use locret_policies::{
    HeadAdvice, HeadForm, TableConfig,
    training::{
        CollectConfig, Distance, InputDtype, LabelKind, RECALL_AT, Sample, Shards, Split, Target,
        TrainConfig, TrainProgress, Trained, collect, epochs_within, train,
    },
};
use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::Mutex,
    time::{Duration, Instant},
};

/// Trains retaining heads for a model
#[derive(Debug, Clone, Parser)]
pub struct Args {
    /// builtin, plain (nothing planted), reconstruct (nothing planted or asked, texts are repeated), or a file:
    /// JSON lines or an array, ShareGPT or prompts with answers
    #[arg(long, value_name = "DATA", default_value = "builtin")]
    pub data: String,
    /// Where the heads go (safetensors); pictures go beside it
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Where unfinished work is kept [default: OUT with .work]
    #[arg(long, value_name = "DIR")]
    pub workdir: Option<PathBuf>,
    /// Built-in texts to make [default: 140; 200 for reconstruct]
    #[arg(long, value_name = "N")]
    pub samples: Option<usize>,
    /// Have every text of a file repeated as a whole, beside its answers, as reconstruct does
    #[arg(long)]
    pub repeat: bool,
    /// Tokens of a piece in which texts are repeated
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub piece: usize,
    /// Share of texts with planted statements among those of reconstruct
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    pub planted: f64,
    /// What heads are: locret (of queries, keys and values), or of the layer's input linear, mlp, or decay, whose
    /// scores fall with age [default: locret; mlp for reconstruct]
    #[arg(long, value_name = "KIND")]
    pub head: Option<Head>,
    /// Width of a head, d_R
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub d_r: usize,
    /// How often each text is seen [default: 4; 8 for reconstruct]
    #[arg(long, value_name = "N")]
    pub epochs: Option<usize>,
    /// Consecutive tokens of a step [default: 512; 256 for reconstruct]
    #[arg(long, value_name = "N")]
    pub span: Option<usize>,
    /// Take fewer texts, then fewer epochs, to be done after this time
    #[arg(long, value_name = "M")]
    pub minutes_limit: Option<f64>,
    /// Seed of texts, weights and order
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Type of the weights in the file: f32, f16 or bf16
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = parse_dtype)]
    pub dtype: DType,
    /// Layers that are trained at the same time
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub threads: usize,
    /// Tokens after which the middle of a text from a file is cut out; 0 for never
    #[arg(long, value_name = "N", default_value_t = 10_240)]
    pub max_tokens: usize,
    /// Tokens of a text that are trained on; 0 for all
    #[arg(long, value_name = "N", default_value_t = 832)]
    pub max_rows: usize,
    /// Locret-Q: put the last N tokens of each query before its text
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub query_aware: usize,
    /// What a label is: the largest logit, as published, the share of attention, the largest weight, or what
    /// that adds to the hidden state [default: logit; kvzip-plus for reconstruct]
    #[arg(long, value_name = "KIND")]
    pub label: Option<Label>,
    /// Weigh attention by the norm of the value
    #[arg(long)]
    pub value_norm: bool,
    /// Labels from the last N tokens of each query, too, not from its answer alone [default: 16; 1 for
    /// reconstruct, the token that predicts the first one of a piece]
    #[arg(long, value_name = "N")]
    pub query_tokens: Option<usize>,
    /// Bring labels of each head and text to one scale
    #[arg(long)]
    pub standardise: bool,
    /// A label becomes the largest of N around it [default: 3; 1 for reconstruct]
    #[arg(long, value_name = "N")]
    pub pool_labels: Option<usize>,
    /// The first N units of a text are fitted to its highest label [default: 4; 0 for reconstruct]
    #[arg(long, value_name = "N")]
    pub sinks: Option<usize>,
    /// Fit by the square of the distance, not by smooth L1
    #[arg(long)]
    pub square: bool,
    /// Weight of the smoothing loss, summed over layers [default: 0.0025; 0 for reconstruct]
    #[arg(long, value_name = "X")]
    pub alpha: Option<f32>,
    /// Weight of a ranking loss at the cut
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    pub ranking: f32,
    /// Advise, in the file, that the first N units of a text stay
    #[arg(long, value_name = "N")]
    pub advise_sinks: Option<usize>,
    /// Advise, in the file, that the newest N units stay
    #[arg(long, value_name = "N")]
    pub advise_recent: Option<usize>,
    /// Advise, in the file, that heads share a budget, with this floor
    #[arg(long, value_name = "FLOOR")]
    pub advise_ada: Option<f64>,
    /// Advise, in the file, over what heads share a budget
    #[arg(long, value_name = "layer|model", value_parser = parse_share)]
    pub advise_share: Option<Share>,
    /// Advise, in the file, fixed shares of layers or heads, as this JSON file of budget_table says
    #[arg(long, value_name = "FILE", conflicts_with = "advise_share")]
    pub advise_table: Option<PathBuf>,
    /// Advise, in the file, where units are seen: original or compact
    #[arg(long, value_name = "original|compact", value_parser = parse_positions)]
    pub advise_positions: Option<Positions>,
    /// Advise, in the file, selection on scores max-pooled over N neighbours (odd)
    #[arg(long, value_name = "N")]
    pub advise_pool: Option<usize>,
    /// Highest learning rate [default: 5e-4; 3e-3 for reconstruct]
    #[arg(long, value_name = "X")]
    pub learning_rate: Option<f64>,
    /// Keep what was collected in the work folder, for another training on it
    #[arg(long)]
    pub keep_work: bool,
    /// The model
    #[command(flatten)]
    pub model: ModelArgs,
}

/// What a label is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Label {
    /// The largest attention logit.
    Logit,
    /// The share of attention.
    Mass,
    /// The largest weight.
    Kvzip,
    /// The largest weight, times the length of what it adds to the hidden state, beside the layer's input.
    KvzipPlus,
}

impl Label {
    pub(super) fn kind(self) -> LabelKind {
        match self {
            Self::Logit => LabelKind::MaxLogit,
            Self::Mass => LabelKind::Mass,
            Self::Kvzip => LabelKind::Kvzip,
            Self::KvzipPlus => LabelKind::KvzipPlus,
        }
    }
}

/// What a head is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Head {
    /// Of queries, keys and values, as published.
    Locret,
    /// Linear, of the layer's input.
    Linear,
    /// Two layers, of the layer's input.
    Mlp,
    /// Two layers, of the layer's input, with scores that fall with age.
    Decay,
}

impl Label {
    /// Its name on the command line.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Logit => "logit",
            Self::Mass => "mass",
            Self::Kvzip => "kvzip",
            Self::KvzipPlus => "kvzip-plus",
        }
    }
}

impl Head {
    /// Its name on the command line.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Locret => "locret",
            Self::Linear => "linear",
            Self::Mlp => "mlp",
            Self::Decay => "decay",
        }
    }

    pub(super) fn form(self) -> HeadForm {
        match self {
            Self::Locret => HeadForm::Locret,
            Self::Linear => HeadForm::Linear,
            Self::Mlp => HeadForm::Mlp,
            Self::Decay => HeadForm::Decay,
        }
    }
}

/// The example.
///
/// # Errors
/// Those of its parts; [`Error::Usage`] if the time was too short for one text.
pub fn run(args: &Args) -> Result<()> {
    let started = Instant::now();
    let left = |share: f64| {
        let limit = args
            .minutes_limit
            .map(|m| Duration::from_secs_f64(m.max(0.0) * 60.0 * share));
        limit.map(|l| l.saturating_sub(started.elapsed()).as_secs_f64())
    };
    if args.advise_pool.is_some_and(|n| n.is_multiple_of(2)) {
        return Err(Error::Usage("--advise-pool must be odd".into()));
    }
    // A place that cannot be written to is found out before the work, not after it.
    if let Some(folder) = args.out.parent() {
        std::fs::create_dir_all(folder).map_err(|e| Error::write(folder, e))?;
    }
    let runtime = args.model.load()?;
    let samples = samples(args, &runtime)?;
    let work = args.work();
    // Reading takes most of the time; a quarter is left for training.
    let shards = gather(
        &args.collecting(),
        &runtime,
        &samples,
        &work.join("samples"),
        &|| left(0.75),
    )?;
    let mut config = args.training();
    let device = runtime.device.clone().autodiff();
    if let Some(seconds) = left(1.0) {
        config.epochs = epochs_within(&shards, &config, &device, seconds * 0.9)?;
    }
    let trained = fit(&shards, &work.join("heads"), &config, &device)?;
    let texts = shards.all().len();
    drop(shards);
    save(args, &runtime, &config, texts, trained, started)?;
    if !args.keep_work {
        // All that is in it is in the heads now; if it stays, it does no harm.
        let _ = std::fs::remove_dir_all(&work);
    }
    Ok(())
}

impl Args {
    /// Where unfinished work is kept.
    pub(super) fn work(&self) -> PathBuf {
        match &self.workdir {
            Some(dir) => dir.clone(),
            None => self.out.with_added_extension("work"),
        }
    }

    /// Whether texts are repeated as a whole.
    fn repeats(&self) -> bool {
        self.repeat || self.reconstructs()
    }

    fn reconstructs(&self) -> bool {
        let recipe = self.data.parse::<Recipe>();
        recipe.is_ok_and(|recipe| recipe == Recipe::Reconstruct)
    }

    /// What is asked for, or the default of the recipe.
    fn or<T>(&self, asked: Option<T>, usual: T, reconstruct: T) -> T {
        asked.unwrap_or(match self.reconstructs() {
            true => reconstruct,
            false => usual,
        })
    }

    fn form(&self) -> HeadForm {
        self.or(self.head, Head::Locret, Head::Mlp).form()
    }

    fn label(&self) -> LabelKind {
        self.or(self.label, Label::Logit, Label::KvzipPlus).kind()
    }

    pub(super) fn training(&self) -> TrainConfig {
        let mut config = TrainConfig::default();
        config.label = self.label();
        config.form = self.form();
        config.d_r = self.d_r;
        config.epochs = self.or(self.epochs, 4, 8);
        config.span = self.or(self.span, 512, 256);
        config.learning_rate = self.or(self.learning_rate, 5e-4, 3e-3);
        config.alpha = self.or(self.alpha, 0.0025, 0.0);
        if self.square {
            config.distance = Distance::Square;
        }
        config.ranking = self.ranking;
        config.target = if self.standardise {
            Target::Standardised
        } else {
            Target::Raw
        };
        config.pool = self.or(self.pool_labels, 3, 1);
        config.sinks = self.or(self.sinks, 4, 0);
        config.seed = self.seed;
        config.threads = self.threads;
        config
    }

    pub(super) fn collecting(&self) -> CollectConfig {
        let mut config = CollectConfig::default();
        config.labels = vec![self.label()];
        config.reads = vec![self.form().reads()];
        config.value_norm = self.value_norm;
        config.query_tokens = self.or(self.query_tokens, 16, 1);
        config.inputs = InputDtype::Q8;
        config.max_rows = self.max_rows;
        config.seed = self.seed;
        config
    }
}

/// The texts, tokenised.
pub(super) fn samples(args: &Args, runtime: &Runtime) -> Result<Vec<Sample>> {
    let frame = runtime.frame(None)?;
    let encode = |text: &str| runtime.encode(text);
    let (texts, most) = if let Ok(recipe) = args.data.parse::<Recipe>() {
        let fetch = args.model.fetch();
        let (essays, shown) = (runtime::essays(&fetch)?, Fetching::new());
        let mut corpus = TrainingCorpus::fetch(&fetch, &essays, &|p| shown.show(p))?;
        if recipe == Recipe::Reconstruct {
            corpus = corpus.with(Ordinary::fetch(&fetch, &|p| shown.show(p))?);
        }
        let count = |text: &str| runtime.count(text);
        let (planted, samples) = (args.planted, args.or(args.samples, 140, 200));
        let made =
            training_data::generate(recipe, planted, samples, args.seed, &corpus, &frame, &count)?;
        (made, 0)
    } else {
        let texts = training_data::read(Path::new(&args.data), &frame)?;
        (texts, args.max_tokens)
    };
    let repetition = training_data::repetition(&frame, args.piece, &encode)?;
    let repetition = args.repeats().then_some(&repetition);
    let samples = training_data::tokenise(&texts, most, repetition, &encode)?;
    if args.query_aware == 0 {
        return Ok(samples);
    }
    let begin = runtime.count(&frame.begin)?;
    let aware = samples
        .iter()
        .flat_map(|s| s.query_aware(args.query_aware, begin));
    Ok(aware.collect())
}

/// Inputs and labels of as many samples as `left` leaves time for.
pub(super) fn gather(
    config: &CollectConfig,
    runtime: &Runtime,
    samples: &[Sample],
    folder: &Path,
    left: &dyn Fn() -> Option<f64>,
) -> Result<Shards> {
    let model = runtime.model();
    let mut bar = Progress::new("reading texts", None, Unit::Tokens);
    let mut done = 0;
    let read = collect(&*model, samples, folder, config, &mut |at| {
        bar.set_total(at.of_tokens as u64);
        bar.set(at.tokens as u64);
        done = at.samples;
        let late = done < at.of && left().is_some_and(|seconds| seconds <= 0.0);
        if late {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    })?;
    let shards = match read {
        Some(shards) => shards,
        None => {
            bar.note(&format!("time for {done} of {} texts", samples.len()));
            // They are all there, so that nothing is read again.
            let some = collect(&*model, &samples[..done], folder, config, &mut |_| {
                ControlFlow::Continue(())
            })?;
            some.ok_or_else(|| Error::Usage("no text was read in time".into()))?
        }
    };
    bar.finish_with_line();
    eprintln!(
        "{} tokens to train on, {} to measure with, {} on disk",
        report::grouped(shards.rows(Split::Train)),
        report::grouped(shards.rows(Split::Validation)),
        report::bytes(shards.bytes() as usize)
    );
    Ok(shards)
}

pub(super) fn fit(
    shards: &Shards,
    folder: &Path,
    config: &TrainConfig,
    device: &burn::tensor::Device,
) -> Result<Trained> {
    let layers = shards.layers();
    let bar = Progress::new(format!("training {layers} layers"), None, Unit::Cases);
    let state = Mutex::new((bar, vec![0; layers], 0));
    let trained = train(shards, folder, config, device, &|progress| {
        let mut state = state.lock().unwrap_or_else(|e| e.into_inner());
        let (bar, done, each) = &mut *state;
        match progress {
            TrainProgress::Step {
                layer, step, steps, ..
            } => {
                *each = *steps;
                done[*layer] = *step;
            }
            TrainProgress::Layer(report) => done[report.layer] = *each,
            _ => {}
        }
        if *each > 0 {
            bar.set_total((*each * layers) as u64);
            bar.set(done.iter().sum::<usize>() as u64);
        }
        ControlFlow::Continue(())
    })?;
    let (bar, ..) = state.into_inner().unwrap_or_else(|e| e.into_inner());
    bar.finish_with_line();
    trained.ok_or_else(|| Error::Usage("the training was stopped".into()))
}

/// Writes heads and pictures, and says how it went.
fn save(
    args: &Args,
    runtime: &Runtime,
    config: &TrainConfig,
    texts: usize,
    mut trained: Trained,
    started: Instant,
) -> Result<()> {
    // Where a file lay says nothing to others.
    let data = Path::new(&args.data)
        .file_name()
        .map(|name| name.to_string_lossy());
    let settings = serde_json::json!({
        "data": data,
        "texts": texts,
        "collect": args.collecting(),
        "train": config,
        "query_aware": args.query_aware,
        "repeated": args.repeats().then_some(args.piece),
        "planted": args.reconstructs().then_some(args.planted),
    });
    let metadata = &mut trained.heads.metadata;
    metadata.insert("model".into(), runtime.name.clone());
    if let Some(hash) = runtime.sha256()? {
        metadata.insert("model_sha256".into(), hash);
    }
    metadata.insert("training".into(), settings.to_string());
    let advice = HeadAdvice {
        pool: args.advise_pool,
        sinks: args.advise_sinks,
        recent: args.advise_recent,
        ada: args.advise_ada,
        share: args.advise_share,
        table: (args.advise_table.as_deref())
            .map(|file| TableConfig::from(file).table())
            .transpose()?,
        positions: args.advise_positions,
    };
    if advice != HeadAdvice::default() {
        trained.heads.advise(&advice);
    }
    trained.heads.save(&args.out, args.dtype)?;
    pictures(&args.out, &trained)?;
    let mut table = Table::new(&["", ">before", ">after"]);
    let mean = |epoch: fn(&[(usize, f32)]) -> Option<&(usize, f32)>| {
        let all = trained.layers.iter().filter_map(|l| epoch(&l.curve));
        all.map(|(_, loss)| f64::from(*loss)).sum::<f64>() / trained.layers.len() as f64
    };
    let (first, last) = (mean(|c| c.first()), mean(|c| c.last()));
    table.row([
        "loss".to_owned(),
        format!("{first:.3}"),
        format!("{last:.3}"),
    ]);
    if let Some(validation) = trained.validation() {
        for (share, recall) in RECALL_AT.iter().zip(validation.recall) {
            let name = format!("recall of the top {:.0} %", share * 100.0);
            table.row([name, format!("{share:.3}"), format!("{recall:.3}")]);
        }
        let row = [
            "correlation".to_owned(),
            "0".into(),
            format!("{:.3}", validation.pearson),
        ];
        table.row(row);
    }
    println!(
        "{}: {} weights in {} heads, {} epochs, {}\n\n{table}",
        args.out.display(),
        report::grouped(trained.heads.parameters()),
        trained.layers.len(),
        config.epochs,
        report::duration(started.elapsed().as_secs_f64()),
    );
    Ok(())
}

/// Loss by step and recall by epoch, over all layers, beside the heads.
fn pictures(out: &Path, trained: &Trained) -> Result<()> {
    let steps: Vec<usize> = match trained.layers.first() {
        Some(layer) => layer.curve.iter().map(|(step, _)| *step).collect(),
        None => return Ok(()),
    };
    let over = |pick: &dyn Fn(Vec<f32>) -> f32| -> Vec<(f64, f64)> {
        let at = |(i, step): (usize, &usize)| {
            let all = trained.layers.iter().filter_map(|l| l.curve.get(i));
            let mut all: Vec<f32> = all.map(|(_, loss)| *loss).collect();
            all.sort_by(f32::total_cmp);
            (*step as f64, f64::from(pick(all)))
        };
        steps.iter().enumerate().map(at).collect()
    };
    let line = |name: &str, points| Series {
        name: name.into(),
        points,
        joined: true,
    };
    Chart {
        title: "Training of retaining heads".into(),
        x: ("steps of a layer".into(), Scale::Linear),
        y: ("loss".into(), Scale::Linear),
        series: vec![
            line(
                "best layer",
                over(&|all| all.first().copied().unwrap_or_default()),
            ),
            line(
                "median",
                over(&|all| all.get(all.len() / 2).copied().unwrap_or_default()),
            ),
            line(
                "worst layer",
                over(&|all| all.last().copied().unwrap_or_default()),
            ),
        ],
    }
    .write(&out.with_extension("loss.svg"))?;
    let epochs = trained
        .layers
        .iter()
        .map(|l| l.validation.len())
        .min()
        .unwrap_or(0);
    if epochs == 0 {
        return Ok(());
    }
    let recall = |which: usize| {
        let at = |epoch: usize| {
            let all = trained
                .layers
                .iter()
                .map(|l| l.validation[epoch].recall[which]);
            (
                epoch as f64 + 1.0,
                all.sum::<f64>() / trained.layers.len() as f64,
            )
        };
        (0..epochs).map(at).collect()
    };
    Chart {
        title: "Units that matter and are found".into(),
        x: ("epochs".into(), Scale::Linear),
        y: ("recall on texts put aside".into(), Scale::Share),
        series: (RECALL_AT.iter().enumerate())
            .map(|(i, share)| line(&format!("top {:.0} %", share * 100.0), recall(i)))
            .collect(),
    }
    .write(&out.with_extension("recall.svg"))
}
