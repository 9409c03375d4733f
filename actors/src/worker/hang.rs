//! Finds an engine that lives but does not move. Pure.
//!
//! Two limits: no frame at all for `silence` (the process is stopped, or its machine is), or work without a finished
//! step for `stall` while the heartbeat goes on (the model thread is stuck).
//! A worker that was itself not running (a stopped machine, a starved runtime) must not blame its engine: when its own
//! tick comes late, the time is forgiven and both clocks start again. On a machine where every tick is late that would
//! go on for ever, so what is forgiven in a row is limited too.

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

/// What is forgiven in a row at most, in limits.
const FORGIVEN_LIMITS: u32 = 10;

/// A clock that runs towards a limit.
#[derive(Debug)]
struct Clock {
    limit: Duration,
    since: Instant,
    forgiven: Duration,
}

impl Clock {
    fn new(limit: Duration, now: Instant) -> Self {
        Self {
            limit,
            since: now,
            forgiven: Duration::ZERO,
        }
    }

    /// We were away for this long, and cannot say what the engine did. However long that was, it counts as one limit at
    /// most: a single long pause of this machine must not use up all that is forgiven.
    fn forgive(&mut self, away: Duration, now: Instant) {
        self.forgiven += away.min(self.limit);
        self.since = now;
    }

    fn is_over(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.since) > self.limit
            || self.forgiven > self.limit * FORGIVEN_LIMITS
    }
}

/// See the module.
#[derive(Debug)]
pub struct HangDetector {
    limits: HangLimits,
    last_tick: Instant,
    /// Since the last frame.
    silence: Clock,
    steps: u64,
    /// While the engine is busy without finishing a step.
    stall: Option<Clock>,
}

impl HangDetector {
    pub fn new(limits: HangLimits, now: Instant) -> Self {
        Self {
            limits,
            last_tick: now,
            silence: Clock::new(limits.silence, now),
            steps: 0,
            stall: None,
        }
    }

    /// Any frame came.
    pub fn frame(&mut self, now: Instant) {
        self.silence = Clock::new(self.limits.silence, now);
    }

    /// The engine finished a step.
    pub fn step(&mut self, step: u64) {
        self.steps = self.steps.max(step);
        self.stall = None;
    }

    pub fn heartbeat(&mut self, health: &EngineHealth, now: Instant) {
        if !health.busy || health.steps > self.steps {
            self.stall = None;
        } else if self.stall.is_none() {
            self.stall = Some(Clock::new(self.limits.stall, now));
        }
        self.steps = self.steps.max(health.steps);
    }

    /// Time passes. Tells what is wrong with the engine, if anything is.
    pub fn tick(&mut self, now: Instant) -> Option<LossCause> {
        let since_tick = now.saturating_duration_since(self.last_tick);
        self.last_tick = now;
        if since_tick > self.limits.tick * 3 {
            self.silence.forgive(since_tick, now);
            if let Some(stall) = &mut self.stall {
                stall.forgive(since_tick, now);
            }
        }
        if self.silence.is_over(now) {
            return Some(LossCause::EngineSilent);
        }
        let stalled = self.stall.as_ref().is_some_and(|clock| clock.is_over(now));
        stalled.then_some(LossCause::EngineHang)
    }

    /// What was found, for people.
    pub fn describe(&self, cause: LossCause) -> String {
        let (what, limit) = match cause {
            LossCause::EngineSilent => ("no heartbeat", self.limits.silence),
            _ => ("work, but no finished step", self.limits.stall),
        };
        format!("{what} for more than {} ms", limit.as_millis())
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

    /// Ticks that are all late, until something is found, with a heartbeat before each if `heartbeat` gives one.
    fn found_by_late_ticks(heartbeat: Option<&EngineHealth>) -> Option<(LossCause, Duration)> {
        let start = Instant::now();
        let mut detector = HangDetector::new(LIMITS, start);
        (1..1000).find_map(|i| {
            let now = start + TICK * 4 * i;
            if let Some(health) = heartbeat {
                detector.frame(now);
                detector.heartbeat(health, now);
            }
            detector.tick(now).map(|cause| (cause, now - start))
        })
    }

    #[test]
    fn a_machine_on_which_every_tick_is_late_still_finds_a_dead_engine() {
        let (cause, after) = found_by_late_ticks(None).unwrap();
        assert_eq!(cause, LossCause::EngineSilent);
        assert!(after > LIMITS.silence * 9 && after < LIMITS.silence * 11);
        let (cause, after) = found_by_late_ticks(Some(&health(7, true))).unwrap();
        assert_eq!(cause, LossCause::EngineHang);
        assert!(after > LIMITS.stall * 9 && after < LIMITS.stall * 11);
        assert_eq!(found_by_late_ticks(Some(&health(7, false))), None);
    }
}
