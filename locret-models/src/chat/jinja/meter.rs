//! What a rendering may use up.

use super::{Fault, Outcome, fault};
use std::cell::Cell;

/// Steps of one rendering: a part of an expression, an element, or some bytes that are looked at. Enough
/// for thousands of messages, and used up in a fraction of a second.
const STEPS: u64 = 2_000_000;
/// The same for each byte of the messages.
const STEPS_PER_BYTE: u64 = 4;
/// Bytes of text that are looked at in one step.
const LOOK: usize = 16;
/// Bytes of text, lists and dicts that one rendering may make, given back or not.
const BYTES: u64 = 6 << 20;
/// The same for each byte of the messages: templates copy them more than once.
const BYTES_PER_BYTE: u64 = 24;
/// What one element of a list takes, and an entry of a dict twice.
const ELEMENT: usize = 48;
/// How deep blocks, expressions and calls may be nested while they run.
const DEPTH: u32 = 250;

/// Counts work and memory, so that no template takes much of either, whatever it calls.
///
/// Every function that looks at or makes text or elements says how much of it *before* it does, so that
/// the limits hold for single operations, too.
#[derive(Debug)]
pub(super) struct Meter {
    steps: Cell<u64>,
    bytes: Cell<u64>,
    depth: Cell<u32>,
}

impl Meter {
    /// For messages of `input` bytes.
    pub(super) fn new(input: usize) -> Self {
        let input = input as u64;
        Self {
            steps: Cell::new(STEPS.saturating_add(input.saturating_mul(STEPS_PER_BYTE))),
            bytes: Cell::new(BYTES.saturating_add(input.saturating_mul(BYTES_PER_BYTE))),
            depth: Cell::new(0),
        }
    }

    pub(super) fn steps(&self, n: usize) -> Outcome<()> {
        match self.steps.get().checked_sub(n as u64) {
            Some(left) => {
                self.steps.set(left);
                Ok(())
            }
            None => {
                self.steps.set(0);
                Err(fault("the template takes too many steps"))
            }
        }
    }

    /// Looks at `bytes` of text.
    pub(super) fn reads(&self, bytes: usize) -> Outcome<()> {
        self.steps(1 + bytes / LOOK)
    }

    /// Makes `bytes` of text.
    pub(super) fn makes(&self, bytes: usize) -> Outcome<()> {
        self.reads(bytes)?;
        match self.bytes.get().checked_sub(bytes as u64) {
            Some(left) => {
                self.bytes.set(left);
                Ok(())
            }
            None => {
                self.bytes.set(0);
                Err(fault("the template takes too much memory"))
            }
        }
    }

    /// Makes a container of `n` elements.
    pub(super) fn elements(&self, n: usize) -> Outcome<()> {
        self.steps(n)?;
        self.makes(n.saturating_mul(ELEMENT))
    }

    /// Goes one level deeper; [`leave`](Self::leave) comes back.
    pub(super) fn enter(&self) -> Outcome<()> {
        self.steps(1)?;
        if self.depth.get() >= DEPTH {
            return Err(Fault::new(
                "the template is nested too deep, or calls itself without end",
            ));
        }
        self.depth.set(self.depth.get() + 1);
        Ok(())
    }

    pub(super) fn leave(&self) {
        self.depth.set(self.depth.get().saturating_sub(1));
    }
}
