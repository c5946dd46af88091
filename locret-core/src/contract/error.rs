//! The one error type of this crate.

/// What can go wrong between a caller, a policy, a model adapter and the cache.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor or list has another shape than the contract asks for.
    #[error("{what}: expected shape {expected}, found {found}")]
    Shape {
        /// Which tensor or list.
        what: &'static str,
        /// The shape that was expected.
        expected: String,
        /// The shape that was found.
        found: String,
    },
    /// A setting is outside what is meaningful.
    #[error("invalid {what}: expected {expected}, found {found}")]
    Setting {
        /// Which setting.
        what: &'static str,
        /// What would be valid.
        expected: String,
        /// What was given.
        found: String,
    },
    /// The prompt (or the next turn) has no tokens.
    #[error("the prompt is empty: at least one token is needed")]
    EmptyPrompt,
    /// A token id that the model does not have.
    #[error("token id {id} at index {index} is outside the vocabulary of {vocab} tokens")]
    UnknownToken {
        /// The id.
        id: u32,
        /// Where in the input it stands.
        index: usize,
        /// The number of tokens that the model knows.
        vocab: usize,
    },
    /// The adapter attended layers out of order, twice, or not at all.
    #[error("layer {found} was attended where layer {expected} is due (of {layers})")]
    LayerOrder {
        /// The layer that is due.
        expected: usize,
        /// The layer that came.
        found: usize,
        /// The number of layers.
        layers: usize,
    },
    /// The adapter came back before it had attended all layers.
    #[error("{attended} of {layers} layers were attended")]
    LayersMissing {
        /// The layers that were.
        attended: usize,
        /// The number of layers.
        layers: usize,
    },
    /// A number that has to be finite is not.
    #[error("{what} is not finite at {at}")]
    NotFinite {
        /// Which value.
        what: &'static str,
        /// Where it stands.
        at: String,
    },
    /// A policy returned a verdict that breaks its contract, or cannot decide.
    #[error("policy {policy}: {message}")]
    Policy {
        /// The policy's name.
        policy: String,
        /// What is wrong.
        message: String,
    },
    /// An implementation does not offer an operation.
    #[error("{implementer} does not support {operation}")]
    NotSupported {
        /// The operation.
        operation: &'static str,
        /// Who was asked.
        implementer: String,
    },
    /// The device failed while it computed or handed back data.
    #[error("the device failed: {0}")]
    Device(String),
    /// A pass was given up half-way, so that the layers no longer agree.
    #[error(
        "this cache was left in the middle of a pass, by an error or on purpose, and cannot be used"
    )]
    Unusable,
    /// A sequence takes more memory than there is for it.
    #[error("{what} takes {needed} bytes, and {left} are to be had")]
    Memory {
        /// What takes it.
        what: &'static str,
        /// Bytes that it takes.
        needed: usize,
        /// Bytes that there are for it.
        left: usize,
    },
    /// As many sequences wait as may.
    #[error("{limit} sequences are waiting, and no more may")]
    QueueFull {
        /// The most that may wait.
        limit: usize,
    },
    /// Nothing more is taken on.
    #[error("no further sequences are taken on")]
    Closed,
    /// A policy, a store or a probe panicked; only its own sequence is lost.
    #[error("a sequence panicked: {0}")]
    Panicked(String),
    /// A model adapter failed.
    #[error("the model failed: {0}")]
    Model(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Units cannot be put away, or do not come back.
    #[error("the second tier, {what}: {source}")]
    Tier {
        /// Which tier, and what was done.
        what: String,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// Something cannot be saved, or what was saved cannot be taken up.
    #[error("snapshot: {0}")]
    Snapshot(#[from] SnapshotError),
}

/// Why something cannot be saved, or what was saved cannot be taken up: [`Error::Snapshot`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// Reading or writing failed.
    #[error("{what}: {source}")]
    Io {
        /// Which file, or what was done.
        what: String,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// It cannot be saved.
    #[error("{0} cannot be saved")]
    NotSaved(String),
    /// It is something else than a snapshot, or one that was cut off before it says what it is.
    #[error("this is none: {0}")]
    Foreign(String),
    /// It is of another version of the format.
    #[error("version {found:?} of the format, version {known} is due")]
    Version {
        /// What it says.
        found: String,
        /// What is read here.
        known: u32,
    },
    /// It was cut off or altered, or contradicts itself.
    #[error("it is damaged: {0}")]
    Damaged(String),
    /// It was saved with another model.
    #[error("saved with another model: expected {expected}, found {found}")]
    OtherModel {
        /// The model that is to go on: its fingerprint and its shape.
        expected: String,
        /// The model that it was saved with.
        found: String,
    },
    /// It was saved with another policy, or with other settings of it.
    #[error("saved with another policy: expected {expected}, found {found}")]
    OtherPolicy {
        /// The fingerprint of the policy that is to go on.
        expected: String,
        /// That of the policy that it was saved with.
        found: String,
    },
    /// It has units in another form.
    #[error("saved in another store: expected {expected}, found {found}")]
    OtherStore {
        /// The store that is to have them.
        expected: String,
        /// The store that had them.
        found: String,
    },
    /// A name that a store of snapshots does not allow.
    #[error(
        "{0:?} is no name of one: 1 to 128 of the characters A-Z a-z 0-9 . _ - are, of which the first \
         is no point"
    )]
    Key(String),
}

impl SnapshotError {
    pub(crate) fn io(what: impl std::fmt::Display) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.to_string();
        move |source| Self::Io { what, source }
    }

    /// What reading says: that bytes are missing which were promised is a matter of the file.
    pub(crate) fn reading(source: std::io::Error) -> Self {
        match source.kind() {
            std::io::ErrorKind::UnexpectedEof => Self::Damaged("it ends too early".into()),
            _ => Self::io("reading")(source),
        }
    }
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// [`Error::Shape`] of what was found where something else was due.
    pub fn shape(
        what: &'static str,
        expected: impl std::fmt::Debug,
        found: impl std::fmt::Debug,
    ) -> Self {
        Self::Shape {
            what,
            expected: format!("{expected:?}"),
            found: format!("{found:?}"),
        }
    }

    /// An invalid setting: which one, what would be valid, what was given.
    pub fn setting(
        what: &'static str,
        expected: impl Into<String>,
        found: impl std::fmt::Display,
    ) -> Self {
        Self::Setting {
            what,
            expected: expected.into(),
            found: found.to_string(),
        }
    }

    /// What a panic said.
    pub(crate) fn panicked(panic: &(dyn std::any::Any + Send)) -> Self {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        Self::Panicked(text.unwrap_or_else(|| "without a word".into()))
    }

    /// What a policy reports of itself: its name, and why it cannot decide.
    pub fn policy(name: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Policy {
            policy: name.into(),
            message: message.into(),
        }
    }
}
