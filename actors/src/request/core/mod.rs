//! The life of one request: a pure fold over its events.
//!
//! Invariants:
//! * a token is shown only after it is in the log (commit, then emit), and a viewer sees positions in order, without
//!   gap or repeat, then one terminal event;
//! * tokens of any attempt but the current one are dropped (fencing), and so are tokens at any position but the next;
//! * committed token ids are never sampled again: a new attempt is given the log to force;
//! * once there is an outcome, nothing changes it.

use std::time::{Duration, Instant};

use understudy_engine_core::frame::{self, AttemptError, StepToken};
use understudy_journal::{Admission, AppendError, Entry, FinishedRequest, Outcome};
use understudy_protocol::message::{FinishReason, ServerMessage};
use understudy_protocol::{ErrorBody, ErrorCode, Position};

use self::attempts::Attempts;
use self::timeline::Timeline;
use self::viewer::{Transcript, Viewer};
use super::text::TextFold;
use crate::peer::{LossCause, Refusal, ReplicaRef};

mod attempts;
mod effect;
mod timeline;
mod viewer;

pub use self::effect::{Effect, Observation, Settings, Stage, Summary};

/// See the module.
#[derive(Debug)]
pub struct RequestCore {
    admission: Admission,
    text: TextFold,
    transcript: Transcript,
    attempts: Attempts,
    timeline: Timeline,
    stage: Stage,
    viewer: Option<Viewer>,
}

impl RequestCore {
    pub fn new(admission: Admission, text: TextFold, settings: Settings, now: Instant) -> Self {
        Self {
            admission,
            text,
            transcript: Transcript::default(),
            attempts: Attempts::new(settings),
            timeline: Timeline::new(now),
            stage: Stage::Queued,
            viewer: None,
        }
    }

    /// A closed log, brought back for a client that wants to read it again.
    pub fn finished(
        request: FinishedRequest,
        mut text: TextFold,
        settings: Settings,
        now: Instant,
    ) -> Self {
        let ids = request.log.entries().iter();
        let pieces = ids
            .map(|entry| text.push(entry.id).text.into_boxed_str())
            .collect();
        let tail = text.finish();
        let mut core = Self::new(request.admission, text, settings, now);
        core.transcript = Transcript {
            log: request.log,
            pieces,
            tail,
            outcome: Some(request.outcome),
        };
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
        self.attempts.epoch()
    }

    pub fn outcome(&self) -> Option<&Outcome> {
        self.transcript.outcome.as_ref()
    }

    pub fn committed(&self) -> Position {
        self.transcript.log.next_position()
    }

    /// The replica that the latest attempt ran at, if it was dispatched.
    pub fn at(&self) -> Option<&ReplicaRef> {
        self.attempts.at()
    }

    /// How far the viewer has been served, if there is one.
    pub fn viewed(&self) -> Option<Position> {
        self.viewer.as_ref().map(|viewer| viewer.next)
    }

    /// Nothing is left to do: the log is closed, and nobody watches.
    pub fn is_over(&self) -> bool {
        self.outcome().is_some() && self.viewer.is_none()
    }

    /// The first attempt.
    pub fn start(&mut self) -> Vec<Effect> {
        vec![self.next_attempt(Duration::ZERO)]
    }

    /// The router found a replica for the current attempt.
    pub fn dispatched(&mut self, epoch: u32, at: ReplicaRef, fingerprint: String, now: Instant) {
        if !self.is_current(epoch) {
            return;
        }
        self.attempts
            .dispatched(at, fingerprint, &self.transcript.log);
        self.timeline.dispatched(now);
        if self.stage == Stage::Queued {
            self.stage = Stage::Dispatched;
        }
    }

    /// Tokens of one step, in order.
    pub fn tokens(&mut self, tokens: Vec<StepToken>, now: Instant) -> Vec<Effect> {
        let mut effects = Vec::new();
        let mut fenced = 0;
        for token in tokens {
            if !self.is_current(token.attempt.epoch) {
                fenced += 1;
                continue;
            }
            match self.commit(&token) {
                Ok(()) => self.committed_one(&token, now, &mut effects),
                Err(AppendError::Repeated { .. }) => fenced += 1,
                Err(AppendError::Gap { .. }) => {
                    effects.push(self.release(true));
                    effects.extend(self.lose(LossCause::Gap, now));
                }
            }
        }
        if fenced > 0 {
            effects.push(Effect::Observe(Observation::Fenced(fenced)));
        }
        self.pump(&mut effects);
        effects
    }

    /// The current attempt's engine or host is gone.
    pub fn lost(&mut self, epoch: u32, cause: LossCause, now: Instant) -> Vec<Effect> {
        if !self.is_current(epoch) {
            return Vec::new();
        }
        // After a gap the engine may still be at it.
        let mut effects = vec![self.release(cause == LossCause::Gap)];
        effects.extend(self.lose(cause, now));
        effects
    }

    /// The host or its engine did not take the attempt.
    pub fn refused(&mut self, epoch: u32, refusal: Refusal, now: Instant) -> Vec<Effect> {
        if !self.is_current(epoch) {
            return Vec::new();
        }
        let mut effects = vec![self.release(false)];
        match refusal {
            Refusal::NotReady | Refusal::Engine(AttemptError::Full { .. }) => {
                self.timeline.refused();
                if self.committed() == 0 && !self.timeline.is_recovering() {
                    self.stage = Stage::Queued;
                }
                match self.attempts.after_refusal(&refusal, now) {
                    Ok(pause) => effects.push(self.next_attempt(pause)),
                    Err(error) => effects.extend(self.fail(error, now)),
                }
            }
            Refusal::Engine(AttemptError::Invalid(reason)) => {
                effects.extend(self.fail(ErrorBody::new(ErrorCode::InvalidRequest, reason), now));
            }
            Refusal::Engine(
                error @ (AttemptError::ReplayMismatch { .. } | AttemptError::NotFinite { .. }),
            ) => {
                self.attempts.reject_replica(error);
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
        mut reason: String,
        now: Instant,
    ) -> Vec<Effect> {
        if !self.is_current(epoch) {
            return Vec::new();
        }
        if let Some(error) = self.attempts.rejection() {
            reason += &format!(". A replica said: {error}");
        }
        self.fail(ErrorBody::new(code, reason), now)
    }

    /// The client's wish, or its connection's end. A client that is there gets the end without further tokens.
    pub fn cancel(&mut self, now: Instant) -> Vec<Effect> {
        if let Some(viewer) = &mut self.viewer {
            viewer.skip_to_end(&self.transcript.log);
        }
        let mut effects = self.end(Outcome::Finished(FinishReason::Cancelled), true, now);
        // If it had ended already, its end is still owed.
        self.pump(&mut effects);
        effects
    }

    pub fn deadline(&mut self, now: Instant) -> Vec<Effect> {
        let stage = self.stage.as_str();
        let message = format!(
            "deadline of {} ms passed while the request was {stage}, after {} tokens",
            self.admission.deadline_ms,
            self.committed()
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
        self.viewer = Some(Viewer::new(stream, next, credit, &self.transcript.log)?);
        let mut effects = vec![Effect::Emit(ServerMessage::Accepted {
            stream,
            request: self.admission.request,
            prompt_tokens: self.admission.prompt.len() as u32,
            seed: self.admission.sampling.seed.unwrap_or_default(),
        })];
        self.pump(&mut effects);
        Ok(effects)
    }

    /// The connection is gone.
    pub fn detach(&mut self) {
        self.viewer = None;
    }

    /// The client takes `tokens` more events; the sum is capped at `max_credit`.
    pub fn credit(&mut self, tokens: u32, max_credit: u32) -> Vec<Effect> {
        if let Some(viewer) = &mut self.viewer {
            viewer.grant(tokens, max_credit);
        }
        self.more()
    }

    /// Whether the viewer's connection takes nothing more for now.
    pub fn hold(&mut self, held: bool) -> Vec<Effect> {
        if let Some(viewer) = &mut self.viewer {
            viewer.hold(held);
        }
        self.more()
    }

    /// What the viewer can be given now.
    pub fn more(&mut self) -> Vec<Effect> {
        let mut effects = Vec::new();
        self.pump(&mut effects);
        effects
    }

    /// The viewer has not taken what is ready for it for too long: it is told, and forgotten. The log stays readable.
    pub fn give_viewer_up(&mut self, waited: Duration) -> Vec<Effect> {
        let Some(viewer) = self.viewer.take() else {
            return Vec::new();
        };
        let (stream, next) = (viewer.stream, viewer.next);
        let message = format!(
            "no credit came for {} s after the request had ended: resume it at position {next}",
            waited.as_secs()
        );
        let message = ServerMessage::Error {
            stream: Some(stream),
            request: Some(self.admission.request),
            error: ErrorBody::new(ErrorCode::Timeout, message),
        };
        vec![Effect::Emit(message), Effect::StreamEnded { stream }]
    }

    fn is_current(&self, epoch: u32) -> bool {
        epoch == self.epoch() && self.outcome().is_none()
    }

    fn release(&self, cancel: bool) -> Effect {
        Effect::Release {
            attempt: self.attempts.id(&self.admission),
            cancel,
        }
    }

    fn commit(&mut self, token: &StepToken) -> Result<(), AppendError> {
        let frame::OutputToken {
            id,
            logprob,
            ref top,
        } = token.token;
        let top = top.clone();
        let entry = Entry { id, logprob, top };
        self.transcript.log.append(token.position, entry)
    }

    /// What follows from a token that was just committed: its text, its times, and perhaps the end.
    fn committed_one(&mut self, token: &StepToken, now: Instant, effects: &mut Vec<Effect>) {
        let finish = token.finish;
        let piece = self.text.push(token.token.id);
        self.transcript.pieces.push(piece.text.into_boxed_str());
        let waited = token.waited_ms.map(|ms| Duration::from_millis(ms.into()));
        let observations = self.timeline.token(now, waited);
        effects.extend(observations.into_iter().map(Effect::Observe));
        self.stage = Stage::Generating;
        self.attempts.progress();
        let reason = match (piece.stopped, finish) {
            (true, _) | (_, Some(frame::FinishReason::Stop)) => FinishReason::Stop,
            (_, Some(frame::FinishReason::Length)) => FinishReason::Length,
            (false, None) => return,
        };
        // An engine that finished by itself has nothing to cancel; one that ran into a stop string goes on until told.
        effects.extend(self.end(Outcome::Finished(reason), finish.is_none(), now));
    }

    /// The current attempt is gone: the next one, or the end of patience.
    fn lose(&mut self, cause: LossCause, now: Instant) -> Vec<Effect> {
        self.timeline.lost(cause, self.stage, now);
        match self.attempts.after_loss(cause) {
            Ok(()) => {
                self.stage = Stage::Recovering;
                let replayed = Observation::Replayed(u64::from(self.committed()));
                vec![Effect::Observe(replayed), self.next_attempt(Duration::ZERO)]
            }
            Err(error) => {
                let mut effects = Vec::new();
                if self.attempts.are_deadly() {
                    effects.push(Effect::Observe(Observation::Quarantined));
                }
                effects.extend(self.end(Outcome::Failed(error), false, now));
                effects
            }
        }
    }

    fn next_attempt(&mut self, after: Duration) -> Effect {
        self.attempts
            .next(&self.admission, &self.transcript.log, after)
    }

    fn end(&mut self, outcome: Outcome, cancel: bool, now: Instant) -> Vec<Effect> {
        if self.outcome().is_some() {
            return Vec::new();
        }
        self.transcript.tail = self.text.finish();
        self.transcript.outcome = Some(outcome.clone());
        self.stage = Stage::Done;
        let finished = FinishedRequest {
            admission: self.admission.clone(),
            log: self.transcript.log.clone(),
            outcome,
        };
        let prompt_tokens = self.admission.prompt.len() as u32;
        let summary = self.timeline.summary(now, prompt_tokens, self.committed());
        let mut effects = vec![
            self.release(cancel),
            Effect::Keep(Box::new(finished)),
            Effect::Observe(Observation::Ended(summary)),
        ];
        self.pump(&mut effects);
        effects
    }

    /// Shows the viewer what it can be shown; one that has seen the end is forgotten.
    fn pump(&mut self, effects: &mut Vec<Effect>) {
        if let Some(viewer) = &mut self.viewer
            && viewer.pump(&self.admission, &self.transcript, effects)
        {
            self.viewer = None;
        }
    }
}

#[cfg(test)]
mod tests;
