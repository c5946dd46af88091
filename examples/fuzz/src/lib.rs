//! Every reader of strangers' files, and schedules of a session and of a batch, with altered inputs.
//!
//! A [`Target`] gets bytes. They are not the input but the choices that make one: which valid file to begin with,
//! where to alter it and how ([`edit`]), so that most inputs are wrong in one place only and reach what lies
//! behind the first check. Where the first byte is 255 the others are the input as it stands.
//!
//! Each execution has [`limits`]: a second of the processor, and allocations of 4 × the input + 16 MiB. A panic is a
//! fault even where it is caught.
//!
//! `README.md` has the commands.
#![deny(missing_docs)]

pub mod edit;
mod feed;
pub mod limits;
mod places;
mod targets;

pub use feed::Feed;
pub use targets::TARGETS;

/// Something that reads what strangers hand over.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name on the command line, and that of its corpus.
    pub name: &'static str,
    /// Makes what all executions share.
    ready: fn(),
    /// Makes an input.
    make: fn(&mut Feed<'_>) -> Input,
    /// Reads it, and uses whatever comes out.
    read: fn(&Input),
}

/// What is read.
#[derive(Debug, Clone, Default)]
struct Input {
    bytes: Vec<u8>,
    /// Which of several readers, or of the files around it.
    kind: usize,
    /// What is then asked of what was read.
    rest: Vec<u8>,
}

/// Runs a target and holds it to the limits.
///
/// # Panics
/// If it takes more than it may, which is a fault, as its own panics are.
pub fn run(target: &Target, bytes: &[u8]) {
    (target.ready)();
    let mut feed = Feed::new(bytes);
    let input = match feed.byte() {
        255 => {
            let kind = usize::from(feed.byte());
            let bytes = feed.take(usize::MAX).to_vec();
            Input {
                bytes,
                kind,
                ..Input::default()
            }
        }
        _ => (target.make)(&mut feed),
    };
    let length = input.bytes.len() + input.rest.len();
    let ((), cost) = limits::counted(|| (target.read)(&input));
    let most = limits::memory(length);
    assert!(
        cost.memory <= most,
        "{}: {} bytes allocated for an input of {length}, {most} allowed",
        target.name,
        cost.memory
    );
    assert!(
        cost.time <= limits::TIME,
        "{}: {:?} for an input of {length} bytes",
        target.name,
        cost.time
    );
}

/// The input that a target makes of these choices, to look at.
pub fn input(target: &Target, bytes: &[u8]) -> Vec<u8> {
    (target.ready)();
    let mut feed = Feed::new(bytes);
    match feed.byte() {
        255 => bytes.get(2..).unwrap_or(&[]).to_vec(),
        _ => (target.make)(&mut feed).bytes,
    }
}
