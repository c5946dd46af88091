//! Positions and carried scores of a layer's units: in host memory, or where the layer is computed until somebody
//! looks at them.

use crate::{Best, Compute, KeptUnits, Result, Rows, UnitLists, contract::HeadMeta, stores};
use std::{ops::Range, sync::OnceLock};

/// What a cache keeps of a layer's units beside keys and values. How many a head has is always known here.
#[derive(Debug)]
pub(crate) struct Lists {
    lens: Vec<usize>,
    /// Nothing while the lists lie on the device alone, until they are asked for.
    host: OnceLock<Vec<HeadMeta>>,
    there: Option<There>,
}

/// Lists on a device, which are right as long as they are here.
#[derive(Debug)]
struct There {
    lists: Box<dyn UnitLists>,
    /// Positions of units that came since, which have no scores yet.
    new: Range<usize>,
}

impl Lists {
    /// Of heads that have no units.
    pub(crate) fn new(kv_heads: usize) -> Self {
        Self::of(vec![HeadMeta::default(); kv_heads])
    }

    pub(crate) fn of(heads: Vec<HeadMeta>) -> Self {
        Self {
            lens: heads.iter().map(|head| head.positions.len()).collect(),
            host: OnceLock::from(heads),
            there: None,
        }
    }

    pub(crate) fn fork(&self) -> Self {
        let there = self.there.as_ref().map(|there| There {
            lists: there.lists.fork(),
            new: there.new.clone(),
        });
        Self {
            lens: self.lens.clone(),
            host: self.host.clone(),
            there,
        }
    }

    pub(crate) fn kv_heads(&self) -> usize {
        self.lens.len()
    }

    pub(crate) fn len(&self, head: usize) -> usize {
        self.lens[head]
    }

    /// Units by KV head.
    pub(crate) fn lens(&self) -> &[usize] {
        &self.lens
    }

    pub(crate) fn longest(&self) -> usize {
        self.lens.iter().copied().max().unwrap_or(0)
    }

    /// The lists in host memory, brought there if they are not.
    pub(crate) fn fetch(&self) -> Result<&[HeadMeta]> {
        if let Some(heads) = self.host.get() {
            return Ok(heads);
        }
        let mut heads = Vec::with_capacity(self.lens.len());
        if let Some(there) = &self.there {
            let new = there.new.start as u32..there.new.end as u32;
            for (mut positions, scores) in there.lists.read()? {
                positions.extend(new.clone());
                heads.push(HeadMeta { positions, scores });
            }
        }
        Ok(self.host.get_or_init(|| heads))
    }

    /// The same for those who cannot be told of a device that fails.
    ///
    /// # Panics
    /// If it does.
    pub(crate) fn heads(&self) -> &[HeadMeta] {
        match self.fetch() {
            Ok(heads) => heads,
            Err(error) => panic!("positions and scores of units: {error}"),
        }
    }

    /// The lists in host memory, to be changed; no list may become longer or shorter but that of scores.
    pub(crate) fn heads_mut(&mut self) -> Result<&mut [HeadMeta]> {
        self.fetch()?;
        self.there = None;
        match self.host.get_mut() {
            Some(heads) => Ok(heads),
            None => unreachable!("lists that were just fetched"),
        }
    }

    /// Positions of a head that were read from a file.
    pub(crate) fn set_positions(&mut self, head: usize, positions: Vec<u32>) -> Result<()> {
        self.lens[head] = positions.len();
        self.heads_mut()?[head].positions = positions;
        Ok(())
    }

    /// New units of every head, at positions from `first` on.
    pub(crate) fn note_units(&mut self, first: usize, new: usize) {
        self.lens.iter_mut().for_each(|len| *len += new);
        if let Some(there) = &mut self.there {
            there.new = first..first + new;
        }
        for head in self.host.get_mut().into_iter().flatten() {
            let positions = &mut head.positions;
            if positions.capacity() - positions.len() < new {
                // As stores do: exactly these, or a few more of single ones.
                let reserve = if new == 1 { stores::RESERVE } else { new };
                positions.reserve_exact(reserve);
            }
            positions.extend(first as u32..(first + new) as u32);
        }
    }

    /// Drops all units but those that are listed for each head.
    pub(crate) fn retain(&mut self, kept: &[Vec<u32>]) -> Result<()> {
        for (head, kept) in self.heads_mut()?.iter_mut().zip(kept) {
            let width = head.scores.len() / head.positions.len().max(1);
            gather(&mut head.positions, 1, kept);
            gather(&mut head.scores, width, kept);
        }
        self.lens = kept.iter().map(Vec::len).collect();
        Ok(())
    }

    /// Whether units can be chosen where they lie: all but the `new` newest have one score each.
    pub(crate) fn ranked(&self, new: usize) -> bool {
        match (&self.there, self.host.get()) {
            (Some(there), _) => there.new.len() == new,
            (None, Some(heads)) => {
                let mut heads = heads.iter();
                heads.all(|head| head.scores.len() + new == head.positions.len())
            }
            (None, None) => false,
        }
    }

    /// What the newest units carry, `[new, kv_heads]`: from here on the lists lie in `compute`'s, if it has any.
    /// They have to be [ranked](Self::ranked) so far.
    pub(crate) fn born(&mut self, scores: &Rows, compute: &dyn Compute) -> Result<()> {
        let new = scores.rows();
        if self.there.is_none() {
            let heads = self.fetch()?;
            let old = |head: &HeadMeta| head.positions.len() - new;
            let positions: Vec<&[u32]> = (heads.iter())
                .map(|head| &head.positions[..old(head)])
                .collect();
            let carried: Vec<&[f32]> = heads.iter().map(|head| &head.scores[..]).collect();
            let Some(mut lists) = compute.unit_lists(heads.len()) else {
                return Ok(());
            };
            lists.put(&positions, &carried)?;
            let longest = heads.iter().max_by_key(|head| head.positions.len());
            let first = longest.and_then(|head| head.positions.get(old(head)));
            let first = first.map_or(0, |first| *first as usize);
            let new = first..first + new;
            self.there = Some(There { lists, new });
        }
        if let Some(there) = self.there.as_mut().filter(|_| new > 0) {
            there.lists.append(there.new.start, scores)?;
            there.new = 0..0;
            self.host = OnceLock::new();
        }
        Ok(())
    }

    /// Keeps the best units of each head, of lists that lie on a device and have all their scores; `None` if they do not.
    pub(crate) fn keep(&mut self, best: &[Best]) -> Result<Option<KeptUnits>> {
        let Some(there) = self.there.as_mut().filter(|there| there.new.is_empty()) else {
            return Ok(None);
        };
        let kept = there.lists.keep(best)?;
        self.lens = kept.lens().to_vec();
        self.host = OnceLock::new();
        Ok(Some(kept))
    }

    /// Numbers that are carried with the units of a head.
    pub(crate) fn carried(&self, head: usize) -> usize {
        match (self.host.get(), &self.there) {
            (Some(heads), _) => heads[head].scores.len(),
            (None, Some(there)) => self.lens[head] - there.new.len(),
            (None, None) => 0,
        }
    }

    /// Bytes of positions and scores.
    pub(crate) fn bytes(&self) -> usize {
        let heads = self.host.get().into_iter().flatten();
        let numbers = heads.map(|head| head.positions.capacity() + head.scores.capacity());
        let there = self.there.as_ref().map_or(0, |there| there.lists.bytes());
        4 * numbers.sum::<usize>() + there
    }
}

/// Keeps the listed elements of `width` values each, in place.
fn gather<T: Copy>(values: &mut Vec<T>, width: usize, kept: &[u32]) {
    if values.is_empty() {
        return;
    }
    for (to, from) in kept.iter().enumerate() {
        let from = *from as usize * width;
        values.copy_within(from..from + width, to * width);
    }
    values.truncate(kept.len() * width);
    give_back(values);
}

/// What is not needed; a small reserve stays.
pub(crate) fn give_back<T>(values: &mut Vec<T>) {
    if values.capacity() - values.len() > stores::RESERVE {
        values.shrink_to_fit();
    }
}
