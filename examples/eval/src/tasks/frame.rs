//! How a context and a question are put to a model: as plain text, or as the turns of a chat.

use serde::{Deserialize, Serialize};

/// The texts between what is read, asked and answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frame {
    /// What every text has to begin with: the beginning-of-text token where a model has one.
    pub begin: String,
    /// Before the first words of the user; includes `begin`.
    pub open: String,
    /// Between the context and a question in the same turn.
    pub ask: String,
    /// From the user's words to the answer.
    pub to_answer: String,
    /// From an answer to the user's next words.
    pub to_user: String,
    /// Whether these are the turns of a chat template.
    pub is_chat: bool,
}

/// Stand for the texts of a conversation while a chat template is taken apart. A template may trim
/// or test its messages, but has no reason to change these.
const MARKS: [&str; 3] = ["[[context]]", "[[answer]]", "[[question]]"];

impl Frame {
    /// Plain text for any model.
    pub fn plain(begin: &str) -> Self {
        Self {
            begin: begin.into(),
            open: begin.into(),
            ask: "\n\nQuestion: ".into(),
            to_answer: "\nAnswer: ".into(),
            to_user: "\n\n".into(),
            is_chat: false,
        }
    }

    /// The same for a conversation of several turns: in plain text the speakers are named.
    #[must_use]
    pub fn dialogue(&self) -> Self {
        if self.is_chat {
            return self.clone();
        }
        Self {
            open: format!("{}User: ", self.begin),
            to_answer: "\nAssistant: ".into(),
            to_user: "\nUser: ".into(),
            ..self.clone()
        }
    }

    /// The turns of a model's chat template, in texts that begin with `begin`. `render` gives the text of a conversation of
    /// (role, content) that ends where the assistant is to answer.
    ///
    /// # Errors
    /// Those of `render`; `Ok(None)` if the template does not hand the contents through.
    pub fn chat<E>(
        begin: &str,
        render: impl FnOnce(&[(&str, &str)]) -> Result<String, E>,
    ) -> Result<Option<Self>, E> {
        let [context, answer, question] = MARKS;
        let text = render(&[("user", context), ("assistant", answer), ("user", question)])?;
        let parts = text.split_once(context).and_then(|(open, rest)| {
            let (to_answer, rest) = rest.split_once(answer)?;
            let (to_user, last) = rest.split_once(question)?;
            Some((open, to_answer, to_user, last))
        });
        Ok(parts.map(|(open, _, to_user, last)| Self {
            begin: begin.into(),
            open: open.into(),
            ask: "\n\n".into(),
            // What follows the last question is what the model answers from; some templates write
            // earlier answers in another way.
            to_answer: last.into(),
            to_user: to_user.into(),
            is_chat: true,
        }))
    }

    /// The text from the end of a context to the beginning of an answer.
    pub fn query(&self, question: &str, opening: &str) -> String {
        [&self.ask, question, &self.to_answer, opening].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chat_template_is_taken_apart() {
        let render = |turns: &[(&str, &str)]| -> Result<String, ()> {
            let turns = turns.iter().map(|(r, c)| format!("<{r}>{c}</s>\n"));
            Ok(format!("SYS\n{}<assistant>", turns.collect::<String>()))
        };
        let frame = Frame::chat("", render).unwrap().unwrap();
        assert_eq!(frame.open, "SYS\n<user>");
        assert_eq!(frame.to_answer, "</s>\n<assistant>");
        assert_eq!(frame.to_user, "</s>\n<user>");
        assert_eq!(
            frame.query("Who?", "It is"),
            "\n\nWho?</s>\n<assistant>It is"
        );
    }

    #[test]
    fn a_template_that_swallows_its_messages_is_no_frame() {
        assert_eq!(Frame::chat("", |_| Ok::<_, ()>("fixed".into())), Ok(None));
        assert_eq!(Frame::chat("", |_| Err::<String, _>("bad")), Err("bad"));
    }
}
