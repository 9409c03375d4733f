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

/// How long a worker may take to stop. Its engine is killed in any case when its process group is.
const STOP_DEADLINE: Duration = Duration::from_secs(2);

/// What a replica supervisor is told.
#[derive(Debug)]
pub enum ReplicaMsg {
    Start,
    EngineStarted {
        pid: u32,
    },
    EngineReady(Box<EngineInfo>),
    Health(EngineHealth),
    InFlight(u32),
    /// The worker is about to end. Answered once the news is published.
    WorkerEnding {
        cause: LossCause,
        detail: String,
        done: RpcReplyPort<()>,
    },
}
local_message!(ReplicaMsg);

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
    pid: Option<u32>,
    info: Option<Box<EngineInfo>>,
    health: EngineHealth,
    in_flight: u32,
    restarts: u32,
    cause: Option<LossCause>,
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
            pid: None,
            info: None,
            health: EngineHealth::default(),
            in_flight: 0,
            restarts: 0,
            cause: None,
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
            ReplicaMsg::EngineStarted { pid } => {
                state.pid = Some(pid);
                state.publish();
            }
            ReplicaMsg::EngineReady(info) => {
                state.policy.running(Instant::now());
                state.state = ReplicaState::Ready;
                let capacity = u32::try_from(info.kv_capacity_tokens).unwrap_or(u32::MAX);
                state.metrics.cache_config(1, capacity);
                state.info = Some(info);
                state.publish();
            }
            ReplicaMsg::Health(health) => state.measured(health),
            ReplicaMsg::InFlight(in_flight) => {
                state.in_flight = in_flight;
                state.publish_later();
            }
            ReplicaMsg::WorkerEnding {
                cause,
                detail,
                done,
            } => {
                state.cause = Some(cause);
                state.last_error = Some(detail.chars().take(MAX_SHOWN_ERROR_CHARS).collect());
                state.clear(ReplicaState::Backoff, Some(done));
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
            SupervisionEvent::ActorFailed(_, error) => {
                state.last_error.get_or_insert_with(|| {
                    error
                        .to_string()
                        .chars()
                        .take(MAX_SHOWN_ERROR_CHARS)
                        .collect()
                });
                state.worker_ended(&me);
            }
            SupervisionEvent::ActorTerminated(..) => state.worker_ended(&me),
            _ => {}
        }
        Ok(())
    }

    async fn post_stop(
        &self,
        me: ActorRef<ReplicaMsg>,
        state: &mut ReplicaSupervisorState,
    ) -> Result<(), ActorProcessingErr> {
        state.clear(ReplicaState::Down, None);
        me.stop_children_and_wait(None, Some(STOP_DEADLINE)).await;
        Ok(())
    }
}

impl ReplicaSupervisorState {
    async fn start_worker(&mut self, me: &ActorRef<ReplicaMsg>) {
        self.state = ReplicaState::Starting;
        self.publish();
        let args = WorkerArgs {
            name: format!("{}@{}", self.args.id, self.args.links.me().node),
            spec: self.args.spec.clone(),
            limits: self.args.limits,
            links: self.args.links.clone(),
            replica: me.clone(),
        };
        match Actor::spawn_linked(None, Worker, args, me.get_cell()).await {
            Ok((worker, _)) => self.worker = Some(worker),
            Err(error) => {
                // A failed pre_start is told to the spawner alone, so it is treated here as the end that it is.
                tracing::error!(replica = %self.args.id, %error, "worker could not be started");
                self.cause = Some(LossCause::EngineExit);
                self.last_error = Some(error.to_string());
                self.worker_ended(me);
            }
        }
    }

    fn worker_ended(&mut self, me: &ActorRef<ReplicaMsg>) {
        let cause = self.cause.take().unwrap_or(LossCause::EngineExit);
        let ran = self.info.is_some();
        self.worker = None;
        self.info = None;
        match self.policy.ended(Instant::now(), fastrand::f64()) {
            Decision::RestartAfter(pause) => {
                self.clear(ReplicaState::Backoff, None);
                self.restarts += 1;
                record::worker_restart(&self.args.id.to_string(), restart_cause(cause, ran));
                tracing::info!(replica = %self.args.id, pause_ms = pause.as_millis() as u64, restarts = self.restarts, "worker restarts");
                me.send_after(pause, || ReplicaMsg::Start);
            }
            Decision::GiveUpFor(cooldown) => {
                self.clear(ReplicaState::Down, None);
                let error = self.last_error.as_deref().unwrap_or("unknown");
                tracing::error!(replica = %self.args.id, cooldown_ms = cooldown.as_millis() as u64, error, "restart intensity exceeded, replica is down");
                me.send_after(cooldown, || ReplicaMsg::Start);
            }
        }
    }

    fn measured(&mut self, health: EngineHealth) {
        let delta = |new: u64, old: u64| new.saturating_sub(old);
        let prompt = delta(health.prompt_tokens, self.health.prompt_tokens);
        let generated = delta(health.generated_tokens, self.health.generated_tokens);
        if prompt + generated > 0 {
            self.metrics.step(prompt, generated);
        }
        let capacity = self
            .info
            .as_ref()
            .map_or(0, |info| info.kv_capacity_tokens)
            .max(1);
        let usage = health.kv_used_tokens as f64 / capacity as f64;
        self.metrics
            .load(health.running as usize, health.waiting as usize, usage);
        self.health = health;
        self.publish_later();
    }

    /// No engine any more.
    fn clear(&mut self, state: ReplicaState, published: Option<RpcReplyPort<()>>) {
        self.state = state;
        self.pid = None;
        self.in_flight = 0;
        self.health = EngineHealth::default();
        self.metrics.load(0, 0, 0.0);
        self.send_report(true, published);
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
        let message = EndpointMsg::Replica {
            report: Box::new(self.report()),
            worker: self.worker(),
            urgent,
            published,
        };
        self.args.endpoint.cast(message).ok();
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

fn restart_cause(cause: LossCause, ran: bool) -> record::RestartCause {
    match cause {
        LossCause::EngineSilent => record::RestartCause::Heartbeat,
        LossCause::EngineProtocol => record::RestartCause::Protocol,
        _ if !ran => record::RestartCause::Start,
        LossCause::EngineHang => record::RestartCause::Step,
        _ => record::RestartCause::Exit,
    }
}
