//! Real texts to train on.

use super::Ordinary;
use crate::{
    Error, Result,
    corpus::{self, Essays, OnProgress},
};
use locret_models::FetchOptions;
use serde::Deserialize;
use std::collections::HashSet;

/// A passage with questions that were asked about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Passage {
    pub(super) text: String,
    /// (question, answer)
    pub(super) questions: Vec<(String, String)>,
}

/// Prose, and passages with real questions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrainingCorpus {
    pub(super) prose: Essays,
    /// Articles of passages that belong together.
    pub(super) articles: Vec<Vec<Passage>>,
    /// Groups of passages of which few answer the question.
    pub(super) puzzles: Vec<Vec<Passage>>,
    /// Code and other languages; nothing, unless it was fetched as well.
    pub(super) ordinary: Ordinary,
}

#[derive(Deserialize)]
struct EssayFile {
    text: String,
}

#[derive(Deserialize)]
struct Squad {
    data: Vec<SquadArticle>,
}

#[derive(Deserialize)]
struct SquadArticle {
    paragraphs: Vec<SquadParagraph>,
}

#[derive(Deserialize)]
struct SquadParagraph {
    context: String,
    qas: Vec<SquadQuestion>,
}

#[derive(Deserialize)]
struct SquadQuestion {
    question: String,
    answers: Vec<SquadAnswer>,
    #[serde(default)]
    is_impossible: bool,
}

#[derive(Deserialize)]
struct SquadAnswer {
    text: String,
}

#[derive(Deserialize)]
struct Hotpot {
    question: String,
    answer: String,
    context: Vec<(String, Vec<String>)>,
}

impl TrainingCorpus {
    /// The pinned texts of [`crate::corpus`].
    ///
    /// # Errors
    /// As [`corpus::text`] and [`TrainingCorpus::parse`].
    pub fn fetch(
        options: &FetchOptions,
        evaluation: &Essays,
        shown: OnProgress<'_>,
    ) -> Result<Self> {
        let text = |pinned| corpus::text(pinned, options, shown);
        let (essays, squad) = (text(&corpus::ESSAYS)?, text(&corpus::SQUAD)?);
        Self::parse(&essays, &squad, &text(&corpus::HOTPOT)?, evaluation)
    }

    /// The same with code and other languages, which [`Recipe::Reconstruct`](super::Recipe::Reconstruct) needs.
    #[must_use]
    pub fn with(self, ordinary: Ordinary) -> Self {
        Self { ordinary, ..self }
    }

    /// From the JSON of essays (`{"text"}`), SQuAD 2.0 and HotpotQA (distractor setting), without
    /// any sentence of the essays, any article and any passage that evaluation uses.
    ///
    /// # Errors
    /// [`Error::Usage`] for JSON of another form, or if nothing is left.
    pub fn parse(essays: &str, squad: &str, hotpot: &str, evaluation: &Essays) -> Result<Self> {
        let bad = |what: &str, e: serde_json::Error| Error::Usage(format!("{what}: {e}"));
        let essays: EssayFile = serde_json::from_str(essays).map_err(|e| bad("essays", e))?;
        let squad: Squad = serde_json::from_str(squad).map_err(|e| bad("SQuAD", e))?;
        let hotpot: Vec<Hotpot> = serde_json::from_str(hotpot).map_err(|e| bad("HotpotQA", e))?;
        let prose = Essays::from_texts([("essays".into(), essays.text)])?.without(evaluation)?;
        let passage = |p: SquadParagraph| Passage {
            text: p.context,
            questions: (p.qas.into_iter())
                .filter(|q| !q.is_impossible)
                .filter_map(|q| Some((q.question, q.answers.into_iter().next()?.text)))
                .collect(),
        };
        let articles = squad.data.into_iter().enumerate();
        let articles: Vec<Vec<Passage>> = articles
            .filter(|(i, _)| !corpus::evaluates_article(*i))
            .map(|(_, a)| a.paragraphs.into_iter().map(passage).collect())
            .filter(|a: &Vec<Passage>| !a.is_empty())
            .collect();
        let asked = hotpot.iter().enumerate();
        let asked = asked.filter(|(i, _)| corpus::evaluates_puzzle(*i));
        let theirs = asked.flat_map(|(_, h)| h.context.iter().map(|(title, _)| title.clone()));
        let theirs: HashSet<String> = theirs.collect();
        let own = hotpot.into_iter().enumerate().filter(|(i, h)| {
            let shared = h.context.iter().any(|(title, _)| theirs.contains(title));
            !corpus::evaluates_puzzle(*i) && !shared
        });
        let puzzles = own.map(|(_, h)| {
            let mut passages: Vec<Passage> = (h.context.into_iter())
                .map(|(title, sentences)| Passage {
                    text: format!("{title}\n{}", sentences.concat().trim()),
                    questions: Vec::new(),
                })
                .collect();
            if let Some(last) = passages.last_mut() {
                last.questions.push((h.question, h.answer));
            }
            passages
        });
        // An answer that the text does not have says nothing about what of the text matters.
        let puzzles: Vec<Vec<Passage>> = puzzles
            .filter(|p| {
                let answer = p
                    .last()
                    .and_then(|l| l.questions.first())
                    .map(|q| q.1.as_str());
                answer.is_some_and(|a| p.iter().any(|passage| passage.text.contains(a)))
            })
            .collect();
        if articles.is_empty() || puzzles.is_empty() {
            return Err(Error::Usage(
                "the corpus has no passages with questions".into(),
            ));
        }
        Ok(Self {
            prose,
            articles,
            puzzles,
            ordinary: Ordinary::default(),
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A small corpus of the three forms.
    pub(crate) fn small() -> TrainingCorpus {
        let essays: String = (0..400)
            .map(|i| {
                format!(
                    "Line {i} of the essay speaks of work and of play.{}",
                    [" ", "\\n\\n"][usize::from(i % 9 == 8)]
                )
            })
            .collect();
        let essays = format!("{{\"text\": \"{essays} Shared sentence here.\"}}");
        let paragraph = |k: usize| {
            format!(
                "{{\"context\": \"The river number {k} flows through the town of Place{k} and has \
                 many bridges over it.\", \"qas\": [{{\"question\": \"Through which town does \
                 river {k} flow?\", \"answers\": [{{\"text\": \"Place{k}\", \"answer_start\": 0}}], \
                 \"is_impossible\": false}}, {{\"question\": \"Why?\", \"answers\": [], \
                 \"is_impossible\": true}}]}}"
            )
        };
        let paragraphs: Vec<String> = (0..60).map(paragraph).collect();
        let squad = format!(
            "{{\"data\": [{{\"paragraphs\": [{}]}}]}}",
            paragraphs.join(",")
        );
        let puzzle = |k: usize| {
            format!(
                "{{\"question\": \"Who built number {k}?\", \"answer\": \"Builder{k}\", \
                 \"context\": [[\"House {k}\", [\"House {k} is old.\", \" Builder{k} built it.\"]], \
                 [\"Hill {k}\", [\"Hill {k} is high and green all over the year.\"]]]}}"
            )
        };
        let puzzles: Vec<String> = (0..90).map(puzzle).collect();
        let hotpot = format!(
            "[{}, {{\"question\": \"Yes?\", \"answer\": \"indeed\", \"context\": []}}]",
            puzzles.join(",")
        );
        let evaluation =
            Essays::from_texts([("e".into(), "Shared sentence here.".to_owned())]).unwrap();
        TrainingCorpus::parse(&essays, &squad, &hotpot, &evaluation).unwrap()
    }

    #[test]
    fn the_three_forms_are_read_and_evaluation_is_left_out() {
        let corpus = small();
        let sentences = corpus.prose.sentences();
        assert_eq!(sentences.len(), 400);
        assert!(!sentences.iter().any(|s| s.contains("Shared")));
        assert_eq!(corpus.articles[0].len(), 60);
        assert_eq!(
            corpus.articles[0][7].questions,
            [(
                "Through which town does river 7 flow?".into(),
                "Place7".into()
            )]
        );
        // One has no answer in its text, and every eighth is for evaluation.
        assert_eq!(corpus.puzzles.len(), 79);
        assert_eq!(
            corpus.puzzles[0][0].text,
            "House 0\nHouse 0 is old. Builder0 built it."
        );
        let none = Essays::from_texts([("e".into(), "A b.".to_owned())]).unwrap();
        assert!(TrainingCorpus::parse("{}", "{}", "[]", &none).is_err());
    }
}
