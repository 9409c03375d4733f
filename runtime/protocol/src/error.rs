//! Error codes of the protocol, each retriable or not.

use serde::{Deserialize, Serialize};

/// What went wrong, for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The client speaks no version that the server speaks. Closes the connection.
    UnsupportedVersion,
    /// The access token is missing or wrong. Closes the connection.
    Unauthorized,
    /// A frame over the limit. Closes the connection.
    FrameTooLarge,
    /// A frame that is no message of this protocol. Closes the connection.
    Malformed,
    /// A message that is not allowed now, such as `submit` before `hello`. Closes the connection.
    OutOfOrder,
    /// The peer sent nothing, or took nothing, for too long. Closes the connection.
    Timeout,
    /// Parameters, prompt or messages that cannot be served.
    InvalidRequest,
    /// No model of that name is deployed.
    UnknownModel,
    /// No request of that id is kept here.
    UnknownRequest,
    /// Too many streams, or too much work in the cluster: try again after a while.
    Overloaded,
    /// No replica can serve the model now.
    Unavailable,
    /// The request's deadline passed.
    DeadlineExceeded,
    /// The request was tried as often as the configuration allows, and each engine died or refused.
    AttemptsExhausted,
    /// The node is stopping: try another gateway.
    ShuttingDown,
    /// A fault of the server.
    Internal,
    /// A code that this version of the crate does not know; a server never sends it. The `retriable` of the message
    /// says what to do.
    #[serde(other)]
    Unknown,
}

impl ErrorCode {
    /// Every code that a server sends: what ends a connection first, then what ends or refuses a request.
    pub const ALL: [Self; 15] = [
        Self::UnsupportedVersion,
        Self::Unauthorized,
        Self::FrameTooLarge,
        Self::Malformed,
        Self::OutOfOrder,
        Self::Timeout,
        Self::InvalidRequest,
        Self::UnknownModel,
        Self::UnknownRequest,
        Self::Overloaded,
        Self::Unavailable,
        Self::DeadlineExceeded,
        Self::AttemptsExhausted,
        Self::ShuttingDown,
        Self::Internal,
    ];

    /// The code as it stands on the wire, and in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::UnsupportedVersion => "unsupported_version",
            Self::Unauthorized => "unauthorized",
            Self::FrameTooLarge => "frame_too_large",
            Self::Malformed => "malformed",
            Self::OutOfOrder => "out_of_order",
            Self::Timeout => "timeout",
            Self::InvalidRequest => "invalid_request",
            Self::UnknownModel => "unknown_model",
            Self::UnknownRequest => "unknown_request",
            Self::Overloaded => "overloaded",
            Self::Unavailable => "unavailable",
            Self::DeadlineExceeded => "deadline_exceeded",
            Self::AttemptsExhausted => "attempts_exhausted",
            Self::ShuttingDown => "shutting_down",
            Self::Internal => "internal",
            Self::Unknown => "unknown",
        }
    }

    /// Whether the same request may succeed later or at another gateway.
    pub fn is_retriable(self) -> bool {
        match self {
            Self::Timeout
            | Self::Overloaded
            | Self::Unavailable
            | Self::AttemptsExhausted
            | Self::ShuttingDown
            | Self::Internal => true,
            Self::UnsupportedVersion
            | Self::Unauthorized
            | Self::FrameTooLarge
            | Self::Malformed
            | Self::OutOfOrder
            | Self::InvalidRequest
            | Self::UnknownModel
            | Self::UnknownRequest
            | Self::DeadlineExceeded
            | Self::Unknown => false,
        }
    }
}

/// The body of an error message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ErrorBody {
    pub code: ErrorCode,
    /// What, where, and what to do, for a person. Never contains a prompt.
    pub message: String,
    pub retriable: bool,
    /// The stage the request was in, for deadlines: `queued`, `dispatched`, `generating`, `recovering`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stage: Option<String>,
    /// Milliseconds to wait before trying again, where the server knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
}

impl ErrorBody {
    /// An error with the code's own retriability and no further hints.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            retriable: code.is_retriable(),
            stage: None,
            retry_after_ms: None,
        }
    }
}
