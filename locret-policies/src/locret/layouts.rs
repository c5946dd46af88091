//! How heads are published: names and shapes of their tensors.

use super::{Gate, HeadForm, LayerHead, container::Named};
use crate::error::{PolicyError, Result};
use locret_core::ModelSpec;
use std::collections::BTreeMap;

/// One of a head's tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    Fc1,
    Fc1Bias,
    Fc2,
    Fc2Bias,
    Query,
    QueryBias,
    Key,
    QueryNorm,
    KeyNorm,
    Base,
    Offset,
}

/// The tensors of a form.
pub(super) fn parts(form: HeadForm) -> &'static [Part] {
    use Part::{
        Base, Fc1, Fc1Bias, Fc2, Fc2Bias, Key, KeyNorm, Offset, Query, QueryBias, QueryNorm,
    };
    match form {
        HeadForm::Locret => &[Fc1, Fc2],
        HeadForm::Linear => &[Fc1, Fc1Bias],
        HeadForm::Mlp | HeadForm::Decay => &[Fc1, Fc1Bias, Fc2, Fc2Bias],
        HeadForm::Gate => &[Query, QueryBias, Key, QueryNorm, KeyNorm, Base, Offset],
    }
}

const FORMS: [HeadForm; 5] = [
    HeadForm::Locret,
    HeadForm::Linear,
    HeadForm::Mlp,
    HeadForm::Decay,
    HeadForm::Gate,
];

/// What stands before a layer's number and between it and a part.
fn affixes(form: HeadForm) -> [&'static str; 2] {
    match form {
        HeadForm::Locret => ["model.layers.", ".self_attn."],
        HeadForm::Linear | HeadForm::Mlp => ["layers.", "."],
        HeadForm::Decay => ["model.layers.", ".self_attn.retention_gate."],
        HeadForm::Gate => ["module.", "."],
    }
}

fn suffix(form: HeadForm, part: Part) -> &'static str {
    match (form, part) {
        (HeadForm::Locret, Part::Fc1) => "fc1.weight",
        (HeadForm::Locret, _) => "fc2.weight",
        (HeadForm::Linear, Part::Fc1) => "weight",
        (HeadForm::Linear, _) => "bias",
        (HeadForm::Mlp, Part::Fc1) => "0.weight",
        (HeadForm::Mlp, Part::Fc1Bias) => "0.bias",
        (HeadForm::Mlp, Part::Fc2) => "2.weight",
        (HeadForm::Mlp, _) => "2.bias",
        (HeadForm::Decay, Part::Fc1) => "linear1.weight",
        (HeadForm::Decay, Part::Fc1Bias) => "linear1.bias",
        (HeadForm::Decay, Part::Fc2) => "linear2.weight",
        (HeadForm::Decay, _) => "bias",
        (HeadForm::Gate, Part::Query) => "q_proj.weight",
        (HeadForm::Gate, Part::QueryBias) => "q_proj.bias",
        (HeadForm::Gate, Part::Key) => "k_proj.weight",
        (HeadForm::Gate, Part::QueryNorm) => "q_norm.weight",
        (HeadForm::Gate, Part::KeyNorm) => "k_norm.weight",
        (HeadForm::Gate, Part::Base) => "k_base",
        (HeadForm::Gate, _) => "b",
    }
}

/// What a tensor is called.
pub(super) fn name(form: HeadForm, layer: usize, part: Part) -> String {
    let [before, between] = affixes(form);
    format!("{before}{layer}{between}{}", suffix(form, part))
}

/// The form, the layer and the part of a tensor of a model with `layers` layers.
pub(super) fn place(name: &str, layers: usize) -> Option<(HeadForm, usize, Part)> {
    FORMS.into_iter().find_map(|form| {
        let [before, between] = affixes(form);
        let (layer, rest) = name.strip_prefix(before)?.split_once('.')?;
        let rest = rest.strip_prefix(&between[1..])?;
        let mut all = parts(form).iter();
        let part = all.find(|part| suffix(form, **part) == rest)?;
        // Only the plain form of the number: `model.layers.07` is another name.
        let index: usize = layer.parse().ok()?;
        (index < layers && layer == index.to_string()).then_some((form, index, *part))
    })
}

/// Whether a tensor of a whole checkpoint is meant to belong to a retaining head.
pub(super) fn is_of_a_head(name: &str) -> bool {
    [".self_attn.fc", ".retention_gate."]
        .iter()
        .any(|part| name.contains(part))
}

/// An extent of a tensor.
#[derive(Clone, Copy)]
enum Extent {
    Is(usize),
    /// Any number from 1 on, the same in all tensors of a layer that have it; so many times that.
    Times(usize, Free),
}

/// What a file of heads is free to choose.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Free {
    /// Intermediate features.
    Inner,
    /// Features of a gate's heads.
    Features,
    /// A gate's sinks.
    Sinks,
}

impl Free {
    fn name(self) -> &'static str {
        match self {
            Self::Inner => "d_R",
            Self::Features => "f",
            Self::Sinks => "S",
        }
    }
}

fn extents(form: HeadForm, part: Part, model: &ModelSpec) -> Vec<Extent> {
    use Extent::{Is, Times};
    use Free::{Features, Inner, Sinks};
    let (heads, group) = (model.kv_heads, model.heads / model.kv_heads);
    let inputs = form.reads().features(model);
    let outer = match form {
        HeadForm::Linear => Is(heads),
        _ => Times(1, Inner),
    };
    match part {
        Part::Fc1 => vec![outer, Is(inputs)],
        Part::Fc1Bias => vec![outer],
        Part::Fc2 => vec![Is(heads), Times(1, Inner)],
        Part::Fc2Bias => vec![Is(heads)],
        Part::Query => vec![Times(model.heads, Features), Is(inputs)],
        Part::QueryBias => vec![Times(model.heads, Features)],
        Part::Key => vec![Times(heads, Features), Is(inputs)],
        Part::QueryNorm | Part::KeyNorm => vec![Times(1, Features)],
        Part::Base => vec![Is(heads), Is(1), Times(1, Sinks), Times(1, Features)],
        Part::Offset => vec![Is(heads), Is(1), Is(group)],
    }
}

/// What the tensors of a layer that were read so far chose.
#[derive(Default)]
pub(super) struct Sizes(BTreeMap<Free, usize>);

impl Sizes {
    /// Checks a tensor's shape, before any of it is read.
    pub(super) fn fit(
        &mut self,
        form: HeadForm,
        part: Part,
        name: &str,
        shape: &[usize],
        model: &ModelSpec,
    ) -> Result<()> {
        let due = extents(form, part, model);
        let mut fits = due.len() == shape.len();
        for (due, found) in due.iter().zip(shape) {
            fits &= match due {
                Extent::Is(n) => n == found,
                Extent::Times(factor, free) => {
                    let own = found / factor;
                    let known = *self.0.entry(*free).or_insert(own);
                    own > 0 && found % factor == 0 && own == known
                }
            };
        }
        if fits {
            return Ok(());
        }
        let known = |free: &Free| self.0.get(free).copied().filter(|n| *n > 0);
        let text = due.iter().map(|extent| match extent {
            Extent::Is(n) => n.to_string(),
            Extent::Times(factor, free) => match (known(free), factor) {
                (Some(n), _) => format!("{} = {factor} {}", factor * n, free.name()),
                (None, 1) => free.name().to_owned(),
                (None, _) => format!("{factor} {}", free.name()),
            },
        });
        Err(PolicyError::Shape {
            key: name.to_owned(),
            expected: format!("[{}]", text.collect::<Vec<_>>().join(", ")),
            found: shape.to_vec(),
        })
    }
}

/// A head of parts that fit.
pub(super) fn assemble(
    form: HeadForm,
    mut parts: BTreeMap<Part, Vec<f32>>,
    model: &ModelSpec,
) -> LayerHead {
    let inputs = form.reads().features(model).max(1);
    let mut take = |part| parts.remove(&part).unwrap_or_default();
    if form == HeadForm::Gate {
        let (mut fc1, mut fc1_bias) = (take(Part::Query), take(Part::QueryBias));
        fc1.extend(take(Part::Key));
        let d_r = fc1.len() / inputs;
        fc1_bias.resize(d_r, 0.0);
        return LayerHead {
            d_r,
            fc1,
            fc1_bias,
            gate: Some(Gate {
                query_norm: take(Part::QueryNorm),
                key_norm: take(Part::KeyNorm),
                base: take(Part::Base),
                offset: take(Part::Offset),
            }),
            ..LayerHead::default()
        };
    }
    let fc1 = take(Part::Fc1);
    LayerHead {
        d_r: fc1.len() / inputs,
        fc1,
        fc1_bias: take(Part::Fc1Bias),
        fc2: take(Part::Fc2),
        fc2_bias: take(Part::Fc2Bias),
        gate: None,
    }
}

/// Checks the lengths of a head against a model.
pub(super) fn check(
    form: HeadForm,
    layer: usize,
    head: &LayerHead,
    model: &ModelSpec,
) -> Result<()> {
    let tensors = tensors(form, layer, head)?;
    let mut sizes = Sizes::default();
    for (part, tensor) in parts(form).iter().zip(tensors) {
        sizes.fit(form, *part, &tensor.name, &tensor.shape, model)?;
    }
    Ok(())
}

/// A head's tensors as they stand in a file; what cannot be of one is an error.
pub(super) fn tensors(form: HeadForm, layer: usize, head: &LayerHead) -> Result<Vec<Named>> {
    let wrong = |part: Part, expected: String, found: usize| PolicyError::Shape {
        key: name(form, layer, part),
        expected,
        found: vec![found],
    };
    let none = || Gate::default();
    let gate = head.gate.clone().unwrap_or_else(none);
    let (kv_heads, features) = match form {
        HeadForm::Gate => {
            let features = gate.query_norm.len().max(1);
            let group = gate.offset.len();
            // `d_r` are the group's queries and one key for each KV head.
            let keys = (head.d_r / features).saturating_sub(group);
            (keys.max(1), features)
        }
        _ => (1, 1),
    };
    let keys = kv_heads * features;
    let rows = |list: &[f32], rows: usize| -> Option<Vec<usize>> {
        let whole = rows > 0 && !list.is_empty() && list.len().is_multiple_of(rows);
        whole.then(|| vec![rows, list.len() / rows])
    };
    let column =
        |list: &[f32]| -> Option<Vec<usize>> { (!list.is_empty()).then(|| vec![list.len()]) };
    let queries = head.d_r.saturating_sub(keys);
    let inputs = head.fc1.len() / head.d_r.max(1);
    let all = parts(form).iter().map(|part| {
        let (values, shape): (&[f32], Option<Vec<usize>>) = match part {
            Part::Fc1 => (&head.fc1, rows(&head.fc1, head.d_r)),
            Part::Fc1Bias => (&head.fc1_bias, column(&head.fc1_bias)),
            Part::Fc2 => {
                let across = rows(&head.fc2, head.d_r);
                (&head.fc2, across.map(|s| vec![s[1], s[0]]))
            }
            Part::Fc2Bias => (&head.fc2_bias, column(&head.fc2_bias)),
            Part::Query => {
                let own = head.fc1.get(..queries * inputs).unwrap_or_default();
                (own, rows(own, queries))
            }
            Part::QueryBias => {
                let own = head.fc1_bias.get(..queries).unwrap_or_default();
                (own, column(own))
            }
            Part::Key => {
                let own = head.fc1.get(queries * inputs..).unwrap_or_default();
                (own, rows(own, keys))
            }
            Part::QueryNorm => (&gate.query_norm, column(&gate.query_norm)),
            Part::KeyNorm => (&gate.key_norm, column(&gate.key_norm)),
            Part::Base => {
                let each = gate.base.len() / keys;
                let whole = each > 0 && gate.base.len() == keys * each;
                (&gate.base, whole.then(|| vec![kv_heads, 1, each, features]))
            }
            Part::Offset => {
                let own = rows(&gate.offset, kv_heads);
                (&gate.offset, own.map(|s| vec![s[0], 1, s[1]]))
            }
        };
        let shape = shape.ok_or_else(|| {
            let expected = format!("whole rows, with d_R = {}", head.d_r);
            wrong(*part, expected, values.len())
        })?;
        Ok(Named {
            name: name(form, layer, *part),
            shape,
            values: values.to_vec(),
        })
    });
    all.collect()
}
