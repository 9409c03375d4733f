use std::time::Duration;

use ractor::ActorStatus;
use tokio::sync::mpsc::UnboundedReceiver;

use super::testing::{Probe, StandIn, until};
use super::*;
use crate::peer::testing::{FakeNetwork, start};

/// Long enough for none of them to pass in a test.
const LIMITS: WorkerLimits = WorkerLimits {
    silence: Duration::from_secs(60),
    stall: Duration::from_secs(60),
    start: Duration::from_secs(60),
};

/// A worker between a network, an engine and a supervisor that all do as the test says.
struct Stage {
    network: FakeNetwork,
    engine: StandIn,
    worker: ActorRef<WorkerMsg>,
    news: UnboundedReceiver<ReplicaMsg>,
}

impl Stage {
    async fn new() -> Self {
        let network = FakeNetwork::new();
        let engine = StandIn::new();
        let (replica, news) = Probe::spawn().await;
        let args = WorkerArgs {
            name: "m/0@host".into(),
            spec: engine.spec(),
            limits: LIMITS,
            links: network.links(),
            replica,
        };
        let (worker, _) = Actor::spawn(None, Worker, args).await.unwrap();
        Self {
            network,
            engine,
            worker,
            news,
        }
    }

    async fn ready() -> Self {
        let mut stage = Self::new().await;
        stage.engine.get_ready();
        stage
            .hears("ready", |news| matches!(news, ReplicaMsg::EngineReady(_)))
            .await;
        stage
    }

    /// Waits until the supervisor is told something.
    async fn hears(&mut self, what: &str, is_it: impl Fn(&ReplicaMsg) -> bool) -> ReplicaMsg {
        until(what, || self.news.try_recv().ok().filter(&is_it)).await
    }

    /// Dispatches an attempt, and waits until the engine has it.
    async fn dispatch(&mut self, request: u128, epoch: u32) -> AttemptId {
        let (links, gateway) = (self.network.links(), self.network.peer());
        let start = start(request, epoch);
        let offer = Offer::new(links, gateway, start.clone());
        self.worker.cast(WorkerMsg::Dispatch(offer)).unwrap();
        let attempt = start.attempt;
        self.engine.has_got(EngineCommand::Start(start)).await;
        attempt
    }

    /// Waits until the gateway is told something.
    async fn gateway_hears(&self) -> Vec<PeerMessage> {
        until("a message to the gateway", || {
            Some(self.network.sent()).filter(|sent| !sent.is_empty())
        })
        .await
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

#[tokio::test]
async fn losses_that_the_gateway_has_no_room_for_outlive_the_worker() {
    let mut stage = Stage::ready().await;
    let attempts = vec![stage.dispatch(1, 1).await, stage.dispatch(2, 1).await];
    stage.network.fill();
    stage.engine.exit(1);
    stage.worker_ends().await;
    assert_eq!(stage.network.sent(), []);
    stage.network.drain();
    stage.network.links().tell_owed();
    let cause = LossCause::Gap;
    assert_eq!(
        stage.network.sent(),
        [PeerMessage::Lost { attempts, cause }]
    );
}

#[tokio::test]
async fn losses_are_reported_with_their_cause() {
    let mut stage = Stage::ready().await;
    let attempts = vec![stage.dispatch(1, 1).await];
    stage.engine.exit(1);
    let cause = LossCause::EngineExit;
    let lost = PeerMessage::Lost { attempts, cause };
    assert_eq!(stage.gateway_hears().await, [lost]);
}
