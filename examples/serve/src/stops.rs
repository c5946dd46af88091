//! Texts that end an answer.

/// Looks for texts that end an answer in what comes piece by piece, and holds back what may become one.
#[derive(Debug, Clone, Default)]
pub struct Stops {
    stops: Vec<String>,
    held: String,
    found: bool,
}

impl Stops {
    /// At most so many of them in one request, as OpenAI's interface has it.
    pub const MOST: usize = 4;
    /// Bytes of one at most.
    pub const LONGEST: usize = 512;

    /// None of `stops` may be empty.
    pub fn new(stops: Vec<String>) -> Self {
        Self {
            stops,
            ..Self::default()
        }
    }

    /// Whether one was found: nothing comes after it.
    pub fn found(&self) -> bool {
        self.found
    }

    /// Takes the next piece; returns what can be handed on, which ends before the first of the texts: the
    /// one that is whole first, however the text comes in pieces.
    pub fn push(&mut self, piece: &str) -> String {
        if self.found {
            return String::new();
        }
        self.held.push_str(piece);
        if let Some(at) = first(&self.held, &self.stops) {
            self.found = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop));
        let keep = keep.max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        std::mem::replace(&mut self.held, rest)
    }

    /// The end: what was held back.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Where the one of `stops` begins that is whole first in `text`; of several the longest.
fn first(text: &str, stops: &[String]) -> Option<usize> {
    let found = stops.iter().filter_map(|stop| {
        let at = text.find(stop)?;
        Some((at + stop.len(), at))
    });
    found.min().map(|(_, at)| at)
}

/// The longest end of `text`, in bytes, that `stop` begins with but is not all of.
fn overlap(text: &str, stop: &str) -> usize {
    let mut ends = stop.char_indices().map(|(at, _)| at).rev();
    ends.find(|at| text.ends_with(&stop[..*at])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn stops_are_found_across_pieces_and_the_first_one_counts() {
        let mut stops = Stops::new(vec!["\n\n".into(), "END".into()]);
        assert_eq!(stops.push("one E"), "one ");
        assert_eq!(stops.push("N"), "");
        assert_eq!(stops.push("d\n"), "ENd");
        assert_eq!(stops.push("two EN"), "\ntwo ");
        assert_eq!(stops.push("D more\n\n"), "");
        assert!(stops.found());
        assert_eq!(stops.push("more") + &stops.finish(), "");
        let mut stops = Stops::new(vec!["é€".into()]);
        assert_eq!(stops.push("aé"), "a");
        assert_eq!(stops.finish(), "é");
    }

    proptest! {
        #[test]
        fn pieces_give_what_the_whole_text_gives(
            pieces in prop::collection::vec("[ab€]{0,3}", 0..12),
            stops in prop::collection::vec("[ab€]{1,4}", 0..4),
        ) {
            let whole = pieces.concat();
            // Letter by letter: the text ends as soon as it ends with one of them.
            let mut letters = whole.char_indices().map(|(at, letter)| at + letter.len_utf8());
            let end = letters.find_map(|to| {
                let ends = stops.iter().filter(|stop| whole[..to].ends_with(&**stop));
                ends.map(|stop| to - stop.len()).min()
            });
            let mut found = Stops::new(stops);
            let mut text = String::new();
            for piece in &pieces {
                text += &found.push(piece);
            }
            text += &found.finish();
            prop_assert_eq!(found.found(), end.is_some());
            prop_assert_eq!(text, &whole[..end.unwrap_or(whole.len())]);
        }
    }
}
