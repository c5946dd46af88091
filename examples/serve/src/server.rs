//! Addresses, connections, and the end.

use crate::{Error, Result, answer, app::App, read};
use axum::{
    Router,
    extract::{MatchedPath, Request, State},
    http::{
        HeaderValue, StatusCode,
        header::{AUTHORIZATION, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE},
    },
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use serde_json::json;
use std::{future::Future, sync::Arc, time::Duration};
use tokio::{net::TcpListener, sync::Semaphore, time::Instant};

/// All addresses.
pub fn router(app: Arc<App>) -> Router {
    let guarded = Router::new()
        .route("/v1/chat/completions", post(answer::chat))
        .route("/v1/completions", post(answer::completions))
        .route("/v1/read", post(read::read))
        .route("/v1/models", get(models))
        .route("/v1/models/{name}", get(model))
        .route("/metrics", get(metrics))
        .layer(middleware::from_fn_with_state(app.clone(), key));
    Router::new()
        .merge(guarded)
        .route("/", get(page))
        .route("/health", get(health))
        .fallback(async |request: Request| Error::NotFound(request.uri().path().to_owned()))
        .method_not_allowed_fallback(async |request: Request| {
            Error::Method(request.method().to_string())
        })
        .layer(middleware::from_fn_with_state(app.clone(), counted))
        .with_state(app)
}

async fn key(State(app): State<Arc<App>>, request: Request, next: Next) -> Result<Response> {
    let header = request.headers().get(AUTHORIZATION);
    let token = header.and_then(|value| {
        let (scheme, token) = value.to_str().ok()?.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
    });
    match app.admits(token) {
        true => Ok(next.run(request).await),
        false => Err(Error::Unauthorized),
    }
}

async fn counted(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    // Of addresses that there are; others' names would be a list without end.
    let route = request.extensions().get::<MatchedPath>();
    let route = route.map_or("other", MatchedPath::as_str).to_owned();
    let response = next.run(request).await;
    app.metrics.answered(&route, response.status().as_u16());
    response
}

async fn models(State(app): State<Arc<App>>) -> Response {
    answer::json_response(&json!({ "object": "list", "data": [card(&app)] }))
}

async fn model(
    State(app): State<Arc<App>>,
    axum::extract::Path(name): axum::extract::Path<String>,
) -> Result<Response> {
    if name != app.name {
        return Err(Error::UnknownModel {
            asked: name,
            served: app.name.clone(),
        });
    }
    Ok(answer::json_response(&card(&app)))
}

fn card(app: &App) -> serde_json::Value {
    json!({
        "id": app.name,
        "object": "model",
        "created": app.started(),
        "owned_by": "locret",
        "policy": app.policies.config(),
        "max_tokens": app.settings.max_tokens,
        "max_prompt_tokens": app.settings.max_prompt,
    })
}

async fn health(State(app): State<Arc<App>>) -> Response {
    match app.closing() {
        false => answer::json_response(&json!({ "status": "ok" })),
        true => Error::Core(locret_core::Error::Closed).into_response(),
    }
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    ([(CONTENT_TYPE, kind)], app.metrics.text(&app)).into_response()
}

/// Nothing but itself, and nothing from elsewhere.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; \
                      connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

async fn page() -> Response {
    let kind = HeaderValue::from_static("text/html; charset=utf-8");
    let headers = [
        (CONTENT_TYPE, kind),
        (CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY)),
        (CACHE_CONTROL, HeaderValue::from_static("no-cache")),
    ];
    (StatusCode::OK, headers, include_str!("page.html")).into_response()
}

/// Answers until `end`; then takes nothing more on, and gives what runs the time of
/// [`Settings::grace`](crate::Settings::grace). True if everything that ran was finished.
///
/// # Errors
/// [`Error::Listen`] if connections can no longer be accepted.
pub async fn serve(
    app: Arc<App>,
    listener: TcpListener,
    end: impl Future<Output = ()>,
) -> Result<bool> {
    let router = TowerToHyperService::new(router(app.clone()));
    let connections = Arc::new(Semaphore::new(app.settings.connections));
    let graceful = GracefulShutdown::new();
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(app.settings.body_timeout);
    tokio::pin!(end);
    loop {
        let free = connections.clone().acquire_owned();
        let accepted = tokio::select! {
            accepted = async { (free.await, listener.accept().await) } => accepted,
            () = &mut end => break,
        };
        let (Ok(permit), accepted) = accepted else {
            break;
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(_) => {
                // Of one connection, or for want of file descriptors: others may come.
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            }
        };
        // Tokens are small, and wanted at once.
        let _ = stream.set_nodelay(true);
        let connection = http.serve_connection(TokioIo::new(stream), router.clone());
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            // Whatever breaks a connection is the client's to see.
            let _ = connection.await;
            drop(permit);
        });
    }
    drop(listener);
    app.close();
    let (grace, until) = (app.settings.grace, Instant::now() + app.settings.grace);
    let answered = async {
        let idle = app.idle(grace).await;
        // What is ready is being sent. Connections that only sit there are not waited for.
        tokio::time::sleep_until(until.min(Instant::now() + SENT)).await;
        idle
    };
    tokio::select! {
        idle = answered => Ok(idle),
        // All connections are closed; what they left behind ends at once.
        () = graceful.shutdown() => {
            Ok(app.idle(until.saturating_duration_since(Instant::now())).await)
        }
    }
}

/// How long answers that are ready get to be sent when the server ends.
const SENT: Duration = Duration::from_secs(1);
