//! What a request writes into its node's log. Never a prompt, a text or a token.

use understudy_engine_core::frame::AttemptError;
use understudy_journal::Outcome;

use super::RequestState;
use super::core::{Effect, Observation};
use crate::peer::{LossCause, Refusal};

impl RequestState {
    /// `replica@node` of the latest attempt; empty if there was none.
    fn worker(&self) -> String {
        let at = self.core.at();
        at.map(|at| format!("{}@{}", at.replica, at.peer.node))
            .unwrap_or_default()
    }

    /// News of attempts that are not current any more is not worth a line.
    pub(super) fn log_loss(&self, epoch: u32, cause: LossCause, effects: &[Effect]) {
        if !effects.iter().any(|e| matches!(e, Effect::Route { .. })) {
            return;
        }
        let request = self.core.admission().request;
        let (cause, committed, worker) = (cause.as_str(), self.core.committed(), self.worker());
        tracing::info!(%request, epoch, worker, cause, committed, "attempt lost, resuming from the log");
    }

    pub(super) fn log_refusal(&self, epoch: u32, refusal: &Refusal) {
        let (request, worker) = (self.core.admission().request, self.worker());
        match refusal {
            Refusal::Engine(
                error @ (AttemptError::ReplayMismatch { .. } | AttemptError::NotFinite { .. }),
            ) => {
                tracing::warn!(%request, epoch, worker, %error, "a replica does not go on with this log");
            }
            refusal => tracing::debug!(%request, epoch, worker, ?refusal, "attempt refused"),
        }
    }

    pub(super) fn log(&self, observation: &Observation) {
        let (request, epoch) = (self.core.admission().request, self.core.epoch());
        let worker = || self.worker();
        match observation {
            Observation::Recovered { stall, .. } => {
                let (worker, stall_ms) = (worker(), stall.as_millis() as u64);
                tracing::info!(%request, epoch, worker, stall_ms, "request goes on");
            }
            Observation::Ended(summary) => {
                let (worker, tokens) = (worker(), summary.completion_tokens);
                let elapsed_ms = summary.elapsed.as_millis() as u64;
                match self.core.outcome() {
                    Some(Outcome::Failed(error)) => {
                        let (code, stage) = (error.code.as_str(), error.stage.as_deref());
                        tracing::warn!(%request, epoch, worker, tokens, elapsed_ms, code, stage, %error, "request failed");
                    }
                    Some(Outcome::Finished(reason)) => {
                        tracing::info!(%request, epoch, worker, tokens, elapsed_ms, ?reason, "request finished");
                    }
                    None => {}
                }
            }
            _ => {}
        }
    }
}
