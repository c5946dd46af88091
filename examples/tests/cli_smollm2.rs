//! The examples on SmolLM2-135M-Instruct, which is fetched once: short texts, every path.

use clap::Parser;
use locret_core::{KvCachePolicy, Prefill, Session};
use locret_eval::{
    ablation::Record,
    evaluate::Results,
    patterns::Recalling,
    tasks::{self, Query, Task},
};
use locret_examples::{
    args::ModelArgs,
    cli::{ablation, evaluate, generate, quickstart, search_patterns},
};
use locret_policies::{
    Full, MInference,
    minference::{Pattern, Patterns},
};
use std::{fs, path::Path, sync::Arc};

fn evaluated(flags: &[&str]) -> Result<(), String> {
    let all = ["evaluate"].into_iter().chain(flags.iter().copied());
    let args = evaluate::Args::try_parse_from(all).map_err(|e| e.to_string())?;
    evaluate::run(&args).map_err(|e| e.chain())
}

fn results(path: &Path) -> Results {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn generate_streams_whole_characters_and_stops_at_the_end_of_a_turn() {
    let run = |flags: &[&str]| {
        let all = ["generate"].into_iter().chain(flags.iter().copied());
        let args = generate::Args::parse_from(all);
        let mut out = Vec::new();
        generate::run(&args, &mut out).map_err(|e| e.chain())?;
        Ok::<String, String>(String::from_utf8(out).unwrap())
    };
    let prompt = "Say exactly this and nothing else: Paris is the capital of France.";
    let text = run(&["--chat", "--prompt", prompt, "--max-new", "40"]).unwrap();
    assert!(
        text.contains("Paris") && !text.contains("<|im_end|>"),
        "{text}"
    );
    let bounded = [
        "--policy", "window", "--budget", "64", "--chunk", "32", "--local", "8",
    ];
    let more = ["--prompt", "One, two, three, four,", "--max-new", "6"];
    let text = run(&[&more[..], &bounded].concat()).unwrap();
    assert!(text.contains("five"), "{text}");
    // Sampling by a seed gives the same text again.
    let drawn = ["--temperature", "0.9", "--top-p", "0.9", "--seed", "3"];
    let all = [&more[..], &drawn].concat();
    assert_eq!(run(&all), run(&all));
    assert!(
        run(&["--max-new", "3"])
            .unwrap_err()
            .contains("--prompt-file")
    );
    assert!(
        run(&["--prompt-file", "/none.txt"])
            .unwrap_err()
            .contains("/none.txt")
    );
    assert!(run(&["--prompt", ""]).unwrap_err().contains("empty"));
    let hot = ["--prompt", "a", "--temperature", "-1"];
    assert!(run(&hot.map(|s| if s == "-1" { "101" } else { s })).is_err());
}

#[test]
fn evaluate_runs_a_file_and_goes_on_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tasks.jsonl");
    let task = |id: &str, task: &str, context: &str, queries: &[(&str, &str)]| Task {
        id: id.into(),
        task: task.into(),
        context: context.into(),
        queries: (queries.iter())
            .map(|(query, answer)| Query::exact(*query, *answer))
            .collect(),
    };
    let counting =
        "<|im_start|>user\nCount.<|im_end|>\n<|im_start|>assistant\n1, 2, 3, 4, 5, 6, 7, ";
    tasks::write(
        &file,
        &[
            task(
                "a",
                "count",
                counting,
                &[("8, 9, ", "10"), ("8, ", "9"), ("8, ", "3")],
            ),
            task(
                "b",
                "text",
                "The quick brown fox jumps over the lazy dog. The quick brown fox jumps over",
                &[("", " the lazy dog")],
            ),
        ],
    )
    .unwrap();
    let (file, out) = (file.display().to_string(), dir.path().join("out.json"));
    let json = out.display().to_string();
    let flags = [
        "--tasks", &file, "--json", &json, "--policy", "window", "--budget", "32",
    ];
    evaluated(&flags).unwrap();
    let first = results(&out);
    assert_eq!(first.policy, "window");
    let count = first.tasks["count"];
    assert_eq!((count.n, count.exact), (3, 2.0 / 3.0), "{count:?}");
    let text = first.tasks["text"];
    assert!(text.nll < 1.0 && text.tokens > 0.5, "{text:?}");
    // Only the questions count in the mean.
    assert_eq!(first.mean, Some(count));
    assert!(first.peak_kv_bytes > 0 && first.seconds > 0.0);
    let settings = &first.settings;
    assert_eq!(settings["policy"]["budget"]["units"], 32);

    // As if the run had been killed after the first task: what is known is not run again.
    let part = dir.path().join("out.json.part");
    assert!(!part.exists());
    let known = serde_json::json!({
        "id": "a", "task": "count", "continuation": false, "context_tokens": 1, "queries":
        [{"exact": true, "right": 1, "tokens": 1, "nll": 0.25}],
        "peak_kv_bytes": 1, "kept_kv_bytes": 1, "curve": [], "seconds": 0.0
    });
    let head = serde_json::json!({ "settings": settings });
    fs::write(&part, format!("{head}\n{known}\n{{\"id\": \"b\", \"ta")).unwrap();
    evaluated(&flags).unwrap();
    let second = results(&out);
    assert_eq!(
        (second.tasks["count"].n, second.tasks["count"].nll),
        (1, 0.25)
    );
    assert_eq!(second.tasks["text"], text);

    fs::write(dir.path().join("bad.jsonl"), "{\"id\": 1}\n").unwrap();
    let bad = dir.path().join("bad.jsonl").display().to_string();
    let error = evaluated(&["--tasks", &bad, "--json", &json]).unwrap_err();
    assert!(error.contains("bad.jsonl, line 1"), "{error}");
    let error = evaluated(&["--kinds", "riddle", "--json", &json]).unwrap_err();
    assert!(error.contains("passkey, number"), "{error}");
}

#[test]
fn a_grid_is_run_once_and_drawn() {
    let dir = tempfile::tempdir().unwrap();
    let grid = dir.path().join("grid.toml");
    fs::write(
        &grid,
        "tasks = [\"passkey\", \"perplexity\"]\nlengths = [600]\nsamples = 1\nbudgets = [96]\n\
         chunk = 128\nlocal = 16\n[[policies]]\npolicy = \"full\"\n[[policies]]\nlabel = \
         \"StreamingLLM\"\npolicy = \"window\"\n",
    )
    .unwrap();
    let out = dir.path().join("out");
    let run = || {
        let (grid, out) = (grid.display().to_string(), out.display().to_string());
        let args = ablation::Args::parse_from(["ablation", "--grid", &grid, "--out", &out]);
        ablation::run(&args).unwrap();
        fs::read_to_string(format!("{out}/results.jsonl")).unwrap()
    };
    let first = run();
    assert_eq!(first.lines().count(), 4);
    assert_eq!(run(), first, "a second run adds nothing");
    let table = fs::read_to_string(out.join("table.md")).unwrap();
    assert!(
        table.contains("| StreamingLLM") && table.contains("| full"),
        "{table}"
    );
    for file in ["quality-600.svg", "memory-600.svg", "kept-streamingllm.svg"] {
        let svg = fs::read_to_string(out.join(file)).unwrap();
        assert!(svg.starts_with("<svg") && svg.len() < 200_000, "{file}");
    }
    let page = fs::read_to_string(out.join("kept-streamingllm.html")).unwrap();
    assert!(
        page.contains("<svg")
            && page.contains("class=\"s10\"")
            && page.contains("<span class=\"s0\""),
        "{page}"
    );
}

#[test]
fn quickstart_runs() {
    quickstart::run(&ModelArgs::default(), 900).unwrap();
}

/// `plan` against runs of the real model, within 5 %: weights, and keys and values in every store
/// (up to 20 % too many for KIVI's groups after a policy that keeps units from all over a text).
#[test]
fn a_plan_is_within_five_percent_of_what_is_measured() {
    use locret_core::{Budget, CacheOptions, DType, Generate, Prefill, Quantization, Session};
    use locret_eval::random::resident_bytes;
    use locret_examples::plan::{Request, Shape};
    use locret_models::WeightDtype;
    use locret_policies::{Method, PolicyConfig};

    let runtime = ModelArgs::default().load().unwrap();
    let weights = runtime.loaded.files.weights().unwrap();
    let held = resident_bytes(&*weights, WeightDtype::F32);
    // The file has 4 to 5 bits for most weights.
    assert!(resident_bytes(&*weights, WeightDtype::File) < held / 4);
    let text = runtime
        .encode(include_str!("../../LICENSE-APACHE"))
        .unwrap();
    let ids = &text[..700];
    let prefill = Prefill::new(128, 32);
    let bounded = |method| PolicyConfig::new(method).budget(Budget::Units(160));
    let dense = |store| (None, store);
    let integers = |bits| (Some(Quantization::bits(bits)), DType::F32);
    let stores = [
        dense(DType::F32),
        dense(DType::BF16),
        integers(8),
        integers(4),
        integers(2),
    ];
    let mut worst = Vec::new();
    for config in [
        PolicyConfig::new(Method::Full),
        bounded(Method::Window),
        bounded(Method::SirLlm),
        bounded(Method::KeyDiff),
    ] {
        for (quantize, store) in stores {
            let mut policy = config.clone();
            policy.quantize = quantize;
            let max_new = 4;
            let request = Request {
                shape: Shape::of("smollm2", &runtime.loaded.config),
                context: ids.len(),
                max_new,
                policy: policy.clone(),
                prefill,
                store,
                weights: DType::F32,
                d_r: 0,
            };
            let plan = request.plan().unwrap();
            let model = runtime.model();
            let built = policy.build(model.spec(), &**model.compute()).unwrap();
            let options = CacheOptions::new().dtype(store);
            let mut session = Session::with_options(model, built, options).unwrap();
            session.prefill(ids, &prefill).unwrap();
            let reading = session.report().prefill_peak.bytes;
            let greedy = Generate::greedy(max_new);
            let generated = session.generate(greedy).unwrap().filter(|t| t.is_ok());
            assert_eq!(generated.count(), max_new);
            let report = session.report();
            for (what, planned, measured) in [
                ("reading", plan.kv_prefill, reading),
                ("after", plan.kv_decode, report.kv_bytes),
                ("weights", plan.weights, held),
            ] {
                let off = planned as f64 / measured as f64 - 1.0;
                let case = format!("{} {quantize:?} {store:?} {what}", policy.policy);
                println!("{case}: {off:+.3}");
                // A group of KIVI's is freed with its last member. Policies keep neighbours more
                // often than lots do, which leaves fewer groups than planned, never more.
                let bits = quantize.map(|q| q.bits);
                let scattered = matches!(policy.policy, Method::SirLlm | Method::KeyDiff);
                let limit = if scattered && bits == Some(2) && off > 0.0 {
                    0.2
                } else {
                    0.05
                };
                worst.push((off.abs() / limit, case));
            }
        }
    }
    let broken: Vec<_> = worst.iter().filter(|(share, _)| *share >= 1.0).collect();
    assert!(broken.is_empty(), "{broken:?}");
}

/// 1,600 tokens of prose about this project.
const TEXT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/design.md");

#[test]
fn patterns_are_searched_for_and_the_search_goes_on_where_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let run = |json: &Path, more: &[&str]| {
        let json = json.display().to_string();
        let all = ["search_patterns", "--prompt-file", TEXT, "--json", &json];
        let all = all.into_iter().chain(["--tokens", "1600"]);
        let args = search_patterns::Args::parse_from(all.chain(more.iter().copied()));
        search_patterns::run(&args).map_err(|e| e.chain())
    };
    let json = folder.path().join("patterns.json");
    assert!(run(&json, &[]).unwrap_err().contains("--skip"));
    run(&json, &["--skip", "1000"]).unwrap();
    let whole = Patterns::load(&json).unwrap();
    assert_eq!(whole.layers(), 30);
    let heads = || (0..30).flat_map(|layer| (0..9).map(move |head| (layer, head)));
    let scores: Vec<f64> = heads()
        .map(|(layer, head)| whole.score(layer, head).unwrap())
        .collect();
    assert!(scores.iter().all(|score| (0.5..=1.001).contains(score)));
    let mean = scores.iter().sum::<f64>() / scores.len() as f64;
    println!("recalled by what was found: {mean:.4}");
    assert!(mean > 0.95, "{mean}");
    // Of a search that was cut off after four layers the others are searched again.
    let text = fs::read_to_string(&json).unwrap();
    let mut layers: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
    layers.truncate(4);
    layers[0]["0"] = serde_json::json!(["stream_llm", 1, 2, 0.75]);
    fs::write(&json, serde_json::to_string(&layers).unwrap()).unwrap();
    run(&json, &["--skip", "1000"]).unwrap();
    let resumed = Patterns::load(&json).unwrap();
    for (layer, head) in heads() {
        let own = (layer, head) == (0, 0);
        let same = resumed.of(layer, head) == whole.of(layer, head)
            && resumed.score(layer, head) == whole.score(layer, head);
        assert_eq!(same, !own, "layer {layer}, head {head}");
    }
    layers.extend(vec![layers[0].clone(); 30]);
    fs::write(&json, serde_json::to_string(&layers).unwrap()).unwrap();
    assert!(
        run(&json, &["--skip", "1000"])
            .unwrap_err()
            .contains("34 layers")
    );
}

/// What a trained model looks at is found, of which random weights say nothing.
#[test]
fn a_part_of_attention_is_nearly_all_of_it() {
    let runtime = ModelArgs::default().load().unwrap();
    let mut ids = runtime.encode(&fs::read_to_string(TEXT).unwrap()).unwrap();
    ids.truncate(1600);
    let read = |policy: Arc<dyn KvCachePolicy>| {
        let mut session = Session::new(runtime.model(), policy).unwrap();
        session.prefill(&ids, &Prefill::new(1600, 0)).unwrap();
        session.logits().unwrap().to_vec()
    };
    let pattern = Pattern::VerticalSlash {
        vertical: 100,
        slash: 200,
    };
    let policy = MInference::new(Patterns::uniform(pattern));
    let recalling = Arc::new(Recalling::new(policy, 7));
    let (sparse, full) = (read(recalling.clone()), read(Arc::new(Full::new())));
    let recall = recalling.recall().unwrap();
    let top = |logits: &[f32]| {
        let order = logits.iter().enumerate();
        order.max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0
    };
    println!("{recall:?}; {} and {}", top(&sparse), top(&full));
    assert!(recall.mean > 0.9, "{recall:?}");
    assert_eq!(top(&sparse), top(&full));
}

/// Set in a process that runs one part of a grid: its number, and the grid's folder.
const SHARD: &str = "LOCRET_TEST_SHARD";

#[test]
fn three_processes_run_a_grid_and_their_parts_are_the_whole() {
    let parsed = |words: &[&str]| {
        let words = ["ablation"].iter().chain(words).copied();
        ablation::Args::try_parse_from(words).map_err(|e| e.to_string())
    };
    let run = |words: &[&str]| ablation::run(&parsed(words)?).map_err(|e| e.chain());
    if let Ok(shard) = std::env::var(SHARD) {
        let (shard, folder) = shard.split_once(' ').unwrap();
        let (grid, out) = (format!("{folder}/grid.toml"), format!("{folder}/parts"));
        run(&["--grid", &grid, "--out", &out, "--shard", shard]).unwrap();
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().display().to_string();
    let grid = format!("{folder}/grid.toml");
    let text = "tasks = [\"passkey\", \"number\"]\nlengths = [300]\nsamples = 2\nbudgets = [64]\nchunk = 64\n\
                local = 16\nmaps = []\n[[policies]]\npolicy = \"full\"\n[[policies]]\npolicy = \"window\"\n";
    fs::write(&grid, text).unwrap();
    let children: Vec<_> = (1..=3)
        .map(|shard| {
            let name = "three_processes_run_a_grid_and_their_parts_are_the_whole";
            let mut child = std::process::Command::new(std::env::current_exe().unwrap());
            child
                .args(["--exact", name])
                .env(SHARD, format!("{shard}/3 {folder}"));
            child.stdout(std::process::Stdio::null()).spawn().unwrap()
        })
        .collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let parts: Vec<String> = (1..=3)
        .map(|i| format!("{folder}/parts/shard-{i}-of-3"))
        .collect();
    let lines = |path: &str| {
        let text = fs::read_to_string(path).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect::<Vec<Record>>()
    };
    let counts: Vec<usize> = parts
        .iter()
        .map(|part| lines(&format!("{part}/results.jsonl")).len())
        .collect();
    assert_eq!(counts.iter().sum::<usize>(), 8);
    assert!(counts.iter().all(|n| (2..=3).contains(n)), "{counts:?}");
    // Two of three are not all of it.
    let merged = format!("{folder}/merged");
    let merge = |extra: &[&str], parts: &[String]| {
        let mut words = vec!["merge", "--grid", &grid, "--out", &merged];
        words.extend(extra);
        words.extend(parts.iter().map(String::as_str));
        run(&words)
    };
    let error = merge(&[], &parts[..2]).unwrap_err();
    assert!(error.contains("cases are missing"), "{error}");
    merge(&["--partial"], &parts[..2]).unwrap();
    merge(&[], &parts).unwrap();
    // What one process makes of the grid is the same.
    let whole = format!("{folder}/whole");
    run(&["--grid", &grid, "--out", &whole]).unwrap();
    let of = |folder: &str| -> Vec<(String, String, Vec<_>, Option<f64>)> {
        let all = lines(&format!("{folder}/results.jsonl")).into_iter();
        let of = |r: Record| (r.label, r.case.id, r.case.queries, r.case.footprint);
        let mut all: Vec<_> = all.map(of).collect();
        all.sort_by_key(|(label, id, ..)| (label.clone(), id.clone()));
        all
    };
    assert_eq!(of(&merged), of(&whole));
    assert!(of(&whole).iter().all(|(.., footprint)| footprint.is_some()));
    for file in [
        "table.md",
        "run.json",
        "pareto-passkey-300.svg",
        "quality-300.svg",
    ] {
        assert!(std::path::Path::new(&merged).join(file).exists(), "{file}");
    }
    // A merged run is one that goes on where it was.
    let before = fs::read_to_string(format!("{merged}/results.jsonl")).unwrap();
    run(&["--grid", &grid, "--out", &merged]).unwrap();
    assert_eq!(
        fs::read_to_string(format!("{merged}/results.jsonl")).unwrap(),
        before
    );
    // Of other tasks they are no parts.
    fs::write(&grid, text.replace("samples = 2", "samples = 1")).unwrap();
    let error = merge(&[], &parts).unwrap_err();
    assert!(error.contains("another grid"), "{error}");
    for words in [
        &["--grid", "g", "--out", "o", "--shard", "4/3"][..],
        &["merge", "--grid", "g", "--out", "o"],
        &[],
    ] {
        assert!(
            parsed(words).map_or(true, |args| ablation::run(&args).is_err()),
            "{words:?}"
        );
    }
}
