//! What heads of the other forms than Locret's compute.

use super::{Gate, HeadForm, LayerHead};
use locret_core::{Error, Matrix, Perceptron, Result, Rows};
use std::sync::Arc;

/// A first product where the model is computed, and what follows it on the host: few numbers for each token.
#[derive(Debug)]
pub(super) struct Formed {
    /// `[d_R, inputs]`
    first: Arc<dyn Matrix>,
    first_bias: Vec<f32>,
    tail: Tail,
    outputs: usize,
}

/// What follows the first product.
#[derive(Debug)]
enum Tail {
    Nothing,
    /// An activation, a second product `[outputs, d_R]`, and its bias.
    Second {
        activation: fn(f32) -> f32,
        second: Vec<f32>,
        bias: Vec<f32>,
        last: fn(f32) -> f32,
    },
    Gate(Gate),
}

impl Formed {
    /// Of a head that fits its form; `first` is its `fc1`.
    pub(super) fn new(
        form: HeadForm,
        head: &LayerHead,
        first: Arc<dyn Matrix>,
        outputs: usize,
    ) -> Self {
        let second = |activation, last| Tail::Second {
            activation,
            second: head.fc2.clone(),
            bias: head.fc2_bias.clone(),
            last,
        };
        Self {
            first,
            first_bias: head.fc1_bias.clone(),
            tail: match (form, &head.gate) {
                (HeadForm::Gate, Some(gate)) => Tail::Gate(gate.clone()),
                (HeadForm::Mlp, _) => second(gelu, |x| x),
                (HeadForm::Decay, _) => second(silu, log_sigmoid),
                _ => Tail::Nothing,
            },
            outputs,
        }
    }
}

impl Perceptron for Formed {
    fn shape(&self) -> [usize; 3] {
        let [inner, inputs] = self.first.shape();
        [inputs, inner, self.outputs]
    }

    fn apply(&self, parts: &[&Rows]) -> Result<Rows> {
        let [x] = parts else {
            return Err(Error::Shape {
                what: "what a head reads",
                expected: "the layer's input alone".into(),
                found: format!("{} parts", parts.len()),
            });
        };
        let mut inner = self.first.apply(x)?.into_values()?;
        let width = self.first_bias.len();
        let mut out = Vec::with_capacity(x.rows() * self.outputs);
        for row in inner.chunks_exact_mut(width) {
            row.iter_mut()
                .zip(&self.first_bias)
                .for_each(|(x, b)| *x += b);
            match &self.tail {
                Tail::Nothing => out.extend_from_slice(row),
                Tail::Second {
                    activation,
                    second,
                    bias,
                    last,
                } => {
                    row.iter_mut().for_each(|x| *x = activation(*x));
                    let sums = second.chunks_exact(width).zip(bias);
                    out.extend(sums.map(|(w, b)| last(dot(w, row) + b)));
                }
                Tail::Gate(gate) => gate.apply(row, self.outputs, &mut out),
            }
        }
        Rows::new(out, self.outputs, &x.device())
    }
}

impl Gate {
    /// Scores of a token's queries and keys, which are normalised in place.
    fn apply(&self, row: &mut [f32], kv_heads: usize, out: &mut Vec<f32>) {
        let features = self.query_norm.len();
        let group = self.offset.len() / kv_heads;
        let scale = 1.0 / (features as f32).sqrt();
        let (queries, keys) = row.split_at_mut(kv_heads * group * features);
        queries
            .chunks_exact_mut(features)
            .for_each(|q| normalise(q, &self.query_norm));
        keys.chunks_exact_mut(features)
            .for_each(|k| normalise(k, &self.key_norm));
        let bases = self.base.chunks_exact(self.base.len() / kv_heads);
        let heads = keys.chunks_exact(features).zip(bases).enumerate();
        out.extend(heads.map(|(head, (key, base))| {
            let one = |h: usize| {
                let query = &queries[(head * group + h) * features..][..features];
                let z = scale * dot(key, query) + self.offset[head * group + h];
                let others = base.chunks_exact(features);
                let sum: f32 = others.map(|b| (scale * dot(b, query) - z).exp()).sum();
                1.0 / (1.0 + sum)
            };
            (0..group).map(one).sum::<f32>() / group as f32
        }));
    }
}

/// RMS norm (arXiv 1910.07467), as the gates were trained with it.
fn normalise(x: &mut [f32], gain: &[f32]) {
    let mean = dot(x, x) / x.len() as f32;
    let factor = 1.0 / (mean + 1e-6).sqrt();
    x.iter_mut().zip(gain).for_each(|(x, g)| *x *= factor * g);
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

/// `x · Φ(x)` (arXiv 1606.08415).
fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + libm::erff(x * std::f32::consts::FRAC_1_SQRT_2))
}

fn log_sigmoid(x: f32) -> f32 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn activations_are_right_far_out_too() {
        for (x, due) in [
            (0.0, 0.0),
            (1.0, 0.841_344_7),
            (-1.0, -0.158_655_25),
            (40.0, 40.0),
        ] {
            assert!((gelu(x) - due).abs() < 1e-6, "{x}: {}", gelu(x));
        }
        for (x, due) in [
            (0.0, -std::f32::consts::LN_2),
            (-200.0, -200.0),
            (20.0, -2.061_153_6e-9),
        ] {
            let found = log_sigmoid(x);
            assert!((found - due).abs() <= 1e-6 * due.abs(), "{x}: {found}");
        }
        assert!((silu(1.0) - 0.731_058_6).abs() < 1e-6);
        assert_eq!(silu(-500.0), 0.0);
    }
}
