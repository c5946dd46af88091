//! The code in the documents, compiled and run as tests of this crate.

#[doc = include_str!("../../../README.md")]
struct Readme;

#[doc = include_str!("../../../docs/writing-a-policy.md")]
struct WritingAPolicy;

#[doc = include_str!("../../../docs/writing-an-adapter.md")]
struct WritingAnAdapter;
