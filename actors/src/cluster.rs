//! The cluster actor: takes what the cluster layer tells this node, and hands each message to whom it concerns.

use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use understudy_cluster::{ClusterEvent, PeerId};

use crate::endpoint::EndpointMsg;
use crate::hub::HubMsg;
use crate::peer::{Links, PeerMessage};
use crate::router::RouterMsg;

/// Cluster events that wait in this actor's mailbox at most; the cluster layer slows its peers down behind them.
pub const MAX_EVENTS_IN_MAILBOX: usize = 1024;

/// What the cluster actor is told.
#[derive(Debug)]
pub enum ClusterMsg {
    /// From the cluster layer. The permit bounds how many of these wait.
    Event(ClusterEvent, OwnedSemaphorePermit),
    /// From this node to itself.
    Local(PeerMessage),
}
local_message!(ClusterMsg);

/// The actors of this node that hear from others; a node without a role lacks its actors.
#[derive(Clone)]
pub struct Listeners {
    pub endpoint: Option<ActorRef<EndpointMsg>>,
    pub router: Option<ActorRef<RouterMsg>>,
    pub hub: Option<ActorRef<HubMsg>>,
}

pub struct ClusterArgs {
    pub links: Links,
    pub listeners: Listeners,
    pub events: mpsc::Receiver<ClusterEvent>,
}

pub struct ClusterActor;

pub struct ClusterState {
    me: PeerId,
    listeners: Listeners,
}

impl Actor for ClusterActor {
    type Msg = ClusterMsg;
    type State = ClusterState;
    type Arguments = ClusterArgs;

    async fn pre_start(
        &self,
        me: ActorRef<ClusterMsg>,
        args: ClusterArgs,
    ) -> Result<ClusterState, ActorProcessingErr> {
        args.links.set_local(me.clone());
        tokio::spawn(forward(args.events, me));
        Ok(ClusterState {
            me: args.links.me().clone(),
            listeners: args.listeners,
        })
    }

    async fn handle(
        &self,
        _me: ActorRef<ClusterMsg>,
        message: ClusterMsg,
        state: &mut ClusterState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            ClusterMsg::Event(event, _permit) => state.event(event),
            ClusterMsg::Local(message) => state.deliver(state.me.clone(), message),
        }
        Ok(())
    }
}

impl ClusterState {
    fn event(&self, event: ClusterEvent) {
        match event {
            ClusterEvent::Up { peer } => {
                tracing::info!(%peer, "node is up");
                self.to_endpoint(EndpointMsg::PeerUp(peer));
            }
            ClusterEvent::Suspect { peer } => {
                tracing::warn!(%peer, "node is suspect");
                self.to_router(RouterMsg::Suspect {
                    peer,
                    suspect: true,
                });
            }
            ClusterEvent::Alive { peer } => self.to_router(RouterMsg::Suspect {
                peer,
                suspect: false,
            }),
            ClusterEvent::Down { peer, cause } => {
                tracing::warn!(%peer, %cause, "node is down");
                self.to_endpoint(EndpointMsg::PeerDown(peer.clone()));
                self.to_router(RouterMsg::PeerDown(peer));
            }
            ClusterEvent::Message { from, payload } => match rmp_serde::from_slice(&payload) {
                Ok(message) => self.deliver(from, message),
                Err(error) => {
                    tracing::error!(peer = %from, %error, "message from a node could not be decoded; do all nodes run one version?")
                }
            },
        }
    }

    fn deliver(&self, from: PeerId, message: PeerMessage) {
        match message {
            PeerMessage::Report(replicas) => self.to_router(RouterMsg::Report {
                peer: from,
                replicas,
            }),
            PeerMessage::Dispatch { replica, start } => {
                self.to_endpoint(EndpointMsg::Dispatch {
                    gateway: from,
                    replica,
                    start,
                });
            }
            PeerMessage::Cancel { replica, attempt } => {
                self.to_endpoint(EndpointMsg::Cancel { replica, attempt })
            }
            PeerMessage::Tokens(tokens) => {
                if let Some(hub) = &self.listeners.hub {
                    hub.cast(HubMsg::Tokens(tokens)).ok();
                }
            }
            PeerMessage::Lost { attempts, cause } => self.to_router(RouterMsg::Lost {
                peer: from,
                attempts,
                cause,
            }),
            PeerMessage::Refused { attempt, refusal } => {
                self.to_router(RouterMsg::Refused {
                    peer: from,
                    attempt,
                    refusal,
                });
            }
        }
    }

    // A cast fails only while the node stops: nobody waits for the message then.

    fn to_endpoint(&self, message: EndpointMsg) {
        if let Some(endpoint) = &self.listeners.endpoint {
            endpoint.cast(message).ok();
        }
    }

    fn to_router(&self, message: RouterMsg) {
        if let Some(router) = &self.listeners.router {
            router.cast(message).ok();
        }
    }
}

async fn forward(mut events: mpsc::Receiver<ClusterEvent>, actor: ActorRef<ClusterMsg>) {
    let permits = std::sync::Arc::new(tokio::sync::Semaphore::new(MAX_EVENTS_IN_MAILBOX));
    while let Some(event) = events.recv().await {
        let Ok(permit) = permits.clone().acquire_owned().await else {
            return;
        };
        if actor.cast(ClusterMsg::Event(event, permit)).is_err() {
            return;
        }
    }
}
