//! What the cluster layer tells its one consumer, and what it can be asked.
//!
//! Per node the events form sentences `Up (Suspect | Alive | Message)* Down`. A [`ClusterEvent::Message`]
//! stands between the `Up` and the `Down` of the session that carried it, and nowhere else.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;

use crate::identity::{PeerAddress, PeerId};

/// Something happened to a peer.
#[derive(Clone)]
pub enum ClusterEvent {
    /// A session with the peer is open; it can be sent to.
    Up {
        /// The peer.
        peer: PeerId,
    },
    /// The peer has been silent for `suspect_after`: send it nothing new.
    Suspect {
        /// The peer.
        peer: PeerId,
    },
    /// The suspicion is lifted.
    Alive {
        /// The peer.
        peer: PeerId,
    },
    /// The session is closed. Nothing of it is delivered any more. The same peer may come up again.
    Down {
        /// The peer.
        peer: PeerId,
        /// Why.
        cause: DownCause,
    },
    /// A payload, in the order in which the peer sent it.
    Message {
        /// The peer.
        from: PeerId,
        /// What it sent.
        payload: Bytes,
    },
}

/// Shows the length of a payload, never its content: a payload may hold a prompt, and events may be logged.
impl fmt::Debug for ClusterEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Up { peer } => write!(f, "Up({peer})"),
            Self::Suspect { peer } => write!(f, "Suspect({peer})"),
            Self::Alive { peer } => write!(f, "Alive({peer})"),
            Self::Down { peer, cause } => write!(f, "Down({peer}, {cause})"),
            Self::Message { from, payload } => {
                write!(f, "Message({from}, {} bytes)", payload.len())
            }
        }
    }
}

/// Why a session ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DownCause {
    /// The connection was closed or broke: the process died, or declared us dead.
    ConnectionLost,
    /// The failure detector heard nothing for this long.
    Silent(Duration),
    /// The peer said goodbye.
    Left,
    /// A later run of the same node, or the same run over a new connection, took its place.
    Replaced,
    /// The peer broke the protocol of this layer.
    Protocol(String),
}

impl fmt::Display for DownCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ConnectionLost => f.write_str("connection lost"),
            Self::Silent(time) => write!(f, "silent for {} ms", time.as_millis()),
            Self::Left => f.write_str("left"),
            Self::Replaced => f.write_str("replaced by a newer session"),
            Self::Protocol(what) => write!(f, "protocol violation: {what}"),
        }
    }
}

/// How a configured peer stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PeerState {
    /// It has not been met since this node started.
    NeverSeen,
    /// In session, and heard from.
    Alive,
    /// In session, but silent.
    Suspect,
    /// It was met, and is gone.
    Dead,
}

impl PeerState {
    /// `never_seen`, `alive`, `suspect` or `dead`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NeverSeen => "never_seen",
            Self::Alive => "alive",
            Self::Suspect => "suspect",
            Self::Dead => "dead",
        }
    }
}

/// One configured peer, as seen from this node.
#[derive(Debug, Clone)]
pub struct PeerView {
    /// Where it is configured to listen.
    pub address: PeerAddress,
    /// The run that is, or was last, in session.
    pub id: Option<PeerId>,
    /// How it stands.
    pub state: PeerState,
    /// Time since anything was heard from it; `None` when it was never met.
    pub last_heard: Option<Duration>,
    /// Bytes sent to it that its consumer has not taken yet.
    pub send_queue_bytes: usize,
    /// Bytes received from it that our consumer has not taken yet.
    pub receive_queue_bytes: usize,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::NodeName;

    #[test]
    fn debug_hides_payloads() {
        let from = PeerId::new(NodeName::new("a").unwrap(), 16);
        let event = ClusterEvent::Message {
            from,
            payload: Bytes::from_static(b"secret prompt"),
        };
        assert_eq!(format!("{event:?}"), "Message(a-10, 13 bytes)");
    }
}
