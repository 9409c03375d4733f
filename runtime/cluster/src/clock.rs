//! Monotonic time as a duration since the start of this layer, so that pure code can be given any time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A monotonic clock with its zero at its creation.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock(Instant);

impl Clock {
    /// A clock that starts now.
    pub(crate) fn start() -> Self {
        Self(Instant::now())
    }

    /// Time since the start.
    pub(crate) fn now(&self) -> Duration {
        self.0.elapsed()
    }

    /// The clock's `at` as an instant, for timers.
    pub(crate) fn instant(&self, at: Duration) -> Instant {
        self.0 + at
    }
}

/// When a connection was last heard from. Written by its reader, read by the detector.
#[derive(Debug, Clone)]
pub(crate) struct Life {
    clock: Clock,
    heard_us: Arc<AtomicU64>,
}

impl Life {
    /// A life that begins now.
    pub(crate) fn begin(clock: Clock) -> Self {
        let life = Self {
            clock,
            heard_us: Arc::default(),
        };
        life.sign();
        life
    }

    /// Bytes have arrived just now.
    pub(crate) fn sign(&self) {
        let now = u64::try_from(self.clock.now().as_micros()).unwrap_or(u64::MAX);
        self.heard_us.store(now, Ordering::Relaxed);
    }

    /// When it was last heard from.
    pub(crate) fn heard(&self) -> Duration {
        Duration::from_micros(self.heard_us.load(Ordering::Relaxed))
    }

    /// Time since it was last heard from.
    pub(crate) fn silence(&self) -> Duration {
        self.clock.now().saturating_sub(self.heard())
    }
}
