//! The messages as they are deserialized: one flat struct per `type`, turned into the public enums.
//!
//! The derived `Deserialize` of an internally tagged enum first copies the whole message into a tree of values, which
//! costs up to 32 bytes of memory per byte received, and time for every token. The scan has found the `type` already, so each message is read
//! straight into its struct instead; the wire is the same, and a test compares the two.

use serde::Deserialize;

use crate::error::{ErrorBody, ErrorCode};
use crate::id::{Position, RequestId};
use crate::message::{ClientMessage, FinishReason, Limits, ServerMessage, Usage};

#[derive(Deserialize)]
pub(crate) struct Hello {
    version: u32,
    #[serde(default)]
    client: Option<String>,
    #[serde(default)]
    token: Option<String>,
}

#[derive(Deserialize)]
pub(crate) struct Cancel {
    stream: u32,
}

#[derive(Deserialize)]
pub(crate) struct Resume {
    stream: u32,
    request: RequestId,
    next_position: Position,
    credit: u32,
}

#[derive(Deserialize)]
pub(crate) struct Credit {
    stream: u32,
    tokens: u32,
}

/// `ping` and `pong`.
#[derive(Deserialize)]
pub(crate) struct Nonce {
    nonce: u64,
}

#[derive(Deserialize)]
pub(crate) struct Nothing {}

#[derive(Deserialize)]
pub(crate) struct Welcome {
    version: u32,
    node: String,
    server: String,
    limits: Limits,
}

#[derive(Deserialize)]
pub(crate) struct Accepted {
    stream: u32,
    request: RequestId,
    prompt_tokens: u32,
    seed: u64,
}

#[derive(Deserialize)]
pub(crate) struct Finished {
    stream: u32,
    finish_reason: FinishReason,
    usage: Usage,
    #[serde(default)]
    text: String,
}

/// `error`, whose body is flattened into the message.
#[derive(Deserialize)]
pub(crate) struct Failed {
    #[serde(default)]
    stream: Option<u32>,
    #[serde(default)]
    request: Option<RequestId>,
    code: ErrorCode,
    message: String,
    retriable: bool,
    #[serde(default)]
    stage: Option<String>,
    #[serde(default)]
    retry_after_ms: Option<u64>,
}

impl From<Hello> for ClientMessage {
    fn from(
        Hello {
            version,
            client,
            token,
        }: Hello,
    ) -> Self {
        Self::Hello {
            version,
            client,
            token,
        }
    }
}

impl From<Cancel> for ClientMessage {
    fn from(Cancel { stream }: Cancel) -> Self {
        Self::Cancel { stream }
    }
}

impl From<Resume> for ClientMessage {
    fn from(message: Resume) -> Self {
        Self::Resume {
            stream: message.stream,
            request: message.request,
            next_position: message.next_position,
            credit: message.credit,
        }
    }
}

impl From<Credit> for ClientMessage {
    fn from(Credit { stream, tokens }: Credit) -> Self {
        Self::Credit { stream, tokens }
    }
}

impl From<Nonce> for ClientMessage {
    fn from(Nonce { nonce }: Nonce) -> Self {
        Self::Ping { nonce }
    }
}

impl From<Nothing> for ClientMessage {
    fn from(Nothing {}: Nothing) -> Self {
        Self::Status {}
    }
}

impl From<Welcome> for ServerMessage {
    fn from(message: Welcome) -> Self {
        Self::Welcome {
            version: message.version,
            node: message.node,
            server: message.server,
            limits: message.limits,
        }
    }
}

impl From<Accepted> for ServerMessage {
    fn from(message: Accepted) -> Self {
        Self::Accepted {
            stream: message.stream,
            request: message.request,
            prompt_tokens: message.prompt_tokens,
            seed: message.seed,
        }
    }
}

impl From<Finished> for ServerMessage {
    fn from(message: Finished) -> Self {
        Self::Finished {
            stream: message.stream,
            finish_reason: message.finish_reason,
            usage: message.usage,
            text: message.text,
        }
    }
}

impl From<Failed> for ServerMessage {
    fn from(message: Failed) -> Self {
        Self::Error {
            stream: message.stream,
            request: message.request,
            error: ErrorBody {
                code: message.code,
                message: message.message,
                retriable: message.retriable,
                stage: message.stage,
                retry_after_ms: message.retry_after_ms,
            },
        }
    }
}

impl From<Nonce> for ServerMessage {
    fn from(Nonce { nonce }: Nonce) -> Self {
        Self::Pong { nonce }
    }
}
