//! What a caller submits, and the events that come back.

use understudy_protocol::RequestId;
use understudy_protocol::message::{
    ChatMessage, FinishReason, Input, Sampling, Submit, TokenEvent, TopLogprob, Usage,
};

/// A request for a completion: the parts of a `submit` that are the caller's.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Name of a deployed model; may be left out where the cluster serves one only.
    pub model: Option<String>,
    pub input: Input,
    pub sampling: Sampling,
    /// Text that ends the request when it appears in the output.
    pub stop: Vec<String>,
    /// Whether the text of a matched stop string is sent too.
    pub include_stop: bool,
    /// Milliseconds until the request ends with `deadline_exceeded`.
    pub deadline_ms: Option<u64>,
    /// Requests with a higher one go first where an engine has not room for all.
    pub priority: i32,
}

impl Request {
    /// A request with everything but the input left to the server.
    pub fn new(input: Input) -> Self {
        Self {
            model: None,
            input,
            sampling: Sampling::default(),
            stop: Vec::new(),
            include_stop: false,
            deadline_ms: None,
            priority: 0,
        }
    }

    /// Completes text.
    pub fn prompt(text: impl Into<String>) -> Self {
        Self::new(Input::Prompt(text.into()))
    }

    /// Completes token ids.
    pub fn token_ids(ids: impl Into<Vec<u32>>) -> Self {
        Self::new(Input::TokenIds(ids.into()))
    }

    /// Goes on with a conversation: the assistant's next turn.
    pub fn messages(messages: impl Into<Vec<ChatMessage>>) -> Self {
        Self::new(Input::Messages(messages.into()))
    }

    /// Begins a conversation with one message of the user.
    pub fn chat(content: impl Into<String>) -> Self {
        Self::messages([ChatMessage {
            role: "user".to_owned(),
            content: content.into(),
        }])
    }

    pub(crate) fn to_submit(&self, stream: u32, credit: u32, resumable: bool) -> Submit {
        Submit {
            stream,
            model: self.model.clone(),
            input: self.input.clone(),
            sampling: self.sampling.clone(),
            stop: self.stop.clone(),
            include_stop: self.include_stop,
            deadline_ms: self.deadline_ms,
            resumable,
            credit,
            priority: self.priority,
        }
    }
}

/// What a stream yields.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// First event, once.
    Accepted(Accepted),
    Token(Token),
    /// Last event, once.
    Finished(Finished),
}

/// The request has a log in the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Accepted {
    /// Knowing it is the permission to resume the request.
    pub request: RequestId,
    pub prompt_tokens: u32,
    /// The seed in use, whether given or drawn.
    pub seed: u64,
}

/// One token.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    /// Output position, counted from 0.
    pub position: u32,
    pub id: u32,
    /// The text that this token completes, possibly empty.
    pub text: String,
    pub logprob: Option<f32>,
    pub top_logprobs: Vec<TopLogprob>,
}

/// The end of a request that ended well.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    pub finish_reason: FinishReason,
    pub usage: Usage,
    /// Text that was held back and now counts; comes after the last token's.
    pub text: String,
}

impl From<TokenEvent> for Token {
    fn from(event: TokenEvent) -> Self {
        Self {
            position: event.position,
            id: event.id,
            text: event.text,
            logprob: event.logprob,
            top_logprobs: event.top_logprobs,
        }
    }
}
