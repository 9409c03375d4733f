//! The public face: start, send, look, leave.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::event::{ClusterEvent, PeerView};
use crate::handshake::MAX_CLUSTER_BYTES;
use crate::hub::Hub;
use crate::identity::PeerId;
use crate::node::NodeThread;
use crate::parcel::{Lane, payload_cost};
use crate::settings::{ClusterSettings, DetectorSettings, MAX_PAYLOAD_BYTES};
use crate::telemetry;

/// Why the cluster layer cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Somebody else listens there.
    #[error("cluster port {0} is in use: stop the other process (`ss -ltnp 'sport = :{port}'` shows it), or give this node another port", port = .0.port())]
    PortInUse(SocketAddr),
    /// The address cannot be listened on.
    #[error("cannot listen for peers on {address}: {source}")]
    Listen {
        /// The configured address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The settings contradict themselves.
    #[error("cluster settings: {0}")]
    Settings(String),
    /// The thread or the actors of this layer could not be started.
    #[error("cluster layer: {0}")]
    Runtime(String),
}

/// Why a message was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// This run of the peer is not in session.
    #[error("{0} is not connected")]
    NotConnected(PeerId),
    /// Larger than [`MAX_PAYLOAD_BYTES`].
    #[error("message of {size_bytes} bytes is larger than the limit of {MAX_PAYLOAD_BYTES}")]
    TooLarge {
        /// Size of the payload.
        size_bytes: usize,
    },
    /// The peer takes its messages too slowly.
    #[error("{queued_bytes} bytes wait for {to} already: it takes its messages too slowly")]
    Backlog {
        /// The peer.
        to: PeerId,
        /// What waits, in bytes.
        queued_bytes: usize,
    },
}

impl SendError {
    /// Whether the same call may succeed later.
    pub fn is_retriable(&self) -> bool {
        !matches!(self, Self::TooLarge { .. })
    }
}

/// This node's place in its cluster. Dropping it leaves without a goodbye.
///
/// At most one may live in a process at a time: ractor's registries are shared by the whole process.
#[derive(Debug)]
pub struct Cluster {
    handle: ClusterHandle,
    local: SocketAddr,
    node: Option<NodeThread>,
}

/// A cheap, cloneable handle for sending and looking.
#[derive(Clone)]
pub struct ClusterHandle {
    hub: Arc<Hub>,
}

impl fmt::Debug for ClusterHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterHandle")
            .field("me", &self.hub.me)
            .finish_non_exhaustive()
    }
}

impl Cluster {
    /// Listens, starts to dial the peers, and tells `events` what happens from now on.
    ///
    /// A slow consumer of `events` slows down the peers that send to it, and nothing else. When the receiver of
    /// `events` is dropped, this node leaves the cluster. When `events` ends by itself, this layer has failed, and the
    /// node is in no cluster any more.
    pub async fn start(
        settings: ClusterSettings,
        events: mpsc::Sender<ClusterEvent>,
    ) -> Result<Self, StartError> {
        check(&settings)?;
        telemetry::register(settings.others().map(|peer| &peer.node));
        let hub = Arc::new(Hub::new(&settings));
        let (node, local) = NodeThread::start(settings, hub.clone(), events).await?;
        Ok(Self {
            handle: ClusterHandle { hub },
            local,
            node: Some(node),
        })
    }

    /// Where this node listens for its peers.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// This run of this node.
    pub fn me(&self) -> &PeerId {
        self.handle.me()
    }

    /// A handle that can be given to others.
    pub fn handle(&self) -> ClusterHandle {
        self.handle.clone()
    }

    /// See [`ClusterHandle::send`].
    pub fn send(&self, to: &PeerId, payload: Bytes) -> Result<(), SendError> {
        self.handle.send(to, payload)
    }

    /// See [`ClusterHandle::send_bulk`].
    pub fn send_bulk(&self, to: &PeerId, payload: Bytes) -> Result<(), SendError> {
        self.handle.send_bulk(to, payload)
    }

    /// See [`ClusterHandle::peers`].
    pub fn peers(&self) -> Vec<PeerView> {
        self.handle.peers()
    }

    /// Says goodbye: waits (at most [`crate::SHUTDOWN_FLUSH`]) until the peers have taken what was sent, closes
    /// every session, and ends the thread of this layer. The peers see `Down` with `Left`.
    pub async fn shutdown(mut self) {
        if let Some(node) = self.node.take() {
            node.stop().await;
        }
    }
}

impl ClusterHandle {
    /// This run of this node.
    pub fn me(&self) -> &PeerId {
        &self.hub.me
    }

    /// Sends `payload` to one run of a peer. Never waits. The peer's consumer gets the payloads of this call
    /// whole and in order, for as long as the session lasts; what was not taken by its end is lost.
    ///
    /// # Errors
    /// [`SendError::NotConnected`] from `Down` until `Up` (and always for this node itself),
    /// [`SendError::TooLarge`], [`SendError::Backlog`].
    pub fn send(&self, to: &PeerId, payload: Bytes) -> Result<(), SendError> {
        self.hub.send(to, Lane::Ordered, payload)
    }

    /// As [`ClusterHandle::send`], but in a lane of its own: ordered among the calls of `send_bulk`, overtaken by
    /// [`ClusterHandle::send`]. For large things that must not hold up small ones.
    pub fn send_bulk(&self, to: &PeerId, payload: Bytes) -> Result<(), SendError> {
        self.hub.send(to, Lane::Bulk, payload)
    }

    /// Every configured peer, in the order of the configuration.
    pub fn peers(&self) -> Vec<PeerView> {
        self.hub.peers()
    }

    /// Payloads dropped here because their session was closed, since the start.
    pub fn fenced_messages(&self) -> u64 {
        self.hub.fenced()
    }
}

fn check(settings: &ClusterSettings) -> Result<(), StartError> {
    let wrong = |what: String| Err(StartError::Settings(what));
    if settings.cluster.is_empty() || settings.cluster.len() > MAX_CLUSTER_BYTES {
        return wrong(format!(
            "the cluster name must have 1 to {MAX_CLUSTER_BYTES} bytes"
        ));
    }
    let DetectorSettings {
        heartbeat_interval,
        suspect_after,
        dead_after,
    } = settings.detector;
    if heartbeat_interval < Duration::from_millis(10) {
        return wrong("the heartbeat interval must be at least 10 ms".to_owned());
    }
    if heartbeat_interval * 2 > suspect_after || suspect_after >= dead_after {
        return wrong(format!(
            "the detector needs 2 x heartbeat interval <= suspect_after < dead_after, \
             but has {heartbeat_interval:?}, {suspect_after:?}, {dead_after:?}"
        ));
    }
    if settings.limits.max_pending_handshakes == 0 {
        return wrong("max_pending_handshakes must be at least 1".to_owned());
    }
    let least = usize::try_from(payload_cost(MAX_PAYLOAD_BYTES)).unwrap_or(usize::MAX);
    if settings.limits.send_backlog_bytes < least {
        return wrong(format!(
            "send_backlog_bytes must be at least {least}, so that the largest message fits"
        ));
    }
    let mut nodes: Vec<_> = settings.peers.iter().map(|peer| &peer.node).collect();
    nodes.sort();
    match nodes.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => wrong(format!("node {} is configured twice", pair[0])),
        None => Ok(()),
    }
}
