//! Watching passes.

use crate::{LayerUnits, Needs, Phase, Result, SequenceCache, Step, Verdict};
use std::time::Duration;

/// Watches what becomes of one sequence, pass by pass: what policies are shown and decide, how long
/// that takes, and how the cache stands after each chunk. It changes nothing.
///
/// ```
/// use locret_core::*;
///
/// /// Counts the units that are dropped.
/// #[derive(Default)]
/// struct Dropped(usize);
///
/// impl Probe for Dropped {
///     fn decided(&mut self, at: &Decided<'_>) -> Result<()> {
///         if let Keep::Slots(kept) = &at.verdict.keep {
///             let heads = kept.heads().iter().enumerate();
///             self.0 += heads.map(|(head, kept)| at.units.len(head) - kept.len()).sum::<usize>();
///         }
///         Ok(())
///     }
/// }
/// ```
pub trait Probe: Send {
    /// What the engine has to compute for this probe beside what the policy needs. Observed attention
    /// can only be the policy's own, where that asks for it, and only a policy can ask for
    /// [`surprisal`](Needs::surprisal) or verdicts on [all layers](Needs::all_layers) at once.
    fn needs(&self) -> Needs {
        Needs::NOTHING
    }

    /// Whether [`decided`](Self::decided) is to be called. If not, units may be chosen on a device without a verdict that
    /// anybody could look at ([`KvCachePolicy::ranking`](crate::KvCachePolicy::ranking)).
    fn decides(&self) -> bool {
        true
    }

    /// Called with every verdict, before it is carried out.
    ///
    /// # Errors
    /// Any; the sequence is then unusable.
    fn decided(&mut self, _at: &Decided<'_>) -> Result<()> {
        Ok(())
    }

    /// Called after every chunk of a prompt.
    ///
    /// # Errors
    /// Any; the reading stops between two chunks.
    fn chunk(&mut self, _done: &ChunkDone<'_>) -> Result<()> {
        Ok(())
    }
}

/// One verdict of a policy, and what it was based on.
#[derive(Debug)]
#[non_exhaustive]
pub struct Decided<'a> {
    /// Where it was asked for.
    pub step: &'a Step,
    /// What the policy was shown, and what the probe needs.
    pub units: &'a LayerUnits<'a>,
    /// What it says.
    pub verdict: &'a Verdict,
    /// How long it took; an equal share where all layers are decided at once.
    pub took: Duration,
}

/// What happened to the cache when a chunk had been read.
#[derive(Debug)]
#[non_exhaustive]
pub struct ChunkDone<'a> {
    /// Which chunk of this prompt, from 0; the tail counts as chunks of its own.
    pub index: usize,
    /// Tokens of this prompt that have been read.
    pub done: usize,
    /// Tokens of this prompt.
    pub tokens: usize,
    /// Which kind of step it was.
    pub phase: Phase,
    /// The cache after eviction.
    pub cache: &'a SequenceCache,
}

/// Called after every chunk; returning an error stops the work.
pub type OnChunk<'a> = &'a mut (dyn FnMut(&ChunkDone<'_>) -> Result<()> + Send);

/// [`OnChunk`] as a probe.
pub(super) struct EachChunk<'a>(pub(super) OnChunk<'a>);

impl Probe for EachChunk<'_> {
    fn decides(&self) -> bool {
        false
    }

    fn chunk(&mut self, done: &ChunkDone<'_>) -> Result<()> {
        (self.0)(done)
    }
}

/// The score that every unit is born with, for traces. This memory grows with the text.
#[derive(Debug, Clone, Default)]
pub struct Births(Vec<Vec<Vec<f32>>>);

impl Births {
    /// `[layer][KV head][token]`, of the tokens that were watched; nothing of policies that carry no
    /// scores, or several numbers for each unit.
    pub fn scores(&self) -> &[Vec<Vec<f32>>] {
        &self.0
    }
}

impl Probe for Births {
    fn decided(&mut self, at: &Decided<'_>) -> Result<()> {
        let (layer, new) = (at.step.layer, at.step.incoming);
        self.0
            .resize(layer.layers, vec![Vec::new(); layer.kv_heads]);
        // Several numbers for each unit are no score.
        if let Some(scores) = at.verdict.scores.as_ref().filter(|s| s.width() == 1) {
            for (born, scores) in self.0[layer.index].iter_mut().zip(scores.heads()) {
                born.extend_from_slice(&scores[scores.len().saturating_sub(new)..]);
            }
        }
        Ok(())
    }
}
