//! The server as clients find it: a model of random weights with SmolLM2's tokenizer, in this process.

mod answers;
mod client;
mod hostile;
mod limits;
mod reading;
mod sessions;
mod turns;

use burn::tensor::Device;
use client::Client;
use locret_core::{
    Budget, CacheOptions, CausalLm, Generate, Limits, ModelSpec, Prefill, RopeConfig, Sampling,
    Session,
};
use locret_eval::random::{RandomWeights, decoder};
use locret_models::{
    ChatTemplate, DecoderConfig, FetchOptions, Layout, LoadOptions, ModelFiles, Tokenizer, resolve,
};
use locret_policies::{Method, PolicyConfig};
use locret_serve::{App, Places, Served, Settings, server};
use std::{
    net::SocketAddr,
    sync::{Arc, LazyLock},
    thread::JoinHandle,
    time::Duration,
};
use tokio::{net::TcpListener, sync::oneshot};

static FILES: LazyLock<ModelFiles> = LazyLock::new(|| {
    let path = resolve("smollm2", &FetchOptions::default(), &|_| {}).unwrap();
    ModelFiles::open(path).unwrap()
});
static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| FILES.tokenizer().unwrap());
static TEMPLATE: LazyLock<ChatTemplate> = LazyLock::new(|| FILES.chat_template().unwrap().unwrap());
static MODEL: LazyLock<Arc<dyn CausalLm>> = LazyLock::new(|| {
    let spec = ModelSpec::new(2, 4, 2, 64, TOKENIZER.vocab_size())
        .with_head_dim(16)
        .with_rope(RopeConfig::plain(10_000.0, 16));
    let config = DecoderConfig {
        spec,
        intermediate: 96,
        norm_epsilon: 1e-5,
        tied: true,
        layout: Layout::Separate,
    };
    let weights = RandomWeights::new(&config, 11);
    let device = Device::flex();
    let model = decoder(&config, &weights, &LoadOptions::new(), &device).unwrap();
    Arc::new(model)
});

const PREFILL: Prefill = Prefill::new(32, 8);

fn config() -> PolicyConfig {
    PolicyConfig::new(Method::KeyNorm).budget(Budget::Units(48))
}

fn settings() -> Settings {
    Settings {
        max_tokens: 4000,
        max_prompt: 4000,
        timeout: Duration::from_secs(60),
        body_timeout: Duration::from_secs(20),
        max_body: 1 << 20,
        connections: 64,
        grace: Duration::from_secs(20),
        token: None,
    }
}

/// A server on a thread of its own.
struct Running {
    at: SocketAddr,
    app: Arc<App>,
    /// Bytes that are promised to nobody in particular: those of prefixes.
    set_aside: usize,
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<bool>>,
}

impl Running {
    fn new(limits: Limits, settings: Settings) -> Self {
        Self::with(limits, settings, Places::default())
    }

    fn with(limits: Limits, settings: Settings, places: Places) -> Self {
        let served = Served {
            name: "random".into(),
            model: MODEL.clone(),
            tokenizer: FILES.tokenizer().unwrap(),
            template: FILES.chat_template().unwrap(),
            stop: TOKENIZER.end_of_turn(&[]),
        };
        let reading = (PREFILL, CacheOptions::new());
        let app = Arc::new(App::new(served, limits, config(), reading, settings, places).unwrap());
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let at = listener.local_addr().unwrap();
        let (end, ended) = oneshot::channel();
        let own = app.clone();
        let thread = std::thread::spawn(move || {
            runtime
                .block_on(server::serve(own, listener, async {
                    let _ = ended.await;
                }))
                .unwrap()
        });
        Self {
            at,
            set_aside: app.batcher.load().promised,
            app,
            end: Some(end),
            thread: Some(thread),
        }
    }

    fn usual() -> Self {
        Self::new(Limits::new(), settings())
    }

    fn client(&self) -> Client {
        Client::new(self.at)
    }

    /// Tells it to end; whether everything was finished.
    fn end(&mut self) -> bool {
        let _ = self.end.take().unwrap().send(());
        self.thread.take().unwrap().join().unwrap()
    }

    /// Waits until no sequence is left.
    fn idle(&self) {
        for _ in 0..2000 {
            let load = self.app.batcher.load();
            if load.running + load.waiting == 0 {
                assert_eq!(load.promised, self.set_aside);
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("{:?}", self.app.batcher.load());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.end.is_some() && !std::thread::panicking() {
            assert!(self.end());
        }
    }
}

/// What a lone session generates after these prompts.
fn lone(prompts: &[(&[u32], Prefill)], most: usize, sampling: Sampling) -> Vec<u32> {
    let policy = config().build_for(&**MODEL).unwrap();
    let mut session = Session::new(MODEL.clone(), policy).unwrap();
    for (ids, prefill) in prompts {
        session.prefill(ids, prefill).unwrap();
    }
    let stop = TOKENIZER.end_of_turn(&[]);
    let generate = Generate::greedy(most).stop_at(stop).sampling(sampling);
    let tokens = session.generate(generate).unwrap();
    tokens.map(Result::unwrap).collect()
}

/// Text of many tokens that are worth looking at.
fn story(words: usize) -> String {
    let words = (0..words).map(|i| ["river", "lamp", "seven", "über", "cold"][i * i % 5]);
    words.collect::<Vec<_>>().join(" ")
}
