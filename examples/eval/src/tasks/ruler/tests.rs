//! Against the original's generators and scorers (`golden/ruler.py`), and what samples have to be.

use super::{
    KINDS, Sample, Shape,
    prompts::{Prompt, Prompts},
    sources::{Inputs, Questions, Ruler},
    text,
    words::Words,
};
use crate::{
    Result,
    files::sha256,
    tasks::{self, Frame, Judge, Recipe, Rule, Texts, words::FILLER},
};
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;

const GOLDEN: &str = include_str!("golden/ruler.json");

#[derive(Deserialize)]
struct Golden {
    nouns: Vec<String>,
    adjectives: Vec<String>,
    verbs: Vec<String>,
    essay: String,
    squad: Value,
    hotpot: Value,
    templates: BTreeMap<String, [String; 2]>,
    needle: String,
    filler: String,
    cases: Vec<Case>,
    scores: Vec<Score>,
}

#[derive(Deserialize)]
struct Case {
    task: String,
    seed: u32,
    size: usize,
    sha256: String,
    answers: Vec<String>,
    #[serde(default)]
    example: usize,
    #[serde(default)]
    tokens: usize,
    #[serde(default)]
    index: usize,
}

#[derive(Deserialize)]
struct Score {
    answer: String,
    references: Vec<String>,
    all: f64,
    any: f64,
}

fn golden() -> Golden {
    serde_json::from_str(GOLDEN).unwrap()
}

fn inputs(golden: &Golden) -> Inputs {
    let prompt = |task: &str| Prompt {
        template: golden.templates[task][0].clone(),
        prefix: golden.templates[task][1].clone(),
        generate: 10,
    };
    let lines = |words: &[String]| words.join("\n");
    Inputs {
        prompts: Prompts {
            needles: prompt("niah"),
            variables: prompt("variable_tracking"),
            common: prompt("common_words_extraction"),
            frequent: prompt("freq_words_extraction"),
            questions: prompt("qa"),
            needle: golden.needle.clone(),
            filler: golden.filler.clone(),
            // Which is the original's own.
            noise: format!("{FILLER}\n"),
            document: "Document {i}:\n{document}".into(),
        },
        words: Words::new(
            &lines(&golden.nouns),
            &lines(&golden.adjectives),
            &lines(&golden.verbs),
        ),
        essays: golden.essay.split_whitespace().map(str::to_owned).collect(),
        articles: Some(Questions::squad(&golden.squad.to_string(), |_| true).unwrap()),
        puzzles: Some(Questions::hotpot(&golden.hotpot.to_string(), |_| true).unwrap()),
    }
}

fn shape(task: &str) -> Shape {
    let names = tasks::Kind::RULER.map(tasks::Kind::name);
    let at = names.iter().position(|name| *name == task).unwrap();
    KINDS[at].0
}

#[test]
fn texts_are_those_of_the_original_for_the_same_seeds_and_sizes() {
    let golden = golden();
    let inputs = inputs(&golden);
    let mut tasks: Vec<&str> = Vec::new();
    for case in &golden.cases {
        let Case { seed, size, .. } = *case;
        let shape = shape(&case.task);
        let sample = match shape {
            Shape::Needles(task) => text::needles(&inputs, &task, seed, size),
            Shape::Variables => text::variables(&inputs, seed, [case.example, size]),
            Shape::CommonWords => text::common_words(&inputs, case.tokens, seed, size),
            Shape::FrequentWords => text::frequent_words(&inputs, case.tokens, seed, size),
            Shape::Articles | Shape::Puzzles => {
                let set = inputs.questions(shape).unwrap();
                text::questions(set, &inputs.prompts, seed, case.index, size)
            }
        };
        let Sample {
            context,
            question,
            references,
            ..
        } = &sample;
        let what = format!("{}, seed {seed}, size {size}", case.task);
        assert_eq!(*references, case.answers, "{what}");
        let text = sample.whole();
        assert_eq!(sha256(text.as_bytes()), case.sha256, "{what}:\n{text}");
        // What is asked stands behind what is read; a worked example asks as well.
        let shown = matches!(shape, Shape::Variables | Shape::CommonWords);
        assert!(shown || !context.contains(question.as_str()), "{what}");
        tasks.push(&case.task);
    }
    tasks.dedup();
    assert_eq!(tasks, tasks::Kind::RULER.map(tasks::Kind::name));
}

#[test]
fn scores_are_those_of_the_original() {
    let golden = golden();
    assert!(golden.scores.len() >= 30);
    for score in golden.scores {
        for (rule, expected) in [(Rule::All, score.all), (Rule::Any, score.any)] {
            let judge = Judge::new(rule, score.references.clone(), 1);
            // Theirs are percents with two digits.
            let found = 100.0 * judge.score(&score.answer);
            let what = format!("{rule:?} of {:?} in {:?}", score.references, score.answer);
            assert!(
                (found - expected).abs() < 0.005 + 1e-9,
                "{what}: {found} for {expected}"
            );
        }
    }
}

/// Words, and every other character on its own.
fn count(text: &str) -> Result<usize> {
    Ok(text.split_whitespace().count() + text.matches(['.', '-', ':']).count())
}

#[test]
fn samples_are_as_long_as_they_may_be_and_have_their_answers() {
    let inputs = inputs(&golden());
    let generate = 10;
    let essays = crate::corpus::Essays::from_texts([("e".into(), "A sentence.".into())]).unwrap();
    let texts = Texts {
        essays,
        ruler: Some(Ruler::of(inputs)),
    };
    let render = |turns: &[(&str, &str)]| -> Result<String> {
        let turns = turns.iter().map(|(r, c)| format!("<|{r}|> {c} <|end|>"));
        Ok(format!("{}<|assistant|>", turns.collect::<String>()))
    };
    for frame in [
        Frame::plain("<s>"),
        Frame::chat("<s>", render).unwrap().unwrap(),
    ] {
        let recipe = |tokens| Recipe {
            kinds: tasks::Kind::RULER.to_vec(),
            tokens,
            samples: 3,
            seed: 5,
        };
        let made = recipe(900).generate_from(&frame, &texts, &count).unwrap();
        assert_eq!(
            made,
            recipe(900).generate_from(&frame, &texts, &count).unwrap()
        );
        assert_eq!(made.len(), 39);
        // There are too few documents for several texts of them.
        let drawn = made.iter().filter(|task| !task.task.starts_with("qa_"));
        let mut contexts: Vec<&str> = drawn.map(|task| task.context.as_str()).collect();
        for task in &made {
            let [query] = &task.queries[..] else {
                panic!("{} questions", task.queries.len());
            };
            let judge = query.judge.as_ref().unwrap();
            assert_eq!(judge.tokens, generate);
            let n = count(&task.context).unwrap() + count(&query.query).unwrap() + generate;
            // Small lists of words, articles and essays end before.
            let ends = ["cwe", "qa_1", "qa_2"].contains(&task.task.as_str());
            assert!(n <= 900 && (ends || n > 900 - 60), "{}: {n}", task.id);
            for reference in &judge.references {
                let there = task.context.contains(reference);
                // One of the right answers is enough.
                assert!(there || judge.rule == Rule::Any, "{}: {reference}", task.id);
                assert!(!query.query.contains(reference) || judge.rule == Rule::Any);
            }
            assert!(
                (judge.score(&query.answer) - 1.0).abs() < 1e-9,
                "{}",
                task.id
            );
            assert!(judge.score("Nothing of the kind.") < 1e-9);
            assert_eq!(frame.is_chat, query.query.contains("<|assistant|>"));
        }
        contexts.sort_unstable();
        contexts.dedup();
        assert_eq!(contexts.len(), 33);
        let error = recipe(20)
            .generate_from(&frame, &texts, &count)
            .unwrap_err();
        assert!(error.to_string().contains("20 tokens"), "{error}");
        let without = recipe(900)
            .generate(&frame, &texts.essays, &count)
            .unwrap_err();
        assert!(without.to_string().contains("niah_single_1"), "{without}");
    }
}
