//! When a supervisor may start a child again: OTP's restart intensity, with jittered exponential backoff and a
//! cool-down. Pure: time and chance come from the caller.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Settings of a [`RestartPolicy`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RestartSettings {
    /// Restarts allowed within `period`.
    pub intensity: u32,
    pub period: Duration,
    /// Wait before the second restart in a row; the first is immediate.
    pub backoff_initial: Duration,
    pub backoff_max: Duration,
    /// A child that ran this long starts over with an immediate restart.
    pub reset_after: Duration,
    /// After the intensity was exceeded: how long until one more try.
    pub cooldown: Duration,
}

/// What to do about a child that ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    RestartAfter(Duration),
    /// The intensity is exceeded: the child counts as down, and gets one more try after the cool-down.
    GiveUpFor(Duration),
}

/// Remembers the restarts of one child.
#[derive(Debug)]
pub struct RestartPolicy {
    settings: RestartSettings,
    recent: VecDeque<Instant>,
    /// Ends in a row without a run of `reset_after` in between.
    streak: u32,
    /// The intensity was exceeded, and no good run has come since.
    gave_up: bool,
    started_at: Option<Instant>,
}

impl RestartPolicy {
    pub fn new(settings: RestartSettings) -> Self {
        Self {
            settings,
            recent: VecDeque::new(),
            streak: 0,
            gave_up: false,
            started_at: None,
        }
    }

    /// The child works (for an engine: its weights are loaded).
    pub fn running(&mut self, now: Instant) {
        self.started_at = Some(now);
    }

    /// The child ended. `chance` is uniform in [0, 1) and spreads the backoff over its upper half, so that children
    /// that ended together do not start together.
    pub fn ended(&mut self, now: Instant, chance: f64) -> Decision {
        let ran_well = self
            .started_at
            .take()
            .is_some_and(|at| now.saturating_duration_since(at) >= self.settings.reset_after);
        if ran_well {
            self.streak = 0;
            self.gave_up = false;
        }
        while self
            .recent
            .front()
            .is_some_and(|at| now.saturating_duration_since(*at) >= self.settings.period)
        {
            self.recent.pop_front();
        }
        if self.gave_up || self.recent.len() >= self.settings.intensity as usize {
            self.gave_up = true;
            // The try after the cool-down is the only one: without a good run, a further end leads straight back here.
            return Decision::GiveUpFor(self.settings.cooldown);
        }
        self.recent.push_back(now);
        let wait = self.wait(chance);
        self.streak += 1;
        Decision::RestartAfter(wait)
    }

    /// A child that ran well and ended once needs no pause; one that ends again and again does.
    fn wait(&self, chance: f64) -> Duration {
        let Some(doublings) = self.streak.checked_sub(1) else {
            return Duration::ZERO;
        };
        let doubled = self
            .settings
            .backoff_initial
            .saturating_mul(1 << doublings.min(20));
        let ceiling = doubled.min(self.settings.backoff_max);
        ceiling.mul_f64(0.5 + chance / 2.0)
    }
}

/// What tests of supervisors share.
#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// Restarts at once as often as it takes; a cool-down lasts longer than any test.
    pub(crate) const PATIENT: RestartSettings = RestartSettings {
        intensity: 1000,
        period: Duration::from_secs(600),
        backoff_initial: Duration::from_millis(1),
        backoff_max: Duration::from_millis(1),
        reset_after: Duration::from_secs(600),
        cooldown: Duration::from_secs(600),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: RestartSettings = RestartSettings {
        intensity: 4,
        period: Duration::from_secs(30),
        backoff_initial: Duration::from_millis(100),
        backoff_max: Duration::from_millis(300),
        reset_after: Duration::from_secs(10),
        cooldown: Duration::from_secs(60),
    };

    #[test]
    fn backs_off_up_to_the_maximum_then_gives_up() {
        let mut policy = RestartPolicy::new(SETTINGS);
        let now = Instant::now();
        let waits: Vec<Decision> = (0..5).map(|_| policy.ended(now, 0.0)).collect();
        assert_eq!(
            waits,
            [
                Decision::RestartAfter(Duration::ZERO),
                Decision::RestartAfter(Duration::from_millis(50)),
                Decision::RestartAfter(Duration::from_millis(100)),
                Decision::RestartAfter(Duration::from_millis(150)),
                Decision::GiveUpFor(SETTINGS.cooldown),
            ]
        );
    }

    #[test]
    fn one_try_follows_each_cool_down_until_a_run_is_good() {
        let mut policy = RestartPolicy::new(SETTINGS);
        let start = Instant::now();
        let give_up = Decision::GiveUpFor(SETTINGS.cooldown);
        for _ in 0..SETTINGS.intensity {
            policy.ended(start, 0.0);
        }
        assert_eq!(policy.ended(start, 0.0), give_up);
        // By now the restarts are older than the period, and still do not come back as a whole new set.
        let later = start + SETTINGS.cooldown;
        assert_eq!(policy.ended(later, 0.0), give_up);
        policy.running(later);
        let well = policy.ended(later + SETTINGS.reset_after, 0.0);
        assert!(matches!(well, Decision::RestartAfter(_)));
    }

    #[test]
    fn the_jitter_covers_the_upper_half() {
        let wait = |chance| {
            let mut policy = RestartPolicy::new(SETTINGS);
            policy.ended(Instant::now(), chance);
            match policy.ended(Instant::now(), chance) {
                Decision::RestartAfter(wait) => wait,
                Decision::GiveUpFor(_) => panic!("second end"),
            }
        };
        assert_eq!(wait(0.0), Duration::from_millis(50));
        assert!(
            wait(0.999) > Duration::from_millis(99) && wait(0.999) < Duration::from_millis(100)
        );
    }

    #[test]
    fn old_restarts_are_forgotten_and_a_good_run_resets_the_backoff() {
        let mut policy = RestartPolicy::new(SETTINGS);
        let start = Instant::now();
        for _ in 0..SETTINGS.intensity {
            policy.ended(start, 0.0);
        }
        let later = start + SETTINGS.period;
        policy.running(later - SETTINGS.reset_after);
        assert_eq!(
            policy.ended(later, 0.0),
            Decision::RestartAfter(Duration::ZERO)
        );
    }
}
