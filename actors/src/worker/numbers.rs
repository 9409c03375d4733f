//! Whether an engine's numbers can be trusted. Pure.
//!
//! One attempt with wrong numbers need not be the engine's fault: a prompt may overflow a narrow dtype, and a log may
//! come from an engine that was broken. Replacing the engine for each would let a single request end engine after
//! engine. Wrong numbers for several requests in a row, with nothing good in between, are the engine's: damaged weights,
//! or a device that miscalculates. It is loaded anew then.

use understudy_engine_core::frame::{AttemptError, AttemptId, StepToken};

/// So many requests with logits that are no numbers, and no token in between. A broken engine has no good tokens.
pub const NOT_FINITE_LIMIT: usize = 2;

/// So many requests whose log came out differently, and none that came out the same in between. More than above: logs
/// that one broken engine has left behind come to the others together.
pub const MISMATCH_LIMIT: usize = 3;

/// See the module.
#[derive(Debug, Default)]
pub struct Numbers {
    // At most as many as the limits.
    not_finite: Vec<u128>,
    mismatched: Vec<u128>,
}

impl Numbers {
    /// Tokens came out of a step.
    pub fn good(&mut self, tokens: &[StepToken]) {
        if !tokens.is_empty() {
            self.not_finite.clear();
        }
        // The first token of an attempt that had a log: the log came out the same.
        let resumed = |token: &StepToken| token.waited_ms.is_some() && token.position > 0;
        if !self.mismatched.is_empty() && tokens.iter().any(resumed) {
            self.mismatched.clear();
        }
    }

    /// An attempt failed. Returns whether the engine has to be replaced.
    pub fn failed(&mut self, attempt: AttemptId, error: &AttemptError) -> bool {
        let (requests, limit) = match error {
            AttemptError::NotFinite { .. } => (&mut self.not_finite, NOT_FINITE_LIMIT),
            AttemptError::ReplayMismatch { .. } => (&mut self.mismatched, MISMATCH_LIMIT),
            AttemptError::Invalid(_) | AttemptError::Full { .. } => return false,
        };
        if !requests.contains(&attempt.request) {
            requests.push(attempt.request);
        }
        requests.len() >= limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::testing::token;

    const MISMATCH: AttemptError = AttemptError::ReplayMismatch {
        position: 3,
        expected: 1,
        actual: 2,
    };
    const NOT_FINITE: AttemptError = AttemptError::NotFinite { position: 3 };

    fn attempt(request: u128) -> AttemptId {
        AttemptId { request, epoch: 1 }
    }

    /// What is said of each of these requests, one after the other.
    fn verdicts(numbers: &mut Numbers, error: &AttemptError, requests: &[u128]) -> Vec<bool> {
        let verdict = |&request| numbers.failed(attempt(request), error);
        requests.iter().map(verdict).collect()
    }

    fn first_token(position: u32) -> StepToken {
        StepToken {
            waited_ms: Some(0),
            ..token(attempt(9), position)
        }
    }

    #[test]
    fn wrong_numbers_for_different_requests_are_the_engines_fault() {
        let mut numbers = Numbers::default();
        assert_eq!(verdicts(&mut numbers, &NOT_FINITE, &[1, 2]), [false, true]);
        let mut numbers = Numbers::default();
        let found = verdicts(&mut numbers, &MISMATCH, &[1, 2, 3]);
        assert_eq!(found, [false, false, true]);
    }

    #[test]
    fn one_request_may_fail_as_often_as_it_likes() {
        let mut numbers = Numbers::default();
        assert_eq!(verdicts(&mut numbers, &NOT_FINITE, &[1; 9]), [false; 9]);
        assert_eq!(verdicts(&mut numbers, &MISMATCH, &[1; 9]), [false; 9]);
        let full = AttemptError::Full {
            running: 1,
            waiting: 1,
            limit: 1,
        };
        assert_eq!(verdicts(&mut numbers, &full, &[1, 2, 3, 4]), [false; 4]);
    }

    #[test]
    fn what_comes_out_right_in_between_clears_the_engine() {
        let mut numbers = Numbers::default();
        for request in 0..9 {
            assert!(!numbers.failed(attempt(request), &NOT_FINITE));
            numbers.good(&[]);
            numbers.good(&[token(attempt(20), 5)]);
        }
        verdicts(&mut numbers, &MISMATCH, &[1, 2]);
        numbers.good(&[first_token(7)]);
        assert_eq!(verdicts(&mut numbers, &MISMATCH, &[3, 4]), [false; 2]);
        // Neither a token further on nor one without a log says anything about replays.
        numbers.good(&[token(attempt(20), 5), first_token(0)]);
        assert_eq!(verdicts(&mut numbers, &MISMATCH, &[5]), [true]);
    }
}
