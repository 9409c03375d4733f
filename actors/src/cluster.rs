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
                    let (detail, size_bytes) = (detail(&error), payload.len());
                    tracing::error!(peer = %from, detail, size_bytes, "message from a node could not be decoded; do all nodes run one version?")
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

/// What was wrong with a message, without anything of it: the decoder's own words may quote a value, and a value may be a
/// prompt.
fn detail(error: &rmp_serde::decode::Error) -> &'static str {
    use rmp_serde::decode::Error;
    match error {
        Error::InvalidMarkerRead(_) | Error::InvalidDataRead(_) => "it is cut off",
        Error::TypeMismatch(_) => "a value has another type",
        Error::OutOfRange => "a number is out of range",
        Error::LengthMismatch(_) => "a list has another length",
        Error::Uncategorized(_) | Error::Syntax(_) => "it is no message of this version",
        Error::Utf8Error(_) => "a text is not UTF-8",
        Error::DepthLimitExceeded => "it is nested too deeply",
    }
}

/// Why the cluster actor stops when the events do.
const LAYER_ENDED: &str = "the cluster layer has ended";

/// Hands each event to the actor. In a planned stop the actor goes first, and events are dropped until the layer below has
/// said goodbye: without somebody who takes them it would leave at once. When the events end while the actor lives, the layer
/// has failed, this node is in no cluster any more, and must end as with any failed singleton.
async fn forward(mut events: mpsc::Receiver<ClusterEvent>, actor: ActorRef<ClusterMsg>) {
    let permits = std::sync::Arc::new(tokio::sync::Semaphore::new(MAX_EVENTS_IN_MAILBOX));
    while let Some(event) = events.recv().await {
        let Ok(permit) = permits.clone().acquire_owned().await else {
            return;
        };
        if actor.cast(ClusterMsg::Event(event, permit)).is_err() {
            while events.recv().await.is_some() {}
        }
    }
    actor.stop(Some(LAYER_ENDED.to_owned()));
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use ractor::SupervisionEvent;
    use tokio::sync::oneshot;
    use tokio::time::timeout;
    use understudy_cluster::NodeName;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// Takes events in place of the cluster actor.
    struct Taker;

    impl Actor for Taker {
        type Msg = ClusterMsg;
        type State = ();
        type Arguments = ();

        async fn pre_start(
            &self,
            _: ActorRef<ClusterMsg>,
            (): (),
        ) -> Result<(), ActorProcessingErr> {
            Ok(())
        }

        async fn handle(
            &self,
            _: ActorRef<ClusterMsg>,
            _: ClusterMsg,
            (): &mut (),
        ) -> Result<(), ActorProcessingErr> {
            Ok(())
        }
    }

    /// Supervises a taker, and tells why it ended.
    struct Watcher;

    impl Actor for Watcher {
        type Msg = ();
        type State = Option<oneshot::Sender<Option<String>>>;
        type Arguments = oneshot::Sender<Option<String>>;

        async fn pre_start(
            &self,
            _: ActorRef<()>,
            ended: Self::Arguments,
        ) -> Result<Self::State, ActorProcessingErr> {
            Ok(Some(ended))
        }

        async fn handle_supervisor_evt(
            &self,
            _: ActorRef<()>,
            event: SupervisionEvent,
            ended: &mut Self::State,
        ) -> Result<(), ActorProcessingErr> {
            if let SupervisionEvent::ActorTerminated(_, _, reason) = event
                && let Some(ended) = ended.take()
            {
                ended.send(reason).ok();
            }
            Ok(())
        }
    }

    fn peer() -> PeerId {
        PeerId::new(NodeName::new("b").unwrap(), 1)
    }

    /// The reason with which the actor ends after these events, when no more can come.
    async fn end_after(sent: Vec<ClusterEvent>) -> Option<String> {
        let (ended, end) = oneshot::channel();
        let (watcher, _) = Actor::spawn(None, Watcher, ended).await.unwrap();
        let (taker, _) = Actor::spawn_linked(None, Taker, (), watcher.get_cell())
            .await
            .unwrap();
        let (events, received) = mpsc::channel(8);
        for event in sent {
            events.send(event).await.unwrap();
        }
        drop(events);
        forward(received, taker).await;
        let reason = timeout(PATIENCE, end).await.expect("it ends").unwrap();
        watcher.stop(None);
        reason
    }

    #[tokio::test]
    async fn the_end_of_the_cluster_layer_ends_its_actor_with_a_reason() {
        let up = ClusterEvent::Up { peer: peer() };
        assert_eq!(end_after(vec![up]).await.as_deref(), Some(LAYER_ENDED));
    }

    #[tokio::test]
    async fn a_planned_stop_leaves_somebody_who_takes_the_events() {
        let (taker, ended) = Actor::spawn(None, Taker, ()).await.unwrap();
        taker.stop(None);
        ended.await.unwrap();
        let (events, received) = mpsc::channel(1);
        let forwarding = tokio::spawn(forward(received, taker));
        for _ in 0..100 {
            let up = ClusterEvent::Up { peer: peer() };
            let sent = timeout(PATIENCE, events.send(up)).await.expect("taken");
            sent.expect("somebody is there");
        }
        drop(events);
        timeout(PATIENCE, forwarding)
            .await
            .expect("it ends with the events")
            .unwrap();
    }

    #[test]
    fn what_cannot_be_decoded_is_not_quoted() {
        let secret = "what a client asked";
        // A message of another version: its kind is unknown here, and the decoder names it.
        let payload = rmp_serde::to_vec(&(secret, 1)).unwrap();
        let nested = rmp_serde::to_vec(&std::collections::BTreeMap::from([(secret, 1)])).unwrap();
        let errors = [payload, nested]
            .map(|payload| rmp_serde::from_slice::<PeerMessage>(&payload).unwrap_err());
        assert!(
            errors
                .iter()
                .any(|error| error.to_string().contains(secret)),
            "{errors:?}"
        );
        for error in errors {
            assert!(!detail(&error).contains(secret));
        }
    }
}
