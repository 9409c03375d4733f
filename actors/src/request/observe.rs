//! What requests tell metrics.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use understudy_journal::Outcome;
use understudy_protocol::message::FinishReason;
use understudy_telemetry::gauges::JournalMetrics;
use understudy_telemetry::record::{
    self, RecoveryCause, ReplaySource, RequestMetrics, RequestSummary,
};

use super::core::{Observation, RequestCore, Stage, Summary};
use crate::peer::{LossCause, ReplicaId};

/// The series of each replica, looked up once. Bounded by the number of replicas in the cluster.
#[derive(Clone, Default)]
pub struct MetricsCache {
    by_replica: Arc<Mutex<HashMap<ReplicaId, RequestMetrics>>>,
    journal: JournalMetrics,
}

impl MetricsCache {
    /// A batch of tokens was committed to a log.
    pub fn committed(&self, took: Duration) {
        self.journal.committed(took);
    }

    /// Records one observation of a request.
    pub fn observe(&self, request: &RequestCore, observation: Observation) {
        match observation {
            Observation::FirstToken(elapsed) => {
                self.with(request, |metrics| metrics.first_token(elapsed))
            }
            Observation::InterToken(elapsed) => {
                self.with(request, |metrics| metrics.inter_token(elapsed))
            }
            Observation::Recovered {
                cause,
                stage,
                stall,
            } => {
                record::recovery(recovery_cause(cause), recovery_stage(stage));
                record::recovery_stall(stall);
            }
            Observation::Fenced(messages) => {
                record::fenced_messages(record::FenceSource::Request, messages)
            }
            Observation::Replayed(tokens) => {
                record::replayed_tokens(ReplaySource::Recompute, tokens)
            }
            Observation::Quarantined => record::quarantined_request(),
            Observation::Ended(summary) => {
                if let Some(Outcome::Failed(error)) = request.outcome() {
                    record::request_error(error.code.as_str());
                }
                let summary = request_summary(request, &summary);
                self.with(request, |metrics| metrics.finished(&summary));
            }
        }
    }

    /// Requests that no replica ever served are not attributed to one.
    fn with(&self, request: &RequestCore, record: impl FnOnce(&RequestMetrics)) {
        let Some(at) = request.at() else { return };
        let mut cache = self
            .by_replica
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let metrics = cache
            .entry(at.replica.clone())
            .or_insert_with(|| RequestMetrics::new(&at.replica.model, at.replica.index));
        record(metrics);
    }
}

fn request_summary(request: &RequestCore, summary: &Summary) -> RequestSummary {
    RequestSummary {
        reason: match request.outcome() {
            Some(Outcome::Finished(FinishReason::Stop)) => record::FinishedReason::Stop,
            Some(Outcome::Finished(FinishReason::Length)) => record::FinishedReason::Length,
            Some(Outcome::Finished(FinishReason::Cancelled)) => record::FinishedReason::Abort,
            Some(Outcome::Failed(_)) | None => record::FinishedReason::Error,
        },
        e2e: summary.elapsed,
        queue: summary.queued,
        prefill: summary.prefill,
        decode: summary.decode,
        prompt_tokens: u64::from(summary.prompt_tokens),
        generation_tokens: u64::from(summary.completion_tokens),
    }
}

fn recovery_cause(cause: LossCause) -> RecoveryCause {
    match cause {
        LossCause::EngineExit | LossCause::EngineGone => RecoveryCause::EngineExit,
        LossCause::EngineSilent | LossCause::EngineHang => RecoveryCause::EngineHang,
        LossCause::EngineProtocol => RecoveryCause::EngineError,
        LossCause::NodeDown => RecoveryCause::NodeLost,
        LossCause::Stopped => RecoveryCause::Drain,
        LossCause::Gap => RecoveryCause::Gap,
        LossCause::Mismatch => RecoveryCause::Mismatch,
    }
}

fn recovery_stage(stage: Stage) -> record::Stage {
    match stage {
        Stage::Queued => record::Stage::Queue,
        Stage::Dispatched => record::Stage::Prefill,
        Stage::Generating | Stage::Recovering | Stage::Done => record::Stage::Decode,
    }
}
