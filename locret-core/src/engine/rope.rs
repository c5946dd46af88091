//! Rotary position embedding: which frequencies, and tables of cosines and sines.
//!
//! Rotation lives in this crate, since *when* and *where* keys are rotated is a policy matter
//! ([`Positions`](crate::Positions)). All variants rotate halves (dimension `i` with
//! `i + rotary_dim / 2`), as the published safetensors of Llama and Phi-3 expect.

use crate::{Compute, Error, Result, RopeTable, Rotation, Rows, TableRows};
use serde::{Deserialize, Serialize};
use std::{ops::Range, sync::Arc};

/// Rotary position embedding of a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// How many features of a head are rotated; even, at most `head_dim`.
    pub rotary_dim: usize,
    /// How the frequencies are changed for contexts beyond the original one.
    #[serde(default)]
    pub scaling: RopeScaling,
}

/// Changes of the frequencies for longer contexts.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[non_exhaustive]
pub enum RopeScaling {
    /// The frequencies as they are.
    #[default]
    None,
    /// All frequencies divided by a factor (position interpolation, arXiv 2306.15595).
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original_max / low_freq_factor` are fully scaled.
        low_freq_factor: f64,
        /// Wavelengths below `original_max / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// The context of pre-training, in tokens.
        original_max: usize,
    },
    /// LongRoPE (arXiv 2402.13753): a factor per dimension, another set beyond the original
    /// context, and cosines and sines scaled by `attention_factor`.
    LongRope {
        /// Divisors up to `original_max` tokens; `rotary_dim / 2` of them.
        short: Vec<f64>,
        /// Divisors beyond; `rotary_dim / 2` of them.
        long: Vec<f64>,
        /// The context of pre-training, in tokens.
        original_max: usize,
        /// Factor on cosines and sines, both on queries and keys.
        attention_factor: f64,
        /// When the long factors are used.
        #[serde(default)]
        switch: LongRopeSwitch,
    },
}

/// When LongRoPE uses its long factors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LongRopeSwitch {
    /// As transformers does: long factors once the sequence is longer than the original context.
    /// The whole sequence then uses them. This is the default: it is what the model was published
    /// with, and short prompts are read as they were trained.
    #[default]
    ByLength,
    /// Always the long factors, as the published procedure of arXiv 2410.01805 does.
    AlwaysLong,
}

impl RopeConfig {
    /// Plain rotary embedding over all of a head.
    pub fn plain(theta: f64, head_dim: usize) -> Self {
        Self {
            theta,
            rotary_dim: head_dim,
            scaling: RopeScaling::None,
        }
    }

    /// Checks the settings against a head of `head_dim` features.
    ///
    /// # Errors
    /// [`Error::Setting`].
    pub fn validate(&self, head_dim: usize) -> Result<()> {
        if !(self.theta.is_finite() && self.theta > 0.0) {
            return Err(Error::setting(
                "rope theta",
                "a positive number",
                self.theta,
            ));
        }
        if self.rotary_dim == 0 || !self.rotary_dim.is_multiple_of(2) || self.rotary_dim > head_dim
        {
            return Err(Error::setting(
                "rotary_dim",
                format!("an even number from 2 to {head_dim}"),
                self.rotary_dim,
            ));
        }
        let positive = |what, x: f64| {
            if x.is_finite() && x > 0.0 {
                Ok(())
            } else {
                Err(Error::setting(what, "a positive number", x))
            }
        };
        match &self.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } => positive("rope factor", *factor),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max,
            } => {
                positive("rope factor", *factor)?;
                positive("low_freq_factor", *low_freq_factor)?;
                positive("high_freq_factor", *high_freq_factor)?;
                if high_freq_factor <= low_freq_factor {
                    return Err(Error::setting(
                        "high_freq_factor",
                        format!("more than low_freq_factor ({low_freq_factor})"),
                        high_freq_factor,
                    ));
                }
                positive("original_max_position_embeddings", *original_max as f64)
            }
            RopeScaling::LongRope {
                short,
                long,
                original_max,
                attention_factor,
                ..
            } => {
                for (what, factors) in [("short_factor", short), ("long_factor", long)] {
                    if factors.len() != self.rotary_dim / 2 {
                        return Err(Error::shape(what, [self.rotary_dim / 2], [factors.len()]));
                    }
                    for f in factors {
                        positive(what, *f)?;
                    }
                }
                positive("attention_factor", *attention_factor)?;
                positive("original_max_position_embeddings", *original_max as f64)
            }
        }
    }

    /// Whether a sequence of `length` tokens uses the long factors of LongRoPE.
    pub fn is_long(&self, length: usize) -> bool {
        match &self.scaling {
            RopeScaling::LongRope {
                original_max,
                switch,
                ..
            } => *switch == LongRopeSwitch::AlwaysLong || length > *original_max,
            _ => false,
        }
    }

    /// The inverse frequencies (`rotary_dim / 2` of them, radians per position) and the factor on
    /// cosines and sines.
    pub fn frequencies(&self, long_context: bool) -> (Vec<f32>, f32) {
        let half = self.rotary_dim / 2;
        // In f32 throughout, in the order of operations that published models were run with:
        // at positions of 100,000 the last bit of a frequency is visible in the angle.
        let power = |i: usize| {
            let exponent = (2 * i) as f32 / self.rotary_dim as f32;
            (self.theta as f32).powf(exponent)
        };
        let plain = || (0..half).map(|i| 1.0 / power(i)).collect::<Vec<f32>>();
        match &self.scaling {
            RopeScaling::None => (plain(), 1.0),
            RopeScaling::Linear { factor } => (
                plain().into_iter().map(|f| f / *factor as f32).collect(),
                1.0,
            ),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max,
            } => {
                let (factor, low, high) = (
                    *factor as f32,
                    *low_freq_factor as f32,
                    *high_freq_factor as f32,
                );
                let original = *original_max as f32;
                let scaled = plain().into_iter().map(|f| {
                    let wavelength = 2.0 * std::f32::consts::PI / f;
                    if wavelength > original / low {
                        f / factor
                    } else if wavelength < original / high {
                        f
                    } else {
                        let smooth = (original / wavelength - low) / (high - low);
                        (1.0 - smooth) * (f / factor) + smooth * f
                    }
                });
                (scaled.collect(), 1.0)
            }
            RopeScaling::LongRope {
                short,
                long,
                attention_factor,
                ..
            } => {
                let factors = if long_context { long } else { short };
                let scaled = (0..half).map(|i| 1.0 / (factors[i] as f32 * power(i)));
                (scaled.collect(), *attention_factor as f32)
            }
        }
    }
}

/// Cosines and sines for ranges of positions, computed when they are needed.
#[derive(Debug, Clone)]
pub(crate) struct Rope {
    config: RopeConfig,
    long_context: bool,
    inv_freq: Vec<f32>,
    factor: f32,
    /// Rows from position 0, for contiguous positions; grown by doubling.
    contiguous: Arc<RopeTable>,
}

impl Rope {
    pub(crate) fn new(config: &RopeConfig) -> Self {
        let long_context = config.is_long(0);
        let (inv_freq, factor) = config.frequencies(long_context);
        let contiguous = Arc::new(RopeTable::new(&inv_freq, factor, 0..0));
        Self {
            config: config.clone(),
            long_context,
            inv_freq,
            factor,
            contiguous,
        }
    }

    /// Whether a sequence of `length` tokens has other frequencies than now.
    pub(crate) fn changes(&self, length: usize) -> bool {
        self.config.is_long(length) != self.long_context
    }

    /// Whether it has the frequencies of a long context.
    pub(crate) fn is_long(&self) -> bool {
        self.long_context
    }

    /// Chooses the frequencies for a sequence of `length` tokens. True if they changed.
    pub(crate) fn set_length(&mut self, length: usize) -> bool {
        self.set_long(self.config.is_long(length))
    }

    /// Chooses the frequencies of a long context, or of a short one. True if they changed.
    pub(crate) fn set_long(&mut self, long_context: bool) -> bool {
        let changes = self.long_context != long_context;
        if changes {
            self.long_context = long_context;
            (self.inv_freq, self.factor) = self.config.frequencies(self.long_context);
            self.contiguous = Arc::new(RopeTable::new(&self.inv_freq, self.factor, 0..0));
        }
        changes
    }

    /// Gives back what can be made again.
    pub(crate) fn forget(&mut self) {
        self.contiguous = Arc::new(RopeTable::new(&self.inv_freq, self.factor, 0..0));
    }

    /// Queries, not rotated before, that meet keys which were not rotated, as if the two were `distance` apart.
    pub(crate) fn at_distance(
        &self,
        q: Rows,
        distance: usize,
        head_dim: usize,
        compute: &dyn Compute,
    ) -> Result<Rows> {
        let zeros = vec![0; q.rows()];
        let turn = |q: Rows, position: usize| -> Result<(Rows, f32)> {
            let table = self.range(position..position + 1);
            let by = Rotation {
                table: &table,
                head_dim,
                rows: TableRows::Each(&zeros),
                inverse: false,
            };
            Ok((compute.rotate(q, &by)?, table.factor()))
        };
        let (q, factor) = turn(q, distance)?;
        if factor == 1.0 {
            return Ok(q);
        }
        // LongRoPE's factor is on both sides, and the keys do not have it.
        turn(q, 0).map(|(q, _)| q)
    }

    /// A table whose row 0 is position `range.start`.
    pub(crate) fn range(&self, range: Range<usize>) -> RopeTable {
        RopeTable::new(&self.inv_freq, self.factor, range)
    }

    /// A table from position 0 that covers at least `len` positions.
    pub(crate) fn contiguous(&mut self, len: usize) -> Arc<RopeTable> {
        if self.contiguous.len() < len {
            let len = len.next_power_of_two();
            self.contiguous = Arc::new(RopeTable::new(&self.inv_freq, self.factor, 0..len));
        }
        self.contiguous.clone()
    }
}
