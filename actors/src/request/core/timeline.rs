//! When things happened to a request: what latencies and the stall of a recovery are made from.

use std::time::{Duration, Instant};

use super::effect::{Observation, Stage, Summary};
use crate::peer::LossCause;

/// See the module.
#[derive(Debug)]
pub(super) struct Timeline {
    admitted: Instant,
    /// First dispatch of an attempt that a replica kept.
    dispatched: Option<Instant>,
    /// Dispatch of the current attempt.
    attempt_dispatched: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    /// How long the first attempt waited inside its engine.
    waited_in_engine: Duration,
    loss: Option<Loss>,
}

#[derive(Debug, Clone, Copy)]
struct Loss {
    /// Since when the client has been without news.
    since: Instant,
    cause: LossCause,
    stage: Stage,
}

impl Timeline {
    pub(super) fn new(admitted: Instant) -> Self {
        Self {
            admitted,
            dispatched: None,
            attempt_dispatched: None,
            first_token: None,
            last_token: None,
            waited_in_engine: Duration::ZERO,
            loss: None,
        }
    }

    pub(super) fn dispatched(&mut self, now: Instant) {
        self.dispatched.get_or_insert(now);
        self.attempt_dispatched = Some(now);
    }

    /// The replica did not keep the attempt: before the first token, the request still waits.
    pub(super) fn refused(&mut self) {
        self.attempt_dispatched = None;
        if self.first_token.is_none() && self.loss.is_none() {
            self.dispatched = None;
        }
    }

    /// A loss during a recovery is part of the same stall: the client has been waiting since the first one.
    pub(super) fn lost(&mut self, cause: LossCause, stage: Stage, now: Instant) {
        let since = self.last_token.max(self.attempt_dispatched).unwrap_or(now);
        self.loss.get_or_insert(Loss {
            since,
            cause,
            stage,
        });
    }

    pub(super) fn is_recovering(&self) -> bool {
        self.loss.is_some()
    }

    /// A token was committed; `waited` is how long its attempt waited in its engine, where the engine says so.
    pub(super) fn token(&mut self, now: Instant, waited: Option<Duration>) -> Vec<Observation> {
        let since = |then: Instant| now.saturating_duration_since(then);
        let mut observations = vec![match self.last_token {
            None => Observation::FirstToken(since(self.admitted)),
            Some(last) => Observation::InterToken(since(last)),
        }];
        if self.first_token.is_none() {
            self.first_token = Some(now);
            self.waited_in_engine = waited.unwrap_or_default();
        }
        self.last_token = Some(now);
        if let Some(Loss {
            since: then,
            cause,
            stage,
        }) = self.loss.take()
        {
            observations.push(Observation::Recovered {
                cause,
                stage,
                stall: since(then),
            });
        }
        observations
    }

    pub(super) fn summary(
        &self,
        now: Instant,
        prompt_tokens: u32,
        completion_tokens: u32,
    ) -> Summary {
        let between =
            |from: Option<Instant>, to: Option<Instant>| Some(to?.saturating_duration_since(from?));
        // A request waits for a replica, and then in its engine's queue.
        let started = self.dispatched.map(|at| match self.first_token {
            Some(first) => (at + self.waited_in_engine).min(first),
            None => at,
        });
        Summary {
            elapsed: now.saturating_duration_since(self.admitted),
            queued: between(Some(self.admitted), started),
            prefill: between(started, self.first_token),
            decode: between(self.first_token, self.last_token),
            prompt_tokens,
            completion_tokens,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn recovered(observations: &[Observation]) -> Option<Duration> {
        observations.iter().find_map(|seen| match seen {
            Observation::Recovered { stall, .. } => Some(*stall),
            _ => None,
        })
    }

    /// A hang is found late: what the client waited counts, not what was left when the news came.
    #[test]
    fn the_stall_begins_with_the_last_token() {
        let start = Instant::now();
        let mut timeline = Timeline::new(start);
        timeline.dispatched(start);
        timeline.token(start + 10 * MS, None);
        timeline.lost(LossCause::EngineHang, Stage::Generating, start + 900 * MS);
        timeline.dispatched(start + 901 * MS);
        timeline.lost(LossCause::EngineExit, Stage::Recovering, start + 905 * MS);
        timeline.dispatched(start + 906 * MS);
        assert_eq!(
            recovered(&timeline.token(start + 910 * MS, None)),
            Some(900 * MS)
        );
        assert_eq!(
            recovered(&timeline.token(start + 911 * MS, None)),
            None,
            "once"
        );
    }

    #[test]
    fn a_loss_before_the_first_token_stalls_since_the_dispatch() {
        let start = Instant::now();
        let mut timeline = Timeline::new(start);
        timeline.dispatched(start + 100 * MS);
        timeline.lost(LossCause::NodeDown, Stage::Dispatched, start + 150 * MS);
        timeline.dispatched(start + 151 * MS);
        assert_eq!(
            recovered(&timeline.token(start + 160 * MS, None)),
            Some(60 * MS)
        );
    }

    #[test]
    fn waiting_in_the_engine_and_refusals_are_queue_time() {
        let start = Instant::now();
        let mut timeline = Timeline::new(start);
        timeline.dispatched(start + 5 * MS);
        timeline.refused();
        timeline.dispatched(start + 50 * MS);
        timeline.token(start + 100 * MS, Some(30 * MS));
        let summary = timeline.summary(start + 120 * MS, 1, 1);
        assert_eq!(
            (summary.queued, summary.prefill),
            (Some(80 * MS), Some(20 * MS))
        );
    }
}
