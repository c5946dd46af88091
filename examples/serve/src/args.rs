//! The command line.

use clap::Parser;
use locret_examples::args::{ModelArgs, PolicyArgs, PrefillArgs, parse_bytes};
use std::time::Duration;

/// Serves a model to many readers at once, in bounded memory
#[derive(Debug, Clone, Parser)]
#[command(name = "serve")]
pub struct Args {
    /// Address to listen at
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub host: String,
    /// Port to listen at; 0 for any
    #[arg(long, value_name = "N", default_value_t = 8080)]
    pub port: u16,
    /// Bytes that all sequences together may take, such as 256MiB; whoever does not fit waits
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub memory_cap: Option<usize>,
    /// Sequences that run at once
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub running: usize,
    /// Sequences that may wait; further ones are refused
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub queue: usize,
    /// Tokens of an answer: the most that may be asked for, and what is taken where nothing is asked for
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub max_tokens: usize,
    /// Tokens of a prompt at most
    #[arg(long, value_name = "N", default_value_t = 131_072)]
    pub max_prompt: usize,
    /// Seconds from a request to the end of its answer at most
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub timeout: u64,
    /// Seconds within which a request's headers have to be there, and then its body
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub body_timeout: u64,
    /// Bytes of a request's body at most
    #[arg(long, value_name = "BYTES", default_value = "4MiB", value_parser = parse_bytes)]
    pub max_body: usize,
    /// Connections at once; further ones are not accepted before others are closed
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub connections: usize,
    /// Seconds that running answers get to end when the server is told to
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub grace: u64,
    /// What requests have to bring as a bearer token
    #[arg(
        long,
        value_name = "TOKEN",
        env = "LOCRET_TOKEN",
        hide_env_values = true
    )]
    pub token: Option<String>,
    /// Where conversations are kept between their turns: a folder, or s3://bucket/prefix
    #[arg(long, value_name = "DIR|URL")]
    pub sessions: Option<String>,
    /// Where sequences are put that make way for others which have waited for long: a folder, or
    /// s3://bucket/prefix. Without it, nobody makes way
    #[arg(long, value_name = "DIR|URL")]
    pub spill: Option<String>,
    /// Bytes of the memory cap for system messages, which are read once; 0 reads each of them again. By
    /// default an eighth of the cap, 64MiB at most
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes_or_none)]
    pub prefixes: Option<usize>,
    #[command(flatten)]
    pub(crate) policy: PolicyArgs,
    #[command(flatten)]
    pub(crate) prefill: PrefillArgs,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
}

/// Bytes, or none of them. (No cache has a budget of nothing, so that a bare 0 is no budget's text.)
fn parse_bytes_or_none(text: &str) -> Result<usize, String> {
    match text {
        "0" => Ok(0),
        _ => parse_bytes(text),
    }
}

/// What bounds requests.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The most tokens of an answer, and how many where nothing is asked for.
    pub max_tokens: usize,
    /// The most tokens of a prompt.
    pub max_prompt: usize,
    /// From a request to the end of its answer.
    pub timeout: Duration,
    /// Within which headers, and then a body, have to be there.
    pub body_timeout: Duration,
    /// Bytes of a body.
    pub max_body: usize,
    /// Connections at once.
    pub connections: usize,
    /// What running answers get when the server ends.
    pub grace: Duration,
    /// What requests have to bring.
    pub token: Option<String>,
}

impl Args {
    /// What bounds requests.
    pub fn settings(&self) -> Settings {
        Settings {
            max_tokens: self.max_tokens,
            max_prompt: self.max_prompt,
            timeout: Duration::from_secs(self.timeout),
            body_timeout: Duration::from_secs(self.body_timeout),
            max_body: self.max_body,
            connections: self.connections,
            grace: Duration::from_secs(self.grace),
            token: self.token.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_messages_may_have_no_memory() {
        let prefixes = |given: &[&str]| {
            let args = ["serve"].iter().chain(given);
            Args::try_parse_from(args).map(|args| args.prefixes)
        };
        assert_eq!(prefixes(&[]).unwrap(), None);
        assert_eq!(prefixes(&["--prefixes", "0"]).unwrap(), Some(0));
        assert_eq!(prefixes(&["--prefixes", "2MiB"]).unwrap(), Some(2 << 20));
        assert!(prefixes(&["--prefixes", "2"]).is_err());
        assert!(Args::try_parse_from(["serve", "--memory-cap", "0"]).is_err());
    }
}
