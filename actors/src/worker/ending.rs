//! How a worker ends, and what its gateways hear of that.
//!
//! Invariant: whatever ends the engine or the worker, every attempt that was in the engine is reported to its gateway
//! as lost, once, and after the report that says that the replica is not ready: when its engine ends, the worker tells
//! the replica supervisor first; when the supervisor stops the worker, it has published that before. Only a worker that
//! panics reports its attempts as it falls, before anybody can know; what is routed right back here is refused.

use std::time::Duration;

use ractor::ActorProcessingErr;
use tokio::time::timeout;
use understudy_engine_core::codec;
use understudy_engine_core::frame::EngineCommand;

use super::WorkerState;
use crate::peer::{LossCause, PeerMessage};
use crate::replica::{ReplicaMsg, WorkerNews};

/// How long the streams of an engine whose socket closed wait for how it ended. The system closes a dying process's files
/// last: the rest is a matter of microseconds (of some time slices on a busy machine), unless the process closed its socket
/// and lives on.
const VERDICT: Duration = Duration::from_millis(250);

/// How long an ending worker waits for its engine's end.
const BURIAL: Duration = Duration::from_millis(200);

/// How long a dying worker waits for its replica to publish the news; the losses are sent in any case.
const REPORT_DEADLINE: Duration = Duration::from_millis(500);

impl WorkerState {
    /// Kills the engine, reports every attempt as lost, and makes the error that ends this worker.
    pub(super) async fn give_up(&mut self, cause: LossCause, detail: String) -> ActorProcessingErr {
        self.engine.kill();
        let detail = self.end_with(cause, detail).await;
        detail.into()
    }

    /// The engine's socket closed, without a word: says how the process ended, and whose doing that was, as the last act
    /// of this worker.
    pub(super) async fn engine_closed(&mut self) -> ActorProcessingErr {
        let end = timeout(VERDICT, self.engine.wait()).await;
        self.engine.kill();
        let (cause, detail) = match end {
            Ok(end) if end.is_by_others() && self.ooms.is_quiet() => {
                (LossCause::EngineGone, end.description)
            }
            Ok(end) => (LossCause::EngineExit, end.description),
            Err(_) => (
                LossCause::EngineExit,
                format!(
                    "the engine closed its socket, and was not seen to end within {} ms",
                    VERDICT.as_millis()
                ),
            ),
        };
        let detail = self.end_with(cause, detail).await;
        detail.into()
    }

    async fn end_with(&mut self, cause: LossCause, detail: String) -> String {
        let in_flight = self.in_flight.len();
        let generation = self.args.generation;
        let told = |done| {
            let detail = detail.clone();
            let news = WorkerNews::Ending {
                cause,
                detail,
                done,
            };
            ReplicaMsg::Worker { generation, news }
        };
        self.args
            .replica
            .call(told, Some(REPORT_DEADLINE))
            .await
            .ok();
        self.report_lost(cause);
        self.bury().await;
        tracing::warn!(worker = %self.args.name, pid = self.engine.pid(), cause = cause.as_str(), %detail, in_flight, "engine lost");
        detail
    }

    /// Stopped on purpose: the node goes down, or the replica is taken away. The engine is asked to end, and killed if it
    /// does not.
    pub(super) async fn stop(&mut self) {
        self.report_lost(LossCause::Stopped);
        let asked = codec::encode(&EngineCommand::Shutdown)
            .is_ok_and(|frame| self.commands.try_send(frame).is_ok());
        if !(asked && self.bury().await) {
            self.engine.kill();
            self.bury().await;
        }
    }

    /// Waits a while for the engine's end. An ended process that nobody waits for stays in the system's tables, and in a
    /// container there may be nobody else who does.
    async fn bury(&mut self) -> bool {
        timeout(BURIAL, self.engine.wait()).await.is_ok()
    }

    fn report_lost(&mut self, cause: LossCause) {
        let (computed, beside) = self.in_flight.take();
        let computed = computed.into_iter().map(|left| (left, cause));
        // Their requests are not to blame, whatever it was.
        let cause = match cause {
            LossCause::Stopped | LossCause::Mismatch => cause,
            _ => LossCause::EngineGone,
        };
        let beside = beside.into_iter().map(|left| (left, cause));
        for ((gateway, attempts), cause) in computed.chain(beside) {
            let message = PeerMessage::Lost { attempts, cause };
            self.args.links.tell(&gateway, message);
        }
    }
}

impl Drop for WorkerState {
    /// Even a panic of the worker does not leave its attempts waiting. After a regular end none are left.
    fn drop(&mut self) {
        self.report_lost(LossCause::Stopped);
    }
}
