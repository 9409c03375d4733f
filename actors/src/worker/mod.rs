//! A worker: owns one engine process, as a port owns its program.
//!
//! Invariant: an attempt that a worker has taken is in the engine, or its gateway has been told what became of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use understudy_cluster::PeerId;
use understudy_engine_core::codec;
use understudy_engine_core::frame::{
    AttemptError, AttemptId, ENGINE_PROTOCOL, EngineCommand, EngineEvent, EngineInfo, StepToken,
};
use understudy_telemetry::record::ReplicaMetrics;

use crate::peer::{Links, LossCause, PeerMessage, Refusal};
use crate::replica::{ReplicaMsg, WorkerNews};

mod ending;
pub mod hang;
mod in_flight;
mod numbers;
mod offer;
mod oom;
pub mod process;
mod socket;

pub use self::offer::Offer;

use self::hang::{HangDetector, HangLimits};
use self::in_flight::InFlight;
use self::numbers::Numbers;
use self::oom::OomWatch;
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
    /// The engine's socket closed.
    EngineClosed,
    /// The engine's socket carried what is no frame.
    EngineGarbled(String),
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
    pub metrics: ReplicaMetrics,
    pub replica: ActorRef<ReplicaMsg>,
    /// Tells the replica's workers apart: what one says may arrive after the news of its end.
    pub generation: u64,
}

pub struct Worker;

pub struct WorkerState {
    args: WorkerArgs,
    engine: EngineProcess,
    /// Frames of commands.
    commands: mpsc::Sender<Vec<u8>>,
    in_flight: InFlight,
    numbers: Numbers,
    detector: HangDetector,
    ooms: OomWatch,
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
        let state = WorkerState::new(args, engine, commands);
        let pid = state.engine.pid();
        tracing::info!(worker = %state.args.name, pid, "engine started");
        state.news(WorkerNews::Started { pid });
        Ok(state)
    }

    async fn handle(
        &self,
        _me: ActorRef<WorkerMsg>,
        message: WorkerMsg,
        state: &mut WorkerState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            WorkerMsg::Dispatch(offer) => state.dispatch(offer).await,
            WorkerMsg::Cancel(attempt) => state.cancel(vec![attempt]).await,
            WorkerMsg::GatewayDown(gateway) => {
                state.cancel(state.in_flight.of_gateway(&gateway)).await
            }
            WorkerMsg::Engine(event, permit) => {
                drop(permit);
                state.engine_event(event).await
            }
            WorkerMsg::EngineClosed => Err(state.engine_closed().await),
            WorkerMsg::EngineGarbled(detail) => {
                Err(state.give_up(LossCause::EngineProtocol, detail).await)
            }
            WorkerMsg::Tick => state.tick().await,
        }
    }

    async fn post_stop(
        &self,
        _me: ActorRef<WorkerMsg>,
        state: &mut WorkerState,
    ) -> Result<(), ActorProcessingErr> {
        state.stop().await;
        Ok(())
    }
}

impl WorkerState {
    fn new(args: WorkerArgs, engine: EngineProcess, commands: mpsc::Sender<Vec<u8>>) -> Self {
        let now = Instant::now();
        let hang = HangLimits {
            silence: args.limits.silence,
            stall: args.limits.stall,
            tick: TICK,
        };
        Self {
            args,
            engine,
            commands,
            in_flight: InFlight::default(),
            numbers: Numbers::default(),
            detector: HangDetector::new(hang, now),
            ooms: OomWatch::new(now),
            started_at: now,
            ready: false,
        }
    }

    async fn dispatch(&mut self, offer: Offer) -> Result<(), ActorProcessingErr> {
        if !self.ready {
            // Dropped, and thereby refused.
            return Ok(());
        }
        let (gateway, start) = offer.take();
        let (attempt, suspect) = (start.attempt, start.suspect);
        let frame = match codec::encode(&EngineCommand::Start(start)) {
            Ok(frame) => frame,
            Err(error) => {
                let error = AttemptError::Invalid(error.to_string());
                self.refuse(&gateway, attempt, error);
                return Ok(());
            }
        };
        // An earlier attempt at the same request would end as this one takes its place, but not if this one is refused.
        for attempt in self.in_flight.insert(attempt, suspect, gateway) {
            let cancel = codec::encode(&EngineCommand::Cancel { attempt })?;
            self.queue(cancel).await?;
        }
        self.queue(frame).await?;
        self.in_flight_changed();
        Ok(())
    }

    async fn cancel(&mut self, attempts: Vec<AttemptId>) -> Result<(), ActorProcessingErr> {
        for attempt in attempts {
            if self.in_flight.remove(attempt).is_some() {
                let frame = codec::encode(&EngineCommand::Cancel { attempt })?;
                self.queue(frame).await?;
            }
        }
        self.in_flight_changed();
        Ok(())
    }

    /// Queues a command's frame for the engine.
    async fn queue(&mut self, frame: Vec<u8>) -> Result<(), ActorProcessingErr> {
        match self.commands.try_send(frame) {
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
                tracing::debug!(worker = %self.args.name, progress, "engine loads")
            }
            EngineEvent::Ready(info) => return self.engine_ready(info).await,
            EngineEvent::Alone { attempt } => self.in_flight.begins_alone(attempt),
            EngineEvent::Step {
                step,
                prompt_tokens,
                tokens,
            } => {
                self.detector.step(step);
                let generated = tokens.len() as u64;
                self.args.metrics.step(prompt_tokens.into(), generated);
                self.numbers.good(&tokens);
                return self.hand_on(tokens).await;
            }
            EngineEvent::AttemptFailed { attempt, error } => {
                return self.attempt_failed(attempt, error).await;
            }
            EngineEvent::Heartbeat(health) => {
                self.detector.heartbeat(&health, Instant::now());
                self.news(WorkerNews::Health(health));
            }
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
        tracing::info!(worker = %self.args.name, pid = info.pid, load_ms = info.load_ms, device = %info.device, "engine ready");
        self.ready = true;
        self.news(WorkerNews::Ready(Box::new(info)));
        Ok(())
    }

    /// Sends each gateway its part of a step. What a gateway cannot be told leaves a hole in its streams: they are of no
    /// use any more, and it hears that they are lost.
    async fn hand_on(&mut self, tokens: Vec<StepToken>) -> Result<(), ActorProcessingErr> {
        let before = self.in_flight.len();
        let mut unheard = Vec::new();
        for (gateway, part) in self.in_flight.split(tokens) {
            let attempts = part.iter().map(|token| token.attempt).collect::<Vec<_>>();
            if !self.args.links.tell(&gateway, PeerMessage::Tokens(part)) {
                unheard.extend(attempts);
            }
        }
        if !unheard.is_empty() {
            self.cancel(unheard).await?;
        } else if self.in_flight.len() != before {
            self.in_flight_changed();
        }
        Ok(())
    }

    async fn attempt_failed(
        &mut self,
        attempt: AttemptId,
        error: AttemptError,
    ) -> Result<(), ActorProcessingErr> {
        let broken = self
            .numbers
            .failed(attempt, &error)
            .then(|| format!("wrong numbers for several requests in a row, the last: {error}"));
        if let Some(detail) = broken {
            // The attempt is still in flight: it is told as lost with the others, after the report, and may come back to
            // the engine that takes this one's place.
            return Err(self.give_up(LossCause::Mismatch, detail).await);
        }
        if let Some(gateway) = self.in_flight.remove(attempt) {
            self.refuse(&gateway, attempt, error);
            self.in_flight_changed();
        }
        Ok(())
    }

    fn refuse(&self, gateway: &PeerId, attempt: AttemptId, error: AttemptError) {
        let refusal = Refusal::Engine(error);
        let message = PeerMessage::Refused { attempt, refusal };
        self.args.links.tell(gateway, message);
    }

    async fn tick(&mut self) -> Result<(), ActorProcessingErr> {
        let now = Instant::now();
        self.ooms.tick(now);
        if !self.ready && now.saturating_duration_since(self.started_at) > self.args.limits.start {
            let detail = format!(
                "not ready {} ms after its start",
                self.args.limits.start.as_millis()
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
        let detail = self.detector.describe(cause);
        Err(self.give_up(cause, detail).await)
    }

    fn in_flight_changed(&self) {
        self.news(WorkerNews::InFlight(self.in_flight.len() as u32));
    }

    /// Tells the replica supervisor. One that is gone takes this worker along.
    fn news(&self, news: WorkerNews) {
        let generation = self.args.generation;
        let message = ReplicaMsg::Worker { generation, news };
        self.args.replica.cast(message).ok();
    }
}

#[cfg(test)]
pub(crate) mod testing;

#[cfg(test)]
mod tests;
