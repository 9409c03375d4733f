//! Instants that do not overflow, whatever durations a caller has set.

use std::time::Duration;

use tokio::time::Instant;

/// Stands for "never": longer than any process runs, and short enough that a few of them can be added up.
pub(crate) const NEVER: Duration = Duration::from_secs(30 * 365 * 24 * 3600);

/// `wait` after `start`, or [`NEVER`] after it where that is less.
pub(crate) fn after(start: Instant, wait: Duration) -> Instant {
    start + wait.min(NEVER)
}
