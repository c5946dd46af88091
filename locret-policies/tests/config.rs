//! Policies as configuration.

mod common;

use burn::tensor::Device;
use common::{Numbers, cache, drive, spec, steps};
use locret_core::{
    Budget, BudgetTable, DType, DecodeEviction, Error, KvCachePolicy, Positions, Share, compute,
};
use locret_policies::{
    Cam, CamKeeps, Compactor, Cur, D2o, D2oForm, ExpectedAttention, H2o, HeadAdvice, HeadWeights,
    KeyDiff, KeyNorm, LagKv, LayerHead, Method, PolicyConfig, PolicyError, Random, SirLlm, SnapKv,
    TierConfig, Tova, Window,
};
use std::path::PathBuf;

fn heads_file(folder: &std::path::Path, spec: &locret_core::ModelSpec) -> PathBuf {
    let mut numbers = Numbers(9);
    let layer = |_| LayerHead {
        d_r: 4,
        fc1: numbers.list(4 * spec.layer(0).qkv_features(), 1.0),
        fc2: numbers.list(4 * spec.kv_heads, 1.0),
        ..LayerHead::default()
    };
    let heads = HeadWeights {
        layers: (0..spec.layers).map(layer).collect(),
        metadata: Default::default(),
        ..HeadWeights::default()
    };
    let path = folder.join("heads.safetensors");
    heads.save(&path, DType::F32).unwrap();
    path
}

#[test]
fn every_method_is_built_by_name_and_holds_its_budget() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(2, 2, 3, 8);
    let heads = heads_file(folder.path(), &spec);
    for method in Method::ALL {
        let mut text = format!("policy = \"{method}\"\n");
        if method.evicts() {
            text += "budget = 20\n";
        }
        if method == Method::Locret {
            text += &format!("heads = {:?}\n", heads.to_str().unwrap());
        }
        let config = PolicyConfig::from_toml(&text).unwrap();
        let config = common::complete(&config, &spec);
        assert_eq!(config.policy, method);
        assert_eq!(method.name().parse::<Method>().unwrap(), method);
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(PolicyConfig::from_json(&json).unwrap(), config);
        let again = toml::to_string(&config).unwrap();
        assert_eq!(PolicyConfig::from_toml(&again).unwrap(), config);

        let policy = config.build(&spec, &*compute(&Device::default())).unwrap();
        assert_eq!(policy.name(), method.name());
        assert_eq!(policy.positions(), method.default_positions());
        let expected = if !method.evicts() { 90 } else { 20 };
        assert_eq!(
            policy.limit(&spec.layer(0), 90),
            (method.evicts()).then_some(20)
        );
        let mut numbers = Numbers(1);
        let mut cache = cache(&spec, policy);
        for step in steps(&spec, &mut numbers, 90, 32, 0, 0, true) {
            drive(&mut cache, &step, 90).unwrap();
        }
        for layer in 0..2 {
            for head in 0..2 {
                assert_eq!(cache.len(layer, head), expected, "{method}");
            }
        }
    }
}

/// A method's constructor and its configuration are the same policy.
#[test]
fn constructors_have_the_defaults_of_configuration() {
    let spec = spec(2, 2, 3, 8);
    let budgets = (1..40).chain([256, 6000]).map(Budget::Units);
    let others = [
        Budget::Ratio(0.02),
        Budget::Ratio(0.5),
        Budget::Bytes(100_000),
    ];
    for budget in budgets.chain(others) {
        let same = |method, made: &dyn KvCachePolicy, config: &PolicyConfig| {
            let built = config.build(&spec, &*compute(&Device::default())).unwrap();
            assert_eq!(format!("{built:?}"), format!("{made:?}"), "{method}");
        };
        let cases: [(Method, &dyn KvCachePolicy); 13] = [
            (Method::Window, &Window::policy(budget)),
            (Method::Random, &Random::policy(0, budget)),
            (Method::KeyNorm, &KeyNorm::policy(budget)),
            (Method::KeyDiff, &KeyDiff::policy(budget)),
            (Method::H2o, &H2o::policy(budget)),
            (Method::SnapKv, &SnapKv::new().policy(budget)),
            (Method::Tova, &Tova::policy(budget)),
            (Method::LagKv, &LagKv::new().policy(budget)),
            (Method::Cur, &Cur::new().policy(budget)),
            (Method::Compactor, &Compactor::new().policy(budget)),
            (Method::D2o, &D2o::policy(budget)),
            (Method::Cam, &Cam::policy(budget)),
            (
                Method::ExpectedAttention,
                &ExpectedAttention::new().policy(budget),
            ),
        ];
        for (method, made) in cases {
            same(method, made, &PolicyConfig::new(method).budget(budget));
        }
        let mut config = PolicyConfig::new(Method::SirLlm).budget(budget);
        config.recent = Some(0);
        let made = SirLlm::new().policy(budget, 0);
        same(Method::SirLlm, &made, &config);
    }
}

#[test]
fn merging_methods_have_settings_of_their_own() {
    let spec = spec(5, 2, 3, 8);
    let build = |text: &str| {
        let config = PolicyConfig::from_toml(text).unwrap();
        assert_eq!(
            PolicyConfig::from_json(&serde_json::to_string(&config).unwrap()).unwrap(),
            config
        );
        config.build(&spec, &*compute(&Device::default())).unwrap()
    };
    let budget = Budget::Units(40);
    let d2o = build(
        "policy = \"d2o\"\nbudget = 40\nform = \"code\"\nmix_keys = false\nsmoothing = 0.25\n\
         exempt = [1, 2]\nexempt_whole = true",
    );
    let made = D2o::policy(budget)
        .form(D2oForm::Code)
        .keys(false)
        .smoothing(0.25)
        .exempt(1, 2)
        .whole(true);
    assert_eq!(format!("{d2o:?}"), format!("{made:?}"));
    // Layers that keep everything have no bound, and nothing to fold: no threshold.
    let layers = || (0..5).map(|layer| spec.layer(layer));
    let limits: Vec<_> = layers().map(|layer| d2o.limit(&layer, 90)).collect();
    assert_eq!(limits, [None, Some(40), Some(40), None, None]);
    let noted: Vec<_> = layers().map(|layer| d2o.noted(&layer)).collect();
    assert_eq!(noted, [0, 1, 1, 0, 0]);
    let mut numbers = Numbers(1);
    let mut cache = cache(&spec, d2o);
    for step in steps(&spec, &mut numbers, 90, 32, 0, 0, true) {
        drive(&mut cache, &step, 90).unwrap();
    }
    let lens: Vec<_> = (0..5).map(|layer| cache.len(layer, 1)).collect();
    assert_eq!(lens, [90, 40, 40, 90, 90]);

    let cam = build(
        "policy = \"cam\"\nbudget = 40\nkeeps = \"heavy\"\nwindow = 7\nseed = 3\nsums = true",
    );
    let made = Cam::heavy(budget).window(7).seed(3).sums(true);
    assert_eq!(format!("{cam:?}"), format!("{made:?}"));
    let keeps = |text: &str| PolicyConfig::from_toml(text).map(|config| config.keeps);
    let text = "policy = \"cam\"\nkeeps = \"window\"";
    assert_eq!(keeps(text).unwrap(), Some(CamKeeps::Window));
    assert!(keeps("policy = \"cam\"\nkeeps = \"all\"").is_err());
}

#[test]
fn budgets_are_numbers_shares_or_bytes() {
    let budget = |text: &str| {
        PolicyConfig::from_toml(&format!("policy = \"random\"\nbudget = {text}")).map(|c| c.budget)
    };
    assert_eq!(budget("256").unwrap(), Some(Budget::Units(256)));
    assert_eq!(budget("{ units = 3 }").unwrap(), Some(Budget::Units(3)));
    assert_eq!(
        budget("{ ratio = 0.25 }").unwrap(),
        Some(Budget::Ratio(0.25))
    );
    assert_eq!(
        budget("{ bytes = 65536 }").unwrap(),
        Some(Budget::Bytes(65536))
    );
    assert_eq!(budget("\"12.5%\"").unwrap(), Some(Budget::Ratio(0.125)));
    assert_eq!(budget("\"4MiB\"").unwrap(), Some(Budget::Bytes(4 << 20)));
    let json = |budget: &str| {
        PolicyConfig::from_json(&format!(r#"{{"policy": "random", "budget": {budget}}}"#))
    };
    assert_eq!(json("7").unwrap().budget, Some(Budget::Units(7)));
    assert_eq!(json("null").unwrap().budget, None);
    for bad in ["-1", "\"many\"", "{ parts = 3 }", "{}", "1.5"] {
        assert!(matches!(budget(bad), Err(PolicyError::Config(_))), "{bad}");
    }
}

#[test]
fn all_settings_are_read() {
    let config = PolicyConfig::from_toml(
        r#"
        policy = "locret"
        budget = { ratio = 0.125 }
        sinks = 4
        recent = 8
        stabilizers = 16
        positions = "original"
        decode = { every = 32 }
        pool = 3
        heads = "heads.safetensors"
        "#,
    )
    .unwrap();
    let mut expected = PolicyConfig::new(Method::Locret)
        .budget(Budget::Ratio(0.125))
        .positions(Positions::Original);
    expected.sinks = Some(4);
    expected.recent = Some(8);
    expected.stabilizers = Some(16);
    expected.decode = Some(DecodeEviction::Every(32));
    expected.pool = Some(3);
    expected.heads = Some("heads.safetensors".into());
    assert_eq!(config, expected);
    let other =
        PolicyConfig::from_toml("policy = \"snapkv\"\nwindow = 8\nkernel = 3\ndecode = \"off\"")
            .unwrap();
    assert_eq!(
        (other.window, other.kernel, other.decode),
        (Some(8), Some(3), Some(DecodeEviction::Off))
    );
}

#[test]
fn budgets_are_shared_as_a_file_says() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(2, 2, 3, 8);
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    write("table.json", r#"{"shares": [[3.0, 1.0], [1.0, 1.0]]}"#);
    let text = "policy = \"key-norm\"\nbudget = 7\ntable = \"table.json\"\n";
    write("policy.toml", text);
    let build = |config: &PolicyConfig| config.build(&spec, &*compute(&Device::default()));
    let mut config = PolicyConfig::load(folder.path().join("policy.toml")).unwrap();
    let policy = build(&config).unwrap();
    assert_eq!(policy.limit(&spec.layer(0), 90), Some(13));
    let mut cache = cache(&spec, policy);
    let mut numbers = Numbers(1);
    for step in steps(&spec, &mut numbers, 90, 32, 0, 0, true) {
        drive(&mut cache, &step, 90).unwrap();
    }
    let lens = [(0, 0), (0, 1), (1, 0), (1, 1)].map(|(l, h)| cache.len(l, h));
    assert_eq!(lens, [13, 5, 5, 5]);
    // Shares and the model's budget are said once, and shares are of this model.
    config.share = Some(Share::Model);
    assert!(matches!(
        build(&config),
        Err(PolicyError::Core(Error::Setting { .. }))
    ));
    config.share = None;
    write("table.json", r#"{"shares": [[1.0], [1.0], [1.0]]}"#);
    assert!(matches!(
        build(&config),
        Err(PolicyError::Core(Error::Shape { .. }))
    ));
    for bad in [
        r#"{"shares": []}"#,
        r#"{"shares": [[-1.0], [1.0]]}"#,
        "{",
        "{}",
    ] {
        write("table.json", bad);
        let error = build(&config).unwrap_err();
        assert!(matches!(error, PolicyError::File { .. }), "{bad}: {error}");
    }
    config.table = Some(folder.path().join("none.json").into());
    assert!(matches!(build(&config), Err(PolicyError::Io { .. })));
    let text = "policy = \"key-norm\"\nbudget = 7\ntable = { shares = [[3.0, 1.0], [1.0, 1.0]] }\n";
    let here = PolicyConfig::from_toml(text).unwrap();
    assert_eq!(build(&here).unwrap().limit(&spec.layer(0), 90), Some(13));
    let again = toml::to_string(&here).unwrap();
    assert_eq!(PolicyConfig::from_toml(&again).unwrap(), here);
    for bad in ["3", "{ share = [[1.0]] }", "{ shares = [] }"] {
        let text = format!("policy = \"key-norm\"\nbudget = 7\ntable = {bad}\n");
        let error = PolicyConfig::from_toml(&text).unwrap_err();
        assert!(matches!(error, PolicyError::Config(_)), "{bad}: {error}");
    }

    let shared = |share: &str| {
        let text = format!("policy = \"h2o\"\nbudget = 8\nshare = {share:?}");
        PolicyConfig::from_toml(&text)
    };
    let model = build(&shared("model").unwrap()).unwrap();
    assert!(model.needs().all_layers);
    // 4 heads of 8 units, of which 3 others keep a fifth.
    assert_eq!(model.limit(&spec.layer(0), 90), Some(32 - 3 * 2));
    let layer = build(&shared("layer").unwrap()).unwrap();
    assert!(!layer.needs().all_layers);
    assert_eq!(layer.limit(&spec.layer(0), 90), Some(16 - 2));
    let error = shared("modell").unwrap_err().to_string();
    assert!(error.contains("modell"), "{error}");
}

#[test]
fn what_is_unknown_is_named() {
    let error = |text: &str| PolicyConfig::from_toml(text).unwrap_err().to_string();
    let unknown = error("policy = \"lockret\"");
    assert!(
        unknown.contains("lockret") && unknown.contains("locret") && unknown.contains("key-norm"),
        "{unknown}"
    );
    let field = error("policy = \"window\"\nbugdet = 3");
    assert!(
        field.contains("bugdet") && field.contains("`budget`"),
        "{field}"
    );
    assert!(error("budget = 3").contains("policy"));
    assert!(error("policy = ").contains("policy"));
    let parsed = "lockret".parse::<Method>().unwrap_err().to_string();
    assert!(
        parsed.contains("lockret") && parsed.contains("sirllm"),
        "{parsed}"
    );
}

#[test]
fn settings_that_do_not_fit_are_errors() {
    let spec = spec(2, 2, 3, 8);
    let build = |text: &str| {
        PolicyConfig::from_toml(text)
            .unwrap()
            .build(&spec, &*compute(&Device::default()))
    };
    let setting = |text: &str, word: &str| match build(text).unwrap_err() {
        PolicyError::Setting { policy, message } => {
            assert!(
                text.contains(&policy) && message.contains(word),
                "{policy}: {message}"
            );
        }
        other => panic!("{text}: {other}"),
    };
    setting("policy = \"window\"", "budget");
    setting("policy = \"full\"\nbudget = 3", "budget");
    setting("policy = \"full\"\nsinks = 3", "sinks");
    setting("policy = \"full\"\nshare = \"model\"", "share");
    setting("policy = \"full\"\ntable = \"x\"", "table");
    setting("policy = \"window\"\nbudget = 30\nheads = \"x\"", "heads");
    setting("policy = \"window\"\nbudget = 30\nseed = 3", "seed");
    setting("policy = \"tova\"\nbudget = 30\nwindow = 3", "window");
    setting("policy = \"h2o\"\nbudget = 30\ndecay = 0.5", "decay");
    setting("policy = \"locret\"\nbudget = 30", "heads");
    setting("policy = \"kvzap\"\nbudget = 30", "heads");
    setting("policy = \"fast-kvzip\"\nthreshold = 0.5", "heads");
    setting("policy = \"q-filters\"\nbudget = 30", "filters");
    setting("policy = \"duo-attention\"", "patterns");
    setting("policy = \"duo-attention\"\nbudget = 30", "budget");
    // What queries see is said once.
    setting("policy = \"full\"\nsparse = true", "sparse");
    let sparse = "policy = \"window\"\nbudget = 30\nsparse = true\n";
    setting(&format!("{sparse}put_away = true"), "sparse");
    setting(&format!("{sparse}vertical = 30"), "slash");
    setting("policy = \"window\"\nbudget = 30\nslash = 30", "slash");
    setting("policy = \"cur\"\nbudget = 30\nlag = 3", "lag");
    setting("policy = \"lagkv\"\nbudget = 30\nwindow = 3", "window");
    setting(
        "policy = \"h2o\"\nbudget = 30\nthreshold = 1.0",
        "threshold",
    );
    let both = "policy = \"kvzap\"\nheads = \"x\"\n";
    setting(&format!("{both}threshold = 1.0\nbudget = 30"), "threshold");
    setting(&format!("{both}threshold = 1.0\nada = 0.2"), "ada");
    setting(
        "policy = \"h2o\"\nbudget = 30\nmerge_by = \"mean\"",
        "merge_by",
    );
    // What is dropped is folded in one way, and not put away besides.
    for method in ["d2o", "cam"] {
        let text = format!("policy = \"{method}\"\nbudget = 30\n");
        setting(&format!("{text}merge = 0.5"), "merge");
        setting(&format!("{text}put_away = true"), "put_away");
    }
    setting("policy = \"cam\"\nbudget = 30\nexempt = [1, 1]", "exempt");
    setting("policy = \"d2o\"\nbudget = 30\nkeeps = \"heavy\"", "keeps");
    setting("policy = \"d2o\"\nbudget = 30\nsums = true", "sums");
    setting("policy = \"h2o\"\nbudget = 30\nmix_keys = true", "mix_keys");
    // Output projections are the model's own.
    setting("policy = \"h2o\"\nbudget = 30\ncritical = true", "critical");
    setting(
        "policy = \"h2o\"\nbudget = 30\ncritical = true\nblocks = 5",
        "critical",
    );

    let core = |text: &str, word: &str| match build(text).err() {
        Some(PolicyError::Core(Error::Setting { what, .. })) => {
            assert!(what.contains(word), "{what}")
        }
        other => panic!("{text}: {other:?}"),
    };
    core("policy = \"window\"\nbudget = 0", "budget");
    core("policy = \"window\"\nbudget = { ratio = 0.0 }", "ratio");
    core("policy = \"window\"\nbudget = { ratio = nan }", "ratio");
    core("policy = \"window\"\nbudget = { bytes = 100 }", "bytes");
    core(
        "policy = \"key-norm\"\nbudget = 30\nstabilizers = 30",
        "stabilizers",
    );
    core(
        "policy = \"key-norm\"\nbudget = 30\nstabilizers = 20\nsinks = 10",
        "stabilizers",
    );
    core("policy = \"key-norm\"\nbudget = 30\nrecent = 31", "recent");
    core("policy = \"key-norm\"\nbudget = 30\nsinks = 31", "sinks");
    core("policy = \"key-norm\"\nbudget = 30\npool = 4", "pool");
    core(
        "policy = \"key-norm\"\nbudget = 30\ndecode = { every = 0 }",
        "decode",
    );
    core("policy = \"sirllm\"\nbudget = 30\ndecay = 0.0", "decay");
    core("policy = \"sirllm\"\nbudget = 30\ndecay = 1.5", "decay");
    core("policy = \"sirllm\"\nbudget = 30\ndecay = nan", "decay");
    core("policy = \"snapkv\"\nbudget = 30\nwindow = 0", "window");
    core("policy = \"snapkv\"\nbudget = 30\nkernel = 2", "kernel");
    core("policy = \"lagkv\"\nbudget = 30\nlag = 0", "lag");
    core("policy = \"cur\"\nbudget = 30\nwindow = 0", "window");
    core("policy = \"h2o\"\nbudget = 30\nblocks = 0", "block");
    core("policy = \"cam\"\nbudget = 30\nwindow = 0", "window");
    core(
        "policy = \"d2o\"\nbudget = 30\nsmoothing = 1.5",
        "smoothing",
    );
    core(
        "policy = \"d2o\"\nbudget = 30\nsmoothing = nan",
        "smoothing",
    );
    core(
        "policy = \"d2o\"\nbudget = 30\nexempt_whole = true\nshare = \"model\"",
        "exempt_whole",
    );
    core(
        "policy = \"compactor\"\nbudget = 30\nblending = nan",
        "blending",
    );
    core(
        "policy = \"expected-attention\"\nbudget = 30\nfuture = 0",
        "future",
    );

    match build("policy = \"locret\"\nbudget = 30\nheads = \"nowhere.safetensors\"") {
        Err(PolicyError::Io { path, .. }) => assert_eq!(path, PathBuf::from("nowhere.safetensors")),
        other => panic!("{other:?}"),
    }
    // The smallest budgets work with every method's defaults.
    for method in Method::ALL
        .into_iter()
        .filter(|m| m.evicts() && *m != Method::Locret)
    {
        for budget in 1..8 {
            let config = PolicyConfig::new(method).budget(Budget::Units(budget));
            common::complete(&config, &spec)
                .build(&spec, &*compute(&Device::default()))
                .unwrap_or_else(|e| panic!("{method} {budget}: {e}"));
        }
    }
}

#[test]
fn advice_of_heads_is_taken_where_nothing_else_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(2, 2, 3, 8);
    let path = heads_file(folder.path(), &spec);
    let mut config = PolicyConfig::new(Method::Locret).budget(Budget::Units(64));
    config.heads = Some(path.clone());
    let positions = |config: &PolicyConfig| {
        config
            .build(&spec, &*compute(&Device::default()))
            .map(|p| p.positions())
    };
    assert_eq!(positions(&config).unwrap(), Positions::Compact);
    let mut heads = HeadWeights::load(&path, &spec).unwrap();
    let advice = HeadAdvice {
        pool: Some(3),
        sinks: Some(2),
        recent: Some(4),
        ada: Some(0.2),
        share: Some(Share::Layer),
        table: Some(BudgetTable::new(vec![vec![1.5], vec![0.5]]).unwrap()),
        positions: Some(Positions::Original),
    };
    heads.advise(&advice);
    heads.save(&path, DType::F32).unwrap();
    assert_eq!(
        HeadWeights::load(&path, &spec).unwrap().advice().unwrap(),
        advice
    );
    assert_eq!(positions(&config).unwrap(), Positions::Original);
    let own = config.clone().positions(Positions::Compact);
    assert_eq!(positions(&own).unwrap(), Positions::Compact);
    let mut published = config.clone();
    published.advice = Some(false);
    assert_eq!(positions(&published).unwrap(), Positions::Compact);
    assert_eq!(published.advised(&advice), published);
    // What is protected shrinks with a small budget.
    let small = config.clone().budget(Budget::Units(12)).advised(&advice);
    assert_eq!((small.sinks, small.recent), (Some(1), Some(3)));
    let bytes = config.clone().budget(Budget::Bytes(1 << 16));
    let bytes = bytes.advised(&advice);
    assert_eq!((bytes.sinks, bytes.recent), (Some(2), Some(4)));
    // How layers share is said once.
    assert_eq!(config.advised(&advice).share, Some(Share::Layer));
    assert!(config.advised(&advice).table.is_some());
    let mut pyramid = config.clone();
    pyramid.pyramid = Some(20.0);
    assert_eq!(pyramid.advised(&advice).table, None);
    assert!(positions(&pyramid).is_ok());
    let mut model = config.clone();
    model.share = Some(Share::Model);
    assert_eq!(model.advised(&advice).table, None);
    assert!(positions(&model).is_ok());
    let over_model = HeadAdvice {
        share: Some(Share::Model),
        table: None,
        ..advice.clone()
    };
    assert_eq!(pyramid.advised(&over_model).share, None);
    assert_eq!(config.advised(&over_model).share, Some(Share::Model));
    // The others arrive, too: an even pool, a floor above 1, a table of another model would be refused.
    let none = HeadAdvice::default();
    for wrong in [
        HeadAdvice {
            pool: Some(2),
            ..none.clone()
        },
        HeadAdvice {
            ada: Some(1.5),
            ..none.clone()
        },
        HeadAdvice {
            table: Some(BudgetTable::new(vec![vec![1.0]; 3]).unwrap()),
            ..none.clone()
        },
    ] {
        heads.advise(&wrong);
        heads.save(&path, DType::F32).unwrap();
        assert!(positions(&config).is_err(), "{wrong:?}");
        let mut own = config.clone();
        (own.pool, own.ada) = (Some(1), Some(1.0));
        own.table = Some(BudgetTable::new(vec![vec![1.0]; 2]).unwrap().into());
        assert_eq!(positions(&own).unwrap(), Positions::Compact);
    }
    heads
        .metadata
        .insert("advice".into(), "{\"pol\": 3}".into());
    heads.save(&path, DType::F32).unwrap();
    assert!(matches!(positions(&config), Err(PolicyError::File { .. })));
}

#[test]
fn heads_beside_a_file_are_found_from_it() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(2, 2, 3, 8);
    heads_file(folder.path(), &spec);
    let text = "policy = \"locret\"\nbudget = 64\nheads = \"heads.safetensors\"\n";
    let path = folder.path().join("policy.toml");
    std::fs::write(&path, text).unwrap();
    let config = PolicyConfig::load(&path).unwrap();
    config.build(&spec, &*compute(&Device::default())).unwrap();
    let path = folder.path().join("policy.json");
    std::fs::write(&path, serde_json::to_string(&config).unwrap()).unwrap();
    assert_eq!(PolicyConfig::load(&path).unwrap(), config);
    std::fs::write(&path, "{").unwrap();
    assert!(matches!(
        PolicyConfig::load(&path),
        Err(PolicyError::File { .. })
    ));
    assert!(matches!(
        PolicyConfig::load(folder.path().join("none")),
        Err(PolicyError::Io { .. })
    ));
    // The wrong model is told from the file.
    let other = common::spec(3, 2, 3, 8);
    assert!(matches!(
        config.build(&other, &*compute(&Device::default())),
        Err(PolicyError::MissingKeys { .. })
    ));
}

#[test]
fn errors_keep_their_meaning_on_the_way_to_the_engine() {
    let setting: Error = PolicyError::Core(Error::EmptyPrompt).into();
    assert!(matches!(setting, Error::EmptyPrompt));
    let config: Error = PolicyError::Config("x".into()).into();
    assert!(config.to_string().contains('x'));
}

#[test]
fn second_tiers_and_what_is_put_away() {
    let spec = spec(2, 2, 3, 8);
    let compute = compute(&Device::default());
    let built = |text: &str| {
        let config = PolicyConfig::from_toml(text).unwrap();
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(PolicyConfig::from_json(&json).unwrap(), config);
        config.build(&spec, &*compute)
    };
    let name = |text: &str| built(text).unwrap().name();
    assert_eq!(name("policy = 'infllm'"), "infllm");
    assert_eq!(
        name("policy = 'infllm'\nbudget = 300"),
        "infllm in two tiers"
    );
    assert_eq!(
        name("policy = 'infllm'\nn_local = 40\ntier = 'disk'\nresident = '1MiB'"),
        "infllm in two tiers"
    );
    assert_eq!(
        name("policy = 'window'\nbudget = 40\nput_away = true"),
        "window put away"
    );
    assert_eq!(
        name("policy = 'h2o'\nbudget = 40\nput_away = true\ntier = 'memory'\nquantize = 8"),
        "h2o put away+8bit in two tiers"
    );
    for (text, message) in [
        ("policy = 'infllm'\nbudget = '50%'", "units or bytes"),
        ("policy = 'infllm'\npositions = 'original'", "compact"),
        ("policy = 'infllm'\nbudget = 300\nn_local = 290", "budget"),
        ("policy = 'infllm'\nput_away = true", "put_away"),
        ("policy = 'infllm'\ntier = 'disk'", "resident"),
        ("policy = 'infllm'\nresident = 10", "resident"),
        ("policy = 'window'\nbudget = 40\ntier = 'disk'", "tier"),
        ("policy = 'window'\nbudget = 40\ntopk = 3", "topk"),
        (
            "policy = 'window'\nbudget = 40\nput_away = true\nn_init = 3",
            "n_init",
        ),
        (
            "policy = 'window'\nbudget = '10%'\nput_away = true\ntier = 'disk'",
            "resident",
        ),
        (
            "policy = 'window'\nbudget = 40\nput_away = true\nmerge = 0.5",
            "put_away",
        ),
        (
            "policy = 'window'\nbudget = 40\nput_away = true\nrepr_topk = 33",
            "1 to 32",
        ),
    ] {
        let error = built(text).unwrap_err().to_string();
        assert!(error.contains(message), "{text}: {error}");
    }
    let unknown = PolicyConfig::from_toml("policy = 'infllm'\ntier = 'cloud'").unwrap_err();
    assert!(unknown.to_string().contains("disk:FOLDER"), "{unknown}");
    // A folder counts from the file's.
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("p.toml");
    std::fs::write(
        &file,
        "policy = 'infllm'\nbudget = 90\ntier = 'disk:scratch'",
    )
    .unwrap();
    let config = PolicyConfig::load(&file).unwrap();
    let due = TierConfig::Disk(Some(folder.path().join("scratch")));
    assert_eq!(config.tier, Some(due));
}
