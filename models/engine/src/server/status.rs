//! How an engine process ends: a closed set, so that its owner can tell what happened from the exit code alone.

use std::process::ExitCode;

/// Why the process ended. Codes below 10 are Unix habit; a signal means that it was killed, or a library aborted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExitStatus {
    /// The node asked for it, or closed the socket.
    Done,
    /// The command line, or the descriptor it names, is wrong.
    Usage,
    /// The model could not be loaded. Starting again gives the same, unless files change.
    LoadFailed,
    /// A step failed: device, library, out of memory.
    StepFailed,
    /// A frame could not be read or written: the two sides are not of one build, or memory is corrupt.
    BadFrame,
    /// A bug of ours on the model thread.
    Panicked,
}

impl ExitStatus {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Done,
        Self::Usage,
        Self::LoadFailed,
        Self::StepFailed,
        Self::BadFrame,
        Self::Panicked,
    ];

    /// The process's exit code.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Usage => 2,
            Self::LoadFailed => 10,
            Self::StepFailed => 11,
            Self::BadFrame => 12,
            Self::Panicked => 13,
        }
    }

    /// Ends the process at once: no destructors, no waiting for other threads.
    pub fn exit_now(self) -> ! {
        // SAFETY: `_exit` is always allowed; nothing of this process needs a tidy end.
        unsafe { libc::_exit(i32::from(self.code())) }
    }
}

impl From<ExitStatus> for ExitCode {
    fn from(status: ExitStatus) -> Self {
        Self::from(status.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_distinct_and_none_is_what_a_panic_or_a_signal_gives() {
        let mut codes = ExitStatus::ALL.map(ExitStatus::code).to_vec();
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), ExitStatus::ALL.len());
        assert!(codes.iter().all(|code| *code != 101 && *code < 126));
    }
}
