//! Where and when a stream tries again to get its request to a gateway: pure, the clock is an argument.
//!
//! A recovery goes round the gateways, beginning with the one that had the request (unless it fell silent, which a new
//! attempt would find out the slow way again), without a pause in the first round, and with a growing, jittered one
//! before each later round.
//!
//! Invariants: where recovery is on, the time without a gateway adds up to `recovery_timeout` at most until a token gets through; a gateway
//! that keeps accepting and failing without a token in between is left after [`MAX_FRUITLESS`] times.

use std::collections::HashSet;
use std::time::Duration;

use tokio::time::Instant;

use crate::options::Options;
use crate::time::{NEVER, after};

/// Times that a request may be accepted again without one event after it.
pub(crate) const MAX_FRUITLESS: u32 = 16;

#[derive(Debug)]
pub(crate) struct Recovery {
    gateways: usize,
    first: usize,
    attempts: usize,
    /// The round of the last attempt.
    round: usize,
    /// Where recovery is switched off: one round.
    max_attempts: usize,
    fruitless: u32,
    /// Gateways that do not know the request.
    unknown_at: HashSet<usize>,
    /// Time without a gateway at most, and when it runs out.
    limit: Duration,
    deadline: Instant,
    backoff_initial: Duration,
    backoff_max: Duration,
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Attempt {
    pub gateway: usize,
    /// Wait this long first.
    pub pause: Duration,
}

impl Recovery {
    pub fn new(first: usize, gateways: usize, options: &Options, now: Instant) -> Self {
        let recovers = options.recovers();
        let limit = if recovers {
            options.recovery_timeout
        } else {
            let attempts = u32::try_from(gateways)
                .unwrap_or(u32::MAX)
                .saturating_mul(2);
            options.connect_timeout.saturating_mul(attempts)
        };
        Self {
            gateways,
            first,
            max_attempts: if recovers { usize::MAX } else { gateways },
            attempts: 0,
            round: 0,
            fruitless: 0,
            unknown_at: HashSet::new(),
            limit,
            deadline: after(now, limit),
            backoff_initial: options.backoff_initial,
            backoff_max: options.backoff_max,
        }
    }

    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// The time without a gateway that the deadline stands for.
    pub fn limit(&self) -> Duration {
        self.limit
    }

    /// The next attempt, or `None` when there is none left. `draw` is uniform in 0 ..= 1.
    pub fn next(&mut self, now: Instant, draw: f64) -> Option<Attempt> {
        let too_late = now >= self.deadline && self.attempts > 0;
        if too_late || self.attempts >= self.max_attempts || self.is_unknown_everywhere() {
            return None;
        }
        loop {
            let attempt = self.attempts;
            self.attempts += 1;
            let gateway = (self.first + attempt) % self.gateways;
            if self.unknown_at.contains(&gateway) {
                continue;
            }
            let round = attempt / self.gateways;
            let pause = match round > self.round {
                true => self.pause(round, draw),
                false => Duration::ZERO,
            };
            self.round = round;
            return Some(Attempt { gateway, pause });
        }
    }

    /// Notes that a gateway does not know the request.
    pub fn unknown_at(&mut self, gateway: usize) {
        self.unknown_at.insert(gateway);
    }

    pub fn is_unknown_everywhere(&self) -> bool {
        self.unknown_at.len() >= self.gateways
    }

    /// So long a gateway was there, and does not count.
    pub fn extend(&mut self, by: Duration) {
        self.deadline += by;
    }

    /// Notes that the request was accepted again, and then its connection lost before anything came of it: the time in
    /// between does not count, the attempts do. False where it has happened too often.
    #[must_use]
    pub fn fruitless(&mut self, accepted: Instant, now: Instant) -> bool {
        self.deadline += now.saturating_duration_since(accepted);
        self.unknown_at.clear();
        self.fruitless += 1;
        self.fruitless < MAX_FRUITLESS
    }

    /// Half to all of the round's backoff.
    fn pause(&self, round: usize, draw: f64) -> Duration {
        if round == 0 {
            return Duration::ZERO;
        }
        let doublings = u32::try_from(round - 1).unwrap_or(u32::MAX).min(16);
        let full = self
            .backoff_initial
            .saturating_mul(1 << doublings)
            .min(self.backoff_max)
            .min(NEVER);
        full.mul_f64(0.5 + 0.5 * draw.clamp(0.0, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> Options {
        Options {
            recovery_timeout: Duration::from_secs(10),
            backoff_initial: Duration::from_millis(100),
            backoff_max: Duration::from_millis(300),
            ..Options::default()
        }
    }

    #[test]
    fn rounds_go_over_all_gateways_with_growing_pauses_between() {
        let now = Instant::now();
        let mut recovery = Recovery::new(1, 3, &options(), now);
        let seen: Vec<(usize, u128)> = (0..12)
            .map(|_| recovery.next(now, 1.0).unwrap())
            .map(|attempt| (attempt.gateway, attempt.pause.as_millis()))
            .collect();
        let expected: Vec<(usize, u128)> = [0, 100, 200, 300]
            .into_iter()
            .flat_map(|pause| [(1, pause), (2, 0), (0, 0)])
            .collect();
        assert_eq!(seen, expected);
    }

    #[test]
    fn a_pause_is_drawn_from_the_upper_half() {
        let now = Instant::now();
        let mut recovery = Recovery::new(0, 1, &options(), now);
        recovery.next(now, 0.0);
        assert_eq!(recovery.next(now, 0.0).unwrap().pause.as_millis(), 50);
    }

    #[test]
    fn it_ends_at_the_deadline_after_one_attempt_at_least() {
        let now = Instant::now();
        let late = now + Duration::from_secs(11);
        let mut recovery = Recovery::new(0, 2, &options(), now);
        assert!(recovery.next(late, 0.5).is_some());
        assert_eq!(recovery.next(late, 0.5), None);
    }

    #[test]
    fn without_recovery_there_is_one_round() {
        let now = Instant::now();
        let options = Options {
            recovery_timeout: Duration::ZERO,
            ..options()
        };
        let mut recovery = Recovery::new(1, 2, &options, now);
        assert_eq!(recovery.next(now, 0.5).unwrap().gateway, 1);
        assert_eq!(recovery.next(now, 0.5).unwrap().gateway, 0);
        assert_eq!(recovery.next(now, 0.5), None);
    }

    #[test]
    fn gateways_that_do_not_know_the_request_are_left_out() {
        let now = Instant::now();
        let mut recovery = Recovery::new(0, 2, &options(), now);
        recovery.next(now, 0.5);
        recovery.unknown_at(0);
        assert_eq!(recovery.next(now, 0.5).unwrap().gateway, 1);
        // The round begins with one that is left out, and is paused for all the same.
        let again = recovery.next(now, 0.5).unwrap();
        assert_eq!((again.gateway, again.pause.as_millis()), (1, 75));
        recovery.unknown_at(1);
        assert!(recovery.is_unknown_everywhere());
        assert_eq!(recovery.next(now, 0.5), None);
    }

    #[test]
    fn time_with_a_gateway_does_not_count_but_fruitless_turns_do() {
        let now = Instant::now();
        let mut recovery = Recovery::new(0, 1, &options(), now);
        let lost_again = now + Duration::from_secs(60);
        assert!(recovery.fruitless(now, lost_again));
        assert_eq!(recovery.deadline(), now + Duration::from_secs(70));
        let turns = (1..100)
            .take_while(|_| recovery.fruitless(now, now))
            .count();
        assert_eq!(turns + 2, MAX_FRUITLESS as usize);
    }
}
