//! What nodes say to each other, and the way to say it.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use ractor::ActorRef;
use serde::{Deserialize, Serialize};
use understudy_cluster::{Cluster, PeerId, PeerView, SendError};
use understudy_engine_core::frame::{AttemptError, AttemptId, StartAttempt, StepToken};
use understudy_protocol::message::ReplicaStatus;

use crate::cluster::ClusterMsg;
use crate::owed::Owed;

/// A replica of a model: the model's name and a number that is unique among its replicas in the whole cluster.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ReplicaId {
    pub model: Arc<str>,
    pub index: u32,
}

impl fmt::Display for ReplicaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.model, self.index)
    }
}

/// A replica on one incarnation of its node.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ReplicaRef {
    pub peer: PeerId,
    pub replica: ReplicaId,
}

/// Why an attempt ended without finishing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossCause {
    /// The engine process ended by itself, or by the system for want of memory.
    EngineExit,
    /// The engine process ended, and not for the attempt's sake: somebody killed it, or it was computing something else.
    EngineGone,
    /// The engine's heartbeat stopped.
    EngineSilent,
    /// The heartbeat went on, but no step finished.
    EngineHang,
    /// The engine sent what is no frame of its protocol.
    EngineProtocol,
    /// The host was declared dead, or the connection to it broke.
    NodeDown,
    /// The host stopped the replica on purpose.
    Stopped,
    /// A token message in between was lost.
    Gap,
    /// The replica's numbers are wrong: it refused the log, or was given up for others that it refused.
    Mismatch,
}

impl LossCause {
    /// For metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::EngineExit => "engine_exit",
            Self::EngineGone => "engine_gone",
            Self::EngineSilent => "engine_silent",
            Self::EngineHang => "engine_hang",
            Self::EngineProtocol => "engine_protocol",
            Self::NodeDown => "node_down",
            Self::Stopped => "stopped",
            Self::Gap => "gap",
            Self::Mismatch => "mismatch",
        }
    }
}

/// Why a host did not start an attempt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// The replica is not ready, or not on this host any more.
    NotReady,
    Engine(AttemptError),
}

/// One replica as its host sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReplicaReport {
    pub replica: ReplicaId,
    pub state: ReplicaState,
    /// Attempts that it runs and queues at most.
    pub capacity: u32,
    /// Numeric fingerprint of the engine; empty until it is ready.
    pub fingerprint: String,
    /// For people.
    pub status: ReplicaStatus,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReplicaState {
    /// An engine is loading.
    Starting,
    Ready,
    /// Waiting to start an engine again.
    Backoff,
    /// The restart intensity was exceeded; tried again after the cool-down only.
    Down,
    /// Its host stops it on purpose, and will not start it again.
    Stopping,
}

impl ReplicaState {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Backoff => "backoff",
            Self::Down => "down",
            Self::Stopping => "stopping",
        }
    }
}

/// Node → node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum PeerMessage {
    /// Host → gateways: all replicas of this host; replaces the report before.
    Report(Vec<ReplicaReport>),
    /// Gateway → host.
    Dispatch {
        replica: ReplicaId,
        start: StartAttempt,
    },
    /// Gateway → host: unknown attempts are ignored.
    Cancel {
        replica: ReplicaId,
        attempt: AttemptId,
    },
    /// Host → gateway: the tokens of one step that belong to this gateway.
    Tokens(Vec<StepToken>),
    /// Host → gateway: these attempts are over.
    Lost {
        attempts: Vec<AttemptId>,
        cause: LossCause,
    },
    /// Host → gateway: this attempt was not, or no longer can be, served there.
    Refused {
        attempt: AttemptId,
        refusal: Refusal,
    },
}

impl PeerMessage {
    /// The attempts that a message from a host is about.
    pub fn attempts(&self) -> Vec<AttemptId> {
        match self {
            Self::Tokens(tokens) => tokens.iter().map(|token| token.attempt).collect(),
            Self::Lost { attempts, .. } => attempts.clone(),
            Self::Refused { attempt, .. } => vec![*attempt],
            Self::Report(_) | Self::Dispatch { .. } | Self::Cancel { .. } => Vec::new(),
        }
    }
}

/// What carries payloads to other nodes: the cluster, or what stands in for it in a test.
pub trait Transport: Send + Sync {
    /// See [`Cluster::me`].
    fn me(&self) -> &PeerId;
    /// See [`Cluster::local_addr`].
    fn local_addr(&self) -> SocketAddr;
    /// See [`Cluster::peers`].
    fn peers(&self) -> Vec<PeerView>;
    /// See [`Cluster::send`].
    ///
    /// # Errors
    /// [`SendError`].
    fn send(&self, to: &PeerId, payload: Bytes) -> Result<(), SendError>;
}

impl Transport for Cluster {
    fn me(&self) -> &PeerId {
        self.me()
    }

    fn local_addr(&self) -> SocketAddr {
        self.local_addr()
    }

    fn peers(&self) -> Vec<PeerView> {
        self.peers()
    }

    fn send(&self, to: &PeerId, payload: Bytes) -> Result<(), SendError> {
        self.send(to, payload)
    }
}

/// The way to every node, this one included. Cheap to clone.
#[derive(Clone)]
pub struct Links {
    me: PeerId,
    remote: Arc<dyn Transport>,
    local: Arc<OnceLock<ActorRef<ClusterMsg>>>,
    owed: Owed,
}

impl Links {
    pub fn new(remote: Arc<dyn Transport>) -> Self {
        Self {
            me: remote.me().clone(),
            remote,
            local: Arc::new(OnceLock::new()),
            owed: Owed::default(),
        }
    }

    /// Names the actor that takes this node's messages to itself. Called once, at start-up.
    pub(crate) fn set_local(&self, local: ActorRef<ClusterMsg>) {
        self.local.set(local).ok();
    }

    pub fn me(&self) -> &PeerId {
        &self.me
    }

    pub fn cluster(&self) -> &dyn Transport {
        &*self.remote
    }

    /// Sends without waiting, in order per peer.
    ///
    /// # Errors
    /// [`SendError`] if the peer is not connected or too far behind. The message is dropped then: the caller either
    /// hears of the peer's end (and everything bound to it is replayed), or has to treat the peer as lost. A host that
    /// speaks about attempts uses [`Self::tell`], which does the latter.
    pub fn send(&self, to: &PeerId, message: PeerMessage) -> Result<(), SendError> {
        if *to == self.me {
            let local = self
                .local
                .get()
                .and_then(|local| local.cast(ClusterMsg::Local(message)).ok());
            return local.ok_or_else(|| SendError::NotConnected(to.clone()));
        }
        self.carry(to, &message)
    }

    /// Tells a gateway what became of attempts of its own. Returns whether the message is on its way. If it is not, the
    /// attempts are over for the caller: their gateway is gone, or hears later ([`Self::tell_owed`]) that they are lost.
    pub fn tell(&self, to: &PeerId, message: PeerMessage) -> bool {
        if *to == self.me {
            return self.send(to, message).is_ok();
        }
        let Err(error) = self.carry(to, &message) else {
            return true;
        };
        tracing::debug!(peer = %to, %error, "message about attempts dropped");
        // A gateway that is not connected has lost this whole node, or its own life: it waits for nothing here.
        if !matches!(error, SendError::NotConnected(_)) {
            let left_out = self.owed.note(to, message.attempts());
            if left_out > 0 {
                tracing::error!(peer = %to, attempts = left_out, "too many attempts that the gateway does not know the end of; these end by their deadlines");
            }
        }
        false
    }

    /// Tries again to tell gateways of attempts that are over. To be called regularly.
    pub fn tell_owed(&self) {
        for (peer, attempts) in self.owed.take() {
            let cause = LossCause::Gap;
            self.tell(&peer, PeerMessage::Lost { attempts, cause });
        }
    }

    /// The peer is gone: nothing is owed to it any more.
    pub fn forget(&self, peer: &PeerId) {
        self.owed.forget(peer);
    }

    /// A gateway does not wait for this attempt any more.
    pub fn settle(&self, attempt: AttemptId) {
        self.owed.settle(attempt);
    }

    /// Sends to this node and every connected one. Peers that cannot take it now get the next report instead.
    pub fn broadcast(&self, message: &PeerMessage) {
        for view in self.remote.peers() {
            if let Some(id) = view.id {
                self.carry(&id, message).ok();
            }
        }
        self.send(&self.me, message.clone()).ok();
    }

    fn carry(&self, to: &PeerId, message: &PeerMessage) -> Result<(), SendError> {
        let payload =
            rmp_serde::to_vec_named(message).expect("peer messages have no unserializable parts");
        self.remote.send(to, Bytes::from(payload))
    }
}

#[cfg(test)]
pub(crate) mod testing;
