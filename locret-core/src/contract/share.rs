//! How a budget is shared out over layers and heads.

use crate::{Compute, Error, LayerSpec, Result};
use serde::{Deserialize, Serialize};
use std::{borrow::Cow, fmt, str::FromStr};

/// Over what heads share a budget by their scores; see [`Evict::share`](crate::Evict::share).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Share {
    /// The heads of a layer (Ada-KV, arXiv 2407.11550 §3). Each layer is cut before the next one runs.
    #[default]
    Layer,
    /// The heads of all layers. All layers are cut after the last one.
    Model,
}

impl Share {
    /// The part of its budget that a head keeps on its own account, where nothing else is said: Ada-KV's.
    pub const FLOOR: f64 = 0.2;
}

impl FromStr for Share {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "layer" => Ok(Self::Layer),
            "model" => Ok(Self::Model),
            _ => Err(Error::setting("share", "layer or model", text)),
        }
    }
}

/// The form that [`FromStr`] reads.
impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Layer => "layer",
            Self::Model => "model",
        })
    }
}

/// Fixed shares of a budget, by layer or by layer and head: what sharing over the model came to on other
/// texts, for instance ([`Evict::table`](crate::Evict::table)).
///
/// A row for each layer, with one number for all of its KV heads or one number for each. Only their
/// proportions count. A head gets 1 unit, and of all units beyond that its share, rounded so that the
/// model has `layers · kv_heads · b` units, exactly.
///
/// As JSON: `{"shares": [[1.5], [0.5]]}`.
///
/// ```
/// use locret_core::{BudgetTable, LayerSpec};
///
/// let table = BudgetTable::new(vec![vec![3.0, 1.0], vec![1.0, 1.0]])?;
/// # let layer = |index| {
/// #     let spec = locret_core::ModelSpec::new(2, 2, 2, 16, 10).with_head_dim(8);
/// #     spec.layer(index)
/// # };
/// assert_eq!(table.units(&layer(0), 7), [13, 5]);
/// assert_eq!(table.units(&layer(1), 7), [5, 5]);
/// # Ok::<(), locret_core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Rows", into = "Rows")]
#[must_use]
pub struct BudgetTable {
    shares: Vec<Vec<f64>>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rows {
    shares: Vec<Vec<f64>>,
}

impl TryFrom<Rows> for BudgetTable {
    type Error = Error;

    fn try_from(rows: Rows) -> Result<Self> {
        Self::new(rows.shares)
    }
}

impl From<BudgetTable> for Rows {
    fn from(table: BudgetTable) -> Self {
        Self {
            shares: table.shares,
        }
    }
}

impl BudgetTable {
    /// From one row for each layer.
    ///
    /// # Errors
    /// [`Error::Setting`] for rows that are empty or not of one length, and for shares that are negative,
    /// not finite, or all 0.
    pub fn new(shares: Vec<Vec<f64>>) -> Result<Self> {
        let what = "table of budgets";
        let heads = shares.first().map_or(0, Vec::len);
        if heads == 0 || shares.iter().any(|row| row.len() != heads) {
            let found: Vec<usize> = shares.iter().map(Vec::len).collect();
            let expected = "a row for each layer, all with one share or with one for each KV head";
            return Err(Error::setting(what, expected, format!("rows of {found:?}")));
        }
        let all = || shares.iter().flatten();
        if let Some(bad) = all().find(|share| !share.is_finite() || **share < 0.0) {
            return Err(Error::setting(what, "shares from 0 on", bad));
        }
        let sum: f64 = all().sum();
        if !(sum.is_finite() && sum > 0.0) {
            let expected = "shares with a finite sum above 0";
            return Err(Error::setting(what, expected, sum));
        }
        Ok(Self { shares })
    }

    /// The same with one share for all heads of a layer, their mean: heads may then share what their layer
    /// has.
    pub fn by_layer(&self) -> Self {
        let mean = |row: &Vec<f64>| vec![row.iter().sum::<f64>() / row.len() as f64];
        Self {
            shares: self.shares.iter().map(mean).collect(),
        }
    }

    /// The rows, as they were given.
    pub fn shares(&self) -> &[Vec<f64>] {
        &self.shares
    }

    /// Units of each KV head of `layer`, if it has `budget` on average.
    ///
    /// Rows that the table does not have have the mean.
    pub fn units(&self, layer: &LayerSpec, budget: usize) -> Vec<usize> {
        let Some(row) = self.shares.get(layer.index) else {
            return vec![budget; layer.kv_heads];
        };
        let before: f64 = self.shares[..layer.index].iter().flatten().sum();
        let all: f64 = self.shares.iter().flatten().sum();
        // Of everything beyond one unit each, what the first cells have: so roundings cancel.
        let cells = (self.shares.len() * row.len()) as f64;
        let rest = budget.saturating_sub(1) as f64 * cells;
        let (mut sum, mut below) = (before, (rest * (before / all)).round());
        let mut units = Vec::with_capacity(layer.kv_heads);
        let last = layer.index + 1 == self.shares.len();
        for (head, share) in row.iter().enumerate() {
            sum += share;
            // In another order of summation the whole need not be the whole.
            let end = match last && head + 1 == row.len() {
                true => rest,
                false => (rest * (sum / all).min(1.0)).round(),
            };
            units.push(1 + (end - below).max(0.0) as usize);
            below = end;
        }
        if row.len() == 1 {
            units.resize(layer.kv_heads, units[0]);
        }
        units.resize(layer.kv_heads, budget);
        units
    }

    /// Checks that these are shares of this model's layers and heads.
    ///
    /// # Errors
    /// [`Error::Shape`].
    pub(super) fn validate(&self, layer: &LayerSpec) -> Result<()> {
        let found = [self.shares.len(), self.shares[0].len()];
        let fits = found[0] == layer.layers && [1, layer.kv_heads].contains(&found[1]);
        match fits {
            true => Ok(()),
            false => {
                let expected = format!("[{}, 1 or {}]", layer.layers, layer.kv_heads);
                Err(Error::shape("a table of budgets", expected, found))
            }
        }
    }
}

/// The maximum over `width` neighbours (odd), fewer at the ends.
pub(super) fn max_pool(scores: &[f32], width: usize) -> Cow<'_, [f32]> {
    let reach = width / 2;
    if reach == 0 {
        return Cow::Borrowed(scores);
    }
    let largest = |unit: usize| {
        let near = unit.saturating_sub(reach)..(unit + reach + 1).min(scores.len());
        scores[near]
            .iter()
            .copied()
            .fold(f32::NEG_INFINITY, f32::max)
    };
    Cow::Owned((0..scores.len()).map(largest).collect())
}

/// Adds to what each head keeps the best of the others, over all heads, up to `total` units. Of equal
/// scores that of the earlier head goes first, then that of the earlier unit.
pub(super) fn share(
    compute: &dyn Compute,
    scores: &[Cow<'_, [f32]>],
    kept: &mut [Vec<u32>],
    total: usize,
) -> Result<()> {
    let mut rest = Vec::new();
    let mut rest_scores = Vec::new();
    for (head, (scores, kept)) in scores.iter().zip(&*kept).enumerate() {
        let mut kept = kept.iter().peekable();
        for (unit, score) in scores.iter().enumerate() {
            if kept.next_if(|k| **k as usize == unit).is_none() {
                rest.push((head, unit as u32));
                rest_scores.push(*score);
            }
        }
    }
    let taken: usize = kept.iter().map(Vec::len).sum();
    let chosen = compute.select(&rest_scores, total.saturating_sub(taken), &[])?;
    for (head, unit) in chosen.into_iter().map(|i| rest[i as usize]) {
        kept[head].push(unit);
    }
    kept.iter_mut().for_each(|kept| kept.sort_unstable());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn layer(index: usize, layers: usize, kv_heads: usize) -> LayerSpec {
        LayerSpec {
            index,
            layers,
            heads: kv_heads,
            kv_heads,
            head_dim: 8,
        }
    }

    proptest! {
        /// The whole is what it would be if all had the same, nobody is left with nothing, and no head is
        /// further from its share than rounding takes it.
        #[test]
        fn shares_add_up(
            rows in prop::collection::vec(prop::collection::vec(0.0f64..9.0, 3), 1..6),
            by_layer in any::<bool>(),
            budget in 1usize..3000,
        ) {
            prop_assume!(rows.iter().flatten().sum::<f64>() > 1e-3);
            let mut table = BudgetTable::new(rows).unwrap();
            if by_layer {
                table = table.by_layer();
            }
            let layers = table.shares().len();
            let all: f64 = table.shares().iter().flatten().sum();
            let cells = (layers * table.shares()[0].len()) as f64;
            let mut sum = 0;
            for index in 0..layers {
                let units = table.units(&layer(index, layers, 3), budget);
                prop_assert_eq!(units.len(), 3);
                for (head, units) in units.iter().enumerate() {
                    let row = &table.shares()[index];
                    let share = row[head.min(row.len() - 1)] / all;
                    let due = 1.0 + (budget - 1) as f64 * cells * share;
                    prop_assert!((*units as f64 - due).abs() <= 1.0 + 1e-6, "{} for {}", units, due);
                    prop_assert!(*units >= 1);
                    sum += units;
                }
            }
            prop_assert_eq!(sum, layers * 3 * budget);
        }
    }

    #[test]
    fn tables_are_checked_and_read_as_they_are_written() {
        let nan = f64::NAN;
        for bad in [
            vec![],
            vec![vec![]],
            vec![vec![1.0], vec![1.0, 2.0]],
            vec![vec![1.0, -0.1]],
            vec![vec![nan]],
            vec![vec![f64::INFINITY]],
            vec![vec![f64::MAX, f64::MAX]],
            vec![vec![0.0], vec![0.0]],
        ] {
            assert!(BudgetTable::new(bad.clone()).is_err(), "{bad:?}");
        }
        let table = BudgetTable::new(vec![vec![1.0, 0.5], vec![0.0, 2.5]]).unwrap();
        let text = serde_json::to_string(&table).unwrap();
        assert_eq!(text, r#"{"shares":[[1.0,0.5],[0.0,2.5]]}"#);
        assert_eq!(serde_json::from_str::<BudgetTable>(&text).unwrap(), table);
        assert!(serde_json::from_str::<BudgetTable>(r#"{"shares":[[-1.0]]}"#).is_err());
        assert_eq!(table.by_layer().shares(), [[0.75], [1.25]]);
        assert!(table.validate(&layer(0, 2, 2)).is_ok());
        assert!(table.by_layer().validate(&layer(0, 2, 3)).is_ok());
        assert!(table.validate(&layer(0, 2, 3)).is_err());
        assert!(table.validate(&layer(0, 3, 2)).is_err());
        assert_eq!("model".parse::<Share>().unwrap(), Share::Model);
        assert!("models".parse::<Share>().is_err());
    }
}
