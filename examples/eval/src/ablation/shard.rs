//! A part of a grid, for one of several machines.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::{fmt, str::FromStr};

/// Part `index` of `of`, from 1: as it is written, `2/3`.
///
/// The cases of a grid are dealt out one by one, in an order that is a matter of how many there are and of nothing
/// else: parts are of one size but for one case, each has cases of all kinds, and whoever has the same grid deals
/// in the same way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Shard {
    index: usize,
    of: usize,
}

impl Shard {
    /// Part `index` of `of`.
    ///
    /// # Errors
    /// [`Error::Usage`] unless `1 <= index <= of`.
    pub fn new(index: usize, of: usize) -> Result<Self> {
        match (1..=of).contains(&index) {
            true => Ok(Self { index, of }),
            false => Err(Error::Usage(format!(
                "part {index}/{of}: parts are numbered from 1, as in 1/3, 2/3, 3/3"
            ))),
        }
    }

    /// All of it.
    pub fn whole() -> Self {
        Self { index: 1, of: 1 }
    }

    /// Whether this is all of it.
    pub fn is_whole(&self) -> bool {
        self.of == 1
    }

    /// The name of a folder for it beside those of the others.
    pub fn folder(&self) -> String {
        format!("shard-{}-of-{}", self.index, self.of)
    }

    /// Of so many cases, whether each is in this part.
    pub fn deal(&self, cases: usize) -> Vec<bool> {
        let mut order: Vec<usize> = (0..cases).collect();
        order.sort_by_cached_key(|case| (Sha256::digest(case.to_le_bytes()), *case));
        let mut own = vec![false; cases];
        for case in order.iter().skip(self.index - 1).step_by(self.of) {
            own[*case] = true;
        }
        own
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.of)
    }
}

impl FromStr for Shard {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parts = text.split_once('/');
        let numbers = parts.and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
        match numbers {
            Some((index, of)) => Self::new(index, of),
            None => Err(Error::Usage(format!(
                "{text:?} is no part: they are called 1/3, 2/3, 3/3"
            ))),
        }
    }
}

impl From<Shard> for String {
    fn from(shard: Shard) -> Self {
        shard.to_string()
    }
}

impl TryFrom<String> for Shard {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_is_in_exactly_one_part_and_parts_are_even() {
        for (cases, of) in [(0, 3), (1, 3), (7, 1), (24, 3), (100, 7)] {
            let parts: Vec<Vec<bool>> = (1..=of)
                .map(|index| Shard::new(index, of).unwrap().deal(cases))
                .collect();
            for case in 0..cases {
                assert_eq!(parts.iter().filter(|part| part[case]).count(), 1);
            }
            let sizes: Vec<usize> = parts
                .iter()
                .map(|part| part.iter().filter(|own| **own).count())
                .collect();
            let (least, most) = (sizes.iter().min().unwrap(), sizes.iter().max().unwrap());
            assert!(most - least <= 1, "{sizes:?}");
        }
        // Not every third: where three tasks take turns, each part has all of them.
        let own = Shard::new(1, 3).unwrap().deal(30);
        let kinds: Vec<usize> = (0..3)
            .map(|kind| (0..10).filter(|i| own[3 * i + kind]).count())
            .collect();
        assert!(kinds.iter().all(|n| (1..=7).contains(n)), "{kinds:?}");
        assert_eq!(own, Shard::new(1, 3).unwrap().deal(30));
    }

    #[test]
    fn parts_have_names() {
        let shard: Shard = "2/3".parse().unwrap();
        assert_eq!(
            (shard.to_string(), shard.folder()),
            ("2/3".into(), "shard-2-of-3".into())
        );
        let text = serde_json::to_string(&shard).unwrap();
        assert_eq!(text, "\"2/3\"");
        assert_eq!(serde_json::from_str::<Shard>(&text).unwrap(), shard);
        for wrong in ["0/3", "4/3", "1", "a/3", "1/0", "-1/3"] {
            assert!(
                matches!(wrong.parse::<Shard>(), Err(Error::Usage(_))),
                "{wrong}"
            );
        }
    }
}
