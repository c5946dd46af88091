//! The examples on a model of a few thousand weights: what they write, and how they fail.

use clap::Parser;
use locret_core::DType;
use locret_eval::trace::Trace;
use locret_examples::cli::{ablation, evaluate, generate, long_shapes, plan, trace};
use locret_policies::{HeadWeights, LayerHead};
use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{self, Command, ExitCode},
};

/// Three layers, four query heads, two KV heads, a vocabulary of 192 tokens.
fn model() -> String {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../locret-models/tests/golden/llama31");
    dir.display().to_string()
}

/// Runs `trace` in `dir`; the error's chain if it fails.
fn run(dir: &Path, ids: &str, flags: &str) -> Result<Trace, String> {
    let file = dir.join("ids.json");
    fs::write(&file, ids).unwrap();
    let out = dir.join("trace.json");
    let file = file.display().to_string();
    let json = out.display().to_string();
    let model = model();
    let mut all = vec!["trace", "--ids-file", &file, "--json", &json];
    if !flags.contains("--model") {
        all.extend(["--model", &model]);
    }
    all.extend(flags.split_whitespace());
    let args = trace::Args::try_parse_from(all).map_err(|e| e.to_string())?;
    trace::run(&args).map_err(|e| e.chain())?;
    Ok(serde_json::from_str(&fs::read_to_string(out).unwrap()).unwrap())
}

fn ids(n: usize) -> String {
    let ids: Vec<usize> = (0..n).map(|i| (i * i + 7 * i) % 180).collect();
    serde_json::to_string(&ids).unwrap()
}

#[test]
fn a_bounded_trace_has_every_chunk_layer_and_head() {
    let dir = tempfile::tempdir().unwrap();
    let flags = "--policy key-norm --budget 24 --chunk 16 --local 8 --sinks 2 --max-new 1";
    let trace = run(dir.path(), &ids(100), flags).unwrap();
    // 92 tokens in chunks of 16.
    assert_eq!(trace.kept.len(), 6);
    for (chunk, layers) in trace.kept.iter().enumerate() {
        let read = (16 * (chunk + 1)).min(92);
        assert_eq!(layers.len(), 3);
        for head in layers.iter().flatten() {
            assert_eq!(head.len(), read.min(24));
            assert!(head.windows(2).all(|w| w[0] < w[1]) && head[..2] == [0, 1]);
            assert!(head.iter().all(|p| (*p as usize) < read));
        }
        assert!(layers.iter().all(|heads| heads.len() == 2));
    }
    assert_eq!(trace.peak_units_per_head, 24 + 16);
    assert_eq!(trace.scores, None);
    let top = &trace.last_logits_top20;
    assert_eq!((top.ids.len(), top.values.len()), (20, 20));
    assert!(top.values.windows(2).all(|w| w[0] >= w[1]));
    assert_eq!(trace.generated.len(), 1);
    assert_eq!(trace.generated[0], top.ids[0]);
    // Three layers with the budget and the tail, which is more than two at the budget and one with
    // the chunk: keys and values of 8 floats for 2 heads.
    assert_eq!(trace.peak_kv_bytes, 3 * (24 + 8) * 2 * 2 * 8 * 4);
}

#[test]
fn carried_scores_are_given_for_every_prompt_token() {
    let dir = tempfile::tempdir().unwrap();
    let flags = "--policy sirllm --budget 24 --chunk 16 --local 8 --max-new 3";
    let trace = run(dir.path(), &ids(60), flags).unwrap();
    let scores = trace.scores.unwrap();
    assert_eq!(scores.len(), 3);
    for head in scores.iter().flatten() {
        assert_eq!(head.len(), 60);
        assert!(head.iter().all(|s| s.is_some_and(|s| s >= 0.0)));
    }
}

#[test]
fn chunks_change_nothing_in_a_full_cache() {
    let dir = tempfile::tempdir().unwrap();
    let once = run(dir.path(), &ids(50), "--chunk 50 --local 0 --max-new 8").unwrap();
    let many = run(dir.path(), &ids(50), "--chunk 7 --local 3 --max-new 8").unwrap();
    assert_eq!(once.generated, many.generated);
    assert_eq!(once.last_logits_top20.ids, many.last_logits_top20.ids);
    let values = |t: &Trace| t.last_logits_top20.values.clone();
    for (a, b) in values(&once).iter().zip(values(&many)) {
        assert!((a - b).abs() < 1e-4, "{a} {b}");
    }
    let all: Vec<u32> = (0..50).collect();
    assert!(once.kept[0].iter().flatten().all(|head| *head == all));
}

#[test]
fn mistakes_are_errors_that_say_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let long = ids(40);
    let cases = [
        (&*long, "--policy windows", "unknown policy"),
        (&*long, "--policy window", "budget"),
        (&*long, "--policy window --budget 0", "budget"),
        (&*long, "--policy window --budget 8 --sinks 9", "sinks"),
        (
            &*long,
            "--policy key-norm --budget 16 --stabilizers 16",
            "stabilizers",
        ),
        (&*long, "--policy key-norm --budget x", "units (256)"),
        (&*long, "--policy locret --budget 16", "heads"),
        (
            &*long,
            "--policy locret --budget 16 --heads /none.safetensors",
            "/none.safetensors",
        ),
        (&*long, "--policy-file /none.toml", "/none.toml"),
        (
            &*long,
            "--policy key-norm --budget 16 --stabilizers 40",
            "stabilizers",
        ),
        (&*long, "--policy key-norm --budget 0%", "budget"),
        (&*long, "--policy key-norm --budget 1B", "budget"),
        (&*long, "--policy full --budget 16", "no setting `budget`"),
        (
            &*long,
            "--policy window --budget 16 --heads h.bin",
            "no setting `heads`",
        ),
        (&*long, "--ids-file /none.json", "cannot be used multiple"),
        (&*long, "--chunk 0", "chunk"),
        (&*long, "--model /none/model.gguf", "/none/model.gguf"),
        (&*long, "--device abacus", "abacus"),
        (&*long, "--positions relative", "original or compact"),
        (&*long, "--prompt text", "cannot be used with"),
        ("[1, 2, 192]", "", "outside the vocabulary of 192"),
        ("[]", "", "empty"),
        ("[1, -2]", "", "array of token ids"),
        ("{\"ids\": [1]}", "", "array of token ids"),
        ("[1, 2", "", "array of token ids"),
    ];
    for (ids, flags, expected) in cases {
        let error = run(dir.path(), ids, flags).unwrap_err();
        assert!(error.contains(expected), "{flags}: {error}");
    }
    let out = dir.path().join("ids.json/trace.json");
    let file = dir.path().join("ids.json");
    let all = ["trace", "--model", &model(), "--ids-file"].map(str::to_owned);
    let rest = [
        file.display().to_string(),
        "--json".into(),
        out.display().to_string(),
    ];
    fs::write(&file, "[1, 2]").unwrap();
    let args = trace::Args::parse_from(all.into_iter().chain(rest));
    let error = trace::run(&args).unwrap_err().chain();
    assert!(error.starts_with("error: cannot write"), "{error}");
}

#[test]
fn policies_can_be_files() {
    let dir = tempfile::tempdir().unwrap();
    let toml = dir.path().join("p.toml");
    fs::write(&toml, "policy = \"window\"\nbudget = 20\nsinks = 3\n").unwrap();
    let json = dir.path().join("p.json");
    fs::write(&json, r#"{"policy": "window", "budget": 20, "sinks": 3}"#).unwrap();
    let named = "--policy window --budget 20 --sinks 3 --chunk 8 --local 4 --max-new 4";
    let named = run(dir.path(), &ids(50), named).unwrap();
    for file in [toml, json] {
        let flags = format!(
            "--policy-file {} --chunk 8 --local 4 --max-new 4",
            file.display()
        );
        let trace = run(dir.path(), &ids(50), &flags).unwrap();
        assert_eq!(
            (&trace.kept, &trace.generated),
            (&named.kept, &named.generated)
        );
    }
    let newest: Vec<u32> = [0, 1, 2].into_iter().chain(29..46).collect();
    let last = named.kept.last().unwrap();
    assert!(last.iter().flatten().all(|head| *head == newest));
}

#[test]
fn a_plan_takes_presets_and_model_folders() {
    let run = |flags: &str| {
        let all = ["plan"].into_iter().chain(flags.split_whitespace());
        let args = plan::Args::try_parse_from(all).map_err(|e| e.to_string())?;
        plan::run(&args).map_err(|e| e.chain())
    };
    let phi = "--model phi-3-mini --context 131072 --kv bf16 --policy locret --budget 6000 \
               --chunk 3072 --device-memory 24GiB";
    assert_eq!(run(phi), Ok(()));
    // Two cards, and one that is too small.
    assert_eq!(run(&format!("{phi} --device-memory 24GiB")), Ok(()));
    let full = "--model phi-3-mini --context 131072 --weights f32 --device-memory 24GiB";
    assert_eq!(run(full), Ok(()));
    assert!(run("--weights q9").unwrap_err().contains("q4_k"));
    assert_eq!(run(&format!("--model {}", model())), Ok(()));
    assert!(run("--model phi-4").unwrap_err().contains("phi-3-mini"));
    assert!(run("--policy window").unwrap_err().contains("budget"));
    assert!(
        run("--context 0")
            .unwrap_err()
            .contains("at least one token")
    );
    assert!(
        run("--device-memory much")
            .unwrap_err()
            .contains("such as 4MiB")
    );
}

/// `plan` against a run, in bytes.
#[test]
fn a_plan_is_what_a_run_takes() {
    use locret_core::{Budget, Prefill, Session};
    use locret_examples::{
        args::ModelArgs,
        plan::{Request, Shape},
    };
    use locret_policies::{Method, PolicyConfig};

    let args = ModelArgs {
        model: model(),
        ..ModelArgs::default()
    };
    let runtime = args.load().unwrap();
    let shape = Shape::of("tiny", &runtime.loaded.config);
    let bounded = |method| PolicyConfig::new(method).budget(Budget::Units(40));
    let ids: Vec<u32> = (0..150).map(|i| i % 150).collect();
    for policy in [
        PolicyConfig::new(Method::Full),
        bounded(Method::KeyNorm),
        bounded(Method::SirLlm),
        bounded(Method::Window),
        PolicyConfig::new(Method::KeyDiff).budget(Budget::Ratio(0.3)),
    ] {
        for (chunk, local, max_new) in [(16, 8, 1), (64, 0, 20), (150, 1, 90), (7, 150, 3)] {
            let prefill = Prefill::new(chunk, local);
            let request = Request {
                shape: shape.clone(),
                context: ids.len(),
                max_new,
                policy: policy.clone(),
                prefill,
                store: Default::default(),
                weights: DType::F32,
                d_r: 0,
            };
            let plan = request.plan().unwrap();
            let model = runtime.model();
            let built = policy.build(model.spec(), &**model.compute()).unwrap();
            let mut session = Session::new(model, built).unwrap();
            session.prefill(&ids, &prefill).unwrap();
            let case = format!("{} {chunk} {local} {max_new}", policy.policy);
            let report = session.report();
            assert_eq!(report.prefill_peak.bytes, plan.kv_prefill, "{case}");
            let greedy = locret_core::Generate::greedy(max_new);
            let generated = session
                .generate(greedy)
                .unwrap()
                .filter(|t| t.is_ok())
                .count();
            assert_eq!(generated, max_new);
            let report = session.report();
            assert_eq!(report.kv_bytes, plan.kv_decode, "{case}");
            assert_eq!(report.peak.units_per_head, plan.peak_units, "{case}");
            assert_eq!(report.full_bytes, plan.kv_full, "{case}");
        }
    }
}

#[test]
fn policies_compose_with_integers_shared_budgets_and_merging() {
    let dir = tempfile::tempdir().unwrap();
    let plain = "--policy key-diff --budget 24 --chunk 16 --local 8 --max-new 2";
    let exact = run(dir.path(), &ids(100), plain).unwrap();
    let shared = [
        "--pyramid 4",
        "--ada 0.2",
        "--share model",
        "--ada 0 --share model",
    ];
    for flags in shared.into_iter().chain(["--quantize 8", "--merge 0.5"]) {
        let trace = run(dir.path(), &ids(100), &format!("{plain} {flags}")).unwrap();
        let units = |t: &Trace| -> Vec<usize> {
            let last = t.kept.last().unwrap();
            last.iter().flatten().map(Vec::len).collect()
        };
        match flags {
            // Shared out over layers or heads: ragged, and no more in all.
            _ if shared.contains(&flags) => {
                assert_ne!(units(&trace), units(&exact), "{flags}");
                let sum = |t: &Trace| units(t).iter().sum::<usize>();
                assert!(sum(&trace) <= sum(&exact), "{flags}");
            }
            _ => assert_eq!(units(&trace), units(&exact), "{flags}"),
        }
    }
    let error = run(dir.path(), &ids(50), &format!("{plain} --quantize 5")).unwrap_err();
    assert!(error.contains("2, 3, 4 or 8"), "{error}");
}

/// Heads of `layers` layers with `inputs` features and `outputs` scores.
fn heads(layers: usize, inputs: usize, outputs: usize) -> HeadWeights {
    let number = |i: usize| (i * 7919 % 1009) as f32 / 504.5 - 1.0;
    let layer = |l: usize| LayerHead {
        d_r: 5,
        fc1: (0..5 * inputs).map(|i| number(i + l)).collect(),
        fc2: (0..5 * outputs).map(|i| number(i + 3 * l)).collect(),
        ..LayerHead::default()
    };
    HeadWeights {
        layers: (0..layers).map(layer).collect(),
        metadata: Default::default(),
        ..HeadWeights::default()
    }
}

#[test]
fn heads_of_another_model_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file: PathBuf = dir.path().join("heads.safetensors");
    let flags = format!("--policy locret --budget 16 --heads {}", file.display());
    let trace = || run(dir.path(), &ids(30), &flags);
    fs::write(&file, b"not a file of tensors").unwrap();
    let error = trace().unwrap_err();
    assert!(error.contains("heads.safetensors"), "{error}");
    // Three layers, (4 + 2 · 2) · 8 features, two scores.
    for (layers, inputs, outputs) in [(2, 64, 2), (4, 64, 2), (3, 48, 2), (3, 64, 3)] {
        let wrong = heads(layers, inputs, outputs);
        wrong.save(&file, DType::F32).unwrap();
        let error = trace().unwrap_err();
        assert!(error.contains("model.layers."), "{error}");
    }
    heads(3, 64, 2).save(&file, DType::F32).unwrap();
    let bytes = fs::read(&file).unwrap();
    let scores = trace().unwrap().scores.unwrap();
    assert!(scores.iter().flatten().all(|head| head.len() == 30));
    fs::write(&file, &bytes[..bytes.len() - 9]).unwrap();
    let error = trace().unwrap_err();
    assert!(error.contains("heads.safetensors"), "{error}");
}

#[test]
fn published_dimensions_take_what_is_planned() {
    let run = |flags: &str| {
        let all = ["long_shapes"].into_iter().chain(flags.split_whitespace());
        let args = long_shapes::Args::try_parse_from(all).map_err(|e| e.to_string())?;
        long_shapes::run(&args).map_err(|e| e.chain())
    };
    let preset = "--model smollm2-135m --vocab 256 --weights bf16 --kv bf16 --chunk 32 --local 8";
    for policy in [
        "--policy locret --budget 64 --d-r 16",
        "--policy window --budget 40",
        "--policy full",
        "--policy minference --vertical 30 --slash 100 --near 2 --recall 9",
        "--policy window --budget 40 --pyramid 4",
        // Of these the plan is an estimate.
        "--policy window --budget 40 --quantize 4",
        "--policy key-norm --budget 40 --ada 0.2",
        "--policy key-norm --budget 40 --share model",
    ] {
        // The run itself compares its bytes with the plan's.
        let flags = format!("{preset} {policy} --tokens 400");
        assert_eq!(run(&flags), Ok(()), "{policy}");
    }
    assert_eq!(run(&format!("--model {}", model())), Ok(()));
    // Layers apart, tokens after the prompt, and what was measured as JSON.
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("figures.json");
    let flags = format!(
        "{preset} --policy window --budget 40 --tokens 400 --max-new 5 --warm-up 40 --json {}",
        json.display()
    );
    let read =
        || -> serde_json::Value { serde_json::from_slice(&fs::read(&json).unwrap()).unwrap() };
    assert_eq!(run(&format!("{flags} --devices flex,flex")), Ok(()));
    let whole = read();
    assert_eq!(whole["prompt"], 400);
    assert_eq!(whole["kv_bytes"], whole["plan"]["kv_bytes"]);
    assert!(whole["prefill"].as_f64().unwrap() > 0.0 && whole["decode"].as_f64().unwrap() > 0.0);
    // Without any time it reads a chunk, and the local tokens after it.
    assert_eq!(run(&format!("{flags} --gpu-layers 2 --seconds 0")), Ok(()));
    assert_eq!(read()["prompt"], 40);
    let wrong = format!("{preset} --tokens 10 --policy locret --budget 8 --d-r 0");
    assert!(run(&wrong).is_err());
    assert!(run("--model /none").unwrap_err().contains("/none"));
}

#[test]
fn damaged_model_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("model.gguf");
    let flags = format!("--model {}", file.display());
    let whole = "../locret-models/tests/golden/gguf/encodings.gguf";
    let whole = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(whole)).unwrap();
    // A header that claims 2^60 tensors.
    let mut huge = whole.clone();
    huge[8..16].copy_from_slice(&(1u64 << 60).to_le_bytes());
    for bytes in [&b""[..], b"GGUF", &whole[..whole.len() / 3], &huge] {
        fs::write(&file, bytes).unwrap();
        let error = run(dir.path(), &ids(30), &flags).unwrap_err();
        assert!(error.contains("model.gguf"), "{error}");
    }
}

#[test]
fn files_of_tasks_and_grids_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    let name = file.display().to_string();
    let (out, model) = (dir.path().join("out").display().to_string(), model());
    let evaluated = |flags: &[&str]| {
        let all = ["evaluate", "--json", &out, "--model", &model];
        let args = evaluate::Args::try_parse_from(all.iter().chain(flags));
        evaluate::run(&args.map_err(|e| e.to_string())?).map_err(|e| e.chain())
    };
    for (text, expected) in [
        ("{\"id\": 1}", "file, line 1"),
        ("[]", "file, line 1"),
        (
            "{\"id\": \"a\", \"task\": \"t\", \"context\": \"\", \"queries\": []}",
            "the context is empty",
        ),
        (
            "{\"id\": \"a\", \"task\": \"t\", \"context\": \"c\", \"queries\": []}",
            "there is no query",
        ),
        ("", "no tasks"),
    ] {
        fs::write(&file, text).unwrap();
        let error = evaluated(&["--tasks", &name]).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    let error = evaluated(&["--tasks", "/none.jsonl"]).unwrap_err();
    assert!(error.contains("/none.jsonl"), "{error}");
    let error = evaluated(&["--kinds", "riddle"]).unwrap_err();
    assert!(error.contains("passkey, number"), "{error}");

    let compared = |grid: &str| {
        let all = ["ablation", "--grid", grid, "--out", &out, "--model", &model];
        let args = ablation::Args::try_parse_from(all).map_err(|e| e.to_string())?;
        ablation::run(&args).map_err(|e| e.chain())
    };
    for (text, expected) in [
        ("tasks = [", "file"),
        ("policies = []", "`policies` must not be empty"),
        ("[[policies]]\npolicy = \"windows\"", "windows"),
        ("[[policies]]\npolicy = \"full\"\nsinkz = 1", "sinkz"),
        (
            "tasks = [\"riddle\"]\n[[policies]]\npolicy = \"full\"",
            "riddle",
        ),
    ] {
        fs::write(&file, text).unwrap();
        let error = compared(&name).unwrap_err();
        assert!(
            error.contains(expected) && error.contains("file"),
            "{error}"
        );
    }
    let error = compared("/none.toml").unwrap_err();
    assert!(error.contains("/none.toml"), "{error}");
}

#[test]
fn generate_says_what_is_missing() {
    let model = model();
    let run = |flags: &str| {
        let all = ["generate", "--model", &model].into_iter();
        let args = generate::Args::try_parse_from(all.chain(flags.split_whitespace()));
        let args = args.map_err(|e| e.to_string())?;
        generate::run(&args, &mut Vec::new()).map_err(|e| e.chain())
    };
    for (flags, expected) in [
        ("", "--prompt-file"),
        ("--prompt a --prompt-file b", "cannot be used with"),
        ("--prompt-file /none.txt", "/none.txt"),
        ("--prompt a --policy windows", "unknown policy"),
        ("--prompt a --max-new many", "--max-new"),
        ("--prompt a --temperature hot", "--temperature"),
        // This model's folder has none.
        ("--prompt a", "tokenizer"),
    ] {
        let error = run(flags).unwrap_err();
        assert!(error.contains(expected), "{flags}: {error}");
    }
}

/// Name of the variable in which a test hands flags to itself as another process.
const FLAGS: &str = "LOCRET_TEST_TRACE_FLAGS";

#[test]
fn what_a_program_says_on_stderr() {
    if let Ok(flags) = env::var(FLAGS) {
        let args = trace::Args::parse_from(flags.split_whitespace());
        let code = locret_examples::run(|| trace::run(&args));
        let success = format!("{code:?}") == format!("{:?}", ExitCode::SUCCESS);
        process::exit(if success { 0 } else { 70 });
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("ids.json").display().to_string();
    fs::write(&file, ids(40)).unwrap();
    let out = dir.path().join("trace.json").display().to_string();
    let program = |flags: &str| {
        let model = model();
        let flags = format!("trace --model {model} --ids-file {file} --json {out} {flags}");
        let done = Command::new(env::current_exe().unwrap())
            .args(["--exact", "what_a_program_says_on_stderr", "--nocapture"])
            .env(FLAGS, flags)
            .output()
            .unwrap();
        (done.status.code(), String::from_utf8(done.stderr).unwrap())
    };
    let (code, stderr) = program("--max-new 1");
    assert_eq!(code, Some(0), "{stderr}");
    assert!(!stderr.contains("made for"), "{stderr}");
    // Beyond the 256 tokens that the model was made for: allowed, and said once. While generating, too.
    for (prompt, flags) in [(300, "--max-new 9"), (250, "--max-new 9")] {
        fs::write(&file, ids(prompt)).unwrap();
        let (code, stderr) = program(flags);
        assert_eq!(code, Some(0), "{stderr}");
        assert_eq!(stderr.matches("was made for 256").count(), 1, "{stderr}");
    }
    fs::write(&file, ids(40)).unwrap();
    for (flags, expected, code) in [
        ("--policy windows", "unknown policy `windows`", 70),
        ("--policy window --budget 0", "error: invalid budget", 70),
        ("--device abacus", "unknown device", 70),
        // The parser of flags ends the program itself.
        ("--chunk many", "--chunk", 2),
    ] {
        let (found, stderr) = program(flags);
        assert_eq!(found, Some(code), "{flags}: {stderr}");
        assert!(stderr.contains(expected), "{flags}: {stderr}");
        assert!(!stderr.contains("panicked"), "{flags}: {stderr}");
    }
}
