//! A worker: owns one engine process, as a port owns its program.
//!
//! Invariant: whatever ends the engine or the worker, every attempt that was in the engine is reported to its gateway
//! as lost, once, and after the report that says that the replica is not ready.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::timeout;
use understudy_cluster::PeerId;
use understudy_engine_core::frame::{
    AttemptId, ENGINE_PROTOCOL, EngineCommand, EngineEvent, EngineHealth, EngineInfo, StepToken,
};

use crate::peer::{Links, LossCause, PeerMessage, Refusal};
use crate::replica::ReplicaMsg;

pub mod hang;
mod offer;
pub mod process;
mod socket;

pub use self::offer::Offer;

use self::hang::{HangDetector, HangLimits};
use self::process::{EngineProcess, EngineSpec};

/// How often a worker looks after its engine.
const TICK: Duration = Duration::from_millis(50);

/// Commands that may wait for the engine. Full means that the engine does not read: it is treated as hung.
const MAX_COMMANDS: usize = 8192;

/// What a worker is told.
#[derive(Debug)]
pub enum WorkerMsg {
    Dispatch(Offer),
    Cancel(AttemptId),
    /// A gateway is gone: its attempts are of no use to anybody.
    GatewayDown(PeerId),
    /// From the reader of the engine's socket. The permit bounds how many of these wait.
    Engine(EngineEvent, OwnedSemaphorePermit),
    /// The engine's socket closed, or carried garbage.
    EngineGone(LossCause, String),
    Tick,
}
local_message!(WorkerMsg);

/// Limits on an engine's time.
#[derive(Debug, Clone, Copy)]
pub struct WorkerLimits {
    pub silence: Duration,
    pub stall: Duration,
    pub start: Duration,
}

pub struct WorkerArgs {
    pub name: String,
    pub spec: Arc<EngineSpec>,
    pub limits: WorkerLimits,
    pub links: Links,
    pub replica: ActorRef<ReplicaMsg>,
}

pub struct Worker;

pub struct WorkerState {
    name: String,
    links: Links,
    replica: ActorRef<ReplicaMsg>,
    limits: WorkerLimits,
    engine: EngineProcess,
    commands: mpsc::Sender<EngineCommand>,
    in_flight: HashMap<AttemptId, PeerId>,
    detector: HangDetector,
    started_at: Instant,
    ready: bool,
}

impl Actor for Worker {
    type Msg = WorkerMsg;
    type State = WorkerState;
    type Arguments = WorkerArgs;

    async fn pre_start(
        &self,
        me: ActorRef<WorkerMsg>,
        args: WorkerArgs,
    ) -> Result<WorkerState, ActorProcessingErr> {
        let (engine, socket) = EngineProcess::spawn(&args.spec)?;
        let (read, write) = socket.into_split();
        let (commands, queue) = mpsc::channel(MAX_COMMANDS);
        tokio::spawn(socket::read_events(read, me.clone()));
        tokio::spawn(socket::write_commands(write, queue));
        me.send_interval(TICK, || WorkerMsg::Tick);
        args.replica
            .cast(ReplicaMsg::EngineStarted { pid: engine.pid() })?;
        tracing::info!(worker = %args.name, pid = engine.pid(), "engine started");
        let now = Instant::now();
        let hang = HangLimits {
            silence: args.limits.silence,
            stall: args.limits.stall,
            tick: TICK,
        };
        Ok(WorkerState {
            name: args.name,
            links: args.links,
            replica: args.replica,
            limits: args.limits,
            engine,
            commands,
            in_flight: HashMap::new(),
            detector: HangDetector::new(hang, now),
            started_at: now,
            ready: false,
        })
    }

    async fn handle(
        &self,
        _me: ActorRef<WorkerMsg>,
        message: WorkerMsg,
        state: &mut WorkerState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            WorkerMsg::Dispatch(offer) => state.dispatch(offer).await,
            WorkerMsg::Cancel(attempt) => state.cancel(attempt).await,
            WorkerMsg::GatewayDown(gateway) => state.gateway_down(&gateway).await,
            WorkerMsg::Engine(event, permit) => {
                drop(permit);
                state.engine_event(event).await
            }
            WorkerMsg::EngineGone(cause, detail) => Err(state.give_up(cause, detail).await),
            WorkerMsg::Tick => state.tick().await,
        }
    }

    async fn post_stop(
        &self,
        _me: ActorRef<WorkerMsg>,
        state: &mut WorkerState,
    ) -> Result<(), ActorProcessingErr> {
        // Stopped on purpose: the node goes down, or the replica is taken away.
        state
            .give_up(LossCause::Stopped, "the worker was stopped".into())
            .await;
        Ok(())
    }
}

impl WorkerState {
    async fn dispatch(&mut self, offer: Offer) -> Result<(), ActorProcessingErr> {
        if !self.ready {
            // Dropped, and thereby refused.
            return Ok(());
        }
        let (gateway, start) = offer.take();
        self.in_flight.insert(start.attempt, gateway);
        self.command(EngineCommand::Start(start)).await?;
        self.in_flight_changed();
        Ok(())
    }

    async fn cancel(&mut self, attempt: AttemptId) -> Result<(), ActorProcessingErr> {
        if self.in_flight.remove(&attempt).is_some() {
            self.command(EngineCommand::Cancel { attempt }).await?;
            self.in_flight_changed();
        }
        Ok(())
    }

    async fn gateway_down(&mut self, gateway: &PeerId) -> Result<(), ActorProcessingErr> {
        let orphans: Vec<AttemptId> = self
            .in_flight
            .iter()
            .filter(|(_, owner)| *owner == gateway)
            .map(|(attempt, _)| *attempt)
            .collect();
        for attempt in orphans {
            self.cancel(attempt).await?;
        }
        Ok(())
    }

    async fn command(&mut self, command: EngineCommand) -> Result<(), ActorProcessingErr> {
        match self.commands.try_send(command) {
            Ok(()) => Ok(()),
            Err(mpsc::error::TrySendError::Full(_)) => {
                let detail =
                    format!("{MAX_COMMANDS} commands wait for the engine, which does not read");
                Err(self.give_up(LossCause::EngineHang, detail).await)
            }
            // The reader of the same socket sees the end too, and says why.
            Err(mpsc::error::TrySendError::Closed(_)) => Ok(()),
        }
    }

    async fn engine_event(&mut self, event: EngineEvent) -> Result<(), ActorProcessingErr> {
        self.detector.frame(Instant::now());
        match event {
            EngineEvent::Loading { progress } => {
                tracing::debug!(worker = %self.name, progress, "engine loads")
            }
            EngineEvent::Ready(info) => return self.engine_ready(info).await,
            EngineEvent::Step { step, tokens, .. } => {
                self.detector.step(step);
                self.hand_on(tokens);
            }
            EngineEvent::AttemptFailed { attempt, error } => {
                if let Some(gateway) = self.in_flight.remove(&attempt) {
                    self.links.tell(
                        &gateway,
                        PeerMessage::Refused {
                            attempt,
                            refusal: Refusal::Engine(error),
                        },
                    );
                    self.in_flight_changed();
                }
            }
            EngineEvent::Heartbeat(health) => self.heartbeat(health),
            EngineEvent::Fatal { message } => {
                return Err(self.give_up(LossCause::EngineExit, message).await);
            }
        }
        Ok(())
    }

    async fn engine_ready(&mut self, info: EngineInfo) -> Result<(), ActorProcessingErr> {
        if info.protocol != ENGINE_PROTOCOL {
            let detail = format!(
                "the engine speaks protocol {}, this node {ENGINE_PROTOCOL}: build both from one version",
                info.protocol
            );
            return Err(self.give_up(LossCause::EngineProtocol, detail).await);
        }
        tracing::info!(worker = %self.name, pid = info.pid, load_ms = info.load_ms, device = %info.device, "engine ready");
        self.ready = true;
        self.replica.cast(ReplicaMsg::EngineReady(Box::new(info)))?;
        Ok(())
    }

    fn heartbeat(&mut self, health: EngineHealth) {
        self.detector.heartbeat(&health, Instant::now());
        self.replica.cast(ReplicaMsg::Health(health)).ok();
    }

    /// Sends each gateway its part of a step.
    fn hand_on(&mut self, tokens: Vec<StepToken>) {
        let mut finished = false;
        let mut parts: Vec<(PeerId, Vec<StepToken>)> = Vec::new();
        for token in tokens {
            let attempt = token.attempt;
            let Some(gateway) = self.in_flight.get(&attempt) else {
                continue;
            };
            if token.finish.is_some() {
                finished = true;
            }
            let gateway = gateway.clone();
            if token.finish.is_some() {
                self.in_flight.remove(&attempt);
            }
            match parts.iter_mut().find(|(peer, _)| *peer == gateway) {
                Some((_, part)) => part.push(token),
                None => parts.push((gateway, vec![token])),
            }
        }
        for (gateway, part) in parts {
            self.links.tell(&gateway, PeerMessage::Tokens(part));
        }
        if finished {
            self.in_flight_changed();
        }
    }

    async fn tick(&mut self) -> Result<(), ActorProcessingErr> {
        let now = Instant::now();
        if !self.ready && now.saturating_duration_since(self.started_at) > self.limits.start {
            let detail = format!(
                "not ready {} ms after its start",
                self.limits.start.as_millis()
            );
            return Err(self.give_up(LossCause::EngineHang, detail).await);
        }
        let Some(cause) = self.detector.tick(now) else {
            return Ok(());
        };
        // A loading engine may be silent while the system reads its program and weights: the start limit holds then.
        if !self.ready {
            return Ok(());
        }
        let limit = if cause == LossCause::EngineSilent {
            self.limits.silence
        } else {
            self.limits.stall
        };
        let what = if cause == LossCause::EngineSilent {
            "no heartbeat"
        } else {
            "work, but no finished step"
        };
        Err(self
            .give_up(
                cause,
                format!("{what} for more than {} ms", limit.as_millis()),
            )
            .await)
    }

    /// Kills the engine, reports every attempt as lost, and makes the error that ends this worker.
    async fn give_up(&mut self, cause: LossCause, detail: String) -> ActorProcessingErr {
        self.engine.kill();
        let detail = match cause {
            // A process that the system takes long to bury must not hold up the streams that wait for this news.
            LossCause::EngineExit if detail.is_empty() => timeout(BURIAL, self.engine.wait())
                .await
                .unwrap_or_else(|_| "it was killed, and has not ended yet".into()),
            _ => detail,
        };
        if cause != LossCause::Stopped {
            tracing::warn!(worker = %self.name, pid = self.engine.pid(), cause = cause.as_str(), %detail, in_flight = self.in_flight.len(), "engine lost");
        }
        // The replica's report goes out before the losses, so that no gateway routes an attempt right back here. A
        // replica that is itself stopping has said so already, and does not answer.
        if cause != LossCause::Stopped {
            let told = |done| ReplicaMsg::WorkerEnding {
                cause,
                detail: detail.clone(),
                done,
            };
            self.replica.call(told, Some(REPORT_DEADLINE)).await.ok();
        }
        self.report_lost(cause);
        detail.into()
    }

    fn report_lost(&mut self, cause: LossCause) {
        for (gateway, attempts) in self.take_in_flight() {
            self.links
                .tell(&gateway, PeerMessage::Lost { attempts, cause });
        }
    }

    fn take_in_flight(&mut self) -> HashMap<PeerId, Vec<AttemptId>> {
        let mut by_gateway: HashMap<PeerId, Vec<AttemptId>> = HashMap::new();
        for (attempt, gateway) in self.in_flight.drain() {
            by_gateway.entry(gateway).or_default().push(attempt);
        }
        by_gateway
    }

    fn in_flight_changed(&self) {
        self.replica
            .cast(ReplicaMsg::InFlight(self.in_flight.len() as u32))
            .ok();
    }
}

impl Drop for WorkerState {
    /// Even a panic of the worker does not leave its attempts waiting. After [`WorkerState::give_up`] none are left.
    fn drop(&mut self) {
        self.report_lost(LossCause::Stopped);
    }
}

/// How long a dying worker waits to learn how its engine ended.
const BURIAL: Duration = Duration::from_millis(200);

/// How long a dying worker waits for its replica to publish the news; the losses are sent in any case.
const REPORT_DEADLINE: Duration = Duration::from_millis(500);

#[cfg(test)]
pub(crate) mod testing;

#[cfg(test)]
mod tests;
