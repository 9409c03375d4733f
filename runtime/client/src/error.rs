//! What can go wrong for a caller, each retriable or not.

use std::time::Duration;

use understudy_protocol::{ErrorBody, ErrorCode, RequestId};

/// Why a call or a stream ended without success.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// No address was given.
    #[error("no gateway address given; name at least one as host:port")]
    NoAddress,
    /// One gateway cannot be reached, or its handshake failed.
    #[error("gateway {address} cannot be reached: {reason}")]
    Connect { address: String, reason: LostReason },
    /// A setting with which a client cannot work.
    #[error("option {option} {problem}")]
    InvalidOptions {
        option: &'static str,
        problem: &'static str,
    },
    /// The server's answer: a terminal error of the request, or of the handshake.
    #[error("{code}: {}", .0.message, code = .0.code.as_str())]
    Server(ErrorBody),
    /// The connection was lost, and recovery is switched off or not possible.
    #[error("connection to {address} lost: {reason}")]
    Lost { address: String, reason: LostReason },
    /// The request could not be resumed within `recovery_timeout`. It may still be resumed later by its id.
    #[error("request {} not recovered within {after:?}, {next_position} tokens received; last: {last}", shown(.request))]
    NotRecovered {
        request: Option<RequestId>,
        /// The first position the caller lacks.
        next_position: u32,
        after: Duration,
        last: Box<Error>,
    },
    /// The connection was lost each time that the request was submitted, before it was accepted. The request may be what
    /// the gateways die of, and it may have run: look before submitting it again.
    #[error(
        "connection lost {times} times after the request was submitted and before it was accepted; not submitted again, as it may be the cause; last: {last}"
    )]
    SubmitLost { times: u32, last: Box<Error> },
    /// The request was cancelled, but not by this stream. The tokens before `next_position` have been received.
    #[error(
        "request {request} was cancelled after {next_position} tokens, and not by this stream: by another client, or by the gateway because nobody read it for longer than its resume_grace_ms; submit it again"
    )]
    Cancelled {
        request: RequestId,
        /// The first position the caller lacks.
        next_position: u32,
    },
    /// Nothing came in time, though the connection is alive.
    #[error("no {what} within {after:?}")]
    Timeout { what: &'static str, after: Duration },
    /// The request does not fit the frame that the gateway accepts.
    #[error(
        "request of {len} bytes is over the gateway's frame limit of {max}; shorten the prompt"
    )]
    TooLarge { len: usize, max: usize },
    /// Too many calls wait for their answers.
    #[error("{max} calls wait for their answers already; make fewer at once")]
    Busy { max: usize },
    /// The server broke the protocol.
    #[error("gateway broke the protocol: {0}")]
    Protocol(String),
}

/// Why a connection ended.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum LostReason {
    #[error("closed by the gateway")]
    Closed,
    #[error("{0}")]
    Io(String),
    #[error("nothing came for {0:?}")]
    Silent(Duration),
    #[error("{code}: {}", .0.message, code = .0.code.as_str())]
    Refused(ErrorBody),
    #[error("protocol broken: {0}")]
    Protocol(String),
}

impl Error {
    /// Whether the same call may succeed when it is made again, after a while.
    pub fn is_retriable(&self) -> bool {
        match self {
            Self::NoAddress
            | Self::InvalidOptions { .. }
            | Self::SubmitLost { .. }
            | Self::Cancelled { .. }
            | Self::TooLarge { .. }
            | Self::Protocol(_) => false,
            Self::Connect { reason, .. } | Self::Lost { reason, .. } => reason.is_retriable(),
            Self::Server(body) => body.retriable,
            Self::NotRecovered { .. } | Self::Timeout { .. } | Self::Busy { .. } => true,
        }
    }

    /// The server's code, where the error is the server's.
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Server(body) => Some(body.code),
            Self::Connect { reason, .. } | Self::Lost { reason, .. } => reason.code(),
            Self::NotRecovered { last, .. } | Self::SubmitLost { last, .. } => last.code(),
            _ => None,
        }
    }
}

impl LostReason {
    /// Whether the gateway may be hanging, so that another attempt there would hang too.
    pub(crate) fn is_silence(&self) -> bool {
        matches!(self, Self::Silent(_))
    }

    fn is_retriable(&self) -> bool {
        match self {
            Self::Closed | Self::Io(_) | Self::Silent(_) => true,
            Self::Refused(body) => body.retriable,
            Self::Protocol(_) => false,
        }
    }

    fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Refused(body) => Some(body.code),
            _ => None,
        }
    }
}

impl From<std::io::Error> for LostReason {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error.to_string())
    }
}

fn shown(request: &Option<RequestId>) -> String {
    request.map_or_else(|| "(not accepted yet)".to_owned(), |id| id.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_error_shows_its_code_as_on_the_wire() {
        let body = ErrorBody::new(ErrorCode::DeadlineExceeded, "too late");
        assert_eq!(
            Error::Server(body).to_string(),
            "deadline_exceeded: too late"
        );
    }

    #[test]
    fn a_server_error_is_as_retriable_as_the_server_says() {
        let mut body = ErrorBody::new(ErrorCode::Overloaded, "busy");
        assert!(Error::Server(body.clone()).is_retriable());
        body.retriable = false;
        assert!(!Error::Server(body).is_retriable());
    }
}
