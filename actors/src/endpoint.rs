//! The endpoint: this host's replicas as gateways address them, and what gateways hear of them.
//!
//! Reports go to every node: at once when a replica's state changes, otherwise every [`REPORT_INTERVAL`].

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use understudy_cluster::PeerId;
use understudy_engine_core::frame::{AttemptId, StartAttempt};

use understudy_telemetry::gauges::NodeInfo;
use understudy_telemetry::record;

use crate::peer::{Links, PeerMessage, ReplicaId, ReplicaReport, ReplicaState};
use crate::worker::{Offer, WorkerMsg};

/// How often load figures are sent to gateways.
const REPORT_INTERVAL: Duration = Duration::from_millis(200);

/// What an endpoint is told.
#[derive(Debug)]
pub enum EndpointMsg {
    /// A replica's state, and its worker if it takes work.
    Replica {
        report: Box<ReplicaReport>,
        worker: Option<ActorRef<WorkerMsg>>,
        urgent: bool,
        /// Answered once an urgent report is on its way to every gateway.
        published: Option<RpcReplyPort<()>>,
    },
    /// A replica's supervisor ended without a word: what it last said holds no longer.
    Gone(ReplicaId),
    Dispatch {
        gateway: PeerId,
        replica: ReplicaId,
        start: StartAttempt,
    },
    Cancel {
        replica: ReplicaId,
        attempt: AttemptId,
    },
    PeerUp(PeerId),
    PeerDown(PeerId),
    Tick,
}
local_message!(EndpointMsg);

struct Entry {
    report: ReplicaReport,
    worker: Option<ActorRef<WorkerMsg>>,
}

pub struct Endpoint;

pub struct EndpointState {
    links: Links,
    /// What this node serves, for metrics.
    info: NodeInfo,
    replicas: BTreeMap<ReplicaId, Entry>,
}

impl Actor for Endpoint {
    type Msg = EndpointMsg;
    type State = EndpointState;
    type Arguments = (Links, NodeInfo);

    async fn pre_start(
        &self,
        me: ActorRef<EndpointMsg>,
        (links, info): (Links, NodeInfo),
    ) -> Result<EndpointState, ActorProcessingErr> {
        me.send_interval(REPORT_INTERVAL, || EndpointMsg::Tick);
        Ok(EndpointState {
            links,
            info,
            replicas: BTreeMap::new(),
        })
    }

    async fn handle(
        &self,
        _me: ActorRef<EndpointMsg>,
        message: EndpointMsg,
        state: &mut EndpointState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            EndpointMsg::Replica {
                report,
                worker,
                urgent,
                published,
            } => {
                state.replicas.insert(
                    report.replica.clone(),
                    Entry {
                        report: *report,
                        worker,
                    },
                );
                if urgent {
                    state.measure();
                    state.links.broadcast(&state.report());
                }
                if let Some(published) = published {
                    published.send(()).ok();
                }
            }
            EndpointMsg::Gone(replica) => {
                state.replicas.remove(&replica);
                state.links.broadcast(&state.report());
            }
            EndpointMsg::Dispatch {
                gateway,
                replica,
                start,
            } => state.dispatch(gateway, &replica, start),
            EndpointMsg::Cancel { replica, attempt } => {
                state.links.settle(attempt);
                if let Some(worker) = state.worker(&replica) {
                    worker.cast(WorkerMsg::Cancel(attempt)).ok();
                }
            }
            EndpointMsg::PeerUp(peer) => {
                // What cannot be sent now is sent with the next tick.
                state.links.send(&peer, state.report()).ok();
            }
            EndpointMsg::PeerDown(peer) => {
                state.links.forget(&peer);
                for entry in state.replicas.values() {
                    if let Some(worker) = &entry.worker {
                        worker.cast(WorkerMsg::GatewayDown(peer.clone())).ok();
                    }
                }
            }
            EndpointMsg::Tick => {
                state.measure();
                state.links.tell_owed();
                state.links.broadcast(&state.report());
            }
        }
        Ok(())
    }
}

impl EndpointState {
    fn worker(&self, replica: &ReplicaId) -> Option<&ActorRef<WorkerMsg>> {
        self.replicas.get(replica)?.worker.as_ref()
    }

    fn dispatch(&self, gateway: PeerId, replica: &ReplicaId, start: StartAttempt) {
        let offer = Offer::new(self.links.clone(), gateway, start);
        // Without a worker, or with one that has ended, the offer is dropped, and thereby refused.
        if let Some(worker) = self.worker(replica) {
            worker.cast(WorkerMsg::Dispatch(offer)).ok();
        }
    }

    fn measure(&self) {
        let ready = self.replicas.values().map(|entry| &entry.report);
        let ready = ready.filter(|report| report.state == ReplicaState::Ready);
        self.info
            .serves(ready.map(|report| report.fingerprint.as_str()));
        let models: BTreeSet<&str> = self.replicas.keys().map(|id| &*id.model).collect();
        for model in models {
            for &label in record::ReplicaState::ALL {
                let here = |(id, entry): &(&ReplicaId, &Entry)| {
                    *id.model == *model && measured_as(entry.report.state) == label
                };
                record::replicas(model, label, self.replicas.iter().filter(here).count());
            }
        }
    }

    fn report(&self) -> PeerMessage {
        PeerMessage::Report(
            self.replicas
                .values()
                .map(|entry| entry.report.clone())
                .collect(),
        )
    }
}

fn measured_as(state: ReplicaState) -> record::ReplicaState {
    match state {
        ReplicaState::Starting => record::ReplicaState::Starting,
        ReplicaState::Ready => record::ReplicaState::Ready,
        ReplicaState::Backoff => record::ReplicaState::Backoff,
        ReplicaState::Down | ReplicaState::Stopping => record::ReplicaState::Down,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peer::LossCause;
    use crate::peer::testing::{FakeNetwork, start};

    fn replica() -> ReplicaId {
        ReplicaId {
            model: "m".into(),
            index: 0,
        }
    }

    /// What the gateway hears apart from reports, after the endpoint has handled everything that was cast before.
    async fn heard(network: &FakeNetwork, endpoint: &ActorRef<EndpointMsg>) -> Vec<PeerMessage> {
        endpoint.cast(EndpointMsg::Tick).unwrap();
        let (done, handled) = tokio::sync::oneshot::channel();
        let message = EndpointMsg::Replica {
            report: Box::new(report(ReplicaState::Starting)),
            worker: None,
            urgent: false,
            published: Some(done.into()),
        };
        endpoint.cast(message).unwrap();
        handled.await.unwrap();
        let mut sent = network.sent();
        sent.retain(|message| !matches!(message, PeerMessage::Report(_)));
        sent
    }

    fn report(state: ReplicaState) -> ReplicaReport {
        ReplicaReport {
            replica: replica(),
            state,
            capacity: 1,
            fingerprint: String::new(),
            status: understudy_protocol::message::ReplicaStatus {
                model: "m".into(),
                node: "host".into(),
                replica: 0,
                state: state.as_str().into(),
                in_flight: 0,
                workers: Vec::new(),
            },
        }
    }

    /// An endpoint without a worker, which has refused attempt 1 to a gateway that had no room for the refusal.
    async fn with_an_unheard_refusal() -> (FakeNetwork, ActorRef<EndpointMsg>) {
        let network = FakeNetwork::new();
        let (endpoint, _) =
            Actor::spawn(None, Endpoint, (network.links(), NodeInfo::new("a", "0")))
                .await
                .unwrap();
        network.fill();
        let dispatch = EndpointMsg::Dispatch {
            gateway: network.peer(),
            replica: replica(),
            start: start(1, 1),
        };
        endpoint.cast(dispatch).unwrap();
        assert_eq!(heard(&network, &endpoint).await, []);
        (network, endpoint)
    }

    #[tokio::test]
    async fn a_gateway_hears_with_the_next_tick_what_it_had_no_room_for() {
        let (network, endpoint) = with_an_unheard_refusal().await;
        network.drain();
        let attempts = vec![start(1, 1).attempt];
        let cause = LossCause::Gap;
        let lost = PeerMessage::Lost { attempts, cause };
        assert_eq!(heard(&network, &endpoint).await, [lost]);
        assert_eq!(heard(&network, &endpoint).await, []);
        endpoint.stop(None);
    }

    #[tokio::test]
    async fn nothing_is_owed_for_what_a_gateway_cancelled_or_to_one_that_is_gone() {
        for gone in [false, true] {
            let (network, endpoint) = with_an_unheard_refusal().await;
            let message = match gone {
                true => EndpointMsg::PeerDown(network.peer()),
                false => EndpointMsg::Cancel {
                    replica: replica(),
                    attempt: start(1, 1).attempt,
                },
            };
            endpoint.cast(message).unwrap();
            // Handled before it has room, or the next tick may come first.
            assert_eq!(heard(&network, &endpoint).await, []);
            network.drain();
            assert_eq!(heard(&network, &endpoint).await, [], "gone: {gone}");
            endpoint.stop(None);
        }
    }

    #[tokio::test]
    async fn a_replica_whose_supervisor_is_gone_is_published_no_longer() {
        let network = FakeNetwork::new();
        let (endpoint, _) =
            Actor::spawn(None, Endpoint, (network.links(), NodeInfo::new("a", "0")))
                .await
                .unwrap();
        let message = EndpointMsg::Replica {
            report: Box::new(report(ReplicaState::Ready)),
            worker: None,
            urgent: true,
            published: None,
        };
        endpoint.cast(message).unwrap();
        endpoint.cast(EndpointMsg::Gone(replica())).unwrap();
        endpoint.drain_and_wait(None).await.unwrap();
        let sent = network.sent();
        assert!(sent.contains(&PeerMessage::Report(vec![report(ReplicaState::Ready)])));
        assert_eq!(sent.last(), Some(&PeerMessage::Report(vec![])));
    }
}
