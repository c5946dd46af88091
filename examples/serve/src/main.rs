//! Serves a model to many readers at once, in bounded memory.
//!
//! ```text
//! cargo run --release --bin serve -- --policy window --budget 512 --chunk 256 --memory-cap 256MiB
//! ```

use clap::Parser;
use locret_serve::{App, Args, Error, Result, server};
use std::{error::Error as _, process::ExitCode, sync::Arc};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};

fn main() -> ExitCode {
    give_memory_back();
    match start(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("ended before all answers were");
            ExitCode::FAILURE
        }
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

/// Caches come and go, and what they took has to be the system's again: glibc keeps what is smaller than a
/// threshold, which it raises with what it sees, in pieces that soon fit nobody, for every thread apart.
/// With 48 requests under a cap of 256 MiB (`tests/load.py`), a process took 94 MiB more than its sequences
/// without this.
fn give_memory_back() {
    // SAFETY: these set numbers of the allocator, while there is no other thread.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 64 << 10);
        libc::mallopt(libc::M_ARENA_MAX, 2);
    }
}

fn start(args: &Args) -> std::result::Result<bool, String> {
    let app = App::load(args).map_err(chain)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // The model has the cores.
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|e| format!("error: no threads: {e}"))?;
    runtime.block_on(listen(args, Arc::new(app))).map_err(chain)
}

fn chain(error: Error) -> String {
    let mut text = format!("error: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!("\n  because: {error}");
        cause = error.source();
    }
    text
}

async fn listen(args: &Args, app: Arc<App>) -> Result<bool> {
    let address = format!("{}:{}", args.host, args.port);
    let failed = |source| Error::Listen {
        address: address.clone(),
        source,
    };
    let listener = TcpListener::bind((args.host.as_str(), args.port))
        .await
        .map_err(failed)?;
    let at = listener.local_addr().map_err(failed)?;
    let mut term = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    eprintln!("listening at http://{at}");
    if !at.ip().is_loopback() && args.token.is_none() {
        eprintln!("warning: anybody who reaches {at} can use this server: give a --token");
    }
    let end = async {
        tokio::select! {
            _ = term.recv() => {}
            _ = interrupt.recv() => {}
        }
        eprintln!("ending: what runs has {} seconds", args.grace);
    };
    server::serve(app, listener, end).await
}
