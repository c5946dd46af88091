//! Choosing the next token.

use crate::{Error, Result};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// How the next token is chosen from the logits.
///
/// Applied in this order: repetition penalty, temperature, top-k, top-p, min-p.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sampling {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f32,
    /// Only the `k` most likely tokens; 0 for all.
    pub top_k: usize,
    /// Only the most likely tokens whose probabilities add up to this; 1 for all.
    pub top_p: f32,
    /// Only tokens at least this times as likely as the most likely one; 0 for all.
    pub min_p: f32,
    /// Positive logits of tokens that have occurred are divided by this, negative ones multiplied;
    /// 1 changes nothing (arXiv 1909.05858).
    pub repetition_penalty: f32,
    /// Seed of the random numbers.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self::greedy()
    }
}

impl Sampling {
    /// Always the most likely token; of equals the one with the smaller id.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }

    /// A sampler with these settings.
    ///
    /// # Errors
    /// [`Error::Setting`] for values outside their range.
    pub fn init(self) -> Result<Sampler> {
        let within = |what, x: f32, low: f32, high: f32| {
            if x >= low && x <= high {
                Ok(())
            } else {
                Err(Error::setting(what, format!("{low} to {high}"), x))
            }
        };
        within("temperature", self.temperature, 0.0, 100.0)?;
        within("top_p", self.top_p, f32::MIN_POSITIVE, 1.0)?;
        within("min_p", self.min_p, 0.0, 1.0)?;
        within("repetition_penalty", self.repetition_penalty, 0.01, 100.0)?;
        Ok(Sampler {
            settings: self,
            numbers: ChaCha8Rng::seed_from_u64(self.seed),
        })
    }
}

/// A seeded sampler.
///
/// It has no state: the number that is drawn for a token is that of the seed and of how many tokens came
/// before. A text that is stopped and taken up again, by whom and wherever, goes on with the same draws,
/// and a further turn does not repeat those of the first.
#[derive(Debug, Clone)]
pub struct Sampler {
    settings: Sampling,
    /// At the beginning of the seed's stream.
    numbers: ChaCha8Rng,
}

/// The index of the largest value; of equals the first. `None` if there is a NaN, or no value.
pub fn argmax(values: &[f32]) -> Option<usize> {
    let mut best: Option<(usize, f32)> = None;
    for (i, v) in values.iter().enumerate() {
        if v.is_nan() {
            return None;
        }
        if best.is_none_or(|(_, b)| *v > b) {
            best = Some((i, *v));
        }
    }
    best.map(|(i, _)| i)
}

impl Sampler {
    /// Whether it is always the most likely token, whatever came before.
    pub(super) fn takes_the_most_likely(&self) -> bool {
        self.settings.temperature == 0.0 && self.settings.repetition_penalty == 1.0
    }

    /// What is said of logits of which none is the largest.
    pub(super) fn not_finite() -> Error {
        Error::NotFinite {
            what: "a logit",
            at: "the last token".into(),
        }
    }

    /// The next token, given the logits of all tokens and the ids that have occurred so far.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if a logit is NaN, or none is finite.
    pub fn sample(&self, logits: &[f32], history: &[u32]) -> Result<u32> {
        let s = self.settings;
        let mut logits = logits.to_vec();
        if s.repetition_penalty != 1.0 {
            let mut seen = vec![false; logits.len()];
            for id in history {
                let id = *id as usize;
                if id < seen.len() && !std::mem::replace(&mut seen[id], true) {
                    let x = &mut logits[id];
                    *x = if *x > 0.0 {
                        *x / s.repetition_penalty
                    } else {
                        *x * s.repetition_penalty
                    };
                }
            }
        }
        let best = argmax(&logits).ok_or_else(Self::not_finite)?;
        if !logits[best].is_finite() {
            return Err(Self::not_finite());
        }
        if s.temperature == 0.0 {
            return Ok(best as u32);
        }
        let max = logits[best];
        let mut candidates: Vec<(u32, f32)> = logits
            .iter()
            .enumerate()
            .map(|(id, x)| (id as u32, ((x - max) / s.temperature).exp()))
            .collect();
        // Descending; equals by id, so that a seed gives the same text everywhere.
        let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if s.top_k > 0 && s.top_k < candidates.len() {
            candidates.select_nth_unstable_by(s.top_k - 1, order);
            candidates.truncate(s.top_k);
        }
        candidates.sort_unstable_by(order);
        if s.top_p < 1.0 {
            let all: f32 = candidates.iter().map(|c| c.1).sum();
            let mut sum = 0.0;
            let enough = candidates.iter().position(|c| {
                sum += c.1;
                sum >= s.top_p * all
            });
            candidates.truncate(enough.map_or(candidates.len(), |i| i + 1));
        }
        if s.min_p > 0.0 {
            // The most likely candidate has weight 1.
            candidates.retain(|c| c.1 >= s.min_p);
        }
        let all: f32 = candidates.iter().map(|c| c.1).sum();
        let mut left = self.uniform(history.len()) * all;
        for (id, weight) in &candidates {
            left -= weight;
            if left < 0.0 {
                return Ok(*id);
            }
        }
        Ok(candidates.last().map_or(best as u32, |c| c.0))
    }

    /// The seed's number for the token after so many.
    fn uniform(&self, tokens: usize) -> f32 {
        let mut numbers = self.numbers.clone();
        // A number takes one word.
        numbers.set_word_pos(tokens as u128);
        numbers.random()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_takes_the_first_of_equals() {
        let s = Sampling::greedy().init().unwrap();
        assert_eq!(s.sample(&[0.0, 2.0, 2.0, 1.0], &[]).unwrap(), 1);
    }

    #[test]
    fn a_penalty_can_change_the_choice() {
        let settings = Sampling {
            repetition_penalty: 2.0,
            ..Sampling::greedy()
        };
        let s = settings.init().unwrap();
        assert_eq!(s.sample(&[1.5, 2.0], &[1]).unwrap(), 0);
        assert_eq!(s.sample(&[1.5, 2.0], &[]).unwrap(), 1);
        // Twice in the history counts once.
        assert_eq!(s.sample(&[0.9, 2.0], &[1, 1, 1]).unwrap(), 1);
    }

    #[test]
    fn frequencies_follow_the_softmax_and_the_cuts() {
        let logits = [0.0f32, 1.0, 2.0, 3.0];
        let history = vec![0; 20_000];
        let count = |settings: Sampling| {
            let s = settings.init().unwrap();
            let mut n = [0usize; 4];
            for tokens in 0..history.len() {
                n[s.sample(&logits, &history[..tokens]).unwrap() as usize] += 1;
            }
            n
        };
        let plain = Sampling {
            temperature: 1.0,
            seed: 7,
            ..Sampling::greedy()
        };
        let n = count(plain);
        let all: f32 = logits.iter().map(|x| x.exp()).sum();
        for (i, x) in logits.iter().enumerate() {
            let expected = x.exp() / all;
            let found = n[i] as f32 / 20_000.0;
            assert!((found - expected).abs() < 0.015, "{i}: {found} {expected}");
        }
        assert_eq!(count(plain), n, "a seed gives the same draws");
        let n = count(Sampling { top_k: 2, ..plain });
        assert!(n[0] == 0 && n[1] == 0 && n[2] > 0);
        // p(3) = .64, p(2) = .24: .8 needs both.
        let n = count(Sampling {
            top_p: 0.8,
            ..plain
        });
        assert!(n[0] == 0 && n[1] == 0 && n[2] > 0);
        // p(2) / p(3) = .37, p(1) / p(3) = .14.
        let n = count(Sampling {
            min_p: 0.2,
            ..plain
        });
        assert!(n[0] == 0 && n[1] == 0 && n[2] > 0);
    }

    #[test]
    fn a_draw_depends_on_the_seed_and_on_how_many_tokens_came_before() {
        let logits: Vec<f32> = (0..50).map(|i| (i % 7) as f32 / 4.0).collect();
        let text = |seed: u64, samplers: usize| -> Vec<u32> {
            let settings = Sampling {
                temperature: 1.0,
                seed,
                ..Sampling::greedy()
            };
            let all: Vec<_> = (0..samplers).map(|_| settings.init().unwrap()).collect();
            let mut history = vec![3; 100];
            for _ in 0..200 {
                let sampler = &all[history.len() % samplers];
                let id = sampler.sample(&logits, &history).unwrap();
                // Asked once more, it says the same.
                assert_eq!(sampler.sample(&logits, &history).unwrap(), id);
                history.push(id);
            }
            history.split_off(100)
        };
        let one = text(5, 1);
        assert_eq!(text(5, 3), one);
        let same = |other: &[u32]| one.iter().zip(other).filter(|(a, b)| a == b).count();
        assert!(same(&text(6, 1)) < 40);
        // Nor is a later part an earlier one.
        assert!((1..150).all(|by| same(&one[by..]) < 40));
    }

    #[test]
    fn impossible_settings_and_logits_are_errors() {
        for bad in [
            Sampling {
                temperature: -1.0,
                ..Sampling::greedy()
            },
            Sampling {
                temperature: f32::NAN,
                ..Sampling::greedy()
            },
            Sampling {
                top_p: 0.0,
                ..Sampling::greedy()
            },
            Sampling {
                min_p: 1.5,
                ..Sampling::greedy()
            },
            Sampling {
                repetition_penalty: 0.0,
                ..Sampling::greedy()
            },
        ] {
            assert!(matches!(bad.init(), Err(Error::Setting { .. })), "{bad:?}");
        }
        let s = Sampling::greedy().init().unwrap();
        for logits in [&[1.0, f32::NAN][..], &[f32::NEG_INFINITY; 2], &[]] {
            assert!(matches!(
                s.sample(logits, &[]),
                Err(Error::NotFinite { .. })
            ));
        }
    }
}
