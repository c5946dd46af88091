//! The code in the documents, compiled and run as tests of this crate.

/// An item that has a document as its documentation, for each of them.
macro_rules! documents {
    ($($name:ident: $path:literal,)*) => {
        $(
            #[doc = include_str!(concat!("../../../", $path))]
            struct $name;
        )*
    };
}

documents! {
    Readme: "README.md",
    ReadmeOfCore: "locret-core/README.md",
    ReadmeOfPolicies: "locret-policies/README.md",
    ReadmeOfModels: "locret-models/README.md",
    GettingStarted: "docs/getting-started.md",
    ChoosingAPolicy: "docs/choosing-a-policy.md",
    WritingAPolicy: "docs/writing-a-policy.md",
    WritingAnAdapter: "docs/writing-an-adapter.md",
    ManySequences: "docs/many-sequences.md",
    Snapshots: "docs/snapshots.md",
    TrainingHeads: "docs/training-heads.md",
    FilesAndModels: "docs/files-and-models.md",
    Gpu: "docs/gpu.md",
}
