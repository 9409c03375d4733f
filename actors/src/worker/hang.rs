//! Finds an engine that lives but does not move. Pure.
//!
//! Two limits: no frame at all for `silence` (the process is stopped, or its machine is), or work without a finished
//! step for `stall` while the heartbeat goes on (the model thread is stuck).
//! A worker that was itself not running (a stopped machine, a starved runtime) must not blame its engine: when its own
//! tick comes late, both clocks start again.

use std::time::{Duration, Instant};

use understudy_engine_core::frame::EngineHealth;

use crate::peer::LossCause;

/// Limits of a [`HangDetector`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HangLimits {
    pub silence: Duration,
    pub stall: Duration,
    /// Expected distance between ticks; one that comes later than three of them is late.
    pub tick: Duration,
}

/// See the module.
#[derive(Debug)]
pub struct HangDetector {
    limits: HangLimits,
    last_tick: Instant,
    last_frame: Instant,
    steps: u64,
    /// Since when the engine has been busy without finishing a step.
    stuck_since: Option<Instant>,
}

impl HangDetector {
    pub fn new(limits: HangLimits, now: Instant) -> Self {
        Self {
            limits,
            last_tick: now,
            last_frame: now,
            steps: 0,
            stuck_since: None,
        }
    }

    /// Any frame came.
    pub fn frame(&mut self, now: Instant) {
        self.last_frame = now;
    }

    /// The engine finished a step.
    pub fn step(&mut self, step: u64) {
        self.steps = self.steps.max(step);
        self.stuck_since = None;
    }

    pub fn heartbeat(&mut self, health: &EngineHealth, now: Instant) {
        if !health.busy || health.steps > self.steps {
            self.stuck_since = None;
        } else {
            self.stuck_since.get_or_insert(now);
        }
        self.steps = self.steps.max(health.steps);
    }

    /// Time passes. Tells what is wrong with the engine, if anything is.
    pub fn tick(&mut self, now: Instant) -> Option<LossCause> {
        let since_tick = now.saturating_duration_since(self.last_tick);
        self.last_tick = now;
        if since_tick > self.limits.tick * 3 {
            self.last_frame = now;
            self.stuck_since = self.stuck_since.map(|_| now);
            return None;
        }
        if now.saturating_duration_since(self.last_frame) > self.limits.silence {
            return Some(LossCause::EngineSilent);
        }
        let stuck = self.stuck_since.map(|at| now.saturating_duration_since(at));
        stuck
            .is_some_and(|time| time > self.limits.stall)
            .then_some(LossCause::EngineHang)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: Duration = Duration::from_millis(50);
    const LIMITS: HangLimits = HangLimits {
        silence: Duration::from_millis(500),
        stall: Duration::from_millis(2000),
        tick: TICK,
    };

    fn health(steps: u64, busy: bool) -> EngineHealth {
        EngineHealth {
            steps,
            busy,
            ..EngineHealth::default()
        }
    }

    /// Ticks until something is found, with a heartbeat before every second tick if `heartbeat` gives one.
    fn found_after(
        heartbeat: impl Fn(u32) -> Option<EngineHealth>,
    ) -> Option<(LossCause, Duration)> {
        let start = Instant::now();
        let mut detector = HangDetector::new(LIMITS, start);
        (1..200).find_map(|i| {
            let now = start + TICK * i;
            if let Some(health) = heartbeat(i) {
                detector.frame(now);
                detector.heartbeat(&health, now);
            }
            detector.tick(now).map(|cause| (cause, now - start))
        })
    }

    #[test]
    fn silence_is_found() {
        let (cause, after) = found_after(|_| None).unwrap();
        assert_eq!(cause, LossCause::EngineSilent);
        assert!(after <= LIMITS.silence + 2 * TICK);
    }

    #[test]
    fn a_stuck_step_under_a_live_heartbeat_is_found() {
        let (cause, after) = found_after(|_| Some(health(7, true))).unwrap();
        assert_eq!(cause, LossCause::EngineHang);
        assert!(after <= LIMITS.stall + 4 * TICK);
    }

    #[test]
    fn idle_and_moving_engines_are_left_alone() {
        assert_eq!(found_after(|_| Some(health(7, false))), None);
        assert_eq!(found_after(|i| Some(health(u64::from(i / 20), true))), None);
    }

    #[test]
    fn our_own_pause_is_not_the_engines_fault() {
        let start = Instant::now();
        let mut detector = HangDetector::new(LIMITS, start);
        assert_eq!(detector.tick(start + Duration::from_secs(60)), None);
        assert_eq!(detector.tick(start + Duration::from_secs(60) + TICK), None);
    }
}
