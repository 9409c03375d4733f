//! The endpoint: this host's replicas as gateways address them, and what gateways hear of them.
//!
//! Reports go to every node: at once when a replica's state changes, otherwise every [`REPORT_INTERVAL`].

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use understudy_cluster::PeerId;
use understudy_engine_core::frame::{AttemptId, StartAttempt};

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
    replicas: BTreeMap<ReplicaId, Entry>,
}

impl Actor for Endpoint {
    type Msg = EndpointMsg;
    type State = EndpointState;
    type Arguments = Links;

    async fn pre_start(
        &self,
        me: ActorRef<EndpointMsg>,
        links: Links,
    ) -> Result<EndpointState, ActorProcessingErr> {
        me.send_interval(REPORT_INTERVAL, || EndpointMsg::Tick);
        Ok(EndpointState {
            links,
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
                    state.links.broadcast(&state.report());
                }
                if let Some(published) = published {
                    published.send(()).ok();
                }
            }
            EndpointMsg::Dispatch {
                gateway,
                replica,
                start,
            } => state.dispatch(gateway, &replica, start),
            EndpointMsg::Cancel { replica, attempt } => {
                if let Some(worker) = state.worker(&replica) {
                    worker.cast(WorkerMsg::Cancel(attempt)).ok();
                }
            }
            EndpointMsg::PeerUp(peer) => {
                // What cannot be sent now is sent with the next tick.
                state.links.send(&peer, state.report()).ok();
            }
            EndpointMsg::PeerDown(peer) => {
                for entry in state.replicas.values() {
                    if let Some(worker) = &entry.worker {
                        worker.cast(WorkerMsg::GatewayDown(peer.clone())).ok();
                    }
                }
            }
            EndpointMsg::Tick => {
                state.measure();
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
        let states = [
            (ReplicaState::Starting, record::ReplicaState::Starting),
            (ReplicaState::Ready, record::ReplicaState::Ready),
            (ReplicaState::Backoff, record::ReplicaState::Backoff),
            (ReplicaState::Down, record::ReplicaState::Down),
        ];
        let models: BTreeSet<&str> = self.replicas.keys().map(|id| &*id.model).collect();
        for model in models {
            for (state, label) in states {
                let here = |(id, entry): &(&ReplicaId, &Entry)| {
                    *id.model == *model && entry.report.state == state
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
