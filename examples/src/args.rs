//! Groups of command-line flags that several examples take (`#[command(flatten)]`).

use crate::{
    Error, Result,
    runtime::{self, Runtime},
};
use clap::Args;
use locret_core::{
    Budget, CacheOptions, DType, DecodeEviction, Error as CoreError, Kernels, Positions, Prefill,
    Quantization, Sampling, Share,
};
use locret_eval::{
    files::sha256,
    tasks::{self, Kind, Recipe, Task},
};
use locret_models::{Activations, Date, FetchOptions, LoadOptions, WeightDtype};
use locret_policies::{CamKeeps, D2oForm, MergeBy, Method, PolicyConfig, PolicyError, TierConfig};
use serde_json::json;
use std::{fs, path::PathBuf};

/// Which model runs, and where.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// smollm2, a .gguf file, a folder with config.json and safetensors, or hf:owner/name
    #[arg(long, value_name = "MODEL", default_value = "smollm2")]
    pub model: String,
    /// flex (CPU), or cuda, vulkan, metal, wgpu where built with that feature; cuda:1 is the second card
    #[arg(long, value_name = "NAME", default_value = "flex")]
    pub device: String,
    /// Lay the layers over several of these, the first ones on the first: cuda:0,cuda:1
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        conflicts_with = "device"
    )]
    pub devices: Vec<String>,
    /// How many layers each of --devices has, rather than equally many: 20,12
    #[arg(
        long,
        value_name = "NUMBERS",
        value_delimiter = ',',
        requires = "devices"
    )]
    pub layers_each: Vec<usize>,
    /// As llama.cpp has it: the output and the last N - 1 layers on --device or --devices, all else on the CPU (so
    /// that everything but the embedding is there with one more than the model has layers)
    #[arg(long, value_name = "N")]
    pub gpu_layers: Option<usize>,
    /// Type of the weights in memory: file (as they are), f32, f16 or bf16
    #[arg(long, value_name = "TYPE", default_value = "file", value_parser = parse_weights)]
    pub weights: WeightDtype,
    /// How a decoded token meets packed weights: exact, or bytes (rounded to eight bits, faster)
    #[arg(long, value_name = "HOW", default_value = "exact", value_parser = parse_activations)]
    pub activations: Activations,
    /// What computes: auto (kernels of this repository for the device, where there are some), or operations (Burn's)
    #[arg(long, value_name = "NAME", default_value = "auto", value_parser = parse_kernels)]
    pub kernels: Kernels,
    /// LongRoPE (Phi-3) with its long factors at every length
    #[arg(long)]
    pub always_long: bool,
    /// Folder for downloads
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
    /// Never use the network
    #[arg(long)]
    pub offline: bool,
}

impl Default for ModelArgs {
    /// SmolLM2 on the CPU.
    fn default() -> Self {
        Self {
            model: "smollm2".into(),
            device: "flex".into(),
            devices: Vec::new(),
            layers_each: Vec::new(),
            gpu_layers: None,
            weights: WeightDtype::default(),
            activations: Activations::default(),
            kernels: Kernels::default(),
            always_long: false,
            cache: None,
            offline: false,
        }
    }
}

impl ModelArgs {
    /// Where downloads are kept.
    pub fn fetch(&self) -> FetchOptions {
        let mut options = FetchOptions::new().offline(self.offline);
        options.cache.clone_from(&self.cache);
        options
    }

    /// Whether layers lie on several devices.
    pub fn is_mapped(&self) -> bool {
        !self.devices.is_empty() || self.gpu_layers.is_some()
    }

    /// How the model is loaded.
    pub fn options(&self) -> LoadOptions {
        LoadOptions::new()
            .weights(self.weights)
            .activations(self.activations)
            .kernels(self.kernels)
            .always_long(self.always_long)
    }

    /// Fetches the model if need be, and loads it.
    ///
    /// # Errors
    /// As [`Runtime::load`].
    pub fn load(&self) -> Result<Runtime> {
        Runtime::load(self)
    }
}

/// Which policy decides what stays.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Policy")]
pub struct PolicyArgs {
    /// full, window, random, key-norm, key-diff, sirllm, locret, h2o, snapkv, tova,
    /// expected-attention, lagkv, cur, q-filters, compactor, kvzap, fast-kvzip, d2o, cam,
    /// duo-attention, minference or infllm
    #[arg(long, value_name = "NAME")]
    pub policy: Option<String>,
    /// The policy from a TOML or JSON file; other flags of this group override it
    #[arg(long, value_name = "FILE")]
    pub policy_file: Option<PathBuf>,
    /// What each KV head keeps: units (256), a share of the prompt (12.5%), or bytes for all
    /// layers (4MiB); infllm: what is resident, without a share
    #[arg(long, value_name = "N", value_parser = parse_budget)]
    pub budget: Option<Budget>,
    /// Newest units protected while further chunks follow
    #[arg(long, value_name = "N")]
    pub stabilizers: Option<usize>,
    /// First units of the text that always stay
    #[arg(long, value_name = "N")]
    pub sinks: Option<usize>,
    /// Newest units that always stay
    #[arg(long, value_name = "N")]
    pub recent: Option<usize>,
    /// File of Locret's, KVzap's or Fast KVzip's heads (.safetensors, .bin or .pt)
    #[arg(long, value_name = "FILE")]
    pub heads: Option<PathBuf>,
    /// Use heads by the published procedure, whatever their file advises
    #[arg(long)]
    pub no_advice: bool,
    /// original: units keep their places in the text; compact: they move together
    #[arg(long, value_name = "original|compact", value_parser = parse_positions)]
    pub positions: Option<Positions>,
    /// Select on scores max-pooled over this many neighbours (odd)
    #[arg(long, value_name = "N")]
    pub pool: Option<usize>,
    /// Keep keys and values as integers of this many bits: 8, 4, 3 or 2
    #[arg(long, value_name = "BITS")]
    pub quantize: Option<u8>,
    /// Share the budget out over layers, more for lower ones (PyramidKV's beta: 20)
    #[arg(long, value_name = "BETA")]
    pub pyramid: Option<f64>,
    /// Share a budget out over heads by their scores, with this floor (Ada-KV: 0.2)
    #[arg(long, value_name = "FLOOR")]
    pub ada: Option<f64>,
    /// Over what heads share: their layer, or the model, which is cut after its last layer
    #[arg(long, value_name = "layer|model", value_parser = parse_share)]
    pub share: Option<Share>,
    /// Share the budget out over layers, or layers and heads, as this JSON file says
    #[arg(long, value_name = "FILE")]
    pub table: Option<PathBuf>,
    /// Fold dropped values into kept ones whose keys have at least this cosine
    #[arg(long, value_name = "COSINE")]
    pub merge: Option<f32>,
    /// How much a folded value counts: mean, or weighted by likeness and length
    #[arg(long, value_name = "mean|weighted", value_parser = parse_merge_by)]
    pub merge_by: Option<MergeBy>,
    /// Choose half of what is kept by what values become behind the output projection, too (CriticalKV)
    #[arg(long)]
    pub critical: bool,
    /// Keep or drop blocks of this many tokens together (ChunkKV: 20)
    #[arg(long, value_name = "N")]
    pub blocks: Option<usize>,
    /// Evict while generating, whenever the budget is exceeded by N units
    #[arg(long, value_name = "N")]
    pub decode_every: Option<usize>,
    /// sirllm: factor on older scores when a further turn begins
    #[arg(long, value_name = "X")]
    pub decay: Option<f32>,
    /// random, compactor, cam: seed
    #[arg(long, value_name = "N")]
    pub policy_seed: Option<u64>,
    /// snapkv: how many of the last queries are observed; cur: tokens of a window; cam: units that a dropped value is
    /// spread over
    #[arg(long, value_name = "N")]
    pub observe: Option<usize>,
    /// snapkv: width of the average pooling (odd)
    #[arg(long, value_name = "N")]
    pub kernel: Option<usize>,
    /// kvzap, fast-kvzip: keep what scores at least this, instead of a budget
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub threshold: Option<f32>,
    /// d2o: what is folded and what it counts, as in the paper or in the authors' code
    #[arg(long, value_name = "paper|code", value_parser = parse_form)]
    pub form: Option<D2oForm>,
    /// d2o: leave keys as they are and mix values alone
    #[arg(long)]
    pub no_mix_keys: bool,
    /// d2o: how much of the threshold a step's mean cosine is
    #[arg(long, value_name = "SHARE")]
    pub smoothing: Option<f32>,
    /// d2o: how many of the first and of the last layers have nothing folded (2,1)
    #[arg(long, value_name = "FIRST,LAST", value_parser = parse_exempt)]
    pub exempt: Option<(usize, usize)>,
    /// d2o: those layers keep everything, as published; memory is then not bounded
    #[arg(long)]
    pub exempt_whole: bool,
    /// cam: what stays, the newest units or those that attention has gone to
    #[arg(long, value_name = "window|heavy", value_parser = parse_keeps)]
    pub keeps: Option<CamKeeps>,
    /// cam: add values up however many units go into one
    #[arg(long)]
    pub sums: bool,
    /// duo-attention: share of the heads that keep the beginning and the newest units alone
    #[arg(long, value_name = "SHARE")]
    pub streaming: Option<f64>,
    /// compactor: factor on leverage
    #[arg(long, value_name = "X")]
    pub blending: Option<f32>,
    /// lagkv: units of a partition
    #[arg(long, value_name = "N")]
    pub lag: Option<usize>,
    /// expected-attention: positions ahead that queries to come are taken to stand at
    #[arg(long, value_name = "N")]
    pub future: Option<usize>,
    /// q-filters: file of directions (safetensors, as the authors publish them or q_filters writes)
    #[arg(long, value_name = "FILE")]
    pub filters: Option<PathBuf>,
    /// minference: file of patterns (JSON, as the authors publish them or search_patterns writes);
    /// duo-attention: file of heads' scores (a row for each layer)
    #[arg(long, value_name = "FILE", conflicts_with_all = ["vertical", "slash"])]
    pub patterns: Option<PathBuf>,
    /// minference, --sparse: columns of every head
    #[arg(long, value_name = "N", requires = "slash")]
    pub vertical: Option<usize>,
    /// minference, --sparse: diagonals of every head
    #[arg(long, value_name = "N", requires = "vertical")]
    pub slash: Option<usize>,
    /// infllm: first units, which are always seen (128, or a part of the budget)
    #[arg(long, value_name = "N")]
    pub n_init: Option<usize>,
    /// infllm: newest units, which are seen where they stand (4096, or a part of the budget)
    #[arg(long, value_name = "N")]
    pub n_local: Option<usize>,
    /// infllm: the most tokens of a chunk (512)
    #[arg(long, value_name = "N")]
    pub exec_block: Option<usize>,
    /// Prompts see a part of what the policy keeps, in minference's --patterns or --vertical and --slash
    #[arg(long)]
    pub sparse: bool,
    /// Put away what the policy drops, and retrieve it by blocks
    #[arg(long)]
    pub put_away: bool,
    /// infllm, --put-away: units of a block
    #[arg(long, value_name = "N")]
    pub block_size: Option<usize>,
    /// infllm, --put-away: how many blocks a step retrieves
    #[arg(long, value_name = "N")]
    pub retrieve: Option<usize>,
    /// infllm, --put-away: keys that a block is remembered by
    #[arg(long, value_name = "N")]
    pub repr_topk: Option<usize>,
    /// infllm, --put-away: where units lie that are not resident: memory, disk or disk:FOLDER
    #[arg(long, value_name = "WHERE", value_parser = parse_tier)]
    pub tier: Option<TierConfig>,
    /// --tier: what is resident, in units of each KV head or bytes for all layers
    #[arg(long, value_name = "N", value_parser = parse_budget)]
    pub resident: Option<Budget>,
}

impl PolicyArgs {
    /// The policy that is asked for; the full cache where none is.
    ///
    /// # Errors
    /// [`Error::Policy`] for an unknown name, an unreadable file or contradictory settings.
    pub fn config(&self) -> Result<PolicyConfig> {
        let mut config = match (&self.policy_file, &self.policy) {
            (Some(_), Some(_)) => {
                return Err(Error::Usage(
                    "--policy and --policy-file both name a policy: give one of them".into(),
                ));
            }
            (Some(file), None) => PolicyConfig::load(file)?,
            (None, Some(name)) => PolicyConfig::new(name.parse()?),
            (None, None) => PolicyConfig::new(Method::Full),
        };
        let decode = self.decode_every.map(DecodeEviction::Every);
        set(&mut config.budget, self.budget);
        set(&mut config.stabilizers, self.stabilizers);
        set(&mut config.sinks, self.sinks);
        set(&mut config.recent, self.recent);
        set(&mut config.heads, self.heads.clone());
        set(&mut config.advice, self.no_advice.then_some(false));
        set(&mut config.positions, self.positions);
        set(&mut config.pool, self.pool);
        set(&mut config.quantize, self.quantize.map(Quantization::bits));
        set(&mut config.pyramid, self.pyramid);
        set(&mut config.ada, self.ada);
        set(&mut config.share, self.share);
        set(&mut config.table, self.table.clone().map(Into::into));
        set(&mut config.merge, self.merge);
        set(&mut config.merge_by, self.merge_by);
        config.critical |= self.critical;
        set(&mut config.blocks, self.blocks);
        set(&mut config.decode, decode);
        set(&mut config.decay, self.decay);
        set(&mut config.seed, self.policy_seed);
        set(&mut config.window, self.observe);
        set(&mut config.kernel, self.kernel);
        set(&mut config.threshold, self.threshold);
        set(&mut config.form, self.form);
        set(&mut config.mix_keys, self.no_mix_keys.then_some(false));
        set(&mut config.smoothing, self.smoothing);
        set(&mut config.exempt, self.exempt);
        config.exempt_whole |= self.exempt_whole;
        set(&mut config.keeps, self.keeps);
        config.sums |= self.sums;
        set(&mut config.streaming, self.streaming);
        set(&mut config.blending, self.blending);
        set(&mut config.lag, self.lag);
        set(&mut config.future, self.future);
        set(&mut config.filters, self.filters.clone());
        set(&mut config.patterns, self.patterns.clone());
        set(&mut config.vertical, self.vertical);
        set(&mut config.slash, self.slash);
        set(&mut config.n_init, self.n_init);
        set(&mut config.n_local, self.n_local);
        set(&mut config.exec_block, self.exec_block);
        set(&mut config.block_size, self.block_size);
        set(&mut config.topk, self.retrieve);
        set(&mut config.repr_topk, self.repr_topk);
        set(&mut config.tier, self.tier.clone());
        set(&mut config.resident, self.resident);
        config.put_away |= self.put_away;
        config.sparse |= self.sparse;
        Ok(config)
    }
}

fn set<T>(to: &mut Option<T>, from: Option<T>) {
    if from.is_some() {
        *to = from;
    }
}

/// How a prompt is read.
#[derive(Debug, Clone, Copy, Args)]
#[command(next_help_heading = "Reading")]
pub struct PrefillArgs {
    /// Tokens that go through the model together; the cache peaks at budget + chunk
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub chunk: usize,
    /// The prompt's last tokens, which are read without eviction
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub local: usize,
    /// Type of the cached keys and values: f32, f16 or bf16
    #[arg(long, value_name = "TYPE", default_value = "f32", value_parser = parse_dtype)]
    pub kv: DType,
}

impl PrefillArgs {
    /// The engine's settings.
    pub fn prefill(&self) -> Prefill {
        Prefill::new(self.chunk, self.local)
    }

    /// The cache's settings.
    pub fn cache(&self) -> CacheOptions {
        CacheOptions::new().dtype(self.kv)
    }
}

/// What is read.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Prompt")]
pub struct PromptArgs {
    /// The prompt
    #[arg(long, value_name = "TEXT", conflicts_with = "prompt_file")]
    pub prompt: Option<String>,
    /// A file with the prompt
    #[arg(long, value_name = "FILE")]
    pub prompt_file: Option<PathBuf>,
    /// Take the prompt as a user's turn of the model's chat template
    #[arg(long)]
    pub chat: bool,
    /// Take control tokens that are written in the prompt as control tokens
    #[arg(long)]
    pub control_tokens: bool,
    /// The day that a chat template may print; today if it is not given
    #[arg(long, value_name = "YYYY-MM-DD", value_parser = parse_date)]
    pub date: Option<Date>,
}

impl PromptArgs {
    /// The prompt's tokens.
    ///
    /// # Errors
    /// [`Error::Usage`] if there is no prompt, [`Error::Read`], [`Error::Model`].
    pub fn ids(&self, runtime: &Runtime) -> Result<Vec<u32>> {
        let text = match (&self.prompt, &self.prompt_file) {
            (Some(text), _) => text.clone(),
            (None, Some(file)) => fs::read_to_string(file).map_err(|e| Error::read(file, e))?,
            (None, None) => {
                return Err(Error::Usage("give a --prompt or a --prompt-file".into()));
            }
        };
        let date = self.date.unwrap_or_else(Date::today);
        runtime.prompt_on(date, &text, self.chat, self.control_tokens)
    }
}

/// What is asked.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Tasks")]
pub struct TaskArgs {
    /// Tasks as JSON lines: {"id", "task", "context", "queries": [{"query", "answer"}]}
    #[arg(long = "tasks", value_name = "FILE.jsonl")]
    pub file: Option<PathBuf>,
    /// Built-in tasks, separated by commas; `ruler` for all of RULER's
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        conflicts_with = "file"
    )]
    pub kinds: Vec<String>,
    /// Tokens of a built-in task's context
    #[arg(long, value_name = "N", default_value_t = 2000)]
    pub tokens: usize,
    /// Contexts of each built-in kind
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub samples: usize,
    /// Seed of the built-in tasks
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Put built-in tasks as plain text although the model has a chat template
    #[arg(long)]
    pub plain: bool,
    /// Write the built-in tasks to a file as well
    #[arg(long, value_name = "FILE.jsonl")]
    pub write_tasks: Option<PathBuf>,
}

impl TaskArgs {
    /// The tasks: from the file, or generated.
    ///
    /// # Errors
    /// As [`tasks::read`], [`runtime::texts`] and [`Recipe::generate_from`].
    pub fn tasks(&self, runtime: &Runtime, fetch: &FetchOptions) -> Result<Vec<Task>> {
        if let Some(file) = &self.file {
            return tasks::read(file);
        }
        let kinds = match &self.kinds[..] {
            [] => Kind::DEFAULT.to_vec(),
            names => {
                let kinds = names.iter().map(|name| Kind::named(name));
                kinds.collect::<Result<Vec<_>>>()?.concat()
            }
        };
        let recipe = Recipe {
            kinds,
            tokens: self.tokens,
            samples: self.samples,
            seed: self.seed,
        };
        let texts = runtime::texts(&recipe.kinds, fetch)?;
        let frame = runtime.frame(self.plain.then_some(false))?;
        let all = recipe.generate_from(&frame, &texts, &|text| runtime.count(text))?;
        if let Some(file) = &self.write_tasks {
            tasks::write(file, &all)?;
        }
        Ok(all)
    }

    /// What the tasks depend on, for results.
    pub fn settings(&self, tasks: &[Task]) -> serde_json::Value {
        // Two files of one name with other content are other tasks.
        let text = serde_json::to_vec(tasks).unwrap_or_default();
        let mut digest = sha256(&text);
        digest.truncate(16);
        match &self.file {
            Some(file) => json!({ "file": file, "sha256": digest }),
            None => json!({
                "builtin": self.kinds,
                "tokens": self.tokens,
                "samples": self.samples,
                "seed": self.seed,
                "plain": self.plain,
                "sha256": digest,
            }),
        }
    }
}

/// How tokens are chosen.
#[derive(Debug, Clone, Copy, Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// Divides the logits; 0 takes the most likely token
    #[arg(
        long,
        value_name = "X",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    pub temperature: f32,
    /// Only the N most likely tokens; 0 for all
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub top_k: usize,
    /// Only the most likely tokens that together have this probability; 0 takes the most likely one
    #[arg(
        long,
        value_name = "P",
        default_value_t = 1.0,
        allow_negative_numbers = true
    )]
    pub top_p: f32,
    /// Only tokens at least P times as likely as the most likely one
    #[arg(
        long,
        value_name = "P",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    pub min_p: f32,
    /// Makes tokens that have occurred less likely; 1 changes nothing
    #[arg(
        long,
        value_name = "X",
        default_value_t = 1.0,
        allow_negative_numbers = true
    )]
    pub repetition_penalty: f32,
    /// Seed of the draws
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
}

impl SamplingArgs {
    /// The engine's settings.
    pub fn sampling(&self) -> Sampling {
        Sampling {
            // Nothing but the most likely token is left of a probability of 0.
            temperature: if self.top_p == 0.0 {
                0.0
            } else {
                self.temperature
            },
            top_k: self.top_k,
            top_p: if self.top_p == 0.0 { 1.0 } else { self.top_p },
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            seed: self.seed,
        }
    }
}

pub(crate) fn parse_budget(text: &str) -> Result<Budget, String> {
    text.parse().map_err(|e: CoreError| e.to_string())
}

/// Bytes: `4MiB`; also `KiB`, `GiB`, and `B`.
///
/// # Errors
/// A message for anything else.
pub fn parse_bytes(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(Budget::Bytes(bytes)) => Ok(bytes),
        _ => Err("expected bytes, such as 4MiB".into()),
    }
}

fn parse_tier(text: &str) -> Result<TierConfig, String> {
    text.parse().map_err(|e: PolicyError| e.to_string())
}

fn parse_date(text: &str) -> Result<Date, String> {
    let mut parts = text.splitn(3, '-');
    let mut part = |most: u16| {
        let number = parts.next().and_then(|part| part.parse::<u16>().ok());
        number.filter(|n| (1..=most).contains(n))
    };
    match (part(9999), part(12), part(31)) {
        (Some(year), Some(month), Some(day)) => Ok(Date {
            year,
            month: month as u8,
            day: day as u8,
        }),
        _ => Err("expected a date, such as 2024-07-26".into()),
    }
}

pub(crate) fn parse_positions(text: &str) -> Result<Positions, String> {
    match text {
        "original" => Ok(Positions::Original),
        "compact" => Ok(Positions::Compact),
        _ => Err("expected original or compact".into()),
    }
}

fn parse_merge_by(text: &str) -> Result<MergeBy, String> {
    text.parse().map_err(|e: CoreError| e.to_string())
}

fn parse_form(text: &str) -> Result<D2oForm, String> {
    text.parse().map_err(|e: CoreError| e.to_string())
}

fn parse_keeps(text: &str) -> Result<CamKeeps, String> {
    text.parse().map_err(|e: CoreError| e.to_string())
}

/// Numbers of first and last layers.
fn parse_exempt(text: &str) -> Result<(usize, usize), String> {
    let wrong = || format!("expected two numbers of layers, as 2,1, found {text}");
    let (first, last) = text.split_once(',').ok_or_else(wrong)?;
    let number = |part: &str| part.trim().parse().map_err(|_| wrong());
    Ok((number(first)?, number(last)?))
}

pub(crate) fn parse_share(text: &str) -> Result<Share, String> {
    text.parse().map_err(|e: CoreError| e.to_string())
}

fn parse_weights(text: &str) -> Result<WeightDtype, String> {
    match text {
        "f32" => Ok(WeightDtype::F32),
        "f16" => Ok(WeightDtype::F16),
        "bf16" => Ok(WeightDtype::BF16),
        "file" => Ok(WeightDtype::File),
        _ => Err("expected f32, f16, bf16 or file".into()),
    }
}

fn parse_kernels(text: &str) -> Result<Kernels, String> {
    match text {
        "auto" => Ok(Kernels::Auto),
        "operations" => Ok(Kernels::Operations),
        _ => Err("expected auto or operations".into()),
    }
}

fn parse_activations(text: &str) -> Result<Activations, String> {
    match text {
        "exact" => Ok(Activations::Exact),
        "bytes" => Ok(Activations::Bytes),
        _ => Err("expected exact or bytes".into()),
    }
}

pub(crate) fn parse_dtype(text: &str) -> Result<DType, String> {
    match text {
        "f32" => Ok(DType::F32),
        "f16" => Ok(DType::F16),
        "bf16" => Ok(DType::BF16),
        _ => Err("expected f32, f16 or bf16".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct All {
        #[command(flatten)]
        policy: PolicyArgs,
        #[command(flatten)]
        prefill: PrefillArgs,
        #[command(flatten)]
        sampling: SamplingArgs,
    }

    fn parse(flags: &str) -> Result<All, clap::Error> {
        All::try_parse_from(["x"].into_iter().chain(flags.split_whitespace()))
    }

    #[test]
    fn no_flags_are_a_full_cache_and_greedy() {
        let all = parse("").unwrap();
        assert_eq!(
            all.policy.config().unwrap(),
            PolicyConfig::new(Method::Full)
        );
        assert_eq!(all.sampling.sampling(), Sampling::greedy());
    }

    #[test]
    fn flags_become_a_configuration() {
        let all = parse(
            "--policy locret --budget 160 --stabilizers 32 --chunk 128 --local 16 --heads h.bin \
             --positions original --sinks 4 --decode-every 8 --kv bf16 \
             --quantize 4 --pyramid 20 --ada 0.2 --share model --table t.json --merge 0.5 --no-advice",
        )
        .unwrap();
        let config = all.policy.config().unwrap();
        let mut expected = PolicyConfig::new(Method::Locret)
            .budget(Budget::Units(160))
            .positions(Positions::Original);
        expected.stabilizers = Some(32);
        expected.heads = Some("h.bin".into());
        expected.advice = Some(false);
        expected.sinks = Some(4);
        expected.decode = Some(DecodeEviction::Every(8));
        expected.quantize = Some(Quantization::bits(4));
        expected.pyramid = Some(20.0);
        expected.ada = Some(0.2);
        expected.share = Some(Share::Model);
        expected.table = Some("t.json".into());
        expected.merge = Some(0.5);
        assert_eq!(config, expected);
        let prefill = all.prefill;
        assert_eq!(
            (prefill.prefill().chunk, prefill.prefill().local),
            (128, 16)
        );
        assert_eq!(prefill.cache().dtype, DType::BF16);
    }

    #[test]
    fn dates() {
        let date = parse_date("2024-07-06").unwrap();
        assert_eq!((date.year, date.month, date.day), (2024, 7, 6));
        for bad in [
            "",
            "2024",
            "2024-13-01",
            "2024-01-32",
            "2024-1-1-1",
            "a-b-c",
        ] {
            assert!(parse_date(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sampling_at_its_limits() {
        // What clients send for "the most likely token".
        let zero = parse("--temperature 1 --top-p 0")
            .unwrap()
            .sampling
            .sampling();
        assert_eq!(zero, Sampling::greedy());
        // The engine says what is wrong with these, and names the setting.
        let negative = parse("--temperature -1").unwrap().sampling;
        assert!(negative.sampling().init().is_err());
    }

    #[test]
    fn budgets_in_units_shares_and_bytes() {
        assert_eq!(parse_budget("256"), Ok(Budget::Units(256)));
        assert_eq!(parse_budget("12.5%"), Ok(Budget::Ratio(0.125)));
        assert_eq!(parse_budget("4MiB"), Ok(Budget::Bytes(4 << 20)));
        assert_eq!(parse_budget("1.5 KiB"), Ok(Budget::Bytes(1536)));
        for bad in ["", "-1", "x", "1.5", "GiB", "-1MiB", "NaN B"] {
            assert!(parse_budget(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn files_can_be_overridden_and_names_are_checked() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("p.toml");
        std::fs::write(&file, "policy = \"window\"\nbudget = 100\nsinks = 2").unwrap();
        let flags = format!("--policy-file {} --budget 64", file.display());
        let config = parse(&flags).unwrap().policy.config().unwrap();
        assert_eq!(config.policy, Method::Window);
        assert_eq!(
            (config.budget, config.sinks),
            (Some(Budget::Units(64)), Some(2))
        );
        let both = format!("--policy full {flags}");
        assert!(parse(&both).unwrap().policy.config().is_err());
        let unknown = parse("--policy windows")
            .unwrap()
            .policy
            .config()
            .unwrap_err();
        assert!(unknown.to_string().contains("windows"), "{unknown}");
        assert!(
            parse("--policy-file /none.toml")
                .unwrap()
                .policy
                .config()
                .is_err()
        );
        assert!(parse("--positions relative").is_err());
    }
}
