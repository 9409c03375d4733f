use std::path::Path;
use std::sync::Mutex;

use metrics::{Counter, Gauge, Histogram, HistogramFn, Key, KeyName, Metadata, Recorder};
use ractor::ActorStatus;
use tokio::sync::mpsc::UnboundedReceiver;
use understudy_engine_core::frame::StartAttempt;

use super::testing::{LIMITS, Probe, StandIn, token, until};
use super::*;
use crate::peer::testing::{FakeNetwork, start};

/// A worker between a network, an engine and a supervisor that all do as the test says.
struct Stage {
    network: FakeNetwork,
    engine: StandIn,
    worker: ActorRef<WorkerMsg>,
    news: UnboundedReceiver<ReplicaMsg>,
}

async fn args(
    network: &FakeNetwork,
    engine: &StandIn,
) -> (WorkerArgs, UnboundedReceiver<ReplicaMsg>) {
    let (replica, news) = Probe::spawn().await;
    let args = WorkerArgs {
        name: "m/0@host".into(),
        spec: engine.spec(),
        limits: LIMITS,
        links: network.links(),
        metrics: ReplicaMetrics::new("m", 0),
        replica,
        generation: 5,
    };
    (args, news)
}

impl Stage {
    async fn ready() -> Self {
        Self::ready_with(|_| {}).await
    }

    async fn ready_with(change: impl FnOnce(&mut WorkerArgs)) -> Self {
        let (network, mut engine) = (FakeNetwork::new(), StandIn::new());
        let (mut args, news) = args(&network, &engine).await;
        change(&mut args);
        let (worker, _) = Actor::spawn(None, Worker, args).await.unwrap();
        engine.get_ready();
        let mut stage = Self {
            network,
            engine,
            worker,
            news,
        };
        let ready = |news: &WorkerNews| matches!(news, WorkerNews::Ready(_));
        stage.hears("ready", ready).await;
        stage
    }

    /// Waits until the supervisor is told something.
    async fn hears(&mut self, what: &str, is_it: impl Fn(&WorkerNews) -> bool) -> WorkerNews {
        until(what, || match self.news.try_recv().ok()? {
            ReplicaMsg::Worker {
                generation: 5,
                news,
            } => Some(news).filter(&is_it),
            other => panic!("{other:?}"),
        })
        .await
    }

    async fn hears_in_flight(&mut self, count: u32) {
        let what = format!("{count} in flight");
        let is_it = |news: &WorkerNews| matches!(news, WorkerNews::InFlight(now) if *now == count);
        self.hears(&what, is_it).await;
    }

    fn offer(&self, start: StartAttempt) {
        let offer = Offer::new(self.network.links(), self.network.peer(), start);
        self.worker.cast(WorkerMsg::Dispatch(offer)).unwrap();
    }

    /// Dispatches an attempt, and waits until the engine has it.
    async fn dispatch(&mut self, request: u128, epoch: u32) -> AttemptId {
        let start = start(request, epoch);
        self.offer(start.clone());
        let attempt = start.attempt;
        self.engine.has_got(EngineCommand::Start(start)).await;
        attempt
    }

    /// Lets the engine finish a step.
    fn step(&mut self, tokens: Vec<StepToken>) {
        self.engine.say(&EngineEvent::Step {
            step: 1,
            prompt_tokens: 0,
            tokens,
        });
    }

    /// Waits until the gateway has been told so many things.
    async fn gateway_hears(&self, count: usize) -> Vec<PeerMessage> {
        let mut sent = Vec::new();
        let what = format!("{count} messages to the gateway");
        until(&what, || {
            sent.extend(self.network.sent());
            (sent.len() >= count).then_some(())
        })
        .await;
        sent
    }

    async fn worker_ends(&mut self) {
        let worker = self.worker.clone();
        until("the worker's end", || {
            // Its supervisor answers as it takes the news.
            while self.news.try_recv().is_ok() {}
            (worker.get_status() == ActorStatus::Stopped).then_some(())
        })
        .await;
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.worker.stop(None);
    }
}

fn lost(attempts: Vec<AttemptId>, cause: LossCause) -> PeerMessage {
    PeerMessage::Lost { attempts, cause }
}

#[tokio::test]
async fn losses_that_the_gateway_has_no_room_for_outlive_the_worker() {
    let mut stage = Stage::ready().await;
    let attempts = vec![stage.dispatch(1, 1).await, stage.dispatch(2, 1).await];
    stage.network.fill();
    stage.engine.exit(1).await;
    stage.worker_ends().await;
    assert_eq!(stage.network.sent(), []);
    stage.network.drain();
    stage.network.links().tell_owed();
    assert_eq!(stage.network.sent(), [lost(attempts, LossCause::Gap)]);
}

#[tokio::test]
async fn losses_are_reported_with_their_cause_after_the_supervisor_knows() {
    let mut stage = Stage::ready().await;
    let attempts = vec![stage.dispatch(1, 1).await];
    stage.engine.exit(1).await;
    let is_it = |news: &WorkerNews| matches!(news, WorkerNews::Ending { .. });
    let told = stage.hears("the coming end", is_it).await;
    let WorkerNews::Ending { cause, detail, .. } = &told else {
        unreachable!()
    };
    assert_eq!(*cause, LossCause::EngineExit);
    assert_eq!(detail, "exit status: 1");
    assert_eq!(stage.network.sent(), []);
    drop(told);
    let expected = lost(attempts, LossCause::EngineExit);
    assert_eq!(stage.gateway_hears(1).await, [expected]);
}

#[tokio::test]
async fn a_stream_with_a_hole_in_it_is_ended_in_the_engine() {
    let mut stage = Stage::ready().await;
    let (first, second) = (stage.dispatch(1, 1).await, stage.dispatch(2, 1).await);
    stage.hears_in_flight(2).await;
    stage.network.fill();
    stage.step(vec![token(first, 0)]);
    stage.hears_in_flight(1).await;
    let cancel = EngineCommand::Cancel { attempt: first };
    stage.engine.has_got(cancel).await;
    stage.network.drain();
    stage.step(vec![token(first, 1), token(second, 0)]);
    let tokens = PeerMessage::Tokens(vec![token(second, 0)]);
    assert_eq!(stage.gateway_hears(1).await, [tokens]);
    stage.network.links().tell_owed();
    assert_eq!(stage.network.sent(), [lost(vec![first], LossCause::Gap)]);
}

#[tokio::test]
async fn attempts_that_a_later_one_replaces_are_not_in_flight_any_more() {
    let mut stage = Stage::ready().await;
    stage.dispatch(1, 1).await;
    stage.hears_in_flight(1).await;
    let second = stage.dispatch(1, 2).await;
    stage.hears_in_flight(1).await;
    stage.worker.cast(WorkerMsg::Cancel(second)).unwrap();
    stage.hears_in_flight(0).await;
}

#[tokio::test]
async fn an_attempt_that_no_frame_holds_is_refused_at_once() {
    let stage = Stage::ready().await;
    let big = StartAttempt {
        prompt: vec![u32::MAX; 4_000_000],
        ..start(1, 1)
    };
    stage.offer(big);
    let sent = stage.gateway_hears(1).await;
    let [PeerMessage::Refused { attempt, refusal }] = &sent[..] else {
        panic!("{sent:?}")
    };
    assert_eq!(*attempt, start(1, 1).attempt);
    assert!(
        matches!(refusal, Refusal::Engine(AttemptError::Invalid(why)) if why.contains("above the limit")),
        "{refusal:?}"
    );
}

#[tokio::test]
async fn an_engine_with_wrong_numbers_is_given_up_and_its_requests_may_come_back() {
    let mut stage = Stage::ready().await;
    let mut attempts = Vec::new();
    for request in 1..=3 {
        attempts.push(stage.dispatch(request, 1).await);
    }
    let error = AttemptError::NotFinite { position: 0 };
    for &attempt in &attempts[..2] {
        let error = error.clone();
        stage
            .engine
            .say(&EngineEvent::AttemptFailed { attempt, error });
    }
    stage.worker_ends().await;
    let refusal = Refusal::Engine(error);
    let refused = |attempt| PeerMessage::Refused {
        attempt,
        refusal: refusal.clone(),
    };
    // Who was refused avoids the replica; who showed that the engine is at fault, and who was beside it, need not.
    let expected = [
        refused(attempts[0]),
        lost(attempts[1..].to_vec(), LossCause::Mismatch),
    ];
    assert_eq!(stage.network.sent(), expected);
}

/// The state of a worker whose commands go to the test.
async fn state(network: &FakeNetwork, engine: &StandIn) -> (WorkerState, mpsc::Receiver<Vec<u8>>) {
    let (args, _) = args(network, engine).await;
    let (process, _socket) = EngineProcess::spawn(&args.spec).unwrap();
    let (commands, queue) = mpsc::channel(1);
    (WorkerState::new(args, process, commands), queue)
}

/// Neither does it run, nor has it ended without anybody who waits for it.
fn is_buried(engine: &EngineProcess) -> bool {
    !Path::new(&format!("/proc/{}", engine.pid())).exists()
}

#[tokio::test]
async fn a_stopped_worker_asks_its_engine_to_end_and_buries_it() {
    let (network, engine) = (FakeNetwork::new(), StandIn::new());
    let (mut state, mut queue) = state(&network, &engine).await;
    state
        .in_flight
        .insert(start(1, 1).attempt, false, network.peer());
    assert!(!is_buried(&state.engine));
    state.stop().await;
    let shutdown = codec::encode(&EngineCommand::Shutdown).unwrap();
    assert_eq!(queue.try_recv().unwrap(), shutdown);
    let attempts = vec![start(1, 1).attempt];
    assert_eq!(network.sent(), [lost(attempts, LossCause::Stopped)]);
    assert!(is_buried(&state.engine));
}

#[tokio::test]
async fn a_kill_from_outside_is_told_from_an_end_of_its_own() {
    let (network, engine) = (FakeNetwork::new(), StandIn::new());
    let (mut state, _queue) = state(&network, &engine).await;
    let attempts = vec![start(1, 1).attempt];
    state.in_flight.insert(attempts[0], false, network.peer());
    let group = nix::unistd::Pid::from_raw(state.engine.pid() as i32);
    nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL).unwrap();
    let knows = state.ooms.is_quiet();
    let said = state.engine_closed().await.to_string();
    assert!(said.contains("signal: 9"), "{said}");
    let cause = match knows {
        true => LossCause::EngineGone,
        false => LossCause::EngineExit,
    };
    assert_eq!(network.sent(), [lost(attempts, cause)]);
    assert!(is_buried(&state.engine));
}

#[tokio::test]
async fn what_an_engine_computed_alone_is_what_it_died_of() {
    let mut stage = Stage::ready().await;
    let beside = stage.dispatch(1, 1).await;
    let attempt = start(2, 1).attempt;
    stage.offer(StartAttempt {
        suspect: true,
        ..start(2, 1)
    });
    stage.hears_in_flight(2).await;
    stage.engine.say(&EngineEvent::Alone { attempt });
    stage.engine.exit(1).await;
    let expected = [
        lost(vec![attempt], LossCause::EngineExit),
        lost(vec![beside], LossCause::EngineGone),
    ];
    assert_eq!(stage.gateway_hears(2).await, expected);
}

#[tokio::test]
async fn an_engine_that_closes_its_socket_and_lives_on_is_killed_and_at_fault() {
    let (network, engine) = (FakeNetwork::new(), StandIn::new());
    let (mut state, _queue) = state(&network, &engine).await;
    let attempts = vec![start(1, 1).attempt];
    state.in_flight.insert(attempts[0], false, network.peer());
    state.engine_closed().await;
    assert_eq!(network.sent(), [lost(attempts, LossCause::EngineExit)]);
    assert!(is_buried(&state.engine));
}

#[tokio::test]
async fn an_engine_that_is_given_up_is_buried() {
    let (network, engine) = (FakeNetwork::new(), StandIn::new());
    let (mut state, _queue) = state(&network, &engine).await;
    state.give_up(LossCause::EngineHang, "a test".into()).await;
    assert!(is_buried(&state.engine));
}

#[tokio::test]
async fn every_step_counts() {
    let steps = Steps::default();
    let metrics = metrics::with_local_recorder(&steps, || ReplicaMetrics::new("m", 0));
    let mut stage = Stage::ready_with(|args| args.metrics = metrics).await;
    let attempt = stage.dispatch(1, 1).await;
    stage.engine.say(&EngineEvent::Step {
        step: 1,
        prompt_tokens: 3,
        tokens: vec![],
    });
    for position in 0..50 {
        stage.step(vec![token(attempt, position)]);
    }
    // Without a heartbeat in between or after.
    stage.engine.exit(1).await;
    stage.worker_ends().await;
    let mut expected = vec![1.0; 51];
    expected[0] = 3.0;
    assert_eq!(*steps.recorded.lock().unwrap(), expected);
}

/// Keeps what is recorded in histograms; of the replica's metrics that is the tokens of each step.
#[derive(Default)]
struct Steps {
    recorded: Arc<Mutex<Vec<f64>>>,
}

struct Recorded(Arc<Mutex<Vec<f64>>>);

impl HistogramFn for Recorded {
    fn record(&self, value: f64) {
        self.0.lock().unwrap().push(value);
    }
}

impl Recorder for Steps {
    fn describe_counter(&self, _: KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}

    fn register_counter(&self, _: &Key, _: &Metadata<'_>) -> Counter {
        Counter::noop()
    }

    fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::noop()
    }

    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::from_arc(Arc::new(Recorded(self.recorded.clone())))
    }
}
