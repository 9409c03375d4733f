//! The only file that talks to `ractor_cluster`.
//!
//! One [`NodeServer`] runs the sessions, and one actor, the *port*, is all that is remotable on a node. A peer
//! finds the port in a process group that bears the node's [`PeerId`]. Neither has a name in ractor's registry: the
//! death of a remote actor unregisters a local one of the same name.
//!
//! The node server insists on a listener of its own. It is bound to the loopback address, and killed as soon as
//! it runs, cut off from its supervisor first so that it is not started again: connections come from our listener and
//! dialer only, after our handshake.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ractor::concurrency::JoinHandle;
use ractor::message::{BoxedDowncastErr, SerializedMessage};
use ractor::{Actor, ActorCell, ActorId, ActorProcessingErr, ActorRef, pg};
use ractor_cluster::node::{NodeConnectionMode, NodeServerSessionInformation};
use ractor_cluster::{
    IncomingEncryptionMode, NodeEventSubscription, NodeServer, NodeServerMessage,
};

use crate::cookie::{Cookie, hex};
use crate::hub::Hub;
use crate::identity::PeerId;
use crate::transport::Link;

/// The scope of our process groups.
const SCOPE: &str = "understudy-cluster";
/// Largest message that `ractor_cluster` accepts. Ours are at most half as large; its own lists of actors and
/// groups are short, because one actor in one group is all there is.
const MAX_INBOUND_FRAME_BYTES: u64 = 128 << 10;
/// Longest wait for an actor of this layer to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// The actors of a bridge by name, each with what ends when it does.
pub(crate) type Ends = [(&'static str, JoinHandle<()>); 2];

/// The node server and the port, running.
pub(crate) struct Bridge {
    server: ActorRef<NodeServerMessage>,
    port: ActorRef<PortMessage>,
}

impl Bridge {
    /// Starts both. Sessions and messages are reported to `hub` from now on. Nobody supervises them: what is returned
    /// beside them ends when they do.
    pub(crate) async fn start(
        hub: &Arc<Hub>,
        me: &PeerId,
        cookie: &Cookie,
    ) -> Result<(Self, Ends), String> {
        let failed =
            |what: &str, error: &dyn std::fmt::Display| format!("cannot start {what}: {error}");
        let (port, port_end) = Actor::spawn(None, Port, hub.clone())
            .await
            .map_err(|error| failed("the port actor", &error))?;
        pg::join_scoped(SCOPE.to_owned(), me.to_string(), vec![port.get_cell()]);

        let server = NodeServer::new(
            0,
            hex(&cookie.derive("understudy ractor_cluster 1")),
            me.to_string(),
            me.to_string(),
            Some(IncomingEncryptionMode::Raw),
            Some(NodeConnectionMode::Isolated),
        )
        .with_listen_addr(IpAddr::V4(Ipv4Addr::LOCALHOST))
        .with_max_inbound_frame_size(MAX_INBOUND_FRAME_BYTES);
        let (server, server_end) = Actor::spawn(None, server, ())
            .await
            .map_err(|error| failed("the node server", &error))?;
        close_listener(&server).await?;

        let subscription = Box::new(Events {
            hub: hub.clone(),
            me: me.clone(),
        });
        let subscribe = NodeServerMessage::SubscribeToEvents {
            id: SCOPE.to_owned(),
            subscription,
        };
        server
            .cast(subscribe)
            .map_err(|error| failed("the node server", &error))?;
        let ends = [
            ("the port actor", port_end),
            ("the node server", server_end),
        ];
        Ok((Self { server, port }, ends))
    }

    /// Gives a connection to the node server. Its events will call it by `link.label`.
    pub(crate) fn open(&self, link: Link, is_server: bool) -> bool {
        let stream = Box::new(link);
        self.server
            .cast(NodeServerMessage::ConnectionOpenedExternal { stream, is_server })
            .is_ok()
    }

    /// Stops both.
    pub(crate) async fn stop(&self) {
        let timeout = Some(STOP_TIMEOUT);
        if self.server.stop_and_wait(None, timeout).await.is_err() {
            self.server.kill();
        }
        if self.port.stop_and_wait(None, timeout).await.is_err() {
            self.port.kill();
        }
    }
}

/// Ends the node server's own listener, its only child at this point.
async fn close_listener(server: &ActorRef<NodeServerMessage>) -> Result<(), String> {
    for listener in server.get_children() {
        listener.unlink(server.get_cell());
        let ended = listener.kill_and_wait(Some(STOP_TIMEOUT)).await;
        ended.map_err(|error| format!("cannot close the node server's own listener: {error}"))?;
    }
    Ok(())
}

/// The label of a session's connection.
pub(crate) fn label(session: u64) -> String {
    format!("session-{session:016x}")
}

fn session_of(label: &str) -> Option<u64> {
    u64::from_str_radix(label.strip_prefix("session-")?, 16).ok()
}

/// What the node server tells. It calls these from its own actor, so they must be quick.
struct Events {
    hub: Arc<Hub>,
    me: PeerId,
}

impl NodeEventSubscription for Events {
    fn node_session_opened(&self, session: NodeServerSessionInformation) {
        match session_of(&session.peer_addr) {
            Some(id) => self.hub.session_runs(id, session.actor),
            None => {
                tracing::error!(me = %self.me, "a connection that is not ours reached the node server: closed");
                session.actor.kill();
            }
        }
    }

    fn node_session_disconnected(&self, session: NodeServerSessionInformation) {
        if let Some(id) = session_of(&session.peer_addr) {
            self.hub.session_gone(id);
        }
    }

    fn node_session_authenticated(&self, _: NodeServerSessionInformation) {}

    fn node_session_ready(&self, session: NodeServerSessionInformation) {
        let Some(id) = session_of(&session.peer_addr) else {
            return;
        };
        let name = session.peer_name.map(|name| name.name).unwrap_or_default();
        self.hub.session_ready(id, |peer| {
            let expected = format!("{peer}@{peer}");
            if name != expected {
                return Err(format!(
                    "calls itself {name} after the handshake said {expected}"
                ));
            }
            find_port(peer, session.node_id).ok_or_else(|| "has no port actor".to_owned())
        });
    }
}

/// The peer's port as this session knows it; the group may hold that of an older session for a moment.
fn find_port(peer: &PeerId, session: ractor_cluster::NodeId) -> Option<ActorRef<PortMessage>> {
    let of_session = |cell: &ActorCell| matches!(cell.get_id(), ActorId::Remote { node_id, .. } if node_id == session);
    let members = pg::get_scoped_members(&SCOPE.to_owned(), &peer.to_string());
    members.into_iter().find(of_session).map(ActorRef::from)
}

/// A parcel. Goes over the wire as it is: the parcel has a format of its own.
pub(crate) struct PortMessage(pub(crate) Vec<u8>);

impl ractor::Message for PortMessage {
    fn serializable() -> bool {
        true
    }

    fn serialize(self) -> Result<SerializedMessage, BoxedDowncastErr> {
        Ok(SerializedMessage::Cast {
            variant: String::new(),
            args: self.0,
            metadata: None,
        })
    }

    fn deserialize(message: SerializedMessage) -> Result<Self, BoxedDowncastErr> {
        match message {
            SerializedMessage::Cast { args, .. } => Ok(Self(args)),
            SerializedMessage::Call { .. } | SerializedMessage::CallReply(..) => {
                Err(BoxedDowncastErr)
            }
        }
    }
}

/// Takes in what peers send.
struct Port;

impl Actor for Port {
    type Msg = PortMessage;
    type State = Arc<Hub>;
    type Arguments = Arc<Hub>;

    async fn pre_start(
        &self,
        _: ActorRef<PortMessage>,
        hub: Arc<Hub>,
    ) -> Result<Arc<Hub>, ActorProcessingErr> {
        Ok(hub)
    }

    async fn handle(
        &self,
        _: ActorRef<PortMessage>,
        message: PortMessage,
        hub: &mut Arc<Hub>,
    ) -> Result<(), ActorProcessingErr> {
        hub.receive(Bytes::from(message.0));
        Ok(())
    }
}
