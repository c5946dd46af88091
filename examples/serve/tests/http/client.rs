//! A client that speaks plain HTTP, well or badly.

use serde_json::Value;
use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

#[derive(Debug, Clone)]
pub struct Client {
    at: SocketAddr,
    pub headers: Vec<(String, String)>,
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        let mut headers = self.headers.iter();
        headers.find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    /// The data of server-sent events.
    pub fn events(&self) -> Vec<String> {
        let events = self.body.split("\n\n");
        let data = events.filter_map(|event| event.strip_prefix("data: "));
        data.map(str::to_owned).collect()
    }

    /// The error's message, its type and its code.
    pub fn error(&self) -> (String, String, Option<String>) {
        let error = &self.json()["error"];
        let text = |key: &str| error[key].as_str().map(str::to_owned);
        (
            text("message").unwrap(),
            text("type").unwrap(),
            text("code"),
        )
    }
}

impl Client {
    pub fn new(at: SocketAddr) -> Self {
        Self {
            at,
            headers: Vec::new(),
        }
    }

    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.at).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        stream
    }

    pub fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, &[])
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.ask("POST", path, body.to_string().as_bytes())
    }

    pub fn ask(&self, method: &str, path: &str, body: &[u8]) -> Answer {
        let mut stream = self.send(method, path, body);
        read(&mut stream)
    }

    /// Sends a request, whose answer nobody has read yet.
    pub fn send(&self, method: &str, path: &str, body: &[u8]) -> TcpStream {
        let mut stream = self.connect();
        let head = self.head(method, path, body.len());
        stream.write_all(head.as_bytes()).unwrap();
        // A server that has heard enough need not listen to the rest.
        let _ = stream.write_all(body);
        stream
    }

    pub fn head(&self, method: &str, path: &str, length: usize) -> String {
        let mut head = format!("{method} {path} HTTP/1.1\r\nhost: here\r\nconnection: close\r\n");
        let has = |name: &str| self.headers.iter().any(|(n, _)| n == name);
        if !has("content-type") {
            head += "content-type: application/json\r\n";
        }
        for (name, value) in &self.headers {
            head += &format!("{name}: {value}\r\n");
        }
        head + &format!("content-length: {length}\r\n\r\n")
    }
}

/// Reads an answer to its end.
pub fn read(stream: &mut TcpStream) -> Answer {
    let mut from = BufReader::new(stream);
    let mut line = String::new();
    from.read_line(&mut line).unwrap();
    let status = line.split(' ').nth(1).and_then(|s| s.parse().ok());
    let status = status.unwrap_or_else(|| panic!("no status: {line:?}"));
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        from.read_line(&mut line).unwrap();
        let Some((name, value)) = line.trim_end().split_once(": ") else {
            break;
        };
        headers.push((name.to_lowercase(), value.to_owned()));
    }
    let chunked = headers.iter().any(|(n, _)| n == "transfer-encoding");
    let mut body = Vec::new();
    if chunked {
        loop {
            let mut line = String::new();
            from.read_line(&mut line).unwrap();
            let length = usize::from_str_radix(line.trim(), 16).unwrap();
            let mut part = vec![0; length + 2];
            from.read_exact(&mut part).unwrap();
            body.extend_from_slice(&part[..length]);
            if length == 0 {
                break;
            }
        }
    } else {
        from.read_to_end(&mut body).unwrap();
    }
    Answer {
        status,
        headers,
        body: String::from_utf8(body).unwrap(),
    }
}
