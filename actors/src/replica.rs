//! A replica's supervisor: owns its workers (one a shard; one shard in this version), restarts them one_for_all.
//!
//! The one place that knows the replica's state. Every change is published through the endpoint.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort, SupervisionEvent};
use understudy_engine_core::frame::{EngineHealth, EngineInfo};
use understudy_protocol::message::{ReplicaStatus, WorkerStatus};
use understudy_telemetry::record;

use crate::endpoint::EndpointMsg;
use crate::peer::{Links, LossCause, ReplicaId, ReplicaReport, ReplicaState};
use crate::restart::{Decision, RestartPolicy, RestartSettings};
use crate::worker::process::EngineSpec;
use crate::worker::{Worker, WorkerArgs, WorkerLimits, WorkerMsg};

/// Errors are shown to people in a table: this much of one is enough, the log has the rest.
const MAX_SHOWN_ERROR_CHARS: usize = 300;

/// Positions of a KV block of an engine.
const KV_BLOCK_TOKENS: u64 = understudy_engine_core::runner::BLOCK as u64;

/// How long a worker may take to stop. Its engine is killed in any case when its process group is.
const STOP_DEADLINE: Duration = Duration::from_secs(2);

/// How long a stopping replica waits until that is published; its worker is stopped in any case.
const REPORT_DEADLINE: Duration = Duration::from_millis(500);

/// What a replica supervisor is told.
#[derive(Debug)]
pub enum ReplicaMsg {
    Start,
    /// From a worker, which may have ended by now: supervision events overtake messages.
    Worker {
        generation: u64,
        news: WorkerNews,
    },
}
local_message!(ReplicaMsg);

/// What a worker tells its supervisor.
#[derive(Debug)]
pub enum WorkerNews {
    /// The engine process runs, and loads.
    Started {
        pid: u32,
    },
    Ready(Box<EngineInfo>),
    Health(EngineHealth),
    InFlight(u32),
    /// The worker is about to end. Answered once the news is published.
    Ending {
        cause: LossCause,
        detail: String,
        done: RpcReplyPort<()>,
    },
}

pub struct ReplicaArgs {
    pub id: ReplicaId,
    pub spec: Arc<EngineSpec>,
    pub limits: WorkerLimits,
    pub restart: RestartSettings,
    pub links: Links,
    pub endpoint: ActorRef<EndpointMsg>,
}

pub struct ReplicaSupervisor;

pub struct ReplicaSupervisorState {
    args: ReplicaArgs,
    policy: RestartPolicy,
    state: ReplicaState,
    worker: Option<ActorRef<WorkerMsg>>,
    /// Of the worker, or of the next one while there is none.
    generation: u64,
    pid: Option<u32>,
    info: Option<Box<EngineInfo>>,
    health: EngineHealth,
    in_flight: u32,
    restarts: u32,
    /// Why the next worker is not the first one.
    restart_cause: Option<record::RestartCause>,
    /// Why the worker is about to end, if it has said so.
    ending: Option<LossCause>,
    last_error: Option<String>,
    metrics: record::ReplicaMetrics,
}

impl Actor for ReplicaSupervisor {
    type Msg = ReplicaMsg;
    type State = ReplicaSupervisorState;
    type Arguments = ReplicaArgs;

    async fn pre_start(
        &self,
        me: ActorRef<ReplicaMsg>,
        args: ReplicaArgs,
    ) -> Result<ReplicaSupervisorState, ActorProcessingErr> {
        // The first engine is started by a message: pre_start must not block whoever starts us.
        me.cast(ReplicaMsg::Start)?;
        let metrics = record::ReplicaMetrics::new(&args.id.model, args.id.index);
        Ok(ReplicaSupervisorState {
            policy: RestartPolicy::new(args.restart),
            args,
            state: ReplicaState::Starting,
            worker: None,
            generation: 0,
            pid: None,
            info: None,
            health: EngineHealth::default(),
            in_flight: 0,
            restarts: 0,
            restart_cause: None,
            ending: None,
            last_error: None,
            metrics,
        })
    }

    async fn handle(
        &self,
        me: ActorRef<ReplicaMsg>,
        message: ReplicaMsg,
        state: &mut ReplicaSupervisorState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            ReplicaMsg::Start => state.start_worker(&me).await,
            ReplicaMsg::Worker { generation, news } => {
                if generation == state.generation {
                    state.news(news);
                }
            }
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        me: ActorRef<ReplicaMsg>,
        event: SupervisionEvent,
        state: &mut ReplicaSupervisorState,
    ) -> Result<(), ActorProcessingErr> {
        match event {
            SupervisionEvent::ActorFailed(_, error) => state.worker_ended(&me, error.to_string()),
            SupervisionEvent::ActorTerminated(_, _, reason) => {
                let reason = reason.unwrap_or_else(|| "the worker ended".into());
                state.worker_ended(&me, reason);
            }
            _ => {}
        }
        Ok(())
    }

    async fn post_stop(
        &self,
        me: ActorRef<ReplicaMsg>,
        state: &mut ReplicaSupervisorState,
    ) -> Result<(), ActorProcessingErr> {
        // Published before the worker is stopped and reports its losses, so that no gateway routes one right back here.
        state.clear(ReplicaState::Stopping);
        let stopping = |done| state.message(true, Some(done));
        let endpoint = &state.args.endpoint;
        endpoint.call(stopping, Some(REPORT_DEADLINE)).await.ok();
        me.stop_children_and_wait(None, Some(STOP_DEADLINE)).await;
        Ok(())
    }
}

impl ReplicaSupervisorState {
    async fn start_worker(&mut self, me: &ActorRef<ReplicaMsg>) {
        if let Some(cause) = self.restart_cause.take() {
            self.restarts += 1;
            record::worker_restart(&self.args.id.to_string(), cause);
        }
        self.state = ReplicaState::Starting;
        self.publish();
        let args = WorkerArgs {
            name: format!("{}@{}", self.args.id, self.args.links.me().node),
            spec: self.args.spec.clone(),
            limits: self.args.limits,
            links: self.args.links.clone(),
            metrics: self.metrics.clone(),
            replica: me.clone(),
            generation: self.generation,
        };
        match Actor::spawn_linked(None, Worker, args, me.get_cell()).await {
            Ok((worker, _)) => self.worker = Some(worker),
            Err(error) => {
                // A failed pre_start is told to the spawner alone, so it is treated here as the end that it is.
                tracing::error!(replica = %self.args.id, %error, "worker could not be started");
                self.worker_ended(me, error.to_string());
            }
        }
    }

    /// The current worker says something.
    fn news(&mut self, news: WorkerNews) {
        match news {
            WorkerNews::Started { pid } => {
                self.pid = Some(pid);
                self.publish();
            }
            WorkerNews::Ready(info) => {
                self.policy.running(Instant::now());
                self.state = ReplicaState::Ready;
                let blocks = info.kv_capacity_tokens / KV_BLOCK_TOKENS;
                let blocks = u32::try_from(blocks).unwrap_or(u32::MAX);
                self.metrics.cache_config(KV_BLOCK_TOKENS as u32, blocks);
                self.info = Some(info);
                self.publish();
            }
            WorkerNews::Health(health) => self.measured(health),
            WorkerNews::InFlight(in_flight) => {
                self.in_flight = in_flight;
                self.publish_later();
            }
            WorkerNews::Ending {
                cause,
                detail,
                done,
            } => {
                self.ending = Some(cause);
                self.last_error = Some(shown(&detail));
                self.clear(ReplicaState::Backoff);
                self.send_report(true, Some(done));
            }
        }
    }

    /// `error` says why: the worker's last word, which knows more than its first about how the engine ended.
    fn worker_ended(&mut self, me: &ActorRef<ReplicaMsg>, error: String) {
        let ending = self.ending.take();
        self.last_error = Some(shown(&error));
        let cause = ending.unwrap_or(LossCause::EngineExit);
        self.restart_cause = Some(restart_cause(cause, self.info.is_some()));
        self.worker = None;
        self.info = None;
        // What it said and we have not heard yet is of no use any more.
        self.generation += 1;
        let pause = match self.policy.ended(Instant::now(), fastrand::f64()) {
            Decision::RestartAfter(pause) => {
                self.clear(ReplicaState::Backoff);
                tracing::info!(replica = %self.args.id, pause_ms = pause.as_millis() as u64, restarts = self.restarts, "worker restarts");
                pause
            }
            Decision::GiveUpFor(cooldown) => {
                self.clear(ReplicaState::Down);
                let error = self.last_error.as_deref().unwrap_or("unknown");
                tracing::error!(replica = %self.args.id, cooldown_ms = cooldown.as_millis() as u64, error, "restart intensity exceeded, replica is down");
                cooldown
            }
        };
        self.publish();
        me.send_after(pause, || ReplicaMsg::Start);
    }

    fn measured(&mut self, health: EngineHealth) {
        let capacity = self
            .info
            .as_ref()
            .map_or(0, |info| info.kv_capacity_tokens)
            .max(1);
        let usage = health.kv_used_tokens as f64 / capacity as f64;
        self.metrics
            .load(health.running as usize, health.waiting as usize, usage);
        // Totals of this engine; they begin at 0 with the next one.
        let since = |now: u64, before: u64| now.saturating_sub(before);
        let hits = since(health.prefix_hit_tokens, self.health.prefix_hit_tokens);
        let computed = since(health.prompt_tokens, self.health.prompt_tokens);
        self.metrics.kv_cache(
            hits + computed,
            hits,
            since(health.preemptions, self.health.preemptions),
        );
        self.health = health;
        self.publish_later();
    }

    /// No engine any more.
    fn clear(&mut self, state: ReplicaState) {
        self.state = state;
        self.pid = None;
        self.in_flight = 0;
        self.health = EngineHealth::default();
        self.metrics.load(0, 0, 0.0);
    }

    /// At once: gateways must know before they act.
    fn publish(&self) {
        self.send_report(true, None);
    }

    /// With the next regular report.
    fn publish_later(&self) {
        self.send_report(false, None);
    }

    fn send_report(&self, urgent: bool, published: Option<RpcReplyPort<()>>) {
        self.args
            .endpoint
            .cast(self.message(urgent, published))
            .ok();
    }

    fn message(&self, urgent: bool, published: Option<RpcReplyPort<()>>) -> EndpointMsg {
        EndpointMsg::Replica {
            report: Box::new(self.report()),
            worker: self.worker(),
            urgent,
            published,
        }
    }

    fn worker(&self) -> Option<ActorRef<WorkerMsg>> {
        self.worker
            .clone()
            .filter(|_| self.state == ReplicaState::Ready)
    }

    fn report(&self) -> ReplicaReport {
        let spec = &self.args.spec;
        let info = self.info.as_deref();
        let fingerprint = info
            .map(|info| info.fingerprint.clone())
            .unwrap_or_default();
        ReplicaReport {
            replica: self.args.id.clone(),
            state: self.state,
            capacity: spec.max_sequences.saturating_add(spec.max_waiting),
            fingerprint: fingerprint.clone(),
            status: ReplicaStatus {
                model: self.args.id.model.to_string(),
                node: self.args.links.me().node.to_string(),
                replica: self.args.id.index,
                state: self.state.as_str().into(),
                in_flight: self.in_flight,
                workers: vec![WorkerStatus {
                    shard: 0,
                    state: self.state.as_str().into(),
                    engine_pid: self.pid,
                    device: info.map_or_else(|| spec.device.clone(), |info| info.device.clone()),
                    restarts: self.restarts,
                    last_error: self.last_error.clone(),
                    running: self.health.running,
                    waiting: self.health.waiting,
                    kv_used_tokens: self.health.kv_used_tokens,
                    kv_capacity_tokens: info.map_or(0, |info| info.kv_capacity_tokens),
                    rss_bytes: self.health.rss_bytes,
                    fingerprint,
                }],
            },
        }
    }
}

fn shown(error: &str) -> String {
    error.chars().take(MAX_SHOWN_ERROR_CHARS).collect()
}

fn restart_cause(cause: LossCause, ran: bool) -> record::RestartCause {
    match cause {
        LossCause::EngineSilent => record::RestartCause::Heartbeat,
        // What it said could be read, and could not be used.
        LossCause::EngineProtocol | LossCause::Mismatch => record::RestartCause::Protocol,
        _ if !ran => record::RestartCause::Start,
        LossCause::EngineHang => record::RestartCause::Step,
        _ => record::RestartCause::Exit,
    }
}

#[cfg(test)]
mod tests;
