//! A hub of one repository `o/n` and a store for its large files, on two ports of this machine, which
//! answer as the public ones do, and fail as they do.

use sha2::{Digest, Sha256};
use std::{
    collections::{BTreeMap, VecDeque},
    io::{self, BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

/// Its commit.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// A token that may read everything, and one that may not read what is gated.
pub const GOOD: &str = "hf_good";
pub const STRANGER: &str = "hf_stranger";
/// From here on files are large.
const LARGE: usize = 1000;

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// How an answer with a file's content goes wrong.
#[derive(Debug, Clone, Copy)]
pub enum Fault {
    /// The connection ends after so many bytes.
    Cut(usize),
    /// Nothing comes any more after so many bytes; the connection stays.
    Stall(usize),
    /// HTTP 503.
    Busy,
    /// The whole file, though a part was asked for.
    Whole,
}

/// What the repository is like.
#[derive(Debug, Clone, Default)]
pub struct Repo {
    pub files: BTreeMap<String, Vec<u8>>,
    /// Only accounts with access may read files.
    pub gated: bool,
    /// What is said of large files, where it is not their hash.
    pub etag: Option<String>,
    pub commit: Option<String>,
    /// What happens to the next answers of the store.
    pub faults: VecDeque<Fault>,
    /// Nothing is answered at all.
    pub silent: bool,
}

/// A request that came.
#[derive(Debug, Clone)]
pub struct Request {
    /// To the store, not to the hub.
    pub store: bool,
    pub path: String,
    pub token: Option<String>,
    pub range: Option<String>,
}

pub struct HubServer {
    pub endpoint: String,
    pub repo: Arc<Mutex<Repo>>,
    log: Arc<Mutex<Vec<Request>>>,
}

impl HubServer {
    pub fn start(repo: Repo) -> Self {
        let bind = || TcpListener::bind("127.0.0.1:0").unwrap();
        let (hub, store) = (bind(), bind());
        let endpoint = format!("http://{}", hub.local_addr().unwrap());
        let place = format!("http://{}", store.local_addr().unwrap());
        let repo = Arc::new(Mutex::new(repo));
        let log = Arc::new(Mutex::new(Vec::new()));
        for (listener, is_store) in [(hub, false), (store, true)] {
            let (repo, log, place) = (repo.clone(), log.clone(), place.clone());
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let (repo, log, place) = (repo.clone(), log.clone(), place.clone());
                    thread::spawn(move || answer(stream, is_store, &place, &repo, &log));
                }
            });
        }
        Self {
            endpoint,
            repo,
            log,
        }
    }

    /// What came since it was asked last.
    pub fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }
}

fn read(stream: &TcpStream, store: bool) -> io::Result<Request> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut request = Request {
        store,
        path: line.split(' ').nth(1).unwrap_or_default().to_owned(),
        token: None,
        range: None,
    };
    loop {
        let mut header = String::new();
        reader.read_line(&mut header)?;
        let Some((name, value)) = header.trim_end().split_once(": ") else {
            return Ok(request);
        };
        match name.to_lowercase().as_str() {
            "authorization" => request.token = Some(value.trim_start_matches("Bearer ").into()),
            "range" => request.range = Some(value.into()),
            _ => {}
        }
    }
}

fn answer(
    mut stream: TcpStream,
    store: bool,
    place: &str,
    repo: &Mutex<Repo>,
    log: &Mutex<Vec<Request>>,
) -> io::Result<()> {
    let request = read(&stream, store)?;
    log.lock().unwrap().push(request.clone());
    let state = repo.lock().unwrap().clone();
    if state.silent {
        thread::sleep(Duration::from_secs(600));
    }
    if store {
        let fault = repo.lock().unwrap().faults.pop_front();
        let name = request.path.trim_start_matches("/lfs/");
        let name = name.split('?').next().unwrap_or_default();
        return content(&mut stream, &request, "", &state.files[name], fault);
    }
    let commit = state.commit.as_deref().unwrap_or(COMMIT);
    let refuse = |stream: &mut TcpStream, status: &str, code: &str, message: &str| {
        let headers = format!("X-Error-Code: {code}\r\nX-Error-Message: {message}\r\n");
        respond(stream, status, &headers, b"")
    };
    let known = request.token.as_deref() == Some(GOOD);
    let revisions = |rest: &str| rest == "main" || rest == COMMIT;
    if let Some(rest) = request.path.strip_prefix("/api/models/o/n/revision/") {
        if !revisions(rest) {
            let message = format!("Invalid rev id: {rest}");
            return refuse(&mut stream, "404 Not Found", "RevisionNotFound", &message);
        }
        let siblings = state.files.keys();
        let siblings: Vec<_> = siblings
            .map(|f| serde_json::json!({"rfilename": f}))
            .collect();
        let body = serde_json::json!({"id": "o/n", "siblings": siblings, "sha": COMMIT});
        let headers = "Content-Type: application/json\r\n";
        return respond(&mut stream, "200 OK", headers, body.to_string().as_bytes());
    }
    let cached = request.path.strip_prefix("/api/resolve-cache/models/o/n/");
    let file = request.path.strip_prefix("/o/n/resolve/").or(cached);
    let Some((revision, name)) = file.and_then(|rest| rest.split_once('/')) else {
        // Nobody without a token is told what there is not.
        return match request.token {
            None => refuse(
                &mut stream,
                "401 Unauthorized",
                "RepoNotFound",
                "Invalid username or password.",
            ),
            Some(_) => refuse(
                &mut stream,
                "404 Not Found",
                "RepoNotFound",
                "Repository not found",
            ),
        };
    };
    if !revisions(revision) {
        let message = format!("Invalid rev id: {revision}");
        return refuse(&mut stream, "404 Not Found", "RevisionNotFound", &message);
    }
    if state.gated && !known {
        let (status, message) = match request.token {
            None => ("401 Unauthorized", "Access to model o/n is restricted."),
            Some(_) => ("403 Forbidden", "Access to model o/n is restricted."),
        };
        return refuse(&mut stream, status, "GatedRepo", message);
    }
    let Some(bytes) = state.files.get(name) else {
        let code = "EntryNotFound";
        return refuse(&mut stream, "404 Not Found", code, "Entry not found");
    };
    let commit = format!("X-Repo-Commit: {commit}\r\n");
    if bytes.len() >= LARGE {
        let etag = state.etag.unwrap_or_else(|| sha256(bytes));
        let headers = format!(
            "{commit}X-Linked-Etag: \"{etag}\"\r\nX-Linked-Size: {}\r\nETag: \"{etag}\"\r\n\
             Location: {place}/lfs/{name}?signature=1\r\n",
            bytes.len()
        );
        return respond(&mut stream, "302 Found", &headers, b"");
    }
    if cached.is_none() {
        // The hub answers small files from another place of its own.
        let headers = format!(
            "{commit}X-Linked-Size: {}\r\nLocation: /api/resolve-cache/models/o/n/{revision}/{name}\r\n",
            bytes.len()
        );
        return respond(&mut stream, "307 Temporary Redirect", &headers, b"");
    }
    let headers = format!("{commit}ETag: W/\"{}\"\r\n", &sha256(bytes)[..40]);
    content(&mut stream, &request, &headers, bytes, None)
}

/// A file's content, or the part that is asked for.
fn content(
    stream: &mut TcpStream,
    request: &Request,
    headers: &str,
    bytes: &[u8],
    fault: Option<Fault>,
) -> io::Result<()> {
    let mut from = 0;
    let asked = request.range.as_deref();
    if let Some(range) = asked.filter(|_| !matches!(fault, Some(Fault::Whole))) {
        let range = range.strip_prefix("bytes=").unwrap();
        from = range.split('-').next().unwrap().parse::<usize>().unwrap();
        if from >= bytes.len() {
            return respond(stream, "416 Range Not Satisfiable", "", b"");
        }
    }
    let part = &bytes[from..];
    let (status, range) = match asked.is_some() && !matches!(fault, Some(Fault::Whole)) {
        true => (
            "206 Partial Content",
            format!(
                "Content-Range: bytes {from}-{}/{}\r\n",
                bytes.len() - 1,
                bytes.len()
            ),
        ),
        false => ("200 OK", String::new()),
    };
    let headers = format!("{headers}{range}ETag: \"of-the-store\"\r\n");
    match fault {
        Some(Fault::Busy) => respond(stream, "503 Service Unavailable", "", b""),
        Some(Fault::Cut(after) | Fault::Stall(after)) => {
            head(stream, status, &headers, part.len())?;
            stream.write_all(&part[..after.min(part.len())])?;
            stream.flush()?;
            if let Some(Fault::Stall(_)) = fault {
                thread::sleep(Duration::from_secs(600));
            }
            Ok(())
        }
        _ => respond(stream, status, &headers, part),
    }
}

fn head(stream: &mut TcpStream, status: &str, headers: &str, length: usize) -> io::Result<()> {
    let head = format!(
        "HTTP/1.1 {status}\r\n{headers}Content-Length: {length}\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes())
}

fn respond(stream: &mut TcpStream, status: &str, headers: &str, body: &[u8]) -> io::Result<()> {
    head(stream, status, headers, body.len())?;
    stream.write_all(body)
}
