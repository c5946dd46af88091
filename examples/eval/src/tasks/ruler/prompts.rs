//! RULER's prompts, as its own source files have them.

use crate::{Error, Result};

/// What is put around a context, and how long an answer may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Prompt {
    /// With `{context}`, `{query}` and others of their names.
    pub(super) template: String,
    /// How the answer begins.
    pub(super) prefix: String,
    /// Tokens that are generated.
    pub(super) generate: usize,
}

/// All texts that samples are made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Prompts {
    pub(super) needles: Prompt,
    pub(super) variables: Prompt,
    pub(super) common: Prompt,
    pub(super) frequent: Prompt,
    pub(super) questions: Prompt,
    /// The statement about a key.
    pub(super) needle: String,
    /// What is repeated around needles.
    pub(super) filler: String,
    /// What is repeated around assignments.
    pub(super) noise: String,
    /// A document and its number.
    pub(super) document: String,
}

impl Prompts {
    /// From the sources of the generators: `constants.py`, `niah.py`, `variable_tracking.py`, `qa.py`.
    ///
    /// # Errors
    /// [`Error::Usage`] that names what was not found.
    pub(super) fn parse(constants: &str, niah: &str, tracking: &str, qa: &str) -> Result<Self> {
        let prompt = |task: &str| -> Result<Prompt> {
            let (_, block) = constants
                .split_once(&format!("'{task}'"))
                .ok_or_else(|| missing(task))?;
            let number = after(block, "'tokens_to_generate':")?;
            let digits = number.trim_start();
            let end = digits.find(|c: char| !c.is_ascii_digit());
            let generate = digits[..end.unwrap_or(digits.len())].parse();
            Ok(Prompt {
                template: literal(after(block, "'template':")?)?,
                prefix: literal(after(block, "'answer_prefix':")?)?,
                generate: generate.map_err(|_| missing("tokens_to_generate"))?,
            })
        };
        Ok(Self {
            needles: prompt("niah")?,
            variables: prompt("variable_tracking")?,
            common: prompt("common_words_extraction")?,
            frequent: prompt("freq_words_extraction")?,
            questions: prompt("qa")?,
            needle: literal(after(niah, "\nneedle =")?)?,
            filler: literal(after(niah, "== 'repeat':\n    haystack =")?)?,
            noise: literal(after(tracking, "\n    noise =")?)?,
            document: literal(after(qa, "\nDOCUMENT_PROMPT =")?)?,
        })
    }
}

fn missing(what: &str) -> Error {
    Error::Usage(format!("RULER's sources have no {:?}", what.trim()))
}

/// What follows `begin`.
fn after<'a>(text: &'a str, begin: &str) -> Result<&'a str> {
    let rest = text.split_once(begin).map(|(_, rest)| rest);
    rest.ok_or_else(|| missing(begin))
}

/// The string literal of Python that a text begins with.
fn literal(text: &str) -> Result<String> {
    let text = text.trim_start();
    let quote = if text.starts_with("\"\"\"") {
        "\"\"\""
    } else {
        "\""
    };
    let inner = text.strip_prefix(quote).and_then(|t| t.split_once(quote));
    let (inner, _) = inner.ok_or_else(|| missing("text in quotation marks"))?;
    Ok(inner.replace("\\n", "\n"))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Sources in the form of the original's, with other words.
    pub(crate) fn small() -> Prompts {
        let task = |name: &str, template: &str, prefix: &str, n: usize| {
            format!(
                "    '{name}': {{\n        'tokens_to_generate': {n}, \n        'template': \
                 \"\"\"{template}\"\"\",\n        'answer_prefix': \"\"\"{prefix}\"\"\",\n    }},\n"
            )
        };
        let constants = [
            "TASKS = {\n".to_owned(),
            task(
                "niah",
                "Some {type_needle_v} are here.\\n{context}\\nWhat are all {type_needle_v} of {query}?",
                " The {type_needle_v} of {query} are",
                12,
            ),
            task(
                "variable_tracking",
                "Track what follows closely.\\n\\n{context}\\nQuestion: Which have {query}?",
                " Answer: There are {num_v} with {query}, they are: ",
                9,
            ),
            task(
                "common_words_extraction",
                "A list:\\n{context}\\nQuestion: Which are common?",
                " Answer: These:",
                15,
            ),
            task(
                "freq_words_extraction",
                "Coded. {context}\\nQuestion: Which three?",
                " Answer: These:",
                11,
            ),
            task(
                "qa",
                "Read.\\n\\n{context}\\n\\nQuestion: {query}",
                " Answer:",
                8,
            ),
        ]
        .concat();
        let niah = "x\nneedle = \"One {type_needle_v} for {key} is: {value}.\"\nif a:\n    haystack = \
                    essay\nelif kind == 'repeat':\n    haystack = \"It is green. It goes on.\"\n";
        let tracking = "def f():\n    noise = \"It is green. It goes on.\\n\"\n";
        let qa = "\nDOCUMENT_PROMPT = \"Document {i}:\\n{document}\"\n";
        Prompts::parse(&constants, niah, tracking, qa).unwrap()
    }

    #[test]
    fn sources_are_read() {
        let prompts = small();
        assert_eq!(prompts.needles.generate, 12);
        assert_eq!(
            prompts.needles.template,
            "Some {type_needle_v} are here.\n{context}\nWhat are all {type_needle_v} of {query}?"
        );
        assert_eq!(prompts.questions.prefix, " Answer:");
        assert_eq!(prompts.needle, "One {type_needle_v} for {key} is: {value}.");
        assert_eq!(prompts.filler, "It is green. It goes on.");
        assert_eq!(prompts.noise, "It is green. It goes on.\n");
        assert_eq!(prompts.document, "Document {i}:\n{document}");
        let error = Prompts::parse("", "", "", "").unwrap_err().to_string();
        assert!(error.contains("niah"), "{error}");
    }
}
