//! The life of one request: a pure fold over its events.
//!
//! Invariants:
//! * a token is shown only after it is in the log (commit, then emit), and a viewer sees positions in order, without
//!   gap or repeat, then one terminal event;
//! * tokens of any attempt but the current one are dropped (fencing), and so are tokens at any position but the next;
//! * committed token ids are never sampled again: a new attempt is given the log to force;
//! * once there is an outcome, nothing changes it.

use std::time::{Duration, Instant};

use understudy_engine_core::frame::{
    self, AttemptError, AttemptId, SamplingParams, StartAttempt, StepToken,
};
use understudy_journal::{Admission, AppendError, Entry, FinishedRequest, Outcome, TokenLog};
use understudy_protocol::message::{
    FinishReason, Sampling, ServerMessage, TokenEvent, TopLogprob, Usage,
};
use understudy_protocol::{ErrorBody, ErrorCode, Position};

use super::text::TextFold;
use crate::peer::{LossCause, Refusal, ReplicaRef};

/// How many of the last committed logprobs a new attempt has to reproduce, bit for bit.
const CHECKED_LOGPROBS: usize = 4;

/// First pause before an attempt that met a full engine is routed again; doubles up to [`FULL_RETRY_MAX`].
const FULL_RETRY_INITIAL: Duration = Duration::from_millis(10);
const FULL_RETRY_MAX: Duration = Duration::from_millis(500);

/// Unit of the pause before an attempt of a request that may be what kills engines.
const SUSPECT_PAUSE: Duration = Duration::from_millis(50);

/// What the configuration says about a request's life.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Attempts at most, the first one included.
    pub max_attempts: u32,
}

/// Where a request is, for errors, logs and metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// No replica has it yet.
    Queued,
    /// A replica has it; no token came yet.
    Dispatched,
    Generating,
    /// Its attempt was lost; the next one has produced nothing yet.
    Recovering,
    Done,
}

impl Stage {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Dispatched => "dispatched",
            Self::Generating => "generating",
            Self::Recovering => "recovering",
            Self::Done => "done",
        }
    }
}

/// What the actor has to do, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Ask the router for a replica, after the pause.
    Route {
        start: StartAttempt,
        fingerprint: Option<String>,
        avoid: Vec<ReplicaRef>,
        after: Duration,
    },
    /// The attempt is over for this request: give its place back, and with `cancel` stop it.
    Release {
        attempt: AttemptId,
        cancel: bool,
    },
    /// For the viewer's connection.
    Emit(ServerMessage),
    /// The viewer has everything, terminal event included.
    StreamEnded {
        stream: u32,
    },
    /// The log is closed: keep it for clients that come back.
    Keep(Box<FinishedRequest>),
    Observe(Observation),
}

/// What metrics want to know.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Observation {
    FirstToken(Duration),
    InterToken(Duration),
    /// A lost attempt was made good: from the news of the loss to the next token.
    Recovered {
        cause: LossCause,
        stage: Stage,
        stall: Duration,
    },
    /// Messages of attempts that are not current any more.
    Fenced(u64),
    /// Committed tokens that a new attempt has to run through the model again.
    Replayed(u64),
    Ended(Summary),
}

/// How a request went, for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// From admission to the end.
    pub elapsed: Duration,
    /// From admission to the first dispatch, if there was one.
    pub queued: Option<Duration>,
    /// From the first dispatch to the first token, if there was one.
    pub prefill: Option<Duration>,
    /// From the first token to the last, if there was one.
    pub decode: Option<Duration>,
    pub prompt_tokens: u32,
    pub completion_tokens: u32,
}

/// The connection that watches.
#[derive(Debug, Clone)]
struct Viewer {
    stream: u32,
    next: Position,
    credit: u32,
}

#[derive(Debug)]
struct Loss {
    at: Instant,
    cause: LossCause,
    stage: Stage,
}

/// See the module.
#[derive(Debug)]
pub struct RequestCore {
    admission: Admission,
    settings: Settings,
    text: TextFold,
    log: TokenLog,
    /// The text that each committed token completed.
    pieces: Vec<Box<str>>,
    /// Text that came out at the end.
    tail: String,
    epoch: u32,
    attempts: u32,
    full_retries: u32,
    /// Losses since the last committed token.
    fruitless: u32,
    stage: Stage,
    fingerprint: Option<String>,
    at: Option<ReplicaRef>,
    avoid: Vec<ReplicaRef>,
    loss: Option<Loss>,
    outcome: Option<Outcome>,
    viewer: Option<Viewer>,
    admitted_at: Instant,
    dispatched_at: Option<Instant>,
    first_token_at: Option<Instant>,
    last_token_at: Option<Instant>,
}

impl RequestCore {
    pub fn new(admission: Admission, text: TextFold, settings: Settings, now: Instant) -> Self {
        Self {
            admission,
            settings,
            text,
            log: TokenLog::default(),
            pieces: Vec::new(),
            tail: String::new(),
            epoch: 0,
            attempts: 0,
            full_retries: 0,
            fruitless: 0,
            stage: Stage::Queued,
            fingerprint: None,
            at: None,
            avoid: Vec::new(),
            loss: None,
            outcome: None,
            viewer: None,
            admitted_at: now,
            dispatched_at: None,
            first_token_at: None,
            last_token_at: None,
        }
    }

    /// A closed log, brought back for a client that wants to read it again.
    pub fn finished(request: FinishedRequest, mut text: TextFold, now: Instant) -> Self {
        let mut pieces = Vec::with_capacity(request.log.entries().len());
        for entry in request.log.entries() {
            pieces.push(text.push(entry.id).text.into_boxed_str());
        }
        let tail = text.finish();
        let mut core = Self::new(request.admission, text, Settings { max_attempts: 0 }, now);
        core.log = request.log;
        core.pieces = pieces;
        core.tail = tail;
        core.outcome = Some(request.outcome);
        core.stage = Stage::Done;
        core
    }

    pub fn admission(&self) -> &Admission {
        &self.admission
    }

    pub fn stage(&self) -> Stage {
        self.stage
    }

    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    pub fn outcome(&self) -> Option<&Outcome> {
        self.outcome.as_ref()
    }

    pub fn committed(&self) -> Position {
        self.log.next_position()
    }

    /// How far the viewer has been served, if there is one.
    pub fn viewed(&self) -> Option<Position> {
        self.viewer.as_ref().map(|viewer| viewer.next)
    }

    /// The viewer has not taken what is ready for it for too long: it is told, and forgotten. The log stays readable.
    pub fn give_viewer_up(&mut self, waited: Duration) -> Vec<Effect> {
        let Some(Viewer { stream, next, .. }) = self.viewer.take() else {
            return Vec::new();
        };
        let message = format!(
            "no credit came for {} s after the request had ended: resume it at position {next}",
            waited.as_secs()
        );
        let error = ErrorBody::new(ErrorCode::Timeout, message);
        let request = Some(self.admission.request);
        let message = ServerMessage::Error {
            stream: Some(stream),
            request,
            error,
        };
        vec![Effect::Emit(message), Effect::StreamEnded { stream }]
    }

    /// Nothing is left to do: the log is closed, and nobody watches.
    pub fn is_over(&self) -> bool {
        self.outcome.is_some() && self.viewer.is_none()
    }

    /// The first attempt.
    pub fn start(&mut self) -> Vec<Effect> {
        self.attempts = 1;
        vec![self.next_attempt(Duration::ZERO)]
    }

    /// The router found a replica for the current attempt.
    pub fn dispatched(&mut self, epoch: u32, at: ReplicaRef, fingerprint: String, now: Instant) {
        if epoch != self.epoch || self.outcome.is_some() {
            return;
        }
        self.at = Some(at);
        self.dispatched_at.get_or_insert(now);
        if self.log.entries().is_empty() {
            // Nothing is committed, so nothing binds the request to the numbers of an earlier engine.
            self.fingerprint = Some(fingerprint);
        }
        if self.stage == Stage::Queued {
            self.stage = Stage::Dispatched;
        }
    }

    /// Tokens of one step, in order.
    pub fn tokens(&mut self, tokens: Vec<StepToken>, now: Instant) -> Vec<Effect> {
        let mut effects = Vec::new();
        let mut fenced = 0;
        for token in tokens {
            if token.attempt.epoch != self.epoch || self.outcome.is_some() {
                fenced += 1;
                continue;
            }
            match self.commit(&token) {
                Ok(()) => self.committed_one(&token, now, &mut effects),
                Err(AppendError::Repeated { .. }) => fenced += 1,
                Err(AppendError::Gap { .. }) => {
                    effects.push(Effect::Release {
                        attempt: self.attempt(),
                        cancel: true,
                    });
                    effects.extend(self.lose(LossCause::Gap, now));
                }
            }
        }
        if fenced > 0 {
            effects.push(Effect::Observe(Observation::Fenced(fenced)));
        }
        effects.extend(self.pump());
        effects
    }

    /// The current attempt's engine or host is gone.
    pub fn lost(&mut self, epoch: u32, cause: LossCause, now: Instant) -> Vec<Effect> {
        if epoch != self.epoch || self.outcome.is_some() {
            return Vec::new();
        }
        let mut effects = vec![Effect::Release {
            attempt: self.attempt(),
            cancel: false,
        }];
        effects.extend(self.lose(cause, now));
        effects
    }

    /// The host or its engine did not take the attempt.
    pub fn refused(&mut self, epoch: u32, refusal: Refusal, now: Instant) -> Vec<Effect> {
        if epoch != self.epoch || self.outcome.is_some() {
            return Vec::new();
        }
        let mut effects = vec![Effect::Release {
            attempt: self.attempt(),
            cancel: false,
        }];
        match refusal {
            Refusal::NotReady | Refusal::Engine(AttemptError::Full { .. }) => {
                let pause = FULL_RETRY_INITIAL
                    .saturating_mul(1 << self.full_retries.min(10))
                    .min(FULL_RETRY_MAX);
                self.full_retries += 1;
                effects.push(self.next_attempt(pause));
            }
            Refusal::Engine(AttemptError::Invalid(reason)) => {
                effects.extend(self.fail(ErrorBody::new(ErrorCode::InvalidRequest, reason), now));
            }
            // Numbers that are none, or not the committed ones: another replica may do better.
            Refusal::Engine(
                AttemptError::ReplayMismatch { .. } | AttemptError::NotFinite { .. },
            ) => {
                self.avoid.extend(self.at.clone());
                effects.extend(self.lose(LossCause::Mismatch, now));
            }
        }
        effects
    }

    /// The router knows of no replica that could serve.
    pub fn unroutable(
        &mut self,
        epoch: u32,
        code: ErrorCode,
        reason: String,
        now: Instant,
    ) -> Vec<Effect> {
        if epoch != self.epoch {
            return Vec::new();
        }
        self.fail(ErrorBody::new(code, reason), now)
    }

    /// The client's wish, or its connection's end.
    pub fn cancel(&mut self, now: Instant) -> Vec<Effect> {
        self.end(Outcome::Finished(FinishReason::Cancelled), true, now)
    }

    pub fn deadline(&mut self, now: Instant) -> Vec<Effect> {
        let stage = self.stage.as_str();
        let message = format!(
            "deadline of {} ms passed while the request was {stage}, after {} tokens",
            self.admission.deadline_ms,
            self.log.next_position()
        );
        let error = ErrorBody {
            stage: Some(stage.into()),
            ..ErrorBody::new(ErrorCode::DeadlineExceeded, message)
        };
        self.fail(error, now)
    }

    /// Ends the request with an error, unless it has ended.
    pub fn fail(&mut self, error: ErrorBody, now: Instant) -> Vec<Effect> {
        self.end(Outcome::Failed(error), true, now)
    }

    /// A connection watches from `next` on. The one before it, if any, is forgotten.
    ///
    /// # Errors
    /// [`ErrorCode::InvalidRequest`] if `next` is beyond what is committed.
    pub fn attach(
        &mut self,
        stream: u32,
        next: Position,
        credit: u32,
    ) -> Result<Vec<Effect>, ErrorBody> {
        if next > self.log.next_position() {
            return Err(ErrorBody::new(
                ErrorCode::InvalidRequest,
                format!(
                    "next_position {next} is beyond the {} tokens of the request",
                    self.log.next_position()
                ),
            ));
        }
        self.viewer = Some(Viewer {
            stream,
            next,
            credit,
        });
        let mut effects = vec![Effect::Emit(ServerMessage::Accepted {
            stream,
            request: self.admission.request,
            prompt_tokens: self.admission.prompt.len() as u32,
            seed: self.admission.sampling.seed.unwrap_or_default(),
        })];
        effects.extend(self.pump());
        Ok(effects)
    }

    /// The connection is gone.
    pub fn detach(&mut self) {
        self.viewer = None;
    }

    pub fn has_viewer(&self) -> bool {
        self.viewer.is_some()
    }

    /// The client takes `tokens` more events; the sum is capped at `max_credit`.
    pub fn credit(&mut self, tokens: u32, max_credit: u32) -> Vec<Effect> {
        if let Some(viewer) = &mut self.viewer {
            viewer.credit = viewer.credit.saturating_add(tokens).min(max_credit);
        }
        self.pump()
    }

    fn attempt(&self) -> AttemptId {
        AttemptId {
            request: self.admission.request.0,
            epoch: self.epoch,
        }
    }

    fn commit(&mut self, token: &StepToken) -> Result<(), AppendError> {
        let frame::OutputToken {
            id,
            logprob,
            ref top,
        } = token.token;
        self.log.append(
            token.position,
            Entry {
                id,
                logprob,
                top: top.clone(),
            },
        )
    }

    /// What follows from a token that was just committed: its text, its times, and perhaps the end.
    fn committed_one(&mut self, token: &StepToken, now: Instant, effects: &mut Vec<Effect>) {
        let finish = token.finish;
        let piece = self.text.push(token.token.id);
        self.pieces.push(piece.text.into_boxed_str());
        self.observe_token(now, effects);
        self.stage = Stage::Generating;
        self.full_retries = 0;
        // Attempts that led somewhere do not count against the next ones: a long stream may survive any number of faults.
        self.attempts = 1;
        self.fruitless = 0;
        let reason = match (piece.stopped, finish) {
            (true, _) | (_, Some(frame::FinishReason::Stop)) => FinishReason::Stop,
            (_, Some(frame::FinishReason::Length)) => FinishReason::Length,
            (false, None) => return,
        };
        // An engine that finished by itself has nothing to cancel; one that ran into a stop string goes on until told.
        effects.extend(self.end(Outcome::Finished(reason), finish.is_none(), now));
    }

    fn observe_token(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let since = |then: Instant| now.saturating_duration_since(then);
        effects.push(Effect::Observe(match self.last_token_at {
            None => Observation::FirstToken(since(self.admitted_at)),
            Some(last) => Observation::InterToken(since(last)),
        }));
        self.first_token_at.get_or_insert(now);
        self.last_token_at = Some(now);
        if let Some(Loss { at, cause, stage }) = self.loss.take() {
            effects.push(Effect::Observe(Observation::Recovered {
                cause,
                stage,
                stall: since(at),
            }));
        }
    }

    /// The current attempt is gone: the next one, or the end of patience.
    fn lose(&mut self, cause: LossCause, now: Instant) -> Vec<Effect> {
        // A loss during a recovery is part of the same stall: the client has been waiting since the first one.
        if self.loss.is_none() {
            self.loss = Some(Loss {
                at: now,
                cause,
                stage: self.stage,
            });
        }
        self.fruitless += 1;
        if self.attempts >= self.settings.max_attempts {
            let message = format!(
                "the request was tried {} times without a new token, and each attempt was lost (the last one: {}); its {} tokens stay readable",
                self.attempts,
                cause.as_str(),
                self.log.next_position()
            );
            return self.end(
                Outcome::Failed(ErrorBody::new(ErrorCode::AttemptsExhausted, message)),
                false,
                now,
            );
        }
        self.attempts += 1;
        self.stage = Stage::Recovering;
        let replayed = self.log.entries().len() as u64;
        vec![
            Effect::Observe(Observation::Replayed(replayed)),
            self.next_attempt(self.pause_before_retry()),
        ]
    }

    fn next_attempt(&mut self, after: Duration) -> Effect {
        self.epoch += 1;
        let fingerprint = if self.log.entries().is_empty() {
            None
        } else {
            self.fingerprint.clone()
        };
        let start = StartAttempt {
            attempt: self.attempt(),
            prompt: self.admission.prompt.clone(),
            committed: self.log.ids(),
            expect_logprobs: self.log.last_logprobs(CHECKED_LOGPROBS),
            sampling: engine_sampling(&self.admission.sampling),
        };
        Effect::Route {
            start,
            fingerprint,
            avoid: self.avoid.clone(),
            after,
        }
    }

    /// A request whose engine died on it twice without a new token may be what kills engines. From then on it waits a
    /// while, of its own length, before each attempt: whoever only happened to be beside it gets ahead of it.
    fn pause_before_retry(&self) -> Duration {
        if self.fruitless < 2 {
            return Duration::ZERO;
        }
        let own = (self.admission.request.0 as u32).wrapping_mul(self.epoch.wrapping_add(1)) % 8;
        SUSPECT_PAUSE * (1 + own)
    }

    fn end(&mut self, outcome: Outcome, cancel: bool, now: Instant) -> Vec<Effect> {
        if self.outcome.is_some() {
            return Vec::new();
        }
        self.tail = self.text.finish();
        self.outcome = Some(outcome.clone());
        self.stage = Stage::Done;
        let finished = FinishedRequest {
            admission: self.admission.clone(),
            log: self.log.clone(),
            outcome,
        };
        let mut effects = vec![
            Effect::Release {
                attempt: self.attempt(),
                cancel,
            },
            Effect::Keep(Box::new(finished)),
            Effect::Observe(Observation::Ended(self.summary(now))),
        ];
        effects.extend(self.pump());
        effects
    }

    fn summary(&self, now: Instant) -> Summary {
        let between =
            |from: Option<Instant>, to: Option<Instant>| Some(to?.saturating_duration_since(from?));
        Summary {
            elapsed: now.saturating_duration_since(self.admitted_at),
            queued: between(Some(self.admitted_at), self.dispatched_at),
            prefill: between(self.dispatched_at, self.first_token_at),
            decode: between(self.first_token_at, self.last_token_at),
            prompt_tokens: self.admission.prompt.len() as u32,
            completion_tokens: self.log.next_position(),
        }
    }

    /// The replica that the current attempt runs at, if it was dispatched.
    pub fn at(&self) -> Option<&ReplicaRef> {
        self.at.as_ref()
    }

    /// Shows the viewer what it has credit for, and the end when it has seen everything before it.
    fn pump(&mut self) -> Vec<Effect> {
        let mut effects = Vec::new();
        let Some(viewer) = &mut self.viewer else {
            return effects;
        };
        while viewer.credit > 0 && viewer.next < self.log.next_position() {
            let event = token_event(viewer, &self.log, &self.pieces, &self.admission.sampling);
            effects.push(Effect::Emit(ServerMessage::Token(event)));
            viewer.next += 1;
            viewer.credit -= 1;
        }
        let (stream, all_seen) = (viewer.stream, viewer.next == self.log.next_position());
        if let Some(outcome) = self.outcome.as_ref().filter(|_| all_seen) {
            effects.push(Effect::Emit(self.terminal(stream, outcome)));
            effects.push(Effect::StreamEnded { stream });
            self.viewer = None;
        }
        effects
    }

    fn terminal(&self, stream: u32, outcome: &Outcome) -> ServerMessage {
        match outcome {
            Outcome::Finished(finish_reason) => ServerMessage::Finished {
                stream,
                finish_reason: *finish_reason,
                usage: Usage {
                    prompt_tokens: self.admission.prompt.len() as u32,
                    completion_tokens: self.log.next_position(),
                },
                text: self.tail.clone(),
            },
            Outcome::Failed(error) => ServerMessage::Error {
                stream: Some(stream),
                request: Some(self.admission.request),
                error: error.clone(),
            },
        }
    }
}

fn token_event(
    viewer: &Viewer,
    log: &TokenLog,
    pieces: &[Box<str>],
    sampling: &Sampling,
) -> TokenEvent {
    let entry = &log.entries()[viewer.next as usize];
    let wanted = sampling.logprobs || sampling.top_logprobs > 0;
    TokenEvent {
        stream: viewer.stream,
        position: viewer.next,
        id: entry.id,
        text: pieces[viewer.next as usize].to_string(),
        logprob: wanted.then_some(entry.logprob),
        top_logprobs: entry
            .top
            .iter()
            .map(|&(id, logprob)| TopLogprob { id, logprob })
            .collect(),
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
    }
}

#[cfg(test)]
mod tests;
