//! A vocabulary as GGUF files and SentencePiece's own have it: tokens, each of a kind.

use super::{Inner, MAX_TOKEN, WORD_START, guarded};
use crate::{ModelError, Result};
use std::{collections::HashSet, path::Path};
use tokenizers::{
    AddedToken,
    models::bpe::{BPE, Merges, Vocab},
    normalizers::{Prepend, Replace, Sequence as Normalizers},
};

/// Kinds of tokens.
pub(super) mod kind {
    pub(in crate::tokenizer) const NORMAL: i64 = 1;
    pub(in crate::tokenizer) const UNKNOWN: i64 = 2;
    pub(in crate::tokenizer) const CONTROL: i64 = 3;
    pub(in crate::tokenizer) const USER_DEFINED: i64 = 4;
}

/// Tokens, what kind each is of, and the ids of those with a part to play.
pub(super) struct Vocabulary<'a> {
    pub(super) path: &'a Path,
    pub(super) tokens: &'a [String],
    pub(super) kinds: Vec<i64>,
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    pub(super) unknown: Option<u32>,
}

impl Vocabulary<'_> {
    /// The names of the beginning, end and unknown token.
    pub(super) fn known(&self) -> HashSet<&str> {
        let known = [self.bos, self.eos, self.unknown].into_iter().flatten();
        known.map(|id| self.tokens[id as usize].as_str()).collect()
    }

    /// Control tokens, and those that the model's user has defined.
    pub(super) fn added(&self, phi3: bool) -> Vec<AddedToken> {
        let controls = self.tokens.iter().zip(&self.kinds);
        controls
            .filter_map(|(text, &kind)| {
                let special = matches!(kind, kind::CONTROL | kind::UNKNOWN);
                if !(special || kind == kind::USER_DEFINED) {
                    return None;
                }
                let keeps = matches!(text.as_str(), "<unk>" | "<s>" | "<|endoftext|>");
                Some(
                    AddedToken::from(text.as_str(), special)
                        .normalized(false)
                        .rstrip(phi3 && !keeps),
                )
            })
            .collect()
    }

    /// Ids by text; of equal texts the first.
    pub(super) fn ids(&self) -> Vocab {
        let mut ids = Vocab::default();
        for (id, text) in self.tokens.iter().enumerate() {
            ids.entry(text.clone()).or_insert(id as u32);
        }
        ids
    }

    /// SentencePiece BPE with byte fallback. The file has scores instead of merges: a pair may merge
    /// if the result is a token, better scores first.
    pub(super) fn sentence_piece(&self, scores: &[f32], prefix: bool) -> Result<Inner> {
        let ids = self.ids();
        let normal = |text: &str| {
            ids.get(text)
                .is_some_and(|&id| self.kinds[id as usize] == kind::NORMAL)
        };
        let mut merges: Vec<(f32, &str, &str)> = Vec::new();
        for (id, text) in self.tokens.iter().enumerate() {
            let first = ids.get(text) == Some(&(id as u32));
            if self.kinds[id] != kind::NORMAL || !first || text.len() > MAX_TOKEN {
                continue;
            }
            for (at, _) in text.char_indices().skip(1) {
                let (a, b) = text.split_at(at);
                if normal(a) && normal(b) {
                    merges.push((scores[id], a, b));
                }
            }
        }
        // Of the ways to make one token, the longer left part first.
        merges.sort_by(|x, y| {
            y.0.total_cmp(&x.0)
                .then_with(|| y.1.chars().count().cmp(&x.1.chars().count()))
        });
        let merges: Merges = merges
            .into_iter()
            .map(|(_, a, b)| (a.to_owned(), b.to_owned()))
            .collect();
        let mut model = BPE::builder()
            .vocab_and_merges(ids, merges)
            .fuse_unk(true)
            .byte_fallback(true);
        if let Some(unknown) = self.unknown {
            model = model.unk_token(self.tokens[unknown as usize].clone());
        }
        let model = guarded(self.path, || model.build())?;
        let mut inner = Inner::new(model);
        let spaces = Replace::new(" ", WORD_START);
        let spaces = spaces.map_err(|e| ModelError::tokenizer(self.path, e))?;
        let mut normalizers = Vec::new();
        if prefix {
            normalizers.push(Prepend::new(WORD_START.into()).into());
        }
        normalizers.push(spaces.into());
        inner
            .with_normalizer(Some(Normalizers::new(normalizers)))
            .map_err(|e| ModelError::tokenizer(self.path, e))?;
        Ok(inner)
    }
}
