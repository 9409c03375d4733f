use ractor::ActorCell;
use tokio::sync::mpsc::UnboundedReceiver;

use super::*;
use crate::peer::PeerMessage;
use crate::peer::testing::{FakeNetwork, start};
use crate::restart::testing::PATIENT;
use crate::worker::Offer;
use crate::worker::testing::{LIMITS, Probe, StandIn, info, until};

/// A supervisor whose handlers a test calls itself, so that it says in what order things happen.
struct Stage {
    me: ActorRef<ReplicaMsg>,
    state: ReplicaSupervisorState,
}

impl Stage {
    async fn new(args: ReplicaArgs) -> Self {
        let (me, _) = Probe::spawn().await;
        let state = ReplicaSupervisor.pre_start(me.clone(), args).await.unwrap();
        Self { me, state }
    }

    async fn tell(&mut self, message: ReplicaMsg) {
        let (me, state) = (self.me.clone(), &mut self.state);
        ReplicaSupervisor.handle(me, message, state).await.unwrap();
    }

    async fn worker_says(&mut self, generation: u64, news: WorkerNews) {
        self.tell(ReplicaMsg::Worker { generation, news }).await;
    }

    async fn worker_fails(&mut self, error: &str) {
        let cell: ActorCell = self.me.get_cell();
        let event = SupervisionEvent::ActorFailed(cell, error.into());
        let (me, state) = (self.me.clone(), &mut self.state);
        ReplicaSupervisor
            .handle_supervisor_evt(me, event, state)
            .await
            .unwrap();
    }

    fn shown(&self) -> (ReplicaState, u32, Option<String>) {
        let report = self.state.report();
        let worker = report.status.workers[0].clone();
        (report.state, worker.restarts, worker.last_error)
    }
}

async fn args(engine: &StandIn) -> (ReplicaArgs, FakeNetwork, UnboundedReceiver<EndpointMsg>) {
    let network = FakeNetwork::new();
    let (endpoint, heard) = Probe::spawn().await;
    let args = ReplicaArgs {
        id: ReplicaId {
            model: "m".into(),
            index: 0,
        },
        spec: engine.spec(),
        limits: LIMITS,
        restart: PATIENT,
        links: network.links(),
        endpoint,
    };
    (args, network, heard)
}

fn ending(cause: LossCause, detail: &str) -> WorkerNews {
    let (done, _) = tokio::sync::oneshot::channel();
    WorkerNews::Ending {
        cause,
        detail: detail.into(),
        done: done.into(),
    }
}

#[tokio::test]
async fn what_a_worker_said_before_its_end_counts_no_more_after_it() {
    let (args, _, _heard) = args(&StandIn::new()).await;
    let mut stage = Stage::new(args).await;
    stage
        .worker_says(0, WorkerNews::Ready(Box::new(info())))
        .await;
    assert_eq!(stage.shown().0, ReplicaState::Ready);
    stage.worker_fails("panicked").await;
    for news in [
        WorkerNews::Ready(Box::new(info())),
        WorkerNews::Started { pid: 7 },
        WorkerNews::InFlight(7),
        ending(LossCause::EngineHang, "late"),
    ] {
        stage.worker_says(0, news).await;
    }
    assert_eq!(stage.shown().0, ReplicaState::Backoff);
    assert_eq!((stage.state.pid, stage.state.in_flight), (None, 0));
    assert_eq!(stage.shown().2.as_deref(), Some("panicked"));
    stage
        .worker_says(1, WorkerNews::Ready(Box::new(info())))
        .await;
    assert_eq!(stage.shown().0, ReplicaState::Ready);
}

#[tokio::test]
async fn the_last_error_is_that_of_the_last_worker() {
    let (args, _, _heard) = args(&StandIn::new()).await;
    let mut stage = Stage::new(args).await;
    let first = ending(LossCause::EngineExit, "the socket closed");
    stage.worker_says(0, first).await;
    assert_eq!(stage.shown().2.as_deref(), Some("the socket closed"));
    // By then it knows how the process ended.
    stage.worker_fails("signal: 9").await;
    assert_eq!(stage.shown().2.as_deref(), Some("signal: 9"));
    stage.worker_fails("a panic").await;
    assert_eq!(stage.shown().2.as_deref(), Some("a panic"));
}

#[tokio::test]
async fn every_start_but_the_first_is_counted_the_one_after_the_cool_down_too() {
    let (mut args, _, _heard) = args(&StandIn::new()).await;
    args.spec = Arc::new(EngineSpec {
        program: "/nowhere/engine".into(),
        ..(*args.spec).clone()
    });
    args.restart.intensity = 1;
    let mut stage = Stage::new(args).await;
    for (state, restarts) in [
        (ReplicaState::Backoff, 0),
        (ReplicaState::Down, 1),
        (ReplicaState::Down, 2),
        (ReplicaState::Down, 3),
    ] {
        stage.tell(ReplicaMsg::Start).await;
        let (shown, counted, error) = stage.shown();
        assert_eq!((shown, counted), (state, restarts));
        let error = error.unwrap();
        assert!(error.contains("cannot start the engine"), "{error}");
    }
}

#[tokio::test]
async fn a_stop_is_published_before_the_losses() {
    let mut engine = StandIn::new();
    let (args, network, mut heard) = args(&engine).await;
    let (replica, _) = Actor::spawn(None, ReplicaSupervisor, args).await.unwrap();
    engine.get_ready();
    let worker = until("a ready worker", || match heard.try_recv().ok()? {
        EndpointMsg::Replica { worker, .. } => worker,
        _ => None,
    })
    .await;
    let offer = Offer::new(network.links(), network.peer(), start(1, 1));
    worker.cast(WorkerMsg::Dispatch(offer)).unwrap();
    until("the attempt in flight", || match heard.try_recv().ok()? {
        EndpointMsg::Replica { report, .. } => (report.status.in_flight == 1).then_some(()),
        _ => None,
    })
    .await;
    replica.stop(None);
    let published = until("the report of the stop", || {
        match heard.try_recv().ok()? {
            EndpointMsg::Replica {
                report,
                worker,
                published,
                ..
            } if report.state == ReplicaState::Stopping => Some((worker.is_none(), published)),
            _ => None,
        }
    })
    .await;
    assert!(published.0, "nothing is dispatched to it any more");
    assert_eq!(network.sent(), []);
    drop(published);
    let attempts = vec![start(1, 1).attempt];
    let cause = LossCause::Stopped;
    let lost = until("the losses", || network.sent().pop()).await;
    assert_eq!(lost, PeerMessage::Lost { attempts, cause });
}
