//! The endpoint: this host's replicas as gateways address them, and what gateways hear of them.
//!
//! Reports go to every node: at once when a replica's state changes, otherwise every [`REPORT_INTERVAL`].

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use ractor::{Actor, ActorProcessingErr, ActorRef};
use understudy_cluster::PeerId;
use understudy_engine_core::frame::{AttemptId, StartAttempt};

use understudy_telemetry::record;

use crate::peer::{Links, PeerMessage, Refusal, ReplicaId, ReplicaReport, ReplicaState};
use crate::worker::WorkerMsg;

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
        let attempt = start.attempt;
        let taken = self.worker(replica).is_some_and(|worker| {
            worker
                .cast(WorkerMsg::Dispatch {
                    gateway: gateway.clone(),
                    start,
                })
                .is_ok()
        });
        if !taken {
            // A gateway that cannot hear this is down, and starts over when it is back.
            self.links
                .send(
                    &gateway,
                    PeerMessage::Refused {
                        attempt,
                        refusal: Refusal::NotReady,
                    },
                )
                .ok();
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
