//! How long attempts wait in the engine before their first step. The scheduler has no clock; this has it.
//!
//! Bounded by the attempts that the inbox lets live.

use std::{collections::HashMap, time::Instant};

use crate::{frame::AttemptId, scheduler::StepOutcome};

/// How far an attempt without a token is.
#[derive(Debug, Clone, Copy)]
enum Wait {
    /// It waits, since then.
    Since(Instant),
    /// It waited this long; its first token has yet to say so.
    Over { waited_ms: u32 },
}

/// See the module.
#[derive(Debug, Default)]
pub struct Waits {
    waits: HashMap<AttemptId, Wait>,
}

impl Waits {
    /// An attempt was taken in.
    pub fn arrived(&mut self, attempt: AttemptId, at: Instant) {
        self.waits.insert(attempt, Wait::Since(at));
    }

    /// A step that began at `begins` is done: waits end with it, and first tokens say how long they were.
    pub fn step(&mut self, outcome: &mut StepOutcome, begins: Instant) {
        for attempt in &outcome.begun {
            if let Some(wait) = self.waits.get_mut(attempt)
                && let Wait::Since(arrived) = *wait
            {
                let waited = begins.saturating_duration_since(arrived).as_millis();
                let waited_ms = u32::try_from(waited).unwrap_or(u32::MAX);
                *wait = Wait::Over { waited_ms };
            }
        }
        if self.waits.is_empty() {
            return;
        }
        for token in &mut outcome.tokens {
            if let Some(Wait::Over { waited_ms }) = self.waits.remove(&token.attempt) {
                token.waited_ms = Some(waited_ms);
            }
        }
    }

    /// Attempts ended, with or without a token.
    pub fn forget(&mut self, attempts: &[AttemptId]) {
        for attempt in attempts {
            self.waits.remove(attempt);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::frame::{OutputToken, StepToken};

    fn attempt(request: u128) -> AttemptId {
        AttemptId { request, epoch: 1 }
    }

    fn outcome(begun: &[u128], tokens: &[u128]) -> StepOutcome {
        let token = |&request| StepToken {
            attempt: attempt(request),
            position: 0,
            token: OutputToken {
                id: 1,
                logprob: 0.0,
                top: vec![],
            },
            finish: None,
            waited_ms: None,
        };
        StepOutcome {
            tokens: tokens.iter().map(token).collect(),
            begun: begun.iter().copied().map(attempt).collect(),
            ..StepOutcome::default()
        }
    }

    fn waited(outcome: &StepOutcome) -> Vec<Option<u32>> {
        outcome.tokens.iter().map(|token| token.waited_ms).collect()
    }

    #[test]
    fn the_first_token_says_how_long_its_attempt_waited_for_its_first_step() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut waits = Waits::default();
        waits.arrived(attempt(1), at(0));
        waits.arrived(attempt(2), at(3));
        let mut first = outcome(&[1], &[1]);
        waits.step(&mut first, at(10));
        assert_eq!(waited(&first), [Some(10)]);
        // A prompt of two steps: the second one is not waiting any more.
        let mut second = outcome(&[2], &[1]);
        waits.step(&mut second, at(20));
        assert_eq!(waited(&second), [None]);
        let mut third = outcome(&[], &[1, 2]);
        waits.step(&mut third, at(90));
        assert_eq!(waited(&third), [None, Some(17)]);
        assert!(waits.waits.is_empty());
    }

    #[test]
    fn attempts_that_end_without_a_token_are_forgotten() {
        let mut waits = Waits::default();
        waits.arrived(attempt(1), Instant::now());
        waits.arrived(attempt(2), Instant::now());
        waits.step(&mut outcome(&[1], &[]), Instant::now());
        waits.forget(&[attempt(1), attempt(2), attempt(3)]);
        assert!(waits.waits.is_empty());
    }
}
