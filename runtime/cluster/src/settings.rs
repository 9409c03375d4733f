//! What a node must be told to join its cluster, and the bounds of this layer with their defaults.

use std::net::SocketAddr;
use std::time::Duration;

use understudy_config::ConfigMismatch;

use crate::cookie::Cookie;
use crate::identity::{NodeName, PeerAddress};

/// Largest payload of one message, in bytes: 16 MiB.
pub const MAX_PAYLOAD_BYTES: usize = 16 << 20;
/// Bytes that one peer may have waiting here, sent but not yet taken by its consumer included: 32 MiB.
pub const SEND_BACKLOG_BYTES: usize = 32 << 20;
/// Connections that may be in the handshake at once; a further one pushes out the oldest.
pub const MAX_PENDING_HANDSHAKES: usize = 64;
/// Longest time from an accepted or dialed connection to a session that carries messages.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// First and longest wait between two dials of one peer; each wait is jittered down to its half.
pub const DIAL_BACKOFF: (Duration, Duration) =
    (Duration::from_millis(25), Duration::from_millis(500));
/// Longest time for one dial with its handshake. Short, so that a dial into a partition does not outlast it by much.
pub const DIAL_TIMEOUT: Duration = Duration::from_secs(2);
/// How long [`crate::Cluster::shutdown`] waits for the peers to take what was sent.
pub const SHUTDOWN_FLUSH: Duration = Duration::from_secs(1);

/// Everything that [`crate::Cluster::start`] needs.
#[derive(Debug, Clone)]
pub struct ClusterSettings {
    /// Name of the cluster; nodes of another cluster are refused.
    pub cluster: String,
    /// This node.
    pub node: NodeName,
    /// This run of the node; must be larger than that of the run before. See [`crate::new_incarnation`].
    pub incarnation: u64,
    /// Where to listen for peers; port 0 takes a free one.
    pub listen: SocketAddr,
    /// All other configured nodes. Only these are let in. An entry for this node itself is ignored.
    pub peers: Vec<PeerAddress>,
    /// The shared secret.
    pub cookie: Cookie,
    /// Checksum of the part of the configuration that must be the same on every node.
    pub config_checksum: u64,
    /// What to do with a peer whose checksum differs.
    pub config_mismatch: ConfigMismatch,
    /// When a silent peer is suspected and declared dead.
    pub detector: DetectorSettings,
    /// Bounds of memory and time.
    pub limits: Limits,
}

impl ClusterSettings {
    /// Settings with the defaults for everything that has one.
    pub fn new(
        cluster: impl Into<String>,
        node: NodeName,
        incarnation: u64,
        listen: SocketAddr,
        cookie: Cookie,
    ) -> Self {
        Self {
            cluster: cluster.into(),
            node,
            incarnation,
            listen,
            peers: Vec::new(),
            cookie,
            config_checksum: 0,
            config_mismatch: ConfigMismatch::Refuse,
            detector: DetectorSettings::default(),
            limits: Limits::default(),
        }
    }

    /// Every configured node but this one.
    pub(crate) fn others(&self) -> impl Iterator<Item = &PeerAddress> {
        self.peers.iter().filter(|peer| peer.node != self.node)
    }
}

/// The failure detector's clockwork. The three must stand in this order, or start fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DetectorSettings {
    /// How often a node tells each peer that it lives.
    pub heartbeat_interval: Duration,
    /// Silence after which a peer is suspected: nothing new should be sent to it.
    pub suspect_after: Duration,
    /// Silence after which a peer is declared dead and its session closed.
    pub dead_after: Duration,
}

impl Default for DetectorSettings {
    fn default() -> Self {
        Self {
            heartbeat_interval: Duration::from_millis(200),
            suspect_after: Duration::from_millis(600),
            dead_after: Duration::from_secs(1),
        }
    }
}

/// Bounds of memory and time; the defaults are the constants of the same names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// See [`SEND_BACKLOG_BYTES`].
    pub send_backlog_bytes: usize,
    /// See [`MAX_PENDING_HANDSHAKES`].
    pub max_pending_handshakes: usize,
    /// See [`HANDSHAKE_TIMEOUT`].
    pub handshake_timeout: Duration,
    /// See [`DIAL_BACKOFF`].
    pub dial_backoff: (Duration, Duration),
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            send_backlog_bytes: SEND_BACKLOG_BYTES,
            max_pending_handshakes: MAX_PENDING_HANDSHAKES,
            handshake_timeout: HANDSHAKE_TIMEOUT,
            dial_backoff: DIAL_BACKOFF,
        }
    }
}
