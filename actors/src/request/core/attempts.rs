//! The attempts of a request: which one is current, and whether and when there is a next one.
//!
//! Invariant: epochs only grow, and a new attempt is given the whole log to force.

use std::time::{Duration, Instant};

use understudy_engine_core::frame::{AttemptError, AttemptId, SamplingParams, StartAttempt};
use understudy_journal::{Admission, TokenLog};
use understudy_protocol::message::Sampling;
use understudy_protocol::{ErrorBody, ErrorCode};

use super::effect::{Effect, Settings};
use crate::peer::{LossCause, Refusal, ReplicaRef};

/// How many of the last committed logprobs a new attempt has to reproduce: bit for bit where the engine is exact, within a tolerance elsewhere.
const CHECKED_LOGPROBS: usize = 4;

/// First pause before an attempt that met a full engine is routed again; doubles up to [`FULL_RETRY_MAX`].
const FULL_RETRY_INITIAL: Duration = Duration::from_millis(10);
const FULL_RETRY_MAX: Duration = Duration::from_millis(500);

/// From so many deaths without a new token on, a request is a suspect: engines compute it alone, so that the next death
/// is its own doing, or none of its business.
const SUSPECT_AFTER: u32 = 2;

/// See the module. What it counts starts over with every committed token.
#[derive(Debug)]
pub(super) struct Attempts {
    settings: Settings,
    epoch: u32,
    tried: u32,
    /// Engines that died on the request.
    deaths: u32,
    full_retries: u32,
    refused_since: Option<Instant>,
    fingerprint: Option<String>,
    at: Option<ReplicaRef>,
    avoid: Vec<ReplicaRef>,
    shun: Option<ReplicaRef>,
    /// Why replicas are avoided, in the words of the last one.
    rejection: Option<AttemptError>,
}

impl Attempts {
    pub(super) fn new(settings: Settings) -> Self {
        Self {
            settings,
            epoch: 0,
            tried: 1,
            deaths: 0,
            full_retries: 0,
            refused_since: None,
            fingerprint: None,
            at: None,
            avoid: Vec::new(),
            shun: None,
            rejection: None,
        }
    }

    pub(super) fn epoch(&self) -> u32 {
        self.epoch
    }

    pub(super) fn id(&self, admission: &Admission) -> AttemptId {
        AttemptId {
            request: admission.request.0,
            epoch: self.epoch,
        }
    }

    /// Where the latest attempt runs, if it was dispatched.
    pub(super) fn at(&self) -> Option<&ReplicaRef> {
        self.at.as_ref()
    }

    pub(super) fn rejection(&self) -> Option<&AttemptError> {
        self.rejection.as_ref()
    }

    pub(super) fn dispatched(&mut self, at: ReplicaRef, fingerprint: String, log: &TokenLog) {
        self.at = Some(at);
        if log.entries().is_empty() {
            // Nothing is committed, so nothing binds the request to the numbers of an earlier engine.
            self.fingerprint = Some(fingerprint);
        }
    }

    /// Attempts that led somewhere do not count against the next ones: a long stream may survive any number of faults.
    pub(super) fn progress(&mut self) {
        self.tried = 1;
        self.deaths = 0;
        self.full_retries = 0;
        self.refused_since = None;
        self.shun = None;
    }

    /// The next attempt, which starts from the log.
    pub(super) fn next(
        &mut self,
        admission: &Admission,
        log: &TokenLog,
        after: Duration,
    ) -> Effect {
        self.epoch += 1;
        let fingerprint = match log.entries().is_empty() {
            true => None,
            false => self.fingerprint.clone(),
        };
        let start = StartAttempt {
            attempt: self.id(admission),
            prompt: admission.prompt.clone(),
            committed: log.ids(),
            expect_logprobs: log.last_logprobs(CHECKED_LOGPROBS),
            suspect: self.deaths >= self.suspect_after(),
            priority: admission.priority,
            fork_of: None,
            // One cache for all: clients are not told apart yet.
            cache_salt: 0,
            sampling: engine_sampling(&admission.sampling),
        };
        Effect::Route {
            start,
            fingerprint,
            avoid: self.avoid.clone(),
            shun: self.shun.clone(),
            after,
        }
    }

    /// The current attempt was lost.
    ///
    /// # Errors
    /// What to tell the client, if there is to be no next one.
    pub(super) fn after_loss(&mut self, cause: LossCause) -> Result<(), ErrorBody> {
        if is_death(cause) {
            self.deaths += 1;
            if self.are_deadly() {
                return Err(self.poisonous());
            }
        }
        if self.tried >= self.settings.max_attempts {
            return Err(self.exhausted(cause));
        }
        self.tried += 1;
        // A loss means that some replica had taken the attempt: the patience with refusals starts over.
        self.refused_since = None;
        self.full_retries = 0;
        Ok(())
    }

    /// Where only two deaths are allowed, it gets its last attempt alone all the same.
    fn suspect_after(&self) -> u32 {
        SUSPECT_AFTER.min(self.settings.max_engine_deaths.saturating_sub(1).max(1))
    }

    /// Whether as many engines died on the request as may.
    pub(super) fn are_deadly(&self) -> bool {
        self.deaths >= self.settings.max_engine_deaths
    }

    /// The current attempt met a replica without room: the pause before the next one.
    ///
    /// # Errors
    /// What to tell the client, if that has been going on for too long.
    pub(super) fn after_refusal(
        &mut self,
        refusal: &Refusal,
        now: Instant,
    ) -> Result<Duration, ErrorBody> {
        let since = *self.refused_since.get_or_insert(now);
        let waited = now.saturating_duration_since(since);
        if waited >= self.settings.no_replica_timeout {
            let waited_ms = waited.as_millis();
            return Err(match refusal {
                Refusal::NotReady => ErrorBody::new(
                    ErrorCode::Unavailable,
                    format!(
                        "no replica took the request within {waited_ms} ms: each one that was asked had just gone out of service"
                    ),
                ),
                Refusal::Engine(full) => ErrorBody::new(
                    ErrorCode::Overloaded,
                    format!("no replica had room for the request within {waited_ms} ms ({full})"),
                ),
            });
        }
        let pause = FULL_RETRY_INITIAL.saturating_mul(1 << self.full_retries.min(10));
        self.full_retries += 1;
        self.shun = self.at.clone();
        Ok(pause.min(FULL_RETRY_MAX))
    }

    /// The replica's numbers are none, or not the committed ones: another replica may do better.
    pub(super) fn reject_replica(&mut self, error: AttemptError) {
        self.avoid.extend(self.at.clone());
        self.rejection = Some(error);
    }

    fn poisonous(&self) -> ErrorBody {
        let message = format!(
            "{} engines died on this request without a new token in between, so it is taken to be the cause and not tried again; its tokens stay readable. \
             Whoever runs the cluster finds the reason in the nodes' logs, under `engine lost`",
            self.deaths
        );
        ErrorBody {
            retriable: false,
            ..ErrorBody::new(ErrorCode::AttemptsExhausted, message)
        }
    }

    fn exhausted(&self, cause: LossCause) -> ErrorBody {
        let mut message = format!(
            "the request was tried {} times without a new token, and each attempt was lost (the last one: {}); its tokens stay readable",
            self.tried,
            cause.as_str()
        );
        if let Some(error) = &self.rejection {
            message += &format!(". A replica said: {error}");
        }
        ErrorBody::new(ErrorCode::AttemptsExhausted, message)
    }
}

/// Whether the loss is evidence that the request kills engines. An engine that died of something else, a node that is gone,
/// or a message that was lost, is none.
pub(super) fn is_death(cause: LossCause) -> bool {
    match cause {
        LossCause::EngineExit
        | LossCause::EngineSilent
        | LossCause::EngineHang
        | LossCause::EngineProtocol => true,
        LossCause::EngineGone
        | LossCause::NodeDown
        | LossCause::Stopped
        | LossCause::Gap
        | LossCause::Mismatch => false,
    }
}

/// The engine's parameters from resolved ones; what is unset takes the engine's neutral value.
fn engine_sampling(sampling: &Sampling) -> SamplingParams {
    let neutral = SamplingParams::default();
    SamplingParams {
        temperature: sampling.temperature.unwrap_or(neutral.temperature),
        top_p: sampling.top_p.unwrap_or(neutral.top_p),
        top_k: sampling.top_k.unwrap_or(neutral.top_k),
        min_p: sampling.min_p.unwrap_or(neutral.min_p),
        repetition_penalty: sampling
            .repetition_penalty
            .unwrap_or(neutral.repetition_penalty),
        presence_penalty: sampling
            .presence_penalty
            .unwrap_or(neutral.presence_penalty),
        frequency_penalty: sampling
            .frequency_penalty
            .unwrap_or(neutral.frequency_penalty),
        seed: sampling.seed.unwrap_or(neutral.seed),
        max_tokens: sampling.max_tokens.unwrap_or(neutral.max_tokens),
        min_tokens: sampling.min_tokens.unwrap_or(neutral.min_tokens),
        stop_token_ids: sampling.stop_token_ids.clone(),
        ignore_eos: sampling.ignore_eos,
        top_logprobs: sampling.top_logprobs,
        logit_bias: sampling.logit_bias.clone(),
        allowed_token_ids: sampling.allowed_token_ids.clone(),
        speculate: sampling.speculate,
    }
}
