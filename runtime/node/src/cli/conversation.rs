//! The pure part of `chat`: what a typed line means, and the messages that make up the conversation.

use understudy_protocol::message::ChatMessage;

/// What a line asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Line {
    /// Text for the model.
    Say(String),
    /// Forget the conversation.
    Reset,
    /// Leave.
    Quit,
    /// Show the commands.
    Help,
    /// A command that does not exist.
    Unknown(String),
    /// White space only.
    Empty,
}

/// The commands, for `/help`.
pub const HELP: &str = "/reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer, // begins a message with a slash";

impl Line {
    /// Reads one line, without its newline.
    pub fn parse(line: &str) -> Self {
        match line.trim() {
            "" => Self::Empty,
            "/reset" => Self::Reset,
            "/quit" | "/exit" => Self::Quit,
            "/help" | "/?" => Self::Help,
            text if text.starts_with("//") => Self::Say(text[1..].to_owned()),
            text if text.starts_with('/') => Self::Unknown(text.to_owned()),
            text => Self::Say(text.to_owned()),
        }
    }
}

/// The messages so far. User and assistant alternate, beginning with the user, after the system message.
#[derive(Debug, Clone, Default)]
pub struct Conversation {
    system: Option<String>,
    turns: Vec<ChatMessage>,
}

fn message(role: &str, content: impl Into<String>) -> ChatMessage {
    ChatMessage {
        role: role.to_owned(),
        content: content.into(),
    }
}

impl Conversation {
    /// An empty conversation, with a system message where there is one.
    pub fn new(system: Option<String>) -> Self {
        Self {
            system,
            turns: Vec::new(),
        }
    }

    /// Everything to send if the user says `text` now. Nothing is kept until [`Self::keep`].
    pub fn with(&self, text: &str) -> Vec<ChatMessage> {
        let system = self.system.iter().map(|text| message("system", text));
        let next = std::iter::once(message("user", text));
        system
            .chain(self.turns.iter().cloned())
            .chain(next)
            .collect()
    }

    /// Keeps a question with its answer, which may be cut short. A question without any answer is forgotten, so that
    /// roles go on alternating.
    pub fn keep(&mut self, question: String, answer: String) {
        if !answer.is_empty() {
            self.turns.push(message("user", question));
            self.turns.push(message("assistant", answer));
        }
    }

    /// Forgets everything but the system message.
    pub fn reset(&mut self) {
        self.turns.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_text_or_commands() {
        assert_eq!(Line::parse("  hello \r"), Line::Say("hello".to_owned()));
        assert_eq!(Line::parse("//quit"), Line::Say("/quit".to_owned()));
        assert_eq!(Line::parse("/reset"), Line::Reset);
        assert_eq!(Line::parse(" /quit "), Line::Quit);
        assert_eq!(Line::parse("/help"), Line::Help);
        assert_eq!(Line::parse("/rest"), Line::Unknown("/rest".to_owned()));
        assert_eq!(Line::parse(" \t"), Line::Empty);
    }

    #[test]
    fn the_history_alternates_and_can_be_forgotten() {
        let mut talk = Conversation::new(Some("be brief".to_owned()));
        let roles = |messages: Vec<ChatMessage>| -> Vec<String> {
            messages
                .into_iter()
                .map(|m| format!("{}:{}", m.role, m.content))
                .collect()
        };
        assert_eq!(roles(talk.with("a")), ["system:be brief", "user:a"]);
        talk.keep("a".to_owned(), "A".to_owned());
        talk.keep("unanswered".to_owned(), String::new());
        assert_eq!(
            roles(talk.with("b")),
            ["system:be brief", "user:a", "assistant:A", "user:b"]
        );
        talk.reset();
        assert_eq!(roles(talk.with("c")), ["system:be brief", "user:c"]);
    }
}
