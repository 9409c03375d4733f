//! How a command ends: a closed set of exit statuses, and the failure that carries one.
//!
//! Scripts branch on these numbers, so a number never changes its meaning; `docs/cli.md` holds the same table and a
//! test compares the two.

use std::fmt;
use std::io;
use std::process::ExitCode;

use understudy_protocol::{ErrorBody, ErrorCode};

/// Every status that `understudy` exits with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Done. Also when the reader of the output went away (`| head`).
    Ok,
    /// The request failed, and would fail again unchanged.
    Failed,
    /// The command line, an input file or the configuration is wrong; nothing was sent.
    Usage,
    /// No gateway could be reached, or none took the connection (wrong token, unknown protocol version).
    NoConnection,
    /// The cluster is overloaded, stopping or without a ready replica: the same command may succeed later.
    Retry,
    /// Ended by Ctrl-C (SIGINT); what was in flight has been cancelled.
    Interrupted,
    /// Ended by SIGTERM; what was in flight has been cancelled.
    Terminated,
}

impl Exit {
    /// All of them, in the order of the table in `docs/cli.md`.
    pub const ALL: [Exit; 7] = [
        Exit::Ok,
        Exit::Failed,
        Exit::Usage,
        Exit::NoConnection,
        Exit::Retry,
        Exit::Interrupted,
        Exit::Terminated,
    ];

    /// The number that the shell sees.
    pub fn code(self) -> u8 {
        match self {
            Exit::Ok => 0,
            Exit::Failed => 1,
            Exit::Usage => 2,
            Exit::NoConnection => 3,
            Exit::Retry => 4,
            Exit::Interrupted => 130,
            Exit::Terminated => 143,
        }
    }

    /// The status for an error that a gateway answered with.
    pub fn of_server_error(error: &ErrorBody) -> Self {
        match error.code {
            ErrorCode::Unauthorized | ErrorCode::UnsupportedVersion => Exit::NoConnection,
            _ if error.retriable => Exit::Retry,
            _ => Exit::Failed,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit.code())
    }
}

/// Why a command stopped short: the status, and what to tell the person (nothing where it has been said already).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub exit: Exit,
    /// What, where, and what to do; empty for a quiet end.
    pub message: String,
}

impl Failure {
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self {
            exit,
            message: message.into(),
        }
    }

    /// Something the person has to correct before trying again.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }

    /// An end without a message.
    pub fn quiet(exit: Exit) -> Self {
        Self::new(exit, "")
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// Failures to write the output: a closed pipe is the reader's choice and ends quietly and well, anything else (a full
/// disk) is told.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            Failure::quiet(Exit::Ok)
        } else {
            Failure::new(
                Exit::Failed,
                format!("cannot write the output: {error}; the rest of it is lost"),
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_lists_exactly_these_codes() {
        let page = include_str!("../../../../docs/cli.md");
        let listed: Vec<u8> = page
            .lines()
            .skip_while(|line| *line != "## Exit codes")
            .take_while(|line| *line == "## Exit codes" || !line.starts_with("## "))
            .filter_map(|line| line.strip_prefix("| ")?.split(" |").next()?.parse().ok())
            .collect();
        assert_eq!(listed, Exit::ALL.map(Exit::code));
    }

    #[test]
    fn server_errors_map_by_code_and_by_what_the_server_says() {
        let exit = |code| Exit::of_server_error(&ErrorBody::new(code, ""));
        assert_eq!(exit(ErrorCode::Unauthorized), Exit::NoConnection);
        assert_eq!(exit(ErrorCode::Overloaded), Exit::Retry);
        assert_eq!(exit(ErrorCode::AttemptsExhausted), Exit::Retry);
        assert_eq!(exit(ErrorCode::UnknownModel), Exit::Failed);
        let told_not_to = ErrorBody {
            retriable: false,
            ..ErrorBody::new(ErrorCode::Unavailable, "")
        };
        assert_eq!(Exit::of_server_error(&told_not_to), Exit::Failed);
    }

    #[test]
    fn a_closed_pipe_is_quiet_and_a_full_disk_is_not() {
        let pipe = Failure::from(io::Error::from(io::ErrorKind::BrokenPipe));
        assert_eq!(pipe, Failure::quiet(Exit::Ok));
        let disk = Failure::from(io::Error::from(io::ErrorKind::StorageFull));
        assert_eq!(disk.exit, Exit::Failed);
        assert!(disk.message.contains("cannot write the output"));
    }
}
