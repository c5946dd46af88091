//! Words that keys and lists are made of.

use std::collections::BTreeSet;

/// Sorted lists of English words, one a line of their files.
#[derive(Debug, Clone)]
pub(super) struct Words {
    /// Nouns, adjectives and verbs, each once.
    pub(super) all: Vec<String>,
    /// `adjective-noun`.
    pub(super) pairs: Pairs,
}

fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim_end)
}

impl Words {
    pub(super) fn new(nouns: &str, adjectives: &str, verbs: &str) -> Self {
        let all: BTreeSet<&str> = [nouns, adjectives, verbs]
            .into_iter()
            .flat_map(lines)
            .collect();
        Self {
            all: all.into_iter().map(str::to_owned).collect(),
            pairs: Pairs::new(nouns, adjectives),
        }
    }
}

/// All `adjective-noun`, each once, as if they lay sorted in one list (of millions).
#[derive(Debug, Clone)]
pub(super) struct Pairs {
    nouns: Vec<String>,
    /// Where each group ends, and what is in it.
    groups: Vec<(usize, Group)>,
}

#[derive(Debug, Clone)]
enum Group {
    /// One adjective with every noun.
    Plain(String),
    /// Adjectives that begin with another one and a hyphen (`blue-eyed`), between whose pairs theirs lie.
    Mixed(Vec<String>),
}

impl Pairs {
    fn new(nouns: &str, adjectives: &str) -> Self {
        let nouns: BTreeSet<&str> = lines(nouns).collect();
        let begins: BTreeSet<String> = lines(adjectives).map(|a| format!("{a}-")).collect();
        let mut chains: Vec<Vec<String>> = Vec::new();
        for begin in begins {
            match chains.last_mut() {
                Some(chain) if begin.starts_with(&chain[0]) => chain.push(begin),
                _ => chains.push(vec![begin]),
            }
        }
        let (mut groups, mut end) = (Vec::with_capacity(chains.len()), 0);
        for mut chain in chains {
            let group = match (chain.pop(), chain.is_empty()) {
                (Some(only), true) => {
                    end += nouns.len();
                    Group::Plain(only)
                }
                (last, _) => {
                    let begins = chain.iter().chain(&last);
                    let pairs = begins.flat_map(|b| nouns.iter().map(move |n| format!("{b}{n}")));
                    let pairs: BTreeSet<String> = pairs.collect();
                    end += pairs.len();
                    Group::Mixed(pairs.into_iter().collect())
                }
            };
            groups.push((end, group));
        }
        Self {
            nouns: nouns.into_iter().map(str::to_owned).collect(),
            groups,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.groups.last().map_or(0, |(end, _)| *end)
    }

    /// The pair at a place of the sorted list; empty beyond its end.
    pub(super) fn get(&self, index: usize) -> String {
        let group = self.groups.partition_point(|(end, _)| *end <= index);
        let before = group.checked_sub(1).map_or(0, |g| self.groups[g].0);
        let at = index - before;
        match self.groups.get(group) {
            Some((_, Group::Plain(begin))) => format!("{begin}{}", self.nouns[at]),
            Some((_, Group::Mixed(pairs))) => pairs[at].clone(),
            None => String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_those_of_one_sorted_list() {
        let nouns = "sky\neyed-cat\nsea\neyed\nzoo\nsea\n";
        let adjectives = "blue\nblue-eyed\nred\nblue-eyed-red\n\nbl\n";
        let pairs = Pairs::new(nouns, adjectives);
        let all: BTreeSet<String> = lines(adjectives)
            .flat_map(|a| lines(nouns).map(move |n| format!("{a}-{n}")))
            .collect();
        let found: Vec<String> = (0..pairs.len()).map(|i| pairs.get(i)).collect();
        assert_eq!(found, all.into_iter().collect::<Vec<_>>());
        assert_eq!(pairs.get(pairs.len()), "");
    }
}
