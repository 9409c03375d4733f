//! What goes wrong between the command line and a gateway, for programs ([`Trouble`], the `error` object of JSON
//! output) and for people and shells ([`Failure`]).

use serde::Serialize;
use understudy_client::{Error, LostReason};
use understudy_protocol::{ErrorBody, ErrorCode};

use super::exit::{Exit, Failure};
use super::gateways::Gateways;

/// The `error` object. The codes are the protocol's, and a few for what only a client can see: `connect`,
/// `connection_lost`, `not_recovered`, `submit_lost`, `cancelled`, `no_answer`, `too_large`, `busy`, `options`, `protocol`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Trouble {
    pub code: String,
    pub message: String,
    pub retriable: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stage: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
}

impl From<&ErrorBody> for Trouble {
    fn from(error: &ErrorBody) -> Self {
        Self {
            code: error.code.as_str().to_owned(),
            message: error.message.clone(),
            retriable: error.retriable,
            stage: error.stage.clone(),
            retry_after_ms: error.retry_after_ms,
        }
    }
}

impl From<&Error> for Trouble {
    fn from(error: &Error) -> Self {
        let code = match error {
            Error::Server(body) => return Self::from(body),
            Error::Connect {
                reason: LostReason::Refused(body),
                ..
            }
            | Error::Lost {
                reason: LostReason::Refused(body),
                ..
            } => body.code.as_str().to_owned(),
            Error::NoAddress | Error::Connect { .. } => "connect".to_owned(),
            Error::Lost { .. } => "connection_lost".to_owned(),
            Error::NotRecovered { .. } => "not_recovered".to_owned(),
            Error::SubmitLost { .. } => "submit_lost".to_owned(),
            Error::Cancelled { .. } => "cancelled".to_owned(),
            Error::InvalidOptions { .. } => "options".to_owned(),
            Error::Timeout { .. } => "no_answer".to_owned(),
            Error::TooLarge { .. } => "too_large".to_owned(),
            Error::Busy { .. } => "busy".to_owned(),
            Error::Protocol(_) => "protocol".to_owned(),
        };
        Self {
            code,
            message: error.to_string(),
            retriable: error.is_retriable(),
            stage: None,
            retry_after_ms: None,
        }
    }
}

/// How the command ends on this error.
pub fn exit_of(error: &Error) -> Exit {
    match error {
        Error::NoAddress | Error::InvalidOptions { .. } => Exit::Usage,
        Error::Server(body) => Exit::of_server_error(body),
        Error::Connect { reason, .. } => match reason {
            LostReason::Refused(body) => Exit::of_server_error(body),
            _ => Exit::NoConnection,
        },
        error if error.is_retriable() => Exit::Retry,
        _ => Exit::Failed,
    }
}

/// The failure to report: what happened, and what to do about it.
pub fn failure(error: &Error, gateways: &Gateways) -> Failure {
    let exit = exit_of(error);
    let hint = hint(error, exit, gateways);
    let hint = hint.map_or(String::new(), |hint| format!("\n  {hint}"));
    Failure::new(exit, format!("{error}{hint}"))
}

fn hint(error: &Error, exit: Exit, gateways: &Gateways) -> Option<String> {
    let tried = || gateways.addresses.join(", ");
    match (exit, error.code()) {
        (_, Some(ErrorCode::Unauthorized)) => Some(match gateways.token {
            Some(_) => {
                "the gateway does not know this token: check --token-file or $UNDERSTUDY_TOKEN"
                    .to_owned()
            }
            None => {
                "the gateway asks for a token: give --token-file FILE, or set $UNDERSTUDY_TOKEN"
                    .to_owned()
            }
        }),
        (_, Some(ErrorCode::UnknownModel)) => {
            Some("`understudy status` lists the models".to_owned())
        }
        (Exit::NoConnection, None) => Some(format!(
            "tried {}; is the cluster running? name its gateways with --addr or --config (`understudy up` starts one)",
            tried()
        )),
        (Exit::Retry, _) => match error {
            Error::NotRecovered {
                request: Some(request),
                next_position,
                ..
            } => Some(format!(
                "go on later with: understudy resume {request} --next-position {next_position}"
            )),
            Error::Server(ErrorBody {
                retry_after_ms: Some(ms),
                ..
            }) => Some(format!("try again in {ms} ms")),
            _ => Some("try again after a while".to_owned()),
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use understudy_protocol::RequestId;

    use super::*;

    fn gateways(token: Option<&str>) -> Gateways {
        Gateways {
            addresses: vec!["a:1".to_owned(), "b:2".to_owned()],
            token: token.map(str::to_owned),
            connect_timeout: Duration::from_secs(1),
            recovery_timeout: Duration::from_secs(1),
        }
    }

    fn connect(reason: LostReason) -> Error {
        Error::Connect {
            address: "a:1".to_owned(),
            reason,
        }
    }

    #[test]
    fn errors_become_statuses() {
        let refused = |code| LostReason::Refused(ErrorBody::new(code, "no"));
        assert_eq!(exit_of(&connect(LostReason::Closed)), Exit::NoConnection);
        assert_eq!(
            exit_of(&connect(refused(ErrorCode::Unauthorized))),
            Exit::NoConnection
        );
        assert_eq!(
            exit_of(&connect(refused(ErrorCode::Overloaded))),
            Exit::Retry
        );
        assert_eq!(exit_of(&Error::TooLarge { len: 9, max: 1 }), Exit::Failed);
        assert_eq!(exit_of(&Error::Protocol("x".to_owned())), Exit::Failed);
        let after = Duration::from_secs(1);
        assert_eq!(
            exit_of(&Error::Timeout {
                what: "answer",
                after
            }),
            Exit::Retry
        );
    }

    #[test]
    fn messages_say_what_to_do() {
        let told = |error: &Error, token| failure(error, &gateways(token)).message;
        assert!(
            told(&connect(LostReason::Closed), None)
                .contains("tried a:1, b:2; is the cluster running?")
        );
        let unauthorized = connect(LostReason::Refused(ErrorBody::new(
            ErrorCode::Unauthorized,
            "no token",
        )));
        assert!(told(&unauthorized, None).contains("asks for a token"));
        assert!(told(&unauthorized, Some("t")).contains("does not know this token"));
        let lost = Error::NotRecovered {
            request: Some(RequestId(5)),
            next_position: 17,
            after: Duration::from_secs(30),
            last: Box::new(connect(LostReason::Closed)),
        };
        assert!(
            told(&lost, None)
                .ends_with("understudy resume 00000000000000000000000000000005 --next-position 17")
        );
    }

    #[test]
    fn client_side_errors_have_codes_of_their_own() {
        let code = |error: &Error| Trouble::from(error).code;
        assert_eq!(code(&connect(LostReason::Closed)), "connect");
        let refused = LostReason::Refused(ErrorBody::new(ErrorCode::ShuttingDown, "bye"));
        assert_eq!(code(&connect(refused)), "shutting_down");
        assert_eq!(
            code(&Error::Server(ErrorBody::new(
                ErrorCode::InvalidRequest,
                ""
            ))),
            "invalid_request"
        );
        assert_eq!(code(&Error::TooLarge { len: 9, max: 1 }), "too_large");
    }
}
