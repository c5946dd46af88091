//! The texts of RULER's samples, from a seed and a size. Each does what the generator of its kind does, draw
//! by draw.

use super::{
    Inputs, Rule, Sample,
    prompts::{Prompt, Prompts},
    python::Python,
    sources::Questions,
};

/// The seed that the original shuffles with, whatever else it draws with.
const SHUFFLE: u64 = 42;

/// Depths at which needles can lie, in percent: 40, evenly from 0 to 100, rounded to even.
fn depths() -> Vec<usize> {
    (0..40)
        .map(|i| (f64::from(i) * 100.0 / 39.0).round_ties_even() as usize)
        .collect()
}

/// What is drawn for a needle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Type {
    Words,
    Numbers,
    Uuids,
}

impl Type {
    fn name(self) -> &'static str {
        match self {
            Self::Words => "words",
            Self::Numbers => "numbers",
            Self::Uuids => "uuids",
        }
    }

    fn draw(self, inputs: &Inputs, rng: &mut Python) -> String {
        match self {
            Self::Words => inputs.words.pairs.get(rng.below(inputs.words.pairs.len())),
            Self::Numbers => (1_000_000 + rng.below(9_000_000)).to_string(),
            Self::Uuids => {
                let bits = rng.bits(128) & !(0xc000 << 48) & !(0xf000 << 64);
                let hex = format!("{:032x}", bits | 0x8000 << 48 | 4 << 76);
                let parts = [
                    &hex[..8],
                    &hex[8..12],
                    &hex[12..16],
                    &hex[16..20],
                    &hex[20..],
                ];
                parts.join("-")
            }
        }
    }
}

/// What needles lie in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Haystack {
    Filler,
    Essays,
    Needles,
}

/// A needle task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Needles {
    pub(super) haystack: Haystack,
    pub(super) keys: Type,
    pub(super) values: Type,
    /// Keys, values of each, and keys that are asked for.
    pub(super) counts: [usize; 3],
}

/// Sentences of a text whose words have single spaces between them.
pub(super) fn sentences(text: &str) -> Vec<&str> {
    let ends = text.match_indices(' ').map(|(at, _)| at);
    let ends = ends.filter(|at| text[..*at].ends_with(['.', '?', '!']));
    let mut begin = 0;
    let mut all = Vec::new();
    for end in ends.chain([text.len()]) {
        all.push(&text[begin..end]);
        begin = end + 1;
    }
    all
}

/// A template around its context: before it and after it.
fn halves(template: &str) -> (String, String) {
    let (before, after) = template.split_once("{context}").unwrap_or((template, ""));
    (before.to_owned(), after.to_owned())
}

fn filled(text: &str, values: &[(&str, &str)]) -> String {
    let mut text = text.to_owned();
    for (name, value) in values {
        text = text.replace(&format!("{{{name}}}"), value);
    }
    text
}

/// A prompt's parts around a context.
fn sample(
    prompt: &Prompt,
    context: &str,
    values: &[(&str, &str)],
    references: Vec<String>,
) -> Sample {
    let (before, after) = halves(&prompt.template);
    Sample {
        context: filled(&before, values) + context,
        question: filled(&after, values),
        opening: filled(&prompt.prefix, values),
        references,
        rule: Rule::All,
        generate: prompt.generate,
    }
}

pub(super) fn needles(inputs: &Inputs, task: &Needles, seed: u32, size: usize) -> Sample {
    let mut rng = Python::new(seed.into());
    let [keys, each, asked] = task.counts;
    let statement = |key: &str, value: &str| {
        let values = [
            ("type_needle_v", task.values.name()),
            ("key", key),
            ("value", value),
        ];
        filled(&inputs.prompts.needle, &values)
    };
    let mut pairs: Vec<(String, Vec<String>)> = Vec::new();
    let mut planted = Vec::new();
    for _ in 0..keys.max(asked) {
        let key = task.keys.draw(inputs, &mut rng);
        let values: Vec<String> = (0..each)
            .map(|_| task.values.draw(inputs, &mut rng))
            .collect();
        planted.extend(values.iter().map(|value| statement(&key, value)));
        pairs.push((key, values));
    }
    Python::new(SHUFFLE).shuffle(&mut planted);
    let context = match task.haystack {
        Haystack::Essays => {
            let words = size.min(inputs.essays.len());
            let text = inputs.essays[..words].join(" ");
            let sentences = sentences(text.trim());
            let depths = depths();
            let chosen = rng.sample(depths.len(), planted.len()).into_iter();
            let mut places: Vec<usize> = chosen
                .map(|i| (sentences.len() as f64 * (depths[i] as f64 / 100.0)) as usize)
                .collect();
            places.sort_unstable();
            let mut parts = Vec::new();
            let mut begin = 0;
            for (place, needle) in places.iter().zip(&planted) {
                parts.extend([sentences[begin..*place].join(" "), needle.clone()]);
                begin = *place;
            }
            parts.push(sentences[begin..].join(" "));
            parts.join(" ")
        }
        Haystack::Filler | Haystack::Needles => {
            let mut lines: Vec<String> = match task.haystack {
                Haystack::Filler => vec![inputs.prompts.filler.clone(); size],
                _ => (0..size)
                    .map(|_| {
                        let key = task.keys.draw(inputs, &mut rng);
                        statement(&key, &task.values.draw(inputs, &mut rng))
                    })
                    .collect(),
            };
            let mut places = rng.sample(size, planted.len());
            places.sort_unstable_by(|a, b| b.cmp(a));
            for (place, needle) in places.into_iter().zip(planted) {
                lines.insert(place, needle);
            }
            lines.join("\n")
        }
    };
    let queried = rng.sample(pairs.len(), asked);
    let names: Vec<&str> = queried.iter().map(|i| pairs[*i].0.as_str()).collect();
    let query = match names.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{}, and {last}", rest.join(", ")),
        _ => names.concat(),
    };
    let references = queried.iter().flat_map(|i| pairs[*i].1.clone()).collect();
    let mut prompt = inputs.prompts.needles.clone();
    let mut values = task.values.name();
    if asked * each == 1 {
        for text in [&mut prompt.template, &mut prompt.prefix] {
            for (from, to) in [
                ("Some", "A"),
                ("are all", "is"),
                ("are", "is"),
                ("answers", "answer"),
            ] {
                *text = text.replace(from, to);
            }
        }
        values = &values[..values.len() - 1];
    }
    let values = [("type_needle_v", values), ("query", query.as_str())];
    sample(&prompt, &context, &values, references)
}

/// Assignments of one chain: each variable but the first is that before it.
const HOPS: usize = 4;

/// One chain of assignments in noise: the sample, and how its text goes on in an example.
fn chain(inputs: &Inputs, rngs: &mut [Python; 2], size: usize, letters: usize) -> (Sample, String) {
    let [rng, numpy] = rngs;
    let mut names: Vec<String> = Vec::new();
    while names.len() <= HOPS {
        let name = rng.letters(b'A', letters);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let value = numpy.randint(10_000, 99_999).to_string();
    let mut assignments = vec![format!("VAR {} = {value}", names[0])];
    let hops = names.windows(2);
    assignments.extend(hops.map(|pair| format!("VAR {} = VAR {} ", pair[1], pair[0])));
    let noise = &inputs.prompts.noise;
    let mut lines = vec![noise.clone(); size];
    if lines.len() <= assignments.len() {
        let pieces = lines.iter().flat_map(|line| line.split('.'));
        lines = pieces
            .map(|piece| match piece.trim().is_empty() {
                true => piece.to_owned(),
                false => format!("{piece}."),
            })
            .collect();
    }
    let mut places = rng.sample(lines.len(), assignments.len());
    places.sort_unstable();
    for (i, (place, assignment)) in places.into_iter().zip(assignments).enumerate() {
        lines.insert(place + i, assignment);
    }
    let context = lines.join(" ").replace(". \n", ".\n");
    let count = (HOPS + 1).to_string();
    let values = [("query", value.as_str()), ("num_v", count.as_str())];
    let answer = names.join(" ");
    (
        sample(&inputs.prompts.variables, &context, &values, names),
        answer,
    )
}

/// Tokens that the worked example of variables may have, with what would be generated.
pub(super) const EXAMPLE: usize = 500;

/// The worked example alone, of `size` lines of noise.
pub(super) fn example(inputs: &Inputs, seed: u32, size: usize) -> String {
    let mut rngs = [Python::new(seed.into()), Python::numpy(seed)];
    let (shown, answer) = chain(inputs, &mut rngs, size, 3);
    shown.whole() + " " + &answer
}

pub(super) fn variables(inputs: &Inputs, seed: u32, [example, size]: [usize; 2]) -> Sample {
    let mut rngs = [Python::new(seed.into()), Python::numpy(seed)];
    let (shown, answer) = chain(inputs, &mut rngs, example, 3);
    let (mut sample, _) = chain(inputs, &mut rngs, size, 5);
    let mut shown = format!("{} {answer}\n\n", shown.whole());
    // Others of its variables in every sample.
    for name in answer.split(' ') {
        shown = shown.replace(name, &rngs[0].letters(b'A', name.len()));
    }
    sample.context = format!(" {shown}\n\n{}", sample.context);
    sample
}

/// How often common words and others come, and how many words an example has: for contexts below 4,096 tokens
/// and for others.
fn repeats(tokens: usize) -> ([usize; 3], [usize; 2]) {
    match tokens < 4096 {
        true => ([20, 3, 1], [6, 1]),
        false => ([40, 10, 3], [30, 3]),
    }
}

/// Common words of a list.
const COMMON: usize = 10;

pub(super) fn common_words(inputs: &Inputs, tokens: usize, seed: u32, size: usize) -> Sample {
    let mut words = inputs.words.all.clone();
    Python::new(SHUFFLE).shuffle(&mut words);
    let mut rng = Python::new(seed.into());
    let numbered = |list: &[&str]| {
        let lines = list.iter().enumerate();
        let lines = lines.map(|(i, word)| format!("{}. {word}", i + 1));
        lines.collect::<Vec<_>>().join(" ")
    };
    let mut list = |n: usize, common: usize, others: usize| {
        let chosen = rng.sample(words.len(), n).into_iter();
        let chosen: Vec<&str> = chosen.map(|i| words[i].as_str()).collect();
        let (first, rest) = chosen.split_at(COMMON.min(chosen.len()));
        let mut all = [first.repeat(common), rest.repeat(others)].concat();
        Python::new(SHUFFLE).shuffle(&mut all);
        (numbered(&all), first.to_vec())
    };
    let ([n, common, others], repeats) = repeats(tokens);
    let (shown, answer) = list(n, common, others);
    let (context, references) = list(size, repeats[0], repeats[1]);
    let references = references.into_iter().map(str::to_owned).collect();
    let prompt = &inputs.prompts.common;
    let shown = sample(prompt, &shown, &[], Vec::new());
    let mut sample = sample(prompt, &context, &[], references);
    let before = shown.whole() + &numbered(&answer);
    sample.context = format!("{before}\n{}", sample.context);
    sample
}

/// Letters of a coded word.
const CODED: usize = 6;

pub(super) fn frequent_words(inputs: &Inputs, tokens: usize, seed: u32, size: usize) -> Sample {
    let mut rng = Python::new(seed.into());
    let mut words = std::collections::BTreeSet::new();
    while words.len() < tokens / 50 {
        words.insert(rng.letters(b'a', CODED));
    }
    let mut words: Vec<String> = words.into_iter().collect();
    Python::new(SHUFFLE).shuffle(&mut words);
    if let Some(most) = words.first_mut() {
        *most = "...".into();
    }
    // Zipf's law with exponent 2.
    let zeta = std::f64::consts::PI.powi(2) / 6.0;
    let times = |rank: usize| (size as f64 * ((rank + 1) as f64).powi(-2) / zeta) as usize;
    let all = words.iter().enumerate();
    let mut text: Vec<&str> = all
        .flat_map(|(rank, word)| std::iter::repeat_n(word.as_str(), times(rank)))
        .collect();
    Python::new(SHUFFLE).shuffle(&mut text);
    let references = words.iter().skip(1).take(3).cloned().collect();
    sample(&inputs.prompts.frequent, &text.join(" "), &[], references)
}

pub(super) fn questions(
    set: &Questions,
    prompts: &Prompts,
    seed: u32,
    index: usize,
    size: usize,
) -> Sample {
    let mut rng = Python::new(seed.into());
    let question = &set.questions[index];
    let mut chosen = question.documents.clone();
    if size < set.documents.len() {
        let more = size.saturating_sub(chosen.len());
        if more > question.related.len() {
            chosen.extend(&question.related);
            let others: Vec<usize> = (0..set.documents.len())
                .filter(|i| !chosen.contains(i))
                .collect();
            let more = rng.sample(others.len(), more - question.related.len());
            chosen.extend(more.into_iter().map(|i| others[i]));
        } else {
            let more = rng.sample(question.related.len(), more);
            chosen.extend(more.into_iter().map(|i| question.related[i]));
        }
    } else {
        chosen = (0..set.documents.len()).collect();
    }
    Python::new(SHUFFLE).shuffle(&mut chosen);
    let documents = chosen.iter().enumerate().map(|(i, document)| {
        let number = (i + 1).to_string();
        let values = [
            ("i", number.as_str()),
            ("document", set.documents[*document].as_str()),
        ];
        filled(&prompts.document, &values)
    });
    let context = documents.collect::<Vec<_>>().join("\n\n");
    let values = [("query", question.question.as_str())];
    let sample = sample(
        &prompts.questions,
        &context,
        &values,
        question.answers.clone(),
    );
    Sample {
        rule: Rule::Any,
        ..sample
    }
}
