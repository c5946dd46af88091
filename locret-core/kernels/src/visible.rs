//! What queries see, where it is not everything before them.
//!
//! Methods that choose (arXiv 2407.02490, 2402.04617) say it by blocks of queries, so that a tile of keys still
//! meets many queries at once. Whatever they say, no query sees what comes after it.

use std::ops::Range;

/// What a block of queries sees of its KV head's units, which are numbered as they lie in the store.
///
/// A query whose own unit is `p` sees of the units `u <= p` those that are in `ranges` or `columns`, or less than
/// `window` away (`p - u < window`). All these are seen where they stand. Of the others it sees those in `far`,
/// at one distance for all ([`Views::far_at`]). One softmax goes over all of them; what is named twice counts
/// once. A query that sees nothing gives zeros.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct View {
    /// Ranges of units, in any order.
    pub ranges: Vec<Range<u32>>,
    /// Single units, in any order.
    pub columns: Vec<u32>,
    /// Each query's newest units, its own among them; 0 for none.
    pub window: usize,
    /// Ranges of units that are seen at the one distance.
    pub far: Vec<Range<u32>>,
}

impl View {
    /// Everything before the queries: as if nothing had been chosen.
    pub fn all() -> Self {
        Self {
            window: usize::MAX,
            ..Self::default()
        }
    }
}

/// What all queries of a step see: for each query head (or for each KV head, if its query heads share it), for
/// each block of queries, a [`View`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Views {
    block: usize,
    lists: Vec<Vec<View>>,
    distance: Option<usize>,
    places: Option<Vec<Vec<u32>>>,
}

impl Views {
    /// Queries in a block, where nothing else is called for: as the tiles of MInference.
    pub const BLOCK: usize = 64;

    /// By query head or by KV head, what each block of `block` queries sees; the last block may have fewer
    /// queries.
    pub fn new(block: usize, lists: Vec<Vec<View>>) -> Self {
        Self {
            block,
            lists,
            distance: None,
            places: None,
        }
    }

    /// Says how far away units in [`View::far`] are seen: queries are rotated as at this position, and keys not
    /// at all.
    #[must_use]
    pub fn far_at(self, distance: usize) -> Self {
        Self {
            distance: Some(distance),
            ..self
        }
    }

    /// Says where units stand that do not stand where they lie: by KV head, the position of each of its units.
    /// Queries stay where they are, at their own units' numbers. Of units in [`View::far`] it says nothing.
    #[must_use]
    pub fn placed(self, positions: Vec<Vec<u32>>) -> Self {
        Self {
            places: Some(positions),
            ..self
        }
    }

    /// Queries in a block.
    pub fn block(&self) -> usize {
        self.block
    }

    /// By query head or by KV head, by block.
    pub fn lists(&self) -> &[Vec<View>] {
        &self.lists
    }

    /// What [`far_at`](Self::far_at) was told.
    pub fn distance(&self) -> Option<usize> {
        self.distance
    }

    /// What [`placed`](Self::placed) was told.
    pub fn places(&self) -> Option<&[Vec<u32>]> {
        self.places.as_deref()
    }

    /// Where the units of a KV head stand, if not where they lie.
    pub(crate) fn places_of(&self, head: usize) -> Option<&[u32]> {
        self.places().map(|places| &places[head][..])
    }

    /// What is wrong with where units stand, for keys that are rotated by a table of so many rows, or were before.
    ///
    /// # Errors
    /// A sentence that says what was expected and what was found.
    pub fn check_places(&self, rows: Option<usize>) -> Result<(), String> {
        let Some(places) = self.places() else {
            return Ok(());
        };
        let Some(rows) = rows else {
            return Err("positions of units whose keys are rotated already".into());
        };
        match places
            .iter()
            .flatten()
            .find(|place| **place as usize >= rows)
        {
            Some(place) => Err(format!("a unit at position {place} of {rows}")),
            None => Ok(()),
        }
    }

    /// What a query of a query head sees, of `heads`.
    pub fn of(&self, head: usize, heads: usize, token: usize) -> &View {
        &self.lists[head * self.lists.len() / heads][token / self.block]
    }

    /// By KV head, sorted ranges of the units that any of `tokens` queries sees, of KV heads with so many units. The
    /// views fit them ([`check`](Self::check)).
    pub fn seen(&self, tokens: usize, lens: &[usize]) -> Vec<Vec<Range<usize>>> {
        let mut seen = vec![Vec::new(); lens.len()];
        for (list, views) in self.lists.iter().enumerate() {
            let head = list * lens.len() / self.lists.len();
            for (block, view) in views.iter().enumerate() {
                let first = lens[head] - tokens + block * self.block;
                let end = (first + self.block).min(lens[head]);
                if first < end {
                    let runs = view.runs(first..end);
                    seen[head].extend(runs.near.into_iter().chain(runs.edge).chain(runs.far));
                }
            }
        }
        let whole = |(ranges, len): (Vec<_>, &usize)| united(ranges, *len);
        seen.into_iter().zip(lens).map(whole).collect()
    }

    /// What is wrong with these views of `tokens` queries of `heads` query heads, on KV heads with so many units.
    ///
    /// # Errors
    /// A sentence that says what was expected and what was found.
    pub fn check(&self, tokens: usize, heads: usize, lens: &[usize]) -> Result<(), String> {
        let lists = self.lists.len();
        if lists != heads && lists != lens.len() {
            return Err(format!(
                "views for {lists} heads, of {heads} query heads and {} KV heads",
                lens.len()
            ));
        }
        if self.block == 0 {
            return Err("views of blocks of no queries".into());
        }
        if let Some(places) = self.places() {
            let found: Vec<usize> = places.iter().map(Vec::len).collect();
            if found != lens {
                return Err(format!("positions of {found:?} units, of {lens:?}"));
            }
        }
        let blocks = tokens.div_ceil(self.block);
        for (list, views) in self.lists.iter().enumerate() {
            if views.len() != blocks {
                return Err(format!(
                    "head {list}: views of {} blocks of {} queries, of {tokens} queries",
                    views.len(),
                    self.block
                ));
            }
            let len = lens[list * lens.len() / lists];
            for view in views {
                let mut ranges = view.ranges.iter().chain(&view.far);
                if let Some(range) =
                    ranges.find(|range| range.start > range.end || range.end as usize > len)
                {
                    return Err(format!("head {list}: units {range:?} of {len}"));
                }
                if let Some(unit) = view.columns.iter().find(|unit| **unit as usize >= len) {
                    return Err(format!("head {list}: unit {unit} of {len}"));
                }
                if !view.far.is_empty() && self.distance.is_none() {
                    return Err(format!("head {list}: far units, and nothing says how far"));
                }
            }
        }
        Ok(())
    }
}

/// Sorted units, each in one of three lists, that the queries with the units `own` see some of.
#[derive(Debug, PartialEq)]
pub(crate) struct Runs {
    /// Seen by all queries that come after them.
    pub(crate) near: Vec<Range<usize>>,
    /// Seen by those whose window reaches that far.
    pub(crate) edge: Vec<Range<usize>>,
    /// Seen at the one distance by those whose window does not reach that far.
    pub(crate) far: Vec<Range<usize>>,
}

impl View {
    /// The first unit in the window of the query whose own unit is `unit`.
    pub(crate) fn window_start(&self, unit: usize) -> usize {
        (unit + 1).saturating_sub(self.window)
    }

    /// What queries with the units `own` (not empty) see.
    pub(crate) fn runs(&self, own: Range<usize>) -> Runs {
        let wide = |range: &Range<u32>| range.start as usize..range.end as usize;
        let single = |unit: &u32| *unit as usize..*unit as usize + 1;
        let [first, last] = [own.start, own.end - 1].map(|unit| self.window_start(unit));
        let mut near: Vec<_> = self.ranges.iter().map(wide).collect();
        near.extend(self.columns.iter().map(single));
        if self.window > 0 {
            near.push(last..own.end);
        }
        let near = united(near, own.end);
        let edge = match self.window {
            0 => Vec::new(),
            _ => without(vec![first..last], &near),
        };
        let far = united(self.far.iter().map(wide).collect(), own.end);
        Runs {
            edge: edge.into_iter().filter(|run| !run.is_empty()).collect(),
            far: without(far, &near),
            near,
        }
    }
}

/// Sorted ranges of what lies in any of these and before `end`.
fn united(mut ranges: Vec<Range<usize>>, end: usize) -> Vec<Range<usize>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut out: Vec<Range<usize>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        let range = range.start..range.end.min(end);
        if range.is_empty() {
            continue;
        }
        match out.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => out.push(range),
        }
    }
    out
}

/// What of sorted ranges does not lie in others, which are sorted, too.
fn without(ranges: Vec<Range<usize>>, others: &[Range<usize>]) -> Vec<Range<usize>> {
    let (mut out, mut at) = (Vec::with_capacity(ranges.len()), 0);
    for mut range in ranges {
        while others.get(at).is_some_and(|other| other.end <= range.start) {
            at += 1;
        }
        // The last one that reaches into this range may reach into the next one, too.
        let mut next = at;
        while let Some(other) = others.get(next).filter(|other| other.start < range.end) {
            if range.start < other.start {
                out.push(range.start..other.start);
            }
            range.start = other.end.min(range.end);
            next += 1;
        }
        if !range.is_empty() {
            out.push(range);
        }
    }
    out
}

/// Sorted runs, cut into tiles of at most `most` units.
///
/// A value that is asked for the next one, and not a function that takes a closure: what is done with a tile has to
/// be compiled for the instruction set of its caller, which a closure is not.
pub(crate) struct Tiles<'a> {
    runs: &'a [Range<usize>],
    most: usize,
    /// The unit at which the first of `runs` goes on.
    from: usize,
    pieces: Vec<Range<usize>>,
}

impl<'a> Tiles<'a> {
    pub(crate) fn new(runs: &'a [Range<usize>], most: usize) -> Self {
        Self {
            runs,
            most,
            from: 0,
            pieces: Vec::new(),
        }
    }

    /// The runs that make up the next tile.
    pub(crate) fn next(&mut self) -> Option<&[Range<usize>]> {
        self.pieces.clear();
        let mut room = self.most;
        while let Some((run, rest)) = self.runs.split_first().filter(|_| room > 0) {
            let start = self.from.max(run.start);
            let end = run.end.min(start + room);
            room -= end - start;
            self.pieces.push(start..end);
            if end == run.end {
                self.runs = rest;
            }
            self.from = end;
        }
        (!self.pieces.is_empty()).then_some(&self.pieces)
    }
}

/// How many units of sorted pieces lie before `unit`.
pub(crate) fn before(pieces: &[Range<usize>], unit: usize) -> usize {
    let of = |piece: &Range<usize>| unit.clamp(piece.start, piece.end) - piece.start;
    pieces.iter().map(of).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::views;
    use proptest::prelude::*;

    /// How a query sees a unit, by the words of [`View`].
    fn sees(view: &View, own: usize, unit: usize) -> Option<bool> {
        let of = |ranges: &[Range<u32>]| ranges.iter().any(|r| r.contains(&(unit as u32)));
        if unit > own {
            None
        } else if of(&view.ranges)
            || view.columns.contains(&(unit as u32))
            || own - unit < view.window
        {
            Some(false)
        } else {
            of(&view.far).then_some(true)
        }
    }

    proptest! {
        #[test]
        fn runs_say_what_the_view_says(
            len in 1usize..200,
            tokens in 1usize..80,
            seed in any::<u64>(),
        ) {
            let tokens = tokens.min(len);
            let views = views(seed, tokens, tokens, &[len], 1);
            let view = &views.lists()[0][0];
            let own = len - tokens..len;
            let runs = view.runs(own.clone());
            for list in [&runs.near, &runs.edge, &runs.far] {
                prop_assert!(list.windows(2).all(|w| w[0].end <= w[1].start), "{list:?}");
                prop_assert!(list.iter().all(|r| !r.is_empty() && r.end <= own.end), "{list:?}");
            }
            for query in own {
                for unit in 0..len {
                    let of = |list: &[Range<usize>]| list.iter().any(|r| r.contains(&unit));
                    let start = view.window_start(query);
                    let found = [
                        of(&runs.near) && unit <= query,
                        of(&runs.edge) && unit >= start && unit <= query,
                        of(&runs.far) && unit < start,
                    ];
                    prop_assert!(found.iter().filter(|f| **f).count() <= 1);
                    let found = match found {
                        [false, false, false] => None,
                        [.., far] => Some(far),
                    };
                    prop_assert_eq!(found, sees(view, query, unit), "{} of {}", unit, query);
                }
            }
        }

        #[test]
        fn seen_is_what_any_query_sees(
            lens in prop::collection::vec(1usize..150, 1..4),
            tokens in 1usize..60,
            block in 1usize..70,
            group in 1usize..3,
            seed in any::<u64>(),
        ) {
            let tokens = tokens.min(*lens.iter().min().unwrap_or(&1));
            let all = views(seed, tokens, block, &lens, group);
            let (seen, heads) = (all.seen(tokens, &lens), lens.len() * group);
            for (store, len) in lens.iter().enumerate() {
                prop_assert!(seen[store].windows(2).all(|w| w[0].end < w[1].start));
                for unit in 0..*len {
                    let due = (store * group..(store + 1) * group).any(|head| {
                        let mut queries = 0..tokens;
                        queries.any(|t| sees(all.of(head, heads, t), len - tokens + t, unit).is_some())
                    });
                    prop_assert_eq!(seen[store].iter().any(|r| r.contains(&unit)), due);
                }
            }
        }

        #[test]
        fn tiles_are_all_of_the_runs(cuts in prop::collection::btree_set(0usize..400, 0..40)) {
            let cuts: Vec<usize> = cuts.into_iter().collect();
            let runs: Vec<_> = cuts.chunks_exact(2).map(|c| c[0]..c[1]).collect();
            let (mut all, mut counts) = (Vec::new(), Vec::new());
            let mut tiles = Tiles::new(&runs, 24);
            while let Some(pieces) = tiles.next() {
                let units: Vec<usize> = pieces.iter().cloned().flatten().collect();
                for unit in 0..402 {
                    let count = units.iter().filter(|u| **u < unit).count();
                    assert_eq!(before(pieces, unit), count);
                }
                counts.push(units.len());
                all.extend(units);
            }
            prop_assert_eq!(all, runs.into_iter().flatten().collect::<Vec<_>>());
            let last = counts.pop().unwrap_or(1);
            prop_assert!(counts.iter().all(|n| *n == 24) && (1..=24).contains(&last));
        }
    }

    #[test]
    fn views_that_do_not_fit_are_refused() {
        let view = |ranges: Vec<Range<u32>>, far: Vec<Range<u32>>| View {
            ranges,
            far,
            ..View::default()
        };
        let check = |lists: Vec<Vec<View>>| Views::new(4, lists).check(6, 2, &[9]);
        let fine = || vec![View::all(); 2];
        assert_eq!(check(vec![fine()]), Ok(()));
        assert_eq!(check(vec![fine(), fine()]), Ok(()));
        for (lists, message) in [
            (vec![fine(); 3], "views for 3 heads"),
            (vec![vec![View::all()]], "views of 1 blocks of 4 queries"),
            (
                vec![vec![view(vec![3..10], vec![]), View::all()]],
                "units 3..10 of 9",
            ),
            (
                vec![vec![view(vec![], vec![0..2]), View::all()]],
                "nothing says how far",
            ),
        ] {
            let found = check(lists).unwrap_err();
            assert!(found.contains(message), "{found}");
        }
        let columns = View {
            columns: vec![9],
            ..View::default()
        };
        let found = check(vec![vec![View::all(), columns]]).unwrap_err();
        assert!(found.contains("unit 9 of 9"), "{found}");
        assert!(Views::new(0, vec![fine()]).check(6, 2, &[9]).is_err());
        let placed = |places| Views::new(4, vec![fine()]).placed(places);
        assert_eq!(placed(vec![vec![0; 9]]).check(6, 2, &[9]), Ok(()));
        for places in [vec![], vec![vec![0; 8]], vec![vec![0; 9]; 2]] {
            let found = placed(places).check(6, 2, &[9]).unwrap_err();
            assert!(found.contains("positions of"), "{found}");
        }
        let last = placed(vec![vec![8]]);
        assert_eq!(last.check_places(Some(9)), Ok(()));
        let found = last.check_places(Some(8)).unwrap_err();
        assert!(found.contains("position 8 of 8"), "{found}");
        assert!(last.check_places(None).is_err());
    }
}
