//! Requests to the hub: who is told the token, where redirects lead, what answers mean.

use std::{io, time::Duration};
use ureq::{
    Agent, Body, Timeout,
    http::{HeaderMap, Response, StatusCode, header},
};

/// Redirects that are followed.
const REDIRECTS: usize = 10;
/// How often a hub that has no time is asked.
const ASKED: u32 = 3;
/// Bytes of an answer that is no file.
const ANSWER: u64 = 64 << 20;

/// How a request failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// An answer that is an error, with the hub's own code and words for it.
    Status {
        status: u16,
        code: String,
        said: String,
    },
    /// Nothing came for so long.
    Silent { host: String, patience: Duration },
    /// Everything else between here and there.
    Transport { host: String, why: String },
}

impl Failure {
    /// Whether the same may work a moment later.
    fn passes(&self) -> bool {
        matches!(self, Self::Status { status, .. } if matches!(status, 408 | 429 | 500..=599))
    }
}

/// Speaks with one hub.
#[derive(Debug)]
pub(super) struct Client {
    agent: Agent,
    endpoint: String,
    authorization: Option<String>,
    patience: Duration,
}

/// A file that begins to come in.
#[derive(Debug)]
pub(super) struct Incoming {
    /// The hub's name for the content: its SHA-256 for large files.
    pub(super) etag: Option<String>,
    pub(super) commit: Option<String>,
    /// Bytes of the whole file.
    pub(super) size: Option<u64>,
    /// Which byte of the file comes first.
    pub(super) from: u64,
    pub(super) host: String,
    pub(super) body: Body,
}

impl Client {
    /// For the hub at `endpoint`, waiting at most `patience` whenever something is to come.
    pub(super) fn new(endpoint: &str, token: Option<&str>, patience: Duration) -> Self {
        let limit = Some(patience);
        let config = Agent::config_builder()
            .user_agent(concat!("locret/", env!("CARGO_PKG_VERSION")))
            // Of a file in another encoding neither size nor ranges would be the file's.
            .accept_encoding("identity")
            .http_status_as_error(false)
            // They are followed here, so that the token goes to the hub alone.
            .max_redirects(0)
            .timeout_resolve(limit)
            .timeout_connect(limit)
            .timeout_recv_response(limit)
            .timeout_per_read(limit)
            .build();
        Self {
            agent: config.into(),
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            authorization: token.map(|token| format!("Bearer {token}")),
            patience,
        }
    }

    pub(super) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    pub(super) fn has_token(&self) -> bool {
        self.authorization.is_some()
    }

    /// What the hub says of a repository, as JSON.
    pub(super) fn info(&self, id: &str, revision: &str) -> Result<Vec<u8>, Failure> {
        let revision = escaped(revision).replace('/', "%2F");
        let url = format!("{}/api/models/{id}/revision/{revision}", self.endpoint);
        self.patiently(|| {
            let (mut found, host) = self.follow(&url, 0, &mut |_| {})?;
            let body = found.body_mut().with_config().limit(ANSWER);
            body.read_to_vec().map_err(|e| self.failure(&host, e))
        })
    }

    /// A file of a repository, from a byte on. The hub may send it from its beginning all the same.
    pub(super) fn file(
        &self,
        id: &str,
        revision: &str,
        file: &str,
        from: u64,
    ) -> Result<Incoming, Failure> {
        let revision = escaped(revision).replace('/', "%2F");
        let file = escaped(file);
        let url = format!("{}/{id}/resolve/{revision}/{file}", self.endpoint);
        self.patiently(|| {
            let (mut etag, mut commit, mut linked) = (None, None, None);
            // What the hub says counts, not what a store for large files says of them.
            let (found, host) = self.follow(&url, from, &mut |headers| {
                commit = text(headers, "x-repo-commit").or(commit.take());
                linked = number(headers, "x-linked-size").or(linked);
                let own = text(headers, "x-linked-etag").or_else(|| text(headers, "etag"));
                etag = own.map(unquoted).or(etag.take());
            })?;
            let (head, body) = found.into_parts();
            let range = text(&head.headers, "content-range");
            let range = range.as_deref().and_then(content_range);
            let partly = head.status == StatusCode::PARTIAL_CONTENT;
            let (from, total) = match range.filter(|_| partly) {
                Some((from, total)) => (from, total),
                None => (0, body.content_length()),
            };
            Ok(Incoming {
                etag,
                commit,
                size: linked.or(total),
                from,
                host,
                body,
            })
        })
    }

    /// Asks again where the hub has no time.
    fn patiently<T>(&self, ask: impl Fn() -> Result<T, Failure>) -> Result<T, Failure> {
        let mut asked = 1;
        loop {
            match ask() {
                Err(failure) if failure.passes() && asked < ASKED => self.pause(asked),
                result => return result,
            }
            asked += 1;
        }
    }

    /// Waits before the next try: longer each time.
    pub(super) fn pause(&self, tried: u32) {
        std::thread::sleep(
            self.patience
                .min(Duration::from_millis(500) * tried * tried),
        );
    }

    /// Requests and follows redirects; `hub` sees the headers of what the hub itself answers. An answer
    /// that is an error is one here; 416 is asked once more from the beginning.
    fn follow(
        &self,
        url: &str,
        from: u64,
        hub: &mut dyn FnMut(&HeaderMap),
    ) -> Result<(Response<Body>, String), Failure> {
        let (mut url, mut from) = (url.to_owned(), from);
        for _ in 0..=REDIRECTS {
            let host = origin(&url).to_owned();
            let ours = same_origin(&url, &self.endpoint);
            let mut request = self.agent.get(&url);
            if let Some(authorization) = self.authorization.as_deref().filter(|_| ours) {
                request = request.header(header::AUTHORIZATION, authorization);
            }
            if from > 0 {
                request = request.header(header::RANGE, format!("bytes={from}-"));
            }
            let mut found = request.call().map_err(|e| self.failure(&host, e))?;
            let status = found.status();
            if ours && (status.is_success() || status.is_redirection()) {
                hub(found.headers());
            }
            if status.is_success() {
                return Ok((found, host));
            }
            if status == StatusCode::RANGE_NOT_SATISFIABLE && from > 0 {
                from = 0;
                continue;
            }
            if status.is_redirection() {
                let Some(to) = text(found.headers(), "location") else {
                    let why = format!("HTTP {} without a place to go to", status.as_u16());
                    return Err(Failure::Transport { host, why });
                };
                url = joined(&url, &to);
                continue;
            }
            return Err(Failure::Status {
                status: status.as_u16(),
                code: text(found.headers(), "x-error-code").unwrap_or_default(),
                said: said(&mut found),
            });
        }
        Err(Failure::Transport {
            host: origin(&url).to_owned(),
            why: format!("more than {REDIRECTS} redirects"),
        })
    }

    fn failure(&self, host: &str, error: ureq::Error) -> Failure {
        let host = host.to_owned();
        match error {
            ureq::Error::Timeout(Timeout::Resolve) => Failure::Transport {
                host,
                why: "its address was not found in time".into(),
            },
            ureq::Error::Timeout(_) => Failure::Silent {
                host,
                patience: self.patience,
            },
            other => Failure::Transport {
                host,
                why: other.to_string(),
            },
        }
    }

    /// What an error while a body is read means.
    pub(super) fn broken(&self, host: &str, error: io::Error) -> Failure {
        self.failure(host, error.into())
    }
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    let value = headers.get(name)?.to_str().ok()?;
    (!value.is_empty()).then(|| value.to_owned())
}

fn number(headers: &HeaderMap, name: &str) -> Option<u64> {
    text(headers, name)?.trim().parse().ok()
}

/// `W/"x"` and `"x"` as `x`.
fn unquoted(etag: String) -> String {
    let etag = etag.trim();
    let etag = etag.strip_prefix("W/").unwrap_or(etag);
    etag.trim_matches('"').to_owned()
}

/// The first byte and the length of the whole in `bytes 5-9/10`.
fn content_range(value: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = value.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (from, _) = range.split_once('-')?;
    Some((from.trim().parse().ok()?, total.trim().parse().ok()))
}

/// A line of what an error's answer says.
fn said(found: &mut Response<Body>) -> String {
    const MAX: usize = 200;
    let line = text(found.headers(), "x-error-message").or_else(|| {
        let plain = text(found.headers(), "content-type")?;
        if !(plain.starts_with("text/plain") || plain.starts_with("application/json")) {
            return None;
        }
        let body = found.body_mut().with_config().limit(4096);
        let body = body.read_to_string().ok()?;
        let error = serde_json::from_str::<serde_json::Value>(&body).ok();
        let error = error.and_then(|e| e.get("error")?.as_str().map(str::to_owned));
        Some(error.unwrap_or(body))
    });
    let line = line.unwrap_or_default();
    let printable = line.chars().map(|c| if c.is_control() { ' ' } else { c });
    printable.take(MAX).collect::<String>().trim().to_owned()
}

/// A path as a URL has it.
fn escaped(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    for byte in path.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            out.push(byte as char);
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

/// Scheme, host and port: everything before the path.
fn origin(url: &str) -> &str {
    let start = url.find("://").map_or(0, |at| at + 3);
    let end = url[start..].find(['/', '?', '#']);
    &url[..end.map_or(url.len(), |end| start + end)]
}

fn same_origin(a: &str, b: &str) -> bool {
    let normal = |url: &str| {
        let origin = origin(url).to_ascii_lowercase();
        let usual = match origin.split_once("://") {
            Some(("https", _)) => ":443",
            _ => ":80",
        };
        origin
            .strip_suffix(usual)
            .map(str::to_owned)
            .unwrap_or(origin)
    };
    normal(a) == normal(b)
}

/// Where a redirect leads.
fn joined(url: &str, to: &str) -> String {
    let to = to.trim();
    if to.contains("://") && !to.starts_with('/') {
        return to.to_owned();
    }
    let origin = origin(url);
    if to.starts_with("//") {
        let scheme = origin.split("//").next().unwrap_or_default();
        return format!("{scheme}{to}");
    }
    if to.starts_with('/') {
        return format!("{origin}{to}");
    }
    let path = &url[origin.len()..];
    let path = path.split(['?', '#']).next().unwrap_or_default();
    let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
    format!("{origin}{folder}/{to}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places() {
        for (url, to, expected) in [
            ("http://h:1/a/b?x", "https://o/c", "https://o/c"),
            ("http://h:1/a/b?x", "/c?y", "http://h:1/c?y"),
            ("https://h/a/b", "//o/c", "https://o/c"),
            ("http://h:1/a/b?x=/", "c", "http://h:1/a/c"),
            ("http://h", "c", "http://h/c"),
            ("http://h/a", "/x?u=http://z", "http://h/x?u=http://z"),
        ] {
            assert_eq!(joined(url, to), expected, "{url} {to}");
        }
        assert!(same_origin("https://H/a", "https://h:443"));
        for other in [
            "http://h",
            "https://h:444/a",
            "https://h.evil/a",
            "https://hh",
        ] {
            assert!(!same_origin(other, "https://h"), "{other}");
        }
        assert_eq!(escaped("a b/c#d\u{e9}.json"), "a%20b/c%23d%C3%A9.json");
    }

    #[test]
    fn headers() {
        assert_eq!(unquoted("W/\"abc\"".into()), "abc");
        assert_eq!(unquoted("\"abc\"".into()), "abc");
        assert_eq!(content_range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(content_range("bytes 5-9/*"), Some((5, None)));
        assert_eq!(content_range("bytes */10"), None);
    }
}
