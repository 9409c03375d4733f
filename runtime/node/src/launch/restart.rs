//! When a node process that ended is started again: backoff, and an intensity limit.
//!
//! The launcher is the supervisor of last resort on a machine. What can be healed inside a node (an engine that dies)
//! is healed there; only the end of a whole node process comes here. Pure: the caller brings the time and the jitter.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Restarts of one node within [`PERIOD`]; one more, and the launcher gives the node up.
pub const INTENSITY: usize = 5;
/// The period over which [`INTENSITY`] counts.
pub const PERIOD: Duration = Duration::from_secs(60);
/// Wait before the first restart in a row; doubled each time.
const BACKOFF_INITIAL: Duration = Duration::from_millis(100);
/// Longest wait, and the one between tries that only the disk stops.
pub const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// Why a node process could not be started, for a person.
#[derive(Debug, thiserror::Error)]
#[error("{why}")]
pub struct StartError {
    pub why: String,
    /// The disk is at fault, and not the node: it is tried again for as long as it takes (see [`BACKOFF_MAX`]), and does
    /// not count as a restart.
    pub may_pass: bool,
    /// The node may run all the same, where it cannot be reached.
    pub in_doubt: bool,
}

impl StartError {
    pub fn new(why: impl Into<String>) -> Self {
        Self {
            why: why.into(),
            may_pass: false,
            in_doubt: false,
        }
    }

    /// A file that cannot be written, or a process that cannot be run.
    pub fn from_io(error: &std::io::Error) -> Self {
        use std::io::ErrorKind::{QuotaExceeded, StorageFull};
        Self {
            may_pass: matches!(error.kind(), StorageFull | QuotaExceeded),
            ..Self::new(error.to_string())
        }
    }
}

/// The restarts of one node.
#[derive(Debug, Default)]
pub struct History {
    /// At most [`INTENSITY`] moments, none older than [`PERIOD`].
    recent: VecDeque<Instant>,
}

impl History {
    /// The node ended at `now`: after which wait it is started again, or `None` to give it up. `jitter` is in 0.0..1.0 and
    /// stretches the wait by up to a quarter, so that several nodes do not start in step.
    pub fn after_end(&mut self, now: Instant, jitter: f64) -> Option<Duration> {
        while self
            .recent
            .front()
            .is_some_and(|at| now.duration_since(*at) >= PERIOD)
        {
            self.recent.pop_front();
        }
        if self.recent.len() >= INTENSITY {
            return None;
        }
        let doublings = u32::try_from(self.recent.len()).unwrap_or(u32::MAX);
        self.recent.push_back(now);
        let wait = BACKOFF_INITIAL
            .saturating_mul(2_u32.saturating_pow(doublings))
            .min(BACKOFF_MAX);
        Some(wait.mul_f64(1.0 + jitter.clamp(0.0, 1.0) / 4.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_and_then_the_node_is_given_up() {
        let start = Instant::now();
        let mut history = History::default();
        let waits: Vec<_> = (0..7)
            .map(|n| history.after_end(start + Duration::from_secs(n), 0.0))
            .collect();
        let ms = |ms| Some(Duration::from_millis(ms));
        assert_eq!(
            waits,
            [ms(100), ms(200), ms(400), ms(800), ms(1600), None, None]
        );
    }

    #[test]
    fn a_node_that_ran_long_starts_afresh() {
        let start = Instant::now();
        let mut history = History::default();
        for n in 0..20 {
            let wait = history.after_end(start + PERIOD * n, 0.0);
            assert_eq!(wait, Some(BACKOFF_INITIAL), "end {n}");
        }
    }

    #[test]
    fn jitter_only_lengthens_and_stays_small() {
        let mut history = History::default();
        let wait = history
            .after_end(Instant::now(), 1.0)
            .expect("first restart");
        assert_eq!(wait, BACKOFF_INITIAL.mul_f64(1.25));
    }
}
