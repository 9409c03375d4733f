//! Nodes joined to a cluster: who is there, who is gone, and messages between them.
//!
//! This crate is the only user of `ractor_cluster`, and hides it. What it adds is what `ractor_cluster` leaves
//! to its user: a listener and a dialer of its own with a mutual handshake, a failure detector, an incarnation
//! in every name, flow control, bounds, and fencing of the dead. `docs/cluster.md` tells the whole story.

mod bridge;
mod clock;
mod cluster;
mod cookie;
mod detector;
mod dial;
mod door;
mod event;
mod handshake;
mod hub;
mod identity;
mod inbox;
mod membership;
mod node;
mod outbox;
mod parcel;
mod quiet;
mod roster;
mod session;
mod settings;
mod telemetry;
mod transport;

pub use cluster::{Cluster, ClusterHandle, SendError, StartError};
pub use cookie::Cookie;
pub use event::{ClusterEvent, DownCause, PeerState, PeerView};
pub use identity::{
    MAX_NAME_BYTES, NameError, NodeName, PeerAddress, PeerId, PeerIdError, new_incarnation,
};
pub use settings::{
    ClusterSettings, DIAL_BACKOFF, DIAL_TIMEOUT, DetectorSettings, HANDSHAKE_TIMEOUT, Limits,
    MAX_PAYLOAD_BYTES, MAX_PENDING_HANDSHAKES, SEND_BACKLOG_BYTES, SHUTDOWN_FLUSH,
};
pub use understudy_config::{ConfigMismatch, CookieError, MIN_COOKIE_BITS};
